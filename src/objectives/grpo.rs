//! Shao et al., arXiv:2402.03300, Eq. 3: group relative policy optimization; by completion, Zheng et al.,
//! arXiv:2507.18071, Eq. 5: group sequence policy optimization.
//!
//! ```text
//! A    = (R - mean of the group's R) / (its standard deviation + 1e-4)
//! loss = mean over completions of mean over tokens of -min(r A, clip(r, 1 - e, 1 + e_high) A) + beta KL
//! ```
//!
//! GSPO takes for r the geometric mean of a completion's ratios, and a far smaller e. As in TRL the standard deviation is that
//! of a sample (over n - 1). Deviation: TRL multiplies the KL by r unless told not to; here that is asked for.

use super::advantages::{REWARD_AGGREGATION, SCALE_REWARDS};
use super::registry::Entry;
use super::surrogate::{
    DELTA, EPSILON, EPSILON_HIGH, Grouped, KL_BETA, KL_BIAS_CORRECTION, KL_FORM, LEVEL, Level, Normalizer,
    OFF_POLICY_MASK, Surrogate, TOP_ENTROPY, epsilon, epsilon_high,
};

pub(super) const ENTRY: Entry = Entry {
    name: "grpo",
    aliases: &[],
    paper: "Shao et al., arXiv:2402.03300, Eq. 3",
    summary: "GRPO: samples a group for each prompt, raises what is better than its mean and lowers what is worse",
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
    build: |params| {
        let term = Surrogate::clipped(params);
        Grouped::boxed("grpo", params, Surrogate::of(params, Level::Token, term, Normalizer::SequenceMeans)?)
    },
};

pub(super) const GSPO: Entry = Entry {
    name: "gspo",
    aliases: &[],
    paper: "Zheng et al., arXiv:2507.18071, Eq. 5",
    summary: "GSPO: GRPO with one ratio for a whole completion",
    params: &[
        KL_BETA,
        epsilon(3e-4),
        epsilon_high(4e-4),
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
        Grouped::boxed("gspo", params, Surrogate::of(params, Level::Mean, term, Normalizer::SequenceMeans)?)
    },
};
