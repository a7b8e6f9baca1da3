//! Gated activation (Shazeer, arXiv:2002.05202): `y = silu(gate) * up`, `silu(g) = g * sigmoid(g)`.
//!
//! ```text
//! dgate = dy * up * (s + g s (1 - s)), s = sigmoid(g)          dup = dy * silu(g)
//! ```
//! Saved for the backward: `gate`, `up`.

mod cpu;
mod cuda;
mod reference;

use crate::device::{Device, Dry, View, ViewMut};
use crate::error::Result;

/// All views `[rows, mlp_dim]`.
pub struct Forward<'a, D: Device> {
    pub gate: View<'a, D>,
    pub up: View<'a, D>,
    /// `=`
    pub y: ViewMut<'a, D>,
}

/// All views `[rows, mlp_dim]`.
pub struct Backward<'a, D: Device> {
    pub dy: View<'a, D>,
    pub gate: View<'a, D>,
    pub up: View<'a, D>,
    /// `=`
    pub dgate: ViewMut<'a, D>,
    /// `=`
    pub dup: ViewMut<'a, D>,
}

pub trait SwiGlu: Device {
    fn swiglu(&self, a: Forward<Self>) -> Result<()>;
    fn swiglu_backward(&self, a: Backward<Self>) -> Result<()>;
}

impl<D: Device> Forward<'_, D> {
    fn check(&self) -> Result<()> {
        super::require("swiglu", "up", self.up.shape(), self.gate.shape())?;
        super::require("swiglu", "y", self.y.shape(), self.gate.shape())
    }
}

impl<D: Device> Backward<'_, D> {
    fn check(&self) -> Result<()> {
        let shape = self.gate.shape();
        super::require("swiglu_backward", "dy", self.dy.shape(), shape)?;
        super::require("swiglu_backward", "up", self.up.shape(), shape)?;
        super::require("swiglu_backward", "dgate", self.dgate.shape(), shape)?;
        super::require("swiglu_backward", "dup", self.dup.shape(), shape)
    }
}

impl SwiGlu for Dry {
    fn swiglu(&self, a: Forward<Self>) -> Result<()> {
        a.check()
    }

    fn swiglu_backward(&self, a: Backward<Self>) -> Result<()> {
        a.check()
    }
}
