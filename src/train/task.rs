//! What a run needs before it touches a device: files read, names looked up, sizes known.

use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::alarm::{Lever, OnAlarm};
use super::exam::{self, Exam};
use super::online::stand_in;
use super::plan::sample_requests;
use super::references::{
    FreshReference, TaskReference, check_anchor, check_compared, fresh_references, moving_start, references_of_samples,
    task_references,
};
use super::settings::{Alarm, Pause, References, Rollouts, Settings};
use super::step::check_needs;
use super::tau::Tau;
use crate::checkpoint::peft::{self, AdapterFile};
use crate::data::{Dataset, Example, Form, Packing, Sharing, Tokenizer, epoch_order, mismatched};
use crate::device::Philox;
use crate::error::{Error, Result};
use crate::model::{Checkpoint, Init, Lora};
use crate::objectives::kl::{Estimator, KlPenalty};
use crate::objectives::{Choice, Needs, Objective, Params, find, mrpo};
use crate::optim::{self, Warmup};
use crate::references::Reference;
use crate::rewards::Rewards;

/// Rows of a micro-batch where the user does not say: large enough to keep the cores busy, small enough for the
/// activations of a 135M model to fit beside a browser.
pub const MICRO_BATCH_TOKENS: usize = 2048;

/// Streams of the seed. Names are hashed, so a new one disturbs no other.
const SHUFFLE: &str = "shuffle";
const LIMIT: &str = "limit";

pub struct Task {
    pub checkpoint: Checkpoint,
    pub tokenizer: Tokenizer,
    pub objective: Box<dyn Objective>,
    pub method: optim::Method,
    /// What trains in place of the weights.
    pub lora: Option<Lora>,
    /// What the optimizer merges with.
    pub tau: Option<Tau>,
    /// Those that are scored before the first step.
    pub references: Vec<TaskReference>,
    /// What a reference that follows the policy starts as, where it is named.
    pub moving: Option<Checkpoint>,
    /// Evaluations compare with it instead of the first reference.
    pub anchor: Option<Reference>,
    /// Those that are asked about the policy's own completions, the anchor first.
    pub fresh: Vec<FreshReference>,
    /// Those that are asked about completions which are trained on.
    pub sampled_by: Vec<FreshReference>,
    /// What completions are rewarded by.
    pub rewards: Option<Rewards>,
    /// What held-out completions are really worth.
    pub gold: Option<Rewards>,
    /// Of each training example the most that completions of its prompt can come to; empty where none are sampled.
    pub stand_ins: Vec<Example>,
    /// What held-out rows are evaluated with, where the objective can say nothing about them: the likelihood of their completions.
    pub likelihood: Option<Box<dyn Objective>>,
    pub train: Dataset,
    pub eval: Option<Dataset>,
    /// What evaluations ask the policy besides.
    pub exams: Vec<Exam>,
    pub steps_per_epoch: u64,
    /// Steps on the same examples.
    pub iterations: u64,
    pub max_steps: u64,
}

/// The objective of a run, checked against what training can give it and which references are named.
pub fn objective(settings: &Settings) -> Result<Box<dyn Objective>> {
    let References { models, blend, .. } = &settings.references;
    let mut objective = mrpo::build(&settings.objective, blend, models.len().max(1))?;
    if let Some(penalty) = &settings.kl_penalty {
        penalty.check(models.len().max(1))?;
        objective = Box::new(KlPenalty::new(objective, penalty.clone()));
    }
    let (name, needs) = (objective.name(), objective.needs());
    check_needs(name, &needs, settings.rollouts.is_some())?;
    check_rollouts(settings, name, &needs)?;
    let (given, most) = (models.len(), *needs.refs.end());
    if settings.references.moving.is_some() && most == 0 {
        return Err(Error::option("--ref-sync-steps", format!("{name} reads no reference that could move; drop it")));
    }
    if given > most {
        let detail = format!("{given} given, but {name} uses {most}; leave the rest out");
        return Err(Error::option("--ref-model", detail));
    }
    Ok(objective)
}

/// The same at `times` its beta.
pub fn with_beta(settings: &Settings, times: f64) -> Result<(f64, Box<dyn Objective>)> {
    let mut raised = settings.clone();
    let beta = times * settings.objective.resolved()?.number("beta").expect("checked before the run");
    raised.objective.params.set("beta", beta);
    Ok((beta, objective(&raised)?))
}

/// What sampling does not go together with.
fn check_rollouts(settings: &Settings, name: &str, needs: &Needs) -> Result<()> {
    let Some(rollouts) = &settings.rollouts else { return Ok(()) };
    let References { rule, moving, models, .. } = &settings.references;
    let refuse = |flag: &str, detail: String| Err(Error::option(flag, detail));
    if moving.is_some() {
        return refuse(
            "--ref-sync-steps",
            "a reference that follows the policy is not asked about samples; drop it".into(),
        );
    }
    if rule.observes() {
        return refuse("--ref-weights", "weights that follow pairs of the data have none here; give fixed ones".into());
    }
    if let Some(penalty) = &settings.kl_penalty {
        let has_own =
            |term: &(String, f64)| find(&term.0).is_ok_and(|entry| entry.params.iter().any(|p| p.name == "beta"));
        if settings.objective.terms.iter().any(has_own) {
            return refuse("--kl-penalty", format!("{name} on samples has a KL of its own: give --beta"));
        }
        if penalty.estimator == Estimator::Exact {
            let detail =
                "exact reads what references said of completions before the run, and these are sampled; give k2 or k3";
            return refuse("--kl-estimator", detail.into());
        }
    }
    if (needs.prior || needs.prior_rewards > 0) && !models.is_empty() {
        let detail =
            format!("{name} lets its reference write before the first step, when the policy still is it; drop it");
        return refuse("--ref-model", detail);
    }
    if needs.prior && rollouts.samples != 1 {
        let detail = format!("{name} compares one completion of the policy with one of the reference; give 1");
        return refuse("--num-generations", detail);
    }
    // Values, or the mean of the batch, are what a lone completion is compared with.
    let others = !matches!(settings.objective.resolved()?.choice("baseline"), Some("batch" | "none"));
    let compared = !needs.prior && needs.prior_rewards == 0 && !needs.values && others;
    if rollouts.samples < 2 && compared {
        return refuse("--num-generations", "one completion has nothing to be compared with; give 2 or more".into());
    }
    let stop_at = match settings.stop_at_step {
        Some(Pause::Step(step)) => Some(step),
        _ => None,
    };
    let steps =
        [("--max-steps", settings.max_steps), ("--save-steps", settings.save_steps), ("--stop-at-step", stop_at)];
    match steps.into_iter().find(|(_, steps)| steps.is_some_and(|steps| !steps.is_multiple_of(rollouts.iterations))) {
        Some((flag, _)) => {
            let n = rollouts.iterations;
            refuse(
                flag,
                format!("ends between two steps on the same completions; give a multiple of --num-iterations {n}"),
            )
        }
        None => Ok(()),
    }
}

/// A run that goes back needs a checkpoint at each evaluation, and an optimizer that can go at another rate from there.
fn check_alarm(settings: &Settings, method: &optim::Method, iterations: u64) -> Result<()> {
    let Alarm { action, lever, .. } = settings.alarm;
    if action == OnAlarm::Warn {
        return Ok(());
    }
    if lever == Lever::Beta && settings.rollouts.is_some() {
        let detail = "completions are credited with the beta that was given; use learning-rate";
        return Err(Error::option("--rollback", detail));
    }
    if lever == Lever::Beta && settings.objective.resolved()?.number("beta").is_none() {
        return Err(Error::option("--rollback", "the objective has no beta that could be raised; use learning-rate"));
    }
    let (flag, detail) = if !settings.eval_steps.is_some_and(|steps| steps.is_multiple_of(iterations)) {
        (
            "--eval-steps",
            format!(
                "an alarm goes back to an evaluation, and those may lie between two steps on the same completions; give a multiple of --num-iterations {iterations}"
            ),
        )
    } else if action == OnAlarm::Rollback && method.merges() {
        let name = &settings.optimizer.name;
        ("--on-alarm", format!("{name} merges on a schedule, which a lower learning rate would leave; use stop"))
    } else if action == OnAlarm::Rollback && settings.references.rule.observes() {
        ("--on-alarm", "weights of references that follow the pairs of earlier steps cannot go back; use stop".into())
    } else {
        return Ok(());
    };
    Err(Error::option(flag, detail))
}

/// The language model of the settings under its adapters.
pub fn base(settings: &Settings) -> Result<Checkpoint> {
    under_adapters(settings, Checkpoint::open(&settings.model)?)
}

fn under_adapters(settings: &Settings, model: Checkpoint) -> Result<Checkpoint> {
    settings.adapters.iter().try_fold(model, |base, (dir, weight)| base.with_adapter(dir, *weight))
}

/// The same as it is before the first step.
pub fn start(settings: &Settings) -> Result<Checkpoint> {
    match settings.lora.as_ref().and_then(|lora| lora.start.as_ref()) {
        Some(adapter) => base(settings)?.with_adapter(adapter, 1.0),
        None => base(settings),
    }
}

/// An adapter trains on a model that is there, with a reference that stays where it is.
fn check_lora(settings: &Settings, objective: &dyn Objective) -> Result<()> {
    let merges = settings.optimizer.build()?.merges();
    let (flag, detail) = if merges && objective.needs().scores {
        let (name, objective) = (&settings.optimizer.name, objective.name());
        let why = format!("{objective} trains a head besides, of which no difference of adapters says anything");
        ("--optimizer", format!("{name} merges with such a difference, and {why}; leave --lora-rank out"))
    } else if settings.init != Init::Checkpoint {
        (
            "--init",
            "an adapter is of no use without the random weights that it belongs to; leave --lora-rank out".into(),
        )
    } else if merges && settings.lora.as_ref().is_some_and(|lora| lora.start.is_none()) {
        let name = &settings.optimizer.name;
        let why = "what fine-tuning added, and an adapter that starts anew was never fine-tuned";
        let how = "go on from an SFT adapter with --lora-start, or leave --lora-rank out";
        ("--optimizer", format!("{name} merges with {why}; {how}"))
    } else if settings.references.moving.is_some() {
        ("--ref-sync-steps", "the reference of an adapter is the model without it, which does not move; drop it".into())
    } else {
        return Ok(());
    };
    Err(Error::option(flag, detail))
}

/// What is trained: a language model, or one with a reward head where the objective is about scores.
pub fn policy_checkpoint(settings: &Settings, objective: &dyn Objective) -> Result<Checkpoint> {
    let scores = objective.needs().scores;
    let asked = [
        ("--samples", settings.samples.count),
        ("--kl-samples", settings.kl_samples),
        ("--eval-task", settings.eval_tasks.len()),
    ];
    for (flag, asked) in asked {
        if scores && asked > 0 {
            let detail = format!("{} trains a reward model, which writes nothing; leave it out", objective.name());
            return Err(Error::option(flag, detail));
        }
    }
    let open = || match scores {
        true => Checkpoint::with_reward_head(&settings.model, settings.seed),
        false => Checkpoint::open(&settings.model),
    };
    if let Some(lora) = &settings.lora {
        check_lora(settings, objective)?;
        let checkpoint = under_adapters(settings, open()?)?;
        return lora.check(&mut checkpoint.dry()).map(|()| checkpoint);
    }
    if !settings.adapters.is_empty() || peft::is_adapter(&settings.model) {
        let detail = "the weights below it would train, and what is saved would be without it; train an adapter on top with \
                      --lora-rank, or fold it into a model first (cuvee merge adapters)";
        return Err(Error::option("--adapter", detail));
    }
    open()
}

impl Task {
    /// Reads and checks everything that can fail cheaply, before an output folder is made.
    pub fn prepare(settings: &Settings) -> Result<Self> {
        let objective = objective(settings)?;
        let method = settings.optimizer.build()?;
        let checkpoint = policy_checkpoint(settings, objective.as_ref())?;
        let tau = Tau::open(settings, &method, &checkpoint)?;
        let tokenizer = Tokenizer::load(&settings.model)?;
        let load = |path| load_dataset(path, &tokenizer, settings, objective.as_ref(), &checkpoint);
        let mut train = load(&settings.dataset)?;
        train.check_assistant_only()?;
        let needs = objective.needs();
        keep(&mut train, settings)?;
        if !needs.pairs && !needs.labels || settings.rollouts.is_some() {
            // What an objective never reads is not trained on. Held-out pairs stay: accuracy needs both sides.
            train.examples.iter_mut().for_each(|example| example.sequences.truncate(1));
        }
        let eval = settings.eval_dataset.as_deref().map(load).transpose()?;
        let rollouts = settings.rollouts.as_ref();
        let rewards = rollouts.map(|rollouts| Rewards::open(&rollouts.rewards)).transpose()?;
        let gold = (!settings.gold.is_empty()).then(|| Rewards::open(&settings.gold)).transpose()?;
        check_alarm(settings, &method, rollouts.map_or(1, |rollouts| rollouts.iterations))?;
        let stand_ins = rollouts.map_or(Vec::new(), |rollouts| {
            let stand_in = |example: &Example| stand_in(example, rollouts, needs.answers, needs.pairs);
            train.examples.iter().map(stand_in).collect()
        });
        let of_pairs = |eval: &Dataset| rollouts.is_none() || !needs.pairs || eval.form == Form::Pairs;
        let silent = needs.rewards || !eval.as_ref().is_none_or(of_pairs);
        let likelihood = silent.then(|| Choice::one("sft", Params::default()).build()).transpose()?;
        let exam = |(name, path): &(String, PathBuf)| Exam::open(name, path, &tokenizer, &checkpoint);
        let exams: Vec<Exam> = settings.eval_tasks.iter().map(exam).collect::<Result<_>>()?;
        let known = exam::metrics(&exams, settings.kl_samples > 0, !settings.gold.is_empty());
        settings.stop_when.iter().try_for_each(|stop| stop.check(&known))?;
        let references = task_references(settings, objective.as_ref(), &tokenizer, &train, eval.as_ref())?;
        let anchor = super::references::anchor(settings, eval.is_some())?;
        if let Some(checkpoint) = anchor.as_ref().and_then(Reference::checkpoint) {
            check_anchor(checkpoint, &tokenizer, eval.as_ref())?;
        }
        let fresh = fresh_references(settings, &references, anchor.as_ref(), &tokenizer)?;
        let sampled_by = references_of_samples(settings, &references, &tokenizer)?;
        let iterations = rollouts.map_or(1, |rollouts| rollouts.iterations);
        let steps_per_epoch = iterations * train.examples.len().div_ceil(settings.batch_size) as u64;
        let by_epochs = (settings.num_train_epochs * steps_per_epoch as f64).ceil() as u64;
        let max_steps = settings.max_steps.unwrap_or(by_epochs);
        if needs.token_kl {
            check_compared(&references, &checkpoint)?;
        }
        let moving = moving_start(settings, &checkpoint)?;
        let task = Self {
            checkpoint,
            tokenizer,
            objective,
            method,
            lora: settings.lora.clone(),
            tau,
            references,
            moving,
            anchor,
            fresh,
            sampled_by,
            rewards,
            gold,
            stand_ins,
            likelihood,
            train,
            eval,
            exams,
            steps_per_epoch,
            iterations,
            max_steps,
        };
        let requests = sample_requests(settings, &task.prompts(settings));
        requests.iter().try_for_each(|request| request.check(&task.checkpoint.spec))?;
        settings.rollouts.iter().try_for_each(|rollouts| task.check_room(rollouts))?;
        Ok(task)
    }

    /// Refuses prompts whose completions the model has no positions for.
    fn check_room(&self, rollouts: &Rollouts) -> Result<()> {
        let Some(most) = self.checkpoint.spec.most_positions() else { return Ok(()) };
        let Some(longest) = self.train.examples.iter().max_by_key(|example| example.sequences[0].first) else {
            return Ok(());
        };
        let (prompt, new) = (longest.sequences[0].first, rollouts.max_new_tokens);
        if prompt + new <= most {
            return Ok(());
        }
        let detail = format!(
            "{new} tokens after the prompt of row {}, which has {prompt}, but the model has learned positions for {most}; \
             {} have room",
            longest.row + 1,
            most.saturating_sub(prompt)
        );
        Err(Error::option("--max-completion-length", detail))
    }

    /// References whose distributions the policy's are compared with, over the whole vocabulary.
    pub fn compared(&self) -> Vec<(&Checkpoint, Init)> {
        let references = self.references.iter().filter(|_| self.objective.needs().token_kl);
        references.filter_map(|r| Some((r.reference.checkpoint()?, r.reference.init()?))).collect()
    }

    /// The settings with what the model's kind decides: where its head reads a batch.
    pub fn refine(&self, settings: &Settings) -> Settings {
        let packing = Packing { read: self.checkpoint.reads(&self.tokenizer), ..settings.packing };
        Settings { packing, ..settings.clone() }
    }

    /// A hash of the adapter that training goes on from.
    fn lora_start(&self) -> Result<Option<[u8; 32]>> {
        let start = self.lora.as_ref().and_then(|lora| lora.start.as_ref());
        start.map(|dir| Ok(AdapterFile::open(dir)?.hash())).transpose()
    }

    /// What held-out rows are evaluated with.
    pub fn held_out_objective(&self) -> &dyn Objective {
        self.likelihood.as_ref().unwrap_or(&self.objective).as_ref()
    }

    pub fn datasets(&self) -> Vec<&Dataset> {
        std::iter::once(&self.train).chain(&self.eval).collect()
    }

    /// The order of the training examples in an epoch, counted from 0.
    pub fn order(&self, settings: &Settings, epoch: u64) -> Vec<usize> {
        let random = Philox::named(settings.seed, &format!("{SHUFFLE} {epoch}"));
        epoch_order(self.train.examples.len(), settings.shuffle, &mut |i| random.u64(i))
    }

    /// The epoch of step `step`, counted from 1, and which part of the epoch's order it takes.
    pub fn place_of_step(&self, settings: &Settings, step: u64) -> (u64, Range<usize>) {
        let (epoch, index) = ((step - 1) / self.steps_per_epoch, (step - 1) % self.steps_per_epoch / self.iterations);
        let first = index as usize * settings.batch_size;
        (epoch, first..(first + settings.batch_size).min(self.train.examples.len()))
    }

    /// Where a sequence that was put together must end: at `--max-length`, or where learned positions do.
    fn most_tokens(&self, max_length: Option<usize>) -> Option<usize> {
        let references = self.references.iter().filter_map(|r| r.reference.checkpoint());
        let models = references.chain([&self.checkpoint]).filter_map(|checkpoint| checkpoint.spec.most_positions());
        models.chain(max_length).min()
    }

    /// Held-out completions under each other's prompts, for objectives that read such; see [`Steps::mismatched`].
    pub fn mismatched_held_out(&self) -> Vec<Example> {
        match &self.eval {
            Some(eval) if self.objective.needs().mismatched => {
                mismatched(&eval.examples.iter().collect::<Vec<_>>(), None, self.most_tokens(eval.options.max_length))
            }
            _ => Vec::new(),
        }
    }

    /// Indices of the training examples whose completions some step of the run will see, in the order of the file.
    pub fn used_examples(&self, settings: &Settings) -> Vec<usize> {
        if settings.rollouts.is_some() {
            return Vec::new();
        }
        let (last_epoch, range) = self.place_of_step(settings, self.max_steps);
        if last_epoch > 0 {
            return (0..self.train.examples.len()).collect();
        }
        let mut used = self.order(settings, 0);
        used.truncate(range.end);
        used.sort_unstable();
        used
    }

    pub fn epoch(&self, step: u64) -> f64 {
        step as f64 / self.steps_per_epoch as f64
    }

    /// Prompts of the samples: those of the first evaluation rows.
    pub fn prompts(&self, settings: &Settings) -> Vec<&[u32]> {
        let examples = self.eval.as_ref().map_or(&[][..], |eval| &eval.examples).iter().take(settings.samples.count);
        examples.map(|example| &example.sequences[0]).map(|sequence| &sequence.ids[..sequence.first]).collect()
    }

    /// Every setting that decides the course of a run; a checkpoint of another course cannot be continued.
    pub fn course(&self, settings: &Settings) -> Result<Map<String, Value>> {
        let references = self.references.iter().map(|r| Ok(hex(r.reference.identity()?)));
        let mut course = json!({
            "model": hex(settings.init.identity(&self.checkpoint)?),
            "ref_model": match &self.moving {
                Some(start) => vec![hex(Init::Checkpoint.identity(start)?)],
                None => references.collect::<Result<Vec<_>>>()?,
            },
            "dataset": hex(self.train.fingerprint()),
            "eval_dataset": self.eval.as_ref().map(|eval| hex(eval.fingerprint())),
            "objective": self.objective.name(),
            "optimizer": settings.optimizer.name,
            "adam_beta1": settings.hyper.beta1,
            "adam_beta2": settings.hyper.beta2,
            "adam_epsilon": settings.hyper.eps,
            "weight_decay": settings.hyper.weight_decay,
            "max_grad_norm": settings.hyper.max_grad_norm,
            "learning_rate": settings.learning_rate,
            "lr_scheduler_type": format!("{:?}", settings.decay).to_lowercase(),
            "warmup_ratio": match settings.warmup {
                Warmup::Share(share) => json!(share),
                Warmup::Steps(steps) => json!(format!("{steps} steps")),
            },
            "max_steps": self.max_steps,
            "batch_size": settings.batch_size,
            "micro_batch_tokens": settings.packing.budget,
            "no_prefix_sharing": settings.packing.sharing == Sharing::Off,
            "no_shuffle": !settings.shuffle,
            "seed": settings.seed,
            "dtype": settings.dtype.config_name(),
        });
        let References { blend, rule, moving, .. } = &settings.references;
        course["lora_rank"] = json!(settings.lora.as_ref().map(|lora| lora.rank));
        course["lora_alpha"] = json!(settings.lora.as_ref().map(|lora| lora.alpha));
        course["lora_start"] = json!(self.lora_start()?.map(hex));
        course["lora_rslora"] = json!(settings.lora.as_ref().map(|lora| lora.rslora));
        course["target_modules"] = json!(settings.lora.as_ref().map(|lora| &lora.targets));
        course["ref_mean"] = json!(format!("{:?} {:?}", blend.mean, blend.official_k2_swap));
        course["ref_weights"] = json!(format!("{:?} {rule:?}", blend.weights));
        course["ref_clip"] = json!(blend.clip.map(|clip| format!("{clip:?}")));
        course["ref_level"] = json!(format!("{:?}", blend.level));
        course["ref_sync_steps"] = json!(moving.map(|moving| moving.every));
        course["ref_mixup"] = json!(moving.map(|moving| moving.mixup));
        course["kl_penalty"] = json!(settings.kl_penalty.as_ref().map(|penalty| penalty.weight));
        course["kl_estimator"] = json!(settings.kl_penalty.as_ref().map(|penalty| format!("{:?}", penalty.estimator)));
        course["objective_weights"] = settings.objective.terms.iter().map(|term| term.1).collect();
        course["stochastic_rounding"] = json!(settings.hyper.stochastic_rounding);
        if let Some(tau) = &self.tau {
            let [base, tuned] = tau.identities(settings)?;
            (course["base_model"], course["tau_model"]) = (json!(hex(base)), json!(hex(tuned)));
        }
        self.course_of_samples(settings, &mut course)?;
        if settings.alarm.action != OnAlarm::Warn {
            let Alarm { kl_budget, action, lever } = settings.alarm;
            if lever == Lever::Beta {
                course["rollback"] = json!("beta");
            }
            course["on_alarm"] = json!(format!("{action:?}").to_lowercase());
            course["kl_budget"] = json!(kl_budget);
            course["gold_reward"] = json!(self.gold.as_ref().map(Rewards::identity).transpose()?.map(hex));
        }
        let optimizer = settings.optimizer.resolved()?;
        for (name, value) in settings.objective.resolved()?.iter().chain(optimizer.iter()) {
            course[name] = json!(value);
        }
        match course {
            Value::Object(course) => Ok(course),
            _ => unreachable!("made as an object above"),
        }
    }

    /// The same of what the policy writes.
    fn course_of_samples(&self, settings: &Settings, course: &mut Value) -> Result<()> {
        if let (Some(rollouts), Some(rewards)) = (&settings.rollouts, &self.rewards) {
            course["reward"] = json!(hex(rewards.identity()?));
            course["num_generations"] = json!(rollouts.samples);
            course["num_iterations"] = json!(rollouts.iterations);
            course["max_completion_length"] = json!(rollouts.max_new_tokens);
            course["rollout_temperature"] = json!(rollouts.temperature);
            course["rollout_top_p"] = json!(rollouts.top_p);
            // Runs from before there was a choice took 1.
            if [rollouts.temperature, rollouts.logps_temperature.get()] != [1.0; 2] {
                course["logps_temperature"] = json!(rollouts.logps_temperature.get());
            }
            if rollouts.mask_truncated {
                course["mask_truncated_completions"] = json!(true);
            }
        }
        Ok(())
    }
}

/// Enough of a hash to tell things apart.
fn hex(bytes: [u8; 32]) -> String {
    blake3::Hash::from_bytes(bytes).to_hex()[..16].to_string()
}

/// The examples of every step. Remembers one epoch's order, so that steps in a row cost no more than their own.
pub struct Steps<'a> {
    task: &'a Task,
    settings: &'a Settings,
    epoch: Option<u64>,
    order: Vec<usize>,
}

impl<'a> Steps<'a> {
    pub fn new(task: &'a Task, settings: &'a Settings) -> Self {
        Self { task, settings, epoch: None, order: Vec::new() }
    }

    /// Indices of the training examples of a step, counted from 1, in the order of its epoch.
    pub fn examples(&mut self, step: u64) -> &[usize] {
        let (epoch, range) = self.task.place_of_step(self.settings, step);
        if self.epoch != Some(epoch) {
            (self.epoch, self.order) = (Some(epoch), self.task.order(self.settings, epoch));
        }
        &self.order[range]
    }

    /// The completions of a step under each other's prompts, for objectives that read such: completion i - 1 under prompt i,
    /// in the order of the step's sequences, cut to `--max-length`. A step of one sequence takes the last completion of the
    /// step before; nothing, if it is the first.
    pub fn mismatched(&mut self, step: u64) -> Vec<Example> {
        let examples = &self.task.train.examples;
        let last = (step > 1).then(|| self.examples(step - 1).last().copied()).flatten();
        let previous = last.and_then(|last| examples[last].sequences.last());
        let of_step: Vec<&Example> = self.examples(step).iter().map(|i| &examples[*i]).collect();
        mismatched(&of_step, previous, self.task.most_tokens(self.settings.encode.max_length))
    }
}

fn load_dataset(
    path: &Path,
    tokenizer: &Tokenizer,
    settings: &Settings,
    objective: &dyn Objective,
    checkpoint: &Checkpoint,
) -> Result<Dataset> {
    let dataset = Dataset::load(path, tokenizer, &settings.encode)?.not_empty()?;
    let (needs, form) = (objective.needs(), dataset.form);
    let wanted = match form {
        Form::Pairs => None,
        _ if needs.pairs && settings.rollouts.is_none() => Some("trains on pairs (prompt, chosen, rejected)"),
        Form::Unpaired if !needs.labels => Some("would learn what is labelled undesirable, too"),
        Form::Prompts if needs.answers => Some("compares with the data's own completions (prompt, completion)"),
        Form::Completions | Form::Text if needs.labels => Some("trains on labels (prompt, completion, label) or pairs"),
        _ => None,
    };
    if let Some(wanted) = wanted {
        return Err(Error::file(path, format!("{} {wanted}; these rows are {form}", objective.name())));
    }
    check_vocabulary(checkpoint, [&dataset])?;
    check_positions(checkpoint, [&dataset])?;
    Ok(dataset)
}

/// Of the training rows those that are asked for.
fn keep(train: &mut Dataset, settings: &Settings) -> Result<()> {
    keep_part(train, settings.skip, settings.take)?;
    settings.limit.map_or(Ok(()), |limit| keep_some(train, limit, settings.seed))
}

/// Leaves out the first `skip` rows of the file, and those after the `take` that follow. Rows that were dropped count.
fn keep_part(train: &mut Dataset, skip: usize, take: Option<usize>) -> Result<()> {
    let (rows, path) = (train.rows, train.path.display());
    let end = skip + take.unwrap_or(0);
    if end > rows {
        let flag = if skip > rows { "--skip" } else { "--take" };
        return Err(Error::option(flag, format!("reaches to row {end}, {path} has {rows}; give less, or drop it")));
    }
    let wanted = skip..take.map_or(rows, |_| end);
    train.examples.retain(|example| wanted.contains(&example.row));
    if train.examples.is_empty() {
        let flag = if take.is_some() { "--take" } else { "--skip" };
        return Err(Error::option(flag, format!("leaves nothing of the {rows} rows of {path} to train on")));
    }
    Ok(())
}

/// Keeps `limit` rows, chosen at random, in the order of the file. Of one seed, fewer rows are among more rows.
fn keep_some(train: &mut Dataset, limit: usize, seed: u64) -> Result<()> {
    let rows = train.examples.len();
    if limit > rows {
        let detail = format!(
            "{limit} rows asked for, {rows} are there to choose from in {}; give fewer, or drop it",
            train.path.display()
        );
        return Err(Error::option("--limit", detail));
    }
    let random = Philox::named(seed, LIMIT);
    let mut kept = epoch_order(rows, true, &mut |i| random.u64(i));
    kept.truncate(limit);
    kept.sort_unstable();
    let mut kept = kept.into_iter().peekable();
    let mut at = 0..;
    train.examples.retain(|_| kept.next_if_eq(&at.next().expect("endless")).is_some());
    Ok(())
}

/// Token ids must have a row in the embedding.
pub fn check_vocabulary<'a>(checkpoint: &Checkpoint, datasets: impl IntoIterator<Item = &'a Dataset>) -> Result<()> {
    for dataset in datasets {
        for example in &dataset.examples {
            let largest = example.sequences.iter().flat_map(|s| &s.ids).max().copied().unwrap_or(0);
            if largest as usize >= checkpoint.spec.vocab {
                let detail = format!(
                    "token {largest} of row {} of {} lies past its vocabulary of {}; do tokenizer.json and config.json belong together?",
                    example.row,
                    dataset.path.display(),
                    checkpoint.spec.vocab
                );
                return Err(Error::file(&checkpoint.dir, detail));
            }
        }
    }
    Ok(())
}

/// Learned positions end somewhere, and no sequence may be longer.
pub fn check_positions<'a>(checkpoint: &Checkpoint, datasets: impl IntoIterator<Item = &'a Dataset>) -> Result<()> {
    let Some(most) = checkpoint.spec.most_positions() else { return Ok(()) };
    for dataset in datasets {
        for example in &dataset.examples {
            let longest = example.sequences.iter().map(|s| s.ids.len()).max().unwrap_or(0);
            if longest > most {
                let detail = format!(
                    "row {} of {} has {longest} tokens, {} has learned positions for {most}; give --max-length {most} or less",
                    example.row,
                    dataset.path.display(),
                    checkpoint.dir.display()
                );
                return Err(Error::option("--max-length", detail));
            }
        }
    }
    Ok(())
}
