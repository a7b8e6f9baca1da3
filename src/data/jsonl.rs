//! Rows of preference data from JSON lines, plain or gzip.

use std::fmt;
use std::io::{ErrorKind, Read};
use std::path::Path;

use rayon::prelude::*;
use serde_json::{Map, Value};

use crate::error::{At, Error, Result};

/// What kind of rows a file has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Form {
    /// Columns `prompt`, `chosen`, `rejected`.
    Pairs,
    /// Columns `prompt`, `completion`.
    Completions,
    /// Column `text`.
    Text,
}

/// One raw row. Columns that the form does not name are ignored.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Row {
    Pair { prompt: String, chosen: String, rejected: String },
    Completion { prompt: String, completion: String },
    Text { text: String },
}

type Object = Map<String, Value>;

const ACCEPTED: &str =
    "accepted are pairs (prompt, chosen, rejected), completions (prompt, completion) and text (text)";

impl Form {
    /// The columns a row of this form must have.
    pub fn columns(self) -> &'static [&'static str] {
        match self {
            Form::Pairs => &["prompt", "chosen", "rejected"],
            Form::Completions => &["prompt", "completion"],
            Form::Text => &["text"],
        }
    }

    /// The first form, in order of the number of columns it needs, that the object satisfies.
    fn of(object: &Object) -> Option<Form> {
        [Form::Pairs, Form::Completions, Form::Text].into_iter().find(|form| form.missing(object).is_none())
    }

    fn missing(self, object: &Object) -> Option<&'static str> {
        self.columns().iter().copied().find(|column| !object.contains_key(*column))
    }
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Form::Pairs => "pairs",
            Form::Completions => "completions",
            Form::Text => "text",
        })
    }
}

/// Reads JSON lines, plain or gzip (told by content, not by name). Blank lines are ignored. All rows have the
/// form of the first.
///
/// # Errors
/// Names the file, the line (from 1) and what is wrong there: the first bad line, whatever the number of threads.
pub fn read_rows(path: &Path) -> Result<(Form, Vec<Row>)> {
    let (form, numbered) = read_numbered(path)?;
    Ok((form, numbered.into_iter().map(|(_, row)| row).collect()))
}

/// [`read_rows`], each row with its line, counted from 1.
pub(super) fn read_numbered(path: &Path) -> Result<(Form, Vec<(usize, Row)>)> {
    let bytes = read_bytes(path)?;
    let lines: Vec<(usize, &[u8])> = (1..)
        .zip(bytes.split(|&byte| byte == b'\n').map(<[u8]>::trim_ascii))
        .filter(|(_, text)| !text.is_empty())
        .collect();
    let at = |line: usize, detail: String| Error::Row { path: path.to_path_buf(), line, detail };

    let Some(&(line, text)) = lines.first() else {
        return Err(Error::file(path, "has no rows; every line must be one JSON object"));
    };
    let first = parse_object(text).map_err(|detail| at(line, detail))?;
    let form = Form::of(&first).ok_or_else(|| at(line, unfit(&first)))?;

    let rows: Vec<_> =
        lines.par_iter().map(|(_, text)| parse_object(text).and_then(|object| to_row(form, object))).collect();
    lines
        .iter()
        .zip(rows)
        .map(|(&(line, _), row)| row.map(|row| (line, row)).map_err(|detail| at(line, detail)))
        .collect::<Result<_>>()
        .map(|rows| (form, rows))
}

/// The whole file, decompressed, without the byte order mark that some editors write.
fn read_bytes(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = std::fs::read(path).map_err(|e| format!("cannot be read: {e}")).at(path)?;
    if bytes.starts_with(&[0x1f, 0x8b]) {
        let mut plain = Vec::new();
        flate2::read::MultiGzDecoder::new(bytes.as_slice())
            .read_to_end(&mut plain)
            .map_err(|e| match e.kind() {
                ErrorKind::UnexpectedEof => "the gzip data ends early; copy or download the file again".to_string(),
                _ => format!("the gzip data is damaged ({e}); copy or download the file again"),
            })
            .at(path)?;
        bytes = plain;
    }
    if bytes.starts_with(b"\xef\xbb\xbf") {
        bytes.drain(..3);
    }
    Ok(bytes)
}

fn parse_object(text: &[u8]) -> Result<Object, String> {
    let text = std::str::from_utf8(text)
        .map_err(|e| format!("invalid UTF-8 at byte {}; expected JSON lines, plain or gzip", e.valid_up_to() + 1))?;
    let value = serde_json::from_str(text).map_err(|e| {
        // serde_json counts lines within this one line of the file: its "at line 1" would mislead.
        let message = e.to_string();
        let what = message.rsplit_once(" at line ").map_or(message.as_str(), |(what, _)| what);
        format!("invalid JSON at column {}: {what}; every line must be one JSON object", e.column())
    })?;
    match value {
        Value::Object(object) => Ok(object),
        other => Err(format!("found {}, expected a JSON object", kind(&other))),
    }
}

fn to_row(form: Form, mut object: Object) -> Result<Row, String> {
    if let Some(missing) = form.missing(&object) {
        return Err(match Form::of(&object) {
            Some(other) => {
                format!("has the form {other}, the first row has the form {form}; keep them in separate files")
            }
            None => format!("column {missing:?} is missing; {}", unfit(&object)),
        });
    }
    let mut take = |column| take_string(&mut object, column);
    Ok(match form {
        Form::Pairs => Row::Pair { prompt: take("prompt")?, chosen: take("chosen")?, rejected: take("rejected")? },
        Form::Completions => Row::Completion { prompt: take("prompt")?, completion: take("completion")? },
        Form::Text => Row::Text { text: take("text")? },
    })
}

fn take_string(object: &mut Object, column: &str) -> Result<String, String> {
    match object.remove(column) {
        Some(Value::String(text)) => Ok(text),
        Some(value) if is_conversation(&value) => Err(conversational(column)),
        value => Err(format!("column {column:?} is {}, expected a string", kind(&value.unwrap_or_default()))),
    }
}

/// Why a row that has the columns of no form cannot be used.
fn unfit(object: &Object) -> String {
    if let Some((column, _)) = object.iter().find(|(_, value)| is_conversation(value)) {
        return conversational(column);
    }
    let found: Vec<&str> = object.keys().map(String::as_str).collect();
    format!("found the columns [{}]; {ACCEPTED}", found.join(", "))
}

/// A list of messages: `[{"role": .., "content": ..}, ..]`, or the older `{"from": .., "value": ..}`.
fn is_conversation(value: &Value) -> bool {
    let is_message = |item: &Value| item.get("role").or(item.get("from")).is_some_and(Value::is_string);
    value.as_array().is_some_and(|items| !items.is_empty() && items.iter().all(is_message))
}

fn conversational(column: &str) -> String {
    format!(
        "conversational rows are not supported yet; column {column:?} is a list of messages, expected a string: \
         apply the chat template beforehand and store the text"
    )
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::{Compression, write::GzEncoder};
    use std::io::Write;

    fn read(content: impl AsRef<[u8]>) -> Result<(Form, Vec<Row>)> {
        let file = tempfile::Builder::new().suffix(".jsonl").tempfile().unwrap();
        std::fs::write(file.path(), content).unwrap();
        read_rows(file.path())
    }

    fn failure(content: impl AsRef<[u8]>) -> String {
        read(content).unwrap_err().to_string()
    }

    #[track_caller]
    fn fails(content: impl AsRef<[u8]>, parts: &[&str]) {
        let message = failure(content);
        for part in parts {
            assert!(message.contains(part), "{message:?} lacks {part:?}");
        }
    }

    fn gzip(content: &str) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(content.as_bytes()).unwrap();
        encoder.finish().unwrap()
    }

    const PAIR: &str = r#"{"prompt": "p", "chosen": "c", "rejected": "r", "rating": [1]}"#;

    fn pair() -> Row {
        Row::Pair { prompt: "p".into(), chosen: "c".into(), rejected: "r".into() }
    }

    #[test]
    fn reads_each_form() {
        assert_eq!(read(PAIR).unwrap(), (Form::Pairs, vec![pair()]));
        let row = Row::Completion { prompt: "p".into(), completion: "é\n".into() };
        assert_eq!(read(r#"{"completion": "\u00e9\n", "prompt": "p"}"#).unwrap(), (Form::Completions, vec![row]));
        assert_eq!(read(r#"{"text": ""}"#).unwrap(), (Form::Text, vec![Row::Text { text: String::new() }]));
    }

    #[test]
    fn ignores_blank_lines_windows_line_ends_and_a_byte_order_mark() {
        let (_, rows) = read(format!("\u{feff}{PAIR}\r\n\r\n  \n{PAIR}\n")).unwrap();
        assert_eq!(rows, [pair(), pair()]);
    }

    #[test]
    fn reads_gzip_whatever_its_name_and_all_its_members() {
        let (_, rows) = read([gzip(&format!("{PAIR}\n")), gzip(PAIR)].concat()).unwrap();
        assert_eq!(rows, [pair(), pair()]);
    }

    #[test]
    fn damaged_gzip_is_named() {
        let mut data = gzip(&PAIR.repeat(20));
        data.truncate(data.len() - 9);
        fails(&data, &[".jsonl: the gzip data ends early"]);
        fails(&data[..4], &["the gzip data ends early"]);
        data[2] = 99;
        fails(&data, &["the gzip data is damaged"]);
    }

    #[test]
    fn empty_and_unreadable_files_are_named() {
        fails("", &["has no rows"]);
        fails("\n \n", &["has no rows"]);
        fails(gzip(""), &["has no rows"]);
        let folder = tempfile::tempdir().unwrap();
        let missing = read_rows(&folder.path().join("no.jsonl")).unwrap_err().to_string();
        assert!(missing.contains("no.jsonl: cannot be read: No such file"), "{missing}");
        assert!(read_rows(folder.path()).unwrap_err().to_string().contains("cannot be read"));
    }

    #[test]
    fn lines_that_are_no_json_object_are_named() {
        fails(format!("{PAIR}\n\n{{\"prompt\": \n"), &["line 3: invalid JSON at column", "EOF while parsing"]);
        assert!(!failure("{,}").contains("at line 1"));
        fails("[1, 2]", &["line 1: found a list, expected a JSON object"]);
        fails(format!("{PAIR}\n3"), &["line 2: found a number"]);
        fails([PAIR.as_bytes(), b"\n{\"prompt\": \"\xff\"}"].concat(), &["line 2: invalid UTF-8 at byte 13"]);
    }

    #[test]
    fn wrong_columns_are_named() {
        fails(r#"{"question": "q", "chosen": "c"}"#, &["line 1", "[question, chosen]", "accepted", "pairs (prompt"]);
        fails(
            format!("{PAIR}\n{{\"prompt\": \"p\", \"chosen\": \"c\"}}"),
            &["line 2: column \"rejected\" is missing; found the columns [prompt, chosen]", "accepted"],
        );
        fails(
            format!("{PAIR}\n{{\"text\": \"t\"}}"),
            &["line 2: has the form text, the first row has the form pairs; keep them in separate files"],
        );
        fails(r#"{"text": null}"#, &["column \"text\" is null, expected a string"]);
        fails(r#"{"prompt": "p", "completion": 3}"#, &["column \"completion\" is a number, expected a string"]);
        fails(r#"{"text": ["a"]}"#, &["column \"text\" is a list, expected a string"]);
    }

    #[test]
    fn conversations_are_called_by_their_name() {
        let messages = r#"[{"role": "user", "content": "hi"}]"#;
        let expected = "conversational rows are not supported yet";
        fails(format!("{{\"messages\": {messages}}}"), &[expected, "\"messages\" is a list of messages"]);
        fails(format!("{{\"chosen\": {messages}, \"rejected\": {messages}}}"), &[expected, "\"chosen\""]);
        fails(format!("{{\"prompt\": \"p\", \"completion\": {messages}}}"), &[expected, "\"completion\""]);
        fails(r#"{"conversations": [{"from": "human", "value": "hi"}]}"#, &[expected, "\"conversations\""]);
    }

    #[test]
    fn the_first_bad_line_is_reported() {
        let good = format!("{PAIR}\n").repeat(500);
        fails(format!("{good}{{\n{good}[]\n"), &["line 501: invalid JSON"]);
    }
}
