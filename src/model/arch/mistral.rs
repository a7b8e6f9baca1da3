//! Mistral (Jiang et al., arXiv:2310.06825): Llama with a sliding window over all layers.

use super::config::Config;
use super::{Architecture, ROTARY_BUFFER, llama_names};
use crate::error::Result;
use crate::model::Spec;

pub const ARCHITECTURE: Architecture = Architecture {
    model_type: "mistral",
    class: "Mistral",
    summary: "Mistral 7B and its kin: Llama with an optional sliding window",
    spec,
    naming: llama_names,
    spellings: &[],
    buffers: &[ROTARY_BUFFER],
};

fn spec(config: &Config) -> Result<Spec> {
    config.must_state("num_key_value_heads")?;
    let spec = config.decoder()?;
    let window = config.optional_count("sliding_window")?;
    Ok(Spec { windows: vec![window; spec.layers], ..spec })
}
