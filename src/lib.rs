//! cuvee aligns language models to human preferences. See ARCHITECTURE.md for the map.

pub mod data;
pub mod error;

pub use error::{Error, Result};
