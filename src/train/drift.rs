//! How far the policy has gone from its references, measured on completions of its own:
//!
//! ```text
//! KL(policy || reference) ~ mean over samples y of ln pi(y | x) - ln pi_ref(y | x)        k1 of whole sequences, unbiased
//! ```
//!
//! at temperature 1 over the whole vocabulary, since it is the policy's distribution that is asked about. Completions end at
//! `--max-new-tokens`. Not a sum of per-token estimates of another kind: those have other expectations on samples.

use super::online::{Written, prompt_of, written_text};
use super::policy::Policy;
use super::references::FreshReference;
use super::settings::Settings;
use super::step::sums;
use super::task::Task;
use crate::data::{Content, Example, Extent, Message, Packing, Parts, Row, Sequence, Tokenizer, encode_row, read_rows};
use crate::error::{Error, Result};
use crate::objectives::Metric;
use crate::ops::Backend;
use crate::references::{Detail, Fresh, Residency};
use crate::rollout::{Engine, Request, Rollout, Sampling};
use crate::scaling::on_length;
use crate::tasks::text_of;

/// Samples that are decoded together: their keys and values should not take more than training does.
pub const TOGETHER: usize = 32;
/// Where its streams of random numbers begin, beyond those of `--samples`. Every evaluation draws the same ones, so that
/// what changes between two is the policy.
const STREAM: u64 = 1 << 40;

/// A mean of samples and its standard error.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Estimate {
    pub mean: f64,
    pub stderr: f64,
}

impl Estimate {
    /// Of at least one number.
    pub fn of(values: &[f64]) -> Self {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let variance = values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
        Self { mean, stderr: (variance / n).sqrt() }
    }
}

/// A held-out prompt to complete, once in the list.
#[derive(Clone, Copy)]
pub struct Prompt<'a> {
    pub ids: &'a [u32],
    pub row: usize,
    /// Completions that it gets.
    pub samples: usize,
}

pub struct Drift<'a, B: Backend> {
    task: &'a Task,
    settings: &'a Settings,
    fresh: Fresh<'a, B>,
    prompts: Vec<Prompt<'a>>,
    /// The rows of the held-out file, where some reference or reward needs the text.
    rows: Vec<Row>,
    /// What the last measurement sampled, and its log-probabilities by the policy and by the first reference.
    samples: Vec<Rollout>,
    logps: Vec<f64>,
    first: Vec<f64>,
}

/// Held-out prompts for `samples` completions: those of the first rows, again from the start where there are fewer; equal
/// ones together.
pub fn prompts(task: &Task, samples: usize) -> Vec<Prompt<'_>> {
    let mut prompts: Vec<Prompt> = Vec::new();
    let examples = task.eval.iter().flat_map(|eval| &eval.examples).cycle().take(samples);
    for example in examples {
        let Sequence { ids, first, .. } = &example.sequences[0];
        match prompts.iter_mut().find(|known| known.ids == &ids[..*first]) {
            Some(known) => known.samples += 1,
            None => prompts.push(Prompt { ids: &ids[..*first], row: example.row, samples: 1 }),
        }
    }
    prompts
}

/// The largest micro-batch of `samples` completions, no longer than `longest` with their prompts, but perhaps much shorter.
pub fn largest(packing: Packing, samples: usize, longest: usize) -> Extent {
    let rows = (samples * longest).min(packing.budget.max(longest));
    Extent { rows, targets: rows, segments: samples, sequences: samples, longest }
}

impl<'a, B: Backend> Drift<'a, B> {
    pub fn new(device: &'a B, task: &'a Task, settings: &'a Settings, residency: Residency) -> Result<Self> {
        let prompts = prompts(task, settings.kl_samples);
        let longest =
            prompts.iter().map(|prompt| prompt.ids.len()).max().unwrap_or(0) + settings.samples.max_new_tokens;
        let largest = largest(settings.packing, settings.kl_samples, longest);
        let asked = |reference: &'a FreshReference| reference.asked(largest);
        let others = task.fresh.iter().filter(|reference| !reference.is_policy);
        let fresh = Fresh::new(device, others.map(asked).collect(), settings.packing, residency)?;
        let texts = task.fresh.iter().any(|reference| reference.tokenizer.is_some());
        let rows = match &task.eval {
            Some(eval) if texts || settings.rollouts.is_some() || !settings.gold.is_empty() => read_rows(&eval.path)?.1,
            _ => Vec::new(),
        };
        let (samples, logps, first) = (Vec::new(), Vec::new(), Vec::new());
        Ok(Self { task, settings, fresh, prompts, rows, samples, logps, first })
    }

    /// KL(policy || reference) of each reference, nats a completion. `done` is told how many completions there are.
    pub fn measure(
        &mut self,
        device: &B,
        policy: &mut Policy<B>,
        done: &mut dyn FnMut(usize),
    ) -> Result<Vec<Estimate>> {
        policy.rest();
        let samples = self.sample(device, policy, done)?;
        let examples: Vec<Example> = samples.iter().map(|sample| self.example(sample)).collect();
        let examples: Vec<&Example> = examples.iter().collect();
        let score = |policy: &mut Policy<B>| {
            let mut logps: Vec<f64> = Vec::with_capacity(samples.len());
            for (_, host) in self.settings.packing.batches(&examples) {
                let seen = policy.forward(device, &host, &[])?;
                logps.extend(sums(&host, &seen.logps));
            }
            Ok(logps)
        };
        let logps = score(policy)?;
        let adapted = self.task.fresh.iter().any(|reference| reference.is_policy);
        let before = if adapted { policy.without_adapter(score)? } else { Vec::new() };
        policy.rest();
        let (mut estimates, mut others, mut first) = (Vec::new(), 0.., None);
        for reference in &self.task.fresh {
            let mut estimate = |said: Vec<f64>| {
                let ratios: Vec<f64> = logps.iter().zip(&said).map(|(logp, said)| logp - said).collect();
                first.get_or_insert(said);
                Estimate::of(&ratios)
            };
            if reference.is_policy {
                estimates.push(estimate(before.clone()));
                continue;
            }
            let k = others.next().expect("endless");
            let own = reference.tokenizer.as_ref().map(|tokenizer| self.own(tokenizer, &samples)).transpose()?;
            let asked: Vec<&Example> = own.as_ref().map_or_else(|| examples.clone(), |own| own.iter().collect());
            let scored = self.fresh.score(k, &asked, Detail::Sums)?;
            estimates.push(estimate(scored.iter().map(|scored| scored.sums[0]).collect()));
        }
        (self.samples, self.logps, self.first) = (samples, logps, first.unwrap_or_default());
        Ok(estimates)
    }

    /// Tokens of each completion that was sampled last.
    pub fn lengths(&self) -> Vec<f64> {
        self.samples.iter().map(|sample| sample.ids.len() as f64).collect()
    }

    /// Share of distinct runs of `n` tokens among all of them that are in what was sampled last (Li et al., arXiv:1510.03055).
    pub fn distinct(&self, n: usize) -> f64 {
        let all: Vec<&[u32]> = self.samples.iter().flat_map(|sample| sample.ids.windows(n)).collect();
        all.iter().collect::<std::collections::HashSet<_>>().len() as f64 / all.len().max(1) as f64
    }

    /// What the completions that were sampled last are like; of `kl` the root and its standard error.
    pub fn metrics(&self, kl: Option<&Estimate>) -> Vec<Metric> {
        let lengths = self.lengths();
        let tokens = lengths.iter().sum::<f64>().max(1.0);
        let mut metrics: Vec<Metric> = vec![
            ("completions/mean_length".into(), tokens / lengths.len().max(1) as f64),
            ("completions/distinct_1".into(), self.distinct(1)),
            ("completions/distinct_2".into(), self.distinct(2)),
            // Nats a token: of what is sampled from a distribution, the mean of -ln p is its entropy.
            ("completions/entropy".into(), -self.logps.iter().sum::<f64>() / tokens),
        ];
        if let Some(Estimate { mean, stderr }) = kl {
            let d = mean.max(0.0).sqrt();
            metrics.push(("sqrt_kl".into(), d));
            // To first order; at 0, where that has none, the root of the error.
            let error = if d > 0.0 { stderr / (2.0 * d) } else { stderr.sqrt() };
            metrics.push(("sqrt_kl_stderr".into(), error));
            metrics.push(("completions/ref_logp".into(), self.first.iter().sum::<f64>() / tokens));
            let ratios: Vec<f64> = self.logps.iter().zip(&self.first).map(|(logp, first)| logp - first).collect();
            if let Some(line) = on_length(&lengths, &ratios).filter(|line| line.r2_with_intercept.is_finite()) {
                metrics.push(("length/gamma".into(), line.with_intercept[1]));
                metrics.push(("length/r2".into(), line.r2_with_intercept));
            }
        }
        metrics
    }

    /// The data's own completions, with the tokens that end them: one for each sample, of the examples with its prompt in turn. None
    /// where the rows are prompts alone.
    pub fn answers(&self) -> Result<Vec<Written>> {
        let mut answers = Vec::new();
        for prompt in self.prompts.iter().filter(|prompt| self.answer(prompt.row).is_some()) {
            let examples = self.task.eval.iter().flat_map(|eval| &eval.examples);
            let split = |example: &'a Example| example.sequences[0].ids.split_at(example.sequences[0].first);
            let own = examples.filter(|example| split(example).0 == prompt.ids);
            for example in own.collect::<Vec<_>>().into_iter().cycle().take(prompt.samples) {
                let (ids, row) = (split(example).1.to_vec(), example.row);
                let text = written_text(self.task, prompt.ids, &ids, true)?;
                let (source, answer) = (prompt_of(&self.rows[row])?, Some(text.clone()));
                answers.push(Written { source, prompt: prompt.ids.to_vec(), row, ids, text, finished: true, answer });
            }
        }
        Ok(answers)
    }

    /// The tokens of a row's own completion, if it has one.
    fn answer(&self, row: usize) -> Option<&[u32]> {
        let alone = matches!(self.rows[row].parts, Parts::Prompt { .. });
        let mut examples = self.task.eval.iter().flat_map(|eval| &eval.examples).filter(|_| !alone);
        let own = &examples.find(|example| example.row == row)?.sequences[0];
        Some(&own.ids[own.first..])
    }

    fn sample(&self, device: &B, policy: &Policy<B>, done: &mut dyn FnMut(usize)) -> Result<Vec<Rollout>> {
        let mut requests = requests(self.settings, &self.prompts);
        requests.iter_mut().for_each(|request| request.eos = self.task.tokenizer.stops());
        let engine = Engine::new(device).with_max_running(TOGETHER);
        engine.run(&policy.model, &requests, &mut |so_far| done(so_far.completions))
    }

    /// What the last measurement sampled, to be judged.
    pub fn written(&self) -> Result<Vec<Written>> {
        let written = |sample: &Rollout| {
            let Prompt { ids: prompt, row, .. } = self.prompts[sample.prompt];
            let (ids, finished) = (sample.ids.clone(), sample.finished());
            let text = written_text(self.task, prompt, &ids, finished)?;
            let answer = self.answer(row).map(|own| written_text(self.task, prompt, own, true)).transpose()?;
            let (source, prompt) = (prompt_of(&self.rows[row])?, prompt.to_vec());
            Ok(Written { source, prompt, row, ids, text, finished, answer })
        };
        self.samples.iter().map(written).collect()
    }

    fn example(&self, sample: &Rollout) -> Example {
        let Prompt { ids, row, .. } = self.prompts[sample.prompt];
        let sequence = Sequence::new([ids, &sample.ids].concat(), ids.len());
        Example { row, sequences: vec![sequence], ..Example::default() }
    }

    /// The samples as another tokenizer and its chat template write them.
    fn own(&self, tokenizer: &Tokenizer, samples: &[Rollout]) -> Result<Vec<Example>> {
        let of = |sample: &Rollout| {
            let at = self.prompts[sample.prompt].row;
            let Row { parts, variables, .. } = &self.rows[at];
            let (Parts::Pair { prompt, .. } | Parts::Completion { prompt, .. } | Parts::Prompt { prompt }) = parts
            else {
                let detail = "measures completions of prompts, and these rows are whole texts, which a reference with another tokenizer cannot be asked about";
                return Err(Error::option("--kl-samples", detail));
            };
            let text = text_of(&self.task.tokenizer, self.prompts[sample.prompt].ids, &sample.ids)?;
            let completion = match prompt {
                Content::Text(_) => Content::Text(text),
                Content::Messages(_) => Content::Messages(vec![answer(text)]),
            };
            let parts = Parts::Completion { prompt: prompt.clone(), completion };
            let row = Row { parts, variables: variables.clone(), label: None, margin: None };
            let mut sequence = encode_row(tokenizer, &row)?;
            if !sample.finished() {
                // The text goes on; no end was sampled.
                let kept = tokenizer.without_end(&sequence.ids).max(sequence.first + 1);
                sequence.ids.truncate(kept);
            }
            Ok(Example { row: at, sequences: vec![sequence], ..Example::default() })
        };
        samples.iter().map(of).collect()
    }
}

fn answer(text: String) -> Message {
    Message::from_iter([("role".to_string(), "assistant".into()), ("content".to_string(), text.into())])
}

/// What is asked of the policy.
pub fn requests<'a>(settings: &Settings, prompts: &[Prompt<'a>]) -> Vec<Request<'a>> {
    let mut first_sample = STREAM;
    let request = |prompt: &Prompt<'a>| {
        let request = Request::new(prompt.ids, settings.samples.max_new_tokens, Sampling::plain(settings.seed));
        let request = Request { samples: prompt.samples, first_sample, ..request };
        first_sample += prompt.samples as u64;
        request
    };
    prompts.iter().map(request).collect()
}
