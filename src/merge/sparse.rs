//! What sparsifiers share: the exact place of a cut in a tensor that is never sorted or held whole, and the norm that is
//! restored after it.

use super::number::Real;
use super::parts::{Part, Tensor};
use crate::error::Result;

/// Zeroes what falls of a part of one task vector, given with the index of its first element.
pub type Mask<'a, T> = Box<dyn Fn(usize, &mut Row<T>) + Send + Sync + 'a>;

/// What a mask works on, and with.
pub struct Row<'a, T: Real> {
    pub delta: &'a mut [T],
    /// Elements of a row of the tensor; a part has whole rows.
    pub len: usize,
    pub words: &'a mut Vec<u32>,
    pub ranked: &'a mut Vec<T::Ranked>,
}

/// Keeps everything.
pub fn all<'a, T: Real>() -> Mask<'a, T> {
    Box::new(|_, _| {})
}

/// Turns models into sparse task vectors.
pub fn apply<T: Real>(part: &mut Part<T>, masks: &[Mask<T>]) {
    part.subtract_base();
    let (start, len) = (part.start, part.row);
    let scratch = &mut part.scratch;
    for (delta, mask) in part.models.iter_mut().zip(masks) {
        mask(start, &mut Row { delta, len, words: &mut scratch.words, ranked: &mut scratch.ranked });
    }
}

/// From which end magnitudes are counted. Of equal magnitudes the one with the lower index is counted first.
#[derive(Clone, Copy, PartialEq)]
pub enum End {
    Largest,
    Smallest,
}

/// So many magnitudes of one task vector.
#[derive(Clone, Copy)]
pub struct Count {
    pub model: usize,
    pub elements: usize,
    pub end: End,
}

/// Tells the counted elements from the others.
#[derive(Clone, Copy)]
pub struct Cut {
    end: End,
    key: u64,
    /// Of those that equal `key`, the ones before this index are counted.
    ties_before: usize,
}

impl Cut {
    /// Zeroes those of a run of elements that are not counted.
    pub fn keep<T: Real>(&self, start: usize, values: &mut [T]) {
        self.zero(start, values, false);
    }

    /// Zeroes those that are counted.
    pub fn drop<T: Real>(&self, start: usize, values: &mut [T]) {
        self.zero(start, values, true);
    }

    fn zero<T: Real>(&self, start: usize, values: &mut [T], counted: bool) {
        let (ties, others) = values.split_at_mut(self.ties_before.saturating_sub(start).min(values.len()));
        let at = T::of_key(self.key);
        // Four plain comparisons, so that each is a loop without branches.
        match (self.end, counted) {
            (End::Largest, false) => (zero(ties, |x| x < at), zero(others, |x| x <= at)),
            (End::Largest, true) => (zero(ties, |x| x >= at), zero(others, |x| x > at)),
            (End::Smallest, false) => (zero(ties, |x| x > at), zero(others, |x| x >= at)),
            (End::Smallest, true) => (zero(ties, |x| x <= at), zero(others, |x| x < at)),
        };
    }
}

/// Zeroes what has such a magnitude.
fn zero<T: Real>(values: &mut [T], falls: impl Fn(T) -> bool) {
    values.iter_mut().for_each(|value| *value = if falls(value.abs()) { T::default() } else { *value });
}

/// Binary digits that are told apart in one pass: the first one leaves so few candidates that the next only compares, and the
/// counts that are met stay in a core's own cache.
const DIGIT: u32 = 16;
/// Values that are looked at before one is counted.
const BLOCK: usize = 32;

/// A cut that is being narrowed down, one digit of the key at a time.
struct Search {
    count: Count,
    prefix: u64,
    /// How many of those with this prefix are counted, and how many have it.
    left: u64,
    equal: u64,
}

/// Finds cuts exactly: a radix select, two passes over the tensors for f32, and one more where a tie is cut.
pub fn cuts<T: Real>(tensor: &Tensor<T>, counts: &[Count]) -> Result<Vec<Cut>> {
    let start = |&count: &Count| Search { count, prefix: 0, left: count.elements as u64, equal: tensor.len() as u64 };
    let mut searches: Vec<Search> = counts.iter().map(start).collect();
    for shift in (0..T::KEY_BITS).step_by(DIGIT as usize).rev() {
        let bins = 1 << DIGIT.min(T::KEY_BITS - shift);
        let histograms = tensor.count_parts(bins * counts.len(), |part, found| {
            part.subtract_base();
            for (search, found) in searches.iter().zip(found.chunks_exact_mut(bins)) {
                search.tally(shift, &part.models[search.count.model], found);
            }
        })?;
        searches.iter_mut().zip(histograms.chunks_exact(bins)).for_each(|(search, found)| search.narrow(found));
    }
    let ties = tied(tensor, &searches)?;
    Ok(searches.iter().zip(ties).map(|(search, ties_before)| search.cut(ties_before)).collect())
}

impl Search {
    /// Counts the digit at `shift` of the values whose higher digits are the prefix.
    fn tally<T: Real>(&self, shift: u32, values: &[T], bins: &mut [u64]) {
        let mask = bins.len() - 1;
        let mut add = |value: T| {
            let bin = &mut bins[(value.key() >> shift) as usize & mask];
            *bin = bin.wrapping_add(1);
        };
        let above = shift + DIGIT;
        if above >= T::KEY_BITS {
            return values.iter().for_each(|value| add(*value));
        }
        // Magnitudes are in the order of their keys. Blocks without a candidate, which are most, are compared and passed over.
        let (first, last) = (T::of_key(self.prefix << above), T::of_key(((self.prefix + 1) << above) - 1));
        let candidate = |value: &T| (value.abs() >= first) & (value.abs() <= last);
        for block in values.chunks(BLOCK) {
            if block.iter().fold(false, |any, value| any | candidate(value)) {
                block.iter().filter(|value| candidate(value)).for_each(|value| add(*value));
            }
        }
    }

    fn narrow(&mut self, bins: &[u64]) {
        let largest = self.count.end == End::Largest;
        for i in 0..bins.len() {
            let bin = if largest { bins.len() - 1 - i } else { i };
            if self.left <= bins[bin] {
                (self.prefix, self.equal) = (self.prefix << DIGIT | bin as u64, bins[bin]);
                return;
            }
            self.left -= bins[bin];
        }
        unreachable!("no more is counted than there is");
    }

    fn cut(&self, ties_before: usize) -> Cut {
        Cut { end: self.count.end, key: self.prefix, ties_before }
    }
}

/// Before which index equal magnitudes are counted, for each search.
fn tied<T: Real>(tensor: &Tensor<T>, searches: &[Search]) -> Result<Vec<usize>> {
    if searches.iter().all(|search| search.left == search.equal || search.left == 0) {
        return Ok(searches.iter().map(|search| if search.left == 0 { 0 } else { tensor.len() }).collect());
    }
    let equal = |part: &Part<T>, search: &Search| {
        let key = T::of_key(search.prefix);
        part.models[search.count.model].iter().filter(|value| value.abs() == key).count() as u64
    };
    let found = tensor.map_parts(|part| {
        part.subtract_base();
        searches.iter().map(|search| equal(part, search)).collect::<Vec<_>>()
    })?;
    let before = |(i, search): (usize, &Search)| {
        let mut left = search.left;
        let number = found.iter().position(|counts| {
            let here = left <= counts[i];
            left -= if here { 0 } else { counts[i] };
            here
        });
        let mut part = Part::default();
        tensor.load(number.expect("the ties were counted"), &mut part)?;
        part.subtract_base();
        let values = part.models[search.count.model].iter().enumerate();
        let mut ties = values.filter(|(_, value)| value.key() == search.prefix).map(|(at, _)| at);
        let mut last = |left: u64| ties.nth(left as usize - 1).expect("the part has as many");
        Ok(if left == 0 { 0 } else { part.start + last(left) + 1 })
    };
    searches.iter().enumerate().map(before).collect()
}

/// Lanes of a sum, so that no addition waits for the one before.
const LANES: usize = 8;

/// The sum of magnitudes.
fn l1<T: Real>(values: &[T]) -> f64 {
    let (blocks, rest) = values.as_chunks::<LANES>();
    let mut sums = [0.0; LANES];
    for block in blocks {
        sums.iter_mut().zip(block).for_each(|(sum, value)| *sum += value.abs().to_f64());
    }
    sums.into_iter().chain(rest.iter().map(|value| value.abs().to_f64())).sum()
}

/// Masks that also multiply what they keep so that the sum of magnitudes is what it was before, as mergekit's `rescale`
/// does; a task vector whose sum is below 1e-7, before or after, is left alone.
pub fn restore_l1<'a, T: Real>(tensor: &Tensor<T>, masks: Vec<Mask<'a, T>>) -> Result<Vec<Mask<'a, T>>> {
    let sums = tensor.map_parts(|part| {
        part.subtract_base();
        let before: Vec<f64> = part.models.iter().map(|delta| l1(delta)).collect();
        // The models are task vectors now.
        part.base.clear();
        apply(part, &masks);
        before.into_iter().zip(&part.models).map(|(before, kept)| (before, l1(kept))).collect::<Vec<_>>()
    })?;
    let scaled = |(i, mask): (usize, Mask<'a, T>)| -> Mask<'a, T> {
        let before: f64 = sums.iter().map(|part| part[i].0).sum();
        let after: f64 = sums.iter().map(|part| part[i].1).sum();
        if before < 1e-7 || after < 1e-7 {
            return mask;
        }
        let factor = T::of(before / after);
        Box::new(move |start, row| {
            mask(start, row);
            row.delta.iter_mut().for_each(|value| *value = *value * factor);
        })
    };
    Ok(masks.into_iter().enumerate().map(scaled).collect())
}
