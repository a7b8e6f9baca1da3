//! A training run from its settings to a Hugging Face folder.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::{Map, Value, json};

use super::alarm::{self, Lever, OnAlarm};
use super::drift::Drift;
use super::evaluate::{Evaluation, Measured, evaluate};
use super::gold::Gold;
use super::lineage::lineage;
use super::metrics::{EVALUATIONS, Line, METRICS, TrainerState, read_history};
use super::online::{self, Online, ROLLOUTS};
use super::panel::Panel;
use super::plan::{Plan, Workload, sample_requests, warning};
use super::policy::{Policy, trained};
use super::report::Report;
use super::resume::{RunState, load_state, read_state, save_model, save_state};
use super::settings::{Resume, Settings};
use super::step::{self, Pass, Purpose, step};
use super::task::{Steps, Task, with_beta};
use crate::checkpoint::run_dir::{
    Claim, LineLog, checkpoint_path, checkpoints, claim, finish, is_finished, is_run, keep_newest, latest_checkpoint,
    lock, remove_stale, set_aside_after,
};
use crate::checkpoint::{write_dir, write_file};
use crate::data::Form;
use crate::error::{At, Error, Result};
use crate::lineage::Lineage;
use crate::machine;
use crate::model::{Init, Param, VALUE_HEAD};
use crate::objectives::ref_weights::RefWeights;
use crate::objectives::{Metric, Objective};
use crate::ops::Backend;
use crate::optim::Schedule;
use crate::progress::{Progress, say};
use crate::references::Residency;
use crate::rollout::Engine;
use crate::tasks::{self, text_of};

/// Text generated before and after training, one JSON line each.
pub const SAMPLES: &str = "samples.jsonl";
const EVALUATING: &str = "evaluating";

/// Every alarm, and the evaluations that a run which went back has left.
pub const ALARMS: &str = "alarms.jsonl";

/// The share of tau_ref over a run below which merging is said to do nothing.
const NEXT_TO_NOTHING: f64 = 1e-3;

/// How a run ended, short of an error.
pub enum Outcome {
    Finished(Report),
    /// `--stop-at-step`: the checkpoint lies there.
    Stopped(PathBuf),
    /// The output folder already holds this run, finished.
    AlreadyFinished,
}

/// Trains. `stop` is asked between steps; true writes a checkpoint and returns [`Error::Interrupted`].
pub fn run<B: Backend>(device: &B, settings: &Settings, stop: &dyn Fn() -> bool) -> Result<Outcome> {
    assert_eq!((B::APART, device.storage()), (settings.gpu, settings.storage()), "settings of another device");
    let task = Task::prepare(settings)?;
    let settings = &task.refine(settings);
    machine::release_freed();
    let workload = Workload::new(&task, settings);
    let (blueprint, mut plan) = (workload.blueprint(settings), workload.plan(settings)?);
    tell_of_data(settings, &task);
    let course = task.course(settings)?;
    if !task.references.is_empty() {
        let cannot = |e| Error::option("--cache-dir", format!("{}: {e}", settings.cache_dir.display()));
        std::fs::create_dir_all(&settings.cache_dir).map_err(cannot)?;
    }
    // What the program has by now is part of the plan.
    let of_host = machine::memory().map(|memory| memory.available + machine::resident().unwrap_or(0));
    let available = device.available_bytes()?.or(of_host);
    if let Some(available) = available {
        warning(&workload, settings, &plan, available)?.iter().for_each(say);
    }
    let residency = plan.choose_residency(available);
    check_profile::<B>(settings, task.max_steps)?;
    let Some(start) = open_output(settings, &course, task.objective.as_ref())? else {
        return Ok(Outcome::AlreadyFinished);
    };
    let _lock = &start.lock;
    let panel = Panel::score(device, settings, &task, stop)?;
    let ref_weights = panel.weights(settings, &task, start.state.step + 1)?;
    drop(workload);
    let mut policy = blueprint.build(device)?;
    for (k, (checkpoint, init)) in task.compared().into_iter().enumerate() {
        policy.heads.as_mut().expect("built for them").fill(device, k, checkpoint, init)?;
    }
    first_weights(device, settings, &task, &mut policy, start.from.as_deref())
        .map_err(|e| damaged(e, &settings.output_dir, start.from.as_deref()))?;
    start_optimizer(device, &task, &mut policy, start.state.step)?;
    let drift = (settings.kl_samples > 0).then(|| Drift::new(device, &task, settings, residency)).transpose()?;
    let gold = task.gold.as_ref().map(|gold| Gold::new(device, gold, settings.packing));
    let [metrics, evaluations, samples] = open_logs(&settings.output_dir, start.from.as_deref())?;
    let online = open_online(device, settings, &task, (&mut policy, start.state.step, residency), stop)?;
    let lineage = lineage(settings, &task, course)?;
    let newest = checkpoint_path(&settings.output_dir, start.state.step);
    // A run that was to end here was perhaps killed before it did.
    let last = super::evaluations(&settings.output_dir)?.pop().unwrap_or_default();
    let evaluated =
        last.get("step").and_then(Value::as_u64).filter(|step| *step == start.state.step && start.from.is_some());
    let mut session = Session {
        device,
        raised: raised(settings, &start.state)?,
        settings,
        schedule: settings.schedule(task.max_steps),
        plan,
        policy,
        panel,
        ref_weights,
        saved: start.from.as_deref().filter(|dir| **dir == newest).map(|_| start.state.step),
        state: start.state,
        steps: Steps::new(&task, settings),
        drift,
        gold,
        seen: None,
        online,
        batch: None,
        evaluated,
        stopped: evaluated.and_then(|_| settings.stop_when.iter().find_map(|stop| stop.met(&last))),
        metrics,
        evaluations,
        samples,
        lineage,
        task: &task,
    };
    session.train(stop)
}

/// Fills the policy and what follows it: as they start, or from a checkpoint.
fn first_weights<B: Backend>(
    device: &B,
    settings: &Settings,
    task: &Task,
    policy: &mut Policy<B>,
    from: Option<&Path>,
) -> Result<()> {
    if from.is_none() || task.lora.is_some() {
        settings.init.fill(device, &task.checkpoint, &mut policy.model)?;
    }
    if let Some(dir) = from {
        return load_state(device, policy, dir, settings.dtype);
    }
    let start = task.lora.as_ref().and_then(|lora| lora.start.as_deref());
    policy.model.init_adapter(device, start, settings.seed)?;
    match (&mut policy.moving, &task.moving) {
        (None, _) => Ok(()),
        (Some(moving), Some(start)) => Init::Checkpoint.fill(device, start, &mut moving.model),
        (Some(moving), None) => settings.init.fill(device, &task.checkpoint, &mut moving.model),
    }
}

/// Gives the optimizer what does not come from a checkpoint, and says what a merge will amount to.
fn start_optimizer<B: Backend>(device: &B, task: &Task, policy: &mut Policy<B>, step: u64) -> Result<()> {
    let Policy { model, optimizer, value, .. } = policy;
    optimizer.resume(step);
    let params = trained(model, value);
    if step == 0 {
        optimizer.start(device, &params)?;
    }
    let Some(tau) = &task.tau else { return Ok(()) };
    let size = tau.read(&task.checkpoint, |read| {
        // No model had a value head that fine-tuning could have changed.
        let read = &mut |param: &Param<B>, out: &mut [f32]| {
            if param.name == VALUE_HEAD {
                out.fill(0.0);
                return Ok(());
            }
            read(param, out)
        };
        optimizer.set_tau_ref(device, &params, read)
    })?;
    let added = optimizer.added();
    say(format_args!(
        "tau_ref: {} minus {}, {:.2} % of the first's norm; merge weights of the run add up to {added:.1e} of it",
        tau.tuned.display(),
        tau.base.display(),
        100.0 * size
    ));
    if added < NEXT_TO_NOTHING {
        let how = "a larger --merge-weight would merge more";
        say(format_args!("warning: {added:.1e} of tau_ref over a whole run is next to nothing; {how}"));
    }
    Ok(())
}

/// Steps that a profiler is to record must be steps of the run, and on a GPU.
fn check_profile<B: Backend>(settings: &Settings, max_steps: u64) -> Result<()> {
    let detail = match settings.profile_steps {
        Some((_, last)) if last > max_steps => format!("{last} is after the last step, {max_steps}"),
        Some(_) if !B::APART => "shows a GPU's work to a profiler, and this run computes on the CPU".to_string(),
        _ => return Ok(()),
    };
    Err(Error::option("--profile-steps", detail))
}

/// Where a run begins.
struct Start {
    state: RunState,
    /// The checkpoint to load, if any.
    from: Option<PathBuf>,
    /// Keeps other runs out of the output folder.
    lock: File,
}

/// Claims the output folder or finds the checkpoint to continue from; `None` when there is nothing left to do.
fn open_output(settings: &Settings, course: &Map<String, Value>, objective: &dyn Objective) -> Result<Option<Start>> {
    let output = &settings.output_dir;
    let continues = settings.resume.is_some() && is_run(output);
    if continues && is_finished(output) {
        // What is asked for now must be what it was.
        latest_checkpoint(output)?.map(|(_, dir)| read_state(&dir, course)).transpose()?;
        return Ok(None);
    }
    let held = continues.then(|| lock(output)).transpose()?;
    if continues {
        remove_stale(output)?;
    }
    let from = match &settings.resume {
        Some(Resume::At(dir)) => Some(dir.clone()),
        Some(Resume::Newest) if continues => latest_checkpoint(output)?.map(|(_, dir)| dir),
        _ => None,
    };
    let state = match &from {
        Some(dir) => read_state(dir, course).map_err(|e| damaged(e, output, Some(dir)))?,
        None => RunState {
            step: 0,
            num_tokens: 0,
            sampled_tokens: 0,
            objective: objective.initial_state(),
            watch: Default::default(),
            course: course.clone(),
        },
    };
    let lock = match held {
        Some(lock) => lock,
        None => claim_new(settings)?,
    };
    match &from {
        Some(dir) => say(format_args!("continuing after step {} from {}", state.step, dir.display())),
        None if continues => say(format_args!("{}: no checkpoint yet, starting at the beginning", output.display())),
        None => {}
    }
    for left in set_aside_after(output, state.step)? {
        say(format_args!("a later checkpoint of the course that is left is now {}", left.display()));
    }
    write_file(&output.join("recipe.toml"), |out| out.write_all(settings.recipe.as_bytes()))?;
    Ok(Some(Start { state, from, lock }))
}

/// Where the newest checkpoint cannot be read, an older one may be there.
fn damaged(error: Error, output: &Path, dir: Option<&Path>) -> Error {
    let Some(dir) = dir else { return error };
    let older = checkpoints(output).unwrap_or_default().into_iter().map(|(_, path)| path);
    match (error, older.rev().skip_while(|path| path != dir).nth(1)) {
        (Error::File { path, detail }, Some(older)) if path.starts_with(dir) => {
            let detail = format!(
                "{detail}; delete {} to go on from {}, or name a checkpoint: --resume-from-checkpoint DIR",
                dir.display(),
                older.display()
            );
            Error::File { path, detail }
        }
        (error, _) => error,
    }
}

/// What users should know of the rows before a run.
fn tell_of_data(settings: &Settings, task: &Task) {
    for dataset in task.datasets() {
        dataset.report().into_iter().chain(task.checkpoint.beyond_rows(dataset)).for_each(say);
    }
    let file = |path: &Path| path.canonicalize().ok();
    if settings.eval_dataset.as_deref().and_then(file).is_some_and(|eval| Some(eval) == file(&settings.dataset)) {
        say("warning: --eval-dataset is the file that is trained on: what it says is no proof");
    }
}

/// Makes the folder of a new run.
fn claim_new(settings: &Settings) -> Result<File> {
    let output = &settings.output_dir;
    check_inputs(settings)?;
    if let Claim::Moved(old) = claim(output)? {
        say(format_args!("{}: the finished run there is now {}", output.display(), old.display()));
    }
    lock(output)
}

/// A finished run is moved away to make room; it must not hold what this run is about to read.
fn check_inputs(settings: &Settings) -> Result<()> {
    let Ok(output) = settings.output_dir.canonicalize() else { return Ok(()) };
    let models = std::iter::once(("--model", &settings.model))
        .chain(settings.references.models.iter().map(|m| ("--ref-model", m)));
    let models = models.chain(settings.adapters.iter().map(|(dir, _)| ("--adapter", dir)));
    let models = models.chain(settings.anchor.iter().map(|dir| ("--eval-anchor", dir)));
    let data = std::iter::once(("--dataset", &settings.dataset))
        .chain(settings.eval_dataset.iter().map(|d| ("--eval-dataset", d)));
    let inside = |path: &Path| path.canonicalize().is_ok_and(|path| path.starts_with(&output));
    match models.chain(data).find(|(_, path)| inside(path)) {
        Some((flag, path)) if is_finished(&settings.output_dir) => {
            let detail = format!(
                "{} is to be moved away, but it holds {flag} {}; choose another folder",
                settings.output_dir.display(),
                path.display()
            );
            Err(Error::option("--output-dir", detail))
        }
        _ => Ok(()),
    }
}

/// metrics.jsonl, evaluations.jsonl and samples.jsonl as they were at the checkpoint to continue from.
fn open_logs(output: &Path, from: Option<&Path>) -> Result<[LineLog; 3]> {
    let [metrics, evaluations, samples] = [METRICS, EVALUATIONS, SAMPLES].map(|name| output.join(name));
    let Some(checkpoint) = from else {
        return Ok([LineLog::create(&metrics)?, LineLog::create(&evaluations)?, LineLog::create(&samples)?]);
    };
    let (steps, evaluated) = read_history(checkpoint)?;
    let (metrics, evaluations) = (LineLog::with(&metrics, &steps)?, LineLog::with(&evaluations, &evaluated)?);
    // Samples are taken before the first step and after the last; the latter are still to come.
    Ok([metrics, evaluations, LineLog::resume(&samples, 0)?])
}

/// The objective of a run that went back and raised beta. Held-out rows stay with the beta that was given, so that what is seen of
/// them can be compared.
fn raised(settings: &Settings, state: &RunState) -> Result<Option<Box<dyn Objective>>> {
    let times = state.watch.beta(settings.alarm.lever);
    (times > 1.0).then(|| with_beta(settings, times).map(|(_, objective)| objective)).transpose()
}

/// What a run trains on that writes itself what it trains on.
fn open_online<'a, B: Backend>(
    device: &'a B,
    settings: &'a Settings,
    task: &'a Task,
    (policy, step, residency): (&mut Policy<B>, u64, Residency),
    stop: &dyn Fn() -> bool,
) -> Result<Option<Online<'a, B>>> {
    let Some(rollouts) = &settings.rollouts else { return Ok(None) };
    let log = LineLog::resume(&settings.output_dir.join(ROLLOUTS), step)?;
    let mut online = Online::new(device, task, settings, rollouts, (residency, log))?;
    online.open_prior(device, policy, step, stop)?;
    Ok(Some(online))
}

struct Session<'a, B: Backend> {
    device: &'a B,
    /// What trains in place of the task's objective, once beta is another.
    raised: Option<Box<dyn Objective>>,
    settings: &'a Settings,
    task: &'a Task,
    schedule: Schedule,
    plan: Plan,
    policy: Policy<B>,
    panel: Panel,
    /// Of the references, for the coming step.
    ref_weights: RefWeights,
    state: RunState,
    /// The step of the checkpoint in the output folder that needs no writing again.
    saved: Option<u64>,
    steps: Steps<'a>,
    drift: Option<Drift<'a, B>>,
    gold: Option<Gold<'a>>,
    /// What the last evaluation saw of the policy's own completions, until the watch has looked at it.
    seen: Option<alarm::Seen>,
    online: Option<Online<'a, B>>,
    /// What the coming step trains on, if the policy wrote it.
    batch: Option<online::Batch>,
    /// The step of the last line of evaluations.jsonl.
    evaluated: Option<u64>,
    /// What ends the run before its last step.
    stopped: Option<String>,
    metrics: LineLog,
    evaluations: LineLog,
    samples: LineLog,
    /// Of what is written.
    lineage: Lineage,
}

impl<B: Backend> Session<'_, B> {
    fn train(&mut self, stop: &dyn Fn() -> bool) -> Result<Outcome> {
        let max_steps = self.task.max_steps;
        let Settings { stop_at_step, eval_steps, .. } = *self.settings;
        let pause = stop_at_step.map(|pause| pause.step(max_steps, eval_steps, self.task.iterations));
        if self.state.step == 0 && self.evaluated.is_none() {
            self.evaluate(None)?;
            self.sample()?;
        }
        let mut progress = Progress::new("training", max_steps, "steps").starting_at(self.state.step);
        self.look_out(&mut |text| progress.say(text))?;
        while self.state.step < max_steps && self.stopped.is_none() {
            // What was sampled is trained on before anything ends: it is in no checkpoint.
            let between = self.state.step.is_multiple_of(self.task.iterations);
            if between && stop() {
                let detail = match self.state.step {
                    0 => "before the first step".to_string(),
                    _ => format!("{} holds everything", self.save_checkpoint()?.display()),
                };
                let how = "--resume-from-checkpoint auto continues";
                return Err(Error::Interrupted { detail: format!("{detail}; {how}") });
            }
            if pause.is_some_and(|last| self.state.step >= last) {
                return Ok(Outcome::Stopped(self.save_checkpoint()?));
            }
            self.profile(true)?;
            let message = self.step(&mut progress)?;
            self.profile(false)?;
            progress.at(self.state.step, &message);
            self.after_step(&mut progress)?;
        }
        progress.finish();
        if let Some(why) = &self.stopped {
            say(format_args!("stopped after step {} of {max_steps}: {why}", self.state.step));
        }
        self.finish().map(Outcome::Finished)
    }

    /// Tells a profiler that the first of the steps that it is to record comes next, or that the last is done.
    fn profile(&self, starts: bool) -> Result<()> {
        let edge = self.settings.profile_steps.map(|(first, last)| if starts { first - 1 } else { last });
        if edge == Some(self.state.step) { self.device.profile(starts) } else { Ok(()) }
    }

    /// One optimizer step and its line; returns what the progress bar says.
    fn step(&mut self, progress: &mut Progress) -> Result<String> {
        let (number, started) = (self.state.step + 1, Instant::now());
        let mut metrics = self.sample_batch(number, progress).map_err(|e| self.keep(e))?;
        let sampling_time = started.elapsed().as_secs_f64();
        let ref_weights = self.ref_weights.weights();
        let gathered = match &self.batch {
            Some(batch) => batch.gathered(),
            None => self.panel.training(self.task, &mut self.steps, number),
        };
        let mut rows = gathered.rows(&ref_weights, &self.state.objective, &self.panel.hidden);
        rows.sampled = self.batch.as_ref().and_then(|batch| batch.sampled.as_ref());
        let objective = self.raised.as_deref().unwrap_or(self.task.objective.as_ref());
        let packing = self.settings.training();
        let pass = Pass { objective, rows, packing, purpose: Purpose::Training, step: number };
        let rate = self.schedule.rate(number) * self.state.watch.rate(self.settings.alarm.lever);
        let result = step(self.device, &mut self.policy, &pass, rate);
        let tokens = gathered.examples.iter().flat_map(|e| &e.sequences).map(|s| s.ids.len() as u64).sum::<u64>();
        let pairs = gathered.pairs();
        let result = result.map_err(|e| self.keep_last_good(e))?;
        if self.online.is_none() {
            self.ref_weights.observe(&pairs);
        }
        if self.online.is_none() || !result.state.is_empty() {
            self.state.objective = result.state;
        }
        let step_time = started.elapsed().as_secs_f64();
        self.state.step = number;
        self.state.num_tokens += tokens;
        // What moves within a batch of completions is the policy.
        let first = (number - 1).is_multiple_of(self.task.iterations);
        metrics.extend(result.metrics.into_iter().filter(|(name, _)| first || !name.starts_with(step::MISMATCH)));
        if self.online.is_some() {
            metrics.push(("sampling_time".into(), sampling_time));
        }
        let line = Line {
            step: number,
            epoch: self.task.epoch(number),
            loss: result.loss,
            grad_norm: result.grad_norm,
            lost_updates: result.lost_updates,
            learning_rate: rate,
            metrics: &metrics,
            step_time,
            tokens: result.rows,
            num_tokens: self.state.num_tokens,
        };
        self.metrics.append(&line.to_json())?;
        let shown = [("rewards/margins", "margin"), ("reward", "reward")].into_iter().filter_map(|(name, label)| {
            let found = metrics.iter().find(|metric| metric.0 == name)?;
            Some(format!(" {label} {:.3}", found.1))
        });
        let shown: String = shown.collect();
        Ok(format!("loss {:.4}{shown} {:.0} tokens/s", result.loss, result.rows as f64 / (step_time - sampling_time)))
    }

    /// Lets the policy write what step `number` trains on, where it is due; what is to be said about it.
    fn sample_batch(&mut self, number: u64, progress: &mut Progress) -> Result<Vec<Metric>> {
        let Some(online) = &mut self.online else { return Ok(Vec::new()) };
        let iterations = self.task.iterations;
        let first = (number - 1).is_multiple_of(iterations);
        if first || self.batch.is_none() {
            let prompts = self.steps.examples(number).to_vec();
            let weights = self.ref_weights.weights();
            let known = (&weights[..], &self.state.objective[..]);
            let place = ((number - 1) / iterations + 1, &prompts[..]);
            let mut show = |how_far: &str| progress.at(number - 1, how_far);
            let mut batch = online.sample(self.device, &mut self.policy, place, known, &mut show)?;
            if !batch.state.is_empty() {
                self.state.objective = std::mem::take(&mut batch.state);
            }
            self.state.sampled_tokens += batch.tokens;
            self.batch = Some(batch);
        }
        let batch = self.batch.as_mut().expect("it was just made, or is trained on again");
        let mut metrics = std::mem::take(&mut batch.metrics);
        metrics.push(("num_sampled_tokens".into(), self.state.sampled_tokens as f64));
        Ok(metrics)
    }

    /// What fails between two steps, a judge that does not answer for example, changed nothing: the run so far is worth keeping.
    fn keep(&mut self, error: Error) -> Error {
        let between = self.state.step > 0 && self.state.step.is_multiple_of(self.task.iterations);
        if between && !matches!(error, Error::Interrupted { .. }) {
            match self.save_checkpoint() {
                Ok(dir) => say(format_args!(
                    "{} holds everything up to step {}; --resume-from-checkpoint auto continues",
                    dir.display(),
                    self.state.step
                )),
                Err(e) => say(format_args!("the state after step {} could not be saved: {e}", self.state.step)),
            }
        }
        error
    }

    /// A step that failed changed nothing: what came before it is worth keeping. Not between two steps on the same completions, which
    /// are in no checkpoint.
    fn keep_last_good(&mut self, error: Error) -> Error {
        let Error::NotFinite { step, what, detail } = error else { return error };
        if self.state.step == 0 || !self.state.step.is_multiple_of(self.task.iterations) {
            return Error::NotFinite { step, what, detail };
        }
        let kept = match self.save_checkpoint() {
            Ok(dir) => format!("the state before this step is in {}", dir.display()),
            Err(e) => format!("the state before this step could not be saved: {e}"),
        };
        Error::NotFinite { step, what, detail: format!("{detail}; {kept}") }
    }

    fn after_step(&mut self, progress: &mut Progress) -> Result<()> {
        let due = |every: Option<u64>| every.is_some_and(|every| self.state.step.is_multiple_of(every));
        let (eval, save) = (due(self.settings.eval_steps), due(self.settings.save_steps));
        if eval && self.state.step < self.task.max_steps {
            let evaluation = self.evaluate(Some(progress))?;
            evaluation.iter().for_each(|evaluation| progress.say(&describe(evaluation)));
            let line = evaluation.map(|evaluation| evaluation.to_json()).unwrap_or_default();
            self.stopped = self.settings.stop_when.iter().find_map(|stop| stop.met(&line));
            if self.look_out(&mut |text| progress.say(text))? {
                return Ok(());
            }
        }
        if save || self.stopped.is_some() {
            self.save_checkpoint()?;
        }
        Ok(())
    }

    /// Looks at what the last evaluation saw. Whether the run went back to an earlier step.
    fn look_out(&mut self, tell: &mut dyn FnMut(&str)) -> Result<bool> {
        let Some(seen) = self.seen.take() else { return Ok(false) };
        let alarm = self.settings.alarm;
        let before = self.state.watch.best.as_ref().map(|best| best.step);
        let finding = self.state.watch.look(&seen, alarm.kl_budget);
        let step = self.state.step;
        finding.warnings.iter().for_each(|words| tell(&format!("warning: step {step}: {words}")));
        if alarm.action != OnAlarm::Warn && finding.best {
            self.save_checkpoint()?;
            // One that was made for this alone is of no more use.
            let regular =
                |step: u64| self.settings.save_steps.is_some_and(|every| step > 0 && step.is_multiple_of(every));
            if let Some(old) = before.filter(|old| *old != step && !regular(*old)) {
                let dir = checkpoint_path(&self.settings.output_dir, old);
                // --save-total-limit may have been first.
                if dir.exists() {
                    std::fs::remove_dir_all(&dir).at(&dir)?;
                }
            }
        }
        let Some(why) = finding.alarm else { return Ok(false) };
        let action = self.state.watch.act(alarm.action);
        let best = self.state.watch.best.as_ref().map(|best| best.step);
        let left = super::evaluations(&self.settings.output_dir)?;
        let left: Vec<_> = left.into_iter().filter(|line| line["step"].as_u64() > best).collect();
        let mut log = LineLog::resume(&self.settings.output_dir.join(ALARMS), u64::MAX)?;
        let taken = format!("{action:?}").to_lowercase();
        let mut line = json!({"step": step, "why": why, "action": taken, "best_step": best, "evaluations": left});
        let then = self.then()?;
        if action == OnAlarm::Rollback && best.is_some() {
            line["then"] = json!(then);
        }
        log.append(&line)?;
        match (action, best) {
            (OnAlarm::Warn, _) | (_, None) => {
                tell(&format!("ALARM: step {step}: {why}"));
                Ok(false)
            }
            (action, Some(best)) => {
                tell(&format!("ALARM: step {step}: {why}; going back to step {best}"));
                self.go_back(best)?;
                match action {
                    OnAlarm::Rollback => tell(&format!("from step {best} on {then}")),
                    _ => self.stopped = Some(format!("{why} (--on-alarm); the model is that of step {best}")),
                }
                Ok(true)
            }
        }
    }

    /// How a run goes on that goes back once more.
    fn then(&self) -> Result<String> {
        let (lever, watch) = (self.settings.alarm.lever, &self.state.watch);
        Ok(match lever {
            Lever::LearningRate => format!("at {} of the learning rate", 0.5 * watch.rate(lever)),
            Lever::Beta => format!("with beta {}", with_beta(self.settings, 2.0 * watch.beta(lever))?.0),
        })
    }

    /// Makes everything as it was at a checkpoint, but for what the watch has learned.
    fn go_back(&mut self, step: u64) -> Result<()> {
        let output = &self.settings.output_dir;
        let dir = checkpoint_path(output, step);
        let state = read_state(&dir, &self.state.course)?;
        self.policy.rest();
        load_state(self.device, &mut self.policy, &dir, self.settings.dtype)?;
        self.policy.optimizer.resume(step);
        let watch = self.state.watch.gone_back(state.watch.clone());
        self.state = RunState { watch, ..state };
        self.raised = raised(self.settings, &self.state)?;
        self.ref_weights = self.panel.weights(self.settings, self.task, step + 1)?;
        self.batch = None;
        set_aside_after(output, step)?;
        [self.metrics, self.evaluations, self.samples] = open_logs(output, Some(&dir))?;
        self.online.iter_mut().try_for_each(|online| online.go_back(step))?;
        (self.evaluated, self.saved) = (Some(step), None);
        self.save_checkpoint().map(drop)
    }

    /// Shows itself in the bar of the training that it interrupts, or in one of its own.
    fn evaluate(&mut self, training: Option<&mut Progress>) -> Result<Option<Evaluation>> {
        let Some(eval) = &self.task.eval else { return Ok(None) };
        let (step, held_out) = (self.state.step, eval.examples.len());
        let mut own = None;
        let show: &mut dyn FnMut(&str, usize, usize) = match training {
            Some(bar) => &mut |what, done, all| bar.at(step, &format!("{what} {done}/{all}")),
            None => {
                let bar = own.insert(Progress::new(EVALUATING, held_out as u64, "rows"));
                &mut |what, done, all| match what {
                    EVALUATING => bar.at(done as u64, ""),
                    what => bar.at(held_out as u64, &format!("{what} {done}/{all}")),
                }
            }
        };
        let started = Instant::now();
        let gathered = self.panel.held_out(self.task);
        let ref_weights = self.ref_weights.weights();
        let rows = gathered.rows(&ref_weights, &self.state.objective, &self.panel.hidden);
        let (objective, packing) = (self.task.held_out_objective(), self.settings.packing);
        let pass = Pass { objective, rows, packing, purpose: Purpose::HeldOut, step };
        let anchor = self.panel.anchor();
        let mut done = |done| show(EVALUATING, done, held_out);
        let mut measured = match eval.form {
            Form::Prompts => Measured::nothing(),
            _ => evaluate(self.device, &mut self.policy, &pass, anchor.as_deref(), &mut done)?,
        };
        let kl = match &mut self.drift {
            Some(drift) => {
                let all = self.settings.kl_samples;
                let kl = drift.measure(self.device, &mut self.policy, &mut |done| show("sampling", done, all))?;
                measured.metrics.extend(drift.metrics(kl.first()));
                kl
            }
            None => Vec::new(),
        };
        let golds = self.judge(&mut measured.metrics)?;
        let metric = |name: &str| measured.metrics.iter().find(|metric| metric.0 == name).map(|metric| metric.1);
        self.seen = self.drift.as_ref().zip(kl.first()).map(|(drift, kl)| alarm::Seen {
            step,
            kl: *kl,
            gold: golds,
            lengths: drift.lengths(),
            distinct_2: drift.distinct(2),
            chosen: metric("logps/chosen"),
            rejected: metric("logps/rejected"),
        });
        let (device, tokenizer) = (self.device, &self.task.tokenizer);
        let mut exams = Vec::new();
        for exam in &self.task.exams {
            let mut done = |done, all| show(&exam.task.name, done, all);
            let outcome = exam.take(device, &mut self.policy, tokenizer, packing, step, &mut done)?;
            exams.push((exam.task.name.clone(), outcome));
        }
        own.into_iter().for_each(Progress::finish);
        let evaluation = Evaluation {
            step: self.state.step,
            epoch: self.task.epoch(self.state.step),
            rows: held_out,
            loss: measured.loss,
            summary: measured.summary,
            metrics: measured.metrics.into_iter().map(|(name, value)| (name.into_owned(), value)).collect(),
            exams,
            drift: kl,
            runtime: started.elapsed().as_secs_f64(),
        };
        self.evaluations.append(&evaluation.to_json())?;
        self.evaluated = Some(step);
        Ok(Some(evaluation))
    }

    /// What the completions are worth that the distance was measured on, as metrics; and by the gold reward, of each.
    fn judge(&mut self, metrics: &mut Vec<Metric>) -> Result<Vec<Option<f64>>> {
        let Some(drift) = &self.drift else { return Ok(Vec::new()) };
        if let Some(online) = &mut self.online {
            metrics.extend(online.judge_held_out(&drift.written()?)?);
        }
        let Some(gold) = &mut self.gold else { return Ok(Vec::new()) };
        let (golds, more) = gold.measure(drift)?;
        metrics.extend(more);
        Ok(golds)
    }

    /// One completion for each sample prompt, each from its own random stream.
    fn sample(&mut self) -> Result<()> {
        self.policy.rest();
        let (prompts, eos) = (self.task.prompts(self.settings), self.task.tokenizer.stops());
        let mut requests = sample_requests(self.settings, &prompts);
        requests.iter_mut().for_each(|request| request.eos = eos);
        let completions = Engine::new(self.device).run(&self.policy.model, &requests, &mut |_| ())?;
        for (prompt, completion) in prompts.into_iter().zip(completions) {
            self.samples.append(&json!({
                "step": self.state.step,
                "prompt": self.task.tokenizer.decode(prompt)?,
                "completion": text_of(&self.task.tokenizer, prompt, &completion.ids)?,
                "finished": completion.finished(),
            }))?;
        }
        Ok(())
    }

    fn save_checkpoint(&mut self) -> Result<PathBuf> {
        let path = checkpoint_path(&self.settings.output_dir, self.state.step);
        if self.saved == Some(self.state.step) {
            return Ok(path);
        }
        self.check_weights()?;
        self.policy.rest();
        // Lines that the checkpoint counts on must not be younger than it.
        [&self.metrics, &self.evaluations, &self.samples].into_iter().try_for_each(LineLog::sync)?;
        self.online.iter().try_for_each(Online::sync)?;
        let trainer_state = self.trainer_state();
        let (device, settings, task, state) = (self.device, self.settings, self.task, &self.state);
        let (policy, lineage) = (&mut self.policy, self.lineage.clone().with_argument("step", self.state.step));
        write_dir(&path, |dir| {
            save_model(device, policy, task, dir, settings.dtype)?;
            lineage.write_as(&path, dir)?;
            save_state(device, policy, state, dir, settings.dtype)?;
            trainer_state.write(&settings.output_dir, dir)
        })?;
        self.saved = Some(self.state.step);
        if let Some(limit) = self.settings.save_total_limit {
            let goes_back = self.settings.alarm.action != OnAlarm::Warn;
            let best = self.state.watch.best.as_ref().filter(|_| goes_back).map(|best| best.step);
            keep_newest(&self.settings.output_dir, limit, best)?;
        }
        Ok(path)
    }

    fn trainer_state(&self) -> TrainerState {
        TrainerState {
            global_step: self.state.step,
            epoch: self.task.epoch(self.state.step),
            max_steps: self.task.max_steps,
            num_train_epochs: self.task.max_steps.div_ceil(self.task.steps_per_epoch),
            train_batch_size: self.settings.per_device_batch_size,
            num_tokens: self.state.num_tokens,
            total_flops: self.plan.flops_per_step * self.state.step as f64,
            eval_steps: self.settings.eval_steps,
            save_steps: self.settings.save_steps,
        }
    }

    /// What cannot be used is not written.
    fn check_weights(&mut self) -> Result<()> {
        let Some(name) = self.policy.first_bad_weight(self.device)? else { return Ok(()) };
        let detail = "this step's update broke it; a lower --learning-rate or --weight-decay may help".into();
        Err(Error::NotFinite { step: self.state.step, what: format!("the weight {name}"), detail })
    }

    fn finish(&mut self) -> Result<Report> {
        self.check_weights()?;
        if self.evaluated != Some(self.state.step) {
            self.evaluate(None)?;
            if self.look_out(&mut |text| say(text))? {
                say(format_args!("the last step is behind; the model is that of step {}", self.state.step));
            }
        }
        self.sample()?;
        self.policy.rest();
        let output: &Path = &self.settings.output_dir;
        if self.settings.keep_model {
            save_model(self.device, &mut self.policy, self.task, output, self.settings.dtype)?;
            self.lineage.write(output)?;
        }
        self.trainer_state().write(output, output)?;
        let report = Report::read(output, self.task.objective.name())?.with_tasks(&self.task.exams);
        report.write_plot()?;
        finish(output)?;
        say_what_it_needs(self.settings);
        Ok(report.with_memory(machine::peak_resident(), &self.plan))
    }
}

/// An adapter that was trained on top of others is of no use without them.
fn say_what_it_needs(settings: &Settings) {
    if settings.adapters.is_empty() {
        return;
    }
    let below = settings.adapters.iter().map(|(dir, weight)| format!("--adapter {}={weight} ", dir.display()));
    let (model, own) = (settings.model.display(), settings.output_dir.display());
    let below: String = below.collect();
    say(format_args!(
        "this adapter belongs on top of those that it was trained on: --model {model} {below}--adapter {own}"
    ));
}

fn describe(e: &Evaluation) -> String {
    let accuracy = e.summary.accuracy.map_or(String::new(), |a| format!(", pair accuracy {:.1} %", 100.0 * a));
    let drift = e.drift.first().map_or(String::new(), |kl| format!(", KL {:.2}", kl.mean));
    let perplexity = e.summary.perplexity.map_or(String::new(), |perplexity| format!(", perplexity {perplexity:.2}"));
    let exam = |(name, outcome): &(String, tasks::Outcome)| {
        let headline = outcome.headline();
        format!(", {name} {} {:.4}", headline.name, headline.value)
    };
    let exams: String = e.exams.iter().map(exam).collect();
    let metric = |name: &str| e.metrics.iter().find(|(found, _)| found == name).map(|(_, value)| *value);
    let reward = metric("reward").map_or(String::new(), |reward| match metric("reward_stderr") {
        Some(error) => format!("reward {reward:.3} ± {error:.3}"),
        None => format!("reward {reward:.3}"),
    });
    let loss = if e.loss.is_nan() { String::new() } else { format!(", held-out loss {:.4}", e.loss) };
    let all = format!("{reward}{loss}{accuracy}{drift}{perplexity}{exams}");
    format!("step {}: {}", e.step, all.strip_prefix(", ").unwrap_or(&all))
}
