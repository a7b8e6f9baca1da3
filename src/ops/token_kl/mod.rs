//! Per token, how far the policy's next-token distribution is from each of K frozen references, exactly: a sum over the whole
//! vocabulary and not an estimate from the token that was drawn.
//!
//! ```text
//! l = scale h W^T        p_v = e^(l_v - lse)                        the policy's
//! m = scale h_k W_k^T    q_v = e^(m_v - lse_k)                      those of reference k; another hidden size, the same vocabulary
//! KL_k = sum_v p_v (ln p_v - ln q_v)                                nats, reverse: KL(policy || reference)
//! dl_v = scale p_v sum_k dKL_k (ln p_v - ln q_v - KL_k)             dh += dl W        dW += dl^T h
//! ```
//! Logits exist one tile at a time, the policy's beside those of one reference, so that a reference costs one product with its
//! head, forward and backward, and no memory. An entry that the policy never takes (p = 0) counts 0 whatever q is; where p > 0
//! and q = 0, KL_k is infinite and its gradient is NaN. With the reference's logits equal to the policy's, KL_k is 0 exactly;
//! otherwise it is off by some roundings of the logits, and so may lie that far below 0.
//!
//! Saved for the backward: `h`, the references, `lse` and `kl`. What k1, k2 and k3 (Schulman, Approximating KL Divergence, 2020)
//! estimate from the drawn token. As a loss on sampled sequences it moves each token's distribution given its prefix; that
//! another choice leads to other prefixes is not in its gradient.

mod cpu;
mod cuda;
mod reference;

use super::logprob_head::{TILE_ROWS, TILE_VOCAB};
use crate::device::{Device, Dry, View, ViewMut};
use crate::error::{Error, Result};

/// Shape of `scratch` for `rows` rows: three tiles, whatever the vocabulary and however many references.
pub fn scratch_shape(rows: usize) -> [usize; 2] {
    [3 * rows.min(TILE_ROWS), TILE_VOCAB]
}

/// A frozen reference: its final hidden rows, normed, and its head.
pub struct Ref<'a, D: Device> {
    /// `[rows, hidden_k]`
    pub h: View<'a, D>,
    /// `[vocab, hidden_k]`
    pub weight: View<'a, D>,
}

impl<D: Device> Clone for Ref<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<D: Device> Copy for Ref<'_, D> {}

pub struct Forward<'a, D: Device> {
    /// `[rows, hidden]`
    pub h: View<'a, D>,
    /// `[vocab, hidden]`
    pub weight: View<'a, D>,
    /// K >= 1
    pub refs: &'a [Ref<'a, D>],
    /// Of all logits: 1 / temperature.
    pub scale: f32,
    /// `[3 min(rows, TILE_ROWS), TILE_VOCAB]` f32, overwritten; CUDA takes its workspace instead
    pub scratch: ViewMut<'a, D>,
    /// `=` `[K, rows]`, nats
    pub kl: ViewMut<'a, D>,
    /// `=` `[1 + K, rows]`: the policy's first
    pub lse: ViewMut<'a, D>,
}

pub struct Backward<'a, D: Device> {
    /// `[rows, hidden]`
    pub h: View<'a, D>,
    /// `[vocab, hidden]`
    pub weight: View<'a, D>,
    /// K >= 1
    pub refs: &'a [Ref<'a, D>],
    /// The forward's.
    pub scale: f32,
    /// `[K, rows]`: what the forward wrote
    pub kl: View<'a, D>,
    /// `[1 + K, rows]`: what the forward wrote
    pub lse: View<'a, D>,
    /// `[K, rows]`: the objective's derivative by each `kl`
    pub dkl: View<'a, D>,
    /// `[3 min(rows, TILE_ROWS), TILE_VOCAB]` f32, overwritten; CUDA takes its workspace instead
    pub scratch: ViewMut<'a, D>,
    /// `+=` `[rows, hidden]`
    pub dh: ViewMut<'a, D>,
    /// `+=` `[vocab, hidden]`; `None` for a frozen head, whose product is then not computed
    pub dweight: Option<ViewMut<'a, D>>,
}

pub trait TokenKl: Device {
    fn token_kl(&self, a: Forward<Self>) -> Result<()>;
    fn token_kl_backward(&self, a: Backward<Self>) -> Result<()>;
}

struct Dims {
    rows: usize,
    hidden: usize,
    vocab: usize,
}

impl Dims {
    /// FLOPs of the products that make all logits once.
    fn logits<D: Device>(&self, refs: &[Ref<D>]) -> usize {
        2 * self.rows * self.vocab * (self.hidden + refs.iter().map(|r| r.h.cols()).sum::<usize>())
    }
}

/// Of what both directions are given.
fn check<D: Device>(
    op: &'static str,
    [h, weight]: [View<D>; 2],
    refs: &[Ref<D>],
    [scratch, kl, lse]: [[usize; 2]; 3],
) -> Result<Dims> {
    let ([rows, hidden], vocab, k) = (h.shape(), weight.rows(), refs.len());
    if k == 0 {
        return Err(Error::op(op, "there are no references: a KL needs one at least"));
    }
    super::require(op, "weight", weight.shape(), [vocab, hidden])?;
    for (i, r) in refs.iter().enumerate() {
        super::require(op, &format!("hidden rows of reference {i}"), r.h.shape(), [rows, r.h.cols()])?;
        super::require(op, &format!("head of reference {i}"), r.weight.shape(), [vocab, r.h.cols()])?;
    }
    super::require(op, "kl", kl, [k, rows])?;
    super::require(op, "lse", lse, [1 + k, rows])?;
    let expected = scratch_shape(rows);
    if scratch[0] < expected[0] || scratch[1] != expected[1] {
        return Err(Error::op(op, format!("scratch has shape {scratch:?}, {rows} rows need {expected:?}")));
    }
    Ok(Dims { rows, hidden, vocab })
}

impl<D: Device> Forward<'_, D> {
    fn check(&self) -> Result<Dims> {
        let shapes = [self.scratch.shape(), self.kl.shape(), self.lse.shape()];
        check("token_kl", [self.h, self.weight], self.refs, shapes)
    }
}

impl<D: Device> Backward<'_, D> {
    fn check(&self) -> Result<Dims> {
        const OP: &str = "token_kl_backward";
        let shapes = [self.scratch.shape(), self.kl.shape(), self.lse.shape()];
        let d = check(OP, [self.h, self.weight], self.refs, shapes)?;
        super::require(OP, "dkl", self.dkl.shape(), self.kl.shape())?;
        super::require(OP, "dh", self.dh.shape(), [d.rows, d.hidden])?;
        if let Some(dweight) = &self.dweight {
            super::require(OP, "dweight", dweight.shape(), [d.vocab, d.hidden])?;
        }
        Ok(d)
    }
}

impl TokenKl for Dry {
    fn token_kl(&self, a: Forward<Self>) -> Result<()> {
        let d = a.check()?;
        self.count(d.logits(a.refs));
        Ok(())
    }

    fn token_kl_backward(&self, a: Backward<Self>) -> Result<()> {
        let d = a.check()?;
        let products = 1 + usize::from(a.dweight.is_some());
        self.count(d.logits(a.refs) + 2 * d.rows * d.hidden * d.vocab * products);
        Ok(())
    }
}
