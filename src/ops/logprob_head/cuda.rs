use super::{Backward, Forward, LogprobHead};
use crate::device::Cuda;
use crate::error::{Error, Result};

impl LogprobHead for Cuda {
    fn logprob_head(&self, _: Forward<Self>) -> Result<()> {
        Err(Error::op("logprob_head", "not on CUDA yet"))
    }

    fn logprob_head_backward(&self, _: Backward<Self>) -> Result<()> {
        Err(Error::op("logprob_head_backward", "not on CUDA yet"))
    }
}
