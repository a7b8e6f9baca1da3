//! Means and ratios over items, with their standard errors.

use super::Measure;

/// The mean of one number an item: standard error `s / sqrt(n)` with the sample's deviation `s`, as the harness's
/// `mean_stderr`.
pub(super) fn mean(name: &'static str, values: &[f64]) -> Measure {
    ratio(name, values, &vec![1.0; values.len()])
}

/// `sum(values) / sum(sizes)`; standard error by linearization (Cochran, Sampling Techniques, 3rd ed., eq. 6.13), which
/// is that of the mean where all sizes are 1.
pub(super) fn ratio(name: &'static str, values: &[f64], sizes: &[f64]) -> Measure {
    let (n, size) = (values.len() as f64, sizes.iter().sum::<f64>());
    let value = values.iter().sum::<f64>() / size;
    let squares = values.iter().zip(sizes).map(|(v, s)| (v - value * s).powi(2)).sum::<f64>();
    let stderr = (values.len() > 1).then(|| (squares * n / (n - 1.0)).sqrt() / size);
    Measure { name, value, stderr }
}

impl Measure {
    /// `e^value`, with the standard error of that to first order.
    pub(super) fn exp(self, name: &'static str) -> Self {
        let value = self.value.exp();
        Self { name, value, stderr: self.stderr.map(|stderr| value * stderr) }
    }

    pub(super) fn times(self, name: &'static str, factor: f64) -> Self {
        Self { name, value: self.value * factor, stderr: self.stderr.map(|stderr| stderr * factor.abs()) }
    }
}

/// The first of the largest, as `numpy.argmax`.
pub(super) fn argmax(values: &[f64]) -> usize {
    let better = |best: usize, at: usize| if values[at] > values[best] { at } else { best };
    (0..values.len()).reduce(better).expect("at least one")
}

/// 1 where `a` is above `b`, a half where they are equal.
pub(super) fn wins(a: f64, b: f64) -> f64 {
    if a == b { 0.5 } else { f64::from(u8::from(a > b)) }
}
