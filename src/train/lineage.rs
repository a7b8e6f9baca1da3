//! Where a trained model comes from.

use std::path::PathBuf;

use serde_json::{Map, Value};

use super::settings::Settings;
use super::task::Task;
use crate::error::Result;
use crate::lineage::{Lineage, Parent, config_hash};
use crate::model::Init;

/// The lineage of what a run writes; reads the weights of its model and references once, for their hashes.
pub fn lineage(settings: &Settings, task: &Task, course: Map<String, Value>) -> Result<Lineage> {
    let model = match settings.init {
        Init::Checkpoint => Parent::open("model", &settings.model)?,
        Init::Random { .. } => Parent::named("config", &settings.model, Some(config_hash(&settings.model)?)),
    };
    let reference = |path: &PathBuf| match path.is_dir() {
        true => Parent::open("ref", path),
        // A cache of what a model said; the hash of that model is not this kind of hash.
        false => Ok(Parent::named("ref", path, None)),
    };
    let references = settings.references.models.iter().map(reference).collect::<Result<Vec<_>>>()?;
    let start = settings.lora.as_ref().and_then(|lora| lora.start.as_ref());
    let others = [("base", settings.base_model.as_ref()), ("tau", settings.tau_model.as_ref()), ("start", start)];
    let others = others.into_iter().filter_map(|(role, dir)| dir.map(|dir| Parent::open(role, dir)));
    let others = others.collect::<Result<Vec<_>>>()?;
    let adapter = |(dir, weight): &(PathBuf, f64)| Ok(Parent::open("adapter", dir)?.weighted(*weight));
    let adapters = settings.adapters.iter().map(adapter).collect::<Result<Vec<_>>>()?;
    let mut lineage = Lineage::of("train").with_arguments(course).with_parent(model);
    lineage = lineage.with_parents(others).with_parents(adapters).with_parents(references).with_data(
        "dataset",
        &settings.dataset,
        task.train.rows,
    )?;
    match (&settings.eval_dataset, &task.eval) {
        (Some(path), Some(eval)) => lineage.with_data("eval_dataset", path, eval.rows),
        _ => Ok(lineage),
    }
}
