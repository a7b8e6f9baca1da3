//! Training: the loop, its steps, metrics, checkpoints and plots.

mod alarm;
mod drift;
mod evaluate;
mod exam;
mod gold;
mod host;
mod lineage;
mod metrics;
mod moving;
mod online;
mod panel;
mod plan;
pub mod plot;
mod policy;
mod references;
mod report;
mod resume;
mod run;
mod settings;
mod step;
mod task;
mod tau;

pub use alarm::{Lever, OnAlarm};
pub use drift::Estimate;
pub use evaluate::{Evaluation, Summary};
pub use exam::StopWhen;
pub use host::Host;
pub use metrics::{TRAINER_STATE, evaluations};
pub use plan::{Assumed, Choice, Memory, Phase, Plan, Workload, fit, warning};
pub use policy::{Blueprint, Extras, Policy};
pub use references::own_tokens;
pub use report::Report;
pub use run::{Outcome, run};
pub use settings::{Alarm, Moving, Pause, References, Resume, Rollouts, Samples, Settings};
pub use step::{Pass, Purpose, Rows, Sampled, StepResult, step};
pub use task::{MICRO_BATCH_TOKENS, Task, check_positions, check_vocabulary, objective};
