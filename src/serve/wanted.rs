//! What a request wants: OpenAI's fields of completions and chats, vLLM's of sampling (`top_k`, `min_p`,
//! `repetition_penalty`, `ignore_eos`) and `soup`.

use std::sync::Arc;

use axum::http::StatusCode;
use serde_json::{Value, json};

use super::fields::Fields;
use super::refusal::Refusal;
use super::soup::{Soups, Weights};
use crate::data::{ChatTemplate, Message, Tokenizer};
use crate::rollout::Sampling;

/// What no request may exceed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Most {
    /// Tokens of a prompt and its completion.
    pub context: usize,
    /// Tokens of one completion.
    pub new_tokens: usize,
    /// Completions of one request.
    pub completions: usize,
}

/// Stop strings, and the bytes of one.
const STOPS: [usize; 2] = [16, 256];
/// Likeliest tokens that are told.
const ALTERNATIVES: u64 = 20;
/// New tokens where a completion asks for no number, as OpenAI has it.
const NEW_TOKENS: usize = 16;

/// A prompt as tokens and as text.
#[derive(Clone, PartialEq, Debug)]
pub struct Asked {
    pub ids: Vec<u32>,
    pub text: String,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shape {
    Completion,
    Chat,
}

/// A request that was understood and may be answered.
#[derive(Clone, PartialEq, Debug)]
pub struct Wanted {
    pub shape: Shape,
    pub prompts: Vec<Asked>,
    pub blend: Weights,
    /// Completions of each prompt.
    pub n: usize,
    pub max_new_tokens: usize,
    pub sampling: Sampling,
    /// The request named the seed.
    pub seeded: bool,
    pub stop: Vec<String>,
    /// No end-of-text token ends a completion.
    pub ignore_eos: bool,
    /// Log-probabilities of tokens, with so many alternatives.
    pub logprobs: Option<usize>,
    /// The prompt comes back before its completion.
    pub echo: bool,
    pub stream: bool,
    /// A stream ends with the number of tokens.
    pub stream_usage: bool,
    /// How the request called the model.
    pub model: String,
}

/// What a request is read with.
pub struct Reader<'a> {
    pub tokenizer: &'a Tokenizer,
    /// The model's chat template, or why there is none.
    pub template: &'a Result<Arc<ChatTemplate>, String>,
    pub soups: &'a Soups,
    pub most: Most,
    /// Of a request that names no seed.
    pub seed: u64,
}

impl Reader<'_> {
    pub fn completion(&self, body: &[u8]) -> Result<Wanted, Refusal> {
        let mut fields = Fields::parse(body)?;
        let prompt = fields.take("prompt").ok_or_else(|| Refusal::field("prompt", "is missing"))?;
        let prompts = self.prompts(prompt)?;
        let logprobs = fields.count("logprobs", [0, ALTERNATIVES])?;
        let max_new_tokens = fields.count("max_tokens", [0, u64::MAX])?.unwrap_or(NEW_TOKENS);
        let echo = fields.switch("echo")?;
        fields.only("suffix", &[json!("")])?;
        let wanted = Wanted { logprobs, echo, max_new_tokens, ..self.common(&mut fields, Shape::Completion, prompts)? };
        fields.only("best_of", &[json!(wanted.n)])?;
        fields.end()?;
        self.check(wanted)
    }

    pub fn chat(&self, body: &[u8]) -> Result<Wanted, Refusal> {
        let mut fields = Fields::parse(body)?;
        let messages = messages(fields.take("messages"))?;
        let template = self.template.as_ref().map_err(|why| Refusal::field("messages", why))?;
        let variables = fields.object("chat_template_kwargs")?.unwrap_or_default();
        let text =
            template.render(&messages, &variables, true).map_err(|e| Refusal::field("messages", self.plain(&e)))?;
        let ids = self.tokenizer.encode_plain(&text).map_err(|e| Refusal::field("messages", self.plain(&e)))?;
        let room = self.most.context.saturating_sub(ids.len()).min(self.most.new_tokens).max(1);
        let alternatives = fields.count("top_logprobs", [0, ALTERNATIVES])?;
        let logprobs = fields.switch("logprobs")?;
        if alternatives.is_some() && !logprobs {
            return Err(Refusal::field("top_logprobs", "does nothing without \"logprobs\": true"));
        }
        let [old, new] = ["max_tokens", "max_completion_tokens"].map(|name| fields.count(name, [1, u64::MAX]));
        let max_new_tokens = new?.or(old?).unwrap_or(room);
        let none = [json!([]), json!("none"), json!("auto")];
        fields.only("tools", &none)?;
        fields.only("tool_choice", &none)?;
        fields.only("parallel_tool_calls", &[json!(true), json!(false)])?;
        fields.only("response_format", &[json!({"type": "text"})])?;
        let logprobs = logprobs.then_some(alternatives.unwrap_or(0));
        let common = self.common(&mut fields, Shape::Chat, vec![Asked { ids, text }])?;
        fields.end()?;
        self.check(Wanted { logprobs, max_new_tokens, ..common })
    }

    /// What both kinds of request have.
    fn common(&self, fields: &mut Fields, shape: Shape, prompts: Vec<Asked>) -> Result<Wanted, Refusal> {
        let model = fields.text("model")?;
        let soup = fields.object("soup")?;
        let blend = self.soups.weights(model.as_deref(), soup.as_ref())?;
        let stream = fields.switch("stream")?;
        let options = fields.object("stream_options")?;
        if options.is_some() && !stream {
            return Err(Refusal::field("stream_options", "does nothing without \"stream\": true"));
        }
        let stream_usage = options.is_some_and(|options| options.get("include_usage") == Some(&json!(true)));
        for name in ["presence_penalty", "frequency_penalty"] {
            fields.only(name, &[json!(0), json!(0.0)])?;
        }
        fields.only("logit_bias", &[json!({})])?;
        // -1 is vLLM's word for all.
        let all = fields.0.get("top_k") == Some(&json!(-1));
        let top_k = if all { fields.take("top_k").map(|_| 0) } else { fields.count("top_k", [0, 1 << 31])? };
        let least = f64::MIN_POSITIVE;
        let seed = fields.seed()?;
        let sampling = Sampling {
            temperature: fields.number("temperature", [0.0, 100.0])?.unwrap_or(1.0),
            top_k: top_k.unwrap_or(0),
            top_p: fields.number("top_p", [least, 1.0])?.unwrap_or(1.0),
            min_p: fields.number("min_p", [0.0, 1.0])?.unwrap_or(0.0),
            repetition_penalty: fields.number("repetition_penalty", [1e-3, 1e3])?.unwrap_or(1.0),
            seed: seed.unwrap_or(self.seed),
        };
        Ok(Wanted {
            shape,
            prompts,
            blend,
            n: fields.count("n", [1, self.most.completions as u64])?.unwrap_or(1),
            max_new_tokens: 0,
            sampling,
            seeded: seed.is_some(),
            stop: fields.strings("stop", STOPS[0], STOPS[1])?,
            ignore_eos: fields.switch("ignore_eos")?,
            logprobs: None,
            echo: false,
            stream,
            stream_usage,
            model: model.unwrap_or_else(|| self.soups.base.clone()),
        })
    }

    /// A string, tokens, or a list of either.
    fn prompts(&self, prompt: Value) -> Result<Vec<Asked>, Refusal> {
        let items = match prompt {
            Value::Array(items) if items.first().is_some_and(Value::is_number) => vec![Value::Array(items)],
            Value::Array(items) => items,
            other => vec![other],
        };
        if items.is_empty() || items.len() > self.most.completions {
            let detail = format!("{} prompts, and a request has 1 to {}", items.len(), self.most.completions);
            return Err(Refusal::field("prompt", detail));
        }
        items.into_iter().map(|item| self.prompt(item)).collect()
    }

    fn prompt(&self, prompt: Value) -> Result<Asked, Refusal> {
        let fail = |detail: String| Refusal::field("prompt", detail);
        match prompt {
            Value::String(text) => {
                let ids = self.tokenizer.encode(&text).map_err(|e| fail(self.plain(&e)))?;
                Ok(Asked { ids, text })
            }
            Value::Array(ids) => {
                let id = |id: &Value| {
                    let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
                    id.filter(|id| self.tokenizer.token(*id).is_some())
                };
                let ids: Option<Vec<u32>> = ids.iter().map(id).collect();
                let ids =
                    ids.ok_or_else(|| fail("a list of tokens holds something that is no token of this model".into()))?;
                let text = self.tokenizer.decode_all(&ids).map_err(|e| fail(self.plain(&e)))?;
                Ok(Asked { ids, text })
            }
            _ => Err(fail("expected a string, a list of strings, tokens, or a list of lists of tokens".into())),
        }
    }

    /// Limits on tokens and completions.
    fn check(&self, wanted: Wanted) -> Result<Wanted, Refusal> {
        let (most, new) = (self.most, wanted.max_new_tokens);
        let longest = wanted.prompts.iter().map(|prompt| prompt.ids.len()).max().unwrap_or(0);
        if wanted.prompts.iter().any(|prompt| prompt.ids.is_empty()) {
            return Err(Refusal::field("prompt", "it has no token, and the tokenizer adds none in front"));
        }
        if new == 0 && !wanted.echo {
            return Err(Refusal::field("max_tokens", "0 tokens are an answer only with \"echo\": true"));
        }
        if new > most.new_tokens {
            return Err(Refusal::field(
                "max_tokens",
                format!("{new} is more than the {} of this server", most.new_tokens),
            ));
        }
        if longest + new.max(1) > most.context {
            let detail = format!(
                "{longest} tokens of prompt and {new} new ones are more than the {} of this server",
                most.context
            );
            let refusal = Refusal::new(StatusCode::BAD_REQUEST, detail).with_code("context_length_exceeded");
            return Err(Refusal { param: Some("max_tokens".into()), ..refusal });
        }
        let all = wanted.prompts.len() * wanted.n;
        if all > most.completions {
            return Err(Refusal::field(
                "n",
                format!("{all} completions are more than the {} of one request", most.completions),
            ));
        }
        Ok(wanted)
    }

    /// A message about the request, without this machine's folders.
    fn plain(&self, error: &crate::Error) -> String {
        match error {
            crate::Error::File { detail, .. } => detail.clone(),
            other => other.to_string(),
        }
    }
}

/// Messages with text, whose content may come in parts.
fn messages(given: Option<Value>) -> Result<Vec<Message>, Refusal> {
    let fail = |detail: &str| Refusal::field("messages", detail);
    let Some(Value::Array(items)) = given else { return Err(fail("expected a list of messages")) };
    if items.is_empty() {
        return Err(fail("there is none"));
    }
    let message = |item: Value| {
        let Value::Object(mut message) = item else { return Err(fail("a message is an object with role and content")) };
        if message.get("role").and_then(Value::as_str).is_none() {
            return Err(fail("a message has no role"));
        }
        if let Some(Value::Array(parts)) = message.get("content") {
            let text = |part: &Value| Some(part.get("text").filter(|_| part["type"] == "text")?.as_str()?.to_string());
            let texts: Option<Vec<String>> = parts.iter().map(text).collect();
            let texts = texts.ok_or_else(|| fail("a part of a message is no text; nothing else is read here"))?;
            message.insert("content".into(), texts.concat().into());
        }
        message.retain(|_, value| !value.is_null());
        Ok(message)
    };
    items.into_iter().map(message).collect()
}
