//! Points of the simplex: weights of policies, none negative, that sum to 1.

/// Sums of weights that people type differ from 1 by rounding.
const ROUNDING: f64 = 1e-5;

/// Fails with the nearest weights of that kind, in proportion, where these are not on the simplex; with equal ones where nothing
/// positive is left.
pub fn check(weights: &[f64]) -> Result<(), Vec<f64>> {
    let total: f64 = weights.iter().sum();
    if weights.iter().all(|w| *w >= 0.0) && (total - 1.0).abs() <= ROUNDING {
        return Ok(());
    }
    let positive: f64 = weights.iter().map(|w| w.max(0.0)).sum();
    let share = |w: &f64| if positive > 0.0 { w.max(0.0) / positive } else { 1.0 / weights.len() as f64 };
    Err(weights.iter().map(share).collect())
}

/// The blends that a sweep looks at: each policy alone, each pair with `shares` of its first, each three at equal weights and
/// with half of one of them, and, of more than three, all at equal weights. `[points][n]`
pub fn grid(n: usize, shares: &[f64]) -> Vec<Vec<f64>> {
    let with = |parts: &[(usize, f64)]| {
        let mut weights = vec![0.0; n];
        parts.iter().for_each(|(at, weight)| weights[*at] = *weight);
        weights
    };
    let mut points: Vec<Vec<f64>> = (0..n).map(|i| with(&[(i, 1.0)])).collect();
    for i in 0..n {
        for j in i + 1..n {
            points.extend(shares.iter().map(|share| with(&[(i, *share), (j, 1.0 - share)])));
        }
    }
    for i in 0..n {
        for j in i + 1..n {
            for k in j + 1..n {
                points.push(with(&[(i, 1.0 / 3.0), (j, 1.0 / 3.0), (k, 1.0 / 3.0)]));
                let heavy = |at: usize| [i, j, k].map(|one| (one, if one == at { 0.5 } else { 0.25 }));
                points.extend([i, j, k].map(|at| with(&heavy(at))));
            }
        }
    }
    if n > 3 {
        points.push(vec![1.0 / n as f64; n]);
    }
    points
}

/// Policies that count.
pub fn support(weights: &[f64]) -> Vec<usize> {
    (0..weights.len()).filter(|i| weights[*i] != 0.0).collect()
}

/// Whether all that count, more than one, count the same.
pub fn is_even(weights: &[f64]) -> bool {
    let counted = support(weights);
    counted.len() > 1 && counted.iter().all(|i| (weights[*i] - weights[counted[0]]).abs() < ROUNDING)
}

/// `bright=0.3 brief=0.7`, without those that do not count.
pub fn label(names: &[&str], weights: &[f64]) -> String {
    let part = |i: usize| format!("{}={}", names[i], (weights[i] * 1000.0).round() / 1000.0);
    support(weights).into_iter().map(part).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_off_the_simplex_is_put_on_it() {
        for good in [vec![1.0], vec![0.3, 0.7], vec![1.0, 0.0], vec![1.0 / 3.0; 3], vec![0.333333; 3]] {
            assert_eq!(check(&good), Ok(()));
        }
        assert_eq!(check(&[1.0, 3.0]), Err(vec![0.25, 0.75]));
        assert_eq!(check(&[1.5, -0.5]), Err(vec![1.0, 0.0]));
        assert_eq!(check(&[-1.0, 0.0]), Err(vec![0.5, 0.5]));
        assert!(check(&[f64::NAN, 1.0]).is_err());
    }

    #[test]
    fn a_grid_holds_corners_edges_and_middles_once_each() {
        for (n, points) in [(1, 1), (2, 5), (3, 3 + 9 + 4), (4, 4 + 18 + 16 + 1)] {
            let grid = grid(n, &[0.25, 0.5, 0.75]);
            assert_eq!(grid.len(), points, "{n}");
            assert!(grid.iter().all(|weights| check(weights) == Ok(())));
            assert!((0..points).all(|i| (0..i).all(|j| grid[i] != grid[j])));
        }
        let names = ["a", "b", "c"];
        assert_eq!(label(&names, &[1.0 / 3.0; 3]), "a=0.333 b=0.333 c=0.333");
        assert_eq!(label(&names, &[0.25, 0.0, 0.75]), "a=0.25 c=0.75");
        assert!(is_even(&[0.5, 0.0, 0.5]) && !is_even(&[1.0, 0.0]) && !is_even(&[0.25, 0.75]));
    }
}
