//! GRAO, arXiv:2508.07750, Eq. 3: group relative alignment optimization. Samples a group, compares within it and with the answer
//! that the data has, and learns from both.
//!
//! ```text
//! E_i  = mean over tokens of ln pi of sample i,   I = the same of the answer
//! J    = 1/G sum_i [ c A_i E_i + b A_y I + lambda A_i (E_i - I) ]               loss = -mean over prompts of J
//! A    = (R - mean) / (standard deviation over n + 1e-4)
//! ```
//!
//! b is the paper's beta (`imitation_weight`), c is 1 there (`exploration_weight`, 0 for the ablation). There is no ratio, no
//! clipping and no reference model: the method is on-policy.
//!
//! Whose mean and deviation? Eq. 4 as printed says the samples', the prose says the samples' and the answer's. The second is
//! the default: under the first, A_y grows to 1e4 where all samples are alike, the case that the paper means to mend. Under both the
//! third term adds nothing of its own, since under the second sum_i A_i = -A_y:
//!
//! ```text
//! J    = (c + lambda) mean(A_i E_i) + (b + lambda / G) A_y I      and (c + lambda) mean(A_i E_i) + b A_y I under the first
//! ```
//!
//! Deviation: where the answer loses to its group, J lowers its likelihood without bound; `imitation_cap` bounds the whole
//! coefficient of I. 1e-4 is ours, the paper prints none.

use std::ops::Bound;

use super::advantages::{mean, weighted};
use super::registry::Entry;
use super::{Credit, Grads, Needs, Objective, Outcome, Scope, Stats, Totals};
use crate::params::{Domain, NOT_NEGATIVE, ParamSpec};

/// Beside the standard deviation.
const EPSILON: f64 = 1e-4;

const EXPLORATION: ParamSpec = ParamSpec {
    name: "exploration_weight",
    domain: Domain::Number { default: Some(1.0), range: NOT_NEGATIVE, example: 1.0 },
    only_with: None,
    help: "weight of what is learnt from samples (GRAO)",
};

const IMITATION: ParamSpec = ParamSpec {
    name: "imitation_weight",
    domain: Domain::Number { default: Some(0.5), range: NOT_NEGATIVE, example: 0.5 },
    only_with: None,
    help: "weight of what is learnt from the answer in the data (beta in the GRAO paper)",
};

const LAMBDA: ParamSpec = ParamSpec {
    name: "alignment_weight",
    domain: Domain::Number { default: Some(0.6), range: NOT_NEGATIVE, example: 0.6 },
    only_with: None,
    help: "weight of samples against the answer (lambda in the GRAO paper)",
};

const CAP: ParamSpec = ParamSpec {
    name: "imitation_cap",
    domain: Domain::Number {
        default: Some(f64::INFINITY),
        range: (Bound::Included(0.0), Bound::Included(f64::INFINITY)),
        example: 1.0,
    },
    only_with: None,
    help: "largest size of the answer's coefficient; inf = as large as it comes",
};

const WITHOUT_ANSWER: ParamSpec = ParamSpec {
    name: "group_without_answer",
    domain: Domain::Switch,
    only_with: None,
    help: "compare with the mean of the samples alone (GRAO's Eq. 4 as printed), not of samples and answer",
};

pub(super) const ENTRY: Entry = Entry {
    name: "grao",
    aliases: &[],
    paper: "arXiv:2508.07750, Eq. 3",
    summary: "GRAO: explores by a group of samples, imitates the data's answer where it wins, and compares the two",
    params: &[EXPLORATION, IMITATION, LAMBDA, CAP, WITHOUT_ANSWER],
    build: |params| {
        Ok(Box::new(Grao {
            exploration: params[EXPLORATION.name],
            imitation: params[IMITATION.name],
            alignment: params[LAMBDA.name],
            cap: params[CAP.name],
            without_answer: params.on(WITHOUT_ANSWER.name),
        }))
    },
};

struct Grao {
    exploration: f64,
    imitation: f64,
    alignment: f64,
    cap: f64,
    without_answer: bool,
}

impl Objective for Grao {
    fn name(&self) -> &str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        Needs { groups: true, answers: true, rewards: true, advantages: true, ..Needs::POLICY }
    }

    fn scope(&self) -> Scope {
        Scope::Pair
    }

    fn credit(&self, rollouts: &Stats) -> Credit {
        let rewards = weighted(&rollouts.rewards, &rollouts.reward_weights);
        let mut advantages = vec![0.0; rewards.len()];
        let (mut beaten, mut best) = (0.0, 0.0);
        for (group, &answer) in rollouts.groups.iter().zip(&rollouts.answers) {
            let samples = group.clone().map(|s| rewards[s]);
            let pool: Vec<f64> = samples.clone().chain((!self.without_answer).then_some(rewards[answer])).collect();
            let mean_reward = mean(&pool);
            let known = pool.iter().filter(|x| !x.is_nan()).count() as f64;
            let squares = pool.iter().filter(|x| !x.is_nan()).map(|x| (x - mean_reward).powi(2)).sum::<f64>();
            let scale = (squares / known).sqrt() + EPSILON;
            for s in group.clone().chain([answer]) {
                let advantage = (rewards[s] - mean_reward) / scale;
                advantages[s] = if advantage.is_nan() { 0.0 } else { advantage };
            }
            beaten += f64::from(u8::from(mean(&samples.clone().collect::<Vec<_>>()) > rewards[answer]));
            best += f64::from(u8::from(samples.fold(f64::NEG_INFINITY, f64::max) > rewards[answer]));
        }
        let groups = rollouts.groups.len().max(1) as f64;
        let metrics =
            vec![("answer_beaten/mean".into(), beaten / groups), ("answer_beaten/best".into(), best / groups)];
        Credit { advantages, metrics, ..Credit::default() }
    }

    fn evaluate(&self, stats: &Stats, totals: &Totals) -> Outcome {
        let mut logps = vec![0.0; stats.logps.len()];
        let [mut exploration, mut imitation, mut alignment] = [0.0; 3];
        let mut loss = 0.0;
        let mean_logp = |s: usize| if stats.lens[s] > 0.0 { stats.logps[s] / stats.lens[s] } else { 0.0 };
        for (group, &answer) in stats.groups.iter().zip(&stats.answers) {
            // None, if all were cut and are left out.
            let (samples, a_y) = (group.len().max(1) as f64, stats.advantages[answer]);
            let mean_a = group.clone().map(|s| stats.advantages[s]).sum::<f64>() / samples;
            let coefficient = (self.imitation * a_y - self.alignment * mean_a).clamp(-self.cap, self.cap);
            let add = |s: usize, coefficient: f64, logps: &mut Vec<f64>| {
                logps[s] -= coefficient / (stats.lens[s].max(1.0) * totals.groups);
                coefficient * mean_logp(s) / totals.groups
            };
            for s in group.clone() {
                let a = stats.advantages[s] / samples;
                loss -= add(s, (self.exploration + self.alignment) * a, &mut logps);
                exploration += self.exploration * a * mean_logp(s) / totals.groups;
                alignment += self.alignment * a * (mean_logp(s) - mean_logp(answer)) / totals.groups;
            }
            loss -= add(answer, coefficient, &mut logps);
            imitation += self.imitation * a_y * mean_logp(answer) / totals.groups;
        }
        let metrics = [("exploration", exploration), ("imitation", imitation), ("alignment", alignment)];
        Outcome {
            loss,
            grads: Grads { logps, ..Grads::default() },
            metrics: metrics.map(|(name, value)| (format!("objective/{name}").into(), value)).to_vec(),
            ..Outcome::default()
        }
    }
}
