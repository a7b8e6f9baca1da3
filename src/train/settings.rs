use std::path::PathBuf;

use super::alarm::{Lever, OnAlarm};
use super::exam::StopWhen;
use crate::checkpoint::SaveDtype;
use crate::data::{EncodeOptions, Packing, Temperature};
use crate::device::{DType, Storage};
use crate::model::{Init, Lora};
use crate::objectives::Choice;
use crate::objectives::kl::KlPenaltyOptions;
use crate::objectives::mrpo::Blend;
use crate::objectives::ref_weights::Rule;
use crate::optim::{self, Decay, Hyper, Schedule, Warmup};
use crate::rewards::RewardSpec;

/// A run, completely: what the command line and the recipe come down to.
#[derive(Clone, Debug)]
pub struct Settings {
    pub model: PathBuf,
    pub init: Init,
    /// Adapters that are applied beside its weights, and how much of each.
    pub adapters: Vec<(PathBuf, f64)>,
    /// What trains in place of the weights.
    pub lora: Option<Lora>,
    pub references: References,
    /// What evaluations compare with instead of the first reference.
    pub anchor: Option<PathBuf>,
    /// Completions that an evaluation asks of the policy to see how far it has gone; 0 = none.
    pub kl_samples: usize,
    /// Tasks that evaluations give to the policy, by name.
    pub eval_tasks: Vec<(String, PathBuf)>,
    /// Any of these ends the run.
    pub stop_when: Vec<StopWhen>,
    /// What those completions are really worth: measured, never trained on.
    pub gold: Vec<RewardSpec>,
    pub alarm: Alarm,
    /// Rows of the file that are left out at its start, and how many after those are looked at.
    pub skip: usize,
    pub take: Option<usize>,
    /// Train on this many of these rows, chosen at random.
    pub limit: Option<usize>,
    pub dataset: PathBuf,
    pub eval_dataset: Option<PathBuf>,
    pub output_dir: PathBuf,
    pub cache_dir: PathBuf,
    pub objective: Choice,
    pub kl_penalty: Option<KlPenaltyOptions>,
    pub optimizer: optim::Choice,
    /// What an optimizer that merges takes for the model before fine-tuning.
    pub base_model: Option<PathBuf>,
    /// And for the fine-tuned model, if not the policy as it starts.
    pub tau_model: Option<PathBuf>,
    pub hyper: Hyper,
    pub learning_rate: f64,
    pub decay: Decay,
    pub warmup: Warmup,
    pub num_train_epochs: f64,
    /// Overrides the epochs.
    pub max_steps: Option<u64>,
    pub stop_at_step: Option<Pause>,
    pub resume: Option<Resume>,
    /// Examples of one optimizer step.
    pub batch_size: usize,
    /// The same before accumulation.
    pub per_device_batch_size: usize,
    pub shuffle: bool,
    pub seed: u64,
    pub encode: EncodeOptions,
    pub packing: Packing,
    /// Keep block inputs only and run each block's forward again in its backward.
    pub recompute: bool,
    /// CPU threads.
    pub threads: usize,
    /// Computes on a GPU, in memory of its own; `dtype` is then what is stored there, too.
    pub gpu: bool,
    /// The first and the last step that a profiler records.
    pub profile_steps: Option<(u64, u64)>,
    pub eval_steps: Option<u64>,
    pub save_steps: Option<u64>,
    /// So many of the newest checkpoints stay.
    pub save_total_limit: Option<usize>,
    /// Write the trained model; without it a run leaves its logs.
    pub keep_model: bool,
    /// What the checkpoints hold.
    pub dtype: SaveDtype,
    pub samples: Samples,
    /// Train on completions that the policy writes, not on those of the data.
    pub rollouts: Option<Rollouts>,
    /// The same, as a recipe to be kept with the results.
    pub recipe: String,
}

impl Settings {
    /// The learning rate over a run of this length.
    pub fn schedule(&self, max_steps: u64) -> Schedule {
        Schedule::new(self.learning_rate, self.decay, self.warmup, max_steps)
    }

    /// How steps run their examples: with log-probabilities of what the policy wrote at their own temperature.
    pub fn training(&self) -> Packing {
        let temperature = self.rollouts.as_ref().map_or(Temperature::ONE, |rollouts| rollouts.logps_temperature);
        Packing { temperature, ..self.packing }
    }

    /// What the device stores weights and activations in.
    pub fn storage(&self) -> DType {
        self.keeps().dtype
    }

    /// The same, and whether frozen matrices stay as their files have them.
    pub fn keeps(&self) -> Storage {
        match (self.gpu, self.dtype) {
            (true, SaveDtype::Bf16) => DType::Bf16.into(),
            (true, _) => DType::F32.into(),
            (false, _) => Storage::CPU,
        }
    }
}

/// Where a run stops, to be resumed.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Pause {
    Step(u64),
    /// Behind this share of its steps, with the evaluation that comes next.
    Share(f64),
}

impl Pause {
    /// A number of steps, or below 1 a share of them.
    pub fn of(number: f64) -> Self {
        if number < 1.0 { Self::Share(number) } else { Self::Step(number as u64) }
    }

    /// The step, in a run of `max_steps` that takes `iterations` of them on the same completions.
    pub fn step(self, max_steps: u64, eval_steps: Option<u64>, iterations: u64) -> u64 {
        let least = match self {
            Self::Step(step) => return step,
            Self::Share(share) => (share * max_steps as f64).ceil() as u64,
        };
        let every = eval_steps.unwrap_or(1);
        let both = (1..=iterations).map(|k| k * every).find(|step| step.is_multiple_of(iterations));
        least.next_multiple_of(both.expect("the last of them is"))
    }
}

/// What the policy is compared with.
#[derive(Clone, Debug, Default)]
pub struct References {
    /// Folders of models, or cache files; the first is the anchor. Empty means the policy at step 0.
    pub models: Vec<PathBuf>,
    /// Of several, how they become one.
    pub blend: Blend,
    /// Of several, who decides how much each counts.
    pub rule: Rule,
    pub moving: Option<Moving>,
}

/// When a run has gone too far, and what it does then.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Alarm {
    /// Largest KL from the first reference, nats.
    pub kl_budget: Option<f64>,
    pub action: OnAlarm,
    /// Of a run that goes back.
    pub lever: Lever,
}

/// A reference that follows the policy.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Moving {
    /// Steps between two moves.
    pub every: u64,
    /// Share of the policy in what the reference becomes, (0, 1].
    pub mixup: f64,
}

/// Where to continue.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Resume {
    /// At the newest checkpoint of the output folder, or at the start if it has none.
    Newest,
    At(PathBuf),
}

/// Completions that the policy writes to be trained on.
#[derive(Clone, PartialEq, Debug)]
pub struct Rollouts {
    /// At least one.
    pub rewards: Vec<RewardSpec>,
    /// Completions of each prompt.
    pub samples: usize,
    /// Optimizer steps on the same completions.
    pub iterations: u64,
    /// Tokens of a completion at most.
    pub max_new_tokens: usize,
    pub temperature: f64,
    /// At which training takes their log-probabilities.
    pub logps_temperature: Temperature,
    pub top_p: f64,
    /// Completions that do not end by themselves teach nothing.
    pub mask_truncated: bool,
}

/// Generations shown before and after training.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Samples {
    /// 0 = none.
    pub count: usize,
    pub max_new_tokens: usize,
    pub temperature: f64,
    pub top_p: f64,
}

#[cfg(test)]
mod tests {
    use super::Pause;

    #[test]
    fn a_share_of_a_run_ends_with_an_evaluation_and_between_two_batches() {
        assert_eq!(Pause::Step(7).step(100, Some(5), 4), 7);
        for (share, eval_steps, iterations, expected) in [
            (0.25, None, 1, 25),
            (0.25, Some(11), 1, 33),
            (0.22, Some(11), 1, 22),
            (0.25, Some(10), 4, 40),
            (0.25, None, 4, 28),
        ] {
            assert_eq!(
                Pause::Share(share).step(100, eval_steps, iterations),
                expected,
                "{share} {eval_steps:?} {iterations}"
            );
        }
    }
}
