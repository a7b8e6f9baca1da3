use std::cell::RefCell;

use rayon::prelude::*;

use super::{Args, BANNED, INFINITE, NOT_A_NUMBER, ODDS, Row, Sample, UNIT_BITS, certain, odds};
use crate::device::{Cpu, Isa, Scratch};
use crate::error::Result;
use crate::ops::simd::{LANES, dispatched, exp_of_negative, largest};

thread_local! {
    /// The weights of one row; grown to the vocabulary and kept.
    static WEIGHTS: RefCell<Scratch> = RefCell::default();
}

/// Memory that a thread keeps for its row.
pub fn scratch_bytes(vocab: usize) -> usize {
    Scratch::bytes(vocab)
}

impl Sample for Cpu {
    fn sample(&self, a: Args<Self>) -> Result<()> {
        a.check()?;
        let vocab = a.logits.cols();
        let (rows, edits): (&[Row], _) = (bytemuck::cast_slice(a.rows.u32s()), a.edits.u32s());
        let (logits, ids, chances): (&[f32], _, _) = (a.logits.into_f32s(), a.ids.into_u32s(), a.odds.into_u32s());
        self.run(|| {
            let results = ids.par_iter_mut().zip(chances.par_chunks_mut(ODDS));
            logits.par_chunks(vocab).zip(rows).zip(results).for_each(|((logits, row), (id, odds))| {
                WEIGHTS.with_borrow_mut(|scratch| {
                    let (chosen, of) =
                        choose(self.isa(), logits, row, row.edits(edits), &mut scratch.grown(vocab)[..vocab]);
                    *id = chosen;
                    odds.copy_from_slice(&of);
                });
            });
        });
        Ok(())
    }
}

fn choose(isa: Isa, logits: &[f32], row: &Row, edits: &[u32], weights: &mut [f32]) -> (u32, [u32; ODDS]) {
    if !sound(isa, logits) {
        let bad = logits.iter().position(|l| l.is_nan() || *l == f32::INFINITY).expect("just seen");
        return (bad as u32 | if logits[bad].is_nan() { NOT_A_NUMBER } else { INFINITE }, certain());
    }
    weights.copy_from_slice(logits);
    for edit in edits {
        let logit = &mut weights[(edit & !BANNED) as usize];
        *logit = row.edited(*edit, *logit);
    }
    let max = highest(isa, weights);
    let likeliest = weights.iter().position(|l| *l == max).expect("the maximum is one of them");
    if row.temperature == 0.0 {
        return (likeliest as u32, certain());
    }
    let edited = |id: usize| {
        let edit = edits.iter().find(|edit| (*edit & !BANNED) as usize == id);
        edit.map_or(logits[id], |edit| row.edited(*edit, logits[id]))
    };
    weigh(isa, max, row.temperature, weights);
    let kept = Kept::new(isa, weights, row);
    let left = ((u128::from(row.word()) * u128::from(kept.mass)) >> 64) as u64;
    match kept.at(isa, weights, left) {
        Some(id) => (id as u32, odds((edited(id) - max) / row.temperature, kept.mass)),
        None => (likeliest as u32, certain()),
    }
}

dispatched! {
    /// Neither NaN nor above all numbers.
    fn sound(logits: &[f32]) -> bool {
        let mut all = [true; LANES];
        let (vectors, tail) = logits.as_chunks::<LANES>();
        for l in vectors {
            for i in 0..LANES {
                all[i] &= l[i] < f32::INFINITY;
            }
        }
        all.into_iter().all(|all| all) && tail.iter().all(|l| *l < f32::INFINITY)
    }
}

dispatched! {
    fn highest(logits: &[f32]) -> f32 {
        largest(f32::NEG_INFINITY, logits)
    }
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

dispatched! {
    /// What the weights above `least` hold, and those of it if they are `tied` in.
    fn held(least: f32, tied: bool, weights: &[f32]) -> u64 {
        // Sums cannot pass u64: so they need no check, with which they would be no vectors.
        assert!(weights.len() < 1 << (u64::BITS - UNIT_BITS), "more tokens than weights can be told apart for");
        let least = if tied { least } else { least.next_up() };
        let of = |w: f32| {
            let units = if w >= least { w.min(1.0) * (1u64 << UNIT_BITS) as f32 } else { 0.0 };
            // SAFETY: what is kept is a number from 0 to 1. As `mass`, in a way that vectors can do.
            unsafe { units.to_int_unchecked::<i64>() as u64 }
        };
        weights.iter().fold(0, |held, w| held.wrapping_add(of(*w)))
    }
}

/// Weights that are passed over together on the way to the one that is drawn.
const STRIDE: usize = 512;

/// What is drawn from: tokens of a larger weight than `least`, and of those of this weight the ids up to `last`.
struct Kept {
    least: f32,
    last: usize,
    mass: u64,
}

impl Kept {
    fn new(isa: Isa, weights: &[f32], row: &Row) -> Self {
        let all = weights.len() - 1;
        let from = |least: f32| Self { least, last: all, mass: held(isa, least, true, weights) };
        let mut kept = match row.top_k as usize {
            0 => from(0.0),
            k if k >= weights.len() => from(0.0),
            k => from(cut(weights, |_| 1, k as u64).0),
        };
        if kept.mass > 0 && row.share() != u64::MAX {
            let wanted = (u128::from(kept.mass) * u128::from(row.share())).div_ceil(1 << 64).max(1) as u64;
            let (least, above) = cut(weights, mass, wanted);
            // As many of this weight as are needed.
            let ties = (wanted - above).div_ceil(mass(least));
            let of_weight = weights.iter().enumerate().filter(|(_, w)| **w == least).map(|(id, _)| id);
            let last = of_weight.take(ties as usize).last().expect("one is needed");
            kept = Self { least, last, mass: above + ties * mass(least) };
        }
        if row.min_p > kept.least { from(row.min_p) } else { kept }
    }

    /// The token that holds what comes after `left`.
    fn at(&self, isa: Isa, weights: &[f32], mut left: u64) -> Option<usize> {
        let mut passes = |held: u64| {
            let past = left >= held;
            left -= if past { held } else { 0 };
            past
        };
        for (stride, weights) in weights.chunks(STRIDE).enumerate() {
            let first = stride * STRIDE;
            // Where the last token that is kept lies within, each is asked for itself.
            let within = (first..first + weights.len() - 1).contains(&self.last);
            if within || !passes(held(isa, self.least, first <= self.last, weights)) {
                let at = weights.iter().enumerate().position(|(i, w)| !passes(self.of(first + i, *w)));
                if at.is_some() {
                    return at.map(|at| first + at);
                }
            }
        }
        None
    }

    fn of(&self, id: usize, weight: f32) -> u64 {
        if weight > self.least || (weight == self.least && id <= self.last) { mass(weight) } else { 0 }
    }
}

/// The largest weight for which those of it and above hold `wanted`, and what those above it hold: eight bits at a time.
fn cut(weights: &[f32], of: impl Fn(f32) -> u64, wanted: u64) -> (f32, u64) {
    let (mut least, mut above) = (0, 0);
    for shift in [24, 16, 8, 0] {
        let mut held = [0u64; 256];
        for weight in weights {
            // Past 255: another start.
            if let Some(held) = held.get_mut(((weight.to_bits() ^ least) >> shift) as usize) {
                *held += of(*weight);
            }
        }
        let mut digit = 255;
        while digit > 0 && above + held[digit] < wanted {
            above += held[digit];
            digit -= 1;
        }
        least |= (digit as u32) << shift;
    }
    (f32::from_bits(least), above)
}
