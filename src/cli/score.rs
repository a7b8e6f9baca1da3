//! `cuvee score`
//!
//! Texts become tokens as in TRL's RewardTrainer: prompt and completion as one text with EOS behind it, or what the chat
//! template writes of them. TRL also scores an empty completion, and one without a prompt and a begin-of-text token; both
//! are skipped here. The score is read where transformers reads it ([`Read::Last`](crate::data::Read::Last)): where the
//! padding token is EOS, before that.

mod rewards;

use std::path::Path;

use serde_json::{Value, json};

use super::args::ScoreArgs;
use super::device::{self, Job};
use super::logps::{by_row, score, write_rows};
use crate::data::{Dataset, EncodeOptions, Form, Packing, Tokenizer};
use crate::error::{Error, Result};
use crate::model::Checkpoint;
use crate::ops::Backend;
use crate::progress::say;
pub use rewards::{Texts, texts_of};

pub fn run(args: &ScoreArgs) -> Result<()> {
    if !args.reward.is_empty() {
        return rewards::run(args);
    }
    let lines = || device::run(&args.engine, args.precision.dtype, None, args);
    if let (Some(dataset), Some(out)) = (&args.dataset, &args.out) {
        let told = || lines().inspect(|lines| pairs(lines).iter().for_each(say));
        return write_rows(out, dataset, told);
    }
    let line = lines()?.remove(0);
    match line["score"].as_f64() {
        Some(score) => super::print(&format!("{score}\n")),
        None => {
            Err(Error::option("--text", format!("is not scored: {}", line["skipped"].as_str().unwrap_or("skipped"))))
        }
    }
}

/// How often the chosen completion of a pair has the higher score, a tie counting half, and by how much.
fn pairs(lines: &[Value]) -> Option<String> {
    let gap = |line: &Value| Some(line["score_chosen"].as_f64()? - line["score_rejected"].as_f64()?);
    let gaps: Vec<f64> = lines.iter().filter_map(gap).collect();
    let n = gaps.len() as f64;
    let right: f64 = gaps.iter().map(|gap| if *gap == 0.0 { 0.5 } else { f64::from(u8::from(*gap > 0.0)) }).sum();
    let margin = gaps.iter().sum::<f64>() / n;
    let text = || {
        format!(
            "the chosen completion scores higher in {:.1} % of {n} pairs, by {margin:.3} on average",
            100.0 * right / n
        )
    };
    (!gaps.is_empty()).then(text)
}

impl ScoreArgs {
    fn model(&self) -> &Path {
        self.model.as_deref().expect("it is required without --reward")
    }

    fn dataset(&self, tokenizer: &Tokenizer, encode: &EncodeOptions) -> Result<Dataset> {
        match (&self.dataset, &self.text) {
            (Some(dataset), _) => Dataset::load(dataset, tokenizer, encode),
            (None, text) => Dataset::of_text("--text", text.as_deref().unwrap_or(""), tokenizer, encode),
        }
    }
}

impl Job for &ScoreArgs {
    type Output = Vec<Value>;

    fn run<B: Backend>(self, device: &B) -> Result<Vec<Value>> {
        let args = self;
        device::check_dtype(device, args.precision.dtype)?;
        let checkpoint = args.adapters.open(args.model(), Checkpoint::open_reward)?;
        let tokenizer = Tokenizer::load(args.model())?;
        let encode = super::encode(args.limits.max_length, args.limits.on_overflow);
        let dataset = args.dataset(&tokenizer, &encode)?;
        dataset.report().iter().for_each(say);
        let packing = Packing { read: checkpoint.reads(&tokenizer), ..super::packing(&args.batching) };
        let scores = score(device, &checkpoint, &dataset, packing)?;
        Ok(by_row(&dataset, &scores, |example, sequences| {
            let score = |s: usize| f64::from(sequences[s][0]);
            match dataset.form {
                Form::Pairs => json!({"row": example.row, "score_chosen": score(0), "score_rejected": score(1)}),
                Form::Unpaired => json!({"row": example.row, "label": example.label, "score": score(0)}),
                Form::Completions | Form::Text | Form::Prompts => json!({"row": example.row, "score": score(0)}),
            }
        }))
    }
}
