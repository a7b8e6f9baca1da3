//! Xu et al., arXiv:2401.08417, Eq. 3: contrastive preference optimization, DPO with a uniform reference and the
//! likelihood of the chosen completions beside it. TRL adds two losses to the paper's first:
//!
//! ```text
//! a          = ln pi of a completion: summed in cpo and cpo_hinge, a mean over tokens in cpo_ipo
//! cpo        = -(1 - e) ln sigma(beta (a_w - a_l)) - e ln sigma(-beta (a_w - a_l))
//! cpo_hinge  = max(0, 1 - beta (a_w - a_l))
//! cpo_ipo    = (a_w - a_l - 1/(2 beta))^2                                 each a mean over pairs
//! loss       = that + cpo_alpha * NLL of the chosen completions, a mean over the tokens of the optimizer batch
//! ```
//!
//! Deviations: none; the paper has cpo_alpha = 1. The metrics `logps/*` are sums, where TRL has means for `cpo_ipo`.

use super::hinge::hinge;
use super::ipo::squared;
use super::pairwise::{PairLoss, smoothed};
use super::reference_free::{self, CPO_ALPHA, mean, sum};
use super::registry::{BETA, Entry, LABEL_SMOOTHING};
use crate::params::{Domain, NOT_NEGATIVE, ParamSpec};

const REQUIRED_ALPHA: ParamSpec =
    ParamSpec { domain: Domain::Number { default: None, range: NOT_NEGATIVE, example: 1.0 }, ..CPO_ALPHA };

pub(super) const SIGMOID: Entry = Entry {
    name: "cpo",
    aliases: &[],
    paper: "Xu et al., arXiv:2401.08417, Eq. 3",
    summary: "CPO: DPO without a reference, and the likelihood of chosen completions",
    params: &[BETA, LABEL_SMOOTHING, REQUIRED_ALPHA],
    build: |params| {
        let (beta, e) = (params["beta"], params["label_smoothing"]);
        reference_free::boxed("cpo", params, params["cpo_alpha"], sum, move |pair| {
            let (value, slope) = smoothed(beta * pair.margin(), e);
            PairLoss::of_margin(value, beta * slope)
        })
    },
};

pub(super) const HINGE: Entry = Entry {
    name: "cpo_hinge",
    aliases: &[],
    paper: "Xu et al., arXiv:2401.08417, with the hinge of arXiv:2305.10425 as in TRL",
    summary: "CPO with SLiC's hinge",
    params: &[BETA, REQUIRED_ALPHA],
    build: |params| {
        let beta = params["beta"];
        reference_free::boxed("cpo_hinge", params, params["cpo_alpha"], sum, move |pair| hinge(beta, pair.margin()))
    },
};

pub(super) const IPO: Entry = Entry {
    name: "cpo_ipo",
    aliases: &[],
    paper: "Xu et al., arXiv:2401.08417, with Eq. 17 of arXiv:2310.12036 as in TRL",
    summary: "CPO with IPO's square, on mean log-probs",
    params: &[BETA, REQUIRED_ALPHA],
    build: |params| {
        let target = 0.5 / params["beta"];
        reference_free::boxed("cpo_ipo", params, params["cpo_alpha"], mean, move |pair| {
            squared(pair.margin() - target, 1.0)
        })
    },
};
