//! How well a policy does on held-out rows.

use serde_json::{Map, Value};

use super::drift::Estimate;
use super::policy::Policy;
use super::step::Pass;
use crate::device::range;
use crate::error::Result;
use crate::objectives::{Metric, Stats, Totals};
use crate::ops::Backend;
use crate::tasks::{Measure, Outcome};

/// What preferences and likelihoods come to, whatever the objective.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Summary {
    /// Share of pairs whose chosen log-ratio is above the rejected one; a tie counts half, so that a policy that
    /// equals its reference has 0.5. `None` without pairs.
    pub accuracy: Option<f64>,
    /// Mean of chosen minus rejected log-ratio, nats.
    pub margin: Option<f64>,
    /// e^(mean negative log-probability) over the tokens of the chosen (or only) completions; `None` of a reward model.
    pub perplexity: Option<f64>,
}

impl Summary {
    /// Log-ratios are against `anchor`, `[sequences]`, or plain log-probabilities without one. A reward model has scores
    /// in their place.
    pub fn of(stats: &Stats, anchor: Option<&[f64]>) -> Self {
        let ratio = |s: usize| match stats.scores.get(s) {
            Some(score) => *score,
            None => stats.logps[s] - anchor.map_or(0.0, |logps| logps[s]),
        };
        let margins: Vec<f64> =
            stats.pairs.iter().map(|(chosen, rejected)| ratio(*chosen) - ratio(*rejected)).collect();
        let mean = |values: &mut dyn Iterator<Item = f64>| {
            (!margins.is_empty()).then(|| values.sum::<f64>() / margins.len() as f64)
        };
        let won = |margin: &f64| match margin.total_cmp(&0.0) {
            _ if *margin == 0.0 => 0.5,
            order => f64::from(u8::from(order.is_gt())),
        };
        let sum = |of: &[f64]| stats.supervised().map(|s| of[s]).sum::<f64>();
        Self {
            accuracy: mean(&mut margins.iter().map(won)),
            margin: mean(&mut margins.iter().copied()),
            perplexity: (!stats.logps.is_empty()).then(|| (-sum(&stats.logps) / sum(&stats.lens)).exp()),
        }
    }
}

/// One evaluation, as it is logged.
#[derive(Clone, PartialEq, Debug)]
pub struct Evaluation {
    pub step: u64,
    pub epoch: f64,
    pub rows: usize,
    /// NaN where the rows are prompts alone.
    pub loss: f64,
    pub summary: Summary,
    pub metrics: Vec<(String, f64)>,
    /// What the policy came to in each task, by name.
    pub exams: Vec<(String, Outcome)>,
    /// KL(policy || reference), nats a completion, of the anchor and then of the references.
    pub drift: Vec<Estimate>,
    /// Seconds.
    pub runtime: f64,
}

/// What the policy and the objective say about some rows.
pub struct Measured {
    pub loss: f64,
    pub summary: Summary,
    pub metrics: Vec<Metric>,
}

impl Measured {
    /// Of prompts alone: there are no completions whose likelihood would say anything.
    pub fn nothing() -> Self {
        let summary = Summary { accuracy: None, margin: None, perplexity: None };
        Self { loss: f64::NAN, summary, metrics: Vec::new() }
    }
}

/// Runs the policy over held-out rows in order and compares it with `anchor`, `[sequences]`; `done` is told how many are finished. Fails, naming rows, where a
/// log-probability is not finite.
pub fn evaluate<B: Backend>(
    device: &B,
    policy: &mut Policy<B>,
    pass: &Pass,
    anchor: Option<&[f64]>,
    done: &mut dyn FnMut(usize),
) -> Result<Measured> {
    let _range = range(c"evaluate");
    let stats = pass.look(device, policy, done)?;
    let outcome = pass.objective.evaluate(&stats, &Totals::of(&stats));
    Ok(Measured { loss: outcome.loss, summary: Summary::of(&stats, anchor), metrics: outcome.metrics })
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
        for (k, Estimate { mean, stderr }) in self.drift.iter().enumerate() {
            let name = if k == 0 { "eval_kl".to_string() } else { format!("eval_kl/{k}") };
            line.insert(format!("{name}_stderr"), (*stderr).into());
            line.insert(name, (*mean).into());
        }
        for (name, outcome) in &self.exams {
            for Measure { name: metric, value, stderr } in &outcome.measures {
                line.insert(format!("eval_{name}/{metric}"), (*value).into());
                stderr.map(|stderr| line.insert(format!("eval_{name}/{metric}_stderr"), stderr.into()));
            }
        }
        line.insert("eval_rows".into(), self.rows.into());
        line.insert("eval_runtime".into(), self.runtime.into());
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tie_counts_half_and_ratios_are_against_the_anchor() {
        let mut stats = Stats {
            logps: vec![-2.0, -4.0, -3.0, -3.0, -6.0, -1.0],
            lens: vec![2.0; 6],
            pairs: vec![(0, 1), (2, 3), (4, 5)],
            ..Stats::default()
        };
        let plain = Summary::of(&stats, None);
        assert_eq!((plain.accuracy, plain.margin), (Some(0.5), Some(-1.0)));
        assert!((plain.perplexity.unwrap() - (11.0f64 / 6.0).exp()).abs() < 1e-12);
        let same = Summary::of(&stats, Some(&stats.logps));
        assert_eq!((same.accuracy, same.margin), (Some(0.5), Some(0.0)));
        stats.pairs.clear();
        assert_eq!(Summary::of(&stats, None).accuracy, None);
    }
}
