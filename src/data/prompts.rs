//! Rows that ask for completions.

use std::path::Path;

use super::conversation::Content;
use super::records::read_objects;
use super::rows::variables;
use super::tokenizer::Tokenizer;
use crate::error::{Error, Result};

/// What a row asks to continue.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Prompt {
    /// The text that the tokenizer was given.
    pub text: String,
    /// At least one token.
    pub ids: Vec<u32>,
}

/// The prompts of a file's rows in order: column `prompt` as text or messages, or `messages`. Text gets the special tokens that
/// the tokenizer adds to any text; messages are written by its chat template, with a generation prompt. Further columns are
/// ignored.
///
/// # Errors
/// Those of [`read_objects`]; a row without a prompt, or whose prompt has no token; messages and no chat template.
pub fn read_prompts(path: &Path, tokenizer: &Tokenizer) -> Result<Vec<Prompt>> {
    let mut chat = None;
    let mut read = |object: &mut super::Object| -> Result<Prompt, String> {
        let columns = ["prompt", "messages"];
        let Some(column) = columns.into_iter().find(|column| object.contains_key(*column)) else {
            let found: Vec<&str> = object.keys().map(String::as_str).collect();
            return Err(format!("has no column \"prompt\" or \"messages\"; it has {}", found.join(", ")));
        };
        let text = |e: Error| e.to_string();
        let prompt = match Content::read(column, object.remove(column).unwrap_or_default())? {
            Content::Text(text) => (tokenizer.encode(&text), text),
            Content::Messages(messages) => {
                let variables = variables(object)?;
                let chat = match &mut chat {
                    Some(chat) => chat,
                    none => none.insert(tokenizer.chat_template().map_err(text)?),
                };
                let rendered = chat.render(&messages, &variables, true).map_err(text)?;
                (tokenizer.encode_plain(&rendered), rendered)
            }
        };
        let (ids, text) = (prompt.0.map_err(text)?, prompt.1);
        match ids.is_empty() {
            true => Err("has a prompt without a token, and the tokenizer adds none in front".into()),
            false => Ok(Prompt { text, ids }),
        }
    };
    let rows = read_objects(path)?.into_iter();
    rows.map(|(at, mut object)| read(&mut object).map_err(|detail| Error::Row { path: path.to_path_buf(), at, detail }))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::tokenizer::tests::load;

    fn prompts(rows: &str) -> Result<Vec<Prompt>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("prompts.jsonl");
        std::fs::write(&path, rows).unwrap();
        read_prompts(&path, &load(false, true))
    }

    #[test]
    fn further_columns_and_blank_lines_are_left_alone() {
        let found = prompts("{\"prompt\": \"ab\", \"answer\": 3}\n\n{\"prompt\": \"c\"}\n").unwrap();
        assert_eq!(found, [("ab", vec![8]), ("c", vec![5])].map(|(text, ids)| Prompt { text: text.into(), ids }));
    }

    #[test]
    fn rows_that_ask_nothing_are_named() {
        for (row, part) in [
            ("{\"text\": \"ab\"}", "line 2: has no column \"prompt\" or \"messages\"; it has text"),
            ("{\"prompt\": \"\"}", "line 2: has a prompt without a token"),
            ("{\"prompt\": 7}", "line 2: column \"prompt\" is a number"),
            ("{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}", "has no chat template"),
        ] {
            let message = prompts(&format!("{{\"prompt\": \"a\"}}\n{row}\n")).unwrap_err().to_string();
            assert!(message.contains(part), "{message:?} lacks {part:?}");
        }
    }
}
