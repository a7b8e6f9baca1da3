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

use std::path::{Component, Path, PathBuf};

use crate::checkpoint::Weights;
use crate::checkpoint::hf::RewardModel;
use crate::checkpoint::json::read_json;
use crate::checkpoint::peft::{self, AdapterConfig, AdapterFile};
use crate::data::{Dataset, Example, Read, Tokenizer};
use crate::device::{DType, Dry};
use crate::error::{Error, Result};
use crate::model::{Adapter, Head, Model, Options, Role, Spec};
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
    /// The head of a reward model.
    Score,
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

    /// Whether it is read by products and lookups of whole rows alone.
    pub fn multiplies(self) -> bool {
        self.role() == Role::Matrix && !matches!(self, Self::Position | Self::Score)
    }
}

/// Where the checkpoint keeps a weight. The layer is ignored outside the blocks.
pub type Naming = fn(&Spec, Slot, usize) -> Stored;

/// One architecture.
pub struct Architecture {
    /// `model_type` in `config.json`.
    pub model_type: &'static str,
    /// How transformers' classes of it begin: `Llama`ForCausalLM.
    class: &'static str,
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

    /// transformers' class of a reward model.
    pub fn classifier(&self) -> String {
        format!("{}{}", self.class, config::CLASSIFIER)
    }

    pub fn is_buffer(&self, name: &str) -> bool {
        self.buffers.iter().any(|end| name.ends_with(end))
    }
}

pub fn all() -> &'static [Architecture] {
    ALL
}

/// A model folder whose configuration was understood.
#[derive(Clone)]
pub struct Checkpoint {
    pub dir: PathBuf,
    pub architecture: &'static Architecture,
    /// What is built of it.
    pub spec: Spec,
    /// What its weights end in; another than the spec's where a language model becomes a reward model.
    pub(super) stored_head: Head,
    /// The seed of a reward model's head, where there is none to load.
    pub(super) fresh_head: Option<u64>,
    /// `pad_token_id`
    pad: Option<u32>,
    /// All matrices of its file are bfloat16.
    pub(super) bf16: bool,
    /// What is applied beside the weights.
    pub adapters: Vec<Adapter>,
}

impl Checkpoint {
    /// A language model. Reads `config.json`; a key that changes the mathematics and is not supported is refused by
    /// name, and so is a reward model.
    pub fn open(dir: &Path) -> Result<Self> {
        let checkpoint = Self::read(dir)?;
        match checkpoint.spec.head {
            Head::Score => Err(Error::file(
                dir,
                "is a reward model, which predicts no tokens, and a language model is wanted; `cuvee score` runs it",
            )),
            _ => Ok(checkpoint),
        }
    }

    /// A reward model: transformers' `..ForSequenceClassification` with one label.
    pub fn open_reward(dir: &Path) -> Result<Self> {
        let checkpoint = Self::read(dir)?;
        match checkpoint.spec.head {
            Head::Score => Ok(checkpoint),
            _ => {
                let class = checkpoint.architecture.classifier();
                let detail = format!(
                    "is a language model, and a reward model ({class} with one label) is wanted; train one with a reward \
                     objective (see `cuvee list objectives`)"
                );
                Err(Error::file(dir, detail))
            }
        }
    }

    /// A reward model to train: one as it is, or a language model whose head gives way to a random one of `seed`, as
    /// transformers initializes it.
    pub fn with_reward_head(dir: &Path, seed: u64) -> Result<Self> {
        let mut checkpoint = Self::read(dir)?;
        if checkpoint.spec.head != Head::Score {
            checkpoint.spec.head = Head::Score;
            checkpoint.fresh_head = Some(seed);
        }
        Ok(checkpoint)
    }

    /// Under an adapter, of which `weight` times as much is applied, beside those that are there. One with the head of a reward
    /// model replaces the head of one.
    pub fn with_adapter(mut self, dir: &Path, weight: f64) -> Result<Self> {
        let adapter = Adapter::open(dir, weight)?;
        adapter.check(&mut self.dry())?;
        if let Some(inputs) = adapter.file.head() {
            let fail = |detail: String| Err(Error::file(dir, detail));
            if self.spec.head != Head::Score {
                return fail(
                    "has the head of a reward model, and a language model is wanted; `cuvee score --model` runs it"
                        .into(),
                );
            }
            if weight != 1.0 || self.adapter_head().is_some() {
                return fail(
                    "has the head of a reward model, which is neither scaled nor added to another's; give it alone"
                        .into(),
                );
            }
            if inputs != self.spec.hidden {
                return fail(format!("has a head of {inputs} inputs, the base has {}", self.spec.hidden));
            }
            self.fresh_head = None;
        }
        self.adapters.push(adapter);
        Ok(self)
    }

    /// The adapter that has the head of this reward model.
    pub fn adapter_head(&self) -> Option<&AdapterFile> {
        self.adapters.iter().map(|adapter| adapter.file.as_ref()).find(|file| file.head().is_some())
    }

    /// Positions that it was made for: learned ones, or as far as it was trained, where `config.json` says so.
    pub fn positions(&self) -> Option<usize> {
        let stated = || {
            let config = read_json(&self.dir.join("config.json")).ok()?;
            config.get("max_position_embeddings")?.as_u64().map(|positions| positions as usize)
        };
        self.spec.most_positions().or_else(stated)
    }

    /// Says where texts go on beyond these: rotations do, and the model has never seen them.
    pub fn beyond(&self, what: &str, lens: impl IntoIterator<Item = usize>) -> Option<String> {
        let positions = self.positions()?;
        let (mut all, mut beyond, mut longest) = (0, 0, 0);
        for len in lens {
            (all, beyond, longest) = (all + 1, beyond + usize::from(len > positions), longest.max(len));
        }
        (beyond > 0).then(|| {
            format!(
                "{what}: {beyond} of {all} have more tokens than the {positions} that {} was made for (max_position_embeddings), up to \
                 {longest}: what it says of them is worth little",
                self.dir.display()
            )
        })
    }

    /// The same of a data set's rows.
    pub fn beyond_rows(&self, dataset: &Dataset) -> Option<String> {
        let longest = |example: &Example| example.sequences.iter().map(|s| s.ids.len()).max().unwrap_or(0);
        self.beyond(&dataset.path.display().to_string(), dataset.examples.iter().map(longest))
    }

    /// The model without memory, for names and shapes.
    pub fn dry(&self) -> Model<Dry> {
        Model::new(&mut Dry::arena(DType::F32), &self.spec, self.architecture.naming, Options::frozen(0))
    }

    /// Where a model's head reads its sequences.
    pub fn reads(&self, tokenizer: &Tokenizer) -> Read {
        match self.spec.head {
            Head::Score => Read::Last { pad: self.reward_pad(tokenizer) },
            Head::Tied | Head::Own => Read::Completions,
        }
    }

    /// How a reward model is saved; `None` of a language model.
    pub fn reward_model(&self, tokenizer: &Tokenizer) -> Option<RewardModel> {
        let reward = || RewardModel { class: self.architecture.classifier(), pad: self.reward_pad(tokenizer) };
        (self.spec.head == Head::Score).then(reward)
    }

    /// transformers finds the end of a padded sequence by the `pad_token_id` of the model; a language model that becomes
    /// a reward model gets the one that TRL's RewardTrainer gives it.
    fn reward_pad(&self, tokenizer: &Tokenizer) -> Option<u32> {
        if self.stored_head == Head::Score { self.pad } else { tokenizer.pad() }
    }

    /// Either kind.
    fn read(dir: &Path) -> Result<Self> {
        if !dir.is_dir() {
            // `owner/name` is what a model of the hub is called.
            let parts: Vec<Component> = dir.components().collect();
            let hub = matches!(parts[..], [Component::Normal(_), Component::Normal(_)]);
            let name = dir.display();
            let download = if hub {
                format!("; `hf download {name} --local-dir DIR` fetches one of the hub")
            } else {
                String::new()
            };
            let detail = format!("there is no such folder; a model is a folder with config.json in it{download}");
            return Err(Error::file(dir, detail));
        }
        let config = dir.join("config.json");
        if peft::is_adapter(dir) {
            return Self::under_adapter(dir);
        }
        if !config.exists() {
            return Err(Error::file(config, "there is no such file; a model is a folder with config.json in it"));
        }
        Self::from_config(dir, &config)
    }

    /// An adapter's folder in place of a model's: the base that it names, where that is a folder, under the adapter.
    fn under_adapter(dir: &Path) -> Result<Self> {
        let AdapterConfig { base_model: named, has_head, .. } = AdapterFile::open(dir)?.config;
        match named.as_deref().map(Path::new).filter(|base| base.join("config.json").exists()) {
            Some(base) => {
                let mut base = Self::read(base)?;
                if has_head {
                    base.spec.head = Head::Score;
                }
                base.with_adapter(dir, 1.0)
            }
            None => {
                let base = named.unwrap_or("nothing".into());
                let detail = format!(
                    "is an adapter, and the base that it names, {base}, is no model's folder here; give the base with --model and \
                     this folder with --adapter"
                );
                Err(Error::file(dir, detail))
            }
        }
    }

    /// Of either kind, with a configuration that is kept elsewhere.
    pub fn from_config(dir: &Path, config: &Path) -> Result<Self> {
        let config = Config::new(config, read_json(config)?)?;
        let model_type = config.text("model_type")?;
        let Some(architecture) = ALL.iter().find(|a| a.model_type == model_type) else {
            let known: Vec<_> = ALL.iter().map(|a| a.model_type).collect();
            return Err(config.error("model_type", format!("\"{model_type}\" is not supported; {}", known.join(", "))));
        };
        let mut spec = (architecture.spec)(&config)?;
        if config.is_reward_model()? {
            spec.head = Head::Score;
        }
        let (stored_head, pad) = (spec.head, config.token("pad_token_id"));
        config.refuse_unread()?;
        Ok(Self {
            dir: dir.to_path_buf(),
            architecture,
            spec,
            stored_head,
            fresh_head: None,
            pad,
            // Without weights, or with unreadable ones, this does not matter yet.
            bf16: Weights::open(dir).is_ok_and(|weights| weights.matrices_are_bf16()),
            adapters: Vec::new(),
        })
    }
}

/// What every architecture calls the head of a reward model.
const SCORE: &str = "score.weight";
/// The order of fused tensors.
const QKV: [&str; 3] = ["query", "key", "value"];
const ROTARY_BUFFER: &str = "rotary_emb.inv_freq";

/// The names that llama made common.
fn llama_names(_: &Spec, slot: Slot, layer: usize) -> Stored {
    let (part, kind) = match slot {
        Slot::Embedding => return Stored::whole("model.embed_tokens.weight".into()),
        Slot::FinalNorm => return Stored::whole("model.norm.weight".into()),
        Slot::Head => return Stored::whole("lm_head.weight".into()),
        Slot::Score => return Stored::whole(SCORE.into()),
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
