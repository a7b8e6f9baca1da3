use rayon::prelude::*;

use super::{Backward, Forward, RmsNorm};
use crate::device::Cpu;
use crate::error::Result;
use crate::ops::simd::{dispatched, dot, sum_terms};

const ROWS_PER_TASK: usize = 32;
/// Columns of one task of the weight gradient; each column is summed over rows in order.
const COLS_PER_TASK: usize = 64;

impl RmsNorm for Cpu {
    fn rms_norm(&self, a: Forward<Self>) -> Result<()> {
        a.check()?;
        let (hidden, eps) = (a.x.cols(), a.eps);
        let (x, w) = (a.x.f32s(), a.weight.f32s());
        let (y, rstd) = (a.y.into_f32s(), a.rstd.into_f32s());
        self.run(|| {
            let tasks = y.par_chunks_mut(ROWS_PER_TASK * hidden).zip(rstd.par_chunks_mut(ROWS_PER_TASK));
            tasks.zip(x.par_chunks(ROWS_PER_TASK * hidden)).for_each(|((y, rstd), x)| {
                let rows = y.chunks_exact_mut(hidden).zip(rstd).zip(x.chunks_exact(hidden));
                rows.for_each(|((y, rstd), x)| *rstd = forward_row(self.isa(), x, w, eps, y));
            });
        });
        Ok(())
    }

    fn rms_norm_backward(&self, a: Backward<Self>) -> Result<()> {
        a.check()?;
        let hidden = a.x.cols();
        let (dy, x, w, rstd) = (a.dy.f32s(), a.x.f32s(), a.weight.f32s(), a.rstd.f32s());
        let dx = a.dx.into_f32s();
        self.run(|| {
            let tasks = dx.par_chunks_mut(ROWS_PER_TASK * hidden).enumerate();
            tasks.for_each(|(task, dx)| {
                for (i, dx) in dx.chunks_exact_mut(hidden).enumerate() {
                    let row = task * ROWS_PER_TASK + i;
                    let at = row * hidden..(row + 1) * hidden;
                    backward_row(self.isa(), &dy[at.clone()], &x[at], w, rstd[row], dx);
                }
            });
        });
        let Some(dweight) = a.dweight else { return Ok(()) };
        let dweight = dweight.into_f32s();
        self.run(|| {
            dweight.par_chunks_mut(COLS_PER_TASK).enumerate().for_each(|(task, dweight)| {
                let cols = task * COLS_PER_TASK..task * COLS_PER_TASK + dweight.len();
                let rows = dy.chunks_exact(hidden).zip(x.chunks_exact(hidden)).zip(rstd);
                for ((dy, x), rstd) in rows {
                    weight_row(self.isa(), &dy[cols.clone()], &x[cols.clone()], *rstd, dweight);
                }
            });
        });
        Ok(())
    }
}

dispatched! {
    fn forward_row(x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) -> f32 {
        let rstd = 1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt();
        for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
            *y = x * rstd * w;
        }
        rstd
    }
}

dispatched! {
    fn backward_row(dy: &[f32], x: &[f32], w: &[f32], rstd: f32, dx: &mut [f32]) {
        let [sum] = sum_terms([dy, x, w], |[dy, x, w]| [dy * w * x]);
        let mean = sum / x.len() as f32;
        let scale = rstd * rstd * mean;
        for (((dx, dy), x), w) in dx.iter_mut().zip(dy).zip(x).zip(w) {
            *dx += rstd * (dy * w - x * scale);
        }
    }
}

dispatched! {
    fn weight_row(dy: &[f32], x: &[f32], rstd: f32, dweight: &mut [f32]) {
        for ((dweight, dy), x) in dweight.iter_mut().zip(dy).zip(x) {
            *dweight += dy * x * rstd;
        }
    }
}
