use super::{Model, Role};
use crate::device::{Device, Philox};
use crate::error::Result;

/// Weights as transformers initializes them: matrices normal with the config's `initializer_range`, biases 0,
/// norms 1. Each tensor draws from a stream named after it, so a value depends on the seed and its place alone.
pub fn init_random<D: Device>(device: &D, model: &mut Model<D>, seed: u64) -> Result<()> {
    let range = model.spec.initializer_range;
    for param in model.params_mut() {
        let random = Philox::named(seed, &param.name);
        let value = |i: usize| match param.role {
            Role::Matrix => (range * random.normal(i as u64)) as f32,
            Role::Bias => 0.0,
            Role::Norm => 1.0,
        };
        let values: Vec<f32> = (0..param.value.len()).map(value).collect();
        device.write_f32(&values, param.value.view_mut())?;
    }
    model.fill_tables(device)
}
