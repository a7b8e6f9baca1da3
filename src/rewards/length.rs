//! How far a completion's length is from where it should be:
//!
//! ```text
//! reward = -slope * max(min - length, length - max, 0), not below floor
//! ```

use serde::Deserialize;

use super::registry::{Kind, finite, options};
use super::text::words;
use super::{Entry, Rule, Sample};

pub const ENTRY: Entry = Entry {
    name: "length",
    summary: "0 for a completion of the wanted length, less for each word, token or character that is missing or too many",
    keys: &[
        ("unit", "\"words\", \"tokens\" (of the policy) or \"characters\""),
        ("target", "the only length that loses nothing; or give min, max or both"),
        ("min", "shortest that loses nothing [0]"),
        ("max", "longest that loses nothing [none]"),
        ("slope", "what each unit beyond costs"),
        ("floor", "no reward is below this [none]"),
    ],
    open: |table, _| {
        let Options { unit, target, min, max, slope, floor } = options(table)?;
        let (min, max) = match (target, min, max) {
            (Some(target), None, None) => (target, Some(target)),
            (Some(_), ..) => return Err("target says all; drop min and max".into()),
            (None, None, None) => return Err("give target, min or max".into()),
            (None, min, max) => (min.unwrap_or(0), max),
        };
        if let Some(max) = max.filter(|max| *max < min) {
            return Err(format!("min is {min}, more than max, which is {max}"));
        }
        if finite("slope", slope)? <= 0.0 {
            return Err(format!("slope: expected a number above 0, found {slope}"));
        }
        let floor = floor.map(|floor| finite("floor", floor)).transpose()?;
        if let Some(floor) = floor.filter(|floor| *floor >= 0.0) {
            return Err(format!("floor: expected a number below 0, found {floor}"));
        }
        Ok(Kind::rule(Length { unit, min, max, slope, floor: floor.unwrap_or(f64::MIN) }))
    },
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Options {
    unit: Unit,
    target: Option<u32>,
    min: Option<u32>,
    max: Option<u32>,
    slope: f64,
    floor: Option<f64>,
}

#[derive(Deserialize, Clone, Copy)]
#[serde(rename_all = "lowercase")]
enum Unit {
    Words,
    Tokens,
    Characters,
}

struct Length {
    unit: Unit,
    min: u32,
    max: Option<u32>,
    slope: f64,
    floor: f64,
}

impl Rule for Length {
    fn reward(&self, sample: &Sample) -> Result<f64, String> {
        let length = match self.unit {
            Unit::Words => words(sample.completion).len(),
            Unit::Tokens => sample.tokens().len(),
            Unit::Characters => sample.completion.chars().count(),
        } as f64;
        let over = self.max.map_or(0.0, |max| length - f64::from(max));
        let beyond = (f64::from(self.min) - length).max(over).max(0.0);
        // Not -0.
        Ok((0.0 - self.slope * beyond).max(self.floor))
    }

    fn reads_tokens(&self) -> bool {
        matches!(self.unit, Unit::Tokens)
    }
}
