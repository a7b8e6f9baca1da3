//! A task's file: JSON lines whose columns tell the kind, or a TOML file beside them for what rows alone cannot say.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use super::template::Template;
use super::{Kind, choice, exact_match, perplexity, preference, reward};
use crate::data::{Object, read_objects};
use crate::error::{At, Error, Place, Result};

/// A kind of tasks.
struct Entry {
    name: &'static str,
    /// Each list has a column of the rows, one spelling of several; what is not told by others comes last.
    columns: &'static [&'static [&'static str]],
    /// Keys of a TOML file besides `kind` and `data`.
    options: &'static [&'static str],
    open: fn(Rows) -> Result<Box<dyn Kind>>,
}

pub(super) const QUESTION: &[&str] = &["query", "question", "context", "prompt"];
pub(super) const CHOICES: &[&str] = &["choices"];
pub(super) const GOLD: &[&str] = &["gold", "answer", "label"];
pub(super) const TARGET: &[&str] = &["target", "answer"];
pub(super) const PROMPT: &[&str] = &["prompt", "question"];
pub(super) const TEXT: &[&str] = &["text"];

/// Rows are of the first kind whose columns the first of them has.
const KINDS: &[Entry] = &[
    Entry {
        name: choice::NAME,
        columns: &[QUESTION, CHOICES, GOLD],
        options: &["prompt", "delimiter"],
        open: choice::open,
    },
    Entry { name: preference::NAME, columns: &[&["chosen"], &["rejected"]], options: &[], open: preference::open },
    Entry { name: perplexity::NAME, columns: &[TEXT], options: &[], open: perplexity::open },
    Entry {
        name: exact_match::NAME,
        columns: &[PROMPT, TARGET],
        options: &[
            "prompt",
            "target",
            "until",
            "max_new_tokens",
            "filter",
            "ignore_case",
            "ignore_punctuation",
            "ignore_numbers",
            "regexes_to_ignore",
        ],
        open: exact_match::open,
    },
    Entry {
        name: reward::NAME,
        columns: &[PROMPT],
        options: &["prompt", "max_new_tokens", "samples"],
        open: reward::open,
    },
];

/// What a TOML file says about rows.
#[derive(Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Options {
    pub kind: Option<String>,
    /// Seen from the TOML file.
    pub data: PathBuf,
    /// Jinja over a row's columns: what the model reads.
    pub prompt: Option<String>,
    /// The same: what it should write.
    pub target: Option<String>,
    /// Between a question and each choice.
    pub delimiter: Option<String>,
    pub until: Option<Texts>,
    pub max_new_tokens: Option<usize>,
    pub samples: Option<usize>,
    pub filter: Option<Filter>,
    pub ignore_case: bool,
    pub ignore_punctuation: bool,
    pub ignore_numbers: bool,
    pub regexes_to_ignore: Vec<String>,
    #[serde(skip)]
    pub seed: u64,
}

#[derive(Clone, Deserialize)]
#[serde(untagged)]
pub(super) enum Texts {
    One(String),
    Several(Vec<String>),
}

impl Texts {
    pub fn into_vec(self) -> Vec<String> {
        match self {
            Self::One(text) => vec![text],
            Self::Several(texts) => texts,
        }
    }
}

/// Which part of a completion is the answer: the harness's filter `regex`.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Filter {
    pub regex: String,
    /// Of all matches; -1 is the last.
    #[serde(default)]
    pub group_select: i64,
    /// Where nothing matches.
    #[serde(default = "invalid")]
    pub fallback: String,
}

fn invalid() -> String {
    "[invalid]".into()
}

/// What the command line says about all tasks; it goes before their own files.
#[derive(Clone, Copy, Debug, Default)]
pub struct Overrides {
    pub max_new_tokens: Option<usize>,
    pub samples: Option<usize>,
    pub seed: u64,
}

/// Rows with their lines, and what is said about them.
pub(super) struct Rows {
    /// Of the rows.
    pub path: PathBuf,
    /// What says the options: a TOML file, or the rows themselves.
    pub file: PathBuf,
    pub rows: Vec<(Place, Object)>,
    pub options: Options,
}

pub(super) fn open(path: &Path, overrides: &Overrides) -> Result<Box<dyn Kind>> {
    let (options, given) = if path.extension().is_some_and(|e| e == "toml") {
        read_toml(path)?
    } else {
        (Options { data: path.to_path_buf(), ..Options::default() }, Vec::new())
    };
    let rows = read_objects(&options.data)?;
    let entry = entry(path, &options, &rows[0])?;
    if let Some(key) =
        given.iter().find(|key| !["kind", "data"].contains(&&key[..]) && !entry.options.contains(&&key[..]))
    {
        let known = match entry.options {
            [] => "which takes kind and data alone".to_string(),
            options => format!("which takes kind, data, {}", options.join(", ")),
        };
        return Err(Error::file(path, format!("{key} says nothing to a task of the kind {}, {known}", entry.name)));
    }
    let Overrides { max_new_tokens, samples, seed } = *overrides;
    let max_new_tokens = max_new_tokens.or(options.max_new_tokens);
    let samples = samples.or(options.samples);
    if max_new_tokens == Some(0) || samples == Some(0) {
        return Err(Error::file(path, "max_new_tokens and samples are 1 or more"));
    }
    (entry.open)(Rows {
        path: options.data.clone(),
        file: path.to_path_buf(),
        rows,
        options: Options { max_new_tokens, samples, seed, ..options },
    })
}

/// The file, with `data` seen from here, and the keys that it has.
fn read_toml(path: &Path) -> Result<(Options, Vec<String>)> {
    let text = std::fs::read_to_string(path).map_err(|e| format!("cannot be read: {e}")).at(path)?;
    let table: toml::Table = text.parse().map_err(|e| format!("is not valid TOML: {e}")).at(path)?;
    let keys = table.keys().cloned().collect();
    if !table.contains_key("data") {
        return Err(Error::file(path, "has no data; name the file of rows, as in data = \"rows.jsonl\""));
    }
    let mut options: Options = table.try_into().map_err(|e| format!("cannot be used: {e}")).at(path)?;
    options.data = path.parent().unwrap_or(Path::new("")).join(options.data);
    Ok((options, keys))
}

fn entry(path: &Path, options: &Options, (at, first): &(Place, Object)) -> Result<&'static Entry> {
    if let Some(name) = &options.kind {
        let known = || KINDS.iter().map(|entry| entry.name).collect::<Vec<_>>().join(", ");
        let found = KINDS.iter().find(|entry| entry.name == name);
        return found.ok_or_else(|| Error::file(path, format!("kind {name:?} is unknown; known are {}", known())));
    }
    let has = |entry: &&Entry| entry.columns.iter().all(|spellings| find(first, spellings).is_some());
    KINDS.iter().find(has).ok_or_else(|| {
        let columns = |entry: &Entry| entry.columns.iter().map(|s| s.join(" or ")).collect::<Vec<_>>().join(", ");
        let kinds: Vec<String> = KINDS.iter().map(|entry| format!("{} ({})", entry.name, columns(entry))).collect();
        let (found, kinds) = (keys(first), kinds.join("; "));
        let detail = format!("found the columns [{found}], which are of no kind of task: {kinds}");
        Error::Row { path: options.data.clone(), at: *at, detail }
    })
}

fn find<'a>(row: &'a Object, spellings: &[&str]) -> Option<&'a Value> {
    spellings.iter().find_map(|name| row.get(*name))
}

fn keys(row: &Object) -> String {
    row.keys().map(String::as_str).collect::<Vec<_>>().join(", ")
}

/// A column under one of its names.
pub(super) fn column<'a>(row: &'a Object, spellings: &[&str]) -> Result<&'a Value, String> {
    let missing = || format!("has no {}; found the columns [{}]", spellings.join(" or "), keys(row));
    find(row, spellings).ok_or_else(missing)
}

/// A column that is a text.
pub(super) fn text(row: &Object, spellings: &[&str]) -> Result<String, String> {
    match column(row, spellings)? {
        Value::String(text) => Ok(text.clone()),
        Value::Array(_) => Err(format!(
            "column {:?} is a list, expected a text; a conversation can be written out by prompt in a TOML file",
            spellings.iter().find(|name| row.contains_key(**name)).expect("it was found")
        )),
        other => Err(format!("{} is {other}, expected a text", spellings.join(" or "))),
    }
}

/// What a template makes of rows, or the column where there is none.
pub(super) enum Source {
    Template(Box<Template>),
    Column(&'static [&'static str]),
}

impl Source {
    pub fn new(path: &Path, template: Option<String>, column: &'static [&'static str]) -> Result<Self> {
        Ok(match template {
            Some(template) => Self::Template(Box::new(Template::new(path, template)?)),
            None => Self::Column(column),
        })
    }

    pub fn of(&self, row: &Object) -> Result<String, String> {
        match self {
            Self::Template(template) => template.render(row),
            Self::Column(spellings) => text(row, spellings),
        }
    }
}

impl Rows {
    /// What `read` makes of each row; the first that it cannot read is an error with its place.
    pub fn items<T>(&self, read: impl Fn(&Object) -> Result<T, String>) -> Result<Vec<(Place, T)>> {
        let item = |(at, row): &(Place, Object)| Ok((*at, read(row).map_err(|why| self.error(*at, why))?));
        self.rows.iter().map(item).collect()
    }

    fn error(&self, at: Place, detail: String) -> Error {
        Error::Row { path: self.path.clone(), at, detail }
    }
}

/// Where rows lie, for messages about one of them.
pub(super) fn at(path: &Path, at: Place) -> impl Fn(String) -> Error {
    let path = path.to_path_buf();
    move |detail| Error::Row { path: path.clone(), at, detail }
}
