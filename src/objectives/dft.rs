//! Wu et al., arXiv:2508.05629, Eq. 9: dynamic fine-tuning, DFT.
//!
//! ```text
//! loss = -sum of stop(pi(token)) ln pi(token) / number of tokens
//! ```
//!
//! Maximum likelihood as a policy gradient pays 1 / pi(token) for the data's token; this takes that factor away, so that tokens that
//! the model thinks unlikely move it little. Normalised as `sft`; deviations: none.

use super::registry::Entry;
use super::{Grads, Needs, Objective, Outcome, Scope, Stats, Totals};

pub(super) const ENTRY: Entry = Entry {
    name: "dft",
    aliases: &[],
    paper: "Wu et al., arXiv:2508.05629, Eq. 9",
    summary: "DFT: supervised fine-tuning in which each token counts as much as it is likely",
    params: &[],
    build: |_| Ok(Box::new(Dft)),
};

struct Dft;

impl Objective for Dft {
    fn name(&self) -> &str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        Needs { token_logps: true, ..Needs::POLICY }
    }

    fn scope(&self) -> Scope {
        Scope::Pair
    }

    fn evaluate(&self, stats: &Stats, totals: &Totals) -> Outcome {
        let mut token_logps = vec![0.0; stats.token_logps.len()];
        let mut loss = 0.0;
        for t in stats.supervised().flat_map(|s| stats.offsets[s]..stats.offsets[s + 1]) {
            let (logp, weight) = (stats.token_logps[t], stats.token_logps[t].exp() / totals.tokens);
            loss -= weight * logp;
            token_logps[t] -= weight;
        }
        Outcome { loss, grads: Grads { token_logps, ..Grads::default() }, ..Outcome::default() }
    }
}
