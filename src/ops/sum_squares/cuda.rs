use half::bf16;

use super::{Args, SumSquares};
use crate::device::cuda::{Element, kernels};
use crate::device::{Cuda, DType, range};
use crate::error::Result;

/// Elements of one block: `SUM_CHUNK` of `sum_squares.cu`.
const CHUNK: usize = 16384;

impl SumSquares for Cuda {
    fn sum_squares(&self, a: Args<Self>) -> Result<()> {
        let _range = range(c"sum_squares");
        a.check()?;
        match a.x.dtype() {
            DType::Bf16 => sum::<bf16>(self, a),
            _ => sum::<f32>(self, a),
        }
    }
}

fn sum<T: Element>(cuda: &Cuda, a: Args<Cuda>) -> Result<()> {
    let (n, blocks) = (a.x.len(), a.x.len().div_ceil(CHUNK));
    let mut partial = cuda.workspace(0, blocks);
    kernels::SumSquares::<T> { x: a.x.input(), partial: partial.again(), n: n as u64 }.launch(cuda, blocks)?;
    kernels::AddSquares { partial: partial.as_input(), sum: a.sum.output(), count: blocks as u32 }.launch(cuda, 1)
}
