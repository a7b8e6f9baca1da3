//! What stands beside the weights in a Hugging Face folder.

use std::fs::File;
use std::io;
use std::path::Path;

use serde_json::json;

use super::atomic::write_file;
use super::json::{read_json, write_json};
use super::save::SaveDtype;
use crate::error::{At, Error, Result};

const COMPANIONS: [&str; 9] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tokenizer.model",
];

/// Copies the tokenizer, generation and chat-template files that `from` has into `to`, byte for byte.
pub fn copy_companions(from: &Path, to: &Path) -> Result<()> {
    for name in COMPANIONS {
        let source = from.join(name);
        if source.exists() {
            let mut file = File::open(&source).at(&source)?;
            write_file(&to.join(name), |out| io::copy(&mut file, out).map(|_| ()))?;
        }
    }
    Ok(())
}

/// What config.json says of a reward model.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RewardModel {
    /// `LlamaForSequenceClassification`
    pub class: String,
    /// The token that transformers takes for padding where it looks for the end of a sequence.
    pub pad: Option<u32>,
}

/// Copies config.json and says in it which dtype the weights now have and, of a reward model, that they end in one
/// score, as TRL's RewardTrainer saves it.
///
/// transformers 4 spells the key `torch_dtype`, transformers 5 `dtype`: the spelling that is there is kept, and
/// without either `dtype` is added.
pub fn write_config(from_dir: &Path, to_dir: &Path, dtype: SaveDtype, reward: Option<&RewardModel>) -> Result<()> {
    let source = from_dir.join("config.json");
    let mut config = read_json(&source)?;
    let Some(fields) = config.as_object_mut() else {
        return Err(Error::file(&source, "is not a JSON object; is this a model's config.json?"));
    };
    if !fields.contains_key("torch_dtype") {
        fields.insert("dtype".into(), dtype.config_name().into());
    } else {
        for key in ["torch_dtype", "dtype"] {
            if let Some(value) = fields.get_mut(key) {
                *value = dtype.config_name().into();
            }
        }
    }
    if let Some(RewardModel { class, pad }) = reward {
        fields.insert("architectures".into(), json!([class]));
        fields.insert("id2label".into(), json!({"0": "LABEL_0"}));
        fields.insert("label2id".into(), json!({"LABEL_0": 0}));
        fields.insert("pad_token_id".into(), json!(pad));
        // The names are counted; a number beside them could say otherwise.
        fields.shift_remove("num_labels");
    }
    write_json(&to_dir.join("config.json"), &config)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn companions_are_copied_and_nothing_else() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for name in ["tokenizer.json", "chat_template.jinja", "training_args.bin"] {
            fs::write(from.path().join(name), name).unwrap();
        }
        copy_companions(from.path(), to.path()).unwrap();
        assert_eq!(fs::read_to_string(to.path().join("tokenizer.json")).unwrap(), "tokenizer.json");
        assert_eq!(fs::read_dir(to.path()).unwrap().count(), 2);
    }

    #[test]
    fn the_spelling_of_the_dtype_is_kept() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let rewrite = |text: &str| {
            fs::write(from.path().join("config.json"), text).unwrap();
            write_config(from.path(), to.path(), SaveDtype::Bf16, None).unwrap();
            serde_json::to_string(&read_json(&to.path().join("config.json")).unwrap()).unwrap()
        };
        assert_eq!(rewrite(r#"{"dtype":"float16","a":1}"#), r#"{"dtype":"bfloat16","a":1}"#);
        assert_eq!(rewrite(r#"{"torch_dtype":null,"a":1}"#), r#"{"torch_dtype":"bfloat16","a":1}"#);
        assert_eq!(rewrite(r#"{"dtype":"x","torch_dtype":"y"}"#), r#"{"dtype":"bfloat16","torch_dtype":"bfloat16"}"#);
        assert_eq!(rewrite(r#"{"a":0.1}"#), r#"{"a":0.1,"dtype":"bfloat16"}"#);
    }

    #[test]
    fn a_reward_model_has_one_label_and_says_what_pads() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        let text = r#"{"architectures":["LlamaForCausalLM"],"num_labels":3,"dtype":"float16","pad_token_id":null}"#;
        fs::write(&path, text).unwrap();
        let reward = RewardModel { class: "LlamaForSequenceClassification".into(), pad: Some(7) };
        write_config(dir.path(), dir.path(), SaveDtype::F32, Some(&reward)).unwrap();
        let expected = r#"{"architectures":["LlamaForSequenceClassification"],"dtype":"float32","pad_token_id":7,"id2label":{"0":"LABEL_0"},"label2id":{"LABEL_0":0}}"#;
        assert_eq!(serde_json::to_string(&read_json(&path).unwrap()).unwrap(), expected);
        // Nothing pads: transformers then takes sequences one by one.
        let reward = RewardModel { pad: None, ..reward };
        write_config(dir.path(), dir.path(), SaveDtype::F32, Some(&reward)).unwrap();
        assert_eq!(read_json(&path).unwrap()["pad_token_id"], json!(null));
    }

    #[test]
    fn a_config_that_is_no_object_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), "[]").unwrap();
        let error = write_config(dir.path(), dir.path(), SaveDtype::F32, None).unwrap_err().to_string();
        assert!(error.contains("config.json: is not a JSON object"), "{error}");
    }
}
