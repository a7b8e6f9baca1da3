//! Whether the completion says what the data's answer says.
//!
//! `extract = "gsm8k"` compares numbers as lm-evaluation-harness's task gsm8k does in its flexible-extract: the last number
//! of the completion, without commas, dollar signs and a dot at its end; of the answer, which GSM8K ends in `#### 42`, the
//! same. Two deviations: where a completion has `####`, the number behind the last one counts, whatever follows; and numbers
//! are compared by value (042 = 42.0), digit for digit whatever their length, where the harness compares strings.
//! `"gsm8k-strict"` takes nothing but the number behind `####` from a completion, as its strict-match does.

use fancy_regex::Regex;
use serde::Deserialize;

use super::regex::regex;
use super::registry::{Kind, Outcome, options};
use super::{Entry, Rule, Sample};

pub const ENTRY: Entry = Entry {
    name: "exact_match",
    summary: "one reward where the completion gives the data's answer, another where not; none where the data has no answer",
    keys: &[
        (
            "extract",
            "what is compared: \"gsm8k\" or \"gsm8k-strict\" for numbers, or a regular expression, whose last match counts, of it the first group if it has one [the whole text]",
        ),
        (
            "extract_answer",
            "the same for the data's answer, where it differs; what it does not match is compared whole",
        ),
        ("ignore_case", "[false]"),
        ("ignore_punctuation", "compare letters, digits and single blanks alone [false]"),
        ("score", "reward where both are equal [1]"),
        ("otherwise", "reward where they are not [0]"),
    ],
    open: |table, _| {
        let Options { extract, extract_answer, ignore_case, ignore_punctuation, score, otherwise } = options(table)?;
        let completion = Extract::of("extract", extract.as_deref())?;
        let answer = match extract_answer {
            Some(pattern) => Extract::of("extract_answer", Some(&pattern))?,
            // The data's answer may be a bare number.
            None if completion.is_number() => Extract::Number { strict: false },
            None => Extract::of("extract", extract.as_deref())?,
        };
        if completion.is_number() != answer.is_number() {
            return Err("extract and extract_answer: one compares numbers, the other texts".into());
        }
        if completion.is_number() && (ignore_case || ignore_punctuation) {
            return Err("ignore_case and ignore_punctuation do nothing to numbers; drop them".into());
        }
        let outcome = Outcome::new(score, otherwise)?;
        Ok(Kind::rule(ExactMatch { completion, answer, ignore_case, ignore_punctuation, outcome }))
    },
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Options {
    extract: Option<String>,
    extract_answer: Option<String>,
    #[serde(default)]
    ignore_case: bool,
    #[serde(default)]
    ignore_punctuation: bool,
    score: Option<f64>,
    otherwise: Option<f64>,
}

struct ExactMatch {
    completion: Extract,
    answer: Extract,
    ignore_case: bool,
    ignore_punctuation: bool,
    outcome: Outcome,
}

/// What of a text is compared.
enum Extract {
    Whole,
    Number { strict: bool },
    Match(Box<Regex>),
}

impl Extract {
    fn of(key: &str, text: Option<&str>) -> Result<Self, String> {
        Ok(match text {
            None => Self::Whole,
            Some("gsm8k") => Self::Number { strict: false },
            Some("gsm8k-strict") => Self::Number { strict: true },
            Some(pattern) => Self::Match(Box::new(regex(key, pattern)?)),
        })
    }

    fn is_number(&self) -> bool {
        matches!(self, Self::Number { .. })
    }

    /// `None` where there is nothing of the kind.
    fn from(&self, text: &str) -> Result<Option<String>, String> {
        match self {
            Self::Whole => Ok(Some(text.trim().to_string())),
            Self::Number { strict } => Ok(gsm8k(text, *strict)),
            Self::Match(regex) => {
                let mut last = None;
                for found in regex.captures_iter(text) {
                    let found = found.map_err(|e| format!("extract cannot be searched for: {e}"))?;
                    last = found.get(1).or(found.get(0)).map(|part| part.as_str().trim().to_string());
                }
                Ok(last)
            }
        }
    }
}

impl ExactMatch {
    fn plain(&self, text: String) -> String {
        let text = if self.ignore_case { text.to_lowercase() } else { text };
        if !self.ignore_punctuation {
            return text;
        }
        let kept: String = text.chars().filter(|c| c.is_alphanumeric() || c.is_whitespace()).collect();
        kept.split_whitespace().collect::<Vec<_>>().join(" ")
    }
}

impl Rule for ExactMatch {
    fn reward(&self, sample: &Sample) -> Result<f64, String> {
        let Some(answer) = sample.answer else { return Ok(f64::NAN) };
        let wanted = match self.answer.from(answer)? {
            Some(wanted) => wanted,
            None if self.answer.is_number() => return Ok(f64::NAN),
            None => answer.trim().to_string(),
        };
        let given = self.completion.from(sample.completion)?;
        Ok(self.outcome.of(given.is_some_and(|given| self.plain(given) == self.plain(wanted))))
    }
}

/// The number that a GSM8K solution comes to, in its shortest decimal form.
fn gsm8k(text: &str, strict: bool) -> Option<String> {
    let marked = text.rsplit_once("####").and_then(|(_, after)| numbers(after).into_iter().next());
    match marked {
        None if !strict => numbers(text).pop(),
        marked => marked,
    }
}

/// Numbers in the order of a text: digits with commas and one dot, a minus in front that follows no letter, digit or
/// bracket, a dollar sign before or after that.
fn numbers(text: &str) -> Vec<String> {
    let chars: Vec<char> = text.chars().map(|c| if c == '\u{2212}' { '-' } else { c }).collect();
    let digit = |at: usize| chars.get(at).is_some_and(char::is_ascii_digit);
    let (mut found, mut at) = (Vec::new(), 0);
    while at < chars.len() {
        let starts = digit(at) || chars[at] == '.' && digit(at + 1);
        if !starts {
            at += 1;
            continue;
        }
        let before: Vec<char> = chars[..at].iter().rev().filter(|c| **c != '$').take(2).copied().collect();
        let binary = |c: &char| c.is_alphanumeric() || matches!(c, ')' | ']' | '%');
        let negative = before.first() == Some(&'-') && !before.get(1).is_some_and(binary);
        let (mut digits, mut dots) = (String::new(), 0);
        while at < chars.len() {
            match chars[at] {
                c if c.is_ascii_digit() => digits.push(c),
                ',' if digit(at + 1) && dots == 0 => {}
                '.' if digit(at + 1) && dots == 0 => {
                    dots += 1;
                    digits.push('.');
                }
                _ => break,
            }
            at += 1;
        }
        found.push(shortest(&digits, negative));
    }
    found
}

fn shortest(digits: &str, negative: bool) -> String {
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let (whole, fraction) = (whole.trim_start_matches('0'), fraction.trim_end_matches('0'));
    let dot = if fraction.is_empty() { "" } else { "." };
    match [if whole.is_empty() { "0" } else { whole }, dot, fraction].concat() {
        zero if zero == "0" => zero,
        number if negative => format!("-{number}"),
        number => number,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_as_people_write_them() {
        let all = |text| numbers(text).join(" ");
        assert_eq!(all("It costs $1,234.50, or 007."), "1234.5 7");
        assert_eq!(all("-3, \u{2212}4, -$5, $-6, 10-7, x-8, (-9) and -0.0"), "-3 -4 -5 -6 10 7 8 -9 0");
        assert_eq!(all(".5 0.50 1. 1.2.3 1,2, 3..."), "0.5 0.5 1 1.2 0.3 12 3");
        assert_eq!(all(""), "");
        assert_eq!(all("no number ... $ - ,"), "");
        assert_eq!(all("100000000000000000000001"), "100000000000000000000001");
        assert_eq!(all("٤٢"), "", "digits of other scripts are letters");
    }

    #[test]
    fn gsm8k_reads_the_mark_or_the_last_number() {
        assert_eq!(gsm8k("3 + 4 = 7\n#### 7", true).unwrap(), "7");
        assert_eq!(gsm8k("#### 5 no, wait\n####$1,000. That is 2 lines", false).unwrap(), "1000");
        assert_eq!(gsm8k("so 3 + 4 = 7.", false).unwrap(), "7");
        assert_eq!(gsm8k("so 3 + 4 = 7.", true), None);
        assert_eq!(gsm8k("12 ####", false).unwrap(), "12");
        assert_eq!(gsm8k("", false), None);
    }
}
