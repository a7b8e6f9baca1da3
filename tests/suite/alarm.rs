//! Runs that go too far, and runs that do not, with a gold reward that sees what losses do not.

use serde_json::Value;

use crate::program::{Finished, Line, Workspace, reviews};

const TRAIN: &str = "train --objective sigmoid --model model --dataset train.jsonl --eval-dataset heldout.jsonl --batch-size 8 \
    --max-length 64 --lr-scheduler-type constant --kl-samples 48 --max-new-tokens 16 --gold-reward gold.toml";
/// Small beta, high rate, long.
const PLANTED: &str = "--beta 0.01 --learning-rate 2e-3 --max-steps 60 --eval-steps 6";
/// Held tightly, low rate.
const HEALTHY: &str = "--beta 0.5 --learning-rate 5e-5 --max-steps 30 --eval-steps 3";

/// What the words of a film review are worth, as long as it does not repeat itself.
fn workspace() -> Workspace {
    let w = Workspace::with_reviews(64);
    w.write_lines("heldout.jsonl", &reviews("heldout")[..24]);
    w.write("gold.toml", "[[reward]]\nkind = 'repetition'\nweight = 1.0\nn = 1\n\n[[reward]]\nkind = 'length'\nweight = 0.05\nunit = 'words'\nmin = 8\nmax = 16\nslope = 1\n");
    w
}

fn train(w: &Workspace, run: &str, flags: &str) -> Finished {
    w.ok(&format!("{TRAIN} --output-dir {run} {flags}"))
}

fn number(line: &Line, key: &str) -> f64 {
    line.get(key).and_then(Value::as_f64).unwrap_or_else(|| panic!("no {key} in {line:?}"))
}

/// The gold reward of every evaluation by step, those that were left behind too.
fn golds(w: &Workspace, run: &str) -> Vec<(u64, f64, f64)> {
    let of =
        |line: &Line| (line["step"].as_u64().unwrap(), number(line, "eval_gold"), number(line, "eval_gold_stderr"));
    let mut golds: Vec<_> = w.lines(&format!("{run}/evaluations.jsonl")).iter().map(of).collect();
    if w.exists(&format!("{run}/alarms.jsonl")) {
        for alarm in w.lines(&format!("{run}/alarms.jsonl")) {
            golds.extend(alarm["evaluations"].as_array().unwrap().iter().map(|line| of(line.as_object().unwrap())));
        }
    }
    golds
}

#[test]
fn an_over_optimised_run_is_stopped_with_its_best_checkpoint() {
    let w = workspace();
    for seed in 1..=5 {
        let run = format!("planted-{seed}");
        // Of all checkpoints but the newest none stays that is not the best.
        let limit = if seed % 2 == 0 { "--save-total-limit 1" } else { "" };
        let done = train(&w, &run, &format!("{PLANTED} --seed {seed} --on-alarm stop {limit}"));
        assert!(done.stderr.contains("ALARM") && done.stderr.contains("over-optimised"), "{seed}: {}", done.stderr);
        let alarms = w.lines(&format!("{run}/alarms.jsonl"));
        let kept = alarms[0]["best_step"].as_u64().unwrap();
        assert!(
            kept < alarms[0]["step"].as_u64().unwrap() && w.exists(&format!("{run}/checkpoint-{kept}")),
            "{alarms:?}"
        );
        let golds = golds(&w, &run);
        let of = |step| golds.iter().find(|gold| gold.0 == step).unwrap();
        let best = golds.iter().max_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
        assert!(of(kept).1 >= best.1 - 2.0 * of(kept).2.hypot(best.2), "{kept}: {golds:?}");
        // What is in the folder is that checkpoint, and its logs end there.
        let (model, checkpoint) = ("model.safetensors", format!("{run}/checkpoint-{kept}/model.safetensors"));
        assert_eq!(w.read(&format!("{run}/{model}")), w.read(&checkpoint));
        assert_eq!(w.lines(&format!("{run}/evaluations.jsonl")).last().unwrap()["step"].as_u64(), Some(kept));
        let kl = w.column(&format!("{run}/evaluations.jsonl"), "eval_sqrt_kl");
        assert!(kl[0] == 0.0 || kl[0] < 0.1, "{kl:?}");
    }
}

#[test]
fn a_healthy_run_is_left_alone() {
    let w = workspace();
    let alarmed = |seed: &u64| {
        let run = format!("healthy-{seed}");
        train(&w, &run, &format!("{HEALTHY} --seed {seed} --on-alarm stop"));
        w.exists(&format!("{run}/alarms.jsonl"))
    };
    assert_eq!((1..=5).filter(alarmed).count(), 0);
}

#[test]
fn a_run_that_goes_back_goes_on_at_half_the_rate_and_can_be_resumed() {
    let w = workspace();
    let flags = "--beta 0.01 --learning-rate 5e-4 --max-steps 24 --eval-steps 4 --kl-budget 1.5 --on-alarm rollback";
    let train = TRAIN.replace("--gold-reward gold.toml", flags);
    let done = w.ok(&format!("{train} --output-dir back"));
    let said = "too far: KL from the first reference";
    assert!(done.stderr.contains(said) && done.stderr.contains("--kl-budget"), "{}", done.stderr);
    let rates = w.column("back/metrics.jsonl", "learning_rate");
    assert!(rates.last().unwrap() <= &2.5e-4 && rates[0] == 5e-4, "{rates:?}");
    let alarms = w.lines("back/alarms.jsonl");
    let (first, best) = (alarms[0]["step"].as_u64().unwrap(), alarms[0]["best_step"].as_u64().unwrap());
    assert!(best < first && alarms[0]["action"] == "rollback", "{alarms:?}");
    // Killed after it went back and resumed, it is the same run.
    let stop = best + 1;
    w.ok(&format!("{train} --output-dir cut --stop-at-step {stop}"));
    let resumed = w.ok(&format!("{train} --output-dir cut --resume-from-checkpoint auto"));
    assert!(resumed.stderr.contains("continuing after step"), "{}", resumed.stderr);
    assert_eq!(w.read("cut/model.safetensors"), w.read("back/model.safetensors"));
}

#[test]
fn a_run_that_goes_back_may_raise_beta_instead() {
    let w = workspace();
    let flags = "--beta 0.01 --learning-rate 5e-4 --max-steps 24 --eval-steps 4 --kl-budget 1.5 --on-alarm rollback";
    let train = TRAIN.replace("--gold-reward gold.toml", flags);
    w.ok(&format!("{train} --output-dir slower"));
    let done = w.ok(&format!("{train} --output-dir back --rollback beta"));
    let alarms = w.lines("back/alarms.jsonl");
    let (first, best) = (alarms[0]["step"].as_u64().unwrap(), alarms[0]["best_step"].as_u64().unwrap());
    assert!(best < first && alarms[0]["then"] == "with beta 0.02", "{alarms:?}");
    assert!(done.stderr.contains(&format!("from step {best} on with beta 0.02")), "{}", done.stderr);
    assert_eq!(w.lines("slower/alarms.jsonl")[0]["then"], "at 0.5 of the learning rate");
    let rates = w.column("back/metrics.jsonl", "learning_rate");
    assert!(rates.iter().all(|rate| *rate == 5e-4), "{rates:?}");
    // The same until they go back, and not behind it.
    let losses = |run: &str| w.column(&format!("{run}/metrics.jsonl"), "loss");
    let (slower, back) = (losses("slower"), losses("back"));
    assert_eq!(slower[..best as usize], back[..best as usize]);
    assert!(
        slower[best as usize..] != back[best as usize..]
            && w.read("slower/model.safetensors") != w.read("back/model.safetensors")
    );
    // Killed after it went back and resumed, it still has the beta that it had raised.
    w.ok(&format!("{train} --output-dir cut --rollback beta --stop-at-step {}", best + 1));
    let resumed = w.ok(&format!("{train} --output-dir cut --rollback beta --resume-from-checkpoint auto"));
    assert!(resumed.stderr.contains("continuing after step"), "{}", resumed.stderr);
    assert_eq!(w.read("cut/model.safetensors"), w.read("back/model.safetensors"));
}

#[test]
fn evaluations_say_what_completions_are_like() {
    let w = workspace();
    train(&w, "plain", "--beta 0.1 --learning-rate 1e-3 --max-steps 6 --eval-steps 3");
    let lines = w.lines("plain/evaluations.jsonl");
    assert_eq!(lines.len(), 3);
    for line in &lines {
        let win = number(line, "eval_gold_win_rate");
        assert!((0.0..=1.0).contains(&win) && number(line, "eval_gold_win_rate_stderr") > 0.0);
        let weighed = number(line, "eval_gold/repetition") + 0.05 * number(line, "eval_gold/length");
        assert!((weighed - number(line, "eval_gold")).abs() < 1e-9, "{line:?}");
        let (one, two) = (number(line, "eval_completions/distinct_1"), number(line, "eval_completions/distinct_2"));
        assert!(one > 0.0 && one <= two && two <= 1.0, "{line:?}");
        assert!(number(line, "eval_completions/entropy") > 0.0 && number(line, "eval_completions/ref_logp") < 0.0);
        let (d, kl) = (number(line, "eval_sqrt_kl"), number(line, "eval_kl"));
        assert!((d * d - kl.max(0.0)).abs() < 1e-9);
    }
    assert!(number(&lines[2], "eval_kl") > number(&lines[0], "eval_kl"));
    assert!(lines[2].contains_key("eval_length/r2"));
}

#[test]
fn flags_that_do_nothing_are_refused() {
    let w = workspace();
    let base = "train --objective sigmoid --beta 0.1 --model model --dataset train.jsonl --output-dir x --max-steps 2";
    for (flags, expected) in [
        ("--gold-reward gold.toml", "--gold-reward: does nothing without --kl-samples"),
        ("--kl-budget 3", "--kl-budget: does nothing without --kl-samples"),
        ("--eval-dataset heldout.jsonl --kl-samples 4 --kl-budget 3", "does nothing without --eval-steps"),
        (
            "--eval-dataset heldout.jsonl --kl-samples 4 --eval-steps 1 --on-alarm stop",
            "--on-alarm: does nothing without",
        ),
        ("--eval-dataset heldout.jsonl --kl-samples 4 --eval-steps 1 --kl-budget 0", "above 0"),
        (
            "--eval-dataset heldout.jsonl --kl-samples 4 --eval-steps 1 --gold-reward none.toml",
            "no such file or folder",
        ),
        (
            "--eval-dataset heldout.jsonl --kl-samples 4 --eval-steps 1 --kl-budget 1 --on-alarm rollback --optimizer ondare \
             --reserve-rate 0.5 --merge-weight 1e-3 --base-model model --tau-model model",
            "merges on a schedule",
        ),
        (
            "--eval-dataset heldout.jsonl --kl-samples 4 --eval-steps 1 --kl-budget 1 --on-alarm stop --rollback beta",
            "--rollback: does nothing without --on-alarm rollback",
        ),
    ] {
        let done = w.run(&format!("{base} {flags}"));
        assert!(done.code != Some(0) && done.stderr.contains(expected), "{flags}: {}", done.stderr);
    }
}
