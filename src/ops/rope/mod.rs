//! Rotary position embedding (Su et al., arXiv:2104.09864), the half-split convention of Hugging Face.
//!
//! ```text
//! for i < rotary/2, with angle a = position * frequency[i]:
//!   x[i]            <- x[i] cos a - x[i + rotary/2] sin a
//!   x[i + rotary/2] <- x[i + rotary/2] cos a + x[i] sin a
//! ```
//! The rest of a head (partial rotary) stays. The backward is the rotation by -a. Nothing is saved.

mod cpu;
mod cuda;
mod reference;

use crate::device::{Device, Dry, View, ViewMut};
use crate::error::Result;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    Forward,
    Backward,
}

pub struct Rotate<'a, D: Device> {
    /// in place `[rows, heads * head_dim]`
    pub x: ViewMut<'a, D>,
    /// `[rows, 1]`, each < the table's rows
    pub positions: View<'a, D>,
    /// `[positions, rotary / 2]`
    pub cos: View<'a, D>,
    /// `[positions, rotary / 2]`
    pub sin: View<'a, D>,
    pub head_dim: usize,
    pub direction: Direction,
}

pub trait Rope: Device {
    fn rope(&self, a: Rotate<Self>) -> Result<()>;
}

impl<D: Device> Rotate<'_, D> {
    fn check(&self) -> Result<()> {
        super::require("rope", "positions", self.positions.shape(), [self.x.rows(), 1])?;
        super::require("rope", "sin", self.sin.shape(), self.cos.shape())?;
        if self.head_dim == 0 || !self.x.cols().is_multiple_of(self.head_dim) || 2 * self.cos.cols() > self.head_dim {
            let detail = format!("x {:?}, head_dim {}, table {:?}", self.x.shape(), self.head_dim, self.cos.shape());
            return Err(crate::error::Error::op("rope", detail));
        }
        Ok(())
    }
}

impl Rope for Dry {
    fn rope(&self, a: Rotate<Self>) -> Result<()> {
        a.check()
    }
}
