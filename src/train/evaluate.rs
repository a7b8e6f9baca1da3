//! How well a policy does on held-out rows.

use serde_json::{Map, Value};

use super::policy::Policy;
use super::step::{append, finite_logps, stats};
use crate::data::{Example, Packing};
use crate::device::range;
use crate::error::{Error, Result};
use crate::objectives::{Metric, Objective, Stats, Totals};
use crate::ops::Backend;
use crate::references::RefLogps;

/// What preferences and likelihoods come to, whatever the objective.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Summary {
    /// Share of pairs whose chosen log-ratio is above the rejected one; a tie counts half, so that a policy that
    /// equals its reference has 0.5. `None` without pairs.
    pub accuracy: Option<f64>,
    /// Mean of chosen minus rejected log-ratio, nats.
    pub margin: Option<f64>,
    /// e^(mean negative log-probability) over the tokens of the chosen (or only) completions.
    pub perplexity: f64,
}

impl Summary {
    /// Log-ratios are against `ref_logps[0]`, or plain log-probabilities without a reference.
    pub fn of(stats: &Stats) -> Self {
        let reference = |s: usize| stats.ref_logps.first().map_or(0.0, |logps| logps[s]);
        let ratio = |s: usize| stats.logps[s] - reference(s);
        let margins: Vec<f64> =
            stats.pairs.iter().map(|(chosen, rejected)| ratio(*chosen) - ratio(*rejected)).collect();
        let mean = |values: &mut dyn Iterator<Item = f64>| {
            (!margins.is_empty()).then(|| values.sum::<f64>() / margins.len() as f64)
        };
        let won = |margin: &f64| match margin.total_cmp(&0.0) {
            _ if *margin == 0.0 => 0.5,
            order => f64::from(u8::from(order.is_gt())),
        };
        let (logps, tokens) = stats.supervised().fold((0.0, 0.0), |(l, t), s| (l + stats.logps[s], t + stats.lens[s]));
        Self {
            accuracy: mean(&mut margins.iter().map(won)),
            margin: mean(&mut margins.iter().copied()),
            perplexity: (-logps / tokens).exp(),
        }
    }
}

/// One evaluation, as it is logged.
#[derive(Clone, PartialEq, Debug)]
pub struct Evaluation {
    pub step: u64,
    pub epoch: f64,
    pub rows: usize,
    pub loss: f64,
    pub summary: Summary,
    pub metrics: Vec<(String, f64)>,
    /// Seconds.
    pub runtime: f64,
}

/// What the policy and the objective say about some rows.
pub struct Measured {
    pub loss: f64,
    pub summary: Summary,
    pub metrics: Vec<Metric>,
}

/// Rows that are not trained on.
pub struct HeldOut<'a> {
    pub examples: &'a [Example],
    /// `[references]`
    pub ref_logps: &'a [RefLogps],
    pub packing: Packing,
    /// Steps that the policy has behind it, for messages.
    pub step: u64,
}

/// Runs the policy over the rows in order; `done` is told how many are finished. Fails, naming rows, where a
/// log-probability is not finite.
pub fn evaluate<B: Backend>(
    device: &B,
    policy: &mut Policy<B>,
    objective: &dyn Objective,
    held_out: &HeldOut,
    done: &mut dyn FnMut(usize),
) -> Result<Measured> {
    let _range = range(c"evaluate");
    let HeldOut { examples, ref_logps, packing, step } = *held_out;
    let needs = objective.needs();
    let refs: Vec<&Example> = examples.iter().collect();
    let mut all = Stats::default();
    for (range, host) in packing.batches(&refs) {
        let logps = finite_logps(device, policy, &host, &refs[range.clone()])?.map_err(|found| {
            let advice = match step {
                0 => "are the weights sound?",
                _ => "this step's update broke the model; a lower --learning-rate or --max-grad-norm may help",
            };
            Error::NotFinite { step, what: "a held-out log-probability".into(), detail: format!("{found}; {advice}") }
        })?;
        let slice = |r: &'_ RefLogps| r.sums[range.clone()].to_vec();
        let sliced: Vec<Vec<Vec<f64>>> = ref_logps.iter().map(slice).collect();
        let by_example: Vec<Vec<&[f64]>> = sliced.iter().map(|r| r.iter().map(Vec::as_slice).collect()).collect();
        append(&mut all, stats(&needs, &host, &logps, &by_example));
        done(range.end);
    }
    let outcome = objective.evaluate(&all, &Totals::of(&all));
    Ok(Measured { loss: outcome.loss, summary: Summary::of(&all), metrics: outcome.metrics })
}

impl Evaluation {
    /// The line of evaluations.jsonl and, with its `eval_` names, of trainer_state.json.
    pub fn to_json(&self) -> Map<String, Value> {
        let mut line = Map::new();
        line.insert("step".into(), self.step.into());
        line.insert("epoch".into(), self.epoch.into());
        line.insert("eval_loss".into(), self.loss.into());
        line.insert("eval_accuracy".into(), self.summary.accuracy.into());
        line.insert("eval_margin".into(), self.summary.margin.into());
        line.insert("eval_perplexity".into(), self.summary.perplexity.into());
        self.metrics.iter().for_each(|(name, value)| drop(line.insert(format!("eval_{name}"), (*value).into())));
        line.insert("eval_rows".into(), self.rows.into());
        line.insert("eval_runtime".into(), self.runtime.into());
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tie_counts_half_and_ratios_are_against_the_first_reference() {
        let mut stats = Stats {
            logps: vec![-2.0, -4.0, -3.0, -3.0, -6.0, -1.0],
            lens: vec![2.0; 6],
            pairs: vec![(0, 1), (2, 3), (4, 5)],
            ..Stats::default()
        };
        let plain = Summary::of(&stats);
        assert_eq!((plain.accuracy, plain.margin), (Some(0.5), Some(-1.0)));
        assert!((plain.perplexity - (11.0f64 / 6.0).exp()).abs() < 1e-12);
        stats.ref_logps = vec![stats.logps.clone()];
        let same = Summary::of(&stats);
        assert_eq!((same.accuracy, same.margin), (Some(0.5), Some(0.0)));
        stats.pairs.clear();
        assert_eq!(Summary::of(&stats).accuracy, None);
    }
}
