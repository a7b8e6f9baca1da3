//! What losses on sampled completions share: a ratio of the policy to the one that sampled, by token or by completion, a term
//! of that ratio and an advantage, a normaliser, and a KL to the reference. An objective of the family is then an entry and
//! a [`Surrogate`].
//!
//! ```text
//! w    = ln pi(token) - ln pi_old(token)           by token; its mean or its sum over the completion otherwise
//! r    = e^w
//! loss = sum over tokens t of W_t (term(r, A) + beta kl_t [r])
//! ```
//!
//! Advantages A are constants, made once for all updates on the same completions ([`Objective::credit`]). Deviation: w and
//! the difference to the reference are cut to 80 nats, so that no loss is infinite; what is cut has no derivative.

use std::ops::Bound;

use super::advantages::ByGroup;
use super::kl::{k1, k2, k3};
use super::registry::BETA;
use super::{Credit, Grads, Metric, Needs, Objective, Outcome, Scope, Stats, Totals};
use crate::error::{Error, Result};
use crate::params::{Domain, NOT_NEGATIVE, ParamSpec, Params};

/// Nats beyond which a log-ratio is cut: e^80 squared is still a number.
const FARTHEST: f64 = 80.0;

/// The same beta as elsewhere, off unless given.
pub(super) const KL_BETA: ParamSpec =
    ParamSpec { domain: Domain::Number { default: Some(0.0), range: NOT_NEGATIVE, example: 0.04 }, ..BETA };

pub(super) const EPSILON: ParamSpec = epsilon(0.2);

/// How far below 1 a ratio may go, by default.
pub(super) const fn epsilon(default: f64) -> ParamSpec {
    ParamSpec {
        name: "epsilon",
        domain: Domain::Number {
            default: Some(default),
            range: (Bound::Excluded(0.0), Bound::Excluded(1.0)),
            example: 0.1,
        },
        only_with: None,
        help: "how far below 1 the ratio to the sampling policy counts (of GMPO: its logarithm below 0)",
    }
}

pub(super) const EPSILON_HIGH: ParamSpec = epsilon_high(0.0);

pub(super) const fn epsilon_high(default: f64) -> ParamSpec {
    ParamSpec {
        name: "epsilon_high",
        domain: Domain::Number { default: Some(default), range: NOT_NEGATIVE, example: 0.28 },
        only_with: None,
        help: "how far above 1 the ratio counts (of GMPO: its logarithm above 0); 0 = as far as epsilon says",
    }
}

pub(super) const DELTA: ParamSpec = ParamSpec {
    name: "delta",
    domain: Domain::Number {
        default: Some(f64::INFINITY),
        range: (Bound::Excluded(1.0), Bound::Included(f64::INFINITY)),
        example: 2.0,
    },
    only_with: None,
    help: "largest ratio of a completion that was worse than its group (two-sided clipping, INTELLECT-2)",
};

pub(super) const LEVEL: ParamSpec = ParamSpec {
    name: "importance_sampling_level",
    domain: Domain::Choice { values: &["token", "sequence"], default: "token" },
    only_with: None,
    help: "whether the ratio is a token's, or the geometric mean over a completion's (as in GSPO)",
};

pub(super) const KL_FORM: ParamSpec = ParamSpec {
    name: "kl_form",
    domain: Domain::Choice { values: &["k1", "k2", "k3"], default: "k3" },
    only_with: None,
    help: "Schulman's estimator of the KL that beta weighs; see `cuvee list objectives` and --kl-penalty",
};

pub(super) const KL_BIAS_CORRECTION: ParamSpec = ParamSpec {
    name: "use_bias_correction_kl",
    domain: Domain::Switch,
    only_with: None,
    help: "multiply the KL of a token by its ratio, so that it is right when completions are some updates old",
};

pub(super) const OFF_POLICY_MASK: ParamSpec = ParamSpec {
    name: "off_policy_mask_threshold",
    domain: Domain::Number {
        default: Some(f64::INFINITY),
        range: (Bound::Excluded(0.0), Bound::Included(f64::INFINITY)),
        example: 0.05,
    },
    only_with: None,
    help: "completions worse than their group whose tokens are on average this many nats less likely now teach nothing",
};

pub(super) const TOP_ENTROPY: ParamSpec = ParamSpec {
    name: "top_entropy_quantile",
    domain: Domain::Number { default: Some(1.0), range: (Bound::Excluded(0.0), Bound::Included(1.0)), example: 0.2 },
    only_with: None,
    help: "share of tokens, those of the highest entropy, that are learnt from (Wang et al., arXiv:2506.01939)",
};

/// Whose ratio it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Level {
    Token,
    /// The geometric mean over the completion.
    Mean,
    /// The completion's.
    Sum,
}

/// What a ratio and an advantage come to, of one token.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) enum Term {
    /// -min(min(r, delta) A, clip(r, 1 - low, 1 + high) A)
    Clipped { low: f64, high: f64, delta: f64 },
    /// -stop(min(r, cap)) A ln pi
    Capped { cap: f64 },
    /// -4 / tau sigma(tau (r - 1)) A
    Soft { positive: f64, negative: f64 },
    /// -stop(phi) A ln pi, phi = e^(lambda + k W - lambda e^W) of the completion's summed log-ratio W
    Variational { positive: (f64, f64), negative: (f64, f64) },
    /// -A ln pi, whatever the ratio
    Score,
}

/// The weight of a token, of a completion of n tokens.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Normalizer {
    /// 1 / (n sequences)
    SequenceMeans,
    /// 1 / sequences
    SequenceSums,
    /// 1 / all tokens
    Tokens,
    /// 1 / (sequences longest)
    Longest,
}

impl Normalizer {
    fn weight(self, len: f64, totals: &Totals) -> f64 {
        match self {
            Self::SequenceMeans => 1.0 / (len * totals.sequences),
            Self::SequenceSums => 1.0 / totals.sequences,
            Self::Tokens => 1.0 / totals.completion_tokens,
            Self::Longest => 1.0 / (totals.sequences * totals.longest),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum KlForm {
    K1,
    K2,
    K3,
}

/// A KL to the reference, as a part of the loss.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct KlTerm {
    /// >= 0; 0 = none
    pub beta: f64,
    pub form: KlForm,
    pub bias_correction: bool,
}

impl KlTerm {
    pub const NONE: Self = Self { beta: 0.0, form: KlForm::K3, bias_correction: false };

    pub fn of(params: &Params) -> Result<Self> {
        let form = match params.choice("kl_form") {
            Some("k1") => KlForm::K1,
            Some("k2") => KlForm::K2,
            _ => KlForm::K3,
        };
        let term = Self { beta: params["beta"], form, bias_correction: params.on(KL_BIAS_CORRECTION.name) };
        if term.beta > 0.0 && form == KlForm::K1 && !term.bias_correction {
            let detail = "the gradient of k1 does not depend on the reference; use k3, or add --use-bias-correction-kl";
            return Err(Error::option("--kl-form", detail));
        }
        Ok(term)
    }

    /// Nats of a token, and the derivative by its log-prob.
    pub fn at(&self, logp: f64, ref_logp: f64) -> (f64, f64) {
        let (near, slope) = cut(logp - ref_logp);
        let (value, by_difference) = match self.form {
            KlForm::K1 => k1(near, 0.0),
            KlForm::K2 => k2(near, 0.0),
            KlForm::K3 => k3(near, 0.0),
        };
        (value, by_difference * slope)
    }
}

/// A log-ratio within what can be computed with, and its derivative.
pub(super) fn cut(w: f64) -> (f64, f64) {
    (w.clamp(-FARTHEST, FARTHEST), f64::from(u8::from(w.abs() <= FARTHEST)))
}

/// What a KL in the reward needs besides.
pub(super) fn in_reward(beta: f64, needs: Needs) -> Needs {
    let held = beta > 0.0;
    Needs { refs: if held { 1..=1 } else { 0..=0 }, ref_token_logps: held, old_token_logps: true, ..needs }
}

/// A loss of the family. How advantages come from rewards is the objective's.
pub(super) struct Surrogate {
    pub level: Level,
    pub term: Term,
    pub normalizer: Normalizer,
    pub kl: KlTerm,
    /// inf = all completions are learnt from.
    pub off_policy_threshold: f64,
    /// (0, 1]; 1 = all tokens are.
    pub top_entropy: f64,
}

impl Surrogate {
    /// PPO's clipping.
    pub fn clipped(params: &Params) -> Term {
        let low = params["epsilon"];
        let high = match params["epsilon_high"] {
            0.0 => low,
            high => high,
        };
        Term::Clipped { low, high, delta: params.number("delta").unwrap_or(f64::INFINITY) }
    }

    /// With what an entry's parameters say about everything but term and normaliser.
    pub fn of(params: &Params, level: Level, term: Term, normalizer: Normalizer) -> Result<Self> {
        let level = match params.choice(LEVEL.name) {
            Some("sequence") => Level::Mean,
            _ => level,
        };
        Ok(Self {
            level,
            term,
            normalizer,
            kl: KlTerm::of(params)?,
            off_policy_threshold: params.number(OFF_POLICY_MASK.name).unwrap_or(f64::INFINITY),
            top_entropy: params.number(TOP_ENTROPY.name).unwrap_or(1.0),
        })
    }

    pub fn needs(&self) -> Needs {
        let held = self.kl.beta > 0.0;
        Needs {
            refs: if held { 1..=1 } else { 0..=0 },
            ref_token_logps: held,
            groups: true,
            rewards: true,
            advantages: true,
            token_logps: true,
            old_token_logps: true,
            sampled_token_logps: self.off_policy_threshold.is_finite(),
            entropy: self.top_entropy < 1.0,
            ..Needs::POLICY
        }
    }

    pub fn scope(&self) -> Scope {
        if self.top_entropy < 1.0 { Scope::Batch } else { Scope::Pair }
    }

    /// `advantage` is of (sequence, token).
    pub fn evaluate(&self, stats: &Stats, totals: &Totals, advantage: impl Fn(usize, usize) -> f64) -> Outcome {
        let mut sum = Sum {
            loss: 0.0,
            token_logps: vec![0.0; stats.token_logps.len()],
            counts: Counts::default(),
            least_entropy: self.least_entropy(stats),
        };
        for s in (0..stats.lens.len()).filter(|s| stats.offsets[*s] < stats.offsets[s + 1]) {
            self.add_sequence(stats, totals, s, &advantage, &mut sum);
        }
        let Sum { loss, token_logps, counts, .. } = sum;
        let mut metrics = counts.metrics(totals, self.kl.beta > 0.0, self.term != Term::Score);
        if !stats.entropy.is_empty() {
            metrics.push(("entropy".into(), stats.entropy.iter().sum::<f64>() / stats.entropy.len() as f64));
        }
        Outcome { loss, grads: Grads { token_logps, ..Grads::default() }, metrics, ..Outcome::default() }
    }

    fn add_sequence(
        &self,
        stats: &Stats,
        totals: &Totals,
        s: usize,
        advantage: &impl Fn(usize, usize) -> f64,
        sum: &mut Sum,
    ) {
        let tokens = stats.offsets[s]..stats.offsets[s + 1];
        let len = tokens.len() as f64;
        // A score has no ratio, and perhaps nobody said what it would be to.
        let difference = |t: usize| stats.old_token_logps.get(t).map_or(0.0, |old| stats.token_logps[t] - old);
        let total: f64 = tokens.clone().map(difference).sum();
        let whole = Ratio::of(if self.level == Level::Mean { total / len } else { total });
        let weight = self.normalizer.weight(len, totals);
        let variational =
            tokens.clone().map(|t| difference(t).clamp(-20.0, 20.0)).sum::<f64>().clamp(-18.420680743952367, 20.0);
        let teaches = self.teaches(stats, s, advantage(s, tokens.start));
        let mut by_whole = 0.0;
        for t in tokens.clone() {
            let (logp, a) = (stats.token_logps[t], advantage(s, t));
            let ratio = if self.level == Level::Token { Ratio::of(difference(t)) } else { whole };
            let mut by_ratio = 0.0;
            if teaches && sum.least_entropy.is_none_or(|least| stats.entropy[t] >= least) {
                let found = self.term.at(&ratio, a, logp, variational);
                sum.loss += weight * found.value;
                sum.token_logps[t] += weight * found.by_logp;
                by_ratio += weight * found.by_ratio;
            }
            if self.kl.beta > 0.0 {
                let (kl, by_logp) = self.kl.at(logp, stats.ref_token_logps[0][t]);
                let (weight, factor) = (weight * self.kl.beta, if self.kl.bias_correction { ratio.value } else { 1.0 });
                sum.loss += weight * kl * factor;
                sum.token_logps[t] += weight * by_logp * factor;
                by_ratio += if self.kl.bias_correction { weight * kl } else { 0.0 };
                sum.counts.kl += kl;
            }
            self.term.count(ratio.value, a, &mut sum.counts);
            match self.level {
                Level::Token => sum.token_logps[t] += by_ratio * ratio.slope,
                Level::Mean => by_whole += by_ratio * ratio.slope / len,
                Level::Sum => by_whole += by_ratio * ratio.slope,
            }
        }
        sum.token_logps[tokens].iter_mut().for_each(|grad| *grad += by_whole);
    }

    /// Whether this completion is learnt from at all.
    fn teaches(&self, stats: &Stats, s: usize, advantage: f64) -> bool {
        if self.off_policy_threshold.is_infinite() || advantage >= 0.0 {
            return true;
        }
        let tokens = stats.offsets[s]..stats.offsets[s + 1];
        let len = tokens.len() as f64;
        let less_likely = tokens.map(|t| stats.sampled_token_logps[t] - stats.token_logps[t]).sum::<f64>() / len;
        less_likely <= self.off_policy_threshold
    }

    /// The least entropy that a token must have, over the whole batch; linear between two, as numpy and torch have it.
    fn least_entropy(&self, stats: &Stats) -> Option<f64> {
        if self.top_entropy >= 1.0 || stats.entropy.is_empty() {
            return None;
        }
        let mut sorted = stats.entropy.clone();
        sorted.sort_by(f64::total_cmp);
        let at = (1.0 - self.top_entropy) * (sorted.len() - 1) as f64;
        let (below, above) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
        Some(below + (above - below) * at.fract())
    }
}

impl Stats {
    /// `[S]` nats: ln pi_old - ln pi_ref over a completion, and its mean as a metric; zeros where `beta` is 0.
    pub(super) fn sequence_kl(&self, beta: f64) -> (Vec<f64>, Vec<Metric>) {
        if beta == 0.0 {
            return (vec![0.0; self.lens.len()], Vec::new());
        }
        let difference = |t: usize| self.old_token_logps[t] - self.ref_token_logps[0][t];
        let kl: Vec<f64> = self.offsets.windows(2).map(|ends| (ends[0]..ends[1]).map(difference).sum()).collect();
        let mean = kl.iter().sum::<f64>() / (kl.len() as f64).max(1.0);
        (kl, vec![("kl".into(), mean)])
    }
}

struct Sum {
    loss: f64,
    token_logps: Vec<f64>,
    counts: Counts,
    least_entropy: Option<f64>,
}

/// e^w and its derivative by w, 0 where w was cut.
#[derive(Clone, Copy)]
struct Ratio {
    value: f64,
    slope: f64,
}

impl Ratio {
    fn of(w: f64) -> Self {
        let (near, inside) = cut(w);
        Self { value: near.exp(), slope: near.exp() * inside }
    }
}

/// The loss of a token before its weight, and its derivatives.
struct Found {
    value: f64,
    by_ratio: f64,
    by_logp: f64,
}

impl Term {
    fn at(&self, ratio: &Ratio, a: f64, logp: f64, variational: f64) -> Found {
        let r = ratio.value;
        let score = |factor: f64| Found { value: -factor * a * logp, by_ratio: 0.0, by_logp: -factor * a };
        match *self {
            Self::Clipped { low, high, delta } => {
                let (free, clipped) = (r.min(delta), r.clamp(1.0 - low, 1.0 + high));
                let free_slope = f64::from(u8::from(r <= delta));
                let clipped_slope = f64::from(u8::from((1.0 - low..=1.0 + high).contains(&r)));
                // A tie is half of each, as in torch.
                let share = match (free * a).total_cmp(&(clipped * a)) {
                    _ if free * a == clipped * a => 0.5,
                    order => f64::from(u8::from(order.is_lt())),
                };
                let by_ratio = -a * (share * free_slope + (1.0 - share) * clipped_slope);
                Found { value: -(free * a).min(clipped * a), by_ratio, by_logp: 0.0 }
            }
            Self::Capped { cap } => score(r.min(cap)),
            Self::Soft { positive, negative } => {
                let tau = if a > 0.0 { positive } else { negative };
                let x = tau * (r - 1.0);
                let (value, slope) = (super::pairwise::sigmoid(x), super::pairwise::sigmoid_slope(x));
                Found { value: -4.0 / tau * value * a, by_ratio: -4.0 * slope * a, by_logp: 0.0 }
            }
            Self::Variational { positive, negative } => {
                let (k, lambda) = if a >= 0.0 { positive } else { negative };
                score((lambda + k * variational - lambda * variational.exp()).exp())
            }
            Self::Score => score(1.0),
        }
    }

    /// Counts a token whose ratio no longer matters, in the direction that its advantage pushes.
    fn count(&self, r: f64, a: f64, counts: &mut Counts) {
        let (low, high) = match *self {
            Self::Clipped { low, high, .. } => (1.0 - low, 1.0 + high),
            Self::Capped { cap } => (0.0, cap),
            Self::Soft { .. } | Self::Variational { .. } | Self::Score => return,
        };
        counts.low += f64::from(u8::from(r < low && a < 0.0));
        counts.high += f64::from(u8::from(r > high && a > 0.0));
    }
}

/// Sums over tokens, for metrics.
#[derive(Default)]
pub(super) struct Counts {
    pub kl: f64,
    pub low: f64,
    pub high: f64,
}

impl Counts {
    pub fn metrics(&self, totals: &Totals, held: bool, clips: bool) -> Vec<Metric> {
        let share = |sum: f64| sum / totals.completion_tokens.max(1.0);
        let clipped = [("clip_ratio/low_mean", self.low), ("clip_ratio/high_mean", self.high)];
        let clipped = clipped.into_iter().filter(|_| clips);
        let kl = held.then_some(("kl", self.kl));
        clipped.chain(kl).map(|(name, sum)| (name.into(), share(sum))).collect()
    }
}

/// The family whose completions are compared within their group.
pub(super) struct Grouped {
    name: &'static str,
    surrogate: Surrogate,
    compare: ByGroup,
}

impl Grouped {
    pub fn boxed(name: &'static str, params: &Params, surrogate: Surrogate) -> Result<Box<dyn Objective>> {
        Ok(Box::new(Self { name, surrogate, compare: ByGroup::of(params) }))
    }

    /// The same, where advantages are never scaled.
    pub fn unscaled(name: &'static str, params: &Params, surrogate: Surrogate) -> Result<Box<dyn Objective>> {
        let compare = ByGroup { scale: super::advantages::Scale::None, ..ByGroup::of(params) };
        Ok(Box::new(Self { name, surrogate, compare }))
    }
}

impl Objective for Grouped {
    fn name(&self) -> &str {
        self.name
    }

    fn needs(&self) -> Needs {
        self.surrogate.needs()
    }

    fn scope(&self) -> Scope {
        self.surrogate.scope()
    }

    fn credit(&self, rollouts: &Stats) -> Credit {
        let Stats { rewards, reward_weights, groups, .. } = rollouts;
        Credit { advantages: self.compare.advantages(rewards, reward_weights, groups), ..Credit::default() }
    }

    fn evaluate(&self, stats: &Stats, totals: &Totals) -> Outcome {
        self.surrogate.evaluate(stats, totals, |s, _| stats.advantages[s])
    }
}
