use super::{Args, SumSquares};
use crate::device::Reference;
use crate::error::Result;

impl SumSquares for Reference {
    fn sum_squares(&self, a: Args<Self>) -> Result<()> {
        a.check()?;
        a.sum.into_f64s()[0] = a.x.f64s().iter().map(|x| x * x).sum();
        Ok(())
    }
}
