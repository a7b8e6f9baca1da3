//! Causal attention over prefix trees of segments, with grouped heads and an optional sliding window.
//!
//! ```text
//! a query at position p of a segment sees the keys at positions j of the path root -> segment with
//!   j <= p   and   j > p - window
//! s_j = scale * q . k_j        P = softmax(s)        o = sum_j P_j v_j        lse = ln sum_j e^(s_j)
//! dP_j = do . v_j     ds_j = P_j (dP_j - do . o)
//! dq = scale * sum_j ds_j k_j        dk_j += scale * ds_j q        dv_j += P_j do
//! ```
//! Online softmax over blocks of keys (Milakov and Gimelshein, arXiv:1805.02867; Dao et al., arXiv:2205.14135):
//! no `[rows, rows]` matrix exists. Blocks start at multiples of a fixed size of the absolute position, so a
//! shared prefix, an unshared one and a KV cache give the same bits. Saved for the backward: q, k, v, o, lse.

mod cpu;
mod cuda;
mod product;
mod reference;

use bytemuck::{Pod, Zeroable};

use crate::device::{Device, Dry, View, ViewMut};
use crate::error::{Error, Result};

/// `parent` of a root.
pub const NO_PARENT: u32 = u32::MAX;

/// One row of the segment table. Parents come before their children, and a tree's segments are adjacent.
///
/// Training queries every row (`queries == len`, `query_start == start`); decoding keeps the keys of a
/// sequence in one slot and queries only its last rows.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct Segment {
    /// First key row.
    pub start: u32,
    /// Key rows.
    pub len: u32,
    /// Index of the parent, or [`NO_PARENT`].
    pub parent: u32,
    /// Absolute position of its first key: the sum of its ancestors' `len`.
    pub position: u32,
    /// First query row.
    pub query_start: u32,
    /// Query rows: the segment's last `queries` positions.
    pub queries: u32,
}

impl Segment {
    /// Columns of the segment table.
    pub const WORDS: usize = 6;
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Dims {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Keys that a query sees at most, itself included.
    pub window: Option<usize>,
    /// Longest path from a root to a leaf; prices the work where no segment table is at hand.
    pub longest: usize,
}

impl Dims {
    pub fn scale(&self) -> f64 {
        1.0 / (self.head_dim as f64).sqrt()
    }

    /// First position that a query at `position` sees.
    fn first_visible(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }
}

pub struct Forward<'a, D: Device> {
    pub dims: Dims,
    /// `[segments, 6]`
    pub segments: View<'a, D>,
    /// `[query rows, heads * head_dim]`
    pub q: View<'a, D>,
    /// `[key rows, kv_heads * head_dim]`
    pub k: View<'a, D>,
    /// `[key rows, kv_heads * head_dim]`
    pub v: View<'a, D>,
    /// `=` `[query rows, heads * head_dim]`
    pub o: ViewMut<'a, D>,
    /// `=` `[query rows, heads]`
    pub lse: ViewMut<'a, D>,
}

/// The backward of a batch that queries every row.
pub struct Backward<'a, D: Device> {
    pub dims: Dims,
    /// `[segments, 6]`
    pub segments: View<'a, D>,
    /// `[rows, heads * head_dim]`
    pub d_o: View<'a, D>,
    pub q: View<'a, D>,
    /// `[rows, kv_heads * head_dim]`
    pub k: View<'a, D>,
    pub v: View<'a, D>,
    /// `[rows, heads * head_dim]`
    pub o: View<'a, D>,
    /// `[rows, heads]`
    pub lse: View<'a, D>,
    /// `=` `[rows, heads * head_dim]`
    pub dq: ViewMut<'a, D>,
    /// `=` `[rows, kv_heads * head_dim]`
    pub dk: ViewMut<'a, D>,
    /// `=`
    pub dv: ViewMut<'a, D>,
}

pub trait Attention: Device {
    fn attention(&self, a: Forward<Self>) -> Result<()>;
    fn attention_backward(&self, a: Backward<Self>) -> Result<()>;
}

fn check_heads(op: &'static str, d: &Dims) -> Result<()> {
    if d.kv_heads == 0 || !d.heads.is_multiple_of(d.kv_heads) {
        return Err(Error::op(op, format!("{} heads do not share {} kv_heads evenly", d.heads, d.kv_heads)));
    }
    Ok(())
}

impl<D: Device> Forward<'_, D> {
    fn check(&self) -> Result<()> {
        let (d, q_rows, k_rows) = (&self.dims, self.q.rows(), self.k.rows());
        check_heads("attention", d)?;
        super::require("attention", "segments", self.segments.shape(), [self.segments.rows(), Segment::WORDS])?;
        super::require("attention", "q", self.q.shape(), [q_rows, d.heads * d.head_dim])?;
        super::require("attention", "k", self.k.shape(), [k_rows, d.kv_heads * d.head_dim])?;
        super::require("attention", "v", self.v.shape(), self.k.shape())?;
        super::require("attention", "o", self.o.shape(), self.q.shape())?;
        super::require("attention", "lse", self.lse.shape(), [q_rows, d.heads])
    }
}

impl<D: Device> Backward<'_, D> {
    fn check(&self) -> Result<()> {
        let (d, rows) = (&self.dims, self.q.rows());
        const OP: &str = "attention_backward";
        check_heads(OP, d)?;
        super::require(OP, "segments", self.segments.shape(), [self.segments.rows(), Segment::WORDS])?;
        let wide = [("q", self.q), ("d_o", self.d_o), ("o", self.o), ("dq", self.dq.view())];
        for (what, view) in wide {
            super::require(OP, what, view.shape(), [rows, d.heads * d.head_dim])?;
        }
        let narrow = [("k", self.k), ("v", self.v), ("dk", self.dk.view()), ("dv", self.dv.view())];
        for (what, view) in narrow {
            super::require(OP, what, view.shape(), [rows, d.kv_heads * d.head_dim])?;
        }
        super::require(OP, "lse", self.lse.shape(), [rows, d.heads])
    }
}

/// Refuses a table whose segments would write each other's rows.
fn check_segments(op: &'static str, segments: &[Segment], every_row_is_queried: bool) -> Result<()> {
    let (mut queries, mut keys) = (0, 0);
    for (index, s) in segments.iter().enumerate() {
        let parent = s.parent == NO_PARENT || (s.parent as usize) < index;
        let behind = |p: &Segment| p.position + p.len == s.position;
        let placed = parent && segments.get(s.parent as usize).map_or(s.position == 0, behind);
        let whole = s.queries == s.len && s.query_start == s.start && s.start >= keys;
        if !placed || s.queries > s.len || s.query_start < queries || (every_row_is_queried && !whole) {
            return Err(Error::op(op, format!("segment {index} does not fit those before it: {s:?}")));
        }
        (queries, keys) = (s.query_start + s.queries, s.start + s.len);
    }
    Ok(())
}

/// How many (query, key) pairs the masks leave; without a table half of `rows x longest`, as if no prefix were shared.
fn visible_pairs(dims: &Dims, segments: View<Dry>, rows: usize) -> usize {
    let Some(words) = segments.indices() else { return rows * dims.longest / 2 };
    let table: &[Segment] = bytemuck::cast_slice(words);
    let seen = |position: usize| position + 1 - dims.first_visible(position);
    let of = |s: &Segment| {
        let end = (s.position + s.len) as usize;
        (end - s.queries as usize..end).map(seen).sum::<usize>()
    };
    table.iter().map(of).sum()
}

impl Attention for Dry {
    /// Two products over the visible pairs.
    fn attention(&self, a: Forward<Self>) -> Result<()> {
        a.check()?;
        let pairs = visible_pairs(&a.dims, a.segments, a.q.rows());
        self.count(2 * 2 * pairs * a.dims.heads * a.dims.head_dim);
        Ok(())
    }

    /// Five products where the forward has two.
    fn attention_backward(&self, a: Backward<Self>) -> Result<()> {
        a.check()?;
        let pairs = visible_pairs(&a.dims, a.segments, a.q.rows());
        self.count(5 * 2 * pairs * a.dims.heads * a.dims.head_dim);
        Ok(())
    }
}
