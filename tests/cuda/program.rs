//! The program on a GPU, as a user runs it: a model so small that the emulator trains it in seconds, from a folder with a
//! configuration and a tokenizer alone.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Map, Value, json};

use crate::{Body, Case, Mode};

/// The emulator, and a real GPU.
const MODES: &[Mode] = &[Mode::Plain, Mode::Real];
const TRAIN: &str = "train --objective sigmoid --beta 0.1 --learning-rate 1e-3 --model model --init random \
    --dataset pairs.jsonl --batch-size 2 --max-steps 4 --max-length 24 --no-shuffle";
/// Exact equality needs products that do not depend on the batch.
const GPU: &str = "--device cuda --batch-invariant";

struct Workspace(tempfile::TempDir);

impl Workspace {
    fn new() -> Self {
        let root = std::env::var_os("CUVEE_TEST_ROOT").map_or(PathBuf::from("."), PathBuf::from);
        let workspace = Self(tempfile::tempdir().unwrap());
        let model = workspace.path("model");
        fs::create_dir(&model).unwrap();
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            fs::copy(root.join("assets/review-llama-656k").join(file), model.join(file)).unwrap();
        }
        let config = json!({
            "model_type": "llama", "vocab_size": 2048, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": true,
            "initializer_range": 0.3, "eos_token_id": 0,
        });
        fs::write(model.join("config.json"), config.to_string()).unwrap();
        let pair = |i: usize| {
            let film = ["a quiet film", "the second part", "this story"][i % 3];
            json!({"prompt": format!("{film} is"), "chosen": " warm and good", "rejected": " too long"}).to_string()
        };
        fs::write(workspace.path("pairs.jsonl"), (0..8).map(pair).collect::<Vec<_>>().join("\n")).unwrap();
        workspace
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn run(&self, line: &str) -> Output {
        let mut command =
            Command::new(std::env::var_os("CUVEE_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_cuvee").into()));
        command.args(line.split_whitespace()).current_dir(self.0.path()).env("CUVEE_CACHE_DIR", self.path("cache"));
        command.output().unwrap()
    }

    /// Runs what must succeed; what it prints, and what it says.
    fn ok(&self, line: &str) -> [String; 2] {
        let Output { status, stdout, stderr } = self.run(line);
        let [stdout, stderr] = [stdout, stderr].map(|text| String::from_utf8(text).unwrap());
        assert!(status.success(), "{line}: {status}\n{stdout}\n{stderr}");
        [stdout, stderr]
    }

    /// Runs what must fail; its message.
    fn fails(&self, line: &str) -> String {
        let Output { status, stderr, .. } = self.run(line);
        let message = String::from_utf8(stderr).unwrap();
        assert!(!status.success(), "{line}\n{message}");
        message
    }

    fn lines(&self, name: &str) -> Vec<Map<String, Value>> {
        let text = fs::read_to_string(self.path(name)).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn column(&self, run: &str, key: &str) -> Vec<f64> {
        self.lines(&format!("{run}/metrics.jsonl")).iter().map(|line| line[key].as_f64().unwrap()).collect()
    }
}

/// Numbers within `share` of each other, or of 1 where they are smaller.
fn close(what: &str, a: &[f64], b: &[f64], share: f64) {
    assert_eq!(a.len(), b.len(), "{what}");
    let far = a.iter().zip(b).position(|(a, b)| (a - b).abs() > share * b.abs().max(1.0));
    assert_eq!(far, None, "{what}: {a:?} and {b:?}");
}

fn same_file(a: &Path, b: &Path) {
    assert!(fs::read(a).unwrap() == fs::read(b).unwrap(), "{} and {} differ", a.display(), b.display());
}

/// The same course on the CPU and on the GPU, in f32 to rounding of f32 and in bf16 to that of bf16. `auto` takes the GPU.
fn trains() {
    let w = Workspace::new();
    w.ok(&format!("{TRAIN} --device cpu --output-dir cpu"));
    for (dtype, share) in [("f32", 1e-4), ("bf16", 3e-2)] {
        let [_, said] =
            w.ok(&format!("{TRAIN} --batch-invariant --dtype {dtype} --output-dir {dtype} --profile-steps 2..3"));
        assert!(said.contains("computing on cuda:0, ") && said.contains(&format!("in {dtype}\n")), "{said}");
        for key in ["loss", "logps/chosen", "logps/rejected", "grad_norm"] {
            close(&format!("{dtype}: {key}"), &w.column(dtype, key), &w.column("cpu", key), share);
        }
        assert_eq!(w.column(dtype, "loss")[0], std::f64::consts::LN_2, "a policy that equals its reference");
    }
}

/// Stopped and resumed is the same to the last bit, masters included.
fn resumes() {
    let w = Workspace::new();
    for dtype in ["f32", "bf16"] {
        let line = |run: &str| format!("{TRAIN} {GPU} --dtype {dtype} --output-dir {dtype}-{run}");
        w.ok(&line("whole"));
        w.ok(&format!("{} --stop-at-step 2", line("halves")));
        w.ok(&format!("{} --resume-from-checkpoint auto", line("halves")));
        let [whole, halves] = ["whole", "halves"].map(|run| w.path(&format!("{dtype}-{run}/model.safetensors")));
        same_file(&whole, &halves);
        let losses = ["whole", "halves"].map(|run| w.column(&format!("{dtype}-{run}"), "loss"));
        assert_eq!(losses[0], losses[1]);
    }
}

/// What is trained is scored, measured and continued alike on both devices.
fn scores_and_generates() {
    let w = Workspace::new();
    w.ok(&format!("{TRAIN} --device cpu --output-dir trained"));
    let logps = |device: &str| -> Vec<f64> {
        w.ok(&format!("logps --model trained --dataset pairs.jsonl --out logps.jsonl --device {device}"));
        let line =
            |line: &Map<String, Value>| ["logps_chosen", "logps_rejected"].map(|key| line[key].as_f64().unwrap());
        w.lines("logps.jsonl").iter().flat_map(line).collect()
    };
    let cpu = logps("cpu");
    close("logps in f32", &logps("cuda"), &cpu, 1e-5);
    close("logps in bf16", &logps("cuda --dtype bf16"), &cpu, 2e-2);
    let eval = |device: &str| -> Vec<f64> {
        let [text, _] = w.ok(&format!("eval --model trained --dataset pairs.jsonl --json --device {device}"));
        let found: Value = serde_json::from_str(&text).unwrap();
        ["margin", "perplexity"].map(|key| found[key].as_f64().unwrap()).to_vec()
    };
    close("eval", &eval("cuda"), &eval("cpu"), 1e-4);
    let text = |device: &str| {
        let line = "generate --model trained --prompt film --max-new-tokens 6 --temperature 0";
        w.ok(&format!("{line} --device {device}"))[0].clone()
    };
    assert_eq!(text("cuda"), text("cpu"));
}

/// A plan knows what is free; a doctor looks; a GPU that is not there is named.
fn looks_around() {
    let w = Workspace::new();
    let plan = TRAIN.replace("train ", "plan ");
    let [text, _] = w.ok(&format!("{plan} --vram auto"));
    assert!(text.contains("fits in --vram ") && text.contains("peak of the GPU"), "{text}");
    let [text, _] = w.ok("doctor --json");
    let gpus = &serde_json::from_str::<Value>(&text).unwrap()["gpu"]["gpus"];
    assert!(gpus[0]["usable"] == true && gpus[0]["name"].is_string(), "{text}");
    let message = w.fails("generate --model model --prompt film --device cuda:99");
    assert!(message.contains("--device cuda:99: there is cuda:0 "), "{message}");
}

pub fn all() -> Vec<Case> {
    let cases: [(&str, fn()); 4] =
        [("train", trains), ("resume", resumes), ("score", scores_and_generates), ("look", looks_around)];
    let case = |(name, run)| Case {
        name: format!("program::{name}"),
        modes: MODES,
        bug: None,
        body: Body::Alone(Box::new(run)),
    };
    cases.into_iter().map(case).collect()
}
