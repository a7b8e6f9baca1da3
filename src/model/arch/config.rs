//! Reads `config.json` and remembers what was read: a key that nobody read may change the mathematics.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::model::spec::{Head, Mlp, Norm, Positions, Rope, RopeScaling, Spec};
use crate::ops::gelu::Curve;

/// Keys that do not change what a forward pass computes.
const HARMLESS: &[&str] = &[
    "architectures",
    "attention_dropout", // dropout stays off: the reference is scored once
    "attn_pdrop",
    "auto_map",
    "classifier_dropout",
    "dtype",
    "embd_pdrop",
    "hidden_dropout",
    "id2label",
    "is_decoder",
    "is_llama_config",
    "label2id",
    "max_position_embeddings", // rotations are computed as far as they are needed
    "model_max_length",
    "n_ctx", // n_positions, once more
    "name_or_path",
    "pretraining_tp", // how the authors sliced their matrices
    "problem_type",   // which loss a classifier was trained with
    "resid_pdrop",
    "task_specific_params",
    "tokenizer_class",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
];

/// How the class of a sequence classifier ends.
pub const CLASSIFIER: &str = "ForSequenceClassification";

/// Above every vocabulary and window.
const MAX_COUNT: u64 = 1 << 24;
/// Above every width and depth; products of such numbers are still numbers of bytes.
const MAX_WIDTH: usize = 1 << 20;
const MAX_LAYERS: usize = 1 << 12;

/// What a family calls its sizes.
pub struct Names {
    pub layers: &'static str,
    pub hidden: &'static str,
    pub heads: &'static str,
    /// `None`: as many as heads.
    pub kv_heads: Option<&'static str>,
    /// `None`: hidden / heads.
    pub head_dim: Option<&'static str>,
}

impl Names {
    pub const COMMON: Self = Self {
        layers: "num_hidden_layers",
        hidden: "hidden_size",
        heads: "num_attention_heads",
        kv_heads: Some("num_key_value_heads"),
        head_dim: Some("head_dim"),
    };
}

/// What every decoder has.
#[derive(Clone, Copy)]
pub struct Sizes {
    pub layers: usize,
    pub hidden: usize,
    pub vocab: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub initializer_range: f64,
}

impl Sizes {
    /// A decoder without biases, windows and what else is not everywhere: the architecture's file adds them.
    pub fn spec(self, norm: Norm, positions: Positions, mlp: Mlp, mlp_dim: usize) -> Spec {
        let Self { layers, hidden, vocab, heads, kv_heads, head_dim, initializer_range } = self;
        Spec {
            layers,
            hidden,
            vocab,
            heads,
            kv_heads,
            head_dim,
            mlp_dim,
            norm,
            positions,
            mlp,
            parallel_residual: false,
            qkv_bias: false,
            out_bias: false,
            mlp_bias: false,
            qk_norm: false,
            windows: vec![None; layers],
            head: Head::Own,
            initializer_range,
            residual_initializer_range: initializer_range,
        }
    }
}

/// What a family calls its rotations beside `rope_parameters` (transformers 4).
pub struct RopeNames {
    pub theta: &'static [&'static str],
    /// The part of a head that is rotated.
    pub partial: &'static [&'static str],
    /// `None`: whole heads are rotated, and nothing else is supported.
    pub default_partial: Option<f64>,
}

const WHOLE_HEADS: RopeNames = RopeNames { theta: &["rope_theta"], partial: &[PARTIAL], default_partial: None };
const PARTIAL: &str = "partial_rotary_factor";

pub struct Config {
    path: PathBuf,
    /// Where an inner object lies: `rope_parameters.`
    prefix: String,
    keys: Map<String, Value>,
    read: RefCell<BTreeSet<String>>,
}

impl Config {
    pub fn new(path: &Path, json: Value) -> Result<Self> {
        let Value::Object(keys) = json else {
            return Err(Error::file(path, "the configuration is not a JSON object"));
        };
        Ok(Self { path: path.to_path_buf(), prefix: String::new(), keys, read: RefCell::default() })
    }

    pub fn error(&self, key: &str, detail: impl std::fmt::Display) -> Error {
        Error::file(&self.path, format!("\"{}{key}\": {detail}", self.prefix))
    }

    /// `null` counts as absent, as it does for transformers.
    fn get(&self, key: &str) -> Option<&Value> {
        self.read.borrow_mut().insert(key.to_string());
        self.keys.get(key).filter(|value| !value.is_null())
    }

    fn typed<T>(&self, key: &str, wanted: &str, convert: fn(&Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        convert(value).map(Some).ok_or_else(|| self.error(key, format!("expected {wanted}, found {value}")))
    }

    fn required<T>(&self, key: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| self.error(key, "the key is missing"))
    }

    pub fn text(&self, key: &str) -> Result<&str> {
        let Some(value) = self.get(key) else { return Err(self.error(key, "the key is missing")) };
        value.as_str().ok_or_else(|| self.error(key, format!("expected a string, found {value}")))
    }

    pub fn flag(&self, key: &str) -> Result<bool> {
        self.flag_or(key, false)
    }

    pub fn flag_or(&self, key: &str, default: bool) -> Result<bool> {
        Ok(self.typed(key, "true or false", Value::as_bool)?.unwrap_or(default))
    }

    pub fn optional_count(&self, key: &str) -> Result<Option<usize>> {
        let positive = |v: &Value| v.as_u64().filter(|n| (1..=MAX_COUNT).contains(n)).map(|n| n as usize);
        self.typed(key, "a positive whole number up to 16777216", positive)
    }

    pub fn count(&self, key: &str) -> Result<usize> {
        let value = self.optional_count(key)?;
        self.required(key, value)
    }

    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a positive number", |v| v.as_f64().filter(|x| *x > 0.0 && x.is_finite()))
    }

    /// Refuses a file without `key`, where transformers would fill in a number that belongs to one size of model.
    pub fn must_state(&self, key: &str) -> Result<()> {
        match self.keys.contains_key(key) {
            true => Ok(()),
            false => Err(self.error(key, "the key is missing")),
        }
    }

    /// Sizes that every decoder has, checked against each other.
    pub fn sizes(&self, names: &Names) -> Result<Sizes> {
        let (layers, hidden) = (self.count(names.layers)?, self.count(names.hidden)?);
        let heads = self.count(names.heads)?;
        let own = |key: Option<&str>| key.map_or(Ok(None), |key| self.optional_count(key));
        let kv_heads = own(names.kv_heads)?.unwrap_or(heads);
        if !heads.is_multiple_of(kv_heads) {
            return Err(self.error("num_key_value_heads", format!("{heads} heads do not share {kv_heads} evenly")));
        }
        let head_dim = match own(names.head_dim)? {
            Some(head_dim) => head_dim,
            None if hidden.is_multiple_of(heads) => hidden / heads,
            None => return Err(self.error(names.heads, format!("{heads} does not divide {hidden}"))),
        };
        let widths = [(names.hidden, hidden), (names.heads, heads.saturating_mul(head_dim))];
        let depth = [(names.layers, layers, MAX_LAYERS)];
        let sizes = widths.map(|(key, width)| (key, width, MAX_WIDTH)).into_iter().chain(depth);
        if let Some((key, size, most)) = sizes.into_iter().find(|(_, size, most)| size > most) {
            return Err(self.error(key, format!("{size} in all; {most} is the most that is supported")));
        }
        let initializer_range = self.number("initializer_range")?.unwrap_or(0.02);
        Ok(Sizes { layers, hidden, vocab: self.count("vocab_size")?, heads, kv_heads, head_dim, initializer_range })
    }

    /// What the llama family has in common. No biases, no windows: the architecture's file adds them.
    pub fn decoder(&self) -> Result<Spec> {
        let sizes = self.sizes(&Names::COMMON)?;
        let norm = Norm::Rms { eps: self.number("rms_norm_eps")?.unwrap_or(1e-6) };
        let positions = Positions::Rope(self.rope(sizes.head_dim, &WHOLE_HEADS)?);
        let known = [("silu", Mlp::SwiGlu), ("swish", Mlp::SwiGlu)];
        let mlp = self.activation("hidden_act", &known)?.unwrap_or(Mlp::SwiGlu);
        let head = Head::language(self.flag("tie_word_embeddings")?);
        Ok(Spec { head, ..sizes.spec(norm, positions, mlp, self.count("intermediate_size")?) })
    }

    /// An MLP without gate.
    pub fn gelu(&self, key: &str, default: Curve) -> Result<Mlp> {
        const KNOWN: [(&str, Mlp); 4] = [
            ("gelu", Mlp::Gelu(Curve::Exact)),
            ("gelu_new", Mlp::Gelu(Curve::Tanh)),
            ("gelu_fast", Mlp::Gelu(Curve::Tanh)),
            ("gelu_pytorch_tanh", Mlp::Gelu(Curve::Tanh)),
        ];
        Ok(self.activation(key, &KNOWN)?.unwrap_or(Mlp::Gelu(default)))
    }

    fn activation(&self, key: &str, known: &[(&str, Mlp)]) -> Result<Option<Mlp>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match known.iter().find(|(name, _)| value.as_str() == Some(name)) {
            Some((_, mlp)) => Ok(Some(*mlp)),
            None => {
                let names: Vec<_> = known.iter().map(|(name, _)| format!("\"{name}\"")).collect();
                Err(self.error(key, format!("{value} is not supported, only {}", names.join(", "))))
            }
        }
    }

    /// Both spellings: `rope_parameters` (transformers 5), keys of the family's own and `rope_scaling` (4.x).
    pub fn rope(&self, head_dim: usize, names: &RopeNames) -> Result<Rope> {
        let (theta, partial) = (self.agreed(names.theta)?, self.partial(names.partial, names)?);
        let (key, scaling) = match (self.get("rope_parameters"), self.get("rope_scaling")) {
            (Some(parameters), _) => ("rope_parameters", Some(parameters)),
            (None, scaling) => ("rope_scaling", scaling),
        };
        let inner = match scaling {
            None => Map::new(),
            Some(Value::Object(map)) => map.clone(),
            Some(other) => return Err(self.error(key, format!("expected an object, found {other}"))),
        };
        let inner = Self { prefix: format!("{key}."), ..Config::new(&self.path, Value::Object(inner))? };
        let theta = inner.number("rope_theta")?.or(theta).unwrap_or(10_000.0);
        let partial = inner.partial(&[PARTIAL], names)?.or(partial).or(names.default_partial).unwrap_or(1.0);
        let kind = match inner.get("rope_type").or(inner.get("type")) {
            None => "default",
            Some(kind) => kind.as_str().ok_or_else(|| self.error(key, format!("rope_type {kind} is no string")))?,
        };
        let scaling = match kind {
            "default" => RopeScaling::None,
            "llama3" => inner.llama3()?,
            other => {
                let detail = format!("rope_type \"{other}\" is not supported, only \"default\" and \"llama3\"");
                return Err(self.error(key, detail));
            }
        };
        inner.refuse_unread()?;
        // Rounded down, as transformers does.
        let rotary_dim = (head_dim as f64 * partial) as usize;
        if rotary_dim == 0 || !rotary_dim.is_multiple_of(2) {
            let key = if partial == 1.0 { "head_dim" } else { names.partial[0] };
            let detail = format!("{rotary_dim} of a head's {head_dim} elements turn; rotary positions need pairs");
            return Err(self.error(key, detail));
        }
        Ok(Rope { theta, rotary_dim, scaling })
    }

    fn partial(&self, keys: &[&str], names: &RopeNames) -> Result<Option<f64>> {
        let most = if names.default_partial.is_some() { "at most 1" } else { "only 1" };
        match self.agreed(keys)? {
            Some(partial) if partial > 1.0 || (partial != 1.0 && names.default_partial.is_none()) => {
                let detail = format!("{partial} is not supported for this architecture, {most}");
                Err(self.error(keys[0], detail))
            }
            partial => Ok(partial),
        }
    }

    /// A number that files spell in several ways: all that are there must agree.
    fn agreed(&self, keys: &[&str]) -> Result<Option<f64>> {
        let mut found: Option<f64> = None;
        for key in keys {
            match (found, self.number(key)?) {
                (Some(first), Some(other)) if first != other => {
                    return Err(self.error(key, format!("{other}, but \"{}\" says {first}", keys[0])));
                }
                (first, other) => found = first.or(other),
            }
        }
        Ok(found)
    }

    fn llama3(&self) -> Result<RopeScaling> {
        let number = |key: &str| self.number(key).and_then(|value| self.required(key, value));
        Ok(RopeScaling::Llama3 {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original_positions: number("original_max_position_embeddings")?,
        })
    }

    /// Qwen switches windows on with a flag, for the layers named in `layer_types` or from `max_window_layers` on.
    pub fn qwen_windows(&self, layers: usize) -> Result<Vec<Option<usize>>> {
        let used = self.flag("use_sliding_window")?;
        let window = self.optional_count("sliding_window")?.filter(|_| used);
        let first = self.typed("max_window_layers", "a whole number", Value::as_u64)?.unwrap_or(28) as usize;
        let Some(types) = self.get("layer_types") else {
            return Ok((0..layers).map(|layer| window.filter(|_| layer >= first)).collect());
        };
        let types = types.as_array().filter(|types| types.len() == layers);
        let types = types.ok_or_else(|| self.error("layer_types", format!("expected {layers} entries")))?;
        let layer = |kind: &Value| match kind.as_str() {
            Some("full_attention") => Ok(None),
            Some("sliding_attention") if window.is_some() => Ok(window),
            Some("sliding_attention") => Err(self.error("layer_types", "sliding_attention without a sliding_window")),
            _ => Err(self.error("layer_types", format!("{kind} is not supported"))),
        };
        types.iter().map(layer).collect()
    }

    /// Whether the weights are those of a sequence classifier with one label, which is how a reward model is stored.
    ///
    /// # Errors
    /// A classifier with several labels.
    pub fn is_reward_model(&self) -> Result<bool> {
        let classes = self.get("architectures").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        let classifies = |class: &Value| class.as_str().is_some_and(|class| class.ends_with(CLASSIFIER));
        let (count, names) = (self.optional_count("num_labels")?, self.get("id2label").and_then(Value::as_object));
        if !classes.iter().any(classifies) {
            return Ok(false);
        }
        // As in transformers: names, else a number, else 2.
        match names.map(|names| names.len()).or(count).unwrap_or(2) {
            1 => Ok(true),
            labels => {
                Err(self
                    .error("id2label", format!("{labels} labels; a reward model has 1, classifiers are not supported")))
            }
        }
    }

    /// The id of a special token; `null` and -1 are none.
    pub fn token(&self, key: &str) -> Option<u32> {
        self.get(key).and_then(Value::as_u64).and_then(|id| u32::try_from(id).ok())
    }

    /// Refuses what nobody read, unless it is known to be harmless or is switched off.
    pub fn refuse_unread(&self) -> Result<()> {
        let read = self.read.borrow();
        let off = |v: &Value| match v {
            Value::Null | Value::Bool(false) => true,
            Value::Array(items) => items.is_empty(),
            Value::Object(items) => items.is_empty(),
            _ => false,
        };
        let harmless = |key: &str| {
            let named =
                ["_", "output_", "summary_"].iter().any(|start| key.starts_with(start)) || key.ends_with("_token_id");
            named || HARMLESS.contains(&key)
        };
        match self.keys.iter().find(|(key, value)| !read.contains(*key) && !harmless(key) && !off(value)) {
            None => Ok(()),
            Some((key, value)) => Err(self.error(
                key,
                format!(
                    "{value} is not supported: it may change what the model computes; if it does not, remove it from the file"
                ),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::arch::{ALL, llama, mistral, qwen2};
    use serde_json::json;

    fn config(extra: Value) -> Config {
        let mut all = json!({
            "model_type": "llama", "vocab_size": 100, "hidden_size": 48, "intermediate_size": 64,
            "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "hidden_act": "silu",
        });
        let (Value::Object(all), Value::Object(extra)) = (&mut all, extra) else { unreachable!() };
        all.extend(extra);
        Config::new(Path::new("config.json"), Value::Object(all.clone())).unwrap()
    }

    fn read(architecture: &str, extra: Value) -> Result<Spec> {
        let config = config(extra);
        config.text("model_type")?;
        let spec = (ALL.iter().find(|a| a.model_type == architecture).unwrap().spec)(&config)?;
        config.refuse_unread().map(|()| spec)
    }

    #[test]
    fn both_spellings_give_one_spec() {
        let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64});
        let mut new = llama3.clone();
        new["rope_theta"] = json!(500000.0);
        let new = read("llama", json!({"rope_parameters": new, "dtype": "float32"})).unwrap();
        let old = read("llama", json!({"rope_scaling": llama3, "rope_theta": 500000.0, "torch_dtype": "float32"}));
        assert_eq!(new, old.unwrap());
        assert!(matches!(new.positions, Positions::Rope(Rope { theta: 500000.0, .. })));
    }

    #[test]
    fn what_changes_the_mathematics_is_refused_by_name() {
        let cases = [
            json!({"attn_logit_softcapping": 50.0}),
            json!({"hidden_act": "gelu"}),
            json!({"rope_scaling": {"type": "yarn", "factor": 4.0}}),
            json!({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
            json!({"quantization_config": {"bits": 4}}),
            json!({"num_experts": 8}),
            json!({"head_dim": 7}),
            json!({"num_key_value_heads": 4}),
            json!({"vocab_size": "many"}),
            json!({"hidden_act": 3}),
            json!({"num_hidden_layers": 4_000_000_000u64}),
            json!({"num_hidden_layers": 5000}),
            json!({"num_attention_heads": 16_000_000, "num_key_value_heads": 16_000_000, "head_dim": 4}),
            json!({"sliding_window": 4096}),
        ];
        for case in cases {
            let key = case.as_object().unwrap().keys().next().unwrap().clone();
            let message = read("llama", case).expect_err(&key).to_string();
            assert!(message.starts_with("config.json: ") && message.contains(&key), "{message}");
        }
    }

    #[test]
    fn what_does_not_is_accepted() {
        let extra = json!({"_name_or_path": "x", "use_cache": true, "rope_interleaved": false, "quantization_config": null,
            "is_llama_config": true, "unk_token_id": 0, "output_attentions": false, "attention_dropout": 0.1, "pretraining_tp": 2});
        let spec = read("llama", extra).unwrap();
        assert_eq!((spec.head_dim, spec.head, spec.qkv_bias), (8, Head::Own, false));
        let key = (llama::ARCHITECTURE.naming)(&spec, super::super::Slot::Key, 2);
        assert_eq!(key.tensor, "model.layers.2.self_attn.k_proj.weight");
    }

    /// transformers' own defaults are those of one model: 8 key heads for Mistral, 32 and heads of 128 for Qwen 3.
    #[test]
    fn sizes_are_not_guessed() {
        let without = |architecture: &str, key: &str| {
            let mut keys = config(json!({"head_dim": 8})).keys;
            keys.shift_remove(key);
            let config = Config::new(Path::new("config.json"), Value::Object(keys)).unwrap();
            (ALL.iter().find(|a| a.model_type == architecture).unwrap().spec)(&config).map(|_| ())
        };
        for (architecture, key) in [
            ("mistral", "num_key_value_heads"),
            ("qwen2", "num_key_value_heads"),
            ("qwen3", "num_key_value_heads"),
            ("qwen3", "head_dim"),
        ] {
            assert!(without(architecture, key).unwrap_err().to_string().contains(key));
        }
        assert!(without("llama", "num_key_value_heads").is_ok());
    }

    #[test]
    fn windows_follow_their_switches() {
        let windows = |architecture, extra| read(architecture, extra).unwrap().windows;
        assert_eq!(windows(mistral::ARCHITECTURE.model_type, json!({"sliding_window": 8})), [Some(8); 3]);
        assert_eq!(windows("mistral", json!({"sliding_window": null})), [None; 3]);
        let qwen = qwen2::ARCHITECTURE.model_type;
        assert_eq!(windows(qwen, json!({"sliding_window": 8, "use_sliding_window": false})), [None; 3]);
        let on = json!({"sliding_window": 8, "use_sliding_window": true, "max_window_layers": 1});
        assert_eq!(windows(qwen, on), [None, Some(8), Some(8)]);
        let types = ["sliding_attention", "full_attention", "full_attention"];
        let named = json!({"sliding_window": 8, "use_sliding_window": true, "layer_types": types});
        assert_eq!(windows(qwen, named), [Some(8), None, None]);
    }

    fn neox(extra: Value) -> Result<Spec> {
        let mut all = json!({"num_key_value_heads": null, "hidden_act": "gelu"});
        let (Value::Object(map), Value::Object(extra)) = (&mut all, extra) else { unreachable!() };
        map.extend(extra);
        read("gpt_neox", all)
    }

    fn gpt2(extra: Value) -> Result<Spec> {
        let mut all = json!({"vocab_size": 100, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 64});
        let (Value::Object(map), Value::Object(extra)) = (&mut all, extra) else { unreachable!() };
        map.extend(extra);
        let config = Config::new(Path::new("config.json"), all)?;
        let spec = (ALL.iter().find(|a| a.model_type == "gpt2").unwrap().spec)(&config)?;
        config.refuse_unread().map(|()| spec)
    }

    #[test]
    fn defaults_are_those_of_transformers() {
        let spec = neox(json!({"rotary_pct": null})).unwrap();
        assert!(matches!(spec.positions, Positions::Rope(Rope { theta: 10_000.0, rotary_dim: 2, .. })));
        assert!(spec.parallel_residual && spec.qkv_bias && spec.out_bias && spec.mlp_bias && spec.head == Head::Own);
        assert_eq!((spec.norm, spec.mlp), (Norm::Layer { eps: 1e-5 }, Mlp::Gelu(Curve::Exact)));
        let spec = gpt2(json!({"n_ctx": 64, "summary_type": "cls_index", "task_specific_params": {"a": 1}})).unwrap();
        assert_eq!((spec.mlp_dim, spec.mlp, spec.head), (192, Mlp::Gelu(Curve::Tanh), Head::Tied));
        assert_eq!((spec.norm, spec.most_positions()), (Norm::Layer { eps: 1e-5 }, Some(64)));
    }

    #[test]
    fn partial_rotations_are_read_in_both_spellings() {
        let new = json!({"rope_parameters": {"rope_type": "default", "rope_theta": 5e3, "partial_rotary_factor": 0.5}});
        let old = json!({"rotary_pct": 0.5, "rotary_emb_base": 5000, "partial_rotary_factor": 0.5});
        let spec = neox(new).unwrap();
        assert_eq!(spec, neox(old).unwrap());
        assert!(matches!(spec.positions, Positions::Rope(Rope { theta: 5e3, rotary_dim: 4, .. })));
        // 5.6 of 8 elements are 5: no pairs.
        for (key, value) in [("rotary_pct", 0.7), ("rotary_pct", 0.1), ("rotary_pct", 1.5)] {
            let message = neox(json!({key: value})).unwrap_err().to_string();
            assert!(message.starts_with("config.json: \"rotary_pct\": "), "{message}");
        }
        let message = neox(json!({"rotary_pct": 0.5, "partial_rotary_factor": 0.25})).unwrap_err().to_string();
        assert!(message.contains("\"partial_rotary_factor\": 0.25, but \"rotary_pct\" says 0.5"), "{message}");
    }

    #[test]
    fn what_gpt_does_otherwise_is_refused_by_name() {
        for case in [
            json!({"scale_attn_weights": false}),
            json!({"scale_attn_by_inverse_layer_idx": true}),
            json!({"add_cross_attention": true}),
            json!({"activation_function": "relu"}),
            json!({"n_positions": null}),
            json!({"n_head": 5}),
            json!({"rotary_pct": 0.25}),
        ] {
            let key = case.as_object().unwrap().keys().next().unwrap().clone();
            let message = gpt2(case).expect_err(&key).to_string();
            assert!(message.starts_with("config.json: ") && message.contains(&key), "{message}");
        }
        for case in [json!({"hidden_act": "silu"}), json!({"head_dim": 16}), json!({"num_key_value_heads": 2})] {
            let key = case.as_object().unwrap().keys().next().unwrap().clone();
            let message = neox(case).expect_err(&key).to_string();
            assert!(message.starts_with("config.json: ") && message.contains(&key), "{message}");
        }
        gpt2(json!({"reorder_and_upcast_attn": true, "attn_pdrop": 0.1, "scale_attn_weights": true})).unwrap();
    }
}
