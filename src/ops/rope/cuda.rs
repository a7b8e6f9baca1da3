use super::{Rope, Rotate};
use crate::device::Cuda;
use crate::error::{Error, Result};

impl Rope for Cuda {
    fn rope(&self, _: Rotate<Self>) -> Result<()> {
        Err(Error::op("rope", "not on CUDA yet"))
    }
}
