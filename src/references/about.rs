//! What people should know of a cache file.

use std::path::Path;

use super::cache::About;
use crate::model::Checkpoint;

impl About {
    /// Of numbers that a model's weights and a device's [arithmetic](crate::device::Device::arithmetic) make.
    pub fn of(checkpoint: &Checkpoint, arithmetic: &str) -> Self {
        let Checkpoint { dir, architecture, .. } = checkpoint;
        // `.` and `..` have no name; a link has its own, by which the user knows the model.
        let dir = if dir.file_name().is_some() { dir.clone() } else { dir.canonicalize().unwrap_or_default() };
        let name = |dir: &Path| dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let adapters =
            checkpoint.adapters.iter().map(|adapter| format!(" + {} {}", adapter.weight, name(&adapter.dir)));
        let model = std::iter::once(name(&dir)).chain(adapters).collect();
        Self {
            model,
            architecture: architecture.model_type.to_string(),
            parameters: checkpoint.dry().params_mut().iter().map(|param| param.value.len()).sum(),
            arithmetic: arithmetic.to_string(),
            created: None,
        }
    }
}
