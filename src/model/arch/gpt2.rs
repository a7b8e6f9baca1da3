//! GPT-2 (Radford et al., 2019): learned positions, layer norms, GELU; matrices stored as `[inputs, outputs]`.

use super::config::{Config, Names};
use super::{Architecture, QKV, SCORE, Slot, Stored};
use crate::error::Result;
use crate::model::Role;
use crate::model::spec::{Head, Norm, Positions, Spec};
use crate::ops::gelu::Curve;

pub const ARCHITECTURE: Architecture = Architecture {
    model_type: "gpt2",
    class: "GPT2",
    summary: "GPT-2, DistilGPT-2: learned positions, layer norm, GELU",
    spec,
    naming,
    // The files that OpenAI's weights were published in.
    spellings: &[("transformer.", "")],
    buffers: &[".attn.bias", ".attn.masked_bias"],
};

const NAMES: Names = Names { layers: "n_layer", hidden: "n_embd", heads: "n_head", kv_heads: None, head_dim: None };

fn spec(config: &Config) -> Result<Spec> {
    let sizes = config.sizes(&NAMES)?;
    if !config.flag_or("scale_attn_weights", true)? {
        return Err(config.error("scale_attn_weights", "false is not supported: scores are divided by sqrt(head_dim)"));
    }
    // How half-precision scores are kept from overflowing; here they are f32.
    config.flag("reorder_and_upcast_attn")?;
    let norm = Norm::Layer { eps: config.number("layer_norm_epsilon")?.unwrap_or(1e-5) };
    let positions = Positions::Learned { most: config.count("n_positions")? };
    let mlp_dim = config.optional_count("n_inner")?.unwrap_or(4 * sizes.hidden);
    let mlp = config.gelu("activation_function", Curve::Tanh)?;
    Ok(Spec {
        qkv_bias: true,
        out_bias: true,
        mlp_bias: true,
        head: Head::language(config.flag_or("tie_word_embeddings", true)?),
        residual_initializer_range: sizes.initializer_range / (2.0 * sizes.layers as f64).sqrt(),
        ..sizes.spec(norm, positions, mlp, mlp_dim)
    })
}

/// The fused tensor holds q, k and v side by side.
fn naming(spec: &Spec, slot: Slot, layer: usize) -> Stored {
    let (part, kind) = match slot {
        Slot::Embedding => return Stored::whole("transformer.wte.weight".into()),
        Slot::Position => return Stored::whole("transformer.wpe.weight".into()),
        Slot::FinalNorm => return Stored::whole("transformer.ln_f.weight".into()),
        Slot::FinalNormBias => return Stored::whole("transformer.ln_f.bias".into()),
        Slot::Head => return Stored::whole("lm_head.weight".into()),
        Slot::Score => return Stored::whole(SCORE.into()),
        Slot::AttentionNorm => ("ln_1", "weight"),
        Slot::AttentionNormBias => ("ln_1", "bias"),
        Slot::Query | Slot::Key | Slot::Value => ("attn.c_attn", "weight"),
        Slot::QueryBias | Slot::KeyBias | Slot::ValueBias => ("attn.c_attn", "bias"),
        Slot::Output => ("attn.c_proj", "weight"),
        Slot::OutputBias => ("attn.c_proj", "bias"),
        Slot::MlpNorm => ("ln_2", "weight"),
        Slot::MlpNormBias => ("ln_2", "bias"),
        Slot::Up => ("mlp.c_fc", "weight"),
        Slot::UpBias => ("mlp.c_fc", "bias"),
        Slot::Down => ("mlp.c_proj", "weight"),
        Slot::DownBias => ("mlp.c_proj", "bias"),
        Slot::QueryNorm | Slot::KeyNorm | Slot::Gate | Slot::GateBias => unreachable!("GPT-2 has no {slot:?}"),
    };
    let stored = Stored::whole(format!("transformer.h.{layer}.{part}.{kind}"));
    let stored = if slot.role() == Role::Matrix { stored.transposed() } else { stored };
    match slot.qkv() {
        Some(part) => stored.part(&QKV, part, spec.hidden),
        None => stored,
    }
}
