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

use super::pairwise::{self, Pair, PairLoss};
use super::registry::{BETA, Entry};
use super::{Needs, Objective, Outcome, Scope, Stats, Totals};

pub(super) const MEAN: Entry = Entry {
    name: "ipo",
    aliases: &[],
    paper: "Azar et al., arXiv:2310.12036, Eq. 17, with log-ratios averaged over tokens as in TRL",
    summary: "IPO as in TRL: regresses the margin of mean log-ratios to 1/(2 beta)",
    params: &[BETA],
    build: |params| Ok(Box::new(Ipo { beta: params["beta"], variant: Variant::Mean })),
};

pub(super) const SUM: Entry = Entry {
    name: "ipo_sum",
    aliases: &[],
    paper: "Azar et al., arXiv:2310.12036, Eq. 17",
    summary: "IPO as published: regresses the margin of summed log-ratios to 1/(2 beta)",
    params: &[BETA],
    build: |params| Ok(Box::new(Ipo { beta: params["beta"], variant: Variant::Sum })),
};

pub(super) const MARGIN1: Entry = Entry {
    name: "ipo_margin1",
    aliases: &[],
    paper: "Azar et al., arXiv:2310.12036, scaled as in Rafailov et al., arXiv:2406.02900",
    summary: "IPO of the over-optimisation scaling laws: regresses beta * margin to 1",
    params: &[BETA],
    build: |params| Ok(Box::new(Ipo { beta: params["beta"], variant: Variant::Margin1 })),
};

struct Ipo {
    /// 1/nat, > 0 (1/(nat per token) in `ipo`).
    beta: f64,
    variant: Variant,
}

enum Variant {
    Mean,
    Sum,
    Margin1,
}

impl Ipo {
    fn loss(&self, pair: &Pair) -> PairLoss {
        // The residual and its derivatives by the two log-ratios.
        let target = 0.5 / self.beta;
        let (residual, by_chosen, by_rejected) = match self.variant {
            Variant::Mean => {
                let (chosen, rejected) = (1.0 / pair.chosen_len, 1.0 / pair.rejected_len);
                (pair.chosen * chosen - pair.rejected * rejected - target, chosen, -rejected)
            }
            Variant::Sum => (pair.margin() - target, 1.0, -1.0),
            Variant::Margin1 => (self.beta * pair.margin() - 1.0, self.beta, -self.beta),
        };
        PairLoss {
            value: residual * residual,
            by_chosen: 2.0 * residual * by_chosen,
            by_rejected: 2.0 * residual * by_rejected,
        }
    }
}

impl Objective for Ipo {
    fn name(&self) -> &'static str {
        match self.variant {
            Variant::Mean => MEAN.name,
            Variant::Sum => SUM.name,
            Variant::Margin1 => MARGIN1.name,
        }
    }

    fn needs(&self) -> Needs {
        pairwise::NEEDS
    }

    fn scope(&self) -> Scope {
        Scope::Pair
    }

    fn evaluate(&self, stats: &Stats, totals: &Totals) -> Outcome {
        pairwise::mean(stats, totals, self.beta, |pair| self.loss(pair))
    }
}
