//! KL to references on top of whole models: its gradient, on every device; what of a reference is in memory; and the
//! concentration of the policy's distributions.

use cuvee::checkpoint::{SaveDtype, save_safetensors};
use cuvee::data::{Batch as HostBatch, Example, Extent, Sequence, Sharing, Temperature};
use cuvee::device::{Arena, Cpu, DType, Dry, Kind, Reference, Tensor};
use cuvee::model::{Acts, Init, Keep, KlActs, KlTerm, Moments, RefHeads, init_random, sources};
use cuvee::ops::Backend;
use half::bf16;
use serde_json::json;

use crate::common::kl::{KlRig, hidden_rows, kl_weights};
use crate::tiny::{self, SEED, Size, Tiny, read, weights};

fn host(size: Size) -> HostBatch {
    HostBatch::new(&size.examples(), Sharing::On)
}

/// Another architecture and another hidden size than any policy of these tests, and a tied head.
fn references(size: Size) -> [Tiny; 2] {
    let wider = json!({"hidden_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1});
    [tiny::with(size, "qwen2", wider), tiny::with(size, "neox", json!({}))]
}

/// Five points: the error is of fourth order, so that this step leaves little but rounding.
#[test]
fn gradients_of_a_kl_are_central_differences_for_every_element_of_every_weight() {
    const STEP: f64 = 1e-4;
    let mut host = host(Size::Tiny);
    let refs = references(Size::Tiny);
    for (name, temperature) in [("llama", 1.0), ("qwen2", 0.7), ("gpt2", 1.5)] {
        host.temperature = Temperature::new(temperature).unwrap();
        let tiny = tiny::with(Size::Tiny, name, json!({}));
        let mut kl = KlRig::new(|| Reference, &tiny, &refs.each_ref(), &host, &|_| true);
        let (values, grads) = kl.step(&host);
        let (c, d) = (weights(values[0].len()), kl_weights(values[1].len()));
        assert!(values[1].iter().all(|kl| *kl > 0.01), "{name}: the references are far: {:?}", values[1]);
        let names: Vec<String> = kl.rig.model.params_mut().iter().map(|p| p.name.clone()).collect();
        for (p, weight) in names.iter().enumerate() {
            for (i, analytic) in grads[weight].iter().enumerate() {
                let x = kl.rig.model.params_mut()[p].value.view().f64s()[i];
                let mut at = |steps: f64| {
                    kl.rig.model.params_mut()[p].value.view_mut().into_f64s()[i] = x + steps * STEP;
                    let [logps, kls] = kl.forward(&host);
                    let terms = logps.iter().zip(&c).chain(kls.iter().zip(&d));
                    terms.map(|(x, c)| x * c).sum::<f64>()
                };
                let numeric = (at(-2.0) - 8.0 * at(-1.0) + 8.0 * at(1.0) - at(2.0)) / (12.0 * STEP);
                kl.rig.model.params_mut()[p].value.view_mut().into_f64s()[i] = x;
                assert!(
                    (numeric - analytic).abs() <= 1e-6 * analytic.abs() + 1e-8,
                    "{name}: {weight}[{i}]: central difference {numeric:e}, gradient {analytic:e}"
                );
            }
        }
    }
}

fn relative(found: &[f64], expected: &[f64]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut found.iter().zip(expected).map(|(a, b)| a - b)) / norm(&mut expected.iter().copied())
}

#[test]
fn the_cpu_agrees_with_the_reference_and_a_frozen_head_stays() {
    let host = host(Size::Small);
    let refs = references(Size::Small);
    for name in ["llama", "qwen2"] {
        let tiny = tiny::with(Size::Small, name, json!({}));
        let head = "lm_head.weight";
        for trained in [&|_: &str| true, &|name: &str| name != head] as [&dyn Fn(&str) -> bool; 2] {
            let (found, grads) =
                KlRig::new(|| Cpu::new(2).unwrap(), &tiny, &refs.each_ref(), &host, trained).step(&host);
            let (expected, exact) = KlRig::new(|| Reference, &tiny, &refs.each_ref(), &host, trained).step(&host);
            assert!(relative(&found[1], &expected[1]) < 1e-5, "{name}: {:e}", relative(&found[1], &expected[1]));
            assert_eq!(grads.len(), exact.len());
            assert_eq!(grads.contains_key(head), name == "llama" && trained(head));
            for (weight, exact) in &exact {
                let off = relative(&grads[weight], exact);
                assert!(off < 1e-4, "{name}: {weight} is off by {off:e}");
            }
        }
    }
}

/// A micro-batch after a larger one, and a term that weighs nothing.
#[test]
fn a_term_without_weight_changes_no_gradient_and_nothing_is_left_over() {
    let (large, small) = (host(Size::Small), HostBatch::new(&Size::Small.examples()[1..3], Sharing::On));
    let (tiny, refs) = (tiny::with(Size::Small, "llama", json!({})), references(Size::Small));
    let cpu = || Cpu::new(2).unwrap();
    let expected = KlRig::new(cpu, &tiny, &refs.each_ref(), &small, &|_| true).step(&small);
    let mut kl = KlRig::new(cpu, &tiny, &refs.each_ref(), &large, &|_| true);
    kl.step(&large);
    for (k, rows) in hidden_rows(&refs.each_ref(), &small).iter().enumerate() {
        kl.acts.load(&kl.rig.device, k, rows).unwrap();
    }
    assert!(kl.step(&small) == expected, "the larger batch before shows");

    let plain = kl.rig.step(&small).grads;
    kl.forward(&small);
    kl.rig.model.zero_grads(&kl.rig.device).unwrap();
    let (rig, none) = (&mut kl.rig, vec![0.0; 2 * small.targets.len()]);
    let term = KlTerm { heads: &kl.heads, acts: &mut kl.acts, dkl: &none };
    rig.model.backward(&rig.device, &rig.batch, &weights(small.targets.len()), &mut rig.acts, Some(term)).unwrap();
    assert!(rig.grads() == plain, "a term of weight 0 has a gradient");
}

/// What is cached of a reference is rounded to bfloat16: the only distance that a policy has from itself.
#[test]
fn a_policy_is_near_itself() {
    let host = host(Size::Small);
    for tiny in tiny::all(Size::Small) {
        let mut kl = KlRig::new(|| Cpu::new(2).unwrap(), &tiny, &[&tiny], &host, &|_| true);
        let [_, kls] = kl.forward(&host);
        let largest = kls.iter().copied().fold(0.0, f64::max);
        assert!(kls.iter().all(|kl| (-1e-5..1e-3).contains(kl)) && largest > 0.0, "{}: {kls:?}", tiny.name);
    }
}

/// Tied or not, from a file with nothing in it but the head.
#[test]
fn of_a_reference_the_head_is_read_and_nothing_else() {
    let (policy, one) = (
        tiny::with(Size::Small, "llama", json!({})),
        Extent { rows: 2, targets: 1, segments: 2, sequences: 1, longest: 2 },
    );
    let cpu = Cpu::new(1).unwrap();
    let cases = [
        ("qwen2", "model.embed_tokens.weight"),
        ("llama", "lm_head.weight"),
        ("gpt2", "transformer.wte.weight"),
        ("neox", "embed_out.weight"),
    ];
    for (name, tensor) in cases {
        let tiny = tiny::with(Size::Small, name, json!({}));
        let mut rig = tiny::Rig::new(Cpu::new(1).unwrap(), &tiny, &one, Keep::Nothing);
        let params = rig.model.params_mut();
        let mut tensors = sources(&rig.device, &params);
        tensors.retain(|t| t.name == tensor);
        save_safetensors(&tiny.checkpoint.dir.join("model.safetensors"), &tensors, SaveDtype::F32).unwrap();
        let refs = [&tiny.checkpoint];
        let plan = Dry::measure(DType::F32, |arena| RefHeads::new(arena, &policy.checkpoint.spec, &refs).unwrap());
        let spec = &tiny.checkpoint.spec;
        assert_eq!(plan.total(), Arena::<Dry>::bytes_of(DType::F32, spec.vocab, spec.hidden), "{name}");
        let rows: Vec<bf16> = (0..spec.hidden).map(|i| bf16::from_f32(i as f32 / 8.0 - 1.0)).collect();
        // The rows of a policy with random weights, beside the head from the file and from the seed.
        let kl = [Init::Checkpoint, Init::Random { seed: SEED }].map(|init| {
            let mut arena = Arena::with_bytes(&cpu, 16 << 20).unwrap();
            let mut heads = RefHeads::new(&mut arena, &policy.checkpoint.spec, &refs).unwrap();
            heads.fill(&cpu, 0, &tiny.checkpoint, init).unwrap();
            let mut acts = KlActs::new(&mut arena, &heads, 1);
            acts.load(&cpu, 0, &rows).unwrap();
            let (mut model, mut policy_acts, mut batch) = policy.build(&mut arena, &one, Keep::Nothing, &|_| false);
            init_random(&cpu, &mut model, SEED).unwrap();
            let sequences = vec![Sequence::new(vec![3, 5], 1)];
            batch.load(&cpu, &HostBatch::new(&[Example { sequences, ..Example::default() }], Sharing::On)).unwrap();
            model.forward(&cpu, &batch, &mut policy_acts).unwrap();
            model.token_kl(&cpu, &batch, &policy_acts, &heads, &mut acts).unwrap();
            acts.read(&cpu, 1).unwrap()
        });
        assert!(kl[0] == kl[1] && kl[0][0] > 0.0, "{name}: {kl:?}");
    }
}

#[test]
fn a_reference_with_another_vocabulary_is_refused() {
    let (policy, other) =
        (tiny::with(Size::Small, "llama", json!({})), tiny::with(Size::Small, "qwen2", json!({"vocab_size": 524})));
    let refs = [&policy.checkpoint, &other.checkpoint];
    let refused = RefHeads::new(&mut Dry::arena(DType::F32), &policy.checkpoint.spec, &refs).err().unwrap().to_string();
    let dir = other.checkpoint.dir.display().to_string();
    for part in ["--kl-penalty", "same vocabulary", &dir, "524", "523"] {
        assert!(refused.contains(part), "{refused}");
    }
}

/// Whatever the number of references, beside what is theirs: their head, their hidden rows, and a few numbers a target.
#[test]
fn a_reference_takes_its_head_and_its_hidden_rows() {
    const TARGETS: usize = 3000;
    let [a, b] = references(Size::Small);
    let policy = &a.checkpoint.spec;
    let plan = |refs: &[&Tiny]| {
        let refs: Vec<_> = refs.iter().map(|tiny| &tiny.checkpoint).collect();
        Dry::measure(DType::Bf16, |arena| {
            let heads = RefHeads::new(arena, policy, &refs).unwrap();
            KlActs::new(arena, &heads, TARGETS)
        })
    };
    let (one, two) = (plan(&[&a]), plan(&[&a, &b]));
    let more = |kind| two.get(kind) - one.get(kind);
    let spec = &b.checkpoint.spec;
    let stored = |rows| Arena::<Dry>::bytes_of(DType::Bf16, rows, spec.hidden);
    assert_eq!([more(Kind::Weights), more(Kind::Workspace), more(Kind::Grads)], [stored(spec.vocab), 0, 0]);
    let numbers = more(Kind::Activations) - stored(TARGETS);
    assert!((12 * TARGETS..12 * TARGETS + 3 * 256).contains(&numbers), "{numbers}");
}

// ---- entropy, ln sum p^2 -----------------------------------------------------------------------------------------------

const BOTH: Moments = Moments { entropy: true, ln_sum_p2: true };

/// Where they are asked for; each costs a number a target, and changes no log-probability.
#[test]
fn the_concentration_of_a_distribution_comes_with_the_forward_pass() {
    let host = host(Size::Small);
    let (size, targets) = (host.extent(), host.targets.len());
    for tiny in tiny::all(Size::Small) {
        let expected = with_moments(Reference, &tiny, &host, targets);
        let found = with_moments(Cpu::new(2).unwrap(), &tiny, &host, targets);
        let most = (Size::Small.vocab() as f64).ln();
        for t in 0..targets {
            let ([_, entropy, ln_sum_p2], name) = (expected.each_ref().map(|of| of[t]), &tiny.name);
            assert!((found[1][t] - entropy).abs() < 1e-3, "{name}: {}, expected {entropy}", found[1][t]);
            assert!((found[2][t] - ln_sum_p2).abs() < 1e-3, "{name}: {}, expected {ln_sum_p2}", found[2][t]);
            // By Jensen the two bound each other.
            assert!(
                (0.0..=most).contains(&entropy) && (-entropy..=0.0).contains(&ln_sum_p2),
                "{name}: {entropy}, {ln_sum_p2}"
            );
        }
        let plain = tiny::Rig::new(Cpu::new(2).unwrap(), &tiny, &size, Keep::Nothing).forward(&host);
        assert!(plain == found[0], "{}: other log-probabilities", tiny.name);
        let spec = &tiny.checkpoint.spec;
        let [without, with] = [false, true].map(|with| {
            Dry::measure(DType::Bf16, |arena| {
                let acts = Acts::new(arena, spec, &size, Keep::Nothing);
                if with { acts.with_moments(arena, BOTH) } else { acts }
            })
        });
        assert_eq!(with.total() - without.total(), 2 * Arena::<Dry>::bytes_of(DType::F32, targets, 1));
    }
}

/// Log-probabilities, entropies and `ln_sum_p2` of every target.
fn with_moments<B: Backend>(device: B, tiny: &Tiny, host: &HostBatch, targets: usize) -> [Vec<f64>; 3] {
    let mut rig = tiny::Rig::new(device, tiny, &host.extent(), Keep::Nothing);
    let mut arena = Arena::with_bytes(&rig.device, 2 * Arena::<B>::bytes_of(DType::F32, targets, 1)).unwrap();
    rig.acts = rig.acts.with_moments(&mut arena, BOTH);
    let logps = rig.forward(host);
    let moment = |of: &Option<Tensor<B>>| read(&rig.device, of.as_ref().unwrap());
    [logps, moment(&rig.acts.top.entropy), moment(&rig.acts.top.ln_sum_p2)]
}
