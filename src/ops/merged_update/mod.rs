//! The optimizer pass: everything that happens to a weight in one step, in one pass over memory.
//!
//! ```text
//! g = clip * grad
//! AdamW (Loshchilov and Hutter, arXiv:1711.05101, as torch.optim.AdamW):
//!   w <- w (1 - lr decay)
//!   m <- b1 m + (1 - b1) g          v <- b2 v + (1 - b2) g^2
//!   w <- w - lr (m / c1) / (sqrt(v / c2) + eps),   c1 = 1 - b1^step,  c2 = 1 - b2^step
//! ```

mod cpu;
mod cuda;
mod reference;

use crate::device::{DType, Device, Dry, View, ViewMut};
use crate::error::{Error, Result};

/// How the update direction is made. Sparsifiers and the merge with `tau_ref` join here.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Rule {
    AdamW { beta1: f64, beta2: f64, eps: f64 },
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Step {
    pub rule: Rule,
    /// Counts from 1.
    pub step: u64,
    pub learning_rate: f64,
    pub weight_decay: f64,
    /// Factor on the gradient: min(1, max_norm / norm).
    pub clip: f64,
}

/// The step's scalars, folded on the host in f64 so that each element costs few operations.
#[derive(Clone, Copy)]
struct Scalars {
    clip: f32,
    keep: f32,
    beta1: f32,
    /// 1 - beta1, rounded once: `1 - beta1 as f32` would be off by up to 5e-5 of itself.
    fresh1: f32,
    beta2: f32,
    fresh2: f32,
    /// lr / c1
    rate: f32,
    /// 1 / sqrt(c2)
    root: f32,
    eps: f32,
}

impl Step {
    fn scalars(&self) -> Scalars {
        let Rule::AdamW { beta1, beta2, eps } = self.rule;
        let correction = |beta: f64| 1.0 - beta.powf(self.step as f64);
        Scalars {
            clip: self.clip as f32,
            keep: (1.0 - self.learning_rate * self.weight_decay) as f32,
            beta1: beta1 as f32,
            fresh1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            fresh2: (1.0 - beta2) as f32,
            rate: (self.learning_rate / correction(beta1)) as f32,
            root: (1.0 / correction(beta2).sqrt()) as f32,
            eps: eps as f32,
        }
    }
}

/// All views of one shape.
pub struct Args<'a, D: Device> {
    pub step: Step,
    pub grad: View<'a, D>,
    /// in place; F32, or Bf16 with a `master`, whose rounding it becomes
    pub weight: ViewMut<'a, D>,
    /// in place: the weight in F32, there if and only if `weight` is Bf16
    pub master: Option<ViewMut<'a, D>>,
    /// in place: m
    pub first_moment: ViewMut<'a, D>,
    /// in place: v
    pub second_moment: ViewMut<'a, D>,
}

pub trait MergedUpdate: Device {
    fn merged_update(&self, a: Args<Self>) -> Result<()>;
}

impl<D: Device> Args<'_, D> {
    fn check(&self) -> Result<()> {
        let shape = self.weight.shape();
        super::require("merged_update", "grad", self.grad.shape(), shape)?;
        if self.master.is_some() != (self.weight.dtype() == DType::Bf16) {
            let found = if self.master.is_some() { "a master beside" } else { "no master beside" };
            return Err(Error::op("merged_update", format!("{found} a weight of {:?}", self.weight.dtype())));
        }
        if let Some(master) = &self.master {
            super::require("merged_update", "master", master.shape(), shape)?;
        }
        super::require("merged_update", "first_moment", self.first_moment.shape(), shape)?;
        super::require("merged_update", "second_moment", self.second_moment.shape(), shape)
    }
}

impl MergedUpdate for Dry {
    fn merged_update(&self, a: Args<Self>) -> Result<()> {
        a.check()
    }
}
