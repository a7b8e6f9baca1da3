//! Adapters in PEFT's format: what PEFT wrote is read as PEFT means it, what is no plain LoRA is refused by name.

use std::fs;
use std::path::{Path, PathBuf};

use cuvee::checkpoint::json::{read_json, write_json};
use cuvee::checkpoint::peft::{self, AdapterConfig, AdapterFile, a_name, b_name};
use cuvee::checkpoint::{SaveDtype, TensorSource, Weights, save_safetensors};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Made by PEFT itself; make.py beside them says how.
pub fn fixture(name: &str) -> PathBuf {
    let root = std::env::var_os("CUVEE_TEST_ROOT").map_or(PathBuf::from("."), PathBuf::from);
    root.join("tests/data/peft").join(name)
}

/// A copy of an adapter whose config is changed.
fn changed(name: &str, change: impl FnOnce(&mut Value)) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in [peft::CONFIG, peft::WEIGHTS] {
        fs::copy(fixture(name).join(file), dir.path().join(file)).unwrap();
    }
    let path = dir.path().join(peft::CONFIG);
    let mut config = read_json(&path).unwrap();
    change(&mut config);
    write_json(&path, &config).unwrap();
    dir
}

fn error(dir: &Path) -> String {
    AdapterFile::open(dir).err().expect("this must not open").to_string()
}

/// `scaling * B A` in f64, `[outputs, inputs]`.
pub fn delta(adapter: &AdapterFile, module: &str) -> Vec<f64> {
    let (mut a, mut b) = (Vec::new(), Vec::new());
    let [rank, inputs] = adapter.read_a(module, &mut a).unwrap();
    let [outputs, _] = adapter.read_b(module, &mut b).unwrap();
    let mut out = vec![0.0; outputs * inputs];
    for (o, k, i) in (0..outputs).flat_map(|o| (0..rank).flat_map(move |k| (0..inputs).map(move |i| (o, k, i)))) {
        out[o * inputs + i] += adapter.scaling(module) * f64::from(b[o * rank + k]) * f64::from(a[k * inputs + i]);
    }
    out
}

#[test]
fn ranks_and_scalings_are_those_of_peft() {
    let expected = Weights::open_file(&fixture("deltas.safetensors")).unwrap();
    for name in ["a", "b", "c", "d"] {
        let adapter = AdapterFile::open(&fixture(name)).unwrap();
        let modules: Vec<_> = expected.names().filter_map(|n| n.strip_prefix(&format!("{name} "))).collect();
        assert_eq!(adapter.modules(), modules);
        for module in modules {
            let shape = adapter.shape(module);
            let mut theirs = vec![0.0; shape[0] * shape[1]];
            expected.read(&format!("{name} {module}"), &shape, &mut theirs).unwrap();
            for (ours, theirs) in delta(&adapter, module).iter().zip(&theirs) {
                assert!((ours - f64::from(*theirs)).abs() < 1e-6, "{name} {module}: {ours} {theirs}");
            }
        }
    }
    let a = AdapterFile::open(&fixture("a")).unwrap();
    let (early, late) = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj");
    assert_eq!((a.rank(early), a.rank(late), a.rank("model.layers.0.mlp.down_proj")), (2, 1, 3));
    assert_eq!((a.scaling(early), a.scaling(late), a.scaling("model.layers.0.mlp.down_proj")), (2.0, 4.0, 2.0));
    assert_eq!(a.config.base_model.as_deref(), Some("base"));
    let mut targets = a.config.target_modules.clone();
    targets.sort();
    assert_eq!(targets, ["down_proj", "q_proj", "v_proj"]);
    // A regular expression does not say what it fits; the file does.
    let b = AdapterFile::open(&fixture("b")).unwrap();
    assert_eq!(b.config.target_modules, b.modules());
    assert_eq!(b.scaling("model.layers.1.self_attn.o_proj"), 5.0 / 2.0);
}

#[test]
fn what_is_written_is_read_again() {
    let source = AdapterFile::open(&fixture("a")).unwrap();
    let modules = source.modules();
    let one = |name: String, shape: [usize; 2]| {
        let weights = &source.weights;
        let fill = {
            let name = name.clone();
            move |out: &mut [f32]| weights.read(&name, &shape, out)
        };
        TensorSource { name, shape: shape.to_vec(), fill: Box::new(fill) }
    };
    let tensors: Vec<TensorSource> = modules
        .iter()
        .flat_map(|module| {
            let ([outputs, inputs], rank) = (source.shape(module), source.rank(module));
            [one(a_name(module), [rank, inputs]), one(b_name(module), [outputs, rank])]
        })
        .collect();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("adapter");
    peft::write(&path, &source.config, &tensors).unwrap();
    let again = AdapterFile::open(&path).unwrap();
    assert_eq!((again.config.clone(), again.modules()), (source.config.clone(), modules));
    let hash = |adapter: &AdapterFile| {
        let mut hasher = blake3::Hasher::new();
        adapter.hash_into(&mut hasher);
        hasher.finalize()
    };
    assert_eq!(hash(&again), hash(&source));
    // The scaling is part of what an adapter does.
    let other = changed("a", |config| config["lora_alpha"] = json!(5));
    assert_ne!(hash(&AdapterFile::open(other.path()).unwrap()), hash(&source));
}

#[test]
fn variants_of_lora_are_refused_by_name() {
    let cases = [
        ("use_dora", json!(true), "DoRA"),
        ("lora_bias", json!(true), "B has a bias"),
        ("bias", json!("all"), "biases of the base"),
        ("modules_to_save", json!(["lm_head", "score"]), "[\"lm_head\",\"score\"]"),
        ("trainable_token_indices", json!([1, 2]), "rows of the embedding"),
        ("layer_replication", json!([[0, 2], [1, 3]]), "layers are repeated"),
        ("peft_type", json!("IA3"), "cuvee reads LORA"),
        ("init_lora_weights", json!("pissa_niter_16"), "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", json!("corda"), "changes the base's weights"),
        ("init_lora_weights", json!("olora"), "changes the base's weights"),
        ("init_lora_weights", json!("loftq"), "changes the base's weights"),
        ("use_novelty", json!(true), "which cuvee does not know"),
        ("r", json!(0), "expected a rank of 1 or more"),
        ("r", json!("2"), "expected a rank of 1 or more"),
        ("lora_alpha", json!(null), "expected a number"),
        ("rank_pattern", json!({"q_proj": -1}), "\"rank_pattern.q_proj\" is -1"),
        ("rank_pattern", json!([1]), "expected an object"),
        ("alpha_pattern", json!({"(": 1}), "the pattern \"(\" cannot be used"),
        ("rank_pattern", json!({"q_proj": 2}), "adapter_config.json says 2"),
        ("r", json!(5), "adapter_config.json says 5"),
    ];
    for (key, value, message) in cases {
        let dir = changed("a", |config| config[key] = value.clone());
        let error = error(dir.path());
        assert!(error.contains(message) && error.contains("adapter_"), "{key} {value}: {error}");
    }
    for (key, value) in
        [("init_lora_weights", json!("gaussian")), ("use_novelty", json!(false)), ("lora_dropout", json!(0.1))]
    {
        AdapterFile::open(changed("a", |config| config[key] = value).path()).unwrap();
    }
}

/// An adapter of rank 2 for a module `[3, 4]` whose file has these tensors.
fn damaged(tensors: &[(&str, &[usize], f32)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    write_json(&dir.path().join(peft::CONFIG), &json!({"peft_type": "LORA", "r": 2, "lora_alpha": 2})).unwrap();
    let source = |&(name, shape, value): &(&str, &[usize], f32)| TensorSource {
        name: name.into(),
        shape: shape.to_vec(),
        fill: Box::new(move |out| {
            out.fill(value);
            Ok(())
        }),
    };
    let sources: Vec<_> = tensors.iter().map(source).collect();
    save_safetensors(&dir.path().join(peft::WEIGHTS), &sources, SaveDtype::F32).unwrap();
    dir
}

#[test]
fn damaged_adapters_say_what_is_wrong() {
    let (a, b) = (a_name("m.q"), b_name("m.q"));
    let (a, b) = (a.as_str(), b.as_str());
    type Tensors<'a> = [(&'a str, &'a [usize], f32)];
    let cases: [(&Tensors, &str); 9] = [
        (&[(a, &[2, 4], 1.0)], "and no \"base_model.model.m.q.lora_B.weight\""),
        (&[(b, &[3, 2], 1.0)], "and no \"base_model.model.m.q.lora_A.weight\""),
        (&[(a, &[2, 4], 1.0), (b, &[3, 1], 1.0)], "has rank 2, \"base_model.model.m.q.lora_B.weight\" 1"),
        (&[(a, &[2, 4, 1], 1.0), (b, &[3, 2], 1.0)], "only linear modules"),
        (&[], "holds no tensor"),
        (&[("base_model.model.m.q.lora_magnitude_vector", &[3], 1.0)], "DoRA"),
        (&[("base_model.model.e.lora_embedding_A", &[2, 4], 1.0)], "an adapter of an embedding"),
        (&[("base_model.model.lm_head.weight", &[2, 4], 1.0)], "trained as a whole"),
        (&[("q.lora_A.weight", &[2, 4], 1.0)], "is not a name that PEFT gives"),
    ];
    for (tensors, message) in cases {
        let error = error(damaged(tensors).path());
        assert!(error.contains(message), "{error}");
    }
    let dir = damaged(&[(a, &[2, 4], f32::NAN), (b, &[3, 2], 1.0)]);
    let adapter = AdapterFile::open(dir.path()).unwrap();
    let error = adapter.read_a("m.q", &mut Vec::new()).unwrap_err().to_string();
    assert!(error.contains("holds NaN at index 0"), "{error}");
}

#[test]
fn what_is_no_adapter_says_what_it_is() {
    assert!(error(&fixture("base")).contains("is a whole model"));
    assert!(error(&fixture("absent")).contains("there is no such folder"));
    let dir = tempfile::tempdir().unwrap();
    assert!(error(dir.path()).contains("holds no adapter_config.json"));
    fs::copy(fixture("a").join(peft::CONFIG), dir.path().join(peft::CONFIG)).unwrap();
    assert!(error(dir.path()).contains("is the download complete?"));
    fs::write(dir.path().join("adapter_model.bin"), "").unwrap();
    assert!(error(dir.path()).contains("pickle"));
    fs::write(dir.path().join(peft::CONFIG), "[]").unwrap();
    fs::copy(fixture("a").join(peft::WEIGHTS), dir.path().join(peft::WEIGHTS)).unwrap();
    assert!(error(dir.path()).contains("is not a JSON object"));
    assert!(peft::is_adapter(&fixture("a")) && !peft::is_adapter(&fixture("base")));
}

/// Patterns fit the end of a name that follows a dot, as PEFT's do; the first counts.
#[test]
fn patterns_fit_as_in_peft() {
    let pattern = |p: &str, rank| (p.to_string(), rank);
    let config = AdapterConfig {
        lora_rank: 9,
        rank_pattern: vec![pattern("q", 1), pattern("^m\\.q_proj", 2), pattern("a|b.q_proj", 3), pattern("q_proj", 4)],
        ..AdapterConfig::default()
    };
    let found = ["m.q_proj", "x.m.q_proj", "x.b.q_proj", "a", "my_q_proj", "q"].map(|m| config.rank(m).unwrap());
    assert_eq!(found, [2, 4, 3, 3, 9, 1]);
}
