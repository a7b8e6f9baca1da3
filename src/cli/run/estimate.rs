//! What a run will take, before it starts: time as earlier seeds took it, or guessed from the arithmetic; memory as `cuvee plan` says.

use std::fmt::Write;
use std::path::Path;

use toml::{Table, Value};

use super::plan::Plan;
use super::recipe::{Kind, Target};
use crate::cli::{Command, doctor, parse, recipe as keys, train};
use crate::error::Result;
use crate::lab::Found;
use crate::machine::human;
use crate::train::{Assumed, Memory, Task, Workload};

/// What share of the processor's peak a run of a small model comes to, by experience.
const SHARE: f64 = 0.15;
/// Sampling, judging and looking at what is sampled beside a step's own arithmetic, by experience.
const ROLLOUTS: f64 = 5.0;

/// Of one job.
#[derive(Clone, Debug, Default)]
struct Cost {
    /// Seconds, and whether a seed has taken them.
    seconds: Option<(f64, bool)>,
    /// Bytes, and whether everything that it will read was there to be looked at.
    memory: Option<(usize, bool)>,
}

/// A line for each variant of a stage: what is to be done of it, how long it takes and what memory; `wanted` jobs alone.
pub fn table(plan: &Plan, wanted: &[bool], at_once: usize) -> Result<String> {
    let mut rows: Vec<[String; 5]> = vec![["stage", "kind", "to do", "time, each", "memory"].map(String::from)];
    let (mut total, mut unknown, mut speed) = (0.0, false, None);
    for (at, stage) in plan.recipe.stages.iter().enumerate() {
        for (v, variant) in stage.variants.iter().enumerate() {
            let of: Vec<usize> =
                (0..plan.made.len()).filter(|m| (plan.made[*m].stage, plan.made[*m].variant) == (at, v)).collect();
            let found: Vec<Found> = of.iter().map(|m| plan.jobs[*m].found()).collect::<Result<_>>()?;
            let open =
                of.iter().zip(&found).filter(|(m, found)| wanted[**m] && !matches!(found, Found::Done(_))).count();
            let cost = cost(plan, of[0], &found, &mut speed);
            match cost.seconds {
                Some((seconds, _)) => total += seconds * open as f64,
                None => unknown |= open > 0,
            }
            let changed = found.iter().any(|found| matches!(found, Found::Other(_)));
            let to_do = match (open, changed) {
                (0, _) if wanted[of[0]] => "done".into(),
                (0, _) => "left alone".into(),
                (n, true) => format!("{n} of {}, changed", of.len()),
                (n, false) => format!("{n} of {}", of.len()),
            };
            let name = if stage.kind == Kind::Eval {
                format!("{}: {}", stage.name, variant.name)
            } else {
                variant.name.clone()
            };
            rows.push([name, stage.kind.name().into(), to_do, time(&cost), memory(&cost)]);
        }
    }
    let mut text = aligned(&rows);
    let least = if unknown { "at least " } else { "" };
    let _ = writeln!(text, "all that is to do: {least}{}", duration(total / at_once as f64));
    text += "took: as earlier runs of the stage; guess: from its arithmetic; ?: not known before it has run once; memory as `cuvee plan` \
             says, + without what is not made yet\n";
    Ok(text)
}

fn time(cost: &Cost) -> String {
    match cost.seconds {
        None => "?".into(),
        Some((seconds, true)) => format!("took {}", duration(seconds)),
        Some((seconds, false)) => format!("guess {}", duration(seconds)),
    }
}

fn memory(cost: &Cost) -> String {
    match cost.memory {
        None => String::new(),
        Some((bytes, true)) => human(bytes),
        Some((bytes, false)) => format!("{} +", human(bytes)),
    }
}

pub fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 10.0 => format!("{s:.1} s"),
        s if s < 90.0 => format!("{s:.0} s"),
        s => format!("{:.0} min", s / 60.0),
    }
}

fn aligned(rows: &[[String; 5]]) -> String {
    let width = |c: usize| rows.iter().map(|row| row[c].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..5).map(width).collect();
    let line = |row: &[String; 5]| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        format!("{}\n", cells.collect::<Vec<_>>().join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

fn cost(plan: &Plan, made: usize, found: &[Found], speed: &mut Option<f64>) -> Cost {
    let took: Vec<f64> = found
        .iter()
        .filter_map(|found| match found {
            Found::Done(seconds) | Found::Other(Some(seconds)) => Some(*seconds),
            _ => None,
        })
        .collect();
    let seconds = (!took.is_empty()).then(|| (took.iter().sum::<f64>() / took.len() as f64, true));
    // What is done is not looked at again.
    if !plan.stage(made).kind.trains() || found.iter().all(|found| matches!(found, Found::Done(_))) {
        return Cost { seconds, memory: None };
    }
    let Some((bytes, flops, whole)) = work(plan, made) else { return Cost { seconds, memory: None } };
    let seconds = seconds.or_else(|| {
        let speed = *speed.get_or_insert_with(doctor::processor_speed);
        let sampled = plan.variant(made).table.contains_key("reward");
        Some((flops / speed / SHARE * if sampled { ROLLOUTS } else { 1.0 }, false))
    });
    Cost { seconds, memory: Some((bytes, whole)) }
}

/// Bytes and arithmetic of a run of `cuvee train`; of one whose inputs are not there yet without those but the model, which has the
/// sizes of what it starts from.
fn work(plan: &Plan, made: usize) -> Option<(usize, f64, bool)> {
    let there = plan.made[made].reads.iter().all(|read| Path::new(&read.path).exists());
    let mut table = Table::new();
    let mut root = |path: &str| Ok(model_of(plan, made, path));
    let filled = keys::with_paths(&keys::train(), &plan.variant(made).table, &mut root).ok()?;
    // What decides sizes, and needs nothing that is made.
    let kept =
        ["model", "objective", "init", "max_steps", "num_train_epochs", "per_device_train_batch_size", "max_length"];
    let kept: &[&str] = if there { &[] } else { &kept };
    table.extend(filled.into_iter().filter(|(key, _)| there || kept.contains(&key.as_str())));
    if !there {
        let scores = table.get("objective").and_then(Value::as_str) == Some("reward");
        table.insert("objective".into(), if scores { "reward" } else { "sft" }.into());
        table.insert("max_length".into(), Value::Integer(ASSUMED));
    }
    let args = ["cuvee", "plan"].map(Into::into).into_iter().chain(keys::flags_of(&table));
    let Command::Plan(args) = parse(args).ok()?.command else { return None };
    let mut settings = train::from_run(&args.run, false).ok()?;
    let found = match &args.dataset {
        Some(dataset) => {
            settings.dataset = dataset.clone();
            let task = Task::prepare(&settings).ok()?;
            let settings = task.refine(&settings);
            Workload::new(&task, &settings).plan(&settings).ok()?
        }
        None => {
            let assumed = Assumed::new(&settings, args.run.data.max_length).ok()?;
            assumed.workload(&settings).plan(&settings).ok()?
        }
    };
    let steps = found.max_steps.or(settings.max_steps)?;
    Some((found.peak_of(Memory::Host), found.flops_per_step * steps as f64, there))
}

/// Tokens of a row where the data is not there yet.
const ASSUMED: i64 = 64;

/// A path as it is, or where it will be; of a model that is not made yet what it starts from.
fn model_of(plan: &Plan, made: usize, path: &str) -> String {
    let seed = plan.made[made].seed;
    match plan.recipe.target(path) {
        Ok(Some((Target::Slice(at), rest))) => format!("{}{rest}", plan.sliced[at].path.display()),
        Ok(Some((Target::Made(stage, variant), rest))) => {
            let other = plan.of(stage, variant, seed);
            let out = &plan.made[other].out;
            if out.exists() {
                return format!("{}{rest}", out.display());
            }
            match plan.variant(other).table.get("model") {
                Some(Value::String(model)) => model_of(plan, other, model),
                _ => path.to_string(),
            }
        }
        _ => path.to_string(),
    }
}
