//! Draws a token of each row of logits: edits, temperature, top-k, nucleus (Holtzman et al., arXiv:1904.09751), min-p (Nguyen et
//! al., arXiv:2407.01082), in the order of transformers' processors, then the inverse of the cumulative distribution at a
//! number of [`Philox`].
//!
//! ```text
//! logit[id]  of an edited token: -inf, or divided by the penalty where above 0, else multiplied by it (arXiv:1909.05858)
//! weight[id] = e^((logit[id] - max) / temperature)
//! top-k      the k likeliest tokens, and all that are as likely as the last of them
//! nucleus    of these the likeliest, ties by id, until they hold top_p of the weight
//! min-p      of these those of weight min_p or more: so much of the likeliest token's probability
//! id         the first of what is left, by id, with sum of weights up to it > uniform * sum of weights
//! ```
//! Devices that compute in f32 count weights in units of 2^-44 of the largest: sums of integers have no order, so all of
//! them choose the same token. Against exact numbers a weight is off by 3e-6 of itself at most (the exponent in f32), or
//! by the unit. One deviation from transformers: the nucleus keeps the first of equally likely tokens, not the last.

mod cpu;
mod cuda;
mod reference;

use bytemuck::{Pod, Zeroable};
pub use cpu::scratch_bytes;

use crate::device::{Device, Dry, Philox, View, ViewMut};
use crate::error::{Error, Result};

/// How the next token is drawn.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Sampling {
    /// Logits are divided by it; 0 takes the likeliest token, of equal ones that with the smaller id.
    pub temperature: f64,
    /// Draw from so many of the likeliest tokens; 0 is all.
    pub top_k: usize,
    /// Draw from the smallest set of likeliest tokens that holds this share of the probability, (0, 1].
    pub top_p: f64,
    /// Draw from tokens that have this share of the likeliest one's probability at least, [0, 1].
    pub min_p: f64,
    /// What penalizes an edited token, above 0; 1 changes nothing.
    pub repetition_penalty: f64,
    pub seed: u64,
}

impl Sampling {
    /// From the model's distribution as it is.
    pub fn plain(seed: u64) -> Self {
        Self { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed }
    }

    /// The likeliest token, always.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::plain(0) }
    }

    /// Row of [`Args::rows`]: draws the token at index `position` of sample `stream`, with `edits` from `first_edit` on.
    pub fn row(&self, stream: u64, position: u32, first_edit: usize, edits: usize) -> Row {
        let halves = |x: u64| [x as u32, (x >> 32) as u32];
        Row {
            stream: halves(stream),
            position,
            seed: halves(self.seed),
            temperature: self.temperature as f32,
            // In 2^-64; all ones for the whole.
            share: halves((self.top_p * 2.0f64.powi(64)) as u64),
            min_p: self.min_p as f32,
            top_k: self.top_k.min(MOST_TOKENS) as u32,
            repetition_penalty: self.repetition_penalty as f32,
            edits: [first_edit as u32, edits as u32],
        }
    }
}

/// How one row's token is drawn; made by [`Sampling::row`].
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Debug, Pod, Zeroable)]
pub struct Row {
    stream: [u32; 2],
    position: u32,
    seed: [u32; 2],
    temperature: f32,
    share: [u32; 2],
    min_p: f32,
    top_k: u32,
    repetition_penalty: f32,
    edits: [u32; 2],
}

impl Row {
    /// Columns of [`Args::rows`].
    pub const WORDS: usize = 13;

    /// Whether it draws from the model's whole distribution at this temperature.
    pub fn plain(&self, temperature: f64) -> bool {
        let all = self.top_k == 0 && self.share() == u64::MAX && self.min_p == 0.0;
        self.temperature == temperature as f32 && all && self.edits[1] == 0
    }

    fn share(&self) -> u64 {
        whole(self.share)
    }

    /// The random word of the row.
    fn word(&self) -> u64 {
        Philox::new(whole(self.seed), whole(self.stream)).u64(u64::from(self.position))
    }

    /// The row's part of all `edits`.
    fn edits<'a>(&self, edits: &'a [u32]) -> &'a [u32] {
        &edits[self.edits[0] as usize..][..self.edits[1] as usize]
    }

    /// What the logits of a row become that an edit names.
    fn edited<T: Number>(&self, edit: u32, logit: T) -> T {
        if edit & BANNED == 0 { logit.penalized(self.repetition_penalty) } else { T::LOWEST }
    }
}

fn whole([low, high]: [u32; 2]) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

/// f32, and f64 of the oracle.
trait Number: Copy {
    const LOWEST: Self;
    fn penalized(self, penalty: f32) -> Self;
}

impl Number for f32 {
    const LOWEST: Self = f32::NEG_INFINITY;
    fn penalized(self, penalty: f32) -> Self {
        if self < 0.0 { self * penalty } else { self / penalty }
    }
}

impl Number for f64 {
    const LOWEST: Self = f64::NEG_INFINITY;
    fn penalized(self, penalty: f32) -> Self {
        let penalty = f64::from(penalty);
        if self < 0.0 { self * penalty } else { self / penalty }
    }
}

/// Set in an edit whose token must not be drawn; without it the token is penalized.
pub const BANNED: u32 = 1 << 31;
/// Vocabularies that are smaller: their weights fit a sum of 64 bits.
const MOST_TOKENS: usize = 1 << 19;
/// 1 of the integers that weights are counted in is 2^-44 of the largest weight.
const UNIT_BITS: u32 = 44;
/// What is set in the id of a token whose logit is no number that can be drawn from.
const NOT_A_NUMBER: u32 = 1 << 31;
const INFINITE: u32 = 1 << 30;

/// Numbers of a row of [`Args::odds`].
pub const ODDS: usize = 3;

/// The log-probability of the drawn token in what it was drawn from, nats, by its row of [`Args::odds`].
pub fn sampled_logp(odds: [u32; ODDS]) -> f64 {
    let unit = (1u64 << UNIT_BITS) as f64;
    f64::from(f32::from_bits(odds[0])) - (whole([odds[1], odds[2]]) as f64 / unit).ln()
}

/// A row of odds: the logarithm of the token's weight, and what all weights hold that it was drawn from.
fn odds(ln_weight: f32, mass: u64) -> [u32; ODDS] {
    [ln_weight.to_bits(), mass as u32, (mass >> 32) as u32]
}

/// Those of a token that was certain.
fn certain() -> [u32; ODDS] {
    odds(0.0, 1 << UNIT_BITS)
}

pub struct Args<'a, D: Device> {
    /// `[rows, vocab]`; afterwards what they were
    pub logits: ViewMut<'a, D>,
    /// `[rows, 13]`: of [`Row`]
    pub rows: View<'a, D>,
    /// `[edits, 1]`: tokens, each at most once a row, [`BANNED`] or not
    pub edits: View<'a, D>,
    /// `[edits, 1]` f32, overwritten
    pub saved: ViewMut<'a, D>,
    /// `=` `[rows, 1]`: what [`tokens`] reads
    pub ids: ViewMut<'a, D>,
    /// `=` `[rows, 3]`: what [`sampled_logp`] reads
    pub odds: ViewMut<'a, D>,
}

pub trait Sample: Device {
    fn sample(&self, a: Args<Self>) -> Result<()>;
}

/// The tokens of `ids`; fails where a logit was NaN or infinite.
pub fn tokens(ids: &[u32]) -> Result<&[u32]> {
    let bad = |id: &u32| id & (NOT_A_NUMBER | INFINITE) != 0;
    let Some(row) = ids.iter().position(bad) else { return Ok(ids) };
    let token = ids[row] & !(NOT_A_NUMBER | INFINITE);
    let what = if ids[row] & INFINITE == 0 { "NaN" } else { "infinite" };
    Err(Error::op("sample", format!("the logit of token {token} in row {row} is {what}; are the weights sound?")))
}

impl<D: Device> Args<'_, D> {
    fn check(&self) -> Result<()> {
        let [rows, vocab] = self.logits.shape();
        super::require("sample", "rows", self.rows.shape(), [rows, Row::WORDS])?;
        super::require("sample", "edits", self.edits.shape(), [self.edits.rows(), 1])?;
        super::require("sample", "saved", self.saved.shape(), self.edits.shape())?;
        super::require("sample", "ids", self.ids.shape(), [rows, 1])?;
        super::require("sample", "odds", self.odds.shape(), [rows, ODDS])?;
        if !(1..MOST_TOKENS).contains(&vocab) {
            return Err(Error::op(
                "sample",
                format!("{vocab} tokens to choose from; expected 1 to {}", MOST_TOKENS - 1),
            ));
        }
        Ok(())
    }
}

impl Sample for Dry {
    fn sample(&self, a: Args<Self>) -> Result<()> {
        a.check()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{Arena, Cpu, Kind, Reference};

    const LOGITS: [f32; 4] = [0.0, 2.0, 1.0, -1.0];
    /// Streams and positions, one row each.
    type Draws<'a> = &'a [(u64, u32)];

    /// What is drawn from these logits, with these edits, and its log-probability.
    fn edited<D: Sample>(
        device: &D,
        logits: &[f32],
        sampling: Sampling,
        edits: &[u32],
        of: Draws,
    ) -> Result<Vec<(u32, f64)>> {
        let (rows, vocab) = (of.len(), logits.len());
        let mut arena = Arena::with_bytes(device, 1 << 24)?;
        let mut x = arena.floats(Kind::Workspace, rows, vocab);
        let mut index = |rows, cols| arena.indices(Kind::Workspace, rows, cols);
        let (mut how, mut all_edits) = (index(rows, Row::WORDS), index(rows * edits.len(), 1));
        let (mut ids, mut odds) = (index(rows, 1), index(rows, ODDS));
        let mut saved = arena.floats(Kind::Workspace, rows * edits.len(), 1);
        let row = |(i, (stream, position)): (usize, &(u64, u32))| {
            sampling.row(*stream, *position, i * edits.len(), edits.len())
        };
        let of: Vec<Row> = of.iter().enumerate().map(row).collect();
        device.write_f32(&logits.repeat(rows), x.view_mut())?;
        device.write_u32(bytemuck::cast_slice(&of), how.view_mut())?;
        device.write_u32(&edits.repeat(rows), all_edits.view_mut())?;
        device.sample(Args {
            logits: x.view_mut(),
            rows: how.view(),
            edits: all_edits.view(),
            saved: saved.view_mut(),
            ids: ids.view_mut(),
            odds: odds.view_mut(),
        })?;
        let (mut found, mut chances) = (vec![0; rows], vec![[0; ODDS]; rows]);
        device.read_u32(ids.view(), &mut found)?;
        device.read_u32(odds.view(), chances.as_flattened_mut())?;
        Ok(tokens(&found)?.iter().copied().zip(chances.into_iter().map(sampled_logp)).collect())
    }

    fn drawn<D: Sample>(device: &D, logits: &[f32], sampling: Sampling, of: Draws) -> Result<Vec<u32>> {
        Ok(edited(device, logits, sampling, &[], of)?.into_iter().map(|(id, _)| id).collect())
    }

    /// How often each of four tokens is drawn, and the probability that it is said to have, where it was.
    fn frequencies(logits: [f32; 4], sampling: Sampling, edits: &[u32]) -> [[f64; 4]; 2] {
        let of: Vec<_> = (0..20_000).map(|i| (i % 7, i as u32 / 7)).collect();
        let mut found = [[0.0; 4]; 2];
        for (id, logp) in edited(&Cpu::new(1).unwrap(), &logits, sampling, edits, &of).unwrap() {
            found[0][id as usize] += 1.0 / of.len() as f64;
            found[1][id as usize] = logp.exp();
        }
        found
    }

    /// They agree with these probabilities.
    #[track_caller]
    fn follow(sampling: Sampling, edits: &[u32], expected: [f64; 4]) {
        let [counted, said] = frequencies(LOGITS, sampling, edits);
        for i in 0..4 {
            assert!((counted[i] - expected[i]).abs() < 0.015, "{counted:?} instead of {expected:?}");
            assert!((said[i] - expected[i]).abs() < 1e-5, "said to be {said:?} instead of {expected:?}");
        }
    }

    fn plain() -> Sampling {
        Sampling::plain(3)
    }

    /// `weights` as shares of their sum.
    fn shares(weights: [f64; 4]) -> [f64; 4] {
        weights.map(|weight| weight / weights.iter().sum::<f64>())
    }

    #[test]
    fn draws_follow_the_softmax() {
        for temperature in [0.5, 1.0, 2.0] {
            let weights = LOGITS.map(|l| (f64::from(l) / temperature).exp());
            follow(Sampling { temperature, ..plain() }, &[], shares(weights));
        }
    }

    /// p = [.087, .644, .237, .032]: 0.8 needs the two likeliest, renormalized.
    #[test]
    fn top_p_keeps_the_smallest_set_that_reaches_it() {
        let e = std::f64::consts::E;
        follow(Sampling { top_p: 0.8, ..plain() }, &[], shares([0.0, e, 1.0, 0.0]));
        follow(Sampling { top_p: 0.1, ..plain() }, &[], [0.0, 1.0, 0.0, 0.0]);
        follow(Sampling { top_p: 1e-30, ..plain() }, &[], [0.0, 1.0, 0.0, 0.0]);
    }

    #[test]
    fn top_k_keeps_so_many_before_the_nucleus_is_cut() {
        let e = std::f64::consts::E;
        let two = Sampling { top_k: 2, ..plain() };
        follow(two, &[], shares([0.0, e, 1.0, 0.0]));
        follow(Sampling { top_k: 4, ..plain() }, &[], shares([1.0 / e, e, 1.0, 1.0 / e / e]));
        // Of two tokens the first holds 0.731, of all only 0.644.
        follow(Sampling { top_p: 0.7, ..two }, &[], [0.0, 1.0, 0.0, 0.0]);
        follow(Sampling { top_k: 1, temperature: 5.0, ..plain() }, &[], [0.0, 1.0, 0.0, 0.0]);
        let ties = Sampling { top_k: 2, ..plain() };
        let [_, said] = frequencies([1.0, 2.0, 1.0, 0.0], ties, &[]);
        assert!(said[0] > 0.2 && said[2] > 0.2 && said[3] == 0.0, "both of equal tokens stay: {said:?}");
    }

    #[test]
    fn min_p_is_a_share_of_the_likeliest_after_the_temperature() {
        let e = std::f64::consts::E;
        follow(Sampling { min_p: 0.3, ..plain() }, &[], shares([0.0, e, 1.0, 0.0]));
        follow(Sampling { min_p: 0.3, temperature: 0.5, ..plain() }, &[], [0.0, 1.0, 0.0, 0.0]);
        follow(Sampling { min_p: 1.0, ..plain() }, &[], [0.0, 1.0, 0.0, 0.0]);
        // It cuts what the nucleus leaves, and the nucleus what it would.
        follow(Sampling { min_p: 0.01, top_p: 0.8, ..plain() }, &[], shares([0.0, e, 1.0, 0.0]));
        follow(Sampling { min_p: 0.5, top_p: 0.99, ..plain() }, &[], [0.0, 1.0, 0.0, 0.0]);
    }

    #[test]
    fn edits_come_before_everything_else() {
        let sampling = Sampling { repetition_penalty: 2.0, ..plain() };
        let weights = [1.0f64, 1.0f64.exp(), 1.0f64.exp(), (-2.0f64).exp()];
        follow(sampling, &[1, 3], shares(weights));
        follow(sampling, &[1 | BANNED, 3], shares([weights[0], 0.0, weights[2], weights[3]]));
        follow(Sampling { temperature: 0.0, ..sampling }, &[1 | BANNED], [0.0, 0.0, 1.0, 0.0]);
        let all = [BANNED, 1 | BANNED, 2 | BANNED, 3 | BANNED];
        follow(sampling, &all, [1.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn ties_go_to_the_smaller_ids() {
        let cpu = Cpu::new(1).unwrap();
        let of: Vec<_> = (0..100).map(|i| (i, 0)).collect();
        let half = Sampling { top_p: 0.5, ..plain() };
        assert!(drawn(&cpu, &[1.0; 4], half, &of).unwrap().into_iter().all(|id| id < 2));
        assert_eq!(drawn(&cpu, &[-1.0, 0.0, -0.0, 0.0], Sampling::greedy(), &of[..1]).unwrap(), [1]);
    }

    #[test]
    fn the_cpu_chooses_as_exact_numbers_do() {
        let random = Philox::named(1, "logits");
        let logits: Vec<f32> = (0..1003).map(|i| 3.0 * random.normal(i) as f32).collect();
        let of: Vec<_> = (0..500).map(|i| (i << 31, i as u32)).collect();
        let edits: Vec<u32> = (0..1003).step_by(3).map(|id| id | if id % 2 == 0 { BANNED } else { 0 }).collect();
        for (temperature, top_k, top_p, min_p) in [
            (0.0, 0, 1.0, 0.0),
            (0.7, 0, 1.0, 0.0),
            (1.0, 0, 0.9, 0.0),
            (1.3, 0, 0.3, 0.0),
            (1.0, 20, 1.0, 0.0),
            (1.1, 50, 0.8, 0.0),
            (0.9, 0, 1.0, 0.02),
            (1.2, 100, 0.95, 0.05),
        ] {
            let sampling = Sampling { temperature, top_k, top_p, min_p, repetition_penalty: 1.3, seed: 7 };
            for edits in [&[], edits.as_slice()] {
                let [found, exact] = [
                    edited(&Cpu::new(2).unwrap(), &logits, sampling, edits, &of).unwrap(),
                    edited(&Reference, &logits, sampling, edits, &of).unwrap(),
                ];
                for ((id, logp), (exact, exact_logp)) in found.into_iter().zip(exact) {
                    assert_eq!(id, exact, "{sampling:?}, {} edits", edits.len());
                    assert!((logp - exact_logp).abs() < 1e-5, "{logp}, exactly {exact_logp}: {sampling:?}");
                }
            }
        }
    }

    #[test]
    fn bad_logits_are_errors() {
        let cpu = Cpu::new(1).unwrap();
        for (bad, what) in [(f32::NAN, "NaN"), (-f32::NAN, "NaN"), (f32::INFINITY, "infinite")] {
            for sampling in [Sampling::greedy(), plain()] {
                for found in [
                    drawn(&cpu, &[0.0, bad, bad], sampling, &[(0, 0)]),
                    drawn(&Reference, &[0.0, bad, bad], sampling, &[(0, 0)]),
                ] {
                    let error = found.unwrap_err().to_string();
                    assert!(error.contains(&format!("token 1 in row 0 is {what}")), "{error}");
                }
            }
        }
        let nothing = Sampling { top_p: 0.9, top_k: 2, min_p: 0.1, ..plain() };
        assert_eq!(drawn(&cpu, &[f32::NEG_INFINITY; 3], nothing, &[(0, 0)]).unwrap(), [0]);
        assert_eq!(drawn(&cpu, &[f32::NEG_INFINITY, -1e30], nothing, &[(0, 0)]).unwrap(), [1]);
    }
}
