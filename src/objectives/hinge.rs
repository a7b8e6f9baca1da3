//! Zhao et al., arXiv:2305.10425: sequence likelihood calibration (SLiC), in the form that Rafailov et al.,
//! arXiv:2406.02900, compare with DPO and IPO.
//!
//! ```text
//! margin = (ln pi(y_w) - ln pi_ref(y_w)) - (ln pi(y_l) - ln pi_ref(y_l))
//! loss   = max(0, 1 - beta margin)                                        mean over pairs
//! ```
//!
//! Deviations from the first paper, as in the second: the hinge is on log-ratios to the reference instead of on
//! log-probs, which takes the place of the cross-entropy term on a target text, and its width is 1 after beta.
//! At the kink the derivative is 0.

use super::f_divergence::{F_ALPHA, F_DIVERGENCE};
use super::pairwise::{self, PairLoss};
use super::registry::{BETA, Entry};

pub(super) const ENTRY: Entry = Entry {
    name: "hinge",
    aliases: &["slic"],
    paper: "Zhao et al., arXiv:2305.10425, anchored to the reference as in Rafailov et al., arXiv:2406.02900",
    summary: "SLiC: pushes a pair apart until beta * margin reaches 1, then leaves it alone",
    params: &[BETA, F_DIVERGENCE, F_ALPHA],
    build: |params| {
        let beta = params["beta"];
        pairwise::each("hinge", params, move |pair| hinge(beta, pair.margin()))
    },
};

/// max(0, 1 - beta margin)
pub(super) fn hinge(beta: f64, margin: f64) -> PairLoss {
    let slack = 1.0 - beta * margin;
    PairLoss::of_margin(slack.max(0.0), if slack > 0.0 { -beta } else { 0.0 })
}
