use std::cell::RefCell;

use rayon::prelude::*;

use super::{Backward, Blend, Dims, Forward, LowRank};
use crate::device::{Cpu, Scratch};
use crate::error::Result;
use crate::ops::gemm::{Operand, Start, gemm, gemm_alone};
use crate::ops::simd::{Shared, add};

/// Rows whose product with B is made before it is added: it stays in the cache until then.
const ROWS: usize = 512;
/// Rows, and elements, of one task of the elementwise passes.
const ROWS_PER_TASK: usize = 32;
const PER_TASK: usize = 1 << 14;
/// Columns of a part of the product come in multiples of this: those of a tile.
const COLUMNS: usize = 32;

/// Up to so many rows, those of decoding, a forward pass is one parallel section: each more would cost as much as it computes.
const FEW_ROWS: usize = 32;

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

fn forward(cpu: &Cpu, a: Forward<Cpu>, d: Dims) {
    let (t, y) = (a.scratch.into_f32s(), a.y.into_f32s());
    let (x, down) = (Operand::new(a.x.f32s(), d.inputs), Operand::transposed(a.a.f32s(), d.inputs));
    gemm(cpu, [d.rows, d.rank, d.inputs], x, down, t, Start::Zero);
    scale_by(cpu, a.scale, t);
    if let Some(blend) = a.blend {
        blend_by(cpu, blend, d.rank, t);
    }
    // The product is summed first: adding it to a large residual term by term would lose its low bits.
    let mut scratch = PRODUCT.take();
    for (t, y) in t.chunks(ROWS * d.rank.max(1)).zip(y.chunks_mut(ROWS * d.outputs.max(1))) {
        let product = &mut scratch.grown(y.len())[..y.len()];
        let up = Operand::transposed(a.b.f32s(), d.rank);
        gemm(cpu, [y.len() / d.outputs, d.outputs, d.rank], Operand::new(t, d.rank), up, product, Start::Zero);
        let chunk = ROWS_PER_TASK * d.outputs;
        let tasks = y.par_chunks_mut(chunk).zip(product.par_chunks(chunk));
        cpu.run(|| tasks.for_each(|(y, product)| add(cpu.isa(), product, y)));
    }
    PRODUCT.set(scratch);
}

/// The same bits: every thread computes `x A^T` for itself and adds its columns of the product.
fn forward_few(cpu: &Cpu, a: Forward<Cpu>, d: Dims) {
    let (x, down, up, y) = (a.x.f32s(), a.a.f32s(), a.b.f32s(), Shared::new(a.y.into_f32s()));
    let blend = a.blend.map(|Blend { weights, owner }| (weights.cols(), weights.f32s(), owner.u32s()));
    let width = d.outputs.div_ceil(cpu.threads()).next_multiple_of(COLUMNS);
    let part = |part: usize| {
        let (first, cols) = (part * width, width.min(d.outputs - part * width));
        let mut scratch = PRODUCT.take();
        let (t, product) = scratch.grown(d.rows * (d.rank + cols)).split_at_mut(d.rows * d.rank);
        let (product, up) = (&mut product[..d.rows * cols], &up[first * d.rank..][..cols * d.rank]);
        let (x, down) = (Operand::new(x, d.inputs), Operand::transposed(down, d.inputs));
        gemm_alone(cpu, [d.rows, d.rank, d.inputs], x, down, t, Start::Zero);
        if a.scale != 1.0 {
            t.iter_mut().for_each(|t| *t *= a.scale);
        }
        if let Some((adapters, weights, owner)) = blend {
            for (t, weights) in t.chunks_exact_mut(d.rank.max(1)).zip(weights.chunks_exact(adapters.max(1))) {
                t.iter_mut().zip(owner).for_each(|(t, owner)| *t *= weights[*owner as usize]);
            }
        }
        let (t, up) = (Operand::new(t, d.rank), Operand::transposed(up, d.rank));
        gemm_alone(cpu, [d.rows, cols, d.rank], t, up, product, Start::Zero);
        for (row, product) in product.chunks_exact(cols).enumerate() {
            // SAFETY: these columns are this part's alone.
            add(cpu.isa(), product, unsafe { y.slice(row * d.outputs + first, cols) });
        }
        PRODUCT.set(scratch);
    };
    cpu.run(|| (0..d.outputs.div_ceil(width)).into_par_iter().for_each(part));
}

impl LowRank for Cpu {
    fn low_rank(&self, a: Forward<Self>) -> Result<()> {
        let d = a.check()?;
        match (1..=FEW_ROWS).contains(&d.rows) && d.outputs > 0 {
            true => forward_few(self, a, d),
            false => forward(self, a, d),
        }
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
