//! One optimizer step: examples in, changed weights and metrics out.

use std::ops::Range;

use super::policy::Policy;
use crate::data::{self, Example, Packing};
use crate::device::range;
use crate::error::{Error, Result};
use crate::objectives::{Grads, Metric, Needs, Objective, Scope, Stats, Totals, join_metrics};
use crate::ops::Backend;

/// Examples of one optimizer batch, with what the references said about them.
pub struct StepBatch<'a> {
    pub examples: &'a [&'a Example],
    /// `[references][examples][sequences]` summed log-probabilities, nats.
    pub ref_logps: &'a [Vec<&'a [f64]>],
}

/// What a step says about itself.
#[derive(Debug)]
pub struct StepResult {
    pub loss: f64,
    pub metrics: Vec<Metric>,
    /// Before clipping.
    pub grad_norm: f64,
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
fn shape(host: &data::Batch) -> Stats {
    let pairs = host.examples.iter().filter(|sequences| sequences.len() == 2);
    Stats {
        lens: host.sequences.iter().map(|range| range.len() as f64).collect(),
        pairs: pairs.map(|sequences| (sequences.start, sequences.start + 1)).collect(),
        ..Stats::default()
    }
}

/// Everything of a batch that an objective reads. `ref_logps` is `[references][examples][sequences]`.
pub fn stats(needs: &Needs, host: &data::Batch, logps: &[f32], ref_logps: &[Vec<&[f64]>]) -> Stats {
    let sum = |range: &Range<usize>| logps[range.clone()].iter().map(|x| f64::from(*x)).sum();
    let mut stats = shape(host);
    stats.logps = host.sequences.iter().map(sum).collect();
    stats.ref_logps = ref_logps.iter().map(|by_example| by_example.concat()).collect();
    if needs.per_token() {
        stats.offsets = host.sequences.iter().map(|range| range.start).chain([logps.len()]).collect();
        stats.token_logps = logps.iter().map(|x| f64::from(*x)).collect();
    }
    stats
}

/// Refuses an objective that reads what no forward pass here computes.
pub fn check_needs(name: &str, needs: &Needs) -> Result<()> {
    let missing = [
        ("labels", needs.labels),
        ("groups", needs.groups),
        ("rewards", needs.rewards),
        ("scores of a reward head", needs.scores),
        ("per-token reference log-probabilities", needs.ref_token_logps),
        ("log-probabilities of a sampling policy", needs.old_token_logps),
        ("entropies", needs.entropy),
        ("collision probabilities", needs.ln_sum_p2),
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

/// Derivative by each target's log-probability: that of its sequence's sum plus its own.
fn dlogp(host: &data::Batch, grads: &Grads, first_sequence: usize, first_token: usize) -> Vec<f64> {
    let mut dlogp = vec![0.0; host.targets.len()];
    for (s, range) in host.sequences.iter().enumerate() {
        let by_sum = grads.logps.get(first_sequence + s).copied().unwrap_or(0.0);
        for t in range.clone() {
            dlogp[t] = by_sum + grads.token_logps.get(first_token + t).copied().unwrap_or(0.0);
        }
    }
    dlogp
}

/// Runs one step. `step` counts from 1; nothing is updated when anything is not finite.
pub fn step<B: Backend>(
    device: &B,
    policy: &mut Policy<B>,
    objective: &dyn Objective,
    packing: Packing,
    batch: &StepBatch,
    step: u64,
    learning_rate: f64,
) -> Result<StepResult> {
    let _range = range(c"step");
    let micros: Vec<Micro> = packing.batches(batch.examples).map(|(examples, host)| Micro { host, examples }).collect();
    policy.model.zero_grads(device)?;
    let pass = Pass { objective, batch, needs: objective.needs(), step };
    let (loss, metrics) = match objective.scope() {
        Scope::Pair => pass.micro_by_micro(device, policy, &micros)?,
        Scope::Batch => pass.all_at_once(device, policy, &micros)?,
    };
    let norm = policy.grad_norm(device)?;
    if let Some(bad) = norm.bad {
        let detail = format!("{}; first bad tensor: the gradient of {bad}; {}", rows_of(batch.examples), advice());
        return Err(Error::NotFinite { step, what: "the gradient".into(), detail });
    }
    policy.update(device, step, learning_rate, norm.norm)?;
    let rows = micros.iter().map(|m| m.host.rows()).sum();
    Ok(StepResult { loss, metrics, grad_norm: norm.norm, rows })
}

/// The rows of some examples, for messages.
fn rows_of(examples: &[&Example]) -> String {
    let rows: Vec<String> = examples.iter().map(|example| example.row.to_string()).collect();
    format!("rows {} of the data set", rows.join(", "))
}

fn advice() -> &'static str {
    "nothing was updated; a lower --learning-rate or --max-grad-norm may help"
}

/// Log-probabilities of a batch, or, where one is not finite, the rows it comes from and the tensor.
pub fn finite_logps<B: Backend>(
    device: &B,
    policy: &mut Policy<B>,
    host: &data::Batch,
    examples: &[&Example],
) -> Result<Result<Vec<f32>, String>> {
    let logps = policy.forward(device, host)?;
    let bad = |range: &Range<usize>| {
        let sequences = host.sequences[range.clone()].iter();
        sequences.flat_map(|tokens| &logps[tokens.clone()]).any(|x| !x.is_finite())
    };
    let found = host.examples.iter().zip(examples).filter(|(sequences, _)| bad(sequences));
    let found: Vec<&Example> = found.map(|(_, example)| *example).collect();
    if found.is_empty() {
        return Ok(Ok(logps));
    }
    let tensor = policy.first_bad_tensor(device)?;
    Ok(Err(format!("{}; first bad tensor: {tensor}", rows_of(&found))))
}

struct Pass<'a> {
    objective: &'a dyn Objective,
    batch: &'a StepBatch<'a>,
    needs: Needs,
    step: u64,
}

type LossAndMetrics = (f64, Vec<Metric>);

impl Pass<'_> {
    /// Means over the optimizer batch, known before any forward pass.
    fn totals(&self, micros: &[Micro]) -> Totals {
        let mut totals = Totals::default();
        for micro in micros {
            totals += Totals::of(&shape(&micro.host));
        }
        totals
    }

    /// Forward, loss and backward of one micro-batch after the other.
    fn micro_by_micro<B: Backend>(
        &self,
        device: &B,
        policy: &mut Policy<B>,
        micros: &[Micro],
    ) -> Result<LossAndMetrics> {
        let totals = self.totals(micros);
        let (mut loss, mut metrics) = (0.0, Vec::new());
        for micro in micros {
            let logps = self.forward(device, policy, micro)?;
            let outcome = self.objective.evaluate(&self.stats(micro, &logps), &totals);
            policy.backward(device, &dlogp(&micro.host, &outcome.grads, 0, 0))?;
            loss += outcome.loss;
            join_metrics(&mut metrics, &outcome.metrics);
        }
        self.check_loss(loss).map(|()| (loss, metrics))
    }

    /// All forwards, one loss, then each micro-batch's forward again with its backward.
    fn all_at_once<B: Backend>(&self, device: &B, policy: &mut Policy<B>, micros: &[Micro]) -> Result<LossAndMetrics> {
        let mut all = Stats::default();
        for micro in micros {
            let logps = self.forward(device, policy, micro)?;
            append(&mut all, self.stats(micro, &logps));
        }
        let outcome = self.objective.evaluate(&all, &Totals::of(&all));
        self.check_loss(outcome.loss)?;
        let (mut first_sequence, mut first_token) = (0, 0);
        for micro in micros {
            if micros.len() > 1 {
                self.forward(device, policy, micro)?;
            }
            policy.backward(device, &dlogp(&micro.host, &outcome.grads, first_sequence, first_token))?;
            first_sequence += micro.host.sequences.len();
            first_token += micro.host.targets.len();
        }
        Ok((outcome.loss, outcome.metrics))
    }

    fn stats(&self, micro: &Micro, logps: &[f32]) -> Stats {
        let ref_logps: Vec<Vec<&[f64]>> =
            self.batch.ref_logps.iter().map(|by_example| by_example[micro.examples.clone()].to_vec()).collect();
        stats(&self.needs, &micro.host, logps, &ref_logps)
    }

    fn forward<B: Backend>(&self, device: &B, policy: &mut Policy<B>, micro: &Micro) -> Result<Vec<f32>> {
        let examples = &self.batch.examples[micro.examples.clone()];
        finite_logps(device, policy, &micro.host, examples)?.map_err(|found| Error::NotFinite {
            step: self.step,
            what: "a log-probability".into(),
            detail: format!("{found}; {}", advice()),
        })
    }

    fn check_loss(&self, loss: f64) -> Result<()> {
        if loss.is_finite() {
            return Ok(());
        }
        let rows = rows_of(self.batch.examples);
        let detail = format!("log-probabilities are finite, the loss of {rows} is not; {}", advice());
        Err(Error::NotFinite { step: self.step, what: "the loss".into(), detail })
    }
}

/// Joins the stats of consecutive micro-batches.
pub fn append(all: &mut Stats, next: Stats) {
    let (sequences, tokens) = (all.logps.len(), all.token_logps.len());
    all.logps.extend(next.logps);
    all.lens.extend(next.lens);
    all.ref_logps.resize_with(next.ref_logps.len(), Vec::new);
    all.ref_logps.iter_mut().zip(next.ref_logps).for_each(|(all, next)| all.extend(next));
    all.pairs.extend(next.pairs.into_iter().map(|(chosen, rejected)| (chosen + sequences, rejected + sequences)));
    all.offsets.pop();
    all.offsets.extend(next.offsets.into_iter().map(|offset| offset + tokens));
    all.token_logps.extend(next.token_logps);
}
