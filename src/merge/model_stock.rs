//! Model stock (Jang et al., "Model stock: all we need is just a few fine-tuned models", arXiv:2403.19522): between the base
//! and the mean of N models, at the foot of the perpendicular that the angle between their task vectors gives.
//!
//! c = the mean cosine over pairs of task vectors, t = N c / (1 + (N-1) c) (Eq. 6 of the paper for N models),
//! theta = t mean_i theta_i + (1-t) base; for each tensor, or each of its rows with `filter_wise`. Cosines are clamped to
//! [-1, 1] and divided by norms of 1e-6 or more, as in mergekit. Where c = -1/(N-1) makes t infinite the base stays, also as
//! there; a negative c gives a negative t, which leaves the base away from the models.

use super::number::Real;
use super::parts::{Part, Rule, Tensor, Words};
use super::registry::{Base, Domain, Entry, ParamSpec, Prepare, Values};
use crate::error::Result;

pub const ENTRY: Entry = Entry {
    name: "model_stock",
    paper: "Jang et al., arXiv:2403.19522",
    summary: "between the base and the mean of models, the nearer to the base the less they agree",
    random: false,
    base: Base::Required,
    models: (2, usize::MAX),
    params: &[ParamSpec {
        name: "filter_wise",
        per_model: false,
        domain: Domain::Switch { default: false },
        help: "an own angle for each row of a tensor",
    }],
    prepare: Prepare { single: prepare, double: prepare },
};

fn prepare<'a, T: Real>(tensor: &Tensor<T>, values: &Values, _: Words<'a>) -> Result<Rule<'a, T>> {
    if values.on("filter_wise") {
        return Ok(Box::new(|part| {
            let len = part.row;
            for start in (0..part.out.len()).step_by(len) {
                let t = share(part.models.len(), &gram(part, start..start + len));
                interpolate(part, start..start + len, t);
            }
        }));
    }
    let found = tensor.map_parts(|part| gram(part, 0..part.out.len()))?;
    let mut sums = vec![0.0; tensor.models.len() * tensor.models.len()];
    found.iter().for_each(|part| sums.iter_mut().zip(part).for_each(|(sum, part)| *sum += part));
    let t = share(tensor.models.len(), &sums);
    Ok(Box::new(move |part| interpolate(part, 0..part.out.len(), t)))
}

/// Products of all pairs of task vectors, [models, models] with the lower half left 0.
fn gram<T: Real>(part: &Part<T>, range: std::ops::Range<usize>) -> Vec<f64> {
    let models = part.models.len();
    let mut products = vec![0.0; models * models];
    for i in 0..models {
        for j in i..models {
            let values = part.models[i][range.clone()].iter().zip(&part.models[j][range.clone()]);
            let products_of = values.zip(&part.base[range.clone()]).map(|((a, b), base)| {
                let (a, b) = (*a - *base, *b - *base);
                a.to_f64() * b.to_f64()
            });
            products[i * models + j] = products_of.sum();
        }
    }
    products
}

/// t: how far to go towards the mean.
fn share(models: usize, products: &[f64]) -> f64 {
    let product = |i: usize, j: usize| products[i * models + j];
    let cosine = |(i, j): (usize, usize)| {
        let norms = (product(i, i) * product(j, j)).sqrt();
        (product(i, j) / norms.max(1e-6)).clamp(-1.0, 1.0)
    };
    let pairs = (0..models).flat_map(|i| (i + 1..models).map(move |j| (i, j)));
    let count = models as f64;
    let mean = pairs.map(cosine).sum::<f64>() / (count * (count - 1.0) / 2.0);
    let denominator = 1.0 + (count - 1.0) * mean;
    if denominator.abs() < 1e-6 { 0.0 } else { count * mean / denominator }
}

fn interpolate<T: Real>(part: &mut Part<T>, range: std::ops::Range<usize>, t: f64) {
    let (share, rest) = (T::of(t), T::of(1.0 - t));
    let count = T::of(part.models.len() as f64);
    let out = &mut part.out[range.clone()];
    out.fill(T::default());
    for model in &part.models {
        out.iter_mut().zip(&model[range.clone()]).for_each(|(out, value)| *out += *value);
    }
    let base = &part.base[range];
    out.iter_mut().zip(base).for_each(|(out, base)| *out = share * (*out / count) + rest * *base);
}
