//! SLERP: from one model to another along the great circle through both (Shoemake, "Animating rotation with quaternion
//! curves", SIGGRAPH 1985), each tensor as one vector.
//!
//! theta = sin((1-t) O)/sin(O) base + sin(t O)/sin(O) model, with O the angle between the two. As in mergekit it is the
//! directions that make the angle and the vectors themselves that are added, and a cosine beyond +-0.9995 takes the straight
//! line (1-t) base + t model, also between opposites, where the circle is undefined.

use std::ops::Bound;

use super::number::Real;
use super::parts::{Rule, Tensor, Words};
use super::registry::{Base, Domain, Entry, ParamSpec, Prepare, Values};
use crate::error::Result;

pub const ENTRY: Entry = Entry {
    name: "slerp",
    paper: "Shoemake, SIGGRAPH 1985",
    summary: "from the base to one other model along the great circle through both",
    random: false,
    base: Base::Required,
    models: (1, 1),
    params: &[ParamSpec {
        name: "t",
        per_model: false,
        domain: Domain::Number { default: None, range: (Bound::Included(0.0), Bound::Included(1.0)) },
        help: "how far to go: 0 = the base, 1 = the other model",
    }],
    prepare: Prepare { single: prepare, double: prepare },
};

/// Beyond this cosine the sine is too small to divide by.
const COLINEAR: f64 = 0.9995;
/// Below this norm a vector has no direction.
const NO_DIRECTION: f64 = 1e-8;

fn prepare<'a, T: Real>(tensor: &Tensor<T>, values: &Values, _: Words<'a>) -> Result<Rule<'a, T>> {
    let t = values.number("t");
    let sums = tensor.map_parts(|part| {
        let mut sums = [0.0; 3];
        for (a, b) in part.base.iter().zip(&part.models[0]) {
            let (a, b) = (a.to_f64(), b.to_f64());
            (sums[0], sums[1], sums[2]) = (sums[0] + a * a, sums[1] + b * b, sums[2] + a * b);
        }
        sums
    })?;
    let total = |i: usize| sums.iter().map(|part: &[f64; 3]| part[i]).sum::<f64>();
    let norm = |i| Some(total(i).sqrt()).filter(|norm| *norm > NO_DIRECTION).unwrap_or(1.0);
    let cosine = (total(2) / (norm(0) * norm(1))).clamp(-1.0, 1.0);
    let (a, b) = if cosine.abs() > COLINEAR {
        (1.0 - t, t)
    } else {
        let angle = cosine.acos();
        (((1.0 - t) * angle).sin() / angle.sin(), (t * angle).sin() / angle.sin())
    };
    let (a, b) = (T::of(a), T::of(b));
    Ok(Box::new(move |part| {
        let ends = part.base.iter().zip(&part.models[0]);
        part.out.iter_mut().zip(ends).for_each(|(out, (base, model))| *out = a * *base + b * *model);
    }))
}
