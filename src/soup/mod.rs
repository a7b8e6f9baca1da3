//! What blends of policies come to: personalized soups (Jang et al., arXiv:2310.11564) and rewarded soups (Rame et al.,
//! arXiv:2306.04488).
//!
//! One policy is trained for each preference, all from one base, and their weights are averaged with any weights on the simplex
//! when they are used. Here is no model: numbers of policies that were measured go in, and what they say of each other comes out.

mod fit;
mod geometry;
mod grid;
mod mixture;
mod paths;
mod report;
mod wins;

use std::collections::BTreeMap;

pub use fit::{Fitted, Interval, fit};
pub use geometry::{Cosines, of_adapters, of_models};
pub use grid::{check, grid, is_even, label, support};
pub use mixture::Mixture;
pub use report::{Declared, Report};
pub use wins::Matrix;

use crate::train::Estimate;

/// What a policy's completions of held-out prompts come to.
#[derive(Clone, Debug)]
pub struct Measured {
    pub name: String,
    /// What made it: policies of one are one series of a figure.
    pub method: String,
    /// Of a blend by the exact average: what each preference's policy counts.
    pub weights: Option<Vec<f64>>,
    /// Completions of each prompt.
    pub samples: usize,
    /// `[preferences][prompts * samples]`, NaN where a reward says nothing.
    pub rewards: Vec<Vec<f64>>,
    /// `[prompts * samples]` nats: ln policy less ln base.
    pub log_ratios: Vec<f64>,
    /// Nats a token of held-out texts.
    pub nll: Option<f64>,
}

/// What a reward finds better of an outcome by name: rewards, `kl`, `nll`.
pub type Outcomes = BTreeMap<String, Mixture>;

impl Measured {
    /// A reward's mean for each prompt; NaN where it says nothing of any of its samples.
    fn by_prompt(&self, preference: usize) -> Vec<f64> {
        let mean = |samples: &[f64]| {
            let said: Vec<f64> = samples.iter().copied().filter(|x| !x.is_nan()).collect();
            said.iter().sum::<f64>() / said.len() as f64
        };
        self.rewards[preference].chunks(self.samples).map(mean).collect()
    }

    /// Mean reward over prompts, and its standard error.
    pub fn reward(&self, preference: usize) -> Estimate {
        known(self.by_prompt(preference).into_iter())
    }

    /// KL(policy || base), nats a completion: k1 of whole sequences, unbiased. Prompts, not completions, are independent.
    pub fn kl(&self) -> Estimate {
        let mean = |ratios: &[f64]| ratios.iter().sum::<f64>() / ratios.len() as f64;
        known(self.log_ratios.chunks(self.samples).map(mean))
    }

    /// A reward of this less the same of a mixture of others, `(weight, policy)`, prompt by prompt.
    fn beyond(&self, others: &[(f64, &Measured)], preference: usize) -> Estimate {
        let theirs: Vec<(f64, Vec<f64>)> = others.iter().map(|(w, other)| (*w, other.by_prompt(preference))).collect();
        let ours = self.by_prompt(preference);
        known((0..ours.len()).map(|p| ours[p] - theirs.iter().map(|(w, of)| w * of[p]).sum::<f64>()))
    }
}

/// Of the numbers that there are.
fn known(values: impl Iterator<Item = f64>) -> Estimate {
    Estimate::of(&values.filter(|x| !x.is_nan()).collect::<Vec<_>>())
}

/// Whether no other has at least as much of everything and more of something. NaN is beaten by all that have none.
pub fn front(points: &[Vec<f64>]) -> Vec<bool> {
    let low = |x: f64| if x.is_nan() { f64::NEG_INFINITY } else { x };
    let beats = |a: &[f64], b: &[f64]| {
        let pairs = || a.iter().zip(b).map(|(a, b)| (low(*a), low(*b)));
        pairs().all(|(a, b)| a >= b) && pairs().any(|(a, b)| a > b)
    };
    points.iter().map(|point| !points.iter().any(|other| beats(other, point))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A policy whose rewards of six prompts, a sample each, go up and down around these means.
    pub fn measured(name: &str, weights: Option<&[f64]>, means: &[f64], nll: f64) -> Measured {
        let around = |mean: &f64| (0..6).map(|p| mean + 0.01 * f64::from(p % 3)).collect();
        Measured {
            name: name.into(),
            method: if weights.is_some() { "soup" } else { name }.into(),
            weights: weights.map(<[f64]>::to_vec),
            samples: 1,
            rewards: means.iter().map(around).collect(),
            log_ratios: vec![0.5; 6],
            nll: Some(nll),
        }
    }

    #[test]
    fn the_front_holds_who_is_not_beaten() {
        let points = [[0.0, 3.0], [1.0, 2.0], [1.0, 1.0], [2.0, 0.0], [f64::NAN, 3.0]].map(|p| p.to_vec());
        assert_eq!(front(&points), [true, true, false, true, false]);
        // Equals do not beat each other.
        assert_eq!(front(&[vec![1.0], vec![1.0]]), [true, true]);
    }

    #[test]
    fn prompts_count_once_whatever_a_reward_leaves_out() {
        let mut arm = measured("a", None, &[0.0], 1.0);
        arm.samples = 2;
        arm.rewards = vec![vec![1.0, 3.0, f64::NAN, 4.0, f64::NAN, f64::NAN]];
        arm.log_ratios = vec![0.0, 1.0, 1.0, 2.0, 2.0, 3.0];
        assert_eq!(arm.reward(0).mean, 3.0);
        assert_eq!(arm.kl().mean, 1.5);
        let other = Measured { rewards: vec![vec![1.0; 6]], ..arm.clone() };
        assert_eq!(arm.beyond(&[(0.5, &other), (0.5, &other)], 0).mean, 2.0);
    }
}
