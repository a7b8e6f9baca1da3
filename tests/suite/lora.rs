//! Adapters in the model: derivatives of A and B, several at once against one merged model, and what an adapter must not
//! change: the model without it, and every bit that must not depend on batch, threads or recomputing.

use std::collections::BTreeMap;

use cuvee::checkpoint::peft::{self, AdapterFile};
use cuvee::data::{Batch as HostBatch, Sharing};
use cuvee::device::{Cpu, DType, Dry, Kind, Reference};
use cuvee::model::{Keep, Lora, sources};
use cuvee::ops::Backend;
use serde_json::{Value, json};

use crate::common::tiny::{self, Rig, SEED, Size, Tiny, adapted, read, weights};
use crate::program::{Line, Workspace, results};

fn host(size: Size) -> HostBatch {
    HostBatch::new(&size.examples(), Sharing::On)
}

fn cpu(tiny: &Tiny, host: &HostBatch, keep: Keep) -> Rig<Cpu> {
    rig(Cpu::new(2).unwrap(), tiny, host, keep)
}

/// Where an adapter trains, nothing else does.
fn rig<B: Backend>(device: B, tiny: &Tiny, host: &HostBatch, keep: Keep) -> Rig<B> {
    Rig::training(device, tiny, &host.extent(), keep, &|_| tiny.lora.is_none())
}

fn norm(values: impl IntoIterator<Item = f64>) -> f64 {
    values.into_iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// Relative to the norm of what is expected.
fn off(ours: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(ours.len(), expected.len());
    norm(ours.iter().zip(expected).map(|(a, b)| a - b)) / norm(expected.iter().copied())
}

fn assert_bits(what: &str, ours: &[f64], expected: &[f64]) {
    let first = ours.iter().zip(expected).position(|(a, b)| a.to_bits() != b.to_bits());
    assert!(first.is_none() && ours.len() == expected.len(), "{what}: differs at {first:?}");
}

/// The model as it is without any adapter.
fn bare(mut tiny: Tiny) -> Tiny {
    tiny.checkpoint.adapters.clear();
    untrained(tiny)
}

/// The model under the adapters that are applied alone.
fn untrained(mut tiny: Tiny) -> Tiny {
    tiny.lora = None;
    tiny
}

/// Five points, as for the weights.
#[test]
fn gradients_are_central_differences_for_every_element_of_a_and_b() {
    const STEP: f64 = 1e-4;
    let host = host(Size::Tiny);
    let c = weights(host.targets.len());
    for tiny in adapted(Size::Tiny, 1.0) {
        let mut rig = rig(Reference, &tiny, &host, Keep::Everything);
        let grads = rig.step(&host).grads;
        let names: Vec<String> = rig.model.adapter_mut().iter().map(|p| p.name.clone()).collect();
        let mut sorted = names.clone();
        sorted.sort();
        assert!(sorted.iter().eq(grads.keys()), "{}: A and B have gradients and nothing else has", tiny.name);
        let layers = if tiny.name == "gpt2" || tiny.name.starts_with("neox") { 6 } else { 7 };
        assert_eq!(names.len(), 2 * 2 * layers, "{}", tiny.name);
        for (p, name) in names.iter().enumerate() {
            assert!(norm(grads[name].iter().copied()) > 1e-3, "{}: {name} has no gradient", tiny.name);
            for (i, analytic) in grads[name].iter().enumerate() {
                let x = rig.model.adapter_mut()[p].value.view().f64s()[i];
                let mut at = |steps: f64| {
                    rig.model.adapter_mut()[p].value.view_mut().into_f64s()[i] = x + steps * STEP;
                    rig.forward(&host).iter().zip(&c).map(|(logp, c)| c * logp).sum::<f64>()
                };
                let numeric = (at(-2.0) - 8.0 * at(-1.0) + 8.0 * at(1.0) - at(2.0)) / (12.0 * STEP);
                rig.model.adapter_mut()[p].value.view_mut().into_f64s()[i] = x;
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
fn the_cpu_agrees_with_the_reference() {
    for size in [Size::Tiny, Size::Small] {
        let host = host(size);
        for tiny in adapted(size, 1.0) {
            let ours = cpu(&tiny, &host, Keep::Everything).step(&host);
            let expected = rig(Reference, &tiny, &host, Keep::Everything).step(&host);
            assert!(off(&ours.logps, &expected.logps) < 1e-5, "{}", tiny.name);
            for (name, expected) in &expected.grads {
                let off = off(&ours.grads[name], expected);
                assert!(off < 1e-3, "{}: {name} is off by {off:e}", tiny.name);
            }
        }
    }
}

/// Two adapters with weights beside the weights, against weights into which they were added in f64, fused tensors included.
#[test]
fn adapters_are_what_their_products_add_to_the_weights() {
    let host = host(Size::Small);
    for tiny in adapted(Size::Small, 1.0) {
        let tiny = untrained(tiny);
        let found = rig(Reference, &tiny, &host, Keep::Nothing).forward(&host);
        let adapters = tiny.checkpoint.adapters.clone();
        let tiny = bare(tiny);
        let mut merged = rig(Reference, &tiny, &host, Keep::Nothing);
        let without = merged.forward(&host);
        for param in merged.model.params_mut() {
            let Some(module) = param.stored.tensor.strip_suffix(".weight") else { continue };
            let mut delta = vec![0.0; param.stored.shape(&param.shape()).iter().product()];
            for adapter in adapters.iter().filter(|adapter| adapter.file.has(module)) {
                add_product(&adapter.file, module, adapter.weight, param.stored.is_transposed(), &mut delta);
            }
            if delta.iter().any(|x| *x != 0.0) {
                let mut own = vec![0.0; param.value.len()];
                param.stored.extract(&delta, param.matrix_shape(), &mut own);
                let weight = param.value.view_mut().into_f64s();
                weight.iter_mut().zip(own).for_each(|(weight, own)| *weight += f64::from(own));
            }
        }
        let expected = merged.forward(&host);
        let apart = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        let moved = without.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(apart < 2e-5 && moved > 0.1, "{}: off by {apart:e}, moved by {moved}", tiny.name);
    }
}

/// Adds `weight scaling B A` to a tensor, which may be stored transposed.
fn add_product(file: &AdapterFile, module: &str, weight: f64, transposed: bool, out: &mut [f32]) {
    let (mut a, mut b) = (Vec::new(), Vec::new());
    let [rank, inputs] = file.read_a(module, &mut a).unwrap();
    let [outputs, _] = file.read_b(module, &mut b).unwrap();
    for (o, i) in (0..outputs).flat_map(|o| (0..inputs).map(move |i| (o, i))) {
        let sum: f64 = (0..rank).map(|k| f64::from(b[o * rank + k]) * f64::from(a[k * inputs + i])).sum();
        let at = if transposed { i * outputs + o } else { o * inputs + i };
        out[at] += (weight * file.scaling(module) * sum) as f32;
    }
}

#[test]
fn an_adapter_that_has_not_trained_or_is_off_changes_no_bit() {
    let host = host(Size::Small);
    for tiny in adapted(Size::Small, 1.0) {
        let mut adapted = cpu(&tiny, &host, Keep::Nothing);
        let trained = adapted.forward(&host);
        adapted.model.switch_adapter(false);
        let off = adapted.forward(&host);
        adapted.model.switch_adapter(true);
        assert_bits("on again", &adapted.forward(&host), &trained);
        adapted.model.init_adapter(&adapted.device, None, SEED).unwrap();
        let fresh = adapted.forward(&host);
        let tiny = untrained(tiny);
        let without = cpu(&tiny, &host, Keep::Nothing).forward(&host);
        assert!(trained != without, "{}: the adapter does nothing", tiny.name);
        assert_bits(&format!("{}, off", tiny.name), &off, &without);
        assert_bits(&format!("{}, B = 0", tiny.name), &fresh, &without);
    }
}

/// A as PEFT draws it, by seed and name.
#[test]
fn an_adapter_starts_as_pefts() {
    let tiny = adapted(Size::Small, 1.0).remove(0);
    let host = host(Size::Tiny);
    let start = |seed: u64| {
        let mut rig = cpu(&tiny, &host, Keep::Nothing);
        let Rig { device, model, .. } = &mut rig;
        model.init_adapter(device, None, seed).unwrap();
        let params = model.adapter_mut();
        params.iter().map(|p| (p.name.clone(), (p.value.cols(), read(device, &p.value)))).collect::<BTreeMap<_, _>>()
    };
    let (one, two) = (start(1), start(2));
    for (name, (cols, values)) in &one {
        if name.ends_with("lora_B.weight") {
            assert!(values.iter().all(|x| *x == 0.0), "{name}");
            continue;
        }
        let bound = 1.0 / (*cols as f64).sqrt();
        let largest = values.iter().fold(0.0f64, |a, b| a.max(b.abs()));
        assert!(largest <= bound && largest > 0.8 * bound, "{name}: {largest} of {bound}");
        let spread = norm(values.iter().copied()) / (values.len() as f64).sqrt() * 3f64.sqrt() / bound;
        assert!((spread - 1.0).abs() < 0.3, "{name}: {spread}");
        assert!(*values != two[name].1, "{name} does not depend on the seed");
        assert!(one.iter().all(|(other, of)| other == name || of.1 != *values), "{name} is another's");
    }
}

#[test]
fn recomputing_threads_and_instruction_sets_change_no_bit() {
    let host = host(Size::Small);
    for tiny in adapted(Size::Small, 1.0) {
        let expected = cpu(&tiny, &host, Keep::Everything).step(&host);
        let check = |what: &str, ours: tiny::Step, expected: &tiny::Step| {
            assert_bits(&format!("{}: {what}", tiny.name), &ours.logps, &expected.logps);
            for (name, expected) in &expected.grads {
                assert_bits(&format!("{}: {what}: {name}", tiny.name), &ours.grads[name], expected);
            }
        };
        check("recomputed", cpu(&tiny, &host, Keep::Inputs).step(&host), &expected);
        for family in super::ops::families() {
            let mut steps =
                family.into_iter().map(|(what, cpu)| (what, rig(cpu, &tiny, &host, Keep::Everything).step(&host)));
            let (_, first) = steps.next().unwrap();
            steps.for_each(|(what, step)| check(&what, step, &first));
        }
    }
}

#[test]
fn a_sequence_has_the_same_log_probabilities_alone() {
    let examples = Size::Small.examples();
    let host = host(Size::Small);
    for tiny in adapted(Size::Small, 1.0) {
        let together = cpu(&tiny, &host, Keep::Nothing).forward(&host);
        let mut at = 0;
        for example in &examples {
            let alone = HostBatch::new([example], Sharing::Off);
            let logps = cpu(&tiny, &alone, Keep::Nothing).forward(&alone);
            assert_bits(tiny.name, &logps, &together[at..at + logps.len()]);
            at += logps.len();
        }
    }
}

/// Weights that do not train have no gradient, and so the optimizer keeps nothing of them; neither have adapters that are
/// applied.
#[test]
fn only_what_trains_takes_memory_for_it() {
    let host = host(Size::Small);
    for tiny in adapted(Size::Small, 1.0) {
        for storage in [DType::F32, DType::Bf16] {
            let plan = tiny.plan_in(storage, &host.extent(), Keep::Everything, &|_| false);
            let trained = {
                let mut arena = Dry::arena(storage);
                let (mut model, ..) = tiny.build(&mut arena, &host.extent(), Keep::Everything, &|_| false);
                let params = model.trained_mut();
                params.iter().map(|p| (4 * p.value.len()).next_multiple_of(256)).sum::<usize>()
            };
            assert_eq!(plan.get(Kind::Grads), trained, "{}", tiny.name);
        }
    }
}

#[test]
fn targets_that_name_nothing_are_refused_with_those_that_do() {
    let lora = |targets: &[&str]| Lora {
        rank: 2,
        alpha: 4.0,
        rslora: false,
        targets: targets.iter().map(|name| name.to_string()).collect(),
        start: None,
    };
    let error = |name: &str, targets: &[&str]| {
        let tiny = tiny::all(Size::Tiny).into_iter().find(|tiny| tiny.name == name).unwrap();
        lora(targets).check(&mut tiny.checkpoint.dry()).unwrap_err().to_string()
    };
    let unknown = error("llama", &["q_proj", "c_attn"]);
    assert!(unknown.contains("--target-modules: c_attn names no linear layer"), "{unknown}");
    assert!(unknown.contains("q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"), "{unknown}");
    // The end of a name is not enough.
    assert!(error("llama", &["proj"]).contains("proj names no linear layer"));
    assert!(error("gpt2", &["q_proj"]).contains("it has c_attn,c_proj,c_fc"));
    let llama = tiny::all(Size::Tiny).remove(0);
    lora(&["self_attn.q_proj", "model.layers.1.mlp.up_proj"]).check(&mut llama.checkpoint.dry()).unwrap();
}

/// Queries, keys and values train apart; for PEFT, and for who goes on, they are one layer of three times the rank.
#[test]
fn a_fused_layer_has_one_adapter_on_disk() {
    let host = host(Size::Small);
    for mut tiny in adapted(Size::Small, 1.0) {
        tiny.checkpoint.adapters.clear();
        let (dirs, lora) = (tempfile::tempdir().unwrap(), tiny.lora.clone().unwrap());
        let [saved, shared, mixed] = ["saved", "shared", "mixed"].map(|name| dirs.path().join(name));
        let mut rig = cpu(&tiny, &host, Keep::Nothing);
        let trained = rig.forward(&host);
        let config = rig.model.adapter_config(&lora, "base");
        peft::write(&saved, &config, &sources(&rig.device, &rig.model.adapter_mut())).unwrap();
        let file = AdapterFile::open(&saved).unwrap();
        let tensors: Vec<String> = rig.model.adapter_mut().iter().map(|param| param.stored.tensor.clone()).collect();
        for module in file.modules() {
            let parts = tensors.iter().filter(|tensor| **tensor == peft::a_name(&module)).count();
            assert_eq!((file.rank(&module), file.scaling(&module)), (parts * lora.rank, lora.scale()), "{module}");
        }
        let is_fused = tensors.len() > 2 * file.modules().len();
        assert_eq!(config.rank_pattern.len(), usize::from(is_fused), "{}", tiny.name);

        // Who goes on has the same bits, also after something else.
        let again = Lora::from_adapter(&saved).unwrap();
        assert_eq!((again.rank, again.alpha, again.targets.len()), (lora.rank, lora.alpha, file.modules().len()));
        rig.model.init_adapter(&rig.device, None, SEED).unwrap();
        assert_ne!(rig.forward(&host), trained, "{}", tiny.name);
        rig.model.init_adapter(&rig.device, Some(&saved), SEED).unwrap();
        assert_bits(tiny.name, &rig.forward(&host), &trained);

        // One A for all three, as PEFT trains it, becomes one for each; three that are mixed cannot be taken apart.
        tiny::write_adapter(&tiny.checkpoint, &shared, lora.rank, 9);
        tiny::write_adapter(&tiny.checkpoint, &mixed, 3 * lora.rank, 9);
        let own = |rig: &mut Rig<Cpu>, dir| rig.model.init_adapter(&rig.device, Some(dir), SEED);
        let error = own(&mut rig, &mixed).unwrap_err().to_string();
        assert!(error.contains(if is_fused { "its B mixes them" } else { "the ranks do not add up" }), "{error}");
        tiny.lora = Some(Lora::from_adapter(&shared).unwrap());
        let mut rig = cpu(&tiny, &host, Keep::Nothing);
        own(&mut rig, &shared).unwrap();
        let from_shared = rig.forward(&host);

        tiny.lora = None;
        for (dir, expected) in [(&saved, &trained), (&shared, &from_shared)] {
            tiny.checkpoint.adapters.clear();
            tiny.checkpoint = tiny.checkpoint.clone().with_adapter(dir, 1.0).unwrap();
            let applied = cpu(&tiny, &host, Keep::Nothing).forward(&host);
            assert!(off(&applied, expected) < 1e-5, "{}: {}", tiny.name, dir.display());
        }
    }
}

#[test]
fn an_adapter_of_another_model_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let models = tiny::all(Size::Tiny);
    tiny::write_adapter(&models[0].checkpoint, dir.path(), 2, 1);
    let error = |tiny: &Tiny| tiny.checkpoint.clone().with_adapter(dir.path(), 1.0).err().unwrap().to_string();
    let gpt2 = models.iter().find(|tiny| tiny.name == "gpt2").unwrap();
    assert!(error(gpt2).contains("is no linear layer of the base; was it made for another model?"), "{}", error(gpt2));
    let small = tiny::all(Size::Small).remove(0);
    let message = error(&small);
    assert!(message.contains("in the base it is [") && message.contains("adapter_model.safetensors"), "{message}");
}

// ---- the program ------------------------------------------------------------------------------------------------

const TRAIN: &str = "train --objective sigmoid --beta 0.1 --learning-rate 2e-3 --warmup-ratio 0.1 --model model \
    --dataset train.jsonl --eval-dataset heldout.jsonl --max-length 40 --batch-size 4 --max-steps 12 --save-steps 4 \
    --eval-steps 4 --kl-samples 4 --samples 2 --max-new-tokens 6 --threads 2 --lora-rank 4";

#[test]
fn an_adapter_is_trained_saved_continued_and_used() {
    let w = Workspace::with_reviews(40);
    w.ok(&format!("{TRAIN} --output-dir whole"));
    for file in
        ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "checkpoint-8/adapter_model.safetensors"]
    {
        assert!(w.exists(&format!("whole/{file}")), "{file}");
    }
    assert!(!w.exists("whole/model.safetensors") && !w.exists("whole/config.json"), "the base is not copied");
    let config = w.json("whole/adapter_config.json");
    assert_eq!((&config["r"], &config["lora_alpha"], &config["peft_type"]), (&json!(4), &json!(8), &json!("LORA")));
    assert_eq!(config["base_model_name_or_path"], json!("model"));
    let targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
    assert_eq!(config["target_modules"], json!(targets));

    // The reference is the model without the adapter, exactly.
    assert_eq!(w.column("whole/metrics.jsonl", "rewards/margins")[0], 0.0);
    let evaluations = w.lines("whole/evaluations.jsonl");
    let kl = |line: usize| evaluations[line]["eval_kl"].as_f64().unwrap_or_else(|| panic!("{:?}", evaluations[line]));
    assert_eq!(kl(0), 0.0);
    assert!(kl(evaluations.len() - 1) != 0.0);

    // Stopped where no checkpoint was due, and continued, to the same bits.
    w.ok(&format!("{TRAIN} --output-dir run --stop-at-step 7"));
    w.ok(&format!("{TRAIN} --output-dir run --resume-from-checkpoint auto"));
    // The name of a run's folder is part of where its output comes from.
    let [whole, run] = ["whole", "run"].map(|name| {
        let mut found = results(&w.path(name));
        found.retain(|name, _| !name.starts_with("checkpoint-7/") && !name.ends_with("cuvee_lineage.json"));
        found
    });
    crate::program::assert_same("continued", &whole, &run);
    let other = format!("{TRAIN} --lora-alpha 3 --output-dir other --resume-from-checkpoint whole/checkpoint-8");
    w.fails(1, &other, &["--lora-alpha: the checkpoint"]);

    // With its base, named or found.
    let eval = |flags: &str| -> Value {
        let line = format!("eval {flags} --dataset heldout.jsonl --max-length 40 --json");
        serde_json::from_str(&w.ok(&line).stdout).unwrap()
    };
    let trained = eval("--model model --adapter whole --ref-model model");
    assert_eq!(trained["accuracy"], w.lines("whole/evaluations.jsonl").last().unwrap()["eval_accuracy"]);
    assert_eq!(eval("--model whole --ref-model model"), trained);
    assert_eq!(
        eval("--model model --adapter whole=0.25 --adapter whole=0.75 --ref-model model")["accuracy"],
        trained["accuracy"]
    );
    // One of each sign is nothing but for rounding.
    let none = eval("--model model --adapter whole=1 --adapter whole=-1 --ref-model model");
    assert!(none["margin"].as_f64().unwrap().abs() < 1e-4, "{none}");
    assert_eq!(eval("--model whole --ref-model whole")["margin"], json!(0.0));
    let generate =
        |flags: &str| w.ok(&format!("generate {flags} --prompt film --max-new-tokens 12 --temperature 0")).stdout;
    assert_eq!(generate("--model whole"), generate("--model model --adapter whole"));
    w.ok("logps --model model --adapter whole=0.5 --dataset heldout.jsonl --max-length 40 --out logps.jsonl");
}

/// In PEFT's layout of `modules_to_save`, saved, continued, used and started from.
#[test]
fn the_head_of_a_reward_model_trains_beside_an_adapter() {
    let w = Workspace::with_reviews(40);
    let train = "train --objective reward --learning-rate 2e-3 --model model --dataset train.jsonl --max-length 40 \
        --batch-size 4 --threads 2 --save-steps 4";
    let line = format!("{train} --eval-dataset heldout.jsonl --eval-steps 8 --max-steps 8 --lora-rank 4");
    w.ok(&format!("{line} --output-dir whole"));
    let config = w.json("whole/adapter_config.json");
    assert_eq!((&config["task_type"], &config["modules_to_save"]), (&json!("SEQ_CLS"), &json!(["score"])));
    let file = AdapterFile::open(&w.path("whole")).unwrap();
    let mut head = Vec::new();
    assert_eq!(Some(file.read_head(&mut head).unwrap()[1]), file.head());
    assert!(head.iter().any(|x| *x != 0.0) && file.has("model.layers.0.self_attn.q_proj"));
    w.ok(&format!("{line} --output-dir run --stop-at-step 6"));
    w.ok(&format!("{line} --output-dir run --resume-from-checkpoint auto"));
    for file in ["adapter_model.safetensors", "checkpoint-8/optimizer.safetensors"] {
        assert!(w.read(&format!("whole/{file}")) == w.read(&format!("run/{file}")), "{file}");
    }

    let scores = |model: &str| -> Vec<[f64; 2]> {
        w.ok(&format!("score --model {model} --dataset heldout.jsonl --max-length 40 --out scores.jsonl"));
        let sides = ["score_chosen", "score_rejected"];
        // A row that --max-length leaves out has no score.
        let scored = |line: &Line| line.contains_key(sides[0]).then(|| sides.map(|side| line[side].as_f64().unwrap()));
        w.lines("scores.jsonl").iter().filter_map(scored).collect()
    };
    let trained = scores("whole");
    let right = trained.iter().filter(|[chosen, rejected]| chosen > rejected).count() as f64 / trained.len() as f64;
    let evaluations = w.lines("whole/evaluations.jsonl");
    assert!((right - evaluations.last().unwrap()["eval_accuracy"].as_f64().unwrap()).abs() < 1e-9, "{right}");
    let still = train.replace("2e-3", "1e-30");
    w.ok(&format!("{still} --max-steps 1 --lora-start whole --output-dir still"));
    assert_eq!(scores("still"), trained);

    w.fails(1, "score --model model --text x", &["is a language model"]);
    let logps = "logps --model model --adapter whole --dataset heldout.jsonl --out x.jsonl";
    w.fails(1, logps, &["has the head of a reward model, and a language model is wanted"]);
    w.fails(1, "merge adapters --adapter whole --output-dir x", &["has the head of a reward model besides"]);
}

/// A second adapter on top of a first that is applied: the reference is the model under the first.
#[test]
fn an_adapter_trains_on_top_of_others() {
    let w = Workspace::with_reviews(40);
    w.ok(&format!("{TRAIN} --output-dir sft --max-steps 4").replace("--max-steps 12", ""));
    let on_top = format!("{TRAIN} --output-dir dpo --adapter sft=0.5 --max-steps 4").replace("--max-steps 12", "");
    w.ok(&on_top);
    assert_eq!(w.column("dpo/metrics.jsonl", "rewards/margins")[0], 0.0);
    let recipe = w.text("dpo/recipe.toml");
    assert!(recipe.contains("adapter = [\"../sft=0.5\"]"), "{recipe}");
    w.ok("train dpo/recipe.toml --output-dir again");
    assert_eq!(w.read("again/adapter_model.safetensors"), w.read("dpo/adapter_model.safetensors"));
    let eval =
        w.ok("eval --model model --adapter sft=0.5 --adapter dpo --dataset heldout.jsonl --max-length 40 --json");
    assert!(eval.stdout.contains("accuracy"), "{}", eval.stdout);
}

#[test]
fn what_makes_no_sense_is_refused() {
    let w = Workspace::with_reviews(8);
    let train =
        "train --objective sigmoid --beta 0.1 --model model --dataset train.jsonl --max-steps 1 --output-dir run";
    w.fails(2, &format!("{train} --lora-alpha 3"), &["--lora-alpha", "--lora-rank"]);
    w.fails(2, &format!("{train} --lora-rank 2 --adapter a=0"), &["a weight other than 0"]);
    w.fails(2, &format!("{train} --lora-rank 2 --target-modules all-linear,q_proj"), &["all-linear is every layer"]);
    w.fails(1, &format!("{train} --lora-rank 2 --init random"), &["--init: an adapter is of no use without"]);
    w.fails(
        1,
        &format!("{train} --lora-rank 2 --ref-sync-steps 2"),
        &["--ref-sync-steps: the reference of an adapter"],
    );
    let merging =
        format!("{train} --lora-rank 2 --optimizer onties --reserve-rate 0.5 --merge-weight 0.1 --base-model model");
    w.fails(1, &merging, &["--optimizer: onties merges with what fine-tuning added"]);
    w.fails(1, &format!("{train} --lora-rank 2 --target-modules nothing"), &["nothing names no linear layer"]);
    w.fails(1, &format!("{train} --adapter model"), &["--adapter: the weights below it would train"]);
    w.fails(1, &format!("{train} --lora-rank 2 --adapter model"), &["is a whole model (config.json) and no adapter"]);
    let reward = merging.replace("--objective sigmoid --beta 0.1", "--objective reward");
    w.fails(1, &reward, &["--optimizer: onties merges with such a difference, and reward trains a head besides"]);
    assert!(!w.exists("run"), "refused before anything is made");
    w.ok(&format!("{train} --lora-rank 2").replace("--output-dir run", "--output-dir own"));
    let mut config = w.json("own/adapter_config.json");
    config["base_model_name_or_path"] = json!("someone/else");
    w.write("own/adapter_config.json", config.to_string());
    w.fails(
        1,
        "eval --model own --dataset train.jsonl",
        &["is an adapter, and the base that it names, someone/else, is no model's folder here", "--adapter"],
    );
}

/// A plan of the same run with and without an adapter.
#[test]
fn the_plan_knows_what_does_not_train() {
    let w = Workspace::with_reviews(8);
    let plan = |flags: &str| -> Value {
        let line = format!("plan --objective sigmoid --beta 0.1 --model model --dataset train.jsonl --json {flags}");
        serde_json::from_str(&w.ok(&line).stdout).unwrap()
    };
    let (full, lora) = (plan(""), plan("--lora-rank 4"));
    let phase = |plan: &Value, key: &str| {
        let phases = plan["phases"].as_array().unwrap();
        phases.iter().find(|phase| phase["name"] == "train").unwrap()[key].as_u64().unwrap()
    };
    let (trained, all) = (lora["trained"].as_u64().unwrap(), lora["parameters"].as_u64().unwrap());
    assert!(trained < all / 5 && full["trained"].is_null(), "{trained} of {all}");
    // Tensors start at multiples of 256 bytes.
    let near = |bytes: u64, numbers: u64| bytes >= 4 * numbers && bytes < 4 * numbers + 256 * 300;
    assert!(near(phase(&lora, "grads"), trained), "{lora}");
    assert!(near(phase(&lora, "states"), 2 * trained), "{lora}");
    assert!(near(phase(&lora, "weights") - phase(&full, "weights"), trained), "{lora}");
    assert!(lora["flops_per_step"].as_f64() < full["flops_per_step"].as_f64());
}
