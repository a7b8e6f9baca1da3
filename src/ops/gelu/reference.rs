use std::f64::consts::{PI, SQRT_2};

use super::{Backward, CUBIC, Curve, Forward, Gelu, SQRT_2_OVER_PI};
use crate::device::Reference;
use crate::error::Result;

/// erf(x) = 2 / sqrt(pi) * e^(-x^2) * sum of 2^n x^(2n+1) / (2n+1)!!: all terms have one sign, nothing cancels
/// (Abramowitz and Stegun 7.1.6).
pub fn erf(x: f64) -> f64 {
    if x.abs() > 6.0 {
        return x.signum(); // nearer to 1 than f64 resolves
    }
    let (mut term, mut sum) = (x, x);
    for n in 1..400 {
        term *= 2.0 * x * x / (2 * n + 1) as f64;
        sum += term;
    }
    2.0 / PI.sqrt() * (-x * x).exp() * sum
}

/// P(x) and P'(x).
fn gate(curve: Curve, x: f64) -> (f64, f64) {
    match curve {
        Curve::Exact => (0.5 * (1.0 + erf(x / SQRT_2)), (-x * x / 2.0).exp() / (2.0 * PI).sqrt()),
        Curve::Tanh => {
            let tanh = (SQRT_2_OVER_PI * (x + CUBIC * x.powi(3))).tanh();
            (0.5 * (1.0 + tanh), 0.5 * (1.0 - tanh * tanh) * SQRT_2_OVER_PI * (1.0 + 3.0 * CUBIC * x * x))
        }
    }
}

impl Gelu for Reference {
    fn gelu(&self, a: Forward<Self>) -> Result<()> {
        a.check()?;
        let (x, y) = (a.x.f64s(), a.y.into_f64s());
        (0..y.len()).for_each(|i| y[i] = x[i] * gate(a.curve, x[i]).0);
        Ok(())
    }

    fn gelu_backward(&self, a: Backward<Self>) -> Result<()> {
        a.check()?;
        let (dy, x, dx) = (a.dy.f64s(), a.x.f64s(), a.dx.into_f64s());
        for i in 0..dx.len() {
            let (p, slope) = gate(a.curve, x[i]);
            dx[i] = dy[i] * (p + x[i] * slope);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    /// Digits of Abramowitz and Stegun, table 7.1.
    #[test]
    fn erf_is_that_of_the_tables() {
        for (x, expected) in [(0.1, 0.1124629160), (0.5, 0.5204998778), (1.0, 0.8427007929), (1.9, 0.9927904292)] {
            assert!((super::erf(x) - expected).abs() < 1e-10, "erf({x}) = {}", super::erf(x));
            assert_eq!(super::erf(-x), -super::erf(x));
        }
        assert!((super::erf(5.9) - 1.0).abs() < 1e-15);
        assert!(super::erf(f64::NAN).is_nan());
    }
}
