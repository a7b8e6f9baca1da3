//! Where reference log-probabilities come from.

pub mod cache;
