//! Rows of preference data: what the objects of a file mean.

use std::fmt;
use std::path::Path;

use serde_json::Value;

use super::conversation::{Content, extract_prompt, kind};
use super::records::{Object, Records};
use crate::error::{Place, Result};

/// What kind of rows a file has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Form {
    /// A prompt with a chosen and a rejected completion.
    Pairs,
    /// A prompt with a completion that is labelled: desirable or undesirable.
    Unpaired,
    /// A prompt with a completion.
    Completions,
    /// One text or conversation.
    Text,
    /// A prompt alone, which the policy completes.
    Prompts,
}

/// One raw row. The parts of a row are all text or all messages.
#[derive(Clone, PartialEq, Debug)]
pub struct Row {
    pub parts: Parts,
    /// Of every unpaired row: whether the completion is desirable.
    pub label: Option<bool>,
    /// Of every pair of a file, or of none: by how much `chosen` is better, in units of a reward. Finite.
    pub margin: Option<f64>,
    /// What the row gives the chat template besides messages: `tools`, and what is in `chat_template_kwargs`.
    pub variables: Object,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Parts {
    Pair { prompt: Content, chosen: Content, rejected: Content },
    Completion { prompt: Content, completion: Content },
    Text { text: Content },
    Prompt { prompt: Content },
}

impl Row {
    pub fn has_messages(&self) -> bool {
        let (Parts::Pair { chosen: part, .. }
        | Parts::Completion { completion: part, .. }
        | Parts::Text { text: part }
        | Parts::Prompt { prompt: part }) = &self.parts;
        !part.is_text()
    }
}

/// The columns of each form; a row is of the first whose columns it has. Further columns are ignored, but for a pair's
/// `margin`. Pairs without a prompt have it as the common start of both completions; of labelled messages the last one
/// is the completion.
const COLUMNS: &[(Form, &[&str])] = &[
    (Form::Pairs, &["prompt", "chosen", "rejected"]),
    (Form::Pairs, &["chosen", "rejected"]),
    (Form::Unpaired, &["prompt", "completion", "label"]),
    (Form::Unpaired, &["messages", "label"]),
    (Form::Unpaired, &["conversations", "label"]),
    (Form::Completions, &["prompt", "completion"]),
    (Form::Text, &["text"]),
    (Form::Text, &["messages"]),
    (Form::Text, &["conversations"]),
    (Form::Prompts, &["prompt"]),
];

const ACCEPTED: &str = "accepted are pairs (prompt, chosen, rejected, or the last two alone), unpaired \
                        (prompt, completion, label), completions (prompt, completion), text (text), conversations \
                        (messages, with a label or without) and, where the policy writes the rest, prompts (prompt)";

/// Of `COLUMNS`, the first that the object has.
fn columns_of(object: &Object) -> Option<(Form, &'static [&'static str])> {
    // A prompt beside one of these lacks something.
    let alone = || !["chosen", "rejected", "completion", "label"].iter().any(|column| object.contains_key(*column));
    let has = |(form, columns): &(Form, &[&str])| {
        columns.iter().all(|column| object.contains_key(*column)) && (*form != Form::Prompts || alone())
    };
    COLUMNS.iter().copied().find(has)
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Form::Pairs => "pairs",
            Form::Unpaired => "unpaired",
            Form::Completions => "completions",
            Form::Text => "text",
            Form::Prompts => "prompts",
        })
    }
}

/// The rows of a file: JSON lines, one JSON array, Parquet or CSV. All have the columns of the first.
///
/// # Errors
/// Names the file, the line or record (from 1) and what is wrong there: the first bad one, whatever the number of threads.
pub fn read_rows(path: &Path) -> Result<(Form, Vec<Row>)> {
    let (form, placed) = read_placed(path)?;
    Ok((form, placed.into_iter().map(|(_, row)| row).collect()))
}

/// [`read_rows`], each row with its place.
pub(super) fn read_placed(path: &Path) -> Result<(Form, Vec<(Place, Row)>)> {
    let records = Records::read(path)?;
    let (at, first) = records.first()?;
    let (form, columns) = columns_of(&first).ok_or_else(|| records.error(at, unfit(&first)))?;
    if let Some(stray) = stray_prompt(columns, &first) {
        return Err(records.error(at, stray));
    }
    let margins = form == Form::Pairs && first.get("margin").is_some_and(|margin| !margin.is_null());
    Ok((form, records.each(|object| to_row(form, columns, margins, object))?))
}

/// What other projects call our columns.
const ELSEWHERE: &[(&str, &[&str])] =
    &[("prompt", &["question", "query", "instruction", "input"]), ("completion", &["output", "response", "answer"])];

/// Pairs of texts beside a column that is surely their prompt: that both begin alike would be taken for one.
fn stray_prompt(columns: &[&str], first: &Object) -> Option<String> {
    let text = |name: &&&str| first.get(**name).is_some_and(Value::is_string);
    let stray = ELSEWHERE[0].1.iter().find(text)?;
    (columns == ["chosen", "rejected"] && first["chosen"].is_string()).then(|| {
        format!("column {stray:?} is not read, and there is no \"prompt\"; rename it to prompt, or leave it out")
    })
}

fn to_row(form: Form, columns: &[&str], margins: bool, mut object: Object) -> Result<Row, String> {
    if let Some(missing) = columns.iter().find(|column| !object.contains_key(**column)) {
        return Err(match columns_of(&object) {
            Some((other, _)) if other != form => {
                format!("has the form {other}, the first row has the form {form}; keep them in separate files")
            }
            _ => format!("column {missing:?} is missing; {}", unfit(&object)),
        });
    }
    let label = columns.contains(&"label").then(|| label(&object["label"])).transpose()?;
    let margin = (form == Form::Pairs).then(|| margin(object.get("margin"), margins)).transpose()?.flatten();
    let mut take = |column: &str| Content::read(column, object.remove(column).unwrap_or_default());
    let parts = match columns {
        ["prompt", "chosen", "rejected"] => pair(take("prompt")?, take("chosen")?, take("rejected")?)?,
        ["prompt", "completion", ..] => Parts::Completion { prompt: take("prompt")?, completion: take("completion")? },
        ["chosen", "rejected"] => implicit_pair(take("chosen")?, take("rejected")?)?,
        ["prompt"] => Parts::Prompt { prompt: take("prompt")? },
        ["text"] => text("text", take("text")?, true)?,
        [column] => text(column, take(column)?, false)?,
        [column, "label"] => answered(column, take(column)?)?,
        _ => unreachable!("these are all of COLUMNS"),
    };
    if let Parts::Completion { prompt, completion } = &parts
        && prompt.is_text() != completion.is_text()
    {
        return Err("of the columns \"prompt\" and \"completion\" one is a string, the other a list of messages".into());
    }
    Ok(Row { parts, label, margin, variables: variables(&mut object)? })
}

/// As LLaMA-Factory writes it: what is labelled is the last message, the assistant's.
fn answered(column: &str, content: Content) -> Result<Parts, String> {
    let Parts::Text { text: Content::Messages(mut messages) } = text(column, content, false)? else {
        unreachable!("a string was refused");
    };
    let completion = messages.split_off(messages.len().saturating_sub(1));
    match completion.first().map(|message| &message["role"]) {
        Some(role) if role != "assistant" => {
            Err(format!("column {column:?} ends with a message of {role}, expected the assistant's, which is labelled"))
        }
        _ => Ok(Parts::Completion { prompt: Content::Messages(messages), completion: Content::Messages(completion) }),
    }
}

fn label(value: &Value) -> Result<bool, String> {
    match (value, value.as_f64()) {
        (Value::Bool(label), _) => Ok(*label),
        (_, Some(0.0)) => Ok(false),
        (_, Some(1.0)) => Ok(true),
        _ => Err(format!(
            "column \"label\" is {value}, expected true or false (or 1, 0), whether the completion is desirable; rename \
             the column if it says something else"
        )),
    }
}

/// `expected` where the first row has one: a pair without would count as one whose completions are equally good.
fn margin(value: Option<&Value>, expected: bool) -> Result<Option<f64>, String> {
    let margin = match value {
        None | Some(Value::Null) => None,
        Some(value) => {
            let number = value.as_f64().filter(|margin| margin.is_finite());
            Some(number.ok_or_else(|| format!("column \"margin\" is {value}, expected a finite number"))?)
        }
    };
    match (margin.is_some(), expected) {
        (false, true) => Err("column \"margin\" is missing, the first row has one; give all pairs one or none".into()),
        (true, false) => Err("has a \"margin\", the first row has none; give all pairs one or none".into()),
        _ => Ok(margin),
    }
}

/// A prompt as text beside completions as messages repeats what their first messages say, as TRL's
/// `maybe_extract_prompt` takes it.
fn pair(prompt: Content, chosen: Content, rejected: Content) -> Result<Parts, String> {
    match (prompt.is_text(), chosen.is_text(), rejected.is_text()) {
        (true, false, false) => implicit_pair(chosen, rejected),
        (p, c, r) if p == c && c == r => Ok(Parts::Pair { prompt, chosen, rejected }),
        _ => {
            Err("of the columns \"prompt\", \"chosen\", \"rejected\" some are strings, others lists of messages".into())
        }
    }
}

fn implicit_pair(chosen: Content, rejected: Content) -> Result<Parts, String> {
    let [prompt, chosen, rejected] = extract_prompt(chosen, rejected)
        .ok_or("of the columns \"chosen\" and \"rejected\" one is a string, the other a list of messages")?;
    Ok(Parts::Pair { prompt, chosen, rejected })
}

fn text(column: &str, text: Content, is_text: bool) -> Result<Parts, String> {
    match text.is_text() == is_text {
        true => Ok(Parts::Text { text }),
        false if is_text => {
            Err(format!("column {column:?} is a list of messages, expected a string; call it \"messages\""))
        }
        false if matches!(&text, Content::Text(text) if text.starts_with('[')) => Err(format!(
            "column {column:?} is a list written as text, expected a list of messages; JSON lines and Parquet have such"
        )),
        false => Err(format!("column {column:?} is a string, expected a list of messages; call it \"text\"")),
    }
}

pub(super) fn variables(object: &mut Object) -> Result<Object, String> {
    let mut variables = match object.remove("chat_template_kwargs") {
        Some(Value::Object(given)) => given,
        None | Some(Value::Null) => Object::new(),
        Some(other) => {
            return Err(format!("column \"chat_template_kwargs\" is {}, expected an object", kind(&other)));
        }
    };
    let tools = match object.remove("tools") {
        // As TRL: tools may be JSON within JSON.
        Some(Value::String(json)) => serde_json::from_str(&json).map_err(|e| format!("column \"tools\": {e}"))?,
        other => other.unwrap_or_default(),
    };
    if !tools.is_null() {
        variables.entry("tools").or_insert(tools);
    }
    Ok(variables)
}

/// Why a row that has the columns of no form cannot be used.
fn unfit(object: &Object) -> String {
    let found: Vec<&str> = object.keys().map(String::as_str).collect();
    let renames = ELSEWHERE.iter().filter(|(name, _)| !object.contains_key(*name));
    let rename = |(name, others): &(&str, &[&str])| {
        let other = others.iter().find(|other| object.contains_key(**other))?;
        Some(format!("{other} to {name}"))
    };
    let renames: Vec<String> = renames.filter_map(rename).collect();
    let hint = if renames.is_empty() { String::new() } else { format!("; rename {}", renames.join(", ")) };
    format!("found the columns [{}]; {ACCEPTED}{hint}", found.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::{Compression, write::GzEncoder};
    use serde_json::json;
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

    fn row(parts: Parts) -> Row {
        Row { parts, label: None, margin: None, variables: Object::new() }
    }

    fn of(text: &str) -> Content {
        Content::Text(text.into())
    }

    fn turns(roles_and_texts: &[(&str, &str)]) -> Content {
        let message = |(role, text): &(&str, &str)| match json!({"role": role, "content": text}) {
            Value::Object(message) => message,
            _ => unreachable!(),
        };
        Content::Messages(roles_and_texts.iter().map(message).collect())
    }

    fn pair() -> Row {
        row(Parts::Pair { prompt: of("p"), chosen: of("c"), rejected: of("r") })
    }

    /// The prompt, chosen and rejected of the one row.
    fn split(content: Value) -> [Content; 3] {
        match read(content.to_string()).unwrap().1.remove(0).parts {
            Parts::Pair { prompt, chosen, rejected } => [prompt, chosen, rejected],
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn reads_each_form() {
        assert_eq!(read(PAIR).unwrap(), (Form::Pairs, vec![pair()]));
        let completion = row(Parts::Completion { prompt: of("p"), completion: of("é\n") });
        assert_eq!(
            read(r#"{"completion": "\u00e9\n", "prompt": "p"}"#).unwrap(),
            (Form::Completions, vec![completion])
        );
        assert_eq!(read(r#"{"text": ""}"#).unwrap(), (Form::Text, vec![row(Parts::Text { text: of("") })]));
    }

    #[test]
    fn reads_labels_in_all_their_spellings() {
        let labels = |values: &[Value]| {
            let line = |label: &Value| json!({"prompt": "p", "completion": "c", "label": label}).to_string() + "\n";
            let (form, rows) = read(values.iter().map(line).collect::<String>()).unwrap();
            assert_eq!(form, Form::Unpaired);
            let parts = Parts::Completion { prompt: of("p"), completion: of("c") };
            assert!(rows.iter().all(|row| row.parts == parts && row.margin.is_none()));
            rows.iter().map(|row| row.label.unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(
            labels(&[json!(true), json!(0), json!(1), json!(false), json!(1.0)]),
            [true, false, true, false, true]
        );
        // Elsewhere a column of that name is one of those that nobody reads.
        assert_eq!(read(r#"{"text": "t", "label": "x"}"#).unwrap().1[0].label, None);
        let good = json!({"prompt": "p", "completion": "c", "label": true}).to_string();
        for label in ["null", "2", "-1", "0.5", "\"true\"", "[true]"] {
            let row = format!("{{\"prompt\": \"p\", \"completion\": \"c\", \"label\": {label}}}");
            fails(format!("{good}\n\n{row}"), &["line 3: column \"label\" is ", label, "expected true or false"]);
        }
        fails(
            format!("{good}\n{}", json!({"prompt": "p", "completion": "c"})),
            &["line 2: has the form completions, the first row has the form unpaired"],
        );
    }

    #[test]
    fn the_last_of_labelled_messages_is_the_completion() {
        let (user, bot) = (json!({"role": "user", "content": "hi"}), json!({"role": "assistant", "content": "ho"}));
        let parts = Parts::Completion { prompt: turns(&[("user", "hi")]), completion: turns(&[("assistant", "ho")]) };
        let expected = (Form::Unpaired, vec![Row { label: Some(false), ..row(parts) }]);
        assert_eq!(read(json!({"messages": [user, bot], "label": false}).to_string()).unwrap(), expected);
        let older = json!([{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]);
        assert_eq!(read(json!({"conversations": older, "label": false}).to_string()).unwrap(), expected);

        let open = json!({"messages": [bot, user], "label": true}).to_string();
        fails(&open, &["line 1: column \"messages\" ends with a message of \"user\", expected the assistant's"]);
        fails(
            r#"{"messages": "hi", "label": true}"#,
            &["column \"messages\" is a string, expected a list of messages"],
        );
        let nothing = row(Parts::Completion { prompt: turns(&[]), completion: turns(&[]) });
        let empty = read(r#"{"messages": [], "label": true}"#).unwrap().1;
        assert_eq!(empty, [Row { label: Some(true), ..nothing }]);
    }

    #[test]
    fn margins_are_numbers_of_all_pairs_or_of_none() {
        let line = |margin: &str| format!("{{\"chosen\": \"pc\", \"rejected\": \"pr\", \"margin\": {margin}}}\n");
        let rows = read([line("0.5"), line("-2"), line("0")].concat()).unwrap().1;
        assert_eq!(rows.iter().map(|row| row.margin.unwrap()).collect::<Vec<_>>(), [0.5, -2.0, 0.0]);
        assert_eq!(read(line("null")).unwrap().1[0].margin, None);
        fails(line("\"1\""), &["line 1: column \"margin\" is \"1\", expected a finite number"]);
        fails([line("1"), line("1e999")].concat(), &["line 2: invalid JSON", "number out of range"]);
        fails([line("1"), line("NaN")].concat(), &["line 2: invalid JSON"]);
        fails([line("1"), line("null")].concat(), &["line 2: column \"margin\" is missing, the first row has one"]);
        fails(
            format!("{PAIR}\n{}", line("1")).replace("\"chosen\": \"pc\"", "\"prompt\": \"p\", \"chosen\": \"c\""),
            &["line 2: has a \"margin\", the first row has none"],
        );
        // Only pairs have a margin to keep.
        assert_eq!(read(r#"{"text": "t", "margin": "wide"}"#).unwrap().1[0].margin, None);
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
        assert!(read_rows(folder.path()).unwrap_err().to_string().contains("is a folder"));
    }

    #[test]
    fn lines_that_are_no_json_object_are_named() {
        fails(format!("{PAIR}\n\n{{\"prompt\": \n"), &["line 3: invalid JSON at column", "EOF while parsing"]);
        assert!(!failure("{,}").contains("at line 1"));
        fails("7", &["line 1: found a number, expected a JSON object"]);
        fails(format!("{PAIR}\n3"), &["line 2: found a number"]);
        fails([PAIR.as_bytes(), b"\n{\"prompt\": \"\xff\"}"].concat(), &["line 2: invalid UTF-8 at byte 13"]);
    }

    #[test]
    fn wrong_columns_are_named() {
        fails(r#"{"question": "q", "chosen": "c"}"#, &["line 1", "[question, chosen]", "accepted", "pairs (prompt"]);
        let alpaca = r#"{"instruction": "q", "input": "", "output": "c"}"#;
        fails(alpaca, &["accepted", "; rename instruction to prompt, output to completion"]);
        let beside = r#"{"question": "q", "chosen": "It is a", "rejected": "It is b"}"#;
        fails(beside, &["line 1: column \"question\" is not read", "rename it to prompt"]);
        fails(
            format!("{PAIR}\n{{\"prompt\": \"p\", \"chosen\": \"c\"}}"),
            &["line 2: column \"rejected\" is missing; found the columns [prompt, chosen]", "accepted"],
        );
        fails(
            format!("{PAIR}\n{{\"text\": \"t\"}}"),
            &["line 2: has the form text, the first row has the form pairs; keep them in separate files"],
        );
        fails(r#"{"text": null}"#, &["column \"text\" is null, expected a string or a list of messages"]);
        fails(
            r#"{"prompt": "p", "completion": 3}"#,
            &["column \"completion\" is a number, expected a string or a list"],
        );
        fails(r#"{"text": ["a"]}"#, &["column \"text\", message 1: is a string, expected an object"]);
        fails(
            format!("{PAIR}\n{{\"chosen\": \"c\", \"rejected\": \"r\"}}"),
            &["line 2: column \"prompt\" is missing; found the columns [chosen, rejected]"],
        );
    }

    #[test]
    fn reads_conversations_in_both_spellings() {
        let (user, bot) = (json!({"role": "user", "content": "hi"}), json!({"role": "assistant", "content": "ho"}));
        let text = turns(&[("user", "hi"), ("assistant", "ho")]);
        let expected = (Form::Text, vec![row(Parts::Text { text })]);
        assert_eq!(read(json!({"messages": [user, bot]}).to_string()).unwrap(), expected);
        let older = json!({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]});
        assert_eq!(read(older.to_string()).unwrap(), expected);
        let nulls = json!({"messages": [{"role": "user", "content": "hi", "tool_calls": null}, bot]});
        assert_eq!(read(nulls.to_string()).unwrap(), expected);

        let parts = Parts::Completion { prompt: turns(&[("user", "hi")]), completion: turns(&[("assistant", "ho")]) };
        let completion = json!({"prompt": [user], "completion": [bot]});
        assert_eq!(read(completion.to_string()).unwrap(), (Form::Completions, vec![row(parts)]));
    }

    #[test]
    fn a_message_keeps_its_keys_in_order() {
        let line = r#"{"messages": [{"z": [1], "from": "human", "b": {}, "value": "hi", "a": 1.0}]}"#;
        let Parts::Text { text: Content::Messages(messages) } = &read(line).unwrap().1[0].parts else { panic!() };
        let kept = r#"{"z":[1],"role":"user","b":{},"content":"hi","a":1.0}"#;
        assert_eq!(Value::Object(messages[0].clone()).to_string(), kept);
    }

    #[test]
    fn pairs_without_a_prompt_have_it_as_their_common_start() {
        let message = |role: &str, content: &str| json!({"role": role, "content": content});
        let (user, good, bad) = (message("user", "hi"), message("assistant", "ho"), message("assistant", "no"));
        let expected = [turns(&[("user", "hi")]), turns(&[("assistant", "ho")]), turns(&[("assistant", "no")])];
        assert_eq!(split(json!({"chosen": [user, good], "rejected": [user, bad]})), expected);
        // A prompt as text repeats the first message.
        assert_eq!(split(json!({"prompt": "hi", "chosen": [user, good], "rejected": [user, bad]})), expected);
        // The last common message is an answer where nothing differs.
        let same = split(json!({"chosen": [user, good], "rejected": [user, good]}));
        assert_eq!(same, [turns(&[("user", "hi")]), turns(&[("assistant", "ho")]), turns(&[("assistant", "ho")])]);
        let longer = split(json!({"chosen": [user], "rejected": [user, bad]}));
        assert_eq!(longer[..2], [turns(&[]), turns(&[("user", "hi")])]);

        let texts = |chosen: &str, rejected: &str| split(json!({"chosen": chosen, "rejected": rejected}));
        assert_eq!(texts("Say: é yes", "Say: é no"), ["Say: é", " yes", " no"].map(of));
        assert_eq!(texts("A.Yes", "A.No"), ["A.", "Yes", "No"].map(of));
        assert_eq!(texts("ab", "abc"), ["a", "b", "bc"].map(of));
        assert_eq!(texts("x ", "y "), ["", "x ", "y "].map(of));
        assert_eq!(texts("", "y"), ["", "", "y"].map(of));
    }

    #[test]
    fn tools_and_template_variables_are_kept() {
        let messages = json!([{"role": "user"}]);
        let tools = r#"[{"name": "f"}]"#;
        let line = json!({"messages": messages, "tools": tools, "chat_template_kwargs": {"think": false}});
        let variables = read(line.to_string()).unwrap().1.remove(0).variables;
        assert_eq!(Value::Object(variables), json!({"think": false, "tools": [{"name": "f"}]}));
        fails(r#"{"text": "t", "tools": "["}"#, &["column \"tools\": EOF"]);
        fails(
            r#"{"text": "t", "chat_template_kwargs": 1}"#,
            &["\"chat_template_kwargs\" is a number, expected an object"],
        );
    }

    #[test]
    fn broken_conversations_are_named() {
        let messages = r#"[{"role": "user", "content": "hi"}]"#;
        fails(format!("{{\"prompt\": \"p\", \"completion\": {messages}}}"), &["one is a string, the other a list"]);
        fails(format!("{{\"chosen\": \"c\", \"rejected\": {messages}}}"), &["one is a string, the other a list"]);
        fails(
            format!("{{\"prompt\": {messages}, \"chosen\": \"c\", \"rejected\": \"r\"}}"),
            &["some are strings, others lists of messages"],
        );
        fails(
            format!("{{\"text\": {messages}}}"),
            &["\"text\" is a list of messages, expected a string; call it \"messages\""],
        );
        fails(r#"{"messages": "hi"}"#, &["\"messages\" is a string, expected a list of messages; call it \"text\""]);
        fails(r#"{"messages": [{"content": "hi"}]}"#, &["message 1: found the keys [content], expected \"role\""]);
        fails(r#"{"messages": [{"role": 3}]}"#, &["message 1: \"role\" is a number, expected a string"]);
        fails(
            r#"{"conversations": [{"from": "human", "value": "a"}, {"from": "observation", "value": "b"}]}"#,
            &["message 2: \"from\" is \"observation\", known are system, human"],
        );
        // The file's rows have the columns of the first.
        fails(
            format!("{{\"text\": \"t\"}}\n{{\"messages\": {messages}}}"),
            &["line 2: column \"text\" is missing; found the columns [messages]"],
        );
    }

    #[test]
    fn the_first_bad_line_is_reported() {
        let good = format!("{PAIR}\n").repeat(500);
        fails(format!("{good}{{\n{good}[]\n"), &["line 501: invalid JSON"]);
    }
}
