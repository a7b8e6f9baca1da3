use half::bf16;

use super::{Backward, Dims, Forward, LogprobHead};
use crate::device::cuda::{Element, In, Out, kernels};
use crate::device::{ALIGN_BYTES, Cuda, DType, range};
use crate::error::{Error, Result};
use crate::ops::logits_cuda::{CHUNK, Gradients, SPLIT, Work, grid, grid_of_tiles, rows_at_once};

/// Sums that the forward keeps of a row and a run of the vocabulary (`Softmax` in the kernel).
const PLANES: usize = 4;

fn forward<T: Element>(cuda: &Cuda, d: Dims, mut a: Forward<Cuda>) -> Result<()> {
    let splits = d.vocab.div_ceil(SPLIT);
    let bytes_of_row = PLANES * splits * size_of::<f32>();
    let at_once = rows_at_once("logprob_head", d.rows, bytes_of_row, cuda.workspace_bytes())?;
    for first in (0..d.rows).step_by(at_once) {
        let rows = at_once.min(d.rows - first);
        let target = a.target.slice(first, rows);
        let mut partial: Out<f32> = cuda.workspace(0, PLANES * splits * rows);
        let mut logp = a.logp.again().slice(first, rows).output();
        kernels::LogprobHead::<T> {
            h: a.h.slice(first, rows).input(),
            weight: a.weight.input(),
            target: target.input(),
            partial: partial.again(),
            logp: logp.again(),
            scale: a.scale,
            rows: rows as u32,
            hidden: d.hidden as u32,
            vocab: d.vocab as u32,
            span: SPLIT as u32,
        }
        .launch(cuda, grid(rows, splits))?;
        kernels::LogprobHeadCombine {
            partial: partial.as_input(),
            target: target.input(),
            logp,
            lse: a.lse.again().slice(first, rows).output(),
            entropy: Out::optional(a.entropy.as_mut().map(|entropy| entropy.again().slice(first, rows))),
            ln_sum_p2: Out::optional(a.ln_sum_p2.as_mut().map(|ln_sum_p2| ln_sum_p2.again().slice(first, rows))),
            rows: rows as u32,
            splits: splits as u32,
            vocab: d.vocab as u32,
        }
        .launch(cuda, rows.div_ceil(256))?;
    }
    Ok(())
}

fn backward<T: Element>(cuda: &Cuda, d: Dims, a: Backward<Cuda>) -> Result<()> {
    // What stands behind the sums starts where tensors do.
    let bytes = cuda.workspace_bytes().saturating_sub(ALIGN_BYTES);
    let bytes_of_row = Work::<T>::bytes_of_row(d.hidden, d.vocab);
    let at_once = rows_at_once("logprob_head_backward", d.rows, bytes_of_row, bytes)?;
    let mut gradients = Gradients { h: a.h, weight: a.weight, dh: a.dh, dweight: a.dweight };
    for first in (0..d.rows).step_by(at_once) {
        let rows = at_once.min(d.rows - first);
        let mut work = Work::<T>::new(cuda, rows, d.hidden, d.vocab);
        for entry in (0..d.vocab).step_by(CHUNK) {
            let entries = CHUNK.min(d.vocab - entry);
            kernels::LogprobHeadDlogits::<T> {
                h: a.h.slice(first, rows).input(),
                weight: a.weight.slice(entry, entries).input(),
                target: a.target.slice(first, rows).input(),
                lse: a.lse.slice(first, rows).input(),
                dlogp: a.dlogp.slice(first, rows).input(),
                dentropy: In::optional(a.dentropy.map(|d| d.slice(first, rows))),
                entropy: In::optional(a.entropy.map(|entropy| entropy.slice(first, rows))),
                dl: work.dl.again(),
                scale: a.scale,
                rows: rows as u32,
                hidden: d.hidden as u32,
                first: entry as u32,
                entries: entries as u32,
                ld: work.ld as u32,
            }
            .launch(cuda, grid_of_tiles(rows, entries))?;
            work.add(cuda, &mut gradients, [first, rows], [entry, entries])?;
        }
        work.finish(cuda, &mut gradients, [first, rows])?;
    }
    Ok(())
}

fn unknown(op: &'static str, dtype: DType) -> Error {
    Error::op(op, format!("there is no kernel for hidden rows of {dtype:?}; they are F32 or Bf16"))
}

impl LogprobHead for Cuda {
    fn logprob_head(&self, a: Forward<Self>) -> Result<()> {
        let _range = range(c"logprob_head");
        let d = a.check()?;
        match a.h.dtype() {
            DType::F32 => forward::<f32>(self, d, a),
            DType::Bf16 => forward::<bf16>(self, d, a),
            other => Err(unknown("logprob_head", other)),
        }
    }

    fn logprob_head_backward(&self, a: Backward<Self>) -> Result<()> {
        let _range = range(c"logprob_head_backward");
        let d = a.check()?;
        match a.h.dtype() {
            DType::F32 => backward::<f32>(self, d, a),
            DType::Bf16 => backward::<bf16>(self, d, a),
            other => Err(unknown("logprob_head_backward", other)),
        }
    }
}
