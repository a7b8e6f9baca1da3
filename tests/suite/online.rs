//! Training on completions that the policy writes, in runs as users start them.

use serde_json::Value;

use crate::program::{Line, Workspace, results};

const TRAIN: &str = "train --learning-rate 3e-3 --model model --dataset train.jsonl --batch-size 4 --max-completion-length 6 \
    --reward rules.toml";
const FOUR: &str = "--max-steps 4 --num-generations 4";

/// Short completions of ordinary words are worth most.
fn workspace() -> Workspace {
    let w = Workspace::with_reviews(16);
    w.write(
        "rules.toml",
        "[[reward]]\nkind = 'length'\nunit = 'characters'\nmax = 4\nslope = 0.1\n\n[[reward]]\nkind = 'repetition'\nweight = 0.5\nn = 2\n",
    );
    w
}

fn train(w: &Workspace, run: &str, flags: &str) -> String {
    let four = if flags.contains("--num-generations") { "--max-steps 4" } else { FOUR };
    w.ok(&format!("{TRAIN} {four} --output-dir {run} {flags}")).stderr
}

/// metrics.jsonl without times.
fn steps(w: &Workspace, run: &str) -> Vec<Line> {
    let lines = w.lines(&format!("{run}/metrics.jsonl")).into_iter();
    lines.map(|line| line.into_iter().filter(|(key, _)| !key.ends_with("_time")).collect()).collect()
}

fn number(line: &Line, key: &str) -> f64 {
    line.get(key).and_then(Value::as_f64).unwrap_or_else(|| panic!("no {key} in {line:?}"))
}

/// Everything that learns from samples takes steps that change the policy and says what it saw.
#[test]
fn every_objective_on_samples_trains() {
    let w = workspace();
    for flags in [
        "--objective grpo",
        "--objective grpo --beta 0.1 --num-iterations 2 --scale-rewards batch",
        "--objective dapo --off-policy-mask-threshold 1",
        "--objective dr_grpo",
        "--objective gspo --num-iterations 2",
        "--objective gmpo --beta 0.1",
        "--objective luspo",
        "--objective luspo --ratio-by-token --num-iterations 2",
        "--objective a_star_po --value-samples 3 --keep-hopeless",
        "--objective cispo",
        "--objective sapo",
        "--objective vespo",
        "--objective rloo --beta 0.05 --normalize-advantages",
        "--objective reinforce --baseline batch",
        "--objective grao",
        "--objective grao --imitation-weight 0 --group-without-answer",
        "--objective ppo --beta 0.05 --num-iterations 2 --whiten-rewards --kl-target 3",
        "--objective sigmoid --beta 0.1",
    ] {
        let run = flags.trim_start_matches("--").replace([' ', '.'], "_");
        train(&w, &run, &format!("{flags} --eval-dataset train.jsonl --kl-samples 4 --max-new-tokens 5"));
        let lines = steps(&w, &run);
        assert_eq!(lines.len(), 4, "{flags}");
        assert!(number(&lines[3], "grad_norm") > 0.0, "{flags}: {lines:?}");
        assert!(number(&lines[0], "reward") <= 0.0 && number(&lines[0], "reward_std") > 0.0, "{flags}");
        assert!(
            lines[0].contains_key("rewards/length/mean") && lines[0].contains_key("rewards/repetition/mean"),
            "{flags}"
        );
        let rollouts = w.lines(&format!("{run}/rollouts.jsonl"));
        let each = if flags.contains("grao") { 5 } else { 4 };
        let batches = if flags.contains("iterations") { 2 } else { 4 };
        assert_eq!(rollouts.len(), batches * 4 * each, "{flags}");
        assert!(rollouts[0]["rewards"]["length"].is_number() && rollouts[0]["completion"].is_string(), "{flags}");
        let evaluations = w.lines(&format!("{run}/evaluations.jsonl"));
        assert!(number(&evaluations[1], "eval_reward").is_finite(), "{flags}");
        assert!(w.read(&format!("{run}/model.safetensors")) != w.read("model/model.safetensors"), "{flags}");
    }
}

/// A judge that stops answering ends the run, not what it has learnt.
#[test]
fn a_judge_that_fails_leaves_a_checkpoint() {
    let w = workspace();
    let judge = "n=0; while read -r line; do n=$((n+1)); if [ $n -gt $(cat patience) ]; then echo no; else echo '{\"reward\": '$((n % 3))'}'; fi; done\n";
    w.write("judge", judge);
    w.write("judge.toml", "[[reward]]\nkind = 'process'\ncommand = ['sh', 'judge']\nrestarts = 0\n");
    w.write("patience", "32");
    let line = TRAIN.replace("rules.toml", "judge.toml");
    let line = format!("{line} {FOUR} --objective grpo --output-dir run");
    let done = w.run(&line);
    assert_eq!(done.code, Some(1), "{}", done.stderr);
    let says = |part: &str| done.stderr.contains(part);
    assert!(says("checkpoint-2 holds everything up to step 2; --resume-from-checkpoint auto"), "{}", done.stderr);
    assert!(says("answered \"no\"") && w.path("run/checkpoint-2").is_dir(), "{}", done.stderr);
    w.write("patience", "9999");
    w.ok(&format!("{line} --resume-from-checkpoint auto"));
    assert_eq!(steps(&w, "run").len(), 4);
}

/// Where no completion of a prompt is better than another there is nothing to learn, and nothing fails.
#[test]
fn a_batch_of_which_all_is_worth_the_same_is_a_step_for_every_pair_loss() {
    let w = workspace();
    w.write("same.toml", "[[reward]]\nkind = 'regex'\npattern = 'zzzz'\n");
    let line = TRAIN.replace("rules.toml", "same.toml");
    for objective in ["aot", "aot_unpaired", "kto_pair", "bco_pair --running-delta", "sigmoid"] {
        let run = objective.split(' ').next().unwrap();
        w.ok(&format!("{line} {FOUR} --objective {objective} --beta 0.1 --output-dir {run}"));
        let lines = steps(&w, run);
        assert_eq!((number(&lines[3], "pairs"), number(&lines[3], "grad_norm")), (0.0, 0.0), "{objective}");
    }
    // Equal rewards have no spread, though their mean is not exactly any of them.
    w.write("same.toml", "[[reward]]\nkind = 'process'\ncommand = ['sh', 'judge']\n");
    w.write("judge", "while read -r line; do echo '{\"reward\": 0.1}'; done\n");
    w.ok(&format!("{line} --max-steps 1 --num-generations 8 --objective grpo --output-dir tied"));
    assert_eq!(number(&steps(&w, "tied")[0], "frac_reward_zero_std"), 1.0);
    // One that says nothing of a sample leaves the others their spread.
    w.write("judge", "n=0; while read -r line; do n=$((n+1)); if [ $n = 1 ]; then r=null; else r=$((n % 2)); fi; echo '{\"reward\": '$r'}'; done\n");
    w.ok(&format!("{line} --max-steps 1 --num-generations 8 --objective grpo --output-dir unknown"));
    let first = &steps(&w, "unknown")[0];
    assert!((0.5..0.6).contains(&number(first, "reward_std")), "{first:?}");
}

/// A rule that compares with the data's answer does so of held-out completions too.
#[test]
fn held_out_completions_are_judged_with_the_answer() {
    let w = workspace();
    w.write("judge", "while read -r line; do case $line in *'\"answer\":null'*) r=0;; *) r=1;; esac; echo '{\"reward\": '$r'}'; done\n");
    w.write("judge.toml", "[[reward]]\nkind = 'process'\ncommand = ['sh', 'judge']\n");
    let line = TRAIN.replace("rules.toml", "judge.toml");
    let line =
        format!("{line} --max-steps 1 --num-generations 2 --objective grpo --kl-samples 4 --gold-reward judge.toml");
    w.ok(&format!("{line} --eval-dataset train.jsonl --output-dir run"));
    let last = w.lines("run/evaluations.jsonl").pop().unwrap();
    assert_eq!((number(&last, "eval_reward"), number(&last, "eval_gold")), (1.0, 1.0), "{last:?}");
    assert_eq!(number(&last, "eval_gold_win_rate"), 0.5);
    // Samples are as long as those that are trained on, unless told otherwise.
    assert!((1.0..=6.0).contains(&number(&last, "eval_completions/mean_length")), "{last:?}");
    // Prompts alone have no answers whose likelihood or worth would mean anything.
    let prompts: Vec<String> =
        w.lines("train.jsonl").iter().map(|row| serde_json::json!({"prompt": row["prompt"]}).to_string()).collect();
    w.write("prompts.jsonl", prompts.join("\n"));
    let done = w.ok(&format!("{line} --eval-dataset prompts.jsonl --output-dir alone"));
    let last = w.lines("alone/evaluations.jsonl").pop().unwrap();
    assert_eq!((number(&last, "eval_reward"), &last["eval_loss"]), (0.0, &Value::Null), "{last:?}");
    assert!(!last.contains_key("eval_gold_win_rate") && last["eval_perplexity"].is_null(), "{last:?}");
    assert!(!done.stderr.contains("NaN") && !done.stderr.contains("held-out loss"), "{}", done.stderr);
}

/// On the policy's own samples, before any update on them, ratios are 1: the first loss of GRPO is minus the mean advantage,
/// 0, and nothing is clipped.
#[test]
fn the_first_step_on_samples_is_on_policy() {
    let w = workspace();
    train(&w, "run", "--objective grpo --num-iterations 2");
    for (i, line) in steps(&w, "run").iter().enumerate() {
        let loss = number(line, "loss");
        assert!(i % 2 == 1 || loss.abs() < 1e-9, "step {}: {loss}", i + 1);
        assert!(i % 2 == 0 || loss.abs() > 1e-9, "step {}: the second step is off-policy", i + 1);
        assert_eq!(line.contains_key("reward"), i % 2 == 0);
    }
    assert_eq!(number(&steps(&w, "run")[3], "num_sampled_tokens"), number(&steps(&w, "run")[2], "num_sampled_tokens"));
}

/// What is sampled at a temperature is trained on at it, unless the recipe says otherwise: then old and new log-probabilities still are
/// alike, and the reference's too.
#[test]
fn samples_are_trained_on_at_the_temperature_they_were_drawn_at() {
    let w = workspace();
    let cool = "--objective grpo --beta 0.1 --num-iterations 2 --rollout-temperature 0.7";
    train(&w, "cool", cool);
    train(&w, "same", &format!("{cool} --logps-temperature 0.7"));
    train(&w, "one", &format!("{cool} --logps-temperature 1"));
    assert_eq!(steps(&w, "cool"), steps(&w, "same"));
    let first = |run: &str| steps(&w, run).remove(0);
    for run in ["cool", "one"] {
        let line = first(run);
        assert_eq!(number(&line, "sampling/logp_difference_max"), 0.0, "{run}");
        assert!(number(&line, "loss").abs() < 1e-9 && number(&line, "kl").abs() < 1e-9, "{run}: {line:?}");
    }
    assert!(number(&first("cool"), "grad_norm") != number(&first("one"), "grad_norm"));
    let likely = |run| number(&first(run), "completions/reference_logp");
    assert!(likely("cool") > likely("one"), "at a lower temperature what is drawn is likelier");
    train(&w, "half", &format!("{cool} --stop-at-step 2"));
    let resumed = format!("{TRAIN} {FOUR} {cool} --output-dir half --resume-from-checkpoint auto");
    w.fails(1, &format!("{resumed} --logps-temperature 1"), &["--logps-temperature", "0.7", "1.0"]);
    for bad in ["0", "-1", "nan", "inf", "1e300", "x"] {
        w.fails(
            2,
            &format!("{TRAIN} {FOUR} --objective grpo --logps-temperature {bad} --output-dir bad"),
            &["above 0"],
        );
    }
    w.fails(
        2,
        "train --objective sft --model model --dataset train.jsonl --logps-temperature 0.7 --output-dir bad",
        &["--logps-temperature", "--reward"],
    );
    // Greedy completions have no temperature of their own.
    train(&w, "greedy", "--objective grao --rollout-temperature 0");
}

/// What such a run is for stands where people look: reward, distance and length, not a loss without a scale.
#[test]
fn a_run_on_samples_reports_its_reward() {
    let w = workspace();
    let evaluated = "--eval-dataset heldout.jsonl --eval-steps 2 --kl-samples 8 --max-new-tokens 6";
    let done = w.ok(&format!(
        "{TRAIN} --max-steps 4 --num-generations 4 --output-dir run --objective grpo --beta 0.05 {evaluated}"
    ));
    for row in ["reward  ", "KL from the reference", "completion length", "loss on given answers"] {
        assert!(done.stdout.contains(row), "{row:?} is not in\n{}", done.stdout);
    }
    assert!(!done.stdout.contains("training loss"), "{}", done.stdout);
    assert!(done.stderr.contains("step 2: reward "), "{}", done.stderr);
    let curves = w.text("run/curves.svg");
    assert!(["reward", "KL from the reference", "length of completions"].iter().all(|title| curves.contains(title)));

    // Held-out completions are no pairs: nothing can be said of them but how likely they are.
    let texts: Vec<_> = w.lines("heldout.jsonl");
    let texts: Vec<Value> =
        texts.iter().map(|row| serde_json::json!({"prompt": row["prompt"], "completion": row["chosen"]})).collect();
    w.write_lines("answers.jsonl", &texts);
    w.ok(&format!("{TRAIN} --max-steps 2 --num-generations 4 --output-dir pairs --objective sigmoid --beta 0.1 --eval-dataset answers.jsonl"));
    assert!(w.column("pairs/evaluations.jsonl", "eval_loss").iter().all(|loss| *loss > 1.0));
}

#[test]
fn rewards_rise() {
    let w = workspace();
    w.ok(&format!("{TRAIN} --max-steps 30 --num-generations 8 --output-dir run --objective grpo"));
    let rewards = w.column("run/metrics.jsonl", "rewards/length/mean");
    let mean = |rewards: &[f64]| rewards.iter().sum::<f64>() / rewards.len() as f64;
    let (before, after) = (mean(&rewards[..5]), mean(&rewards[25..]));
    assert!(after > before + 0.1, "{before} before, {after} after: {rewards:?}");
}

#[test]
fn a_stopped_run_continues_to_the_same_bits_and_threads_change_nothing() {
    let w = workspace();
    for (name, flags) in [
        ("grpo", "--objective grpo --beta 0.1 --num-iterations 2"),
        ("grao", "--objective grao"),
        ("ppo", "--objective ppo --beta 0.1 --kl-target 0.01 --kl-horizon 10 --num-iterations 2"),
        ("ppo-bf16", "--objective ppo --dtype bf16"),
        ("online-dpo", "--objective sigmoid --beta 0.1"),
        ("a-star-po", "--objective a_star_po --value-samples 5"),
        ("xpo", "--objective xpo --beta 0.1 --num-generations 1"),
    ] {
        let [whole, run] = ["whole", "run"].map(|part| format!("{name}-{part}"));
        train(&w, &whole, &format!("{flags} --threads 2 --save-steps 4"));
        train(&w, &run, &format!("{flags} --stop-at-step 2 --threads 1"));
        train(&w, &run, &format!("{flags} --save-steps 4 --resume-from-checkpoint auto --threads 1"));
        assert_eq!(steps(&w, &whole), steps(&w, &run), "{name}");
        assert_eq!(w.read(&format!("{whole}/rollouts.jsonl")), w.read(&format!("{run}/rollouts.jsonl")), "{name}");
        let [whole, run] = [whole, run].map(|run| results(&w.path(&run)));
        for file in ["model.safetensors", "checkpoint-4/optimizer.safetensors"] {
            assert!(whole[file] == run[file], "{name}: {file}");
        }
    }
}

/// The adapter's reference is the model without it, also of samples.
#[test]
fn adapters_learn_from_samples() {
    let w = workspace();
    train(&w, "run", "--objective grpo --beta 0.1 --lora-rank 4");
    let lines = steps(&w, "run");
    // What the reference writes it writes without the adapter; from nothing both are the same.
    let lora = "--num-generations 1 --objective xpo --beta 0.1";
    w.ok(&format!("{TRAIN} --max-steps 4 {lora} --output-dir plain"));
    w.ok(&format!("{TRAIN} --max-steps 4 {lora} --output-dir adapted --lora-rank 4"));
    assert_eq!(w.read("plain/prior.jsonl"), w.read("adapted/prior.jsonl"));
    assert_eq!(number(&lines[0], "kl"), 0.0, "the adapter starts at nothing");
    assert!(number(&lines[3], "kl") > 0.0 && w.exists("run/adapter_model.safetensors"), "{lines:?}");
}

/// A policy that is never done within a token learns nothing; one that sometimes is, of that alone.
#[test]
fn completions_that_are_cut_teach_nothing_where_that_is_asked_for() {
    let w = workspace();
    let line = TRAIN.replace("--max-completion-length 6", "--max-completion-length 1");
    for flags in [
        "--objective grpo",
        "--objective dapo",
        "--objective ppo",
        "--objective grao",
        "--objective sigmoid --beta 0.1",
    ] {
        let run = flags.replace([' ', '-', '.'], "_");
        w.ok(&format!("{line} --max-steps 2 {flags} --mask-truncated-completions --output-dir {run}"));
        let first = &steps(&w, &run)[0];
        assert_eq!(number(first, "completions/clipped_ratio"), 1.0, "nobody ends a review with its first token");
        // GRAO has the data's own answers, which are whole.
        assert_eq!(number(first, "grad_norm") > 0.0, flags.contains("grao"), "{flags}: {first:?}");
        assert!(number(first, "reward") <= 0.0 && number(first, "loss").is_finite());
    }
    let long = TRAIN.replace("--max-completion-length 6", "--max-completion-length 40");
    let losses = |run: &str, flags: &str| {
        w.ok(&format!("{long} {FOUR} --objective grpo {flags} --output-dir {run}"));
        let first = &steps(&w, run)[0];
        let share = number(first, "completions/clipped_ratio");
        assert!(share > 0.0 && share < 1.0, "{share}");
        (number(first, "reward"), number(first, "grad_norm"))
    };
    let (all, some) = (losses("all", ""), losses("some", "--mask-truncated-completions"));
    assert!(all.0 == some.0 && all.1 != some.1 && some.1 > 0.0, "{all:?} {some:?}");
    let plain = "train --model model --dataset train.jsonl --max-steps 2 --output-dir x --objective sft";
    w.fails(2, &format!("{plain} --mask-truncated-completions"), &["--mask-truncated-completions", "--reward"]);
}

/// Of all tokens of a step, whatever micro-batches it is cut into.
#[test]
fn only_tokens_of_high_entropy_teach_where_that_is_asked_for() {
    let w = workspace();
    let run = |run: &str, flags: &str| {
        train(&w, run, &format!("--objective grpo --num-iterations 2 {flags}"));
        steps(&w, run)
    };
    let (all, some) = (run("all", ""), run("some", "--top-entropy-quantile 0.2"));
    assert!(all.iter().all(|line| !line.contains_key("entropy")), "{:?}", all[0]);
    assert!(some.iter().all(|line| (0.0..8.4).contains(&number(line, "entropy"))), "{:?}", some[0]);
    // The same policy and samples, fewer tokens that teach.
    let norm = |lines: &[Line]| number(&lines[0], "grad_norm");
    assert!(0.0 < norm(&some) && norm(&some) < norm(&all), "{} of {}", norm(&some), norm(&all));
    let cut = run("cut", "--top-entropy-quantile 0.2 --micro-batch-tokens 64");
    for (whole, cut) in some.iter().zip(&cut) {
        for key in ["entropy", "grad_norm", "loss"] {
            let (whole, cut) = (number(whole, key), number(cut, key));
            assert!((whole - cut).abs() <= 1e-4 * whole.abs().max(1e-2), "{key}: {whole}, in pieces {cut}");
        }
    }
}

/// Two epochs of four steps: the reference writes two completions of each of 16 prompts, and each is one side of a pair once.
#[test]
fn exploring_is_against_what_the_reference_wrote() {
    let w = workspace();
    let flags = "--objective xpo --beta 0.1 --xpo-alpha 0.01 --num-generations 1 --max-steps 8";
    w.ok(&format!("{TRAIN} {flags} --output-dir run"));
    let prior = w.lines("run/prior.jsonl");
    assert_eq!(prior.len(), 2 * 16);
    let of_first: Vec<_> = prior.iter().filter(|line| line["example"] == 0).collect();
    assert!(of_first.len() == 2 && of_first[0]["ids"] != of_first[1]["ids"], "{of_first:?}");
    let first = &steps(&w, "run")[0];
    assert!(number(first, "logps/prior") < 0.0 && number(first, "pairs") > 0.0, "{first:?}");
    // Before any update the margin is 0: what is left is the bonus.
    let loss = std::f64::consts::LN_2 + 0.01 * number(first, "logps/prior");
    assert!((number(first, "loss") - loss).abs() < 1e-6, "{first:?}");
    // With half the prompts' completions drawn and no checkpoint, it starts again and is the same; without the file it cannot go on.
    w.ok(&format!("{TRAIN} {flags} --output-dir cut --stop-at-step 4"));
    let prior = w.read("cut/prior.jsonl");
    assert!(prior == w.read("run/prior.jsonl"));
    std::fs::remove_file(w.path("cut/prior.jsonl")).unwrap();
    let resume = format!("{TRAIN} {flags} --output-dir cut --resume-from-checkpoint auto");
    w.fails(1, &resume, &["prior.jsonl", "is missing", "before the first step"]);
    w.write("cut/prior.jsonl", prior);
    w.ok(&resume);
    assert!(w.read("cut/model.safetensors") == w.read("run/model.safetensors"));
}

#[test]
fn what_cannot_be_sampled_or_rewarded_is_refused() {
    let w = workspace();
    let base = TRAIN.replace("--reward rules.toml", "");
    w.fails(2, &format!("{base} --objective grpo --output-dir x"), &["--max-completion-length", "--reward"]);
    let plain = "train --model model --dataset train.jsonl --max-steps 2 --output-dir x --objective";
    w.fails(1, &format!("{plain} grpo"), &["--reward", "missing", "grpo learns from nothing else"]);
    w.fails(1, &format!("{plain} sft --reward rules.toml"), &["--reward", "sft learns from the data's completions"]);
    w.fails(1, &format!("{plain} grpo --reward nowhere.toml"), &["nowhere.toml", "no such file"]);
    let alone = "--reward rules.toml --num-generations 1";
    w.fails(1, &format!("{plain} grpo {alone}"), &["--num-generations", "2 or more"]);
    w.fails(1, &format!("{plain} reinforce {alone}"), &["--num-generations", "2 or more"]);
    for lone in ["ppo", "reinforce --baseline batch"] {
        let run = lone.split(' ').next().unwrap();
        w.ok(&format!(
            "{} {alone} --max-completion-length 4",
            plain.replace("--objective", &format!("--objective {lone}")).replace("dir x", &format!("dir {run}"))
        ));
    }
    w.fails(
        1,
        &format!("{plain} grpo --objective sft --reward rules.toml"),
        &["--objective", "one of them learns from rewards"],
    );
    let xpo = format!("{plain} xpo --beta 0.1");
    w.fails(1, &xpo, &["--reward", "missing", "xpo learns from nothing else"]);
    w.fails(1, &format!("{xpo} --reward rules.toml"), &["--num-generations", "one of the reference; give 1"]);
    let other = format!("{plain} a_star_po --reward rules.toml --ref-model model");
    w.fails(1, &other, &["--ref-model", "when the policy still is it"]);
    w.fails(1, &format!("{plain} grpo --reward rules.toml --num-iterations 4"), &["--max-steps", "multiple of"]);
    w.fails(1, &format!("{plain} grpo --reward rules.toml --kl-penalty 0.1"), &["--kl-penalty", "--beta"]);
    w.write_lines("texts.jsonl", &[serde_json::json!({"text": "A film."})]);
    let texts = plain.replace("train.jsonl", "texts.jsonl");
    w.fails(1, &format!("{texts} grpo --reward rules.toml"), &["whole texts"]);
}

/// What follows a prompt is not looked at, so it need not be there.
#[test]
fn prompts_alone_are_enough() {
    let w = workspace();
    let prompts: Vec<String> =
        w.lines("train.jsonl").iter().map(|row| serde_json::json!({"prompt": row["prompt"]}).to_string()).collect();
    w.write("prompts.jsonl", prompts.join("\n"));
    let line = format!(
        "{TRAIN} {FOUR} --objective grpo --beta 0.1 --eval-dataset train.jsonl --kl-samples 4 --max-new-tokens 5"
    );
    w.ok(&format!("{line} --output-dir rows"));
    w.ok(&format!("{line} --output-dir alone").replace("train.jsonl", "prompts.jsonl"));
    assert_eq!(w.lines("rows/rollouts.jsonl"), w.lines("alone/rollouts.jsonl"));
    assert_eq!(steps(&w, "rows"), steps(&w, "alone"));
    let last = &steps(&w, "alone")[3];
    for (key, range) in [
        ("completions/distinct_1", 0.0..=1.0),
        ("completions/distinct_2", 0.0..=1.0),
        ("completions/reference_logp", -20.0..=0.0),
    ] {
        assert!(range.contains(&number(last, key)), "{key}");
    }
    let one = &w.lines("alone/rollouts.jsonl")[0];
    assert!(one["completion_ids"].as_array().is_some_and(|ids| !ids.is_empty() && ids.len() <= 6));

    let refused = |flags: &str, part: &str| {
        w.fails(1, &format!("{flags} --model model --dataset prompts.jsonl --output-dir x"), &[part]);
    };
    refused("train --objective grao --reward rules.toml --learning-rate 1e-3", "these rows are prompts");
    refused("train --objective sft --learning-rate 1e-3", "with --reward the policy writes them");
    w.fails(1, "logps --model model --dataset prompts.jsonl --out x", &["has prompts alone"]);
    w.ok("preview --model model --dataset prompts.jsonl");
}

/// A policy that is its first reference is held to the second alone, and less far from it by the end than one that is not held.
#[test]
fn what_has_no_kl_of_its_own_is_held_to_several_references() {
    let w = workspace();
    w.ok("train --objective sft --model model --dataset train.jsonl --batch-size 8 --max-steps 4 --learning-rate 1e-3 --output-dir other");
    let grao = "--objective grao --ref-model model --ref-model other";
    train(&w, "held", &format!("{grao} --kl-penalty 0.5 --kl-estimator k3"));
    let lines = steps(&w, "held");
    assert_eq!(number(&lines[0], "refs/0/kl"), 0.0);
    assert!(number(&lines[0], "refs/1/kl") > 0.0 && number(&lines[3], "refs/0/kl") > 0.0, "{lines:?}");
    train(&w, "tight", &format!("{grao} --kl-penalty 50 --kl-estimator k3"));
    assert!(number(&steps(&w, "tight")[3], "kl") < number(&lines[3], "kl"));
    for (flags, expected) in [
        (
            format!("{grao} --kl-penalty 0.5"),
            "--kl-estimator: exact reads what references said of completions before the run",
        ),
        (
            "--objective grpo --kl-penalty 0.5 --kl-estimator k3".into(),
            "grpo on samples has a KL of its own: give --beta",
        ),
    ] {
        let done = w.run(&format!("{TRAIN} {FOUR} --output-dir refused {flags}"));
        assert!(done.code != Some(0) && done.stderr.contains(expected), "{flags}: {}", done.stderr);
    }
}
