//! Hong et al., arXiv:2403.07691, Eq. 6 and 7: odds ratio preference optimization, which needs no reference and no SFT
//! before it.
//!
//! ```text
//! a    = ln pi / tokens of a completion
//! odds = e^a / (1 - e^a)
//! loss = NLL of the chosen completions - beta * mean over pairs of ln sigma(ln odds_w - ln odds_l)
//! ```
//!
//! beta is the paper's lambda; the NLL is a mean over the tokens of the optimizer batch. Deviations: TRL's NLL runs over
//! prompt and completion, this one over the completion, as in the paper. Where a completion is certain, a > -1e-12, its odds
//! have no bound: they are those of a = -1e-12, and their gradient is 0.

use super::pairwise::{Pair, PairLoss, log_sigmoid, sigmoid};
use super::reference_free::{self, Scored};
use super::registry::{BETA, Entry};

pub(super) const ENTRY: Entry = Entry {
    name: "orpo",
    aliases: &[],
    paper: "Hong et al., arXiv:2403.07691, Eq. 6 and 7",
    summary: "ORPO: likelihood of chosen completions and the odds ratio of a pair, no reference",
    params: &[BETA],
    build: |params| {
        let beta = params["beta"];
        reference_free::boxed("orpo", params, 1.0, mean, move |pair| odds_ratio(beta, pair))
    },
};

/// Below what f32 can tell from 0 in the mean over a long completion.
const CERTAIN: f64 = -1e-12;

fn mean(logp: f64, len: f64) -> Scored {
    let mean = logp / len;
    if mean > CERTAIN { (CERTAIN, 0.0) } else { (mean, 1.0 / len) }
}

fn odds_ratio(beta: f64, pair: &Pair) -> PairLoss {
    let log_odds = |a: f64| a - log1mexp(a);
    let z = log_odds(pair.chosen) - log_odds(pair.rejected);
    // d ln odds / d a = 1 / (1 - e^a)
    let slope = |a: f64| -1.0 / a.exp_m1();
    PairLoss {
        value: -beta * log_sigmoid(z),
        by_chosen: -beta * sigmoid(-z) * slope(pair.chosen),
        by_rejected: beta * sigmoid(-z) * slope(pair.rejected),
    }
}

/// ln(1 - e^x) of x < 0, without cancellation.
fn log1mexp(x: f64) -> f64 {
    if x < -std::f64::consts::LN_2 { (-x.exp()).ln_1p() } else { (-x.exp_m1()).ln() }
}
