//! Where models come from: what cuvee writes says it, what others wrote is named by its hash.

use std::fs;

use cuvee::lineage::{Lineage, Parent, content_hash};
use serde_json::{Value, json};

use crate::program::Workspace;

const TRAIN: &str = "train --objective sigmoid --beta 0.1 --dataset train.jsonl --max-steps 2 --batch-size 4 \
    --learning-rate 5e-4 --max-length 40 --device cpu";

#[test]
fn a_trained_model_knows_its_parents() {
    let w = Workspace::with_reviews(12);
    w.copy_model("base");
    w.write("base/README.md", "---\nlicense: apache-2.0\n---\n");
    w.ok(&format!("{TRAIN} --model base --eval-dataset heldout.jsonl --save-steps 1 --output-dir first"));
    let lineage = w.json("first/cuvee_lineage.json");
    assert_eq!(lineage["command"], json!("train"));
    assert_eq!(lineage["version"], json!(env!("CARGO_PKG_VERSION")));
    assert_eq!(lineage["arguments"]["seed"], json!(42));
    assert_eq!(lineage["arguments"]["beta"], json!(0.1));
    assert_eq!(lineage["hash"], json!(content_hash(&w.path("first")).unwrap()));
    let parent = &lineage["parents"][0];
    assert_eq!(
        (&parent["role"], &parent["name"], &parent["license"]),
        (&json!("model"), &json!("base"), &json!("apache-2.0"))
    );
    assert_eq!(parent["hash"], json!(content_hash(&w.path("base")).unwrap()));
    assert_eq!(lineage["parents"].as_array().unwrap().len(), 1, "no reference was named");
    let data = &lineage["data"];
    assert_eq!(
        (&data[0]["role"], &data[0]["name"], &data[0]["rows"]),
        (&json!("dataset"), &json!("train.jsonl"), &json!(12))
    );
    assert_eq!(data[0]["hash"], json!(blake3::hash(&w.read("train.jsonl")).to_hex().to_string()));
    assert_eq!((&data[1]["role"], &data[1]["rows"]), (&json!("eval_dataset"), &json!(16)));
    // Nothing says where on this machine it was made.
    let here = w.path("").canonicalize().unwrap();
    assert!(!w.text("first/cuvee_lineage.json").contains(here.to_str().unwrap()));
    let checkpoint = w.json("first/checkpoint-1/cuvee_lineage.json");
    assert_eq!((&checkpoint["name"], &checkpoint["arguments"]["step"]), (&json!("checkpoint-1"), &json!(1)));
    assert_eq!(checkpoint["hash"], json!(content_hash(&w.path("first/checkpoint-1")).unwrap()));

    // The tree outlives the folders that it tells of.
    w.ok(&format!("{TRAIN} --model first --ref-model base --init checkpoint --output-dir second"));
    fs::remove_dir_all(w.path("first")).unwrap();
    let tree = w.ok("lineage second --verify").stdout;
    let lines: Vec<&str> = tree.lines().collect();
    let starts = [
        "second ",
        "  model first ",
        "    model base ",
        "    dataset train.jsonl ",
        "    eval_dataset heldout.jsonl ",
        "  ref base ",
        "  dataset train.jsonl ",
        "licences: apache-2.0 (base)",
        "the weights are those",
    ];
    assert_eq!(lines.len(), starts.len(), "{tree}");
    lines.iter().zip(starts).for_each(|(line, start)| assert!(line.starts_with(start), "{line:?} {start:?}"));
    assert!(
        lines[1].contains(": train, cuvee") && lines[1].contains("objective sigmoid") && lines[1].contains("seed 42")
    );
    let json: Value = serde_json::from_str(&w.ok("lineage second --json").stdout).unwrap();
    assert_eq!(json, w.json("second/cuvee_lineage.json"));
}

#[test]
fn a_model_whose_weights_were_drawn_has_a_config_for_parent() {
    let w = Workspace::with_reviews(12);
    w.ok(&format!("{TRAIN} --model model --init random --output-dir random"));
    assert_eq!(w.json("random/cuvee_lineage.json")["parents"][0]["role"], json!("config"));
}

#[test]
fn what_others_made_is_named_by_its_hash() {
    let w = Workspace::new();
    w.copy_model("other");
    w.write("other/LICENSE", "MIT License\n");
    let hash = content_hash(&w.path("other")).unwrap();
    let text = w.ok("lineage other").stdout;
    assert_eq!(text, format!("other {}, mit: not made by cuvee (no cuvee_lineage.json)\n", &hash[..12]));
    let known: Value = serde_json::from_str(&w.ok("lineage other --json").stdout).unwrap();
    assert_eq!(known, json!({"name": "other", "hash": hash, "license": "mit"}));
    w.fails(1, "lineage other --verify", &["nothing to compare its weights with"]);
    w.fails(1, "lineage absent", &["absent"]);
}

#[test]
fn weights_that_changed_since_are_seen() {
    let w = Workspace::new();
    for name in ["base", "made"] {
        w.copy_model(name);
    }
    let parent = Parent::open("base", &w.path("base")).unwrap().weighted(0.25);
    Lineage::of("merge").with_argument("method", "linear").with_parent(parent).write(&w.path("made")).unwrap();
    assert!(w.ok("lineage made --verify").stdout.contains("  base base "));
    assert!(w.ok("lineage made").stdout.contains(", weight 0.25"));
    let mut config = w.json("made/config.json");
    config["rope_theta"] = json!(5e5);
    w.write("made/config.json", config.to_string());
    let message = w.fails(1, "lineage made --verify", &["made: the weights are not those", "cuvee_lineage.json"]);
    assert!(message.contains("origin is not known"), "{message}");
    // Without --verify the file is believed; as a parent it is not.
    w.ok("lineage made");
    let child = Lineage::of("merge").with_parent(Parent::open("model", &w.path("made")).unwrap());
    assert!(child.tree().contains("ALTERED"), "{}", child.tree());
}

#[test]
fn several_licences_are_listed_together() {
    let w = Workspace::new();
    for (name, license) in [("a", "mit"), ("b", "llama3"), ("c", "mit"), ("d", "")] {
        w.copy_model(name);
        w.write(&format!("{name}/README.md"), format!("---\nlicense: {license}\n---\n"));
    }
    let parents = ["a", "b", "c", "d", "a"].map(|name| Parent::open("model", &w.path(name)).unwrap());
    let lineage = Lineage::of("merge").with_parents(parents);
    assert_eq!(lineage.tree().lines().last(), Some("licences: mit (a, c); llama3 (b)"));
}

#[test]
fn a_damaged_lineage_is_an_error() {
    let w = Workspace::new();
    w.copy_model("made");
    for (text, message) in [
        ("{\"format\": 1, ", "is not valid JSON"),
        ("{\"format\": 1}", "is damaged: missing field `command`"),
        ("{\"format\": 1, \"command\": \"train\", \"version\": \"1\", \"parents\": 3}", "is damaged: invalid type"),
        ("{}", "has no \"format\""),
        ("{\"format\": 2}", "a newer cuvee reads it"),
    ] {
        w.write("made/cuvee_lineage.json", text);
        w.fails(1, "lineage made", &["made/cuvee_lineage.json", message]);
    }
}

/// Shards, order and what stands beside the weights do not matter; names, shapes, values and the config do.
#[test]
fn a_hash_is_of_the_content() {
    let w = Workspace::new();
    w.copy_model("one");
    w.copy_model("two");
    let hash = |name: &str| content_hash(&w.path(name)).unwrap();
    w.write("two/notes.txt", "x");
    assert_eq!(hash("one"), hash("two"));
    let mut bytes = w.read("two/model.safetensors");
    *bytes.last_mut().unwrap() ^= 1;
    w.write("two/model.safetensors", bytes);
    assert_ne!(hash("one"), hash("two"));
    // An adapter's is of what it does.
    let a = crate::peft::fixture("a");
    assert_ne!(content_hash(&a).unwrap(), content_hash(&crate::peft::fixture("b")).unwrap());
}
