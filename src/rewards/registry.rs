//! A kind of reward as data, and how its table in a TOML file is read.

use std::fs;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use toml::Table;

use super::{Rule, http, model, process};

/// A kind of reward.
pub struct Entry {
    pub name: &'static str,
    pub summary: &'static str,
    /// What its table takes besides `name`, `kind` and `weight`, with what each means.
    pub keys: &'static [(&'static str, &'static str)],
    /// Reads the table, whose keys are known, and checks what can be checked before a run.
    pub(super) open: fn(Table, &mut Place) -> Result<Kind, String>,
}

/// What a table became.
pub(super) enum Kind {
    Rule(Box<dyn Rule>),
    Process(process::Program),
    Http(http::Server),
    Models(model::Panel),
}

impl Kind {
    pub fn rule(rule: impl Rule + 'static) -> Self {
        Self::Rule(Box::new(rule))
    }
}

/// Where a table lies, and the hash of what was read for it.
pub(super) struct Place {
    /// Where its paths start.
    pub folder: PathBuf,
    pub read: blake3::Hasher,
}

impl Place {
    /// The contents of a file, which are then part of the reward's identity.
    pub fn read(&mut self, file: &Path) -> Result<Vec<u8>, String> {
        let path = self.folder.join(file);
        let bytes = fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        self.read.update(blake3::hash(&bytes).as_bytes());
        Ok(bytes)
    }
}

/// A table as the options of its kind.
pub(super) fn options<T: DeserializeOwned>(table: Table) -> Result<T, String> {
    table.try_into().map_err(|e: toml::de::Error| e.to_string().trim().replace('\n', " "))
}

/// A number that a reward may be made of.
pub(super) fn finite(key: &str, number: f64) -> Result<f64, String> {
    match number.is_finite() {
        true => Ok(number),
        false => Err(format!("{key}: expected a finite number, found {number}")),
    }
}

/// What a rule of two outcomes gives for each.
#[derive(Clone, Copy)]
pub(super) struct Outcome {
    score: f64,
    otherwise: f64,
}

impl Outcome {
    /// 1 and 0 unless given.
    pub fn new(score: Option<f64>, otherwise: Option<f64>) -> Result<Self, String> {
        let (score, otherwise) = (score.unwrap_or(1.0), otherwise.unwrap_or(0.0));
        match score == otherwise {
            true => Err(format!("score and otherwise are both {score}: nothing is told apart")),
            false => Ok(Self { score: finite("score", score)?, otherwise: finite("otherwise", otherwise)? }),
        }
    }

    pub fn of(&self, holds: bool) -> f64 {
        if holds { self.score } else { self.otherwise }
    }
}

/// `did you mean "pattern"? known are pattern, score`.
pub(super) fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str> + Clone) -> String {
    let likeness = |candidate: &&str| strsim::jaro_winkler(name, candidate);
    let all: Vec<&str> = known.clone().collect();
    let best = known.max_by(|a, b| likeness(a).total_cmp(&likeness(b))).expect("there is one at least");
    format!("did you mean {best:?}? known are {}", all.join(", "))
}
