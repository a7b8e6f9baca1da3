//! Gaussian error linear unit (Hendrycks and Gimpel, arXiv:1606.08415), exact and as approximated with tanh.
//!
//! ```text
//! y = x P(x)          dx = dy * (P(x) + x P'(x))
//! exact   P(x) = (1 + erf(x / sqrt 2)) / 2              P'(x) = e^(-x^2 / 2) / sqrt(2 pi)
//! tanh    P(x) = (1 + tanh u) / 2 = sigmoid(2 u)        P'(x) = 2 u' P (1 - P)
//!         u = sqrt(2 / pi) (x + 0.044715 x^3)           u' = sqrt(2 / pi) (1 + 3 * 0.044715 x^2)
//! ```
//! Saved for the backward: `x`.

mod cpu;
mod cuda;
pub(super) mod reference;

use crate::device::{Device, Dry, View, ViewMut};
use crate::error::Result;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Curve {
    Exact,
    Tanh,
}

const SQRT_2_OVER_PI: f64 = 0.797_884_560_802_865_4;
const CUBIC: f64 = 0.044_715;

/// Views `[rows, mlp_dim]`.
pub struct Forward<'a, D: Device> {
    pub curve: Curve,
    pub x: View<'a, D>,
    /// `=`
    pub y: ViewMut<'a, D>,
}

/// Views `[rows, mlp_dim]`.
pub struct Backward<'a, D: Device> {
    pub curve: Curve,
    pub dy: View<'a, D>,
    pub x: View<'a, D>,
    /// `=`
    pub dx: ViewMut<'a, D>,
}

pub trait Gelu: Device {
    fn gelu(&self, a: Forward<Self>) -> Result<()>;
    fn gelu_backward(&self, a: Backward<Self>) -> Result<()>;
}

impl<D: Device> Forward<'_, D> {
    fn check(&self) -> Result<()> {
        super::require("gelu", "y", self.y.shape(), self.x.shape())
    }
}

impl<D: Device> Backward<'_, D> {
    fn check(&self) -> Result<()> {
        super::require("gelu_backward", "dy", self.dy.shape(), self.x.shape())?;
        super::require("gelu_backward", "dx", self.dx.shape(), self.x.shape())
    }
}

impl Gelu for Dry {
    fn gelu(&self, a: Forward<Self>) -> Result<()> {
        a.check()
    }

    fn gelu_backward(&self, a: Backward<Self>) -> Result<()> {
        a.check()
    }
}
