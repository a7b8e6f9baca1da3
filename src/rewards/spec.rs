//! `--reward WHAT[=WEIGHT]`, and what it leads to: a folder of a reward model, `fluency:` and that of a language model, or a TOML file of `[[reward]]` tables.
//!
//! ```toml
//! [[reward]]
//! kind = "lexicon"
//! file = "lexicon.tsv"
//!
//! [[reward]]
//! name = "brief"
//! kind = "length"
//! weight = 0.5
//! unit = "words"
//! max = 30
//! slope = 0.1
//! ```
//!
//! `name` is the kind unless it is given, `weight` is 1. Paths start at the file's folder. Any table may say how its reward is put on a
//! scale, `(x - center) / scale`, and above what it counts no more, `most`; `cuvee lab scale` measures and writes these.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Serialize, Serializer};
use toml::{Table, Value};

use super::all;
use super::model::Panel;
use super::registry::{Kind, Place, finite, nearest};
use crate::data::Extent;
use crate::device::Storage;
use crate::error::{Error, Result};

/// One `--reward`.
#[derive(Debug, Clone, PartialEq)]
pub struct RewardSpec {
    pub what: PathBuf,
    /// What its rewards count in the sum, beside the weights in its file; of weight 0 they are measured, not maximised.
    pub weight: f64,
    /// `what` is the folder of a language model, and completions are worth what it makes of their likelihood.
    pub fluency: bool,
}

/// Before the folder of a language model.
pub const FLUENCY: &str = "fluency:";

impl RewardSpec {
    /// `rules.toml=0.5`, or `rules.toml` where what follows a last `=` is no number.
    ///
    /// # Errors
    /// No path, or a weight that is not finite: what was expected.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (what, weight) = match text.rsplit_once('=').map(|(what, weight)| (what, weight.parse::<f64>())) {
            Some((what, Ok(weight))) => (what, weight),
            _ => (text, 1.0),
        };
        let (what, fluency) = what.strip_prefix(FLUENCY).map_or((what, false), |dir| (dir, true));
        if what.is_empty() || !weight.is_finite() {
            return Err(
                "expected a reward model's folder or a TOML file, and a finite weight, such as rules.toml=0.5".into()
            );
        }
        Ok(Self { what: what.into(), weight, fluency })
    }
}

impl fmt::Display for RewardSpec {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let kind = if self.fluency { FLUENCY } else { "" };
        write!(f, "{kind}{}={}", self.what.display(), self.weight)
    }
}

impl Serialize for RewardSpec {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Everything that a run is rewarded by, opened and checked.
pub struct Rewards {
    pub(super) rewards: Vec<Reward>,
}

pub(super) struct Reward {
    pub name: String,
    pub weight: f64,
    pub shape: Shape,
    pub kind: Kind,
    /// Of its table and the files that it names. Weights of models are hashed when they are asked for.
    identity: blake3::Hash,
}

/// `min(most, (x - center) / scale)`
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct Shape {
    center: f64,
    scale: f64,
    most: f64,
}

impl Default for Shape {
    fn default() -> Self {
        Self { center: 0.0, scale: 1.0, most: f64::INFINITY }
    }
}

impl Shape {
    /// Takes its keys out of a reward's table.
    fn take(table: &mut Table) -> Result<Self, String> {
        let mut number = |key: &str, otherwise: f64| match table.remove(key) {
            None => Ok(otherwise),
            Some(value) => {
                let number = value.as_float().or(value.as_integer().map(|n| n as f64)).filter(|x| x.is_finite());
                number.ok_or(format!("{key}: expected a finite number, found {} {value}", value.type_str()))
            }
        };
        let Self { center, scale, most } = Self::default();
        let shape =
            Self { center: number("center", center)?, scale: number("scale", scale)?, most: number("most", most)? };
        match shape.scale > 0.0 {
            true => Ok(shape),
            false => Err(format!("scale: expected a number above 0, found {}", shape.scale)),
        }
    }

    /// NaN, which says nothing, stays so.
    pub fn of(&self, reward: f64) -> f64 {
        let scaled = (reward - self.center) / self.scale;
        if scaled > self.most { self.most } else { scaled }
    }

    /// Of a standard deviation.
    pub fn of_spread(&self, spread: f64) -> f64 {
        spread / self.scale
    }
}

impl Rewards {
    /// Opens all that `specs` name: reads every file, finds every program and the configuration and tokenizer of every
    /// model. No weight is read, nothing is started.
    ///
    /// # Errors
    /// What cannot be opened or understood, with its file and name; two rewards of one name; no reward.
    pub fn open(specs: &[RewardSpec]) -> Result<Self> {
        let mut rewards: Vec<Reward> = Vec::new();
        for spec in specs {
            let opened = match (spec.what.is_dir(), spec.what.is_file()) {
                _ if spec.fluency => vec![of_language_model(&spec.what)?],
                (true, _) => vec![of_folder(&spec.what)?],
                (_, true) => of_file(&spec.what)?,
                _ => {
                    let detail = "there is no such file or folder; give a reward model's folder, or a TOML file of [[reward]] tables";
                    return Err(Error::file(&spec.what, detail));
                }
            };
            for reward in opened {
                if rewards.iter().any(|other| other.name == reward.name) {
                    let detail = format!(
                        "a second reward is called {:?}; give it a name of its own in a TOML file",
                        reward.name
                    );
                    return Err(Error::file(&spec.what, detail));
                }
                rewards.push(Reward { weight: reward.weight * spec.weight, ..reward });
            }
        }
        match rewards.is_empty() {
            true => Err(Error::option(
                "--reward",
                "missing; give a reward model's folder, or a TOML file of [[reward]] tables",
            )),
            false => Ok(Self { rewards }),
        }
    }

    /// `[R]`, no two alike.
    pub fn names(&self) -> Vec<String> {
        self.rewards.iter().map(|reward| reward.name.clone()).collect()
    }

    /// `[R]`
    pub fn weights(&self) -> Vec<f64> {
        self.rewards.iter().map(|reward| reward.weight).collect()
    }

    /// The name of a reward that reads [`Sample::completion_ids`], if one does.
    pub fn reads_tokens(&self) -> Option<&str> {
        let reads = |reward: &&Reward| matches!(&reward.kind, Kind::Rule(rule) if rule.reads_tokens());
        self.rewards.iter().find(reads).map(|reward| reward.name.as_str())
    }

    /// What a sample is worth: the sum of `weights` times what each reward says of it, those left out that say nothing or have no
    /// weight; NaN where none says anything.
    pub fn sum(&self, said: impl IntoIterator<Item = f64>) -> f64 {
        let weighed = said.into_iter().zip(&self.rewards);
        let weighed = weighed.filter(|(said, reward)| !said.is_nan() && reward.weight != 0.0);
        weighed.map(|(said, reward)| said * reward.weight).reduce(|a, b| a + b).unwrap_or(f64::NAN)
    }

    /// A hash of everything that decides scores: tables, the files that they name, weights and tokenizers of models. Reads
    /// every weight once.
    pub fn identity(&self) -> Result<[u8; 32]> {
        let mut hasher = blake3::Hasher::new();
        for reward in &self.rewards {
            hasher.update(reward.identity.as_bytes()).update(&reward.weight.to_le_bytes());
            if let Kind::Models(panel) = &reward.kind {
                panel.identify(&mut hasher)?;
            }
        }
        Ok(*hasher.finalize().as_bytes())
    }

    /// Bytes that reward models take on a device with this storage: their weights for the whole run, and what the
    /// largest of them needs while it judges batches up to `largest`. How many tokens another tokenizer makes of a text is
    /// an estimate.
    pub fn plan(&self, storage: Storage, largest: &Extent) -> Memory {
        let panels = self.rewards.iter().filter_map(|reward| match &reward.kind {
            Kind::Models(panel) => Some(panel.plan(storage, largest)),
            _ => None,
        });
        panels.fold(Memory::default(), |a, b| Memory {
            resident: a.resident + b.resident,
            judging: a.judging.max(b.judging),
        })
    }
}

/// Bytes of reward models.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Memory {
    /// For the whole run.
    pub resident: usize,
    /// While they judge, besides.
    pub judging: usize,
}

/// The name of a folder or file, without what it ends in.
fn stem(path: &Path) -> String {
    let real = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    real.file_stem().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
}

fn of_folder(dir: &Path) -> Result<Reward> {
    let panel = Panel::open(&[dir.to_path_buf()], 0.0)?;
    let (shape, identity) = (Shape::default(), blake3::hash(b"model"));
    Ok(Reward { name: stem(dir), weight: 1.0, shape, kind: Kind::Models(panel), identity })
}

fn of_language_model(dir: &Path) -> Result<Reward> {
    let (name, kind) = ("fluency".to_string(), Kind::Models(Panel::fluency(dir)?));
    Ok(Reward { name, weight: 1.0, shape: Shape::default(), kind, identity: blake3::hash(b"fluency") })
}

fn of_file(path: &Path) -> Result<Vec<Reward>> {
    let bytes = fs::read(path).map_err(|e| Error::file(path, e))?;
    let text = String::from_utf8(bytes).map_err(|_| Error::file(path, "is not UTF-8; expected a TOML file"))?;
    let mut file: Table = text.parse().map_err(|e: toml::de::Error| Error::file(path, e.to_string().trim_end()))?;
    let tables = file.remove("reward");
    if let Some(other) = file.keys().next() {
        return Err(Error::file(path, format!("unknown key {other:?}; expected [[reward]] tables and nothing else")));
    }
    let Some(Value::Array(tables)) = tables.filter(|tables| tables.as_array().is_some_and(|tables| !tables.is_empty()))
    else {
        return Err(Error::file(path, "holds no [[reward]] table"));
    };
    let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let named = |(i, table): (usize, Value)| {
        let Value::Table(table) = table else {
            return Err(Error::file(path, format!("reward {i} is no table; write [[reward]]")));
        };
        let name = table.get("name").and_then(Value::as_str).map_or_else(|| i.to_string(), |name| format!("{name:?}"));
        of_table(table, folder).map_err(|detail| Error::file(path, format!("reward {name}: {detail}")))
    };
    (1..).zip(tables).map(named).collect()
}

/// A table, without its file's weight.
fn of_table(mut table: Table, folder: &Path) -> Result<Reward, String> {
    let mut place = Place { folder: folder.to_path_buf(), read: blake3::Hasher::new() };
    let text = |key: &str, value: Value| match value {
        Value::String(text) if !text.is_empty() => Ok(text),
        other => Err(format!("{key}: expected a text, found {} {other}", other.type_str())),
    };
    let kinds = all().iter().map(|entry| entry.name);
    let kind = table
        .remove("kind")
        .ok_or_else(|| format!("kind is missing; known are {}", kinds.clone().collect::<Vec<_>>().join(", ")))?;
    let kind = text("kind", kind)?;
    let Some(entry) = all().iter().find(|entry| entry.name == kind) else {
        return Err(format!("there is no kind {kind:?}; {}", nearest(&kind, kinds)));
    };
    let name = table.remove("name").map(|name| text("name", name)).transpose()?.unwrap_or(kind);
    let weight = match table.remove("weight") {
        None => 1.0,
        Some(Value::Float(weight)) => finite("weight", weight)?,
        Some(Value::Integer(weight)) => weight as f64,
        Some(other) => return Err(format!("weight: expected a number, found {} {other}", other.type_str())),
    };
    // Before its keys are taken out: what decides a score is hashed.
    place.read.update(entry.name.as_bytes()).update(table.to_string().as_bytes());
    let shape = Shape::take(&mut table)?;
    let keys = entry.keys.iter().map(|(key, _)| *key);
    if let Some(unknown) = table.keys().find(|key| !keys.clone().any(|known| known == *key)) {
        let also = keys.chain(["name", "kind", "weight", "center", "scale", "most"]);
        return Err(format!("unknown key {unknown:?} of a {:?}; {}", entry.name, nearest(unknown, also)));
    }
    let kind = (entry.open)(table, &mut place)?;
    Ok(Reward { name, weight, shape, kind, identity: place.read.finalize() })
}
