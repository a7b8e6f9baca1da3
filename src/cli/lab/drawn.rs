//! Completions that a model writes for prompts of a file, and what rewards say of them.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::Value;

use crate::cli::args::{EngineArgs, PrecisionArgs, above_zero_to_one, count, seed, zero_or_more};
use crate::cli::device::Job;
use crate::cli::{Command, parse};
use crate::data::{Content, Packing};
use crate::error::{Error, Result};
use crate::ops::Backend;
use crate::rewards::{Jury, RewardSpec, Rewards, Sample};
use crate::train::MICRO_BATCH_TOKENS;

#[derive(Debug, Clone, PartialEq, Args)]
pub struct DrawnArgs {
    /// Model that writes the completions: a Hugging Face folder
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Rows with a prompt each, a text: .jsonl or .jsonl.gz
    #[arg(long, value_name = "FILE")]
    pub prompts: PathBuf,
    /// Length limit of a completion, in tokens
    #[arg(long, value_name = "N", default_value = "64", value_parser = count)]
    pub max_new_tokens: usize,
    /// Randomness
    #[arg(long, value_name = "F", default_value = "1.0", value_parser = zero_or_more)]
    pub temperature: f64,
    /// Sample from the likeliest tokens that hold this share of the probability, above 0 to 1
    #[arg(long, value_name = "F", default_value = "1.0", value_parser = above_zero_to_one)]
    pub top_p: f64,
    /// Of the samples
    #[arg(long, value_name = "N", default_value = "42", value_parser = seed)]
    pub seed: u64,
    #[command(flatten)]
    pub engine: EngineArgs,
    #[command(flatten)]
    pub precision: PrecisionArgs,
}

impl DrawnArgs {
    /// So many completions of each prompt, one prompt after the other, as `cuvee generate --out` writes them.
    pub fn draw<B: Backend>(&self, device: &B, samples: usize) -> Result<Vec<Value>> {
        let path = |name: &str, path: &Path| {
            let mut flag = OsString::from(format!("--{name}="));
            flag.push(path);
            flag
        };
        let Self { max_new_tokens, temperature, top_p, seed, .. } = self;
        let numbers = [
            format!("--samples={samples}"),
            format!("--max-new-tokens={max_new_tokens}"),
            format!("--temperature={temperature}"),
            format!("--top-p={top_p}"),
            format!("--seed={seed}"),
            format!("--dtype={}", self.precision.dtype.name()),
        ];
        let paths = [path("model", &self.model), path("prompts", &self.prompts), path("out", Path::new("-"))];
        let args = ["cuvee", "generate"].map(OsString::from).into_iter().chain(paths);
        match parse(args.chain(numbers.map(OsString::from))) {
            Ok(cli) => match cli.command {
                Command::Generate(generate) => (&generate).run(device),
                _ => unreachable!("it was asked for"),
            },
            Err(failure) => Err(Error::option("cuvee generate", failure.into_text())),
        }
    }
}

/// What each of those completions is worth; NaN where no reward says anything.
pub fn judge<B: Backend>(device: &B, lines: &[Value], specs: &[RewardSpec]) -> Result<Vec<f64>> {
    let rewards = Rewards::open(specs)?;
    let said = said(device, lines, &rewards)?;
    Ok((0..lines.len()).map(|s| rewards.sum(said.iter().map(|of| of[s]))).collect())
}

/// `[rewards][completions]`, NaN where a reward says nothing.
pub fn said<B: Backend>(device: &B, lines: &[Value], rewards: &Rewards) -> Result<Vec<Vec<f64>>> {
    let text = |line: &Value| Content::Text(line["prompt"].as_str().unwrap_or_default().into());
    let prompts: Vec<Content> = lines.iter().map(text).collect();
    let tokens = |line: &Value| {
        let ids = line["ids"].as_array().into_iter().flatten().filter_map(Value::as_u64);
        ids.map(|id| id as u32).collect::<Vec<_>>()
    };
    let ids: Vec<Vec<u32>> = lines.iter().map(tokens).collect();
    let sample = |s: usize| Sample {
        prompt: &prompts[s],
        completion: lines[s]["completion"].as_str().unwrap_or_default(),
        answer: None,
        row: lines[s]["row"].as_u64().unwrap_or(0) as usize,
        prompt_ids: &[],
        completion_ids: &ids[s],
        finished: lines[s]["finished"] == true,
    };
    let samples: Vec<Sample> = (0..lines.len()).map(sample).collect();
    let packing = Packing::new(MICRO_BATCH_TOKENS);
    Jury::new(device, rewards, packing).score(&samples)
}
