//! Checkpoints in and out.

use super::arch::{Checkpoint, Slot};
use super::{Model, Options, Param};
use crate::checkpoint::{TensorSource, Weights};
use crate::device::{Device, Dry};
use crate::error::{Error, Result};

/// Where the file keeps a weight: a tied file may hold the embedding, the head, or both.
fn stored_name<'a>(checkpoint: &Checkpoint, weights: &Weights, name: &'a str, head: &'a str) -> &'a str {
    let embedding = (checkpoint.architecture.naming)(Slot::Embedding, 0);
    if checkpoint.spec.tied_head && name == embedding {
        return weights.first_of(&[name, head]).unwrap_or(name);
    }
    name
}

/// Tensors that a file may have and nobody needs.
fn redundant(checkpoint: &Checkpoint, name: &str) -> bool {
    let head = (checkpoint.architecture.naming)(Slot::Head, 0);
    (checkpoint.spec.tied_head && name == head) || name.ends_with("rotary_emb.inv_freq")
}

/// Fills a model from its checkpoint. Every weight must be there with the shape that the config implies, and the
/// file may hold nothing that the config does not know: both show that config and weights belong together.
pub fn load<D: Device>(device: &D, checkpoint: &Checkpoint, weights: &Weights, model: &mut Model<D>) -> Result<()> {
    let head = (checkpoint.architecture.naming)(Slot::Head, 0);
    let mut used = Vec::new();
    let mut values = Vec::new();
    for param in model.params_mut() {
        let name = stored_name(checkpoint, weights, &param.name, &head).to_string();
        values.resize(param.value.len(), 0.0);
        weights.read(&name, &param.shape(), &mut values)?;
        device.write_f32(&values, param.value.view_mut())?;
        used.push(name);
    }
    match weights.names().find(|name| !used.iter().any(|u| u == name) && !redundant(checkpoint, name)) {
        None => model.fill_tables(device),
        Some(name) => {
            let detail =
                format!("\"{name}\" has no place in the model that config.json describes; do they belong together?");
            Err(Error::file(weights.path_of(name), detail))
        }
    }
}

/// Identity of a model: its weights as stored, and what its config makes of them.
pub fn fingerprint(checkpoint: &Checkpoint, weights: &Weights) -> blake3::Hash {
    let head = (checkpoint.architecture.naming)(Slot::Head, 0);
    let mut hasher = blake3::Hasher::new();
    hasher.update(format!("{:?}", checkpoint.spec).as_bytes());
    let mut names = Model::new(&mut Dry::arena(), &checkpoint.spec, checkpoint.architecture.naming, Options::frozen(0));
    for param in names.params_mut() {
        weights.hash_into(stored_name(checkpoint, weights, &param.name, &head), &mut hasher);
    }
    hasher.finalize()
}

/// What to write, under the checkpoint's names.
pub fn sources<'a, D: Device>(device: &'a D, params: &'a [&mut Param<D>]) -> Vec<TensorSource<'a>> {
    let source = |param: &'a &mut Param<D>| TensorSource {
        name: param.name.clone(),
        shape: param.shape(),
        fill: Box::new(move |out: &mut [f32]| device.read_f32(param.value.view(), out)),
    };
    params.iter().map(source).collect()
}
