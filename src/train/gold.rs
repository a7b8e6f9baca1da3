//! What held-out completions are really worth: a gold reward that is measured and never trained on, of the completions on which
//! `--kl-samples` measures the distance.

use super::drift::{Drift, Estimate};
use super::online::Written;
use crate::data::Packing;
use crate::error::{Error, Result};
use crate::objectives::Metric;
use crate::ops::Backend;
use crate::rewards::{Jury, Rewards, Sample};

pub struct Gold<'a> {
    rewards: &'a Rewards,
    jury: Jury<'a>,
    /// Of the data's own completions of the prompts, one for each sample.
    answers: Option<Vec<f64>>,
}

impl<'a> Gold<'a> {
    pub fn new<B: Backend>(device: &'a B, rewards: &'a Rewards, packing: Packing) -> Self {
        Self { rewards, jury: Jury::new(device, rewards, packing), answers: None }
    }

    /// Of what was sampled last: for each sample, and as metrics of an evaluation. A completion wins over the data's own by
    /// being worth more, half by being worth the same; no order is involved.
    pub fn measure<B: Backend>(&mut self, drift: &Drift<B>) -> Result<(Vec<Option<f64>>, Vec<Metric>)> {
        let written = drift.written()?;
        let (gold, by_reward) = self.judge(&written)?;
        if self.answers.is_none() {
            self.answers = Some(self.judge(&drift.answers()?)?.0);
        }
        let known = |x: &f64| (!x.is_nan()).then_some(*x);
        let golds: Vec<f64> = gold.iter().filter_map(known).collect();
        if golds.is_empty() {
            return Err(Error::option("--gold-reward", "says nothing of any held-out completion; give one that does"));
        }
        let of = |name: &str, Estimate { mean, stderr }: Estimate| {
            [(name.to_string().into(), mean), (format!("{name}_stderr").into(), stderr)]
        };
        let mut metrics: Vec<Metric> = of("gold", Estimate::of(&golds)).into();
        let answers = self.answers.as_ref().expect("judged above");
        let won = gold.iter().zip(answers).filter(|(own, other)| !own.is_nan() && !other.is_nan());
        let won: Vec<f64> =
            won.map(|(own, other)| if own == other { 0.5 } else { f64::from(u8::from(own > other)) }).collect();
        if !won.is_empty() {
            metrics.extend(of("gold_win_rate", Estimate::of(&won)));
        }
        if by_reward.len() > 1 {
            for (name, said) in self.rewards.names().iter().zip(&by_reward) {
                let said: Vec<f64> = said.iter().filter_map(known).collect();
                let mean = said.iter().sum::<f64>() / said.len().max(1) as f64;
                metrics.push((format!("gold/{name}").into(), mean));
            }
        }
        Ok((gold.iter().map(known).collect(), metrics))
    }

    /// The weighted sum for each completion, and what each reward says.
    fn judge(&mut self, written: &[Written]) -> Result<(Vec<f64>, Vec<Vec<f64>>)> {
        let samples: Vec<Sample> = written.iter().map(Written::sample).collect();
        let rewards = self.jury.score(&samples)?;
        let total = (0..written.len()).map(|s| self.rewards.sum(rewards.iter().map(|said| said[s]))).collect();
        Ok((total, rewards))
    }
}
