//! Supervised fine-tuning by maximum likelihood (no paper), normalised as in TRL's SFTTrainer.
//!
//! ```text
//! loss = -sum of ln pi(token) / number of tokens
//! ```
//!
//! over all completion tokens of the whole optimizer batch: a mean over tokens, not a mean of means, so that a
//! token counts the same in any micro-batch. On pairs the chosen completions alone count, as in TRL's DPO with
//! loss_type sft; as pairs are not needed, who feeds it may leave the rejected ones out altogether.

use super::registry::Entry;
use super::{Grads, Needs, Objective, Outcome, Scope, Stats, Totals};

pub(super) const ENTRY: Entry = Entry {
    name: "sft",
    aliases: &[],
    paper: "maximum likelihood; mean over the tokens of the optimizer batch as in TRL",
    summary: "supervised fine-tuning on completions; on pairs, on the chosen ones",
    params: &[],
    build: |_| Ok(Box::new(Sft)),
};

struct Sft;

impl Objective for Sft {
    fn name(&self) -> &str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        Needs::POLICY
    }

    fn scope(&self) -> Scope {
        Scope::Pair
    }

    fn evaluate(&self, stats: &Stats, totals: &Totals) -> Outcome {
        let mut grads = Grads { logps: vec![0.0; stats.logps.len()], ..Grads::default() };
        let mut loss = 0.0;
        for s in stats.supervised() {
            loss -= stats.logps[s] / totals.tokens;
            grads.logps[s] -= 1.0 / totals.tokens;
        }
        Outcome { loss, grads, ..Outcome::default() }
    }
}
