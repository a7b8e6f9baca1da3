//! Whether blends are what interpolation promises: between two policies, and of each blend beside its ingredients.
//!
//! ```text
//! shortfall of a reward  sum_i w_i R(policy i) - R(sum_i w_i policy i)       the barrier of a path is its largest
//! ```
//!
//! That is the error barrier of linear mode connectivity (Frankle et al., arXiv:1912.05671), with a reward for the loss. Weights
//! that are averaged well have none, or a negative one.

use serde_json::{Map, Value, json};

use super::Measured;
use super::geometry::Cosines;
use super::grid::support;
use crate::train::Estimate;

/// Standard errors beyond which a step the wrong way is not luck, and of a shortfall, which is looked for in many places.
const STEP: f64 = 2.0;
const SHORT: f64 = 3.0;
/// Nats a token of held-out text that a blend may lose beside its worst ingredient.
const TOLERANCE: f64 = 0.05;

/// The line between the policies of two preferences.
pub struct Path<'a> {
    pub ends: [usize; 2],
    /// Ends included, by rising weight of the second.
    points: Vec<&'a Measured>,
}

/// Where a reward is furthest under the line between the ends, and by how much.
pub struct Barrier {
    pub at: f64,
    pub height: Estimate,
}

fn weights(arm: &Measured) -> &[f64] {
    arm.weights.as_deref().unwrap_or_default()
}

/// The policy of a preference alone.
fn corner<'a>(blends: &[&'a Measured], preference: usize) -> Option<&'a Measured> {
    blends.iter().copied().find(|blend| support(weights(blend)) == [preference])
}

/// Paths between all pairs whose ends, and something between, were measured.
pub fn paths<'a>(blends: &[&'a Measured], preferences: usize) -> Vec<Path<'a>> {
    let pairs = (0..preferences).flat_map(|i| (i + 1..preferences).map(move |j| [i, j]));
    let path = |ends: [usize; 2]| {
        let within = |blend: &&&Measured| support(weights(blend)).iter().all(|i| ends.contains(i));
        let mut points: Vec<&Measured> = blends.iter().filter(within).copied().collect();
        points.sort_by(|a, b| weights(a)[ends[1]].total_cmp(&weights(b)[ends[1]]));
        let whole = points.len() > 2 && ends.iter().all(|end| corner(&points, *end).is_some());
        whole.then_some(Path { ends, points })
    };
    pairs.filter_map(path).collect()
}

impl Path<'_> {
    fn share(&self, at: usize) -> f64 {
        weights(self.points[at])[self.ends[1]]
    }

    /// The step on which a reward of an end falls although its weight rises, by more than luck: the weights of the second end
    /// before and after it.
    pub fn not_monotone(&self, preference: usize) -> Option<[f64; 2]> {
        let rising = if preference == self.ends[1] { 1.0 } else { -1.0 };
        let wrong = |at: &usize| {
            let Estimate { mean, stderr } = self.points[at + 1].beyond(&[(1.0, self.points[*at])], preference);
            rising * mean < -STEP * stderr
        };
        (0..self.points.len() - 1).find(wrong).map(|at| [self.share(at), self.share(at + 1)])
    }

    pub fn barrier(&self, preference: usize) -> Barrier {
        let last = self.points.len() - 1;
        let (first, second) = (self.points[0], self.points[last]);
        let at = |at: usize| {
            let share = self.share(at);
            let beyond = self.points[at].beyond(&[(1.0 - share, first), (share, second)], preference);
            Barrier { at: share, height: Estimate { mean: -beyond.mean, ..beyond } }
        };
        let highest = (1..last).map(at).max_by(|a, b| a.height.mean.total_cmp(&b.height.mean));
        highest.expect("a path has something between its ends")
    }

    /// The same of the loss on held-out texts, nats a token.
    pub fn nll_barrier(&self) -> Option<f64> {
        let last = self.points.len() - 1;
        let (first, second) = (self.points[0].nll?, self.points[last].nll?);
        let above = |at: usize| Some(self.points[at].nll? - (1.0 - self.share(at)) * first - self.share(at) * second);
        (1..last).map(above).collect::<Option<Vec<f64>>>()?.into_iter().max_by(f64::total_cmp)
    }

    pub fn to_json(&self, names: &[String], cosines: &Cosines) -> Value {
        let [i, j] = self.ends;
        let barriers: Map<String, Value> = (0..names.len())
            .map(|k| {
                let Barrier { at, height } = self.barrier(k);
                (names[k].clone(), json!({"height": height.mean, "stderr": height.stderr, "at": at}))
            })
            .collect();
        let monotone: Map<String, Value> =
            self.ends.iter().map(|k| (names[*k].clone(), json!(self.not_monotone(*k).is_none()))).collect();
        json!({"from": names[i], "to": names[j], "cosine": cosines[i][j], "monotone": monotone, "barrier": barriers,
               "nll_barrier": self.nll_barrier()})
    }
}

/// Why a blend is not to be trusted, a reason each; none of one that is.
pub fn doubts(blend: &Measured, blends: &[&Measured], names: &[String]) -> Vec<String> {
    let counted = support(weights(blend));
    let parts: Option<Vec<(f64, &Measured)>> =
        counted.iter().map(|i| Some((weights(blend)[*i], corner(blends, *i)?))).collect();
    let Some(parts) = parts.filter(|parts| parts.len() > 1) else { return Vec::new() };
    let mut found = Vec::new();
    for (k, name) in names.iter().enumerate() {
        let below = |estimate: Estimate| estimate.mean < -SHORT * estimate.stderr;
        let promised: f64 = parts.iter().map(|(w, part)| w * part.reward(k).mean).sum();
        let reward = blend.reward(k).mean;
        if parts.iter().all(|(_, part)| below(blend.beyond(&[(1.0, part)], k))) {
            found.push(format!("FAILED: has less {name} than every ingredient: {reward:.3}"));
        } else if below(blend.beyond(&parts, k)) {
            found.push(format!("has less {name} than its ingredients promise: {reward:.3} instead of {promised:.3}"));
        }
    }
    let worst = parts.iter().filter_map(|(_, part)| part.nll).fold(f64::NEG_INFINITY, f64::max);
    if let Some(nll) = blend.nll.filter(|nll| *nll > worst + TOLERANCE) {
        found.push(format!("FAILED: loses held-out text: {nll:.3} nats a token, its worst ingredient {worst:.3}"));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::super::tests::measured;
    use super::*;

    fn names() -> Vec<String> {
        ["a", "b"].map(String::from).to_vec()
    }

    #[test]
    fn a_straight_path_is_trusted_and_a_valley_is_not() {
        let ends =
            [measured("a", Some(&[1.0, 0.0]), &[1.0, 0.0], 2.0), measured("b", Some(&[0.0, 1.0]), &[0.0, 1.0], 2.1)];
        let half = |a: f64, b: f64, nll: f64| measured("a=0.5 b=0.5", Some(&[0.5, 0.5]), &[a, b], nll);
        let look = |middle: Measured| {
            let blends = [&ends[0], &middle, &ends[1]];
            let found = paths(&blends, 2);
            let [path] = &found[..] else { panic!() };
            let monotone = [0, 1].map(|k| path.not_monotone(k).is_none());
            let heights = [0, 1].map(|k| (path.barrier(k).height.mean * 1e6).round() / 1e6);
            (monotone, heights, path.nll_barrier().unwrap(), doubts(&middle, &blends, &names()))
        };
        let (monotone, heights, nll, why) = look(half(0.6, 0.5, 2.05));
        assert_eq!((monotone, heights, why.len()), ([true; 2], [-0.1, 0.0], 0));
        assert!(nll.abs() < 1e-12);
        let (monotone, heights, _, why) = look(half(0.1, 0.5, 2.0));
        assert_eq!((monotone, heights), ([true; 2], [0.4, 0.0]));
        assert_eq!(why, ["has less a than its ingredients promise: 0.110 instead of 0.510"]);
        let (monotone, _, nll, why) = look(half(-0.5, 0.5, 3.0));
        assert_eq!(monotone, [false, true]);
        assert!((nll - 0.95).abs() < 1e-12 && why.len() == 2 && why[0].starts_with("FAILED: has less a"), "{why:?}");
        assert!(why[1].starts_with("FAILED: loses held-out text: 3.000"), "{why:?}");
    }

    #[test]
    fn where_an_end_is_missing_there_is_no_path() {
        let end = measured("a", Some(&[1.0, 0.0]), &[1.0, 0.0], 2.0);
        let middle = measured("a=0.5 b=0.5", Some(&[0.5, 0.5]), &[0.0, 0.0], 2.0);
        assert!(paths(&[&end, &middle], 2).is_empty());
        assert!(doubts(&middle, &[&end, &middle], &names()).is_empty());
        assert!(doubts(&end, &[&end], &names()).is_empty());
    }
}
