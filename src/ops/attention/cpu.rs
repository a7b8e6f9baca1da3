//! Blocked attention, queries along the lanes.
//!
//! The query rows of a segment that share a kv head (each query with every head of its group) are cut into strips of
//! [`STRIP`] rows, which lie transposed, one row per lane, so that a key's score with sixteen rows is one vector and
//! the softmax needs no sum across lanes. Keys come in blocks of [`BLOCK`] positions, read where they lie:
//!
//! ```text
//! S^T = K Q^T    O^T += V^T P^T    dP^T = V dO^T    dQ^T += K^T dS^T    dK = dS Q    dV = P dO
//! [keys, rows]   [head_dim, rows]  [keys, rows]     [head_dim, rows]    [keys, head_dim]
//! ```
//!
//! Each is a [`Product`] over the keys of a block that any row of the strip sees. Masked weights are exact zeros, which
//! add nothing to a chain; where what they meet is not finite, the chain leaves them out. So a chain runs over what
//! its row sees in the order of the absolute position, whatever lies beside it.
//!
//! Traffic of a strip: every K and V that it sees once, q and o once; in the backward K twice, and dK and dV once to
//! read and once to write. The rest stays in the first- and second-level caches: 3 * STRIP * head_dim + BLOCK * STRIP
//! floats (48 KiB at head_dim 64), in the backward 5 * STRIP * head_dim + 2 * BLOCK * (STRIP + head_dim) (116 KiB).

use std::cell::RefCell;
use std::ops::{Deref, DerefMut, Range};

use bytemuck::{Pod, Zeroable};
use rayon::prelude::*;

use super::product::{PAD, Product};
use super::{Attention, Backward, Dims, Forward, NO_PARENT, Segment, check_segments};
use crate::device::{Cpu, Isa};
use crate::error::Result;
use crate::ops::gemm::{Operand, Start};
use crate::ops::simd::{LANES, Shared, dispatched, exp, exp_of_negative, prefetch, transpose};

/// Keys of a block of the online softmax; blocks start at multiples of it.
const BLOCK: usize = 64;
/// Query rows that are computed together: three vectors of AVX-512, the widest tile of a product.
const STRIP: usize = 3 * LANES;
/// Keys whose gradients are summed over the same query rows: those that see any of them.
const KEY_PANEL: usize = 16;
/// Rows so many floats apart meet in two sets of a first-level cache: a strip reads a copy of them.
const ALIASED: usize = 512;

thread_local! {
    /// Grown to the largest head and kept.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

#[derive(Default)]
struct Scratch {
    /// Rows of q and dO; those of o and dq pass through: `[STRIP, padded head_dim]`
    rows: [Buffer; 2],
    /// Q^T and dO^T: `[padded head_dim, STRIP]`
    inputs_t: [Buffer; 2],
    /// O^T or dQ^T: `[padded head_dim, STRIP]`
    output_t: Buffer,
    /// P^T and dS^T: `[BLOCK, STRIP]`
    weights: [Buffer; 2],
    /// Keys and values of a block that lies in several segments: `[BLOCK, head_dim]`
    gathered: [Buffer; 2],
    /// What one strip and one block add to dK and dV: `[BLOCK, padded head_dim]`
    gradients: [Buffer; 2],
}

impl Scratch {
    fn grow(&mut self, head_dim: usize) {
        let all = [&mut self.rows, &mut self.inputs_t, &mut self.weights, &mut self.gathered, &mut self.gradients];
        let len = STRIP.max(BLOCK) * head_dim.next_multiple_of(PAD).max(STRIP);
        all.into_iter().flatten().chain([&mut self.output_t]).for_each(|buffer| buffer.grow(len));
    }
}

/// Floats that start with a cache line: half of the unaligned vectors would lie in two.
#[derive(Default)]
struct Buffer(Vec<Line>);

#[derive(Clone, Copy, Zeroable, Pod)]
#[repr(C, align(64))]
struct Line([f32; 16]);

impl Buffer {
    fn grow(&mut self, len: usize) {
        if self.len() < len {
            self.0.resize(len.div_ceil(16), Line::zeroed());
        }
    }
}

impl Deref for Buffer {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        bytemuck::cast_slice(&self.0)
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        bytemuck::cast_slice_mut(&mut self.0)
    }
}

/// What both directions read.
#[derive(Clone, Copy)]
struct Inputs<'a> {
    isa: Isa,
    dims: Dims,
    segments: &'a [Segment],
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
}

/// Up to STRIP query rows of a segment and a kv head: query after query, each with all heads of the group.
struct Strip<'a> {
    inputs: Inputs<'a>,
    segment: usize,
    kv_head: usize,
    rows: usize,
    /// Index of row r in `[query rows, heads]`.
    at: [usize; STRIP],
    /// Row r sees the positions `from[r]..to[r]`, both ascending; lanes behind the rows see nothing.
    from: [u32; STRIP],
    to: [u32; STRIP],
}

impl<'a> Inputs<'a> {
    fn group(&self) -> usize {
        self.dims.heads / self.dims.kv_heads
    }

    fn padded(&self) -> usize {
        self.dims.head_dim.next_multiple_of(PAD)
    }

    fn strips(&self, s: &Segment) -> usize {
        (s.queries as usize * self.group()).div_ceil(STRIP)
    }

    /// The key rows of `positions` on the path root -> segment, as (position, key row, number), last first.
    fn runs(&self, segment: usize, positions: Range<usize>) -> impl Iterator<Item = (usize, usize, usize)> + use<'a> {
        let segments = self.segments;
        let parent = |i: &usize| Some(segments[*i].parent as usize).filter(|p| *p != NO_PARENT as usize);
        let path = std::iter::successors(Some(segment), parent).map(|i| &segments[i]);
        let runs = path.map(move |s| {
            let from = positions.start.max(s.position as usize);
            let to = positions.end.min((s.position + s.len) as usize);
            (from, s.start as usize + from - s.position as usize, to.saturating_sub(from))
        });
        runs.filter(|(_, _, len)| *len > 0)
    }

    fn strip(self, segment: usize, kv_head: usize, number: usize) -> Strip<'a> {
        let (s, group, first) = (&self.segments[segment], self.group(), number * STRIP);
        let rows = STRIP.min(s.queries as usize * group - first);
        let (mut at, mut from, mut to) = ([0; STRIP], [0; STRIP], [0; STRIP]);
        let (mut query, mut head) = (first / group, first % group);
        for row in 0..rows {
            let position = (s.position + s.len - s.queries) as usize + query;
            (from[row], to[row]) = (self.dims.first_visible(position) as u32, position as u32 + 1);
            at[row] = (s.query_start as usize + query) * self.dims.heads + kv_head * group + head;
            head += 1;
            if head == group {
                (query, head) = (query + 1, 0);
            }
        }
        Strip { inputs: self, segment, kv_head, rows, at, from, to }
    }
}

impl<'a> Strip<'a> {
    fn sees(&self, row: usize, position: usize) -> bool {
        (self.from[row] as usize..self.to[row] as usize).contains(&position)
    }

    /// Positions that any row sees, block by block.
    fn blocks(&self) -> impl Iterator<Item = Range<usize>> {
        let (start, end) = (self.from[0] as usize, self.to[self.rows - 1] as usize);
        (start / BLOCK..end.div_ceil(BLOCK)).map(move |b| start.max(b * BLOCK)..end.min((b + 1) * BLOCK))
    }

    /// Whether some of `rows` does not see some of these positions.
    fn masks(&self, rows: Range<usize>, positions: &Range<usize>) -> bool {
        self.from[rows.end - 1] as usize > positions.start || (self.to[rows.start] as usize) < positions.end
    }

    /// The vectors of its rows: each one's first lane, and what of `positions` any of its rows sees.
    fn vectors(&self, positions: Range<usize>) -> impl Iterator<Item = (usize, Range<usize>)> {
        (0..self.rows).step_by(LANES).map(move |lane| {
            let last = self.rows.min(lane + LANES) - 1;
            let start = positions.start.max(self.from[lane] as usize).min(positions.end);
            (lane, start..positions.end.min(self.to[last] as usize).max(start))
        })
    }

    /// Part of a block whose rows can be read in place, or all of it: copying what lies in several segments costs many rows
    /// less than short products, and few rows, as those of a token that is decoded, more than the products.
    fn pieces(&self, positions: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let mut start = positions.start;
        std::iter::from_fn(move || {
            let rest = start..positions.end;
            if rest.is_empty() {
                return None;
            }
            if self.rows <= LANES {
                // The run that begins here is the last that `runs` finds: they come from the end.
                start += self.inputs.runs(self.segment, rest.clone()).last()?.2;
            } else {
                start = rest.end;
            }
            Some(rest.start..start)
        })
    }

    /// Asks memory for the keys and values of a block that few rows see: a token that is decoded waits for little else.
    fn fetch(&self, positions: Range<usize>) {
        let d = self.inputs.dims;
        if self.rows > LANES {
            return;
        }
        for (_, row, len) in self.inputs.runs(self.segment, positions) {
            for row in row..row + len {
                let at = (row * d.kv_heads + self.kv_head) * d.head_dim;
                [self.inputs.k, self.inputs.v].into_iter().for_each(|x| prefetch(&x[at..at + d.head_dim]));
            }
        }
    }

    /// One kv head of the rows of k or v at some positions of a block, `[positions, head_dim]`: read in place where they lie in
    /// one segment and not too far apart.
    fn rows_of<'s>(&self, positions: &Range<usize>, x: &'a [f32], gathered: &'s mut Buffer) -> Operand<'s>
    where
        'a: 's,
    {
        let d = self.inputs.dims;
        let stride = d.kv_heads * d.head_dim;
        let at = |row: usize| (row * d.kv_heads + self.kv_head) * d.head_dim;
        for (position, row, len) in self.inputs.runs(self.segment, positions.clone()) {
            if len == positions.len() && (!stride.is_multiple_of(ALIASED) || self.rows <= LANES) {
                return Operand { data: &x[at(row)..], row: stride, col: 1 };
            }
            for i in 0..len {
                let to = (position + i - positions.start) * d.head_dim;
                gathered[to..to + d.head_dim].copy_from_slice(&x[at(row + i)..][..d.head_dim]);
            }
        }
        Operand::new(gathered, d.head_dim)
    }

    /// What a vector of rows sees, if not all of `positions`.
    fn mask(&self, lane: usize, positions: &Range<usize>) -> Option<Mask<'_>> {
        let mask = || Mask { key: positions.start as u32, from: vector(&self.from, lane), to: vector(&self.to, lane) };
        self.masks(lane..self.rows.min(lane + LANES), positions).then(mask)
    }

    /// Its rows, rounded up to what `transpose` takes.
    fn squares(&self) -> usize {
        self.rows.next_multiple_of(8)
    }

    /// Copies the strip's rows of `[query rows, heads, head_dim]`, and transposes them to `[head_dim, STRIP]`.
    fn pack(&self, from: &[f32], rows: &mut [f32], columns: &mut [f32]) {
        let (head_dim, padded) = (self.inputs.dims.head_dim, self.inputs.padded());
        for (row, to) in rows.chunks_exact_mut(padded).enumerate().take(self.rows) {
            to[..head_dim].copy_from_slice(&from[self.at[row] * head_dim..][..head_dim]);
        }
        transpose(self.inputs.isa, [self.squares(), padded], rows, columns, [padded, STRIP]);
    }

    /// Writes the columns of `[head_dim, STRIP]` to the strip's rows of `[query rows, heads, head_dim]`.
    fn write_columns(&self, from: &[f32], rows: &mut [f32], to: &Shared<f32>) {
        let (head_dim, padded) = (self.inputs.dims.head_dim, self.inputs.padded());
        transpose(self.inputs.isa, [padded, self.squares()], from, rows, [STRIP, padded]);
        for (row, from) in rows.chunks_exact(padded).enumerate().take(self.rows) {
            // SAFETY: (query row, head) belongs to this strip alone.
            let to = unsafe { to.slice(self.at[row] * head_dim, head_dim) };
            copy_row(self.inputs.isa, from, to);
        }
    }

    /// `scores = x inputs_t` for the rows `x` of keys or values at some positions of a block.
    fn scores(&self, positions: &Range<usize>, x: Operand, inputs_t: &[f32], scores: &mut [f32]) {
        let shape = [positions.len(), self.rows, self.inputs.dims.head_dim];
        let c = &mut scores[positions.start % BLOCK * STRIP..];
        Product { shape, a: x, b: inputs_t, c, stride: STRIP, start: Start::Zero }.run(self.inputs.isa);
    }

    /// `output_t += x^T weights` for the rows `x` of keys or values at some positions of a block.
    fn accumulate(&self, positions: &Range<usize>, x: Operand, weights: &[f32], output_t: &mut [f32]) {
        let shape = [self.inputs.dims.head_dim, self.rows, positions.len()];
        let b = &weights[positions.start % BLOCK * STRIP..];
        let a = Operand { data: x.data, row: 1, col: x.row };
        let product = Product { shape, a, b, c: output_t, stride: STRIP, start: Start::Output };
        match self.hides_only_numbers(positions, x) {
            true => product.run(self.inputs.isa),
            false => product.run_where(|_, key, row| self.sees(row, positions.start + key)),
        }
    }

    /// Whether zeros times what some row does not see of `x` are zeros.
    fn hides_only_numbers(&self, positions: &Range<usize>, x: Operand) -> bool {
        let (first, last) = (self.from[self.rows - 1] as usize, self.to[0] as usize);
        let hidden = [positions.start..first.min(positions.end), last.max(positions.start)..positions.end];
        hidden.into_iter().filter(|keys| !keys.is_empty()).all(|keys| {
            let data = &x.data[(keys.start - positions.start) * x.row..];
            finite(self.inputs.isa, data, [keys.len(), self.inputs.dims.head_dim], x.row)
        })
    }
}

fn vector<T>(lanes: &[T], at: usize) -> &[T; LANES] {
    lanes[at..].first_chunk().expect("a strip is whole vectors")
}

fn vector_mut<T>(lanes: &mut [T], at: usize) -> &mut [T; LANES] {
    lanes[at..].first_chunk_mut().expect("a strip is whole vectors")
}

impl Attention for Cpu {
    fn attention(&self, a: Forward<Self>) -> Result<()> {
        a.check()?;
        let segments: &[Segment] = bytemuck::cast_slice(a.segments.u32s());
        check_segments("attention", segments, false)?;
        let inputs = Inputs { isa: self.isa(), dims: a.dims, segments, q: a.q.f32s(), k: a.k.f32s(), v: a.v.f32s() };
        let (o, lse) = (Shared::new(a.o.into_f32s()), Shared::new(a.lse.into_f32s()));
        // A grid of (segment, kv head, strip): short segments leave theirs early.
        let (kv_heads, strips) = (a.dims.kv_heads, segments.iter().map(|s| inputs.strips(s)).max().unwrap_or(0));
        let task = |task: usize| {
            let (segment, kv_head, number) = (task / strips / kv_heads, task / strips % kv_heads, task % strips);
            if number < inputs.strips(&segments[segment]) {
                let strip = inputs.strip(segment, kv_head, number);
                SCRATCH.with_borrow_mut(|scratch| forward(&strip, scratch, &o, &lse));
            }
        };
        self.run(|| (0..segments.len() * kv_heads * strips).into_par_iter().for_each(task));
        Ok(())
    }

    fn attention_backward(&self, a: Backward<Self>) -> Result<()> {
        a.check()?;
        let segments: &[Segment] = bytemuck::cast_slice(a.segments.u32s());
        check_segments("attention_backward", segments, true)?;
        let inputs = Inputs { isa: self.isa(), dims: a.dims, segments, q: a.q.f32s(), k: a.k.f32s(), v: a.v.f32s() };
        let (dk, dv) = (a.dk.into_f32s(), a.dv.into_f32s());
        dk.fill(0.0);
        dv.fill(0.0);
        let gradients = Gradients {
            o: a.o.f32s(),
            d_o: a.d_o.f32s(),
            lse: a.lse.f32s(),
            dq: Shared::new(a.dq.into_f32s()),
            dk: Shared::new(dk),
            dv: Shared::new(dv),
        };
        // A tree's keys collect gradients from its whole subtree: the task of its root sums them, strip after strip;
        // the tasks of its other segments find nothing to do.
        let kv_heads = a.dims.kv_heads;
        let task = |task: usize| {
            let (root, kv_head) = (task / kv_heads, task % kv_heads);
            let is_root = |i: &usize| segments[*i].parent == NO_PARENT;
            let tree = (root..segments.len()).take_while(|i| is_root(i) == (*i == root));
            for (segment, number) in tree.flat_map(|i| (0..inputs.strips(&segments[i])).map(move |n| (i, n))) {
                let strip = inputs.strip(segment, kv_head, number);
                SCRATCH.with_borrow_mut(|scratch| backward(&strip, scratch, &gradients));
            }
        };
        self.run(|| (0..segments.len() * kv_heads).into_par_iter().for_each(task));
        Ok(())
    }
}

fn forward(strip: &Strip, scratch: &mut Scratch, o: &Shared<f32>, lse: &Shared<f32>) {
    let Inputs { isa, dims: d, .. } = strip.inputs;
    let (padded, scale) = (strip.inputs.padded(), d.scale() as f32);
    scratch.grow(d.head_dim);
    let Scratch {
        rows: [rows, _], inputs_t: [q_t, _], output_t: o_t, weights: [p, _], gathered: [gathered, _], ..
    } = scratch;
    strip.pack(strip.inputs.q, rows, q_t);
    let width = strip.rows.next_multiple_of(PAD);
    o_t[..padded * STRIP].chunks_exact_mut(STRIP).for_each(|row| row[..width].fill(0.0));
    let (mut max, mut total) = ([f32::NEG_INFINITY; STRIP], [0.0; STRIP]);
    for positions in strip.blocks() {
        strip.fetch(positions.clone());
        for piece in strip.pieces(positions.clone()) {
            strip.scores(&piece, strip.rows_of(&piece, strip.inputs.k, gathered), q_t, p);
        }
        for (lane, seen) in strip.vectors(positions.clone()) {
            clear_outside(p, lane, &positions, &seen);
            if seen.is_empty() {
                continue;
            }
            let (max, total) = (vector_mut(&mut max, lane), vector_mut(&mut total, lane));
            let (mask, scores) = (strip.mask(lane, &seen), &mut p[column(lane, &seen)]);
            let shrink = softmax(isa, scale, mask, scores, max, total);
            if shrink != [1.0; LANES] {
                scale_columns(isa, &shrink, &mut o_t[lane..][..(d.head_dim - 1) * STRIP + LANES]);
            }
        }
        for piece in strip.pieces(positions) {
            strip.accumulate(&piece, strip.rows_of(&piece, strip.inputs.v, gathered), p, o_t);
        }
    }
    for at in (0..strip.rows).step_by(LANES) {
        let inverse = vector(&total, at).map(|total| 1.0 / total);
        scale_columns(isa, &inverse, &mut o_t[at..][..(d.head_dim - 1) * STRIP + LANES]);
    }
    strip.write_columns(o_t, rows, o);
    for row in 0..strip.rows {
        // SAFETY: (query row, head) belongs to this strip alone.
        unsafe { lse.slice(strip.at[row], 1)[0] = max[row] + total[row].ln() };
    }
}

/// What the backward reads and writes besides.
struct Gradients<'a> {
    o: &'a [f32],
    d_o: &'a [f32],
    lse: &'a [f32],
    dq: Shared<'a, f32>,
    dk: Shared<'a, f32>,
    dv: Shared<'a, f32>,
}

fn backward(strip: &Strip, scratch: &mut Scratch, g: &Gradients) {
    let Inputs { isa, dims: d, .. } = strip.inputs;
    let (padded, scale) = (strip.inputs.padded(), d.scale() as f32);
    scratch.grow(d.head_dim);
    let (mut delta, mut lse) = ([0.0; STRIP], [0.0; STRIP]);
    (0..strip.rows).for_each(|row| lse[row] = g.lse[strip.at[row]]);
    let Scratch { rows: [q, d_o], inputs_t: [q_t, d_o_t], output_t: dq_t, .. } = &mut *scratch;
    // o passes through the places of q and dq.
    strip.pack(g.o, q, dq_t);
    strip.pack(strip.inputs.q, q, q_t);
    strip.pack(g.d_o, d_o, d_o_t);
    let numbers = [q, d_o].into_iter().all(|rows| finite(isa, rows, [strip.rows, d.head_dim], padded));
    for at in (0..strip.rows).step_by(LANES) {
        let all = at..at + (d.head_dim - 1) * STRIP + LANES;
        column_dots(isa, &d_o_t[all.clone()], &dq_t[all], vector_mut(&mut delta, at));
    }
    scratch.output_t[..padded * STRIP].fill(0.0);
    for positions in strip.blocks() {
        let Scratch { inputs_t: [q_t, d_o_t], output_t: dq_t, weights: [p, ds], gathered, .. } = &mut *scratch;
        let [k, v] = gathered.each_mut();
        let k = strip.rows_of(&positions, strip.inputs.k, k);
        strip.scores(&positions, k, q_t, p);
        strip.scores(&positions, strip.rows_of(&positions, strip.inputs.v, v), d_o_t, ds);
        for (lane, seen) in strip.vectors(positions.clone()) {
            [&mut *p, &mut *ds].into_iter().for_each(|x| clear_outside(x, lane, &positions, &seen));
            if seen.is_empty() {
                continue;
            }
            let (lse, delta, mask) = (vector(&lse, lane), vector(&delta, lane), strip.mask(lane, &seen));
            let (scores, dp) = (&mut p[column(lane, &seen)], &mut ds[column(lane, &seen)]);
            softmax_backward(isa, scale, mask, lse, delta, scores, dp);
        }
        strip.accumulate(&positions, k, ds, dq_t);
        add_key_gradients(strip, positions, numbers, scratch, g);
    }
    let Scratch { rows: [rows, _], output_t: dq_t, .. } = scratch;
    strip.write_columns(dq_t, rows, &g.dq);
}

/// A vector of columns of a `[BLOCK, STRIP]` matrix, from the first to the last of `positions`.
fn column(lane: usize, positions: &Range<usize>) -> Range<usize> {
    let start = positions.start % BLOCK * STRIP + lane;
    start..start + (positions.len() - 1) * STRIP + LANES
}

/// Zeros in a vector of columns where `positions` are not `seen`.
fn clear_outside(weights: &mut [f32], lane: usize, positions: &Range<usize>, seen: &Range<usize>) {
    for position in (positions.start..seen.start).chain(seen.end..positions.end) {
        vector_mut(weights, position % BLOCK * STRIP + lane).fill(0.0);
    }
}

/// `dk += dS Q` and `dv += P dO` of a strip for some positions of a block; `numbers`: Q and dO are finite.
fn add_key_gradients(strip: &Strip, positions: Range<usize>, numbers: bool, scratch: &mut Scratch, g: &Gradients) {
    let Inputs { isa, dims: d, .. } = strip.inputs;
    let padded = strip.inputs.padded();
    let Scratch { rows: [q, d_o], weights: [p, ds], gradients: [dk, dv], .. } = scratch;
    for start in positions.clone().step_by(KEY_PANEL) {
        let end = positions.end.min(start + KEY_PANEL);
        // The rows that see any of these keys.
        let first = strip.to[..strip.rows].partition_point(|to| *to as usize <= start);
        let last = strip.from[..strip.rows].partition_point(|from| (*from as usize) < end);
        let shape = [end - start, d.head_dim, last - first];
        for (weights, rows, sum) in [(&*ds, &*q, &mut *dk), (&*p, &*d_o, &mut *dv)] {
            let a = Operand { data: &weights[start % BLOCK * STRIP + first..], row: STRIP, col: 1 };
            let (b, c) = (&rows[first * padded..], &mut sum[start % BLOCK * padded..]);
            let product = Product { shape, a, b, c, stride: padded, start: Start::Zero };
            if !numbers && strip.masks(0..strip.rows, &positions) {
                product.run_where(|key, row, _| strip.sees(first + row, start + key));
            } else {
                product.run(isa);
            }
        }
    }
    for (position, row, len) in strip.inputs.runs(strip.segment, positions) {
        for i in 0..len {
            let at = ((row + i) * d.kv_heads + strip.kv_head) * d.head_dim;
            for (sum, to) in [(&*dk, &g.dk), (&*dv, &g.dv)] {
                // SAFETY: a key row lies in one tree, and (tree, kv head) belongs to this task alone.
                let to = unsafe { to.slice(at, d.head_dim) };
                add_row(isa, &sum[(position + i) % BLOCK * padded..], to);
            }
        }
    }
}

/// What the rows of a vector see: those positions of `key`, `key + 1`, ... that lie in `from..to`.
#[derive(Clone, Copy)]
struct Mask<'a> {
    key: u32,
    from: &'a [u32; LANES],
    to: &'a [u32; LANES],
}

impl Mask<'_> {
    #[inline(always)]
    fn sees(&self, key: usize, lane: usize) -> bool {
        let key = self.key + key as u32;
        (self.from[lane] <= key) & (key < self.to[lane])
    }
}

dispatched! {
    /// One block of the online softmax for a vector of rows. Scores, STRIP apart from key to key, become
    /// `e^(scale * s - max)`, 0 where masked; `max` and `total` are brought up to date. Returns by what all that
    /// was summed before must be multiplied.
    fn softmax(
        scale: f32,
        mask: Option<Mask>,
        scores: &mut [f32],
        max: &mut [f32; LANES],
        total: &mut [f32; LANES],
    ) -> [f32; LANES] {
        match mask {
            None => softmax_where(scale, |_, _| true, scores, max, total),
            Some(mask) => softmax_where(scale, |key, lane| mask.sees(key, lane), scores, max, total),
        }
    }
}

#[inline(always)]
fn softmax_where(
    scale: f32,
    sees: impl Fn(usize, usize) -> bool,
    scores: &mut [f32],
    max: &mut [f32; LANES],
    total: &mut [f32; LANES],
) -> [f32; LANES] {
    let mut top = *max;
    for (key, row) in scores.chunks_mut(STRIP).enumerate() {
        let row = vector_mut(row, 0);
        for i in 0..LANES {
            let s = row[i] * scale;
            let s = if sees(key, i) { s } else { f32::NEG_INFINITY };
            row[i] = s;
            // NaN is passed over here; the sum below keeps it visible.
            top[i] = if s > top[i] { s } else { top[i] };
        }
    }
    let (mut shrink, mut base, mut sum) = ([0.0; LANES], [0.0; LANES], [0.0f32; LANES]);
    for i in 0..LANES {
        // A row that has seen nothing yet stays where it is: e^(-inf - 0) = 0.
        base[i] = if top[i] == f32::NEG_INFINITY { 0.0 } else { top[i] };
        shrink[i] = exp_of_negative(max[i] - base[i]);
    }
    for row in scores.chunks_mut(STRIP) {
        let row = vector_mut(row, 0);
        for i in 0..LANES {
            let p = exp_of_negative(row[i] - base[i]);
            sum[i] += p;
            row[i] = p;
        }
    }
    for i in 0..LANES {
        total[i] = total[i].mul_add(shrink[i], sum[i]);
    }
    *max = top;
    shrink
}

dispatched! {
    /// Scores become `p = e^(scale * s - lse)` and dP becomes `scale * p (dP - delta)`, both 0 where masked.
    fn softmax_backward(
        scale: f32,
        mask: Option<Mask>,
        lse: &[f32; LANES],
        delta: &[f32; LANES],
        scores: &mut [f32],
        dp: &mut [f32],
    ) {
        match mask {
            None => softmax_backward_where(scale, |_, _| true, [lse, delta], scores, dp),
            Some(mask) => {
                softmax_backward_where(scale, |key, lane| mask.sees(key, lane), [lse, delta], scores, dp)
            }
        }
    }
}

#[inline(always)]
fn softmax_backward_where(
    scale: f32,
    sees: impl Fn(usize, usize) -> bool,
    [lse, delta]: [&[f32; LANES]; 2],
    scores: &mut [f32],
    dp: &mut [f32],
) {
    for (key, (row, dp)) in scores.chunks_mut(STRIP).zip(dp.chunks_mut(STRIP)).enumerate() {
        let (row, dp) = (vector_mut(row, 0), vector_mut(dp, 0));
        for i in 0..LANES {
            let p = exp(row[i].mul_add(scale, -lse[i]));
            let ds = p * (dp[i] - delta[i]) * scale;
            (row[i], dp[i]) = if sees(key, i) { (p, ds) } else { (0.0, 0.0) };
        }
    }
}

dispatched! {
    /// Multiplies a vector of columns of a `[_, STRIP]` matrix.
    fn scale_columns(factors: &[f32; LANES], rows: &mut [f32]) {
        for row in rows.chunks_mut(STRIP) {
            for (x, factor) in vector_mut(row, 0).iter_mut().zip(factors) {
                *x *= factor;
            }
        }
    }
}

dispatched! {
    /// `delta += sum over rows of x * y` for a vector of columns of two `[_, STRIP]` matrices: a chain, as dP is, so
    /// that dP - delta is 0 where it must be.
    fn column_dots(x: &[f32], y: &[f32], delta: &mut [f32; LANES]) {
        let mut sum = *delta;
        for (x, y) in x.chunks(STRIP).zip(y.chunks(STRIP)) {
            let (x, y) = (vector(x, 0), vector(y, 0));
            for i in 0..LANES {
                sum[i] = x[i].mul_add(y[i], sum[i]);
            }
        }
        *delta = sum;
    }
}

dispatched! {
    /// Masked terms leave the sign of a zero open: here it becomes plus.
    fn copy_row(from: &[f32], to: &mut [f32]) {
        to.iter_mut().zip(from).for_each(|(to, from)| *to = from + 0.0);
    }
}

dispatched! {
    fn add_row(from: &[f32], to: &mut [f32]) {
        to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
    }
}

dispatched! {
    /// Whether a `[rows, cols]` matrix, its rows `stride` apart, holds neither NaN nor infinity.
    fn finite(x: &[f32], shape: [usize; 2], stride: usize) -> bool {
        let [rows, cols] = shape;
        let mut largest = [0u32; LANES];
        for row in x.chunks(stride).take(rows) {
            let (vectors, tail) = row[..cols].as_chunks::<LANES>();
            for x in vectors {
                for i in 0..LANES {
                    largest[i] = largest[i].max(x[i].abs().to_bits());
                }
            }
            tail.iter().for_each(|x| largest[0] = largest[0].max(x.abs().to_bits()));
        }
        largest.into_iter().all(|bits| bits < f32::INFINITY.to_bits())
    }
}
