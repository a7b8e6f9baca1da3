//! One recipe with each reference alone and with the blends of all of them, over several seeds and numbers of pairs.
//!
//! Every arm is measured against the same anchor, the first reference: accuracy against an arm's own reference is another
//! number for every arm. It is measured after equally many steps, and where the policies have gone equally far from the anchor,
//! since an arm that holds its policy less tightly gets further in as many steps, and not because its reference is better.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::table::{Cell, Point, Table};
use crate::checkpoint::run_dir::is_finished;
use crate::error::{Error, Result};
use crate::objectives::mrpo::{Blend, Mean, RefClip, Weighting, Window};
use crate::objectives::ref_weights::Rule;
use crate::ops::Backend;
use crate::progress::say;
use crate::train::{self, References, Resume, Settings, evaluations};

/// How many rows of the data are trained on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pairs {
    Some(usize),
    All,
}

impl std::fmt::Display for Pairs {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Self::Some(pairs) => write!(f, "{pairs}"),
            Self::All => write!(f, "all"),
        }
    }
}

/// What is compared.
pub struct Comparison {
    /// Each arm is run with the settings' seed and as many less one that follow it.
    pub seeds: u64,
    pub pairs: Vec<Pairs>,
    /// Names of the arms that are run; empty means all.
    pub arms: Vec<String>,
}

/// One way to use the references.
struct Arm {
    name: String,
    references: References,
}

/// MRPO as released: the harmonic mean, weights by each pair's gaps, clipped to within 10 % of the anchor.
const RELEASED: Blend = Blend {
    mean: Mean::Harmonic,
    weights: Weighting::Arwc,
    clip: Some(RefClip { eps_max: 0.1, window: Window::MeanRefs }),
    ..UNIFORM
};
const UNIFORM: Blend = Blend {
    mean: Mean::Geometric,
    weights: Weighting::Step,
    clip: None,
    level: crate::objectives::mrpo::Level::Sequence,
    official_k2_swap: false,
};

/// Each reference alone, by the name of its folder, and the blends.
fn arms(models: &[PathBuf]) -> Vec<Arm> {
    let folder = |path: &Path| path.file_name().map_or("model".into(), |name| name.to_string_lossy().into_owned());
    let alone = models.iter().enumerate().map(|(k, model)| {
        let same = models.iter().filter(|other| folder(other) == folder(model)).count();
        let name = if same > 1 { format!("{} ({})", folder(model), k + 1) } else { folder(model) };
        Arm { name, references: References { models: vec![model.clone()], ..References::default() } }
    });
    let blends = [
        ("geometric", UNIFORM),
        ("harmonic", Blend { mean: Mean::Harmonic, ..UNIFORM }),
        ("arithmetic", Blend { mean: Mean::Arithmetic, ..UNIFORM }),
        ("multi-dpo", Blend { mean: Mean::MultiDpo, ..UNIFORM }),
        ("mrpo", RELEASED),
    ];
    let blends = blends.map(|(name, blend)| {
        let references = References { models: models.to_vec(), blend, rule: Rule::Uniform, moving: None };
        Arm { name: name.to_string(), references }
    });
    alone.chain(blends).collect()
}

fn chosen(models: &[PathBuf], wanted: &[String]) -> Result<Vec<Arm>> {
    let mut all = arms(models);
    if let Some(unknown) = wanted.iter().find(|name| all.iter().all(|arm| arm.name != **name)) {
        let known: Vec<&str> = all.iter().map(|arm| arm.name.as_str()).collect();
        return Err(Error::option("--arms", format!("there is no arm {unknown:?}; there are {}", known.join(", "))));
    }
    all.retain(|arm| wanted.is_empty() || wanted.contains(&arm.name));
    Ok(all)
}

/// Runs what is not there yet and puts it all into one table. `settings` are those of a run with all references; a comparison
/// that was interrupted goes on where it stopped.
pub fn compare<B: Backend>(
    device: &B,
    settings: &Settings,
    comparison: &Comparison,
    stop: &dyn Fn() -> bool,
) -> Result<Table> {
    let models = &settings.references.models;
    let arms = chosen(models, &comparison.arms)?;
    let mut table = Table::new(settings.max_steps, comparison.seeds);
    let all = comparison.pairs.len() * arms.len() * comparison.seeds as usize;
    let mut done = 0;
    for pairs in &comparison.pairs {
        for arm in &arms {
            let mut runs = Vec::new();
            for seed in settings.seed..settings.seed + comparison.seeds {
                let run = settings_of(settings, *pairs, arm, seed);
                if !is_finished(&run.output_dir) {
                    train::run(device, &run, stop)?;
                }
                let lines = evaluations(&run.output_dir)?;
                table.look_at(&lines);
                runs.push(points(&lines, &run.output_dir)?);
                done += 1;
                let last = runs.last().and_then(|run| run.last()).expect("a run evaluates at its end");
                let (accuracy, kl) = (100.0 * last.accuracy, last.kl);
                let name = &arm.name;
                say(format_args!(
                    "{done}/{all}: {pairs} pairs, {name}, seed {seed}: accuracy {accuracy:.1} %, KL {kl:.2}"
                ));
            }
            let single = arm.references.models.len() == 1;
            table.add(Cell { pairs: pairs.to_string(), arm: arm.name.clone(), single, runs });
        }
    }
    Ok(table)
}

fn settings_of(settings: &Settings, pairs: Pairs, arm: &Arm, seed: u64) -> Settings {
    let folder = arm.name.replace(|c: char| !c.is_ascii_alphanumeric() && c != '-' && c != '_', "-");
    let limit = match pairs {
        Pairs::Some(pairs) => Some(pairs),
        Pairs::All => settings.limit,
    };
    Settings {
        references: arm.references.clone(),
        anchor: settings.references.models.first().cloned(),
        output_dir: settings.output_dir.join(format!("{pairs}-pairs")).join(folder).join(format!("seed-{seed}")),
        seed,
        limit,
        resume: Some(Resume::Newest),
        keep_model: false,
        ..settings.clone()
    }
}

fn points(lines: &[Map<String, Value>], output: &Path) -> Result<Vec<Point>> {
    let point = |line: &Map<String, Value>| {
        let number = |key: &str| line.get(key).and_then(Value::as_f64);
        let missing =
            || Error::file(output, "its evaluations lack accuracy, margin or KL; delete the folder and compare again");
        let (accuracy, margin, kl) = (number("eval_accuracy"), number("eval_margin"), number("eval_kl"));
        let (Some(accuracy), Some(margin), Some(kl)) = (accuracy, margin, kl) else { return Err(missing()) };
        Ok(Point { step: number("step").unwrap_or(0.0), accuracy, margin, kl })
    };
    lines.iter().map(point).collect()
}
