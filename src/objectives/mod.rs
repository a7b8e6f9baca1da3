//! Objectives: what a policy is trained towards. Host code in f64; no tensor, no device, no data.
//!
//! An [`Objective`] maps [`Stats`], the numbers that the model's forward passes left, to an [`Outcome`]:
//! a loss, its derivatives by the same numbers ([`Grads`]) and metrics. All log-probs are natural.
//! To add one, write `<name>.rs` with an [`Entry`] and add two lines here: its `mod` and its place in `all`. A new
//! parameter needs no more: the command line, recipes and help read the registry. A [`Modifier`] is added alike.

mod a_star_po;
pub mod advantages;
mod alphapo;
mod aot;
mod apo;
mod bco;
mod cispo;
mod cpo;
mod dapo;
mod dft;
mod discopop;
mod dr_grpo;
mod exo_pair;
mod f_divergence;
mod gmpo;
mod grao;
mod grpo;
mod hinge;
mod ipo;
pub mod kl;
mod kto;
mod ld_dpo;
mod luspo;
mod mixture;
pub mod mrpo;
mod nca_pair;
mod orpo;
mod pairwise;
mod ppo;
mod rdpo;
pub mod ref_weights;
mod reference_free;
mod registry;
mod reinforce;
mod reward;
mod rloo;
mod robust;
mod sapo;
mod sft;
mod sigmoid;
mod sigmoid_norm;
mod simpo;
mod sppo_hard;
mod surrogate;
mod unpaired;
mod vespo;
mod wpo;
mod xpo;

use std::borrow::Cow;
use std::ops::{AddAssign, Range, RangeInclusive};

pub use crate::params::{Domain, ParamSpec, Params, Shared, Value};
pub use mixture::{Choice, Wrap, build};
pub use registry::{Entry, find, params};

/// Every objective, by name.
pub fn all() -> &'static [Entry] {
    &[
        // One objective a line.
        a_star_po::ENTRY,
        alphapo::ENTRY,
        aot::PAIRED,
        aot::UNPAIRED,
        apo::ZERO,
        apo::DOWN,
        apo::ZERO_UNPAIRED,
        bco::ENTRY,
        bco::PAIR,
        cispo::ENTRY,
        cpo::SIGMOID,
        cpo::HINGE,
        cpo::IPO,
        dapo::ENTRY,
        dapo::BNPO,
        dft::ENTRY,
        discopop::ENTRY,
        dr_grpo::ENTRY,
        exo_pair::ENTRY,
        gmpo::ENTRY,
        grao::ENTRY,
        grpo::ENTRY,
        grpo::GSPO,
        hinge::ENTRY,
        ipo::MEAN,
        ipo::SUM,
        ipo::MARGIN1,
        kto::ENTRY,
        kto::PAIR,
        luspo::ENTRY,
        nca_pair::ENTRY,
        orpo::ENTRY,
        ppo::ENTRY,
        rdpo::ENTRY,
        reinforce::ENTRY,
        reward::ENTRY,
        rloo::ENTRY,
        robust::ENTRY,
        sapo::ENTRY,
        sft::ENTRY,
        sigmoid::ENTRY,
        sigmoid_norm::ENTRY,
        simpo::ENTRY,
        sppo_hard::ENTRY,
        vespo::ENTRY,
        xpo::ENTRY,
    ]
}

/// Something that may be put around another objective: it changes what that one sees, and what becomes of its
/// derivatives. The user switches it on by its parameter.
pub struct Modifier {
    /// As the paper calls the method.
    pub name: &'static str,
    /// Author, arXiv:id, Eq. n.
    pub paper: &'static str,
    /// One line for `cuvee list modifiers`.
    pub summary: &'static str,
    /// A number that has no default, or a switch.
    pub param: ParamSpec,
    /// Whether it can be put around an objective that needs this.
    pub applies: fn(&Needs) -> bool,
    /// What `applies` says, in words.
    pub fits: &'static str,
    pub wrap: fn(&Params, Box<dyn Objective>) -> Box<dyn Objective>,
}

/// Every modifier, from the innermost to the outermost.
pub fn modifiers() -> &'static [Modifier] {
    &[
        // One modifier a line.
        wpo::MODIFIER,
        ld_dpo::MODIFIER,
    ]
}

/// Everything an objective may read, of S sequences with T completion tokens in all. `logps` and `lens` are
/// always there; the rest is there when [`Needs`] asks for it and empty otherwise.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stats {
    /// `[S]` ln pi(completion | prompt) of the policy, summed over completion tokens, nats.
    pub logps: Vec<f64>,
    /// `[K][S]` the same of each reference; `ref_logps[0]` is the anchor.
    pub ref_logps: Vec<Vec<f64>>,
    /// `[S]` completion tokens, at least 1.
    pub lens: Vec<f64>,
    /// Tokens that a sampled completion may have at most; 0 where none is sampled.
    pub longest: f64,
    /// Sampled completions that are left out and yet count in means over sequences.
    pub absent: f64,
    /// (chosen, rejected) as indices of sequences. A sequence may be in several pairs.
    pub pairs: Vec<(usize, usize)>,
    /// `[pairs]` factors of each pair's loss and gradient, constants; empty means 1. No field of the data: an objective that
    /// weights another's pairs sets them.
    pub pair_weights: Vec<f64>,
    /// `[pairs]` how much better the chosen completion is than the rejected one, as the data says; 0 where it does not.
    pub margins: Vec<f64>,
    /// `[S]` desirable (true) or undesirable. Of a pair, the chosen completion is desirable.
    pub labels: Vec<bool>,
    /// `[M]` the policy's `logps` of completions under prompts that are not theirs, constants.
    pub mismatched_logps: Vec<f64>,
    /// `[K][M]` the same of each reference.
    pub mismatched_ref_logps: Vec<Vec<f64>>,
    /// The sequences sampled from one prompt, for each prompt.
    pub groups: Vec<Range<usize>>,
    /// `[groups]` the sequence that is the data's own completion of the prompt; in no group.
    pub answers: Vec<usize>,
    /// `[R][S]` what each reward said, NaN where it says nothing.
    pub rewards: Vec<Vec<f64>>,
    /// `[R]`
    pub reward_weights: Vec<f64>,
    /// `[groups]` what completions that the reference wrote for the same prompts are worth, NaN where no reward says anything.
    pub prior_rewards: Vec<Vec<f64>>,
    /// Sequences that the reference wrote.
    pub prior: Vec<usize>,
    /// `[S]` what [`Objective::credit`] made of rewards, constants.
    pub advantages: Vec<f64>,
    /// `[S]` the output of the trained reward head.
    pub scores: Vec<f64>,

    /// `[S + 1]` tokens of sequence s: `offsets[s]..offsets[s + 1]`.
    pub offsets: Vec<usize>,
    /// `[T]` ln pi of the policy, nats.
    pub token_logps: Vec<f64>,
    /// `[K][T]` the same of each reference.
    pub ref_token_logps: Vec<Vec<f64>>,
    /// `[T]` the same of the policy before the first update on these sequences.
    pub old_token_logps: Vec<f64>,
    /// `[T]` the same as whoever sampled the tokens said; in another precision, or some updates ago.
    pub sampled_token_logps: Vec<f64>,
    /// `[T]` what [`Objective::credit`] made of rewards, constants.
    pub token_advantages: Vec<f64>,
    /// `[T]` what values should have been, constants.
    pub returns: Vec<f64>,
    /// `[T]` entropy of the policy's distribution, nats, >= 0.
    pub entropy: Vec<f64>,
    /// `[T]` ln of the sum over the vocabulary of p^2, <= 0.
    pub ln_sum_p2: Vec<f64>,
    /// `[T]` the output of the value head.
    pub values: Vec<f64>,
    /// `[T]` the same before the first update on these sequences.
    pub old_values: Vec<f64>,
    /// `[K][T]` KL(policy || reference) of the next-token distributions, exact over the vocabulary, nats, >= 0.
    pub token_kl: Vec<Vec<f64>>,

    /// `[K]` weights of the references in this step, >= 0, sum 1.
    pub ref_weights: Vec<f64>,
    /// What [`Outcome::state`] was after the step before, or [`Objective::initial_state`].
    pub state: Vec<f64>,
}

impl Stats {
    /// The sequences whose likelihood is raised: the chosen one of each pair, or, where there are no pairs, all but those
    /// that are labelled undesirable.
    pub fn supervised(&self) -> impl Iterator<Item = usize> {
        let unpaired = if self.pairs.is_empty() { 0..self.lens.len() } else { 0..0 };
        let wanted = unpaired.filter(|s| self.labels.get(*s).copied().unwrap_or(true));
        self.pairs.iter().map(|&(chosen, _)| chosen).chain(wanted)
    }
}

/// Derivatives of [`Outcome::loss`] by the fields of [`Stats`] of the same name and shape; empty means zero.
/// The trainer adds `logps[s]` to `token_logps[t]` of every token t of sequence s.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Grads {
    pub logps: Vec<f64>,
    pub token_logps: Vec<f64>,
    pub entropy: Vec<f64>,
    pub scores: Vec<f64>,
    pub values: Vec<f64>,
    pub token_kl: Vec<Vec<f64>>,
}

/// The fields of [`Stats`] that an objective reads besides `logps` and `lens`. `offsets` comes with any field
/// [per token](Needs::per_token).
#[derive(Clone, Debug, PartialEq)]
pub struct Needs {
    /// How many references it can work with.
    pub refs: RangeInclusive<usize>,
    pub pairs: bool,
    /// It multiplies by `pair_weights`, if an objective around it sets them.
    pub pair_weights: bool,
    pub margins: bool,
    pub labels: bool,
    /// Both `mismatched_logps` and, of each reference, `mismatched_ref_logps`.
    pub mismatched: bool,
    pub groups: bool,
    pub answers: bool,
    /// And with them `reward_weights`. Who needs them learns from [`Objective::credit`].
    pub rewards: bool,
    /// How many for each group; 0: none.
    pub prior_rewards: usize,
    /// One sequence of each pair.
    pub prior: bool,
    pub advantages: bool,
    pub scores: bool,
    pub token_logps: bool,
    pub ref_token_logps: bool,
    pub old_token_logps: bool,
    pub sampled_token_logps: bool,
    /// And with them, where there are `values`, `returns`.
    pub token_advantages: bool,
    pub entropy: bool,
    pub ln_sum_p2: bool,
    /// And with them `old_values`.
    pub values: bool,
    pub token_kl: bool,
    pub ref_weights: bool,
}

impl Needs {
    /// Log-probs and lengths of the policy alone.
    pub const POLICY: Needs = Needs {
        refs: 0..=0,
        pairs: false,
        pair_weights: false,
        margins: false,
        labels: false,
        mismatched: false,
        groups: false,
        answers: false,
        rewards: false,
        prior_rewards: 0,
        prior: false,
        advantages: false,
        scores: false,
        token_logps: false,
        ref_token_logps: false,
        old_token_logps: false,
        sampled_token_logps: false,
        token_advantages: false,
        entropy: false,
        ln_sum_p2: false,
        values: false,
        token_kl: false,
        ref_weights: false,
    };

    /// What two objectives need together. One that works without references does not limit their number.
    pub fn union(self, other: Self) -> Self {
        let refs = match (*self.refs.end(), *other.refs.end()) {
            (0, _) => other.refs,
            (_, 0) => self.refs,
            (a, b) => *self.refs.start().max(other.refs.start())..=a.min(b),
        };
        Self {
            refs,
            pairs: self.pairs || other.pairs,
            pair_weights: self.pair_weights || other.pair_weights,
            margins: self.margins || other.margins,
            labels: self.labels || other.labels,
            mismatched: self.mismatched || other.mismatched,
            groups: self.groups || other.groups,
            answers: self.answers || other.answers,
            rewards: self.rewards || other.rewards,
            prior_rewards: self.prior_rewards.max(other.prior_rewards),
            prior: self.prior || other.prior,
            advantages: self.advantages || other.advantages,
            scores: self.scores || other.scores,
            token_logps: self.token_logps || other.token_logps,
            ref_token_logps: self.ref_token_logps || other.ref_token_logps,
            old_token_logps: self.old_token_logps || other.old_token_logps,
            sampled_token_logps: self.sampled_token_logps || other.sampled_token_logps,
            token_advantages: self.token_advantages || other.token_advantages,
            entropy: self.entropy || other.entropy,
            ln_sum_p2: self.ln_sum_p2 || other.ln_sum_p2,
            values: self.values || other.values,
            token_kl: self.token_kl || other.token_kl,
            ref_weights: self.ref_weights || other.ref_weights,
        }
    }

    /// Whether it reads any field on the token index, and with it `offsets`.
    pub fn per_token(&self) -> bool {
        let log_probs = self.token_logps || self.ref_token_logps || self.old_token_logps || self.sampled_token_logps;
        log_probs || self.token_advantages || self.entropy || self.ln_sum_p2 || self.values || self.token_kl
    }
}

/// How much of the optimizer batch an objective must see at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Evaluated per micro-batch: with [`Totals`] known beforehand, the contributions add.
    Pair,
    /// Couples all sequences: evaluated once, on the whole optimizer batch.
    Batch,
}

/// The denominators of means, counted over the whole optimizer batch, of which `Stats` may be one micro-batch.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Totals {
    pub pairs: f64,
    pub sequences: f64,
    /// Sequences whose label is true.
    pub desirable: f64,
    /// Completion tokens of the [supervised](Stats::supervised) sequences: of the chosen ones if there are pairs.
    pub tokens: f64,
    /// Completion tokens of all sequences.
    pub completion_tokens: f64,
    /// Prompts of which groups were sampled.
    pub groups: f64,
    /// Tokens that a sampled completion may have at most.
    pub longest: f64,
}

impl Totals {
    /// Counts one micro-batch; reads `lens`, `longest`, `absent`, `pairs`, `groups` and `labels` only, so it needs no forward pass. Totals add.
    pub fn of(stats: &Stats) -> Self {
        Self {
            pairs: stats.pairs.len() as f64,
            sequences: stats.lens.len() as f64 + stats.absent,
            desirable: stats.labels.iter().filter(|&&label| label).count() as f64,
            tokens: stats.supervised().map(|s| stats.lens[s]).sum(),
            completion_tokens: stats.lens.iter().sum(),
            groups: stats.groups.len() as f64,
            longest: stats.longest,
        }
    }
}

impl AddAssign for Totals {
    fn add_assign(&mut self, other: Self) {
        self.pairs += other.pairs;
        self.sequences += other.sequences;
        self.desirable += other.desirable;
        self.tokens += other.tokens;
        self.completion_tokens += other.completion_tokens;
        self.groups += other.groups;
        self.longest = self.longest.max(other.longest);
    }
}

/// A metric's name, as metrics.jsonl has it, and its value.
pub type Metric = (Cow<'static, str>, f64);

/// Joins the metrics of two micro-batches. They add, but for extremes, whose names begin with `min_` and `max_`.
pub fn join_metrics(all: &mut Vec<Metric>, next: &[Metric]) {
    for (name, value) in next {
        match all.iter_mut().find(|(known, _)| known == name) {
            Some((_, known)) if name.starts_with("min_") => *known = known.min(*value),
            Some((_, known)) if name.starts_with("max_") => *known = known.max(*value),
            Some((_, sum)) => *sum += value,
            None => all.push((name.clone(), *value)),
        }
    }
}

/// What `Stats` contribute to the optimizer batch. Loss and metrics are divided by [`Totals`] already, so they
/// [join](join_metrics) over micro-batches.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    pub loss: f64,
    pub grads: Grads,
    pub metrics: Vec<Metric>,
    /// What the next step finds in [`Stats::state`]; saved with checkpoints. Only of [`Scope::Batch`], else empty.
    pub state: Vec<f64>,
}

/// What the rewards of sampled completions are worth: constants of every update on them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Credit {
    /// `[S]`, for [`Stats::advantages`].
    pub advantages: Vec<f64>,
    /// `[T]`, for [`Stats::token_advantages`].
    pub token_advantages: Vec<f64>,
    /// `[T]`, for [`Stats::returns`].
    pub returns: Vec<f64>,
    pub metrics: Vec<Metric>,
    /// What the next call finds in [`Stats::state`]; empty where nothing is remembered.
    pub state: Vec<f64>,
}

pub trait Objective: Send + Sync {
    /// The name of its [`Entry`]; of a mixture, those of its terms.
    fn name(&self) -> &str;
    fn needs(&self) -> Needs;
    fn scope(&self) -> Scope;
    /// What it remembers from step to step, before the first one. An objective that remembers anything sees whole batches.
    fn initial_state(&self) -> Vec<f64> {
        Vec::new()
    }
    /// Looks once at everything that was sampled, before the first update on it; `rollouts` has the fields that are needed, but for
    /// what this makes, with `old_token_logps` the policy's and `values` those before the update.
    fn credit(&self, _rollouts: &Stats) -> Credit {
        Credit::default()
    }
    fn evaluate(&self, stats: &Stats, totals: &Totals) -> Outcome;
}
