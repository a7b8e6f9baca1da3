//! Soup: the weighted mean of models (Wortsman et al., "Model soups", arXiv:2203.05482).
//!
//! theta = sum_i w_i theta_i / sum_i w_i; without `normalize`, the sum itself.

use super::number::Real;
use super::parts::{Part, Rule, Tensor, Words};
use super::registry::{Base, Entry, Prepare, Values, WEIGHT, normalize};
use crate::error::{Error, Result};

pub const ENTRY: Entry = Entry {
    name: "linear",
    paper: "Wortsman et al., arXiv:2203.05482",
    summary: "soup: the weighted mean of models",
    random: false,
    base: Base::None,
    models: (2, usize::MAX),
    params: &[WEIGHT, normalize(true)],
    prepare: Prepare { single: prepare, double: prepare },
};

fn prepare<'a, T: Real>(_: &Tensor<T>, values: &Values, _: Words<'a>) -> Result<Rule<'a, T>> {
    let weights = values.each("weight");
    let total = if values.on("normalize") { divisor(&weights)? } else { 1.0 };
    let (weights, total): (Vec<T>, T) = (weights.into_iter().map(T::of).collect(), T::of(total));
    Ok(Box::new(move |part| {
        weighted_sum(part, &weights);
        part.out.iter_mut().for_each(|out| *out = *out / total);
    }))
}

/// The sum of weights, which is about to be divided by.
pub(super) fn divisor(weights: &[f64]) -> Result<f64> {
    let total: f64 = weights.iter().sum();
    if total.abs() < 1e-8 {
        let detail =
            format!("{weights:?} sum to {total}, which nothing can be divided by; change one, or normalize off");
        return Err(Error::option("--weight", detail));
    }
    Ok(total)
}

/// out = sum_i w_i model_i, added up in the order of the models.
pub(super) fn weighted_sum<T: Real>(part: &mut Part<T>, weights: &[T]) {
    part.out.fill(T::default());
    for (model, &weight) in part.models.iter().zip(weights) {
        part.out.iter_mut().zip(model).for_each(|(out, value)| *out += weight * *value);
    }
}
