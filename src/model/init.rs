//! Where a model's first weights come from.

use rayon::prelude::*;

use super::arch::Checkpoint;
use super::load::{fingerprint, load};
use super::{Model, Param, Role};
use crate::checkpoint::Weights;
use crate::device::{Device, Philox};
use crate::error::Result;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Init {
    /// The checkpoint's safetensors.
    Checkpoint,
    /// Random values; of the checkpoint only config and tokenizer are needed.
    Random { seed: u64 },
}

impl Init {
    /// A hash of the first weights and of what the config makes of them. Reads every weight once.
    pub fn identity(&self, checkpoint: &Checkpoint) -> Result<[u8; 32]> {
        let hash = match self {
            Self::Checkpoint => fingerprint(checkpoint, &Weights::open(&checkpoint.dir)?),
            Self::Random { seed } => blake3::hash(format!("random {seed} {:?}", checkpoint.spec).as_bytes()),
        };
        Ok(*hash.as_bytes())
    }

    /// Gives every weight its first value.
    pub fn fill<D: Device>(&self, device: &D, checkpoint: &Checkpoint, model: &mut Model<D>) -> Result<()> {
        match self {
            Self::Checkpoint => load(device, checkpoint, &Weights::open(&checkpoint.dir)?, model),
            Self::Random { seed } => {
                init_random(device, model, *seed)?;
                model.fill_adapters(device, &checkpoint.adapters)
            }
        }
    }
}

/// Numbers that a thread draws at a time.
const CHUNK: usize = 1 << 14;

/// Weights as transformers initializes them: matrices normal with the config's `initializer_range` (GPT-2's into
/// the residual stream with less), biases 0, norms 1. Each tensor draws from a stream named after it, so a value depends on
/// the seed and its place alone. One tensor at a time is in the host's memory.
pub fn init_random<D: Device>(device: &D, model: &mut Model<D>, seed: u64) -> Result<()> {
    model.params_mut().into_iter().try_for_each(|param| draw(device, param, seed))?;
    model.fill_tables(device)
}

/// One weight of those.
pub fn draw<D: Device>(device: &D, param: &mut Param<D>, seed: u64) -> Result<()> {
    let (random, role, range) = (Philox::named(seed, &param.name), param.role, param.initializer_range);
    let value = |i: usize| match role {
        Role::Matrix => (range * random.normal(i as u64)) as f32,
        Role::Bias => 0.0,
        Role::Norm => 1.0,
    };
    let mut values = vec![0.0; param.value.len()];
    values.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, values)| {
        values.iter_mut().enumerate().for_each(|(i, x)| *x = value(chunk * CHUNK + i));
    });
    param.write(device, &values)
}
