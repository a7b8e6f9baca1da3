//! What differs between architectures, as data. One `Block` reads it.

use crate::ops::gelu::Curve;
use crate::ops::layer_norm;

/// How activations are normalized.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Norm {
    Rms {
        eps: f64,
    },
    /// With a bias.
    Layer {
        eps: f64,
    },
}

impl Norm {
    /// Numbers that the forward keeps of each row.
    pub fn stats(self) -> usize {
        match self {
            Self::Rms { .. } => 1,
            Self::Layer { .. } => layer_norm::STATS,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mlp {
    /// `Down(silu(Gate n) * Up n)`
    SwiGlu,
    /// `Down(gelu(Up n))`
    Gelu(Curve),
}

impl Mlp {
    pub fn gated(self) -> bool {
        self == Self::SwiGlu
    }
}

/// What reads the final norm's output.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Head {
    /// The embedding, once more: logits of the next token.
    Tied,
    /// `[vocab, hidden]`: the same from weights of its own.
    Own,
    /// `[1, hidden]`: one number for a sequence, its reward. There are no logits.
    Score,
}

impl Head {
    pub fn language(tied: bool) -> Self {
        if tied { Self::Tied } else { Self::Own }
    }
}

/// How a token knows where it stands.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Positions {
    Rope(Rope),
    /// A row for each position is added to the embedding.
    Learned {
        most: usize,
    },
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Rope {
    pub theta: f64,
    /// Elements of a head that are rotated; even.
    pub rotary_dim: usize,
    pub scaling: RopeScaling,
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub enum RopeScaling {
    None,
    /// Slow frequencies are divided by `factor`, fast ones stay, those between are blended (Llama 3.1).
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_positions: f64,
    },
}

/// A decoder, completely.
#[derive(Clone, PartialEq, Debug)]
pub struct Spec {
    pub layers: usize,
    pub hidden: usize,
    pub vocab: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub mlp_dim: usize,
    pub norm: Norm,
    pub positions: Positions,
    pub mlp: Mlp,
    /// The MLP reads the block's input, beside attention and not behind it (GPT-NeoX).
    pub parallel_residual: bool,
    pub qkv_bias: bool,
    pub out_bias: bool,
    pub mlp_bias: bool,
    /// Queries and keys are normalized per head, before the rotation (Qwen 3).
    pub qk_norm: bool,
    /// Per layer: keys that a query sees at most, itself included.
    pub windows: Vec<Option<usize>>,
    pub head: Head,
    /// Standard deviation of `--init random`.
    pub initializer_range: f64,
    /// The same of the matrices that write to the residual stream.
    pub residual_initializer_range: f64,
}

impl Spec {
    /// Tokens that a sequence may have at most, prompt and completion together; `None` where rotations go on.
    pub fn most_positions(&self) -> Option<usize> {
        match self.positions {
            Positions::Rope(_) => None,
            Positions::Learned { most } => Some(most),
        }
    }
}

impl Rope {
    /// Radians per position of each rotated pair, `[rotary_dim / 2]`.
    pub fn frequencies(&self) -> Vec<f64> {
        let pair = |i: usize| self.theta.powf(-(2.0 * i as f64) / self.rotary_dim as f64);
        (0..self.rotary_dim / 2).map(|i| self.scaling.apply(pair(i))).collect()
    }
}

impl RopeScaling {
    fn apply(&self, frequency: f64) -> f64 {
        let Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions } = *self else {
            return frequency;
        };
        let turns = original_positions * frequency / std::f64::consts::TAU;
        if turns < low_freq_factor {
            frequency / factor
        } else if turns > high_freq_factor {
            frequency
        } else {
            let smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
            (1.0 - smooth) * frequency / factor + smooth * frequency
        }
    }
}
