use super::{Backward, Forward, RmsNorm};
use crate::device::cuda::{Element, kernels};
use crate::device::{Cuda, DType};
use crate::error::{Error, Result};

fn forward<T: Element>(cuda: &Cuda, a: Forward<Cuda>) -> Result<()> {
    let [rows, hidden] = a.x.shape();
    kernels::RmsNorm::<T> {
        x: a.x.input(),
        weight: a.weight.input(),
        y: a.y.output(),
        rstd: a.rstd.output(),
        hidden: hidden as u32,
        eps: a.eps,
    }
    .launch(cuda, rows)
}

impl RmsNorm for Cuda {
    fn rms_norm(&self, a: Forward<Self>) -> Result<()> {
        a.check()?;
        match a.x.dtype() {
            DType::Bf16 => forward::<half::bf16>(self, a),
            _ => forward::<f32>(self, a),
        }
    }

    fn rms_norm_backward(&self, _: Backward<Self>) -> Result<()> {
        Err(Error::op("rms_norm_backward", "not on CUDA yet"))
    }
}
