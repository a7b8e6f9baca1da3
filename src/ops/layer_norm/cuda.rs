use half::bf16;

use super::{Backward, Forward, LayerNorm};
use crate::device::cuda::{Element, kernels};
use crate::device::{Cuda, DType, range};
use crate::error::Result;
use crate::ops::columns::Chunks;
use crate::ops::norm;

impl LayerNorm for Cuda {
    fn layer_norm(&self, a: Forward<Self>) -> Result<()> {
        let _range = range(c"layer_norm");
        a.check()?;
        match a.x.dtype() {
            DType::Bf16 => forward::<bf16>(self, a),
            _ => forward::<f32>(self, a),
        }
    }

    fn layer_norm_backward(&self, a: Backward<Self>) -> Result<()> {
        let _range = range(c"layer_norm_backward");
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
    kernels::LayerNorm::<T> {
        group: group as u32,
        x: a.x.input(),
        weight: a.weight.input(),
        bias: a.bias.input(),
        y: a.y.output(),
        stats: a.stats.output(),
        rows: rows as u32,
        hidden: hidden as u32,
        eps: a.eps,
    }
    .launch(cuda, norm::blocks(rows, group))
}

fn backward<T: Element>(cuda: &Cuda, a: Backward<Cuda>) -> Result<()> {
    let [rows, hidden] = a.x.shape();
    let group = norm::group::<T>(hidden);
    kernels::LayerNormBackward::<T> {
        group: group as u32,
        dy: a.dy.input(),
        x: a.x.input(),
        weight: a.weight.input(),
        stats: a.stats.input(),
        dx: a.dx.output(),
        rows: rows as u32,
        hidden: hidden as u32,
    }
    .launch(cuda, norm::blocks(rows, group))?;
    let gradients = [a.dweight, a.dbias];
    if gradients.iter().all(Option::is_none) {
        return Ok(());
    }
    let chunks = Chunks::new(cuda, rows, hidden, gradients.len());
    kernels::LayerNormColumns::<T> {
        dy: a.dy.input(),
        x: a.x.input(),
        stats: a.stats.input(),
        partial: chunks.partial(cuda, 0),
        rows: rows as u32,
        hidden: hidden as u32,
        chunk_rows: chunks.rows as u32,
    }
    .launch(cuda, chunks.grid::<T>())?;
    for (sum, gradient) in gradients.into_iter().enumerate() {
        gradient.map_or(Ok(()), |gradient| chunks.add(cuda, sum, gradient))?;
    }
    Ok(())
}
