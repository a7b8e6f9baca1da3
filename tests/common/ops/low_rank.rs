//! See src/ops/low_rank.

use cuvee::Result;
use cuvee::ops::{Backend, low_rank};

use super::{Visitor, below};
use crate::common::case::{Case, Slot, Spec};

/// Rows, inputs, outputs, rank.
pub const SHAPES: [[usize; 4]; 6] =
    [[1, 31, 123, 1], [3, 123, 507, 8], [47, 31, 31, 16], [252, 123, 33, 5], [13, 507, 35, 64], [600, 35, 40, 3]];

/// A power of two, and one whose product rounds.
pub const SCALES: [f32; 2] = [2.0, 0.7];

pub struct LowRank {
    pub shape: [usize; 4],
    pub scale: f32,
}

impl Case for LowRank {
    fn op(&self) -> &'static str {
        "low_rank"
    }

    fn specs(&self) -> Vec<Spec> {
        let [rows, inputs, outputs, rank] = self.shape;
        vec![
            Spec::input("x", [rows, inputs]).per_row(),
            Spec::input("a", [rank, inputs]),
            Spec::input("b", [outputs, rank]),
            Spec::scratch("scratch", [rows, rank]).of_storage().per_row(),
            Spec::add("y", [rows, outputs]).per_row().narrowed(),
        ]
    }

    fn run<D: Backend>(&self, device: &D, t: &mut [Slot<D>]) -> Result<()> {
        tensors!(t => x, a, b, scratch, y);
        device.low_rank(low_rank::Forward {
            x: x.view(),
            a: a.view(),
            b: b.view(),
            scale: self.scale,
            blend: None,
            scratch: scratch.view_mut(),
            y: y.view_mut(),
        })
    }

    fn naive(&self, _: &[Spec], t: &mut [Vec<f32>]) {
        let [rows, _, outputs, rank] = self.shape;
        tensors!(t => x, a, b, scratch, y);
        *scratch = down(self.shape, self.scale, x, a);
        for (r, o) in (0..rows).flat_map(|r| (0..outputs).map(move |o| (r, o))) {
            let mut sum = 0.0;
            (0..rank).for_each(|k| sum += scratch[r * rank + k] * b[o * rank + k]);
            y[r * outputs + o] += sum;
        }
    }
}

/// `scale x A^T`
fn down([rows, inputs, _, rank]: [usize; 4], scale: f32, x: &[f32], a: &[f32]) -> Vec<f32> {
    let mut t = vec![0.0; rows * rank];
    for (r, k) in (0..rows).flat_map(|r| (0..rank).map(move |k| (r, k))) {
        (0..inputs).for_each(|i| t[r * rank + k] += x[r * inputs + i] * a[k * inputs + i]);
        t[r * rank + k] *= scale;
    }
    t
}

/// Where each row has its own weight for each of some adapters.
pub struct Blended {
    pub shape: [usize; 4],
    pub adapters: usize,
}

impl Case for Blended {
    fn op(&self) -> &'static str {
        "low_rank"
    }

    fn specs(&self) -> Vec<Spec> {
        let [rows, _, _, rank] = self.shape;
        let mut specs = LowRank { shape: self.shape, scale: 0.7 }.specs();
        specs.push(Spec::input("weights", [rows, self.adapters]).per_row().always_f32());
        specs.push(Spec::index("owner", 1, below("owner", rank, self.adapters)));
        specs
    }

    fn run<D: Backend>(&self, device: &D, t: &mut [Slot<D>]) -> Result<()> {
        tensors!(t => x, a, b, scratch, y, weights, owner);
        device.low_rank(low_rank::Forward {
            x: x.view(),
            a: a.view(),
            b: b.view(),
            scale: 0.7,
            blend: Some(low_rank::Blend { weights: weights.view(), owner: owner.view() }),
            scratch: scratch.view_mut(),
            y: y.view_mut(),
        })
    }

    fn naive(&self, specs: &[Spec], t: &mut [Vec<f32>]) {
        let [rows, _, outputs, rank] = self.shape;
        let owner = &specs[6].indices;
        tensors!(t => x, a, b, scratch, y, weights, _owner);
        *scratch = down(self.shape, 0.7, x, a);
        for (r, k) in (0..rows).flat_map(|r| (0..rank).map(move |k| (r, k))) {
            scratch[r * rank + k] *= weights[r * self.adapters + owner[k] as usize];
        }
        for (r, o) in (0..rows).flat_map(|r| (0..outputs).map(move |o| (r, o))) {
            let sum = (0..rank).fold(0.0, |sum, k| sum + scratch[r * rank + k] * b[o * rank + k]);
            y[r * outputs + o] += sum;
        }
    }
}

pub struct LowRankBackward {
    pub shape: [usize; 4],
    pub scale: f32,
    /// dA, dB
    pub wanted: [bool; 2],
}

impl LowRankBackward {
    pub fn full(shape: [usize; 4], scale: f32) -> Self {
        Self { shape, scale, wanted: [true; 2] }
    }
}

impl Case for LowRankBackward {
    fn op(&self) -> &'static str {
        "low_rank_backward"
    }

    fn specs(&self) -> Vec<Spec> {
        let [rows, inputs, outputs, rank] = self.shape;
        vec![
            Spec::input("dy", [rows, outputs]).per_row(),
            Spec::input("x", [rows, inputs]).per_row(),
            Spec::input("a", [rank, inputs]),
            Spec::input("b", [outputs, rank]),
            Spec::scratch("scratch", [rows, rank]).of_storage().per_row(),
            Spec::add("dx", [rows, inputs]).per_row().narrowed(),
            Spec::add("da", [rank, inputs]).always_f32().narrowed(),
            Spec::add("db", [outputs, rank]).always_f32().narrowed(),
        ]
    }

    fn run<D: Backend>(&self, device: &D, t: &mut [Slot<D>]) -> Result<()> {
        tensors!(t => dy, x, a, b, scratch, dx, da, db);
        device.low_rank_backward(low_rank::Backward {
            dy: dy.view(),
            x: x.view(),
            a: a.view(),
            b: b.view(),
            scale: self.scale,
            scratch: scratch.view_mut(),
            dx: dx.view_mut(),
            da: da.wanted(self.wanted[0]),
            db: db.wanted(self.wanted[1]),
        })
    }

    fn naive(&self, _: &[Spec], t: &mut [Vec<f32>]) {
        let [rows, inputs, outputs, rank] = self.shape;
        tensors!(t => dy, x, a, b, scratch, dx, da, db);
        *scratch = down(self.shape, self.scale, x, a);
        for (r, k) in (0..rows).flat_map(|r| (0..rank).map(move |k| (r, k))) {
            let mut u = 0.0;
            for o in 0..outputs {
                db[o * rank + k] += dy[r * outputs + o] * scratch[r * rank + k];
                u += dy[r * outputs + o] * b[o * rank + k];
            }
            for i in 0..inputs {
                da[k * inputs + i] += self.scale * u * x[r * inputs + i];
                dx[r * inputs + i] += self.scale * u * a[k * inputs + i];
            }
        }
    }
}

/// Ragged ends in every direction, and more rows than the CPU takes at a time.
const PROMISES: [[usize; 4]; 2] = [[47, 123, 507, 7], [530, 31, 33, 16]];

pub fn forward<V: Visitor>(v: &mut V) {
    for (i, shape) in SHAPES.into_iter().enumerate() {
        v.close(&LowRank { shape, scale: SCALES[i % 2] });
    }
    for shape in PROMISES {
        v.repeatable(&LowRank { shape, scale: 0.7 });
        v.rows(&LowRank { shape, scale: 0.7 });
    }
    v.twice(&LowRank { shape: [47, 31, 123, 4], scale: 2.0 });
    v.nan(&LowRank { shape: [14, 31, 35, 4], scale: 2.0 });
    v.shapes(&LowRank { shape: [3, 5, 4, 2], scale: 2.0 });
    for (shape, adapters) in [([1, 31, 123, 1], 1), ([8, 123, 507, 24], 3), ([252, 123, 33, 5], 2)] {
        v.close(&Blended { shape, adapters });
    }
    for (shape, adapters) in PROMISES.into_iter().zip([3, 4]) {
        v.repeatable(&Blended { shape, adapters });
        v.rows(&Blended { shape, adapters });
    }
}

pub fn backward<V: Visitor>(v: &mut V) {
    for (i, shape) in SHAPES.into_iter().enumerate() {
        v.close(&LowRankBackward::full(shape, SCALES[i % 2]));
    }
    for shape in PROMISES {
        v.repeatable(&LowRankBackward::full(shape, 0.7));
        v.rows(&LowRankBackward::full(shape, 0.7));
    }
    let full = LowRankBackward::full([47, 31, 123, 4], 2.0);
    v.twice(&full);
    for wanted in [[false; 2], [true, false], [false, true]] {
        v.unwanted(&full, &LowRankBackward { wanted, ..full }, &["da", "db"], &wanted);
    }
    v.nan(&LowRankBackward::full([14, 31, 35, 4], 2.0));
    v.shapes(&LowRankBackward::full([3, 5, 4, 2], 2.0));
}
