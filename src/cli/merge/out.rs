//! Where merges are written.

use std::fs;
use std::path::Path;

use crate::error::{Error, Result};

/// A merge writes a new folder, whole or not at all; what is there is left alone.
pub fn check_free(output: &Path) -> Result<()> {
    match fs::symlink_metadata(output) {
        Err(_) => Ok(()),
        Ok(_) => Err(Error::option("--output-dir", format!("{} exists; name a new folder", output.display()))),
    }
}
