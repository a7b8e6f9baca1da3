//! `cuvee lab`: where alignment starts to hurt. Toys that show why, fits that say where, sweeps that measure it, their report.

mod fit;
mod toy;

use clap::{Args, Subcommand};

use crate::error::Result;

#[derive(Debug, Clone, PartialEq, Args)]
#[command(
    allow_negative_numbers = true,
    after_help = "\
Reward over-optimisation: as a policy moves away from its reference, d = sqrt(KL), what it is really worth rises and then falls, while
loss and implicit accuracy go on improving (Gao et al., arXiv:2210.10760; Rafailov et al., arXiv:2406.02900).

Examples:
  cuvee lab toy --output-dir runs/toy
  cuvee lab fit runs/dpo-1 runs/dpo-2 --output-dir runs/fit"
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
}

pub fn run(args: &LabArgs) -> Result<()> {
    match &args.what {
        LabWhat::Fit(args) => fit::run(args),
        LabWhat::Toy(args) => toy::run(args),
    }
}
