//! See src/ops/sum_squares, src/ops/merged_update and src/ops/lerp.

use cuvee::Result;
use cuvee::device::{DType, Philox};
use cuvee::ops::merged_update::{self, Adam, Form, Rounding, Rule, Step};
use cuvee::ops::{Backend, lerp, sum_squares};

use super::Visitor;
use crate::common::case::{Case, Slot, Spec, run};

pub struct SumSquares(pub [usize; 2]);

impl Case for SumSquares {
    fn op(&self) -> &'static str {
        "sum_squares"
    }

    fn specs(&self) -> Vec<Spec> {
        vec![Spec::input("x", self.0).always_f32(), Spec::set("sum", [1, 1]).always_f32()]
    }

    fn run<D: Backend>(&self, device: &D, t: &mut [Slot<D>]) -> Result<()> {
        tensors!(t => x, sum);
        device.sum_squares(sum_squares::Args { x: x.view(), sum: sum.view_mut() })
    }

    fn naive(&self, _: &[Spec], t: &mut [Vec<f32>]) {
        tensors!(t => x, sum);
        sum[0] = x.iter().fold(0.0, |sum, x| sum + x * x);
    }
}

pub struct Update {
    pub shape: [usize; 2],
    pub step: Step,
    /// The weight is what rounding leaves of an f32 master.
    pub master: bool,
}

impl Update {
    /// Of an f32 weight, at a rate so large that the update, not the weight, is what is compared.
    pub fn at(shape: [usize; 2], step: u64) -> Self {
        let step = Step {
            adam: Adam { beta1: 0.9, beta2: 0.999, eps: 1e-8, form: Form::Torch },
            rule: Rule::Adam,
            step,
            learning_rate: 0.5,
            weight_decay: 0.1,
            clip: 0.3,
            gradient_reserve_rate: 1.0,
            merges: true,
            share: 0.0,
            rounding: Rounding::Nearest,
            random: Philox::new(0, 0),
        };
        Self { shape, step, master: false }
    }
}

impl Case for Update {
    fn op(&self) -> &'static str {
        "merged_update"
    }

    fn specs(&self) -> Vec<Spec> {
        let states = [
            Spec::input("grad", self.shape),
            Spec::in_place("weight", self.shape),
            Spec::in_place("first_moment", self.shape),
            Spec::in_place("second_moment", self.shape).map(|x| x * x + 0.1),
        ];
        let rounding = self.master.then(|| Spec::set("rounded", self.shape));
        states.map(Spec::always_f32).into_iter().chain(rounding).map(Spec::per_row).collect()
    }

    fn run<D: Backend>(&self, device: &D, t: &mut [Slot<D>]) -> Result<()> {
        let [grad, weight, first_moment, second_moment, rounded @ ..] = t else { panic!("four tensors") };
        let (weight, master) = match rounded {
            [rounded] => (rounded.view_mut(), Some(weight.view_mut())),
            _ => (weight.view_mut(), None),
        };
        device.merged_update(merged_update::Args {
            step: self.step,
            grad: grad.view(),
            weight,
            master,
            first_moment: first_moment.view_mut(),
            second_moment: second_moment.view_mut(),
            since_merge: None,
            average: None,
            tau_ref: None,
            scratch: None,
            lost: None,
        })
    }

    fn naive(&self, _: &[Spec], t: &mut [Vec<f32>]) {
        let [grad, weight, m, v, rounded @ ..] = t else { panic!("four tensors") };
        let Adam { beta1, beta2, eps, .. } = self.step.adam;
        let (rate, decay) = (self.step.learning_rate as f32, self.step.weight_decay as f32);
        let correction = |beta: f64| (1.0 - beta.powf(self.step.step as f64)) as f32;
        for i in 0..grad.len() {
            let g = self.step.clip as f32 * grad[i];
            weight[i] *= 1.0 - rate * decay;
            m[i] = beta1 as f32 * m[i] + (1.0 - beta1) as f32 * g;
            v[i] = beta2 as f32 * v[i] + (1.0 - beta2) as f32 * g * g;
            weight[i] -= rate * (m[i] / correction(beta1)) / ((v[i] / correction(beta2)).sqrt() + eps as f32);
        }
        rounded.iter_mut().for_each(|rounded| rounded.clone_from(weight));
    }
}

pub struct Lerp {
    pub shape: [usize; 2],
    pub share: f64,
    /// The tensor is what rounding leaves of an f32 master.
    pub master: bool,
}

impl Case for Lerp {
    fn op(&self) -> &'static str {
        "lerp"
    }

    fn specs(&self) -> Vec<Spec> {
        let tensors = [Spec::input("x", self.shape), Spec::in_place("y", self.shape)];
        let rounding = self.master.then(|| Spec::set("rounded", self.shape));
        tensors.map(Spec::always_f32).into_iter().chain(rounding).map(Spec::per_row).collect()
    }

    fn run<D: Backend>(&self, device: &D, t: &mut [Slot<D>]) -> Result<()> {
        let [x, y, rounded @ ..] = t else { panic!("two tensors") };
        let (y, master) = match rounded {
            [rounded] => (rounded.view_mut(), Some(y.view_mut())),
            _ => (y.view_mut(), None),
        };
        device.lerp(lerp::Args { share: self.share, x: x.view(), y, master })
    }

    fn naive(&self, _: &[Spec], t: &mut [Vec<f32>]) {
        let [x, y, rounded @ ..] = t else { panic!("two tensors") };
        let share = self.share as f32;
        y.iter_mut().zip(&*x).for_each(|(y, x)| *y = (1.0 - share) * *y + share * x);
        rounded.iter_mut().for_each(|rounded| rounded.clone_from(y));
    }
}

pub fn lerp<V: Visitor>(v: &mut V) {
    let kinds: &[bool] = if v.storage() == DType::F32 { &[false] } else { &[false, true] };
    for master in kinds.iter().copied() {
        for (shape, share) in [([1, 31], 1.0), ([3, 123], 0.6), ([47, 507], 1e-3)] {
            v.close(&Lerp { shape, share, master });
        }
        let case = Lerp { shape: [47, 123], share: 0.3, master };
        v.repeatable(&case);
        v.rows(&case);
        v.nan(&case);
        v.shapes(&Lerp { shape: [3, 5], ..case });
    }
}

pub fn sum_squares<V: Visitor>(v: &mut V) {
    // The last is longer than one task of one thread.
    for shape in [[1, 1], [1, 31], [47, 123], [3, 8003], [1, 300_001]] {
        v.close(&SumSquares(shape));
        v.repeatable(&SumSquares(shape));
    }
    v.nan(&SumSquares([47, 123]));
}

/// What no f32 holds is infinite, not NaN.
pub fn sum_squares_overflow<D: Backend>(device: &D) {
    let case = SumSquares([3, 5]);
    for value in [f64::INFINITY, f64::NEG_INFINITY, 2e19] {
        let mut specs = case.specs();
        specs[0].values[14] = f64::from(value as f32);
        assert_eq!(run(device, &case, &specs)[1], [f64::INFINITY], "{value}");
    }
}

pub fn merged_update<V: Visitor>(v: &mut V) {
    let kinds: &[bool] = if v.storage() == DType::F32 { &[false] } else { &[false, true] };
    for master in kinds.iter().copied() {
        let at = |shape, step| Update { master, ..Update::at(shape, step) };
        for (shape, step) in [([1, 31], 1), ([3, 123], 2), ([47, 507], 10), ([252, 123], 100_000)] {
            v.close(&at(shape, step));
        }
        v.repeatable(&at([252, 123], 3));
        v.rows(&at([252, 123], 3));
        v.nan(&at([3, 31], 3));
        v.shapes(&at([3, 5], 3));
    }
}
