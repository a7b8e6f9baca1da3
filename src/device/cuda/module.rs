//! From a `.cu` file to code on the GPU: an embedded cubin that fits; else a cubin that NVRTC makes of the embedded source and
//! the disk keeps; else the embedded PTX, which the driver compiles.

use std::ffi::{CString, c_char, c_void};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::{fs, process};

use cudarc::driver::{result, sys};
use cudarc::nvrtc;
use flate2::read::GzDecoder;

use super::launch::{Module, kernels};
use super::probe::Found;
use super::{failed, libraries};
use crate::error::{At, Error, Result};

const PTX: &str = "ptx";

/// A module on the GPU, for as long as the program runs.
pub(super) struct Loaded {
    module: sys::CUmodule,
    name: &'static str,
}

impl Loaded {
    pub fn new(module: &'static Module, found: &Found, cache_dir: Option<&Path>) -> Result<Self> {
        let image = image(module, found, cache_dir)?;
        // SAFETY: a cubin, or PTX with its terminating zero.
        let loaded = unsafe { result::module::load_data(image.as_ptr().cast::<c_void>()) };
        Ok(Self { module: loaded.map_err(failed("loading kernels"))?, name: module.name })
    }

    pub fn function(&self, name: &'static str) -> Result<sys::CUfunction> {
        let text = CString::new(name).expect("an identifier");
        // SAFETY: the module is loaded.
        unsafe { result::module::get_function(self.module, text) }
            .map_err(|e| Error::op(name, format!("{e}: not in the module {}", self.name)))
    }
}

/// What the driver is given.
fn image(module: &Module, found: &Found, cache_dir: Option<&Path>) -> Result<Vec<u8>> {
    if let Some(cubin) = fitting(module.images, found.capability) {
        return Ok(inflated(cubin));
    }
    let why = match libraries::nvrtc() {
        Ok(_) => match compiled(module, found.capability, cache_dir) {
            Ok(cubin) => return Ok(cubin),
            Err(why) => why,
        },
        Err(why) => format!("NVRTC cannot be opened: {why}"),
    };
    match module.images.iter().find(|(name, _)| *name == PTX) {
        Some((_, ptx)) => Ok([inflated(ptx), b"\0".to_vec()].concat()),
        None => {
            let (major, minor) = found.capability;
            let gpu = format!("{} (compute capability {major}.{minor})", found.name);
            let advice = "`pip install nvidia-cuda-nvrtc==13.0.*` brings a compiler, or build cuvee where nvcc is";
            Err(Error::op(
                "kernels",
                format!("none of {}.cu is in this build for {gpu}, and {why}; {advice}", module.name),
            ))
        }
    }
}

/// Whether this build has cubins for GPUs of this compute capability.
pub fn embedded(capability: (i32, i32)) -> bool {
    kernels::MODULES.iter().all(|module| fitting(module.images, capability).is_some())
}

fn inflated(image: &[u8]) -> Vec<u8> {
    let mut whole = Vec::new();
    GzDecoder::new(image).read_to_end(&mut whole).expect("build.rs compressed it");
    whole
}

/// The cubin for a GPU of this compute capability: `sm_90a` runs on 9.0 alone, `sm_8x` on 8.y with y >= x.
fn fitting(images: &[(&str, &'static [u8])], capability: (i32, i32)) -> Option<&'static [u8]> {
    let rank = |name: &str| {
        let arch = name.strip_prefix("sm_")?;
        let exact = arch.ends_with(char::is_alphabetic);
        let number: i32 = arch.trim_end_matches(char::is_alphabetic).parse().ok()?;
        let (major, minor) = (number / 10, number % 10);
        let runs = if exact { (major, minor) == capability } else { major == capability.0 && minor <= capability.1 };
        runs.then_some((exact, minor))
    };
    let fitting = images.iter().filter_map(|(name, image)| Some((rank(name)?, *image)));
    fitting.max_by_key(|(rank, _)| *rank).map(|(_, image)| image)
}

/// A cubin from NVRTC, or from the last time that it was asked for the same; or why there is none.
fn compiled(module: &Module, (major, minor): (i32, i32), cache_dir: Option<&Path>) -> Result<Vec<u8>, String> {
    let options = [format!("--gpu-architecture=sm_{major}{minor}"), "--std=c++17".into(), "-lineinfo".into()];
    let key = format!("{} {options:?} {}", version()?, module.source);
    let name = format!("{}-sm_{major}{minor}-{}.cubin", module.name, &blake3::hash(key.as_bytes()).to_hex()[..16]);
    let kept = cache_dir.map(|dir| dir.join(name));
    if let Some(cubin) = kept.as_ref().and_then(|path| fs::read(path).ok()) {
        return Ok(cubin);
    }
    let cubin = compile(module, &options)?;
    // A cache that cannot be written costs a second the next time, no more.
    kept.iter().for_each(|path| drop(keep(path, &cubin)));
    Ok(cubin)
}

fn keep(path: &PathBuf, cubin: &[u8]) -> Result<()> {
    fs::create_dir_all(path.parent().expect("a file in a folder")).at(path)?;
    let temporary = path.with_extension(process::id().to_string());
    fs::write(&temporary, cubin).at(&temporary)?;
    fs::rename(&temporary, path).at(path)
}

fn version() -> Result<String, String> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the library is open, and writes two integers.
    unsafe { nvrtc::sys::nvrtcVersion(&mut major, &mut minor) }.result().map_err(|e| e.to_string())?;
    Ok(format!("{major}.{minor}"))
}

fn compile(module: &Module, options: &[String]) -> Result<Vec<u8>, String> {
    let text = |e: nvrtc::result::NvrtcError| e.to_string();
    let source = CString::new(module.source).map_err(|e| e.to_string())?;
    let name = CString::new(format!("{}.cu", module.name)).expect("an identifier");
    let program = nvrtc::result::create_program(&source, Some(&name)).map_err(text)?;
    // SAFETY: the program was just made and is destroyed below; NVRTC says how long the cubin is and fills as much.
    unsafe {
        let made = nvrtc::result::compile_program(program, options);
        let cubin = match made {
            Ok(()) => cubin(program).map_err(text),
            Err(e) => {
                let log = nvrtc::result::get_program_log(program).unwrap_or_default();
                let log: String = log.iter().map(|c| char::from(*c as u8)).collect();
                Err(format!("NVRTC refuses {}.cu: {e}: {}", module.name, log.trim_end_matches('\0')))
            }
        };
        nvrtc::result::destroy_program(program).map_err(text)?;
        cubin
    }
}

/// # Safety
/// The program was compiled for a real architecture.
unsafe fn cubin(program: nvrtc::sys::nvrtcProgram) -> Result<Vec<u8>, nvrtc::result::NvrtcError> {
    let mut bytes = 0;
    // SAFETY: the caller's program; it writes a size, then as many bytes.
    unsafe {
        nvrtc::sys::nvrtcGetCUBINSize(program, &mut bytes).result()?;
        let mut cubin = vec![0u8; bytes];
        nvrtc::sys::nvrtcGetCUBIN(program, cubin.as_mut_ptr().cast::<c_char>()).result()?;
        Ok(cubin)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_fits_the_gpu() {
        let images: &[(&str, &'static [u8])] =
            &[("sm_80", b"80"), ("sm_86", b"86"), ("sm_90a", b"90a"), ("sm_90", b"90"), (PTX, b"ptx")];
        for (capability, expected) in [
            ((8, 0), Some(&b"80"[..])),
            ((8, 6), Some(b"86")),
            ((8, 9), Some(b"86")),
            ((9, 0), Some(b"90a")),
            ((10, 0), None),
            ((7, 5), None),
        ] {
            assert_eq!(fitting(images, capability), expected, "{capability:?}");
        }
    }

    #[test]
    fn embedded_images_are_whole() {
        for (module, (name, image)) in
            super::super::kernels::MODULES.iter().flat_map(|m| m.images.iter().map(move |image| (m, image)))
        {
            let whole = inflated(image);
            let begins = if *name == PTX { whole.starts_with(b"//") } else { whole.starts_with(b"\x7fELF") };
            assert!(begins, "{} {name}", module.name);
        }
    }

    /// Where NVRTC is installed, every kernel compiles without any header and the second time comes from the disk.
    #[test]
    fn nvrtc_makes_cubins_and_the_disk_keeps_them() {
        let Ok(_) = libraries::nvrtc() else { return };
        let cache = tempfile::tempdir().unwrap();
        for module in super::super::kernels::MODULES {
            let made = compiled(module, (9, 0), Some(cache.path())).unwrap_or_else(|e| panic!("{e}"));
            assert!(made.starts_with(b"\x7fELF"), "{}", module.name);
            assert_eq!(compiled(module, (9, 0), Some(cache.path())).unwrap(), made);
        }
        assert_eq!(fs::read_dir(cache.path()).unwrap().count(), super::super::kernels::MODULES.len());
    }
}
