//! Azar et al., arXiv:2310.12036, Eq. 17: identity preference optimization. Three losses carry this name:
//!
//! ```text
//! lw, ll       ln pi - ln pi_ref of the chosen and the rejected completion, summed over n_w, n_l tokens
//! ipo          (lw/n_w - ll/n_l - 1/(2 beta))^2    TRL's DPO: log-ratios averaged over tokens
//! ipo_sum      (lw - ll - 1/(2 beta))^2            the paper's Eq. 17, where beta is called tau
//! ipo_margin1  (beta (lw - ll) - 1)^2              Rafailov et al., arXiv:2406.02900
//! ```
//!
//! each a mean over pairs. Deviations from Eq. 17: `ipo` divides by lengths; `ipo_margin1` at beta is
//! beta^2 times `ipo_sum` at beta / 2.

use super::f_divergence::{F_ALPHA, F_DIVERGENCE};
use super::pairwise::{self, PairLoss};
use super::registry::{BETA, Entry};

pub(super) const MEAN: Entry = Entry {
    name: "ipo",
    aliases: &[],
    paper: "Azar et al., arXiv:2310.12036, Eq. 17, with log-ratios averaged over tokens as in TRL",
    summary: "IPO as in TRL: regresses the margin of mean log-ratios to 1/(2 beta)",
    params: &[BETA, F_DIVERGENCE, F_ALPHA],
    build: |params| {
        let target = 0.5 / params["beta"];
        pairwise::each("ipo", params, move |pair| {
            let residual = pair.chosen / pair.chosen_len - pair.rejected / pair.rejected_len - target;
            PairLoss {
                value: residual * residual,
                by_chosen: 2.0 * residual / pair.chosen_len,
                by_rejected: -2.0 * residual / pair.rejected_len,
            }
        })
    },
};

pub(super) const SUM: Entry = Entry {
    name: "ipo_sum",
    aliases: &[],
    paper: "Azar et al., arXiv:2310.12036, Eq. 17",
    summary: "IPO as published: regresses the margin of summed log-ratios to 1/(2 beta)",
    params: &[BETA],
    build: |params| {
        let target = 0.5 / params["beta"];
        pairwise::each("ipo_sum", params, move |pair| squared(pair.margin() - target, 1.0))
    },
};

pub(super) const MARGIN1: Entry = Entry {
    name: "ipo_margin1",
    aliases: &[],
    paper: "Azar et al., arXiv:2310.12036, scaled as in Rafailov et al., arXiv:2406.02900",
    summary: "IPO of the over-optimisation scaling laws: regresses beta * margin to 1",
    params: &[BETA],
    build: |params| {
        let beta = params["beta"];
        pairwise::each("ipo_margin1", params, move |pair| squared(beta * pair.margin() - 1.0, beta))
    },
};

/// The square of a residual that grows with the margin at `rate`.
pub(super) fn squared(residual: f64, rate: f64) -> PairLoss {
    PairLoss::of_margin(residual * residual, 2.0 * residual * rate)
}
