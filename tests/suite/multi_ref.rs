//! Several references: blends around an objective, the rules that weight them, KL penalties. What others computed is
//! in `tests/oracle/golden/references.rs`; here is what must hold whatever the numbers.

use std::sync::{Arc, Mutex};

use cuvee::Error;
use cuvee::objectives::kl::{Estimator, KlPenalty, KlPenaltyOptions, k2, reward_to_go_k1, sequence_k2};
use cuvee::objectives::mrpo::{self, Blend, Level, Mean, MultiRef, RefClip, Weighting, Window};
use cuvee::objectives::ref_weights::{RefWeights, Rule};
use cuvee::objectives::{Choice, Needs, Objective, Outcome, Params, Scope, Stats, Totals};

const LOSSES: [&str; 6] = ["sigmoid", "hinge", "ipo", "ipo_sum", "nca_pair", "apo_down"];
const MEANS: [Mean; 4] = [Mean::Geometric, Mean::Harmonic, Mean::Arithmetic, Mean::MultiDpo];

fn loss(name: &str) -> Box<dyn Objective> {
    Choice::one(name, Params::from_iter([("beta", 0.1)])).build().unwrap()
}

fn sft() -> Box<dyn Objective> {
    Choice::one("sft", Params::default()).build().unwrap()
}

fn evaluate(objective: &dyn Objective, stats: &Stats) -> Outcome {
    objective.evaluate(stats, &Totals::of(stats))
}

/// Every blend that fits `references` on pairs.
fn blends(references: usize) -> Vec<Blend> {
    let windows = [Window::MeanRefs, Window::Anchor, Window::Fixed];
    let clips = windows.map(|window| Some(RefClip { eps_max: 0.1, window }));
    let mut all = Vec::new();
    for mean in MEANS {
        for weights in [Weighting::Step, Weighting::Arwc] {
            let plain = Blend { mean, weights, ..Blend::default() };
            all.extend(clips.into_iter().chain([None]).map(|clip| Blend { clip, ..plain }));
            all.push(Blend { level: Level::Token, ..plain });
            all.push(Blend { official_k2_swap: true, ..plain });
        }
    }
    all.retain(|blend| references == 1 || blend.check(references, true).is_ok());
    all
}

/// Numbers in [-1, 1) that look like noise.
fn noise(seed: usize) -> f64 {
    let x = ((seed + 1) as f64 * 12.9898).sin() * 43758.5453;
    2.0 * (x - x.floor()) - 1.0
}

/// Six sequences in three pairs and `references` that differ from the policy by up to `spread` nats a completion.
fn stats(references: usize, spread: f64) -> Stats {
    let lens = [3, 1, 4, 2, 5, 3];
    let offsets: Vec<usize> = (0..=lens.len()).map(|s| lens[..s].iter().sum()).collect();
    let tokens = offsets[lens.len()];
    let token_logps: Vec<f64> = (0..tokens).map(|t| -2.0 - 2.0 * noise(t)).collect();
    let per_token = |k: usize, t: usize| (token_logps[t] + spread / 5.0 * noise(97 * k + 7 * t)).min(-1e-9);
    let ref_token_logps: Vec<Vec<f64>> =
        (1..=references).map(|k| (0..tokens).map(|t| per_token(k, t)).collect()).collect();
    let sums = |logps: &Vec<f64>| offsets.windows(2).map(|at| logps[at[0]..at[1]].iter().sum()).collect();
    let total = (references * (references + 1) / 2) as f64;
    Stats {
        logps: sums(&token_logps),
        ref_logps: ref_token_logps.iter().map(sums).collect(),
        lens: lens.iter().map(|&len| len as f64).collect(),
        pairs: vec![(0, 1), (3, 2), (4, 5)],
        token_kl: (0..references).map(|k| (0..tokens).map(|t| 1.0 + noise(31 * k + t)).collect()).collect(),
        ref_weights: (1..=references).map(|k| k as f64 / total).collect(),
        offsets,
        token_logps,
        ref_token_logps,
        ..Stats::default()
    }
}

/// The first two sequences with their pair, and the others with theirs.
fn cut(stats: &Stats) -> [Stats; 2] {
    let part = |from: usize, to: usize, pairs: Vec<(usize, usize)>| {
        let tokens = stats.offsets[from]..stats.offsets[to];
        let sequences = |of_refs: &Vec<Vec<f64>>| of_refs.iter().map(|x| x[from..to].to_vec()).collect();
        let all_tokens = |of_refs: &Vec<Vec<f64>>| of_refs.iter().map(|x| x[tokens.clone()].to_vec()).collect();
        Stats {
            logps: stats.logps[from..to].to_vec(),
            lens: stats.lens[from..to].to_vec(),
            ref_logps: sequences(&stats.ref_logps),
            pairs,
            offsets: stats.offsets[from..=to].iter().map(|t| t - tokens.start).collect(),
            token_logps: stats.token_logps[tokens.clone()].to_vec(),
            ref_token_logps: all_tokens(&stats.ref_token_logps),
            token_kl: all_tokens(&stats.token_kl),
            ..stats.clone()
        }
    };
    [part(0, 2, vec![(0, 1)]), part(2, 6, vec![(1, 0), (2, 3)])]
}

fn near(found: f64, expected: f64) -> bool {
    (found - expected).abs() <= 1e-12 * found.abs().max(expected.abs()).max(1.0)
}

fn metric(outcome: &Outcome, name: &str) -> f64 {
    let found = outcome.metrics.iter().find(|(known, _)| known == name);
    found.unwrap_or_else(|| panic!("{name} is not in {:?}", outcome.metrics)).1
}

/// An objective of one reference whose loss is the sum of the references, and that keeps what it saw.
#[derive(Clone)]
struct Probe {
    needs: Needs,
    seen: Arc<Mutex<Option<Stats>>>,
}

impl Probe {
    fn new(needs: Needs) -> Self {
        Self { needs, seen: Arc::default() }
    }

    fn seen(&self) -> Stats {
        self.seen.lock().unwrap().clone().expect("it was evaluated")
    }
}

impl Objective for Probe {
    fn name(&self) -> &'static str {
        "probe"
    }

    fn needs(&self) -> Needs {
        self.needs.clone()
    }

    fn scope(&self) -> Scope {
        Scope::Batch
    }

    fn initial_state(&self) -> Vec<f64> {
        vec![5.0]
    }

    fn evaluate(&self, stats: &Stats, _: &Totals) -> Outcome {
        *self.seen.lock().unwrap() = Some(stats.clone());
        let loss = stats.ref_logps.iter().flatten().sum();
        Outcome { loss, metrics: vec![("kl".into(), 3.0)], state: vec![7.0], ..Outcome::default() }
    }
}

// ---- blends: identities ---------------------------------------------------------------------------------------

#[test]
fn one_reference_is_no_blend_at_all() {
    for name in LOSSES {
        for spread in [0.1, 10.0, 1e4] {
            let stats = stats(1, spread);
            let alone = evaluate(loss(name).as_ref(), &stats);
            for blend in blends(1) {
                let blended = evaluate(&MultiRef::new(loss(name), blend), &stats);
                assert_eq!((blended.loss, &blended.grads), (alone.loss, &alone.grads), "{name}, {blend:?}");
                assert_eq!(blended.metrics[..alone.metrics.len()], alone.metrics, "{name}, {blend:?}");
            }
        }
    }
}

#[test]
fn equal_references_give_the_numbers_of_one_to_the_last_bit() {
    for name in LOSSES {
        let one = stats(1, 20.0);
        let alone = evaluate(loss(name).as_ref(), &one);
        for references in [2, 3, 7] {
            let mut stats = stats(references, 20.0);
            stats.ref_logps = vec![one.ref_logps[0].clone(); references];
            stats.ref_token_logps = vec![one.ref_token_logps[0].clone(); references];
            for blend in blends(references) {
                let blended = evaluate(&MultiRef::new(loss(name), blend), &stats);
                assert_eq!((blended.loss, &blended.grads), (alone.loss, &alone.grads), "{name}, {blend:?}");
                assert_eq!(blended.metrics[..alone.metrics.len()], alone.metrics, "{name}, {blend:?}");
            }
        }
    }
}

#[test]
fn a_reference_of_weight_0_is_not_looked_at() {
    for name in LOSSES {
        for only in 0..3 {
            let mut stats = stats(3, 20.0);
            let alone = Stats { ref_logps: vec![stats.ref_logps[only].clone()], ..stats.clone() };
            let alone = evaluate(loss(name).as_ref(), &alone);
            stats.ref_weights = (0..3).map(|k| f64::from(k == only)).collect();
            for other in (0..3).filter(|&k| k != only) {
                stats.ref_logps[other].fill(f64::NEG_INFINITY);
            }
            for mean in MEANS {
                let blend = Blend { mean, ..Blend::default() };
                let blended = evaluate(&MultiRef::new(loss(name), blend), &stats);
                assert_eq!((blended.loss, &blended.grads), (alone.loss, &alone.grads), "{name}, {blend:?}, {only}");
            }
        }
    }
}

#[test]
fn the_order_of_the_references_behind_the_anchor_is_a_matter_of_names() {
    let order = [0, 3, 1, 2];
    let before = stats(4, 15.0);
    let pick = |of_refs: &Vec<Vec<f64>>| order.iter().map(|&k| of_refs[k].clone()).collect();
    let after = Stats {
        ref_logps: pick(&before.ref_logps),
        ref_token_logps: pick(&before.ref_token_logps),
        ref_weights: order.iter().map(|&k| before.ref_weights[k]).collect(),
        ..before.clone()
    };
    for name in LOSSES {
        for blend in blends(4) {
            let [before, after] = [&before, &after].map(|stats| evaluate(&MultiRef::new(loss(name), blend), stats));
            assert!(near(after.loss, before.loss), "{name}, {blend:?}");
            let grads = after.grads.logps.iter().zip(&before.grads.logps);
            assert!(grads.clone().all(|(a, b)| near(*a, *b)), "{name}, {blend:?}");
            for what in ["weight", "discrimination", "accuracy", "logratio"] {
                for (k, &from) in order.iter().enumerate() {
                    let (a, b) = (format!("refs/{k}/{what}"), format!("refs/{from}/{what}"));
                    assert!(near(metric(&after, &a), metric(&before, &b)), "{name}, {blend:?}, {a}");
                }
            }
        }
    }
}

#[test]
fn the_means_are_ordered_and_saturate_without_overflow() {
    let cases: [([f64; 3], [f64; 3]); 4] = [
        ([-1.0, -2.0, -3.0], [0.2, 0.5, 0.3]),
        ([-1e5, -1.0, -5e4], [0.2, 0.5, 0.3]),
        ([-1e5, -1.0, -5e4], [1e-12, 1.0 - 2e-12, 1e-12]),
        ([-700.0, -1e-9, 0.0], [0.0, 1e-300, 1.0]),
    ];
    for (logps, weights) in cases {
        let [geometric, harmonic, arithmetic, _] = MEANS.map(|mean| mean.blend(&logps, &weights));
        let range = logps.iter().fold((0.0_f64, -1e9_f64), |(low, high), x| (low.min(*x), high.max(*x)));
        assert!(harmonic <= geometric && geometric <= arithmetic, "{logps:?}: {harmonic} {geometric} {arithmetic}");
        assert!(range.0 <= harmonic && arithmetic <= range.1, "{logps:?}: {harmonic} {geometric} {arithmetic}");
    }
    let of = |mean: Mean| mean.blend(&[-2.0_f64.ln(), -8.0_f64.ln()], &[0.25, 0.75]);
    assert!(near(of(Mean::Arithmetic), (0.25 / 2.0 + 0.75 / 8.0_f64).ln()));
    assert!(near(of(Mean::Harmonic), -(0.25 * 2.0 + 0.75 * 8.0_f64).ln()));
    assert!(near(of(Mean::Geometric), -2.5 * 2.0_f64.ln()));
}

// ---- blends: calculus -----------------------------------------------------------------------------------------

#[test]
fn gradients_of_blends_are_central_differences() {
    for name in LOSSES {
        for spread in [0.1, 5.0, 200.0] {
            let mut stats = stats(3, spread);
            stats.pairs.push((4, 0)); // a completion in several pairs
            for blend in blends(3).into_iter().chain(blends(2)) {
                let mut moved = stats.clone();
                let references = if blend.official_k2_swap { 2 } else { 3 };
                moved.ref_logps.truncate(references);
                moved.ref_token_logps.truncate(references);
                moved.ref_weights = vec![1.0 / references as f64; references];
                let objective = MultiRef::new(loss(name), blend);
                let outcome = evaluate(&objective, &moved);
                for s in 0..moved.logps.len() {
                    let x = moved.logps[s];
                    let mut loss_at = |x: f64| {
                        moved.logps[s] = x;
                        evaluate(&objective, &moved).loss
                    };
                    let numeric = (loss_at(x + 1e-4) - loss_at(x - 1e-4)) / 2e-4;
                    loss_at(x);
                    let analytic = outcome.grads.logps[s];
                    let tolerance = 1e-6 * analytic.abs() + 1e-9 + 1e-11 * outcome.loss.abs();
                    assert!((numeric - analytic).abs() <= tolerance, "{name}, {blend:?}: {numeric} {analytic}");
                }
            }
        }
    }
}

#[test]
fn nothing_is_nan_or_infinite_at_a_hundred_thousand_nats() {
    let extremes = [-1e-9, 0.0, -1e5, -30.0, -1e5, -5e4];
    for name in LOSSES {
        for references in [1, 2, 3] {
            let mut stats = stats(references, 1e5);
            for (k, logps) in stats.ref_logps.iter_mut().enumerate() {
                logps.copy_from_slice(&extremes);
                logps.rotate_left(k);
            }
            stats.ref_weights = [1.0, 0.0, 0.0][..references].to_vec();
            for blend in blends(references) {
                let outcome = evaluate(&MultiRef::new(loss(name), blend), &stats);
                let numbers = outcome.grads.logps.iter().chain(outcome.metrics.iter().map(|metric| &metric.1));
                assert!(outcome.loss.is_finite() && numbers.clone().all(|x| x.is_finite()), "{name}, {blend:?}");
            }
        }
    }
}

#[test]
fn micro_batches_of_blends_and_penalties_add_up() {
    let stats = stats(3, 10.0);
    let totals = Totals::of(&stats);
    let penalty = |inner: Box<dyn Objective>, estimator| {
        let options = KlPenaltyOptions { weight: 0.5, estimator, ref_weights: vec![0.2, 0.3, 0.5] };
        Box::new(KlPenalty::new(inner, options)) as Box<dyn Objective>
    };
    let blended = blends(3).into_iter().map(|blend| Box::new(MultiRef::new(loss("sigmoid"), blend)) as _);
    let estimators = [Estimator::Exact, Estimator::K2, Estimator::K3];
    let penalised = estimators.map(|e| penalty(Box::new(MultiRef::new(loss("ipo"), Blend::default())), e));
    for objective in blended.chain(penalised) {
        let whole = objective.evaluate(&stats, &totals);
        let [first, second] = cut(&stats).map(|part| objective.evaluate(&part, &totals));
        assert!(near(whole.loss, first.loss + second.loss));
        for (i, (name, value)) in whole.metrics.iter().enumerate() {
            assert_eq!((name, name), (&first.metrics[i].0, &second.metrics[i].0));
            assert!(near(*value, first.metrics[i].1 + second.metrics[i].1), "{name}");
        }
        assert_eq!(whole.grads.logps, [first.grads.logps, second.grads.logps].concat());
        assert_eq!(whole.grads.token_logps, [first.grads.token_logps, second.grads.token_logps].concat());
    }
}

// ---- blends: what the inner objective sees --------------------------------------------------------------------

#[test]
fn windows_are_those_of_the_released_code() {
    let stats = Stats {
        logps: vec![0.0, 0.0],
        lens: vec![1.0, 1.0],
        ref_logps: vec![vec![-10.0, -100.0], vec![-30.0, -101.0], vec![-9.9, -50.0]],
        pairs: vec![(0, 1)],
        ref_weights: vec![0.0, 1.0, 0.0],
        ..Stats::default()
    };
    let seen = |window, only: usize| {
        let probe = Probe::new(Needs { refs: 1..=1, pairs: true, ..Needs::POLICY });
        let mut stats = stats.clone();
        stats.ref_weights = (0..3).map(|k| f64::from(k == only)).collect();
        let blend = Blend { clip: Some(RefClip { eps_max: 0.2, window }), ..Blend::default() };
        evaluate(&MultiRef::new(Box::new(probe.clone()), blend), &stats);
        probe.seen().ref_logps[0].clone()
    };
    assert_eq!(seen(Window::Fixed, 0), [-10.0, -100.0], "the anchor is not clipped");
    assert_eq!(seen(Window::Fixed, 1), [-12.0, -101.0]);
    assert_eq!(seen(Window::Fixed, 2), [-9.9, -80.0]);
    let share = 10.0 / 110.0;
    assert!(near(seen(Window::Anchor, 1)[0], -10.0 * (1.0 + 0.2 * share)));
    assert!(near(seen(Window::Anchor, 2)[1], -100.0 * (1.0 - 0.2 * (1.0 - share))));
    let share = (49.9 / 3.0) / (49.9 / 3.0 + 251.0 / 3.0);
    assert!(near(seen(Window::MeanRefs, 1)[0], -10.0 * (1.0 + 0.2 * share)));
}

#[test]
fn token_level_sums_what_is_blended_per_token() {
    let stats = stats(3, 10.0);
    for mean in [Mean::Harmonic, Mean::Arithmetic] {
        let probe = Probe::new(Needs { refs: 1..=1, ref_token_logps: true, ..Needs::POLICY });
        let objective = MultiRef::new(Box::new(probe.clone()), Blend { mean, level: Level::Token, ..Blend::default() });
        assert!(objective.needs().ref_token_logps && objective.needs().ref_weights && !objective.needs().pairs);
        evaluate(&objective, &stats);
        let seen = probe.seen();
        for t in 0..stats.token_logps.len() {
            let of_token: Vec<f64> = stats.ref_token_logps.iter().map(|logps| logps[t]).collect();
            assert_eq!(seen.ref_token_logps[0][t], mean.blend(&of_token, &stats.ref_weights));
        }
        for (s, at) in stats.offsets.windows(2).enumerate() {
            assert_eq!(seen.ref_logps[0][s], seen.ref_token_logps[0][at[0]..at[1]].iter().sum::<f64>());
        }
    }
}

#[test]
fn completions_under_other_prompts_are_blended_alike() {
    let needs = Needs { refs: 1..=1, mismatched: true, ..Needs::POLICY };
    let mismatched = vec![vec![-10.0, -20.0], vec![-14.0, -20.0]];
    let stats = Stats { mismatched_logps: vec![0.0; 2], mismatched_ref_logps: mismatched, ..stats(2, 10.0) };
    for (clip, expected) in
        [(None, -10.0 - 4.0 * 2.0 / 3.0), (Some(RefClip { eps_max: 0.1, window: Window::Fixed }), -10.0 - 2.0 / 3.0)]
    {
        let probe = Probe::new(needs.clone());
        let objective = MultiRef::new(Box::new(probe.clone()), Blend { clip, ..Blend::default() });
        assert_eq!((objective.scope(), objective.initial_state()), (Scope::Batch, vec![5.0]));
        assert_eq!(evaluate(&objective, &stats).state, [7.0]);
        let seen = &probe.seen().mismatched_ref_logps[0];
        assert!(near(seen[0], expected) && seen[1] == -20.0, "{seen:?}");
    }
}

#[test]
fn metrics_per_reference_are_counted_by_hand() {
    let stats = Stats {
        logps: vec![-1.0, -2.0, -3.0, -4.0],
        lens: vec![1.0; 4],
        ref_logps: vec![vec![-1.0, -2.0, -5.0, -4.0], vec![-3.0, -3.0, -8.0, -2.0]],
        pairs: vec![(0, 1), (2, 3)],
        ref_weights: vec![0.75, 0.25],
        ..Stats::default()
    };
    let outcome = evaluate(&MultiRef::new(loss("sigmoid"), Blend::default()), &stats);
    let expected = [
        ("refs/0/weight", 0.75),
        ("refs/0/discrimination", 1.0),
        ("refs/0/accuracy", 0.5),
        ("refs/0/logratio", 0.5),
        ("refs/1/weight", 0.25),
        ("refs/1/discrimination", 3.0),
        ("refs/1/accuracy", 0.25),
        ("refs/1/logratio", 1.5),
    ];
    for (name, value) in expected {
        assert_eq!(metric(&outcome, name), value, "{name}");
    }
    let arwc = Blend { weights: Weighting::Arwc, ..Blend::default() };
    let outcome = evaluate(&MultiRef::new(loss("sigmoid"), arwc), &stats);
    let weight = (0.0 + 6.0 / (7.0 + 1e-6)) / 2.0;
    assert!(near(metric(&outcome, "refs/1/weight"), weight) && near(metric(&outcome, "refs/0/weight"), 1.0 - weight));
}

#[test]
fn an_empty_micro_batch_contributes_nothing() {
    let empty = Stats { ref_logps: vec![vec![]; 3], ref_weights: vec![0.2, 0.3, 0.5], ..Stats::default() };
    for blend in blends(3).into_iter().filter(|blend| blend.level == Level::Sequence) {
        let outcome = MultiRef::new(loss("sigmoid"), blend).evaluate(&empty, &Totals::default());
        assert!(outcome.loss == 0.0 && outcome.metrics.iter().all(|metric| metric.1 == 0.0), "{blend:?}: {outcome:?}");
    }
}

// ---- blends: what the user types ------------------------------------------------------------------------------

#[test]
fn blends_that_contradict_themselves_are_named() {
    let clip = |eps_max, window| Some(RefClip { eps_max, window });
    let plain = Blend::default();
    let adaptive = Blend { clip: clip(0.1, Window::MeanRefs), ..plain };
    let fixed = Blend { clip: clip(0.1, Window::Fixed), ..plain };
    let arwc = Blend { weights: Weighting::Arwc, ..plain };
    let swap = Blend { mean: Mean::Harmonic, official_k2_swap: true, ..plain };
    let token = |mean| Blend { mean, level: Level::Token, ..plain };
    let good = [
        (plain, 1, false),
        (plain, 9, false),
        (adaptive, 2, true),
        (fixed, 2, false),
        (arwc, 3, true),
        (swap, 2, true),
        (token(Mean::Arithmetic), 2, false),
    ];
    for (blend, references, pairs) in good {
        blend.check(references, pairs).unwrap_or_else(|e| panic!("{blend:?}: {e}"));
    }
    let bad = [
        (Blend { mean: Mean::Harmonic, ..plain }, 1, true, "--ref-mean", "there is 1; add a --ref-model"),
        (arwc, 1, true, "--ref-weights arwc", "there is 1"),
        (adaptive, 1, true, "--ref-clip", "there is 1"),
        (swap, 1, true, "--ref-mean", "there is 1"),
        (arwc, 2, false, "--ref-weights", "the objective has none"),
        (adaptive, 2, false, "--ref-clip-window", "use `--ref-clip-window fixed`"),
        (Blend { clip: clip(0.1, Window::Anchor), ..plain }, 2, false, "--ref-clip-window", "shared by a pair"),
        (Blend { clip: clip(0.0, Window::Fixed), ..plain }, 2, true, "--ref-clip", "0 < width < 1, got 0"),
        (Blend { clip: clip(1.0, Window::Fixed), ..plain }, 2, true, "--ref-clip", "got 1"),
        (Blend { clip: clip(f64::NAN, Window::Fixed), ..plain }, 2, true, "--ref-clip", "got NaN"),
        (swap, 3, true, "--official-k2-swap", "there are 3"),
        (Blend { mean: Mean::Arithmetic, ..swap }, 2, true, "--official-k2-swap", "Arithmetic"),
        (token(Mean::Geometric), 2, true, "--ref-level", "the same on both levels"),
        (token(Mean::MultiDpo), 2, true, "--ref-level", "averages losses"),
        (Blend { level: Level::Token, ..fixed }, 2, true, "--ref-level", "remove one of the two"),
    ];
    for (blend, references, pairs, expected_key, expected_detail) in bad {
        refused(blend.check(references, pairs), expected_key, expected_detail);
    }
}

fn refused<T>(found: cuvee::Result<T>, expected_key: &str, expected_detail: &str) {
    match found.err() {
        Some(Error::Option { key, detail }) => {
            assert_eq!(key, expected_key);
            assert!(detail.contains(expected_detail), "{detail:?} does not say {expected_detail:?}");
        }
        other => panic!("expected an option error about {expected_key}, got {other:?}"),
    }
}

#[test]
fn objectives_that_a_blend_does_not_fit_are_named() {
    let build = |name: &str, params: &[(&str, f64)], blend: Blend, references: usize| {
        mrpo::build(&Choice::one(name, params.iter().copied().collect()), &blend, references)
    };
    let beta = [("beta", 0.1)];
    let arwc = Blend { weights: Weighting::Arwc, ..Blend::default() };
    let adaptive = Blend { clip: Some(RefClip { eps_max: 0.1, window: Window::MeanRefs }), ..Blend::default() };
    let token = Blend { mean: Mean::Arithmetic, level: Level::Token, ..Blend::default() };
    refused(build("kto", &beta, arwc, 2), "--ref-weights", "the objective has none");
    refused(build("kto", &beta, adaptive, 2), "--ref-clip-window", "the objective has none");
    refused(
        build("aot", &beta, Blend { mean: Mean::MultiDpo, ..arwc }, 2),
        "--ref-weights",
        "which aot does not allow",
    );
    refused(build("sigmoid", &[("beta", 0.1), ("ld_alpha", 0.5)], token, 2), "--ref-level", "remove one of the two");
    refused(build("sigmoid", &beta, arwc, 1), "--ref-weights arwc", "there is 1");
    let fits = [("kto", Blend::default()), ("aot", arwc), ("sigmoid", token), ("sigmoid", adaptive)];
    for (name, blend) in fits {
        assert_eq!(build(name, &beta, blend, 3).unwrap().needs().refs, 1..=usize::MAX, "{name}");
    }
    assert_eq!(build("sigmoid", &beta, Blend::default(), 1).unwrap().needs().refs, 1..=1);
    let with_ld = build("sigmoid", &[("beta", 0.1), ("ld_alpha", 0.5)], Blend::default(), 2).unwrap();
    assert!(evaluate(with_ld.as_ref(), &stats(2, 5.0)).loss.is_finite());
}

#[test]
#[should_panic(expected = "does not read one reference")]
fn an_objective_without_references_cannot_be_blended() {
    MultiRef::new(sft(), Blend::default());
}

// ---- weights --------------------------------------------------------------------------------------------------

/// Two references, as (chosen, rejected) log-probs of the same pairs.
fn ref_pairs(gaps: [&[f64]; 2]) -> Vec<Vec<(f64, f64)>> {
    gaps.map(|gaps| gaps.iter().map(|gap| (gap - 50.0, -50.0)).collect()).to_vec()
}

#[test]
fn weights_follow_their_rule() {
    let validation = ref_pairs([&[1.0, -2.0, 0.0], &[3.0, 5.0, 1.0]]);
    let weights = |rule| RefWeights::new(rule, 2, Some(&validation)).unwrap().weights();
    assert_eq!(weights(Rule::Uniform), [0.5, 0.5]);
    assert_eq!(weights(Rule::Fixed(vec![0.25, 0.75])), [0.25, 0.75]);
    assert_eq!(weights(Rule::ValidationDiscrimination), [0.25, 0.75]);
    assert_eq!(weights(Rule::ValidationAccuracy), [1.5 / 4.5, 3.0 / 4.5]);
    assert_eq!(RefWeights::new(Rule::Uniform, 1, None).unwrap().weights(), [1.0]);

    let mut window = RefWeights::new(Rule::SlidingWindow { pairs: 2 }, 2, None).unwrap();
    assert_eq!(window.weights(), [0.5, 0.5], "nothing is known before the first step");
    window.observe(&validation);
    assert_eq!(window.weights(), [0.25, 0.75], "the last two pairs");
    window.observe(&ref_pairs([&[], &[]]));
    window.observe(&ref_pairs([&[-6.0], &[1.0]]));
    assert_eq!(window.weights(), [0.75, 0.25]);
}

#[test]
fn weights_that_do_not_look_ahead_do_not_depend_on_the_steps_own_pairs() {
    for rule in [Rule::SlidingWindow { pairs: 3 }, Rule::Thompson { seed: 4 }, Rule::Uniform] {
        let run = |last: [&[f64]; 2]| {
            let mut rule = RefWeights::new(rule.clone(), 2, None).unwrap();
            let mut used = Vec::new();
            for pairs in [ref_pairs([&[1.0], &[-2.0]]), ref_pairs([&[4.0, 0.1], &[2.0, -9.0]]), ref_pairs(last)] {
                used.push(rule.weights());
                assert_eq!(rule.weights(), used[used.len() - 1], "asking changes nothing");
                rule.observe(&pairs);
            }
            (used, rule.weights())
        };
        let (used, after) = run([&[7.0], &[1.0]]);
        assert_eq!((&used, &after), (&run([&[7.0], &[1.0]]).0, &run([&[7.0], &[1.0]]).1), "replayed");
        let (used_else, after_else) = run([&[-0.5], &[1.0]]);
        assert_eq!(used, used_else, "{rule:?}");
        assert!(rule == Rule::Uniform || after != after_else, "{rule:?} learns");
    }
}

#[test]
fn thompson_sampling_explores_and_then_prefers_the_better_reference() {
    let mut rule = RefWeights::new(Rule::Thompson { seed: 1 }, 2, None).unwrap();
    let first = rule.weights();
    assert_ne!(first, RefWeights::new(Rule::Thompson { seed: 2 }, 2, None).unwrap().weights());
    assert_ne!(first[0], 0.5);
    for _ in 0..200 {
        rule.observe(&ref_pairs([&[1.0, 1.0, 1.0, -1.0], &[-1.0, 1.0, -1.0, -1.0]]));
    }
    assert!((rule.weights()[0] - 0.75).abs() < 0.03, "{:?}", rule.weights());
}

#[test]
fn weights_sum_to_1_even_where_no_reference_tells_anything() {
    let flat = ref_pairs([&[0.0, 0.0], &[0.0, 0.0]]);
    let lost = ref_pairs([&[-1.0, -1.0], &[-1.0, -1.0]]);
    let rules = [
        Rule::ValidationDiscrimination,
        Rule::ValidationAccuracy,
        Rule::SlidingWindow { pairs: 9 },
        Rule::Thompson { seed: 0 },
    ];
    for rule in rules {
        for pairs in [&flat, &lost] {
            let mut weights = RefWeights::new(rule.clone(), 2, Some(pairs)).unwrap();
            weights.observe(pairs);
            let weights = weights.weights();
            assert!(
                (weights.iter().sum::<f64>() - 1.0).abs() < 1e-15 && weights.iter().all(|w| *w >= 0.0),
                "{weights:?}"
            );
        }
    }
    assert_eq!(RefWeights::new(Rule::ValidationAccuracy, 2, Some(&lost)).unwrap().weights(), [0.5, 0.5]);
}

#[test]
fn weights_that_cannot_be_are_named() {
    let fixed = |weights: &[f64]| RefWeights::new(Rule::Fixed(weights.to_vec()), 2, None);
    refused(fixed(&[1.0]), "--ref-weights", "one for each of 2 references, got 1");
    refused(fixed(&[1.0, 2.0]), "--ref-weights", "1 2 sums to 3, not to 1; for example `0.3333333333333333 0.666");
    refused(fixed(&[0.0, 0.0]), "--ref-weights", "for example `0.5 0.5`");
    refused(fixed(&[1.5, -0.5]), "--ref-weights", "0 or more, got -0.5");
    refused(fixed(&[f64::NAN, 1.0]), "--ref-weights", "got NaN");
    let learned = |rule, validation| RefWeights::new(rule, 2, validation);
    refused(learned(Rule::SlidingWindow { pairs: 0 }, None), "--ref-weights", "a window of 0 pairs");
    refused(learned(Rule::ValidationAccuracy, None), "--ref-weights", "give --eval-dataset");
    let empty = ref_pairs([&[], &[]]);
    refused(learned(Rule::ValidationDiscrimination, Some(&empty)), "--ref-weights", "give --eval-dataset");
}

// ---- KL penalties ---------------------------------------------------------------------------------------------

#[test]
fn gradients_of_penalties_are_central_differences() {
    for estimator in [Estimator::Exact, Estimator::K2, Estimator::K3] {
        for inner in [loss("sigmoid"), sft()] {
            let stats = stats(3, 5.0);
            let inner: Box<dyn Objective> = match *inner.needs().refs.end() {
                0 => inner,
                _ => Box::new(MultiRef::new(inner, Blend { mean: Mean::Harmonic, ..Blend::default() })),
            };
            let options = KlPenaltyOptions { weight: 0.7, estimator, ref_weights: vec![0.5, 0.0, 0.5] };
            let objective = KlPenalty::new(inner, options);
            let needs = objective.needs();
            assert_eq!((needs.refs.clone(), needs.token_kl), (3..=3, estimator == Estimator::Exact));
            assert_eq!((needs.token_logps, needs.ref_token_logps), (!needs.token_kl, !needs.token_kl));

            let outcome = evaluate(&objective, &stats);
            let check = |found: f64, mut field: Box<dyn FnMut(&mut Stats) -> &mut f64>| {
                let mut at = |x: f64| {
                    let mut moved = stats.clone();
                    *field(&mut moved) += x;
                    evaluate(&objective, &moved).loss
                };
                let numeric = (at(1e-4) - at(-1e-4)) / 2e-4;
                assert!((numeric - found).abs() < 1e-8, "{estimator:?}: {numeric}, {found}");
            };
            for t in 0..stats.token_logps.len() {
                let found = outcome.grads.token_logps.get(t).copied().unwrap_or(0.0);
                check(found, Box::new(move |stats| &mut stats.token_logps[t]));
                for k in 0..3 {
                    let found = outcome.grads.token_kl.get(k).map_or(0.0, |grads| grads[t]);
                    check(found, Box::new(move |stats| &mut stats.token_kl[k][t]));
                }
            }
            for s in 0..stats.logps.len() {
                check(outcome.grads.logps[s], Box::new(move |stats| &mut stats.logps[s]));
            }
        }
    }
}

#[test]
fn a_penalty_adds_the_weighted_mean_over_all_completion_tokens() {
    let stats = stats(2, 5.0);
    let options = KlPenaltyOptions { weight: 0.5, estimator: Estimator::Exact, ref_weights: vec![0.25, 0.75] };
    let (alone, penalised) = (evaluate(sft().as_ref(), &stats), evaluate(&KlPenalty::new(sft(), options), &stats));
    let mean = |k: usize| stats.token_kl[k].iter().sum::<f64>() / 18.0;
    let kl = 0.25 * mean(0) + 0.75 * mean(1);
    assert!(near(penalised.loss, alone.loss + 0.5 * kl));
    assert_eq!(penalised.grads.logps, alone.grads.logps);
    assert!(penalised.grads.token_kl[1].iter().all(|grad| near(*grad, 0.5 * 0.75 / 18.0)));
    for (name, value) in [("kl", kl), ("refs/0/kl", mean(0)), ("refs/1/kl", mean(1))] {
        assert!(near(metric(&penalised, name), value), "{name}");
    }
}

#[test]
fn a_penalty_shows_the_inner_objective_only_the_references_it_reads() {
    let penalised = |refs, estimator| {
        let probe = Probe::new(Needs { refs, ..Needs::POLICY });
        let options = KlPenaltyOptions { weight: 1.0, estimator, ref_weights: vec![0.5, 0.5] };
        let objective = KlPenalty::new(Box::new(probe.clone()), options);
        assert_eq!(
            (objective.scope(), objective.initial_state(), objective.name()),
            (Scope::Batch, vec![5.0], "probe")
        );
        let outcome = evaluate(&objective, &stats(2, 1.0));
        assert_eq!(outcome.state, [7.0]);
        assert_eq!(metric(&outcome, "kl"), 3.0, "the inner objective's own");
        assert_eq!(outcome.metrics.iter().filter(|(name, _)| name == "kl").count(), 1);
        probe.seen().ref_logps.len()
    };
    assert_eq!(penalised(0..=0, Estimator::K3), 0);
    assert_eq!(penalised(1..=1, Estimator::Exact), 1);
    assert_eq!(penalised(1..=usize::MAX, Estimator::K2), 2);
}

#[test]
fn a_reference_of_weight_0_may_be_infinitely_far() {
    let mut stats = stats(2, 5.0);
    stats.token_kl[1].fill(f64::INFINITY);
    stats.ref_token_logps[1].fill(f64::NEG_INFINITY);
    for estimator in [Estimator::Exact, Estimator::K2] {
        let options = KlPenaltyOptions { weight: 0.5, estimator, ref_weights: vec![1.0, 0.0] };
        let objective = KlPenalty::new(sft(), options);
        let outcome = evaluate(&objective, &stats);
        let grads = outcome.grads.token_kl.iter().flatten().chain(&outcome.grads.token_logps);
        assert!(outcome.loss.is_finite() && grads.clone().all(|grad| grad.is_finite()), "{outcome:?}");
    }
}

#[test]
fn penalties_that_cannot_be_are_named() {
    let with = |weight, ref_weights: &[f64]| {
        KlPenaltyOptions { weight, estimator: Estimator::Exact, ref_weights: ref_weights.to_vec() }.check(2)
    };
    with(0.1, &[0.5, 0.5]).unwrap();
    for weight in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        refused(with(weight, &[0.5, 0.5]), "--kl-penalty", "for example `--kl-penalty 0.1`");
    }
    refused(with(0.1, &[1.0]), "--ref-weights", "one for each of 2 references");
    let none = KlPenaltyOptions { weight: 0.1, estimator: Estimator::K2, ref_weights: vec![] };
    refused(none.check(0), "--kl-penalty", "give a --ref-model");
    refused("k1".parse::<Estimator>(), "--kl-estimator", "does not depend on the reference");
    refused("k4".parse::<Estimator>(), "--kl-estimator", "expected exact, k2 or k3");
    assert_eq!("k3".parse::<Estimator>().unwrap(), Estimator::K3);
}

/// A tree of two steps with two tokens each, where the second distribution depends on the first token: the exact
/// gradient of the KL by every logit, against what the estimators' gradients are in expectation over the policy.
#[test]
fn on_policy_estimators_have_the_gradient_of_the_kl_and_the_sum_of_k2_over_tokens_has_not() {
    // Logits of token 1 at the root and in the two states behind it; token 0 has logit 0.
    let (policy, reference) = ([0.3, -1.2, 0.8], [-0.5, 0.4, 1.9]);
    let logps = |logits: &[f64; 3], first: usize, second: usize| -> Vec<f64> {
        let logp = |logit: f64, token: usize| if token == 1 { logit } else { 0.0 } - logit.exp().ln_1p();
        vec![logp(logits[0], first), logp(logits[1 + first], second)]
    };
    let paths = [(0, 0), (0, 1), (1, 0), (1, 1)];
    let kl = |logits: &[f64; 3]| -> f64 {
        let of = |&(first, second): &(usize, usize)| {
            let (p, q): (f64, f64) =
                (logps(logits, first, second).iter().sum(), logps(&reference, first, second).iter().sum());
            p.exp() * (p - q)
        };
        paths.iter().map(of).sum()
    };
    // d logp of a token by the logit of its state: token - probability of 1.
    type Slopes<'a> = &'a dyn Fn(&[f64], &[f64]) -> Vec<f64>;
    let expectation = |slopes: Slopes| -> [f64; 3] {
        let mut grad = [0.0; 3];
        for (first, second) in paths {
            let (p, q) = (logps(&policy, first, second), logps(&reference, first, second));
            let (slopes, prob) = (slopes(&p, &q), p.iter().sum::<f64>().exp());
            let by_logit = |state: usize, token: usize| token as f64 - 1.0 / (1.0 + (-policy[state]).exp());
            grad[0] += prob * slopes[0] * by_logit(0, first);
            grad[1 + first] += prob * slopes[1] * by_logit(1 + first, second);
        }
        grad
    };
    let to_go = expectation(&|p, q| reward_to_go_k1(p, q));
    let sequence = expectation(&|p, q| vec![sequence_k2(&[p.iter().sum()], &[q.iter().sum()]).1[0]; 2]);
    let per_token = expectation(&|p, q| p.iter().zip(q).map(|(&p, &q)| k2(p, q).1).collect());
    for i in 0..3 {
        let at = |h: f64| {
            let mut logits = policy;
            logits[i] += h;
            kl(&logits)
        };
        let exact = (at(1e-5) - at(-1e-5)) / 2e-5;
        assert!((to_go[i] - exact).abs() < 1e-9 && (sequence[i] - exact).abs() < 1e-9, "{i}: {exact}");
        // In the last step nothing follows, so there it is right.
        assert_eq!((per_token[i] - exact).abs() < 1e-9, i > 0, "{i}: {} {exact}", per_token[i]);
    }
    assert!(reward_to_go_k1(&[], &[]).is_empty());
}
