//! Model breadcrumbs (Davari and Belilovsky, arXiv:2312.06795): of each task vector drop the largest elements, which are
//! outliers, and the smallest, which are noise; then add up, or elect signs first (`breadcrumbs_ties`).
//!
//! Of n elements the int(gamma n) largest are dropped and the int(density n) below them kept, which may be none. Where both
//! do not fit, outliers are kept. A tensor with int(gamma n) = 0 keeps its largest element: mergekit before 0.1.5 dropped the
//! whole task vector there. Of equal magnitudes, those with the lower index count as smaller.

use std::ops::Bound;

use super::number::Real;
use super::parts::{Rule, Tensor, Words};
use super::registry::{Base, DENSITY, Domain, Entry, LAMBDA, ParamSpec, Prepare, Values, WEIGHT, normalize, rescale};
use super::sparse::{self, Count, End, Mask, Row};
use super::task_arithmetic::combine;
use crate::error::Result;

const GAMMA: ParamSpec = ParamSpec {
    name: "gamma",
    per_model: true,
    domain: Domain::Number { default: Some(0.01), range: (Bound::Included(0.0), Bound::Excluded(1.0)) },
    help: "share of a task vector that is dropped from its largest elements",
};

const PARAMS: &[ParamSpec] = &[WEIGHT, DENSITY, GAMMA, LAMBDA, normalize(false), rescale(&["none", "l1"], "none")];

pub const LINEAR: Entry = Entry {
    name: "breadcrumbs",
    paper: "Davari and Belilovsky, arXiv:2312.06795",
    summary: "drop the largest and the smallest elements of the differences from the base, add up",
    random: false,
    base: Base::Required,
    models: (1, usize::MAX),
    params: PARAMS,
    prepare: Prepare { single: linear, double: linear },
};

pub const TIES: Entry = Entry {
    name: "breadcrumbs_ties",
    paper: "Davari and Belilovsky, arXiv:2312.06795, with TIES' election",
    summary: "drop the largest and the smallest elements of the differences from the base, add up those whose sign is elected",
    random: false,
    base: Base::Required,
    models: (1, usize::MAX),
    params: PARAMS,
    prepare: Prepare { single: ties, double: ties },
};

fn linear<'a, T: Real>(tensor: &Tensor<T>, values: &Values, _: Words<'a>) -> Result<Rule<'a, T>> {
    combine(masks(tensor, values)?, values, false)
}

fn ties<'a, T: Real>(tensor: &Tensor<T>, values: &Values, _: Words<'a>) -> Result<Rule<'a, T>> {
    combine(masks(tensor, values)?, values, true)
}

fn masks<'a, T: Real>(tensor: &Tensor<T>, values: &Values) -> Result<Vec<Mask<'a, T>>> {
    let n = tensor.len();
    let share = |of: f64| (of * n as f64) as usize;
    let mut masks: Vec<Mask<T>> = tensor.models.iter().map(|_| sparse::all()).collect();
    let mut counts = Vec::new();
    for (model, (density, gamma)) in values.each("density").into_iter().zip(values.each("gamma")).enumerate() {
        if density < 1.0 {
            let small = n.saturating_sub(share(density) + share(gamma));
            // Two cuts in one order: the `small` first fall, and so do those after the first `small + kept`.
            let count = |elements| Count { model, elements, end: End::Smallest };
            counts.extend([count(small), count(small + share(density))]);
        }
    }
    if counts.is_empty() {
        return Ok(masks);
    }
    let cuts = sparse::cuts(tensor, &counts)?;
    for (count, cuts) in counts.chunks_exact(2).zip(cuts.chunks_exact(2)) {
        let (small, kept) = (cuts[0], cuts[1]);
        masks[count[0].model] = Box::new(move |start, row: &mut Row<T>| {
            small.drop(start, row.delta);
            kept.keep(start, row.delta);
        });
    }
    if values.choice("rescale") == "l1" { sparse::restore_l1(tensor, masks) } else { Ok(masks) }
}
