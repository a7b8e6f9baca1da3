use half::bf16;

use super::{Attention, Backward, Dims, Forward};
use crate::device::cuda::{Element, Grid, Out, kernels};
use crate::device::{Cuda, DType, range};
use crate::error::{Error, Result};

/// Rows of a block, as `kernels/attention.cuh` has it.
const ROWS: usize = 64;
/// Columns of a panel that kernels are made for, with two bytes and with four.
const WIDTHS: [&[usize]; 2] = [&[32, 64, 96, 128], &[32, 64, 128]];
const WIDEST: usize = 128;
/// Wider than any window; positions are below half of it.
const NO_WINDOW: u32 = 0x7fff_ffff;

/// How a block's tiles lie, as `Tiles` in `kernels/attention.cuh` has it.
#[derive(Clone, Copy)]
struct Layout {
    dims: Dims,
    /// Columns of a panel.
    width: usize,
    panels: usize,
    /// Bytes of a panel's row.
    row_bytes: usize,
    /// Whether elements have two bytes.
    half: bool,
}

impl Layout {
    fn new<T: Element>(dims: Dims) -> Self {
        let bytes = T::DTYPE.bytes();
        let half = bytes == 2;
        let even = dims.head_dim.div_ceil(dims.head_dim.div_ceil(WIDEST));
        let width = WIDTHS[usize::from(!half)].iter().copied().find(|width| *width >= even).unwrap_or(WIDEST);
        Self { dims, width, panels: dims.head_dim.div_ceil(width), row_bytes: width * bytes + 16, half }
    }

    /// Q and K in whole rows, one panel of V.
    fn forward_bytes(&self) -> usize {
        let keys = if self.half { 64 } else { 32 };
        ((ROWS + keys) * self.panels + keys) * self.row_bytes
    }

    /// Two tiles that stay, and two that pass by.
    fn backward_bytes(&self) -> usize {
        let (stream, stages) = if self.half { (32, 2) } else { (16, 1) };
        2 * (ROWS + stages * stream) * self.panels * self.row_bytes
    }

    /// Blocks for `rows` rows of `segments` segments, each of which may end with part of a tile.
    fn grid(&self, rows: usize, segments: usize, shared_bytes: usize) -> Grid {
        let grid = [rows / ROWS + segments, self.dims.kv_heads, self.panels];
        Grid::from(grid).shared(shared_bytes)
    }

    fn group(&self) -> usize {
        self.dims.heads / self.dims.kv_heads
    }

    fn window(&self) -> u32 {
        self.dims.window.and_then(|window| u32::try_from(window).ok()).map_or(NO_WINDOW, |window| window.min(NO_WINDOW))
    }
}

fn forward<T: Element>(cuda: &Cuda, a: Forward<Cuda>) -> Result<()> {
    let (at, n, rows) = (Layout::new::<T>(a.dims), a.segments.rows(), a.q.rows());
    kernels::Attention::<T> {
        cols: at.width as u32,
        segments: a.segments.input(),
        q: a.q.input(),
        k: a.k.input(),
        v: a.v.input(),
        o: a.o.output(),
        lse: a.lse.output(),
        n: n as u32,
        group: at.group() as u32,
        head_dim: at.dims.head_dim as u32,
        window: at.window(),
        scale: at.dims.scale() as f32,
    }
    .launch(cuda, at.grid(rows * at.group(), n, at.forward_bytes()))
}

fn backward<T: Element>(cuda: &Cuda, a: Backward<Cuda>) -> Result<()> {
    let (at, n, rows) = (Layout::new::<T>(a.dims), a.segments.rows(), a.q.rows());
    let (bytes, has) = (rows * at.dims.heads * size_of::<f32>(), cuda.workspace_bytes());
    if bytes > has {
        let detail = format!("{rows} rows of {} heads need {bytes} bytes of workspace, it has {has}", at.dims.heads);
        return Err(Error::op("attention_backward", detail));
    }
    let mut delta: Out<f32> = cuda.workspace(0, rows * at.dims.heads);
    kernels::AttentionQueries::<T> {
        cols: at.width as u32,
        segments: a.segments.input(),
        d_o: a.d_o.input(),
        q: a.q.input(),
        k: a.k.input(),
        v: a.v.input(),
        o: a.o.input(),
        lse: a.lse.input(),
        delta: delta.again(),
        dq: a.dq.output(),
        n: n as u32,
        group: at.group() as u32,
        head_dim: at.dims.head_dim as u32,
        window: at.window(),
        scale: at.dims.scale() as f32,
    }
    .launch(cuda, at.grid(rows * at.group(), n, at.backward_bytes()))?;
    kernels::AttentionKeys::<T> {
        cols: at.width as u32,
        segments: a.segments.input(),
        d_o: a.d_o.input(),
        q: a.q.input(),
        k: a.k.input(),
        v: a.v.input(),
        lse: a.lse.input(),
        delta: delta.as_input(),
        dk: a.dk.output(),
        dv: a.dv.output(),
        n: n as u32,
        group: at.group() as u32,
        head_dim: at.dims.head_dim as u32,
        window: at.window(),
        scale: at.dims.scale() as f32,
    }
    .launch(cuda, at.grid(rows, n, at.backward_bytes()))
}

impl Attention for Cuda {
    fn attention(&self, a: Forward<Self>) -> Result<()> {
        let _range = range(c"attention");
        a.check()?;
        match a.q.dtype() {
            DType::Bf16 => forward::<bf16>(self, a),
            _ => forward::<f32>(self, a),
        }
    }

    fn attention_backward(&self, a: Backward<Self>) -> Result<()> {
        let _range = range(c"attention_backward");
        a.check()?;
        match a.q.dtype() {
            DType::Bf16 => backward::<bf16>(self, a),
            _ => backward::<f32>(self, a),
        }
    }
}
