//! See src/ops/logprob_head.

use cuvee::Result;
use cuvee::device::Reference;
use cuvee::ops::{Backend, logprob_head};

use super::{Visitor, below};
use crate::common::case::{Case, Slot, Spec, output_of, put, run, zero};
use crate::common::checks::assert_close;

/// Rows, hidden, vocab. Vocabularies of real models at few rows; more rows than a tile; no multiple of a tile.
pub const SHAPES: [[usize; 3]; 7] =
    [[1, 31, 123], [252, 123, 507], [47, 31, 8003], [3, 123, 513], [3, 31, 49_152], [3, 31, 50_257], [1027, 5, 600]];

#[derive(Clone, Copy)]
pub struct Head {
    pub shape: [usize; 3],
    /// Factor on the weights, hence on the logits.
    pub scale: f64,
    /// 1 / temperature
    pub cooling: f32,
    /// Entropy, and its gradient; ln sum p^2.
    pub entropy: bool,
}

/// 1 / 0.7, which no power of two divides.
pub const COOL: f32 = 1.0 / 0.7;

impl Head {
    /// Logits of a spread near 1: where one entry holds all the probability, the error of one logit, a matter of
    /// luck, would be all that is compared.
    pub fn new(shape: [usize; 3]) -> Self {
        Self { shape, scale: (shape[1] as f64).powf(-0.5), cooling: 1.0, entropy: true }
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
        let dot = |w: &[f32]| w.iter().zip(h).fold(0.0, |sum, (w, h)| sum + w * h);
        weight.chunks_exact(h.len()).map(|w| self.cooling * dot(w)).collect()
    }
}

impl Case for Head {
    fn op(&self) -> &'static str {
        "logprob_head"
    }

    fn specs(&self) -> Vec<Spec> {
        let outputs = ["logp", "lse", "entropy", "ln_sum_p2"]
            .map(|name| Spec::set(name, [self.shape[0], 1]).always_f32().per_row());
        self.inputs().into_iter().chain(outputs).collect()
    }

    fn run<D: Backend>(&self, device: &D, t: &mut [Slot<D>]) -> Result<()> {
        tensors!(t => h, weight, target, scratch, logp, lse, entropy, ln_sum_p2);
        device.logprob_head(logprob_head::Forward {
            h: h.view(),
            weight: weight.view(),
            target: target.view(),
            scale: self.cooling,
            scratch: scratch.view_mut(),
            logp: logp.view_mut(),
            lse: lse.view_mut(),
            entropy: entropy.wanted(self.entropy),
            ln_sum_p2: ln_sum_p2.wanted(self.entropy),
        })
    }

    fn naive(&self, specs: &[Spec], t: &mut [Vec<f32>]) {
        tensors!(t => h, weight, _target, _scratch, logp, lse, entropy, ln_sum_p2);
        for (r, h) in h.chunks_exact(self.shape[1]).enumerate() {
            let logits = self.naive_logits(h, weight);
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            lse[r] = max + logits.iter().fold(0.0, |sum, l| sum + (l - max).exp()).ln();
            logp[r] = logits[specs[2].indices[r] as usize] - lse[r];
            entropy[r] = -logits.iter().fold(0.0, |sum, l| sum + (l - lse[r]).exp() * (l - lse[r]));
            ln_sum_p2[r] = logits.iter().fold(0.0, |sum, l| sum + (2.0 * (l - lse[r])).exp()).ln();
        }
    }

    fn may_grow(&self) -> &[&'static str] {
        &["weight", "scratch"]
    }
}

pub struct HeadBackward {
    pub head: Head,
    pub wanted: bool,
}

impl HeadBackward {
    pub fn full(shape: [usize; 3]) -> Self {
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
        let made = run(&Reference, &self.head, &forward);
        let rest = [
            Spec::input("lse", [rows, 1]).with(&made[5]).always_f32().per_row(),
            Spec::input("dlogp", [rows, 1]).always_f32().per_row(),
            Spec::input("dentropy", [rows, 1]).always_f32().per_row(),
            Spec::input("entropy", [rows, 1]).with(&made[6]).always_f32().per_row(),
            Spec::add("dh", [rows, hidden]).narrowed().per_row(),
            Spec::add("dweight", [vocab, hidden]).always_f32().narrowed(),
        ];
        self.head.inputs().into_iter().chain(rest).collect()
    }

    fn run<D: Backend>(&self, device: &D, t: &mut [Slot<D>]) -> Result<()> {
        tensors!(t => h, weight, target, scratch, lse, dlogp, dentropy, entropy, dh, dweight);
        device.logprob_head_backward(logprob_head::Backward {
            h: h.view(),
            weight: weight.view(),
            target: target.view(),
            scale: self.head.cooling,
            lse: lse.view(),
            dlogp: dlogp.view(),
            dentropy: self.head.entropy.then(|| dentropy.view()),
            entropy: self.head.entropy.then(|| entropy.view()),
            scratch: scratch.view_mut(),
            dh: dh.view_mut(),
            dweight: dweight.wanted(self.wanted),
        })
    }

    fn naive(&self, specs: &[Spec], t: &mut [Vec<f32>]) {
        tensors!(t => h, weight, _target, _scratch, lse, dlogp, dentropy, entropy, dh, dweight);
        let hidden = self.head.shape[1];
        for (r, h) in h.chunks_exact(hidden).enumerate() {
            for (v, l) in self.head.naive_logits(h, weight).into_iter().enumerate() {
                let hit = if specs[2].indices[r] as usize == v { 1.0 } else { 0.0 };
                let (ln_p, p) = (l - lse[r], (l - lse[r]).exp());
                let dl = dlogp[r] * (hit - p);
                let dl = if self.head.entropy { dl - dentropy[r] * p * (ln_p + entropy[r]) } else { dl };
                let dl = self.head.cooling * dl;
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

const PROMISES: [[usize; 3]; 3] = [[47, 123, 507], [252, 31, 1100], [1027, 5, 513]];

pub fn forward<V: Visitor>(v: &mut V) {
    SHAPES.iter().for_each(|shape| v.close(&Head::new(*shape)));
    [[252, 123, 507], [3, 31, 49_152]].iter().for_each(|shape| v.close(&Head { cooling: COOL, ..Head::new(*shape) }));
    let full = Head::new([47, 31, 600]);
    v.unwanted(&full, &Head { entropy: false, ..full }, &["entropy", "ln_sum_p2"], &[false, false]);
    for shape in PROMISES {
        v.repeatable(&Head::new(shape));
        v.rows(&Head::new(shape));
    }
    v.nan(&Head::new([5, 31, 600]));
    v.shapes(&Head::new([3, 5, 7]));
}

pub fn backward<V: Visitor>(v: &mut V) {
    SHAPES.iter().for_each(|shape| v.close(&HeadBackward::full(*shape)));
    for shape in [[252, 123, 507], [3, 31, 49_152]] {
        v.close(&HeadBackward { head: Head { cooling: COOL, ..Head::new(shape) }, wanted: true });
    }
    v.close(&HeadBackward { head: Head { entropy: false, ..Head::new([47, 31, 600]) }, wanted: true });
    for shape in PROMISES {
        v.repeatable(&HeadBackward::full(shape));
        v.rows(&HeadBackward::full(shape));
    }
    let full = HeadBackward::full([47, 31, 600]);
    v.twice(&full);
    v.unwanted(&full, &HeadBackward { wanted: false, ..full }, &["dweight"], &[false]);
    v.nan(&HeadBackward::full([5, 31, 600]));
    v.shapes(&HeadBackward::full([3, 5, 7]));
}

pub fn logprob_head_takes_extreme_logits<D: Backend>(device: &D) {
    for logit in [1e4, -1e4] {
        let case = Head { scale: 1.0, ..Head::new([4, 1, 1100]) };
        let mut specs = case.specs();
        // One entry stands `logit` away from all others, in the first, a middle or the last tile.
        for at in [0, 600, 1099] {
            put(&mut specs, "h", &[1.0, -1.0, 0.5, 0.0]);
            let mut weight = vec![0.0; 1100];
            weight[at] = logit;
            put(&mut specs, "weight", &weight);
            let (found, oracle) = (run(device, &case, &specs), run(&Reference, &case, &specs));
            for (i, name) in [(4, "logp"), (5, "lse"), (6, "entropy"), (7, "ln_sum_p2")] {
                let (found, oracle) = (&found[i], &oracle[i]);
                assert!(found.iter().all(|x| x.is_finite()), "{name}, {logit} at {at}: {found:?}");
                // An ulp of 1e4 is 1e-3; the oracle itself is the straightforward evaluation here.
                assert_close(&format!("{name}, {logit} at {at}"), found, oracle, oracle, 0.5_f64.powi(21));
            }
        }
    }
}

/// A shifted softmax must not depend on the tile in which the maximum lies.
pub fn logprob_head_backward_sums_to_zero_over_the_vocabulary<D: Backend>(device: &D) {
    let case = HeadBackward::full([3, 1, 1100]);
    let mut specs = case.specs();
    put(&mut specs, "h", &[1.0; 3]);
    let forward = Head::new([3, 1, 1100]);
    let mut first = forward.specs();
    put(&mut first, "h", &[1.0; 3]);
    let made = run(device, &forward, &first);
    put(&mut specs, "lse", &made[5]);
    put(&mut specs, "entropy", &made[6]);
    zero(&mut specs, &["dh", "dweight"]);
    let values = run(device, &case, &specs);
    let sum: f64 = output_of(&specs, &values, "dweight").iter().sum();
    assert!(sum.abs() < 1e-5, "sum of dl over the vocabulary: {sum:e}");
}
