//! Soft adaptive policy optimization, arXiv:2511.20347, Eq. 5: a sigmoid where others clip.
//!
//! ```text
//! loss = mean over completions of mean over tokens of -4 / tau sigma(tau (r - 1)) A + beta KL
//! ```
//!
//! with one temperature tau where A is positive, another where it is not.

use super::advantages::{REWARD_AGGREGATION, SCALE_REWARDS};
use super::registry::Entry;
use super::surrogate::{
    Grouped, KL_BETA, KL_BIAS_CORRECTION, KL_FORM, LEVEL, Level, Normalizer, OFF_POLICY_MASK, Surrogate, TOP_ENTROPY,
    Term,
};
use crate::params::{Domain, POSITIVE, ParamSpec};

const POSITIVE_TEMPERATURE: ParamSpec = ParamSpec {
    name: "sapo_temperature_pos",
    domain: Domain::Number { default: Some(1.0), range: POSITIVE, example: 1.0 },
    only_with: None,
    help: "how sharply ratios of completions better than their group stop to count",
};

const NEGATIVE_TEMPERATURE: ParamSpec = ParamSpec {
    name: "sapo_temperature_neg",
    domain: Domain::Number { default: Some(1.05), range: POSITIVE, example: 1.05 },
    only_with: None,
    help: "the same of completions that are no better",
};

pub(super) const ENTRY: Entry = Entry {
    name: "sapo",
    aliases: &[],
    paper: "arXiv:2511.20347, Eq. 5",
    summary: "SAPO: a soft gate in the place of clipping",
    params: &[
        KL_BETA,
        POSITIVE_TEMPERATURE,
        NEGATIVE_TEMPERATURE,
        LEVEL,
        SCALE_REWARDS,
        REWARD_AGGREGATION,
        KL_FORM,
        KL_BIAS_CORRECTION,
        OFF_POLICY_MASK,
        TOP_ENTROPY,
    ],
    build: |params| {
        let (positive, negative) = (params["sapo_temperature_pos"], params["sapo_temperature_neg"]);
        let term = Term::Soft { positive, negative };
        Grouped::boxed("sapo", params, Surrogate::of(params, Level::Token, term, Normalizer::SequenceMeans)?)
    },
};
