//! Whole models: what must hold for every architecture, whatever its parts are.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::Path;

use cuvee::checkpoint::{SaveDtype, TensorSource, Weights, save_safetensors};
use cuvee::data::{Batch as HostBatch, Example, Extent, Sequence, Sharing, Temperature};
use cuvee::device::{Arena, Cpu, DType, Dry, Kind, Philox, Reference, Storage, Tensor};
use cuvee::model::arch::Slot;
use cuvee::model::{
    Acts, Batch, Checkpoint, Head, Init, Keep, KvCache, Lora, Model, Options, Role, init_random, load, sources,
};
use cuvee::ops::Backend;
use cuvee::ops::attention::{NO_PARENT, Segment};
use cuvee::rollout::{Request, Sampling, generate};
use half::bf16;
use serde_json::json;

use crate::ops::families;
use crate::tiny::{self, Rig, SEED, Size, Step, Tiny, weights};

fn host(size: Size, sharing: Sharing) -> HostBatch {
    HostBatch::new(&size.examples(), sharing)
}

fn cpu(tiny: &Tiny, largest: &HostBatch, keep: Keep) -> Rig<Cpu> {
    Rig::new(Cpu::new(2).unwrap(), tiny, &largest.extent(), keep)
}

fn assert_bits(what: &str, ours: &[f64], expected: &[f64]) {
    assert_eq!(ours.len(), expected.len(), "{what}: number of elements");
    for (i, (a, b)) in ours.iter().zip(expected).enumerate() {
        assert!(a.to_bits() == b.to_bits(), "{what}[{i}]: {a:e}, expected exactly {b:e}");
    }
}

/// Same names, same bits.
fn assert_same_tensors(what: &str, ours: &BTreeMap<String, Vec<f64>>, expected: &BTreeMap<String, Vec<f64>>) {
    let names = |all: &BTreeMap<String, Vec<f64>>| all.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(ours), names(expected), "{what}");
    ours.iter().for_each(|(name, values)| assert_bits(&format!("{what}: {name}"), values, &expected[name]));
}

fn assert_same_step(what: &str, ours: &Step, expected: &Step) {
    assert_bits(&format!("{what}: logps"), &ours.logps, &expected.logps);
    assert_same_tensors(what, &ours.grads, &expected.grads);
}

fn norm<'a>(values: impl IntoIterator<Item = &'a f64>) -> f64 {
    values.into_iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// A bias of the keys moves all scores of a query alike, unless they are rotated: its gradient is 0 but for rounding.
fn vanishes(name: &str) -> bool {
    name.ends_with("c_attn.bias.key")
}

/// Of each tensor the norm of the difference, relative to the tensor's.
fn assert_close_tensors(
    what: &str,
    ours: &BTreeMap<String, Vec<f64>>,
    expected: &BTreeMap<String, Vec<f64>>,
    tolerance: f64,
) {
    assert_eq!(ours.len(), expected.len(), "{what}: number of tensors");
    for (name, expected) in expected.iter().filter(|(name, _)| !vanishes(name)) {
        let off: Vec<f64> = ours[name].iter().zip(expected).map(|(a, b)| a - b).collect();
        let ratio = norm(&off) / norm(expected);
        assert!(ratio <= tolerance, "{what}: {name} is off by {ratio:e}");
    }
}

fn assert_close(what: &str, ours: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(ours.len(), expected.len(), "{what}: number of elements");
    for (i, (a, b)) in ours.iter().zip(expected).enumerate() {
        assert!((a - b).abs() <= tolerance, "{what}[{i}]: {a}, expected {b}");
    }
}

// ---- correct ----------------------------------------------------------------------------------------------------

/// Five points: the error is of fourth order, so that this step leaves little but rounding. Every other architecture takes its
/// log-probabilities at a temperature that is not 1.
#[test]
fn gradients_are_central_differences_for_every_element_of_every_weight() {
    const STEP: f64 = 1e-4;
    let mut host = host(Size::Tiny, Sharing::On);
    let c = weights(host.targets.len());
    let temperatures = [1.0, 0.7].map(|number| Temperature::new(number).unwrap());
    for (tiny, temperature) in tiny::all(Size::Tiny).into_iter().zip(temperatures.into_iter().cycle()) {
        host.temperature = temperature;
        let mut rig = Rig::new(Reference, &tiny, &host.extent(), Keep::Everything);
        let grads = rig.step(&host).grads;
        let names: Vec<String> = rig.model.params_mut().iter().map(|p| p.name.clone()).collect();
        assert_eq!(names.len(), grads.len(), "{}: every weight has a gradient", tiny.name);
        for (p, name) in names.iter().enumerate() {
            let size = norm(&grads[name]);
            let there = if vanishes(name) { size < 1e-12 } else { size > 0.01 };
            assert!(there, "{}: {name} has a gradient of size {size:e}", tiny.name);
            for (i, analytic) in grads[name].iter().enumerate() {
                let x = rig.model.params_mut()[p].value.view().f64s()[i];
                let mut at = |steps: f64| {
                    rig.model.params_mut()[p].value.view_mut().into_f64s()[i] = x + steps * STEP;
                    rig.forward(&host).iter().zip(&c).map(|(logp, c)| c * logp).sum::<f64>()
                };
                let numeric = (at(-2.0) - 8.0 * at(-1.0) + 8.0 * at(1.0) - at(2.0)) / (12.0 * STEP);
                rig.model.params_mut()[p].value.view_mut().into_f64s()[i] = x;
                assert!(
                    (numeric - analytic).abs() <= 1e-6 * analytic.abs() + 1e-9,
                    "{}: {name}[{i}]: central difference {numeric:e}, gradient {analytic:e}",
                    tiny.name
                );
            }
        }
    }
}

/// Logits are divided by it: as if the head's weights were.
#[test]
fn log_probabilities_have_the_temperature_of_the_batch() {
    let mut host = host(Size::Small, Sharing::On);
    let tiny = tiny::with(Size::Small, "llama", json!({}));
    let mut rig = Rig::new(Reference, &tiny, &host.extent(), Keep::Everything);
    let plain = rig.forward(&host);
    host.temperature = Temperature::new(0.5).unwrap();
    let cool = rig.forward(&host);
    assert!(norm(&plain) > 0.0 && plain != cool);
    let head = rig.model.params_mut().into_iter().find(|param| param.name == "lm_head.weight").unwrap();
    head.value.view_mut().into_f64s().iter_mut().for_each(|x| *x *= 2.0);
    host.temperature = Temperature::ONE;
    assert_close("at half the temperature", &rig.forward(&host), &cool, 1e-12);
    for (number, sound) in
        [(0.7, true), (0.0, false), (-1.0, false), (f64::NAN, false), (1e300, false), (1e-300, false)]
    {
        assert_eq!(Temperature::new(number).is_some(), sound, "{number}");
    }
}

/// The yardstick is what rounding every weight once does to the result: some models magnify more than others. The
/// factor leaves room for sums that cancel: a bias of the keys moves all scores of a query nearly alike.
#[test]
fn the_cpu_agrees_with_the_reference_within_the_rounding_of_f32() {
    const ROUNDINGS: f64 = 16.0;
    let off = |a: &[f64], b: &[f64]| norm(&a.iter().zip(b).map(|(a, b)| a - b).collect::<Vec<_>>());
    for size in [Size::Tiny, Size::Small] {
        let host = host(size, Sharing::On);
        for tiny in tiny::all(size) {
            let ours = cpu(&tiny, &host, Keep::Everything).step(&host);
            let mut rig = Rig::new(Reference, &tiny, &host.extent(), Keep::Everything);
            let expected = rig.step(&host);
            for param in rig.model.params_mut() {
                let random = Philox::named(SEED + 2, &param.name);
                let roundings = (0..).map(|i| 1.0 + random.normal(i) * f64::from(f32::EPSILON) / 2.0);
                param.value.view_mut().into_f64s().iter_mut().zip(roundings).for_each(|(x, r)| *x *= r);
            }
            let rounded = rig.step(&host);
            let check = |what: &str, ours: &[f64], expected: &[f64], rounded: &[f64]| {
                let (ours, rounded) = (off(ours, expected), off(rounded, expected));
                assert!(ours <= ROUNDINGS * rounded, "{}: {what}: off by {ours:e}, rounding {rounded:e}", tiny.name);
                let size = norm(expected);
                assert!(rounded <= 1e-5 * size, "{}: {what}: rounding moves {rounded:e} of {size:e}", tiny.name);
            };
            check("logps", &ours.logps, &expected.logps, &rounded.logps);
            for (name, expected) in expected.grads.iter().filter(|(name, _)| !vanishes(name)) {
                check(name, &ours.grads[name], expected, &rounded.grads[name]);
            }
        }
    }
}

/// Otherwise the tests above would compare a part with itself: each key of a configuration must change the result.
#[test]
fn every_part_of_an_architecture_matters() {
    let host = host(Size::Small, Sharing::On);
    let cases = [
        ("mistral", json!({"sliding_window": null})),
        ("mistral", json!({"sliding_window": 18})),
        ("qwen3", json!({"max_window_layers": 0})),
        (
            "qwen3",
            json!({"model_type": "llama", "use_sliding_window": null, "sliding_window": null,
            "max_window_layers": null}),
        ),
        ("llama3", json!({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}})),
        ("llama3", json!({"num_key_value_heads": 2})),
        ("llama", json!({"attention_bias": false})),
        ("llama", json!({"mlp_bias": false})),
        ("llama", json!({"rms_norm_eps": 1e-2})),
        ("qwen2", json!({"tie_word_embeddings": false})),
        ("neox", json!({"use_parallel_residual": false})),
        ("neox", json!({"rotary_pct": 0.4})),
        ("neox", json!({"rotary_emb_base": 100.0})),
        ("neox", json!({"attention_bias": false})),
        ("neox", json!({"hidden_act": "gelu_new"})),
        ("neox", json!({"layer_norm_eps": 1e-2})),
        ("gpt2", json!({"activation_function": "gelu"})),
        ("gpt2", json!({"layer_norm_epsilon": 1e-2})),
        ("gpt2", json!({"tie_word_embeddings": false})),
    ];
    for (name, changes) in cases {
        let [with, without] = [json!({}), changes.clone()]
            .map(|changes| cpu(&tiny::with(Size::Small, name, changes), &host, Keep::Nothing).forward(&host));
        let changed = with.iter().zip(&without).filter(|(a, b)| (*a - *b).abs() > 1e-4).count();
        assert!(changed > 0, "{name}: {changes} changes nothing");
    }
}

/// Both devices share the definition of what a query sees, so it is tested by what one token can reach.
#[test]
fn a_token_reaches_exactly_the_window_behind_it() {
    const LEN: usize = 150;
    const MOVED: usize = 25;
    let sequence = |moved: u32| {
        let ids = (0..LEN).map(|t| ((t * 89 + 3) % 523) as u32 + if t == MOVED { moved } else { 0 }).collect();
        HostBatch::new(&[Example { sequences: vec![Sequence::new(ids, 1)], ..Example::default() }], Sharing::On)
    };
    for window in [Some(1), Some(2), Some(19), Some(64), Some(70), Some(LEN), None] {
        let changes = json!({"num_hidden_layers": 1, "sliding_window": window});
        let mut rig = cpu(&tiny::with(Size::Small, "mistral", changes), &sequence(0), Keep::Nothing);
        let [before, after] = [0, 1].map(|moved| rig.forward(&sequence(moved)));
        let reached: Vec<usize> = (0..LEN - 1).filter(|t| before[*t].to_bits() != after[*t].to_bits()).collect();
        // Row t predicts token t + 1: the row before the moved token has another target.
        let end = window.map_or(LEN - 1, |window| (MOVED + window).min(LEN - 1));
        assert_eq!(reached, (MOVED - 1..end).collect::<Vec<_>>(), "window {window:?}");
    }
}

// ---- the same whatever is kept, shared, batched or threaded -----------------------------------------------------

#[test]
fn recomputed_activations_give_the_same_bits() {
    for size in [Size::Tiny, Size::Small] {
        let host = host(size, Sharing::On);
        for tiny in tiny::all(size) {
            let expected = cpu(&tiny, &host, Keep::Everything).step(&host);
            let mut rig = cpu(&tiny, &host, Keep::Inputs);
            assert_same_step(tiny.name, &rig.step(&host), &expected);
            let logps = cpu(&tiny, &host, Keep::Nothing).forward(&host);
            assert_bits(tiny.name, &logps, &expected.logps);
        }
    }
}

#[test]
#[should_panic(expected = "keep nothing have no backward")]
fn activations_that_keep_nothing_refuse_a_backward() {
    let host = host(Size::Tiny, Sharing::On);
    cpu(&tiny::all(Size::Tiny)[0], &host, Keep::Nothing).step(&host);
}

#[test]
fn sharing_a_prompt_changes_no_bit_of_a_log_probability() {
    let [on, off] = [Sharing::On, Sharing::Off].map(|sharing| host(Size::Small, sharing));
    assert!(on.rows() < off.rows());
    for tiny in tiny::all(Size::Small) {
        let shared = cpu(&tiny, &on, Keep::Everything).step(&on);
        let apart = cpu(&tiny, &off, Keep::Everything).step(&off);
        assert_bits(tiny.name, &shared.logps, &apart.logps);
        assert_close_tensors(tiny.name, &shared.grads, &apart.grads, 1e-5);
        let [shared, apart] =
            [&on, &off].map(|host| Rig::new(Reference, &tiny, &host.extent(), Keep::Everything).step(host));
        assert_close(tiny.name, &shared.logps, &apart.logps, 1e-12);
        assert_close_tensors(tiny.name, &shared.grads, &apart.grads, 1e-11);
    }
}

#[test]
fn threads_and_instruction_sets_change_no_bit() {
    let host = host(Size::Small, Sharing::On);
    for tiny in tiny::all(Size::Small) {
        for family in families() {
            let mut steps = family.into_iter().map(|(what, cpu)| {
                let what = format!("{}, {what}", tiny.name);
                (what, Rig::new(cpu, &tiny, &host.extent(), Keep::Everything).step(&host))
            });
            let (_, expected) = steps.next().unwrap();
            steps.for_each(|(what, step)| assert_same_step(&what, &step, &expected));
        }
    }
}

/// Each example of one sequence.
fn alone(examples: &[Example]) -> Vec<Example> {
    let sequences = examples.iter().flat_map(|e| &e.sequences).cloned();
    sequences.map(|sequence| Example { sequences: vec![sequence], ..Example::default() }).collect()
}

/// Sequences that fill more than one tile of the head's rows.
fn filler(size: Size) -> Vec<Example> {
    let ids = |i: usize| (0..37).map(|t| ((i * 31 + t * 7) % size.vocab()) as u32).collect();
    (0..30).map(|i| Example { row: i, sequences: vec![Sequence::new(ids(i), 1)], ..Example::default() }).collect()
}

#[test]
fn a_sequence_has_the_same_log_probabilities_in_any_company() {
    let examples = Size::Small.examples();
    let reversed: Vec<Example> = examples.iter().rev().cloned().collect();
    let crowd = [filler(Size::Small), examples.clone(), filler(Size::Small)].concat();
    let apart = alone(&examples);
    let mut batches = vec![examples.clone(), reversed, apart.clone(), crowd.clone()];
    batches.extend(apart.into_iter().map(|example| vec![example]));
    let largest = HostBatch::new(&crowd, Sharing::On).extent();
    assert!(largest.targets > cuvee::ops::logprob_head::TILE_ROWS);
    for tiny in tiny::all(Size::Small) {
        // One rig for all: what an earlier, larger batch left behind must not matter either.
        let mut rig = Rig::new(Cpu::new(2).unwrap(), &tiny, &largest, Keep::Nothing);
        let mut known: BTreeMap<Vec<u32>, Vec<f64>> = BTreeMap::new();
        for (which, batch) in batches.iter().enumerate() {
            let host = HostBatch::new(batch, Sharing::On);
            let logps = rig.forward(&host);
            let sequences = batch.iter().flat_map(|example| &example.sequences);
            for (sequence, range) in sequences.zip(&host.sequences) {
                let ours = &logps[range.clone()];
                let expected = known.entry(sequence.ids.clone()).or_insert_with(|| ours.to_vec());
                assert_bits(&format!("{}, batch {which}", tiny.name), ours, expected);
            }
        }
    }
}

/// After a batch in which everything was NaN, every tensor that is not overwritten would show.
#[test]
fn nothing_is_left_over_from_the_batch_before() {
    let large = host(Size::Small, Sharing::Off);
    let small = HostBatch::new(&Size::Small.examples()[1..3], Sharing::On);
    let nan = vec![f64::NAN; large.targets.len()];
    for tiny in tiny::all(Size::Small) {
        for keep in [Keep::Inputs, Keep::Everything] {
            let expected = cpu(&tiny, &small, keep).step(&small);
            let mut rig = cpu(&tiny, &large, keep);
            let embedding = &mut rig.model.params_mut()[0].value;
            let values = embedding.view().f32s().to_vec();
            embedding.view_mut().into_f32s().fill(f32::NAN);
            assert!(rig.forward(&large).iter().all(|logp| logp.is_nan()), "NaN weights stay visible");
            rig.model.backward(&rig.device, &rig.batch, &nan, &mut rig.acts, None).unwrap();
            assert!(rig.grads().values().flatten().any(|x| x.is_nan()));
            rig.model.params_mut()[0].value.view_mut().into_f32s().copy_from_slice(&values);
            assert_same_step(tiny.name, &rig.step(&small), &expected);
        }
    }
}

// ---- gradients add up -------------------------------------------------------------------------------------------

fn backward_adds<B: Backend>(new: impl Fn() -> B, tolerance: f64) {
    let examples = Size::Small.examples();
    let whole = HostBatch::new(&examples, Sharing::On);
    for tiny in tiny::all(Size::Small) {
        let mut rig = Rig::new(new(), &tiny, &whole.extent(), Keep::Inputs);
        let mut once = rig.step(&whole).grads;
        rig.backward(&whole);
        let twice = rig.grads();

        // Two micro-batches give the step of one batch.
        rig.model.zero_grads(&rig.device).unwrap();
        assert!(rig.grads().values().flatten().all(|x| x.to_bits() == 0), "{}: gradients are zeroed", tiny.name);
        let mut done = 0;
        for part in [&examples[..2], &examples[2..]] {
            let part = HostBatch::new(part, Sharing::On);
            rig.forward(&part);
            let c = &weights(whole.targets.len())[done..][..part.targets.len()];
            rig.model.backward(&rig.device, &rig.batch, c, &mut rig.acts, None).unwrap();
            done += part.targets.len();
        }
        assert_close_tensors(tiny.name, &rig.grads(), &once, tolerance);

        once.values_mut().flatten().for_each(|x| *x *= 2.0);
        assert_close_tensors(tiny.name, &twice, &once, tolerance);
    }
}

#[test]
fn backward_adds_to_the_gradients_on_the_cpu() {
    backward_adds(|| Cpu::new(2).unwrap(), 1e-6);
}

#[test]
fn backward_adds_to_the_gradients_on_the_reference() {
    backward_adds(|| Reference, 1e-12);
}

// ---- frozen weights ---------------------------------------------------------------------------------------------

#[test]
fn a_frozen_weight_has_no_gradient_and_changes_no_other() {
    let host = host(Size::Tiny, Sharing::On);
    for tiny in tiny::all(Size::Tiny) {
        let full = cpu(&tiny, &host, Keep::Inputs).step(&host);
        for name in full.grads.keys() {
            for trained in [&|n: &str| n == name, &|n: &str| n != name] as [&dyn Fn(&str) -> bool; 2] {
                let mut expected = full.grads.clone();
                expected.retain(|n, _| trained(n));
                let cpu = Cpu::new(1).unwrap();
                let mut rig = Rig::training(cpu, &tiny, &host.extent(), Keep::Inputs, trained);
                let step = rig.step(&host);
                assert_bits(tiny.name, &step.logps, &full.logps);
                assert_same_tensors(tiny.name, &step.grads, &expected);
                // Nor does it take memory for one.
                let params = rig.model.params_mut();
                let trained = params.iter().filter(|p| p.grad.is_some());
                let bytes: usize = trained.map(|p| (p.value.len() * 4).next_multiple_of(256)).sum();
                let options = Options { trained: &|n| expected.contains_key(n), ..Options::frozen(1) };
                let (spec, naming) = (&tiny.checkpoint.spec, tiny.checkpoint.architecture.naming);
                let plan = Model::<Dry>::plan(DType::F32, spec, naming, options);
                assert_eq!(plan.get(Kind::Grads), bytes, "{}", tiny.name);
            }
        }
        let mut rig = Rig::training(Cpu::new(1).unwrap(), &tiny, &host.extent(), Keep::Inputs, &|_| false);
        assert!(rig.step(&host).grads.is_empty());
    }
}

/// FLOPs of the forward and of the backward.
fn flops(tiny: &Tiny, size: Extent, keep: Keep, trained: &dyn Fn(&str) -> bool) -> [u64; 2] {
    let device = Dry::default();
    let (mut model, mut acts, mut batch) = tiny.build(&mut Dry::arena(DType::F32), &size, keep, trained);
    batch.resize(size);
    model.forward(&device, &batch, &mut acts).unwrap();
    let forward = device.flops();
    model.backward(&device, &batch, &vec![0.0; size.targets], &mut acts, None).unwrap();
    [forward, device.flops() - forward]
}

#[test]
fn a_frozen_matrix_saves_exactly_its_product() {
    let size = host(Size::Small, Sharing::On).extent();
    for tiny in tiny::all(Size::Small) {
        let spec = &tiny.checkpoint.spec;
        let [forward, all] = flops(&tiny, size, Keep::Everything, &|_| true);
        let without = |name: &str| {
            let [same, backward] = flops(&tiny, size, Keep::Everything, &|n| n != name);
            assert_eq!(same, forward, "{}: {name}", tiny.name);
            all - backward
        };
        let head = tiny.name_of(if spec.head == Head::Tied { Slot::Embedding } else { Slot::Head }, 0);
        let head_product = (2 * size.targets * spec.hidden * spec.vocab) as u64;
        assert_eq!(without(&head), head_product, "{}: the head", tiny.name);
        let up = (2 * size.rows * spec.hidden * spec.mlp_dim) as u64;
        assert_eq!(without(&tiny.name_of(Slot::Up, 1)), up, "{}: up", tiny.name);
        assert_eq!(without(&tiny.name_of(Slot::FinalNorm, 0)), 0, "{}: norms are traffic, not work", tiny.name);

        let [_, recomputed] = flops(&tiny, size, Keep::Inputs, &|_| true);
        assert_eq!(recomputed - all, forward - head_product, "{}: recomputing is one forward of the blocks", tiny.name);
    }
}

// ---- decoding ---------------------------------------------------------------------------------------------------

/// What predicts one token.
#[derive(Clone, PartialEq, Debug)]
struct Prediction {
    logits: Vec<f32>,
    hidden: Vec<f32>,
}

impl Prediction {
    fn logp(&self, token: u32) -> f64 {
        let max = self.logits.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
        let sum: f64 = self.logits.iter().map(|l| f64::from(l - max).exp()).sum();
        f64::from(self.logits[token as usize] - max) - sum.ln()
    }
}

/// Rows of the slots: a prompt's, then one for each completion.
const PROMPT_SLOT: usize = 80;
const COMPLETION_SLOT: usize = 20;

struct Decoder {
    rig: Rig<Cpu>,
    kv: KvCache<Cpu>,
    logits: Tensor<Cpu>,
}

impl Decoder {
    fn new(tiny: &Tiny) -> Self {
        let spec = &tiny.checkpoint.spec;
        let extent = Extent { rows: 80, targets: 3, segments: 4, sequences: 3, longest: 100 };
        let rig = Rig::new(Cpu::new(2).unwrap(), tiny, &extent, Keep::Nothing);
        let mut arena = Arena::with_bytes(&rig.device, 1 << 20).unwrap();
        let kv = KvCache::new(&mut arena, spec, PROMPT_SLOT + 3 * COMPLETION_SLOT, extent.rows);
        let logits = arena.floats(Kind::Activations, extent.targets, spec.vocab);
        Self { rig, kv, logits }
    }

    /// Runs `tokens` that go to the cache's rows `append`, and reads off the rows `read`.
    fn run(
        &mut self,
        tokens: &[u32],
        positions: &[u32],
        append: &[u32],
        segments: &[Segment],
        read: &[u32],
    ) -> Vec<Prediction> {
        let Self { rig: Rig { device, model, acts, batch }, kv, logits } = self;
        kv.set_append(device, append).unwrap();
        batch.load_decode(device, tokens, positions, segments, read).unwrap();
        model.decode(device, batch, acts, kv, logits).unwrap();
        let row = |t: &Tensor<Cpu>, i: usize| t.view().slice(i, 1).f32s().to_vec();
        let prediction = |i| Prediction { logits: row(logits, i), hidden: row(&acts.top.normed, i) };
        (0..read.len()).map(prediction).collect()
    }

    /// Fills the prompt's slot with `prompt[piece]`, whose earlier tokens are there.
    fn prefill(&mut self, prompt: &[u32], piece: Range<u32>) -> Prediction {
        let (queries, rows) = (piece.end - piece.start, piece.clone().collect::<Vec<_>>());
        let tokens = &prompt[piece.start as usize..piece.end as usize];
        let slot = Segment { start: 0, len: piece.end, parent: NO_PARENT, position: 0, query_start: 0, queries };
        self.run(tokens, &rows, &rows, &[slot], &[queries - 1]).remove(0)
    }

    /// Fills the prompt's slot in pieces that stop at `ends`, then decodes the completions side by side, each in the
    /// slot named beside it; one that has ended leaves the batch. Returns what predicted each of their tokens.
    fn complete(&mut self, prompt: &[u32], ends: &[u32], own: &[(usize, &[u32])]) -> Vec<Vec<Prediction>> {
        let starts = [0].iter().chain(ends);
        let first = starts.zip(ends).map(|(start, end)| self.prefill(prompt, *start..*end)).last().unwrap();
        let mut all = vec![vec![first]; own.len()];
        let n = prompt.len() as u32;
        let root = Segment { start: 0, len: n, parent: NO_PARENT, position: 0, query_start: 0, queries: 0 };
        for t in 0.. {
            let alive: Vec<usize> = (0..own.len()).filter(|i| t + 1 < own[*i].1.len()).collect();
            if alive.is_empty() {
                return all;
            }
            let slot = |i: &usize| (PROMPT_SLOT + own[*i].0 * COMPLETION_SLOT) as u32;
            let tokens: Vec<u32> = alive.iter().map(|i| own[*i].1[t]).collect();
            let append: Vec<u32> = alive.iter().map(|i| slot(i) + t as u32).collect();
            let read: Vec<u32> = (0..alive.len() as u32).collect();
            let child = |(query_start, i)| Segment {
                start: slot(i),
                len: t as u32 + 1,
                parent: 0,
                position: n,
                query_start,
                queries: 1,
            };
            let children = (0..).zip(&alive).map(child);
            let segments: Vec<Segment> = std::iter::once(root).chain(children).collect();
            let positions = vec![n + t as u32; alive.len()];
            let predictions = self.run(&tokens, &positions, &append, &segments, &read);
            alive.into_iter().zip(predictions).for_each(|(i, p)| all[i].push(p));
        }
        unreachable!("completions end")
    }
}

#[test]
fn decoding_with_a_cache_predicts_what_the_forward_pass_does() {
    let pair = Size::Small.examples().swap_remove(0);
    let [chosen, rejected] = &pair.sequences[..] else { panic!("a pair") };
    let (prompt, first) = (&chosen.ids[..chosen.first], &chosen.ids[chosen.first..]);
    let second = &rejected.ids[rejected.first..];
    let n = prompt.len() as u32;
    let host = HostBatch::new([&pair], Sharing::On);
    for tiny in tiny::all(Size::Small) {
        let mut decoder = Decoder::new(&tiny);
        let both = decoder.complete(prompt, &[n], &[(0, first), (1, second)]);

        let mut rig = cpu(&tiny, &host, Keep::Nothing);
        let logps = rig.forward(&host);
        for ((predictions, tokens), range) in both.iter().zip([first, second]).zip(&host.sequences) {
            assert_eq!(predictions.len(), tokens.len());
            for ((p, token), target) in predictions.iter().zip(tokens).zip(range.clone()) {
                let (ours, expected) = (p.logp(*token), logps[target]);
                assert!((ours - expected).abs() < 1e-5, "{}: {ours}, expected {expected}", tiny.name);
                let hidden = rig.acts.top.normed.view().slice(target, 1).f32s();
                assert_eq!(p.hidden, hidden, "{}: the hidden state before token {target}", tiny.name);
            }
        }

        // Company, order, the place in the cache and the pieces of the prompt change no bit. The cache is not cleared.
        let swapped = decoder.complete(prompt, &[n], &[(2, second), (0, first)]);
        assert!(swapped == [both[1].clone(), both[0].clone()], "{}: in another order", tiny.name);
        let in_pieces = decoder.complete(prompt, &[1, 30, n], &[(0, first), (1, second)]);
        assert!(in_pieces == both, "{}: with the prompt in pieces", tiny.name);
        for (completion, expected) in [first, second].into_iter().zip(&both) {
            let alone = decoder.complete(prompt, &[n], &[(1, completion)]);
            assert!(alone == [expected.clone()], "{}: alone", tiny.name);
        }
    }
}

// ---- random initialization --------------------------------------------------------------------------------------

fn initialized(tiny: &Tiny, seed: u64) -> BTreeMap<String, Vec<f64>> {
    let extent = Extent { rows: 1, targets: 1, segments: 1, sequences: 1, longest: 1 };
    let mut rig = cpu_sized(tiny, &extent);
    init_random(&rig.device, &mut rig.model, seed).unwrap();
    rig.values()
}

fn roles(tiny: &Tiny) -> Vec<(String, Role)> {
    let mut rig = cpu_sized(tiny, &Extent { rows: 1, targets: 1, segments: 1, sequences: 1, longest: 1 });
    rig.model.params_mut().iter().map(|p| (p.name.clone(), p.role)).collect()
}

fn cpu_sized(tiny: &Tiny, extent: &Extent) -> Rig<Cpu> {
    Rig::new(Cpu::new(1).unwrap(), tiny, extent, Keep::Nothing)
}

#[test]
fn random_weights_follow_seed_and_config() {
    for tiny in tiny::all(Size::Small) {
        let values = initialized(&tiny, 1);
        assert_same_tensors(tiny.name, &initialized(&tiny, 1), &values);
        let others = initialized(&tiny, 2);
        let spec = &tiny.checkpoint.spec;
        let to_residual = |name: &str| tiny.name == "gpt2" && name.ends_with("c_proj.weight");
        let mut matrices = Vec::new();
        for (name, role) in roles(&tiny) {
            let (what, values) = (format!("{}: {name}", tiny.name), &values[&name]);
            if role == Role::Norm {
                assert!(values.iter().all(|x| *x == 1.0), "{what}");
            } else if role == Role::Bias {
                assert!(values.iter().all(|x| *x == 0.0), "{what}");
            } else {
                // Two layers write to the residual stream twice each.
                let range = spec.initializer_range / if to_residual(&name) { 2.0 } else { 1.0 };
                let same = values.iter().zip(&others[&name]).filter(|(a, b)| a == b).count();
                assert!(same * 100 <= values.len(), "{what}: another seed, the same values");
                // Six standard errors.
                let n = values.len() as f64;
                let (mean, deviation) = (values.iter().sum::<f64>() / n, norm(values) / n.sqrt());
                assert!(mean.abs() < 6.0 * range / n.sqrt(), "{what}: mean {mean}");
                assert!((deviation / range - 1.0).abs() < 6.0 / (2.0 * n).sqrt(), "{what}: deviation {deviation}");
                matrices.push(values[..8].to_vec());
            }
        }
        for (i, matrix) in matrices.iter().enumerate() {
            assert!(!matrices[..i].contains(matrix), "{}: two tensors with the same numbers", tiny.name);
        }
    }
}

#[test]
fn a_random_weight_depends_on_its_name_and_not_on_its_neighbours() {
    let one = initialized(&tiny::with(Size::Small, "llama", json!({})), 1);
    let changes = json!({"num_hidden_layers": 3, "attention_bias": false, "mlp_bias": false,
        "tie_word_embeddings": true});
    let other = initialized(&tiny::with(Size::Small, "llama", changes), 1);
    let common: Vec<&String> = one.keys().filter(|name| other.contains_key(*name)).collect();
    assert_eq!(common.len(), 2 + 2 * 9, "embedding, final norm, 2 norms and 7 matrices in 2 layers");
    common.into_iter().for_each(|name| assert_bits(name, &one[name], &other[name]));
}

// ---- files ------------------------------------------------------------------------------------------------------

/// Saves the weights of a rig as `edit` changes the list of tensors.
fn save(tiny: &Tiny, edit: impl Fn(&mut Vec<TensorSource>)) -> BTreeMap<String, Vec<f64>> {
    let mut rig = cpu_sized(tiny, &Extent { rows: 1, targets: 1, segments: 1, sequences: 1, longest: 1 });
    let values = rig.values();
    let params = rig.model.params_mut();
    let mut tensors = sources(&rig.device, &params);
    edit(&mut tensors);
    save_safetensors(&tiny.checkpoint.dir.join("model.safetensors"), &tensors, SaveDtype::F32).unwrap();
    values
}

/// What a folder's weights become in a fresh model.
fn loaded(dir: &Path, config: &str) -> cuvee::Result<BTreeMap<String, Vec<f64>>> {
    let checkpoint = Checkpoint::from_config(dir, &dir.join(config))?;
    let (spec, naming) = (&checkpoint.spec, checkpoint.architecture.naming);
    let cpu = Cpu::new(1)?;
    let mut arena = Arena::new(&cpu, &Model::<Dry>::plan(DType::F32, spec, naming, Options::frozen(4)))?;
    let mut model = Model::new(&mut arena, spec, naming, Options::frozen(4));
    load(&cpu, &checkpoint, &Weights::open(dir)?, &mut model)?;
    Ok(model.params_mut().into_iter().map(|p| (p.name.clone(), tiny::read(&cpu, &p.value))).collect())
}

#[test]
fn weights_survive_a_file() {
    for tiny in tiny::all(Size::Small) {
        let values = save(&tiny, |_| {});
        assert_same_tensors(tiny.name, &loaded(&tiny.checkpoint.dir, "config.json").unwrap(), &values);
        let weights = Weights::open(&tiny.checkpoint.dir).unwrap();
        let mut rig = cpu_sized(&tiny, &Extent { rows: 1, targets: 1, segments: 1, sequences: 1, longest: 1 });
        let params = rig.model.params_mut();
        let tensors: std::collections::BTreeSet<&str> = params.iter().map(|p| p.stored.tensor.as_str()).collect();
        assert!(weights.names().eq(tensors), "{}", tiny.name);
        for param in params.iter().filter(|p| p.role != Role::Matrix) {
            let (name, tensor) = (tiny.name, &param.stored.tensor);
            assert_eq!(weights.shape(tensor).unwrap().len(), 1, "{name}: {tensor} is a vector for others");
        }
    }
}

/// Loading fills the rotation tables too: a loaded model computes what the saved one did.
#[test]
fn a_loaded_model_computes_the_same() {
    let host = host(Size::Small, Sharing::On);
    for tiny in tiny::all(Size::Small) {
        save(&tiny, |_| {});
        let expected = cpu(&tiny, &host, Keep::Nothing).forward(&host);
        let (spec, naming) = (&tiny.checkpoint.spec, tiny.checkpoint.architecture.naming);
        let mut rig = cpu(&tiny, &host, Keep::Nothing);
        let options = Options::frozen(host.extent().longest);
        let mut arena = Arena::new(&rig.device, &Model::<Dry>::plan(DType::F32, spec, naming, options)).unwrap();
        rig.model = Model::new(&mut arena, spec, naming, options);
        load(&rig.device, &tiny.checkpoint, &Weights::open(&tiny.checkpoint.dir).unwrap(), &mut rig.model).unwrap();
        assert_bits(tiny.name, &rig.forward(&host), &expected);
    }
}

/// Frozen matrices stay as a file of bfloat16 has them: half the memory, and the bits of the same numbers in f32, in every pass.
#[test]
fn frozen_bfloat16_stays_what_it_is_and_changes_no_bit() {
    let host = host(Size::Small, Sharing::On);
    let lora = Lora { rank: 2, alpha: 3.0, rslora: false, targets: Vec::new(), start: None };
    for tiny in tiny::all(Size::Small) {
        let tiny = Tiny { lora: Some(lora.clone()), ..tiny };
        let device = || Cpu::new(2).unwrap();
        let mut wide = Rig::training(device(), &tiny, &host.extent(), Keep::Everything, &|_| false);
        for param in wide.model.params_mut() {
            let mut values = vec![0.0; param.value.len()];
            param.read(&wide.device, &mut values).unwrap();
            values.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32());
            param.write(&wide.device, &values).unwrap();
        }
        let path = tiny.checkpoint.dir.join("model.safetensors");
        save_safetensors(&path, &sources(&wide.device, &wide.model.params_mut()), SaveDtype::Bf16).unwrap();
        let checkpoint = Checkpoint::open(&tiny.checkpoint.dir).unwrap();
        let (spec, naming) = (&checkpoint.spec, checkpoint.architecture.naming);
        let options = Options::frozen(host.extent().longest).with_lora(&lora);
        let kept = options.holding(&checkpoint, Init::Checkpoint);
        let weights = |storage, options| Model::<Dry>::plan(storage, spec, naming, options).get(Kind::Weights);
        let all = weights(Storage::CPU, options);
        assert!(
            weights(Storage::CPU, kept) * 100 < all * 70,
            "{}: {} of {all}",
            tiny.name,
            weights(Storage::CPU, kept)
        );
        let random = options.holding(&checkpoint, Init::Random { seed: 1 });
        assert_eq!((weights(DType::F32.into(), kept), weights(Storage::CPU, random)), (all, all), "{}", tiny.name);

        let mut rig = Rig::training(device(), &tiny, &host.extent(), Keep::Everything, &|_| false);
        rig.model = {
            let ledger = Model::<Dry>::plan(Storage::CPU, spec, naming, kept);
            Model::new(&mut Arena::new(&rig.device, &ledger).unwrap(), spec, naming, kept)
        };
        load(&rig.device, &checkpoint, &Weights::open(&checkpoint.dir).unwrap(), &mut rig.model).unwrap();
        for (to, from) in rig.model.adapter_mut().into_iter().zip(wide.model.adapter_mut()) {
            let mut values = vec![0.0; from.value.len()];
            from.read(&wide.device, &mut values).unwrap();
            to.write(&rig.device, &values).unwrap();
        }
        assert_same_step(tiny.name, &rig.step(&host), &wide.step(&host));
        let prompt = &host.tokens[..7];
        let request = Request { samples: 3, ..Request::new(prompt, 9, Sampling::plain(1)) };
        let [found, expected] = [&rig, &wide].map(|rig| generate(&rig.device, &rig.model, &request).unwrap());
        assert!(found == expected, "{}: decoded", tiny.name);
        // The file is another one by the time that it is read.
        save_safetensors(&path, &sources(&wide.device, &wide.model.params_mut()), SaveDtype::F32).unwrap();
        let other = load(&rig.device, &checkpoint, &Weights::open(&checkpoint.dir).unwrap(), &mut rig.model);
        assert!(other.unwrap_err().to_string().contains("other weights"), "{}", tiny.name);
    }
}

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

#[test]
fn a_tied_file_may_hold_the_embedding_the_head_or_both() {
    let tiny = tiny::with(Size::Small, "qwen2", json!({}));
    let copy = |tensor: &TensorSource, name: &str, value: f32| TensorSource {
        name: name.into(),
        shape: tensor.shape.clone(),
        fill: Box::new(move |out| {
            out.fill(value);
            Ok(())
        }),
    };
    let rename = |tensors: &mut Vec<TensorSource>| {
        let embedding = tensors.iter_mut().find(|t| t.name == EMBEDDING).unwrap();
        embedding.name = HEAD.into();
    };
    for edit in [&|_: &mut Vec<TensorSource>| {}, &rename] as [&dyn Fn(&mut Vec<TensorSource>); 2] {
        let values = save(&tiny, edit);
        assert_same_tensors("one of them", &loaded(&tiny.checkpoint.dir, "config.json").unwrap(), &values);
    }
    // With both, the embedding counts, as for transformers.
    let values = save(&tiny, |tensors| {
        let head = copy(&tensors[0], HEAD, 7.0);
        tensors.push(head);
    });
    assert_same_tensors("both", &loaded(&tiny.checkpoint.dir, "config.json").unwrap(), &values);
    save(&tiny, |tensors| tensors.retain(|t| t.name != EMBEDDING));
    let message = loaded(&tiny.checkpoint.dir, "config.json").unwrap_err().to_string();
    assert!(message.contains(EMBEDDING), "{message}");
}

/// OpenAI's files know no "transformer." and keep the causal masks; old GPT-NeoX files keep masks and frequencies;
/// transformers 5 calls the head lm_head. A fused tensor of another size is refused by name.
#[test]
fn files_that_others_wrote_are_read() {
    let cases: [(&str, [&str; 2], &[&str]); 2] = [
        ("gpt2", ["transformer.", ""], &["h.0.attn.bias", "h.1.attn.masked_bias"]),
        (
            "neox",
            ["embed_out.", "lm_head."],
            &[
                "gpt_neox.layers.0.attention.bias",
                "gpt_neox.layers.1.attention.masked_bias",
                "gpt_neox.layers.0.attention.rotary_emb.inv_freq",
            ],
        ),
    ];
    for (name, [ours, theirs], buffers) in cases {
        let tiny = tiny::with(Size::Small, name, json!({}));
        let values = save(&tiny, |tensors| {
            for tensor in tensors.iter_mut() {
                if let Some(rest) = tensor.name.strip_prefix(ours) {
                    tensor.name = format!("{theirs}{rest}");
                }
            }
            tensors.extend(buffers.iter().map(|name| zeros(name, &[1, 1, 4, 4])));
        });
        assert_same_tensors(name, &loaded(&tiny.checkpoint.dir, "config.json").unwrap(), &values);
        save(&tiny, |tensors| tensors.push(zeros("h.0.attn.c_attn.sinks", &[4])));
        let message = loaded(&tiny.checkpoint.dir, "config.json").unwrap_err().to_string();
        assert!(message.contains("\"h.0.attn.c_attn.sinks\" has no place"), "{message}");

        let fused = (tiny.checkpoint.architecture.naming)(&tiny.checkpoint.spec, Slot::Key, 1).tensor;
        save(&tiny, |tensors| {
            let tensor = tensors.iter_mut().find(|t| t.name == fused).unwrap();
            *tensor = zeros(&fused, &[24, 71]);
        });
        let message = loaded(&tiny.checkpoint.dir, "config.json").unwrap_err().to_string();
        let implied = if name == "gpt2" { "[24, 72]" } else { "[72, 24]" };
        assert!(message.contains(&format!("{fused:?} has shape [24, 71], the config implies {implied}")), "{message}");
    }
}

/// A tensor of zeros.
fn zeros(name: &str, shape: &[usize]) -> TensorSource<'static> {
    TensorSource { name: name.into(), shape: shape.to_vec(), fill: Box::new(|_| Ok(())) }
}

#[test]
fn weights_and_config_that_do_not_belong_together_are_refused_by_name() {
    const UP: &str = "model.layers.1.mlp.up_proj.weight";
    const BIAS: &str = "model.layers.0.self_attn.q_proj.bias";
    let tiny = tiny::with(Size::Small, "llama", json!({}));
    let dir = tiny.checkpoint.dir.as_path();
    let refused = |config: &str, parts: &[&str]| {
        let message = loaded(dir, config).unwrap_err().to_string();
        for part in [&["model.safetensors: "], parts].concat() {
            assert!(message.contains(part), "expected {part:?} in: {message}");
        }
        assert!(message.starts_with(&dir.display().to_string()), "{message}");
    };
    let at = |tensors: &[TensorSource]| tensors.iter().position(|t| t.name == UP).unwrap();

    save(&tiny, |tensors| tensors.retain(|t| t.name != UP));
    refused("config.json", &[&format!("has no tensor {UP:?}"), "is this the right config.json?"]);
    save(&tiny, |tensors| {
        let at = at(tensors);
        tensors[at] = zeros(UP, &[36, 24]);
    });
    refused("config.json", &[&format!("{UP:?} has shape [36, 24], the config implies [37, 24]"), "right config.json?"]);
    save(&tiny, |tensors| {
        let at = at(tensors);
        tensors[at].shape = vec![37 * 24];
    });
    refused("config.json", &[&format!("{UP:?} has shape [888]")]);
    save(&tiny, |tensors| {
        let at = at(tensors);
        let fill = |out: &mut [f32]| {
            out[100] = f32::NAN;
            Ok(())
        };
        tensors[at].fill = Box::new(fill);
    });
    refused("config.json", &[&format!("{UP:?} holds NaN at index 100"), "get another copy"]);
    save(&tiny, |tensors| tensors.push(zeros("model.layers.0.self_attn.sinks", &[4])));
    refused("config.json", &["\"model.layers.0.self_attn.sinks\" has no place", "do they belong together?"]);
    save(&tiny, |tensors| tensors.push(zeros("model.rotary_emb.inv_freq", &[3])));
    loaded(dir, "config.json").expect("old files store the frequencies");

    // The file is right, the configuration is not.
    save(&tiny, |_| {});
    let with_config = |changes, parts: &[&str]| {
        fs::write(dir.join("other.json"), tiny::merged(tiny.config(), changes).to_string()).unwrap();
        refused("other.json", parts);
    };
    let nowhere = "has no place in the model that config.json describes; do they belong together?";
    with_config(json!({"attention_bias": false}), &["bias\"", "self_attn", nowhere]);
    with_config(json!({"num_hidden_layers": 1}), &["\"model.layers.1.", nowhere]);
    with_config(
        json!({"num_hidden_layers": 3}),
        &["has no tensor \"model.layers.2.", "is this the right config.json?"],
    );
    with_config(json!({"vocab_size": 524}), &[EMBEDDING, "[523, 24]", "[524, 24]"]);
    with_config(json!({"num_key_value_heads": 4}), &["k_proj", "[12, 24]", "[24, 24]"]);
    with_config(json!({"model_type": "mistral", "attention_bias": null, "mlp_bias": null}), &[nowhere]);
    let tied = tiny::merged(tiny.config(), json!({"tie_word_embeddings": true}));
    fs::write(dir.join("other.json"), tied.to_string()).unwrap();
    loaded(dir, "other.json").expect("a tied model's file may hold the head as well");
    assert!(Weights::open(dir).unwrap().shape(BIAS).is_some());
}

#[test]
fn a_folder_that_is_no_model_says_what_a_model_is() {
    let dir = tempfile::tempdir().unwrap();
    let message = |path: &Path| Checkpoint::open(path).err().unwrap().to_string();
    let absent = message(&dir.path().join("nowhere"));
    assert!(
        absent.contains("nowhere: there is no such folder; a model is a folder with config.json in it"),
        "{absent}"
    );
    let empty = message(dir.path());
    assert!(empty.contains("a model is a folder with config.json in it"), "{empty}");
    assert!(empty.starts_with(&dir.path().display().to_string()), "{empty}");
    tiny::write_config(dir.path(), &json!({"model_type": "mamba"}));
    let unknown = message(dir.path());
    assert!(unknown.contains("config.json: \"model_type\": \"mamba\" is not supported; llama, "), "{unknown}");

    let tiny = tiny::with(Size::Small, "llama", json!({}));
    let message = loaded(&tiny.checkpoint.dir, "config.json").unwrap_err().to_string();
    assert!(message.contains("holds neither model.safetensors nor"), "{message}");
}

// ---- memory -----------------------------------------------------------------------------------------------------

#[test]
fn the_plan_is_what_the_run_takes() {
    for size in [Size::Tiny, Size::Small] {
        for tiny in tiny::all(size) {
            let mut previous = 0;
            for keep in [Keep::Nothing, Keep::Inputs, Keep::Everything] {
                let extent = host(size, Sharing::On).extent();
                let plan = tiny.plan(&extent, keep, &|_| true);
                let cpu = Cpu::new(1).unwrap();
                let mut arena = Arena::new(&cpu, &plan).unwrap();
                let (mut model, ..) = tiny.build(&mut arena, &extent, keep, &|_| true);
                assert_eq!(arena.ledger(), plan, "{}, {keep:?}", tiny.name);
                let options = Options::train_all(extent.longest);
                let (spec, naming) = (&tiny.checkpoint.spec, tiny.checkpoint.architecture.naming);
                let of_model = Model::<Dry>::plan(DType::F32, spec, naming, options);
                for kind in [Kind::Weights, Kind::Grads, Kind::States] {
                    assert_eq!(plan.get(kind), of_model.get(kind), "{}: {kind:?}", tiny.name);
                }
                let params = model.params_mut();
                let bytes: usize = params.iter().map(|p| (p.value.len() * 4).next_multiple_of(256)).sum();
                assert_eq!(plan.get(Kind::Grads), bytes, "{}", tiny.name);
                assert!(plan.total() > previous, "{}: keeping more takes more", tiny.name);
                previous = plan.total();
            }
        }
    }
}

/// Counted by hand for the model with the most parts: two bytes for what is stored, four for what must be exact.
#[test]
fn in_bfloat16_weights_and_activations_take_half() {
    let tiny = tiny::with(Size::Small, "qwen3", json!({}));
    let (spec, e) = (&tiny.checkpoint.spec, host(Size::Small, Sharing::On).extent());
    let padded = |bytes: usize| bytes.next_multiple_of(256);
    // Columns of tensors with `rows` rows.
    let stored = |rows: usize, cols: &[usize]| cols.iter().map(|cols| padded(2 * rows * cols)).sum::<usize>();
    let exact = |rows: usize, cols: &[usize]| cols.iter().map(|cols| padded(4 * rows * cols)).sum::<usize>();
    let (hidden, mlp) = (spec.hidden, spec.mlp_dim);
    let (wide, narrow) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);

    // q, k, their raw forms, v, o, mid, gate, up; statistics of two norms, of both heads' norms, lse.
    let block = stored(e.rows, &[wide, narrow, wide, narrow, narrow, wide, hidden, mlp, mlp])
        + exact(e.rows, &[1, 1, spec.heads, spec.kv_heads, spec.heads]);
    // Shared: normed and activated; gradients by residual, normed, o, q, k, v, both raw, activated, gate, up.
    let shared = stored(e.rows, &[hidden, mlp])
        + stored(e.rows, &[hidden, hidden, wide, wide, narrow, narrow, wide, narrow, mlp, mlp, mlp]);
    // Rows, normed and both gradients; statistics, logp, lse, dlogp; completion rows and targets.
    let top = stored(e.targets, &[hidden; 4]) + exact(e.targets, &[1; 6]);
    // Tokens and positions, segments.
    let indices = exact(e.rows, &[1, 1]) + exact(e.segments, &[Segment::WORDS]);
    let residual = stored(e.rows, &vec![hidden; spec.layers + 1]);

    let plan = tiny.plan_in(DType::Bf16, &e, Keep::Everything, &|_| true);
    assert_eq!(plan.get(Kind::Activations), residual + spec.layers * block + shared + top + indices);
    let (spec, naming) = (&tiny.checkpoint.spec, tiny.checkpoint.architecture.naming);
    let mut model = Model::new(&mut Dry::arena(DType::F32), spec, naming, Options::frozen(0));
    let lens: Vec<usize> = model.params_mut().iter().map(|p| p.value.len()).collect();
    let tables = exact(e.longest, &[spec.head_dim / 2; 2]);
    assert_eq!(plan.get(Kind::Weights), stored(1, &lens) + tables);
    assert_eq!(
        [Kind::Grads, Kind::States].map(|kind| plan.get(kind)),
        [exact(1, &lens), 0],
        "masters are the optimizer's"
    );
    assert_eq!(plan.get(Kind::Workspace), exact(e.targets.min(1024), &[512]));

    let frozen = tiny.plan_in(DType::Bf16, &e, Keep::Nothing, &|_| false);
    assert_eq!([Kind::Grads, Kind::States].map(|kind| frozen.get(kind)), [0, 0]);
    let in_f32 = tiny.plan(&e, Keep::Everything, &|_| true);
    assert_eq!([Kind::Grads, Kind::States].map(|kind| in_f32.get(kind)), [plan.get(Kind::Grads), 0]);
}

#[test]
#[should_panic(expected = "was not planned")]
fn what_was_not_planned_is_refused() {
    let tiny = &tiny::all(Size::Tiny)[0];
    let extent = host(Size::Tiny, Sharing::On).extent();
    let cpu = Cpu::new(1).unwrap();
    let mut arena = Arena::new(&cpu, &tiny.plan(&extent, Keep::Inputs, &|_| true)).unwrap();
    tiny.build(&mut arena, &extent, Keep::Inputs, &|_| true);
    arena.floats(Kind::Workspace, 1, 1);
}

#[test]
fn activations_do_not_grow_with_the_vocabulary() {
    let extent = Extent { rows: 3000, targets: 2000, segments: 9, sequences: 6, longest: 700 };
    for name in tiny::all(Size::Small).iter().map(|tiny| tiny.name) {
        let ledger = |vocab: usize| {
            let tiny = tiny::with(Size::Small, name, json!({"vocab_size": vocab}));
            let mut arena = Dry::arena(DType::F32);
            Acts::new(&mut arena, &tiny.checkpoint.spec, &extent, Keep::Everything);
            Batch::new(&mut arena, &extent);
            arena.ledger()
        };
        assert_eq!(ledger(123), ledger(50257), "{name}");
    }
}

#[test]
fn every_weight_is_listed_once_with_its_role() {
    for tiny in tiny::all(Size::Tiny) {
        let mut rig = cpu_sized(&tiny, &Extent { rows: 1, targets: 1, segments: 1, sequences: 1, longest: 1 });
        let params = rig.model.params_mut();
        let names: std::collections::BTreeSet<&String> = params.iter().map(|p| &p.name).collect();
        assert_eq!(names.len(), params.len(), "{}", tiny.name);
        let head = tiny.name_of(Slot::Head, 0);
        assert_eq!(names.contains(&head), tiny.checkpoint.spec.head == Head::Own, "{}", tiny.name);
        for param in &params {
            let expected = match param.stored.tensor.as_str() {
                name if name.ends_with("bias") => Role::Bias,
                name if name.contains("norm") || name.contains(".ln_") => Role::Norm,
                _ => Role::Matrix,
            };
            assert_eq!(param.role, expected, "{}: {}", tiny.name, param.name);
        }
    }
}

/// Activations and workspace of a step do not know the vocabulary; the arithmetic of equal examples adds up exactly.
#[test]
fn memory_is_flat_in_the_vocabulary_and_work_is_linear() {
    let (host, examples) = (host(Size::Small, Sharing::On), Size::Small.examples());
    for name in ["llama", "mistral", "qwen3"] {
        let of_vocab = |vocab: usize| {
            let tiny = tiny::with(Size::Small, name, serde_json::json!({"vocab_size": vocab}));
            let plan = tiny.plan(&host.extent(), Keep::Everything, &|_| true);
            [Kind::Activations, Kind::Workspace].map(|kind| plan.get(kind))
        };
        assert_eq!(of_vocab(1 << 10), of_vocab(1 << 17), "{name}");

        let tiny = tiny::with(Size::Small, name, serde_json::json!({}));
        let flops = |copies: usize| {
            let host = cuvee::data::Batch::new(std::iter::repeat_n(&examples[0], copies), Sharing::On);
            let (device, size) = (Dry::default(), host.extent());
            let (mut model, mut acts, mut batch) =
                tiny.build(&mut Dry::arena(DType::F32), &size, Keep::Inputs, &|_| true);
            batch.load(&device, &host).unwrap();
            model.forward(&device, &batch, &mut acts).unwrap();
            model.backward(&device, &batch, &vec![0.0; size.targets], &mut acts, None).unwrap();
            device.flops()
        };
        assert_eq!([2, 3, 7].map(flops), [2, 3, 7].map(|copies| copies * flops(1)), "{name}");
    }
}
