//! What blends that were not tried will come to: a polynomial of their weights, fitted to those that were (H. Scheffé,
//! "Experiments with mixtures", J. R. Stat. Soc. B 20, 1958). On the simplex it needs no constant and no squares:
//!
//! ```text
//! y(w) = sum_i b_i w_i + sum_{i<j} b_ij w_i w_j
//! ```
//!
//! What a point left out is predicted by the others is known without a second fit: its error is e_i / (1 - h_ii), with the leverage
//! h_ii = x_i^T (X^T X)^-1 x_i.

use serde::{Deserialize, Serialize};

/// One outcome as a function of the weights.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Mixture {
    /// b_i, and where there are products b_ij in the order 01, 02, .., 12, ..
    pub coefficients: Vec<f64>,
    pub products: bool,
    /// Blends that it was fitted to.
    pub points: usize,
    /// Root mean square, and the largest, of the errors of blends that were left out.
    pub loo_rmse: f64,
    pub loo_largest: f64,
}

fn terms(weights: &[f64], products: bool) -> Vec<f64> {
    let mut terms = weights.to_vec();
    if products {
        for (i, a) in weights.iter().enumerate() {
            terms.extend(weights[i + 1..].iter().map(|b| a * b));
        }
    }
    terms
}

/// Row-major; `None` of what is singular. Gauss and Jordan with the largest pivot of each column.
fn inverse(mut matrix: Vec<f64>, n: usize) -> Option<Vec<f64>> {
    let mut out: Vec<f64> = (0..n * n).map(|at| f64::from(at / n == at % n)).collect();
    let scale = matrix.iter().fold(0.0, |a: f64, x| a.max(x.abs()));
    for col in 0..n {
        let pivot = (col..n).max_by(|a, b| matrix[a * n + col].abs().total_cmp(&matrix[b * n + col].abs()))?;
        let value = matrix[pivot * n + col];
        if value.abs().is_nan() || value.abs() <= 1e-12 * scale {
            return None;
        }
        for x in [&mut matrix, &mut out] {
            (0..n).for_each(|c| x.swap(pivot * n + c, col * n + c));
            (0..n).for_each(|c| x[col * n + c] /= value);
        }
        for row in (0..n).filter(|row| *row != col) {
            let factor = matrix[row * n + col];
            for x in [&mut matrix, &mut out] {
                (0..n).for_each(|c| x[row * n + c] -= factor * x[col * n + c]);
            }
        }
    }
    Some(out)
}

impl Mixture {
    /// Least squares over `(weights, outcome)`, with products where the points are more than the coefficients, else without;
    /// `None` where they are too few for that, too, or do not tell the coefficients apart.
    pub fn fit(points: &[(Vec<f64>, f64)]) -> Option<Self> {
        Self::of(points, true).or_else(|| Self::of(points, false))
    }

    fn of(points: &[(Vec<f64>, f64)], products: bool) -> Option<Self> {
        let rows: Vec<Vec<f64>> = points.iter().map(|(weights, _)| terms(weights, products)).collect();
        let n = rows.first()?.len();
        if points.len() <= n {
            return None;
        }
        let mut gram = vec![0.0; n * n];
        let mut right = vec![0.0; n];
        for (row, (_, y)) in rows.iter().zip(points) {
            for i in 0..n {
                right[i] += row[i] * y;
                (0..n).for_each(|j| gram[i * n + j] += row[i] * row[j]);
            }
        }
        let inverse = inverse(gram, n)?;
        let times = |x: &[f64]| -> Vec<f64> { inverse.chunks_exact(n).map(|row| dot(row, x)).collect() };
        let coefficients = times(&right);
        let error = |(row, (_, y)): (&Vec<f64>, &(Vec<f64>, f64))| {
            // A point that alone decides a coefficient says nothing about the error.
            let left = (1.0 - dot(row, &times(row))).max(1e-9);
            (y - dot(row, &coefficients)) / left
        };
        let errors: Vec<f64> = rows.iter().zip(points).map(error).collect();
        let square = errors.iter().map(|e| e * e).sum::<f64>() / errors.len() as f64;
        let loo_largest = errors.iter().fold(0.0, |a: f64, e| a.max(e.abs()));
        Some(Self { coefficients, products, points: points.len(), loo_rmse: square.sqrt(), loo_largest })
    }

    pub fn predict(&self, weights: &[f64]) -> f64 {
        dot(&terms(weights, self.products), &self.coefficients)
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::super::grid::grid;
    use super::*;

    fn planted(w: &[f64]) -> f64 {
        2.0 * w[0] - w[1] + 0.5 * w[2] + 3.0 * w[0] * w[1] - 1.5 * w[1] * w[2]
    }

    #[test]
    fn a_polynomial_is_found_again() {
        let points: Vec<(Vec<f64>, f64)> =
            grid(3, &[0.25, 0.5, 0.75]).into_iter().map(|w| (w.clone(), planted(&w))).collect();
        let fit = Mixture::fit(&points).unwrap();
        let expected = [2.0, -1.0, 0.5, 3.0, 0.0, -1.5];
        assert!(fit.products && fit.coefficients.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-10), "{fit:?}");
        assert!(fit.loo_largest < 1e-9);
        let untried = [0.6, 0.1, 0.3];
        assert!((fit.predict(&untried) - planted(&untried)).abs() < 1e-10);
    }

    #[test]
    fn leaving_out_needs_no_second_fit() {
        let noise = [0.3, -0.1, 0.2, -0.4, 0.15, 0.05, -0.2, 0.1, 0.0, 0.25, -0.3, 0.12, -0.05, 0.2, -0.15, 0.08];
        let points: Vec<(Vec<f64>, f64)> =
            grid(3, &[0.25, 0.5, 0.75]).into_iter().zip(noise).map(|(w, e)| (w.clone(), planted(&w) + e)).collect();
        let fit = Mixture::fit(&points).unwrap();
        let error = |out: usize| {
            let kept: Vec<_> = points.iter().enumerate().filter(|(i, _)| *i != out).map(|(_, p)| p.clone()).collect();
            Mixture::fit(&kept).unwrap().predict(&points[out].0) - points[out].1
        };
        let errors: Vec<f64> = (0..points.len()).map(error).collect();
        let rmse = (errors.iter().map(|e| e * e).sum::<f64>() / 16.0).sqrt();
        assert!((fit.loo_rmse - rmse).abs() < 1e-9, "{} {rmse}", fit.loo_rmse);
        assert!((fit.loo_largest - errors.iter().fold(0.0, |a: f64, e| a.max(e.abs()))).abs() < 1e-9);
    }

    #[test]
    fn few_points_get_few_coefficients() {
        let point = |w: &[f64]| (w.to_vec(), w[0]);
        let line = [point(&[1.0, 0.0]), point(&[0.5, 0.5]), point(&[0.0, 1.0])];
        assert!(!Mixture::fit(&line).unwrap().products);
        assert_eq!(Mixture::fit(&line[..2]), None);
        assert_eq!(Mixture::fit(&[]), None);
        assert_eq!(Mixture::fit(&[point(&[1.0, 0.0]), point(&[1.0, 0.0]), point(&[1.0, 0.0])]), None);
    }
}
