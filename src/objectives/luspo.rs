//! Length-unbiased sequence policy optimization, arXiv:2602.05261, as TRL 1.16 has it: GSPO's ratio, and a completion weighs as
//! much as it is long.
//!
//! ```text
//! loss = mean over completions of sum over tokens of -min(r A, clip(r, 1 - e, 1 + e_high) A) + beta KL
//! ```
//!
//! With a ratio by token it is the sum over tokens of GRPO's terms; paper and TRL refuse that, so it has to be asked for.

use super::advantages::{REWARD_AGGREGATION, SCALE_REWARDS};
use super::registry::Entry;
use super::surrogate::{
    DELTA, EPSILON, EPSILON_HIGH, Grouped, KL_BETA, KL_BIAS_CORRECTION, KL_FORM, Level, Normalizer, OFF_POLICY_MASK,
    Surrogate, TOP_ENTROPY,
};
use crate::params::{Domain, ParamSpec};

const BY_TOKEN: ParamSpec = ParamSpec {
    name: "ratio_by_token",
    domain: Domain::Switch,
    only_with: None,
    help: "take each token's own ratio, not the completion's geometric mean",
};

pub(super) const ENTRY: Entry = Entry {
    name: "luspo",
    aliases: &[],
    paper: "arXiv:2602.05261, as in TRL 1.16",
    summary: "LUSPO: GSPO without its preference for short completions",
    params: &[
        KL_BETA,
        EPSILON,
        EPSILON_HIGH,
        BY_TOKEN,
        DELTA,
        SCALE_REWARDS,
        REWARD_AGGREGATION,
        KL_FORM,
        KL_BIAS_CORRECTION,
        OFF_POLICY_MASK,
        TOP_ENTROPY,
    ],
    build: |params| {
        let term = Surrogate::clipped(params);
        let level = if params.on(BY_TOKEN.name) { Level::Token } else { Level::Mean };
        Grouped::boxed("luspo", params, Surrogate::of(params, level, term, Normalizer::SequenceSums)?)
    },
};
