//! Optimizers declare their state and name a rule; one op, `ops/merged_update`, does the work.
//! To add one: a file here, its `mod` and its line in [`ALL`].

mod adamw;
mod schedule;

pub use schedule::{Decay, Schedule};

use crate::device::Philox;
use crate::device::{Arena, Device, Kind, Tensor};
use crate::error::{Error, Result};
use crate::model::{Param, Role};
use crate::ops::merged_update::{self, Adam, Form, Rounding, Rule};
use crate::ops::{Backend, sum_squares};

/// Numbers that a rule is made of.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Hyper {
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
    /// Gradients are scaled down to this global norm; 0 = never.
    pub max_grad_norm: f64,
}

/// One optimizer of the registry.
pub struct Entry {
    pub name: &'static str,
    pub paper: &'static str,
    pub summary: &'static str,
    /// Tensors that it keeps of each trained weight, in the weight's shape, as checkpoints name them.
    pub states: &'static [&'static str],
    pub rule: fn(&Hyper) -> Rule,
}

static ALL: &[Entry] = &[adamw::ENTRY];

pub fn all() -> &'static [Entry] {
    ALL
}

pub fn find(name: &str) -> Result<&'static Entry> {
    ALL.iter().find(|entry| entry.name == name).ok_or_else(|| {
        let names: Vec<_> = ALL.iter().map(|entry| entry.name).collect();
        Error::option("--optimizer", format!("\"{name}\" is not an optimizer; {}", names.join(", ")))
    })
}

/// What is kept of one trained weight, by name.
pub type State<D> = Vec<(&'static str, Tensor<D>)>;

/// The states of all trained weights, in the model's order.
pub struct Optimizer<D: Device> {
    rule: Rule,
    hyper: Hyper,
    states: Vec<State<D>>,
    /// `[weights, 1]` sums of squared gradients.
    squares: Tensor<D>,
}

/// The gradient of a step, measured.
pub struct GradNorm {
    /// Over all weights, before clipping.
    pub norm: f64,
    /// Name of the first weight whose gradient holds a NaN or an infinity.
    pub bad: Option<String>,
}

impl<D: Device> Optimizer<D> {
    pub fn new(arena: &mut Arena<D>, entry: &Entry, hyper: Hyper, params: &[&mut Param<D>]) -> Self {
        let trained: Vec<_> = params.iter().filter(|p| p.grad.is_some()).collect();
        let mut state = |value: &Tensor<D>| -> State<D> {
            let take = |name: &&'static str| (*name, arena.floats(Kind::States, value.rows(), value.cols()));
            entry.states.iter().map(take).collect()
        };
        let states: Vec<_> = trained.iter().map(|p| state(&p.value)).collect();
        let squares = arena.floats(Kind::States, states.len(), 1);
        Self { rule: (entry.rule)(&hyper), hyper, states, squares }
    }

    pub fn states_mut(&mut self) -> &mut [State<D>] {
        &mut self.states
    }

    pub fn states(&self) -> &[State<D>] {
        &self.states
    }
}

impl<B: Backend> Optimizer<B> {
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
        let max = self.hyper.max_grad_norm;
        // torch.nn.utils.clip_grad_norm_ adds the same 1e-6.
        let clip = if max > 0.0 { (max / (norm + 1e-6)).min(1.0) } else { 1.0 };
        let trained = params.iter_mut().filter(|p| p.grad.is_some());
        for (param, state) in trained.zip(&mut self.states) {
            let weight_decay = if param.role == Role::Matrix { self.hyper.weight_decay } else { 0.0 };
            let grad = param.grad.as_ref().expect("filtered above").view();
            let [(_, first_moment), (_, second_moment)] = &mut state[..] else {
                unreachable!("{:?} keeps two moments", self.rule)
            };
            let Hyper { beta1, beta2, eps, .. } = self.hyper;
            device.merged_update(merged_update::Args {
                step: merged_update::Step {
                    adam: Adam { beta1, beta2, eps, form: Form::Torch },
                    rule: self.rule,
                    step,
                    learning_rate,
                    weight_decay,
                    clip,
                    gradient_reserve_rate: 1.0,
                    merges: true,
                    share: 0.0,
                    rounding: Rounding::Nearest,
                    random: Philox::new(0, 0),
                },
                grad,
                weight: param.value.view_mut(),
                master: param.master.as_mut().map(Tensor::view_mut),
                first_moment: first_moment.view_mut(),
                second_moment: second_moment.view_mut(),
                since_merge: None,
                average: None,
                tau_ref: None,
                scratch: None,
                lost: None,
            })?;
        }
        Ok(())
    }
}
