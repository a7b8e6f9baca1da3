//! Yu et al., arXiv:2503.14476, Eq. 8: decoupled clip, a mean over tokens.
//!
//! ```text
//! loss = mean over all tokens of the optimizer batch of -min(r A, clip(r, 1 - e, 1 + e_high) A) + beta KL
//! ```
//!
//! `bnpo` is the same loss with equal bounds, as TRL names it; TRL takes its mean over a micro-batch, which here would let memory
//! decide the result. What else DAPO is made of is not the loss: prompts whose group is all alike teach nothing here too.

use super::Objective;
use super::advantages::{REWARD_AGGREGATION, SCALE_REWARDS};
use super::registry::Entry;
use super::surrogate::{
    DELTA, EPSILON, EPSILON_HIGH, Grouped, KL_BETA, KL_BIAS_CORRECTION, KL_FORM, LEVEL, Level, Normalizer,
    OFF_POLICY_MASK, Surrogate, TOP_ENTROPY, epsilon_high,
};
use crate::error::Result;
use crate::params::Params;

pub(super) const ENTRY: Entry = Entry {
    name: "dapo",
    aliases: &[],
    paper: "Yu et al., arXiv:2503.14476, Eq. 8",
    summary: "DAPO: GRPO as a mean over tokens, which may rise further than they may fall",
    params: &[
        KL_BETA,
        EPSILON,
        epsilon_high(0.28),
        DELTA,
        LEVEL,
        SCALE_REWARDS,
        REWARD_AGGREGATION,
        KL_FORM,
        KL_BIAS_CORRECTION,
        OFF_POLICY_MASK,
        TOP_ENTROPY,
    ],
    build: |params| build("dapo", params),
};

pub(super) const BNPO: Entry = Entry {
    name: "bnpo",
    aliases: &[],
    paper: "as TRL has it; the normaliser of Yu et al., arXiv:2503.14476, with GRPO's bounds",
    summary: "GRPO as a mean over the batch's tokens",
    params: &[
        KL_BETA,
        EPSILON,
        EPSILON_HIGH,
        DELTA,
        LEVEL,
        SCALE_REWARDS,
        REWARD_AGGREGATION,
        KL_FORM,
        KL_BIAS_CORRECTION,
        OFF_POLICY_MASK,
        TOP_ENTROPY,
    ],
    build: |params| build("bnpo", params),
};

fn build(name: &'static str, params: &Params) -> Result<Box<dyn Objective>> {
    let term = Surrogate::clipped(params);
    Grouped::boxed(name, params, Surrogate::of(params, Level::Token, term, Normalizer::Tokens)?)
}
