//! `cuvee soup measure`: completions at temperature 1 over the whole vocabulary, with what the policy and the base say of them.

use std::path::PathBuf;

use clap::Args;
use serde::{Deserialize, Serialize};

use crate::cli::adapters::AdapterArgs;
use crate::cli::args::{BatchingArgs, EngineArgs, OnOverflow, PrecisionArgs, count, seed};
use crate::cli::device::{self, Job};
use crate::cli::{encode, logps, packing, print};
use crate::data::{Dataset, Example, Prompt, Sequence, Tokenizer, read_prompts};
use crate::device::{Arena, Dry};
use crate::error::{Error, Result};
use crate::model::{Checkpoint, Init, Model, Options};
use crate::ops::Backend;
use crate::progress::Progress;
use crate::references::Scorer;
use crate::rollout::{Request, Rollout, Sampling};
use crate::tasks::{self, Writing, complete, text_of};

#[derive(Debug, Clone, PartialEq, Args)]
#[command(
    allow_negative_numbers = true,
    after_help = "\
Prints one JSON object: completions with their log-probabilities, nats, by the policy and by the base, whose difference has the
KL from the base as its mean; and nll, nats a token of the texts.

Example:
  cuvee soup measure --model BASE --adapter A=0.3 --adapter B=0.7 --prompts heldout.jsonl > blend.json"
)]
pub struct MeasureArgs {
    /// The policy, or with --adapter the model under it
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// What the policy came from [default: --model without its adapters]
    #[arg(long, value_name = "DIR")]
    pub base_model: Option<PathBuf>,
    /// Rows with a prompt each, text or messages
    #[arg(long, value_name = "FILE")]
    pub prompts: PathBuf,
    /// The same prompts as the base is to see them, row by row [default: --prompts]
    #[arg(long, value_name = "FILE")]
    pub plain_prompts: Option<PathBuf>,
    /// Texts whose log-probability says what the policy can do besides
    #[arg(long, value_name = "FILE")]
    pub texts: Option<PathBuf>,
    /// Completions of each prompt
    #[arg(long, value_name = "N", default_value = "4", value_parser = count)]
    pub samples: usize,
    /// Length limit of a completion, in tokens
    #[arg(long, value_name = "N", default_value = "48", value_parser = count)]
    pub max_new_tokens: usize,
    /// Seed of the completions: policies that are measured with the same one are lucky alike
    #[arg(long, value_name = "N", default_value = "42", value_parser = seed)]
    pub seed: u64,
    #[command(flatten)]
    pub adapters: AdapterArgs,
    #[command(flatten)]
    pub engine: EngineArgs,
    #[command(flatten)]
    pub precision: PrecisionArgs,
}

/// What is printed.
#[derive(Serialize, Deserialize)]
pub struct Written {
    pub prompts: usize,
    pub samples: usize,
    /// `[prompts * samples]`
    pub completions: Vec<Completion>,
    /// Nats a token of the texts.
    pub nll: Option<f64>,
}

#[derive(Serialize, Deserialize)]
pub struct Completion {
    pub text: String,
    pub ids: Vec<u32>,
    pub finished: bool,
    /// Of the whole completion, its end included, nats.
    pub logp: f64,
    pub base_logp: f64,
}

pub fn run(args: &MeasureArgs) -> Result<()> {
    let written = device::run(&args.engine, args.precision.dtype, None, args)?;
    print(&format!("{}\n", serde_json::to_string(&written).expect("plain data")))
}

impl Job for &MeasureArgs {
    type Output = Written;

    fn run<B: Backend>(self, device: &B) -> Result<Written> {
        device::check_dtype(device, self.precision.dtype)?;
        let policy = self.adapters.open(&self.model, Checkpoint::open)?;
        let base = Checkpoint::open(self.base_model.as_deref().unwrap_or(&self.model))?;
        let tokenizer = Tokenizer::load(&self.model)?;
        let prompts = read_prompts(&self.prompts, &tokenizer)?;
        let plain = match &self.plain_prompts {
            None => prompts.clone(),
            Some(path) => read_prompts(path, &tokenizer)?,
        };
        if plain.len() != prompts.len() {
            let detail = format!("{} rows, and --prompts has {}; give the same prompts", plain.len(), prompts.len());
            return Err(Error::option("--plain-prompts", detail));
        }
        let rollouts = self.complete(device, &policy, &tokenizer, &prompts)?;
        let example = |rollout: &Rollout| {
            let prompt = &plain[rollout.prompt].ids;
            let sequence = Sequence::new([prompt, &rollout.ids[..]].concat(), prompt.len());
            Example { row: rollout.prompt, sequences: vec![sequence], ..Example::default() }
        };
        let examples: Vec<Example> = rollouts.iter().map(example).collect();
        let base_logps = self.score(device, &base, &examples)?;
        let completion = |(rollout, base_logp): (&Rollout, f64)| {
            Ok(Completion {
                text: text_of(&tokenizer, &prompts[rollout.prompt].ids, &rollout.ids)?,
                ids: rollout.ids.clone(),
                finished: rollout.finished(),
                logp: rollout.logps.iter().map(|x| f64::from(*x)).sum(),
                base_logp,
            })
        };
        let completions = rollouts.iter().zip(base_logps).map(completion).collect::<Result<_>>()?;
        let nll = self.nll(device, &policy, &tokenizer)?;
        Ok(Written { prompts: prompts.len(), samples: self.samples, completions, nll })
    }
}

const BATCHING: BatchingArgs = BatchingArgs { micro_batch_tokens: None, no_prefix_sharing: false };

impl MeasureArgs {
    fn complete<B: Backend>(
        &self,
        device: &B,
        policy: &Checkpoint,
        tokenizer: &Tokenizer,
        prompts: &[Prompt],
    ) -> Result<Vec<Rollout>> {
        let of = |prompt: &Prompt| tasks::Prompt {
            text: String::new(),
            ids: prompt.ids.clone(),
            until: Vec::new(),
            answer: None,
        };
        let prompts: Vec<tasks::Prompt> = prompts.iter().map(of).collect();
        let Self { max_new_tokens, samples, seed, .. } = *self;
        let writing = Writing { max_new_tokens, samples, sampling: Sampling::plain(seed) };
        let longest = writing.requests(&prompts).iter().map(Request::longest).max().unwrap_or(0);
        let options = Options::frozen(longest).holding(policy, Init::Checkpoint).with_adapters(policy);
        let (spec, naming) = (&policy.spec, policy.architecture.naming);
        let mut arena = Arena::new(device, &Model::<Dry>::plan(device.keeps(), spec, naming, options))?;
        let mut model = Model::new(&mut arena, spec, naming, options);
        Init::Checkpoint.fill(device, policy, &mut model)?;
        let mut progress = Progress::new("writing", prompts.len() as u64, "prompts");
        let mut done = |finished| progress.at(finished as u64, "");
        let rollouts = complete(device, &model, tokenizer, &prompts, writing, &mut done)?;
        progress.finish();
        Ok(rollouts.into_iter().flatten().collect())
    }

    fn score<B: Backend>(&self, device: &B, base: &Checkpoint, examples: &[Example]) -> Result<Vec<f64>> {
        let packing = packing(&BATCHING);
        let largest = packing.largest(&packing.extents(examples));
        let mut scorer = Scorer::new(device, base, Init::Checkpoint, &largest)?;
        let mut progress = Progress::new("asking the base", examples.len() as u64, "completions");
        let examples: Vec<&Example> = examples.iter().collect();
        let logps = scorer.score(&examples, packing, &mut |done| progress.at(done as u64, ""))?;
        progress.finish();
        Ok(logps.iter().map(|of| of[0].iter().map(|x| f64::from(*x)).sum()).collect())
    }

    fn nll<B: Backend>(&self, device: &B, policy: &Checkpoint, tokenizer: &Tokenizer) -> Result<Option<f64>> {
        let Some(texts) = &self.texts else { return Ok(None) };
        let dataset = Dataset::load(texts, tokenizer, &encode(None, OnOverflow::Drop))?.not_empty()?;
        let logps = logps::score(device, policy, &dataset, packing(&BATCHING))?;
        let tokens = || logps.iter().flatten().flatten();
        Ok(Some(-tokens().map(|x| f64::from(*x)).sum::<f64>() / tokens().count() as f64))
    }
}
