//! The chat template of a model, rendered as transformers' `apply_chat_template` does.
//!
//! A template is a Jinja program that turns messages into text; which tokens start and end a turn is known to nothing
//! else. minijinja runs it, set up as transformers sets up jinja2: `trim_blocks`, `lstrip_blocks`, loop controls,
//! `raise_exception`, `strftime_now`, a `tojson` that escapes no HTML, Python's methods on strings, lists and dicts.
//! `{% generation %}` marks what the assistant says: [`ChatTemplate::marked`] tells where that is in the text.
//!
//! What differs from jinja2: a printed float never has an exponent, and methods that minijinja-contrib and [`methods`]
//! do not have fail. A failure is an error that names the row.

use std::cell::RefCell;
use std::ffi::CString;
use std::io::{self, Write};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use minijinja::value::{Kwargs, Serde, ValueKind};
use minijinja::{Environment, ErrorKind, State, Value as Jinja, syntax::SyntaxConfig};
use serde_json::{Map, Value};

use super::conversation::Message;
use crate::error::{At, Error, Result};

/// Instructions that one rendering may take: a conversation of a thousand turns takes about 100 thousand. A template
/// is a program from elsewhere; one that loops for ever ends here. (A string that doubles in a variable is not stopped.)
const FUEL: u64 = 20_000_000;
/// Bytes that one rendering may write.
const MAX_OUTPUT: usize = 1 << 26;

const DEFAULT: &str = "default";
/// Taken for rows with tools, where a model has it.
const TOOL_USE: &str = "tool_use";

pub struct ChatTemplate {
    /// The file that the template comes from.
    path: PathBuf,
    environment: Environment<'static>,
    /// `bos_token`, `eos_token`, ..: what a template may put around turns.
    special_tokens: Map<String, Value>,
    reads_clock: bool,
    /// Names of templates that mark what the assistant says.
    marks: Vec<String>,
}

impl ChatTemplate {
    /// The template of the model folder `dir`: `chat_template.jinja`, else `chat_template` of `tokenizer_config.json`
    /// (a string, or a list of `{"name", "template"}`). `None` where there is neither.
    ///
    /// # Errors
    /// The file cannot be read or is no template.
    pub fn load(dir: &Path, special_tokens: Map<String, Value>) -> Result<Option<Self>> {
        let path = dir.join("chat_template.jinja");
        if path.exists() {
            let source = std::fs::read_to_string(&path).map_err(|e| format!("cannot be read: {e}")).at(&path)?;
            return Self::new(path, vec![(DEFAULT.into(), source)], special_tokens).map(Some);
        }
        let path = dir.join("tokenizer_config.json");
        if !path.exists() {
            return Ok(None);
        }
        let config = super::tokenizer::read_json(&path)?;
        let templates = match config.get("chat_template") {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::String(source)) => vec![(DEFAULT.to_string(), source.clone())],
            Some(value) => named_templates(value).ok_or_else(|| {
                let detail = "chat_template is neither a string nor a list of {\"name\", \"template\"}";
                Error::file(&path, detail)
            })?,
        };
        Self::new(path, templates, special_tokens).map(Some)
    }

    fn new(path: PathBuf, templates: Vec<(String, String)>, special_tokens: Map<String, Value>) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.expect("no delimiter was changed"));
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(methods);
        environment.add_test("iterable", |value: &Jinja| !value.is_none() && value.try_iter().is_ok());
        environment.add_test("sequence", sequence);
        environment.add_filter("tojson", tojson);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_function(MARK, mark);
        let reads_clock = templates.iter().any(|(_, source)| source.contains("strftime_now"));
        let mut marks = Vec::new();
        for (name, source) in templates {
            let source = prepared(&source);
            marks.extend(source.contains(MARK).then(|| name.clone()));
            environment
                .add_template_owned(name, source)
                .map_err(|e| format!("the chat template cannot be read: {}", describe(&e)))
                .at(&path)?;
        }
        Ok(Self { path, environment, special_tokens, reads_clock, marks })
    }

    /// Whether the text of a conversation may be another one tomorrow.
    pub fn reads_clock(&self) -> bool {
        self.reads_clock
    }

    /// The text of a conversation. `variables` are the row's own (`tools` and those of `chat_template_kwargs`); with
    /// `generation_prompt` the text ends where the assistant's answer starts.
    ///
    /// # Errors
    /// The template refuses the conversation, needs what is not there, or does not end.
    pub fn render(
        &self,
        messages: &[Message],
        variables: &Map<String, Value>,
        generation_prompt: bool,
    ) -> Result<String> {
        Ok(self.marked(messages, variables, generation_prompt)?.0)
    }

    /// [`render`](Self::render), and the bytes of it that are between the template's `{% generation %}` marks; `None` where it has
    /// no marks.
    ///
    /// # Errors
    /// As `render`.
    pub fn marked(
        &self,
        messages: &[Message],
        variables: &Map<String, Value>,
        generation_prompt: bool,
    ) -> Result<(String, Option<Vec<Range<usize>>>)> {
        let messages: Vec<Value> = messages.iter().map(|message| Value::Object(with_reasoning(message))).collect();
        let mut context = self.special_tokens.clone();
        context.extend([("tools".to_string(), Value::Null), ("documents".to_string(), Value::Null)]);
        context.extend(variables.clone());
        context.insert("messages".into(), Value::Array(messages));
        context.insert("add_generation_prompt".into(), Value::Bool(generation_prompt));

        let tool_use = !context["tools"].is_null() && self.environment.get_template(TOOL_USE).is_ok();
        let name = if tool_use { TOOL_USE } else { DEFAULT };
        let run = || {
            WRITTEN.take();
            let template = self.environment.get_template(name)?;
            template.render_captured_to(Jinja::from(Serde(&context)), &mut Capped)?;
            Ok(WRITTEN.take())
        };
        // minijinja 3.0.5 panics where it should fail on `''[::-1]`, and a template is not ours to trust.
        let text = catch_unwind(AssertUnwindSafe(run)).map_err(|_| "the template engine panics on it").at(&self.path)?;
        let Written { text, marks } = text.map_err(|e| failure(&e)).at(&self.path)?;
        let spans = marks.chunks_exact(2).map(|ends| ends[0]..ends[1]).filter(|span| !span.is_empty());
        let spans = self.marks.iter().any(|marked| marked == name).then(|| spans.collect());
        Ok((String::from_utf8(text).expect("a template writes text"), spans))
    }
}

/// The list form. A model with several templates has one named `default`.
fn named_templates(value: &Value) -> Option<Vec<(String, String)>> {
    let text = |item: &Value, key| Some(item.get(key)?.as_str()?.to_string());
    let named: Vec<_> = value
        .as_array()?
        .iter()
        .map(|item| Some((text(item, "name")?, text(item, "template")?)))
        .collect::<Option<_>>()?;
    named.iter().any(|(name, _)| name == DEFAULT).then_some(named)
}

/// The template as minijinja takes it. Line ends become `\n`, as jinja2 makes them. `{% generation %}` and
/// `{% endgeneration %}` become `{% with %}`: like the block that transformers makes of them, it keeps to itself what is
/// set inside. A call beside them notes how much is written.
fn prepared(source: &str) -> String {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len());
    let mut rest = source.as_str();
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        out += before;
        rest = tag;
        let sign = tag.len() - tag.trim_start_matches(['-', '+']).len();
        let name = tag[sign..].trim_start();
        let [begin, end] = [format!(" with %}}{{% do {MARK}() "), format!(" do {MARK}() %}}{{% endwith ")];
        for (mark, instead) in [("generation", &begin), ("endgeneration", &end)] {
            let after = name.strip_prefix(mark).map(str::trim_start);
            if let Some(after) = after.filter(|after| after.trim_start_matches(['-', '+']).starts_with("%}")) {
                out += &tag[..sign];
                out += instead;
                rest = after;
            }
        }
    }
    out + rest
}

/// A message with its reasoning under the names that templates read, as transformers 5 adds them.
fn with_reasoning(message: &Message) -> Message {
    let reasoning = ["reasoning_content", "thinking", "reasoning"].iter().find_map(|key| message.get(*key));
    let Some(reasoning) = reasoning.cloned() else { return message.clone() };
    let mut with = Message::from_iter([("thinking".to_string(), reasoning.clone())]);
    with.extend(message.clone());
    with.insert("reasoning_content".into(), reasoning);
    with
}

/// What the rendering on this thread has written, and where marks are in it.
#[derive(Default)]
struct Written {
    text: Vec<u8>,
    marks: Vec<usize>,
}

thread_local! {
    static WRITTEN: RefCell<Written> = RefCell::default();
}

/// What a mark calls.
const MARK: &str = "cuvee_generation_mark";

fn mark() -> String {
    WRITTEN.with_borrow_mut(|written| written.marks.push(written.text.len()));
    String::new()
}

/// Text up to `MAX_OUTPUT`.
struct Capped;

impl Write for Capped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        WRITTEN.with_borrow_mut(|written| match written.text.len() + bytes.len() > MAX_OUTPUT {
            true => Err(io::Error::other("too much text")),
            false => written.text.write(bytes),
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What a template said of a conversation, or what went wrong in it.
fn failure(error: &minijinja::Error) -> String {
    match error.kind() {
        ErrorKind::OutOfFuel => format!("the chat template does not end: stopped after {FUEL} instructions"),
        ErrorKind::WriteFailure => format!("the chat template writes more than {} MiB; stopped", MAX_OUTPUT >> 20),
        _ => match refusal(error) {
            Some(Refusal(message)) => format!("the chat template refuses the conversation: {message}"),
            None => format!("the chat template fails: {}", describe(error)),
        },
    }
}

/// The message without the source lines that minijinja can add.
fn describe(error: &minijinja::Error) -> String {
    let what = error.detail().map_or_else(|| error.kind().to_string(), |detail| format!("{}: {detail}", error.kind()));
    error.line().map_or(what.clone(), |line| format!("{what} (line {line} of the template)"))
}

/// The argument of `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refusal(String);

fn refusal(error: &minijinja::Error) -> Option<&Refusal> {
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(error) = cause {
        if let Some(refusal) = error.downcast_ref() {
            return Some(refusal);
        }
        cause = error.source();
    }
    None
}

// ---- what templates may call -------------------------------------------------------------------------------------

type Outcome = std::result::Result<Jinja, minijinja::Error>;

fn raise_exception(message: String) -> Outcome {
    Err(minijinja::Error::from(ErrorKind::InvalidOperation).with_source(Refusal(message)))
}

/// Today in local time, as Python's `datetime.now().strftime(format)`.
fn strftime_now(format: &str) -> Outcome {
    let format = CString::new(format)
        .map_err(|_| minijinja::Error::new(ErrorKind::InvalidOperation, "strftime_now: a format with a null byte"))?;
    let mut text = [0u8; 512];
    // SAFETY: localtime_r fills `tm` or returns null, strftime writes at most the length of `text`, both from pointers
    // that live through the call.
    let len = unsafe {
        let (now, mut tm) = (libc::time(std::ptr::null_mut()), std::mem::MaybeUninit::zeroed());
        match libc::localtime_r(&now, tm.as_mut_ptr()).is_null() {
            true => 0,
            false => libc::strftime(text.as_mut_ptr().cast(), text.len(), format.as_ptr(), tm.as_ptr()),
        }
    };
    Ok(Jinja::from(String::from_utf8_lossy(&text[..len]).into_owned()))
}

/// Whatever has a length and an index is a sequence in Python, text too.
fn sequence(value: &Jinja) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::String | ValueKind::Undefined)
}

/// Methods of Python's types, which minijinja knows as filters if at all.
fn methods(state: &mut State, value: &Jinja, method: &str, args: &[Jinja]) -> Outcome {
    let text = |i: usize| args.get(i).and_then(Jinja::as_str);
    match (value.as_str(), method, text(0), args.len()) {
        (Some(this), "removeprefix", Some(prefix), 1) => Ok(this.strip_prefix(prefix).unwrap_or(this).into()),
        (Some(this), "removesuffix", Some(suffix), 1) => Ok(this.strip_suffix(suffix).unwrap_or(this).into()),
        (Some(this), "partition", Some(by), 1) => {
            Ok(cut(this, by, this.find(by)).unwrap_or([this, "", ""]).map(Jinja::from).to_vec().into())
        }
        (Some(this), "rpartition", Some(by), 1) => {
            Ok(cut(this, by, this.rfind(by)).unwrap_or(["", "", this]).map(Jinja::from).to_vec().into())
        }
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args),
    }
}

fn cut<'a>(text: &'a str, by: &'a str, at: Option<usize>) -> Option<[&'a str; 3]> {
    at.map(|at| [&text[..at], by, &text[at + by.len()..]])
}

/// `json.dumps(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
fn tojson(value: Jinja, options: Kwargs) -> Outcome {
    let indent: Option<usize> = options.get("indent")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    let [item, key] = match separators.as_deref() {
        Some([item, key]) => [item.as_str(), key],
        _ => [if indent.is_some() { "," } else { ", " }, ": "],
    };
    let json = Json {
        indent,
        item,
        key,
        ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sorted: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    options.assert_all_used()?;
    let value = serde_json::to_value(&value)
        .map_err(|e| minijinja::Error::new(ErrorKind::BadSerialization, format!("tojson: {e}")))?;
    let mut out = String::new();
    json.write(&value, 0, &mut out);
    Ok(out.into())
}

/// How Python writes JSON.
struct Json<'a> {
    indent: Option<usize>,
    item: &'a str,
    key: &'a str,
    ascii: bool,
    sorted: bool,
}

impl Json<'_> {
    fn write(&self, value: &Value, depth: usize, out: &mut String) {
        match value {
            Value::Array(items) => {
                self.list(depth, ['[', ']'], items, out, |item, out| self.write(item, depth + 1, out))
            }
            Value::Object(object) => {
                let mut entries: Vec<_> = object.iter().collect();
                if self.sorted {
                    entries.sort_by_key(|(key, _)| *key);
                }
                self.list(depth, ['{', '}'], &entries, out, |(key, value), out| {
                    self.text(key, out);
                    out.push_str(self.key);
                    self.write(value, depth + 1, out);
                });
            }
            Value::String(text) => self.text(text, out),
            Value::Number(number) if number.is_f64() => out.push_str(&python_float(number.as_f64().unwrap_or(0.0))),
            other => out.push_str(&other.to_string()),
        }
    }

    fn list<T>(
        &self,
        depth: usize,
        [open, close]: [char; 2],
        items: &[T],
        out: &mut String,
        write: impl Fn(&T, &mut String),
    ) {
        let newline = |depth: usize, out: &mut String| {
            if let Some(indent) = self.indent {
                out.push('\n');
                out.push_str(&" ".repeat(indent * depth));
            }
        };
        out.push(open);
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                out.push_str(self.item);
            }
            newline(depth + 1, out);
            write(item, out);
        }
        if !items.is_empty() {
            newline(depth, out);
        }
        out.push(close);
    }

    fn text(&self, text: &str, out: &mut String) {
        for c in Value::from(text).to_string().chars() {
            match c.is_ascii() || !self.ascii {
                true => out.push(c),
                false => out.extend(c.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}"))),
            }
        }
    }
}

/// Python's `repr`: Rust's shortest digits, the exponent with a sign and two digits.
fn python_float(value: f64) -> String {
    let text = format!("{value:?}");
    let Some((digits, exponent)) = text.split_once('e') else { return text };
    let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |exponent| ('-', exponent));
    format!("{digits}e{sign}{exponent:0>2}")
}

#[cfg(test)]
mod tests {
    use super::super::tokenizer::tests::folder;
    use super::*;
    use serde_json::json;

    fn template(source: &str) -> Result<ChatTemplate> {
        let tokens = Map::from_iter([("eos_token".to_string(), json!("</s>"))]);
        ChatTemplate::new("chat_template.jinja".into(), vec![(DEFAULT.into(), source.into())], tokens)
    }

    fn render(source: &str, content: &str) -> Result<String> {
        let message = Message::from_iter([("role".into(), json!("user")), ("content".into(), json!(content))]);
        template(source)?.render(&[message], &Map::new(), false)
    }

    #[track_caller]
    fn fails(source: &str, part: &str) {
        let message = render(source, "hi").unwrap_err().to_string();
        assert!(message.starts_with("chat_template.jinja: the chat template") && message.contains(part), "{message:?}");
    }

    fn found(files: &[(&str, Value)]) -> Result<Option<String>> {
        let dir = folder(files);
        let Some(template) = ChatTemplate::load(dir.path(), Map::new())? else { return Ok(None) };
        template.render(&[], &Map::new(), false).map(Some)
    }

    #[test]
    fn the_template_is_found_where_models_keep_it() {
        let config = |template: Value| ("tokenizer_config.json", json!({"chat_template": template}));
        assert_eq!(found(&[]).unwrap(), None);
        assert_eq!(found(&[("tokenizer_config.json", json!({}))]).unwrap(), None);
        assert_eq!(found(&[config(Value::Null)]).unwrap(), None);
        assert_eq!(found(&[config(json!("one"))]).unwrap().unwrap(), "one");
        let named = json!([{"name": "tool_use", "template": "{{ tools }}"}, {"name": "default", "template": "two"}]);
        assert_eq!(found(&[config(named.clone())]).unwrap().unwrap(), "two");
        // The file comes first. `folder` writes JSON: its quotes are text here.
        assert_eq!(
            found(&[("chat_template.jinja", json!("file")), config(json!("one"))]).unwrap().unwrap(),
            "\"file\""
        );

        let dir = folder(&[config(named)]);
        let template = ChatTemplate::load(dir.path(), Map::new()).unwrap().unwrap();
        let tools = Map::from_iter([("tools".to_string(), json!(["f"]))]);
        assert_eq!(template.render(&[], &tools, false).unwrap(), "['f']");
        let message = found(&[config(json!([{"name": "rag", "template": ""}]))]).unwrap_err().to_string();
        assert!(message.contains("tokenizer_config.json: chat_template is neither"), "{message}");
    }

    #[test]
    fn a_template_that_cannot_be_used_says_why() {
        fails("{% for m in messages %}", "cannot be read: syntax error");
        fails("a\n{{ messages[0].content.zfill(3) }}", "fails: unknown method: ");
        fails("{{ raise_exception('roles must ' ~ 'alternate') }}", "refuses the conversation: roles must alternate");
        fails(
            "{% macro m() %}{{ raise_exception('inside') }}{% endmacro %}{{ m() }}",
            "refuses the conversation: inside",
        );
        assert!(render("a\n{{ nothing.at.all }}", "").unwrap_err().to_string().contains("(line 2 of the template)"));
    }

    #[test]
    fn a_template_that_does_not_end_is_stopped() {
        let forever = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
        fails(forever, "does not end: stopped after 20000000 instructions");
        let text = "{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}";
        fails(text, "writes more than 64 MiB; stopped");
        fails("{{ 'x' * 999999999999 }}", "repeated string is too large");
        let panics = render("{{ ''[::-1] }}", "").map_err(|e| e.to_string());
        assert!(panics.as_ref().is_ok_and(String::is_empty) || panics.unwrap_err().contains("template engine panics"));
    }

    #[test]
    fn generation_marks_and_line_ends_leave_no_trace() {
        let marked = "a{% generation %}b{% set c = 1 %}{%- endgeneration -%} {{ c is defined }}";
        assert_eq!(render(marked, "").unwrap(), "abFalse");
        let prepared_marks = prepared("{%-generation+%}x{%+ endgeneration -%}");
        let call = "do cuvee_generation_mark() %}";
        assert_eq!(
            prepared_marks,
            format!("{{%- with %}}{{% {} +%}}x{{%+ {call}{{% endwith -%}}", &call[..call.len() - 3])
        );
        for other in ["{% generations %}", "{{ generation }}", "{% if generation %}", "a {% b", "{%"] {
            assert_eq!(prepared(other), other);
        }
        assert_eq!(render("a\r\n{{ messages[0].content }}\rb", "c\r\nd").unwrap(), "a\nc\r\nd\nb");
    }

    #[test]
    fn the_clock_is_read_as_python_reads_it() {
        let year = render("{{ strftime_now('%Y|%%|é') }}", "").unwrap();
        let (year, rest) = year.split_once('|').unwrap();
        assert!(year.parse::<u32>().unwrap() > 2025 && rest == "%|é", "{year} {rest}");
        assert!(template("{{ strftime_now('%Y') }}").unwrap().reads_clock());
        assert!(!template("{{ eos_token }}").unwrap().reads_clock());
    }
}
