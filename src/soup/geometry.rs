//! Angles between what policies learned: the cosine of their task vectors, policy less base, over all weights.
//!
//! Of adapters the task vector is `scaling B A`, and two of them have the inner product <B A, B' A'> = tr((B^T B')(A' A^T)), which
//! no matrix of the weight's size is needed for.

use std::path::Path;

use crate::checkpoint::Weights;
use crate::checkpoint::peft::AdapterFile;
use crate::error::{Error, Result};
use crate::merge::adapters::{Factors, parts, sum};

/// `[n][n]`; NaN beside a policy that has learned nothing.
pub type Cosines = Vec<Vec<f64>>;

/// Of adapters of one base.
pub fn of_adapters(dirs: &[&Path]) -> Result<Cosines> {
    let open = |dir: &&Path| Ok((AdapterFile::open(dir)?, 1.0));
    let adapters: Vec<(AdapterFile, f64)> = dirs.iter().map(open).collect::<Result<_>>()?;
    let mut modules: Vec<String> = adapters.iter().flat_map(|(file, _)| file.modules()).collect();
    modules.sort();
    modules.dedup();
    let mut products = vec![vec![0.0; dirs.len()]; dirs.len()];
    for module in &modules {
        let vector = |adapter| -> Result<Option<Factors>> {
            let parts = parts(std::slice::from_ref(adapter), module)?;
            Ok((!parts.is_empty()).then(|| sum(&parts)))
        };
        let vectors: Vec<Option<Factors>> = adapters.iter().map(vector).collect::<Result<_>>()?;
        add(&mut products, |i, j| match (&vectors[i], &vectors[j]) {
            (Some(a), Some(b)) => a.dot(b),
            _ => 0.0,
        });
    }
    Ok(cosines(&products))
}

/// Of whole models with their base, one tensor of each in memory at a time.
pub fn of_models(base: &Path, dirs: &[&Path]) -> Result<Cosines> {
    let models: Vec<Weights> = dirs.iter().map(|dir| Weights::open(dir)).collect::<Result<_>>()?;
    let start = Weights::open(base)?;
    let mut products = vec![vec![0.0; dirs.len()]; dirs.len()];
    for name in start.names() {
        let shape = start.shape(name).unwrap_or_default();
        let mut at_start = vec![0.0; shape.iter().product()];
        start.read(name, shape, &mut at_start)?;
        let vector = |(model, dir): (&Weights, &&Path)| {
            if model.shape(name) != Some(shape) {
                let detail = format!("has no {name} of the shape {shape:?}; is {} its base?", base.display());
                return Err(Error::file(dir, detail));
            }
            let mut values = vec![0.0; at_start.len()];
            model.read(name, shape, &mut values)?;
            values.iter_mut().zip(&at_start).for_each(|(value, start)| *value -= start);
            Ok(values)
        };
        let vectors: Vec<Vec<f32>> = models.iter().zip(dirs).map(vector).collect::<Result<_>>()?;
        add(&mut products, |i, j| vectors[i].iter().zip(&vectors[j]).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum());
    }
    Ok(cosines(&products))
}

fn add(products: &mut Cosines, of: impl Fn(usize, usize) -> f64) {
    for (i, row) in products.iter_mut().enumerate() {
        row.iter_mut().enumerate().for_each(|(j, sum)| *sum += of(i, j));
    }
}

fn cosines(products: &Cosines) -> Cosines {
    let row = |i: usize| (0..products.len()).map(move |j| products[i][j] / (products[i][i] * products[j][j]).sqrt());
    (0..products.len()).map(|i| row(i).collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inner_products_of_products_need_no_product() {
        let one = Factors { rank: 1, b: vec![1.0, -2.0, 0.5], a: vec![3.0, 1.0] };
        let other = Factors { rank: 2, b: vec![1.0, 0.0, 2.0, 1.0, -1.0, 4.0], a: vec![0.5, -1.0, 2.0, 0.25] };
        let whole: f64 = one.product().iter().zip(other.product()).map(|(a, b)| a * b).sum();
        assert!((one.dot(&other) - whole).abs() < 1e-12 && (other.dot(&one) - whole).abs() < 1e-12);
        assert!(whole != 0.0);
    }

    #[test]
    fn angles_are_between_minus_one_and_one() {
        let found = cosines(&vec![vec![4.0, -2.0, 0.0], vec![-2.0, 1.0, 0.0], vec![0.0, 0.0, 0.0]]);
        assert_eq!((found[0][0], found[0][1]), (1.0, -1.0));
        assert!(found[0][2].is_nan(), "who has learned nothing goes nowhere");
    }
}
