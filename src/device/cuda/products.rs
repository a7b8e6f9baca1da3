//! Matrix products: `c = a b`, or `+=`, with what a linear layer adds after it. For ops; leading dimensions let them work on
//! columns of a larger matrix and in the workspace.

use super::{Cuda, Element, Grid, In, Out, kernels};
use crate::error::Result;

/// A matrix in device memory, row by row, as it stands in a product or transposed.
#[derive(Clone, Copy)]
pub struct Operand<'a, T> {
    pub(super) memory: In<'a, T>,
    pub(super) ld: usize,
    pub(super) transposed: bool,
}

impl<'a, T> Operand<'a, T> {
    /// Element (i, j) is `memory[i * ld + j]`.
    pub fn new(memory: In<'a, T>, ld: usize) -> Self {
        Self { memory, ld, transposed: false }
    }

    /// Element (i, j) is `memory[j * ld + i]`.
    pub fn transposed(memory: In<'a, T>, ld: usize) -> Self {
        Self { memory, ld, transposed: true }
    }
}

/// `c = scale a b + bias + residual`, or `c += ...`. Sums are f32, and rounded to `O` once. There are kernels for (T, O) = (f32,
/// f32), (bf16, bf16) and (bf16, f32), and for these pairs of operands:
///
/// | | a | b | |
/// |---|---|---|---|
/// | y = x W^T | as it stands | transposed | |
/// | dx = dy W | as it stands | as it stands | |
/// | dW = dy^T x | transposed | as it stands | c is f32 |
pub struct Product<'a, T, O> {
    /// `[m, n, k]`
    pub shape: [usize; 3],
    /// `[m, k]`
    pub a: Operand<'a, T>,
    /// `[k, n]`
    pub b: Operand<'a, T>,
    /// Of the sum over k.
    pub scale: f32,
    /// `[m, n]`
    pub c: Out<'a, O>,
    /// Elements from one row of `c` to the next.
    pub ldc: usize,
    /// Adds to what is in `c`.
    pub accumulate: bool,
    /// `[n]`, or null.
    pub bias: In<'a, T>,
    /// `[m, n]`, its rows as far apart as those of `c`, or null.
    pub residual: In<'a, O>,
}

/// Rows and columns of C that a block makes; the kernel's `TILE` is the index.
const TILES: [[usize; 2]; 3] = [[128, 128], [64, 64], [16, 64]];
/// Steps of k that are in shared memory at a time.
const STAGES: usize = 4;
/// Bytes of a row of an operand in one step of k, and of the gap that keeps rows in other banks.
const STEP_BYTES: usize = 64;
const GAP_BYTES: usize = 16;

/// Dynamic shared memory of a block: its steps of both operands, then in their place the tile of C.
fn shared_bytes([m, n]: [usize; 2], [acols, bcols]: [bool; 2], width: usize) -> usize {
    let operand = |rows: usize, by_cols: bool| match by_cols {
        true => STEP_BYTES / width * (rows * width + GAP_BYTES),
        false => rows * (STEP_BYTES + GAP_BYTES),
    };
    (STAGES * (operand(m, acols) + operand(n, bcols))).max(m * (n + 8) * size_of::<f32>())
}

impl Cuda {
    /// Puts a product into the stream.
    pub fn product<T: Element, O: Element>(&self, p: Product<T, O>) -> Result<()> {
        if let Some(blas) = &self.blas
            && blas.product(&self.context, &p)?
        {
            return Ok(());
        }
        self.own_product(p)
    }

    /// The tile does not change the result: every element is one sum over k in ascending order.
    fn own_product<T: Element, O: Element>(&self, p: Product<T, O>) -> Result<()> {
        let [m, n, k] = p.shape;
        let (acols, bcols) = (p.a.transposed, !p.b.transposed);
        let tile = self.tile([m, n], !acols && !bcols);
        let [tile_m, tile_n] = TILES[tile];
        let shared = shared_bytes(TILES[tile], [acols, bcols], T::DTYPE.bytes());
        kernels::Gemm::<T, O> {
            acols: acols.into(),
            bcols: bcols.into(),
            tile: tile as u32,
            a: p.a.memory,
            b: p.b.memory,
            c: p.c,
            bias: p.bias,
            residual: p.residual,
            m: m as u32,
            n: n as u32,
            k: k as u32,
            lda: p.a.ld as u32,
            ldb: p.b.ld as u32,
            ldc: p.ldc as u32,
            scale: p.scale,
            accumulate: p.accumulate.into(),
        }
        .launch(self, Grid::from(m.div_ceil(tile_m) * n.div_ceil(tile_n)).shared(shared))
    }

    /// The largest tile that gives every multiprocessor a block.
    fn tile(&self, [m, n]: [usize; 2], flat: bool) -> usize {
        let fills = |&tile: &usize| {
            let [tile_m, tile_n] = TILES[tile];
            m.div_ceil(tile_m) * n.div_ceil(tile_n) >= self.multiprocessors()
        };
        match flat && m <= TILES[2][0] {
            true => 2,
            false => [0, 1].into_iter().find(fills).unwrap_or(1),
        }
    }
}
