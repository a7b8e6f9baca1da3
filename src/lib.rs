//! cuvee aligns language models to human preferences. See ARCHITECTURE.md for the map.

pub mod data;
pub mod device;
pub mod error;
pub mod objectives;
pub mod ops;
pub mod checkpoint;
pub mod error;
pub mod references;
pub mod cli;
pub mod error;
pub mod train;

pub use error::{Error, Result};
