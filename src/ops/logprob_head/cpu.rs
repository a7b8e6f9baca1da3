use rayon::prelude::*;

use super::{Backward, Dims, Forward, LogprobHead, TILE_ROWS, TILE_VOCAB};
use crate::device::Cpu;
use crate::error::Result;
use crate::ops::gemm::{Operand, Start, gemm};
use crate::ops::simd::{LANES, dispatched, exp, sum_lanes};

/// Rows of one task of the softmax passes.
const ROWS_PER_TASK: usize = 16;

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
        // While tiles go by: `lse` holds the running maximum, `logp` the target's logit, `sums` the sum of
        // exponentials below that maximum.
        let mut sums = [0.0f32; TILE_ROWS];
        for t in tiles(&d) {
            let logits = logits(self, &d, &t, h, w, scratch);
            let at = t.row..t.row + t.rows;
            let (max, logp, sums) = (&mut lse[at.clone()], &mut logp[at.clone()], &mut sums[..t.rows]);
            if t.entry == 0 {
                max.fill(f32::NEG_INFINITY);
                sums.fill(0.0);
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
                for ((lse, logp), sum) in max.iter_mut().zip(logp).zip(sums) {
                    *lse += sum.ln();
                    *logp -= *lse;
                }
            }
        }
        Ok(())
    }

    fn logprob_head_backward(&self, a: Backward<Self>) -> Result<()> {
        let d = a.check()?;
        let (h, w, target) = (a.h.f32s(), a.weight.f32s(), a.target.u32s());
        let (lse, dlogp) = (a.lse.f32s(), a.dlogp.f32s());
        let (scratch, dh) = (a.scratch.into_f32s(), a.dh.into_f32s());
        let mut dweight = a.dweight.map(|d| d.into_f32s());
        for t in tiles(&d) {
            let logits = logits(self, &d, &t, h, w, scratch);
            let chunk = ROWS_PER_TASK * t.entries;
            self.run(|| {
                logits.par_chunks_mut(chunk).enumerate().for_each(|(task, logits)| {
                    for (i, logits) in logits.chunks_exact_mut(t.entries).enumerate() {
                        let row = t.row + task * ROWS_PER_TASK + i;
                        to_gradient(self.isa(), lse[row], dlogp[row], logits);
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

dispatched! {
    /// Folds a tile's logits of one row into its running maximum and sum of exponentials.
    fn accumulate(logits: &[f32], max: &mut f32, sum: &mut f32) {
        let mut top = [*max; LANES];
        let mut lanes = [0.0f32; LANES];
        let body = logits.chunks_exact(LANES);
        let tail = body.remainder();
        for chunk in body.clone() {
            for (top, l) in top.iter_mut().zip(chunk) {
                *top = top.max(*l);
            }
        }
        let new = top.iter().chain(tail).fold(*max, |m, l| m.max(*l));
        for chunk in body {
            for (lane, l) in lanes.iter_mut().zip(chunk) {
                *lane += exp(l - new);
            }
        }
        for (lane, l) in lanes.iter_mut().zip(tail) {
            *lane += exp(l - new);
        }
        *sum = *sum * exp(*max - new) + sum_lanes(lanes);
        *max = new;
    }
}

dispatched! {
    /// `l <- -dlogp * e^(l - lse)`
    fn to_gradient(lse: f32, dlogp: f32, logits: &mut [f32]) {
        for l in logits.iter_mut() {
            *l = -dlogp * exp(*l - lse);
        }
    }
}
