//! Sums over rows on CUDA, for the gradients of weights that every row shares: chunks of rows side by side, then the
//! chunks in order (`kernels/columns.cuh`).

use crate::device::cuda::{Element, Out, kernels};
use crate::device::{Cuda, View, ViewMut};
use crate::error::Result;

/// Rows of a chunk, at least: less is not worth a block.
const CHUNK_ROWS: usize = 64;
/// Chunks, at most: they are added one after the other.
const MOST_CHUNKS: usize = 512;
/// Columns of one block of the second stage.
const FINAL_COLS: usize = 32;

/// How the rows of a sum are cut, and where what they come to is kept.
pub(super) struct Chunks {
    pub rows: usize,
    pub count: usize,
    cols: usize,
}

impl Chunks {
    /// For `sums` sums of each of `cols` columns: as many chunks as the workspace holds.
    pub fn new(cuda: &Cuda, rows: usize, cols: usize, sums: usize) -> Self {
        let room = (cuda.workspace_bytes() / (sums * cols * size_of::<f32>())).clamp(1, MOST_CHUNKS);
        let rows_of_one = rows.div_ceil(room).max(CHUNK_ROWS);
        Self { rows: rows_of_one, count: rows.div_ceil(rows_of_one), cols }
    }

    /// `[chunks, cols]` of sum number `sum`, and of those behind it.
    pub fn partial<'a>(&self, cuda: &'a Cuda, sum: usize) -> Out<'a, f32> {
        let len = self.count * self.cols;
        cuda.workspace(sum * len * size_of::<f32>(), len)
    }

    /// Blocks of the first stage, whose threads have sixteen bytes of columns each.
    pub fn grid<T: Element>(&self) -> [usize; 2] {
        const WARP: usize = 32;
        [self.cols.div_ceil(WARP * 16 / size_of::<T>()), self.count]
    }

    /// `gradient +=` the chunks of sum number `sum`.
    pub fn add(&self, cuda: &Cuda, sum: usize, gradient: ViewMut<Cuda>) -> Result<()> {
        kernels::AddChunks {
            partial: self.partial(cuda, sum).as_input(),
            out: gradient.output(),
            chunks: self.count as u32,
            cols: self.cols as u32,
        }
        .launch(cuda, self.cols.div_ceil(FINAL_COLS))
    }
}

/// `gradient +=` the sum of `x` over its rows.
pub(super) fn add_rows<T: Element>(cuda: &Cuda, x: View<Cuda>, gradient: ViewMut<Cuda>) -> Result<()> {
    let [rows, cols] = x.shape();
    let chunks = Chunks::new(cuda, rows, cols, 1);
    kernels::SumColumns::<T> {
        x: x.input(),
        partial: chunks.partial(cuda, 0),
        rows: rows as u32,
        cols: cols as u32,
        chunk_rows: chunks.rows as u32,
    }
    .launch(cuda, chunks.grid::<T>())?;
    chunks.add(cuda, 0, gradient)
}
