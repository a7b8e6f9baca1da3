//! `cuvee merge adapters` and `cuvee merge extract`: against PEFT, against arithmetic, and what cannot be done.

use std::fs;

use cuvee::checkpoint::json::{read_json, write_json};
use cuvee::checkpoint::peft::{self, AdapterFile};
use cuvee::checkpoint::{SaveDtype, TensorSource, Weights, save_safetensors};
use serde_json::json;

use crate::peft::{delta, fixture};
use crate::program::Workspace;

/// A folder with PEFT's adapters a, b, c, d, conv and their bases.
fn workspace() -> Workspace {
    let w = Workspace::new();
    for name in ["a", "b", "c", "d", "conv", "base", "gpt2"] {
        std::os::unix::fs::symlink(fixture(name).canonicalize().unwrap(), w.path(name)).unwrap();
    }
    w
}

fn open(w: &Workspace, name: &str) -> AdapterFile {
    AdapterFile::open(&w.path(name)).unwrap()
}

/// A module's `scaling B A`; zeros of the size of `like` where the adapter lacks it.
fn delta_or_zeros(adapter: &AdapterFile, module: &str, like: usize) -> Vec<f64> {
    if adapter.has(module) { delta(adapter, module) } else { vec![0.0; like] }
}

fn assert_close(what: &str, found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let off = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    let size = expected.iter().map(|x| x.abs()).fold(1.0, f64::max);
    assert!(off <= tolerance * size, "{what}: {off} of {size}");
}

fn read(weights: &Weights, name: &str) -> Vec<f64> {
    let shape = weights.shape(name).unwrap_or_else(|| panic!("{name} is not there")).to_vec();
    let mut values = vec![0.0; shape.iter().product()];
    weights.read(name, &shape, &mut values).unwrap();
    values.into_iter().map(f64::from).collect()
}

#[test]
fn merges_are_those_of_peft() {
    let w = workspace();
    let expected = Weights::open_file(&fixture("deltas.safetensors")).unwrap();
    for (method, options) in [("cat", ""), ("linear", ""), ("svd", " --rank 2")] {
        w.ok(&format!(
            "merge adapters --adapter c=0.3 --adapter d=0.7 --method {method}{options} --output-dir {method}"
        ));
        let merged = open(&w, method);
        for module in merged.modules() {
            let theirs = read(&expected, &format!("{method} {module}"));
            assert_close(&format!("{method} {module}"), &delta(&merged, &module), &theirs, 1e-6);
        }
        assert_eq!(merged.modules(), open(&w, "c").modules());
    }
}

/// Adapters of other ranks, targets and scalings: what one lacks is zero.
#[test]
fn unlike_adapters_are_merged() {
    let w = workspace();
    w.ok("merge adapters --adapter a=0.25 --adapter b=-2 --adapter c --output-dir all");
    let (merged, sources) = (open(&w, "all"), [("a", 0.25), ("b", -2.0), ("c", 1.0)].map(|(n, x)| (open(&w, n), x)));
    for module in merged.modules() {
        let found = delta(&merged, &module);
        let mut expected = vec![0.0; found.len()];
        for (source, weight) in &sources {
            let part = delta_or_zeros(source, &module, found.len());
            expected.iter_mut().zip(part).for_each(|(sum, x)| *sum += weight * x);
        }
        assert_close(&module, &found, &expected, 2e-6);
        assert_eq!(merged.scaling(&module), 1.0);
    }
    // q in layer 1: 1 of a, 4 of b, 2 of c.
    assert_eq!(merged.rank("model.layers.1.self_attn.q_proj"), 7);
    assert_eq!(merged.rank("model.layers.0.self_attn.k_proj"), 2);
    let lineage = w.json("all/cuvee_lineage.json");
    assert_eq!((&lineage["command"], &lineage["arguments"]["method"]), (&json!("merge adapters"), &json!("cat")));
    assert_eq!((&lineage["parents"][1]["name"], &lineage["parents"][1]["weight"]), (&json!("b"), &json!(-2.0)));
    assert!(w.ok("lineage all --verify").stdout.contains("adapter c "));

    let message =
        w.fails(1, "merge adapters --adapter a --adapter c --method factor --output-dir no", &["of one rank"]);
    assert!(message.contains("model.layers.0.mlp.down_proj") && !w.exists("no"), "{message}");
}

#[test]
fn factors_say_how_far_they_are_from_the_sum() {
    let w = workspace();
    let told = w.ok("merge adapters --adapter c=0.5 --adapter d=0.5 --method factor --output-dir factor").stdout;
    let percent: f64 = told.lines().nth(1).unwrap().split(" %").next().unwrap().parse().unwrap();
    let (merged, c, d) = (open(&w, "factor"), open(&w, "c"), open(&w, "d"));
    let (mut lost, mut energy) = (0.0, 0.0);
    for module in merged.modules() {
        let exact: Vec<f64> = delta(&c, &module).iter().zip(delta(&d, &module)).map(|(c, d)| 0.5 * (c + d)).collect();
        lost += exact.iter().zip(delta(&merged, &module)).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
        energy += exact.iter().map(|x| x * x).sum::<f64>();
    }
    assert!((percent - 100.0 * f64::sqrt(lost / energy)).abs() < 1e-3, "{told} {}", (lost / energy).sqrt());
    let exact = w.ok("merge adapters --adapter c=0.5 --adapter d=0.5 --output-dir cat").stdout;
    assert!(exact.contains("rank 4") && exact.contains("exactly"), "{exact}");
}

/// Into the weights of the base, as PEFT's `merge_and_unload` does; also of a base that keeps `[inputs, outputs]`.
#[test]
fn deltas_are_added_to_the_base() {
    let w = workspace();
    for (adapter, base) in [("a", "base"), ("conv", "gpt2")] {
        let line =
            format!("merge adapters --adapter {adapter} --method delta --model {base} --output-dir whole-{base}");
        let told = w.ok(&line).stdout;
        assert!(told.contains("written as float32") && told.contains("rounding: 0.000 %"), "{told}");
        assert!(told.contains("not compared: the base has no logits, or no tokenizer"), "{told}");
        let ours = Weights::open(&w.path(&format!("whole-{base}"))).unwrap();
        let theirs = Weights::open_file(&fixture(&format!("{adapter}_merged.safetensors"))).unwrap();
        assert_eq!(ours.names().collect::<Vec<_>>(), theirs.names().collect::<Vec<_>>());
        for name in theirs.names() {
            assert_close(name, &read(&ours, name), &read(&theirs, name), 1e-6);
        }
        assert!(w.ok(&format!("lineage whole-{base} --verify")).stdout.contains(&format!("base {base} ")));
    }
    // Half of it, rounded: the loss is that of the written file.
    let told = w.ok("merge adapters --adapter a=0.5 --method delta --model base --dtype bf16 --output-dir half").stdout;
    let percent: f64 = told.split("rounding: ").nth(1).unwrap().split(" %").next().unwrap().parse().unwrap();
    let (half, base, a) =
        (Weights::open(&w.path("half")).unwrap(), Weights::open(&w.path("base")).unwrap(), open(&w, "a"));
    let (mut lost, mut added) = (0.0, 0.0);
    for module in a.modules() {
        let name = format!("{module}.weight");
        for ((found, base), delta) in read(&half, &name).iter().zip(read(&base, &name)).zip(delta(&a, &module)) {
            lost += (found - base - 0.5 * delta).powi(2);
            added += (0.5 * delta).powi(2);
        }
    }
    assert!(percent > 0.0 && (percent - 100.0 * f64::sqrt(lost / added)).abs() < 1e-3, "{told}");
    assert_eq!(w.json("half/config.json")["dtype"], json!("bfloat16"));
}

#[test]
fn what_cannot_be_merged_says_why() {
    let w = workspace();
    let changed = |name: &str, of: &str, change: &dyn Fn(&mut serde_json::Value)| {
        fs::create_dir(w.path(name)).unwrap();
        for file in [peft::CONFIG, peft::WEIGHTS] {
            fs::copy(fixture(of).join(file), w.path(name).join(file)).unwrap();
        }
        let path = w.path(name).join(peft::CONFIG);
        let mut config = read_json(&path).unwrap();
        change(&mut config);
        write_json(&path, &config).unwrap();
    };
    changed("elsewhere", "c", &|config| config["base_model_name_or_path"] = json!("org/other"));
    changed("hub", "c", &|config| config["base_model_name_or_path"] = json!("org/base"));
    changed("turned", "c", &|config| config["fan_in_fan_out"] = json!(true));
    fs::create_dir(w.path("taken")).unwrap();
    let cases = [
        (2, "--adapter a --rank 3 --output-dir x", "--rank: does nothing without --method svd"),
        (2, "--adapter a --dtype bf16 --output-dir x", "--dtype: does nothing without --method delta"),
        (2, "--adapter a --method delta --output-dir x", "--model: missing"),
        (2, "--adapter a=0 --output-dir x", "a weight other than 0"),
        (2, "--adapter a=nan --output-dir x", "a weight other than 0"),
        (2, "--output-dir x", "--adapter"),
        (1, "--adapter a --output-dir taken", "taken exists"),
        (1, "--adapter base --output-dir x", "is a whole model"),
        (1, "--adapter c --adapter elsewhere --output-dir x", "c was made for base, elsewhere for other"),
        (1, "--adapter c --adapter turned --output-dir x", "disagree on \"fan_in_fan_out\""),
        (1, "--adapter a --method delta --model gpt2 --output-dir x", "which gpt2 does not have"),
        (1, "--adapter a --model model --output-dir x", "the adapters imply"),
        (1, "--adapter conv --adapter a --output-dir x", "disagree on"),
    ];
    for (code, line, message) in cases {
        let said = w.run(&format!("merge adapters {line}"));
        assert_eq!(said.code, Some(code), "{line}: {}", said.stderr);
        assert!(said.stderr.contains(message), "{line}: {}", said.stderr);
        assert!(!w.exists("x"));
    }
    // The same name at the end, and a base that is given.
    w.ok("merge adapters --adapter c --adapter hub --output-dir hubs");
    w.ok("merge adapters --adapter c --adapter elsewhere --model base --output-dir given");
    assert_eq!(open(&w, "given").config.base_model.as_deref(), Some("base"));
}

/// Writes a copy of a model whose tensors are changed.
fn changed_model(w: &Workspace, from: &str, to: &str, change: &dyn Fn(&str, &mut [f32])) {
    fs::create_dir(w.path(to)).unwrap();
    fs::copy(w.path(from).join("config.json"), w.path(to).join("config.json")).unwrap();
    let weights = Weights::open(&w.path(from)).unwrap();
    let source = |name: &str| {
        let (name, shape) = (name.to_string(), weights.shape(name).unwrap().to_vec());
        let weights = &weights;
        let (of, dims) = (name.clone(), shape.clone());
        let fill = move |out: &mut [f32]| {
            weights.read(&of, &dims, out)?;
            change(&of, out);
            Ok(())
        };
        TensorSource { name, shape, fill: Box::new(fill) }
    };
    let sources: Vec<TensorSource> = weights.names().map(source).collect();
    save_safetensors(&w.path(to).join("model.safetensors"), &sources, SaveDtype::F32).unwrap();
}

/// An adapter that was added to its base is found again, of its own rank.
#[test]
fn a_planted_adapter_is_extracted() {
    let w = workspace();
    for (adapter, base) in [("c", "base"), ("conv", "gpt2")] {
        w.ok(&format!("merge adapters --adapter {adapter} --method delta --model {base} --output-dir {base}-planted"));
        let line =
            format!("merge extract --model {base}-planted --base-model {base} --rank 2 --output-dir {base}-found");
        let told = w.ok(&line).stdout;
        assert!(told.contains("no other tensor differs"), "{told}");
        let (planted, found) = (open(&w, adapter), open(&w, &format!("{base}-found")));
        assert_eq!(found.modules(), planted.modules());
        for module in planted.modules() {
            assert_close(&module, &delta(&found, &module), &delta(&planted, &module), 1e-5);
            assert_eq!((found.rank(&module), found.scaling(&module)), (2, 1.0));
        }
        assert_eq!(found.config.fan_in_fan_out, base == "gpt2");
        let kept = &w.json(&format!("{base}-found/cuvee_extraction.json"))["kept"];
        let largest =
            kept.as_object().unwrap().values().map(|k| k["relative_error"].as_f64().unwrap()).fold(0.0, f64::max);
        assert!(largest < 1e-5, "{largest}");
    }
    let mut targets = open(&w, "base-found").config.target_modules;
    targets.sort();
    assert_eq!(targets, ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]);
}

/// With the rank of the matrices nothing is lost but f32 rounding; what is no linear layer is named.
#[test]
fn extraction_says_what_it_cannot_keep() {
    let w = workspace();
    let noise = |i: usize| ((i * 7919 + 13) % 101) as f32 / 101.0 - 0.5;
    let change = |name: &str, out: &mut [f32]| {
        if !name.contains("layers.0.self_attn.k_proj") {
            out.iter_mut().enumerate().for_each(|(i, x)| *x += 0.1 * noise(i));
        }
    };
    changed_model(&w, "base", "policy", &change);
    let told = w.ok("merge extract --model policy --base-model base --rank 64 --output-dir full").stdout;
    assert!(told.contains("not kept: 6 tensors"), "{told}");
    let (full, policy, base) =
        (open(&w, "full"), Weights::open(&w.path("policy")).unwrap(), Weights::open(&w.path("base")).unwrap());
    for module in full.modules() {
        let name = format!("{module}.weight");
        let expected: Vec<f64> = read(&policy, &name).iter().zip(read(&base, &name)).map(|(a, b)| a - b).collect();
        assert_close(&module, &delta(&full, &module), &expected, 1e-6);
    }
    assert!(!full.has("model.layers.0.self_attn.k_proj"), "it does not differ");
    assert!(full.config.target_modules.contains(&"model.layers.1.self_attn.k_proj".to_string()));
    assert!(full.config.target_modules.contains(&"q_proj".to_string()));
    let report = w.json("full/cuvee_extraction.json");
    assert!(report["left"]["model.norm.weight"]["relative_change"].as_f64() > Some(0.0), "{report}");

    // With less, what is said to be lost is lost.
    w.ok("merge extract --model policy --base-model base --rank 1 --output-dir one");
    let (one, report) = (open(&w, "one"), w.json("one/cuvee_extraction.json"));
    for module in one.modules() {
        let name = format!("{module}.weight");
        let expected: Vec<f64> = read(&policy, &name).iter().zip(read(&base, &name)).map(|(a, b)| a - b).collect();
        let lost: f64 = expected.iter().zip(delta(&one, &module)).map(|(a, b)| (a - b).powi(2)).sum();
        let said = report["kept"][&module]["lost"].as_f64().unwrap();
        assert!((said / lost - 1.0).abs() < 1e-4 && lost > 0.0, "{module}: {said} {lost}");
    }

    let cases = [
        ("--model base --base-model base", "there is nothing to extract"),
        ("--model base --base-model gpt2", "has other shapes than --model"),
        ("--model base --base-model absent", "there is no such folder"),
    ];
    for (line, message) in cases {
        w.fails(1, &format!("merge extract {line} --rank 2 --output-dir x"), &[message]);
        assert!(!w.exists("x"));
    }
    w.fails(1, "merge extract --model policy --base-model base --rank 2 --output-dir full", &["full exists"]);
}

/// What is said of behaviour is what scoring both models shows.
#[test]
fn behaviour_is_compared_on_data() {
    let w = Workspace::with_reviews(12);
    w.ok(
        "train --objective sigmoid --beta 0.1 --dataset train.jsonl --max-steps 3 --batch-size 4 --learning-rate 5e-3 --max-length 40 \
         --device cpu --model model --output-dir policy",
    );
    let extract = "merge extract --model policy --base-model model --rank 2 --dataset heldout.jsonl --device cpu";
    let told = w.ok(&format!("{extract} --output-dir lora")).stdout;
    assert!(told.contains("log-probabilities of 32 completions differ by"), "{told}");
    let said = &w.json("lora/cuvee_extraction.json")["behaviour"];
    let scores = |flags: &str| -> Vec<f64> {
        w.ok(&format!("logps {flags} --dataset heldout.jsonl --device cpu --out scores.jsonl"));
        ["logps_chosen", "logps_rejected"].iter().flat_map(|key| w.column("scores.jsonl", key)).collect()
    };
    let (policy, found) = (scores("--model policy"), scores("--model model --adapter lora"));
    let differences: Vec<f64> = policy.iter().zip(&found).map(|(a, b)| (a - b).abs()).collect();
    let mean = differences.iter().sum::<f64>() / differences.len() as f64;
    let largest = differences.iter().copied().fold(0.0, f64::max);
    assert!(largest > 1e-2, "this adapter is not the policy: {largest}");
    for (key, expected) in [("mean", mean), ("largest", largest)] {
        let said = said[key].as_f64().unwrap();
        assert!((said / expected - 1.0).abs() < 1e-6, "{key}: {said} {expected}");
    }

    // Beside the weights or in them: the same up to rounding, of f32 and of bf16.
    let differs = |dtype: &str| -> f64 {
        let line = format!(
            "merge adapters --adapter lora --method delta --model model --dtype {dtype} --dataset heldout.jsonl"
        );
        let told = w.ok(&format!("{line} --device cpu --output-dir {dtype}")).stdout;
        told.split("differ by ").nth(1).unwrap().split(" nats").next().unwrap().parse().unwrap()
    };
    let (f32, bf16) = (differs("f32"), differs("bf16"));
    assert!(f32 < 1e-4 && bf16 > 10.0 * f32, "{f32} {bf16}");
    let text = w.ok("merge adapters --adapter lora --method delta --model model --threads 1 --output-dir text").stdout;
    assert!(text.contains("and in it, on a short text: log-probabilities of 1 completions differ by"), "{text}");
    for (line, message) in [
        (
            "merge extract --model policy --base-model model --rank 2 --max-length 8 --output-dir x",
            "--max-length: does nothing",
        ),
        ("merge adapters --adapter lora --threads 1 --output-dir x", "--threads: does nothing without --dataset"),
        (
            "merge adapters --adapter lora --dataset heldout.jsonl --output-dir x",
            "--dataset: does nothing without --method delta",
        ),
    ] {
        w.fails(2, line, &[message]);
    }
}
