//! Sweeps and their reports, fits and toys, as users start them.

use std::collections::BTreeMap;
use std::time::SystemTime;

use serde_json::Value;

use crate::program::{Workspace, assert_same, results, reviews};

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
    let equal = report["equal"].as_array().unwrap();
    assert_eq!(equal.iter().map(|arm| arm["runs"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 1, 2]);
    let page = w.text("lab/report.html");
    assert!(page.contains("At equal distance, at equal gold") && !page.contains("Who left the race"), "{page}");
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

/// What a cell left, without the checkpoints that it left on the way.
fn cell(w: &Workspace, beta: &str) -> BTreeMap<String, Vec<u8>> {
    let mut found = results(&w.path(&format!("lab/runs/dpo-beta-{beta}/seed-42/model")));
    found.retain(|name, _| !name.starts_with("checkpoint-"));
    found
}

fn written(w: &Workspace, beta: &str, file: &str) -> SystemTime {
    w.path(&format!("lab/runs/dpo-beta-{beta}/seed-42/{file}")).metadata().unwrap().modified().unwrap()
}

const BETAS: [&str; 4] = ["0.02", "0.1", "0.5", "2"];
const RACE: &str = "[halving]\nrungs = [0.2, 0.5]\nconstraint = 'sqrt_kl<100'\n";

/// Cells of 8 steps that are measured at every second.
fn racing() -> String {
    LAB.replace("[0.05, 0.5]", &format!("[{}]", BETAS.join(", "))).replace("max_steps = 4", "max_steps = 8")
}

#[test]
fn in_a_race_the_better_half_goes_on_as_if_it_had_never_stopped() {
    let whole = workspace(&racing());
    whole.ok("lab sweep lab.toml --jobs 2");
    let w = workspace(&(racing() + RACE));
    let done = w.ok("lab sweep lab.toml --jobs 2");

    let report = w.json("lab/report.json");
    let places = report["race"]["places"].as_array().unwrap();
    let of = |rung: f64| places.iter().filter(move |place| place["rung"] == rung).collect::<Vec<_>>();
    let on = |rung: f64| {
        let on = of(rung).into_iter().filter(|place| place["goes_on"] == true);
        on.map(|place| place["beta"].as_f64().unwrap().to_string()).collect::<Vec<_>>()
    };
    assert_eq!((of(0.2).len(), on(0.2).len(), of(0.5).len(), on(0.5).len()), (4, 2, 2, 1), "{places:?}");
    assert_eq!((&of(0.2)[0]["step"], &of(0.5)[0]["step"]), (&2.0.into(), &4.0.into()));
    let best = |of: &[&Value]| of.iter().map(|place| place["gold"].as_f64().unwrap()).fold(f64::MIN, f64::max);
    let winner = of(0.5).into_iter().find(|place| place["goes_on"] == true).unwrap();
    assert_eq!(winner["gold"].as_f64().unwrap(), best(&of(0.5)));
    for beta in BETAS {
        let dir = format!("lab/runs/dpo-beta-{beta}/seed-42/model");
        let steps = w.column(&format!("{dir}/evaluations.jsonl"), "step");
        if on(0.5).contains(&beta.to_string()) {
            assert_same(beta, &cell(&whole, beta), &cell(&w, beta));
            assert!(w.text(&format!("lab/runs/dpo-beta-{beta}/seed-42/log.txt")).contains("continuing after step 4"));
        } else {
            let last = if on(0.2).contains(&beta.to_string()) { 4.0 } else { 2.0 };
            assert_eq!((steps.last(), w.exists(&format!("{dir}/model.safetensors"))), (Some(&last), false), "{beta}");
            assert!(done.stderr.contains(&format!("dpo, β {beta}, gold")), "{}", done.stderr);
        }
    }
    assert!(done.stderr.contains("leaves: outranked: place 4 of 4, 2 go on"), "{}", done.stderr);
    let page = w.text("lab/report.html");
    assert!(page.contains("Who left the race") && page.contains("outranked: place 4 of 4, 2 go on"), "{page}");
    // Who left has ended too.
    assert!(w.ok("watch lab").stderr.contains("4 of 4 runs, 3 of them left the race"));

    // Once more: nothing is run, the same is found.
    let before = (w.read("lab/race.json"), BETAS.map(|beta| written(&w, beta, "job.json")));
    w.ok("lab sweep lab.toml");
    assert_eq!((w.read("lab/race.json"), BETAS.map(|beta| written(&w, beta, "job.json"))), before);
    // Without the race those that left go on to their end from where they were.
    w.write("lab.toml", racing());
    w.ok("lab sweep lab.toml --jobs 2");
    BETAS.iter().for_each(|beta| assert_same(beta, &cell(&whole, beta), &cell(&w, beta)));
    assert!(!w.exists("lab/race.json") && w.json("lab/report.json")["race"].is_null());
}

#[test]
fn what_a_race_cannot_do_is_said_before_anything_runs() {
    for (more, flags, expected) in [
        ("[halving]\nrungs = [0.5, 0.2]", "", "[halving]: rungs: expected rising shares of a run"),
        ("[halving]\nrungs = [0.5]\nkep = 0.5", "", "[halving]: unknown field `kep`"),
        ("[halving]\nrungs = [0.5]\nconstraint = 'base'", "", "[halving]: expected a metric and its bound"),
        (RACE, "--print", "--print: lists whole runs"),
        (
            "[[arm]]\nname = 'on'\nmodel = '@dpo beta=2'\ndataset = '@pairs'\neval_dataset = 'heldout.jsonl'\neval_steps = 2\nkl_samples = 8\nmax_new_tokens = 8\nbeta = 1.0\ngold_reward = ['gold.toml']\n[halving]\nrungs = [0.5]",
            "",
            "on, seed 42: needs a cell",
        ),
    ] {
        let w = workspace(&format!("{}{more}\n", racing()));
        let done = w.run(&format!("lab sweep lab.toml {flags}"));
        assert!(done.code != Some(0) && done.stderr.contains(expected), "{more}: {}", done.stderr);
        assert!(!w.exists("lab/runs"), "{more}");
    }
    let w = workspace(&(racing().replace("kl_samples", "on_alarm = 'stop'\nkl_samples") + RACE));
    assert!(w.run("lab sweep lab.toml").stderr.contains("on_alarm: a run that goes back"));
    let w = workspace(&(racing() + RACE));
    assert!(w.run("compare lab.toml").stderr.contains("is for `cuvee lab sweep`"));
}

#[test]
fn a_sweep_that_is_killed_loses_nothing_and_two_refuse_each_other() {
    let recipe =
        racing().replace("max_steps = 8", "max_steps = 40\nsave_steps = 8").replace("eval_steps = 2", "eval_steps = 8");
    let whole = workspace(&recipe);
    whole.ok("lab sweep lab.toml --jobs 2");

    let w = workspace(&recipe);
    let mut sweep = w.spawn("lab sweep lab.toml --jobs 2");
    let dir = |beta: &str| format!("lab/runs/dpo-beta-{beta}/seed-42");
    let finished = |beta: &&str| w.so_far(&format!("{}/job.json", dir(beta))).contains("\"finished\": true");
    let saved = |beta: &&str, step: u64| w.exists(&format!("{}/model/checkpoint-{step}", dir(beta)));
    assert!(sweep.wait_until(|| w.exists("lab/runs")));
    w.fails(1, "lab sweep lab.toml", &["lab", "another cuvee run is working in this folder; wait for it, or stop it"]);
    // One is done, another has just begun.
    let begun = |beta: &&str| saved(beta, 8) && !saved(beta, 24);
    assert!(sweep.wait_until(|| BETAS.iter().any(finished) && BETAS.iter().any(begun)));
    assert_eq!(sweep.kill_with_children().signal, Some(libc::SIGKILL));

    let done: Vec<&str> = BETAS.into_iter().filter(finished).collect();
    let cut: Vec<&str> = BETAS.into_iter().filter(|beta| !finished(beta) && saved(beta, 8)).collect();
    assert!(!done.is_empty() && !cut.is_empty() && done.len() + cut.len() <= 4, "{done:?} {cut:?}");
    let times = |w: &Workspace| {
        let files = ["job.json", "model/model.safetensors", "model/evaluations.jsonl", "log.txt"];
        done.iter().flat_map(|beta| files.map(|file| written(w, beta, file))).collect::<Vec<_>>()
    };
    let pairs = || w.path("lab/runs/pairs/seed-42/pairs.jsonl").metadata().unwrap().modified().unwrap();
    let before = (times(&w), pairs());
    w.ok("lab sweep lab.toml --jobs 2");
    assert_eq!((times(&w), pairs()), before, "what was finished is not touched");
    for beta in cut {
        let log = w.text(&format!("{}/log.txt", dir(beta)));
        let from =
            log.rsplit("continuing after step ").next().and_then(|rest| rest.split(' ').next()?.parse::<u64>().ok());
        assert!(from.is_some_and(|step| step >= 8), "{beta}: {log}");
    }
    BETAS.iter().for_each(|beta| assert_same(beta, &cell(&whole, beta), &cell(&w, beta)));
    // And so is what is said of them, but for times.
    let points = |w: &Workspace| {
        let report = w.json("lab/report.json");
        let number = |point: &Value, key: &str| point[key].as_f64().unwrap();
        let of = |point: &Value| ["run", "step", "d", "gold", "gold_stderr"].map(|key| number(point, key));
        (report["points"].as_array().unwrap().iter().map(of).collect::<Vec<_>>(), report["equal"].clone())
    };
    assert_eq!(points(&w), points(&whole));
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
