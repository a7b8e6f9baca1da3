use super::{Backward, Forward, LayerNorm, STATS};
use crate::device::Reference;
use crate::error::Result;

impl LayerNorm for Reference {
    fn layer_norm(&self, a: Forward<Self>) -> Result<()> {
        a.check()?;
        let ([rows, hidden], eps) = (a.x.shape(), f64::from(a.eps));
        let (x, w, b) = (a.x.f64s(), a.weight.f64s(), a.bias.f64s());
        let (y, stats) = (a.y.into_f64s(), a.stats.into_f64s());
        for r in 0..rows {
            let x = &x[r * hidden..][..hidden];
            let mean = x.iter().sum::<f64>() / hidden as f64;
            let variance = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / hidden as f64;
            let rstd = 1.0 / (variance + eps).sqrt();
            stats[r * STATS..][..STATS].copy_from_slice(&[mean, rstd]);
            (0..hidden).for_each(|j| y[r * hidden + j] = (x[j] - mean) * rstd * w[j] + b[j]);
        }
        Ok(())
    }

    fn layer_norm_backward(&self, a: Backward<Self>) -> Result<()> {
        a.check()?;
        let [rows, hidden] = a.x.shape();
        let (dy, x, w, stats) = (a.dy.f64s(), a.x.f64s(), a.weight.f64s(), a.stats.f64s());
        let dx = a.dx.into_f64s();
        let (mut dweight, mut dbias) = (a.dweight.map(|d| d.into_f64s()), a.dbias.map(|d| d.into_f64s()));
        for r in 0..rows {
            let (mean, rstd) = (stats[r * STATS], stats[r * STATS + 1]);
            let at = |j: usize| r * hidden + j;
            let n = |j: usize| (x[at(j)] - mean) * rstd;
            let mean_d = (0..hidden).map(|j| dy[at(j)] * w[j]).sum::<f64>() / hidden as f64;
            let mean_dn = (0..hidden).map(|j| dy[at(j)] * w[j] * n(j)).sum::<f64>() / hidden as f64;
            for j in 0..hidden {
                dx[at(j)] += rstd * (dy[at(j)] * w[j] - mean_d - n(j) * mean_dn);
                if let Some(dweight) = &mut dweight {
                    dweight[j] += dy[at(j)] * n(j);
                }
                if let Some(dbias) = &mut dbias {
                    dbias[j] += dy[at(j)];
                }
            }
        }
        Ok(())
    }
}
