//! How well a model predicts texts: every token of every text once.
//!
//! ```text
//! nll             = -sum ll / tokens               perplexity = e^nll                 per token of this model
//! word_perplexity = e^(-sum ll / words)            words: runs of white space, plus one
//! byte_perplexity = e^(-sum ll / bytes)            bits_per_byte = -sum ll / bytes / ln 2
//! ```
//!
//! The last three are the harness's `loglikelihood_rolling`, sums over all texts before the division; they compare
//! models of different tokenizers, the first two do not. Standard errors are those of a ratio over texts, where the
//! harness resamples.

use std::ops::Range;
use std::path::PathBuf;

use serde_json::json;

use super::encode::{Encoder, is_space};
use super::file::{self, Rows, TEXT};
use super::stats::ratio;
use super::{Kind, Outcome, Said, Tokens};
use crate::data::{Example, Tokenizer};
use crate::error::{Place, Result};

pub(super) const NAME: &str = "perplexity";

struct Perplexity {
    path: PathBuf,
    /// With the place of each.
    texts: Vec<(Place, String)>,
}

pub(super) fn open(rows: Rows) -> Result<Box<dyn Kind>> {
    let texts = rows.items(|row| match file::text(row, TEXT)? {
        empty if empty.is_empty() => Err("the text is empty".into()),
        text => Ok(text),
    })?;
    Ok(Box::new(Perplexity { path: rows.path, texts }))
}

/// Python's `len(re.split(r"\s+", text))`.
fn words(text: &str) -> usize {
    let starts = |(before, c): (char, char)| is_space(c) && !is_space(before);
    1 + std::iter::once('x').chain(text.chars()).zip(text.chars()).filter(|pair| starts(*pair)).count()
}

/// The windows of each text among `examples`, by their rows.
fn by_text(examples: &[Example]) -> impl Iterator<Item = Range<usize>> {
    let mut start = 0;
    examples.chunk_by(|a, b| a.row == b.row).map(move |windows| {
        start += windows.len();
        start - windows.len()..start
    })
}

impl Kind for Perplexity {
    fn name(&self) -> &'static str {
        NAME
    }

    fn metrics(&self) -> &'static [&'static str] {
        &["perplexity", "nll", "word_perplexity", "byte_perplexity", "bits_per_byte"]
    }

    fn tokens(&self, encoder: &Encoder) -> Result<Tokens> {
        let mut examples = Vec::new();
        for (row, (place, text)) in self.texts.iter().enumerate() {
            let windows = encoder.windows(text)?.map_err(file::at(&self.path, *place))?;
            let example = |window| Example { row, sequences: vec![window], ..Example::default() };
            examples.extend(windows.into_iter().map(example));
        }
        Ok(Tokens { examples, ..Tokens::default() })
    }

    fn outcome(&self, _: &Tokenizer, tokens: &Tokens, said: &Said) -> Result<Outcome> {
        let mut log = Vec::new();
        let [mut nll, mut scored, mut word, mut byte] = [const { Vec::new() }; 4];
        for (range, (_, text)) in by_text(&tokens.examples).zip(&self.texts) {
            let logps = || said.logps[range.clone()].iter().flatten().flatten();
            let ll: f64 = logps().map(|x| f64::from(*x)).sum();
            let (tokens, words, bytes) = (logps().count(), words(text), text.len());
            nll.push(-ll);
            scored.push(tokens as f64);
            word.push(words as f64);
            byte.push(bytes as f64);
            let line = json!({"logp": ll, "tokens": tokens, "words": words, "bytes": bytes});
            log.push(line.as_object().expect("it is one").clone());
        }
        let per_token = ratio("nll", &nll, &scored);
        let per_byte = ratio("", &nll, &byte);
        let measures = vec![
            per_token.exp("perplexity"),
            per_token,
            ratio("", &nll, &word).exp("word_perplexity"),
            per_byte.exp("byte_perplexity"),
            per_byte.times("bits_per_byte", std::f64::consts::LN_2.recip()),
        ];
        Ok(Outcome::new(NAME, measures, log))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_counted_as_python_splits() {
        // len(re.split(r"\s+", text))
        for (text, count) in [("a", 1), ("a b", 2), ("  a\t\nb ", 4), (" ", 2), ("é\u{a0}x\u{1f}y", 3), ("a  b", 2)] {
            assert_eq!(words(text), count, "{text:?}");
        }
    }
}
