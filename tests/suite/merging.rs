//! Optimizers that merge while they train, in runs as users start them.

use cuvee::checkpoint::Weights;
use cuvee::device::{Arena, DType, Device, Dry, Kind, Philox, Reference, Tensor};
use cuvee::merge;
use cuvee::model::{Model, Options};
use cuvee::ops::merged_update::{self, Adam, DareVariant, Form, Purpose, Rounding, Rule, Step, update_with};
use cuvee::optim::{self, Decay, Hyper, Optimizer, Schedule};
use cuvee::params::Params;

use crate::program::{Line, Workspace, results};
use crate::tiny::{self, Size};

const TRAIN: &str = "train --objective sigmoid --beta 0.1 --learning-rate 5e-4 --model sft --dataset train.jsonl \
    --max-length 48 --batch-size 4 --max-steps 10 --weight-decay 0.1 --threads 2";

/// `sft` is `model` after some fine-tuning: the policy, and the model that it came from.
fn workspace() -> Workspace {
    let w = Workspace::with_reviews(40);
    w.ok(
        "train --objective sft --learning-rate 1e-3 --model model --dataset train.jsonl --max-length 48 --batch-size 8 \
          --max-steps 5 --output-dir sft",
    );
    w
}

fn train(w: &Workspace, run: &str, flags: &str) -> String {
    w.ok(&format!("{TRAIN} --output-dir {run} {flags}")).stderr
}

/// metrics.jsonl without times.
fn steps(w: &Workspace, run: &str) -> Vec<Line> {
    let lines = w.lines(&format!("{run}/metrics.jsonl")).into_iter();
    lines.map(|line| line.into_iter().filter(|(key, _)| key != "step_time").collect()).collect()
}

/// Every weight of a model, name by name.
fn weights(w: &Workspace, run: &str) -> Vec<(String, Vec<f32>)> {
    tensors(&Weights::open(&w.path(run)).unwrap())
}

fn tensors(file: &Weights) -> Vec<(String, Vec<f32>)> {
    let read = |name: &str| {
        let shape = file.shape(name).unwrap();
        let mut values = vec![0.0; shape.iter().product()];
        file.read(name, shape, &mut values).unwrap();
        (name.to_string(), values)
    };
    file.names().map(read).collect()
}

#[test]
fn without_masks_and_merges_online_merging_is_adam() {
    let w = workspace();
    train(&w, "adam", "--adam-form hugging-face");
    train(&w, "ondare", "--optimizer ondare --reserve-rate 1 --merge-weight 0");
    train(&w, "child", "--optimizer child_tuning --reserve-rate 1");
    for run in ["ondare", "child"] {
        assert_eq!(steps(&w, "adam"), steps(&w, run), "{run}");
        assert!(w.read("adam/model.safetensors") == w.read(&format!("{run}/model.safetensors")), "{run}");
    }
    train(&w, "torch", "");
    assert_ne!(steps(&w, "adam")[9], steps(&w, "torch")[9], "the two forms differ");
}

/// Between two merges, in every method that keeps something of its own or draws something.
#[test]
fn a_stopped_run_continues_to_the_same_bits() {
    let w = workspace();
    let merging = "--reserve-rate 0.3 --merge-weight 1e-3 --base-model model";
    for (name, flags) in [
        ("ondare", format!("--optimizer ondare {merging} --merge-every 4")),
        ("lazy-bf16", format!("--optimizer ondare {merging} --merge-schedule ramp --dtype bf16")),
        ("paper", format!("--optimizer ondare {merging} --merge-form paper --merge-every 5 --dtype bf16")),
        ("rescaled", format!("--optimizer ondare {merging} --merge-rescale --merge-clip 0.5")),
        ("onties", format!("--optimizer onties {merging} --merge-every 4 --merge-schedule learning-rate")),
        ("onties-paper", format!("--optimizer onties {merging} --merge-form paper --merge-rescale")),
        ("follows", format!("--optimizer ondare {merging} --merge-every 4 --ref-sync-steps 3 --ref-mixup 0.5")),
        ("onties-follows", format!("--optimizer onties {merging} --ref-sync-steps 4")),
        ("child", "--optimizer child_tuning --reserve-rate 0.3".into()),
        ("ema", "--optimizer ema --ema-rate 0.01".into()),
        ("stochastic", "--stochastic-rounding".into()),
    ] {
        train(&w, &format!("{name}-whole"), &format!("{flags} --save-steps 10"));
        let run = format!("{name}-run");
        train(&w, &run, &format!("{flags} --stop-at-step 6"));
        train(&w, &run, &format!("{flags} --save-steps 10 --resume-from-checkpoint auto"));
        assert_eq!(steps(&w, &format!("{name}-whole")), steps(&w, &run), "{name}");
        let [whole, run] = ["whole", "run"].map(|run| results(&w.path(&format!("{name}-{run}"))));
        for file in ["model.safetensors", "checkpoint-10/optimizer.safetensors"] {
            assert!(whole[file] == run[file], "{name}: {file}");
        }
    }
}

/// A head that is drawn is merged with nothing: fine-tuning added nothing to it.
#[test]
fn a_reward_model_is_trained_by_merging() {
    let w = workspace();
    let line = TRAIN.replace("--objective sigmoid --beta 0.1", "--objective reward");
    for optimizer in ["ondare --merge-every 4", "onties"] {
        let name = optimizer.split(' ').next().unwrap();
        let flags = format!("--optimizer {optimizer} --reserve-rate 0.3 --merge-weight 0.1 --base-model model");
        w.ok(&format!("{line} {flags} --save-steps 10 --output-dir {name}"));
        w.ok(&format!("{line} {flags} --stop-at-step 6 --output-dir {name}-run"));
        w.ok(&format!("{line} {flags} --save-steps 10 --resume-from-checkpoint auto --output-dir {name}-run"));
        assert_eq!(steps(&w, name), steps(&w, &format!("{name}-run")), "{name}");
        let [whole, run] = [name.to_string(), format!("{name}-run")].map(|run| results(&w.path(&run)));
        for file in ["model.safetensors", "checkpoint-10/optimizer.safetensors"] {
            assert!(whole[file] == run[file], "{name}: {file}");
        }
        // Along tau_ref, unlike without merging.
        w.ok(&format!("{line} --output-dir {name}-adam --adam-form hugging-face"));
        let along = |run: &str| -> f64 {
            let (after, before, base) = (weights(&w, run), weights(&w, "sft"), weights(&w, "model"));
            let find = |of: &[(String, Vec<f32>)], name: &str| of.iter().find(|(n, _)| n == name).unwrap().1.clone();
            let along = |name: &String| -> f64 {
                let (after, before, base) = (find(&after, name), find(&before, name), find(&base, name));
                let terms = after.iter().zip(&before).zip(&base).map(|((a, b), base)| f64::from((a - b) * (b - base)));
                terms.sum()
            };
            before.iter().map(|(name, _)| name).filter(|name| after.iter().any(|(n, _)| n == *name)).map(along).sum()
        };
        assert!(along(name) > along(&format!("{name}-adam")), "{name}");
    }
}

/// Ten thousandths of a unit in the last place at a time: what f32 weights would lose at every step.
#[test]
fn merges_that_are_too_small_to_be_added_add_up() {
    let w = workspace();
    let still =
        TRAIN.replace("--learning-rate 5e-4", "--learning-rate 1e-30").replace("--max-steps 10", "--max-steps 40");
    let merging = "--reserve-rate 1 --merge-weight 1e-6 --base-model model";
    let (before, base) = (weights(&w, "sft"), weights(&w, "model"));
    for (name, flags, exact) in [
        ("released", "--optimizer ondare", true),
        ("paper", "--optimizer ondare --merge-form paper", false),
        ("onties", "--optimizer onties", false),
    ] {
        w.ok(&format!("{still} --output-dir {name} {flags} {merging}"));
        let (mut along, mut squares, mut moved) = (0.0, 0.0, 0_usize);
        for (((tensor, after), (_, before)), (_, base)) in weights(&w, name).iter().zip(&before).zip(&base) {
            for ((after, before), base) in after.iter().zip(before).zip(base) {
                let tau = f64::from(before - base);
                let step = f64::from(*after) - f64::from(*before);
                along += step * tau;
                squares += tau * tau;
                moved += usize::from(step != 0.0);
                let ulp = f64::from(f32::from_bits(before.abs().to_bits() + 1) - before.abs());
                let expected = 40.0 * 1e-6 * tau;
                // tau_ref is kept in bfloat16.
                let bound = if exact { 0.51 * ulp } else { 40.0 * ulp } + expected.abs() / 256.0;
                assert!((step - expected).abs() <= bound, "{name}, {tensor}: {step:e} instead of {expected:e}");
            }
        }
        let added = along / squares;
        assert!((added / 4e-5 - 1.0).abs() < 0.05, "{name}: {added:e} of tau_ref, {moved} weights moved");
    }
}

#[test]
fn a_run_says_what_its_merges_will_amount_to_and_what_rounding_lost() {
    let w = workspace();
    let merging = "--optimizer ondare --reserve-rate 0.5 --base-model model";
    let said = train(&w, "much", &format!("{merging} --merge-weight 0.01"));
    assert!(said.contains("tau_ref: sft minus model, ") && said.contains("add up to 1.0e-1 of it"), "{said}");
    assert!(!said.contains("next to nothing"), "{said}");
    let said = train(&w, "little", &format!("{merging} --merge-weight 1e-7 --merge-every 5"));
    assert!(
        said.contains("add up to 2.0e-7 of it") && said.contains("next to nothing; a larger --merge-weight"),
        "{said}"
    );
    let said = train(&w, "ramp", &format!("{merging} --merge-weight 0.01 --merge-schedule ramp"));
    assert!(said.contains("add up to 5.5e-2 of it"), "{said}");
    let lost = w.column("much/metrics.jsonl", "lost_updates");
    assert!(lost.iter().all(|lost| (0.0..0.1).contains(lost)), "{lost:?}");
    // Updates of a millionth of a millionth are lost, unless rounding is a matter of luck.
    let tiny = TRAIN.replace("--learning-rate 5e-4", "--learning-rate 1e-12");
    w.ok(&format!("{tiny} --output-dir nearest"));
    w.ok(&format!("{tiny} --output-dir lucky --stochastic-rounding"));
    let [nearest, lucky] = ["nearest", "lucky"].map(|run| w.column(&format!("{run}/metrics.jsonl"), "lost_updates")[1]);
    assert!(nearest > 0.9 && lucky < nearest, "{nearest} to the nearest, {lucky} at random");
    assert!(w.read("nearest/model.safetensors") != w.read("lucky/model.safetensors"));
}

#[test]
fn what_cannot_be_merged_with_is_refused_by_name() {
    let w = workspace();
    w.copy_model("narrow");
    let config = w.text("narrow/config.json");
    let heads = config.replace("\"intermediate_size\": ", "\"intermediate_size\": 1");
    assert_ne!(config, heads);
    w.write("narrow/config.json", heads);
    std::fs::remove_file(w.path("narrow/model.safetensors")).unwrap();
    w.ok("train --objective sft --model narrow --init random --dataset train.jsonl --max-length 48 --max-steps 1 \
          --output-dir other");
    let ondare = "--optimizer ondare --reserve-rate 0.5 --merge-weight 1e-3";
    for (flags, said) in [
        (
            ondare.to_string(),
            "--base-model: ondare merges with what fine-tuning added to a base model: give the folder",
        ),
        (format!("{ondare} --base-model sft"), "--base-model: sft and sft are one model, so that tau_ref would be 0"),
        (format!("{ondare} --base-model model --tau-model model"), "--base-model: model and model are one model"),
        (format!("{ondare} --base-model other"), "in --model, other has it as ["),
        (format!("{ondare} --base-model model --tau-model other"), "--tau-model: \""),
        (format!("{ondare} --base-model model --init random"), "--init: random weights minus a base model"),
        (format!("{ondare} --base-model nowhere"), "nowhere"),
        ("--base-model model".into(), "--base-model: adamw merges with no model"),
        ("--optimizer child_tuning --reserve-rate 0.5 --tau-model model".into(), "--tau-model: child_tuning merges"),
        ("--reserve-rate 0.5".into(), "--reserve-rate: adamw does not use it, it takes --adam-form; remove it"),
        ("--optimizer ondare --merge-weight 0.1".into(), "--reserve-rate: ondare requires it"),
        ("--optimizer ema".into(), "--ema-rate: ema requires it"),
        (
            format!("{ondare} --merge-form paper --merge-clip 2"),
            "--merge-clip: does nothing without --merge-form released",
        ),
        ("--optimizer lion".into(), "--optimizer: \"lion\" is not an optimizer; adamw, ondare"),
    ] {
        w.fails(1, &format!("{TRAIN} --output-dir run {flags}"), &[said]);
        assert!(!w.exists("run"), "{flags}: refused before anything is made");
    }
    for flags in ["--merge-every 0", "--merge-every 1.5", "--merge-weight 1", "--reserve-rate 0", "--reserve-rate 1.1"]
    {
        w.fails(2, &format!("{TRAIN} --output-dir run --optimizer ondare {flags}"), &["expected a number with"]);
    }
    // A run that merged does not go on merging with something else.
    train(&w, "run", &format!("{ondare} --base-model model --stop-at-step 2"));
    w.ok("train --objective sft --model model --dataset train.jsonl --max-length 48 --max-steps 1 --output-dir base2");
    let on = format!("{TRAIN} --output-dir run {ondare} --base-model base2 --resume-from-checkpoint auto");
    w.fails(1, &on, &["--base-model: the checkpoint in run/checkpoint-2 was made with"]);
}

/// Over a run that merges once, at its end, without decay: a merge of the first weights, the total update and tau_ref after the
/// fact, with the same masks.
#[test]
fn one_merge_at_the_end_is_dare_linear_over_the_first_weights() {
    const N: usize = 40;
    const STEPS: u64 = 6;
    let (random, merge_weight, reserve_rate) = (Philox::new(3, 4), 0.1, 0.4);
    let vector = |stream: u64| (0..N as u64).map(|i| Philox::new(9, stream).normal(i)).collect::<Vec<f64>>();
    let kept = |i: usize| random.u64(i as u64) % 5 < 2;
    let (start, raw) = (vector(0), vector(1));
    let tau_ref: Vec<f64> = raw.iter().map(|x| (x * 0.01).clamp(-1.0, 1.0)).collect();
    let run = |rule: Rule| {
        let [mut weight, mut master] = [tensor(&start), tensor(&start)];
        let [mut m, mut v, mut since] = [(); 3].map(|()| tensor(&[0.0; N]));
        let tau = tensor(&tau_ref);
        for step in 1..=STEPS {
            let merges = step == STEPS || rule == Rule::Adam;
            let form = Form::HuggingFace { correct_bias: true };
            let step = Step {
                adam: Adam { beta1: 0.9, beta2: 0.999, eps: 1e-6, form },
                rule,
                step,
                learning_rate: 0.01,
                weight_decay: 0.0,
                clip: 1.0,
                gradient_reserve_rate: 1.0,
                merges,
                share: if merges && rule != Rule::Adam { merge_weight } else { 0.0 },
                rounding: Rounding::Nearest,
                random,
            };
            let grad = tensor(&vector(100 + step.step));
            let online = rule != Rule::Adam;
            let args = merged_update::Args {
                step,
                grad: grad.view(),
                weight: weight.view_mut(),
                master: online.then(|| master.view_mut()),
                first_moment: m.view_mut(),
                second_moment: v.view_mut(),
                since_merge: online.then(|| since.view_mut()),
                average: None,
                tau_ref: online.then(|| tau.view()),
                scratch: None,
                lost: None,
            };
            update_with(args, |purpose, i| purpose != Purpose::Update || kept(i)).unwrap();
        }
        contents(&weight)
    };
    let variant = DareVariant::Released;
    let online = run(Rule::OnDare { reserve_rate, merge_weight, variant, rescale: false, clip: 1.0 });

    // The gradients are the same, so that plain Adam makes the same total update.
    let tuned = run(Rule::Adam);
    let fine: Vec<f64> = start.iter().zip(&tau_ref).map(|(w, tau)| w + tau).collect();
    let models: [&[f64]; 2] = [&tuned, &fine];
    let base: &[f64] = &start;
    let tensor = merge::Tensor {
        shape: vec![N],
        base: Some(&base as &dyn merge::Source<f64>),
        models: models.iter().map(|model| model as &dyn merge::Source<f64>).collect(),
    };
    let entry = merge::find("dare_linear").unwrap();
    let given = |name: &str, model: Option<usize>| {
        Ok(match (name, model) {
            ("weight", Some(model)) => Some(merge::Value::Number([1.0 - merge_weight, merge_weight][model])),
            // tau_ref comes with its mask.
            ("density", Some(model)) => Some(merge::Value::Number([reserve_rate, 1.0][model])),
            ("rescale", _) => Some("inverse_density".into()),
            ("normalize", _) => Some(merge::Value::Switch(false)),
            _ => None,
        })
    };
    let values = entry.resolve(2, given).unwrap();
    let words = |_: usize, first: usize, out: &mut [u32]| {
        out.iter_mut().enumerate().for_each(|(i, word)| *word = if kept(first + i) { 0 } else { u32::MAX });
    };
    let offline = merge::merge_tensor(entry, &tensor, &values, &words).unwrap();
    for (i, (online, offline)) in online.iter().zip(&offline).enumerate() {
        assert!((online - offline).abs() < 1e-14, "{i}: {online} online, {offline} after the fact");
    }
    assert!((0..N).any(kept) && !(0..N).all(kept));
}

fn tensor(values: &[f64]) -> Tensor<Reference> {
    let mut arena = Arena::with_bytes(&Reference, Arena::<Reference>::bytes_of(DType::F32, values.len(), 1)).unwrap();
    let mut tensor = arena.floats(Kind::States, values.len(), 1);
    Reference.write_f64(values, tensor.view_mut()).unwrap();
    tensor
}

fn contents(tensor: &Tensor<Reference>) -> Vec<f64> {
    let mut values = vec![0.0; tensor.len()];
    Reference.read_f64(tensor.view(), &mut values).unwrap();
    values
}

/// An adapter that went through fine-tuning goes on from there, merged with what fine-tuning had added to it: in its own A and B.
#[test]
fn an_adapter_is_merged_with_a_difference_of_adapters() {
    let w = Workspace::with_reviews(40);
    let sft =
        "train --objective sft --learning-rate 1e-3 --model model --dataset train.jsonl --max-length 48 --batch-size 8";
    w.ok(&format!(
        "{sft} --max-steps 5 --save-steps 2 --lora-rank 3 --target-modules q_proj,down_proj --output-dir sft"
    ));
    let train = TRAIN.replace("--model sft", "--model model --lora-start sft");
    let still = train.replace("--learning-rate 5e-4", "--learning-rate 1e-30");
    let merging = "--optimizer ondare --reserve-rate 1 --merge-weight 0.01";
    for (base, tau_of_a) in [("model", false), ("sft/checkpoint-2", true)] {
        let run = format!("from-{tau_of_a}");
        w.ok(&format!("{still} {merging} --base-model {base} --output-dir {run}"));
        let read = |dir: &str| {
            let file = Weights::open_file(&w.path(dir).join("adapter_model.safetensors")).unwrap();
            tensors(&file)
        };
        let earlier = read("sft/checkpoint-2");
        for (((name, after), (_, before)), (_, earlier)) in read(&run).iter().zip(read("sft")).zip(earlier) {
            for ((after, before), earlier) in after.iter().zip(before).zip(earlier) {
                let base = match (tau_of_a, name.contains("lora_A")) {
                    (true, _) => earlier,
                    (false, true) => before,
                    (false, false) => 0.0,
                };
                let expected = before + 0.1 * (before - base);
                // tau_ref is kept in bfloat16.
                let bound = 0.1 * (before - base).abs() / 256.0 + expected.abs() * 1e-6;
                assert!((after - expected).abs() <= bound, "{run}, {name}: {after} instead of {expected}");
            }
        }
        // At the first step the policy is its reference: the model under the adapter that it starts as.
        assert_eq!(w.column(&format!("{run}/metrics.jsonl"), "rewards/margins")[0], 0.0);
    }
    let whole = format!("{train} {merging} --base-model model --merge-every 4 --save-steps 10");
    w.ok(&format!("{whole} --output-dir whole"));
    w.ok(&format!("{whole} --output-dir run --stop-at-step 6"));
    w.ok(&format!("{whole} --output-dir run --resume-from-checkpoint auto"));
    let file = "adapter_model.safetensors";
    assert!(w.read(&format!("whole/{file}")) == w.read(&format!("run/{file}")));

    w.ok(&format!("{sft} --max-steps 1 --lora-rank 2 --output-dir other"));
    let anew = TRAIN.replace("--model sft", "--model model --lora-rank 3");
    for (line, said) in [
        (
            format!("{anew} {merging} --base-model model"),
            "--optimizer: ondare merges with what fine-tuning added, and an adapter",
        ),
        (
            format!("{train} {merging} --base-model other"),
            "--base-model: other has not the layers, ranks and scales of sft",
        ),
        (format!("{train} {merging} --base-model model --tau-model model"), "--tau-model: model is no adapter"),
        (format!("{train} {merging} --base-model sft"), "--base-model: sft and sft are one model"),
        (format!("{train} --lora-start nowhere").replace("--lora-start sft", ""), "nowhere"),
    ] {
        w.fails(1, &format!("{line} --output-dir refused"), &[said]);
    }
    let twice = format!("{train} --lora-rank 4 --output-dir refused");
    w.fails(2, &twice, &["--lora-rank: the adapter of --lora-start has its own; drop one of the two"]);
}

/// Four bytes for each master and each state, two for tau_ref, nothing for what does not train.
#[test]
fn what_an_optimizer_keeps_of_a_weight() {
    let tiny = tiny::with(Size::Small, "llama", serde_json::json!({}));
    let (spec, naming) = (&tiny.checkpoint.spec, tiny.checkpoint.architecture.naming);
    let schedule = Schedule { peak: 1e-3, decay: Decay::Constant, warmup_steps: 0, max_steps: 10 };
    let kept = |storage: DType, name: &str, params: Params, stochastic_rounding: bool, options: Options| {
        let method = optim::Choice { name: name.into(), params }.build().unwrap();
        let (beta1, beta2, eps, weight_decay, max_grad_norm) = (0.9, 0.999, 1e-8, 0.0, 0.0);
        let hyper = Hyper { beta1, beta2, eps, weight_decay, max_grad_norm, stochastic_rounding, seed: 1 };
        let mut arena = Dry::arena(storage);
        let mut model = Model::new(&mut arena, spec, naming, options);
        let lens: Vec<usize> = model.trained_mut().iter().map(|param| param.value.len()).collect();
        Optimizer::new(&mut arena, method, hyper, schedule, &mut model.trained_mut());
        let padded = |bytes: usize| bytes.next_multiple_of(256);
        let each = |bytes: usize| lens.iter().map(|len| padded(bytes * len)).sum::<usize>();
        // Squares of gradients, and counts of lost updates.
        let own = padded(4 * lens.len()) + padded(8 * lens.len());
        (arena.ledger().get(Kind::States) - own, each(4), each(2))
    };
    let all = || Options::train_all(8);
    let merging = |more: &[(&str, f64)]| -> Params {
        [("reserve_rate", 0.1), ("merge_weight", 0.1)].iter().chain(more).map(|(name, x)| (*name, *x)).collect()
    };
    let (states, four, _) = kept(DType::Bf16, "adamw", Params::default(), false, all());
    assert_eq!(states, 3 * four, "a master and two moments");
    let (states, four, _) = kept(DType::Bf16, "adamw", Params::default(), true, all());
    assert_eq!(states, 2 * four, "no master");
    let (states, four, two) = kept(DType::F32, "ondare", merging(&[]), false, all());
    assert_eq!(states, 3 * four + two, "a master for what is merged lazily, and tau_ref");
    let (states, four, two) = kept(DType::F32, "onties", merging(&[("merge_every", 4.0)]), false, all());
    assert_eq!(states, 3 * four + two, "what happened since the last merge");
    let frozen = kept(DType::Bf16, "ondare", merging(&[]), false, Options::frozen(8));
    assert_eq!(frozen, (0, 0, 0));
}
