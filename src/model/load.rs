//! Checkpoints in and out.

use super::arch::{Checkpoint, Slot};
use super::init::draw;
use super::{Adapter, Head, Model, Param};
use crate::checkpoint::{TensorSource, Weights};
use crate::device::Device;
use crate::error::{Error, Result};

/// What the file calls a tensor: others may spell it differently, and a tied file may hold the embedding, the head,
/// or both.
pub fn found_name(checkpoint: &Checkpoint, weights: &Weights, name: &str) -> String {
    let architecture = checkpoint.architecture;
    let place = |slot| (architecture.naming)(&checkpoint.spec, slot, 0).tensor;
    let mut names = architecture.spellings(name);
    if checkpoint.stored_head == Head::Tied && name == place(Slot::Embedding) {
        names.extend(architecture.spellings(&place(Slot::Head)));
    }
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    weights.first_of(&names).unwrap_or(name).to_string()
}

/// Tensors that a file may have and nobody needs.
fn redundant(checkpoint: &Checkpoint, name: &str) -> bool {
    let architecture = checkpoint.architecture;
    let head = (architecture.naming)(&checkpoint.spec, Slot::Head, 0).tensor;
    let unread = checkpoint.stored_head == Head::Tied || checkpoint.stored_head != checkpoint.spec.head;
    (unread && architecture.spellings(&head).iter().any(|head| head == name)) || architecture.is_buffer(name)
}

/// Fills a model from its checkpoint. Every weight must be there with the shape that the config implies, and the
/// file may hold nothing that the config does not know: both show that config and weights belong together.
pub fn load<D: Device>(device: &D, checkpoint: &Checkpoint, weights: &Weights, model: &mut Model<D>) -> Result<()> {
    let mut used = Vec::new();
    let mut reader = Reader::default();
    let (fresh, adapter) = (checkpoint.drawn_head(), checkpoint.adapter_head());
    if checkpoint.bf16 && !weights.matrices_are_bf16() {
        // Frozen matrices have room for bfloat16.
        return Err(Error::file(&checkpoint.dir, "has other weights than a moment ago; start again"));
    }
    for param in model.params_mut() {
        if let Some((name, seed)) = &fresh
            && param.name == *name
        {
            draw(device, param, *seed)?;
            continue;
        }
        let name = found_name(checkpoint, weights, &param.stored.tensor);
        if let Some(adapter) = adapter.filter(|_| param.name == checkpoint.score_name()) {
            let mut head = Vec::new();
            adapter.read_head(&mut head)?;
            param.write(device, &head)?;
            used.push(name);
            continue;
        }
        param.write(device, reader.read(weights, &name, param)?)?;
        used.push(name);
    }
    model.fill_adapters(device, &checkpoint.adapters)?;
    match weights.names().find(|name| !used.iter().any(|u| u == name) && !redundant(checkpoint, name)) {
        None => model.fill_tables(device),
        Some(name) => {
            let detail =
                format!("\"{name}\" has no place in the model that config.json describes; do they belong together?");
            Err(Error::file(weights.path_of(name), detail))
        }
    }
}

impl Checkpoint {
    /// The weight that is drawn and not loaded, and its seed.
    pub fn drawn_head(&self) -> Option<(String, u64)> {
        self.fresh_head.map(|seed| (self.score_name(), seed))
    }

    fn score_name(&self) -> String {
        (self.architecture.naming)(&self.spec, Slot::Score, 0).name()
    }
}

/// Reads weights one after the other: at most one tensor and one weight that is a part of it are in memory.
#[derive(Default)]
pub struct Reader {
    tensor: Vec<f32>,
    weight: Vec<f32>,
}

impl Reader {
    /// The weight's values, from the tensor `name` of a file that keeps it as [`Param::stored`] says.
    pub fn read<D: Device>(&mut self, weights: &Weights, name: &str, param: &Param<D>) -> Result<&[f32]> {
        let shape = param.stored.shape(&param.shape());
        self.tensor.resize(shape.iter().product(), 0.0);
        weights.read(name, &shape, &mut self.tensor)?;
        if param.stored.is_plain() {
            return Ok(&self.tensor);
        }
        self.weight.resize(param.value.len(), 0.0);
        param.stored.extract(&self.tensor, param.matrix_shape(), &mut self.weight);
        Ok(&self.weight)
    }
}

/// Identity of a model: its weights as stored, and what its config makes of them.
pub fn fingerprint(checkpoint: &Checkpoint, weights: &Weights) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(format!("{:?}", checkpoint.spec).as_bytes());
    let mut model = checkpoint.dry();
    let params = model.params_mut();
    let fresh = checkpoint.drawn_head();
    if let Some((name, seed)) = &fresh {
        hasher.update(format!("{name} {seed}").as_bytes());
    }
    for (tensor, _) in by_tensor(&params) {
        if fresh.as_ref().is_some_and(|(name, _)| name == tensor) {
            continue;
        }
        weights.hash_into(&found_name(checkpoint, weights, tensor), &mut hasher);
    }
    for Adapter { file, weight, .. } in &checkpoint.adapters {
        hasher.update(&weight.to_le_bytes());
        file.hash_into(&mut hasher);
    }
    hasher.finalize()
}

/// What to write, under the checkpoint's names.
pub fn sources<'a, D: Device>(device: &'a D, params: &'a [&mut Param<D>]) -> Vec<TensorSource<'a>> {
    let source = |(tensor, parts): (&str, Vec<&'a Param<D>>)| TensorSource {
        name: tensor.to_string(),
        shape: parts[0].stored.shape(&parts[0].shape()),
        fill: Box::new(move |out: &mut [f32]| {
            if let [param] = parts[..]
                && param.stored.is_plain()
            {
                return param.read(device, out);
            }
            let mut weight = Vec::new();
            // What no part has is 0.
            out.fill(0.0);
            parts.iter().try_for_each(|param| {
                weight.resize(param.value.len(), 0.0);
                param.read(device, &mut weight)?;
                param.stored.insert(&weight, param.matrix_shape(), out);
                Ok(())
            })
        }),
    };
    by_tensor(params).into_iter().map(source).collect()
}

/// Weights by the tensor that holds them, in the order of the first of each.
fn by_tensor<'a, D: Device>(params: &'a [&mut Param<D>]) -> Vec<(&'a str, Vec<&'a Param<D>>)> {
    let mut tensors: Vec<(&str, Vec<&Param<D>>)> = Vec::new();
    for param in params {
        let tensor = param.stored.tensor.as_str();
        match tensors.iter_mut().find(|(name, _)| *name == tensor) {
            Some((_, parts)) => parts.push(param),
            None => tensors.push((tensor, vec![param])),
        }
    }
    tensors
}
