//! See src/ops/token_kl.

use cuvee::Result;
use cuvee::device::Reference;
use cuvee::ops::Backend;
use cuvee::ops::token_kl::{self, Ref};

use super::Visitor;
use super::head::COOL;
use crate::common::case::{Case, Slot, Spec, contents, output_of, put, run, zero};

/// Names of what a reference brings.
const REFS: [[&str; 2]; 4] = [
    ["hidden rows of 0", "head of 0"],
    ["hidden rows of 1", "head of 1"],
    ["hidden rows of 2", "head of 2"],
    ["hidden rows of 3", "head of 3"],
];
/// Tensors of both directions before those of the references.
const FORWARD: usize = 5;
const BACKWARD: usize = 8;

#[derive(Clone, Copy)]
pub struct TokenKl {
    pub rows: usize,
    pub vocab: usize,
    /// The policy's, then each reference's.
    pub hidden: &'static [usize],
    /// Of the logits: 1 / temperature.
    pub scale: f32,
}

impl TokenKl {
    fn refs(&self) -> usize {
        self.hidden.len() - 1
    }

    /// `[hidden rows, head]` of a model: logits of a spread near 1.
    fn model(&self, names: [&'static str; 2], hidden: usize) -> [Spec; 2] {
        let scale = (hidden as f64).powf(-0.5);
        let h = Spec::input(names[0], [self.rows, hidden]).per_row();
        [h, Spec::input(names[1], [self.vocab, hidden]).map(|x| x * scale)]
    }

    fn scratch(&self) -> Spec {
        Spec::scratch("scratch", token_kl::scratch_shape(self.rows))
    }

    /// Of `each` reference, `[K, rows]`; with the policy, `[1 + K, rows]`.
    fn shapes(&self) -> [[usize; 2]; 2] {
        [[self.refs(), self.rows], [1 + self.refs(), self.rows]]
    }

    fn references(&self) -> impl Iterator<Item = Spec> + '_ {
        REFS.into_iter().zip(&self.hidden[1..]).flat_map(|(names, hidden)| self.model(names, *hidden))
    }
}

fn views<D: Backend>(t: &[Slot<D>]) -> Vec<Ref<'_, D>> {
    t.chunks_exact(2).map(|t| Ref { h: t[0].view(), weight: t[1].view() }).collect()
}

/// Log-probabilities of one row, in f32.
fn naive_log_softmax(h: &[f32], weight: &[f32], scale: f32) -> (Vec<f32>, f32) {
    let dot = |w: &[f32]| scale * w.iter().zip(h).fold(0.0, |sum, (w, h)| sum + w * h);
    let logits: Vec<f32> = weight.chunks_exact(h.len()).map(dot).collect();
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let lse = max + logits.iter().fold(0.0, |sum, l| sum + (l - max).exp()).ln();
    (logits.into_iter().map(|l| l - lse).collect(), lse)
}

fn row(h: &[f32], rows: usize, r: usize) -> &[f32] {
    let hidden = h.len() / rows;
    &h[r * hidden..][..hidden]
}

impl Case for TokenKl {
    fn op(&self) -> &'static str {
        "token_kl"
    }

    fn specs(&self) -> Vec<Spec> {
        let [h, weight] = self.model(["h", "weight"], self.hidden[0]);
        let [of_refs, of_all] = self.shapes();
        let kl = Spec::set("kl", of_refs).always_f32().per_col();
        let lse = Spec::set("lse", of_all).always_f32().per_col();
        [h, weight, self.scratch(), kl, lse].into_iter().chain(self.references()).collect()
    }

    fn run<D: Backend>(&self, device: &D, t: &mut [Slot<D>]) -> Result<()> {
        let (t, refs) = t.split_at_mut(FORWARD);
        tensors!(t => h, weight, scratch, kl, lse);
        device.token_kl(token_kl::Forward {
            h: h.view(),
            weight: weight.view(),
            refs: &views(refs),
            scale: self.scale,
            scratch: scratch.view_mut(),
            kl: kl.view_mut(),
            lse: lse.view_mut(),
        })
    }

    fn naive(&self, _: &[Spec], t: &mut [Vec<f32>]) {
        let (t, refs) = t.split_at_mut(FORWARD);
        tensors!(t => h, weight, _scratch, kl, lse);
        for r in 0..self.rows {
            let (ln_p, of_policy) = naive_log_softmax(row(h, self.rows, r), weight, self.scale);
            lse[r] = of_policy;
            for (k, reference) in refs.chunks_exact(2).enumerate() {
                let (ln_q, of_ref) = naive_log_softmax(row(&reference[0], self.rows, r), &reference[1], self.scale);
                lse[(1 + k) * self.rows + r] = of_ref;
                kl[k * self.rows + r] = ln_p.iter().zip(&ln_q).fold(0.0, |sum, (p, q)| sum + p.exp() * (p - q));
            }
        }
    }

    fn may_grow(&self) -> &[&'static str] {
        &["scratch"]
    }
}

#[derive(Clone, Copy)]
pub struct TokenKlBackward {
    pub forward: TokenKl,
    pub wanted: bool,
}

impl TokenKlBackward {
    pub fn full(forward: TokenKl) -> Self {
        Self { forward, wanted: true }
    }
}

impl Case for TokenKlBackward {
    fn op(&self) -> &'static str {
        "token_kl_backward"
    }

    fn specs(&self) -> Vec<Spec> {
        let f = &self.forward;
        let specs = f.specs();
        let made = run(&Reference, f, &specs);
        let [h, weight] = f.model(["h", "weight"], f.hidden[0]);
        let [of_refs, of_all] = f.shapes();
        let given = |name, shape| Spec::input(name, shape).with(output_of(&specs, &made, name)).always_f32().per_col();
        let dkl = Spec::input("dkl", of_refs).always_f32().per_col();
        let dh = Spec::add("dh", [f.rows, f.hidden[0]]).narrowed().per_row();
        let dweight = Spec::add("dweight", [f.vocab, f.hidden[0]]).always_f32().narrowed();
        let first = [h, weight, given("kl", of_refs), given("lse", of_all), dkl, f.scratch(), dh, dweight];
        first.into_iter().chain(f.references()).collect()
    }

    fn run<D: Backend>(&self, device: &D, t: &mut [Slot<D>]) -> Result<()> {
        let (t, refs) = t.split_at_mut(BACKWARD);
        tensors!(t => h, weight, kl, lse, dkl, scratch, dh, dweight);
        device.token_kl_backward(token_kl::Backward {
            h: h.view(),
            weight: weight.view(),
            refs: &views(refs),
            scale: self.forward.scale,
            kl: kl.view(),
            lse: lse.view(),
            dkl: dkl.view(),
            scratch: scratch.view_mut(),
            dh: dh.view_mut(),
            dweight: dweight.wanted(self.wanted),
        })
    }

    fn naive(&self, _: &[Spec], t: &mut [Vec<f32>]) {
        let (t, refs) = t.split_at_mut(BACKWARD);
        tensors!(t => h, weight, kl, lse, dkl, _scratch, dh, dweight);
        let TokenKl { rows, scale, .. } = self.forward;
        let hidden = self.forward.hidden[0];
        let shifted = |(ln, own): (Vec<f32>, f32), given: f32| ln.into_iter().map(move |x| x + own - given);
        for r in 0..rows {
            let h = row(h, rows, r);
            let ln_p: Vec<f32> = shifted(naive_log_softmax(h, weight, scale), lse[r]).collect();
            let mut dl = vec![0.0; self.forward.vocab];
            for (k, reference) in refs.chunks_exact(2).enumerate() {
                let at = k * rows + r;
                let ln_q =
                    shifted(naive_log_softmax(row(&reference[0], rows, r), &reference[1], scale), lse[rows + at]);
                for (dl, (p, q)) in dl.iter_mut().zip(ln_p.iter().zip(ln_q)) {
                    *dl += dkl[at] * p.exp() * (p - q - kl[at]);
                }
            }
            for (v, dl) in dl.into_iter().enumerate() {
                let dl = scale * dl;
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

/// Every number of references, other hidden sizes than the policy's, more rows and entries than a tile, a vocabulary of a
/// real model.
const CASES: [TokenKl; 7] = [
    TokenKl { rows: 1, vocab: 123, hidden: &[31, 31], scale: 1.0 },
    TokenKl { rows: 252, vocab: 507, hidden: &[31, 8, 123], scale: COOL },
    TokenKl { rows: 47, vocab: 8003, hidden: &[16, 31, 5, 1], scale: 1.0 },
    TokenKl { rows: 3, vocab: 513, hidden: &[123, 31, 123, 16, 40], scale: 1.0 },
    TokenKl { rows: 3, vocab: 50_257, hidden: &[5, 9], scale: 1.0 },
    TokenKl { rows: 1027, vocab: 600, hidden: &[5, 3], scale: 1.0 },
    TokenKl { rows: 130, vocab: 1100, hidden: &[32, 64], scale: COOL },
];

const PROMISES: [TokenKl; 3] = [
    TokenKl { rows: 47, vocab: 507, hidden: &[31, 16, 8], scale: 1.0 },
    TokenKl { rows: 252, vocab: 1100, hidden: &[8, 31], scale: 1.0 },
    TokenKl { rows: 1027, vocab: 513, hidden: &[5, 3, 1, 2], scale: 1.0 },
];

const SMALL: TokenKl = TokenKl { rows: 5, vocab: 600, hidden: &[31, 16, 7], scale: 1.0 };
const TINY: TokenKl = TokenKl { rows: 3, vocab: 7, hidden: &[5, 4, 6], scale: 1.0 };

pub fn forward<V: Visitor>(v: &mut V) {
    CASES.iter().for_each(|case| v.close(case));
    for case in &PROMISES {
        v.repeatable(case);
        v.rows(case);
    }
    v.nan(&SMALL);
    v.shapes(&TINY);
}

pub fn backward<V: Visitor>(v: &mut V) {
    CASES.iter().for_each(|case| v.close(&TokenKlBackward::full(*case)));
    for case in PROMISES {
        v.repeatable(&TokenKlBackward::full(case));
        v.rows(&TokenKlBackward::full(case));
    }
    let full = TokenKlBackward::full(TokenKl { rows: 47, ..SMALL });
    v.twice(&full);
    v.unwanted(&full, &TokenKlBackward { wanted: false, ..full }, &["dweight"], &[false]);
    v.nan(&TokenKlBackward::full(SMALL));
    v.shapes(&TokenKlBackward::full(TINY));
}

/// Two references that are the policy itself, and one whose every logit is larger by the same: all are the policy's
/// distribution.
pub fn token_kl_to_the_same_distribution_is_zero<D: Backend>(device: &D) {
    const ROWS: usize = 5;
    let case = TokenKl { rows: ROWS, vocab: 1100, hidden: &[31, 31, 31, 32], scale: 1.0 };
    let mut specs: Vec<Spec> = case.specs().into_iter().map(|s| s.stored(device.storage())).collect();
    for scale in [1.0, 64.0] {
        let [h, weight] = ["h", "weight"].map(|name| contents(&specs, name));
        let h: Vec<f64> = h.iter().map(|x| x * scale).collect();
        put(&mut specs, "h", &h);
        for [rows, head] in &REFS[..2] {
            put(&mut specs, rows, &h);
            put(&mut specs, head, &weight);
        }
        let beside =
            |all: &[f64], last: f64| all.chunks_exact(31).flat_map(|row| [row, &[last]].concat()).collect::<Vec<_>>();
        put(&mut specs, REFS[2][0], &beside(&h, 16.0));
        put(&mut specs, REFS[2][1], &beside(&weight, 1.0));
        let found = run(device, &case, &specs);
        let (kl, lse) = (output_of(&specs, &found, "kl"), output_of(&specs, &found, "lse"));
        for (i, kl) in kl.iter().enumerate() {
            let size = lse[ROWS + i].abs().max(1.0);
            assert!(kl.abs() <= 1e-6 * size, "reference {}: {kl:e}, log-sum-exp {size}", i / ROWS);
            assert!(*kl == 0.0 || i / ROWS == 2, "reference {}: the same logits, and yet {kl:e}", i / ROWS);
        }

        let backward = TokenKlBackward::full(case);
        let mut back: Vec<Spec> = backward.specs().into_iter().map(|s| s.stored(device.storage())).collect();
        for name in ["h", "weight"].into_iter().chain(REFS[..3].iter().flatten().copied()) {
            let values = contents(&specs, name);
            put(&mut back, name, &values);
        }
        put(&mut back, "kl", kl);
        put(&mut back, "lse", lse);
        zero(&mut back, &["dh", "dweight"]);
        let dkl: Vec<f64> = (0..3 * ROWS).map(|i| if i < 2 * ROWS { 1.0 } else { 0.0 }).collect();
        put(&mut back, "dkl", &dkl);
        let found = run(device, &backward, &back);
        for name in ["dh", "dweight"] {
            assert!(output_of(&back, &found, name).iter().all(|x| *x == 0.0), "{name} is not 0");
        }
    }
}

/// Logits of the first entries of one row, by their products: 1e20 times -1e20 is -inf in f32 and nearly that in f64.
fn extreme(case: &TokenKl, policy: &[f64], reference: &[f64]) -> Vec<Spec> {
    let mut specs = case.specs();
    for (names, logits) in [(["h", "weight"], policy), (REFS[0], reference)] {
        let single = |x: f64| f64::from(x as f32);
        let weight: Vec<f64> = (0..case.vocab).map(|v| single(logits[v % logits.len()] * 1e-20)).collect();
        put(&mut specs, names[0], &vec![single(1e20); case.rows]);
        put(&mut specs, names[1], &weight);
    }
    specs
}

/// Entries without probability, in whichever of the two distributions.
pub fn token_kl_takes_probabilities_of_zero<D: Backend>(device: &D) {
    const NEVER: f64 = -1e40;
    let case = TokenKl { rows: 3, vocab: 1200, hidden: &[1, 1], scale: 1.0 };
    let kl = |policy: &[f64], reference: &[f64]| {
        let specs = extreme(&case, policy, reference);
        let found = run(device, &case, &specs);
        let kl = output_of(&specs, &found, "kl");
        assert!(kl.iter().all(|x| x.to_bits() == kl[0].to_bits()), "rows differ: {kl:?}");
        kl[0]
    };
    // The policy takes half of the entries, the reference all of them, or the same half, or the other half.
    let half = 2.0_f64.ln();
    let apart = (kl(&[0.0, NEVER], &[0.0, 0.0]) - half).abs();
    assert!(apart < 1e-5, "off by {apart:e}");
    assert_eq!(kl(&[0.0, NEVER], &[0.0, NEVER]), 0.0);
    assert!(
        kl(&[0.0, 0.0], &[0.0, NEVER]) > 1e30,
        "a reference without a token that the policy takes is infinitely far"
    );
    assert!(kl(&[0.0, NEVER], &[NEVER, 0.0]) > 1e30);
    // Logits far apart, and far from 0: of what all of a row have in common, only its rounding counts.
    let found = kl(&[1e4, 1e4 + 1.0], &[-1e4, -1e4]);
    let expected = 2.0_f64.ln() - (1.0 + (-1.0_f64).exp()).ln() - (1.0 / (1.0 + 1.0_f64.exp()));
    assert!((found - expected).abs() < 1e4 * 0.5_f64.powi(20), "{found}, expected {expected}");
    assert!((kl(&[0.0, 1e4], &[1e4, 0.0]) - 1e4).abs() < 1.0);
}

/// Rows of dl sum to zero: KL does not change where all logits of a row move alike.
pub fn token_kl_backward_sums_to_zero_over_the_vocabulary<D: Backend>(device: &D) {
    let case = TokenKlBackward::full(TokenKl { rows: 3, vocab: 1100, hidden: &[1, 5, 3], scale: 1.0 });
    let mut specs = case.specs();
    let mut first = case.forward.specs();
    put(&mut specs, "h", &[1.0; 3]);
    put(&mut first, "h", &[1.0; 3]);
    let made = run(device, &case.forward, &first);
    for name in ["kl", "lse"] {
        put(&mut specs, name, output_of(&first, &made, name));
    }
    zero(&mut specs, &["dh", "dweight"]);
    let values = run(device, &case, &specs);
    let sum: f64 = output_of(&specs, &values, "dweight").iter().sum();
    assert!(sum.abs() < 1e-5, "sum of dl over the vocabulary: {sum:e}");
}
