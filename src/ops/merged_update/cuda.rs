use super::{Args, MergedUpdate};
use crate::device::Cuda;
use crate::error::{Error, Result};

impl MergedUpdate for Cuda {
    fn merged_update(&self, _: Args<Self>) -> Result<()> {
        Err(Error::op("merged_update", "not on CUDA yet"))
    }
}
