//! Merging of whole checkpoints: methods, each a paper and a file, and the way through a model tensor by tensor.
//!
//! [`Entry::prepare`] looks at a tensor whole, part by part ([`parts`]), for what it must know
//! (a cut, a norm, an angle), and returns a rule that merges any part of it. So memory does not depend on the size of
//! tensors or on how many models there are. Sums over a tensor are f64, in the order of parts: threads do not change them. Random
//! masks come from the caller, by (model, tensor, element).

pub mod adapters;
mod breadcrumbs;
mod dare;
mod della;
mod linear;
mod model_stock;
mod models;
mod number;
mod parts;
pub mod peft_rules;
pub mod recipe;
mod registry;
mod run;
pub mod settings;
mod slerp;
mod sparse;
pub mod svd;
mod task_arithmetic;
mod ties;

pub use crate::params::{Value, flag};
pub use number::Real;
pub use parts::{Part, Rule, Source, Tensor, Words};
pub use recipe::{Input, Recipe};
pub use registry::{Base, Domain, Entry, ParamSpec, Prepare, Prepared, RESCALES, Values, find};
pub use run::{Done, Draw, Merge};
pub use settings::{Conditional, Plain, Setting, Settings};

const ALL: &[&Entry] = &[
    &linear::ENTRY,
    &slerp::ENTRY,
    &task_arithmetic::ENTRY,
    &ties::ENTRY,
    &dare::LINEAR,
    &dare::TIES,
    &breadcrumbs::LINEAR,
    &breadcrumbs::TIES,
    &della::TIES,
    &della::LINEAR,
    &model_stock::ENTRY,
];

/// Every method, in the order in which they are listed.
pub fn all() -> &'static [&'static Entry] {
    ALL
}

/// Merges one tensor that is in memory: `base` where the method has one, and models of the same shape.
pub fn merge_tensor<T: Real>(
    entry: &Entry,
    tensor: &Tensor<T>,
    values: &Values,
    words: Words,
) -> crate::Result<Vec<T>> {
    let rule = entry.prepare(tensor, values, words)?;
    let parts = tensor.map_parts(|part| {
        rule(part);
        std::mem::take(&mut part.out)
    })?;
    Ok(parts.concat())
}
