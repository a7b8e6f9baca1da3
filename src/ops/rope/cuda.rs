use half::bf16;

use super::{Direction, Rope, Rotate};
use crate::device::cuda::{Element, kernels};
use crate::device::{Cuda, DType, range};
use crate::error::Result;

impl Rope for Cuda {
    fn rope(&self, a: Rotate<Self>) -> Result<()> {
        let _range = range(c"rope");
        a.check()?;
        match a.x.dtype() {
            DType::Bf16 => rotate::<bf16>(self, a),
            _ => rotate::<f32>(self, a),
        }
    }
}

fn rotate<T: Element>(cuda: &Cuda, a: Rotate<Cuda>) -> Result<()> {
    const THREADS: usize = kernels::Rope::<f32>::THREADS as usize;
    let ([rows, cols], half) = (a.x.shape(), a.cos.cols());
    let heads = cols / a.head_dim;
    let threads = rows * heads * half.div_ceil(16 / size_of::<T>());
    kernels::Rope::<T> {
        positions: a.positions.input(),
        cos: a.cos.input(),
        sin: a.sin.input(),
        rows: rows as u32,
        heads: heads as u32,
        head_dim: a.head_dim as u32,
        half: half as u32,
        sign: if a.direction == Direction::Forward { 1.0 } else { -1.0 },
        x: a.x.output(),
    }
    .launch(cuda, threads.div_ceil(THREADS))
}
