//! Jung et al., arXiv:2404.04656: binary classifier optimization.
//!
//! ```text
//! r        = beta (ln pi - ln pi_ref)
//! delta    = the mean of all rewards r so far, this batch's included, a constant
//! bco      = -ln sigma(r - delta) of a desirable, -ln sigma(delta - r) of an undesirable completion
//!                                                                         mean over all completions
//! bco_pair = -ln sigma(rw - delta) - ln sigma(delta - rl)                 mean over pairs
//! ```
//!
//! In `bco_pair` delta is 0, as in TRL today, unless `running_delta` switches it on, as in the paper. The running mean is what
//! these objectives remember from step to step; a resumed run has it, evaluation leaves it alone.
//!
//! Deviations: the paper's delta is a moving average, this is the mean over the run, as in TRL 0.x to 1.10. Left out: the
//! weights of undesirable completions by the density ratio of their prompts (UDM), which need a classifier of prompts.

use super::pairwise::{self, PairLoss, log_sigmoid, sigmoid};
use super::registry::{BETA, Entry};
use super::unpaired::{self, DESIRABLE_WEIGHT, UNDESIRABLE_WEIGHT, Weights};
use super::{Needs, Objective, Outcome, Scope, Stats, Totals};
use crate::params::{Domain, ParamSpec};

pub(super) const ENTRY: Entry = Entry {
    name: "bco",
    aliases: &[],
    paper: "Jung et al., arXiv:2404.04656, without the matching of prompt distributions",
    summary: "BCO: a classifier of good and bad completions whose logit is the reward above its running mean",
    params: &[BETA, DESIRABLE_WEIGHT, UNDESIRABLE_WEIGHT],
    build: |params| Ok(Box::new(Bco { beta: params["beta"], weights: Weights::of(params)? })),
};

pub(super) const PAIR: Entry = Entry {
    name: "bco_pair",
    aliases: &[],
    paper: "Jung et al., arXiv:2404.04656, on pairs as in TRL",
    summary: "BCO on pairs; running_delta takes the running mean of rewards off, as in the paper",
    params: &[BETA, RUNNING_DELTA],
    build: |params| {
        let beta = params["beta"];
        match params.on(RUNNING_DELTA.name) {
            true => Ok(Box::new(BcoPair { beta })),
            false => pairwise::each("bco_pair", params, move |pair| pair_loss(beta, pair, 0.0)),
        }
    },
};

const RUNNING_DELTA: ParamSpec = ParamSpec {
    name: "running_delta",
    domain: Domain::Switch,
    only_with: None,
    help: "subtract the mean of all rewards so far, as in the paper",
};

fn pair_loss(beta: f64, pair: &pairwise::Pair, delta: f64) -> PairLoss {
    let (above, below) = (beta * pair.chosen - delta, delta - beta * pair.rejected);
    PairLoss {
        value: -log_sigmoid(above) - log_sigmoid(below),
        by_chosen: -beta * sigmoid(-above),
        by_rejected: beta * sigmoid(-below),
    }
}

/// Mean and count of rewards, as they are kept from step to step.
const NONE_YET: [f64; 2] = [0.0, 0.0];

/// The state with these rewards in it.
fn updated(state: &[f64], rewards: &[f64]) -> [f64; 2] {
    let (mean, count) = (state[0], state[1]);
    let total = count + rewards.len() as f64;
    let above: f64 = rewards.iter().map(|reward| reward - mean).sum();
    [mean + above / total.max(1.0), total]
}

struct Bco {
    /// 1/nat, > 0.
    beta: f64,
    weights: Weights,
}

impl Objective for Bco {
    fn name(&self) -> &str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        unpaired::NEEDS
    }

    fn scope(&self) -> Scope {
        Scope::Batch
    }

    fn initial_state(&self) -> Vec<f64> {
        NONE_YET.to_vec()
    }

    fn evaluate(&self, stats: &Stats, totals: &Totals) -> Outcome {
        let beta = self.beta;
        let ratios = stats.logps.iter().zip(&stats.ref_logps[0]);
        let rewards: Vec<f64> = ratios.map(|(policy, reference)| beta * (policy - reference)).collect();
        let state = updated(&stats.state, &rewards);
        let mut outcome = unpaired::mean(stats, totals, beta, self.weights, |log_ratio, desirable| {
            let sign = if desirable { 1.0 } else { -1.0 };
            let z = sign * (beta * log_ratio - state[0]);
            (-log_sigmoid(z), -sign * beta * sigmoid(-z))
        });
        outcome.metrics.push(("delta".into(), state[0]));
        Outcome { state: state.to_vec(), ..outcome }
    }
}

struct BcoPair {
    /// 1/nat, > 0.
    beta: f64,
}

impl Objective for BcoPair {
    fn name(&self) -> &str {
        PAIR.name
    }

    fn needs(&self) -> Needs {
        pairwise::NEEDS
    }

    fn scope(&self) -> Scope {
        Scope::Batch
    }

    fn initial_state(&self) -> Vec<f64> {
        NONE_YET.to_vec()
    }

    fn evaluate(&self, stats: &Stats, totals: &Totals) -> Outcome {
        let pairs = pairwise::log_ratios(stats);
        let rewards = pairwise::rewards(self.beta, &pairs);
        let flat: Vec<f64> = rewards.iter().flat_map(|&(chosen, rejected)| [chosen, rejected]).collect();
        let state = updated(&stats.state, &flat);
        let losses = pairs.iter().map(|pair| pair_loss(self.beta, pair, state[0]));
        let mut outcome = pairwise::mean(stats, totals, losses, &rewards);
        outcome.metrics.push(("delta".into(), state[0]));
        Outcome { state: state.to_vec(), ..outcome }
    }
}
