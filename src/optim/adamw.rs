//! AdamW (Loshchilov and Hutter, arXiv:1711.05101), as torch.optim.AdamW computes it.

use super::Entry;
use crate::ops::merged_update::Rule;

pub const ENTRY: Entry = Entry {
    name: "adamw",
    paper: "Loshchilov and Hutter, arXiv:1711.05101",
    summary: "Adam with decoupled weight decay; f32 moments",
    states: &["first_moment", "second_moment"],
    rule: |_| Rule::Adam,
};
