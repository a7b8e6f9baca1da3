//! Tasks: what a model can do, measured on rows of a file. Each kind asks a model for log-probabilities of texts, or
//! for completions of prompts, and turns the answers into metrics. Where lm-evaluation-harness has a kind, its numbers
//! are these (version 0.4.13, backend `hf`): each file names the rule that it follows.
//!
//! ```text
//! FILE --Task::open--> Task --tokens--> Tokens --a model--> Said --outcome--> Outcome --Table--> text, JSON, figure
//! ```

mod choice;
mod complete;
mod encode;
mod exact_match;
mod examine;
mod file;
mod perplexity;
mod preference;
mod reward;
mod stats;
mod table;
mod template;

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

pub use complete::{Prompt, TOGETHER, Writing, complete, text_of};
pub use encode::Encoder;
pub use examine::{Done, Examiner, Subject};
pub use file::Overrides;
pub use reward::Judged;
pub use table::{Examined, Table};

use crate::data::{Example, Tokenizer};
use crate::error::Result;
use crate::rollout::{Request, Rollout};

/// A task, read and checked; no model has seen it yet.
pub struct Task {
    pub name: String,
    /// What was named: rows, or the TOML file that names them.
    pub path: PathBuf,
    kind: Box<dyn Kind>,
}

/// What a task asks of a model, and what it makes of the answers.
trait Kind {
    /// As in a task's `kind`.
    fn name(&self) -> &'static str;

    /// What its outcomes measure, the first stands for the task; some only where something else is asked, too.
    fn metrics(&self) -> &'static [&'static str];

    /// What to ask, in the tokens of one model.
    fn tokens(&self, encoder: &Encoder) -> Result<Tokens>;

    /// `said` answers `tokens`, all of it finite.
    fn outcome(&self, tokenizer: &Tokenizer, tokens: &Tokens, said: &Said) -> Result<Outcome>;
}

/// What a task asks one model.
#[derive(Default)]
pub struct Tokens {
    /// Sequences whose log-probabilities are wanted.
    pub examples: Vec<Example>,
    /// Texts to complete, and how.
    pub prompts: Vec<Prompt>,
    pub writing: Option<Writing>,
    /// What is to be said about rows that are not asked, and others; nothing of most kinds.
    pub report: Vec<String>,
}

/// What a model answered.
#[derive(Default)]
pub struct Said {
    /// `[examples][sequences][scored tokens]`, nats.
    pub logps: Vec<Vec<Vec<f32>>>,
    /// The same of a reference, where log-ratios are wanted.
    pub ref_logps: Option<Vec<Vec<Vec<f32>>>>,
    /// `[prompts][samples]`
    pub completions: Vec<Vec<Rollout>>,
    /// `[prompts][samples]` what others say of those completions; empty where nobody was asked.
    pub judged: Vec<Vec<Judged>>,
    /// `[prompts]` what the data's own completions are worth; empty where some prompt has none.
    pub answers: Vec<f64>,
}

/// One metric of a task.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Measure {
    pub name: &'static str,
    pub value: f64,
    /// Its standard error over items; `None` of fewer than two, and of what has none.
    pub stderr: Option<f64>,
}

/// What a model came to in a task.
#[derive(Clone, PartialEq, Debug)]
pub struct Outcome {
    pub kind: &'static str,
    pub items: usize,
    /// The first stands for the task in tables.
    pub measures: Vec<Measure>,
    /// One object an item, for whoever wants to see them.
    pub log: Vec<Map<String, Value>>,
    /// `[prompts][samples]`, of the kind `reward`.
    rewards: Vec<Vec<f64>>,
}

impl Task {
    /// Reads a file of rows, or the TOML file that names them.
    ///
    /// # Errors
    /// A file that cannot be read, rows of no kind, a row that cannot be asked: named with its line.
    pub fn open(name: &str, path: &Path, overrides: &Overrides) -> Result<Self> {
        Ok(Self { name: name.to_string(), path: path.to_path_buf(), kind: file::open(path, overrides)? })
    }

    /// As in a TOML file's `kind`.
    pub fn kind(&self) -> &'static str {
        self.kind.name()
    }

    /// What its outcomes measure.
    pub fn metrics(&self) -> &'static [&'static str] {
        self.kind.metrics()
    }

    /// What to ask a model, in its tokens.
    pub fn tokens(&self, encoder: &Encoder) -> Result<Tokens> {
        self.kind.tokens(encoder)
    }

    /// What the answers to `tokens` come to.
    pub fn outcome(&self, tokenizer: &Tokenizer, tokens: &Tokens, said: &Said) -> Result<Outcome> {
        self.kind.outcome(tokenizer, tokens, said)
    }
}

impl Tokens {
    /// What is to be written.
    pub fn requests(&self) -> Vec<Request<'_>> {
        self.writing.map(|writing| writing.requests(&self.prompts)).unwrap_or_default()
    }
}

impl Outcome {
    fn new(kind: &'static str, measures: Vec<Measure>, log: Vec<Map<String, Value>>) -> Self {
        Self { kind, items: log.len(), measures, log, rewards: Vec::new() }
    }

    pub fn headline(&self) -> &Measure {
        &self.measures[0]
    }

    pub fn get(&self, name: &str) -> Option<&Measure> {
        self.measures.iter().find(|measure| measure.name == name)
    }

    /// `kind`, `items`, then each metric under its name, with its standard error under `NAME_stderr`.
    pub fn to_json(&self) -> Map<String, Value> {
        let mut object = Map::new();
        object.insert("kind".into(), self.kind.into());
        object.insert("items".into(), self.items.into());
        for Measure { name, value, stderr } in &self.measures {
            object.insert(name.to_string(), (*value).into());
            stderr.map(|stderr| object.insert(format!("{name}_stderr"), stderr.into()));
        }
        object
    }
}
