//! OnDARE (Lu et al., arXiv:2405.17931, Eq. 3 and 4; released as `ODAdamW`): a random share of every update, merged with what
//! fine-tuning had added to the base model.
//!
//! ```text
//! released:  tau_ref <- clamp((theta_ref - theta_base) M0 / p, +-clip)           once
//!            w <- w + (1 - lambda) update M / p + lambda tau_ref                 decay last
//! paper:     w <- w + (1 - lambda) update M + lambda (theta_ref - theta_base) M'
//! ```
//!
//! `M`, `M'` and `M0` keep each element with probability p, the reserve rate. Deviations from the released code: without
//! `merge_every` none; with it every tensor takes part in the steps between merges (the code returns after the first); weight
//! decay spares biases and norms, as everywhere in cuvee. `use_merge = False` is a merge weight of 0.
//!
//! The merge is no restoring force: with gradients of zero the policy moves *away* from the SFT model, along tau_ref.

use std::ops::Bound;

use super::params::{
    ADAM_FORM_PUBLISHED, MERGE_EVERY, MERGE_FORM, MERGE_RESCALE, MERGE_SCHEDULE, MERGE_WEIGHT, RESERVE_RATE, adam_form,
    merging,
};
use super::{Entry, Method};
use crate::ops::merged_update::{DareVariant, Rule};
use crate::params::{Domain, ParamSpec};

const MERGE_CLIP: ParamSpec = ParamSpec {
    name: "merge_clip",
    domain: Domain::Number {
        default: Some(1.0),
        range: (Bound::Excluded(0.0), Bound::Excluded(f64::INFINITY)),
        example: 0.1,
    },
    only_with: Some(("merge_form", "released")),
    help: "bound on the elements of tau_ref, and of an update that is rescaled",
};

pub const ENTRY: Entry = Entry {
    name: "ondare",
    paper: "Lu et al., arXiv:2405.17931, Eq. 3, 4",
    summary: "merges while it trains: a random share of each update, blended with tau_ref = SFT model - base model",
    params: &[
        RESERVE_RATE,
        MERGE_WEIGHT,
        MERGE_SCHEDULE,
        MERGE_EVERY,
        MERGE_FORM,
        MERGE_RESCALE,
        MERGE_CLIP,
        ADAM_FORM_PUBLISHED,
    ],
    build: |params| {
        let variant = match params.choice("merge_form") {
            Some("paper") => DareVariant::Paper,
            _ => DareVariant::Released,
        };
        let rule = Rule::OnDare {
            reserve_rate: params["reserve_rate"],
            merge_weight: params["merge_weight"],
            variant,
            rescale: params.on("merge_rescale"),
            clip: params.number("merge_clip").unwrap_or(f64::INFINITY),
        };
        merging(params, Method::new(adam_form(params), rule))
    },
};
