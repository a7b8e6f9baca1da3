use half::bf16;

use super::{Backward, Dims, Forward, Linear};
use crate::device::cuda::{Element, In, Operand, Product};
use crate::device::{Cuda, DType, ViewMut, range};
use crate::error::{Error, Result};
use crate::ops::columns;

fn forward<T: Element, O: Element>(cuda: &Cuda, a: Forward<Cuda>, d: Dims) -> Result<()> {
    cuda.product(Product::<T, O> {
        shape: [d.rows, d.outputs, d.inputs],
        a: Operand::new(a.x.input(), d.inputs),
        b: Operand::transposed(a.weight.input(), d.inputs),
        scale: 1.0,
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
    a.dbias.map_or(Ok(()), |dbias| columns::add_rows::<T>(cuda, a.dy, dbias))
}

fn add_product<T: Element, O: Element>(
    cuda: &Cuda,
    shape: [usize; 3],
    a: Operand<T>,
    b: Operand<T>,
    c: ViewMut<Cuda>,
) -> Result<()> {
    let (c, ldc, bias, residual) = (c.output(), shape[1], In::null(), In::null());
    cuda.product(Product::<T, O> { shape, a, b, scale: 1.0, c, ldc, accumulate: true, bias, residual })
}

fn unknown(op: &'static str, from: DType, to: DType) -> Error {
    Error::op(
        op,
        format!("there is no product of {from:?} into {to:?}; operands are F32 or Bf16, results the same or F32"),
    )
}

impl Linear for Cuda {
    fn linear(&self, a: Forward<Self>) -> Result<()> {
        let _range = range(c"linear");
        let d = a.check()?;
        match (a.x.dtype(), a.y.dtype()) {
            (DType::F32, DType::F32) => forward::<f32, f32>(self, a, d),
            (DType::Bf16, DType::Bf16) => forward::<bf16, bf16>(self, a, d),
            (DType::Bf16, DType::F32) => forward::<bf16, f32>(self, a, d),
            (from, to) => Err(unknown("linear", from, to)),
        }
    }

    fn linear_backward(&self, a: Backward<Self>) -> Result<()> {
        let _range = range(c"linear_backward");
        let d = a.check()?;
        match a.dy.dtype() {
            DType::F32 => backward::<f32>(self, a, d),
            DType::Bf16 => backward::<bf16>(self, a, d),
            other => Err(unknown("linear_backward", other, other)),
        }
    }
}
