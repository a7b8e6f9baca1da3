//! What a run needs before it touches a device: files read, names looked up, sizes known.

use std::ops::Range;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::plan::sample_request;
use super::settings::Settings;
use super::step::check_needs;
use crate::data::{Dataset, Form, Sharing, Tokenizer, epoch_order};
use crate::device::Philox;
use crate::error::{Error, Result};
use crate::model::{Checkpoint, Init};
use crate::objectives::Objective;
use crate::optim;
use crate::references::Reference;

/// Rows of a micro-batch where the user does not say: large enough to keep the cores busy, small enough for the
/// activations of a 135M model to fit beside a browser.
pub const MICRO_BATCH_TOKENS: usize = 2048;

/// Streams of the seed. Names are hashed, so a new one disturbs no other.
const SHUFFLE: &str = "shuffle";

pub struct Task {
    pub checkpoint: Checkpoint,
    pub tokenizer: Tokenizer,
    pub objective: Box<dyn Objective>,
    pub optimizer: &'static optim::Entry,
    pub references: Vec<Reference>,
    pub train: Dataset,
    pub eval: Option<Dataset>,
    pub steps_per_epoch: u64,
    pub max_steps: u64,
}

/// The objective of a run, checked against what training can give it and which references are named.
pub fn objective(settings: &Settings) -> Result<Box<dyn Objective>> {
    let objective = settings.objective.build()?;
    let (name, needs) = (objective.name(), objective.needs());
    check_needs(name, &needs)?;
    let (given, most) = (settings.ref_models.len(), *needs.refs.end());
    if given > most {
        let detail = format!("{given} given, but {name} uses {most}; leave the rest out");
        return Err(Error::option("--ref-model", detail));
    }
    Ok(objective)
}

/// The references that an objective reads: those named, or else the policy as it starts.
pub fn references(settings: &Settings, objective: &dyn Objective) -> Result<Vec<Reference>> {
    if *objective.needs().refs.end() == 0 {
        return Ok(Vec::new());
    }
    if settings.ref_models.is_empty() {
        return Ok(vec![Reference { checkpoint: Checkpoint::open(&settings.model)?, init: settings.init }]);
    }
    let open = |dir: &std::path::PathBuf| Ok(Reference { checkpoint: Checkpoint::open(dir)?, init: Init::Checkpoint });
    settings.ref_models.iter().map(open).collect()
}

impl Task {
    /// Reads and checks everything that can fail cheaply, before an output folder is made.
    pub fn prepare(settings: &Settings) -> Result<Self> {
        let objective = objective(settings)?;
        let optimizer = optim::find(&settings.optimizer)?;
        let checkpoint = Checkpoint::open(&settings.model)?;
        let references = references(settings, objective.as_ref())?;
        let tokenizer = Tokenizer::load(&settings.model)?;
        let load = |path| load_dataset(path, &tokenizer, settings, objective.as_ref(), &checkpoint);
        let mut train = load(&settings.dataset)?;
        if !objective.needs().pairs {
            // What an objective never reads is not trained on. Held-out pairs stay: accuracy needs both sides.
            train.examples.iter_mut().for_each(|example| example.sequences.truncate(1));
        }
        let eval = settings.eval_dataset.as_deref().map(load).transpose()?;
        for reference in &references {
            check_reference(&tokenizer, &reference.checkpoint.dir)?;
            let datasets = || [Some(&train), eval.as_ref()].into_iter().flatten();
            check_vocabulary(&reference.checkpoint, datasets())?;
            check_positions(&reference.checkpoint, datasets())?;
        }
        let steps_per_epoch = train.examples.len().div_ceil(settings.batch_size) as u64;
        let by_epochs = (settings.num_train_epochs * steps_per_epoch as f64).ceil() as u64;
        let max_steps = settings.max_steps.unwrap_or(by_epochs);
        let task =
            Self { checkpoint, tokenizer, objective, optimizer, references, train, eval, steps_per_epoch, max_steps };
        let longest = task.prompts(settings).into_iter().max_by_key(|prompt| prompt.len());
        longest.map_or(Ok(()), |prompt| sample_request(settings, prompt).check(&task.checkpoint.spec))?;
        Ok(task)
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
        let (epoch, index) = ((step - 1) / self.steps_per_epoch, (step - 1) % self.steps_per_epoch);
        let first = index as usize * settings.batch_size;
        (epoch, first..(first + settings.batch_size).min(self.train.examples.len()))
    }

    /// Indices of the training examples that some step of the run will see, in the order of the file.
    pub fn used_examples(&self, settings: &Settings) -> Vec<usize> {
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
        let hex = |bytes: [u8; 32]| blake3::Hash::from_bytes(bytes).to_hex()[..16].to_string();
        let references = self.references.iter().map(|r| Ok(hex(r.init.identity(&r.checkpoint)?)));
        let mut course = json!({
            "model": hex(settings.init.identity(&self.checkpoint)?),
            "ref_model": references.collect::<Result<Vec<_>>>()?,
            "dataset": hex(self.train.fingerprint()),
            "eval_dataset": self.eval.as_ref().map(|eval| hex(eval.fingerprint())),
            "objective": self.objective.name(),
            "optimizer": self.optimizer.name,
            "adam_beta1": settings.hyper.beta1,
            "adam_beta2": settings.hyper.beta2,
            "adam_epsilon": settings.hyper.eps,
            "weight_decay": settings.hyper.weight_decay,
            "max_grad_norm": settings.hyper.max_grad_norm,
            "learning_rate": settings.learning_rate,
            "lr_scheduler_type": format!("{:?}", settings.decay).to_lowercase(),
            "warmup_ratio": settings.warmup_ratio,
            "max_steps": self.max_steps,
            "batch_size": settings.batch_size,
            "micro_batch_tokens": settings.packing.budget,
            "no_prefix_sharing": settings.packing.sharing == Sharing::Off,
            "no_shuffle": !settings.shuffle,
            "seed": settings.seed,
            "dtype": settings.dtype.config_name(),
        });
        course["objective_weights"] = settings.objective.terms.iter().map(|term| term.1).collect();
        for (name, value) in settings.objective.resolved()?.iter() {
            course[name] = json!(value);
        }
        match course {
            Value::Object(course) => Ok(course),
            _ => unreachable!("made as an object above"),
        }
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
    if objective.needs().pairs && dataset.form != Form::Pairs {
        let name = objective.name();
        let detail = format!("{name} trains on pairs (prompt, chosen, rejected), these rows are {}", dataset.form);
        return Err(Error::file(path, detail));
    }
    check_vocabulary(checkpoint, [&dataset])?;
    check_positions(checkpoint, [&dataset])?;
    Ok(dataset)
}

/// A reference scores the policy's token ids: they must mean the same to it.
pub fn check_reference(tokenizer: &Tokenizer, dir: &Path) -> Result<()> {
    if tokenizer.shares_vocabulary(dir)? {
        return Ok(());
    }
    let detail = format!("{} has another vocabulary than --model; a reference must share it", dir.display());
    Err(Error::option("--ref-model", detail))
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
