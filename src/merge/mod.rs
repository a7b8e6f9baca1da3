//! Merging.

pub mod adapters;
pub mod svd;
