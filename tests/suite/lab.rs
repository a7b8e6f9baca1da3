//! Sweeps and their reports, fits and toys, as users start them.

use serde_json::Value;

use crate::program::{Workspace, reviews};

/// Pairs that a gold reward labels, and cells that measure it; one of them fails.
const LAB: &str = "
seeds = 1
output_dir = 'lab'
model = 'model'
objective = 'sigmoid'
learning_rate = 1e-3
max_steps = 4
per_device_train_batch_size = 4
max_length = 64
threads = 1

[[prepare]]
name = 'pairs'
shared = true
pairs = { model = 'model', prompts = 'prompts.jsonl', gold_reward = ['gold.toml', 'fluency:model=0.1'], max_new_tokens = 8, samples = 3 }

[[arm]]
name = 'dpo'
dataset = '@pairs'
eval_dataset = 'heldout.jsonl'
eval_steps = 2
kl_samples = 8
max_new_tokens = 8
gold_reward = ['gold.toml', 'fluency:model=0.1']
[arm.grid]
beta = [0.05, 0.5]
";

fn workspace(recipe: &str) -> Workspace {
    let w = Workspace::new();
    let prompts: Vec<Value> = reviews("train")[..12]
        .iter()
        .map(|row| {
            let words: Vec<&str> = row["chosen"].as_str().unwrap().split_whitespace().take(2).collect();
            serde_json::json!({"prompt": format!("Review: {}", words.join(" "))})
        })
        .collect();
    w.write_lines("prompts.jsonl", &prompts);
    w.write_lines("heldout.jsonl", &reviews("heldout")[..8]);
    w.write("gold.toml", "[[reward]]\nkind = 'length'\nunit = 'characters'\ntarget = 20\nslope = 0.1\n");
    w.write("lab.toml", recipe);
    w
}

#[test]
fn a_sweep_labels_trains_measures_and_reports_and_is_not_run_twice() {
    let w = workspace(LAB);
    // The commands alone, first: what others need stands before them, and each may be run by anyone, twice.
    let printed = w.ok("lab sweep lab.toml --print").stdout;
    let lines: Vec<&str> = printed.lines().collect();
    assert_eq!(lines.len(), 4, "{printed}");
    assert!(
        lines[0].contains("cuvee lab pairs")
            && lines[1].starts_with('#')
            && lines[2].starts_with("cuvee train lab/runs/")
    );
    assert!(lines[3].ends_with("--resume-from-checkpoint=auto --threads=1"), "{printed}");
    assert!(!w.exists("lab/report.html"));

    let done = w.ok("lab sweep lab.toml");
    assert!(done.stdout.contains("lab/report.html"), "{}", done.stdout);
    for pair in w.lines("lab/runs/pairs/seed-42/pairs.jsonl") {
        assert!(
            pair["chosen_gold"].as_f64() > pair["rejected_gold"].as_f64() && pair["prompt"].is_string(),
            "{pair:?}"
        );
    }
    let report = w.json("lab/report.json");
    assert_eq!(report["cells"].as_array().unwrap().len(), 2);
    let points = report["points"].as_array().unwrap();
    assert_eq!(points.len(), 2 * 3, "{points:?}");
    assert!(points.iter().all(|point| point["group"] == "dpo" && point["gold_stderr"].as_f64().unwrap() > 0.0));
    assert_eq!((points[0]["d"].as_f64(), points[0]["gold"].as_f64()), (Some(0.0), Some(0.0)));
    let logged = &points[2]["logged"];
    let weighed = logged["gold/length"].as_f64().unwrap() + 0.1 * logged["gold/fluency"].as_f64().unwrap();
    assert!(
        (weighed - logged["gold"].as_f64().unwrap()).abs() < 1e-9 && logged["gold/fluency"].as_f64().unwrap() < 0.0
    );
    let page = w.text("lab/report.html");
    assert!(page.contains("<svg") && page.contains("dpo beta=0.05, seed 42") && !page.contains("NaN"), "{page}");

    let times = |w: &Workspace| {
        ["0.05", "0.5"].map(|beta| {
            w.path(&format!("lab/runs/dpo-beta-{beta}/seed-42/job.json")).metadata().unwrap().modified().unwrap()
        })
    };
    let before = times(&w);
    w.ok("lab sweep lab.toml");
    assert_eq!(before, times(&w));
    // What the report holds can be fitted, and rendered again.
    w.ok("lab report lab");
    assert!(w.ok("watch lab").stderr.contains("2 of 2 runs, 6 evaluations"));
    let fit = w.ok("lab fit lab/report.json --resamples 0 --json --output-dir fit").stdout;
    assert_eq!(serde_json::from_str::<Value>(&fit).unwrap()["groups"][0]["group"], "dpo");
    assert!(w.exists("fit/fit.svg"));
}

#[test]
fn a_cell_that_fails_is_reported_and_the_rest_goes_on() {
    let w = workspace(
        &LAB.replace("[0.05, 0.5]", "[0.05, 0.5]\nlearning_rate = [1e-3, 1e30]")
            .replace("max_steps = 4", "max_steps = 2"),
    );
    let done = w.run("lab sweep lab.toml");
    assert_eq!(done.code, Some(1), "{}", done.stderr);
    assert!(done.stderr.contains("FAILED") && done.stderr.contains("2 of 5 runs are missing"), "{}", done.stderr);
    let report = w.json("lab/report.json");
    assert_eq!(report["cells"].as_array().unwrap().len(), 4);
    assert!(report["points"].as_array().unwrap().iter().any(|point| point["group"] == "dpo learning_rate=1e-3"));
}

#[test]
fn what_is_wrong_with_a_sweep_is_said_before_anything_runs() {
    for (from, to, expected) in [
        ("kl_samples = 8\nmax_new_tokens = 8\n", "", "--gold-reward: does nothing without --kl-samples"),
        ("gold_reward = ['gold.toml', 'fluency:model=0.1']\n[arm", "[arm", "gold_reward is missing; a sweep measures"),
        ("samples = 3 }", "seed = 3 }", "pairs: seed: is what compare decides"),
        ("samples = 3 }", "sample = 3 }", "unknown key \"sample\"; did you mean \"samples\"?"),
        ("dataset = '@pairs'", "dataset = '@pears'", "did you mean \"@pairs\"?"),
        ("shared = true\n", "shared = true\nbeta = 1.0\n", "does nothing where nothing is trained"),
    ] {
        let w = workspace(&LAB.replace(from, to));
        let done = w.run("lab sweep lab.toml");
        assert!(done.code != Some(0) && done.stderr.contains(expected), "{to}: {}", done.stderr);
        assert!(!w.exists("lab/runs"), "{to}");
    }
    let w = workspace(LAB);
    w.write(
        "plain.toml",
        "objective = 'sigmoid'\nbeta = 0.1\nmodel = 'model'\ndataset = 'heldout.jsonl'\noutput_dir = 'x'\n",
    );
    assert!(w.run("lab sweep plain.toml").stderr.contains("lists its runs as [[arm]]"));
    assert!(w.run("lab report model").stderr.contains("holds no lab.json"));
    // Whoever works in the folder keeps others out.
    std::fs::create_dir(w.path("lab")).unwrap();
    let _held = cuvee::checkpoint::run_dir::lock(&w.path("lab")).unwrap();
    assert!(w.run("lab sweep lab.toml").stderr.contains("another cuvee run is working in this folder"));
}

/// By itself the best of n is the best; n = 1 is the mean.
#[test]
fn best_of_n_by_itself_only_rises() {
    let w = workspace(LAB);
    let line =
        "lab best-of-n --model model --prompts prompts.jsonl --max-new-tokens 6 --samples 6 --gold-reward gold.toml";
    let points = |proxy: &str| -> Vec<Value> {
        serde_json::from_str(&w.ok(&format!("{line} --proxy-reward {proxy} --json")).stdout).unwrap()
    };
    let number = |point: &Value, key: &str| point[key].as_f64().unwrap();
    let own = points("gold.toml");
    assert_eq!(own.iter().map(|point| point["n"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2, 4]);
    assert!(own.iter().all(|point| number(point, "gold") == number(point, "proxy")));
    assert!(own.windows(2).all(|two| number(&two[0], "gold") < number(&two[1], "gold")), "{own:?}");
    let other = points("fluency:model");
    assert_eq!(number(&other[0], "gold"), number(&own[0], "gold"));
    assert!(number(&other[2], "gold") <= number(&own[2], "gold"));
    assert!(w.ok(&format!("{line} --proxy-reward fluency:model")).stdout.contains("KL, nats"));
}

#[test]
fn toys_run_in_seconds_and_show_the_hump() {
    let w = Workspace::new();
    let toy: Value = serde_json::from_str(&w.ok("lab toy --json --output-dir toy").stdout).unwrap();
    assert_eq!((toy["tree"].as_array().unwrap().len(), toy["daa"].as_array().unwrap().len()), (9, 3));
    for group in toy["fits"]["groups"].as_array().unwrap() {
        let log = &group["fits"][0];
        let most = group["points"].as_array().unwrap().iter().map(|p| p["d"].as_f64().unwrap()).fold(0.0, f64::max);
        assert!(log["peak_d"].as_f64().unwrap() < most, "{}: {log}", group["group"]);
    }
    assert_eq!(w.names("toy"), ["bandit.svg", "proxy.svg", "toy.json", "tree.svg"]);
    assert!(w.text("toy/bandit.svg").contains("<polyline"));
}
