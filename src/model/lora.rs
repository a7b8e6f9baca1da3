//! Adapters of linear layers (LoRA; Hu et al., arXiv:2106.09685): `scale x A^T B^T` beside `x W^T`, A `[rank, inputs]`, B
//! `[outputs, rank]`. A layer has at most two: those that are applied as they are, side by side as one of the sum of their
//! ranks, and one that trains.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Model;
use super::arch::Stored;
use super::param::Param;
use crate::checkpoint::peft::{AdapterConfig, AdapterFile, a_name, b_name};
use crate::device::{Arena, Device, Kind, Philox, Tensor, View, ViewMut};
use crate::error::{Error, Result};
use crate::ops::{Backend, low_rank};

/// What trains instead of a model's weights.
#[derive(Clone, PartialEq, Debug)]
pub struct Lora {
    pub rank: usize,
    pub alpha: f64,
    /// Scale is `alpha / sqrt(rank)`, not `alpha / rank` (Kalajdzievski, arXiv:2312.03732).
    pub rslora: bool,
    /// Linear layers, each by the end of the name that the checkpoint gives it: `q_proj`. Empty: those of all blocks
    /// (Dettmers et al., arXiv:2305.14314, find that no fewer reach full training).
    pub targets: Vec<String>,
    /// The adapter that it starts as; else A is drawn and B is 0.
    pub start: Option<PathBuf>,
}

impl Lora {
    /// One that goes on from an adapter, with its rank, scale and layers.
    pub fn from_adapter(dir: &Path) -> Result<Self> {
        let file = AdapterFile::open(dir)?;
        let targets = file.modules();
        let of = |module: &String| (file.rank(module), file.scaling(module));
        let (config, first) = (&file.config, of(&targets[0]));
        let one = (config.lora_rank, config.default_scaling());
        // Where a tensor holds several weights its rank is the sum of theirs, and the config's that of one.
        let adds_up = |(rank, scale): (usize, f64)| rank.is_multiple_of(one.0) && same_scale(scale, one.1);
        let is_one = targets.iter().map(of).all(adds_up);
        let (rank, scale) = if is_one { one } else { first };
        if let Some(other) = targets.iter().find(|module| !is_one && of(module) != first) {
            let detail = format!(
                "{other} has rank {} and scale {}, {} has {rank} and {scale}; an adapter that trains has one of each",
                file.rank(other),
                file.scaling(other),
                targets[0]
            );
            return Err(Error::file(dir, detail));
        }
        let rslora = file.config.rslora;
        let alpha = scale * if rslora { (rank as f64).sqrt() } else { rank as f64 };
        Ok(Self { rank, alpha, rslora, targets, start: Some(dir.to_path_buf()) })
    }

    /// What `B A` is multiplied with.
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.rslora { rank.sqrt() } else { rank }
    }

    pub fn trains(&self, module: &str) -> bool {
        self.targets.is_empty() || self.targets.iter().any(|target| names(target, module))
    }

    /// Refuses targets that name nothing.
    pub fn check<D: Device>(&self, model: &mut Model<D>) -> Result<()> {
        let layers: Vec<Stored> = model.linears_mut().map(|linear| linear.weight.stored.clone()).collect();
        match self.targets.iter().find(|t| !layers.iter().any(|stored| names(t, module_of(stored)))) {
            None => Ok(()),
            Some(target) => {
                let known = endings(layers.iter()).join(",");
                let detail = format!("{target} names no linear layer of this model; it has {known}");
                Err(Error::option("--target-modules", detail))
            }
        }
    }

    /// How PEFT writes it down; `base` is what it adapts. Where a tensor holds several weights, its rank and alpha are the
    /// sums of theirs, so that the scale stays.
    pub fn config(&self, base: &str, linears: &[&Stored]) -> AdapterConfig {
        let targets = if self.targets.is_empty() { endings(linears.iter().copied()) } else { self.targets.clone() };
        let mut fused: Vec<(String, usize)> = Vec::new();
        for stored in linears.iter().filter(|stored| !stored.is_alone()) {
            let known = (ending(stored).to_string(), stored.parts());
            if !fused.contains(&known) {
                fused.push(known);
            }
        }
        let alpha = |parts: usize| self.alpha * if self.rslora { (parts as f64).sqrt() } else { parts as f64 };
        AdapterConfig {
            lora_rank: self.rank,
            lora_alpha: self.alpha,
            rslora: self.rslora,
            target_modules: targets,
            base_model: Some(base.to_string()),
            fan_in_fan_out: linears.iter().any(|stored| stored.is_transposed()),
            rank_pattern: fused.iter().map(|(name, parts)| (name.clone(), parts * self.rank)).collect(),
            alpha_pattern: fused.iter().map(|(name, parts)| (name.clone(), alpha(*parts))).collect(),
            ..AdapterConfig::default()
        }
    }
}

/// But for the rounding of an alpha that was written down.
fn same_scale(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-12 * b.abs()
}

/// PEFT's rule: the whole name of a module, or the end of it that follows a dot.
fn names(target: &str, module: &str) -> bool {
    module.strip_suffix(target).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// What PEFT calls the layer of a weight.
pub fn module_of(weight: &Stored) -> &str {
    weight.tensor.strip_suffix(".weight").unwrap_or(&weight.tensor)
}

/// The last part of that name, which layers of a kind have in common: `q_proj`.
fn ending(weight: &Stored) -> &str {
    module_of(weight).rsplit('.').next().unwrap_or_default()
}

/// Each once, in the order of the layers.
fn endings<'a>(weights: impl Iterator<Item = &'a Stored>) -> Vec<String> {
    let mut endings: Vec<String> = Vec::new();
    for ending in weights.map(ending) {
        if !endings.iter().any(|known| known == ending) {
            endings.push(ending.to_string());
        }
    }
    endings
}

/// An adapter that is applied and not trained, and how much of it.
#[derive(Clone)]
pub struct Adapter {
    pub dir: PathBuf,
    pub file: Arc<AdapterFile>,
    /// Multiplies what it adds.
    pub weight: f64,
}

impl Adapter {
    pub fn open(dir: &Path, weight: f64) -> Result<Self> {
        Ok(Self { dir: dir.to_path_buf(), file: Arc::new(AdapterFile::open(dir)?), weight })
    }

    /// Refuses an adapter of another model: each of its modules must be a linear layer of `model`, in its shape.
    pub fn check<D: Device>(&self, model: &mut Model<D>) -> Result<()> {
        for module in self.file.modules() {
            let found = self.file.shape(&module);
            let mut parts = model.linears_mut().filter(|linear| module_of(&linear.weight.stored) == module).peekable();
            let fail = |detail| Err(Error::file(self.file.weights.path_of(&a_name(&module)), detail));
            if parts.peek().is_none() {
                return fail(format!(
                    "adapts {module:?}, which is no linear layer of the base; was it made for another model?"
                ));
            }
            let shapes: Vec<[usize; 2]> = parts.map(|linear| linear.weight.matrix_shape()).collect();
            let expected = [shapes.iter().map(|[outputs, _]| outputs).sum(), shapes[0][1]];
            if found != expected {
                return fail(format!(
                    "adapts {module:?} as {found:?} (outputs, inputs), in the base it is {expected:?}; was it made for another \
                     model?"
                ));
            }
        }
        Ok(())
    }

    fn rank(&self, module: &str) -> usize {
        if self.file.has(module) { self.file.rank(module) } else { 0 }
    }
}

/// The rank of all of them side by side at one layer.
pub fn rank_of(adapters: &[Adapter], module: &str) -> usize {
    adapters.iter().map(|adapter| adapter.rank(module)).sum()
}

/// A low-rank product beside a linear layer.
pub struct LowRank<D: Device> {
    /// `[rank, inputs]`
    pub a: Param<D>,
    /// `[outputs, rank]`
    pub b: Param<D>,
    scale: f32,
    on: bool,
    /// `[rank, 1]`: which adapter each column of A's product belongs to, of those that are applied.
    owner: Option<Tensor<D>>,
}

impl<D: Device> LowRank<D> {
    /// What adapters of the sum of ranks `rank` add to a weight; their weights and scales are in B.
    pub fn frozen(arena: &mut Arena<D>, weight: &Param<D>, rank: usize) -> Self {
        let name = |which: &str| Stored::whole(format!("{}.adapters.{which}", weight.name));
        let owner = Some(arena.indices(Kind::Weights, rank, 1));
        Self { owner, ..Self::new(arena, weight, [name("A"), name("B")], rank, 1.0, false) }
    }

    pub fn trained(arena: &mut Arena<D>, weight: &Param<D>, lora: &Lora) -> Self {
        let module = module_of(&weight.stored);
        let stored = weight.stored.adapter([a_name(module), b_name(module)], lora.rank);
        Self::new(arena, weight, stored, lora.rank, lora.scale() as f32, true)
    }

    fn new(
        arena: &mut Arena<D>,
        weight: &Param<D>,
        [a, b]: [Stored; 2],
        rank: usize,
        scale: f32,
        trained: bool,
    ) -> Self {
        let [outputs, inputs] = weight.value.view().shape();
        let mut param = |stored, shape| Param::of_adapter(arena, stored, shape, trained);
        Self { a: param(a, [rank, inputs]), b: param(b, [outputs, rank]), scale, on: true, owner: None }
    }

    pub fn rank(&self) -> usize {
        self.a.value.rows()
    }

    pub fn switch(&mut self, on: bool) {
        self.on = on;
    }

    /// Fills what is applied at one layer from the adapters' files.
    fn fill(&mut self, device: &D, weight: &Param<D>, adapters: &[Adapter]) -> Result<()> {
        let (module, rank) = (module_of(&weight.stored), self.rank());
        let [outputs, inputs] = weight.matrix_shape();
        let (mut all_a, mut all_b) = (Vec::with_capacity(rank * inputs), vec![0.0; outputs * rank]);
        let (mut whole, mut part, mut owner) = (Vec::new(), Vec::new(), Vec::new());
        for (adapter, Adapter { file, weight: share, .. }) in (0..).zip(adapters).filter(|(_, a)| a.file.has(module)) {
            let first = all_a.len() / inputs;
            let [own, _] = file.read_a(module, &mut whole)?;
            owner.resize(owner.len() + own, adapter);
            all_a.extend_from_slice(&whole);
            file.read_b(module, &mut whole)?;
            part.resize(outputs * own, 0.0);
            weight.stored.extract_outputs(&whole, [outputs, own], &mut part);
            let scale = file.scaling(module) * share;
            for (to, from) in all_b.chunks_exact_mut(rank).zip(part.chunks_exact(own)) {
                let to = to[first..first + own].iter_mut();
                to.zip(from).for_each(|(to, from)| *to = (scale * f64::from(*from)) as f32);
            }
        }
        if let Some(owners) = &mut self.owner {
            device.write_u32(&owner, owners.view_mut())?;
        }
        self.a.write(device, &all_a)?;
        self.b.write(device, &all_b)
    }

    /// Starts as an adapter of the layer. Where the layer's tensor holds several weights, the adapter may be one that was
    /// trained here, or have one A for all of them, which each then takes as its own.
    fn start(&mut self, device: &D, weight: &Param<D>, dir: &Path, file: &AdapterFile) -> Result<()> {
        let (module, rank) = (module_of(&weight.stored), self.rank());
        let [outputs, inputs] = weight.matrix_shape();
        let (mut all, mut own) = (Vec::new(), vec![0.0; rank * inputs]);
        let [found, _] = file.read_a(module, &mut all)?;
        if found == rank {
            self.a.write(device, &all)?;
            file.read_b(module, &mut all)?;
            own.resize(outputs * rank, 0.0);
            weight.stored.extract_outputs(&all, [outputs, rank], &mut own);
            return self.b.write(device, &own);
        }
        let fail = |why: &str| {
            let detail = format!(
                "{module} has rank {found}, of which each of {} weights has {rank}, but {why}; apply it with --adapter and \
                 train another on top",
                weight.stored.parts()
            );
            Err(Error::file(dir, detail))
        };
        if found != rank * weight.stored.parts() {
            return fail("the ranks do not add up");
        }
        self.a.stored.extract(&all, [rank, inputs], &mut own);
        self.a.write(device, &own)?;
        file.read_b(module, &mut all)?;
        own.resize(outputs * rank, 0.0);
        self.b.stored.extract(&all, [outputs, rank], &mut own);
        let mut rows = vec![0.0; outputs * found];
        weight.stored.extract_outputs(&all, [outputs, found], &mut rows);
        let count = |values: &[f32]| values.iter().filter(|x| **x != 0.0).count();
        if count(&rows) != count(&own) {
            return fail("its B mixes them");
        }
        self.b.write(device, &own)
    }

    /// A as PEFT draws it (`kaiming_uniform_` with a = sqrt 5: uniform within 1 / sqrt(inputs)), B 0: nothing is added yet.
    fn init(&mut self, device: &D, seed: u64) -> Result<()> {
        let random = Philox::named(seed, &self.a.name);
        let most = 1.0 / (self.a.value.cols() as f64).sqrt();
        let draw = |i: usize| (most * (2.0 * random.uniform(i as u64) - 1.0)) as f32;
        self.a.write(device, &(0..self.a.value.len()).map(draw).collect::<Vec<_>>())?;
        self.b.write(device, &vec![0.0; self.b.value.len()])
    }
}

/// What adapters need of a pass beside activations.
pub struct Room<D: Device> {
    /// `[rows * rank, 1]`, of which a layer takes what its rank needs.
    scratch: Tensor<D>,
    blend: Option<Shares<D>>,
}

/// How much of each applied adapter each row takes.
struct Shares<D: Device> {
    /// `[rows, adapters]`, F32
    weights: Tensor<D>,
    /// Those of the pass.
    rows: usize,
}

impl<D: Device> Room<D> {
    /// For `low_rank` of up to `rows` rows.
    pub fn new(arena: &mut Arena<D>, rows: usize, rank: usize) -> Self {
        Self { scratch: arena.stored(Kind::Activations, rows * rank, 1), blend: None }
    }

    /// The same where each row has its own weights for `adapters` adapters.
    pub fn with_blend(self, arena: &mut Arena<D>, rows: usize, adapters: usize) -> Self {
        let weights = (adapters > 0).then(|| arena.floats(Kind::Activations, rows, adapters));
        Self { blend: weights.map(|weights| Shares { weights, rows: 0 }), ..self }
    }

    /// Weights of the rows of the next pass, `[rows, adapters]`.
    pub fn set_blend(&mut self, device: &D, weights: &[f32]) -> Result<()> {
        let Some(blend) = &mut self.blend else { return Ok(()) };
        blend.rows = weights.len() / blend.weights.cols();
        device.write_f32(weights, blend.weights.top_mut(blend.rows))
    }
}

impl<B: Backend> LowRank<B> {
    /// Adds to `y`.
    pub fn forward(&self, device: &B, x: View<B>, room: &mut Room<B>, y: ViewMut<B>) -> Result<()> {
        self.factors(x.rows(), room).map_or(Ok(()), |factors| device.low_rank(factors.beside(x, y)))
    }

    /// What it adds to a layer of so many rows; nothing while it is off.
    pub fn factors<'a>(&'a self, rows: usize, room: &'a mut Room<B>) -> Option<low_rank::Factors<'a, B>> {
        if !self.on {
            return None;
        }
        let blend = room
            .blend
            .as_ref()
            .zip(self.owner.as_ref())
            .map(|(shares, owner)| low_rank::Blend { weights: shares.weights.top(shares.rows), owner: owner.view() });
        let rank = self.rank();
        let scratch = room.scratch.top_mut(rows * rank).reshape(rows, rank);
        let (a, b, scale) = (self.a.view(), self.b.view(), self.scale);
        Some(low_rank::Factors { a, b, scale, blend, scratch })
    }

    /// Adds to the gradients and to `dx`.
    pub fn backward(&mut self, device: &B, dy: View<B>, x: View<B>, room: &mut Room<B>, dx: ViewMut<B>) -> Result<()> {
        if !self.on {
            return Ok(());
        }
        let (rows, rank) = (x.rows(), self.rank());
        let scratch = room.scratch.top_mut(rows * rank).reshape(rows, rank);
        let (a, b, scale) = (self.a.value.view(), self.b.value.view(), self.scale);
        let [da, db] = [&mut self.a.grad, &mut self.b.grad].map(|grad| grad.as_mut().map(Tensor::view_mut));
        device.low_rank_backward(low_rank::Backward { dy, x, a, b, scale, scratch, dx, da, db })
    }
}

impl<D: Device> Model<D> {
    /// A and B of the adapter that trains, layer by layer, and before them the head of a reward model; nothing where the weights
    /// train.
    pub fn adapter_mut(&mut self) -> Vec<&mut Param<D>> {
        let trains = self.linears_mut().any(|linear| linear.trained.is_some());
        self.all_mut().filter(|param| trains && param.grad.is_some()).collect()
    }

    /// Everything that has a gradient, in a fixed order.
    pub fn trained_mut(&mut self) -> Vec<&mut Param<D>> {
        self.all_mut().filter(|param| param.grad.is_some()).collect()
    }

    /// With the adapter that trains or, as it was before it, without.
    pub fn switch_adapter(&mut self, on: bool) {
        self.linears_mut().filter_map(|linear| linear.trained.as_mut()).for_each(|adapter| adapter.switch(on));
    }

    /// The adapter that trains before its first step: that of `start`, or drawn by the seed and the names of the layers.
    pub fn init_adapter(&mut self, device: &D, start: Option<&Path>, seed: u64) -> Result<()> {
        let file = start.map(|dir| Ok((dir, AdapterFile::open(dir)?))).transpose()?;
        for linear in self.linears_mut() {
            let Some(own) = &mut linear.trained else { continue };
            match &file {
                Some((dir, file)) => own.start(device, &linear.weight, dir, file)?,
                None => own.init(device, seed)?,
            }
        }
        match (&file, &mut self.score) {
            (Some((_, file)), Some(score)) if file.head().is_some() => {
                let mut head = Vec::new();
                file.read_head(&mut head)?;
                score.write(device, &head)
            }
            _ => Ok(()),
        }
    }

    /// The adapters that are applied.
    pub fn fill_adapters(&mut self, device: &D, adapters: &[Adapter]) -> Result<()> {
        self.linears_mut().try_for_each(|linear| match &mut linear.frozen {
            Some(frozen) => frozen.fill(device, &linear.weight, adapters),
            None => Ok(()),
        })
    }

    /// How PEFT writes down the adapter that trains.
    pub fn adapter_config(&mut self, lora: &Lora, base: &str) -> AdapterConfig {
        let adapted = self.linears_mut().filter(|linear| linear.trained.is_some());
        let stored: Vec<&Stored> = adapted.map(|linear| &linear.weight.stored).collect();
        let config = lora.config(base, &stored);
        match self.score.is_some() {
            true => AdapterConfig { has_head: true, task_type: Some("SEQ_CLS".into()), ..config },
            false => config,
        }
    }
}
