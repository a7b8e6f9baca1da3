//! `cuvee merge`: whole checkpoints here, what needs flags of its own in subcommands.

use std::path::PathBuf;

use clap::Args;

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
    /// What to do, by mergekit's YAML
    #[arg(long, value_name = "FILE", help_heading = "Files")]
    pub config: Option<PathBuf>,
    /// Folder for the merged model
    #[arg(long, value_name = "DIR", required = true, help_heading = "Files")]
    pub output_dir: Option<PathBuf>,
}

pub fn run(args: &MergeArgs) -> Result<()> {
    let _ = args;
    Err(Error::option("merge", "this build has no merge methods yet"))
}
