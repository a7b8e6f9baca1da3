//! cuvee aligns language models to human preferences. See ARCHITECTURE.md for the map.

pub mod checkpoint;
pub mod cli;
pub mod data;
pub mod device;
pub mod error;
pub mod lab;
pub mod lineage;
pub mod machine;
pub mod merge;
pub mod model;
pub mod objectives;
pub mod ops;
pub mod optim;
pub mod params;
pub mod progress;
pub mod references;
pub mod rewards;
pub mod rollout;
pub mod scaling;
pub mod serve;
pub mod soup;
pub mod tasks;
pub mod train;

pub use error::{Error, Result};
