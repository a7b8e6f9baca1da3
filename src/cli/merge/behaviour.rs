//! How far two models that should be one say different things.

use std::path::PathBuf;

use clap::{ArgMatches, Args};
use serde::Serialize;

use crate::cli::args::{BatchingArgs, Dtype, EngineArgs, LimitArgs};
use crate::cli::device::{self, Job};
use crate::cli::{encode, logps, needs, packing};
use crate::data::{Dataset, EncodeOptions, Overflow, Tokenizer};
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
    /// for them, and `always` says that models are compared without a data set, too.
    pub fn check(&self, flags: &ArgMatches, too: &[&str], always: bool) -> Result<()> {
        let of_device = ["device", "batch_invariant"].iter().chain(too).filter(|_| !always);
        for option in ["max_length", "on_overflow"].iter().chain(of_device) {
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

/// What is scored where nobody gives a data set.
const TEXT: &str = "The film was slow to begin with, but its last half hour is the best that I have seen in years.";

/// Scores the data set with both models, one after the other; `None` where no data set was given.
pub fn compare(args: &BehaviourArgs, models: [&Checkpoint; 2]) -> Result<Option<Behaviour>> {
    let Some(dataset) = &args.dataset else { return Ok(None) };
    let tokenizer = Tokenizer::load(&models[0].dir)?;
    let dataset = Dataset::load(dataset, &tokenizer, &encode(args.limits.max_length, args.limits.on_overflow))?;
    dataset.report().iter().for_each(say);
    on(args, &dataset.not_empty()?, models).map(Some)
}

/// The same on a short text, as far as 32 tokens of it.
pub fn compare_on_text(args: &BehaviourArgs, models: [&Checkpoint; 2]) -> Result<Behaviour> {
    let tokenizer = Tokenizer::load(&models[0].dir)?;
    let options = EncodeOptions { max_length: Some(32), on_overflow: Overflow::Truncate, ..EncodeOptions::default() };
    on(args, &Dataset::of_text("a short text", TEXT, &tokenizer, &options)?, models)
}

fn on(args: &BehaviourArgs, dataset: &Dataset, models: [&Checkpoint; 2]) -> Result<Behaviour> {
    device::run(&args.engine, Dtype::F32, None, Comparison { dataset, models })
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
