//! `cuvee eval`

use std::path::Path;

use serde_json::json;

use super::args::EvalArgs;
use super::device::{self, Job};
use super::logps::score;
use crate::data::{Dataset, Form, Packing, Tokenizer};
use crate::error::Result;
use crate::model::Checkpoint;
use crate::objectives::Stats;
use crate::ops::Backend;
use crate::progress::say;
use crate::train::{Summary, own_tokens};

pub fn run(args: &EvalArgs) -> Result<()> {
    device::run(&args.engine, args.precision.dtype, None, args)
}

impl Job for &EvalArgs {
    type Output = ();

    fn run<B: Backend>(self, device: &B) -> Result<()> {
        let args = self;
        device::check_dtype(device, args.precision.dtype)?;
        let policy = args.adapters.open(&args.model, Checkpoint::open)?;
        let tokenizer = Tokenizer::load(&args.model)?;
        let encode = super::encode(args.limits.max_length, args.limits.on_overflow);
        let dataset = Dataset::load(&args.dataset, &tokenizer, &encode)?.not_empty()?;
        dataset.report().iter().for_each(say);
        let packing = super::packing(&args.batching);
        let reference = |dir: &Path| {
            let reference = Checkpoint::open(dir)?;
            let own = own_tokens(&dataset, &tokenizer, &reference)?;
            sums(device, &reference, own.as_ref().unwrap_or(&dataset), packing)
        };
        let sequences = || dataset.examples.iter().flat_map(|e| &e.sequences);
        let pairs = if dataset.form == Form::Pairs { dataset.examples.len() } else { 0 };
        let stats = Stats {
            ref_logps: args.ref_model.as_deref().map(reference).transpose()?.into_iter().collect(),
            logps: sums(device, &policy, &dataset, packing)?,
            lens: sequences().map(|s| (s.ids.len() - s.first) as f64).collect(),
            pairs: (0..pairs).map(|pair| (2 * pair, 2 * pair + 1)).collect(),
            ..Stats::default()
        };
        let summary = Summary::of(&stats, stats.ref_logps.first().map(Vec::as_slice));
        let (rows, skipped) = (dataset.examples.len(), dataset.skipped.len());
        if args.json {
            let result = json!({
                "rows": rows,
                "skipped": skipped,
                "accuracy": summary.accuracy,
                "margin": summary.margin,
                "perplexity": summary.perplexity,
            });
            return super::print(&format!("{result}\n"));
        }
        let mut out = format!("rows        {rows} ({skipped} skipped)\n");
        if let (Some(accuracy), Some(margin)) = (summary.accuracy, summary.margin) {
            let against = if stats.ref_logps.is_empty() { "log-probability" } else { "log-ratio to the reference" };
            out += &format!("accuracy    {:.1} %\nmargin      {margin:.3} nats ({against})\n", 100.0 * accuracy);
        }
        if let Some(perplexity) = summary.perplexity {
            out += &format!("perplexity  {perplexity:.2}\n");
        }
        super::print(&out)
    }
}

/// Summed log-probabilities of every sequence, in order.
fn sums<B: Backend>(device: &B, checkpoint: &Checkpoint, dataset: &Dataset, packing: Packing) -> Result<Vec<f64>> {
    let logps = score(device, checkpoint, dataset, packing)?;
    Ok(logps.iter().flatten().map(|tokens| tokens.iter().map(|x| f64::from(*x)).sum()).collect())
}
