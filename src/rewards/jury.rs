//! Rewards at work.

use super::cache::Cached;
use super::model::Bench;
use super::process::Worker;
use super::registry::Kind;
use super::{Rewards, Rule, Sample, Verdict};
use crate::data::Packing;
use crate::error::{Error, Result};
use crate::ops::Backend;

/// One reward at work.
pub trait Judge {
    /// `[samples]`
    fn judge(&mut self, samples: &[&Sample]) -> Result<Vec<Verdict>>;
}

/// Rewards on a device. Programs start with the first completion that they are asked about, models are loaded then and stay.
pub struct Jury<'a> {
    rewards: &'a Rewards,
    judges: Vec<Box<dyn Judge + 'a>>,
    /// `[R]` of the samples that were scored last.
    spreads: Vec<f64>,
}

impl<'a> Jury<'a> {
    /// `packing` says how many tokens a reward model sees at once.
    pub fn new<B: Backend>(device: &'a B, rewards: &'a Rewards, packing: Packing) -> Self {
        let judge = |kind: &'a Kind| -> Box<dyn Judge + 'a> {
            match kind {
                Kind::Rule(rule) => Box::new(&**rule),
                Kind::Process(program) => Box::new(Cached::new(Worker::new(program))),
                Kind::Http(server) => Box::new(Cached::new(server)),
                Kind::Models(panel) => Box::new(Cached::new(Bench::new(device, panel, packing))),
            }
        };
        let judges = rewards.rewards.iter().map(|reward| judge(&reward.kind)).collect();
        Self { rewards, judges, spreads: Vec::new() }
    }

    /// `[R][samples]`, NaN where a reward says nothing, else finite. Samples with one prompt, one behind the other, share
    /// its computation.
    ///
    /// # Errors
    /// A program that dies, hangs, reports an error or does not keep to the protocol; a model that cannot be loaded, or gives
    /// no number; a pattern that cannot be searched for.
    pub fn score(&mut self, samples: &[Sample]) -> Result<Vec<Vec<f64>>> {
        let samples: Vec<&Sample> = samples.iter().collect();
        let (mut rewards, mut spreads) = (Vec::new(), Vec::new());
        for (reward, judge) in self.rewards.rewards.iter().zip(&mut self.judges) {
            let named = |detail: String| Error::option("--reward", format!("{:?}: {detail}", reward.name));
            let verdicts = judge.judge(&samples).map_err(|e| named(e.to_string()))?;
            if let Some(at) = verdicts.iter().position(|verdict| verdict.reward.is_infinite()) {
                return Err(named(format!("gives a completion of row {} an infinite reward", samples[at].row)));
            }
            rewards.push(verdicts.iter().map(|verdict| reward.shape.of(verdict.reward)).collect());
            let known: Vec<f64> = verdicts.iter().map(|verdict| verdict.spread).filter(|s| !s.is_nan()).collect();
            spreads.push(reward.shape.of_spread(known.iter().sum::<f64>() / known.len() as f64));
        }
        self.spreads = spreads;
        Ok(rewards)
    }

    /// Of each reward that several models give together: its name, and the mean of their standard deviation over the samples
    /// that were scored last.
    pub fn spreads(&self) -> impl Iterator<Item = (&str, f64)> {
        let names = self.rewards.rewards.iter().map(|reward| reward.name.as_str());
        names.zip(self.spreads.iter().copied()).filter(|(_, spread)| !spread.is_nan())
    }
}

impl Judge for &dyn Rule {
    fn judge(&mut self, samples: &[&Sample]) -> Result<Vec<Verdict>> {
        let one = |sample: &&Sample| match self.reward(sample) {
            Ok(reward) => Ok(Verdict::of(reward)),
            Err(detail) => Err(Error::option(format!("a completion of row {}", sample.row), detail)),
        };
        samples.iter().map(one).collect()
    }
}
