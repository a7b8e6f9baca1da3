//! The models of a merge: whether they fit each other, and which tensors they share.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::parts::Source;
use crate::checkpoint::json::read_json;
use crate::checkpoint::{Layout, Weights};
use crate::error::{Error, Result};

/// What files carry and models compute again: masks of attention, frequencies of rotary embeddings.
const BUFFERS: &[&str] =
    &[".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq"];
/// Heads that are the input embedding again where the config ties them.
const HEADS: &[&str] = &["lm_head.weight", "embed_out.weight"];

/// Keys of config.json that change what equal shapes mean, and what they are about.
const FAMILY: &[(&str, &str)] = &[
    ("model_type", "architectures"),
    ("tie_word_embeddings", "heads"),
    ("num_attention_heads", "attention heads"),
    ("num_key_value_heads", "attention heads"),
    ("hidden_act", "activations"),
    ("activation_function", "activations"),
];
/// Of these what is not said is compared too.
const MUST_SAY: &[&str] = &["model_type", "tie_word_embeddings"];
/// Names of one function.
const GELU_TANH: &[&str] = &["gelu_new", "gelu_pytorch_tanh"];
/// Keys of which null says something, too.
const OR_NONE: &[&str] = &["sliding_window", "rope_scaling"];
/// Keys that models of one family differ by: the merged model has the base's.
const TUNED: &[&str] = &[
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "sliding_window",
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
];

/// A model's folder, opened.
pub struct Model {
    pub path: PathBuf,
    pub config: Value,
    pub weights: Weights,
}

impl Model {
    pub fn open(path: &Path) -> Result<Self> {
        let config = read_json(&path.join("config.json"))?;
        Ok(Self { path: path.to_path_buf(), config, weights: Weights::open(path)? })
    }

    /// What is merged: not buffers, nor a head that is tied.
    fn names(&self) -> BTreeSet<&str> {
        let tied = self.config["tie_word_embeddings"] == Value::Bool(true);
        let left_out = |name: &str| BUFFERS.iter().any(|end| name.ends_with(end)) || (tied && HEADS.contains(&name));
        self.weights.names().filter(|name| !left_out(name)).collect()
    }

    fn name(&self) -> std::path::Display<'_> {
        self.path.display()
    }

    /// A tensor's values, for merging.
    pub fn tensor<'a>(&'a self, name: &'a str) -> Stored<'a> {
        Stored { weights: &self.weights, name }
    }
}

/// One tensor of a checkpoint.
pub struct Stored<'a> {
    weights: &'a Weights,
    name: &'a str,
}

impl Source<f32> for Stored<'_> {
    fn read(&self, start: usize, out: &mut [f32]) -> Result<()> {
        self.weights.read_part(self.name, start, out)
    }
}

/// The tensors that all models have, in the order of their names, which is the order of most files.
///
/// Fails, naming models and tensors, where architectures, the tying of heads, names or shapes differ, and on tensors
/// that cannot be merged. What is left out of a merge is the business of [`left_out`].
pub fn shared(models: &[&Model]) -> Result<Vec<Layout>> {
    let (first, others) = models.split_first().expect("a merge has models");
    others.iter().try_for_each(|other| same_family(first, other))?;
    let names = first.names();
    others.iter().try_for_each(|other| same_names(first, &names, other))?;
    let layout = |name: &&str| {
        let shape = first.weights.shape(name).expect("the name is from there");
        models.iter().try_for_each(|model| {
            let found = model.weights.shape(name).expect("all have it");
            if found == shape { Ok(()) } else { Err(shapes_differ(first, shape, model, found, name)) }
        })?;
        models.iter().try_for_each(|model| match model.weights.stored_as(name) {
            Some(_) => Ok(()),
            None => {
                let detail = format!("{name:?} is stored as a type that cannot be merged; F32, F16 and BF16 can");
                Err(Error::file(model.weights.path_of(name), detail))
            }
        })?;
        Ok(Layout { name: name.to_string(), shape: shape.to_vec() })
    };
    names.iter().map(layout).collect()
}

/// Tensors of the first model that do not go into the merge.
pub fn left_out(first: &Model) -> Vec<&str> {
    let names = first.names();
    first.weights.names().filter(|name| !names.contains(name)).collect()
}

fn same_family(first: &Model, other: &Model) -> Result<()> {
    for (key, means) in FAMILY {
        // What a config does not say is the default of its model type.
        let (a, b) = (&first.config[key], &other.config[key]);
        let same_tanh = [a, b].iter().all(|name| name.as_str().is_some_and(|name| GELU_TANH.contains(&name)));
        if a != b && !same_tanh && (MUST_SAY.contains(key) || !a.is_null() && !b.is_null()) {
            let detail =
                format!("{key} is {b}, {} has {a}: models of different {means} cannot be merged", first.name());
            return Err(Error::file(other.path.join("config.json"), detail));
        }
    }
    Ok(())
}

/// A warning where the configs of two models that can be merged differ.
pub fn compare_configs(first: &Model, other: &Model) -> Option<String> {
    let differs = |key: &&&str| {
        let (a, b) = (&first.config[**key], &other.config[**key]);
        a != b && (OR_NONE.contains(*key) || !a.is_null() && !b.is_null())
    };
    let shown: Vec<String> = TUNED
        .iter()
        .filter(differs)
        .map(|key| format!("{key} ({} and {})", first.config[*key], other.config[*key]))
        .collect();
    let names = || format!("{} and {}", first.name(), other.name());
    (!shown.is_empty())
        .then(|| format!("{} differ in {}: the merged model has the former's", names(), shown.join(", ")))
}

fn same_names(first: &Model, names: &BTreeSet<&str>, other: &Model) -> Result<()> {
    let found = other.names();
    let missing: Vec<&str> = names.difference(&found).copied().collect();
    let extra: Vec<&str> = found.difference(names).copied().collect();
    let differs = |what: &str, of: &[&str], in_model: &Model| {
        let detail = format!(
            "{what} {} of the tensors of {}, such as {:?}; all models must have the same",
            of.len(),
            in_model.name(),
            of[0]
        );
        Err(Error::file(&other.path, detail))
    };
    match (&missing[..], &extra[..]) {
        ([], []) => Ok(()),
        ([], extra) => {
            let detail = format!(
                "has {} tensors that {} does not have, such as {:?}; all models must have the same",
                extra.len(),
                first.name(),
                extra[0]
            );
            Err(Error::file(&other.path, detail))
        }
        (missing, _) => differs("lacks", missing, first),
    }
}

fn shapes_differ(first: &Model, shape: &[usize], other: &Model, found: &[usize], name: &str) -> Error {
    let rows = |model: &Model, shape: &[usize]| {
        shape.first().is_some_and(|rows| model.config["vocab_size"].as_u64() == Some(*rows as u64))
    };
    let why = if rows(first, shape) && rows(other, found) && shape[1..] == found[1..] {
        "the vocabularies differ; cuvee merges models of one vocabulary"
    } else {
        "are these models of one size?"
    };
    let detail = format!("{name:?} has shape {found:?}, in {} it has {shape:?}; {why}", first.name());
    Error::file(other.weights.path_of(name), detail)
}

/// Compares the tokenizer of a model with the first one's, whose files the merged model gets: a warning where added
/// tokens differ, an error where the vocabulary does. Models without tokenizer.json are taken at their word.
pub fn compare_tokenizers(first: &Model, other: &Model) -> Result<Option<String>> {
    const FILE: &str = "tokenizer.json";
    let (ours, theirs) = (first.path.join(FILE), other.path.join(FILE));
    if !ours.exists() || !theirs.exists() {
        return Ok(None);
    }
    let (ours, theirs) = (read_json(&ours)?, read_json(&theirs)?);
    let vocabulary = |tokenizer: &Value| -> BTreeMap<String, Value> { ids(&tokenizer["model"]["vocab"]) };
    if let Some((token, a, b)) = difference(&vocabulary(&ours), &vocabulary(&theirs)) {
        let detail = format!(
            "token {token:?} is {b}, in {} it is {a}: the tokenizers differ, and embeddings of different tokens would \
             be merged",
            first.name()
        );
        return Err(Error::file(other.path.join(FILE), detail));
    }
    let added = |tokenizer: &Value| -> BTreeMap<String, Value> {
        let tokens = tokenizer["added_tokens"].as_array().into_iter().flatten();
        tokens.map(|token| (token["content"].as_str().unwrap_or("").to_string(), token["id"].clone())).collect()
    };
    Ok(difference(&added(&ours), &added(&theirs)).map(|(token, a, b)| {
        format!(
            "{}: added token {token:?} is {b}, in {} it is {a}; the merged model gets the tokenizer of {}",
            other.name(),
            first.name(),
            first.name()
        )
    }))
}

/// Ids by token; Unigram writes pairs in the order of ids.
fn ids(vocabulary: &Value) -> BTreeMap<String, Value> {
    match vocabulary {
        Value::Object(ids) => ids.iter().map(|(token, id)| (token.clone(), id.clone())).collect(),
        Value::Array(pairs) => {
            pairs.iter().enumerate().map(|(id, pair)| (pair[0].as_str().unwrap_or("").to_string(), id.into())).collect()
        }
        _ => BTreeMap::new(),
    }
}

/// The first token that two tokenizers do not have alike, with what each says.
fn difference(ours: &BTreeMap<String, Value>, theirs: &BTreeMap<String, Value>) -> Option<(String, String, String)> {
    let say = |id: Option<&Value>| id.map_or("unknown".to_string(), |id| format!("number {id}"));
    let token = ours.keys().chain(theirs.keys()).find(|token| ours.get(*token) != theirs.get(*token))?;
    Some((token.clone(), say(ours.get(token)), say(theirs.get(token))))
}
