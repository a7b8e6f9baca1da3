//! Lambert et al., arXiv:2411.15124 (Tulu 3): length-normalized DPO.
//!
//! ```text
//! lw, ll = ln pi - ln pi_ref of the chosen and the rejected completion, summed over n_w, n_l tokens
//! loss   = -ln sigma(beta (lw / n_w - ll / n_l))                          mean over pairs
//! ```
//!
//! Deviations: none. As log-ratios are means, beta is 1/(nat per token), and usual values are 2 to 10.

use super::f_divergence::{F_ALPHA, F_DIVERGENCE};
use super::pairwise::{self, PairLoss, log_sigmoid, sigmoid};
use super::registry::{BETA, Entry};

pub(super) const ENTRY: Entry = Entry {
    name: "sigmoid_norm",
    aliases: &["ln_dpo"],
    paper: "Lambert et al., arXiv:2411.15124",
    summary: "length-normalized DPO: log-ratios are means over tokens; usual betas are 2 to 10",
    params: &[BETA, F_DIVERGENCE, F_ALPHA],
    build: |params| {
        let beta = params["beta"];
        pairwise::each("sigmoid_norm", params, move |pair| {
            let z = beta * (pair.chosen / pair.chosen_len - pair.rejected / pair.rejected_len);
            let slope = -beta * sigmoid(-z);
            PairLoss {
                value: -log_sigmoid(z),
                by_chosen: slope / pair.chosen_len,
                by_rejected: -slope / pair.rejected_len,
            }
        })
    },
};
