//! Ethayarajh et al., arXiv:2402.01306, Eq. 7: Kahneman-Tversky optimization.
//!
//! ```text
//! kl   = max(0, mean of ln pi - ln pi_ref over completions under prompts that are not theirs), a constant
//! loss = w_D (1 - sigma(beta (l - kl)))   of a desirable completion with log-ratio l
//!        w_U (1 - sigma(beta (kl - l)))   of an undesirable one                   mean over all completions
//! ```
//!
//! Deviations, as in TRL: the constant lambda is left out of the value, which then is a loss. kl is the mean over the whole
//! optimizer batch; TRL takes that of a micro-batch. The paper recommends (Eq. 8) that w_D n_D / (w_U n_U) is between 1 and 4/3,
//! with n_D and n_U completions of each kind.
//!
//! `kto_pair` is the variant on pairs that TRL had until 2024 (its commit 50c46205b removed it): the kl of one side is the
//! mean log-ratio of the other.
//!
//! ```text
//! kl_w = max(0, mean of lw), kl_l = max(0, mean of ll), constants
//! loss = (1 - sigma(beta (lw - kl_l))) + (1 - sigma(beta (kl_w - ll)))    mean over pairs
//! ```
//!
//! Deviations of that: TRL's mean was over both halves together, which is half of this.

use super::pairwise::{self, Pair, PairLoss, sigmoid, sigmoid_slope};
use super::registry::{BETA, Entry};
use super::unpaired::{self, DESIRABLE_WEIGHT, UNDESIRABLE_WEIGHT, Weights};
use super::{Needs, Objective, Outcome, Scope, Stats, Totals};

pub(super) const ENTRY: Entry = Entry {
    name: "kto",
    aliases: &[],
    paper: "Ethayarajh et al., arXiv:2402.01306, Eq. 7",
    summary: "KTO: learns from completions that are labelled good or bad one by one",
    params: &[BETA, DESIRABLE_WEIGHT, UNDESIRABLE_WEIGHT],
    build: |params| Ok(Box::new(Kto { beta: params["beta"], weights: Weights::of(params)? })),
};

pub(super) const PAIR: Entry = Entry {
    name: "kto_pair",
    aliases: &[],
    paper: "Ethayarajh et al., arXiv:2402.01306, on pairs as in TRL until 2024",
    summary: "KTO on pairs, where each side's mean log-ratio is the other's point of reference",
    params: &[BETA],
    build: |params| {
        let beta = params["beta"];
        pairwise::coupled("kto_pair", params, move |_, pairs| {
            let kl = |of: fn(&Pair) -> f64| mean(pairs.iter().map(of)).max(0.0);
            let (kl_w, kl_l) = (kl(|pair| pair.chosen), kl(|pair| pair.rejected));
            let loss = |pair: &Pair| {
                let (above, below) = (beta * (pair.chosen - kl_l), beta * (kl_w - pair.rejected));
                PairLoss {
                    value: sigmoid(-above) + sigmoid(-below),
                    by_chosen: -beta * sigmoid_slope(above),
                    by_rejected: beta * sigmoid_slope(below),
                }
            };
            pairs.iter().map(loss).collect()
        })
    },
};

struct Kto {
    /// 1/nat, > 0.
    beta: f64,
    weights: Weights,
}

impl Objective for Kto {
    fn name(&self) -> &str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        Needs { mismatched: true, ..unpaired::NEEDS }
    }

    fn scope(&self) -> Scope {
        Scope::Batch
    }

    fn evaluate(&self, stats: &Stats, totals: &Totals) -> Outcome {
        let beta = self.beta;
        let mismatched = stats.mismatched_logps.iter().zip(&stats.mismatched_ref_logps[0]);
        let kl = mean(mismatched.map(|(policy, reference)| policy - reference)).max(0.0);
        let mut outcome = unpaired::mean(stats, totals, beta, self.weights, |log_ratio, desirable| {
            let sign = if desirable { 1.0 } else { -1.0 };
            let z = sign * beta * (log_ratio - kl);
            (sigmoid(-z), -sign * beta * sigmoid_slope(z))
        });
        outcome.metrics.push(("kl".into(), kl));
        outcome
    }
}

/// 0 of nothing.
fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len().max(1) as f64;
    values.sum::<f64>() / count
}
