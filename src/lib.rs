//! cuvee aligns language models to human preferences. See ARCHITECTURE.md for the map.

pub mod cli;
pub mod error;
pub mod train;

pub use error::{Error, Result};
