//! Flags about completions that the policy writes while it trains.

use clap::{ArgMatches, Args};
use serde::Serialize;

use super::args::{above_zero_to_one, count, steps, zero_or_more};
use super::needs;
use crate::data::Temperature;
use crate::rewards::RewardSpec;
use crate::train::Rollouts;

#[derive(Debug, Clone, PartialEq, Args, Serialize)]
#[command(next_help_heading = "Rollouts")]
pub struct RolloutArgs {
    /// Train on completions that the policy writes for the prompts of --dataset, worth what this says, times F: a reward
    /// model's folder, or a TOML file of rules (`cuvee score --help` shows one). Repeat the flag for several. Objectives like
    /// grpo and grao learn from all of a prompt's completions, those on pairs from the best and the worst (online DPO)
    #[arg(long, alias = "reward-funcs", value_name = "WHAT[=F]", value_parser = RewardSpec::parse)]
    pub reward: Vec<RewardSpec>,
    /// Completions of each prompt [default: 8]
    #[arg(long, alias = "group-size", value_name = "N", value_parser = count)]
    pub num_generations: Option<usize>,
    /// Optimizer steps on the same completions [default: 1]
    #[arg(long, value_name = "N", value_parser = steps)]
    pub num_iterations: Option<u64>,
    /// Length limit of a completion that is trained on, in tokens [default: 256]
    #[arg(long, value_name = "N", value_parser = count)]
    pub max_completion_length: Option<usize>,
    /// Randomness of such a completion, 0 for none [default: 1]
    #[arg(long, value_name = "F", value_parser = zero_or_more)]
    pub rollout_temperature: Option<f64>,
    /// Take log-probabilities of such a completion at this temperature, those of references too. At another one than
    /// --rollout-temperature the gradient is that of another policy than the one that wrote it [default: that of
    /// --rollout-temperature, or 1 where that is 0]
    #[arg(long, value_name = "F", value_parser = temperature)]
    pub logps_temperature: Option<f64>,
    /// Sample such a completion from the likeliest tokens that hold this share of the probability, above 0 to 1 [default: 1]
    #[arg(long, value_name = "F", value_parser = above_zero_to_one)]
    pub rollout_top_p: Option<f64>,
    /// Learn nothing from completions that reach that limit without an end; they still count in what others are compared with
    #[arg(long)]
    pub mask_truncated_completions: bool,
}

/// Those that say how completions are sampled, and nothing where none are.
pub(super) const OPTIONS: [&str; 6] = [
    "num_generations",
    "num_iterations",
    "max_completion_length",
    "rollout_temperature",
    "logps_temperature",
    "rollout_top_p",
];

/// Of a distribution.
fn temperature(text: &str) -> Result<f64, String> {
    let known = |number: f64| Temperature::new(number).map(|_| number);
    text.parse().ok().and_then(known).ok_or_else(|| "expected a number above 0".to_string())
}

impl RolloutArgs {
    pub fn check(&self, flags: &ArgMatches) -> crate::Result<()> {
        let how = "say what completions are rewarded by";
        OPTIONS.into_iter().try_for_each(|option| needs(flags, option, "reward", how))?;
        // A saved recipe says that it is off.
        match self.mask_truncated_completions {
            true => needs(flags, "mask_truncated_completions", "reward", how),
            false => Ok(()),
        }
    }

    /// None where the data's completions are trained on.
    pub fn rollouts(&self) -> Option<Rollouts> {
        let temperature = self.rollout_temperature.unwrap_or(1.0);
        (!self.reward.is_empty()).then(|| Rollouts {
            rewards: self.reward.clone(),
            samples: self.num_generations.unwrap_or(8),
            iterations: self.num_iterations.unwrap_or(1),
            max_new_tokens: self.max_completion_length.unwrap_or(256),
            temperature,
            logps_temperature: Temperature::new(self.logps_temperature.unwrap_or(temperature)).unwrap_or_default(),
            top_p: self.rollout_top_p.unwrap_or(1.0),
            mask_truncated: self.mask_truncated_completions,
        })
    }
}
