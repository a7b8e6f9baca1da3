use std::cmp::Reverse;

use rayon::prelude::*;

use super::{Args, DRAW, INFINITE, NOT_A_NUMBER, Sample, Sampling, UNIT_BITS};
use crate::device::{Cpu, Isa};
use crate::error::Result;
use crate::ops::simd::{dispatched, exp_of_negative};

impl Sample for Cpu {
    fn sample(&self, a: Args<Self>) -> Result<()> {
        a.check()?;
        let vocab = a.logits.cols();
        let (logits, draws, ids) = (a.logits.into_f32s(), a.draws.u32s(), a.ids.into_u32s());
        self.run(|| {
            let rows = logits.par_chunks_mut(vocab).zip(draws.par_chunks(DRAW)).zip(ids);
            rows.for_each(|((logits, draw), id)| *id = choose(self.isa(), logits, &a.sampling, draw));
        });
        Ok(())
    }
}

fn choose(isa: Isa, logits: &mut [f32], sampling: &Sampling, draw: &[u32]) -> u32 {
    if let Some(bad) = logits.iter().position(|l| l.is_nan() || *l == f32::INFINITY) {
        return bad as u32 | if logits[bad].is_nan() { NOT_A_NUMBER } else { INFINITE };
    }
    let likeliest = (1..logits.len()).fold(0, |best, id| if logits[id] > logits[best] { id } else { best });
    let temperature = sampling.temperature as f32;
    if temperature == 0.0 {
        return likeliest as u32;
    }
    weigh(isa, logits[likeliest], temperature, logits);
    let (weights, total) = (&*logits, logits.iter().map(|w| mass(*w)).sum::<u64>());
    let nucleus = match sampling.share() {
        u64::MAX => Nucleus { least: 0.0, last: weights.len(), mass: total },
        share => nucleus(weights, (u128::from(total) * u128::from(share)).div_ceil(1 << 64) as u64),
    };
    let mut left = ((u128::from(sampling.word(draw)) * u128::from(nucleus.mass)) >> 64) as u64;
    let drawn = weights.iter().enumerate().position(|(id, w)| {
        let held = nucleus.of(id, *w);
        let past = left < held;
        left = left.saturating_sub(held);
        past
    });
    drawn.unwrap_or(likeliest) as u32
}

dispatched! {
    /// Logits become weights: 1 for the likeliest.
    fn weigh(max: f32, temperature: f32, logits: &mut [f32]) {
        logits.iter_mut().for_each(|x| *x = exp_of_negative((*x - max) / temperature));
    }
}

/// NaN counts nothing.
fn mass(weight: f32) -> u64 {
    (weight * (1u64 << UNIT_BITS) as f32) as u64
}

/// Tokens of a larger weight than `least`, and of those of this weight the ids up to `last`.
struct Nucleus {
    least: f32,
    last: usize,
    mass: u64,
}

impl Nucleus {
    fn of(&self, id: usize, weight: f32) -> u64 {
        if weight > self.least || (weight == self.least && id <= self.last) { mass(weight) } else { 0 }
    }
}

/// The likeliest tokens until they hold `wanted`.
fn nucleus(weights: &[f32], wanted: u64) -> Nucleus {
    let mut order: Vec<usize> = (0..weights.len()).filter(|id| mass(weights[*id]) > 0).collect();
    order.sort_unstable_by_key(|id| (Reverse(weights[*id].to_bits()), *id));
    let mut held = 0;
    let last = order.into_iter().find(|id| {
        held += mass(weights[*id]);
        held >= wanted
    });
    last.map_or(Nucleus { least: 0.0, last: 0, mass: 0 }, |last| Nucleus { least: weights[last], last, mass: held })
}
