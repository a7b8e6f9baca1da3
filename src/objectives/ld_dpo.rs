//! Liu et al., arXiv:2409.06411: length-desensitized DPO. What the longer completion of a pair says beyond the length of the
//! shorter one counts for less.
//!
//! ```text
//! ln p(y) = sum over t <= n of ln pi(y_t) + alpha * sum over t > n,   n = min(n_w, n_l)
//! ```
//!
//! takes the place of ln pi(y), of the policy and of every reference. alpha = 1 is the loss as it was, 0 cuts the tail off.
//! Deviations: none. Lengths stay what they are where a loss divides by them, as in TRL.

use std::ops::Bound;

use super::{Grads, Modifier, Needs, Objective, Outcome, Scope, Stats, Totals};
use crate::params::{Domain, ParamSpec};

pub(super) const MODIFIER: Modifier = Modifier {
    name: "ld_dpo",
    paper: "Liu et al., arXiv:2409.06411",
    summary: "weighs down what the longer completion of a pair says beyond the shorter one's length",
    param: ParamSpec {
        name: "ld_alpha",
        domain: Domain::Number { default: None, range: (Bound::Included(0.0), Bound::Included(1.0)), example: 0.5 },
        only_with: None,
        help: "weight of tokens beyond the length of a pair's shorter completion (LD-DPO)",
    },
    applies: |needs| needs.pairs && *needs.refs.end() > 0,
    fits: "it changes the log-ratios of losses on pairs with a reference",
    wrap: |params, inner| Box::new(LdDpo { inner, alpha: params["ld_alpha"] }),
};

struct LdDpo {
    inner: Box<dyn Objective>,
    /// [0, 1]
    alpha: f64,
}

impl Objective for LdDpo {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn needs(&self) -> Needs {
        Needs { token_logps: true, ref_token_logps: true, ..self.inner.needs() }
    }

    fn scope(&self) -> Scope {
        self.inner.scope()
    }

    fn initial_state(&self) -> Vec<f64> {
        self.inner.initial_state()
    }

    fn evaluate(&self, stats: &Stats, totals: &Totals) -> Outcome {
        let sides = Sides::of(stats, self.alpha);
        let outcome = self.inner.evaluate(&sides.seen(stats), totals);
        let grads = sides.back(stats, &outcome.grads);
        Outcome { grads, ..outcome }
    }
}

/// The two sides of each pair, one after the other: a sequence in several pairs has a weight of its tail in each.
struct Sides {
    sequences: Vec<usize>,
    /// Tokens of `sequences`, as indices of the batch's, and the weight of each.
    tokens: Vec<(usize, f64)>,
    /// Where the tokens of each side begin, and the end.
    offsets: Vec<usize>,
}

impl Sides {
    fn of(stats: &Stats, alpha: f64) -> Self {
        let mut sides = Self { sequences: vec![], tokens: vec![], offsets: vec![0] };
        for &(w, l) in &stats.pairs {
            let len = |s: usize| stats.offsets[s + 1] - stats.offsets[s];
            let shared = len(w).min(len(l));
            for s in [w, l] {
                let weight = |t| if t < shared { 1.0 } else { alpha };
                sides.tokens.extend((0..len(s)).map(|t| (stats.offsets[s] + t, weight(t))));
                sides.sequences.push(s);
                sides.offsets.push(sides.tokens.len());
            }
        }
        sides
    }

    /// What the objective inside sees: two sequences for each pair.
    fn seen(&self, stats: &Stats) -> Stats {
        let sums = |logps: &Vec<f64>| -> Vec<f64> {
            let sides = self.offsets.windows(2).map(|ends| &self.tokens[ends[0]..ends[1]]);
            sides.map(|tokens| tokens.iter().map(|&(t, weight)| weight * logps[t]).sum()).collect()
        };
        let sequences =
            |of: &[f64]| -> Vec<f64> { self.sequences.iter().filter_map(|&s| of.get(s).copied()).collect() };
        let tokens = |of: &[f64]| -> Vec<f64> { self.tokens.iter().filter_map(|&(t, _)| of.get(t).copied()).collect() };
        Stats {
            logps: sums(&stats.token_logps),
            ref_logps: stats.ref_token_logps.iter().map(sums).collect(),
            lens: sequences(&stats.lens),
            pairs: (0..stats.pairs.len()).map(|i| (2 * i, 2 * i + 1)).collect(),
            offsets: self.offsets.clone(),
            token_logps: tokens(&stats.token_logps),
            ref_token_logps: stats.ref_token_logps.iter().map(|logps| tokens(logps)).collect(),
            ln_sum_p2: tokens(&stats.ln_sum_p2),
            token_kl: stats.token_kl.iter().map(|kl| tokens(kl)).collect(),
            ..stats.clone()
        }
    }

    /// Derivatives by what the batch has: log-probs of tokens.
    fn back(&self, stats: &Stats, inner: &Grads) -> Grads {
        let mut token_logps = vec![0.0; stats.token_logps.len()];
        for (side, ends) in self.offsets.windows(2).enumerate() {
            for at in ends[0]..ends[1] {
                let (t, weight) = self.tokens[at];
                token_logps[t] += weight * inner.logps[side] + inner.token_logps.get(at).copied().unwrap_or(0.0);
            }
        }
        Grads { token_logps, ..Grads::default() }
    }
}
