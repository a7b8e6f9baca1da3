use rayon::prelude::*;

use super::{Gather, GatherAdd, GatherBackward, Rows, Scatter, check};
use crate::device::Cpu;
use crate::error::Result;
use crate::ops::gemm::{Numbers, widened};

/// Rows of `dx` that one task owns. It reads the whole index, so each row adds in the order of the index.
const ROWS_PER_TASK: usize = 1024;

impl Rows for Cpu {
    fn gather(&self, a: Gather<Self>) -> Result<()> {
        check("gather", a.y.shape(), a.x.shape(), a.index.shape())?;
        let cols = a.x.cols();
        let rows = a.y.into_f32s().chunks_exact_mut(cols).zip(a.index.u32s());
        match Numbers::of(a.x) {
            Numbers::F32(x) => rows.for_each(|(y, index)| y.copy_from_slice(&x[*index as usize * cols..][..cols])),
            Numbers::Bf16(x) => rows.for_each(|(y, index)| {
                let x = &x[*index as usize * cols..][..cols];
                y.iter_mut().zip(x).for_each(|(y, x)| *y = widened(*x));
            }),
        }
        Ok(())
    }

    fn gather_add(&self, a: GatherAdd<Self>) -> Result<()> {
        check("gather_add", a.y.shape(), a.x.shape(), a.index.shape())?;
        let cols = a.x.cols();
        let x = a.x.f32s();
        for (y, index) in a.y.into_f32s().chunks_exact_mut(cols).zip(a.index.u32s()) {
            y.iter_mut().zip(&x[*index as usize * cols..][..cols]).for_each(|(y, x)| *y += x);
        }
        Ok(())
    }

    fn gather_backward(&self, a: GatherBackward<Self>) -> Result<()> {
        check("gather_backward", a.dy.shape(), a.dx.shape(), a.index.shape())?;
        let (cols, n) = (a.dx.cols(), a.dx.rows());
        let (dy, index) = (a.dy.f32s(), a.index.u32s());
        assert!(index.iter().all(|i| (*i as usize) < n), "gather_backward: an index lies past {n} rows");
        let dx = a.dx.into_f32s();
        self.run(|| {
            dx.par_chunks_mut(ROWS_PER_TASK * cols).enumerate().for_each(|(task, dx)| {
                let first = task * ROWS_PER_TASK;
                for (dy, index) in dy.chunks_exact(cols).zip(index) {
                    let Some(row) = (*index as usize).checked_sub(first).filter(|row| row * cols < dx.len()) else {
                        continue;
                    };
                    dx[row * cols..][..cols].iter_mut().zip(dy).for_each(|(dx, dy)| *dx += dy);
                }
            });
        });
        Ok(())
    }

    fn scatter(&self, a: Scatter<Self>) -> Result<()> {
        check("scatter", a.x.shape(), a.y.shape(), a.index.shape())?;
        let cols = a.x.cols();
        let y = a.y.into_f32s();
        for (x, index) in a.x.f32s().chunks_exact(cols).zip(a.index.u32s()) {
            y[*index as usize * cols..][..cols].copy_from_slice(x);
        }
        Ok(())
    }
}
