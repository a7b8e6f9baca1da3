//! Zhao et al., arXiv:2507.20673, Eq. 4: geometric-mean policy optimization.
//!
//! ```text
//! u_t  = min(w_t, clip(w_t, -e, e_high)) where A > 0, max(...) where not; w_t = ln pi - ln pi_old of a token
//! loss = mean over completions of -e^(mean over tokens of u_t) A + beta mean over tokens of KL
//! ```
//!
//! The bounds are those of a logarithm, 0.4 in the paper. Deviation: w is cut to 80 nats, as in the family.

use super::advantages::{ByGroup, REWARD_AGGREGATION, SCALE_REWARDS};
use super::registry::Entry;
use super::surrogate::{Counts, EPSILON_HIGH, KL_BETA, KL_FORM, KlTerm, cut, epsilon};
use super::{Credit, Grads, Needs, Objective, Outcome, Scope, Stats, Totals};

pub(super) const ENTRY: Entry = Entry {
    name: "gmpo",
    aliases: &[],
    paper: "Zhao et al., arXiv:2507.20673, Eq. 4",
    summary: "GMPO: the geometric mean of a completion's ratios, each cut by itself",
    params: &[KL_BETA, epsilon(0.4), EPSILON_HIGH, SCALE_REWARDS, REWARD_AGGREGATION, KL_FORM],
    build: |params| {
        let low = params["epsilon"];
        let high = match params["epsilon_high"] {
            0.0 => low,
            high => high,
        };
        Ok(Box::new(Gmpo { low, high, kl: KlTerm::of(params)?, compare: ByGroup::of(params) }))
    },
};

struct Gmpo {
    low: f64,
    high: f64,
    kl: KlTerm,
    compare: ByGroup,
}

impl Objective for Gmpo {
    fn name(&self) -> &str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        let held = self.kl.beta > 0.0;
        Needs {
            refs: if held { 1..=1 } else { 0..=0 },
            ref_token_logps: held,
            groups: true,
            rewards: true,
            advantages: true,
            token_logps: true,
            old_token_logps: true,
            ..Needs::POLICY
        }
    }

    fn scope(&self) -> Scope {
        Scope::Pair
    }

    fn credit(&self, rollouts: &Stats) -> Credit {
        let Stats { rewards, reward_weights, groups, .. } = rollouts;
        Credit { advantages: self.compare.advantages(rewards, reward_weights, groups), ..Credit::default() }
    }

    fn evaluate(&self, stats: &Stats, totals: &Totals) -> Outcome {
        let (mut loss, mut token_logps) = (0.0, vec![0.0; stats.token_logps.len()]);
        let mut counts = Counts::default();
        for s in (0..stats.lens.len()).filter(|s| stats.offsets[*s] < stats.offsets[s + 1]) {
            let tokens = stats.offsets[s]..stats.offsets[s + 1];
            let (len, a) = (tokens.len() as f64, stats.advantages[s]);
            let mut slopes = Vec::with_capacity(tokens.len());
            let mut mean = 0.0;
            for t in tokens.clone() {
                let (w, inside) = cut(stats.token_logps[t] - stats.old_token_logps[t]);
                // Only the side that the advantage pushes to is cut.
                let (u, free) =
                    if a > 0.0 { (w.min(self.high), w <= self.high) } else { (w.max(-self.low), w >= -self.low) };
                counts.high += f64::from(u8::from(a > 0.0 && !free));
                counts.low += f64::from(u8::from(a < 0.0 && !free));
                mean += u / len;
                slopes.push(if free { inside } else { 0.0 });
            }
            let coefficient = mean.exp();
            loss -= coefficient * a / totals.sequences;
            for (t, slope) in tokens.zip(slopes) {
                token_logps[t] -= coefficient * a * slope / (len * totals.sequences);
                if self.kl.beta > 0.0 {
                    let (kl, by_logp) = self.kl.at(stats.token_logps[t], stats.ref_token_logps[0][t]);
                    let weight = self.kl.beta / (len * totals.sequences);
                    loss += weight * kl;
                    token_logps[t] += weight * by_logp;
                    counts.kl += kl;
                }
            }
        }
        let metrics = counts.metrics(totals, self.kl.beta > 0.0, true);
        Outcome { loss, grads: Grads { token_logps, ..Grads::default() }, metrics, ..Outcome::default() }
    }
}
