//! What rewards are worth to the completions that earned them: baselines, scales, and generalised advantage estimation
//! (Schulman et al., arXiv:1506.02438). Rewards that are NaN say nothing.

use std::ops::{Bound, Range};

use crate::params::{Domain, ParamSpec, Params};

/// Beside a standard deviation, as in TRL.
const EPSILON: f64 = 1e-4;

pub(super) const SCALE_REWARDS: ParamSpec = ParamSpec {
    name: "scale_rewards",
    domain: Domain::Choice { values: &["group", "batch", "none"], default: "group" },
    only_with: None,
    help: "whose standard deviation an advantage is divided by: its group's, the whole batch's, or none's",
};

pub(super) const REWARD_AGGREGATION: ParamSpec = ParamSpec {
    name: "reward_aggregation",
    domain: Domain::Choice { values: &["sum_then_normalize", "normalize_then_sum"], default: "sum_then_normalize" },
    only_with: None,
    help: "whether several rewards are added before they are compared within a group, or after (GDPO, arXiv:2601.05242)",
};

/// Off at the default, inf.
pub(super) const REWARD_CLIP: ParamSpec = ParamSpec {
    name: "reward_clip",
    domain: Domain::Number {
        default: Some(f64::INFINITY),
        range: (Bound::Excluded(0.0), Bound::Included(f64::INFINITY)),
        example: 5.0,
    },
    only_with: None,
    help: "rewards are cut to at most this much above or below 0",
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    Group,
    Batch,
    None,
}

/// How completions of one prompt are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByGroup {
    pub scale: Scale,
    /// GDPO: each reward is compared within its group alone, and `scale` is not looked at.
    pub normalize_first: bool,
}

impl ByGroup {
    pub(super) fn of(params: &Params) -> Self {
        let scale = match params.choice("scale_rewards") {
            Some("batch") => Scale::Batch,
            Some("none") => Scale::None,
            _ => Scale::Group,
        };
        Self { scale, normalize_first: params.choice("reward_aggregation") == Some("normalize_then_sum") }
    }

    /// `[S]` advantages of rewards `[R][S]` with weights `[R]`. What has no reward, is alone in having one, or has the
    /// reward of all its group, has an advantage of 0.
    pub fn advantages(&self, rewards: &[Vec<f64>], weights: &[f64], groups: &[Range<usize>]) -> Vec<f64> {
        let advantages = match self.normalize_first {
            false => {
                let total = weighted(rewards, weights);
                match self.scale {
                    Scale::Group => by_group(&total, groups, |group| deviation(group) + EPSILON),
                    Scale::Batch => {
                        let scale = deviation(&total) + EPSILON;
                        by_group(&total, groups, |_| scale)
                    }
                    Scale::None => by_group(&total, groups, |_| 1.0),
                }
            }
            true => {
                let one = |rewards: &Vec<f64>| by_group(rewards, groups, |group| deviation(group) + EPSILON);
                let total = weighted(&rewards.iter().map(one).collect::<Vec<_>>(), weights);
                // A row that no reward speaks about stays without; one that is NaN by its group alone counts as 0.
                let spoken = |s: usize| rewards.iter().any(|of| !of[s].is_nan());
                let total: Vec<f64> =
                    total.iter().enumerate().map(|(s, x)| if x.is_nan() && spoken(s) { 0.0 } else { *x }).collect();
                let (mean, scale) = (mean(&total), deviation(&total) + EPSILON);
                total.iter().map(|x| (x - mean) / scale).collect()
            }
        };
        advantages.iter().map(|x| if x.is_nan() { 0.0 } else { *x }).collect()
    }
}

/// `[S]` sums over rewards; NaN where all are that have a weight: one without is measured, not maximised.
pub fn weighted(rewards: &[Vec<f64>], weights: &[f64]) -> Vec<f64> {
    let sequences = rewards.first().map_or(0, Vec::len);
    let sum = |s: usize| {
        let said = || rewards.iter().zip(weights).filter(|(of, weight)| !of[s].is_nan() && **weight != 0.0);
        if said().next().is_none() { f64::NAN } else { said().map(|(of, weight)| weight * of[s]).sum() }
    };
    (0..sequences).map(sum).collect()
}

fn by_group(rewards: &[f64], groups: &[Range<usize>], scale: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    let mut advantages = vec![f64::NAN; rewards.len()];
    for group in groups {
        let members = &rewards[group.clone()];
        let (mean, scale) = (mean(members), scale(members));
        advantages[group.clone()].iter_mut().zip(members).for_each(|(out, reward)| *out = (reward - mean) / scale);
    }
    advantages
}

/// What a prompt could be worth at best, softly: beta ln mean e^(reward / beta) over completions of the reference (Brantley et al.,
/// arXiv:2505.20686). NaN where no reward says anything.
pub fn optimal_value(rewards: &[f64], beta: f64) -> f64 {
    let known = || rewards.iter().filter(|reward| !reward.is_nan());
    let best = known().fold(f64::NAN, |best, reward| best.max(*reward));
    let mean = known().map(|reward| ((reward - best) / beta).exp()).sum::<f64>() / known().count() as f64;
    best + beta * mean.ln()
}

/// `[S]` a reward less the mean of the others of its group (Kool et al. 2019; RLOO). 0 where there are no others.
pub fn leave_one_out(rewards: &[f64], groups: &[Range<usize>]) -> Vec<f64> {
    let mut advantages = vec![0.0; rewards.len()];
    for group in groups {
        let known = rewards[group.clone()].iter().filter(|reward| !reward.is_nan());
        let (sum, count) = known.fold((0.0, 0.0), |(sum, count), reward| (sum + reward, count + 1.0));
        for s in group.clone().filter(|s| count > 1.0 && !rewards[*s].is_nan()) {
            advantages[s] = rewards[s] - (sum - rewards[s]) / (count - 1.0);
        }
    }
    advantages
}

/// `A_t = delta_t + gamma lambda A_t+1` with `delta_t = r_t + gamma V_t+1 - V_t`, of one completion, after whose end all is 0.
pub fn generalised(rewards: &[f64], values: &[f64], gamma: f64, lambda: f64) -> Vec<f64> {
    let mut advantages = vec![0.0; rewards.len()];
    let (mut next_value, mut next) = (0.0, 0.0);
    for t in (0..rewards.len()).rev() {
        next = rewards[t] + gamma * next_value - values[t] + gamma * lambda * next;
        (advantages[t], next_value) = (next, values[t]);
    }
    advantages
}

/// To a variance of 1 and, unless `keep_mean`, a mean of 0.
pub fn whiten(values: &mut [f64], keep_mean: bool) {
    if values.len() < 2 {
        return;
    }
    let (mean, variance) = (mean(values), deviation(values).powi(2));
    let back = if keep_mean { mean } else { 0.0 };
    values.iter_mut().for_each(|x| *x = (*x - mean) / (variance + 1e-8).sqrt() + back);
}

/// `(x - mean) / (standard deviation + 1e-4)`, as TRL normalizes advantages.
pub(super) fn normalize(values: &mut [f64]) {
    let (mean, scale) = (mean(values), deviation(values) + EPSILON);
    if !scale.is_nan() {
        values.iter_mut().for_each(|x| *x = (*x - mean) / scale);
    }
}

/// Of what is not NaN.
pub(super) fn mean(values: &[f64]) -> f64 {
    let known = values.iter().filter(|x| !x.is_nan());
    let (sum, count) = known.fold((0.0, 0.0), |(sum, count), x| (sum + x, count + 1.0));
    sum / count
}

/// The sample's standard deviation (over n - 1) of what is not NaN; NaN of fewer than two.
pub fn deviation(values: &[f64]) -> f64 {
    let mean = mean(values);
    let known = values.iter().filter(|x| !x.is_nan());
    let (sum, count) = known.fold((0.0, 0.0), |(sum, count), x| (sum + (x - mean).powi(2), count + 1.0));
    if count > 1.0 { (sum / (count - 1.0)).sqrt() } else { f64::NAN }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_of_equals_and_one_that_is_alone_learn_nothing() {
        let groups = [0..3, 3..4, 4..6];
        let rewards = [1.0, 1.0, 1.0, 5.0, f64::NAN, 2.0];
        for scale in [Scale::Group, Scale::Batch, Scale::None] {
            let by_group = ByGroup { scale, normalize_first: false };
            assert_eq!(by_group.advantages(&[rewards.to_vec()], &[1.0], &groups), [0.0; 6], "{scale:?}");
        }
        assert_eq!(leave_one_out(&rewards, &groups), [0.0; 6]);
        assert_eq!(leave_one_out(&[1.0, 3.0, 2.0], &[0..2, 2..3]), [-2.0, 2.0, 0.0]);
    }

    /// With lambda 1 and gamma 1 an advantage is what is still to come, less the value.
    #[test]
    fn at_lambda_one_advantages_are_returns_less_values() {
        let (rewards, values) = ([1.0, -2.0, 4.0], [0.5, 0.25, -1.0]);
        assert_eq!(generalised(&rewards, &values, 1.0, 1.0), [2.5, 1.75, 5.0]);
        assert_eq!(generalised(&rewards, &values, 1.0, 0.0), [0.75, -3.25, 5.0]);
        let mut some = [1.0, 2.0, 3.0];
        whiten(&mut some, true);
        assert!((mean(&some) - 2.0).abs() < 1e-12 && (deviation(&some) - 1.0).abs() < 1e-7);
        let mut one = [7.0];
        whiten(&mut one, false);
        assert_eq!(one, [7.0]);
    }
}
