use half::bf16;

use super::{Backward, Forward, RmsNorm};
use crate::device::cuda::{Element, kernels};
use crate::device::{Cuda, DType, range};
use crate::error::Result;
use crate::ops::columns::Chunks;
use crate::ops::norm;

impl RmsNorm for Cuda {
    fn rms_norm(&self, a: Forward<Self>) -> Result<()> {
        let _range = range(c"rms_norm");
        a.check()?;
        match a.x.dtype() {
            DType::Bf16 => forward::<bf16>(self, a),
            _ => forward::<f32>(self, a),
        }
    }

    fn rms_norm_backward(&self, a: Backward<Self>) -> Result<()> {
        let _range = range(c"rms_norm_backward");
        a.check()?;
        match a.x.dtype() {
            DType::Bf16 => backward::<bf16>(self, a),
            _ => backward::<f32>(self, a),
        }
    }
}

fn forward<T: Element>(cuda: &Cuda, a: Forward<Cuda>) -> Result<()> {
    let [rows, hidden] = a.x.shape();
    let group = norm::group::<T>(hidden);
    kernels::RmsNorm::<T> {
        group: group as u32,
        x: a.x.input(),
        weight: a.weight.input(),
        y: a.y.output(),
        rstd: a.rstd.output(),
        rows: rows as u32,
        hidden: hidden as u32,
        eps: a.eps,
    }
    .launch(cuda, norm::blocks(rows, group))
}

fn backward<T: Element>(cuda: &Cuda, a: Backward<Cuda>) -> Result<()> {
    let [rows, hidden] = a.x.shape();
    let group = norm::group::<T>(hidden);
    kernels::RmsNormBackward::<T> {
        group: group as u32,
        dy: a.dy.input(),
        x: a.x.input(),
        weight: a.weight.input(),
        rstd: a.rstd.input(),
        dx: a.dx.output(),
        rows: rows as u32,
        hidden: hidden as u32,
    }
    .launch(cuda, norm::blocks(rows, group))?;
    let Some(dweight) = a.dweight else { return Ok(()) };
    let chunks = Chunks::new(cuda, rows, hidden, 1);
    kernels::RmsNormColumns::<T> {
        dy: a.dy.input(),
        x: a.x.input(),
        rstd: a.rstd.input(),
        partial: chunks.partial(cuda, 0),
        rows: rows as u32,
        hidden: hidden as u32,
        chunk_rows: chunks.rows as u32,
    }
    .launch(cuda, chunks.grid::<T>())?;
    chunks.add(cuda, 0, dweight)
}
