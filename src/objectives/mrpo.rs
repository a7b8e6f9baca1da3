//! Le et al., arXiv:2405.16388: several references in the place of one (multi-reference preference optimization).
//!
//! K references r_1 .. r_K with weights a_k >= 0 that sum to 1 make one virtual reference v, per completion y; r_1,
//! `refs[0]`, is the anchor, the policy before training:
//!
//! ```text
//! geometric    v(y) =       sum_k a_k r_k(y)              maximises E[r] - beta sum_k a_k KL(pi || pi_k) exactly
//! harmonic     v(y) = - ln sum_k a_k exp(-r_k(y))         the paper's: maximises a lower bound of it
//! arithmetic   v(y) =   ln sum_k a_k exp(r_k(y))          maximises an upper bound
//! multi-DPO    loss =      sum_k a_k loss(reference k)    no virtual reference: the paper's baseline
//! ```
//!
//! The geometric mean is what Aminian et al., arXiv:2502.01203, call the exact solution for the reverse KL; for the
//! forward KL it is the arithmetic mean with the inner loss's f-divergence `forward_kl`, since there the reward is
//! `const - beta mean(pi_k) / pi` (same paper). Any objective that reads one reference gets v as that reference.
//!
//! CTRO, clipped trust region, for k >= 2 (log-probs are <= 0, so (1 + e) r_1 is the lower edge; b(y) is the absolute
//! mean over all references or, with [`Window::Anchor`], |r_1(y)|):
//!
//! ```text
//! r_k(y) <- min(max(r_k(y), (1 + e(y)) r_1(y)), (1 - e(y)) r_1(y))
//! e(y_w) = eps_max b(y_w) / (b(y_w) + b(y_l)),    e(y_l) = eps_max - e(y_w)
//! ```
//!
//! ARWC, weights per pair: `a_k = |r_k(y_w) - r_k(y_l)| / (sum_j |r_j(y_w) - r_j(y_l)| + 1e-6)` for k >= 2, unclipped,
//! and the anchor takes the rest.
//!
//! Deviations: the paper and its code have K = 2 and the harmonic mean; the default here is the geometric one, which
//! is exact and needs no clipping. The released code swaps the two weights inside the harmonic mean
//! ([`Blend::official_k2_swap`] does the same). Adaptive windows of two completions of probability 1 are 0/0 there
//! and equal here. A completion in several pairs gets the mean of their weights and windows; the code has none.
//!
//! Everything is a difference to the reference with the largest weight. So equal references give the numbers of
//! one to the last bit, whatever the weights, and a reference of weight 0 is not looked at.

use std::cell::RefCell;

use super::{Choice, Credit, Grads, Metric, Needs, Objective, Outcome, Scope, Stats, Totals};
use crate::error::{Error, Result};

/// How K references become one.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Blend {
    pub mean: Mean,
    pub weights: Weighting,
    pub clip: Option<RefClip>,
    pub level: Level,
    /// Reproduces the released code, which exchanges the two weights of the harmonic mean.
    pub official_k2_swap: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mean {
    #[default]
    Geometric,
    Harmonic,
    Arithmetic,
    /// The mean of the losses instead of a mean of the references. Metrics that are not per reference are those
    /// against the anchor, as in the released code.
    MultiDpo,
}

/// Where weights come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Weighting {
    /// [`Stats::ref_weights`], one for each reference, for the whole step.
    #[default]
    Step,
    /// Per pair, by how far each reference tells it apart. It looks at the pair that it then weights (see
    /// [`super::ref_weights`] for rules that do not).
    Arwc,
}

/// The trust region around the anchor (CTRO).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RefClip {
    /// Width relative to the anchor's log-prob, (0, 1); 0.1 in the released code.
    pub eps_max: f64,
    pub window: Window,
}

/// How a pair shares [`RefClip::eps_max`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Window {
    /// By the mean log-probs of all references (released code): the less likely completion gets the wider window.
    MeanRefs,
    /// By the anchor's log-probs alone.
    Anchor,
    /// Not at all: `eps_max` for every completion.
    Fixed,
}

/// What is averaged. The geometric mean is the same on both levels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Level {
    /// Probabilities of whole completions, as in the paper.
    #[default]
    Sequence,
    /// Probabilities of tokens, which are then summed: the arithmetic mean is an ordinary ensemble of models.
    Token,
}

impl Mean {
    /// The virtual log-prob of one completion or token from those of K references, nats.
    pub fn blend(self, logps: &[f64], weights: &[f64]) -> f64 {
        let pivot = heaviest(weights);
        let terms = |sign: f64| {
            let of_weight = logps.iter().zip(weights).filter(|(_, weight)| **weight > 0.0);
            of_weight.map(move |(logp, &weight)| (weight, sign * (logp - logps[pivot])))
        };
        match self {
            Self::Geometric | Self::MultiDpo => logps[pivot] + terms(1.0).map(|(weight, x)| weight * x).sum::<f64>(),
            Self::Harmonic => logps[pivot] - ln_mean_exp(terms(-1.0)),
            Self::Arithmetic => logps[pivot] + ln_mean_exp(terms(1.0)),
        }
    }
}

/// The first of the references with the largest weight: the one that the others are compared with.
fn heaviest(weights: &[f64]) -> usize {
    (1..weights.len()).fold(0, |best, k| if weights[k] > weights[best] { k } else { best })
}

/// ln sum_k w_k e^x_k of weights that sum to 1 up to rounding, where one of the heaviest has x = 0; exactly 0 if all have.
fn ln_mean_exp(terms: impl Iterator<Item = (f64, f64)> + Clone) -> f64 {
    let largest = terms.clone().map(|(_, x)| x).fold(0.0, f64::max);
    if largest <= 1.0 {
        terms.map(|(weight, x)| weight * x.exp_m1()).sum::<f64>().ln_1p()
    } else {
        largest + terms.map(|(weight, x)| weight * (x - largest).exp()).sum::<f64>().ln()
    }
}

impl Blend {
    /// Whether weights or windows are those of a pair.
    fn per_pair(&self) -> bool {
        self.weights == Weighting::Arwc || self.clip.is_some_and(|clip| clip.window != Window::Fixed)
    }

    /// Refuses what contradicts itself or would do nothing: with this many references, for an objective that
    /// reads pairs ([`Needs::pairs`]) or does not.
    pub fn check(&self, references: usize, pairs: bool) -> Result<()> {
        let given = [
            ("--ref-mean", self.mean != Mean::default()),
            ("--ref-weights arwc", self.weights == Weighting::Arwc),
            ("--ref-clip", self.clip.is_some()),
            ("--ref-level token", self.level == Level::Token),
            ("--official-k2-swap", self.official_k2_swap),
        ];
        if references < 2
            && let Some((key, _)) = given.iter().find(|(_, given)| *given)
        {
            let detail = format!("blends several references, there is {references}; add a --ref-model or remove it");
            return Err(Error::option(key, detail));
        }
        if let Some(RefClip { eps_max, .. }) = self.clip
            && !(eps_max > 0.0 && eps_max < 1.0)
        {
            let detail = format!("expected 0 < width < 1, got {eps_max}; for example `--ref-clip 0.1`");
            return Err(Error::option("--ref-clip", detail));
        }
        self.check_pairs(pairs)?;
        self.check_level()?;
        if self.official_k2_swap && (references != 2 || self.mean != Mean::Harmonic) {
            let detail = format!(
                "reproduces what the released code does to 2 references and the harmonic mean, there are {references} \
                 and {:?}; remove it, or use `--ref-mean harmonic` with two references",
                self.mean
            );
            return Err(Error::option("--official-k2-swap", detail));
        }
        Ok(())
    }

    /// Refuses an objective that it cannot be put around.
    fn check_inner(&self, inner: &dyn Objective) -> Result<()> {
        let needs = inner.needs();
        // What has no pair, such as completions under prompts that are not theirs, cannot be weighted by one.
        self.check_pairs(needs.pairs && !needs.mismatched)?;
        if self.mean == Mean::MultiDpo && self.weights == Weighting::Arwc && !needs.pair_weights {
            let detail = format!(
                "`arwc` weighs pair by pair, which {} does not allow; use `--ref-weights uniform`, or a --ref-mean other \
                 than multi-dpo",
                inner.name()
            );
            return Err(Error::option("--ref-weights", detail));
        }
        Ok(())
    }

    fn check_pairs(&self, pairs: bool) -> Result<()> {
        if pairs {
            return Ok(());
        }
        if self.weights == Weighting::Arwc {
            let detail = "`arwc` weighs references by a pair, the objective has none; give weights, \
                          for example `--ref-weights uniform`";
            return Err(Error::option("--ref-weights", detail));
        }
        if self.per_pair() {
            let detail =
                "an adaptive window is shared by a pair, the objective has none; use `--ref-clip-window fixed`";
            return Err(Error::option("--ref-clip-window", detail));
        }
        Ok(())
    }

    fn check_level(&self) -> Result<()> {
        if self.level == Level::Sequence {
            return Ok(());
        }
        let detail = match (self.mean, self.clip) {
            (_, Some(_)) => "`--ref-clip` clips log-probs of whole completions; remove one of the two",
            (Mean::Geometric, _) => {
                "the geometric mean is the same on both levels; remove it, or choose another --ref-mean"
            }
            (Mean::MultiDpo, _) => {
                "multi-DPO averages losses, not probabilities; remove it, or choose another --ref-mean"
            }
            (Mean::Harmonic | Mean::Arithmetic, None) => return Ok(()),
        };
        Err(Error::option("--ref-level", format!("token: {detail}")))
    }
}

/// What the user chose, on a blend of so many references: around each term that reads one reference, inside its modifiers.
/// With a single reference there is no blend to build.
///
/// Fails as [`Blend::check`], and where a term cannot have the blend.
pub fn build(choice: &Choice, blend: &Blend, references: usize) -> Result<Box<dyn Objective>> {
    blend.check(references, true)?;
    if blend.level == Level::Token && choice.params.get("ld_alpha").is_some() {
        let detail = "token: sums tokens of equal weight, --ld-alpha gives them others; remove one of the two";
        return Err(Error::option("--ref-level", detail));
    }
    let refused = RefCell::new(Ok(()));
    let leaf = |inner: Box<dyn Objective>| -> Box<dyn Objective> {
        match blend.check_inner(&*inner) {
            _ if references < 2 => inner,
            Ok(()) => Box::new(MultiRef::new(inner, *blend)),
            Err(e) => {
                *refused.borrow_mut() = Err(e);
                inner
            }
        }
    };
    let built = super::build(choice, &leaf)?;
    refused.into_inner().map(|()| built)
}

/// An objective that reads one reference, on a blend of K.
///
/// Metrics of reference k from 0, the anchor first, beside those of the inner objective: `refs/k/weight` (mean over
/// pairs, or over sequences where there are none), `refs/k/logratio` (mean over sequences of ln pi - r_k, nats: were
/// the completions the policy's, the k1 estimate of KL(pi || pi_k)) and on pairs `refs/k/discrimination` (mean
/// |r_k(y_w) - r_k(y_l)|, nats) and `refs/k/accuracy` (share of r_k(y_w) > r_k(y_l), a tie is half).
pub struct MultiRef {
    inner: Box<dyn Objective>,
    blend: Blend,
}

/// The numbers of one reference, real or virtual, for the inner objective.
struct One {
    logps: Vec<f64>,
    token_logps: Vec<f64>,
    mismatched_logps: Vec<f64>,
}

impl MultiRef {
    /// For blends that were checked; [`build`] does.
    ///
    /// # Panics
    /// If `inner` does not work with one reference, or has completions without a pair and the blend goes by pairs.
    pub fn new(inner: Box<dyn Objective>, blend: Blend) -> Self {
        let needs = inner.needs();
        assert!(needs.refs.contains(&1), "{} does not read one reference", inner.name());
        assert!(!(needs.mismatched && blend.per_pair()), "{} has completions without a pair", inner.name());
        Self { inner, blend }
    }

    /// `[K][S]` weights of the references for each sequence.
    fn weights(&self, stats: &Stats) -> Vec<Vec<f64>> {
        (0..stats.ref_logps.len())
            .map(|k| match self.blend.weights {
                Weighting::Step => vec![stats.ref_weights[k]; stats.lens.len()],
                Weighting::Arwc => mean_over_pairs(stats, |pair| [arwc(&stats.ref_logps, pair, k); 2]),
            })
            .collect()
    }

    /// `[S]` half the width of each sequence's window, relative to the anchor's log-prob.
    fn windows(&self, stats: &Stats, clip: RefClip) -> Vec<f64> {
        let refs = &stats.ref_logps;
        let used = match clip.window {
            Window::MeanRefs => refs.len(),
            Window::Anchor => 1,
            Window::Fixed => return vec![clip.eps_max; stats.lens.len()],
        };
        // A log-prob that rounding made positive would turn its window over.
        let size = |s: usize| -refs[..used].iter().map(|logps| logps[s].min(0.0)).sum::<f64>();
        mean_over_pairs(stats, |(chosen, rejected)| {
            let (chosen, rejected) = (size(chosen), size(rejected));
            let share = if chosen + rejected > 0.0 { chosen / (chosen + rejected) } else { 0.5 };
            [clip.eps_max * share, clip.eps_max * (1.0 - share)]
        })
    }

    /// The references as losses see them, clipped to the anchor.
    fn references(&self, stats: &Stats) -> Vec<One> {
        let (mut refs, mut mismatched) = (stats.ref_logps.clone(), stats.mismatched_ref_logps.clone());
        if let Some(clip) = self.blend.clip {
            clip_to_anchor(&mut refs, &self.windows(stats, clip));
            let windows = vec![clip.eps_max; stats.mismatched_logps.len()];
            clip_to_anchor(&mut mismatched, &windows);
        }
        let mut tokens = stats.ref_token_logps.clone();
        tokens.resize(refs.len(), vec![]);
        mismatched.resize(refs.len(), vec![]);
        let all = refs.into_iter().zip(tokens).zip(mismatched);
        all.map(|((logps, token_logps), mismatched_logps)| One { logps, token_logps, mismatched_logps }).collect()
    }

    fn virtual_reference(&self, stats: &Stats, refs: &[One], weights: &[Vec<f64>]) -> One {
        let mean = self.blend.mean;
        let mut order: Vec<usize> = (0..refs.len()).collect();
        if self.blend.official_k2_swap {
            order.reverse();
        }
        let of_sequence = |s: usize| order.iter().map(|&k| weights[k][s]).collect::<Vec<f64>>();
        let blend = |of: fn(&One) -> &Vec<f64>, i: usize, weights: &[f64]| {
            mean.blend(&refs.iter().map(|one| of(one)[i]).collect::<Vec<f64>>(), weights)
        };
        let mut one = One { logps: vec![], token_logps: vec![], mismatched_logps: vec![] };
        for s in 0..stats.lens.len() {
            let weights = of_sequence(s);
            let tokens = if stats.ref_token_logps.is_empty() { 0..0 } else { stats.offsets[s]..stats.offsets[s + 1] };
            let start = one.token_logps.len();
            one.token_logps.extend(tokens.map(|t| blend(|one| &one.token_logps, t, &weights)));
            one.logps.push(match self.blend.level {
                Level::Sequence => blend(|one| &one.logps, s, &weights),
                Level::Token => one.token_logps[start..].iter().sum(),
            });
        }
        // Not of a pair, so their weights are those of the step.
        let mismatched = 0..stats.mismatched_logps.len();
        let weights = || order.iter().map(|&k| stats.ref_weights[k]).collect::<Vec<f64>>();
        one.mismatched_logps = mismatched.map(|m| blend(|one| &one.mismatched_logps, m, &weights())).collect();
        one
    }

    fn evaluate_inner(&self, stats: &Stats, totals: &Totals, one: &One, pair_weights: &[f64]) -> Outcome {
        self.inner.evaluate(&self.of_inner(stats, one, pair_weights), totals)
    }

    /// The statistics with one reference in the place of all.
    fn of_inner(&self, stats: &Stats, one: &One, pair_weights: &[f64]) -> Stats {
        let needs = self.inner.needs();
        let when = |needed: bool, of: &Vec<f64>| if needed { vec![of.clone()] } else { vec![] };
        Stats {
            ref_logps: vec![one.logps.clone()],
            ref_token_logps: when(needs.ref_token_logps, &one.token_logps),
            mismatched_ref_logps: when(needs.mismatched, &one.mismatched_logps),
            ref_weights: vec![],
            pair_weights: pair_weights.to_vec(),
            ..stats.clone()
        }
    }

    /// sum_k a_k L_k as L_p + sum_k a_k (L_k - L_p), so that equal references give the loss of one exactly.
    fn mean_of_losses(&self, stats: &Stats, totals: &Totals, refs: &[One]) -> Outcome {
        let given = &stats.pair_weights;
        let anchor = self.evaluate_inner(stats, totals, &refs[0], given);
        // Weights of pairs go into the loss pair by pair, weights of the step before the whole of it.
        let (pivot, per_pair) = match self.blend.weights {
            Weighting::Step => (heaviest(&stats.ref_weights), false),
            Weighting::Arwc => (0, true),
        };
        let mut mean =
            if pivot == 0 { anchor.clone() } else { self.evaluate_inner(stats, totals, &refs[pivot], given) };
        for k in (0..refs.len()).filter(|&k| k != pivot) {
            let (weight, pair_weights) = if per_pair {
                let of_pair = |(i, &pair)| given.get(i).unwrap_or(&1.0) * arwc(&stats.ref_logps, pair, k);
                (1.0, stats.pairs.iter().enumerate().map(of_pair).collect())
            } else {
                (stats.ref_weights[k], given.clone())
            };
            if weight > 0.0 {
                let plus = self.evaluate_inner(stats, totals, &refs[k], &pair_weights);
                let minus = self.evaluate_inner(stats, totals, &refs[pivot], &pair_weights);
                add_difference(&mut mean, weight, &plus, &minus);
            }
        }
        Outcome { metrics: anchor.metrics, state: anchor.state, ..mean }
    }

    fn metrics(&self, stats: &Stats, totals: &Totals, weights: &[Vec<f64>]) -> Vec<Metric> {
        let on_pairs = self.needs().pairs;
        let (weighed, total): (Vec<usize>, f64) = match on_pairs {
            true => (stats.pairs.iter().map(|pair| pair.0).collect(), totals.pairs),
            false => ((0..stats.lens.len()).collect(), totals.sequences),
        };
        let mut metrics = Vec::new();
        for (k, logps) in stats.ref_logps.iter().enumerate() {
            let mut push = |name: &str, value: f64| metrics.push((format!("refs/{k}/{name}").into(), value));
            push("weight", weighed.iter().map(|&s| weights[k][s] / total).sum());
            if on_pairs {
                let gaps = || stats.pairs.iter().map(|&(chosen, rejected)| logps[chosen] - logps[rejected]);
                push("discrimination", gaps().map(|gap| gap.abs() / totals.pairs).sum());
                push("accuracy", gaps().map(|gap| wins(gap) / totals.pairs).sum());
            }
            push("logratio", stats.logps.iter().zip(logps).map(|(policy, r)| (policy - r) / totals.sequences).sum());
        }
        metrics
    }
}

impl Objective for MultiRef {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn needs(&self) -> Needs {
        let inner = self.inner.needs();
        Needs {
            refs: 1..=usize::MAX,
            pairs: inner.pairs || self.blend.per_pair(),
            ref_token_logps: inner.ref_token_logps || self.blend.level == Level::Token,
            ref_weights: self.blend.weights == Weighting::Step,
            ..inner
        }
    }

    fn scope(&self) -> Scope {
        self.inner.scope()
    }

    fn initial_state(&self) -> Vec<f64> {
        self.inner.initial_state()
    }

    /// Of Multi-DPO's means of losses, too, rewards are held to one blend.
    fn credit(&self, rollouts: &Stats) -> Credit {
        let refs = self.references(rollouts);
        let one = self.virtual_reference(rollouts, &refs, &self.weights(rollouts));
        self.inner.credit(&self.of_inner(rollouts, &one, &[]))
    }

    fn evaluate(&self, stats: &Stats, totals: &Totals) -> Outcome {
        let refs = self.references(stats);
        let weights = self.weights(stats);
        let mut outcome = match self.blend.mean {
            Mean::MultiDpo => self.mean_of_losses(stats, totals, &refs),
            _ => {
                let one = self.virtual_reference(stats, &refs, &weights);
                self.evaluate_inner(stats, totals, &one, &stats.pair_weights)
            }
        };
        outcome.metrics.extend(self.metrics(stats, totals, &weights));
        outcome
    }
}

/// `[S]` what the pairs of each sequence say on the average; 0 where there is none. `value` gives that of the chosen
/// and of the rejected completion.
fn mean_over_pairs(stats: &Stats, value: impl Fn((usize, usize)) -> [f64; 2]) -> Vec<f64> {
    let (mut sums, mut pairs) = (vec![0.0; stats.lens.len()], vec![0.0_f64; stats.lens.len()]);
    for &(chosen, rejected) in &stats.pairs {
        for (s, value) in [chosen, rejected].into_iter().zip(value((chosen, rejected))) {
            sums[s] += value;
            pairs[s] += 1.0;
        }
    }
    sums.iter().zip(&pairs).map(|(sum, pairs)| sum / pairs.max(1.0)).collect()
}

/// The weight of reference k for one pair.
fn arwc(refs: &[Vec<f64>], (chosen, rejected): (usize, usize), k: usize) -> f64 {
    let gap = |logps: &Vec<f64>| (logps[chosen] - logps[rejected]).abs();
    let total = refs.iter().map(gap).sum::<f64>() + 1e-6;
    match k {
        0 => (1.0 - refs[1..].iter().map(|logps| gap(logps) / total).sum::<f64>()).max(0.0),
        _ => gap(&refs[k]) / total,
    }
}

/// Moves every reference but the first into the window around the first.
fn clip_to_anchor(refs: &mut [Vec<f64>], windows: &[f64]) {
    let Some((anchor, others)) = refs.split_first_mut() else { return };
    for logps in others {
        for ((logp, &anchor), &eps) in logps.iter_mut().zip(&*anchor).zip(windows) {
            // At 0 and where rounding made it positive, the anchor leaves no room on either side.
            let eps = if anchor < 0.0 { eps } else { 0.0 };
            *logp = logp.max((1.0 + eps) * anchor).min((1.0 - eps) * anchor);
        }
    }
}

/// 1, a half for a tie, 0.
pub(super) fn wins(gap: f64) -> f64 {
    if gap == 0.0 { 0.5 } else { f64::from(gap > 0.0) }
}

/// Loss and gradients: `into += scale (plus - minus)`.
fn add_difference(into: &mut Outcome, scale: f64, plus: &Outcome, minus: &Outcome) {
    fn arrays(grads: &Grads) -> impl Iterator<Item = &Vec<f64>> {
        let Grads { logps, token_logps, entropy, scores, values, token_kl } = grads;
        [logps, token_logps, entropy, scores, values].into_iter().chain(token_kl)
    }
    into.loss += scale * (plus.loss - minus.loss);
    let Grads { logps, token_logps, entropy, scores, values, token_kl } = &mut into.grads;
    let into = [logps, token_logps, entropy, scores, values].into_iter().chain(token_kl);
    for ((into, plus), minus) in into.zip(arrays(&plus.grads)).zip(arrays(&minus.grads)) {
        into.iter_mut().zip(plus.iter().zip(minus)).for_each(|(x, (plus, minus))| *x += scale * (plus - minus));
    }
}
