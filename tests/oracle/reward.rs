//! Reward models of others: the folders that `tests/data/reward/make.py` made, with the scores that transformers gives.

use std::fs;
use std::path::{Path, PathBuf};

use cuvee::data::{Example, Packing, Sequence, Tokenizer};
use cuvee::device::Cpu;
use cuvee::model::{Checkpoint, Init};
use cuvee::references::Scorer;
use libtest_mimic::{Failed, Trial};
use serde_json::Value;

pub fn trials(root: &Path) -> Vec<Trial> {
    let dir = root.join("tests/data/reward");
    let Ok(entries) = fs::read_dir(&dir) else {
        return vec![Trial::test("reward", move || Err(format!("{} is not a folder", dir.display()).into()))];
    };
    let mut folders: Vec<PathBuf> =
        entries.flatten().map(|entry| entry.path()).filter(|path| path.join("scores.json").exists()).collect();
    folders.sort();
    let tokenizer = root.join("assets/review-llama-656k");
    let trial = |folder: PathBuf| {
        let (name, tokenizer) =
            (folder.file_name().unwrap_or_default().to_string_lossy().into_owned(), tokenizer.clone());
        Trial::test(format!("reward::{name}"), move || check(&folder, &tokenizer))
    };
    folders.into_iter().map(trial).collect()
}

/// A stored reward model names its padding token itself: whose the tokenizer is makes no difference.
fn check(folder: &Path, tokenizer: &Path) -> Result<(), Failed> {
    let rows: Vec<Value> = serde_json::from_slice(&fs::read(folder.join("scores.json"))?)?;
    let example = |(row, value): (usize, &Value)| {
        let ids: Vec<u32> = serde_json::from_value(value["ids"].clone())?;
        Ok(Example { row, sequences: vec![Sequence::new(ids, 1)], ..Example::default() })
    };
    let examples: Vec<Example> = rows.iter().enumerate().map(example).collect::<Result<_, Failed>>()?;
    let (checkpoint, device) = (Checkpoint::open_reward(folder)?, Cpu::new(2)?);
    let read = checkpoint.reads(&Tokenizer::load(tokenizer)?);
    let packing = Packing { read, ..Packing::new(20) };
    let largest = packing.largest(&packing.extents(&examples));
    let mut scorer = Scorer::new(&device, &checkpoint, Init::Checkpoint, &largest)?;
    let scores = scorer.score(&examples.iter().collect::<Vec<_>>(), packing, &mut |_| {})?;
    if scores.len() < 5 {
        return Err(format!("{} sequences", scores.len()).into());
    }
    for (row, (ours, theirs)) in scores.iter().zip(&rows).enumerate() {
        let (ours, theirs) = (f64::from(ours[0][0]), theirs["score"].as_f64().ok_or("a row has no score")?);
        if (ours - theirs).abs() > 1e-4 || ours.is_nan() {
            return Err(format!("row {row}: score {ours}, expected {theirs}").into());
        }
    }
    Ok(())
}
