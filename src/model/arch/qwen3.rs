//! Qwen 3 (arXiv:2505.09388): queries and keys are normalized per head, `head_dim` stands on its own.

use super::config::Config;
use super::{Architecture, ROTARY_BUFFER, llama_names};
use crate::error::Result;
use crate::model::Spec;

pub const ARCHITECTURE: Architecture = Architecture {
    model_type: "qwen3",
    class: "Qwen3",
    summary: "Qwen 3 (dense): Llama with normalized queries and keys",
    spec,
    naming: llama_names,
    spellings: &[],
    buffers: &[ROTARY_BUFFER],
};

fn spec(config: &Config) -> Result<Spec> {
    config.must_state("num_key_value_heads")?;
    config.must_state("head_dim")?;
    let spec = config.decoder()?;
    let bias = config.flag("attention_bias")?;
    let windows = config.qwen_windows(spec.layers)?;
    Ok(Spec { qkv_bias: bias, out_bias: bias, qk_norm: true, windows, ..spec })
}
