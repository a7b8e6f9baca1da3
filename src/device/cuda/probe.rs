//! Is there a GPU that cuvee can use? The only gate to the driver: cudarc panics when a library or a symbol is missing.

use std::fmt;
use std::sync::OnceLock;

use cudarc::driver::{result, sys};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

/// Driver API that the bindings were made for: 13.0, of the drivers 580 and newer.
const NEEDED_API: i32 = 13000;
/// Compute capability of the kernels: bfloat16 in tensor cores came with 8.0.
const NEEDED_CAPABILITY: (i32, i32) = (8, 0);

/// Why there is none.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Unavailable {
    /// `libcuda.so.1` cannot be opened; with the loader's words.
    NoDriver(String),
    /// The driver is there and does not start; with its words.
    DriverFailed(String),
    /// API versions, found and needed.
    DriverTooOld(i32),
    NoDevice,
}

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let needed = (NEEDED_API / 1000, NEEDED_API % 1000 / 10);
        match self {
            Self::NoDriver(why) => write!(
                f,
                "there is no NVIDIA driver ({why}); on a machine with an NVIDIA GPU, install driver 580 or newer"
            ),
            Self::DriverFailed(why) => write!(
                f,
                "the NVIDIA driver does not start ({why}); does nvidia-smi work? In a container, was it started with its GPUs?"
            ),
            Self::DriverTooOld(found) => write!(
                f,
                "the NVIDIA driver knows CUDA {}.{}, cuvee needs {}.{}; install driver 580 or newer",
                found / 1000,
                found % 1000 / 10,
                needed.0,
                needed.1
            ),
            Self::NoDevice => write!(f, "the NVIDIA driver sees no GPU; is CUDA_VISIBLE_DEVICES set to nothing?"),
        }
    }
}

/// A GPU, before anything is done with it.
#[derive(Clone, Debug)]
pub struct Found {
    pub ordinal: usize,
    pub name: String,
    pub capability: (i32, i32),
    pub memory_bytes: usize,
    pub multiprocessors: usize,
    /// Shared memory that a block may have at most.
    pub shared_bytes: usize,
}

impl Found {
    /// Whether the kernels run on it.
    pub fn fits(&self) -> bool {
        self.capability >= NEEDED_CAPABILITY
    }

    /// Why they do not.
    pub fn unfit(&self) -> String {
        let (major, minor) = self.capability;
        format!("{} has compute capability {major}.{minor}; the kernels need 8.0 (Ampere) or newer", self.name)
    }
}

/// How the loader says it: libloading itself tells only that it failed.
pub(super) fn detail(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or(error.to_string(), |source| source.to_string())
}

/// All GPUs that the driver sees, in its order. Never panics, and asks only once.
pub fn probe() -> Result<&'static [Found], Unavailable> {
    static FOUND: OnceLock<Result<Vec<Found>, Unavailable>> = OnceLock::new();
    FOUND.get_or_init(look).as_deref().map_err(Clone::clone)
}

fn look() -> Result<Vec<Found>, Unavailable> {
    let opened = ["libcuda.so.1", "libcuda.so"].iter().map(|name| {
        // SAFETY: the driver's library has no initializers that ask anything of the program.
        unsafe { Library::open(Some(*name), RTLD_NOW | RTLD_GLOBAL) }
    });
    let library = opened.reduce(|first, second| first.or_else(|e| second.map_err(|_| e))).expect("two names");
    // Stays open: cudarc looks for `libcuda.so` first, which is the same library, then finds this one.
    std::mem::forget(library.map_err(|e| Unavailable::NoDriver(detail(&e)))?);
    let failed = |e: result::DriverError| Unavailable::DriverFailed(e.to_string());
    result::init().map_err(|e| match e.0 {
        sys::cudaError_enum::CUDA_ERROR_NO_DEVICE => Unavailable::NoDevice,
        _ => failed(e),
    })?;
    let mut api = 0;
    // SAFETY: the driver is initialized, and writes one integer.
    unsafe { sys::cuDriverGetVersion(&mut api) }.result().map_err(failed)?;
    if api < NEEDED_API {
        return Err(Unavailable::DriverTooOld(api));
    }
    let count = result::device::get_count().map_err(failed)?;
    let found: Vec<Found> = (0..count).map(describe).collect::<Result<_, _>>().map_err(failed)?;
    if found.is_empty() { Err(Unavailable::NoDevice) } else { Ok(found) }
}

fn describe(ordinal: i32) -> Result<Found, result::DriverError> {
    use sys::CUdevice_attribute as Attribute;
    let device = result::device::get(ordinal)?;
    // SAFETY: `device` is one that the driver just named.
    let attribute = |which| unsafe { result::device::get_attribute(device, which) };
    Ok(Found {
        ordinal: ordinal as usize,
        name: result::device::get_name(device)?,
        capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        // SAFETY: as above.
        memory_bytes: unsafe { result::device::total_mem(device)? },
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize,
        shared_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize,
    })
}
