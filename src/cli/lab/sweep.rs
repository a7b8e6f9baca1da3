//! `cuvee lab sweep`: a recipe of `cuvee compare` whose runs measure a gold reward, and their report.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;

use crate::cli::args::{count, steps};
use crate::cli::compare::{Compare, sweep};
use crate::cli::{Command, parse};
use crate::error::{Error, Result};

#[derive(Debug, Clone, PartialEq, Args)]
#[command(after_help = "\
The recipe lists runs as one of `cuvee compare` does: [[prepare]] makes models, reward models and pairs, [[arm]] with [arm.grid] the cells,
which start from them by \"@name\". Each cell needs eval_dataset, eval_steps, kl_samples and gold_reward. It has a folder of its own and is
one command; what is done is not done again, what was cut off goes on, and one that fails does not stop the others. Two sweeps in one
folder refuse each other.

A table [halving] makes the cells race: rungs = [0.25, 0.5] are shares of their steps at which those that start from one model are compared
by their gold reward; keep = 0.5 of them go on from their checkpoints, as if they had never stopped, and constraint = \"base/nll<6\" is what
must hold of the evaluation there. The report says who left, where and why.

Examples:
  cuvee lab sweep recipes/overoptimisation.toml --jobs 2
  cuvee lab sweep recipes/overoptimisation.toml --print > cells.sh   # one command a line: parallel < cells.sh, or an array of Slurm
  cuvee lab sweep recipes/overoptimisation.toml                      # afterwards: the report, and what is missing")]
pub struct SweepArgs {
    /// TOML file that lists the runs
    #[arg(value_name = "LAB")]
    pub recipe: PathBuf,
    /// Processes at a time; they share the threads
    #[arg(long, value_name = "N", default_value = "1", value_parser = count)]
    pub jobs: usize,
    /// Run each cell with this many seeds, in place of what the recipe says
    #[arg(long, value_name = "N", value_parser = steps)]
    pub seeds: Option<u64>,
    /// Run these arms alone, by name
    #[arg(long, value_name = "NAME", num_args = 1..)]
    pub arms: Vec<String>,
    /// Make the folders and print the commands, those first that others need; run nothing
    #[arg(long)]
    pub print: bool,
}

pub fn run(args: &SweepArgs) -> Result<()> {
    let mut line: Vec<OsString> = vec!["cuvee".into(), "compare".into(), args.recipe.clone().into()];
    line.push(format!("--jobs={}", args.jobs).into());
    line.extend(args.seeds.map(|seeds| format!("--seeds={seeds}").into()));
    line.extend(args.arms.iter().map(|arm| format!("--arms={arm}").into()));
    let cli = parse(line).map_err(|e| Error::option("cuvee lab sweep", e.into_text()))?;
    match cli.command {
        Command::Compare(Compare::Experiment(experiment)) => sweep(&experiment, args.print),
        _ => Err(Error::file(&args.recipe, "lists no runs; expected [[prepare]] and [[arm]] tables")),
    }
}
