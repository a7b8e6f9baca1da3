//! The leaves: a linear layer, a norm, the rotation table.

use super::arch::{Naming, Slot};
use super::lora::{self, Adapter, Lora, LowRank, Room};
use super::param::Param;
use super::spec::{Norm, Rope, Spec};
use crate::device::{Arena, Device, Kind, Tensor, View, ViewMut};
use crate::error::Result;
use crate::ops::{Backend, layer_norm, linear, rms_norm, rope};

/// Where a constructor takes memory from, and which weights it trains.
pub struct Build<'a, D: Device> {
    pub arena: &'a mut Arena<D>,
    pub spec: &'a Spec,
    pub naming: Naming,
    pub trained: &'a dyn Fn(&str) -> bool,
    /// The checkpoint's matrices are bfloat16.
    pub bf16: bool,
    /// What is applied beside the weights, and what is trained there.
    pub adapters: &'a [Adapter],
    pub lora: Option<&'a Lora>,
}

impl<D: Device> Build<'_, D> {
    pub fn param(&mut self, slot: Slot, layer: usize, shape: [usize; 2]) -> Param<D> {
        let stored = (self.naming)(self.spec, slot, layer);
        Param::new(self.arena, self.spec, (slot, stored), shape, (self.trained, self.bf16))
    }

    pub fn linear(&mut self, weight: Slot, layer: usize, [outputs, inputs]: [usize; 2], bias: bool) -> Linear<D> {
        let bias = bias.then(|| self.param(weight.bias(), layer, [1, outputs]));
        let weight = self.param(weight, layer, [outputs, inputs]);
        let rank = lora::rank_of(self.adapters, lora::module_of(&weight.stored));
        let frozen = (rank > 0).then(|| LowRank::frozen(self.arena, &weight, rank));
        let trains = self.lora.filter(|lora| lora.trains(lora::module_of(&weight.stored)));
        let trained = trains.map(|lora| LowRank::trained(self.arena, &weight, lora));
        Linear { weight, bias, frozen, trained }
    }
}

pub struct Linear<D: Device> {
    /// `[outputs, inputs]`
    pub weight: Param<D>,
    /// `[1, outputs]`
    pub bias: Option<Param<D>>,
    /// Adapters that are applied as they are.
    pub frozen: Option<LowRank<D>>,
    /// The adapter that trains.
    pub trained: Option<LowRank<D>>,
}

impl<D: Device> Linear<D> {
    /// All but what is applied as it is.
    pub fn params_mut(&mut self) -> impl Iterator<Item = &mut Param<D>> {
        let adapter = self.trained.as_mut().map(|LowRank { a, b, .. }| [a, b]);
        std::iter::once(&mut self.weight).chain(self.bias.as_mut()).chain(adapter.into_iter().flatten())
    }

    fn adapters(&self) -> impl Iterator<Item = &LowRank<D>> {
        self.frozen.iter().chain(&self.trained)
    }

    /// Of its adapters.
    pub fn ranks(&self) -> impl Iterator<Item = usize> {
        self.adapters().map(LowRank::rank)
    }
}

impl<B: Backend> Linear<B> {
    /// `y = x W^T + bias + residual`, and what adapters add to it. `room` is [`Work::low_rank`](super::acts::Work).
    pub fn forward(
        &self,
        device: &B,
        x: View<B>,
        residual: Option<View<B>>,
        room: &mut Room<B>,
        mut y: ViewMut<B>,
    ) -> Result<()> {
        let (weight, bias) = (self.weight.view(), self.bias.as_ref().map(Param::view));
        let layer = linear::Forward { x, weight, bias, residual, y: y.again() };
        let mut adapters = self.adapters();
        match adapters.next() {
            None => device.linear(layer),
            Some(first) => {
                match first.factors(x.rows(), room) {
                    None => device.linear(layer),
                    Some(factors) => device.linear_low_rank(layer, factors),
                }?;
                adapters.try_for_each(|adapter| adapter.forward(device, x, room, y.again()))
            }
        }
    }

    /// Adds to the gradients of what is trained and to `dx`.
    pub fn backward(
        &mut self,
        device: &B,
        dy: View<B>,
        x: View<B>,
        room: &mut Room<B>,
        mut dx: ViewMut<B>,
    ) -> Result<()> {
        let weight = self.weight.value.view();
        let dweight = self.weight.grad.as_mut().map(Tensor::view_mut);
        let dbias = self.bias.as_mut().and_then(Param::grad_mut);
        device.linear_backward(linear::Backward { dy, x, weight, dx: Some(dx.again()), dweight, dbias })?;
        let mut adapters = self.frozen.iter_mut().chain(&mut self.trained);
        adapters.try_for_each(|adapter| adapter.backward(device, dy, x, room, dx.again()))
    }
}

/// A norm; its kind comes from the spec.
pub struct NormLayer<D: Device> {
    /// `[1, hidden]`
    pub weight: Param<D>,
    /// `[1, hidden]`
    pub bias: Option<Param<D>>,
    kind: Norm,
}

impl<D: Device> NormLayer<D> {
    pub fn new(build: &mut Build<D>, slot: Slot, layer: usize, cols: usize) -> Self {
        let kind = build.spec.norm;
        let bias = matches!(kind, Norm::Layer { .. }).then(|| build.param(slot.bias(), layer, [1, cols]));
        Self { weight: build.param(slot, layer, [1, cols]), bias, kind }
    }

    pub fn params_mut(&mut self) -> impl Iterator<Item = &mut Param<D>> {
        std::iter::once(&mut self.weight).chain(self.bias.as_mut())
    }
}

const NO_BIAS: &str = "a layer norm has a bias";

impl<B: Backend> NormLayer<B> {
    /// `stats` is what the backward needs of each row, [`Norm::stats`] numbers.
    pub fn forward(&self, device: &B, x: View<B>, y: ViewMut<B>, stats: ViewMut<B>) -> Result<()> {
        let weight = self.weight.view();
        match self.kind {
            Norm::Rms { eps } => device.rms_norm(rms_norm::Forward { x, weight, eps: eps as f32, y, rstd: stats }),
            Norm::Layer { eps } => {
                let bias = self.bias.as_ref().expect(NO_BIAS).view();
                device.layer_norm(layer_norm::Forward { x, weight, bias, eps: eps as f32, y, stats })
            }
        }
    }

    /// Adds to the weights' gradients and to `dx`.
    pub fn backward(&mut self, device: &B, dy: View<B>, x: View<B>, stats: View<B>, dx: ViewMut<B>) -> Result<()> {
        let weight = self.weight.value.view();
        let dweight = self.weight.grad.as_mut().map(Tensor::view_mut);
        match self.kind {
            Norm::Rms { .. } => {
                device.rms_norm_backward(rms_norm::Backward { dy, x, weight, rstd: stats, dx, dweight })
            }
            Norm::Layer { .. } => {
                let dbias = self.bias.as_mut().and_then(Param::grad_mut);
                device.layer_norm_backward(layer_norm::Backward { dy, x, weight, stats, dx, dweight, dbias })
            }
        }
    }
}

/// Cosines and sines of every position and frequency.
pub struct RopeTable<D: Device> {
    /// `[positions, rotary_dim / 2]`
    cos: Tensor<D>,
    sin: Tensor<D>,
    head_dim: usize,
}

impl<D: Device> RopeTable<D> {
    pub fn new(arena: &mut Arena<D>, rope: &Rope, positions: usize, head_dim: usize) -> Self {
        let half = rope.rotary_dim / 2;
        let mut table = || arena.floats(Kind::Weights, positions, half);
        Self { cos: table(), sin: table(), head_dim }
    }

    pub fn fill(&mut self, device: &D, rope: &Rope) -> Result<()> {
        let frequencies = rope.frequencies();
        let angles = (0..self.cos.rows()).flat_map(|p| frequencies.iter().map(move |f| p as f64 * f));
        let (sin, cos): (Vec<f64>, Vec<f64>) = angles.map(f64::sin_cos).unzip();
        device.write_f64(&cos, self.cos.view_mut())?;
        device.write_f64(&sin, self.sin.view_mut())
    }
}

impl<B: Backend> RopeTable<B> {
    pub fn rotate(&self, device: &B, x: ViewMut<B>, positions: View<B>, direction: rope::Direction) -> Result<()> {
        let (cos, sin) = (self.cos.view(), self.sin.view());
        device.rope(rope::Rotate { x, positions, cos, sin, head_dim: self.head_dim, direction })
    }
}
