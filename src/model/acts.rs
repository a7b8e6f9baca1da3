//! Activations: what the forward pass leaves for the backward, and scratch that layers share.

use super::lora::Room;
use super::spec::{Head, Spec};
use crate::data::Extent;
use crate::device::{Arena, DType, Device, Kind, Tensor};
use crate::error::Result;
use crate::ops::logprob_head;

const NO_BACKWARD: &str = "activations that keep nothing have no backward";

/// What a pass keeps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Keep {
    /// Nothing: forward only.
    Nothing,
    /// Block inputs; a block's forward runs again inside its backward.
    Inputs,
    /// Every activation.
    Everything,
}

/// One block's activations, all `[rows, ...]`; statistics are F32, the rest is what the device stores.
pub struct BlockActs<D: Device> {
    /// What the norm's backward needs of each row.
    pub stats: Tensor<D>,
    pub q: Tensor<D>,
    pub k: Tensor<D>,
    pub v: Tensor<D>,
    /// Before the norms of queries and keys, where the architecture has them.
    pub raw: Option<RawHeads<D>>,
    pub o: Tensor<D>,
    pub lse: Tensor<D>,
    /// The residual stream with attention's part.
    pub mid: Tensor<D>,
    pub mid_stats: Tensor<D>,
    /// Where the MLP has a gate.
    pub gate: Option<Tensor<D>>,
    pub up: Tensor<D>,
}

/// What a block's backward computes again rather than keep: a third of the block's numbers for a hundredth of its
/// arithmetic. All blocks share it.
pub struct Work<D: Device> {
    /// `[rows, hidden]`: what attention reads, then what the MLP reads.
    pub normed: Tensor<D>,
    /// `[rows, mlp_dim]`
    pub activated: Tensor<D>,
    /// What an adapter makes of its input on the way to its output; nothing where there are none.
    pub low_rank: Room<D>,
}

impl<D: Device> Work<D> {
    fn new(arena: &mut Arena<D>, spec: &Spec, rows: usize) -> Self {
        let mut take = |cols| arena.stored(Kind::Activations, rows, cols);
        let (normed, activated) = (take(spec.hidden), take(spec.mlp_dim));
        Self { normed, activated, low_rank: Room::new(arena, 0, 0) }
    }
}

pub struct RawHeads<D: Device> {
    pub q: Tensor<D>,
    pub k: Tensor<D>,
    /// `[rows, heads * stats]`
    pub q_stats: Tensor<D>,
    /// `[rows, kv_heads * stats]`
    pub k_stats: Tensor<D>,
}

impl<D: Device> BlockActs<D> {
    fn new(arena: &mut Arena<D>, spec: &Spec, rows: usize) -> Self {
        let (stored, exact) = (arena.storage(), DType::F32);
        let mut take = |dtype, cols| arena.take(Kind::Activations, dtype, rows, cols);
        let (wide, narrow) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let stats = spec.norm.stats();
        let raw = spec.qk_norm.then(|| RawHeads {
            q: take(stored, wide),
            k: take(stored, narrow),
            q_stats: take(exact, spec.heads * stats),
            k_stats: take(exact, spec.kv_heads * stats),
        });
        Self {
            raw,
            stats: take(exact, stats),
            q: take(stored, wide),
            k: take(stored, narrow),
            v: take(stored, narrow),
            o: take(stored, wide),
            lse: take(exact, spec.heads),
            mid: take(stored, spec.hidden),
            mid_stats: take(exact, stats),
            gate: spec.mlp.gated().then(|| take(stored, spec.mlp_dim)),
            up: take(stored, spec.mlp_dim),
        }
    }
}

/// Gradients of activations; shared by all layers, since they run one after the other.
pub struct Scratch<D: Device> {
    pub d_residual: Tensor<D>,
    pub d_normed: Tensor<D>,
    pub d_o: Tensor<D>,
    pub d_q: Tensor<D>,
    pub d_k: Tensor<D>,
    pub d_v: Tensor<D>,
    /// Gradients before the norms of queries and keys.
    pub d_raw: Option<(Tensor<D>, Tensor<D>)>,
    pub d_activated: Tensor<D>,
    pub d_gate: Option<Tensor<D>>,
    pub d_up: Tensor<D>,
    /// `[targets, hidden]`
    pub d_top: Tensor<D>,
    pub d_top_normed: Tensor<D>,
    /// `[targets, 1]`, F32; for a reward model the scores' gradient, in the type of what the product gives it to.
    pub dlogp: Tensor<D>,
}

impl<D: Device> Scratch<D> {
    fn new(arena: &mut Arena<D>, spec: &Spec, largest: &Extent) -> Self {
        let dlogp = match spec.head {
            Head::Score => arena.stored(Kind::Activations, largest.targets, 1),
            Head::Tied | Head::Own => arena.floats(Kind::Activations, largest.targets, 1),
        };
        let mut take = |rows, cols| arena.stored(Kind::Activations, rows, cols);
        let (wide, narrow) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let rows = largest.rows;
        Self {
            d_residual: take(rows, spec.hidden),
            d_normed: take(rows, spec.hidden),
            d_o: take(rows, wide),
            d_q: take(rows, wide),
            d_k: take(rows, narrow),
            d_v: take(rows, narrow),
            d_raw: spec.qk_norm.then(|| (take(rows, wide), take(rows, narrow))),
            d_activated: take(rows, spec.mlp_dim),
            d_gate: spec.mlp.gated().then(|| take(rows, spec.mlp_dim)),
            d_up: take(rows, spec.mlp_dim),
            d_top: take(largest.targets, spec.hidden),
            d_top_normed: take(largest.targets, spec.hidden),
            dlogp,
        }
    }
}

/// What is asked of the distribution over the vocabulary that each target is drawn from, besides the target's log-probability.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Moments {
    /// -sum p ln p
    pub entropy: bool,
    /// ln sum p^2
    pub ln_sum_p2: bool,
}

/// The rows that are read, on their way through the final norm and the head.
pub struct Top<D: Device> {
    /// `[targets, hidden]`
    pub rows: Tensor<D>,
    pub normed: Tensor<D>,
    /// `[targets, stats]`
    pub stats: Tensor<D>,
    /// `[targets, 1]`; of a reward model the scores.
    pub logp: Tensor<D>,
    pub lse: Tensor<D>,
    /// `[targets, 1]`, where a pass is asked for them ([`Acts::with_moments`]).
    pub entropy: Option<Tensor<D>>,
    pub ln_sum_p2: Option<Tensor<D>>,
    /// Logits of one tile; empty where there are none.
    pub tile: Tensor<D>,
}

impl<D: Device> Top<D> {
    fn new(arena: &mut Arena<D>, spec: &Spec, targets: usize) -> Self {
        let [tile_rows, tile_cols] = match spec.head {
            Head::Score => [0, 0],
            Head::Tied | Head::Own => logprob_head::scratch_shape(targets),
        };
        let tile = arena.floats(Kind::Workspace, tile_rows, tile_cols);
        let [rows, normed] = [(); 2].map(|()| arena.stored(Kind::Activations, targets, spec.hidden));
        let [stats, logp, lse] = [spec.norm.stats(), 1, 1].map(|cols| arena.floats(Kind::Activations, targets, cols));
        Self { rows, normed, stats, logp, lse, entropy: None, ln_sum_p2: None, tile }
    }
}

/// Everything a pass over one batch writes.
pub struct Acts<D: Device> {
    keep: Keep,
    /// `layers + 1` entries, or two that take turns.
    residual: Vec<Tensor<D>>,
    /// One per layer, or one that all share.
    blocks: Vec<BlockActs<D>>,
    work: Work<D>,
    pub top: Top<D>,
    /// Only where there is a backward.
    scratch: Option<Scratch<D>>,
}

impl<D: Device> Acts<D> {
    pub fn new(arena: &mut Arena<D>, spec: &Spec, largest: &Extent, keep: Keep) -> Self {
        let (residuals, blocks) = match keep {
            Keep::Nothing => (2, 1),
            Keep::Inputs => (spec.layers + 1, 1),
            Keep::Everything => (spec.layers + 1, spec.layers),
        };
        let residual = (0..residuals).map(|_| arena.stored(Kind::Activations, largest.rows, spec.hidden)).collect();
        let blocks = (0..blocks).map(|_| BlockActs::new(arena, spec, largest.rows)).collect();
        let work = Work::new(arena, spec, largest.rows);
        let top = Top::new(arena, spec, largest.targets);
        let scratch = (keep != Keep::Nothing).then(|| Scratch::new(arena, spec, largest));
        Self { keep, residual, blocks, work, top, scratch }
    }

    /// The same, with room for these numbers of each target: `forward` then fills it.
    pub fn with_moments(mut self, arena: &mut Arena<D>, moments: Moments) -> Self {
        let targets = self.top.logp.rows();
        let mut room = |wanted: bool| wanted.then(|| arena.floats(Kind::Activations, targets, 1));
        self.top.entropy = room(moments.entropy);
        self.top.ln_sum_p2 = room(moments.ln_sum_p2);
        self
    }

    /// The same, with room for adapters of up to this rank at one layer ([`Model::widest_rank`](super::Model)).
    pub fn with_low_rank(mut self, arena: &mut Arena<D>, rank: usize) -> Self {
        self.work.low_rank = Room::new(arena, self.work.normed.rows(), rank);
        self
    }

    /// The same, with room for weights of so many adapters for each row; those that are trained are not among them.
    pub fn with_blend(self, arena: &mut Arena<D>, adapters: usize) -> Self {
        let Self { work: Work { normed, activated, low_rank }, .. } = self;
        let low_rank = low_rank.with_blend(arena, normed.rows(), adapters);
        Self { work: Work { normed, activated, low_rank }, ..self }
    }

    /// How much of each applied adapter each row of the next pass takes, `[rows, adapters]`.
    pub fn set_blend(&mut self, device: &D, weights: &[f32]) -> Result<()> {
        self.work.low_rank.set_blend(device, weights)
    }

    pub fn keep(&self) -> Keep {
        self.keep
    }

    /// Where the residual stream before layer `layer` lies (after the last one: `layers`).
    fn slot(&self, layer: usize) -> usize {
        if self.keep == Keep::Nothing { layer % 2 } else { layer }
    }

    pub fn residual_mut(&mut self, layer: usize) -> &mut Tensor<D> {
        let slot = self.slot(layer);
        &mut self.residual[slot]
    }

    /// The same to look at, where every layer's is kept.
    pub fn kept_residual(&self, layer: usize) -> Option<&Tensor<D>> {
        (self.keep != Keep::Nothing).then(|| &self.residual[layer])
    }

    /// Input, output and activations of one layer.
    pub fn layer(&mut self, layer: usize) -> (&Tensor<D>, &mut Tensor<D>, &mut BlockActs<D>, &mut Work<D>) {
        let slots = [self.slot(layer), self.slot(layer + 1)];
        let block = if self.keep == Keep::Everything { layer } else { 0 };
        let [input, output] = self.residual.get_disjoint_mut(slots).expect("two slots or more");
        (input, output, &mut self.blocks[block], &mut self.work)
    }

    /// Input, activations and the gradients of activations. Panics without a backward.
    pub fn layer_backward(&mut self, layer: usize) -> (&Tensor<D>, &mut BlockActs<D>, &mut Work<D>, &mut Scratch<D>) {
        let block = if self.keep == Keep::Everything { layer } else { 0 };
        let input = &self.residual[self.slot(layer)];
        (input, &mut self.blocks[block], &mut self.work, self.scratch.as_mut().expect(NO_BACKWARD))
    }

    /// The residual stream above the last of `layers` layers, and where it goes.
    pub fn last_residual(&mut self, layers: usize) -> (&Tensor<D>, &mut Top<D>) {
        let slot = self.slot(layers);
        (&self.residual[slot], &mut self.top)
    }

    pub fn top_and_scratch(&mut self) -> (&mut Top<D>, &mut Scratch<D>) {
        (&mut self.top, self.scratch.as_mut().expect(NO_BACKWARD))
    }

    pub fn scratch(&self) -> &Scratch<D> {
        self.scratch.as_ref().expect(NO_BACKWARD)
    }
}
