//! See src/ops/rows.

use std::collections::BTreeSet;

use cuvee::Result;
use cuvee::device::DType;
use cuvee::ops::{Backend, rows};

use super::{Visitor, below};
use crate::common::case::{Case, Slot, Spec};

/// Picks `rows` of `n`.
#[derive(Clone, Copy)]
pub struct Gather {
    pub n: usize,
    pub rows: usize,
    pub cols: usize,
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

pub struct GatherAdd(pub Gather);

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

pub struct GatherBackward {
    pub gather: Gather,
    /// dx is a gradient of weights, f32 whatever dy is kept in.
    pub of_weights: bool,
}

impl Case for GatherBackward {
    fn op(&self) -> &'static str {
        "gather_backward"
    }

    fn specs(&self) -> Vec<Spec> {
        let Gather { n, rows, cols } = self.gather;
        let dx = Spec::add("dx", [n, cols]);
        vec![
            Spec::input("dy", [rows, cols]),
            Spec::index("index", 1, below("gather", rows, n)),
            if self.of_weights { dx.always_f32() } else { dx },
        ]
    }

    fn run<D: Backend>(&self, device: &D, t: &mut [Slot<D>]) -> Result<()> {
        tensors!(t => dy, index, dx);
        device.gather_backward(rows::GatherBackward { dy: dy.view(), index: index.view(), dx: dx.view_mut() })
    }

    fn naive(&self, specs: &[Spec], t: &mut [Vec<f32>]) {
        tensors!(t => dy, _index, dx);
        let cols = self.gather.cols;
        for (dy, index) in dy.chunks_exact(cols).zip(&specs[1].indices) {
            (0..cols).for_each(|j| dx[*index as usize * cols + j] += dy[j]);
        }
    }

    fn may_grow(&self) -> &[&'static str] {
        &["dx"]
    }
}

pub struct Scatter(pub Gather);

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

/// Of n, rows, columns. In the last every row is picked many times.
const SHAPES: [[usize; 3]; 4] = [[123, 1, 31], [8003, 47, 3], [2050, 252, 31], [5, 47, 123]];
const MANY: Gather = Gather { n: 507, rows: 47, cols: 31 };
const SMALL: Gather = Gather { n: 4, rows: 3, cols: 5 };

fn gathers() -> impl Iterator<Item = Gather> {
    SHAPES.into_iter().map(|[n, rows, cols]| Gather { n, rows, cols })
}

pub fn gather<V: Visitor>(v: &mut V) {
    gathers().for_each(|case| v.close(&case));
    v.rows(&MANY);
    v.repeatable(&MANY);
    v.shapes(&SMALL);
    v.nan(&Gather { n: 1, ..SMALL });
}

pub fn gather_add<V: Visitor>(v: &mut V) {
    gathers().for_each(|case| v.close(&GatherAdd(case)));
    v.rows(&GatherAdd(MANY));
    v.repeatable(&GatherAdd(MANY));
    v.twice(&GatherAdd(MANY));
    v.shapes(&GatherAdd(SMALL));
    v.nan(&GatherAdd(Gather { n: 1, ..SMALL }));
}

pub fn gather_backward<V: Visitor>(v: &mut V) {
    let kinds: &[bool] = if v.storage() == DType::F32 { &[true] } else { &[true, false] };
    for of_weights in kinds.iter().copied() {
        let case = |gather| GatherBackward { gather, of_weights };
        gathers().for_each(|gather| v.close(&case(gather)));
        v.repeatable(&case(Gather { n: 5000, rows: 4000, cols: 3 }));
        v.twice(&case(Gather { n: 31, rows: 123, cols: 5 }));
        v.shapes(&case(SMALL));
        v.nan(&case(SMALL));
    }
}

pub fn scatter<V: Visitor>(v: &mut V) {
    gathers().for_each(|gather| v.close(&Scatter(Gather { rows: gather.rows.min(gather.n), ..gather })));
    v.repeatable(&Scatter(MANY));
    v.shapes(&Scatter(SMALL));
}
