//! `cuvee soup` as users start it: blends, sweeps over blends, a user's weights.

use std::time::SystemTime;

use cuvee::checkpoint::Weights;
use serde_json::{Value, json};

use crate::program::{Workspace, reviews};

const TRAIN: &str = "train --objective sigmoid --beta 0.1 --model model --dataset train.jsonl --learning-rate 5e-3 \
                     --max-length 48 --batch-size 4 --max-steps 2 --threads 1 --lora-rank 2";

/// Two adapters, `a` and `b`, that differ.
fn adapters() -> Workspace {
    let w = Workspace::with_reviews(16);
    w.ok(&format!("{TRAIN} --take 8 --output-dir a"));
    w.ok(&format!("{TRAIN} --skip 8 --lora-alpha 3 --output-dir b"));
    w
}

fn differ(w: &Workspace, one: &str, other: &str) -> f64 {
    let [one, other] = [one, other].map(|name| Weights::open(&w.path(name)).unwrap());
    let mut most: f64 = 0.0;
    for name in one.names() {
        let shape = one.shape(name).unwrap();
        let mut values = [(); 2].map(|()| vec![0.0; shape.iter().product()]);
        one.read(name, shape, &mut values[0]).unwrap();
        other.read(name, shape, &mut values[1]).unwrap();
        most = values[0].iter().zip(&values[1]).fold(most, |most, (a, b)| most.max(f64::from((a - b).abs())));
    }
    most
}

#[test]
fn a_blend_is_the_average_of_the_adapted_models() {
    let w = adapters();
    let weights = "--adapter a=0.3 --adapter b=0.7";
    w.ok(&format!("soup --model model {weights} --method delta --output-dir delta"));
    for one in ["a", "b"] {
        w.ok(&format!("merge adapters --method delta --model model --adapter {one} --output-dir whole-{one}"));
    }
    w.ok("soup --model whole-a=0.3 --model whole-b=0.7 --output-dir average");
    assert!(differ(&w, "whole-a", "whole-b") > 1e-3);
    assert!(differ(&w, "delta", "average") < 1e-7, "{}", differ(&w, "delta", "average"));

    // One adapter that is that sum, and what it says of itself.
    w.ok(&format!("soup {weights} --output-dir cat"));
    w.ok("merge adapters --method delta --model model --adapter cat --output-dir whole-cat");
    assert!(differ(&w, "delta", "whole-cat") < 1e-7);
    w.ok(&format!("merge adapters {weights} --output-dir same"));
    assert!(w.read("cat/adapter_model.safetensors") == w.read("same/adapter_model.safetensors"));
    let lineage = w.json("cat/cuvee_lineage.json");
    let parents: Vec<(&str, f64)> = lineage["parents"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| {
            assert!(p["hash"].is_string() && p["lineage"]["parents"][0]["hash"].is_string(), "{p}");
            (p["name"].as_str().unwrap(), p["weight"].as_f64().unwrap())
        })
        .collect();
    assert_eq!((parents, &lineage["arguments"]["method"]), (vec![("a", 0.3), ("b", 0.7)], &json!("cat")));
    w.ok("lineage delta --verify");

    // As released, that is another thing; at a corner it is the same.
    w.ok(&format!("soup {weights} --method factor --output-dir factor"));
    w.ok("merge adapters --method delta --model model --adapter factor --output-dir whole-factor");
    assert!(differ(&w, "delta", "whole-factor") > 1e-4);
    w.ok("soup --adapter a --method factor --output-dir corner");
    w.ok("merge adapters --method delta --model model --adapter corner --output-dir whole-corner");
    assert!(differ(&w, "whole-a", "whole-corner") < 1e-7);
}

#[test]
fn weights_off_the_simplex_are_refused_with_what_to_type() {
    let w = adapters();
    let cases = [
        (
            "--adapter a=0.5 --adapter b=0.7",
            "--adapter: weights sum to 1.2, not to 1; type --adapter a=0.416667 --adapter b=0.583333, or add --any-weights",
        ),
        ("--adapter a --adapter b", "weights sum to 2, not to 1; type --adapter a=0.500000 --adapter b=0.500000"),
        ("--adapter a=1.5 --adapter b=-0.5", "-0.5 is negative; type --adapter a=1.000000, or"),
        ("--model a=0.5 --model b=0.6", "--model: weights sum to 1.1"),
        ("--model model", "--model: one policy is no blend"),
        ("--model model=0.5 --adapter a", "--model: a base has no weight, found 0.5; type --model model"),
        ("--model model --model a --adapter a", "--model: adapters have one base"),
        ("--model a=0.5 --model b=0.5 --method svd", "--method: is about adapters"),
        ("--adapter a --method delta", "--model: missing; --method delta adds"),
        ("--adapter a --rank 3", "--rank: does nothing without --method svd"),
    ];
    for (flags, expected) in cases {
        w.fails(2, &format!("soup {flags} --output-dir out"), &[expected]);
        assert!(!w.exists("out"), "{flags}");
    }
    w.ok("soup --adapter a=1.5 --adapter b=-0.5 --any-weights --output-dir far");
    w.fails(1, "soup --adapter a=0.5 --adapter b=0.5 --output-dir far", &["far exists; name a new folder"]);
    w.fails(1, "soup --adapter a=0.5 --adapter nowhere=0.5 --output-dir out", &["nowhere"]);
}

const SWEEP: &str = "
model = 'model'
dataset = 'train.jsonl'
objective = 'grpo'
beta = 0.05
lora_rank = 2
learning_rate = 3e-3
num_generations = 4
max_completion_length = 5
max_steps = 2
per_device_train_batch_size = 4
output_dir = 'soups'

[[preference]]
name = 'short'
prompt = 'Be short.'
opposite = 'Be long.'
reward = 'short.toml'

[[preference]]
name = 'long'
prompt = 'Write more.'
reward = 'long.toml'
";
const MEASURED: &str = "
[sweep]
prompts = 'heldout.jsonl'
texts = 'heldout-texts.jsonl'
samples = 2
max_new_tokens = 5
pairs = [0.5]
";
const BESIDE: &str = "
[p_morl]
max_steps = 1

[multitask_sft]
prompts = 4
samples = 3
max_steps = 1

[prompting]
";
const THIRD: &str = "
[[preference]]
name = 'plain'
prompt = 'Use no commas.'
reward = 'plain.toml'
";

fn workspace(recipe: &str) -> Workspace {
    let w = Workspace::with_reviews(8);
    let texts: Vec<Value> = reviews("heldout")[..4].iter().map(|row| json!({"text": row["chosen"]})).collect();
    w.write_lines("heldout-texts.jsonl", &texts);
    w.write("short.toml", "[[reward]]\nname = 'short'\nkind = 'length'\nunit = 'characters'\nmax = 8\nslope = 0.1\n");
    w.write("long.toml", "[[reward]]\nname = 'long'\nkind = 'length'\nunit = 'characters'\nmin = 16\nslope = 0.1\n");
    w.write("plain.toml", "[[reward]]\nname = 'plain'\nkind = 'regex'\npattern = ','\nscore = 0\notherwise = 1\n");
    w.write("soups.toml", recipe);
    w
}

fn sweep(w: &Workspace) -> (Value, String) {
    let done = w.ok("soup sweep soups.toml --json --threads 1");
    (serde_json::from_str(&done.stdout).unwrap_or_else(|e| panic!("{e}: {}", done.stdout)), done.stderr)
}

fn names(json: &Value) -> Vec<&str> {
    json["policies"].as_array().unwrap().iter().map(|policy| policy["policy"].as_str().unwrap()).collect()
}

fn time(w: &Workspace, path: &str) -> SystemTime {
    w.path(&format!("soups/{path}")).metadata().unwrap().modified().unwrap()
}

#[test]
fn a_sweep_trains_each_preference_once_and_one_more_when_one_is_added() {
    let w = workspace(&format!("{SWEEP}{MEASURED}{BESIDE}"));
    let (json, _) = sweep(&w);
    let asked = ["multitask-sft asked for", "prompting for"]
        .map(|what| ["all", "short", "long"].map(|of| format!("{what} {of}")));
    let blends = ["base", "short=1", "long=1", "factor short=0.5 long=0.5", "short=0.5 long=0.5", "p-morl"];
    let expected: Vec<String> = blends.map(String::from).into_iter().chain(asked.concat()).collect();
    assert_eq!(names(&json), expected);
    let policy =
        |name: &str| json["policies"].as_array().unwrap().iter().find(|p| p["policy"] == name).unwrap().clone();
    // The base is at no distance from itself; the others have moved, and every reward says something of each.
    assert!(policy("base")["kl"]["mean"].as_f64().unwrap().abs() < 1e-4);
    assert_ne!(policy("short=1")["kl"]["mean"], policy("long=1")["kl"]["mean"]);
    for name in &expected {
        let of = policy(name);
        assert!(of["rewards"]["short"]["mean"].as_f64().unwrap() <= 0.0, "{of}");
        assert!(of["nll"].as_f64().unwrap() > 0.0 && of["kl"]["stderr"].is_number(), "{of}");
    }
    assert_eq!(json["paths"][0]["from"], "short");
    assert!(json["paths"][0]["cosine"].as_f64().unwrap().abs() < 1.0);
    assert_eq!(
        json["runs"],
        json!({"trained": 2, "one_for_each_user": 4, "trained_again": ["p-morl", "multitask-sft"]})
    );
    assert!(json["outcomes"]["short"]["loo_rmse"].is_number());
    for file in ["soup.md", "soup.txt", "soup.svg", "soup.json", "data/p-morl.jsonl", "data/multitask_sft.jsonl"] {
        assert!(w.exists(&format!("soups/{file}")), "{file}");
    }
    assert!(w.text("soups/data/p-morl.jsonl").contains("\"prompt\":\"Be short. Write more. Review:"));
    assert_eq!(w.text("soups/data/multitask_sft.jsonl").lines().count(), 2 * 4);

    // Once more: nothing is run, and the result is the same.
    let jobs = ["runs/short/seed-42/job.json", "runs/long/seed-42/job.json", "policies/short-1/job.json"];
    let before = jobs.map(|job| time(&w, job));
    assert_eq!(sweep(&w).0, json);
    assert_eq!(jobs.map(|job| time(&w, job)), before);

    // A third preference: one run, and what was measured of the others stays as it was.
    w.write("soups.toml", format!("{SWEEP}{THIRD}{MEASURED}"));
    let (wider, said) = sweep(&w);
    assert_eq!(jobs.map(|job| time(&w, job)), before);
    assert!(said.contains("plain, seed 42: ") && !said.contains("short, seed 42: "), "{said}");
    assert_eq!(w.names("soups/runs"), ["long", "multitask-sft", "p-morl", "plain", "short"]);
    assert!(
        names(&wider).contains(&"short=0.333 long=0.333 plain=0.333") && wider["paths"].as_array().unwrap().len() == 3
    );

    // What weights that nobody tried will come to, and a user's own.
    let done = w.ok("soup fit --sweep soups --at short=0.2 --at plain=0.8 --json");
    let told: Value = serde_json::from_str(&done.stdout).unwrap();
    assert!(
        told["predicted"]["short"]["predicted"].is_number() && told["predicted"]["kl"]["loo_rmse"].is_number(),
        "{told}"
    );
    let choice = |i: usize| {
        let chosen = ["fine", "fine, too", "fine, and so is the cast"][i % 3];
        let rejected = ["a long story about nothing", "dull, dull, dull"][i % 2];
        json!({"prompt": "Review:", "chosen": format!(" {chosen}"), "rejected": format!(" {rejected}")})
    };
    w.write_lines("choices.jsonl", &(0..16).map(choice).collect::<Vec<_>>());
    let done = w.ok("soup fit --sweep soups --comparisons choices.jsonl");
    assert!(done.stdout.contains("of 16 choices alike") && done.stdout.contains("predicted"), "{}", done.stdout);
    w.fails(1, "soup fit --sweep soups --at loud=1", &["no preference \"loud\"; there are short, long, plain"]);
    w.fails(1, "soup fit --sweep nowhere --at short=1", &["--sweep: nowhere: there is no soup.json"]);
    w.fails(1, "soup fit --sweep soups --at short=0.5", &["type --at short=1.000000 --at long=0.000000"]);
}

#[test]
fn whole_policies_are_swept_too_and_what_fails_stops_nothing_else() {
    let recipe =
        SWEEP.replace("lora_rank = 2\n", "").replace("name = 'long'\n", "name = 'long'\nlearning_rate = 1e-2\n");
    let w = workspace(&format!("{recipe}{MEASURED}"));
    let (json, _) = sweep(&w);
    assert_eq!(names(&json), ["base", "short=1", "long=1", "short=0.5 long=0.5"]);
    let blend = w.json("soups/policies/short-0.5-long-0.5/blend/cuvee_lineage.json");
    assert_eq!((&blend["command"], &blend["parents"][0]["weight"]), (&json!("merge"), &json!(0.5)));

    w.write(
        "soups.toml",
        format!("{recipe}max_length = 2\n{MEASURED}").replace("'Be short.'\n", "'Be short.'\nmax_steps = 3\n"),
    );
    let done = w.run("soup sweep soups.toml --threads 1");
    assert_eq!(done.code, Some(1), "{}", done.stderr);
    assert!(done.stdout.contains("MISSING: short=0.5 long=0.5: left out"), "{}{}", done.stdout, done.stderr);
    assert!(
        done.stderr.contains("the same command tries them again") && done.stdout.contains("\nshort=1"),
        "{}",
        done.stderr
    );
}

#[test]
fn a_killed_sweep_goes_on_where_it_stopped() {
    let recipe = format!("{SWEEP}{MEASURED}").replace("max_steps = 2", "max_steps = 12\nsave_steps = 4");
    let (w, whole) = (workspace(&recipe), workspace(&recipe));
    let mut running = w.spawn("soup sweep soups.toml --threads 1");
    assert!(running.wait_until(|| w.exists("soups/runs/long/seed-42/adapter/checkpoint-4")));
    w.fails(1, "soup sweep soups.toml", &["another cuvee run is working in this folder"]);
    running.signal(libc::SIGTERM);
    assert_eq!(running.wait().code, Some(130));
    let short = time(&w, "runs/short/seed-42/job.json");
    assert_eq!(sweep(&w).0["policies"], sweep(&whole).0["policies"]);
    assert_eq!(time(&w, "runs/short/seed-42/job.json"), short);
}

#[test]
fn a_user_is_found_in_choices_by_rewards_or_by_policies() {
    let w = adapters();
    w.write("short.toml", "[[reward]]\nkind = 'length'\nunit = 'words'\nmax = 1\nslope = 1\n");
    w.write("calm.toml", "[[reward]]\nkind = 'regex'\npattern = '!'\nscore = 0\notherwise = 1\n");
    // Someone who always wants the shorter text, and does not care about shouting.
    let choice = |i: usize| {
        let text = |words: usize, loud: bool| format!("{}{}", " good".repeat(words), if loud { "!" } else { "." });
        json!({"prompt": "Review:", "chosen": text(1 + i % 4, i.is_multiple_of(2)), "rejected": text(6 + i % 3, i.is_multiple_of(3))})
    };
    w.write_lines("choices.jsonl", &(0..24).map(choice).collect::<Vec<_>>());
    let fit = |flags: &str| -> Value {
        serde_json::from_str(&w.ok(&format!("soup fit {flags} --comparisons choices.jsonl --json")).stdout).unwrap()
    };
    let found = fit("--reward short.toml --reward calm.toml");
    let short = &found["fit"]["weights"][0];
    assert!(short["low"].as_f64().unwrap() > 0.5 && found["weights"]["short"].as_f64().unwrap() > 0.7, "{found}");
    assert_eq!(found["fit"]["agreement"], 1.0);
    assert_eq!(fit("--reward short.toml --reward calm.toml"), found, "the same choices, the same answer");
    let found = fit("--model model --adapter a --adapter b");
    assert_eq!((found["fit"]["choices"].as_u64(), found["preferences"].clone()), (Some(24), json!(["a", "b"])));

    w.write_lines("texts.jsonl", &[json!({"text": "Review: good."})]);
    w.write("loud.toml", "[[reward]]\nkind = 'regex'\npattern = 'never found'\n");
    let choices = "--comparisons choices.jsonl";
    for (code, flags, expected) in [
        (2, "".to_string(), "--comparisons: missing"),
        (2, choices.into(), "--reward: missing; say what preferences are"),
        (2, "--reward short.toml".into(), "does nothing without --comparisons"),
        (2, format!("{choices} --adapter a"), "does nothing without --model"),
        (
            2,
            format!("{choices} --model model --adapter a=0.5 --adapter b"),
            "its weight is what is looked for; type --adapter a",
        ),
        (2, format!("{choices} --reward short.toml --at a=1"), "--at: does nothing without --sweep"),
        (1, format!("{choices} --reward short.toml"), "one preference has no weights to find"),
        (1, format!("{choices} --reward short.toml --reward loud.toml"), "loud finds both texts of every choice alike"),
        (
            1,
            "--comparisons texts.jsonl --reward short.toml --reward calm.toml".into(),
            "row 0: expected chosen and rejected",
        ),
        (1, format!("{choices} --sweep nowhere"), "nowhere"),
    ] {
        w.fails(code, &format!("soup fit {flags}"), &[expected]);
    }
}

#[test]
fn a_recipe_that_cannot_be_swept_is_refused_before_anything_runs() {
    let w = workspace("");
    for (recipe, expected) in [
        (String::new(), "no [[preference]]"),
        (SWEEP.to_string(), "no [sweep]"),
        (format!("{SWEEP}{MEASURED}").replace("prompts = 'heldout.jsonl'", "prompts = 'none.jsonl'"), "none.jsonl"),
        (format!("{SWEEP}{MEASURED}").replace("'long.toml'", "'none.toml'"), "none.toml: there is no such file"),
        (format!("{SWEEP}{MEASURED}").replace("beta =", "bata ="), "unknown key \"bata\"; did you mean \"beta\"?"),
        (format!("{SWEEP}learning_rte = 1\n{MEASURED}"), "long: unknown key \"learning_rte\""),
        (format!("{SWEEP}model = 'other'\n{MEASURED}"), "other: No such file"),
        (format!("{SWEEP}{MEASURED}[p_morl]\nbeta = 'x'\n"), "p-morl: beta: expected a number"),
        (format!("{SWEEP}{MEASURED}").replace("output_dir", "#"), "output_dir: missing"),
    ] {
        w.write("soups.toml", &recipe);
        let done = w.run("soup sweep soups.toml");
        assert!(matches!(done.code, Some(1 | 2)) && done.stderr.contains(expected), "{expected}\n{}", done.stderr);
        assert!(!w.exists("soups/runs"), "{expected}");
    }
    w.fails(1, "soup sweep none.toml", &["none.toml: no such recipe"]);
    w.fails(
        1,
        "soup measure --model model --prompts heldout.jsonl --plain-prompts train.jsonl",
        &["--plain-prompts: 8 rows, and --prompts has 16"],
    );
}
