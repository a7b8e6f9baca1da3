//! Chowdhury et al., arXiv:2403.00409: provably robust DPO (rDPO), where a share e of the labels is flipped at random.
//!
//! ```text
//! z    = beta margin
//! loss = (-(1 - e) ln sigma(z) + e ln sigma(-z)) / (1 - 2 e)              mean over pairs
//! ```
//!
//! an estimate of DPO's loss on the true labels without bias; it has no lower bound, unlike cDPO's. Deviations: none.

use std::ops::Bound;

use super::f_divergence::{F_ALPHA, F_DIVERGENCE};
use super::pairwise::{self, PairLoss, log_sigmoid, sigmoid};
use super::registry::{BETA, Entry, LABEL_SMOOTHING};
use crate::params::{Domain, ParamSpec};

pub(super) const ENTRY: Entry = Entry {
    name: "robust",
    aliases: &[],
    paper: "Chowdhury et al., arXiv:2403.00409",
    summary: "robust DPO: takes the bias of labels that are flipped with a known probability out of the loss",
    params: &[BETA, FLIPPED, F_DIVERGENCE, F_ALPHA],
    build: |params| {
        let (beta, e) = (params["beta"], params["label_smoothing"]);
        pairwise::each("robust", params, move |pair| {
            let z = beta * pair.margin();
            let value = (-(1.0 - e) * log_sigmoid(z) + e * log_sigmoid(-z)) / (1.0 - 2.0 * e);
            let slope = -((1.0 - e) * sigmoid(-z) + e * sigmoid(z)) / (1.0 - 2.0 * e);
            PairLoss::of_margin(value, beta * slope)
        })
    },
};

/// Required: at 0 it would be `sigmoid`.
const FLIPPED: ParamSpec = ParamSpec {
    domain: Domain::Number { default: None, range: (Bound::Included(0.0), Bound::Excluded(0.5)), example: 0.1 },
    ..LABEL_SMOOTHING
};
