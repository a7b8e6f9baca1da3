//! `cuvee compare` of recipes that list their runs, as users start it.

use std::time::Duration;

use serde_json::{Value, json};

use crate::program::{Finished, Workspace, reviews};

/// A base from random weights, a model that goes on from it, arms that go on from that.
const RECIPE: &str = "
seeds = 1
model = 'model'
dataset = 'train.jsonl'
eval_dataset = 'heldout.jsonl'
objective = 'sigmoid'
beta = 0.1
learning_rate = 1e-4
max_steps = 2
per_device_train_batch_size = 4
max_length = 64
threads = 1
output_dir = 'lab'

[[prepare]]
name = 'base'
shared = true
init = 'random'
objective = 'sft'
max_steps = 1

[[prepare]]
name = 'sft'
model = '@base'
objective = 'sft'
learning_rate = 2e-4
take = 8

[[arm]]
name = 'dpo'
model = '@sft'
skip = 8

[[arm]]
name = 'ondare'
model = '@sft'
base_model = '@base'
optimizer = 'ondare'
reserve_rate = 0.5
[arm.grid]
merge_weight = [1e-7, 1e-3]

[[arm]]
name = 'soup'
merge = { method = 'linear', models = ['@sft=0.5', '@dpo=0.5'] }
";

fn workspace(recipe: &str) -> Workspace {
    let w = Workspace::with_reviews(16);
    w.write_lines("heldout.jsonl", &reviews("heldout")[..4]);
    w.write("lab.toml", recipe);
    w
}

/// Runs `cuvee compare lab.toml`, and what it prints as JSON.
fn compare(w: &Workspace, flags: &str) -> (Value, Finished) {
    let done = w.run(&format!("compare lab.toml --json {flags}"));
    let json = serde_json::from_str(&done.stdout).unwrap_or_else(|e| panic!("{e}: {}{}", done.stdout, done.stderr));
    (json, done)
}

fn arms(json: &Value) -> Vec<&str> {
    json["arms"].as_array().unwrap().iter().map(|arm| arm["arm"].as_str().unwrap()).collect()
}

fn arm<'j>(json: &'j Value, name: &str) -> &'j Value {
    json["arms"].as_array().unwrap().iter().find(|arm| arm["arm"] == name).unwrap_or_else(|| panic!("{name}: {json}"))
}

fn times(w: &Workspace, runs: &[&str]) -> Vec<std::time::SystemTime> {
    let of = |run: &&str| w.path(&format!("lab/runs/{run}/job.json")).metadata().unwrap().modified().unwrap();
    runs.iter().map(of).collect()
}

#[test]
fn runs_start_from_each_other_and_are_not_run_twice() {
    let w = workspace(RECIPE);
    let (json, done) = compare(&w, "--jobs 2");
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    let all = ["base", "sft", "dpo", "ondare merge_weight=1e-7", "ondare merge_weight=1e-3", "soup"];
    assert_eq!(arms(&json), all);
    assert_eq!(json["baseline"], "dpo");
    let accuracy = arm(&json, "dpo")["mean"]["eval_accuracy"].as_f64().unwrap();
    assert!((0.0..=1.0).contains(&accuracy), "{json}");
    assert_eq!(arm(&json, "ondare merge_weight=1e-3")["method"], "ondare");
    assert!(w.exists("lab/compare.svg") && w.text("lab/compare.md").starts_with("| arm | runs | eval_accuracy |"));
    // The seed of those that share none, and the same base for all.
    let soup = "soup/seed-42";
    let runs = ["base/seed-42", "sft/seed-42", "dpo/seed-42", "ondare-merge_weight-1e-3/seed-42", soup];
    runs.iter().for_each(|run| assert!(w.exists(&format!("lab/runs/{run}/model/model.safetensors")), "{run}"));

    // Another seed adds runs; a changed arm is run anew, and what it was is still there.
    let before = times(&w, &runs);
    let changed = RECIPE.replace("skip = 8", "skip = 8\nlearning_rate = 3e-4");
    w.write("lab.toml", changed);
    let (json, done) = compare(&w, "--seeds 2");
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    assert!(done.stderr.contains("dpo, seed 42: its settings or its data changed"), "{}", done.stderr);
    assert_eq!(arm(&json, "sft")["runs"].as_array().unwrap().len(), 2);
    assert!(arm(&json, "sft")["sd"]["eval_perplexity"].is_number() && w.exists("lab/runs/dpo/seed-42.1/model"));
    let after = times(&w, &runs);
    let same: Vec<bool> = before.iter().zip(&after).map(|(a, b)| a == b).collect();
    // The soup is made of the arm that changed.
    assert_eq!(same, [true, true, false, true, false]);

    // A changed file of data changes everything that was made of it.
    w.write_lines("train.jsonl", &reviews("train")[1..17]);
    let (_, done) = compare(&w, "--arms dpo");
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    assert!(done.stderr.contains("base: its settings or its data changed"), "{}", done.stderr);
}

#[test]
fn what_destroys_base_ability_is_named_and_what_fails_stops_nothing() {
    let recipe = format!(
        "{RECIPE}
[[arm]]
name = 'wild'
model = '@sft'
learning_rate = 0.03
max_steps = 4

[[arm]]
name = 'broken'
model = '@sft'
max_length = 2

[[arm]]
name = 'after'
model = '@broken'

[measure]
baseline = '@sft'
ability = 'eval_loss'
reward = 'eval_accuracy'
"
    );
    let w = workspace(&recipe.replace("objective = 'sigmoid'", "objective = 'sft'").replace("beta = 0.1", ""));
    let (json, done) = compare(&w, "--arms dpo --grid learning_rate=1e-5,2e-5 --grid max_steps=1");
    let searched = ["base", "sft", "dpo learning_rate=1e-5 max_steps=1", "dpo learning_rate=2e-5 max_steps=1"];
    assert_eq!((done.code, arms(&json)), (Some(0), searched.to_vec()), "{}", done.stderr);
    // Without the grid every arm has the rate that it asks for.
    let (json, done) = compare(&w, "--arms dpo,wild,broken,after,soup");
    assert_eq!((done.code, &arm(&json, "wild")["loses_base_ability"]), (Some(1), &json!(true)), "{json}");
    assert_eq!(arm(&json, "dpo")["loses_base_ability"], false, "{json}");
    let text = w.text("lab/compare.txt");
    assert!(text.contains("loses base ability: wild: eval_loss ") && text.contains("FAILED: broken"), "{text}");
    assert!(text.contains("--max-length"), "its last lines are shown: {text}");
    assert!(text.contains("left out, as broken, seed 42 is missing"), "{text}");
    assert!(w.exists("lab/runs/soup/seed-42/model/model.safetensors"));
}

#[test]
fn a_killed_experiment_goes_on_where_it_stopped() {
    let recipe =
        RECIPE.replace("max_steps = 2", "max_steps = 30").replace("threads = 1", "threads = 1\nsave_steps = 5");
    let w = workspace(&recipe);
    let whole = workspace(&recipe);
    compare(&whole, "--arms dpo");
    let mut running = w.spawn("compare lab.toml --arms dpo");
    assert!(running.wait_until(|| w.exists("lab/runs/dpo/seed-42/model/checkpoint-5")));
    // Another one in the same folder is told so.
    w.fails(1, "compare lab.toml --arms dpo", &["another cuvee run is working in this folder"]);
    running.signal(libc::SIGINT);
    let finished = running.wait();
    assert_eq!(finished.code, Some(130), "{}", finished.stderr);
    assert!(finished.stderr.contains("goes on where it stopped"), "{}", finished.stderr);
    let sft = times(&w, &["sft/seed-42"]);

    // Killed at once, its process may still be at work when the next one starts.
    let mut running = w.spawn("compare lab.toml --arms dpo");
    assert!(running.wait_until(|| w.exists("lab/runs/dpo/seed-42/model/checkpoint-10")));
    running.kill();
    std::thread::sleep(Duration::from_millis(50));
    let (_, done) = compare(&w, "--arms dpo");
    assert_eq!((done.code, times(&w, &["sft/seed-42"])), (Some(0), sft), "{}", done.stderr);
    let model = "lab/runs/dpo/seed-42/model/model.safetensors";
    assert!(w.read(model) == whole.read(model), "it is not the run that nobody interrupted");
}

#[test]
fn a_recipe_that_cannot_be_run_is_refused_before_anything_runs() {
    let w = workspace(RECIPE);
    let circle = "[[arm]]\nname = 'a'\nmodel = '@b'\n[[arm]]\nname = 'b'\nmodel = '@a'";
    let cases = [
        (circle, "runs start from each other: a from b from a"),
        ("[[arm]]\nname = 'a'\nmodel = '@stf'", "there is no run @stf; did you mean \"@sft\"?"),
        ("[[arm]]\nname = 'a'\nlearning_rat = 1", "a: unknown key \"learning_rat\"; did you mean \"learning_rate\"?"),
        ("[[arm]]\nname = 'a'\ngird = {}", "unknown key \"gird\"; did you mean \"grid\"?"),
        ("[[arm]]\nname = 'a'\nbeta = 'high'", "a: beta: expected a number"),
        ("[[arm]]\nname = 'a'\nreserve_rate = 0.5", "--reserve-rate: adamw does not use it"),
        ("[[arm]]\nname = 'a'\nseed = 3", "a: seed: is what compare decides"),
        ("[[arm]]\nname = 'a'\nmodel = 'nowhere'", "nowhere: No such file"),
        ("[[arm]]\nmodel = '@sft'", "a run has no name"),
        ("[[arm]]\nname = 'dpo'", "two runs are called \"dpo\""),
        ("[[arm]]\nname = 'sft?'\n[[arm]]\nname = 'sft-'", "two runs would be in one folder, sft-"),
        ("[[arm]]\nname = 'a'\nshared = true", "shared: is for [[prepare]]"),
        ("[[prepare]]\nname = 'a'\nshared = true\nmodel = '@sft'", "a: is shared by all seeds and starts from sft"),
        ("[[arm]]\nname = 'a'\nmerge = { method = 'linaer', models = ['@sft'] }", "linear"),
        ("[[arm]]\nname = 'a'\nmerge = { method = 'linear', model = ['@sft', '@dpo'], densty = 1 }", "\"density\""),
        ("[[arm]]\nname = 'a'\nbeta = 1\nmerge = { method = 'linear' }", "beta: does nothing where nothing is trained"),
        ("[[arm]]\nname = 'a'\n[arm.grid]\nbeta = 1", "a: grid: beta: expected a list of values"),
        ("[arm2]", "unknown key \"arm2\"; did you mean \"arm\"?"),
        ("[measure]\nbaseline = '@spo'", "[measure]: baseline: there is no run @spo; did you mean \"@dpo\"?"),
        ("[measure]\nreward = 'x/acc'", "is of no task"),
    ];
    for (text, expected) in cases {
        w.write("lab.toml", format!("{RECIPE}\n{text}"));
        let done = w.run("compare lab.toml");
        assert!(matches!(done.code, Some(1 | 2)) && done.stderr.contains(expected), "{text}:\n{}", done.stderr);
        assert!(!w.exists("lab/runs"), "{text}");
    }
    w.write("lab.toml", RECIPE);
    w.fails(2, "compare lab.toml --grid merge_wieght=1", &["--grid: no arm takes merge_wieght"]);
    w.fails(2, "compare lab.toml --grid merge_weight", &["merge_weight=1e-7,1e-5,1e-3"]);
    w.fails(2, "compare lab.toml --arms nobody", &["--arms: there is no arm \"nobody\"; there are dpo, ondare, soup"]);
    w.fails(2, "compare lab.toml --pairs 4", &["--pairs: is for comparing references"]);
    w.fails(2, "compare none.toml", &["none.toml: no such recipe"]);
}

#[test]
fn rows_that_are_skipped_or_not_taken_are_not_there() {
    let w = Workspace::with_reviews(20);
    w.write_lines("part.jsonl", &reviews("train")[4..12]);
    let train = "train --objective sigmoid --beta 0.1 --learning-rate 5e-4 --model model --max-length 48 --batch-size 3 \
        --max-steps 3 --threads 1 --output-dir";
    w.ok(&format!("{train} part --dataset part.jsonl"));
    w.ok(&format!("{train} same --dataset train.jsonl --skip 4 --take 8"));
    assert!(w.read("part/model.safetensors") == w.read("same/model.safetensors"));
    w.ok(&format!("{train} rest --dataset train.jsonl --skip 4"));
    assert!(w.read("part/model.safetensors") != w.read("rest/model.safetensors"));
    for (flags, expected) in [
        ("--skip 21", "--skip: reaches to row 21, train.jsonl has 20; give less"),
        ("--skip 20", "--skip: leaves nothing of the 20 rows of train.jsonl"),
        ("--skip 15 --take 6", "--take: reaches to row 21, train.jsonl has 20"),
        ("--take 5 --limit 6", "--limit: 6 rows asked for"),
    ] {
        w.fails(1, &format!("{train} x --dataset train.jsonl {flags}"), &[expected]);
    }
}
