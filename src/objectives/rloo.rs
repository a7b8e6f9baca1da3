//! Ahmadian et al., arXiv:2402.14740, Eq. 8: REINFORCE with the other samples of the prompt as the baseline.
//!
//! ```text
//! R'   = clip(R) - beta sum over tokens of ln pi_old - ln pi_ref
//! A    = R' - mean of R' over the others of the group
//! loss = mean over completions of -min(r A, clip(r, 1 - e, 1 + e_high) A),   r = e^(sum over tokens of ln pi - ln pi_old)
//! ```
//!
//! The clipping is TRL's and does nothing while completions are fresh.

use super::advantages::{REWARD_CLIP, leave_one_out, normalize, weighted};
use super::registry::Entry;
use super::surrogate::{EPSILON, EPSILON_HIGH, KL_BETA, KlTerm, Level, Normalizer, Surrogate, in_reward};
use super::{Credit, Needs, Objective, Outcome, Scope, Stats, Totals};
use crate::params::{Domain, ParamSpec};

const NORMALIZE: ParamSpec = ParamSpec {
    name: "normalize_advantages",
    domain: Domain::Switch,
    only_with: None,
    help: "bring the advantages of a batch to a mean of 0 and a standard deviation of 1",
};

pub(super) const ENTRY: Entry = Entry {
    name: "rloo",
    aliases: &[],
    paper: "Ahmadian et al., arXiv:2402.14740, Eq. 8",
    summary: "RLOO: each sample of a prompt against the mean of the others; the KL is part of the reward",
    params: &[KL_BETA, EPSILON, EPSILON_HIGH, REWARD_CLIP, NORMALIZE],
    build: |params| {
        let surrogate = Surrogate {
            level: Level::Sum,
            term: Surrogate::clipped(params),
            normalizer: Normalizer::SequenceMeans,
            kl: KlTerm::NONE,
            off_policy_threshold: f64::INFINITY,
            top_entropy: 1.0,
        };
        let (beta, clip) = (params["beta"], params[REWARD_CLIP.name]);
        Ok(Box::new(Rloo { surrogate, beta, clip, normalize: params.on(NORMALIZE.name) }))
    },
};

struct Rloo {
    surrogate: Surrogate,
    beta: f64,
    clip: f64,
    normalize: bool,
}

impl Objective for Rloo {
    fn name(&self) -> &str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        in_reward(self.beta, self.surrogate.needs())
    }

    fn scope(&self) -> Scope {
        Scope::Pair
    }

    fn credit(&self, rollouts: &Stats) -> Credit {
        let rewards = weighted(&rollouts.rewards, &rollouts.reward_weights);
        let (kl, kl_metric) = rollouts.sequence_kl(self.beta);
        let held = rewards.iter().zip(kl).map(|(reward, kl)| reward.clamp(-self.clip, self.clip) - self.beta * kl);
        let mut advantages = leave_one_out(&held.collect::<Vec<_>>(), &rollouts.groups);
        if self.normalize {
            normalize(&mut advantages);
        }
        Credit { advantages, metrics: kl_metric, ..Credit::default() }
    }

    fn evaluate(&self, stats: &Stats, totals: &Totals) -> Outcome {
        self.surrogate.evaluate(stats, totals, |s, _| stats.advantages[s])
    }
}
