//! Wu and Echarghaoui, arXiv:2512.10040: weights of several references that do not look at the pairs they weight.
//!
//! MRPO's own weights (ARWC, [`super::mrpo::Weighting::Arwc`]) come from the pair that is then trained on: labels leak.
//! Here a weight comes from a validation set before training, or from the pairs of earlier steps:
//!
//! ```text
//! validation discrimination   w_k ~ mean over the validation set of |r_k(y_w) - r_k(y_l)|
//! validation accuracy         w_k ~ share of the validation set with r_k(y_w) > r_k(y_l), a tie is half
//! sliding window              w_k ~ mean over the last N pairs of earlier steps of |r_k(y_w) - r_k(y_l)|
//! Thompson sampling           w_k ~ a draw from Beta(1 + wins_k, 1 + losses_k), counted over earlier steps
//! ```
//!
//! `~`: divided by the sum over the references; where all are 0, as before the first step, weights are equal.
//!
//! The authors report that all four are better than ARWC and that a single reference, 6 times of 7, is better than
//! any blend they tried: compare with one before using several.
//!
//! Our reading, where the paper's text was out of reach: that the window counts pairs and not steps, and that a
//! Thompson step weighs references by one draw each instead of giving all to the largest. Every reference's verdict
//! on every pair is known here, so the bandit learns of all arms, not only of those it pulled.
//!
//! Weights are a function of the rule and of what was observed, in order: replay the observations and they are what
//! they were, so nothing is saved.

use std::collections::VecDeque;
use std::f64::consts::TAU;

use super::mrpo::wins;
use crate::error::{Error, Result};

#[derive(Clone, Debug, Default, PartialEq)]
pub enum Rule {
    /// As given: one for each reference, >= 0, sum 1.
    Fixed(Vec<f64>),
    #[default]
    Uniform,
    ValidationDiscrimination,
    ValidationAccuracy,
    /// `pairs`: how many of the latest are remembered, >= 1.
    SlidingWindow {
        pairs: usize,
    },
    Thompson {
        seed: u64,
    },
}

impl Rule {
    /// Whether [`RefWeights::new`] needs the references' log-probs of a validation set.
    pub fn reads_validation(&self) -> bool {
        matches!(self, Self::ValidationDiscrimination | Self::ValidationAccuracy)
    }

    /// Whether the pairs of earlier steps decide.
    pub fn observes(&self) -> bool {
        matches!(self, Self::SlidingWindow { .. } | Self::Thompson { .. })
    }
}

/// Per reference, (chosen, rejected) log-probs of the same pairs in the same order, nats.
pub type RefPairs = [Vec<(f64, f64)>];

/// The weights of K references, step by step.
pub struct RefWeights {
    rule: Rule,
    references: usize,
    /// `[K]` what the rule found before training; only of rules that read a validation set.
    validation: Vec<f64>,
    /// `[pairs][K]` |gap| of the latest pairs.
    window: VecDeque<Vec<f64>>,
    /// `[K]` pairs that each reference orders as the data does.
    wins: Vec<f64>,
    /// Pairs and steps observed.
    pairs: f64,
    steps: u64,
}

impl RefWeights {
    /// `validation` is read by the rules that [need it](Rule::reads_validation).
    ///
    /// Fails on weights that are negative, not finite, of another number than `references` or do not sum to 1, on an
    /// empty window and on a validation set that is missing or has no pair.
    pub fn new(rule: Rule, references: usize, validation: Option<&RefPairs>) -> Result<Self> {
        match &rule {
            Rule::Fixed(weights) => check_weights(weights, references)?,
            Rule::SlidingWindow { pairs: 0 } => {
                let detail = "a window of 0 pairs sees nothing; for example `sliding-window:1024`";
                return Err(Error::option("--ref-weights", detail));
            }
            _ => {}
        }
        let mut known = Vec::new();
        if rule.reads_validation() {
            let sets = validation.unwrap_or_default();
            if sets.iter().all(Vec::is_empty) {
                let detail = "the rule reads a validation set of pairs, there is none; give --eval-dataset, or choose \
                              `sliding-window:1024`, which learns from the pairs of earlier steps";
                return Err(Error::option("--ref-weights", detail));
            }
            assert_eq!(sets.len(), references, "log-probs of every reference");
            let score = if rule == Rule::ValidationAccuracy { wins } else { f64::abs };
            known = sets.iter().map(|pairs| gaps(pairs).map(score).sum::<f64>()).collect();
        }
        Ok(Self {
            rule,
            references,
            validation: known,
            window: VecDeque::new(),
            wins: vec![0.0; references],
            pairs: 0.0,
            steps: 0,
        })
    }

    /// `[K]` weights of the coming step, >= 0, sum 1.
    pub fn weights(&self) -> Vec<f64> {
        let raw = match &self.rule {
            Rule::Fixed(weights) => weights.clone(),
            Rule::Uniform => vec![1.0; self.references],
            Rule::ValidationDiscrimination | Rule::ValidationAccuracy => self.validation.clone(),
            Rule::SlidingWindow { .. } => {
                (0..self.references).map(|k| self.window.iter().map(|gaps| gaps[k]).sum()).collect()
            }
            Rule::Thompson { seed } => (0..self.references)
                .map(|k| Draws::new(*seed, self.steps, k).beta(1.0 + self.wins[k], 1.0 + self.pairs - self.wins[k]))
                .collect(),
        };
        normalised(raw)
    }

    /// The pairs that a step was trained on, after it.
    pub fn observe(&mut self, pairs: &RefPairs) {
        assert_eq!(pairs.len(), self.references, "log-probs of every reference");
        self.steps += 1;
        for i in 0..pairs.first().map_or(0, Vec::len) {
            let gaps = pairs.iter().map(|pairs| pairs[i].0 - pairs[i].1);
            gaps.clone().zip(&mut self.wins).for_each(|(gap, won)| *won += wins(gap));
            self.pairs += 1.0;
            if let Rule::SlidingWindow { pairs: remembered } = self.rule {
                self.window.push_back(gaps.map(f64::abs).collect());
                if self.window.len() > remembered {
                    self.window.pop_front();
                }
            }
        }
    }
}

/// Weights of references as a user gave them.
pub(super) fn check_weights(weights: &[f64], references: usize) -> Result<()> {
    let listed = |weights: &[f64]| weights.iter().map(f64::to_string).collect::<Vec<_>>().join(" ");
    if weights.len() != references {
        let detail = format!("expected one for each of {references} references, got {}", weights.len());
        return Err(Error::option("--ref-weights", detail));
    }
    if let Some(bad) = weights.iter().find(|weight| !(weight.is_finite() && **weight >= 0.0)) {
        return Err(Error::option("--ref-weights", format!("expected numbers of 0 or more, got {bad}")));
    }
    let sum: f64 = weights.iter().sum();
    if (sum - 1.0).abs() > 1e-6 {
        let example = if sum > 0.0 { normalised(weights.to_vec()) } else { normalised(vec![1.0; references]) };
        let detail = format!("{} sums to {sum}, not to 1; for example `{}`", listed(weights), listed(&example));
        return Err(Error::option("--ref-weights", detail));
    }
    Ok(())
}

fn gaps(pairs: &[(f64, f64)]) -> impl Iterator<Item = f64> {
    pairs.iter().map(|(chosen, rejected)| chosen - rejected)
}

fn normalised(raw: Vec<f64>) -> Vec<f64> {
    let sum: f64 = raw.iter().sum();
    let equal = 1.0 / raw.len() as f64;
    raw.iter().map(|x| if sum > 0.0 { x / sum } else { equal }).collect()
}

/// Random numbers of one reference in one step: SplitMix64 (Steele et al., 2014) on a key of the three.
struct Draws(u64);

impl Draws {
    fn new(seed: u64, step: u64, reference: usize) -> Self {
        let absorb = |key: u64, next: u64| mix(key.wrapping_add(GAMMA) ^ mix(next.wrapping_add(GAMMA)));
        let key = [seed, step, reference as u64].into_iter().fold(0, absorb);
        Self(key)
    }

    /// Uniform in (0, 1).
    fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(GAMMA);
        ((mix(self.0) >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    /// Standard normal (Box and Muller, 1958).
    fn normal(&mut self) -> f64 {
        let radius = (-2.0 * self.unit().ln()).sqrt();
        radius * (TAU * self.unit()).cos()
    }

    /// Gamma of this shape, >= 1, and scale 1 (Marsaglia and Tsang, 2000).
    fn gamma(&mut self, shape: f64) -> f64 {
        let d = shape - 1.0 / 3.0;
        loop {
            let x = self.normal();
            let v = (1.0 + x / (9.0 * d).sqrt()).powi(3);
            if v > 0.0 && self.unit().ln() < 0.5 * x * x + d - d * v + d * v.ln() {
                return d * v;
            }
        }
    }

    fn beta(&mut self, a: f64, b: f64) -> f64 {
        let (x, y) = (self.gamma(a), self.gamma(b));
        x / (x + y)
    }
}

/// The step of SplitMix64: 2^64 by the golden ratio, odd.
const GAMMA: u64 = 0x9E37_79B9_7F4A_7C15;

/// The finalizer of SplitMix64: every bit of the input reaches every bit of the output.
fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beta_draws_have_its_mean_and_variance() {
        for (a, b) in [(1.0, 1.0), (1.0, 30.0), (40.5, 7.5)] {
            let draws: Vec<f64> = (0..20_000).map(|step| Draws::new(3, step, 1).beta(a, b)).collect();
            let mean = draws.iter().sum::<f64>() / draws.len() as f64;
            let variance = draws.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / draws.len() as f64;
            let (expected, spread) = (a / (a + b), a * b / ((a + b).powi(2) * (a + b + 1.0)));
            assert!((mean - expected).abs() < 5.0 * (spread / draws.len() as f64).sqrt(), "{a} {b}: {mean}");
            assert!((variance / spread - 1.0).abs() < 0.1, "{a} {b}: {variance}");
        }
    }

    #[test]
    fn draws_differ_by_seed_step_and_reference() {
        let first = |seed, step, reference| Draws::new(seed, step, reference).unit();
        let all = [first(0, 0, 0), first(1, 0, 0), first(0, 1, 0), first(0, 0, 1), first(1, 1, 0), first(1, 0, 1)];
        for (i, x) in all.iter().enumerate() {
            assert!(all[..i].iter().all(|y| x != y), "{all:?}");
        }
        assert_eq!(first(5, 6, 7), first(5, 6, 7));
    }
}
