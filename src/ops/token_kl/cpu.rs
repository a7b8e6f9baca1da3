use rayon::prelude::*;

use super::{Backward, Forward, TokenKl};
use crate::device::Cpu;
use crate::error::Result;
use crate::ops::gemm::Numbers;
use crate::ops::logits::{ROWS_PER_TASK, tiles};
use crate::ops::logprob_head::{TILE_ROWS, TILE_VOCAB};
use crate::ops::simd::{dispatched, exp, exp_of_negative, largest, sum_terms};

impl TokenKl for Cpu {
    fn token_kl(&self, a: Forward<Self>) -> Result<()> {
        let d = a.check()?;
        let (h, w, at_once) = (a.h.f32s(), Numbers::of(a.weight), d.rows.min(TILE_ROWS));
        let (kl, lse) = (a.kl.into_f32s(), a.lse.into_f32s());
        let (policy_tile, ref_tile) = a.scratch.into_f32s().split_at_mut(at_once * TILE_VOCAB);
        // Host memory, a few numbers for each row and reference: the running sums of `at_once` rows, reference by reference.
        let mut sums = vec![Sums::EMPTY; a.refs.len() * at_once];
        for t in tiles(d.rows, d.vocab) {
            if t.entry == 0 {
                sums.fill(Sums::EMPTY);
            }
            let policy = &*t.logits(self, (d.hidden, a.scale), h, w, policy_tile);
            for (r, sums) in a.refs.iter().zip(sums.chunks_exact_mut(at_once)) {
                let reference = &*t.logits(self, (r.h.cols(), a.scale), r.h.f32s(), Numbers::of(r.weight), ref_tile);
                let task = ROWS_PER_TASK * t.entries;
                self.run(|| {
                    let logits = policy.par_chunks(task).zip(reference.par_chunks(task));
                    let tasks = logits.zip(sums[..t.rows].par_chunks_mut(ROWS_PER_TASK));
                    tasks.for_each(|((policy, reference), sums)| {
                        let rows = policy.chunks_exact(t.entries).zip(reference.chunks_exact(t.entries));
                        rows.zip(sums).for_each(|((l, m), sums)| accumulate(self.isa(), l, m, sums));
                    });
                });
            }
            if t.entry + t.entries == d.vocab {
                for (k, sums) in sums.chunks_exact(at_once).enumerate() {
                    for (row, sums) in (t.row..).zip(&sums[..t.rows]) {
                        lse[row] = sums.policy.lse();
                        lse[(1 + k) * d.rows + row] = sums.reference.lse();
                        kl[k * d.rows + row] = sums.kl();
                    }
                }
            }
        }
        Ok(())
    }

    fn token_kl_backward(&self, a: Backward<Self>) -> Result<()> {
        let d = a.check()?;
        let (h, w) = (a.h.f32s(), Numbers::of(a.weight));
        let (kl, lse, dkl, dh) = (a.kl.f32s(), a.lse.f32s(), a.dkl.f32s(), a.dh.into_f32s());
        let mut dweight = a.dweight.map(|d| d.into_f32s());
        let tile_len = d.rows.min(TILE_ROWS) * TILE_VOCAB;
        let (policy_tile, rest) = a.scratch.into_f32s().split_at_mut(tile_len);
        let (ref_tile, gradient_tile) = rest.split_at_mut(tile_len);
        for t in tiles(d.rows, d.vocab) {
            let policy = &*t.logits(self, (d.hidden, a.scale), h, w, policy_tile);
            let dl = &mut gradient_tile[..t.rows * t.entries];
            dl.fill(0.0);
            for (k, r) in a.refs.iter().enumerate() {
                let reference = &*t.logits(self, (r.h.cols(), a.scale), r.h.f32s(), Numbers::of(r.weight), ref_tile);
                let row = |row: usize| {
                    let at = k * d.rows + row;
                    Row {
                        lse: [lse[row], lse[d.rows + at]],
                        kl: kl[at],
                        dkl: a.scale * dkl[at],
                        last: k + 1 == a.refs.len(),
                    }
                };
                let task = ROWS_PER_TASK * t.entries;
                self.run(|| {
                    let tiles = policy.par_chunks(task).zip(reference.par_chunks(task)).zip(dl.par_chunks_mut(task));
                    tiles.enumerate().for_each(|(task, ((policy, reference), dl))| {
                        let logits = policy.chunks_exact(t.entries).zip(reference.chunks_exact(t.entries));
                        let rows = (t.row + task * ROWS_PER_TASK..).zip(dl.chunks_exact_mut(t.entries));
                        rows.zip(logits).for_each(|((at, dl), (l, m))| add_gradient(self.isa(), row(at), l, m, dl));
                    });
                });
            }
            t.add_gradients(self, d.hidden, [dl, h], w, dh, dweight.as_deref_mut());
        }
        Ok(())
    }
}

/// Of one row's logits l that went by.
#[derive(Clone, Copy)]
struct Softmax {
    max: f32,
    /// `sum e^(l - max)`
    sum: f32,
}

impl Softmax {
    fn lse(&self) -> f32 {
        self.max + self.sum.ln()
    }
}

/// Of one row's logits that went by: the policy's l and a reference's m.
#[derive(Clone, Copy)]
struct Sums {
    policy: Softmax,
    reference: Softmax,
    /// `sum e^(l - max l) (l - m)`
    weighted: f32,
}

impl Sums {
    const EMPTY: Self = {
        let none = Softmax { max: f32::NEG_INFINITY, sum: 0.0 };
        Self { policy: none, reference: none, weighted: 0.0 }
    };

    /// `sum p (l - m) - (lse - lse_k)`. The log-sum-exps are compared by their parts: they are large, what they differ by
    /// need not be.
    fn kl(&self) -> f32 {
        let (p, q) = (self.policy, self.reference);
        self.weighted / p.sum - ((p.max - q.max) + (p.sum.ln() - q.sum.ln()))
    }
}

/// What is subtracted in exponents: the maximum, or 0 where all is -inf.
#[inline(always)]
fn base_of(max: f32) -> f32 {
    if max == f32::NEG_INFINITY { 0.0 } else { max }
}

/// `p x`, 0 where p is: x may be infinite, or no number, where two logits are -inf.
#[inline(always)]
fn weighted(p: f32, x: f32) -> f32 {
    if p == 0.0 { 0.0 } else { p * x }
}

dispatched! {
    /// Folds a tile's logits of one row into the running sums.
    fn accumulate(policy: &[f32], reference: &[f32], sums: &mut Sums) {
        let (p_max, q_max) = (largest(sums.policy.max, policy), largest(sums.reference.max, reference));
        let (p_base, q_base) = (base_of(p_max), base_of(q_max));
        let [p, q, both] = sum_terms([policy, reference], |[l, m]| {
            let e = exp_of_negative(l - p_base);
            [e, exp_of_negative(m - q_base), weighted(e, l - m)]
        });
        let (p_shrink, q_shrink) = (exp(sums.policy.max - p_base), exp(sums.reference.max - q_base));
        *sums = Sums {
            policy: Softmax { max: p_max, sum: sums.policy.sum * p_shrink + p },
            reference: Softmax { max: q_max, sum: sums.reference.sum * q_shrink + q },
            weighted: weighted(p_shrink, sums.weighted) + both,
        };
    }
}

/// What the gradient of one row takes of a reference.
#[derive(Clone, Copy)]
struct Row {
    /// The policy's and the reference's.
    lse: [f32; 2],
    kl: f32,
    dkl: f32,
    /// No reference comes after this one.
    last: bool,
}

dispatched! {
    /// `dl += dkl (ln p - ln q - kl)`, and after the last reference times p
    fn add_gradient(row: Row, policy: &[f32], reference: &[f32], dl: &mut [f32]) {
        let Row { lse, kl, dkl, last } = row;
        for (dl, (l, m)) in dl.iter_mut().zip(policy.iter().zip(reference)) {
            *dl += dkl * ((*l - lse[0]) - (*m - lse[1]) - kl);
        }
        if last {
            dl.iter_mut().zip(policy).for_each(|(dl, l)| *dl = weighted(exp(*l - lse[0]), *dl));
        }
    }
}
