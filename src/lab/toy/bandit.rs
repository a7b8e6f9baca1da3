//! A bandit whose over-optimisation is exact. An answer is T independent tokens of V kinds; the reference draws each from a table;
//! the policy is a table of logits. With features A and B that are sums over tokens, of mean 0 and variance 1 under the reference,
//!
//! ```text
//! gold(y) = (0.45 A(y) + B(y) - 0.28 B(y)^2 + 0.28) / s        more of B is good, too much of it is bad; s: its spread at the start
//! ```
//!
//! so that KL(policy || reference) and E[gold] have closed forms; win rates alone are sampled. The losses see pairs from the reference
//! that the gold reward labels without error, for one epoch of RMSProp, as in Rafailov et al. (arXiv:2406.02900, section 3); the proxy
//! is a Bradley-Terry fit to such pairs, followed along `p(y) e^(strength proxy(y))` or by best-of-n, as in Gao et al.
//! (arXiv:2210.10760). The bandit itself is ours.

use serde_json::{Value, json};

use super::{Loss, log_softmax};
use crate::device::Philox;
use crate::scaling::{best_of_n, best_of_n_kl};

const TOKENS: usize = 24;
const KINDS: usize = 12;
const CELLS: usize = TOKENS * KINDS;
/// Of A, B and B^2 in the gold reward.
const WEIGHTS: [f64; 3] = [0.45, 1.0, 0.28];

pub const BETAS: [f64; 7] = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0];
/// Shares of the epoch after which a policy is looked at.
pub const LOOKS: [f64; 5] = [0.1, 0.25, 0.5, 0.75, 1.0];
const PAIRS: usize = 6400;
const BATCH: usize = 64;
const WARMUP: f64 = 10.0;
const RATE: f64 = 0.1;
/// Pairs and answers that nothing is trained on.
const HELD_OUT: usize = 4000;

/// Kinds of tokens, one for each place.
type Answer = [u8; TOKENS];

pub struct Bandit {
    seed: u64,
    /// Log-probabilities, `[tokens * kinds]` like all tables.
    reference: Vec<f64>,
    a: Vec<f64>,
    b: Vec<f64>,
    /// 1 / s
    scale: f64,
    held_out: Vec<(Answer, Answer)>,
}

/// A policy that a loss has led to.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Seen {
    pub beta: f64,
    pub epoch: f64,
    /// KL(policy || reference), nats, exact.
    pub kl: f64,
    /// E[gold], exact; 0 at the start, in its standard deviations there.
    pub gold: f64,
    /// Of answers of the policy against those of the reference, by gold.
    pub win_rate: f64,
    /// Share of held-out pairs that the log-ratio puts in order.
    pub implicit_accuracy: f64,
    /// Mean log-ratio of the chosen answers, nats: it falls as the policy leaves them.
    pub chosen_logratio: f64,
}

/// A point of a proxy's path: by tilting with a strength, or by best-of-n.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Optimised {
    pub pressure: f64,
    pub kl: f64,
    pub proxy: f64,
    pub gold: f64,
}

fn rows(table: &[f64]) -> impl Iterator<Item = &[f64]> {
    table.chunks(KINDS)
}

fn softmax_rows(logits: &[f64]) -> Vec<f64> {
    rows(logits).flat_map(log_softmax).collect()
}

fn exp(logps: &[f64]) -> Vec<f64> {
    logps.iter().map(|x| x.exp()).collect()
}

fn of(table: &[f64], answer: &Answer) -> f64 {
    answer.iter().enumerate().map(|(t, kind)| table[t * KINDS + usize::from(*kind)]).sum()
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let n = values.len() as f64;
    values.sum::<f64>() / n
}

impl Bandit {
    pub fn new(seed: u64) -> Self {
        let normal = |name: &str| {
            let random = Philox::named(seed, name);
            (0..CELLS as u64).map(|i| random.normal(i)).collect::<Vec<_>>()
        };
        let logits: Vec<f64> = normal("reference").into_iter().map(|x| 0.6 * x).collect();
        let reference = softmax_rows(&logits);
        let p = exp(&reference);
        let centred = |table: Vec<f64>| {
            let moved = rows(&p).zip(rows(&table)).flat_map(|(p, row)| {
                let mean: f64 = p.iter().zip(row).map(|(p, x)| p * x).sum();
                row.iter().map(move |x| x - mean).collect::<Vec<_>>()
            });
            let moved: Vec<f64> = moved.collect();
            let variance: f64 = p.iter().zip(&moved).map(|(p, x)| p * x * x).sum();
            moved.into_iter().map(|x| x / variance.sqrt()).collect::<Vec<_>>()
        };
        let (a, b) = (centred(normal("A")), centred(normal("B")));
        let mut bandit = Self { seed, reference, a, b, scale: 1.0, held_out: Vec::new() };
        let golds: Vec<f64> = bandit.draw("spread", &p, 20_000).iter().map(|y| bandit.gold(y)).collect();
        let middle = mean(golds.iter().copied());
        bandit.scale = 1.0 / mean(golds.iter().map(|x| (x - middle).powi(2))).sqrt();
        bandit.held_out = bandit.pairs("held out", HELD_OUT);
        bandit
    }

    fn draw(&self, name: &str, p: &[f64], answers: usize) -> Vec<Answer> {
        let random = Philox::named(self.seed, name);
        let token = |counter: u64, row: &[f64]| {
            let (u, mut sum) = (random.uniform(counter), 0.0);
            let kind = row.iter().position(|p| {
                sum += p;
                u < sum
            });
            kind.unwrap_or(KINDS - 1) as u8
        };
        let answer = |n: usize| {
            let mut answer = [0; TOKENS];
            let row = |t: usize| &p[t * KINDS..][..KINDS];
            answer.iter_mut().enumerate().for_each(|(t, kind)| *kind = token((n * TOKENS + t) as u64, row(t)));
            answer
        };
        (0..answers).map(answer).collect()
    }

    /// Mean 0 under the reference, and a standard deviation of 1.
    pub fn gold(&self, answer: &Answer) -> f64 {
        let ([linear, more, much], b) = (WEIGHTS, of(&self.b, answer));
        (linear * of(&self.a, answer) + more * b - much * b * b + much) * self.scale
    }

    /// E[gold] of a policy, exactly: B is a sum of independent tokens.
    pub fn mean_gold(&self, p: &[f64]) -> f64 {
        let [linear, more, much] = WEIGHTS;
        let mean = |table: &[f64]| p.iter().zip(table).map(|(p, x)| p * x).sum::<f64>();
        let variance = rows(p).zip(rows(&self.b)).map(|(p, b)| {
            let mean: f64 = p.iter().zip(b).map(|(p, b)| p * b).sum();
            p.iter().zip(b).map(|(p, b)| p * b * b).sum::<f64>() - mean * mean
        });
        let (b, variance) = (mean(&self.b), variance.sum::<f64>());
        (linear * mean(&self.a) + more * b - much * (b * b + variance) + much) * self.scale
    }

    /// KL(policy || reference), nats, exactly.
    pub fn kl(&self, logps: &[f64]) -> f64 {
        logps.iter().zip(&self.reference).map(|(p, q)| p.exp() * (p - q)).sum()
    }

    /// The better one first.
    fn pairs(&self, name: &str, pairs: usize) -> Vec<(Answer, Answer)> {
        let answers = self.draw(name, &exp(&self.reference), 2 * pairs);
        let pair = |two: &[Answer]| match self.gold(&two[0]) > self.gold(&two[1]) {
            true => (two[0], two[1]),
            false => (two[1], two[0]),
        };
        answers.chunks(2).map(pair).collect()
    }

    fn accuracy(&self, table: &[f64]) -> f64 {
        mean(
            self.held_out.iter().map(|(chosen, rejected)| f64::from(u8::from(of(table, chosen) > of(table, rejected)))),
        )
    }

    /// One epoch of a loss at each beta, looked at [`LOOKS`] times.
    pub fn align(&self, loss: Loss) -> Vec<Seen> {
        let pairs = self.pairs("train", PAIRS);
        let base = self.draw("base", &exp(&self.reference), HELD_OUT);
        let base: Vec<f64> = base.iter().map(|y| self.gold(y)).collect();
        BETAS.iter().flat_map(|beta| self.epoch(loss, *beta, &pairs, &base)).collect()
    }

    fn epoch(&self, loss: Loss, beta: f64, pairs: &[(Answer, Answer)], base: &[f64]) -> Vec<Seen> {
        let (mut theta, mut squares) = (vec![0.0; CELLS], vec![0.0; CELLS]);
        let steps = pairs.len() / BATCH;
        let mut seen = Vec::new();
        for (step, batch) in (1..=steps).zip(pairs.chunks(BATCH)) {
            let mut gradient = vec![0.0; CELLS];
            for (chosen, rejected) in batch {
                // Log-ratios are sums of theta, but for what both answers share.
                let z = beta * (of(&theta, chosen) - of(&theta, rejected));
                let slope = beta * loss.slope(z) / batch.len() as f64;
                for t in 0..TOKENS {
                    gradient[t * KINDS + usize::from(chosen[t])] += slope;
                    gradient[t * KINDS + usize::from(rejected[t])] -= slope;
                }
            }
            let (rate, seen_share) = (RATE * (step as f64 / WARMUP).min(1.0), 1.0 - 0.99_f64.powi(step as i32));
            for ((theta, square), g) in theta.iter_mut().zip(&mut squares).zip(&gradient) {
                *square = 0.99 * *square + 0.01 * g * g;
                *theta -= rate * g / ((*square / seen_share).sqrt() + 1e-12);
            }
            let looks = LOOKS.iter().filter(|share| (steps as f64 * **share).round().max(1.0) as usize == step);
            seen.extend(looks.map(|epoch| self.look(&theta, (beta, *epoch), pairs, base)));
        }
        seen
    }

    fn look(&self, theta: &[f64], (beta, epoch): (f64, f64), pairs: &[(Answer, Answer)], base: &[f64]) -> Seen {
        let logits: Vec<f64> = self.reference.iter().zip(theta).map(|(p, t)| p + t).collect();
        let logps = softmax_rows(&logits);
        let p = exp(&logps);
        let ratios: Vec<f64> = logps.iter().zip(&self.reference).map(|(p, q)| p - q).collect();
        let answers = self.draw("answers", &p, base.len());
        let won = answers.iter().zip(base).map(|(y, base)| f64::from(u8::from(self.gold(y) > *base)));
        Seen {
            beta,
            epoch,
            kl: self.kl(&logps),
            gold: self.mean_gold(&p),
            win_rate: mean(won),
            implicit_accuracy: self.accuracy(theta),
            chosen_logratio: mean(pairs.iter().map(|(chosen, _)| of(&ratios, chosen))),
        }
    }

    /// A Bradley-Terry proxy from so many comparisons, every feature its own weight, with a mean of 0 under the reference;
    /// L2 of 0.01, gradient descent with momentum until it stands still.
    pub fn proxy(&self, comparisons: usize) -> Vec<f64> {
        let pairs = self.pairs("proxy", comparisons);
        let (mut theta, mut speed) = (vec![0.0; CELLS], vec![0.0; CELLS]);
        for _ in 0..400 {
            let mut gradient: Vec<f64> = theta.iter().map(|t| 0.01 * t).collect();
            for (chosen, rejected) in &pairs {
                let slope = Loss::Dpo.slope(of(&theta, chosen) - of(&theta, rejected)) / pairs.len() as f64;
                for t in 0..TOKENS {
                    gradient[t * KINDS + usize::from(chosen[t])] += slope;
                    gradient[t * KINDS + usize::from(rejected[t])] -= slope;
                }
            }
            for ((theta, speed), g) in theta.iter_mut().zip(&mut speed).zip(&gradient) {
                *speed = 0.9 * *speed - g;
                *theta += *speed;
            }
        }
        let p = exp(&self.reference);
        let centred = rows(&theta).zip(rows(&p)).flat_map(|(row, p)| {
            let mean: f64 = row.iter().zip(p).map(|(x, p)| x * p).sum();
            row.iter().map(move |x| x - mean).collect::<Vec<_>>()
        });
        centred.collect()
    }

    /// Policies that maximise the proxy under a KL penalty: `ref(y) e^(strength proxy(y))`, normalised; all exact.
    pub fn tilt(&self, proxy: &[f64]) -> Vec<Optimised> {
        let strengths = std::iter::once(0.0).chain((0..36).map(|k| 0.05 * 800.0_f64.powf(f64::from(k) / 35.0)));
        let point = |strength: f64| {
            let logits: Vec<f64> = self.reference.iter().zip(proxy).map(|(q, x)| q + strength * x).collect();
            let logps = softmax_rows(&logits);
            let p = exp(&logps);
            let value = p.iter().zip(proxy).map(|(p, x)| p * x).sum();
            Optimised { pressure: strength, kl: self.kl(&logps), proxy: value, gold: self.mean_gold(&p) }
        };
        strengths.map(point).collect()
    }

    /// Best-of-n by the proxy, from 20000 answers of the reference.
    pub fn best_of_n(&self, proxy: &[f64]) -> Vec<Optimised> {
        let answers = self.draw("best of n", &exp(&self.reference), 20_000);
        let proxies: Vec<f64> = answers.iter().map(|y| of(proxy, y)).collect();
        let golds: Vec<f64> = answers.iter().map(|y| self.gold(y)).collect();
        let point = |n: usize| Optimised {
            pressure: n as f64,
            kl: best_of_n_kl(n),
            proxy: best_of_n(&proxies, &proxies, n),
            gold: best_of_n(&proxies, &golds, n),
        };
        (0..11).map(|k| point(1 << k)).collect()
    }

    pub fn proxy_accuracy(&self, proxy: &[f64]) -> f64 {
        self.accuracy(proxy)
    }
}

impl Seen {
    pub fn to_json(self) -> Value {
        let Self { beta, epoch, kl, gold, win_rate, implicit_accuracy, chosen_logratio } = self;
        json!({"beta": beta, "epoch": epoch, "KL": kl, "gold": gold, "win_rate_vs_reference": win_rate,
               "implicit_accuracy_heldout": implicit_accuracy, "chosen_logratio_mean": chosen_logratio})
    }
}

impl Optimised {
    pub fn to_json(self) -> Value {
        json!([self.pressure, self.kl, self.proxy, self.gold])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The closed forms against samples.
    #[test]
    fn kl_and_gold_are_exact() {
        let bandit = Bandit::new(3);
        let p = exp(&bandit.reference);
        assert!(bandit.kl(&bandit.reference).abs() < 1e-12);
        assert!(bandit.mean_gold(&p).abs() < 1e-12, "centred");
        let logits: Vec<f64> = bandit.reference.iter().zip(&bandit.b).map(|(q, b)| q + 2.0 * b).collect();
        let logps = softmax_rows(&logits);
        let answers = bandit.draw("test", &exp(&logps), 40_000);
        let gold = mean(answers.iter().map(|y| bandit.gold(y)));
        let kl = mean(answers.iter().map(|y| of(&logps, y) - of(&bandit.reference, y)));
        assert!((gold - bandit.mean_gold(&exp(&logps))).abs() < 0.05, "{gold}");
        assert!((kl / bandit.kl(&logps) - 1.0).abs() < 0.02, "{kl} {}", bandit.kl(&logps));
    }

    /// Over seeds: small betas rise within the epoch and then fall below where they started, large ones do not, and held-out
    /// implicit accuracy does not tell.
    #[test]
    fn the_hump_is_there() {
        for seed in [11, 12] {
            let bandit = Bandit::new(seed);
            for loss in Loss::ALL {
                let seen = bandit.align(loss);
                let of = |beta: f64| seen.iter().filter(move |seen| seen.beta == beta);
                let best = of(0.01).map(|seen| seen.win_rate).fold(0.0, f64::max);
                let (last, tight) = (of(0.01).next_back().unwrap(), of(1.0).next_back().unwrap());
                assert!(best > 0.75 && last.win_rate < 0.5 && last.kl > 10.0, "{seed} {loss:?}: {best} {last:?}");
                assert!(tight.win_rate > last.win_rate + 0.1 && tight.kl < 0.5 * last.kl, "{seed} {loss:?}: {tight:?}");
                assert!(last.implicit_accuracy > 0.7 && last.chosen_logratio < 0.0, "{seed} {loss:?}: {last:?}");
            }
            let path = bandit.tilt(&bandit.proxy(4000));
            let peak = path.iter().map(|point| point.gold).fold(0.0, f64::max);
            assert!(peak > 0.8 && path.last().unwrap().gold < 0.0, "{path:?}");
            assert!(path.windows(2).all(|two| two[1].proxy >= two[0].proxy), "the proxy only rises");
        }
    }
}
