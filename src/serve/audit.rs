//! A line of JSON for each request that was answered, and what it was answered with.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;

use crate::error::{At, Result};
use crate::progress::say;

pub struct Audit {
    path: PathBuf,
    file: Mutex<File>,
    /// Prompts and completions are written too.
    pub prompts: bool,
}

impl Audit {
    /// Adds to a file, which only its owner may read if it is new.
    pub fn open(path: &Path, prompts: bool) -> Result<Self> {
        let mut options = OpenOptions::new();
        options.create(true).append(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        Ok(Self { path: path.to_path_buf(), file: Mutex::new(options.open(path).at(path)?), prompts })
    }

    /// Writes one line at once, so that lines of a process that dies are whole.
    pub fn write(&self, entry: &Value) {
        let line = format!("{entry}\n");
        if let Err(error) = self.file.lock().expect("no holder panics").write_all(line.as_bytes()) {
            say(format_args!("{}: a line of the audit log is lost: {error}", self.path.display()));
        }
    }
}

/// Seconds since 1970.
pub fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}
