//! Recipes of experiments: tables of `cuvee train` with names, from which runs start, and grids. All that can be wrong with one
//! is found before anything runs.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::ArgMatches;
use toml::{Table, Value};

use super::measure::Measure;
use crate::cli::{Command, is_given, parse, recipe, train};
use crate::error::{Error, Result};
use crate::lab::Halving;
use crate::train::objective as train_objective;
use crate::{merge, objectives, optim};

/// What a recipe of an experiment has beside the keys of `cuvee train`.
const KEYS: [&str; 5] = ["seeds", "prepare", "arm", "measure", "halving"];
/// And a run of it.
const RUN_KEYS: [&str; 5] = ["name", "grid", "merge", "pairs", "shared"];
/// What is decided for each run.
const DECIDED: [&str; 4] = ["output_dir", "seed", "resume_from_checkpoint", "stop_at_step"];
const SEED: u64 = 42;

/// A recipe, with its grids expanded.
#[derive(Debug, Clone, PartialEq)]
pub struct Experiment {
    pub recipe: PathBuf,
    pub output_dir: PathBuf,
    /// Each arm is run with this one and those that follow it.
    pub seed: u64,
    pub seeds: u64,
    /// Processes at a time.
    pub jobs: usize,
    /// CPU threads of all together.
    pub threads: Option<usize>,
    pub json: bool,
    /// In an order in which each comes behind what it needs.
    pub variants: Vec<Variant>,
    pub measure: Measure,
    /// Of a sweep whose cells race.
    pub halving: Option<Halving>,
}

/// A run but for its seed.
#[derive(Debug, Clone, PartialEq)]
pub struct Variant {
    pub name: String,
    /// The name without what the grid adds.
    pub method: String,
    pub point: String,
    /// Others start from it; it is measured, and no candidate.
    pub prepared: bool,
    /// One run for all seeds.
    pub shared: bool,
    pub what: What,
    /// Places in the list.
    pub needs: Vec<usize>,
    /// Trains what writes no text: a reward model.
    pub scores: bool,
}

/// By the names of flags; paths as seen from here, or `@name` for what another run made.
#[derive(Debug, Clone, PartialEq)]
pub enum What {
    Train(Table),
    Merge(Table),
    /// Pairs that a gold reward labels: a file to train on.
    Pairs(Table),
}

/// `--grid KEY=V,V..`
#[derive(Debug, Clone, PartialEq)]
pub struct Grid {
    pub key: String,
    pub values: Vec<Value>,
}

pub fn grid(text: &str) -> Result<Grid, String> {
    let value = |text: &str| match text {
        "true" | "false" => Value::Boolean(text == "true"),
        _ => recipe::number(text),
    };
    match text.split_once('=') {
        Some((key, values)) if !key.is_empty() && values.split(',').all(|value| !value.is_empty()) => {
            Ok(Grid { key: key.replace('-', "_"), values: values.split(',').map(value).collect() })
        }
        _ => Err("expected a key and its values, such as merge_weight=1e-7,1e-5,1e-3".into()),
    }
}

impl What {
    pub fn command(&self) -> clap::Command {
        match self {
            Self::Train(_) => recipe::subcommand("train"),
            Self::Merge(_) => recipe::subcommand("merge"),
            Self::Pairs(_) => recipe::subcommand_of("lab", "pairs"),
        }
    }

    pub fn table(&self) -> &Table {
        match self {
            Self::Train(table) | Self::Merge(table) | Self::Pairs(table) => table,
        }
    }
}

/// What a path that starts with `@` names, with its place and what follows it, such as a weight.
pub fn reference<'v, 't>(variants: &'v [Variant], text: &'t str) -> Option<Result<(usize, &'t str), &'v str>> {
    let text = text.strip_prefix('@')?;
    let rest = |variant: &Variant| {
        text.strip_prefix(variant.name.as_str()).filter(|rest| rest.is_empty() || rest.starts_with('='))
    };
    // Names may hold what weights start with; the longest that fits is meant.
    let found = variants.iter().enumerate().filter_map(|(at, variant)| Some((at, rest(variant)?)));
    let found = found.min_by_key(|(_, rest)| rest.len());
    Some(found.ok_or_else(|| {
        let likeness = |variant: &&Variant| strsim::jaro_winkler(&variant.name, text);
        let nearest = variants.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
        nearest.map_or("", |variant| variant.name.as_str())
    }))
}

impl Experiment {
    /// None where the file lists no runs: then it is a recipe of `cuvee train`.
    pub fn read(path: &Path, flags: &ArgMatches) -> Result<Option<Self>> {
        let text = std::fs::read_to_string(path).map_err(|e| recipe::unreadable(path, &e))?;
        let table: Table = text.parse().map_err(|e: toml::de::Error| Error::file(path, e.to_string().trim_end()))?;
        if KEYS[1..].iter().all(|key| !table.contains_key(*key)) {
            return Ok(None);
        }
        Self::of(path, &table, flags).map(Some)
    }

    /// Of what a file at `path` says.
    pub fn of(path: &Path, table: &Table, flags: &ArgMatches) -> Result<Self> {
        let in_file = |detail: String| Error::file(path, detail);
        if is_given(flags, "pairs") {
            return Err(Error::option("--pairs", "is for comparing references; here, arms with `limit` do it"));
        }
        let folder = path.parent().unwrap_or(Path::new(""));
        let train = recipe::train();
        let mut top = table.clone();
        KEYS.iter().for_each(|key| drop(top.remove(*key)));
        let mut top = recipe::resolve(&train, &top, folder, &KEYS).map_err(in_file)?;
        top.extend(recipe::typed(&train, flags));
        let grids = flags.get_many::<Grid>("grid").into_iter().flatten().cloned().collect();
        let (used, wanted, variants) = (BTreeSet::new(), wanted(flags), Vec::new());
        let mut reader = Reader { folder, top: &top, train: &train, grids, used, wanted, variants };
        for (key, prepared) in [("prepare", true), ("arm", false)] {
            for entry in tables(table, key).map_err(in_file)? {
                reader.add(entry, prepared).map_err(in_file)?;
            }
        }
        let Reader { grids, used, variants, .. } = reader;
        if let Some(unused) = grids.iter().find(|grid| !used.contains(&grid.key)) {
            let detail = format!("no arm takes {}; name a key that one does", unused.key);
            return Err(Error::option("--grid", detail));
        }
        let measure = match table.get("measure") {
            None => Measure::default(),
            Some(Value::Table(measure)) => {
                Measure::read(measure, folder).map_err(|e| in_file(format!("[measure]: {e}")))?
            }
            Some(_) => return Err(in_file("measure: expected a table, as [measure]".into())),
        };
        let halving = table.get("halving").map(|halving| {
            let halving: Halving = halving.clone().try_into().map_err(|e: toml::de::Error| e.message().to_string())?;
            halving.check().map(|()| halving)
        });
        let halving = halving.transpose().map_err(|e| in_file(format!("[halving]: {e}")))?;
        let mut experiment = Self::whole(path, table, &top, flags, measure).map_err(in_file)?;
        experiment.halving = halving;
        experiment.variants = ordered(chosen(variants, flags)?).map_err(in_file)?;
        experiment.check().map_err(in_file)?;
        Ok(experiment)
    }

    /// All but the runs.
    fn whole(path: &Path, table: &Table, top: &Table, flags: &ArgMatches, measure: Measure) -> Result<Self, String> {
        let Some(output_dir) = top.get("output_dir").and_then(Value::as_str) else {
            return Err("output_dir: missing; give a folder for the table and the runs".into());
        };
        let whole = |value: &Value| value.as_integer().filter(|n| *n > 0).map(|n| n as u64);
        let typed = *flags.get_one::<u64>("seeds").expect("it has a default");
        let seeds = match table.get("seeds") {
            Some(seeds) if !is_given(flags, "seeds") => {
                whole(seeds).ok_or(format!("seeds: expected a whole number of 1 or more, found {seeds}"))?
            }
            _ => typed,
        };
        let number = |key: &str| top.get(key).and_then(Value::as_integer);
        Ok(Self {
            recipe: path.to_path_buf(),
            output_dir: PathBuf::from(output_dir),
            seed: number("seed").map_or(SEED, |seed| seed as u64),
            seeds,
            jobs: flags.get_one::<usize>("jobs").copied().unwrap_or(1),
            threads: number("threads").map(|n| n as usize),
            json: flags.get_flag("json"),
            variants: Vec::new(),
            measure,
            halving: None,
        })
    }

    /// Parses every run as the command that it will be, and looks up what is measured.
    fn check(&mut self) -> Result<(), String> {
        let mut seen = BTreeSet::new();
        for at in 0..self.variants.len() {
            let folder = self.variants[at].folder();
            if !seen.insert(folder.clone()) {
                return Err(format!("two runs would be in one folder, {folder}; give them other names"));
            }
            let scores =
                self.variants[at].parses(&self.variants).map_err(|e| format!("{}: {e}", self.variants[at].name))?;
            self.variants[at].scores = scores;
        }
        if self.variants.iter().all(|variant| variant.prepared) {
            return Err("there is nothing to compare; list runs as [[arm]]".into());
        }
        self.measure.check().map_err(|e| format!("[measure]: {e}"))?;
        let measure = &mut self.measure;
        if measure.baseline.is_empty() {
            let first = self.variants.iter().find(|variant| !variant.prepared).expect("there is one");
            measure.baseline = format!("@{}", first.name);
        }
        for (key, text) in [("baseline", Some(&measure.baseline)), ("reward_model", measure.reward_model.as_ref())] {
            let Some(text) = text else { continue };
            match reference(&self.variants, text) {
                Some(Err(nearest)) => {
                    return Err(format!("[measure]: {key}: there is no run {text}; did you mean \"@{nearest}\"?"));
                }
                None if key == "baseline" => {
                    return Err(format!(
                        "[measure]: baseline: expected a run of this recipe as \"@name\", found {text:?}"
                    ));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn tables<'t>(table: &'t Table, key: &str) -> Result<Vec<&'t Table>, String> {
    let wrong = || format!("{key}: expected tables, each under a line [[{key}]]");
    match table.get(key) {
        None => Ok(Vec::new()),
        Some(Value::Array(entries)) => entries.iter().map(|entry| entry.as_table().ok_or_else(wrong)).collect(),
        Some(_) => Err(wrong()),
    }
}

/// What `--arms` names.
fn wanted(flags: &ArgMatches) -> Vec<String> {
    flags.get_many("arms").into_iter().flatten().cloned().collect()
}

/// The arms that are wanted, and what they start from.
fn chosen(variants: Vec<Variant>, flags: &ArgMatches) -> Result<Vec<Variant>> {
    let wanted = wanted(flags);
    let is = |variant: &Variant, name: &String| variant.name == *name || variant.method == *name;
    if let Some(unknown) = wanted.iter().find(|name| !variants.iter().any(|v| !v.prepared && is(v, name))) {
        let mut known: Vec<&str> = variants.iter().filter(|v| !v.prepared).map(|v| v.method.as_str()).collect();
        known.dedup();
        return Err(Error::option("--arms", format!("there is no arm {unknown:?}; there are {}", known.join(", "))));
    }
    let is_wanted = |v: &Variant| v.prepared || wanted.is_empty() || wanted.iter().any(|name| is(v, name));
    let mut kept: Vec<bool> = variants.iter().map(is_wanted).collect();
    let missing = |at: usize, kept: &[bool]| {
        let needs = if kept[at] { needs(&variants[at], &variants).unwrap_or_default() } else { Vec::new() };
        needs.into_iter().find(|need| !kept[*need])
    };
    while let Some(more) = (0..variants.len()).find_map(|at| missing(at, &kept)) {
        kept[more] = true;
    }
    let mut kept = kept.into_iter();
    Ok(variants.into_iter().filter(|_| kept.next() == Some(true)).collect())
}

/// Reads runs one after the other.
struct Reader<'a> {
    folder: &'a Path,
    top: &'a Table,
    train: &'a clap::Command,
    /// Those that were typed, and the keys of those that some arm took.
    grids: Vec<Grid>,
    used: BTreeSet<String>,
    /// Arms that they are for; none: all.
    wanted: Vec<String>,
    variants: Vec<Variant>,
}

impl Reader<'_> {
    fn add(&mut self, entry: &Table, prepared: bool) -> Result<(), String> {
        let name = match entry.get("name") {
            Some(Value::String(name)) if !name.is_empty() && !name.starts_with('@') => name.clone(),
            Some(name) => return Err(format!("name: expected a text that does not start with @, found {name}")),
            None => return Err("a run has no name; every [[prepare]] and [[arm]] needs name = \"...\"".into()),
        };
        let of_run = |detail: String| format!("{name}: {detail}");
        let shared = match entry.get("shared") {
            None => false,
            Some(Value::Boolean(shared)) if prepared => *shared,
            Some(_) if !prepared => {
                return Err(of_run("shared: is for [[prepare]]; every arm has as many runs as seeds".into()));
            }
            Some(value) => return Err(of_run(format!("shared: expected true or false, found {value}"))),
        };
        let mut rest = entry.clone();
        RUN_KEYS.iter().for_each(|key| drop(rest.remove(*key)));
        let merged = match entry.get("merge") {
            None => None,
            Some(Value::Table(merge)) => Some(merge),
            Some(_) => {
                return Err(of_run("merge: expected a table, as { method = \"linear\", models = [...] }".into()));
            }
        };
        let paired = match entry.get("pairs") {
            None => None,
            Some(Value::Table(pairs)) if prepared && merged.is_none() => Some(pairs),
            Some(Value::Table(_)) => {
                return Err(of_run("pairs: are made for arms to train on; put them under [[prepare]]".into()));
            }
            Some(_) => {
                return Err(of_run("pairs: expected a table, as { model = \"@sft\", prompts = \"...\" }".into()));
            }
        };
        if let (Some(_), Some(key)) = (merged.or(paired), rest.keys().next()) {
            return Err(of_run(format!(
                "{key}: does nothing where nothing is trained; put it into merge or pairs = {{...}}, or drop it"
            )));
        }
        let searched = !prepared && (self.wanted.is_empty() || self.wanted.contains(&name));
        for point in self.points(entry, &rest, merged, searched).map_err(of_run)? {
            let what = match (merged, paired) {
                (Some(merge), _) => self.merged(merge, &point),
                (None, Some(pairs)) => self.paired(pairs, &point),
                (None, None) => self.trained(&rest, &point),
            };
            let what = what.map_err(of_run)?;
            let label: Vec<String> = point.iter().map(|(key, value)| format!("{key}={}", short(value))).collect();
            let label = label.join(" ");
            let whole = if label.is_empty() { name.clone() } else { format!("{name} {label}") };
            if self.variants.iter().any(|variant| variant.name == whole) {
                return Err(format!("two runs are called {whole:?}; give each a name of its own"));
            }
            let (method, needs) = (name.clone(), Vec::new());
            self.variants.push(Variant {
                name: whole,
                method,
                point: label,
                prepared,
                shared,
                what,
                needs,
                scores: false,
            });
        }
        Ok(())
    }

    /// Every combination of a run's grid; of one that is searched, with what was typed in place of what the recipe says.
    fn points(
        &mut self,
        entry: &Table,
        rest: &Table,
        merged: Option<&Table>,
        searched: bool,
    ) -> Result<Vec<Table>, String> {
        let mut grid = Table::new();
        match entry.get("grid") {
            None => {}
            Some(Value::Table(table)) => {
                for (key, values) in table {
                    match values {
                        Value::Array(values) if !values.is_empty() => {
                            grid.insert(key.replace('-', "_"), values.clone().into())
                        }
                        _ => return Err(format!("grid: {key}: expected a list of values, found {values}")),
                    };
                }
            }
            Some(_) => return Err("grid: expected a table, as [arm.grid]".into()),
        }
        for typed in self.grids.iter().filter(|_| searched) {
            if grid.contains_key(&typed.key) || self.takes(rest, merged, &typed.key) {
                self.used.insert(typed.key.clone());
                grid.insert(typed.key.clone(), typed.values.clone().into());
            }
        }
        let mut points = vec![Table::new()];
        for (key, values) in &grid {
            let values = values.as_array().expect("made as one above");
            let with = |point: &Table, value: &Value| {
                let mut point = point.clone();
                point.insert(key.clone(), value.clone());
                point
            };
            points = points.iter().flat_map(|point| values.iter().map(move |value| with(point, value))).collect();
        }
        Ok(points)
    }

    /// Whether a key does something to a run: its optimizer's, its objective's, its method's, or any run's.
    fn takes(&self, rest: &Table, merged: Option<&Table>, key: &str) -> bool {
        if rest.contains_key(key) {
            return true;
        }
        if let Some(merged) = merged {
            let method = merged.get("method").and_then(Value::as_str).and_then(|name| merge::find(name).ok());
            return merged.contains_key(key) || method.is_some_and(|method| method.param(key).is_some());
        }
        if !owners(key).is_empty() {
            return owners(key).iter().any(|owner| self.names(rest).contains(owner));
        }
        recipe::find(self.train, key).is_some()
    }

    /// The objectives and the optimizer of a run.
    fn names(&self, rest: &Table) -> Vec<String> {
        let given = |keys: &[&str]| keys.iter().find_map(|key| rest.get(*key)).or_else(|| self.top.get(keys[0]));
        let objective = match given(&["objective", "loss_type"]) {
            Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).map(String::from).collect(),
            Some(Value::String(name)) => vec![name.clone()],
            _ => Vec::new(),
        };
        let optimizer = given(&["optimizer"]).and_then(Value::as_str).unwrap_or("adamw").to_string();
        // Aliases own what their objectives own.
        let known = |name: String| objectives::find(&name).map_or(name.clone(), |entry| entry.name.to_string());
        objective.into_iter().map(known).chain([optimizer]).collect()
    }

    fn trained(&self, rest: &Table, point: &Table) -> Result<What, String> {
        let mut own = rest.clone();
        own.extend(point.clone());
        if let Some(key) = own.keys().find(|key| DECIDED.contains(&key.replace('-', "_").as_str())) {
            return Err(format!("{key}: is what compare decides for each run; drop it"));
        }
        let own = recipe::resolve(self.train, &own, self.folder, &RUN_KEYS)?;
        // What stands at the top is for all that take it.
        let names = self.names(&own);
        let foreign = |key: &str| !owners(key).is_empty() && owners(key).iter().all(|owner| !names.contains(owner));
        let mut table = self.top.clone();
        table.retain(|key, _| !foreign(key) && !DECIDED.contains(&key));
        table.extend(own);
        Ok(What::Train(table))
    }

    fn merged(&self, merge: &Table, point: &Table) -> Result<What, String> {
        let mut own = merge.clone();
        own.extend(point.clone());
        if let Some(models) = own.remove("models") {
            own.insert("model".into(), models);
        }
        if let Some(key) = ["output_dir", "config", "dry_run", "seed"].into_iter().find(|key| own.contains_key(*key)) {
            return Err(format!("merge: {key}: is what compare decides for each run; drop it"));
        }
        let keys = recipe::resolve(&recipe::subcommand("merge"), &own, self.folder, &["models"]);
        keys.map(What::Merge).map_err(|detail| format!("merge: {detail}"))
    }

    fn paired(&self, pairs: &Table, point: &Table) -> Result<What, String> {
        let mut own = pairs.clone();
        own.extend(point.clone());
        if let Some(key) = ["out", "seed"].into_iter().find(|key| own.contains_key(*key)) {
            return Err(format!("pairs: {key}: is what compare decides for each run; drop it"));
        }
        let keys = recipe::resolve(&recipe::subcommand_of("lab", "pairs"), &own, self.folder, &[]);
        keys.map(What::Pairs).map_err(|detail| format!("pairs: {detail}"))
    }
}

/// Objectives and optimizers that take a parameter; none where it is not one.
fn owners(key: &str) -> Vec<String> {
    let (losses, updates) = (objectives::params(), optim::params());
    let all = [losses.get(key), updates.get(key)];
    all.into_iter().flatten().flat_map(|shared| &shared.owners).map(|name| name.to_string()).collect()
}

/// A value as a person writes it.
fn short(value: &Value) -> String {
    match value {
        Value::Float(x) if *x != 0.0 && (x.abs() < 1e-2 || x.abs() >= 1e5) => format!("{x:e}"),
        Value::Float(x) => x.to_string(),
        Value::String(text) => text.clone(),
        Value::Array(values) => values.iter().map(short).collect::<Vec<_>>().join(","),
        value => value.to_string(),
    }
}

/// Places of the runs that one starts from.
fn needs(variant: &Variant, variants: &[Variant]) -> Result<Vec<usize>, String> {
    let mut found = Vec::new();
    let mut look = |path: &str| {
        match reference(variants, path) {
            Some(Ok((at, _))) => found.push(at),
            Some(Err(nearest)) => {
                let detail = format!("there is no run {path}; did you mean \"@{nearest}\"?");
                return Err(Error::option(&variant.name, detail));
            }
            None => {}
        }
        Ok(path.to_string())
    };
    recipe::with_paths(&variant.what.command(), variant.what.table(), &mut look).map_err(|e| e.to_string())?;
    Ok(found)
}

/// Each behind what it needs.
fn ordered(mut variants: Vec<Variant>) -> Result<Vec<Variant>, String> {
    let needs: Vec<Vec<usize>> = variants.iter().map(|variant| needs(variant, &variants)).collect::<Result<_, _>>()?;
    for (variant, needs) in variants.iter().zip(&needs) {
        if let Some(other) = needs.iter().map(|at| &variants[*at]).find(|other| variant.shared && !other.shared) {
            return Err(format!(
                "{}: is shared by all seeds and starts from {}, which is not",
                variant.name, other.name
            ));
        }
    }
    let mut order: Vec<usize> = Vec::new();
    while order.len() < variants.len() {
        let ready = |at: &usize| !order.contains(at) && needs[*at].iter().all(|need| order.contains(need));
        match (0..variants.len()).find(ready) {
            Some(next) => order.push(next),
            None => return Err(circle(&variants, &needs, &order)),
        }
    }
    variants.iter_mut().zip(needs).for_each(|(variant, needs)| variant.needs = needs);
    let place = |at: &usize| order.iter().position(|other| other == at).expect("all are in it");
    variants.iter_mut().for_each(|variant| variant.needs = variant.needs.iter().map(place).collect());
    let mut variants: Vec<Option<Variant>> = variants.into_iter().map(Some).collect();
    Ok(order.iter().map(|at| variants[*at].take().expect("each is once in it")).collect())
}

/// Follows needs of what could not be put in order until one comes twice.
fn circle(variants: &[Variant], needs: &[Vec<usize>], order: &[usize]) -> String {
    let mut path = vec![(0..variants.len()).find(|at| !order.contains(at)).expect("something is left")];
    loop {
        let next = needs[*path.last().expect("not empty")].iter().find(|need| !order.contains(need)).expect("it waits");
        let start = path.iter().position(|at| at == next);
        path.push(*next);
        if let Some(start) = start {
            let names: Vec<&str> = path[start..].iter().map(|at| variants[*at].name.as_str()).collect();
            return format!("runs start from each other: {}", names.join(" from "));
        }
    }
}

impl Variant {
    /// A name for a folder. Weights are written behind `=`, so there is none in it.
    pub fn folder(&self) -> String {
        self.name.replace(|c: char| !c.is_ascii_alphanumeric() && !"-_.+".contains(c), "-")
    }

    /// Parses the run as a command. Whether it trains a reward model.
    fn parses(&self, variants: &[Variant]) -> Result<bool, String> {
        let command = self.what.command();
        let name = command.get_name().to_string();
        // Any folder does; a name could be taken for one with a weight.
        let mut folder = |path: &str| {
            Ok(match reference(variants, path) {
                Some(Ok((at, rest))) => format!("run-{at}{rest}"),
                _ => path.to_string(),
            })
        };
        let table = recipe::with_paths(&command, self.what.table(), &mut folder).map_err(|e| e.to_string())?;
        let flags = recipe::flags_of(&table);
        let start: Vec<OsString> = match &self.what {
            What::Pairs(_) => ["cuvee", "lab", "pairs", "--out=x"].map(OsString::from).into(),
            _ => vec!["cuvee".into(), name.into(), "--output-dir=x".into()],
        };
        match parse(start.into_iter().chain(flags)) {
            Ok(cli) => match cli.command {
                Command::Train(args) => {
                    let settings = train::from_run(&args.run, false).map_err(|e| e.to_string())?;
                    settings.optimizer.build().map_err(|e| e.to_string())?;
                    train_objective(&settings).map(|objective| objective.needs().scores).map_err(|e| e.to_string())
                }
                // Pairs write no text either.
                _ => Ok(matches!(self.what, What::Pairs(_))),
            },
            Err(failure) => Err(failure.into_text()),
        }
    }
}

/// Flags that do nothing where references are compared.
pub fn only_here(flags: &ArgMatches) -> Option<&'static str> {
    ["grid", "jobs", "json"].into_iter().find(|flag| is_given(flags, flag))
}
