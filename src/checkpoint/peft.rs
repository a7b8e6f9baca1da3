//! LoRA adapters as PEFT keeps them: `adapter_config.json` and `adapter_model.safetensors` (Hu et al.,
//! arXiv:2106.09685; rank-stabilized scaling: Kalajdzievski, arXiv:2312.03732).
//!
//! An adapter adds `scaling * B A` to the weight `[outputs, inputs]` of some linear modules: A is `[rank, inputs]`, B
//! `[outputs, rank]`, scaling `alpha / rank`, or `alpha / sqrt(rank)` of a rank-stabilized one. What PEFT can do beyond
//! that changes what the two matrices mean, and is refused by name.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use fancy_regex::Regex;
use serde_json::{Map, Value, json};

use super::json::{read_json, write_json};
use super::save::{SaveDtype, TensorSource, save_safetensors};
use super::weights::Weights;
use crate::error::{At, Error, Result};

pub const CONFIG: &str = "adapter_config.json";
pub const WEIGHTS: &str = "adapter_model.safetensors";
const PICKLE: &str = "adapter_model.bin";
/// What PEFT's wrapper around a model puts before the names of its modules.
const PREFIX: &str = "base_model.model.";
const A: &str = ".lora_A.weight";
const B: &str = ".lora_B.weight";

/// The name of a module's A in a file; `module` as the base's checkpoint calls it, `model.layers.0.self_attn.q_proj`.
pub fn a_name(module: &str) -> String {
    format!("{PREFIX}{module}{A}")
}

/// The name of a module's B in a file.
pub fn b_name(module: &str) -> String {
    format!("{PREFIX}{module}{B}")
}

/// What a file calls a tensor of the model; those of adapters have their names already.
pub fn saved_name(tensor: &str) -> String {
    if tensor.starts_with(PREFIX) { tensor.to_string() } else { format!("{PREFIX}{tensor}") }
}

/// Whether a tensor of a file is an A.
pub fn is_a(name: &str) -> bool {
    name.ends_with(A)
}

/// Whether a folder holds an adapter and no model.
pub fn is_adapter(dir: &Path) -> bool {
    dir.join(CONFIG).exists() && !dir.join("config.json").exists()
}

/// What `adapter_config.json` says.
#[derive(Clone, PartialEq, Debug)]
pub struct AdapterConfig {
    /// `r`, of modules that `rank_pattern` does not name.
    pub lora_rank: usize,
    /// Of modules that `alpha_pattern` does not name.
    pub lora_alpha: f64,
    /// Scaling is `alpha / sqrt(rank)`.
    pub rslora: bool,
    /// Of training; what is loaded is not dropped.
    pub lora_dropout: f64,
    /// Modules, each by its whole name or by the end of it that follows a dot.
    pub target_modules: Vec<String>,
    /// `base_model_name_or_path`: a folder or a name on a hub.
    pub base_model: Option<String>,
    /// The base keeps these weights as `[inputs, outputs]` (GPT-2's Conv1D).
    pub fan_in_fan_out: bool,
    /// (regular expression of the end of a module's name, rank); the first that fits counts.
    pub rank_pattern: Vec<(String, usize)>,
    /// The same of alphas.
    pub alpha_pattern: Vec<(String, f64)>,
    /// `CAUSAL_LM`, `SEQ_CLS`, ...
    pub task_type: Option<String>,
    /// The head of a reward model trained besides and is kept whole: `modules_to_save` is `["score"]`.
    pub has_head: bool,
}

impl Default for AdapterConfig {
    /// PEFT's defaults for a language model, without any module.
    fn default() -> Self {
        Self {
            lora_rank: 8,
            lora_alpha: 8.0,
            rslora: false,
            lora_dropout: 0.0,
            target_modules: Vec::new(),
            base_model: None,
            fan_in_fan_out: false,
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            task_type: Some("CAUSAL_LM".into()),
            has_head: false,
        }
    }
}

/// Keys that say nothing about what the matrices mean, or are read elsewhere.
const READ: &[&str] = &[
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "ensure_weight_tying",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
];

/// Settings of how A and B were initialized; `init_lora_weights` says whether that touched the base.
const INITS: &[&str] = &["corda_config", "eva_config", "loftq_config", "lora_ga_config"];

/// (key, what it is) of variants that are known and not applied.
const REFUSED: &[(&str, &str)] = &[
    ("use_dora", "DoRA learns the length of each row of a weight, too"),
    ("lora_bias", "B has a bias"),
    ("trainable_token_indices", "rows of the embedding were trained, too"),
    ("layer_replication", "the base's layers are repeated"),
    ("target_parameters", "parameters that are no linear modules are adapted"),
    ("alora_invocation_tokens", "the adapter begins in the middle of a text (aLoRA)"),
    ("use_qalora", "inputs are pooled in groups (QALoRA)"),
    ("use_bdlora", "the matrices are block-diagonal (BD-LoRA)"),
];

/// What PEFT writes as `modules_to_save` of a reward model: it has one of the two.
const HEADS: &[&str] = &["classifier", "score"];
/// The head of transformers' `..ForSequenceClassification` models that cuvee reads.
const HEAD: &str = "score.weight";

/// Initializations that leave the base as it is.
const PLAIN_INITS: &[&str] = &["gaussian", "eva", "orthogonal", "mica"];

const TO_WHOLE_MODEL: &str =
    "fold it into its base with PEFT (`merge_and_unload`, `save_pretrained`) and give that model instead";

impl AdapterConfig {
    /// Rank of a module that is adapted.
    pub fn rank(&self, module: &str) -> Result<usize> {
        Ok(first_fit(&self.rank_pattern, module)?.unwrap_or(self.lora_rank))
    }

    /// What a module's `B A` is multiplied with.
    pub fn scaling(&self, module: &str) -> Result<f64> {
        let alpha = first_fit(&self.alpha_pattern, module)?.unwrap_or(self.lora_alpha);
        Ok(self.of(alpha, self.rank(module)?))
    }

    /// The same, where no pattern fits.
    pub fn default_scaling(&self) -> f64 {
        self.of(self.lora_alpha, self.lora_rank)
    }

    fn of(&self, alpha: f64, rank: usize) -> f64 {
        alpha / if self.rslora { (rank as f64).sqrt() } else { rank as f64 }
    }

    fn names(&self, module: &str) -> bool {
        let fits =
            |target: &String| module.strip_suffix(target.as_str()).is_some_and(|s| s.is_empty() || s.ends_with('.'));
        self.target_modules.iter().any(fits)
    }

    fn parse(path: &Path) -> Result<Self> {
        let config = read_json(path)?;
        let Value::Object(fields) = &config else {
            return Err(Error::file(path, "is not a JSON object; is this an adapter of PEFT?"));
        };
        let fields = Fields { path, fields };
        fields.check()?;
        let targets = match fields.get("target_modules") {
            // What restricts or spells targets in other ways is decided by what is in the file.
            Some(Value::Array(targets))
                if !fields.is_set("exclude_modules") && !fields.is_set("layers_to_transform") =>
            {
                targets.iter().filter_map(|target| target.as_str().map(String::from)).collect()
            }
            _ => Vec::new(),
        };
        let config = Self {
            lora_rank: fields.rank("r", fields.get("r"))?,
            lora_alpha: fields.number("lora_alpha", fields.get("lora_alpha"))?,
            rslora: fields.is_set("use_rslora"),
            lora_dropout: fields.get("lora_dropout").and_then(Value::as_f64).unwrap_or(0.0),
            target_modules: targets,
            base_model: fields.text("base_model_name_or_path"),
            fan_in_fan_out: fields.is_set("fan_in_fan_out"),
            rank_pattern: fields.patterns("rank_pattern", |key, value| fields.rank(key, Some(value)))?,
            alpha_pattern: fields.patterns("alpha_pattern", |key, value| fields.number(key, Some(value)))?,
            task_type: fields.text("task_type"),
            has_head: fields.is_set("modules_to_save"),
        };
        Ok(config)
    }

    fn to_json(&self) -> Value {
        // PEFT writes a whole alpha without a point.
        let number = |x: f64| if x.fract() == 0.0 && x.abs() < 1e15 { json!(x as i64) } else { json!(x) };
        let ranks: Map<String, Value> = self.rank_pattern.iter().map(|(k, rank)| (k.clone(), json!(rank))).collect();
        let alphas: Map<String, Value> = self.alpha_pattern.iter().map(|(k, a)| (k.clone(), number(*a))).collect();
        json!({
            "peft_type": "LORA",
            "task_type": self.task_type,
            "base_model_name_or_path": self.base_model,
            "inference_mode": true,
            "r": self.lora_rank,
            "lora_alpha": number(self.lora_alpha),
            "use_rslora": self.rslora,
            "lora_dropout": self.lora_dropout,
            "target_modules": self.target_modules,
            "rank_pattern": ranks,
            "alpha_pattern": alphas,
            "fan_in_fan_out": self.fan_in_fan_out,
            "bias": "none",
            "init_lora_weights": true,
            "use_dora": false,
            "modules_to_save": self.has_head.then_some(["score"]),
        })
    }
}

/// The value of the first pattern that fits, as PEFT finds it: an expression of the whole name, or of the end of it that
/// follows a dot.
fn first_fit<T: Copy>(patterns: &[(String, T)], module: &str) -> Result<Option<T>> {
    for (pattern, value) in patterns {
        let whole = Regex::new(&format!(r"^(?:.*\.)?(?:{pattern})$"));
        let bad =
            |e: &dyn std::fmt::Display| Error::file(CONFIG, format!("the pattern {pattern:?} cannot be used: {e}"));
        if whole.map_err(|e| bad(&e))?.is_match(module).map_err(|e| bad(&e))? {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

/// The keys of a config, with its path for messages.
struct Fields<'a> {
    path: &'a Path,
    fields: &'a Map<String, Value>,
}

impl Fields<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.fields.get(key)
    }

    fn text(&self, key: &str) -> Option<String> {
        self.get(key).and_then(Value::as_str).map(String::from)
    }

    fn fail<T>(&self, detail: String) -> Result<T> {
        Err(Error::file(self.path, detail))
    }

    /// Whether a key is there and asks for something.
    fn is_set(&self, key: &str) -> bool {
        self.get(key).is_some_and(|value| !is_neutral(value))
    }

    /// Refuses what is no plain LoRA.
    fn check(&self) -> Result<()> {
        match self.text("peft_type").as_deref() {
            Some("LORA") => {}
            found => {
                let found = found.unwrap_or("nothing");
                return self.fail(format!("\"peft_type\" is {found}, cuvee reads LORA; {TO_WHOLE_MODEL}"));
            }
        }
        if let Some((key, what)) = REFUSED.iter().find(|(key, _)| self.is_set(key)) {
            let value = &self.fields[*key];
            return self.fail(format!("\"{key}\" is {value}: {what}, which cuvee does not apply; {TO_WHOLE_MODEL}"));
        }
        let is_head = |module: &Value| module.as_str().is_some_and(|name| HEADS.contains(&name));
        match self.get("modules_to_save") {
            Some(Value::Array(modules)) if modules.iter().all(is_head) => {}
            None | Some(Value::Null) => {}
            Some(modules) => {
                return self.fail(format!(
                    "\"modules_to_save\" is {modules}: whole modules were trained, too, which cuvee does not apply, but for the \
                     score of a reward model; {TO_WHOLE_MODEL}"
                ));
            }
        }
        match self.get("bias") {
            None | Some(Value::Null) => {}
            Some(bias) if bias == "none" => {}
            Some(bias) => {
                return self.fail(format!(
                    "\"bias\" is {bias}: biases of the base were trained, too, which cuvee does not apply; {TO_WHOLE_MODEL}"
                ));
            }
        }
        if let Some(Value::String(init)) = self.get("init_lora_weights")
            && !PLAIN_INITS.contains(&init.as_str())
        {
            return self.fail(format!(
                "\"init_lora_weights\" is \"{init}\", which changes the base's weights when the adapter is made, so this adapter \
                 belongs to a base that is in no file; save it again with PEFT's `path_initial_model_for_weight_conversion`"
            ));
        }
        let known = |key: &str| READ.contains(&key) || INITS.contains(&key) || REFUSED.iter().any(|(k, _)| *k == key);
        match self.fields.iter().find(|(key, value)| !known(key) && !is_neutral(value)) {
            None => Ok(()),
            Some((key, value)) => self.fail(format!(
                "\"{key}\" is {value}, which cuvee does not know and which may change what the adapter does; {TO_WHOLE_MODEL}"
            )),
        }
    }

    fn rank(&self, key: &str, value: Option<&Value>) -> Result<usize> {
        match value.and_then(Value::as_u64).filter(|rank| (1..=1 << 20).contains(rank)) {
            Some(rank) => Ok(rank as usize),
            None => self.fail(format!("\"{key}\" is {}, expected a rank of 1 or more", shown(value))),
        }
    }

    fn number(&self, key: &str, value: Option<&Value>) -> Result<f64> {
        match value.and_then(Value::as_f64).filter(|number| number.is_finite()) {
            Some(number) => Ok(number),
            None => self.fail(format!("\"{key}\" is {}, expected a number", shown(value))),
        }
    }

    fn patterns<T: Copy>(&self, key: &str, one: impl Fn(&str, &Value) -> Result<T>) -> Result<Vec<(String, T)>> {
        let patterns = match self.get(key) {
            None | Some(Value::Null) => return Ok(Vec::new()),
            Some(Value::Object(patterns)) => patterns,
            found => return self.fail(format!("\"{key}\" is {}, expected an object", shown(found))),
        };
        let of = |(pattern, value): (&String, &Value)| Ok((pattern.clone(), one(&format!("{key}.{pattern}"), value)?));
        let patterns = patterns.iter().map(of).collect::<Result<Vec<_>>>()?;
        first_fit(&patterns, "").map_err(|e| Error::file(self.path, e))?;
        Ok(patterns)
    }
}

fn shown(value: Option<&Value>) -> String {
    value.map_or("not there".into(), Value::to_string)
}

/// Null, false, empty: what PEFT writes of options that were not used.
fn is_neutral(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(on) => !on,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::Number(_) | Value::String(_) => false,
    }
}

/// A module's matrices, as far as their sizes go.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Module {
    rank: usize,
    inputs: usize,
    outputs: usize,
    scaling: f64,
}

/// An adapter on disk. Its matrices stay there until they are read.
pub struct AdapterFile {
    pub config: AdapterConfig,
    /// `adapter_model.safetensors`
    pub weights: Weights,
    modules: BTreeMap<String, Module>,
    /// Inputs of the reward model's head, where one is here.
    head: Option<usize>,
}

impl AdapterFile {
    /// Opens an adapter's folder and checks that config and matrices belong together. Matrices are not read.
    pub fn open(dir: &Path) -> Result<Self> {
        if !dir.join(CONFIG).exists() {
            return Err(no_adapter(dir));
        }
        let path = dir.join(WEIGHTS);
        if fs::symlink_metadata(&path).is_err() {
            let detail = match dir.join(PICKLE).exists() {
                true => format!(
                    "holds {PICKLE}, a program of Python's pickle, and no {WEIGHTS}; load it with PEFT where you trust it, \
                     and save it again (`save_pretrained` writes safetensors)"
                ),
                false => format!("holds {CONFIG} and no {WEIGHTS}; is the download complete?"),
            };
            return Err(Error::file(dir, detail));
        }
        let mut config = AdapterConfig::parse(&dir.join(CONFIG))?;
        let weights = Weights::open_file(&path)?;
        let head = head(&weights, &path, &config)?;
        let modules = modules(&weights, &path, &config)?;
        if !modules.keys().all(|module| config.names(module)) {
            config.target_modules = modules.keys().cloned().collect();
        }
        Ok(Self { config, weights, modules, head })
    }

    /// The adapted modules as the base's checkpoint calls them: `model.layers.0.self_attn.q_proj`. Sorted.
    pub fn modules(&self) -> Vec<String> {
        self.modules.keys().cloned().collect()
    }

    pub fn has(&self, module: &str) -> bool {
        self.modules.contains_key(module)
    }

    fn of(&self, module: &str) -> &Module {
        self.modules.get(module).unwrap_or_else(|| panic!("{module} is not one of `modules`"))
    }

    /// Rank of an adapted module.
    pub fn rank(&self, module: &str) -> usize {
        self.of(module).rank
    }

    /// What an adapted module's `B A` is multiplied with.
    pub fn scaling(&self, module: &str) -> f64 {
        self.of(module).scaling
    }

    /// `[outputs, inputs]` of an adapted module.
    pub fn shape(&self, module: &str) -> [usize; 2] {
        let Module { inputs, outputs, .. } = *self.of(module);
        [outputs, inputs]
    }

    /// Reads a module's A; returns its shape, `[rank, inputs]`.
    pub fn read_a(&self, module: &str, out: &mut Vec<f32>) -> Result<[usize; 2]> {
        let Module { rank, inputs, .. } = *self.of(module);
        self.read(&a_name(module), [rank, inputs], out)
    }

    /// Reads a module's B, not scaled; returns its shape, `[outputs, rank]`.
    pub fn read_b(&self, module: &str, out: &mut Vec<f32>) -> Result<[usize; 2]> {
        let Module { rank, outputs, .. } = *self.of(module);
        self.read(&b_name(module), [outputs, rank], out)
    }

    /// Inputs of a reward model's head, where the file has one.
    pub fn head(&self) -> Option<usize> {
        self.head
    }

    /// Reads that head, `[1, inputs]`.
    pub fn read_head(&self, out: &mut Vec<f32>) -> Result<[usize; 2]> {
        self.read(&saved_name(HEAD), [1, self.head.expect("whoever reads it asked for it")], out)
    }

    fn read(&self, name: &str, shape: [usize; 2], out: &mut Vec<f32>) -> Result<[usize; 2]> {
        out.resize(shape[0] * shape[1], 0.0);
        self.weights.read(name, &shape, out)?;
        Ok(shape)
    }

    /// Of what the adapter does.
    pub fn hash(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        self.hash_into(&mut hasher);
        *hasher.finalize().as_bytes()
    }

    /// Feeds what the adapter does into a hasher: each module's matrices and its scaling.
    pub fn hash_into(&self, hasher: &mut blake3::Hasher) {
        for (name, module) in &self.modules {
            self.weights.hash_into(&a_name(name), hasher);
            self.weights.hash_into(&b_name(name), hasher);
            hasher.update(&module.scaling.to_le_bytes());
        }
        if self.head.is_some() {
            self.weights.hash_into(&saved_name(HEAD), hasher);
        }
    }
}

/// Inputs of the reward model's head that the config speaks of.
fn head(weights: &Weights, path: &Path, config: &AdapterConfig) -> Result<Option<usize>> {
    let name = saved_name(HEAD);
    match weights.shape(&name) {
        _ if !config.has_head => Ok(None),
        Some(&[1, inputs]) => Ok(Some(inputs)),
        Some(shape) => {
            Err(Error::file(path, format!("{name:?} has shape {shape:?}, expected one output: [1, inputs]")))
        }
        None => Err(Error::file(path, format!("holds no {name:?}, which {CONFIG} says was trained; is it complete?"))),
    }
}

/// Pairs up the matrices of a file.
fn modules(weights: &Weights, path: &Path, config: &AdapterConfig) -> Result<BTreeMap<String, Module>> {
    let fail = |detail: String| Err(Error::file(path, detail));
    let mut modules = BTreeMap::new();
    for name in weights.names().filter(|name| !config.has_head || *name != saved_name(HEAD)) {
        let module = name.strip_prefix(PREFIX).and_then(|rest| rest.strip_suffix(A).or(rest.strip_suffix(B)));
        let Some(module) = module else { return fail(unknown_tensor(name)) };
        let [a, b] = [a_name(module), b_name(module)];
        let (Some(a_shape), Some(b_shape)) = (weights.shape(&a), weights.shape(&b)) else {
            let missing = if weights.shape(&a).is_some() { b } else { a };
            return fail(format!("holds {name:?} and no {missing:?}; the file is incomplete, get another copy"));
        };
        let (&[rank, inputs], &[outputs, b_rank]) = (a_shape, b_shape) else {
            return fail(format!(
                "{a:?} has shape {a_shape:?} and {b:?} {b_shape:?}, expected [rank, inputs] and [outputs, rank]; only linear \
                 modules are supported"
            ));
        };
        let expected = config.rank(module)?;
        if rank != b_rank || rank != expected {
            return fail(format!(
                "{a:?} has rank {rank}, {b:?} {b_rank}, and {CONFIG} says {expected}; do they belong together?"
            ));
        }
        modules.insert(module.to_string(), Module { rank, inputs, outputs, scaling: config.scaling(module)? });
    }
    if modules.is_empty() {
        return fail("holds no tensor, so it adapts nothing; is the download complete?".into());
    }
    Ok(modules)
}

fn unknown_tensor(name: &str) -> String {
    let what = if name.contains("lora_magnitude_vector") {
        "DoRA's lengths of rows"
    } else if name.contains("lora_embedding_") {
        "an adapter of an embedding"
    } else if name.ends_with(".bias") {
        "a bias"
    } else if name.contains("modules_to_save") || !name.contains(".lora_") {
        "a weight that was trained as a whole"
    } else {
        return format!("{name:?} is not a name that PEFT gives: {PREFIX}MODULE{A} or {B}; save it with PEFT");
    };
    format!("{name:?} is {what}, which cuvee does not apply; {TO_WHOLE_MODEL}")
}

/// Why a folder is no adapter, by what is in it.
fn no_adapter(dir: &Path) -> Error {
    let why = if !dir.is_dir() {
        "there is no such folder".to_string()
    } else if dir.join("config.json").exists() {
        format!("is a whole model (config.json) and no adapter ({CONFIG})")
    } else {
        format!("holds no {CONFIG}")
    };
    Error::file(dir, format!("{why}; an adapter is a folder that PEFT or `cuvee train --lora-rank` wrote"))
}

/// Writes an adapter into the folder `dir`, f32, as PEFT loads it: `tensors` are [`a_name`] and [`b_name`] of each module.
pub fn write(dir: &Path, config: &AdapterConfig, tensors: &[TensorSource]) -> Result<()> {
    fs::create_dir_all(dir).at(dir)?;
    save_safetensors(&dir.join(WEIGHTS), tensors, SaveDtype::F32)?;
    write_json(&dir.join(CONFIG), &config.to_json())
}
