//! What must hold for every objective in the registry, walked as data, so that a new one is tested before its
//! author writes a test; then the identities of those that are there.

use std::f64::consts::LN_2;
use std::ops::Range;

use cuvee::Error;
use cuvee::objectives::{
    self, Choice, Domain, Grads, Needs, Objective, Outcome, ParamSpec, Params, Scope, Stats, Totals, Value,
};

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
            domain => Some((domain, spec.default())),
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

/// What an objective holds constant on purpose stands still here: WPO's weights, as a token's `ln_sum_p2` moves with its
/// log-prob, and what [`constants`] sees to.
#[test]
fn gradients_are_central_differences_of_the_loss() {
    type Field = (&'static str, fn(&Stats) -> usize, fn(&mut Stats, usize, f64), fn(&Grads) -> &Vec<f64>);
    const FIELDS: [Field; 5] = [
        ("logps", |s| s.logps.len(), |s, i, by| s.logps[i] += by, |g| &g.logps),
        ("token_logps", |s| s.token_logps.len(), move_token, |g| &g.token_logps),
        ("entropy", |s| s.entropy.len(), |s, i, by| s.entropy[i] += by, |g| &g.entropy),
        ("scores", |s| s.scores.len(), |s, i, by| s.scores[i] += by, |g| &g.scores),
        ("values", |s| s.values.len(), |s, i, by| s.values[i] += by, |g| &g.values),
    ];
    fn move_token(stats: &mut Stats, t: usize, by: f64) {
        stats.token_logps[t] += by;
        stats.ln_sum_p2.get_mut(t).into_iter().for_each(|x| *x += by);
    }
    for_every_objective(|what, objective, stats| {
        let stats = &constants(objective, stats);
        let totals = Totals::of(stats);
        let outcome = objective.evaluate(stats, &totals);
        for (field, len, shift, of_grads) in FIELDS {
            let (grads, len) = (of_grads(&outcome.grads), len(stats));
            assert!(grads.is_empty() || grads.len() == len, "{what}: {field}: {} derivatives of {len}", grads.len());
            for i in 0..len {
                let loss_at = |by: f64| {
                    let mut moved = stats.clone();
                    shift(&mut moved, i, by);
                    objective.evaluate(&moved, &totals).loss
                };
                let step = 1e-4;
                let numeric = (loss_at(step) - loss_at(-step)) / (2.0 * step);
                let analytic = grads.get(i).copied().unwrap_or(0.0);
                // Truncation, then the rounding of the two losses.
                let tolerance = 1e-6 * analytic.abs() + 1e-9 + 1e-15 * outcome.loss.abs() / step;
                assert!(
                    (numeric - analytic).abs() <= tolerance,
                    "{what}: {field}[{i}]: central difference {numeric}, derivative {analytic}"
                );
            }
        }
    });
}

/// The same statistics, where no small change moves what an objective calls a constant.
fn constants(objective: &dyn Objective, stats: &Stats) -> Stats {
    let mut still = stats.clone();
    if objective.name() == "kto_pair" {
        // No mean log-ratio is above 0, where its KL is clamped.
        let below = |logps: &[f64], reference: &mut Vec<f64>| {
            reference.iter_mut().zip(logps).for_each(|(reference, logp)| *reference = logp + (logp - *reference).abs());
        };
        below(&still.logps, &mut still.ref_logps[0]);
        still.ref_token_logps.iter_mut().for_each(|reference| below(&still.token_logps, reference));
    }
    if objective.name() == "aot_unpaired" {
        // No two log-ratios are so close that a small change swaps their ranks: s is the remainder of each by 0.05.
        for (s, (logp, reference)) in still.logps.iter().zip(&mut still.ref_logps[0]).enumerate() {
            *reference = logp - 0.05 * (((logp - *reference) / 0.05).round() + s as f64 / 16.0);
        }
    }
    if objective.name() == "dft" {
        // Where p is 1, its own change is of second order.
        still.token_logps.fill(0.0);
    }
    if objective.name() == "cispo" {
        // Every ratio is above its cap.
        still.old_token_logps = still.token_logps.iter().map(|logp| logp - 5.0).collect();
    }
    if objective.name() == "vespo" {
        // Every log-ratio is beyond where it is cut.
        still.old_token_logps = still.token_logps.iter().map(|logp| logp + 30.0).collect();
    }
    if !objective.initial_state().is_empty() {
        // A running mean over more rewards than a batch can move.
        still.state = vec![0.3, 1e300];
    }
    still
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
        let mut metrics = first.metrics.clone();
        objectives::join_metrics(&mut metrics, &second.metrics);
        assert_eq!(expected.metrics.len(), metrics.len(), "{what}");
        for ((metric, value), (joined_metric, joined)) in expected.metrics.iter().zip(&metrics) {
            assert_eq!(metric, joined_metric, "{what}");
            assert!(near(*value, *joined), "{what}: {metric}: {value} of the whole, {joined} of its parts");
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
        for (case, stats) in odd_batches(stats) {
            let outcome = objective.evaluate(&stats, &Totals::of(&stats));
            let Grads { logps, token_logps, entropy, scores, values, token_kl } = &outcome.grads;
            let metrics = outcome.metrics.iter().map(|metric| &metric.1).chain(&outcome.state);
            let grads = [logps, token_logps, entropy, scores, values].into_iter().chain(token_kl).flatten();
            assert!(
                outcome.loss.is_finite() && grads.chain(metrics).all(|x| x.is_finite()),
                "{what}, {case}: {outcome:?}"
            );
        }
    });
}

/// The batch itself; labels of one kind; the first pair alone; completions that are certain.
fn odd_batches(stats: &Stats) -> Vec<(&'static str, Stats)> {
    let labels = |label| Stats { labels: vec![label; stats.labels.len()], ..stats.clone() };
    let zero = |x: &Vec<f64>| vec![0.0; x.len()];
    let certain = Stats {
        logps: zero(&stats.logps),
        ref_logps: stats.ref_logps.iter().map(zero).collect(),
        token_logps: zero(&stats.token_logps),
        ln_sum_p2: zero(&stats.ln_sum_p2),
        ..stats.clone()
    };
    let alone = Stats { state: stats.state.clone(), ..micro_batch(stats, 0..2) };
    vec![
        ("as it is", stats.clone()),
        ("all desirable", labels(true)),
        ("all undesirable", labels(false)),
        ("one pair", alone),
        ("certain", certain),
    ]
}

#[test]
fn an_empty_batch_contributes_nothing() {
    for_every_objective(|what, objective, stats| {
        let state = stats.state.clone();
        let empty = Stats { offsets: vec![0], state, ..micro_batch(stats, 0..0) };
        let outcome = objective.evaluate(&empty, &Totals::default());
        assert_eq!(outcome.loss, 0.0, "{what}");
        assert!(outcome.metrics.iter().all(|metric| metric.1 == 0.0), "{what}: {:?}", outcome.metrics);
    });
}

/// Three times the same pair is that pair: same loss, same metrics, a third of each derivative.
#[test]
fn a_batch_of_equal_rows_is_one_of_them() {
    for_every_objective(|what, objective, stats| {
        let one = Stats { state: stats.state.clone(), ..micro_batch(stats, 0..2) };
        let three = repeated(&one, 3);
        let [single, several] = [&one, &three].map(|stats| objective.evaluate(stats, &Totals::of(stats)));
        let near = |a: f64, b: f64| (a - b).abs() <= 1e-12 * a.abs().max(1.0);
        assert!(near(single.loss, several.loss), "{what}: {} once, {} three times", single.loss, several.loss);
        for (one, three) in single.metrics.iter().zip(&several.metrics) {
            assert!(one.0 == three.0 && near(one.1, three.1), "{what}: {one:?} once, {three:?} three times");
        }
        for of in [|g: &Grads| g.logps.clone(), |g: &Grads| g.token_logps.clone(), |g: &Grads| g.scores.clone()] {
            let (one, three) = (of(&single.grads), of(&several.grads));
            for (i, x) in three.iter().enumerate() {
                let x0 = one[i % one.len()] / 3.0;
                assert!((x0 - x).abs() <= 1e-12 * x0.abs().max(1e-12), "{what}: {x0} expected, {x} found");
            }
        }
    });
}

fn repeated(one: &Stats, times: usize) -> Stats {
    fn copies<T: Copy>(x: &[T], times: usize) -> Vec<T> {
        x.repeat(times)
    }
    let (sequences, tokens) = (one.lens.len(), one.offsets.last().copied().unwrap_or(0));
    let mut offsets: Vec<usize> = Vec::new();
    if !one.offsets.is_empty() {
        let starts = (0..times).flat_map(|n| one.offsets[..sequences].iter().map(move |start| start + n * tokens));
        offsets = starts.chain([times * tokens]).collect();
    }
    let pairs = (0..times).flat_map(|n| one.pairs.iter().map(move |&(w, l)| (w + n * sequences, l + n * sequences)));
    let each = |columns: &[Vec<f64>]| columns.iter().map(|column| copies(column, times)).collect();
    Stats {
        logps: copies(&one.logps, times),
        ref_logps: each(&one.ref_logps),
        lens: copies(&one.lens, times),
        pairs: pairs.collect(),
        margins: copies(&one.margins, times),
        labels: copies(&one.labels, times),
        mismatched_logps: copies(&one.mismatched_logps, times),
        mismatched_ref_logps: each(&one.mismatched_ref_logps),
        groups: (0..times)
            .flat_map(|n| one.groups.iter().map(move |g| g.start + n * sequences..g.end + n * sequences))
            .collect(),
        answers: (0..times).flat_map(|n| one.answers.iter().map(move |answer| answer + n * sequences)).collect(),
        prior: (0..times).flat_map(|n| one.prior.iter().map(move |s| s + n * sequences)).collect(),
        rewards: each(&one.rewards),
        advantages: copies(&one.advantages, times),
        scores: copies(&one.scores, times),
        offsets,
        token_logps: copies(&one.token_logps, times),
        ref_token_logps: each(&one.ref_token_logps),
        old_token_logps: copies(&one.old_token_logps, times),
        sampled_token_logps: copies(&one.sampled_token_logps, times),
        token_advantages: copies(&one.token_advantages, times),
        returns: copies(&one.returns, times),
        entropy: copies(&one.entropy, times),
        ln_sum_p2: copies(&one.ln_sum_p2, times),
        values: copies(&one.values, times),
        old_values: copies(&one.old_values, times),
        token_kl: each(&one.token_kl),
        ..one.clone()
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
        ("sigmoid_norm", LN_2),
        ("rdpo", LN_2),
        ("nca_pair", 2.0 * LN_2),
        ("bco_pair", 2.0 * LN_2),
        ("sppo_hard", 0.5 / (beta * beta)),
        ("apo_zero", 1.0),
        ("apo_down", 1.0),
        ("aot", LN_2),
        ("aot_unpaired", LN_2),
        ("kto_pair", 1.0),
        ("discopop", 0.5 * LN_2 + 0.5),
    ];
    for (name, loss) in expected {
        let mut params = beta_only(beta);
        if name == "rdpo" {
            params.set("rdpo_alpha", 0.1);
        }
        let objective = build(name, &params).unwrap();
        let mut stats = random_stats(&objective.needs(), 10.0, &mut Random(7));
        stats.ref_logps = vec![stats.logps.clone()];
        stats.lens = vec![3.0; stats.lens.len()];
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

/// Loss and derivatives are weighted sums; parameters go to the terms that take them; each term keeps its own memory.
#[test]
fn a_mixture_is_the_weighted_sum_of_its_terms() {
    let terms = [("bco_pair", 0.5), ("sft", 2.0), ("aot", 1.0), ("bco", 0.25)];
    let mut params = beta_only(0.3);
    params.set("label_smoothing", 0.2);
    params.set("running_delta", true);
    let mixture = Choice { terms: terms.map(|(name, weight)| (name.into(), weight)).to_vec(), params: params.clone() };
    let mixture = mixture.build().unwrap();
    assert_eq!((mixture.name(), mixture.scope()), ("bco_pair + sft + aot + bco", Scope::Batch));
    let needs = mixture.needs();
    assert!(needs.refs == (1..=1) && needs.pairs && needs.labels && !needs.margins);
    assert_eq!(mixture.initial_state(), [0.0; 4]);

    let mut stats = random_stats(&needs, 10.0, &mut Random(3));
    stats.state = vec![0.5, 10.0, -0.5, 20.0];
    let totals = Totals::of(&stats);
    let outcome = mixture.evaluate(&stats, &totals);
    let (mut loss, mut state) = (0.0, vec![]);
    let mut logps = vec![0.0; stats.logps.len()];
    for ((name, weight), own) in terms.into_iter().zip([vec![0.5, 10.0], vec![], vec![], vec![-0.5, 20.0]]) {
        let entry = objectives::find(name).unwrap();
        let takes = |name: &str| entry.params.iter().any(|spec| spec.name == name);
        let own_params = params.iter().filter(|of| takes(of.0)).map(|(name, value)| (name, value.clone())).collect();
        let term = build(name, &own_params).unwrap().evaluate(&Stats { state: own, ..stats.clone() }, &totals);
        loss += weight * term.loss;
        logps.iter_mut().zip(&term.grads.logps).for_each(|(sum, grad)| *sum += weight * grad);
        state.extend(term.state);
        assert!(outcome.metrics.contains(&(format!("loss/{name}").into(), term.loss)), "{name}");
        if name == "bco_pair" {
            assert!(term.metrics.iter().all(|metric| outcome.metrics.contains(metric)), "the first term's metrics");
        }
    }
    assert!((loss - outcome.loss).abs() < 1e-12 * loss.abs());
    assert_eq!((outcome.grads.logps, outcome.state), (logps, state));
    let mut names: Vec<_> = outcome.metrics.iter().map(|metric| metric.0.clone()).collect();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), outcome.metrics.len(), "a metric twice: {:?}", outcome.metrics);
}

/// What is put around leaves is put around those with one reference, inside of modifiers.
#[test]
fn leaves_are_the_terms_with_one_reference() {
    struct Leaf(Box<dyn Objective>);
    impl Objective for Leaf {
        fn name(&self) -> &str {
            self.0.name()
        }
        fn needs(&self) -> Needs {
            Needs { refs: 1..=5, ..self.0.needs() }
        }
        fn scope(&self) -> Scope {
            self.0.scope()
        }
        fn evaluate(&self, stats: &Stats, totals: &Totals) -> Outcome {
            assert!(stats.pair_weights.len() == stats.pairs.len(), "modifiers are around leaves");
            self.0.evaluate(stats, totals)
        }
    }
    let mut params = beta_only(0.1);
    params.set("use_weighting", true);
    params.set("ld_alpha", 0.5);
    params.set("simpo_gamma", 0.5);
    let terms = ["sigmoid", "sft", "simpo"].map(|name| (name.to_string(), 1.0)).to_vec();
    let wrapped = std::cell::RefCell::new(vec![]);
    let leaf = |objective: Box<dyn Objective>| -> Box<dyn Objective> {
        wrapped.borrow_mut().push(objective.name().to_string());
        Box::new(Leaf(objective))
    };
    let objective = objectives::build(&Choice { terms, params }, &leaf).unwrap();
    assert_eq!(*wrapped.borrow(), ["sigmoid"]);
    assert_eq!(objective.needs().refs, 1..=5);
    let stats = random_stats(&objective.needs(), 1.0, &mut Random(9));
    assert!(objective.evaluate(&stats, &Totals::of(&stats)).loss.is_finite());
}

#[test]
fn ld_dpo_at_one_changes_nothing_and_at_zero_cuts_tails_pair_by_pair() {
    let stats = Stats {
        logps: vec![-6.0, -3.0, -4.0],
        lens: vec![3.0, 1.0, 2.0],
        ref_logps: vec![vec![0.0; 3]],
        pairs: vec![(0, 1), (0, 2)],
        offsets: vec![0, 3, 4, 6],
        token_logps: vec![-1.0, -2.0, -3.0, -3.0, -1.5, -2.5],
        ref_token_logps: vec![vec![0.0; 6]],
        ..Stats::default()
    };
    let totals = Totals::of(&stats);
    let of = |alpha: f64| {
        let params = Params::from_iter([("beta", 0.5), ("ld_alpha", alpha)]);
        build("ipo_margin1", &params).unwrap().evaluate(&stats, &totals)
    };
    let plain = build("ipo_margin1", &beta_only(0.5)).unwrap().evaluate(&stats, &totals);
    let same = of(1.0);
    assert_eq!((same.loss, &same.metrics), (plain.loss, &plain.metrics));
    let by_token: Vec<f64> = [0, 0, 0, 1, 2, 2].map(|s: usize| plain.grads.logps[s]).to_vec();
    assert_eq!((same.grads.token_logps, same.grads.logps), (by_token, vec![]));

    // Cut to one token against the first rejected completion, to two against the second.
    let (first, second) = (0.5 * (-1.0 + 3.0) - 1.0, 0.5 * (-3.0 + 4.0) - 1.0);
    let cut = of(0.0);
    assert_eq!(cut.loss, 0.5 * (first * first + second * second));
    assert_eq!(
        cut.grads.token_logps,
        [0.5 * (first + second), 0.5 * second, 0.0, -0.5 * first, -0.5 * second, -0.5 * second]
    );
}

#[test]
fn wpo_weights_are_constants_of_both_completions() {
    let params = Params::from_iter([("beta", Value::from(0.5)), ("use_weighting", true.into())]);
    let stats = Stats {
        offsets: vec![0, 1, 2],
        token_logps: vec![-2.0, -3.0],
        ln_sum_p2: vec![-1.0, -2.5],
        ..one_pair(1.0, 0.0)
    };
    let totals = Totals::of(&stats);
    let weighted = build("hinge", &params).unwrap().evaluate(&stats, &totals);
    let weight = (-1.0f64 - 0.5).exp();
    assert!((weighted.loss - 0.5 * weight).abs() < 1e-15, "{}", weighted.loss);
    assert_eq!(weighted.grads, Grads { logps: vec![-0.5 * weight, 0.5 * weight], ..Grads::default() });
    assert!(weighted.metrics.contains(&("rewards/margins".into(), 0.5)), "metrics are those of the pairs");
}

#[test]
fn kto_clamps_its_divergence_and_means_are_by_kind() {
    let kto = build("kto", &Params::from_iter([("beta", 0.5)])).unwrap();
    let mut stats = Stats {
        logps: vec![1.0, 2.0, -4.0],
        ref_logps: vec![vec![0.0; 3]],
        lens: vec![1.0; 3],
        labels: vec![true, true, false],
        mismatched_logps: vec![-1.0, -1.0, -1.0],
        mismatched_ref_logps: vec![vec![0.0; 3]],
        ..Stats::default()
    };
    let get = |outcome: &Outcome, name: &str| outcome.metrics.iter().find(|metric| metric.0 == name).map(|m| m.1);
    let outcome = kto.evaluate(&stats, &Totals::of(&stats));
    let found = ["kl", "rewards/chosen", "rewards/rejected", "rewards/margins"].map(|name| get(&outcome, name));
    assert_eq!(found, [Some(0.0), Some(0.75), Some(-2.0), Some(2.75)]);
    stats.mismatched_logps = vec![3.0, 0.0, 0.0];
    stats.labels = vec![true; 3];
    let outcome = kto.evaluate(&stats, &Totals::of(&stats));
    let found = ["kl", "rewards/rejected", "rewards/margins"].map(|name| get(&outcome, name));
    assert_eq!(found, [Some(1.0), None, None]);
}

#[test]
fn a_running_delta_is_the_mean_of_all_rewards_so_far() {
    let params = Params::from_iter([("beta", Value::from(0.5)), ("running_delta", true.into())]);
    let objective = build("bco_pair", &params).unwrap();
    let mut stats = one_pair(4.0, 2.0);
    stats.state = objective.initial_state();
    for (rewards, state) in [((4.0, 2.0), [1.5, 2.0]), ((0.0, -2.0), [0.5, 4.0])] {
        stats.logps = vec![rewards.0, rewards.1];
        let outcome = objective.evaluate(&stats, &Totals::of(&stats));
        assert_eq!(outcome.state, state);
        assert!(outcome.metrics.contains(&("delta".into(), state[0])));
        stats.state = outcome.state;
    }
}

/// TRL's formula is NaN here; the limit of the logistic part is not.
#[test]
fn discopop_is_its_limit_where_the_exponential_overflows() {
    let objective = build("discopop", &beta_only(1.0)).unwrap();
    let stats = one_pair(-1000.0, 0.0);
    let outcome = objective.evaluate(&stats, &Totals::of(&stats));
    assert_eq!((outcome.loss, outcome.grads.logps), (1000.0, vec![-1.0, 1.0]));
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

/// With the answer in the group, advantages of samples and answer add up to 0; without it, those of the samples do.
#[test]
fn graos_third_term_only_rescales_the_other_two() {
    let grao = |exploration: f64, imitation: f64, alignment: f64, without: bool| {
        let mut params = Params::from_iter([
            ("exploration_weight", exploration),
            ("imitation_weight", imitation),
            ("alignment_weight", alignment),
        ]);
        params.set("group_without_answer", without);
        build("grao", &params).unwrap()
    };
    let mut random = Random(11);
    let mut stats = Stats {
        logps: random.vec(9, -50.0..-1.0),
        lens: (1..=9).map(f64::from).collect(),
        groups: std::iter::once(0..8).collect(),
        answers: vec![8],
        rewards: vec![random.vec(9, -1.0..1.0)],
        reward_weights: vec![1.0],
        ..Stats::default()
    };
    for (without, imitation) in [(false, 0.5 + 0.6 / 8.0), (true, 0.5)] {
        let (three, two) = (grao(1.0, 0.5, 0.6, without), grao(1.6, imitation, 0.0, without));
        stats.advantages = three.credit(&stats).advantages;
        assert_eq!(stats.advantages, two.credit(&stats).advantages);
        let [three, two] = [three, two].map(|objective| objective.evaluate(&stats, &Totals::of(&stats)));
        assert!((three.loss - two.loss).abs() < 1e-12 * three.loss.abs().max(1.0), "{} and {}", three.loss, two.loss);
        for (a, b) in three.grads.logps.iter().zip(&two.grads.logps) {
            assert!((a - b).abs() < 1e-12, "{a} and {b}");
        }
    }
    // The cap holds the answer's whole coefficient.
    let params = Params::from_iter([("imitation_cap", 0.01)]);
    let capped = build("grao", &params).unwrap().evaluate(&stats, &Totals::of(&stats));
    assert!((capped.grads.logps[8].abs() - 0.01 / 9.0).abs() < 1e-15, "{}", capped.grads.logps[8]);
}

/// What stands still in credit: a reward is compared within its prompt, a KL in the reward counts, the last token of PPO gets it.
#[test]
fn credit_is_by_prompt_and_holds_to_the_reference() {
    let mut stats = Stats {
        lens: vec![1.0, 2.0, 1.0, 1.0],
        offsets: vec![0, 1, 3, 4, 5],
        groups: vec![0..2, 2..4],
        rewards: vec![vec![1.0, 3.0, 10.0, 10.0]],
        reward_weights: vec![2.0],
        old_token_logps: vec![-1.0, -1.0, -1.0, -1.0, -1.0],
        ref_token_logps: vec![vec![-1.0, -2.0, -3.0, -1.0, -1.0]],
        values: vec![0.0; 5],
        ..Stats::default()
    };
    let credit = |name: &str, beta: f64, stats: &Stats| {
        let mut params = Params::from_iter([("beta", beta)]);
        if name == "ppo" {
            params.set("gae_lambda", 1.0);
        }
        build(name, &params).unwrap().credit(stats)
    };
    assert_eq!(credit("dr_grpo", 0.0, &stats).advantages, [-2.0, 2.0, 0.0, 0.0]);
    assert_eq!(credit("rloo", 0.0, &stats).advantages, [-4.0, 4.0, 0.0, 0.0]);
    // 3 nats from the reference over the second completion's two tokens.
    assert_eq!(credit("rloo", 1.0, &stats).advantages, [-1.0, 1.0, 0.0, 0.0]);
    assert_eq!(credit("ppo", 0.0, &stats).returns, [2.0, 6.0, 6.0, 20.0, 20.0]);
    assert_eq!(credit("ppo", 1.0, &stats).returns, [2.0, 3.0, 4.0, 20.0, 20.0]);
    stats.rewards = vec![vec![f64::NAN, 3.0, f64::NAN, f64::NAN]];
    for name in ["grpo", "rloo", "reinforce"] {
        assert_eq!(credit(name, 0.0, &stats).advantages, [0.0; 4], "{name}");
    }
    // Of the second completion alone something is known: it has two tokens, the others keep the values that they had.
    stats.values = vec![0.5; 5];
    let ppo = credit("ppo", 0.0, &stats);
    assert_eq!(ppo.returns, [0.5, 6.0, 6.0, 0.5, 0.5]);
    assert_eq!([0, 3, 4].map(|t| ppo.token_advantages[t]), [0.0; 3]);
    // What is measured and not maximised decides nothing.
    stats.rewards.push(vec![9.0; 4]);
    stats.reward_weights.push(0.0);
    for name in ["grpo", "rloo", "reinforce"] {
        assert_eq!(credit(name, 0.0, &stats).advantages, [0.0; 4], "{name}");
    }
}

#[test]
fn an_optimal_value_is_a_soft_maximum_and_what_is_hopeless_teaches_nothing() {
    let stats = Stats {
        logps: vec![-3.0; 4],
        ref_logps: vec![vec![-4.0; 4]],
        lens: vec![1.0; 4],
        groups: vec![0..2, 2..4],
        rewards: vec![vec![1.0, 0.0, 1.0, 0.0]],
        reward_weights: vec![1.0],
        prior_rewards: vec![vec![1.0, 0.0, f64::NAN], vec![0.0, 0.0, 0.0]],
        ..Stats::default()
    };
    let of = |hopeless: bool, value_beta: f64| {
        let mut params = Params::from_iter([("beta", 0.5), ("value_beta", value_beta)]);
        if hopeless {
            params.set("keep_hopeless", true);
        }
        let objective = build("a_star_po", &params).unwrap();
        let advantages = objective.credit(&stats).advantages;
        let outcome =
            objective.evaluate(&Stats { advantages: advantages.clone(), ..stats.clone() }, &Totals::of(&stats));
        (advantages, outcome)
    };
    let value = 0.5 * ((2_f64.exp() + 1.0) / 2.0).ln();
    let (advantages, outcome) = of(false, 0.5);
    assert!((advantages[0] - (1.0 - value)).abs() < 1e-15 && (advantages[1] + value).abs() < 1e-15);
    assert!(advantages[2..].iter().all(|a| a.is_nan()) && outcome.grads.logps[2..] == [0.0, 0.0], "{advantages:?}");
    let loss = ((0.5 - 1.0 + value).powi(2) + (0.5 + value).powi(2)) / 4.0;
    assert!((outcome.loss - loss).abs() < 1e-15, "{} instead of {loss}", outcome.loss);
    // With 0 as its value a prompt teaches what its rewards are; nearly the best completion, nearly their mean.
    assert_eq!(of(true, 0.5).0[2..], [1.0, 0.0]);
    assert!((of(true, 1e-3).0[1] + 1.0).abs() < 1e-3 && (of(true, 1e3).0[1] + 0.5).abs() < 1e-3);
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
    for name in ["robust", "exo_pair"] {
        refused(name, &beta_only(0.1), "--label-smoothing", "requires it");
    }
    refused("exo_pair", &smoothing(0.0), "--label-smoothing", "0 < label_smoothing < 0.5");

    let f = |name: &str, coefficient: Option<f64>| {
        let mut params = beta_only(0.1);
        params.set("f_divergence_type", name);
        coefficient.into_iter().for_each(|value| params.set("f_alpha_divergence_coef", value));
        params
    };
    let key = "--f-alpha-divergence-coef";
    refused("sigmoid", &f("alpha_divergence", None), key, "requires it");
    refused(
        "sigmoid",
        &f("js_divergence", Some(0.5)),
        key,
        "does nothing without --f-divergence-type alpha_divergence",
    );
    refused("sigmoid", &f("alpha", None), "--f-divergence-type", "one of reverse_kl, forward_kl");
    refused("nca_pair", &f("forward_kl", None), "--f-divergence-type", "nca_pair does not use it");
    assert!(build("hinge", &f("alpha_divergence", Some(1.0))).is_ok());

    let with = |name: &str, value: Value| Params::from_iter([("beta", 0.1.into()), (name, value)]);
    refused("sigmoid", &with("ld_alpha", 1.1.into()), "--ld-alpha", "ld_dpo expects 0 <= ld_alpha <= 1");
    refused(
        "cpo_ipo",
        &Params::from_iter([("beta", 0.1), ("cpo_alpha", 0.0), ("ld_alpha", 0.5)]),
        "--ld-alpha",
        "with a reference",
    );
    refused("aot", &with("use_weighting", true.into()), "--use-weighting", "a mean over pairs");
    refused("sigmoid", &with("use_weighting", 1.0.into()), "--use-weighting", "true or false");
    refused("sigmoid", &with("beta", true.into()), "--beta", "got true");
    assert!(build("aot", &with("use_weighting", false.into())).is_ok());
    let none = Params::from_iter([("beta", 0.1), ("desirable_weight", 0.0), ("undesirable_weight", 0.0)]);
    refused("kto", &none, "--desirable-weight", "nothing would be learnt");
}

#[test]
fn a_mixture_that_says_nothing_or_too_much_is_refused() {
    let refused = |terms: &[(&str, f64)], params: Params, expected: &str| {
        let terms = terms.iter().map(|(name, weight)| (name.to_string(), *weight)).collect();
        let message = Choice { terms, params }.build().err().expect("it must be refused").to_string();
        assert!(message.contains(expected), "{message:?} does not say {expected:?}");
    };
    refused(&[], Params::default(), "none is given");
    refused(&[("dpo", 1.0), ("sigmoid", 1.0)], beta_only(0.1), "sigmoid is given twice");
    for weight in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        refused(&[("sigmoid", 1.0), ("sft", weight)], beta_only(0.1), "expected a number above 0");
    }
    let smoothing = Params::from_iter([("beta", 0.1), ("label_smoothing", 0.1)]);
    refused(&[("hinge", 1.0), ("sft", 1.0)], smoothing, "hinge + sft does not use it, it takes --beta");
    refused(&[("sft", 1.0)], Params::from_iter([("ld_alpha", 0.5)]), "sft does not use it");
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

/// Every entry at each spread: with its defaults, with the example of each parameter, with every value of a choice, and
/// inside of every modifier that fits, and inside of all of them.
fn for_every_objective(check: impl Fn(&str, &dyn Objective, &Stats)) {
    for entry in objectives::all() {
        for params in settings(entry) {
            let objective = build(entry.name, &params).unwrap_or_else(|e| panic!("{}: {e}", entry.name));
            for spread in SPREADS {
                let mut stats = random_stats(&objective.needs(), spread, &mut Random(spread.to_bits()));
                stats.state = objective.initial_state();
                check(&format!("{} with {params:?}, spread {spread}", entry.name), objective.as_ref(), &stats);
            }
        }
    }
}

fn settings(entry: &objectives::Entry) -> Vec<Params> {
    let required = entry.params.iter().filter(|spec| spec.required());
    let plain: Params = required.map(|spec| (spec.name, spec.example())).collect();
    let with = |name: &str, value: Value| {
        let mut params = plain.clone();
        params.set(name, value.clone());
        let dependent =
            |spec: &&ParamSpec| spec.only_with.is_some_and(|(other, on)| other == name && value == on.into());
        entry.params.iter().filter(dependent).for_each(|spec| params.set(spec.name, spec.example()));
        params
    };
    let mut settings = vec![plain.clone(), entry.params.iter().map(|spec| (spec.name, spec.example())).collect()];
    for spec in entry.params {
        if let Domain::Choice { values, .. } = spec.domain {
            settings.extend(values.iter().map(|value| with(spec.name, (*value).into())));
        }
    }
    let needs = build(entry.name, &plain).unwrap().needs();
    let fits = objectives::modifiers().iter().filter(|modifier| (modifier.applies)(&needs));
    let mut all = plain.clone();
    for modifier in fits {
        settings.push(with(modifier.param.name, modifier.param.example()));
        all.set(modifier.param.name, modifier.param.example());
    }
    settings.push(all);
    settings
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
    let sampled_token_logps = near(&token_logps);
    let values = near(&vec![0.0; tokens]);
    let old_values = near(&values);
    // Two groups, each followed by what the data answers.
    let (groups, answers) = (vec![0..1, 2..7], vec![1, 7]);

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
        longest: when(needs.groups, || 9.0),
        absent: 0.0,
        groups: when(needs.groups && needs.answers, || groups),
        answers: when(needs.answers, || answers),
        prior_rewards: vec![],
        prior: when(needs.prior, || vec![0, 3, 4, 7]),
        rewards: when(needs.rewards, || vec![random.vec(SEQUENCES, -1.0..1.0)]),
        reward_weights: when(needs.rewards, || vec![1.0]),
        advantages: when(needs.advantages, || random.vec(SEQUENCES, -2.0..2.0)),
        scores: when(needs.scores, || random.vec(SEQUENCES, -spread..spread)),
        offsets: when(needs.per_token(), offsets),
        token_logps: when(needs.token_logps, || token_logps),
        ref_token_logps: when(needs.ref_token_logps, || ref_token_logps),
        old_token_logps: when(needs.old_token_logps, || old_token_logps),
        sampled_token_logps: when(needs.sampled_token_logps, || sampled_token_logps),
        token_advantages: when(needs.token_advantages, || random.vec(tokens, -2.0..2.0)),
        returns: when(needs.token_advantages, || random.vec(tokens, -spread..spread)),
        entropy: when(needs.entropy, || random.vec(tokens, 0.0..5.0)),
        ln_sum_p2: when(needs.ln_sum_p2, || random.vec(tokens, -5.0..0.0)),
        values: when(needs.values, || values),
        old_values: when(needs.values, || old_values),
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
        mismatched_logps: cut(&stats.mismatched_logps, &range),
        mismatched_ref_logps: stats.mismatched_ref_logps.iter().map(|x| cut(x, &range)).collect(),
        groups: groups.map(|group| group.start - base..group.end - base).collect(),
        answers: stats.answers.iter().filter(|answer| range.contains(answer)).map(|answer| answer - base).collect(),
        prior_rewards: vec![],
        prior: stats.prior.iter().filter(|s| range.contains(s)).map(|s| s - base).collect(),
        rewards: stats.rewards.iter().map(|x| cut(x, &range)).collect(),
        reward_weights: stats.reward_weights.clone(),
        advantages: cut(&stats.advantages, &range),
        longest: stats.longest,
        absent: 0.0,
        scores: cut(&stats.scores, &range),
        offsets: cut(&stats.offsets, &(base..range.end + 1)).iter().map(|t| t - tokens.start).collect(),
        token_logps: cut(&stats.token_logps, &tokens),
        ref_token_logps: stats.ref_token_logps.iter().map(|x| cut(x, &tokens)).collect(),
        old_token_logps: cut(&stats.old_token_logps, &tokens),
        sampled_token_logps: cut(&stats.sampled_token_logps, &tokens),
        token_advantages: cut(&stats.token_advantages, &tokens),
        returns: cut(&stats.returns, &tokens),
        entropy: cut(&stats.entropy, &tokens),
        ln_sum_p2: cut(&stats.ln_sum_p2, &tokens),
        values: cut(&stats.values, &tokens),
        old_values: cut(&stats.old_values, &tokens),
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
