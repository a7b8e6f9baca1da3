//! A weight moves towards another: what a reference does that follows the policy (Gorbatovski et al., arXiv:2404.09656,
//! Eq. 5 and 6).
//!
//! ```text
//! y <- (1 - share) y + share x          share = 1 copies x
//! ```

mod cpu;
mod cuda;
mod reference;

use crate::device::{DType, Device, Dry, View, ViewMut};
use crate::error::{Error, Result};

/// All views of one shape.
pub struct Args<'a, D: Device> {
    /// In (0, 1].
    pub share: f64,
    /// F32
    pub x: View<'a, D>,
    /// in place; F32, or Bf16 with a `master`, whose rounding it becomes
    pub y: ViewMut<'a, D>,
    /// in place: `y` in F32, there if and only if `y` is Bf16
    pub master: Option<ViewMut<'a, D>>,
}

pub trait Lerp: Device {
    fn lerp(&self, a: Args<Self>) -> Result<()>;
}

impl<D: Device> Args<'_, D> {
    fn check(&self) -> Result<()> {
        super::require("lerp", "x", self.x.shape(), self.y.shape())?;
        if self.master.is_some() != (self.y.dtype() == DType::Bf16) {
            let found = if self.master.is_some() { "a master beside" } else { "no master beside" };
            return Err(Error::op("lerp", format!("{found} a tensor of {:?}", self.y.dtype())));
        }
        match &self.master {
            Some(master) => super::require("lerp", "master", master.shape(), self.y.shape()),
            None => Ok(()),
        }
    }

    /// Shares of y and x.
    fn shares(&self) -> (f32, f32) {
        ((1.0 - self.share) as f32, self.share as f32)
    }
}

impl Lerp for Dry {
    fn lerp(&self, a: Args<Self>) -> Result<()> {
        a.check()
    }
}
