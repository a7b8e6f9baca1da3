//! Multiple choice: the choice that is likeliest behind the question.
//!
//! ```text
//! ll_c     = ln pi(delimiter + choice c | question)
//! acc      = mean [argmax ll_c = gold]
//! acc_norm = mean [argmax ll_c / (characters of choice c) = gold]
//! ```
//!
//! `process_results` and `construct_requests` for `multiple_choice` in the harness's `api/task.py`: the delimiter is a
//! space and counts in no length, the first of equals wins. A gold answer that is none of the choices is an error here,
//! there a wrong answer.

use serde_json::{Value, json};

use super::encode::Encoder;
use super::file::{self, CHOICES, GOLD, QUESTION, Rows, Source};
use super::stats::{argmax, mean};
use super::{Kind, Outcome, Said, Tokens};
use crate::data::{Example, Object, Tokenizer};
use crate::error::{Place, Result};

pub(super) const NAME: &str = "choice";

struct Item {
    question: String,
    choices: Vec<String>,
    gold: usize,
}

struct Choice {
    path: std::path::PathBuf,
    delimiter: String,
    /// With the place of each.
    items: Vec<(Place, Item)>,
}

pub(super) fn open(mut rows: Rows) -> Result<Box<dyn Kind>> {
    let question = Source::new(&rows.file, rows.options.prompt.take(), QUESTION)?;
    let items = rows.items(|row| {
        let choices = choices(row)?;
        Ok(Item { question: question.of(row)?, gold: gold(file::column(row, GOLD)?, &choices)?, choices })
    })?;
    let delimiter = rows.options.delimiter.take().unwrap_or(" ".into());
    Ok(Box::new(Choice { path: rows.path, delimiter, items }))
}

fn choices(row: &Object) -> Result<Vec<String>, String> {
    let column = file::column(row, CHOICES)?;
    let texts = column.as_array().and_then(|list| list.iter().map(|text| text.as_str().map(str::to_string)).collect());
    let texts: Vec<String> = texts.ok_or_else(|| format!("choices is {column}, expected a list of texts"))?;
    if let Some(empty) = texts.iter().position(|text| text.is_empty()) {
        return Err(format!("choice {empty} (counted from 0) is empty; acc_norm divides by its characters"));
    }
    match texts.len() {
        0 | 1 => Err(format!("{} choices, expected at least two", texts.len())),
        _ => Ok(texts),
    }
}

/// An index from 0, the text of a choice, or a letter or digits where no choice reads like that.
fn gold(value: &Value, choices: &[String]) -> Result<usize, String> {
    let by_name = |name: &str| {
        let letter = |c: char| c.is_ascii_uppercase().then(|| (c as u8 - b'A') as usize);
        let single = || name.chars().next().filter(|_| name.len() == 1).and_then(letter);
        choices.iter().position(|choice| choice == name).or_else(single).or_else(|| name.parse().ok())
    };
    let found = match value {
        Value::String(name) => by_name(name),
        _ => value.as_u64().and_then(|index| usize::try_from(index).ok()),
    };
    found.filter(|index| *index < choices.len()).ok_or_else(|| {
        format!(
            "the gold answer {value} is none of {} choices: expected an index from 0, a letter or a choice's text",
            choices.len()
        )
    })
}

impl Kind for Choice {
    fn name(&self) -> &'static str {
        NAME
    }

    fn metrics(&self) -> &'static [&'static str] {
        &["acc", "acc_norm"]
    }

    fn tokens(&self, encoder: &Encoder) -> Result<Tokens> {
        let example = |(row, (place, item)): (usize, &(Place, Item))| {
            let at = file::at(&self.path, *place);
            let pair = |(c, choice): (usize, &String)| {
                let continuation = [&self.delimiter[..], choice].concat();
                let pair = encoder.pair(&item.question, &continuation)?;
                pair.map_err(|why| at(format!("choice {c} (counted from 0) cannot be scored: {why}")))
            };
            let sequences = item.choices.iter().enumerate().map(pair).collect::<Result<_>>()?;
            Ok(Example { row, sequences, ..Example::default() })
        };
        let examples = self.items.iter().enumerate().map(example).collect::<Result<_>>()?;
        Ok(Tokens { examples, ..Tokens::default() })
    }

    fn outcome(&self, _: &Tokenizer, _: &Tokens, said: &Said) -> Result<Outcome> {
        let (mut right, mut right_norm, mut log) = (Vec::new(), Vec::new(), Vec::new());
        for ((_, item), choices) in self.items.iter().zip(&said.logps) {
            let lls: Vec<f64> = choices.iter().map(|logps| logps.iter().map(|x| f64::from(*x)).sum()).collect();
            let per_char = lls.iter().zip(&item.choices).map(|(ll, choice)| ll / choice.chars().count() as f64);
            let (pred, pred_norm) = (argmax(&lls), argmax(&per_char.collect::<Vec<_>>()));
            right.push(f64::from(u8::from(pred == item.gold)));
            right_norm.push(f64::from(u8::from(pred_norm == item.gold)));
            let line = json!({"gold": item.gold, "logps": lls, "acc": right.last(), "acc_norm": right_norm.last()});
            log.push(line.as_object().expect("it is one").clone());
        }
        Ok(Outcome::new(NAME, vec![mean("acc", &right), mean("acc_norm", &right_norm)], log))
    }
}
