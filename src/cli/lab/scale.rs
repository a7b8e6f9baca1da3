//! `cuvee lab scale`: rewards of different units as one, in standard deviations of what a model writes:
//!
//! ```text
//! worth = sum over rewards of weight * z,   z = (reward - mean) / standard deviation,   min(0, z) of those below
//! ```
//!
//! Mean and deviation are those of the model's own completions, so that 0 is what it is worth and 1 how much that varies.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::Value as Json;
use toml::{Table, Value};

use super::drawn::{DrawnArgs, said};
use crate::checkpoint::write_file;
use crate::cli::args::count;
use crate::cli::device::{self, Job};
use crate::cli::recipe::{clean, relative};
use crate::error::{At, Error, Result};
use crate::ops::Backend;
use crate::progress::say;
use crate::rewards::{RewardSpec, Rewards};

#[derive(Debug, Clone, PartialEq, Args)]
#[command(after_help = "\
The result is a file of rewards for --reward and --gold-reward, each with center and scale. What is fluent or does not repeat itself is
no better for being more so: --below fluency counts it only where it is worse than the model's own mean.

Example:
  cuvee lab scale --model runs/sft --prompts heldout.jsonl --reward runs/gold --reward fluency:BASE=0.5 --below fluency --out gold.toml")]
pub struct ScaleArgs {
    #[command(flatten)]
    pub drawn: DrawnArgs,
    /// What is put on the scale, and its weight there: a reward model's folder, fluency:DIR of a language model, or a TOML file
    /// of rules; repeat the flag for several
    #[arg(long, value_name = "WHAT[=F]", value_parser = RewardSpec::parse, required = true)]
    pub reward: Vec<RewardSpec>,
    /// Name of a reward that counts nothing above the mean: min(0, z); repeat the flag for several
    #[arg(long, value_name = "NAME")]
    pub below: Vec<String>,
    /// Completions of each prompt
    #[arg(long, value_name = "N", default_value = "2", value_parser = count)]
    pub samples: usize,
    /// Where the rewards go
    #[arg(long, value_name = "FILE.toml")]
    pub out: PathBuf,
}

pub fn run(args: &ScaleArgs) -> Result<()> {
    let rewards = Rewards::open(&args.reward)?;
    let names = rewards.names();
    if let Some(unknown) = args.below.iter().find(|name| !names.contains(name)) {
        let detail = format!("there is no reward {unknown:?}; there are {}", names.join(", "));
        return Err(Error::option("--below", detail));
    }
    let mut tables = Vec::new();
    args.reward.iter().try_for_each(|spec| tables_of(spec, &args.out, &mut tables))?;
    let drawn = &args.drawn;
    let moments = device::run(&drawn.engine, drawn.precision.dtype, None, Scaling { args, rewards: &rewards })?;
    for ((table, name), (mean, deviation)) in tables.iter_mut().zip(&names).zip(moments) {
        if deviation.is_nan() || deviation <= 0.0 {
            let detail = format!("{name:?} is the same of every completion; there is no scale to put it on");
            return Err(Error::option("--reward", detail));
        }
        say(format_args!("{name}: mean {mean:.4}, standard deviation {deviation:.4}"));
        table.insert("name".into(), name.as_str().into());
        table.insert("center".into(), mean.into());
        table.insert("scale".into(), deviation.into());
        if args.below.contains(name) {
            table.insert("most".into(), 0.0.into());
        }
    }
    let file = Table::from_iter([("reward".to_string(), Value::Array(tables.into_iter().map(Value::Table).collect()))]);
    let text = format!("# Written by `cuvee lab scale`\n\n{}", toml::to_string(&file).expect("plain data"));
    write_file(&args.out, |out| out.write_all(text.as_bytes()))
}

struct Scaling<'a> {
    args: &'a ScaleArgs,
    rewards: &'a Rewards,
}

impl Job for Scaling<'_> {
    /// Mean and standard deviation of each reward.
    type Output = Vec<(f64, f64)>;

    fn run<B: Backend>(self, device: &B) -> Result<Self::Output> {
        let lines: Vec<Json> = self.args.drawn.draw(device, self.args.samples)?;
        Ok(said(device, &lines, self.rewards)?.iter().map(|of| moments(of)).collect())
    }
}

/// Of what is known.
fn moments(values: &[f64]) -> (f64, f64) {
    let known: Vec<f64> = values.iter().copied().filter(|x| !x.is_nan()).collect();
    let n = known.len() as f64;
    let mean = known.iter().sum::<f64>() / n;
    (mean, (known.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n).sqrt())
}

/// Keys of rewards that are paths.
const PATHS: [&str; 3] = ["file", "dir", "dirs"];

/// The tables that a spec stands for, in the order of its rewards, paths as seen from the folder of `out`.
fn tables_of(spec: &RewardSpec, out: &Path, tables: &mut Vec<Table>) -> Result<()> {
    let folder = out.parent().unwrap_or(Path::new(""));
    let from_there = |path: &Path| Value::from(relative(path, folder).to_string_lossy().into_owned());
    let table = |kind: &str, key: &str, value: Value| {
        Table::from_iter(
            [("kind", kind.into()), (key, value), ("weight", spec.weight.into())].map(|(k, v)| (k.into(), v)),
        )
    };
    if spec.fluency {
        tables.push(table("fluency", "dir", from_there(&spec.what)));
        return Ok(());
    }
    if spec.what.is_dir() {
        tables.push(table("model", "dirs", Value::Array(vec![from_there(&spec.what)])));
        return Ok(());
    }
    let text = std::fs::read_to_string(&spec.what).at(&spec.what)?;
    let file: Table = text.parse().at(&spec.what)?;
    let here = spec.what.parent().unwrap_or(Path::new(""));
    for mut table in file["reward"].as_array().into_iter().flatten().filter_map(Value::as_table).cloned() {
        if let Some(key) = ["center", "scale", "most", "command"].into_iter().find(|key| table.contains_key(*key)) {
            return Err(Error::file(&spec.what, format!("{key}: a reward with it cannot be put on another scale")));
        }
        for key in PATHS {
            let moved = |value: &Value| match value.as_str() {
                Some(path) => from_there(&clean(&here.join(path))),
                None => value.clone(),
            };
            if let Some(value) = table.get_mut(key) {
                *value = match &*value {
                    Value::Array(values) => Value::Array(values.iter().map(moved).collect()),
                    value => moved(value),
                };
            }
        }
        let weight =
            table.get("weight").map_or(1.0, |w| w.as_float().or(w.as_integer().map(|n| n as f64)).unwrap_or(1.0));
        table.insert("weight".into(), (weight * spec.weight).into());
        tables.push(table);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_says_nothing_does_not_count() {
        assert_eq!(moments(&[1.0, f64::NAN, 3.0]), (2.0, 1.0));
        assert!(moments(&[f64::NAN]).0.is_nan());
    }

    #[test]
    fn rules_keep_their_weights_and_find_their_files() {
        let folder = tempfile::tempdir().unwrap();
        let here = folder.path();
        std::fs::create_dir(here.join("rules")).unwrap();
        let path = here.join("rules/a.toml");
        std::fs::write(&path, "[[reward]]\nkind = 'lexicon'\nfile = '../words.tsv'\nweight = 2\n").unwrap();
        let mut tables = Vec::new();
        let spec = RewardSpec { what: path.clone(), weight: 0.5, fluency: false };
        tables_of(&spec, &here.join("out/gold.toml"), &mut tables).unwrap();
        assert_eq!(tables[0]["weight"].as_float(), Some(1.0));
        assert_eq!(tables[0]["file"].as_str().map(Path::new), Some(here.join("words.tsv").as_path()));
        std::fs::write(&path, "[[reward]]\nkind = 'length'\nunit = 'words'\nmin = 3\nscale = 2\n").unwrap();
        let message = tables_of(&spec, &here.join("gold.toml"), &mut tables).unwrap_err().to_string();
        assert!(message.contains("scale: a reward with it"), "{message}");
    }
}
