use rayon::prelude::*;

use super::{Args, SumSquares};
use crate::device::Cpu;
use crate::error::Result;
use crate::ops::simd::{dispatched, dot};

/// Elements summed in f32 lanes before f64 takes over.
const BLOCK: usize = 4096;
/// Blocks of one task.
const TASK: usize = 64;

impl SumSquares for Cpu {
    fn sum_squares(&self, a: Args<Self>) -> Result<()> {
        a.check()?;
        let x = a.x.f32s();
        let task = |x: &[f32]| x.chunks(BLOCK).map(|x| f64::from(square(self.isa(), x))).sum::<f64>();
        // `map` keeps the order of the tasks and the sum below is sequential: no thread can change it.
        let sums: Vec<f64> = self.run(|| x.par_chunks(BLOCK * TASK).map(task).collect());
        a.sum.into_f32s()[0] = sums.iter().sum::<f64>() as f32;
        Ok(())
    }
}

dispatched! {
    fn square(x: &[f32]) -> f32 {
        dot(x, x)
    }
}
