//! One NVIDIA GPU, through the driver API that is opened at run time: the same program runs where there is none.
//!
//! | concept | here |
//! |---|---|
//! | is there one | [`probe`] |
//! | all work, in order | one stream; [`Cuda::synchronize`] waits for it |
//! | a kernel with its arguments | a struct of [`kernels`], made from the signature in `kernels/*.cu` |
//! | memory of an op that outlives no op | [`Cuda::workspace`] |
//!
//! A launch returns before the kernel ran. What goes wrong in one is reported by whoever waits next; with
//! `CUDA_LAUNCH_BLOCKING=1` by the launch itself.

mod blas;
mod launch;
pub mod libraries;
mod memory;
mod module;
mod probe;
mod products;

#[cfg(test)]
mod signature;

use std::cell::{Cell, OnceCell, RefCell};
use std::ffi::c_void;
use std::fmt::Display;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::{result, sys};
use half::bf16;

pub use launch::{Element, Entry, Grid, In, Module, Out, RESOURCES, kernels};
pub use memory::{CudaSpan, STAGING_BYTES};
pub use module::embedded;
pub use probe::{Found, Unavailable, probe};
pub use products::{Operand, Product};

use super::{DType, Device, View, ViewMut};
use crate::error::{Error, Result};
use blas::Blas;
use memory::{Context, Staging};
use module::Loaded;

/// Of the driver's error, which names no op: what was being done.
fn failed<E: Display>(what: &'static str) -> impl Fn(E) -> Error {
    move |e| Error::op(what, format!("{e} (CUDA_LAUNCH_BLOCKING=1 shows which kernel failed)"))
}

/// The same of what needs no kernel.
fn refused<E: Display>(what: &'static str) -> impl Fn(E) -> Error {
    move |e| Error::op(what, format!("{e}; `cuvee doctor` looks at the GPU, --device cpu does without"))
}

/// How a GPU is used.
#[derive(Clone, Debug)]
pub struct Options {
    /// Index among those that the driver sees.
    pub ordinal: usize,
    /// Of weights and activations: F32, or Bf16 with f32 master weights, gradients and moments.
    pub storage: DType,
    /// Memory that ops share, one after the other.
    pub workspace_bytes: usize,
    /// Where kernels that NVRTC compiles are kept; `None` = compile them each time.
    pub cache_dir: Option<PathBuf>,
    /// Our products instead of cuBLASLt's: slower, and no row depends on how many others there are.
    pub batch_invariant: bool,
}

impl Options {
    /// A quarter for cuBLASLt, where there is one, and the rest for tiles of the head and for partial sums.
    pub const WORKSPACE_BYTES: usize = 128 << 20;

    pub fn new(ordinal: usize, storage: DType) -> Self {
        let workspace_bytes = Self::WORKSPACE_BYTES;
        Self { ordinal, storage, workspace_bytes, cache_dir: None, batch_invariant: false }
    }
}

/// One GPU. Not to be shared between threads: its work is one stream.
pub struct Cuda {
    found: Found,
    storage: DType,
    modules: Vec<OnceCell<Loaded>>,
    /// By entry; with the dynamic shared memory that was asked for.
    functions: Vec<OnceCell<(sys::CUfunction, Cell<usize>)>>,
    workspace: CudaSpan,
    /// Of both, cuBLASLt's and that of the ops.
    workspace_bytes: usize,
    blas: Option<Blas>,
    staging: RefCell<Staging>,
    cache_dir: Option<PathBuf>,
    /// Last: everything above needs it to be given back.
    context: Arc<Context>,
}

/// The GPU of this number, if the kernels run on it.
fn usable(ordinal: usize) -> Result<&'static Found> {
    let refused = |why: String| Error::option(format!("--device cuda:{ordinal}"), why);
    let all = probe().map_err(|why| refused(why.to_string()))?;
    let found = all.get(ordinal).ok_or_else(|| {
        let names: Vec<String> = all.iter().map(|found| format!("cuda:{} {}", found.ordinal, found.name)).collect();
        refused(format!("there is {}", names.join(", ")))
    })?;
    if !found.fits() {
        return Err(refused(found.unfit()));
    }
    Ok(found)
}

impl Cuda {
    /// Opens a GPU. Fails, saying what is missing, where there is none or it is too old.
    pub fn open(options: &Options) -> Result<Self> {
        let found = usable(options.ordinal)?;
        let context = Context::new(options.ordinal)?;
        let workspace = CudaSpan::new(&context, options.workspace_bytes)?;
        let (workspace, blas) = if options.batch_invariant { (workspace, None) } else { Blas::open(workspace)? };
        Ok(Self {
            found: found.clone(),
            storage: options.storage,
            modules: kernels::MODULES.iter().map(|_| OnceCell::new()).collect(),
            functions: kernels::ENTRIES.iter().map(|_| OnceCell::new()).collect(),
            workspace,
            workspace_bytes: options.workspace_bytes,
            blas,
            staging: RefCell::new(Staging::new(&context)?),
            cache_dir: options.cache_dir.clone(),
            context,
        })
    }

    /// What is free on a GPU, once this program has its context there.
    pub fn free_bytes(ordinal: usize) -> Result<usize> {
        usable(ordinal)?;
        Context::new(ordinal)?.free_bytes()
    }

    pub fn found(&self) -> &Found {
        &self.found
    }

    /// Waits for all work; fails with what went wrong in it.
    pub fn synchronize(&self) -> Result<()> {
        self.context.bind()?;
        self.context.synchronize()
    }

    /// The GPU's own time for what `work` puts into the stream. Waits for it.
    pub fn timed(&self, work: impl FnOnce() -> Result<()>) -> Result<Duration> {
        self.context.timed(work)
    }

    /// The shared memory of the ops, as `len` elements from byte `offset` on: whoever asks next gets the same. Contents of
    /// no meaning.
    pub fn workspace<T: Element>(&self, offset: usize, len: usize) -> Out<'_, T> {
        Out::at(self.workspace.address(offset, len * T::DTYPE.bytes()))
    }

    pub fn workspace_bytes(&self) -> usize {
        self.workspace.len()
    }

    /// Streaming multiprocessors: blocks beyond a few for each add nothing.
    pub fn multiprocessors(&self) -> usize {
        self.found.multiprocessors
    }

    /// For a kernel that was not made for these template arguments.
    fn no_instance(&self, kernel: &'static str, asked: &dyn std::fmt::Debug) -> Error {
        Error::op(kernel, format!("there is no kernel for {asked:?}"))
    }

    fn function(&self, entry: usize) -> Result<&(sys::CUfunction, Cell<usize>)> {
        if let Some(function) = self.functions[entry].get() {
            return Ok(function);
        }
        let Entry { name, module } = kernels::ENTRIES[entry];
        let loaded = match self.modules[module].get() {
            Some(loaded) => loaded,
            None => {
                let loaded = Loaded::new(&kernels::MODULES[module], &self.found, self.cache_dir.as_deref())?;
                self.modules[module].get_or_init(|| loaded)
            }
        };
        let function = (loaded.function(name)?, Cell::new(0));
        Ok(self.functions[entry].get_or_init(|| function))
    }

    /// Puts a kernel into the stream; `arguments` point to values of the types in its signature (the structs of
    /// [`kernels`] see to that), `describe` names them for a message.
    fn launch(
        &self,
        entry: usize,
        grid: Grid,
        threads: u32,
        arguments: &mut [*mut c_void],
        describe: &dyn Fn() -> String,
    ) -> Result<()> {
        let Grid { blocks, shared_bytes } = grid;
        if blocks.contains(&0) {
            return Ok(());
        }
        self.context.bind()?;
        let name = kernels::ENTRIES[entry].name;
        let refused = |e: result::DriverError| {
            let (blocks, arguments) = (&blocks, describe());
            Error::op(
                name,
                format!("{e}: {blocks:?} blocks of {threads} threads, {shared_bytes} bytes shared; {arguments}"),
            )
        };
        let (function, shared_so_far) = self.function(entry)?;
        if shared_bytes > self.found.shared_bytes {
            let (gpu, most) = (&self.found.name, self.found.shared_bytes);
            let advice = "--dtype bf16 needs half of what f32 needs, and --device cpu none";
            return Err(Error::op(name, format!("{shared_bytes} bytes of shared memory, {gpu} has {most}; {advice}")));
        }
        if shared_bytes > shared_so_far.get() {
            use sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as MOST;
            // SAFETY: the function belongs to a module that lives as long as this.
            unsafe { result::function::set_function_attribute(*function, MOST, shared_bytes as i32) }
                .map_err(refused)?;
            shared_so_far.set(shared_bytes);
        }
        let [x, y, z] = blocks.map(|n| u32::try_from(n).unwrap_or(u32::MAX));
        // SAFETY: `arguments` has the number and types that the kernel was compiled with: both come from one signature.
        unsafe {
            result::launch_kernel(
                *function,
                (x, y, z),
                (threads, 1, 1),
                shared_bytes as u32,
                self.context.stream,
                arguments,
            )
        }
        .map_err(refused)
    }

    /// Elements `first..` of what `value` gives, as the tensor holds them.
    fn write(&self, dst: ViewMut<Self>, value: impl Fn(usize) -> f32) -> Result<()> {
        self.context.bind()?;
        let (dtype, len) = (dst.dtype, dst.len());
        let (to, _) = dst.view().bytes_at();
        self.staging.borrow_mut().upload(to, len, dtype.bytes(), |first, bytes| match dtype {
            DType::F32 => {
                let out = bytemuck::cast_slice_mut::<u8, f32>(bytes);
                out.iter_mut().enumerate().for_each(|(i, x)| *x = value(first + i));
            }
            DType::Bf16 => {
                let out = bytemuck::cast_slice_mut::<u8, bf16>(bytes);
                out.iter_mut().enumerate().for_each(|(i, x)| *x = bf16::from_f32(value(first + i)));
            }
            DType::U32 => panic!("numbers written to indices"),
        })
    }

    fn read(&self, src: View<Self>, mut take: impl FnMut(usize, f32)) -> Result<()> {
        self.context.bind()?;
        let (dtype, len) = (src.dtype, src.len());
        let (from, _) = src.bytes_at();
        self.staging.borrow_mut().download(from, len, dtype.bytes(), |first, bytes| match dtype {
            DType::F32 => {
                bytemuck::cast_slice::<u8, f32>(bytes).iter().enumerate().for_each(|(i, x)| take(first + i, *x));
            }
            DType::Bf16 => {
                let read = bytemuck::cast_slice::<u8, bf16>(bytes);
                read.iter().enumerate().for_each(|(i, x)| take(first + i, x.to_f32()));
            }
            DType::U32 => panic!("numbers read from indices"),
        })
    }
}

impl Device for Cuda {
    const NAME: &'static str = "cuda";
    const APART: bool = true;
    type Span = CudaSpan;

    fn storage(&self) -> DType {
        self.storage
    }

    fn arithmetic(&self) -> &'static str {
        match (self.storage, &self.blas) {
            (DType::Bf16, None) => "cuda bf16",
            (DType::Bf16, Some(_)) => "cuda bf16 cublaslt",
            (_, None) => "cuda f32",
            (_, Some(_)) => "cuda f32 cublaslt",
        }
    }

    fn available_bytes(&self) -> Result<Option<usize>> {
        self.context.bind()?;
        Ok(Some(self.context.free_bytes()? + self.workspace_bytes))
    }

    fn profile(&self, on: bool) -> Result<()> {
        self.synchronize()?;
        // SAFETY: the context is current; a profiler that is not there is no error.
        let result = unsafe { if on { sys::cuProfilerStart() } else { sys::cuProfilerStop() } };
        result.result().map_err(failed("profiler"))
    }

    fn width(dtype: DType) -> usize {
        dtype.bytes()
    }

    fn alloc(&self, bytes: usize) -> Result<CudaSpan> {
        CudaSpan::new(&self.context, bytes)
    }

    fn split(span: CudaSpan, at: usize) -> (CudaSpan, CudaSpan) {
        span.split(at)
    }

    fn zero(&self, dst: ViewMut<Self>) -> Result<()> {
        self.context.bind()?;
        let (at, bytes) = dst.view().bytes_at();
        // SAFETY: inside a live span that nobody else may write.
        unsafe { result::memset_d8_async(at, 0, bytes, self.context.stream) }.map_err(failed("zero"))
    }

    fn copy(&self, src: View<Self>, dst: ViewMut<Self>) -> Result<()> {
        assert_eq!(src.len(), dst.len(), "a copy of another tensor");
        let n = src.len();
        let grid = Grid::of_packs::<bf16>(n, kernels::Cast::<f32, bf16>::THREADS);
        match (src.dtype, dst.dtype) {
            (DType::F32, DType::Bf16) => {
                return kernels::Cast::<f32, bf16> { from: src.input(), to: dst.output(), n: n as u64 }
                    .launch(self, grid);
            }
            (DType::Bf16, DType::F32) => {
                return kernels::Cast::<bf16, f32> { from: src.input(), to: dst.output(), n: n as u64 }
                    .launch(self, grid);
            }
            (from, to) => assert_eq!(from, to, "a copy to another type"),
        }
        self.context.bind()?;
        let ((from, bytes), (to, _)) = (src.bytes_at(), dst.view().bytes_at());
        // SAFETY: both inside live spans; they do not overlap, since one is borrowed for writing.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.context.stream) }.map_err(failed("copy"))
    }

    fn write_f32(&self, src: &[f32], dst: ViewMut<Self>) -> Result<()> {
        assert_eq!(src.len(), dst.len());
        self.write(dst, |i| src[i])
    }

    fn write_f64(&self, src: &[f64], dst: ViewMut<Self>) -> Result<()> {
        assert_eq!(src.len(), dst.len());
        self.write(dst, |i| src[i] as f32)
    }

    fn write_u32(&self, src: &[u32], dst: ViewMut<Self>) -> Result<()> {
        assert_eq!((DType::U32, src.len()), (dst.dtype, dst.len()), "indices written to another tensor");
        self.context.bind()?;
        let (to, _) = dst.view().bytes_at();
        self.staging.borrow_mut().upload(to, src.len(), size_of::<u32>(), |first, bytes| {
            let len = bytes.len() / size_of::<u32>();
            bytes.copy_from_slice(bytemuck::cast_slice(&src[first..first + len]));
        })
    }

    fn read_f32(&self, src: View<Self>, dst: &mut [f32]) -> Result<()> {
        assert_eq!(src.len(), dst.len());
        self.read(src, |i, x| dst[i] = x)
    }

    fn read_f64(&self, src: View<Self>, dst: &mut [f64]) -> Result<()> {
        assert_eq!(src.len(), dst.len());
        self.read(src, |i, x| dst[i] = f64::from(x))
    }

    fn read_u32(&self, src: View<Self>, dst: &mut [u32]) -> Result<()> {
        assert_eq!((DType::U32, src.len()), (src.dtype, dst.len()), "indices read from another tensor");
        self.context.bind()?;
        let (from, _) = src.bytes_at();
        self.staging.borrow_mut().download(from, src.len(), size_of::<u32>(), |first, bytes| {
            let len = bytes.len() / size_of::<u32>();
            dst[first..first + len].copy_from_slice(bytemuck::cast_slice(bytes));
        })
    }
}
