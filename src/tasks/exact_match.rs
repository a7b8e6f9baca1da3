//! Exact match: the likeliest text, token by token, up to a stop string, is the answer or not.
//!
//! `generate_until` of the harness's `models/huggingface.py`, its filter `regex` (`filters/extraction.py`) and
//! `exact_match` (`api/metrics.py`): stop strings cut what was written, first come the regular expression and which of
//! its matches, then what is ignored in both texts. As there, at most 256 tokens are written (or half of what the model
//! reads at once, where that is less), and an empty line stops where nothing is said. Here white space around both
//! texts never counts; there it takes the filter `remove_whitespace`. Several targets: one of them is enough.

use std::path::{Path, PathBuf};

use fancy_regex::Regex;
use serde_json::{Value, json};

use super::complete::{Prompt, Writing};
use super::encode::{Encoder, is_space};
use super::file::{self, Filter, Options, PROMPT, Rows, Source, TARGET, Texts};
use super::stats::mean;
use super::{Kind, Outcome, Said, Tokens};
use crate::data::{Object, Tokenizer};
use crate::error::{At, Place, Result};
use crate::rollout::before_stop;

pub(super) const NAME: &str = "exact_match";
const MAX_NEW_TOKENS: usize = 256;
const UNTIL: &str = "\n\n";

struct Item {
    prompt: String,
    targets: Vec<String>,
    until: Vec<String>,
}

struct ExactMatch {
    path: PathBuf,
    items: Vec<(Place, Item)>,
    max_new_tokens: Option<usize>,
    filter: Option<(Regex, Filter)>,
    ignored: Ignored,
}

/// What two texts may differ in.
struct Ignored {
    regexes: Vec<Regex>,
    case: bool,
    punctuation: bool,
    numbers: bool,
}

pub(super) fn open(mut rows: Rows) -> Result<Box<dyn Kind>> {
    let file = rows.file.clone();
    let options = std::mem::take(&mut rows.options);
    let prompt = Source::new(&file, options.prompt.clone(), PROMPT)?;
    let target = options.target.clone().map(|target| Source::new(&file, Some(target), TARGET)).transpose()?;
    let until = options.until.clone().map_or(vec![UNTIL.into()], Texts::into_vec);
    let items = rows.items(|row| {
        let targets = match &target {
            Some(template) => vec![template.of(row)?],
            None => targets(row)?,
        };
        let until = row.get("until").map(own_until).transpose()?.unwrap_or_else(|| until.clone());
        Ok(Item { prompt: prompt.of(row)?, targets, until })
    })?;
    let filter = options.filter.clone().map(|filter| Ok((regex(&file, &filter.regex)?, filter))).transpose()?;
    let (max_new_tokens, ignored) = (options.max_new_tokens, Ignored::new(&file, &options)?);
    Ok(Box::new(ExactMatch { path: rows.path, items, max_new_tokens, filter, ignored }))
}

/// `"18"`, `18`, or several of those.
fn targets(row: &Object) -> Result<Vec<String>, String> {
    let one = |value: &Value| match value {
        Value::String(text) => Ok(text.clone()),
        Value::Number(number) => Ok(number.to_string()),
        other => Err(format!("the target {other} is neither a text nor a number")),
    };
    match file::column(row, TARGET)? {
        Value::Array(several) if several.is_empty() => Err("the list of targets is empty".into()),
        Value::Array(several) => several.iter().map(one).collect(),
        value => Ok(vec![one(value)?]),
    }
}

fn own_until(value: &Value) -> Result<Vec<String>, String> {
    let texts: Result<Texts, _> = serde_json::from_value(value.clone());
    texts.map(Texts::into_vec).map_err(|_| format!("until is {value}, expected a text or a list of texts"))
}

fn regex(path: &Path, source: &str) -> Result<Regex> {
    Regex::new(source).map_err(|e| format!("the regular expression {source:?} cannot be used: {e}")).at(path)
}

impl Ignored {
    fn new(path: &Path, options: &Options) -> Result<Self> {
        Ok(Self {
            regexes: options.regexes_to_ignore.iter().map(|source| regex(path, source)).collect::<Result<_>>()?,
            case: options.ignore_case,
            punctuation: options.ignore_punctuation,
            numbers: options.ignore_numbers,
        })
    }

    fn without(&self, text: &str) -> String {
        let mut text =
            self.regexes.iter().fold(text.to_string(), |text, regex| regex.replace_all(&text, "").into_owned());
        if self.case {
            text = text.to_lowercase();
        }
        text.retain(|c| !(self.punctuation && c.is_ascii_punctuation() || self.numbers && c.is_ascii_digit()));
        text.trim_matches(is_space).to_string()
    }
}

/// Python's `regex.findall(text)[select]`: a match without groups is itself, one with a group that group, of several
/// the first that is not empty.
fn answer(regex: &Regex, filter: &Filter, text: &str) -> String {
    let found: Vec<String> = regex
        .captures_iter(text)
        // A search that takes too long ends; what it found counts.
        .map_while(|captures| captures.ok())
        .map(|captures| {
            let group = |i: usize| captures.get(i).map_or("", |group| group.as_str());
            match captures.len() {
                1 => group(0).to_string(),
                2 => group(1).to_string(),
                groups => (1..groups).map(group).find(|text| !text.is_empty()).unwrap_or(&filter.fallback).to_string(),
            }
        })
        .collect();
    let (select, len) = (filter.group_select, found.len() as i64);
    let at = if select < 0 { len + select } else { select };
    let selected = usize::try_from(at).ok().and_then(|at| found.get(at));
    selected.map_or(filter.fallback.clone(), |text| text.trim_matches(is_space).to_string())
}

impl Kind for ExactMatch {
    fn name(&self) -> &'static str {
        NAME
    }

    fn metrics(&self) -> &'static [&'static str] {
        &["exact_match"]
    }

    fn tokens(&self, encoder: &Encoder) -> Result<Tokens> {
        let max_new_tokens = self.max_new_tokens.unwrap_or(MAX_NEW_TOKENS.min(encoder.window / 2).max(1));
        let prompt = |(place, item): &(Place, Item)| {
            let ids = encoder.prompt(&item.prompt, max_new_tokens)?.map_err(file::at(&self.path, *place))?;
            Ok(Prompt { text: item.prompt.clone(), ids, until: item.until.clone(), answer: None })
        };
        let prompts = self.items.iter().map(prompt).collect::<Result<_>>()?;
        Ok(Tokens { prompts, writing: Some(Writing::greedy(max_new_tokens)), ..Tokens::default() })
    }

    fn outcome(&self, tokenizer: &Tokenizer, _: &Tokens, said: &Said) -> Result<Outcome> {
        let (mut right, mut log) = (Vec::new(), Vec::new());
        for ((_, item), completions) in self.items.iter().zip(&said.completions) {
            let text = tokenizer.decode(&completions[0].ids)?;
            let written = before_stop(&text, &item.until);
            let answer = match &self.filter {
                Some((regex, filter)) => answer(regex, filter, written),
                None => written.to_string(),
            };
            let reduced = self.ignored.without(&answer);
            let exact = item.targets.iter().any(|target| self.ignored.without(target) == reduced);
            right.push(f64::from(u8::from(exact)));
            let line = json!({"completion": written, "answer": answer, "targets": item.targets, "exact_match": exact});
            log.push(line.as_object().expect("it is one").clone());
        }
        Ok(Outcome::new(NAME, vec![mean("exact_match", &right)], log))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(regex: &str, group_select: i64) -> (Regex, Filter) {
        let filter = Filter { regex: regex.into(), group_select, fallback: "[invalid]".into() };
        (Regex::new(regex).unwrap(), filter)
    }

    #[test]
    fn the_filters_of_gsm8k() {
        let answers = |text: &str| {
            let [strict, flexible] =
                [(r"#### (\-?[0-9\.\,]+)", 0), (r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1)].map(|(r, g)| {
                    let (regex, filter) = filter(r, g);
                    answer(&regex, &filter, text)
                });
            (strict, flexible)
        };
        assert_eq!(answers("so 3 + 4 = 7.\n#### 7"), ("7".into(), "7".into()));
        assert_eq!(answers("it is $1,200 in 5 days"), ("[invalid]".into(), "5".into()));
        assert_eq!(answers("no number"), ("[invalid]".into(), "[invalid]".into()));
        let (regex, third) = filter("[0-9]", 2);
        assert_eq!(answer(&regex, &third, "1 2"), "[invalid]");
    }

    #[test]
    fn what_is_ignored() {
        let options = Options {
            regexes_to_ignore: [",", "\\$", "(?s).*#### ", "\\.$"].map(String::from).into(),
            ignore_case: true,
            ..Options::default()
        };
        let ignored = Ignored::new(Path::new("x"), &options).unwrap();
        assert_eq!(ignored.without("He has 3.\n#### 1,234"), "1234");
        assert_eq!(ignored.without("$18.\u{a0}"), "18.");
        assert_eq!(ignored.without("Yes."), "yes");
        let all = Options { ignore_punctuation: true, ignore_numbers: true, ..Options::default() };
        assert_eq!(Ignored::new(Path::new("x"), &all).unwrap().without("a-1 «b» 2!"), "a «b»");
        assert!(regex(Path::new("x"), "(").unwrap_err().to_string().contains("regular expression"));
    }
}
