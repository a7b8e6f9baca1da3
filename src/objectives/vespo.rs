//! Variational sequence-level soft policy optimization, arXiv:2602.10693, as TRL 1.16 has it.
//!
//! ```text
//! W    = sum over tokens of ln pi - ln pi_old, each cut to 20 nats, cut to [ln 1e-8, 20]
//! phi  = e^(lambda + k W - lambda e^W)
//! loss = mean over all tokens of -stop(phi) A ln pi + beta KL
//! ```
//!
//! with one (k, lambda) where A >= 0, another where it is below.

use super::advantages::{REWARD_AGGREGATION, SCALE_REWARDS};
use super::registry::Entry;
use super::surrogate::{
    Grouped, KL_BETA, KL_BIAS_CORRECTION, KL_FORM, LEVEL, Level, Normalizer, OFF_POLICY_MASK, Surrogate, TOP_ENTROPY,
    Term,
};
use crate::params::{Domain, POSITIVE, ParamSpec};

const fn shape(name: &'static str, default: f64, help: &'static str) -> ParamSpec {
    ParamSpec {
        name,
        domain: Domain::Number { default: Some(default), range: POSITIVE, example: default },
        only_with: None,
        help,
    }
}

const K_POS: ParamSpec = shape("vespo_k_pos", 2.0, "power of the ratio of completions no worse than their group");
const LAMBDA_POS: ParamSpec = shape("vespo_lambda_pos", 3.0, "how fast a large ratio of theirs stops to count");
const K_NEG: ParamSpec = shape("vespo_k_neg", 3.0, "power of the ratio of completions worse than their group");
const LAMBDA_NEG: ParamSpec = shape("vespo_lambda_neg", 2.0, "how fast a large ratio of those stops to count");

pub(super) const ENTRY: Entry = Entry {
    name: "vespo",
    aliases: &[],
    paper: "arXiv:2602.10693, as in TRL 1.16",
    summary: "VESPO: completions weighed by a smooth kernel of their whole ratio",
    params: &[
        KL_BETA,
        K_POS,
        LAMBDA_POS,
        K_NEG,
        LAMBDA_NEG,
        LEVEL,
        SCALE_REWARDS,
        REWARD_AGGREGATION,
        KL_FORM,
        KL_BIAS_CORRECTION,
        OFF_POLICY_MASK,
        TOP_ENTROPY,
    ],
    build: |params| {
        let pair = |k: &str, lambda: &str| (params[k], params[lambda]);
        let (positive, negative) = (pair("vespo_k_pos", "vespo_lambda_pos"), pair("vespo_k_neg", "vespo_lambda_neg"));
        let term = Term::Variational { positive, negative };
        Grouped::boxed("vespo", params, Surrogate::of(params, Level::Token, term, Normalizer::Tokens)?)
    },
};
