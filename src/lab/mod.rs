//! Experiments: many runs of one recipe, and what they come to.

mod compare;
mod table;

pub use compare::{Comparison, Pairs, compare};
pub use table::Table;
