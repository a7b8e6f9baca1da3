//! Whether a completion has the form that was asked for.

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::registry::{Kind, Outcome, options};
use super::{Entry, Rule, Sample};

pub const ENTRY: Entry = Entry {
    name: "format",
    summary: "one reward where the completion has the wanted form, another where not",
    keys: &[
        ("parts", "texts that it must hold, in this order, each once, such as [\"<think>\", \"</think>\"]"),
        ("json", "the whole completion is valid JSON [false]"),
        ("ends", "it ended by itself, not at the length limit [false]"),
        ("score", "reward where all of these hold [1]"),
        ("otherwise", "reward where one does not [0]"),
    ],
    open: |table, _| {
        let Options { parts, json, ends, score, otherwise } = options(table)?;
        if parts.iter().any(String::is_empty) {
            return Err("parts: an empty text is everywhere; drop it".into());
        }
        if parts.is_empty() && !json && !ends {
            return Err("nothing is asked for; give parts, json or ends".into());
        }
        Ok(Kind::rule(Format { parts, json, ends, outcome: Outcome::new(score, otherwise)? }))
    },
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Options {
    #[serde(default)]
    parts: Vec<String>,
    #[serde(default)]
    json: bool,
    #[serde(default)]
    ends: bool,
    score: Option<f64>,
    otherwise: Option<f64>,
}

struct Format {
    parts: Vec<String>,
    json: bool,
    ends: bool,
    outcome: Outcome,
}

impl Format {
    /// One behind the other, and as often as they are listed.
    fn has_parts(&self, text: &str) -> bool {
        let mut rest = Some(text);
        for part in &self.parts {
            rest = rest.and_then(|rest| rest.split_once(part.as_str())).map(|(_, after)| after);
        }
        let listed = |part: &String| self.parts.iter().filter(|other| *other == part).count();
        rest.is_some() && self.parts.iter().all(|part| text.matches(part.as_str()).count() == listed(part))
    }
}

impl Rule for Format {
    fn reward(&self, sample: &Sample) -> Result<f64, String> {
        let json = || serde_json::from_str::<IgnoredAny>(sample.completion).is_ok();
        let holds = self.has_parts(sample.completion) && (!self.json || json()) && (!self.ends || sample.finished);
        Ok(self.outcome.of(holds))
    }
}
