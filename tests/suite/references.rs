//! References of every kind, in runs as users start them: several, with other tokenizers, files, one that moves; and what
//! the runs must have in common.

use serde_json::{Value, json};

use crate::program::{Line, Workspace, assert_same, results, reviews};

const TRAIN: &str = "train --beta 0.1 --learning-rate 5e-4 --model model --dataset train.jsonl --eval-dataset \
    heldout.jsonl --max-length 48 --batch-size 6 --max-steps 4 --eval-steps 2 --threads 2";

fn workspace() -> Workspace {
    Workspace::with_reviews(30)
}

/// A second model with the policy's tokenizer: one that was trained a little.
fn with_second_model() -> Workspace {
    let w = workspace();
    w.ok(&format!("{} --objective sft --output-dir other", TRAIN.replace("--beta 0.1 ", "")));
    w
}

/// `other-tokens`: the model under a tokenizer that knows a tenth of the merges, so that texts have more tokens, and calls
/// two letters by each other's ids.
fn with_other_tokens() -> Workspace {
    let w = workspace();
    w.copy_model("other-tokens");
    let mut tokenizer: Value = w.json("other-tokens/tokenizer.json");
    let merges = tokenizer["model"]["merges"].as_array_mut().unwrap();
    merges.truncate(merges.len() / 10);
    let vocab = tokenizer["model"]["vocab"].as_object_mut().unwrap();
    let (a, e) = (vocab["a"].clone(), vocab["e"].clone());
    (vocab["a"], vocab["e"]) = (e, a);
    w.write("other-tokens/tokenizer.json", tokenizer.to_string());
    w
}

/// metrics.jsonl without what only a blend has, and without times.
fn steps(w: &Workspace, run: &str) -> Vec<Line> {
    let keep = |(key, _): &(String, Value)| !key.starts_with("refs/") && key != "step_time";
    let lines = w.lines(&format!("{run}/metrics.jsonl")).into_iter();
    lines.map(|line| line.into_iter().filter(keep).collect()).collect()
}

#[test]
fn as_many_equal_references_as_you_like_are_one() {
    let w = workspace();
    w.ok(&format!("{TRAIN} --objective sigmoid --output-dir one"));
    let two = "--ref-model model --ref-model model";
    for (name, flags) in [
        ("geometric", format!("{two} --ref-weights 0.3,0.7")),
        ("harmonic", format!("{two} --ref-model model --ref-mean harmonic --ref-weights thompson")),
        ("token", format!("{two} --ref-mean arithmetic --ref-level token --ref-weights sliding-window:8")),
        ("clipped", format!("{two} --ref-mean harmonic --ref-weights arwc --ref-clip 0.1")),
        ("weighed", format!("{two} --ref-weights validation-accuracy")),
    ] {
        w.ok(&format!("{TRAIN} --objective sigmoid {flags} --output-dir {name}"));
        assert_eq!(steps(&w, "one"), steps(&w, name), "{name}");
        let line = &w.lines(&format!("{name}/metrics.jsonl"))[3];
        for key in ["weight", "discrimination", "accuracy", "logratio"] {
            assert!(line[&format!("refs/1/{key}")].is_number(), "{name}: {key}");
        }
    }
    // Their losses add to rounding.
    w.ok(&format!("{TRAIN} --objective sigmoid {two} --ref-mean multi-dpo --output-dir multi"));
    for (one, multi) in w.column("one/metrics.jsonl", "loss").iter().zip(w.column("multi/metrics.jsonl", "loss")) {
        assert!((one - multi).abs() < 1e-6, "{one} {multi}");
    }
}

#[test]
fn the_order_of_references_behind_the_anchor_is_a_matter_of_names() {
    let w = with_second_model();
    w.ok(&format!("{} --objective hinge --output-dir third", TRAIN.replace("5e-4", "2e-3")));
    let run = |refs: [&str; 3], flags: &str, out: &str| {
        let refs: String = refs.map(|r| format!("--ref-model {r} ")).concat();
        w.ok(&format!("{TRAIN} --objective sigmoid {refs} {flags} --output-dir {out}"));
        w.lines(&format!("{out}/metrics.jsonl"))
    };
    let flags = "--ref-mean harmonic --ref-weights arwc --ref-clip 0.2";
    let (a, b) = (run(["model", "other", "third"], flags, "a"), run(["model", "third", "other"], flags, "b"));
    for (a, b) in a.iter().zip(&b) {
        let number = |line: &Line, key: &str| line[key].as_f64().unwrap();
        assert!((number(a, "loss") - number(b, "loss")).abs() < 1e-5 * number(a, "loss"));
        for key in ["weight", "discrimination", "accuracy", "logratio"] {
            let (first, second) = (format!("refs/1/{key}"), format!("refs/2/{key}"));
            assert!((number(a, &first) - number(b, &second)).abs() < 1e-4, "{key}: {a:?} {b:?}");
        }
    }
    assert_ne!(a[0]["refs/1/discrimination"], a[0]["refs/2/discrimination"]);
}

/// A reference under another tokenizer says what `cuvee logps` says about it alone.
#[test]
fn a_reference_scores_texts_as_its_own_tokens() {
    let w = with_other_tokens();
    w.ok(&format!("{TRAIN} --objective sigmoid --ref-model model --ref-model other-tokens --kl-samples 4 --max-new-tokens 8 --no-shuffle --output-dir run"));
    w.ok("logps --model other-tokens --dataset train.jsonl --out theirs.jsonl");
    w.ok("logps --model model --dataset train.jsonl --max-length 48 --out ours.jsonl");
    // The six rows of the first step: those that are not too long for the policy's tokenizer.
    let rows = |name: &str| w.lines(name);
    let kept: Vec<usize> =
        (0..30).filter(|row| rows("ours.jsonl")[*row].contains_key("logps_chosen")).take(6).collect();
    let gap = |name: &str| {
        let of = |line: &Line| line["logps_chosen"].as_f64().unwrap() - line["logps_rejected"].as_f64().unwrap();
        kept.iter().map(|row| of(&rows(name)[*row]).abs()).sum::<f64>() / 6.0
    };
    let first = &w.lines("run/metrics.jsonl")[0];
    for (k, name) in ["ours.jsonl", "theirs.jsonl"].into_iter().enumerate() {
        let found = first[&format!("refs/{k}/discrimination")].as_f64().unwrap();
        assert!((found - gap(name)).abs() < 1e-9 * found, "{name}: {found} instead of {}", gap(name));
    }
    assert!((gap("ours.jsonl") - gap("theirs.jsonl")).abs() > 1e-3, "the tokens do not differ");
    let last = w.lines("run/evaluations.jsonl").pop().unwrap();
    assert!(last["eval_kl"].is_number() && last["eval_kl/1"].as_f64().unwrap() > last["eval_kl"].as_f64().unwrap());

    let eval = |reference: &str| -> Value {
        let line = format!("eval --model run --ref-model {reference} --dataset heldout.jsonl --json");
        serde_json::from_str(&w.ok(&line).stdout).unwrap()
    };
    assert_ne!(eval("model")["margin"], eval("other-tokens")["margin"]);

    for (flags, what) in [
        ("--objective sigmoid --ref-mean harmonic --ref-level token", "log-probabilities of each token"),
        ("--objective sigmoid --kl-penalty 0.1", "distributions over the policy's tokens"),
        ("--objective kto", "completions put under other prompts"),
    ] {
        let line = format!("{TRAIN} {flags} --ref-model model --ref-model other-tokens --output-dir refused");
        w.fails(1, &line, &["--ref-model: other-tokens has another tokenizer than --model", what]);
    }
    let cut = TRAIN.replace("--max-length 48", "--max-length 12 --on-overflow truncate");
    w.fails(
        1,
        &format!("{cut} --objective sigmoid --ref-model other-tokens --output-dir refused"),
        &["--on-overflow", "are cut"],
    );
    assert!(!w.exists("refused"));
}

#[test]
fn a_cache_file_made_elsewhere_is_a_reference() {
    let w = workspace();
    w.ok(&format!("{TRAIN} --objective sigmoid --output-dir one"));
    let file = w.cache_file().unwrap();
    std::fs::rename(&file, w.path("elsewhere.logps")).unwrap();
    std::fs::remove_dir_all(w.path("cache")).unwrap();
    w.ok(&format!("{TRAIN} --objective sigmoid --ref-model elsewhere.logps --output-dir two"));
    assert_eq!(steps(&w, "one"), steps(&w, "two"));
    assert!(w.cache_file().is_none(), "nothing had to be scored");

    w.write_lines("train.jsonl", &reviews("train")[30..60]);
    let line = format!("{TRAIN} --objective sigmoid --ref-model elsewhere.logps --output-dir three");
    w.fails(1, &line, &["elsewhere.logps", "made for other data"]);
    let mut bytes = w.read("elsewhere.logps");
    *bytes.last_mut().unwrap() ^= 1;
    w.write("elsewhere.logps", &bytes);
    w.fails(
        1,
        &format!("{TRAIN} --objective sigmoid --ref-model elsewhere.logps --output-dir three"),
        &["elsewhere.logps"],
    );
    assert_eq!(w.read("elsewhere.logps"), bytes, "someone else's file is left alone");
    let kl = "--kl-penalty 0.1 --ref-model elsewhere.logps --output-dir three";
    w.fails(1, &format!("{TRAIN} --objective sigmoid {kl}"), &["--kl-penalty", "holds the data's tokens alone"]);
}

#[test]
fn a_reference_that_moves_follows_the_policy_and_resumes() {
    let w = workspace();
    let line = format!("{TRAIN} --objective sigmoid --no-shuffle --save-steps 2 --ref-sync-steps");
    // A copy after every step: every step starts at a margin of exactly 0.
    w.ok(&format!("{line} 1 --output-dir hard"));
    assert_eq!(w.column("hard/metrics.jsonl", "rewards/margins"), [0.0; 4]);
    // Every second step: the one between has moved.
    w.ok(&format!("{line} 2 --output-dir second"));
    let margins = w.column("second/metrics.jsonl", "rewards/margins");
    assert!(margins[0] == 0.0 && margins[1] != 0.0 && margins[2] == 0.0 && margins[3] != 0.0, "{margins:?}");
    w.ok(&format!("{line} 1 --ref-mixup 0.5 --output-dir soft"));
    assert!(w.column("soft/metrics.jsonl", "rewards/margins")[1..].iter().all(|margin| *margin != 0.0));

    w.ok(&format!("{line} 1 --ref-mixup 0.5 --stop-at-step 2 --output-dir resumed"));
    w.ok(&format!("{line} 1 --ref-mixup 0.5 --resume-from-checkpoint auto --output-dir resumed"));
    assert_same("resumed", &results(&w.path("soft")), &results(&w.path("resumed")));
    // Evaluations compare with what it started as: it has just become the policy.
    let margins = w.column("hard/evaluations.jsonl", "eval_margin");
    assert!(margins[0] == 0.0 && margins.last() != Some(&0.0), "{margins:?}");
    w.fails(
        2,
        &format!("{line} 1 --ref-model model --ref-model model --output-dir x"),
        &["--ref-sync-steps", "one reference"],
    );
    w.fails(2, &format!("{line} 1 --kl-penalty 1 --output-dir x"), &["--kl-penalty", "frozen"]);
    let sft = line.replace("--objective sigmoid", "--objective sft").replace("--beta 0.1 ", "");
    w.fails(1, &format!("{sft} 1 --output-dir x"), &["--ref-sync-steps", "no reference that could move"]);
}

/// Weights that depend on the pairs before are the same after a resume, and so is a running mean.
#[test]
fn what_is_remembered_from_step_to_step_resumes() {
    let w = with_second_model();
    for (name, flags) in [
        ("window", "--objective sigmoid --ref-model model --ref-model other --ref-weights sliding-window:8"),
        ("thompson", "--objective ipo --ref-model model --ref-model other --ref-weights thompson"),
        ("bco", "--objective bco"),
    ] {
        let line = format!("{TRAIN} {flags} --save-steps 2 --output-dir {name}");
        w.ok(&line);
        w.ok(&format!("{line}-resumed --stop-at-step 2"));
        w.ok(&format!("{line}-resumed --resume-from-checkpoint auto"));
        assert_same(name, &results(&w.path(name)), &results(&w.path(&format!("{name}-resumed"))));
    }
    let weights = w.column("window/metrics.jsonl", "refs/0/weight");
    assert!((weights[0] - 0.5).abs() < 1e-12 && (weights[1] - 0.5).abs() > 1e-3, "{weights:?}");
}

#[test]
fn a_kl_penalty_over_the_vocabulary_holds_the_policy_back() {
    let w = with_second_model();
    let line = format!("{TRAIN} --objective sigmoid --ref-model model");
    w.ok(&format!("{line} --kl-penalty 1e-9 --output-dir free"));
    w.ok(&format!("{line} --kl-penalty 500 --output-dir held"));
    let kl = |run: &str| w.column(&format!("{run}/metrics.jsonl"), "kl");
    assert!(kl("free")[0].abs() < 1e-3, "the policy starts as its reference: {:?}", kl("free"));
    assert!(kl("held")[3] < 0.6 * kl("free")[3], "{:?} {:?}", kl("held"), kl("free"));
    // k3 of the data's own tokens is another estimate of the same.
    w.ok(&format!("{line} --kl-penalty 1 --kl-estimator k3 --output-dir k3"));
    w.ok(&format!(
        "{line} --ref-model other --ref-weights 0,1 --kl-penalty 1 --micro-batch-tokens 64 --output-dir two"
    ));
    let first = &w.lines("two/metrics.jsonl")[0];
    assert!(
        first["refs/0/kl"].as_f64().unwrap().abs() < 1e-3 && first["refs/1/kl"].as_f64().unwrap() > 1e-3,
        "{first:?}"
    );
    assert_eq!(first["kl"], first["refs/1/kl"]);
    // An objective without references is held as well.
    let sft = format!(
        "{} --objective sft --ref-model model --kl-penalty 1 --output-dir sft",
        TRAIN.replace("--beta 0.1 ", "")
    );
    w.ok(&sft);
    assert!(w.lines("sft/metrics.jsonl")[3]["kl"].as_f64().unwrap() > 0.0);
    w.fails(2, &format!("{line} --kl-penalty 1 --kl-estimator k1 --output-dir x"), &["gradient of k1 does not depend"]);
}

#[test]
fn labels_train_and_a_batch_of_one_borrows_a_completion() {
    let w = workspace();
    let unpaired = |(i, row): (usize, &Value)| {
        let (completion, label) = if i % 2 == 0 { ("chosen", true) } else { ("rejected", false) };
        json!({"prompt": row["prompt"], "completion": row[completion], "label": label})
    };
    w.write_lines("labelled.jsonl", &reviews("train")[..30].iter().enumerate().map(unpaired).collect::<Vec<_>>());
    let line = TRAIN.replace(
        "--dataset train.jsonl --eval-dataset heldout.jsonl",
        "--dataset labelled.jsonl --eval-dataset labelled.jsonl",
    );
    for objective in ["kto", "apo_zero_unpaired", "bco"] {
        w.ok(&format!("{line} --objective {objective} --output-dir {objective}"));
        let losses = w.column(&format!("{objective}/metrics.jsonl"), "loss");
        assert!(losses.iter().all(|loss| loss.is_finite()) && losses[0] != losses[3], "{objective}: {losses:?}");
    }
    let one = line.replace("--batch-size 6", "--batch-size 1 --no-shuffle").replace("5e-4", "5e-3");
    w.ok(&format!("{one} --objective kto --output-dir one"));
    // Beside it, likelihood is raised of the desirable rows alone.
    w.ok(&format!("{line} --objective kto --objective sft --output-dir both"));
    // Pairs are labels, too.
    w.ok(&format!("{TRAIN} --objective kto --output-dir pairs"));
    let sft = format!("{} --objective sft --output-dir x", line.replace("--beta 0.1 ", ""));
    w.fails(1, &sft, &["labelled.jsonl", "would learn what is labelled undesirable"]);
    w.fails(
        1,
        &format!("{line} --objective sigmoid --output-dir x"),
        &["sigmoid trains on pairs", "these rows are unpaired"],
    );
}

#[test]
fn a_reward_model_trains_and_scores() {
    let w = workspace();
    let line = TRAIN.replace("--beta 0.1 ", "").replace("--max-steps 4", "--max-steps 12");
    w.ok(&format!("{line} --objective reward --save-steps 6 --output-dir rm"));
    let accuracy = w.column("rm/evaluations.jsonl", "eval_accuracy");
    assert_eq!(w.json("rm/config.json")["architectures"], json!(["LlamaForSequenceClassification"]));
    w.ok("score --model rm --dataset heldout.jsonl --max-length 48 --out scores.jsonl");
    let scored = |line: &Line| line.contains_key("score_chosen");
    let scores: Vec<Line> = w.lines("scores.jsonl").into_iter().filter(scored).collect();
    let won = scores.iter().filter(|line| line["score_chosen"].as_f64() > line["score_rejected"].as_f64()).count();
    let share = won as f64 / scores.len() as f64;
    assert!((share - accuracy.last().unwrap()).abs() < 1e-12, "{share} {accuracy:?}");
    w.ok(&format!("{line} --objective reward --save-steps 6 --stop-at-step 6 --output-dir rm2"));
    w.ok(&format!("{line} --objective reward --save-steps 6 --resume-from-checkpoint auto --output-dir rm2"));
    assert_same("resumed", &results(&w.path("rm")), &results(&w.path("rm2")));
    w.fails(1, &format!("{line} --objective reward --samples 2 --output-dir x"), &["--samples", "writes nothing"]);
}

/// A comparison is put together from runs that are there and runs that are not.
#[test]
fn compare_tabulates_and_goes_on() {
    let w = with_second_model();
    let line = "compare --objective sigmoid --beta 0.1 --learning-rate 5e-4 --model model --dataset train.jsonl \
        --eval-dataset heldout.jsonl --max-length 48 --batch-size 6 --max-steps 4 --kl-samples 4 --max-new-tokens 8 \
        --ref-model model --ref-model other --pairs 8,all --seeds 2 --threads 2 --output-dir cmp";
    let table = w.ok(&format!("{line} --arms model,geometric")).stdout;
    for part in ["8 pairs", "all pairs", "model alone", "geometric", "±", "too few seeds to tell", "at equal KL"] {
        assert!(table.contains(part), "{part} is not in\n{table}");
    }
    let before = w.read("cmp/all-pairs/geometric/seed-43/metrics.jsonl");
    let again = w.ok(&format!("{line} --arms model,geometric,mrpo")).stdout;
    assert_eq!(w.read("cmp/all-pairs/geometric/seed-43/metrics.jsonl"), before);
    assert!(
        again.contains("mrpo")
            && w.exists("cmp/compare.svg")
            && !w.exists("cmp/all-pairs/mrpo/seed-42/model.safetensors")
    );
    let json = w.json("cmp/compare.json");
    assert_eq!(json["cells"].as_array().unwrap().len(), 6);
    w.fails(1, &format!("{line} --arms nobody"), &["--arms: there is no arm \"nobody\"", "model, other, geometric"]);
    w.fails(2, &format!("{line} --ref-mean harmonic"), &["--ref-mean: is what compare decides"]);
    w.fails(2, &format!("{line} --save-steps 2"), &["--save-steps: is what compare decides"]);
    // When a recipe's own run is saved is none of its business.
    w.write("one.toml", "save_steps = 2\nstop_at_step = 1\n");
    let recipe = line.replace("compare --objective", "compare one.toml --objective");
    w.fails(1, &format!("{recipe} --arms nobody"), &["--arms: there is no arm"]);
}
