//! Meng et al., arXiv:2405.14734, Eq. 6: simple preference optimization with a reference-free reward.
//!
//! ```text
//! z    = beta (ln pi(y_w) / n_w - ln pi(y_l) / n_l) - gamma
//! loss = -(1 - e) ln sigma(z) - e ln sigma(-z)                            mean over pairs
//! ```
//!
//! with n_w, n_l the tokens of the two completions. Deviations: label smoothing e, 0 in the paper; with cpo_alpha above 0 this
//! is CPO-SimPO, which adds the likelihood of the chosen completions. TRL's default there is 1, here it is off. The
//! authors name gamma / beta, 0.3 to 0.5 and more, at a beta of 2 to 10.

use super::pairwise::{Pair, PairLoss, smoothed};
use super::reference_free::{self, CPO_ALPHA, mean};
use super::registry::{BETA, Entry, LABEL_SMOOTHING};
use crate::params::{Domain, NOT_NEGATIVE, ParamSpec, Params};

pub(super) const ENTRY: Entry = Entry {
    name: "simpo",
    aliases: &[],
    paper: "Meng et al., arXiv:2405.14734, Eq. 6",
    summary: "SimPO: mean log-probs as rewards, no reference, a target margin; usual betas are 2 to 10",
    params: &[BETA, GAMMA, LABEL_SMOOTHING, CPO_ALPHA],
    build: |params| reference_free::boxed("simpo", params, params["cpo_alpha"], mean, loss(params)),
};

pub(super) const GAMMA: ParamSpec = ParamSpec {
    name: "simpo_gamma",
    domain: Domain::Number { default: None, range: NOT_NEGATIVE, example: 0.5 },
    only_with: None,
    help: "margin of rewards that is aimed at, after beta",
};

/// The loss of two rewards before beta.
pub(super) fn loss(params: &Params) -> impl Fn(&Pair) -> PairLoss + Send + Sync + 'static {
    let (beta, gamma, e) = (params["beta"], params["simpo_gamma"], params["label_smoothing"]);
    move |pair| {
        let (value, slope) = smoothed(beta * pair.margin() - gamma, e);
        PairLoss::of_margin(value, beta * slope)
    }
}
