use std::cell::RefCell;

use rayon::prelude::*;

use super::{Backward, Blend, Forward, LowRank};
use crate::device::{Cpu, Scratch};
use crate::error::Result;
use crate::ops::gemm::{Operand, Start, gemm};
use crate::ops::simd::add;

/// Rows whose product with B is made before it is added: it stays in the cache until then.
const ROWS: usize = 512;
/// Rows, and elements, of one task of the elementwise passes.
const ROWS_PER_TASK: usize = 32;
const PER_TASK: usize = 1 << 14;

thread_local! {
    static PRODUCT: RefCell<Scratch> = RefCell::default();
}

/// What the forward pass takes beside its arguments.
pub fn scratch_bytes(rows: usize, outputs: usize) -> usize {
    Scratch::bytes(rows.min(ROWS) * outputs)
}

fn scale_by(cpu: &Cpu, scale: f32, x: &mut [f32]) {
    if scale != 1.0 {
        cpu.run(|| x.par_chunks_mut(PER_TASK).for_each(|x| x.iter_mut().for_each(|x| *x *= scale)));
    }
}

/// Gives each column of `t`, `[rows, rank]`, its adapter's weight in that row.
fn blend_by(cpu: &Cpu, Blend { weights, owner }: Blend<Cpu>, rank: usize, t: &mut [f32]) {
    let (adapters, weights, owner) = (weights.cols(), weights.f32s(), owner.u32s());
    let rows =
        t.par_chunks_exact_mut(rank.max(1)).zip(weights.par_chunks_exact(adapters.max(1))).with_min_len(ROWS_PER_TASK);
    cpu.run(|| {
        rows.for_each(|(t, weights)| t.iter_mut().zip(owner).for_each(|(t, owner)| *t *= weights[*owner as usize]));
    });
}

impl LowRank for Cpu {
    fn low_rank(&self, a: Forward<Self>) -> Result<()> {
        let d = a.check()?;
        let (t, y) = (a.scratch.into_f32s(), a.y.into_f32s());
        let (x, down) = (Operand::new(a.x.f32s(), d.inputs), Operand::transposed(a.a.f32s(), d.inputs));
        gemm(self, [d.rows, d.rank, d.inputs], x, down, t, Start::Zero);
        scale_by(self, a.scale, t);
        if let Some(blend) = a.blend {
            blend_by(self, blend, d.rank, t);
        }
        // The product is summed first: adding it to a large residual term by term would lose its low bits.
        let mut scratch = PRODUCT.take();
        for (t, y) in t.chunks(ROWS * d.rank.max(1)).zip(y.chunks_mut(ROWS * d.outputs.max(1))) {
            let product = &mut scratch.grown(y.len())[..y.len()];
            let up = Operand::transposed(a.b.f32s(), d.rank);
            gemm(self, [y.len() / d.outputs, d.outputs, d.rank], Operand::new(t, d.rank), up, product, Start::Zero);
            let chunk = ROWS_PER_TASK * d.outputs;
            let tasks = y.par_chunks_mut(chunk).zip(product.par_chunks(chunk));
            self.run(|| tasks.for_each(|(y, product)| add(self.isa(), product, y)));
        }
        PRODUCT.set(scratch);
        Ok(())
    }

    fn low_rank_backward(&self, a: Backward<Self>) -> Result<()> {
        let d = a.check()?;
        let (dy, x, down, up) = (a.dy.f32s(), a.x.f32s(), a.a.f32s(), a.b.f32s());
        let scratch = a.scratch.into_f32s();
        if let Some(db) = a.db {
            let operands = (Operand::new(x, d.inputs), Operand::transposed(down, d.inputs));
            gemm(self, [d.rows, d.rank, d.inputs], operands.0, operands.1, scratch, Start::Zero);
            scale_by(self, a.scale, scratch);
            let operands = (Operand::transposed(dy, d.outputs), Operand::new(scratch, d.rank));
            gemm(self, [d.outputs, d.rank, d.rows], operands.0, operands.1, db.into_f32s(), Start::Output);
        }
        let operands = (Operand::new(dy, d.outputs), Operand::new(up, d.rank));
        gemm(self, [d.rows, d.rank, d.outputs], operands.0, operands.1, scratch, Start::Zero);
        scale_by(self, a.scale, scratch);
        if let Some(da) = a.da {
            let operands = (Operand::transposed(scratch, d.rank), Operand::new(x, d.inputs));
            gemm(self, [d.rank, d.inputs, d.rows], operands.0, operands.1, da.into_f32s(), Start::Output);
        }
        let operands = (Operand::new(scratch, d.rank), Operand::new(down, d.inputs));
        gemm(self, [d.rows, d.inputs, d.rank], operands.0, operands.1, a.dx.into_f32s(), Start::Output);
        Ok(())
    }
}
