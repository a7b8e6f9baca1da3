//! Checkpoints of a run: the model as Hugging Face stores it, and beside it what continuing needs, bit for bit.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::alarm::Watch;
use super::policy::{Policy, trained};
use super::task::Task;
use crate::checkpoint::hf::{copy_companions, write_config};
use crate::checkpoint::json::{read_json, write_json};
use crate::checkpoint::peft;
use crate::checkpoint::{SaveDtype, TensorSource, Weights, save_safetensors};
use crate::error::{At, Error, Result};
use crate::model::{Reader, VALUE_HEAD, sources};
use crate::ops::Backend;

const STATE: &str = "cuvee_state.json";
const TENSORS: &str = "optimizer.safetensors";
const MODEL: &str = "model.safetensors";
/// What a master is called that is not the whole weight.
const MASTER: &str = "master";
/// How the weights of a reference that follows the policy are called in [`TENSORS`].
const REFERENCE: &str = "reference.";

/// Where a run stands. Random choices are functions of seed and step, so there is no more to it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct RunState {
    /// Optimizer steps done.
    pub step: u64,
    pub num_tokens: u64,
    /// Tokens that the policy wrote to be trained on.
    #[serde(default)]
    pub sampled_tokens: u64,
    /// What the objective remembers from step to step.
    #[serde(default)]
    pub objective: Vec<f64>,
    /// What evaluations saw so far.
    #[serde(default)]
    pub watch: Watch,
    /// Every setting that decides the course of the run, as the user writes it.
    pub course: Map<String, Value>,
}

/// Writes the trained model as a Hugging Face folder into `dir`, or the trained adapter as PEFT does, in f32.
pub fn save_model<B: Backend>(
    device: &B,
    policy: &mut Policy<B>,
    task: &Task,
    dir: &Path,
    dtype: SaveDtype,
) -> Result<()> {
    let source = &task.checkpoint.dir;
    if let Some(lora) = &task.lora {
        let config = policy.model.adapter_config(lora, &source.to_string_lossy());
        let params = policy.model.adapter_mut();
        let mut tensors = sources(device, &params);
        tensors.iter_mut().for_each(|tensor| tensor.name = peft::saved_name(&tensor.name));
        peft::write(dir, &config, &tensors)?;
        return copy_companions(source, dir);
    }
    let params = policy.model.params_mut();
    save_safetensors(&dir.join(MODEL), &sources(device, &params), dtype)?;
    write_config(source, dir, dtype, task.checkpoint.reward_model(&task.tokenizer).as_ref())?;
    copy_companions(source, dir)
}

/// Writes what continuing needs into `dir`: moments, full-precision weights where the model was rounded, masters that are
/// not the whole weight, state.
pub fn save_state<B: Backend>(
    device: &B,
    policy: &mut Policy<B>,
    state: &RunState,
    dir: &Path,
    dtype: SaveDtype,
) -> Result<()> {
    let adapter = !policy.model.adapter_mut().is_empty();
    let (model, optimizer) = (&mut policy.model, &policy.optimizer);
    let moving = policy.moving.as_mut().map(|moving| moving.model.params_mut()).unwrap_or_default();
    let params = trained(model, &mut policy.value);
    let rounded = dtype != SaveDtype::F32 && !adapter;
    let mut tensors = if rounded { sources(device, &params) } else { Vec::new() };
    let head = params.iter().filter(|param| param.name == VALUE_HEAD && !rounded);
    tensors.extend(head.map(|param| TensorSource {
        name: param.name.clone(),
        shape: param.shape(),
        fill: Box::new(move |out: &mut [f32]| param.read(device, out)),
    }));
    let lazy = params.iter().filter(|param| param.lazy);
    tensors.extend(lazy.filter_map(|param| param.master.as_ref().map(|master| (param, master))).map(
        |(param, master)| TensorSource {
            name: format!("{}.{MASTER}", param.name),
            shape: param.shape(),
            fill: Box::new(move |out: &mut [f32]| device.read_f32(master.view(), out)),
        },
    ));
    for (param, state) in params.iter().zip(optimizer.states()) {
        for (what, tensor) in state {
            tensors.push(TensorSource {
                name: format!("{}.{what}", param.name),
                shape: param.shape(),
                fill: Box::new(move |out: &mut [f32]| device.read_f32(tensor.view(), out)),
            });
        }
    }
    for param in &moving {
        tensors.push(TensorSource {
            name: format!("{REFERENCE}{}", param.name),
            shape: param.shape(),
            fill: Box::new(move |out: &mut [f32]| param.read(device, out)),
        });
    }
    save_safetensors(&dir.join(TENSORS), &tensors, SaveDtype::F32)?;
    write_json(&dir.join(STATE), state)
}

/// Reads where a checkpoint stands, and refuses one of another course.
pub fn read_state(dir: &Path, course: &Map<String, Value>) -> Result<RunState> {
    let path = dir.join(STATE);
    if !path.exists() {
        let detail = format!("holds no {STATE}; --resume-from-checkpoint takes a checkpoint-N folder of cuvee");
        return Err(Error::file(dir, detail));
    }
    let state: RunState = serde_json::from_value(read_json(&path)?).at(&path)?;
    let of = |course: &Map<String, Value>, key: &String| course.get(key).cloned().unwrap_or_default();
    let differs = |key: &&String| of(&state.course, key) != of(course, key);
    match course.keys().chain(state.course.keys()).find(differs) {
        None => Ok(state),
        Some(key) => {
            let (then, now) = (of(&state.course, key), of(course, key));
            let detail = format!(
                "the checkpoint in {} was made with {then}, this run has {now}; give the same, or start a new run in another --output-dir",
                dir.display()
            );
            Err(Error::option(format!("--{}", key.replace('_', "-")), detail))
        }
    }
}

/// Puts weights and moments of a checkpoint into a policy; an adapter's, into one whose model is loaded.
pub fn load_state<B: Backend>(device: &B, policy: &mut Policy<B>, dir: &Path, dtype: SaveDtype) -> Result<()> {
    let tensors = Weights::open_file(&dir.join(TENSORS))?;
    let adapter = !policy.model.adapter_mut().is_empty();
    let model_file = match dtype {
        _ if adapter => &Weights::open_file(&dir.join(peft::WEIGHTS))?,
        SaveDtype::F32 => &Weights::open(dir)?,
        SaveDtype::Bf16 | SaveDtype::F16 => &tensors,
    };
    let (model, optimizer) = (&mut policy.model, &mut policy.optimizer);
    let (mut reader, mut values) = (Reader::default(), Vec::new());
    let mut states = optimizer.states_mut();
    for param in trained(model, &mut policy.value) {
        // A value head is in no model's file.
        let value = param.name == VALUE_HEAD;
        let file = if value { &tensors } else { model_file };
        let saved = &param.stored.tensor;
        let saved = if adapter && !value { peft::saved_name(saved) } else { saved.clone() };
        param.write(device, reader.read(file, &saved, param)?)?;
        let (name, shape) = (format!("{}.{MASTER}", param.name), param.shape());
        if let (true, Some(master)) = (param.lazy, &mut param.master) {
            values.resize(master.len(), 0.0);
            tensors.read(&name, &shape, &mut values)?;
            device.write_f32(&values, master.view_mut())?;
        }
        let state = states.next().expect("one state for each trained weight");
        for (what, tensor) in state {
            values.resize(tensor.len(), 0.0);
            tensors.read(&format!("{}.{what}", param.name), &param.shape(), &mut values)?;
            device.write_f32(&values, tensor.view_mut())?;
        }
    }
    if let Some(moving) = &mut policy.moving {
        for param in moving.model.params_mut() {
            values.resize(param.value.len(), 0.0);
            tensors.read(&format!("{REFERENCE}{}", param.name), &param.shape(), &mut values)?;
            param.write(device, &values)?;
        }
        moving.model.fill_tables(device)?;
    }
    policy.model.fill_tables(device)
}
