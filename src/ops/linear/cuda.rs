use super::{Backward, Forward, Linear};
use crate::device::Cuda;
use crate::error::{Error, Result};

impl Linear for Cuda {
    fn linear(&self, _: Forward<Self>) -> Result<()> {
        Err(Error::op("linear", "not on CUDA yet"))
    }

    fn linear_backward(&self, _: Backward<Self>) -> Result<()> {
        Err(Error::op("linear_backward", "not on CUDA yet"))
    }
}
