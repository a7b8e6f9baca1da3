//! The other half of a block: `y = mid + Down(silu(Gate n) * Up n)` or `y = mid + Down(gelu(Up n))`, where `n` is the
//! norm of `mid`, or of the block's input where the two halves run side by side.

use super::acts::{BlockActs, Scratch, Work};
use super::arch::Slot;
use super::block::Context;
use super::layers::{Build, Linear, NormLayer};
use super::param::Param;
use super::spec;
use crate::device::{Device, Tensor};
use crate::error::Result;
use crate::ops::{Backend, gelu, swiglu};

pub struct Mlp<D: Device> {
    norm: NormLayer<D>,
    gate: Option<Linear<D>>,
    up: Linear<D>,
    down: Linear<D>,
    kind: spec::Mlp,
}

const NO_GATE: &str = "a gated MLP has a gate, and room for it";

impl<D: Device> Mlp<D> {
    pub fn new(build: &mut Build<D>, layer: usize) -> Self {
        let spec = build.spec;
        let ([wide, narrow], bias) = ([[spec.mlp_dim, spec.hidden], [spec.hidden, spec.mlp_dim]], spec.mlp_bias);
        Self {
            norm: NormLayer::new(build, Slot::MlpNorm, layer, spec.hidden),
            gate: spec.mlp.gated().then(|| build.linear(Slot::Gate, layer, wide, bias)),
            up: build.linear(Slot::Up, layer, wide, bias),
            down: build.linear(Slot::Down, layer, narrow, bias),
            kind: spec.mlp,
        }
    }

    pub fn params_mut(&mut self) -> impl Iterator<Item = &mut Param<D>> {
        let linears = self.gate.iter_mut().chain([&mut self.up, &mut self.down]);
        self.norm.params_mut().chain(linears.flat_map(Linear::params_mut))
    }

    pub fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear<D>> {
        self.gate.iter_mut().chain([&mut self.up, &mut self.down])
    }
}

impl<B: Backend> Mlp<B> {
    /// Norm and MLP of `x`, or of `a.mid` where there is none, and `a.mid` added: into `y`.
    pub fn forward(
        &self,
        c: &Context<B>,
        x: Option<&Tensor<B>>,
        a: &mut BlockActs<B>,
        w: &mut Work<B>,
        y: &mut Tensor<B>,
    ) -> Result<()> {
        let (device, rows) = (c.device, c.batch.size().rows);
        self.normalize(c, x, a, w)?;
        let normed = w.normed.top(rows);
        self.up.forward(device, normed, None, &mut w.low_rank, a.up.top_mut(rows))?;
        if let Some((layer, gate)) = self.gate.as_ref().zip(a.gate.as_mut()) {
            layer.forward(device, normed, None, &mut w.low_rank, gate.top_mut(rows))?;
        }
        self.activate(c, a, w)?;
        let (x, residual) = (w.activated.top(rows), Some(a.mid.top(rows)));
        self.down.forward(device, x, residual, &mut w.low_rank, y.top_mut(rows))
    }

    fn normalize(&self, c: &Context<B>, x: Option<&Tensor<B>>, a: &mut BlockActs<B>, w: &mut Work<B>) -> Result<()> {
        let rows = c.batch.size().rows;
        let x = x.unwrap_or(&a.mid).top(rows);
        self.norm.forward(c.device, x, w.normed.top_mut(rows), a.mid_stats.top_mut(rows))
    }

    fn activate(&self, c: &Context<B>, a: &BlockActs<B>, w: &mut Work<B>) -> Result<()> {
        let rows = c.batch.size().rows;
        let (up, y) = (a.up.top(rows), w.activated.top_mut(rows));
        match self.kind {
            spec::Mlp::SwiGlu => {
                let gate = a.gate.as_ref().expect(NO_GATE).top(rows);
                c.device.swiglu(swiglu::Forward { gate, up, y })
            }
            spec::Mlp::Gelu(curve) => c.device.gelu(gelu::Forward { curve, x: up, y }),
        }
    }

    /// Adds the gradient by what was normalized to `scratch.d_residual`, the gradient by the block's output.
    pub fn backward(
        &mut self,
        c: &Context<B>,
        x: Option<&Tensor<B>>,
        a: &mut BlockActs<B>,
        w: &mut Work<B>,
        s: &mut Scratch<B>,
    ) -> Result<()> {
        let (device, rows) = (c.device, c.batch.size().rows);
        self.activate(c, a, w)?;
        device.zero(s.d_activated.top_mut(rows))?;
        let (dy, activated) = (s.d_residual.top(rows), w.activated.top(rows));
        self.down.backward(device, dy, activated, &mut w.low_rank, s.d_activated.top_mut(rows))?;
        self.normalize(c, x, a, w)?;
        device.zero(s.d_normed.top_mut(rows))?;
        let (dy, up, normed) = (s.d_activated.top(rows), a.up.top(rows), w.normed.top(rows));
        match self.kind {
            spec::Mlp::SwiGlu => {
                let layer = self.gate.as_mut().expect(NO_GATE);
                let (gate, d_gate) = a.gate.as_ref().zip(s.d_gate.as_mut()).expect(NO_GATE);
                let (dgate, dup) = (d_gate.top_mut(rows), s.d_up.top_mut(rows));
                device.swiglu_backward(swiglu::Backward { dy, gate: gate.top(rows), up, dgate, dup })?;
                layer.backward(device, d_gate.top(rows), normed, &mut w.low_rank, s.d_normed.top_mut(rows))?;
            }
            spec::Mlp::Gelu(curve) => {
                device.gelu_backward(gelu::Backward { curve, dy, x: up, dx: s.d_up.top_mut(rows) })?;
            }
        }
        self.up.backward(device, s.d_up.top(rows), normed, &mut w.low_rank, s.d_normed.top_mut(rows))?;
        let (dy, x, stats) = (s.d_normed.top(rows), x.unwrap_or(&a.mid).top(rows), a.mid_stats.top(rows));
        self.norm.backward(device, dy, x, stats, s.d_residual.top_mut(rows))
    }
}
