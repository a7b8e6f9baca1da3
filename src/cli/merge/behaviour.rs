//! How far two models that should be one say different things.

use std::path::PathBuf;

use clap::{ArgMatches, Args};
use serde::Serialize;

use crate::cli::args::{BatchingArgs, Dtype, EngineArgs, LimitArgs};
use crate::cli::device::{self, Job};
use crate::cli::{encode, logps, needs, packing};
use crate::data::{Dataset, Tokenizer};
use crate::error::Result;
use crate::model::Checkpoint;
use crate::ops::Backend;
use crate::progress::say;

#[derive(Debug, Clone, PartialEq, Args)]
pub struct BehaviourArgs {
    /// Texts or pairs on which to compare what goes in with what comes out: the log-probabilities that both give to completions
    #[arg(long, value_name = "FILE", help_heading = "Files")]
    pub dataset: Option<PathBuf>,
    #[command(flatten)]
    pub limits: LimitArgs,
    #[command(flatten)]
    pub engine: EngineArgs,
}

impl BehaviourArgs {
    /// What no single flag can know; `too` names options that only the comparison uses, where the command has no other use
    /// for them.
    pub fn check(&self, flags: &ArgMatches, too: &[&str]) -> Result<()> {
        for option in ["max_length", "on_overflow", "device", "batch_invariant"].iter().chain(too) {
            needs(flags, option, "dataset", "it is there to compare models on data")?;
        }
        self.limits.check(flags)?;
        self.engine.check()
    }
}

/// Differences of log-probabilities, nats.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Behaviour {
    pub sequences: usize,
    /// Of whole completions.
    pub mean: f64,
    pub largest: f64,
    /// Of single tokens.
    pub largest_token: f64,
}

/// Scores the data set with both models, one after the other; `None` where no data set was given.
pub fn compare(args: &BehaviourArgs, models: [&Checkpoint; 2]) -> Result<Option<Behaviour>> {
    let Some(dataset) = &args.dataset else { return Ok(None) };
    let tokenizer = Tokenizer::load(&models[0].dir)?;
    let dataset = Dataset::load(dataset, &tokenizer, &encode(args.limits.max_length, args.limits.on_overflow))?;
    dataset.report().iter().for_each(say);
    let job = Comparison { dataset: &dataset.not_empty()?, models };
    device::run(&args.engine, Dtype::F32, None, job).map(Some)
}

struct Comparison<'a> {
    dataset: &'a Dataset,
    models: [&'a Checkpoint; 2],
}

impl Job for Comparison<'_> {
    type Output = Behaviour;

    fn run<B: Backend>(self, device: &B) -> Result<Behaviour> {
        let batching = BatchingArgs { micro_batch_tokens: None, no_prefix_sharing: false };
        let score = |model| logps::score(device, model, self.dataset, packing(&batching));
        let (first, second) = (score(self.models[0])?, score(self.models[1])?);
        let mut found = Behaviour::default();
        for (first, second) in first.iter().flatten().zip(second.iter().flatten()) {
            let tokens = first.iter().zip(second).map(|(a, b)| f64::from(*a) - f64::from(*b));
            let whole = tokens.clone().sum::<f64>().abs();
            found.sequences += 1;
            found.mean += whole;
            found.largest = found.largest.max(whole);
            found.largest_token = tokens.map(f64::abs).fold(found.largest_token, f64::max);
        }
        found.mean /= found.sequences.max(1) as f64;
        Ok(found)
    }
}

impl Behaviour {
    pub fn text(&self, what: &str) -> String {
        format!(
            "{what}: log-probabilities of {} completions differ by {:.3e} nats in the mean, {:.3e} at most; of a token by {:.3e} at \
             most\n",
            self.sequences, self.mean, self.largest, self.largest_token
        )
    }
}
