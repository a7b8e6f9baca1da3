//! One tensor of every model, part by part: nobody holds a whole one, so that merging takes the same memory whatever the
//! size of a tensor and the number of models.

use rayon::prelude::*;

use super::number::Real;
use crate::error::Result;

/// Elements of a part, or one row where that has more: the parts of several models stay in a core's cache together.
const PART: usize = 1 << 14;

/// Where the values of a tensor come from, row-major.
pub trait Source<T>: Sync {
    /// Writes the values from `start` on into `out`.
    fn read(&self, start: usize, out: &mut [T]) -> Result<()>;
}

impl<T: Real> Source<T> for &[T] {
    fn read(&self, start: usize, out: &mut [T]) -> Result<()> {
        out.copy_from_slice(&self[start..start + out.len()]);
        Ok(())
    }
}

/// One tensor as the models have it.
pub struct Tensor<'a, T> {
    pub shape: Vec<usize>,
    /// What task vectors start from. Without it, the models are taken as they are: where a method wants task vectors,
    /// they are that already.
    pub base: Option<&'a dyn Source<T>>,
    pub models: Vec<&'a dyn Source<T>>,
}

/// Whole rows of a tensor, as every model has them. A row is the last dimension, or all of a tensor with one dimension.
#[derive(Default)]
pub struct Part<T: Real> {
    /// Index of the first element.
    pub start: usize,
    pub row: usize,
    /// Empty without a base.
    pub base: Vec<T>,
    pub models: Vec<Vec<T>>,
    pub out: Vec<T>,
    /// Whatever a rule wants to keep from one part to the next, so as not to allocate it again.
    pub scratch: Scratch<T>,
}

#[derive(Default)]
pub struct Scratch<T: Real> {
    pub values: Vec<T>,
    pub words: Vec<u32>,
    pub ranked: Vec<T::Ranked>,
}

impl<T: Real> Part<T> {
    /// Makes task vectors of the models: their differences from the base.
    pub fn subtract_base(&mut self) {
        for model in &mut self.models {
            model.iter_mut().zip(&self.base).for_each(|(model, base)| *model = *model - *base);
        }
    }
}

impl<T: Real> Tensor<'_, T> {
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn row(&self) -> usize {
        self.shape.last().copied().unwrap_or(1).max(1)
    }

    /// Elements of every part but perhaps the last.
    pub fn part_len(&self) -> usize {
        (PART / self.row()).max(1) * self.row()
    }

    /// Reads the part with this number.
    pub fn load(&self, number: usize, part: &mut Part<T>) -> Result<()> {
        let start = number * self.part_len();
        let len = self.part_len().min(self.len() - start);
        (part.start, part.row) = (start, self.row());
        let read = |source: &dyn Source<T>, out: &mut Vec<T>| {
            out.resize(len, T::default());
            source.read(start, out)
        };
        if let Some(base) = self.base {
            read(base, &mut part.base)?;
        }
        part.models.resize_with(self.models.len(), Vec::new);
        self.models.iter().zip(&mut part.models).try_for_each(|(source, out)| read(*source, out))?;
        part.out.resize(len, T::default());
        Ok(())
    }

    fn parts(&self) -> usize {
        self.len().div_ceil(self.part_len())
    }

    /// What `look` finds in each part, in their order, whatever the number of threads.
    pub fn map_parts<R: Send>(&self, look: impl Fn(&mut Part<T>) -> R + Sync) -> Result<Vec<R>> {
        let parts = (0..self.parts()).into_par_iter();
        parts.map_init(Part::default, |part, number| self.load(number, part).map(|()| look(part))).collect()
    }

    /// Counts of what is in the parts, which no order of adding can change: one vector of `bins` for each thread, as clearing and
    /// adding up more would take longer than counting.
    pub fn count_parts(&self, bins: usize, count: impl Fn(&mut Part<T>, &mut [u64]) + Sync) -> Result<Vec<u64>> {
        let start = || (Part::default(), vec![0; bins]);
        let add = |(mut part, mut counts): (Part<T>, Vec<u64>), number| {
            self.load(number, &mut part)?;
            count(&mut part, &mut counts);
            Ok((part, counts))
        };
        let parts = (0..self.parts()).into_par_iter();
        // Ranges are halved.
        let share = (self.parts() / rayon::current_num_threads().next_power_of_two()).max(1);
        let counted = parts.with_min_len(share).try_fold(start, add).map(|found| found.map(|(_, counts)| counts));
        let counted = counted.try_reduce_with(|mut sum, counts| {
            sum.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
            Ok(sum)
        });
        counted.unwrap_or_else(|| Ok(vec![0; bins]))
    }
}

/// A method that has seen a tensor whole: fills `out` of a part, and may overwrite what the part holds besides.
pub type Rule<'a, T> = Box<dyn Fn(&mut Part<T>) + Sync + 'a>;

/// Random bits for (model, first element, one word for each element): the same whenever they are asked for.
pub type Words<'a> = &'a (dyn Fn(usize, usize, &mut [u32]) + Sync);
