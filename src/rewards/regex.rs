//! Whether a pattern is found in the completion.

use fancy_regex::Regex;
use serde::Deserialize;

use super::registry::{Kind, Outcome, options};
use super::{Entry, Rule, Sample};

pub const ENTRY: Entry = Entry {
    name: "regex",
    summary: "one reward where a pattern is found in the completion, another where not",
    keys: &[
        ("pattern", "regular expression; (?i) ignores case, (?s) lets . match line ends"),
        ("full_match", "the pattern is the whole completion, blanks around it aside [false]"),
        ("score", "reward where it is found [1]"),
        ("otherwise", "reward where it is not [0]"),
    ],
    open: |table, _| {
        let Options { pattern, full_match, score, otherwise } = options(table)?;
        let pattern = if full_match { format!(r"\A(?:{pattern})\z") } else { pattern };
        Ok(Kind::rule(Pattern {
            regex: regex("pattern", &pattern)?,
            full_match,
            outcome: Outcome::new(score, otherwise)?,
        }))
    },
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Options {
    pattern: String,
    #[serde(default)]
    full_match: bool,
    score: Option<f64>,
    otherwise: Option<f64>,
}

/// A regular expression that a key holds.
pub(super) fn regex(key: &str, pattern: &str) -> Result<Regex, String> {
    Regex::new(pattern).map_err(|e| format!("{key}: {pattern:?} is no regular expression: {e}"))
}

struct Pattern {
    regex: Regex,
    full_match: bool,
    outcome: Outcome,
}

impl Rule for Pattern {
    fn reward(&self, sample: &Sample) -> Result<f64, String> {
        let text = if self.full_match { sample.completion.trim() } else { sample.completion };
        let found = self.regex.is_match(text).map_err(|e| format!("the pattern cannot be searched for: {e}"))?;
        Ok(self.outcome.of(found))
    }
}
