use super::{Gather, GatherAdd, GatherBackward, Rows, Scatter};
use crate::device::Cuda;
use crate::error::{Error, Result};

impl Rows for Cuda {
    fn gather(&self, _: Gather<Self>) -> Result<()> {
        Err(Error::op("gather", "not on CUDA yet"))
    }

    fn gather_add(&self, _: GatherAdd<Self>) -> Result<()> {
        Err(Error::op("gather_add", "not on CUDA yet"))
    }

    fn gather_backward(&self, _: GatherBackward<Self>) -> Result<()> {
        Err(Error::op("gather_backward", "not on CUDA yet"))
    }

    fn scatter(&self, _: Scatter<Self>) -> Result<()> {
        Err(Error::op("scatter", "not on CUDA yet"))
    }
}
