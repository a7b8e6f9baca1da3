//! Linear layer, with the bias and the residual that follow it.
//!
//! ```text
//! y = x W^T + bias + residual
//! dx += dy W        dW += dy^T x        dbias += sum over rows of dy        (the residual's gradient is dy)
//! ```
//! Saved for the backward: `x`.

mod cpu;
mod cuda;
mod reference;

pub(super) use cpu::{FEW_ROWS, linear_then};

use crate::device::{Device, Dry, View, ViewMut};
use crate::error::Result;

pub struct Forward<'a, D: Device> {
    /// `[rows, inputs]`
    pub x: View<'a, D>,
    /// `[outputs, inputs]`
    pub weight: View<'a, D>,
    /// `[1, outputs]`
    pub bias: Option<View<'a, D>>,
    /// `[rows, outputs]`
    pub residual: Option<View<'a, D>>,
    /// `=` `[rows, outputs]`
    pub y: ViewMut<'a, D>,
}

pub struct Backward<'a, D: Device> {
    /// `[rows, outputs]`
    pub dy: View<'a, D>,
    /// `[rows, inputs]`
    pub x: View<'a, D>,
    /// `[outputs, inputs]`
    pub weight: View<'a, D>,
    /// `+=` `[rows, inputs]`: q, k and v add into one gradient
    pub dx: Option<ViewMut<'a, D>>,
    /// `+=` `[outputs, inputs]`
    pub dweight: Option<ViewMut<'a, D>>,
    /// `+=` `[1, outputs]`
    pub dbias: Option<ViewMut<'a, D>>,
}

pub trait Linear: Device {
    fn linear(&self, a: Forward<Self>) -> Result<()>;
    fn linear_backward(&self, a: Backward<Self>) -> Result<()>;
}

struct Dims {
    rows: usize,
    inputs: usize,
    outputs: usize,
}

impl<D: Device> Forward<'_, D> {
    fn check(&self) -> Result<Dims> {
        let ([rows, inputs], outputs) = (self.x.shape(), self.weight.rows());
        super::require("linear", "weight", self.weight.shape(), [outputs, inputs])?;
        super::require("linear", "y", self.y.shape(), [rows, outputs])?;
        if let Some(bias) = &self.bias {
            super::require("linear", "bias", bias.shape(), [1, outputs])?;
        }
        if let Some(residual) = &self.residual {
            super::require("linear", "residual", residual.shape(), [rows, outputs])?;
        }
        Ok(Dims { rows, inputs, outputs })
    }
}

impl<D: Device> Backward<'_, D> {
    fn check(&self) -> Result<Dims> {
        let ([rows, inputs], outputs) = (self.x.shape(), self.dy.cols());
        super::require("linear_backward", "dy", self.dy.shape(), [rows, outputs])?;
        super::require("linear_backward", "weight", self.weight.shape(), [outputs, inputs])?;
        if let Some(dx) = &self.dx {
            super::require("linear_backward", "dx", dx.shape(), [rows, inputs])?;
        }
        if let Some(dweight) = &self.dweight {
            super::require("linear_backward", "dweight", dweight.shape(), [outputs, inputs])?;
        }
        if let Some(dbias) = &self.dbias {
            super::require("linear_backward", "dbias", dbias.shape(), [1, outputs])?;
        }
        Ok(Dims { rows, inputs, outputs })
    }
}

impl Linear for Dry {
    fn linear(&self, a: Forward<Self>) -> Result<()> {
        let d = a.check()?;
        self.count(2 * d.rows * d.inputs * d.outputs);
        Ok(())
    }

    fn linear_backward(&self, a: Backward<Self>) -> Result<()> {
        let d = a.check()?;
        let products = usize::from(a.dx.is_some()) + usize::from(a.dweight.is_some());
        self.count(2 * d.rows * d.inputs * d.outputs * products);
        Ok(())
    }
}
