//! What can be wrong with input, disk and numbers. Each case ends with an exit code and a message that names what
//! is wrong and what to do, never with a panic, and never at the cost of what was on disk.

use std::fs;
use std::os::unix::process::CommandExt;

use cuvee::checkpoint::{SaveDtype, TensorSource, Weights, save_safetensors};
use serde_json::{Value, json};

use crate::program::{Running, Workspace, results, reviews, root};

/// A short run; what it trains and where is to be added.
const SHORT: &str =
    "train --objective sigmoid --beta 0.1 --dataset train.jsonl --max-length 40 --batch-size 4 --max-steps 4";

fn workspace() -> Workspace {
    Workspace::with_reviews(12)
}

/// A workspace whose `bad` is a copy of the model with one file changed.
fn with_bad(file: &str, change: impl FnOnce(Vec<u8>) -> Option<Vec<u8>>) -> Workspace {
    let w = workspace();
    w.copy_model("bad");
    let name = format!("bad/{file}");
    match change(w.read(&name)) {
        Some(content) => w.write(&name, content),
        None => fs::remove_file(w.path(&name)).unwrap(),
    }
    w
}

fn with_bad_config(change: impl FnOnce(&mut Value)) -> Workspace {
    with_bad("config.json", |bytes| {
        let mut config: Value = serde_json::from_slice(&bytes).unwrap();
        change(&mut config);
        Some(config.to_string().into_bytes())
    })
}

/// A workspace whose `bad` has other weights: (name, shape, values), changed or dropped.
fn with_bad_weights(change: impl Fn(&str, &mut Vec<f32>) -> bool) -> Workspace {
    let w = workspace();
    w.copy_model("bad");
    let weights = Weights::open(&w.path("model")).unwrap();
    let mut tensors = Vec::new();
    for name in weights.names() {
        let shape = weights.shape(name).unwrap().to_vec();
        let mut values = vec![0.0; shape.iter().product()];
        weights.read(name, &shape, &mut values).unwrap();
        if change(name, &mut values) {
            let fill = Box::new(move |out: &mut [f32]| {
                out.copy_from_slice(&values);
                Ok(())
            });
            tensors.push(TensorSource { name: name.to_string(), shape, fill });
        }
    }
    save_safetensors(&w.path("bad/model.safetensors"), &tensors, SaveDtype::F32).unwrap();
    w
}

/// Every command that reads a model says the same about a bad one, and training leaves nothing behind.
fn every_command_refuses(w: &Workspace, parts: &[&str]) {
    for line in [
        format!("{SHORT} --model bad --output-dir run"),
        format!("{SHORT} --model model --ref-model bad --output-dir run-ref"),
        "logps --model bad --dataset train.jsonl --out logps.jsonl".into(),
        "eval --model bad --dataset train.jsonl".into(),
        "generate --model bad --prompt Review: --max-new-tokens 2".into(),
    ] {
        w.fails(1, &line, parts);
    }
    assert!(!w.exists("logps.jsonl"));
}

// ---- models ----------------------------------------------------------------------------------------------------

#[test]
fn weights_that_are_damaged() {
    type Change = fn(Vec<u8>) -> Option<Vec<u8>>;
    let cases: [(Change, &str); 7] = [
        (|_| Some(Vec::new()), "is empty; download or save it again"),
        (|mut b| Some(b.drain(..5).collect()), "is truncated to 5 bytes"),
        (|mut b| Some(b.drain(..100).collect()), "it is truncated or not a safetensors file"),
        (|mut b| Some(b.drain(..100_000).collect()), "download it again"),
        (|b| Some([b, vec![0; 10]].concat()), "has 10 bytes behind its last tensor"),
        (|mut b| Some(b.splice(9..20, *b"not a json!").collect::<Vec<_>>()).map(|_| b), "has a bad header"),
        (|_| None, "holds neither model.safetensors nor model.safetensors.index.json"),
    ];
    for (change, part) in cases {
        let file = if part.starts_with("holds") { "bad: " } else { "bad/model.safetensors: " };
        every_command_refuses(&with_bad("model.safetensors", change), &[file, part]);
    }
}

#[test]
fn configs_that_do_not_fit_the_weights() {
    let cases: [(&str, Value, &[&str]); 6] = [
        (
            "hidden_size",
            json!(64),
            &["bad/model.safetensors: ", "has shape [2048, 128]", "the config implies [2048, 64]"],
        ),
        ("num_hidden_layers", json!(1), &["\"model.layers.1.", "has no place in the model that config.json describes"]),
        ("num_hidden_layers", json!(3), &["has no tensor \"model.layers.2.", "is this the right config.json?"]),
        ("vocab_size", json!(4096), &["has shape [2048, 128]", "the config implies [4096, 128]"]),
        ("tie_word_embeddings", json!(false), &["has no tensor \"lm_head.weight\""]),
        ("num_key_value_heads", json!(8), &["k_proj.weight\" has shape [64, 128]", "implies [128, 128]"]),
    ];
    for (key, value, parts) in cases {
        every_command_refuses(&with_bad_config(|config| config[key] = value), parts);
    }
}

#[test]
fn configs_that_are_not_supported() {
    let cases: [(&str, Value, &[&str]); 7] = [
        ("model_type", json!("mamba"), &["\"model_type\": \"mamba\" is not supported; llama, mistral, qwen2, qwen3"]),
        ("model_type", json!(null), &["\"model_type\": the key is missing"]),
        ("attn_logit_softcapping", json!(50.0), &["\"attn_logit_softcapping\""]),
        ("hidden_act", json!("gelu"), &["\"hidden_act\": \"gelu\" is not supported, only \"silu\""]),
        ("rope_parameters", json!({"rope_type": "yarn", "factor": 4.0}), &["rope_type \"yarn\" is not supported"]),
        (
            "hidden_size",
            json!("wide"),
            &["\"hidden_size\": expected a positive whole number up to 16777216, found \"wide\""],
        ),
        (
            "num_hidden_layers",
            json!(0),
            &["\"num_hidden_layers\": expected a positive whole number up to 16777216, found 0"],
        ),
    ];
    for (key, value, parts) in cases {
        let parts: Vec<&str> = ["bad/config.json: "].iter().chain(parts).copied().collect();
        every_command_refuses(&with_bad_config(|config| config[key] = value), &parts);
    }
}

#[test]
fn files_that_are_missing_or_no_json() {
    every_command_refuses(&with_bad("config.json", |_| None), &["bad/config.json: "]);
    every_command_refuses(&with_bad("config.json", |_| Some(b"{".to_vec())), &["bad/config.json: ", "JSON"]);
    every_command_refuses(
        &with_bad("config.json", |_| Some(b"[]".to_vec())),
        &["bad/config.json: ", "not a JSON object"],
    );
    let w = workspace();
    every_command_refuses(&w, &["bad"]);

    // A reference is read in the tokens of the policy.
    for (content, part) in [(None, "needs the tokenizer.json"), (Some(b"{}".to_vec()), "is no tokenizer")] {
        let w = with_bad("tokenizer.json", |_| content);
        for line in [
            format!("{SHORT} --model bad --output-dir run"),
            "logps --model bad --dataset train.jsonl --out logps.jsonl".into(),
            "generate --model bad --prompt Review:".into(),
        ] {
            w.fails(1, &line, &["bad/tokenizer.json: ", part]);
        }
    }
}

#[test]
fn a_tensor_is_missing_or_not_finite() {
    let norm = "model.layers.1.input_layernorm.weight";
    every_command_refuses(&with_bad_weights(|name, _| name != norm), &["has no tensor", norm, "the nearest name is"]);
    for (value, text) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf")] {
        let w = with_bad_weights(|name, values| {
            if name == norm {
                values[3] = value;
            }
            true
        });
        every_command_refuses(&w, &[&format!("{norm:?} holds {text} at index 3"), "get another copy"]);
    }
}

/// Finite weights, but what is computed with them is not.
#[test]
fn numbers_that_overflow() {
    let w = with_bad_weights(|name, values| {
        if name.contains(".mlp.") {
            values.iter_mut().for_each(|x| *x = 1e16_f32.copysign(*x));
        }
        true
    });
    let message = w.fails(1, "logps --model bad --dataset train.jsonl --out logps.jsonl", &["bad", "finite"]);
    assert!(message.contains("row 0"), "{message}");
    assert!(!w.exists("logps.jsonl"));
    w.fails(1, "eval --model bad --dataset train.jsonl --json", &["bad", "finite"]);
    w.fails(1, "generate --model bad --prompt Review:", &["are the weights sound?"]);
    w.fails(1, &format!("{SHORT} --model bad --output-dir run"), &["bad", "finite"]);
    let sft = "train --objective sft --dataset train.jsonl --batch-size 4 --max-steps 4 --model bad --output-dir sft";
    let message = w.fails(1, sft, &["step 1: ", "rows ", "first bad tensor: the hidden states after layer 0"]);
    assert!(message.contains("--learning-rate"), "{message}");
    let with_eval = format!("{sft}-eval --eval-dataset heldout.jsonl");
    w.fails(
        1,
        &with_eval,
        &[
            "step 0: a held-out log-probability",
            "are the weights sound?",
            "first bad tensor: the hidden states after layer 0",
        ],
    );
}

#[test]
fn a_tokenizer_with_more_tokens_than_the_model() {
    let w = with_bad("tokenizer.json", |bytes| {
        let mut tokenizer: Value = serde_json::from_slice(&bytes).unwrap();
        let extra = json!({"id": 2048, "content": "<extra>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true});
        tokenizer["added_tokens"].as_array_mut().unwrap().push(extra);
        Some(tokenizer.to_string().into_bytes())
    });
    // What is never used does no harm.
    w.ok(&format!("{SHORT} --model bad --output-dir run"));
    w.write("train.jsonl", r#"{"prompt": "Review:", "chosen": " fine", "rejected": " bad <extra>"}"#);
    let parts = ["bad: token 2048", "vocabulary of 2048", "do tokenizer.json and config.json belong together?"];
    w.fails(1, &format!("{SHORT} --model bad --output-dir run-2"), &parts);
    w.fails(1, "logps --model bad --dataset train.jsonl --out logps.jsonl", &parts);
    w.fails(1, "eval --model bad --dataset train.jsonl", &parts);
    w.fails(1, "generate --model bad --prompt <extra>", &["--prompt: token 2048", parts[1], parts[2]]);
    assert!(!w.exists("run-2") && !w.exists("logps.jsonl"));
}

// ---- data ------------------------------------------------------------------------------------------------------

#[test]
fn data_that_cannot_be_read() {
    let w = workspace();
    let good = r#"{"prompt": "Review:", "chosen": " fine", "rejected": " bad"}"#;
    let gzip = fs::read(root().join("assets/film-reviews/heldout.jsonl.gz")).unwrap();
    let mut damaged = gzip.clone();
    damaged[gzip.len() / 2] ^= 0xff;
    let cases: [(&str, Vec<u8>, &[&str]); 11] = [
        ("empty", vec![], &["has no rows"]),
        ("blank", b"\n\n".to_vec(), &["has no rows"]),
        ("column", br#"{"prompt": "a", "chosen": "b"}"#.to_vec(), &["line 1", "[prompt, chosen]", "rejected"]),
        (
            "later",
            format!("{good}\n\n{{\"prompt\": \"a\", \"chosen\": \"b\"}}\n").into(),
            &["line 3", "\"rejected\" is missing"],
        ),
        ("json", format!("{good}\n{{\"prompt\": \n").into(), &["line 2", "invalid JSON at column"]),
        ("list", format!("{good}\n[1]\n").into(), &["line 2", "expected a JSON object"]),
        (
            "type",
            br#"{"prompt": 3, "chosen": "b", "rejected": "c"}"#.to_vec(),
            &["line 1", "\"prompt\"", "expected a string"],
        ),
        ("mixed", format!("{good}\n{{\"text\": \"a\"}}\n").into(), &["line 2", "keep them in separate files"]),
        ("utf8", [good.as_bytes(), b"\n\xff\n"].concat(), &["line 2", "invalid UTF-8"]),
        ("truncated", gzip[..gzip.len() / 2].to_vec(), &["the gzip data ends early", "download the file again"]),
        ("damaged", damaged, &["the gzip data"]),
    ];
    for (name, content, parts) in cases {
        w.write(name, content);
        let parts: Vec<&str> = [name].iter().chain(parts).copied().collect();
        let train = format!("{SHORT} --model model --output-dir run").replace("train.jsonl", name);
        w.fails(1, &train, &parts);
        w.fails(1, &format!("logps --model model --dataset {name} --out logps.jsonl"), &parts);
        w.fails(1, &format!("eval --model model --dataset {name}"), &parts);
        w.fails(1, &format!("{SHORT} --model model --output-dir run --eval-dataset {name}"), &parts);
        assert!(!w.exists("run"), "{name}: the output folder was made before the data was read");
    }
    w.fails(1, &format!("{SHORT} --model model --output-dir run --eval-dataset none"), &["none", "cannot be read"]);
}

#[test]
fn rows_that_cannot_be_trained_on_are_counted() {
    let w = workspace();
    let mut rows = reviews("train")[..6].to_vec();
    rows[1]["chosen"] = json!("");
    rows[3]["rejected"] = json!("");
    rows[4]["prompt"] = json!("");
    w.write_lines("train.jsonl", &rows);
    let line = SHORT.replace("--max-length 40", "--max-length 300");
    let counted = w.ok(&format!("{line} --model model --output-dir run"));
    for part in ["3 of 6 rows dropped", "2 empty completion (first at line 2)", "1 empty prompt (", "first at line 5"] {
        assert!(counted.stderr.contains(part), "{part}: {}", counted.stderr);
    }
    rows.retain(|row| row["chosen"] == json!("") || row["rejected"] == json!(""));
    w.write_lines("train.jsonl", &rows);
    let parts = ["train.jsonl: ", "no row is left: 2 of 2 rows dropped: 2 empty completion"];
    w.fails(1, &format!("{SHORT} --model model --output-dir run-2"), &parts);
    w.fails(1, &format!("{SHORT} --model model --output-dir run-2").replace("sigmoid --beta 0.1", "sft"), &parts);

    w.fails(1, "eval --model model --dataset train.jsonl", &parts);
    w.ok("logps --model model --dataset train.jsonl --out logps.jsonl");
    assert_eq!(w.text("logps.jsonl").matches("\"skipped\":\"empty completion\"").count(), 2);

    w.write("train.jsonl", "{\"text\": \"a text\"}\n");
    w.fails(
        1,
        &format!("{SHORT} --model model --output-dir run-2"),
        &["sigmoid trains on pairs", "these rows are text"],
    );
    assert!(!w.exists("run-2"));
}

#[test]
fn rows_that_are_too_long() {
    let w = workspace();
    let lengths = w.ok("logps --model model --dataset train.jsonl --out logps.jsonl");
    assert_eq!(lengths.stderr, "");
    let tokens = |key: &str| w.column("logps.jsonl", key);
    let longer = |limit: f64| {
        // Four tokens of prompt and three of it before the completion, or so: ask the lengths, not the text.
        tokens("tokens_chosen").iter().zip(tokens("tokens_rejected")).filter(|(c, r)| c.max(*r) > limit).count()
    };
    let train = |what: &str, length: usize| {
        let line = SHORT.replace("--max-length 40", &format!("--max-length {length}"));
        format!("{line} --model model --on-overflow {what} --output-dir {what}-{length}")
    };
    let prompt = prompt_tokens(&w);
    let cut = longer((30 - prompt) as f64);
    assert!(cut > 0 && cut < 12);
    let dropped = w.ok(&train("drop", 30)).stderr;
    assert!(
        dropped.contains(&format!("{cut} of 12 rows dropped: {cut} too long (more than 30 tokens; see --max-length")),
        "{dropped}"
    );
    let truncated = w.ok(&train("truncate", 30)).stderr;
    assert!(truncated.contains(&format!("{cut} of 12 rows cut to their first 30 tokens")), "{truncated}");
    assert!(w.json("truncate-30/trainer_state.json")["num_input_tokens_seen"].as_u64() > Some(0));
    w.fails(
        1,
        &train("error", 30),
        &["train.jsonl, line ", "more than --max-length 30", "--on-overflow drop or truncate"],
    );
    assert!(!w.exists("error-30"));
    w.ok(&train("error", 300));
    w.fails(1, &train("drop", 3), &["no row is left: 12 of 12 rows dropped: 12 too long"]);
    w.fails(1, &train("truncate", prompt), &["no row is left", "12 prompt fills max length"]);
    w.fails(2, &train("drop", 1), &["--max-length", "a whole number of 2 or more"]);
}

/// Tokens of the prompt that all reviews share.
fn prompt_tokens(w: &Workspace) -> usize {
    let tokenizer = cuvee::data::Tokenizer::load(&w.path("model")).unwrap();
    let row = &w.lines("train.jsonl")[0];
    let ids = |text: String| tokenizer.encode(&text).unwrap().len();
    let prompt = row["prompt"].as_str().unwrap();
    let whole = ids(format!("{prompt}{}", row["chosen"].as_str().unwrap()));
    whole + 1 - w.column("logps.jsonl", "tokens_chosen")[0] as usize
}

// ---- flags and recipes -----------------------------------------------------------------------------------------

#[test]
fn flags_and_recipes_that_are_wrong() {
    let w = workspace();
    let recipe = "objective = 'sigmoid'\nmodel = 'model'\ndataset = 'train.jsonl'\noutput_dir = 'run'\n";
    w.write("recipe.toml", format!("{recipe}beta = 0.1\nlerning_rate = 1e-4\n"));
    w.write("table.toml", format!("{recipe}[beta]\n"));
    let run = "--model model --output-dir run";
    let no_beta = SHORT.replace("--beta 0.1 ", "");
    for (code, line, parts) in [
        (2, "train recipe.toml".into(), &["recipe.toml: ", "\"lerning_rate\"", "did you mean \"learning_rate\"?"][..]),
        (2, "train table.toml".into(), &["table.toml: ", "beta"]),
        (2, "train none.toml".into(), &["none.toml: no such recipe"]),
        (2, format!("{SHORT} {run} --lerning-rate 1"), &["--lerning-rate", "'--learning-rate'"]),
        (2, format!("{SHORT} {run} --max-steps 5"), &["--max-steps"]),
        (2, format!("{SHORT} {run} --learning-rate -1"), &["--learning-rate", "a number above 0"]),
        (2, format!("{SHORT} {run} --eval-steps 2"), &["--eval-steps: does nothing without --eval-dataset"]),
        (2, format!("{SHORT} --output-dir run"), &["--model: missing"]),
        (2, "list losses".into(), &["objectives, modifiers, optimizers, merges, rewards, architectures"]),
        (2, "tran".into(), &["'train'"]),
        (1, format!("{no_beta} {run}"), &["--beta: sigmoid requires it", "for example `--beta 0.1`"]),
        (1, format!("{SHORT} {run}").replace("sigmoid", "sft"), &["--beta", "sft"]),
        (1, format!("{SHORT} {run}").replace("sigmoid", "sigmoyd"), &["sigmoyd", "sigmoid"]),
        (1, format!("{SHORT} {run} --optimizer adam"), &["adam", "adamw"]),
        (
            1,
            format!("{SHORT} {run} --label-smoothing 0.1").replace("sigmoid", "hinge"),
            &["--label-smoothing", "hinge"],
        ),
        (
            2,
            format!("{SHORT} {run} --ref-model model --ref-model model --ref-weights 0.5,0.4"),
            &["expected numbers that sum to 1, these sum to 0.9"],
        ),
        (
            1,
            format!("{no_beta} {run} --ref-model model").replace("sigmoid", "sft"),
            &["--ref-model: 1 given, but sft uses 0"],
        ),
    ] {
        w.fails(code, &line, parts);
        if line.starts_with("train") {
            w.fails(code, &line.replacen("train", "plan", 1), parts);
        }
    }
    assert!(!w.exists("run") && !w.exists("cache"));
}

// ---- output folders --------------------------------------------------------------------------------------------

#[test]
fn output_folders_of_others_are_left_alone() {
    let w = workspace();
    let line = format!("{SHORT} --model model --output-dir");
    fs::create_dir(w.path("empty")).unwrap();
    fs::create_dir(w.path("thesis")).unwrap();
    w.write("thesis/chapter.tex", "words");
    for name in ["empty", "thesis"] {
        for resume in ["", " --resume-from-checkpoint auto"] {
            let parts = [&format!("{name}: "), "not a run of cuvee", "choose another --output-dir"];
            w.fails(1, &format!("{line} {name}{resume}"), &parts);
        }
    }
    assert_eq!((w.names("empty").len(), w.text("thesis/chapter.tex").as_str()), (0, "words"));
    w.fails(1, &format!("{line} thesis/chapter.tex"), &["thesis/chapter.tex: is a file"]);
    w.fails(1, &format!("{line} thesis/chapter.tex/run"), &["thesis/chapter.tex/run", "choose another --output-dir"]);
    w.fails(
        1,
        "logps --model model --dataset train.jsonl --out thesis/chapter.tex/out.jsonl",
        &["out.jsonl", "could not be written"],
    );
    w.fails(
        1,
        "logps --model model --dataset train.jsonl --out none/out.jsonl",
        &["none/out.jsonl", "does its folder exist?"],
    );
    let no_cache = format!("{line} run --cache-dir thesis/chapter.tex/cache");
    w.fails(1, &no_cache, &["thesis/chapter.tex/cache"]);
}

#[test]
fn finished_runs_make_room_and_unfinished_ones_do_not() {
    let w = workspace();
    let line = format!("{SHORT} --model model --output-dir run");
    w.ok(&line);
    let first = results(&w.path("run"));
    let moved = w.ok(&line);
    assert!(moved.stderr.contains("run: the finished run there is now run.1"), "{}", moved.stderr);
    assert!(results(&w.path("run.1")) == first);
    assert!(w.ok(&line).stderr.contains("is now run.2"));

    w.ok(&format!("{SHORT} --model model --output-dir part --stop-at-step 2"));
    let before = results(&w.path("part"));
    let parts = ["part: holds an unfinished run", "--resume-from-checkpoint auto"];
    w.fails(1, &format!("{SHORT} --model model --output-dir part"), &parts);
    assert!(results(&w.path("part")) == before && !w.exists("part.1"));
}

/// A run must not move away what it is about to read.
#[test]
fn an_output_folder_that_holds_the_input_is_refused() {
    let w = workspace();
    w.ok(&format!("{SHORT} --model model --output-dir run"));
    let line = format!("{SHORT} --output-dir run");
    w.fails(1, &format!("{line} --model run"), &["--output-dir: run ", "--model"]);
    w.fails(1, &format!("{line} --model run/checkpoint-4"), &["run/checkpoint-4"]);
    w.fails(1, &format!("{line} --model model --ref-model ./run"), &["--output-dir: run ", "--ref-model"]);
    w.write("run/train.jsonl", w.read("train.jsonl"));
    let data = format!("{line} --model model").replace("train.jsonl", "run/train.jsonl");
    w.fails(1, &data, &["--output-dir: run ", "--dataset"]);
    assert!(!w.exists("run.1"));
    w.ok(&format!("{SHORT} --output-dir second --model run"));
}

// ---- checkpoints and caches ------------------------------------------------------------------------------------

#[test]
fn checkpoints_that_cannot_be_continued() {
    let w = workspace();
    let line = format!("{SHORT} --model model --output-dir run");
    w.ok(&format!("{line} --save-steps 1 --stop-at-step 2"));
    let auto = format!("{line} --resume-from-checkpoint auto");
    let at = |dir: &str| format!("{line} --resume-from-checkpoint {dir}");

    w.fails(
        1,
        &auto.replace("--beta 0.1", "--beta 0.2"),
        &["--beta: ", "made with 0.1, this run has 0.2", "checkpoint-2"],
    );
    w.fails(1, &format!("{auto} --seed 7"), &["--seed: ", "42", "7"]);
    w.fails(1, &format!("{auto} --learning-rate 1e-3"), &["--learning-rate: "]);
    w.fails(1, &auto.replace("sigmoid", "hinge"), &["--objective: ", "sigmoid", "hinge"]);
    w.fails(1, &at("model"), &["model: holds no cuvee_state.json", "takes a checkpoint-N folder"]);
    w.fails(1, &at("none"), &["none: "]);
    let rows = w.read("train.jsonl");
    w.write_lines("train.jsonl", &reviews("train")[1..13]);
    w.fails(1, &auto, &["--dataset: "]);
    w.write("train.jsonl", rows);

    for (file, part) in [
        ("optimizer.safetensors", "is truncated"),
        ("model.safetensors", "is truncated"),
        ("cuvee_state.json", "is not valid JSON"),
    ] {
        let name = format!("run/checkpoint-2/{file}");
        let whole = w.read(&name);
        w.write(&name, &whole[..whole.len() / 2]);
        w.fails(1, &auto, &[&name, part, "delete run/checkpoint-2 to go on from run/checkpoint-1"]);
        w.fails(1, &at("run/checkpoint-2"), &[&name, part]);
        w.write(&name, whole);
    }
    // After all that the run is as it was.
    w.ok(&auto);
    assert_eq!(w.column("run/metrics.jsonl", "step"), [1.0, 2.0, 3.0, 4.0]);
}

#[test]
fn caches_that_are_damaged() {
    let w = workspace();
    let train = |name: &str| w.run(&format!("{SHORT} --model model --output-dir {name}"));
    assert_eq!(train("run").code, Some(0));
    let expected = w.text("run/metrics.jsonl").lines().count();
    let cache = w.cache_file().unwrap();
    let whole = fs::read(&cache).unwrap();
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 1;
    for (what, content) in
        [("flipped", &flipped[..]), ("cut", &whole[..whole.len() - 7]), ("torn-header", &whole[..30])]
    {
        fs::write(&cache, content).unwrap();
        let finished = train(what);
        assert_eq!(finished.code, Some(0), "{what}: {}", finished.stderr);
        let told = finished.stderr.contains("were damaged") && finished.stderr.contains("are scored again");
        assert!(told || what == "torn-header", "{what}: {}", finished.stderr);
        assert!(fs::read(&cache).unwrap() == whole, "{what}: not what it was");
        assert_eq!(w.lines(&format!("{what}/metrics.jsonl")).len(), expected);
        assert_eq!(w.column(&format!("{what}/metrics.jsonl"), "loss"), w.column("run/metrics.jsonl", "loss"), "{what}");
    }
    fs::write(&cache, vec![b'x'; 500]).unwrap();
    let parts = ["is not a log-prob cache", "delete it"];
    w.fails(1, &format!("{SHORT} --model model --output-dir other"), &parts);
}

// ---- numbers and disks that fail while training ----------------------------------------------------------------

#[test]
fn a_run_that_diverges_stops_and_keeps_its_last_good_state() {
    let w = workspace();
    let run = |rate: &str| {
        let line = SHORT.replace("--max-steps 4", "--max-steps 6 --lr-scheduler-type constant");
        format!("{line} --learning-rate {rate} --max-grad-norm 0 --model model --output-dir run-{rate}")
    };
    // Weights of 1e15 make attention scores overflow; weights of 1e30 make norms so large that all that is left is
    // uniform, and only gradients show it.
    for (rate, parts) in [
        ("1e15", ["a log-probability is not finite; rows ", "first bad tensor: the hidden states after layer 0"]),
        ("1e30", ["the gradient is not finite", "first bad tensor: the gradient of model.embed_tokens.weight"]),
    ] {
        let (line, folder) = (run(rate), format!("run-{rate}"));
        let message = w.fails(1, &line, &parts);
        assert!(message.starts_with("step 2: ") && message.contains("a lower --learning-rate"), "{message}");
        assert!(message.contains(&format!("the state before this step is in {folder}/checkpoint-1")), "{message}");
        assert_eq!(w.column(&format!("{folder}/metrics.jsonl"), "step"), [1.0]);
        assert!(w.exists(&format!("{folder}/checkpoint-1/optimizer.safetensors")));
        assert!(!w.exists(&format!("{folder}/model.safetensors")));
        assert_eq!(w.json(&format!("{folder}/checkpoint-1/trainer_state.json"))["global_step"], json!(1));
        w.fails(1, &format!("{line} --resume-from-checkpoint auto"), &["step 2: "]);
    }
    // The last update breaks the model: no step follows to find it, but the held-out rows do.
    let last = run("1e15").replace("--max-steps 6", "--max-steps 1").replace("run-1e15", "last");
    let parts = ["step 1: a held-out log-probability is not finite", "first bad tensor: ", "a lower --learning-rate"];
    w.fails(1, &format!("{last} --eval-dataset heldout.jsonl"), &parts);
    assert!(!w.exists("last/model.safetensors"));
}

/// A disk that is full: no file may grow beyond `bytes`.
fn with_file_limit(w: &Workspace, line: &str, bytes: u64) -> Running {
    let mut command = w.command(line);
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: bytes };
    // SAFETY: both calls are async-signal-safe, as what runs between fork and exec must be.
    unsafe {
        command.pre_exec(move || {
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
            match libc::setrlimit(libc::RLIMIT_FSIZE, &limit) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        });
    }
    Running::new(&mut command)
}

#[test]
fn a_disk_that_is_full() {
    let w = workspace();
    let line = format!("{SHORT} --model model --save-steps 2 --output-dir");
    w.ok(&format!("{line} run --stop-at-step 2"));
    let before = results(&w.path("run"));
    let model_bytes = before["checkpoint-2/model.safetensors"].len() as u64;
    // Enough for the model, not for the optimizer's moments; for neither; not even for the cache.
    for (bytes, file) in [(model_bytes + 1000, "optimizer.safetensors"), (model_bytes / 2, "model.safetensors")] {
        let failed = with_file_limit(&w, &format!("{line} run --resume-from-checkpoint auto"), bytes).wait();
        assert_eq!(failed.code, Some(1), "{}", failed.stderr);
        let message = failed.error();
        assert!(message.contains(file) && message.contains("could not be written"), "{message}");
        assert!(message.contains("what was on disk before is intact"), "{message}");
        let after = results(&w.path("run"));
        assert!(
            after.keys().all(|name| !name.contains("checkpoint-4") && !name.contains(".tmp")),
            "{:?}",
            after.keys()
        );
        for (name, content) in before.iter().filter(|(name, _)| name.starts_with("checkpoint-2/")) {
            assert!(after[name] == *content, "{name}");
        }
    }
    fs::remove_dir_all(w.path("cache")).unwrap();
    let failed = with_file_limit(&w, &format!("{line} other"), 1000).wait();
    assert_eq!(failed.code, Some(1), "{}", failed.stderr);
    assert!(failed.error().contains("could not be written"), "{}", failed.stderr);

    // With room again it goes on as if nothing had been.
    w.ok(&format!("{line} run --resume-from-checkpoint auto"));
    w.ok(&format!("{line} whole"));
    crate::program::assert_same("after a full disk", &results(&w.path("whole")), &results(&w.path("run")));
}

#[test]
fn a_resume_with_other_settings_is_refused() {
    let w = workspace();
    let run = format!("{SHORT} --model model --output-dir run --label-smoothing 0.2");
    w.ok(&format!("{run} --stop-at-step 2"));
    let auto = "--resume-from-checkpoint auto";
    let dropped = run.replace(" --label-smoothing 0.2", "");
    w.fails(1, &format!("{dropped} {auto}"), &["--label-smoothing: ", "made with 0.2, this run has 0.0"]);
    w.fails(1, &format!("{run} {auto} --micro-batch-tokens 64"), &["--micro-batch-tokens: ", "made with 2048"]);
    w.fails(1, &format!("{run} {auto} --seed 1"), &["--seed: ", "made with 42, this run has 1"]);
    w.ok(&format!("{run} {auto} --threads 1"));
}

#[test]
fn going_back_sets_later_checkpoints_aside() {
    let w = workspace();
    let run = format!("{SHORT} --model model --output-dir run --save-steps 1");
    w.ok(&format!("{run} --stop-at-step 3"));
    let back = w.ok(&format!("{run} --resume-from-checkpoint run/checkpoint-1 --stop-at-step 2"));
    assert!(back.stderr.contains("a later checkpoint of the course that is left is now"), "{}", back.stderr);
    assert!(w.exists("run/checkpoint-2") && w.exists("run/checkpoint-3.left.1") && !w.exists("run/checkpoint-3"));
    w.ok(&format!("{run} --resume-from-checkpoint auto"));
    assert_eq!(w.column("run/metrics.jsonl", "step"), [1.0, 2.0, 3.0, 4.0]);
}

#[test]
fn one_run_at_a_time_works_in_a_folder() {
    let w = workspace();
    let run = format!("{SHORT} --model model --output-dir run");
    w.ok(&format!("{run} --stop-at-step 2"));
    let held = fs::File::open(w.path("run/cuvee.lock")).unwrap();
    held.lock().unwrap();
    w.fails(1, &format!("{run} --resume-from-checkpoint auto"), &["run: another cuvee run is working in this folder"]);
    drop(held);
    w.ok(&format!("{run} --resume-from-checkpoint auto"));
}

#[test]
fn sizes_beyond_any_use_are_refused_before_they_are_tried() {
    let w = workspace();
    let huge = "--max-new-tokens 9223372036854775807";
    w.fails(2, &format!("generate --model model --prompt x {huge}"), &["--max-new-tokens", "from 1 to 16777216"]);
    let run = format!("{SHORT} --model model --output-dir run --gradient-accumulation-steps 99999999999");
    w.fails(2, &run, &["--gradient-accumulation-steps", "from 1 to 16777216"]);
    w.fails(2, &format!("{SHORT} --model model --output-dir run --adam-epsilon 1e-50"), &["--adam-epsilon"]);
    w.ok("plan --objective sft --model model --max-length 100000 --batch-size 16777216");
}

#[test]
fn logps_replaces_nothing_that_it_should_not() {
    let w = workspace();
    let before = w.read("train.jsonl");
    let line = "logps --model model --dataset train.jsonl --out";
    w.fails(1, &format!("{line} train.jsonl"), &["--out: ", "train.jsonl is the data set itself"]);
    std::os::unix::fs::symlink("train.jsonl", w.path("link.jsonl")).unwrap();
    w.fails(1, &format!("{line} link.jsonl"), &["--out: ", "is the data set itself"]);
    assert!(w.read("train.jsonl") == before);
    w.fails(1, &format!("{line} model"), &["--out: ", "is a folder"]);
    w.ok(&format!("{line} out.jsonl"));
    assert_eq!(w.ok(&format!("{line} -")).stdout, w.text("out.jsonl"));
    let piped = w.ok(&format!("{line} /dev/stdout"));
    assert_eq!(piped.stdout, w.text("out.jsonl"));
}

/// A last update that overflows leaves nothing behind that looks like a model.
#[test]
fn weights_that_are_not_finite_are_not_written() {
    let w = workspace();
    let run = SHORT.replace("--max-steps 4", "--max-steps 1");
    let broken = format!("{run} --model model --output-dir run --learning-rate 1e300");
    w.fails(1, &broken, &["step 1: the weight model.", "is not finite", "a lower --learning-rate"]);
    assert!(!w.exists("run/model.safetensors"));
}

#[test]
fn a_resume_with_other_held_out_rows_is_refused() {
    let w = workspace();
    let run = format!("{SHORT} --model model --output-dir run --eval-dataset heldout.jsonl");
    w.ok(&format!("{run} --stop-at-step 2"));
    w.write_lines("heldout.jsonl", &reviews("heldout")[..8]);
    w.fails(1, &format!("{run} --resume-from-checkpoint auto"), &["--eval-dataset: ", "made with"]);
}
