//! The plan against the memory that the system counts for a run of a real model.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use libtest_mimic::{Completion, Failed, Trial};
use serde_json::Value;

const MODEL: &str = "SmolLM2-135M-Instruct";
/// Of the measured peak.
const TOLERANCE: f64 = 0.05;

pub fn trials(root: &Path) -> Vec<Trial> {
    let trial = |(name, flags): (&str, &'static [&'static str])| {
        let root = root.to_path_buf();
        Trial::ignorable_test(format!("memory::{MODEL}::{name}"), move || {
            let Some(model) = at_hand() else {
                return Ok(Completion::ignored_with("the model is not at hand; see CUVEE_MODELS_DIR"));
            };
            planned_is_measured(&root, &model, flags).map(|()| Completion::Completed)
        })
    };
    let generate = {
        let root = root.to_path_buf();
        Trial::ignorable_test(format!("memory::{MODEL}::generate"), move || {
            let Some(model) = at_hand() else {
                return Ok(Completion::ignored_with("the model is not at hand; see CUVEE_MODELS_DIR"));
            };
            said_is_measured(&root, &model).map(|()| Completion::Completed)
        })
    };
    let runs = [("everything", &[] as &[&str]), ("recompute", &["--recompute"]), ("lora", &["--lora-rank", "16"])];
    runs.map(trial).into_iter().chain([generate]).collect()
}

fn at_hand() -> Option<PathBuf> {
    let model = PathBuf::from(std::env::var_os("CUVEE_MODELS_DIR")?).join(MODEL);
    model.join("config.json").exists().then_some(model)
}

/// What generation says that it takes, for many prompts with completions that all run at once.
fn said_is_measured(root: &Path, model: &Path) -> Result<(), Failed> {
    let dir = tempfile::tempdir()?;
    let [errors, out] = ["stderr", "out.jsonl"].map(|name| dir.path().join(name));
    let mut command = Command::new(env!("CARGO_BIN_EXE_cuvee"));
    command.args(["generate", "--samples", "2", "--max-new-tokens", "3", "--device", "cpu", "--max-running", "64"]);
    command.arg("--model").arg(model).arg("--out").arg(out);
    command.arg("--prompts").arg(root.join("assets/film-reviews/heldout.jsonl.gz"));
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(std::fs::File::create(&errors)?).spawn()?;
    let peak = peak_of(child)?;
    let text = std::fs::read_to_string(errors)?;
    let said = text.lines().find_map(|line| line.split_once(" MiB in all")).ok_or("it says nothing of memory")?;
    let planned = said.0.trim().parse::<f64>()? * f64::from(1 << 20);
    close(planned, peak)
}

fn close(planned: f64, peak: f64) -> Result<(), Failed> {
    match (planned - peak).abs() > TOLERANCE * peak {
        true => Err(format!("planned {planned} bytes, measured {peak}").into()),
        false => Ok(()),
    }
}

/// The most memory that it had, as the system counts, once it has ended well.
fn peak_of(mut child: Child) -> Result<f64, Failed> {
    let (status, mut peak) = (format!("/proc/{}/status", child.id()), 0.0f64);
    let ended = loop {
        if let Some(ended) = child.try_wait()? {
            break ended;
        }
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:")?.strip_suffix(" kB"));
        peak = peak.max(line.and_then(|kib| kib.trim().parse().ok()).unwrap_or(0.0) * 1024.0);
        std::thread::sleep(Duration::from_millis(20));
    };
    match ended.success() {
        true => Ok(peak),
        false => Err(format!("the run ended with {ended}").into()),
    }
}

fn planned_is_measured(root: &Path, model: &Path, flags: &[&str]) -> Result<(), Failed> {
    let dir = tempfile::tempdir()?;
    let cuvee = |subcommand: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cuvee"));
        command.args([subcommand, "--objective", "sigmoid", "--beta", "0.1", "--batch-size", "4", "--max-steps", "2"]);
        command.arg("--model").arg(model).arg("--dataset").arg(root.join("assets/film-reviews/heldout.jsonl.gz"));
        command.arg("--output-dir").arg(dir.path().join("run")).arg("--cache-dir").arg(dir.path().join("cache"));
        command.args(flags).stdin(Stdio::null()).stderr(Stdio::null());
        command
    };
    let plan: Value = serde_json::from_slice(&cuvee("plan").arg("--json").output()?.stdout)?;
    let planned = plan["peak_bytes"].as_f64().ok_or("the plan has no peak")?;

    close(planned, peak_of(cuvee("train").stdout(Stdio::null()).spawn()?)?)
}
