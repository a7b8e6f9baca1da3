//! The CPU: f32 storage and arithmetic on every core. What is only read, a frozen model's matrices or a task vector, can be kept as
//! bf16.

use half::bf16;
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::{DType, Device, HostSpan, Storage, View, ViewMut};
use crate::error::{Error, Result};

/// The widest instruction set that this machine has and the kernels use.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Isa {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            if has!("avx512f") && has!("avx512vl") && has!("avx512dq") && has!("avx2") && has!("fma") {
                return Self::Avx512;
            }
            if has!("avx2") && has!("fma") {
                return Self::Avx2;
            }
        }
        Self::Portable
    }
}

/// How matrix products are summed. Each is one fixed order; the two differ by rounding.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Products {
    /// Chains of fused multiply-adds, with the same bits on every instruction set.
    Chains,
    /// Tiles of Intel's matrix unit (AMX), several times faster.
    #[cfg(target_arch = "x86_64")]
    Tiles,
}

impl Products {
    /// The fastest that this machine has.
    pub fn detect() -> Self {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if Isa::detect() == Isa::Avx512 && std::arch::is_x86_feature_detected!("avx512bw") && has_tiles() {
            return Self::Tiles;
        }
        Self::Chains
    }
}

/// Whether the processor has tiles of bfloat16 and Linux lets this process use their registers.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn has_tiles() -> bool {
    const AMX_BF16: u32 = 1 << 22;
    const AMX_TILE: u32 = 1 << 24;
    const REQUEST_STATE: libc::c_long = 0x1023; // ARCH_REQ_XCOMP_PERM
    const TILE_DATA: libc::c_long = 18; // XFEATURE_XTILEDATA
    let features = std::arch::x86_64::__cpuid_count(7, 0).edx;
    // SAFETY: the call asks for a permission and touches no memory; threads started later inherit it.
    features & AMX_BF16 != 0
        && features & AMX_TILE != 0
        && unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST_STATE, TILE_DATA) } == 0
}

pub struct Cpu {
    pool: ThreadPool,
    isa: Isa,
    products: Products,
}

impl Cpu {
    /// `threads` = 0 takes every core. Results never depend on the number of threads.
    pub fn new(threads: usize) -> Result<Self> {
        Self::with(threads, Isa::detect(), Products::detect())
    }

    /// With an instruction set no wider than the machine's own, and chains: what every machine can repeat.
    pub fn with_isa(threads: usize, isa: Isa) -> Result<Self> {
        Self::with(threads, isa, Products::Chains)
    }

    fn with(threads: usize, isa: Isa, products: Products) -> Result<Self> {
        assert!(isa <= Isa::detect(), "this machine has no {isa:?}");
        let pool = ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("cuvee-{i}")).build();
        let pool = pool.map_err(|e| Error::option("--threads", format!("{threads} threads cannot be started: {e}")))?;
        Ok(Self { pool, isa, products })
    }

    pub fn isa(&self) -> Isa {
        self.isa
    }

    pub fn products(&self) -> Products {
        self.products
    }

    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// Runs a parallel section on this device's threads.
    pub fn run<R: Send>(&self, section: impl FnOnce() -> R + Send) -> R {
        self.pool.install(section)
    }
}

impl Device for Cpu {
    const NAME: &'static str = "cpu";
    type Span = HostSpan;

    fn arithmetic(&self) -> &'static str {
        match self.products {
            Products::Chains => Self::NAME,
            #[cfg(target_arch = "x86_64")]
            Products::Tiles => "cpu, tiles",
        }
    }

    fn keeps(&self) -> Storage {
        Storage::CPU
    }

    fn width(dtype: DType) -> usize {
        dtype.bytes()
    }

    fn alloc(&self, bytes: usize) -> Result<HostSpan> {
        HostSpan::new(bytes)
    }

    fn split(span: HostSpan, at: usize) -> (HostSpan, HostSpan) {
        span.split(at)
    }

    fn zero(&self, dst: ViewMut<Self>) -> Result<()> {
        match dst.dtype() {
            DType::F32 => dst.into_f32s().fill(0.0),
            DType::Bf16 => dst.into_bf16s().fill(bf16::ZERO),
            DType::U32 => dst.into_u32s().fill(0),
        }
        Ok(())
    }

    fn copy(&self, src: View<Self>, dst: ViewMut<Self>) -> Result<()> {
        match dst.dtype() {
            DType::F32 => dst.into_f32s().copy_from_slice(src.f32s()),
            DType::Bf16 => dst.into_bf16s().copy_from_slice(src.bf16s()),
            DType::U32 => dst.into_u32s().copy_from_slice(src.u32s()),
        }
        Ok(())
    }

    fn write_f32(&self, src: &[f32], dst: ViewMut<Self>) -> Result<()> {
        match dst.dtype() {
            DType::Bf16 => dst.into_bf16s().iter_mut().zip(src).for_each(|(d, s)| *d = bf16::from_f32(*s)),
            _ => dst.into_f32s().copy_from_slice(src),
        }
        Ok(())
    }

    fn write_f64(&self, src: &[f64], dst: ViewMut<Self>) -> Result<()> {
        match dst.dtype() {
            DType::Bf16 => dst.into_bf16s().iter_mut().zip(src).for_each(|(d, s)| *d = bf16::from_f32(*s as f32)),
            _ => dst.into_f32s().iter_mut().zip(src).for_each(|(d, s)| *d = *s as f32),
        }
        Ok(())
    }

    fn write_u32(&self, src: &[u32], dst: ViewMut<Self>) -> Result<()> {
        dst.into_u32s().copy_from_slice(src);
        Ok(())
    }

    fn read_f32(&self, src: View<Self>, dst: &mut [f32]) -> Result<()> {
        match src.dtype() {
            DType::Bf16 => dst.iter_mut().zip(src.bf16s()).for_each(|(d, s)| *d = s.to_f32()),
            _ => dst.copy_from_slice(src.f32s()),
        }
        Ok(())
    }

    fn read_f64(&self, src: View<Self>, dst: &mut [f64]) -> Result<()> {
        match src.dtype() {
            DType::Bf16 => dst.iter_mut().zip(src.bf16s()).for_each(|(d, s)| *d = s.to_f64()),
            _ => dst.iter_mut().zip(src.f32s()).for_each(|(d, s)| *d = f64::from(*s)),
        }
        Ok(())
    }

    fn read_u32(&self, src: View<Self>, dst: &mut [u32]) -> Result<()> {
        dst.copy_from_slice(src.u32s());
        Ok(())
    }
}

impl<'a> View<'a, Cpu> {
    pub fn f32s(&self) -> &'a [f32] {
        self.host(DType::F32)
    }

    pub fn bf16s(&self) -> &'a [bf16] {
        self.host(DType::Bf16)
    }
}

impl<'a> ViewMut<'a, Cpu> {
    pub fn into_f32s(self) -> &'a mut [f32] {
        self.into_host(DType::F32)
    }

    pub fn into_bf16s(self) -> &'a mut [bf16] {
        self.into_host(DType::Bf16)
    }
}
