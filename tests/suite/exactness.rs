//! What must not change a single bit of a run: being stopped, killed and resumed, threads, sharing, the cache,
//! recomputation. And what a run must start from: a policy that is its reference.

use std::collections::BTreeMap;
use std::f64::consts::LN_2;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use cuvee::objectives;
use serde_json::{Value, json};

use crate::program::{Workspace, assert_same, results, reviews, root};
use crate::tiny::merged;

/// 20 steps with everything that a run writes.
const TRAIN: &str = "train --objective sigmoid --beta 0.1 --learning-rate 5e-4 --warmup-ratio 0.1 --model model \
    --dataset train.jsonl --eval-dataset heldout.jsonl --max-length 40 --batch-size 4 --max-steps 20 --save-steps 5 \
    --eval-steps 5 --samples 2 --max-new-tokens 6 --threads 2";

const RESUME: &str = "--resume-from-checkpoint auto";

fn workspace() -> Workspace {
    Workspace::with_reviews(60)
}

/// What [`TRAIN`] leaves when nothing happens to it, and how long it takes.
static UNINTERRUPTED: LazyLock<(BTreeMap<String, Vec<u8>>, Duration)> = LazyLock::new(|| {
    let (w, started) = (workspace(), Instant::now());
    w.ok(&format!("{TRAIN} --output-dir run"));
    let took = started.elapsed();
    let found = results(&w.path("run"));
    let names: Vec<&str> = found.keys().map(String::as_str).filter(|name| !name.contains('/')).collect();
    assert_eq!(
        names,
        [
            "config.json",
            "curves.svg",
            "cuvee.json",
            "cuvee_lineage.json",
            "evaluations.jsonl",
            "generation_config.json",
            "metrics.jsonl",
            "model.safetensors",
            "samples.jsonl",
            "tokenizer.json",
            "tokenizer_config.json",
            "trainer_state.json"
        ]
    );
    assert!(
        ["checkpoint-10/optimizer.safetensors", "checkpoint-20/model.safetensors"]
            .iter()
            .all(|n| found.contains_key(*n))
    );
    (found, took)
});

/// The run in `run` is the one that nothing happened to, up to checkpoints that only one of them wrote.
fn assert_uninterrupted(w: &Workspace, what: &str) {
    let found = results(&w.path("run"));
    let regular = |name: &String| !name.starts_with("checkpoint-") || UNINTERRUPTED.0.contains_key(name);
    let found = found.into_iter().filter(|(name, _)| regular(name)).collect();
    assert_same(what, &UNINTERRUPTED.0, &found);
}

// ---- interrupted and continued ---------------------------------------------------------------------------------

#[test]
fn a_stopped_run_continues_to_the_same_bits() {
    let w = workspace();
    let stopped = w.ok(&format!("{TRAIN} --output-dir run --stop-at-step 10"));
    assert!(stopped.stdout.contains("run/checkpoint-10"), "{}", stopped.stdout);
    assert_eq!(w.lines("run/metrics.jsonl").len(), 10);
    assert!(!w.exists("run/model.safetensors"));
    // The same command again finds that it has been done.
    let again = w.ok(&format!("{TRAIN} --output-dir run --stop-at-step 10 {RESUME}"));
    assert_eq!(again.stdout, stopped.stdout);
    assert_eq!(w.lines("run/metrics.jsonl").len(), 10);
    w.ok(&format!("{TRAIN} --output-dir run {RESUME}"));
    assert_uninterrupted(&w, "stopped at 10");

    // Nothing is left to do, and nothing is done.
    let again = w.ok(&format!("{TRAIN} --output-dir run {RESUME}"));
    assert!(again.stdout.contains("this run is finished"), "{}", again.stdout);
    // Nor is anything else done that is asked for now.
    w.fails(1, &format!("{TRAIN} --output-dir run {RESUME} --weight-decay 0.5"), &["--weight-decay", "0.5"]);
    assert_uninterrupted(&w, "resumed when finished");
}

#[test]
fn old_checkpoints_go_where_that_is_asked_for() {
    let w = workspace();
    let done = format!("{TRAIN} --save-total-limit 2");
    w.ok(&format!("{done} --output-dir run --stop-at-step 17"));
    let checkpoints =
        |run: &str| -> Vec<u64> { (0..=20).filter(|step| w.exists(&format!("{run}/checkpoint-{step}"))).collect() };
    assert_eq!(checkpoints("run"), [15, 17]);
    w.ok(&format!("{done} --output-dir run {RESUME}"));
    assert_eq!(checkpoints("run"), [17, 20]);
    let (found, expected) = (results(&w.path("run")), &UNINTERRUPTED.0);
    for file in ["model.safetensors", "metrics.jsonl", "checkpoint-20/optimizer.safetensors"] {
        assert!(found[file] == expected[file], "{file}");
    }
    w.fails(2, &format!("{TRAIN} --output-dir x --save-total-limit 0"), &["--save-total-limit"]);
}

/// Half of four steps and two are the same.
#[test]
fn a_warm_up_may_be_a_number_of_steps() {
    let w = workspace();
    let rates = |run: &str, flags: &str| {
        let line = TRAIN.replace("--warmup-ratio 0.1", flags).replace("--max-steps 20", "--max-steps 4");
        w.ok(&format!("{line} --output-dir {run}"));
        w.column(&format!("{run}/metrics.jsonl"), "learning_rate")
    };
    let (share, steps) = (rates("share", "--warmup-ratio 0.5"), rates("steps", "--warmup-steps 2"));
    assert!(share == steps && share[0] == 0.0 && share[1] > 0.0, "{share:?} {steps:?}");
    w.fails(2, &format!("{TRAIN} --output-dir x --warmup-steps 2"), &["--warmup-steps: says the same"]);
}

/// Fused and transposed tensors, biases and learned positions through checkpoints, in both dtypes; a resumed run reads
/// what it wrote. The trained model is scored and generates.
#[test]
fn gpt_neox_and_gpt2_train_stop_resume_and_are_used() {
    let common = json!({"vocab_size": 2048, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.1});
    let neox = json!({"model_type": "gpt_neox", "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 37, "rotary_pct": 0.4});
    let gpt2 = json!({"model_type": "gpt2", "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 46});
    for (own, dtype) in [(&neox, "bf16"), (&neox, "f32"), (&gpt2, "bf16"), (&gpt2, "f32")] {
        let w = workspace();
        w.copy_model("own");
        w.write("own/config.json", merged(common.clone(), own.clone()).to_string());
        std::fs::remove_file(w.path("own/model.safetensors")).unwrap();
        let line = format!("{TRAIN} --init random --dtype {dtype}").replace("--model model", "--model own");
        w.ok(&format!("{line} --output-dir whole"));
        w.ok(&format!("{line} --output-dir run --stop-at-step 7"));
        w.ok(&format!("{line} --output-dir run {RESUME}"));
        let [whole, run] = ["whole", "run"].map(|name| results(&w.path(name)));
        for name in ["model.safetensors", "metrics.jsonl", "evaluations.jsonl", "checkpoint-20/optimizer.safetensors"] {
            assert!(whole[name] == run[name], "{own} {dtype}: {name}");
        }
        w.ok("generate --model run --prompt film --max-new-tokens 6");
        let eval = w.ok("eval --model run --ref-model whole --dataset heldout.jsonl --max-length 40 --json");
        assert!(eval.stdout.contains("\"accuracy\":0.5,"), "{}", eval.stdout);
        w.ok("logps --model run --dataset heldout.jsonl --max-length 40 --out logps.jsonl");
        // The run itself as the start of another: its tensors have the names that loading expects.
        let again = TRAIN.replace("--model model", "--model run").replace("--max-steps 20", "--max-steps 1");
        w.ok(&format!("{again} --output-dir again"));
    }
}

/// 46 positions: what is longer is refused before anything is scored or trained.
#[test]
fn a_sequence_longer_than_the_learned_positions_is_refused() {
    let w = workspace();
    w.copy_model("own");
    let config =
        json!({"model_type": "gpt2", "vocab_size": 2048, "n_embd": 24, "n_layer": 1, "n_head": 4, "n_positions": 46});
    w.write("own/config.json", config.to_string());
    std::fs::remove_file(w.path("own/model.safetensors")).unwrap();
    let line = format!("{TRAIN} --init random --output-dir run").replace("--model model", "--model own");
    let long = line.replace("--max-length 40", "--max-length 90");
    w.fails(
        1,
        &long,
        &["--max-length: row ", "tokens, own has learned positions for 46; give --max-length 46 or less"],
    );
    let plan = "plan --objective sigmoid --beta 0.1 --model own --max-length 90";
    w.fails(1, plan, &["--max-length: 90, but own has learned positions for 46; give 46 or less"]);
    let samples = line.replace("--max-new-tokens 6", "--max-new-tokens 50");
    w.fails(1, &samples, &["--max-new-tokens: 50 tokens after a prompt of ", "learned positions for 46"]);
    w.write("rules.toml", "[[reward]]\nkind = 'length'\nunit = 'characters'\nmax = 4\nslope = 0.1\n");
    let online = "train --objective grpo --reward rules.toml --max-completion-length 46 --model own --dataset train.jsonl --max-length 40 --output-dir run --init random";
    w.fails(1, online, &["--max-completion-length: 46 tokens after the prompt of row ", "learned positions for 46"]);
    assert!(!w.exists("run") && w.cache_file().is_none(), "refused before anything is made");
    w.ok(&format!("{line} --max-steps 1").replace("--max-steps 20", ""));
    w.fails(1, "generate --model run --prompt film --max-new-tokens 50", &["--max-new-tokens: 50 tokens after"]);
    w.fails(1, "logps --model run --dataset train.jsonl --out x", &["--max-length: row "]);
}

/// At a step that no checkpoint was due at.
#[test]
fn a_run_continues_from_a_folder_that_is_named() {
    let w = workspace();
    w.ok(&format!("{TRAIN} --output-dir run --stop-at-step 7"));
    w.ok(&format!("{TRAIN} --output-dir run --resume-from-checkpoint run/checkpoint-7"));
    assert_uninterrupted(&w, "from checkpoint-7");
}

/// Going back to an older checkpoint and being interrupted there, too.
#[test]
fn a_run_that_goes_back_to_an_older_checkpoint_continues() {
    let w = workspace();
    w.ok(&format!("{TRAIN} --output-dir run --stop-at-step 15"));
    w.ok(&format!("{TRAIN} --output-dir run --resume-from-checkpoint run/checkpoint-5 --stop-at-step 7"));
    w.ok(&format!("{TRAIN} --output-dir run {RESUME}"));
    assert_uninterrupted(&w, "back to checkpoint-5");
}

#[test]
fn a_checkpoint_can_be_continued_in_another_folder() {
    let w = workspace();
    w.ok(&format!("{TRAIN} --output-dir first --stop-at-step 10"));
    w.ok(&format!("{TRAIN} --output-dir run --resume-from-checkpoint first/checkpoint-10"));
    // With the history of its first half, except for its samples and checkpoints.
    let differs =
        |name: &str| ["samples.jsonl", "checkpoint-5", "checkpoint-10"].contains(&name.split('/').next().unwrap());
    let of = |files: &BTreeMap<String, Vec<u8>>| files.clone().into_iter().filter(|(name, _)| !differs(name)).collect();
    assert_same("in another folder", &of(&UNINTERRUPTED.0), &of(&results(&w.path("run"))));
}

#[test]
fn killed_at_random_moments_it_continues_to_the_same_bits() {
    let (w, line) = (workspace(), format!("{TRAIN} --output-dir run {RESUME}"));
    let mut random = 0x2545_f491_4f6c_dd1d_u64 ^ u64::from(std::process::id());
    for _ in 0..8 {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let delay = UNINTERRUPTED.1.mul_f64((random >> 33) as f64 / (1u64 << 31) as f64);
        let running = w.spawn(&line);
        std::thread::sleep(delay);
        running.kill();
    }
    w.ok(&line);
    assert_uninterrupted(&w, "killed at random");
}

/// At the moments that random delays seldom hit.
#[test]
fn killed_at_the_worst_moments_it_continues_to_the_same_bits() {
    // Some last less than the time between two looks, so each also has what follows it.
    type Moment = (&'static str, fn(&Workspace) -> bool);
    let moments: [Moment; 9] = [
        ("the output folder is made", |w| w.exists("run")),
        ("scoring starts", |w| w.cache_file().is_some()),
        ("before the first step", |w| w.exists("run/samples.jsonl")),
        ("between steps", |w| w.so_far("run/metrics.jsonl").lines().count() >= 3),
        ("a checkpoint is started", |w| w.exists("run/checkpoint-5.tmp") || w.exists("run/checkpoint-5")),
        ("a checkpoint is half written", |w| {
            w.exists("run/checkpoint-10.tmp/optimizer.safetensors.tmp") || w.exists("run/checkpoint-10")
        }),
        ("a checkpoint is done", |w| w.exists("run/checkpoint-15")),
        ("the last samples are written", |w| w.so_far("run/samples.jsonl").contains("\"step\":20")),
        ("the model is written", |w| w.exists("run/model.safetensors.tmp") || w.exists("run/model.safetensors")),
    ];
    let (w, line) = (workspace(), format!("{TRAIN} --output-dir run {RESUME}"));
    for (what, moment) in moments {
        let mut running = w.spawn(&line);
        assert!(running.wait_until(|| moment(&w)), "never came to the moment when {what}");
        running.kill();
    }
    w.ok(&line);
    assert_uninterrupted(&w, "killed at the worst moments");
    assert!(w.names("run").iter().all(|name| !name.ends_with(".tmp")), "{:?}", w.names("run"));
    assert!(w.names(".").iter().all(|name| !name.starts_with("run.")), "{:?}", w.names("."));
}

#[test]
fn ctrl_c_writes_a_checkpoint() {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        let (w, line) = (workspace(), format!("{TRAIN} --output-dir run"));
        let mut running = w.spawn(&line);
        assert!(running.wait_until(|| w.so_far("run/metrics.jsonl").lines().count() >= 2));
        running.signal(signal);
        let stopped = running.wait();
        assert_eq!(stopped.code, Some(130), "{}", stopped.stderr);
        let (message, steps) = (stopped.error(), w.lines("run/metrics.jsonl").len());
        assert!(message.starts_with("interrupted: ") && message.contains(RESUME), "{message}");
        assert!(message.contains(&format!("run/checkpoint-{steps} ")), "{message}");
        w.ok(&format!("{line} {RESUME}"));
        assert_uninterrupted(&w, &format!("signal {signal} after step {steps}"));
    }
}

#[test]
fn weights_stored_in_bf16_lose_nothing_when_a_run_continues() {
    let (whole, parts) = (workspace(), workspace());
    let line = format!("{TRAIN} --output-dir run --dtype bf16");
    whole.ok(&line);
    parts.ok(&format!("{line} --stop-at-step 10"));
    parts.ok(&format!("{line} {RESUME}"));
    let (expected, found) = (results(&whole.path("run")), results(&parts.path("run")));
    assert_same("bf16", &expected, &found);
    assert!(expected["model.safetensors"].len() * 2 < UNINTERRUPTED.0["model.safetensors"].len() + 10_000);
    assert!(whole.text("run/config.json").contains("bfloat16"));
    // The file holds the rounded weights; the run went on with all their bits.
    let (rounded, metrics) = (&expected["metrics.jsonl"], &UNINTERRUPTED.0["metrics.jsonl"]);
    assert!(rounded == metrics, "bf16 is how weights are stored, not what is computed with");
}

// ---- what must not matter --------------------------------------------------------------------------------------

#[test]
fn threads_recomputation_and_accumulation_do_not_matter() {
    for (what, flags) in [
        ("one thread", "--threads 1"),
        ("recomputation", "--recompute"),
        ("accumulation", "--batch-size 1 --gradient-accumulation-steps 4"),
    ] {
        let w = workspace();
        // A flag that is given twice is an error, so these replace.
        let words: Vec<&str> = flags.split(' ').collect();
        let mut line: Vec<&str> = TRAIN.split_whitespace().collect();
        for flag in words.iter().filter(|word| word.starts_with("--")) {
            if let Some(at) = line.iter().position(|word| word == flag) {
                line.drain(at..at + 2);
            }
        }
        w.ok(&format!("{} {flags} --output-dir run", line.join(" ")));
        let mut found = results(&w.path("run"));
        if flags == "--recompute" {
            // It is more work, and says so.
            let is_state = |name: &str| name.ends_with("trainer_state.json");
            found.iter_mut().filter(|(name, _)| is_state(name)).for_each(|(name, state)| {
                let mut value: Value = serde_json::from_slice(state).unwrap();
                let expected: Value = serde_json::from_slice(&UNINTERRUPTED.0[name]).unwrap();
                assert!(value["total_flos"].as_f64() > expected["total_flos"].as_f64());
                value["total_flos"] = expected["total_flos"].clone();
                *state = format!("{value}\n").into_bytes();
            });
        }
        assert_same(what, &UNINTERRUPTED.0, &found);
    }
}

#[test]
fn sixteen_pairs_are_four_times_four() {
    let w = workspace();
    let line = "train --objective ipo --beta 0.1 --learning-rate 5e-4 --model model --dataset train.jsonl \
        --max-length 40 --max-steps 3 --save-steps 3";
    w.ok(&format!("{line} --batch-size 16 --output-dir whole"));
    w.ok(&format!("{line} --batch-size 4 --gradient-accumulation-steps 4 --output-dir parts"));
    assert_same("16 x 1 = 4 x 4", &results(&w.path("whole")), &results(&w.path("parts")));
}

#[test]
fn sharing_prompts_does_not_change_a_bit_of_the_log_probabilities() {
    let w = Workspace::new();
    let prompts = ["Review:", "Review: The film is", "Review: A long story of love and of loss, and"];
    let longer = |(i, row): (usize, &Value)| json!({"prompt": prompts[i % 3], "chosen": row["chosen"], "rejected": row["rejected"]});
    w.write_lines("train.jsonl", &reviews("train")[..60].iter().enumerate().map(longer).collect::<Vec<_>>());
    let line = "logps --model model --dataset train.jsonl";
    w.ok(&format!("{line} --out shared.jsonl"));
    for (name, flags) in [
        ("alone", "--no-prefix-sharing"),
        ("small", "--micro-batch-tokens 64"),
        ("small-alone", "--micro-batch-tokens 1 --no-prefix-sharing --threads 1"),
    ] {
        w.ok(&format!("{line} --out {name}.jsonl {flags}"));
        assert_eq!(w.text("shared.jsonl"), w.text(&format!("{name}.jsonl")), "{flags}");
    }

    let train = "train --objective sigmoid --beta 0.1 --learning-rate 5e-4 --model model --dataset train.jsonl \
        --max-length 64 --batch-size 8 --max-steps 3 --cache-dir";
    w.ok(&format!("{train} cache-a --output-dir on"));
    w.ok(&format!("{train} cache-b --output-dir off --no-prefix-sharing"));
    let (on, off) = (w.lines("on/metrics.jsonl"), w.lines("off/metrics.jsonl"));
    for key in ["loss", "rewards/margins", "logps/chosen", "logps/rejected", "num_tokens"] {
        assert_eq!(on[0][key], off[0][key], "{key}");
    }
    assert!(on[0]["tokens"].as_u64() < off[0]["tokens"].as_u64(), "nothing was shared");
    for (on, off) in w.column("on/metrics.jsonl", "loss").iter().zip(w.column("off/metrics.jsonl", "loss")) {
        assert!((on - off).abs() < 1e-5, "{on} with sharing, {off} without");
    }
}

/// For every objective: how a step is cut into micro-batches changes rounding, and nothing else.
#[test]
fn the_size_of_micro_batches_does_not_matter() {
    let w = workspace();
    for entry in objectives::all() {
        let name = entry.name;
        let param = |p: &objectives::ParamSpec| format!("{} {} ", p.flag(), p.example());
        let required = || entry.params.iter().filter(|p| p.required());
        let params: String = required().map(param).collect();
        let choice = objectives::Choice::one(name, required().map(|p| (p.name, p.example())).collect());
        let needs = choice.build().unwrap().needs();
        if needs.rewards || needs.prior {
            // The policy's own samples: tested in `online`.
            continue;
        }
        let line = format!(
            "train --objective {name} {params} --learning-rate 2e-4 --model model --dataset train.jsonl --max-length 40 \
             --batch-size 8 --max-steps 3"
        );
        w.ok(&format!("{line} --micro-batch-tokens 64 --output-dir {name}-64"));
        w.ok(&format!("{line} --micro-batch-tokens 4096 --output-dir {name}-4096"));
        let loss = |tokens: u32| w.column(&format!("{name}-{tokens}/metrics.jsonl"), "loss");
        let (small, large) = (loss(64), loss(4096));
        assert_ne!(large[0], large[2], "{name} does not train");
        for (step, (small, large)) in (1..).zip(small.iter().zip(&large)) {
            let difference = (small - large).abs() / large.abs().max(1.0);
            assert!(difference < 1e-5, "{name}, step {step}: {small} with 64 tokens, {large} with 4096");
        }
    }
}

// ---- step 0, references and the cache --------------------------------------------------------------------------

#[test]
fn the_first_step_finds_a_policy_that_is_its_reference() {
    let (w, beta) = (workspace(), 0.3);
    let line =
        "train --learning-rate 5e-4 --model model --dataset train.jsonl --max-length 40 --batch-size 8 --max-steps 2";
    let quarter = 0.25 / (beta * beta);
    for (name, flags, loss) in [
        ("sigmoid", "--beta 0.3", LN_2),
        ("dpo", "--beta 0.3 --label-smoothing 0.2", LN_2),
        ("sigmoid", "--beta 0.3 --ref-model model", LN_2),
        ("hinge", "--beta 0.3", 1.0),
        ("ipo", "--beta 0.3", quarter),
        ("ipo_sum", "--beta 0.3", quarter),
        ("ipo_margin1", "--beta 0.3", 1.0),
    ] {
        let run = format!("{name}{}", flags.replace(' ', ""));
        w.ok(&format!("{line} --objective {name} {flags} --output-dir {run}"));
        let lines = w.lines(&format!("{run}/metrics.jsonl"));
        for key in ["rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"] {
            assert_eq!(lines[0][key], json!(0.0), "{run}: {key}");
            assert_ne!(lines[1][key], json!(0.0), "{run}: {key}");
        }
        let found = lines[0]["loss"].as_f64().unwrap();
        assert!((found - loss).abs() < 1e-12 * loss, "{run}: {found} instead of {loss}");
    }
    // One reference, however it is named: one cache file.
    assert!(w.cache_file().is_some());
    // Smoothed labels pull less.
    let margin = |run: &str| w.column(&format!("{run}/metrics.jsonl"), "grad_norm")[0];
    let (plain, smoothed) = (margin("sigmoid--beta0.3"), margin("dpo--beta0.3--label-smoothing0.2"));
    assert!((smoothed / plain - 0.6).abs() < 1e-4, "{smoothed} of {plain}");
}

#[test]
fn a_scored_reference_is_not_scored_again() {
    let w = workspace();
    w.ok(&format!("{TRAIN} --output-dir run"));
    let cache = w.cache_file().unwrap();
    let state = || (std::fs::read(&cache).unwrap(), cache.metadata().unwrap().modified().unwrap());
    let before = state();
    w.ok(&format!("{TRAIN} --output-dir again"));
    assert!(state() == before, "the cache changed");
    assert_same("from the cache", &results(&w.path("run")), &results(&w.path("again")));

    // Another loss asks the same of the same reference; new rows are added behind the old ones.
    w.ok(&format!("{} --output-dir hinge", TRAIN.replace("sigmoid", "hinge")));
    assert!(state() == before, "the cache changed");
    w.write_lines("train.jsonl", &reviews("train")[..80]);
    w.ok(&format!("{TRAIN} --output-dir more"));
    let (bytes, _) = state();
    assert!(bytes.len() > before.0.len() && bytes.starts_with(&before.0));
}

/// A trial of a few steps does not wait for the whole file.
#[test]
fn only_what_a_run_will_see_is_scored() {
    let w = Workspace::with_reviews(40);
    let line = "train --objective sigmoid --beta 0.1 --model model --dataset train.jsonl --batch-size 4";
    let size = || w.cache_file().unwrap().metadata().unwrap().len();
    w.ok(&format!("{line} --max-steps 2 --output-dir two"));
    let two = size();
    w.ok(&format!("{line} --max-steps 2 --output-dir again"));
    assert_eq!(size(), two);
    w.ok(&format!("{line} --num-train-epochs 1 --output-dir all"));
    assert!(size() > 3 * two, "{} and {two} bytes", size());
    let losses = |run: &str| w.column(&format!("{run}/metrics.jsonl"), "loss");
    assert_eq!(losses("two")[0], losses("all")[0]);
}

#[test]
fn scoring_continues_where_it_was_killed() {
    let w = Workspace::new();
    w.write_lines("train.jsonl", &reviews("train")[..2200]);
    let line =
        "train --objective sigmoid --beta 0.1 --model model --dataset train.jsonl --max-length 32 --stop-at-step 1";
    let size = |w: &Workspace| w.cache_file().map_or(0, |path| path.metadata().unwrap().len());
    // A header has 48 bytes; a shard of 256 rows some 40 KB.
    let mut running = w.spawn(&format!("{line} --output-dir run"));
    assert!(running.wait_until(|| size(&w) > 1000), "scoring ended too early to be interrupted");
    running.kill();
    let path = w.cache_file().unwrap();
    let first = std::fs::read(&path).unwrap();
    assert!(!w.exists("run/metrics.jsonl"), "scoring was over");

    // The second time a signal asks for the end: what is scored is kept, whole.
    let mut running = w.spawn(&format!("{line} --output-dir run {RESUME}"));
    assert!(running.wait_until(|| size(&w) > first.len() as u64), "scoring ended too early to be interrupted");
    running.signal(libc::SIGINT);
    let stopped = running.wait();
    assert_eq!(stopped.code, Some(130), "{}", stopped.stderr);
    assert!(stopped.error().contains("scored log-probabilities are in"), "{}", stopped.stderr);
    let second = std::fs::read(&path).unwrap();
    assert!(second.len() > first.len() && second.starts_with(&first));

    w.ok(&format!("{line} --output-dir run {RESUME}"));
    let all = std::fs::read(&path).unwrap();
    assert!(all.len() > second.len() && all.starts_with(&second));

    let fresh = Workspace::new();
    fresh.write("train.jsonl", w.read("train.jsonl"));
    fresh.ok(&format!("{line} --output-dir run"));
    assert!(std::fs::read(fresh.cache_file().unwrap()).unwrap() == all, "the same cache without an interruption");
    assert_same("interrupted scoring", &results(&fresh.path("run")), &results(&w.path("run")));
}

// ---- learning --------------------------------------------------------------------------------------------------

#[test]
fn sft_learns_from_text_completions_and_pairs() {
    let w = Workspace::new();
    let rows = &reviews("train")[..60];
    let join = |row: &Value| format!("{}{}", row["prompt"].as_str().unwrap(), row["chosen"].as_str().unwrap());
    let text: Vec<Value> = rows.iter().map(|row| json!({"text": join(row)})).collect();
    let completions: Vec<Value> =
        rows.iter().map(|row| json!({"prompt": row["prompt"], "completion": row["chosen"]})).collect();
    w.write_lines("text.jsonl", &text);
    w.write_lines("completions.jsonl", &completions);
    w.write_lines("pairs.jsonl", rows);
    for form in ["text", "completions", "pairs"] {
        w.ok(&format!(
            "train --objective sft --learning-rate 1e-3 --model model --dataset {form}.jsonl --max-length 300 \
             --batch-size 20 --max-steps 9 --no-shuffle --eval-dataset {form}.jsonl --output-dir {form}"
        ));
        let losses = w.column(&format!("{form}/metrics.jsonl"), "loss");
        assert!(losses[6..].iter().zip(&losses).all(|(after, before)| *after < before - 0.1), "{form}: {losses:?}");
        assert!(w.column(&format!("{form}/evaluations.jsonl"), "eval_perplexity").is_sorted_by(|a, b| a > b));

        // The mean over the tokens of the whole batch, of the model as it was.
        w.ok(&format!("logps --model model --dataset {form}.jsonl --out {form}-logps.jsonl"));
        let suffix = if form == "pairs" { "_chosen" } else { "" };
        let column = |name: &str| w.column(&format!("{form}-logps.jsonl"), &format!("{name}{suffix}"));
        let (logps, tokens) = (column("logps"), column("tokens"));
        let expected = -logps[..20].iter().sum::<f64>() / tokens[..20].iter().sum::<f64>();
        assert!((losses[0] - expected).abs() < 1e-9, "{form}: {} instead of {expected}", losses[0]);
        let perplexity = w.column(&format!("{form}/evaluations.jsonl"), "eval_perplexity")[0];
        let expected = (-logps.iter().sum::<f64>() / tokens.iter().sum::<f64>()).exp();
        assert!((perplexity / expected - 1.0).abs() < 1e-9, "{form}: {perplexity} instead of {expected}");
    }
    // Rejected completions play no part.
    assert_eq!(w.column("pairs/metrics.jsonl", "loss"), w.column("completions/metrics.jsonl", "loss"));
    assert!(w.cache_file().is_none(), "sft has no reference");
}

/// What people preferred can be learnt from labels, not from noise.
#[test]
fn the_quickstart_learns_and_its_control_does_not() {
    let w = Workspace::new();
    let accuracy = |recipe: &str| {
        let recipe_file = root().join(format!("recipes/{recipe}.toml"));
        w.ok(&format!(
            "train {} --max-steps 60 --eval-steps 60 --save-steps 60 --output-dir {recipe}",
            recipe_file.display()
        ));
        let evaluations = w.lines(&format!("{recipe}/evaluations.jsonl"));
        assert_eq!(evaluations.len(), 2, "before and after");
        assert_eq!(evaluations[0]["eval_accuracy"], json!(0.5));
        assert_eq!(evaluations[0]["eval_margin"], json!(0.0));
        evaluations[1]["eval_accuracy"].as_f64().unwrap()
    };
    let (learnt, control) = (accuracy("quickstart"), accuracy("control"));
    assert!(learnt > 0.7, "{learnt}");
    assert!((0.44..=0.56).contains(&control), "{control}");
}
