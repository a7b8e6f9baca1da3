//! How examples become micro-batches.

use std::ops::Range;

use super::batch::{Batch, Extent, Read, Sharing, Temperature, extent_of, pack};
use super::dataset::Example;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Packing {
    /// Rows of a micro-batch, unless a single example has more.
    pub budget: usize,
    pub sharing: Sharing,
    pub read: Read,
    /// Of log-probabilities.
    pub temperature: Temperature,
}

impl Packing {
    /// Completions of shared prompts, at temperature 1.
    pub const fn new(budget: usize) -> Self {
        Self { budget, sharing: Sharing::On, read: Read::Completions, temperature: Temperature::ONE }
    }

    /// Consecutive batches, each with the range of `examples` it holds.
    pub fn batches<'a>(&self, examples: &'a [&'a Example]) -> impl Iterator<Item = (Range<usize>, Batch)> + 'a {
        let Self { sharing, read, temperature, .. } = *self;
        let ranges = pack(examples, self.budget, sharing).into_iter();
        ranges.map(move |range| {
            let batch = Batch::reading(read, examples[range.clone()].iter().copied(), sharing);
            (range, Batch { temperature, ..batch })
        })
    }

    /// Sizes of the examples, which [`largest`](Self::largest) and [`bound`](Self::bound) read.
    pub fn extents<'a>(&self, examples: impl IntoIterator<Item = &'a Example>) -> Vec<Extent> {
        let extent = |example| {
            let extent = extent_of(example, self.sharing);
            match self.read {
                Read::Completions => extent,
                Read::Last { .. } => Extent { targets: extent.sequences, ..extent },
            }
        };
        examples.into_iter().map(extent).collect()
    }

    /// The largest of the batches that consecutive examples of these sizes give: what [`batches`](Self::batches)
    /// would make, without making it.
    pub fn largest<'a>(&self, extents: impl IntoIterator<Item = &'a Extent>) -> Extent {
        let (mut largest, mut batch) = (Extent::default(), Extent::default());
        for extent in extents {
            if batch.rows > 0 && batch.rows + extent.rows > self.budget {
                batch = Extent::default();
            }
            batch = batch.join(*extent);
            largest = largest.max(batch);
        }
        largest
    }

    /// An upper bound on the batches that any `at_most` examples of these sizes can give, in any order.
    pub fn bound(&self, extents: &[Extent], at_most: usize) -> Extent {
        let most = |f: fn(&Extent) -> usize| extents.iter().map(f).max().unwrap_or(0);
        let all = |f: fn(&Extent) -> usize| {
            let mut sizes: Vec<usize> = extents.iter().map(f).collect();
            sizes.sort_unstable_by(|a, b| b.cmp(a));
            sizes.iter().take(at_most).sum::<usize>()
        };
        let rows = all(|e| e.rows).min(self.budget.max(most(|e| e.rows)));
        // A full batch of the examples that have most of it per row.
        let bound = |f: fn(&Extent) -> usize| {
            let density = extents.iter().map(|e| f(e) as f64 / e.rows as f64).fold(0.0, f64::max);
            all(f).min((density * rows as f64).ceil() as usize)
        };
        Extent {
            rows,
            targets: bound(|e| e.targets),
            segments: bound(|e| e.segments),
            sequences: bound(|e| e.sequences),
            longest: most(|e| e.longest),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Sequence;
    use proptest::prelude::*;

    fn pair(prompt: usize, chosen: usize, rejected: usize) -> Example {
        let sequence = |len: usize, fill: u32| {
            let ids = [vec![1; prompt], vec![fill; len]].concat();
            Sequence::new(ids, prompt)
        };
        Example { sequences: vec![sequence(chosen, 2), sequence(rejected, 3)], ..Example::default() }
    }

    proptest! {
        #[test]
        fn sizes_are_those_of_the_batches(
            lens in proptest::collection::vec((1usize..9, 1usize..9, 1usize..9), 1..20),
            budget in 1usize..60,
            at_most in 1usize..8,
            shared in proptest::bool::ANY,
            last in proptest::bool::ANY,
        ) {
            let sharing = if shared { Sharing::On } else { Sharing::Off };
            let read = if last { Read::Last { pad: Some(2) } } else { Read::Completions };
            let packing = Packing { sharing, read, ..Packing::new(budget) };
            let examples: Vec<Example> = lens.into_iter().map(|(p, c, r)| pair(p, c, r)).collect();
            let bound = packing.bound(&packing.extents(&examples), at_most);
            let all: Vec<&Example> = examples.iter().rev().collect();
            for step in all.chunks(at_most) {
                let mut largest = Extent::default();
                for (_, batch) in packing.batches(step) {
                    prop_assert_eq!(batch.extent().max(bound), bound);
                    largest = largest.max(batch.extent());
                }
                prop_assert_eq!(packing.largest(&packing.extents(step.iter().copied())), largest);
            }
        }
    }
}
