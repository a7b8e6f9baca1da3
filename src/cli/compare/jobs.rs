//! An experiment as processes of this program, and what they leave as a report.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use toml::{Table, Value};

use super::experiment::{Experiment, Variant, What, reference};
use super::measure::{evaluated, logged};
use crate::checkpoint::run_dir;
use crate::cli::lab::summary;
use crate::cli::{print, recipe, train};
use crate::error::{At, Error, Result};
use crate::lab::{
    Arm, Axes, Cell, Job, Makes, Measured, Metrics, Outcome, Race, Report, Runner, Step, SweepPlan, forget,
    write_report,
};
use crate::machine::processor;
use crate::merge;
use crate::progress::say;

const RECIPE: &str = "recipe.toml";
/// Flags that change no result.
const WITHOUT_EFFECT: [&str; 3] = ["threads", "cache_dir", "profile_steps"];

/// One run of a variant.
pub struct Run {
    pub variant: usize,
    /// None: of all seeds.
    seed: Option<u64>,
    pub job: usize,
    eval: Option<usize>,
    /// Where its model is, and where its logs are.
    pub model: PathBuf,
    pub logs: PathBuf,
}

/// Jobs as they are made, each behind what it needs.
pub struct Plan<'a> {
    experiment: &'a Experiment,
    pub jobs: Vec<Job>,
    pub runs: Vec<Run>,
    pub threads: Option<usize>,
}

pub fn run(experiment: &Experiment) -> Result<()> {
    if experiment.halving.is_some() {
        return Err(Error::file(&experiment.recipe, "[halving]: is for `cuvee lab sweep`; here every run is whole"));
    }
    let mut plan = Plan::new(experiment);
    plan.all()?;
    let output = &experiment.output_dir;
    fs::create_dir_all(output).at(output)?;
    let _lock = run_dir::lock(output)?;
    let outcomes = plan.run_all()?;
    let report = plan.report(&outcomes)?;
    report.write(output)?;
    let folder = output.display();
    match experiment.json {
        true => print(&format!("{}\n", report.to_json()))?,
        false => print(&format!("{}\ntable   {folder}/compare.md\nfigure  {folder}/compare.svg\n", report.text()))?,
    }
    complete(&outcomes, output)
}

/// `cuvee lab sweep`: the same runs, and the report of their gold rewards; with `print`, their commands alone.
pub fn sweep(experiment: &Experiment, print_commands: bool) -> Result<()> {
    let mut plan = Plan::new(experiment);
    plan.all()?;
    let cells = plan.cells()?;
    if cells.halving.is_some() {
        plan.check_race(print_commands)?;
    }
    let output = &experiment.output_dir;
    fs::create_dir_all(output).at(output)?;
    let _lock = run_dir::lock(output)?;
    cells.write(output)?;
    forget(output)?;
    if print_commands {
        plan.jobs.iter().try_for_each(Job::lay)?;
        return print(&plan.commands());
    }
    let outcomes = match &cells.halving {
        Some(halving) => plan.race(Race::new(output, &cells, halving), &halving.rungs)?,
        None => plan.run_all()?,
    };
    print(&summary(&write_report(output)?, output))?;
    complete(&outcomes, output)
}

fn complete(outcomes: &[Outcome], output: &Path) -> Result<()> {
    match outcomes.iter().filter(|outcome| **outcome != Outcome::Done).count() {
        0 => Ok(()),
        missing => Err(Error::file(
            output,
            format!("{missing} of {} runs are missing, see above; the same command tries them again", outcomes.len()),
        )),
    }
}

/// An argument as a shell reads it.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=,:@+".contains(c);
    if !text.is_empty() && text.chars().all(plain) { text.into() } else { format!("'{}'", text.replace('\'', "'\\''")) }
}

/// What a job's steps are in a shell; safe to run twice.
pub fn command(job: &Job) -> String {
    let line = |step: &Step| {
        let words = step.args.iter().map(|arg| quoted(&arg.to_string_lossy()));
        let command = std::iter::once("cuvee".to_string()).chain(words).collect::<Vec<_>>().join(" ");
        let path = |path: &Path| quoted(&path.to_string_lossy());
        match &step.makes {
            Makes::Run | Makes::Part(_) => command,
            Makes::Folder(folder) => format!("{{ [ -e {} ] || {command}; }}", path(folder)),
            Makes::Output(out) => {
                let unfinished = path(&out.with_extension("tmp"));
                format!("{command} > {unfinished} && mv {unfinished} {}", path(out))
            }
        }
    };
    job.steps.iter().map(line).collect::<Vec<_>>().join(" && ")
}

/// A hash of what a file or folder holds; of a folder's files their names, sizes and times, as models are large.
pub fn content(path: &Path) -> Result<String> {
    let found = fs::metadata(path).at(path)?;
    let mut hasher = blake3::Hasher::new();
    if found.is_file() {
        hasher.update_reader(fs::File::open(path).at(path)?).at(path)?;
    } else {
        let mut entries: Vec<_> = fs::read_dir(path).at(path)?.collect::<std::io::Result<_>>().at(path)?;
        entries.sort_by_key(|entry| entry.file_name());
        for entry in entries {
            let found = entry.metadata().at(path)?;
            hasher.update(format!("{:?} {} {:?}", entry.file_name(), found.len(), found.modified().ok()).as_bytes());
        }
    }
    Ok(hasher.finalize().to_hex()[..16].to_string())
}

pub fn key(parts: &[String]) -> String {
    blake3::hash(parts.join("\n").as_bytes()).to_hex()[..16].to_string()
}

impl<'a> Plan<'a> {
    pub fn new(experiment: &'a Experiment) -> Self {
        // Processes that run together share the cores.
        let threads = match (experiment.jobs, experiment.threads) {
            (1, threads) => threads,
            (jobs, threads) => Some((threads.unwrap_or_else(|| processor().allowed) / jobs).max(1)),
        };
        Self { experiment, jobs: Vec::new(), runs: Vec::new(), threads }
    }

    pub fn all(&mut self) -> Result<()> {
        let Experiment { variants, seed, seeds, .. } = self.experiment;
        for (at, variant) in variants.iter().enumerate() {
            let of_variant = |error| Error::file(&self.experiment.recipe, format!("{}: {error}", variant.name));
            let seeds: Vec<Option<u64>> =
                if variant.shared { vec![None] } else { (*seed..seed + seeds).map(Some).collect() };
            for seed in seeds {
                let made = self.make(at, variant, seed).map_err(of_variant)?;
                self.runs.push(made);
            }
        }
        for run in 0..self.runs.len() {
            if !self.experiment.measure.tasks.is_empty() && !variants[self.runs[run].variant].scores {
                self.runs[run].eval = Some(self.evaluate(run)?);
            }
        }
        Ok(())
    }

    fn run_all(&self) -> Result<Vec<Outcome>> {
        self.with_runner(|runner| runner.run(&self.jobs))
    }

    fn with_runner<T>(&self, work: impl FnOnce(&Runner) -> Result<T>) -> Result<T> {
        let stop = train::stop_on_signal()?;
        let program = std::env::current_exe().at("the path of this program")?;
        let (runs, arms) = (self.runs.len(), self.experiment.variants.len());
        say(format_args!("{arms} variants, {runs} runs and {} evaluations", self.jobs.len() - runs));
        let stop = || stop.load(Ordering::Relaxed);
        let doing = ("comparing", "runs");
        work(&Runner { program: &program, jobs: self.experiment.jobs, doing, stop: &stop, gate: &|_| None })
    }

    /// All cells up to the first rung, those that go on up to the next, and the last of them to their end. Who left is done.
    fn race(&self, mut race: Race, rungs: &[f64]) -> Result<Vec<Outcome>> {
        let cells: Vec<usize> = self.cell_runs().map(|run| run.job).collect();
        let cell = |job: usize| cells.iter().position(|cell| *cell == job);
        self.with_runner(|runner| {
            let mut outcomes = vec![Outcome::Done; self.jobs.len()];
            for rung in rungs.iter().copied().map(Some).chain([None]) {
                let goes_on =
                    |job: &usize| outcomes[*job] == Outcome::Done && cell(*job).is_none_or(|cell| race.is_in(cell));
                let kept: Vec<usize> = (0..self.jobs.len()).filter(goes_on).collect();
                let jobs: Vec<Job> =
                    kept.iter().map(|job| self.part(*job, rung.filter(|_| cell(*job).is_some()), &kept)).collect();
                for (job, outcome) in kept.iter().zip(runner.run(&jobs)?) {
                    outcomes[*job] = outcome;
                }
                let Some(rung) = rung else { continue };
                race.decide(rung, &|cell| outcomes[cells[cell]] != Outcome::Done)?.iter().for_each(say);
            }
            Ok(outcomes)
        })
    }

    /// A job among those that are kept, of whose run a share is asked for, or all.
    fn part(&self, job: usize, share: Option<f64>, kept: &[usize]) -> Job {
        let mut job = self.jobs[job].clone();
        // What a kept job needs is kept: nothing starts from a cell, and what failed took these with it.
        job.needs.iter_mut().for_each(|need| *need = kept.binary_search(need).expect("it is kept"));
        if let Some(share) = share {
            job.steps.truncate(1);
            job.steps[0].args.push(format!("--stop-at-step={share}").into());
            job.steps[0].makes = Makes::Part(share);
        }
        job
    }

    /// What does not go together with a race.
    fn check_race(&self, print_commands: bool) -> Result<()> {
        let cells: Vec<&Run> = self.cell_runs().collect();
        let is_cell = |job: &usize| cells.iter().any(|run| run.job == *job);
        let of = |run: &Run| &self.experiment.variants[run.variant];
        let alarmed =
            |run: &&&Run| of(run).what.table().get("on_alarm").is_some_and(|action| action.as_str() != Some("warn"));
        let detail = if print_commands {
            "--print: lists whole runs, and a race decides on the way which of them goes on; drop one of both"
                .to_string()
        } else if let Some(run) = cells.iter().find(alarmed) {
            let name = &of(run).name;
            format!("{name}: on_alarm: a run that goes back is no longer where it was compared; use \"warn\"")
        } else if let Some(job) = self.jobs.iter().find(|job| job.needs.iter().any(is_cell)) {
            format!("{}: needs a cell, which may leave; drop it, or make that cell a [[prepare]]", job.name)
        } else {
            return Ok(());
        };
        Err(Error::file(&self.experiment.recipe, format!("[halving]: {detail}")))
    }

    /// The runs of a sweep that are measured.
    fn cell_runs(&self) -> impl Iterator<Item = &Run> {
        self.runs.iter().filter(|run| {
            let variant = &self.experiment.variants[run.variant];
            matches!(variant.what, What::Train(_)) && !variant.prepared && !variant.scores
        })
    }

    /// One command a line; a comment where those before must be done.
    fn commands(&self) -> String {
        let mut levels: Vec<usize> = Vec::new();
        for job in &self.jobs {
            levels.push(job.needs.iter().map(|need| levels[*need] + 1).max().unwrap_or(0));
        }
        let mut text = String::new();
        for level in 0..=levels.iter().copied().max().unwrap_or(0) {
            if level > 0 {
                text += "# These need what is above.\n";
            }
            let of_level = self.jobs.iter().zip(&levels).filter(|(_, l)| **l == level);
            of_level.for_each(|(job, _)| text += &format!("{}\n", command(job)));
        }
        text
    }

    /// The cells of a sweep, each with what its report needs.
    ///
    /// # Errors
    /// An arm that measures no gold reward along training.
    fn cells(&self) -> Result<SweepPlan> {
        let (mut cells, mut samples) = (Vec::new(), 0);
        for run in self.cell_runs() {
            let variant = &self.experiment.variants[run.variant];
            let table = variant.what.table();
            let missing = ["eval_dataset", "eval_steps", "kl_samples", "gold_reward"]
                .into_iter()
                .find(|key| !table.contains_key(*key));
            if let Some(key) = missing {
                let detail =
                    format!("{}: {key} is missing; a sweep measures a gold reward along training", variant.name);
                return Err(Error::file(&self.experiment.recipe, detail));
            }
            samples = table.get("kl_samples").and_then(Value::as_integer).unwrap_or(0) as usize;
            let text = |key: &str| table.get(key).map(|value| value.as_str().map_or(value.to_string(), String::from));
            let apart = variant.point.split(' ').filter(|word| !word.is_empty() && !word.starts_with("beta="));
            let apart: Vec<&str> = apart.map(|word| word.strip_prefix("model=@").unwrap_or(word)).collect();
            cells.push(Cell {
                name: self.jobs[run.job].name.clone(),
                group: [&[variant.method.as_str()], &apart[..]].concat().join(" "),
                size: text("model").unwrap_or_default().trim_start_matches('@').to_string(),
                objective: text("objective").unwrap_or_default(),
                beta: table.get("beta").and_then(|beta| beta.as_float().or(beta.as_integer().map(|beta| beta as f64))),
                seed: run.seed,
                dir: run.logs.strip_prefix(&self.experiment.output_dir).unwrap_or(&run.logs).to_path_buf(),
                command: command(&self.jobs[run.job]),
            });
        }
        match cells.is_empty() {
            true => Err(Error::file(&self.experiment.recipe, "has no arm that is trained; a sweep measures those")),
            false => {
                let Experiment { recipe, halving, .. } = self.experiment;
                Ok(SweepPlan { recipe: recipe.clone(), samples, cells, halving: halving.clone() })
            }
        }
    }

    /// The run of a variant that goes with a seed.
    fn run_of(&self, variant: usize, seed: Option<u64>) -> &Run {
        let fits = |run: &&Run| run.variant == variant && (run.seed == seed || run.seed.is_none());
        self.runs.iter().find(fits).or(self.runs.iter().find(|run| run.variant == variant)).expect("it comes before")
    }

    /// A table with folders in place of names; with it the jobs that it needs, and what its result depends on.
    fn filled(
        &self,
        command: &clap::Command,
        table: &Table,
        seed: Option<u64>,
    ) -> Result<(Table, Vec<usize>, Vec<String>)> {
        let (mut needs, mut parts) = (Vec::new(), vec![command.get_name().to_string()]);
        let mut folder = |path: &str| match reference(&self.experiment.variants, path) {
            None => {
                // A weight behind a folder is no part of its name.
                let split = path.rsplit_once('=').filter(|_| !Path::new(path).exists());
                let (bare, weight) = split.unwrap_or((path, ""));
                parts.push(content(Path::new(bare))? + weight);
                Ok(path.to_string())
            }
            Some(found) => {
                let (variant, rest) = found.expect("names were looked up");
                let run = self.run_of(variant, seed);
                needs.push(run.job);
                parts.push(self.jobs[run.job].key.clone() + rest);
                Ok(format!("{}{rest}", run.model.display()))
            }
        };
        let filled = recipe::with_paths(command, table, &mut folder)?;
        // Paths count by what they hold; everything else by its text.
        let bare = recipe::with_paths(command, table, &mut |_| Ok(String::new()))?;
        let mut settings: Vec<String> = bare
            .iter()
            .filter(|(key, _)| !WITHOUT_EFFECT.contains(&key.as_str()))
            .map(|(key, value)| format!("{key}={value}"))
            .collect();
        settings.sort();
        parts.extend(settings);
        needs.sort_unstable();
        needs.dedup();
        Ok((filled, needs, parts))
    }

    fn make(&mut self, at: usize, variant: &Variant, seed: Option<u64>) -> Result<Run> {
        let number = seed.unwrap_or(self.experiment.seed);
        let dir = self.experiment.output_dir.join("runs").join(variant.folder()).join(format!("seed-{number}"));
        let command = variant.what.command();
        let mut table = variant.what.table().clone();
        if self.draws(&variant.what) {
            table.insert("seed".into(), Value::Integer(number as i64));
        }
        let (table, needs, parts) = self.filled(&command, &table, seed)?;
        let model = dir.join(if matches!(variant.what, What::Pairs(_)) { "pairs.jsonl" } else { "model" });
        let (mut file, mut logs) = (None, model.clone());
        let steps = match &variant.what {
            What::Merge(_) => {
                let args = ["merge".into(), flag("output-dir", &model)].into_iter().chain(recipe::flags_of(&table));
                vec![Step { args: args.collect(), makes: Makes::Folder(model.clone()) }]
            }
            What::Pairs(_) => {
                let args =
                    ["lab".into(), "pairs".into(), flag("out", &model)].into_iter().chain(recipe::flags_of(&table));
                let threads = self.threads.map(|threads| format!("--threads={threads}").into());
                vec![Step { args: args.chain(threads).collect(), makes: Makes::Folder(model.clone()) }]
            }
            What::Train(_) => {
                let adapter = ["lora_rank", "lora_start"].iter().any(|key| table.contains_key(*key));
                logs = if adapter { dir.join("adapter") } else { model.clone() };
                let mut whole = table.clone();
                whole.insert("output_dir".into(), logs.to_string_lossy().into_owned().into());
                let head =
                    "# Written by `cuvee compare`; what it left to defaults stands in the recipe of the model.\n\n";
                file = Some((RECIPE, head.to_string() + &recipe::as_seen_from(&dir, &whole)));
                let mut args: Vec<OsString> =
                    vec!["train".into(), dir.join(RECIPE).into(), "--resume-from-checkpoint=auto".into()];
                args.extend(self.threads.map(|threads| format!("--threads={threads}").into()));
                let mut steps = vec![Step { args, makes: Makes::Run }];
                if adapter {
                    steps.push(fold(&table, &logs, &model));
                }
                steps
            }
        };
        let name = match seed {
            Some(seed) => format!("{}, seed {seed}", variant.name),
            None => variant.name.clone(),
        };
        self.jobs.push(Job { name, dir, needs, key: key(&parts), file, steps });
        Ok(Run { variant: at, seed, job: self.jobs.len() - 1, eval: None, model, logs })
    }

    /// Whether a seed changes what comes out.
    fn draws(&self, what: &What) -> bool {
        match what {
            What::Train(_) => true,
            What::Pairs(_) => true,
            What::Merge(table) => {
                let method = table.get("method").and_then(Value::as_str);
                method.and_then(|name| merge::find(name).ok()).is_some_and(|method| method.random)
            }
        }
    }

    /// The evaluation of a run; its place.
    fn evaluate(&mut self, run: usize) -> Result<usize> {
        let (measure, run) = (&self.experiment.measure, &self.runs[run]);
        let command = recipe::subcommand("eval");
        let (rest, mut needs, mut parts) = self.filled(&command, &measure.flags, run.seed)?;
        let mut args: Vec<OsString> = vec!["eval".into(), "--json".into(), flag("model", &run.model)];
        needs.push(run.job);
        parts.push(self.jobs[run.job].key.clone());
        for (name, path) in [("baseline", Some(&measure.baseline)), ("reward-model", measure.reward_model.as_ref())] {
            let Some(path) = path else { continue };
            let folder = match reference(&self.experiment.variants, path) {
                Some(found) => {
                    let other = self.run_of(found.expect("names were looked up").0, run.seed);
                    needs.push(other.job);
                    parts.push(self.jobs[other.job].key.clone());
                    other.model.clone()
                }
                None => {
                    parts.push(content(Path::new(path))?);
                    PathBuf::from(path)
                }
            };
            args.push(flag(name, &folder));
        }
        for (name, file) in &measure.tasks {
            parts.push(format!("{name} {}", content(Path::new(file))?));
            args.push(format!("--task={name}={file}").into());
        }
        args.extend(recipe::flags_of(&rest));
        args.extend(self.threads.map(|threads| format!("--threads={threads}").into()));
        needs.sort_unstable();
        needs.dedup();
        let dir = self.jobs[run.job].dir.join("eval");
        let steps = vec![Step { args, makes: Makes::Output(dir.join("eval.json")) }];
        let name = format!("evaluation of {}", self.jobs[run.job].name);
        self.jobs.push(Job { name, dir, needs, key: key(&parts), file: None, steps });
        Ok(self.jobs.len() - 1)
    }

    fn metrics(&self, run: &Run) -> Result<Metrics> {
        let mut metrics = logged(&run.logs);
        if let Some(eval) = run.eval {
            metrics.extend(evaluated(&self.jobs[eval].dir.join("eval.json"), &run.model.to_string_lossy())?);
        }
        Ok(metrics)
    }

    fn report(&self, outcomes: &[Outcome]) -> Result<Report> {
        let measure = &self.experiment.measure;
        let mut arms = Vec::new();
        for (at, variant) in self.experiment.variants.iter().enumerate().filter(|(_, variant)| !variant.scores) {
            let (mut runs, mut failed) = (Vec::new(), Vec::new());
            for run in self.runs.iter().filter(|run| run.variant == at) {
                let jobs = [Some(run.job), run.eval].into_iter().flatten();
                let why = jobs.filter_map(|job| Some((&self.jobs[job].name, why(&outcomes[job])?))).next();
                match why {
                    Some((name, why)) => failed.push(format!("{name}: {why}")),
                    None => runs.push(Measured { seed: run.seed, metrics: self.metrics(run)? }),
                }
            }
            let (name, method, point) = (variant.name.clone(), variant.method.clone(), variant.point.clone());
            arms.push(Arm { name, method, point, runs, failed });
        }
        let axes = Axes {
            baseline: measure.baseline.trim_start_matches('@').to_string(),
            reward: measure.reward.clone(),
            ability: measure.ability.clone(),
            tolerance: measure.tolerance,
            metrics: measure.metrics.clone(),
        };
        Ok(Report { seeds: self.experiment.seeds, axes, arms })
    }
}

pub fn why(outcome: &Outcome) -> Option<String> {
    match outcome {
        Outcome::Done => None,
        Outcome::Failed(lines) => Some(format!("\n{lines}")),
        Outcome::Skipped(missing) => Some(format!("left out, as {missing} is missing")),
    }
}

pub fn flag(name: &str, path: &Path) -> OsString {
    let mut flag = OsString::from(format!("--{name}="));
    flag.push(path);
    flag
}

/// An adapter on its model is a model like others, which whatever comes next can start from.
pub fn fold(table: &Table, adapter: &Path, model: &Path) -> Step {
    let base = table.get("model").and_then(Value::as_str).unwrap_or_default();
    let args = vec![
        "merge".into(),
        "adapters".into(),
        "--method=delta".into(),
        flag("adapter", adapter),
        flag("model", Path::new(base)),
        flag("output-dir", model),
    ];
    Step { args, makes: Makes::Folder(model.to_path_buf()) }
}
