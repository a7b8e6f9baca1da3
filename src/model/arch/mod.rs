//! Architectures as data: a spec read from `config.json`, and where a checkpoint keeps each weight.
//!
//! To add one: a file here with a `spec` function, one line in [`ALL`] and its `mod`.

mod config;
mod llama;
mod mistral;
mod qwen2;
mod qwen3;

use std::path::{Path, PathBuf};

use crate::checkpoint::json::read_json;
use crate::error::{Error, Result};
use crate::model::{Role, Spec};
use config::Config;

/// A place in the model where a weight belongs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Slot {
    Embedding,
    AttentionNorm,
    Query,
    QueryBias,
    Key,
    KeyBias,
    Value,
    ValueBias,
    QueryNorm,
    KeyNorm,
    Output,
    OutputBias,
    MlpNorm,
    Gate,
    GateBias,
    Up,
    UpBias,
    Down,
    DownBias,
    FinalNorm,
    Head,
}

impl Slot {
    /// The bias that belongs to a linear layer's weight.
    pub fn bias(self) -> Self {
        match self {
            Self::Query => Self::QueryBias,
            Self::Key => Self::KeyBias,
            Self::Value => Self::ValueBias,
            Self::Output => Self::OutputBias,
            Self::Gate => Self::GateBias,
            Self::Up => Self::UpBias,
            Self::Down => Self::DownBias,
            other => panic!("{other:?} has no bias"),
        }
    }

    pub fn role(self) -> Role {
        match self {
            Self::AttentionNorm | Self::QueryNorm | Self::KeyNorm | Self::MlpNorm | Self::FinalNorm => Role::Norm,
            Self::QueryBias | Self::KeyBias | Self::ValueBias | Self::OutputBias => Role::Bias,
            Self::GateBias | Self::UpBias | Self::DownBias => Role::Bias,
            _ => Role::Matrix,
        }
    }
}

/// The checkpoint's name of a weight. `layer` is ignored outside the blocks.
pub type Naming = fn(Slot, usize) -> String;

/// One architecture.
pub struct Architecture {
    /// `model_type` in `config.json`.
    pub model_type: &'static str,
    pub summary: &'static str,
    spec: fn(&Config) -> Result<Spec>,
    pub naming: Naming,
}

static ALL: &[Architecture] = &[llama::ARCHITECTURE, mistral::ARCHITECTURE, qwen2::ARCHITECTURE, qwen3::ARCHITECTURE];

pub fn all() -> &'static [Architecture] {
    ALL
}

/// A model folder whose configuration was understood.
pub struct Checkpoint {
    pub dir: PathBuf,
    pub architecture: &'static Architecture,
    pub spec: Spec,
}

impl Checkpoint {
    /// Reads `config.json`. A key that changes the mathematics and is not supported is refused by name.
    pub fn open(dir: &Path) -> Result<Self> {
        if !dir.is_dir() {
            return Err(Error::file(dir, "there is no such folder; a model is a folder with config.json in it"));
        }
        let config = dir.join("config.json");
        if !config.exists() {
            return Err(Error::file(config, "there is no such file; a model is a folder with config.json in it"));
        }
        Self::from_config(dir, &config)
    }

    /// The same with a configuration that is kept elsewhere.
    pub fn from_config(dir: &Path, config: &Path) -> Result<Self> {
        let config = Config::new(config, read_json(config)?)?;
        let model_type = config.text("model_type")?;
        let Some(architecture) = ALL.iter().find(|a| a.model_type == model_type) else {
            let known: Vec<_> = ALL.iter().map(|a| a.model_type).collect();
            return Err(config.error("model_type", format!("\"{model_type}\" is not supported; {}", known.join(", "))));
        };
        let spec = (architecture.spec)(&config)?;
        config.refuse_unread()?;
        Ok(Self { dir: dir.to_path_buf(), architecture, spec })
    }
}

/// The names that llama made common.
fn llama_names(slot: Slot, layer: usize) -> String {
    let (part, kind) = match slot {
        Slot::Embedding => return "model.embed_tokens.weight".into(),
        Slot::FinalNorm => return "model.norm.weight".into(),
        Slot::Head => return "lm_head.weight".into(),
        Slot::AttentionNorm => ("input_layernorm", "weight"),
        Slot::Query => ("self_attn.q_proj", "weight"),
        Slot::QueryBias => ("self_attn.q_proj", "bias"),
        Slot::Key => ("self_attn.k_proj", "weight"),
        Slot::KeyBias => ("self_attn.k_proj", "bias"),
        Slot::Value => ("self_attn.v_proj", "weight"),
        Slot::ValueBias => ("self_attn.v_proj", "bias"),
        Slot::QueryNorm => ("self_attn.q_norm", "weight"),
        Slot::KeyNorm => ("self_attn.k_norm", "weight"),
        Slot::Output => ("self_attn.o_proj", "weight"),
        Slot::OutputBias => ("self_attn.o_proj", "bias"),
        Slot::MlpNorm => ("post_attention_layernorm", "weight"),
        Slot::Gate => ("mlp.gate_proj", "weight"),
        Slot::GateBias => ("mlp.gate_proj", "bias"),
        Slot::Up => ("mlp.up_proj", "weight"),
        Slot::UpBias => ("mlp.up_proj", "bias"),
        Slot::Down => ("mlp.down_proj", "weight"),
        Slot::DownBias => ("mlp.down_proj", "bias"),
    };
    format!("model.layers.{layer}.{part}.{kind}")
}
