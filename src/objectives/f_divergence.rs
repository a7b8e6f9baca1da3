//! Wang et al., arXiv:2309.16240 (f-DPO): the divergence that holds the policy to its reference. A log-ratio
//! `l = ln pi - ln pi_ref` becomes a score `f'(e^l)`, which takes the place of l in the losses that can use it:
//!
//! ```text
//! reverse_kl         l                               DPO
//! forward_kl         1 - e^-l                        alpha_divergence at a = 0
//! js_divergence      ln 2 + ln sigma(l)
//! alpha_divergence   (e^((a - 1) l) - 1) / (a - 1)   within 1e-6 of a = 1: reverse_kl
//! ```
//!
//! with the additive constants of f', as in TRL 1.16: they cancel in a margin, but not where scores are divided by lengths
//! (`ipo`, `sigmoid_norm`). As in TRL the exponent is clamped at 80, and the gradient beyond is 0. Deviations: TRL
//! computes alpha_divergence in f32, this is f64; TRL does not clamp forward_kl, which overflows.

use std::f64::consts::LN_2;

use super::pairwise::{log_sigmoid, sigmoid};
use crate::params::{Domain, FINITE, ParamSpec, Params};

const ALPHA_DIVERGENCE: &str = "alpha_divergence";

pub(super) const F_DIVERGENCE: ParamSpec = ParamSpec {
    name: "f_divergence_type",
    domain: Domain::Choice {
        values: &["reverse_kl", "forward_kl", "js_divergence", ALPHA_DIVERGENCE],
        default: "reverse_kl",
    },
    only_with: None,
    help: "divergence that holds the policy to its reference",
};

pub(super) const F_ALPHA: ParamSpec = ParamSpec {
    name: "f_alpha_divergence_coef",
    domain: Domain::Number { default: None, range: FINITE, example: 0.5 },
    only_with: Some((F_DIVERGENCE.name, ALPHA_DIVERGENCE)),
    help: "alpha of the alpha-divergence; at 0 it is forward_kl, at 1 reverse_kl",
};

/// Above it e^x is more than any use, and its square and cube still fit f64.
const MAX_EXPONENT: f64 = 80.0;

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Score {
    ReverseKl,
    JensenShannon,
    Alpha(f64),
}

impl Score {
    /// That of an entry which takes [`F_DIVERGENCE`]; of others, the reverse KL that DPO is built on.
    pub fn of(params: &Params) -> Self {
        match params.choice(F_DIVERGENCE.name) {
            Some("forward_kl") => Self::Alpha(0.0),
            Some("js_divergence") => Self::JensenShannon,
            Some(ALPHA_DIVERGENCE) if (params[F_ALPHA.name] - 1.0).abs() >= 1e-6 => Self::Alpha(params[F_ALPHA.name]),
            _ => Self::ReverseKl,
        }
    }

    /// The score of a log-ratio, and its derivative.
    pub fn at(self, log_ratio: f64) -> (f64, f64) {
        match self {
            Self::ReverseKl => (log_ratio, 1.0),
            Self::JensenShannon => (LN_2 + log_sigmoid(log_ratio), sigmoid(-log_ratio)),
            Self::Alpha(alpha) => {
                let exponent = (alpha - 1.0) * log_ratio;
                let clamped = exponent.min(MAX_EXPONENT);
                let slope = if exponent > MAX_EXPONENT { 0.0 } else { clamped.exp() };
                (clamped.exp_m1() / (alpha - 1.0), slope)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_are_zero_where_policy_and_reference_agree_and_grow_from_there_alike() {
        for score in [Score::ReverseKl, Score::JensenShannon, Score::Alpha(0.0), Score::Alpha(2.0), Score::Alpha(-0.5)]
        {
            let (value, slope) = score.at(0.0);
            let expected = if score == Score::JensenShannon { 0.5 } else { 1.0 };
            assert!(value.abs() < 1e-16 && slope == expected, "{score:?}");
        }
    }

    #[test]
    fn nothing_overflows() {
        for score in [Score::JensenShannon, Score::Alpha(0.0), Score::Alpha(2.0), Score::Alpha(-3.0)] {
            for log_ratio in [-1e6, -81.0, 81.0, 1e6] {
                let (value, slope) = score.at(log_ratio);
                assert!(value.is_finite() && slope.is_finite(), "{score:?} at {log_ratio}");
            }
        }
        assert_eq!(Score::Alpha(0.0).at(-81.0), (-80f64.exp_m1(), 0.0));
    }
}
