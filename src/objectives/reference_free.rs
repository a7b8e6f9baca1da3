//! What losses on pairs without a reference share: a score of each completion from its log-prob and length, the mean of a
//! function of two scores, and the likelihood of the chosen completions beside it.

use super::pairwise::{self, Pair, PairLoss};
use super::{Needs, Objective, Outcome, Scope, Stats, Totals};
use crate::error::Result;
use crate::params::{Domain, NOT_NEGATIVE, ParamSpec, Params};

/// Off by default; in `cpo`, whose paper has it, required.
pub(super) const CPO_ALPHA: ParamSpec = ParamSpec {
    name: "cpo_alpha",
    domain: Domain::Number { default: Some(0.0), range: NOT_NEGATIVE, example: 1.0 },
    only_with: None,
    help: "weight of the negative log-likelihood of chosen completions, a mean over tokens",
};

/// The value of a score and its derivative by the completion's summed log-prob.
pub(super) type Scored = (f64, f64);

/// `score` of (summed log-prob in nats, tokens); `loss` of a pair of scores; rewards are beta times scores.
pub(super) struct ReferenceFree<S, L> {
    pub name: &'static str,
    pub beta: f64,
    /// Weight of the likelihood term, >= 0.
    pub nll: f64,
    pub score: S,
    pub loss: L,
}

/// The summed log-prob.
pub(super) fn sum(logp: f64, _: f64) -> Scored {
    (logp, 1.0)
}

/// The mean log-prob of a token.
pub(super) fn mean(logp: f64, len: f64) -> Scored {
    (logp / len, 1.0 / len)
}

pub(super) fn boxed<S, L>(
    name: &'static str,
    params: &Params,
    nll: f64,
    score: S,
    loss: L,
) -> Result<Box<dyn Objective>>
where
    S: Fn(f64, f64) -> Scored + Send + Sync + 'static,
    L: Fn(&Pair) -> PairLoss + Send + Sync + 'static,
{
    Ok(Box::new(ReferenceFree { name, beta: params["beta"], nll, score, loss }))
}

impl<S, L> Objective for ReferenceFree<S, L>
where
    S: Fn(f64, f64) -> Scored + Send + Sync,
    L: Fn(&Pair) -> PairLoss + Send + Sync,
{
    fn name(&self) -> &str {
        self.name
    }

    fn needs(&self) -> Needs {
        Needs { pairs: true, pair_weights: true, ..Needs::POLICY }
    }

    fn scope(&self) -> Scope {
        Scope::Pair
    }

    fn evaluate(&self, stats: &Stats, totals: &Totals) -> Outcome {
        let score = |s: usize| (self.score)(stats.logps[s], stats.lens[s]);
        let scores: Vec<(Scored, Scored)> = stats.pairs.iter().map(|&(w, l)| (score(w), score(l))).collect();
        let losses = scores.iter().zip(&stats.pairs).map(|(&((chosen, by_w), (rejected, by_l)), &(w, l))| {
            let pair = Pair { chosen, rejected, chosen_len: stats.lens[w], rejected_len: stats.lens[l] };
            let loss = (self.loss)(&pair);
            PairLoss { by_chosen: loss.by_chosen * by_w, by_rejected: loss.by_rejected * by_l, ..loss }
        });
        let rewards: Vec<(f64, f64)> = scores.iter().map(|(w, l)| (self.beta * w.0, self.beta * l.0)).collect();
        let mut outcome = pairwise::mean(stats, totals, losses, &rewards);
        if self.nll > 0.0 {
            let mut nll = 0.0;
            for &(chosen, _) in &stats.pairs {
                nll -= stats.logps[chosen] / totals.tokens;
                outcome.grads.logps[chosen] -= self.nll / totals.tokens;
            }
            outcome.loss += self.nll * nll;
            outcome.metrics.push(("nll_loss".into(), nll));
        }
        outcome
    }
}
