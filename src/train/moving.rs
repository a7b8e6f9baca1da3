//! A reference that follows the policy: Gorbatovski et al., arXiv:2404.09656 (TR-DPO). It cannot be scored beforehand, so it is
//! the one reference that is in memory while the policy trains, and it runs in every step.
//!
//! ```text
//! every N steps   reference <- (1 - mixup) reference + mixup policy      mixup = 1: hard, Eq. 6; N = 1: soft, Eq. 5
//! ```

use super::settings::Moving;
use crate::device::{Arena, DType, Device, Kind, Tensor};
use crate::error::Result;
use crate::model::{Checkpoint, Model, Options};
use crate::ops::{Backend, lerp};

pub struct MovingReference<D: Device> {
    pub model: Model<D>,
    moving: Moving,
}

impl<D: Device> MovingReference<D> {
    pub fn new(arena: &mut Arena<D>, checkpoint: &Checkpoint, positions: usize, moving: Moving) -> Self {
        let options = Options::frozen(positions);
        let mut model = Model::new(arena, &checkpoint.spec, checkpoint.architecture.naming, options);
        if arena.storage() == DType::Bf16 {
            // Without masters a small move would be lost in the rounding.
            for param in model.params_mut() {
                param.master = Some(arena.floats(Kind::States, param.value.rows(), param.value.cols()));
            }
        }
        Self { model, moving }
    }
}

impl<B: Backend> MovingReference<B> {
    /// Follows the policy after step `step`, counted from 1.
    pub fn follow(&mut self, device: &B, policy: &mut Model<B>, step: u64) -> Result<()> {
        if !step.is_multiple_of(self.moving.every) {
            return Ok(());
        }
        for (policy, reference) in policy.params_mut().into_iter().zip(self.model.params_mut()) {
            let x = policy.whole();
            let (y, master) = (reference.value.view_mut(), reference.master.as_mut().map(Tensor::view_mut));
            device.lerp(lerp::Args { share: self.moving.mixup, x, y, master })?;
        }
        Ok(())
    }
}
