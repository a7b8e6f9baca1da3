//! Golden values: numbers that someone else's code agrees with. One named test per file, from `tests/data/golden`
//! and, when CUVEE_GOLDEN_DIR is set, from there too: same names, other numbers. A file that nothing reads yet is
//! ignored with the reason. Within a file every case is either checked or counted as skipped, by reason.

mod references;

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use cuvee::objectives::{self, Choice, Objective, Params, Stats, Totals};
use libtest_mimic::{Completion, Failed, Trial};
use serde_json::Value;

const TOLERANCE: f64 = 1e-10;

type Check = fn(&Value, &mut Tally) -> Result<(), Failed>;

/// Every known file: how to check it, or what is missing.
const FILES: &[(&str, Result<Check, &str>)] = &[
    ("childtuning", Err("child tuning is not built yet")),
    ("extra", Err("GMPO, A*-PO, adaptive KL and XPO are not built yet")),
    ("grao", Err("GRAO is not built yet")),
    ("grpo", Err("group objectives are not built yet")),
    ("kl_estimators", Ok(references::kl_estimators)),
    ("kto_bco", Err("unpaired objectives are not built yet")),
    ("merge", Err("offline merging is not built yet")),
    ("metrics", Err("agreement metrics are not built yet")),
    ("mrpo", Ok(references::mrpo)),
    ("mrpo_token_level", Ok(references::mrpo_token_level)),
    ("multi_ref_theory", Ok(references::multi_ref_theory)),
    ("ondare", Err("online merging optimizers are not built yet")),
    ("onties", Err("online merging optimizers are not built yet")),
    ("preference_losses", Ok(preference_losses)),
    ("reference_free", Err("reference-free objectives are not built yet")),
    ("reward_model", Err("reward-model training is not built yet")),
    ("rl", Err("RLOO and PPO are not built yet")),
    ("scaling_law", Err("scaling-law fits are not built yet")),
    ("sft", Ok(sft)),
    ("soups", Err("soups are not built yet")),
    ("stepk", Err("online merging optimizers are not built yet")),
    ("token_level", Ok(token_level)),
    ("toy_overopt", Err("the over-optimisation toy is not built yet")),
    ("tree_mdp", Err("the tree MDP is not built yet")),
];

pub fn trials(root: &Path) -> Vec<Trial> {
    let mut trials: Vec<Trial> =
        FILES.iter().map(|&(stem, check)| trial("repo", stem, check, root.join("tests/data/golden"))).collect();
    match std::env::var_os("CUVEE_GOLDEN_DIR") {
        Some(dir) => trials.extend(trials_of(Path::new(&dir))),
        None => trials.push(trial("CUVEE_GOLDEN_DIR", "*", Err("CUVEE_GOLDEN_DIR is not set"), PathBuf::new())),
    }
    trials
}

/// One trial for each JSON file of a folder that this repository does not own.
fn trials_of(dir: &Path) -> Vec<Trial> {
    let files = match fs::read_dir(dir) {
        Ok(files) => files.flatten().map(|file| file.path()),
        Err(e) => {
            let message = format!("{}: {e}", dir.display());
            return vec![Trial::test("golden::CUVEE_GOLDEN_DIR", || Err(message.into()))];
        }
    };
    let json = files.filter(|path| path.extension().is_some_and(|e| e == "json"));
    let mut stems: Vec<String> = json.filter_map(|path| Some(path.file_stem()?.to_str()?.to_owned())).collect();
    stems.sort();
    let check = |stem: &str| FILES.iter().find(|file| file.0 == stem).map_or(Err("nothing reads this file"), |f| f.1);
    stems.iter().map(|stem| trial("CUVEE_GOLDEN_DIR", stem, check(stem), dir.to_path_buf())).collect()
}

fn trial(source: &str, stem: &str, check: Result<Check, &'static str>, dir: PathBuf) -> Trial {
    let (name, stem) = (format!("golden::{source}::{stem}"), stem.to_owned());
    Trial::ignorable_test(name.clone(), move || {
        let check = match check {
            Ok(check) => check,
            Err(reason) => return Ok(Completion::ignored_with(reason)),
        };
        let mut tally = Tally::default();
        check(&read(&dir, &stem)?, &mut tally)?;
        println!("{name}: {tally}");
        if tally.checked == 0 { Err("no case was checked".into()) } else { Ok(Completion::Completed) }
    })
}

/// `<stem>.json`, or `<stem>.json.gz` where the repository keeps a large file small.
fn read(dir: &Path, stem: &str) -> Result<Value, Failed> {
    let plain = dir.join(format!("{stem}.json"));
    let mut text = String::new();
    if plain.exists() {
        text = fs::read_to_string(plain)?;
    } else {
        let packed = dir.join(format!("{stem}.json.gz"));
        let file = fs::File::open(&packed).map_err(|e| format!("{}: {e}", packed.display()))?;
        flate2::read::GzDecoder::new(file).read_to_string(&mut text)?;
    }
    Ok(serde_json::from_str(&text)?)
}

#[derive(Default)]
struct Tally {
    checked: usize,
    skipped: BTreeMap<String, usize>,
}

impl Tally {
    fn skip(&mut self, reason: String) {
        *self.skipped.entry(reason).or_default() += 1;
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{} cases checked, {} skipped", self.checked, self.skipped.values().sum::<usize>())?;
        self.skipped.iter().try_for_each(|(reason, cases)| write!(f, "; {cases}: {reason}"))
    }
}

// ---- the files ------------------------------------------------------------------------------------------------

/// Losses on sequence log-probs. `grad_*` are of the sum over the batch, `loss` is the mean.
fn preference_losses(file: &Value, tally: &mut Tally) -> Result<(), Failed> {
    for (i, case) in cases(file)?.iter().enumerate() {
        let loss_type = text(case, "loss_type")?;
        let (name, params) = match registered(loss_type, &case["params"]) {
            Ok(found) => found,
            Err(reason) => {
                tally.skip(reason);
                continue;
            }
        };
        let column = |name: &str| numbers(&case[name]).map_err(|e| format!("case {i}: {name}: {e}"));
        let both = |chosen: &str, rejected: &str| Ok::<_, String>([column(chosen)?, column(rejected)?].concat());
        let stats = paired(
            both("chosen_logps", "rejected_logps")?,
            both("ref_chosen_logps", "ref_rejected_logps")?,
            both("chosen_len", "rejected_len")?,
        );
        let totals = Totals::of(&stats);
        let outcome = build(name, &params)?.evaluate(&stats, &totals);

        let what = |field: &str| format!("case {i}, {loss_type}, {field}");
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
            let found = outcome.metrics.iter().find(|(name, _)| *name == metric);
            let found = found.ok_or_else(|| what(&format!("{metric} is missing")))?.1;
            close(&what(metric), &[found], &[expected])?;
        }
        tally.checked += 1;
    }
    Ok(())
}

/// From token log-probs to the loss and back: rows 0..B are chosen, B..2B rejected.
fn token_level(file: &Value, tally: &mut Tally) -> Result<(), Failed> {
    let mask = rows(&file["completion_mask"])?;
    let lens: Vec<f64> = mask.iter().map(|row| row[1..].iter().sum()).collect();
    for (i, case) in cases(file)?.iter().enumerate() {
        let mut given = case["params"].clone();
        let options = given.as_object_mut().ok_or("params are not an object")?;
        let loss_type = options.remove("loss_type").and_then(|v| Some(v.as_str()?.to_owned())).ok_or("no loss_type")?;
        if loss_type == "sft" {
            options.remove("beta"); // TRL's DPO takes one and ignores it
        }
        let (name, params) = match registered(&loss_type, &given) {
            Ok(found) => found,
            Err(reason) => {
                tally.skip(reason);
                continue;
            }
        };
        let stats = paired(numbers(&case["seq_logps"])?, numbers(&case["ref_seq_logps"])?, lens.clone());
        let outcome = build(name, &params)?.evaluate(&stats, &Totals::of(&stats));

        let what = |field: &str| format!("case {i}, {loss_type}, {field}");
        close(&what("loss"), &[outcome.loss], &numbers(&case["loss"])?)?;
        for (s, expected) in rows(&case["grad_per_token_logps"])?.iter().enumerate() {
            let per_token: Vec<f64> = mask[s][1..].iter().map(|m| m * outcome.grads.logps[s]).collect();
            close(&what("grad_per_token_logps"), &per_token, expected)?;
        }
        tally.checked += 1;
    }
    Ok(())
}

/// From logits to the loss and back: d loss / d logits = (onehot - softmax) d loss / d logp.
fn sft(file: &Value, tally: &mut Tally) -> Result<(), Failed> {
    let labels = rows(&file["labels"])?;
    let logits = file["logits"].as_array().ok_or("logits are not an array")?;
    let logits = logits.iter().map(rows).collect::<Result<Vec<_>, _>>()?;
    for (i, case) in cases(file)?.iter().enumerate() {
        let loss_type = text(case, "loss_type")?;
        if loss_type != "nll" {
            tally.skip(format!("{loss_type} is not an objective"));
            continue;
        }
        // Position t predicts token t + 1; a negative label means that it is not supervised.
        let mut stats = Stats::default();
        for (row, labels) in logits.iter().zip(&labels) {
            let targets = || row.iter().zip(&labels[1..]).filter(|(_, label)| **label >= 0.0);
            stats.logps.push(targets().map(|(logits, &label)| log_softmax(logits)[label as usize]).sum());
            stats.lens.push(targets().count() as f64);
        }
        let outcome = build("sft", &Params::default())?.evaluate(&stats, &Totals::of(&stats));
        close(&format!("case {i}, loss"), &[outcome.loss], &numbers(&case["loss"])?)?;

        for (s, expected) in case["grad_logits"].as_array().ok_or("no grad_logits")?.iter().enumerate() {
            for (t, expected) in rows(expected)?.iter().enumerate() {
                let label = labels[s].get(t + 1).copied().filter(|label| *label >= 0.0);
                let by_logit = |(v, logp): (usize, f64)| match label {
                    Some(label) => (f64::from(v == label as usize) - logp.exp()) * outcome.grads.logps[s],
                    None => 0.0,
                };
                let grad: Vec<f64> = log_softmax(&logits[s][t]).into_iter().enumerate().map(by_logit).collect();
                close(&format!("case {i}, grad_logits {s} {t}"), &grad, expected)?;
            }
        }
        tally.checked += 1;
    }
    Ok(())
}

// ---- helpers --------------------------------------------------------------------------------------------------

/// The registered objective of a TRL loss type and its parameters, or why there is none.
fn registered<'a>(loss_type: &'a str, given: &Value) -> Result<(&'a str, Params), String> {
    let name = if loss_type == "cdpo" { "sigmoid" } else { loss_type };
    let entry = objectives::find(name).map_err(|_| format!("{loss_type} is not an objective"))?;
    let given = given.as_object().ok_or("params are not an object")?;
    if let Some(unknown) = given.keys().find(|key| entry.params.iter().all(|spec| spec.name != *key)) {
        return Err(format!("{loss_type} has no {unknown}"));
    }
    let params = given.iter().map(|(key, value)| Some((key, value.as_f64()?)));
    let params = params.collect::<Option<Params>>().ok_or("a parameter is not a number")?;
    Ok((name, params))
}

/// One objective, with nothing around it.
fn build(name: &str, params: &Params) -> cuvee::Result<Box<dyn Objective>> {
    Choice::one(name, params.clone()).build()
}

/// The first half is chosen, the second rejected.
fn paired(logps: Vec<f64>, reference: Vec<f64>, lens: Vec<f64>) -> Stats {
    let pairs = logps.len() / 2;
    let pairs = (0..pairs).map(|i| (i, pairs + i)).collect();
    Stats { logps, ref_logps: vec![reference], lens, pairs, ..Stats::default() }
}

fn log_softmax(logits: &[f64]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let log_sum = max + logits.iter().map(|x| (x - max).exp()).sum::<f64>().ln();
    logits.iter().map(|x| x - log_sum).collect()
}

fn close(what: &str, found: &[f64], expected: &[f64]) -> Result<(), Failed> {
    let near = |(a, b): (&f64, &f64)| (a - b).abs() <= TOLERANCE * a.abs().max(b.abs());
    if found.len() == expected.len() && found.iter().zip(expected).all(near) {
        return Ok(());
    }
    Err(format!("{what}: found {found:?}, expected {expected:?}").into())
}

fn cases(file: &Value) -> Result<&Vec<Value>, Failed> {
    file["cases"].as_array().ok_or_else(|| "the file has no cases".into())
}

fn text<'a>(case: &'a Value, key: &str) -> Result<&'a str, Failed> {
    case[key].as_str().ok_or_else(|| format!("a case has no {key}").into())
}

/// A number or an array of numbers.
fn numbers(value: &Value) -> Result<Vec<f64>, String> {
    let items = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
    let numbers = items.iter().map(Value::as_f64).collect::<Option<_>>();
    numbers.ok_or_else(|| format!("not numbers: {value}"))
}

fn rows(value: &Value) -> Result<Vec<Vec<f64>>, String> {
    value.as_array().ok_or("not an array")?.iter().map(numbers).collect()
}
