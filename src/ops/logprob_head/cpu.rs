use rayon::prelude::*;

use super::{Backward, Dims, Forward, LogprobHead, TILE_ROWS, TILE_VOCAB};
use crate::device::Cpu;
use crate::error::Result;
use crate::ops::gemm::{Operand, Start, gemm};
use crate::ops::simd::{LANES, dispatched, exp, sum_lanes};

/// Rows of one task of the softmax passes.
const ROWS_PER_TASK: usize = 16;

/// Differences below this have no weight: e^x is 0 long before. Keeps 0 * -inf, which is no number, out of sums of p ln p.
const LOWEST: f32 = -1e4;

/// One tile of logits: rows and vocabulary entries.
struct Tile {
    row: usize,
    rows: usize,
    entry: usize,
    entries: usize,
}

/// All tiles, vocabulary innermost and in order.
fn tiles(d: &Dims) -> impl Iterator<Item = Tile> {
    let (rows, vocab) = (d.rows, d.vocab);
    (0..rows).step_by(TILE_ROWS).flat_map(move |row| {
        (0..vocab).step_by(TILE_VOCAB).map(move |entry| Tile {
            row,
            rows: TILE_ROWS.min(rows - row),
            entry,
            entries: TILE_VOCAB.min(vocab - entry),
        })
    })
}

/// Logits of a tile, `[tile.rows, tile.entries]`, at the front of `scratch`.
fn logits<'a>(cpu: &Cpu, d: &Dims, t: &Tile, h: &[f32], w: &[f32], scratch: &'a mut [f32]) -> &'a mut [f32] {
    let h = Operand::new(&h[t.row * d.hidden..][..t.rows * d.hidden], d.hidden);
    let w = Operand::transposed(&w[t.entry * d.hidden..][..t.entries * d.hidden], d.hidden);
    let logits = &mut scratch[..t.rows * t.entries];
    gemm(cpu, [t.rows, t.entries, d.hidden], h, w, logits, Start::Zero);
    logits
}

impl LogprobHead for Cpu {
    fn logprob_head(&self, a: Forward<Self>) -> Result<()> {
        let d = a.check()?;
        let (h, w, target) = (a.h.f32s(), a.weight.f32s(), a.target.u32s());
        assert!(target.iter().all(|t| (*t as usize) < d.vocab), "logprob_head: a target lies past the vocabulary");
        let (scratch, logp, lse) = (a.scratch.into_f32s(), a.logp.into_f32s(), a.lse.into_f32s());
        let mut entropy = a.entropy.map(|entropy| entropy.into_f32s());
        // While tiles go by: `lse` holds the running maximum, `logp` the target's logit, `sums` what lies below that
        // maximum.
        let mut sums = [Sums::default(); TILE_ROWS];
        for t in tiles(&d) {
            let logits = logits(self, &d, &t, h, w, scratch);
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
                    let rows = entropy[t.row..].iter_mut().zip(sums);
                    rows.for_each(|(entropy, sum)| *entropy = sum.exp.ln() - sum.weighted / sum.exp);
                }
            }
        }
        Ok(())
    }

    fn logprob_head_backward(&self, a: Backward<Self>) -> Result<()> {
        let d = a.check()?;
        let (h, w, target) = (a.h.f32s(), a.weight.f32s(), a.target.u32s());
        let (lse, dlogp) = (a.lse.f32s(), a.dlogp.f32s());
        let entropy = a.dentropy.zip(a.entropy).map(|(d, entropy)| (d.f32s(), entropy.f32s()));
        let (scratch, dh) = (a.scratch.into_f32s(), a.dh.into_f32s());
        let mut dweight = a.dweight.map(|d| d.into_f32s());
        for t in tiles(&d) {
            let logits = logits(self, &d, &t, h, w, scratch);
            let chunk = ROWS_PER_TASK * t.entries;
            self.run(|| {
                logits.par_chunks_mut(chunk).enumerate().for_each(|(task, logits)| {
                    for (i, logits) in logits.chunks_exact_mut(t.entries).enumerate() {
                        let row = t.row + task * ROWS_PER_TASK + i;
                        let (d, entropy) = entropy.map_or((0.0, 0.0), |(d, entropy)| (d[row], entropy[row]));
                        to_gradient(self.isa(), lse[row], dlogp[row], d, entropy, logits);
                        let hit = (target[row] as usize).checked_sub(t.entry).and_then(|v| logits.get_mut(v));
                        hit.into_iter().for_each(|l| *l += dlogp[row]);
                    }
                });
            });
            let rows = t.row * d.hidden..(t.row + t.rows) * d.hidden;
            let entries = t.entry * d.hidden..(t.entry + t.entries) * d.hidden;
            let (dl, w) = (Operand::new(logits, t.entries), Operand::new(&w[entries.clone()], d.hidden));
            gemm(self, [t.rows, d.hidden, t.entries], dl, w, &mut dh[rows.clone()], Start::Output);
            if let Some(dweight) = &mut dweight {
                let (dl, h) = (Operand::transposed(logits, t.entries), Operand::new(&h[rows], d.hidden));
                gemm(self, [t.entries, d.hidden, t.rows], dl, h, &mut dweight[entries], Start::Output);
            }
        }
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
}

dispatched! {
    /// Folds a tile's logits of one row into its running maximum and sums.
    fn accumulate(logits: &[f32], max: &mut f32, sums: &mut Sums) {
        let mut top = [*max; LANES];
        let (mut lanes, mut weighted) = ([0.0f32; LANES], [0.0f32; LANES]);
        let body = logits.chunks_exact(LANES);
        let tail = body.remainder();
        for chunk in body.clone() {
            for (top, l) in top.iter_mut().zip(chunk) {
                *top = top.max(*l);
            }
        }
        let new = top.iter().chain(tail).fold(*max, |m, l| m.max(*l));
        for chunk in body {
            for ((lane, weighted), l) in lanes.iter_mut().zip(&mut weighted).zip(chunk) {
                let e = exp(l - new);
                *lane += e;
                *weighted += e * (l - new).max(LOWEST);
            }
        }
        for ((lane, weighted), l) in lanes.iter_mut().zip(&mut weighted).zip(tail) {
            let e = exp(l - new);
            *lane += e;
            *weighted += e * (l - new).max(LOWEST);
        }
        let shrink = exp(*max - new);
        let moved = sums.weighted + sums.exp * (*max - new).max(LOWEST);
        *sums = Sums { exp: sums.exp * shrink + sum_lanes(lanes), weighted: moved * shrink + sum_lanes(weighted) };
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
