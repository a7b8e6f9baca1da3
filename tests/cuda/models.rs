//! Whole models on the GPU: what they compute is what the CPU computes, and none of what must not matter changes a bit.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::{env, fs};

use cuvee::data::{Batch as HostBatch, Example, Extent, Read, Sequence, Sharing};
use cuvee::device::{Arena, Cpu, Cuda, DType, Device, Kind, cuda};
use cuvee::model::{Checkpoint, Head, Keep, KvCache};
use cuvee::ops::Backend;
use cuvee::ops::attention::{NO_PARENT, Segment};
use cuvee::optim::{self, Decay, Hyper, Optimizer, Schedule};
use cuvee::rollout::Engine;

use crate::common::kl::KlRig;
use crate::common::rollouts;
use crate::common::tiny::{self, Rig, Size, Step, Tiny, read};
use crate::fixtures::{Expected, check_folder};
use crate::{Body, Case, Mode};

/// An update that is smooth in the gradient: at the usual eps, the first step is its sign.
const HYPER: Hyper = Hyper {
    beta1: 0.9,
    beta2: 0.999,
    eps: 0.1,
    weight_decay: 0.1,
    max_grad_norm: 1.0,
    stochastic_rounding: false,
    seed: 0,
};

/// The merge weight's course alone depends on it.
const SCHEDULE: Schedule = Schedule { peak: 1.0, decay: Decay::Constant, warmup_steps: 0, max_steps: 1 };

fn open(storage: DType) -> Cuda {
    let options = cuda::Options { workspace_bytes: 8 << 20, batch_invariant: true, ..cuda::Options::new(0, storage) };
    Cuda::open(&options).unwrap_or_else(|e| panic!("{e}"))
}

fn host(sharing: Sharing) -> HostBatch {
    HostBatch::new(&Size::Small.examples(), sharing)
}

/// A step, and what an update makes of the weights.
struct Trained {
    step: Step,
    norm: f64,
    weights: BTreeMap<String, Vec<f64>>,
}

fn train<B: Backend>(device: B, tiny: &Tiny, host: &HostBatch, keep: Keep) -> Trained {
    let mut rig = Rig::new(device, tiny, &host.extent(), keep);
    let step = match tiny.checkpoint.spec.head {
        Head::Score => rig.score_step(host),
        Head::Tied | Head::Own => rig.step(host),
    };
    let Rig { device, model, .. } = &mut rig;
    let mut arena = Arena::with_bytes(device, 16 << 20).unwrap();
    let mut params = model.trained_mut();
    let method = optim::Choice { name: "adamw".into(), params: Default::default() }.build().unwrap();
    let mut optimizer = Optimizer::new(&mut arena, method, HYPER, SCHEDULE, &mut params);
    for param in &mut params {
        // Masters, where there are any now, start as the weights.
        let mut values = vec![0.0; param.value.len()];
        device.read_f32(param.view(), &mut values).unwrap();
        param.write(device, &values).unwrap();
    }
    let norm = optimizer.grad_norm(device, &params).unwrap().norm;
    optimizer.update(device, &mut params, 1, 0.01, norm).unwrap();
    let weights = params.iter().map(|p| (p.name.clone(), read(device, &p.value))).collect();
    Trained { step, norm, weights }
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|x| x * x).sum::<f64>().sqrt()
}

fn relative(found: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    norm(found.iter().zip(expected).map(|(a, b)| a - b)) / norm(expected.iter().copied())
}

/// How far two steps may be apart: log-probabilities at most, tensors relative to their norms.
struct Allowed {
    logps: f64,
    gradients: f64,
    weights: f64,
}

fn assert_near(what: &str, found: &Trained, expected: &Trained, allowed: &Allowed) {
    let apart = found.step.logps.iter().zip(&expected.step.logps).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    let worst = |found: &BTreeMap<String, Vec<f64>>, expected: &BTreeMap<String, Vec<f64>>| {
        // A bias of the keys moves all scores of a query alike, unless they are rotated: its gradient is rounding alone.
        let names = expected.keys().filter(|name| !name.ends_with("c_attn.bias.key"));
        let all = names.map(|name| (relative(&found[name], &expected[name]), name.clone()));
        all.max_by(|a, b| a.0.total_cmp(&b.0)).expect("there are weights")
    };
    let (gradients, weights) =
        (worst(&found.step.grads, &expected.step.grads), worst(&found.weights, &expected.weights));
    let norms = (found.norm / expected.norm - 1.0).abs();
    eprintln!(
        "{what}: log-probs off by {apart:.1e}, gradients {gradients:?}, their norm {norms:.1e}, weights {weights:?}"
    );
    assert!(apart <= allowed.logps, "{what}: log-probabilities");
    assert!(gradients.0 <= allowed.gradients && norms <= allowed.gradients, "{what}: gradients");
    assert!(weights.0 <= allowed.weights, "{what}: weights");
}

fn assert_same(what: &str, found: &Trained, expected: &Trained) {
    assert!(found.step.logps == expected.step.logps, "{what}: other log-probabilities");
    assert!(found.step.grads == expected.step.grads, "{what}: other gradients");
    assert!(found.weights == expected.weights, "{what}: other weights");
}

fn model(name: &str) -> Tiny {
    tiny::all(Size::Small).into_iter().find(|tiny| tiny.name == name).expect("listed")
}

const F32: Allowed = Allowed { logps: 1e-4, gradients: 1e-3, weights: 1e-5 };
const BF16: Allowed = Allowed { logps: 0.5, gradients: 0.2, weights: 1e-2 };
/// What reaches an adapter of the keys is a sum of derivatives of scores that cancel, without a bias or a rotation beside it.
const BF16_ADAPTER: Allowed = Allowed { gradients: 0.35, ..BF16 };

/// A training step against the CPU's; the same bits again, with activations computed again, and with prompts apart.
fn step(name: &str, storage: DType) {
    compare(name, storage, &model(name), [Sharing::On, Sharing::Off].map(host), &BF16);
}

/// The same of adapters, those that are applied and the one that trains.
fn lora(name: &str, storage: DType) {
    let tiny = tiny::adapted(Size::Small, 0.1).into_iter().find(|tiny| tiny.name == name).expect("listed");
    compare(name, storage, &tiny, [Sharing::On, Sharing::Off].map(host), &BF16_ADAPTER);
}

/// The same of a reward model.
fn reward(name: &str, storage: DType) {
    let tiny = tiny::rewards(Size::Small).into_iter().find(|tiny| tiny.name == name).expect("listed");
    let host = |sharing| HostBatch::reading(Read::Last { pad: None }, &Size::Small.examples(), sharing);
    compare(name, storage, &tiny, [Sharing::On, Sharing::Off].map(host), &BF16);
}

fn compare(name: &str, storage: DType, tiny: &Tiny, [shared, apart]: [HostBatch; 2], bf16: &Allowed) {
    let found = train(open(storage), tiny, &shared, Keep::Everything);
    let expected = train(Cpu::new(1).unwrap(), tiny, &shared, Keep::Everything);
    let allowed = if storage == DType::F32 { &F32 } else { bf16 };
    assert_near(name, &found, &expected, allowed);
    assert_same("once more", &train(open(storage), tiny, &shared, Keep::Everything), &found);
    assert_same("recomputed", &train(open(storage), tiny, &shared, Keep::Inputs), &found);
    let apart = train(open(storage), tiny, &apart, Keep::Everything);
    assert!(apart.step.logps == found.step.logps, "{name}: other log-probabilities without shared prompts");
    assert_near("prompts apart", &apart, &found, allowed);
}

/// Hidden states before the head of a sequence that is decoded with a cache, against those of the whole sequence.
fn decoding(name: &str, storage: DType) {
    const PROMPT: usize = 70;
    let tiny = model(name);
    let sequence = Sequence { first: 1, ..Size::Small.examples()[0].sequences[0].clone() };
    let ids = sequence.ids.clone();
    let host = HostBatch::new(&[Example { sequences: vec![sequence], ..Example::default() }], Sharing::On);
    let mut rig = Rig::new(open(storage), &tiny, &host.extent(), Keep::Nothing);
    rig.forward(&host);
    let whole = read(&rig.device, &rig.acts.top.normed);

    let spec = &tiny.checkpoint.spec;
    let extent = Extent { rows: PROMPT, targets: 1, segments: 1, sequences: 1, longest: ids.len() };
    let Rig { device, model, mut acts, mut batch } = Rig::new(open(storage), &tiny, &extent, Keep::Nothing);
    let mut arena = Arena::with_bytes(&device, 4 << 20).unwrap();
    let mut kv = KvCache::new(&mut arena, spec, ids.len() + 9, extent.rows);
    let mut logits = arena.floats(Kind::Activations, 1, spec.vocab);
    let pieces = std::iter::once(0..PROMPT).chain((PROMPT..ids.len() - 1).map(|at| at..at + 1));
    for piece in pieces {
        let rows: Vec<u32> = piece.clone().map(|row| row as u32).collect();
        let (len, queries) = (piece.end as u32, rows.len() as u32);
        let slot = Segment { start: 0, len, parent: NO_PARENT, position: 0, query_start: 0, queries };
        kv.set_append(&device, &rows).unwrap();
        batch.load_decode(&device, &ids[piece.clone()], &rows, &[slot], &[queries - 1]).unwrap();
        model.decode(&device, &batch, &mut acts, &mut kv, &mut logits).unwrap();
        let mut hidden = vec![0.0; spec.hidden];
        device.read_f64(acts.top.normed.top(1), &mut hidden).unwrap();
        let expected = &whole[(piece.end - 1) * spec.hidden..piece.end * spec.hidden];
        assert!(hidden == expected, "{name}: another hidden state of token {}", piece.end - 1);
    }
}

/// A step with a KL term against the CPU's, and the same again.
fn token_kl(name: &str, storage: DType) {
    let (tiny, host) = (model(name), host(Sharing::On));
    let refs = [&model("qwen2"), &model("neox")];
    let run = || KlRig::new(|| open(storage), &tiny, &refs, &host, &|_| true).step(&host);
    let (found, gradients) = run();
    let (expected, exact) = KlRig::new(|| Cpu::new(1).unwrap(), &tiny, &refs, &host, &|_| true).step(&host);
    let allowed = if storage == DType::F32 { F32 } else { BF16 };
    let off = relative(&found[1], &expected[1]);
    let worst = exact.iter().filter(|(name, _)| !name.ends_with("c_attn.bias.key"));
    let worst = worst.map(|(name, exact)| relative(&gradients[name], exact)).fold(0.0, f64::max);
    eprintln!("{name}: KLs off by {off:.1e}, gradients by {worst:.1e}");
    assert!(
        off <= allowed.gradients && worst <= allowed.gradients,
        "{name}: KLs off by {off:e}, gradients by {worst:e}"
    );
    assert!(run() == (found, gradients), "{name}: other numbers the second time");
}

/// Completions of many requests: on one device their log-probabilities are those of scoring, and in f32 they are the CPU's.
fn rollout(name: &str, storage: DType) {
    let (tiny, prompts) = (model(name), rollouts::prompts(8));
    let requests = rollouts::requests(&prompts, &[]);
    let mut rig = rollouts::rig(open(storage), &tiny);
    let found = rollouts::run(&Engine::new(&rig.device), &rig, &requests);
    let in_turns = rollouts::run(&Engine::new(&rig.device).with_max_running(3), &rig, &requests);
    rollouts::assert_same(name, &in_turns, &found);
    for rollout in &found {
        let expected = rollouts::scored(&mut rig, &requests, rollout);
        assert!(rollout.logps.iter().map(|logp| f64::from(*logp)).eq(expected), "{name}: request {}", rollout.prompt);
    }
    if storage == DType::F32 {
        let cpu = rollouts::rig(Cpu::new(1).unwrap(), &tiny);
        let expected = rollouts::run(&Engine::new(&cpu.device), &cpu, &requests);
        assert!(found.iter().map(|rollout| &rollout.ids).eq(expected.iter().map(|rollout| &rollout.ids)), "{name}");
    }
}

/// What transformers computes of the models in `tests/data/fixtures`.
fn fixtures() -> impl Iterator<Item = Case> {
    let root = PathBuf::from(env::var_os("CUVEE_TEST_ROOT").unwrap_or_else(|| ".".into()));
    let entries = fs::read_dir(root.join("tests/data/fixtures")).expect("the repository's fixtures");
    let mut folders: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    folders.retain(|folder| folder.join("expected.safetensors").exists());
    folders.sort();
    folders.into_iter().map(|folder| Case {
        name: format!("fixture::{}", folder.file_name().unwrap().to_str().unwrap()),
        modes: &[Mode::Plain, Mode::Real],
        bug: None,
        body: Body::Alone(Box::new(move || {
            let checkpoint = Checkpoint::open(&folder).unwrap();
            let expected = Expected::read(&folder).unwrap_or_else(|e| panic!("{e:?}"));
            check_folder(open(DType::F32), &checkpoint, &expected).unwrap_or_else(|e| panic!("{e:?}"));
        })),
    })
}

pub fn all() -> Vec<Case> {
    let mut cases: Vec<Case> = fixtures().collect();
    for name in tiny::all(Size::Small).iter().map(|tiny| tiny.name) {
        for (storage, dtype) in [("f32", DType::F32), ("bf16", DType::Bf16)] {
            let runs = [
                ("step", step as fn(&str, DType)),
                ("lora", lora),
                ("reward", reward),
                ("decoding", decoding),
                ("token_kl", token_kl),
                ("rollout", rollout),
            ];
            let takes = |what: &str| match what {
                "token_kl" => name == "llama",
                "rollout" => ["llama", "qwen3"].contains(&name),
                "lora" => ["llama", "qwen3", "neox", "gpt2"].contains(&name),
                _ => true,
            };
            for (what, run) in runs.into_iter().filter(|(what, _)| takes(what)) {
                cases.push(Case {
                    name: format!("model::{name}::{what}::{storage}"),
                    modes: &[Mode::Plain, Mode::Real],
                    bug: None,
                    body: Body::Alone(Box::new(move || run(name, dtype))),
                });
            }
        }
    }
    cases
}
