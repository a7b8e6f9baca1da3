use crate::device::Philox;
use crate::error::{Error, Result};

/// How the next token is drawn.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Sampling {
    /// Logits are divided by it; 0 takes the likeliest token.
    pub temperature: f64,
    /// Draw from the smallest set of likeliest tokens that holds this share of the probability, (0, 1]
    /// (Holtzman et al., arXiv:1904.09751).
    pub top_p: f64,
    pub seed: u64,
}

impl Sampling {
    /// The token at index `position` of sample `stream`. Ties go to the smaller id.
    pub fn choose(&self, logits: &[f32], stream: u64, position: u64) -> Result<u32> {
        if let Some(bad) = logits.iter().position(|l| l.is_nan() || *l == f32::INFINITY) {
            let detail = format!("the logit of token {bad} is {}; are the weights sound?", logits[bad]);
            return Err(Error::op("sampling", detail));
        }
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        let logit = |id: &u32| logits[*id as usize];
        if self.temperature == 0.0 {
            let best = order.into_iter().reduce(|best, id| if logit(&id) > logit(&best) { id } else { best });
            return best.ok_or_else(|| Error::op("sampling", "there are no logits"));
        }
        order.sort_by(|a, b| logit(b).total_cmp(&logit(a)).then(a.cmp(b)));
        let max = f64::from(logit(&order[0]));
        let weights: Vec<f64> =
            order.iter().map(|id| ((f64::from(logit(id)) - max) / self.temperature).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut held = 0.0;
        let nucleus = weights.iter().position(|w| {
            held += w;
            held >= self.top_p * total
        });
        let nucleus = nucleus.map_or(weights.len(), |last| last + 1);
        let mut left = Philox::new(self.seed, stream).uniform(position) * weights[..nucleus].iter().sum::<f64>();
        let drawn = weights[..nucleus].iter().position(|w| {
            left -= w;
            left < 0.0
        });
        Ok(order[drawn.unwrap_or(nucleus - 1)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 4] = [0.0, 2.0, 1.0, -1.0];

    fn frequencies(temperature: f64, top_p: f64) -> [f64; 4] {
        let sampling = Sampling { temperature, top_p, seed: 3 };
        let n = 20_000;
        let mut counts = [0.0; 4];
        for i in 0..n {
            counts[sampling.choose(&LOGITS, i % 7, i / 7).unwrap() as usize] += 1.0 / n as f64;
        }
        counts
    }

    #[test]
    fn draws_follow_the_softmax() {
        for temperature in [0.5, 1.0, 2.0] {
            let weights = LOGITS.map(|l| (f64::from(l) / temperature).exp());
            let total: f64 = weights.iter().sum();
            for (drawn, weight) in frequencies(temperature, 1.0).iter().zip(weights) {
                assert!((drawn - weight / total).abs() < 0.015, "{drawn} instead of {}", weight / total);
            }
        }
    }

    /// p = [.087, .644, .237, .032]: 0.8 needs the two likeliest, renormalized.
    #[test]
    fn top_p_keeps_the_smallest_set_that_reaches_it() {
        let drawn = frequencies(1.0, 0.8);
        assert_eq!((drawn[0], drawn[3]), (0.0, 0.0));
        assert!((drawn[1] - 0.731).abs() < 0.015, "{drawn:?}");
        assert!((frequencies(1.0, 0.1)[1] - 1.0).abs() < 1e-9);
    }

    #[test]
    fn greedy_takes_the_likeliest_and_bad_logits_are_errors() {
        let greedy = Sampling { temperature: 0.0, top_p: 1.0, seed: 0 };
        assert_eq!(greedy.choose(&LOGITS, 0, 0).unwrap(), 1);
        assert_eq!(greedy.choose(&[1.0, 1.0], 0, 0).unwrap(), 0);
        for bad in [f32::NAN, f32::INFINITY] {
            assert!(greedy.choose(&[0.0, bad], 0, 0).unwrap_err().to_string().contains("token 1"));
        }
    }
}
