use super::{Backward, Forward, LowRank};
use crate::device::Reference;
use crate::error::Result;

impl LowRank for Reference {
    fn low_rank(&self, a: Forward<Self>) -> Result<()> {
        let d = a.check()?;
        let (x, down, up) = (a.x.f64s(), a.a.f64s(), a.b.f64s());
        let (t, y) = (a.scratch.into_f64s(), a.y.into_f64s());
        for r in 0..d.rows {
            for k in 0..d.rank {
                let sum: f64 = (0..d.inputs).map(|i| x[r * d.inputs + i] * down[k * d.inputs + i]).sum();
                let weight = a.blend.as_ref().map_or(1.0, |blend| {
                    blend.weights.f64s()[r * blend.weights.cols() + blend.owner.u32s()[k] as usize]
                });
                t[r * d.rank + k] = f64::from(a.scale) * sum * weight;
            }
            for o in 0..d.outputs {
                y[r * d.outputs + o] += (0..d.rank).map(|k| t[r * d.rank + k] * up[o * d.rank + k]).sum::<f64>();
            }
        }
        Ok(())
    }

    fn low_rank_backward(&self, a: Backward<Self>) -> Result<()> {
        let d = a.check()?;
        let (dy, x, down, up) = (a.dy.f64s(), a.x.f64s(), a.a.f64s(), a.b.f64s());
        let scale = f64::from(a.scale);
        let (u, dx) = (a.scratch.into_f64s(), a.dx.into_f64s());
        let mut gradients = (a.da.map(|da| da.into_f64s()), a.db.map(|db| db.into_f64s()));
        for r in 0..d.rows {
            for k in 0..d.rank {
                let t: f64 = (0..d.inputs).map(|i| x[r * d.inputs + i] * down[k * d.inputs + i]).sum();
                if let Some(db) = &mut gradients.1 {
                    (0..d.outputs).for_each(|o| db[o * d.rank + k] += dy[r * d.outputs + o] * scale * t);
                }
                let sum: f64 = (0..d.outputs).map(|o| dy[r * d.outputs + o] * up[o * d.rank + k]).sum();
                u[r * d.rank + k] = scale * sum;
                for i in 0..d.inputs {
                    if let Some(da) = &mut gradients.0 {
                        da[k * d.inputs + i] += scale * sum * x[r * d.inputs + i];
                    }
                    dx[r * d.inputs + i] += scale * sum * down[k * d.inputs + i];
                }
            }
        }
        Ok(())
    }
}
