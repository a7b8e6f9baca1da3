//! The fields of a request's JSON: each is read once, with its type, and what nobody reads is refused by name.

use serde_json::{Map, Value};

use super::refusal::Refusal;

pub struct Fields(pub(super) Map<String, Value>);

/// What clients send along and no answer depends on.
const WITHOUT_EFFECT: &[&str] = &["user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"];

impl Fields {
    /// # Errors
    /// The body is no JSON object.
    pub fn parse(body: &[u8]) -> Result<Self, Refusal> {
        let bad = |message: String| Refusal::new(axum::http::StatusCode::BAD_REQUEST, message);
        match serde_json::from_slice(body) {
            Ok(Value::Object(fields)) => Ok(Self(fields)),
            Ok(_) => Err(bad("the body is JSON, but no object".into())),
            Err(error) => Err(bad(format!("the body is not JSON: {error}"))),
        }
    }

    /// A field that is there and not null.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        self.0.remove(name).filter(|value| !value.is_null())
    }

    fn typed<T>(&mut self, name: &str, wanted: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>, Refusal> {
        let Some(value) = self.take(name) else { return Ok(None) };
        read(&value).map(Some).ok_or_else(|| Refusal::field(name, format!("{} is not {wanted}", shown(&value))))
    }

    pub fn text(&mut self, name: &str) -> Result<Option<String>, Refusal> {
        self.typed(name, "a string", |value| value.as_str().map(String::from))
    }

    pub fn switch(&mut self, name: &str) -> Result<bool, Refusal> {
        Ok(self.typed(name, "true or false", Value::as_bool)?.unwrap_or(false))
    }

    pub fn object(&mut self, name: &str) -> Result<Option<Map<String, Value>>, Refusal> {
        self.typed(name, "an object", |value| value.as_object().cloned())
    }

    /// A number from `least` to `most`.
    pub fn number(&mut self, name: &str, [least, most]: [f64; 2]) -> Result<Option<f64>, Refusal> {
        let from = if least == f64::MIN_POSITIVE { "above 0 and up".to_string() } else { format!("from {least}") };
        let wanted = format!("a number {from} to {most}");
        self.typed(name, &wanted, |value| value.as_f64().filter(|number| (least..=most).contains(number)))
    }

    /// A whole number from `least` to `most`.
    pub fn count(&mut self, name: &str, [least, most]: [u64; 2]) -> Result<Option<usize>, Refusal> {
        let wanted = match most {
            u64::MAX => format!("a whole number of {least} or more"),
            most => format!("a whole number from {least} to {most}"),
        };
        self.typed(name, &wanted, |value| Some(value.as_u64().filter(|n| (least..=most).contains(n))? as usize))
    }

    /// Any whole number; a negative one is its two's complement.
    pub fn seed(&mut self) -> Result<Option<u64>, Refusal> {
        self.typed("seed", "a whole number", |value| value.as_u64().or(value.as_i64().map(i64::cast_unsigned)))
    }

    /// A string, or a list of strings, none of them empty: at most `count` of at most `bytes` each.
    pub fn strings(&mut self, name: &str, count: usize, bytes: usize) -> Result<Vec<String>, Refusal> {
        let text = |value: &Value| value.as_str().filter(|t| (1..=bytes).contains(&t.len())).map(String::from);
        let wanted = format!("a string of 1 to {bytes} bytes or a list of up to {count} of them");
        let read = |value: &Value| match value {
            Value::Array(items) if items.len() <= count => items.iter().map(text).collect(),
            other => text(other).map(|text| vec![text]),
        };
        Ok(self.typed(name, &wanted, read)?.unwrap_or_default())
    }

    /// A field that may only say what happens without it.
    pub fn only(&mut self, name: &str, neutral: &[Value]) -> Result<(), Refusal> {
        match self.take(name) {
            Some(value) if !neutral.contains(&value) => {
                Err(Refusal::field(name, format!("{} is not supported here; leave it out", shown(&value))))
            }
            _ => Ok(()),
        }
    }

    /// Refuses what nobody read.
    pub fn end(self) -> Result<(), Refusal> {
        let unknown = self.0.iter().find(|(name, value)| !value.is_null() && !WITHOUT_EFFECT.contains(&name.as_str()));
        match unknown {
            Some((name, _)) => Err(Refusal::field(name, "this server knows no such field; leave it out")),
            None => Ok(()),
        }
    }
}

/// A value in a message.
fn shown(value: &Value) -> String {
    const MOST: usize = 60;
    let text = value.to_string();
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}..", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(text: &str) -> Fields {
        Fields::parse(text.as_bytes()).unwrap()
    }

    #[track_caller]
    fn refused<T>(found: Result<T, Refusal>, param: &str, part: &str) {
        let refusal = found.err().expect("a refusal");
        assert_eq!(refusal.param.as_deref(), Some(param), "{refusal:?}");
        assert!(refusal.message.contains(part), "{:?} lacks {part:?}", refusal.message);
    }

    #[test]
    fn wrong_types_name_the_field() {
        refused(fields("{\"top_p\": \"x\"}").number("top_p", [0.0, 1.0]), "top_p", "\"x\" is not a number from 0 to 1");
        refused(fields("{\"top_p\": 2}").number("top_p", [0.0, 1.0]), "top_p", "2 is not a number");
        refused(fields("{\"n\": 1.5}").count("n", [1, 8]), "n", "1.5 is not a whole number from 1 to 8");
        refused(fields("{\"n\": -1}").count("n", [1, 8]), "n", "-1 is not");
        refused(fields("{\"stream\": 1}").switch("stream"), "stream", "1 is not true or false");
        refused(fields("{\"stop\": [\"a\", 3]}").strings("stop", 4, 9), "stop", "is not a string of 1 to 9 bytes");
        refused(fields("{\"stop\": \"\"}").strings("stop", 4, 9), "stop", "\"\" is not");
        refused(fields("{\"logit_bias\": {\"5\": 1}}").only("logit_bias", &[]), "logit_bias", "is not supported");
        refused(fields("{\"zzz\": 1}").end(), "zzz", "no such field");
        let long = format!("{{\"n\": \"{}\"}}", "é".repeat(500));
        let message = fields(&long).count("n", [1, 8]).unwrap_err().message;
        assert!(message.len() < 300 && message.contains(".."), "{message}");
    }

    #[test]
    fn null_is_absent_and_some_fields_say_nothing() {
        let mut all =
            fields("{\"n\": null, \"user\": \"me\", \"other\": null, \"seed\": -1, \"stop\": [\"a\", \"b\"]}");
        assert_eq!(all.count("n", [1, 8]).unwrap(), None);
        assert_eq!(all.seed().unwrap(), Some(u64::MAX));
        assert_eq!(all.strings("stop", 4, 9).unwrap(), ["a", "b"]);
        all.end().unwrap();
    }

    #[test]
    fn a_body_is_one_json_object() {
        for (body, part) in [("", "not JSON"), ("{", "not JSON"), ("[1]", "no object"), ("{} x", "not JSON")] {
            let refusal = Fields::parse(body.as_bytes()).err().unwrap();
            assert!(refusal.message.contains(part), "{refusal:?}");
        }
        let deep = "[".repeat(100_000);
        assert!(Fields::parse(deep.as_bytes()).is_err());
    }
}
