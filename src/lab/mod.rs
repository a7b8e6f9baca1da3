//! Experiments: many runs of one recipe, and what they come to.

mod compare;
mod jobs;
mod report;
mod scatter;
mod table;

pub use compare::{Comparison, Pairs, compare};
pub use jobs::{Job, Makes, Outcome, Runner, Step};
pub use report::{Arm, Axes, Measured, Metrics, Report};
pub use scatter::{Dot, Scatter, stacked_svg};
pub use table::Table;
