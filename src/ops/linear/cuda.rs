use half::bf16;

use super::{Backward, Dims, Forward, Linear};
use crate::device::cuda::{Element, In, Operand, Out, Product, kernels};
use crate::device::{Cuda, DType, View, ViewMut};
use crate::error::{Error, Result};

/// Rows that a block of `column_sum` adds.
const ROWS_PER_CHUNK: usize = 512;

fn forward<T: Element, O: Element>(cuda: &Cuda, a: Forward<Cuda>, d: Dims) -> Result<()> {
    cuda.product(Product::<T, O> {
        shape: [d.rows, d.outputs, d.inputs],
        a: Operand::new(a.x.input(), d.inputs),
        b: Operand::transposed(a.weight.input(), d.inputs),
        c: a.y.output(),
        ldc: d.outputs,
        accumulate: false,
        bias: In::optional(a.bias),
        residual: In::optional(a.residual),
    })
}

fn backward<T: Element>(cuda: &Cuda, a: Backward<Cuda>, d: Dims) -> Result<()> {
    let Dims { rows, inputs, outputs } = d;
    if let Some(dx) = a.dx {
        let (dy, weight) = (Operand::new(a.dy.input(), outputs), Operand::new(a.weight.input(), inputs));
        add_product::<T, T>(cuda, [rows, inputs, outputs], dy, weight, dx)?;
    }
    if let Some(dweight) = a.dweight {
        let (dy, x) = (Operand::transposed(a.dy.input(), outputs), Operand::new(a.x.input(), inputs));
        add_product::<T, f32>(cuda, [outputs, inputs, rows], dy, x, dweight)?;
    }
    a.dbias.map_or(Ok(()), |dbias| add_columns::<T>(cuda, a.dy, dbias))
}

fn add_product<T: Element, O: Element>(
    cuda: &Cuda,
    shape: [usize; 3],
    a: Operand<T>,
    b: Operand<T>,
    c: ViewMut<Cuda>,
) -> Result<()> {
    let (c, ldc) = (c.output(), shape[1]);
    cuda.product(Product::<T, O> { shape, a, b, c, ldc, accumulate: true, bias: In::null(), residual: In::null() })
}

/// `sum +=` the columns of `x`.
fn add_columns<T: Element>(cuda: &Cuda, x: View<Cuda>, sum: ViewMut<Cuda>) -> Result<()> {
    let [rows, cols] = x.shape();
    let fit = (cuda.workspace_bytes() / (cols * size_of::<f32>())).max(1);
    let height = ROWS_PER_CHUNK.max(rows.div_ceil(fit));
    let chunks = rows.div_ceil(height);
    let mut partial: Out<f32> = cuda.workspace(0, chunks * cols);
    kernels::ColumnSum::<T> {
        x: x.input(),
        partial: partial.again(),
        rows: rows as u32,
        cols: cols as u32,
        height: height as u32,
    }
    .launch(cuda, [cols.div_ceil(32), chunks])?;
    kernels::AddChunks { partial: partial.as_input(), sum: sum.output(), chunks: chunks as u32, cols: cols as u32 }
        .launch(cuda, cols.div_ceil(256))
}

fn unknown(op: &'static str, from: DType, to: DType) -> Error {
    Error::op(
        op,
        format!("there is no product of {from:?} into {to:?}; operands are F32 or Bf16, results the same or F32"),
    )
}

impl Linear for Cuda {
    fn linear(&self, a: Forward<Self>) -> Result<()> {
        let d = a.check()?;
        match (a.x.dtype(), a.y.dtype()) {
            (DType::F32, DType::F32) => forward::<f32, f32>(self, a, d),
            (DType::Bf16, DType::Bf16) => forward::<bf16, bf16>(self, a, d),
            (DType::Bf16, DType::F32) => forward::<bf16, f32>(self, a, d),
            (from, to) => Err(unknown("linear", from, to)),
        }
    }

    fn linear_backward(&self, a: Backward<Self>) -> Result<()> {
        let d = a.check()?;
        match a.dy.dtype() {
            DType::F32 => backward::<f32>(self, a, d),
            DType::Bf16 => backward::<bf16>(self, a, d),
            other => Err(unknown("linear_backward", other, other)),
        }
    }
}
