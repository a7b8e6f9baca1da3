//! Recipes of `cuvee run`: stages by name, each a command of this program. What one reads is a file, rows of [data.NAME] or what a stage
//! above it made, as `@name`. All that can be wrong with one is found before anything runs.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::data::Slice;
use super::gate::Gate;
use crate::cli::recipe::{self as keys, nearest};
use crate::cli::{Command, parse, train};
use crate::error::{Error, Result};
use crate::train::objective;

const TOP: [&str; 7] = ["output_dir", "seed", "seeds", "threads", "data", "template", "stage"];
/// What a stage has beside the keys of its command.
const OWN: [&str; 6] = ["name", "kind", "like", "require", "numbers", "weights"];
const OF_REPORT: [&str; 2] = ["table", "front"];
/// What is decided for each run.
const DECIDED: [&str; 6] = ["output_dir", "resume_from_checkpoint", "stop_at_step", "out", "json", "threads"];
const SEED: u64 = 42;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Sft,
    Reward,
    Train,
    Soup,
    Eval,
    Lab,
    Report,
}

const KINDS: [(&str, Kind); 7] = [
    ("sft", Kind::Sft),
    ("reward", Kind::Reward),
    ("train", Kind::Train),
    ("soup", Kind::Soup),
    ("eval", Kind::Eval),
    ("lab", Kind::Lab),
    ("report", Kind::Report),
];

/// Commands of `cuvee lab` that are stages, and what each leaves.
const LAB: [(&str, &str); 3] = [("pairs", "jsonl"), ("scale", "toml"), ("best-of-n", "json")];

impl Kind {
    pub fn name(self) -> &'static str {
        KINDS.iter().find(|(_, kind)| *kind == self).expect("all are in it").0
    }

    /// Whether it is a run of `cuvee train`.
    pub fn trains(self) -> bool {
        matches!(self, Self::Sft | Self::Reward | Self::Train)
    }
}

pub struct Recipe {
    pub path: PathBuf,
    pub output_dir: PathBuf,
    /// Each stage is run with this one and those that follow it.
    pub seed: u64,
    pub seeds: u64,
    pub threads: Option<usize>,
    pub slices: Vec<Slice>,
    /// In the order of the file: each stands behind what it reads.
    pub stages: Vec<Stage>,
    pub report: Report,
}

#[derive(Debug)]
pub struct Stage {
    pub name: String,
    pub kind: Kind,
    /// Of a lab: which.
    pub what: &'static str,
    /// One, but of a soup one for each weight, of an evaluation for each model.
    pub variants: Vec<Variant>,
    pub require: Option<Gate>,
    /// Names for numbers that it leaves: (name, what the command calls it).
    pub numbers: Vec<(String, String)>,
}

#[derive(Debug)]
pub struct Variant {
    pub name: String,
    /// By the names of flags; paths as seen from here, or `@name`.
    pub table: Table,
    /// What an evaluation measures; none where that is a folder.
    pub of: Option<(usize, usize)>,
    /// Weight of the last model of a soup.
    pub weight: Option<f64>,
}

/// What is shown at the end.
#[derive(Debug, Default)]
pub struct Report {
    pub name: Option<String>,
    /// Stages whose numbers are the table.
    pub tables: Vec<usize>,
    /// Numbers that soups are drawn by.
    pub front: Option<[Axis; 2]>,
}

/// `gold`, or `-words` where less is better.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Axis {
    pub name: String,
    pub down: bool,
}

impl Axis {
    fn parse(text: &str) -> Self {
        let (name, down) = text.strip_prefix('-').map_or((text, false), |name| (name, true));
        Self { name: name.to_string(), down }
    }
}

/// What `@name` means.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Target {
    Slice(usize),
    /// Stage and variant.
    Made(usize, usize),
}

/// What was typed in place of what the recipe says.
#[derive(Default)]
pub struct Typed {
    pub output_dir: Option<PathBuf>,
    pub seeds: Option<u64>,
}

impl Recipe {
    /// # Errors
    /// What is wrong with the file, by stage and key.
    pub fn read(path: &Path, typed: &Typed) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| keys::unreadable(path, &e))?;
        let table: Table = text.parse().map_err(|e: toml::de::Error| Error::file(path, e.to_string().trim_end()))?;
        Self::of(path, &table, typed).map_err(|detail| Error::file(path, detail))
    }

    fn of(path: &Path, table: &Table, typed: &Typed) -> Result<Self, String> {
        let folder = path.parent().unwrap_or(Path::new(""));
        if let Some(key) = table.keys().find(|key| !TOP.contains(&key.as_str())) {
            let meant = nearest(key, TOP.map(String::from));
            let help = meant
                .map_or("a recipe of `cuvee run` has [[stage]] tables; keys of a run stand in one".into(), |meant| {
                    format!("did you mean {meant:?}?")
                });
            return Err(format!("unknown key {key:?}; {help}"));
        }
        let whole = |key: &str, least: i64| match table.get(key) {
            None => Ok(None),
            Some(value) => {
                let number = value.as_integer().filter(|n| *n >= least).map(|n| n as u64);
                number.map(Some).ok_or(format!("{key}: expected a whole number of {least} or more, found {value}"))
            }
        };
        let output_dir = match (&typed.output_dir, table.get("output_dir")) {
            (Some(dir), _) => dir.clone(),
            (None, Some(Value::String(dir))) if !dir.is_empty() => keys::clean(&folder.join(dir)),
            _ => return Err("output_dir: missing; give a folder for what stages make".into()),
        };
        let mut recipe = Self {
            path: path.to_path_buf(),
            output_dir,
            seed: whole("seed", 0)?.unwrap_or(SEED),
            seeds: typed.seeds.or(whole("seeds", 1)?).unwrap_or(1),
            threads: whole("threads", 1)?.map(|n| n as usize),
            slices: Vec::new(),
            stages: Vec::new(),
            report: Report::default(),
        };
        for (name, slice) in named_tables(table, "data")? {
            let slice = Slice::of(name, slice, folder, &recipe.slices).map_err(|e| format!("[data.{name}]: {e}"))?;
            recipe.slices.push(slice);
        }
        let mut known: Vec<(String, Table)> = Vec::new();
        for (name, template) in named_tables(table, "template")? {
            let template = template.as_table().ok_or(format!("template.{name}: expected a table"))?;
            let template = inherited(template, &known).map_err(|e| format!("template.{name}: {e}"))?;
            known.push((name.clone(), template));
        }
        let stages = match table.get("stage") {
            Some(Value::Array(stages)) => stages,
            _ => return Err("there is no [[stage]]; a recipe of `cuvee run` lists what is to be done".into()),
        };
        for stage in stages {
            let stage = stage.as_table().ok_or("stage: expected tables, each under a line [[stage]]")?;
            let name = name_of(stage)?;
            recipe.add(&name, stage, folder, &mut known).map_err(|e| format!("{name}: {e}"))?;
        }
        recipe.finish()
    }

    /// What only the whole can know.
    fn finish(mut self) -> Result<Self, String> {
        let mut seen = BTreeSet::new();
        let names = self.stages.iter().flat_map(|stage| stage.variants.iter().map(move |v| folder_of(stage, v)));
        if let Some(twin) = names.collect::<Vec<_>>().into_iter().find(|folder| !seen.insert(folder.clone())) {
            return Err(format!("two stages would be in one folder, {}; give them other names", twin.display()));
        }
        if self.report.name.is_none() {
            self.report.tables = (0..self.stages.len()).filter(|at| self.stages[*at].kind == Kind::Eval).collect();
        }
        Ok(self)
    }

    fn add(&mut self, name: &str, own: &Table, folder: &Path, known: &mut Vec<(String, Table)>) -> Result<(), String> {
        if self.stages.iter().any(|stage| stage.name == name) || self.slices.iter().any(|slice| slice.name == name) {
            return Err("this name is taken; give each stage and each [data] one of its own".into());
        }
        let table = inherited(own, known)?;
        let (kind, what) = kind_of(&table)?;
        let mut rest = table.clone();
        OWN.iter().for_each(|key| drop(rest.remove(*key)));
        if kind == Kind::Report {
            return self.add_report(name, &rest);
        }
        if let Some(key) = rest.keys().find(|key| DECIDED.contains(&key.replace('-', "_").as_str())) {
            return Err(format!("{key}: is what `cuvee run` decides for each stage; drop it"));
        }
        let weights = match (kind, table.get("weights")) {
            (_, None) => None,
            (Kind::Soup, Some(weights)) => Some(weights_of(weights)?),
            (_, Some(_)) => return Err("weights: are for a soup".into()),
        };
        let numbers = numbers_of(kind, &table)?;
        let require = match table.get("require") {
            None => None,
            Some(Value::String(text)) if kind.trains() || kind == Kind::Eval => Some(Gate::parse(text)?),
            Some(Value::String(_)) => {
                return Err(format!(
                    "require: a {} leaves no numbers; put it on an eval stage, or on one that trains with eval_dataset",
                    kind.name()
                ));
            }
            Some(value) => return Err(format!("require: expected a text, as \"gold > 0.2\", found {value}")),
        };
        if let (Some(gate), Kind::Eval) = (&require, kind)
            && let Some(unknown) =
                gate.names().find(|name| !numbers.is_empty() && !numbers.iter().any(|(n, _)| n == name))
        {
            let all: Vec<String> = numbers.iter().map(|(name, _)| name.clone()).collect();
            return Err(format!("require: there is no {unknown:?} in numbers; there are {}", all.join(", ")));
        }
        match kind {
            Kind::Sft => drop(rest.insert("objective".into(), "sft".into())),
            Kind::Reward => drop(rest.insert("objective".into(), "reward".into())),
            _ => {}
        }
        let variants = self.variants(name, kind, rest, weights)?;
        let mut stage = Stage { name: name.to_string(), kind, what, variants, require, numbers };
        for variant in &mut stage.variants {
            variant.table = keys::resolve(&stage.kind.command(what), &variant.table, folder, &OWN)?;
            self.check(kind, what, &variant.table)?;
        }
        self.stages.push(stage);
        known.push((name.to_string(), table));
        Ok(())
    }

    fn variants(
        &self,
        name: &str,
        kind: Kind,
        table: Table,
        weights: Option<Vec<f64>>,
    ) -> Result<Vec<Variant>, String> {
        let one = |name: String, table: Table, of, weight| Variant { name, table, of, weight };
        if let Some(weights) = weights {
            let texts = |value: &Value| value.as_str().map(String::from);
            let models: Option<Vec<String>> =
                table.get("model").and_then(Value::as_array).and_then(|models| models.iter().map(texts).collect());
            let Some([first, second]) = models.as_deref() else {
                return Err("weights: are of the second of two models, as model = [\"@a\", \"@b\"]".into());
            };
            let of = |weight: f64| {
                let mut table = table.clone();
                let models = [format!("{first}={}", 1.0 - weight), format!("{second}={weight}")];
                table.insert("model".into(), models.map(Value::from).to_vec().into());
                one(format!("{name} {weight}"), table, None, Some(weight))
            };
            return Ok(weights.into_iter().map(of).collect());
        }
        if kind != Kind::Eval {
            return Ok(vec![one(name.to_string(), table, None, None)]);
        }
        let models = match table.get("model") {
            Some(Value::Array(models)) => models.clone(),
            Some(model) => vec![model.clone()],
            None => return Err("model: missing; name what is measured, as model = [\"@sft\", \"@dpo\"]".into()),
        };
        let mut variants = Vec::new();
        for model in models {
            let text = model.as_str().ok_or(format!("model: expected texts, found {model}"))?;
            let with = |model: Value| {
                let mut table = table.clone();
                table.insert("model".into(), model);
                table
            };
            match self.targets(text)? {
                None => variants.push(one(last_part(text), with(model.clone()), None, None)),
                Some((targets, _)) => {
                    for target in targets {
                        let Target::Made(stage, variant) = target else {
                            return Err(format!("model: {text} are rows, not a model"));
                        };
                        let Variant { name, weight, .. } = &self.stages[stage].variants[variant];
                        let table = with(format!("@{name}").into());
                        variants.push(one(name.clone(), table, Some((stage, variant)), *weight));
                    }
                }
            }
        }
        Ok(variants)
    }

    fn add_report(&mut self, name: &str, table: &Table) -> Result<(), String> {
        if let Some(other) = &self.report.name {
            return Err(format!("there is a report already, {other}"));
        }
        if let Some(key) = table.keys().find(|key| !OF_REPORT.contains(&key.as_str())) {
            let meant = nearest(key, OF_REPORT.map(String::from));
            let help =
                meant.map_or(format!("a report has {}", OF_REPORT.join(", ")), |m| format!("did you mean {m:?}?"));
            return Err(format!("unknown key {key:?}; {help}"));
        }
        let tables = match table.get("table") {
            Some(Value::Array(tables)) => tables.clone(),
            Some(one) => vec![one.clone()],
            None => return Err("table: missing; name eval stages, as table = \"@measured\"".into()),
        };
        let stage = |value: &Value| {
            let text = value.as_str().and_then(|text| text.strip_prefix('@'));
            let found =
                self.stages.iter().position(|stage| stage.kind == Kind::Eval && Some(stage.name.as_str()) == text);
            found.ok_or(format!("table: expected an eval stage above it as \"@name\", found {value}"))
        };
        let tables = tables.iter().map(stage).collect::<Result<_, _>>()?;
        let front =
            match table.get("front") {
                None => None,
                Some(Value::Array(two)) => match &two.iter().filter_map(Value::as_str).collect::<Vec<_>>()[..] {
                    [x, y] => Some([Axis::parse(x), Axis::parse(y)]),
                    _ => return Err("front: expected two names of numbers".into()),
                },
                Some(_) => return Err(
                    "front: expected two names of numbers, as front = [\"-words\", \"gold\"], - where less is better"
                        .into(),
                ),
            };
        self.report = Report { name: Some(name.to_string()), tables, front };
        Ok(())
    }

    /// What a path that starts with `@` means, and what follows it, such as a weight; none of another path.
    pub fn targets<'t>(&self, path: &'t str) -> Result<Option<(Vec<Target>, &'t str)>, String> {
        let Some(text) = path.strip_prefix('@') else { return Ok(None) };
        let mut names: Vec<(&str, Vec<Target>)> =
            self.slices.iter().enumerate().map(|(at, slice)| (slice.name.as_str(), vec![Target::Slice(at)])).collect();
        for (at, stage) in self.stages.iter().enumerate() {
            let all = (0..stage.variants.len()).map(|variant| Target::Made(at, variant));
            names.push((&stage.name, all.clone().collect()));
            let each = stage.variants.iter().zip(all).filter(|_| stage.variants.len() > 1 && stage.kind != Kind::Eval);
            names.extend(each.map(|(variant, target)| (variant.name.as_str(), vec![target])));
        }
        let rest = |name: &str| text.strip_prefix(name).filter(|rest| rest.is_empty() || rest.starts_with('='));
        // Names may hold what weights start with; the longest that fits is meant.
        let found = names.iter().filter_map(|(name, targets)| Some((rest(name)?, targets)));
        match found.min_by_key(|(rest, _)| rest.len()) {
            Some((rest, targets)) => Ok(Some((targets.clone(), rest))),
            None => {
                let meant = nearest(text, names.iter().map(|(name, _)| name.to_string()));
                let help =
                    meant.map_or("a stage stands behind what it reads".into(), |m| format!("did you mean \"@{m}\"?"));
                Err(format!("there is no stage or data {path} above it; {help}"))
            }
        }
    }

    /// The one thing that a path means.
    pub fn target<'t>(&self, path: &'t str) -> Result<Option<(Target, &'t str)>, String> {
        match self.targets(path)? {
            None => Ok(None),
            Some((targets, rest)) => match targets[..] {
                [one] => Ok(Some((one, rest))),
                _ => Err(format!("{path} is {} things; name one of them, as a variant is called", targets.len())),
            },
        }
    }

    /// Parses a stage as the command that it will be.
    fn check(&self, kind: Kind, what: &str, table: &Table) -> Result<(), String> {
        let mut folder = |path: &str| match self.target(path) {
            Ok(Some((Target::Slice(at), rest))) => Ok(format!("data-{at}{rest}")),
            Ok(Some((Target::Made(stage, variant), rest))) => Ok(format!("made-{stage}-{variant}{rest}")),
            Ok(None) => Ok(path.to_string()),
            Err(detail) => Err(Error::option("", detail)),
        };
        let table = keys::with_paths(&kind.command(what), table, &mut folder);
        let table = table.map_err(|e| e.to_string().trim_start_matches(": ").to_string())?;
        let start = kind.words(what).into_iter().chain(kind.output(what, Path::new("x")));
        let args = std::iter::once("cuvee".into()).chain(start).chain(keys::flags_of(&table));
        let cli = parse(args).map_err(|failure| failure.into_text())?;
        if let Command::Train(args) = &cli.command {
            let settings = train::from_run(&args.run, false).map_err(|e| e.to_string())?;
            settings.optimizer.build().map_err(|e| e.to_string())?;
            objective(&settings).map_err(|e| e.to_string())?;
        }
        Ok(())
    }
}

impl Kind {
    /// The command whose flags are its keys.
    pub fn command(self, what: &str) -> clap::Command {
        match self {
            Self::Sft | Self::Reward | Self::Train => keys::train(),
            Self::Soup => keys::subcommand("soup"),
            Self::Eval | Self::Report => keys::subcommand("eval"),
            Self::Lab => keys::subcommand_of("lab", what),
        }
    }

    /// What is typed behind `cuvee`.
    pub fn words(self, what: &str) -> Vec<OsString> {
        let words: &[&str] = match self {
            Self::Sft | Self::Reward | Self::Train => &["train"],
            Self::Soup => &["soup"],
            Self::Eval | Self::Report => &["eval", "--json"],
            Self::Lab if what == "best-of-n" => &["lab", what, "--json"],
            Self::Lab => &["lab", what],
        };
        words.iter().map(OsString::from).collect()
    }

    /// The flag that says where its result goes; none of what prints it.
    pub fn output(self, what: &str, path: &Path) -> Option<OsString> {
        match self {
            Self::Eval | Self::Report => None,
            Self::Lab if what == "best-of-n" => None,
            Self::Lab => Some(crate::cli::compare::flag("out", path)),
            _ => Some(crate::cli::compare::flag("output-dir", path)),
        }
    }
}

/// Where a variant is, in the output folder.
pub fn folder_of(stage: &Stage, variant: &Variant) -> PathBuf {
    let plain = |name: &str| name.replace(|c: char| !c.is_ascii_alphanumeric() && !"-_.+".contains(c), "-");
    match stage.kind {
        Kind::Eval => PathBuf::from(plain(&stage.name)).join(plain(&variant.name)),
        _ => PathBuf::from(plain(&variant.name)),
    }
}

fn named_tables<'t>(table: &'t Table, key: &str) -> Result<Vec<(&'t String, &'t Value)>, String> {
    match table.get(key) {
        None => Ok(Vec::new()),
        Some(Value::Table(tables)) => Ok(tables.iter().collect()),
        Some(_) => Err(format!("{key}: expected tables with names, each under a line [{key}.NAME]")),
    }
}

fn name_of(stage: &Table) -> Result<String, String> {
    match stage.get("name") {
        Some(Value::String(name)) if !name.is_empty() && !name.starts_with('@') && !name.contains('=') => {
            Ok(name.clone())
        }
        Some(name) => Err(format!("name: expected a text that does not start with @ and holds no =, found {name}")),
        None => Err("a stage has no name; every [[stage]] needs name = \"...\" and kind = \"...\"".into()),
    }
}

/// With what it takes over from templates and stages above it.
fn inherited(own: &Table, known: &[(String, Table)]) -> Result<Table, String> {
    let names = match own.get("like") {
        None => Vec::new(),
        Some(Value::Array(names)) => names.clone(),
        Some(name) => vec![name.clone()],
    };
    let mut table = Table::new();
    for name in names {
        let text = name.as_str().ok_or(format!("like: expected names, found {name}"))?;
        let Some((_, like)) = known.iter().find(|(known, _)| known == text) else {
            let meant = nearest(text, known.iter().map(|(name, _)| name.clone()));
            let help =
                meant.map_or("name a [template.NAME] or a stage above it".into(), |m| format!("did you mean {m:?}?"));
            return Err(format!("like: there is no {text:?}; {help}"));
        };
        table.extend(like.clone().into_iter().filter(|(key, _)| !["name", "like", "require"].contains(&key.as_str())));
    }
    table.extend(own.clone());
    Ok(table)
}

/// And of a lab which.
fn kind_of(table: &Table) -> Result<(Kind, &'static str), String> {
    let known = || {
        let plain = KINDS.iter().filter(|(_, kind)| *kind != Kind::Lab).map(|(name, _)| name.to_string());
        plain.chain(LAB.iter().map(|(name, _)| format!("lab {name}"))).collect::<Vec<_>>()
    };
    let text = match table.get("kind") {
        None => return Err(format!("kind: missing; type kind = \"...\", one of {}", known().join(", "))),
        Some(Value::String(text)) => text,
        Some(value) => return Err(format!("kind: expected one of {}, found {value}", known().join(", "))),
    };
    let lab = LAB.iter().find(|(name, _)| text.strip_prefix("lab ") == Some(name));
    match (KINDS.iter().find(|(name, kind)| name == text && *kind != Kind::Lab), lab) {
        (Some((_, kind)), _) => Ok((*kind, "")),
        (None, Some((what, _))) => Ok((Kind::Lab, what)),
        (None, None) => {
            let meant = nearest(text, known()).map_or(String::new(), |meant| format!("did you mean {meant:?}? "));
            Err(format!("kind: there is none called {text:?}; {meant}known are {}", known().join(", ")))
        }
    }
}

/// What a result of a lab ends in.
pub fn extension(what: &str) -> &'static str {
    LAB.iter().find(|(name, _)| *name == what).map_or("", |(_, extension)| extension)
}

fn weights_of(value: &Value) -> Result<Vec<f64>, String> {
    let number = |value: &Value| value.as_float().or(value.as_integer().map(|n| n as f64));
    let all: Option<Vec<f64>> = value.as_array().map(|all| all.iter().filter_map(number).collect());
    let same = |all: &Vec<f64>| Some(all.len()) == value.as_array().map(Vec::len) && !all.is_empty();
    let all = all.filter(|all| same(all) && all.iter().all(|w| (0.0..=1.0).contains(w)));
    all.ok_or(format!("weights: expected numbers from 0 to 1, what the second model counts, found {value}"))
}

fn numbers_of(kind: Kind, table: &Table) -> Result<Vec<(String, String)>, String> {
    let wrong = || "numbers: expected a table of names, as { gold = \"reward\", tax = \"nll\" }".to_string();
    match table.get("numbers") {
        None => Ok(Vec::new()),
        Some(_) if kind != Kind::Eval => Err("numbers: are for an eval stage".into()),
        Some(Value::Table(numbers)) => {
            let named = |(name, of): (&String, &Value)| Ok((name.clone(), of.as_str().ok_or_else(wrong)?.to_string()));
            numbers.iter().map(named).collect()
        }
        Some(_) => Err(wrong()),
    }
}

/// The last part of a path.
fn last_part(path: &str) -> String {
    Path::new(path).file_name().map_or(path.to_string(), |name| name.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECIPE: &str = "
output_dir = 'out'
[data.policy]
file = 'train.jsonl'
skip = 4
[template.short]
dataset = '@policy'
max_steps = 2
[[stage]]
name = 'sft'
kind = 'sft'
like = 'short'
model = 'model'
[[stage]]
name = 'dpo'
kind = 'train'
like = 'short'
model = '@sft'
objective = 'sigmoid'
beta = 0.1
[[stage]]
name = 'soup'
kind = 'soup'
model = ['@sft', '@dpo']
weights = [0.5, 1]
[[stage]]
name = 'measured'
kind = 'eval'
model = ['@sft', '@soup']
prompts = 'p.jsonl'
require = 'long > 1'
numbers = { long = 'words' }
";

    fn read(text: &str) -> Result<Recipe, String> {
        Recipe::of(Path::new("recipes/x.toml"), &text.parse().unwrap(), &Typed::default())
    }

    #[test]
    fn a_recipe_is_read() {
        let recipe = read(RECIPE).unwrap();
        assert_eq!((recipe.output_dir.to_str(), recipe.seed, recipe.seeds), (Some("recipes/out"), 42, 1));
        let names = |stage: &Stage| stage.variants.iter().map(|v| v.name.clone()).collect::<Vec<_>>();
        assert_eq!(names(&recipe.stages[2]), ["soup 0.5", "soup 1"]);
        assert_eq!(names(&recipe.stages[3]), ["sft", "soup 0.5", "soup 1"]);
        assert_eq!(recipe.stages[3].variants[1].of, Some((2, 0)));
        let soup = &recipe.stages[2].variants[0].table["model"];
        assert_eq!(soup.as_array().unwrap()[1].as_str(), Some("@dpo=0.5"));
        assert_eq!(recipe.stages[0].variants[0].table["model"].as_str(), Some("recipes/model"));
        assert_eq!(recipe.report.tables, [3]);
        let variant = &recipe.stages[3].variants[1];
        assert_eq!(folder_of(&recipe.stages[3], variant), Path::new("measured/soup-0.5"));
        assert_eq!(recipe.target("@soup 0.5=2"), Ok(Some((Target::Made(2, 0), "=2"))));
        assert!(recipe.target("@soup").unwrap_err().contains("is 2 things"));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (from, to, expected) in [
            ("output_dir = 'out'", "", "output_dir: missing"),
            ("output_dir", "seeeds = 3\noutput_dir", "unknown key \"seeeds\"; did you mean \"seeds\"?"),
            ("output_dir", "seeds = 0\noutput_dir", "seeds: expected a whole number of 1 or more, found 0"),
            ("kind = 'soup'", "kind = 'soop'", "soup: kind: there is none called \"soop\"; did you mean \"soup\"?"),
            ("kind = 'soup'\n", "", "soup: kind: missing; type kind = \"...\", one of sft, reward"),
            ("'@policy'", "'@polisy'", "there is no stage or data @polisy above it; did you mean \"@policy\"?"),
            (
                "model = '@sft'",
                "model = '@sfd'",
                "dpo: there is no stage or data @sfd above it; did you mean \"@sft\"?",
            ),
            ("model = '@sft'", "model = '@measured'", "dpo: there is no stage or data @measured above it"),
            ("max_steps = 2", "max_stebs = 2", "unknown key \"max_stebs\"; did you mean \"max_steps\"?"),
            ("max_steps = 2", "output_dir = 'x'", "output_dir: is what `cuvee run` decides"),
            ("like = 'short'", "like = 'shord'", "like: there is no \"shord\"; did you mean \"short\"?"),
            ("name = 'dpo'", "name = 'sft'", "this name is taken"),
            ("name = 'dpo'\n", "", "a stage has no name"),
            ("beta = 0.1", "beta = 0.1\nrequire = 3", "require: expected a text"),
            ("weights = [0.5, 1]", "weights = [0.5, 2]", "weights: expected numbers from 0 to 1"),
            ("weights = [0.5, 1]", "weights = [0.5]\nrequire = 'a > 1'", "require: a soup leaves no numbers"),
            ("'long > 1'", "'lonk > 1'", "require: there is no \"lonk\" in numbers; there are long"),
            ("beta = 0.1", "", "beta"),
        ] {
            assert!(RECIPE.contains(from), "{from}");
            let message = read(&RECIPE.replacen(from, to, 1)).err().unwrap_or_else(|| panic!("{to}"));
            assert!(message.contains(expected), "{to}: {message}");
        }
        for (more, expected) in [
            ("kind = 'lab'\nmodel = '@sft'", "kind: there is none called \"lab\""),
            (
                "kind = 'lab bairs'\nmodel = '@sft'",
                "did you mean \"lab pairs\"? known are sft, reward, train, soup, eval, report, lab pairs",
            ),
            ("kind = 'report'\ntable = '@sft'", "table: expected an eval stage above it"),
            ("kind = 'report'\ntable = '@measured'\nfrond = 1", "unknown key \"frond\"; did you mean \"front\"?"),
            ("kind = 'eval'\nprompts = 'p'", "model: missing"),
            ("kind = 'eval'\nprompts = 'p'\nmodel = '@policy'", "model: @policy are rows"),
        ] {
            let message =
                read(&format!("{RECIPE}[[stage]]\nname = 'more'\n{more}\n")).err().unwrap_or_else(|| panic!("{more}"));
            assert!(message.contains(expected), "{more}: {message}");
        }
        assert!(read("output_dir = 'x'").err().unwrap().contains("there is no [[stage]]"));
    }
}
