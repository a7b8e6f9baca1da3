//! The attention half of a block: `mid = x + O(attention(rope(norm(Q n)), rope(norm(K n)), V n))`, `n = norm(x)`.
//! Norms of queries and keys and the rotation are there where the spec has them.

use super::acts::{BlockActs, RawHeads, Scratch, Work};
use super::arch::Slot;
use super::block::Context;
use super::kv::KvLayer;
use super::layers::{Build, Linear, NormLayer};
use super::param::Param;
use crate::device::{Device, Tensor};
use crate::error::Result;
use crate::ops::{Backend, attention, rope::Direction, rows};

pub struct Attention<D: Device> {
    norm: NormLayer<D>,
    q: Linear<D>,
    k: Linear<D>,
    v: Linear<D>,
    /// Norms of queries and keys, per head.
    qk_norm: Option<(NormLayer<D>, NormLayer<D>)>,
    o: Linear<D>,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    window: Option<usize>,
}

impl<D: Device> Attention<D> {
    pub fn new(build: &mut Build<D>, layer: usize) -> Self {
        let spec = build.spec;
        let (wide, narrow, hidden) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, spec.hidden);
        let norm = |build: &mut Build<D>, slot, cols| NormLayer::new(build, slot, layer, cols);
        Self {
            norm: norm(build, Slot::AttentionNorm, hidden),
            q: build.linear(Slot::Query, layer, [wide, hidden], spec.qkv_bias),
            k: build.linear(Slot::Key, layer, [narrow, hidden], spec.qkv_bias),
            v: build.linear(Slot::Value, layer, [narrow, hidden], spec.qkv_bias),
            qk_norm: spec
                .qk_norm
                .then(|| (norm(build, Slot::QueryNorm, spec.head_dim), norm(build, Slot::KeyNorm, spec.head_dim))),
            o: build.linear(Slot::Output, layer, [hidden, wide], spec.out_bias),
            heads: spec.heads,
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            window: spec.windows[layer],
        }
    }

    pub fn params_mut(&mut self) -> impl Iterator<Item = &mut Param<D>> {
        let head_norms = self.qk_norm.iter_mut().flat_map(|(q, k)| [q, k]);
        let norms = std::iter::once(&mut self.norm).chain(head_norms).flat_map(NormLayer::params_mut);
        let linears = [&mut self.q, &mut self.k, &mut self.v, &mut self.o];
        norms.chain(linears.into_iter().flat_map(Linear::params_mut))
    }

    pub fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear<D>> {
        [&mut self.q, &mut self.k, &mut self.v, &mut self.o].into_iter()
    }

    fn dims(&self, longest: usize) -> attention::Dims {
        let (heads, kv_heads, head_dim) = (self.heads, self.kv_heads, self.head_dim);
        attention::Dims { heads, kv_heads, head_dim, window: self.window, longest }
    }
}

impl<B: Backend> Attention<B> {
    /// From `x` to `a.mid`.
    pub fn forward(
        &self,
        c: &Context<B>,
        x: &Tensor<B>,
        a: &mut BlockActs<B>,
        w: &mut Work<B>,
        kv: Option<KvLayer<B>>,
    ) -> Result<()> {
        let (device, size) = (c.device, c.batch.size());
        let rows = size.rows;
        self.norm.forward(device, x.top(rows), w.normed.top_mut(rows), a.stats.top_mut(rows))?;
        let normed = w.normed.top(rows);
        match (&self.qk_norm, &mut a.raw) {
            (Some((q_norm, k_norm)), Some(raw)) => {
                self.q.forward(device, normed, None, &mut w.low_rank, raw.q.top_mut(rows))?;
                self.k.forward(device, normed, None, &mut w.low_rank, raw.k.top_mut(rows))?;
                let heads =
                    [(q_norm, &raw.q, &mut a.q, &mut raw.q_stats), (k_norm, &raw.k, &mut a.k, &mut raw.k_stats)];
                for (norm, raw, out, stats) in heads {
                    let all = rows * out.cols() / self.head_dim;
                    let raw = raw.top(rows).reshape(all, self.head_dim);
                    let out = out.top_mut(rows).reshape(all, self.head_dim);
                    let cols = stats.cols() * rows / all;
                    norm.forward(device, raw, out, stats.top_mut(rows).reshape(all, cols))?;
                }
            }
            _ => {
                self.q.forward(device, normed, None, &mut w.low_rank, a.q.top_mut(rows))?;
                self.k.forward(device, normed, None, &mut w.low_rank, a.k.top_mut(rows))?;
            }
        }
        self.v.forward(device, normed, None, &mut w.low_rank, a.v.top_mut(rows))?;
        for heads in [&mut a.q, &mut a.k] {
            c.rotate(heads.top_mut(rows), Direction::Forward)?;
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
        self.o.forward(device, a.o.top(rows), Some(x.top(rows)), &mut w.low_rank, a.mid.top_mut(rows))
    }

    /// From `scratch.d_residual` to `scratch.d_o`: the first step back, apart because the MLP may run in between.
    pub fn backward_output(
        &mut self,
        c: &Context<B>,
        a: &BlockActs<B>,
        w: &mut Work<B>,
        s: &mut Scratch<B>,
    ) -> Result<()> {
        let (device, rows) = (c.device, c.batch.size().rows);
        device.zero(s.d_o.top_mut(rows))?;
        self.o.backward(device, s.d_residual.top(rows), a.o.top(rows), &mut w.low_rank, s.d_o.top_mut(rows))
    }

    /// From `scratch.d_o` on; adds to `scratch.d_residual`.
    pub fn backward(
        &mut self,
        c: &Context<B>,
        x: &Tensor<B>,
        a: &mut BlockActs<B>,
        w: &mut Work<B>,
        s: &mut Scratch<B>,
    ) -> Result<()> {
        let (device, size) = (c.device, c.batch.size());
        let rows = size.rows;
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
            c.rotate(heads.top_mut(rows), Direction::Backward)?;
        }
        device.zero(s.d_normed.top_mut(rows))?;
        let (mut d_q, mut d_k) = (&s.d_q, &s.d_k);
        if let (Some((q_norm, k_norm)), Some(raw), Some((d_raw_q, d_raw_k))) = (&mut self.qk_norm, &a.raw, &mut s.d_raw)
        {
            let RawHeads { q, k, q_stats, k_stats } = raw;
            let heads = [(q_norm, d_q, q, q_stats, &mut *d_raw_q), (k_norm, d_k, k, k_stats, &mut *d_raw_k)];
            for (norm, dy, raw, stats, d_raw) in heads {
                let all = rows * raw.cols() / self.head_dim;
                let by_head = |t: &Tensor<B>| [all, t.cols() * rows / all];
                device.zero(d_raw.top_mut(rows))?;
                let [dy_shape, stats_shape] = [by_head(dy), by_head(stats)];
                let dy = dy.top(rows).reshape(dy_shape[0], dy_shape[1]);
                let raw = raw.top(rows).reshape(dy_shape[0], dy_shape[1]);
                let stats = stats.top(rows).reshape(stats_shape[0], stats_shape[1]);
                norm.backward(device, dy, raw, stats, d_raw.top_mut(rows).reshape(dy_shape[0], dy_shape[1]))?;
            }
            (d_q, d_k) = (d_raw_q, d_raw_k);
        }
        self.norm.forward(device, x.top(rows), w.normed.top_mut(rows), a.stats.top_mut(rows))?;
        for (layer, dy) in [(&mut self.q, d_q), (&mut self.k, d_k), (&mut self.v, &s.d_v)] {
            let (x, dx) = (w.normed.top(rows), s.d_normed.top_mut(rows));
            layer.backward(device, dy.top(rows), x, &mut w.low_rank, dx)?;
        }
        let (dy, x, stats) = (s.d_normed.top(rows), x.top(rows), a.stats.top(rows));
        self.norm.backward(device, dy, x, stats, s.d_residual.top_mut(rows))
    }
}
