//! What the cells of a sweep say about over-optimisation: every evaluation as a point, gold rewards on one scale, fits of those that
//! can be believed, what loss and accuracy would have told.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::equal::Matched;
use super::fit::{Fitted, FittedGroup, Measurement, fit_groups};
use super::race::{self, Halving, Place};
use crate::checkpoint::json::{read_json, write_json};
use crate::error::{At, Error, Result};
use crate::scaling::correlation;
use crate::train::evaluations;

/// What a sweep leaves for its report, in its folder.
pub const LAB: &str = "lab.json";

/// Of what completions had before training: below this share of distinct pairs of neighbouring tokens, or by so many nats a token less
/// likely under the reference, what a gold reward says is about another kind of text than it was made for.
const DISTINCT: f64 = 0.5;
const UNLIKELY: f64 = 3.0;
const RESAMPLES: usize = 500;

/// A run of a sweep.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    pub name: String,
    /// What is fitted together: the arm and the grid but for beta.
    pub group: String,
    /// The model that it starts from.
    pub size: String,
    pub objective: String,
    pub beta: Option<f64>,
    pub seed: Option<u64>,
    /// Where its logs are, as seen from the sweep's folder.
    pub dir: PathBuf,
    /// Trains it, as seen from where the sweep was started; safe to run twice.
    pub command: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    pub recipe: PathBuf,
    /// Completions of an evaluation.
    pub samples: usize,
    pub cells: Vec<Cell>,
    /// Of a race of the cells.
    #[serde(default)]
    pub halving: Option<Halving>,
}

impl Plan {
    pub fn write(&self, dir: &Path) -> Result<()> {
        write_json(&dir.join(LAB), self)
    }

    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(LAB);
        if !path.exists() {
            return Err(Error::file(dir, format!("holds no {LAB}; give the output folder of `cuvee lab sweep`")));
        }
        serde_json::from_value(read_json(&path)?).at(&path)
    }
}

/// One evaluation of a cell.
#[derive(Clone, Debug, PartialEq)]
pub struct Look {
    pub cell: usize,
    pub step: f64,
    pub epoch: f64,
    pub d: f64,
    pub d_stderr: f64,
    /// In standard deviations of the size's completions before training, whose mean is 0 (Gao et al., section 2.2).
    pub gold: f64,
    pub gold_stderr: f64,
    pub valid: bool,
    /// As it was logged, `eval_` taken off.
    pub logged: BTreeMap<String, f64>,
}

impl Look {
    pub fn of(&self, name: &str) -> f64 {
        self.logged.get(name).copied().unwrap_or(f64::NAN)
    }
}

/// What a sweep came to so far.
pub struct Overopt {
    pub plan: Plan,
    pub looks: Vec<Look>,
    pub fitted: Fitted,
    /// Of a race, what became of whom.
    pub places: Vec<Place>,
    /// A metric of base ability, if evaluations have one: less is better.
    pub tax: Option<String>,
}

fn numbers(line: &Map<String, Value>) -> BTreeMap<String, f64> {
    let number =
        |(key, value): (&String, &Value)| Some((key.strip_prefix("eval_").unwrap_or(key).to_string(), value.as_f64()?));
    line.iter().filter_map(number).collect()
}

/// Mean and standard deviation of the gold reward before training, by size; of all cells of that size.
fn scales(plan: &Plan, logged: &[(usize, BTreeMap<String, f64>)]) -> BTreeMap<String, (f64, f64)> {
    let mut starts: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
    for (cell, line) in logged.iter().filter(|(_, line)| line.get("step") == Some(&0.0)) {
        if let (Some(mean), Some(stderr)) = (line.get("gold"), line.get("gold_stderr")) {
            let spread = stderr * (plan.samples as f64).sqrt();
            starts.entry(plan.cells[*cell].size.clone()).or_default().push((*mean, spread));
        }
    }
    let average = |starts: Vec<(f64, f64)>| {
        let n = starts.len() as f64;
        let (means, spreads): (Vec<f64>, Vec<f64>) = starts.into_iter().unzip();
        let spread = spreads.iter().sum::<f64>() / n;
        (means.iter().sum::<f64>() / n, if spread > 0.0 { spread } else { 1.0 })
    };
    starts.into_iter().map(|(size, starts)| (size, average(starts))).collect()
}

/// What the cells have logged by now; cells that have not begun have no points.
///
/// # Errors
/// A log that cannot be read.
pub fn looks(dir: &Path, plan: &Plan) -> Result<Vec<Look>> {
    let mut logged = Vec::new();
    for (at, cell) in plan.cells.iter().enumerate() {
        logged.extend(evaluations(&dir.join(&cell.dir))?.iter().map(|line| (at, numbers(line))));
    }
    let scales = scales(plan, &logged);
    let mut looks: Vec<Look> = Vec::new();
    for (cell, line) in logged {
        let (Some((mean, spread)), Some(gold)) = (scales.get(&plan.cells[cell].size), line.get("gold")) else {
            continue;
        };
        let of = |name: &str| line.get(name).copied().unwrap_or(f64::NAN);
        looks.push(Look {
            cell,
            step: of("step"),
            epoch: of("epoch"),
            d: of("sqrt_kl"),
            d_stderr: of("sqrt_kl_stderr"),
            gold: (gold - mean) / spread,
            gold_stderr: of("gold_stderr") / spread,
            valid: true,
            logged: line,
        });
    }
    let starts: Vec<Option<Look>> = (0..plan.cells.len())
        .map(|cell| looks.iter().find(|look| look.cell == cell && look.step == 0.0).cloned())
        .collect();
    for look in &mut looks {
        if let Some(start) = &starts[look.cell] {
            let share = look.of("completions/distinct_2") / start.of("completions/distinct_2");
            let fallen = start.of("completions/ref_logp") - look.of("completions/ref_logp");
            // What is not known is no reason to doubt.
            look.valid = !(share < DISTINCT || fallen > UNLIKELY) && look.d.is_finite();
        }
    }
    Ok(looks)
}

impl Overopt {
    /// Reads what there is by now.
    ///
    /// # Errors
    /// A folder that is no sweep's, a log that cannot be read.
    pub fn read(dir: &Path) -> Result<Self> {
        let plan = Plan::read(dir)?;
        let looks = looks(dir, &plan)?;
        let tax = looks.iter().flat_map(|look| look.logged.keys()).find(|key| key.ends_with("/nll")).cloned();
        let points = looks.iter().filter(|look| look.step > 0.0 && look.d.is_finite());
        let point = |look: &Look| Measurement {
            group: plan.cells[look.cell].group.clone(),
            run: look.cell as u64,
            d: look.d,
            gold: look.gold,
            stderr: look.gold_stderr,
            valid: look.valid,
        };
        let fitted =
            fit_groups(points.map(point).collect(), "gold reward, standard deviations at the start", RESAMPLES, 42);
        let places = race::read(dir)?;
        Ok(Self { plan, looks, fitted, places, tax })
    }

    pub fn of_cell(&self, cell: usize) -> impl Iterator<Item = &Look> {
        self.looks.iter().filter(move |look| look.cell == cell)
    }

    pub fn of_group(&self, group: &str) -> impl Iterator<Item = &Look> {
        self.looks.iter().filter(move |look| self.plan.cells[look.cell].group == group)
    }

    /// The groups that have points, in the order of the recipe.
    pub fn groups(&self) -> Vec<&FittedGroup> {
        self.fitted.groups.iter().collect()
    }

    pub fn sizes(&self) -> Vec<&str> {
        let mut sizes: Vec<&str> = Vec::new();
        for cell in &self.plan.cells {
            if !sizes.contains(&cell.size.as_str()) {
                sizes.push(&cell.size);
            }
        }
        sizes
    }

    /// Correlation of what training sees with the gold reward over the points behind the start.
    pub fn told(&self, group: &str, name: &str) -> f64 {
        let points: Vec<(f64, f64)> = self
            .of_group(group)
            .filter(|look| look.step > 0.0)
            .map(|look| (look.of(name), look.gold))
            .filter(|(x, y)| x.is_finite() && y.is_finite())
            .collect();
        let (x, y): (Vec<f64>, Vec<f64>) = points.into_iter().unzip();
        correlation(&x, &y)
    }

    /// Whether the gold reward rises and falls within what was measured, in words, for each group.
    pub fn verdicts(&self) -> Vec<(String, String)> {
        let verdict = |group: &FittedGroup| {
            let most = group.points.iter().filter(|p| p.valid).map(|p| p.d).fold(0.0, f64::max);
            let shown = group.shown().and_then(|fit| Some((fit.peak, fit.bootstrap.as_ref()?)));
            let text = match shown {
                None => "too few points to tell".to_string(),
                Some((Some(peak), bootstrap)) if bootstrap.peak_d.high < most && bootstrap.peaks >= 0.95 => format!(
                    "a hump: the gold reward is highest at d = {:.2} [{:.2}, {:.2}], and points go on to {most:.2}",
                    peak.d, bootstrap.peak_d.low, bootstrap.peak_d.high
                ),
                Some((Some(peak), bootstrap)) if peak.d < most => format!(
                    "perhaps a hump: the curve is highest at d = {:.2} [{:.2}, {}], which the points up to {most:.2} do not confine",
                    peak.d,
                    bootstrap.peak_d.low,
                    if bootstrap.peak_d.high.is_finite() {
                        format!("{:.2}", bootstrap.peak_d.high)
                    } else {
                        "∞".into()
                    }
                ),
                Some(_) => format!("no hump: nothing falls up to d = {most:.2}"),
            };
            (group.name.clone(), text)
        };
        self.groups().into_iter().map(verdict).collect()
    }

    pub fn to_json(&self) -> Value {
        let point = |look: &Look| {
            let cell = &self.plan.cells[look.cell];
            json!({"cell": cell.name, "group": cell.group, "size": cell.size, "objective": cell.objective, "beta": cell.beta,
                   "seed": cell.seed, "run": look.cell, "step": look.step, "epoch": look.epoch, "d": look.d,
                   "d_stderr": look.d_stderr, "gold": look.gold, "gold_stderr": look.gold_stderr, "valid": look.valid,
                   "logged": look.logged})
        };
        let told = |group: &FittedGroup| {
            let of = |name: &str| json!(Some(self.told(&group.name, name)).filter(|r| r.is_finite()));
            json!({"group": group.name, "loss": of("loss"), "implicit_accuracy": of("accuracy")})
        };
        json!({
            "recipe": self.plan.recipe,
            "cells": self.plan.cells,
            "verdicts": self.verdicts().iter().map(|(group, text)| json!({"group": group, "verdict": text})).collect::<Vec<_>>(),
            "fits": self.fitted.to_json()["groups"],
            "correlation_with_gold": self.groups().into_iter().map(told).collect::<Vec<_>>(),
            "tax": self.tax,
            "equal": Matched::of(self).to_json(),
            "race": self.plan.halving.as_ref().map(|halving| json!({"halving": halving, "places": self.places})),
            "points": self.looks.iter().map(point).collect::<Vec<_>>(),
        })
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::device::Philox;

    /// A sweep of two sizes, two betas and two seeds whose gold reward is planted; the last evaluation of one repeats itself.
    pub fn sweep(dir: &Path) {
        let noise = Philox::named(1, "sweep");
        let mut cells = Vec::new();
        for (size, beta, seed) in
            [("small", 0.01, 1), ("small", 0.5, 1), ("small", 0.01, 2), ("large", 0.01, 1), ("large", 0.5, 1)]
        {
            let at = cells.len();
            let run = PathBuf::from(format!("runs/{at}"));
            std::fs::create_dir_all(dir.join(&run)).unwrap();
            let lines = (0..12).map(|k| {
                let d: f64 = f64::from(k) * if beta < 0.1 { 0.4 } else { 0.15 };
                let gold = if k == 0 { 0.0 } else { d * (0.6 - 0.5 * d.ln()) } + 0.01 * noise.normal((at * 100 + k as usize) as u64);
                let distinct = if (at, k) == (0, 11) { 0.2 } else { 0.9 };
                format!(
                    "{{\"step\": {k}, \"epoch\": {}, \"eval_loss\": {}, \"eval_accuracy\": {}, \"eval_sqrt_kl\": {d}, \"eval_sqrt_kl_stderr\": 0.05, \
                     \"eval_gold\": {}, \"eval_gold_stderr\": 0.25, \"eval_completions/distinct_2\": {distinct}, \"eval_base/nll\": {}, \
                     \"eval_completions/ref_logp\": -2.0, \"eval_completions/mean_length\": 20, \"eval_length/r2\": 0.1}}\n",
                    f64::from(k) / 12.0, 0.7 - 0.02 * f64::from(k), 0.5 + 0.03 * f64::from(k), 3.0 + 2.0 * gold, 2.0 + 0.1 * d
                )
            });
            std::fs::write(dir.join(&run).join("evaluations.jsonl"), lines.collect::<String>()).unwrap();
            cells.push(Cell {
                name: format!("dpo beta={beta} model=@{size}, seed {seed}"),
                group: format!("dpo {size}"),
                size: size.into(),
                objective: "sigmoid".into(),
                beta: Some(beta),
                seed: Some(seed),
                dir: run,
                command: "cuvee train <x>".into(),
            });
        }
        cells.push(Cell { name: "not begun".into(), dir: "runs/none".into(), ..cells[0].clone() });
        Plan { recipe: "lab.toml".into(), samples: 64, cells, halving: None }.write(dir).unwrap();
    }

    #[test]
    fn golds_are_on_one_scale_and_what_repeats_itself_is_left_out() {
        let folder = tempfile::tempdir().unwrap();
        assert!(Overopt::read(folder.path()).err().unwrap().to_string().contains("holds no lab.json"));
        sweep(folder.path());
        let found = Overopt::read(folder.path()).unwrap();
        assert_eq!(
            (found.sizes(), found.tax.as_deref(), found.looks.len()),
            (vec!["small", "large"], Some("base/nll"), 60)
        );
        // Logged as 3 + 2 gold, with a standard deviation of 0.25 * 8 = 2.
        let start = found.of_cell(1).next().unwrap();
        assert!(start.gold.abs() < 0.03 && (start.gold_stderr - 0.125).abs() < 1e-12, "{start:?}");
        assert_eq!(found.looks.iter().filter(|look| !look.valid).count(), 1);
        let (small, json) = (found.groups()[0], found.to_json());
        let peak = small.fits[0].peak.unwrap();
        assert!((peak.d - (0.6_f64 / 0.5 - 1.0).exp()).abs() < 0.1 && small.points.len() == 33, "{peak:?}");
        assert!(found.verdicts()[0].1.starts_with("a hump"), "{:?}", found.verdicts());
        assert!(found.told("dpo small", "accuracy") < 0.0);
        assert_eq!(json["points"].as_array().unwrap().len(), 60);
        assert_eq!(json["fits"][0]["fits"][0]["peak_d"].as_f64().unwrap(), peak.d);
    }
}
