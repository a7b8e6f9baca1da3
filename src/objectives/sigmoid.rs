//! Rafailov et al., arXiv:2305.18290, Eq. 7: direct preference optimization.
//!
//! ```text
//! margin = (ln pi(y_w) - ln pi_ref(y_w)) - (ln pi(y_l) - ln pi_ref(y_l))
//! loss   = -ln sigma(beta margin)                                         mean over pairs
//! ```
//!
//! With label smoothing e this is cDPO (Mitchell, "A note on DPO with noisy preferences & relationship to IPO",
//! 2023): `loss = -(1 - e) ln sigma(beta margin) - e ln sigma(-beta margin)`. Deviations from the papers: none.

use super::pairwise::{self, PairLoss, log_sigmoid, sigmoid};
use super::registry::{BETA, Entry, LABEL_SMOOTHING};
use super::{Needs, Objective, Outcome, Scope, Stats, Totals};

pub(super) const ENTRY: Entry = Entry {
    name: "sigmoid",
    aliases: &["dpo"],
    paper: "Rafailov et al., arXiv:2305.18290, Eq. 7",
    summary: "DPO; with label_smoothing cDPO, for labels that are wrong now and then",
    params: &[BETA, LABEL_SMOOTHING],
    build: |params| Ok(Box::new(Sigmoid { beta: params["beta"], label_smoothing: params["label_smoothing"] })),
};

struct Sigmoid {
    /// 1/nat, > 0.
    beta: f64,
    /// Probability, [0, 0.5).
    label_smoothing: f64,
}

impl Objective for Sigmoid {
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
        let &Self { beta, label_smoothing: e } = self;
        pairwise::mean(stats, totals, beta, |pair| {
            let z = beta * pair.margin();
            let loss = -(1.0 - e) * log_sigmoid(z) - e * log_sigmoid(-z);
            PairLoss::of_margin(loss, beta * (e * sigmoid(z) - (1.0 - e) * sigmoid(-z)))
        })
    }
}
