//! GPT-NeoX (Black et al., arXiv:2204.06745) and Pythia (Biderman et al., arXiv:2304.01373): layer norms, GELU,
//! rotations of a part of each head, attention and MLP side by side.

use super::config::{Config, Names, RopeNames};
use super::{Architecture, QKV, ROTARY_BUFFER, SCORE, Slot, Stored};
use crate::error::Result;
use crate::model::spec::{Head, Norm, Positions, Spec};
use crate::ops::gelu::Curve;

pub const ARCHITECTURE: Architecture = Architecture {
    model_type: "gpt_neox",
    class: "GPTNeoX",
    summary: "GPT-NeoX, Pythia: layer norm, GELU, partial RoPE, parallel residual",
    spec,
    naming,
    // transformers 5 calls the head lm_head in memory and embed_out in files.
    spellings: &[("embed_out.", "lm_head.")],
    buffers: &[".attention.bias", ".attention.masked_bias", ROTARY_BUFFER],
};

const ROPE: RopeNames = RopeNames {
    theta: &["rotary_emb_base", "rope_theta"],
    partial: &["rotary_pct", "partial_rotary_factor"],
    default_partial: Some(0.25),
};

fn spec(config: &Config) -> Result<Spec> {
    let sizes = config.sizes(&Names { kv_heads: None, head_dim: None, ..Names::COMMON })?;
    let attention_bias = config.flag_or("attention_bias", true)?;
    let norm = Norm::Layer { eps: config.number("layer_norm_eps")?.unwrap_or(1e-5) };
    let positions = Positions::Rope(config.rope(sizes.head_dim, &ROPE)?);
    let mlp = config.gelu("hidden_act", Curve::Exact)?;
    Ok(Spec {
        parallel_residual: config.flag_or("use_parallel_residual", true)?,
        qkv_bias: attention_bias,
        out_bias: attention_bias,
        mlp_bias: true,
        head: Head::language(config.flag("tie_word_embeddings")?),
        ..sizes.spec(norm, positions, mlp, config.count("intermediate_size")?)
    })
}

/// The fused tensor holds q, k and v of head 0, then of head 1, and so on.
fn naming(spec: &Spec, slot: Slot, layer: usize) -> Stored {
    let (part, kind) = match slot {
        Slot::Embedding => return Stored::whole("gpt_neox.embed_in.weight".into()),
        Slot::FinalNorm => return Stored::whole("gpt_neox.final_layer_norm.weight".into()),
        Slot::FinalNormBias => return Stored::whole("gpt_neox.final_layer_norm.bias".into()),
        Slot::Head => return Stored::whole("embed_out.weight".into()),
        Slot::Score => return Stored::whole(SCORE.into()),
        Slot::AttentionNorm => ("input_layernorm", "weight"),
        Slot::AttentionNormBias => ("input_layernorm", "bias"),
        Slot::Query | Slot::Key | Slot::Value => ("attention.query_key_value", "weight"),
        Slot::QueryBias | Slot::KeyBias | Slot::ValueBias => ("attention.query_key_value", "bias"),
        Slot::Output => ("attention.dense", "weight"),
        Slot::OutputBias => ("attention.dense", "bias"),
        Slot::MlpNorm => ("post_attention_layernorm", "weight"),
        Slot::MlpNormBias => ("post_attention_layernorm", "bias"),
        Slot::Up => ("mlp.dense_h_to_4h", "weight"),
        Slot::UpBias => ("mlp.dense_h_to_4h", "bias"),
        Slot::Down => ("mlp.dense_4h_to_h", "weight"),
        Slot::DownBias => ("mlp.dense_4h_to_h", "bias"),
        Slot::Position | Slot::QueryNorm | Slot::KeyNorm | Slot::Gate | Slot::GateBias => {
            unreachable!("GPT-NeoX has no {slot:?}")
        }
    };
    let stored = Stored::whole(format!("gpt_neox.layers.{layer}.{part}.{kind}"));
    match slot.qkv() {
        Some(part) => stored.part(&QKV, part, spec.head_dim),
        None => stored,
    }
}
