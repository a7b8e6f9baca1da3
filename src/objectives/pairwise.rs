//! What losses on (chosen, rejected) pairs with one reference share: the mean over pairs and TRL's metrics.

use super::{Grads, Needs, Outcome, Stats, Totals};

pub(super) const NEEDS: Needs = Needs { refs: 1..=1, pairs: true, ..Needs::POLICY };

/// One pair as its loss sees it.
pub(super) struct Pair {
    /// ln pi - ln pi_ref of the chosen completion, nats.
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

/// The loss of one pair and its derivatives by the two log-ratios.
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

/// The mean of `loss` over the pairs of the optimizer batch. `beta` scales the rewards, which are metrics only.
pub(super) fn mean(stats: &Stats, totals: &Totals, beta: f64, loss: impl Fn(&Pair) -> PairLoss) -> Outcome {
    let reference = &stats.ref_logps[0];
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
    for &(chosen, rejected) in &stats.pairs {
        let pair = Pair {
            chosen: stats.logps[chosen] - reference[chosen],
            rejected: stats.logps[rejected] - reference[rejected],
            chosen_len: stats.lens[chosen],
            rejected_len: stats.lens[rejected],
        };
        let loss = loss(&pair);
        value += loss.value / totals.pairs;
        grads.logps[chosen] += loss.by_chosen / totals.pairs;
        grads.logps[rejected] += loss.by_rejected / totals.pairs;

        let rewards = (beta * pair.chosen, beta * pair.rejected);
        let won = f64::from(rewards.0 > rewards.1); // a tie is not a win
        let terms = [rewards.0, rewards.1, rewards.0 - rewards.1, won, stats.logps[chosen], stats.logps[rejected]];
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
