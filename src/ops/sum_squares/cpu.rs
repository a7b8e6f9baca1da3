use half::bf16;
use rayon::prelude::*;

use super::{Args, SumSquares};
use crate::device::Cpu;
use crate::error::Result;
use crate::ops::gemm::{Numbers, widened};
use crate::ops::simd::{dispatched, dot};

/// Elements summed in f32 lanes before f64 takes over.
const BLOCK: usize = 4096;
/// Blocks of one task.
const TASK: usize = 64;

impl SumSquares for Cpu {
    fn sum_squares(&self, a: Args<Self>) -> Result<()> {
        a.check()?;
        let block = |x: &[f32]| f64::from(square(self.isa(), x));
        let widened = |x: &[bf16]| {
            let mut wide = [0.0; BLOCK];
            wide.iter_mut().zip(x).for_each(|(wide, x)| *wide = widened(*x));
            block(&wide[..x.len()])
        };
        // `map` keeps the order of the tasks and the sum below is sequential: no thread can change it.
        let sums: Vec<f64> = self.run(|| match Numbers::of(a.x) {
            Numbers::F32(x) => x.par_chunks(BLOCK * TASK).map(|x| x.chunks(BLOCK).map(block).sum::<f64>()).collect(),
            Numbers::Bf16(x) => x.par_chunks(BLOCK * TASK).map(|x| x.chunks(BLOCK).map(widened).sum::<f64>()).collect(),
        });
        a.sum.into_f32s()[0] = sums.iter().sum::<f64>() as f32;
        Ok(())
    }
}

dispatched! {
    fn square(x: &[f32]) -> f32 {
        dot(x, x)
    }
}
