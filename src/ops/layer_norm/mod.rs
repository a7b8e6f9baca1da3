//! Layer normalization (Ba, Kiros and Hinton, arXiv:1607.06450).
//!
//! ```text
//! mean = mean(x)     rstd = 1 / sqrt(mean((x - mean)^2) + eps)     n = (x - mean) * rstd     y = n * w + b
//! dx += rstd * (dy * w - mean(dy * w) - n * mean(dy * w * n))
//! dw += sum over rows of dy * n        db += sum over rows of dy
//! ```
//! Saved for the backward: `x`, `stats`.

mod cpu;
mod cuda;
mod reference;

use crate::device::{Device, Dry, View, ViewMut};
use crate::error::Result;

/// Numbers that are kept of each row: mean and rstd.
pub const STATS: usize = 2;

pub struct Forward<'a, D: Device> {
    /// `[rows, hidden]`
    pub x: View<'a, D>,
    /// `[1, hidden]`
    pub weight: View<'a, D>,
    /// `[1, hidden]`
    pub bias: View<'a, D>,
    pub eps: f32,
    /// `=` `[rows, hidden]`
    pub y: ViewMut<'a, D>,
    /// `=` `[rows, 2]`: mean, rstd
    pub stats: ViewMut<'a, D>,
}

pub struct Backward<'a, D: Device> {
    /// `[rows, hidden]`
    pub dy: View<'a, D>,
    /// `[rows, hidden]`
    pub x: View<'a, D>,
    /// `[1, hidden]`
    pub weight: View<'a, D>,
    /// `[rows, 2]`
    pub stats: View<'a, D>,
    /// `+=` `[rows, hidden]`: x also feeds the residual stream
    pub dx: ViewMut<'a, D>,
    /// `+=` `[1, hidden]`
    pub dweight: Option<ViewMut<'a, D>>,
    /// `+=` `[1, hidden]`
    pub dbias: Option<ViewMut<'a, D>>,
}

pub trait LayerNorm: Device {
    fn layer_norm(&self, a: Forward<Self>) -> Result<()>;
    fn layer_norm_backward(&self, a: Backward<Self>) -> Result<()>;
}

impl<D: Device> Forward<'_, D> {
    fn check(&self) -> Result<()> {
        let [rows, hidden] = self.x.shape();
        super::require("layer_norm", "weight", self.weight.shape(), [1, hidden])?;
        super::require("layer_norm", "bias", self.bias.shape(), [1, hidden])?;
        super::require("layer_norm", "y", self.y.shape(), [rows, hidden])?;
        super::require("layer_norm", "stats", self.stats.shape(), [rows, STATS])
    }
}

impl<D: Device> Backward<'_, D> {
    fn check(&self) -> Result<()> {
        const OP: &str = "layer_norm_backward";
        let [rows, hidden] = self.x.shape();
        super::require(OP, "dy", self.dy.shape(), [rows, hidden])?;
        super::require(OP, "weight", self.weight.shape(), [1, hidden])?;
        super::require(OP, "stats", self.stats.shape(), [rows, STATS])?;
        super::require(OP, "dx", self.dx.shape(), [rows, hidden])?;
        for (what, gradient) in [("dweight", &self.dweight), ("dbias", &self.dbias)] {
            if let Some(gradient) = gradient {
                super::require(OP, what, gradient.shape(), [1, hidden])?;
            }
        }
        Ok(())
    }
}

impl LayerNorm for Dry {
    fn layer_norm(&self, a: Forward<Self>) -> Result<()> {
        a.check()
    }

    fn layer_norm_backward(&self, a: Backward<Self>) -> Result<()> {
        a.check()
    }
}
