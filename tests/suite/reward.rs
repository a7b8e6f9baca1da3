//! Reward models: one number for a sequence in place of logits, trained, saved and loaded.

use std::collections::BTreeMap;
use std::fs;

use cuvee::checkpoint::hf::{RewardModel, write_config};
use cuvee::checkpoint::{SaveDtype, Weights, save_safetensors};
use cuvee::data::{Batch as HostBatch, Example, Extent, Read, Sharing};
use cuvee::device::{Arena, Cpu, DType, Dry, Kind, Philox, Reference};
use cuvee::model::arch::Slot;
use cuvee::model::{Checkpoint, Head, Init, Keep, Model, Options, init_random, sources};
use cuvee::ops::Backend;
use serde_json::json;

use crate::tiny::{self, Rig, SEED, Size, Tiny, classifier, rewards, weights};

const LAST: Read = Read::Last { pad: None };

fn host(size: Size, sharing: Sharing) -> HostBatch {
    HostBatch::reading(LAST, &size.examples(), sharing)
}

fn rig<B: Backend>(device: B, tiny: &Tiny, host: &HostBatch) -> Rig<B> {
    Rig::new(device, tiny, &host.extent(), Keep::Everything)
}

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|x| x * x).sum::<f64>().sqrt()
}

// ---- correct ----------------------------------------------------------------------------------------------------

/// As for log-probabilities, over every element of every weight; the unread vocabulary head is not among them.
#[test]
fn gradients_of_scores_are_central_differences() {
    const STEP: f64 = 1e-4;
    let host = host(Size::Tiny, Sharing::On);
    let c = weights(host.sequences.len());
    for tiny in rewards(Size::Tiny) {
        let mut rig = rig(Reference, &tiny, &host);
        let grads = rig.score_step(&host).grads;
        let names: Vec<String> = rig.model.params_mut().iter().map(|p| p.name.clone()).collect();
        assert!(names.contains(&"score.weight".to_string()) && !names.contains(&tiny.name_of(Slot::Head, 0)));
        for (p, name) in names.iter().enumerate() {
            let vanishes = name.ends_with("c_attn.bias.key");
            assert!(vanishes || norm(&grads[name]) > 1e-3, "{}: {name} has no gradient", tiny.name);
            for (i, analytic) in grads[name].iter().enumerate() {
                let x = rig.model.params_mut()[p].value.view().f64s()[i];
                let mut at = |steps: f64| {
                    rig.model.params_mut()[p].value.view_mut().into_f64s()[i] = x + steps * STEP;
                    rig.scores(&host).iter().zip(&c).map(|(score, c)| c * score).sum::<f64>()
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

#[test]
fn the_cpu_gives_the_scores_and_gradients_of_the_reference() {
    let host = host(Size::Small, Sharing::On);
    for tiny in rewards(Size::Small) {
        let (mut ours, mut exact) = (rig(Cpu::new(2).unwrap(), &tiny, &host), rig(Reference, &tiny, &host));
        for (a, b) in ours.scores(&host).iter().zip(exact.scores(&host)) {
            assert!((a - b).abs() <= 1e-4 * b.abs().max(1.0), "{}: {a}, expected {b}", tiny.name);
        }
        let expected = exact.score_step(&host).grads;
        for (name, ours) in ours.score_step(&host).grads.iter().filter(|(name, _)| !name.ends_with("bias.key")) {
            let off: Vec<f64> = ours.iter().zip(&expected[name]).map(|(a, b)| a - b).collect();
            let ratio = norm(&off) / norm(&expected[name]);
            assert!(ratio <= 1e-3, "{}: {name} is off by {ratio:e}", tiny.name);
        }
    }
}

#[test]
fn a_sequence_has_the_same_score_in_any_company() {
    let [shared, apart] = [Sharing::On, Sharing::Off].map(|sharing| host(Size::Small, sharing));
    for tiny in rewards(Size::Small) {
        let largest = apart.extent().max(shared.extent());
        let mut rig = Rig::new(Cpu::new(2).unwrap(), &tiny, &largest, Keep::Nothing);
        let together = rig.scores(&shared);
        let bits = |scores: &[f64]| scores.iter().map(|score| score.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&rig.scores(&apart)), bits(&together), "{}", tiny.name);
        let examples = Size::Small.examples();
        let alone = examples.iter().flat_map(|example| &example.sequences).map(|sequence| {
            let example = Example { sequences: vec![sequence.clone()], ..Example::default() };
            rig.scores(&HostBatch::reading(LAST, [&example], Sharing::On))[0]
        });
        assert_eq!(bits(&alone.collect::<Vec<_>>()), bits(&together), "{}", tiny.name);
    }
}

/// A padding token at the end of a sequence is not read: the score is that of the sequence without.
#[test]
fn what_pads_changes_no_score() {
    let tiny = tiny::with(Size::Tiny, "llama", classifier(1));
    let [padded, plain] = [&[1, 2, 3, 9, 9][..], &[1, 2, 3]].map(|ids| {
        let sequences = vec![cuvee::data::Sequence::new(ids.to_vec(), 1)];
        Example { sequences, ..Example::default() }
    });
    let of = |example: &Example, pad: Option<u32>| {
        let host = HostBatch::reading(Read::Last { pad }, [example], Sharing::On);
        rig(Reference, &tiny, &host).scores(&host)[0]
    };
    assert_eq!(of(&padded, Some(9)), of(&plain, None));
    assert_ne!(of(&padded, None), of(&plain, None));
}

#[test]
#[should_panic(expected = "a reward model has no logits")]
fn a_reward_model_refuses_to_predict_tokens() {
    let host = host(Size::Tiny, Sharing::On);
    rig(Reference, &rewards(Size::Tiny)[0], &host).forward(&host);
}

#[test]
#[should_panic(expected = "a language model gives no scores")]
fn a_language_model_refuses_to_score() {
    let host = host(Size::Tiny, Sharing::On);
    rig(Reference, &tiny::all(Size::Tiny)[0], &host).scores(&host);
}

// ---- planned ----------------------------------------------------------------------------------------------------

#[test]
fn a_reward_model_has_no_vocabulary_head() {
    let host = host(Size::Small, Sharing::On);
    for (language, reward) in tiny::all(Size::Small).into_iter().zip(rewards(Size::Small)) {
        let plan = |tiny: &Tiny, dtype| tiny.plan_in(dtype, &host.extent(), Keep::Everything, &|_| true);
        let (without, with) = (plan(&reward, DType::F32), plan(&language, DType::F32));
        assert_eq!(without.get(Kind::Workspace), 0, "{}: no tiles of logits", reward.name);
        let spec = &language.checkpoint.spec;
        let padded = |bytes: usize| bytes.next_multiple_of(256);
        let head = if spec.head == Head::Own { padded(4 * spec.vocab * spec.hidden) } else { 0 };
        for kind in [Kind::Weights, Kind::Grads] {
            assert_eq!(without.get(kind) + head, with.get(kind) + padded(4 * spec.hidden), "{}", reward.name);
        }

        // The arithmetic of the head is one number for each hidden element of a sequence.
        let flops = |sequences: usize| {
            let size = Extent { targets: sequences, sequences, ..host.extent() };
            let (device, mut arena) = (Dry::default(), Dry::arena(DType::F32));
            let (mut model, mut acts, mut batch) = reward.build(&mut arena, &size, Keep::Everything, &|_| true);
            batch.resize(size);
            model.scores(&device, &batch, &mut acts).unwrap();
            let forward = device.flops();
            model.backward_scores(&device, &batch, &vec![0.0; sequences], &mut acts).unwrap();
            [forward, device.flops() - forward]
        };
        let ([f1, b1], [f2, b2]) = (flops(1), flops(2));
        assert_eq!([f2 - f1, b2 - b1], [2 * spec.hidden as u64, 4 * spec.hidden as u64], "{}", reward.name);
    }
}

// ---- files ------------------------------------------------------------------------------------------------------

/// Saves random weights as the folder's.
fn save(tiny: &Tiny) {
    let one = Extent { rows: 1, targets: 1, segments: 1, sequences: 1, longest: 1 };
    let mut rig = Rig::new(Cpu::new(1).unwrap(), tiny, &one, Keep::Nothing);
    let params = rig.model.params_mut();
    let tensors = sources(&rig.device, &params);
    save_safetensors(&tiny.checkpoint.dir.join("model.safetensors"), &tensors, SaveDtype::F32).unwrap();
}

fn loaded(checkpoint: &Checkpoint) -> cuvee::Result<BTreeMap<String, Vec<f64>>> {
    let (spec, naming, cpu) = (&checkpoint.spec, checkpoint.architecture.naming, Cpu::new(1)?);
    let mut arena = Arena::new(&cpu, &Model::<Dry>::plan(DType::F32, spec, naming, Options::frozen(4)))?;
    let mut model = Model::new(&mut arena, spec, naming, Options::frozen(4));
    Init::Checkpoint.fill(&cpu, checkpoint, &mut model)?;
    Ok(model.params_mut().into_iter().map(|p| (p.name.clone(), tiny::read(&cpu, &p.value))).collect())
}

#[test]
fn a_language_model_becomes_a_reward_model_with_a_random_head() {
    for tiny in tiny::all(Size::Small) {
        save(&tiny);
        let dir = &tiny.checkpoint.dir;
        let with_head = |seed: u64| Checkpoint::with_reward_head(dir, seed).unwrap();
        let mut reward = loaded(&with_head(3)).unwrap();
        let mut language = loaded(&Checkpoint::open(dir).unwrap()).unwrap();
        language.remove(&tiny.name_of(Slot::Head, 0));
        let head = reward.remove("score.weight").unwrap();
        assert_eq!(reward, language, "{}: everything else is loaded", tiny.name);

        let (random, range) = (Philox::named(3, "score.weight"), tiny.checkpoint.spec.initializer_range);
        let expected: Vec<f64> = (0..head.len()).map(|i| f64::from((range * random.normal(i as u64)) as f32)).collect();
        assert_eq!(head, expected, "{}", tiny.name);
        assert_ne!(loaded(&with_head(4)).unwrap()["score.weight"], head);
        let identity = |checkpoint: &Checkpoint| Init::Checkpoint.identity(checkpoint).unwrap();
        let [three, four] = [3, 4].map(|seed| identity(&with_head(seed)));
        assert!(three == identity(&with_head(3)) && three != four && three != identity(&tiny.checkpoint));
    }
}

#[test]
fn a_saved_reward_model_is_one_again() {
    for tiny in tiny::all(Size::Small) {
        save(&tiny);
        let dir = &tiny.checkpoint.dir;
        let fresh = Checkpoint::with_reward_head(dir, 3).unwrap();
        let expected = loaded(&fresh).unwrap();

        // What a run saves: the trained tensors, and the configuration that says what they are.
        let (spec, naming, cpu) = (&fresh.spec, fresh.architecture.naming, Cpu::new(1).unwrap());
        let plan = Model::<Dry>::plan(DType::F32, spec, naming, Options::frozen(4));
        let mut model = Model::new(&mut Arena::new(&cpu, &plan).unwrap(), spec, naming, Options::frozen(4));
        Init::Checkpoint.fill(&cpu, &fresh, &mut model).unwrap();
        let saved = tempfile::tempdir().unwrap();
        let params = model.params_mut();
        let path = saved.path().join("model.safetensors");
        save_safetensors(&path, &sources(&cpu, &params), SaveDtype::F32).unwrap();
        let reward = RewardModel { class: fresh.architecture.classifier(), pad: Some(5) };
        write_config(dir, saved.path(), SaveDtype::F32, Some(&reward)).unwrap();

        let again = Checkpoint::open_reward(saved.path()).unwrap();
        assert_eq!((again.spec.head, &again.spec), (Head::Score, spec), "{}", tiny.name);
        assert_eq!(loaded(&again).unwrap(), expected, "{}", tiny.name);
        // Its own head is the one that is trained on.
        let more = Checkpoint::with_reward_head(saved.path(), 99).unwrap();
        assert_eq!(loaded(&more).unwrap(), expected, "{}", tiny.name);
        assert!(Weights::open(saved.path()).unwrap().names().all(|name| name != tiny.name_of(Slot::Head, 0)));
    }
}

#[test]
fn the_wrong_kind_of_model_is_refused() {
    let fails = |result: cuvee::Result<Checkpoint>, parts: &[&str]| {
        let message = result.err().expect("the wrong kind").to_string();
        parts.iter().for_each(|part| assert!(message.contains(part), "{part:?} is not in {message}"));
    };
    let language = tiny::with(
        Size::Tiny,
        "neox",
        json!({"architectures": ["GPTNeoXForCausalLM"], "id2label": {"0": "", "1": ""}}),
    );
    let dir = &language.checkpoint.dir;
    assert!(Checkpoint::open(dir).is_ok());
    fails(Checkpoint::open_reward(dir), &["is a language model", "GPTNeoXForSequenceClassification with one label"]);

    let reward = tiny::with(Size::Tiny, "neox", classifier(1));
    fails(
        Checkpoint::open(&reward.checkpoint.dir),
        &["is a reward model", "a language model is wanted", "cuvee score"],
    );

    let one = reward.config();
    // transformers takes two labels where a file names none.
    for (changes, labels) in [
        (json!({"id2label": {"0": "", "1": "", "2": ""}}), "3 labels"),
        (json!({"id2label": null, "num_labels": 4}), "4 labels"),
        (json!({"id2label": null}), "2 labels"),
    ] {
        let config = tiny::merged(one.clone(), changes);
        tiny::write_config(&reward.checkpoint.dir, &config);
        let dir = &reward.checkpoint.dir;
        let opened = [Checkpoint::open(dir), Checkpoint::open_reward(dir), Checkpoint::with_reward_head(dir, 1)];
        opened.into_iter().for_each(|result| fails(result, &["config.json", labels, "a reward model has 1"]));
    }
    let config = tiny::merged(one, json!({"id2label": null, "num_labels": 1}));
    tiny::write_config(&reward.checkpoint.dir, &config);
    assert!(Checkpoint::open_reward(&reward.checkpoint.dir).is_ok());
}

/// Weights that are a language model's under a configuration that says otherwise, and the other way round.
#[test]
fn weights_of_the_other_kind_are_refused_by_name() {
    let tiny = tiny::with(Size::Small, "llama", json!({}));
    save(&tiny);
    let dir = &tiny.checkpoint.dir;
    let plain = fs::read(dir.join("config.json")).unwrap();
    tiny::write_config(dir, &tiny::merged(tiny.config(), classifier(1)));
    let message = loaded(&Checkpoint::open_reward(dir).unwrap()).unwrap_err().to_string();
    assert!(message.contains("score.weight"), "{message}");

    let reward = tiny::with(Size::Small, "llama", classifier(1));
    save(&reward);
    fs::write(reward.checkpoint.dir.join("config.json"), plain).unwrap();
    let message = loaded(&Checkpoint::open(&reward.checkpoint.dir).unwrap()).unwrap_err().to_string();
    assert!(message.contains("lm_head.weight"), "{message}");
}

/// `--init random` draws all of it, and the head as a fresh one is drawn.
#[test]
fn random_reward_models_draw_their_head_too() {
    let tiny = tiny::with(Size::Tiny, "qwen3", classifier(1));
    let (spec, naming, cpu) = (&tiny.checkpoint.spec, tiny.checkpoint.architecture.naming, Cpu::new(1).unwrap());
    let plan = Model::<Dry>::plan(DType::F32, spec, naming, Options::frozen(4));
    let mut model = Model::new(&mut Arena::new(&cpu, &plan).unwrap(), spec, naming, Options::frozen(4));
    init_random(&cpu, &mut model, SEED).unwrap();
    let params = model.params_mut();
    let score = params.iter().find(|param| param.name == "score.weight").unwrap();
    assert!(norm(&tiny::read(&cpu, &score.value)) > 0.1 && score.shape() == [1, spec.hidden]);
}
