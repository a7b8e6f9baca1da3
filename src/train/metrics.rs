//! The line of a step, and what a script that reads trainer_state.json expects.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::checkpoint::json::{read_json, write_json};
use crate::error::{At, Error, Result};
use crate::objectives::Metric;

pub const METRICS: &str = "metrics.jsonl";
pub const EVALUATIONS: &str = "evaluations.jsonl";
pub const TRAINER_STATE: &str = "trainer_state.json";

/// One line of metrics.jsonl.
pub struct Line<'a> {
    pub step: u64,
    pub epoch: f64,
    pub loss: f64,
    /// Before clipping.
    pub grad_norm: f64,
    /// Share of the updates of single weights that rounding left without effect.
    pub lost_updates: f64,
    /// Of this step.
    pub learning_rate: f64,
    pub metrics: &'a [Metric],
    /// Seconds of this optimizer step, without evaluation, saving or reference scoring.
    pub step_time: f64,
    /// Rows run through the policy in this step, after sharing.
    pub tokens: usize,
    /// Tokens of all sequences so far, prompts counted once for each, as TRL counts.
    pub num_tokens: u64,
}

impl Line<'_> {
    pub fn to_json(&self) -> Map<String, Value> {
        let mut line = Map::new();
        line.insert("step".into(), self.step.into());
        line.insert("epoch".into(), self.epoch.into());
        line.insert("loss".into(), self.loss.into());
        line.insert("grad_norm".into(), self.grad_norm.into());
        line.insert("lost_updates".into(), self.lost_updates.into());
        line.insert("learning_rate".into(), self.learning_rate.into());
        self.metrics.iter().for_each(|(name, value)| drop(line.insert(name.to_string(), (*value).into())));
        line.insert("step_time".into(), self.step_time.into());
        line.insert("tokens".into(), self.tokens.into());
        line.insert("num_tokens".into(), self.num_tokens.into());
        line
    }
}

/// The lines of a log.
pub type Lines = Vec<Map<String, Value>>;

/// The lines of a log of this run.
pub fn read_lines(path: &Path) -> Result<Lines> {
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = std::fs::read_to_string(path).at(path)?;
    text.lines().map(|line| serde_json::from_str(line).at(path)).collect()
}

/// The evaluations of the run in a folder.
pub fn evaluations(output: &Path) -> Result<Lines> {
    read_lines(&output.join(EVALUATIONS))
}

/// The lines that metrics.jsonl and evaluations.jsonl held when a checkpoint was written. The run may have gone on
/// since, or back, or elsewhere.
pub fn read_history(checkpoint: &Path) -> Result<(Lines, Lines)> {
    let path = checkpoint.join(TRAINER_STATE);
    let history = read_json(&path)?.get_mut("log_history").map(Value::take).unwrap_or_default();
    let lines: Lines = serde_json::from_value(history)
        .map_err(|e| Error::file(&path, format!("has no usable \"log_history\": {e}; use another checkpoint")))?;
    Ok(lines.into_iter().partition(|line| !line.contains_key("eval_loss")))
}

/// What trainer_state.json says beside the history.
pub struct TrainerState {
    pub global_step: u64,
    pub epoch: f64,
    pub max_steps: u64,
    /// Whole passes that `max_steps` begins.
    pub num_train_epochs: u64,
    /// Per device, without accumulation.
    pub train_batch_size: usize,
    pub num_tokens: u64,
    pub total_flops: f64,
    pub eval_steps: Option<u64>,
    pub save_steps: Option<u64>,
}

impl TrainerState {
    /// Writes `dir/trainer_state.json` with the history that the logs in `output` hold up to this step.
    pub fn write(&self, output: &Path, dir: &Path) -> Result<()> {
        let step_of = |line: &Map<String, Value>| line.get("step").and_then(Value::as_u64).unwrap_or(0);
        let mut history = read_lines(&output.join(METRICS))?;
        history.extend(read_lines(&output.join(EVALUATIONS))?);
        history.retain(|line| step_of(line) <= self.global_step);
        // Stable: a step's own line comes before its evaluation.
        history.sort_by_key(step_of);
        let state = json!({
            "best_global_step": null,
            "best_metric": null,
            "best_model_checkpoint": null,
            "epoch": self.epoch,
            "eval_steps": self.eval_steps.unwrap_or(0),
            "global_step": self.global_step,
            "is_hyper_param_search": false,
            "is_local_process_zero": true,
            "is_world_process_zero": true,
            "log_history": history,
            "logging_steps": 1,
            "max_steps": self.max_steps,
            "num_input_tokens_seen": self.num_tokens,
            "num_train_epochs": self.num_train_epochs,
            "save_steps": self.save_steps.unwrap_or(0),
            "stateful_callbacks": {},
            "total_flos": self.total_flops,
            "train_batch_size": self.train_batch_size,
            "trial_name": null,
            "trial_params": null,
        });
        write_json(&dir.join(TRAINER_STATE), &state)
    }
}
