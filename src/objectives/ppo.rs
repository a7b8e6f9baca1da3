//! Schulman et al., arXiv:1707.06347, Eq. 7 and 9, as Ziegler et al., arXiv:1909.08593, use it on language models: proximal policy
//! optimization with a value head.
//!
//! ```text
//! r_t  = -beta KL_t(pi_old, pi_ref), and the reward on top at the last token
//! A_t  = generalised advantages of r_t and the values before the update, brought to mean 0 and variance 1
//! loss = mean over all tokens of -min(r A, clip(r, 1 - e, 1 + e_high) A)
//!        + c mean over all tokens of max((V - ret)^2, (clip(V, V_old - e_V, V_old + e_V) - ret)^2) / 2,   ret = A_raw + V_old
//! ```
//!
//! beta may follow a target (`kl_target`, Ziegler et al. section 2.2): after each batch of n completions
//! `beta *= 1 + clip(KL / target - 1, -0.2, 0.2) n / horizon`. Deviations from TRL's: the reward stands at the last token, where TRL
//! puts it one after if there is room; no value is learnt beyond the completion.

use std::ops::Bound;

use super::advantages::{generalised, weighted, whiten};
use super::kl::{adapted, k1, k3};
use super::registry::Entry;
use super::surrogate::{EPSILON, EPSILON_HIGH, KL_BETA, KlTerm, Level, Normalizer, Surrogate, cut, in_reward};
use super::{Credit, Metric, Needs, Objective, Outcome, Scope, Stats, Totals};
use crate::params::{Domain, NOT_NEGATIVE, POSITIVE, ParamSpec};

const UNIT: (Bound<f64>, Bound<f64>) = (Bound::Included(0.0), Bound::Included(1.0));

const GAMMA: ParamSpec = ParamSpec {
    name: "gamma",
    domain: Domain::Number { default: Some(1.0), range: UNIT, example: 0.99 },
    only_with: None,
    help: "how much a reward counts one token earlier",
};

const LAMBDA: ParamSpec = ParamSpec {
    name: "gae_lambda",
    domain: Domain::Number { default: Some(0.95), range: UNIT, example: 0.95 },
    only_with: None,
    help: "how far advantages trust rewards (1) rather than values (0)",
};

const VALUE_COEF: ParamSpec = ParamSpec {
    name: "value_coef",
    domain: Domain::Number { default: Some(0.1), range: NOT_NEGATIVE, example: 0.1 },
    only_with: None,
    help: "weight of the value head's loss",
};

const VALUE_CLIP: ParamSpec = ParamSpec {
    name: "value_clip",
    domain: Domain::Number { default: Some(0.2), range: POSITIVE, example: 0.2 },
    only_with: None,
    help: "how far a value may move from what it was when the completions were sampled",
};

const REWARD_KL: ParamSpec = ParamSpec {
    name: "reward_kl",
    domain: Domain::Choice { values: &["k1", "k3"], default: "k1" },
    only_with: None,
    help: "Schulman's estimator of the KL that is taken from the reward",
};

const WHITEN_REWARDS: ParamSpec = ParamSpec {
    name: "whiten_rewards",
    domain: Domain::Switch,
    only_with: None,
    help: "bring the rewards of all tokens of a batch to a variance of 1 before advantages are made",
};

const KL_TARGET: ParamSpec = ParamSpec {
    name: "kl_target",
    domain: Domain::Number {
        default: Some(f64::INFINITY),
        range: (Bound::Excluded(0.0), Bound::Included(f64::INFINITY)),
        example: 6.0,
    },
    only_with: None,
    help: "KL in nats a completion that beta is raised and lowered to keep; inf = beta stays",
};

const KL_HORIZON: ParamSpec = ParamSpec {
    name: "kl_horizon",
    domain: Domain::Number { default: Some(10000.0), range: POSITIVE, example: 10000.0 },
    only_with: None,
    help: "completions over which beta may grow or shrink by a fifth",
};

pub(super) const ENTRY: Entry = Entry {
    name: "ppo",
    aliases: &[],
    paper: "Schulman et al., arXiv:1707.06347, Eq. 9; Ziegler et al., arXiv:1909.08593",
    summary: "PPO: clipped ratios, a value head for advantages by token, the KL as a part of the reward",
    params: &[
        KL_BETA,
        EPSILON,
        EPSILON_HIGH,
        GAMMA,
        LAMBDA,
        VALUE_COEF,
        VALUE_CLIP,
        REWARD_KL,
        WHITEN_REWARDS,
        KL_TARGET,
        KL_HORIZON,
    ],
    build: |params| {
        let surrogate = Surrogate {
            level: Level::Token,
            term: Surrogate::clipped(params),
            normalizer: Normalizer::Tokens,
            kl: KlTerm::NONE,
            off_policy_threshold: f64::INFINITY,
            top_entropy: 1.0,
        };
        Ok(Box::new(Ppo {
            surrogate,
            beta: params["beta"],
            k3: params.choice(REWARD_KL.name) == Some("k3"),
            gamma: params["gamma"],
            lambda: params["gae_lambda"],
            value_coef: params["value_coef"],
            value_clip: params["value_clip"],
            whiten_rewards: params.on(WHITEN_REWARDS.name),
            target: params["kl_target"],
            horizon: params["kl_horizon"],
        }))
    },
};

struct Ppo {
    surrogate: Surrogate,
    beta: f64,
    k3: bool,
    gamma: f64,
    lambda: f64,
    value_coef: f64,
    value_clip: f64,
    whiten_rewards: bool,
    /// Nats a completion; inf = beta stays.
    target: f64,
    /// Completions.
    horizon: f64,
}

impl Ppo {
    fn adapts(&self) -> bool {
        self.beta > 0.0 && self.target.is_finite()
    }

    /// `[T]` nats, and their mean over completions.
    fn kl(&self, rollouts: &Stats) -> (Vec<f64>, f64) {
        if self.beta == 0.0 {
            return (vec![0.0; rollouts.old_token_logps.len()], 0.0);
        }
        let of = |(old, reference): (&f64, &f64)| {
            let near = cut(old - reference).0;
            if self.k3 { k3(near, 0.0).0 } else { k1(near, 0.0).0 }
        };
        let kl: Vec<f64> = rollouts.old_token_logps.iter().zip(&rollouts.ref_token_logps[0]).map(of).collect();
        let mean = kl.iter().sum::<f64>() / (rollouts.lens.len() as f64).max(1.0);
        (kl, mean)
    }

    fn value_loss(&self, stats: &Stats, totals: &Totals) -> (f64, Vec<f64>, f64) {
        let (mut loss, mut clipped) = (0.0, 0.0);
        let grads = (0..stats.values.len()).map(|t| {
            let (value, old, wanted) = (stats.values[t], stats.old_values[t], stats.returns[t]);
            let near = value.clamp(old - self.value_clip, old + self.value_clip);
            let inside = f64::from(u8::from((value - old).abs() <= self.value_clip));
            let (free, held) = ((value - wanted).powi(2), (near - wanted).powi(2));
            let share = if free == held { 0.5 } else { f64::from(u8::from(free > held)) };
            loss += 0.5 * free.max(held) / totals.completion_tokens;
            clipped += f64::from(u8::from(held > free)) / totals.completion_tokens;
            (share * (value - wanted) + (1.0 - share) * (near - wanted) * inside) / totals.completion_tokens
        });
        let grads = grads.collect();
        (loss, grads, clipped)
    }
}

impl Objective for Ppo {
    fn name(&self) -> &str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        let needs = in_reward(self.beta, self.surrogate.needs());
        Needs { advantages: false, token_advantages: true, values: true, ..needs }
    }

    fn scope(&self) -> Scope {
        Scope::Pair
    }

    /// beta, where it follows a target.
    fn initial_state(&self) -> Vec<f64> {
        if self.adapts() { vec![self.beta] } else { Vec::new() }
    }

    fn credit(&self, rollouts: &Stats) -> Credit {
        let beta = rollouts.state.first().copied().unwrap_or(self.beta);
        let (kl, mean_kl) = self.kl(rollouts);
        let mut rewards: Vec<f64> = kl.iter().map(|kl| -beta * kl).collect();
        for (s, reward) in weighted(&rollouts.rewards, &rollouts.reward_weights).into_iter().enumerate() {
            let tokens = &mut rewards[rollouts.offsets[s]..rollouts.offsets[s + 1]];
            // A completion of which no reward says anything teaches nothing, and counts in no mean.
            if reward.is_nan() {
                tokens.fill(f64::NAN);
            }
            if let Some(last) = tokens.last_mut() {
                *last += reward;
            }
        }
        if self.whiten_rewards {
            whiten(&mut rewards, true);
        }
        let of_sequence = |ends: &[usize]| {
            let tokens = ends[0]..ends[1];
            generalised(&rewards[tokens.clone()], &rollouts.values[tokens], self.gamma, self.lambda)
        };
        let mut token_advantages: Vec<f64> = rollouts.offsets.windows(2).flat_map(of_sequence).collect();
        let or_nothing = |x: f64| if x.is_nan() { 0.0 } else { x };
        let returns = token_advantages.iter().zip(&rollouts.values).map(|(a, value)| or_nothing(*a) + value).collect();
        whiten(&mut token_advantages, false);
        token_advantages.iter_mut().for_each(|a| *a = or_nothing(*a));
        let mut metrics: Vec<Metric> = Vec::new();
        let mut state = Vec::new();
        if self.beta > 0.0 {
            metrics.extend([("kl".into(), mean_kl), ("beta".into(), beta)]);
        }
        if self.adapts() {
            state = vec![adapted(beta, mean_kl, self.target, rollouts.lens.len() as f64, self.horizon)];
        }
        Credit { token_advantages, returns, metrics, state, ..Credit::default() }
    }

    fn evaluate(&self, stats: &Stats, totals: &Totals) -> Outcome {
        let mut outcome = self.surrogate.evaluate(stats, totals, |_, t| stats.token_advantages[t]);
        let (loss, grads, clipped) = self.value_loss(stats, totals);
        outcome.metrics.push(("loss/policy".into(), outcome.loss));
        outcome.metrics.push(("loss/value".into(), loss));
        outcome.metrics.push(("clip_ratio/value_mean".into(), clipped));
        outcome.loss += self.value_coef * loss;
        outcome.grads.values = grads.iter().map(|grad: &f64| self.value_coef * grad).collect();
        outcome
    }
}
