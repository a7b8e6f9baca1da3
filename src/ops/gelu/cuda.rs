use half::bf16;

use super::{Backward, Curve, Forward, Gelu};
use crate::device::cuda::{Element, Grid, kernels};
use crate::device::{Cuda, DType, range};
use crate::error::Result;

impl Gelu for Cuda {
    fn gelu(&self, a: Forward<Self>) -> Result<()> {
        let _range = range(c"gelu");
        a.check()?;
        match a.x.dtype() {
            DType::Bf16 => forward::<bf16>(self, a),
            _ => forward::<f32>(self, a),
        }
    }

    fn gelu_backward(&self, a: Backward<Self>) -> Result<()> {
        let _range = range(c"gelu_backward");
        a.check()?;
        match a.x.dtype() {
            DType::Bf16 => backward::<bf16>(self, a),
            _ => backward::<f32>(self, a),
        }
    }
}

/// As `gelu.cu` numbers them.
fn number(curve: Curve) -> u32 {
    match curve {
        Curve::Exact => 0,
        Curve::Tanh => 1,
    }
}

fn forward<T: Element>(cuda: &Cuda, a: Forward<Cuda>) -> Result<()> {
    let n = a.x.len();
    kernels::Gelu::<T> { curve: number(a.curve), x: a.x.input(), y: a.y.output(), n: n as u64 }
        .launch(cuda, Grid::of_packs::<T>(n, kernels::Gelu::<T>::THREADS))
}

fn backward<T: Element>(cuda: &Cuda, a: Backward<Cuda>) -> Result<()> {
    let n = a.x.len();
    kernels::GeluBackward::<T> {
        curve: number(a.curve),
        dy: a.dy.input(),
        x: a.x.input(),
        dx: a.dx.output(),
        n: n as u64,
    }
    .launch(cuda, Grid::of_packs::<T>(n, kernels::GeluBackward::<T>::THREADS))
}
