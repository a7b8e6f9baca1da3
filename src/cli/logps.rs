//! `cuvee logps`

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::Path;

use serde_json::{Value, json};

use super::args::LogpsArgs;
use super::device::{self, Job};
use crate::checkpoint::atomic::write_file_with;
use crate::data::{Dataset, Example, Form, Packing, Tokenizer};
use crate::error::{At, Error, Result};
use crate::model::{Checkpoint, Init};
use crate::ops::Backend;
use crate::progress::{Progress, say};
use crate::references::Scorer;
use crate::train::{check_positions, check_vocabulary};

pub fn run(args: &LogpsArgs) -> Result<()> {
    let path = &args.out;
    let write = |out: &mut dyn Write| lines(args)?.iter().try_for_each(|line| writeln!(out, "{line}")).at(path);
    if path == Path::new("-") {
        return lines(args)?.iter().try_for_each(|line| super::print(&format!("{line}\n")));
    }
    let place = fs::metadata(path);
    if place.as_ref().is_ok_and(|place| place.is_dir()) {
        return Err(Error::option("--out", format!("{} is a folder; name a file", path.display())));
    }
    // Opened before the work: a path that cannot be written should not cost an hour.
    if place.as_ref().is_ok_and(|place| !place.is_file()) {
        // A pipe or a device is written to, not replaced.
        return write(&mut OpenOptions::new().write(true).open(path).at(path)?);
    }
    // Behind a link lies the file to replace.
    let path = path.canonicalize().unwrap_or_else(|_| path.clone());
    if args.dataset.canonicalize().is_ok_and(|dataset| dataset == path) {
        return Err(Error::option("--out", format!("{} is the data set itself; name another file", path.display())));
    }
    write_file_with(&path, write)
}

/// One line for each row, in order.
fn lines(args: &LogpsArgs) -> Result<Vec<Value>> {
    device::run(&args.engine, args.precision.dtype, None, args)
}

impl Job for &LogpsArgs {
    type Output = Vec<Value>;

    fn run<B: Backend>(self, device: &B) -> Result<Vec<Value>> {
        let args = self;
        device::check_dtype(device, args.precision.dtype)?;
        let checkpoint = Checkpoint::open(&args.model)?;
        let tokenizer = Tokenizer::load(&args.model)?;
        let encode = super::encode(args.limits.max_length, args.limits.on_overflow);
        let dataset = Dataset::load(&args.dataset, &tokenizer, &encode)?;
        dataset.report().iter().for_each(say);
        let logps = match dataset.examples.is_empty() {
            true => Vec::new(),
            false => score(device, &checkpoint, &dataset, super::packing(&args.batching))?,
        };
        let mut lines: BTreeMap<usize, Value> = dataset
            .skipped
            .iter()
            .map(|(row, skip)| (*row, json!({"row": row, "skipped": skip.to_string()})))
            .collect();
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
                Form::Unpaired => {
                    json!({"row": example.row, "label": example.label, "logps": sum(0), "tokens": sequences[0].len()})
                }
                Form::Completions | Form::Text => {
                    json!({"row": example.row, "logps": sum(0), "tokens": sequences[0].len()})
                }
            };
            lines.insert(example.row, line);
        }
        Ok(lines.into_values().collect())
    }
}

/// `[examples][sequences][scored tokens]`, with a bar.
pub fn score<B: Backend>(
    device: &B,
    checkpoint: &Checkpoint,
    dataset: &Dataset,
    packing: Packing,
) -> Result<Vec<Vec<Vec<f32>>>> {
    check_vocabulary(checkpoint, [dataset])?;
    check_positions(checkpoint, [dataset])?;
    let largest = packing.largest(&packing.extents(&dataset.examples));
    let mut scorer = Scorer::new(device, checkpoint, Init::Checkpoint, &largest)?;
    let mut progress = Progress::new("scoring", dataset.examples.len() as u64, "rows");
    let examples: Vec<&Example> = dataset.examples.iter().collect();
    let logps = scorer.score(&examples, packing, &mut |done| progress.at(done as u64, ""))?;
    progress.finish();
    Ok(logps)
}
