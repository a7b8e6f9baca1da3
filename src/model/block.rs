//! One decoder layer: attention and MLP, each on a normalized copy of the residual stream.
//!
//! ```text
//! one behind the other   mid = x + attention(norm(x))     y = mid + mlp(norm(mid))
//! side by side           mid = x + attention(norm(x))     y = mid + mlp(norm(x))
//! ```

use super::acts::{BlockActs, Scratch, Work};
use super::attention::Attention;
use super::batch::Batch;
use super::kv::KvLayer;
use super::layers::{Build, Linear, RopeTable};
use super::mlp::Mlp;
use super::param::Param;
use crate::device::{Device, Tensor, ViewMut};
use crate::error::Result;
use crate::ops::{Backend, rope::Direction};

pub struct Block<D: Device> {
    attention: Attention<D>,
    mlp: Mlp<D>,
    parallel: bool,
}

/// What a pass through a block reads besides the residual stream.
pub struct Context<'a, B: Device> {
    pub device: &'a B,
    pub batch: &'a Batch<B>,
    /// `None` where positions are learned.
    pub rope: Option<&'a RopeTable<B>>,
}

impl<B: Backend> Context<'_, B> {
    /// Turns heads by the batch's positions, where positions are rotations.
    pub fn rotate(&self, heads: ViewMut<B>, direction: Direction) -> Result<()> {
        self.rope.map_or(Ok(()), |rope| rope.rotate(self.device, heads, self.batch.positions(), direction))
    }
}

impl<D: Device> Block<D> {
    pub fn new(build: &mut Build<D>, layer: usize) -> Self {
        let parallel = build.spec.parallel_residual;
        Self { attention: Attention::new(build, layer), mlp: Mlp::new(build, layer), parallel }
    }

    pub fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear<D>> {
        self.attention.linears_mut().chain(self.mlp.linears_mut())
    }

    pub fn params_mut(&mut self) -> impl Iterator<Item = &mut Param<D>> {
        self.attention.params_mut().chain(self.mlp.params_mut())
    }
}

impl<B: Backend> Block<B> {
    /// `kv`: keys and values are appended to a cache and read from it; otherwise they are the batch's own.
    pub fn forward(
        &self,
        c: &Context<B>,
        x: &Tensor<B>,
        y: &mut Tensor<B>,
        a: &mut BlockActs<B>,
        w: &mut Work<B>,
        kv: Option<KvLayer<B>>,
    ) -> Result<()> {
        self.attention.forward(c, x, a, w, kv)?;
        self.mlp.forward(c, self.parallel.then_some(x), a, w, y)
    }

    /// `scratch.d_residual` holds the gradient by the block's output and becomes that by its input. Side by side,
    /// attention takes it before the MLP has added its part.
    pub fn backward(
        &mut self,
        c: &Context<B>,
        x: &Tensor<B>,
        a: &mut BlockActs<B>,
        w: &mut Work<B>,
        s: &mut Scratch<B>,
    ) -> Result<()> {
        if self.parallel {
            self.attention.backward_output(c, a, w, s)?;
            self.mlp.backward(c, Some(x), a, w, s)?;
        } else {
            self.mlp.backward(c, None, a, w, s)?;
            self.attention.backward_output(c, a, w, s)?;
        }
        self.attention.backward(c, x, a, w, s)
    }
}
