use super::{Gather, GatherAdd, GatherBackward, Rows, Scatter, check};
use crate::device::Reference;
use crate::error::Result;

impl Rows for Reference {
    fn gather(&self, a: Gather<Self>) -> Result<()> {
        check("gather", a.y.shape(), a.x.shape(), a.index.shape())?;
        let (cols, x) = (a.x.cols(), a.x.f64s());
        let y = a.y.into_f64s();
        for (i, index) in a.index.u32s().iter().enumerate() {
            for j in 0..cols {
                y[i * cols + j] = x[*index as usize * cols + j];
            }
        }
        Ok(())
    }

    fn gather_add(&self, a: GatherAdd<Self>) -> Result<()> {
        check("gather_add", a.y.shape(), a.x.shape(), a.index.shape())?;
        let (cols, x) = (a.x.cols(), a.x.f64s());
        let y = a.y.into_f64s();
        for (i, index) in a.index.u32s().iter().enumerate() {
            for j in 0..cols {
                y[i * cols + j] += x[*index as usize * cols + j];
            }
        }
        Ok(())
    }

    fn gather_backward(&self, a: GatherBackward<Self>) -> Result<()> {
        check("gather_backward", a.dy.shape(), a.dx.shape(), a.index.shape())?;
        let (cols, dy) = (a.dx.cols(), a.dy.f64s());
        let dx = a.dx.into_f64s();
        for (i, index) in a.index.u32s().iter().enumerate() {
            for j in 0..cols {
                dx[*index as usize * cols + j] += dy[i * cols + j];
            }
        }
        Ok(())
    }

    fn scatter(&self, a: Scatter<Self>) -> Result<()> {
        check("scatter", a.x.shape(), a.y.shape(), a.index.shape())?;
        let (cols, x) = (a.x.cols(), a.x.f64s());
        let y = a.y.into_f64s();
        for (i, index) in a.index.u32s().iter().enumerate() {
            for j in 0..cols {
                y[*index as usize * cols + j] = x[i * cols + j];
            }
        }
        Ok(())
    }
}
