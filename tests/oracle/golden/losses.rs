//! Golden values of losses: on sequences, on tokens, without a reference, on labels, of reward models.

use cuvee::objectives::{Grads, Params, Stats, Totals};
use libtest_mimic::Failed;
use serde_json::{Value, json};

use super::{TOLERANCE, Tally, build, cases, close, close_to, log_softmax, metric, numbers, rows, text};

/// Losses on sequence log-probs. `grad_*` are of the sum over the batch, `loss` is the mean.
pub fn preference_losses(file: &Value, tally: &mut Tally) -> Result<(), Failed> {
    for (i, case) in cases(file)?.iter().enumerate() {
        let loss_type = text(case, "loss_type")?;
        let given = &case["params"];
        if given["f_constants"] == false && ["ipo", "sigmoid_norm"].contains(&loss_type) {
            tally.skip(format!("{loss_type} without the constants of f', which TRL 1.16 has"));
            continue;
        }
        let (name, mut params) = registered(loss_type, given)?;
        let column = |name: &str| numbers(&case[name]).map_err(|e| format!("case {i}: {name}: {e}"));
        let both = |chosen: &str, rejected: &str| Ok::<_, String>([column(chosen)?, column(rejected)?].concat());
        let mut stats = paired(
            both("chosen_logps", "rejected_logps")?,
            both("ref_chosen_logps", "ref_rejected_logps")?,
            both("chosen_len", "rejected_len")?,
        );
        if let Some(delta) = given["delta"].as_f64() {
            // A mean over so many rewards that this batch does not move it.
            params.set("running_delta", true);
            stats.state = vec![delta, 1e300];
        }
        let totals = Totals::of(&stats);
        let outcome = build(name, &params)?.evaluate(&stats, &totals);

        let what = |field: &str| format!("case {i}, {loss_type} with {given}, {field}");
        close(&what("loss"), &[outcome.loss], &numbers(&case["loss"])?)?;
        let summed: Vec<f64> = outcome.grads.logps.iter().map(|g| g * totals.pairs).collect();
        close(&what("grad"), &summed, &both("grad_chosen_logps", "grad_rejected_logps")?)?;
        let mean = |name: &str| Ok::<_, String>(column(name)?.iter().sum::<f64>() / totals.pairs);
        for (metric, expected) in [
            ("rewards/chosen", mean("rewards_chosen")?),
            ("rewards/rejected", mean("rewards_rejected")?),
            ("rewards/margins", mean("reward_margin")? * totals.pairs),
            ("rewards/accuracies", mean("reward_accuracy")? * totals.pairs),
            ("logps/chosen", mean("chosen_logps")?),
            ("logps/rejected", mean("rejected_logps")?),
        ] {
            close(&what(metric), &[super::metric(&outcome, metric)?], &[expected])?;
        }
        tally.checked += 1;
    }
    Ok(())
}

/// From logits to the loss and back: rows 0..B are chosen, B..2B rejected.
pub fn token_level(file: &Value, tally: &mut Tally) -> Result<(), Failed> {
    let mask = rows(&file["completion_mask"])?;
    let ids = rows(&file["input_ids"])?;
    let lens: Vec<f64> = mask.iter().map(|row| row[1..].iter().sum()).collect();
    let offsets: Vec<usize> = (0..=lens.len()).map(|s| lens[..s].iter().sum::<f64>() as usize).collect();
    // Of the tokens that count, `of` (the distribution, the token).
    let per_token = |logits: &Value, of: fn(&[f64], usize) -> f64| -> Result<Vec<f64>, Failed> {
        let mut tokens = Vec::new();
        for (s, logits) in logits.as_array().ok_or("logits are not an array")?.iter().enumerate() {
            for (t, logits) in rows(logits)?.iter().enumerate() {
                if mask[s].get(t + 1) == Some(&1.0) {
                    tokens.push(of(&log_softmax(logits), ids[s][t + 1] as usize));
                }
            }
        }
        Ok(tokens)
    };
    let own: fn(&[f64], usize) -> f64 = |logps, token| logps[token];
    let token_logps = per_token(&file["logits"], own)?;
    let ref_token_logps = per_token(&file["ref_logits"], own)?;
    let ln_sum_p2 = per_token(&file["logits"], |logps, _| logps.iter().map(|x| (2.0 * x).exp()).sum::<f64>().ln())?;
    for (i, case) in cases(file)?.iter().enumerate() {
        let mut given = case["params"].clone();
        let options = given.as_object_mut().ok_or("params are not an object")?;
        let loss_type = options.remove("loss_type").and_then(|v| Some(v.as_str()?.to_owned())).ok_or("no loss_type")?;
        if loss_type == "sft" {
            options.remove("beta"); // TRL's DPO takes one and ignores it
        }
        let (name, params) = registered(&loss_type, &given)?;
        let stats = Stats {
            offsets: offsets.clone(),
            token_logps: token_logps.clone(),
            ref_token_logps: vec![ref_token_logps.clone()],
            ln_sum_p2: ln_sum_p2.clone(),
            ..paired(numbers(&case["seq_logps"])?, numbers(&case["ref_seq_logps"])?, lens.clone())
        };
        let outcome = build(name, &params)?.evaluate(&stats, &Totals::of(&stats));

        let what = |field: &str| format!("case {i}, {loss_type} with {given}, {field}");
        close(&what("loss"), &[outcome.loss], &numbers(&case["loss"])?)?;
        let Grads { logps, token_logps, .. } = &outcome.grads;
        let at = |of: &[f64], i: usize| of.get(i).copied().unwrap_or(0.0);
        for (s, expected) in rows(&case["grad_per_token_logps"])?.iter().enumerate() {
            let mut tokens = offsets[s]..offsets[s + 1];
            let mut grad = |m: &f64| match *m {
                0.0 => 0.0,
                _ => at(logps, s) + at(token_logps, tokens.next().expect("as many tokens as the mask has")),
            };
            let per_token: Vec<f64> = mask[s][1..].iter().map(&mut grad).collect();
            close(&what("grad_per_token_logps"), &per_token, expected)?;
        }
        tally.checked += 1;
    }
    Ok(())
}

/// CPO and its kin, ORPO. `grad_*` are of the sum over the batch and leave likelihood terms out.
pub fn reference_free(file: &Value, tally: &mut Tally) -> Result<(), Failed> {
    for (i, case) in cases(file)?.iter().enumerate() {
        let family = text(case, "family")?;
        let loss_type = case["loss_type"].as_str().unwrap_or(family);
        let (name, given) = match loss_type {
            "sigmoid" => ("cpo", json!({"cpo_alpha": 0})),
            "hinge" => ("cpo_hinge", json!({"cpo_alpha": 0})),
            "ipo" => ("cpo_ipo", json!({"cpo_alpha": 0})),
            // The length-normalised loss of TPO is SimPO's, with label smoothing.
            "tpo-l" => ("simpo", json!({})),
            name => (name, json!({})),
        };
        let mut params = registered(name, &given)?.1;
        for (key, value) in case["params"].as_object().ok_or("params are not an object")? {
            let key = match key.as_str() {
                "gamma" => "simpo_gamma",
                "alpha" => "alphapo_alpha",
                key => key,
            };
            params.set(key, value.as_f64().ok_or("a parameter is not a number")?);
        }
        let both = |chosen: &str, rejected: &str| -> Result<Vec<f64>, Failed> {
            Ok([numbers(&case[chosen])?, numbers(&case[rejected])?].concat())
        };
        let logps = both("chosen_sum_logps", "rejected_sum_logps")?;
        let stats = Stats { ref_logps: vec![], ..paired(logps, vec![], both("chosen_len", "rejected_len")?) };
        let totals = Totals::of(&stats);
        let mut outcome = build(name, &params)?.evaluate(&stats, &totals);
        let (mut loss, nll) = (numbers(&case["loss"])?, case["chosen_nll"].as_f64());
        if let Some(nll) = nll {
            // Theirs runs over prompts, too.
            loss[0] -= nll;
            outcome.loss -= metric(&outcome, "nll_loss")?;
            stats.pairs.iter().for_each(|pair| outcome.grads.logps[pair.0] += 1.0 / totals.tokens);
        }
        let what = |field: &str| format!("case {i}, {loss_type} with {}, {field}", case["params"]);
        // Subtracting the likelihood costs digits.
        let tolerance = if nll.is_some() { 1e-8 } else { TOLERANCE };
        close_to(tolerance, &what("loss"), &[outcome.loss], &loss)?;
        let summed: Vec<f64> = outcome.grads.logps.iter().map(|g| g * totals.pairs).collect();
        close_to(tolerance, &what("grad"), &summed, &both("grad_chosen_sum_logps", "grad_rejected_sum_logps")?)?;
        tally.checked += 1;
    }
    Ok(())
}

/// KTO, APO-zero and BCO on completions with labels. `grad_*` are of the sum over the batch.
pub fn kto_bco(file: &Value, tally: &mut Tally) -> Result<(), Failed> {
    let labelled = |log_ratios: Vec<f64>, labels: Vec<bool>| Stats {
        ref_logps: vec![vec![0.0; log_ratios.len()]],
        lens: vec![1.0; log_ratios.len()],
        logps: log_ratios,
        labels,
        ..Stats::default()
    };
    for (i, case) in cases(file)?.iter().enumerate() {
        let mut given = case["params"].clone();
        let loss_type = given["loss_type"].take();
        given.as_object_mut().map(|options| options.remove("loss_type"));
        let (name, params) = registered(loss_type.as_str().ok_or("no loss_type")?, &given)?;
        let labels = case["label"].as_array().ok_or("no label")?.iter().map(|label| label == true).collect();
        let mut stats = labelled(numbers(&case["logratios"])?, labels);
        stats.mismatched_logps = numbers(&case["kl_logratios_mismatched_pairs"])?;
        stats.mismatched_ref_logps = vec![vec![0.0; stats.mismatched_logps.len()]];
        let totals = Totals::of(&stats);
        let outcome = build(name, &params)?.evaluate(&stats, &totals);

        let what = |field: &str| format!("case {i}, {name} with {given}, {field}");
        close(&what("loss"), &[outcome.loss], &numbers(&case["loss"])?)?;
        let summed: Vec<f64> = outcome.grads.logps.iter().map(|g| g * totals.sequences).collect();
        close(&what("grad"), &summed, &numbers(&case["grad_logratios"])?)?;
        if name == "kto" {
            close(&what("kl"), &[metric(&outcome, "kl")?], &numbers(&case["kl"])?)?;
        }
        let rewards = numbers(&case["rewards"])?;
        for (kind, wanted) in [("rewards/chosen", true), ("rewards/rejected", false)] {
            let own = || rewards.iter().zip(&stats.labels).filter(|of| *of.1 == wanted).map(|of| of.0);
            if own().count() > 0 {
                let mean = own().sum::<f64>() / own().count() as f64;
                close(&what(kind), &[metric(&outcome, kind)?], &[mean])?;
            }
        }
        tally.checked += 1;
    }
    let bco = build("bco", &Params::from_iter([("beta", 1.0)]))?;
    let mut state = bco.initial_state();
    for (i, step) in file["bco_steps"].as_array().ok_or("no bco_steps")?.iter().enumerate() {
        let (chosen, rejected) = (numbers(&step["chosen_rewards"])?, numbers(&step["rejected_rewards"])?);
        let labels = [vec![true; chosen.len()], vec![false; rejected.len()]].concat();
        let stats = Stats { state, ..labelled([chosen, rejected].concat(), labels) };
        let totals = Totals::of(&stats);
        let outcome = bco.evaluate(&stats, &totals);
        let what = |field: &str| format!("bco step {i}, {field}");
        close(&what("delta"), &[metric(&outcome, "delta")?], &numbers(&step["delta"])?)?;
        close(&what("loss"), &[outcome.loss], &numbers(&step["loss"])?)?;
        let summed: Vec<f64> = outcome.grads.logps.iter().map(|g| g * totals.sequences).collect();
        let expected = [numbers(&step["grad_chosen_rewards"])?, numbers(&step["grad_rejected_rewards"])?].concat();
        close(&what("grad"), &summed, &expected)?;
        state = outcome.state;
        tally.checked += 1;
        tally.skip("BCO's weights by prompt (UDM) need a classifier of prompts, which is left out".into());
    }
    for _ in file["kl_rotation"].as_array().into_iter().flatten() {
        tally.skip("the rotation of completions is data's, and tested there".into());
    }
    Ok(())
}

/// Bradley-Terry on scores; gradients are of the mean. Then a linear reward model at its optimum.
pub fn reward_model(file: &Value, tally: &mut Tally) -> Result<(), Failed> {
    let scored = |chosen: Vec<f64>, rejected: Vec<f64>| {
        let scores = [chosen, rejected].concat();
        let stats = paired(vec![0.0; scores.len()], vec![], vec![1.0; scores.len()]);
        Stats { margins: vec![0.0; stats.pairs.len()], scores, ref_logps: vec![], ..stats }
    };
    for (i, case) in cases(file)?.iter().enumerate() {
        let mut stats = scored(numbers(&case["rewards_chosen"])?, numbers(&case["rewards_rejected"])?);
        if !case["margin"].is_null() {
            stats.margins = numbers(&case["margin"])?;
        }
        let key = "center_rewards_coefficient";
        let params = Params::from_iter([(key, case[key].as_f64().ok_or("no coefficient")?)]);
        let outcome = build("reward", &params)?.evaluate(&stats, &Totals::of(&stats));
        let what = |field: &str| format!("case {i}, {field}");
        close(&what("loss"), &[outcome.loss], &numbers(&case["loss"])?)?;
        let expected = [numbers(&case["grad_rewards_chosen"])?, numbers(&case["grad_rewards_rejected"])?].concat();
        close(&what("grad"), &outcome.grads.scores, &expected)?;
        close(&what("accuracy"), &[metric(&outcome, "accuracy")?], &numbers(&case["accuracy"])?)?;
        close(&what("margin"), &[metric(&outcome, "margin")?], &numbers(&case["mean_margin"])?)?;
        tally.checked += 1;
    }
    let fit = &file["linear_bt_fit"];
    let features = rows(&fit["difference_features_chosen_minus_rejected"])?;
    let (weights, l2) = (numbers(&fit["w_opt"])?, fit["l2"].as_f64().ok_or("no l2")?);
    let score = |x: &Vec<f64>| x.iter().zip(&weights).map(|(x, w)| x * w).sum();
    let stats = scored(features.iter().map(score).collect(), vec![0.0; features.len()]);
    let outcome = build("reward", &Params::default())?.evaluate(&stats, &Totals::of(&stats));
    for (j, weight) in weights.iter().enumerate() {
        let slope: f64 = features.iter().zip(&outcome.grads.scores).map(|(x, grad)| x[j] * grad).sum();
        if (slope + l2 * weight).abs() > 1e-12 {
            return Err(format!("linear fit: slope {} by weight {j} at the optimum", slope + l2 * weight).into());
        }
    }
    tally.checked += 1;
    Ok(())
}

/// From logits to the loss and back: d loss / d logits = (onehot - softmax) d loss / d logp.
pub fn sft(file: &Value, tally: &mut Tally) -> Result<(), Failed> {
    let labels = rows(&file["labels"])?;
    let logits = file["logits"].as_array().ok_or("logits are not an array")?;
    let logits = logits.iter().map(rows).collect::<Result<Vec<_>, _>>()?;
    for (i, case) in cases(file)?.iter().enumerate() {
        let name = if text(case, "loss_type")? == "nll" { "sft" } else { text(case, "loss_type")? };
        // Position t predicts token t + 1; a negative label means that it is not supervised.
        let mut stats = Stats { offsets: vec![0], ..Stats::default() };
        for (row, labels) in logits.iter().zip(&labels) {
            let targets = row.iter().zip(&labels[1..]).filter(|(_, label)| **label >= 0.0);
            let logps: Vec<f64> = targets.map(|(logits, &label)| log_softmax(logits)[label as usize]).collect();
            stats.logps.push(logps.iter().sum());
            stats.lens.push(logps.len() as f64);
            stats.token_logps.extend(logps);
            stats.offsets.push(stats.token_logps.len());
        }
        let outcome = build(name, &Params::default())?.evaluate(&stats, &Totals::of(&stats));
        close(&format!("case {i}, loss"), &[outcome.loss], &numbers(&case["loss"])?)?;

        let at = |of: &[f64], i: usize| of.get(i).copied().unwrap_or(0.0);
        let mut target = 0;
        for (s, expected) in case["grad_logits"].as_array().ok_or("no grad_logits")?.iter().enumerate() {
            for (t, expected) in rows(expected)?.iter().enumerate() {
                let label = labels[s].get(t + 1).copied().filter(|label| *label >= 0.0);
                let by_logp = at(&outcome.grads.logps, s) + at(&outcome.grads.token_logps, target);
                let by_logit = |(v, logp): (usize, f64)| match label {
                    Some(label) => (f64::from(v == label as usize) - logp.exp()) * by_logp,
                    None => 0.0,
                };
                let grad: Vec<f64> = log_softmax(&logits[s][t]).into_iter().enumerate().map(by_logit).collect();
                close(&format!("case {i}, grad_logits {s} {t}"), &grad, expected)?;
                target += usize::from(label.is_some());
            }
        }
        tally.checked += 1;
    }
    Ok(())
}

// ---- helpers --------------------------------------------------------------------------------------------------

/// The objective of a loss type of TRL or of a golden file, and its parameters by our names.
fn registered<'a>(loss_type: &'a str, given: &Value) -> Result<(&'a str, Params), Failed> {
    let name = if loss_type == "cdpo" { "sigmoid" } else { loss_type };
    let mut params = Params::default();
    for (key, value) in given.as_object().ok_or("params are not an object")? {
        match (key.as_str(), value) {
            // Ours: with constants, clamped at 80; the coefficient only where it is used.
            ("f_constants" | "delta", _) => {}
            ("clamp_max", value) if value.as_f64() == Some(80.0) => {}
            ("f_alpha_divergence_coef", _) if given["f_divergence_type"] != "alpha_divergence" => {}
            ("alpha", Value::Number(number)) => params.set("rdpo_alpha", number.as_f64().ok_or("not a number")?),
            (key, Value::Number(number)) => params.set(key, number.as_f64().ok_or("not a number")?),
            (key, Value::String(choice)) => params.set(key, choice.as_str()),
            (key, Value::Bool(on)) => params.set(key, *on),
            (key, value) => return Err(format!("{loss_type}: {key} is {value}").into()),
        }
    }
    Ok((name, params))
}

/// The first half is chosen, the second rejected.
fn paired(logps: Vec<f64>, reference: Vec<f64>, lens: Vec<f64>) -> Stats {
    let pairs = logps.len() / 2;
    let pairs = (0..pairs).map(|i| (i, pairs + i)).collect();
    Stats { logps, ref_logps: vec![reference], lens, pairs, ..Stats::default() }
}
