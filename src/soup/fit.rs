//! Weights of a user's preferences from a few choices between two texts: Bradley-Terry on the simplex.
//!
//! ```text
//! P(chosen over rejected) = 1 / (1 + exp(-tau sum_i w_i d_i))        w_i >= 0, sum_i w_i = 1, tau > 0
//! ```
//!
//! d_i is by how much preference i finds chosen better, in units of its own spread over the choices; tau is how sharply the user
//! decides. What a few choices leave open is large and not symmetric, and a weight of 0 is a corner: so the answer is the
//! posterior under a uniform prior of w (Dirichlet(1, .., 1)) and a wide one of tau (log-normal, median 2, a factor of 4.5 each
//! way), drawn by Metropolis steps of one coordinate of (ln(w_i / w_n), ln tau) at a time. Even where every choice agrees
//! with one preference, which has no maximum of the likelihood, that has intervals.

use serde::Serialize;

use crate::device::Philox;

const MEDIAN: f64 = 2.0;
const SPREAD: f64 = 1.5;
/// Rounds of steps, one for each coordinate: while their lengths are being found, and those that count.
const FINDING: usize = 4000;
const COUNTED: usize = 20_000;
/// Rounds after which lengths are changed.
const WINDOW: usize = 50;
/// The share of accepted steps that walks fastest in one dimension (Gelman, Roberts and Gilks, 1996).
const ACCEPTED: f64 = 0.44;

/// Mean of the posterior, and the quantiles that hold the middle 95 % of it.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Interval {
    pub mean: f64,
    pub low: f64,
    pub high: f64,
}

/// What a user's choices say.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Fitted {
    /// The means sum to 1.
    pub weights: Vec<Interval>,
    pub tau: Interval,
    pub choices: usize,
    /// Share of the choices that the mean weights would make, too; a tie counts half.
    pub agreement: f64,
}

struct Posterior<'a> {
    /// `[choices][n]`
    differences: &'a [Vec<f64>],
}

/// w of (ln(w_i / w_n)), with a 0 behind it.
fn weights(place: &[f64]) -> Vec<f64> {
    let free = &place[..place.len() - 1];
    let most = free.iter().copied().fold(0.0, f64::max);
    let powers: Vec<f64> = free.iter().chain([&0.0]).map(|z| (z - most).exp()).collect();
    let total: f64 = powers.iter().sum();
    powers.into_iter().map(|p| p / total).collect()
}

impl Posterior<'_> {
    /// Its logarithm but for a constant, by (ln(w_i / w_n).., ln tau).
    fn density(&self, place: &[f64]) -> f64 {
        let (w, log_tau) = (weights(place), place[place.len() - 1]);
        let tau = log_tau.exp();
        let choice = |d: &Vec<f64>| {
            let x = -tau * w.iter().zip(d).map(|(w, d)| w * d).sum::<f64>();
            // ln(1 + e^x), which neither overflows nor loses what is small.
            x.max(0.0) + (-x.abs()).exp().ln_1p()
        };
        let likelihood = -self.differences.iter().map(choice).sum::<f64>();
        // A uniform density of w, by the logarithms of its ratios: the product of all w.
        let simplex: f64 = w.iter().map(|w| w.max(f64::MIN_POSITIVE).ln()).sum();
        likelihood + simplex - ((log_tau - MEDIAN.ln()) / SPREAD).powi(2) / 2.0
    }
}

/// The weights behind choices, by `[choices][n]` differences of n > 1 rewards, finite and chosen less rejected. The same seed gives
/// the same draws.
pub fn fit(differences: &[Vec<f64>], seed: u64) -> Fitted {
    let n = differences[0].len();
    let (posterior, random) = (Posterior { differences }, Philox::named(seed, "soup fit"));
    let mut place = vec![0.0; n];
    place[n - 1] = MEDIAN.ln();
    let (mut density, mut lengths, mut taken) = (posterior.density(&place), vec![1.0; n], vec![0.0; n]);
    let (mut counter, mut drawn): (u64, Vec<Vec<f64>>) = (0, vec![Vec::with_capacity(COUNTED); n + 1]);
    for round in 0..FINDING + COUNTED {
        for at in 0..n {
            let before = place[at];
            place[at] += lengths[at] * random.normal(counter);
            let there = posterior.density(&place);
            if random.uniform(counter + 1).ln() < there - density {
                density = there;
                taken[at] += 1.0;
            } else {
                place[at] = before;
            }
            counter += 2;
        }
        if round < FINDING && (round + 1) % WINDOW == 0 {
            for (length, taken) in lengths.iter_mut().zip(&mut taken) {
                *length *= (*taken / WINDOW as f64 - ACCEPTED).exp();
                *taken = 0.0;
            }
        }
        if round >= FINDING {
            let values = weights(&place).into_iter().chain([place[n - 1].exp()]);
            drawn.iter_mut().zip(values).for_each(|(drawn, x)| drawn.push(x));
        }
    }
    let mut intervals: Vec<Interval> = drawn.into_iter().map(interval).collect();
    let tau = intervals.pop().expect("it is the last");
    let mean = |d: &Vec<f64>| intervals.iter().zip(d).map(|(w, d)| w.mean * d).sum::<f64>();
    let agrees = differences.iter().map(|d| match mean(d) {
        x if x > 0.0 => 1.0,
        0.0 => 0.5,
        _ => 0.0,
    });
    let agreement = agrees.sum::<f64>() / differences.len() as f64;
    Fitted { weights: intervals, tau, choices: differences.len(), agreement }
}

fn interval(mut drawn: Vec<f64>) -> Interval {
    let mean = drawn.iter().sum::<f64>() / drawn.len() as f64;
    drawn.sort_by(f64::total_cmp);
    let at = |share: f64| drawn[((drawn.len() - 1) as f64 * share).round() as usize];
    Interval { mean, low: at(0.025), high: at(0.975) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Choices of a user with these weights between texts whose differences are normal.
    fn choices(weights: &[f64], tau: f64, count: u64, seed: u64) -> Vec<Vec<f64>> {
        let random = Philox::named(seed, "choices");
        let n = weights.len() as u64;
        let choice = |c: u64| {
            let d: Vec<f64> = (0..n).map(|i| random.normal(c * (n + 1) + i)).collect();
            let x = tau * weights.iter().zip(&d).map(|(w, d)| w * d).sum::<f64>();
            let prefers = random.uniform(c * (n + 1) + n) < 1.0 / (1.0 + (-x).exp());
            if prefers { d } else { d.iter().map(|d| -d).collect() }
        };
        (0..count).map(choice).collect()
    }

    #[test]
    fn planted_weights_lie_in_their_intervals() {
        let (mut inside, mut all, mut narrow) = (0, 0, 0.0);
        for (seed, planted) in (0..).zip([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1], [0.34, 0.33, 0.33]]) {
            for (count, width) in [(10, 1.0), (300, 0.45)] {
                let fitted = fit(&choices(&planted, 3.0, count, seed), 42);
                assert!((fitted.weights.iter().map(|w| w.mean).sum::<f64>() - 1.0).abs() < 1e-9);
                for (Interval { mean, low, high }, w) in fitted.weights.iter().zip(planted) {
                    assert!(
                        0.0 <= *low && low < mean && mean < high && *high <= 1.0 && high - low < width,
                        "{fitted:?}"
                    );
                    inside += usize::from((*low..=*high).contains(&w));
                    all += 1;
                    narrow += high - low;
                }
            }
        }
        // 95 % of 24, with room for luck.
        assert!(inside >= 21, "{inside} of {all}, {narrow}");
    }

    #[test]
    fn choices_that_all_agree_have_intervals() {
        let fitted = fit(&vec![vec![1.0, 0.0]; 8], 1);
        let [first, second] = &fitted.weights[..] else { panic!() };
        assert!(first.mean > 0.6 && first.high > 0.9 && second.low < 0.1 && fitted.agreement == 1.0, "{fitted:?}");
        assert!(fitted.tau.mean.is_finite());
        // Two that cannot be told apart share what there is, and one choice says next to nothing.
        let fitted = fit(&[vec![1.0, 1.0]], 1);
        assert!(
            fitted.weights.iter().all(|w| (w.mean - 0.5).abs() < 0.03 && w.low < 0.05 && w.high > 0.95),
            "{fitted:?}"
        );
        assert_eq!(fit(&[vec![0.3, -0.2]], 5), fit(&[vec![0.3, -0.2]], 5));
    }
}
