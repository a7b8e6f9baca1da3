//! cuvee aligns language models to human preferences. See ARCHITECTURE.md for the map.

pub mod data;
pub mod device;
pub mod error;
pub mod objectives;
pub mod ops;

pub use error::{Error, Result};
