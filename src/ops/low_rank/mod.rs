//! The low-rank product beside a linear layer: what an adapter adds (Hu et al., arXiv:2106.09685, Eq. 3).
//!
//! ```text
//! t = scale x A^T        y += t B^T
//! t = scale x A^T        dB += dy^T t        u = scale dy B        dA += u^T x        dx += u A
//! ```
//! Saved for the backward: `x`. `t` is made again: it costs what it takes to read x, and keeping it would take memory in every
//! layer.
//!
//! Several adapters side by side are one of the sum of their ranks. With a [`Blend`] each row takes its own share of each of
//! them, forward only: `t[r, k] *= weights[r, owner[k]]` between the two products.
//!
//! Where B is 0, y stays as it is, bit for bit (a zero becomes a positive one).

mod cpu;
mod cuda;
mod reference;

pub use cpu::scratch_bytes;

use super::linear;
use crate::device::{Device, Dry, View, ViewMut};
use crate::error::Result;

pub struct Forward<'a, D: Device> {
    /// `[rows, inputs]`
    pub x: View<'a, D>,
    /// `[rank, inputs]`
    pub a: View<'a, D>,
    /// `[outputs, rank]`
    pub b: View<'a, D>,
    pub scale: f32,
    pub blend: Option<Blend<'a, D>>,
    /// `[rows, rank]`, overwritten
    pub scratch: ViewMut<'a, D>,
    /// `+=` `[rows, outputs]`
    pub y: ViewMut<'a, D>,
}

/// What stands beside a linear layer: [`Forward`] without what the layer has.
pub struct Factors<'a, D: Device> {
    /// `[rank, inputs]`
    pub a: View<'a, D>,
    /// `[outputs, rank]`
    pub b: View<'a, D>,
    pub scale: f32,
    pub blend: Option<Blend<'a, D>>,
    /// `[rows, rank]`, overwritten
    pub scratch: ViewMut<'a, D>,
}

impl<'a, D: Device> Factors<'a, D> {
    pub fn beside(self, x: View<'a, D>, y: ViewMut<'a, D>) -> Forward<'a, D> {
        let Self { a, b, scale, blend, scratch } = self;
        Forward { x, a, b, scale, blend, scratch, y }
    }
}

/// How much of each adapter each row takes.
pub struct Blend<'a, D: Device> {
    /// `[rows, adapters]`, F32
    pub weights: View<'a, D>,
    /// `[rank, 1]`: the adapter that a column of `t` belongs to, each < adapters
    pub owner: View<'a, D>,
}

pub struct Backward<'a, D: Device> {
    /// `[rows, outputs]`
    pub dy: View<'a, D>,
    /// `[rows, inputs]`
    pub x: View<'a, D>,
    /// `[rank, inputs]`
    pub a: View<'a, D>,
    /// `[outputs, rank]`
    pub b: View<'a, D>,
    pub scale: f32,
    /// `[rows, rank]`, overwritten
    pub scratch: ViewMut<'a, D>,
    /// `+=` `[rows, inputs]`
    pub dx: ViewMut<'a, D>,
    /// `+=` `[rank, inputs]`
    pub da: Option<ViewMut<'a, D>>,
    /// `+=` `[outputs, rank]`
    pub db: Option<ViewMut<'a, D>>,
}

pub trait LowRank: Device {
    fn low_rank(&self, a: Forward<Self>) -> Result<()>;
    fn low_rank_backward(&self, a: Backward<Self>) -> Result<()>;

    /// A linear layer and what stands beside it, one after the other, or at once with the same bits.
    fn linear_low_rank(&self, mut linear: linear::Forward<Self>, factors: Factors<Self>) -> Result<()>
    where
        Self: linear::Linear,
    {
        let x = linear.x;
        self.linear(linear::Forward { y: linear.y.again(), ..linear })?;
        self.low_rank(factors.beside(x, linear.y))
    }
}

struct Dims {
    rows: usize,
    inputs: usize,
    outputs: usize,
    rank: usize,
}

/// Of a forward pass: `[x, a, b, scratch, y]` and the blend.
fn check<D: Device>([x, a, b, scratch, y]: [[usize; 2]; 5], blend: Option<&Blend<D>>) -> Result<Dims> {
    let ([rows, inputs], [rank, outputs]) = (x, [a[0], b[0]]);
    super::require("low_rank", "a", a, [rank, inputs])?;
    super::require("low_rank", "b", b, [outputs, rank])?;
    super::require("low_rank", "scratch", scratch, [rows, rank])?;
    super::require("low_rank", "y", y, [rows, outputs])?;
    if let Some(Blend { weights, owner }) = blend {
        super::require("low_rank", "weights", weights.shape(), [rows, weights.cols()])?;
        super::require("low_rank", "owner", owner.shape(), [rank, 1])?;
    }
    Ok(Dims { rows, inputs, outputs, rank })
}

impl<D: Device> Forward<'_, D> {
    fn check(&self) -> Result<Dims> {
        let Self { x, a, b, scratch, y, .. } = self;
        check([x.shape(), a.shape(), b.shape(), scratch.shape(), y.shape()], self.blend.as_ref())
    }
}

impl<D: Device> Backward<'_, D> {
    fn check(&self) -> Result<Dims> {
        let ([rows, inputs], [rank, outputs]) = (self.x.shape(), [self.a.rows(), self.dy.cols()]);
        super::require("low_rank_backward", "dy", self.dy.shape(), [rows, outputs])?;
        super::require("low_rank_backward", "a", self.a.shape(), [rank, inputs])?;
        super::require("low_rank_backward", "b", self.b.shape(), [outputs, rank])?;
        super::require("low_rank_backward", "scratch", self.scratch.shape(), [rows, rank])?;
        super::require("low_rank_backward", "dx", self.dx.shape(), [rows, inputs])?;
        if let Some(da) = &self.da {
            super::require("low_rank_backward", "da", da.shape(), [rank, inputs])?;
        }
        if let Some(db) = &self.db {
            super::require("low_rank_backward", "db", db.shape(), [outputs, rank])?;
        }
        Ok(Dims { rows, inputs, outputs, rank })
    }
}

impl LowRank for Dry {
    fn low_rank(&self, a: Forward<Self>) -> Result<()> {
        let d = a.check()?;
        let blend = usize::from(a.blend.is_some());
        self.count(2 * d.rows * d.rank * (d.inputs + d.outputs) + blend * d.rows * d.rank);
        Ok(())
    }

    fn low_rank_backward(&self, a: Backward<Self>) -> Result<()> {
        let d = a.check()?;
        let (of_a, of_b) = (usize::from(a.da.is_some()), usize::from(a.db.is_some()));
        // t is made for dB alone.
        let inputs = d.inputs * (1 + of_a + of_b);
        self.count(2 * d.rows * d.rank * (inputs + d.outputs * (1 + of_b)));
        Ok(())
    }
}
