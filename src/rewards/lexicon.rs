//! The ratings of a completion's words, from a list:
//!
//! ```text
//! mean: (sum of ratings of rated words) / (how many + prior)        sum: sum of ratings of rated words
//! ```
//!
//! Without a rated word both are 0.

use std::collections::HashMap;
use std::path::PathBuf;

use serde::Deserialize;

use super::registry::{Kind, finite, options};
use super::text::words;
use super::{Entry, Rule, Sample};

pub const ENTRY: Entry = Entry {
    name: "lexicon",
    summary: "mean or sum of the ratings that a list gives to the words of the completion",
    keys: &[
        ("file", "lines of word, tab, rating; what follows a second tab and lines that start with # are not read"),
        ("reduce", "\"mean\" over rated words, or \"sum\", which longer texts make larger [mean]"),
        ("prior", "words rated 0 that every mean counts besides: one strong word alone is then worth less [0]"),
    ],
    open: |table, place| {
        let Options { file, reduce, prior } = options(table)?;
        if reduce == Reduce::Sum && prior.is_some() {
            return Err("prior does nothing to a sum; drop it".into());
        }
        let prior = finite("prior", prior.unwrap_or(0.0))?;
        if prior < 0.0 {
            return Err(format!("prior: expected 0 or more, found {prior}"));
        }
        let text = String::from_utf8(place.read(&file)?).map_err(|_| format!("{}: is not UTF-8", file.display()))?;
        let ratings = ratings(&text).map_err(|detail| format!("{}, {detail}", file.display()))?;
        match ratings.is_empty() {
            true => Err(format!("{}: rates no word", file.display())),
            false => Ok(Kind::rule(Lexicon { ratings, reduce, prior })),
        }
    },
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Options {
    file: PathBuf,
    #[serde(default)]
    reduce: Reduce,
    prior: Option<f64>,
}

#[derive(Deserialize, Clone, Copy, Default, PartialEq)]
#[serde(rename_all = "lowercase")]
enum Reduce {
    #[default]
    Mean,
    Sum,
}

struct Lexicon {
    ratings: HashMap<String, f64>,
    reduce: Reduce,
    prior: f64,
}

fn ratings(text: &str) -> Result<HashMap<String, f64>, String> {
    let mut ratings = HashMap::new();
    let lines = (1..).zip(text.trim_start_matches('\u{feff}').lines());
    for (line, text) in lines.filter(|(_, text)| !text.trim().is_empty() && !text.starts_with('#')) {
        let mut columns = text.split('\t');
        let (word, rating) = (columns.next().unwrap_or_default(), columns.next().map(str::trim));
        let number = rating.and_then(|rating| rating.parse::<f64>().ok()).filter(|rating| rating.is_finite());
        let Some(number) = number else {
            return Err(format!("line {line}: expected a word, a tab and a finite number, found {text:?}"));
        };
        if words(word) != [word] {
            return Err(format!("line {line}: {word:?} is never found in a text; expected one word in lower case"));
        }
        if ratings.insert(word.to_string(), number).is_some() {
            return Err(format!("line {line}: {word:?} is rated twice"));
        }
    }
    Ok(ratings)
}

impl Rule for Lexicon {
    fn reward(&self, sample: &Sample) -> Result<f64, String> {
        let words = words(sample.completion);
        let rated: Vec<f64> = words.iter().filter_map(|word| self.ratings.get(word)).copied().collect();
        let sum: f64 = rated.iter().sum();
        Ok(match self.reduce {
            Reduce::Mean if !rated.is_empty() => sum / (rated.len() as f64 + self.prior),
            _ if rated.is_empty() => 0.0,
            _ => sum,
        })
    }
}
