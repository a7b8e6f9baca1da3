//! What is measured of every run: what `cuvee eval` is told, what it says, and what the runs themselves have logged.

use std::ffi::OsString;
use std::fs;
use std::path::Path;

use serde_json::Value as Json;
use toml::{Table, Value};

use crate::checkpoint::json::read_json;
use crate::cli::{Failure, parse, recipe};
use crate::error::{Error, Result};
use crate::lab::Metrics;

/// A loss of base ability that is worth a sentence, where the recipe does not say.
const TOLERANCE: f64 = 0.05;
const KEYS: [&str; 7] = ["baseline", "reward_model", "tasks", "reward", "ability", "tolerance", "metrics"];
/// What is said to `cuvee eval` for each run.
const DECIDED: [&str; 7] = ["model", "json", "threads", "log_samples", "plot", "dataset", "ref_model"];

/// `[measure]`
#[derive(Debug, Clone, PartialEq)]
pub struct Measure {
    /// `@name`
    pub baseline: String,
    /// `@name`, or a folder.
    pub reward_model: Option<String>,
    /// `(NAME, file)`; none: only what the runs log is looked at.
    pub tasks: Vec<(String, String)>,
    /// The rest, by the names of flags of `cuvee eval`.
    pub flags: Table,
    pub reward: String,
    pub ability: String,
    pub tolerance: f64,
    pub metrics: Vec<String>,
}

impl Default for Measure {
    /// What every run with `eval_dataset` logs.
    fn default() -> Self {
        Self {
            baseline: String::new(),
            reward_model: None,
            tasks: Vec::new(),
            flags: Table::new(),
            reward: "eval_accuracy".into(),
            ability: "eval_perplexity".into(),
            tolerance: TOLERANCE,
            metrics: Vec::new(),
        }
    }
}

impl Measure {
    pub fn read(table: &Table, folder: &Path) -> Result<Self, String> {
        let text = |key: &str| match table.get(key) {
            None => Ok(None),
            Some(Value::String(text)) if !text.is_empty() => Ok(Some(text.clone())),
            Some(value) => Err(format!("{key}: expected a text, found {value}")),
        };
        let texts = |key: &str| match table.get(key) {
            None => Ok(Vec::new()),
            Some(Value::Array(values)) => {
                let text = |value: &Value| {
                    value.as_str().map(String::from).ok_or(format!("{key}: expected texts, found {value}"))
                };
                values.iter().map(text).collect()
            }
            Some(value) => Err(format!("{key}: expected a list of texts, found {value}")),
        };
        let from_here = |path: &str| recipe::clean(&folder.join(path)).to_string_lossy().into_owned();
        let task = |task: String| match task.split_once('=') {
            Some((name, file)) if !name.is_empty() && !file.is_empty() => Ok((name.to_string(), from_here(file))),
            _ => Err(format!("tasks: expected NAME=FILE, found {task:?}")),
        };
        if table.contains_key("task") {
            return Err("task: a list of them is called tasks".into());
        }
        let mut rest = table.clone();
        KEYS.iter().for_each(|key| drop(rest.remove(*key)));
        if let Some(key) = rest.keys().find(|key| DECIDED.contains(&key.replace('-', "_").as_str())) {
            return Err(format!("{key}: is what compare decides for each run; drop it"));
        }
        let default = Self::default();
        let tolerance = match table.get("tolerance") {
            None => default.tolerance,
            Some(value) => {
                let number =
                    value.as_float().or(value.as_integer().map(|n| n as f64)).filter(|x| *x >= 0.0 && x.is_finite());
                number.ok_or(format!("tolerance: expected a number of 0 or more, found {value}"))?
            }
        };
        let measure = Self {
            baseline: text("baseline")?.unwrap_or_default(),
            reward_model: text("reward_model")?.map(|path| if path.starts_with('@') { path } else { from_here(&path) }),
            tasks: texts("tasks")?.into_iter().map(task).collect::<Result<_, _>>()?,
            flags: recipe::resolve(&recipe::subcommand("eval"), &rest, folder, &KEYS)?,
            reward: text("reward")?.unwrap_or(default.reward),
            ability: text("ability")?.unwrap_or(default.ability),
            tolerance,
            metrics: texts("metrics")?,
        };
        if measure.tasks.is_empty()
            && let Some(key) = ["reward_model"]
                .into_iter()
                .chain(measure.flags.keys().map(String::as_str))
                .find(|key| table.contains_key(*key))
        {
            return Err(format!("{key}: does nothing without tasks = [\"NAME=FILE\", ...]"));
        }
        let named = [&measure.reward, &measure.ability].into_iter().chain(&measure.metrics);
        for metric in named.filter(|metric| !metric.starts_with("eval_")) {
            let task = metric.split('/').next().unwrap_or_default();
            if !measure.tasks.iter().any(|(name, _)| name == task) {
                return Err(format!(
                    "{metric:?} is of no task; metrics are TASK/METRIC with a task of `tasks`, or what `cuvee train` logs, as eval_accuracy"
                ));
            }
        }
        Ok(measure)
    }
}

impl Measure {
    /// Parses what `cuvee eval` will be told.
    pub fn check(&self) -> Result<(), String> {
        if self.tasks.is_empty() {
            return Ok(());
        }
        let mut args: Vec<OsString> =
            ["cuvee", "eval", "--json", "--model=m", "--baseline=b"].map(OsString::from).to_vec();
        args.extend(self.reward_model.iter().map(|_| "--reward-model=r".into()));
        args.extend(self.tasks.iter().map(|(name, file)| format!("--task={name}={file}").into()));
        args.extend(recipe::flags_of(&self.flags));
        parse(args).map(|_| ()).map_err(Failure::into_text)
    }
}

/// What `cuvee eval --json` says about a model, as `TASK/METRIC`.
pub fn evaluated(path: &Path, model: &str) -> Result<Metrics> {
    let json = read_json(path)?;
    let models = json["models"].as_array().map(Vec::as_slice).unwrap_or_default();
    let found = models.iter().find(|one| one["model"].as_str() == Some(model));
    let tasks = found.and_then(|one| one["tasks"].as_object());
    let tasks =
        tasks.ok_or_else(|| Error::file(path, format!("says nothing about {model}; delete it and compare again")))?;
    let of_task = |(task, metrics): (&String, &Json)| {
        let metrics = metrics.as_object().cloned().unwrap_or_default().into_iter();
        let number = |value: Json| if value.is_null() { Some(f64::NAN) } else { value.as_f64() };
        let metrics = metrics.filter_map(|(metric, value)| Some((format!("{task}/{metric}"), number(value)?)));
        metrics.collect::<Vec<_>>()
    };
    Ok(tasks.iter().flat_map(of_task).collect())
}

/// What a training run's last evaluation said; nothing where there was none.
pub fn logged(run: &Path) -> Metrics {
    let text = fs::read_to_string(run.join("evaluations.jsonl")).unwrap_or_default();
    let last: Option<serde_json::Map<String, Json>> =
        text.lines().last().and_then(|line| serde_json::from_str(line).ok());
    let number = |(key, value): (String, Json)| {
        let time = key == "eval_runtime" || key == "eval_rows";
        Some((key, value.as_f64()?)).filter(|(key, _)| key.starts_with("eval_") && !time)
    };
    last.into_iter().flatten().filter_map(number).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Measure, String> {
        Measure::read(&text.parse().unwrap(), Path::new("recipes"))
    }

    #[test]
    fn what_is_wrong_is_named() {
        let cases = [
            ("tolerence = 1", "unknown key \"tolerence\"; did you mean \"tolerance\"?"),
            ("tolerance = -1", "tolerance: expected a number of 0 or more, found -1"),
            ("baseline = 3", "baseline: expected a text, found 3"),
            ("tasks = 'x'", "tasks: expected a list of texts"),
            ("task = ['x']", "task: a list of them is called tasks"),
            ("tasks = ['x']", "tasks: expected NAME=FILE, found \"x\""),
            ("tasks = ['a=b.jsonl']\nmodel = 'm'", "model: is what compare decides"),
            ("reward_model = 'm'", "reward_model: does nothing without tasks"),
            ("tasks = ['a=b.jsonl']\nreward = 'x/acc'", "\"x/acc\" is of no task"),
        ];
        for (text, expected) in cases {
            let message = read(text).unwrap_err();
            assert!(message.contains(expected), "{text}: {message}");
        }
        let measure =
            read("tasks = ['a=../b.jsonl']\nability = 'a/nll'\nreward_model = '../m'\nbaseline = '@sft'").unwrap();
        assert_eq!(measure.tasks, [("a".to_string(), "b.jsonl".to_string())]);
        assert_eq!((measure.reward_model.as_deref(), measure.reward.as_str()), (Some("m"), "eval_accuracy"));
    }

    #[test]
    fn metrics_come_from_the_evaluation_and_from_the_log() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("eval.json");
        let text = r#"{"baseline": "b", "models": [{"model": "b", "tasks": {}}, {"model": "m", "tasks":
            {"x": {"kind": "choice", "items": 4, "acc": 0.5, "acc_stderr": 0.25}, "y": {"nll": null}}}]}"#;
        fs::write(&path, text).unwrap();
        let metrics = evaluated(&path, "m").unwrap();
        assert_eq!((metrics.len(), metrics["x/acc"], metrics["x/acc_stderr"]), (4, 0.5, 0.25));
        assert!(metrics["y/nll"].is_nan());
        assert!(evaluated(&path, "n").unwrap_err().to_string().contains("says nothing about n"));

        assert!(logged(folder.path()).is_empty());
        let lines = "{\"step\":0,\"eval_accuracy\":0.5}\n{\"step\":9,\"eval_accuracy\":0.75,\"eval_loss\":null,\"eval_rows\":9}\n";
        fs::write(folder.path().join("evaluations.jsonl"), lines).unwrap();
        assert_eq!(logged(folder.path()), Metrics::from([("eval_accuracy".into(), 0.75)]));
    }
}
