//! `cuvee eval --prompts`: completions that a model writes, in numbers: what rewards say of them, how far they are from a reference, how
//! they read; and what the model makes of other texts.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;

use super::args::EvalArgs;
use super::device::Job;
use super::soup::{Completion, MeasureArgs, Written, prompts};
use crate::error::Result;
use crate::ops::Backend;
use crate::rewards::{Jury, RewardSpec, Rewards, Sample};
use crate::train::Estimate;

/// What is asked of a model that writes.
#[derive(Debug, Clone, PartialEq, Args)]
#[command(next_help_heading = "Completions")]
pub struct WrittenArgs {
    /// Prompts to complete, one a row, at temperature 1 over the whole vocabulary, and to measure what is written: by --reward, by
    /// its distance from --ref-model. --samples [default: 2], --max-new-tokens and --seed are of these
    #[arg(long, value_name = "FILE", conflicts_with_all = ["dataset", "task"])]
    pub prompts: Option<PathBuf>,
    /// What completions are worth, times F: a reward model's folder, fluency:DIR of a language model, or a TOML file of rules;
    /// of weight 0 it is measured and does not count in the sum. Repeat the flag for several
    #[arg(long, value_name = "WHAT[=F]", value_parser = RewardSpec::parse, requires = "prompts")]
    pub reward: Vec<RewardSpec>,
    /// Texts whose loss says what the model can do besides
    #[arg(long, value_name = "FILE", requires = "prompts")]
    pub texts: Option<PathBuf>,
}

/// Of the completions, where the flags say nothing.
const SAMPLES: usize = 2;
const MAX_NEW_TOKENS: usize = 48;
const SEED: u64 = 42;

/// By name, some with NAME_stderr beside.
type Numbers = BTreeMap<String, f64>;

/// Prints what a model's completions of the prompts in `file` come to.
pub fn run<B: Backend>(device: &B, args: &EvalArgs, file: &Path) -> Result<()> {
    let measure = MeasureArgs {
        model: args.model[0].clone(),
        base_model: args.ref_model.clone(),
        prompts: file.to_path_buf(),
        plain_prompts: None,
        texts: args.written.texts.clone(),
        samples: args.tasks.samples.unwrap_or(SAMPLES),
        max_new_tokens: args.tasks.max_new_tokens.unwrap_or(MAX_NEW_TOKENS),
        seed: args.tasks.seed.unwrap_or(SEED),
        adapters: args.adapters.clone(),
        engine: args.engine.clone(),
        precision: args.precision.clone(),
    };
    let specs = &args.written.reward;
    let rewards = (!specs.is_empty()).then(|| Rewards::open(specs)).transpose()?;
    let written = (&measure).run(device)?;
    let mut numbers = read(&written.completions);
    if args.ref_model.is_some() {
        numbers.extend(distance(&written.completions));
    }
    numbers.extend(written.nll.map(|nll| ("nll".to_string(), nll)));
    if let Some(rewards) = &rewards {
        numbers.extend(worth(device, args, rewards, file, &written)?);
    }
    if args.json {
        let (model, prompts, samples) = (&args.model[0], written.prompts, written.samples);
        let json = json!({"model": model, "prompts": prompts, "samples": samples, "numbers": numbers});
        return super::print(&format!("{json}\n"));
    }
    let width = numbers.keys().map(String::len).max().unwrap_or(0);
    let lines = numbers.iter().map(|(name, value)| format!("{name:<width$}  {value:.4}\n"));
    super::print(&lines.collect::<String>())
}

fn estimated(name: &str, values: &[f64]) -> [(String, f64); 2] {
    let known: Vec<f64> = values.iter().copied().filter(|x| !x.is_nan()).collect();
    let Estimate { mean, stderr } = Estimate::of(&known);
    [(name.to_string(), mean), (format!("{name}_stderr"), stderr)]
}

/// How completions read: their length, what share of a completion's words is new in it (types), of all pairs of neighbouring words.
fn read(completions: &[Completion]) -> Numbers {
    let words: Vec<Vec<&str>> = completions.iter().map(|one| one.text.split_whitespace().collect()).collect();
    let types = |words: &Vec<&str>| words.iter().collect::<HashSet<_>>().len() as f64 / words.len() as f64;
    let pairs = || words.iter().flat_map(|words| words.windows(2));
    let (all, different) = (pairs().count(), pairs().collect::<HashSet<_>>().len());
    let tokens: usize = completions.iter().map(|one| one.ids.len()).sum();
    let nats: f64 = completions.iter().map(|one| one.logp).sum();
    let finished: Vec<f64> = completions.iter().map(|one| f64::from(u8::from(one.finished))).collect();
    let mut numbers = Numbers::new();
    numbers.extend(estimated("words", &words.iter().map(|words| words.len() as f64).collect::<Vec<_>>()));
    numbers.extend(estimated("types", &words.iter().map(types).collect::<Vec<_>>()));
    numbers.extend(estimated("finished", &finished));
    numbers.insert("distinct_2".into(), different as f64 / all.max(1) as f64);
    // Of what is sampled from a distribution, the mean of -ln p is its entropy.
    numbers.insert("entropy".into(), -nats / tokens.max(1) as f64);
    numbers
}

/// KL(policy || reference), nats a completion, and its root.
fn distance(completions: &[Completion]) -> Numbers {
    let ratios: Vec<f64> = completions.iter().map(|one| one.logp - one.base_logp).collect();
    let Estimate { mean, stderr } = Estimate::of(&ratios);
    let d = mean.max(0.0).sqrt();
    let error = if d > 0.0 { stderr / (2.0 * d) } else { stderr.sqrt() };
    let named = [("kl", mean), ("kl_stderr", stderr), ("sqrt_kl", d), ("sqrt_kl_stderr", error)];
    named.into_iter().map(|(name, value)| (name.to_string(), value)).collect()
}

/// `reward` is the weighted sum, `rewards/NAME` each alone.
fn worth<B: Backend>(
    device: &B,
    args: &EvalArgs,
    rewards: &Rewards,
    file: &Path,
    written: &Written,
) -> Result<Numbers> {
    let prompts = prompts(file)?;
    let mut samples = Vec::new();
    for (at, Completion { text: completion, ids: completion_ids, finished, .. }) in
        written.completions.iter().enumerate()
    {
        let (row, finished) = (at / written.samples, *finished);
        let prompt = &prompts[row];
        samples.push(Sample { prompt, completion, answer: None, row, prompt_ids: &[], completion_ids, finished });
    }
    let said = Jury::new(device, rewards, super::packing(&args.batching)).score(&samples)?;
    let sums: Vec<f64> = (0..samples.len()).map(|s| rewards.sum(said.iter().map(|of| of[s]))).collect();
    let mut numbers: Numbers = estimated("reward", &sums).into_iter().collect();
    for (name, of) in rewards.names().iter().zip(&said) {
        numbers.extend(estimated(&format!("rewards/{name}"), of));
    }
    Ok(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(text: &str, logp: f64, base_logp: f64) -> Completion {
        Completion { text: text.into(), ids: vec![1, 2], finished: true, logp, base_logp }
    }

    #[test]
    fn what_is_written_is_counted() {
        let numbers = read(&[written("a b a b", -2.0, 0.0), written(" a  b ", -4.0, 0.0)]);
        assert_eq!((numbers["words"], numbers["types"], numbers["distinct_2"]), (3.0, 0.75, 0.5));
        assert_eq!((numbers["entropy"], numbers["finished"]), (1.5, 1.0));
        // An empty completion has no share.
        assert_eq!(read(&[written("", -1.0, 0.0), written("a a", -1.0, 0.0)])["types"], 0.5);
    }

    #[test]
    fn the_distance_is_the_root_of_the_mean_log_ratio() {
        let numbers = distance(&[written("a", -1.0, -6.0), written("b", -2.0, -5.0)]);
        assert_eq!((numbers["kl"], numbers["kl_stderr"], numbers["sqrt_kl"]), (4.0, 1.0, 2.0));
        assert_eq!(numbers["sqrt_kl_stderr"], 0.25);
        assert_eq!(distance(&[written("a", -6.0, -5.0), written("b", -6.0, -5.0)])["sqrt_kl"], 0.0);
    }
}
