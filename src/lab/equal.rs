//! Arms at equal distance and at equal gold, not at equal steps: where a run first gets as far, or becomes as good, on straight lines
//! between its evaluations.

use serde_json::{Map, Value, json};

use super::overopt::Overopt;
use super::table::{first_at, spread};

/// Distances, and levels of gold, that are compared, at least: multiples of a round number.
const LEVELS: f64 = 5.0;

/// Over the runs of an arm that get there.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reached {
    pub runs: usize,
    /// NaN where none does.
    pub mean: f64,
    /// NaN of fewer than two.
    pub sd: f64,
}

/// A point of the grid with its seeds, or a whole group.
#[derive(Clone, Debug, PartialEq)]
pub struct Arm {
    pub group: String,
    pub beta: Option<f64>,
    /// All betas of the group together, each run one.
    pub together: bool,
    pub runs: usize,
    /// The largest distance and the most gold that any of its runs comes to, as far as the gold reward can be believed.
    pub furthest: f64,
    pub best: f64,
    /// `[distances]` gold
    pub gold: Vec<Reached>,
    /// `[levels]` distance
    pub d: Vec<Reached>,
}

pub struct Matched {
    pub distances: Vec<f64>,
    pub levels: Vec<f64>,
    pub arms: Vec<Arm>,
}

/// (d, gold) of the evaluations of a run whose gold reward can be believed.
type Path = Vec<(f64, f64)>;

fn largest(values: impl Iterator<Item = f64>) -> f64 {
    values.fold(f64::NAN, f64::max)
}

/// Multiples of 1, 2, 2.5 or 5 times a power of ten up to the most that there is.
fn levels(most: f64) -> Vec<f64> {
    if !(most > 0.0 && most.is_finite()) {
        return Vec::new();
    }
    let power = 10_f64.powf((most / LEVELS).log10().floor());
    let step = [5.0, 2.5, 2.0, 1.0].map(|k| k * power).into_iter().find(|step| *step <= most / LEVELS).unwrap_or(power);
    // Not a sum: 3 * 0.1 is 0.3 as people write it.
    (1..).map(|k| (f64::from(k) * step * 1e9).round() / 1e9).take_while(|level| *level <= most).collect()
}

fn reached(paths: &[&Path], at: f64) -> Reached {
    let values: Vec<f64> = paths.iter().filter_map(|path| first_at(path, at)).collect();
    let (mean, sd) = if values.is_empty() { (f64::NAN, f64::NAN) } else { spread(&values) };
    Reached { runs: values.len(), mean, sd: if values.len() > 1 { sd } else { f64::NAN } }
}

impl Matched {
    pub fn of(found: &Overopt) -> Self {
        let path = |cell: usize| -> Path {
            found.of_cell(cell).filter(|look| look.valid).map(|look| (look.d, look.gold)).collect()
        };
        let cells = &found.plan.cells;
        let paths: Vec<Path> = (0..cells.len()).map(path).collect();
        let mut arms: Vec<(String, Option<f64>, bool, Vec<usize>)> = Vec::new();
        for (at, cell) in cells.iter().enumerate().filter(|(at, _)| !paths[*at].is_empty()) {
            for together in [false, true] {
                let beta = cell.beta.filter(|_| !together);
                match arms.iter_mut().find(|arm| (&arm.0, arm.1, arm.2) == (&cell.group, beta, together)) {
                    Some((.., runs)) => runs.push(at),
                    None => arms.push((cell.group.clone(), beta, together, vec![at])),
                }
            }
        }
        // A group behind its points.
        let place = |group: &String| cells.iter().position(|cell| cell.group == *group);
        arms.sort_by_key(|(group, _, together, _)| (place(group), *together));
        Self::compare(arms.into_iter().map(|(group, beta, together, runs)| {
            let paths: Vec<&Path> = runs.iter().map(|run| &paths[*run]).collect();
            (group, beta, together, paths)
        }))
    }

    fn compare<'p>(arms: impl Iterator<Item = (String, Option<f64>, bool, Vec<&'p Path>)>) -> Self {
        let arms: Vec<_> = arms.collect();
        let most = |of: fn(&(f64, f64)) -> f64| {
            largest(arms.iter().flat_map(|arm| &arm.3).flat_map(|path| path.iter().map(of)))
        };
        let (distances, levels) = (levels(most(|point| point.0)), levels(most(|point| point.1)));
        let arm = |(group, beta, together, paths): (String, Option<f64>, bool, Vec<&Path>)| {
            let turned: Vec<Path> =
                paths.iter().map(|path| path.iter().map(|(d, gold)| (*gold, *d)).collect()).collect();
            let turned: Vec<&Path> = turned.iter().collect();
            let points = || paths.iter().flat_map(|path| path.iter());
            Arm {
                group,
                beta,
                together,
                runs: paths.len(),
                furthest: largest(points().map(|point| point.0)),
                best: largest(points().map(|point| point.1)),
                gold: distances.iter().map(|d| reached(&paths, *d)).collect(),
                d: levels.iter().map(|gold| reached(&turned, *gold)).collect(),
            }
        };
        let arms = arms.into_iter().map(arm).collect();
        Self { distances, levels, arms }
    }

    pub fn to_json(&self) -> Value {
        let finite = |x: f64| if x.is_finite() { json!(x) } else { Value::Null };
        let list = |axis: &str, at: &[f64], found: &[Reached], value: &str| {
            let one = |(at, found): (&f64, &Reached)| {
                let mut one = Map::new();
                one.insert(axis.into(), json!(at));
                one.insert(value.into(), finite(found.mean));
                one.insert("sd".into(), finite(found.sd));
                one.insert("runs".into(), json!(found.runs));
                Value::Object(one)
            };
            at.iter().zip(found).map(one).collect::<Vec<_>>()
        };
        let arm = |arm: &Arm| {
            json!({"group": arm.group, "beta": arm.beta, "all_betas": arm.together, "runs": arm.runs,
                   "furthest": finite(arm.furthest), "best": finite(arm.best),
                   "at_equal_d": list("d", &self.distances, &arm.gold, "gold"),
                   "at_equal_gold": list("gold", &self.levels, &arm.d, "d")})
        };
        self.arms.iter().map(arm).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arm<'p>(group: &str, paths: &[&'p Path]) -> (String, Option<f64>, bool, Vec<&'p Path>) {
        (group.into(), Some(0.1), false, paths.to_vec())
    }

    #[test]
    fn gold_at_a_distance_and_distance_for_a_gold_are_read_where_a_run_first_gets_there() {
        // Gold d/2 up to d = 2, then falling; twice as good; one that stays near.
        let slow: Path = vec![(0.0, 0.0), (1.0, 0.5), (2.0, 1.0), (4.0, 0.2)];
        let fast: Path = vec![(0.0, 0.0), (1.0, 1.0), (2.0, 2.0), (3.0, 1.0)];
        let near: Path = vec![(0.0, 0.0), (0.6, 0.3)];
        let found = Matched::compare([arm("a", &[&slow, &fast]), arm("b", &[&near])].into_iter());
        assert_eq!(found.distances, [0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]);
        let levels = [0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0];
        assert_eq!(found.levels, levels);
        let [a, b] = &found.arms[..] else { panic!() };
        for (at, (mean, apart, runs)) in [
            (0.375, 0.25, 2),
            (0.75, 0.5, 2),
            (1.125, 0.75, 2),
            (1.5, 1.0, 2),
            (1.15, 0.7, 2),
            (0.8, 0.4, 2),
            (0.4, f64::NAN, 1),
            (0.2, f64::NAN, 1),
        ]
        .iter()
        .enumerate()
        {
            let found = a.gold[at];
            assert!((found.mean - mean).abs() < 1e-12 && found.runs == *runs, "{at}: {found:?}");
            // Two numbers are as far apart as the square root of two of their deviations.
            let spread = found.sd * 2_f64.sqrt();
            let right = if apart.is_nan() { spread.is_nan() } else { (spread - apart).abs() < 1e-12 };
            assert!(right, "{at}: {found:?}");
        }
        // Slow has gold g at d = 2g, fast at g; beyond 1 only fast gets there.
        assert!((a.d[1].mean - 0.75).abs() < 1e-12 && a.d[1].runs == 2, "{:?}", a.d);
        assert!((a.d[5].mean - 1.5).abs() < 1e-12 && a.d[5].runs == 1 && a.d[5].sd.is_nan());
        assert_eq!((a.furthest, a.best, b.furthest, b.best), (4.0, 2.0, 0.6, 0.3));
        // What never gets there says so.
        assert_eq!(b.gold.iter().map(|found| found.runs).collect::<Vec<_>>(), [1, 0, 0, 0, 0, 0, 0, 0]);
        assert!((b.gold[0].mean - 0.25).abs() < 1e-12 && b.d[1].runs == 0 && b.d[1].mean.is_nan());
        let json = found.to_json();
        assert_eq!(json[1]["at_equal_d"][3], json!({"d": 2.0, "gold": null, "sd": null, "runs": 0}));
        assert_eq!(json[0]["at_equal_gold"][7]["d"], 2.0);
    }

    #[test]
    fn levels_are_round() {
        assert_eq!(levels(1.47), [0.25, 0.5, 0.75, 1.0, 1.25]);
        assert_eq!(levels(0.92), [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]);
        assert!(levels(0.0).is_empty() && levels(f64::NAN).is_empty() && levels(f64::INFINITY).is_empty());
        assert_eq!(levels(7.93), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
    }
}
