use std::cell::RefCell;
use std::sync::atomic::{
    AtomicUsize,
    Ordering::{Acquire, Relaxed, Release},
};

use rayon::prelude::*;

use super::{Backward, Blend, Dims, Factors, Forward, LowRank, check};
use crate::device::{Cpu, Scratch};
use crate::error::Result;
use crate::ops::gemm::{Operand, Start, gemm, gemm_alone};
use crate::ops::linear::{self, FEW_ROWS, Linear, linear_then};
use crate::ops::simd::{Shared, add};

/// Rows whose product with B is made before it is added: it stays in the cache until then.
const ROWS: usize = 512;
/// Rows, and elements, of one task of the elementwise passes.
const ROWS_PER_TASK: usize = 32;
const PER_TASK: usize = 1 << 14;
/// Columns of a part of the inner product come in multiples of this.
const COLUMNS: usize = 24;

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

/// A layer of few rows and its low-rank product in the layer's own parallel section. Whoever is first done with some columns makes a
/// part of `t`, until all of it is there.
fn together(cpu: &Cpu, layer: linear::Forward<Cpu>, a: Factors<Cpu>, d: Dims) -> Result<()> {
    let (x, down, up) = (layer.x.f32s(), a.a.f32s(), a.b.f32s());
    let blend = a.blend.map(|Blend { weights, owner }| (weights.cols(), weights.f32s(), owner.u32s()));
    let t = Shared::new(a.scratch.into_f32s());
    let width = d.rank.div_ceil(cpu.threads()).next_multiple_of(COLUMNS);
    let (parts, begun, made) = (d.rank.div_ceil(width), AtomicUsize::new(0), AtomicUsize::new(0));
    let inner = |part: usize, scratch: &mut Scratch| {
        let (first, cols) = (part * width, width.min(d.rank - part * width));
        let product = &mut scratch.grown(d.rows * cols)[..d.rows * cols];
        let down = Operand::transposed(&down[first * d.inputs..][..cols * d.inputs], d.inputs);
        gemm_alone(cpu, [d.rows, cols, d.inputs], Operand::new(x, d.inputs), down, product, Start::Zero);
        for (row, product) in product.chunks_exact(cols).enumerate() {
            // SAFETY: these columns are this part's alone, and nobody reads before all are there.
            let t = unsafe { t.slice(row * d.rank + first, cols) };
            t.copy_from_slice(product);
            if a.scale != 1.0 {
                t.iter_mut().for_each(|t| *t *= a.scale);
            }
            if let Some((adapters, weights, owner)) = blend {
                let weights = &weights[row * adapters..][..adapters];
                t.iter_mut().zip(&owner[first..]).for_each(|(t, owner)| *t *= weights[*owner as usize]);
            }
        }
    };
    linear_then(cpu, layer, |y, cols| {
        let mut scratch = PRODUCT.take();
        for _ in 0..parts {
            let part = begun.fetch_add(1, Relaxed);
            if part < parts {
                inner(part, &mut scratch);
                made.fetch_add(1, Release);
            }
        }
        while made.load(Acquire) < parts {
            // Another thread is at the last part.
            std::thread::yield_now();
        }
        let product = &mut scratch.grown(d.rows * cols.len())[..d.rows * cols.len()];
        // SAFETY: all parts are there.
        let t = Operand::new(unsafe { t.read() }, d.rank);
        let up = Operand::transposed(&up[cols.start * d.rank..][..cols.len() * d.rank], d.rank);
        gemm_alone(cpu, [d.rows, cols.len(), d.rank], t, up, product, Start::Zero);
        for (row, product) in product.chunks_exact(cols.len()).enumerate() {
            // SAFETY: these columns are this thread's.
            add(cpu.isa(), product, unsafe { y.slice(row * d.outputs + cols.start, cols.len()) });
        }
        PRODUCT.set(scratch);
    })
}

impl LowRank for Cpu {
    fn low_rank(&self, a: Forward<Self>) -> Result<()> {
        let d = a.check()?;
        forward(self, a, d);
        Ok(())
    }

    fn linear_low_rank(&self, mut layer: linear::Forward<Self>, factors: Factors<Self>) -> Result<()> {
        let (x, Factors { a, b, scratch, .. }) = (layer.x, &factors);
        let d = check([x.shape(), a.shape(), b.shape(), scratch.shape(), layer.y.shape()], factors.blend.as_ref())?;
        if (1..=FEW_ROWS).contains(&d.rows) && d.rank > 0 && d.outputs > 0 {
            return together(self, layer, factors, d);
        }
        self.linear(linear::Forward { y: layer.y.again(), ..layer })?;
        self.low_rank(factors.beside(x, layer.y))
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
