//! cuvee aligns language models to human preferences. See ARCHITECTURE.md for the map.

pub mod device;
pub mod data;
pub mod error;
pub mod ops;
pub mod objectives;

pub use error::{Error, Result};
