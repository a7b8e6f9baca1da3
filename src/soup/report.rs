//! What a sweep comes to: the table of policies, the front, what blends are worth, who wins, and what it cost to train.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::geometry::Cosines;
use super::paths::{Barrier, doubts, paths};
use super::{Matrix, Measured, Mixture, Outcomes, front, label};
use crate::checkpoint::json::write_json;
use crate::checkpoint::write_file;
use crate::error::Result;
use crate::lab::{Dot, Scatter, stacked_svg};
use crate::train::Estimate;

/// A preference, as the recipe has it.
#[derive(Clone, PartialEq, Debug)]
pub struct Declared {
    pub name: String,
    /// The sentence that asks for it, and the one that asks for its opposite.
    pub prompt: String,
    pub opposite: Option<String>,
    /// What its reward is: a file or folder.
    pub reward: String,
    /// Choices that a user has in this dimension.
    pub options: usize,
}

pub struct Report {
    pub preferences: Vec<Declared>,
    /// The base is the first.
    pub arms: Vec<Measured>,
    /// Policies that were to be measured and why they were not.
    pub missing: Vec<(String, String)>,
    /// Of the task vectors of the preferences' policies, where all are there.
    pub cosines: Option<Cosines>,
    /// By a judge.
    pub judged: Option<Matrix>,
    /// Runs of training that every preference shares: they are made again for each that is added.
    pub shared: Vec<String>,
}

impl Report {
    fn names(&self) -> Vec<String> {
        self.preferences.iter().map(|preference| preference.name.clone()).collect()
    }

    fn blends(&self) -> Vec<&Measured> {
        self.arms.iter().filter(|arm| arm.weights.is_some()).collect()
    }

    fn rewards(&self, arm: &Measured) -> Vec<f64> {
        (0..self.preferences.len()).map(|k| arm.reward(k).mean).collect()
    }

    fn front(&self) -> Vec<bool> {
        front(&self.arms.iter().map(|arm| self.rewards(arm)).collect::<Vec<_>>())
    }

    /// Policies for the matrix of wins: the blends whose weights are equal stand for all.
    fn matrix(&self) -> Matrix {
        let stands = |arm: &&Measured| {
            let even = |weights: &Vec<f64>| super::is_even(weights) && weights.iter().all(|w| *w > 0.0);
            arm.weights.as_ref().is_none_or(even) || arm.weights.as_ref().is_some_and(|w| w.contains(&1.0))
        };
        Matrix::of(&self.arms.iter().filter(stands).collect::<Vec<_>>(), &self.names())
    }

    /// Rewards, KL and the loss on held-out texts as functions of the weights.
    pub fn outcomes(&self) -> Outcomes {
        let blends = self.blends();
        let mut found = BTreeMap::new();
        let mut fit = |name: &str, of: &dyn Fn(&Measured) -> Option<f64>| {
            let point = |blend: &&Measured| Some((blend.weights.clone()?, of(blend).filter(|y| y.is_finite())?));
            let points: Vec<(Vec<f64>, f64)> = blends.iter().filter_map(point).collect();
            found.extend(Mixture::fit(&points).map(|mixture| (name.to_string(), mixture)));
        };
        for (k, name) in self.names().iter().enumerate() {
            fit(name, &|blend| Some(blend.reward(k).mean));
        }
        fit("kl", &|blend| Some(blend.kl().mean));
        fit("nll", &|blend| blend.nll);
        found
    }

    fn rows(&self) -> Vec<Vec<String>> {
        let mut head = vec!["policy".to_string()];
        head.extend(self.names());
        head.extend(["KL, nats", "nll", "tax", "front"].map(String::from));
        let base = self.arms.first().and_then(|base| base.nll);
        let row = |(arm, on): (&Measured, bool)| {
            let mut row = vec![arm.name.clone()];
            row.extend((0..self.preferences.len()).map(|k| estimate(arm.reward(k))));
            row.push(estimate(arm.kl()));
            row.push(arm.nll.map_or("-".into(), |nll| format!("{nll:.3}")));
            row.push(match (arm.nll, base) {
                (Some(nll), Some(base)) => format!("{:+.3}", nll - base),
                _ => "-".into(),
            });
            row.push(if on { "★".into() } else { String::new() });
            row
        };
        std::iter::once(head).chain(self.arms.iter().zip(self.front()).map(row)).collect()
    }

    /// Between which policies interpolation keeps what it promises.
    fn path_rows(&self) -> Vec<Vec<String>> {
        let (names, blends) = (self.names(), self.blends());
        let head = ["path", "cosine", "monotone", "barriers", "nll barrier"].map(String::from).to_vec();
        let row = |path: &super::paths::Path| {
            let [i, j] = path.ends;
            let step = |k: usize| match path.not_monotone(k) {
                None => format!("{}: yes", names[k]),
                Some([from, to]) => format!("{}: no, {} {from} to {to}", names[k], names[j]),
            };
            let barrier = |k: usize| {
                let Barrier { at, height } = path.barrier(k);
                format!("{}: {:+.3} ± {:.3} at {at}", names[k], height.mean, height.stderr)
            };
            vec![
                format!("{} to {}", names[i], names[j]),
                match &self.cosines {
                    Some(cosines) if cosines[i][j].is_finite() => format!("{:+.3}", cosines[i][j]),
                    _ => "-".into(),
                },
                path.ends.map(step).join("; "),
                (0..names.len()).map(barrier).collect::<Vec<_>>().join("; "),
                path.nll_barrier().map_or("-".into(), |height| format!("{height:+.3}")),
            ]
        };
        std::iter::once(head).chain(paths(&blends, names.len()).iter().map(row)).collect()
    }

    fn outcome_rows(&self) -> Vec<Vec<String>> {
        let head = ["outcome", "blends", "form", "error, left out", "largest"].map(String::from).to_vec();
        let row = |(name, mixture): (&String, &Mixture)| {
            let form = if mixture.products { "with products" } else { "linear" };
            let numbers = [format!("{:.3}", mixture.loo_rmse), format!("{:.3}", mixture.loo_largest)];
            [name.clone(), mixture.points.to_string(), form.into()].into_iter().chain(numbers).collect()
        };
        std::iter::once(head).chain(self.outcomes().iter().map(row)).collect()
    }

    /// What is to be said beside the numbers, a line each.
    fn remarks(&self) -> Vec<String> {
        let (names, blends) = (self.names(), self.blends());
        let mut lines = Vec::new();
        let doubtful: Vec<String> = blends
            .iter()
            .flat_map(|blend| doubts(blend, &blends, &names).into_iter().map(|why| format!("{}: {why}", blend.name)))
            .collect();
        match (doubtful.len(), blends.len() - names.len().min(blends.len())) {
            (0, between) => lines.push(format!("Blends that are not to be trusted: none of {between}.")),
            (_, between) => {
                lines.push(format!("Blends that are not to be trusted, of {between}:"));
                lines.extend(doubtful);
            }
        }
        lines.extend(self.missing.iter().map(|(name, why)| format!("MISSING: {name}: {why}")));
        let all: usize = self.preferences.iter().map(|preference| preference.options).product();
        let each: Vec<String> = self.preferences.iter().map(|preference| preference.options.to_string()).collect();
        lines.push(format!(
            "Runs: {} policies, one for each preference, reach every blend; a policy for each user would take {} = {all}. One more \
             preference takes one more run{}.",
            names.len(),
            each.join(" x "),
            match self.shared.is_empty() {
                true => String::new(),
                false => format!("; {} would be trained again", self.shared.join(" and ")),
            }
        ));
        lines.push(
            "± is a standard error over prompts; samples of one number and prompt are drawn alike by all. KL is from the base at the \
             plain prompt. A barrier is by how much a blend has less than the line between the ends; it counts from 3 standard \
             errors, a step the wrong way from 2. tax is nats a token of held-out text beyond the base."
                .into(),
        );
        lines
    }

    fn tables(&self) -> Vec<(&'static str, Vec<Vec<String>>)> {
        let mut tables = vec![
            ("", self.rows()),
            ("Between two policies", self.path_rows()),
            ("Wins by rewards, all criteria, ties left out", self.matrix().rows()),
        ];
        tables.extend(self.judged.as_ref().map(|judged| ("Wins by the judge, ties left out", judged.rows())));
        tables.push(("What untried weights will come to", self.outcome_rows()));
        tables.into_iter().filter(|(_, rows)| rows.len() > 1).collect()
    }

    pub fn text(&self) -> String {
        let mut out = String::new();
        for (title, rows) in self.tables() {
            if !title.is_empty() {
                let _ = writeln!(out, "\n{title}");
            }
            out += &aligned(&rows);
        }
        out + "\n" + &self.remarks().join("\n") + "\n"
    }

    /// Tables as GitHub shows them.
    pub fn markdown(&self) -> String {
        let mut out = String::new();
        for (title, rows) in self.tables() {
            if !title.is_empty() {
                let _ = writeln!(out, "\n## {title}\n");
            }
            let mut lines = rows.iter().map(|row| format!("| {} |\n", row.join(" | ")));
            out += &lines.next().expect("a head");
            let _ = writeln!(out, "|---|{}", "--:|".repeat(rows[0].len() - 1));
            out.extend(lines);
        }
        out + &self.remarks().iter().map(|line| format!("\n{line}\n")).collect::<String>()
    }

    pub fn to_json(&self) -> Value {
        let (names, blends) = (self.names(), self.blends());
        let each = |Estimate { mean, stderr }: Estimate| json!({"mean": mean, "stderr": stderr});
        let arm = |(arm, on): (&Measured, bool)| {
            let rewards: Map<String, Value> =
                names.iter().enumerate().map(|(k, name)| (name.clone(), each(arm.reward(k)))).collect();
            json!({"policy": arm.name, "method": arm.method, "weights": arm.weights, "rewards": rewards, "kl": each(arm.kl()),
                   "nll": arm.nll, "front": on, "doubts": doubts(arm, &blends, &names)})
        };
        let declared = |p: &Declared| json!({"name": p.name, "prompt": p.prompt, "opposite": p.opposite, "reward": p.reward, "options": p.options});
        let nothing = vec![vec![f64::NAN; names.len()]; names.len()];
        let cosines = self.cosines.as_ref().unwrap_or(&nothing);
        let missing: Map<String, Value> =
            self.missing.iter().map(|(name, why)| (name.clone(), why.clone().into())).collect();
        json!({
            "preferences": self.preferences.iter().map(declared).collect::<Vec<_>>(),
            "policies": self.arms.iter().zip(self.front()).map(arm).collect::<Vec<_>>(),
            "missing": missing,
            "paths": paths(&blends, names.len()).iter().map(|path| path.to_json(&names, cosines)).collect::<Vec<_>>(),
            "cosines": self.cosines,
            "wins": self.matrix().to_json(),
            "judged": self.judged.as_ref().map(Matrix::to_json),
            "outcomes": self.outcomes(),
            "runs": {"trained": names.len(), "one_for_each_user": self.preferences.iter().map(|p| p.options).product::<usize>(),
                     "trained_again": self.shared},
        })
    }

    /// A panel for each pair of preferences, with the front of these two.
    pub fn figure(&self) -> String {
        let names = self.names();
        let short: Vec<&str> = names.iter().map(String::as_str).collect();
        let pairs = (0..names.len()).flat_map(|i| (i + 1..names.len()).map(move |j| (i, j)));
        let panel = |(i, j): (usize, usize)| {
            let known = |arm: &&Measured| arm.reward(i).mean.is_finite() && arm.reward(j).mean.is_finite();
            let mut arms: Vec<&Measured> = self.arms.iter().filter(known).collect();
            let edge = |weights: &Vec<f64>| super::support(weights).iter().all(|k| [i, j].contains(k));
            // Along the edge between the two, so that its line is the path; the same order in every panel.
            let place = |arm: &Measured| match &arm.weights {
                Some(weights) if edge(weights) => (0, weights[j]),
                Some(_) => (1, 0.0),
                None => (2, 0.0),
            };
            arms.sort_by(|a, b| place(a).partial_cmp(&place(b)).expect("weights are numbers"));
            let on = front(&arms.iter().map(|a| vec![a.reward(i).mean, a.reward(j).mean]).collect::<Vec<_>>());
            let dot = |(arm, on_front): (&&Measured, bool)| {
                let (x, y) = (arm.reward(i), arm.reward(j));
                // A line through all blends would mean nothing; what lies on the edge is one path.
                let (method, label) = match &arm.weights {
                    Some(weights) if edge(weights) => {
                        let alone = (weights[i] == 1.0).then_some(i).or((weights[j] == 1.0).then_some(j));
                        let label = alone.map_or_else(|| label(&short, weights), |k| names[k].clone());
                        (format!("soup of {} and {}", names[i], names[j]), label)
                    }
                    Some(_) => ("soup with others".into(), String::new()),
                    None => (arm.method.clone(), String::new()),
                };
                Dot { method, label, at: (x.mean, y.mean), spread: (x.stderr, y.stderr), on_front }
            };
            Scatter {
                title: format!("{} and {}", names[i], names[j]),
                x_label: names[i].clone(),
                y_label: names[j].clone(),
                x_down: false,
                y_down: false,
                baseline: "base".into(),
                dots: arms.iter().zip(on).map(dot).collect(),
            }
        };
        stacked_svg(&pairs.map(panel).collect::<Vec<_>>())
    }

    /// Writes `soup.json`, `soup.txt`, `soup.md` and `soup.svg`.
    pub fn write(&self, dir: &Path) -> Result<()> {
        write_json(&dir.join("soup.json"), &self.to_json())?;
        let files = [("soup.txt", self.text()), ("soup.md", self.markdown()), ("soup.svg", self.figure())];
        files.iter().try_for_each(|(name, text)| write_file(&dir.join(name), |out| out.write_all(text.as_bytes())))
    }
}

fn estimate(Estimate { mean, stderr }: Estimate) -> String {
    match mean.is_finite() {
        true => format!("{mean:.3} ± {stderr:.3}"),
        false => "-".into(),
    }
}

fn aligned(rows: &[Vec<String>]) -> String {
    let wide = |c: usize| rows.iter().map(|row| row[c].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..rows[0].len()).map(wide).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).enumerate().map(|(c, (cell, width))| match c {
            0 => format!("{cell:<width$}"),
            _ => format!("  {cell:>width$}"),
        });
        cells.collect::<String>().trim_end().to_string() + "\n"
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::measured;
    use super::*;

    fn report() -> Report {
        let declared = |name: &str, options| Declared {
            name: name.into(),
            prompt: format!("Be {name}."),
            opposite: None,
            reward: format!("{name}.toml"),
            options,
        };
        let blend = |a: f64, means: [f64; 2]| {
            let weights = [a, 1.0 - a];
            measured(&label(&["a", "b"], &weights), Some(&weights), &means, 2.0)
        };
        Report {
            preferences: vec![declared("a", 2), declared("b", 4)],
            arms: vec![
                measured("base", None, &[0.0, 0.0], 2.0),
                blend(1.0, [1.0, 0.0]),
                blend(0.5, [0.2, 0.7]),
                blend(0.0, [0.0, 1.0]),
                measured("p-morl", None, &[0.5, 0.5], 2.1),
            ],
            missing: vec![("multitask-sft".into(), "its run failed".into())],
            cosines: Some(vec![vec![1.0, 0.25], vec![0.25, 1.0]]),
            judged: None,
            shared: vec!["p-morl".into()],
        }
    }

    #[test]
    fn what_a_sweep_comes_to_is_said() {
        let report = report();
        let text = report.text();
        for part in [
            "a to b",
            "+0.250",
            "a=0.5 b=0.5: has less a than its ingredients promise: 0.210 instead of 0.510",
            "MISSING: multitask-sft: its run failed",
            "2 policies, one for each preference, reach every blend; a policy for each user would take 2 x 4 = 8",
            "p-morl would be trained again",
        ] {
            assert!(text.contains(part), "{part:?} is not in\n{text}");
        }
        let json = report.to_json();
        let fronts: Vec<bool> = json["policies"].as_array().unwrap().iter().map(|p| p["front"] == true).collect();
        assert_eq!(fronts, [false, true, true, true, true]);
        assert_eq!(json["paths"][0]["cosine"], 0.25);
        assert_eq!(json["outcomes"]["a"]["products"], false);
        assert_eq!(json["wins"]["policies"].as_array().unwrap().len(), 5);
        assert!(report.markdown().starts_with("| policy | a | b |"));
        let svg = report.figure();
        assert_eq!((svg.matches("<svg").count(), svg.matches("</svg>").count()), (2, 2));
    }

    #[test]
    fn a_report_of_nothing_but_the_base_can_be_written() {
        let report = Report { arms: vec![measured("base", None, &[0.0, 0.0], 2.0)], cosines: None, ..report() };
        assert!(report.text().contains("MISSING") && report.outcomes().is_empty());
        assert!(report.to_json()["paths"].as_array().unwrap().is_empty());
        assert!(report.figure().contains("base"));
    }
}
