//! See src/ops/rms_norm and src/ops/layer_norm.

use cuvee::Result;
use cuvee::device::Reference;
use cuvee::ops::{Backend, layer_norm, rms_norm};

use super::Visitor;
use crate::common::case::{Case, Slot, Spec, contents, normals, output_of, put, run, zero};

/// The last is summed by a whole block on a GPU.
pub const SHAPES: [[usize; 2]; 6] = [[1, 31], [3, 123], [47, 31], [252, 123], [3, 5], [3, 2081]];

pub const EPS: f32 = 1e-2;

pub struct RmsNorm(pub [usize; 2]);

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
            Spec::set("rstd", [rows, 1]).always_f32().per_row(),
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

pub struct RmsNormBackward {
    pub shape: [usize; 2],
    pub wanted: bool,
}

impl RmsNormBackward {
    pub fn full(shape: [usize; 2]) -> Self {
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
            Spec::input("rstd", [rows, 1]).map(|x| 1.0 / (x * x + 0.5)).always_f32().per_row(),
            Spec::add("dx", [rows, hidden]).per_row(),
            Spec::add("dweight", [1, hidden]).always_f32(),
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

pub struct LayerNorm(pub [usize; 2]);

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
            Spec::set("stats", [rows, 2]).always_f32().per_row(),
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

pub struct LayerNormBackward {
    pub shape: [usize; 2],
    pub wanted: [bool; 2],
}

impl LayerNormBackward {
    pub fn full(shape: [usize; 2]) -> Self {
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
            Spec::input("stats", [rows, 2]).with(&stats).always_f32().per_row(),
            Spec::add("dx", [rows, hidden]).per_row(),
            Spec::add("dweight", [1, hidden]).always_f32(),
            Spec::add("dbias", [1, hidden]).always_f32(),
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

pub fn rms_norm<V: Visitor>(v: &mut V) {
    SHAPES.iter().for_each(|shape| v.close(&RmsNorm(*shape)));
    for shape in [[47, 123], [252, 31]] {
        v.repeatable(&RmsNorm(shape));
        v.rows(&RmsNorm(shape));
    }
    v.nan(&RmsNorm([5, 31]));
    v.shapes(&RmsNorm([3, 5]));
}

pub fn rms_norm_backward<V: Visitor>(v: &mut V) {
    SHAPES.iter().for_each(|shape| v.close(&RmsNormBackward::full(*shape)));
    for shape in [[47, 123], [252, 31]] {
        v.repeatable(&RmsNormBackward::full(shape));
        v.rows(&RmsNormBackward::full(shape));
        v.twice(&RmsNormBackward::full(shape));
    }
    let full = RmsNormBackward::full([47, 31]);
    v.unwanted(&full, &RmsNormBackward { wanted: false, ..full }, &["dweight"], &[false]);
    v.nan(&RmsNormBackward::full([5, 31]));
    v.shapes(&RmsNormBackward::full([3, 5]));
}

pub fn layer_norm<V: Visitor>(v: &mut V) {
    SHAPES.iter().for_each(|shape| v.close(&LayerNorm(*shape)));
    for shape in [[47, 123], [252, 31]] {
        v.repeatable(&LayerNorm(shape));
        v.rows(&LayerNorm(shape));
    }
    v.nan(&LayerNorm([5, 31]));
    v.shapes(&LayerNorm([3, 5]));
}

pub fn layer_norm_backward<V: Visitor>(v: &mut V) {
    SHAPES.iter().for_each(|shape| v.close(&LayerNormBackward::full(*shape)));
    for shape in [[47, 123], [252, 31]] {
        v.repeatable(&LayerNormBackward::full(shape));
        v.rows(&LayerNormBackward::full(shape));
        v.twice(&LayerNormBackward::full(shape));
    }
    let full = LayerNormBackward::full([47, 31]);
    for wanted in [[false, false], [true, false], [false, true]] {
        v.unwanted(&full, &LayerNormBackward { wanted, ..full }, &["dweight", "dbias"], &wanted);
    }
    v.nan(&LayerNormBackward::full([5, 31]));
    v.shapes(&LayerNormBackward::full([3, 5]));
}

pub fn rms_norm_of_a_zero_row_is_finite<D: Backend>(device: &D) {
    let case = RmsNorm([3, 31]);
    let mut specs = case.specs();
    zero(&mut specs, &["x"]);
    let values = run(device, &case, &specs);
    assert!(output_of(&specs, &values, "y").iter().all(|y| *y == 0.0));
    assert!(output_of(&specs, &values, "rstd").iter().all(|r| (r - 10.0).abs() < 1e-5));
}

/// mean(x^2) - mean^2 would have no digit left here.
pub fn layer_norm_bears_a_large_mean_and_a_constant_row<D: Backend>(device: &D) {
    let case = LayerNorm([3, 31]);
    let mut specs = case.specs();
    let shifted: Vec<f64> = contents(&specs, "x").iter().map(|x| f64::from((x + 3e4) as f32)).collect();
    put(&mut specs, "x", &shifted);
    let [ours, oracle] = [run(device, &case, &specs), run(&Reference, &case, &specs)];
    let off = ours[3].iter().zip(&oracle[3]).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(off < 2e-2, "off by {off}: more than the rounding of the mean explains");
    put(&mut specs, "x", &[5.0; 93]);
    let values = run(device, &case, &specs);
    assert!(output_of(&specs, &values, "y").iter().zip(contents(&specs, "bias").iter().cycle()).all(|(y, b)| y == b));
}
