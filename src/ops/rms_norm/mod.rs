//! RMS normalization (Zhang and Sennrich, arXiv:1910.07467).
//!
//! ```text
//! rstd = 1 / sqrt(mean(x^2) + eps)          y = x * rstd * w
//! dx += rstd * (dy * w - x * rstd^2 * mean(dy * w * x))        dw += sum over rows of dy * x * rstd
//! ```
//! Saved for the backward: `x`, `rstd`.

mod cpu;
mod cuda;
mod reference;

use crate::device::{Device, Dry, View, ViewMut};
use crate::error::Result;

pub struct Forward<'a, D: Device> {
    /// `[rows, hidden]`
    pub x: View<'a, D>,
    /// `[1, hidden]`
    pub weight: View<'a, D>,
    pub eps: f32,
    /// `=` `[rows, hidden]`
    pub y: ViewMut<'a, D>,
    /// `=` `[rows, 1]`
    pub rstd: ViewMut<'a, D>,
}

pub struct Backward<'a, D: Device> {
    /// `[rows, hidden]`
    pub dy: View<'a, D>,
    /// `[rows, hidden]`
    pub x: View<'a, D>,
    /// `[1, hidden]`
    pub weight: View<'a, D>,
    /// `[rows, 1]`
    pub rstd: View<'a, D>,
    /// `+=` `[rows, hidden]`: x also feeds the residual stream
    pub dx: ViewMut<'a, D>,
    /// `+=` `[1, hidden]`
    pub dweight: Option<ViewMut<'a, D>>,
}

pub trait RmsNorm: Device {
    fn rms_norm(&self, a: Forward<Self>) -> Result<()>;
    fn rms_norm_backward(&self, a: Backward<Self>) -> Result<()>;
}

impl<D: Device> Forward<'_, D> {
    fn check(&self) -> Result<()> {
        let [rows, hidden] = self.x.shape();
        super::require("rms_norm", "weight", self.weight.shape(), [1, hidden])?;
        super::require("rms_norm", "y", self.y.shape(), [rows, hidden])?;
        super::require("rms_norm", "rstd", self.rstd.shape(), [rows, 1])
    }
}

impl<D: Device> Backward<'_, D> {
    fn check(&self) -> Result<()> {
        let [rows, hidden] = self.x.shape();
        super::require("rms_norm_backward", "dy", self.dy.shape(), [rows, hidden])?;
        super::require("rms_norm_backward", "weight", self.weight.shape(), [1, hidden])?;
        super::require("rms_norm_backward", "rstd", self.rstd.shape(), [rows, 1])?;
        super::require("rms_norm_backward", "dx", self.dx.shape(), [rows, hidden])?;
        match &self.dweight {
            Some(dweight) => super::require("rms_norm_backward", "dweight", dweight.shape(), [1, hidden]),
            None => Ok(()),
        }
    }
}

impl RmsNorm for Dry {
    fn rms_norm(&self, a: Forward<Self>) -> Result<()> {
        a.check()
    }

    fn rms_norm_backward(&self, a: Backward<Self>) -> Result<()> {
        a.check()
    }
}
