//! A decoder with explicit forward and backward passes: no tape. Generic over the device: the same code trains on
//! the CPU, proves itself in f64 on `Reference` and prices a plan on `Dry`.

mod acts;
pub mod arch;
mod attention;
mod batch;
mod block;
mod init;
mod kv;
mod layers;
mod load;
mod lora;
mod mlp;
mod param;
mod score;
mod spec;
mod token_kl;
mod value;

pub use acts::{Acts, Keep, Moments};
pub use arch::Checkpoint;
pub use batch::Batch;
pub use init::{Init, init_random};
pub use kv::KvCache;
pub use load::{Reader, found_name, load, sources};
pub use lora::{Adapter, Lora};
pub use param::{Param, Role};
pub use spec::{Head, Mlp, Norm, Positions, Rope, RopeScaling, Spec};
pub use token_kl::{KlActs, KlTerm, RefHeads};
pub use value::{VALUE_HEAD, ValueActs, ValueHead, ValueTerm};

use crate::data::Temperature;
use crate::device::{Arena, Device, Dry, Ledger, Storage, Tensor, View};
use crate::error::Result;
use crate::ops::{Backend, linear, logprob_head, rows};
use arch::{Naming, Slot};
use block::{Block, Context};
use layers::{Build, Linear, NormLayer, RopeTable};

pub struct Model<D: Device> {
    pub spec: Spec,
    /// `[vocab, hidden]`
    embed: Param<D>,
    /// `[positions, hidden]`, where positions are learned.
    positions: Option<Param<D>>,
    blocks: Vec<Block<D>>,
    norm: NormLayer<D>,
    /// `[vocab, hidden]`, where the embedding is not the head.
    head: Option<Param<D>>,
    /// `[1, hidden]`, the head of a reward model.
    score: Option<Param<D>>,
    /// Where positions are rotations.
    rope: Option<RopeTable<D>>,
    /// The largest of an adapter at one layer.
    widest_rank: usize,
    /// Those that are applied and not trained.
    pub adapters: usize,
}

/// How a model is built.
#[derive(Clone, Copy)]
pub struct Options<'a> {
    /// Positions that the rotation table covers: the longest sequence.
    pub positions: usize,
    /// Which weights get a gradient.
    pub trained: &'a dyn Fn(&str) -> bool,
    /// Adapters that are applied.
    pub adapters: &'a [Adapter],
    /// The adapter that trains.
    pub lora: Option<&'a Lora>,
    /// The values of its matrices will be bfloat16: frozen ones may be kept so.
    pub bf16: bool,
}

impl<'a> Options<'a> {
    pub fn train_all(positions: usize) -> Self {
        Self { positions, trained: &|_| true, adapters: &[], lora: None, bf16: false }
    }

    pub fn frozen(positions: usize) -> Self {
        Self { positions, trained: &|_| false, adapters: &[], lora: None, bf16: false }
    }

    /// For the values of a checkpoint, which `init` gives it.
    pub fn holding(self, checkpoint: &Checkpoint, init: Init) -> Self {
        Self { bf16: init == Init::Checkpoint && checkpoint.bf16, ..self }
    }

    /// The same under a checkpoint's adapters.
    pub fn with_adapters(self, checkpoint: &'a Checkpoint) -> Self {
        Self { adapters: &checkpoint.adapters, ..self }
    }

    /// With an adapter that trains.
    pub fn with_lora(self, lora: &'a Lora) -> Self {
        Self { lora: Some(lora), ..self }
    }
}

impl<D: Device> Model<D> {
    pub fn new(arena: &mut Arena<D>, spec: &Spec, naming: Naming, options: Options) -> Self {
        let Options { trained, adapters, lora, bf16, .. } = options;
        let build = &mut Build { arena, spec, naming, trained, bf16, adapters, lora };
        let embed = build.param(Slot::Embedding, 0, [spec.vocab, spec.hidden]);
        let positions = spec.most_positions().map(|most| build.param(Slot::Position, 0, [most, spec.hidden]));
        let mut blocks: Vec<Block<D>> = (0..spec.layers).map(|layer| Block::new(build, layer)).collect();
        let norm = NormLayer::new(build, Slot::FinalNorm, 0, spec.hidden);
        let head = (spec.head == Head::Own).then(|| build.param(Slot::Head, 0, [spec.vocab, spec.hidden]));
        if lora.is_some() {
            // Beside an adapter the head of a reward model trains, and nothing else.
            build.trained = &|_| true;
        }
        let score = (spec.head == Head::Score).then(|| build.param(Slot::Score, 0, [1, spec.hidden]));
        let rope = match &spec.positions {
            Positions::Rope(rope) => Some(RopeTable::new(build.arena, rope, options.positions, spec.head_dim)),
            Positions::Learned { .. } => None,
        };
        let ranks = blocks.iter_mut().flat_map(Block::linears_mut).flat_map(|linear| linear.ranks());
        let widest_rank = ranks.max().unwrap_or(0);
        Self {
            spec: spec.clone(),
            embed,
            positions,
            blocks,
            norm,
            head,
            score,
            rope,
            widest_rank,
            adapters: adapters.len(),
        }
    }

    /// Memory that `new` will take on a device that stores `storage`.
    pub fn plan(storage: impl Into<Storage>, spec: &Spec, naming: Naming, options: Options) -> Ledger {
        Dry::measure(storage, |arena| Model::new(arena, spec, naming, options))
    }

    /// The rank that activations need room for ([`Acts::with_low_rank`]).
    pub fn widest_rank(&self) -> usize {
        self.widest_rank
    }

    /// Fills what is computed and not loaded.
    pub fn fill_tables(&mut self, device: &D) -> Result<()> {
        match (&mut self.rope, &self.spec.positions) {
            (Some(table), Positions::Rope(rope)) => table.fill(device, rope),
            _ => Ok(()),
        }
    }

    /// Every weight of the model itself once, in a fixed order; a tied head is the embedding.
    pub fn params_mut(&mut self) -> Vec<&mut Param<D>> {
        self.all_mut().filter(|param| !param.adapter).collect()
    }

    /// Every weight, and those of the adapter that trains.
    pub fn all_mut(&mut self) -> impl Iterator<Item = &mut Param<D>> {
        let blocks = self.blocks.iter_mut().flat_map(Block::params_mut);
        let start = std::iter::once(&mut self.embed).chain(self.positions.as_mut());
        let heads = self.head.as_mut().into_iter().chain(self.score.as_mut());
        start.chain(self.norm.params_mut()).chain(heads).chain(blocks)
    }

    fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear<D>> {
        self.blocks.iter_mut().flat_map(Block::linears_mut)
    }

    /// What gives logits, `[vocab, hidden]`.
    fn vocabulary(&self) -> &Param<D> {
        assert!(self.score.is_none(), "a reward model has no logits");
        self.head.as_ref().unwrap_or(&self.embed)
    }

    pub fn zero_grads(&mut self, device: &D) -> Result<()> {
        self.all_mut().filter_map(|p| p.grad.as_mut()).try_for_each(|grad| device.zero(grad.view_mut()))
    }
}

/// What an objective is a function of besides log-probabilities.
pub struct Terms<'a, D: Device> {
    pub kl: Option<KlTerm<'a, D>>,
    pub value: Option<ValueTerm<'a, D>>,
}

impl<B: Backend> Model<B> {
    /// Log-probabilities of the batch's targets into `acts.top.logp`.
    pub fn forward(&self, device: &B, batch: &Batch<B>, acts: &mut Acts<B>) -> Result<()> {
        self.hidden(device, batch, acts, None)?;
        let targets = batch.size().targets;
        let top = &mut acts.top;
        device.logprob_head(logprob_head::Forward {
            h: top.normed.top(targets),
            weight: self.vocabulary().view(),
            target: batch.targets(),
            scale: batch.temperature().scale(),
            scratch: top.tile.view_mut(),
            logp: top.logp.top_mut(targets),
            lse: top.lse.top_mut(targets),
            entropy: top.entropy.as_mut().map(|entropy| entropy.top_mut(targets)),
            ln_sum_p2: top.ln_sum_p2.as_mut().map(|ln_sum_p2| ln_sum_p2.top_mut(targets)),
        })
    }

    /// Next-token logits of the rows that the batch reads, `[rows read, vocab]`; keys and values go to `kv`.
    pub fn decode(
        &self,
        device: &B,
        batch: &Batch<B>,
        acts: &mut Acts<B>,
        kv: &mut KvCache<B>,
        logits: &mut Tensor<B>,
    ) -> Result<()> {
        self.hidden(device, batch, acts, Some(kv))?;
        self.logits(device, batch, acts, logits)
    }

    /// The same of other rows of the pass that `decode` ran, which the batch reads now.
    pub fn decode_more(&self, device: &B, batch: &Batch<B>, acts: &mut Acts<B>, logits: &mut Tensor<B>) -> Result<()> {
        self.read_hidden(device, batch, acts)?;
        self.logits(device, batch, acts, logits)
    }

    fn logits(&self, device: &B, batch: &Batch<B>, acts: &Acts<B>, logits: &mut Tensor<B>) -> Result<()> {
        let read = batch.size().targets;
        let weight = self.vocabulary().view();
        let (x, y) = (acts.top.normed.top(read), logits.top_mut(read));
        device.linear(linear::Forward { x, weight, bias: None, residual: None, y })
    }

    /// Log-probabilities of `targets` `[rows read, 1]` in the `logits` that `decode` left, into `acts.top.logp`: those that
    /// `forward` gives at that temperature, bit for bit where products have one order.
    pub fn decoded_logps(
        &self,
        device: &B,
        (targets, temperature): (View<B>, Temperature),
        acts: &mut Acts<B>,
        logits: &Tensor<B>,
    ) -> Result<()> {
        let (read, top) = (targets.rows(), &mut acts.top);
        let head = logprob_head::Forward {
            h: top.normed.top(read),
            weight: self.vocabulary().view(),
            target: targets,
            scale: temperature.scale(),
            scratch: top.tile.view_mut(),
            logp: top.logp.top_mut(read),
            lse: top.lse.top_mut(read),
            entropy: None,
            ln_sum_p2: None,
        };
        device.logprob_head_known(logits.top(read), head)
    }

    /// Final normalized hidden states of the rows that are read, into `acts.top.normed`.
    pub fn hidden(
        &self,
        device: &B,
        batch: &Batch<B>,
        acts: &mut Acts<B>,
        mut kv: Option<&mut KvCache<B>>,
    ) -> Result<()> {
        let (size, context) = (batch.size(), Context { device, batch, rope: self.rope.as_ref() });
        let y = acts.residual_mut(0).top_mut(size.rows);
        device.gather(rows::Gather { x: self.embed.view(), index: batch.tokens(), y })?;
        if let Some(positions) = &self.positions {
            let y = acts.residual_mut(0).top_mut(size.rows);
            device.gather_add(rows::GatherAdd { x: positions.view(), index: batch.positions(), y })?;
        }
        for (layer, block) in self.blocks.iter().enumerate() {
            let (x, y, block_acts, work) = acts.layer(layer);
            block.forward(&context, x, y, block_acts, work, kv.as_mut().map(|kv| kv.layer(layer)))?;
        }
        self.read_hidden(device, batch, acts)
    }

    /// Of the rows that the batch reads, from what the blocks left.
    fn read_hidden(&self, device: &B, batch: &Batch<B>, acts: &mut Acts<B>) -> Result<()> {
        let (size, read) = (batch.size(), batch.size().targets);
        let (residual, top) = acts.last_residual(self.blocks.len());
        let y = top.rows.top_mut(read);
        device.gather(rows::Gather { x: residual.top(size.rows), index: batch.completion_rows(), y })?;
        self.norm.forward(device, top.rows.top(read), top.normed.top_mut(read), top.stats.top_mut(read))
    }

    /// Adds to every trained weight's gradient. `dlogp` is the objective's derivative by each target's
    /// log-probability; `acts` is what `forward` left; `kl` is what it takes of the KLs to references, if anything.
    pub fn backward(
        &mut self,
        device: &B,
        batch: &Batch<B>,
        dlogp: &[f64],
        acts: &mut Acts<B>,
        kl: Option<KlTerm<B>>,
    ) -> Result<()> {
        self.backward_of(device, batch, dlogp, acts, Terms { kl, value: None })
    }

    /// The same of an objective that is a function of more than log-probabilities.
    pub fn backward_of(
        &mut self,
        device: &B,
        batch: &Batch<B>,
        dlogp: &[f64],
        acts: &mut Acts<B>,
        Terms { kl, value }: Terms<B>,
    ) -> Result<()> {
        self.backward_head(device, batch, dlogp, acts)?;
        if let Some(value) = value {
            value.backward(device, batch.size().targets, acts)?;
        }
        if let Some(kl) = kl {
            let (top, s) = acts.top_and_scratch();
            let (targets, head) = (batch.size().targets, self.head.as_mut().unwrap_or(&mut self.embed));
            kl.backward(device, (top.normed.top(targets), batch.temperature()), head, s.d_top_normed.top_mut(targets))?;
        }
        self.backward_top(device, batch, acts)?;
        self.backward_blocks(device, batch, acts)
    }

    /// From the gradient by the residual stream above the last block to those of the blocks and the embeddings.
    fn backward_blocks(&mut self, device: &B, batch: &Batch<B>, acts: &mut Acts<B>) -> Result<()> {
        let size = batch.size();
        let context = Context { device, batch, rope: self.rope.as_ref() };
        for (layer, block) in self.blocks.iter_mut().enumerate().rev() {
            let recompute = acts.keep() == Keep::Inputs;
            if recompute {
                let (x, y, block_acts, work) = acts.layer(layer);
                block.forward(&context, x, y, block_acts, work, None)?;
            }
            let (x, block_acts, work, scratch) = acts.layer_backward(layer);
            block.backward(&context, x, block_acts, work, scratch)?;
        }
        let tables = [(Some(&mut self.embed), batch.tokens()), (self.positions.as_mut(), batch.positions())];
        for (table, index) in tables {
            if let Some(dx) = table.and_then(Param::grad_mut) {
                let dy = acts.scratch().d_residual.top(size.rows);
                device.gather_backward(rows::GatherBackward { dy, index, dx })?;
            }
        }
        Ok(())
    }

    /// From `dlogp` to the gradient by what the head reads.
    fn backward_head(&mut self, device: &B, batch: &Batch<B>, dlogp: &[f64], acts: &mut Acts<B>) -> Result<()> {
        let targets = batch.size().targets;
        let (top, s) = acts.top_and_scratch();
        device.write_f64(dlogp, s.dlogp.top_mut(targets))?;
        device.zero(s.d_top_normed.top_mut(targets))?;
        let head = self.head.as_mut().unwrap_or(&mut self.embed);
        device.logprob_head_backward(logprob_head::Backward {
            h: top.normed.top(targets),
            weight: head.value.view(),
            target: batch.targets(),
            scale: batch.temperature().scale(),
            lse: top.lse.top(targets),
            dlogp: s.dlogp.top(targets),
            dentropy: None,
            entropy: None,
            scratch: top.tile.view_mut(),
            dh: s.d_top_normed.top_mut(targets),
            dweight: head.grad.as_mut().map(Tensor::view_mut),
        })
    }

    /// Through the final norm to the gradient by the residual stream above the last block.
    fn backward_top(&mut self, device: &B, batch: &Batch<B>, acts: &mut Acts<B>) -> Result<()> {
        let (rows, targets) = (batch.size().rows, batch.size().targets);
        let (top, s) = acts.top_and_scratch();
        device.zero(s.d_top.top_mut(targets))?;
        let (dy, x, stats) = (s.d_top_normed.top(targets), top.rows.top(targets), top.stats.top(targets));
        self.norm.backward(device, dy, x, stats, s.d_top.top_mut(targets))?;
        device.zero(s.d_residual.top_mut(rows))?;
        let (dy, dx) = (s.d_top.top(targets), s.d_residual.top_mut(rows));
        device.gather_backward(rows::GatherBackward { dy, index: batch.completion_rows(), dx })
    }
}
