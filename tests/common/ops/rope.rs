//! See src/ops/rope.

use cuvee::Result;
use cuvee::device::Reference;
use cuvee::ops::Backend;
use cuvee::ops::rope::{self, Direction};

use super::{Visitor, below};
use crate::common::case::{Case, Slot, Spec, run, specs_on};

#[derive(Clone, Copy)]
pub struct Rope {
    pub rows: usize,
    pub heads: usize,
    pub head_dim: usize,
    pub rotary: usize,
    pub direction: Direction,
}

const TABLE: usize = 300;
const SMALL: Rope = Rope { rows: 3, heads: 2, head_dim: 7, rotary: 4, direction: Direction::Forward };

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
            Spec::input("cos", [TABLE, half]).with(&table(f64::cos)).always_f32(),
            Spec::input("sin", [TABLE, half]).with(&table(f64::sin)).always_f32(),
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
pub fn ropes() -> Vec<Rope> {
    let shapes = [(1, 1, 2, 2), (3, 3, 64, 64), (47, 2, 80, 20), (252, 1, 16, 16), (130, 4, 5, 4)];
    let both = |(rows, heads, head_dim, rotary)| {
        [Direction::Forward, Direction::Backward].map(|direction| Rope { rows, heads, head_dim, rotary, direction })
    };
    shapes.into_iter().flat_map(both).collect()
}

pub fn rope<V: Visitor>(v: &mut V) {
    for case in ropes() {
        v.close(&case);
        v.repeatable(&case);
        if case.rows > 3 {
            v.rows(&case);
        }
    }
    v.shapes(&SMALL);
}

/// A NaN in x stays in its pair or, beyond the rotary part, where it is; the tables count only where they are read.
pub fn rope_keeps_a_nan_in_its_pair<D: Backend>(device: &D) {
    let mut specs = specs_on(device, &SMALL);
    specs[0].values[6] = f64::NAN;
    specs[0].values[14 + 1] = f64::NAN;
    let nans = |v: &[Vec<f64>]| (0..42).filter(|i| v[0][*i].is_nan()).collect::<Vec<_>>();
    assert_eq!(nans(&run(device, &SMALL, &specs)), vec![6, 15, 17]);
    assert_eq!(nans(&run(&Reference, &SMALL, &specs)), vec![6, 15, 17]);
}
