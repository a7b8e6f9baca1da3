//! Williams 1992: REINFORCE, with a choice of baselines.
//!
//! ```text
//! R'   = clip(R) - beta sum over tokens of ln pi_old - ln pi_ref
//! A    = R' - baseline: 0, the mean of the batch, of the group, or of the others of the group
//! loss = mean over completions of -A ln pi(completion)
//! ```
//!
//! There is no ratio: completions are taken to be the policy's own, so more than one update on them is not REINFORCE.

use super::advantages::{REWARD_CLIP, leave_one_out, mean, weighted};
use super::registry::Entry;
use super::surrogate::{KL_BETA, KlTerm, Level, Normalizer, Surrogate, Term, in_reward};
use super::{Credit, Needs, Objective, Outcome, Scope, Stats, Totals};
use crate::params::{Domain, ParamSpec};

const BASELINE: ParamSpec = ParamSpec {
    name: "baseline",
    domain: Domain::Choice { values: &["leave_one_out", "group", "batch", "none"], default: "leave_one_out" },
    only_with: None,
    help: "what a reward is compared with: the mean of the group's others, of the group, of the batch, or nothing",
};

pub(super) const ENTRY: Entry = Entry {
    name: "reinforce",
    aliases: &[],
    paper: "Williams, Machine Learning 8 (1992), Eq. 1",
    summary: "REINFORCE: log-probs times reward less a baseline, on the policy's own completions",
    params: &[KL_BETA, BASELINE, REWARD_CLIP],
    build: |params| {
        let surrogate = Surrogate {
            level: Level::Token,
            term: Term::Score,
            normalizer: Normalizer::SequenceSums,
            kl: KlTerm::NONE,
            off_policy_threshold: f64::INFINITY,
            top_entropy: 1.0,
        };
        let baseline = match params.choice(BASELINE.name) {
            Some("group") => Baseline::Group,
            Some("batch") => Baseline::Batch,
            Some("none") => Baseline::None,
            _ => Baseline::Others,
        };
        Ok(Box::new(Reinforce { surrogate, beta: params["beta"], clip: params[REWARD_CLIP.name], baseline }))
    },
};

#[derive(Clone, Copy)]
enum Baseline {
    Others,
    Group,
    Batch,
    None,
}

struct Reinforce {
    surrogate: Surrogate,
    beta: f64,
    clip: f64,
    baseline: Baseline,
}

impl Objective for Reinforce {
    fn name(&self) -> &str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        let needs = in_reward(self.beta, self.surrogate.needs());
        // The KL in the reward is of the policy that sampled.
        Needs { old_token_logps: self.beta > 0.0, ..needs }
    }

    fn scope(&self) -> Scope {
        Scope::Pair
    }

    fn credit(&self, rollouts: &Stats) -> Credit {
        let rewards = weighted(&rollouts.rewards, &rollouts.reward_weights);
        let (kl, metrics) = rollouts.sequence_kl(self.beta);
        let held = rewards.iter().zip(kl).map(|(reward, kl)| reward.clamp(-self.clip, self.clip) - self.beta * kl);
        let held: Vec<f64> = held.collect();
        let mut advantages = match self.baseline {
            Baseline::Others => leave_one_out(&held, &rollouts.groups),
            Baseline::Batch => held.iter().map(|reward| reward - mean(&held)).collect(),
            Baseline::None => held,
            Baseline::Group => {
                let of = |group: &std::ops::Range<usize>| {
                    let members = held[group.clone()].to_vec();
                    let mean = mean(&members);
                    members.into_iter().map(move |reward| reward - mean).collect::<Vec<_>>()
                };
                rollouts.groups.iter().flat_map(of).collect()
            }
        };
        advantages.iter_mut().filter(|a| a.is_nan()).for_each(|a| *a = 0.0);
        Credit { advantages, metrics, ..Credit::default() }
    }

    fn evaluate(&self, stats: &Stats, totals: &Totals) -> Outcome {
        self.surrogate.evaluate(stats, totals, |s, _| stats.advantages[s])
    }
}
