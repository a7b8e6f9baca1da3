use rayon::prelude::*;

use super::{Args, Lerp};
use crate::device::Cpu;
use crate::error::Result;
use crate::ops::simd::dispatched;

const ELEMENTS_PER_TASK: usize = 1 << 14;

impl Lerp for Cpu {
    fn lerp(&self, a: Args<Self>) -> Result<()> {
        a.check()?;
        let (keep, share) = a.shares();
        let (x, y) = (a.x.f32s(), a.y.into_f32s());
        self.run(|| {
            let tasks = y.par_chunks_mut(ELEMENTS_PER_TASK).zip(x.par_chunks(ELEMENTS_PER_TASK));
            tasks.for_each(|(y, x)| lerp(self.isa(), keep, share, x, y));
        });
        Ok(())
    }
}

dispatched! {
    fn lerp(keep: f32, share: f32, x: &[f32], y: &mut [f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = keep * *y + share * x;
        }
    }
}
