//! Several references: blends, weights, KL estimators.

use std::sync::{Arc, Mutex};

use cuvee::objectives::kl::{Estimator, KlPenalty, KlPenaltyOptions, k1, k2, k3};
use cuvee::objectives::mrpo::{Blend, Level, Mean, MultiRef, RefClip, Weighting, Window};
use cuvee::objectives::{Grads, Needs, Objective, Outcome, Params, Scope, Stats, Totals};
use libtest_mimic::Failed;
use serde_json::Value;

use super::{Tally, build, cases, close, log_softmax, numbers, rows, text};

/// An objective of no loss that keeps the references it was given.
#[derive(Clone, Default)]
struct Probe(Arc<Mutex<Vec<Vec<f64>>>>);

impl Objective for Probe {
    fn name(&self) -> &'static str {
        "probe"
    }

    fn needs(&self) -> Needs {
        Needs { refs: 0..=1, ..Needs::POLICY }
    }

    fn scope(&self) -> Scope {
        Scope::Pair
    }

    fn evaluate(&self, stats: &Stats, _: &Totals) -> Outcome {
        self.0.lock().unwrap().extend(stats.ref_logps.clone());
        Outcome::default()
    }
}

/// The loss on a virtual reference, its gradient, and what the references were made into.
pub fn mrpo(file: &Value, tally: &mut Tally) -> Result<(), Failed> {
    for case in cases(file)? {
        let (name, config, expected) = (text(case, "name")?, &case["config"], &case["expected"]);
        let what = |field: &str| format!("{name}, {field}");
        let both = |of: &Value, stem: &str| {
            let column = |side: &str| numbers(&of[format!("{stem}_{side}")]);
            Ok::<_, String>([column("w")?, column("l")?].concat())
        };
        let refs = [rows(&case["refs_w"])?, rows(&case["refs_l"])?].concat();
        let pairs = refs.len() / 2;
        let alpha = &config["alpha"];
        let stats = Stats {
            logps: both(case, "policy")?,
            ref_logps: (0..refs[0].len()).map(|k| refs.iter().map(|row| row[k]).collect()).collect(),
            lens: vec![1.0; 2 * pairs],
            pairs: (0..pairs).map(|i| (i, pairs + i)).collect(),
            ref_weights: if alpha == "arwc" { vec![] } else { numbers(alpha)? },
            ..Stats::default()
        };
        let totals = Totals::of(&stats);
        let (blend, inner) = chosen(config)?;
        let outcome = MultiRef::new(inner, blend).evaluate(&stats, &totals);
        close(&what("loss"), &[outcome.loss], &numbers(&expected["loss_mean"])?)?;
        close(&what("grad_policy"), &outcome.grads.logps, &both(expected, "grad_policy")?)?;
        let metric = |name: &str| outcome.metrics.iter().find(|(known, _)| known == name).map(|(_, value)| *value);
        // With a divergence the file's rewards are scores, the metric is beta times the log-ratio as in TRL.
        let rewards = [("rewards/chosen", "reward_w"), ("rewards/rejected", "reward_l")];
        for (name, expected) in
            rewards.into_iter().filter(|_| config["mode"] != "forward_kl").map(|(n, e)| (n, &expected[e]))
        {
            let mean = numbers(expected)?.iter().sum::<f64>() / pairs as f64;
            close(&what(name), &[metric(name).ok_or("no rewards")?], &[mean])?;
        }
        for k in 0..stats.ref_logps.len() {
            let alphas = rows(&expected["alpha"])?;
            let mean = alphas.iter().map(|alpha| alpha[k]).sum::<f64>() / pairs as f64;
            let found = metric(&format!("refs/{k}/weight")).ok_or("no weight")?;
            if (found - mean).abs() > 1e-12 {
                return Err(what(&format!("weight of reference {k}: found {found}, expected {mean}")).into());
            }
        }
        let probe = Probe::default();
        MultiRef::new(Box::new(probe.clone()), blend).evaluate(&stats, &totals);
        let seen = probe.0.lock().unwrap();
        if blend.mean != Mean::MultiDpo {
            close(&what("vref"), &seen[0], &both(expected, "vref")?)?;
        }
        tally.checked += 1;
    }
    Ok(())
}

/// The blend and the inner objective of a case.
fn chosen(config: &Value) -> Result<(Blend, Box<dyn Objective>), Failed> {
    let number = |key: &str| config[key].as_f64().ok_or_else(|| format!("no {key}"));
    let window = match (text(config, "ctro")?, text(config, "eps_source")?) {
        ("none", _) => None,
        ("fixed", _) => Some(Window::Fixed),
        ("adaptive", "mean_refs") => Some(Window::MeanRefs),
        ("adaptive", "anchor") => Some(Window::Anchor),
        (ctro, source) => return Err(format!("unknown window {ctro} {source}").into()),
    };
    let mode = text(config, "mode")?;
    let mean = match mode {
        "geometric" => Mean::Geometric,
        "harmonic" => Mean::Harmonic,
        "arithmetic" | "forward_kl" => Mean::Arithmetic,
        "multi_dpo" => Mean::MultiDpo,
        _ => return Err(format!("unknown mean {mode}").into()),
    };
    let eps_max = number("eps_max")?;
    let blend = Blend {
        mean,
        weights: if config["alpha"] == "arwc" { Weighting::Arwc } else { Weighting::Step },
        clip: window.map(|window| RefClip { eps_max, window }),
        level: Level::Sequence,
        official_k2_swap: config["official_k2_swap"] == true,
    };
    let mut params = Params::from_iter([("beta", number("beta")?)]);
    let name = match text(config, "loss")? {
        "sigmoid" => {
            params.set("label_smoothing", number("label_smoothing")?);
            "sigmoid"
        }
        "ipo" => "ipo_sum", // the released code's does not divide by lengths
        "hinge" => "hinge",
        loss => return Err(format!("unknown loss {loss}").into()),
    };
    if mode == "forward_kl" {
        params.set("f_divergence_type", "forward_kl");
    }
    Ok((blend, build(name, &params)?))
}

/// Virtual references of whole completions and of their tokens.
pub fn mrpo_token_level(file: &Value, tally: &mut Tally) -> Result<(), Failed> {
    for case in cases(file)? {
        let tokens = case["logps"].as_array().ok_or("no logps")?.iter().map(rows).collect::<Result<Vec<_>, _>>()?;
        let lens: Vec<usize> = rows(&case["mask"])?.iter().map(|mask| mask.iter().sum::<f64>() as usize).collect();
        let weights = numbers(&case["alpha"])?;
        let of_ref = |k: usize| {
            let scored = tokens.iter().zip(&lens).flat_map(|(rows, &len)| &rows[..len]);
            scored.map(|row| row[k]).collect::<Vec<f64>>()
        };
        let offsets: Vec<usize> = (0..=lens.len()).map(|s| lens[..s].iter().sum()).collect();
        let ref_token_logps: Vec<Vec<f64>> = (0..weights.len()).map(of_ref).collect();
        let sum = |logps: &Vec<f64>| offsets.windows(2).map(|at| logps[at[0]..at[1]].iter().sum()).collect();
        let stats = Stats {
            logps: vec![0.0; lens.len()],
            lens: lens.iter().map(|&len| len as f64).collect(),
            ref_logps: ref_token_logps.iter().map(sum).collect(),
            ref_token_logps,
            offsets: offsets.clone(),
            ref_weights: weights,
            ..Stats::default()
        };
        for (level, level_name) in [(Level::Token, "token"), (Level::Sequence, "sequence")] {
            for (mean, mean_name) in
                [(Mean::Geometric, "geometric"), (Mean::Harmonic, "harmonic"), (Mean::Arithmetic, "arithmetic")]
            {
                let probe = Probe::default();
                let blend = Blend { mean, level, ..Blend::default() };
                MultiRef::new(Box::new(probe.clone()), blend).evaluate(&stats, &Totals::of(&stats));
                let field = format!("{level_name}_{mean_name}");
                close(&field, &probe.0.lock().unwrap()[0], &numbers(&case["expected"][&field])?)?;
            }
        }
        tally.checked += 1;
    }
    Ok(())
}

/// Optimal policies on a small simplex: which mean is the exact solution of which objective.
pub fn multi_ref_theory(file: &Value, tally: &mut Tally) -> Result<(), Failed> {
    for case in cases(file)? {
        let (name, expected) = (text(case, "name")?, &case["expected"]);
        let beta = case["beta"].as_f64().ok_or("no beta")?;
        let (probs, weights, reward) = (rows(&case["probs"])?, numbers(&case["alpha"])?, numbers(&case["reward"])?);
        let ln_probs: Vec<Vec<f64>> = probs.iter().map(|p| p.iter().map(|p| p.ln()).collect()).collect();
        let objective = |policy: &[f64], kl: &dyn Fn(f64, f64) -> f64| -> f64 {
            let gain = policy.iter().zip(&reward).map(|(p, r)| p * r).sum::<f64>();
            let divergence = |probs: &Vec<f64>| policy.iter().zip(probs).map(|(&p, &q)| kl(p, q)).sum::<f64>();
            gain - beta * probs.iter().zip(&weights).map(|(probs, weight)| weight * divergence(probs)).sum::<f64>()
        };
        let blended = |mean: Mean| -> Vec<f64> {
            let of = |y: usize| ln_probs.iter().map(|logps| logps[y]).collect::<Vec<f64>>();
            (0..reward.len()).map(|y| mean.blend(&of(y), &weights)).collect()
        };
        for (mean, mode) in
            [(Mean::Harmonic, "harmonic"), (Mean::Geometric, "geometric"), (Mean::Arithmetic, "arithmetic")]
        {
            let expected = |field: &str| numbers(&expected[format!("{field}_{mode}")]);
            let what = |field: &str| format!("{name}, {field}_{mode}");
            let v = blended(mean);
            close(&what("logref_unnorm"), &v, &expected("logref_unnorm")?)?;
            let scores: Vec<f64> = v.iter().zip(&reward).map(|(v, r)| v + r / beta).collect();
            let policy: Vec<f64> = log_softmax(&scores).iter().map(|logp| logp.exp()).collect();
            close(&what("policy"), &policy, &expected("policy")?)?;
            let reached = objective(&policy, &|p, q| p * (p / q).ln());
            close(&what("objective"), &[reached], &expected("objective")?)?;
            let bound = beta * (scores[0] - log_softmax(&scores)[0]);
            close(&what("surrogate_max"), &[bound], &expected("surrogate_max")?)?;
        }
        // The forward KL: the reward of its optimal policy is const + beta (1 - e^-l) of the log-ratio to the mixture.
        let (policy, mixture) = (numbers(&expected["forward_kl_policy"])?, blended(Mean::Arithmetic));
        let lambda = numbers(&expected["forward_kl_lambda"])?[0];
        let score = |y: usize| 1.0 - (mixture[y] - policy[y].ln()).exp();
        let implied: Vec<f64> = (0..reward.len()).map(|y| lambda - beta + beta * score(y)).collect();
        let near = implied.iter().zip(&reward).all(|(a, b)| (a - b).abs() < 1e-10);
        if !near {
            return Err(format!("{name}: forward KL: {implied:?} instead of {reward:?}").into());
        }
        let mixture: Vec<f64> = mixture.iter().map(|v| v.exp()).collect();
        close("forward_kl_mixture", &mixture, &numbers(&expected["forward_kl_mixture"])?)?;
        let reached = objective(&policy, &|p, q| q * (q / p).ln());
        close("forward_kl_objective", &[reached], &numbers(&expected["forward_kl_objective"])?)?;
        tally.checked += 1;
    }
    Ok(())
}

type Estimate = fn(f64, f64) -> (f64, f64);
const ESTIMATES: [(&str, Estimate); 3] = [("k1", k1), ("k2", k2), ("k3", k3)];

pub fn kl_estimators(file: &Value, tally: &mut Tally) -> Result<(), Failed> {
    for case in cases(file)? {
        match text(case, "name")? {
            "pointwise" => pointwise(case)?,
            "multi_ref_penalty" => penalty(case)?,
            _ => expectations(case)?,
        }
        tally.checked += 1;
    }
    Ok(())
}

fn pointwise(case: &Value) -> Result<(), Failed> {
    let (logps, refs, expected) = (numbers(&case["logp"])?, numbers(&case["logref"])?, &case["expected"]);
    for (name, estimate) in ESTIMATES {
        let (values, slopes): (Vec<f64>, Vec<f64>) = logps.iter().zip(&refs).map(|(&p, &q)| estimate(p, q)).unzip();
        close(name, &values, &numbers(&expected[name])?)?;
        close(&format!("grad_{name}"), &slopes, &numbers(&expected[format!("grad_{name}")])?)?;
    }
    Ok(())
}

/// Under the policy's distribution: what each estimates, and what its gradient as a loss is the gradient of.
fn expectations(case: &Value) -> Result<(), Failed> {
    let (logps, refs) = (log_softmax(&numbers(&case["logits"])?), log_softmax(&numbers(&case["ref_logits"])?));
    let expected = &case["expected"];
    let probs: Vec<f64> = logps.iter().map(|p| p.exp()).collect();
    for (name, estimate) in ESTIMATES {
        let at = |y: usize| estimate(logps[y], refs[y]);
        let mean = |of: &dyn Fn(usize) -> f64| (0..probs.len()).map(|y| probs[y] * of(y)).sum::<f64>();
        close(name, &[mean(&|y| at(y).0)], &numbers(&expected[format!("E_{name}")])?)?;
        let by_logit = |v: usize| mean(&|y| at(y).1 * (f64::from(y == v) - probs[v]));
        let expected = numbers(&expected[format!("E_grad_{name}_as_loss")])?;
        for (v, expected) in expected.iter().enumerate() {
            // Of k1 it is 0 up to rounding, to which a relative tolerance would not apply.
            if (by_logit(v) - expected).abs() > 1e-14 {
                return Err(format!("{name}, by logit {v}: found {}, expected {expected}", by_logit(v)).into());
            }
        }
    }
    Ok(())
}

fn penalty(case: &Value) -> Result<(), Failed> {
    let (token_logps, refs, weights) = (numbers(&case["logp"])?, rows(&case["logrefs"])?, numbers(&case["alpha"])?);
    let (expected, tokens) = (&case["expected"], token_logps.len());
    for (estimator, name) in [(Estimator::K2, "k2"), (Estimator::K3, "k3")] {
        let stats = Stats {
            logps: vec![token_logps.iter().sum()],
            lens: vec![tokens as f64],
            ref_logps: vec![vec![0.0]; weights.len()],
            offsets: vec![0, tokens],
            token_logps: token_logps.clone(),
            ref_token_logps: (0..weights.len()).map(|k| refs.iter().map(|row| row[k]).collect()).collect(),
            ..Stats::default()
        };
        let options = KlPenaltyOptions { weight: 1.0, estimator, ref_weights: weights.clone() };
        let outcome = KlPenalty::new(Box::new(Probe::default()), options).evaluate(&stats, &Totals::of(&stats));
        let mean = numbers(&expected[format!("sum_{name}")])?.iter().sum::<f64>() / tokens as f64;
        close(&format!("sum_{name}"), &[outcome.loss], &[mean])?;
        let Grads { token_logps: grads, .. } = outcome.grads;
        let grads: Vec<f64> = grads.iter().map(|grad| grad * tokens as f64).collect();
        close(&format!("grad_sum_{name}"), &grads, &numbers(&expected[format!("grad_sum_{name}")])?)?;
    }
    // Which mean each estimator holds the policy to.
    let means = |mean: Mean| refs.iter().map(|row| mean.blend(row, &weights)).collect::<Vec<f64>>();
    close("log_geometric", &means(Mean::Geometric), &numbers(&expected["log_geometric"])?)?;
    close("log_arithmetic", &means(Mean::Arithmetic), &numbers(&expected["log_arithmetic"])?)?;
    let to_mean = |mean: Mean, estimate: Estimate| {
        token_logps.iter().zip(means(mean)).map(|(&p, q)| estimate(p, q).1).collect::<Vec<f64>>()
    };
    close("k2 to the geometric mean", &to_mean(Mean::Geometric, k2), &numbers(&expected["grad_sum_k2"])?)?;
    close("k3 to the arithmetic mean", &to_mean(Mean::Arithmetic, k3), &numbers(&expected["grad_sum_k3"])?)
}
