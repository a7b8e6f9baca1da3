//! Tiles of logits on a GPU, for the ops that walk the vocabulary (kernels/logits.cuh), and what becomes of their gradient.

use crate::device::cuda::{Element, Grid, In, Operand, Out, Product, kernels};
use crate::device::{ALIGN_BYTES, Cuda, DType, View, ViewMut};
use crate::error::{Error, Result};

/// Rows and vocabulary entries of a block's tile of logits, its shared memory, and the row tiles that share weights in L2.
const ROWS: usize = 128;
const ENTRIES: usize = 256;
const SHARED_BYTES: usize = 3 * (ROWS + ENTRIES) * (64 + 16);
const GROUP: usize = 16;
/// Entries that one block of a forward walks: by the vocabulary alone, so that a row's sums have one order.
pub const SPLIT: usize = 1024;
/// Entries whose gradient by the logits exists at one time: by nothing, for the same reason. With them a product reads and
/// writes its sums 4096 times less often than it multiplies.
pub const CHUNK: usize = 4096;

/// Blocks for all tiles of rows and some runs of the vocabulary.
pub fn grid(rows: usize, runs: usize) -> Grid {
    let tiles = rows.div_ceil(ROWS);
    Grid::from([tiles.min(GROUP), runs, tiles.div_ceil(GROUP)]).shared(SHARED_BYTES)
}

/// Blocks that make one tile each of all rows and `entries` entries.
pub fn grid_of_tiles(rows: usize, entries: usize) -> Grid {
    grid(rows, entries.div_ceil(ENTRIES))
}

/// Elements from one row to the next of what is kept of a chunk: the kernels write pairs, and whole tiles are aligned.
pub fn chunk_ld(vocab: usize) -> usize {
    CHUNK.min(vocab.next_multiple_of(ENTRIES))
}

/// Rows that are worked on at one time where each takes so much of the workspace: whole tiles, chunks of about one size.
pub fn rows_at_once(op: &'static str, rows: usize, bytes_of_row: usize, bytes: usize) -> Result<usize> {
    let most = bytes / bytes_of_row;
    if most == 0 {
        return Err(Error::op(op, format!("one row takes {bytes_of_row} bytes of workspace, there are {bytes}")));
    }
    let most = if most < ROWS { most } else { most - most % ROWS };
    let even = rows.div_ceil(rows.div_ceil(most).max(1));
    Ok(even.next_multiple_of(ROWS).clamp(1, most))
}

/// What a backward adds to, and for which head.
pub struct Gradients<'a> {
    /// `[rows, hidden]`
    pub h: View<'a, Cuda>,
    /// `[vocab, hidden]`
    pub weight: View<'a, Cuda>,
    /// `[rows, hidden]`
    pub dh: ViewMut<'a, Cuda>,
    /// `[vocab, hidden]`
    pub dweight: Option<ViewMut<'a, Cuda>>,
}

/// Where a backward keeps what it makes for some rows: the f32 sum of dh over the vocabulary's chunks (`None` where dh is f32
/// itself), behind it dl of one chunk. At the start of the workspace.
pub struct Work<'a, T> {
    sum: Option<Out<'a, f32>>,
    pub dl: Out<'a, T>,
    /// Elements from one row of dl to the next.
    pub ld: usize,
}

impl<'a, T: Element> Work<'a, T> {
    pub fn bytes_of_row(hidden: usize, vocab: usize) -> usize {
        Self::bytes_of_sum(hidden) + chunk_ld(vocab) * T::DTYPE.bytes()
    }

    fn bytes_of_sum(hidden: usize) -> usize {
        if T::DTYPE == DType::F32 { 0 } else { hidden * size_of::<f32>() }
    }

    pub fn new(cuda: &'a Cuda, rows: usize, hidden: usize, vocab: usize) -> Self {
        let (sum_bytes, ld) = (rows * Self::bytes_of_sum(hidden), chunk_ld(vocab));
        let sum = (sum_bytes > 0).then(|| cuda.workspace(0, rows * hidden));
        Self { sum, dl: cuda.workspace(sum_bytes.next_multiple_of(ALIGN_BYTES), rows * ld), ld }
    }

    /// What `dl` of rows and entries, each `[first, number]`, adds to the gradients: `dh += dl W`, `dweight += dl^T h`. Chunks
    /// come in order, from the first on.
    pub fn add(
        &mut self,
        cuda: &Cuda,
        g: &mut Gradients,
        [first, rows]: [usize; 2],
        [entry, entries]: [usize; 2],
    ) -> Result<()> {
        let (hidden, ld, dl) = (g.h.cols(), self.ld, self.dl.as_input());
        let (sum, accumulate) = match &mut self.sum {
            Some(sum) => (sum.again(), entry > 0),
            None => (g.dh.again().slice(first, rows).output(), true),
        };
        let add = |shape, a, b, c, accumulate| {
            let (bias, residual) = (In::null(), In::null());
            cuda.product(Product::<T, f32> { shape, a, b, scale: 1.0, c, ldc: hidden, accumulate, bias, residual })
        };
        let weight = Operand::new(g.weight.slice(entry, entries).input(), hidden);
        add([rows, hidden, entries], Operand::new(dl, ld), weight, sum, accumulate)?;
        let Some(dweight) = &mut g.dweight else { return Ok(()) };
        let (dweight, h) = (dweight.again().slice(entry, entries).output(), g.h.slice(first, rows).input());
        add([entries, hidden, rows], Operand::transposed(dl, ld), Operand::new(h, hidden), dweight, true)
    }

    /// Adds the sum to dh, once all chunks are in it.
    pub fn finish(self, cuda: &Cuda, g: &mut Gradients, [first, rows]: [usize; 2]) -> Result<()> {
        let Some(sum) = self.sum else { return Ok(()) };
        let (n, dh) = (rows * g.h.cols(), g.dh.again().slice(first, rows));
        kernels::LogprobHeadDh::<T> { sum: sum.as_input(), dh: dh.output(), n: n as u64 }
            .launch(cuda, n.div_ceil(4 * 256).min(16 * cuda.multiprocessors()))
    }
}
