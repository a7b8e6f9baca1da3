use super::{Backward, Forward, LogprobHead};
use crate::device::Reference;
use crate::error::Result;

fn logits(h: &[f64], w: &[f64], scale: f64) -> Vec<f64> {
    w.chunks_exact(h.len()).map(|w| scale * w.iter().zip(h).map(|(w, h)| w * h).sum::<f64>()).collect()
}

/// `p ln p`, 0 where p is
fn weighted(ln_p: f64) -> f64 {
    let p = ln_p.exp();
    if p == 0.0 { 0.0 } else { p * ln_p }
}

impl LogprobHead for Reference {
    fn logprob_head(&self, a: Forward<Self>) -> Result<()> {
        let d = a.check()?;
        let (h, w, target, scale) = (a.h.f64s(), a.weight.f64s(), a.target.u32s(), f64::from(a.scale));
        let (logp, lse) = (a.logp.into_f64s(), a.lse.into_f64s());
        let mut entropy = a.entropy.map(|entropy| entropy.into_f64s());
        let mut ln_sum_p2 = a.ln_sum_p2.map(|ln_sum_p2| ln_sum_p2.into_f64s());
        for r in 0..d.rows {
            let l = logits(&h[r * d.hidden..][..d.hidden], w, scale);
            let max = l.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            lse[r] = max + l.iter().map(|l| (l - max).exp()).sum::<f64>().ln();
            logp[r] = l[target[r] as usize] - lse[r];
            if let Some(entropy) = &mut entropy {
                entropy[r] = -l.iter().map(|l| weighted(l - lse[r])).sum::<f64>();
            }
            if let Some(ln_sum_p2) = &mut ln_sum_p2 {
                let below = 2.0 * (max - lse[r]);
                ln_sum_p2[r] = below + l.iter().map(|l| (2.0 * (l - max)).exp()).sum::<f64>().ln();
            }
        }
        Ok(())
    }

    fn logprob_head_backward(&self, a: Backward<Self>) -> Result<()> {
        let d = a.check()?;
        let (h, w, target, scale) = (a.h.f64s(), a.weight.f64s(), a.target.u32s(), f64::from(a.scale));
        let (lse, dlogp) = (a.lse.f64s(), a.dlogp.f64s());
        let entropy = a.dentropy.zip(a.entropy).map(|(d, entropy)| (d.f64s(), entropy.f64s()));
        let dh = a.dh.into_f64s();
        let mut dweight = a.dweight.map(|d| d.into_f64s());
        for r in 0..d.rows {
            let h = &h[r * d.hidden..][..d.hidden];
            for (v, l) in logits(h, w, scale).into_iter().enumerate() {
                let hit = f64::from(u8::from(v == target[r] as usize));
                let ln_p = l - lse[r];
                let mut dl = dlogp[r] * (hit - ln_p.exp());
                if let Some((dentropy, entropy)) = entropy {
                    dl -= dentropy[r] * (weighted(ln_p) + ln_p.exp() * entropy[r]);
                }
                dl *= scale;
                for i in 0..d.hidden {
                    dh[r * d.hidden + i] += dl * w[v * d.hidden + i];
                    if let Some(dweight) = &mut dweight {
                        dweight[v * d.hidden + i] += dl * h[i];
                    }
                }
            }
        }
        Ok(())
    }
}
