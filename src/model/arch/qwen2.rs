//! Qwen 2 and 2.5 (arXiv:2407.10671): biases on q, k and v, none on the output.

use super::config::Config;
use super::{Architecture, ROTARY_BUFFER, llama_names};
use crate::error::Result;
use crate::model::Spec;

pub const ARCHITECTURE: Architecture = Architecture {
    model_type: "qwen2",
    class: "Qwen2",
    summary: "Qwen 2 and 2.5: Llama with q/k/v biases",
    spec,
    naming: llama_names,
    spellings: &[],
    buffers: &[ROTARY_BUFFER],
};

fn spec(config: &Config) -> Result<Spec> {
    config.must_state("num_key_value_heads")?;
    let spec = config.decoder()?;
    Ok(Spec { qkv_bias: true, windows: config.qwen_windows(spec.layers)?, ..spec })
}
