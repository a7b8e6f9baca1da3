//! KL(policy || reference) from samples, and as a penalty on any objective.
//!
//! Schulman's estimators ("Approximating KL divergence", 2020), with d = ln pi_ref(y) - ln pi(y) of a sample y of pi:
//!
//! ```text
//!        value          d / d ln pi     as an estimate          its gradient, used as a loss on samples of pi
//! k1     -d             1               unbiased                0 in expectation: it does not know the reference
//! k2     d^2 / 2        -d              biased, never negative  that of KL(pi || pi_ref)
//! k3     e^d - 1 - d    1 - e^d         unbiased, >= 0          that of KL(pi_ref || pi), the other direction
//! ```
//!
//! The last column holds where y is one draw. For a completion of many tokens drawn from the policy it holds of the
//! completion's log-prob: [`sequence_k2`] is right, and so is the score-function form of k1, [`reward_to_go_k1`]. A sum
//! of k2 over tokens is not, nor is the exact KL of every token's distribution: both leave out that a token also
//! changes which states come after it. As a penalty on given completions ([`KlPenalty`]) there is no such change.
//!
//! With several references and weights w_k the choice of the estimator chooses the mean of the references that the
//! policy is held to: `sum_k w_k k1_k` is k1 to the geometric mean, `sum_k w_k k2_k` has the gradient of k2 to
//! it, `sum_k w_k k3_k` has the gradient of k3 to the *arithmetic* mean. The exact `sum_k w_k KL(pi || pi_k)` is the KL to the
//! normalised geometric mean and a constant, -ln of its normaliser: it is smallest there, and not 0.

use std::borrow::Cow;
use std::str::FromStr;

use super::ref_weights::check_weights;
use super::{Credit, Metric, Needs, Objective, Outcome, Scope, Stats, Totals};
use crate::error::{Error, Result};

/// k1 of one token or sequence and its derivative by `logp`.
pub fn k1(logp: f64, ref_logp: f64) -> (f64, f64) {
    (logp - ref_logp, 1.0)
}

/// k2 of one token or sequence and its derivative by `logp`.
pub fn k2(logp: f64, ref_logp: f64) -> (f64, f64) {
    let ratio = logp - ref_logp;
    (0.5 * ratio * ratio, ratio)
}

/// k3 of one token or sequence and its derivative by `logp`. Infinite where the reference is more likely by e^709.
pub fn k3(logp: f64, ref_logp: f64) -> (f64, f64) {
    let d = ref_logp - logp;
    // e^d - 1 - d would be 0 where d is small.
    let grown = d.exp_m1();
    (grown - d, -grown)
}

/// k2 of whole completions: values and derivatives by `logps`, `[S]` each. On samples of the policy the expected
/// gradient is that of KL(policy || reference).
pub fn sequence_k2(logps: &[f64], ref_logps: &[f64]) -> (Vec<f64>, Vec<f64>) {
    logps.iter().zip(ref_logps).map(|(&logp, &ref_logp)| k2(logp, ref_logp)).unzip()
}

/// Of one completion, sampled from the policy: for each token the sum of k1 over itself and the tokens after it. These
/// are the factors of d ln pi(token) in the policy gradient of the KL, whose expectation is the gradient of
/// KL(policy || reference): write them into `Grads::token_logps` as constants. The first is the completion's k1.
pub fn reward_to_go_k1(token_logps: &[f64], ref_token_logps: &[f64]) -> Vec<f64> {
    let mut to_go = 0.0;
    let backwards = token_logps.iter().zip(ref_token_logps).rev();
    let mut sums: Vec<f64> = backwards
        .map(|(&logp, &ref_logp)| {
            to_go += k1(logp, ref_logp).0;
            to_go
        })
        .collect();
    sums.reverse();
    sums
}

/// The strength that follows a KL: Ziegler et al., arXiv:1909.08593, section 2.2. `samples` completions had the mean `kl`; `horizon` is
/// how many it takes to change by a fifth.
pub fn adapted(beta: f64, kl: f64, target: f64, samples: f64, horizon: f64) -> f64 {
    beta * (1.0 + (kl / target - 1.0).clamp(-0.2, 0.2) * samples / horizon)
}

/// How a penalty measures the KL of a token's distribution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Estimator {
    /// Over the whole vocabulary, [`Stats::token_kl`].
    Exact,
    /// [`k2`] of the token that is there.
    K2,
    /// [`k3`] of the token that is there.
    K3,
}

impl FromStr for Estimator {
    type Err = Error;

    /// `exact`, `k2` or `k3`.
    fn from_str(name: &str) -> Result<Self> {
        match name {
            "exact" => Ok(Self::Exact),
            "k2" => Ok(Self::K2),
            "k3" => Ok(Self::K3),
            "k1" => Err(Error::option(
                "--kl-estimator",
                "the gradient of k1 does not depend on the reference, so it holds the policy to nothing; use `exact`",
            )),
            _ => Err(Error::option("--kl-estimator", format!("expected exact, k2 or k3, got {name:?}"))),
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct KlPenaltyOptions {
    /// Nats of loss for a nat of KL, > 0.
    pub weight: f64,
    pub estimator: Estimator,
    /// `[K]` how much each reference counts, >= 0, sum 1.
    pub ref_weights: Vec<f64>,
}

impl KlPenaltyOptions {
    /// Refuses what cannot be: with this many references.
    pub fn check(&self, references: usize) -> Result<()> {
        if !(self.weight > 0.0 && self.weight.is_finite()) {
            let detail = format!("expected a number above 0, got {}; for example `--kl-penalty 0.1`", self.weight);
            return Err(Error::option("--kl-penalty", detail));
        }
        if references == 0 {
            return Err(Error::option("--kl-penalty", "there is no reference to be held to; give a --ref-model"));
        }
        check_weights(&self.ref_weights, references)
    }
}

/// An objective and a penalty on leaving K references:
///
/// ```text
/// loss = inner + weight sum_k w_k mean_t KL_k(t)
/// ```
///
/// where the mean is over all completion tokens of the optimizer batch, of pairs both completions'. The inner objective
/// may read references or none; it is given the first that it can work with, the anchor before all.
///
/// Metrics beside the inner objective's: `refs/k/kl`, nats a token, and `kl`, their weighted mean (unless
/// the inner objective has a metric of that name).
pub struct KlPenalty {
    inner: Box<dyn Objective>,
    options: KlPenaltyOptions,
}

impl KlPenalty {
    /// Call [`KlPenaltyOptions::check`] before, for messages that a user understands.
    ///
    /// # Panics
    /// If `inner` needs more references than there are.
    pub fn new(inner: Box<dyn Objective>, options: KlPenaltyOptions) -> Self {
        let (needed, given) = (*inner.needs().refs.start(), options.ref_weights.len());
        assert!(needed <= given, "{} needs {needed} references, there are {given}", inner.name());
        Self { inner, options }
    }

    /// The statistics with the references that the inner objective can work with.
    fn of_inner<'a>(&self, stats: &'a Stats) -> Cow<'a, Stats> {
        let most = *self.inner.needs().refs.end();
        if most >= self.options.ref_weights.len() {
            return Cow::Borrowed(stats);
        }
        let cut = |of_refs: &Vec<Vec<f64>>| of_refs[..most.min(of_refs.len())].to_vec();
        Cow::Owned(Stats {
            ref_logps: cut(&stats.ref_logps),
            ref_token_logps: cut(&stats.ref_token_logps),
            mismatched_ref_logps: cut(&stats.mismatched_ref_logps),
            token_kl: cut(&stats.token_kl),
            ..stats.clone()
        })
    }

    /// Of token t and reference k: KL, and its derivative by what the estimator reads.
    fn token(&self, stats: &Stats, k: usize, t: usize) -> (f64, f64) {
        match self.options.estimator {
            Estimator::Exact => (stats.token_kl[k][t], 1.0),
            Estimator::K2 => k2(stats.token_logps[t], stats.ref_token_logps[k][t]),
            Estimator::K3 => k3(stats.token_logps[t], stats.ref_token_logps[k][t]),
        }
    }
}

impl Objective for KlPenalty {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn needs(&self) -> Needs {
        let inner = self.inner.needs();
        let references = self.options.ref_weights.len();
        let exact = self.options.estimator == Estimator::Exact;
        Needs {
            refs: references..=references,
            token_kl: inner.token_kl || exact,
            token_logps: inner.token_logps || !exact,
            ref_token_logps: inner.ref_token_logps || !exact,
            ..inner
        }
    }

    fn scope(&self) -> Scope {
        self.inner.scope()
    }

    fn initial_state(&self) -> Vec<f64> {
        self.inner.initial_state()
    }

    fn credit(&self, rollouts: &Stats) -> Credit {
        self.inner.credit(&self.of_inner(rollouts))
    }

    fn evaluate(&self, stats: &Stats, totals: &Totals) -> Outcome {
        let KlPenaltyOptions { weight, estimator, ref_weights } = &self.options;
        let mut outcome = self.inner.evaluate(&self.of_inner(stats), totals);
        let tokens = stats.offsets.last().copied().unwrap_or(0);
        let grads = &mut outcome.grads;
        match estimator {
            Estimator::Exact => grads.token_kl.resize(ref_weights.len(), vec![0.0; tokens]),
            Estimator::K2 | Estimator::K3 => grads.token_logps.resize(tokens, 0.0),
        }
        let mut kls = vec![0.0; ref_weights.len()];
        for (k, ref_weight) in ref_weights.iter().enumerate() {
            for t in 0..tokens {
                let (kl, by_input) = self.token(stats, k, t);
                kls[k] += kl / totals.completion_tokens;
                // 0 times an infinite KL is 0.
                if *ref_weight > 0.0 {
                    let into = match estimator {
                        Estimator::Exact => &mut grads.token_kl[k][t],
                        Estimator::K2 | Estimator::K3 => &mut grads.token_logps[t],
                    };
                    *into += weight * ref_weight * by_input / totals.completion_tokens;
                }
            }
        }
        let counted = kls.iter().zip(ref_weights).filter(|(_, ref_weight)| **ref_weight > 0.0);
        let kl: f64 = counted.map(|(kl, ref_weight)| kl * ref_weight).sum();
        outcome.loss += weight * kl;
        let metrics = &mut outcome.metrics;
        if metrics.iter().all(|(name, _)| name != "kl") {
            metrics.push(("kl".into(), kl));
        }
        metrics.extend(kls.iter().enumerate().map(|(k, kl)| -> Metric { (format!("refs/{k}/kl").into(), *kl) }));
        outcome
    }
}
