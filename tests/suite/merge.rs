//! `cuvee merge` as a user runs it, and its methods where golden values do not go: awkward shapes, ties, threads, memory.

use std::path::Path;

use cuvee::checkpoint::{SaveDtype, TensorSource, Weights, save_safetensors};
use cuvee::merge::{self, Entry, Input, Merge, Recipe, Settings, Source, Tensor, Value, merge_tensor};
use serde_json::{Value as Json, json};

use crate::program::Workspace;

const NAMES: [&str; 4] = [
    "model.embed_tokens.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.norm.weight",
];

/// A folder that passes for a model of two layers: every tensor is [2, 3] and holds its number times `scale`, and a bit more.
fn tiny(w: &Workspace, name: &str, scale: f32) {
    save(w, name, &json!({"model_type": "llama", "vocab_size": 2, "dtype": "float32"}), &NAMES, &[2, 3], scale);
}

fn save(w: &Workspace, name: &str, config: &Json, names: &[&str], shape: &[usize], scale: f32) {
    std::fs::create_dir_all(w.path(name)).unwrap();
    w.write(&format!("{name}/config.json"), config.to_string());
    let source = |(i, tensor): (usize, &&str)| TensorSource {
        name: tensor.to_string(),
        shape: shape.to_vec(),
        fill: Box::new(move |out| {
            out.iter_mut().enumerate().for_each(|(j, out)| *out = scale * ((i + 1) as f32 + j as f32 / 8.0));
            Ok(())
        }),
    };
    let sources: Vec<TensorSource> = names.iter().enumerate().map(source).collect();
    save_safetensors(&w.path(name).join("model.safetensors"), &sources, SaveDtype::F32).unwrap();
}

fn read(folder: &Path, tensor: &str) -> Vec<f32> {
    let weights = Weights::open(folder).unwrap();
    let shape = weights.shape(tensor).unwrap().to_vec();
    let mut out = vec![f32::NAN; shape.iter().product()];
    weights.read(tensor, &shape, &mut out).unwrap();
    out
}

/// What tensor `i` of a [`tiny`] model of that scale begins with.
fn first(i: usize, scale: f32) -> f32 {
    scale * (i + 1) as f32
}

#[test]
fn a_soup_is_the_mean() {
    let w = Workspace::new();
    for (name, scale) in [("a", 1.0), ("b", 3.0)] {
        tiny(&w, name, scale);
    }
    let said = w.ok("merge --method linear --model a=1 --model b=3 --output-dir out");
    assert!(said.stderr.contains("model  b  weight 3") && said.stderr.contains("4 tensors"), "{}", said.stderr);
    assert!(said.stdout.starts_with("wrote out: 4 tensors") && said.stdout.contains("MB/s"), "{}", said.stdout);
    assert_eq!(w.names("out"), ["config.json", "cuvee.json", "cuvee_lineage.json", "model.safetensors"]);
    for (i, name) in NAMES.iter().enumerate() {
        assert_eq!(read(&w.path("out"), name)[0], first(i, 2.5), "{name}");
    }
    let lineage = w.json("out/cuvee_lineage.json");
    assert_eq!((&lineage["command"], &lineage["arguments"]["method"]), (&json!("merge"), &json!("linear")));
    let parents = lineage["parents"].as_array().unwrap();
    assert_eq!((parents.len(), &parents[1]["name"], &parents[1]["weight"]), (2, &json!("b"), &json!(3.0)));
    assert_eq!(lineage["hash"], json!(cuvee::lineage::content_hash(&w.path("out")).unwrap()));
    // A finished merge makes room for the next, as any run of cuvee does.
    let again = w.ok("merge --method linear --model a=1 --model b=1 --dtype bf16 --output-dir out");
    assert!(again.stderr.contains("what was in out is in out.1 now"), "{}", again.stderr);
    assert_eq!(w.json("out/config.json")["dtype"], json!("bfloat16"));
    assert_eq!(read(&w.path("out"), NAMES[0])[0], 2.0);
    assert_eq!(read(&w.path("out.1"), NAMES[0])[0], 2.5);
}

#[test]
fn flags_and_yaml_are_two_ways_to_say_it() {
    let w = Workspace::new();
    for (name, scale) in [("base", 1.0), ("a", 2.0), ("b", -3.0)] {
        tiny(&w, name, scale);
    }
    w.write(
        "recipe.yaml",
        "# as mergekit has it
merge_method: dare_ties
base_model: base
models:
  - model: base
    # no parameters necessary for base model
  - model: a
    parameters: {weight: 0.5, density: 0.75}
  - model: b
    parameters:
      weight:
        - filter: mlp
          value: 0.25
        - value: 1
parameters:
  density: 0.5
  normalize: true
  int8_mask: true
  rescale: false
dtype: float16
tokenizer_source: base
",
    );
    w.ok("merge --config recipe.yaml --seed 5 --output-dir yaml");
    w.ok(
        "merge --method dare-ties --base-model base --model a --model b --weight 0.5 1 --density 0.75 0.5 --normalize \
          --rescale none --override mlp:weight=0.5,0.25 --dtype f16 --seed 5 --output-dir flags",
    );
    assert_eq!(w.read("yaml/model.safetensors"), w.read("flags/model.safetensors"));
    assert_eq!(w.json("flags/config.json")["dtype"], json!("float16"));
    w.ok("merge --config recipe.yaml --seed 6 --output-dir other");
    assert_ne!(w.read("yaml/model.safetensors"), w.read("other/model.safetensors"));
    assert!(w.ok("lineage yaml").stdout.contains("base base"));
}

#[test]
fn gradients_and_filters_reach_the_tensors_they_name() {
    let w = Workspace::new();
    for (name, scale) in [("a", 1.0), ("b", 2.0)] {
        tiny(&w, name, scale);
    }
    w.write(
        "slerp.yaml",
        "slices:
  - sources:
      - {model: a, layer_range: [0, 2]}
      - {model: b, layer_range: [0, 2]}
merge_method: slerp
base_model: a
parameters:
  t:
    - filter: mlp
      value: [0.25, 0.75]
    - value: 0.5
",
    );
    let said = w.ok("merge --config slerp.yaml --output-dir out").stderr;
    assert!(said.contains("t 0.25 to 0.75 by tensor"), "{said}");
    for (i, scale) in [1.5, 1.25, 1.75, 1.5].into_iter().enumerate() {
        assert_eq!(read(&w.path("out"), NAMES[i])[0], first(i, scale), "{}", NAMES[i]);
    }
}

#[test]
fn recipes_that_cannot_be_run_say_why_and_where() {
    let w = Workspace::new();
    for (name, scale) in [("base", 1.0), ("a", 2.0), ("b", -3.0)] {
        tiny(&w, name, scale);
    }
    let models = "models:\n  - {model: a, parameters: {weight: 1}}\n  - {model: b, parameters: {weight: 1}}\n";
    let slices = |a: &str, b: &str| {
        format!(
            "merge_method: slerp\nbase_model: a\nslices:\n  - sources:\n      - {{model: a, layer_range: {a}}}\n      - {{model: b, layer_range: {b}}}\nparameters: {{t: 0.5}}\n"
        )
    };
    let cases = [
        (format!("merge_method: linear\n{models}mergemethod: x\n"), "recipe.yaml", "mergemethod"),
        (format!("merge_method: linear\n{models}mergemethod: x\n"), "line 5", ""),
        (
            format!("{models}merge_method: passthrough\n"),
            "recipe.yaml, line 4: merge_method: there is no",
            "known are linear",
        ),
        (
            format!("merge_method: linear\n{models}parameters:\n  density: 0.5\n"),
            "line 6: linear does not take \"density\"",
            "normalize",
        ),
        (
            format!("merge_method: linear\n{models}tokenizer_source: union\n"),
            "line 5: tokenizer_source",
            "one vocabulary",
        ),
        (
            format!("merge_method: linear\n{models}tokenizer: {{source: union}}\n"),
            "line 5: tokenizer: is not built",
            "",
        ),
        (format!("merge_method: linear\n{models}chat_template: auto\n"), "line 5: chat_template: is not built", ""),
        (format!("merge_method: linear\n{models}dtype: int8\n"), "line 5: dtype: expected float32", "int8"),
        (format!("merge_method: linear\n{models}base_model: base\n"), "linear has no base", ""),
        ("merge_method: linear\nmodules: {text: 1}\n".into(), "line 2: modules: is not built", ""),
        ("merge_method: linear\n".into(), "needs either models or slices", ""),
        (
            "merge_method: linear\nmodels:\n  - {model: none}\n".into(),
            "line 3: there is no folder",
            "downloads nothing",
        ),
        ("merge_method: linear\nmodels:\n  - {model: a+lora}\n".into(), "line 3: \"a+lora\": adapters", ""),
        (
            "merge_method: linear\nmodels:\n  - {model: {model: {path: a}}}\n".into(),
            "line 3: a model is a folder here",
            "",
        ),
        (format!("merge_method: ties\n{models}"), "--base-model: missing", ""),
        (format!("merge_method: ties\nbase_model: a\n{models}"), "weight: does nothing on the base", ""),
        (slices("[0, 1]", "[1, 2]"), "line 6: slices: only one", "move layers"),
        (slices("[0, 1]", "[0, 1]"), "slices end at layer 1, the models have 2", ""),
        ("merge_method: [linear".into(), "recipe.yaml", ""),
    ];
    for (text, one, other) in cases {
        w.write("recipe.yaml", &text);
        let message = w.fails(1, "merge --config recipe.yaml --output-dir out", &[one, other]);
        assert!(message.starts_with("recipe.yaml") || message.starts_with('a'), "{text}\n{message}");
        assert!(!w.exists("out"));
    }
    w.write("recipe.yaml", format!("merge_method: linear\n{models}"));
    w.fails(2, "merge --config recipe.yaml --weight 1 --output-dir out", &["--weight", "the recipe's business"]);
}

#[test]
fn flags_that_cannot_be_right_are_refused() {
    let w = Workspace::new();
    for (name, scale) in [("base", 1.0), ("a", 2.0), ("b", -3.0)] {
        tiny(&w, name, scale);
    }
    let cases = [
        ("--model a --model b", "--method: missing"),
        ("--method linear --model a=1", "linear merges 2 models or more, got 1"),
        ("--method linear --model a=1 --model ./a=1", "is there twice"),
        ("--method linear --model a=1 --model b=1 --base-model base", "--base-model: does nothing"),
        ("--method linear --model a=1 --model b=1 --density 0.5", "--density: linear does not take it"),
        ("--method linear --model a=1 --model b=1 --seed 3", "--seed: does nothing with linear"),
        ("--method linear --model a=1 --model b=1 --weight 1", "drop one"),
        ("--method ties --model a=1 --model b=1", "--base-model: missing"),
        ("--method ties --base-model base --model a=1 --density 0.5 0.5", "2 values for 1 models"),
        (
            "--method slerp --base-model base --model a --model b --t 0.5",
            "slerp merges 1 model besides the base, got 2",
        ),
        ("--method linear --model a=1 --model b=1 --override mlp:t=1", "--t: linear does not take it"),
    ];
    for (line, part) in cases {
        w.fails(2, &format!("merge {line} --output-dir out"), &[part]);
    }
    let late = [
        ("--method linear --model a --model b", "--weight: for \"model.embed_tokens.weight\": linear requires it"),
        ("--method linear --model a=1 --model b=-1", "sum to 0"),
        ("--method slerp --base-model base --model a", "slerp requires it"),
        ("--method della --base-model base --model a=1 --density 0.9", "--epsilon"),
        ("--method ties --base-model base --model a=1 --override norm:density=2", "expects 0 < density <= 1, got 2"),
        ("--method linear --model a=1e38 --model b=1e38 --normalize false", "becomes"),
        ("--method linear --model a=1e5 --model b=1 --normalize false --dtype f16", "--dtype bf16"),
        ("--method linear --model a=1 --model none=1", "none/config.json"),
    ];
    for (line, part) in late {
        w.fails(1, &format!("merge {line} --output-dir out"), &[part]);
        assert!(!w.exists("out") && !w.exists("out.tmp"));
    }
    for text in ["--density 0", "--density 1.5", "--t nan", "--override mlp", "--model a=x", "--method tees"] {
        assert_eq!(
            w.run(&format!("merge --method ties --base-model base --model a=1 {text} --output-dir out")).code,
            Some(2)
        );
    }
}

#[test]
fn models_that_do_not_fit_are_named() {
    let w = Workspace::new();
    tiny(&w, "a", 1.0);
    let llama = json!({"model_type": "llama", "vocab_size": 2});
    save(&w, "other", &json!({"model_type": "gpt2", "vocab_size": 2}), &NAMES, &[2, 3], 1.0);
    save(&w, "vocabulary", &json!({"model_type": "llama", "vocab_size": 4}), &NAMES, &[4, 3], 1.0);
    save(&w, "size", &llama, &NAMES, &[2, 4], 1.0);
    save(&w, "lacks", &llama, &NAMES[..3], &[2, 3], 1.0);
    save(&w, "more", &llama, &[&NAMES[..], &["extra"]].concat(), &[2, 3], 1.0);
    save(&w, "tied", &json!({"model_type": "llama", "tie_word_embeddings": true}), &NAMES, &[2, 3], 1.0);
    save(&w, "nan", &llama, &NAMES, &[2, 3], f32::NAN);
    let with = |key: &str, value: serde_json::Value| {
        let mut config = llama.clone();
        config[key] = value;
        config
    };
    save(&w, "silu", &with("hidden_act", "silu".into()), &NAMES, &[2, 3], 1.0);
    save(&w, "gelu", &with("hidden_act", "gelu".into()), &NAMES, &[2, 3], 1.0);
    w.fails(
        1,
        "merge --method linear --model silu=1 --model gelu=1 --output-dir out",
        &["hidden_act", "different activations"],
    );
    save(&w, "near", &with("rope_theta", 10000.into()), &NAMES, &[2, 3], 1.0);
    save(&w, "far", &with("rope_theta", 500000.into()), &NAMES, &[2, 3], 1.0);
    let told = w.ok("merge --method linear --model near=1 --model far=1 --dry-run").stderr;
    assert!(told.contains("near and far differ in rope_theta (10000 and 500000): the merged model has"), "{told}");
    std::fs::create_dir(w.path("taken")).unwrap();
    let cases = [
        ("other", "out", "different architectures"),
        ("vocabulary", "out", "the vocabularies differ"),
        ("size", "out", "[2, 4], in a it has [2, 3]"),
        ("lacks", "out", "lacks 1 of the tensors of a, such as \"model.norm.weight\""),
        ("more", "out", "has 1 tensors that a does not have, such as \"extra\""),
        ("tied", "out", "different heads"),
        ("nan", "out", "holds NaN at index 0"),
        ("nan", "taken", "is not a run of cuvee"),
    ];
    for (model, output, part) in cases {
        w.fails(1, &format!("merge --method linear --model a=1 --model {model}=1 --output-dir {output}"), &[part]);
        assert!(!w.exists("out") && !w.exists("out.tmp") && w.names("taken").is_empty());
    }
    let plan = w.ok("merge --method linear --model a=1 --model nan=1 --dry-run");
    assert!(plan.stdout.is_empty() && plan.stderr.contains("24") || plan.stderr.contains("0.0 M"), "{}", plan.stderr);
}

#[test]
fn tied_heads_and_buffers_are_left_out_and_tokenizers_compared() {
    let w = Workspace::new();
    let config = json!({"model_type": "llama", "tie_word_embeddings": true});
    let names = [&NAMES[..], &["lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"]].concat();
    save(&w, "a", &config, &names, &[2, 3], 1.0);
    save(&w, "b", &config, &NAMES, &[2, 3], 3.0);
    let tokenizer = |id: u32, added: u32| {
        json!({"model": {"vocab": {"x": 0, "y": id}}, "added_tokens": [{"content": "<s>", "id": added}]}).to_string()
    };
    w.write("a/tokenizer.json", tokenizer(1, 2));
    w.write("b/tokenizer.json", tokenizer(1, 3));
    let line = "merge --method linear --model a=1 --model b=1 --output-dir out";
    let said = w.ok(line).stderr;
    assert!(said.contains("2 tensors are left out") && said.contains("added token \"<s>\" is number 3"), "{said}");
    let weights = Weights::open(&w.path("out")).unwrap();
    assert_eq!(weights.names().collect::<Vec<_>>(), NAMES);
    assert_eq!(w.text("out/tokenizer.json"), tokenizer(1, 2));
    w.write("b/tokenizer.json", tokenizer(2, 2));
    w.fails(1, line, &["b/tokenizer.json", "token \"y\" is number 2, in a it is number 1"]);
}

#[test]
fn neither_threads_nor_shards_change_a_bit() {
    let w = Workspace::new();
    let config = json!({"model_type": "llama"});
    for (name, scale) in [("base", 1.0), ("a", 1.5), ("b", -0.5)] {
        save(&w, name, &config, &NAMES, &[301, 211], scale);
    }
    for method in ["dare_ties", "della", "ties"] {
        let line =
            format!("merge --method {method} --base-model base --model a=1 --model b=1 --density 0.4 --output-dir");
        let run = |threads: &str, output: &str| {
            let mut command = w.command(&format!("{line} {method}{output}"));
            assert_eq!(crate::program::Running::new(command.env("RAYON_NUM_THREADS", threads)).wait().code, Some(0));
            w.read(&format!("{method}{output}/model.safetensors"))
        };
        assert!(run("1", "-one") == run("5", "-five"), "{method}");
    }
    let input = |name: &str| Input {
        model: w.path(name),
        settings: Settings::from([("weight".to_string(), Value::Number(1.0).into())]),
    };
    let recipe = || Recipe {
        method: merge::find("task_arithmetic").unwrap(),
        base: Some(w.path("base")),
        models: vec![input("a"), input("b")],
        settings: Settings::new(),
        dtype: None,
        layers: None,
    };
    let none = |_: usize, _: &str, _: usize, _: &mut [u32]| {};
    let merged = |max: u64, output: &str| {
        Merge::open(recipe()).unwrap().with_max_shard(max).run(&w.path(output), &none, |_| Ok(())).unwrap();
        NAMES.map(|name| read(&w.path(output), name))
    };
    let whole = merged(u64::MAX, "whole");
    assert!(whole == merged(600_000, "shards"));
    assert_eq!(w.names("shards").iter().filter(|name| name.ends_with(".safetensors")).count(), 2);
}

#[test]
fn memory_is_that_of_a_few_parts() {
    let w = Workspace::new();
    let config = json!({"model_type": "llama"});
    // One tensor of 96 MiB in f32.
    let (small, large) = ([8, 8], [6144, 4096]);
    for (name, shape) in [("small", &small), ("large", &large)] {
        for (of, scale) in [("base", 1.0), ("a", 1.1), ("b", 0.9)] {
            save(&w, &format!("{name}-{of}"), &config, &NAMES[..1], shape, scale);
        }
    }
    let peak = |name: &str| {
        let line = "--density 0.5 --dtype bf16 --output-dir";
        let models = format!("--base-model {name}-base --model {name}-a=1 --model {name}-b=1");
        w.spawn(&format!("merge --method ties {models} {line} {name}-out")).peak_memory()
    };
    let (small, large) = (peak("small"), peak("large"));
    assert!(large.saturating_sub(small) < 96 << 20, "{small} bytes for little tensors, {large} for large ones");
}

// ---- methods --------------------------------------------------------------------------------------------------------

fn values(entry: &Entry, models: usize, given: &[(&str, Value)]) -> merge::Values {
    let of = |name: &str, _| Ok(given.iter().find(|(given, _)| *given == name).map(|(_, value)| value.clone()));
    entry.resolve(models, of).unwrap()
}

fn run<T: merge::Real>(name: &str, shape: &[usize], base: &[T], models: &[&[T]], given: &[(&str, Value)]) -> Vec<T> {
    let entry = merge::find(name).unwrap();
    let tensor = Tensor {
        shape: shape.to_vec(),
        base: (entry.base == merge::Base::Required).then_some(&base as &dyn Source<T>),
        models: models.iter().map(|model| model as &dyn Source<T>).collect(),
    };
    // Words that depend on the element alone, and keep about half.
    let words = |model: usize, start: usize, out: &mut [u32]| {
        out.iter_mut()
            .enumerate()
            .for_each(|(i, word)| *word = ((start + i) as u32 + model as u32).wrapping_mul(0x9e37_79b9));
    };
    merge_tensor(entry, &tensor, &values(entry, models.len(), given), &words).unwrap()
}

/// Reproducible values around 0.
fn noise(seed: u64, len: usize) -> Vec<f64> {
    let random = cuvee::device::Philox::new(seed, 1);
    (0..len as u64).map(|i| random.normal(i)).collect()
}

#[test]
fn every_method_takes_every_shape_in_both_types() {
    let given: [(&str, Value); 3] = [("weight", 0.6.into()), ("density", 0.5.into()), ("t", 0.4.into())];
    for entry in merge::all() {
        for shape in
            [&[][..], &[1], &[0], &[0, 3], &[7], &[1, 5], &[5, 1], &[3, 4, 2], &[40_000], &[3, 20_001], &[700, 77]]
        {
            let len = shape.iter().product();
            let count = if entry.models.1 == 1 { 1 } else { 3 };
            let base = noise(1, len);
            let models: Vec<Vec<f64>> =
                (0..count).map(|i| base.iter().zip(noise(i + 2, len)).map(|(b, x)| b + 0.1 * x).collect()).collect();
            let double = run(entry.name, shape, &base, &models.iter().map(Vec::as_slice).collect::<Vec<_>>(), &given);
            let single = |values: &[f64]| values.iter().map(|x| *x as f32).collect::<Vec<f32>>();
            let models: Vec<Vec<f32>> = models.iter().map(|model| single(model)).collect();
            let models: Vec<&[f32]> = models.iter().map(Vec::as_slice).collect();
            let found = run(entry.name, shape, &single(&base), &models, &given);
            assert_eq!(found.len(), len);
            // A cut may fall on the other side of two magnitudes that f32 cannot tell apart.
            let far = double.iter().zip(&found).filter(|(a, b)| (**a - f64::from(**b)).abs() > 2e-5).count();
            assert!(far <= len / 5000 && found.iter().all(|x| x.is_finite()), "{} {shape:?}: {far}", entry.name);
        }
    }
}

#[test]
fn models_that_are_the_base_merge_to_the_base() {
    let base: Vec<f32> = noise(1, 1000).iter().map(|x| *x as f32).collect();
    for entry in merge::all() {
        let models: &[&[f32]] = if entry.models.1 == 1 { &[&base] } else { &[&base, &base] };
        let given = [("weight", 0.5.into()), ("density", 0.5.into()), ("t", 0.3.into())];
        let found = run(entry.name, &[10, 100], &base, models, &given);
        let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-6 * b.abs();
        assert!(found.iter().zip(&base).all(near), "{}", entry.name);
    }
}

/// Few distinct magnitudes, so that cuts fall on ties, over several parts.
#[test]
fn cuts_are_exact_and_ties_go_by_index() {
    let len = 50_000;
    let delta: Vec<f32> = noise(3, len).iter().map(|x| (x * 3.0).round() as f32).collect();
    let base = vec![0.0; len];
    let order = |largest: bool| {
        let mut order: Vec<usize> = (0..len).collect();
        order.sort_by(|a, b| {
            if largest {
                delta[*b].abs().total_cmp(&delta[*a].abs())
            } else {
                delta[*a].abs().total_cmp(&delta[*b].abs())
            }
        });
        order
    };
    let kept_of = |kept: &[usize]| {
        let mut out = vec![0.0; len];
        kept.iter().for_each(|i| out[*i] = delta[*i]);
        out
    };
    for density in [1e-9, 0.1, 0.33, 0.5, 0.9, 0.99999, 1.0] {
        let kept = ((density * len as f64) as usize).max(1);
        let found = run("ties", &[len], &base, &[&delta], &[("weight", 1.0.into()), ("density", density.into())]);
        assert!(found == kept_of(&order(true)[..kept]), "ties {density}");
        for gamma in [0.0, 0.01, 0.3] {
            let (kept, top) = ((density * len as f64) as usize, (gamma * len as f64) as usize);
            let small = len.saturating_sub(kept + top);
            let expected = if density < 1.0 { kept_of(&order(false)[small..small + kept]) } else { delta.clone() };
            let given = [("weight", 1.0.into()), ("density", density.into()), ("gamma", gamma.into())];
            let found = run("breadcrumbs", &[len], &base, &[&delta], &given);
            assert!(found == expected, "breadcrumbs {density} {gamma}");
        }
    }
}

#[test]
fn random_masks_keep_their_share() {
    let len = 200_000;
    let (base, delta) = (vec![0.0; len], vec![1.0; len]);
    for (method, rescale, scale) in
        [("dare_linear", "none", 1.0), ("dare_linear", "inverse_density", 1.0 / 0.3), ("dare_ties", "l1", 0.0)]
    {
        let given = [("weight", 1.0.into()), ("density", 0.3.into()), ("rescale", rescale.into())];
        let found = run(method, &[len], &base, &[&delta[..]], &given);
        let kept = found.iter().filter(|x| **x != 0.0).count() as f64;
        assert!((kept / len as f64 - 0.3).abs() < 0.005, "{method}");
        let expected: f64 = if scale == 0.0 { len as f64 / kept } else { scale };
        assert!(found.iter().all(|x: &f64| *x == 0.0 || (x - expected).abs() < 1e-9), "{method} {rescale}");
    }
}

#[test]
fn where_model_stock_has_no_answer_the_base_stays() {
    let (base, up, down) = ([1.0, 2.0], [2.0, 2.0], [0.0, 2.0]);
    assert_eq!(run("model_stock", &[2], &base[..], &[&up, &down], &[]), base);
    // At right angles nothing is known of the mean either; in one direction, everything.
    assert_eq!(run("model_stock", &[2], &base[..], &[&up, &[1.0, 3.0]], &[]), base);
    assert_eq!(run("model_stock", &[2], &base[..], &[&up, &[4.0, 2.0]], &[]), [3.0, 2.0]);
}
