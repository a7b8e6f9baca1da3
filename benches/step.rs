//! Time of a whole optimizer step of DPO with a scored reference: forward, loss, backward, clipping, AdamW. Elements per
//! second are FLOP/s of the products and of attention's visible pairs, a multiply-add being two. And of decoding eight rows under
//! one model, and under eight blends of three adapters of rank 16; elements per second are tokens there.
//!
//! `cargo bench --bench step`; the group `peak` of `cargo bench --bench ops` is the yardstick.

use std::path::Path;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use cuvee::checkpoint::TensorSource;
use cuvee::checkpoint::peft::{self, AdapterConfig};
use cuvee::data::{Batch as HostBatch, Example, Packing, Sequence};
use cuvee::device::{Arena, Cpu, DType, Dry, Philox, Storage};
use cuvee::model::{Acts, Batch, Checkpoint, Init, Keep, Model, Options, init_random};
use cuvee::objectives::mrpo::{Blend, Level, Mean, MultiRef, Weighting};
use cuvee::objectives::{Choice, Objective, Params, Stats, Totals, build};
use cuvee::optim::{self, Decay, Hyper, Schedule};
use cuvee::references::Scored;
use cuvee::rollout::{Engine, Request, Sampling};
use cuvee::train::{Blueprint, Extras, Pass, Purpose, Rows, step};

const HYPER: Hyper = Hyper {
    beta1: 0.9,
    beta2: 0.999,
    eps: 1e-8,
    weight_decay: 0.0,
    max_grad_norm: 1.0,
    stochastic_rounding: false,
    seed: 0,
};

/// The merge weight's course alone depends on it.
const SCHEDULE: Schedule = Schedule { peak: 1.0, decay: Decay::Constant, warmup_steps: 0, max_steps: 1 };

/// A model by its configuration, with random weights, and the pairs of a step.
struct Case {
    name: &'static str,
    config: &'static str,
    vocab: u32,
    pairs: usize,
    /// Tokens of a prompt and of each of its two completions.
    pair: [usize; 2],
}

const CASES: [Case; 2] = [
    Case {
        name: "quickstart",
        config: r#"{"model_type": "llama", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2,
            "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 2048, "tie_word_embeddings": true}"#,
        vocab: 2048,
        pairs: 16,
        pair: [4, 30],
    },
    Case {
        name: "smollm2-135m",
        config: r#"{"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": true}"#,
        vocab: 49_152,
        pairs: 4,
        pair: [128, 64],
    },
];

impl Case {
    fn examples(&self) -> Vec<Example> {
        let [prompt, completion] = self.pair;
        let ids = |of: usize, len: usize| (0..len).map(move |i| (of * 7919 + i * 104_729) as u32);
        let sequence = |pair: usize, side: usize| {
            let ids = ids(pair, prompt).chain(ids(1000 + 2 * pair + side, completion)).map(|id| id % self.vocab);
            Sequence::new(ids.collect(), prompt)
        };
        (0..self.pairs)
            .map(|row| Example { row, sequences: vec![sequence(row, 0), sequence(row, 1)], ..Example::default() })
            .collect()
    }

    fn checkpoint(&self) -> Checkpoint {
        let file = tempfile::Builder::new().suffix(".json").tempfile().expect("a temporary file");
        std::fs::write(file.path(), self.config).expect("written");
        Checkpoint::from_config(Path::new("."), file.path()).expect("a configuration of ours")
    }
}

/// What K cached references cost a step beyond one: nothing, is the claim.
const REFERENCES: [(&str, Option<Blend>, usize); 3] = [
    ("1 reference", None, 1),
    ("4 references", Some(HARMONIC), 4),
    ("4 references by token", Some(Blend { level: Level::Token, ..HARMONIC }), 4),
];
const HARMONIC: Blend = Blend {
    mean: Mean::Harmonic,
    weights: Weighting::Step,
    clip: None,
    level: Level::Sequence,
    official_k2_swap: false,
};

fn objective(blend: Option<Blend>) -> Box<dyn Objective> {
    let choice = Choice::one("sigmoid", Params::from_iter([("beta", 0.1)]));
    let leaf = |inner: Box<dyn Objective>| -> Box<dyn Objective> {
        match blend {
            Some(blend) => Box::new(MultiRef::new(inner, blend)),
            None => inner,
        }
    };
    build(&choice, &leaf).expect("registered")
}

/// `[references][examples]`, something that a reference might say.
fn said(examples: &[&Example], references: usize) -> Vec<Vec<Scored>> {
    let of = |example: &&Example| {
        let lens = example.sequences.iter().map(|s| s.ids.len() - s.first);
        let tokens: Vec<Vec<f32>> = lens.map(|len| vec![-2.5; len]).collect();
        Scored { sums: tokens.iter().map(|t| -2.5 * t.len() as f64).collect(), tokens }
    };
    (0..references).map(|_| examples.iter().map(of).collect()).collect()
}

/// FLOPs of forward and backward.
fn flops(checkpoint: &Checkpoint, host: &HostBatch) -> u64 {
    let (dry, mut arena, size) = (Dry::default(), Dry::arena(DType::F32), host.extent());
    let options = Options::train_all(size.longest);
    let mut model = Model::new(&mut arena, &checkpoint.spec, checkpoint.architecture.naming, options);
    let mut acts = Acts::new(&mut arena, &checkpoint.spec, &size, Keep::Everything);
    let mut batch = Batch::new(&mut arena, &size);
    batch.load(&dry, host).expect("it fits");
    model.forward(&dry, &batch, &mut acts).expect("counted");
    model.backward(&dry, &batch, &vec![0.0; size.targets], &mut acts, None).expect("counted");
    dry.flops()
}

fn steps(c: &mut Criterion) {
    let mut group = c.benchmark_group("step");
    group.sample_size(10).warm_up_time(Duration::from_secs(2));
    for case in &CASES {
        let (cpu, checkpoint, examples) = (Cpu::new(0).expect("threads start"), case.checkpoint(), case.examples());
        let examples: Vec<&Example> = examples.iter().collect();
        let packing = Packing::new(2048);
        let host = HostBatch::new(examples.iter().copied(), packing.sharing);
        let largest = host.extent();
        let method = optim::Choice { name: "adamw".into(), params: Default::default() }.build().expect("registered");
        let positions = largest.longest;
        let keep = Keep::Everything;
        let blueprint = Blueprint {
            checkpoint: &checkpoint,
            init: Init::Random { seed: 1 },
            method,
            hyper: HYPER,
            schedule: SCHEDULE,
            largest,
            positions,
            keep,
            lora: None,
            extras: Extras::default(),
        };
        let mut policy = blueprint.build(&cpu).expect("memory");
        init_random(&cpu, &mut policy.model, 1).expect("filled");
        group.throughput(Throughput::Elements(flops(&checkpoint, &host)));
        let mut count = 0;
        for (what, blend, references) in REFERENCES {
            let objective = objective(blend);
            let said = said(&examples, references);
            let refs: Vec<Vec<&Scored>> = said.iter().map(|said| said.iter().collect()).collect();
            let ref_weights = vec![1.0 / references as f64; references];
            let rows = Rows { examples: &examples, refs: &refs, ref_weights: &ref_weights, ..Rows::default() };
            group.bench_function(format!("{} {} tokens, {what}", case.name, largest.rows), |b| {
                b.iter(|| {
                    count += 1;
                    let (objective, purpose) = (objective.as_ref(), Purpose::Training);
                    let pass = Pass { objective, rows, packing, purpose, step: count };
                    step(&cpu, &mut policy, &pass, 1e-6).expect("a finite step")
                });
            });
        }
    }
    group.finish();
}

/// The part of a step that knows how many references there are, alone: a step's time scatters by more than it takes.
fn objectives(c: &mut Criterion) {
    let mut group = c.benchmark_group("objective");
    let examples = CASES[0].examples();
    let examples: Vec<&Example> = examples.iter().collect();
    for (what, blend, references) in REFERENCES {
        let objective = objective(blend);
        let said = said(&examples, references);
        let tokens =
            |said: &Vec<Scored>| said.iter().flat_map(|s| &s.tokens).flatten().map(|x| f64::from(*x)).collect();
        let ref_token_logps: Vec<Vec<f64>> = said.iter().map(tokens).collect();
        let lens: Vec<f64> = said[0].iter().flat_map(|s| &s.tokens).map(|tokens| tokens.len() as f64).collect();
        let offsets = (0..=lens.len()).map(|s| lens[..s].iter().sum::<f64>() as usize).collect();
        let stats = Stats {
            logps: lens.iter().map(|len| -2.0 * len).collect(),
            ref_logps: said.iter().map(|said| said.iter().flat_map(|s| s.sums.clone()).collect()).collect(),
            pairs: (0..examples.len()).map(|pair| (2 * pair, 2 * pair + 1)).collect(),
            token_logps: vec![-2.0; ref_token_logps[0].len()],
            ref_weights: vec![1.0 / references as f64; references],
            offsets,
            lens,
            ref_token_logps,
            ..Stats::default()
        };
        let totals = Totals::of(&stats);
        group.bench_function(format!("{}, {what}", CASES[0].name), |b| b.iter(|| objective.evaluate(&stats, &totals)));
    }
    group.finish();
}

/// An adapter for every linear layer of a Llama.
fn write_adapter(checkpoint: &Checkpoint, dir: &Path, rank: usize) {
    let mut model = checkpoint.dry();
    let layers = model.params_mut().into_iter().filter(|param| param.name.ends_with("_proj.weight"));
    let of = |name: String, shape: [usize; 2]| TensorSource {
        shape: shape.to_vec(),
        fill: Box::new({
            let random = Philox::named(1, &name);
            move |out: &mut [f32]| {
                out.iter_mut().zip(0..).for_each(|(x, i)| *x = 0.02 * random.normal(i) as f32);
                Ok(())
            }
        }),
        name,
    };
    let (mut tensors, mut targets) = (Vec::new(), Vec::new());
    for param in layers {
        let ([outputs, inputs], module) = (param.matrix_shape(), param.name.trim_end_matches(".weight"));
        tensors.extend([of(peft::a_name(module), [rank, inputs]), of(peft::b_name(module), [outputs, rank])]);
        targets.push(module.to_string());
    }
    let lora_alpha = 2.0 * rank as f64;
    let config = AdapterConfig { lora_rank: rank, lora_alpha, target_modules: targets, ..AdapterConfig::default() };
    peft::write(dir, &config, &tensors).expect("written");
}

/// Eight rows of the larger model: what per-row weights of adapters cost beside a merged model, which has none. Its weights are f32,
/// or kept as bfloat16 under adapters in f32.
fn decoding(c: &mut Criterion) {
    const TOKENS: usize = 16;
    let mut group = c.benchmark_group("decode");
    group.sample_size(10).warm_up_time(Duration::from_secs(1));
    group.throughput(Throughput::Elements(8 * TOKENS as u64));
    let (cpu, base) = (Cpu::new(0).expect("threads start"), CASES[1].checkpoint());
    let folders = [8, 16].map(|rank| (rank, tempfile::tempdir().expect("a folder")));
    let mut cases = vec![("one merged model".to_string(), base.clone())];
    for (rank, folder) in &folders {
        write_adapter(&base, folder.path(), *rank);
        let blended = (0..3).fold(base.clone(), |c, _| c.with_adapter(folder.path(), 1.0).expect("it fits"));
        cases.push((format!("8 blends of 3 adapters of rank {rank}"), blended));
    }
    let weights: Vec<[f32; 3]> = (0..8).map(|i| [i as f32 / 8.0, 0.5, 1.0 - i as f32 / 8.0]).collect();
    let prompts: Vec<[u32; 4]> = (0..8).map(|i| [i, 1000 * i, 7, 9]).collect();
    for ((what, checkpoint), bf16) in cases.iter().flat_map(|case| [false, true].map(|bf16| (case, bf16))) {
        let options = Options { bf16, ..Options::frozen(4 + TOKENS).with_adapters(checkpoint) };
        let ledger = Model::<Dry>::plan(Storage::CPU, &checkpoint.spec, checkpoint.architecture.naming, options);
        let mut arena = Arena::new(&cpu, &ledger).expect("memory");
        let mut model = Model::new(&mut arena, &checkpoint.spec, checkpoint.architecture.naming, options);
        init_random(&cpu, &mut model, 1).expect("filled");
        model.fill_adapters(&cpu, &checkpoint.adapters).expect("read");
        model.fill_tables(&cpu).expect("filled");
        let request = |i: usize| Request {
            blend: if checkpoint.adapters.is_empty() { &[] } else { &weights[i] },
            ..Request::new(&prompts[i], TOKENS, Sampling::plain(i as u64))
        };
        let requests: Vec<Request> = (0..8).map(request).collect();
        let engine = Engine::new(&cpu);
        let weights_are = if bf16 { "bf16" } else { "f32" };
        group.bench_function(format!("smollm2-135m, {weights_are}, 8 rows, {what}"), |b| {
            // On a thread of the device, as the program computes.
            cpu.run(|| b.iter(|| engine.run(&model, &requests, &mut |_| ()).expect("tokens")));
        });
    }
    group.finish();
}

criterion_group!(benches, steps, objectives, decoding);
criterion_main!(benches);
