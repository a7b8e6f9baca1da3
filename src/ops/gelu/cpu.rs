use rayon::prelude::*;

use super::{Backward, CUBIC, Curve, Forward, Gelu, SQRT_2_OVER_PI};
use crate::device::Cpu;
use crate::error::Result;
use crate::ops::simd::{dispatched, erf, exp};

const ELEMENTS_PER_TASK: usize = 1 << 13;
const SQRT_HALF: f32 = std::f32::consts::FRAC_1_SQRT_2;
/// 1 / sqrt(2 pi)
const PEAK: f32 = 0.398_942_3;
/// u = LINEAR x + CUBE x^3
const LINEAR: f32 = SQRT_2_OVER_PI as f32;
const CUBE: f32 = (SQRT_2_OVER_PI * CUBIC) as f32;
/// Beyond it the tanh curve is exactly 0 or x, and its powers of x would overflow.
const SATURATED: f32 = 30.0;

impl Gelu for Cpu {
    fn gelu(&self, a: Forward<Self>) -> Result<()> {
        a.check()?;
        let forward = if a.curve == Curve::Exact { forward_exact } else { forward_tanh };
        let (x, y) = (a.x.f32s(), a.y.into_f32s());
        self.run(|| {
            let tasks = y.par_chunks_mut(ELEMENTS_PER_TASK).zip(x.par_chunks(ELEMENTS_PER_TASK));
            tasks.for_each(|(y, x)| forward(self.isa(), x, y));
        });
        Ok(())
    }

    fn gelu_backward(&self, a: Backward<Self>) -> Result<()> {
        a.check()?;
        let backward = if a.curve == Curve::Exact { backward_exact } else { backward_tanh };
        let (dy, x, dx) = (a.dy.f32s(), a.x.f32s(), a.dx.into_f32s());
        self.run(|| {
            let tasks = dx.par_chunks_mut(ELEMENTS_PER_TASK).zip(dy.par_chunks(ELEMENTS_PER_TASK));
            tasks.zip(x.par_chunks(ELEMENTS_PER_TASK)).for_each(|((dx, dy), x)| backward(self.isa(), dy, x, dx));
        });
        Ok(())
    }
}

#[inline(always)]
fn gate_exact(x: f32) -> f32 {
    0.5 + 0.5 * erf(x * SQRT_HALF)
}

/// sigmoid(2 u) of a clamped x: no 1 + tanh, which would cancel for negative u.
#[inline(always)]
fn gate_tanh(x: f32) -> f32 {
    let u = x * (CUBE * x * x + LINEAR);
    1.0 / (1.0 + exp(-2.0 * u))
}

dispatched! {
    fn forward_exact(x: &[f32], y: &mut [f32]) {
        y.iter_mut().zip(x).for_each(|(y, x)| *y = x * gate_exact(*x));
    }
}

dispatched! {
    fn forward_tanh(x: &[f32], y: &mut [f32]) {
        y.iter_mut().zip(x).for_each(|(y, x)| *y = x * gate_tanh(x.clamp(-SATURATED, SATURATED)));
    }
}

dispatched! {
    fn backward_exact(dy: &[f32], x: &[f32], dx: &mut [f32]) {
        for ((dx, dy), x) in dx.iter_mut().zip(dy).zip(x) {
            *dx = dy * (gate_exact(*x) + x * (PEAK * exp(-0.5 * x * x)));
        }
    }
}

dispatched! {
    fn backward_tanh(dy: &[f32], x: &[f32], dx: &mut [f32]) {
        for ((dx, dy), x) in dx.iter_mut().zip(dy).zip(x) {
            let x = x.clamp(-SATURATED, SATURATED);
            let p = gate_tanh(x);
            *dx = dy * (p + x * (p * (1.0 - p) * 2.0 * (3.0 * CUBE * x * x + LINEAR)));
        }
    }
}
