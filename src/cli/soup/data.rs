//! Files that a sweep makes of prompts: with sentences that ask for preferences, and answers to learn them from.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::checkpoint::write_file;
use crate::data::{Content, Object, read_objects};
use crate::error::{At, Error, Place, Result};

/// A prompt with sentences in front, or behind the question where it is a conversation, as RLPHF writes them.
fn asking(value: &mut Value, sentences: &str) -> Result<(), String> {
    match value {
        Value::String(text) => *text = format!("{sentences} {text}"),
        Value::Array(messages) => {
            let user = |message: &&mut Value| message["role"] == "user" || message["from"] == "human";
            let last = messages.iter_mut().rev().find(user).ok_or("has no message of a user")?;
            let key = if last.get("content").is_some() { "content" } else { "value" };
            let text = last[key].as_str().ok_or("the user's message is no text")?;
            last[key] = format!("{text} {sentences}").into();
        }
        other => return Err(format!("the prompt is {other}, expected a text or messages")),
    }
    Ok(())
}

fn column(object: &Object) -> Option<&'static str> {
    ["prompt", "messages"].into_iter().find(|column| object.contains_key(*column))
}

fn rows(path: &Path) -> Result<Vec<(Object, &'static str)>> {
    let row = |(at, object): (Place, Object)| {
        let missing =
            || Error::Row { path: path.to_path_buf(), at, detail: "has no column \"prompt\" or \"messages\"".into() };
        let column = column(&object).ok_or_else(missing)?;
        Ok((object, column))
    };
    read_objects(path)?.into_iter().map(row).collect()
}

/// Writes lines, unless they are there already: what has not changed is not trained on again.
fn write(path: &Path, lines: &[Value]) -> Result<()> {
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    if fs::read_to_string(path).is_ok_and(|found| found == text) {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).at(parent)?;
    }
    write_file(path, |out| out.write_all(text.as_bytes()))
}

/// The rows of `from` with sentences in their prompts.
pub fn write_asking(from: &Path, sentences: &str, to: &Path) -> Result<()> {
    let row = |(mut object, column): (Object, &str)| {
        asking(object.get_mut(column).expect("it is there"), sentences).map_err(|e| Error::file(from, e))?;
        Ok(Value::Object(object))
    };
    write(to, &rows(from)?.into_iter().map(row).collect::<Result<Vec<_>>>()?)
}

/// The prompts of the first rows, and nothing else of them.
pub fn write_prompts(from: &Path, count: usize, to: &Path) -> Result<()> {
    let row = |(mut object, column): (Object, &'static str)| json!({column: object.remove(column)});
    write(to, &rows(from)?.into_iter().take(count).map(row).collect::<Vec<_>>())
}

/// What SFT learns all preferences from: `answers` has, for each, its sentence and what to write for each prompt of `from`.
pub fn write_answers(from: &Path, answers: &[(&str, Vec<&str>)], to: &Path) -> Result<()> {
    let rows = rows(from)?;
    let mut lines = Vec::new();
    for (at, (object, column)) in rows.iter().enumerate() {
        for (sentence, texts) in answers {
            let mut prompt = object[*column].clone();
            asking(&mut prompt, sentence).map_err(|e| Error::file(from, e))?;
            let completion = match &prompt {
                Value::String(_) => json!(texts[at]),
                _ => json!([{"role": "assistant", "content": texts[at]}]),
            };
            lines.push(json!({"prompt": prompt, "completion": completion}));
        }
    }
    write(to, &lines)
}

/// Prompts as rewards see them.
pub fn prompts(path: &Path) -> Result<Vec<Content>> {
    let content = |(mut object, column): (Object, &str)| match object.remove(column) {
        Some(Value::String(text)) => Content::Text(text),
        Some(Value::Array(messages)) => {
            Content::Messages(messages.into_iter().filter_map(|message| message.as_object().cloned()).collect())
        }
        _ => Content::Text(String::new()),
    };
    Ok(rows(path)?.into_iter().map(content).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentences_go_before_a_text_and_behind_a_question() {
        let dir = tempfile::tempdir().unwrap();
        let [from, to] = ["from.jsonl", "sub/to.jsonl"].map(|name| dir.path().join(name));
        let rows = [
            json!({"prompt": "Review:", "completion": " Good."}),
            json!({"messages": [{"role": "user", "content": "Why?"}]}),
        ];
        fs::write(&from, rows.map(|row| format!("{row}\n")).concat()).unwrap();
        write_asking(&from, "Be brief.", &to).unwrap();
        let found: Vec<Object> = read_objects(&to).unwrap().into_iter().map(|(_, object)| object).collect();
        assert_eq!(found[0]["prompt"], "Be brief. Review:");
        assert_eq!(found[1]["messages"][0]["content"], "Why? Be brief.");
        // What is there and the same is left alone.
        let before = to.metadata().unwrap().modified().unwrap();
        write_asking(&from, "Be brief.", &to).unwrap();
        assert_eq!(to.metadata().unwrap().modified().unwrap(), before);

        write_answers(&from, &[("Be brief.", vec!["a", "b"]), ("Be long.", vec!["c", "d"])], &to).unwrap();
        let found = fs::read_to_string(&to).unwrap();
        assert_eq!(found.lines().count(), 4);
        assert!(found.contains("\"Be long. Review:\"") && found.contains("\"completion\":\"c\""), "{found}");
        assert!(found.contains("[{\"content\":\"b\",\"role\":\"assistant\"}]") || found.contains("\"content\":\"b\""));

        write_prompts(&from, 1, &to).unwrap();
        assert_eq!(fs::read_to_string(&to).unwrap(), "{\"prompt\":\"Review:\"}\n");
        assert!(matches!(&prompts(&from).unwrap()[1], Content::Messages(messages) if messages.len() == 1));

        fs::write(&from, "{\"text\": \"a\"}\n").unwrap();
        assert!(prompts(&from).unwrap_err().to_string().contains("has no column \"prompt\""));
    }
}
