//! AdamW whose weights are drawn towards their own moving average at every step: the baseline "EMA" of Lu et al.,
//! arXiv:2405.17931, section 4.1, which names the coefficient and leaves the rest open. Our reading:
//!
//! ```text
//! w       <- AdamW's w
//! average <- (1 - r) average + r w        starts as the first weights
//! w       <- (1 - r) w + r average
//! ```

use std::ops::Bound;

use super::params::{ADAM_FORM, adam_form};
use super::{Entry, Method};
use crate::ops::merged_update::Rule;
use crate::params::{Domain, ParamSpec};

const EMA_RATE: ParamSpec = ParamSpec {
    name: "ema_rate",
    domain: Domain::Number { default: None, range: (Bound::Excluded(0.0), Bound::Excluded(1.0)), example: 1e-3 },
    only_with: None,
    help: "r: how far the average goes towards the weights in a step, and the weights towards the average",
};

pub const ENTRY: Entry = Entry {
    name: "ema",
    paper: "Lu et al., arXiv:2405.17931, section 4.1 (a baseline, our reading)",
    summary: "AdamW whose weights are drawn towards their moving average",
    params: &[EMA_RATE, ADAM_FORM],
    build: |params| Method::new(adam_form(params), Rule::Ema { rate: params["ema_rate"] }),
};
