use super::{Backward, Forward, Ref, TokenKl};
use crate::device::{Reference, View};
use crate::error::Result;

/// Of row `r`, over the vocabulary.
fn logits([h, weight]: [View<Reference>; 2], scale: f32, r: usize) -> Vec<f64> {
    let h = &h.f64s()[r * h.cols()..][..h.cols()];
    weight
        .f64s()
        .chunks_exact(h.len())
        .map(|w| f64::from(scale) * w.iter().zip(h).map(|(w, h)| w * h).sum::<f64>())
        .collect()
}

fn log_sum_exp(l: &[f64]) -> f64 {
    let max = l.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    max + l.iter().map(|l| (l - max).exp()).sum::<f64>().ln()
}

/// `p x`, 0 where p is
fn weighted(p: f64, x: f64) -> f64 {
    if p == 0.0 { 0.0 } else { p * x }
}

impl TokenKl for Reference {
    fn token_kl(&self, a: Forward<Self>) -> Result<()> {
        let d = a.check()?;
        let (kl, lse) = (a.kl.into_f64s(), a.lse.into_f64s());
        for r in 0..d.rows {
            let l = logits([a.h, a.weight], a.scale, r);
            lse[r] = log_sum_exp(&l);
            for (k, Ref { h, weight }) in a.refs.iter().enumerate() {
                let (m, at) = (logits([*h, *weight], a.scale, r), k * d.rows + r);
                lse[d.rows + at] = log_sum_exp(&m);
                let log_p_over_q = |(l, m): (&f64, &f64)| (l - lse[r]) - (m - lse[d.rows + at]);
                kl[at] = l.iter().zip(&m).map(|v| weighted((v.0 - lse[r]).exp(), log_p_over_q(v))).sum();
            }
        }
        Ok(())
    }

    fn token_kl_backward(&self, a: Backward<Self>) -> Result<()> {
        let d = a.check()?;
        let (h, w, kl, lse, dkl) = (a.h.f64s(), a.weight.f64s(), a.kl.f64s(), a.lse.f64s(), a.dkl.f64s());
        let dh = a.dh.into_f64s();
        let mut dweight = a.dweight.map(|d| d.into_f64s());
        for r in 0..d.rows {
            let l = logits([a.h, a.weight], a.scale, r);
            let mut terms = vec![0.0; d.vocab];
            for (k, Ref { h, weight }) in a.refs.iter().enumerate() {
                let (m, at) = (logits([*h, *weight], a.scale, r), k * d.rows + r);
                for (term, (l, m)) in terms.iter_mut().zip(l.iter().zip(&m)) {
                    *term += dkl[at] * ((l - lse[r]) - (m - lse[d.rows + at]) - kl[at]);
                }
            }
            for (v, (l, term)) in l.iter().zip(terms).enumerate() {
                let dl = f64::from(a.scale) * weighted((l - lse[r]).exp(), term);
                for i in 0..d.hidden {
                    dh[r * d.hidden + i] += dl * w[v * d.hidden + i];
                    if let Some(dweight) = &mut dweight {
                        dweight[v * d.hidden + i] += dl * h[r * d.hidden + i];
                    }
                }
            }
        }
        Ok(())
    }
}
