//! Time of an optimizer step, rule by rule: bytes per second beside those of a copy on the same threads, and seconds for all
//! weights of SmolLM2-135M.
//!
//! `cargo bench --bench optimizer` prints both. With `-- RULE STEPS` only the second, of one rule, a line of seconds for each
//! step: `benches/peers/online_merging.py` runs that beside the authors' code. RAYON_NUM_THREADS=1 measures one core.

use std::time::Instant;

use cuvee::device::{Arena, Cpu, DType, Device, Kind, Philox, Tensor};
use cuvee::ops::merged_update::{
    Adam, Args, Consensus, DareVariant, Form, MergedUpdate, Rounding, Rule, Step, prepare,
};
use rayon::prelude::*;

/// What is measured, and the bytes that it must move for each element: gradient 4, moments 8 each, weight 8; bf16 task vector
/// 2; a second weight 4 where the task vector lies beside a master; the update written once and read once or twice (4 each)
/// where it must be known whole.
struct Measured {
    name: &'static str,
    rule: Rule,
    form: Form,
    merges: bool,
    share: f64,
    bytes: usize,
}

fn all() -> Vec<Measured> {
    let form = Form::HuggingFace { correct_bias: true };
    let dare = |variant, rescale| Rule::OnDare { reserve_rate: 0.01, merge_weight: 1e-7, variant, rescale, clip: 1.0 };
    let released = DareVariant::Released;
    let consensus = Consensus::BeforeWeight;
    let ties = Rule::OnTies { reserve_rate: 0.01, merge_weight: 1e-7, consensus, rescale: false };
    let merging = |name, rule, share, bytes| Measured { name, rule, form, merges: true, share, bytes };
    vec![
        Measured { name: "adamw", rule: Rule::Adam, form: Form::Torch, merges: false, share: 0.0, bytes: 28 },
        merging("ondare", dare(released, false), 1e-5, 34),
        merging("ondare-rescale", dare(released, true), 1e-5, 42),
        merging("ondare-paper", dare(DareVariant::Paper, false), 0.0, 30),
        merging("onties", ties, 0.0, 42),
    ]
}

/// One weight and all that belongs to it.
struct Trained {
    grad: Tensor<Cpu>,
    weight: Tensor<Cpu>,
    master: Option<Tensor<Cpu>>,
    first_moment: Tensor<Cpu>,
    second_moment: Tensor<Cpu>,
    tau_ref: Option<Tensor<Cpu>>,
    random: Philox,
}

/// `len` numbers of a bell curve's size, cheaper than a bell curve's.
fn numbers(name: &str, len: usize, size: f32) -> Vec<f32> {
    let random = Philox::named(1, name);
    let number = |word: u32| size * (word as i32 >> 8) as f32 / (1 << 23) as f32;
    let mut words = vec![0; len];
    words.par_chunks_mut(1 << 16).enumerate().for_each(|(i, words)| random.fill((i << 14) as u64, words));
    words.into_iter().map(number).collect()
}

impl Trained {
    fn new(cpu: &Cpu, name: &str, [rows, cols]: [usize; 2], measured: &Measured) -> Self {
        let len = rows * cols;
        let tensor = |what: &str, dtype, size| {
            let mut arena = Arena::with_bytes(cpu, Arena::<Cpu>::bytes_of(dtype, rows, cols)).expect("memory");
            let mut tensor = arena.take(Kind::States, dtype, rows, cols);
            let mut values = numbers(&format!("{name} {what}"), len, size);
            if what == "second" {
                values.iter_mut().for_each(|x| *x = x.abs());
            }
            if what == "tau_ref" {
                prepare(&measured.rule, &Philox::named(7, name), &mut values);
            }
            cpu.write_f32(&values, tensor.view_mut()).expect("a copy");
            tensor
        };
        Self {
            grad: tensor("grad", DType::F32, 1e-3),
            weight: tensor("weight", DType::F32, 0.05),
            master: (measured.share > 0.0).then(|| tensor("weight", DType::F32, 0.05)),
            first_moment: tensor("first", DType::F32, 1e-3),
            second_moment: tensor("second", DType::F32, 1e-6),
            tau_ref: measured.merges.then(|| tensor("tau_ref", DType::Bf16, 1e-3)),
            random: Philox::named(7, name),
        }
    }

    fn update(&mut self, cpu: &Cpu, measured: &Measured, step: u64, scratch: &mut Tensor<Cpu>) {
        let len = self.grad.len();
        let needed = measured.rule.scratch(len);
        let scratch = (needed > 0).then(|| scratch.top_mut(needed));
        let adam = Adam { beta1: 0.9, beta2: 0.999, eps: 1e-8, form: measured.form };
        let step = Step {
            adam,
            rule: measured.rule,
            step,
            learning_rate: 1e-6,
            weight_decay: 0.0,
            clip: 1.0,
            gradient_reserve_rate: 1.0,
            merges: true,
            share: measured.share,
            rounding: Rounding::Nearest,
            random: self.random,
        };
        cpu.merged_update(Args {
            step,
            grad: self.grad.view(),
            weight: self.weight.view_mut(),
            master: self.master.as_mut().map(Tensor::view_mut),
            first_moment: self.first_moment.view_mut(),
            second_moment: self.second_moment.view_mut(),
            since_merge: None,
            average: None,
            tau_ref: self.tau_ref.as_ref().map(Tensor::view),
            scratch,
            lost: None,
        })
        .expect("all is there");
    }
}

/// Of a model with these weights: seconds of each step by each rule, which take turns.
fn steps<const N: usize>(
    cpu: &Cpu,
    weights: &[(String, [usize; 2])],
    rules: [&Measured; N],
    count: u64,
) -> [Vec<f64>; N] {
    let largest = weights.iter().map(|(_, [rows, cols])| rows * cols).max().expect("weights");
    let scratch_len = rules.map(|measured| measured.rule.scratch(largest)).into_iter().max().unwrap_or(0).max(1);
    let bytes = Arena::<Cpu>::bytes_of(DType::F32, scratch_len, 1);
    let mut scratch = Arena::with_bytes(cpu, bytes).expect("memory").floats(Kind::States, scratch_len, 1);
    let trained =
        |measured| weights.iter().map(|(name, shape)| Trained::new(cpu, name, *shape, measured)).collect::<Vec<_>>();
    let mut models = rules.map(trained);
    let mut seconds = [const { Vec::new() }; N];
    for step in 1..=count {
        for ((model, measured), seconds) in models.iter_mut().zip(rules).zip(&mut seconds) {
            let start = Instant::now();
            model.iter_mut().for_each(|weight| weight.update(cpu, measured, step, &mut scratch));
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    seconds
}

/// Bytes read and written by a copy, a second.
fn copy_rate(cpu: &Cpu, len: usize) -> f64 {
    let (from, mut to) = (vec![1.0f32; len], vec![0.0f32; len]);
    let mut one = || {
        let start = Instant::now();
        cpu.run(|| {
            to.par_chunks_mut(1 << 16).zip(from.par_chunks(1 << 16)).for_each(|(to, from)| to.copy_from_slice(from))
        });
        8.0 * len as f64 / start.elapsed().as_secs_f64()
    };
    median((0..9).map(|_| one()).collect())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The weights of SmolLM2-135M: 134 515 008 parameters, the head tied to the embedding.
fn smollm2() -> Vec<(String, [usize; 2])> {
    let layer = |i: usize| {
        let shapes = [[576, 576], [192, 576], [192, 576], [576, 576], [1536, 576], [1536, 576], [576, 1536]];
        let norms = [[1, 576], [1, 576]];
        shapes.into_iter().chain(norms).enumerate().map(move |(part, shape)| (format!("layers.{i}.{part}"), shape))
    };
    let outside = [("embedding".to_string(), [49_152, 576]), ("norm".to_string(), [1, 576])];
    outside.into_iter().chain((0..30).flat_map(layer)).collect()
}

fn main() {
    let cpu = Cpu::new(0).expect("threads start");
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    if let [rule, count] = &arguments[..] {
        let measured =
            all().into_iter().find(|m| m.name == rule).expect("adamw, ondare, ondare-rescale, ondare-paper, onties");
        let count = count.parse().expect("a number of steps");
        let [seconds] = steps(&cpu, &smollm2(), [&measured], count);
        seconds.iter().for_each(|seconds| println!("{seconds:.4}"));
        return;
    }
    println!("{} threads, {:?}", cpu.threads(), cpu.isa());
    for len in [10_000_000, 49_152 * 576] {
        for measured in all() {
            let before = copy_rate(&cpu, len);
            let [seconds] = steps(&cpu, &[("weight".to_string(), [1, len])], [&measured], 9).map(median);
            let copy = (before + copy_rate(&cpu, len)) / 2.0;
            let rate = (measured.bytes * len) as f64 / seconds;
            let (share, ms) = (100.0 * rate / copy, 1e3 * seconds);
            let (rate, copy) = (rate / 1e9, copy / 1e9);
            let name = measured.name;
            println!("{name:<15} {len:>9} elements {ms:>7.1} ms {rate:>6.1} GB/s, {share:.0} % of a copy's {copy:.1}");
        }
    }
    let ondare = all().into_iter().find(|m| m.name == "ondare").expect("it is measured");
    for measured in all() {
        let [seconds, beside] = steps(&cpu, &smollm2(), [&measured, &ondare], 9).map(median);
        let (name, ratio) = (measured.name, seconds / beside);
        println!("{name:<15} SmolLM2-135M {:>7.1} ms a step, {ratio:.2} of ondare's in turns", 1e3 * seconds);
    }
}
