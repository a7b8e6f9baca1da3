use super::{Backward, Forward, RmsNorm};
use crate::device::Reference;
use crate::error::Result;

impl RmsNorm for Reference {
    fn rms_norm(&self, a: Forward<Self>) -> Result<()> {
        a.check()?;
        let ([rows, hidden], eps) = (a.x.shape(), f64::from(a.eps));
        let (x, w) = (a.x.f64s(), a.weight.f64s());
        let (y, rstd) = (a.y.into_f64s(), a.rstd.into_f64s());
        for r in 0..rows {
            let x = &x[r * hidden..][..hidden];
            let mean = x.iter().map(|x| x * x).sum::<f64>() / hidden as f64;
            rstd[r] = 1.0 / (mean + eps).sqrt();
            (0..hidden).for_each(|j| y[r * hidden + j] = x[j] * rstd[r] * w[j]);
        }
        Ok(())
    }

    fn rms_norm_backward(&self, a: Backward<Self>) -> Result<()> {
        a.check()?;
        let [rows, hidden] = a.x.shape();
        let (dy, x, w, rstd) = (a.dy.f64s(), a.x.f64s(), a.weight.f64s(), a.rstd.f64s());
        let dx = a.dx.into_f64s();
        let mut dweight = a.dweight.map(|d| d.into_f64s());
        for r in 0..rows {
            let at = |j: usize| r * hidden + j;
            let mean = (0..hidden).map(|j| dy[at(j)] * w[j] * x[at(j)]).sum::<f64>() / hidden as f64;
            for j in 0..hidden {
                dx[at(j)] += rstd[r] * (dy[at(j)] * w[j] - x[at(j)] * rstd[r] * rstd[r] * mean);
                if let Some(dweight) = &mut dweight {
                    dweight[j] += dy[at(j)] * x[at(j)] * rstd[r];
                }
            }
        }
        Ok(())
    }
}
