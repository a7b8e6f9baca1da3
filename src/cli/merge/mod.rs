//! `cuvee merge`: whole checkpoints, and in subcommands what needs flags of its own.

mod adapters;
mod behaviour;
mod extract;
mod models;
mod out;

use clap::{ArgMatches, Args, Subcommand};

use crate::error::Result;
pub use adapters::{AdaptersArgs, How};
pub use behaviour::BehaviourArgs;
pub use models::{Method, ModelArg, ModelsArgs, ParamArgs, Stored, model};

#[derive(Debug, Clone, PartialEq, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    allow_negative_numbers = true,
    after_help = "\
Models are Hugging Face folders of one architecture, shape and vocabulary. They are read tensor by tensor, merged in f32 and
rounded once; memory does not depend on their size. The result gets config and tokenizer of the base, else of the first model.
`cuvee list merges` names the methods with their papers and parameters.

Examples:
  cuvee merge --method linear --model A=0.5 --model B=0.5 --output-dir runs/soup
  cuvee merge --method ties --base-model BASE --model A=0.5 --model B=0.5 --density 0.5 --output-dir runs/ties
  cuvee merge --method dare_linear --base-model BASE --model A=1 --model B=1 --density 0.3 0.6 --seed 7 --output-dir runs/dare
  cuvee merge --method slerp --base-model A --model B --t 0.4 --override mlp:t=0.6 --output-dir runs/slerp
  cuvee merge --config recipe.yaml --output-dir runs/merged --dry-run"
)]
pub struct MergeArgs {
    #[command(subcommand)]
    pub what: Option<MergeWhat>,
    #[command(flatten)]
    pub models: ModelsArgs,
}

#[derive(Debug, Clone, PartialEq, Subcommand)]
pub enum MergeWhat {
    /// Make one adapter of several, or add them to their base
    Adapters(AdaptersArgs),
    /// Make an adapter of what a model learned beyond its base
    Extract(extract::ExtractArgs),
}

impl MergeArgs {
    /// What no single flag can know.
    pub fn check(&self, flags: &ArgMatches) -> Result<()> {
        match (&self.what, flags.subcommand()) {
            (Some(MergeWhat::Adapters(args)), Some((_, flags))) => args.check(flags),
            (Some(MergeWhat::Extract(args)), Some((_, flags))) => args.behaviour.check(flags, &[], false),
            (Some(_), _) => Ok(()),
            (None, _) => self.models.check(flags),
        }
    }
}

pub fn run(args: &MergeArgs) -> Result<()> {
    match &args.what {
        Some(MergeWhat::Adapters(args)) => adapters::run(args),
        Some(MergeWhat::Extract(args)) => extract::run(args),
        None => models::run(&args.models),
    }
}
