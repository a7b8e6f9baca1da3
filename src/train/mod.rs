//! Training: the loop, its metrics and its plots.

pub mod plot;
