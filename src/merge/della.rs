//! DELLA (Deep et al., "DELLA-merging", arXiv:2406.11617): DARE whose probability of keeping an element grows with its
//! rank by magnitude in its row; signs are elected (`della`) or not (`della_linear`).
//!
//! p = density - epsilon + 2 epsilon rank / (n - 1), with ranks 0..n of a row of n elements; of equal magnitudes the one
//! with the lower index ranks lower. A tensor with one dimension is one row; one with more than two has rows of its last
//! dimension (mergekit ranks along the second). A row of one element is kept with probability density, where mergekit
//! makes it NaN. The paper multiplies what is kept by 1/p (`inverse_density`), mergekit restores the L1 norm (`l1`, the default
//! here too).

use std::ops::Bound;

use super::dare::keeps;
use super::number::Real;
use super::parts::{Rule, Tensor, Words};
use super::registry::{
    Base, DENSITY, Domain, Entry, LAMBDA, ParamSpec, Prepare, RESCALES, Values, WEIGHT, normalize, rescale,
};
use super::sparse::{self, Mask, Row};
use super::task_arithmetic::combine;
use crate::error::{Error, Result};
use crate::params::flag;

const EPSILON: ParamSpec = ParamSpec {
    name: "epsilon",
    per_model: true,
    domain: Domain::Number { default: Some(0.15), range: (Bound::Included(0.0), Bound::Excluded(0.5)) },
    help: "how far the probability of keeping an element reaches below and above density, by rank",
};

const fn params(normalized: bool) -> [ParamSpec; 6] {
    [WEIGHT, DENSITY, EPSILON, LAMBDA, normalize(normalized), rescale(RESCALES, "l1")]
}

pub const TIES: Entry = Entry {
    name: "della",
    paper: "Deep et al., arXiv:2406.11617",
    summary: "drop elements of the differences from the base at random, small ones rather, take the mean of elected signs",
    random: true,
    base: Base::Required,
    models: (1, usize::MAX),
    params: &params(true),
    prepare: Prepare { single: ties, double: ties },
};

pub const LINEAR: Entry = Entry {
    name: "della_linear",
    paper: "Deep et al., arXiv:2406.11617",
    summary: "drop elements of the differences from the base at random, small ones rather, rescale, add up",
    random: true,
    base: Base::Required,
    models: (1, usize::MAX),
    params: &params(false),
    prepare: Prepare { single: linear, double: linear },
};

fn linear<'a, T: Real>(tensor: &Tensor<T>, values: &Values, words: Words<'a>) -> Result<Rule<'a, T>> {
    combine(masks(tensor, values, words)?, values, false)
}

fn ties<'a, T: Real>(tensor: &Tensor<T>, values: &Values, words: Words<'a>) -> Result<Rule<'a, T>> {
    combine(masks(tensor, values, words)?, values, true)
}

fn masks<'a, T: Real>(tensor: &Tensor<T>, values: &Values, words: Words<'a>) -> Result<Vec<Mask<'a, T>>> {
    let inverse = values.choice("rescale") == "inverse_density";
    let mut masks: Vec<Mask<T>> = Vec::new();
    for (model, (density, epsilon)) in values.each("density").into_iter().zip(values.each("epsilon")).enumerate() {
        if density < 1.0 && !(density - epsilon > 0.0 && density + epsilon < 1.0) {
            let detail = format!("{epsilon} around a density of {density} leaves (0, 1); choose a smaller one");
            return Err(Error::option(flag(EPSILON.name), detail));
        }
        masks.push(if density < 1.0 { drop(model, density, epsilon, inverse, words) } else { sparse::all() });
    }
    if values.choice("rescale") == "l1" { sparse::restore_l1(tensor, masks) } else { Ok(masks) }
}

fn drop<'a, T: Real>(model: usize, density: f64, epsilon: f64, inverse: bool, words: Words<'a>) -> Mask<'a, T> {
    Box::new(move |start, part: &mut Row<T>| {
        part.words.resize(part.delta.len(), 0);
        words(model, start, part.words);
        for (row, words) in part.delta.chunks_exact_mut(part.len).zip(part.words.chunks_exact(part.len)) {
            part.ranked.clear();
            part.ranked.extend(row.iter().zip(0..).map(|(value, at)| value.ranked(at)));
            part.ranked.sort_unstable();
            let step = if part.len > 1 { 2.0 * epsilon / (part.len - 1) as f64 } else { 0.0 };
            let lowest = if part.len > 1 { density - epsilon } else { density };
            for (rank, &ranked) in part.ranked.iter().enumerate() {
                let (at, probability) = (T::at(ranked), lowest + step * rank as f64);
                let kept = if inverse { row[at] / T::of(probability) } else { row[at] };
                // Looked up: no processor predicts a branch on random bits.
                row[at] = [T::default(), kept][usize::from(keeps(words[at], probability))];
            }
        }
    })
}
