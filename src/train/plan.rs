//! What a run costs, from the constructors that run it, on a device without memory; and, for a limit on memory, the
//! settings that keep within it.

use half::bf16;
use serde::Serialize;

use super::drift;
use super::host::Host;
use super::online;
use super::policy::{Blueprint, Extras, moments};
use super::references::{FreshReference, TaskReference};
use super::settings::Settings;
use super::task::{Steps, Task};
use crate::checkpoint::run_dir::is_run;
use crate::data::{Example, Extent, Packing, Sequence};
use crate::device::{DType, Dry, Kind, Ledger, Storage, cuda};
use crate::error::{Error, Result};
use crate::model::{Acts, Batch, Checkpoint, Head, Keep, KlActs, KlTerm, Lora, Model, Moments, RefHeads};
use crate::optim;
use crate::references::{self, Reference, Residency, largest_shard};
use crate::rewards::Rewards;
use crate::rollout::{self, Request, Sampling};
use crate::tasks;

/// Bytes of one phase. Phases follow each other; what lives for the whole run counts in each.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Phase {
    pub name: &'static str,
    pub weights: usize,
    pub grads: usize,
    pub states: usize,
    pub activations: usize,
    pub workspace: usize,
    /// Of the program itself: tokenizer, tokens, buffers of the threads and files.
    pub host: usize,
}

impl Phase {
    /// `shared`: what the ops of a device share, whatever they work on.
    fn new(name: &'static str, host: usize, shared: usize, ledgers: &[Ledger]) -> Self {
        let sum = |kind| ledgers.iter().map(|l| l.get(kind)).sum::<usize>();
        Self {
            name,
            weights: sum(Kind::Weights),
            grads: sum(Kind::Grads),
            states: sum(Kind::States),
            activations: sum(Kind::Activations),
            workspace: shared + sum(Kind::Workspace),
            host,
        }
    }

    /// What the device holds: everything but `host`.
    pub fn device(&self) -> usize {
        self.weights + self.grads + self.states + self.activations + self.workspace
    }

    fn total(&self) -> usize {
        self.device() + self.host
    }
}

#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Plan {
    pub phases: Vec<Phase>,
    /// Tensors are in a GPU's memory, not in the host's.
    pub gpu: bool,
    /// Of the host, with the tensors if they are in its memory.
    pub peak_bytes: usize,
    /// Of the tensors, wherever they are.
    pub peak_device_bytes: usize,
    /// Of an average optimizer step; a multiply-add is two.
    pub flops_per_step: f64,
    pub parameters: usize,
    /// Those of the adapter that trains; `None` where all do.
    pub trained: Option<usize>,
    /// `None` where only the data could tell.
    pub max_steps: Option<u64>,
    pub micro_batch_tokens: usize,
    pub recompute: bool,
    /// What it would take to keep the references in memory that are asked about the policy's completions, rather than load
    /// each for its turn.
    pub resident_bytes: usize,
    /// On disk: hidden rows of references whose distributions the policy's are compared with.
    pub hidden_rows_bytes: usize,
}

/// Whose memory is limited.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Memory {
    /// The machine's: the program and, without a GPU, the tensors.
    Host,
    /// That of the tensors alone.
    Device,
}

impl Plan {
    /// The memory that runs out first: a GPU's where there is one.
    pub fn scarce(&self) -> Memory {
        if self.gpu { Memory::Device } else { Memory::Host }
    }

    pub fn bytes(&self, phase: &Phase, of: Memory) -> usize {
        match of {
            Memory::Host if self.gpu => phase.host,
            Memory::Host => phase.total(),
            Memory::Device => phase.device(),
        }
    }

    /// The phase that takes most.
    pub fn peak(&self, of: Memory) -> &Phase {
        self.phases.iter().max_by_key(|phase| self.bytes(phase, of)).expect("a run has phases")
    }

    pub fn peak_of(&self, of: Memory) -> usize {
        self.bytes(self.peak(of), of)
    }

    /// Whether references that are asked about the policy's completions stay in memory, of which `available` bytes are left.
    /// The plan is then with them.
    pub fn choose_residency(&mut self, available: Option<usize>) -> Residency {
        let needed = self.peak_of(self.scarce()) + self.resident_bytes;
        if available.is_none_or(|available| needed > available) {
            return Residency::Streamed;
        }
        // They come with the policy.
        let from = self.phases.iter().position(|phase| phase.name == "load").unwrap_or(0);
        self.phases[from..].iter_mut().for_each(|phase| phase.weights += self.resident_bytes);
        self.set_peaks();
        Residency::Resident
    }

    fn set_peaks(&mut self) {
        (self.peak_bytes, self.peak_device_bytes) = (self.peak_of(Memory::Host), self.peak_of(Memory::Device));
    }

    /// The settings that this plan is of, as flags.
    pub fn flags(&self) -> String {
        format!("--micro-batch-tokens {}{}", self.micro_batch_tokens, if self.recompute { " --recompute" } else { "" })
    }
}

/// Steps that an average is taken over.
const SAMPLED_STEPS: u64 = 32;
/// Visits of examples that are looked at one by one to find the largest micro-batch; a longer run gets a bound.
const EXACT_VISITS: u64 = 1 << 22;

/// What goes through the engine, by size: enough to price the run under any memory setting.
pub struct Workload<'a> {
    checkpoint: &'a Checkpoint,
    method: optim::Method,
    lora: Option<&'a Lora>,
    references: Vec<Scoring<'a>>,
    /// What a reference that follows the policy starts as, if not as the policy.
    moving: Option<&'a Checkpoint>,
    /// References whose distributions the policy's are compared with.
    compared: Vec<&'a Checkpoint>,
    moments: Moments,
    values: bool,
    train: Vec<Extent>,
    eval: Vec<Extent>,
    /// Of each task the texts to score, and what is to be written.
    exams: Vec<(Vec<Extent>, Vec<Request<'a>>)>,
    /// Completions under other prompts, those that go through the engine together in one list.
    mismatched: Vec<Vec<Extent>>,
    /// Indices of the training examples in the order of the run, by step; `None` where they are too many.
    steps: Option<Vec<Vec<usize>>>,
    /// The same in the order of the file, each once.
    used: Vec<usize>,
    /// The first steps' examples, whose arithmetic is counted.
    sampled: Vec<Vec<&'a Example>>,
    /// Those that are sampled from.
    prompts: Vec<&'a [u32]>,
    fresh: Option<FreshWork<'a>>,
    rollouts: Option<RolloutWork<'a>>,
    host: Host,
    max_steps: Option<u64>,
    /// Examples of a step for each one that is sampled.
    alike: f64,
}

/// A reference and the sizes of what it scores, in order; `None` for the sizes of the policy's examples.
struct Scoring<'a> {
    reference: &'a Reference,
    own: Option<Vec<Extent>>,
}

/// Completions that are trained on.
struct RolloutWork<'a> {
    /// The longest prompt.
    prompt: &'a [u32],
    /// Those that are asked about them.
    references: &'a [FreshReference],
    /// The most that those of each prompt can come to.
    stand_ins: &'a [Example],
    rewards: &'a Rewards,
}

impl<'a> RolloutWork<'a> {
    fn new(task: &'a Task) -> Option<Self> {
        let rewards = task.rewards.as_ref()?;
        let prompts = task.train.examples.iter().map(|example| &example.sequences[0]).map(|s| &s.ids[..s.first]);
        let prompt = prompts.max_by_key(|prompt| prompt.len())?;
        Some(Self { prompt, references: &task.sampled_by, stand_ins: &task.stand_ins, rewards })
    }
}

/// Completions that evaluations ask of the policy, and of references what they think of them.
struct FreshWork<'a> {
    samples: usize,
    /// Tokens of one with its prompt, at most.
    longest: usize,
    prompts: Vec<drift::Prompt<'a>>,
    references: &'a [FreshReference],
    /// What judges them.
    gold: Option<&'a Rewards>,
}

impl<'a> FreshWork<'a> {
    fn new(task: &'a Task, settings: &Settings) -> Option<Self> {
        let prompts = drift::prompts(task, settings.kl_samples);
        let longest = prompts.iter().map(|prompt| prompt.ids.len()).max()? + settings.samples.max_new_tokens;
        let (references, gold) = (&task.fresh[..], task.gold.as_ref());
        Some(Self { samples: settings.kl_samples, longest, prompts, references, gold })
    }

    fn largest(&self, packing: Packing) -> Extent {
        drift::largest(packing, self.samples, self.longest)
    }
}

/// Adds the phase in which completions are judged, and what judges them to all that follow the loading.
fn judging(rewards: &Rewards, storage: Storage, largest: &Extent, mut alone: Phase, phases: &mut Vec<Phase>) {
    let judges = rewards.plan(storage, largest);
    let with_judges = phases.iter_mut().skip_while(|phase| phase.name != "load");
    with_judges.for_each(|phase| phase.weights += judges.resident);
    (alone.weights, alone.activations) = (alone.weights + judges.resident, judges.judging);
    phases.push(alone);
}

impl<'a> Scoring<'a> {
    fn new(task_reference: &'a TaskReference, used: &[usize], packing: Packing) -> Self {
        let own = task_reference.own.as_ref().map(|own| {
            let train = used.iter().map(|i| &own.train[*i]);
            packing.extents(train.chain(&own.eval))
        });
        Self { reference: &task_reference.reference, own }
    }
}

impl<'a> Workload<'a> {
    pub fn new(task: &'a Task, settings: &Settings) -> Self {
        let packing = settings.packing;
        let used = task.used_examples(settings);
        let trained = if task.stand_ins.is_empty() { &task.train.examples } else { &task.stand_ins };
        let sampled = (1..=task.max_steps.min(task.steps_per_epoch).clamp(1, SAMPLED_STEPS)).collect::<Vec<_>>();
        let first = task.order(settings, 0);
        let examples = |step: &u64| {
            let (_, range) = task.place_of_step(settings, *step);
            first[range].iter().map(|i| &trained[*i]).collect()
        };
        Self {
            checkpoint: &task.checkpoint,
            method: task.method,
            lora: task.lora.as_ref(),
            references: task.references.iter().map(|r| Scoring::new(r, &used, packing)).collect(),
            moving: task.moving.as_ref(),
            compared: task.compared().into_iter().map(|(checkpoint, _)| checkpoint).collect(),
            moments: moments(&task.objective.needs()),
            values: task.objective.needs().values,
            mismatched: under_other_prompts(task, settings),
            train: packing.extents(trained),
            eval: packing.extents(task.eval.iter().flat_map(|eval| &eval.examples)),
            exams: task.exams.iter().map(|exam| (exam.extents(packing), exam.requests())).collect(),
            steps: steps(task, settings),
            used,
            sampled: sampled.iter().map(examples).collect(),
            prompts: task.prompts(settings),
            fresh: FreshWork::new(task, settings),
            rollouts: RolloutWork::new(task),
            host: Host::new(task, settings),
            max_steps: Some(task.max_steps),
            alike: 1.0,
        }
    }

    /// The largest micro-batch of the run, of training or evaluation.
    fn largest(&self, packing: Packing, batch_size: usize) -> Extent {
        let step = |step: &Vec<usize>| packing.largest(step.iter().map(|i| &self.train[*i]));
        let train = match (&self.rollouts, &self.steps) {
            (Some(work), _) => online::largest(packing, work.stand_ins, batch_size),
            (None, Some(steps)) => steps.iter().map(step).fold(Extent::default(), Extent::max),
            (None, None) => packing.bound(&self.train, batch_size),
        };
        let mismatched = self.mismatched.iter().map(|together| packing.largest(together));
        let fresh = self.fresh.as_ref().map_or(Extent::default(), |fresh| fresh.largest(packing));
        let exams = self.exams.iter().map(|(texts, _)| packing.largest(texts));
        mismatched.chain(exams).fold(train.max(packing.largest(&self.eval)).max(fresh), Extent::max)
    }

    pub fn blueprint(&self, settings: &Settings) -> Blueprint<'a> {
        let largest = self.largest(settings.packing, settings.batch_size);
        let longest_prompt = self.prompts.iter().map(|prompt| prompt.len()).max();
        let samples = longest_prompt.map_or(0, |longest| longest + settings.samples.max_new_tokens);
        let written = self.exams.iter().flat_map(|(_, requests)| requests).map(Request::longest).max().unwrap_or(0);
        Blueprint {
            checkpoint: self.checkpoint,
            init: settings.init,
            method: self.method,
            hyper: settings.hyper,
            schedule: settings.schedule(self.max_steps.unwrap_or(1)),
            largest,
            positions: largest
                .longest
                .max(samples)
                .max(written)
                .max(self.fresh.as_ref().map_or(0, |fresh| fresh.longest)),
            keep: if settings.recompute { Keep::Inputs } else { Keep::Everything },
            lora: self.lora,
            extras: Extras {
                moving: settings.references.moving.zip(self.moving.or(Some(self.checkpoint))),
                compared: self.compared.clone(),
                moments: self.moments,
                values: self.values,
            },
        }
    }

    /// The plan of the run under these settings, of which only packing and recompute may differ from those that this
    /// workload was made with.
    pub fn plan(&self, settings: &Settings) -> Result<Plan> {
        let blueprint = self.blueprint(settings);
        let (largest, host) = (blueprint.largest, &self.host);
        let scored =
            self.used.iter().map(|i| &self.train[*i]).chain(&self.eval).chain(self.mismatched.iter().flatten());
        let scored: Vec<Extent> = scored.copied().collect();
        let storage = settings.keeps();
        let (run, pass) = blueprint.plan(storage);
        let mut names = self.checkpoint.dry();
        let params = names.params_mut();
        let tensor = params.iter().map(|p| p.value.len()).max().unwrap_or(0) * size_of::<f32>();
        let rank = blueprint.rank();
        let drawing = if self.rollouts.is_some() { host.drawing(&self.checkpoint.spec) } else { 0 };
        let working = host.working(&self.checkpoint.spec, &largest, rank) + drawing;

        let shared = if settings.gpu { cuda::Options::WORKSPACE_BYTES } else { 0 };
        let phase = |name, host, ledgers: &[Ledger]| Phase::new(name, host, shared, ledgers);

        let mut phases = vec![phase("read", host.reading(), &[])];
        for Scoring { reference, own } in &self.references {
            let shard = largest_shard(settings.packing, own.as_ref().unwrap_or(&scored));
            let host = working + reference.largest_tensor() * size_of::<f32>();
            let ledgers: Vec<Ledger> = reference.plan(storage, &shard).into_iter().collect();
            phases.push(phase("score", host, &ledgers));
        }
        for checkpoint in &self.compared {
            let largest = settings.packing.bound(&scored, scored.len());
            phases.push(phase("score", working, &[references::plan(storage, (checkpoint, settings.init), &largest)]));
        }
        // The difference from a base model is taken and trimmed on the host: two buffers, and magnitudes in f64.
        let loading = if self.method.merges() { 4 * tensor } else { tensor };
        phases.push(phase("load", working + loading, &[run]));
        phases.push(phase("train", working, &[run, pass]));
        let decoding =
            |requests: &[Request], running| rollout::plan(storage, &self.checkpoint.spec, rank, requests, running);
        if !self.prompts.is_empty() {
            let decoding = decoding(&sample_requests(settings, &self.prompts), rollout::MAX_RUNNING);
            phases.push(phase("sample", working, &[run, decoding]));
        }
        for (_, requests) in self.exams.iter().filter(|(_, requests)| !requests.is_empty()) {
            let decoding = decoding(requests, tasks::TOGETHER);
            phases.push(phase("sample", working, &[run, decoding]));
        }
        let mut resident_bytes = 0;
        if let Some(fresh) = &self.fresh {
            let decoding = decoding(&drift::requests(settings, &fresh.prompts), drift::TOGETHER);
            phases.push(phase("sample", working, &[run, decoding]));
            let largest = fresh.largest(settings.packing);
            for reference in fresh.references.iter().filter(|reference| !reference.is_policy) {
                // What is a token here may be two there.
                let largest = if reference.tokenizer.is_some() { largest.join(largest) } else { largest };
                let ledger = reference.asked(largest).plan(storage);
                phases.push(phase("ask", working, &[run, ledger]));
                resident_bytes += if reference.tokenizer.is_some() { 0 } else { ledger.total() };
            }
        }
        resident_bytes += self.rollout_phases(settings, (run, working), &phase, &mut phases);
        phases.push(phase("save", working + tensor, &[run]));
        let mut plan = Plan {
            phases,
            gpu: settings.gpu,
            peak_bytes: 0,
            peak_device_bytes: 0,
            flops_per_step: self.flops_per_step(&blueprint, settings.packing)?,
            parameters: params.iter().map(|p| p.value.len()).sum(),
            trained: self.lora.map(|_| blueprint.trained()),
            max_steps: self.max_steps,
            micro_batch_tokens: settings.packing.budget,
            recompute: settings.recompute,
            resident_bytes,
            hidden_rows_bytes: self.hidden_rows_bytes(),
        };
        plan.set_peaks();
        Ok(plan)
    }

    /// Those of completions that are judged by a gold reward, and of those that are trained on: written by the policy, judged, scored
    /// by references. Returns what those take while they stay in memory.
    fn rollout_phases(
        &self,
        settings: &Settings,
        (run, working): (Ledger, usize),
        phase: &dyn Fn(&'static str, usize, &[Ledger]) -> Phase,
        phases: &mut Vec<Phase>,
    ) -> usize {
        let judged = self.fresh.as_ref().and_then(|fresh| Some((fresh.gold?, fresh.largest(settings.packing))));
        if let Some((gold, largest)) = judged {
            judging(gold, settings.keeps(), &largest, phase("reward", working, &[run]), phases);
        }
        let (Some(work), Some(rollouts)) = (&self.rollouts, &settings.rollouts) else { return 0 };
        let (storage, rank) = (settings.keeps(), self.blueprint(settings).rank());
        let requests = vec![online::request(settings, rollouts, work.prompt); settings.batch_size];
        let decoding = rollout::plan(storage, &self.checkpoint.spec, rank, &requests, rollout::MAX_RUNNING);
        let host = self.host.generating(&self.checkpoint.spec, rank, &requests);
        phases.push(phase("rollout", working.max(host), &[run, decoding]));
        let largest = online::largest(settings.packing, work.stand_ins, settings.batch_size);
        judging(work.rewards, storage, &largest, phase("reward", working, &[run]), phases);
        let others = work.references.iter().filter(|reference| !reference.is_policy);
        let asked = others.map(|reference| {
            let ledger = reference.asked(largest).plan(storage);
            phases.push(phase("ask", working, &[run, ledger]));
            ledger.total()
        });
        asked.sum()
    }

    fn hidden_rows_bytes(&self) -> usize {
        let tokens: usize =
            self.used.iter().map(|i| &self.train[*i]).chain(&self.eval).map(|extent| extent.targets).sum();
        self.compared.iter().map(|checkpoint| tokens * checkpoint.spec.hidden * size_of::<bf16>()).sum()
    }

    /// FLOPs of forward and backward over an average step.
    fn flops_per_step(&self, blueprint: &Blueprint, packing: Packing) -> Result<f64> {
        let (dry, mut arena) = (Dry::default(), Dry::arena(DType::F32));
        let spec = &self.checkpoint.spec;
        let (largest, naming) = (&blueprint.largest, self.checkpoint.architecture.naming);
        let mut model = Model::new(&mut arena, spec, naming, blueprint.options());
        let mut acts =
            Acts::new(&mut arena, spec, largest, blueprint.keep).with_low_rank(&mut arena, model.widest_rank());
        let mut batch = Batch::new(&mut arena, largest);
        let heads = RefHeads::new(&mut arena, spec, &self.compared)?;
        let mut kl = KlActs::new(&mut arena, &heads, largest.targets);
        for examples in &self.sampled {
            for (_, host) in packing.batches(examples) {
                batch.load(&dry, &host)?;
                let derivatives = vec![0.0; host.targets.len()];
                match spec.head {
                    Head::Score => {
                        model.scores(&dry, &batch, &mut acts)?;
                        model.backward_scores(&dry, &batch, &derivatives, &mut acts)?;
                    }
                    Head::Tied | Head::Own => {
                        model.forward(&dry, &batch, &mut acts)?;
                        let dkl = vec![0.0; self.compared.len() * host.targets.len()];
                        let term = match heads.refs() {
                            0 => None,
                            _ => {
                                model.token_kl(&dry, &batch, &acts, &heads, &mut kl)?;
                                Some(KlTerm { heads: &heads, acts: &mut kl, dkl: &dkl })
                            }
                        };
                        model.backward(&dry, &batch, &derivatives, &mut acts, term)?;
                    }
                }
            }
        }
        Ok(self.alike * dry.flops() as f64 / self.sampled.len() as f64)
    }
    /// From the longest example, below which no micro-batch can be, to the whole of the largest step.
    fn rows(&self, settings: &Settings) -> (usize, usize) {
        let exams = self.exams.iter().flat_map(|(texts, _)| texts);
        let floor = self.train.iter().chain(&self.eval).chain(exams).map(|extent| extent.rows).max().unwrap_or(1);
        let all = self.largest(Packing { budget: usize::MAX, ..settings.packing }, settings.batch_size);
        (floor, all.rows)
    }
}

/// How many steps need to be looked at to know all of them; `None` where they are too many.
fn exact_steps(task: &Task, settings: &Settings) -> Option<u64> {
    // Every epoch of a run without shuffling is the first.
    let last = if settings.shuffle { task.max_steps } else { task.max_steps.min(task.steps_per_epoch) };
    let visits = last.saturating_mul(settings.batch_size.min(task.train.examples.len()) as u64);
    (visits <= EXACT_VISITS).then_some(last)
}

fn steps(task: &Task, settings: &Settings) -> Option<Vec<Vec<usize>>> {
    let (last, mut steps) = (exact_steps(task, settings)?, Steps::new(task, settings));
    Some((1..=last).map(|step| steps.examples(step).to_vec()).collect())
}

/// Sizes of the completions under other prompts that go through the engine together: of each step and of what is held out.
fn under_other_prompts(task: &Task, settings: &Settings) -> Vec<Vec<Extent>> {
    if !task.objective.needs().mismatched {
        return Vec::new();
    }
    let extents = |examples: &[Example]| settings.packing.extents(examples);
    let mut all = match exact_steps(task, settings) {
        Some(last) => {
            let mut steps = Steps::new(task, settings);
            (1..=last).map(|step| extents(&steps.mismatched(step))).collect()
        }
        None => {
            let sequences = || task.train.examples.iter().flat_map(|example| &example.sequences);
            let most = |f: fn(&Sequence) -> usize| sequences().map(f).max().unwrap_or(0);
            let longest = most(|s| s.first) + most(|s| s.ids.len() - s.first);
            let longest = longest.min(settings.encode.max_length.unwrap_or(usize::MAX));
            let extent = Extent { rows: longest, targets: longest, segments: 1, sequences: 1, longest };
            vec![vec![extent; 2 * settings.batch_size]]
        }
    };
    all.push(extents(&task.mismatched_held_out()));
    all
}

/// A run whose data is not at hand: every sequence as long as `--max-length` allows, a quarter of it prompt.
pub struct Assumed {
    checkpoint: Checkpoint,
    method: optim::Method,
    lora: Option<Lora>,
    references: Vec<Reference>,
    /// The policy's distributions are compared with the references'.
    compared: bool,
    moments: Moments,
    values: bool,
    example: Example,
}

impl Assumed {
    pub fn new(settings: &Settings, max_length: usize) -> Result<Self> {
        let objective = super::task::objective(settings)?;
        let needs = objective.needs();
        let sequences = if needs.pairs || needs.labels { 2 } else { 1 };
        let sequence = Sequence::new(vec![0; max_length], (max_length / 4).max(1));
        let checkpoint = super::task::policy_checkpoint(settings, objective.as_ref())?;
        if let Some(most) = checkpoint.spec.most_positions().filter(|most| *most < max_length) {
            let model = checkpoint.dir.display();
            let detail = format!("{max_length}, but {model} has learned positions for {most}; give {most} or less");
            return Err(Error::option("--max-length", detail));
        }
        Ok(Self {
            checkpoint,
            method: settings.optimizer.build()?,
            lora: settings.lora.clone(),
            references: super::references::references(settings, objective.as_ref())?,
            compared: needs.token_kl,
            moments: moments(&needs),
            values: needs.values,
            example: Example { sequences: vec![sequence; sequences], ..Example::default() },
        })
    }

    pub fn workload(&self, settings: &Settings) -> Workload<'_> {
        let extent = settings.packing.extents([&self.example])[0];
        // All examples are equal, so one full micro-batch stands for all of them.
        let full = (MAX_USEFUL.max(settings.packing.budget) / extent.rows).clamp(1, settings.batch_size);
        Workload {
            checkpoint: &self.checkpoint,
            method: self.method,
            lora: self.lora.as_ref(),
            references: self.references.iter().map(|reference| Scoring { reference, own: None }).collect(),
            moving: None,
            compared: self
                .compared
                .then(|| self.references.iter().filter_map(Reference::checkpoint))
                .into_iter()
                .flatten()
                .collect(),
            moments: self.moments,
            values: self.values,
            mismatched: Vec::new(),
            train: vec![extent; full],
            eval: Vec::new(),
            exams: Vec::new(),
            steps: Some(vec![(0..full).collect()]),
            used: (0..full).collect(),
            sampled: vec![vec![&self.example; full]],
            prompts: Vec::new(),
            fresh: None,
            rollouts: None,
            host: Host::without_data(settings),
            max_steps: settings.max_steps,
            alike: settings.batch_size as f64 / full as f64,
        }
    }
}

/// Rows beyond which a larger micro-batch gains nothing: a weight is then used for 6 x 8192 FLOPs each time that its
/// value and gradient go through memory, more than any machine's ratio of arithmetic to memory traffic.
const MAX_USEFUL: usize = 8192;
/// Steps between the micro-batches that are tried, in rows.
const ROWS_STEP: usize = 64;

/// What was found for a limit.
pub struct Choice {
    /// The best plan that fits, or the smallest there is.
    pub plan: Plan,
    pub fits: bool,
    /// Rows of the longest example: no micro-batch can be smaller.
    pub floor: usize,
}

/// The settings that keep a run within `limit` bytes: without recompute if possible, then the largest micro-batch of
/// use. What the user fixed stays: a micro-batch unless `free_rows`, recompute where it is on.
pub fn fit(workload: &Workload, settings: &Settings, of: Memory, limit: usize, free_rows: bool) -> Result<Choice> {
    let (floor, all) = workload.rows(settings);
    let plan = |budget: usize, recompute: bool| {
        let packing = Packing { budget, ..settings.packing };
        workload.plan(&Settings { packing, recompute, ..settings.clone() })
    };
    let fits = |plan: &Plan| plan.peak_of(of) <= limit;
    let least = if free_rows { floor } else { settings.packing.budget };
    let most = if free_rows { all.min(MAX_USEFUL).max(floor) } else { settings.packing.budget };
    for recompute in if settings.recompute { [true].iter() } else { [false, true].iter() } {
        let mut best = plan(least, *recompute)?;
        if !fits(&best) {
            continue;
        }
        // A larger budget takes more, but for the luck of packing: what is returned was itself found to fit.
        let (mut low, mut high) = (0, (most - least).div_ceil(ROWS_STEP));
        while low < high {
            let middle = (low + high).div_ceil(2);
            let larger = plan((least + middle * ROWS_STEP).min(most), *recompute)?;
            if fits(&larger) {
                (low, best) = (middle, larger);
            } else {
                high = middle - 1;
            }
        }
        return Ok(Choice { plan: best, fits: true, floor });
    }
    Ok(Choice { plan: plan(least, true)?, fits: false, floor })
}

/// What to say before a run that the machine, or its GPU, has no memory for; nothing where it has. A run that is resumed
/// keeps its micro-batches.
pub fn warning(workload: &Workload, settings: &Settings, plan: &Plan, available: usize) -> Result<Option<String>> {
    let of = plan.scarce();
    if plan.peak_of(of) <= available {
        return Ok(None);
    }
    let human = crate::machine::human;
    let resumed = settings.resume.is_some() && is_run(&settings.output_dir);
    let choice = fit(workload, settings, of, available, !resumed)?;
    let advice = match choice.fits {
        true => format!("{} would take {}", choice.plan.flags(), human(choice.plan.peak_of(of))),
        false => format!(
            "no setting of --micro-batch-tokens and --recompute takes less than {}; a smaller --max-length or model would",
            human(choice.plan.peak_of(of))
        ),
    };
    let (needed, free) = (human(plan.peak_of(of)), human(available));
    let memory = if plan.gpu { "GPU memory" } else { "memory" };
    Ok(Some(format!("warning: this run takes {needed} of {memory} and {free} are available; {advice}")))
}

/// One sample of each prompt, each from its own stream.
pub fn sample_requests<'a>(settings: &Settings, prompts: &[&'a [u32]]) -> Vec<Request<'a>> {
    let s = settings.samples;
    let sampling = Sampling { temperature: s.temperature, top_p: s.top_p, ..Sampling::plain(settings.seed) };
    let request = |(first_sample, prompt): (u64, &&'a [u32])| Request {
        first_sample,
        ..Request::new(prompt, s.max_new_tokens, sampling)
    };
    (0..).zip(prompts).map(request).collect()
}
