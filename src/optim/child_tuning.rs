//! ChildTuning-F (Xu et al., arXiv:2109.05687, Eq. 5 and 6): gradient dropout. A random share of each gradient's elements reaches
//! the moments, scaled up so that the mean stays.
//!
//! ```text
//! g <- g M / p        before the moments; then AdamW
//! ```
//!
//! Not the same as OnDARE with a merge weight of 0, which masks the update behind the moments.

use super::params::{ADAM_FORM_PUBLISHED, RESERVE_RATE, adam_form};
use super::{Entry, Method};
use crate::ops::merged_update::Rule;

pub const ENTRY: Entry = Entry {
    name: "child_tuning",
    paper: "Xu et al., arXiv:2109.05687, Eq. 5, 6",
    summary: "AdamW on a random share of every gradient's elements",
    params: &[RESERVE_RATE, ADAM_FORM_PUBLISHED],
    build: |params| Method {
        gradient_reserve_rate: params["reserve_rate"],
        ..Method::new(adam_form(params), Rule::Adam)
    },
};
