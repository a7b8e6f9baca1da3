//! Ji et al., arXiv:2402.00856, Eq. 16 (EXO-pref): efficient exact optimization, with K = 2 completions.
//!
//! ```text
//! z    = beta margin
//! loss = sigma(z) (ln sigma(z) - ln(1 - e)) + sigma(-z) (ln sigma(-z) - ln e)     mean over pairs
//! ```
//!
//! the reverse KL from the policy's preference to labels that are right with probability 1 - e. Deviations: none. TRL
//! recommends e = 1e-3.

use std::ops::Bound;

use super::f_divergence::{F_ALPHA, F_DIVERGENCE};
use super::pairwise::{self, PairLoss, log_sigmoid, sigmoid, sigmoid_slope};
use super::registry::{BETA, Entry, LABEL_SMOOTHING};
use crate::params::{Domain, ParamSpec};

pub(super) const ENTRY: Entry = Entry {
    name: "exo_pair",
    aliases: &["exo"],
    paper: "Ji et al., arXiv:2402.00856, Eq. 16",
    summary: "EXO: matches the policy's preference to smoothed labels in reverse KL",
    params: &[BETA, SMOOTHING, F_DIVERGENCE, F_ALPHA],
    build: |params| {
        let (beta, e) = (params["beta"], params["label_smoothing"]);
        let (right, wrong) = ((-e).ln_1p(), e.ln());
        pairwise::each("exo_pair", params, move |pair| {
            let z = beta * pair.margin();
            let value = sigmoid(z) * (log_sigmoid(z) - right) + sigmoid(-z) * (log_sigmoid(-z) - wrong);
            PairLoss::of_margin(value, beta * sigmoid_slope(z) * (z - (right - wrong)))
        })
    },
};

/// Required and above 0: ln e is part of the loss.
const SMOOTHING: ParamSpec = ParamSpec {
    domain: Domain::Number { default: None, range: (Bound::Excluded(0.0), Bound::Excluded(0.5)), example: 1e-3 },
    ..LABEL_SMOOTHING
};
