//! Offline merging, in f64: mergekit's methods and PEFT's rules, with masks from the file.

use cuvee::merge::peft_rules::{self, MajoritySign};
use cuvee::merge::{Source, Tensor, Value, find, merge_tensor};
use libtest_mimic::Failed;
use serde_json::Value as Json;

use super::{Tally, cases, close, numbers, text};

pub fn merge(file: &Json, tally: &mut Tally) -> Result<(), Failed> {
    for case in cases(file)? {
        let (name, method) = (text(case, "name")?, text(case, "method")?);
        let found = match method {
            // Kept in the file as the mistake that it is.
            "breadcrumbs_mergekit_bug" => {
                tally.skip("a bug of mergekit before 0.1.5".into());
                continue;
            }
            _ if method.ends_with("_peft") => of_peft(case, method)?,
            _ => of_mergekit(case, method.trim_end_matches("_mergekit"))?,
        };
        close(name, &found, &flat(&case["result"])?)?;
        tally.checked += 1;
    }
    Ok(())
}

/// All numbers of nested arrays, row-major.
fn flat(value: &Json) -> Result<Vec<f64>, Failed> {
    match value.as_array() {
        Some(rows) if rows.iter().any(Json::is_array) => {
            Ok(rows.iter().map(flat).collect::<Result<Vec<_>, _>>()?.concat())
        }
        _ => Ok(numbers(value)?),
    }
}

fn shape(value: &Json) -> Vec<usize> {
    let inner = value.as_array().map(|rows| (rows.len(), rows.first()));
    inner.map_or(vec![], |(len, first)| [vec![len], first.map_or(vec![], shape)].concat())
}

fn tensors(case: &Json, key: &str) -> Result<Vec<Vec<f64>>, Failed> {
    case[key].as_array().ok_or_else(|| format!("a case has no {key}"))?.iter().map(flat).collect()
}

/// Words that make a sampler keep what a mask keeps, whatever the probability below 1.
fn words(masks: &[Vec<f64>]) -> impl Fn(usize, usize, &mut [u32]) + Sync {
    |model, start, out| {
        out.iter_mut()
            .zip(&masks[model][start..])
            .for_each(|(word, kept)| *word = if *kept == 1.0 { 0 } else { u32::MAX });
    }
}

fn of_mergekit(case: &Json, method: &str) -> Result<Vec<f64>, Failed> {
    let (base, models, config) = (flat(&case["base"])?, tensors(case, "models")?, &case["config"]);
    let masks = if case["masks"].is_array() { tensors(case, "masks")? } else { vec![] };
    let (base, models): (&[f64], Vec<&[f64]>) = (&base, models.iter().map(Vec::as_slice).collect());
    let tensor = Tensor {
        shape: shape(&case["base"]),
        base: (method != "linear").then_some(&base as &dyn Source<f64>),
        models: models.iter().map(|model| model as &dyn Source<f64>).collect(),
    };
    let given = |name: &str, model: Option<usize>| {
        let key = if name == "weight" { "weights" } else { name };
        let value = match (&config[key], model) {
            (Json::Array(each), Some(model)) => &each[model],
            (value, _) => value,
        };
        Ok(match value {
            Json::Bool(on) => Some(Value::Switch(*on)),
            Json::Number(number) => number.as_f64().map(Value::Number),
            Json::String(name) if name.starts_with("inv_") => Some("inverse_density".into()),
            Json::String(name) => Some(name.as_str().into()),
            _ => None,
        })
    };
    let entry = find(method)?;
    let values = entry.resolve(tensor.models.len(), given)?;
    Ok(merge_tensor(entry, &tensor, &values, &words(&masks))?)
}

fn of_peft(case: &Json, method: &str) -> Result<Vec<f64>, Failed> {
    let (models, weights) = (tensors(case, "models")?, numbers(&case["config"]["weights"])?);
    let models: Vec<&[f64]> = models.iter().map(Vec::as_slice).collect();
    let density = case["config"]["density"].as_f64().ok_or("a case has no density")?;
    let masks = if case["masks"].is_array() { tensors(case, "masks")? } else { vec![] };
    let (words, total) = (words(&masks), MajoritySign::Total);
    Ok(match method {
        "ties_peft" => peft_rules::ties(&models, &weights, density, total)?,
        "magnitude_prune_peft" => peft_rules::magnitude_prune(&models, &weights, density)?,
        "dare_linear_peft" => peft_rules::dare_linear(&models, &weights, density, &words)?,
        "dare_ties_peft" => peft_rules::dare_ties(&models, &weights, density, total, &words)?,
        _ => return Err(format!("no rule is known as {method}").into()),
    })
}
