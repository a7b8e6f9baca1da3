//! Several models in the same tasks, beside a baseline.

use std::fmt::Write;

use serde_json::{Map, Value, json};

use super::{Measure, Outcome};

/// A model and what it came to in each task.
pub struct Examined {
    /// As it was named.
    pub model: String,
    pub outcomes: Vec<Outcome>,
}

/// At least one model, all of them in the same tasks.
pub struct Table {
    baseline: usize,
    tasks: Vec<String>,
    models: Vec<Examined>,
}

/// A name, and where it stands in a figure.
pub type Point = (String, (f64, f64));

impl Table {
    /// `baseline` is an index of `models`.
    pub fn new(tasks: Vec<String>, mut models: Vec<Examined>, baseline: usize) -> Self {
        let rewards: Vec<_> = models[baseline].outcomes.iter().map(|outcome| outcome.rewards.clone()).collect();
        for model in &mut models {
            model.outcomes.iter_mut().zip(&rewards).for_each(|(outcome, rewards)| outcome.add_win_rate(rewards));
        }
        Self { baseline, tasks, models }
    }

    /// `{"baseline": "DIR", "models": [{"model": "DIR", "tasks": {"NAME": {"kind": .., "items": .., METRIC: ..}}}]}`
    pub fn to_json(&self) -> Value {
        let model = |model: &Examined| {
            let tasks = self.tasks.iter().zip(&model.outcomes);
            let tasks: Map<String, Value> = tasks.map(|(name, o)| (name.clone(), o.to_json().into())).collect();
            json!({"model": model.model, "tasks": tasks})
        };
        let models: Vec<Value> = self.models.iter().map(model).collect();
        json!({"baseline": self.models[self.baseline].model, "models": models})
    }

    /// One line an item, with its model, task and number from 0.
    pub fn log(&self) -> impl Iterator<Item = Value> {
        self.models.iter().flat_map(move |model| {
            self.tasks.iter().zip(&model.outcomes).flat_map(move |(task, outcome)| {
                outcome.log.iter().enumerate().map(move |(item, said)| {
                    let mut line = json!({"model": model.model, "task": task, "kind": outcome.kind, "item": item});
                    line.as_object_mut().expect("it is one").extend(said.clone());
                    line
                })
            })
        })
    }

    /// What a figure of both shows: the first metric of two tasks, as labels, then a point for each model.
    pub fn points(&self, x: usize, y: usize) -> ([String; 2], Vec<Point>) {
        let label = |t: usize| format!("{} {}", self.tasks[t], self.models[0].outcomes[t].headline().name);
        let point = |model: &Examined| {
            let at = |t: usize| model.outcomes[t].headline().value;
            (model.model.clone(), (at(x), at(y)))
        };
        ([x, y].map(label), self.models.iter().map(point).collect())
    }

    /// Of one model every metric, of several the first of each task, and how far it is from the baseline's.
    pub fn text(&self) -> String {
        if self.models.len() == 1 { self.one() } else { self.several() }
    }

    fn one(&self) -> String {
        let mut out = String::new();
        for (task, outcome) in self.tasks.iter().zip(&self.models[0].outcomes) {
            let _ = writeln!(out, "{task} ({}, {} items)", outcome.kind, outcome.items);
            for measure in &outcome.measures {
                let _ = writeln!(out, "  {:<16}{}", measure.name, value(measure));
            }
        }
        out
    }

    fn several(&self) -> String {
        let width =
            |texts: &mut dyn Iterator<Item = &String>| texts.map(|text| text.chars().count()).max().unwrap_or(0);
        let mut columns =
            vec![["model".to_string()].into_iter().chain(self.models.iter().map(|m| m.model.clone())).collect()];
        for (t, task) in self.tasks.iter().enumerate() {
            let baseline = &self.models[self.baseline].outcomes[t];
            let shown = baseline.measures.iter().enumerate().filter(|(i, m)| *i == 0 || m.name == "win_rate");
            columns.extend(shown.map(|(_, measure)| self.column(task, t, measure)));
        }
        let widths: Vec<usize> = columns.iter().map(|column: &Vec<String>| width(&mut column.iter())).collect();
        let mut out = String::new();
        for row in 0..=self.models.len() {
            let cells = columns.iter().zip(&widths).map(|(column, width)| format!("{:<width$}", column[row]));
            let _ = writeln!(out, "{}", cells.collect::<Vec<_>>().join("  ").trim_end());
        }
        let baseline = &self.models[self.baseline].model;
        out + &format!("± is the standard error over items; in brackets the difference from {baseline}\n")
    }

    /// A heading and a cell for each model.
    fn column(&self, task: &str, t: usize, of_baseline: &Measure) -> Vec<String> {
        let cell = |(m, model): (usize, &Examined)| {
            let measure = model.outcomes[t].get(of_baseline.name).expect("all have the metrics of the kind");
            match m == self.baseline || measure.name == "win_rate" {
                true => value(measure),
                false => format!("{} ({})", value(measure), signed(measure.value - of_baseline.value)),
            }
        };
        let heading = format!("{task} {}", of_baseline.name);
        std::iter::once(heading).chain(self.models.iter().enumerate().map(cell)).collect()
    }
}

fn value(measure: &Measure) -> String {
    match measure.stderr {
        Some(stderr) => format!("{} ± {}", short(measure.value), short(stderr)),
        None => short(measure.value),
    }
}

fn short(x: f64) -> String {
    let decimals = if x.abs() < 10.0 {
        4
    } else if x.abs() < 100.0 {
        2
    } else {
        1
    };
    format!("{x:.decimals$}")
}

fn signed(x: f64) -> String {
    if x < 0.0 { short(x) } else { format!("+{}", short(x)) }
}
