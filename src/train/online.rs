//! Completions that the policy writes for the prompts of a step, what they are worth, and what references say about them.
//!
//! A batch of prompts is completed once and trained on for `--num-iterations` steps. An objective that learns from rewards
//! sees all samples of a prompt as a group, and the data's own completion beside them where it wants that. One that learns
//! from pairs sees the best sample of a prompt as chosen and the worst as rejected (online DPO, Guo et al., arXiv:2402.04792);
//! a prompt whose samples are worth the same teaches it nothing. XPO pairs one sample with one of the reference's, drawn before the
//! first step (`prior`), which A*-PO has its values from. What was cut at its length limit may be left out (`truncated`).

mod prior;
mod truncated;

use std::collections::HashSet;

use self::prior::Drawn;
use self::truncated::leave_out;
use super::drift::Estimate;
use super::panel::Gathered;
use super::policy::Policy;
use super::references::FreshReference;
use super::settings::{Rollouts, Settings};
use super::step::Sampled;
use super::task::Task;
use crate::checkpoint::run_dir::LineLog;
use crate::data::{Content, Example, Extent, Packing, Parts, Row, Sequence, read_rows};
use crate::device::range;
use crate::error::{Error, Result};
use crate::objectives::Metric;
use crate::objectives::advantages::{deviation, weighted};
use crate::ops::Backend;
use crate::references::{Detail, Fresh, Residency, Scored};
use crate::rewards::{Jury, Rewards, Sample};
use crate::rollout::{Engine, Request, Sampling};
use crate::tasks::text_of;

/// What was sampled, one line a completion.
pub const ROLLOUTS: &str = "rollouts.jsonl";
/// Where its streams of random numbers begin, beyond those of samples that are only looked at.
const STREAM: u64 = 1 << 41;

/// A completion on its way to being judged.
#[derive(Clone)]
pub struct Written {
    /// As the data has it.
    pub source: Content,
    /// As the policy reads it.
    pub prompt: Vec<u32>,
    /// Of the data set.
    pub row: usize,
    pub ids: Vec<u32>,
    pub text: String,
    /// Ended by itself.
    pub finished: bool,
    /// The data's own completion of the prompt.
    pub answer: Option<String>,
}

/// The completions of one batch of prompts.
pub struct Batch {
    examples: Vec<Example>,
    /// `[references][examples]`
    refs: Vec<Vec<Scored>>,
    /// None where they were made to pairs.
    pub sampled: Option<Sampled>,
    /// Of rewards and completions; of the first step on them alone.
    pub metrics: Vec<Metric>,
    /// What the objective remembers now, if it remembers anything of rewards.
    pub state: Vec<f64>,
    /// That the policy wrote.
    pub tokens: u64,
}

impl Batch {
    pub fn gathered(&self) -> Gathered<'_> {
        Gathered::new(self.examples.iter().collect(), self.refs.iter().map(|said| said.iter().collect()).collect())
    }
}

/// What a step on an example costs at most: every completion as long as it may be.
pub fn stand_in(example: &Example, rollouts: &Rollouts, answers: bool, pairs: bool) -> Example {
    let answer = &example.sequences[0];
    let prompt = &answer.ids[..answer.first];
    let sampled = Sequence::new([prompt, &vec![0; rollouts.max_new_tokens]].concat(), answer.first);
    let mut sequences = vec![sampled; if pairs { 2 } else { rollouts.samples }];
    sequences.extend(answers.then(|| answer.clone()));
    Example { sequences, ..example.clone() }
}

/// What is asked of the policy for one prompt.
pub fn request<'a>(settings: &Settings, rollouts: &Rollouts, prompt: &'a [u32]) -> Request<'a> {
    let Rollouts { samples, max_new_tokens, temperature, top_p, .. } = *rollouts;
    let sampling = Sampling { temperature, top_p, ..Sampling::plain(settings.seed) };
    Request { samples, ..Request::new(prompt, max_new_tokens, sampling) }
}

/// The largest micro-batch of a step of `batch_size` prompts. Completions are as long as they may be, or shorter: then more of them
/// share one.
pub fn largest(packing: Packing, stand_ins: &[Example], batch_size: usize) -> Extent {
    let extents = packing.extents(stand_ins);
    let most = |of: fn(&Extent) -> usize| extents.iter().map(of).max().unwrap_or(0);
    let together = batch_size.min(stand_ins.len());
    let one = most(|extent| extent.rows);
    let rows = (together * one).min(packing.budget.max(one));
    Extent {
        rows,
        targets: rows,
        segments: together * most(|extent| extent.segments),
        sequences: together * most(|extent| extent.sequences),
        longest: most(|extent| extent.longest),
    }
}

pub struct Online<'a, B: Backend> {
    task: &'a Task,
    settings: &'a Settings,
    rollouts: &'a Rollouts,
    fresh: Fresh<'a, B>,
    jury: Jury<'a>,
    rewards: &'a Rewards,
    /// Of the training data, for their prompts as they are written there.
    rows: Vec<Row>,
    /// Of each training example what the reference wrote for its prompt, where the objective reads such.
    prior: Vec<Vec<Drawn>>,
    log: LineLog,
}

impl<'a, B: Backend> Online<'a, B> {
    pub fn new(
        device: &'a B,
        task: &'a Task,
        settings: &'a Settings,
        rollouts: &'a Rollouts,
        (residency, log): (Residency, LineLog),
    ) -> Result<Self> {
        let largest = largest(settings.packing, &task.stand_ins, settings.batch_size);
        let others = task.sampled_by.iter().filter(|reference| !reference.is_policy);
        let asked = others.map(|reference: &'a FreshReference| reference.asked(largest)).collect();
        let fresh = Fresh::new(device, asked, settings.training(), residency)?;
        let rewards = task.rewards.as_ref().expect("opened with the task");
        let jury = Jury::new(device, rewards, settings.packing);
        let rows = read_rows(&task.train.path)?.1;
        Ok(Self { task, settings, rollouts, fresh, jury, rewards, rows, prior: Vec::new(), log })
    }

    pub fn sync(&self) -> Result<()> {
        self.log.sync()
    }

    /// Goes on as after `step`: what was logged later is forgotten.
    pub fn go_back(&mut self, step: u64) -> Result<()> {
        self.log = LineLog::resume(&self.settings.output_dir.join(ROLLOUTS), step)?;
        Ok(())
    }

    /// Completes the prompts of these training examples; `number` counts such batches from 1, `show` is told how far it is.
    pub fn sample(
        &mut self,
        device: &B,
        policy: &mut Policy<B>,
        (number, prompts): (u64, &[usize]),
        (ref_weights, state): (&[f64], &[f64]),
        show: &mut dyn FnMut(&str),
    ) -> Result<Batch> {
        let _range = range(c"rollouts");
        policy.rest();
        let data: Vec<&'a Example> = prompts.iter().map(|i| &self.task.train.examples[*i]).collect();
        let needs = self.task.objective.needs();
        let (each, written, sampled_logps) = self.complete(device, policy, (number, &data), needs.answers, show)?;
        let rewards = self.judge(&written)?;
        let weights = self.rewards.weights();
        let total = weighted(&rewards, &weights);
        self.write((number - 1) * self.rollouts.iterations + 1, &written, &rewards)?;
        let samples: Vec<usize> = (0..written.len()).filter(|s| s % each < self.rollouts.samples).collect();
        let mut metrics = self.metrics(&samples, &written, (&rewards, &total));
        let tokens = samples.iter().map(|s| written[*s].ids.len() as u64).sum();
        let keep: Vec<bool> = written.iter().map(|written| written.finished || !self.rollouts.mask_truncated).collect();
        if !needs.rewards {
            let total: Vec<f64> =
                total.iter().zip(&keep).map(|(total, keep)| if *keep { *total } else { f64::NAN }).collect();
            let visit = ((number - 1) * self.rollouts.iterations / self.task.steps_per_epoch) as usize;
            let examples = match needs.prior {
                true => {
                    let prior = |at: usize| &self.prior[prompts[at]][visit];
                    against_prior(&data, &written, &total, (prior, self.rollouts.mask_truncated))
                }
                false => best_and_worst(&data, &written, &total, each),
            };
            metrics.push(("pairs".into(), examples.len() as f64 / data.len() as f64));
            let refs = self.ask(device, policy, &examples)?;
            return Ok(Batch { examples, refs, sampled: None, metrics, state: Vec::new(), tokens });
        }
        let group = |(example, written): (&&Example, &[Written])| Example {
            row: example.row,
            sequences: written.iter().map(sequence).collect(),
            ..Example::default()
        };
        let examples: Vec<Example> = data.iter().zip(written.chunks(each)).map(group).collect();
        let refs = self.ask(device, policy, &examples)?;
        metrics.extend(refs.first().map(|said| likelihood(said, self.rollouts.samples)));
        let counts = vec![self.rollouts.samples; examples.len()];
        let mut sampled = Sampled::new(&examples, counts, self.rollouts.max_new_tokens);
        let stats = &mut sampled.stats;
        (stats.rewards, stats.reward_weights, stats.state) = (rewards, weights, state.to_vec());
        if needs.old_token_logps || needs.values {
            // On the CPU a token has one log-probability, however it is computed.
            let known = !B::APART && !needs.values && !needs.answers;
            stats.old_token_logps = sampled_logps.clone();
            if !known {
                let (scored, values) = scored(device, policy, self.settings.training(), &examples)?;
                (stats.old_token_logps, stats.values) = (exact(&scored).1, values);
            }
            stats.sampled_token_logps = sampled_logps;
        }
        (stats.ref_logps, stats.ref_token_logps) = refs.iter().map(|said| exact(said)).unzip();
        stats.ref_weights = ref_weights.to_vec();
        if needs.prior_rewards > 0 {
            let of = |at: &usize| self.prior[*at].iter().map(Drawn::reward).collect();
            stats.prior_rewards = prompts.iter().map(of).collect();
        }
        let credit = self.task.objective.credit(stats);
        (stats.advantages, stats.token_advantages) = (credit.advantages, credit.token_advantages);
        stats.returns = credit.returns;
        metrics.extend(credit.metrics);
        let (examples, refs, sampled) = match keep.contains(&false) {
            true => leave_out((examples, refs, sampled), &keep),
            false => (examples, refs, sampled),
        };
        Ok(Batch { examples, refs, sampled: Some(sampled), metrics, state: credit.state, tokens })
    }

    /// As many completions of each prompt, one prompt after the other; last, if wanted, the data's own. Then what the sampler said of
    /// each token, in that order, 0 of those that it did not sample.
    fn complete(
        &self,
        device: &B,
        policy: &Policy<B>,
        (number, data): (u64, &[&'a Example]),
        answers: bool,
        show: &mut dyn FnMut(&str),
    ) -> Result<(usize, Vec<Written>, Vec<f64>)> {
        let (samples, batch) = (self.rollouts.samples, self.settings.batch_size as u64);
        let split = |example: &'a Example| example.sequences[0].ids.split_at(example.sequences[0].first);
        let request = |(at, example): (usize, &&'a Example)| Request {
            first_sample: STREAM + ((number - 1) * batch + at as u64) * samples as u64,
            eos: self.task.tokenizer.stops(),
            ..request(self.settings, self.rollouts, split(example).0)
        };
        let requests: Vec<Request> = data.iter().enumerate().map(request).collect();
        let all = data.len() * samples;
        let engine = Engine::new(device).with_logps_temperature(self.rollouts.logps_temperature);
        let rollouts = engine.run(&policy.model, &requests, &mut |done| {
            show(&format!("sampling {}/{all}, {} tokens", done.completions, done.tokens));
        })?;
        let (mut written, mut logps) = (Vec::new(), Vec::new());
        for (example, rollouts) in data.iter().zip(rollouts.chunks(samples)) {
            let (prompt, own) = split(example);
            let row = &self.rows[example.row];
            let alone = matches!(row.parts, Parts::Prompt { .. });
            let answer = (!alone).then(|| written_text(self.task, prompt, own, true)).transpose()?;
            let source = prompt_of(row)?;
            let mut one = |ids: &[u32], finished: bool| {
                let text = written_text(self.task, prompt, ids, finished)?;
                let (source, prompt, answer) = (source.clone(), prompt.to_vec(), answer.clone());
                written.push(Written { source, prompt, row: example.row, ids: ids.to_vec(), text, finished, answer });
                Result::Ok(())
            };
            for rollout in rollouts {
                one(&rollout.ids, rollout.finished())?;
                logps.extend(rollout.logps.iter().map(|x| f64::from(*x)));
            }
            if answers {
                one(own, true)?;
                logps.resize(logps.len() + own.len(), 0.0);
            }
        }
        Ok((samples + usize::from(answers), written, logps))
    }

    /// `[R][completions]`
    fn judge(&mut self, written: &[Written]) -> Result<Vec<Vec<f64>>> {
        let samples: Vec<Sample> = written.iter().map(Written::sample).collect();
        self.jury.score(&samples)
    }

    /// What held-out completions are worth, as metrics of an evaluation.
    pub fn judge_held_out(&mut self, written: &[Written]) -> Result<Vec<Metric>> {
        let rewards = self.judge(written)?;
        let total = weighted(&rewards, &self.rewards.weights());
        let known: Vec<f64> = total.iter().copied().filter(|x| !x.is_nan()).collect();
        let mut metrics = self.metrics(&(0..written.len()).collect::<Vec<_>>(), written, (&rewards, &total));
        // Samples of different prompts are no group.
        metrics.retain(|(name, _)| !["reward_std", "frac_reward_zero_std"].contains(&&**name));
        if !known.is_empty() {
            metrics.push(("reward_stderr".into(), Estimate::of(&known).stderr));
        }
        Ok(metrics)
    }

    fn write(&mut self, step: u64, written: &[Written], rewards: &[Vec<f64>]) -> Result<()> {
        let names = self.rewards.names();
        for (s, one) in written.iter().enumerate() {
            let by_name = names.iter().zip(rewards).map(|(name, said)| (name.clone(), said[s].into()));
            let by_name: serde_json::Map<String, serde_json::Value> = by_name.collect();
            self.log.append(&serde_json::json!({
                "step": step,
                "row": one.row,
                "prompt": self.task.tokenizer.decode(&one.prompt)?,
                "completion": one.text,
                "completion_ids": one.ids,
                "finished": one.finished,
                "rewards": by_name,
            }))?;
        }
        Ok(())
    }

    /// Of the completions at `samples`.
    fn metrics(&self, samples: &[usize], written: &[Written], (rewards, total): (&[Vec<f64>], &[f64])) -> Vec<Metric> {
        let mean = |of: &dyn Fn(usize) -> f64| {
            let known = samples.iter().map(|s| of(*s)).filter(|x| !x.is_nan());
            let (sum, count) = known.fold((0.0, 0.0_f64), |(sum, count), x| (sum + x, count + 1.0));
            sum / count
        };
        let groups: Vec<Vec<f64>> = samples.chunks(self.rollouts.samples).map(|group| known(total, group)).collect();
        let prompts = groups.len().max(1) as f64;
        // Of groups of which two are known at least.
        let spreads: Vec<f64> = groups.iter().map(|group| deviation(group)).filter(|spread| !spread.is_nan()).collect();
        let tied = groups.iter().filter(|group| group.windows(2).all(|pair| pair[0] == pair[1])).count();
        let mut metrics: Vec<Metric> = vec![
            ("reward".into(), mean(&|s| total[s])),
            ("reward_std".into(), spreads.iter().sum::<f64>() / spreads.len() as f64),
            ("frac_reward_zero_std".into(), tied as f64 / prompts),
            ("completions/mean_length".into(), mean(&|s| written[s].ids.len() as f64)),
            ("completions/clipped_ratio".into(), mean(&|s| f64::from(u8::from(!written[s].finished)))),
            ("completions/distinct_1".into(), distinct(samples, written, 1)),
            ("completions/distinct_2".into(), distinct(samples, written, 2)),
        ];
        for (name, said) in self.rewards.names().iter().zip(rewards) {
            metrics.push((format!("rewards/{name}/mean").into(), mean(&|s| said[s])));
        }
        let spreads = self.jury.spreads().map(|(name, spread)| (format!("rewards/{name}/spread").into(), spread));
        metrics.extend(spreads);
        // Of what nothing was said there is no mean.
        metrics.retain(|(_, value)| !value.is_nan());
        metrics
    }

    /// `[references][examples]`
    fn ask(&mut self, device: &B, policy: &mut Policy<B>, examples: &[Example]) -> Result<Vec<Vec<Scored>>> {
        policy.rest();
        let (asked, mut others) = (examples.iter().collect::<Vec<_>>(), 0..);
        let of = |reference: &FreshReference| match reference.is_policy {
            true => {
                let packing = self.settings.training();
                policy.without_adapter(|policy| Ok(scored(device, policy, packing, examples)?.0))
            }
            false => self.fresh.score(others.next().expect("endless"), &asked, Detail::Tokens),
        };
        self.task.sampled_by.iter().map(of).collect()
    }
}

impl Written {
    pub fn sample(&self) -> Sample<'_> {
        Sample {
            prompt: &self.source,
            completion: &self.text,
            answer: self.answer.as_deref(),
            row: self.row,
            prompt_ids: &self.prompt,
            completion_ids: &self.ids,
            finished: self.finished,
        }
    }
}

/// The prompt of a row.
pub fn prompt_of(row: &Row) -> Result<Content> {
    match &row.parts {
        Parts::Pair { prompt, .. } | Parts::Completion { prompt, .. } | Parts::Prompt { prompt } => Ok(prompt.clone()),
        Parts::Text { .. } => {
            let detail = "rewards completions of prompts, and these rows are whole texts; give rows with a prompt";
            Err(Error::option("--reward", detail))
        }
    }
}

/// What a completion adds to its prompt, without the token that ends it: a token's text may depend on what comes before.
pub fn written_text(task: &Task, prompt: &[u32], ids: &[u32], finished: bool) -> Result<String> {
    let ends = finished && ids.last().is_some_and(|last| task.tokenizer.stops().contains(last));
    text_of(&task.tokenizer, prompt, &ids[..ids.len() - usize::from(ends)])
}

/// What was said of these completions, where anything was.
fn known(total: &[f64], of: &[usize]) -> Vec<f64> {
    of.iter().map(|s| total[*s]).filter(|x| !x.is_nan()).collect()
}

/// Of the runs of n tokens in these completions, how many are not seen before (Li et al., arXiv:1510.03055): a policy that has found
/// what pays writes the same again.
fn distinct(samples: &[usize], written: &[Written], n: usize) -> f64 {
    let runs = || samples.iter().flat_map(|s| written[*s].ids.windows(n));
    runs().collect::<HashSet<_>>().len() as f64 / runs().count().max(1) as f64
}

/// The mean log-probability of a sampled token under the first reference, of `own` sequences in each group of `each`: what the
/// policy writes that its reference would not.
fn likelihood(said: &[Scored], own: usize) -> Metric {
    let tokens = || said.iter().flat_map(|group| group.tokens.iter().take(own)).flatten();
    let sum: f64 = tokens().map(|x| f64::from(*x)).sum();
    ("completions/reference_logp".into(), sum / tokens().count().max(1) as f64)
}

/// Sums and tokens of what a reference said.
fn exact(scored: &[Scored]) -> (Vec<f64>, Vec<f64>) {
    let tokens = scored.iter().flat_map(|s| &s.tokens).flatten().map(|x| f64::from(*x)).collect();
    (scored.iter().flat_map(|s| &s.sums).copied().collect(), tokens)
}

fn sequence(written: &Written) -> Sequence {
    let Written { prompt, ids, .. } = written;
    Sequence::new([&prompt[..], ids].concat(), prompt.len())
}

/// Pairs of those prompts whose completions, `each` of them, differ in what they are worth; the first of equals.
fn best_and_worst(data: &[&Example], written: &[Written], total: &[f64], each: usize) -> Vec<Example> {
    let pair = |(at, example): (usize, &&Example)| {
        let known = (at * each..(at + 1) * each).filter(|s| !total[*s].is_nan());
        let best = known.clone().reduce(|best, s| if total[s] > total[best] { s } else { best })?;
        let worst = known.reduce(|worst, s| if total[s] < total[worst] { s } else { worst })?;
        (total[best] > total[worst]).then(|| Example {
            row: example.row,
            sequences: [best, worst].map(|s| sequence(&written[s])).to_vec(),
            ..Example::default()
        })
    };
    data.iter().enumerate().filter_map(pair).collect()
}

/// Pairs of what the policy wrote and what the reference wrote, one of each, where they differ in what they are worth.
fn against_prior<'p>(
    data: &[&Example],
    written: &[Written],
    total: &[f64],
    (prior, mask): (impl Fn(usize) -> &'p Drawn, bool),
) -> Vec<Example> {
    let pair = |(at, example): (usize, &&Example)| {
        let (ours, theirs) = (&written[at], prior(at));
        if mask && !theirs.finished {
            return None;
        }
        let first = &ours.prompt;
        let other = Sequence::new([&first[..], &theirs.ids].concat(), first.len());
        let won = total[at] > theirs.reward();
        let sequences = if won { vec![sequence(ours), other] } else { vec![other, sequence(ours)] };
        let prior = Some(usize::from(won));
        // Not where either is NaN.
        let differ = won || total[at] < theirs.reward();
        differ.then(|| Example { row: example.row, sequences, prior, ..Example::default() })
    };
    data.iter().enumerate().filter_map(pair).collect()
}

/// What the policy as it is says of each example, and `[T]` its values, if it has a head for them.
fn scored<B: Backend>(
    device: &B,
    policy: &mut Policy<B>,
    packing: Packing,
    examples: &[Example],
) -> Result<(Vec<Scored>, Vec<f64>)> {
    let all: Vec<&Example> = examples.iter().collect();
    let (mut scored, mut values) = (Vec::with_capacity(examples.len()), Vec::new());
    for (_, host) in packing.batches(&all) {
        let seen = policy.forward(device, &host, &[])?;
        values.extend(seen.values.iter().map(|x| f64::from(*x)));
        for sequences in &host.examples {
            let of = host.sequences[sequences.clone()].iter();
            let tokens: Vec<Vec<f32>> = of.map(|range| seen.logps[range.clone()].to_vec()).collect();
            let sums = tokens.iter().map(|tokens| tokens.iter().map(|x| f64::from(*x)).sum()).collect();
            scored.push(Scored { sums, tokens });
        }
    }
    Ok((scored, values))
}
