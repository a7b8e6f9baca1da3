use half::bf16;

use super::{Backward, Blend, Dims, Forward, LowRank};
use crate::device::cuda::{Element, In, Operand, Out, Product, kernels};
use crate::device::{Cuda, DType, range};
use crate::error::{Error, Result};

/// `c = scale a b`, or `c += ...`
fn product<T: Element, O: Element>(
    cuda: &Cuda,
    shape: [usize; 3],
    (a, b): (Operand<T>, Operand<T>),
    scale: f32,
    c: Out<O>,
    accumulate: bool,
) -> Result<()> {
    let (ldc, bias, residual) = (shape[1], In::null(), In::null());
    cuda.product(Product { shape, a, b, scale, c, ldc, accumulate, bias, residual })
}

fn forward<T: Element>(cuda: &Cuda, mut f: Forward<Cuda>, d: Dims) -> Result<()> {
    let Dims { rows, inputs, outputs, rank } = d;
    let operands = (Operand::new(f.x.input::<T>(), inputs), Operand::transposed(f.a.input(), inputs));
    product::<T, T>(cuda, [rows, rank, inputs], operands, f.scale, f.scratch.again().output(), false)?;
    if let Some(Blend { weights, owner }) = f.blend {
        const THREADS: usize = kernels::BlendColumns::<f32>::THREADS as usize;
        let n = rows * rank;
        kernels::BlendColumns::<T> {
            t: f.scratch.again().output(),
            weights: weights.input(),
            owner: owner.input(),
            rank: rank as u32,
            adapters: weights.cols() as u32,
            n: n as u64,
        }
        .launch(cuda, n.div_ceil(THREADS))?;
    }
    let operands = (Operand::new(f.scratch.view().input::<T>(), rank), Operand::transposed(f.b.input(), rank));
    product::<T, T>(cuda, [rows, outputs, rank], operands, 1.0, f.y.output(), true)
}

fn backward<T: Element>(cuda: &Cuda, mut f: Backward<Cuda>, d: Dims) -> Result<()> {
    let Dims { rows, inputs, outputs, rank } = d;
    if let Some(db) = f.db {
        let operands = (Operand::new(f.x.input::<T>(), inputs), Operand::transposed(f.a.input(), inputs));
        product::<T, T>(cuda, [rows, rank, inputs], operands, f.scale, f.scratch.again().output(), false)?;
        let operands = (Operand::transposed(f.dy.input::<T>(), outputs), Operand::new(f.scratch.view().input(), rank));
        product::<T, f32>(cuda, [outputs, rank, rows], operands, 1.0, db.output(), true)?;
    }
    let operands = (Operand::new(f.dy.input::<T>(), outputs), Operand::new(f.b.input(), rank));
    product::<T, T>(cuda, [rows, rank, outputs], operands, f.scale, f.scratch.again().output(), false)?;
    let u = f.scratch.view().input::<T>();
    if let Some(da) = f.da {
        let operands = (Operand::transposed(u, rank), Operand::new(f.x.input(), inputs));
        product::<T, f32>(cuda, [rank, inputs, rows], operands, 1.0, da.output(), true)?;
    }
    let operands = (Operand::new(u, rank), Operand::new(f.a.input(), inputs));
    product::<T, T>(cuda, [rows, inputs, rank], operands, 1.0, f.dx.output(), true)
}

fn unknown(op: &'static str, dtype: DType) -> Error {
    Error::op(op, format!("there is no product of {dtype:?}; operands are F32 or Bf16"))
}

impl LowRank for Cuda {
    fn low_rank(&self, a: Forward<Self>) -> Result<()> {
        let _range = range(c"low_rank");
        let d = a.check()?;
        match a.x.dtype() {
            DType::F32 => forward::<f32>(self, a, d),
            DType::Bf16 => forward::<bf16>(self, a, d),
            other => Err(unknown("low_rank", other)),
        }
    }

    fn low_rank_backward(&self, a: Backward<Self>) -> Result<()> {
        let _range = range(c"low_rank_backward");
        let d = a.check()?;
        match a.dy.dtype() {
            DType::F32 => backward::<f32>(self, a, d),
            DType::Bf16 => backward::<bf16>(self, a, d),
            other => Err(unknown("low_rank_backward", other)),
        }
    }
}
