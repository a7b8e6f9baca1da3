//! Every op: the CPU against the f64 oracle on awkward shapes, the oracle's backward against central differences
//! of its forward, and what the ops promise besides: `=` and `+=`, unwanted gradients, equal bits for any threads,
//! instruction set and neighbouring rows, NaN and wrong shapes that do not pass silently.

use std::collections::BTreeSet;

use cuvee::Result;
use cuvee::device::{Cpu, Dry, Philox, Reference};
use cuvee::ops::attention::{self, NO_PARENT, Segment};
use cuvee::ops::gelu::{self, Curve};
use cuvee::ops::merged_update::{self, Rule, Step};
use cuvee::ops::rope::Direction;
use cuvee::ops::{Backend, layer_norm, linear, logprob_head, rms_norm, rope, rows, sum_squares, swiglu};

use crate::common::{
    Case, Slot, Spec, assert_close, assert_gradient, compare, cpu, nan_surfaces, normals, output_of, run,
    same_for_some_rows, same_on_every_machine, twice_is_double, unwanted_stay, wrong_shapes_are_refused,
};

// ---- helpers --------------------------------------------------------------------------------------------------

/// The tensors of a case by name; fails when the case and its specs drifted apart.
macro_rules! tensors {
    ($t:ident => $($name:ident),+) => {
        let [$($name),+] = $t else { panic!("another number of tensors than the case has specs") };
    };
}

fn put(specs: &mut [Spec], name: &str, values: &[f64]) {
    let spec = specs.iter_mut().find(|s| s.name == name).unwrap_or_else(|| panic!("no tensor is called {name}"));
    assert_eq!(spec.values.len(), values.len(), "{name}");
    spec.values = values.to_vec();
}

fn zero(specs: &mut [Spec], names: &[&str]) {
    names.iter().for_each(|name| {
        let len = output(specs, name).len();
        put(specs, name, &vec![0.0; len]);
    });
}

/// First contents of the tensor called `name`.
fn output(specs: &[Spec], name: &str) -> Vec<f64> {
    specs.iter().find(|s| s.name == name).unwrap_or_else(|| panic!("no tensor is called {name}")).values.clone()
}

/// `gradient` against central differences of `upstream . result` of the oracle's forward, by `input`.
fn assert_backward<C: Case>(case: &C, specs: &[Spec], input: &str, result: &str, upstream: &[f64], gradient: &[f64]) {
    let mut moved = specs.to_vec();
    assert_gradient(&format!("{} by {input}", case.op()), &output(specs, input), gradient, |x| {
        put(&mut moved, input, x);
        let values = run(&Reference, case, &moved);
        output_of(specs, &values, result).iter().zip(upstream).map(|(y, dy)| y * dy).sum()
    });
}

fn below(name: &str, len: usize, bound: usize) -> Vec<u32> {
    let random = Philox::named(7, name);
    (0..len).map(|i| (random.u64(i as u64) % bound as u64) as u32).collect()
}

// ---- linear ---------------------------------------------------------------------------------------------------

/// Rows, inputs, outputs: every awkward size at least once.
const LINEAR_SHAPES: [[usize; 3]; 7] =
    [[1, 31, 123], [3, 123, 507], [47, 31, 31], [252, 123, 123], [3, 31, 8003], [13, 507, 33], [47, 300, 1100]];

struct Linear {
    shape: [usize; 3],
    bias: bool,
    residual: bool,
}

impl Linear {
    fn full(shape: [usize; 3]) -> Self {
        Self { shape, bias: true, residual: true }
    }
}

impl Case for Linear {
    fn op(&self) -> &'static str {
        "linear"
    }

    fn specs(&self) -> Vec<Spec> {
        let [rows, inputs, outputs] = self.shape;
        vec![
            Spec::input("x", [rows, inputs]).per_row(),
            Spec::input("weight", [outputs, inputs]),
            Spec::input("bias", [1, outputs]),
            Spec::input("residual", [rows, outputs]).per_row(),
            Spec::set("y", [rows, outputs]).per_row(),
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

struct LinearBackward {
    shape: [usize; 3],
    wanted: [bool; 3],
}

impl LinearBackward {
    fn full(shape: [usize; 3]) -> Self {
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
            Spec::add("dweight", [outputs, inputs]),
            Spec::add("dbias", [1, outputs]),
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

#[test]
fn linear_is_close_to_the_oracle() {
    for shape in LINEAR_SHAPES {
        compare(&Linear::full(shape));
        compare(&LinearBackward::full(shape));
    }
    for (bias, residual) in [(false, false), (true, false), (false, true)] {
        compare(&Linear { shape: [3, 31, 123], bias, residual });
    }
}

#[test]
fn linear_backward_is_the_derivative() {
    let shape = [3, 5, 4];
    let (forward, backward) = (Linear::full(shape), LinearBackward::full(shape));
    let (specs, mut back) = (forward.specs(), backward.specs());
    zero(&mut back, &["dx", "dweight", "dbias"]);
    let gradients = run(&Reference, &backward, &back);
    for (input, gradient) in [("x", "dx"), ("weight", "dweight"), ("bias", "dbias")] {
        let gradient = output_of(&back, &gradients, gradient);
        assert_backward(&forward, &specs, input, "y", &output(&back, "dy"), gradient);
    }
    // The residual's gradient is dy itself.
    assert_backward(&forward, &specs, "residual", "y", &output(&back, "dy"), &output(&back, "dy"));
}

#[test]
fn linear_keeps_its_promises() {
    for shape in [[47, 123, 507], [3, 300, 1100]] {
        same_on_every_machine(&Linear::full(shape));
        same_on_every_machine(&LinearBackward::full(shape));
        same_for_some_rows(&Linear::full(shape));
        same_for_some_rows(&LinearBackward::full(shape));
    }
    // Few rows, many threads' worth of columns: the shape of decoding.
    same_for_some_rows(&Linear::full([252, 123, 123]));
    let full = LinearBackward::full([47, 31, 123]);
    twice_is_double(&full);
    for wanted in [[false; 3], [true, false, false], [false, true, false], [false, false, true]] {
        let some = LinearBackward { wanted, ..LinearBackward::full(full.shape) };
        unwanted_stay(&full, &some, &["dx", "dweight", "dbias"], &wanted);
    }
    nan_surfaces(&Linear::full([14, 31, 35]));
    nan_surfaces(&LinearBackward::full([14, 31, 35]));
    wrong_shapes_are_refused(&Linear::full([3, 5, 4]));
    wrong_shapes_are_refused(&LinearBackward::full([3, 5, 4]));
}

// ---- rms_norm -------------------------------------------------------------------------------------------------

const NORM_SHAPES: [[usize; 2]; 5] = [[1, 31], [3, 123], [47, 31], [252, 123], [3, 5]];
const EPS: f32 = 1e-2;

struct RmsNorm([usize; 2]);

impl Case for RmsNorm {
    fn op(&self) -> &'static str {
        "rms_norm"
    }

    fn specs(&self) -> Vec<Spec> {
        let [rows, hidden] = self.0;
        vec![
            Spec::input("x", [rows, hidden]).per_row(),
            Spec::input("weight", [1, hidden]),
            Spec::set("y", [rows, hidden]).per_row(),
            Spec::set("rstd", [rows, 1]).per_row(),
        ]
    }

    fn run<D: Backend>(&self, device: &D, t: &mut [Slot<D>]) -> Result<()> {
        tensors!(t => x, weight, y, rstd);
        let (x, weight) = (x.view(), weight.view());
        device.rms_norm(rms_norm::Forward { x, weight, eps: EPS, y: y.view_mut(), rstd: rstd.view_mut() })
    }

    fn naive(&self, _: &[Spec], t: &mut [Vec<f32>]) {
        let [rows, hidden] = self.0;
        tensors!(t => x, weight, y, rstd);
        for r in 0..rows {
            let squares = (0..hidden).fold(0.0, |sum, j| sum + x[r * hidden + j] * x[r * hidden + j]);
            rstd[r] = 1.0 / (squares / hidden as f32 + EPS).sqrt();
            (0..hidden).for_each(|j| y[r * hidden + j] = x[r * hidden + j] * rstd[r] * weight[j]);
        }
    }
}

struct RmsNormBackward {
    shape: [usize; 2],
    wanted: bool,
}

impl RmsNormBackward {
    fn full(shape: [usize; 2]) -> Self {
        Self { shape, wanted: true }
    }
}

impl Case for RmsNormBackward {
    fn op(&self) -> &'static str {
        "rms_norm_backward"
    }

    fn specs(&self) -> Vec<Spec> {
        let [rows, hidden] = self.shape;
        vec![
            Spec::input("dy", [rows, hidden]).per_row(),
            Spec::input("x", [rows, hidden]).per_row(),
            Spec::input("weight", [1, hidden]),
            Spec::input("rstd", [rows, 1]).map(|x| 1.0 / (x * x + 0.5)).per_row(),
            Spec::add("dx", [rows, hidden]).per_row(),
            Spec::add("dweight", [1, hidden]),
        ]
    }

    fn run<D: Backend>(&self, device: &D, t: &mut [Slot<D>]) -> Result<()> {
        tensors!(t => dy, x, weight, rstd, dx, dweight);
        device.rms_norm_backward(rms_norm::Backward {
            dy: dy.view(),
            x: x.view(),
            weight: weight.view(),
            rstd: rstd.view(),
            dx: dx.view_mut(),
            dweight: dweight.wanted(self.wanted),
        })
    }

    fn naive(&self, _: &[Spec], t: &mut [Vec<f32>]) {
        let [rows, hidden] = self.shape;
        tensors!(t => dy, x, weight, rstd, dx, dweight);
        for (r, rstd) in (0..rows).zip(rstd) {
            let at = |j: usize| r * hidden + j;
            let mean = (0..hidden).fold(0.0, |sum, j| sum + dy[at(j)] * weight[j] * x[at(j)]) / hidden as f32;
            for j in 0..hidden {
                dx[at(j)] += *rstd * (dy[at(j)] * weight[j] - x[at(j)] * *rstd * *rstd * mean);
                dweight[j] += dy[at(j)] * x[at(j)] * *rstd;
            }
        }
    }
}

#[test]
fn rms_norm_is_close_to_the_oracle() {
    for shape in NORM_SHAPES {
        compare(&RmsNorm(shape));
        compare(&RmsNormBackward::full(shape));
    }
}

#[test]
fn rms_norm_backward_is_the_derivative() {
    let (forward, backward) = (RmsNorm([3, 7]), RmsNormBackward::full([3, 7]));
    let (specs, mut back) = (forward.specs(), backward.specs());
    let values = run(&Reference, &forward, &specs);
    put(&mut back, "rstd", output_of(&specs, &values, "rstd"));
    put(&mut back, "x", &output(&specs, "x"));
    zero(&mut back, &["dx", "dweight"]);
    let gradients = run(&Reference, &backward, &back);
    for (input, gradient) in [("x", "dx"), ("weight", "dweight")] {
        let gradient = output_of(&back, &gradients, gradient);
        assert_backward(&forward, &specs, input, "y", &output(&back, "dy"), gradient);
    }
}

#[test]
fn rms_norm_keeps_its_promises() {
    for shape in [[47, 123], [252, 31]] {
        same_on_every_machine(&RmsNorm(shape));
        same_on_every_machine(&RmsNormBackward::full(shape));
        same_for_some_rows(&RmsNorm(shape));
        same_for_some_rows(&RmsNormBackward::full(shape));
        twice_is_double(&RmsNormBackward::full(shape));
    }
    let full = RmsNormBackward::full([47, 31]);
    unwanted_stay(&full, &RmsNormBackward { wanted: false, ..full }, &["dweight"], &[false]);
    nan_surfaces(&RmsNorm([5, 31]));
    nan_surfaces(&RmsNormBackward::full([5, 31]));
    wrong_shapes_are_refused(&RmsNorm([3, 5]));
    wrong_shapes_are_refused(&RmsNormBackward::full([3, 5]));
}

#[test]
fn rms_norm_of_a_zero_row_is_finite() {
    let mut specs = RmsNorm([3, 31]).specs();
    zero(&mut specs, &["x"]);
    let values = run(&cpu(), &RmsNorm([3, 31]), &specs);
    assert!(output_of(&specs, &values, "y").iter().all(|y| *y == 0.0));
    assert!(output_of(&specs, &values, "rstd").iter().all(|r| (r - 10.0).abs() < 1e-5));
}

// ---- swiglu ---------------------------------------------------------------------------------------------------

struct SwiGlu([usize; 2]);

impl Case for SwiGlu {
    fn op(&self) -> &'static str {
        "swiglu"
    }

    fn specs(&self) -> Vec<Spec> {
        vec![
            Spec::input("gate", self.0).map(|x| 3.0 * x).per_row(),
            Spec::input("up", self.0).per_row(),
            Spec::set("y", self.0).per_row(),
        ]
    }

    fn run<D: Backend>(&self, device: &D, t: &mut [Slot<D>]) -> Result<()> {
        tensors!(t => gate, up, y);
        device.swiglu(swiglu::Forward { gate: gate.view(), up: up.view(), y: y.view_mut() })
    }

    fn naive(&self, _: &[Spec], t: &mut [Vec<f32>]) {
        tensors!(t => gate, up, y);
        (0..y.len()).for_each(|i| y[i] = gate[i] * (1.0 / (1.0 + (-gate[i]).exp())) * up[i]);
    }
}

struct SwiGluBackward([usize; 2]);

impl Case for SwiGluBackward {
    fn op(&self) -> &'static str {
        "swiglu_backward"
    }

    fn specs(&self) -> Vec<Spec> {
        vec![
            Spec::input("dy", self.0).per_row(),
            Spec::input("gate", self.0).map(|x| 3.0 * x).per_row(),
            Spec::input("up", self.0).per_row(),
            Spec::set("dgate", self.0).per_row(),
            Spec::set("dup", self.0).per_row(),
        ]
    }

    fn run<D: Backend>(&self, device: &D, t: &mut [Slot<D>]) -> Result<()> {
        tensors!(t => dy, gate, up, dgate, dup);
        let (dy, gate, up) = (dy.view(), gate.view(), up.view());
        device.swiglu_backward(swiglu::Backward { dy, gate, up, dgate: dgate.view_mut(), dup: dup.view_mut() })
    }

    fn naive(&self, _: &[Spec], t: &mut [Vec<f32>]) {
        tensors!(t => dy, gate, up, dgate, dup);
        for i in 0..dy.len() {
            let (g, s) = (gate[i], 1.0 / (1.0 + (-gate[i]).exp()));
            dgate[i] = dy[i] * up[i] * (s + g * s * (1.0 - s));
            dup[i] = dy[i] * g * s;
        }
    }
}

#[test]
fn swiglu_is_close_to_the_oracle() {
    for shape in [[1, 31], [3, 123], [47, 507], [252, 123]] {
        compare(&SwiGlu(shape));
        compare(&SwiGluBackward(shape));
    }
}

#[test]
fn swiglu_backward_is_the_derivative() {
    let (forward, backward) = (SwiGlu([3, 7]), SwiGluBackward([3, 7]));
    let (specs, back) = (forward.specs(), backward.specs());
    let gradients = run(&Reference, &backward, &back);
    for (input, gradient) in [("gate", "dgate"), ("up", "dup")] {
        let gradient = output_of(&back, &gradients, gradient);
        assert_backward(&forward, &specs, input, "y", &output(&back, "dy"), gradient);
    }
}

#[test]
fn swiglu_keeps_its_promises() {
    same_on_every_machine(&SwiGlu([252, 123]));
    same_on_every_machine(&SwiGluBackward([252, 123]));
    same_for_some_rows(&SwiGlu([252, 123]));
    same_for_some_rows(&SwiGluBackward([252, 123]));
    twice_is_double(&SwiGluBackward([47, 31]));
    nan_surfaces(&SwiGlu([3, 31]));
    nan_surfaces(&SwiGluBackward([3, 31]));
    wrong_shapes_are_refused(&SwiGlu([3, 5]));
    wrong_shapes_are_refused(&SwiGluBackward([3, 5]));
}

#[test]
fn swiglu_saturates_without_nan() {
    let shape = [1, 8];
    let gates: [f64; 8] = [-1e4, -100.0, -88.8, -87.0, 87.0, 88.8, 100.0, 1e4];
    let mut specs = SwiGlu(shape).specs();
    put(&mut specs, "gate", &gates.map(|g| f64::from(g as f32)));
    put(&mut specs, "up", &[1.0; 8]);
    let values = run(&cpu(), &SwiGlu(shape), &specs);
    for (g, y) in gates.iter().zip(output_of(&specs, &values, "y")) {
        assert!((y - g.max(0.0)).abs() <= 1e-5 * g.abs(), "silu({g}) = {y}");
    }
    let mut specs = SwiGluBackward(shape).specs();
    put(&mut specs, "gate", &gates.map(|g| f64::from(g as f32)));
    assert!(run(&cpu(), &SwiGluBackward(shape), &specs).iter().flatten().all(|x| x.is_finite()));
}

// ---- layer_norm -----------------------------------------------------------------------------------------------

struct LayerNorm([usize; 2]);

impl Case for LayerNorm {
    fn op(&self) -> &'static str {
        "layer_norm"
    }

    fn specs(&self) -> Vec<Spec> {
        let [rows, hidden] = self.0;
        vec![
            Spec::input("x", [rows, hidden]).map(|x| x + 2.0).per_row(),
            Spec::input("weight", [1, hidden]),
            Spec::input("bias", [1, hidden]),
            Spec::set("y", [rows, hidden]).per_row(),
            Spec::set("stats", [rows, 2]).per_row(),
        ]
    }

    fn run<D: Backend>(&self, device: &D, t: &mut [Slot<D>]) -> Result<()> {
        tensors!(t => x, weight, bias, y, stats);
        let (x, weight, bias) = (x.view(), weight.view(), bias.view());
        device.layer_norm(layer_norm::Forward { x, weight, bias, eps: EPS, y: y.view_mut(), stats: stats.view_mut() })
    }

    fn naive(&self, _: &[Spec], t: &mut [Vec<f32>]) {
        let [rows, hidden] = self.0;
        tensors!(t => x, weight, bias, y, stats);
        for r in 0..rows {
            let x = &x[r * hidden..][..hidden];
            let mean = x.iter().fold(0.0, |sum, x| sum + x) / hidden as f32;
            let squares = x.iter().fold(0.0, |sum, x| sum + (x - mean) * (x - mean));
            let rstd = 1.0 / (squares / hidden as f32 + EPS).sqrt();
            stats[2 * r..][..2].copy_from_slice(&[mean, rstd]);
            (0..hidden).for_each(|j| y[r * hidden + j] = (x[j] - mean) * rstd * weight[j] + bias[j]);
        }
    }
}

struct LayerNormBackward {
    shape: [usize; 2],
    wanted: [bool; 2],
}

impl LayerNormBackward {
    fn full(shape: [usize; 2]) -> Self {
        Self { shape, wanted: [true; 2] }
    }
}

impl Case for LayerNormBackward {
    fn op(&self) -> &'static str {
        "layer_norm_backward"
    }

    fn specs(&self) -> Vec<Spec> {
        let [rows, hidden] = self.shape;
        let stats: Vec<f64> = normals("stats", 2 * rows)
            .chunks(2)
            .flat_map(|pair| [2.0 + 0.1 * pair[0], 1.0 / (pair[1] * pair[1] + 0.5)])
            .collect();
        vec![
            Spec::input("dy", [rows, hidden]).per_row(),
            Spec::input("x", [rows, hidden]).map(|x| x + 2.0).per_row(),
            Spec::input("weight", [1, hidden]),
            Spec::input("stats", [rows, 2]).with(&stats).per_row(),
            Spec::add("dx", [rows, hidden]).per_row(),
            Spec::add("dweight", [1, hidden]),
            Spec::add("dbias", [1, hidden]),
        ]
    }

    fn run<D: Backend>(&self, device: &D, t: &mut [Slot<D>]) -> Result<()> {
        tensors!(t => dy, x, weight, stats, dx, dweight, dbias);
        device.layer_norm_backward(layer_norm::Backward {
            dy: dy.view(),
            x: x.view(),
            weight: weight.view(),
            stats: stats.view(),
            dx: dx.view_mut(),
            dweight: dweight.wanted(self.wanted[0]),
            dbias: dbias.wanted(self.wanted[1]),
        })
    }

    fn naive(&self, _: &[Spec], t: &mut [Vec<f32>]) {
        let [rows, hidden] = self.shape;
        tensors!(t => dy, x, weight, stats, dx, dweight, dbias);
        for r in 0..rows {
            let (mean, rstd, at) = (stats[2 * r], stats[2 * r + 1], |j: usize| r * hidden + j);
            let sum = |f: &dyn Fn(usize) -> f32| (0..hidden).fold(0.0, |sum, j| sum + f(j)) / hidden as f32;
            let n = |j: usize| (x[at(j)] - mean) * rstd;
            let (mean_d, mean_dn) = (sum(&|j| dy[at(j)] * weight[j]), sum(&|j| dy[at(j)] * weight[j] * n(j)));
            for j in 0..hidden {
                dx[at(j)] += rstd * (dy[at(j)] * weight[j] - mean_d - n(j) * mean_dn);
                dweight[j] += dy[at(j)] * n(j);
                dbias[j] += dy[at(j)];
            }
        }
    }
}

#[test]
fn layer_norm_is_close_to_the_oracle() {
    for shape in NORM_SHAPES {
        compare(&LayerNorm(shape));
        compare(&LayerNormBackward::full(shape));
    }
}

#[test]
fn layer_norm_backward_is_the_derivative() {
    let (forward, backward) = (LayerNorm([3, 7]), LayerNormBackward::full([3, 7]));
    let (specs, mut back) = (forward.specs(), backward.specs());
    let values = run(&Reference, &forward, &specs);
    put(&mut back, "stats", output_of(&specs, &values, "stats"));
    zero(&mut back, &["dx", "dweight", "dbias"]);
    let gradients = run(&Reference, &backward, &back);
    for (input, gradient) in [("x", "dx"), ("weight", "dweight"), ("bias", "dbias")] {
        let gradient = output_of(&back, &gradients, gradient);
        assert_backward(&forward, &specs, input, "y", &output(&back, "dy"), gradient);
    }
}

#[test]
fn layer_norm_keeps_its_promises() {
    for shape in [[47, 123], [252, 31]] {
        same_on_every_machine(&LayerNorm(shape));
        same_on_every_machine(&LayerNormBackward::full(shape));
        same_for_some_rows(&LayerNorm(shape));
        same_for_some_rows(&LayerNormBackward::full(shape));
        twice_is_double(&LayerNormBackward::full(shape));
    }
    let full = LayerNormBackward::full([47, 31]);
    for wanted in [[false, false], [true, false], [false, true]] {
        let some = LayerNormBackward { wanted, ..LayerNormBackward::full([47, 31]) };
        unwanted_stay(&full, &some, &["dweight", "dbias"], &wanted);
    }
    nan_surfaces(&LayerNorm([5, 31]));
    nan_surfaces(&LayerNormBackward::full([5, 31]));
    wrong_shapes_are_refused(&LayerNorm([3, 5]));
    wrong_shapes_are_refused(&LayerNormBackward::full([3, 5]));
}

/// mean(x^2) - mean^2 would have no digit left here.
#[test]
fn layer_norm_bears_a_large_mean_and_a_constant_row() {
    let case = LayerNorm([3, 31]);
    let mut specs = case.specs();
    let shifted: Vec<f64> = output(&specs, "x").iter().map(|x| f64::from((x + 3e4) as f32)).collect();
    put(&mut specs, "x", &shifted);
    let [ours, oracle] = [run(&cpu(), &case, &specs), run(&Reference, &case, &specs)];
    let off = ours[3].iter().zip(&oracle[3]).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(off < 2e-2, "off by {off}: more than the rounding of the mean explains");
    put(&mut specs, "x", &[5.0; 93]);
    let values = run(&cpu(), &case, &specs);
    assert!(output_of(&specs, &values, "y").iter().zip(output(&specs, "bias").iter().cycle()).all(|(y, b)| y == b));
}

// ---- gelu -----------------------------------------------------------------------------------------------------

const CURVES: [Curve; 2] = [Curve::Exact, Curve::Tanh];

struct Gelu(Curve, [usize; 2]);

/// f32 erf by the series that the oracle uses in f64.
fn naive_erf(x: f32) -> f32 {
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= 2.0 * x * x / (2 * n + 1) as f32;
        sum += term;
    }
    if x.abs() > 4.0 { x.signum() } else { 2.0 / std::f32::consts::PI.sqrt() * (-x * x).exp() * sum }
}

/// P and P' as transformers writes them.
fn naive_gate(curve: Curve, x: f32) -> (f32, f32) {
    let pi = std::f32::consts::PI;
    if curve == Curve::Exact {
        let slope = (-x * x / 2.0).exp() / (2.0 * pi).sqrt();
        return (0.5 * (1.0 + naive_erf(x / 2.0f32.sqrt())), slope);
    }
    let tanh = ((2.0 / pi).sqrt() * (x + 0.044715 * x.powi(3))).tanh();
    let slope = 0.5 * (1.0 - tanh * tanh) * (2.0 / pi).sqrt() * (1.0 + 3.0 * 0.044715 * x * x);
    (0.5 * (1.0 + tanh), slope)
}

impl Case for Gelu {
    fn op(&self) -> &'static str {
        "gelu"
    }

    fn specs(&self) -> Vec<Spec> {
        vec![Spec::input("x", self.1).map(|x| 2.0 * x).per_row(), Spec::set("y", self.1).per_row()]
    }

    fn run<D: Backend>(&self, device: &D, t: &mut [Slot<D>]) -> Result<()> {
        tensors!(t => x, y);
        device.gelu(gelu::Forward { curve: self.0, x: x.view(), y: y.view_mut() })
    }

    fn naive(&self, _: &[Spec], t: &mut [Vec<f32>]) {
        tensors!(t => x, y);
        (0..y.len()).for_each(|i| y[i] = x[i] * naive_gate(self.0, x[i]).0);
    }
}

struct GeluBackward(Curve, [usize; 2]);

impl Case for GeluBackward {
    fn op(&self) -> &'static str {
        "gelu_backward"
    }

    fn specs(&self) -> Vec<Spec> {
        vec![
            Spec::input("dy", self.1).per_row(),
            Spec::input("x", self.1).map(|x| 2.0 * x).per_row(),
            Spec::set("dx", self.1).per_row(),
        ]
    }

    fn run<D: Backend>(&self, device: &D, t: &mut [Slot<D>]) -> Result<()> {
        tensors!(t => dy, x, dx);
        device.gelu_backward(gelu::Backward { curve: self.0, dy: dy.view(), x: x.view(), dx: dx.view_mut() })
    }

    fn naive(&self, _: &[Spec], t: &mut [Vec<f32>]) {
        tensors!(t => dy, x, dx);
        for i in 0..dx.len() {
            let (p, slope) = naive_gate(self.0, x[i]);
            dx[i] = dy[i] * (p + x[i] * slope);
        }
    }
}

#[test]
fn gelu_is_close_to_the_oracle() {
    for curve in CURVES {
        for shape in [[1, 31], [3, 123], [47, 507], [252, 123]] {
            compare(&Gelu(curve, shape));
            compare(&GeluBackward(curve, shape));
        }
    }
}

#[test]
fn gelu_backward_is_the_derivative() {
    for curve in CURVES {
        let (forward, backward) = (Gelu(curve, [3, 7]), GeluBackward(curve, [3, 7]));
        let (specs, back) = (forward.specs(), backward.specs());
        let gradients = run(&Reference, &backward, &back);
        let gradient = output_of(&back, &gradients, "dx");
        assert_backward(&forward, &specs, "x", "y", &output(&back, "dy"), gradient);
    }
}

#[test]
fn gelu_keeps_its_promises() {
    for curve in CURVES {
        same_on_every_machine(&Gelu(curve, [252, 123]));
        same_on_every_machine(&GeluBackward(curve, [252, 123]));
        same_for_some_rows(&Gelu(curve, [252, 123]));
        same_for_some_rows(&GeluBackward(curve, [252, 123]));
        twice_is_double(&GeluBackward(curve, [47, 31]));
        nan_surfaces(&Gelu(curve, [3, 31]));
        nan_surfaces(&GeluBackward(curve, [3, 31]));
        wrong_shapes_are_refused(&Gelu(curve, [3, 5]));
        wrong_shapes_are_refused(&GeluBackward(curve, [3, 5]));
    }
}

/// Digits of PyTorch's float64 gelu; the curves differ in the fourth.
#[test]
fn gelu_has_the_values_of_others_and_saturates_without_nan() {
    let at: [f64; 12] = [-1e20, -100.0, -30.5, -13.0, -1.0, 0.0, 1.0, 2.5, 13.0, 30.5, 100.0, 1e20];
    let known = [
        (Curve::Exact, [-0.15865525393145702, 0.0, 0.841344746068543, 2.4844758366855597]),
        (Curve::Tanh, [-0.15880800939172324, 0.0, 0.8411919906082768, 2.484915733910001]),
    ];
    for (curve, known) in known {
        let case = Gelu(curve, [1, at.len()]);
        let mut specs = case.specs();
        put(&mut specs, "x", &at.map(|x| f64::from(x as f32)));
        let values = run(&cpu(), &case, &specs);
        let y = output_of(&specs, &values, "y");
        for ((y, x), expected) in y[4..8].iter().zip(&at[4..8]).zip(known) {
            assert!((y - expected).abs() < 5e-7, "{curve:?}: gelu({x}) = {y}, expected {expected}");
        }
        for (y, x) in y.iter().zip(at).filter(|(_, x)| x.abs() > 10.0) {
            assert!((y - x.max(0.0)).abs() <= 1e-6 * x.max(1.0), "{curve:?}: gelu({x}) = {y}");
        }
        let case = GeluBackward(curve, [1, at.len()]);
        let mut specs = case.specs();
        put(&mut specs, "x", &at.map(|x| f64::from(x as f32)));
        assert!(run(&cpu(), &case, &specs).iter().flatten().all(|x| x.is_finite()), "{curve:?}");
    }
}

// ---- rope -----------------------------------------------------------------------------------------------------

#[derive(Clone, Copy)]
struct Rope {
    rows: usize,
    heads: usize,
    head_dim: usize,
    rotary: usize,
    direction: Direction,
}

const TABLE: usize = 300;

impl Case for Rope {
    fn op(&self) -> &'static str {
        "rope"
    }

    fn specs(&self) -> Vec<Spec> {
        let half = self.rotary / 2;
        let angle = |at: usize| (at / half) as f64 * 1e4_f64.powf(-((at % half) as f64) / half as f64);
        let table = |f: fn(f64) -> f64| (0..TABLE * half).map(|at| f(angle(at))).collect::<Vec<_>>();
        vec![
            Spec::in_place("x", [self.rows, self.heads * self.head_dim]).per_row(),
            Spec::index("positions", 1, below("positions", self.rows, TABLE)).per_row(),
            Spec::input("cos", [TABLE, half]).with(&table(f64::cos)),
            Spec::input("sin", [TABLE, half]).with(&table(f64::sin)),
        ]
    }

    fn run<D: Backend>(&self, device: &D, t: &mut [Slot<D>]) -> Result<()> {
        tensors!(t => x, positions, cos, sin);
        device.rope(rope::Rotate {
            x: x.view_mut(),
            positions: positions.view(),
            cos: cos.view(),
            sin: sin.view(),
            head_dim: self.head_dim,
            direction: self.direction,
        })
    }

    fn naive(&self, specs: &[Spec], t: &mut [Vec<f32>]) {
        tensors!(t => x, _positions, cos, sin);
        let half = self.rotary / 2;
        let sign = if self.direction == Direction::Forward { 1.0 } else { -1.0 };
        for (head, x) in x.chunks_exact_mut(self.head_dim).enumerate() {
            let position = specs[1].indices[head / self.heads] as usize;
            for i in 0..half {
                let (c, s) = (cos[position * half + i], sign * sin[position * half + i]);
                (x[i], x[i + half]) = (x[i] * c - x[i + half] * s, x[i + half] * c + x[i] * s);
            }
        }
    }
}

/// Whole and partial rotary, odd head sizes.
fn ropes() -> Vec<Rope> {
    let shapes = [(1, 1, 2, 2), (3, 3, 64, 64), (47, 2, 80, 20), (252, 1, 16, 16), (130, 4, 5, 4)];
    let both = |(rows, heads, head_dim, rotary)| {
        [Direction::Forward, Direction::Backward].map(|direction| Rope { rows, heads, head_dim, rotary, direction })
    };
    shapes.into_iter().flat_map(both).collect()
}

#[test]
fn rope_is_close_to_the_oracle() {
    ropes().iter().for_each(compare);
}

#[test]
fn rope_backward_is_the_derivative() {
    let forward = Rope { rows: 3, heads: 2, head_dim: 7, rotary: 4, direction: Direction::Forward };
    let specs = forward.specs();
    let upstream = normals("dy", 3 * 14);
    let mut back = specs.clone();
    put(&mut back, "x", &upstream);
    let gradient = run(&Reference, &Rope { direction: Direction::Backward, ..forward }, &back);
    assert_backward(&forward, &specs, "x", "x", &upstream, output_of(&specs, &gradient, "x"));
}

#[test]
fn rope_keeps_its_promises() {
    for case in ropes() {
        same_on_every_machine(&case);
        if case.rows > 3 {
            same_for_some_rows(&case);
        }
    }
    let case = Rope { rows: 3, heads: 2, head_dim: 7, rotary: 4, direction: Direction::Forward };
    // A NaN in x stays in its pair or, beyond the rotary part, where it is; the tables count only where they are read.
    let mut specs = case.specs();
    specs[0].values[6] = f64::NAN;
    specs[0].values[14 + 1] = f64::NAN;
    let (found, oracle) = (run(&cpu(), &case, &specs), run(&Reference, &case, &specs));
    let nans = |v: &[Vec<f64>]| (0..42).filter(|i| v[0][*i].is_nan()).collect::<Vec<_>>();
    assert_eq!(nans(&found), vec![6, 15, 17]);
    assert_eq!(nans(&oracle), vec![6, 15, 17]);
    wrong_shapes_are_refused(&case);
}

// ---- rows -----------------------------------------------------------------------------------------------------

/// Picks `rows` of `n`.
struct Gather {
    n: usize,
    rows: usize,
    cols: usize,
}

impl Case for Gather {
    fn op(&self) -> &'static str {
        "gather"
    }

    fn specs(&self) -> Vec<Spec> {
        vec![
            Spec::input("x", [self.n, self.cols]),
            Spec::index("index", 1, below("gather", self.rows, self.n)).per_row(),
            Spec::set("y", [self.rows, self.cols]).per_row(),
        ]
    }

    fn run<D: Backend>(&self, device: &D, t: &mut [Slot<D>]) -> Result<()> {
        tensors!(t => x, index, y);
        device.gather(rows::Gather { x: x.view(), index: index.view(), y: y.view_mut() })
    }

    fn naive(&self, specs: &[Spec], t: &mut [Vec<f32>]) {
        tensors!(t => x, _index, y);
        for (y, index) in y.chunks_exact_mut(self.cols).zip(&specs[1].indices) {
            y.copy_from_slice(&x[*index as usize * self.cols..][..self.cols]);
        }
    }

    fn may_grow(&self) -> &[&'static str] {
        &["x"]
    }
}

struct GatherAdd(Gather);

impl Case for GatherAdd {
    fn op(&self) -> &'static str {
        "gather_add"
    }

    fn specs(&self) -> Vec<Spec> {
        let Gather { n, rows, cols } = self.0;
        vec![
            Spec::input("x", [n, cols]),
            Spec::index("index", 1, below("gather", rows, n)).per_row(),
            Spec::add("y", [rows, cols]).per_row(),
        ]
    }

    fn run<D: Backend>(&self, device: &D, t: &mut [Slot<D>]) -> Result<()> {
        tensors!(t => x, index, y);
        device.gather_add(rows::GatherAdd { x: x.view(), index: index.view(), y: y.view_mut() })
    }

    fn naive(&self, specs: &[Spec], t: &mut [Vec<f32>]) {
        tensors!(t => x, _index, y);
        for (y, index) in y.chunks_exact_mut(self.0.cols).zip(&specs[1].indices) {
            (0..self.0.cols).for_each(|j| y[j] += x[*index as usize * self.0.cols + j]);
        }
    }

    fn may_grow(&self) -> &[&'static str] {
        &["x"]
    }
}

struct GatherBackward(Gather);

impl Case for GatherBackward {
    fn op(&self) -> &'static str {
        "gather_backward"
    }

    fn specs(&self) -> Vec<Spec> {
        let Gather { n, rows, cols } = self.0;
        vec![
            Spec::input("dy", [rows, cols]),
            Spec::index("index", 1, below("gather", rows, n)),
            Spec::add("dx", [n, cols]),
        ]
    }

    fn run<D: Backend>(&self, device: &D, t: &mut [Slot<D>]) -> Result<()> {
        tensors!(t => dy, index, dx);
        device.gather_backward(rows::GatherBackward { dy: dy.view(), index: index.view(), dx: dx.view_mut() })
    }

    fn naive(&self, specs: &[Spec], t: &mut [Vec<f32>]) {
        tensors!(t => dy, _index, dx);
        for (dy, index) in dy.chunks_exact(self.0.cols).zip(&specs[1].indices) {
            (0..self.0.cols).for_each(|j| dx[*index as usize * self.0.cols + j] += dy[j]);
        }
    }

    fn may_grow(&self) -> &[&'static str] {
        &["dx"]
    }
}

struct Scatter(Gather);

impl Case for Scatter {
    fn op(&self) -> &'static str {
        "scatter"
    }

    fn specs(&self) -> Vec<Spec> {
        let Gather { n, rows, cols } = self.0;
        // Steps of 7 mod n never meet twice when n is no multiple of 7.
        let index: Vec<u32> = (0..rows).map(|i| (i * 7 % n) as u32).collect();
        assert_eq!(index.iter().collect::<BTreeSet<_>>().len(), rows);
        vec![Spec::input("x", [rows, cols]), Spec::index("index", 1, index), Spec::in_place("y", [n, cols])]
    }

    fn run<D: Backend>(&self, device: &D, t: &mut [Slot<D>]) -> Result<()> {
        tensors!(t => x, index, y);
        device.scatter(rows::Scatter { x: x.view(), index: index.view(), y: y.view_mut() })
    }

    fn naive(&self, specs: &[Spec], t: &mut [Vec<f32>]) {
        tensors!(t => x, _index, y);
        for (x, index) in x.chunks_exact(self.0.cols).zip(&specs[1].indices) {
            y[*index as usize * self.0.cols..][..self.0.cols].copy_from_slice(x);
        }
    }

    fn may_grow(&self) -> &[&'static str] {
        &["y"]
    }
}

#[test]
fn rows_are_close_to_the_oracle() {
    for [n, rows, cols] in [[123, 1, 31], [8003, 47, 3], [2050, 252, 31], [5, 47, 123]] {
        compare(&Gather { n, rows, cols });
        compare(&GatherAdd(Gather { n, rows, cols }));
        compare(&GatherBackward(Gather { n, rows, cols }));
        compare(&Scatter(Gather { n, rows: rows.min(n), cols }));
    }
}

/// Both gathers have this backward.
#[test]
fn gather_backward_is_the_derivative() {
    let forward = Gather { n: 4, rows: 7, cols: 3 };
    let backward = GatherBackward(Gather { n: 4, rows: 7, cols: 3 });
    let (specs, mut back) = (forward.specs(), backward.specs());
    zero(&mut back, &["dx"]);
    let gradients = run(&Reference, &backward, &back);
    assert_backward(&forward, &specs, "x", "y", &output(&back, "dy"), output_of(&back, &gradients, "dx"));
}

#[test]
fn rows_keep_their_promises() {
    same_for_some_rows(&Gather { n: 507, rows: 47, cols: 31 });
    same_on_every_machine(&Gather { n: 507, rows: 47, cols: 31 });
    same_on_every_machine(&GatherBackward(Gather { n: 5000, rows: 4000, cols: 3 }));
    same_on_every_machine(&Scatter(Gather { n: 507, rows: 47, cols: 31 }));
    same_for_some_rows(&GatherAdd(Gather { n: 507, rows: 47, cols: 31 }));
    same_on_every_machine(&GatherAdd(Gather { n: 507, rows: 47, cols: 31 }));
    twice_is_double(&GatherAdd(Gather { n: 507, rows: 47, cols: 31 }));
    twice_is_double(&GatherBackward(Gather { n: 31, rows: 123, cols: 5 }));
    let small = || Gather { n: 4, rows: 3, cols: 5 };
    wrong_shapes_are_refused(&small());
    wrong_shapes_are_refused(&GatherAdd(small()));
    wrong_shapes_are_refused(&GatherBackward(small()));
    wrong_shapes_are_refused(&Scatter(small()));
    nan_surfaces(&GatherBackward(small()));
    nan_surfaces(&GatherAdd(Gather { n: 1, rows: 3, cols: 5 }));
    nan_surfaces(&Gather { n: 1, rows: 3, cols: 5 });
}

// ---- sum_squares ----------------------------------------------------------------------------------------------

struct SumSquares([usize; 2]);

impl Case for SumSquares {
    fn op(&self) -> &'static str {
        "sum_squares"
    }

    fn specs(&self) -> Vec<Spec> {
        vec![Spec::input("x", self.0), Spec::set("sum", [1, 1])]
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

#[test]
fn sum_squares_keeps_its_promises() {
    // The last is longer than one task of one thread.
    for shape in [[1, 1], [1, 31], [47, 123], [3, 8003], [1, 300_001]] {
        compare(&SumSquares(shape));
        same_on_every_machine(&SumSquares(shape));
    }
    nan_surfaces(&SumSquares([47, 123]));
    let specs = SumSquares([3, 5]).specs();
    for value in [f64::INFINITY, f64::NEG_INFINITY, 2e19] {
        let mut specs = specs.clone();
        specs[0].values[14] = f64::from(value as f32);
        assert_eq!(run(&cpu(), &SumSquares([3, 5]), &specs)[1], [f64::INFINITY], "{value}");
    }
}

#[test]
fn sum_squares_refuses_other_shapes_of_its_sum() {
    struct Wide;
    impl Case for Wide {
        fn op(&self) -> &'static str {
            "sum_squares"
        }
        fn specs(&self) -> Vec<Spec> {
            vec![Spec::set("sum", [1, 1])]
        }
        fn run<D: Backend>(&self, device: &D, t: &mut [Slot<D>]) -> Result<()> {
            tensors!(t => sum);
            let mut arena = cuvee::device::Arena::with_bytes(device, 4096)?;
            let x = arena.floats(cuvee::device::Kind::Grads, 3, 5);
            device.sum_squares(sum_squares::Args { x: x.view(), sum: sum.view_mut() })
        }
        fn naive(&self, _: &[Spec], _: &mut [Vec<f32>]) {}
    }
    wrong_shapes_are_refused(&Wide);
}

// ---- merged_update --------------------------------------------------------------------------------------------

struct Update {
    shape: [usize; 2],
    step: Step,
}

impl Update {
    /// A rate so large that the update, not the weight, is what is compared.
    fn at(shape: [usize; 2], step: u64) -> Self {
        let rule = Rule::AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8 };
        Self { shape, step: Step { rule, step, learning_rate: 0.5, weight_decay: 0.1, clip: 0.3 } }
    }
}

impl Case for Update {
    fn op(&self) -> &'static str {
        "merged_update"
    }

    fn specs(&self) -> Vec<Spec> {
        vec![
            Spec::input("grad", self.shape).per_row(),
            Spec::in_place("weight", self.shape).per_row(),
            Spec::in_place("first_moment", self.shape).per_row(),
            Spec::in_place("second_moment", self.shape).map(|x| x * x + 0.1).per_row(),
        ]
    }

    fn run<D: Backend>(&self, device: &D, t: &mut [Slot<D>]) -> Result<()> {
        tensors!(t => grad, weight, first_moment, second_moment);
        device.merged_update(merged_update::Args {
            step: self.step,
            grad: grad.view(),
            weight: weight.view_mut(),
            master: None,
            first_moment: first_moment.view_mut(),
            second_moment: second_moment.view_mut(),
        })
    }

    fn naive(&self, _: &[Spec], t: &mut [Vec<f32>]) {
        tensors!(t => grad, weight, m, v);
        let Rule::AdamW { beta1, beta2, eps } = self.step.rule;
        let (rate, decay) = (self.step.learning_rate as f32, self.step.weight_decay as f32);
        let correction = |beta: f64| (1.0 - beta.powf(self.step.step as f64)) as f32;
        for i in 0..grad.len() {
            let g = self.step.clip as f32 * grad[i];
            weight[i] *= 1.0 - rate * decay;
            m[i] = beta1 as f32 * m[i] + (1.0 - beta1) as f32 * g;
            v[i] = beta2 as f32 * v[i] + (1.0 - beta2) as f32 * g * g;
            weight[i] -= rate * (m[i] / correction(beta1)) / ((v[i] / correction(beta2)).sqrt() + eps as f32);
        }
    }
}

#[test]
fn merged_update_is_close_to_the_oracle() {
    for (shape, step) in [([1, 31], 1), ([3, 123], 2), ([47, 507], 10), ([252, 123], 100_000)] {
        compare(&Update::at(shape, step));
    }
}

/// Against torch.optim.AdamW, computed by hand for one weight: w 1, grad 0.5, both moments 0, step 1. Then
/// m_hat = grad and v_hat = grad^2 exactly, so w = 1 (1 - 0.1 * 0.01) - 0.1 * 0.5 / (0.5 + 1e-8).
#[test]
fn first_step_of_adamw_moves_by_the_learning_rate() {
    let mut case = Update::at([1, 1], 1);
    case.step = Step { learning_rate: 0.1, weight_decay: 0.01, clip: 1.0, ..case.step };
    let mut specs = case.specs();
    put(&mut specs, "grad", &[0.5]);
    put(&mut specs, "weight", &[1.0]);
    zero(&mut specs, &["first_moment", "second_moment"]);
    let values = run(&Reference, &case, &specs);
    assert!((values[1][0] - (0.999 - 0.1 * 0.5 / (0.5 + 1e-8))).abs() < 1e-12);
    assert!((values[2][0] - 0.05).abs() < 1e-15 && (values[3][0] - 0.00025).abs() < 1e-15);
}

#[test]
fn merged_update_keeps_its_promises() {
    same_on_every_machine(&Update::at([252, 123], 3));
    same_for_some_rows(&Update::at([252, 123], 3));
    nan_surfaces(&Update::at([3, 31], 3));
    wrong_shapes_are_refused(&Update::at([3, 5], 3));
}

// ---- logprob_head ---------------------------------------------------------------------------------------------

/// Rows, hidden, vocab. Vocabularies of real models at few rows; more rows than a tile; no multiple of a tile.
const HEAD_SHAPES: [[usize; 3]; 7] =
    [[1, 31, 123], [252, 123, 507], [47, 31, 8003], [3, 123, 513], [3, 31, 49_152], [3, 31, 50_257], [1027, 5, 600]];

#[derive(Clone, Copy)]
struct Head {
    shape: [usize; 3],
    /// Factor on the weights, hence on the logits.
    scale: f64,
}

impl Head {
    /// Logits of a spread near 1: where one entry holds all the probability, the error of one logit, a matter of
    /// luck, would be all that is compared.
    fn new(shape: [usize; 3]) -> Self {
        Self { shape, scale: (shape[1] as f64).powf(-0.5) }
    }

    /// `[h, weight, target, scratch]` of both directions.
    fn inputs(&self) -> [Spec; 4] {
        let [rows, hidden, vocab] = self.shape;
        let mut target = below("target", rows, vocab);
        // The last entry lies in the tile that is not full.
        target[rows - 1] = vocab as u32 - 1;
        [
            Spec::input("h", [rows, hidden]).per_row(),
            Spec::input("weight", [vocab, hidden]).map(|x| x * self.scale),
            Spec::index("target", 1, target).per_row(),
            Spec::scratch("scratch", logprob_head::scratch_shape(rows)),
        ]
    }

    fn naive_logits(&self, h: &[f32], weight: &[f32]) -> Vec<f32> {
        weight.chunks_exact(h.len()).map(|w| w.iter().zip(h).fold(0.0, |sum, (w, h)| sum + w * h)).collect()
    }
}

impl Case for Head {
    fn op(&self) -> &'static str {
        "logprob_head"
    }

    fn specs(&self) -> Vec<Spec> {
        let outputs = ["logp", "lse"].map(|name| Spec::set(name, [self.shape[0], 1]).per_row());
        self.inputs().into_iter().chain(outputs).collect()
    }

    fn run<D: Backend>(&self, device: &D, t: &mut [Slot<D>]) -> Result<()> {
        tensors!(t => h, weight, target, scratch, logp, lse);
        device.logprob_head(logprob_head::Forward {
            h: h.view(),
            weight: weight.view(),
            target: target.view(),
            scratch: scratch.view_mut(),
            logp: logp.view_mut(),
            lse: lse.view_mut(),
            entropy: None,
        })
    }

    fn naive(&self, specs: &[Spec], t: &mut [Vec<f32>]) {
        tensors!(t => h, weight, _target, _scratch, logp, lse);
        for (r, h) in h.chunks_exact(self.shape[1]).enumerate() {
            let logits = self.naive_logits(h, weight);
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            lse[r] = max + logits.iter().fold(0.0, |sum, l| sum + (l - max).exp()).ln();
            logp[r] = logits[specs[2].indices[r] as usize] - lse[r];
        }
    }

    fn may_grow(&self) -> &[&'static str] {
        &["weight", "scratch"]
    }
}

struct HeadBackward {
    head: Head,
    wanted: bool,
}

impl HeadBackward {
    fn full(shape: [usize; 3]) -> Self {
        Self { head: Head::new(shape), wanted: true }
    }
}

impl Case for HeadBackward {
    fn op(&self) -> &'static str {
        "logprob_head_backward"
    }

    fn specs(&self) -> Vec<Spec> {
        let [rows, hidden, vocab] = self.head.shape;
        let forward = self.head.specs();
        let lse = run(&Reference, &self.head, &forward).remove(5);
        let rest = [
            Spec::input("lse", [rows, 1]).with(&lse).per_row(),
            Spec::input("dlogp", [rows, 1]).per_row(),
            Spec::add("dh", [rows, hidden]).per_row(),
            Spec::add("dweight", [vocab, hidden]),
        ];
        self.head.inputs().into_iter().chain(rest).collect()
    }

    fn run<D: Backend>(&self, device: &D, t: &mut [Slot<D>]) -> Result<()> {
        tensors!(t => h, weight, target, scratch, lse, dlogp, dh, dweight);
        device.logprob_head_backward(logprob_head::Backward {
            h: h.view(),
            weight: weight.view(),
            target: target.view(),
            lse: lse.view(),
            dlogp: dlogp.view(),
            dentropy: None,
            entropy: None,
            scratch: scratch.view_mut(),
            dh: dh.view_mut(),
            dweight: dweight.wanted(self.wanted),
        })
    }

    fn naive(&self, specs: &[Spec], t: &mut [Vec<f32>]) {
        tensors!(t => h, weight, _target, _scratch, lse, dlogp, dh, dweight);
        let hidden = self.head.shape[1];
        for (r, h) in h.chunks_exact(hidden).enumerate() {
            for (v, l) in self.head.naive_logits(h, weight).into_iter().enumerate() {
                let hit = if specs[2].indices[r] as usize == v { 1.0 } else { 0.0 };
                let dl = dlogp[r] * (hit - (l - lse[r]).exp());
                for i in 0..hidden {
                    dh[r * hidden + i] += dl * weight[v * hidden + i];
                    dweight[v * hidden + i] += dl * h[i];
                }
            }
        }
    }

    fn may_grow(&self) -> &[&'static str] {
        &["scratch"]
    }
}

#[test]
fn logprob_head_is_close_to_the_oracle() {
    assert!(HEAD_SHAPES.iter().any(|[rows, ..]| *rows > logprob_head::TILE_ROWS));
    for shape in HEAD_SHAPES {
        compare(&Head::new(shape));
        compare(&HeadBackward::full(shape));
    }
}

#[test]
fn logprob_head_backward_is_the_derivative() {
    let backward = HeadBackward::full([3, 4, 7]);
    let (specs, mut back) = (backward.head.specs(), backward.specs());
    let values = run(&Reference, &backward.head, &specs);
    put(&mut back, "lse", output_of(&specs, &values, "lse"));
    zero(&mut back, &["dh", "dweight"]);
    let gradients = run(&Reference, &backward, &back);
    for (input, gradient) in [("h", "dh"), ("weight", "dweight")] {
        let gradient = output_of(&back, &gradients, gradient);
        assert_backward(&backward.head, &specs, input, "logp", &output(&back, "dlogp"), gradient);
    }
}

#[test]
fn logprob_head_keeps_its_promises() {
    for shape in [[47, 123, 507], [252, 31, 1100], [1027, 5, 513]] {
        same_on_every_machine(&Head::new(shape));
        same_on_every_machine(&HeadBackward::full(shape));
        same_for_some_rows(&Head::new(shape));
        same_for_some_rows(&HeadBackward::full(shape));
    }
    let full = HeadBackward::full([47, 31, 600]);
    twice_is_double(&full);
    unwanted_stay(&full, &HeadBackward { wanted: false, ..full }, &["dweight"], &[false]);
    nan_surfaces(&Head::new([5, 31, 600]));
    nan_surfaces(&HeadBackward::full([5, 31, 600]));
    wrong_shapes_are_refused(&Head::new([3, 5, 7]));
    wrong_shapes_are_refused(&HeadBackward::full([3, 5, 7]));
}

#[test]
fn logprob_head_takes_extreme_logits() {
    for logit in [1e4, -1e4] {
        let case = Head { shape: [4, 1, 1100], scale: 1.0 };
        let mut specs = case.specs();
        // One entry stands `logit` away from all others, in the first, a middle or the last tile.
        for at in [0, 600, 1099] {
            put(&mut specs, "h", &[1.0, -1.0, 0.5, 0.0]);
            let mut weight = vec![0.0; 1100];
            weight[at] = logit;
            put(&mut specs, "weight", &weight);
            let (found, oracle) = (run(&cpu(), &case, &specs), run(&Reference, &case, &specs));
            for (name, found, oracle) in [("logp", &found[4], &oracle[4]), ("lse", &found[5], &oracle[5])] {
                assert!(found.iter().all(|x| x.is_finite()), "{name}, {logit} at {at}: {found:?}");
                // An ulp of 1e4 is 1e-3; the oracle itself is the straightforward evaluation here.
                assert_close(&format!("{name}, {logit} at {at}"), found, oracle, oracle);
            }
        }
    }
}

#[test]
fn logprob_head_of_equal_logits_is_exactly_uniform() {
    for vocab in [1, 2, 507, 512, 8003, 50_257] {
        let case = Head { shape: [3, 31, vocab], scale: 0.0 };
        let specs = case.specs();
        let found = run(&cpu(), &case, &specs);
        assert_eq!(found[4], vec![-f64::from((vocab as f32).ln()); 3], "vocab {vocab}");
    }
}

/// A shifted softmax must not depend on the tile in which the maximum lies.
#[test]
fn logprob_head_backward_sums_to_zero_over_the_vocabulary() {
    let case = HeadBackward::full([3, 1, 1100]);
    let mut specs = case.specs();
    put(&mut specs, "h", &[1.0; 3]);
    let forward = Head::new([3, 1, 1100]);
    let mut first = forward.specs();
    put(&mut first, "h", &[1.0; 3]);
    put(&mut specs, "lse", &run(&cpu(), &forward, &first)[5]);
    zero(&mut specs, &["dh", "dweight"]);
    let values = run(&cpu(), &case, &specs);
    let sum: f64 = output_of(&specs, &values, "dweight").iter().sum();
    assert!(sum.abs() < 1e-5, "sum of dl over the vocabulary: {sum:e}");
}

// ---- attention ------------------------------------------------------------------------------------------------

/// (length, parent) of each segment, to a table that queries every row.
fn forest(segments: &[(usize, Option<usize>)]) -> Vec<Segment> {
    let mut table: Vec<Segment> = Vec::new();
    let mut start = 0;
    for (len, parent) in segments {
        let position = parent.map_or(0, |p| table[p].position + table[p].len);
        let (len, parent) = (*len as u32, parent.map_or(NO_PARENT, |p| p as u32));
        table.push(Segment { start, len, parent, position, query_start: start, queries: len });
        start += len;
    }
    table
}

/// A pair behind a prompt; a prompt of one token with five children; grandchildren and a lone sequence.
fn forests() -> [Vec<Segment>; 3] {
    [
        forest(&[(70, None), (40, Some(0)), (9, Some(0)), (131, None)]),
        forest(&[(1, None), (3, Some(0)), (1, Some(0)), (64, Some(0)), (65, Some(0)), (7, Some(0))]),
        forest(&[(50, None), (33, Some(0)), (20, Some(1)), (60, Some(1)), (5, Some(0)), (2, None), (1, Some(5))]),
    ]
}

fn dims(heads: usize, kv_heads: usize, head_dim: usize, window: Option<usize>) -> attention::Dims {
    attention::Dims { heads, kv_heads, head_dim, window, longest: 200 }
}

/// Head groups, head sizes and windows around the block size, each at least once.
fn all_dims() -> Vec<attention::Dims> {
    let rows = [
        (2, 2, 5, None),
        (4, 2, 16, Some(7)),
        (4, 1, 64, Some(64)),
        (3, 3, 80, Some(65)),
        (2, 1, 16, Some(200)),
        (4, 4, 5, Some(1)),
        (6, 3, 64, None),
    ];
    rows.into_iter().map(|(heads, kv_heads, head_dim, window)| dims(heads, kv_heads, head_dim, window)).collect()
}

#[derive(Clone)]
struct Attention {
    dims: attention::Dims,
    segments: Vec<Segment>,
}

impl Attention {
    fn key_rows(&self) -> usize {
        self.segments.iter().map(|s| (s.start + s.len) as usize).max().unwrap_or(0)
    }

    fn query_rows(&self) -> usize {
        self.segments.iter().map(|s| (s.query_start + s.queries) as usize).max().unwrap_or(0)
    }

    fn width(&self) -> usize {
        self.dims.heads * self.dims.head_dim
    }

    fn kv_width(&self) -> usize {
        self.dims.kv_heads * self.dims.head_dim
    }

    fn table(&self) -> Spec {
        Spec::index("segments", Segment::WORDS, bytemuck::cast_slice(&self.segments).to_vec())
    }

    /// Key rows of the path that ends in segment `index`, by position.
    fn path(&self, index: usize) -> Vec<usize> {
        let s = self.segments[index];
        let mut rows = if s.parent == NO_PARENT { Vec::new() } else { self.path(s.parent as usize) };
        rows.extend(s.start as usize..(s.start + s.len) as usize);
        rows
    }

    /// Every (query row, head, visible key rows).
    fn queries(&self) -> Vec<(usize, usize, Vec<usize>)> {
        let mut all = Vec::new();
        for (index, s) in self.segments.iter().enumerate() {
            let path = self.path(index);
            for i in 0..s.queries as usize {
                let position = path.len() - s.queries as usize + i;
                let first = self.dims.window.map_or(0, |w| (position + 1).saturating_sub(w));
                let row = s.query_start as usize + i;
                all.extend((0..self.dims.heads).map(|head| (row, head, path[first..=position].to_vec())));
            }
        }
        all
    }

    /// Softmax weights of one query in plain f32, and its log-sum-exp.
    fn naive_weights(&self, q: &[f32], k: &[f32], head: usize, keys: &[usize]) -> (Vec<f32>, f32) {
        let scale = self.dims.scale() as f32;
        let score = |row: &usize| scale * q.iter().zip(self.kv(k, *row, head)).fold(0.0, |s, (q, k)| s + q * k);
        let scores: Vec<f32> = keys.iter().map(score).collect();
        let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let total = scores.iter().fold(0.0, |sum, s| sum + (s - max).exp());
        (scores.iter().map(|s| (s - max).exp() / total).collect(), max + total.ln())
    }

    fn at(&self, row: usize, head: usize) -> std::ops::Range<usize> {
        let start = (row * self.dims.heads + head) * self.dims.head_dim;
        start..start + self.dims.head_dim
    }

    fn kv_at(&self, row: usize, head: usize) -> usize {
        let group = self.dims.heads / self.dims.kv_heads;
        (row * self.dims.kv_heads + head / group) * self.dims.head_dim
    }

    fn kv<'a>(&self, x: &'a [f32], row: usize, head: usize) -> &'a [f32] {
        &x[self.kv_at(row, head)..][..self.dims.head_dim]
    }
}

impl Case for Attention {
    fn op(&self) -> &'static str {
        "attention"
    }

    fn specs(&self) -> Vec<Spec> {
        vec![
            self.table(),
            Spec::input("q", [self.query_rows(), self.width()]),
            Spec::input("k", [self.key_rows(), self.kv_width()]),
            Spec::input("v", [self.key_rows(), self.kv_width()]),
            Spec::set("o", [self.query_rows(), self.width()]),
            Spec::set("lse", [self.query_rows(), self.dims.heads]),
        ]
    }

    fn run<D: Backend>(&self, device: &D, t: &mut [Slot<D>]) -> Result<()> {
        tensors!(t => segments, q, k, v, o, lse);
        device.attention(attention::Forward {
            dims: self.dims,
            segments: segments.view(),
            q: q.view(),
            k: k.view(),
            v: v.view(),
            o: o.view_mut(),
            lse: lse.view_mut(),
            entropy: None,
        })
    }

    fn may_grow(&self) -> &[&'static str] {
        &["segments"]
    }

    fn naive(&self, _: &[Spec], t: &mut [Vec<f32>]) {
        tensors!(t => _segments, q, k, v, o, lse);
        for (row, head, keys) in self.queries() {
            let (weights, value) = self.naive_weights(&q[self.at(row, head)], k, head, &keys);
            lse[row * self.dims.heads + head] = value;
            for (p, key) in weights.iter().zip(&keys) {
                o[self.at(row, head)].iter_mut().zip(self.kv(v, *key, head)).for_each(|(o, v)| *o += p * v);
            }
        }
    }
}

struct AttentionBackward(Attention);

impl Case for AttentionBackward {
    fn op(&self) -> &'static str {
        "attention_backward"
    }

    fn specs(&self) -> Vec<Spec> {
        let a = &self.0;
        let (rows, wide, narrow) = (a.key_rows(), a.width(), a.kv_width());
        let forward = run(&Reference, a, &a.specs());
        vec![
            a.table(),
            Spec::input("d_o", [rows, wide]),
            Spec::input("q", [rows, wide]),
            Spec::input("k", [rows, narrow]),
            Spec::input("v", [rows, narrow]),
            Spec::input("o", [rows, wide]).with(&forward[4]),
            Spec::input("lse", [rows, a.dims.heads]).with(&forward[5]),
            Spec::set("dq", [rows, wide]),
            Spec::set("dk", [rows, narrow]),
            Spec::set("dv", [rows, narrow]),
        ]
    }

    fn run<D: Backend>(&self, device: &D, t: &mut [Slot<D>]) -> Result<()> {
        tensors!(t => segments, d_o, q, k, v, o, lse, dq, dk, dv);
        device.attention_backward(attention::Backward {
            dims: self.0.dims,
            segments: segments.view(),
            d_o: d_o.view(),
            q: q.view(),
            k: k.view(),
            v: v.view(),
            o: o.view(),
            lse: lse.view(),
            dq: dq.view_mut(),
            dk: dk.view_mut(),
            dv: dv.view_mut(),
        })
    }

    fn may_grow(&self) -> &[&'static str] {
        &["segments"]
    }

    fn naive(&self, _: &[Spec], t: &mut [Vec<f32>]) {
        tensors!(t => _segments, d_o, q, k, v, o, lse, dq, dk, dv);
        let (a, scale) = (&self.0, self.0.dims.scale() as f32);
        let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).fold(0.0, |sum, (x, y)| sum + x * y);
        for (row, head, keys) in a.queries() {
            let at = a.at(row, head);
            let delta = dot(&d_o[at.clone()], &o[at.clone()]);
            for key in keys {
                let kv = a.kv_at(key, head)..a.kv_at(key, head) + a.dims.head_dim;
                let s = scale * dot(&q[at.clone()], &k[kv.clone()]);
                let p = (s - lse[row * a.dims.heads + head]).exp();
                let ds = scale * p * (dot(&d_o[at.clone()], &v[kv.clone()]) - delta);
                for i in 0..a.dims.head_dim {
                    dq[at.start + i] += ds * k[kv.start + i];
                    dk[kv.start + i] += ds * q[at.start + i];
                    dv[kv.start + i] += p * d_o[at.start + i];
                }
            }
        }
    }
}

/// Every forest once, every dims once, the deep forest with all dims.
fn attentions() -> Vec<Attention> {
    let [pair, group, deep] = forests();
    let all = all_dims().into_iter().map(|dims| Attention { dims, segments: deep.clone() });
    let pairs = all_dims().into_iter().step_by(2).map(|dims| Attention { dims, segments: pair.clone() });
    let groups = all_dims().into_iter().skip(1).step_by(2).map(|dims| Attention { dims, segments: group.clone() });
    all.chain(pairs).chain(groups).collect()
}

#[test]
fn attention_is_close_to_the_oracle() {
    for case in attentions() {
        compare(&case);
        compare(&AttentionBackward(case));
    }
}

#[test]
fn attention_backward_is_the_derivative() {
    let segments = forest(&[(3, None), (2, Some(0)), (2, Some(1)), (1, Some(0)), (2, None)]);
    for dims in [dims(4, 2, 3, None), dims(2, 1, 2, Some(2)), dims(1, 1, 3, Some(1))] {
        let backward = AttentionBackward(Attention { dims, segments: segments.clone() });
        let (specs, mut back) = (backward.0.specs(), backward.specs());
        let values = run(&Reference, &backward.0, &specs);
        put(&mut back, "o", &values[4]);
        put(&mut back, "lse", &values[5]);
        let gradients = run(&Reference, &backward, &back);
        for (input, gradient) in [("q", "dq"), ("k", "dk"), ("v", "dv")] {
            let gradient = output_of(&back, &gradients, gradient);
            if dims.window == Some(1) && input != "v" {
                // A softmax over one key is 1 whatever its score.
                assert!(gradient.iter().all(|g| g.abs() < 1e-12));
                continue;
            }
            assert_backward(&backward.0, &specs, input, "o", &output(&back, "d_o"), gradient);
        }
    }
}

#[test]
fn attention_keeps_its_promises() {
    for case in attentions().into_iter().step_by(3) {
        same_on_every_machine(&case);
        same_on_every_machine(&AttentionBackward(case.clone()));
        twice_is_double(&AttentionBackward(case));
    }
    let [pair, _, deep] = forests();
    for (dims, segments) in [(dims(4, 2, 5, Some(65)), pair), (dims(2, 1, 16, None), deep)] {
        let case = Attention { dims, segments };
        nan_surfaces(&case);
        nan_surfaces(&AttentionBackward(case));
    }
    let small = Attention { dims: dims(4, 2, 5, None), segments: forest(&[(2, None), (1, Some(0))]) };
    let backward = AttentionBackward(small.clone());
    wrong_shapes_are_refused(&small);
    wrong_shapes_are_refused(&backward);
}

#[test]
fn attention_refuses_heads_that_share_unevenly() {
    for kv_heads in [0, 3] {
        let case = Attention { dims: dims(4, kv_heads, 5, None), segments: forest(&[(2, None)]) };
        let error = std::panic::catch_unwind(|| run(&cpu(), &case, &case.specs())).unwrap_err();
        let message = error.downcast_ref::<String>().unwrap();
        assert!(message.contains(&format!("4 heads do not share {kv_heads} kv_heads evenly")), "{message}");
    }
}

/// Rows `rows` of a `[_, cols]` tensor.
fn pick(x: &[f64], cols: usize, rows: &[usize]) -> Vec<f64> {
    rows.iter().flat_map(|r| &x[r * cols..(r + 1) * cols]).copied().collect()
}

/// `o` and `lse` of a case with the given contents.
fn attend(case: &Attention, q: &[f64], k: &[f64], v: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let mut specs = case.specs();
    put(&mut specs, "q", q);
    put(&mut specs, "k", k);
    put(&mut specs, "v", v);
    let mut values = run(&cpu(), case, &specs);
    let lse = values.pop().unwrap();
    (values.pop().unwrap(), lse)
}

/// Sharing on = sharing off, a sequence alone = among others: every path alone, all its rows.
#[test]
fn attention_over_a_shared_prefix_has_the_bits_of_the_unrolled_sequence() {
    for tree in attentions() {
        let specs = tree.specs();
        let (q, k, v) = (output(&specs, "q"), output(&specs, "k"), output(&specs, "v"));
        let (o, lse) = attend(&tree, &q, &k, &v);
        for index in 0..tree.segments.len() {
            let rows = tree.path(index);
            let alone = Attention { dims: tree.dims, segments: forest(&[(rows.len(), None)]) };
            let (wide, narrow, heads) = (tree.width(), tree.kv_width(), tree.dims.heads);
            let (found, found_lse) =
                attend(&alone, &pick(&q, wide, &rows), &pick(&k, narrow, &rows), &pick(&v, narrow, &rows));
            assert!(found == pick(&o, wide, &rows), "segment {index}, {:?}", tree.dims);
            assert!(found_lse == pick(&lse, heads, &rows), "segment {index}, {:?}: lse", tree.dims);
        }
    }
}

/// A KV cache: the keys of each sequence lie in a slot with room behind it, only the last rows are queried.
#[test]
fn attention_of_a_decoding_step_has_the_bits_of_the_whole_sequence() {
    const ROOM: usize = 150;
    for dims in all_dims() {
        let whole = Attention { dims, segments: forest(&[(140, None), (66, None)]) };
        let specs = whole.specs();
        let (q, k, v) = (output(&specs, "q"), output(&specs, "k"), output(&specs, "v"));
        let (o, lse) = attend(&whole, &q, &k, &v);
        // (length so far, queries) of both sequences: one token each, a chunk, a slot that waits, a whole prefill.
        let steps = [[(140, 1), (66, 1)], [(64, 1), (65, 1)], [(65, 1), (1, 1)], [(131, 3), (63, 5)]];
        for step in steps.into_iter().chain([[(130, 1), (66, 0)], [(140, 140), (2, 1)]]) {
            let mut segments = Vec::new();
            let (mut cache_k, mut cache_v) = (Vec::new(), Vec::new());
            let mut rows = Vec::new();
            for (slot, (len, queries)) in step.into_iter().enumerate() {
                let first = slot * 140;
                let (start, len, queries) = (slot * ROOM, len as usize, queries as usize);
                segments.push(Segment {
                    start: start as u32,
                    len: len as u32,
                    parent: NO_PARENT,
                    position: 0,
                    query_start: rows.len() as u32,
                    queries: queries as u32,
                });
                rows.extend(first + len - queries..first + len);
                // Behind the cached rows lies what an earlier sequence left.
                for (cache, x) in [(&mut cache_k, &k), (&mut cache_v, &v)] {
                    let cols = whole.kv_width();
                    cache.extend_from_slice(&x[first * cols..(first + len) * cols]);
                    cache.resize((start + ROOM) * cols, f64::NAN);
                }
            }
            let decoding = Decoding { attention: Attention { dims, segments }, rows: [rows.len(), 2 * ROOM] };
            let mut specs = decoding.specs();
            put(&mut specs, "q", &pick(&q, whole.width(), &rows));
            put(&mut specs, "k", &cache_k);
            put(&mut specs, "v", &cache_v);
            let found = run(&cpu(), &decoding, &specs);
            assert!(found[4] == pick(&o, whole.width(), &rows), "{step:?}, {dims:?}");
            assert!(found[5] == pick(&lse, dims.heads, &rows), "{step:?}, {dims:?}: lse");
        }
    }
}

/// Attention with more key rows than the table names.
struct Decoding {
    attention: Attention,
    /// Query rows, key rows.
    rows: [usize; 2],
}

impl Case for Decoding {
    fn op(&self) -> &'static str {
        "attention"
    }

    fn specs(&self) -> Vec<Spec> {
        let ([queries, keys], a) = (self.rows, &self.attention);
        vec![
            a.table(),
            Spec::input("q", [queries, a.width()]),
            Spec::input("k", [keys, a.kv_width()]),
            Spec::input("v", [keys, a.kv_width()]),
            Spec::set("o", [queries, a.width()]),
            Spec::set("lse", [queries, a.dims.heads]),
        ]
    }

    fn run<D: Backend>(&self, device: &D, t: &mut [Slot<D>]) -> Result<()> {
        self.attention.run(device, t)
    }

    fn naive(&self, _: &[Spec], _: &mut [Vec<f32>]) {}
}

#[test]
fn attention_takes_extreme_scores() {
    let case = Attention { dims: dims(2, 1, 4, None), segments: forest(&[(130, None), (70, Some(0))]) };
    let specs = case.specs();
    let scaled = |name: &str| output(&specs, name).iter().map(|x| x * 128.0).collect::<Vec<_>>();
    let (o, lse) = attend(&case, &scaled("q"), &scaled("k"), &output(&specs, "v"));
    assert!(lse.iter().any(|x| *x > 1e4) && o.iter().chain(&lse).all(|x| x.is_finite()));
}

/// NaN and infinity in a token's q, k, v and dO stay with those who see it or are seen by it: everyone else's results
/// have the bits that they have without.
#[test]
fn attention_keeps_what_is_broken_to_those_who_see_it() {
    const BROKEN: usize = 60;
    let segments = forest(&[(70, None), (40, Some(0)), (9, Some(0)), (131, None)]);
    for dims in all_dims() {
        let case = AttentionBackward(Attention { dims, segments: segments.clone() });
        let sees =
            |row: usize, key: usize| case.0.queries().iter().any(|(r, _, keys)| *r == row && keys.contains(&key));
        let rows = case.0.key_rows();
        let sees: Vec<(bool, bool)> = (0..rows).map(|row| (sees(row, BROKEN), sees(BROKEN, row))).collect();
        for value in [f64::NAN, f64::INFINITY] {
            let broken = |specs: &[Spec], names: &[&str]| {
                let mut specs = specs.to_vec();
                for name in names {
                    let (mut values, cols) = (output(&specs, name), output(&specs, name).len() / rows);
                    values[BROKEN * cols..(BROKEN + 1) * cols].fill(value);
                    put(&mut specs, name, &values);
                }
                specs
            };
            let check = |name: &str, found: &[f64], expected: &[f64], touched: &dyn Fn(usize) -> bool| {
                let cols = found.len() / rows;
                for row in (0..rows).filter(|row| !touched(*row)) {
                    let at = row * cols..(row + 1) * cols;
                    assert!(found[at.clone()] == expected[at], "{name} of row {row}, {value}, {dims:?}");
                }
                assert!(found[BROKEN * cols..(BROKEN + 1) * cols].iter().any(|x| x.is_nan()), "{name}: no NaN");
            };
            let specs = case.0.specs();
            let (whole, found) = (run(&cpu(), &case.0, &specs), run(&cpu(), &case.0, &broken(&specs, &["k", "v"])));
            check("o", &found[4], &whole[4], &|row| sees[row].0);
            let specs = case.specs();
            let whole = run(&cpu(), &case, &specs);
            let found = run(&cpu(), &case, &broken(&specs, &["k", "v"]));
            check("dq", &found[7], &whole[7], &|row| sees[row].0);
            let found = run(&cpu(), &case, &broken(&specs, &["q", "d_o"]));
            check("dk", &found[8], &whole[8], &|row| sees[row].1);
            check("dv", &found[9], &whole[9], &|row| sees[row].1);
        }
    }
}

/// What a table says twice must agree: a position is the length of the path before it.
#[test]
fn attention_refuses_positions_that_do_not_follow_their_parents() {
    let good = forest(&[(5, None), (3, Some(0)), (2, None)]);
    for (index, position) in [(0, 1), (1, 4), (2, 8)] {
        let mut segments = good.clone();
        segments[index].position = position;
        let case = Attention { dims: dims(2, 1, 4, None), segments };
        let error = std::panic::catch_unwind(|| run(&cpu(), &case, &case.specs())).unwrap_err();
        let message = error.downcast_ref::<String>().unwrap();
        assert!(message.contains(&format!("segment {index} does not fit those before it")), "{message}");
    }
}

// ---- all ------------------------------------------------------------------------------------------------------

/// A micro-batch may be empty: nothing is written, nothing panics.
#[test]
fn no_rows_are_no_work() {
    run(&cpu(), &Linear::full([0, 31, 5]), &Linear::full([0, 31, 5]).specs());
    run(&cpu(), &RmsNorm([0, 31]), &RmsNorm([0, 31]).specs());
    run(&cpu(), &SwiGlu([0, 31]), &SwiGlu([0, 31]).specs());
    run(&cpu(), &Gather { n: 5, rows: 0, cols: 3 }, &Gather { n: 5, rows: 0, cols: 3 }.specs());
    let linear = LinearBackward::full([0, 31, 5]);
    let specs = linear.specs();
    let values = run(&cpu(), &linear, &specs);
    assert_eq!(output_of(&specs, &values, "dweight"), output(&specs, "dweight"));
    let norm = RmsNormBackward::full([0, 31]);
    let specs = norm.specs();
    assert_eq!(output_of(&specs, &run(&cpu(), &norm, &specs), "dweight"), output(&specs, "dweight"));
    let none = Attention { dims: dims(2, 1, 4, None), segments: Vec::new() };
    run(&cpu(), &none, &none.specs());
}

/// The price list: a multiply-add is two FLOPs, a backward has two products where its forward has one.
#[test]
fn dry_runs_count_products() {
    fn flops<C: Case>(case: &C) -> u64 {
        let dry = Dry::default();
        crate::common::run_dry(&dry, case);
        dry.flops()
    }
    let product = 2 * 3 * 5 * 7;
    assert_eq!(flops(&Linear::full([3, 5, 7])), product);
    assert_eq!(flops(&LinearBackward::full([3, 5, 7])), 2 * product);
    assert_eq!(flops(&LinearBackward { shape: [3, 5, 7], wanted: [false, true, true] }), product);
    assert_eq!(flops(&Head::new([3, 5, 7])), product);
    assert_eq!(flops(&HeadBackward::full([3, 5, 7])), 3 * product);
    assert_eq!(flops(&HeadBackward { wanted: false, ..HeadBackward::full([3, 5, 7]) }), 2 * product);
    assert_eq!(flops(&RmsNorm([3, 5])), 0);

    // A root of 5 sees 15 pairs; a child of 3 behind it 6 + 7 + 8; with a window of 4: 14 and 12.
    let pairs = |window, pairs: u64| {
        let case = Attention { dims: dims(2, 1, 4, window), segments: forest(&[(5, None), (3, Some(0))]) };
        assert_eq!(flops(&case), 2 * 2 * pairs * 2 * 4);
    };
    pairs(None, 15 + 21);
    pairs(Some(4), 14 + 12);
}

#[test]
fn a_device_says_how_many_threads_it_has() {
    assert_eq!(Cpu::new(3).unwrap().threads(), 3);
}
