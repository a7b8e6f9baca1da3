//! `cuvee train`

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use super::args::{self, RunArgs, StepRange, TrainArgs};
use super::device::{self, Job};
use crate::checkpoint::SaveDtype;
use crate::data::EncodeOptions;
use crate::error::{At, Result};
use crate::model::Init;
use crate::ops::Backend;
use crate::optim::{Decay, Hyper, Warmup};
use crate::train::{Outcome, Pause, Resume, Rollouts, Samples, Settings};

pub fn run(args: &TrainArgs) -> Result<()> {
    let run = &args.run;
    match device::run(&run.engine, run.dtype, run.cache_dir.as_deref(), args)? {
        Outcome::Finished(report) => super::print(&report.text()),
        Outcome::Stopped(checkpoint) => {
            let how = "--resume-from-checkpoint auto continues";
            super::print(&format!("stopped as asked; checkpoint {}; {how}\n", checkpoint.display()))
        }
        Outcome::AlreadyFinished => {
            let output = args.output_dir.display();
            super::print(&format!(
                "{output}: this run is finished, with the settings in its recipe.toml; without --resume-from-checkpoint a new one starts\n"
            ))
        }
    }
}

impl Job for &TrainArgs {
    type Output = Outcome;

    fn run<B: Backend>(self, device: &B) -> Result<Outcome> {
        let stop = stop_on_signal()?;
        crate::train::run(device, &settings(self, B::APART)?, &|| stop.load(Ordering::Relaxed))
    }
}

/// The first Ctrl-C asks for a checkpoint, the second ends the program at once.
pub(super) fn stop_on_signal() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // In this order: the flag that the first handler reads is set by the second.
        flag::register_conditional_shutdown(signal, 130, stop.clone()).at("signal handler")?;
        flag::register(signal, stop.clone()).at("signal handler")?;
    }
    Ok(stop)
}

fn settings(args: &TrainArgs, gpu: bool) -> Result<Settings> {
    let mut settings = from_run(&args.run, gpu)?;
    settings.dataset = args.dataset.clone();
    settings.output_dir = match args.output_dir.file_name() {
        Some(_) => args.output_dir.clone(),
        // `.` has no name to put a number behind.
        None => args.output_dir.canonicalize().at(&args.output_dir)?,
    };
    // A run that stops early is resumed with the same recipe, to go on.
    let mut resumable = args.clone();
    resumable.run.schedule.stop_at_step = None;
    resumable.run.schedule.resume_from_checkpoint = None;
    resumable.run.profile_steps = None;
    settings.recipe = resumable.to_toml();
    Ok(settings)
}

/// Tokens of a sample that is only looked at.
const LONGEST_SAMPLE: usize = 48;

/// What `train` and `plan` share.
pub fn from_run(run: &RunArgs, gpu: bool) -> Result<Settings> {
    let rollouts = run.rollouts.rollouts();
    Ok(Settings {
        model: run.model.clone(),
        init: match run.init {
            args::Init::Checkpoint => Init::Checkpoint,
            args::Init::Random => Init::Random { seed: run.schedule.seed },
        },
        adapters: run.adapters.adapter.iter().map(|adapter| (adapter.dir.clone(), adapter.weight)).collect(),
        lora: run.lora.lora()?,
        references: run.refs.references(run.schedule.seed),
        kl_penalty: run.refs.kl_penalty(),
        anchor: run.save.eval_anchor.clone(),
        kl_samples: run.save.kl_samples,
        skip: run.data.skip,
        take: run.data.take,
        eval_tasks: super::tasks::named(&run.save.eval_task)?,
        stop_when: run.save.stop_when.clone(),
        gold: run.alarm.gold_reward.clone(),
        alarm: run.alarm.alarm(),
        limit: run.data.limit,
        keep_model: true,
        dataset: Default::default(),
        eval_dataset: run.eval_dataset.clone(),
        output_dir: Default::default(),
        cache_dir: run.cache_dir()?,
        objective: run.loss.choice()?,
        optimizer: run.optim.choice.choice(),
        base_model: run.optim.base_model.clone(),
        tau_model: run.optim.tau_model.clone(),
        hyper: Hyper {
            beta1: run.optim.adam_beta1,
            beta2: run.optim.adam_beta2,
            eps: run.optim.adam_epsilon,
            weight_decay: run.optim.weight_decay,
            max_grad_norm: run.optim.max_grad_norm,
            stochastic_rounding: run.optim.stochastic_rounding,
            seed: run.schedule.seed,
        },
        learning_rate: run.learning_rate(),
        decay: decay(run.optim.lr_scheduler_type),
        warmup: warmup(run),
        num_train_epochs: run.schedule.num_train_epochs,
        max_steps: run.schedule.max_steps,
        stop_at_step: run.schedule.stop_at_step.map(Pause::of),
        resume: run.schedule.resume_from_checkpoint.clone().map(|resume| match resume {
            args::Resume::Auto => Resume::Newest,
            args::Resume::Dir(dir) => Resume::At(dir),
        }),
        batch_size: run.data.per_device_train_batch_size * run.data.gradient_accumulation_steps,
        per_device_batch_size: run.data.per_device_train_batch_size,
        shuffle: !run.data.no_shuffle,
        seed: run.schedule.seed,
        encode: encode(run),
        packing: super::packing(&run.batching),
        recompute: run.recompute,
        threads: run.engine.threads.unwrap_or_else(|| crate::machine::processor().allowed),
        gpu,
        profile_steps: run.profile_steps.map(|StepRange(first, last)| (first, last)),
        eval_steps: run.save.eval_steps,
        save_steps: run.save.save_steps,
        save_total_limit: run.save.save_total_limit,
        dtype: match run.dtype {
            args::Dtype::F32 => SaveDtype::F32,
            args::Dtype::Bf16 => SaveDtype::Bf16,
        },
        samples: samples(run, rollouts.as_ref()),
        rollouts,
        recipe: String::new(),
    })
}

fn samples(run: &RunArgs, rollouts: Option<&Rollouts>) -> Samples {
    let args::SamplingArgs { samples: count, max_new_tokens, temperature, top_p } = run.sampling;
    let longest = rollouts.map_or(LONGEST_SAMPLE, |rollouts| rollouts.max_new_tokens);
    Samples { count, max_new_tokens: max_new_tokens.unwrap_or(longest), temperature, top_p }
}

fn warmup(run: &RunArgs) -> Warmup {
    run.optim.warmup_steps.map_or(Warmup::Share(run.optim.warmup_ratio), |steps| Warmup::Steps(steps as u64))
}

/// Rows may be prompts alone where the policy writes what follows.
fn encode(run: &RunArgs) -> EncodeOptions {
    let encode = super::encode(Some(run.data.max_length), run.data.on_overflow);
    let assistant_only = run.data.assistant_only_loss;
    EncodeOptions { prompts: run.rollouts.rollouts().is_some(), assistant_only, ..encode }
}

fn decay(kind: args::LrSchedulerType) -> Decay {
    match kind {
        args::LrSchedulerType::Constant => Decay::Constant,
        args::LrSchedulerType::Linear => Decay::Linear,
        args::LrSchedulerType::Cosine => Decay::Cosine,
    }
}
