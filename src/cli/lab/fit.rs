//! `cuvee lab fit`

use std::path::PathBuf;

use clap::Args;

use crate::cli::args::zero_or_count;
use crate::cli::print;
use crate::error::Result;
use crate::lab::{Keys, fit_groups, read_measurements};

#[derive(Debug, Clone, PartialEq, Args)]
pub struct FitArgs {
    /// Folders of runs, whose evaluations are read, or files of points: JSON lines or a list, each with d or kl, a gold reward and
    /// perhaps its _stderr, run, group and valid
    #[arg(required = true, value_name = "FILE")]
    pub points: Vec<PathBuf>,
    /// Name of the gold reward or win rate in a point; `eval_` may stand before it
    #[arg(long, value_name = "KEY", default_value = "gold")]
    pub gold: String,
    /// Subtract this from it, such as 0.5 from a win rate: forms without an intercept start at 0
    #[arg(long, value_name = "F", default_value = "0")]
    pub offset: f64,
    /// Resamples that the intervals are from; 0 = no intervals
    #[arg(long, value_name = "N", default_value = "1000", value_parser = zero_or_count)]
    pub resamples: usize,
    /// Of the resamples
    #[arg(long, value_name = "N", default_value = "42")]
    pub seed: u64,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Write fit.json, fit.txt and fit.svg here
    #[arg(long, value_name = "DIR")]
    pub output_dir: Option<PathBuf>,
}

pub fn run(args: &FitArgs) -> Result<()> {
    let points = read_measurements(&args.points, &Keys { gold: args.gold.clone(), offset: args.offset })?;
    let fitted = fit_groups(points, &args.gold, args.resamples, args.seed);
    args.output_dir.iter().try_for_each(|dir| fitted.write(dir))?;
    match args.json {
        true => print(&format!("{}\n", fitted.to_json())),
        false => print(&fitted.text()),
    }
}
