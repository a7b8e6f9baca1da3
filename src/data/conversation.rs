//! Messages, in either spelling, and the prompt that two completions have in common.

use serde_json::{Map, Value};

/// One turn: `role`, `content` and whatever else the file gives it, for the chat template to read.
pub type Message = Map<String, Value>;

/// What a column holds: text as it stands, or messages for the chat template.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Content {
    Text(String),
    Messages(Vec<Message>),
}

impl Content {
    /// A column's value.
    ///
    /// # Errors
    /// Neither a string nor a list of messages: what it is instead.
    pub(super) fn read(column: &str, value: Value) -> Result<Self, String> {
        match value {
            Value::String(text) => Ok(Self::Text(text)),
            Value::Array(items) => {
                let named = |(i, item)| message(item).map_err(|e| format!("column {column:?}, message {i}: {e}"));
                (1..).zip(items).map(named).collect::<Result<_, _>>().map(Self::Messages)
            }
            other => Err(format!("column {column:?} is {}, expected a string or a list of messages", kind(&other))),
        }
    }

    pub fn is_empty(&self) -> bool {
        match self {
            Self::Text(text) => text.is_empty(),
            Self::Messages(messages) => messages.is_empty(),
        }
    }

    /// The string; empty where this is messages.
    pub fn text(&self) -> &str {
        match self {
            Self::Text(text) => text,
            Self::Messages(_) => "",
        }
    }

    /// The messages; none where this is a string.
    pub fn messages(&self) -> &[Message] {
        match self {
            Self::Text(_) => &[],
            Self::Messages(messages) => messages,
        }
    }

    pub fn is_text(&self) -> bool {
        matches!(self, Self::Text(_))
    }
}

/// A message as transformers 5 sees it: keys that hold null are not there. The older `{"from", "value"}` becomes
/// `{"role", "content"}`, as in TRL's `maybe_convert_to_chatml`, and its role the one that templates know.
fn message(item: Value) -> Result<Message, String> {
    let Value::Object(mut message) = item else {
        return Err(format!("is {}, expected an object with \"role\" and \"content\"", kind(&item)));
    };
    message.retain(|_, value| !value.is_null());
    if let (None, Some(from)) = (message.get("role"), message.get("from")) {
        let role = from.as_str().and_then(role).ok_or_else(|| {
            format!("\"from\" is {from}, known are system, human, user, gpt, assistant and tool; rename it")
        })?;
        let role = role.to_string();
        // The place of a key decides where `tojson` writes it.
        let renamed = message.into_iter().map(|(key, value)| match key.as_str() {
            "from" => ("role".into(), role.as_str().into()),
            "value" => ("content".into(), value),
            _ => (key, value),
        });
        message = renamed.collect();
    }
    match message.get("role") {
        Some(Value::String(_)) => Ok(message),
        Some(other) => Err(format!("\"role\" is {}, expected a string", kind(other))),
        None => {
            let keys: Vec<&str> = message.keys().map(String::as_str).collect();
            Err(format!("found the keys [{}], expected \"role\" and \"content\"", keys.join(", ")))
        }
    }
}

fn role(from: &str) -> Option<&str> {
    match from {
        "human" | "user" => Some("user"),
        "gpt" | "assistant" => Some("assistant"),
        "system" | "tool" => Some(from),
        _ => None,
    }
}

/// Cuts the common start of two completions off as their prompt: TRL's `extract_prompt`. What differs starts at the
/// first character or message that does; of a text, with the space before it. Where one is the start of the other, the
/// last that both have is left to them. (Where already the first characters differ, TRL may take the end of `chosen`
/// for a prompt, through Python's index -1; here that prompt is empty.)
///
/// `None` where one is text and the other messages.
pub(super) fn extract_prompt(chosen: Content, rejected: Content) -> Option<[Content; 3]> {
    match (chosen, rejected) {
        (Content::Text(chosen), Content::Text(rejected)) => {
            let [c, r]: [Vec<char>; 2] = [&chosen, &rejected].map(|text| text.chars().collect());
            let mut at = parting(&c, &r);
            let differs = c.get(at) != r.get(at);
            if differs && at > 0 && c[at - 1] == ' ' {
                at -= 1;
            }
            let text = |chars: &[char]| Content::Text(chars.iter().collect());
            Some([text(&c[..at]), text(&c[at..]), text(&r[at..])])
        }
        (Content::Messages(mut chosen), Content::Messages(mut rejected)) => {
            let at = parting(&chosen, &rejected);
            let rest = [chosen.split_off(at), rejected.split_off(at)].map(Content::Messages);
            let [c, r] = rest;
            Some([Content::Messages(chosen), c, r])
        }
        _ => None,
    }
}

/// The first index at which the two differ, else the last of the shorter.
fn parting<T: PartialEq>(a: &[T], b: &[T]) -> usize {
    let shorter = a.len().min(b.len());
    (0..shorter).find(|&i| a[i] != b[i]).unwrap_or(shorter.saturating_sub(1))
}

pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
