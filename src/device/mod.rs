//! Memory and random numbers. Knows no op, no model, no loss.
//!
//! | concept | here |
//! |---|---|
//! | a place to compute | [`Device`]: [`Cpu`], [`Reference`] (f64, the oracle of the tests), [`Dry`] (prices a plan) |
//! | all memory of one phase | [`Arena`]: one allocation, carved into disjoint [`Tensor`]s |
//! | an argument of an op | [`View`], [`ViewMut`]: contiguous row-major `[rows, cols]`, never strided |
//! | a random number | [`Philox`]: a pure function of (seed, stream, counter) |

mod arena;
mod cpu;
pub mod cuda;
mod dry;
mod host;
mod nvtx;
mod philox;
mod reference;
mod tensor;

pub use arena::{Arena, Kind, Ledger};
pub use cpu::{Cpu, Isa, Products};
pub use cuda::Cuda;
pub use dry::Dry;
pub use host::{HostSpan, Scratch};
pub use nvtx::range;
pub use philox::Philox;
pub use reference::Reference;
pub use tensor::{DType, Storage, Tensor, View, ViewMut};

use crate::error::Result;

/// Every tensor starts at a multiple of this many bytes: a cache line, and what a GPU's widest load wants.
pub const ALIGN_BYTES: usize = 256;

/// A place where tensors live. Ops are traits on top of it (`crate::ops`).
///
/// Tensors of [`DType::F32`] hold whatever the device computes in: f32 on [`Cpu`], f64 on [`Reference`].
pub trait Device: Sized {
    const NAME: &'static str;

    /// Whether tensors lie in memory of the device's own, beside that of the program.
    const APART: bool = false;

    /// A run of device memory. Deliberately not `Clone`: two live spans never overlap.
    type Span;

    /// Names the order of its sums: where it is the same, the same operations give the same bits.
    fn arithmetic(&self) -> &'static str {
        Self::NAME
    }

    /// What it keeps weights and activations in. Statistics, gradients of weights and optimizer states are F32 always.
    fn storage(&self) -> DType {
        DType::F32
    }

    /// The same, and whether it keeps frozen matrices as their files have them.
    fn keeps(&self) -> Storage {
        self.storage().into()
    }

    /// What a run can have of memory that the device has apart, what it holds already included; `None` where that is the
    /// machine's.
    fn available_bytes(&self) -> Result<Option<usize>> {
        Ok(None)
    }

    /// Starts or ends what the device's profiler records, once all work is done; nothing where it has none.
    fn profile(&self, _on: bool) -> Result<()> {
        Ok(())
    }

    /// Bytes of one element of `dtype` on this device.
    fn width(dtype: DType) -> usize;

    /// `bytes` of zeroed memory.
    fn alloc(&self, bytes: usize) -> Result<Self::Span>;

    /// Splits off the first `at` bytes.
    fn split(span: Self::Span, at: usize) -> (Self::Span, Self::Span);

    fn zero(&self, dst: ViewMut<Self>) -> Result<()>;
    fn copy(&self, src: View<Self>, dst: ViewMut<Self>) -> Result<()>;

    fn write_f32(&self, src: &[f32], dst: ViewMut<Self>) -> Result<()>;
    fn write_f64(&self, src: &[f64], dst: ViewMut<Self>) -> Result<()>;
    fn write_u32(&self, src: &[u32], dst: ViewMut<Self>) -> Result<()>;
    fn read_f32(&self, src: View<Self>, dst: &mut [f32]) -> Result<()>;
    fn read_f64(&self, src: View<Self>, dst: &mut [f64]) -> Result<()>;
    fn read_u32(&self, src: View<Self>, dst: &mut [u32]) -> Result<()>;
}
