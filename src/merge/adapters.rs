//! Several LoRA adapters made into one, or added to their base (the arithmetic of rewarded and personalized soups: Rame et al.,
//! arXiv:2306.04488; Jang et al., arXiv:2310.11564).
//!
//! Adapter i of a module is `scaling_i B_i A_i`. The weighted sum of these is what interpolating the adapted models' weights
//! means; `cat` and `delta` are that sum, `svd` its best approximation of a rank. `factor` and `linear` sum A and B apart, so that
//! their product has cross terms `B_i A_j`: they are here because others published results with them.

use std::collections::BTreeSet;

use rayon::prelude::*;

use super::svd;
use crate::checkpoint::SaveDtype;
use crate::checkpoint::peft::{AdapterConfig, AdapterFile};
use crate::error::{Error, Result};

/// How A and B of several adapters become A and B of one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Method {
    /// One under the other: the exact sum, of rank `sum of ranks` (PEFT's `cat`).
    Cat,
    /// The sum's largest singular values, so many (PEFT's `svd`).
    Svd { rank: usize },
    /// `(sum w_i sqrt(s_i) B_i) (sum w_i sqrt(s_i) A_i)`: averaged apart, then multiplied (joeljang/RLPHF, alexrame/rewardedsoups).
    Factor,
    /// `(sum sqrt(w_i s_i) B_i) (sum sqrt(w_i s_i) A_i)` (PEFT's `linear`).
    Linear,
}

/// One adapter's matrices of one module.
#[derive(Clone, Debug)]
pub struct Weighted {
    pub weight: f64,
    pub scaling: f64,
    /// `[outputs, rank]` and `[rank, inputs]`, row-major.
    pub factors: Factors,
}

/// A product `B A`; there is no other factor to it.
#[derive(Clone, Debug, PartialEq)]
pub struct Factors {
    pub rank: usize,
    /// `[outputs, rank]`
    pub b: Vec<f64>,
    /// `[rank, inputs]`
    pub a: Vec<f64>,
}

impl Factors {
    /// B times A, `[outputs, inputs]`.
    pub fn product(&self) -> Vec<f64> {
        let (rank, inputs) = (self.rank, self.a.len() / self.rank);
        let mut out = vec![0.0; self.b.len() / rank * inputs];
        out.par_chunks_mut(inputs).enumerate().for_each(|(row, out)| self.row(row, out));
        out
    }

    /// Adds row `row` of the product to `out`.
    fn row(&self, row: usize, out: &mut [f64]) {
        let b = &self.b[row * self.rank..][..self.rank];
        for (b, a) in b.iter().zip(self.a.chunks_exact(out.len())) {
            out.iter_mut().zip(a).for_each(|(out, a)| *out += b * a);
        }
    }

    /// Of the transposed product.
    fn transposed(&self) -> Self {
        Self { rank: self.rank, b: turned(&self.a, self.rank), a: turned(&self.b, self.b.len() / self.rank) }
    }

    /// As an f32 file keeps them.
    pub fn stored(&self) -> Self {
        let rounded = |x: &[f64]| x.iter().map(|x| f64::from(*x as f32)).collect();
        Self { rank: self.rank, b: rounded(&self.b), a: rounded(&self.a) }
    }

    /// Squared Frobenius norm of the product's difference from a matrix; `transposed` where that is `[inputs, outputs]`.
    pub fn distance(&self, matrix: &[f32], transposed: bool) -> f64 {
        let turned;
        let factors = if transposed {
            turned = self.transposed();
            &turned
        } else {
            self
        };
        let cols = factors.a.len() / factors.rank;
        let row = |(row, matrix): (usize, &[f32])| {
            let mut product = vec![0.0; cols];
            factors.row(row, &mut product);
            product.iter().zip(matrix).map(|(a, b)| (a - f64::from(*b)).powi(2)).sum::<f64>()
        };
        // In the order of rows, so that the sum does not depend on the threads.
        matrix.par_chunks(cols).enumerate().map(row).collect::<Vec<f64>>().iter().sum()
    }

    fn scaled(&self, by_b: f64, by_a: f64) -> Self {
        let times = |x: &[f64], by: f64| x.iter().map(|x| x * by).collect();
        Self { rank: self.rank, b: times(&self.b, by_b), a: times(&self.a, by_a) }
    }

    /// Squared Frobenius norm of the product.
    pub fn energy(&self) -> f64 {
        self.dot(self).max(0.0)
    }

    /// Inner product with another product of the same size, by `B^T B'` and `A A'^T`.
    pub fn dot(&self, other: &Self) -> f64 {
        let inputs = self.a.len() / self.rank;
        let outputs = self.b.len() / self.rank;
        let [ours, theirs] = [self, other].map(|factors| turned(&factors.b, outputs));
        let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
        let pair = |i: usize, j: usize| {
            let b = dot(&ours[i * outputs..][..outputs], &theirs[j * outputs..][..outputs]);
            b * dot(&self.a[i * inputs..][..inputs], &other.a[j * inputs..][..inputs])
        };
        let row = |i: usize| (0..other.rank).map(|j| pair(i, j)).sum::<f64>();
        (0..self.rank).into_par_iter().map(row).collect::<Vec<f64>>().iter().sum()
    }

    /// `[B_1 B_2 ..] [A_1; A_2; ..]`: the sum of the products.
    fn beside(parts: &[Self]) -> Self {
        let rank = parts.iter().map(|part| part.rank).sum();
        let rows = parts.first().map_or(0, |part| part.b.len() / part.rank);
        let b_row =
            |row: usize| parts.iter().flat_map(move |part| part.b[row * part.rank..][..part.rank].iter().copied());
        Self {
            rank,
            b: (0..rows).flat_map(b_row).collect(),
            a: parts.iter().flat_map(|part| part.a.iter().copied()).collect(),
        }
    }
}

/// Row-major `[rows, ..]` to row-major `[.., rows]`.
fn turned(matrix: &[f64], rows: usize) -> Vec<f64> {
    let cols = matrix.len() / rows;
    (0..cols).flat_map(|col| (0..rows).map(move |row| matrix[row * cols + col])).collect()
}

/// What a method made of one module, and how far that is from the weighted sum.
pub struct Merged {
    pub factors: Factors,
    /// Squared Frobenius norm of the sum, and of its difference from what was made.
    pub energy: f64,
    pub lost: f64,
}

/// The weighted sum as one product of rank `sum of ranks`; weight and scaling are on A's side, as PEFT has it.
pub fn sum(parts: &[Weighted]) -> Factors {
    let scaled: Vec<Factors> = parts.iter().map(|part| part.factors.scaled(1.0, part.weight * part.scaling)).collect();
    Factors::beside(&scaled)
}

/// Merges the adapters of one module, of which there is at least one. `factor` and `linear` need equal ranks.
pub fn merge(method: Method, parts: &[Weighted]) -> Result<Merged> {
    let exact = sum(parts);
    let energy = exact.energy();
    let factors = match method {
        Method::Cat => return Ok(Merged { factors: exact, energy, lost: 0.0 }),
        Method::Svd { rank } => {
            let mut all = svd::of_product(&exact.b, &exact.a, exact.rank);
            let rank = rank.min(all.s.len());
            let lost = all.truncate(rank);
            return Ok(Merged { factors: Factors { rank, b: all.b(), a: all.a() }, energy, lost });
        }
        Method::Factor => added(parts, |part| {
            let root = part.scaling.abs().sqrt();
            [part.weight * root, part.weight * root * part.scaling.signum()]
        })?,
        Method::Linear => added(parts, |part| {
            let product = part.weight * part.scaling;
            [product.abs().sqrt(), product.abs().sqrt() * product.signum()]
        })?,
    };
    let lost = Factors::beside(&[exact, factors.scaled(-1.0, 1.0)]).energy();
    Ok(Merged { factors, energy, lost })
}

/// Sums of Bs and As, each times its factor `[of B, of A]`.
fn added(parts: &[Weighted], by: impl Fn(&Weighted) -> [f64; 2]) -> Result<Factors> {
    let mut all = parts.iter().map(|part| {
        let [b, a] = by(part);
        part.factors.scaled(b, a)
    });
    let mut sum = all.next().expect("at least one");
    for part in all {
        if part.rank != sum.rank {
            let detail = format!(
                "factor and linear add matrices of one rank, these have {} and {}; cat and svd take any",
                sum.rank, part.rank
            );
            return Err(Error::option("--method", detail));
        }
        sum.a.iter_mut().zip(part.a).for_each(|(sum, x)| *sum += x);
        sum.b.iter_mut().zip(part.b).for_each(|(sum, x)| *sum += x);
    }
    Ok(sum)
}

/// The matrices of a module of those adapters that have it and count, `(adapter, weight)`.
pub fn parts(adapters: &[(AdapterFile, f64)], module: &str) -> Result<Vec<Weighted>> {
    let (mut a, mut b) = (Vec::new(), Vec::new());
    let counted = adapters.iter().filter(|(file, weight)| *weight != 0.0 && file.has(module));
    counted
        .map(|(file, weight)| {
            let [rank, _] = file.read_a(module, &mut a)?;
            file.read_b(module, &mut b)?;
            let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect();
            Ok(Weighted {
                weight: *weight,
                scaling: file.scaling(module),
                factors: Factors { rank, b: wide(&b), a: wide(&a) },
            })
        })
        .collect()
}

/// What writing a changed weight in fewer bits cost.
#[derive(Clone, Debug, Default)]
pub struct Rounding {
    /// Squared Frobenius norms: of what was added, and of the written weight's difference from the exact one.
    pub added: f64,
    pub lost: f64,
    /// The largest difference of one element.
    pub largest: f64,
}

impl Rounding {
    fn and(self, other: Self) -> Self {
        Self { added: self.added + other.added, lost: self.lost + other.lost, largest: self.largest.max(other.largest) }
    }

    /// The difference as a share of what was added.
    pub fn share(&self) -> f64 {
        share(self.lost, self.added)
    }
}

/// Root of a ratio of energies; 0 of nothing.
pub fn share(lost: f64, energy: f64) -> f64 {
    if lost > 0.0 { (lost / energy).sqrt() } else { 0.0 }
}

/// Adds `delta` to a weight in f64, rounded to f32 once; `transposed` where the weight is `[inputs, outputs]`. Says what
/// writing the result as `dtype` loses.
pub fn add(weight: &mut [f32], delta: &Factors, transposed: bool, dtype: SaveDtype) -> Rounding {
    let turned;
    let delta = if transposed {
        turned = delta.transposed();
        &turned
    } else {
        delta
    };
    let cols = delta.a.len() / delta.rank;
    let row = |(row, weight): (usize, &mut [f32])| {
        let mut added = vec![0.0; cols];
        delta.row(row, &mut added);
        let mut rounding = Rounding::default();
        for (weight, added) in weight.iter_mut().zip(added) {
            let exact = f64::from(*weight) + added;
            *weight = exact as f32;
            let off = f64::from(dtype.rounded(*weight)) - exact;
            rounding.added += added * added;
            rounding.lost += off * off;
            rounding.largest = rounding.largest.max(off.abs());
        }
        rounding
    };
    // In the order of rows, so that the sums do not depend on the threads.
    let rows: Vec<Rounding> = weight.par_chunks_mut(cols).enumerate().map(row).collect();
    rows.into_iter().fold(Rounding::default(), Rounding::and)
}

/// The config of an adapter of these modules whose scalings are all 1.
pub fn config_of(made: &[(String, Factors)], like: &AdapterConfig) -> AdapterConfig {
    // The rank of most modules goes without a pattern.
    let count = |rank: usize| made.iter().filter(|(_, factors)| factors.rank == rank).count();
    let common = made.iter().map(|(_, factors)| factors.rank).max_by_key(|rank| (count(*rank), *rank)).unwrap_or(1);
    let others = made.iter().filter(|(_, factors)| factors.rank != common);
    // PEFT reads a pattern as a regular expression.
    let patterns: Vec<(String, usize)> =
        others.map(|(module, factors)| (module.replace('.', r"\."), factors.rank)).collect();
    AdapterConfig {
        lora_rank: common,
        lora_alpha: common as f64,
        rslora: false,
        lora_dropout: 0.0,
        alpha_pattern: patterns.iter().map(|(pattern, rank)| (pattern.clone(), *rank as f64)).collect(),
        rank_pattern: patterns,
        ..like.clone()
    }
}

/// Targets that name the modules of all adapters: each names its own.
pub fn targets(adapters: &[(AdapterFile, f64)]) -> Vec<String> {
    let all = adapters.iter().flat_map(|(file, _)| file.config.target_modules.iter().cloned());
    all.collect::<BTreeSet<_>>().into_iter().collect()
}
