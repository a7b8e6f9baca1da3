//! One decoder layer: attention, then MLP, each on a normalized copy of the residual stream.
//!
//! ```text
//! mid = x + O(attention(rope(norm(Q n)), rope(norm(K n)), V n))     n = norm(x)
//! y   = mid + Down(silu(Gate n) * Up n)                             n = norm(mid)
//! ```

use super::acts::{BlockActs, RawHeads, Scratch};
use super::arch::Slot;
use super::batch::Batch;
use super::kv::KvLayer;
use super::layers::{Build, Linear, NormLayer, RopeTable};
use super::param::Param;
use super::spec::Spec;
use crate::device::{Device, Tensor};
use crate::error::Result;
use crate::ops::{Backend, attention, rope::Direction, rows, swiglu};

pub struct Block<D: Device> {
    norm: NormLayer<D>,
    q: Linear<D>,
    k: Linear<D>,
    v: Linear<D>,
    /// Norms of queries and keys, per head.
    qk_norm: Option<(NormLayer<D>, NormLayer<D>)>,
    o: Linear<D>,
    mlp_norm: NormLayer<D>,
    gate: Linear<D>,
    up: Linear<D>,
    down: Linear<D>,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    window: Option<usize>,
}

/// What a pass through a block reads besides the residual stream.
pub struct Context<'a, B: Device> {
    pub device: &'a B,
    pub batch: &'a Batch<B>,
    pub rope: &'a RopeTable<B>,
}

impl<D: Device> Block<D> {
    pub fn new(build: &mut Build<D>, spec: &Spec, layer: usize) -> Self {
        let (wide, narrow) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let norm = |build: &mut Build<D>, slot, cols| NormLayer::new(build, slot, layer, cols, spec.norm);
        let (hidden, mlp) = (spec.hidden, spec.mlp_dim);
        Self {
            norm: norm(build, Slot::AttentionNorm, hidden),
            q: build.linear(Slot::Query, layer, [wide, hidden], spec.qkv_bias),
            k: build.linear(Slot::Key, layer, [narrow, hidden], spec.qkv_bias),
            v: build.linear(Slot::Value, layer, [narrow, hidden], spec.qkv_bias),
            qk_norm: spec
                .qk_norm
                .then(|| (norm(build, Slot::QueryNorm, spec.head_dim), norm(build, Slot::KeyNorm, spec.head_dim))),
            o: build.linear(Slot::Output, layer, [hidden, wide], spec.out_bias),
            mlp_norm: norm(build, Slot::MlpNorm, hidden),
            gate: build.linear(Slot::Gate, layer, [mlp, hidden], spec.mlp_bias),
            up: build.linear(Slot::Up, layer, [mlp, hidden], spec.mlp_bias),
            down: build.linear(Slot::Down, layer, [hidden, mlp], spec.mlp_bias),
            heads: spec.heads,
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            window: spec.windows[layer],
        }
    }

    pub fn params_mut(&mut self) -> impl Iterator<Item = &mut Param<D>> {
        let norms = [&mut self.norm, &mut self.mlp_norm].into_iter();
        let head_norms = self.qk_norm.iter_mut().flat_map(|(q, k)| [q, k]);
        let linears =
            [&mut self.q, &mut self.k, &mut self.v, &mut self.o, &mut self.gate, &mut self.up, &mut self.down];
        norms.chain(head_norms).map(|n| &mut n.weight).chain(linears.into_iter().flat_map(Linear::params_mut))
    }

    fn dims(&self, longest: usize) -> attention::Dims {
        let (heads, kv_heads, head_dim) = (self.heads, self.kv_heads, self.head_dim);
        attention::Dims { heads, kv_heads, head_dim, window: self.window, longest }
    }
}

impl<B: Backend> Block<B> {
    /// `kv`: keys and values are appended to a cache and read from it; otherwise they are the batch's own.
    pub fn forward(
        &self,
        c: &Context<B>,
        x: &Tensor<B>,
        y: &mut Tensor<B>,
        acts: &mut BlockActs<B>,
        kv: Option<KvLayer<B>>,
    ) -> Result<()> {
        self.forward_attention(c, x, acts, kv)?;
        let (device, rows) = (c.device, c.batch.size().rows);
        let a = acts;
        self.mlp_norm.forward(device, a.mid.top(rows), a.mid_normed.top_mut(rows), a.mid_rstd.top_mut(rows))?;
        self.gate.forward(device, a.mid_normed.top(rows), None, a.gate.top_mut(rows))?;
        self.up.forward(device, a.mid_normed.top(rows), None, a.up.top_mut(rows))?;
        let (gate, up) = (a.gate.top(rows), a.up.top(rows));
        device.swiglu(swiglu::Forward { gate, up, y: a.gated.top_mut(rows) })?;
        self.down.forward(device, a.gated.top(rows), Some(a.mid.top(rows)), y.top_mut(rows))
    }

    fn forward_attention(
        &self,
        c: &Context<B>,
        x: &Tensor<B>,
        a: &mut BlockActs<B>,
        kv: Option<KvLayer<B>>,
    ) -> Result<()> {
        let (device, size) = (c.device, c.batch.size());
        let rows = size.rows;
        self.norm.forward(device, x.top(rows), a.normed.top_mut(rows), a.rstd.top_mut(rows))?;
        match (&self.qk_norm, &mut a.raw) {
            (Some((q_norm, k_norm)), Some(raw)) => {
                self.q.forward(device, a.normed.top(rows), None, raw.q.top_mut(rows))?;
                self.k.forward(device, a.normed.top(rows), None, raw.k.top_mut(rows))?;
                let heads = [(q_norm, &raw.q, &mut a.q, &mut raw.q_rstd), (k_norm, &raw.k, &mut a.k, &mut raw.k_rstd)];
                for (norm, raw, out, rstd) in heads {
                    let all = rows * out.cols() / self.head_dim;
                    let raw = raw.top(rows).reshape(all, self.head_dim);
                    let out = out.top_mut(rows).reshape(all, self.head_dim);
                    norm.forward(device, raw, out, rstd.top_mut(rows).reshape(all, 1))?;
                }
            }
            _ => {
                self.q.forward(device, a.normed.top(rows), None, a.q.top_mut(rows))?;
                self.k.forward(device, a.normed.top(rows), None, a.k.top_mut(rows))?;
            }
        }
        self.v.forward(device, a.normed.top(rows), None, a.v.top_mut(rows))?;
        for heads in [&mut a.q, &mut a.k] {
            c.rope.rotate(device, heads.top_mut(rows), c.batch.positions(), Direction::Forward)?;
        }
        let (dims, segments) = (self.dims(size.longest), c.batch.segments());
        let (k, v) = match kv {
            None => (a.k.top(rows), a.v.top(rows)),
            Some(kv) => {
                let index = kv.append;
                device.scatter(rows::Scatter { x: a.k.top(rows), index, y: kv.keys.view_mut() })?;
                device.scatter(rows::Scatter { x: a.v.top(rows), index, y: kv.values.view_mut() })?;
                (kv.keys.view(), kv.values.view())
            }
        };
        let (o, lse) = (a.o.top_mut(rows), a.lse.top_mut(rows));
        device.attention(attention::Forward { dims, segments, q: a.q.top(rows), k, v, o, lse })?;
        self.o.forward(device, a.o.top(rows), Some(x.top(rows)), a.mid.top_mut(rows))
    }

    /// `scratch.d_residual` holds the gradient by the block's output and becomes that by its input.
    pub fn backward(&mut self, c: &Context<B>, x: &Tensor<B>, a: &mut BlockActs<B>, s: &mut Scratch<B>) -> Result<()> {
        let (device, rows) = (c.device, c.batch.size().rows);
        device.zero(s.d_gated.top_mut(rows))?;
        self.down.backward(device, s.d_residual.top(rows), a.gated.top(rows), s.d_gated.top_mut(rows))?;
        let (dy, gate, up) = (s.d_gated.top(rows), a.gate.top(rows), a.up.top(rows));
        let (dgate, dup) = (s.d_gate.top_mut(rows), s.d_up.top_mut(rows));
        device.swiglu_backward(swiglu::Backward { dy, gate, up, dgate, dup })?;
        device.zero(s.d_normed.top_mut(rows))?;
        for (layer, dy) in [(&mut self.gate, &s.d_gate), (&mut self.up, &s.d_up)] {
            layer.backward(device, dy.top(rows), a.mid_normed.top(rows), s.d_normed.top_mut(rows))?;
        }
        let (dy, mid, rstd) = (s.d_normed.top(rows), a.mid.top(rows), a.mid_rstd.top(rows));
        self.mlp_norm.backward(device, dy, mid, rstd, s.d_residual.top_mut(rows))?;
        self.backward_attention(c, x, a, s)
    }

    fn backward_attention(
        &mut self,
        c: &Context<B>,
        x: &Tensor<B>,
        a: &mut BlockActs<B>,
        s: &mut Scratch<B>,
    ) -> Result<()> {
        let (device, size) = (c.device, c.batch.size());
        let rows = size.rows;
        device.zero(s.d_o.top_mut(rows))?;
        self.o.backward(device, s.d_residual.top(rows), a.o.top(rows), s.d_o.top_mut(rows))?;
        device.attention_backward(attention::Backward {
            dims: self.dims(size.longest),
            segments: c.batch.segments(),
            d_o: s.d_o.top(rows),
            q: a.q.top(rows),
            k: a.k.top(rows),
            v: a.v.top(rows),
            o: a.o.top(rows),
            lse: a.lse.top(rows),
            dq: s.d_q.top_mut(rows),
            dk: s.d_k.top_mut(rows),
            dv: s.d_v.top_mut(rows),
        })?;
        for heads in [&mut s.d_q, &mut s.d_k] {
            c.rope.rotate(device, heads.top_mut(rows), c.batch.positions(), Direction::Backward)?;
        }
        device.zero(s.d_normed.top_mut(rows))?;
        let (mut d_q, mut d_k) = (&s.d_q, &s.d_k);
        if let (Some((q_norm, k_norm)), Some(raw), Some((d_raw_q, d_raw_k))) = (&mut self.qk_norm, &a.raw, &mut s.d_raw)
        {
            let RawHeads { q, k, q_rstd, k_rstd } = raw;
            let heads = [(q_norm, d_q, q, q_rstd, &mut *d_raw_q), (k_norm, d_k, k, k_rstd, &mut *d_raw_k)];
            for (norm, dy, raw, rstd, d_raw) in heads {
                let all = rows * raw.cols() / self.head_dim;
                let by_head = |t: &Tensor<B>| [all, t.cols() * rows / all];
                device.zero(d_raw.top_mut(rows))?;
                let [dy_shape, rstd_shape] = [by_head(dy), by_head(rstd)];
                let dy = dy.top(rows).reshape(dy_shape[0], dy_shape[1]);
                let raw = raw.top(rows).reshape(dy_shape[0], dy_shape[1]);
                let rstd = rstd.top(rows).reshape(rstd_shape[0], rstd_shape[1]);
                norm.backward(device, dy, raw, rstd, d_raw.top_mut(rows).reshape(dy_shape[0], dy_shape[1]))?;
            }
            (d_q, d_k) = (d_raw_q, d_raw_k);
        }
        for (layer, dy) in [(&mut self.q, d_q), (&mut self.k, d_k), (&mut self.v, &s.d_v)] {
            layer.backward(device, dy.top(rows), a.normed.top(rows), s.d_normed.top_mut(rows))?;
        }
        let (dy, x, rstd) = (s.d_normed.top(rows), x.top(rows), a.rstd.top(rows));
        self.norm.backward(device, dy, x, rstd, s.d_residual.top_mut(rows))
    }
}
