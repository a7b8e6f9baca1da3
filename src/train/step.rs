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
    /// `[references]` where their final hidden rows are found, for KLs over the whole vocabulary; empty where none is wanted.
    pub hidden: &'a [HiddenRows],
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

/// A micro-batch on its way.
struct Micro {
    host: data::Batch,
    /// Which examples of the step it holds.
    examples: Range<usize>,
}

/// What is known of a batch before it is run. An example of two sequences is a pair, whoever needs to know.
fn shape(needs: &Needs, host: &data::Batch, examples: &[&Example]) -> Stats {
    let pairs = host.examples.iter().filter(|sequences| sequences.len() == 2);
    let labels = examples.iter().flat_map(|example| match example.sequences.len() {
        2 => vec![true, false],
        _ => vec![example.label.unwrap_or(true)],
    });
    let margins = examples.iter().filter(|example| example.sequences.len() == 2);
    Stats {
        lens: examples.iter().flat_map(|e| &e.sequences).map(|s| (s.ids.len() - s.first) as f64).collect(),
        pairs: pairs.map(|sequences| (sequences.start, sequences.start + 1)).collect(),
        labels: if needs.labels { labels.collect() } else { Vec::new() },
        margins: if needs.margins { margins.map(|e| e.margin.unwrap_or(0.0)).collect() } else { Vec::new() },
        ..Stats::default()
    }
}

/// Everything of a micro-batch that an objective reads.
fn stats(needs: &Needs, host: &data::Batch, seen: &Seen, rows: &Rows, at: Range<usize>) -> Stats {
    let mut stats = shape(needs, host, &rows.examples[at.clone()]);
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
    if needs.ln_sum_p2 {
        stats.ln_sum_p2 = exact(&seen.ln_sum_p2);
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

/// Refuses an objective that reads what no forward pass here computes.
pub fn check_needs(name: &str, needs: &Needs) -> Result<()> {
    let missing = [
        ("groups", needs.groups),
        ("rewards", needs.rewards),
        ("log-probabilities of a sampling policy", needs.old_token_logps),
        ("entropies", needs.entropy),
        ("values", needs.values),
    ];
    match missing.iter().find(|(_, needed)| *needed) {
        None => Ok(()),
        Some((what, _)) => {
            let detail = format!("{name} needs {what}, which training on a fixed data set does not compute");
            Err(Error::option("--objective", detail))
        }
    }
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

/// Runs one step. Nothing is updated when anything is not finite.
pub fn step<B: Backend>(device: &B, policy: &mut Policy<B>, pass: &Pass, learning_rate: f64) -> Result<StepResult> {
    let _range = range(c"step");
    let micros = pass.micros(pass.rows.examples);
    policy.model.zero_grads(device)?;
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
            totals += Totals::of(&shape(needs, &micro.host, &self.rows.examples[micro.examples.clone()]));
        }
        totals
    }

    /// Forward, loss and backward of one micro-batch after the other.
    fn micro_by_micro<B: Backend>(&self, device: &B, policy: &mut Policy<B>, micros: &[Micro]) -> Result<Outcome> {
        let needs = self.objective.needs();
        let totals = self.totals(&needs, micros);
        let mut sum = Outcome::default();
        for micro in micros {
            let seen = self.forward(device, policy, &micro.host, &self.rows.examples[micro.examples.clone()], true)?;
            let stats = stats(&needs, &micro.host, &seen, &self.rows, micro.examples.clone());
            let outcome = self.objective.evaluate(&stats, &totals);
            let grads = &outcome.grads;
            policy.backward(device, &derivatives(&micro.host, grads, 0, 0), &dkl(&micro.host, grads, 0))?;
            sum.loss += outcome.loss;
            join_metrics(&mut sum.metrics, &outcome.metrics);
        }
        self.check_loss(sum.loss).map(|()| sum)
    }

    /// All forwards, one loss, then each micro-batch's forward again with its backward.
    fn all_at_once<B: Backend>(&self, device: &B, policy: &mut Policy<B>, micros: &[Micro]) -> Result<Outcome> {
        let all = self.forward_all(device, policy, micros, &mut |_| {})?;
        let outcome = self.objective.evaluate(&all, &Totals::of(&all));
        self.check_loss(outcome.loss)?;
        let (mut first_sequence, mut first_token) = (0, 0);
        for micro in micros {
            if micros.len() > 1 {
                self.forward(device, policy, &micro.host, &self.rows.examples[micro.examples.clone()], true)?;
            }
            let by_number = derivatives(&micro.host, &outcome.grads, first_sequence, first_token);
            policy.backward(device, &by_number, &dkl(&micro.host, &outcome.grads, first_token))?;
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
    all.margins.extend(next.margins);
    all.labels.extend(next.labels);
    all.offsets.pop();
    all.offsets.extend(next.offsets.into_iter().map(|offset| offset + tokens));
    all.token_logps.extend(next.token_logps);
    join(&mut all.ref_token_logps, next.ref_token_logps);
    all.ln_sum_p2.extend(next.ln_sum_p2);
    join(&mut all.token_kl, next.token_kl);
    (all.ref_weights, all.state) = (next.ref_weights, next.state);
}
