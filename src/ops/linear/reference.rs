use super::{Backward, Forward, Linear};
use crate::device::Reference;
use crate::error::Result;

impl Linear for Reference {
    fn linear(&self, a: Forward<Self>) -> Result<()> {
        let d = a.check()?;
        let (x, w) = (a.x.f64s(), a.weight.f64s());
        let (bias, residual) = (a.bias.map(|b| b.f64s()), a.residual.map(|r| r.f64s()));
        let y = a.y.into_f64s();
        for r in 0..d.rows {
            for o in 0..d.outputs {
                let product: f64 = (0..d.inputs).map(|i| x[r * d.inputs + i] * w[o * d.inputs + i]).sum();
                let bias = bias.map_or(0.0, |b| b[o]);
                y[r * d.outputs + o] = product + bias + residual.map_or(0.0, |x| x[r * d.outputs + o]);
            }
        }
        Ok(())
    }

    fn linear_backward(&self, a: Backward<Self>) -> Result<()> {
        let d = a.check()?;
        let (dy, x, w) = (a.dy.f64s(), a.x.f64s(), a.weight.f64s());
        let all = |f: &mut dyn FnMut(usize, usize, usize)| {
            for r in 0..d.rows {
                for o in 0..d.outputs {
                    (0..d.inputs).for_each(|i| f(r, o, i));
                }
            }
        };
        if let Some(dx) = a.dx {
            let dx = dx.into_f64s();
            all(&mut |r, o, i| dx[r * d.inputs + i] += dy[r * d.outputs + o] * w[o * d.inputs + i]);
        }
        if let Some(dweight) = a.dweight {
            let dweight = dweight.into_f64s();
            all(&mut |r, o, i| dweight[o * d.inputs + i] += dy[r * d.outputs + o] * x[r * d.inputs + i]);
        }
        if let Some(dbias) = a.dbias {
            let dbias = dbias.into_f64s();
            (0..d.rows).for_each(|r| (0..d.outputs).for_each(|o| dbias[o] += dy[r * d.outputs + o]));
        }
        Ok(())
    }
}
