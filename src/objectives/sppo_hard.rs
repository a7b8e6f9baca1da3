//! Wu et al., arXiv:2405.00675, Eq. 4.7: self-play preference optimization, with the probability of winning set to 1 for
//! the chosen and to 0 for the rejected completion.
//!
//! ```text
//! lw, ll = ln pi - ln pi_ref of the chosen and the rejected completion
//! loss   = (lw - 1/(2 beta))^2 + (ll + 1/(2 beta))^2                      mean over pairs
//! ```
//!
//! beta is 1/eta of the paper. Deviations: hard probabilities, where the paper asks a preference model.

use super::pairwise::{self, PairLoss};
use super::registry::{BETA, Entry};

pub(super) const ENTRY: Entry = Entry {
    name: "sppo_hard",
    aliases: &["sppo"],
    paper: "Wu et al., arXiv:2405.00675, Eq. 4.7, with hard probabilities",
    summary: "SPPO: regresses both log-ratios, the chosen one to 1/(2 beta), the rejected one to minus that",
    params: &[BETA],
    build: |params| {
        let target = 0.5 / params["beta"];
        pairwise::each("sppo_hard", params, move |pair| {
            let (above, below) = (pair.chosen - target, pair.rejected + target);
            PairLoss { value: above * above + below * below, by_chosen: 2.0 * above, by_rejected: 2.0 * below }
        })
    },
};
