//! cuvee aligns language models to human preferences. See ARCHITECTURE.md for the map.

pub mod checkpoint;
pub mod error;
pub mod references;

pub use error::{Error, Result};
