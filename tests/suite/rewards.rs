//! Rewards as users look at them, and reward models among them.

use std::fs;
use std::path::PathBuf;

use cuvee::data::{Content, Packing};
use cuvee::device::{Cpu, Storage};
use cuvee::rewards::{Jury, RewardSpec, Rewards, Sample};
use serde_json::{Value, json};

use crate::program::{Line, Workspace, root};

const PACKING: Packing = Packing::new(256);

/// With `rm` and `rm2`, two reward models that differ.
fn with_reward_models() -> Workspace {
    let w = Workspace::with_reviews(30);
    for (name, seed) in [("rm", 0), ("rm2", 1)] {
        w.ok(&format!(
            "train --objective reward --learning-rate 5e-4 --model model --dataset train.jsonl --max-length 48 --batch-size 6 \
             --max-steps 2 --threads 2 --seed {seed} --output-dir {name}"
        ));
    }
    w
}

fn number(line: &Line, key: &str) -> f64 {
    line[key].as_f64().unwrap_or_else(|| panic!("{key} in {line:?}"))
}

fn open(what: PathBuf) -> Rewards {
    Rewards::open(&[RewardSpec { what, weight: 1.0, fluency: false }]).unwrap()
}

fn sample<'a>(prompt: &'a Content, completion: &'a str) -> Sample<'a> {
    Sample { prompt, completion, answer: None, row: 3, prompt_ids: &[], completion_ids: &[], finished: true }
}

#[test]
fn the_shipped_reward_orders_reviews() {
    let w = Workspace::new();
    let (recipe, held_out) =
        (root().join("recipes/rewards/film.toml"), root().join("assets/film-reviews/heldout.jsonl.gz"));
    let score = format!("score --reward {} --threads 2", recipe.display());
    let said = w.ok(&format!("{score} --dataset {} --out scores.jsonl", held_out.display())).stderr;
    let lines = w.lines("scores.jsonl");
    assert_eq!(lines.len(), 400);
    let won = |key: &str| {
        let of = |line: &Line, side: &str| line[&format!("rewards_{side}")][key].as_f64().unwrap();
        lines.iter().filter(|line| of(line, "chosen") > of(line, "rejected")).count() as f64 / 400.0
    };
    assert!(won("lexicon") > 0.9, "{}", won("lexicon"));
    for part in ["lexicon: mean ", "% of 400 pairs", "repetition: mean -0.", "weighted sum: mean "] {
        assert!(said.contains(part), "{said}");
    }
    for line in &lines {
        let each = line["rewards_chosen"].as_object().unwrap();
        let sum: f64 = each.values().map(|value| value.as_f64().unwrap()).sum();
        assert!((sum - number(line, "reward_chosen")).abs() < 1e-12);
    }
    let text = |text: &str| -> Value {
        let mut command = w.command(&score);
        serde_json::from_slice(&command.args(["--text", text]).output().unwrap().stdout).unwrap()
    };
    let (good, bad, same) =
        (text("a wonderful, touching film about us"), text("a dull mess of a film"), text("good good good"));
    assert!(good["reward"].as_f64() > bad["reward"].as_f64(), "{good} {bad}");
    assert_eq!(same["rewards"]["repetition"], json!(-0.5));
    assert!((same["rewards"]["length"].as_f64().unwrap() + 0.2).abs() < 1e-12, "{same}");
    assert!(same.get("row").is_none());
}

#[test]
fn reward_models_judge_as_score_does() {
    let w = with_reward_models();
    for name in ["rm", "rm2"] {
        w.ok(&format!("score --model {name} --dataset heldout.jsonl --out {name}.jsonl"));
    }
    let panel = |options: &str| format!("[[reward]]\nname = 'both'\nkind = 'model'\ndirs = ['rm', 'rm2']\n{options}\n");
    w.write("both.toml", panel("pessimism = 0.5\nweight = 2"));
    w.ok("score --reward rm --reward both.toml=-1 --dataset heldout.jsonl --out rewards.jsonl --micro-batch-tokens 50");
    let (ours, one, two) = (w.lines("rewards.jsonl"), w.lines("rm.jsonl"), w.lines("rm2.jsonl"));
    assert_eq!((ours.len(), one.len()), (16, 16));
    for ((ours, one), two) in ours.iter().zip(&one).zip(&two) {
        for side in ["chosen", "rejected"] {
            let (a, b) = (number(one, &format!("score_{side}")), number(two, &format!("score_{side}")));
            let each = &ours[&format!("rewards_{side}")];
            // To the last bit: in another batch, and with its prompt shared.
            assert_eq!(each["rm"].as_f64().unwrap(), a);
            let doubt = (a - b).abs() / 2.0;
            assert!((each["both"].as_f64().unwrap() - ((a + b) / 2.0 - 0.5 * doubt)).abs() < 1e-9, "{each} {a} {b}");
            let sum = a - 2.0 * each["both"].as_f64().unwrap();
            assert!((number(ours, &format!("reward_{side}")) - sum).abs() < 1e-9);
        }
    }

    let (cpu, prompt) = (Cpu::new(2).unwrap(), Content::Text("Review:".into()));
    let rewards = open(w.path("both.toml"));
    let mut jury = Jury::new(&cpu, &rewards, PACKING);
    let long = "fine ".repeat(60);
    let ended = sample(&prompt, " A fine film.");
    let samples = [ended, Sample { finished: false, ..ended }, sample(&prompt, ""), sample(&prompt, &long), ended];
    let scores = jury.score(&samples).unwrap().remove(0);
    assert!(scores.iter().all(|score| score.is_finite()) && scores[0] == scores[4], "{scores:?}");
    assert!(scores[0] != scores[2] && scores[0] != scores[3], "{scores:?}");
    let spreads: Vec<(&str, f64)> = jury.spreads().collect();
    assert!(spreads.len() == 1 && spreads[0].0 == "both" && spreads[0].1 > 0.0, "{spreads:?}");
    // A longer text than any so far: its rotations must be there. What was said before is said again.
    let longest = "a b c d ".repeat(90);
    let longer = sample(&prompt, &longest);
    assert!(jury.score(&[longer]).unwrap()[0][0].is_finite());
    assert_eq!(jury.score(&samples[..2]).unwrap()[0], scores[..2]);
    assert_eq!(Jury::new(&cpu, &rewards, PACKING).score(&samples[1..2]).unwrap()[0], scores[1..2]);
    // Nothing at all is no text.
    let nothing = Content::Text(String::new());
    let cut = Sample { finished: false, ..sample(&nothing, "") };
    assert!(jury.score(&[cut]).unwrap()[0][0].is_nan());

    let largest = cuvee::data::Extent { rows: 256, targets: 16, segments: 16, sequences: 16, longest: 128 };
    let (both, single) = (rewards.plan(Storage::CPU, &largest), open(w.path("rm")).plan(Storage::CPU, &largest));
    assert_eq!((both.resident, both.judging), (2 * single.resident, single.judging));
    assert!(single.resident > 2_000_000 && single.judging > 256 * 128 * 4, "{single:?}");

    let identity = || open(w.path("both.toml")).identity().unwrap();
    let before = identity();
    assert_eq!(before, identity());
    fs::copy(w.path("rm/model.safetensors"), w.path("rm2/model.safetensors")).unwrap();
    assert_ne!(before, identity());
}

#[test]
fn what_cannot_judge_is_refused() {
    let w = Workspace::with_reviews(4);
    let score = "--dataset heldout.jsonl --out s.jsonl";
    w.fails(1, &format!("score --reward model {score}"), &["is a language model, and a reward model"]);
    w.fails(1, &format!("score --reward fluency:nothing {score}"), &["nothing: there is no such folder"]);
    w.fails(1, &format!("score --reward nothing {score}"), &["nothing: there is no such file or folder"]);
    w.fails(2, &format!("score {score}"), &["--model"]);
    w.fails(2, &format!("score --reward a --model b {score}"), &["--reward", "--model"]);
    w.fails(2, &format!("score --reward =1 {score}"), &["expected a reward model's folder or a TOML file"]);
    w.fails(2, &format!("score --model b --tokenizer model {score}"), &["--tokenizer", "--model"]);

    // A model of another vocabulary than its tokenizer's.
    w.copy_model("other");
    for file in ["config.json", "model.safetensors"] {
        fs::copy(root().join("tests/data/reward/llama").join(file), w.path("other").join(file)).unwrap();
    }
    w.ok(&format!("score --reward other {score}"));
    let mut tokenizer = w.json("other/tokenizer.json");
    let vocab = tokenizer["model"]["vocab"].as_object_mut().unwrap();
    vocab.values_mut().filter(|id| id.as_u64() > Some(100)).for_each(|id| *id = json!(id.as_u64().unwrap() + 5000));
    w.write("other/tokenizer.json", tokenizer.to_string());
    w.fails(1, &format!("score --reward other {score}"), &["\"other\"", "of row 0 lies past its vocabulary of"]);
    w.write("one.toml", "[[reward]]\nname = 'm'\nkind = 'model'\ndirs = ['other']\npessimism = 1");
    w.fails(
        1,
        &format!("score --reward one.toml {score}"),
        &["reward \"m\": pessimism: one model has no standard deviation"],
    );
    w.write("none.toml", "[[reward]]\nkind = 'model'\ndirs = []");
    w.fails(1, &format!("score --reward none.toml {score}"), &["reward 1: dirs: expected the folder of one"]);

    let tokens = "[[reward]]\nkind = 'length'\nunit = 'tokens'\nmax = 3\nslope = 1";
    w.write("tokens.toml", tokens);
    w.fails(
        1,
        &format!("score --reward tokens.toml {score}"),
        &["--tokenizer: missing; the reward \"length\" counts tokens"],
    );
    w.ok(&format!("score --reward tokens.toml --tokenizer model {score}"));
    assert!(w.lines("s.jsonl").iter().all(|line| number(line, "reward_chosen") < -3.0));
    w.write("words.toml", tokens.replace("tokens", "words"));
    w.fails(1, &format!("score --reward words.toml --tokenizer model {score}"), &["none of the rewards counts tokens"]);
}

#[test]
fn rewards_are_listed() {
    let w = Workspace::new();
    let listed = w.ok("list rewards").stdout;
    for part in ["exact_match", "gsm8k", "process", "http", "timeout_s: seconds for an answer", "pessimism"] {
        assert!(listed.contains(part), "{listed}");
    }
}
