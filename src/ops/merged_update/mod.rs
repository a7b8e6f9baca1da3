//! The optimizer pass: everything that happens to a weight in one step, in as few passes over memory as the rule allows.
//!
//! ```text
//! g = clip * grad
//! Adam (Kingma and Ba, arXiv:1412.6980), decay beside it (Loshchilov and Hutter, arXiv:1711.05101), in one of two forms:
//!   m <- b1 m + (1 - b1) g          v <- b2 v + (1 - b2) g^2          c1 = 1 - b1^step,  c2 = 1 - b2^step
//!   Torch         delta = -lr (m / c1) / (sqrt(v / c2) + eps)          w <- w (1 - lr decay) + delta
//!   HuggingFace   delta = -lr sqrt(c2) / c1 m / (sqrt(v) + eps)        w <- (w + delta) (1 - lr decay)
//! ```

mod cpu;
mod cuda;
mod reference;

use crate::device::{DType, Device, Dry, Philox, View, ViewMut};
use crate::error::{Error, Result};

/// How Adam's direction is made.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Adam {
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub form: Form,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Form {
    /// torch.optim.AdamW: decay first, eps beside the corrected root.
    Torch,
    /// transformers' former AdamW and the released online merging optimizers: eps beside the uncorrected root, decay last.
    /// Without `correct_bias`, c1 = c2 = 1.
    HuggingFace { correct_bias: bool },
}

/// What becomes of the update `delta` on its way to the weight. Online merging: Lu et al., arXiv:2405.17931.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Rule {
    /// `w += delta`
    Adam,
    /// The update is dropped at random and what is left merged with `tau_ref`.
    OnDare { reserve_rate: f64, merge_weight: f64, variant: DareVariant, rescale: bool, clip: f64 },
    /// The update is trimmed by magnitude and merged with `tau_ref` where their signs agree.
    OnTies { reserve_rate: f64, merge_weight: f64, consensus: Consensus, rescale: bool },
    /// After the update, `average <- (1 - rate) average + rate w` and `w <- (1 - rate) w + rate average`. (The paper says
    /// "moving average in each optimization step" and leaves the rest open.)
    Ema { rate: f64 },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DareVariant {
    /// As the authors' code has it: what is kept is divided by the reserve rate, and `tau_ref` was masked once.
    Released,
    /// Equations 3 and 4: nothing is divided, and `tau_ref` gets a new mask at every step.
    Paper,
}

/// Where OnTIES elects signs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Consensus {
    /// As the authors' code has it: by `tau_ref + update`, before either is weighted.
    BeforeWeight,
    /// Equations 5 to 7: by what is added, weights included.
    AfterWeight,
}

/// How what is added to a weight is rounded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rounding {
    Nearest,
    /// Up or down with the probability of the distance, so that what is too small for one step arrives over many.
    Stochastic,
}

impl Rule {
    /// Elements that [`Args::scratch`] must have for a weight of `len`; 0: none.
    pub fn scratch(&self, len: usize) -> usize {
        match self {
            Self::Adam | Self::Ema { .. } | Self::OnDare { rescale: false, .. } => 0,
            Self::OnDare { .. } | Self::OnTies { .. } => len,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Step {
    pub adam: Adam,
    pub rule: Rule,
    /// Counts from 1.
    pub step: u64,
    pub learning_rate: f64,
    pub weight_decay: f64,
    /// Factor on the gradient: min(1, max_norm / norm).
    pub clip: f64,
    /// Gradient dropout (ChildTuning-F): share of the gradient's elements that is kept, and divided by it, before the
    /// moments; 1 = all.
    pub gradient_reserve_rate: f64,
    /// Step-K: false on the steps between merges, where `w += delta` and `since_merge += delta`, no mask, no merge.
    pub merges: bool,
    /// How much of `tau_ref` lies on the weight beside its master: `weight = master + share tau_ref`; 0 without it. The
    /// released OnDARE adds `merge_weight tau_ref` at every step, less than an f32 can hold beside a weight, so the caller
    /// keeps the sum, `share <- (share + merge_weight) (1 - lr decay)`, and the op adds none of it to the master.
    pub share: f64,
    pub rounding: Rounding,
    /// Draws of this weight. The op makes counters of the step, what the draw is for, and the element.
    pub random: Philox,
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
        let Adam { beta1, beta2, eps, .. } = self.adam;
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
    /// in place: the sum of updates since the last merge; step-K
    pub since_merge: Option<ViewMut<'a, D>>,
    /// in place: the moving average; [`Rule::Ema`]
    pub average: Option<ViewMut<'a, D>>,
    /// Bf16 or F32: what OnDARE and OnTIES merge with, prepared
    pub tau_ref: Option<View<'a, D>>,
    /// F32, [`Rule::scratch`] elements; contents of no meaning before and after
    pub scratch: Option<ViewMut<'a, D>>,
    /// `+=` `[1, 2]` U32: updates that were not zero; of those, how many left the weight (its master where there is one) as
    /// it was. `None`: not counted
    pub lost: Option<ViewMut<'a, D>>,
}

pub trait MergedUpdate: Device {
    fn merged_update(&self, a: Args<Self>) -> Result<()>;
}

impl<D: Device> Args<'_, D> {
    fn check(&self) -> Result<()> {
        let (step, form) = (self.step, self.step.adam.form);
        if step.rule != Rule::Adam || form != Form::Torch || step.rounding != Rounding::Nearest {
            return Err(Error::op("merged_update", format!("{:?} in the form {form:?} is not there yet", step.rule)));
        }
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
