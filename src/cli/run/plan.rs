//! Stages as jobs: every one a process of this program in a folder of its own, known by a hash of all that decides what it makes: its
//! settings, what it reads, this version of cuvee.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::data::{Sliced, slice};
use super::recipe::{Kind, Recipe, Stage, Target, Variant, extension, folder_of};
use crate::checkpoint::json::read_json;
use crate::cli::compare::{fold, key};
use crate::cli::recipe as keys;
use crate::error::{At, Error, Result};
use crate::lab::{Job, Makes, Metrics, Step};
use crate::machine::processor;
use crate::train::evaluations;

const SETTINGS: &str = "stage.toml";
const NUMBERS: &str = "eval.json";
/// Flags that change no result.
const WITHOUT_EFFECT: [&str; 3] = ["threads", "cache_dir", "profile_steps"];

/// One variant of a stage with one seed.
pub struct Made {
    pub stage: usize,
    pub variant: usize,
    pub seed: u64,
    /// What others read of it: a model, a file.
    pub out: PathBuf,
    /// Where its logs are.
    pub logs: PathBuf,
    pub reads: Vec<Read>,
}

/// What a job reads: a file or folder, or what another made.
pub struct Read {
    pub path: String,
    /// Of its content, or the key of the job that makes it.
    pub key: String,
    pub made: Option<usize>,
}

/// Everything that is to be done; `made[i]` is made by `jobs[i]`.
pub struct Plan<'a> {
    pub recipe: &'a Recipe,
    pub jobs: Vec<Job>,
    pub made: Vec<Made>,
    pub sliced: Vec<Sliced>,
    threads: Option<usize>,
    /// Hashes of what was read so far.
    contents: BTreeMap<PathBuf, String>,
}

impl<'a> Plan<'a> {
    /// `jobs` processes at a time share the cores. Nothing is written.
    pub fn new(recipe: &'a Recipe, jobs: usize) -> Result<Self> {
        let threads = match (jobs, recipe.threads) {
            (1, threads) => threads,
            (jobs, threads) => Some((threads.unwrap_or_else(|| processor().allowed) / jobs).max(1)),
        };
        let sliced = slice(&recipe.slices, &recipe.output_dir.join("data"))?;
        let (jobs, made, contents) = (Vec::new(), Vec::new(), BTreeMap::new());
        let mut plan = Self { recipe, jobs, made, sliced, threads, contents };
        for seed in recipe.seed..recipe.seed + recipe.seeds {
            for (at, stage) in recipe.stages.iter().enumerate() {
                for variant in 0..stage.variants.len() {
                    let name = &stage.variants[variant].name;
                    let of_stage = |error| Error::file(&recipe.path, format!("{name}: {error}"));
                    plan.make(at, variant, seed).map_err(of_stage)?;
                }
            }
        }
        Ok(plan)
    }

    pub fn stage(&self, made: usize) -> &Stage {
        &self.recipe.stages[self.made[made].stage]
    }

    pub fn variant(&self, made: usize) -> &Variant {
        &self.stage(made).variants[self.made[made].variant]
    }

    pub fn of(&self, stage: usize, variant: usize, seed: u64) -> usize {
        let is = |made: &Made| (made.stage, made.variant, made.seed) == (stage, variant, seed);
        self.made.iter().position(is).expect("it stands above")
    }

    /// A table with folders in place of names, and what is read for it.
    fn filled(&mut self, command: &clap::Command, table: &Table, seed: u64) -> Result<(Table, Vec<Read>, Vec<String>)> {
        let (mut reads, mut rests) = (Vec::new(), Vec::new());
        let mut folder = |path: &str| {
            let target = self.recipe.target(path).map_err(|detail| Error::option("", detail))?;
            let (read, rest) = match target {
                None => {
                    // A weight behind a folder is no part of its name.
                    let split = path.rsplit_once('=').filter(|_| !Path::new(path).exists());
                    let (bare, weight) = split.unwrap_or((path, ""));
                    let key = content(Path::new(bare), &mut self.contents)?;
                    let rest = if split.is_some() { format!("={weight}") } else { String::new() };
                    (Read { path: bare.to_string(), key, made: None }, rest)
                }
                Some((Target::Slice(at), rest)) => {
                    let slice = &self.sliced[at];
                    let path = slice.path.to_string_lossy().into_owned();
                    (Read { path, key: slice.hash(), made: None }, rest.to_string())
                }
                Some((Target::Made(stage, variant), rest)) => {
                    let made = self.of(stage, variant, seed);
                    let path = self.made[made].out.to_string_lossy().into_owned();
                    (Read { path, key: self.jobs[made].key.clone(), made: Some(made) }, rest.to_string())
                }
            };
            let path = format!("{}{rest}", read.path);
            reads.push(read);
            rests.push(rest);
            Ok(path)
        };
        let filled = keys::with_paths(command, table, &mut folder)?;
        // Paths count by what they hold; everything else by its text.
        let bare = keys::with_paths(command, table, &mut |_| Ok(String::new()))?;
        let settings = bare.iter().filter(|(key, _)| !WITHOUT_EFFECT.contains(&key.as_str()));
        let mut parts: Vec<String> = settings.map(|(key, value)| format!("{key}={value}")).collect();
        parts.sort();
        parts.extend(reads.iter().zip(rests).map(|(read, rest)| read.key.clone() + &rest));
        Ok((filled, reads, parts))
    }

    fn make(&mut self, at: usize, of: usize, seed: u64) -> Result<()> {
        let stage = &self.recipe.stages[at];
        let (variant, kind, what) = (&stage.variants[of], stage.kind, stage.what);
        let dir = self.recipe.output_dir.join(folder_of(stage, variant)).join(format!("seed-{seed}"));
        let command = kind.command(what);
        let mut table = variant.table.clone();
        if (kind.trains() || kind == Kind::Lab) && !table.contains_key("seed") {
            table.insert("seed".into(), Value::Integer(seed as i64));
        }
        let (table, reads, mut parts) = self.filled(&command, &table, seed)?;
        let stem = folder_of(stage, variant).file_name().expect("it has a name").to_string_lossy().into_owned();
        let out = match kind {
            Kind::Eval => dir.join(NUMBERS),
            Kind::Lab => dir.join(format!("{stem}.{}", extension(what))),
            _ => dir.join(&stem),
        };
        let adapter = kind.trains() && ["lora_rank", "lora_start"].iter().any(|key| table.contains_key(*key));
        let logs = if adapter { dir.join("adapter") } else { out.clone() };
        let threads = (kind != Kind::Soup).then_some(self.threads).flatten();
        let threads = threads.map(|threads| OsString::from(format!("--threads={threads}")));
        let (mut file, mut steps) = (None, Vec::new());
        let mut args = kind.words(what);
        if kind.trains() {
            let mut whole = table.clone();
            whole.insert("output_dir".into(), logs.to_string_lossy().into_owned().into());
            let head = "# Written by `cuvee run`; what it left to defaults stands in the recipe.toml of the model.\n\n";
            file = Some((SETTINGS, head.to_string() + &keys::as_seen_from(&dir, &whole)));
            args.extend([dir.join(SETTINGS).into(), "--resume-from-checkpoint=auto".into()]);
            steps.push(Step { args: args.into_iter().chain(threads).collect(), makes: Makes::Run });
            steps.extend(adapter.then(|| fold(&table, &logs, &out)));
        } else {
            args.extend(kind.output(what, &out));
            args.extend(keys::flags_of(&table));
            args.extend(threads);
            let prints = kind.output(what, &out).is_none();
            let makes = if prints { Makes::Output(out.clone()) } else { Makes::Folder(out.clone()) };
            steps.push(Step { args, makes });
        }
        parts.extend([kind.words(what).iter().map(|w| w.to_string_lossy()).collect(), version()]);
        let mut needs: Vec<usize> = reads.iter().filter_map(|read| read.made).collect();
        needs.sort_unstable();
        needs.dedup();
        let of_stage = if kind == Kind::Eval { format!("{}: ", stage.name) } else { String::new() };
        let name = format!("{of_stage}{}, seed {seed}", variant.name);
        self.jobs.push(Job { name, dir, needs, key: key(&parts), file, steps });
        self.made.push(Made { stage: at, variant: of, seed, out, logs, reads });
        Ok(())
    }

    /// The numbers that a job has left, under the names that its stage gives them too.
    pub fn numbers(&self, made: usize) -> Result<Metrics> {
        let (stage, Made { out, logs, .. }) = (self.stage(made), &self.made[made]);
        if stage.kind.trains() {
            let last = evaluations(logs)?.pop().unwrap_or_default();
            let number = |(key, value): (String, serde_json::Value)| {
                Some((key.strip_prefix("eval_").unwrap_or(&key).to_string(), value.as_f64()?))
            };
            return Ok(last.into_iter().filter_map(number).collect());
        }
        if stage.kind != Kind::Eval {
            return Ok(Metrics::new());
        }
        let mut numbers = flat(&read_json(out)?);
        for (name, of) in &stage.numbers {
            let missing = || {
                let known = numbers.keys().filter(|name| !name.ends_with("_stderr")).cloned().collect::<Vec<_>>();
                Error::file(
                    &self.recipe.path,
                    format!("{}: numbers: {name}: there is no {of:?}; there are {}", stage.name, known.join(", ")),
                )
            };
            let value = *numbers.get(of).ok_or_else(missing)?;
            numbers.insert(name.clone(), value);
        }
        Ok(numbers)
    }

    /// What the gate of a job's stage says against it.
    pub fn gate(&self, made: usize) -> Option<String> {
        let gate = self.stage(made).require.as_ref()?;
        let wrong = match self.numbers(made) {
            Ok(numbers) => gate.check(&numbers).err()?,
            Err(error) => error.to_string(),
        };
        Some(format!("the gate is closed: {wrong}"))
    }
}

fn version() -> String {
    format!("cuvee {}", env!("CARGO_PKG_VERSION"))
}

/// What `cuvee eval --json` says of its one model: numbers as they are, of tasks as TASK/METRIC, of pairs by their names.
fn flat(json: &serde_json::Value) -> Metrics {
    let mut numbers = Metrics::new();
    let mut add = |before: &str, of: &serde_json::Value| {
        let all = of.as_object().into_iter().flatten();
        numbers.extend(all.filter_map(|(name, value)| Some((format!("{before}{name}"), value.as_f64()?))));
    };
    add("", json);
    add("", &json["numbers"]);
    for (task, of) in json["models"][0]["tasks"].as_object().into_iter().flatten() {
        add(&format!("{task}/"), of);
    }
    numbers
}

/// A hash of what a file holds and, of a TOML file, of the files that it names; of a folder, of its files.
fn content(path: &Path, known: &mut BTreeMap<PathBuf, String>) -> Result<String> {
    if let Some(hash) = known.get(path) {
        return Ok(hash.clone());
    }
    let mut hasher = blake3::Hasher::new();
    let of_file = |path: &Path, hasher: &mut blake3::Hasher| -> Result<()> {
        hasher.update_reader(fs::File::open(path).at(path)?).map(drop).at(path)
    };
    if fs::metadata(path).at(path)?.is_dir() {
        let mut entries: Vec<PathBuf> = fs::read_dir(path)
            .at(path)?
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<Result<_, _>>()
            .at(path)?;
        entries.sort();
        for entry in entries.iter().filter(|entry| entry.is_file()) {
            hasher.update(entry.file_name().expect("an entry has a name").as_encoded_bytes());
            of_file(entry, &mut hasher)?;
        }
    } else {
        of_file(path, &mut hasher)?;
        if path.extension().is_some_and(|extension| extension == "toml") {
            let table: Table = fs::read_to_string(path).at(path)?.parse().at(path)?;
            let folder = path.parent().unwrap_or(Path::new(""));
            let mut named = Vec::new();
            texts(&Value::Table(table), &mut named);
            for other in named.iter().map(|text| folder.join(text)).filter(|other| other.exists() && other != folder) {
                hasher.update(content(&other, known)?.as_bytes());
            }
        }
    }
    let hash = hasher.finalize().to_hex()[..16].to_string();
    known.insert(path.to_path_buf(), hash.clone());
    Ok(hash)
}

/// Every text in a value.
fn texts(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::String(text) if !text.is_empty() => found.push(text.clone()),
        Value::Array(values) => values.iter().for_each(|value| texts(value, found)),
        Value::Table(table) => table.iter().for_each(|(_, value)| texts(value, found)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_is_what_files_hold_and_not_when_they_were_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let hash = |name: &str| content(&path(name), &mut BTreeMap::new()).unwrap();
        fs::create_dir(path("m")).unwrap();
        fs::write(path("m/a"), "1").unwrap();
        fs::write(path("words.tsv"), "good 1").unwrap();
        fs::write(path("r.toml"), "[[reward]]\nkind = 'lexicon'\nfile = 'words.tsv'\n").unwrap();
        let before = (hash("m"), hash("r.toml"));
        fs::write(path("m/a"), "1").unwrap();
        assert_eq!((hash("m"), hash("r.toml")), before);
        fs::write(path("m/a"), "2").unwrap();
        fs::write(path("words.tsv"), "good 2").unwrap();
        assert!(hash("m") != before.0 && hash("r.toml") != before.1);
        assert!(content(&path("none"), &mut BTreeMap::new()).is_err());
    }

    #[test]
    fn numbers_of_every_kind_of_evaluation_have_names() {
        let numbers = |json: &str| flat(&serde_json::from_str(json).unwrap());
        assert_eq!(numbers(r#"{"accuracy": 0.5, "margin": null}"#), Metrics::from([("accuracy".into(), 0.5)]));
        assert_eq!(numbers(r#"{"model": "m", "prompts": 3, "numbers": {"reward": 1}}"#)["reward"], 1.0);
        assert_eq!(numbers(r#"{"models": [{"model": "m", "tasks": {"x": {"nll": 2}}}]}"#)["x/nll"], 2.0);
    }
}
