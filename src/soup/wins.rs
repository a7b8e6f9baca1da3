//! Who beats whom, criterion by criterion: by rewards, or by a judge's comparisons.
//!
//! As in Personalized Soups (arXiv:2310.11564) judgements are pooled over criteria and a win rate is wins over wins and losses.
//! Their comparisons are asked in one order; here a judge may be asked in both, and where the answers differ it is a tie.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};

use super::Measured;
use crate::data::read_objects;
use crate::error::{Error, Result};
use crate::rewards::judgement::{Judgement, Tally};

/// Of every policy beside every other, criterion by criterion.
pub struct Matrix {
    pub names: Vec<String>,
    pub criteria: Vec<String>,
    /// `[criteria][policies][others]`
    pub tallies: Vec<Vec<Vec<Tally>>>,
}

impl Matrix {
    /// By rewards: sample against the sample of the same prompt and number.
    pub fn of(arms: &[&Measured], criteria: &[String]) -> Self {
        let tally = |k: usize, ours: &Measured, theirs: &Measured| {
            ours.rewards[k].iter().zip(&theirs.rewards[k]).filter_map(|(a, b)| Judgement::of(*a, *b)).collect()
        };
        let of = |k: usize| {
            let row = |ours: &&Measured| arms.iter().map(|theirs| tally(k, ours, theirs)).collect();
            arms.iter().map(row).collect()
        };
        Self {
            names: arms.iter().map(|arm| arm.name.clone()).collect(),
            criteria: criteria.to_vec(),
            tallies: (0..criteria.len()).map(of).collect(),
        }
    }

    /// By a judge: lines of `{"criterion", "row", "first", "second", "verdict"}`, where first and second are policies' names as the
    /// judge saw them and the verdict is "first", "second" or "tie".
    ///
    /// # Errors
    /// A line that is not one, a policy against itself, a question that was answered twice in one order.
    pub fn judged(path: &Path) -> Result<Self> {
        let mut answers: BTreeMap<(String, u64, String, String), Judgement> = BTreeMap::new();
        let (mut names, mut criteria): (Vec<String>, Vec<String>) = Default::default();
        for (at, object) in read_objects(path)? {
            let fail = |detail: String| Error::Row { path: path.to_path_buf(), at, detail };
            let asked: Asked = serde_json::from_value(Value::Object(object)).map_err(|e| fail(e.to_string()))?;
            let Asked { criterion, row, first, second, verdict } = asked;
            if first == second {
                return Err(fail(format!("compares {first:?} with itself")));
            }
            [&first, &second].into_iter().for_each(|name| push_new(&mut names, name));
            push_new(&mut criteria, &criterion);
            let judgement = match verdict {
                Verdict::First => Judgement::Win,
                Verdict::Tie => Judgement::Tie,
                Verdict::Second => Judgement::Loss,
            };
            if answers.insert((criterion, row, first, second), judgement).is_some() {
                return Err(fail("asks again what an earlier line did, in the same order".into()));
            }
        }
        let at = |all: &[String], name: &str| all.iter().position(|other| other == name).expect("all were listed");
        let n = names.len();
        let mut tallies = vec![vec![vec![Tally::default(); n]; n]; criteria.len()];
        for ((criterion, row, first, second), judgement) in &answers {
            let swapped = answers.get(&(criterion.clone(), *row, second.clone(), first.clone())).map(|j| turned(*j));
            // A question in both orders counts once.
            if swapped.is_some() && first > second {
                continue;
            }
            let found = swapped.map_or(*judgement, |swapped| judgement.consistent(swapped));
            let (k, a, b) = (at(&criteria, criterion), at(&names, first), at(&names, second));
            for (a, b, found) in [(a, b, found), (b, a, turned(found))] {
                let tally = &mut tallies[k][a][b];
                let count = match found {
                    Judgement::Win => &mut tally.wins,
                    Judgement::Tie => &mut tally.ties,
                    Judgement::Loss => &mut tally.losses,
                };
                *count += 1;
            }
        }
        Ok(Self { names, criteria, tallies })
    }

    /// Over all criteria.
    pub fn pooled(&self, policy: usize, other: usize) -> Tally {
        let each = self.tallies.iter().map(|of| of[policy][other]);
        each.fold(Tally::default(), |a, b| Tally {
            wins: a.wins + b.wins,
            ties: a.ties + b.ties,
            losses: a.losses + b.losses,
        })
    }

    /// Against all others and over all criteria: wins over wins and losses.
    pub fn average(&self, policy: usize) -> f64 {
        let others = (0..self.names.len()).filter(|other| *other != policy);
        let rates = others.map(|other| self.pooled(policy, other).win_rate_without_ties());
        let known: Vec<f64> = rates.filter(|rate| !rate.is_nan()).collect();
        known.iter().sum::<f64>() / known.len() as f64
    }

    /// Heads and cells: percent of what was decided, and against all others.
    pub fn rows(&self) -> Vec<Vec<String>> {
        let percent = |rate: f64| if rate.is_nan() { "-".to_string() } else { format!("{:.0}", 100.0 * rate) };
        let all = 0..self.names.len();
        let number = |i: usize| format!("({})", i + 1);
        let mut rows = vec![vec!["wins over, %".to_string()]];
        rows[0].extend(all.clone().map(number).chain(["all".to_string()]));
        for i in all.clone() {
            let cell = |j: usize| {
                if i == j { String::new() } else { percent(self.pooled(i, j).win_rate_without_ties()) }
            };
            let name = format!("{} {}", number(i), self.names[i]);
            rows.push([name].into_iter().chain(all.clone().map(cell)).chain([percent(self.average(i))]).collect());
        }
        rows
    }

    pub fn to_json(&self) -> Value {
        let tally = |t: &Tally| json!([t.wins, t.ties, t.losses]);
        let of = |k: usize| -> Vec<Vec<Value>> {
            self.tallies[k].iter().map(|row| row.iter().map(tally).collect()).collect()
        };
        let criteria: serde_json::Map<String, Value> =
            self.criteria.iter().enumerate().map(|(k, name)| (name.clone(), json!(of(k)))).collect();
        let average = (0..self.names.len()).map(|i| self.average(i)).map(|x| x.is_finite().then_some(x));
        json!({"policies": self.names, "wins_ties_losses": criteria, "win_rate": average.collect::<Vec<_>>()})
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Asked {
    criterion: String,
    row: u64,
    first: String,
    second: String,
    verdict: Verdict,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    First,
    Second,
    Tie,
}

fn turned(judgement: Judgement) -> Judgement {
    match judgement {
        Judgement::Win => Judgement::Loss,
        Judgement::Tie => Judgement::Tie,
        Judgement::Loss => Judgement::Win,
    }
}

fn push_new(all: &mut Vec<String>, name: &str) {
    if all.iter().all(|other| other != name) {
        all.push(name.to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(lines: &str) -> Result<Matrix> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("judged.jsonl");
        std::fs::write(&path, lines).unwrap();
        Matrix::judged(&path)
    }

    fn line(row: u64, first: &str, second: &str, verdict: &str) -> String {
        json!({"criterion": "brief", "row": row, "first": first, "second": second, "verdict": verdict}).to_string()
            + "\n"
    }

    #[test]
    fn a_judge_that_prefers_a_place_decides_nothing() {
        let lines = [
            line(0, "a", "b", "first"),
            line(0, "b", "a", "second"), // a in both orders
            line(1, "a", "b", "first"),
            line(1, "b", "a", "first"), // the first place in both
            line(2, "b", "a", "tie"),
            line(3, "b", "a", "first"),
        ];
        let matrix = judged(&lines.concat()).unwrap();
        assert_eq!(matrix.names, ["a", "b"]);
        assert_eq!(matrix.pooled(0, 1), Tally { wins: 1, ties: 2, losses: 1 });
        assert_eq!(matrix.pooled(1, 0), Tally { wins: 1, ties: 2, losses: 1 });
        assert_eq!((matrix.average(0), &matrix.rows()[1][2][..]), (0.5, "50"));
    }

    #[test]
    fn lines_that_are_no_judgements_are_named() {
        for (lines, part) in [
            (line(0, "a", "a", "tie"), "compares \"a\" with itself"),
            (line(0, "a", "b", "a"), "unknown variant `a`, expected one of `first`, `second`, `tie`"),
            (line(0, "a", "b", "tie") + &line(0, "a", "b", "first"), "line 2: asks again"),
            ("{\"row\": 1}\n".to_string(), "missing field"),
        ] {
            let message = judged(&lines).err().expect("it is wrong").to_string();
            assert!(message.contains(part), "{message}");
        }
    }
}
