//! Over-optimisation in a second, without a language model: a tree in which one preference pair moves probability to answers that
//! nobody ever compared, and a bandit of many tokens whose KL and gold reward are exact.

pub mod bandit;
pub mod tree;

/// The losses of direct alignment as Rafailov et al. write them (arXiv:2406.02900): `g(z)` of
/// `z = beta (ln pi/ref (chosen) - ln pi/ref (rejected))`. IPO's margin is 1 behind the scaling by beta, which is beta^2 times the
/// squared difference from 1 / beta; SLiC is the hinge on z, without its SFT term.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Loss {
    Dpo,
    Ipo,
    Slic,
}

impl Loss {
    pub const ALL: [Self; 3] = [Self::Dpo, Self::Ipo, Self::Slic];

    pub fn name(self) -> &'static str {
        match self {
            Self::Dpo => "dpo",
            Self::Ipo => "ipo",
            Self::Slic => "slic",
        }
    }

    pub fn value(self, z: f64) -> f64 {
        match self {
            // -ln sigma(z), where neither exponential overflows.
            Self::Dpo => (-z).max(0.0) + (-z.abs()).exp().ln_1p(),
            Self::Ipo => (z - 1.0).powi(2),
            Self::Slic => (1.0 - z).max(0.0),
        }
    }

    pub fn slope(self, z: f64) -> f64 {
        match self {
            Self::Dpo => -0.5 * (1.0 - (0.5 * z).tanh()),
            Self::Ipo => 2.0 * (z - 1.0),
            Self::Slic => -f64::from(u8::from(z < 1.0)),
        }
    }
}

/// Natural logarithms of a softmax.
fn log_softmax(logits: &[f64]) -> Vec<f64> {
    let most = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum = most + logits.iter().map(|x| (x - most).exp()).sum::<f64>().ln();
    logits.iter().map(|x| x - sum).collect()
}
