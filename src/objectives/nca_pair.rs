//! Chen et al., arXiv:2402.05369: noise contrastive alignment of pairs.
//!
//! ```text
//! rw, rl = beta (ln pi - ln pi_ref) of the chosen and the rejected completion
//! loss   = -ln sigma(rw) - ln sigma(-rw) / 2 - ln sigma(-rl) / 2          mean over pairs
//! ```
//!
//! It looks at rewards, not at their margin, so that the chosen completion cannot lose likelihood while the margin grows.
//! Deviations: none.

use super::pairwise::{self, PairLoss, log_sigmoid, sigmoid};
use super::registry::{BETA, Entry};

pub(super) const ENTRY: Entry = Entry {
    name: "nca_pair",
    aliases: &["nca"],
    paper: "Chen et al., arXiv:2402.05369",
    summary: "NCA: raises the chosen completion itself, not only the margin",
    params: &[BETA],
    build: |params| {
        let beta = params["beta"];
        pairwise::each("nca_pair", params, move |pair| {
            let (rw, rl) = (beta * pair.chosen, beta * pair.rejected);
            PairLoss {
                value: -log_sigmoid(rw) - 0.5 * log_sigmoid(-rw) - 0.5 * log_sigmoid(-rl),
                by_chosen: beta * (0.5 * sigmoid(rw) - sigmoid(-rw)),
                by_rejected: 0.5 * beta * sigmoid(rl),
            }
        })
    },
};
