//! What people should know of a cache file.

use super::cache::About;
use crate::device::{DType, Dry};
use crate::model::{Checkpoint, Model, Options};

impl About {
    /// Of numbers that a model's weights and a device's [arithmetic](crate::device::Device::arithmetic) make.
    pub fn of(checkpoint: &Checkpoint, arithmetic: &str) -> Self {
        let Checkpoint { dir, architecture, spec, .. } = checkpoint;
        let mut model = Model::new(&mut Dry::arena(DType::F32), spec, architecture.naming, Options::frozen(0));
        // `.` and `..` have no name; a link has its own, by which the user knows the model.
        let dir = if dir.file_name().is_some() { dir.clone() } else { dir.canonicalize().unwrap_or_default() };
        Self {
            model: dir.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            architecture: architecture.model_type.to_string(),
            parameters: model.params_mut().iter().map(|param| param.value.len()).sum(),
            arithmetic: arithmetic.to_string(),
            created: None,
        }
    }
}
