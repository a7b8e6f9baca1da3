//! What share of a completion's runs of words was there before:
//!
//! ```text
//! reward = distinct runs / runs - 1, from -1 to 0
//! ```

use serde::Deserialize;

use super::registry::{Kind, options};
use super::text::{distinct, words};
use super::{Entry, Rule, Sample};

pub const ENTRY: Entry = Entry {
    name: "repetition",
    summary: "minus the share of runs of n words that repeat an earlier one, 0 to -1: distinct-n - 1 of the completion",
    keys: &[("n", "words in a run; 3 is usual"), ("unit", "\"words\" or \"tokens\" (of the policy) [words]")],
    open: |table, _| match options(table)? {
        Options { n: 0, .. } => Err("n: expected 1 at least, found 0".into()),
        Options { n, unit } => Ok(Kind::rule(Repetition { n, unit })),
    },
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Options {
    n: usize,
    #[serde(default)]
    unit: Unit,
}

#[derive(Deserialize, Clone, Copy, Default)]
#[serde(rename_all = "lowercase")]
enum Unit {
    #[default]
    Words,
    Tokens,
}

struct Repetition {
    n: usize,
    unit: Unit,
}

impl Rule for Repetition {
    fn reward(&self, sample: &Sample) -> Result<f64, String> {
        let distinct = match self.unit {
            Unit::Words => distinct(&[words(sample.completion)], self.n),
            Unit::Tokens => distinct(&[sample.tokens()], self.n),
        };
        // Too short for a run: nothing is repeated.
        Ok(if distinct.is_nan() { 0.0 } else { distinct - 1.0 })
    }

    fn reads_tokens(&self) -> bool {
        matches!(self.unit, Unit::Tokens)
    }
}
