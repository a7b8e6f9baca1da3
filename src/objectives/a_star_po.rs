//! Brantley et al., arXiv:2505.20686, Algorithm 1: regression on the optimal advantage, A*-PO.
//!
//! ```text
//! V*(x) = b1 ln(mean over the reference's completions of x of e^(R / b1))       once, before the first step
//! A     = R - V*(x)
//! loss  = mean over completions of (beta (ln pi(y) - ln pi_ref(y)) - A)^2
//! ```
//!
//! Defaults are those of TRL 1.16 (A2POTrainer): b1 = 0.5, 8 completions, beta (its beta2) 1e-3. A prompt of which no completion of the
//! reference is worth anything teaches nothing, unless told otherwise; TRL drops it from the data before it forms batches, here its
//! batch is smaller. Deviation: one completion of the policy for each prompt in the paper, as many as asked for here.

use super::advantages::{optimal_value, weighted};
use super::registry::{BETA, Entry};
use super::{Credit, Grads, Needs, Objective, Outcome, Scope, Stats, Totals};
use crate::params::{Domain, POSITIVE, ParamSpec};

/// The paper's beta2.
const WEAK_BETA: ParamSpec =
    ParamSpec { domain: Domain::Number { default: Some(1e-3), range: POSITIVE, example: 1e-3 }, ..BETA };

const VALUE_BETA: ParamSpec = ParamSpec {
    name: "value_beta",
    domain: Domain::Number { default: Some(0.5), range: POSITIVE, example: 0.5 },
    only_with: None,
    help: "softness of the maximum that a prompt's optimal value is, in units of reward: 0 = the best of the reference's completions",
};

const VALUE_SAMPLES: ParamSpec = ParamSpec {
    name: "value_samples",
    domain: Domain::Count { default: 8, example: 4 },
    only_with: None,
    help: "completions of each prompt that the reference writes before the first step, for the prompt's optimal value",
};

const KEEP_HOPELESS: ParamSpec = ParamSpec {
    name: "keep_hopeless",
    domain: Domain::Switch,
    only_with: None,
    help: "learn from prompts too of which every completion of the reference is worth 0",
};

pub(super) const ENTRY: Entry = Entry {
    name: "a_star_po",
    aliases: &["a2po"],
    paper: "Brantley et al., arXiv:2505.20686, Algorithm 1",
    summary: "A*-PO: log-ratios are fitted to rewards less what the prompt could be worth at best, known from the reference",
    params: &[WEAK_BETA, VALUE_BETA, VALUE_SAMPLES, KEEP_HOPELESS],
    build: |params| {
        Ok(Box::new(AStarPo {
            beta: params["beta"],
            value_beta: params[VALUE_BETA.name],
            samples: params[VALUE_SAMPLES.name] as usize,
            keep_hopeless: params.on(KEEP_HOPELESS.name),
        }))
    },
};

struct AStarPo {
    beta: f64,
    value_beta: f64,
    samples: usize,
    keep_hopeless: bool,
}

impl Objective for AStarPo {
    fn name(&self) -> &str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        Needs {
            refs: 1..=1,
            groups: true,
            rewards: true,
            advantages: true,
            prior_rewards: self.samples,
            ..Needs::POLICY
        }
    }

    fn scope(&self) -> Scope {
        Scope::Pair
    }

    fn credit(&self, rollouts: &Stats) -> Credit {
        let rewards = weighted(&rollouts.rewards, &rollouts.reward_weights);
        let (mut advantages, mut values, mut hopeless) = (vec![f64::NAN; rewards.len()], 0.0, 0.0);
        for (group, prior) in rollouts.groups.iter().zip(&rollouts.prior_rewards) {
            let value = optimal_value(prior, self.value_beta);
            values += if value.is_nan() { 0.0 } else { value };
            if value.is_nan() || prior.iter().all(|reward| *reward == 0.0) && !self.keep_hopeless {
                hopeless += 1.0;
                continue;
            }
            group.clone().for_each(|s| advantages[s] = rewards[s] - value);
        }
        let groups = rollouts.groups.len().max(1) as f64;
        let metrics = vec![("optimal_value".into(), values / groups), ("frac_hopeless".into(), hopeless / groups)];
        Credit { advantages, metrics, ..Credit::default() }
    }

    /// What has no advantage teaches nothing.
    fn evaluate(&self, stats: &Stats, totals: &Totals) -> Outcome {
        let mut logps = vec![0.0; stats.logps.len()];
        let (mut loss, mut implicit) = (0.0, 0.0);
        for s in (0..stats.logps.len()).filter(|s| !stats.advantages[*s].is_nan()) {
            let reward = self.beta * (stats.logps[s] - stats.ref_logps[0][s]);
            let error = reward - stats.advantages[s];
            loss += error * error / totals.sequences;
            logps[s] = 2.0 * self.beta * error / totals.sequences;
            implicit += reward / totals.sequences;
        }
        let metrics = vec![("rewards/implicit".into(), implicit)];
        Outcome { loss, grads: Grads { logps, ..Grads::default() }, metrics, ..Outcome::default() }
    }
}
