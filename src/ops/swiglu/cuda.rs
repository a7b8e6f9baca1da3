use super::{Backward, Forward, SwiGlu};
use crate::device::Cuda;
use crate::error::{Error, Result};

impl SwiGlu for Cuda {
    fn swiglu(&self, _: Forward<Self>) -> Result<()> {
        Err(Error::op("swiglu", "not on CUDA yet"))
    }

    fn swiglu_backward(&self, _: Backward<Self>) -> Result<()> {
        Err(Error::op("swiglu_backward", "not on CUDA yet"))
    }
}
