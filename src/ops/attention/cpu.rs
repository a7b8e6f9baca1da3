use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use super::{Attention, Backward, Dims, Forward, NO_PARENT, Segment, path_rows};
use crate::device::{Cpu, Isa};
use crate::error::Result;
use crate::ops::simd::{LANES, Shared, dispatched, exp, sum_lanes};

/// Keys of a block of the online softmax; blocks start at multiples of it.
const BLOCK: usize = 64;

thread_local! {
    /// Gathered keys and values of one path; grown to the longest and kept.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// The keys and values of one path and one kv head, by position from `first` on.
#[derive(Default)]
struct Scratch {
    /// `[head_dim, stride]`: score loops run along positions.
    keys_t: Vec<f32>,
    values_t: Vec<f32>,
    /// `[positions, head_dim]`
    keys: Vec<f32>,
    values: Vec<f32>,
    /// Gradients, `[positions, head_dim]`
    dkeys: Vec<f32>,
    dvalues: Vec<f32>,
    /// Key row of each position.
    rows: Vec<usize>,
    first: usize,
    stride: usize,
}

/// `[rows, heads, head_dim]` and one head of it.
#[derive(Clone, Copy)]
struct HeadOf<'a> {
    data: &'a [f32],
    heads: usize,
    head: usize,
    head_dim: usize,
}

impl<'a> HeadOf<'a> {
    fn row(&self, row: usize) -> &'a [f32] {
        &self.data[(row * self.heads + self.head) * self.head_dim..][..self.head_dim]
    }
}

impl Scratch {
    /// Gathers what the queries of segment `index` see. `first` is a multiple of [`BLOCK`].
    fn gather(&mut self, segments: &[Segment], index: usize, dims: &Dims, k: HeadOf, v: HeadOf) {
        let s = segments[index];
        let first_query = (s.position + s.len - s.queries) as usize;
        self.first = dims.first_visible(first_query) / BLOCK * BLOCK;
        self.rows.clear();
        self.rows.extend(path_rows(segments, index).skip(self.first));
        self.stride = self.rows.len().next_multiple_of(BLOCK);
        self.values.clear();
        self.rows.iter().for_each(|row| self.values.extend_from_slice(v.row(*row)));
        transpose(&self.rows, k, self.stride, &mut self.keys_t);
    }

    /// What only the backward needs: keys by position, values transposed, zeroed gradients.
    fn gather_backward(&mut self, k: HeadOf, v: HeadOf) {
        self.keys.clear();
        self.rows.iter().for_each(|row| self.keys.extend_from_slice(k.row(*row)));
        transpose(&self.rows, v, self.stride, &mut self.values_t);
        for gradient in [&mut self.dkeys, &mut self.dvalues] {
            gradient.clear();
            gradient.resize(self.keys.len(), 0.0);
        }
    }
}

fn transpose(rows: &[usize], head: HeadOf, stride: usize, out: &mut Vec<f32>) {
    out.clear();
    out.resize(stride * head.head_dim, 0.0);
    for (j, row) in rows.iter().enumerate() {
        for (i, x) in head.row(*row).iter().enumerate() {
            out[i * stride + j] = *x;
        }
    }
}

/// Blocks of the positions `visible`, as (first position of the block, positions inside it).
fn blocks(visible: Range<usize>) -> impl Iterator<Item = (usize, Range<usize>)> {
    (visible.start / BLOCK..visible.end.div_ceil(BLOCK)).map(move |block| {
        let start = block * BLOCK;
        (start, visible.start.max(start) - start..visible.end.min(start + BLOCK) - start)
    })
}

impl Attention for Cpu {
    fn attention(&self, a: Forward<Self>) -> Result<()> {
        a.check()?;
        let (d, isa) = (a.dims, self.isa());
        let segments: &[Segment] = bytemuck::cast_slice(a.segments.u32s());
        let (q, k, v) = (a.q.f32s(), a.k.f32s(), a.v.f32s());
        let (o, lse) = (Shared::new(a.o.into_f32s()), Shared::new(a.lse.into_f32s()));
        let group = d.heads / d.kv_heads;
        let task = |task: usize| {
            let (index, kv_head) = (task / d.kv_heads, task % d.kv_heads);
            let s = segments[index];
            if s.queries == 0 {
                return;
            }
            let kv = |data| HeadOf { data, heads: d.kv_heads, head: kv_head, head_dim: d.head_dim };
            SCRATCH.with_borrow_mut(|scratch| {
                scratch.gather(segments, index, &d, kv(k), kv(v));
                for i in 0..s.queries as usize {
                    let position = (s.position + s.len - s.queries) as usize + i;
                    let visible = d.first_visible(position) - scratch.first..position + 1 - scratch.first;
                    for head in kv_head * group..(kv_head + 1) * group {
                        let at = (s.query_start as usize + i) * d.heads + head;
                        // SAFETY: (query row, head) belongs to this task alone.
                        let o = unsafe { o.slice(at * d.head_dim, d.head_dim) };
                        let q = &q[at * d.head_dim..][..d.head_dim];
                        let value = query_forward(isa, d.scale() as f32, q, scratch, visible.clone(), o);
                        // SAFETY: as above.
                        unsafe { lse.slice(at, 1)[0] = value };
                    }
                }
            });
        };
        self.run(|| (0..segments.len() * d.kv_heads).into_par_iter().for_each(task));
        Ok(())
    }

    fn attention_backward(&self, a: Backward<Self>) -> Result<()> {
        a.check()?;
        let (d, isa) = (a.dims, self.isa());
        let segments: &[Segment] = bytemuck::cast_slice(a.segments.u32s());
        let (q, k, v, o, d_o, lse) = (a.q.f32s(), a.k.f32s(), a.v.f32s(), a.o.f32s(), a.d_o.f32s(), a.lse.f32s());
        let (dk, dv) = (a.dk.into_f32s(), a.dv.into_f32s());
        dk.fill(0.0);
        dv.fill(0.0);
        let (dq, dk, dv) = (Shared::new(a.dq.into_f32s()), Shared::new(dk), Shared::new(dv));
        let group = d.heads / d.kv_heads;
        // A tree's keys collect gradients from its whole subtree: one task sums them, segment after segment.
        let trees: Vec<Range<usize>> = trees(segments).collect();
        let task = |task: usize| {
            let (tree, kv_head) = (trees[task / d.kv_heads].clone(), task % d.kv_heads);
            let kv = |data| HeadOf { data, heads: d.kv_heads, head: kv_head, head_dim: d.head_dim };
            SCRATCH.with_borrow_mut(|scratch| {
                for index in tree {
                    let s = segments[index];
                    scratch.gather(segments, index, &d, kv(k), kv(v));
                    scratch.gather_backward(kv(k), kv(v));
                    for i in 0..s.len as usize {
                        let position = s.position as usize + i;
                        let visible = d.first_visible(position) - scratch.first..position + 1 - scratch.first;
                        for head in kv_head * group..(kv_head + 1) * group {
                            let at = (s.start as usize + i) * d.heads + head;
                            let wide = at * d.head_dim..(at + 1) * d.head_dim;
                            let query = QueryBackward {
                                scale: d.scale() as f32,
                                q: &q[wide.clone()],
                                o: &o[wide.clone()],
                                d_o: &d_o[wide.clone()],
                                lse: lse[at],
                                visible: visible.clone(),
                            };
                            // SAFETY: (query row, head) belongs to this task alone.
                            let dq = unsafe { dq.slice(wide.start, d.head_dim) };
                            query_backward(isa, query, scratch, dq);
                        }
                    }
                    for (j, row) in scratch.rows.iter().enumerate() {
                        let at = (row * d.kv_heads + kv_head) * d.head_dim;
                        // SAFETY: a key row lies in one tree, and (tree, kv head) belongs to this task alone.
                        let (dk, dv) = unsafe { (dk.slice(at, d.head_dim), dv.slice(at, d.head_dim)) };
                        let from = j * d.head_dim..(j + 1) * d.head_dim;
                        dk.iter_mut().zip(&scratch.dkeys[from.clone()]).for_each(|(x, y)| *x += y);
                        dv.iter_mut().zip(&scratch.dvalues[from]).for_each(|(x, y)| *x += y);
                    }
                }
            });
        };
        self.run(|| (0..trees.len() * d.kv_heads).into_par_iter().for_each(task));
        Ok(())
    }
}

/// Runs of segments that hang together: a root and what follows it up to the next root.
fn trees(segments: &[Segment]) -> impl Iterator<Item = Range<usize>> {
    let root = |i: &usize| *i == segments.len() || segments[*i].parent == NO_PARENT;
    let roots = (0..segments.len()).filter(root);
    roots.map(move |start| start..(start + 1..=segments.len()).find(root).expect("the end counts as a root"))
}

dispatched! {
    /// `scores[j] = x . columns[.., j]` for a whole block, each a chain over the head dimension.
    fn block_scores(x: &[f32], columns: &[f32], stride: usize, block: usize, scores: &mut [f32; BLOCK]) {
        let mut local = [0.0f32; BLOCK];
        for (x, column) in x.iter().zip(columns.chunks_exact(stride)) {
            let column = column[block..].first_chunk::<BLOCK>().expect("a stride is whole blocks");
            for i in 0..BLOCK {
                local[i] = x.mul_add(column[i], local[i]);
            }
        }
        *scores = local;
    }
}

dispatched! {
    /// Scores become `e^(scale * s - max)` inside `valid` and 0 outside; returns their fixed-order sum.
    fn block_exp(scale: f32, max: f32, valid: Range<usize>, scores: &mut [f32; BLOCK]) -> f32 {
        for s in scores.iter_mut() {
            *s = exp(*s * scale - max);
        }
        scores[..valid.start].fill(0.0);
        scores[valid.end..].fill(0.0);
        let mut lanes = [0.0f32; LANES];
        for chunk in scores.chunks_exact(LANES) {
            for (lane, s) in lanes.iter_mut().zip(chunk) {
                *lane += s;
            }
        }
        sum_lanes(lanes)
    }
}

dispatched! {
    /// `sum += weights[j] * rows[j]` in the order of j.
    fn add_rows(weights: &[f32], rows: &[f32], sum: &mut [f32]) {
        const WIDE: usize = 4 * LANES;
        let (width, mut start) = (sum.len(), 0);
        while let Some(sum) = sum[start..].first_chunk_mut::<WIDE>() {
            add_columns(weights, rows, width, start, sum);
            start += WIDE;
        }
        while let Some(sum) = sum[start..].first_chunk_mut::<LANES>() {
            add_columns(weights, rows, width, start, sum);
            start += LANES;
        }
        for (w, row) in weights.iter().zip(rows.chunks_exact(width)) {
            for (sum, x) in sum[start..].iter_mut().zip(&row[start..]) {
                *sum = w.mul_add(*x, *sum);
            }
        }
    }
}

/// As `add_rows` for the columns from `start` on, whose sums stay in registers.
#[inline(always)]
fn add_columns<const N: usize>(weights: &[f32], rows: &[f32], width: usize, start: usize, sum: &mut [f32; N]) {
    let mut local = *sum;
    for (w, row) in weights.iter().zip(rows.chunks_exact(width)) {
        let row = row[start..].first_chunk::<N>().expect("the sums are as long as the rows");
        for i in 0..N {
            local[i] = w.mul_add(row[i], local[i]);
        }
    }
    *sum = local;
}

dispatched! {
    /// The largest of `max` and the scaled scores; NaN is passed over.
    fn block_max(scale: f32, max: f32, scores: &[f32]) -> f32 {
        let mut top = [max; LANES];
        for chunk in scores.chunks(LANES) {
            for (top, s) in top.iter_mut().zip(chunk) {
                *top = top.max(s * scale);
            }
        }
        top.into_iter().fold(max, f32::max)
    }
}

dispatched! {
    /// One chain over the head dimension.
    fn chain(x: &[f32], y: &[f32]) -> f32 {
        x.iter().zip(y).fold(0.0, |sum, (x, y)| x.mul_add(*y, sum))
    }
}

dispatched! {
    /// `rows[j] += weights[j] * x`.
    fn add_outer(weights: &[f32], x: &[f32], rows: &mut [f32]) {
        for (w, row) in weights.iter().zip(rows.chunks_exact_mut(x.len())) {
            for (sum, x) in row.iter_mut().zip(x) {
                *sum = w.mul_add(*x, *sum);
            }
        }
    }
}

/// One query of one head; `visible` are indices into the gathered positions. Returns the log-sum-exp.
fn query_forward(isa: Isa, scale: f32, q: &[f32], kv: &Scratch, visible: Range<usize>, o: &mut [f32]) -> f32 {
    let (mut max, mut total) = (f32::NEG_INFINITY, 0.0f32);
    let mut scores = [0.0f32; BLOCK];
    o.fill(0.0);
    for (block, valid) in blocks(visible) {
        block_scores(isa, q, &kv.keys_t, kv.stride, block, &mut scores);
        // NaN scores must stay visible: `max` would drop them, the sum below keeps them.
        let new_max = block_max(isa, scale, max, &scores[valid.clone()]);
        let shrink = if max == f32::NEG_INFINITY { 0.0 } else { exp(max - new_max) };
        total = total * shrink + block_exp(isa, scale, new_max, valid.clone(), &mut scores);
        o.iter_mut().for_each(|o| *o *= shrink);
        let rows = (block + valid.start) * q.len()..(block + valid.end) * q.len();
        add_rows(isa, &scores[valid], &kv.values[rows], o);
        max = new_max;
    }
    o.iter_mut().for_each(|o| *o /= total);
    max + total.ln()
}

struct QueryBackward<'a> {
    scale: f32,
    q: &'a [f32],
    o: &'a [f32],
    d_o: &'a [f32],
    lse: f32,
    visible: Range<usize>,
}

fn query_backward(isa: Isa, a: QueryBackward, kv: &mut Scratch, dq: &mut [f32]) {
    let delta = chain(isa, a.d_o, a.o);
    let (mut p, mut ds) = ([0.0f32; BLOCK], [0.0f32; BLOCK]);
    dq.fill(0.0);
    for (block, valid) in blocks(a.visible) {
        block_scores(isa, a.q, &kv.keys_t, kv.stride, block, &mut p);
        block_exp(isa, a.scale, a.lse, valid.clone(), &mut p);
        block_scores(isa, a.d_o, &kv.values_t, kv.stride, block, &mut ds);
        for (ds, p) in ds.iter_mut().zip(&p) {
            *ds = p * (*ds - delta) * a.scale;
        }
        let rows = (block + valid.start) * a.q.len()..(block + valid.end) * a.q.len();
        add_rows(isa, &ds[valid.clone()], &kv.keys[rows.clone()], dq);
        add_outer(isa, &ds[valid.clone()], a.q, &mut kv.dkeys[rows.clone()]);
        add_outer(isa, &p[valid], a.d_o, &mut kv.dvalues[rows]);
    }
}
