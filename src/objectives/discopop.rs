//! Lu et al., arXiv:2406.08414, Eq. 5: DiscoPOP, the log-ratio modulated loss that a language model found.
//!
//! ```text
//! z    = beta margin,  m = sigma(z / tau)
//! loss = -(1 - m) ln sigma(z) + m e^-z                                    mean over pairs
//! ```
//!
//! `m e^-z` is evaluated as `exp(ln sigma(z / tau) - z)`; TRL's product is NaN where e^-z overflows. Deviations: none; tau
//! is the paper's 0.05, and above 1 the loss would grow exponentially with a wrong margin.

use std::ops::Bound;

use super::f_divergence::{F_ALPHA, F_DIVERGENCE};
use super::pairwise::{self, PairLoss, log_sigmoid, sigmoid};
use super::registry::{BETA, Entry};
use crate::params::{Domain, ParamSpec};

pub(super) const ENTRY: Entry = Entry {
    name: "discopop",
    aliases: &[],
    paper: "Lu et al., arXiv:2406.08414, Eq. 5",
    summary: "DiscoPOP: logistic where the margin is wrong, exponential where it is right",
    params: &[BETA, TAU, F_DIVERGENCE, F_ALPHA],
    build: |params| {
        let (beta, tau) = (params["beta"], params["discopop_tau"]);
        pairwise::each("discopop", params, move |pair| {
            let z = beta * pair.margin();
            let (m, rest) = (sigmoid(z / tau), sigmoid(-z / tau));
            let exponential = (log_sigmoid(z / tau) - z).exp();
            let value = -rest * log_sigmoid(z) + exponential;
            let slope = -rest * sigmoid(-z) - exponential + (m * rest * log_sigmoid(z) + rest * exponential) / tau;
            PairLoss::of_margin(value, beta * slope)
        })
    },
};

const TAU: ParamSpec = ParamSpec {
    name: "discopop_tau",
    domain: Domain::Number { default: Some(0.05), range: (Bound::Excluded(0.0), Bound::Included(1.0)), example: 0.05 },
    only_with: None,
    help: "temperature of the switch between the two parts of the loss",
};
