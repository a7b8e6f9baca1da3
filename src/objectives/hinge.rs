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

use super::pairwise::{self, PairLoss};
use super::registry::{BETA, Entry};
use super::{Needs, Objective, Outcome, Scope, Stats, Totals};

pub(super) const ENTRY: Entry = Entry {
    name: "hinge",
    aliases: &["slic"],
    paper: "Zhao et al., arXiv:2305.10425, anchored to the reference as in Rafailov et al., arXiv:2406.02900",
    summary: "SLiC: pushes a pair apart until beta * margin reaches 1, then leaves it alone",
    params: &[BETA],
    build: |params| Ok(Box::new(Hinge { beta: params["beta"] })),
};

struct Hinge {
    /// 1/nat, > 0.
    beta: f64,
}

impl Objective for Hinge {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        pairwise::NEEDS
    }

    fn scope(&self) -> Scope {
        Scope::Pair
    }

    fn evaluate(&self, stats: &Stats, totals: &Totals) -> Outcome {
        let beta = self.beta;
        pairwise::mean(stats, totals, beta, |pair| {
            let slack = 1.0 - beta * pair.margin();
            PairLoss::of_margin(slack.max(0.0), if slack > 0.0 { -beta } else { 0.0 })
        })
    }
}
