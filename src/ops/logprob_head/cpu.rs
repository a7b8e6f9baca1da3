use rayon::prelude::*;

use super::{Backward, Forward, LogprobHead, TILE_ROWS, TILE_VOCAB};
use crate::device::{Cpu, View};
use crate::error::Result;
use crate::ops::gemm::Numbers;
use crate::ops::logits::{ROWS_PER_TASK, tiles};
use crate::ops::simd::{dispatched, exp, exp_of_negative, largest, sum_terms};

/// Differences below this have no weight: e^x is 0 long before. Keeps 0 * -inf, which is no number, out of sums of p ln p.
const LOWEST: f32 = -1e4;

impl LogprobHead for Cpu {
    fn logprob_head(&self, a: Forward<Self>) -> Result<()> {
        let d = a.check()?;
        let (h, w, target) = (a.h.f32s(), Numbers::of(a.weight), a.target.u32s());
        assert!(target.iter().all(|t| (*t as usize) < d.vocab), "logprob_head: a target lies past the vocabulary");
        let (scratch, logp, lse) = (a.scratch.into_f32s(), a.logp.into_f32s(), a.lse.into_f32s());
        let mut entropy = a.entropy.map(|entropy| entropy.into_f32s());
        let mut ln_sum_p2 = a.ln_sum_p2.map(|ln_sum_p2| ln_sum_p2.into_f32s());
        // While tiles go by: `lse` holds the running maximum, `logp` the target's logit, `sums` what lies below that
        // maximum.
        let mut sums = [Sums::default(); TILE_ROWS];
        for t in tiles(d.rows, d.vocab) {
            let logits = t.logits(self, (d.hidden, a.scale), h, w, scratch);
            let at = t.row..t.row + t.rows;
            let (max, logp, sums) = (&mut lse[at.clone()], &mut logp[at.clone()], &mut sums[..t.rows]);
            if t.entry == 0 {
                max.fill(f32::NEG_INFINITY);
                sums.fill(Sums::default());
            }
            self.run(|| {
                let state = max.par_chunks_mut(ROWS_PER_TASK).zip(sums.par_chunks_mut(ROWS_PER_TASK));
                let rows = logits.par_chunks(ROWS_PER_TASK * t.entries).zip(state);
                let rows = rows.zip(logp.par_chunks_mut(ROWS_PER_TASK)).zip(target[at].par_chunks(ROWS_PER_TASK));
                rows.for_each(|(((logits, (max, sums)), logp), target)| {
                    for (i, logits) in logits.chunks_exact(t.entries).enumerate() {
                        accumulate(self.isa(), logits, &mut max[i], &mut sums[i]);
                        if let Some(l) = (target[i] as usize).checked_sub(t.entry).and_then(|v| logits.get(v)) {
                            logp[i] = *l;
                        }
                    }
                });
            });
            if t.entry + t.entries == d.vocab {
                for ((lse, logp), sum) in max.iter_mut().zip(logp).zip(&*sums) {
                    *lse += sum.exp.ln();
                    *logp -= *lse;
                }
                if let Some(entropy) = &mut entropy {
                    let rows = entropy[t.row..].iter_mut().zip(&*sums);
                    rows.for_each(|(entropy, sum)| *entropy = sum.exp.ln() - sum.weighted / sum.exp);
                }
                if let Some(ln_sum_p2) = &mut ln_sum_p2 {
                    let rows = ln_sum_p2[t.row..].iter_mut().zip(sums);
                    rows.for_each(|(ln_sum_p2, sum)| *ln_sum_p2 = sum.squares.ln() - 2.0 * sum.exp.ln());
                }
            }
        }
        Ok(())
    }

    fn logprob_head_backward(&self, a: Backward<Self>) -> Result<()> {
        let d = a.check()?;
        let (h, w, target) = (a.h.f32s(), Numbers::of(a.weight), a.target.u32s());
        let (lse, dlogp) = (a.lse.f32s(), a.dlogp.f32s());
        let entropy = a.dentropy.zip(a.entropy).map(|(d, entropy)| (d.f32s(), entropy.f32s()));
        let (scratch, dh) = (a.scratch.into_f32s(), a.dh.into_f32s());
        let mut dweight = a.dweight.map(|d| d.into_f32s());
        for t in tiles(d.rows, d.vocab) {
            let logits = t.logits(self, (d.hidden, a.scale), h, w, scratch);
            let chunk = ROWS_PER_TASK * t.entries;
            self.run(|| {
                logits.par_chunks_mut(chunk).enumerate().for_each(|(task, logits)| {
                    for (i, logits) in logits.chunks_exact_mut(t.entries).enumerate() {
                        let row = t.row + task * ROWS_PER_TASK + i;
                        let (d, entropy) = entropy.map_or((0.0, 0.0), |(d, entropy)| (d[row], entropy[row]));
                        let (dlogp, d) = (a.scale * dlogp[row], a.scale * d);
                        to_gradient(self.isa(), lse[row], dlogp, d, entropy, logits);
                        let hit = (target[row] as usize).checked_sub(t.entry).and_then(|v| logits.get_mut(v));
                        hit.into_iter().for_each(|l| *l += dlogp);
                    }
                });
            });
            t.add_gradients(self, d.hidden, [logits, h], w, dh, dweight.as_deref_mut());
        }
        Ok(())
    }

    fn logprob_head_known(&self, logits: View<Self>, a: Forward<Self>) -> Result<()> {
        let d = a.check()?;
        crate::ops::require("logprob_head_known", "logits", logits.shape(), [d.rows, d.vocab])?;
        let results = a.logp.into_f32s().par_iter_mut().zip(a.lse.into_f32s()).zip(a.target.u32s());
        self.run(|| {
            logits.f32s().par_chunks(d.vocab).zip(results).for_each(|(logits, ((logp, lse), target))| {
                let (mut max, mut sums) = (f32::NEG_INFINITY, Sums::default());
                let mut scaled = [0.0; TILE_VOCAB];
                for tile in logits.chunks(TILE_VOCAB) {
                    let tile = match a.scale {
                        1.0 => tile,
                        scale => {
                            scaled.iter_mut().zip(tile).for_each(|(scaled, l)| *scaled = l * scale);
                            &scaled[..tile.len()]
                        }
                    };
                    accumulate(self.isa(), tile, &mut max, &mut sums);
                }
                *lse = max + sums.exp.ln();
                *logp = a.scale * logits[*target as usize] - *lse;
            });
        });
        Ok(())
    }
}

/// Of one row's logits l below their maximum so far.
#[derive(Clone, Copy, Default)]
struct Sums {
    /// `sum e^(l - max)`
    exp: f32,
    /// `sum e^(l - max) (l - max)`
    weighted: f32,
    /// `sum e^(2 (l - max))`
    squares: f32,
}

dispatched! {
    /// Folds a tile's logits of one row into its running maximum and sums.
    fn accumulate(logits: &[f32], max: &mut f32, sums: &mut Sums) {
        let new = largest(*max, logits);
        let [exps, weighted, squares] = sum_terms([logits], |[l]| {
            let below = l - new;
            let e = exp_of_negative(below);
            [e, e * if below > LOWEST { below } else { LOWEST }, e * e]
        });
        let shrink = exp(*max - new);
        let moved = sums.weighted + sums.exp * (*max - new).max(LOWEST);
        *sums = Sums {
            exp: sums.exp * shrink + exps,
            weighted: moved * shrink + weighted,
            squares: sums.squares * (shrink * shrink) + squares,
        };
        *max = new;
    }
}

dispatched! {
    /// `l <- -p (dlogp + dentropy (ln p + entropy))` with `ln p = l - lse`
    fn to_gradient(lse: f32, dlogp: f32, dentropy: f32, entropy: f32, logits: &mut [f32]) {
        for l in logits.iter_mut() {
            let ln_p = *l - lse;
            *l = -exp(ln_p) * (dlogp + dentropy * (ln_p.max(LOWEST) + entropy));
        }
    }
}
