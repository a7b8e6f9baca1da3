//! Optimizers declare their parameters and name a rule; one op, `ops/merged_update`, does the work.
//! To add one: a file here, its `mod` and its line in [`ALL`].

mod adamw;
mod child_tuning;
mod ema;
mod method;
mod ondare;
mod onties;
mod params;
mod schedule;

pub use method::{MergeSchedule, Method};
pub use schedule::{Decay, Schedule, Warmup};

use std::collections::BTreeMap;

use crate::device::{Arena, DType, Device, Kind, Philox, Tensor};
use crate::error::{Error, Result};
use crate::model::{Param, Role};
use crate::ops::merged_update::{self, Rounding};
use crate::ops::{Backend, sum_squares};
use crate::params::{ParamSpec, Params, Shared, flag, resolve, shared};

/// One optimizer of the registry.
pub struct Entry {
    pub name: &'static str,
    pub paper: &'static str,
    pub summary: &'static str,
    pub params: &'static [ParamSpec],
    /// Gets every parameter of `params` that has a value, each within its domain.
    pub build: fn(&Params) -> Method,
}

static ALL: &[Entry] = &[adamw::ENTRY, ondare::ENTRY, onties::ENTRY, child_tuning::ENTRY, ema::ENTRY];

pub fn all() -> &'static [Entry] {
    ALL
}

/// Every parameter of every optimizer, by name.
pub fn params() -> BTreeMap<&'static str, Shared> {
    shared(ALL.iter().flat_map(|entry| entry.params.iter().map(move |spec| (spec, Some(entry.name)))))
}

pub fn find(name: &str) -> Result<&'static Entry> {
    ALL.iter().find(|entry| entry.name == name).ok_or_else(|| {
        let names: Vec<_> = ALL.iter().map(|entry| entry.name).collect();
        Error::option("--optimizer", format!("\"{name}\" is not an optimizer; {}", names.join(", ")))
    })
}

/// What the user chose.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// Of the registry.
    pub name: String,
    pub params: Params,
}

impl Choice {
    pub fn build(&self) -> Result<Method> {
        Ok((find(&self.name)?.build)(&self.resolved()?))
    }

    /// Every parameter that decides the update, those at their defaults included.
    pub fn resolved(&self) -> Result<Params> {
        let entry = find(&self.name)?;
        let takes = |name: &str| entry.params.iter().any(|spec| spec.name == name);
        if let Some(unused) = self.params.names().find(|name| !takes(name)) {
            let flags: Vec<String> = entry.params.iter().map(ParamSpec::flag).collect();
            let detail = format!("{} does not use it, it takes {}; remove it", entry.name, flags.join(", "));
            return Err(Error::option(flag(unused), detail));
        }
        resolve(entry.name, entry.params, &self.params)
    }
}

/// Numbers that every optimizer has.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Hyper {
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
    /// Gradients are scaled down to this global norm; 0 = never.
    pub max_grad_norm: f64,
    /// Round weights up or down at random, in proportion, instead of to the nearest: bfloat16 weights then need no master.
    pub stochastic_rounding: bool,
    /// Of every random choice.
    pub seed: u64,
}

/// What is kept of one trained weight, by name.
pub type State<D> = Vec<(&'static str, Tensor<D>)>;

/// The states of all trained weights, in the model's order.
pub struct Optimizer<D: Device> {
    method: Method,
    hyper: Hyper,
    schedule: Schedule,
    slots: Vec<Slot<D>>,
    /// `[weights, 1]` sums of squared gradients.
    squares: Tensor<D>,
    /// `[weights, 2]` of the last update: elements that were to change, and those of them that rounding left as they were.
    lost: Tensor<D>,
    /// `[elements, 1]`, for the weight that needs most.
    scratch: Option<Tensor<D>>,
    shares: Shares,
}

/// What belongs to one trained weight.
struct Slot<D: Device> {
    state: State<D>,
    tau_ref: Option<Tensor<D>>,
    random: Philox,
}

/// What of tau_ref is in the weights beside their masters, where a method applies it lazily: of weights that decay, and of the
/// others. A function of the schedule, so that a checkpoint need not keep it.
#[derive(Clone, Copy, Default, PartialEq, Debug)]
struct Shares {
    decaying: f64,
    other: f64,
}

/// Gives, of a weight, what fine-tuning added to the base model: row-major, into a slice of the weight's size.
pub type TauRef<'a, D> = &'a mut dyn FnMut(&Param<D>, &mut [f32]) -> Result<()>;

/// The gradient of a step, measured.
pub struct GradNorm {
    /// Over all weights, before clipping.
    pub norm: f64,
    /// Name of the first weight whose gradient holds a NaN or an infinity.
    pub bad: Option<String>,
}

impl<D: Device> Optimizer<D> {
    /// Takes memory for what every trained weight of `params` needs, its master included.
    pub fn new(
        arena: &mut Arena<D>,
        method: Method,
        hyper: Hyper,
        schedule: Schedule,
        params: &mut [&mut Param<D>],
    ) -> Self {
        let mut trained: Vec<_> = params.iter_mut().filter(|p| p.grad.is_some()).collect();
        let mut slot = |param: &mut Param<D>| -> Slot<D> {
            let [rows, cols] = [param.value.rows(), param.value.cols()];
            let rounded = arena.storage() == DType::Bf16 && !hyper.stochastic_rounding;
            if rounded || method.lazy() {
                param.master = Some(arena.floats(Kind::States, rows, cols));
                param.lazy = method.lazy();
            }
            let state = method.states().iter().map(|name| (*name, arena.floats(Kind::States, rows, cols))).collect();
            let tau_ref = method.merges().then(|| arena.take(Kind::States, DType::Bf16, rows, cols));
            Slot { state, tau_ref, random: Philox::named(hyper.seed, &param.name) }
        };
        let slots: Vec<_> = trained.iter_mut().map(|param| slot(param)).collect();
        let largest = trained.iter().map(|param| method.rule.scratch(param.value.len())).max().unwrap_or(0);
        let scratch = (largest > 0).then(|| arena.floats(Kind::Workspace, largest, 1));
        let squares = arena.floats(Kind::States, slots.len(), 1);
        let lost = arena.indices(Kind::States, slots.len(), 2);
        Self { method, hyper, schedule, slots, squares, lost, scratch, shares: Shares::default() }
    }

    pub fn states_mut(&mut self) -> impl Iterator<Item = &mut State<D>> {
        self.slots.iter_mut().map(|slot| &mut slot.state)
    }

    pub fn states(&self) -> impl Iterator<Item = &State<D>> {
        self.slots.iter().map(|slot| &slot.state)
    }

    /// Merge weights of the run, summed: the share of `tau_ref` that it adds, at most.
    pub fn added(&self) -> f64 {
        self.method.added(&self.schedule)
    }

    /// What the lazily applied merge has come to after `steps` steps.
    pub fn resume(&mut self, steps: u64) {
        self.shares = Shares::default();
        (1..=steps).for_each(|step| self.advance(step, self.schedule.rate(step)));
    }

    /// The lazily applied merge of step `step`: `share <- (share + merge_weight)(1 - lr decay)`.
    fn advance(&mut self, step: u64, learning_rate: f64) {
        if !self.method.lazy() {
            return;
        }
        let weight = self.method.merge_weight_at(step, &self.schedule);
        let keep = 1.0 - learning_rate * self.hyper.weight_decay;
        self.shares.decaying = (self.shares.decaying + weight) * keep;
        self.shares.other += weight;
    }
}

impl<B: Backend> Optimizer<B> {
    /// Gives the states that do not start as zeros their values. `params` hold the first weights.
    pub fn start(&mut self, device: &B, params: &[&mut Param<B>]) -> Result<()> {
        let trained = params.iter().filter(|p| p.grad.is_some());
        let mut values = Vec::new();
        for (param, slot) in trained.zip(&mut self.slots) {
            if let Some((_, average)) = slot.state.iter_mut().find(|(name, _)| *name == method::AVERAGE) {
                values.resize(param.value.len(), 0.0);
                param.read(device, &mut values)?;
                device.write_f32(&values, average.view_mut())?;
            }
        }
        Ok(())
    }

    /// Gives every trained weight its `tau_ref`, prepared as the method wants it.
    pub fn set_tau_ref(&mut self, device: &B, params: &[&mut Param<B>], tau: TauRef<B>) -> Result<()> {
        let (trained, mut values) = (params.iter().filter(|p| p.grad.is_some()), Vec::new());
        for (param, slot) in trained.zip(&mut self.slots) {
            let tau_ref = slot.tau_ref.as_mut().expect("a method that merges has room for it");
            values.resize(param.value.len(), 0.0);
            tau(param, &mut values)?;
            merged_update::prepare(&self.method.rule, &slot.random, &mut values);
            device.write_f32(&values, tau_ref.view_mut())?;
        }
        Ok(())
    }

    /// Reads every gradient once.
    pub fn grad_norm(&mut self, device: &B, params: &[&mut Param<B>]) -> Result<GradNorm> {
        let trained: Vec<_> = params.iter().filter_map(|p| p.grad.as_ref().map(|grad| (&p.name, grad))).collect();
        for (i, (_, grad)) in trained.iter().enumerate() {
            let sum = self.squares.view_mut().slice(i, 1);
            device.sum_squares(sum_squares::Args { x: grad.view(), sum })?;
        }
        let mut squares = vec![0.0; trained.len()];
        device.read_f64(self.squares.view(), &mut squares)?;
        let bad = squares.iter().position(|s| !s.is_finite()).map(|i| trained[i].0.clone());
        Ok(GradNorm { norm: squares.iter().sum::<f64>().sqrt(), bad })
    }

    /// One update of every trained weight. `step` counts from 1. Weight decay spares biases and norms, as
    /// transformers' Trainer does.
    pub fn update(
        &mut self,
        device: &B,
        params: &mut [&mut Param<B>],
        step: u64,
        learning_rate: f64,
        norm: f64,
    ) -> Result<()> {
        let (max, method) = (self.hyper.max_grad_norm, self.method);
        // torch.nn.utils.clip_grad_norm_ adds the same 1e-6.
        let clip = if max > 0.0 { (max / (norm + 1e-6)).min(1.0) } else { 1.0 };
        self.advance(step, learning_rate);
        device.zero(self.lost.view_mut())?;
        let rule = method.rule_at(step, &self.schedule);
        let random_merge = method.merges() && !method.lazy();
        let trained = params.iter_mut().filter(|p| p.grad.is_some());
        for (i, (param, slot)) in trained.zip(&mut self.slots).enumerate() {
            let wanted = method.rule.scratch(param.value.len());
            let decays = param.role == Role::Matrix;
            let weight_decay = if decays { self.hyper.weight_decay } else { 0.0 };
            let (mut first_moment, mut second_moment, mut since_merge, mut average) = (None, None, None, None);
            for (name, tensor) in &mut slot.state {
                let place = match *name {
                    method::FIRST_MOMENT => &mut first_moment,
                    method::SECOND_MOMENT => &mut second_moment,
                    method::SINCE_MERGE => &mut since_merge,
                    _ => &mut average,
                };
                *place = Some(tensor.view_mut());
            }
            device.merged_update(merged_update::Args {
                step: merged_update::Step {
                    adam: method.adam(&self.hyper),
                    rule,
                    step,
                    learning_rate,
                    weight_decay,
                    clip,
                    gradient_reserve_rate: method.gradient_reserve_rate,
                    merges: method.merges_at(step),
                    share: if decays { self.shares.decaying } else { self.shares.other },
                    rounding: match self.hyper.stochastic_rounding || random_merge {
                        true => Rounding::Stochastic,
                        false => Rounding::Nearest,
                    },
                    random: slot.random,
                },
                grad: param.grad.as_ref().expect("filtered above").view(),
                weight: param.value.view_mut(),
                master: param.master.as_mut().map(Tensor::view_mut),
                first_moment: first_moment.expect("every method has it"),
                second_moment: second_moment.expect("every method has it"),
                since_merge,
                average,
                tau_ref: slot.tau_ref.as_ref().map(Tensor::view),
                scratch: self.scratch.as_mut().map(|scratch| scratch.top_mut(wanted)).filter(|_| wanted > 0),
                lost: Some(self.lost.view_mut().slice(i, 1)),
            })?;
        }
        Ok(())
    }

    /// Of the elements that the last update was to change, the share that rounding left as they were.
    pub fn lost(&self, device: &B) -> Result<f64> {
        let mut counts = vec![0; self.lost.len()];
        device.read_u32(self.lost.view(), &mut counts)?;
        let sum = |which: usize| counts.iter().skip(which).step_by(2).map(|n| u64::from(*n)).sum::<u64>();
        let (updates, lost) = (sum(0), sum(1));
        Ok(if updates == 0 { 0.0 } else { lost as f64 / updates as f64 })
    }
}
