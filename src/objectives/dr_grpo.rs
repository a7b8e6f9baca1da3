//! Liu et al., arXiv:2503.20783, Eq. 4 and Appendix: GRPO without its two biases.
//!
//! ```text
//! A    = R - mean of the group's R
//! loss = sum over tokens of -min(r A, clip(r, 1 - e, 1 + e_high) A) + beta KL, divided by completions times the most tokens
//!        that a completion may have
//! ```

use super::advantages::REWARD_AGGREGATION;
use super::registry::Entry;
use super::surrogate::{
    DELTA, EPSILON, EPSILON_HIGH, Grouped, KL_BETA, KL_BIAS_CORRECTION, KL_FORM, LEVEL, Level, Normalizer,
    OFF_POLICY_MASK, Surrogate, TOP_ENTROPY,
};

pub(super) const ENTRY: Entry = Entry {
    name: "dr_grpo",
    aliases: &[],
    paper: "Liu et al., arXiv:2503.20783, Eq. 4",
    summary: "Dr. GRPO: no division by a completion's length nor by a group's spread",
    params: &[
        KL_BETA,
        EPSILON,
        EPSILON_HIGH,
        DELTA,
        LEVEL,
        REWARD_AGGREGATION,
        KL_FORM,
        KL_BIAS_CORRECTION,
        OFF_POLICY_MASK,
        TOP_ENTROPY,
    ],
    build: |params| {
        let term = Surrogate::clipped(params);
        Grouped::unscaled("dr_grpo", params, Surrogate::of(params, Level::Token, term, Normalizer::Longest)?)
    },
};
