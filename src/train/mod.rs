//! Training: the loop, its steps, metrics, checkpoints and plots.

mod evaluate;
mod host;
mod metrics;
mod plan;
pub mod plot;
mod policy;
mod report;
mod resume;
mod run;
mod settings;
mod step;
mod task;

pub use evaluate::{Evaluation, Summary};
pub use plan::{Assumed, Choice, Memory, Phase, Plan, Workload, fit, warning};
pub use policy::{Blueprint, Policy};
pub use report::Report;
pub use run::{Outcome, run};
pub use settings::{Resume, Samples, Settings};
pub use step::{StepBatch, StepResult, step};
pub use task::{MICRO_BATCH_TOKENS, Task, check_positions, check_reference, check_vocabulary};
