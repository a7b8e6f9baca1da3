use rayon::prelude::*;

use super::{Direction, Rope, Rotate};
use crate::device::Cpu;
use crate::error::Result;
use crate::ops::simd::dispatched;

const ROWS_PER_TASK: usize = 64;

impl Rope for Cpu {
    fn rope(&self, a: Rotate<Self>) -> Result<()> {
        a.check()?;
        let (cols, half, head_dim) = (a.x.cols(), a.cos.cols(), a.head_dim);
        let (positions, cos, sin) = (a.positions.u32s(), a.cos.f32s(), a.sin.f32s());
        let sign = if a.direction == Direction::Forward { 1.0 } else { -1.0 };
        let x = a.x.into_f32s();
        self.run(|| {
            let tasks = x.par_chunks_mut(ROWS_PER_TASK * cols).zip(positions.par_chunks(ROWS_PER_TASK));
            tasks.for_each(|(x, positions)| {
                for (row, position) in x.chunks_exact_mut(cols).zip(positions) {
                    let at = *position as usize * half;
                    rotate_row(self.isa(), row, head_dim, &cos[at..at + half], &sin[at..at + half], sign);
                }
            });
        });
        Ok(())
    }
}

dispatched! {
    fn rotate_row(row: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32], sign: f32) {
        let half = cos.len();
        for head in row.chunks_exact_mut(head_dim) {
            let (low, high) = head[..2 * half].split_at_mut(half);
            for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                let (x, y) = (*low, *high);
                *low = x * cos - y * (sin * sign);
                *high = y * cos + x * (sin * sign);
            }
        }
    }
}
