//! What a run came to: a table before and after, samples, curves. Read from the run's own logs, so a resumed run
//! reports the same as an uninterrupted one.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::exam::Exam;
use super::metrics::{EVALUATIONS, Lines, METRICS, read_lines};
use super::plan::Plan;
use super::plot::{Panel, Series, curves_svg, sparkline};
use super::run::SAMPLES;
use crate::checkpoint::write_file;
use crate::error::Result;
use crate::machine::human;

pub struct Report {
    output: PathBuf,
    objective: String,
    metrics: Lines,
    evaluations: Lines,
    samples: Lines,
    /// Tasks and the metric that stands for each.
    tasks: Vec<(String, &'static str)>,
    /// What was in use at most, and what the plan said; of the process that finished the run.
    memory: Option<String>,
}

/// (label, key of an evaluation, factor, decimals, unit)
type Row = (&'static str, &'static str, f64, usize, &'static str);

const TABLE: &[Row] = &[
    ("pair accuracy", "eval_accuracy", 100.0, 1, " %"),
    ("margin", "eval_margin", 1.0, 3, " nats"),
    ("loss", "eval_loss", 1.0, 4, ""),
    ("perplexity of chosen", "eval_perplexity", 1.0, 2, ""),
];

/// Of a run on completions of the policy's own. What the data says in their place is not trained on.
const ONLINE: &[Row] = &[
    ("reward", "eval_reward", 1.0, 3, ""),
    ("KL from the reference", "eval_kl", 1.0, 2, " nats"),
    ("completion length", "eval_completions/mean_length", 1.0, 1, " tokens"),
    ("pair accuracy", "eval_accuracy", 100.0, 1, " %"),
    ("loss on given answers", "eval_loss", 1.0, 4, ""),
    ("their perplexity", "eval_perplexity", 1.0, 2, ""),
];

impl Report {
    /// Reads the logs of a run.
    pub fn read(output: &Path, objective: &str) -> Result<Self> {
        let lines = |name: &str| read_lines(&output.join(name));
        let (metrics, evaluations, samples) = (lines(METRICS)?, lines(EVALUATIONS)?, lines(SAMPLES)?);
        Ok(Self {
            output: output.to_path_buf(),
            objective: objective.to_string(),
            metrics,
            evaluations,
            samples,
            tasks: Vec::new(),
            memory: None,
        })
    }

    /// Adds what the evaluations asked besides.
    pub fn with_tasks(self, exams: &[Exam]) -> Self {
        let tasks = exams.iter().map(|exam| (exam.task.name.clone(), exam.task.metrics()[0])).collect();
        Self { tasks, ..self }
    }

    /// Adds the peak of resident memory, where the system tells it, and the plan's.
    pub fn with_memory(self, peak_bytes: Option<usize>, plan: &Plan) -> Self {
        let memory = peak_bytes.map(|peak| match plan.gpu {
            true => format!("{}, {} planned of the GPU", human(peak), human(plan.peak_device_bytes)),
            false => format!("{} (planned {})", human(peak), human(plan.peak_bytes)),
        });
        Self { memory, ..self }
    }

    /// The end of a run, as text.
    pub fn text(&self) -> String {
        let mut out = String::new();
        self.table(&mut out);
        self.generations(&mut out);
        self.sparklines(&mut out);
        let sum = |name: &str| self.metrics.iter().filter_map(|line| number(line, name)).sum::<f64>();
        let (steps, seconds, sampling) = (self.metrics.len(), sum("step_time"), sum("sampling_time"));
        let speed = sum("tokens") / (seconds - sampling).max(1e-9);
        let apart = match self.online() {
            true => format!("{sampling:.1} of them sampling and judging, trained on "),
            false => String::new(),
        };
        let _ = writeln!(out, "{steps} steps in {seconds:.1} s, {apart}{speed:.0} tokens/s");
        if let Some(memory) = &self.memory {
            let _ = writeln!(out, "peak memory {memory}");
        }
        let _ = writeln!(out, "model   {}", self.output.display());
        let _ = writeln!(out, "curves  {}", self.plot_path().display());
        out
    }

    fn table(&self, out: &mut String) {
        let (Some(before), Some(after)) = (self.evaluations.first(), self.evaluations.last()) else { return };
        let rows = number(after, "eval_rows").unwrap_or(0.0);
        let width = if self.online() { 20 } else { 14 };
        let _ = writeln!(out, "{:<24}{:>width$}{:>width$}", format!("{rows} held-out rows"), "before", "after");
        for (label, key, factor, decimals, unit) in if self.online() { ONLINE } else { TABLE } {
            let error = |line| {
                number(line, &format!("{key}_stderr"))
                    .map_or(String::new(), |e| format!(" ± {:.decimals$}", factor * e))
            };
            let cell =
                |line| number(line, key).map(|value| format!("{:.decimals$}{}{unit}", factor * value, error(line)));
            if let (Some(before), Some(after)) = (cell(before), cell(after)) {
                let _ = writeln!(out, "{label:<24}{before:>width$}{after:>width$}");
            }
        }
        for (name, metric) in &self.tasks {
            let cell = |line| number(line, &format!("eval_{name}/{metric}")).map(|value| format!("{value:.4}"));
            if let (Some(before), Some(after)) = (cell(before), cell(after)) {
                let _ = writeln!(out, "{:<24}{before:>width$}{after:>width$}", format!("{name} {metric}"));
            }
        }
        out.push('\n');
    }

    /// The course of the run at a glance.
    fn sparklines(&self, out: &mut String) {
        let offline = [("training loss", "loss"), ("reward margin", "rewards/margins")];
        let online = [("reward", "reward"), ("tokens written", "completions/mean_length")];
        for (label, key) in if self.online() { online } else { offline } {
            let values: Vec<f64> = self.metrics.iter().filter_map(|line| number(line, key)).collect();
            if let ([first, .., last], true) = (values.as_slice(), values.len() >= 10) {
                let _ = writeln!(out, "{label:<14} {first:.3} {} {last:.3}", sparkline(&values, 50));
            }
        }
        out.push('\n');
    }

    fn generations(&self, out: &mut String) {
        let step = |line: &Map<String, Value>| number(line, "step").unwrap_or(0.0);
        let Some(last) = self.samples.iter().map(step).reduce(f64::max) else { return };
        for (title, wanted) in [("before", 0.0), ("after", last)] {
            let lines: Vec<_> = self.samples.iter().filter(|line| step(line) == wanted).collect();
            if lines.is_empty() {
                continue;
            }
            let _ = writeln!(out, "samples {title} training");
            for line in lines {
                let text = |key: &str| line.get(key).and_then(Value::as_str).unwrap_or("").replace('\n', " ");
                let _ = writeln!(out, "  {}|{}", text("prompt"), text("completion"));
            }
        }
        out.push('\n');
    }

    /// Whether it learns from completions of its own, which have rewards.
    fn online(&self) -> bool {
        self.metrics.iter().any(|line| line.contains_key("reward"))
    }

    fn plot_path(&self) -> PathBuf {
        self.output.join("curves.svg")
    }

    pub fn write_plot(&self) -> Result<()> {
        let svg = curves_svg(&format!("cuvee: {}", self.objective), "step", &self.panels());
        write_file(&self.plot_path(), |out| out.write_all(svg.as_bytes()))
    }

    fn panels(&self) -> Vec<Panel> {
        let train = |name: &str, key: &str| series(&self.metrics, name, key);
        let eval = |name: &str, key: &str| series(&self.evaluations, name, key);
        let panel = |title: &str, y_label: &str, series: Vec<Series>| {
            let series: Vec<Series> = series.into_iter().filter(|s| !s.points.is_empty()).collect();
            (!series.is_empty()).then(|| Panel { title: title.into(), y_label: y_label.into(), series })
        };
        let loss = match self.online() {
            // What is minimised has no scale of its own.
            true => panel("loss on given answers", "nats", vec![eval("held out", "eval_loss")]),
            false => panel("loss", "nats", vec![train("training", "loss"), eval("held out", "eval_loss")]),
        };
        let panels = [
            panel("reward", "", vec![train("training", "reward"), eval("held out", "eval_reward")]),
            panel("KL from the reference", "nats a completion", vec![eval("held out", "eval_kl")]),
            panel(
                "length of completions",
                "tokens",
                vec![train("training", "completions/mean_length"), eval("held out", "eval_completions/mean_length")],
            ),
            loss,
            panel(
                "reward margin",
                "chosen - rejected",
                vec![train("training", "rewards/margins"), eval("held out", "eval_rewards/margins")],
            ),
            panel(
                "pair accuracy",
                "share",
                vec![train("training", "rewards/accuracies"), eval("held out", "eval_accuracy")],
            ),
            panel(
                "log-probability of completions",
                "nats",
                vec![train("chosen", "logps/chosen"), train("rejected", "logps/rejected")],
            ),
            panel("gradient norm, before clipping", "", vec![train("training", "grad_norm")]),
            panel("learning rate", "", vec![train("training", "learning_rate")]),
        ];
        let task = |(name, metric): &(String, &'static str)| {
            panel(&format!("{name} {metric}"), "", vec![eval("policy", &format!("eval_{name}/{metric}"))])
        };
        panels.into_iter().chain(self.tasks.iter().map(task)).flatten().collect()
    }
}

fn number(line: &Map<String, Value>, key: &str) -> Option<f64> {
    line.get(key).and_then(Value::as_f64)
}

fn series(lines: &Lines, name: &str, key: &str) -> Series {
    let points = lines.iter().filter_map(|line| Some((number(line, "step")?, number(line, key)?))).collect();
    Series { name: name.into(), points }
}
