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
    write_rows(&args.out, &args.dataset, || device::run(&args.engine, args.precision.dtype, None, args))
}

/// Writes a line for each row to `path`, `-` for stdout.
pub fn write_rows(path: &Path, dataset: &Path, lines: impl Fn() -> Result<Vec<Value>>) -> Result<()> {
    let write = |out: &mut dyn Write| lines()?.iter().try_for_each(|line| writeln!(out, "{line}")).at(path);
    if path == Path::new("-") {
        return lines()?.iter().try_for_each(|line| super::print(&format!("{line}\n")));
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
    let path = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    if dataset.canonicalize().is_ok_and(|dataset| dataset == path) {
        return Err(Error::option("--out", format!("{} is the data set itself; name another file", path.display())));
    }
    write_file_with(&path, write)
}

/// A line for each row, in order: what `line` makes of an example and what was computed of it, or why there is none.
pub fn by_row<T>(dataset: &Dataset, computed: &[T], line: impl Fn(&Example, &T) -> Value) -> Vec<Value> {
    let skipped = dataset.skipped.iter().map(|(row, skip)| (*row, json!({"row": row, "skipped": skip.to_string()})));
    let examples = dataset.examples.iter().zip(computed).map(|(example, of)| (example.row, line(example, of)));
    skipped.chain(examples).collect::<BTreeMap<_, _>>().into_values().collect()
}

impl Job for &LogpsArgs {
    type Output = Vec<Value>;

    fn run<B: Backend>(self, device: &B) -> Result<Vec<Value>> {
        let args = self;
        device::check_dtype(device, args.precision.dtype)?;
        let checkpoint = args.adapters.open(&args.model, Checkpoint::open)?;
        let tokenizer = Tokenizer::load(&args.model)?;
        let encode = super::encode(args.limits.max_length, args.limits.on_overflow);
        let dataset = Dataset::load(&args.dataset, &tokenizer, &encode)?;
        dataset.report().iter().chain(&checkpoint.beyond_rows(&dataset)).for_each(say);
        let logps = score(device, &checkpoint, &dataset, super::packing(&args.batching))?;
        Ok(by_row(&dataset, &logps, |example, sequences| {
            let sum = |s: usize| sequences[s].iter().map(|x| f64::from(*x)).sum::<f64>();
            match dataset.form {
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
                Form::Completions | Form::Text | Form::Prompts => {
                    json!({"row": example.row, "logps": sum(0), "tokens": sequences[0].len()})
                }
            }
        }))
    }
}

/// `[examples][sequences][scored tokens]`, with a bar. Without examples nothing is loaded.
pub fn score<B: Backend>(
    device: &B,
    checkpoint: &Checkpoint,
    dataset: &Dataset,
    packing: Packing,
) -> Result<Vec<Vec<Vec<f32>>>> {
    if dataset.examples.is_empty() {
        return Ok(Vec::new());
    }
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
