use half::bf16;
use rayon::prelude::*;

use super::{Args, Folded, Keep, LEAST_SUM, Merge, MergedUpdate, Purpose, Rounding, Step, kept};
use crate::device::{Cpu, DType, Isa, ViewMut};
use crate::error::Result;
use crate::ops::simd::{LANES, Shared, dispatched, sum_lanes};

/// Elements of a task. Sums are made task by task, whatever the threads.
const TASK: usize = 1 << 14;
/// Elements that go through all stages of a pass while they are in the first cache.
const BLOCK: usize = 512;

impl MergedUpdate for Cpu {
    fn merged_update(&self, a: Args<Self>) -> Result<()> {
        a.check()?;
        let (isa, s) = (self.isa(), Scalars::of(&a.step));
        let (step, len) = (a.step, a.grad.len());
        let (tensors, counts) = Tensors::of(a);
        let lost = self.run(|| {
            let way =
                if step.passes_twice(len) { Way::Second(first_pass(isa, &s, &step, &tensors)) } else { Way::Whole };
            let is_plain = tensors.are_plain(&s);
            let task = |i| match is_plain {
                true => plain_task(isa, &s, tensors.part(i)),
                false => apply_task(isa, &s, way, tensors.part(i)),
            };
            let add = |a: [u32; 2], b: [u32; 2]| [a[0].wrapping_add(b[0]), a[1].wrapping_add(b[1])];
            (0..tensors.tasks()).into_par_iter().map(task).reduce(|| [0; 2], add)
        });
        counts.iter_mut().zip(lost).for_each(|(count, lost)| *count = count.wrapping_add(lost));
        Ok(())
    }
}

/// The step in f32.
struct Scalars {
    folded: Folded,
    clip: f32,
    beta1: f32,
    /// 1 - beta1, rounded once: `1 - beta1 as f32` would be off by up to 5e-5 of itself.
    fresh1: f32,
    beta2: f32,
    fresh2: f32,
    rate: f32,
    root: f32,
    eps: f32,
    decay: f32,
    shares: [f32; 2],
    ema: f32,
    /// Of `tau_ref` beside the master.
    share: f32,
    /// As [`Step`] has it.
    step: Step,
}

impl Scalars {
    fn of(step: &Step) -> Self {
        let (adam, folded) = (step.adam, step.folded());
        Self {
            folded,
            clip: step.clip as f32,
            beta1: adam.beta1 as f32,
            fresh1: (1.0 - adam.beta1) as f32,
            beta2: adam.beta2 as f32,
            fresh2: (1.0 - adam.beta2) as f32,
            rate: folded.rate as f32,
            root: folded.root as f32,
            eps: adam.eps as f32,
            decay: folded.decay as f32,
            shares: folded.shares.map(|x| x as f32),
            ema: folded.ema as f32,
            share: step.share as f32,
            step: *step,
        }
    }
}

// ---- tensors ----------------------------------------------------------------------------------------------------------

/// What the step was given; what was not is empty.
struct Tensors<'a> {
    grad: &'a [f32],
    m: Shared<'a, f32>,
    v: Shared<'a, f32>,
    /// The weight in full; empty where it is bf16 alone.
    full: Shared<'a, f32>,
    /// What is made of it beside: the weight in either type.
    wide: Shared<'a, f32>,
    narrow: Shared<'a, bf16>,
    since_merge: Shared<'a, f32>,
    average: Shared<'a, f32>,
    scratch: Shared<'a, f32>,
    tau_wide: &'a [f32],
    tau_narrow: &'a [bf16],
}

/// Some elements of each.
#[derive(Default)]
struct Part<'a> {
    /// The first.
    at: usize,
    grad: &'a [f32],
    m: &'a mut [f32],
    v: &'a mut [f32],
    full: &'a mut [f32],
    wide: &'a mut [f32],
    narrow: &'a mut [bf16],
    since_merge: &'a mut [f32],
    average: &'a mut [f32],
    scratch: &'a mut [f32],
    tau_wide: &'a [f32],
    tau_narrow: &'a [bf16],
}

impl<'a> Tensors<'a> {
    /// And where lost updates are counted.
    fn of(a: Args<'a, Cpu>) -> (Self, &'a mut [u32]) {
        let floats = |x: Option<ViewMut<'a, Cpu>>| Shared::new(x.map(ViewMut::into_f32s).unwrap_or_default());
        let is_narrow = a.weight.dtype() == DType::Bf16;
        let (wide, narrow) = if is_narrow { (None, Some(a.weight)) } else { (Some(a.weight), None) };
        let (full, wide) = if a.master.is_some() || is_narrow { (a.master, wide) } else { (wide, None) };
        // Where nothing is left there, it may be of any size.
        let scratch = a.scratch.filter(|_| a.step.passes_twice(a.grad.len()));
        let of = |dtype| a.tau_ref.filter(|tau_ref| tau_ref.dtype() == dtype);
        let tensors = Self {
            grad: a.grad.f32s(),
            m: floats(Some(a.first_moment)),
            v: floats(Some(a.second_moment)),
            full: floats(full),
            wide: floats(wide),
            narrow: Shared::new(narrow.map(ViewMut::into_bf16s).unwrap_or_default()),
            since_merge: floats(a.since_merge),
            average: floats(a.average),
            scratch: floats(scratch),
            tau_wide: of(DType::F32).map(|x| x.f32s()).unwrap_or_default(),
            tau_narrow: of(DType::Bf16).map(|x| x.bf16s()).unwrap_or_default(),
        };
        (tensors, a.lost.map(ViewMut::into_u32s).unwrap_or_default())
    }

    /// Whether nothing is asked but Adam of a weight that is there in full and alone.
    fn are_plain(&self, s: &Scalars) -> bool {
        let nothing_beside = self.wide.is_empty() && self.since_merge.is_empty() && self.average.is_empty();
        let nothing_random = s.folded.gradient.is_all() && s.step.rounding == Rounding::Nearest;
        nothing_beside && self.narrow.is_empty() && nothing_random && s.folded.merge == Merge::Plain
    }

    fn tasks(&self) -> usize {
        self.grad.len().div_ceil(TASK)
    }

    /// Of one task.
    fn part(&self, task: usize) -> Part<'_> {
        fn own<'a, T>(x: &Shared<'a, T>, at: usize, len: usize) -> &'a mut [T] {
            // SAFETY: each task asks for its own elements, once in a pass.
            if x.is_empty() { &mut [] } else { unsafe { x.slice(at, len) } }
        }
        let at = task * TASK;
        let len = TASK.min(self.grad.len() - at);
        Part {
            at,
            grad: &self.grad[at..at + len],
            m: own(&self.m, at, len),
            v: own(&self.v, at, len),
            full: own(&self.full, at, len),
            wide: own(&self.wide, at, len),
            narrow: own(&self.narrow, at, len),
            since_merge: own(&self.since_merge, at, len),
            average: own(&self.average, at, len),
            scratch: own(&self.scratch, at, len),
            tau_wide: self.tau_wide.get(at..at + len).unwrap_or_default(),
            tau_narrow: self.tau_narrow.get(at..at + len).unwrap_or_default(),
        }
    }
}

impl Tensors<'_> {
    /// Of each task, in their order.
    fn sums<S: Send>(&self, sum: impl Fn(Part) -> S + Sync) -> Vec<S> {
        (0..self.tasks()).into_par_iter().map(|i| sum(self.part(i))).collect()
    }

    /// What tasks count together.
    fn count(&self, count: impl Fn(usize, &mut [u32]) + Sync) -> Bins {
        let task = |mut bins: Bins, i: usize| {
            count(i, &mut bins.0);
            bins
        };
        (0..self.tasks()).into_par_iter().fold(Bins::new, task).reduce(Bins::new, Bins::add)
    }

    /// Magnitudes of the updates from here on, of which nothing is kept.
    fn sample(&self, isa: Isa, s: &Scalars, at: usize, out: &mut [u32]) {
        fn copy(x: &Shared<f32>, at: usize) -> [f32; LANES] {
            let mut copy = [0.0; LANES];
            if !x.is_empty() {
                // SAFETY: no task has begun.
                copy.copy_from_slice(unsafe { x.slice(at, LANES) });
            }
            copy
        }
        let (mut m, mut v, mut since_merge) = (copy(&self.m, at), copy(&self.v, at), copy(&self.since_merge, at));
        let grad = &self.grad[at..at + LANES];
        let part = Part { at, grad, m: &mut m, v: &mut v, since_merge: &mut since_merge, ..Part::default() };
        sample_task(isa, s, part, out);
    }
}

impl Part<'_> {
    #[inline(always)]
    fn blocks(&self) -> usize {
        self.grad.len().div_ceil(BLOCK)
    }

    #[inline(always)]
    fn block(&mut self, i: usize) -> Part<'_> {
        #[inline(always)]
        fn own<T>(x: &mut [T], at: usize, len: usize) -> &mut [T] {
            if x.is_empty() { x } else { &mut x[at..at + len] }
        }
        let at = i * BLOCK;
        let len = BLOCK.min(self.grad.len() - at);
        Part {
            at: self.at + at,
            grad: &self.grad[at..at + len],
            m: own(self.m, at, len),
            v: own(self.v, at, len),
            full: own(self.full, at, len),
            wide: own(self.wide, at, len),
            narrow: own(self.narrow, at, len),
            since_merge: own(self.since_merge, at, len),
            average: own(self.average, at, len),
            scratch: own(self.scratch, at, len),
            tau_wide: self.tau_wide.get(at..at + len).unwrap_or_default(),
            tau_narrow: self.tau_narrow.get(at..at + len).unwrap_or_default(),
        }
    }
}

// ---- passes -----------------------------------------------------------------------------------------------------------

/// What the second pass does to an update: elements of a smaller magnitude become 0, the others are scaled and bounded.
#[derive(Clone, Copy)]
struct Cut {
    /// A magnitude by its bits, which are in its order.
    threshold: u32,
    factor: f32,
    bound: f32,
}

#[derive(Clone, Copy)]
enum Way {
    Whole,
    Second(Cut),
}

/// Magnitudes by their bits, which are in their order, in bins of one width. Zeros, which can be most of an embedding's, are
/// in none.
#[derive(Clone, Copy)]
struct Range {
    start: u32,
    /// One behind the last.
    end: u32,
    /// A bin is 2^shift wide.
    shift: u32,
}

impl Range {
    /// All from this on.
    fn from(start: u32) -> Self {
        Self { start, end: 1 << 31, shift: 20 }
    }

    /// One bin, in smaller ones; `None` where it is one number.
    fn within(&self, bin: usize) -> Option<Self> {
        let start = self.start + ((bin as u32) << self.shift);
        let end = start + (1 << self.shift);
        (self.shift > 0).then(|| Self { start, end, shift: self.shift - 10 })
    }

    #[inline(always)]
    fn has(&self, bits: u32) -> bool {
        bits.wrapping_sub(self.start.max(1)) < self.end - self.start.max(1)
    }
}

/// How many magnitudes of a range are in each bin. A count of integers is the same in any order.
struct Bins(Vec<u32>);

impl Bins {
    /// So few that they stay in the first cache, and clearing them takes no time beside the smallest weight.
    const LEN: usize = 1 << 11;

    fn new() -> Self {
        Self(vec![0; Self::LEN])
    }

    fn add(mut self, other: Self) -> Self {
        self.0.iter_mut().zip(&other.0).for_each(|(a, b)| *a += b);
        self
    }

    /// The bin of the `count`-th largest, and which of that bin it is.
    fn find(&self, mut count: usize) -> Option<(usize, usize)> {
        for (bin, members) in self.0.iter().enumerate().rev() {
            if count <= *members as usize {
                return Some((bin, count));
            }
            count -= *members as usize;
        }
        None
    }
}

/// Makes the update and leaves it in the scratch; says how it is to be cut.
fn first_pass(isa: Isa, s: &Scalars, step: &Step, tensors: &Tensors) -> Cut {
    let whole = Cut { threshold: 0, factor: 1.0, bound: f32::INFINITY };
    let add = |a: [f64; 2], b: [f64; 2]| [a[0] + b[0], a[1] + b[1]];
    if s.folded.merge == Merge::Drop {
        let sums = tensors.sums(|part| update_task(isa, s, part, Range::from(0), &mut []));
        let [before, after] = sums.into_iter().fold([0.0; 2], add);
        let factor = (before / (after + step.adam.eps)) as f32;
        let rescales = s.folded.rescale && before >= LEAST_SUM;
        return if rescales { Cut { factor, bound: s.folded.bound as f32, ..whole } } else { whole };
    }
    let count = kept(step.rule.reserve_rate(), tensors.grad.len()).expect("trimming has a second pass");
    let range = Range::from(likely_below(isa, s, tensors, count));
    let mut sums = vec![[0.0; 2]; tensors.tasks()];
    let shared = Shared::new(&mut sums);
    let bins = tensors.count(|i, bins| {
        // SAFETY: each task has its own.
        let own = unsafe { shared.slice(i, 1) };
        own[0] = update_task(isa, s, tensors.part(i), range, bins);
    });
    let threshold = threshold(isa, tensors, range, bins, count);
    let [before, _] = sums.into_iter().fold([0.0; 2], add);
    if !s.folded.rescale || before < LEAST_SUM {
        return Cut { threshold, ..whole };
    }
    let after: f64 = tensors.sums(|part| sum_task(isa, part.scratch, threshold)).into_iter().sum();
    Cut { threshold, factor: (before / after) as f32, ..whole }
}

/// A magnitude that few of a sample's are above, but more than of the whole are kept: where that is so, only those need be
/// counted.
fn likely_below(isa: Isa, s: &Scalars, tensors: &Tensors, count: usize) -> u32 {
    const RUNS: usize = 64;
    let len = tensors.grad.len();
    if len < 64 * RUNS * LANES {
        return 0;
    }
    let mut sample = [0; RUNS * LANES];
    for (i, sample) in sample.chunks_exact_mut(LANES).enumerate() {
        // Multiples of the golden ratio lie evenly, and on no column of a matrix.
        let share = (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        let at = ((share as usize * (len / LANES)) >> 32) * LANES;
        tensors.sample(isa, s, at, sample);
    }
    let rank = 2 * count * sample.len() / len + LANES;
    if rank > sample.len() / 2 {
        return 0;
    }
    *sample.select_nth_unstable_by(rank, |a, b| b.cmp(a)).1
}

/// The `count`-th largest magnitude of the scratch by its bits, 0 where fewer are not 0, given the bins of a range that it is
/// likely to be in.
fn threshold(isa: Isa, tensors: &Tensors, mut range: Range, mut bins: Bins, mut count: usize) -> u32 {
    let bins_of = |range| tensors.count(|i, bins| count_task(isa, tensors.part(i).scratch, range, bins));
    loop {
        let Some((bin, left)) = bins.find(count) else {
            if range.start == 0 {
                return 0;
            }
            range = Range::from(0);
            bins = bins_of(range);
            continue;
        };
        let Some(within) = range.within(bin) else {
            return range.start + bin as u32;
        };
        (range, count) = (within, left);
        bins = bins_of(range);
    }
}

/// Memory of a block between its stages.
struct Buffers {
    update: [f32; BLOCK],
    /// The gradient of which elements were dropped; later what is added to the weight.
    other: [f32; BLOCK],
    tau_ref: [f32; BLOCK],
    /// A weight that is bf16 alone.
    weight: [f32; BLOCK],
    words: [u32; BLOCK],
}

impl Buffers {
    #[inline(always)]
    fn new() -> Self {
        Self {
            update: [0.0; BLOCK],
            other: [0.0; BLOCK],
            tau_ref: [0.0; BLOCK],
            weight: [0.0; BLOCK],
            words: [0; BLOCK],
        }
    }
}

dispatched! {
    /// Makes the update that is to be sparsified, with sums of magnitudes before and after random elements were dropped; where
    /// none are, counts magnitudes of a range.
    fn update_task(s: &Scalars, part: Part, range: Range, bins: &mut [u32]) -> [f64; 2] {
        let (mut part, mut buffers, mut sums) = (part, Buffers::new(), [0.0; 2]);
        for i in 0..part.blocks() {
            let mut block = part.block(i);
            make_update(s, &mut block, &mut buffers);
            let update = &mut buffers.update[..block.grad.len()];
            sums[0] += sum_of_magnitudes(update);
            if s.folded.merge == Merge::Drop {
                drop_elements(s, Purpose::Update, s.folded.update, block.at, update, &mut buffers.words);
                sums[1] += sum_of_magnitudes(update);
            } else {
                count_magnitudes(update, range, bins);
            }
            block.scratch.copy_from_slice(update);
        }
        sums
    }
}

dispatched! {
    fn count_task(x: &[f32], range: Range, bins: &mut [u32]) {
        count_magnitudes(x, range, bins);
    }
}

dispatched! {
    /// The sum of magnitudes that are not below the threshold.
    fn sum_task(x: &[f32], threshold: u32) -> f64 {
        let mut sum = 0.0;
        for block in x.chunks(BLOCK) {
            let mut lanes = [0.0f32; LANES];
            for run in block.chunks(LANES) {
                for (lane, x) in lanes.iter_mut().zip(run) {
                    *lane += if bits_of_magnitude(*x) >= threshold { x.abs() } else { 0.0 };
                }
            }
            sum += f64::from(sum_lanes(lanes));
        }
        sum
    }
}

dispatched! {
    /// Magnitudes of the updates that a part would make.
    fn sample_task(s: &Scalars, part: Part, out: &mut [u32]) {
        let (mut part, mut buffers) = (part, Buffers::new());
        make_update(s, &mut part, &mut buffers);
        out.iter_mut().zip(&buffers.update).for_each(|(out, x)| *out = bits_of_magnitude(*x));
    }
}

dispatched! {
    /// Adam of a weight that is there in full and alone: no stage between, one loop. (1.8 times as fast where all is in a cache.)
    fn plain_task(s: &Scalars, part: Part) -> [u32; 2] {
        let [mut updates, mut unmoved] = [0u32; 2];
        for (((w, g), m), v) in part.full.iter_mut().zip(part.grad).zip(part.m).zip(part.v) {
            let (old, u) = (*w, adam(s, *g, m, v));
            *w = old + with_decay(s, old, u);
            updates = updates.wrapping_add(u32::from(u != 0.0));
            unmoved = unmoved.wrapping_add(u32::from((u != 0.0) & (*w == old)));
        }
        [updates, unmoved]
    }
}

dispatched! {
    /// All of a pass, or what is left of it once the update is known; returns how many updates were not zero and how many of
    /// those were lost.
    fn apply_task(s: &Scalars, way: Way, part: Part) -> [u32; 2] {
        let (mut part, mut buffers, mut lost) = (part, Buffers::new(), [0; 2]);
        for i in 0..part.blocks() {
            let mut block = part.block(i);
            let len = block.grad.len();
            match way {
                Way::Whole => {
                    make_update(s, &mut block, &mut buffers);
                    let update = &mut buffers.update[..len];
                    drop_elements(s, Purpose::Update, s.folded.update, block.at, update, &mut buffers.words);
                }
                Way::Second(cut) => cut_elements(cut, block.scratch, &mut buffers.update[..len]),
            }
            buffers.tau_ref.iter_mut().zip(block.tau_wide).for_each(|(wide, x)| *wide = *x);
            widen(block.tau_narrow, &mut buffers.tau_ref);
            merge(s, block.at, &mut buffers.update[..len], &buffers.tau_ref[..len], &mut buffers.words);
            take_back(s, block.since_merge, &mut buffers.update[..len]);
            apply(s, &mut block, &mut buffers, &mut lost);
            write_beside(s, &mut block, &buffers.tau_ref);
        }
        lost
    }
}

// ---- stages -----------------------------------------------------------------------------------------------------------

#[inline(always)]
fn draw(s: &Scalars, purpose: Purpose, at: usize, words: &mut [u32]) {
    s.step.random.fill(purpose.counter(s.step.step) + at as u64 / 4, words);
}

/// What is dropped becomes 0, the rest is scaled.
#[inline(always)]
fn drop_elements(s: &Scalars, purpose: Purpose, keep: Keep, at: usize, x: &mut [f32], words: &mut [u32]) {
    if keep.is_all() {
        return;
    }
    let (threshold, scale, words) = (keep.threshold as u32, keep.scale as f32, &mut words[..x.len()]);
    draw(s, purpose, at, words);
    x.iter_mut().zip(words).for_each(|(x, word)| *x = if *word < threshold { *x * scale } else { 0.0 });
}

#[inline(always)]
fn adam(s: &Scalars, g: f32, m: &mut f32, v: &mut f32) -> f32 {
    let g = g * s.clip;
    *m = s.beta1 * *m + s.fresh1 * g;
    *v = s.beta2 * *v + s.fresh2 * g * g;
    -(s.rate * *m / (v.sqrt() * s.root + s.eps))
}

/// What is added to a weight, with decay.
#[inline(always)]
fn with_decay(s: &Scalars, old: f32, u: f32) -> f32 {
    u - s.decay * if s.folded.decay_last { old + u } else { old }
}

/// Adam's update, and what was not merged before it.
#[inline(always)]
fn make_update(s: &Scalars, block: &mut Part, buffers: &mut Buffers) {
    let len = block.grad.len();
    let (update, mut grad) = (&mut buffers.update[..len], block.grad);
    if !s.folded.gradient.is_all() {
        let dropped = &mut buffers.other[..len];
        dropped.copy_from_slice(grad);
        drop_elements(s, Purpose::Gradient, s.folded.gradient, block.at, dropped, &mut buffers.words);
        grad = dropped;
    }
    for (((update, g), m), v) in update.iter_mut().zip(grad).zip(&mut *block.m).zip(&mut *block.v) {
        *update = adam(s, *g, m, v);
    }
    let both = update.iter_mut().zip(&mut *block.since_merge);
    if s.step.merges {
        both.for_each(|(update, since)| *update += *since);
    } else {
        both.for_each(|(update, since)| *since += *update);
    }
}

#[inline(always)]
fn bits_of_magnitude(x: f32) -> u32 {
    x.to_bits() & 0x7fff_ffff
}

/// Adds to the bins of a range. Where it is narrow most runs have none of it: what the lanes have to say is made one
/// number, a byte for each.
#[inline(always)]
fn count_magnitudes(x: &[f32], range: Range, bins: &mut [u32]) {
    let (runs, rest) = x.as_chunks::<LANES>();
    let mut last = [0.0; LANES];
    last[..rest.len()].copy_from_slice(rest);
    for run in runs.iter().chain([&last]) {
        let mut members = u128::from_le_bytes(run.map(|x| range.has(bits_of_magnitude(x)).into()));
        while members != 0 {
            let bits = bits_of_magnitude(run[members.trailing_zeros() as usize / 8]);
            bins[((bits - range.start) >> range.shift) as usize % Bins::LEN] += 1;
            members &= members - 1;
        }
    }
}

#[inline(always)]
fn sum_of_magnitudes(x: &[f32]) -> f64 {
    let mut lanes = [0.0; LANES];
    for run in x.chunks(LANES) {
        lanes.iter_mut().zip(run).for_each(|(lane, x)| *lane += x.abs());
    }
    sum_lanes(lanes).into()
}

#[inline(always)]
fn cut_elements(cut: Cut, x: &[f32], update: &mut [f32]) {
    for (update, x) in update.iter_mut().zip(x) {
        let scaled = *x * cut.factor;
        // A NaN stays one.
        let bounded = if scaled > cut.bound { cut.bound } else { scaled };
        let bounded = if bounded < -cut.bound { -cut.bound } else { bounded };
        *update = if bits_of_magnitude(*x) >= cut.threshold { bounded } else { 0.0 };
    }
}

#[inline(always)]
fn widen(x: &[bf16], wide: &mut [f32]) {
    wide.iter_mut().zip(x).for_each(|(wide, x)| *wide = f32::from_bits(u32::from(x.to_bits()) << 16));
}

/// What is added of the update and of `tau_ref`.
#[inline(always)]
fn merge(s: &Scalars, at: usize, update: &mut [f32], tau_ref: &[f32], words: &mut [u32]) {
    let [of_update, of_tau_ref] = s.shares;
    let both = update.iter_mut().zip(tau_ref);
    match s.folded.merge {
        Merge::Plain => {}
        Merge::Drop if of_tau_ref == 0.0 => update.iter_mut().for_each(|u| *u *= of_update),
        Merge::Drop => {
            let (keep, words) = (s.folded.tau_ref, &mut words[..tau_ref.len()]);
            let threshold = if keep.is_all() { u32::MAX } else { keep.threshold as u32 };
            match keep.is_all() {
                true => words.fill(0),
                false => draw(s, Purpose::TauRef, at, words),
            }
            both.zip(words).for_each(|((u, tau_ref), word)| {
                let tau_ref = if *word < threshold { *tau_ref } else { 0.0 };
                *u = of_update * *u + of_tau_ref * tau_ref;
            });
        }
        Merge::Before => both.for_each(|(u, tau_ref)| {
            let elected = if tau_ref + *u >= 0.0 { 1.0 } else { -1.0 };
            let agreeing = |x: f32| if x * elected < 0.0 { 0.0 } else { x };
            *u = of_update * agreeing(*u) + of_tau_ref * agreeing(*tau_ref);
        }),
        Merge::After => both.for_each(|(u, tau_ref)| {
            let (x, y) = (of_update * *u, of_tau_ref * tau_ref);
            let larger = if x.abs() > y.abs() { x } else { y };
            let larger = if x.abs() == y.abs() { 0.0 } else { larger };
            let oppose = (x < 0.0) & (y > 0.0) | (x > 0.0) & (y < 0.0);
            *u = if oppose { larger } else { x + y };
        }),
    }
}

/// A merge replaces what the steps since the last one did.
#[inline(always)]
fn take_back(s: &Scalars, since_merge: &mut [f32], update: &mut [f32]) {
    if s.step.merges {
        for (update, since) in update.iter_mut().zip(since_merge) {
            *update -= *since;
            *since = 0.0;
        }
    }
}

/// Adds to the weight, with decay and what the moving average pulls.
#[inline(always)]
fn apply(s: &Scalars, block: &mut Part, buffers: &mut Buffers, lost: &mut [u32; 2]) {
    let len = block.grad.len();
    let alone = block.full.is_empty();
    if alone {
        widen(block.narrow, &mut buffers.weight[..len]);
    }
    let w = if alone { &mut buffers.weight[..len] } else { &mut *block.full };
    let (update, words) = (&buffers.update[..len], &mut buffers.words[..len]);
    let is_random = s.step.rounding == Rounding::Stochastic;
    if is_random {
        draw(s, Purpose::Rounding, block.at, words);
    }
    let sum = |old: f32, u: f32| with_decay(s, old, u);
    let round = |old: f32, sum: f32, word: u32| match stochastic_sum(old, sum, word) {
        new if alone => f32::from_bits(stochastic_bf16(new, word) << 16),
        new => new,
    };
    if block.average.is_empty() {
        match is_random {
            false => settle(w, update, update, lost, |old, u, _| old + sum(old, u)),
            true => settle(w, update, words, lost, |old, u, word| round(old, sum(old, u), word)),
        }
    } else {
        let sums = &mut buffers.other[..len];
        for (((all, average), old), u) in sums.iter_mut().zip(&mut *block.average).zip(&*w).zip(update) {
            let sum = sum(*old, *u);
            let moved = old + sum;
            *average += s.ema * (moved - *average);
            *all = sum + s.ema * (*average - moved);
        }
        match is_random {
            false => settle(w, update, sums, lost, |old, _, sum| old + sum),
            true => {
                sums.iter_mut().zip(&*w).zip(&*words).for_each(|((sum, old), word)| *sum = round(*old, *sum, *word));
                settle(w, update, sums, lost, |_, _, new| new);
            }
        }
    }
    if alone {
        block.narrow.iter_mut().zip(w).for_each(|(narrow, w)| *narrow = bf16::from_bits((w.to_bits() >> 16) as u16));
    }
}

/// Replaces weights by what `new` makes of them, their updates and something else of each, and counts what was lost.
#[inline(always)]
fn settle<T: Copy>(w: &mut [f32], update: &[f32], others: &[T], lost: &mut [u32; 2], new: impl Fn(f32, f32, T) -> f32) {
    let [mut updates, mut unmoved] = [0u32; 2];
    for ((w, u), other) in w.iter_mut().zip(update).zip(others) {
        let old = *w;
        *w = new(old, *u, *other);
        updates = updates.wrapping_add(u32::from(*u != 0.0));
        unmoved = unmoved.wrapping_add(u32::from((*u != 0.0) & (*w == old)));
    }
    *lost = [lost[0].wrapping_add(updates), lost[1].wrapping_add(unmoved)];
}

/// `a + b`, up or down with the probability of the distance: the rounding error of the nearest sum is known exactly (Knuth's
/// two-sum), and it goes to the neighbour on that side as often as it is part of the gap. A word is 32 bits of probability.
#[inline(always)]
fn stochastic_sum(a: f32, b: f32, word: u32) -> f32 {
    let nearest = a + b;
    let other = nearest - a;
    let error = (a - (nearest - other)) + (b - other);
    // Away from zero is one more in the bits.
    let grows = (error > 0.0) == (nearest > 0.0);
    let bits = nearest.to_bits();
    let neighbour = f32::from_bits(if grows { bits.wrapping_add(1) } else { bits.wrapping_sub(1) });
    let gap = (neighbour - nearest).abs();
    if word as f32 * (0.5 / (1u32 << 31) as f32) * gap < error.abs() { neighbour } else { nearest }
}

/// The upper half of a float's bits, one more as often as the lower half is part of 2^16; NaN and infinities as they are.
#[inline(always)]
fn stochastic_bf16(x: f32, word: u32) -> u32 {
    let bits = x.to_bits();
    let moved = if x.is_finite() { bits.wrapping_add(word & 0xffff) } else { bits };
    let quiet = if x.is_nan() { moved | 1 << 22 } else { moved };
    quiet >> 16
}

/// To nearest even.
#[inline(always)]
fn nearest_bf16(x: f32) -> bf16 {
    let bits = x.to_bits();
    let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    let bits = if x.is_nan() { bits | 1 << 22 } else { nearest };
    bf16::from_bits((bits >> 16) as u16)
}

/// What the weight is besides its master.
#[inline(always)]
fn write_beside(s: &Scalars, block: &mut Part, tau_ref: &[f32]) {
    if block.full.is_empty() {
        return;
    }
    let all = block.full.iter().zip(tau_ref);
    let shared = all.map(|(w, tau_ref)| if s.share == 0.0 { *w } else { w + s.share * tau_ref });
    block.wide.iter_mut().zip(shared.clone()).for_each(|(wide, w)| *wide = w);
    block.narrow.iter_mut().zip(shared).for_each(|(narrow, w)| *narrow = nearest_bf16(w));
}
