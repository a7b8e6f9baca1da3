//! `cuvee lab`: where alignment starts to hurt. Toys that show why, fits that say where, sweeps that measure it, their report.

mod best_of_n;
mod drawn;
mod fit;
mod pairs;
mod report;
mod scale;
mod sweep;
mod toy;

use clap::{Args, Subcommand};

use crate::error::Result;
pub use report::{WatchArgs, watch};

#[derive(Debug, Clone, PartialEq, Args)]
#[command(
    allow_negative_numbers = true,
    after_help = "\
Reward over-optimisation: as a policy moves away from its reference, d = sqrt(KL), what it is really worth rises and then falls, while
loss and implicit accuracy go on improving (Gao et al., arXiv:2210.10760; Rafailov et al., arXiv:2406.02900).

Examples:
  cuvee lab toy --output-dir runs/toy
  cuvee lab fit runs/dpo-1 runs/dpo-2 --output-dir runs/fit
  cuvee lab sweep recipes/overoptimisation.toml
  cuvee lab report runs/overoptimisation"
)]
pub struct LabArgs {
    #[command(subcommand)]
    pub what: LabWhat,
}

#[derive(Debug, Clone, PartialEq, Subcommand)]
pub enum LabWhat {
    /// Fit forms of the gold reward over sqrt(KL) to measured points: coefficients, peak, intervals, which form predicts best
    Fit(fit::FitArgs),
    /// Show over-optimisation in a second and without a language model: exact KL, exact gold reward
    Toy(toy::ToyArgs),
    /// Measure what the best of n completions by a proxy is worth by a gold reward, for every n
    BestOfN(Box<best_of_n::BestOfNArgs>),
    /// Let a gold reward label completions of a model: preferences of which it is known what they prefer
    Pairs(Box<pairs::PairsArgs>),
    /// Put rewards on one scale, that of a model's completions: z-scores, with weights and bounds, as a TOML file of rewards
    Scale(Box<scale::ScaleArgs>),
    /// Measure the gold reward along training over a grid of objectives, betas, models, seeds: a run a cell, each a process
    Sweep(sweep::SweepArgs),
    /// Write the report of a sweep: one page, and its numbers as JSON
    Report(report::ReportArgs),
}

/// What a sweep came to, for the terminal.
pub(super) use report::summary;

pub fn run(args: &LabArgs) -> Result<()> {
    match &args.what {
        LabWhat::Fit(args) => fit::run(args),
        LabWhat::Toy(args) => toy::run(args),
        LabWhat::BestOfN(args) => best_of_n::run(args),
        LabWhat::Pairs(args) => pairs::run(args),
        LabWhat::Scale(args) => scale::run(args),
        LabWhat::Sweep(args) => sweep::run(args),
        LabWhat::Report(args) => report::run(args),
    }
}
