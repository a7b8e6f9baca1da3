//! `cuvee run`: a recipe of stages, each a process of this program; what is there already, made of the same, is not made again.

mod data;
mod estimate;
mod gate;
mod plan;
mod recipe;
mod report;

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::Ordering;

use clap::Args;

use super::args::{count, steps};
use super::recipe::nearest;
use super::{print, train};
use crate::checkpoint::run_dir;
use crate::error::{At, Error, Result};
use crate::lab::{Found, Job, Outcome, Runner};
use crate::progress::say;
use plan::Plan;
use recipe::{Recipe, Typed};
use report::Report;

#[derive(Debug, Clone, PartialEq, Args)]
#[command(after_help = "\
A recipe is a TOML file of [[stage]] tables, each below what it reads. A stage has a name, a kind, and the keys of its command:

  sft, reward, train   keys of `cuvee train`
  soup                 keys of `cuvee soup`; weights = [0, 0.5, 1] makes one of two models for each weight of the second
  eval                 keys of `cuvee eval`; of several models each is measured by a process of its own; numbers = { gold = \"reward\" }
                       names what the table shows
  lab pairs, lab scale, lab best-of-n    keys of that `cuvee lab`
  report               table = \"@measured\", the eval stages that it shows; front = [\"-words\", \"gold\"], the axes of a
                       figure, - where less is better

\"@name\" in a path is what a stage above made, or rows of [data.NAME]: file, shuffle_seed, skip, take, and prompt_words with column to
cut a text into prompt and completion. like = \"name\" takes over the keys of a stage above or of [template.NAME]. require =
\"gold > 0.2 and tax < 4.1\" is a gate: where a number is not as it must be, nothing more is begun. At the top stand output_dir, seeds,
seed and threads.

A stage is made again where its settings, its files, what it reads or cuvee itself has changed, and with it what depends on it. After a
crash or Ctrl-C the same command goes on; training goes on from its last checkpoint (save_steps).

Examples:
  cuvee run recipes/cuvee.toml
  cuvee run recipes/cuvee.toml --dry-run                 # what would be done, how long it takes, what memory
  cuvee run recipes/cuvee.toml --seeds 1 --from grao     # a stage and what depends on it")]
pub struct StagesArgs {
    /// TOML file of stages
    #[arg(value_name = "RECIPE")]
    pub recipe: PathBuf,
    /// Folder for all that is made [default: the recipe's]
    #[arg(long, value_name = "DIR")]
    pub output_dir: Option<PathBuf>,
    /// Run each stage with this many seeds, in place of what the recipe says
    #[arg(long, value_name = "N", value_parser = steps)]
    pub seeds: Option<u64>,
    /// Processes at a time; they share the threads
    #[arg(long, value_name = "N", default_value = "1", value_parser = count)]
    pub jobs: usize,
    /// This stage alone; what it reads must be there
    #[arg(long, value_name = "NAME", conflicts_with = "from")]
    pub only: Option<String>,
    /// This stage and what depends on it; what they read besides must be there
    #[arg(long, value_name = "NAME")]
    pub from: Option<String>,
    /// Say what would be done, how long it would take and what memory, and do nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Print the report as JSON
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: &StagesArgs) -> Result<()> {
    let recipe = Recipe::read(&args.recipe, &Typed { output_dir: args.output_dir.clone(), seeds: args.seeds })?;
    let plan = Plan::new(&recipe, args.jobs)?;
    let wanted = wanted(args, &plan)?;
    if args.dry_run {
        return print(&estimate::table(&plan, &wanted, args.jobs)?);
    }
    let output = &recipe.output_dir;
    fs::create_dir_all(output).at(output)?;
    let _lock = run_dir::lock(output)?;
    plan.sliced.iter().try_for_each(data::Sliced::write)?;
    say(estimate::table(&plan, &wanted, args.jobs)?);
    let outcomes = run_all(args, &plan, &wanted)?;
    let report = Report::of(&plan, &outcomes)?;
    let page = report.write()?;
    match args.json {
        true => print(&format!("{}\n", report.to_json()))?,
        false => print(&format!("{}\nreport  {}\n", report.markdown(), page.display()))?,
    }
    complete(&plan, &outcomes)
}

/// Which jobs are to be looked at: of the stage that `--only` or `--from` names, of what depends on it, or all.
fn wanted(args: &StagesArgs, plan: &Plan) -> Result<Vec<bool>> {
    let (flag, name) = match (&args.only, &args.from) {
        (Some(name), _) => ("--only", name),
        (None, Some(name)) => ("--from", name),
        (None, None) => return Ok(vec![true; plan.jobs.len()]),
    };
    let stages = || plan.recipe.stages.iter();
    // One variant, such as a soup, where no stage is called so.
    let whole = stages().any(|stage| stage.name == *name);
    let is = |made: usize| plan.stage(made).name == *name || !whole && plan.variant(made).name == *name;
    let mut wanted: Vec<bool> = (0..plan.jobs.len()).map(is).collect();
    if !wanted.contains(&true) && plan.recipe.report.name.as_ref() != Some(name) {
        let all = || stages().map(|stage| stage.name.clone());
        let help = match nearest(name, all()) {
            Some(meant) => format!("did you mean {meant:?}?"),
            None => format!("there are {}", all().collect::<Vec<_>>().join(", ")),
        };
        return Err(Error::option(flag, format!("there is no stage {name:?}; {help}")));
    }
    if args.from.is_some() {
        for at in 0..wanted.len() {
            wanted[at] |= plan.jobs[at].needs.iter().any(|need| wanted[*need]);
        }
    }
    for at in (0..wanted.len()).filter(|at| wanted[*at]) {
        for need in plan.jobs[at].needs.iter().filter(|need| !wanted[**need]) {
            if !matches!(plan.jobs[*need].found()?, Found::Done(_)) {
                let (job, need) = (&plan.jobs[at].name, &plan.jobs[*need].name);
                let stage = &plan.stage(plan.jobs[at].needs[0]).name;
                let detail = format!(
                    "{job} reads {need}, which is not there as it is to be made now; try --from {stage:?}, or neither"
                );
                return Err(Error::option(flag, detail));
            }
        }
    }
    Ok(wanted)
}

/// Runs the wanted jobs; what came of them and of what they read, in the places of all jobs.
fn run_all(args: &StagesArgs, plan: &Plan, wanted: &[bool]) -> Result<Vec<Option<Outcome>>> {
    // What they read is done, and its gates are asked again.
    let read = |at: usize| (0..wanted.len()).any(|other| wanted[other] && plan.jobs[other].needs.contains(&at));
    let chosen: Vec<usize> = (0..wanted.len()).filter(|at| wanted[*at] || read(*at)).collect();
    let place = |at: &usize| chosen.iter().position(|other| other == at);
    let job = |at: &usize| {
        let job = plan.jobs[*at].clone();
        // Of what is only read nothing is run, so what it needs may be missing here.
        Job { needs: job.needs.iter().filter_map(place).collect(), ..job }
    };
    let jobs: Vec<Job> = chosen.iter().map(job).collect();
    let stop = train::stop_on_signal()?;
    let stop = || stop.load(Ordering::Relaxed);
    let program = std::env::current_exe().at("the path of this program")?;
    let gate = |at: usize| plan.gate(chosen[at]);
    let doing = ("running", "jobs");
    let ran = Runner { program: &program, jobs: args.jobs, doing, stop: &stop, gate: &gate }.run(&jobs)?;
    let mut outcomes = vec![None; wanted.len()];
    chosen.into_iter().zip(ran).for_each(|(at, outcome)| outcomes[at] = Some(outcome));
    Ok(outcomes)
}

fn complete(plan: &Plan, outcomes: &[Option<Outcome>]) -> Result<()> {
    let failed = |(at, outcome): (usize, &Option<Outcome>)| match outcome {
        Some(Outcome::Failed(why)) => Some(format!("{}: {}", plan.jobs[at].name, why.trim())),
        _ => None,
    };
    let failed: Vec<String> = outcomes.iter().enumerate().filter_map(failed).collect();
    let missing = outcomes.iter().flatten().filter(|outcome| **outcome != Outcome::Done).count();
    match missing {
        0 => Ok(()),
        missing => {
            let of = outcomes.iter().flatten().count();
            let detail =
                format!("{missing} of {of} jobs are missing; the same command tries them again\n{}", failed.join("\n"));
            Err(Error::file(&plan.recipe.output_dir, detail))
        }
    }
}
