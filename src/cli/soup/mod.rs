//! `cuvee soup`: blends of policies with one base; in subcommands what is measured of them.

mod data;
mod fit;
mod measure;
mod recipe;
mod sweep;

use std::path::PathBuf;

use clap::{ArgMatches, Args, Subcommand, ValueEnum};

use super::adapters::{AdapterArg, adapter};
use super::args::{Dtype, count};
use super::is_given;
use super::merge::{self, AdaptersArgs, BehaviourArgs, How, MergeArgs, MergeWhat, ModelArg, ModelsArgs};
use crate::error::{Error, Result};
use crate::soup::check;
pub use data::prompts;
pub use measure::{Completion, MeasureArgs, Written};

#[derive(Debug, Clone, PartialEq, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    allow_negative_numbers = true,
    after_help = "\
One policy for each preference, all trained from one base, blended with any weights on the simplex when they are used
(Personalized Soups, arXiv:2310.11564; Rewarded Soups, arXiv:2306.04488). `train`, `logps`, `eval`, `generate`, `score` and
`plan` take --adapter DIR=F themselves; a blend that is written carries which adapters, weights and base made it
(`cuvee lineage`).

Examples:
  cuvee soup --adapter BRIGHT=0.3 --adapter BRIEF=0.7 --output-dir runs/blend
  cuvee soup --model BASE --adapter BRIGHT=0.3 --adapter BRIEF=0.7 --method delta --output-dir runs/model
  cuvee soup --model BRIGHT=0.3 --model BRIEF=0.7 --output-dir runs/model
  cuvee soup sweep recipes/soups/three.toml
  cuvee soup fit --sweep runs/soups --comparisons choices.jsonl"
)]
pub struct SoupArgs {
    #[command(subcommand)]
    pub what: Option<SoupWhat>,
    #[command(flatten)]
    pub blend: BlendArgs,
}

#[derive(Debug, Clone, PartialEq, Args)]
pub struct BlendArgs {
    /// A policy's adapter and its weight; repeat the flag for several
    #[arg(long, value_name = "DIR[=F]", value_parser = adapter, required_unless_present = "model", help_heading = "Files")]
    pub adapter: Vec<AdapterArg>,
    /// With adapters their base, which `delta` needs. Without, a whole policy and its weight; repeat the flag for several
    #[arg(long, value_name = "DIR[=F]", value_parser = merge::model, help_heading = "Files")]
    pub model: Vec<ModelArg>,
    /// Folder for the blend: an adapter, or with `delta` or whole policies a model
    #[arg(long, value_name = "DIR", required = true, help_heading = "Files")]
    pub output_dir: Option<PathBuf>,
    /// How adapters are blended; whole policies have one way
    #[arg(long, value_name = "NAME", default_value = "cat", help_heading = "Blend")]
    pub method: How,
    /// Rank of the result of svd [default: the largest of the adapters' ranks]
    #[arg(long, value_name = "N", value_parser = count, help_heading = "Blend")]
    pub rank: Option<usize>,
    /// How weights of a whole model are written [default: as the base, else the first model, has them]
    #[arg(long, value_name = "TYPE", help_heading = "Blend")]
    pub dtype: Option<Dtype>,
    /// Take weights that are negative or do not sum to 1 as they are: no mixture, but an extrapolation
    #[arg(long, help_heading = "Blend")]
    pub any_weights: bool,
    #[command(flatten)]
    pub behaviour: BehaviourArgs,
}

#[derive(Debug, Clone, PartialEq, Subcommand)]
pub enum SoupWhat {
    /// Train a policy for each preference of a recipe, and measure their blends beside other ways to serve many preferences
    Sweep(sweep::SweepArgs),
    /// Complete prompts with a blend: what it writes, how far it is from the base, what it costs on other texts
    Measure(measure::MeasureArgs),
    /// Find a user's weights in choices between two texts; say what weights that nobody tried will come to
    Fit(fit::FitArgs),
}

impl SoupArgs {
    /// What no single flag can know.
    pub fn check(&self, flags: &ArgMatches) -> Result<()> {
        match (&self.what, flags.subcommand()) {
            (Some(SoupWhat::Sweep(args)), _) => args.engine.check(),
            (Some(SoupWhat::Measure(args)), _) => args.engine.check(),
            (Some(SoupWhat::Fit(args)), Some((_, flags))) => args.check(flags),
            (Some(SoupWhat::Fit(_)), None) => Ok(()),
            (None, _) => self.blend.check(flags),
        }
    }
}

pub fn run(args: &SoupArgs) -> Result<()> {
    match &args.what {
        Some(SoupWhat::Sweep(args)) => sweep::run(args),
        Some(SoupWhat::Measure(args)) => measure::run(args),
        Some(SoupWhat::Fit(args)) => fit::run(args),
        None => merge::run(&args.blend.merge()),
    }
}

impl BlendArgs {
    fn check(&self, flags: &ArgMatches) -> Result<()> {
        let mut weights: Vec<f64> = self.adapter.iter().map(|adapter| adapter.weight).collect();
        let mut names: Vec<String> = self.adapter.iter().map(|a| format!("--adapter {}", a.dir.display())).collect();
        match (&self.adapter[..], &self.model[..]) {
            ([], [_]) => return Err(Error::option("--model", "one policy is no blend; give another one")),
            ([], models) => {
                weights = models.iter().map(|model| model.weight.unwrap_or(1.0)).collect();
                names = models.iter().map(|m| format!("--model {}", m.path.display())).collect();
                if let Some(flag) = ["method", "rank", "dataset"].iter().find(|flag| is_given(flags, flag)) {
                    let detail = "is about adapters; whole policies are averaged as they are";
                    return Err(Error::option(format!("--{flag}"), detail));
                }
            }
            (_, [ModelArg { weight: Some(weight), path }]) => {
                let detail = format!("a base has no weight, found {weight}; type --model {}", path.display());
                return Err(Error::option("--model", detail));
            }
            (_, [_, _, ..]) => {
                return Err(Error::option("--model", "adapters have one base; give it once, or policies alone"));
            }
            _ => {}
        }
        if let (false, Err(instead)) = (self.any_weights, check(&weights)) {
            // A weight of 0 is no ingredient.
            let typed: Vec<String> =
                names.iter().zip(instead).filter(|(_, w)| *w > 0.0).map(|(name, w)| format!("{name}={w:.6}")).collect();
            let total: f64 = weights.iter().sum();
            let wrong = match weights.iter().find(|w| **w < 0.0) {
                Some(negative) => format!("{negative} is negative"),
                None => format!("weights sum to {total}, not to 1"),
            };
            let detail = format!("{wrong}; type {}, or add --any-weights to take them as they are", typed.join(" "));
            return Err(Error::option(if self.adapter.is_empty() { "--model" } else { "--adapter" }, detail));
        }
        match self.merge().what {
            Some(MergeWhat::Adapters(args)) => args.check(flags),
            _ => Ok(()),
        }
    }

    /// `cuvee merge adapters`, or `cuvee merge --method linear`.
    fn merge(&self) -> MergeArgs {
        let output_dir = self.output_dir.clone();
        let mut models = ModelsArgs {
            config: None,
            method: None,
            base_model: None,
            model: Vec::new(),
            output_dir: None,
            params: merge::ParamArgs::default(),
            r#override: Vec::new(),
            dtype: None,
            seed: 0,
            dry_run: false,
        };
        if !self.adapter.is_empty() {
            let adapters = AdaptersArgs {
                adapter: self.adapter.clone(),
                model: self.model.first().map(|base| base.path.clone()),
                output_dir: output_dir.expect("clap requires it"),
                method: self.method,
                rank: self.rank,
                dtype: self.dtype,
                behaviour: self.behaviour.clone(),
            };
            return MergeArgs { what: Some(MergeWhat::Adapters(adapters)), models };
        }
        let weighted = |model: &ModelArg| ModelArg { weight: Some(model.weight.unwrap_or(1.0)), ..model.clone() };
        models.method = merge::Method::value_variants().iter().copied().find(|method| method.0.name == "linear");
        models.model = self.model.iter().map(weighted).collect();
        models.params.0.insert("normalize".into(), vec![false.into()]);
        models.output_dir = output_dir;
        models.dtype = self.dtype.map(|dtype| match dtype {
            Dtype::F32 => merge::Stored::F32,
            Dtype::Bf16 => merge::Stored::Bf16,
        });
        MergeArgs { what: None, models }
    }
}
