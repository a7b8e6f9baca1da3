//! TIES (Yadav et al., "TIES-merging", arXiv:2306.01708): trim task vectors to their largest elements, elect signs, add up
//! those that agree.
//!
//! As in mergekit each tensor is trimmed on its own (the authors' code trims the whole model at once), weights count in the
//! election, and the disjoint mean is weighted. Of n elements int(density n) are kept, at least one; of equal magnitudes, those
//! with the lower index.

use super::number::Real;
use super::parts::{Rule, Tensor, Words};
use super::registry::{Base, DENSITY, Entry, LAMBDA, Prepare, Values, WEIGHT, normalize, rescale};
use super::sparse::{self, Count, End, Mask, Row};
use super::task_arithmetic::combine;
use crate::error::Result;

pub const ENTRY: Entry = Entry {
    name: "ties",
    paper: "Yadav et al., arXiv:2306.01708",
    summary: "trim differences from the base to the largest, elect signs, take the mean of those that agree",
    random: false,
    base: Base::Required,
    models: (1, usize::MAX),
    params: &[WEIGHT, DENSITY, LAMBDA, normalize(true), rescale(&["none", "l1"], "none")],
    prepare: Prepare { single: prepare, double: prepare },
};

fn prepare<'a, T: Real>(tensor: &Tensor<T>, values: &Values, _: Words<'a>) -> Result<Rule<'a, T>> {
    let kept = |density: f64| ((density * tensor.len() as f64) as usize).max(1);
    let masks = trim(tensor, &values.each("density").into_iter().map(kept).collect::<Vec<_>>())?;
    let masks = if values.choice("rescale") == "l1" { sparse::restore_l1(tensor, masks)? } else { masks };
    combine(masks, values, true)
}

/// Masks that keep so many of the largest elements of each task vector.
pub(super) fn trim<'a, T: Real>(tensor: &Tensor<T>, kept: &[usize]) -> Result<Vec<Mask<'a, T>>> {
    let trimmed = kept.iter().enumerate().filter(|(_, kept)| **kept < tensor.len());
    let counts: Vec<Count> = trimmed.map(|(model, &elements)| Count { model, elements, end: End::Largest }).collect();
    let mut masks: Vec<Mask<T>> = kept.iter().map(|_| sparse::all()).collect();
    if counts.is_empty() {
        return Ok(masks);
    }
    for (count, cut) in counts.iter().zip(sparse::cuts(tensor, &counts)?) {
        masks[count.model] = Box::new(move |start: usize, row: &mut Row<T>| cut.keep(start, row.delta));
    }
    Ok(masks)
}
