//! Every subcommand and flag. A field's name is its recipe key, its doc comment its help text. Groups that
//! belong together are structs of their own, flattened into the subcommands that use them.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};

use clap::{Arg, ArgAction, ArgMatches, Args, FromArgMatches, Parser, Subcommand, ValueEnum};
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use super::adapters::{AdapterArgs, LoraArgs};
use super::alarm::AlarmArgs;
use super::compare::{Compare, Grid, grid, only_here};
use super::lab::{LabArgs, WatchArgs};
use super::lineage::LineageArgs;
use super::merge::MergeArgs;
use super::references::RefArgs;
use super::rollouts::RolloutArgs;
use super::run::StagesArgs;
use super::serve::ServeArgs;
use super::soup::SoupArgs;
use super::tasks::{TaskArg, TaskArgs};
use super::written::WrittenArgs;
use super::{flags, is_given, needs, recipe};
use crate::device::DType;
use crate::lab::Pairs;
use crate::objectives::{self, Choice};
use crate::optim;
use crate::params::Params;
use crate::rewards::RewardSpec;
use crate::train::StopWhen;
use crate::{Error, Result};

/// Align language models to human preferences.
#[derive(Debug, Clone, PartialEq, Parser)]
#[command(
    version,
    max_term_width = 110,
    after_help = "\
Start here:
  cuvee train recipes/quickstart.toml     train a small model on preference pairs, in well under a minute
  cuvee train --help                      every option, with units and defaults"
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Clone, PartialEq, Subcommand)]
pub enum Command {
    /// Train a model on preference data
    Train(TrainArgs),
    /// Print what a training run will cost in memory and arithmetic, without running it
    Plan(PlanArgs),
    /// Run many variants of a recipe over several seeds and tabulate what they are worth: any that it lists, or each of
    /// several references and their blends
    Compare(Compare),
    /// Run a recipe of stages, from data to a report: fine-tuning, reward models, alignment, soups, measurements, over several seeds
    Run(StagesArgs),
    /// Look at the machine: cores, instruction sets, speed, memory, disk, GPU; say what is missing
    Doctor(DoctorArgs),
    /// Write the log-probabilities a model gives to the completions of a data set
    Logps(LogpsArgs),
    /// Write the scores a reward model gives to texts, or what rewards make of completions
    Score(ScoreArgs),
    /// Measure models: preferences on held-out pairs, or tasks: multiple choice, perplexity, exact match, reward
    Eval(EvalArgs),
    /// Complete a prompt with a model
    Generate(GenerateArgs),
    /// Answer requests over HTTP as OpenAI does, with a blend of adapters for each
    Serve(ServeArgs),
    /// Show what a model will see of a data set: its tokens, what is scored, why rows are dropped
    Preview(PreviewArgs),
    /// List what this build knows: objectives, modifiers of objectives, optimizers, methods of merging, architectures
    List(ListArgs),
    /// Look after the cache of what references say: list, verify, remove
    Cache(CacheArgs),
    /// Merge models into one, tensor by tensor: soups, task arithmetic, SLERP, TIES, DARE, DELLA and others
    Merge(MergeArgs),
    /// Blend policies of one base with any weights: write a blend, sweep over all of them, find a user's weights
    Soup(SoupArgs),
    /// Show where a model comes from: what made it, of which parents and data, under which licences
    Lineage(LineageArgs),
    /// Find where alignment starts to hurt: toys, fits of the gold reward over distance, sweeps and their report
    Lab(LabArgs),
    /// Render the report of a sweep again and again while it runs
    Watch(WatchArgs),
}

#[derive(Debug, Clone, PartialEq, Args, Serialize)]
#[command(
    allow_negative_numbers = true,
    after_help = "\
A recipe is a TOML file whose keys are the flags above with _ for -. Paths in it start at its folder.
A flag given here overrides the recipe. OUTPUT_DIR/recipe.toml records every value a run used.

Examples:
  cuvee train recipes/quickstart.toml
  cuvee train recipes/quickstart.toml --beta 0.3 --output-dir runs/beta-0.3
  cuvee train --objective sigmoid --beta 0.1 --model DIR --dataset FILE --output-dir runs/first
  cuvee train runs/first/recipe.toml --resume-from-checkpoint auto"
)]
pub struct TrainArgs {
    /// Preference pairs to train on: .jsonl, .json, .parquet or .csv
    #[arg(long, value_name = "FILE", help_heading = "Files")]
    pub dataset: PathBuf,
    /// Folder for the trained model, checkpoints, metrics and recipe.toml
    #[arg(long, value_name = "DIR", help_heading = "Files")]
    pub output_dir: PathBuf,
    #[command(flatten)]
    #[serde(flatten)]
    pub run: RunArgs,
}

#[derive(Debug, Clone, PartialEq, Args)]
#[command(
    allow_negative_numbers = true,
    after_help = "\
Takes the recipe and flags of `cuvee train`: write plan for train in the command you mean to run.

Examples:
  cuvee plan recipes/quickstart.toml
  cuvee plan recipes/quickstart.toml --ram auto
  cuvee plan recipes/quickstart.toml --device cuda --dtype bf16 --vram 24GiB
  cuvee plan --objective sigmoid --beta 0.1 --model DIR --max-length 4096 --recompute --json"
)]
pub struct PlanArgs {
    /// Preference pairs to train on; their real lengths sharpen the plan [default: assume --max-length]
    #[arg(long, value_name = "FILE", help_heading = "Files")]
    pub dataset: Option<PathBuf>,
    /// Taken so that a training command can be planned as it stands; nothing is written
    #[arg(long, value_name = "DIR", help_heading = "Files")]
    pub output_dir: Option<PathBuf>,
    #[command(flatten)]
    pub run: RunArgs,
    /// Choose --micro-batch-tokens and --recompute so that the run takes no more memory than this, such as 8GiB;
    /// auto = what is available here. What is given beside it stays as it is
    #[arg(long, value_name = "SIZE|auto", value_parser = ram, help_heading = "Limit")]
    pub ram: Option<Ram>,
    /// The same for the memory of the GPU, or of the tensors on a CPU; auto = what is free on the GPU. With --device cuda
    /// a run can be planned where there is no GPU
    #[arg(long, value_name = "SIZE|auto", value_parser = ram, conflicts_with = "ram", help_heading = "Limit")]
    pub vram: Option<Ram>,
    /// Print the plan as JSON
    #[arg(long, help_heading = "Output")]
    pub json: bool,
}

#[derive(Debug, Clone, PartialEq, Args)]
#[command(
    allow_negative_numbers = true,
    after_help = "\
A recipe that lists runs as [[arm]] is an experiment: its keys at the top are the defaults of every run, [[prepare]] are runs
that arms start from, @name is what another run made, [arm.grid] has a list of values for each key, merge = { .. } in
place of training takes what `cuvee merge` takes, and [measure] says what `cuvee eval` is told about each (tasks,
reward_model, baseline = @name) and which metrics are the two axes: reward and ability, TASK/METRIC.
recipes/alignment-tax.toml is one. Every run is a process; one that fails stops only what starts from it; the same
command goes on after an interruption, and runs again what changed. OUTPUT_DIR gets compare.txt, .md, .json and .svg.

How to choose a parameter, as merge_weight: cuvee compare RECIPE --arms ondare --grid merge_weight=1e-7,1e-5,1e-3

Any other recipe is run with each --ref-model alone and with the geometric, harmonic and arithmetic mean, multi-dpo and mrpo
(harmonic, arwc weights, clipped: as released) of all, on several numbers of pairs and seeds. Everything is
measured against one anchor, the first reference: after --max-steps, and where the policies have gone equally far from
it (KL on completions of their own). OUTPUT_DIR gets compare.txt, compare.json, compare.svg and the runs' logs, no
models; the same command goes on after an interruption.

Examples:
  cuvee compare recipes/quickstart.toml --ref-model A --ref-model B --ref-model C --output-dir runs/compare
  cuvee compare recipes/quickstart.toml --ref-model A --ref-model B --arms A,B,geometric --pairs 200,all --seeds 5"
)]
pub struct CompareArgs {
    /// Preference pairs to train on: .jsonl, .json, .parquet or .csv
    #[arg(long, value_name = "FILE", help_heading = "Files")]
    pub dataset: PathBuf,
    /// Folder for the table, the curves and the runs' logs
    #[arg(long, value_name = "DIR", help_heading = "Files")]
    pub output_dir: PathBuf,
    #[command(flatten)]
    pub run: RunArgs,
    /// Runs of each arm, with --seed and the numbers after it; below 3 there is no spread worth the name
    #[arg(long, value_name = "N", default_value = "3", value_parser = steps, help_heading = "Comparison")]
    pub seeds: u64,
    /// How many pairs to train on, one table for each
    #[arg(long, value_name = "N,N..", default_value = "50,200,all", value_delimiter = ',', value_parser = pairs, help_heading = "Comparison")]
    pub pairs: Vec<Pairs>,
    /// Only these: folder names of references, geometric, harmonic, arithmetic, multi-dpo, mrpo [default: all]
    #[arg(long, value_name = "NAME,NAME..", value_delimiter = ',', help_heading = "Comparison")]
    pub arms: Vec<String>,
    /// Of a recipe with arms: run every arm that takes KEY with each of these values, as merge_weight=1e-7,1e-5,1e-3; repeat
    /// the flag for every combination
    #[arg(long, value_name = "KEY=V,V..", value_parser = grid, help_heading = "Comparison")]
    pub grid: Vec<Grid>,
    /// Of a recipe with arms: processes at a time, which share the cores [default: 1]
    #[arg(long, value_name = "N", value_parser = count, help_heading = "Comparison")]
    pub jobs: Option<usize>,
    /// Of a recipe with arms: print the result as JSON
    #[arg(long, help_heading = "Comparison")]
    pub json: bool,
}

/// What `train`, `plan` and `compare` share.
#[derive(Debug, Clone, PartialEq, Args, Serialize)]
pub struct RunArgs {
    /// Model to train: a Hugging Face folder (config.json, tokenizer.json, *.safetensors)
    #[arg(long, alias = "model-name-or-path", value_name = "DIR", help_heading = "Files")]
    pub model: PathBuf,
    /// Held-out pairs, evaluated before and after training
    #[arg(long, value_name = "FILE", help_heading = "Files")]
    pub eval_dataset: Option<PathBuf>,
    /// Where reference log-probabilities are kept between runs [default: $CUVEE_CACHE_DIR, else
    /// $XDG_CACHE_HOME/cuvee, else $HOME/.cache/cuvee]
    #[arg(long, value_name = "DIR", help_heading = "Files")]
    pub cache_dir: Option<PathBuf>,
    #[command(flatten)]
    #[serde(flatten)]
    pub loss: LossArgs,
    #[command(flatten)]
    #[serde(flatten)]
    pub refs: RefArgs,
    #[command(flatten)]
    #[serde(flatten)]
    pub adapters: AdapterArgs,
    #[command(flatten)]
    #[serde(flatten)]
    pub lora: LoraArgs,
    #[command(flatten)]
    #[serde(flatten)]
    pub optim: OptimArgs,
    #[command(flatten)]
    #[serde(flatten)]
    pub schedule: ScheduleArgs,
    #[command(flatten)]
    #[serde(flatten)]
    pub data: DataArgs,
    #[command(flatten)]
    #[serde(flatten)]
    pub save: SaveArgs,
    #[command(flatten)]
    #[serde(flatten)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    #[serde(flatten)]
    pub rollouts: RolloutArgs,
    #[command(flatten)]
    #[serde(flatten)]
    pub alarm: AlarmArgs,
    /// Where the first weights come from; random takes only config.json and the tokenizer from --model
    #[arg(long, value_name = "FROM", default_value = "checkpoint", help_heading = "Engine")]
    pub init: Init,
    /// Type of the weights that are written. On a GPU also of weights and activations in its memory: bf16 is computed
    /// with on tensor cores and updated through f32 master weights. The CPU computes in f32 either way
    #[arg(long, value_name = "TYPE", default_value = "f32", help_heading = "Engine")]
    pub dtype: Dtype,
    /// Save memory: recompute activations in the backward pass, for about a third more arithmetic
    #[arg(long, alias = "gradient-checkpointing", help_heading = "Engine")]
    pub recompute: bool,
    /// Show a profiler these steps of a run on a GPU alone, both ends included, counted from 1; nsys profile
    /// --capture-range=cudaProfilerApi --trace=cuda,nvtx cuvee train ... --profile-steps 5..8
    #[arg(long, value_name = "A..B", value_parser = step_range, help_heading = "Engine")]
    pub profile_steps: Option<StepRange>,
    #[command(flatten)]
    #[serde(flatten)]
    pub batching: BatchingArgs,
    #[command(flatten)]
    #[serde(flatten)]
    pub engine: EngineArgs,
}

/// What to train towards. The flags of parameters are those of the registry: an objective's file is all that knows them.
#[derive(Debug, Clone, PartialEq)]
pub struct LossArgs {
    pub objective: Vec<String>,
    /// As many as objectives, or none: then each is 1.
    pub objective_weights: Vec<f64>,
    pub params: Params,
}

const OBJECTIVE: &str = "objective";
const WEIGHTS: &str = "objective_weights";

impl Args for LossArgs {
    fn augment_args(command: clap::Command) -> clap::Command {
        let objective = Arg::new(OBJECTIVE)
            .long("objective")
            .alias("loss-type")
            .value_name("NAME")
            .action(ArgAction::Append)
            .required(true)
            .help("Loss to minimise; repeat the flag for a sum of several; `cuvee list objectives` names them all");
        let weights = Arg::new(WEIGHTS)
            .long("objective-weights")
            .alias("loss-weights")
            .value_name("F")
            .action(ArgAction::Append)
            .num_args(1..)
            .value_parser(positive)
            .help("Weight of each objective in the sum, in their order [default: 1 each]");
        let names: Vec<&str> = objectives::all().iter().map(|entry| entry.name).collect();
        let params = flags::args(objectives::params(), &names, "around losses on pairs");
        command.args([objective, weights].into_iter().chain(params).map(|arg| arg.help_heading("Objective")))
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for LossArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let many = |id| matches.get_many::<String>(id).into_iter().flatten().cloned().collect();
        let params = flags::given(matches, &objectives::params());
        let objective_weights = matches.get_many::<f64>(WEIGHTS).into_iter().flatten().copied().collect();
        Ok(Self { objective: many(OBJECTIVE), objective_weights, params })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Serialize for LossArgs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut table = serializer.serialize_map(None)?;
        match &self.objective[..] {
            [one] => table.serialize_entry(OBJECTIVE, one)?,
            several => table.serialize_entry(OBJECTIVE, several)?,
        }
        if !self.objective_weights.is_empty() {
            table.serialize_entry(WEIGHTS, &self.objective_weights)?;
        }
        self.params.iter().try_for_each(|(name, value)| table.serialize_entry(name, value))?;
        table.end()
    }
}

impl LossArgs {
    pub(super) fn choice(&self) -> Result<Choice> {
        let (names, weights) = (self.objective.len(), self.objective_weights.len());
        if weights > 0 && weights != names {
            let detail = format!("{weights} weights for {names} objectives; give one for each, in their order");
            return Err(Error::option("--objective-weights", detail));
        }
        let weights = self.objective_weights.iter().copied().chain(std::iter::repeat(1.0));
        Ok(Choice { terms: self.objective.iter().cloned().zip(weights).collect(), params: self.params.clone() })
    }
}

/// How weights are updated. As with losses, an optimizer's file is all that knows its flags.
#[derive(Debug, Clone, PartialEq)]
pub struct UpdateArgs {
    pub optimizer: String,
    pub params: Params,
}

const OPTIMIZER: &str = "optimizer";

impl Args for UpdateArgs {
    fn augment_args(command: clap::Command) -> clap::Command {
        let optimizer = Arg::new(OPTIMIZER)
            .long("optimizer")
            .value_name("NAME")
            .default_value("adamw")
            .help("Update rule; `cuvee list optimizers` names them all");
        let names: Vec<&str> = optim::all().iter().map(|entry| entry.name).collect();
        let params = flags::args(optim::params(), &names, "");
        command.args(std::iter::once(optimizer).chain(params).map(|arg| arg.help_heading("Optimizer")))
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for UpdateArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let optimizer = matches.get_one::<String>(OPTIMIZER).expect("it has a default").clone();
        Ok(Self { optimizer, params: flags::given(matches, &optim::params()) })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Serialize for UpdateArgs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut table = serializer.serialize_map(None)?;
        table.serialize_entry(OPTIMIZER, &self.optimizer)?;
        self.params.iter().try_for_each(|(name, value)| table.serialize_entry(name, value))?;
        table.end()
    }
}

impl UpdateArgs {
    pub(super) fn choice(&self) -> optim::Choice {
        optim::Choice { name: self.optimizer.clone(), params: self.params.clone() }
    }
}

#[derive(Debug, Clone, PartialEq, Args, Serialize)]
#[command(next_help_heading = "Optimizer")]
pub struct OptimArgs {
    #[command(flatten)]
    #[serde(flatten)]
    pub choice: UpdateArgs,
    /// The model before fine-tuning: optimizers that merge blend every update with what fine-tuning added to it
    #[arg(long, value_name = "DIR")]
    pub base_model: Option<PathBuf>,
    /// The fine-tuned model of that difference [default: the policy as it starts]
    #[arg(long, value_name = "DIR")]
    pub tau_model: Option<PathBuf>,
    /// Peak learning rate [default: TRL's: 2e-5 of sft and dft, 1e-4 of reward, 1e-6 of others]
    #[arg(long, value_name = "F", value_parser = positive)]
    pub learning_rate: Option<f64>,
    /// Course of the learning rate after warm-up; linear and cosine fall towards 0
    #[arg(long, value_name = "KIND", default_value = "linear")]
    pub lr_scheduler_type: LrSchedulerType,
    /// Share of all steps over which the learning rate rises from 0, 0 to 1
    #[arg(long, value_name = "F", default_value = "0", value_parser = zero_to_one)]
    pub warmup_ratio: f64,
    /// The same as a number of steps
    #[arg(long, value_name = "N", value_parser = count)]
    pub warmup_steps: Option<usize>,
    /// Decoupled weight decay, per unit of learning rate
    #[arg(long, value_name = "F", default_value = "0", value_parser = zero_or_more)]
    pub weight_decay: f64,
    /// Decay of the mean of gradients, 0 to below 1
    #[arg(long, value_name = "F", default_value = "0.9", value_parser = below_one)]
    pub adam_beta1: f64,
    /// Decay of the mean of squared gradients, 0 to below 1
    #[arg(long, value_name = "F", default_value = "0.999", value_parser = below_one)]
    pub adam_beta2: f64,
    /// Added to the denominator of the update
    #[arg(long, value_name = "F", default_value = "1e-8", value_parser = normal)]
    pub adam_epsilon: f64,
    /// Scale gradients down to this global norm; 0 = off
    #[arg(long, value_name = "F", default_value = "1.0", value_parser = zero_or_more)]
    pub max_grad_norm: f64,
    /// Round updated weights up or down at random, in proportion to the distance, rather than to the nearest: no update is
    /// too small to count on average. bf16 weights on a GPU then need no f32 copies, 4 bytes less for each
    #[arg(long)]
    pub stochastic_rounding: bool,
}

#[derive(Debug, Clone, PartialEq, Args, Serialize)]
#[command(next_help_heading = "Length of the run")]
pub struct ScheduleArgs {
    /// Passes over the training data; fractions are fine
    #[arg(long, value_name = "F", default_value = "1.0", value_parser = positive)]
    pub num_train_epochs: f64,
    /// Optimizer steps; overrides --num-train-epochs
    #[arg(long, value_name = "N", value_parser = steps)]
    pub max_steps: Option<u64>,
    /// Stop after this step with a checkpoint, schedules unchanged, to be resumed later; below 1, behind this share of the
    /// steps, with the evaluation that comes next
    #[arg(long, value_name = "N", value_parser = step_or_share)]
    pub stop_at_step: Option<f64>,
    /// Continue from OUTPUT_DIR's newest checkpoint (auto; starts anew if there is none) or from this one
    #[arg(long, value_name = "auto|DIR")]
    pub resume_from_checkpoint: Option<Resume>,
    /// Seed of every random choice: order of the data, random weights, samples
    #[arg(long, value_name = "N", default_value = "42", value_parser = seed)]
    pub seed: u64,
}

#[derive(Debug, Clone, PartialEq, Args, Serialize)]
#[command(next_help_heading = "Data and batches")]
pub struct DataArgs {
    /// Pairs per batch; an optimizer step takes this many times --gradient-accumulation-steps
    #[arg(long, visible_alias = "batch-size", value_name = "N", default_value = "8", value_parser = count)]
    pub per_device_train_batch_size: usize,
    /// Batches per optimizer step
    #[arg(long, value_name = "N", default_value = "1", value_parser = count)]
    pub gradient_accumulation_steps: usize,
    /// Longest prompt with one completion, in tokens
    #[arg(long, value_name = "N", default_value = "1024", value_parser = length)]
    pub max_length: usize,
    /// What to do with a pair that is longer than --max-length
    #[arg(long, value_name = "WHAT", default_value = "drop")]
    pub on_overflow: OnOverflow,
    /// Of `messages`, score what the assistant says and not what is said to it [default: every token]
    #[arg(long)]
    pub assistant_only_loss: bool,
    /// Leave out the first N rows of the data set: with --take, runs that must not share rows can have their own
    #[arg(long, value_name = "N", default_value = "0", value_parser = zero_or_count)]
    pub skip: usize,
    /// Train on the first N rows of the data set, after those that are skipped [default: all]
    #[arg(long, value_name = "N", value_parser = count)]
    pub take: Option<usize>,
    /// Train on N rows of those, chosen at random by --seed [default: all]
    #[arg(long, value_name = "N", value_parser = count)]
    pub limit: Option<usize>,
    /// Keep the order of the file instead of shuffling it every epoch
    #[arg(long)]
    pub no_shuffle: bool,
}

#[derive(Debug, Clone, PartialEq, Args, Serialize)]
#[command(next_help_heading = "Evaluation and checkpoints")]
pub struct SaveArgs {
    /// Keep the newest N checkpoints, and the one that --on-alarm would go back to [default: all]
    #[arg(long, value_name = "N", value_parser = count)]
    pub save_total_limit: Option<usize>,
    /// Evaluate every N steps as well; needs --eval-dataset [default: only before and after]
    #[arg(long, value_name = "N", value_parser = steps)]
    pub eval_steps: Option<u64>,
    /// Compare with this model in evaluations, instead of the first reference: accuracy against other references is another
    /// number
    #[arg(long, value_name = "DIR")]
    pub eval_anchor: Option<PathBuf>,
    /// Let every evaluation ask the policy for N completions of held-out prompts, of --max-new-tokens at most, and measure on
    /// them how far it has gone from its references: KL, nats a completion; 0 = none
    #[arg(long, value_name = "N", default_value = "0", value_parser = zero_or_count)]
    pub kl_samples: usize,
    /// Let every evaluation give the policy this task, as `cuvee eval --task` does, but for rewards; repeat the flag for several
    #[arg(long, value_name = "[NAME=]FILE", value_parser = super::tasks::task)]
    pub eval_task: Vec<TaskArg>,
    /// End the run, finished and with a checkpoint, at the first of --eval-steps where a number of evaluations.jsonl lies beyond
    /// this bound, such as base/perplexity>50 for what a task named base measures, or accuracy<0.5; repeat the flag for several
    #[arg(long, value_name = "BOUND")]
    pub stop_when: Vec<StopWhen>,
    /// Write a checkpoint every N steps as well [default: only at the end]
    #[arg(long, value_name = "N", value_parser = steps)]
    pub save_steps: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Args, Serialize)]
#[command(next_help_heading = "Samples")]
pub struct SamplingArgs {
    /// Print N completions before and after training; prompts are --eval-dataset's; 0 = none
    #[arg(long, value_name = "N", default_value = "0", value_parser = zero_or_count)]
    pub samples: usize,
    /// Length limit of a sample, in tokens [default: --max-completion-length of a run on samples, else 48]
    #[arg(long, value_name = "N", value_parser = count)]
    pub max_new_tokens: Option<usize>,
    /// Randomness of a sample; 0 = always the likeliest token
    #[arg(long, value_name = "F", default_value = "0.8", value_parser = zero_or_more)]
    pub temperature: f64,
    /// Sample from the likeliest tokens that hold this share of the probability, above 0 to 1
    #[arg(long, value_name = "F", default_value = "0.95", value_parser = above_zero_to_one)]
    pub top_p: f64,
}

/// How sequences are put together for the engine.
#[derive(Debug, Clone, PartialEq, Args, Serialize)]
#[command(next_help_heading = "Engine")]
pub struct BatchingArgs {
    /// Tokens the engine runs at once; changes memory and speed, and results by rounding only [default: 2048]
    #[arg(long, value_name = "N", value_parser = count)]
    pub micro_batch_tokens: Option<usize>,
    /// Run every sequence on its own, its prompt included, even where two share it; for comparison
    #[arg(long)]
    pub no_prefix_sharing: bool,
}

/// What the engine runs on.
#[derive(Debug, Clone, PartialEq, Args, Serialize)]
#[command(next_help_heading = "Engine")]
pub struct EngineArgs {
    /// CPU threads, beside a GPU those that prepare its work [default: all cores]
    #[arg(long, value_name = "N", value_parser = threads)]
    pub threads: Option<usize>,
    /// Where to compute: auto, cpu, cuda or cuda:N; auto takes the first GPU that the kernels run on, else the CPU
    #[arg(long, value_name = "WHERE", default_value = "auto", value_parser = device)]
    pub device: Device,
    /// Leave the processor's matrix unit (AMX) alone: slower, but the bits of processors without one
    #[arg(long)]
    pub no_amx: bool,
    /// Multiply on a GPU with cuvee's kernels, not cuBLASLt's: slower, but no row's bits depend on how many others there
    /// are, as on the CPU
    #[arg(long)]
    pub batch_invariant: bool,
}

/// What a GPU computes in, where no weights are written.
#[derive(Debug, Clone, PartialEq, Args)]
#[command(next_help_heading = "Engine")]
pub struct PrecisionArgs {
    /// Type of weights and activations on a GPU; bf16 is computed with on tensor cores. The CPU knows f32 alone
    #[arg(long, value_name = "TYPE", default_value = "f32")]
    pub dtype: Dtype,
}

#[derive(Debug, Clone, PartialEq, Args)]
#[command(
    allow_negative_numbers = true,
    after_help = "\
Example:
  cuvee logps --model DIR --dataset pairs.jsonl --out logps.jsonl"
)]
pub struct LogpsArgs {
    /// Model: a Hugging Face folder
    #[arg(long, alias = "model-name-or-path", value_name = "DIR", help_heading = "Files")]
    pub model: PathBuf,
    /// Pairs to score: .jsonl, .json, .parquet or .csv
    #[arg(long, value_name = "FILE", help_heading = "Files")]
    pub dataset: PathBuf,
    /// Result: one JSON object a row, log-probabilities in nats
    #[arg(long, value_name = "FILE.jsonl", help_heading = "Files")]
    pub out: PathBuf,
    #[command(flatten)]
    pub adapters: AdapterArgs,
    #[command(flatten)]
    pub limits: LimitArgs,
    #[command(flatten)]
    pub batching: BatchingArgs,
    #[command(flatten)]
    pub engine: EngineArgs,
    #[command(flatten)]
    pub precision: PrecisionArgs,
}

#[derive(Debug, Clone, PartialEq, Args)]
#[command(
    allow_negative_numbers = true,
    after_help = "\
With --reward, rows get what a run that trains on these rewards would see, before it is run: `reward` is their weighted sum,
`rewards` each by its name, null where it says nothing; of pairs both completions are judged. The data's own completion is
the answer that exact_match compares with. `cuvee list rewards` names all kinds with what they take.

recipes/rewards/film.toml rates a film review by its words, and holds its length and repetitions in check:
  [[reward]]
  kind = \"lexicon\"
  file = \"../../assets/film-reviews/lexicon.tsv\"
  prior = 5

  [[reward]]
  kind = \"length\"
  unit = \"words\"
  min = 5
  max = 30
  slope = 0.1

Examples:
  cuvee score --model runs/reward --dataset pairs.jsonl --out scores.jsonl
  cuvee score --model runs/reward --text 'Review: a fine film.'
  cuvee score --reward recipes/rewards/film.toml --dataset assets/film-reviews/heldout.jsonl.gz --out scores.jsonl
  cuvee score --reward recipes/rewards/film.toml --reward runs/reward=0.5 --text 'a fine film.'"
)]
pub struct ScoreArgs {
    /// Reward model: a Hugging Face folder of a ..ForSequenceClassification with one label
    #[arg(
        long,
        alias = "model-name-or-path",
        value_name = "DIR",
        required_unless_present = "reward",
        help_heading = "Files"
    )]
    pub model: Option<PathBuf>,
    /// Score completions by this instead: a TOML file of [[reward]] tables, or a reward model's folder that judges as in
    /// training; and what it counts. Repeat the flag for several [default weight: 1]
    #[arg(
        long,
        value_name = "WHAT[=WEIGHT]",
        value_parser = RewardSpec::parse,
        conflicts_with_all = ["model", "adapter", "max_length", "on_overflow"],
        help_heading = "Files"
    )]
    pub reward: Vec<RewardSpec>,
    /// Folder of the model whose tokens are counted, for rewards in units of tokens
    #[arg(long, value_name = "DIR", conflicts_with = "model", help_heading = "Files")]
    pub tokenizer: Option<PathBuf>,
    /// Pairs, completions, texts or conversations to score: .jsonl, .json, .parquet or .csv
    #[arg(long, value_name = "FILE", required_unless_present = "text", requires = "out", help_heading = "Files")]
    pub dataset: Option<PathBuf>,
    /// Result: one JSON object a row; - is stdout
    #[arg(long, value_name = "FILE.jsonl", requires = "dataset", help_heading = "Files")]
    pub out: Option<PathBuf>,
    /// Score this text alone and print the score; write --text=TEXT if it starts with a dash
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["dataset", "out"], help_heading = "Files")]
    pub text: Option<String>,
    #[command(flatten)]
    pub adapters: AdapterArgs,
    #[command(flatten)]
    pub limits: LimitArgs,
    #[command(flatten)]
    pub batching: BatchingArgs,
    #[command(flatten)]
    pub engine: EngineArgs,
    #[command(flatten)]
    pub precision: PrecisionArgs,
}

#[derive(Debug, Clone, PartialEq, Args)]
#[command(
    allow_negative_numbers = true,
    after_help = "\
A task is a file of rows, .jsonl, .json, .parquet or .csv. Their columns say what is asked:

  choice       question (or query, context, prompt), choices, gold (or answer, label)
               how likely each choice is behind the question: acc, acc_norm (by characters)
               gold is an index from 0, a letter or the choice itself
  perplexity   text
               perplexity, nll (per token), word_perplexity, byte_perplexity, bits_per_byte
  exact_match  prompt (or question), target (or answer; a list of several), until
               the likeliest text up to a stop string: exact_match
  preference   prompt, chosen, rejected
               accuracy (a tie is a half) and margin, relative to --ref-model if given
  reward       prompt, and no answer; needs --reward-model
               sampled completions: reward, win_rate against the baseline's, answer_beaten
               (the row's own completion, if it has one), words, distinct_2, base_logp (of --base-model)

choice, perplexity and exact_match give the numbers of lm-evaluation-harness (without --task,
perplexity is that of --dataset's chosen or only completions alone). Questions and
texts that are too long are cut as it cuts them: to what config.json says that the model
reads at once, or to --max-length. A TOML file in place of the rows says what they cannot:

  data = \"gsm8k.jsonl.gz\"             # seen from this file
  kind = \"exact_match\"                # where columns do not tell
  prompt = \"Question: {{question}}\\nAnswer:\"    # Jinja over the columns, as is target
  until = [\"Question:\", \"</s>\"]
  filter = { regex = '#### (\\-?[0-9\\.\\,]+)', group_select = 0 }
  ignore_case = true                    # also ignore_punctuation, ignore_numbers
  regexes_to_ignore = [',', '\\$', '(?s).*#### ', '\\.$']

Further keys are max_new_tokens, samples (of reward) and delimiter (of choice).

Examples:
  cuvee eval --model runs/first --dataset heldout.jsonl
  cuvee eval --model runs/first --ref-model DIR --dataset heldout.jsonl --json
  cuvee eval --model runs/first --task cloze.jsonl.gz --task base=sentences.jsonl.gz
  cuvee eval --model runs/sft --model runs/dpo --task base=sentences.jsonl.gz \\
    --task prompts.jsonl.gz --reward-model runs/reward --plot front.svg"
)]
pub struct EvalArgs {
    /// Model: a Hugging Face folder. With --task repeat the flag for several, which are loaded one after the other
    #[arg(long, alias = "model-name-or-path", value_name = "DIR", required = true, help_heading = "Files")]
    pub model: Vec<PathBuf>,
    /// Compare log-probabilities relative to this model [default: compare them as they are]
    #[arg(long, value_name = "DIR", help_heading = "Files")]
    pub ref_model: Option<PathBuf>,
    /// Held-out pairs: .jsonl, .json, .parquet or .csv
    #[arg(
        long,
        value_name = "FILE",
        required_unless_present_any = ["task", "prompts"],
        conflicts_with = "task",
        help_heading = "Files"
    )]
    pub dataset: Option<PathBuf>,
    #[command(flatten)]
    pub tasks: TaskArgs,
    #[command(flatten)]
    pub written: WrittenArgs,
    #[command(flatten)]
    pub adapters: AdapterArgs,
    #[command(flatten)]
    pub limits: LimitArgs,
    #[command(flatten)]
    pub batching: BatchingArgs,
    #[command(flatten)]
    pub engine: EngineArgs,
    #[command(flatten)]
    pub precision: PrecisionArgs,
    /// Print the result as JSON
    #[arg(long, help_heading = "Output")]
    pub json: bool,
}

/// Limits on sequences where nothing is trained.
#[derive(Debug, Clone, PartialEq, Args)]
#[command(next_help_heading = "Data")]
pub struct LimitArgs {
    /// Longest prompt with one completion, in tokens [default: unlimited]
    #[arg(long, value_name = "N", value_parser = length)]
    pub max_length: Option<usize>,
    /// What to do with a pair that is longer than --max-length
    #[arg(long, value_name = "WHAT", default_value = "drop")]
    pub on_overflow: OnOverflow,
}

#[derive(Debug, Clone, PartialEq, Args)]
#[command(
    allow_negative_numbers = true,
    after_help = "\
Examples:
  cuvee generate --model runs/first --prompt 'The film was'
  cuvee generate --model runs/first --prompt 'The film was' --samples 3 --temperature 0.8
  cuvee generate --model runs/first --prompts questions.jsonl --samples 8 --out answers.jsonl
  cuvee generate --model runs/chat --chat --prompt 'Which film should I see?'"
)]
pub struct GenerateArgs {
    /// Model: a Hugging Face folder
    #[arg(long, alias = "model-name-or-path", value_name = "DIR")]
    pub model: PathBuf,
    /// Text to continue; write --prompt=TEXT if it starts with a dash
    #[arg(long, value_name = "TEXT", required_unless_present = "prompts")]
    pub prompt: Option<String>,
    /// Rows with a prompt each, text or messages: .jsonl, .json, .parquet or .csv; other columns are left alone
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt", "chat"], requires = "out")]
    pub prompts: Option<PathBuf>,
    /// Where the completions of --prompts go, a line each: text, tokens, why it ended, log-probabilities
    #[arg(long, value_name = "FILE", requires = "prompts")]
    pub out: Option<PathBuf>,
    /// Take the prompt as a user's message, put it into the model's chat template and print the answer
    #[arg(long)]
    pub chat: bool,
    /// Completions to write of each prompt
    #[arg(long, value_name = "N", default_value = "1", value_parser = count)]
    pub samples: usize,
    /// Length limit of a completion, in tokens
    #[arg(long, value_name = "N", default_value = "64", value_parser = count, help_heading = "Length")]
    pub max_new_tokens: usize,
    /// Tokens before which no completion ends by an end-of-text token
    #[arg(long, value_name = "N", default_value = "0", value_parser = zero_or_count, help_heading = "Length")]
    pub min_new_tokens: usize,
    /// Text that ends a completion, which is printed without it; may be given several times
    #[arg(long, value_name = "TEXT", value_parser = some_text, help_heading = "Length")]
    pub stop: Vec<String>,
    /// Randomness; 0 = always the likeliest token
    #[arg(long, value_name = "F", default_value = "1.0", value_parser = zero_or_more, help_heading = "Sampling")]
    pub temperature: f64,
    /// Sample from so many of the likeliest tokens; 0 = from all
    #[arg(long, value_name = "N", default_value = "0", value_parser = zero_or_count, help_heading = "Sampling")]
    pub top_k: usize,
    /// Sample from the likeliest tokens that hold this share of the probability, above 0 to 1
    #[arg(long, value_name = "F", default_value = "1.0", value_parser = above_zero_to_one, help_heading = "Sampling")]
    pub top_p: f64,
    /// Sample from tokens with this share of the likeliest one's probability, 0 to 1
    #[arg(long, value_name = "F", default_value = "0.0", value_parser = zero_to_one, help_heading = "Sampling")]
    pub min_p: f64,
    /// Divide the logits of tokens that came before by this, and multiply negative ones; 1 = change nothing
    #[arg(long, value_name = "F", default_value = "1.0", value_parser = positive, help_heading = "Sampling")]
    pub repetition_penalty: f64,
    /// Let so many tokens in a row come once only, prompt included; 0 = allow all
    #[arg(long, value_name = "N", default_value = "0", value_parser = zero_or_count, help_heading = "Sampling")]
    pub no_repeat_ngram_size: usize,
    /// Seed of the samples
    #[arg(long, value_name = "N", default_value = "42", value_parser = seed, help_heading = "Sampling")]
    pub seed: u64,
    /// Completions that run at a time, at most; default: as many as memory allows, up to 256. Texts do not depend on it
    #[arg(long, value_name = "N", value_parser = count, help_heading = "Memory")]
    pub max_running: Option<usize>,
    /// Memory to stay within: such as 8GiB; default: what this machine, or the GPU, has available
    #[arg(long, value_name = "SIZE", value_parser = bytes, help_heading = "Memory")]
    pub ram: Option<usize>,
    #[command(flatten)]
    pub adapters: AdapterArgs,
    #[command(flatten)]
    pub engine: EngineArgs,
    #[command(flatten)]
    pub precision: PrecisionArgs,
    /// Print the result as JSON
    #[arg(long, help_heading = "Output", conflicts_with = "prompts")]
    pub json: bool,
}

/// A limit on memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ram {
    /// What this machine has available.
    Auto,
    Bytes(usize),
}

#[derive(Debug, Clone, PartialEq, Args)]
pub struct DoctorArgs {
    /// The folder of cached reference log-probabilities to look at [default: as for `cuvee train`]
    #[arg(long, value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,
    /// Print the findings as JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, PartialEq, Args)]
#[command(after_help = "\
Shows each row as the engine runs it. The prompt is dim, what is scored is green, or red where it
is rejected or undesirable. Every second token is underlined; without colour | stands between two tokens.
\u{21b5} is a newline, \u{2423} a token of spaces, \u{22ef} a token that ends within a character.

Then the token ids, how many of a sequence are not scored (0) and scored (1), and the batch: a
prompt that completions share is run once, as their parent. What is odd about the whole file is
said at the end, as every other command says it.

Messages ({\"role\", \"content\"}) are rendered with the chat template of --model. Look here first
when a model does not stop, or learns to write its own prompt.

Examples:
  cuvee preview --model DIR --dataset pairs.jsonl
  cuvee preview --model DIR --dataset pairs.jsonl --line 17      # the row that a message names
  cuvee preview --model DIR --dataset pairs.jsonl --max-length 512 --on-overflow truncate
  cuvee preview --model DIR --dataset pairs.jsonl --color always | less -R
  cuvee preview --model DIR --dataset pairs.jsonl --rows 1000 --json | jq .sequences[0].first")]
pub struct PreviewArgs {
    /// Model: a Hugging Face folder; its tokenizer and chat template are read, its weights are not
    #[arg(long, alias = "model-name-or-path", value_name = "DIR", help_heading = "Files")]
    pub model: PathBuf,
    /// Rows to show: .jsonl, .json, .parquet or .csv
    #[arg(long, value_name = "FILE", help_heading = "Files")]
    pub dataset: PathBuf,
    /// Show the first N rows
    #[arg(long, value_name = "N", default_value = "3", value_parser = count, help_heading = "Rows")]
    pub rows: usize,
    /// Show this row alone, counted from 0 as in what `cuvee logps` writes
    #[arg(long, value_name = "N", conflicts_with = "rows", help_heading = "Rows")]
    pub row: Option<usize>,
    /// Show the row at this line of the file, or this record, counted from 1 as in messages
    #[arg(long, value_name = "N", conflicts_with_all = ["rows", "row"], help_heading = "Rows")]
    pub line: Option<usize>,
    #[command(flatten)]
    pub limits: LimitArgs,
    /// Show as scored what `cuvee train --assistant-only-loss` scores of `messages`
    #[arg(long, help_heading = "Rows")]
    pub assistant_only_loss: bool,
    /// When to use colour; auto is on a terminal, unless NO_COLOR is set
    #[arg(long, value_name = "WHEN", default_value = "auto", conflicts_with = "json", help_heading = "Output")]
    pub color: Color,
    /// Print one JSON object a row: ids, first scored token and text of each sequence; segments and positions of the batch
    #[arg(long, help_heading = "Output")]
    pub json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Color {
    Auto,
    Always,
    Never,
}

#[derive(Debug, Clone, PartialEq, Args)]
pub struct ListArgs {
    /// What to list
    #[arg(value_name = "WHAT")]
    pub what: Registry,
}

#[derive(Debug, Clone, PartialEq, Args)]
#[command(
    arg_required_else_help = true,
    after_help = "\
A file holds what one model says about any number of sequences. Its key tells models, devices and versions apart; the start
of a key is enough to name it.

Examples:
  cuvee cache ls
  cuvee cache verify
  cuvee cache rm 07ab12
  cuvee cache rm --older-than 30"
)]
pub struct CacheArgs {
    #[command(subcommand)]
    pub action: CacheAction,
}

#[derive(Debug, Clone, PartialEq, Subcommand)]
pub enum CacheAction {
    /// List the files: what they hold, how much, of which model
    Ls(CacheLsArgs),
    /// Read every byte of files, and check checksums and that all values are finite; exit code 1 if any is damaged
    Verify(CacheVerifyArgs),
    /// Remove files; what they held is scored again when it is needed
    Rm(CacheRmArgs),
}

#[derive(Debug, Clone, PartialEq, Args)]
pub struct CacheFolderArgs {
    /// Where the cache is [default: $CUVEE_CACHE_DIR, else $XDG_CACHE_HOME/cuvee, else $HOME/.cache/cuvee]
    #[arg(long, value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,
}

#[derive(Debug, Clone, PartialEq, Args)]
pub struct CacheLsArgs {
    /// Print the list as JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub folder: CacheFolderArgs,
}

#[derive(Debug, Clone, PartialEq, Args)]
pub struct CacheVerifyArgs {
    /// Keys, or their starts [default: all]
    #[arg(value_name = "KEY")]
    pub keys: Vec<String>,
    #[command(flatten)]
    pub folder: CacheFolderArgs,
}

#[derive(Debug, Clone, PartialEq, Args)]
#[command(allow_negative_numbers = true)]
pub struct CacheRmArgs {
    /// Keys, or their starts
    #[arg(value_name = "KEY", required_unless_present_any = ["all", "older_than"])]
    pub keys: Vec<String>,
    /// Remove every file
    #[arg(long, conflicts_with_all = ["keys", "older_than"])]
    pub all: bool,
    /// Remove files to which nothing was added for this many days
    #[arg(long, value_name = "DAYS", value_parser = positive, conflicts_with = "keys")]
    pub older_than: Option<f64>,
    #[command(flatten)]
    pub folder: CacheFolderArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Registry {
    Objectives,
    Modifiers,
    Optimizers,
    Merges,
    Rewards,
    Architectures,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LrSchedulerType {
    Constant,
    Linear,
    Cosine,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnOverflow {
    Drop,
    Truncate,
    Error,
}

impl From<OnOverflow> for crate::data::Overflow {
    fn from(value: OnOverflow) -> Self {
        match value {
            OnOverflow::Drop => Self::Drop,
            OnOverflow::Truncate => Self::Truncate,
            OnOverflow::Error => Self::Error,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Init {
    Checkpoint,
    Random,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Dtype {
    F32,
    Bf16,
}

impl Dtype {
    /// As it is typed.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }

    /// What a GPU keeps weights and activations in.
    pub fn storage(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::Bf16,
        }
    }
}

/// Where to compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// The first GPU that the kernels run on, else the CPU.
    Auto,
    Cpu,
    /// A GPU, by the driver's count.
    Cuda(usize),
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Auto => write!(f, "auto"),
            Self::Cpu => write!(f, "cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

impl Serialize for Device {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// The first and the last of some steps, counted from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepRange(pub u64, pub u64);

impl Serialize for StepRange {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{}..{}", self.0, self.1))
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Resume {
    Auto,
    #[serde(untagged)]
    Dir(PathBuf),
}

impl From<OsString> for Resume {
    fn from(text: OsString) -> Self {
        if text == "auto" { Self::Auto } else { Self::Dir(text.into()) }
    }
}

impl TrainArgs {
    /// The resolved configuration as a recipe, to be saved as `recipe.toml` in the output folder.
    ///
    /// Relative paths are written relative to that folder, so a project can be moved or shared as a
    /// whole (absolute ones, or all if that folder is absolute, stay absolute). What was left to the machine (threads, cache folder) stays left to the machine.
    pub fn to_toml(&self) -> String {
        let table = toml::Table::try_from(self).expect("flags are strings, numbers, booleans and lists of strings");
        let body = recipe::as_seen_from(&self.output_dir, &table);
        let version = env!("CARGO_PKG_VERSION");
        format!("# Every value of this run, as cuvee {version} resolved it. Again: cuvee train THIS_FILE\n\n{body}")
    }
}

impl RunArgs {
    /// The one that is given, or TRL's of its trainer for this objective.
    pub fn learning_rate(&self) -> f64 {
        let default = match &self.loss.objective[..] {
            [name] if name == "sft" || name == "dft" => 2e-5,
            [name] if name == "reward" => 1e-4,
            _ => 1e-6,
        };
        self.optim.learning_rate.unwrap_or(default)
    }

    /// What no single flag can know.
    pub(super) fn check(&self, flags: &ArgMatches) -> Result<()> {
        needs(flags, "eval_steps", "eval_dataset", "give the held-out pairs to evaluate")?;
        needs(flags, "eval_task", "eval_dataset", "evaluations are of held-out rows first")?;
        needs(flags, "stop_when", "eval_steps", "say how often to look")?;
        needs(flags, "eval_anchor", "eval_dataset", "give the held-out pairs to compare on")?;
        if self.save.kl_samples > 0 {
            needs(flags, "kl_samples", "eval_dataset", "its prompts are what the policy completes")?;
        }
        if self.sampling.samples > 0 {
            needs(flags, "samples", "eval_dataset", "its prompts are what samples complete")?;
        }
        if self.save.kl_samples == 0 {
            needs(flags, "max_new_tokens", "samples", "say how many samples to print")?;
        }
        for option in ["temperature", "top_p"] {
            let why = "say how many samples to print (completions that are trained on have --rollout-temperature, --rollout-top-p)";
            needs(flags, option, "samples", why)?;
        }
        if self.optim.warmup_steps.is_some() && self.optim.warmup_ratio > 0.0 {
            return Err(Error::option("--warmup-steps", "says the same as --warmup-ratio; give one of them"));
        }
        self.engine.check()?;
        self.refs.check(flags)?;
        self.lora.check(flags)?;
        self.rollouts.check(flags)?;
        self.alarm.check(flags)?;
        match (self.schedule.stop_at_step, self.schedule.max_steps) {
            (Some(stop), Some(max)) if stop > max as f64 => {
                Err(Error::option("--stop-at-step", format!("{stop} is after the last step, --max-steps {max}")))
            }
            _ => Ok(()),
        }
    }

    /// The folder for cached reference log-probabilities.
    pub fn cache_dir(&self) -> Result<PathBuf> {
        cache_dir(self.cache_dir.as_deref())
    }
}

/// The folder that was given, or else the one that the environment names.
pub(super) fn cache_dir(given: Option<&Path>) -> Result<PathBuf> {
    let from_environment = || default_cache_dir(|name| std::env::var_os(name));
    given.map(Path::to_path_buf).or_else(from_environment).ok_or_else(|| {
        Error::option("--cache-dir", "no default, as neither CUVEE_CACHE_DIR nor HOME is set; give a folder")
    })
}

fn default_cache_dir(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let folder = |name| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    folder("CUVEE_CACHE_DIR")
        .or_else(|| folder("XDG_CACHE_HOME").map(|cache| cache.join("cuvee")))
        .or_else(|| folder("HOME").map(|home| home.join(".cache/cuvee")))
}

impl EngineArgs {
    /// An option that would do nothing on the device that is asked for is an error.
    pub(super) fn check(&self) -> Result<()> {
        match self.device {
            Device::Cuda(_) if self.no_amx => {
                let detail = format!("does nothing with --device {}: the matrix unit is the CPU's", self.device);
                Err(Error::option("--no-amx", detail))
            }
            Device::Cpu if self.batch_invariant => {
                Err(Error::option("--batch-invariant", "does nothing with --device cpu, which always is"))
            }
            _ => Ok(()),
        }
    }
}

/// What a recipe says of the course of its own run, which `compare` decides for each of its.
pub const OF_ONE_RUN: [&str; 3] = ["save_steps", "stop_at_step", "resume_from_checkpoint"];

impl CompareArgs {
    pub(super) fn check(&self, flags: &ArgMatches) -> Result<()> {
        self.run.check(flags)?;
        if let Some(flag) = only_here(flags) {
            let detail = "needs a recipe that lists its runs as [[arm]]; see `cuvee compare --help`";
            return Err(Error::option(format!("--{flag}"), detail));
        }
        if self.run.refs.ref_model.len() < 2 {
            return Err(Error::option("--ref-model", "there is nothing to compare; give two references or more"));
        }
        if self.run.eval_dataset.is_none() {
            return Err(Error::option("--eval-dataset", "missing; give the held-out pairs to compare on"));
        }
        let fixed = ["ref_mean", "ref_weights", "ref_clip", "ref_level", "eval_anchor", "limit"];
        let fixed = fixed.into_iter().chain(OF_ONE_RUN);
        match fixed.into_iter().find(|option| super::is_given(flags, option)) {
            Some(option) => {
                let flag = format!("--{}", option.replace('_', "-"));
                Err(Error::option(flag, "is what compare decides for each of its runs; drop it"))
            }
            None => Ok(()),
        }
    }
}

impl LimitArgs {
    pub(super) fn check(&self, flags: &ArgMatches) -> Result<()> {
        needs(flags, "on_overflow", "max_length", "no pair is too long for no limit")
    }
}

impl EvalArgs {
    /// What no single flag can know.
    pub(super) fn check(&self, flags: &ArgMatches) -> Result<()> {
        let of_tasks = ["baseline", "reward_model", "base_model", "log_samples", "plot"];
        let of_both = if is_given(flags, "prompts") { &[][..] } else { &["samples", "max_new_tokens", "seed"] };
        let mut options = of_tasks.iter().chain(of_both);
        options.try_for_each(|option| needs(flags, option, "task", "name what the models are asked"))?;
        needs(flags, "base_model", "reward_model", "it is asked about the completions that are judged")?;
        needs(flags, "on_overflow", "dataset", "tasks have rules of their own for what is too long")?;
        if self.model.len() > 1 {
            needs(flags, "model", "task", "--dataset is for one model; give the file as a task")?;
            if !self.adapters.adapter.is_empty() {
                return Err(Error::option("--adapter", "belongs to one model, and several are given; drop it or them"));
            }
        }
        self.limits.check(flags)?;
        self.engine.check()
    }
}

impl GenerateArgs {
    pub(super) fn check(&self) -> Result<()> {
        self.engine.check()?;
        // clap does not ask for what --prompt excludes.
        if self.out.is_some() && self.prompts.is_none() {
            return Err(Error::option("--out", "does nothing without --prompts; drop it, or give a file of prompts"));
        }
        if self.temperature == 0.0 {
            if self.samples > 1 {
                let detail = "at --temperature 0 every sample is the same; raise one or drop one";
                return Err(Error::option("--samples", detail));
            }
            let idle = [("--top-p", self.top_p < 1.0), ("--top-k", self.top_k > 0), ("--min-p", self.min_p > 0.0)];
            if let Some((option, _)) = idle.into_iter().find(|(_, given)| *given) {
                return Err(Error::option(option, "does nothing at --temperature 0; raise the temperature or drop it"));
            }
        }
        if self.min_new_tokens > self.max_new_tokens {
            let detail = format!("{} is more than --max-new-tokens {}", self.min_new_tokens, self.max_new_tokens);
            return Err(Error::option("--min-new-tokens", detail));
        }
        Ok(())
    }
}

// Parsers of numbers. Their messages follow "invalid value 'x' for '--flag <F>': ".

pub(super) fn number(text: &str, range: &str, holds: impl Fn(f64) -> bool) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value.is_finite() && holds(value) => Ok(value),
        _ => Err(format!("expected a number {range}")),
    }
}

pub(super) fn positive(text: &str) -> Result<f64, String> {
    number(text, "above 0", |x| x > 0.0)
}

/// A number that f32 arithmetic does not round to 0: dividing by it is safe.
fn normal(text: &str) -> Result<f64, String> {
    number(text, "of 1.2e-38 or more", |x| x >= f64::from(f32::MIN_POSITIVE))
}

pub(super) fn above_zero(text: &str) -> Result<f64, String> {
    number(text, "above 0", |x| x > 0.0)
}

pub(super) fn zero_or_more(text: &str) -> Result<f64, String> {
    number(text, "of 0 or more", |x| x >= 0.0)
}

fn zero_to_one(text: &str) -> Result<f64, String> {
    number(text, "from 0 to 1", |x| (0.0..=1.0).contains(&x))
}

fn below_one(text: &str) -> Result<f64, String> {
    number(text, "from 0 to below 1", |x| (0.0..1.0).contains(&x))
}

pub(super) fn above_zero_to_one(text: &str) -> Result<f64, String> {
    number(text, "above 0 and up to 1", |x| x > 0.0 && x <= 1.0)
}

/// TOML integers are i64, and a saved recipe must be able to hold every accepted value.
fn whole(text: &str, least: u64) -> Result<u64, String> {
    match text.parse::<u64>() {
        Ok(value) if value >= least && value <= i64::MAX as u64 => Ok(value),
        _ => Err(format!("expected a whole number of {least} or more")),
    }
}

/// Far above any use, and low enough that the product of two sizes is still a number of rows.
const MAX_SIZE: u64 = 1 << 24;

fn size(text: &str, least: u64) -> Result<usize, String> {
    match whole(text, least)? {
        value if value <= MAX_SIZE => Ok(value as usize),
        _ => Err(format!("expected a whole number from {least} to {MAX_SIZE}")),
    }
}

pub(super) fn seed(text: &str) -> Result<u64, String> {
    whole(text, 0)
}

pub(super) fn steps(text: &str) -> Result<u64, String> {
    whole(text, 1)
}

/// Of what a run has: so many, or a share of all.
fn step_or_share(text: &str) -> Result<f64, String> {
    number(text, "of steps, or a share of them above 0 and below 1", |x| x > 0.0 && (x < 1.0 || x.fract() == 0.0))
}

fn some_text(text: &str) -> Result<String, String> {
    if text.is_empty() { Err("an empty text ends everything".into()) } else { Ok(text.to_string()) }
}

pub(super) fn zero_or_count(text: &str) -> Result<usize, String> {
    size(text, 0)
}

pub(super) fn count(text: &str) -> Result<usize, String> {
    size(text, 1)
}

/// Threads wait for each other: far more than there are cores take forever. A recipe of a larger machine may ask for them.
fn threads(text: &str) -> Result<usize, String> {
    Ok(size(text, 1)?.min(64.max(8 * crate::machine::processor().allowed)))
}

/// `8GiB`, `8G` (the same), `8GB` (powers of 1000), `512M`, `1.5GiB`. A number alone could mean anything.
pub(super) fn bytes(text: &str) -> Result<usize, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = unit.trim().to_ascii_lowercase();
    let power = |letter: &str| "kmgt".find(letter).filter(|_| letter.len() == 1).map(|i| i as i32 + 1);
    let scale = match (unit.strip_suffix("ib"), unit.strip_suffix('b')) {
        (Some(letter), _) => power(letter).map(|p| 1024f64.powi(p)),
        (None, Some(letter)) => power(letter).map(|p| 1000f64.powi(p)),
        (None, None) => power(&unit).map(|p| 1024f64.powi(p)),
    };
    match (number.parse::<f64>(), scale) {
        (Ok(number), Some(scale)) if number > 0.0 && number * scale < usize::MAX as f64 => {
            Ok((number * scale) as usize)
        }
        _ => Err("expected a size with its unit, such as 8GiB, 6G or 512MiB".into()),
    }
}

fn ram(text: &str) -> Result<Ram, String> {
    if text == "auto" { Ok(Ram::Auto) } else { bytes(text).map(Ram::Bytes) }
}

fn device(text: &str) -> Result<Device, String> {
    let ordinal = |number: &str| number.parse().ok().filter(|_| number.bytes().all(|b| b.is_ascii_digit()));
    let found = match (text, text.strip_prefix("cuda:")) {
        ("auto", _) => Some(Device::Auto),
        ("cpu", _) => Some(Device::Cpu),
        ("cuda", _) => Some(Device::Cuda(0)),
        (_, number) => number.and_then(ordinal).map(Device::Cuda),
    };
    found.ok_or("expected auto, cpu, cuda or cuda:N".into())
}

fn step_range(text: &str) -> Result<StepRange, String> {
    let ends = text.split_once("..").and_then(|(first, last)| Some((steps(first).ok()?, steps(last).ok()?)));
    match ends {
        Some((first, last)) if first <= last => Ok(StepRange(first, last)),
        _ => Err("expected two steps, such as 5..8, counted from 1".into()),
    }
}

fn pairs(text: &str) -> Result<Pairs, String> {
    if text == "all" { Ok(Pairs::All) } else { count(text).map(Pairs::Some) }
}

/// A sequence has at least one token to condition on and one to score.
fn length(text: &str) -> Result<usize, String> {
    size(text, 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        let right = [("8GiB", 8 << 30), ("6g", 6 << 30), ("1.5M", 3 << 19), ("2 KiB", 2048), ("8GB", 8_000_000_000)];
        for (text, expected) in right {
            assert_eq!(bytes(text), Ok(expected), "{text}");
        }
        for text in ["", "8", "GiB", "0G", "-1G", "8PiB", "8bib", "1e9G", "nanG", "8G!", "9999999999T", "auto", "8gk"] {
            assert!(bytes(text).is_err_and(|e| e.contains("such as 8GiB")), "{text}");
        }
        assert_eq!((ram("auto"), ram("1G")), (Ok(Ram::Auto), Ok(Ram::Bytes(1 << 30))));
    }

    #[test]
    fn devices_and_ranges_are_read_and_written_alike() {
        for (text, found) in [("auto", Device::Auto), ("cpu", Device::Cpu), ("cuda:3", Device::Cuda(3))] {
            assert_eq!((device(text), found.to_string()), (Ok(found), text.to_string()));
        }
        assert_eq!(device("cuda"), Ok(Device::Cuda(0)));
        for text in ["gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:+1", "cuda0", "CPU", ""] {
            assert!(device(text).is_err_and(|e| e.contains("cuda:N")), "{text}");
        }
        assert_eq!(step_range("5..8"), Ok(StepRange(5, 8)));
        for text in ["8..5", "0..3", "5", "5..", "..5", "5-8", "5...8", ""] {
            assert!(step_range(text).is_err_and(|e| e.contains("such as 5..8")), "{text}");
        }
    }

    #[test]
    fn the_cache_folder_follows_the_environment() {
        let folder = |variables: &[(&str, &str)]| {
            default_cache_dir(|name| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into()))
        };
        let (ours, xdg, home) = (("CUVEE_CACHE_DIR", "c"), ("XDG_CACHE_HOME", "x"), ("HOME", "h"));
        assert_eq!(folder(&[ours, xdg, home]).as_deref(), Some(Path::new("c")));
        assert_eq!(folder(&[("CUVEE_CACHE_DIR", ""), xdg, home]).as_deref(), Some(Path::new("x/cuvee")));
        assert_eq!(folder(&[home]).as_deref(), Some(Path::new("h/.cache/cuvee")));
        assert_eq!(folder(&[]), None);
    }
}
