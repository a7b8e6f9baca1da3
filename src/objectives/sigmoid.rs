//! Rafailov et al., arXiv:2305.18290, Eq. 7: direct preference optimization.
//!
//! ```text
//! margin = (ln pi(y_w) - ln pi_ref(y_w)) - (ln pi(y_l) - ln pi_ref(y_l))
//! loss   = -ln sigma(beta margin)                                         mean over pairs
//! ```
//!
//! With label smoothing e this is cDPO (Mitchell, "A note on DPO with noisy preferences & relationship to IPO",
//! 2023): `loss = -(1 - e) ln sigma(beta margin) - e ln sigma(-beta margin)`. Deviations from the papers: none,
//! but that another divergence may take the place of the reverse KL (`f_divergence.rs`).

use super::f_divergence::{F_ALPHA, F_DIVERGENCE};
use super::pairwise::{self, PairLoss, smoothed};
use super::registry::{BETA, Entry, LABEL_SMOOTHING};

pub(super) const ENTRY: Entry = Entry {
    name: "sigmoid",
    aliases: &["dpo"],
    paper: "Rafailov et al., arXiv:2305.18290, Eq. 7",
    summary: "DPO; with label_smoothing cDPO, for labels that are wrong now and then",
    params: &[BETA, LABEL_SMOOTHING, F_DIVERGENCE, F_ALPHA],
    build: |params| {
        let (beta, e) = (params["beta"], params["label_smoothing"]);
        pairwise::each("sigmoid", params, move |pair| {
            let (value, slope) = smoothed(beta * pair.margin(), e);
            PairLoss::of_margin(value, beta * slope)
        })
    },
};
