//! Gupta et al., arXiv:2501.03884: AlphaPO, SimPO with a reward of another shape.
//!
//! ```text
//! a    = ln pi / tokens of a completion
//! r    = (1 - e^(-alpha a)) / alpha
//! loss = -ln sigma(beta (r_w - r_l) - gamma)                              mean over pairs
//! ```
//!
//! At alpha = 0 r is a, and this is `simpo`. Deviations: label smoothing and cpo_alpha as in `simpo`, both off by default.
//! TRL forms e^a, whose powers are NaN where it underflows; here the exponent -alpha a is clamped at 80, and the gradient
//! beyond is 0.

use super::reference_free::{self, CPO_ALPHA, Scored};
use super::registry::{BETA, Entry, LABEL_SMOOTHING};
use super::simpo::{self, GAMMA};
use crate::params::{Domain, FINITE, ParamSpec};

pub(super) const ENTRY: Entry = Entry {
    name: "alphapo",
    aliases: &[],
    paper: "Gupta et al., arXiv:2501.03884",
    summary: "AlphaPO: SimPO with a reward of another shape; alpha = 0 is SimPO",
    params: &[BETA, ALPHA, GAMMA, LABEL_SMOOTHING, CPO_ALPHA],
    build: |params| {
        let alpha = params["alphapo_alpha"];
        let reward = move |logp, len| reward(alpha, logp, len);
        reference_free::boxed("alphapo", params, params["cpo_alpha"], reward, simpo::loss(params))
    },
};

const ALPHA: ParamSpec = ParamSpec {
    name: "alphapo_alpha",
    domain: Domain::Number { default: None, range: FINITE, example: 0.25 },
    only_with: None,
    help: "shape of the reward: above 0 unlikely completions weigh more, below 0 less",
};

const MAX_EXPONENT: f64 = 80.0;

fn reward(alpha: f64, logp: f64, len: f64) -> Scored {
    let exponent = -alpha * logp / len;
    let slope = if exponent > MAX_EXPONENT { 0.0 } else { exponent.exp() / len };
    // Below 1e-8 the quadratic term is rounding.
    let value = if alpha.abs() < 1e-8 { logp / len } else { -exponent.min(MAX_EXPONENT).exp_m1() / alpha };
    (value, slope)
}
