//! Rows picked by index: embedding lookup, completion rows, writes into a KV cache.
//!
//! ```text
//! gather    y[i] = x[index[i]]  or  +=    backward  dx[index[i]] += dy[i], in the order of i
//! scatter   y[index[i]] = x[i]
//! ```

mod cpu;
mod cuda;
mod reference;

use crate::device::{Device, Dry, View, ViewMut};
use crate::error::Result;

pub struct Gather<'a, D: Device> {
    /// `[n, cols]`
    pub x: View<'a, D>,
    /// `[rows, 1]`, each < n
    pub index: View<'a, D>,
    /// `=` `[rows, cols]`
    pub y: ViewMut<'a, D>,
}

pub struct GatherAdd<'a, D: Device> {
    /// `[n, cols]`
    pub x: View<'a, D>,
    /// `[rows, 1]`, each < n
    pub index: View<'a, D>,
    /// `+=` `[rows, cols]`: learned positions on token embeddings
    pub y: ViewMut<'a, D>,
}

/// Of both gathers.
pub struct GatherBackward<'a, D: Device> {
    /// `[rows, cols]`
    pub dy: View<'a, D>,
    /// `[rows, 1]`; an index may repeat
    pub index: View<'a, D>,
    /// `+=` `[n, cols]`
    pub dx: ViewMut<'a, D>,
}

pub struct Scatter<'a, D: Device> {
    /// `[rows, cols]`
    pub x: View<'a, D>,
    /// `[rows, 1]`, no index twice
    pub index: View<'a, D>,
    /// `=` on the named rows of `[n, cols]`; the others stay
    pub y: ViewMut<'a, D>,
}

pub trait Rows: Device {
    fn gather(&self, a: Gather<Self>) -> Result<()>;
    fn gather_add(&self, a: GatherAdd<Self>) -> Result<()>;
    fn gather_backward(&self, a: GatherBackward<Self>) -> Result<()>;
    fn scatter(&self, a: Scatter<Self>) -> Result<()>;
}

/// Shape check shared by all: `by_index` rows on one side, the same columns on both.
fn check(op: &'static str, by_index: [usize; 2], whole: [usize; 2], index: [usize; 2]) -> Result<()> {
    super::require(op, "index", index, [by_index[0], 1])?;
    super::require(op, "the indexed tensor", whole, [whole[0], by_index[1]])
}

impl Rows for Dry {
    fn gather(&self, a: Gather<Self>) -> Result<()> {
        check("gather", a.y.shape(), a.x.shape(), a.index.shape())
    }

    fn gather_add(&self, a: GatherAdd<Self>) -> Result<()> {
        check("gather_add", a.y.shape(), a.x.shape(), a.index.shape())
    }

    fn gather_backward(&self, a: GatherBackward<Self>) -> Result<()> {
        check("gather_backward", a.dy.shape(), a.dx.shape(), a.index.shape())
    }

    fn scatter(&self, a: Scatter<Self>) -> Result<()> {
        check("scatter", a.x.shape(), a.y.shape(), a.index.shape())
    }
}
