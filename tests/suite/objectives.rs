//! What must hold for every objective in the registry, walked as data, so that a new one is tested before its
//! author writes a test; then the identities of those that are there.

use std::f64::consts::LN_2;
use std::ops::Range;

use cuvee::Error;
use cuvee::objectives::{self, Choice, Domain, Grads, Needs, Objective, ParamSpec, Params, Scope, Stats, Totals};

/// Half the width of log-ratios, nats: hardly trained, trained, collapsed, absurd.
const SPREADS: [f64; 4] = [0.1, 10.0, 1e3, 1e4];

// ---- every entry ----------------------------------------------------------------------------------------------

#[test]
fn names_and_aliases_are_unique_and_lead_to_their_entry() {
    let mut seen = std::collections::BTreeSet::new();
    for entry in objectives::all() {
        assert_eq!(example(entry).name(), entry.name);
        for name in entry.aliases.iter().chain([&entry.name]) {
            assert!(seen.insert(name), "{name} is taken twice");
            assert_eq!(objectives::find(name).unwrap().name, entry.name);
        }
    }
}

/// One flag stands for all parameters of a name, and one help text says what it means.
#[test]
fn a_parameter_means_the_same_wherever_it_occurs() {
    for (name, shared) in objectives::params() {
        let kind = |spec: &ParamSpec| match spec.domain {
            Domain::Number { .. } => None,
            domain => Some((domain.clone(), spec.default())),
        };
        let first = shared.specs[0];
        for spec in &shared.specs {
            assert!(kind(spec) == kind(first), "{name} takes other values elsewhere");
            assert_eq!((spec.help, spec.only_with), (first.help, first.only_with), "{name}");
            assert!(spec.accepts(&spec.example()), "{name}: its own example is refused");
            assert!(spec.default().is_none_or(|value| spec.accepts(&value)), "{name}: its own default is refused");
        }
    }
}

#[test]
fn gradients_are_central_differences_of_the_loss() {
    type Field = (&'static str, fn(&mut Stats) -> &mut Vec<f64>, fn(&Grads) -> &Vec<f64>);
    const FIELDS: [Field; 5] = [
        ("logps", |s| &mut s.logps, |g| &g.logps),
        ("token_logps", |s| &mut s.token_logps, |g| &g.token_logps),
        ("entropy", |s| &mut s.entropy, |g| &g.entropy),
        ("scores", |s| &mut s.scores, |g| &g.scores),
        ("values", |s| &mut s.values, |g| &g.values),
    ];
    for_every_objective(|what, objective, stats| {
        let totals = Totals::of(stats);
        let outcome = objective.evaluate(stats, &totals);
        for (field, of_stats, of_grads) in FIELDS {
            let grads = of_grads(&outcome.grads);
            let mut moved = stats.clone();
            let len = of_stats(&mut moved).len();
            assert!(grads.is_empty() || grads.len() == len, "{what}: {field}: {} derivatives of {len}", grads.len());
            for i in 0..len {
                let x = of_stats(&mut moved)[i];
                let (low, high) = (x - 1e-4, x + 1e-4);
                let mut loss_at = |x| {
                    of_stats(&mut moved)[i] = x;
                    objective.evaluate(&moved, &totals).loss
                };
                let numeric = (loss_at(high) - loss_at(low)) / (high - low);
                of_stats(&mut moved)[i] = x;
                let analytic = grads.get(i).copied().unwrap_or(0.0);
                // Truncation, then the rounding of the two losses.
                let tolerance = 1e-6 * analytic.abs() + 1e-9 + 1e-15 * outcome.loss.abs() / (high - low);
                assert!(
                    (numeric - analytic).abs() <= tolerance,
                    "{what}: {field}[{i}]: central difference {numeric}, derivative {analytic}"
                );
            }
        }
    });
}

#[test]
fn micro_batches_add_up_to_the_batch() {
    for_every_objective(|what, objective, stats| {
        if objective.scope() != Scope::Pair {
            return;
        }
        let whole = Totals::of(stats);
        let (cut, end) = (2, stats.lens.len());
        let parts = [micro_batch(stats, 0..cut), micro_batch(stats, cut..end)];
        let mut totals = Totals::of(&parts[0]);
        totals += Totals::of(&parts[1]);
        assert_eq!(totals, whole, "{what}");

        let expected = objective.evaluate(stats, &totals);
        let [first, second] = parts.map(|part| objective.evaluate(&part, &totals));
        let near = |a: f64, b: f64| (a - b).abs() <= 1e-12 * a.abs().max(1.0);
        assert!(near(expected.loss, first.loss + second.loss), "{what}");
        assert_eq!(expected.metrics.len(), first.metrics.len(), "{what}");
        for (i, (metric, value)) in expected.metrics.iter().enumerate() {
            assert_eq!((metric, metric), (&first.metrics[i].0, &second.metrics[i].0), "{what}");
            assert!(near(*value, first.metrics[i].1 + second.metrics[i].1), "{what}: {metric}");
        }
        let join = |of: fn(Grads) -> Vec<f64>| [of(first.grads.clone()), of(second.grads.clone())].concat();
        let joined = Grads {
            logps: join(|g| g.logps),
            token_logps: join(|g| g.token_logps),
            entropy: join(|g| g.entropy),
            scores: join(|g| g.scores),
            values: join(|g| g.values),
            token_kl: (0..expected.grads.token_kl.len())
                .map(|k| [first.grads.token_kl[k].clone(), second.grads.token_kl[k].clone()].concat())
                .collect(),
        };
        assert_eq!(expected.grads, joined, "{what}");
    });
}

#[test]
fn nothing_is_nan_or_infinite_at_extreme_inputs() {
    for_every_objective(|what, objective, stats| {
        let outcome = objective.evaluate(stats, &Totals::of(stats));
        let Grads { logps, token_logps, entropy, scores, values, token_kl } = &outcome.grads;
        let metrics = outcome.metrics.iter().map(|metric| &metric.1);
        let grads = [logps, token_logps, entropy, scores, values].into_iter().chain(token_kl).flatten();
        assert!(outcome.loss.is_finite() && grads.chain(metrics).all(|x| x.is_finite()), "{what}: {outcome:?}");
    });
}

#[test]
fn an_empty_micro_batch_contributes_nothing() {
    for entry in objectives::all() {
        let objective = example(entry);
        let empty = Stats { ref_logps: vec![vec![]; *objective.needs().refs.start()], ..Stats::default() };
        let outcome = objective.evaluate(&empty, &Totals::default());
        assert_eq!(outcome.loss, 0.0, "{}", entry.name);
        assert!(outcome.metrics.iter().all(|metric| metric.1 == 0.0), "{}", entry.name);
    }
}

// ---- identities -----------------------------------------------------------------------------------------------

#[test]
fn where_policy_and_reference_agree_losses_are_known_and_margins_exactly_zero() {
    let beta = 0.3;
    let expected = [
        ("sigmoid", LN_2),
        ("hinge", 1.0),
        ("ipo", 0.25 / (beta * beta)),
        ("ipo_sum", 0.25 / (beta * beta)),
        ("ipo_margin1", 1.0),
    ];
    for (name, loss) in expected {
        let objective = build(name, &beta_only(beta)).unwrap();
        let mut stats = random_stats(&objective.needs(), 10.0, &mut Random(7));
        stats.ref_logps = vec![stats.logps.clone()];
        let outcome = objective.evaluate(&stats, &Totals::of(&stats));
        assert!((outcome.loss - loss).abs() <= 1e-12 * loss, "{name}: {} instead of {loss}", outcome.loss);
        for metric in ["rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"] {
            assert!(outcome.metrics.contains(&(metric.into(), 0.0)), "{name}: {metric} in {:?}", outcome.metrics);
        }
    }
}

#[test]
fn the_three_ipos_are_scalings_of_each_other() {
    let loss = |name: &str, beta: f64, stats: &Stats| {
        build(name, &beta_only(beta)).unwrap().evaluate(stats, &Totals::of(stats)).loss
    };
    let mut stats = one_pair(-3.0, -9.0);
    let (beta, sum) = (0.2, loss("ipo_sum", 0.2, &stats));
    assert!((loss("ipo_margin1", 2.0 * beta, &stats) - 4.0 * beta * beta * sum).abs() < 1e-12);
    assert!((loss("ipo", beta, &stats) - sum).abs() < 1e-12, "lengths of 1 average nothing");
    stats.lens = vec![3.0, 9.0];
    assert!((loss("ipo", beta, &stats) - 0.25 / (beta * beta)).abs() < 1e-12, "-3/3 and -9/9 have no margin");
}

#[test]
fn hinge_is_flat_at_and_beyond_its_kink() {
    let hinge = build("hinge", &beta_only(0.5)).unwrap();
    let totals = Totals { pairs: 1.0, ..Totals::default() };
    for (chosen, loss, grads) in [(2.0, 0.0, [0.0, 0.0]), (3.0, 0.0, [0.0, 0.0]), (1.0, 0.5, [-0.5, 0.5])] {
        let outcome = hinge.evaluate(&one_pair(chosen, 0.0), &totals);
        assert_eq!((outcome.loss, outcome.grads.logps), (loss, grads.to_vec()));
    }
}

#[test]
fn sft_counts_chosen_completions_only_when_there_are_pairs() {
    let sft = build("sft", &Params::default()).unwrap();
    let mut stats = Stats { logps: vec![-6.0, -8.0], lens: vec![3.0, 1.0], ..Stats::default() };
    let outcome = sft.evaluate(&stats, &Totals::of(&stats));
    assert_eq!((outcome.loss, outcome.grads.logps), (3.5, vec![-0.25, -0.25]));
    stats.pairs = vec![(0, 1)];
    let outcome = sft.evaluate(&stats, &Totals::of(&stats));
    assert_eq!((outcome.loss, outcome.grads.logps), (2.0, vec![-1.0 / 3.0, 0.0]));
}

/// A tie is not a win, and a completion may be in several pairs.
#[test]
fn accuracy_counts_strict_wins() {
    let dpo = build("dpo", &beta_only(0.1)).unwrap();
    let stats = Stats {
        logps: vec![-1.0, -1.0, -5.0],
        ref_logps: vec![vec![-2.0; 3]],
        lens: vec![1.0; 3],
        pairs: vec![(0, 1), (0, 2), (2, 0), (1, 2)],
        ..Stats::default()
    };
    let outcome = dpo.evaluate(&stats, &Totals::of(&stats));
    assert!(outcome.metrics.contains(&("rewards/accuracies".into(), 0.5)), "{:?}", outcome.metrics);
}

// ---- what the user types --------------------------------------------------------------------------------------

#[test]
fn options_that_are_missing_unused_or_out_of_range_are_named() {
    let none = Params::default();
    refused("sigmoid", &none, "--beta", "for example `--beta 0.1`");
    for beta in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        refused("dpo", &beta_only(beta), "--beta", "0 < beta < inf");
    }
    let smoothing = |e| Params::from_iter([("beta", 0.1), ("label_smoothing", e)]);
    for e in [-0.1, 0.5, 1.0, f64::NAN] {
        refused("sigmoid", &smoothing(e), "--label-smoothing", "0 <= label_smoothing < 0.5");
    }
    refused("hinge", &smoothing(0.1), "--label-smoothing", "hinge does not use it, it takes --beta");
    refused("sft", &beta_only(0.1), "--beta", "sft does not use it, it takes no parameter");
    refused("sigmiod", &none, "--objective", "did you mean \"sigmoid\"?");
    assert!(build("sigmoid", &smoothing(0.0)).is_ok());
}

fn refused(name: &str, params: &Params, expected_key: &str, expected_detail: &str) {
    match build(name, params).err() {
        Some(Error::Option { key, detail }) => {
            assert_eq!(key, expected_key);
            assert!(detail.contains(expected_detail), "{detail:?} does not say {expected_detail:?}");
        }
        other => panic!("{name} with {params:?}: expected an option error, got {other:?}"),
    }
}

// ---- inputs ---------------------------------------------------------------------------------------------------

/// Every entry at each spread, with the example value of each parameter and with the defaults.
fn for_every_objective(check: impl Fn(&str, &dyn Objective, &Stats)) {
    for entry in objectives::all() {
        let required = entry.params.iter().filter(|spec| spec.required());
        let plain = required.map(|spec| (spec.name, spec.example())).collect();
        let plain = build(entry.name, &plain).unwrap();
        for (case, objective) in [("defaults", plain), ("examples", example(entry))] {
            for spread in SPREADS {
                let stats = random_stats(&objective.needs(), spread, &mut Random(spread.to_bits()));
                check(&format!("{}, {case}, spread {spread}", entry.name), objective.as_ref(), &stats);
            }
        }
    }
}

fn example(entry: &objectives::Entry) -> Box<dyn Objective> {
    let params = entry.params.iter().map(|spec| (spec.name, spec.example())).collect();
    build(entry.name, &params).unwrap()
}

/// One objective, with nothing around it.
fn build(name: &str, params: &Params) -> cuvee::Result<Box<dyn Objective>> {
    Choice::one(name, params.clone()).build()
}

fn beta_only(beta: f64) -> Params {
    Params::from_iter([("beta", beta)])
}

/// Two completions of one token with these log-ratios.
fn one_pair(chosen: f64, rejected: f64) -> Stats {
    Stats {
        logps: vec![chosen, rejected],
        ref_logps: vec![vec![0.0, 0.0]],
        lens: vec![1.0, 1.0],
        pairs: vec![(0, 1)],
        ..Stats::default()
    }
}

/// Eight sequences with what `needs` names and nothing else, so that reading anything undeclared panics.
fn random_stats(needs: &Needs, spread: f64, random: &mut Random) -> Stats {
    const SEQUENCES: usize = 8;
    let lens: Vec<usize> = (0..SEQUENCES).map(|_| 1 + (random.unit() * 9.0) as usize).collect();
    let tokens = lens.iter().sum();
    let refs = *needs.refs.start();
    let logps = random.vec(SEQUENCES, -200.0..0.0);
    let token_logps = random.vec(tokens, -5.0..0.0);
    let mut near = |x: &[f64]| x.iter().map(|x| x + spread * (2.0 * random.unit() - 1.0)).collect::<Vec<_>>();
    let ref_logps = (0..refs).map(|_| near(&logps)).collect();
    let ref_token_logps = (0..refs).map(|_| near(&token_logps)).collect();
    let mismatched_logps = near(&logps);
    let mismatched_ref_logps = (0..refs).map(|_| near(&mismatched_logps)).collect();
    let old_token_logps = near(&token_logps);

    let offsets = || (0..=SEQUENCES).map(|s| lens[..s].iter().sum()).collect();
    Stats {
        logps,
        ref_logps,
        lens: lens.iter().map(|&len| len as f64).collect(),
        pairs: when(needs.pairs, || (0..SEQUENCES).step_by(2).map(|s| (s, s + 1)).collect()),
        pair_weights: vec![],
        margins: when(needs.margins, || random.vec(SEQUENCES / 2, 0.0..2.0)),
        labels: when(needs.labels, || (0..SEQUENCES).map(|s| s % 3 == 0).collect()),
        mismatched_logps: when(needs.mismatched, || mismatched_logps),
        mismatched_ref_logps: when(needs.mismatched, || mismatched_ref_logps),
        groups: when(needs.groups, || vec![0..2, 2..5, 5..SEQUENCES]),
        rewards: when(needs.rewards, || random.vec(SEQUENCES, -1.0..1.0)),
        scores: when(needs.scores, || random.vec(SEQUENCES, -spread..spread)),
        offsets: when(needs.per_token(), offsets),
        token_logps: when(needs.token_logps, || token_logps),
        ref_token_logps: when(needs.ref_token_logps, || ref_token_logps),
        old_token_logps: when(needs.old_token_logps, || old_token_logps),
        entropy: when(needs.entropy, || random.vec(tokens, 0.0..5.0)),
        ln_sum_p2: when(needs.ln_sum_p2, || random.vec(tokens, -5.0..0.0)),
        values: when(needs.values, || random.vec(tokens, -spread..spread)),
        token_kl: when(needs.token_kl, || (0..refs).map(|_| random.vec(tokens, 0.0..spread)).collect()),
        ref_weights: when(needs.ref_weights, || (0..refs).map(|_| 1.0 / refs as f64).collect()),
        state: vec![],
    }
}

fn when<T: Default>(needed: bool, make: impl FnOnce() -> T) -> T {
    if needed { make() } else { T::default() }
}

/// The sequences of `range`, with the pairs and groups that lie within it.
fn micro_batch(stats: &Stats, range: Range<usize>) -> Stats {
    fn cut<T: Clone>(x: &[T], range: &Range<usize>) -> Vec<T> {
        x.get(range.clone()).map_or(vec![], <[T]>::to_vec)
    }
    let base = range.start;
    let tokens = if stats.offsets.is_empty() { 0..0 } else { stats.offsets[base]..stats.offsets[range.end] };
    let pairs = stats.pairs.iter().enumerate().filter(|(_, (chosen, _))| range.contains(chosen));
    let groups = stats.groups.iter().filter(|group| range.contains(&group.start));
    Stats {
        logps: cut(&stats.logps, &range),
        ref_logps: stats.ref_logps.iter().map(|x| cut(x, &range)).collect(),
        lens: cut(&stats.lens, &range),
        pairs: pairs.clone().map(|(_, (chosen, rejected))| (chosen - base, rejected - base)).collect(),
        pair_weights: vec![],
        margins: when(!stats.margins.is_empty(), || pairs.clone().map(|(i, _)| stats.margins[i]).collect()),
        labels: cut(&stats.labels, &range),
        mismatched_logps: vec![],
        mismatched_ref_logps: vec![],
        groups: groups.map(|group| group.start - base..group.end - base).collect(),
        rewards: cut(&stats.rewards, &range),
        scores: cut(&stats.scores, &range),
        offsets: cut(&stats.offsets, &(base..range.end + 1)).iter().map(|t| t - tokens.start).collect(),
        token_logps: cut(&stats.token_logps, &tokens),
        ref_token_logps: stats.ref_token_logps.iter().map(|x| cut(x, &tokens)).collect(),
        old_token_logps: cut(&stats.old_token_logps, &tokens),
        entropy: cut(&stats.entropy, &tokens),
        ln_sum_p2: cut(&stats.ln_sum_p2, &tokens),
        values: cut(&stats.values, &tokens),
        token_kl: stats.token_kl.iter().map(|x| cut(x, &tokens)).collect(),
        ref_weights: stats.ref_weights.clone(),
        state: vec![],
    }
}

/// SplitMix64: the same inputs in every run.
struct Random(u64);

impl Random {
    /// Uniform in [0, 1).
    fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    fn vec(&mut self, len: usize, range: Range<f64>) -> Vec<f64> {
        (0..len).map(|_| range.start + (range.end - range.start) * self.unit()).collect()
    }
}
