//! Many runs as one table, with their spread, as JSON and as curves.

use std::fmt::Write;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::checkpoint::json::write_json;
use crate::checkpoint::write_file;
use crate::error::Result;
use crate::train::Estimate;
use crate::train::plot::{Panel, Series, curves_svg};

/// One evaluation of a run.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Point {
    pub step: f64,
    /// Share of held-out pairs, against the anchor.
    pub accuracy: f64,
    /// Nats.
    pub margin: f64,
    /// KL(policy || anchor), nats a completion.
    pub kl: f64,
}

/// The runs of one arm on one number of pairs.
pub struct Cell {
    pub pairs: String,
    pub arm: String,
    /// One reference, not a blend.
    pub single: bool,
    /// `[seeds][evaluations]`
    pub runs: Vec<Vec<Point>>,
}

impl Cell {
    fn last(&self, of: fn(&Point) -> f64) -> Vec<f64> {
        self.runs.iter().filter_map(|run| run.last()).map(of).collect()
    }

    fn at_kl(&self, kl: f64) -> Vec<f64> {
        self.runs.iter().map(|run| accuracy_at(run, kl)).collect()
    }
}

/// Accuracy where a run first goes as far as `kl`, or else where it ends.
fn accuracy_at(run: &[Point], kl: f64) -> f64 {
    let path: Vec<(f64, f64)> = run.iter().map(|point| (point.kl, point.accuracy)).collect();
    first_at(&path, kl).or(path.last().map(|last| last.1)).unwrap_or(f64::NAN)
}

/// y where x first gets as far as this along a path of (x, y), in a straight line between two points; none where it never does.
pub(super) fn first_at(path: &[(f64, f64)], x: f64) -> Option<f64> {
    let beyond = path.iter().position(|point| point.0 >= x)?;
    let Some(before) = beyond.checked_sub(1) else { return Some(path[0].1) };
    let (a, b) = (path[before], path[beyond]);
    Some(a.1 + (b.1 - a.1) * (x - a.0) / (b.0 - a.0))
}

/// The mean and the standard deviation over seeds.
pub(super) fn spread(values: &[f64]) -> (f64, f64) {
    let Estimate { mean, stderr } = Estimate::of(values);
    (mean, stderr * (values.len() as f64).sqrt())
}

pub struct Table {
    steps: Option<u64>,
    seeds: u64,
    cells: Vec<Cell>,
    /// What the references do on held-out pairs themselves: (accuracy, mean |gap|).
    references: Vec<(f64, f64)>,
}

impl Table {
    pub fn new(steps: Option<u64>, seeds: u64) -> Self {
        Self { steps, seeds, cells: Vec::new(), references: Vec::new() }
    }

    pub fn add(&mut self, cell: Cell) {
        self.cells.push(cell);
    }

    /// Takes what a blend's evaluations say about the references themselves.
    pub fn look_at(&mut self, lines: &[Map<String, Value>]) {
        let Some(line) = lines.first() else { return };
        let of = |k: usize, what: &str| line.get(&format!("eval_refs/{k}/{what}")).and_then(Value::as_f64);
        let found = (0..).map_while(|k| Some((of(k, "accuracy")?, of(k, "discrimination")?)));
        let found: Vec<_> = found.collect();
        if !found.is_empty() {
            self.references = found;
        }
    }

    /// How far every run of this number of pairs has gone at least.
    fn common_kl(&self, pairs: &str) -> f64 {
        let of_run = |run: &Vec<Point>| run.iter().map(|point| point.kl).fold(f64::NEG_INFINITY, f64::max);
        let runs = self.cells.iter().filter(|cell| cell.pairs == pairs).flat_map(|cell| &cell.runs);
        runs.map(of_run).fold(f64::INFINITY, f64::min)
    }

    fn pairs(&self) -> Vec<&str> {
        let mut all: Vec<&str> = self.cells.iter().map(|cell| cell.pairs.as_str()).collect();
        all.dedup();
        all
    }

    pub fn text(&self) -> String {
        let mut out = String::new();
        for (k, (accuracy, gap)) in self.references.iter().enumerate() {
            let name = self.cells.iter().filter(|cell| cell.single).nth(k).map_or("", |cell| &cell.arm);
            let _ = writeln!(
                out,
                "reference {name:<24} itself prefers the chosen completion in {:.1} % of held-out pairs; the two are {gap:.2} nats apart on average",
                100.0 * accuracy
            );
        }
        for pairs in self.pairs() {
            self.section(&mut out, pairs);
        }
        let spread = match self.seeds {
            1 => "One seed says nothing of the spread between seeds.".to_string(),
            seeds => format!("± is the standard deviation over {seeds} seeds."),
        };
        let _ = writeln!(
            out,
            "\n{spread} Every arm is measured against the same anchor, the first reference. The \
             best of each kind\nis picked by the numbers that it is then compared by, which favours the kind with more arms."
        );
        out
    }

    fn section(&self, out: &mut String, pairs: &str) {
        let kl = self.common_kl(pairs);
        let steps = self.steps.map_or("its steps".to_string(), |steps| format!("{steps} steps"));
        let _ = writeln!(
            out,
            "\n{:<28}{:>18}{:>18}{:>18}{:>20}",
            format!("{pairs} pairs"),
            format!("after {steps}"),
            format!("at KL {kl:.2}"),
            "KL, nats",
            "margin, nats"
        );
        let cells: Vec<&Cell> = self.cells.iter().filter(|cell| cell.pairs == pairs).collect();
        for cell in &cells {
            let percent = |values: &[f64]| match spread(values) {
                (mean, _) if values.len() == 1 => format!("{:.1} %", 100.0 * mean),
                (mean, sd) => format!("{:.1} ± {:.1} %", 100.0 * mean, 100.0 * sd),
            };
            let nats = |values: &[f64]| match spread(values) {
                (mean, _) if values.len() == 1 => format!("{mean:.2}"),
                (mean, sd) => format!("{mean:.2} ± {sd:.2}"),
            };
            let _ = writeln!(
                out,
                "{:<28}{:>18}{:>18}{:>18}{:>20}",
                if cell.single { format!("{} alone", cell.arm) } else { cell.arm.clone() },
                percent(&cell.last(|point| point.accuracy)),
                percent(&cell.at_kl(kl)),
                nats(&cell.last(|point| point.kl)),
                nats(&cell.last(|point| point.margin)),
            );
        }
        for (what, of) in [
            ("after as many steps", &(|cell: &Cell| cell.last(|p| p.accuracy)) as &dyn Fn(&Cell) -> Vec<f64>),
            ("at equal KL", &|cell: &Cell| cell.at_kl(kl)),
        ] {
            out.extend(verdict(what, &cells, of));
        }
    }

    pub fn to_json(&self) -> Value {
        let cell = |cell: &Cell| {
            let kl = self.common_kl(&cell.pairs);
            let runs: Vec<Vec<Value>> = cell.runs.iter().map(|run| run.iter().map(point_json).collect()).collect();
            json!({"pairs": cell.pairs, "arm": cell.arm, "single": cell.single, "common_kl": kl,
                   "accuracy_at_common_kl": cell.at_kl(kl), "runs": runs})
        };
        json!({"seeds": self.seeds, "cells": self.cells.iter().map(cell).collect::<Vec<_>>()})
    }

    /// Writes `compare.json`, `compare.txt` and `compare.svg`: accuracy over the distance gone.
    pub fn write(&self, dir: &Path) -> Result<()> {
        write_json(&dir.join("compare.json"), &self.to_json())?;
        write_file(&dir.join("compare.txt"), |out| out.write_all(self.text().as_bytes()))?;
        let panel = |pairs: &&str| Panel {
            title: format!("{pairs} pairs"),
            y_label: "held-out accuracy".into(),
            series: self.cells.iter().filter(|cell| cell.pairs == **pairs).map(series).collect(),
        };
        let panels: Vec<Panel> = self.pairs().iter().map(panel).collect();
        let svg = curves_svg("cuvee compare", "KL from the anchor, nats", &panels);
        write_file(&dir.join("compare.svg"), |out| out.write_all(svg.as_bytes()))
    }
}

fn point_json(point: &Point) -> Value {
    json!({"step": point.step, "accuracy": point.accuracy, "margin": point.margin, "kl": point.kl})
}

/// An arm's path, its seeds averaged at each evaluation.
fn series(cell: &Cell) -> Series {
    let evaluations = cell.runs.iter().map(Vec::len).min().unwrap_or(0);
    let mean = |at: usize, of: fn(&Point) -> f64| {
        cell.runs.iter().map(|run| of(&run[at])).sum::<f64>() / cell.runs.len() as f64
    };
    let points = (0..evaluations).map(|at| (mean(at, |p| p.kl), mean(at, |p| p.accuracy)));
    Series { name: cell.arm.clone(), points: points.collect() }
}

/// The best blend beside the best reference alone, in words, where there are both.
fn verdict(what: &str, cells: &[&Cell], of: &dyn Fn(&Cell) -> Vec<f64>) -> Option<String> {
    let best = |single: bool| {
        let arms = cells.iter().filter(|cell| cell.single == single);
        arms.map(|cell| (cell, of(cell))).max_by(|a, b| spread(&a.1).0.total_cmp(&spread(&b.1).0))
    };
    let ((alone, single), (blend, blended)) = (best(true)?, best(false)?);
    // Seeds are the same in both, and so are their pairs and their order.
    let differences: Vec<f64> = blended.iter().zip(&single).map(|(a, b)| 100.0 * (a - b)).collect();
    let Estimate { mean, stderr } = Estimate::of(&differences);
    let meaning = match differences.len() {
        ..3 => "too few seeds to tell",
        _ if mean > 2.0 * stderr => "the blend is ahead",
        _ if mean < -2.0 * stderr => "one reference is ahead",
        _ => "no difference beyond the spread",
    };
    let (alone, blend) = (&alone.arm, &blend.arm);
    if differences.len() == 1 {
        return Some(format!("{what}: {blend} - {alone} alone = {mean:+.1} points: one seed, too few to tell\n"));
    }
    Some(format!("{what}: {blend} - {alone} alone = {mean:+.1} ± {stderr:.1} points (standard error): {meaning}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(points: &[(f64, f64)]) -> Vec<Point> {
        points.iter().map(|(kl, accuracy)| Point { step: 0.0, accuracy: *accuracy, margin: 1.0, kl: *kl }).collect()
    }

    #[test]
    fn accuracy_is_read_where_a_run_first_gets_as_far() {
        let path = run(&[(0.0, 0.5), (2.0, 0.7), (1.0, 0.6), (4.0, 0.9)]);
        for (kl, expected) in [(0.0, 0.5), (1.0, 0.6), (2.0, 0.7), (3.5, 0.85), (9.0, 0.9)] {
            assert!((accuracy_at(&path, kl) - expected).abs() < 1e-12, "{kl}");
        }
    }

    #[test]
    fn every_run_reaches_the_common_distance_and_the_verdict_counts_the_spread() {
        let mut table = Table::new(Some(10), 3);
        let cell = |arm: &str, single, ends: [(f64, f64); 3]| Cell {
            pairs: "50".into(),
            arm: arm.into(),
            single,
            runs: ends.map(|end| run(&[(0.0, 0.5), end])).to_vec(),
        };
        table.add(cell("base", true, [(2.0, 0.70), (2.0, 0.72), (2.0, 0.71)]));
        table.add(cell("geometric", false, [(1.0, 0.80), (4.0, 0.82), (4.0, 0.81)]));
        assert_eq!(table.common_kl("50"), 1.0);
        let text = table.text();
        assert!(text.contains("after as many steps: geometric - base alone = +10.0 ± 0.0 points"), "{text}");
        assert!(text.contains("the blend is ahead") && text.contains("no difference beyond the spread"), "{text}");
        assert_eq!(table.to_json()["cells"][1]["accuracy_at_common_kl"][0], 0.8);
    }
}
