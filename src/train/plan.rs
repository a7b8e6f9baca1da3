//! What a run costs, from the constructors that run it, on a device without memory.

use serde::Serialize;

use super::settings::Settings;
use super::task::Task;
use crate::data::{Batch as HostBatch, Example, Extent, Sequence, rows_of};
use crate::device::{Arena, Dry, Kind, Ledger};
use crate::error::Result;
use crate::model::{Acts, Batch, Checkpoint, Keep, Model, Options};
use crate::rollout::{self, Request, Sampling};
use crate::train::Blueprint;

/// Bytes of one phase. Phases follow each other; what lives for the whole run counts in each.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Phase {
    pub name: &'static str,
    pub weights: usize,
    pub grads: usize,
    pub states: usize,
    pub activations: usize,
    pub workspace: usize,
    /// Tokens of the data sets.
    pub host: usize,
}

impl Phase {
    fn new(name: &'static str, host: usize, ledgers: &[Ledger]) -> Self {
        let sum = |kind| ledgers.iter().map(|l| l.get(kind)).sum();
        Self {
            name,
            weights: sum(Kind::Weights),
            grads: sum(Kind::Grads),
            states: sum(Kind::States),
            activations: sum(Kind::Activations),
            workspace: sum(Kind::Workspace),
            host,
        }
    }

    pub fn total(&self) -> usize {
        self.weights + self.grads + self.states + self.activations + self.workspace + self.host
    }
}

#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Plan {
    pub phases: Vec<Phase>,
    pub peak_bytes: usize,
    /// Of an average optimizer step; a multiply-add is two.
    pub flops_per_step: f64,
    pub parameters: usize,
    /// `None` where only the data could tell.
    pub max_steps: Option<u64>,
}

/// FLOPs of forward and backward over one micro-batch.
pub fn flops(blueprint: &Blueprint, size: Extent) -> Result<u64> {
    let (dry, mut arena) = (Dry::default(), Dry::arena());
    let spec = &blueprint.checkpoint.spec;
    let options = Options::train_all(blueprint.positions);
    let mut model = Model::new(&mut arena, spec, blueprint.checkpoint.architecture.naming, options);
    let mut acts = Acts::new(&mut arena, spec, &size, blueprint.keep);
    let mut batch = Batch::new(&mut arena, &size);
    batch.resize(size);
    model.forward(&dry, &batch, &mut acts)?;
    model.backward(&dry, &batch, &vec![0.0; size.targets], &mut acts)?;
    Ok(dry.flops())
}

/// Steps that an average is taken over.
const SAMPLED_STEPS: u64 = 32;

/// FLOPs of an average step, from the first steps' real batches.
pub fn flops_per_step(task: &Task, settings: &Settings, blueprint: &Blueprint) -> Result<f64> {
    let steps = task.max_steps.min(task.steps_per_epoch).clamp(1, SAMPLED_STEPS);
    let order = task.order(settings, 0);
    let mut total = 0;
    for step in 1..=steps {
        let (_, range) = task.place_of_step(settings, step);
        let examples: Vec<&Example> = order[range].iter().map(|i| &task.train.examples[*i]).collect();
        for (_, batch) in settings.packing.batches(&examples) {
            total += flops(blueprint, batch.extent())?;
        }
    }
    Ok(total as f64 / steps as f64)
}

/// The plan of a run whose data is at hand.
pub fn plan(settings: &Settings) -> Result<Plan> {
    let task = Task::prepare(settings)?;
    let blueprint = task.blueprint(settings);
    let host = task.datasets().iter().flat_map(|d| &d.examples).map(host_bytes).sum();
    let mut phases = Vec::new();
    for reference in &task.references {
        let all: Vec<&Example> = task.datasets().iter().flat_map(|d| &d.examples).collect();
        let largest = settings.packing.largest(all.iter().copied(), all.len());
        phases.push(Phase::new("score", host, &[reference.plan(&largest)]));
    }
    let (run, step) = blueprint.plan();
    phases.push(Phase::new("train", host, &[run, step]));
    if let Some(request) = task.prompts(settings).iter().max_by_key(|p| p.len()).map(|p| sample_request(settings, p)) {
        phases.push(Phase::new("sample", host, &[run, step, rollout::plan(&task.checkpoint.spec, &request)]));
    }
    finish(phases, &blueprint, flops_per_step(&task, settings, &blueprint)?, Some(task.max_steps))
}

/// The plan of a run whose data is not: every sequence as long as `--max-length` allows, a quarter of it prompt.
pub fn plan_without_data(settings: &Settings, max_length: usize) -> Result<Plan> {
    let objective = super::task::objective(settings)?;
    let references = super::task::references(settings, objective.as_ref())?;
    let checkpoint = Checkpoint::open(&settings.model)?;
    let sequences = if objective.needs().pairs { 2 } else { 1 };
    let sequence = Sequence { ids: vec![0; max_length], first: (max_length / 4).max(1) };
    let example = Example { row: 0, sequences: vec![sequence; sequences] };
    // All examples are equal, so one full micro-batch stands for all of them.
    let packing = settings.packing;
    let full = (packing.budget / rows_of(&example, packing.sharing)).clamp(1, settings.batch_size);
    let batch = HostBatch::new(std::iter::repeat_n(&example, full), packing.sharing);
    let largest = batch.extent();
    let blueprint = Blueprint {
        checkpoint: &checkpoint,
        optimizer: crate::optim::find(&settings.optimizer)?,
        hyper: settings.hyper,
        largest,
        positions: max_length,
        keep: if settings.recompute { Keep::Inputs } else { Keep::Everything },
    };
    let mut phases: Vec<Phase> = references.iter().map(|r| Phase::new("score", 0, &[r.plan(&largest)])).collect();
    let (run, step) = blueprint.plan();
    phases.push(Phase::new("train", 0, &[run, step]));
    let flops = flops(&blueprint, largest)? as f64 * settings.batch_size as f64 / full as f64;
    finish(phases, &blueprint, flops, settings.max_steps)
}

fn finish(phases: Vec<Phase>, blueprint: &Blueprint, flops_per_step: f64, max_steps: Option<u64>) -> Result<Plan> {
    let mut model = Model::new(
        &mut Arena::<Dry>::with_bytes(&Dry::default(), usize::MAX)?,
        &blueprint.checkpoint.spec,
        blueprint.checkpoint.architecture.naming,
        Options::frozen(0),
    );
    let parameters = model.params_mut().iter().map(|p| p.value.len()).sum();
    let peak_bytes = phases.iter().map(Phase::total).max().unwrap_or(0);
    Ok(Plan { phases, peak_bytes, flops_per_step, parameters, max_steps })
}

fn host_bytes(example: &Example) -> usize {
    example.sequences.iter().map(|s| s.ids.len() * size_of::<u32>()).sum()
}

/// One sample of a prompt.
pub fn sample_request<'a>(settings: &Settings, prompt: &'a [u32]) -> Request<'a> {
    let s = settings.samples;
    Request {
        prompt,
        samples: 1,
        first_sample: 0,
        max_new_tokens: s.max_new_tokens,
        sampling: Sampling { temperature: s.temperature, top_p: s.top_p, seed: settings.seed },
        eos: &[],
    }
}
