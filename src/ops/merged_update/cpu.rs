use rayon::prelude::*;

use super::{Args, MergedUpdate, Rule};
use crate::device::Cpu;
use crate::error::Result;
use crate::ops::simd::dispatched;

const ELEMENTS_PER_TASK: usize = 1 << 14;

/// The step's scalars, folded on the host in f64 so that each element costs few operations.
#[derive(Clone, Copy)]
struct Scalars {
    clip: f32,
    keep: f32,
    beta1: f32,
    /// 1 - beta1, rounded once: `1 - beta1 as f32` would be off by up to 5e-5 of itself.
    fresh1: f32,
    beta2: f32,
    fresh2: f32,
    /// lr / c1
    rate: f32,
    /// 1 / sqrt(c2)
    root: f32,
    eps: f32,
}

impl MergedUpdate for Cpu {
    fn merged_update(&self, a: Args<Self>) -> Result<()> {
        a.check()?;
        let step = a.step;
        let Rule::AdamW { beta1, beta2, eps } = step.rule;
        let correction = |beta: f64| 1.0 - beta.powf(step.step as f64);
        let scalars = Scalars {
            clip: step.clip as f32,
            keep: (1.0 - step.learning_rate * step.weight_decay) as f32,
            beta1: beta1 as f32,
            fresh1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            fresh2: (1.0 - beta2) as f32,
            rate: (step.learning_rate / correction(beta1)) as f32,
            root: (1.0 / correction(beta2).sqrt()) as f32,
            eps: eps as f32,
        };
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
