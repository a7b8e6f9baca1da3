//! MiniMax-M1, arXiv:2506.13585, Eq. 4: the ratio is a weight, and only its size is cut.
//!
//! ```text
//! loss = mean over all tokens of -stop(min(r, cap)) A ln pi + beta KL
//! ```
//!
//! The cap is the largest ratio itself, as in TRL (`epsilon_high` there), not its distance from 1.

use std::ops::Bound;

use super::advantages::{REWARD_AGGREGATION, SCALE_REWARDS};
use super::registry::Entry;
use super::surrogate::{
    Grouped, KL_BETA, KL_BIAS_CORRECTION, KL_FORM, LEVEL, Level, Normalizer, OFF_POLICY_MASK, Surrogate, TOP_ENTROPY,
    Term,
};
use crate::params::{Domain, ParamSpec};

const RATIO_CAP: ParamSpec = ParamSpec {
    name: "ratio_cap",
    domain: Domain::Number {
        default: Some(5.0),
        range: (Bound::Excluded(1.0), Bound::Included(f64::INFINITY)),
        example: 5.0,
    },
    only_with: None,
    help: "largest weight that the ratio to the sampling policy gives a token",
};

pub(super) const ENTRY: Entry = Entry {
    name: "cispo",
    aliases: &[],
    paper: "MiniMax, arXiv:2506.13585, Eq. 4",
    summary: "CISPO: every token keeps its gradient, weighed by a ratio that is cut",
    params: &[
        KL_BETA,
        RATIO_CAP,
        LEVEL,
        SCALE_REWARDS,
        REWARD_AGGREGATION,
        KL_FORM,
        KL_BIAS_CORRECTION,
        OFF_POLICY_MASK,
        TOP_ENTROPY,
    ],
    build: |params| {
        let term = Term::Capped { cap: params["ratio_cap"] };
        Grouped::boxed("cispo", params, Surrogate::of(params, Level::Token, term, Normalizer::Tokens)?)
    },
};
