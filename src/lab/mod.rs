//! Experiments: many runs of one recipe, and what they come to.

mod compare;
mod equal;
mod fit;
mod hump;
mod jobs;
mod overopt;
mod page;
mod race;
mod report;
mod scatter;
mod table;
pub mod toy;

pub use compare::{Comparison, Pairs, compare};
pub use fit::{
    COLUMNS, Fitted, FittedGroup, Keys, Measurement, cells, fit_groups, fit_json, read_measurements, remarks,
};
pub use hump::{Group, Hump, hump_svg};
pub use jobs::{Found, Job, Makes, Outcome, Runner, Step};
pub use overopt::{Cell, Overopt, Plan as SweepPlan};
pub use page::{PAGE, STYLE, figure, table as html_table, write_report};
pub use race::{Halving, Race, forget, has_left};
pub use report::{Arm, Axes, Measured, Metrics, Report};
pub use scatter::{Dot, Scatter, scatter_svg, stacked_svg};
pub use table::Table;
