//! Preference: how often the chosen completion is likelier than the rejected one. With a reference, log-probabilities
//! are those relative to it. Rows are encoded as for training (EOS behind each completion), not as the harness would; a
//! tie counts half.

use std::path::PathBuf;

use serde_json::json;

use super::encode::Encoder;
use super::file::Rows;
use super::stats::{mean, wins};
use super::{Kind, Outcome, Said, Tokens};
use crate::data::{Dataset, EncodeOptions, Tokenizer};
use crate::error::Result;

pub(super) const NAME: &str = "preference";

struct Preference {
    path: PathBuf,
}

pub(super) fn open(rows: Rows) -> Result<Box<dyn Kind>> {
    rows.items(|row| match ["chosen", "rejected"].iter().find(|column| !row.contains_key(**column)) {
        Some(column) => Err(format!("has no {column}")),
        None => Ok(()),
    })?;
    Ok(Box::new(Preference { path: rows.path }))
}

impl Kind for Preference {
    fn name(&self) -> &'static str {
        NAME
    }

    fn metrics(&self) -> &'static [&'static str] {
        &["accuracy", "margin"]
    }

    fn tokens(&self, encoder: &Encoder) -> Result<Tokens> {
        let options = EncodeOptions { max_length: encoder.max_length, ..EncodeOptions::default() };
        let dataset = Dataset::load(&self.path, encoder.tokenizer, &options)?.not_empty()?;
        Ok(Tokens { report: dataset.report(), examples: dataset.examples, ..Tokens::default() })
    }

    fn outcome(&self, _: &Tokenizer, tokens: &Tokens, said: &Said) -> Result<Outcome> {
        let sum = |logps: &Vec<f32>| logps.iter().map(|x| f64::from(*x)).sum::<f64>();
        let (mut margins, mut won, mut log) = (Vec::new(), Vec::new(), Vec::new());
        for (i, example) in tokens.examples.iter().enumerate() {
            let against = |s: usize| said.ref_logps.as_ref().map_or(0.0, |logps| sum(&logps[i][s]));
            let [chosen, rejected] = [0, 1].map(|s| sum(&said.logps[i][s]) - against(s));
            margins.push(chosen - rejected);
            won.push(wins(chosen, rejected));
            let line = json!({"row": example.row, "chosen": chosen, "rejected": rejected, "margin": chosen - rejected});
            log.push(line.as_object().expect("it is one").clone());
        }
        Ok(Outcome::new(NAME, vec![mean("accuracy", &won), mean("margin", &margins)], log))
    }
}
