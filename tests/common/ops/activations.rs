//! See src/ops/swiglu and src/ops/gelu.

use cuvee::Result;
use cuvee::ops::gelu::{self, Curve};
use cuvee::ops::{Backend, swiglu};

use super::Visitor;
use crate::common::case::{Case, Slot, Spec, output_of, put, run};

pub struct SwiGlu(pub [usize; 2]);

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

pub struct SwiGluBackward(pub [usize; 2]);

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

pub const CURVES: [Curve; 2] = [Curve::Exact, Curve::Tanh];

pub struct Gelu(pub Curve, pub [usize; 2]);

/// f32 erf by the series that the oracle uses in f64.
pub fn naive_erf(x: f32) -> f32 {
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= 2.0 * x * x / (2 * n + 1) as f32;
        sum += term;
    }
    if x.abs() > 4.0 { x.signum() } else { 2.0 / std::f32::consts::PI.sqrt() * (-x * x).exp() * sum }
}

/// P and P' as transformers writes them.
pub fn naive_gate(curve: Curve, x: f32) -> (f32, f32) {
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

pub struct GeluBackward(pub Curve, pub [usize; 2]);

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

const SHAPES: [[usize; 2]; 4] = [[1, 31], [3, 123], [47, 507], [252, 123]];

pub fn swiglu<V: Visitor>(v: &mut V) {
    SHAPES.iter().for_each(|shape| v.close(&SwiGlu(*shape)));
    v.repeatable(&SwiGlu([252, 123]));
    v.rows(&SwiGlu([252, 123]));
    v.nan(&SwiGlu([3, 31]));
    v.shapes(&SwiGlu([3, 5]));
}

pub fn swiglu_backward<V: Visitor>(v: &mut V) {
    SHAPES.iter().for_each(|shape| v.close(&SwiGluBackward(*shape)));
    v.repeatable(&SwiGluBackward([252, 123]));
    v.rows(&SwiGluBackward([252, 123]));
    v.twice(&SwiGluBackward([47, 31]));
    v.nan(&SwiGluBackward([3, 31]));
    v.shapes(&SwiGluBackward([3, 5]));
}

pub fn gelu<V: Visitor>(v: &mut V) {
    for curve in CURVES {
        SHAPES.iter().for_each(|shape| v.close(&Gelu(curve, *shape)));
        v.repeatable(&Gelu(curve, [252, 123]));
        v.rows(&Gelu(curve, [252, 123]));
        v.nan(&Gelu(curve, [3, 31]));
        v.shapes(&Gelu(curve, [3, 5]));
    }
}

pub fn gelu_backward<V: Visitor>(v: &mut V) {
    for curve in CURVES {
        SHAPES.iter().for_each(|shape| v.close(&GeluBackward(curve, *shape)));
        v.repeatable(&GeluBackward(curve, [252, 123]));
        v.rows(&GeluBackward(curve, [252, 123]));
        v.twice(&GeluBackward(curve, [47, 31]));
        v.nan(&GeluBackward(curve, [3, 31]));
        v.shapes(&GeluBackward(curve, [3, 5]));
    }
}

pub fn swiglu_saturates_without_nan<D: Backend>(device: &D) {
    let shape = [1, 8];
    let gates: [f64; 8] = [-1e4, -100.0, -88.8, -87.0, 87.0, 88.8, 100.0, 1e4];
    let mut specs = SwiGlu(shape).specs();
    put(&mut specs, "gate", &gates.map(|g| f64::from(g as f32)));
    put(&mut specs, "up", &[1.0; 8]);
    let values = run(device, &SwiGlu(shape), &specs);
    for (g, y) in gates.iter().zip(output_of(&specs, &values, "y")) {
        assert!((y - g.max(0.0)).abs() <= 1e-5 * g.abs(), "silu({g}) = {y}");
    }
    let mut specs = SwiGluBackward(shape).specs();
    put(&mut specs, "gate", &gates.map(|g| f64::from(g as f32)));
    assert!(run(device, &SwiGluBackward(shape), &specs).iter().flatten().all(|x| x.is_finite()));
}

/// Digits of PyTorch's float64 gelu; the curves differ in the fourth.
pub fn gelu_has_the_values_of_others_and_saturates_without_nan<D: Backend>(device: &D) {
    let at: [f64; 12] = [-1e20, -100.0, -30.5, -13.0, -1.0, 0.0, 1.0, 2.5, 13.0, 30.5, 100.0, 1e20];
    let known = [
        (Curve::Exact, [-0.15865525393145702, 0.0, 0.841344746068543, 2.4844758366855597]),
        (Curve::Tanh, [-0.15880800939172324, 0.0, 0.8411919906082768, 2.484915733910001]),
    ];
    for (curve, known) in known {
        let case = Gelu(curve, [1, at.len()]);
        let mut specs = case.specs();
        put(&mut specs, "x", &at.map(|x| f64::from(x as f32)));
        let values = run(device, &case, &specs);
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
        assert!(run(device, &case, &specs).iter().flatten().all(|x| x.is_finite()), "{curve:?}");
    }
}
