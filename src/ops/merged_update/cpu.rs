use rayon::prelude::*;

use super::{Args, MergedUpdate, Scalars};
use crate::device::Cpu;
use crate::error::Result;
use crate::ops::simd::dispatched;

const ELEMENTS_PER_TASK: usize = 1 << 14;

impl MergedUpdate for Cpu {
    fn merged_update(&self, a: Args<Self>) -> Result<()> {
        a.check()?;
        let scalars = a.step.scalars();
        let (grad, weight) = (a.grad.f32s(), a.weight.into_f32s());
        let (m, v) = (a.first_moment.into_f32s(), a.second_moment.into_f32s());
        self.run(|| {
            let states = m.par_chunks_mut(ELEMENTS_PER_TASK).zip(v.par_chunks_mut(ELEMENTS_PER_TASK));
            let tasks = weight.par_chunks_mut(ELEMENTS_PER_TASK).zip(grad.par_chunks(ELEMENTS_PER_TASK));
            tasks.zip(states).for_each(|((weight, grad), (m, v))| adamw(self.isa(), scalars, grad, weight, m, v));
        });
        Ok(())
    }
}

dispatched! {
    fn adamw(s: Scalars, grad: &[f32], weight: &mut [f32], m: &mut [f32], v: &mut [f32]) {
        for (((w, g), m), v) in weight.iter_mut().zip(grad).zip(m).zip(v) {
            let g = g * s.clip;
            *m = s.beta1 * *m + s.fresh1 * g;
            *v = s.beta2 * *v + s.fresh2 * g * g;
            *w = *w * s.keep - s.rate * *m / (v.sqrt() * s.root + s.eps);
        }
    }
}
