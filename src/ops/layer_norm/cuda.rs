use super::{Backward, Forward, LayerNorm};
use crate::device::Cuda;
use crate::error::{Error, Result};

impl LayerNorm for Cuda {
    fn layer_norm(&self, _: Forward<Self>) -> Result<()> {
        Err(Error::op("layer_norm", "not on CUDA yet"))
    }

    fn layer_norm_backward(&self, _: Backward<Self>) -> Result<()> {
        Err(Error::op("layer_norm_backward", "not on CUDA yet"))
    }
}
