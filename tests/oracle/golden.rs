//! Golden values: numbers that someone else's code agrees with. One named test per file, from `tests/data/golden`
//! and, when CUVEE_GOLDEN_DIR is set, from there too: same names, other numbers. A file that nothing reads yet is
//! ignored with the reason. Within a file every case is either checked or counted as skipped, by reason.

mod losses;
mod merge;
mod metrics;
mod optimizers;
mod references;
mod rollouts;
mod scaling;
mod soups;

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use cuvee::objectives::{Choice, Objective, Outcome, Params};
use libtest_mimic::{Completion, Failed, Trial};
use serde_json::Value;

const TOLERANCE: f64 = 1e-10;
/// Of differences between numbers of size 1 to 10, such as sigma(z) - 1, which the makers of the files did not avoid.
const ROUNDING: f64 = 4e-15;

type Check = fn(&Value, &mut Tally) -> Result<(), Failed>;

/// Every known file: how to check it, or what is missing.
const FILES: &[(&str, Result<Check, &str>)] = &[
    ("childtuning", Ok(optimizers::childtuning)),
    ("extra", Ok(rollouts::extra)),
    ("grao", Ok(rollouts::grao)),
    ("grpo", Ok(rollouts::grpo)),
    ("kl_estimators", Ok(references::kl_estimators)),
    ("kto_bco", Ok(losses::kto_bco)),
    ("merge", Ok(merge::merge)),
    ("metrics", Ok(metrics::metrics)),
    ("mrpo", Ok(references::mrpo)),
    ("mrpo_token_level", Ok(references::mrpo_token_level)),
    ("multi_ref_theory", Ok(references::multi_ref_theory)),
    ("ondare", Ok(optimizers::online_merging)),
    ("onties", Ok(optimizers::online_merging)),
    ("preference_losses", Ok(losses::preference_losses)),
    ("reference_free", Ok(losses::reference_free)),
    ("reward_model", Ok(losses::reward_model)),
    ("rl", Ok(rollouts::rl)),
    ("scaling_law", Ok(scaling::scaling_law)),
    ("sft", Ok(losses::sft)),
    ("soups", Ok(soups::soups)),
    ("stepk", Ok(optimizers::online_merging)),
    ("token_level", Ok(losses::token_level)),
    ("toy_overopt", Ok(scaling::toy_overopt)),
    ("tree_mdp", Ok(scaling::tree_mdp)),
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

// ---- helpers --------------------------------------------------------------------------------------------------

/// One objective, with nothing around it.
fn build(name: &str, params: &Params) -> cuvee::Result<Box<dyn Objective>> {
    Choice::one(name, params.clone()).build()
}

fn log_softmax(logits: &[f64]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let log_sum = max + logits.iter().map(|x| (x - max).exp()).sum::<f64>().ln();
    logits.iter().map(|x| x - log_sum).collect()
}

fn close(what: &str, found: &[f64], expected: &[f64]) -> Result<(), Failed> {
    close_to(TOLERANCE, what, found, expected)
}

fn close_to(tolerance: f64, what: &str, found: &[f64], expected: &[f64]) -> Result<(), Failed> {
    let near = |(a, b): (&f64, &f64)| (a - b).abs() <= tolerance * a.abs().max(b.abs()) + ROUNDING;
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

fn metric(outcome: &Outcome, name: &str) -> Result<f64, Failed> {
    let found = outcome.metrics.iter().find(|metric| metric.0 == name);
    Ok(found.ok_or_else(|| format!("the metric {name} is missing"))?.1)
}
