//! `cuvee logps`

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::args::LogpsArgs;
use crate::checkpoint::atomic::write_file_with;
use crate::data::{Dataset, Example, Form, Packing, Tokenizer};
use crate::device::Cpu;
use crate::error::{At, Result};
use crate::model::{Checkpoint, Init};
use crate::progress::{Progress, say};
use crate::references::Scorer;
use crate::train::check_vocabulary;

pub fn run(args: &LogpsArgs) -> Result<()> {
    // Opened before the work: a path that cannot be written should not cost an hour.
    write_file_with(&args.out, |out| {
        let lines = lines(args)?;
        lines.iter().try_for_each(|line| writeln!(out, "{line}")).at(&args.out)
    })
}

/// One line for each row, in order.
fn lines(args: &LogpsArgs) -> Result<Vec<Value>> {
    let device = super::device(&args.engine)?;
    let checkpoint = Checkpoint::open(&args.model)?;
    let tokenizer = Tokenizer::load(&args.model)?;
    let encode = super::encode(args.limits.max_length, args.limits.on_overflow);
    let dataset = Dataset::load(&args.dataset, &tokenizer, &encode)?;
    dataset.report().iter().for_each(say);
    let logps = match dataset.examples.is_empty() {
        true => Vec::new(),
        false => score(&device, &checkpoint, &dataset, super::packing(&args.batching))?,
    };
    let mut lines: BTreeMap<usize, Value> =
        dataset.skipped.iter().map(|(row, skip)| (*row, json!({"row": row, "skipped": skip.to_string()}))).collect();
    for (example, sequences) in dataset.examples.iter().zip(&logps) {
        let sum = |s: usize| sequences[s].iter().map(|x| f64::from(*x)).sum::<f64>();
        let line = match dataset.form {
            Form::Pairs => json!({
                "row": example.row,
                "logps_chosen": sum(0),
                "logps_rejected": sum(1),
                "tokens_chosen": sequences[0].len(),
                "tokens_rejected": sequences[1].len(),
            }),
            Form::Completions | Form::Text => {
                json!({"row": example.row, "logps": sum(0), "tokens": sequences[0].len()})
            }
        };
        lines.insert(example.row, line);
    }
    Ok(lines.into_values().collect())
}

/// `[examples][sequences][scored tokens]`, with a bar.
pub fn score(device: &Cpu, checkpoint: &Checkpoint, dataset: &Dataset, packing: Packing) -> Result<Vec<Vec<Vec<f32>>>> {
    check_vocabulary(checkpoint, [dataset])?;
    let largest = packing.largest(&dataset.examples, dataset.examples.len());
    let mut scorer = Scorer::new(device, checkpoint, Init::Checkpoint, &largest)?;
    let mut progress = Progress::new("scoring", dataset.examples.len() as u64, "rows");
    let examples: Vec<&Example> = dataset.examples.iter().collect();
    let logps = scorer.score(&examples, packing, &mut |done| progress.at(done as u64, ""))?;
    progress.finish();
    Ok(logps)
}
