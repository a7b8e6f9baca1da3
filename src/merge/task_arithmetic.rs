//! Task arithmetic (Ilharco et al., "Editing models with task arithmetic", arXiv:2212.04089), and what methods make of task
//! vectors that they have sparsified.
//!
//! tau_i = theta_i - base; theta = base + lambda sum_i w_i tau_i. With `normalize` the sum is divided by sum_i w_i.
//! With an election of signs (Yadav et al., arXiv:2306.01708, as mergekit does it: weights count), of each element only
//! those w_i tau_i take part whose sign is that of their sum, and the divisor is the sum of their weights; a sum of exactly 0
//! elects +, and a divisor of 0 divides nothing.

use super::linear::{divisor, weighted_sum};
use super::number::Real;
use super::parts::{Part, Rule, Tensor, Words};
use super::registry::{Base, Entry, LAMBDA, Prepare, Values, WEIGHT, normalize};
use super::sparse::{self, Mask};
use crate::error::Result;

pub const ENTRY: Entry = Entry {
    name: "task_arithmetic",
    paper: "Ilharco et al., arXiv:2212.04089",
    summary: "add weighted differences from the base to the base",
    random: false,
    base: Base::Required,
    models: (1, usize::MAX),
    params: &[WEIGHT, LAMBDA, normalize(false)],
    prepare: Prepare { single: prepare, double: prepare },
};

fn prepare<'a, T: Real>(tensor: &Tensor<T>, values: &Values, _: Words<'a>) -> Result<Rule<'a, T>> {
    combine(tensor.models.iter().map(|_| sparse::all()).collect(), values, false)
}

/// base + lambda times what the sparsified task vectors come to.
pub(super) fn combine<'a, T: Real>(masks: Vec<Mask<'a, T>>, values: &Values, elect: bool) -> Result<Rule<'a, T>> {
    let (weights, normalize) = (values.each("weight"), values.on("normalize"));
    let total = if normalize && !elect { divisor(&weights)? } else { 1.0 };
    let weights: Vec<T> = weights.into_iter().map(T::of).collect();
    let (total, lambda) = (T::of(total), T::of(values.number("lambda")));
    Ok(Box::new(move |part| {
        sparse::apply(part, &masks);
        weighted_sum(part, &weights);
        if elect {
            sum_of_elected(part, &weights, normalize);
        }
        let out = part.out.iter_mut().zip(&part.base);
        out.for_each(|(out, base)| *out = *base + *out / total * lambda);
    }))
}

/// Replaces sums by the sums of those that agree with them in sign.
fn sum_of_elected<T: Real>(part: &mut Part<T>, weights: &[T], normalize: bool) {
    let Part { models, out, scratch, .. } = part;
    let (zero, one) = (T::default(), T::of(1.0));
    scratch.values.clear();
    scratch.values.resize(out.len(), zero);
    // What is summed lives in `values`, as `out` still holds the signs.
    let sums = &mut scratch.values;
    for (model, &weight) in models.iter_mut().zip(weights) {
        for ((value, sum), elected) in model.iter_mut().zip(sums.iter_mut()).zip(out.iter()) {
            let weighted = *value * weight;
            let agrees = if *elected >= zero { weighted > zero } else { weighted < zero };
            *sum += if agrees { weighted } else { zero };
            *value = if agrees { weight } else { zero };
        }
    }
    if normalize {
        let (first, rest) = models.split_first_mut().expect("a merge has models");
        rest.iter().for_each(|model| first.iter_mut().zip(model).for_each(|(sum, weight)| *sum += *weight));
        sums.iter_mut().zip(first).for_each(|(sum, divisor)| {
            *sum = *sum / if *divisor == zero { one } else { *divisor };
        });
    }
    std::mem::swap(out, sums);
}
