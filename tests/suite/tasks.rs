//! `cuvee eval --task`: what models are asked, what is refused, and what is printed of it.

use serde_json::{Value, json};

use crate::program::{Workspace, assert_same, results, reviews};

const CHOICE: &str = r#"{"query": "Review: a", "choices": ["good film", "bad film"], "gold": 0}"#;

fn parse(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

fn keys(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

fn tasks_of(w: &Workspace, flags: &str) -> Value {
    parse(&w.ok(&format!("eval --model model {flags} --json")).stdout)["models"][0]["tasks"].clone()
}

/// A model whose weights are all NaN.
fn broken(w: &Workspace) {
    w.copy_model("broken");
    let mut bytes = w.read("broken/model.safetensors");
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[header..].fill(0xff);
    w.write("broken/model.safetensors", bytes);
}

#[test]
fn several_models_stand_beside_a_baseline() {
    let w = Workspace::with_reviews(8);
    w.ok("train --objective sft --model model --dataset train.jsonl --max-steps 4 --batch-size 4 --learning-rate 3e-3 --output-dir sft");
    w.write_lines("cloze.jsonl", &reviews("cloze-heldout")[..12]);
    w.write_lines("base.jsonl", &reviews("sentences-heldout")[..10]);
    let flags = "--task cloze.jsonl --task text=base.jsonl --task pairs=heldout.jsonl";
    let line = format!("eval --model model --model sft {flags} --log-samples log.jsonl --plot front.svg");
    let done = parse(&w.ok(&format!("{line} --json")).stdout);
    assert_eq!(keys(&done), ["baseline", "models"]);
    assert_eq!(done["baseline"], "model");
    let [base, sft] = [&done["models"][0], &done["models"][1]];
    assert_eq!((&base["model"], &sft["model"]), (&json!("model"), &json!("sft")));
    assert_eq!(keys(&base["tasks"]), ["cloze", "text", "pairs"]);
    let of = |task: &str| keys(&base["tasks"][task]);
    assert_eq!(of("cloze"), ["kind", "items", "acc", "acc_stderr", "acc_norm", "acc_norm_stderr"]);
    assert_eq!(of("text")[..4], ["kind", "items", "perplexity", "perplexity_stderr"]);
    assert_eq!(of("pairs"), ["kind", "items", "accuracy", "accuracy_stderr", "margin", "margin_stderr"]);
    assert_eq!(base["tasks"]["cloze"]["items"], 12);
    assert_ne!(base["tasks"]["text"]["perplexity"], sft["tasks"]["text"]["perplexity"]);

    // A task is what `--dataset` says of the same rows.
    let eval = parse(&w.ok("eval --model sft --dataset heldout.jsonl --json").stdout);
    assert_eq!(eval["accuracy"], sft["tasks"]["pairs"]["accuracy"]);
    let relative = w.ok("eval --model sft --ref-model model --task heldout.jsonl --json");
    let eval = parse(&w.ok("eval --model sft --ref-model model --dataset heldout.jsonl --json").stdout);
    let margin = parse(&relative.stdout)["models"][0]["tasks"]["heldout"]["margin"].as_f64().unwrap();
    assert!((margin - eval["margin"].as_f64().unwrap()).abs() < 1e-9);

    // The items add up to the metrics.
    let log = w.lines("log.jsonl");
    assert_eq!(log.len(), 2 * (12 + 10 + 16));
    let right = log.iter().filter(|l| l["model"] == "sft" && l["task"] == "cloze").map(|l| l["acc"].as_f64().unwrap());
    assert_eq!(sft["tasks"]["cloze"]["acc"].as_f64().unwrap(), right.sum::<f64>() / 12.0);
    assert!(w.text("front.svg").contains("pairs accuracy against cloze acc"));

    // For people a row a model, and how far it is from the baseline, which is measured too where it is not named.
    let text = w.ok(&line).stdout;
    assert!(text.contains("text perplexity") && text.contains("± "), "{text}");
    assert_eq!(text.lines().count(), 4, "{text}");
    let other = w.ok("eval --model sft --baseline model --task cloze.jsonl --json");
    assert_eq!(parse(&other.stdout)["models"].as_array().unwrap().len(), 2);
    let alone = w.ok("eval --model model --task cloze.jsonl").stdout;
    assert!(alone.starts_with("cloze (choice, 12 items)\n  acc "), "{alone}");
}

#[test]
fn rewards_are_compared_sample_by_sample() {
    let w = Workspace::with_reviews(16);
    let train = "train --model model --dataset train.jsonl --max-steps 3 --batch-size 4 --learning-rate 3e-3";
    w.ok(&format!("{train} --objective reward --output-dir judge"));
    w.ok(&format!("{train} --objective sft --output-dir sft"));
    w.write_lines("prompts.jsonl", &reviews("prompts-heldout")[..3]);
    let line =
        "eval --model model --model sft --task prompts.jsonl --reward-model judge --base-model model --samples 3";
    let done = parse(&w.ok(&format!("{line} --max-new-tokens 6 --log-samples log.jsonl --json")).stdout);
    let of = |m: usize, key: &str| done["models"][m]["tasks"]["prompts"][key].as_f64().unwrap();
    assert_eq!(
        keys(&done["models"][1]["tasks"]["prompts"]),
        [
            "kind",
            "items",
            "reward",
            "reward_stderr",
            "win_rate",
            "win_rate_stderr",
            "answer_beaten",
            "answer_beaten_stderr",
            "words",
            "words_stderr",
            "distinct_2",
            "base_logp",
            "base_logp_stderr"
        ]
    );
    assert_eq!((of(0, "win_rate"), of(0, "win_rate_stderr")), (0.5, 0.0));
    // The rewards are those of `cuvee score`, and the win rate follows from them.
    let log = w.lines("log.jsonl");
    let rewards = |m: &str| -> Vec<f64> {
        let lines = log.iter().filter(|line| line["model"] == m);
        lines.flat_map(|line| line["rewards"].as_array().unwrap()).map(|r| r.as_f64().unwrap()).collect()
    };
    let (base, sft) = (rewards("model"), rewards("sft"));
    assert_eq!((base.len(), sft.len()), (9, 9));
    let wins: f64 = sft.iter().zip(&base).map(|(a, b)| if a == b { 0.5 } else { f64::from(u8::from(a > b)) }).sum();
    assert!((of(1, "win_rate") - wins / 9.0).abs() < 1e-12);
    assert!((of(1, "reward") - sft.iter().sum::<f64>() / 9.0).abs() < 1e-12);
    w.ok("score --model judge --dataset prompts.jsonl --out answers.jsonl");
    let answers = w.column("answers.jsonl", "score");
    let beaten = sft.iter().enumerate().filter(|(s, reward)| **reward > answers[s / 3]).count() as f64 / 9.0;
    assert!((of(1, "answer_beaten") - beaten).abs() < 1e-12, "{beaten}");
    let first = &log[0];
    let row = json!({"prompt": first["prompt"], "completion": first["completions"][0]});
    w.write_lines("first.jsonl", &[row]);
    w.ok("score --model judge --dataset first.jsonl --out scores.jsonl");
    assert_eq!(w.lines("scores.jsonl")[0]["score"], first["rewards"][0]);
    // The base model itself thinks most of its own samples.
    assert!(of(0, "base_logp") > of(1, "base_logp") - 1.0);
    // A seed is a seed.
    let again = |seed: &str| parse(&w.ok(&format!("{line} --max-new-tokens 6 {seed} --json")).stdout);
    assert_eq!(again("--seed 42"), done);
    assert_ne!(again("--seed 43"), done);
}

#[test]
fn what_is_written_is_compared_with_the_targets() {
    let w = Workspace::new();
    let line =
        parse(&w.ok("generate --model model --prompt Review: --temperature 0 --max-new-tokens 40 --json").stdout);
    let text = line["completion"].as_str().unwrap();
    let [first, last] = [text.split_whitespace().next(), text.split_whitespace().last()].map(Option::unwrap);
    // A stop string counts wherever it stands; what is written stands before it.
    let cut = text.split(" a").next().unwrap().trim();
    w.write_lines("stops.jsonl", &[json!({"prompt": "Review:", "target": cut, "until": [" a", ""]})]);
    w.write_lines("words.jsonl", &[json!({"question": "Review:", "answer": [first, 7], "until": "\u{1}"})]);
    w.write("one.toml", "data = 'words.jsonl'\nfilter = { regex = '\\S+' }\n");
    w.write("last.toml", "data = 'words.jsonl'\nfilter = { regex = '(\\S+)', group_select = -1 }\n");
    let flags = "--task stops.jsonl --task one.toml --task last.toml --max-new-tokens 40 --log-samples log.jsonl";
    let tasks = tasks_of(&w, flags);
    assert_eq!((&tasks["stops"]["exact_match"], &tasks["one"]["exact_match"]), (&json!(1.0), &json!(1.0)), "{text:?}");
    // A text that is written in pieces is the text.
    let log = w.lines("log.jsonl");
    assert_eq!((&log[1]["completion"], &log[2]["answer"]), (&json!(text), &json!(last)));
}

#[test]
fn rows_that_cannot_be_asked_are_named() {
    let w = Workspace::new();
    let refused = |rows: &str, parts: &[&str]| {
        w.write("x.jsonl", rows);
        w.fails(1, "eval --model model --task x.jsonl", parts);
    };
    let with = |row: &str| format!("{CHOICE}\n{row}\n");
    refused("", &["x.jsonl", "has no rows"]);
    refused("{\"a\": 1}", &["line 1", "[a]", "no kind of task", "choice (query or question"]);
    refused(&with(r#"{"query": "q", "choices": ["a", ""], "gold": 0}"#), &["line 2", "choice 1 ", "empty"]);
    refused(&with(r#"{"query": "q", "choices": ["a"], "gold": 0}"#), &["line 2", "1 choices", "at least two"]);
    refused(&with(r#"{"query": "q", "choices": "ab", "gold": 0}"#), &["line 2", "a list of texts"]);
    for gold in ["2", "-1", "0.5", "null", "\"C\"", "\"no such text\"", "\"7\"", "[0]"] {
        let row = format!(r#"{{"query": "q", "choices": ["a", "b"], "gold": {gold}}}"#);
        refused(&with(&row), &["line 2", "none of 2 choices", gold]);
    }
    refused(&with(r#"{"query": "q", "choices": ["a", "b"]}"#), &["line 2", "has no gold or answer or label"]);
    refused(r#"{"text": ""}"#, &["line 1", "empty"]);
    refused(r#"{"text": 3}"#, &["line 1", "expected a text"]);
    refused("{\"text\": \"a\"}\n{\"txt\": \"b\"}", &["line 2", "has no text", "[txt]"]);
    refused(r#"{"prompt": "p", "target": []}"#, &["line 1", "list of targets is empty"]);
    refused(r#"{"prompt": "p", "target": {}}"#, &["line 1", "neither a text nor a number"]);
    refused(r#"{"prompt": [{"role": "user", "content": "p"}], "target": "a"}"#, &["line 1", "is a list", "TOML"]);
    refused(r#"{"prompt": "p", "target": "a", "until": 3}"#, &["line 1", "until"]);
    refused(r#"{"prompt": "", "target": "a"}"#, &["line 1", "no token"]);
    refused(r#"{"chosen": "", "rejected": "b"}"#, &["no row is left"]);
    refused(r#"{"prompt": "p"}"#, &["--reward-model", "missing", "task x"]);
    let long = format!(r#"{{"query": "q", "choices": ["{}", "b"], "gold": 0}}"#, "film ".repeat(400));
    refused(&with(&long), &["line 2", "choice 0 ", "tokens", "--max-length"]);
}

#[test]
fn awkward_questions_have_answers() {
    let w = Workspace::new();
    let row = |query: &str, choices: Value, gold: Value| json!({"query": query, "choices": choices, "gold": gold});
    let rows = [
        row("", json!(["a", "b c"]), json!("B")),
        row("Review: 映画 🎬 ", json!(["é", "ü🎬"]), json!("é")),
        row(&"Review: a film. ".repeat(200), json!(["good", "good film"]), json!("1")),
        row("   ", json!(["x", "x"]), json!(0)),
    ];
    w.write_lines("x.jsonl", &rows);
    let done = tasks_of(&w, "--task x.jsonl --log-samples log.jsonl");
    assert_eq!(done["x"]["items"], 4);
    let log = w.lines("log.jsonl");
    assert_eq!(log.iter().map(|line| line["gold"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 0, 1, 0]);
    // Of equal choices the first is taken.
    assert_eq!((&log[3]["logps"][0], &log[3]["acc"]), (&log[3]["logps"][1], &json!(1.0)));

    // One item has no standard error; a window of two tokens is one.
    w.write("one.jsonl", "{\"text\": \"Review: a good film.\"}\n");
    let one = tasks_of(&w, "--task one.jsonl");
    assert!(one["one"].get("perplexity_stderr").is_none());
    let narrow = tasks_of(&w, "--task one.jsonl --max-length 2");
    assert_ne!(narrow["one"]["nll"], one["one"]["nll"]);
    // Bits that do not depend on what is beside a row, nor on how rows share their questions.
    let apart = tasks_of(&w, "--task x.jsonl --no-prefix-sharing --micro-batch-tokens 1");
    assert_eq!(apart["x"], done["x"]);
}

#[test]
fn a_model_of_nan_is_no_model() {
    let w = Workspace::new();
    broken(&w);
    w.write("choice.jsonl", CHOICE);
    w.write("write.jsonl", r#"{"prompt": "Review:", "target": "a"}"#);
    for task in ["choice", "write"] {
        let line = format!("eval --model broken --task {task}.jsonl");
        w.fails(1, &line, &["broken/model.safetensors", "NaN", "unusable"]);
    }
}

#[test]
fn a_toml_file_says_what_rows_cannot() {
    let w = Workspace::new();
    w.write(
        "rows.jsonl",
        "{\"q\": \"Is it good?\", \"options\": 2, \"choices\": [\"yes\", \"no\"], \"gold\": \"A\"}\n",
    );
    w.write("x.toml", "data = 'rows.jsonl'\nkind = 'choice'\nprompt = \"Review: {{ q }}\\n\"\ndelimiter = ''\n");
    assert_eq!(tasks_of(&w, "--task x.toml")["x"]["items"], 1);
    let refused = |toml: &str, parts: &[&str]| {
        w.write("x.toml", toml);
        w.fails(1, "eval --model model --task x.toml", parts);
    };
    refused("kind = 'choice'", &["x.toml", "no data"]);
    refused("data = 'none.jsonl'", &["none.jsonl", "cannot be read"]);
    refused("data = 'rows.jsonl'\nkind = 'quiz'", &["\"quiz\" is unknown", "choice, preference"]);
    refused("data = 'rows.jsonl'\nkind = 'choice'\nuntil = 'x'", &["until says nothing", "prompt, delimiter"]);
    refused("data = 'rows.jsonl'\nkind = 'choice'\nlimit = 3", &["limit says nothing"]);
    refused(
        "data = 'rows.jsonl'\nkind = 'choice'\nprompt = '{{ missing }}'",
        &["line 1", "cannot be filled in", "[q, options"],
    );
    refused("data = 'rows.jsonl'\nkind = 'choice'\nprompt = '{{ q'", &["x.toml", "template"]);
    refused("data = 3", &["x.toml", "cannot be used"]);
    refused("data = ", &["x.toml", "not valid TOML"]);
    w.write("asks.jsonl", "{\"prompt\": \"p\", \"target\": \"t\"}\n");
    refused("data = 'asks.jsonl'\nfilter = { regex = '(' }", &["regular expression"]);
    refused("data = 'asks.jsonl'\nmax_new_tokens = 0", &["1 or more"]);
    refused("data = 'asks.jsonl'\nmax_new_tokens = 256", &["--max-new-tokens", "no room"]);
}

#[test]
fn a_flag_that_says_nothing_is_an_error() {
    let w = Workspace::new();
    w.write("x.jsonl", CHOICE);
    for flags in ["--samples 2", "--seed 1", "--reward-model model", "--max-new-tokens 3"] {
        let flag = flags.split(' ').next().unwrap();
        w.fails(1, &format!("eval --model model --task x.jsonl {flags}"), &[flag]);
    }
    w.fails(1, "eval --model model --task x.jsonl --plot x.svg", &["--plot", "two tasks"]);
    w.fails(1, "eval --model model --task x.jsonl --task other/x.jsonl", &["--task", "two are named x"]);
    w.fails(2, "eval --model model --task x.jsonl --base-model model", &["--base-model", "without --reward-model"]);
    w.fails(2, "eval --model model --dataset x.jsonl --samples 2", &["--samples", "without --task"]);
    w.fails(2, "eval --model model --model model --dataset x.jsonl", &["--model", "without --task"]);
    w.fails(2, "eval --model model --model model --task x.jsonl --adapter a", &["--adapter", "one model"]);
}

const TRAIN: &str = "train --objective sigmoid --beta 0.1 --model model --dataset train.jsonl --eval-dataset heldout.jsonl \
                     --batch-size 4 --max-steps 6 --learning-rate 3e-3 --eval-steps 2 --save-steps 2";
const ASKED: &str = "--eval-task cloze.jsonl --eval-task text=base.jsonl --eval-task words.jsonl";

fn with_tasks() -> Workspace {
    let w = Workspace::with_reviews(24);
    w.write_lines("cloze.jsonl", &reviews("cloze-heldout")[..8]);
    w.write_lines("base.jsonl", &reviews("sentences-heldout")[..6]);
    w.write_lines("words.jsonl", &[json!({"prompt": "Review: a", "target": "x", "until": "."})]);
    w
}

#[test]
fn a_run_is_asked_what_eval_asks() {
    let w = with_tasks();
    let done = w.ok(&format!("{TRAIN} {ASKED} --output-dir run"));
    assert!(done.stdout.contains("cloze acc "), "{}", done.stdout);
    assert!(w.text("run/curves.svg").contains("text perplexity"));
    let lines = w.lines("run/evaluations.jsonl");
    assert_eq!(lines.len(), 4);
    let flags = "--task cloze.jsonl --task text=base.jsonl --task words.jsonl --json";
    for (line, model) in [(&lines[0], "model"), (&lines[1], "run/checkpoint-2"), (&lines[3], "run")] {
        let eval = parse(&w.ok(&format!("eval --model {model} {flags}")).stdout);
        for (task, metric) in
            [("cloze", "acc"), ("cloze", "acc_norm_stderr"), ("text", "bits_per_byte"), ("words", "exact_match")]
        {
            let (ours, theirs) = (&line[&format!("eval_{task}/{metric}")], &eval["models"][0]["tasks"][task][metric]);
            assert_eq!(ours, theirs, "{model}: {task} {metric}");
        }
    }
    // What is asked changes nothing of what is learned.
    w.ok(&format!("{TRAIN} --output-dir plain"));
    assert!(w.read("run/model.safetensors") == w.read("plain/model.safetensors"));
}

#[test]
fn a_number_ends_a_run() {
    let w = with_tasks();
    w.ok(&format!("{TRAIN} {ASKED} --stop-at-step 4 --output-dir late"));
    let measured = w.column("late/evaluations.jsonl", "eval_text/perplexity");
    let (bound, side) = ((measured[1] + measured[2]) / 2.0, if measured[2] > measured[1] { '>' } else { '<' });
    let stop = format!("--stop-when text/perplexity{side}{bound}");
    let done = w.ok(&format!("{TRAIN} {ASKED} {stop} --output-dir early"));
    assert!(done.stderr.contains("stopped after step 4 of 6: text/perplexity is"), "{}", done.stderr);
    assert_eq!(w.lines("early/evaluations.jsonl").len(), 3);
    assert_eq!(w.json("early/cuvee.json")["finished"], true);
    assert!(w.read("early/model.safetensors") == w.read("early/checkpoint-4/model.safetensors"));
    assert!(
        w.ok(&format!("{TRAIN} {ASKED} {stop} --output-dir early --resume-from-checkpoint auto"))
            .stdout
            .contains("is finished")
    );
    // Killed between its last evaluation and its end, a run ends where it was to end.
    let done = w.ok(&format!("{TRAIN} {ASKED} {stop} --output-dir late --resume-from-checkpoint auto"));
    assert!(done.stderr.contains("stopped after step 4 of 6"), "{}", done.stderr);
    assert_same("a resumed stop", &results(&w.path("early")), &results(&w.path("late")));

    let refused = |code: i32, flags: &str, parts: &[&str]| {
        w.fails(code, &format!("{TRAIN} --output-dir no {flags}"), parts);
        assert!(!w.exists("no"));
    };
    refused(
        1,
        &format!("{ASKED} --stop-when text/acc>0.5"),
        &["--stop-when", "no text/acc", "cloze/acc, cloze/acc_norm"],
    );
    refused(2, "--stop-when acc", &["--stop-when", "such as base/perplexity>50"]);
    w.write_lines("prompts.jsonl", &reviews("prompts-heldout")[..2]);
    refused(1, "--eval-task prompts.jsonl", &["--eval-task", "rewards"]);
    refused(1, "--eval-task x=base.jsonl --eval-task x=cloze.jsonl", &["--eval-task", "two are named x"]);
    w.fails(
        2,
        "train --objective sft --model model --dataset train.jsonl --output-dir no --eval-task base.jsonl",
        &["--eval-task", "--eval-dataset"],
    );
}
