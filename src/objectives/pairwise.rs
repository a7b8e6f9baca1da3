//! What losses on (chosen, rejected) pairs with one reference share: log-ratios, their f-divergence scores, the weighted
//! mean over pairs and TRL's metrics. A loss is then a function of a [`Pair`].

use super::f_divergence::Score;
use super::{Grads, Needs, Objective, Outcome, Scope, Stats, Totals};
use crate::error::Result;
use crate::params::Params;

pub(super) const NEEDS: Needs = Needs { refs: 1..=1, pairs: true, pair_weights: true, ..Needs::POLICY };

/// One pair as its loss sees it.
pub(super) struct Pair {
    /// ln pi - ln pi_ref of the chosen completion, nats; with an f-divergence its score.
    pub chosen: f64,
    /// The same of the rejected one.
    pub rejected: f64,
    /// Completion tokens, >= 1.
    pub chosen_len: f64,
    pub rejected_len: f64,
}

impl Pair {
    pub fn margin(&self) -> f64 {
        self.chosen - self.rejected
    }
}

/// The loss of one pair and its derivatives by `Pair::chosen` and `Pair::rejected`.
#[derive(Clone, Copy, Default)]
pub(super) struct PairLoss {
    pub value: f64,
    pub by_chosen: f64,
    pub by_rejected: f64,
}

impl PairLoss {
    /// A loss that is a function of the margin, with this slope.
    pub fn of_margin(value: f64, slope: f64) -> Self {
        Self { value, by_chosen: slope, by_rejected: -slope }
    }
}

/// The mean of `loss` over pairs. `params` has its beta, and its f-divergence if its entry takes one.
pub(super) fn each(
    name: &'static str,
    params: &Params,
    loss: impl Fn(&Pair) -> PairLoss + Send + Sync + 'static,
) -> Result<Box<dyn Objective>> {
    Ok(Box::new(Each { name, beta: params["beta"], score: Score::of(params), loss }))
}

struct Each<F> {
    name: &'static str,
    /// Scales the rewards, which are metrics only.
    beta: f64,
    score: Score,
    loss: F,
}

impl<F: Fn(&Pair) -> PairLoss + Send + Sync> Objective for Each<F> {
    fn name(&self) -> &str {
        self.name
    }

    fn needs(&self) -> Needs {
        NEEDS
    }

    fn scope(&self) -> Scope {
        Scope::Pair
    }

    fn evaluate(&self, stats: &Stats, totals: &Totals) -> Outcome {
        let pairs = log_ratios(stats);
        let losses = pairs.iter().map(|pair| {
            let (chosen, by_chosen) = self.score.at(pair.chosen);
            let (rejected, by_rejected) = self.score.at(pair.rejected);
            let loss = (self.loss)(&Pair { chosen, rejected, ..*pair });
            PairLoss { by_chosen: loss.by_chosen * by_chosen, by_rejected: loss.by_rejected * by_rejected, ..loss }
        });
        mean(stats, totals, losses, &rewards(self.beta, &pairs))
    }
}

/// A loss that couples the pairs of a batch: gets all of them, returns a loss for each.
pub(super) fn coupled(
    name: &'static str,
    params: &Params,
    loss: impl Fn(&Stats, &[Pair]) -> Vec<PairLoss> + Send + Sync + 'static,
) -> Result<Box<dyn Objective>> {
    Ok(Box::new(Coupled { name, beta: params["beta"], loss }))
}

struct Coupled<F> {
    name: &'static str,
    /// Scales the rewards, which are metrics only.
    beta: f64,
    loss: F,
}

impl<F: Fn(&Stats, &[Pair]) -> Vec<PairLoss> + Send + Sync> Objective for Coupled<F> {
    fn name(&self) -> &str {
        self.name
    }

    fn needs(&self) -> Needs {
        Needs { pair_weights: false, ..NEEDS }
    }

    fn scope(&self) -> Scope {
        Scope::Batch
    }

    fn evaluate(&self, stats: &Stats, totals: &Totals) -> Outcome {
        let pairs = log_ratios(stats);
        mean(stats, totals, (self.loss)(stats, &pairs), &rewards(self.beta, &pairs))
    }
}

pub(super) fn log_ratios(stats: &Stats) -> Vec<Pair> {
    let reference = &stats.ref_logps[0];
    let ratio = |s: usize| stats.logps[s] - reference[s];
    let pair = |&(chosen, rejected): &(usize, usize)| Pair {
        chosen: ratio(chosen),
        rejected: ratio(rejected),
        chosen_len: stats.lens[chosen],
        rejected_len: stats.lens[rejected],
    };
    stats.pairs.iter().map(pair).collect()
}

pub(super) fn rewards(beta: f64, pairs: &[Pair]) -> Vec<(f64, f64)> {
    pairs.iter().map(|pair| (beta * pair.chosen, beta * pair.rejected)).collect()
}

/// The mean over the pairs of the optimizer batch of losses, each times its weight, whose derivatives are by the two
/// log-probs. `rewards` are those of chosen and rejected, for metrics.
pub(super) fn mean(
    stats: &Stats,
    totals: &Totals,
    losses: impl IntoIterator<Item = PairLoss>,
    rewards: &[(f64, f64)],
) -> Outcome {
    let mut grads = Grads { logps: vec![0.0; stats.logps.len()], ..Grads::default() };
    let mut value = 0.0;
    let mut metrics = [
        ("rewards/chosen", 0.0),
        ("rewards/rejected", 0.0),
        ("rewards/margins", 0.0),
        ("rewards/accuracies", 0.0),
        ("logps/chosen", 0.0),
        ("logps/rejected", 0.0),
    ];
    for (i, loss) in losses.into_iter().enumerate() {
        let (chosen, rejected) = stats.pairs[i];
        let weight = stats.pair_weights.get(i).copied().unwrap_or(1.0) / totals.pairs;
        value += loss.value * weight;
        grads.logps[chosen] += loss.by_chosen * weight;
        grads.logps[rejected] += loss.by_rejected * weight;

        let won = f64::from(rewards[i].0 > rewards[i].1); // a tie is not a win
        let margin = rewards[i].0 - rewards[i].1;
        let terms = [rewards[i].0, rewards[i].1, margin, won, stats.logps[chosen], stats.logps[rejected]];
        for ((_, metric), term) in metrics.iter_mut().zip(terms) {
            *metric += term / totals.pairs;
        }
    }
    Outcome {
        loss: value,
        grads,
        metrics: metrics.map(|(name, value)| (name.into(), value)).to_vec(),
        ..Outcome::default()
    }
}

/// ln(1 / (1 + e^-x)), without overflow or cancellation.
pub(super) fn log_sigmoid(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

/// 1 / (1 + e^-x); far to the left the relative precision stays.
pub(super) fn sigmoid(x: f64) -> f64 {
    if x >= 0.0 { 1.0 / (1.0 + (-x).exp()) } else { x.exp() / (1.0 + x.exp()) }
}

/// The derivative of [`sigmoid`]: sigma(x) sigma(-x).
pub(super) fn sigmoid_slope(x: f64) -> f64 {
    sigmoid(x) * sigmoid(-x)
}

/// `-(1 - e) ln sigma(z) - e ln sigma(-z)` and its derivative by z: the logistic loss where a share e of labels is wrong.
pub(super) fn smoothed(z: f64, e: f64) -> (f64, f64) {
    (-(1.0 - e) * log_sigmoid(z) - e * log_sigmoid(-z), e * sigmoid(z) - (1.0 - e) * sigmoid(-z))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_sigmoid_is_finite_and_exact_where_it_saturates() {
        assert_eq!(log_sigmoid(0.0), -std::f64::consts::LN_2);
        assert_eq!(log_sigmoid(-1e5), -1e5);
        assert_eq!(log_sigmoid(1e5), 0.0);
        assert_eq!(log_sigmoid(40.0), -(-40f64).exp());
    }

    #[test]
    fn sigmoid_keeps_its_relative_precision() {
        assert_eq!((sigmoid(0.0), sigmoid(1e5), sigmoid(-1e5)), (0.5, 1.0, 0.0));
        assert_eq!(sigmoid(-700.0), (-700f64).exp());
    }
}
