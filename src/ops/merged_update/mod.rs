//! The optimizer pass: everything that happens to a weight in one step, in as few passes over memory as the rule allows.
//!
//! ```text
//! g = clip * grad                            (gradient dropout: g M / p, M ~ Bernoulli(p), p = gradient_reserve_rate)
//! Adam (Kingma and Ba, arXiv:1412.6980), decay beside it (Loshchilov and Hutter, arXiv:1711.05101), in one of two forms:
//!   m <- b1 m + (1 - b1) g          v <- b2 v + (1 - b2) g^2          c1 = 1 - b1^step,  c2 = 1 - b2^step
//!   Torch         delta = -lr (m / c1) / (sqrt(v / c2) + eps)          w <- w + (u - lr decay w)
//!   HuggingFace   delta = -lr sqrt(c2) / c1 m / (sqrt(v) + eps)        w <- w + (u - lr decay (w + u))
//! u = delta, or on a merging step, of x = delta + since_merge and a = merge_weight (Lu et al., arXiv:2405.17931):
//!   OnDARE        u = (1 - a) D - since_merge                          D = x M / p        (released; a tau_ref: see Step::share)
//!                 u = (1 - a) D + a tau_ref M' - since_merge           D = x M            (paper, Eq. 3 and 4)
//!                 rescale: D <- clamp(D sum|x| / (sum|D| + eps), -clip, clip) where sum|x| >= 1e-8
//!   OnTIES        D = x where |x| is one of the k = floor(p n) largest, else 0; all where p = 1 or k = 0
//!                 rescale: D <- D sum|x| / sum|D| where sum|x| >= 1e-8 and something was trimmed
//!                 u = (1 - a) D [sign D = e] + a tau_ref [sign tau_ref = e] - since_merge,   e = + where tau_ref + D >= 0, else -
//!                 u = (1 - a) D + a tau_ref where signs agree, else the larger of both - since_merge     (paper, Eq. 5 to 7)
//! ```
//! The whole sum is rounded once, when it is added to the weight. Of equal magnitudes at OnTIES' threshold all are kept.

mod cpu;
mod cuda;
mod prepare;
mod reference;

pub use prepare::{prepare, prepare_with};
pub use reference::update_with;

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
        match *self {
            Self::Adam | Self::Ema { .. } | Self::OnDare { rescale: false, .. } => 0,
            Self::OnDare { .. } => len,
            Self::OnTies { reserve_rate, .. } => kept(reserve_rate, len).map_or(0, |_| len),
        }
    }

    fn reserve_rate(&self) -> f64 {
        match *self {
            Self::Adam | Self::Ema { .. } => 1.0,
            Self::OnDare { reserve_rate, .. } | Self::OnTies { reserve_rate, .. } => reserve_rate,
        }
    }

    fn merge_weight(&self) -> f64 {
        match *self {
            Self::Adam | Self::Ema { .. } => 0.0,
            Self::OnDare { merge_weight, .. } | Self::OnTies { merge_weight, .. } => merge_weight,
        }
    }
}

/// How many of `len` elements OnTIES keeps, `None` where it trims nothing.
fn kept(reserve_rate: f64, len: usize) -> Option<usize> {
    let count = (reserve_rate * len as f64) as usize;
    (reserve_rate < 1.0 && count > 0).then_some(count)
}

/// A magnitude that is lost in the rescaling of nothing.
const LEAST_SUM: f64 = 1e-8;

/// What numbers are drawn for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Purpose {
    /// Which elements of the update are kept.
    Update,
    /// Which elements of `tau_ref` are kept: once, at step 0, or at every step of the paper's variant.
    TauRef,
    /// Which elements of the gradient are kept.
    Gradient,
    Rounding,
}

/// Step numbers that counters hold.
const MOST_STEPS: u64 = 1 << 30;

impl Purpose {
    /// Of the draws of elements 0 to 3, one word for each; those of `element` are `element / 4` further.
    fn counter(self, step: u64) -> u64 {
        step << 34 | (self as u64) << 32
    }

    /// Whether an element is kept.
    fn keeps(self, random: &Philox, step: u64, keep: Keep, element: usize) -> bool {
        keep.is_all() || keep.holds(random.words(self.counter(step) + element as u64 / 4)[element % 4])
    }
}

/// Random elements are kept, and scaled.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Keep {
    /// Words below it; 2^32: all.
    threshold: u64,
    scale: f64,
}

impl Keep {
    const ALL: Self = Self { threshold: 1 << 32, scale: 1.0 };

    fn new(reserve_rate: f64, divides: bool) -> Self {
        let threshold = (reserve_rate * (1u64 << 32) as f64) as u64;
        Self { threshold: threshold.min(1 << 32), scale: if divides { 1.0 / reserve_rate } else { 1.0 } }
    }

    fn is_all(&self) -> bool {
        self.threshold > u64::from(u32::MAX)
    }

    fn holds(&self, word: u32) -> bool {
        u64::from(word) < self.threshold
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

/// How an update and `tau_ref` come together in this step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Merge {
    /// The update as it is.
    Plain = 0,
    /// Random elements of both.
    Drop = 1,
    /// Where the signs agree with that of the sum before weighting.
    Before = 2,
    /// Where the signs of what is added agree, else the larger.
    After = 3,
}

/// The step's scalars, folded once in f64.
#[derive(Clone, Copy, Debug)]
struct Folded {
    /// lr / c1; in the other form lr sqrt(c2) / c1
    rate: f64,
    /// 1 / sqrt(c2); in the other form 1
    root: f64,
    /// lr decay
    decay: f64,
    decay_last: bool,
    gradient: Keep,
    merge: Merge,
    update: Keep,
    tau_ref: Keep,
    /// Weights of the update and of `tau_ref` in what is added.
    shares: [f64; 2],
    /// Whether the update is scaled to the sum of magnitudes that it had.
    rescale: bool,
    /// Bound of a rescaled update.
    bound: f64,
    /// Of the moving average; 0: none.
    ema: f64,
}

impl Step {
    /// What this step does to a weight.
    fn folded(&self) -> Folded {
        let correction = |beta: f64| 1.0 - beta.powf(self.step as f64);
        let (c1, c2) = (correction(self.adam.beta1), correction(self.adam.beta2));
        let (rate, root) = match self.adam.form {
            Form::Torch => (self.learning_rate / c1, 1.0 / c2.sqrt()),
            Form::HuggingFace { correct_bias: true } => (self.learning_rate * c2.sqrt() / c1, 1.0),
            Form::HuggingFace { correct_bias: false } => (self.learning_rate, 1.0),
        };
        let plain = Folded {
            rate,
            root,
            decay: self.learning_rate * self.weight_decay,
            decay_last: self.adam.form != Form::Torch,
            gradient: Keep::new(self.gradient_reserve_rate, true),
            merge: Merge::Plain,
            update: Keep::ALL,
            tau_ref: Keep::ALL,
            shares: [1.0, 0.0],
            rescale: false,
            bound: f64::INFINITY,
            ema: 0.0,
        };
        match self.rule {
            _ if !self.merges => plain,
            Rule::Adam => plain,
            Rule::Ema { rate } => Folded { ema: rate, ..plain },
            Rule::OnDare { reserve_rate, merge_weight, variant, rescale, clip } => {
                let released = variant == DareVariant::Released;
                Folded {
                    merge: Merge::Drop,
                    update: Keep::new(reserve_rate, released),
                    tau_ref: Keep::new(reserve_rate, false),
                    shares: [1.0 - merge_weight, if released { 0.0 } else { merge_weight }],
                    rescale,
                    bound: clip,
                    ..plain
                }
            }
            Rule::OnTies { merge_weight, consensus, rescale, .. } => Folded {
                merge: if consensus == Consensus::BeforeWeight { Merge::Before } else { Merge::After },
                shares: [1.0 - merge_weight, merge_weight],
                rescale,
                ..plain
            },
        }
    }

    /// Whether the update must be known whole before any of it can be applied.
    fn passes_twice(&self, len: usize) -> bool {
        self.merges && self.rule.scratch(len) > 0
    }
}

const OP: &str = "merged_update";

/// All views of one shape.
pub struct Args<'a, D: Device> {
    pub step: Step,
    pub grad: View<'a, D>,
    /// in place; F32, or Bf16 with a `master` or stochastic rounding. With a master it becomes `master + share tau_ref`, rounded
    pub weight: ViewMut<'a, D>,
    /// in place: the weight in F32; beside a weight of F32 only with `tau_ref`
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
        self.step.check()?;
        let (shape, step) = (self.weight.shape(), &self.step);
        let require = |what, found, expected| super::require(OP, what, found, expected);
        require("grad", self.grad.shape(), shape)?;
        require("first_moment", self.first_moment.shape(), shape)?;
        require("second_moment", self.second_moment.shape(), shape)?;
        for (what, view) in [("master", &self.master), ("since_merge", &self.since_merge), ("average", &self.average)] {
            view.as_ref().map_or(Ok(()), |view| require(what, view.shape(), shape))?;
        }
        self.tau_ref.map_or(Ok(()), |tau_ref| require("tau_ref", tau_ref.shape(), shape))?;
        self.lost.as_ref().map_or(Ok(()), |lost| require("lost", lost.shape(), [1, 2]))?;
        let len = self.weight.len();
        if step.passes_twice(len) {
            let found = self.scratch.as_ref().map_or([0, 0], ViewMut::shape);
            if found[0] * found[1] != len {
                return refused(format!("scratch has shape {found:?}, expected {len} elements (Rule::scratch)"));
            }
        }
        self.check_what_is_there()
    }

    fn check_what_is_there(&self) -> Result<()> {
        let step = &self.step;
        let (wide, has_tau_ref) = (self.weight.dtype() == DType::F32, self.tau_ref.is_some());
        match (wide, self.master.is_some()) {
            (true, true) if !has_tau_ref => {
                refused("a master beside a weight of F32, and no tau_ref between them".into())
            }
            (false, false) if step.rounding == Rounding::Nearest => {
                refused("no master beside a weight of Bf16, which nearest rounding needs".into())
            }
            (_, false) if step.share != 0.0 => {
                refused("a share of tau_ref, and no master to keep it apart from".into())
            }
            _ if step.share != 0.0 && !has_tau_ref => refused("a share of tau_ref, and no tau_ref".into()),
            _ if step.needs_tau_ref() && !has_tau_ref => {
                refused(format!("{:?} merges with a tau_ref, found none", step.rule))
            }
            _ if !step.merges && self.since_merge.is_none() => {
                refused("a step between merges, and no since_merge that remembers it".into())
            }
            _ if matches!(step.rule, Rule::Ema { .. }) != self.average.is_some() => {
                refused(format!("{:?} with average = {}", step.rule, self.average.is_some()))
            }
            _ => Ok(()),
        }
    }
}

impl Step {
    fn check(&self) -> Result<()> {
        let share = |what: &str, x: f64, least: f64| match x >= least && x <= 1.0 {
            true => Ok(()),
            false => refused(format!("{what} is {x}, expected a share of at most 1, more than 0 of what is kept")),
        };
        share("reserve_rate", self.rule.reserve_rate(), f64::MIN_POSITIVE)?;
        share("gradient_reserve_rate", self.gradient_reserve_rate, f64::MIN_POSITIVE)?;
        share("merge_weight", self.rule.merge_weight(), 0.0)?;
        match self.rule {
            Rule::Ema { rate } => share("the average's rate", rate, 0.0)?,
            Rule::OnDare { clip, .. } if clip.is_nan() || clip <= 0.0 => {
                return refused(format!("clip is {clip}, expected more than 0"));
            }
            _ => {}
        }
        match self.step {
            1..MOST_STEPS => Ok(()),
            step => refused(format!("step {step}, expected 1 to {MOST_STEPS}")),
        }
    }

    /// The authors' code elects signs with `tau_ref` even where it does not merge.
    fn needs_tau_ref(&self) -> bool {
        self.merges && (matches!(self.rule, Rule::OnTies { .. }) || self.rule.merge_weight() > 0.0)
    }
}

fn refused(why: String) -> Result<()> {
    Err(Error::op(OP, why))
}

impl MergedUpdate for Dry {
    fn merged_update(&self, a: Args<Self>) -> Result<()> {
        a.check()
    }
}
