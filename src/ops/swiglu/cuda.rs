use half::bf16;

use super::{Backward, Forward, SwiGlu};
use crate::device::cuda::{Element, Grid, kernels};
use crate::device::{Cuda, DType, range};
use crate::error::Result;

impl SwiGlu for Cuda {
    fn swiglu(&self, a: Forward<Self>) -> Result<()> {
        let _range = range(c"swiglu");
        a.check()?;
        match a.gate.dtype() {
            DType::Bf16 => forward::<bf16>(self, a),
            _ => forward::<f32>(self, a),
        }
    }

    fn swiglu_backward(&self, a: Backward<Self>) -> Result<()> {
        let _range = range(c"swiglu_backward");
        a.check()?;
        match a.gate.dtype() {
            DType::Bf16 => backward::<bf16>(self, a),
            _ => backward::<f32>(self, a),
        }
    }
}

fn forward<T: Element>(cuda: &Cuda, a: Forward<Cuda>) -> Result<()> {
    let n = a.gate.len();
    kernels::Swiglu::<T> { gate: a.gate.input(), up: a.up.input(), y: a.y.output(), n: n as u64 }
        .launch(cuda, Grid::of_packs::<T>(n, kernels::Swiglu::<T>::THREADS))
}

fn backward<T: Element>(cuda: &Cuda, a: Backward<Cuda>) -> Result<()> {
    let n = a.gate.len();
    kernels::SwigluBackward::<T> {
        dy: a.dy.input(),
        gate: a.gate.input(),
        up: a.up.input(),
        dgate: a.dgate.output(),
        dup: a.dup.output(),
        n: n as u64,
    }
    .launch(cuda, Grid::of_packs::<T>(n, kernels::SwigluBackward::<T>::THREADS))
}
