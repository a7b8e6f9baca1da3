use rayon::prelude::*;

use super::{Backward, Forward, SwiGlu};
use crate::device::Cpu;
use crate::error::Result;
use crate::ops::simd::{dispatched, exp};

const ELEMENTS_PER_TASK: usize = 1 << 13;

impl SwiGlu for Cpu {
    fn swiglu(&self, a: Forward<Self>) -> Result<()> {
        a.check()?;
        let (gate, up, y) = (a.gate.f32s(), a.up.f32s(), a.y.into_f32s());
        self.run(|| {
            let tasks = y.par_chunks_mut(ELEMENTS_PER_TASK).zip(gate.par_chunks(ELEMENTS_PER_TASK));
            let tasks = tasks.zip(up.par_chunks(ELEMENTS_PER_TASK));
            tasks.for_each(|((y, gate), up)| forward(self.isa(), gate, up, y));
        });
        Ok(())
    }

    fn swiglu_backward(&self, a: Backward<Self>) -> Result<()> {
        a.check()?;
        let (dy, gate, up) = (a.dy.f32s(), a.gate.f32s(), a.up.f32s());
        let (dgate, dup) = (a.dgate.into_f32s(), a.dup.into_f32s());
        self.run(|| {
            let outputs = dgate.par_chunks_mut(ELEMENTS_PER_TASK).zip(dup.par_chunks_mut(ELEMENTS_PER_TASK));
            outputs.enumerate().for_each(|(task, (dgate, dup))| {
                let at = task * ELEMENTS_PER_TASK..task * ELEMENTS_PER_TASK + dgate.len();
                backward(self.isa(), &dy[at.clone()], &gate[at.clone()], &up[at], dgate, dup);
            });
        });
        Ok(())
    }
}

dispatched! {
    fn forward(gate: &[f32], up: &[f32], y: &mut [f32]) {
        for ((y, g), u) in y.iter_mut().zip(gate).zip(up) {
            *y = g / (1.0 + exp(-g)) * u;
        }
    }
}

dispatched! {
    fn backward(dy: &[f32], gate: &[f32], up: &[f32], dgate: &mut [f32], dup: &mut [f32]) {
        for ((((dgate, dup), dy), g), u) in dgate.iter_mut().zip(dup).zip(dy).zip(gate).zip(up) {
            let s = 1.0 / (1.0 + exp(-g));
            *dgate = dy * u * (s + g * s * (1.0 - s));
            *dup = dy * g * s;
        }
    }
}
