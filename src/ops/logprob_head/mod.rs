//! The head: hidden rows to log-probabilities of given tokens, without a `[rows, vocab]` matrix.
//!
//! ```text
//! l = scale h W^T        lse = ln sum_v e^(l_v)        logp = l_target - lse            (nats)
//! p_v = e^(l_v - lse)        H = -sum_v p_v ln p_v        ln_sum_p2 = ln sum_v p_v^2        (on request, nats)
//! dl_v = scale (dlogp (1[v = target] - p_v) - dH p_v (ln p_v + H))        dh += dl W        dW += dl^T h
//! ```
//! Logits exist one tile at a time in `scratch`; the backward computes them again from `h` and `lse` (as Cut
//! Cross-Entropy does, Wijmans et al., arXiv:2411.09009). Tiles start at multiples of [`TILE_VOCAB`], so the
//! log-sum-exp of a row is reduced in one order whatever the batch. Saved for the backward: `h`, `lse` (and `entropy`).
//! `ln_sum_p2` has no backward: WPO (Zhou et al., arXiv:2406.11827) weights pairs with it as a constant.

mod cpu;
mod cuda;
mod reference;

use crate::device::{Device, Dry, View, ViewMut};
use crate::error::{Error, Result};

/// Rows whose logits exist at one time.
pub const TILE_ROWS: usize = 1024;
/// Vocabulary entries whose logits exist at one time.
pub const TILE_VOCAB: usize = 512;

/// Shape of `scratch` for `rows` rows: bounded, whatever the vocabulary.
pub fn scratch_shape(rows: usize) -> [usize; 2] {
    [rows.min(TILE_ROWS), TILE_VOCAB]
}

pub struct Forward<'a, D: Device> {
    /// `[rows, hidden]`
    pub h: View<'a, D>,
    /// `[vocab, hidden]`
    pub weight: View<'a, D>,
    /// `[rows, 1]`, each < vocab
    pub target: View<'a, D>,
    /// Of the logits: 1 / temperature.
    pub scale: f32,
    /// `[min(rows, TILE_ROWS), TILE_VOCAB]` f32, overwritten; CUDA takes its workspace instead
    pub scratch: ViewMut<'a, D>,
    /// `=` `[rows, 1]`
    pub logp: ViewMut<'a, D>,
    /// `=` `[rows, 1]`
    pub lse: ViewMut<'a, D>,
    /// `=` `[rows, 1]`: of the distribution over the vocabulary, nats
    pub entropy: Option<ViewMut<'a, D>>,
    /// `=` `[rows, 1]`: the logarithm of the sum of squared probabilities over the vocabulary, -ln(vocab)..=0
    pub ln_sum_p2: Option<ViewMut<'a, D>>,
}

pub struct Backward<'a, D: Device> {
    /// `[rows, hidden]`
    pub h: View<'a, D>,
    /// `[vocab, hidden]`
    pub weight: View<'a, D>,
    /// `[rows, 1]`
    pub target: View<'a, D>,
    /// The forward's.
    pub scale: f32,
    /// `[rows, 1]`
    pub lse: View<'a, D>,
    /// `[rows, 1]`: the objective's derivative by each row's log-probability
    pub dlogp: View<'a, D>,
    /// `[rows, 1]`: the objective's derivative by each row's entropy
    pub dentropy: Option<View<'a, D>>,
    /// `[rows, 1]`: what the forward wrote; needed with `dentropy`
    pub entropy: Option<View<'a, D>>,
    /// `[min(rows, TILE_ROWS), TILE_VOCAB]` f32, overwritten; CUDA takes its workspace instead
    pub scratch: ViewMut<'a, D>,
    /// `+=` `[rows, hidden]`
    pub dh: ViewMut<'a, D>,
    /// `+=` `[vocab, hidden]`; `None` for a frozen head, whose product is then not computed
    pub dweight: Option<ViewMut<'a, D>>,
}

pub trait LogprobHead: Device {
    fn logprob_head(&self, a: Forward<Self>) -> Result<()>;
    fn logprob_head_backward(&self, a: Backward<Self>) -> Result<()>;

    /// As `logprob_head`, bit for bit, where the logits `[rows, vocab]` of `h` exist already, not yet scaled: for a device whose product
    /// has the bits of its tiles they save the second product. Neither `entropy` nor `ln_sum_p2` is written.
    fn logprob_head_known(&self, _logits: View<Self>, a: Forward<Self>) -> Result<()> {
        self.logprob_head(a)
    }
}

struct Dims {
    rows: usize,
    hidden: usize,
    vocab: usize,
}

fn check_scratch(op: &'static str, rows: usize, found: [usize; 2]) -> Result<()> {
    let expected = scratch_shape(rows);
    if found[0] >= expected[0] && found[1] == expected[1] {
        return Ok(());
    }
    Err(Error::op(op, format!("scratch has shape {found:?}, {rows} rows need {expected:?}")))
}

impl<D: Device> Forward<'_, D> {
    fn check(&self) -> Result<Dims> {
        const OP: &str = "logprob_head";
        let ([rows, hidden], vocab) = (self.h.shape(), self.weight.rows());
        super::require(OP, "weight", self.weight.shape(), [vocab, hidden])?;
        for (what, view) in [("target", self.target), ("logp", self.logp.view()), ("lse", self.lse.view())] {
            super::require(OP, what, view.shape(), [rows, 1])?;
        }
        for (what, view) in [("entropy", &self.entropy), ("ln_sum_p2", &self.ln_sum_p2)] {
            view.as_ref().map_or(Ok(()), |view| super::require(OP, what, view.shape(), [rows, 1]))?;
        }
        check_scratch(OP, rows, self.scratch.shape())?;
        Ok(Dims { rows, hidden, vocab })
    }
}

impl<D: Device> Backward<'_, D> {
    fn check(&self) -> Result<Dims> {
        const OP: &str = "logprob_head_backward";
        let ([rows, hidden], vocab) = (self.h.shape(), self.weight.rows());
        super::require(OP, "weight", self.weight.shape(), [vocab, hidden])?;
        if self.dentropy.is_some() && self.entropy.is_none() {
            return Err(Error::op(OP, "dentropy without entropy: give what the forward wrote there"));
        }
        let rest = [("dentropy", self.dentropy), ("entropy", self.entropy)];
        let rest = rest.into_iter().filter_map(|(what, view)| Some((what, view?)));
        for (what, view) in [("target", self.target), ("lse", self.lse), ("dlogp", self.dlogp)].into_iter().chain(rest)
        {
            super::require(OP, what, view.shape(), [rows, 1])?;
        }
        super::require(OP, "dh", self.dh.shape(), [rows, hidden])?;
        if let Some(dweight) = &self.dweight {
            super::require(OP, "dweight", dweight.shape(), [vocab, hidden])?;
        }
        check_scratch(OP, rows, self.scratch.shape())?;
        Ok(Dims { rows, hidden, vocab })
    }
}

impl LogprobHead for Dry {
    fn logprob_head(&self, a: Forward<Self>) -> Result<()> {
        let d = a.check()?;
        self.count(2 * d.rows * d.hidden * d.vocab);
        Ok(())
    }

    fn logprob_head_backward(&self, a: Backward<Self>) -> Result<()> {
        let d = a.check()?;
        let products = 2 + usize::from(a.dweight.is_some());
        self.count(2 * d.rows * d.hidden * d.vocab * products);
        Ok(())
    }
}
