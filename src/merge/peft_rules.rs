//! How PEFT combines tensors of adapters (`peft/utils/merge_utils.py`), which is not how mergekit does: signs are elected
//! before weights, the disjoint mean counts instead of weighing, one density holds for all, a random mask is rescaled by
//! 1/density, and of n elements int(density n) stay, which may be none. There is no base and no lambda.

use super::dare;
use super::number::Real;
use super::parts::{Part, Source, Tensor, Words};
use super::sparse::{self, Mask};
use super::ties::trim;
use crate::error::Result;

/// Which sign wins an element: PEFT's `majority_sign_method`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MajoritySign {
    /// That of the sum of values.
    Total,
    /// That of the sum of signs.
    Frequency,
}

/// sum_i w_i x_i.
pub fn linear<T: Real>(tensors: &[&[T]], weights: &[f64]) -> Result<Vec<T>> {
    merged(tensors, weights, |_| Ok(keep_all(tensors)), None)
}

/// The sum of what is largest in each.
pub fn magnitude_prune<T: Real>(tensors: &[&[T]], weights: &[f64], density: f64) -> Result<Vec<T>> {
    merged(tensors, weights, |tensor| largest(tensor, density), None)
}

/// The mean of those among the largest that have the elected sign.
pub fn ties<T: Real>(tensors: &[&[T]], weights: &[f64], density: f64, sign: MajoritySign) -> Result<Vec<T>> {
    merged(tensors, weights, |tensor| largest(tensor, density), Some(sign))
}

/// The sum of what random masks leave. `words` gives random bits by (tensor, element).
pub fn dare_linear<T: Real>(tensors: &[&[T]], weights: &[f64], density: f64, words: Words) -> Result<Vec<T>> {
    merged(tensors, weights, |_| Ok(random(tensors, density, words)), None)
}

/// The mean of those that random masks leave and that have the elected sign.
pub fn dare_ties<T: Real>(
    tensors: &[&[T]],
    weights: &[f64],
    density: f64,
    sign: MajoritySign,
    words: Words,
) -> Result<Vec<T>> {
    merged(tensors, weights, |_| Ok(random(tensors, density, words)), Some(sign))
}

fn keep_all<'a, T: Real>(tensors: &[&[T]]) -> Vec<Mask<'a, T>> {
    tensors.iter().map(|_| sparse::all()).collect()
}

fn largest<'a, T: Real>(tensor: &Tensor<T>, density: f64) -> Result<Vec<Mask<'a, T>>> {
    trim(tensor, &vec![(density * tensor.len() as f64) as usize; tensor.models.len()])
}

fn random<'a, T: Real>(tensors: &[&[T]], density: f64, words: Words<'a>) -> Vec<Mask<'a, T>> {
    (0..tensors.len()).map(|model| dare::drop(model, density, true, words)).collect()
}

/// All tensors have one length, and as many weights as there are of them.
fn merged<'a, T: Real>(
    tensors: &[&[T]],
    weights: &[f64],
    masks: impl FnOnce(&Tensor<T>) -> Result<Vec<Mask<'a, T>>>,
    sign: Option<MajoritySign>,
) -> Result<Vec<T>> {
    assert_eq!(tensors.len(), weights.len(), "one weight for each tensor");
    let models = tensors.iter().map(|tensor| tensor as &dyn Source<T>).collect();
    let tensor = Tensor { shape: vec![tensors.first().map_or(0, |first| first.len())], base: None, models };
    let masks = masks(&tensor)?;
    let weights: Vec<T> = weights.iter().map(|weight| T::of(*weight)).collect();
    let parts = tensor.map_parts(|part| {
        sparse::apply(part, &masks);
        sum(part, &weights, sign);
        std::mem::take(&mut part.out)
    })?;
    Ok(parts.concat())
}

fn sum<T: Real>(part: &mut Part<T>, weights: &[T], sign: Option<MajoritySign>) {
    let zero = T::default();
    let one = T::of(1.0);
    let sign_of = |x: T| {
        if x > zero {
            one
        } else if x < zero {
            -one
        } else {
            zero
        }
    };
    for at in 0..part.out.len() {
        let values = || part.models.iter().map(|model| model[at]);
        let total = |values: &mut dyn Iterator<Item = T>| values.fold(zero, |sum, x| sum + x);
        let elected = match sign {
            None => None,
            Some(MajoritySign::Total) => Some(total(&mut values()) >= zero),
            Some(MajoritySign::Frequency) => Some(total(&mut values().map(sign_of)) >= zero),
        };
        let (mut out, mut count) = (zero, zero);
        for (value, &weight) in values().zip(weights) {
            if elected.is_none_or(|positive| if positive { value > zero } else { value < zero }) {
                (out, count) = (out + weight * value, count + one);
            }
        }
        part.out[at] = if sign.is_some() && count > one { out / count } else { out };
    }
}
