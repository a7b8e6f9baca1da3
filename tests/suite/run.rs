//! `cuvee run`, as users start it.

use std::collections::BTreeMap;
use std::time::SystemTime;

use serde_json::Value;

use crate::program::{Workspace, reviews};

/// From rows to a report: a reward model, a scale, two ways to align, their soups.
const RECIPE: &str = "
output_dir = 'out'
seeds = 2
threads = 1

[data]
rest = { file = 'train.jsonl', shuffle_seed = 0, skip = 8 }
prompts = { file = '@rest', prompt_words = 2, column = 'chosen' }
asked = { file = '@prompts', take = 4 }

[template]
short = { model = 'model', max_steps = 2, per_device_train_batch_size = 4, max_length = 64, learning_rate = 1e-4 }

[[stage]]
name = 'sft'
kind = 'sft'
like = 'short'
dataset = '@rest'

[[stage]]
name = 'judge'
kind = 'reward'
like = 'short'
dataset = 'train.jsonl'
eval_dataset = 'heldout.jsonl'
take = 8
require = 'accuracy > 0.01'

[[stage]]
name = 'gold'
kind = 'lab scale'
model = '@sft'
prompts = '@asked'
max_new_tokens = 6
reward = ['@judge', 'fluency:model=0.5']
below = ['fluency']

[[stage]]
name = 'grao'
kind = 'train'
like = 'short'
model = '@sft'
objective = 'grao'
dataset = '@prompts'
reward = ['@judge']
num_generations = 2
max_completion_length = 6
eval_anchor = '@sft'
eval_dataset = '@asked'
eval_steps = 1
kl_samples = 4
max_new_tokens = 6
gold_reward = ['@gold']

[[stage]]
name = 'held'
like = 'grao'
ref_model = ['@sft', 'model']
kl_penalty = 0.1
kl_estimator = 'k3'

[[stage]]
name = 'soup'
kind = 'soup'
model = ['@grao', '@held']
weights = [0.5, 1]

[[stage]]
name = 'measured'
kind = 'eval'
model = ['@sft', '@grao', '@soup']
ref_model = '@sft'
prompts = '@asked'
max_new_tokens = 6
reward = ['@gold']
numbers = { gold = 'reward', d = 'sqrt_kl', length = 'words' }
require = 'd >= 0'

[[stage]]
name = 'report'
kind = 'report'
table = '@measured'
front = ['length', 'gold']
";

fn workspace(recipe: &str) -> Workspace {
    let w = Workspace::with_reviews(24);
    w.write_lines("heldout.jsonl", &reviews("heldout")[..4]);
    w.write("run.toml", recipe);
    w
}

/// When each job came to its end, by its folder.
fn times(w: &Workspace) -> BTreeMap<String, SystemTime> {
    let report = w.json("out/report.json");
    let of = |job: &Value| {
        let made = job["makes"].as_str().unwrap();
        let folder = made.rsplit_once('/').unwrap().0.to_string();
        let time = w.path(&format!("{folder}/job.json")).metadata().unwrap().modified().unwrap();
        (folder.trim_start_matches("out/").to_string(), time)
    };
    report["jobs"].as_array().unwrap().iter().map(of).collect()
}

/// Folders of jobs that were run again.
fn again(before: &BTreeMap<String, SystemTime>, after: &BTreeMap<String, SystemTime>) -> Vec<String> {
    after.iter().filter(|(name, time)| before.get(*name) != Some(time)).map(|(name, _)| name.clone()).collect()
}

/// All numbers of a report.
fn numbers(w: &Workspace, folder: &str) -> Value {
    let report = w.json(&format!("{folder}/report.json"));
    let points = &report["gold_over_distance"]["points"];
    let without_time = |point: &Value| {
        let mut point = point.clone();
        point["logged"].as_object_mut().unwrap().remove("runtime");
        point
    };
    let points: Vec<Value> = points.as_array().unwrap().iter().map(without_time).collect();
    assert!(!points.is_empty());
    serde_json::json!([report["rows"], points, report["gold_over_distance"]["fits"]])
}

#[test]
fn stages_make_a_report_and_only_what_changed_is_made_again() {
    let w = workspace(RECIPE);
    let dry = w.ok("run run.toml --dry-run").stdout;
    assert!(dry.contains("2 of 2") && dry.contains("guess") && dry.contains("MiB"), "{dry}");
    assert!(!w.exists("out"));

    let done = w.ok("run run.toml");
    assert!(done.stderr.contains("left") && done.stdout.contains("| grao |"), "{}{}", done.stdout, done.stderr);
    let report = w.json("out/report.json");
    let rows: Vec<&str> = report["rows"].as_array().unwrap().iter().map(|row| row["row"].as_str().unwrap()).collect();
    assert_eq!(rows, ["sft", "grao", "soup 0.5", "soup 1"]);
    assert_eq!(report["columns"], serde_json::json!(["steps", "sampled tokens", "gold", "d", "length"]));
    let (sft, grao) = (&report["rows"][0], &report["rows"][1]);
    assert_eq!((sft["mean"]["d"].as_f64(), grao["mean"]["steps"].as_f64()), (Some(0.0), Some(2.0)));
    assert!(grao["mean"]["d"].as_f64() > Some(0.0) && grao["sd"]["gold"].is_number(), "{grao}");
    let page = w.text("out/report.html");
    assert!(page.contains("<svg") && page.contains("cuvee train out/grao/seed-42/stage.toml") && !page.contains("NaN"));
    assert!(!page.replace("http://www.w3.org/2000/svg", "").contains("http") && !page.contains("src="), "no network");
    assert!(
        w.exists("out/gold-1.svg") && w.exists("out/front.svg") && w.text("out/report.md").starts_with("|  | steps |")
    );
    // Whatever is made says what it came from, and what made it can be asked again alone.
    let soup = w.ok("lineage out/soup-0.5/seed-42/soup-0.5").stdout;
    assert!(soup.contains("grao") && soup.contains("held"), "{soup}");
    let job = report["jobs"].as_array().unwrap().iter().find(|job| job["job"] == "measured: grao, seed 42").unwrap();
    let command = job["command"].as_str().unwrap();
    let line = command.strip_prefix("cuvee ").unwrap().split(" > ").next().unwrap();
    assert_eq!(w.ok(line).stdout, w.text("out/measured/grao/seed-42/eval.json"), "{line}");

    // The same again is nothing to do.
    let before = times(&w);
    w.ok("run run.toml");
    assert_eq!(again(&before, &times(&w)), Vec::<String>::new());
    assert!(w.ok("run run.toml --dry-run").stdout.lines().filter(|line| line.contains("done")).count() >= 9);

    // One stage's parameter: what depends on it, and nothing else.
    w.write("run.toml", RECIPE.replace("kl_penalty = 0.1", "kl_penalty = 0.2"));
    let dry = w.ok("run run.toml --dry-run").stdout;
    let changed = dry.lines().filter(|line| line.contains("2 of 2, changed")).count();
    assert_eq!(changed, 5, "{dry}");
    assert!(dry.contains("took"), "{dry}");
    w.ok("run run.toml");
    let mut expected = Vec::new();
    for stage in ["held", "measured/soup-0.5", "measured/soup-1", "soup-0.5", "soup-1"] {
        expected.extend([42, 43].map(|seed| format!("{stage}/seed-{seed}")));
    }
    assert_eq!(again(&before, &times(&w)), expected);

    // A file's content counts, not its time.
    let before = times(&w);
    w.write("heldout.jsonl", w.read("heldout.jsonl"));
    w.ok("run run.toml");
    assert_eq!(again(&before, &times(&w)), Vec::<String>::new());
    w.write_lines("heldout.jsonl", &reviews("heldout")[1..5]);
    let dry = w.ok("run run.toml --dry-run").stdout;
    let state = |name: &str| dry.lines().find(|line| line.starts_with(name)).unwrap().to_string();
    assert!(
        state("judge").contains("changed") && state("gold").contains("changed") && state("sft").contains("done"),
        "{dry}"
    );
}

/// kill -9 of the processes that a run has left behind: those that work in this folder.
fn kill_children(w: &Workspace) {
    let here = w.path("").canonicalize().unwrap();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let pid: Option<i32> = entry.file_name().to_str().and_then(|name| name.parse().ok());
        if let (Some(pid), Ok(folder)) = (pid, std::fs::read_link(entry.path().join("cwd")))
            && folder == here
        {
            // SAFETY: a process that this test has started works in its folder.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
    }
}

#[test]
fn a_killed_run_is_finished_by_the_same_command_with_the_same_numbers() {
    let recipe = RECIPE.replace("seeds = 2", "seeds = 1").replace("max_steps = 2", "max_steps = 8, save_steps = 1");
    let w = workspace(&recipe);
    w.ok("run run.toml --output-dir calm");

    let mut run = w.spawn("run run.toml");
    let done = |name: &str| w.so_far(&format!("out/{name}/seed-42/job.json")).contains("\"finished\": true");
    let awaited: [&dyn Fn() -> bool; 4] =
        [&|| done("sft"), &|| done("judge"), &|| done("gold"), &|| w.exists("out/grao/seed-42/grao/checkpoint-2")];
    awaited.iter().for_each(|what| assert!(run.wait_until(what), "it ended too early"));
    run.kill();
    kill_children(&w);
    let finished = |name: &str| w.json(&format!("out/{name}/seed-42/job.json"))["finished"] == true;
    assert!(finished("sft") && finished("judge") && finished("gold") && !finished("grao"));
    let time = |name: &str| w.path(&format!("out/{name}/seed-42/job.json")).metadata().unwrap().modified().unwrap();
    let before = ["sft", "judge", "gold"].map(time);
    let done = w.ok("run run.toml");
    assert_eq!(before, ["sft", "judge", "gold"].map(time), "{}", done.stderr);
    // Training went on where it was: the log has the steps before the kill once.
    let steps = |folder: &str| w.column(&format!("{folder}/grao/seed-42/grao/metrics.jsonl"), "step");
    assert_eq!(steps("out"), (1..=8).map(f64::from).collect::<Vec<_>>());
    assert!(
        w.text("out/grao/seed-42/log.txt").contains("continuing after step"),
        "{}",
        w.text("out/grao/seed-42/log.txt")
    );
    // Bit for bit those of a run that nobody disturbed.
    assert_eq!(numbers(&w, "out"), numbers(&w, "calm"));
    for model in ["grao", "held", "soup-0.5"] {
        let of = |folder: &str| w.read(&format!("{folder}/{model}/seed-42/{model}/model.safetensors"));
        assert!(of("out") == of("calm"), "{model}");
    }
}

#[test]
fn a_gate_that_is_closed_says_why_and_nothing_comes_after_it() {
    let w = workspace(&RECIPE.replace("accuracy > 0.01", "accuracy > 0.01 and loss < 0.1"));
    let done = w.run("run run.toml --seeds 1");
    assert_eq!(done.code, Some(1), "{}", done.stderr);
    let loss = w.lines("out/judge/seed-42/judge/evaluations.jsonl").last().unwrap()["eval_loss"].to_string();
    let expected = format!("judge, seed 42: the gate is closed: loss is {loss}, required is loss < 0.1");
    assert!(done.error().contains(&expected), "{}", done.stderr);
    assert!(!w.exists("out/gold") && !w.exists("out/grao"), "nothing is begun behind it");
    // What it made stays, and a lower gate lets the run go on.
    let time = || w.path("out/judge/seed-42/job.json").metadata().unwrap().modified().unwrap();
    let before = time();
    w.write("run.toml", RECIPE);
    w.ok("run run.toml --seeds 1");
    assert_eq!(time(), before);
    // An evaluation's gate knows the names that the recipe gives.
    w.write("run.toml", RECIPE.replace("d >= 0'", "d > 1e9'"));
    assert!(
        w.run("run run.toml --seeds 1")
            .error()
            .contains("measured: sft, seed 42: the gate is closed: d is 0, required is d > 1000000000")
    );
}

#[test]
fn a_part_of_a_recipe_is_run() {
    let w = workspace(RECIPE);
    w.fails(1, "run run.toml --only grao", &["--only", "grao, seed 42 reads sft, seed 42, which is not there"]);
    w.fails(1, "run run.toml --only graoo", &["there is no stage \"graoo\"; did you mean \"grao\"?"]);
    w.ok("run run.toml --seeds 1 --only sft");
    assert!(w.exists("out/sft/seed-42/sft/model.safetensors") && !w.exists("out/judge"));
    w.ok("run run.toml --seeds 1 --only judge");
    w.ok("run run.toml --seeds 1 --from gold");
    assert!(w.exists("out/measured/soup-1/seed-42/eval.json") && w.exists("out/report.html"));
    // From a stage on, what does not depend on it is left alone.
    w.write("run.toml", RECIPE.replace("take = 8\n", "take = 6\n").replace("kl_penalty = 0.1", "kl_penalty = 0.3"));
    w.fails(
        1,
        "run run.toml --seeds 1 --from held",
        &["reads judge, seed 42, which is not there as it is to be made now"],
    );
    let dry = w.ok("run run.toml --seeds 1 --dry-run --from judge").stdout;
    assert!(dry.lines().any(|line| line.starts_with("sft") && line.contains("left alone")), "{dry}");
    w.fails(2, "run run.toml --only sft --from gold", &["cannot be used with"]);
}

#[test]
fn two_runs_in_one_folder_refuse_each_other() {
    let w = workspace(RECIPE);
    std::fs::create_dir(w.path("out")).unwrap();
    let _held = cuvee::checkpoint::run_dir::lock(&w.path("out")).unwrap();
    w.fails(1, "run run.toml", &["out: another cuvee run is working in this folder"]);
}

#[test]
fn what_is_wrong_with_a_recipe_is_said_before_anything_runs() {
    for (from, to, expected) in [
        (
            "kind = 'lab scale'",
            "kind = 'lab scael'",
            "gold: kind: there is none called \"lab scael\"; did you mean \"lab scale\"?",
        ),
        (
            "num_generations",
            "num_generation",
            "grao: unknown key \"num_generation\"; did you mean \"num_generations\"?",
        ),
        ("model = '@sft'", "model = '@sfd'", "there is no stage or data @sfd above it; did you mean \"@sft\"?"),
        ("kl_estimator = 'k3'\n", "", "held: --kl-estimator: exact reads what references said"),
        ("seeds = 2", "seed = 'x'", "seed: expected a whole number of 0 or more, found \"x\""),
        ("skip = 8 }", "skip = 80 }", "[data.rest]: has 24 rows, and skip and take ask for 81"),
        ("dataset = 'train.jsonl'", "dataset = 'tren.jsonl'", "judge: tren.jsonl: No such file"),
        ("['length', 'gold']", "['length']", "front: expected two names"),
    ] {
        assert!(RECIPE.contains(from), "{from}");
        let w = workspace(&RECIPE.replacen(from, to, 1));
        w.fails(1, "run run.toml", &[expected]);
        assert!(!w.exists("out/sft"), "{to}");
    }
    let w = workspace("model = 'model'\nobjective = 'sft'\n");
    w.fails(1, "run run.toml", &["unknown key \"model\"; a recipe of `cuvee run` has [[stage]] tables"]);
    w.fails(1, "run none.toml", &["no such recipe"]);
}

#[test]
fn completions_are_measured_by_what_is_asked_for() {
    let w = workspace(RECIPE);
    w.write_lines(
        "prompts.jsonl",
        &[serde_json::json!({"prompt": "Review: The film"}), serde_json::json!({"prompt": "Review: A"})],
    );
    w.write(
        "long.toml",
        "[[reward]]\nkind = 'length'\nunit = 'words'\nmax = 1\nslope = 1\ncenter = -2\nscale = 4\nmost = 0.25\n",
    );
    let line = "eval --model model --prompts prompts.jsonl --max-new-tokens 6 --json";
    let of = |more: &str| -> Value { serde_json::from_str(&w.ok(&format!("{line} {more}")).stdout).unwrap() };
    let plain = of("--ref-model model --reward long.toml --texts heldout-texts.jsonl"
        .replace(" --texts heldout-texts.jsonl", "")
        .as_str());
    let number = |name: &str| plain["numbers"][name].as_f64().unwrap_or_else(|| panic!("{name}: {plain}"));
    assert_eq!((number("kl"), number("sqrt_kl"), plain["samples"].as_u64()), (0.0, 0.0, Some(2)));
    // (1 - words + 2) / 4, and no more than a quarter.
    assert!(number("reward") <= 0.25 && number("reward") == number("rewards/length"), "{plain}");
    assert!((number("reward") - (3.0 - number("words")) / 4.0).abs() < 1e-9 || number("words") < 3.0, "{plain}");
    assert!(of("")["numbers"].get("kl").is_none() && of("")["numbers"].get("reward").is_none());
    w.fails(2, "eval --model model --dataset heldout.jsonl --prompts prompts.jsonl", &["cannot be used with"]);
    w.fails(2, "eval --model model --dataset heldout.jsonl --samples 3", &["--samples: does nothing without --task"]);
}
