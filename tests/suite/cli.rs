//! The contract of every command: what it writes, under which names, on which stream.

use std::io::pipe;

use cuvee::data::{Example, Packing, Sequence, Tokenizer};
use cuvee::device::Cpu;
use cuvee::model::{Checkpoint, Init};
use cuvee::objectives;
use cuvee::references::Scorer;
use serde_json::{Value, json};

use crate::program::{Line, Running, Workspace, reviews, root};

const TRAIN: &str = "train --objective sigmoid --beta 0.1 --learning-rate 5e-4 --dataset train.jsonl --max-length 40 \
    --batch-size 4 --max-steps 4";

fn keys(line: &Line) -> Vec<&str> {
    line.keys().map(String::as_str).collect()
}

fn parse(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

// ---- logps, eval -----------------------------------------------------------------------------------------------

#[test]
fn logps_writes_a_line_for_every_row() {
    let w = Workspace::new();
    let mut rows = reviews("train")[..6].to_vec();
    rows[1]["rejected"] = json!("");
    rows[3]["prompt"] = json!("");
    rows[4]["chosen"] = json!(" good".repeat(300));
    w.write_lines("pairs.jsonl", &rows);
    let done = w.ok("logps --model model --dataset pairs.jsonl --out pairs.out.jsonl --max-length 200");
    assert_eq!(done.stdout, "");
    assert!(done.stderr.contains("3 of 6 rows dropped"), "{}", done.stderr);
    let lines = w.lines("pairs.out.jsonl");
    for (row, line) in lines.iter().enumerate() {
        assert_eq!(line["row"], json!(row));
        let skipped = match row {
            1 => "empty completion",
            3 => "empty prompt",
            4 => "too long",
            _ => {
                assert_eq!(keys(line), ["row", "logps_chosen", "logps_rejected", "tokens_chosen", "tokens_rejected"]);
                assert!(line["logps_chosen"].as_f64() < Some(0.0) && line["tokens_rejected"].as_u64() > Some(0));
                continue;
            }
        };
        assert_eq!((keys(line), &line["skipped"]), (vec!["row", "skipped"], &json!(skipped)));
    }
    assert_eq!(lines.len(), 6);

    // The same completions one by one, in another order, from a compressed file of blank and unknown things.
    let completions: Vec<Value> = [5, 0, 2]
        .iter()
        .flat_map(|i| {
            ["chosen", "rejected"].map(|key| json!({"prompt": rows[*i]["prompt"], "completion": rows[*i][key], "x": 1}))
        })
        .collect();
    let text: String = completions.iter().map(|row| format!("{row}\r\n\n")).collect();
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut gz, text.as_bytes()).unwrap();
    w.write("completions.jsonl.gz", gz.finish().unwrap());
    w.ok("logps --model model --dataset completions.jsonl.gz --out completions.out.jsonl --threads 1");
    let alone = w.lines("completions.out.jsonl");
    for (i, row) in [5, 0, 2].into_iter().enumerate() {
        for (s, suffix) in ["_chosen", "_rejected"].into_iter().enumerate() {
            let line = &alone[2 * i + s];
            assert_eq!(keys(line), ["row", "logps", "tokens"]);
            assert_eq!(line["row"], json!(2 * i + s));
            assert_eq!(line["logps"], lines[row][&format!("logps{suffix}")], "row {row}");
            assert_eq!(line["tokens"], lines[row][&format!("tokens{suffix}")], "row {row}");
        }
    }
}

#[test]
fn eval_says_how_often_the_model_prefers_chosen() {
    let w = Workspace::with_reviews(30);
    let mut rows = reviews("train")[..30].to_vec();
    rows[7]["chosen"] = json!("");
    w.write_lines("train.jsonl", &rows);
    let eval = |flags: &str| {
        let done = w.ok(&format!("eval --model model --dataset train.jsonl {flags} --json"));
        let Value::Object(line) = parse(&done.stdout) else { panic!("{}", done.stdout) };
        assert_eq!(keys(&line), ["rows", "skipped", "accuracy", "margin", "perplexity"]);
        assert_eq!((&line["rows"], &line["skipped"]), (&json!(29), &json!(1)));
        line
    };
    let own = eval("--ref-model model");
    assert_eq!((&own["accuracy"], &own["margin"]), (&json!(0.5), &json!(0.0)));

    let plain = eval("");
    w.ok("logps --model model --dataset train.jsonl --out logps.jsonl");
    let scored: Vec<Line> = w.lines("logps.jsonl").into_iter().filter(|line| line.len() == 5).collect();
    let number = |line: &Line, key: &str| line[key].as_f64().unwrap();
    let margins: Vec<f64> = scored.iter().map(|l| number(l, "logps_chosen") - number(l, "logps_rejected")).collect();
    let accuracy = margins.iter().filter(|margin| **margin > 0.0).count() as f64 / 29.0;
    let sum = |key: &str| scored.iter().map(|line| number(line, key)).sum::<f64>();
    let perplexity = (-sum("logps_chosen") / sum("tokens_chosen")).exp();
    for (key, expected) in
        [("accuracy", accuracy), ("margin", margins.iter().sum::<f64>() / 29.0), ("perplexity", perplexity)]
    {
        assert!((number(&plain, key) - expected).abs() < 1e-12 * expected.abs().max(1.0), "{key}: {plain:?}");
    }
    assert_eq!(own["perplexity"], plain["perplexity"]);

    // For people, the same numbers; rows without pairs have a likelihood only.
    let text = w.ok("eval --model model --dataset train.jsonl").stdout;
    assert!(text.contains("29 (1 skipped)") && text.contains("perplexity"), "{text}");
    w.write("text.jsonl", "{\"text\": \"Review: a fine film.\"}\n");
    let text = w.ok("eval --model model --dataset text.jsonl --json").stdout;
    let labelled = json!({"prompt": "Review:", "completion": " a fine film.", "label": true});
    w.write_lines("labelled.jsonl", &[labelled]);
    let unpaired = parse(&w.ok("eval --model model --dataset labelled.jsonl --json").stdout);
    assert_eq!((&unpaired["rows"], &unpaired["accuracy"]), (&json!(1), &Value::Null));
    w.ok("logps --model model --dataset labelled.jsonl --out labelled.out.jsonl");
    let line = w.lines("labelled.out.jsonl").remove(0);
    assert_eq!((keys(&line), &line["label"]), (vec!["row", "label", "logps", "tokens"], &json!(true)));
    assert_eq!((&parse(&text)["accuracy"], &parse(&text)["margin"]), (&Value::Null, &Value::Null));
}

// ---- score -----------------------------------------------------------------------------------------------------

/// The reward model that transformers scored, with the shipped tokenizer.
fn reward_model(w: &Workspace) -> Vec<Line> {
    w.copy_model("reward");
    for file in ["config.json", "model.safetensors"] {
        w.write(&format!("reward/{file}"), std::fs::read(root().join("tests/data/reward/llama").join(file)).unwrap());
    }
    let scores = std::fs::read(root().join("tests/data/reward/llama/scores.json")).unwrap();
    serde_json::from_slice(&scores).unwrap()
}

fn assert_score(score: &Value, expected: &Value) {
    let (score, expected) = (score.as_f64().unwrap(), expected.as_f64().unwrap());
    assert!((score - expected).abs() < 1e-4, "{score}, expected {expected}");
}

#[test]
fn score_gives_the_scores_of_transformers() {
    let w = Workspace::new();
    let expected = reward_model(&w);
    let text =
        |i: usize| [&expected[i]["prompt"], &expected[i]["completion"]].map(|part| part.as_str().unwrap()).concat();

    let completion = |i: usize| json!({"prompt": expected[i]["prompt"], "completion": expected[i]["completion"]});
    w.write_lines("completions.jsonl", &(0..expected.len()).map(completion).collect::<Vec<_>>());
    w.ok("score --model reward --dataset completions.jsonl --out completions.out.jsonl");
    for (i, line) in w.lines("completions.out.jsonl").iter().enumerate() {
        assert_eq!((keys(line), &line["row"]), (vec!["row", "score"], &json!(i)));
        assert_score(&line["score"], &expected[i]["score"]);
    }

    // Pairs, whose prompts are shared; an empty one is left out.
    let pair = |i: usize, j: usize| json!({"prompt": expected[i]["prompt"], "chosen": expected[i]["completion"], "rejected": expected[j]["completion"]});
    let mut rows = vec![pair(0, 1), pair(0, 2), pair(4, 5)];
    rows[1]["rejected"] = json!("");
    w.write_lines("pairs.jsonl", &rows);
    let done = w.ok("score --model reward --dataset pairs.jsonl --out -");
    assert!(done.stderr.contains("1 of 3 rows dropped: 1 empty completion"), "{}", done.stderr);
    let lines: Vec<Line> = done.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((keys(&lines[1]), &lines[1]["skipped"]), (vec!["row", "skipped"], &json!("empty completion")));
    for (row, [i, j]) in [(0, [0, 1]), (2, [4, 5])] {
        assert_eq!(keys(&lines[row]), ["row", "score_chosen", "score_rejected"]);
        assert_score(&lines[row]["score_chosen"], &expected[i]["score"]);
        assert_score(&lines[row]["score_rejected"], &expected[j]["score"]);
    }
    let apart = w.ok("score --model reward --dataset pairs.jsonl --out - --no-prefix-sharing --micro-batch-tokens 1");
    assert_eq!(apart.stdout, done.stdout);

    let labelled = json!({"prompt": expected[3]["prompt"], "completion": expected[3]["completion"], "label": 0});
    w.write_lines("more.jsonl", &[labelled]);
    let line = parse(&w.ok("score --model reward --dataset more.jsonl --out -").stdout);
    assert_eq!((keys(line.as_object().unwrap()), &line["label"]), (vec!["row", "label", "score"], &json!(false)));
    assert_score(&line["score"], &expected[3]["score"]);

    let mut command = w.command_of(&["score", "--model", "reward", "--text", &text(7)]);
    let alone = Running::new(&mut command).wait();
    assert_score(&parse(&alone.stdout), &expected[7]["score"]);
    w.write_lines("text.jsonl", &[json!({"text": text(7)})]);
    let line = parse(&w.ok("score --model reward --dataset text.jsonl --out -").stdout);
    assert_eq!(line["score"], parse(&alone.stdout));
}

#[test]
fn score_and_the_other_commands_name_the_wrong_kind_of_model() {
    let w = Workspace::with_reviews(3);
    reward_model(&w);
    let data = "--dataset train.jsonl --out out.jsonl";
    w.fails(1, &format!("score --model model {data}"), &["is a language model", "LlamaForSequenceClassification"]);
    for line in [
        format!("logps --model reward {data}"),
        "eval --model model --ref-model reward --dataset train.jsonl".into(),
        "generate --model reward --prompt a".into(),
        format!("{TRAIN} --model reward --output-dir run"),
        format!("{TRAIN} --model model --ref-model reward --output-dir run"),
    ] {
        w.fails(1, &line, &["reward: is a reward model", "a language model is wanted"]);
    }
    assert!(!w.exists("out.jsonl") && !w.exists("run"));
    w.fails(2, "score --model reward", &["--dataset"]);
    w.fails(2, "score --model reward --dataset train.jsonl", &["--out"]);
    w.fails(2, "score --model reward --text a --out out.jsonl", &["--text"]);
    w.fails(1, "score --model reward --text=", &["--text", "empty text"]);
    w.fails(1, "score --model reward --dataset train.jsonl --out train.jsonl", &["is the data set itself"]);
}

// ---- preview, chat ---------------------------------------------------------------------------------------------

/// A chat template whose parts are easy to see.
const TEMPLATE: &str = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token if m.role == 'assistant' }}\
    {{ '\n' }}{% endfor %}{{ '[assistant] ' if add_generation_prompt }}";

/// Three conversational pairs; the second has nothing rejected.
fn conversations(w: &Workspace) {
    w.copy_model("chat");
    w.write("chat/chat_template.jinja", TEMPLATE);
    let says = |text: &str| json!([{"role": "assistant", "content": text}]);
    let row = |question: &str, rejected: Value| json!({"prompt": [{"role": "user", "content": question}], "chosen": says("A funny film."), "rejected": rejected});
    let rows = [row("Which film?", says("A dull film.")), row("Why?", json!([])), row("Is it?", says("No."))];
    w.write_lines("chat.jsonl", &rows);
}

#[test]
fn preview_shows_what_training_sees() {
    let w = Workspace::new();
    conversations(&w);
    let done = w.ok("preview --model chat --dataset chat.jsonl --json");
    let lines: Vec<Value> = done.stdout.lines().map(parse).collect();
    assert_eq!(lines[1], json!({"row": 1, "line": 2, "skipped": "empty completion"}));
    assert_eq!(keys(lines[0].as_object().unwrap()), ["row", "line", "sequences", "segments", "positions"]);
    let [chosen, rejected] = [0, 1].map(|i| &lines[0]["sequences"][i]);
    assert_eq!(keys(chosen.as_object().unwrap()), ["name", "ids", "first", "text"]);
    assert_eq!(chosen["text"], "[user] Which film?\n[assistant] A funny film.<|endoftext|>\n");
    assert_eq!((&rejected["name"], &rejected["first"]), (&json!("rejected"), &chosen["first"]));

    // The batch is the prompt once and both completions as its children.
    let first = chosen["first"].as_u64().unwrap();
    let len = |sequence: &Value| sequence["ids"].as_array().unwrap().len() as u64 - first;
    let segment = |start: u64, len: u64, parent: Value, position: u64| json!({"start": start, "len": len, "parent": parent, "position": position});
    let children = [(first, len(chosen)), (first + len(chosen), len(rejected))];
    let [c, r] = children.map(|(start, len)| segment(start, len, json!(0), first));
    assert_eq!(lines[0]["segments"], json!([segment(0, first, Value::Null, 0), c, r]));
    let tokenizer = Tokenizer::load(&w.path("chat")).unwrap();
    let text = tokenizer.encode_plain("[user] Which film?\n[assistant] A funny film.<|endoftext|>\n").unwrap();
    assert_eq!(chosen["ids"], json!(text));
    assert!(done.stderr.contains("1 of 3 rows dropped: 1 empty completion (first at line 2)"), "{}", done.stderr);
}

#[test]
fn rows_are_the_same_however_a_file_lists_them() {
    let w = Workspace::new();
    let rows = reviews("heldout");
    w.write_lines("rows.jsonl", &rows[..60]);
    w.write("rows.json", serde_json::to_string_pretty(&rows[..60]).unwrap());
    let cell = |row: &Value, column: &str| format!("\"{}\"", row[column].as_str().unwrap().replace('"', "\"\""));
    let line = |row: &Value| ["prompt", "chosen", "rejected"].map(|column| cell(row, column)).join(",") + "\n";
    w.write("rows.csv", "prompt,chosen,rejected\n".to_string() + &rows[..60].iter().map(line).collect::<String>());
    std::fs::copy(root().join("tests/data/parquet/pairs-snappy.parquet"), w.path("rows.parquet")).unwrap();
    let shown = |file: &str| w.ok(&format!("preview --model model --dataset {file} --rows 60 --json")).stdout;
    let lines = shown("rows.jsonl");
    assert_eq!(lines.lines().count(), 60);
    for file in ["rows.json", "rows.csv", "rows.parquet"] {
        assert!(shown(file) == lines, "{file}");
    }
    let record = w.ok("preview --model model --dataset rows.parquet --line 60").stdout;
    assert!(record.starts_with("row 59, record 60"), "{record}");
}

#[test]
fn preview_is_readable_with_and_without_colour() {
    let w = Workspace::new();
    conversations(&w);
    let plain = w.ok("preview --model chat --dataset chat.jsonl --line 1").stdout;
    for part in
        ["row 0, line 1   ", "prompt      [|", "chosen      ", "|<|endoftext|>|\u{21b5}\n", "ids  ", "mask  ", "batch "]
    {
        assert!(plain.contains(part), "{part}: {plain}");
    }
    assert!(!plain.contains('\x1b') && plain.lines().all(|line| !line.ends_with(' ')), "{plain}");
    let colored = w.ok("preview --model chat --dataset chat.jsonl --row 0 --color always").stdout;
    assert!(colored.contains("\x1b[22;32m") && colored.contains("\x1b[22;31m") && colored.contains("\x1b[4;2m"));

    let skipped = w.ok("preview --model chat --dataset chat.jsonl --row 1").stdout;
    assert_eq!(skipped, "row 1, line 2   not trained on: empty completion\n\n");
    let long = w.ok("preview --model chat --dataset chat.jsonl --rows 1 --max-length 8").stdout;
    assert!(long.contains(" tokens, --max-length 8"), "{long}");
    w.fails(
        1,
        "preview --model chat --dataset chat.jsonl --row 3",
        &["--row: 3 is past the last row of chat.jsonl, 2"],
    );
    w.fails(1, "preview --model chat --dataset chat.jsonl --line 4", &["--line: chat.jsonl has no row at line 4"]);
    w.fails(2, "preview --model chat --dataset chat.jsonl --row 0 --line 1", &["cannot be used with"]);
    w.fails(2, "preview --model chat --dataset chat.jsonl --on-overflow drop", &["does nothing without --max-length"]);
    w.fails(1, "preview --model model --dataset chat.jsonl", &["model: has no chat template"]);
}

#[test]
fn preview_names_labels_and_margins() {
    let w = Workspace::new();
    let unpaired = |label: Value| json!({"prompt": "Review:", "completion": " a fine film.", "label": label});
    w.write_lines("unpaired.jsonl", &[unpaired(json!(true)), unpaired(json!(0))]);
    let shown = w.ok("preview --model model --dataset unpaired.jsonl --color always").stdout;
    let scored = |name: &str, style: &str| format!("\n{name:<12}\x1b[22;{style}m");
    assert!(shown.contains(&scored("desirable", "32")) && shown.contains(&scored("undesirable", "31")), "{shown}");
    let row = parse(&w.ok("preview --model model --dataset unpaired.jsonl --row 1 --json").stdout);
    assert_eq!((&row["label"], &row["sequences"][0]["name"]), (&json!(false), &json!("undesirable")));
    w.write_lines("same.jsonl", &[unpaired(json!(true)), unpaired(json!(true))]);
    let same = w.ok("preview --model model --dataset same.jsonl").stderr;
    assert!(same.contains("all 2 completions are labelled desirable"), "{same}");
    w.write_lines("wrong.jsonl", &[unpaired(json!(true)), unpaired(json!("yes"))]);
    w.fails(1, "preview --model model --dataset wrong.jsonl", &["wrong.jsonl, line 2: column \"label\" is \"yes\""]);

    w.write_lines("margin.jsonl", &[json!({"prompt": "Review:", "chosen": " a", "rejected": " b", "margin": 1.5})]);
    let shown = w.ok("preview --model model --dataset margin.jsonl").stdout;
    assert!(shown.contains("rejected tokens, margin 1.5\n"), "{shown}");
    let row = parse(&w.ok("preview --model model --dataset margin.jsonl --json").stdout);
    assert_eq!((&row["margin"], &row["label"]), (&json!(1.5), &Value::Null));
}

#[test]
fn conversations_are_trained_scored_and_answered() {
    let w = Workspace::new();
    conversations(&w);
    let train = "train --objective sigmoid --beta 0.1 --model chat --dataset chat.jsonl --eval-dataset chat.jsonl \
        --samples 1 --max-new-tokens 3 --batch-size 2 --max-steps 1 --output-dir out";
    w.ok(train);
    // The result answers as it was trained: its template is there.
    let answer = w.ok("generate --model out --chat --prompt hi --max-new-tokens 3 --temperature 0").stdout;
    let ids = |line: &str| parse(&w.ok(line).stdout)["ids"].clone();
    let raw = ids("generate --model out --prompt hi --max-new-tokens 3 --temperature 0 --json");
    let chat = ids("generate --model out --chat --prompt hi --max-new-tokens 3 --temperature 0 --json");
    assert!(raw != chat && !answer.contains("hi\n[assistant]"), "{answer}");
    w.fails(1, "generate --model model --chat --prompt hi", &["model: has no chat template"]);
}

// ---- generate --------------------------------------------------------------------------------------------------

#[test]
fn samples_depend_on_their_seed_and_number_alone() {
    let w = Workspace::new();
    let generate = |flags: &str| {
        let prompt =
            ["generate", "--model", "model", "--prompt", "Review: The film", "--max-new-tokens", "12", "--json"];
        let args: Vec<&str> = prompt.into_iter().chain(flags.split_whitespace()).collect();
        let done = Running::new(&mut w.command_of(&args)).wait();
        assert_eq!(done.code, Some(0), "{}", done.stderr);
        let lines: Vec<Value> = done.stdout.lines().map(parse).collect();
        for line in &lines {
            let logps = ["logps", "sampled_logps"];
            let text = ["row", "sample", "prompt", "completion", "ids", "finish", "finished"];
            assert_eq!(keys(line.as_object().unwrap()), [&text[..], &logps].concat());
            assert!(
                logps
                    .into_iter()
                    .all(|key| line[key].as_array().unwrap().len() == line["ids"].as_array().unwrap().len())
            );
            assert_eq!(line["prompt"], json!("Review: The film"));
            let ids = line["ids"].as_array().unwrap();
            assert!(ids.len() == 12 || line["finished"] == json!(true), "{line}");
        }
        lines
    };
    let three = generate("--seed 7 --samples 3");
    assert_eq!(three.len(), 3);
    assert!(three[0] != three[1] && three[1] != three[2]);
    assert_eq!(generate("--seed 7 --samples 3 --threads 1"), three);
    assert_eq!(generate("--seed 7"), three[..1]);
    assert_ne!(generate("--seed 8"), three[..1]);
    let greedy = generate("--temperature 0 --seed 1");
    assert_eq!(generate("--temperature 0 --seed 2"), greedy);
    assert_eq!(generate("--top-p 0.0001 --seed 3"), greedy);

    let text = w.ok("generate --model model --prompt Review: --max-new-tokens 4").stdout;
    assert!(text.starts_with("Review:") && text.ends_with('\n'), "{text}");
    w.fails(2, "generate --model model --prompt a --temperature 0 --samples 2", &["--samples", "--temperature 0"]);
    w.fails(2, "generate --model model --prompt a --top-p 0", &["--top-p"]);
    let mut empty = w.command_of(&["generate", "--model", "model", "--prompt", ""]);
    let empty = Running::new(&mut empty).wait();
    assert_eq!(empty.code, Some(1), "{}", empty.stderr);
    assert!(empty.error().contains("--prompt"), "{}", empty.stderr);
}

/// Prompts of a file, text or messages, get what each gets alone, and what scoring says of it.
#[test]
fn a_file_of_prompts_is_completed() {
    let w = Workspace::new();
    w.write_lines("prompts.jsonl", &[json!({"prompt": "Review: The film", "id": 3}), json!({"prompt": "Review:"})]);
    let flags =
        "--samples 3 --max-new-tokens 9 --temperature 0.9 --top-k 50 --min-p 0.001 --repetition-penalty 1.1 --seed 5";
    let line = format!("generate --model model --prompts prompts.jsonl --out out.jsonl {flags}");
    let done = w.ok(&line);
    assert!(
        done.stdout.is_empty() && done.stderr.contains("tokens/s") && done.stderr.contains(" in all"),
        "{}",
        done.stderr
    );
    let lines = w.lines("out.jsonl");
    let numbers = |key: &str| lines.iter().map(|line| line[key].as_u64().unwrap()).collect::<Vec<_>>();
    assert_eq!((numbers("row"), numbers("sample")), (vec![0, 0, 0, 1, 1, 1], vec![0, 1, 2, 0, 1, 2]));
    let mut alone = w.command_of(&["generate", "--model", "model", "--prompt", "Review: The film", "--json"]);
    let alone = Running::new(alone.args(flags.split(' '))).wait();
    for (alone, line) in alone.stdout.lines().zip(&lines) {
        assert_eq!(parse(alone).as_object().unwrap(), line);
    }
    let before = w.read("out.jsonl");
    w.ok(&format!("{line} --max-running 2 --threads 1"));
    assert!(w.read("out.jsonl") == before, "two at a time give other texts");

    // A completion that ends is scored with its end; of the others the scored one goes on.
    let row = |line: &Line| json!({"prompt": line["prompt"], "completion": line["completion"]});
    w.write_lines("scored.jsonl", &lines.iter().map(row).collect::<Vec<_>>());
    w.ok("logps --model model --dataset scored.jsonl --out logps.jsonl");
    let mut compared = 0;
    for (line, scored) in lines.iter().zip(w.lines("logps.jsonl")) {
        let logps: Vec<f64> = line["logps"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
        if line["finish"] == "eos" && scored["tokens"].as_u64() == Some(logps.len() as u64) {
            assert_eq!(scored["logps"].as_f64(), Some(logps.iter().sum()));
            compared += 1;
        }
    }
    println!("{compared} completions ended and were scored");

    let stopped = w.ok("generate --model model --prompt Review: --stop e --max-new-tokens 30 --json --seed 1").stdout;
    let stopped = parse(&stopped);
    assert!(stopped["finish"] != "length" && !stopped["completion"].as_str().unwrap().contains('e'), "{stopped}");
    let out = "--out x.jsonl";
    w.fails(1, &format!("generate --model model --prompts nothing.jsonl {out}"), &["nothing.jsonl: cannot be read"]);
    w.fails(1, &line.replace("out.jsonl", "prompts.jsonl"), &["--out: ", "is the data set itself"]);
    w.fails(1, &format!("{line} --ram 1MiB"), &["--max-new-tokens: one completion takes"]);
    for (flags, part) in [
        ("--prompts prompts.jsonl", "--out"),
        ("--prompt a --out x.jsonl", "--prompts"),
        ("--prompt a --min-new-tokens 9 --max-new-tokens 8", "--min-new-tokens: 9 is more than"),
        ("--prompt a --temperature 0 --top-k 3", "--top-k: does nothing at --temperature 0"),
        ("--prompt a --temperature 0 --min-p 0.1", "--min-p: does nothing at --temperature 0"),
        ("--prompt a --repetition-penalty 0", "--repetition-penalty"),
        ("--prompt a --min-p 2", "--min-p"),
        ("", "--prompt"),
    ] {
        w.fails(2, &format!("generate --model model {flags}"), &[part]);
    }
}

/// The cached decoder and the scorer are one model: at temperature 0 no other token has a larger log-probability.
#[test]
fn greedy_tokens_are_the_likeliest_that_scoring_knows() {
    let w = Workspace::new();
    let done = w.ok("generate --model model --prompt Review: --max-new-tokens 5 --temperature 0 --json");
    let ids: Vec<u32> = serde_json::from_value(parse(&done.stdout)["ids"].clone()).unwrap();
    let checkpoint = Checkpoint::open(&w.path("model")).unwrap();
    let prompt = Tokenizer::load(&w.path("model")).unwrap().encode("Review:").unwrap();
    let device = Cpu::new(2).unwrap();
    let packing = Packing::new(2048);
    for done in 0..ids.len() {
        let context = [&prompt[..], &ids[..done]].concat();
        let with = |token: u32| Sequence::new([&context[..], &[token]].concat(), context.len());
        let candidates = (0..checkpoint.spec.vocab as u32)
            .map(|token| Example { sequences: vec![with(token)], ..Example::default() });
        let candidates: Vec<Example> = candidates.collect();
        let largest = packing.largest(&packing.extents(&candidates));
        let mut scorer = Scorer::new(&device, &checkpoint, Init::Checkpoint, &largest).unwrap();
        let logps = scorer.score(&candidates.iter().collect::<Vec<_>>(), packing, &mut |_| {}).unwrap();
        let logp = |token: usize| logps[token][0][0];
        let total: f64 = (0..logps.len()).map(|token| f64::from(logp(token)).exp()).sum();
        assert!((total - 1.0).abs() < 1e-4, "the probabilities of all tokens sum to {total}");
        let best = (0..logps.len()).max_by(|a, b| logp(*a).total_cmp(&logp(*b))).unwrap();
        assert_eq!(best as u32, ids[done], "token {done}: {} and {}", logp(best), logp(ids[done] as usize));
    }
}

// ---- plan, list, help ------------------------------------------------------------------------------------------

#[test]
fn plan_prices_a_run_without_running_it() {
    let w = Workspace::with_reviews(20);
    let plan = |flags: &str| {
        let done =
            w.ok(&format!("{} {flags} --json", TRAIN.replace("train ", "plan ").replace(" --dataset train.jsonl", "")));
        assert!(!w.exists("run") && !w.exists("cache"), "a plan writes nothing");
        parse(&done.stdout)
    };
    let phases = |plan: &Value| -> Vec<Line> {
        plan["phases"].as_array().unwrap().iter().map(|phase| phase.as_object().unwrap().clone()).collect()
    };
    let data = "--model model --dataset train.jsonl --eval-dataset heldout.jsonl --output-dir run --samples 2";
    let with_data = plan(data);
    for plan in [&with_data, &plan("--model model"), &plan("--model model --recompute --ref-model model")] {
        assert!(plan["flops_per_step"].as_f64() > Some(1e6), "{plan}");
        assert_eq!((&plan["parameters"], &plan["max_steps"]), (&json!(656_000), &json!(4)), "{plan}");
        let mut peak = 0;
        for phase in phases(plan) {
            let parts = ["weights", "grads", "states", "activations", "workspace", "host"];
            assert_eq!(keys(&phase), [&["name"], &parts[..]].concat());
            let bytes = |key: &str| phase[key].as_u64().unwrap();
            peak = peak.max(parts.iter().map(|key| bytes(key)).sum::<u64>());
            let name = phase["name"].as_str().unwrap();
            assert_eq!(bytes("weights") >= 656_000 * 4, name != "read", "{phase:?}");
            let trains = !["read", "score"].contains(&name);
            assert_eq!((bytes("grads") >= 656_000 * 4, bytes("states") >= 656_000 * 8), (trains, trains), "{phase:?}");
            assert_eq!(bytes("activations") > 0, ["score", "train", "sample"].contains(&name), "{phase:?}");
            assert!(bytes("host") > 5 << 20, "{phase:?}");
        }
        assert_eq!(plan["peak_bytes"].as_u64(), Some(peak));
    }
    let names = |plan: &Value| phases(plan).iter().map(|p| p["name"].as_str().unwrap().to_string()).collect::<Vec<_>>();
    assert_eq!(names(&with_data), ["read", "score", "load", "train", "sample", "save"]);
    assert_eq!(names(&plan("--model model")), ["read", "score", "load", "train", "save"]);

    let activations = |flags: &str| phases(&plan(flags))[3]["activations"].as_u64().unwrap();
    assert!(activations("--model model --recompute") < activations("--model model"));
    let table = w.ok(&format!("{} --model model --output-dir run", TRAIN.replace("train ", "plan "))).stdout;
    assert!(table.contains("peak ") && table.contains("GFLOP a step, 656000 parameters"), "{table}");
}

#[test]
fn a_limit_on_memory_chooses_settings() {
    let w = Workspace::with_reviews(60);
    let base = "plan --objective sigmoid --beta 0.1 --model model --dataset train.jsonl --batch-size 30";
    let plan = |flags: &str| parse(&w.ok(&format!("{base} {flags} --json")).stdout);
    let of = |plan: &Value| {
        let tokens = plan["micro_batch_tokens"].as_u64().unwrap();
        (tokens, plan["recompute"] == json!(true), plan["peak_bytes"].as_u64().unwrap())
    };
    let (whole, recompute, most) = of(&plan("--ram 100GiB"));
    assert!(!recompute && whole > 512, "{whole}: the whole step in one micro-batch");
    assert_eq!(of(&plan("--ram auto")), (whole, false, most));
    let (_, _, least) = of(&plan("--micro-batch-tokens 1 --recompute"));

    let mut previous = (whole, false);
    for percent in [90, 60, 30, 10] {
        let limit = least + (most - least) * percent / 100;
        let (tokens, recompute, peak) = of(&plan(&format!("--ram {}KiB", limit / 1024)));
        assert!(peak <= limit && (recompute || tokens <= previous.0), "{percent} %: {tokens} {recompute} {peak}");
        assert_eq!(peak, of(&plan(&format!("--micro-batch-tokens {tokens} --recompute={recompute}"))).2);
        previous = (tokens, recompute);
    }
    assert!(previous.0 < whole || previous.1);

    // What is given stays: a micro-batch leaves recompute to choose, both leave nothing but to look.
    let fixed = |flags: &str| of(&plan(&format!("--micro-batch-tokens {whole} {flags}")));
    let (_, _, recomputed) = fixed("--recompute");
    let (tokens, recompute, _) = fixed(&format!("--ram {}KiB", recomputed / 1024 + 1));
    assert_eq!((tokens, recompute), (whole, true));
    let device = of(&plan(&format!("--vram {}KiB", most / 1024)));
    assert_eq!((device.0, device.1), (whole, false));

    let fails = |flags: &str, parts: &[&str]| w.fails(1, &format!("{base} {flags}"), parts);
    fails("--ram 1MiB", &["--ram: nothing fits in 1.0 MiB", "the longest has", "alone take"]);
    let tight = format!("--ram {}KiB", least / 1024 - 8);
    fails(&tight, &["one example at a time", "a lower --max-length"]);
    fails(
        &format!("{tight} --micro-batch-tokens 1024"),
        &["--micro-batch-tokens 1024", "leave --micro-batch-tokens out"],
    );
    w.fails(2, &format!("{base} --ram 1G --vram 1G"), &["cannot be used with"]);
    w.fails(2, &format!("{base} --ram 8"), &["such as 8GiB"]);
    fails("--vram auto", &["--vram: auto is what is free on a GPU", "on the CPU"]);
    w.write("r.toml", "ram = '1G'");
    w.fails(2, "plan r.toml", &["unknown key \"ram\""]);

    let text = w.ok(&format!("{base} --ram 100GiB")).stdout;
    assert!(text.contains("<- peak") && text.ends_with(&format!("with\n  --micro-batch-tokens {whole}\n")), "{text}");
    let text = w.ok(base).stdout;
    assert!(text.contains("while training\n") && text.contains("to lower the peak"), "{text}");
}

#[test]
fn a_run_on_a_gpu_is_planned_without_one() {
    const WEIGHTS: u64 = 656_000;
    let w = Workspace::with_reviews(20);
    let base = format!("{} --model model --output-dir run", TRAIN.replace("train ", "plan "));
    let plan = |flags: &str| parse(&w.ok(&format!("{base} {flags} --json")).stdout);
    let (cpu, f32, bf16) = (plan(""), plan("--device cuda"), plan("--device cuda:1 --dtype bf16 --vram 24GiB"));
    assert_eq!([&cpu, &f32, &bf16].map(|plan| plan["gpu"].as_bool().unwrap()), [false, true, true]);
    for (plan, weight, states) in [(&f32, 4, 8), (&bf16, 2, 12)] {
        let (mut host, mut device) = (0, 0);
        for phase in plan["phases"].as_array().unwrap() {
            let bytes = |key: &str| phase[key].as_u64().unwrap();
            let parts = ["weights", "grads", "states", "activations", "workspace"].map(bytes);
            assert!(bytes("workspace") >= 128 << 20, "what the ops of a GPU share: {phase}");
            assert!(bytes("host") > 16 << 20, "what goes to and from a GPU goes through the host: {phase}");
            (host, device) = (host.max(bytes("host")), device.max(parts.iter().sum()));
            if phase["name"] == "train" {
                let near = |bytes: u64, each: u64| bytes >= each * WEIGHTS && bytes < each * WEIGHTS + WEIGHTS / 4;
                assert!(near(bytes("weights"), weight) && near(bytes("states"), states), "{phase}");
                assert!(near(bytes("grads"), 4), "{phase}");
            }
        }
        assert_eq!((plan["peak_bytes"].as_u64(), plan["peak_device_bytes"].as_u64()), (Some(host), Some(device)));
    }
    let train = |plan: &Value, key: &str| plan["phases"][3][key].as_u64().unwrap();
    let (half, whole) = (train(&bf16, "activations"), train(&f32, "activations"));
    assert!(half * 2 > whole && half < whole * 6 / 10, "statistics stay in f32: {half} of {whole}");
    assert_eq!(train(&cpu, "activations"), whole);

    let text = w.ok(&format!("{base} --device cuda --dtype bf16 --vram 24GiB")).stdout;
    for part in ["GPU        host\n", "peak of the GPU ", "peak of the host ", "fits in --vram 24.0 GiB"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    w.fails(1, &format!("{base} --device cuda --vram 130MiB"), &["--vram: nothing fits in 130.0 MiB"]);
    w.fails(1, &format!("{base} --device cuda --ram 1MiB"), &["--ram: nothing fits in 1.0 MiB", "max-length"]);
}

/// What it would do on a GPU, tests/cuda shows.
#[test]
fn what_needs_a_gpu_says_so() {
    let w = Workspace::with_reviews(12);
    let generate = "generate --model model --prompt Hi --max-new-tokens 2";
    let score = "--model model --dataset train.jsonl";
    let train = format!("{TRAIN} --model model --output-dir run");
    for line in [generate, &format!("eval {score}"), &format!("logps {score} --out -"), &train] {
        w.fails(1, &format!("{line} --device cuda"), &["--device cuda:0: ", "NVIDIA driver"]);
        let message = w.fails(2, &format!("{line} --device cuda:1 --no-amx"), &["--no-amx: does nothing with"]);
        assert!(message.contains("--device cuda:1"), "{message}");
        w.fails(2, &format!("{line} --device cpu --batch-invariant"), &["--batch-invariant: does nothing with"]);
        w.fails(2, &format!("{line} --device gpu"), &["expected auto, cpu, cuda or cuda:N"]);
        if line != train {
            w.fails(1, &format!("{line} --dtype bf16"), &["--dtype: bf16 needs a GPU"]);
        }
    }
    assert_eq!(w.ok(&format!("{generate} --device cpu")).stdout, w.ok(generate).stdout);
    w.fails(1, &format!("plan {} --device cuda --vram auto", &train["train ".len()..]), &["NVIDIA driver"]);
    w.fails(1, &format!("{train} --profile-steps 1..2"), &["--profile-steps: ", "computes on the CPU"]);
    w.fails(1, &format!("{train} --profile-steps 2..5"), &["5 is after the last step, 4"]);
    w.fails(2, &format!("{train} --profile-steps 2..1"), &["expected two steps, such as 5..8"]);
    assert!(!w.exists("run"), "nothing was begun");
}

/// The bound is what an allocator and a system may differ by; the model itself takes 10 MiB.
#[test]
fn a_run_takes_what_its_plan_says() {
    const BOUND: usize = 6 << 20;
    let w = Workspace::with_reviews(200);
    for flags in ["", "--recompute", "--micro-batch-tokens 300"] {
        let shared = "--objective sigmoid --beta 0.1 --model model --dataset train.jsonl --max-steps 3 --batch-size 64";
        let shared = format!("{shared} --save-steps 2 {flags} --output-dir run{}", flags.len());
        let planned = parse(&w.ok(&format!("plan {shared} --json")).stdout)["peak_bytes"].as_u64().unwrap() as usize;
        let peak = w.spawn(&format!("train {shared}")).peak_memory();
        assert!(planned.abs_diff(peak) < BOUND, "{flags}: planned {planned}, was {peak}");
    }
    let text = w.ok("train --objective sft --model model --dataset train.jsonl --max-steps 1 --output-dir x").stdout;
    assert!(text.lines().any(|line| line.starts_with("peak memory ") && line.contains("(planned ")), "{text}");
}

#[test]
fn a_doctor_says_what_is_there() {
    let w = Workspace::new();
    let text = w.ok("doctor").stdout;
    let parts = ["threads", "the kernels use", "GFLOP/s", "GB/s", "available", "NVIDIA driver", "works"];
    parts.iter().for_each(|part| assert!(text.contains(part), "{part}: {text}"));
    let found = parse(&w.ok("doctor --json --cache-dir other").stdout);
    assert!(found["flops_per_second"].as_f64() > Some(1e7) && found["memory_bytes_per_second"].as_f64() > Some(1e7));
    assert!(found["cores"]["allowed"].as_u64() > Some(0) && found["problem"].is_null(), "{found}");
    assert_eq!(found["cache"]["dir"], json!("other"));
    assert!(!w.exists("other"), "a doctor only looks");

    w.write("file", "");
    let failed = w.run("doctor --cache-dir file/cache");
    assert_eq!(failed.code, Some(1));
    assert!(failed.stdout.contains("cannot train here"), "{}", failed.stdout);
    assert!(failed.error().starts_with("--cache-dir: file/cache: cannot be written to"), "{}", failed.stderr);
}

#[test]
fn list_names_what_there_is() {
    let w = Workspace::new();
    let objectives = w.ok("list objectives").stdout;
    for entry in objectives::all() {
        let line = objectives.lines().find(|line| line.split(' ').next() == Some(entry.name));
        let line = line.unwrap_or_else(|| panic!("{} is not in {objectives}", entry.name));
        entry.aliases.iter().for_each(|alias| assert!(line.contains(alias), "{line}"));
        entry.params.iter().for_each(|param| assert!(line.contains(&param.flag()), "{line}"));
    }
    assert!(w.ok("list optimizers").stdout.starts_with("adamw "));
    let architectures = w.ok("list architectures").stdout;
    for name in ["llama", "mistral", "qwen2", "qwen3", "gpt_neox", "gpt2"] {
        assert!(architectures.lines().any(|line| line.starts_with(&format!("{name} "))), "{architectures}");
    }
}

#[test]
fn help_is_a_result() {
    let w = Workspace::new();
    let all = w.ok("--help");
    assert!(all.stdout.contains("cuvee train recipes/quickstart.toml") && all.stderr.is_empty(), "{}", all.stdout);
    for command in ["train", "plan", "doctor", "logps", "eval", "generate", "list"] {
        assert!(all.stdout.contains(command), "{command}");
        let help = w.ok(&format!("{command} --help"));
        assert!(help.stdout.contains("Usage: cuvee") && help.stderr.is_empty(), "{}", help.stdout);
    }
    assert_eq!(w.ok("--version").stdout, format!("cuvee {}\n", env!("CARGO_PKG_VERSION")));
    assert_eq!(w.run("").code, Some(2));
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let w = Workspace::with_reviews(12);
    for line in [
        "--help",
        "list objectives",
        "eval --model model --dataset train.jsonl --json",
        "generate --model model --prompt Review: --max-new-tokens 3 --samples 2",
        &format!("{TRAIN} --model model --eval-dataset heldout.jsonl --output-dir run"),
    ] {
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        let done = Running::new(w.command(line).stdout(writer)).wait();
        assert_eq!(done.code, Some(0), "{line}: {}", done.stderr);
    }
    // Nor is it one that training should die of: `cuvee train .. 2>&1 | head -1`.
    let (reader, writer) = pipe().unwrap();
    drop(reader);
    let line = format!("{TRAIN} --model model --eval-dataset heldout.jsonl --eval-steps 1 --output-dir run");
    let mut command = w.command(&line);
    let done = Running::new(command.stdout(writer.try_clone().unwrap()).stderr(writer)).wait();
    assert_eq!((done.code, done.signal), (Some(0), None));
    assert!(w.exists("run.1/model.safetensors") && w.exists("run/model.safetensors"));
}

// ---- train -----------------------------------------------------------------------------------------------------

#[test]
fn a_run_writes_what_scripts_expect() {
    let w = Workspace::with_reviews(30);
    let line = format!(
        "{TRAIN} --model model --eval-dataset heldout.jsonl --eval-steps 2 --samples 1 --max-new-tokens 4 --output-dir run"
    );
    let done = w.ok(&line);
    for part in ["before", "after", "pair accuracy", "4 steps in", "model   run\n", "curves  run/curves.svg"] {
        assert!(done.stdout.contains(part), "{part}: {}", done.stdout);
    }
    for talk in ["dropped", "/4 steps", "evaluating", "scoring"] {
        assert!(!done.stdout.contains(talk), "{talk}: {}", done.stdout);
    }
    let metrics = w.lines("run/metrics.jsonl");
    for (i, line) in metrics.iter().enumerate() {
        let expected = "step epoch loss grad_norm lost_updates learning_rate rewards/chosen rewards/rejected rewards/margins \
            rewards/accuracies logps/chosen logps/rejected step_time tokens num_tokens";
        assert_eq!(keys(line).join(" "), expected);
        assert_eq!(line["step"], json!(i + 1));
        assert!(line.values().all(Value::is_number));
    }
    assert_eq!(w.column("run/metrics.jsonl", "learning_rate"), [5e-4, 3.75e-4, 2.5e-4, 1.25e-4]);

    // Prompts are counted once for each completion in num_tokens, once for a pair in tokens.
    let tokenizer = Tokenizer::load(&w.path("model")).unwrap();
    w.ok("logps --model model --dataset train.jsonl --out logps.jsonl --max-length 40");
    let scored = w.lines("logps.jsonl").into_iter().filter(|line| line.len() == 5);
    let prompt = tokenizer.encode("Review:").unwrap().len() as u64;
    let lens: Vec<u64> =
        scored.map(|l| l["tokens_chosen"].as_u64().unwrap() + l["tokens_rejected"].as_u64().unwrap()).collect();
    let no_shuffle = line.replace("--output-dir run", "--no-shuffle --output-dir straight");
    w.ok(&no_shuffle);
    let (mut counted, tokens) = (0, w.column("straight/metrics.jsonl", "tokens"));
    for (step, batch) in lens.chunks(4).take(4).enumerate() {
        let pairs = batch.len() as u64;
        counted += batch.iter().sum::<u64>() + 2 * pairs * prompt;
        assert_eq!(w.column("straight/metrics.jsonl", "num_tokens")[step] as u64, counted);
        // A completion's last token predicts nothing, so it need not be run.
        let rows = batch.iter().sum::<u64>() + pairs * prompt;
        assert!((rows - 2 * pairs..=rows).contains(&(tokens[step] as u64)), "{} of {rows}", tokens[step]);
    }

    let state = w.json("run/trainer_state.json");
    assert_eq!(
        (&state["global_step"], &state["max_steps"], &state["logging_steps"]),
        (&json!(4), &json!(4), &json!(1))
    );
    assert_eq!((&state["eval_steps"], &state["train_batch_size"]), (&json!(2), &json!(4)));
    assert_eq!(state["num_input_tokens_seen"], metrics[3]["num_tokens"]);
    assert_eq!(state["epoch"], metrics[3]["epoch"]);
    assert!(state["total_flos"].as_f64() > Some(0.0));
    let history = state["log_history"].as_array().unwrap();
    let steps: Vec<(u64, bool)> =
        history.iter().map(|line| (line["step"].as_u64().unwrap(), line.get("eval_loss").is_some())).collect();
    let expected = [(0, true), (1, false), (2, false), (2, true), (3, false), (4, false), (4, true)];
    assert_eq!(steps, expected);
    for line in metrics {
        assert!(history.contains(&Value::Object(line)));
    }
    assert!(w.text("run/curves.svg").starts_with("<svg"));
    assert_eq!(w.lines("run/samples.jsonl").len(), 2);
    let recipe: toml::Table = w.text("run/recipe.toml").parse().unwrap();
    assert_eq!(recipe["beta"].as_float(), Some(0.1));
}

#[test]
fn sft_logs_no_rewards() {
    let w = Workspace::with_reviews(12);
    w.ok(&format!("{TRAIN} --model model --output-dir run").replace("sigmoid --beta 0.1", "sft"));
    let expected = "step epoch loss grad_norm lost_updates learning_rate step_time tokens num_tokens";
    w.lines("run/metrics.jsonl").iter().for_each(|line| assert_eq!(keys(line).join(" "), expected));
}

/// As TRL has them; the recipe that a run leaves behind says it.
#[test]
fn a_learning_rate_that_is_not_given_is_the_objectives() {
    let w = Workspace::with_reviews(4);
    for (objective, rate) in [("sft", 2e-5), ("reward", 1e-4), ("sigmoid --beta 0.1", 1e-6)] {
        let flags = "--model model --dataset train.jsonl --max-length 40 --max-steps 1 --lr-scheduler-type constant";
        w.ok(&format!("train {flags} --objective {objective} --output-dir run"));
        assert_eq!(w.column("run/metrics.jsonl", "learning_rate"), [rate]);
        assert!(
            w.text("run/recipe.toml").contains(&format!("learning_rate = {rate}")),
            "{}",
            w.text("run/recipe.toml")
        );
        std::fs::remove_dir_all(w.path("run")).unwrap();
    }
}

/// The shipped model was made for 256 positions.
#[test]
fn texts_beyond_what_the_model_was_made_for_are_counted() {
    let w = Workspace::with_reviews(4);
    let long = "a dull film ".repeat(200);
    w.write_lines("long.jsonl", &[json!({"text": long}), json!({"text": "short"})]);
    let part = "1 of 2 have more tokens than the 256 that model was made for";
    let logps = w.ok("logps --model model --dataset long.jsonl --out logps.jsonl").stderr;
    assert!(logps.contains(part), "{logps}");
    let trained =
        w.ok("train --objective sft --model model --dataset long.jsonl --max-steps 1 --output-dir run").stderr;
    assert!(trained.contains(part), "{trained}");
    w.write_lines("prompts.jsonl", &[json!({"prompt": "a film ".repeat(200)})]);
    let said = w.ok("generate --model model --prompts prompts.jsonl --out texts.jsonl --max-new-tokens 2").stderr;
    assert!(said.contains("1 of 1 have more tokens"), "{said}");
    assert!(!w.ok("logps --model model --dataset train.jsonl --out short.jsonl").stderr.contains("made for"));
}

/// What training writes is a model like any other, with the same tokens.
#[test]
fn outputs_and_checkpoints_are_models() {
    let w = Workspace::with_reviews(12);
    w.ok(&format!("{TRAIN} --model model --output-dir first --save-steps 2 --eval-dataset heldout.jsonl"));
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        assert!(w.read(&format!("first/{name}")) == w.read(&format!("model/{name}")), "{name}");
    }
    assert_eq!(w.json("first/config.json")["dtype"], json!("float32"));
    assert!(w.read("first/model.safetensors") == w.read("first/checkpoint-4/model.safetensors"));

    let eval = |model: &str| {
        parse(&w.ok(&format!("eval --model {model} --ref-model model --dataset heldout.jsonl --json")).stdout)
    };
    let limited = eval("first --max-length 40");
    let last = w.lines("first/evaluations.jsonl").pop().unwrap();
    for key in ["accuracy", "margin", "perplexity"] {
        assert_eq!(limited[key], last[&format!("eval_{key}")], "{key}");
    }
    assert_eq!(eval("first"), eval("first/checkpoint-4"));
    assert_ne!(eval("first"), eval("first/checkpoint-2"));

    w.ok(&format!("{TRAIN} --model first --output-dir second"));
    w.ok(&format!("{TRAIN} --model first/checkpoint-2 --ref-model model --output-dir third"));
    assert_eq!(w.column("second/metrics.jsonl", "rewards/margins")[0], 0.0);
    assert_ne!(w.column("third/metrics.jsonl", "rewards/margins")[0], 0.0);
    w.ok(&format!("{TRAIN} --model first --init random --seed 3 --output-dir random"));
    let uniform = (2048_f64).ln();
    let tokens = w.column("random/metrics.jsonl", "logps/chosen")[0];
    assert!(tokens < 0.0 && w.column("random/metrics.jsonl", "loss")[0] == std::f64::consts::LN_2, "{uniform}");
    w.ok("generate --model third --prompt Review: --max-new-tokens 2");
}

#[test]
fn recipes_and_flags_are_spelled_as_people_spell_them() {
    let w = Workspace::with_reviews(12);
    w.ok(&format!("{TRAIN} --model model --output-dir flags"));
    let trl = "train --loss_type sigmoid --beta=0.1 --learning_rate 5e-4 --model_name_or_path model --dataset \
        train.jsonl --max_length=40 --per_device_train_batch_size 4 --max_steps 4 --output_dir trl";
    w.ok(trl);

    // Relative paths in a recipe start at its folder, wherever the command is typed.
    std::fs::create_dir_all(w.path("project/recipes")).unwrap();
    std::fs::create_dir_all(w.path("elsewhere")).unwrap();
    let recipe = "objective = 'sigmoid'\nbeta = 0.1\nlearning_rate = 5e-4\nmodel = '../../model'\n\
        dataset = '../../train.jsonl'\nmax_length = 40\nbatch_size = 4\nmax_steps = 9\noutput_dir = '../runs/recipe'\n\
        cache_dir = '../cache'\n";
    w.write("project/recipes/dpo.toml", recipe);
    let elsewhere = w.path("elsewhere");
    let mut command = w.command("train ../project/recipes/dpo.toml --max-steps 4");
    let done = Running::new(command.current_dir(&elsewhere)).wait();
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    assert!(w.exists("project/cache/refs") && w.names("elsewhere").is_empty());
    // The recipe that a run leaves is the run, from anywhere.
    let mut command = w.command("train ../project/runs/recipe/recipe.toml --output-dir ../again");
    let done = Running::new(command.current_dir(&elsewhere)).wait();
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    for run in ["trl", "project/runs/recipe", "again"] {
        assert!(w.read(&format!("{run}/model.safetensors")) == w.read("flags/model.safetensors"), "{run}");
    }
    let shipped = root().join("recipes/quickstart.toml");
    assert!(w.ok(&format!("plan {} --json", shipped.display())).stdout.contains("peak_bytes"));
}

/// An objective that reads no pairs trains on the chosen side alone, and is still measured on both.
#[test]
fn sft_on_pairs_is_evaluated_on_pairs() {
    let w = Workspace::with_reviews(12);
    let flags = "--dataset train.jsonl --eval-dataset heldout.jsonl --max-steps 4 --batch-size 4 --learning-rate 1e-3";
    let done = w.ok(&format!("train --objective sft --model model {flags} --output-dir run"));
    assert!(done.stdout.contains("pair accuracy"), "{}", done.stdout);
    let loss = w.column("run/evaluations.jsonl", "eval_loss");
    let perplexity = w.column("run/evaluations.jsonl", "eval_perplexity");
    loss.iter().zip(&perplexity).for_each(|(loss, perplexity)| assert!((loss.exp() / perplexity - 1.0).abs() < 1e-9));
    let ours = w.column("run/evaluations.jsonl", "eval_accuracy");
    let eval = w.ok("eval --model run --dataset heldout.jsonl --json");
    let eval: serde_json::Value = serde_json::from_str(&eval.stdout).unwrap();
    assert_eq!(eval["accuracy"].as_f64(), ours.last().copied());
}
