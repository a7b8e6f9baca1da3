//! `cuvee merge`: whole checkpoints here, what needs flags of its own in subcommands.

mod adapters;
mod behaviour;
mod extract;
mod out;

use std::path::PathBuf;

use clap::{ArgMatches, Args, Subcommand};

use crate::error::{Error, Result};

#[derive(Debug, Clone, PartialEq, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    allow_negative_numbers = true,
    after_help = "\
Examples:
  cuvee merge --method linear --model A=0.5 --model B=0.5 --output-dir runs/soup
  cuvee merge --method ties --base-model BASE --model A=0.5 --model B=0.5 --density 0.5 --output-dir runs/ties
  cuvee merge --config recipe.yaml --output-dir runs/merged"
)]
pub struct MergeArgs {
    #[command(subcommand)]
    pub what: Option<MergeWhat>,
    /// What to do, by mergekit's YAML
    #[arg(long, value_name = "FILE", help_heading = "Files")]
    pub config: Option<PathBuf>,
    /// Folder for the merged model
    #[arg(long, value_name = "DIR", required = true, help_heading = "Files")]
    pub output_dir: Option<PathBuf>,
}

#[derive(Debug, Clone, PartialEq, Subcommand)]
pub enum MergeWhat {
    /// Make one adapter of several, or add them to their base
    Adapters(adapters::AdaptersArgs),
    /// Make an adapter of what a model learned beyond its base
    Extract(extract::ExtractArgs),
}

impl MergeArgs {
    /// What no single flag can know.
    pub fn check(&self, flags: &ArgMatches) -> Result<()> {
        match (&self.what, flags.subcommand()) {
            (Some(MergeWhat::Adapters(args)), Some((_, flags))) => args.check(flags),
            (Some(MergeWhat::Extract(args)), Some((_, flags))) => args.behaviour.check(flags, &[]),
            _ => Ok(()),
        }
    }
}

pub fn run(args: &MergeArgs) -> Result<()> {
    match &args.what {
        Some(MergeWhat::Adapters(args)) => return adapters::run(args),
        Some(MergeWhat::Extract(args)) => return extract::run(args),
        None => {}
    }
    Err(Error::option("merge", "this build has no merge methods yet"))
}
