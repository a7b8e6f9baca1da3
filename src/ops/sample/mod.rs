//! Draws a token of each row of logits: temperature, nucleus (Holtzman et al., arXiv:1904.09751), then the inverse of the
//! cumulative distribution at a number of [`Philox`].
//!
//! ```text
//! weight[id] = e^((logit[id] - max) / temperature)
//! nucleus    the likeliest tokens, ties by id, until they hold top_p of the weight
//! id         the first of the nucleus, by id, with sum of weights up to it > uniform * sum of weights
//! ```
//! Devices that compute in f32 count weights in units of 2^-44 of the largest: sums of integers have no order, so all of
//! them choose the same token. Against exact numbers a weight is off by 3e-6 of itself at most (the exponent in f32), or
//! by the unit.

mod cpu;
mod cuda;
mod reference;

use crate::device::{Device, Dry, Philox, View, ViewMut};
use crate::error::{Error, Result};

/// How the next token is drawn.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Sampling {
    /// Logits are divided by it; 0 takes the likeliest token, of equal ones that with the smaller id.
    pub temperature: f64,
    /// Draw from the smallest set of likeliest tokens that holds this share of the probability, (0, 1].
    pub top_p: f64,
    pub seed: u64,
}

/// Numbers of a row of [`Args::draws`].
pub const DRAW: usize = 3;
/// Vocabularies that are smaller: their weights fit a sum of 64 bits.
const MOST_TOKENS: usize = 1 << 19;
/// 1 of the integers that weights are counted in is 2^-44 of the largest weight.
const UNIT_BITS: u32 = 44;
/// What is set in the id of a token whose logit is no number that can be drawn from.
const NOT_A_NUMBER: u32 = 1 << 31;
const INFINITE: u32 = 1 << 30;

/// Where the random number of a row comes from: sample `stream` of the seed, its token at index `position`.
pub fn draw(stream: u64, position: u32) -> [u32; DRAW] {
    [stream as u32, (stream >> 32) as u32, position]
}

pub struct Args<'a, D: Device> {
    /// `[rows, vocab]`; without meaning afterwards
    pub logits: ViewMut<'a, D>,
    pub sampling: Sampling,
    /// `[rows, 3]`: what [`draw`] makes
    pub draws: View<'a, D>,
    /// `=` `[rows, 1]`: what [`tokens`] reads
    pub ids: ViewMut<'a, D>,
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
        super::require("sample", "draws", self.draws.shape(), [rows, DRAW])?;
        super::require("sample", "ids", self.ids.shape(), [rows, 1])?;
        if !(1..MOST_TOKENS).contains(&vocab) {
            return Err(Error::op(
                "sample",
                format!("{vocab} tokens to choose from; expected 1 to {}", MOST_TOKENS - 1),
            ));
        }
        Ok(())
    }
}

impl Sampling {
    /// `top_p` in 2^-64; all ones for the whole.
    fn share(&self) -> u64 {
        (self.top_p * 2.0f64.powi(64)) as u64
    }

    /// The random word of a row.
    fn word(&self, draw: &[u32]) -> u64 {
        Philox::new(self.seed, u64::from(draw[0]) | u64::from(draw[1]) << 32).u64(u64::from(draw[2]))
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

    /// What is drawn from these logits by draws `of`, one row each.
    fn drawn<D: Sample>(device: &D, logits: &[f32], sampling: Sampling, of: &[[u32; DRAW]]) -> Result<Vec<u32>> {
        let (rows, vocab) = (of.len(), logits.len());
        let mut arena = Arena::with_bytes(device, 1 << 24)?;
        let mut x = arena.floats(Kind::Workspace, rows, vocab);
        let mut draws = arena.indices(Kind::Workspace, rows, DRAW);
        let mut ids = arena.indices(Kind::Workspace, rows, 1);
        device.write_f32(&logits.repeat(rows), x.view_mut())?;
        device.write_u32(of.as_flattened(), draws.view_mut())?;
        device.sample(Args { logits: x.view_mut(), sampling, draws: draws.view(), ids: ids.view_mut() })?;
        let mut found = vec![0; rows];
        device.read_u32(ids.view(), &mut found)?;
        tokens(&found).map(<[u32]>::to_vec)
    }

    fn frequencies(temperature: f64, top_p: f64) -> [f64; 4] {
        let of: Vec<_> = (0..20_000).map(|i| draw(i % 7, i as u32 / 7)).collect();
        let sampling = Sampling { temperature, top_p, seed: 3 };
        let mut counts = [0.0; 4];
        for id in drawn(&Cpu::new(1).unwrap(), &LOGITS, sampling, &of).unwrap() {
            counts[id as usize] += 1.0 / of.len() as f64;
        }
        counts
    }

    #[test]
    fn draws_follow_the_softmax() {
        for temperature in [0.5, 1.0, 2.0] {
            let weights = LOGITS.map(|l| (f64::from(l) / temperature).exp());
            let total: f64 = weights.iter().sum();
            for (drawn, weight) in frequencies(temperature, 1.0).iter().zip(weights) {
                assert!((drawn - weight / total).abs() < 0.015, "{drawn} instead of {}", weight / total);
            }
        }
    }

    /// p = [.087, .644, .237, .032]: 0.8 needs the two likeliest, renormalized.
    #[test]
    fn top_p_keeps_the_smallest_set_that_reaches_it() {
        let drawn = frequencies(1.0, 0.8);
        assert_eq!((drawn[0], drawn[3]), (0.0, 0.0));
        assert!((drawn[1] - 0.731).abs() < 0.015, "{drawn:?}");
        assert!((frequencies(1.0, 0.1)[1] - 1.0).abs() < 1e-9);
    }

    #[test]
    fn ties_go_to_the_smaller_ids() {
        let cpu = Cpu::new(1).unwrap();
        let of: Vec<_> = (0..100).map(|i| draw(i, 0)).collect();
        let half = Sampling { temperature: 1.0, top_p: 0.5, seed: 1 };
        assert!(drawn(&cpu, &[1.0; 4], half, &of).unwrap().into_iter().all(|id| id < 2));
        let greedy = Sampling { temperature: 0.0, ..half };
        assert_eq!(drawn(&cpu, &[-1.0, 0.0, -0.0, 0.0], greedy, &of[..1]).unwrap(), [1]);
    }

    #[test]
    fn the_cpu_chooses_as_exact_numbers_do() {
        let random = Philox::named(1, "logits");
        let logits: Vec<f32> = (0..1003).map(|i| 3.0 * random.normal(i) as f32).collect();
        let of: Vec<_> = (0..500).map(|i| draw(i << 31, i as u32)).collect();
        for (temperature, top_p) in [(0.0, 1.0), (0.7, 1.0), (1.0, 0.9), (1.3, 0.3)] {
            let sampling = Sampling { temperature, top_p, seed: 7 };
            let (found, exact) =
                (drawn(&Cpu::new(2).unwrap(), &logits, sampling, &of), drawn(&Reference, &logits, sampling, &of));
            assert_eq!(found.unwrap(), exact.unwrap(), "{sampling:?}");
        }
    }

    #[test]
    fn bad_logits_are_errors() {
        let cpu = Cpu::new(1).unwrap();
        for (bad, what) in [(f32::NAN, "NaN"), (-f32::NAN, "NaN"), (f32::INFINITY, "infinite")] {
            for temperature in [0.0, 1.0] {
                let sampling = Sampling { temperature, top_p: 1.0, seed: 0 };
                for found in [
                    drawn(&cpu, &[0.0, bad, bad], sampling, &[draw(0, 0)]),
                    drawn(&Reference, &[0.0, bad, bad], sampling, &[draw(0, 0)]),
                ] {
                    let error = found.unwrap_err().to_string();
                    assert!(error.contains(&format!("token 1 in row 0 is {what}")), "{error}");
                }
            }
        }
        let nothing = Sampling { temperature: 1.0, top_p: 0.9, seed: 0 };
        assert_eq!(drawn(&cpu, &[f32::NEG_INFINITY; 3], nothing, &[draw(0, 0)]).unwrap(), [0]);
        assert_eq!(drawn(&cpu, &[f32::NEG_INFINITY, -1e30], nothing, &[draw(0, 0)]).unwrap(), [1]);
    }
}
