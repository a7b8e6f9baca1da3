//! See src/ops/attention.

use cuvee::Result;
use cuvee::device::Reference;
use cuvee::ops::Backend;
use cuvee::ops::attention::{self, NO_PARENT, Segment};

use super::Visitor;
use crate::common::case::{Case, Slot, Spec, contents, put, refusal, run, specs_on};

/// (length, parent) of each segment, to a table that queries every row.
pub fn forest(segments: &[(usize, Option<usize>)]) -> Vec<Segment> {
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
pub fn forests() -> [Vec<Segment>; 3] {
    [
        forest(&[(70, None), (40, Some(0)), (9, Some(0)), (131, None)]),
        forest(&[(1, None), (3, Some(0)), (1, Some(0)), (64, Some(0)), (65, Some(0)), (7, Some(0))]),
        forest(&[(50, None), (33, Some(0)), (20, Some(1)), (60, Some(1)), (5, Some(0)), (2, None), (1, Some(5))]),
    ]
}

pub fn dims(heads: usize, kv_heads: usize, head_dim: usize, window: Option<usize>) -> attention::Dims {
    attention::Dims { heads, kv_heads, head_dim, window, longest: 200 }
}

/// Head groups, head sizes and windows around the block size, each at least once.
pub fn all_dims() -> Vec<attention::Dims> {
    let rows = [
        (2, 2, 5, None),
        (4, 2, 16, Some(7)),
        (4, 1, 64, Some(64)),
        (3, 3, 80, Some(65)),
        (2, 1, 16, Some(200)),
        (4, 4, 5, Some(1)),
        (6, 3, 64, None),
        (4, 1, 128, None),
    ];
    rows.into_iter().map(|(heads, kv_heads, head_dim, window)| dims(heads, kv_heads, head_dim, window)).collect()
}

#[derive(Clone)]
pub struct Attention {
    pub dims: attention::Dims,
    pub segments: Vec<Segment>,
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

    pub fn at(&self, row: usize, head: usize) -> std::ops::Range<usize> {
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
            Spec::set("o", [self.query_rows(), self.width()]).narrowed(),
            Spec::set("lse", [self.query_rows(), self.dims.heads]).always_f32(),
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

pub struct AttentionBackward(pub Attention);

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
            Spec::input("lse", [rows, a.dims.heads]).with(&forward[5]).always_f32(),
            Spec::set("dq", [rows, wide]).narrowed(),
            Spec::set("dk", [rows, narrow]).narrowed(),
            Spec::set("dv", [rows, narrow]).narrowed(),
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

/// Head sizes of real models and odd ones, on trees that stretch what a GPU cuts into tiles: a path over many segments, as
/// many segments as rows, queries that see more than two tiles of keys.
pub fn stretched() -> Vec<Attention> {
    let chain: Vec<_> = (0..12_usize).map(|i| (5 + 7 * (i % 3), i.checked_sub(1))).collect();
    let crumbs: Vec<_> =
        (0..45).map(|i| (1 + i % 2, if i % 9 == 0 { None } else { Some(i - 1 - i % 9 / 4) })).collect();
    let long: Vec<_> = vec![(150, None), (170, Some(0)), (1, Some(1)), (129, None)];
    let cases = [
        (dims(2, 1, 96, None), &chain),
        (dims(2, 2, 31, Some(40)), &chain),
        (dims(4, 2, 64, None), &crumbs),
        (dims(2, 1, 80, Some(3)), &crumbs),
        (dims(2, 1, 128, None), &long),
        (dims(1, 1, 256, Some(130)), &long),
        (dims(2, 1, 64, Some(65)), &long),
        (dims(3, 1, 31, None), &long),
    ];
    let case = |(dims, segments): (attention::Dims, &Vec<_>)| Attention {
        dims: attention::Dims { longest: 321, ..dims },
        segments: forest(segments),
    };
    cases.map(case).into()
}

/// Every forest once, every dims once, the deep forest with all dims.
pub fn attentions() -> Vec<Attention> {
    let [pair, group, deep] = forests();
    let all = all_dims().into_iter().map(|dims| Attention { dims, segments: deep.clone() });
    let pairs = all_dims().into_iter().step_by(2).map(|dims| Attention { dims, segments: pair.clone() });
    let groups = all_dims().into_iter().skip(1).step_by(2).map(|dims| Attention { dims, segments: group.clone() });
    all.chain(pairs).chain(groups).collect()
}

/// Rows `rows` of a `[_, cols]` tensor.
pub fn pick(x: &[f64], cols: usize, rows: &[usize]) -> Vec<f64> {
    rows.iter().flat_map(|r| &x[r * cols..(r + 1) * cols]).copied().collect()
}

/// `o` and `lse` of a case with the given contents.
pub fn attend<D: Backend>(device: &D, case: &Attention, q: &[f64], k: &[f64], v: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let mut specs = specs_on(device, case);
    put(&mut specs, "q", q);
    put(&mut specs, "k", k);
    put(&mut specs, "v", v);
    let mut values = run(device, case, &specs);
    let lse = values.pop().unwrap();
    (values.pop().unwrap(), lse)
}

/// Attention with more key rows than the table names.
pub struct Decoding {
    pub attention: Attention,
    /// Query rows, key rows.
    pub rows: [usize; 2],
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
            Spec::set("o", [queries, a.width()]).narrowed(),
            Spec::set("lse", [queries, a.dims.heads]).always_f32(),
        ]
    }

    fn run<D: Backend>(&self, device: &D, t: &mut [Slot<D>]) -> Result<()> {
        self.attention.run(device, t)
    }

    fn naive(&self, _: &[Spec], _: &mut [Vec<f32>]) {}
}

pub fn forward<V: Visitor>(v: &mut V) {
    attentions().iter().chain(&stretched()).for_each(|case| v.close(case));
    stretched().iter().for_each(|case| v.repeatable(case));
    attentions().iter().step_by(3).for_each(|case| v.repeatable(case));
    promised().iter().for_each(|case| v.nan(case));
    v.shapes(&small());
}

pub fn backward<V: Visitor>(v: &mut V) {
    attentions().into_iter().chain(stretched()).for_each(|case| v.close(&AttentionBackward(case)));
    stretched().into_iter().for_each(|case| v.repeatable(&AttentionBackward(case)));
    for case in attentions().into_iter().step_by(3).map(AttentionBackward) {
        v.repeatable(&case);
        v.twice(&case);
    }
    promised().into_iter().for_each(|case| v.nan(&AttentionBackward(case)));
    v.shapes(&AttentionBackward(small()));
}

fn promised() -> [Attention; 2] {
    let [pair, _, deep] = forests();
    [(dims(4, 2, 5, Some(65)), pair), (dims(2, 1, 16, None), deep)].map(|(dims, segments)| Attention { dims, segments })
}

fn small() -> Attention {
    Attention { dims: dims(4, 2, 5, None), segments: forest(&[(2, None), (1, Some(0))]) }
}

pub fn attention_refuses_heads_that_share_unevenly<D: Backend>(device: &D) {
    for kv_heads in [0, 3] {
        let case = Attention { dims: dims(4, kv_heads, 5, None), segments: forest(&[(2, None)]) };
        let message = refusal(device, &case, &specs_on(device, &case)).expect("an error").to_string();
        assert!(message.contains(&format!("4 heads do not share {kv_heads} kv_heads evenly")), "{message}");
    }
}

/// Sharing on = sharing off, a sequence alone = among others: every path alone, all its rows.
pub fn attention_over_a_shared_prefix_has_the_bits_of_the_unrolled_sequence<D: Backend>(device: &D) {
    for tree in attentions() {
        let specs = tree.specs();
        let (q, k, v) = (contents(&specs, "q"), contents(&specs, "k"), contents(&specs, "v"));
        let (o, lse) = attend(device, &tree, &q, &k, &v);
        for index in 0..tree.segments.len() {
            let rows = tree.path(index);
            let alone = Attention { dims: tree.dims, segments: forest(&[(rows.len(), None)]) };
            let (wide, narrow, heads) = (tree.width(), tree.kv_width(), tree.dims.heads);
            let (found, found_lse) =
                attend(device, &alone, &pick(&q, wide, &rows), &pick(&k, narrow, &rows), &pick(&v, narrow, &rows));
            assert!(found == pick(&o, wide, &rows), "segment {index}, {:?}", tree.dims);
            assert!(found_lse == pick(&lse, heads, &rows), "segment {index}, {:?}: lse", tree.dims);
        }
    }
}

/// A KV cache: the keys of each sequence lie in a slot with room behind it, only the last rows are queried.
pub fn attention_of_a_decoding_step_has_the_bits_of_the_whole_sequence<D: Backend>(device: &D) {
    const ROOM: usize = 150;
    for dims in all_dims() {
        let whole = Attention { dims, segments: forest(&[(140, None), (66, None)]) };
        let specs = whole.specs();
        let (q, k, v) = (contents(&specs, "q"), contents(&specs, "k"), contents(&specs, "v"));
        let (o, lse) = attend(device, &whole, &q, &k, &v);
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
            let mut specs = specs_on(device, &decoding);
            put(&mut specs, "q", &pick(&q, whole.width(), &rows));
            put(&mut specs, "k", &cache_k);
            put(&mut specs, "v", &cache_v);
            let found = run(device, &decoding, &specs);
            assert!(found[4] == pick(&o, whole.width(), &rows), "{step:?}, {dims:?}");
            assert!(found[5] == pick(&lse, dims.heads, &rows), "{step:?}, {dims:?}: lse");
        }
    }
}

pub fn attention_takes_extreme_scores<D: Backend>(device: &D) {
    let case = Attention { dims: dims(2, 1, 4, None), segments: forest(&[(130, None), (70, Some(0))]) };
    let specs = case.specs();
    let scaled = |name: &str| contents(&specs, name).iter().map(|x| x * 128.0).collect::<Vec<_>>();
    let (o, lse) = attend(device, &case, &scaled("q"), &scaled("k"), &contents(&specs, "v"));
    assert!(lse.iter().any(|x| *x > 1e4) && o.iter().chain(&lse).all(|x| x.is_finite()));
}

/// NaN and infinity in a token's q, k, v and dO stay with those who see it or are seen by it: everyone else's results
/// have the bits that they have without.
pub fn attention_keeps_what_is_broken_to_those_who_see_it<D: Backend>(device: &D) {
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
                    let (mut values, cols) = (contents(&specs, name), contents(&specs, name).len() / rows);
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
            let specs = specs_on(device, &case.0);
            let (whole, found) = (run(device, &case.0, &specs), run(device, &case.0, &broken(&specs, &["k", "v"])));
            check("o", &found[4], &whole[4], &|row| sees[row].0);
            let specs = specs_on(device, &case);
            let whole = run(device, &case, &specs);
            let found = run(device, &case, &broken(&specs, &["k", "v"]));
            check("dq", &found[7], &whole[7], &|row| sees[row].0);
            let found = run(device, &case, &broken(&specs, &["q", "d_o"]));
            check("dk", &found[8], &whole[8], &|row| sees[row].1);
            check("dv", &found[9], &whole[9], &|row| sees[row].1);
        }
    }
}
