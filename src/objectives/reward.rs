//! Ouyang et al., arXiv:2203.02155, Eq. 1: a reward model of pairs (Bradley and Terry, 1952). It trains a head that gives a
//! sequence a score.
//!
//! ```text
//! loss = -ln sigma(r_w - r_l - margin) + c (r_w + r_l)^2                  mean over pairs
//! ```
//!
//! The margin is what the data says about how much better the chosen completion is (Touvron et al., arXiv:2307.09288,
//! Eq. 2), 0 where it says nothing; c keeps scores near 0 (Eisenstein et al., arXiv:2312.09244, Eq. 2). Deviations: none.

use super::pairwise::{log_sigmoid, sigmoid};
use super::registry::Entry;
use super::{Grads, Metric, Needs, Objective, Outcome, Scope, Stats, Totals};
use crate::params::{Domain, NOT_NEGATIVE, ParamSpec};

pub(super) const ENTRY: Entry = Entry {
    name: "reward",
    aliases: &["bradley_terry"],
    paper: "Ouyang et al., arXiv:2203.02155, Eq. 1; margins as in Touvron et al., arXiv:2307.09288, Eq. 2",
    summary: "reward model: a head scores the chosen completion above the rejected one",
    params: &[CENTER],
    build: |params| Ok(Box::new(Reward { center: params["center_rewards_coefficient"] })),
};

const CENTER: ParamSpec = ParamSpec {
    name: "center_rewards_coefficient",
    domain: Domain::Number { default: Some(0.0), range: NOT_NEGATIVE, example: 0.01 },
    only_with: None,
    help: "how strongly the scores of a pair are held to a sum of 0",
};

struct Reward {
    /// >= 0
    center: f64,
}

impl Objective for Reward {
    fn name(&self) -> &str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        Needs { pairs: true, margins: true, scores: true, ..Needs::POLICY }
    }

    fn scope(&self) -> Scope {
        Scope::Pair
    }

    fn evaluate(&self, stats: &Stats, totals: &Totals) -> Outcome {
        let mut grads = Grads { scores: vec![0.0; stats.scores.len()], ..Grads::default() };
        let (mut loss, mut won, mut margin, mut mean) = (0.0, 0.0, 0.0, 0.0);
        let (mut min, mut max) = (f64::INFINITY, f64::NEG_INFINITY);
        for (&(w, l), wanted) in stats.pairs.iter().zip(&stats.margins) {
            let (chosen, rejected) = (stats.scores[w], stats.scores[l]);
            let (z, sum) = (chosen - rejected - wanted, chosen + rejected);
            loss += (self.center * sum * sum - log_sigmoid(z)) / totals.pairs;
            grads.scores[w] += (2.0 * self.center * sum - sigmoid(-z)) / totals.pairs;
            grads.scores[l] += (2.0 * self.center * sum + sigmoid(-z)) / totals.pairs;

            won += f64::from(chosen > rejected) / totals.pairs; // a tie is not a win
            margin += (chosen - rejected) / totals.pairs;
            mean += 0.5 * sum / totals.pairs;
            min = min.min(chosen.min(rejected));
            max = max.max(chosen.max(rejected));
        }
        let mut metrics: Vec<Metric> =
            vec![("accuracy".into(), won), ("margin".into(), margin), ("mean_reward".into(), mean)];
        if !stats.pairs.is_empty() {
            metrics.extend([("min_reward".into(), min), ("max_reward".into(), max)]);
        }
        Outcome { loss, grads, metrics, ..Outcome::default() }
    }
}
