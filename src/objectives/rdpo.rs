//! Park et al., arXiv:2403.19159: DPO with a penalty on length (R-DPO).
//!
//! ```text
//! loss = -ln sigma(beta margin + alpha (n_w - n_l))                       mean over pairs
//! ```
//!
//! with n_w, n_l the tokens of the chosen and the rejected completion. A pair whose chosen completion is the longer one
//! counts as half learnt before it is trained on. Deviations: none.

use super::pairwise::{self, PairLoss, log_sigmoid, sigmoid};
use super::registry::{BETA, Entry};
use crate::params::{Domain, POSITIVE, ParamSpec};

pub(super) const ENTRY: Entry = Entry {
    name: "rdpo",
    aliases: &[],
    paper: "Park et al., arXiv:2403.19159",
    summary: "DPO that does not learn length: pairs count less for it where the chosen completion is longer",
    params: &[BETA, ALPHA],
    build: |params| {
        let (beta, alpha) = (params["beta"], params["rdpo_alpha"]);
        pairwise::each("rdpo", params, move |pair| {
            let z = beta * pair.margin() + alpha * (pair.chosen_len - pair.rejected_len);
            PairLoss::of_margin(-log_sigmoid(z), -beta * sigmoid(-z))
        })
    },
};

const ALPHA: ParamSpec = ParamSpec {
    name: "rdpo_alpha",
    domain: Domain::Number { default: None, range: POSITIVE, example: 0.01 },
    only_with: None,
    help: "what a token of difference in length counts, 1/token",
};
