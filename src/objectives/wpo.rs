//! Zhou et al., arXiv:2406.11827, Eq. 2: weighted preference optimization. Pairs that the policy would hardly sample count
//! less, so that data from elsewhere acts like its own.
//!
//! ```text
//! w(y) = exp(mean over tokens of ln pi(token) - ln sum_v pi(v)^2)
//! loss = mean over pairs of w(y_w) w(y_l) loss(pair)
//! ```
//!
//! Weights are constants. The sum over the vocabulary makes tokens of a flat and of a sharp distribution comparable (the
//! paper's sampled alignment). Deviations: in a mixture, terms that are no pair loss keep their weight of 1; TRL multiplies
//! its `sft`, too. Weights are not normalised over the batch, as in TRL.

use super::{Modifier, Needs, Objective, Outcome, Scope, Stats, Totals};
use crate::params::{Domain, ParamSpec};

pub(super) const MODIFIER: Modifier = Modifier {
    name: "wpo",
    paper: "Zhou et al., arXiv:2406.11827, Eq. 2",
    summary: "weights pairs by how likely the policy would sample them",
    param: ParamSpec {
        name: "use_weighting",
        domain: Domain::Switch,
        only_with: None,
        help: "weight pairs by how likely the policy would sample them (WPO)",
    },
    applies: |needs| needs.pair_weights,
    fits: "it weights losses that are a mean over pairs",
    wrap: |_, inner| Box::new(Wpo { inner }),
};

struct Wpo {
    inner: Box<dyn Objective>,
}

impl Objective for Wpo {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn needs(&self) -> Needs {
        Needs { pair_weights: false, token_logps: true, ln_sum_p2: true, ..self.inner.needs() }
    }

    fn scope(&self) -> Scope {
        self.inner.scope()
    }

    fn initial_state(&self) -> Vec<f64> {
        self.inner.initial_state()
    }

    fn evaluate(&self, stats: &Stats, totals: &Totals) -> Outcome {
        let ln_weight = |s: usize| {
            let tokens = stats.offsets[s]..stats.offsets[s + 1];
            tokens.map(|t| stats.token_logps[t] - stats.ln_sum_p2[t]).sum::<f64>() / stats.lens[s]
        };
        let pair_weights = stats.pairs.iter().map(|&(w, l)| (ln_weight(w) + ln_weight(l)).exp()).collect();
        self.inner.evaluate(&Stats { pair_weights, ..stats.clone() }, totals)
    }
}
