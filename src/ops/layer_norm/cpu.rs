use rayon::prelude::*;

use super::{Backward, Forward, LayerNorm, STATS};
use crate::device::Cpu;
use crate::error::Result;
use crate::ops::simd::{add, dispatched, sum_terms};

const ROWS_PER_TASK: usize = 32;
/// Columns of one task of the weights' gradients; each column is summed over rows in order.
const COLS_PER_TASK: usize = 64;

impl LayerNorm for Cpu {
    fn layer_norm(&self, a: Forward<Self>) -> Result<()> {
        a.check()?;
        let (hidden, eps) = (a.x.cols(), a.eps);
        let (x, w, b) = (a.x.f32s(), a.weight.f32s(), a.bias.f32s());
        let (y, stats) = (a.y.into_f32s(), a.stats.into_f32s());
        self.run(|| {
            let tasks = y.par_chunks_mut(ROWS_PER_TASK * hidden).zip(stats.par_chunks_mut(ROWS_PER_TASK * STATS));
            tasks.zip(x.par_chunks(ROWS_PER_TASK * hidden)).for_each(|((y, stats), x)| {
                let rows = y.chunks_exact_mut(hidden).zip(stats.chunks_exact_mut(STATS)).zip(x.chunks_exact(hidden));
                rows.for_each(|((y, stats), x)| forward_row(self.isa(), x, w, b, eps, y, stats));
            });
        });
        Ok(())
    }

    fn layer_norm_backward(&self, a: Backward<Self>) -> Result<()> {
        a.check()?;
        let hidden = a.x.cols();
        let (dy, x, w, stats) = (a.dy.f32s(), a.x.f32s(), a.weight.f32s(), a.stats.f32s());
        let dx = a.dx.into_f32s();
        self.run(|| {
            let tasks = dx.par_chunks_mut(ROWS_PER_TASK * hidden).enumerate();
            tasks.for_each(|(task, dx)| {
                for (i, dx) in dx.chunks_exact_mut(hidden).enumerate() {
                    let row = task * ROWS_PER_TASK + i;
                    let at = row * hidden..(row + 1) * hidden;
                    let stats = &stats[row * STATS..][..STATS];
                    backward_row(self.isa(), &dy[at.clone()], &x[at], w, stats, dx);
                }
            });
        });
        if let Some(dweight) = a.dweight {
            let dweight = dweight.into_f32s();
            self.run(|| {
                dweight.par_chunks_mut(COLS_PER_TASK).enumerate().for_each(|(task, dweight)| {
                    let cols = task * COLS_PER_TASK..task * COLS_PER_TASK + dweight.len();
                    let rows = dy.chunks_exact(hidden).zip(x.chunks_exact(hidden)).zip(stats.chunks_exact(STATS));
                    for ((dy, x), stats) in rows {
                        weight_row(self.isa(), &dy[cols.clone()], &x[cols.clone()], stats, dweight);
                    }
                });
            });
        }
        if let Some(dbias) = a.dbias {
            let dbias = dbias.into_f32s();
            self.run(|| {
                dbias.par_chunks_mut(COLS_PER_TASK).enumerate().for_each(|(task, dbias)| {
                    for dy in dy.chunks_exact(hidden) {
                        add(self.isa(), &dy[task * COLS_PER_TASK..][..dbias.len()], dbias);
                    }
                });
            });
        }
        Ok(())
    }
}

dispatched! {
    /// The variance is summed from centred values: `mean(x^2) - mean^2` cancels where the mean is large.
    fn forward_row(x: &[f32], w: &[f32], b: &[f32], eps: f32, y: &mut [f32], stats: &mut [f32]) {
        let [sum] = sum_terms([x], |x| x);
        let mean = sum / x.len() as f32;
        let [squares] = sum_terms([x], |[x]| [(x - mean) * (x - mean)]);
        let rstd = 1.0 / (squares / x.len() as f32 + eps).sqrt();
        for (((y, x), w), b) in y.iter_mut().zip(x).zip(w).zip(b) {
            *y = (x - mean) * rstd * w + b;
        }
        stats.copy_from_slice(&[mean, rstd]);
    }
}

dispatched! {
    fn backward_row(dy: &[f32], x: &[f32], w: &[f32], stats: &[f32], dx: &mut [f32]) {
        let (mean, rstd) = (stats[0], stats[1]);
        let [plain, along] = sum_terms([dy, x, w], |[dy, x, w]| [dy * w, dy * w * ((x - mean) * rstd)]);
        let (mean_d, mean_dn) = (plain / x.len() as f32, along / x.len() as f32);
        for (((dx, dy), x), w) in dx.iter_mut().zip(dy).zip(x).zip(w) {
            *dx += rstd * (dy * w - mean_d - (x - mean) * rstd * mean_dn);
        }
    }
}

dispatched! {
    fn weight_row(dy: &[f32], x: &[f32], stats: &[f32], dweight: &mut [f32]) {
        let (mean, rstd) = (stats[0], stats[1]);
        for ((dweight, dy), x) in dweight.iter_mut().zip(dy).zip(x) {
            *dweight += dy * ((x - mean) * rstd);
        }
    }
}
