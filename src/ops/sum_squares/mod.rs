//! Sum of squares of a tensor, for the gradient norm: `sum = sum of x^2`, in fixed blocks whatever the threads.
//! Not finite if and only if the tensor holds a NaN or an infinity, or overflows f32 (norm above 1.8e19).

mod cpu;
mod cuda;
mod reference;

use crate::device::{Device, Dry, View, ViewMut};
use crate::error::Result;

pub struct Args<'a, D: Device> {
    pub x: View<'a, D>,
    /// `=` `[1, 1]`
    pub sum: ViewMut<'a, D>,
}

pub trait SumSquares: Device {
    fn sum_squares(&self, a: Args<Self>) -> Result<()>;
}

impl<D: Device> Args<'_, D> {
    fn check(&self) -> Result<()> {
        super::require("sum_squares", "sum", self.sum.shape(), [1, 1])
    }
}

impl SumSquares for Dry {
    fn sum_squares(&self, a: Args<Self>) -> Result<()> {
        a.check()
    }
}
