//! The plan against the memory that the system counts for a run of a real model.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
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
            let model = std::env::var_os("CUVEE_MODELS_DIR").map(|dir| PathBuf::from(dir).join(MODEL));
            let Some(model) = model.filter(|dir| dir.join("config.json").exists()) else {
                return Ok(Completion::ignored_with("the model is not at hand; see CUVEE_MODELS_DIR"));
            };
            planned_is_measured(&root, &model, flags).map(|()| Completion::Completed)
        })
    };
    let runs = [("everything", &[] as &[&str]), ("recompute", &["--recompute"]), ("lora", &["--lora-rank", "16"])];
    runs.map(trial).into()
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

    let mut child = cuvee("train").stdout(Stdio::null()).spawn()?;
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
    if !ended.success() {
        return Err(format!("the run ended with {ended}").into());
    }
    if (planned - peak).abs() > TOLERANCE * peak {
        return Err(format!("planned {planned} bytes, measured {peak}").into());
    }
    Ok(())
}
