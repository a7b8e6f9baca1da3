use super::{Attention, Backward, Forward};
use crate::device::Cuda;
use crate::error::{Error, Result};

impl Attention for Cuda {
    fn attention(&self, _: Forward<Self>) -> Result<()> {
        Err(Error::op("attention", "not on CUDA yet"))
    }

    fn attention_backward(&self, _: Backward<Self>) -> Result<()> {
        Err(Error::op("attention_backward", "not on CUDA yet"))
    }
}
