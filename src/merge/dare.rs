//! DARE (Yu et al., "Language models are super Mario", arXiv:2311.03099): drop elements of task vectors at random and rescale
//! what is left; then add up (`dare_linear`), or elect signs first as TIES does (`dare_ties`).
//!
//! An element is kept with probability density. The paper, and mergekit until May 2024, multiply by 1/density
//! (`inverse_density`), which keeps the expected task vector; mergekit now restores the L1 norm of the tensor (`l1`,
//! the default here too).

use super::number::Real;
use super::parts::{Rule, Tensor, Words};
use super::registry::{Base, DENSITY, Entry, LAMBDA, ParamSpec, Prepare, RESCALES, Values, WEIGHT, normalize, rescale};
use super::sparse::{self, Mask, Row};
use super::task_arithmetic::combine;
use crate::error::Result;

const PARAMS: &[ParamSpec] = &[WEIGHT, DENSITY, LAMBDA, normalize(false), rescale(RESCALES, "l1")];

pub const LINEAR: Entry = Entry {
    name: "dare_linear",
    paper: "Yu et al., arXiv:2311.03099",
    summary: "drop elements of the differences from the base at random, rescale, add up",
    random: true,
    base: Base::Required,
    models: (1, usize::MAX),
    params: PARAMS,
    prepare: Prepare { single: linear, double: linear },
};

pub const TIES: Entry = Entry {
    name: "dare_ties",
    paper: "Yu et al., arXiv:2311.03099, with TIES' election",
    summary: "drop elements of the differences from the base at random, rescale, add up those whose sign is elected",
    random: true,
    base: Base::Required,
    models: (1, usize::MAX),
    params: PARAMS,
    prepare: Prepare { single: ties, double: ties },
};

fn linear<'a, T: Real>(tensor: &Tensor<T>, values: &Values, words: Words<'a>) -> Result<Rule<'a, T>> {
    combine(masks(tensor, values, words)?, values, false)
}

fn ties<'a, T: Real>(tensor: &Tensor<T>, values: &Values, words: Words<'a>) -> Result<Rule<'a, T>> {
    combine(masks(tensor, values, words)?, values, true)
}

fn masks<'a, T: Real>(tensor: &Tensor<T>, values: &Values, words: Words<'a>) -> Result<Vec<Mask<'a, T>>> {
    let inverse = values.choice("rescale") == "inverse_density";
    let densities = values.each("density");
    let masks =
        densities.into_iter().enumerate().map(|(model, density)| drop(model, density, inverse, words)).collect();
    if values.choice("rescale") == "l1" { sparse::restore_l1(tensor, masks) } else { Ok(masks) }
}

/// Keeps elements with probability `density`; with `inverse` it multiplies them by 1/density.
pub(super) fn drop<'a, T: Real>(model: usize, density: f64, inverse: bool, words: Words<'a>) -> Mask<'a, T> {
    if density >= 1.0 {
        return sparse::all();
    }
    let factor = T::of(if inverse { 1.0 / density } else { 1.0 });
    Box::new(move |start, row: &mut Row<T>| {
        row.words.resize(row.delta.len(), 0);
        words(model, start, row.words);
        for (value, &word) in row.delta.iter_mut().zip(row.words.iter()) {
            *value = if keeps(word, density) { *value * factor } else { T::default() };
        }
    })
}

/// Whether a uniform word falls below a probability.
pub(super) fn keeps(word: u32, probability: f64) -> bool {
    f64::from(word) < probability * 4_294_967_296.0
}
