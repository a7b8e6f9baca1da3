use half::bf16;

use super::{Gather, GatherAdd, GatherBackward, Rows, Scatter, check};
use crate::device::cuda::{Element, In, Out, kernels};
use crate::device::{Cuda, DType, range};
use crate::error::Result;

impl Rows for Cuda {
    fn gather(&self, a: Gather<Self>) -> Result<()> {
        let _range = range(c"gather");
        check("gather", a.y.shape(), a.x.shape(), a.index.shape())?;
        let shape = a.y.shape();
        let (from, to) = (a.index.input(), In::null());
        match a.x.dtype() {
            DType::Bf16 => Move::<bf16> { x: a.x.input(), from, y: a.y.output(), to, shape, add: false }.launch(self),
            _ => Move::<f32> { x: a.x.input(), from, y: a.y.output(), to, shape, add: false }.launch(self),
        }
    }

    fn gather_add(&self, a: GatherAdd<Self>) -> Result<()> {
        let _range = range(c"gather_add");
        check("gather_add", a.y.shape(), a.x.shape(), a.index.shape())?;
        let shape = a.y.shape();
        let (from, to) = (a.index.input(), In::null());
        match a.x.dtype() {
            DType::Bf16 => Move::<bf16> { x: a.x.input(), from, y: a.y.output(), to, shape, add: true }.launch(self),
            _ => Move::<f32> { x: a.x.input(), from, y: a.y.output(), to, shape, add: true }.launch(self),
        }
    }

    fn gather_backward(&self, a: GatherBackward<Self>) -> Result<()> {
        let _range = range(c"gather_backward");
        check("gather_backward", a.dy.shape(), a.dx.shape(), a.index.shape())?;
        match (a.dy.dtype(), a.dx.dtype()) {
            (DType::Bf16, DType::Bf16) => add::<bf16, bf16>(self, a),
            (DType::Bf16, _) => add::<bf16, f32>(self, a),
            _ => add::<f32, f32>(self, a),
        }
    }

    fn scatter(&self, a: Scatter<Self>) -> Result<()> {
        let _range = range(c"scatter");
        check("scatter", a.x.shape(), a.y.shape(), a.index.shape())?;
        let shape = a.x.shape();
        let (from, to) = (In::null(), a.index.input());
        match a.x.dtype() {
            DType::Bf16 => Move::<bf16> { x: a.x.input(), from, y: a.y.output(), to, shape, add: false }.launch(self),
            _ => Move::<f32> { x: a.x.input(), from, y: a.y.output(), to, shape, add: false }.launch(self),
        }
    }
}

/// `y[to[i]] =` or `+= x[from[i]]`; a table that is null stands for i itself.
struct Move<'a, T> {
    x: In<'a, T>,
    from: In<'a, u32>,
    y: Out<'a, T>,
    to: In<'a, u32>,
    /// Rows that move, and their columns.
    shape: [usize; 2],
    add: bool,
}

impl<T: Element> Move<'_, T> {
    fn launch(self, cuda: &Cuda) -> Result<()> {
        let [rows, cols] = self.shape;
        let threads = rows * cols.div_ceil(16 / size_of::<T>());
        kernels::MoveRows::<T> {
            x: self.x,
            from: self.from,
            y: self.y,
            to: self.to,
            rows: rows as u32,
            cols: cols as u32,
            add: u32::from(self.add),
        }
        .launch(cuda, threads.div_ceil(kernels::MoveRows::<T>::THREADS as usize))
    }
}

fn add<T: Element, O: Element>(cuda: &Cuda, a: GatherBackward<Cuda>) -> Result<()> {
    const WARP: usize = 32;
    let [rows, cols] = a.dy.shape();
    let mut order = cuda.workspace(0, rows);
    let mut sorted = cuda.workspace(rows * size_of::<u32>(), rows);
    kernels::RankRows { index: a.index.input(), order: order.again(), sorted: sorted.again(), rows: rows as u32 }
        .launch(cuda, rows.div_ceil(kernels::RankRows::THREADS as usize / WARP))?;
    let cols_of_block = kernels::AddRows::<T, O>::THREADS as usize * 16 / size_of::<T>();
    kernels::AddRows::<T, O> {
        dy: a.dy.input(),
        order: order.as_input(),
        sorted: sorted.as_input(),
        dx: a.dx.output(),
        rows: rows as u32,
        cols: cols as u32,
    }
    .launch(cuda, [rows, cols.div_ceil(cols_of_block)])
}
