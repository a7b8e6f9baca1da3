//! D'Oosterlinck et al., arXiv:2408.06266, Eq. 7 and 8: anchored preference optimization.
//!
//! ```text
//! rw, rl   = beta (ln pi - ln pi_ref) of the chosen and the rejected completion
//! apo_zero = 1 - sigma(rw) + sigma(rl)          chosen completions are better than the policy's own: raise them
//! apo_down = sigma(rw) + 1 - sigma(rw - rl)     they are worse: lower them, and the rejected ones more
//! ```
//!
//! each a mean over pairs. Deviations: none. `apo_zero_unpaired` is `apo_zero` on completions that are labelled one by
//! one, as in TRL's KTO trainer: `1 - sigma(r)` of a desirable and `sigma(r)` of an undesirable one, each times the weight of
//! its kind; a mean over all completions.

use super::pairwise::{self, PairLoss, sigmoid, sigmoid_slope};
use super::registry::{BETA, Entry};
use super::unpaired::{self, DESIRABLE_WEIGHT, UNDESIRABLE_WEIGHT};

pub(super) const ZERO: Entry = Entry {
    name: "apo_zero",
    aliases: &[],
    paper: "D'Oosterlinck et al., arXiv:2408.06266, Eq. 7",
    summary: "APO-zero: for chosen completions that are better than what the policy would say",
    params: &[BETA],
    build: |params| {
        let beta = params["beta"];
        pairwise::each("apo_zero", params, move |pair| {
            let (rw, rl) = (beta * pair.chosen, beta * pair.rejected);
            PairLoss {
                value: sigmoid(-rw) + sigmoid(rl),
                by_chosen: -beta * sigmoid_slope(rw),
                by_rejected: beta * sigmoid_slope(rl),
            }
        })
    },
};

pub(super) const DOWN: Entry = Entry {
    name: "apo_down",
    aliases: &[],
    paper: "D'Oosterlinck et al., arXiv:2408.06266, Eq. 8",
    summary: "APO-down: for chosen completions that are worse than what the policy would say",
    params: &[BETA],
    build: |params| {
        let beta = params["beta"];
        pairwise::each("apo_down", params, move |pair| {
            let (rw, z) = (beta * pair.chosen, beta * pair.margin());
            PairLoss {
                value: sigmoid(rw) + sigmoid(-z),
                by_chosen: beta * (sigmoid_slope(rw) - sigmoid_slope(z)),
                by_rejected: beta * sigmoid_slope(z),
            }
        })
    },
};

pub(super) const ZERO_UNPAIRED: Entry = Entry {
    name: "apo_zero_unpaired",
    aliases: &[],
    paper: "D'Oosterlinck et al., arXiv:2408.06266, Eq. 7, unpaired as in TRL",
    summary: "APO-zero on completions that are labelled one by one",
    params: &[BETA, DESIRABLE_WEIGHT, UNDESIRABLE_WEIGHT],
    build: |params| {
        let beta = params["beta"];
        unpaired::each("apo_zero_unpaired", params, move |log_ratio, desirable| {
            let sign = if desirable { -1.0 } else { 1.0 };
            (sigmoid(sign * beta * log_ratio), sign * beta * sigmoid_slope(beta * log_ratio))
        })
    },
};
