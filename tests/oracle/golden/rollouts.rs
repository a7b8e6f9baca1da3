//! Golden values of what learns from sampled completions: advantages, and losses on them.

use cuvee::objectives::advantages::{ByGroup, Scale, generalised, optimal_value, whiten};
use cuvee::objectives::kl::adapted;
use cuvee::objectives::{Objective, Params, Stats, Totals};
use libtest_mimic::Failed;
use serde_json::Value;

use super::{Tally, build, cases, close, numbers, rows, text};

/// Tokens that count, one row after the other.
struct Ragged {
    mask: Vec<Vec<f64>>,
    offsets: Vec<usize>,
}

impl Ragged {
    fn of(mask: &Value) -> Result<Self, Failed> {
        let mask = rows(mask)?;
        let lens = mask.iter().map(|row| row.iter().filter(|m| **m > 0.0).count());
        let offsets = std::iter::once(0).chain(lens.scan(0, |end, len| {
            *end += len;
            Some(*end)
        }));
        Ok(Self { offsets: offsets.collect(), mask })
    }

    fn tokens(&self, padded: &Value) -> Result<Vec<f64>, Failed> {
        let padded = rows(padded)?;
        let kept =
            padded.iter().zip(&self.mask).flat_map(|(row, mask)| row.iter().zip(mask).filter(|(_, m)| **m > 0.0));
        Ok(kept.map(|(x, _)| *x).collect())
    }

    fn lens(&self) -> Vec<f64> {
        self.offsets.windows(2).map(|ends| (ends[1] - ends[0]) as f64).collect()
    }

    /// Sums over each row.
    fn sums(&self, tokens: &[f64]) -> Vec<f64> {
        self.offsets.windows(2).map(|ends| tokens[ends[0]..ends[1]].iter().sum()).collect()
    }
}

fn list<'a>(value: &'a Value, what: &str) -> Result<&'a Vec<Value>, Failed> {
    value.as_array().ok_or_else(|| format!("{what} is not an array").into())
}

/// The derivative by each token, that by its completion's sum included.
fn by_token(outcome: &cuvee::objectives::Outcome, offsets: &[usize]) -> Vec<f64> {
    let tokens = *offsets.last().expect("there is an end");
    let at = |of: &[f64], i: usize| of.get(i).copied().unwrap_or(0.0);
    let sequence = |t: usize| offsets.iter().rposition(|start| *start <= t).expect("the first is 0");
    let grads = &outcome.grads;
    (0..tokens).map(|t| at(&grads.token_logps, t) + at(&grads.logps, sequence(t))).collect()
}

pub fn grpo(file: &Value, tally: &mut Tally) -> Result<(), Failed> {
    for (i, case) in list(&file["advantage_cases"], "advantage_cases")?.iter().enumerate() {
        let scale = match text(case, "scale_rewards")? {
            "batch" => Scale::Batch,
            "none" => Scale::None,
            _ => Scale::Group,
        };
        let normalize_first = text(case, "multi_objective_aggregation")? == "normalize_then_sum";
        let functions: Vec<Vec<f64>> = list(&case["rewards_per_func"], "rewards")?.iter().map(with_nan).collect();
        let count = functions.first().map_or(0, Vec::len);
        let rewards: Vec<Vec<f64>> = (0..count).map(|f| functions.iter().map(|row| row[f]).collect()).collect();
        let group = case["num_generations"].as_u64().ok_or("no num_generations")? as usize;
        let groups: Vec<_> = (0..functions.len() / group).map(|g| g * group..(g + 1) * group).collect();
        let weights = numbers(&case["reward_weights"])?;
        let found = ByGroup { scale, normalize_first }.advantages(&rewards, &weights, &groups);
        close(&format!("advantages {i}, {}", case["input_set"]), &found, &numbers(&case["advantages"])?)?;
        tally.checked += 1;
    }
    let shared = &file["shared"];
    for (i, case) in cases(file)?.iter().enumerate() {
        let old = match text(case, "old_name")? {
            "on_policy" => &shared["per_token_logps"],
            _ => &shared["old_per_token_logps"],
        };
        let advantages = &shared[format!("advantages_{}", text(case, "advantages_name")?)];
        surrogate(&format!("case {i}"), case, shared, (&shared["per_token_logps"], old), advantages, tally)?;
    }
    for (i, case) in list(&file["extreme_cases"], "extreme_cases")?.iter().enumerate() {
        surrogate(&format!("extreme case {i}"), case, case, (&case["lp"], &case["old"]), &case["advantages"], tally)?;
    }
    Ok(())
}

/// Numbers of which some are "nan".
fn with_nan(row: &Value) -> Vec<f64> {
    row.as_array().into_iter().flatten().map(|x| x.as_f64().unwrap_or(f64::NAN)).collect()
}

/// One loss of the family. `shared` has the mask and what an option may read besides.
fn surrogate(
    what: &str,
    case: &Value,
    shared: &Value,
    (logps, old): (&Value, &Value),
    advantages: &Value,
    tally: &mut Tally,
) -> Result<(), Failed> {
    let given = &case["params"];
    let (name, level) = (text(given, "type")?, text(given, "level")?);
    let mut params = Params::default();
    for (theirs, ours) in [
        ("eps", "epsilon"),
        ("beta", "beta"),
        ("delta", "delta"),
        ("opsm", "off_policy_mask_threshold"),
        ("top_entropy", "top_entropy_quantile"),
        ("t_pos", "sapo_temperature_pos"),
        ("t_neg", "sapo_temperature_neg"),
        ("k_pos", "vespo_k_pos"),
        ("l_pos", "vespo_lambda_pos"),
        ("k_neg", "vespo_k_neg"),
        ("l_neg", "vespo_lambda_neg"),
    ] {
        let clips = !["cispo", "sapo", "vespo"].contains(&name);
        if let Some(value) = given[theirs].as_f64().filter(|_| ours != "epsilon" || clips) {
            params.set(ours, value);
        }
    }
    match (name, given["eps_high"].as_f64()) {
        ("cispo", cap) => params.set("ratio_cap", cap.ok_or("cispo without a cap")?),
        ("sapo" | "vespo", _) => {}
        (_, high) => params.set("epsilon_high", high.unwrap_or(params["epsilon"])),
    }
    if given["kl_bias_corr"] == true {
        params.set("use_bias_correction_kl", true);
    }
    match (name, level) {
        ("luspo", "token") => params.set("ratio_by_token", true),
        ("luspo", _) => {}
        _ => params.set("importance_sampling_level", level),
    }
    let ragged = Ragged::of(&shared["mask"])?;
    let objective = build(name, &params)?;
    let needs = objective.needs();
    let optional = |needed: bool, of: &Value| if needed { ragged.tokens(of) } else { Ok(Vec::new()) };
    let stats = Stats {
        lens: ragged.lens(),
        longest: given["max_completion_length"].as_f64().ok_or("no max_completion_length")?,
        offsets: ragged.offsets.clone(),
        token_logps: ragged.tokens(logps)?,
        old_token_logps: ragged.tokens(old)?,
        ref_token_logps: match needs.ref_token_logps {
            true => vec![ragged.tokens(&shared["ref_per_token_logps"])?],
            false => vec![],
        },
        sampled_token_logps: optional(needs.sampled_token_logps, &shared["sampling_per_token_logps"])?,
        entropy: optional(needs.entropy, &shared["entropies"])?,
        advantages: numbers(advantages)?,
        ..Stats::default()
    };
    let mut totals = Totals::of(&stats);
    if ["dapo", "cispo", "vespo"].contains(&name) {
        totals.completion_tokens = given["num_items"].as_f64().ok_or("no num_items")?;
    }
    let outcome = objective.evaluate(&stats, &totals);
    let what = |field: &str| format!("{what}, {given}, {field}");
    close(&what("loss"), &[outcome.loss], &numbers(&case["loss"])?)?;
    let expected = ragged.tokens(&case["grad_per_token_logps"])?;
    close(&what("gradient"), &by_token(&outcome, &ragged.offsets), &expected)?;
    tally.checked += 1;
    Ok(())
}

pub fn rl(file: &Value, tally: &mut Tally) -> Result<(), Failed> {
    rloo(&file["rloo"], tally)?;
    ppo(&file["ppo"], tally)?;
    let value = &file["astar_po"];
    let beta = value["beta1"].as_f64().ok_or("no beta1")?;
    let found = optimal_value(&numbers(&value["rewards_ref_samples"])?, beta);
    close("V*", &[found], &numbers(&value["V_star"])?)?;
    tally.checked += 1;
    Ok(())
}

fn rloo(file: &Value, tally: &mut Tally) -> Result<(), Failed> {
    let ragged = Ragged::of(&file["mask"])?;
    let size = file["num_generations"].as_u64().ok_or("no num_generations")? as usize;
    for (i, case) in cases(file)?.iter().enumerate() {
        let what = |field: &str| format!("rloo {i}: {field}");
        let mut params = Params::default();
        ["beta", "epsilon"].iter().for_each(|name| params.set(*name, case[name].as_f64().expect("a number")));
        if let Some(range) = case["reward_clip_range"].as_array() {
            params.set("reward_clip", range[1].as_f64().ok_or("no bound")?);
        }
        if case["normalize_advantages"] == true {
            params.set("normalize_advantages", true);
        }
        let objective = build("rloo", &params)?;
        let mut stats = Stats {
            lens: ragged.lens(),
            offsets: ragged.offsets.clone(),
            groups: (0..ragged.mask.len() / size).map(|g| g * size..(g + 1) * size).collect(),
            rewards: vec![numbers(&file["rewards"])?],
            reward_weights: vec![1.0],
            token_logps: ragged.tokens(&file["lp"])?,
            old_token_logps: ragged.tokens(&file["old"])?,
            ref_token_logps: vec![ragged.tokens(&file["ref"])?],
            ..Stats::default()
        };
        stats.advantages = objective.credit(&stats).advantages;
        close(&what("advantages"), &stats.advantages, &numbers(&case["advantages"])?)?;
        let outcome = objective.evaluate(&stats, &Totals::of(&stats));
        close(&what("loss"), &[outcome.loss], &numbers(&case["loss"])?)?;
        let expected = ragged.tokens(&case["grad_per_token_logps"])?;
        close(&what("gradient"), &by_token(&outcome, &ragged.offsets), &expected)?;
        tally.checked += 1;
    }
    Ok(())
}

/// TRL has one value more than a completion has tokens, where there is room, and puts the reward there. So rewards and advantages are
/// checked over `longer`, the policy's loss over the tokens, the values' over `longer` again.
fn ppo(file: &Value, tally: &mut Tally) -> Result<(), Failed> {
    let width = file["T"].as_u64().ok_or("no T")? as usize;
    let lens: Vec<usize> = numbers(&file["response_lengths"])?.iter().map(|len| *len as usize).collect();
    let mask = |more: usize| -> Value {
        let row = |len: &usize| (0..width).map(|t| f64::from(u8::from(t < len + more))).collect::<Vec<_>>();
        lens.iter().map(row).collect::<Vec<_>>().into()
    };
    let (tokens, longer) = (Ragged::of(&mask(0))?, Ragged::of(&mask(1))?);
    // What is no token has the same log-prob everywhere.
    let padded = |of: &Value| -> Result<Vec<f64>, Failed> {
        let rows = rows(of)?;
        let one = |(row, len): (&Vec<f64>, &usize)| {
            let (len, end) = (*len, (len + 1).min(width));
            (0..end).map(|t| if t < len { row[t] } else { 1.0 }).collect::<Vec<_>>()
        };
        Ok(rows.iter().zip(&lens).flat_map(one).collect())
    };
    for (i, case) in cases(file)?.iter().enumerate() {
        let what = |field: &str| format!("ppo {i}: {field}");
        let number = |name: &str| case[name].as_f64().ok_or_else(|| Failed::from(format!("no {name}")));
        let mut params = Params::from_iter([
            ("beta", number("kl_coef")?),
            ("epsilon", number("cliprange")?),
            ("gamma", number("gamma")?),
            ("gae_lambda", number("lam")?),
            ("value_clip", number("cliprange_value")?),
            ("value_coef", number("vf_coef")?),
        ]);
        params.set("reward_kl", text(case, "kl_estimator")?);
        if case["whiten_rewards"] == true {
            params.set("whiten_rewards", true);
        }
        let objective = build("ppo", &params)?;
        let values = longer.tokens(&file["values"])?;
        let stats = Stats {
            lens: longer.lens(),
            offsets: longer.offsets.clone(),
            groups: (0..lens.len()).map(|s| s..s + 1).collect(),
            rewards: vec![numbers(&file["scores"])?],
            reward_weights: vec![1.0],
            old_token_logps: padded(&file["logprobs"])?,
            ref_token_logps: vec![padded(&file["ref_logprobs"])?],
            values: values.clone(),
            ..Stats::default()
        };
        let credit = objective.credit(&stats);
        close(&what("returns"), &credit.returns, &longer.tokens(&case["returns"])?)?;
        for (s, ends) in longer.offsets.windows(2).enumerate() {
            let rewards = &rows(&case["rewards"])?[s][..ends[1] - ends[0]];
            let found = generalised(rewards, &values[ends[0]..ends[1]], params["gamma"], params["gae_lambda"]);
            close(&what("raw advantages"), &found, &rows(&case["advantages_raw"])?[s][..found.len()])?;
        }
        let mut advantages = tokens.tokens(&case["advantages_raw"])?;
        whiten(&mut advantages, false);
        close(&what("advantages"), &advantages, &tokens.tokens(&case["advantages"])?)?;
        ppo_losses(&what, file, case, objective.as_ref(), (&tokens, &longer))?;
        tally.checked += 1;
    }
    Ok(())
}

fn ppo_losses(
    what: &dyn Fn(&str) -> String,
    file: &Value,
    case: &Value,
    objective: &dyn Objective,
    (tokens, longer): (&Ragged, &Ragged),
) -> Result<(), Failed> {
    let on = |ragged: &Ragged, advantages: Vec<f64>| -> Result<_, Failed> {
        let stats = Stats {
            lens: ragged.lens(),
            offsets: ragged.offsets.clone(),
            token_logps: ragged.tokens(&file["new_logprobs"])?,
            old_token_logps: ragged.tokens(&file["logprobs"])?,
            token_advantages: advantages,
            values: ragged.tokens(&file["vpred"])?,
            old_values: ragged.tokens(&file["values"])?,
            returns: ragged.tokens(&case["returns"])?,
            ..Stats::default()
        };
        let outcome = objective.evaluate(&stats, &Totals::of(&stats));
        Ok(outcome)
    };
    let policy = on(tokens, tokens.tokens(&case["advantages"])?)?;
    close(&what("policy loss"), &[super::metric(&policy, "loss/policy")?], &numbers(&case["pg_loss"])?)?;
    close(&what("gradient"), &policy.grads.token_logps, &tokens.tokens(&case["grad_new_logprobs"])?)?;
    let values = on(longer, vec![0.0; longer.offsets[longer.offsets.len() - 1]])?;
    close(&what("value loss"), &[super::metric(&values, "loss/value")?], &numbers(&case["vf_loss"])?)?;
    close(&what("gradient by values"), &values.grads.values, &longer.tokens(&case["grad_vpred"])?)
}

pub fn grao(file: &Value, tally: &mut Tally) -> Result<(), Failed> {
    let samples = Ragged::of(&file["sample_mask"])?;
    let answer_mask = Value::from(vec![file["reference_mask"].clone()]);
    let answer = Ragged::of(&answer_mask)?;
    let tokens = samples.tokens(&file["sample_token_logps"])?;
    let answer_tokens = answer.tokens(&vec![file["reference_token_logps"].clone()].into())?;
    let group = samples.mask.len();
    for (i, case) in cases(file)?.iter().enumerate() {
        let what = |field: &str| format!("grao {i}, {}: {field}", case["params"]);
        let given = |name: &str| case["params"][name].as_f64().ok_or_else(|| Failed::from(format!("no {name}")));
        let mut params = Params::default();
        params.set("imitation_weight", given("beta")?);
        params.set("alignment_weight", given("lambda")?);
        if case["params"]["reference_in_group"] == false {
            params.set("group_without_answer", true);
        }
        let objective = build("grao", &params)?;
        let rewards = [numbers(&case["rewards_samples"])?, numbers(&case["reward_reference"])?].concat();
        let mut stats = Stats {
            logps: [samples.sums(&tokens), answer.sums(&answer_tokens)].concat(),
            lens: [samples.lens(), answer.lens()].concat(),
            groups: std::iter::once(0..group).collect(),
            answers: vec![group],
            rewards: vec![rewards],
            reward_weights: vec![1.0],
            ..Stats::default()
        };
        stats.advantages = objective.credit(&stats).advantages;
        let expected = [numbers(&case["A_o"])?, numbers(&case["A_y"])?].concat();
        close(&what("advantages"), &stats.advantages, &expected)?;
        let outcome = objective.evaluate(&stats, &Totals::of(&stats));
        close(&what("loss"), &[outcome.loss], &numbers(&case["loss"])?)?;
        let parts = ["exploration", "imitation", "alignment"].map(|name| format!("objective/{name}"));
        for (part, expected) in parts.iter().zip(["J_exploration", "J_imitation", "J_regularizer"]) {
            close(&what(part), &[super::metric(&outcome, part)?], &numbers(&case[expected])?)?;
        }
        let by_sample = by_token(&outcome, &samples.offsets);
        close(&what("gradient"), &by_sample, &samples.tokens(&case["grad_sample_token_logps"])?)?;
        let expected = answer.tokens(&vec![case["grad_reference_token_logps"].clone()].into())?;
        let found = vec![outcome.grads.logps[group]; expected.len()];
        close(&what("gradient of the answer"), &found, &expected)?;
        tally.checked += 1;
    }
    Ok(())
}

pub fn extra(file: &Value, tally: &mut Tally) -> Result<(), Failed> {
    let gmpo = &file["gmpo"];
    let ragged = Ragged::of(&gmpo["mask"])?;
    for (i, case) in cases(gmpo)?.iter().enumerate() {
        let given = |name: &str| case["params"][name].as_f64().ok_or_else(|| Failed::from(format!("no {name}")));
        let params = Params::from_iter([
            ("epsilon", given("eps_low")?),
            ("epsilon_high", given("eps_high")?),
            ("beta", given("beta")?),
        ]);
        let old = match text(case, "old_name")? {
            "on_policy" => &gmpo["per_token_logps"],
            _ => &gmpo["old_per_token_logps"],
        };
        let stats = Stats {
            lens: ragged.lens(),
            offsets: ragged.offsets.clone(),
            token_logps: ragged.tokens(&gmpo["per_token_logps"])?,
            old_token_logps: ragged.tokens(old)?,
            ref_token_logps: vec![ragged.tokens(&gmpo["ref_per_token_logps"])?],
            advantages: numbers(&gmpo["advantages"])?,
            ..Stats::default()
        };
        let outcome = build("gmpo", &params)?.evaluate(&stats, &Totals::of(&stats));
        close(&format!("gmpo {i}: loss"), &[outcome.loss], &numbers(&case["loss"])?)?;
        let expected = ragged.tokens(&case["grad_per_token_logps"])?;
        close(&format!("gmpo {i}: gradient"), &outcome.grads.token_logps, &expected)?;
        tally.checked += 1;
    }
    for (i, step) in list(&file["adaptive_kl"]["steps"], "steps")?.iter().enumerate() {
        let number = |name: &str| step[name].as_f64().ok_or_else(|| Failed::from(format!("no {name}")));
        let found =
            adapted(number("coef")?, number("mean_kl")?, number("target")?, number("n_steps")?, number("horizon")?);
        close(&format!("adaptive KL {i}"), &[found], &numbers(&step["new_coef"])?)?;
        tally.checked += 1;
    }
    a_star_po(&file["a2po"], tally)?;
    xpo(&file["xpo"], tally)
}

fn a_star_po(file: &Value, tally: &mut Tally) -> Result<(), Failed> {
    let (rewards, values) = (numbers(&file["rewards"])?, numbers(&file["v_star"])?);
    for (i, case) in cases(file)?.iter().enumerate() {
        let params = Params::from_iter([("beta", case["beta2"].as_f64().ok_or("no beta2")?)]);
        let objective = build("a_star_po", &params)?;
        let mut stats = Stats {
            logps: numbers(&file["policy_logps"])?,
            lens: vec![1.0; rewards.len()],
            ref_logps: vec![numbers(&file["ref_logps"])?],
            groups: (0..rewards.len()).map(|s| s..s + 1).collect(),
            rewards: vec![rewards.clone()],
            reward_weights: vec![1.0],
            // One completion of the reference alone is worth V* itself.
            prior_rewards: values.iter().map(|value| vec![*value]).collect(),
            ..Stats::default()
        };
        stats.advantages = objective.credit(&stats).advantages;
        let outcome = objective.evaluate(&stats, &Totals::of(&stats));
        close(&format!("A*-PO {i}: loss"), &[outcome.loss], &numbers(&case["loss"])?)?;
        close(&format!("A*-PO {i}: gradient"), &outcome.grads.logps, &numbers(&case["grad_policy_logps"])?)?;
        tally.checked += 1;
    }
    Ok(())
}

/// The reference's completions are there beside those of the pairs.
fn xpo(file: &Value, tally: &mut Tally) -> Result<(), Failed> {
    let number = |name: &str| file[name].as_f64().ok_or_else(|| Failed::from(format!("no {name}")));
    let [chosen, rejected, explored] =
        ["chosen", "rejected", "policy_logps_on_reference_samples"].map(|name| numbers(&file[name]));
    let (chosen, rejected, explored) = (chosen?, rejected?, explored?);
    let pairs = chosen.len();
    let references = [numbers(&file["ref_chosen"])?, numbers(&file["ref_rejected"])?, vec![0.0; pairs]].concat();
    let stats = Stats {
        logps: [chosen, rejected, explored].concat(),
        ref_logps: vec![references],
        lens: vec![1.0; 3 * pairs],
        pairs: (0..pairs).map(|p| (p, pairs + p)).collect(),
        prior: (2 * pairs..3 * pairs).collect(),
        ..Stats::default()
    };
    let params = Params::from_iter([("beta", number("beta")?), ("xpo_alpha", number("alpha")?)]);
    let outcome = build("xpo", &params)?.evaluate(&stats, &Totals::of(&stats));
    close("XPO: loss", &[outcome.loss], &[number("loss")?])?;
    tally.checked += 1;
    Ok(())
}
