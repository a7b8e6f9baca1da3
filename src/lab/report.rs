//! What an experiment comes to: every arm's metrics with their spread, what it costs beside the baseline, and who is on the
//! front of reward against base ability.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::scatter::{Dot, Scatter, scatter_svg};
use super::table::spread;
use crate::checkpoint::json::write_json;
use crate::checkpoint::write_file;
use crate::error::Result;
use crate::train::Estimate;

/// Metrics of one model as `TASK/METRIC`, with `TASK/METRIC_stderr` beside some. NaN is a number that there is not.
pub type Metrics = BTreeMap<String, f64>;

/// What the user wants to see.
#[derive(Debug, Clone, PartialEq)]
pub struct Axes {
    /// The arm that others are compared with.
    pub baseline: String,
    /// `TASK/METRIC` that alignment is to raise.
    pub reward: String,
    /// `TASK/METRIC` that it should not cost.
    pub ability: String,
    /// A loss of ability up to this is not worth a sentence; in the metric's unit.
    pub tolerance: f64,
    /// The table's columns; empty = all that there are.
    pub metrics: Vec<String>,
}

/// One model of one seed; no seed where all seeds share it.
pub struct Measured {
    pub seed: Option<u64>,
    pub metrics: Metrics,
}

/// All runs of an arm.
pub struct Arm {
    pub name: String,
    /// The name without what the grid adds; arms of one method are joined in the figure.
    pub method: String,
    /// What the grid adds.
    pub point: String,
    pub runs: Vec<Measured>,
    /// Of runs that failed: which, and why.
    pub failed: Vec<String>,
}

pub struct Report {
    pub seeds: u64,
    pub axes: Axes,
    pub arms: Vec<Arm>,
}

/// Metrics that are better when they are smaller.
fn lower_is_better(metric: &str) -> bool {
    let name = metric.rsplit('/').next().unwrap_or(metric);
    name == "nll" || name == "bits_per_byte" || name.ends_with("perplexity")
}

impl Arm {
    fn values(&self, metric: &str) -> Vec<f64> {
        self.runs.iter().filter_map(|run| run.metrics.get(metric)).copied().collect()
    }

    fn mean(&self, metric: &str) -> Option<f64> {
        let values = self.values(metric);
        (!values.is_empty()).then(|| spread(&values).0)
    }

    /// Mean and standard error of what it has more than the baseline: over seeds, each with the baseline's run of its own; of
    /// a single run over the items that it was measured on.
    fn difference(&self, baseline: &Arm, metric: &str) -> Option<Estimate> {
        let mut pairs: Vec<(&Measured, &Measured, f64)> = Vec::new();
        for run in &self.runs {
            // What all seeds share goes with every seed.
            let others = baseline.runs.iter().filter(|o| o.seed == run.seed || o.seed.is_none() || run.seed.is_none());
            for other in others {
                if let (Some(ours), Some(theirs)) = (run.metrics.get(metric), other.metrics.get(metric)) {
                    pairs.push((run, other, ours - theirs));
                }
            }
        }
        let (run, other, difference) = pairs.first()?;
        if pairs.len() > 1 {
            return Some(Estimate::of(&pairs.iter().map(|pair| pair.2).collect::<Vec<_>>()));
        }
        let stderr = |run: &Measured| run.metrics.get(&format!("{metric}_stderr")).copied().unwrap_or(0.0);
        Some(Estimate { mean: *difference, stderr: stderr(run).hypot(stderr(other)) })
    }
}

impl Report {
    fn baseline(&self) -> Option<&Arm> {
        self.arms.iter().find(|arm| arm.name == self.axes.baseline)
    }

    /// Those that are there, in the order of the recipe or else as the evaluations name them.
    fn metrics(&self) -> Vec<&str> {
        if !self.axes.metrics.is_empty() {
            return self.axes.metrics.iter().map(String::as_str).collect();
        }
        let (first, second) = (&self.axes.reward, &self.axes.ability);
        let mut all = vec![first.as_str(), second.as_str()];
        for metric in self.arms.iter().flat_map(|arm| &arm.runs).flat_map(|run| run.metrics.keys()) {
            let counts = ["_stderr", "/items", "/skipped"].iter().any(|end| metric.ends_with(end));
            // What training logs in groups, such as eval_rewards/chosen, is for its own curves.
            let group = metric.starts_with("eval_") && metric.contains('/');
            if !counts && !group && !all.contains(&metric.as_str()) {
                all.push(metric);
            }
        }
        all
    }

    /// Reward and ability of an arm, both better when larger.
    fn place(&self, arm: &Arm) -> Option<(f64, f64)> {
        let better = |metric: &str| Some(arm.mean(metric)? * if lower_is_better(metric) { -1.0 } else { 1.0 });
        let (reward, ability) = (better(&self.axes.reward)?, better(&self.axes.ability)?);
        (reward.is_finite() && ability.is_finite()).then_some((reward, ability))
    }

    /// Whether no other arm has at least as much of both, and more of one.
    fn is_on_front(&self, arm: &Arm) -> bool {
        let Some((reward, ability)) = self.place(arm) else { return false };
        let beats = |(r, a): (f64, f64)| r >= reward && a >= ability && (r > reward || a > ability);
        !self.arms.iter().filter_map(|other| self.place(other)).any(beats)
    }

    /// What an arm does to base ability, in words, where it is worse by more than the tolerance and twice the standard error.
    fn loss(&self, arm: &Arm) -> Option<String> {
        let (baseline, Axes { ability, tolerance, .. }) = (self.baseline()?, &self.axes);
        if arm.name == baseline.name {
            return None;
        }
        let found = arm.mean(ability)?;
        if !found.is_finite() {
            return Some(format!("loses base ability: {}: {ability} is not a number", arm.name));
        }
        let Estimate { mean, stderr } = arm.difference(baseline, ability)?;
        let worse = if lower_is_better(ability) { mean } else { -mean };
        (worse > *tolerance && worse > 2.0 * stderr).then(|| {
            format!(
                "loses base ability: {}: {ability} {} instead of {} ({mean:+.3} ± {stderr:.3})",
                arm.name,
                number(found),
                number(baseline.mean(ability).unwrap_or(f64::NAN)),
            )
        })
    }

    fn rows(&self) -> Vec<Vec<String>> {
        let metrics = self.metrics();
        let differences = [&self.axes.reward, &self.axes.ability];
        let mut head: Vec<String> = vec!["arm".into(), "runs".into()];
        head.extend(metrics.iter().map(|metric| metric.to_string()));
        head.extend(differences.map(|metric| format!("Δ {metric}")));
        head.push("front".into());
        let row = |arm: &Arm| {
            let mut row = vec![arm.name.clone(), arm.runs.len().to_string()];
            row.extend(metrics.iter().map(|metric| with_spread(&arm.values(metric))));
            row.extend(differences.map(|metric| match self.baseline() {
                Some(baseline) if baseline.name != arm.name => {
                    arm.difference(baseline, metric).map_or(String::new(), |Estimate { mean, .. }| {
                        if mean.is_finite() { format!("{mean:+.3}") } else { "-".into() }
                    })
                }
                _ => String::new(),
            }));
            row.push(if self.is_on_front(arm) { "★".into() } else { String::new() });
            row
        };
        std::iter::once(head).chain(self.arms.iter().map(row)).collect()
    }

    /// What is to be said beside the numbers, a line each.
    fn remarks(&self) -> Vec<String> {
        let Axes { baseline, ability, tolerance, reward, .. } = &self.axes;
        let mut front: Vec<(&Arm, (f64, f64))> = Vec::new();
        for arm in self.arms.iter().filter(|arm| self.is_on_front(arm)) {
            front.extend(self.place(arm).map(|place| (arm, place)));
        }
        front.sort_by(|a, b| a.1.0.total_cmp(&b.1.0));
        let front: Vec<&str> = front.iter().map(|(arm, _)| arm.name.as_str()).collect();
        let mut lines = vec![format!(
            "On the front of {reward} and {ability}, by rising reward: {}.",
            if front.is_empty() { "nobody".into() } else { front.join("; ") }
        )];
        let losses: Vec<String> = self.arms.iter().filter_map(|arm| self.loss(arm)).collect();
        if losses.is_empty() {
            lines.push(format!(
                "No arm loses base ability: {ability} is nowhere worse than {baseline}'s by {tolerance}."
            ));
        }
        lines.extend(losses);
        lines.extend(self.arms.iter().flat_map(|arm| &arm.failed).map(|why| format!("FAILED: {why}")));
        let spread = match self.seeds {
            1 => "One seed says nothing of the spread between runs.".to_string(),
            seeds => format!("± is the standard deviation over runs, of {seeds} seeds."),
        };
        lines.push(format!(
            "{spread} Δ is the difference from {baseline}, seed by seed. Ability is \
             lost where it is worse by more than {tolerance} and by more than 2 standard errors."
        ));
        lines
    }

    pub fn text(&self) -> String {
        let rows = self.rows();
        let widths: Vec<usize> =
            (0..rows[0].len()).map(|c| rows.iter().map(|row| row[c].chars().count()).max().unwrap_or(0)).collect();
        let mut out = String::new();
        for row in &rows {
            let cells = row.iter().zip(&widths).enumerate();
            let cells = cells.map(|(c, (cell, width))| match c {
                0 => format!("{cell:<width$}"),
                _ => format!("  {cell:>width$}"),
            });
            let _ = writeln!(out, "{}", cells.collect::<String>().trim_end());
        }
        out + "\n" + &self.remarks().join("\n") + "\n"
    }

    /// A table as GitHub shows it.
    pub fn markdown(&self) -> String {
        let mut rows = self.rows().into_iter().map(|row| format!("| {} |\n", row.join(" | ")));
        let head = rows.next().expect("a head");
        let line = format!("|---|{}\n", "--:|".repeat(head.matches(" | ").count()));
        let remarks: String =
            self.remarks().iter().map(|line| format!("\n{}\n", line.replace('\n', "\n\n    "))).collect();
        head + &line + &rows.collect::<String>() + &remarks
    }

    pub fn to_json(&self) -> Value {
        let finite = |x: f64| if x.is_finite() { json!(x) } else { Value::Null };
        let arm = |arm: &Arm| {
            let (mut mean, mut sd, mut difference) = (Map::new(), Map::new(), Map::new());
            for metric in self.metrics() {
                let values = arm.values(metric);
                if values.is_empty() {
                    continue;
                }
                let (middle, wide) = spread(&values);
                mean.insert(metric.into(), finite(middle));
                sd.insert(metric.into(), if values.len() > 1 { finite(wide) } else { Value::Null });
                if let Some(Estimate { mean, stderr }) = self.baseline().and_then(|base| arm.difference(base, metric)) {
                    difference.insert(metric.into(), json!({"mean": finite(mean), "stderr": finite(stderr)}));
                }
            }
            let runs = arm.runs.iter().map(|run| {
                let metrics: Map<String, Value> = run.metrics.iter().map(|(k, v)| (k.clone(), finite(*v))).collect();
                json!({"seed": run.seed, "metrics": metrics})
            });
            json!({"arm": arm.name, "method": arm.method, "grid": arm.point, "mean": mean, "sd": sd,
                   "difference": difference, "front": self.is_on_front(arm), "loses_base_ability": self.loss(arm).is_some(),
                   "failed": arm.failed, "runs": runs.collect::<Vec<_>>()})
        };
        let Axes { baseline, reward, ability, tolerance, .. } = &self.axes;
        json!({"seeds": self.seeds, "baseline": baseline, "reward": reward, "ability": ability, "tolerance": tolerance,
               "arms": self.arms.iter().map(arm).collect::<Vec<_>>()})
    }

    fn figure(&self) -> String {
        let Axes { reward, ability, baseline, .. } = &self.axes;
        let dot = |arm: &Arm| {
            let of = |metric: &str| Some(spread(&arm.values(metric))).filter(|(mean, _)| mean.is_finite());
            let wide = |sd: f64| if sd.is_finite() { sd } else { 0.0 };
            let ((x, x_sd), (y, y_sd)) = (of(reward)?, of(ability)?);
            let (method, label) = (arm.method.clone(), arm.point.clone());
            Some(Dot { method, label, at: (x, y), spread: (wide(x_sd), wide(y_sd)), on_front: self.is_on_front(arm) })
        };
        scatter_svg(&Scatter {
            title: format!("Reward against base ability, {} seed(s)", self.seeds),
            x_label: reward.clone(),
            y_label: ability.clone(),
            x_down: lower_is_better(reward),
            y_down: lower_is_better(ability),
            baseline: baseline.clone(),
            dots: self.arms.iter().filter_map(dot).collect(),
        })
    }

    /// Writes `compare.json`, `compare.txt`, `compare.md` and `compare.svg`.
    pub fn write(&self, dir: &Path) -> Result<()> {
        write_json(&dir.join("compare.json"), &self.to_json())?;
        let files = [("compare.txt", self.text()), ("compare.md", self.markdown()), ("compare.svg", self.figure())];
        files.iter().try_for_each(|(name, text)| write_file(&dir.join(name), |out| out.write_all(text.as_bytes())))
    }
}

fn with_spread(values: &[f64]) -> String {
    match (spread(values), values.len()) {
        (_, 0) => "-".into(),
        ((mean, _), _) if !mean.is_finite() => "not a number".into(),
        ((mean, _), 1) => number(mean),
        ((mean, sd), _) => format!("{} ± {}", number(mean), number(sd)),
    }
}

fn number(x: f64) -> String {
    match x.abs() {
        size if size < 10.0 => format!("{x:.3}"),
        size if size < 100.0 => format!("{x:.2}"),
        _ => format!("{x:.1}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arm(name: &str, runs: &[(f64, f64)]) -> Arm {
        let measured = |(seed, (reward, nll)): (usize, &(f64, f64))| Measured {
            seed: Some(seed as u64),
            metrics: BTreeMap::from([
                ("r/reward".into(), *reward),
                ("s/nll".into(), *nll),
                ("s/nll_stderr".into(), 0.01),
                ("s/items".into(), 9.0),
            ]),
        };
        let (method, point) = name.split_once(' ').unwrap_or((name, ""));
        let runs = runs.iter().enumerate().map(measured).collect();
        Arm { name: name.into(), method: method.into(), point: point.into(), runs, failed: Vec::new() }
    }

    fn report(arms: Vec<Arm>) -> Report {
        let axes = Axes {
            baseline: "sft".into(),
            reward: "r/reward".into(),
            ability: "s/nll".into(),
            tolerance: 0.05,
            metrics: Vec::new(),
        };
        Report { seeds: 3, axes, arms }
    }

    #[test]
    fn who_destroys_base_ability_is_named_and_who_does_not_is_not() {
        let mut failing = arm("broken", &[]);
        failing.failed.push("broken, seed 42: it was to be".into());
        let report = report(vec![
            arm("sft", &[(0.0, 4.0), (0.1, 4.1), (0.2, 3.9)]),
            arm("dpo beta=0.1", &[(1.0, 4.01), (1.1, 4.12), (1.2, 3.91)]),
            // Worse on average, by less than its spread.
            arm("dpo beta=1", &[(0.5, 3.5), (0.5, 5.5), (0.6, 3.6)]),
            arm("wild", &[(2.0, 7.0), (2.1, 7.5), (1.9, 7.2)]),
            arm("nan", &[(f64::NAN, f64::NAN)]),
            failing,
        ]);
        let text = report.text();
        assert!(text.contains("loses base ability: wild: s/nll 7.233 instead of 4.000 (+3.233"), "{text}");
        assert!(text.contains("loses base ability: nan: s/nll is not a number"), "{text}");
        assert_eq!(text.matches("loses base ability").count(), 2, "{text}");
        assert!(
            text.contains("FAILED: broken, seed 42") && text.contains("by rising reward: sft; dpo beta=0.1; wild."),
            "{text}"
        );
        assert!(!text.contains("items") && !text.contains("stderr"), "{text}");
        let json = report.to_json();
        let lost: Vec<bool> =
            json["arms"].as_array().unwrap().iter().map(|arm| arm["loses_base_ability"] == true).collect();
        assert_eq!(lost, [false, false, false, true, true, false]);
        let difference = &json["arms"][1]["difference"]["s/nll"];
        assert!((difference["mean"].as_f64().unwrap() - 0.04 / 3.0).abs() < 1e-12, "{difference}");
        let svg = report.figure();
        assert!(svg.ends_with("</svg>\n") && !svg.contains("NaN"), "{svg}");
        let markdown = report.markdown();
        assert!(markdown.starts_with("| arm | runs | r/reward | s/nll |") && markdown.contains("★ |"), "{markdown}");
    }

    #[test]
    fn one_run_is_judged_by_the_spread_of_its_items() {
        let mut report = report(vec![arm("sft", &[(0.0, 4.0)]), arm("a", &[(1.0, 4.2)]), arm("b", &[(1.0, 4.04)])]);
        let text = report.text();
        assert!(text.contains("loses base ability: a:") && text.contains("(+0.200 ± 0.014)"), "{text}");
        assert_eq!(text.matches("loses base ability").count(), 1, "{text}");
        // A gain is no loss, whatever its size, and what is better depends on the metric.
        report.axes.ability = "r/reward".into();
        assert!(report.text().contains("No arm loses base ability"));
    }
}
