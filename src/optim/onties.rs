//! OnTIES (Lu et al., arXiv:2405.17931, Eq. 5 to 7; released as `OTAdamW`): the largest elements of every update, merged with
//! the largest of what fine-tuning had added to the base model, where their signs agree.
//!
//! ```text
//! tau_ref <- T(theta_ref - theta_base)         once; T keeps the share p of a tensor that is largest
//! D = T(update)
//! released:  e = sign(tau_ref + D), 0 counts as +
//!            w <- w + (1 - lambda) D [sign D = e] + lambda tau_ref [sign tau_ref = e]       decay last
//! paper:     x = (1 - lambda) D,  y = lambda tau_ref
//!            w <- w + (x + y where the signs agree, else the larger of the two)
//! ```
//!
//! In the released form tau_ref, a thousand times larger than an update, wins every conflict; in the paper's the update does.
//! Deviations from the released code: those of `ondare.rs`; elements equal to the smallest that is kept are all kept. A tensor
//! of which p keeps less than one element stays whole, as released.

use super::params::{
    ADAM_FORM_PUBLISHED, MERGE_EVERY, MERGE_FORM, MERGE_RESCALE, MERGE_SCHEDULE, MERGE_WEIGHT, RESERVE_RATE, adam_form,
    merging,
};
use super::{Entry, Method};
use crate::ops::merged_update::{Consensus, Rule};

pub const ENTRY: Entry = Entry {
    name: "onties",
    paper: "Lu et al., arXiv:2405.17931, Eq. 5 to 7",
    summary: "merges while it trains: the largest share of each update, blended with tau_ref where the signs agree",
    params: &[RESERVE_RATE, MERGE_WEIGHT, MERGE_SCHEDULE, MERGE_EVERY, MERGE_FORM, MERGE_RESCALE, ADAM_FORM_PUBLISHED],
    build: |params| {
        let consensus = match params.choice("merge_form") {
            Some("paper") => Consensus::AfterWeight,
            _ => Consensus::BeforeWeight,
        };
        let rule = Rule::OnTies {
            reserve_rate: params["reserve_rate"],
            merge_weight: params["merge_weight"],
            consensus,
            rescale: params.on("merge_rescale"),
        };
        merging(params, Method::new(adam_form(params), rule))
    },
};
