//! Time of each kernel at real models' shapes, in bfloat16, by the GPU's own clock: events around the op, with the L2 cache
//! flushed before. Ends with a table of what each reached of the bandwidth and the product speed measured in the same run.
//!
//! `cargo bench --bench cuda`; a filter such as `attention` as ever. Without a GPU it says so and measures nothing; under the
//! tests' emulator (`--test`) the shapes shrink, which proves that each benchmark runs.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use cuvee::Result;
use cuvee::device::cuda::{Options, probe};
use cuvee::device::{Arena, Cuda, DType, Device, Kind, Philox, Tensor};
use cuvee::ops::attention::{Attention, Dims, NO_PARENT, Segment};
use cuvee::ops::layer_norm::{LayerNorm, STATS};
use cuvee::ops::linear::Linear;
use cuvee::ops::logprob_head::{LogprobHead, scratch_shape};
use cuvee::ops::merged_update::{Adam, Consensus, DareVariant, Form, MergedUpdate, Rounding, Rule, Step};
use cuvee::ops::rms_norm::RmsNorm;
use cuvee::ops::rope::{Direction, Rope};
use cuvee::ops::rows::Rows;
use cuvee::ops::sum_squares::SumSquares;
use cuvee::ops::swiglu::SwiGlu;
use cuvee::ops::token_kl::{Ref, TokenKl};
use cuvee::ops::{
    attention, layer_norm, linear, logprob_head, merged_update, rms_norm, rope, rows, sum_squares, swiglu, token_kl,
};

const GIB: usize = 1 << 30;
/// More than any L2 cache holds.
const FLUSH_BYTES: usize = 256 << 20;
const NAME: &str = "cuvee emulator";

/// What an op must move and multiply at least; a multiply-add is two.
#[derive(Clone, Copy)]
struct Work {
    bytes: usize,
    flops: usize,
}

struct Bench {
    cuda: Cuda,
    /// Of shapes, under the emulator.
    shrink: usize,
    flush: RefCell<Tensor<Cuda>>,
    /// Best times by name, and what was done in them.
    best: RefCell<BTreeMap<String, (Duration, Work)>>,
}

impl Bench {
    fn open() -> Option<Self> {
        let emulated = match probe() {
            Ok(found) => found[0].name == NAME,
            Err(why) => {
                eprintln!("nothing to measure: {why}");
                return None;
            }
        };
        let cuda = Cuda::open(&Options::new(0, DType::Bf16)).expect("the GPU that was found");
        let bytes = if emulated { 1 << 10 } else { FLUSH_BYTES };
        let mut arena = Arena::with_bytes(&cuda, bytes).expect("memory");
        let flush = arena.take(Kind::Workspace, DType::F32, 1, bytes / 4);
        let shrink = if emulated { 32 } else { 1 };
        Some(Self { cuda, shrink, flush: RefCell::new(flush), best: RefCell::default() })
    }

    /// A dimension; what is a multiple of 128 stays one of 4.
    fn size(&self, full: usize) -> usize {
        full.div_ceil(self.shrink)
    }

    /// Numbers like those of a network: a deviation of 0.05. One block of random numbers, repeated: values do not change times,
    /// but zeros would spare power.
    fn tensor(&self, dtype: DType, rows: usize, cols: usize) -> Tensor<Cuda> {
        let mut arena = Arena::with_bytes(&self.cuda, Arena::<Cuda>::bytes_of(dtype, rows, cols)).expect("GPU memory");
        let mut tensor = arena.take(Kind::Activations, dtype, rows, cols);
        let random = Philox::new(1, 1);
        let block: Vec<f32> = (0..1 << 12).map(|i| 0.05 * random.normal(i) as f32).collect();
        let values: Vec<f32> = (0..rows * cols).map(|i| block[i % block.len()]).collect();
        self.cuda.write_f32(&values, tensor.view_mut()).expect("an upload");
        tensor
    }

    fn indices(&self, cols: usize, values: &[u32]) -> Tensor<Cuda> {
        let rows = values.len() / cols;
        let mut arena =
            Arena::with_bytes(&self.cuda, Arena::<Cuda>::bytes_of(DType::U32, rows, cols)).expect("GPU memory");
        let mut tensor = arena.take(Kind::Activations, DType::U32, rows, cols);
        self.cuda.write_u32(values, tensor.view_mut()).expect("an upload");
        tensor
    }

    fn measure(&self, c: &mut Criterion, name: &str, work: Work, mut op: impl FnMut(&Cuda) -> Result<()>) {
        c.bench_function(name, |b| {
            b.iter_custom(|rounds| {
                let mut total = Duration::ZERO;
                for _ in 0..rounds {
                    self.cuda.zero(self.flush.borrow_mut().view_mut()).expect("a flush");
                    let time = self.cuda.timed(|| op(&self.cuda)).expect("an op that runs");
                    let mut best = self.best.borrow_mut();
                    let known = best.entry(name.to_string()).or_insert((time, work));
                    known.0 = known.0.min(time);
                    total += time;
                }
                total
            });
        });
    }

    /// What one more reference costs, in products with its head of the speed that the same run measured.
    fn report_slopes(&self) {
        let best = self.best.borrow();
        let Some((time, work)) = best.get(PRODUCT) else { return };
        let of_flops = time.as_secs_f64() / work.flops as f64;
        for (what, pair) in ["forward", "backward"].into_iter().flat_map(|what| REFS.windows(2).map(move |p| (what, p)))
        {
            let [Some(fewer), Some(more)] = [pair[0], pair[1]].map(|k| best.get(&token_kl_name(what, k))) else {
                continue;
            };
            let product = of_flops * (more.1.flops - fewer.1.flops) as f64;
            let slope = (more.0.as_secs_f64() - fewer.0.as_secs_f64()) / product;
            println!("token_kl {what}, from {} to {} references: {slope:.2} products each", pair[0], pair[1]);
        }
    }

    fn report(&self) {
        let best = self.best.borrow();
        let rate = |name: &str, of: fn(&Work) -> usize| {
            best.get(name).map_or(f64::NAN, |(time, work)| of(work) as f64 / time.as_secs_f64())
        };
        let (bandwidth, products) = (rate(COPY, |w| w.bytes), rate(PRODUCT, |w| w.flops));
        println!("\n{}, {}\n", self.cuda.found().name, self.cuda.arithmetic());
        println!("| kernel | time | GB/s | of the copy | TFLOP/s | of the product |\n|---|---|---|---|---|---|");
        for (name, (time, work)) in best.iter() {
            let seconds = time.as_secs_f64();
            let (bytes, flops) = (work.bytes as f64 / seconds, work.flops as f64 / seconds);
            println!(
                "| {name} | {:.1} us | {:.0} | {:.0} % | {:.1} | {:.0} % |",
                1e6 * seconds,
                bytes / 1e9,
                100.0 * bytes / bandwidth,
                flops / 1e12,
                100.0 * flops / products
            );
        }
    }
}

/// The ceilings.
const COPY: &str = "copy 1 GiB";
const PRODUCT: &str = "product 8192 x 8192 x 8192";

fn ceilings(c: &mut Criterion, bench: &Bench) {
    let bytes = bench.size(GIB / 1024).pow(2) / bench.size(1024);
    let (from, mut to) = (bench.tensor(DType::F32, 1, bytes / 4), bench.tensor(DType::F32, 1, bytes / 4));
    bench.measure(c, COPY, Work { bytes: 2 * bytes, flops: 0 }, |cuda| cuda.copy(from.view(), to.view_mut()));
    let n = bench.size(8192);
    products(c, bench, "product", [n, n, n]);
}

fn products(c: &mut Criterion, bench: &Bench, model: &str, [rows, inputs, outputs]: [usize; 3]) {
    let name = |what: &str| format!("{model}{what} {rows} x {inputs} x {outputs}");
    let work =
        Work { bytes: 2 * (rows * inputs + inputs * outputs + rows * outputs), flops: 2 * rows * inputs * outputs };
    let (x, weight) = (bench.tensor(DType::Bf16, rows, inputs), bench.tensor(DType::Bf16, outputs, inputs));
    let mut y = bench.tensor(DType::Bf16, rows, outputs);
    let forward = if model == "product" { PRODUCT.to_string() } else { name(" linear y") };
    bench.measure(c, &forward, work, |cuda| {
        let (x, weight, y) = (x.view(), weight.view(), y.view_mut());
        cuda.linear(linear::Forward { x, weight, bias: None, residual: None, y })
    });
    if model == "product" {
        return;
    }
    let (mut dx, mut dweight) = (bench.tensor(DType::Bf16, rows, inputs), bench.tensor(DType::F32, outputs, inputs));
    let (dy, x, weight) = (y.view(), x.view(), weight.view());
    bench.measure(c, &name(" linear dx"), work, |cuda| {
        let dx = Some(dx.view_mut());
        cuda.linear_backward(linear::Backward { dy, x, weight, dx, dweight: None, dbias: None })
    });
    bench.measure(c, &name(" linear dW"), work, |cuda| {
        let dweight = Some(dweight.view_mut());
        cuda.linear_backward(linear::Backward { dy, x, weight, dx: None, dweight, dbias: None })
    });
}

/// The publishers' shapes: rows, hidden, vocabulary.
const HEADS: [[usize; 3]; 2] = [[8192, 4096, 131_072], [16_384, 2048, 248_320]];

fn head(c: &mut Criterion, bench: &Bench) {
    for shape in HEADS {
        let [rows, hidden, vocab] = shape.map(|n| bench.size(n));
        let flops = 2 * rows * hidden * vocab;
        let name = |what: &str| format!("logprob_head {what} {} x {} x {}", shape[0], shape[1], shape[2]);
        let (h, weight) = (bench.tensor(DType::Bf16, rows, hidden), bench.tensor(DType::Bf16, vocab, hidden));
        let target: Vec<u32> = (0..rows).map(|i| (i * 7919 % vocab) as u32).collect();
        let target = bench.indices(1, &target);
        let [tile_rows, tile_cols] = scratch_shape(rows);
        let mut scratch = bench.tensor(DType::F32, tile_rows, tile_cols);
        let (mut logp, mut lse) = (bench.tensor(DType::F32, rows, 1), bench.tensor(DType::F32, rows, 1));
        let bytes = 2 * (rows * hidden + vocab * hidden);
        bench.measure(c, &name("forward"), Work { bytes, flops }, |cuda| {
            cuda.logprob_head(logprob_head::Forward {
                h: h.view(),
                weight: weight.view(),
                target: target.view(),
                scale: 1.0,
                scratch: scratch.view_mut(),
                logp: logp.view_mut(),
                lse: lse.view_mut(),
                entropy: None,
                ln_sum_p2: None,
            })
        });
        let dlogp = bench.tensor(DType::F32, rows, 1);
        let (mut dh, mut dweight) = (bench.tensor(DType::Bf16, rows, hidden), bench.tensor(DType::F32, vocab, hidden));
        let bytes = 2 * bytes + 4 * vocab * hidden;
        bench.measure(c, &name("backward"), Work { bytes, flops: 3 * flops }, |cuda| {
            cuda.logprob_head_backward(logprob_head::Backward {
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
            })
        });
    }
}

/// Numbers of references.
const REFS: [usize; 3] = [1, 2, 4];

fn token_kl_name(what: &str, refs: usize) -> String {
    format!("token_kl {what} 8192 x 4096 x 131072, {refs} references")
}

/// References at the first of the heads: one head stands for all of theirs.
fn token_kls(c: &mut Criterion, bench: &Bench) {
    let [rows, hidden, vocab] = HEADS[0].map(|n| bench.size(n));
    let product = 2 * rows * hidden * vocab;
    let (h, weight) = (bench.tensor(DType::Bf16, rows, hidden), bench.tensor(DType::Bf16, vocab, hidden));
    let ref_weight = bench.tensor(DType::Bf16, vocab, hidden);
    let [tile_rows, tile_cols] = token_kl::scratch_shape(rows);
    let mut scratch = bench.tensor(DType::F32, tile_rows, tile_cols);
    let (mut dh, mut dweight) = (bench.tensor(DType::Bf16, rows, hidden), bench.tensor(DType::F32, vocab, hidden));
    for k in REFS {
        let of_refs = || bench.tensor(DType::F32, k, rows);
        let (mut kl, dkl, mut lse) = (of_refs(), of_refs(), bench.tensor(DType::F32, 1 + k, rows));
        let refs = vec![Ref { h: h.view(), weight: ref_weight.view() }; k];
        let bytes = 2 * (1 + k) * (rows * hidden + vocab * hidden);
        let work = Work { bytes, flops: (1 + k) * product };
        bench.measure(c, &token_kl_name("forward", k), work, |cuda| {
            let (scratch, kl, lse) = (scratch.view_mut(), kl.view_mut(), lse.view_mut());
            cuda.token_kl(token_kl::Forward {
                h: h.view(),
                weight: weight.view(),
                refs: &refs,
                scale: 1.0,
                scratch,
                kl,
                lse,
            })
        });
        let work = Work { bytes: bytes + 4 * vocab * hidden, flops: (3 + k) * product };
        bench.measure(c, &token_kl_name("backward", k), work, |cuda| {
            cuda.token_kl_backward(token_kl::Backward {
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
            })
        });
    }
}

/// Heads, heads of keys, their size, length of each sequence, sequences.
const ATTENTIONS: [(&str, [usize; 5]); 3] =
    [("16k hd128", [32, 8, 128, 16_384, 1]), ("2k hd128", [32, 8, 128, 2048, 8]), ("1k hd64", [9, 3, 64, 1024, 16])];

fn attentions(c: &mut Criterion, bench: &Bench) {
    for (name, [heads, kv_heads, head_dim, len, count]) in ATTENTIONS {
        let len = bench.size(len);
        let (rows, wide, narrow) = (len * count, heads * head_dim, kv_heads * head_dim);
        let root = |i: usize| {
            let (start, len) = ((i * len) as u32, len as u32);
            Segment { start, len, parent: NO_PARENT, position: 0, query_start: start, queries: len }
        };
        let table: Vec<Segment> = (0..count).map(root).collect();
        let segments = bench.indices(Segment::WORDS, bytemuck::cast_slice(&table));
        let dims = Dims { heads, kv_heads, head_dim, window: None, longest: len };
        let pairs = count * len * (len + 1) / 2;
        let flops = 4 * pairs * wide;
        let bytes = 2 * rows * (2 * wide + 2 * narrow);
        let (q, k, v) = (
            bench.tensor(DType::Bf16, rows, wide),
            bench.tensor(DType::Bf16, rows, narrow),
            bench.tensor(DType::Bf16, rows, narrow),
        );
        let (mut o, mut lse) = (bench.tensor(DType::Bf16, rows, wide), bench.tensor(DType::F32, rows, heads));
        bench.measure(c, &format!("attention forward {name}"), Work { bytes, flops }, |cuda| {
            let (q, k, v, o, lse) = (q.view(), k.view(), v.view(), o.view_mut(), lse.view_mut());
            cuda.attention(attention::Forward { dims, segments: segments.view(), q, k, v, o, lse })
        });
        let d_o = bench.tensor(DType::Bf16, rows, wide);
        let (mut dq, mut dk, mut dv) = (
            bench.tensor(DType::Bf16, rows, wide),
            bench.tensor(DType::Bf16, rows, narrow),
            bench.tensor(DType::Bf16, rows, narrow),
        );
        // Five products where the forward has two: what the arithmetic needs, whatever a kernel computes again.
        let work = Work { bytes: 2 * bytes, flops: flops / 2 * 5 };
        bench.measure(c, &format!("attention backward {name}"), work, |cuda| {
            cuda.attention_backward(attention::Backward {
                dims,
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
        });
    }
}

fn norms(c: &mut Criterion, bench: &Bench, rows: usize, hidden: usize) {
    let numbers = rows * hidden;
    let moved = |times: usize| Work { bytes: 2 * times * numbers, flops: 0 };
    let name = |what: &str| format!("{what} {rows} x {hidden}");
    let stored = || bench.tensor(DType::Bf16, rows, hidden);
    let (x, dy, mut y, mut dx) = (stored(), stored(), stored(), stored());
    let (weight, bias) = (bench.tensor(DType::Bf16, 1, hidden), bench.tensor(DType::Bf16, 1, hidden));
    let (mut dweight, mut dbias) = (bench.tensor(DType::F32, 1, hidden), bench.tensor(DType::F32, 1, hidden));
    let (mut rstd, mut stats) = (bench.tensor(DType::F32, rows, 1), bench.tensor(DType::F32, rows, STATS));
    bench.measure(c, &name("rms_norm forward"), moved(2), |cuda| {
        let (x, weight, y, rstd) = (x.view(), weight.view(), y.view_mut(), rstd.view_mut());
        cuda.rms_norm(rms_norm::Forward { x, weight, eps: 1e-5, y, rstd })
    });
    bench.measure(c, &name("rms_norm backward"), moved(4), |cuda| {
        let (dy, x, weight, rstd) = (dy.view(), x.view(), weight.view(), rstd.view());
        let (dx, dweight) = (dx.view_mut(), Some(dweight.view_mut()));
        cuda.rms_norm_backward(rms_norm::Backward { dy, x, weight, rstd, dx, dweight })
    });
    bench.measure(c, &name("layer_norm forward"), moved(2), |cuda| {
        let (x, weight, bias, y, stats) = (x.view(), weight.view(), bias.view(), y.view_mut(), stats.view_mut());
        cuda.layer_norm(layer_norm::Forward { x, weight, bias, eps: 1e-5, y, stats })
    });
    bench.measure(c, &name("layer_norm backward"), moved(4), |cuda| {
        let (dy, x, weight, stats) = (dy.view(), x.view(), weight.view(), stats.view());
        let (dx, dweight, dbias) = (dx.view_mut(), Some(dweight.view_mut()), Some(dbias.view_mut()));
        cuda.layer_norm_backward(layer_norm::Backward { dy, x, weight, stats, dx, dweight, dbias })
    });
    bench.measure(c, &name("swiglu forward"), moved(3), |cuda| {
        cuda.swiglu(swiglu::Forward { gate: x.view(), up: dy.view(), y: y.view_mut() })
    });
    bench.measure(c, &name("swiglu backward"), moved(5), |cuda| {
        let (gate, up, dgate, dup) = (x.view(), x.view(), dx.view_mut(), y.view_mut());
        cuda.swiglu_backward(swiglu::Backward { dy: dy.view(), gate, up, dgate, dup })
    });
}

fn others(c: &mut Criterion, bench: &Bench, rows: usize, hidden: usize, vocab: usize) {
    let moved = |times: usize| Work { bytes: 2 * times * rows * hidden, flops: 0 };
    let name = |what: &str| format!("{what} {rows} x {hidden}");
    let head_dim = 128.min(hidden);
    let (mut x, weight) = (bench.tensor(DType::Bf16, rows, hidden), bench.tensor(DType::Bf16, vocab, hidden));
    let (cos, sin) = (bench.tensor(DType::F32, rows, head_dim / 2), bench.tensor(DType::F32, rows, head_dim / 2));
    let positions = bench.indices(1, &(0..rows as u32).collect::<Vec<_>>());
    bench.measure(c, &name("rope"), moved(2), |cuda| {
        let (positions, cos, sin) = (positions.view(), cos.view(), sin.view());
        cuda.rope(rope::Rotate { x: x.view_mut(), positions, cos, sin, head_dim, direction: Direction::Forward })
    });
    // A tenth of the tokens is one token, as in text.
    let token = |i: usize| if i.is_multiple_of(10) { 1 } else { (i * 7919 % vocab) as u32 };
    let index = bench.indices(1, &(0..rows).map(token).collect::<Vec<_>>());
    bench.measure(c, &name("gather"), moved(2), |cuda| {
        cuda.gather(rows::Gather { x: weight.view(), index: index.view(), y: x.view_mut() })
    });
    let mut gradient = bench.tensor(DType::F32, vocab, hidden);
    let work = Work { bytes: (2 + 4 + 4) * rows * hidden, flops: 0 };
    bench.measure(c, &name("gather backward"), work, |cuda| {
        cuda.gather_backward(rows::GatherBackward { dy: x.view(), index: index.view(), dx: gradient.view_mut() })
    });
    let mut sum = bench.tensor(DType::F32, 1, 1);
    bench.measure(
        c,
        &format!("sum_squares {vocab} x {hidden}"),
        Work { bytes: 4 * vocab * hidden, flops: 0 },
        |cuda| cuda.sum_squares(sum_squares::Args { x: gradient.view(), sum: sum.view_mut() }),
    );
}

fn update(c: &mut Criterion, bench: &Bench) {
    let [rows, cols] = [bench.size(32_768), bench.size(4096)];
    let parameters = rows * cols;
    let wide = || bench.tensor(DType::F32, rows, cols);
    let (grad, mut weight, mut master) = (wide(), bench.tensor(DType::Bf16, rows, cols), wide());
    let (mut first, mut second) = (wide(), bench.tensor(DType::F32, rows, cols));
    bench.cuda.zero(second.view_mut()).expect("a fill: second moments are not negative");
    let tau_ref = bench.tensor(DType::Bf16, rows, cols);
    let (reserve_rate, merge_weight) = (0.01, 1e-6);
    let dare = |variant| Rule::OnDare { reserve_rate, merge_weight, variant, rescale: false, clip: 1.0 };
    let consensus = Consensus::BeforeWeight;
    let published = Form::HuggingFace { correct_bias: true };
    // Gradient; master, moments read and written; weight written; tau_ref. OnTIES looks at its updates more than once.
    for (name, rule, form, share, bytes) in [
        ("adamw", Rule::Adam, Form::Torch, 0.0, 30),
        ("ondare", dare(DareVariant::Released), published, 1e-4, 32),
        ("ondare paper", dare(DareVariant::Paper), published, 0.0, 32),
        ("onties", Rule::OnTies { reserve_rate, merge_weight, consensus, rescale: false }, published, 0.0, 32),
    ] {
        let step = Step {
            adam: Adam { beta1: 0.9, beta2: 0.999, eps: 1e-8, form },
            rule,
            step: 10,
            learning_rate: 1e-6,
            weight_decay: 0.0,
            clip: 1.0,
            gradient_reserve_rate: 1.0,
            merges: true,
            share,
            rounding: if share == 0.0 && rule != Rule::Adam { Rounding::Stochastic } else { Rounding::Nearest },
            random: Philox::new(0, 0),
        };
        let elements = rule.scratch(parameters);
        let mut scratch = (elements > 0).then(|| bench.tensor(DType::F32, elements, 1));
        let work = Work { bytes: bytes * parameters, flops: 0 };
        bench.measure(c, &format!("merged_update {name} {parameters}"), work, |cuda| {
            cuda.merged_update(merged_update::Args {
                step,
                grad: grad.view(),
                weight: weight.view_mut(),
                master: Some(master.view_mut()),
                first_moment: first.view_mut(),
                second_moment: second.view_mut(),
                since_merge: None,
                average: None,
                tau_ref: (rule != Rule::Adam).then(|| tau_ref.view()),
                scratch: scratch.as_mut().map(|scratch| scratch.view_mut()),
                lost: None,
            })
        });
    }
}

fn kernels(c: &mut Criterion) {
    let Some(bench) = Bench::open() else { return };
    ceilings(c, &bench);
    head(c, &bench);
    token_kls(c, &bench);
    attentions(c, &bench);
    let size = |n| bench.size(n);
    for (model, shape) in [("8b", [8192, 4096, 14_336]), ("8b", [8192, 4096, 4096]), ("135m", [8192, 576, 1536])] {
        products(c, &bench, model, shape.map(size));
    }
    for hidden in [4096, 576] {
        norms(c, &bench, size(8192), size(hidden));
    }
    others(c, &bench, size(8192), size(4096), size(131_072));
    update(c, &bench);
    bench.report();
    bench.report_slopes();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_secs(1));
    targets = kernels
}
criterion_main!(benches);
