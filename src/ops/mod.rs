//! Forward and backward pairs. One folder per op: `mod.rs` (formula, arguments, shapes), `cpu.rs`, `cuda.rs`,
//! `reference.rs` (f64, the oracle). Arguments are structs with named fields: four views of one type swap silently when they
//! are positional. Each output field says whether it is written (`=`) or added to (`+=`).
//!
//! No op allocates device memory, and no op's result for one row depends on which other rows are there: every
//! output element is reduced in an order fixed by its own index. Exact step-0 margins, equal text for any
//! batch, sharing on = off and equality over thread counts all rest on that.

mod columns;
pub(crate) mod gemm;
#[cfg(target_arch = "x86_64")]
mod gemm_amx;
mod gemm_fma;
mod gemm_fma_turned;
mod logits;
mod logits_cuda;
mod norm;
pub(crate) mod simd;

pub mod attention;
pub mod gelu;
pub mod layer_norm;
pub mod lerp;
pub mod linear;
pub mod logprob_head;
pub mod low_rank;
pub mod merged_update;
pub mod rms_norm;
pub mod rope;
pub mod rows;
pub mod sample;
pub mod sum_squares;
pub mod swiglu;
pub mod token_kl;

pub use gemm::{few_rows_bytes, packed_bytes};

use crate::device::{Cpu, Cuda, Device, Dry, Reference};

/// A device that has every op.
pub trait Backend:
    Device
    + attention::Attention
    + gelu::Gelu
    + layer_norm::LayerNorm
    + lerp::Lerp
    + linear::Linear
    + logprob_head::LogprobHead
    + low_rank::LowRank
    + merged_update::MergedUpdate
    + rms_norm::RmsNorm
    + rope::Rope
    + rows::Rows
    + sample::Sample
    + sum_squares::SumSquares
    + swiglu::SwiGlu
    + token_kl::TokenKl
{
}

impl Backend for Cpu {}
impl Backend for Cuda {}
impl Backend for Dry {}
impl Backend for Reference {}

/// Refuses shapes that do not fit each other.
fn require(op: &'static str, what: &str, found: [usize; 2], expected: [usize; 2]) -> crate::error::Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(crate::error::Error::op(op, format!("{what} has shape {found:?}, expected {expected:?}")))
}
