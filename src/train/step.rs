//! One optimizer step: examples in, changed weights and metrics out.

use std::ops::Range;

use super::policy::{Policy, Seen};
use crate::data::{self, Example, Packing};
use crate::device::range;
use crate::error::{Error, Result};
use crate::objectives::{Grads, Metric, Needs, Objective, Outcome, Scope, Stats, Totals, join_metrics};
use crate::ops::Backend;
use crate::references::{HiddenRows, Scored};

/// Examples with what the references said about them: an optimizer batch, or what is held out.
#[derive(Clone, Copy, Default)]
pub struct Rows<'a> {
    pub examples: &'a [&'a Example],
    /// `[references][examples]`
    pub refs: &'a [Vec<&'a Scored>],
    /// Completions under prompts that are not theirs, where the objective reads such; each is one sequence.
    pub mismatched: &'a [Example],
    /// `[references][mismatched]`
    pub mismatched_refs: &'a [Vec<&'a Scored>],
    /// `[references]`
    pub ref_weights: &'a [f64],
    /// What the objective remembers.
    pub state: &'a [f64],
    /// What is known of the examples if they were sampled.
    pub sampled: Option<&'a Sampled>,
    /// `[references]` where their final hidden rows are found, for KLs over the whole vocabulary; empty where none is wanted.
    pub hidden: &'a [HiddenRows],
}

/// What is known of sampled completions before the policy looks at them again.
#[derive(Default)]
pub struct Sampled {
    /// `[examples]` how many sequences were sampled; after them an example may have the data's own completion.
    samples: Vec<usize>,
    /// `[examples + 1]` sequences of example e: `starts[e]..starts[e + 1]`.
    starts: Vec<usize>,
    /// For each example, completions that are left out and yet count in means over them.
    pub absent: f64,
    /// Of all sequences in order.
    pub stats: Stats,
}

impl Sampled {
    /// `samples[e]` sequences of example e were sampled, each of `longest` tokens at most.
    pub fn new(examples: &[Example], samples: Vec<usize>, longest: usize) -> Self {
        let mut starts = vec![0];
        starts.extend(examples.iter().scan(0, |end, example| {
            *end += example.sequences.len();
            Some(*end)
        }));
        let mut stats = Stats { offsets: vec![0], longest: longest as f64, ..Stats::default() };
        for sequence in examples.iter().flat_map(|example| &example.sequences) {
            let len = sequence.targets();
            stats.offsets.push(stats.offsets[stats.lens.len()] + len);
            stats.lens.push(len as f64);
        }
        let mut sampled = Self { samples, starts, absent: 0.0, stats };
        let (mut groups, mut answers) = (Vec::new(), Vec::new());
        sampled.trees(0..examples.len(), &mut groups, &mut answers);
        (sampled.stats.groups, sampled.stats.answers) = (groups, answers);
        sampled
    }

    /// How many sequences of an example were sampled.
    pub fn samples_of(&self, example: usize) -> usize {
        self.samples[example]
    }

    /// Groups and answers of some examples, counted from the first of them.
    fn trees(&self, examples: Range<usize>, groups: &mut Vec<Range<usize>>, answers: &mut Vec<usize>) {
        let base = self.starts[examples.start];
        for e in examples {
            let (start, end) = (self.starts[e] - base, self.starts[e + 1] - base);
            groups.push(start..start + self.samples[e]);
            answers.extend((start + self.samples[e] < end).then_some(end - 1));
        }
    }

    /// Adds what is known of some examples to what was measured of them.
    fn tell(&self, examples: Range<usize>, stats: &mut Stats) {
        let sequences = self.starts[examples.start]..self.starts[examples.end];
        let tokens = self.stats.offsets[sequences.start]..self.stats.offsets[sequences.end];
        let of = |values: &[f64], range: &Range<usize>| values.get(range.clone()).unwrap_or_default().to_vec();
        self.trees(examples.clone(), &mut stats.groups, &mut stats.answers);
        (stats.longest, stats.absent) = (self.stats.longest, self.absent * examples.len() as f64);
        stats.advantages = of(&self.stats.advantages, &sequences);
        stats.old_token_logps = of(&self.stats.old_token_logps, &tokens);
        stats.sampled_token_logps = of(&self.stats.sampled_token_logps, &tokens);
        stats.token_advantages = of(&self.stats.token_advantages, &tokens);
        stats.returns = of(&self.stats.returns, &tokens);
        stats.old_values = of(&self.stats.values, &tokens);
    }
}

/// What a step says about itself.
#[derive(Debug)]
pub struct StepResult {
    pub loss: f64,
    pub metrics: Vec<Metric>,
    /// What the objective remembers now.
    pub state: Vec<f64>,
    /// Before clipping.
    pub grad_norm: f64,
    /// Of the elements that the update was to change, the share that rounding left as they were.
    pub lost_updates: f64,
    /// Rows run through the policy.
    pub rows: usize,
}

/// Where names of metrics begin that compare a step's log-probabilities with the sampler's.
pub const MISMATCH: &str = "sampling/";

/// How far the log-probabilities that a step starts from are from those that its completions were drawn with, nats a token: nothing in
/// f32 on one device.
#[derive(Default)]
struct Mismatch {
    sum: f64,
    most: f64,
    tokens: f64,
}

impl Mismatch {
    fn add(&mut self, stats: &Stats) {
        let drawn = |s: &usize| !stats.answers.contains(s);
        for s in (0..stats.lens.len()).filter(drawn).filter(|_| !stats.sampled_token_logps.is_empty()) {
            for t in stats.offsets[s]..stats.offsets[s + 1] {
                let difference = (stats.token_logps[t] - stats.sampled_token_logps[t]).abs();
                (self.sum, self.most, self.tokens) =
                    (self.sum + difference, self.most.max(difference), self.tokens + 1.0);
            }
        }
    }

    fn metrics(&self) -> impl Iterator<Item = Metric> {
        let all =
            [("sampling/logp_difference_mean", self.sum / self.tokens), ("sampling/logp_difference_max", self.most)];
        all.into_iter().filter(|_| self.tokens > 0.0).map(|(name, value)| (name.into(), value))
    }
}

/// A micro-batch on its way.
struct Micro {
    host: data::Batch,
    /// Which examples of the step it holds.
    examples: Range<usize>,
}

/// What is known of a batch, which has the rows at `at`, before it is run. An example of two sequences is a pair, whoever needs
/// to know, unless they were sampled.
fn shape(needs: &Needs, host: &data::Batch, rows: &Rows, at: Range<usize>) -> Stats {
    let examples = &rows.examples[at.clone()];
    let pairs = host.examples.iter().filter(|sequences| sequences.len() == 2 && rows.sampled.is_none());
    let labels = examples.iter().flat_map(|example| match example.sequences.len() {
        2 => vec![true, false],
        _ => vec![example.label.unwrap_or(true)],
    });
    let margins = examples.iter().filter(|example| example.sequences.len() == 2);
    let starts = host.examples.iter().map(|sequences| sequences.start);
    let mut stats = Stats {
        prior: examples.iter().zip(starts).filter_map(|(example, start)| Some(start + example.prior?)).collect(),
        lens: examples.iter().flat_map(|e| &e.sequences).map(|s| s.targets() as f64).collect(),
        pairs: pairs.map(|sequences| (sequences.start, sequences.start + 1)).collect(),
        labels: if needs.labels { labels.collect() } else { Vec::new() },
        margins: if needs.margins { margins.map(|e| e.margin.unwrap_or(0.0)).collect() } else { Vec::new() },
        ..Stats::default()
    };
    if let Some(sampled) = rows.sampled {
        sampled.tell(at, &mut stats);
    }
    stats
}

/// Everything of a micro-batch that an objective reads.
fn stats(needs: &Needs, host: &data::Batch, seen: &Seen, rows: &Rows, at: Range<usize>) -> Stats {
    let mut stats = shape(needs, host, rows, at.clone());
    let exact = |values: &[f32]| values.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
    match needs.scores {
        true => stats.scores = exact(&seen.logps),
        false => stats.logps = sums(host, &seen.logps),
    }
    if let Some(moving) = &seen.moving {
        stats.ref_logps = vec![sums(host, moving)];
        stats.ref_token_logps = if needs.ref_token_logps { vec![exact(moving)] } else { Vec::new() };
    }
    let refs = || rows.refs.iter().map(|by_example| &by_example[at.clone()]);
    stats.ref_logps.extend(refs().map(|scored| scored.iter().flat_map(|s| &s.sums).copied().collect()));
    if needs.per_token() {
        stats.offsets = host.sequences.iter().map(|range| range.start).chain([host.targets.len()]).collect();
        stats.token_logps = exact(&seen.logps);
    }
    if needs.ref_token_logps {
        let tokens = |scored: &[&Scored]| scored.iter().flat_map(|s| &s.tokens).flat_map(|t| exact(t)).collect();
        stats.ref_token_logps.extend(refs().map(tokens));
    }
    if needs.entropy {
        stats.entropy = exact(&seen.entropy);
    }
    if needs.ln_sum_p2 {
        stats.ln_sum_p2 = exact(&seen.ln_sum_p2);
    }
    if needs.values {
        stats.values = exact(&seen.values);
    }
    if needs.token_kl {
        stats.token_kl = seen.token_kl.chunks(host.targets.len()).map(<[f64]>::to_vec).collect();
    }
    stats.ref_weights = rows.ref_weights.to_vec();
    stats.state = rows.state.to_vec();
    stats
}

/// Sums over the targets of each sequence.
pub fn sums(host: &data::Batch, logps: &[f32]) -> Vec<f64> {
    host.sequences.iter().map(|range| logps[range.clone()].iter().map(|x| f64::from(*x)).sum()).collect()
}

/// Refuses an objective that reads what is not there: completions of the policy's own, if it is not `online`.
pub fn check_needs(name: &str, needs: &Needs, online: bool) -> Result<()> {
    if (needs.rewards || needs.prior) && !online {
        let detail =
            "missing; give what the policy's completions are rewarded by: a reward model's folder, or a file of rules";
        return Err(Error::option("--reward", format!("{detail} ({name} learns from nothing else)")));
    }
    if online && !needs.rewards && !needs.pairs {
        let detail = format!("{name} learns from the data's completions, not from the policy's own; drop it");
        return Err(Error::option("--reward", detail));
    }
    Ok(())
}

/// Derivative by each number that the forward pass left. By a target's log-probability it is that by its sequence's sum plus
/// its own.
fn derivatives(host: &data::Batch, grads: &Grads, first_sequence: usize, first_token: usize) -> Vec<f64> {
    if !grads.scores.is_empty() {
        return grads.scores[first_sequence..][..host.sequences.len()].to_vec();
    }
    let mut dlogp = vec![0.0; host.targets.len()];
    for (s, range) in host.sequences.iter().enumerate() {
        let by_sum = grads.logps.get(first_sequence + s).copied().unwrap_or(0.0);
        for t in range.clone() {
            dlogp[t] = by_sum + grads.token_logps.get(first_token + t).copied().unwrap_or(0.0);
        }
    }
    dlogp
}

/// `[references, targets]` derivatives by KLs; empty where there are none.
fn dkl(host: &data::Batch, grads: &Grads, first_token: usize) -> Vec<f64> {
    let of_reference = |by_token: &Vec<f64>| by_token[first_token..][..host.targets.len()].to_vec();
    grads.token_kl.iter().flat_map(of_reference).collect()
}

/// `[targets]` derivatives by values; empty where there are none.
fn dvalues(host: &data::Batch, grads: &Grads, first_token: usize) -> Vec<f64> {
    grads.values.get(first_token..first_token + host.targets.len()).unwrap_or_default().to_vec()
}

/// Runs one step. Nothing is updated when anything is not finite.
pub fn step<B: Backend>(device: &B, policy: &mut Policy<B>, pass: &Pass, learning_rate: f64) -> Result<StepResult> {
    let _range = range(c"step");
    let micros = pass.micros(pass.rows.examples);
    policy.zero_grads(device)?;
    let outcome = match pass.objective.scope() {
        Scope::Pair => pass.micro_by_micro(device, policy, &micros)?,
        Scope::Batch => pass.all_at_once(device, policy, &micros)?,
    };
    let norm = policy.grad_norm(device)?;
    if let Some(bad) = norm.bad {
        let rows = rows_of(pass.rows.examples);
        let detail = format!("{rows}; first bad tensor: the gradient of {bad}; {}", pass.advice());
        return Err(Error::NotFinite { step: pass.step, what: "the gradient".into(), detail });
    }
    policy.update(device, pass.step, learning_rate, norm.norm)?;
    let lost_updates = policy.optimizer.lost(device)?;
    let rows = micros.iter().map(|m| m.host.rows()).sum();
    let Outcome { loss, metrics, state, .. } = outcome;
    Ok(StepResult { loss, metrics, state, grad_norm: norm.norm, lost_updates, rows })
}

/// The rows of some examples, for messages.
fn rows_of(examples: &[&Example]) -> String {
    let rows: Vec<String> = examples.iter().map(|example| example.row.to_string()).collect();
    format!("rows {} of the data set", rows.join(", "))
}

/// What rows are for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Purpose {
    Training,
    HeldOut,
}

/// Rows on their way through a policy and an objective.
pub struct Pass<'a> {
    pub objective: &'a dyn Objective,
    pub rows: Rows<'a>,
    pub packing: Packing,
    pub purpose: Purpose,
    /// Of training the step that is taken, counted from 1; of held-out rows the steps that the policy has behind it.
    pub step: u64,
}

impl Pass<'_> {
    fn micros(&self, examples: &[&Example]) -> Vec<Micro> {
        self.packing.batches(examples).map(|(examples, host)| Micro { host, examples }).collect()
    }

    /// Means over all rows, known before any forward pass.
    fn totals(&self, needs: &Needs, micros: &[Micro]) -> Totals {
        let mut totals = Totals::default();
        for micro in micros {
            totals += Totals::of(&shape(needs, &micro.host, &self.rows, micro.examples.clone()));
        }
        totals
    }

    /// Forward, loss and backward of one micro-batch after the other.
    fn micro_by_micro<B: Backend>(&self, device: &B, policy: &mut Policy<B>, micros: &[Micro]) -> Result<Outcome> {
        let needs = self.objective.needs();
        let totals = self.totals(&needs, micros);
        let (mut sum, mut mismatch) = (Outcome::default(), Mismatch::default());
        for micro in micros {
            let seen = self.forward(device, policy, &micro.host, &self.rows.examples[micro.examples.clone()], true)?;
            let stats = stats(&needs, &micro.host, &seen, &self.rows, micro.examples.clone());
            mismatch.add(&stats);
            let outcome = self.objective.evaluate(&stats, &totals);
            let grads = &outcome.grads;
            let (by_number, by_value) = (derivatives(&micro.host, grads, 0, 0), dvalues(&micro.host, grads, 0));
            policy.backward(device, &by_number, &dkl(&micro.host, grads, 0), &by_value)?;
            sum.loss += outcome.loss;
            join_metrics(&mut sum.metrics, &outcome.metrics);
        }
        sum.metrics.extend(mismatch.metrics());
        self.check_loss(sum.loss).map(|()| sum)
    }

    /// All forwards, one loss, then each micro-batch's forward again with its backward.
    fn all_at_once<B: Backend>(&self, device: &B, policy: &mut Policy<B>, micros: &[Micro]) -> Result<Outcome> {
        if micros.is_empty() {
            return Ok(Outcome::default());
        }
        let all = self.forward_all(device, policy, micros, &mut |_| {})?;
        let mut outcome = self.objective.evaluate(&all, &Totals::of(&all));
        let mut mismatch = Mismatch::default();
        mismatch.add(&all);
        outcome.metrics.extend(mismatch.metrics());
        self.check_loss(outcome.loss)?;
        let (mut first_sequence, mut first_token) = (0, 0);
        for micro in micros {
            if micros.len() > 1 {
                self.forward(device, policy, &micro.host, &self.rows.examples[micro.examples.clone()], true)?;
            }
            let by_number = derivatives(&micro.host, &outcome.grads, first_sequence, first_token);
            let by_value = dvalues(&micro.host, &outcome.grads, first_token);
            policy.backward(device, &by_number, &dkl(&micro.host, &outcome.grads, first_token), &by_value)?;
            first_sequence += micro.host.sequences.len();
            first_token += micro.host.targets.len();
        }
        Ok(outcome)
    }

    /// What the objective reads of all rows; `done` is told how many examples are finished.
    pub fn look<B: Backend>(&self, device: &B, policy: &mut Policy<B>, done: &mut dyn FnMut(usize)) -> Result<Stats> {
        self.forward_all(device, policy, &self.micros(self.rows.examples), done)
    }

    /// The policy's last batch is then the last of `micros`.
    fn forward_all<B: Backend>(
        &self,
        device: &B,
        policy: &mut Policy<B>,
        micros: &[Micro],
        done: &mut dyn FnMut(usize),
    ) -> Result<Stats> {
        let (needs, mut all) = (self.objective.needs(), Stats::default());
        let (mismatched, mut moving): (Vec<&Example>, _) = (self.rows.mismatched.iter().collect(), Vec::new());
        for micro in self.micros(&mismatched) {
            let seen = self.forward(device, policy, &micro.host, &mismatched[micro.examples], false)?;
            all.mismatched_logps.extend(sums(&micro.host, &seen.logps));
            moving.extend(seen.moving.iter().flat_map(|logps| sums(&micro.host, logps)));
        }
        let of_refs = |scored: &Vec<&Scored>| scored.iter().flat_map(|s| &s.sums).copied().collect();
        all.mismatched_ref_logps = self.rows.mismatched_refs.iter().map(of_refs).collect();
        all.mismatched_ref_logps.extend((!moving.is_empty()).then_some(moving));
        for micro in micros {
            let seen = self.forward(device, policy, &micro.host, &self.rows.examples[micro.examples.clone()], true)?;
            append(&mut all, stats(&needs, &micro.host, &seen, &self.rows, micro.examples.clone()));
            done(micro.examples.end);
        }
        Ok(all)
    }

    /// One micro-batch through the policy; `compared` with the references' distributions, where the objective wants that.
    /// Fails, naming rows and the tensor, where something is not finite.
    fn forward<B: Backend>(
        &self,
        device: &B,
        policy: &mut Policy<B>,
        host: &data::Batch,
        examples: &[&Example],
        compared: bool,
    ) -> Result<Seen> {
        let hidden = self.rows.hidden.iter().filter(|_| compared).map(|rows| rows.read_all(examples));
        let seen = policy.forward(device, host, &hidden.collect::<Result<Vec<_>>>()?)?;
        let bad = |range: &Range<usize>| {
            let sequences = host.sequences[range.clone()].iter();
            sequences.flat_map(|tokens| &seen.logps[tokens.clone()]).any(|x| !x.is_finite())
        };
        let found = host.examples.iter().zip(examples).filter(|(sequences, _)| bad(sequences));
        let found: Vec<&Example> = found.map(|(_, example)| *example).collect();
        if found.is_empty() {
            return Ok(seen);
        }
        let what = match self.purpose {
            Purpose::Training => "a log-probability",
            Purpose::HeldOut => "a held-out log-probability",
        };
        let (rows, tensor) = (rows_of(&found), policy.first_bad_tensor(device)?);
        let detail = format!("{rows}; first bad tensor: {tensor}; {}", self.advice());
        Err(Error::NotFinite { step: self.step, what: what.into(), detail })
    }

    fn check_loss(&self, loss: f64) -> Result<()> {
        if loss.is_finite() {
            return Ok(());
        }
        let rows = rows_of(self.rows.examples);
        let detail = format!("log-probabilities are finite, the loss of {rows} is not; {}", self.advice());
        Err(Error::NotFinite { step: self.step, what: "the loss".into(), detail })
    }

    fn advice(&self) -> &'static str {
        match (self.purpose, self.step) {
            (Purpose::Training, _) => "nothing was updated; a lower --learning-rate or --max-grad-norm may help",
            (Purpose::HeldOut, 0) => "are the weights sound?",
            _ => "this step's update broke the model; a lower --learning-rate or --max-grad-norm may help",
        }
    }
}

/// Joins the stats of consecutive micro-batches.
fn append(all: &mut Stats, next: Stats) {
    let (sequences, tokens) = (all.lens.len(), all.token_logps.len());
    let join = |all: &mut Vec<Vec<f64>>, next: Vec<Vec<f64>>| {
        all.resize_with(next.len().max(all.len()), Vec::new);
        all.iter_mut().zip(next).for_each(|(all, next)| all.extend(next));
    };
    all.logps.extend(next.logps);
    all.scores.extend(next.scores);
    all.lens.extend(next.lens);
    join(&mut all.ref_logps, next.ref_logps);
    all.pairs.extend(next.pairs.into_iter().map(|(chosen, rejected)| (chosen + sequences, rejected + sequences)));
    all.prior.extend(next.prior.into_iter().map(|s| s + sequences));
    all.margins.extend(next.margins);
    all.labels.extend(next.labels);
    all.offsets.pop();
    all.offsets.extend(next.offsets.into_iter().map(|offset| offset + tokens));
    all.token_logps.extend(next.token_logps);
    join(&mut all.ref_token_logps, next.ref_token_logps);
    all.groups.extend(next.groups.into_iter().map(|group| group.start + sequences..group.end + sequences));
    all.answers.extend(next.answers.into_iter().map(|answer| answer + sequences));
    (all.longest, all.absent) = (all.longest.max(next.longest), all.absent + next.absent);
    all.advantages.extend(next.advantages);
    all.old_token_logps.extend(next.old_token_logps);
    all.sampled_token_logps.extend(next.sampled_token_logps);
    all.token_advantages.extend(next.token_advantages);
    all.returns.extend(next.returns);
    all.values.extend(next.values);
    all.old_values.extend(next.old_values);
    all.entropy.extend(next.entropy);
    all.ln_sum_p2.extend(next.ln_sum_p2);
    join(&mut all.token_kl, next.token_kl);
    (all.ref_weights, all.state) = (next.ref_weights, next.state);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_drawn_is_compared_with_what_is_trained_on() {
        let mut stats = Stats {
            lens: vec![2.0, 1.0],
            offsets: vec![0, 2, 3],
            answers: vec![1],
            token_logps: vec![-1.0, -2.0, -3.0],
            ..Stats::default()
        };
        let told = |stats: &Stats| {
            let mut mismatch = Mismatch::default();
            mismatch.add(stats);
            mismatch.metrics().map(|(_, value)| value).collect::<Vec<_>>()
        };
        assert_eq!(told(&stats), [0.0; 0], "nothing was drawn");
        stats.sampled_token_logps = vec![-1.0, -2.5, 0.0];
        assert_eq!(told(&stats), [0.25, 0.5], "the data's own answer was not drawn");
    }
}
