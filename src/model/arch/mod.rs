//! Architectures as data: a spec read from `config.json`, and where a checkpoint keeps each weight.
//!
//! To add one: a file here with a `spec` function, one line in [`ALL`] and its `mod`.

mod config;
mod gpt2;
mod gpt_neox;
mod llama;
mod mistral;
mod qwen2;
mod qwen3;
mod stored;

pub use stored::Stored;

use std::path::{Path, PathBuf};

use crate::checkpoint::json::read_json;
use crate::error::{Error, Result};
use crate::model::{Role, Spec};
use config::Config;

/// A place in the model where a weight belongs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Slot {
    Embedding,
    /// A row for each position, where positions are learned.
    Position,
    AttentionNorm,
    AttentionNormBias,
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
    MlpNormBias,
    Gate,
    GateBias,
    Up,
    UpBias,
    Down,
    DownBias,
    FinalNorm,
    FinalNormBias,
    Head,
}

impl Slot {
    /// The bias that belongs to the weight of a linear layer or a norm.
    pub fn bias(self) -> Self {
        match self {
            Self::AttentionNorm => Self::AttentionNormBias,
            Self::MlpNorm => Self::MlpNormBias,
            Self::FinalNorm => Self::FinalNormBias,
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

    /// Which of [`QKV`] it belongs to.
    fn qkv(self) -> Option<usize> {
        match self {
            Self::Query | Self::QueryBias => Some(0),
            Self::Key | Self::KeyBias => Some(1),
            Self::Value | Self::ValueBias => Some(2),
            _ => None,
        }
    }

    pub fn role(self) -> Role {
        match self {
            Self::AttentionNorm | Self::QueryNorm | Self::KeyNorm | Self::MlpNorm | Self::FinalNorm => Role::Norm,
            Self::QueryBias | Self::KeyBias | Self::ValueBias | Self::OutputBias => Role::Bias,
            Self::AttentionNormBias | Self::MlpNormBias | Self::FinalNormBias => Role::Bias,
            Self::GateBias | Self::UpBias | Self::DownBias => Role::Bias,
            _ => Role::Matrix,
        }
    }
}

/// Where the checkpoint keeps a weight. The layer is ignored outside the blocks.
pub type Naming = fn(&Spec, Slot, usize) -> Stored;

/// One architecture.
pub struct Architecture {
    /// `model_type` in `config.json`.
    pub model_type: &'static str,
    pub summary: &'static str,
    spec: fn(&Config) -> Result<Spec>,
    pub naming: Naming,
    /// How names may begin instead in files that others wrote: (as `naming` has it, as found).
    spellings: &'static [(&'static str, &'static str)],
    /// How names end of tensors that files may hold and nobody needs.
    buffers: &'static [&'static str],
}

static ALL: &[Architecture] = &[
    llama::ARCHITECTURE,
    mistral::ARCHITECTURE,
    qwen2::ARCHITECTURE,
    qwen3::ARCHITECTURE,
    gpt_neox::ARCHITECTURE,
    gpt2::ARCHITECTURE,
];

impl Architecture {
    /// A tensor's name as saved, then as others may spell it.
    pub fn spellings(&self, name: &str) -> Vec<String> {
        let other = |(ours, theirs): &(&str, &str)| Some(format!("{theirs}{}", name.strip_prefix(ours)?));
        std::iter::once(name.to_string()).chain(self.spellings.iter().filter_map(other)).collect()
    }

    pub fn is_buffer(&self, name: &str) -> bool {
        self.buffers.iter().any(|end| name.ends_with(end))
    }
}

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

/// The order of fused tensors.
const QKV: [&str; 3] = ["query", "key", "value"];
const ROTARY_BUFFER: &str = "rotary_emb.inv_freq";

/// The names that llama made common.
fn llama_names(_: &Spec, slot: Slot, layer: usize) -> Stored {
    let (part, kind) = match slot {
        Slot::Embedding => return Stored::whole("model.embed_tokens.weight".into()),
        Slot::FinalNorm => return Stored::whole("model.norm.weight".into()),
        Slot::Head => return Stored::whole("lm_head.weight".into()),
        Slot::Position | Slot::AttentionNormBias | Slot::MlpNormBias | Slot::FinalNormBias => {
            unreachable!("the llama family rotates and has norms without biases")
        }
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
    Stored::whole(format!("model.layers.{layer}.{part}.{kind}"))
}
