use half::bf16;

use super::{Backward, Dims, Forward, LogprobHead};
use crate::device::cuda::{Element, Grid, In, Operand, Out, Product, kernels};
use crate::device::{ALIGN_BYTES, Cuda, DType};
use crate::error::{Error, Result};

/// Rows and vocabulary entries of a block's tile of logits, its shared memory, and the row tiles that share weights in L2.
const ROWS: usize = 128;
const ENTRIES: usize = 256;
const SHARED_BYTES: usize = 3 * (ROWS + ENTRIES) * (64 + 16);
const GROUP: usize = 16;
/// Entries that one block of the forward walks: by the vocabulary alone, so that a row's sums have one order.
const SPLIT: usize = 1024;
/// Entries whose gradient by the logits exists at one time: by nothing, for the same reason. With them a product reads and
/// writes its sums 4096 times less often than it multiplies.
const CHUNK: usize = 4096;

/// Blocks for all tiles of rows and some splits of the vocabulary.
fn grid(rows: usize, splits: usize) -> Grid {
    let tiles = rows.div_ceil(ROWS);
    Grid::from([tiles.min(GROUP), splits, tiles.div_ceil(GROUP)]).shared(SHARED_BYTES)
}

/// Rows that are worked on at one time where each takes so much of the workspace: whole tiles, chunks of about one size.
fn rows_at_once(op: &'static str, rows: usize, bytes_of_row: usize, bytes: usize) -> Result<usize> {
    let most = bytes / bytes_of_row;
    if most == 0 {
        return Err(Error::op(op, format!("one row takes {bytes_of_row} bytes of workspace, there are {bytes}")));
    }
    let most = if most < ROWS { most } else { most - most % ROWS };
    let even = rows.div_ceil(rows.div_ceil(most).max(1));
    Ok(even.next_multiple_of(ROWS).clamp(1, most))
}

fn forward<T: Element>(cuda: &Cuda, d: Dims, mut a: Forward<Cuda>) -> Result<()> {
    let splits = d.vocab.div_ceil(SPLIT);
    let bytes_of_row = 3 * splits * size_of::<f32>();
    let at_once = rows_at_once("logprob_head", d.rows, bytes_of_row, cuda.workspace_bytes())?;
    for first in (0..d.rows).step_by(at_once) {
        let rows = at_once.min(d.rows - first);
        let target = a.target.slice(first, rows);
        let mut partial: Out<f32> = cuda.workspace(0, 3 * splits * rows);
        let mut logp = a.logp.again().slice(first, rows).output();
        kernels::LogprobHead::<T> {
            h: a.h.slice(first, rows).input(),
            weight: a.weight.input(),
            target: target.input(),
            partial: partial.again(),
            logp: logp.again(),
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
            rows: rows as u32,
            splits: splits as u32,
            vocab: d.vocab as u32,
        }
        .launch(cuda, rows.div_ceil(256))?;
    }
    Ok(())
}

/// Where the backward keeps what it makes: for some rows the f32 sum of dh over the vocabulary's chunks (`None` where dh is
/// f32 itself), behind it dl of one chunk.
struct Work<'a, T> {
    sum: Option<Out<'a, f32>>,
    dl: Out<'a, T>,
    /// Elements from one row of dl to the next.
    ld: usize,
}

impl<'a, T: Element> Work<'a, T> {
    fn bytes_of_row(d: &Dims) -> usize {
        Self::bytes_of_sum(d) + Self::ld(d) * T::DTYPE.bytes()
    }

    fn bytes_of_sum(d: &Dims) -> usize {
        if T::DTYPE == DType::F32 { 0 } else { d.hidden * size_of::<f32>() }
    }

    fn ld(d: &Dims) -> usize {
        CHUNK.min(d.vocab.next_multiple_of(ENTRIES))
    }

    fn new(cuda: &'a Cuda, d: &Dims, rows: usize) -> Self {
        let sum = (T::DTYPE != DType::F32).then(|| cuda.workspace(0, rows * d.hidden));
        let behind = (rows * Self::bytes_of_sum(d)).next_multiple_of(ALIGN_BYTES);
        Self { sum, dl: cuda.workspace(behind, rows * Self::ld(d)), ld: Self::ld(d) }
    }
}

fn backward<T: Element>(cuda: &Cuda, d: Dims, mut a: Backward<Cuda>) -> Result<()> {
    // What stands behind the sums starts where tensors do.
    let bytes = cuda.workspace_bytes().saturating_sub(ALIGN_BYTES);
    let at_once = rows_at_once("logprob_head_backward", d.rows, Work::<T>::bytes_of_row(&d), bytes)?;
    for first in (0..d.rows).step_by(at_once) {
        let rows = at_once.min(d.rows - first);
        let mut work = Work::<T>::new(cuda, &d, rows);
        for entry in (0..d.vocab).step_by(CHUNK) {
            backward_chunk(cuda, &d, &mut a, &mut work, [first, rows], [entry, CHUNK.min(d.vocab - entry)])?;
        }
        let Some(sum) = work.sum else { continue };
        let (n, dh) = (rows * d.hidden, a.dh.again().slice(first, rows));
        kernels::LogprobHeadDh::<T> { sum: sum.as_input(), dh: dh.output(), n: n as u64 }
            .launch(cuda, n.div_ceil(4 * 256).min(16 * cuda.multiprocessors()))?;
    }
    Ok(())
}

/// dl of some rows and entries, each `[first, number]`, and what it adds to the gradients.
fn backward_chunk<T: Element>(
    cuda: &Cuda,
    d: &Dims,
    a: &mut Backward<Cuda>,
    work: &mut Work<T>,
    [first, rows]: [usize; 2],
    [entry, entries]: [usize; 2],
) -> Result<()> {
    let (hidden, ld) = (d.hidden, work.ld);
    let (h, weight) = (a.h.slice(first, rows).input(), a.weight.slice(entry, entries).input());
    kernels::LogprobHeadDlogits::<T> {
        h,
        weight,
        target: a.target.slice(first, rows).input(),
        lse: a.lse.slice(first, rows).input(),
        dlogp: a.dlogp.slice(first, rows).input(),
        dentropy: In::optional(a.dentropy.map(|d| d.slice(first, rows))),
        entropy: In::optional(a.entropy.map(|entropy| entropy.slice(first, rows))),
        dl: work.dl.again(),
        rows: rows as u32,
        hidden: hidden as u32,
        first: entry as u32,
        entries: entries as u32,
        ld: ld as u32,
    }
    .launch(cuda, grid(rows, entries.div_ceil(ENTRIES)))?;
    let dl = work.dl.as_input();
    let (sum, accumulate) = match &mut work.sum {
        Some(sum) => (sum.again(), entry > 0),
        None => (a.dh.again().slice(first, rows).output(), true),
    };
    let add = |shape, a, b, c, accumulate| {
        let (bias, residual) = (In::null(), In::null());
        cuda.product(Product::<T, f32> { shape, a, b, c, ldc: hidden, accumulate, bias, residual })
    };
    add([rows, hidden, entries], Operand::new(dl, ld), Operand::new(weight, hidden), sum, accumulate)?;
    let Some(dweight) = &mut a.dweight else { return Ok(()) };
    let dweight = dweight.again().slice(entry, entries).output();
    add([entries, hidden, rows], Operand::transposed(dl, ld), Operand::new(h, hidden), dweight, true)
}

fn unknown(op: &'static str, dtype: DType) -> Error {
    Error::op(op, format!("there is no kernel for hidden rows of {dtype:?}; they are F32 or Bf16"))
}

impl LogprobHead for Cuda {
    fn logprob_head(&self, a: Forward<Self>) -> Result<()> {
        let d = a.check()?;
        match a.h.dtype() {
            DType::F32 => forward::<f32>(self, d, a),
            DType::Bf16 => forward::<bf16>(self, d, a),
            other => Err(unknown("logprob_head", other)),
        }
    }

    fn logprob_head_backward(&self, a: Backward<Self>) -> Result<()> {
        let d = a.check()?;
        match a.h.dtype() {
            DType::F32 => backward::<f32>(self, d, a),
            DType::Bf16 => backward::<bf16>(self, d, a),
            other => Err(unknown("logprob_head_backward", other)),
        }
    }
}
