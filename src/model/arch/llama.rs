//! Llama 1 to 3 and everything that uses its `model_type` (Touvron et al., arXiv:2302.13971).

use super::config::Config;
use super::{Architecture, ROTARY_BUFFER, llama_names};
use crate::error::Result;
use crate::model::Spec;

pub const ARCHITECTURE: Architecture = Architecture {
    model_type: "llama",
    class: "Llama",
    summary: "Llama 1 to 3.x, SmolLM2, TinyLlama: RMS norm, SwiGLU, RoPE, grouped heads",
    spec,
    naming: llama_names,
    spellings: &[],
    buffers: &[ROTARY_BUFFER],
};

fn spec(config: &Config) -> Result<Spec> {
    let attention_bias = config.flag("attention_bias")?;
    Ok(Spec {
        qkv_bias: attention_bias,
        out_bias: attention_bias,
        mlp_bias: config.flag("mlp_bias")?,
        ..config.decoder()?
    })
}
