//! One error type for the whole crate. A message says what failed, on what, what was expected and
//! found, and what to do; it starts in lower case and ends without a full stop.

use std::fmt;
use std::path::{Path, PathBuf};

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Where a row lies in its file, counted from 1: by lines, or by records where a row is no line.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Place {
    Line(usize),
    Record(usize),
}

impl Place {
    pub fn number(self) -> usize {
        let (Self::Line(number) | Self::Record(number)) = self;
        number
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Line(number) => write!(f, "line {number}"),
            Self::Record(number) => write!(f, "record {number}"),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or folder could not be read or written, or does not hold what it should.
    #[error("{}: {detail}", path.display())]
    File { path: PathBuf, detail: String },

    /// One row of a data set is unusable.
    #[error("{}, {at}: {detail}", path.display())]
    Row { path: PathBuf, at: Place, detail: String },

    /// A flag, a recipe key or a combination of them is wrong. `key` is spelled as the user types it.
    #[error("{key}: {detail}")]
    Option { key: String, detail: String },

    /// An op got shapes that do not fit each other, or its device failed.
    #[error("{op}: {detail}")]
    Op { op: &'static str, detail: String },

    /// Training produced a NaN or an infinity; nothing was updated with it.
    #[error("step {step}: {what} is not finite; {detail}")]
    NotFinite { step: u64, what: String, detail: String },

    /// The user asked to stop; everything worth keeping is on disk.
    #[error("interrupted: {detail}")]
    Interrupted { detail: String },
}

impl Error {
    pub fn file(path: impl AsRef<Path>, detail: impl ToString) -> Self {
        Self::File { path: path.as_ref().to_path_buf(), detail: detail.to_string() }
    }

    pub fn option(key: impl ToString, detail: impl ToString) -> Self {
        Self::Option { key: key.to_string(), detail: detail.to_string() }
    }

    pub fn op(op: &'static str, detail: impl ToString) -> Self {
        Self::Op { op, detail: detail.to_string() }
    }
}

/// Attaches a path to an I/O error: `fs::read(&path).at(&path)?`.
pub trait At<T> {
    fn at(self, path: impl AsRef<Path>) -> Result<T>;
}

impl<T, E: std::fmt::Display> At<T> for std::result::Result<T, E> {
    fn at(self, path: impl AsRef<Path>) -> Result<T> {
        self.map_err(|e| Error::file(path, e))
    }
}
