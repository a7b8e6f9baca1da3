//! What losses on completions that are labelled one by one share: the weighted mean over all completions of the optimizer
//! batch and the metrics of TRL's KTO trainer. Of a pair, the chosen completion is desirable.

use super::{Grads, Metric, Needs, Objective, Outcome, Scope, Stats, Totals};
use crate::error::{Error, Result};
use crate::params::{Domain, NOT_NEGATIVE, ParamSpec, Params};

pub(super) const NEEDS: Needs = Needs { refs: 1..=1, labels: true, ..Needs::POLICY };

pub(super) const DESIRABLE_WEIGHT: ParamSpec = ParamSpec {
    name: "desirable_weight",
    domain: Domain::Number { default: Some(1.0), range: NOT_NEGATIVE, example: 1.33 },
    only_with: None,
    help: "factor of the loss of desirable completions, for data with more of one kind; 1 leaves it as it is",
};

pub(super) const UNDESIRABLE_WEIGHT: ParamSpec = ParamSpec {
    name: "undesirable_weight",
    domain: Domain::Number { default: Some(1.0), range: NOT_NEGATIVE, example: 0.75 },
    only_with: None,
    help: "factor of the loss of undesirable completions; 1 leaves it as it is",
};

/// Factors by kind.
#[derive(Clone, Copy)]
pub(super) struct Weights {
    desirable: f64,
    undesirable: f64,
}

impl Weights {
    pub fn of(params: &Params) -> Result<Self> {
        let weights = Self { desirable: params[DESIRABLE_WEIGHT.name], undesirable: params[UNDESIRABLE_WEIGHT.name] };
        if weights.desirable == 0.0 && weights.undesirable == 0.0 {
            let detail = "both weights are 0, so nothing would be learnt; raise one";
            return Err(Error::option(DESIRABLE_WEIGHT.flag(), detail));
        }
        Ok(weights)
    }
}

/// A loss of each completion alone: of (log-ratio to the reference in nats, desirable) its value and slope.
pub(super) fn each(
    name: &'static str,
    params: &Params,
    loss: impl Fn(f64, bool) -> (f64, f64) + Send + Sync + 'static,
) -> Result<Box<dyn Objective>> {
    Ok(Box::new(Each { name, beta: params["beta"], weights: Weights::of(params)?, loss }))
}

struct Each<F> {
    name: &'static str,
    /// Scales the rewards, which are metrics only.
    beta: f64,
    weights: Weights,
    loss: F,
}

impl<F: Fn(f64, bool) -> (f64, f64) + Send + Sync> Objective for Each<F> {
    fn name(&self) -> &str {
        self.name
    }

    fn needs(&self) -> Needs {
        NEEDS
    }

    fn scope(&self) -> Scope {
        Scope::Pair
    }

    fn evaluate(&self, stats: &Stats, totals: &Totals) -> Outcome {
        mean(stats, totals, self.beta, self.weights, &self.loss)
    }
}

/// The mean over all completions of the optimizer batch.
pub(super) fn mean(
    stats: &Stats,
    totals: &Totals,
    beta: f64,
    weights: Weights,
    loss: impl Fn(f64, bool) -> (f64, f64),
) -> Outcome {
    let mut grads = Grads { logps: vec![0.0; stats.logps.len()], ..Grads::default() };
    let mut value = 0.0;
    let (mut desirable, mut undesirable) = ([0.0; 2], [0.0; 2]);
    for (s, &label) in stats.labels.iter().enumerate() {
        let log_ratio = stats.logps[s] - stats.ref_logps[0][s];
        let (own, slope) = loss(log_ratio, label);
        let weight = if label { weights.desirable } else { weights.undesirable } / totals.sequences;
        value += weight * own;
        grads.logps[s] = weight * slope;
        let sums = if label { &mut desirable } else { &mut undesirable };
        sums[0] += beta * log_ratio;
        sums[1] += stats.logps[s];
    }
    let counts = (totals.desirable, totals.sequences - totals.desirable);
    let mut metrics: Vec<Metric> = Vec::new();
    for (kind, sums, count) in [("chosen", desirable, counts.0), ("rejected", undesirable, counts.1)] {
        if count > 0.0 {
            metrics.push((format!("rewards/{kind}").into(), sums[0] / count));
            metrics.push((format!("logps/{kind}").into(), sums[1] / count));
        }
    }
    if counts.0 > 0.0 && counts.1 > 0.0 {
        metrics.push(("rewards/margins".into(), desirable[0] / counts.0 - undesirable[0] / counts.1));
    }
    Outcome { loss: value, grads, metrics, ..Outcome::default() }
}
