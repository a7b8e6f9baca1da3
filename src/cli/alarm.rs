//! Flags about how far a run may go.

use clap::{ArgMatches, Args, ValueEnum};
use serde::Serialize;

use super::args::above_zero;
use super::{is_given, needs};
use crate::error::{Error, Result};
use crate::rewards::RewardSpec;
use crate::train::{self, Alarm, Lever};

#[derive(Debug, Clone, PartialEq, Args, Serialize)]
#[command(next_help_heading = "Over-optimisation")]
pub struct AlarmArgs {
    /// Let every evaluation judge its --kl-samples completions by this, times F, which nothing is trained on: what they are really
    /// worth. A reward model's folder, fluency:DIR of a language model, or a TOML file of rules, as of --reward; repeat the
    /// flag for several
    #[arg(long, value_name = "WHAT[=F]", value_parser = RewardSpec::parse)]
    pub gold_reward: Vec<RewardSpec>,
    /// Raise an alarm where KL from the first reference is above this, nats a completion
    #[arg(long, value_name = "F", value_parser = above_zero)]
    pub kl_budget: Option<f64>,
    /// What an alarm leads to: that of --kl-budget, or that the gold reward is below its best by two standard errors at two of
    /// --eval-steps in a row. stop ends the run with the best checkpoint; rollback goes on from there at half the learning rate
    /// [default: warn]
    #[arg(long, value_enum, value_name = "WHAT")]
    pub on_alarm: Option<OnAlarm>,
    /// What --on-alarm rollback changes each time: it halves the learning rate, or doubles the objective's beta
    /// [default: learning-rate]
    #[arg(long, value_enum, value_name = "WHAT")]
    pub rollback: Option<Rollback>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rollback {
    LearningRate,
    Beta,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnAlarm {
    Warn,
    Stop,
    Rollback,
}

impl AlarmArgs {
    pub fn check(&self, flags: &ArgMatches) -> Result<()> {
        needs(flags, "gold_reward", "kl_samples", "say how many completions it judges")?;
        needs(flags, "kl_budget", "kl_samples", "say on how many completions the distance is measured")?;
        needs(flags, "kl_budget", "eval_steps", "say how often to look")?;
        needs(flags, "on_alarm", "eval_steps", "say how often to look")?;
        if is_given(flags, "on_alarm") && self.gold_reward.is_empty() && self.kl_budget.is_none() {
            let detail = "does nothing without --gold-reward or --kl-budget; say what raises an alarm";
            return Err(Error::option("--on-alarm", detail));
        }
        if is_given(flags, "rollback") && self.on_alarm != Some(OnAlarm::Rollback) {
            return Err(Error::option("--rollback", "does nothing without --on-alarm rollback; drop it"));
        }
        Ok(())
    }

    pub fn alarm(&self) -> Alarm {
        let action = match self.on_alarm {
            None | Some(OnAlarm::Warn) => train::OnAlarm::Warn,
            Some(OnAlarm::Stop) => train::OnAlarm::Stop,
            Some(OnAlarm::Rollback) => train::OnAlarm::Rollback,
        };
        let lever = match self.rollback {
            None | Some(Rollback::LearningRate) => Lever::LearningRate,
            Some(Rollback::Beta) => Lever::Beta,
        };
        Alarm { kl_budget: self.kl_budget, action, lever }
    }
}
