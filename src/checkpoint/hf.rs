//! What stands beside the weights in a Hugging Face folder.

use std::fs::File;
use std::io;
use std::path::Path;

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

/// Copies config.json and says in it which dtype the weights now have.
///
/// transformers 4 spells the key `torch_dtype`, transformers 5 `dtype`: the spelling that is there is kept, and
/// without either `dtype` is added.
pub fn write_config(from_dir: &Path, to_dir: &Path, dtype: SaveDtype) -> Result<()> {
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
            write_config(from.path(), to.path(), SaveDtype::Bf16).unwrap();
            serde_json::to_string(&read_json(&to.path().join("config.json")).unwrap()).unwrap()
        };
        assert_eq!(rewrite(r#"{"dtype":"float16","a":1}"#), r#"{"dtype":"bfloat16","a":1}"#);
        assert_eq!(rewrite(r#"{"torch_dtype":null,"a":1}"#), r#"{"torch_dtype":"bfloat16","a":1}"#);
        assert_eq!(rewrite(r#"{"dtype":"x","torch_dtype":"y"}"#), r#"{"dtype":"bfloat16","torch_dtype":"bfloat16"}"#);
        assert_eq!(rewrite(r#"{"a":0.1}"#), r#"{"a":0.1,"dtype":"bfloat16"}"#);
    }

    #[test]
    fn a_config_that_is_no_object_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), "[]").unwrap();
        let error = write_config(dir.path(), dir.path(), SaveDtype::F32).unwrap_err().to_string();
        assert!(error.contains("config.json: is not a JSON object"), "{error}");
    }
}
