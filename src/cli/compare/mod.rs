//! `cuvee compare`: the references of one recipe, or any runs that a recipe lists.

mod experiment;
mod jobs;
mod measure;
mod references;

use std::path::Path;

use clap::{ArgMatches, Args, FromArgMatches};

use super::args::CompareArgs;
use crate::error::Result;
pub use experiment::{Experiment, Grid, grid, only_here};
pub use jobs::{Plan, Run, command, content, flag, fold, key, sweep, why};

/// What is compared. The recipe decides, so clap knows the flags alone.
#[derive(Debug, Clone, PartialEq)]
pub enum Compare {
    References(Box<CompareArgs>),
    Experiment(Box<Experiment>),
}

impl Args for Compare {
    fn augment_args(command: clap::Command) -> clap::Command {
        CompareArgs::augment_args(command)
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        CompareArgs::augment_args_for_update(command)
    }
}

impl FromArgMatches for Compare {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        CompareArgs::from_arg_matches(matches).map(|args| Self::References(Box::new(args)))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Compare {
    /// The experiment that a recipe lists; none where the recipe is one of `cuvee train`.
    pub fn read(recipe: &Path, flags: &ArgMatches) -> Result<Option<Self>> {
        Ok(Experiment::read(recipe, flags)?.map(|experiment| Self::Experiment(Box::new(experiment))))
    }

    /// What no single flag can know.
    pub fn check(&self, flags: &ArgMatches) -> Result<()> {
        match self {
            Self::References(args) => args.check(flags),
            Self::Experiment(_) => Ok(()),
        }
    }
}

pub fn run(args: &Compare) -> Result<()> {
    match args {
        Compare::References(args) => references::run(args),
        Compare::Experiment(experiment) => jobs::run(experiment),
    }
}
