use std::ops::Range;

use rayon::prelude::*;

use super::{Backward, Forward, Linear};
use crate::device::Cpu;
use crate::error::Result;
use crate::ops::gemm::{Numbers, Operand, Right, Start, gemm, gemm_then};
use crate::ops::simd::{Shared, add};

/// Rows of one task of the elementwise passes.
const ROWS_PER_TASK: usize = 64;
/// Columns of one task of the bias gradient; each column is summed over rows in order.
const COLS_PER_TASK: usize = 64;

/// Up to so many rows, those of decoding, a layer is one parallel section: each more would cost as much as it computes.
pub const FEW_ROWS: usize = 32;

/// The layer in one parallel section. `then` gets `y [rows, outputs]` and columns of it that are done: nobody else has them.
pub fn linear_then(cpu: &Cpu, a: Forward<Cpu>, then: impl Fn(&Shared<f32>, Range<usize>) + Sync) -> Result<()> {
    let d = a.check()?;
    let y = Shared::new(a.y.into_f32s());
    let (bias, residual) = (a.bias.map(|b| b.f32s()), a.residual.map(|r| r.f32s()));
    let (x, w) = (Operand::new(a.x.f32s(), d.inputs), Right::transposed(Numbers::of(a.weight), d.inputs));
    gemm_then(cpu, [d.rows, d.outputs, d.inputs], x, w, &y, &|cols| {
        for at in (0..d.rows).map(|row| row * d.outputs + cols.start) {
            // SAFETY: these columns are this thread's.
            let y = unsafe { y.slice(at, cols.len()) };
            bias.iter().for_each(|bias| add(cpu.isa(), &bias[cols.clone()], y));
            residual.iter().for_each(|residual| add(cpu.isa(), &residual[at..][..cols.len()], y));
        }
        then(&y, cols);
    });
    Ok(())
}

impl Linear for Cpu {
    fn linear(&self, a: Forward<Self>) -> Result<()> {
        if (1..=FEW_ROWS).contains(&a.x.rows()) {
            return linear_then(self, a, |_, _| ());
        }
        let d = a.check()?;
        let y = a.y.into_f32s();
        let (x, w) = (Operand::new(a.x.f32s(), d.inputs), Right::transposed(Numbers::of(a.weight), d.inputs));
        gemm(self, [d.rows, d.outputs, d.inputs], x, w, y, Start::Zero);
        // The product is summed first: adding it to a large residual term by term would lose its low bits.
        let (bias, residual) = (a.bias.map(|b| b.f32s()), a.residual.map(|r| r.f32s()));
        if bias.is_none() && residual.is_none() {
            return Ok(());
        }
        let chunk = ROWS_PER_TASK * d.outputs;
        self.run(|| {
            y.par_chunks_mut(chunk).enumerate().for_each(|(task, y)| {
                if let Some(bias) = bias {
                    y.chunks_exact_mut(d.outputs).for_each(|y| add(self.isa(), bias, y));
                }
                if let Some(residual) = residual {
                    add(self.isa(), &residual[task * chunk..][..y.len()], y);
                }
            });
        });
        Ok(())
    }

    fn linear_backward(&self, a: Backward<Self>) -> Result<()> {
        let d = a.check()?;
        let dy = a.dy.f32s();
        if let Some(dx) = a.dx {
            let (dy, w) = (Operand::new(dy, d.outputs), Right::new(Numbers::of(a.weight), d.inputs));
            gemm(self, [d.rows, d.inputs, d.outputs], dy, w, dx.into_f32s(), Start::Output);
        }
        if let Some(dweight) = a.dweight {
            let (dy, x) = (Operand::transposed(dy, d.outputs), Operand::new(a.x.f32s(), d.inputs));
            gemm(self, [d.outputs, d.inputs, d.rows], dy, x, dweight.into_f32s(), Start::Output);
        }
        if let Some(dbias) = a.dbias {
            let dbias = dbias.into_f32s();
            self.run(|| {
                dbias.par_chunks_mut(COLS_PER_TASK).enumerate().for_each(|(task, dbias)| {
                    for row in dy.chunks_exact(d.outputs) {
                        add(self.isa(), &row[task * COLS_PER_TASK..][..dbias.len()], dbias);
                    }
                });
            });
        }
        Ok(())
    }
}
