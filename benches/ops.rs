//! Time of the ops at the shapes of two models. Products and attention report FLOP/s (as elements per second, a
//! multiply-add is two), the others bytes per second of what must be read and written once.
//!
//! `cargo bench --bench ops` takes three minutes; a filter such as `linear` or `quickstart` less. The group `peak` is
//! the yardstick: fused multiply-adds on registers alone, on as many threads. RAYON_NUM_THREADS=1 measures one core.

use std::collections::BTreeSet;
use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main, measurement::WallTime};
use cuvee::device::{Arena, Cpu, Device, Isa, Kind, Philox, Products, Tensor};
use cuvee::ops::attention::{Attention, Dims, NO_PARENT, Segment};
use cuvee::ops::linear::Linear;
use cuvee::ops::logprob_head::{LogprobHead, scratch_shape};
use cuvee::ops::merged_update::{Adam, Form, MergedUpdate, Rounding, Rule, Step};
use cuvee::ops::rms_norm::RmsNorm;
use cuvee::ops::rope::Rope;
use cuvee::ops::swiglu::SwiGlu;
use cuvee::ops::token_kl::{Ref, TokenKl};
use cuvee::ops::{attention, linear, logprob_head, merged_update, rms_norm, rope, swiglu, token_kl};
use rayon::prelude::*;

#[derive(Clone, Copy)]
struct Shape {
    name: &'static str,
    rows: usize,
    hidden: usize,
    mlp: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    vocab: usize,
}

const SHAPES: [Shape; 2] = [
    Shape {
        name: "smollm2-135m",
        rows: 512,
        hidden: 576,
        mlp: 1536,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        vocab: 49_152,
    },
    Shape { name: "quickstart", rows: 960, hidden: 128, mlp: 384, heads: 8, kv_heads: 4, head_dim: 16, vocab: 2048 },
];

struct Bench {
    cpu: Cpu,
    arena: Arena<Cpu>,
    drawn: u64,
}

impl Bench {
    fn new() -> Self {
        let cpu = Cpu::new(0).expect("threads start");
        let arena = Arena::with_bytes(&cpu, 1 << 30).expect("a GiB is there");
        Self { cpu, arena, drawn: 0 }
    }

    /// Normal numbers of a deviation of 0.1.
    fn random(&mut self, rows: usize, cols: usize) -> Tensor<Cpu> {
        self.drawn += 1;
        let random = Philox::new(1, self.drawn);
        let mut tensor = self.arena.floats(Kind::Activations, rows, cols);
        let values: Vec<f32> = (0..rows * cols).map(|i| 0.1 * random.normal(i as u64) as f32).collect();
        self.cpu.write_f32(&values, tensor.view_mut()).expect("a copy");
        tensor
    }

    fn indices(&mut self, cols: usize, values: &[u32]) -> Tensor<Cpu> {
        let mut tensor = self.arena.indices(Kind::Activations, values.len() / cols, cols);
        self.cpu.write_u32(values, tensor.view_mut()).expect("a copy");
        tensor
    }
}

fn measure(group: &mut BenchmarkGroup<WallTime>, name: String, throughput: Throughput, mut op: impl FnMut()) {
    group.throughput(throughput);
    group.bench_function(name, |b| b.iter(&mut op));
}

fn flop(count: usize) -> Throughput {
    Throughput::Elements(count as u64)
}

fn floats(count: usize) -> Throughput {
    Throughput::Bytes(4 * count as u64)
}

/// Runs so many rounds; returns something that depends on all of them.
type RegisterLoop = fn(usize) -> f32;

/// Chains of fused multiply-adds on registers, enough of them to hide the latency: (run `rounds`, FLOP of a round).
#[cfg(target_arch = "x86_64")]
fn register_loop(isa: Isa) -> Option<(RegisterLoop, usize)> {
    use std::arch::x86_64::*;
    const CHAINS: usize = 12;
    #[target_feature(enable = "avx512f")]
    fn avx512(rounds: usize) -> f32 {
        let (factor, term) = (_mm512_set1_ps(black_box(0.999)), _mm512_set1_ps(black_box(1e-3)));
        let mut sums = [_mm512_set1_ps(1.0); CHAINS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, factor, term);
            }
        }
        sums.into_iter().map(|sum| _mm512_reduce_add_ps(sum)).sum()
    }
    #[target_feature(enable = "avx2,fma")]
    fn avx2(rounds: usize) -> f32 {
        let (factor, term) = (_mm256_set1_ps(black_box(0.999)), _mm256_set1_ps(black_box(1e-3)));
        let mut sums = [_mm256_set1_ps(1.0); CHAINS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, factor, term);
            }
        }
        sums.into_iter().map(|sum| _mm256_cvtss_f32(sum)).sum()
    }
    match isa {
        // SAFETY: `Isa::detect` found the features on this machine.
        Isa::Avx512 => Some((|rounds| unsafe { avx512(rounds) }, 2 * 16 * CHAINS)),
        // SAFETY: as above.
        Isa::Avx2 => Some((|rounds| unsafe { avx2(rounds) }, 2 * 8 * CHAINS)),
        Isa::Portable => None,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn register_loop(_: Isa) -> Option<(RegisterLoop, usize)> {
    None
}

fn peak(c: &mut Criterion) {
    const ROUNDS: usize = 1 << 16;
    let cpu = Cpu::new(0).expect("threads start");
    let Some((run, flop_per_round)) = register_loop(cpu.isa()) else { return };
    let mut group = c.benchmark_group("peak");
    for threads in BTreeSet::from([1, cpu.threads()]) {
        let name = format!("{:?}, {threads} threads", cpu.isa());
        measure(&mut group, name, flop(threads * ROUNDS * flop_per_round), || {
            cpu.run(|| {
                (0..threads).into_par_iter().with_max_len(1).for_each(|_| {
                    black_box(run(ROUNDS));
                })
            });
        });
    }
    group.finish();
}

/// Rows, inputs, outputs: a layer of SmolLM2 up and down, one of Qwen2 0.5B, one of the quickstart, and decoding.
const LINEAR: [[usize; 3]; 5] =
    [[1200, 576, 1536], [1200, 1536, 576], [2048, 896, 4864], [960, 128, 384], [1, 576, 1536]];

/// Chains, then what the machine multiplies with if that is something else; on one thread and on all.
fn bench_linear(c: &mut Criterion) {
    let fastest = Cpu::new(1).expect("threads start");
    let mut devices = vec![Cpu::with_isa(1, Isa::detect()).expect("threads start")];
    if fastest.products() != Products::Chains {
        devices.push(fastest);
    }
    devices.extend(Some(Cpu::new(0).expect("threads start")).filter(|cpu| cpu.threads() > 1));
    for [rows, inputs, outputs] in LINEAR {
        let mut group = c.benchmark_group(format!("linear/{rows}x{inputs}x{outputs}"));
        for cpu in &devices {
            let mut b = Bench::new();
            let (x, weight, mut y) = (b.random(rows, inputs), b.random(outputs, inputs), b.random(rows, outputs));
            let (mut dx, mut dweight) = (b.random(rows, inputs), b.random(outputs, inputs));
            let (on, product) =
                (format!("{:?}, {} threads", cpu.products(), cpu.threads()), 2 * rows * inputs * outputs);
            measure(&mut group, format!("forward, {on}"), flop(product), || {
                let (x, weight, y) = (x.view(), weight.view(), y.view_mut());
                cpu.linear(linear::Forward { x, weight, bias: None, residual: None, y }).expect("shapes fit");
            });
            for (which, wanted) in [("dx", [true, false]), ("dweight", [false, true])] {
                measure(&mut group, format!("{which}, {on}"), flop(product), || {
                    let dx = wanted[0].then(|| dx.view_mut());
                    let dweight = wanted[1].then(|| dweight.view_mut());
                    let (dy, x, weight) = (y.view(), x.view(), weight.view());
                    let arguments = linear::Backward { dy, x, weight, dx, dweight, dbias: None };
                    cpu.linear_backward(arguments).expect("shapes fit");
                });
            }
        }
        group.finish();
    }
}

fn bench_head(c: &mut Criterion) {
    for s in SHAPES {
        let mut group = c.benchmark_group(format!("logprob_head/{}", s.name));
        let (mut b, rows) = (Bench::new(), s.rows);
        let (h, weight) = (b.random(rows, s.hidden), b.random(s.vocab, s.hidden));
        let target: Vec<u32> = (0..rows).map(|i| (i * 7919 % s.vocab) as u32).collect();
        let target = b.indices(1, &target);
        let [scratch_rows, scratch_cols] = scratch_shape(rows);
        let mut scratch = b.random(scratch_rows, scratch_cols);
        let (mut logp, mut lse, dlogp) = (b.random(rows, 1), b.random(rows, 1), b.random(rows, 1));
        let (mut dh, mut dweight) = (b.random(rows, s.hidden), b.random(s.vocab, s.hidden));
        let (shape, product) = (format!("{rows}x{}x{}", s.hidden, s.vocab), 2 * rows * s.hidden * s.vocab);
        measure(&mut group, format!("forward {shape}"), flop(product), || {
            let (h, weight, target, scratch) = (h.view(), weight.view(), target.view(), scratch.view_mut());
            let (logp, lse) = (logp.view_mut(), lse.view_mut());
            b.cpu
                .logprob_head(logprob_head::Forward {
                    h,
                    weight,
                    target,
                    scale: 1.0,
                    scratch,
                    logp,
                    lse,
                    entropy: None,
                    ln_sum_p2: None,
                })
                .expect("shapes fit");
        });
        measure(&mut group, format!("backward {shape}"), flop(3 * product), || {
            let arguments = logprob_head::Backward {
                h: h.view(),
                weight: weight.view(),
                target: target.view(),
                scale: 1.0,
                lse: lse.view(),
                dlogp: dlogp.view(),
                dentropy: None,
                entropy: None,
                scratch: scratch.view_mut(),
                dh: dh.view_mut(),
                dweight: Some(dweight.view_mut()),
            };
            b.cpu.logprob_head_backward(arguments).expect("shapes fit");
        });
        group.finish();
    }
}

/// As `measure`; the best time, if the filter let it run.
fn best(
    group: &mut BenchmarkGroup<WallTime>,
    name: String,
    throughput: Throughput,
    mut op: impl FnMut(),
) -> Option<Duration> {
    let mut best = None;
    group.throughput(throughput);
    group.bench_function(name, |b| {
        b.iter_custom(|rounds| {
            let mut total = Duration::ZERO;
            for _ in 0..rounds {
                let start = Instant::now();
                op();
                let time = start.elapsed();
                best = Some(best.map_or(time, |best: Duration| best.min(time)));
                total += time;
            }
            total
        });
    });
    best
}

/// References at the head of SmolLM2, few rows: what another one costs, in products with its head.
fn bench_token_kl(c: &mut Criterion) {
    const ROWS: usize = 128;
    let Shape { name, hidden, vocab, .. } = SHAPES[0];
    let mut group = c.benchmark_group(format!("token_kl/{name}"));
    let mut b = Bench::new();
    let (h, weight, ref_weight) = (b.random(ROWS, hidden), b.random(vocab, hidden), b.random(vocab, hidden));
    let [rows, cols] = token_kl::scratch_shape(ROWS);
    let (mut scratch, mut logits) = (b.random(rows, cols), b.random(ROWS, vocab));
    let (mut dh, mut dweight) = (b.random(ROWS, hidden), b.random(vocab, hidden));
    let product = 2 * ROWS * hidden * vocab;
    let yardstick = best(&mut group, "product".into(), flop(product), || {
        let (x, weight, y) = (h.view(), weight.view(), logits.view_mut());
        b.cpu.linear(linear::Forward { x, weight, bias: None, residual: None, y }).expect("shapes fit");
    });
    let mut times = Vec::new();
    for k in [1, 2, 4] {
        let (mut kl, mut lse, dkl) = (b.random(k, ROWS), b.random(1 + k, ROWS), b.random(k, ROWS));
        let refs = vec![Ref { h: h.view(), weight: ref_weight.view() }; k];
        let forward = best(&mut group, format!("forward, {k} references"), flop((1 + k) * product), || {
            let (scratch, kl, lse) = (scratch.view_mut(), kl.view_mut(), lse.view_mut());
            let arguments =
                token_kl::Forward { h: h.view(), weight: weight.view(), refs: &refs, scale: 1.0, scratch, kl, lse };
            b.cpu.token_kl(arguments).expect("shapes fit");
        });
        let backward = best(&mut group, format!("backward, {k} references"), flop((3 + k) * product), || {
            let arguments = token_kl::Backward {
                h: h.view(),
                weight: weight.view(),
                refs: &refs,
                scale: 1.0,
                kl: kl.view(),
                lse: lse.view(),
                dkl: dkl.view(),
                scratch: scratch.view_mut(),
                dh: dh.view_mut(),
                dweight: Some(dweight.view_mut()),
            };
            b.cpu.token_kl_backward(arguments).expect("shapes fit");
        });
        times.push((k, [forward, backward]));
    }
    group.finish();
    let Some(yardstick) = yardstick else { return };
    println!("\n{ROWS} x {hidden} x {vocab}, one product {:.1} ms", 1e3 * yardstick.as_secs_f64());
    for (which, what) in ["forward", "backward"].into_iter().enumerate() {
        let of = |(k, times): &(usize, [Option<Duration>; 2])| Some((*k, times[which]?.as_secs_f64()));
        let known: Vec<(usize, f64)> = times.iter().filter_map(of).collect();
        for pair in known.windows(2) {
            let slope = (pair[1].1 - pair[0].1) / (pair[1].0 - pair[0].0) as f64 / yardstick.as_secs_f64();
            println!("token_kl {what}, from {} to {} references: {slope:.2} products each", pair[0].0, pair[1].0);
        }
    }
    println!();
}

/// One attention call: sequences, or pairs of completions behind a shared prompt.
struct Attend {
    name: &'static str,
    /// Heads, key/value heads, head size.
    heads: [usize; 3],
    /// Tokens of a prompt and of its completions.
    trees: &'static [&'static [u32]],
    /// How often all of them come.
    times: usize,
}

const ATTENDS: [Attend; 5] = [
    Attend {
        name: "smollm2-135m pairs",
        heads: [9, 3, 64],
        trees: &[&[100, 30, 60], &[200, 200, 120], &[300, 90, 150], &[400, 45, 75]],
        times: 1,
    },
    Attend { name: "smollm2-135m 512", heads: [9, 3, 64], trees: &[&[512]], times: 1 },
    Attend { name: "qwen3-0.6b 2048", heads: [16, 8, 128], trees: &[&[2048]], times: 1 },
    Attend { name: "quickstart pairs", heads: [8, 4, 16], trees: &[&[24, 16, 12]], times: 16 },
    Attend { name: "tiny 40", heads: [4, 2, 8], trees: &[&[40]], times: 16 },
];

impl Attend {
    /// A table that queries every row.
    fn table(&self) -> Vec<Segment> {
        let (mut table, mut start): (Vec<Segment>, u32) = (Vec::new(), 0);
        for tree in (0..self.times).flat_map(|_| self.trees) {
            let (root, prompt) = (table.len() as u32, tree[0]);
            for (i, len) in tree.iter().enumerate() {
                let (parent, position) = if i == 0 { (NO_PARENT, 0) } else { (root, prompt) };
                table.push(Segment { start, len: *len, parent, position, query_start: start, queries: *len });
                start += len;
            }
        }
        table
    }
}

fn bench_attention(c: &mut Criterion) {
    for s in ATTENDS {
        let mut group = c.benchmark_group(format!("attention/{}", s.name));
        let (mut b, table, [heads, kv_heads, head_dim]) = (Bench::new(), s.table(), s.heads);
        let rows = table.iter().map(|s| s.len as usize).sum();
        let longest = table.iter().map(|s| (s.position + s.len) as usize).max().unwrap_or(0);
        let dims = Dims { heads, kv_heads, head_dim, window: None, longest };
        let segments = b.indices(Segment::WORDS, bytemuck::cast_slice(&table));
        let (wide, narrow) = (heads * head_dim, kv_heads * head_dim);
        let [q, mut o, mut dq, d_o] = [(); 4].map(|()| b.random(rows, wide));
        let [k, v, mut dk, mut dv] = [(); 4].map(|()| b.random(rows, narrow));
        let mut lse = b.random(rows, heads);
        // What the mask leaves, exactly: each query meets the keys up to its own position.
        let seen = |s: &Segment| (0..s.len).map(|i| (s.position + i + 1) as usize).sum::<usize>();
        let product = 2 * wide * table.iter().map(seen).sum::<usize>();
        let segments = segments.view();
        let (q, k, v) = (q.view(), k.view(), v.view());
        measure(&mut group, "forward".into(), flop(2 * product), || {
            let (o, lse) = (o.view_mut(), lse.view_mut());
            b.cpu.attention(attention::Forward { dims, segments, q, k, v, o, lse }).expect("shapes fit");
        });
        measure(&mut group, "backward".into(), flop(5 * product), || {
            let (d_o, o, lse) = (d_o.view(), o.view(), lse.view());
            let (dq, dk, dv) = (dq.view_mut(), dk.view_mut(), dv.view_mut());
            let arguments = attention::Backward { dims, segments, d_o, q, k, v, o, lse, dq, dk, dv };
            b.cpu.attention_backward(arguments).expect("shapes fit");
        });
        group.finish();
    }
}

/// One new token against a cache: every key and value is read once.
fn bench_decoding(c: &mut Criterion) {
    for (s, len) in SHAPES.into_iter().flat_map(|s| [256, 4096].map(|len| (s, len))) {
        let mut group = c.benchmark_group(format!("decoding/{}", s.name));
        let (mut b, rows) = (Bench::new(), len as usize);
        let (wide, narrow) = (s.heads * s.head_dim, s.kv_heads * s.head_dim);
        let (q, k, v) = (b.random(1, wide), b.random(rows, narrow), b.random(rows, narrow));
        let (mut o, mut lse) = (b.random(1, wide), b.random(1, s.heads));
        let dims = Dims { heads: s.heads, kv_heads: s.kv_heads, head_dim: s.head_dim, window: None, longest: rows };
        let last = Segment { start: 0, len, parent: NO_PARENT, position: 0, query_start: 0, queries: 1 };
        let segments = b.indices(Segment::WORDS, bytemuck::cast_slice(&[last]));
        measure(&mut group, format!("attention 1x{len}"), floats(2 * rows * narrow), || {
            let (q, k, v, o, lse) = (q.view(), k.view(), v.view(), o.view_mut(), lse.view_mut());
            let segments = segments.view();
            b.cpu.attention(attention::Forward { dims, segments, q, k, v, o, lse }).expect("shapes fit");
        });
        group.finish();
    }
}

fn bench_memory_bound(c: &mut Criterion) {
    for s in SHAPES {
        let mut group = c.benchmark_group(format!("memory/{}", s.name));
        let (mut b, (rows, hidden, mlp)) = (Bench::new(), (s.rows, s.hidden, s.mlp));
        let (x, weight, mut y) = (b.random(rows, hidden), b.random(1, hidden), b.random(rows, hidden));
        let (mut rstd, mut dx, mut dweight) = (b.random(rows, 1), b.random(rows, hidden), b.random(1, hidden));
        measure(&mut group, format!("rms_norm forward {rows}x{hidden}"), floats(2 * rows * hidden), || {
            let (x, weight, y, rstd) = (x.view(), weight.view(), y.view_mut(), rstd.view_mut());
            b.cpu.rms_norm(rms_norm::Forward { x, weight, eps: 1e-5, y, rstd }).expect("shapes fit");
        });
        measure(&mut group, format!("rms_norm backward {rows}x{hidden}"), floats(4 * rows * hidden), || {
            let (dy, x, weight, rstd) = (y.view(), x.view(), weight.view(), rstd.view());
            let (dx, dweight) = (dx.view_mut(), Some(dweight.view_mut()));
            b.cpu.rms_norm_backward(rms_norm::Backward { dy, x, weight, rstd, dx, dweight }).expect("shapes fit");
        });
        let (half, mut heads) = (s.head_dim / 2, b.random(rows, s.heads * s.head_dim));
        let (cos, sin, positions) = (b.random(rows, half), b.random(rows, half), (0..rows as u32).collect::<Vec<_>>());
        let positions = b.indices(1, &positions);
        measure(&mut group, format!("rope {rows}x{}", heads.cols()), floats(2 * rows * heads.cols()), || {
            let (x, positions, cos, sin) = (heads.view_mut(), positions.view(), cos.view(), sin.view());
            let (head_dim, direction) = (s.head_dim, rope::Direction::Forward);
            b.cpu.rope(rope::Rotate { x, positions, cos, sin, head_dim, direction }).expect("shapes fit");
        });
        let (gate, up, mut y) = (b.random(rows, mlp), b.random(rows, mlp), b.random(rows, mlp));
        let (mut dgate, mut dup) = (b.random(rows, mlp), b.random(rows, mlp));
        measure(&mut group, format!("swiglu forward {rows}x{mlp}"), floats(3 * rows * mlp), || {
            b.cpu.swiglu(swiglu::Forward { gate: gate.view(), up: up.view(), y: y.view_mut() }).expect("shapes fit");
        });
        measure(&mut group, format!("swiglu backward {rows}x{mlp}"), floats(5 * rows * mlp), || {
            let (dy, gate, up, dgate, dup) = (y.view(), gate.view(), up.view(), dgate.view_mut(), dup.view_mut());
            b.cpu.swiglu_backward(swiglu::Backward { dy, gate, up, dgate, dup }).expect("shapes fit");
        });
        // The largest tensor of the model: its embedding.
        let shape = [s.vocab, hidden];
        let [grad, mut weight, mut m, mut v] = [(); 4].map(|()| b.random(shape[0], shape[1]));
        b.cpu.zero(v.view_mut()).expect("a fill");
        let step = Step {
            adam: Adam { beta1: 0.9, beta2: 0.999, eps: 1e-8, form: Form::Torch },
            rule: Rule::Adam,
            step: 10,
            learning_rate: 1e-4,
            weight_decay: 0.01,
            clip: 1.0,
            gradient_reserve_rate: 1.0,
            merges: true,
            share: 0.0,
            rounding: Rounding::Nearest,
            random: Philox::new(0, 0),
        };
        measure(
            &mut group,
            format!("merged_update {}x{}", shape[0], shape[1]),
            floats(7 * shape[0] * shape[1]),
            || {
                let (grad, weight) = (grad.view(), weight.view_mut());
                let (first_moment, second_moment) = (m.view_mut(), v.view_mut());
                let arguments = merged_update::Args {
                    step,
                    grad,
                    weight,
                    master: None,
                    first_moment,
                    second_moment,
                    since_merge: None,
                    average: None,
                    tau_ref: None,
                    scratch: None,
                    lost: None,
                };
                b.cpu.merged_update(arguments).expect("shapes fit");
            },
        );
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(1200))
        .without_plots();
    targets = peak, bench_linear, bench_head, bench_token_kl, bench_attention, bench_decoding, bench_memory_bound
}
criterion_main!(benches);
