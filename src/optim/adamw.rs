//! AdamW (Loshchilov and Hutter, arXiv:1711.05101), as torch.optim.AdamW computes it, or as transformers once did.

use super::params::{ADAM_FORM, adam_form};
use super::{Entry, Method};
use crate::ops::merged_update::Rule;

pub const ENTRY: Entry = Entry {
    name: "adamw",
    paper: "Loshchilov and Hutter, arXiv:1711.05101",
    summary: "Adam with decoupled weight decay; f32 moments",
    params: &[ADAM_FORM],
    build: |params| Method::new(adam_form(params), Rule::Adam),
};
