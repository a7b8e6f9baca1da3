//! Tasks as lm-evaluation-harness judges them: every item of `tests/data/tasks/*.json`, which
//! `benches/peers/lm_eval_tasks.py --golden` wrote, on the shipped model.

use std::fs;
use std::path::{Path, PathBuf};

use cuvee::data::Packing;
use cuvee::device::Cpu;
use cuvee::model::Checkpoint;
use cuvee::tasks::{Examiner, Outcome, Overrides, Subject, Task};
use libtest_mimic::{Failed, Trial};
use serde_json::Value;

/// Of a log-likelihood above 1 relative to it.
const TOLERANCE: f64 = 1e-4;

pub fn trials(root: &Path) -> Vec<Trial> {
    let dir = root.join("tests/data/tasks");
    let Ok(entries) = fs::read_dir(&dir) else {
        return vec![Trial::test("tasks", move || Err(format!("{} is not a folder", dir.display()).into()))];
    };
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    files.sort();
    let model = root.join("assets/review-llama-656k");
    let trial = |file: PathBuf| {
        let (name, model) = (file.file_stem().unwrap_or_default().to_string_lossy().into_owned(), model.clone());
        Trial::test(format!("tasks::{name}"), move || check(&file, &model))
    };
    files.into_iter().map(trial).collect()
}

fn check(file: &Path, model: &Path) -> Result<(), Failed> {
    let golden: Value = serde_json::from_slice(&fs::read(file)?)?;
    let (device, subject) = (Cpu::new(2)?, Subject::new(model, Checkpoint::open(model)?)?);
    let examiner = Examiner {
        device: &device,
        packing: Packing::new(2048),
        max_length: golden["max_length"].as_u64().map(|n| n as usize),
        reference: None,
        reward_model: None,
        base_model: None,
    };
    let dir = tempfile::tempdir()?;
    for (name, wanted) in golden["tasks"].as_object().ok_or("no tasks")? {
        let rows = wanted["rows"].as_array().ok_or("no rows")?;
        let mut path = dir.path().join(format!("{name}.jsonl"));
        fs::write(&path, rows.iter().map(|row| format!("{row}\n")).collect::<String>())?;
        if let Some(toml) = wanted["toml"].as_str() {
            path.set_extension("toml");
            fs::write(&path, toml)?;
        }
        let outcome =
            examiner.examine(&Task::open(name, &path, &Overrides::default())?, &subject, &mut |_, _, _| {})?;
        compare(name, &outcome, wanted)?;
    }
    Ok(())
}

fn compare(name: &str, ours: &Outcome, wanted: &Value) -> Result<(), Failed> {
    let items = wanted["items"].as_array().ok_or("no items")?;
    if items.is_empty() || ours.items != items.len() {
        return Err(format!("{name}: {} items, expected {}", ours.items, items.len()).into());
    }
    for (i, (log, item)) in ours.log.iter().zip(items).enumerate() {
        for (key, theirs) in item.as_object().ok_or("an item is no object")? {
            same(&log[key], theirs).map_err(|why| format!("{name}, item {i}, {key}: {why}"))?;
        }
    }
    for (metric, theirs) in wanted["metrics"].as_object().ok_or("no metrics")? {
        let value = ours.get(metric).ok_or_else(|| format!("{name} has no {metric}"))?.value;
        same(&value.into(), theirs).map_err(|why| format!("{name}, {metric}: {why}"))?;
    }
    Ok(())
}

fn same(ours: &Value, theirs: &Value) -> Result<(), String> {
    let fail = || Err(format!("{ours}, expected {theirs}"));
    match (ours, theirs) {
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => a.iter().zip(b).try_for_each(|(a, b)| same(a, b)),
        (Value::Number(a), Value::Number(b)) => {
            let (a, b) = (a.as_f64().unwrap_or(f64::NAN), b.as_f64().unwrap_or(f64::NAN));
            if (a - b).abs() <= TOLERANCE * b.abs().max(1.0) { Ok(()) } else { fail() }
        }
        _ if ours == theirs => Ok(()),
        _ => fail(),
    }
}
