//! `cuvee eval`: pairs as `train` evaluates them, or tasks.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::args::EvalArgs;
use super::device::{self, Job};
use super::logps::score;
use super::tasks::axes;
use super::written;
use crate::checkpoint::write_file;
use crate::data::{Dataset, Form, Packing, Tokenizer};
use crate::error::Result;
use crate::model::Checkpoint;
use crate::objectives::Stats;
use crate::ops::Backend;
use crate::progress::{Progress, say};
use crate::tasks::{Examined, Examiner, Outcome, Subject, Table, Task};
use crate::train::plot::{Panel, Series, curves_svg};
use crate::train::{Summary, own_tokens};

pub fn run(args: &EvalArgs) -> Result<()> {
    device::run(&args.engine, args.precision.dtype, None, args)
}

impl Job for &EvalArgs {
    type Output = ();

    fn run<B: Backend>(self, device: &B) -> Result<()> {
        device::check_dtype(device, self.precision.dtype)?;
        match (&self.dataset, &self.written.prompts) {
            (Some(dataset), _) => self.pairs(device, &self.model[0], dataset),
            (None, Some(prompts)) => written::run(device, self, prompts),
            (None, None) => self.tasks(device),
        }
    }
}

impl EvalArgs {
    /// What a run's evaluations say of held-out pairs.
    fn pairs<B: Backend>(&self, device: &B, model: &Path, dataset: &Path) -> Result<()> {
        let args = self;
        let policy = args.adapters.open(model, Checkpoint::open)?;
        let tokenizer = Tokenizer::load(model)?;
        let encode = super::encode(args.limits.max_length, args.limits.on_overflow);
        let dataset = Dataset::load(dataset, &tokenizer, &encode)?.not_empty()?;
        dataset.report().iter().chain(&policy.beyond_rows(&dataset)).for_each(say);
        let packing = super::packing(&args.batching);
        let reference = |dir: &Path| {
            let reference = Checkpoint::open(dir)?;
            let own = own_tokens(&dataset, &tokenizer, &reference)?;
            sums(device, &reference, own.as_ref().unwrap_or(&dataset), packing)
        };
        let sequences = || dataset.examples.iter().flat_map(|e| &e.sequences);
        let pairs = if dataset.form == Form::Pairs { dataset.examples.len() } else { 0 };
        let stats = Stats {
            ref_logps: args.ref_model.as_deref().map(reference).transpose()?.into_iter().collect(),
            logps: sums(device, &policy, &dataset, packing)?,
            lens: sequences().map(|s| s.targets() as f64).collect(),
            pairs: (0..pairs).map(|pair| (2 * pair, 2 * pair + 1)).collect(),
            ..Stats::default()
        };
        let summary = Summary::of(&stats, stats.ref_logps.first().map(Vec::as_slice));
        let (rows, skipped) = (dataset.examples.len(), dataset.skipped.len());
        if args.json {
            let result = json!({
                "rows": rows,
                "skipped": skipped,
                "accuracy": summary.accuracy,
                "margin": summary.margin,
                "perplexity": summary.perplexity,
            });
            return super::print(&format!("{result}\n"));
        }
        let mut out = format!("rows        {rows} ({skipped} skipped)\n");
        if let (Some(accuracy), Some(margin)) = (summary.accuracy, summary.margin) {
            let against = if stats.ref_logps.is_empty() { "log-probability" } else { "log-ratio to the reference" };
            out += &format!("accuracy    {:.1} %\nmargin      {margin:.3} nats ({against})\n", 100.0 * accuracy);
        }
        if let Some(perplexity) = summary.perplexity {
            out += &format!("perplexity  {perplexity:.2}\n");
        }
        super::print(&out)
    }

    /// Every model in every task, one model after the other.
    fn tasks<B: Backend>(&self, device: &B) -> Result<()> {
        let args = &self.tasks;
        let tasks = args.open()?;
        let subject = |dir: &PathBuf| Subject::new(dir, Checkpoint::open(dir)?);
        let reference = self.ref_model.as_ref().map(subject).transpose()?;
        let base_model = args.base_model.as_ref().map(subject).transpose()?;
        let reward_model = args.reward_model.as_ref().map(|dir| Subject::new(dir, Checkpoint::open_reward(dir)?));
        let reward_model = reward_model.transpose()?;
        let examiner = Examiner {
            device,
            packing: super::packing(&self.batching),
            max_length: self.limits.max_length,
            reference: reference.as_ref(),
            reward_model: reward_model.as_ref(),
            base_model: base_model.as_ref(),
        };
        // All of them are opened before the first is asked: a mistake should not cost an hour.
        let subjects = self.subjects()?;
        let mut models = Vec::new();
        for (model, subject) in &subjects {
            let outcomes = tasks.iter().map(|task| examine(&examiner, model, subject, task)).collect::<Result<_>>()?;
            models.push(Examined { model: model.clone(), outcomes });
        }
        let baseline = args.baseline.as_ref().map(|dir| dir.display().to_string());
        let at = subjects.iter().position(|(model, _)| baseline.as_ref().is_some_and(|baseline| baseline == model));
        let at = at.unwrap_or(0);
        let table = Table::new(tasks.iter().map(|task| task.name.clone()).collect(), models, at);
        if let Some(path) = &args.log_samples {
            write_file(path, |out| table.log().try_for_each(|line| writeln!(out, "{line}")))?;
        }
        if let (Some(path), Some(axes)) = (&args.plot, axes(&tasks)) {
            write_file(path, |out| out.write_all(figure(&table, axes).as_bytes()))?;
        }
        match self.json {
            true => super::print(&format!("{}\n", table.to_json())),
            false => super::print(&table.text()),
        }
    }

    /// Every model that is asked, with what it is called. Adapters belong to the one `--model`, not to a baseline.
    fn subjects(&self) -> Result<Vec<(String, Subject)>> {
        let adapters: String =
            self.adapters.adapter.iter().map(|a| format!(" + {}={}", a.dir.display(), a.weight)).collect();
        let model = |dir: &PathBuf| {
            let subject = Subject::new(dir, self.adapters.open(dir, Checkpoint::open)?)?;
            Ok((format!("{}{adapters}", dir.display()), subject))
        };
        let mut subjects: Vec<(String, Subject)> = self.model.iter().map(model).collect::<Result<_>>()?;
        if let Some(dir) = self.tasks.baseline.as_ref().filter(|dir| !self.model.contains(dir) || !adapters.is_empty())
        {
            subjects.insert(0, (dir.display().to_string(), Subject::new(dir, Checkpoint::open(dir)?)?));
        }
        Ok(subjects)
    }
}

/// One task, with a bar over its items.
fn examine<B: Backend>(examiner: &Examiner<B>, model: &str, subject: &Subject, task: &Task) -> Result<Outcome> {
    let mut bar: Option<(String, Progress)> = None;
    let outcome = examiner.examine(task, subject, &mut |what, done, all| {
        if bar.as_ref().is_none_or(|(shown, _)| shown != what) {
            let title = format!("{model}: {} ({what})", task.name);
            bar.replace((what.to_string(), Progress::new(&title, all as u64, "items")))
                .into_iter()
                .for_each(|(_, old)| old.finish());
        }
        bar.as_mut().expect("it was just made").1.at(done as u64, "");
    })?;
    bar.into_iter().for_each(|(_, bar)| bar.finish());
    Ok(outcome)
}

/// Reward or preference against the first metric of another task.
fn figure(table: &Table, (x, y): (usize, usize)) -> String {
    let ([x_label, y_label], points) = table.points(x, y);
    let series = points.into_iter().map(|(name, point)| Series { name, points: vec![point] }).collect();
    let title = format!("{y_label} against {x_label}");
    curves_svg("cuvee eval", &x_label, &[Panel { title, y_label, series }])
}

/// Summed log-probabilities of every sequence, in order.
fn sums<B: Backend>(device: &B, checkpoint: &Checkpoint, dataset: &Dataset, packing: Packing) -> Result<Vec<f64>> {
    let logps = score(device, checkpoint, dataset, packing)?;
    Ok(logps.iter().flatten().map(|tokens| tokens.iter().map(|x| f64::from(*x)).sum()).collect())
}
