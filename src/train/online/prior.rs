//! What the reference writes for the prompts of the training data. It is drawn once, before the first step, when the policy is the
//! reference: no second model is in memory. A file of the output folder holds it, and a resumed run reads it there.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Online;
use crate::checkpoint::write_file;
use crate::data::Example;
use crate::error::{At, Error, Result};
use crate::objectives::advantages::weighted;
use crate::ops::Backend;
use crate::progress::Progress;
use crate::train::policy::Policy;

/// One completion a line.
pub const PRIOR: &str = "prior.jsonl";
/// Batches of prompts are counted from here, beyond those of steps, for streams of random numbers of their own.
const FIRST_BATCH: u64 = 1 << 32;

/// A completion that the reference wrote.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Drawn {
    /// Of the training data, as it is trained on.
    example: usize,
    pub ids: Vec<u32>,
    /// Ended by itself.
    pub finished: bool,
    /// None where no reward says anything.
    reward: Option<f64>,
}

impl Drawn {
    pub fn reward(&self) -> f64 {
        self.reward.unwrap_or(f64::NAN)
    }
}

impl<'a, B: Backend> Online<'a, B> {
    /// Sees to it that what the objective reads of the reference's completions is there, in a run that is at `step`.
    ///
    /// # Errors
    /// A run that goes on without the file of its start; an interruption, after which it is drawn again.
    pub fn open_prior(&mut self, device: &B, policy: &mut Policy<B>, step: u64, stop: &dyn Fn() -> bool) -> Result<()> {
        let needs = self.task.objective.needs();
        // One for each time that a prompt is seen.
        let visits = if needs.prior { self.task.max_steps.div_ceil(self.task.steps_per_epoch) as usize } else { 0 };
        let each = needs.prior_rewards.max(visits);
        if each == 0 {
            return Ok(());
        }
        let path = self.settings.output_dir.join(PRIOR);
        match (path.exists(), step) {
            (false, 1..) => {
                let detail = "is missing, and the reference's completions were drawn before the first step; start again without \
                              --resume-from-checkpoint";
                return Err(Error::file(&path, detail));
            }
            (true, 1..) => {}
            (_, 0) => {
                let drawn = self.draw_prior(device, policy, each, stop)?;
                let lines: String =
                    drawn.iter().map(|one| serde_json::to_string(one).expect("numbers") + "\n").collect();
                write_file(&path, |out| out.write_all(lines.as_bytes()))?;
            }
        }
        // As a resumed run sees it.
        self.prior = read(&path, self.task.train.examples.len())?;
        Ok(())
    }

    fn draw_prior(
        &mut self,
        device: &B,
        policy: &mut Policy<B>,
        each: usize,
        stop: &dyn Fn() -> bool,
    ) -> Result<Vec<Drawn>> {
        policy.rest();
        let examples: Vec<&'a Example> = self.task.train.examples.iter().collect();
        let (batch, samples) = (self.settings.batch_size, self.rollouts.samples);
        // As many at a time as in a step, so that they take no more memory.
        let rounds = each.div_ceil(samples);
        let mut progress = Progress::new("what the reference writes", examples.len() as u64, "prompts");
        let mut drawn = Vec::new();
        for (b, data) in examples.chunks(batch).enumerate() {
            for round in 0..rounds {
                if stop() {
                    let detail = "before the first step; --resume-from-checkpoint auto starts again".into();
                    return Err(Error::Interrupted { detail });
                }
                let number = FIRST_BATCH + (b * rounds + round) as u64;
                let own = self.task.sampled_by.iter().any(|reference| reference.is_policy);
                let (of_each, written, _) = match own {
                    true => policy
                        .without_adapter(|policy| self.complete(device, policy, (number, data), false, &mut |_| ()))?,
                    false => self.complete(device, policy, (number, data), false, &mut |_| ())?,
                };
                let total = weighted(&self.judge(&written)?, &self.rewards.weights());
                let here = samples.min(each - round * samples);
                for (s, (written, reward)) in
                    written.into_iter().zip(total).enumerate().filter(|(s, _)| s % of_each < here)
                {
                    let reward = Some(reward).filter(|reward| reward.is_finite());
                    drawn.push(Drawn {
                        example: b * batch + s / of_each,
                        ids: written.ids,
                        finished: written.finished,
                        reward,
                    });
                }
            }
            progress.at(((b + 1) * batch).min(examples.len()) as u64, "");
        }
        progress.finish();
        Ok(drawn)
    }
}

/// `[examples]`
fn read(path: &Path, examples: usize) -> Result<Vec<Vec<Drawn>>> {
    let mut prior = vec![Vec::new(); examples];
    for line in std::fs::read_to_string(path).at(path)?.lines() {
        let drawn: Drawn = serde_json::from_str(line).at(path)?;
        match prior.get_mut(drawn.example) {
            Some(of_example) => of_example.push(drawn),
            None => return Err(Error::file(path, format!("has a completion of row {}, of {examples}", drawn.example))),
        }
    }
    Ok(prior)
}
