use half::bf16;

use super::{Backward, Dims, Forward, Ref, TokenKl};
use crate::device::cuda::{Element, Out, kernels};
use crate::device::{ALIGN_BYTES, Cuda, DType, View, range};
use crate::error::{Error, Result};
use crate::ops::logits_cuda::{CHUNK, Gradients, SPLIT, Work, chunk_ld, grid, grid_of_tiles, rows_at_once};

/// Sums that the forward keeps of a row and a run of the vocabulary: the policy's, and those of a reference (`Softmax` and
/// `Against` in the kernel).
const PLANES: usize = 2;
const REF_PLANES: usize = 3;

/// Rows `first..first + rows` of reference `k`.
fn at<'a>(view: View<'a, Cuda>, k: usize, [first, rows]: [usize; 2]) -> View<'a, Cuda> {
    let all = view.cols();
    view.reshape(view.len(), 1).slice(k * all + first, rows)
}

/// Puts the policy's logits of rows and entries, each `[first, number]`, into `logits`, and their sums into `partial`.
fn policy<T: Element>(
    cuda: &Cuda,
    ([h, weight], scale): ([View<Cuda>; 2], f32),
    [first, rows]: [usize; 2],
    [entry, entries]: [usize; 2],
    logits: Out<f32>,
    partial: Out<f32>,
) -> Result<()> {
    kernels::TokenKlPolicy::<T> {
        h: h.slice(first, rows).input(),
        weight: weight.slice(entry, entries).input(),
        logits,
        partial,
        scale,
        rows: rows as u32,
        hidden: h.cols() as u32,
        entries: entries as u32,
        span: SPLIT as u32,
        ld: chunk_ld(weight.rows()) as u32,
    }
    .launch(cuda, grid(rows, entries.div_ceil(SPLIT)))
}

/// Where the forward keeps what it makes of some rows: the policy's logits of one chunk, and the sums of all splits.
struct Sums<'a> {
    cuda: &'a Cuda,
    rows: usize,
    splits: usize,
    ld: usize,
}

impl<'a> Sums<'a> {
    fn bytes_of_row(vocab: usize, refs: usize) -> usize {
        let planes = (PLANES + REF_PLANES * refs) * vocab.div_ceil(SPLIT);
        (chunk_ld(vocab) + planes) * size_of::<f32>()
    }

    fn logits(&self) -> Out<'a, f32> {
        self.cuda.workspace(0, self.rows * self.ld)
    }

    /// Of `splits` splits from the one numbered `split` on.
    fn policy(&self, split: usize, splits: usize) -> Out<'a, f32> {
        self.floats(self.rows * (self.ld + PLANES * split), PLANES * splits)
    }

    fn reference(&self, k: usize, split: usize, splits: usize) -> Out<'a, f32> {
        let before = PLANES * self.splits + REF_PLANES * (k * self.splits + split);
        self.floats(self.rows * (self.ld + before), REF_PLANES * splits)
    }

    fn floats(&self, offset: usize, planes: usize) -> Out<'a, f32> {
        self.cuda.workspace(offset * size_of::<f32>(), self.rows * planes)
    }
}

fn forward<T: Element>(cuda: &Cuda, d: Dims, mut a: Forward<Cuda>) -> Result<()> {
    let bytes_of_row = Sums::bytes_of_row(d.vocab, a.refs.len());
    let at_once = rows_at_once("token_kl", d.rows, bytes_of_row, cuda.workspace_bytes())?;
    for first in (0..d.rows).step_by(at_once) {
        let rows = at_once.min(d.rows - first);
        let sums = Sums { cuda, rows, splits: d.vocab.div_ceil(SPLIT), ld: chunk_ld(d.vocab) };
        for entry in (0..d.vocab).step_by(CHUNK) {
            let entries = CHUNK.min(d.vocab - entry);
            let (split, splits) = (entry / SPLIT, entries.div_ceil(SPLIT));
            let (logits, partial) = (sums.logits(), sums.policy(split, splits));
            policy::<T>(cuda, ([a.h, a.weight], a.scale), [first, rows], [entry, entries], logits, partial)?;
            for (k, Ref { h, weight }) in a.refs.iter().enumerate() {
                kernels::TokenKlReference::<T> {
                    h: h.slice(first, rows).input(),
                    weight: weight.slice(entry, entries).input(),
                    logits: sums.logits().as_input(),
                    policy: sums.policy(split, splits).as_input(),
                    partial: sums.reference(k, split, splits),
                    scale: a.scale,
                    rows: rows as u32,
                    hidden: h.cols() as u32,
                    entries: entries as u32,
                    span: SPLIT as u32,
                    ld: sums.ld as u32,
                }
                .launch(cuda, grid(rows, splits))?;
            }
        }
        for k in 0..a.refs.len() {
            kernels::TokenKlCombine {
                policy: sums.policy(0, sums.splits).as_input(),
                reference: sums.reference(k, 0, sums.splits).as_input(),
                kl: a.kl.again().output(),
                lse: a.lse.again().output(),
                number: k as u32,
                all: d.rows as u32,
                first: first as u32,
                rows: rows as u32,
                splits: sums.splits as u32,
            }
            .launch(cuda, rows.div_ceil(256))?;
        }
    }
    Ok(())
}

fn backward<T: Element>(cuda: &Cuda, d: Dims, a: Backward<Cuda>) -> Result<()> {
    let ld = chunk_ld(d.vocab);
    let (of_work, of_chunk) = (Work::<T>::bytes_of_row(d.hidden, d.vocab), ld * size_of::<f32>());
    // Behind the work, each from where tensors start: the policy's logits of one chunk, and the references' terms.
    let bytes = cuda.workspace_bytes().saturating_sub(3 * ALIGN_BYTES);
    let at_once = rows_at_once("token_kl_backward", d.rows, of_work + 2 * of_chunk, bytes)?;
    let mut gradients = Gradients { h: a.h, weight: a.weight, dh: a.dh, dweight: a.dweight };
    for first in (0..d.rows).step_by(at_once) {
        let rows = at_once.min(d.rows - first);
        let mut work = Work::<T>::new(cuda, rows, d.hidden, d.vocab);
        let start = (rows * of_work + ALIGN_BYTES).next_multiple_of(ALIGN_BYTES);
        let mut logits: Out<f32> = cuda.workspace(start, rows * ld);
        let mut terms: Out<f32> = cuda.workspace(start + rows * of_chunk, rows * ld);
        for entry in (0..d.vocab).step_by(CHUNK) {
            let entries = CHUNK.min(d.vocab - entry);
            policy::<T>(
                cuda,
                ([a.h, a.weight], a.scale),
                [first, rows],
                [entry, entries],
                logits.again(),
                Out::null(),
            )?;
            for (k, Ref { h, weight }) in a.refs.iter().enumerate() {
                let last = k + 1 == a.refs.len();
                kernels::TokenKlDlogits::<T> {
                    h: h.slice(first, rows).input(),
                    weight: weight.slice(entry, entries).input(),
                    logits: logits.as_input(),
                    lse: at(a.lse, 0, [first, rows]).input(),
                    ref_lse: at(a.lse, 1 + k, [first, rows]).input(),
                    kl: at(a.kl, k, [first, rows]).input(),
                    dkl: at(a.dkl, k, [first, rows]).input(),
                    terms: terms.again(),
                    dl: if last { work.dl.again() } else { Out::null() },
                    scale: a.scale,
                    rows: rows as u32,
                    hidden: h.cols() as u32,
                    entries: entries as u32,
                    ld: ld as u32,
                    first: u32::from(k == 0),
                }
                .launch(cuda, grid_of_tiles(rows, entries))?;
            }
            work.add(cuda, &mut gradients, [first, rows], [entry, entries])?;
        }
        work.finish(cuda, &mut gradients, [first, rows])?;
    }
    Ok(())
}

fn unknown(op: &'static str, dtype: DType) -> Error {
    Error::op(op, format!("there is no kernel for hidden rows of {dtype:?}; they are F32 or Bf16"))
}

impl TokenKl for Cuda {
    fn token_kl(&self, a: Forward<Self>) -> Result<()> {
        let _range = range(c"token_kl");
        let d = a.check()?;
        match a.h.dtype() {
            DType::F32 => forward::<f32>(self, d, a),
            DType::Bf16 => forward::<bf16>(self, d, a),
            other => Err(unknown("token_kl", other)),
        }
    }

    fn token_kl_backward(&self, a: Backward<Self>) -> Result<()> {
        let _range = range(c"token_kl_backward");
        let d = a.check()?;
        match a.h.dtype() {
            DType::F32 => backward::<f32>(self, d, a),
            DType::Bf16 => backward::<bf16>(self, d, a),
            other => Err(unknown("token_kl_backward", other)),
        }
    }
}
