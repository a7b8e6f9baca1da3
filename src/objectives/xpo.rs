//! Xie et al., arXiv:2405.21046, Algorithm 1: exploratory preference optimization.
//!
//! ```text
//! loss = mean over pairs of -ln sigma(beta margin) + alpha ln pi(the reference's completion)
//! ```
//!
//! A pair is a completion of the policy and one of the reference for the same prompt; which of both is chosen, a reward says. The second
//! term lowers what the reference writes anyway, so that the policy looks elsewhere. alpha = 1e-5 and one pair a prompt are those of TRL's
//! XPOTrainer (up to 1.10). Deviation: the reference writes before the first step, when it is what the policy starts from.

use super::pairwise::{self, PairLoss, smoothed};
use super::registry::{BETA, Entry};
use super::{Needs, Objective, Outcome, Scope, Stats, Totals};
use crate::params::{Domain, NOT_NEGATIVE, ParamSpec};

const ALPHA: ParamSpec = ParamSpec {
    name: "xpo_alpha",
    domain: Domain::Number { default: Some(1e-5), range: NOT_NEGATIVE, example: 1e-5 },
    only_with: None,
    help: "weight of ln pi of what the reference wrote, which is lowered to explore",
};

pub(super) const ENTRY: Entry = Entry {
    name: "xpo",
    aliases: &[],
    paper: "Xie et al., arXiv:2405.21046, Algorithm 1",
    summary: "XPO: online DPO of the policy's completions against the reference's, with a bonus for leaving what that writes",
    params: &[BETA, ALPHA],
    build: |params| {
        let beta = params["beta"];
        let dpo = pairwise::each(ENTRY.name, params, move |pair| {
            let (value, slope) = smoothed(beta * pair.margin(), 0.0);
            PairLoss::of_margin(value, beta * slope)
        })?;
        Ok(Box::new(Xpo { dpo, alpha: params[ALPHA.name] }))
    },
};

struct Xpo {
    dpo: Box<dyn Objective>,
    alpha: f64,
}

impl Objective for Xpo {
    fn name(&self) -> &str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        Needs { prior: true, ..self.dpo.needs() }
    }

    fn scope(&self) -> Scope {
        Scope::Pair
    }

    fn evaluate(&self, stats: &Stats, totals: &Totals) -> Outcome {
        let mut outcome = self.dpo.evaluate(stats, totals);
        let mut mean = 0.0;
        for &s in &stats.prior {
            mean += stats.logps[s] / totals.pairs;
            outcome.grads.logps[s] += self.alpha / totals.pairs;
        }
        outcome.loss += self.alpha * mean;
        outcome.metrics.push(("logps/prior".into(), mean));
        outcome
    }
}
