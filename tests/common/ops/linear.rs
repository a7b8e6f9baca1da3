//! See src/ops/linear.

use cuvee::Result;
use cuvee::device::DType;
use cuvee::ops::{Backend, linear};

use super::Visitor;
use crate::common::case::{Case, Slot, Spec};

/// Rows, inputs, outputs: every awkward size at least once.
pub const SHAPES: [[usize; 3]; 7] =
    [[1, 31, 123], [3, 123, 507], [47, 31, 31], [252, 123, 123], [3, 31, 8003], [13, 507, 33], [47, 300, 1100]];

pub struct Linear {
    pub shape: [usize; 3],
    pub bias: bool,
    pub residual: bool,
    /// y stays f32 whatever x is kept in: what sampling reads.
    pub logits: bool,
}

impl Linear {
    pub fn full(shape: [usize; 3]) -> Self {
        Self { shape, bias: true, residual: true, logits: false }
    }
}

impl Case for Linear {
    fn op(&self) -> &'static str {
        "linear"
    }

    fn specs(&self) -> Vec<Spec> {
        let [rows, inputs, outputs] = self.shape;
        let y = Spec::set("y", [rows, outputs]).per_row();
        vec![
            Spec::input("x", [rows, inputs]).per_row(),
            Spec::input("weight", [outputs, inputs]),
            Spec::input("bias", [1, outputs]),
            Spec::input("residual", [rows, outputs]).per_row(),
            if self.logits { y.always_f32() } else { y },
        ]
    }

    fn run<D: Backend>(&self, device: &D, t: &mut [Slot<D>]) -> Result<()> {
        tensors!(t => x, weight, bias, residual, y);
        device.linear(linear::Forward {
            x: x.view(),
            weight: weight.view(),
            bias: self.bias.then(|| bias.view()),
            residual: self.residual.then(|| residual.view()),
            y: y.view_mut(),
        })
    }

    fn naive(&self, _: &[Spec], t: &mut [Vec<f32>]) {
        let [rows, inputs, outputs] = self.shape;
        tensors!(t => x, weight, bias, residual, y);
        for (r, o) in (0..rows).flat_map(|r| (0..outputs).map(move |o| (r, o))) {
            let at = r * outputs + o;
            (0..inputs).for_each(|i| y[at] += x[r * inputs + i] * weight[o * inputs + i]);
            y[at] += if self.bias { bias[o] } else { 0.0 };
            y[at] += if self.residual { residual[at] } else { 0.0 };
        }
    }
}

pub struct LinearBackward {
    pub shape: [usize; 3],
    pub wanted: [bool; 3],
}

impl LinearBackward {
    pub fn full(shape: [usize; 3]) -> Self {
        Self { shape, wanted: [true; 3] }
    }
}

impl Case for LinearBackward {
    fn op(&self) -> &'static str {
        "linear_backward"
    }

    fn specs(&self) -> Vec<Spec> {
        let [rows, inputs, outputs] = self.shape;
        vec![
            Spec::input("dy", [rows, outputs]).per_row(),
            Spec::input("x", [rows, inputs]).per_row(),
            Spec::input("weight", [outputs, inputs]),
            Spec::add("dx", [rows, inputs]).per_row(),
            Spec::add("dweight", [outputs, inputs]).always_f32(),
            Spec::add("dbias", [1, outputs]).always_f32(),
        ]
    }

    fn run<D: Backend>(&self, device: &D, t: &mut [Slot<D>]) -> Result<()> {
        tensors!(t => dy, x, weight, dx, dweight, dbias);
        device.linear_backward(linear::Backward {
            dy: dy.view(),
            x: x.view(),
            weight: weight.view(),
            dx: dx.wanted(self.wanted[0]),
            dweight: dweight.wanted(self.wanted[1]),
            dbias: dbias.wanted(self.wanted[2]),
        })
    }

    fn naive(&self, _: &[Spec], t: &mut [Vec<f32>]) {
        let [rows, inputs, outputs] = self.shape;
        tensors!(t => dy, x, weight, dx, dweight, dbias);
        for (r, o) in (0..rows).flat_map(|r| (0..outputs).map(move |o| (r, o))) {
            let dy = dy[r * outputs + o];
            dbias[o] += dy;
            for i in 0..inputs {
                dx[r * inputs + i] += dy * weight[o * inputs + i];
                dweight[o * inputs + i] += dy * x[r * inputs + i];
            }
        }
    }
}

/// Shapes that go through more than one tile in every direction, with ragged ends.
const PROMISES: [[usize; 3]; 2] = [[47, 123, 507], [3, 300, 1100]];

pub fn forward<V: Visitor>(v: &mut V) {
    SHAPES.iter().for_each(|shape| v.close(&Linear::full(*shape)));
    for (bias, residual) in [(false, false), (true, false), (false, true)] {
        v.close(&Linear { bias, residual, ..Linear::full([3, 31, 123]) });
    }
    if v.storage() != DType::F32 {
        v.close(&Linear { bias: false, residual: false, logits: true, ..Linear::full([3, 123, 507]) });
    }
    for shape in PROMISES {
        v.repeatable(&Linear::full(shape));
        v.rows(&Linear::full(shape));
    }
    // Few rows, many threads' worth of columns: the shape of decoding.
    v.rows(&Linear::full([252, 123, 123]));
    v.nan(&Linear::full([14, 31, 35]));
    v.shapes(&Linear::full([3, 5, 4]));
}

pub fn backward<V: Visitor>(v: &mut V) {
    SHAPES.iter().for_each(|shape| v.close(&LinearBackward::full(*shape)));
    for shape in PROMISES {
        v.repeatable(&LinearBackward::full(shape));
        v.rows(&LinearBackward::full(shape));
    }
    let full = LinearBackward::full([47, 31, 123]);
    v.twice(&full);
    for wanted in [[false; 3], [true, false, false], [false, true, false], [false, false, true]] {
        v.unwanted(&full, &LinearBackward { wanted, ..full }, &["dx", "dweight", "dbias"], &wanted);
    }
    v.nan(&LinearBackward::full([14, 31, 35]));
    v.shapes(&LinearBackward::full([3, 5, 4]));
}
