//! Successive halving of a sweep's grid (Jamieson and Talwalkar, arXiv:1502.07943): all cells go a part of their way, the better half
//! of what may stay goes on from its checkpoints, and so forth. What may stay keeps a bound on some metric, such as base ability.
//!
//! Those race that start from the same model, since gold rewards are on its scale; a point of the grid is its seeds together.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::overopt::{Cell, Look, Plan, looks};
use crate::checkpoint::json::{read_json, write_json};
use crate::checkpoint::run_dir::latest_checkpoint;
use crate::error::{At, Error, Result};
use crate::train::{StopWhen, TRAINER_STATE};

/// What became of whom so far, in the sweep's folder.
const RACE: &str = "race.json";

/// `[halving]` in a recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Halving {
    /// Shares of a run's steps, rising, above 0 and below 1; each up to the evaluation that comes next.
    pub rungs: Vec<f64>,
    /// Of those that came to a rung, the share that goes on at most, above 0 and below 1; one does in any case.
    #[serde(default = "half")]
    pub keep: f64,
    /// What must hold of an evaluation at each rung: `METRIC<BOUND` or `METRIC>BOUND`.
    pub constraint: Option<StopWhen>,
}

fn half() -> f64 {
    0.5
}

impl Halving {
    /// What serde cannot know.
    pub fn check(&self) -> Result<(), String> {
        let inside = |share: &f64| *share > 0.0 && *share < 1.0;
        if self.rungs.is_empty() || !self.rungs.iter().all(inside) || !self.rungs.is_sorted_by(|a, b| a < b) {
            return Err(format!(
                "rungs: expected rising shares of a run above 0 and below 1, such as [0.25, 0.5], found {:?}",
                self.rungs
            ));
        }
        if !inside(&self.keep) {
            return Err(format!("keep: expected a share above 0 and below 1, found {}", self.keep));
        }
        Ok(())
    }

    /// How many of so many go on at most.
    fn places(&self, racing: usize) -> usize {
        // What rounding adds to 0.2 * 5 is no sixth.
        (self.keep * racing as f64 - 1e-9).ceil().max(1.0) as usize
    }
}

/// What became of a point of the grid at a rung.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Place {
    pub rung: f64,
    pub size: String,
    pub group: String,
    pub beta: Option<f64>,
    /// Seeds that came here.
    pub runs: usize,
    /// Of their evaluations here, means: where, how far, how good, and what the constraint is about.
    pub step: Option<f64>,
    pub d: Option<f64>,
    pub gold: Option<f64>,
    pub bounded: Option<f64>,
    pub goes_on: bool,
    /// In words.
    pub why: String,
}

/// A race under way.
pub struct Race<'a> {
    dir: &'a Path,
    plan: &'a Plan,
    halving: &'a Halving,
    places: Vec<Place>,
}

/// What is known of a race in a sweep's folder; nothing where there is none.
pub fn read(dir: &Path) -> Result<Vec<Place>> {
    let path = dir.join(RACE);
    if path.exists() { serde_json::from_value(read_json(&path)?).at(&path) } else { Ok(Vec::new()) }
}

/// Whether a cell's point of the grid left at some rung.
pub fn has_left(places: &[Place], cell: &Cell) -> bool {
    places.iter().any(|place| !place.goes_on && (&place.group, place.beta) == (&cell.group, cell.beta))
}

impl<'a> Race<'a> {
    /// From the first rung; what an earlier one found is found again from the runs' logs.
    pub fn new(dir: &'a Path, plan: &'a Plan, halving: &'a Halving) -> Self {
        Self { dir, plan, halving, places: Vec::new() }
    }

    /// Whether a cell has not left.
    pub fn is_in(&self, cell: usize) -> bool {
        !has_left(&self.places, &self.plan.cells[cell])
    }

    /// Who goes on from a rung that all have come to, apart from cells that failed. A line for each.
    ///
    /// # Errors
    /// A log that cannot be read; a constraint on what no evaluation has.
    pub fn decide(&mut self, rung: f64, failed: &dyn Fn(usize) -> bool) -> Result<Vec<String>> {
        let (cells, all) = (&self.plan.cells, looks(self.dir, self.plan)?);
        let mut points: Vec<(Place, Vec<&Look>)> = Vec::new();
        for (at, cell) in cells.iter().enumerate().filter(|(at, _)| self.is_in(*at)) {
            let look = if failed(at) { None } else { self.look(&all, at, rung)? };
            let same = |(place, _): &&mut (Place, Vec<&Look>)| (&place.group, place.beta) == (&cell.group, cell.beta);
            match points.iter_mut().find(same) {
                Some((_, looks)) => looks.extend(look),
                None => points.push((self.nowhere(at, rung), look.into_iter().collect())),
            }
        }
        let mut places: Vec<Place> = points.into_iter().map(|(place, looks)| self.measured(place, &looks)).collect();
        self.check_metric(&places, &all)?;
        let mut sizes: Vec<String> = places.iter().map(|place| place.size.clone()).collect();
        sizes.dedup();
        sizes
            .iter()
            .for_each(|size| rank(self.halving, places.iter_mut().filter(|place| place.size == *size).collect()));
        let lines = places.iter().map(Place::words).collect();
        self.places.extend(places);
        write_json(&self.dir.join(RACE), &self.places)?;
        Ok(lines)
    }

    /// A cell's first evaluation at or behind a share of its steps, or else its last.
    fn look<'l>(&self, all: &'l [Look], cell: usize, share: f64) -> Result<Option<&'l Look>> {
        let of_cell: Vec<&Look> = all.iter().filter(|look| look.cell == cell).collect();
        let dir = self.dir.join(&self.plan.cells[cell].dir);
        let whole = dir.join(TRAINER_STATE);
        let state = match whole.exists() {
            true => Some(whole),
            false => latest_checkpoint(&dir)?.map(|(_, checkpoint)| checkpoint.join(TRAINER_STATE)),
        };
        let Some(state) = state else { return Ok(of_cell.last().copied()) };
        let steps = read_json(&state)?["max_steps"].as_f64().unwrap_or(f64::INFINITY);
        Ok(of_cell.iter().find(|look| look.step >= share * steps).or(of_cell.last()).copied())
    }

    fn nowhere(&self, cell: usize, rung: f64) -> Place {
        let cell = &self.plan.cells[cell];
        let (size, group, beta) = (cell.size.clone(), cell.group.clone(), cell.beta);
        let why = "has no evaluation: its runs failed".into();
        Place { rung, size, group, beta, runs: 0, step: None, d: None, gold: None, bounded: None, goes_on: false, why }
    }

    fn measured(&self, place: Place, looks: &[&Look]) -> Place {
        let mean = |of: &dyn Fn(&Look) -> f64| {
            let mean = looks.iter().map(|look| of(look)).sum::<f64>() / looks.len() as f64;
            Some(mean).filter(|mean| mean.is_finite())
        };
        let bounded = self.halving.constraint.as_ref().and_then(|bound| mean(&|look| look.of(&bound.metric)));
        let why = match looks.iter().all(|look| look.valid) {
            true => String::new(),
            false => "its completions repeat themselves or are too unlikely under the reference".into(),
        };
        let why = if looks.is_empty() { place.why } else { why };
        let (step, d, gold) = (mean(&|look| look.step), mean(&|look| look.d), mean(&|look| look.gold));
        Place { runs: looks.len(), step, d, gold, bounded, why, ..place }
    }

    /// A constraint on what nobody measures would stop everyone.
    fn check_metric(&self, places: &[Place], looks: &[Look]) -> Result<()> {
        let Some(bound) = &self.halving.constraint else { return Ok(()) };
        let measured = places.iter().any(|place| place.runs > 0);
        if !measured || places.iter().any(|place| place.bounded.is_some()) {
            return Ok(());
        }
        let known: Vec<&str> =
            looks.first().map_or(Vec::new(), |look| look.logged.keys().map(String::as_str).collect());
        let detail = format!("evaluations have no {}; they have {}", bound.metric, known.join(", "));
        Err(Error::option("[halving] constraint", detail))
    }
}

/// Removes what an earlier race left.
pub fn forget(dir: &Path) -> Result<()> {
    let path = dir.join(RACE);
    if path.exists() { std::fs::remove_file(&path).at(&path) } else { Ok(()) }
}

/// Says who of one race goes on, and why not.
fn rank(halving: &Halving, mut racing: Vec<&mut Place>) {
    let most = halving.places(racing.len());
    for place in &mut racing {
        let Some(bound) = halving.constraint.as_ref().filter(|_| place.why.is_empty()) else { continue };
        match place.bounded {
            Some(value) if bound.holds(value) => {}
            Some(value) => place.why = format!("breaks {bound}: {value:.4}"),
            None => place.why = format!("breaks {bound}: not a number"),
        }
    }
    let mut may_stay: Vec<&mut Place> = racing.into_iter().filter(|place| place.why.is_empty()).collect();
    // Of equals, who comes first in the recipe.
    may_stay.sort_by(|a, b| b.gold.unwrap_or(f64::NEG_INFINITY).total_cmp(&a.gold.unwrap_or(f64::NEG_INFINITY)));
    let all = may_stay.len();
    for (at, place) in may_stay.into_iter().enumerate() {
        place.goes_on = at < most;
        place.why = match place.goes_on {
            true => format!("place {} of {all}", at + 1),
            false => format!("outranked: place {} of {all}, {most} go on", at + 1),
        };
    }
}

impl Place {
    /// `dpo large` with what the grid says of beta.
    pub fn name(&self) -> String {
        self.beta.map_or(self.group.clone(), |beta| format!("{}, β {beta}", self.group))
    }

    fn words(&self) -> String {
        let gold = self.gold.map_or(String::new(), |gold| format!(", gold {gold:.3}"));
        let what = if self.goes_on { "goes on" } else { "leaves" };
        format!("rung {}: {}{gold}: {what}: {}", self.rung, self.name(), self.why)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::overopt::tests::sweep;
    use super::*;

    fn halving(text: &str) -> Result<Halving, String> {
        let halving: Halving = serde_json::from_str(text).map_err(|e| e.to_string())?;
        halving.check().map(|()| halving)
    }

    fn names(places: &[Place], goes_on: bool) -> Vec<String> {
        places.iter().filter(|place| place.goes_on == goes_on).map(Place::name).collect()
    }

    /// A sweep whose cells say that they have 11 steps.
    fn planted() -> (tempfile::TempDir, Plan) {
        let folder = tempfile::tempdir().unwrap();
        sweep(folder.path());
        let plan = Plan::read(folder.path()).unwrap();
        for cell in &plan.cells[..5] {
            fs::write(folder.path().join(&cell.dir).join(TRAINER_STATE), r#"{"max_steps": 11}"#).unwrap();
        }
        (folder, plan)
    }

    #[test]
    fn the_better_half_goes_on_of_those_that_start_from_one_model() {
        let (folder, plan) = planted();
        // Gold is d (0.6 - 0.5 ln d), with d = 0.4 k for beta 0.01 and 0.15 k for 0.5: at step 3 ahead with the small beta.
        let halving = halving(r#"{"rungs": [0.25, 0.9]}"#).unwrap();
        let mut race = Race::new(folder.path(), &plan, &halving);
        let said = race.decide(0.25, &|_| false).unwrap();
        let places = read(folder.path()).unwrap();
        assert_eq!(names(&places, true), ["dpo small, β 0.01", "dpo large, β 0.01"]);
        assert_eq!(
            (places[0].step, places[0].runs),
            (Some(3.0), 2),
            "the cell that has not begun has no part in the mean"
        );
        assert!((places[0].d.unwrap() - 1.2).abs() < 1e-12 && places[0].why == "place 1 of 2", "{places:?}");
        assert!(said[1].contains("leaves: outranked: place 2 of 2, 1 go on"), "{said:?}");
        assert_eq!([0, 1, 2, 3, 4].map(|cell| race.is_in(cell)), [true, false, true, true, false]);
        // The winner of each race stays, whatever the share; seeds that failed do not count.
        race.decide(0.9, &|cell| cell == 2).unwrap();
        let last = &read(folder.path()).unwrap()[4..];
        assert_eq!((names(last, true).len(), last[0].runs, last[0].step), (2, 1, Some(10.0)));
        // Again, from the start: the same.
        let before = fs::read(folder.path().join(RACE)).unwrap();
        let mut race = Race::new(folder.path(), &plan, &halving);
        forget(folder.path()).unwrap();
        assert!(read(folder.path()).unwrap().is_empty());
        race.decide(0.25, &|_| false).unwrap();
        race.decide(0.9, &|cell| cell == 2).unwrap();
        assert_eq!(fs::read(folder.path().join(RACE)).unwrap(), before);
    }

    #[test]
    fn who_breaks_the_constraint_leaves_whatever_the_gold_reward() {
        let (folder, plan) = planted();
        // nll is 2 + 0.1 d: at step 3 it is 2.12 with beta 0.01.
        let bounded = halving(r#"{"rungs": [0.25], "constraint": "base/nll<2.1"}"#).unwrap();
        Race::new(folder.path(), &plan, &bounded).decide(0.25, &|_| false).unwrap();
        let places = read(folder.path()).unwrap();
        assert_eq!(names(&places, true), ["dpo small, β 0.5", "dpo large, β 0.5"]);
        assert_eq!(places[0].why, "breaks base/nll<2.1: 2.1200");
        // All of them may: then nobody is left. Cells that failed leave too.
        let none = halving(r#"{"rungs": [0.25], "constraint": "base/nll<1"}"#).unwrap();
        Race::new(folder.path(), &plan, &none).decide(0.25, &|cell| cell == 4).unwrap();
        let places = read(folder.path()).unwrap();
        assert_eq!((names(&places, true).len(), &places[3].why[..]), (0, "has no evaluation: its runs failed"));
        let unknown = halving(r#"{"rungs": [0.25], "constraint": "tax/nll<1"}"#).unwrap();
        let error = Race::new(folder.path(), &plan, &unknown).decide(0.25, &|_| false).unwrap_err().to_string();
        assert!(error.contains("no tax/nll; they have") && error.contains("base/nll"), "{error}");
        // At the last evaluation of one seed completions repeat themselves: its gold reward is not believed.
        let plain = halving(r#"{"rungs": [0.99]}"#).unwrap();
        Race::new(folder.path(), &plan, &plain).decide(0.99, &|_| false).unwrap();
        assert!(read(folder.path()).unwrap()[0].why.contains("repeat themselves"));
    }

    #[test]
    fn tables_that_mean_nothing_are_refused() {
        for (text, expected) in [
            (r#"{"rungs": []}"#, "rungs: expected rising shares"),
            (r#"{"rungs": [0.5, 0.25]}"#, "rungs: expected rising shares"),
            (r#"{"rungs": [0.5, 1]}"#, "rungs: expected rising shares"),
            (r#"{"rungs": [0.5], "keep": 1}"#, "keep: expected a share"),
            (r#"{"rungs": [0.5], "constraint": "base/nll"}"#, "such as base/perplexity>50"),
            (r#"{"rungs": [0.5], "kep": 0.3}"#, "unknown field `kep`"),
            (r#"{"keep": 0.3}"#, "missing field `rungs`"),
        ] {
            assert!(halving(text).is_err_and(|e| e.contains(expected)), "{text}");
        }
        let keep = |keep| Halving { rungs: vec![0.5], keep, constraint: None };
        assert_eq!([1, 2, 5, 8].map(|n| keep(0.5).places(n)), [1, 1, 3, 4]);
        assert_eq!([1, 5, 15].map(|n| keep(0.2).places(n)), [1, 1, 3]);
    }
}
