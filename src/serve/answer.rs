//! Answers, whole or as a stream of server-sent events, in OpenAI's two shapes.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::wanted::{Shape, Wanted};
use super::worker::{News, Token};
use crate::data::Tokenizer;
use crate::error::Result;
use crate::rollout::{Finish, Scores, Text, before_stop};

/// Tokens of a prompt beside which a completion is decoded.
const BEFORE: usize = 4;

/// A token as answers tell it.
struct Told {
    id: u32,
    /// None of a prompt's first token.
    logp: Option<f32>,
    alternatives: Vec<(u32, f32)>,
}

/// One completion.
struct Choice {
    /// The last tokens of the prompt, as many as `before`, and the completion's: its first blank is one only behind them. None of a
    /// conversation's, where an answer begins with a word.
    ids: Vec<u32>,
    before: usize,
    text: Text,
    /// What was not sent yet, or all of it where nothing is streamed.
    piece: String,
    told: Vec<Told>,
    /// Characters of the tokens that were told before.
    offset: usize,
    finish: Option<Finish>,
    begun: bool,
}

/// An answer in the making.
pub struct Answer {
    tokenizer: Arc<Tokenizer>,
    pub wanted: Wanted,
    /// The fields that every part has: id, model, creation.
    head: Map<String, Value>,
    /// What made it.
    pub provenance: Value,
    choices: Vec<Choice>,
}

impl Answer {
    pub fn new(tokenizer: Arc<Tokenizer>, wanted: Wanted, id: &str, created: u64, provenance: Value) -> Self {
        let head = [("id", json!(id)), ("created", json!(created)), ("model", json!(wanted.model))];
        let head = head.into_iter().map(|(name, value)| (name.to_string(), value)).collect();
        let choice = |at: usize| {
            let prompt = &wanted.prompts[at / wanted.n];
            let piece = if wanted.echo { prompt.text.clone() } else { String::new() };
            let before = match wanted.shape {
                Shape::Completion => BEFORE.min(prompt.ids.len()),
                Shape::Chat => 0,
            };
            let ids = prompt.ids[prompt.ids.len() - before..].to_vec();
            let (text, told) = (Text::after(before), Vec::new());
            Choice { ids, before, text, piece, told, offset: 0, finish: None, begun: false }
        };
        let choices = (0..wanted.prompts.len() * wanted.n).map(choice).collect();
        Self { tokenizer, head, provenance, choices, wanted }
    }

    /// Whether the log-probabilities of prompts are part of it.
    pub fn scores_prompts(&self) -> bool {
        self.wanted.echo && self.wanted.logprobs.is_some()
    }

    /// Takes news in. Returns the completion that it is of.
    ///
    /// # Errors
    /// The tokens cannot be decoded.
    pub fn take(&mut self, news: News) -> Result<Option<usize>> {
        match news {
            News::Prompt(number, scores) => {
                self.take_prompt(number, &scores);
                Ok(None)
            }
            News::Token(token) => self.take_token(token).map(Some),
            News::Failed(why) => Err(crate::Error::op("serve", why)),
        }
    }

    fn take_prompt(&mut self, number: usize, scores: &Scores) {
        let n = self.wanted.n;
        for choice in &mut self.choices[number * n..(number + 1) * n] {
            let ids = &self.wanted.prompts[number].ids;
            let logps = std::iter::once(None).chain(scores.logps.iter().map(|logp| Some(*logp)));
            let alternatives = std::iter::once(&[][..]).chain(scores.alternatives.iter().map(Vec::as_slice));
            let mut alternatives = alternatives.map(<[_]>::to_vec);
            choice.told = ids
                .iter()
                .zip(logps)
                .map(|(id, logp)| Told { id: *id, logp, alternatives: alternatives.next().unwrap_or_default() })
                .collect();
        }
    }

    fn take_token(&mut self, token: Token) -> Result<usize> {
        let Token { of: [number, sample], id, logp, alternatives, finish } = token;
        let at = number * self.wanted.n + sample;
        let (choice, stop) = (&mut self.choices[at], &self.wanted.stop);
        choice.finish = finish;
        if self.wanted.max_new_tokens == 0 {
            // It was drawn to run the prompt.
            return Ok(at);
        }
        choice.ids.push(id);
        let piece = match finish {
            None => choice.text.grow(&self.tokenizer, &choice.ids, stop)?,
            Some(_) => choice.text.end(&self.tokenizer, &choice.ids, stop)?,
        };
        choice.piece += &piece;
        if self.wanted.logprobs.is_some() {
            choice.told.push(Told { id, logp: Some(logp), alternatives });
        }
        Ok(at)
    }

    pub fn ended(&self) -> bool {
        self.choices.iter().all(|choice| choice.finish.is_some())
    }

    /// Completion tokens so far.
    pub fn tokens(&self) -> usize {
        self.choices.iter().map(|choice| choice.ids.len() - choice.before).sum()
    }

    pub fn prompt_tokens(&self) -> usize {
        self.wanted.prompts.iter().map(|prompt| prompt.ids.len()).sum()
    }

    pub fn finishes(&self) -> Vec<Option<&'static str>> {
        self.choices.iter().map(|choice| choice.finish.map(reason)).collect()
    }

    /// Of each completion.
    pub fn texts(&self) -> Vec<String> {
        let text = |choice: &Choice| before_stop(choice.text.whole(), &self.wanted.stop).to_string();
        self.choices.iter().map(text).collect()
    }

    fn usage(&self) -> Value {
        let (prompt, new) = (self.prompt_tokens(), self.tokens());
        json!({"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new})
    }

    /// An answer as it stands, with these choices.
    fn part(&self, object: &str, choices: Vec<Value>) -> Map<String, Value> {
        let mut part = self.head.clone();
        part.insert("object".into(), object.into());
        part.insert("choices".into(), choices.into());
        part
    }

    /// The whole.
    pub fn whole(&mut self) -> Value {
        let choices: Vec<Value> = (0..self.choices.len())
            .map(|at| {
                let logprobs = self.logprobs(at);
                let choice = &mut self.choices[at];
                let (text, finish) = (std::mem::take(&mut choice.piece), choice.finish.map(reason));
                match self.wanted.shape {
                    Shape::Completion => {
                        json!({"index": at, "text": text, "logprobs": logprobs, "finish_reason": finish})
                    }
                    Shape::Chat => {
                        let message = json!({"role": "assistant", "content": text});
                        json!({"index": at, "message": message, "logprobs": logprobs, "finish_reason": finish})
                    }
                }
            })
            .collect();
        let object = match self.wanted.shape {
            Shape::Completion => "text_completion",
            Shape::Chat => "chat.completion",
        };
        let mut whole = self.part(object, choices);
        whole.insert("usage".into(), self.usage());
        whole.insert("cuvee".into(), self.provenance.clone());
        whole.into()
    }

    /// What is new of a completion as events; empty where there is nothing to see yet.
    pub fn events(&mut self, at: usize) -> String {
        if self.choices[at].piece.is_empty() && self.choices[at].finish.is_none() {
            return String::new();
        }
        let (logprobs, chat) = (self.logprobs(at), self.wanted.shape == Shape::Chat);
        let choice = &mut self.choices[at];
        let first = !std::mem::replace(&mut choice.begun, true);
        let (text, finish) = (std::mem::take(&mut choice.piece), choice.finish.map(reason));
        let (object, choice) = if chat {
            let delta = if first { json!({"role": "assistant", "content": text}) } else { json!({"content": text}) };
            let choice = json!({"index": at, "delta": delta, "logprobs": logprobs, "finish_reason": finish});
            ("chat.completion.chunk", choice)
        } else {
            ("text_completion", json!({"index": at, "text": text, "logprobs": logprobs, "finish_reason": finish}))
        };
        let mut part = self.part(object, vec![choice]);
        if first {
            part.insert("cuvee".into(), self.provenance.clone());
        }
        let mut events = event(&part.into());
        if self.ended() {
            if self.wanted.stream_usage {
                let mut last = self.part(object, Vec::new());
                last.insert("usage".into(), self.usage());
                events += &event(&last.into());
            }
            events += "data: [DONE]\n\n";
        }
        events
    }

    /// Of the tokens since the last call.
    fn logprobs(&mut self, at: usize) -> Value {
        if self.wanted.logprobs.is_none() {
            return Value::Null;
        }
        let told = std::mem::take(&mut self.choices[at].told);
        match self.wanted.shape {
            Shape::Completion => self.completion_logprobs(at, &told),
            Shape::Chat => {
                let one = |id: u32, logp: Option<f32>| {
                    let token = self.name(id);
                    json!({"token": token, "logprob": logp, "bytes": token.as_bytes()})
                };
                let content = told.iter().map(|told| {
                    let mut value = one(told.id, told.logp);
                    let others = told.alternatives.iter().map(|(id, logp)| one(*id, Some(*logp)));
                    value["top_logprobs"] = others.collect();
                    value
                });
                json!({"content": content.collect::<Vec<_>>()})
            }
        }
    }

    fn completion_logprobs(&mut self, at: usize, told: &[Told]) -> Value {
        let mut offsets = Vec::new();
        for told in told {
            offsets.push(self.choices[at].offset);
            self.choices[at].offset += self.piece(told.id).chars().count();
        }
        let tokens: Vec<String> = told.iter().map(|told| self.name(told.id)).collect();
        let logps: Vec<Option<f32>> = told.iter().map(|told| told.logp).collect();
        // The likeliest, and the token itself where it is not one of them. Of tokens of one name the likelier.
        let top = told.iter().map(|told| {
            let logp = told.logp?;
            let mut named = Map::new();
            for (id, logp) in told.alternatives.iter().copied().chain([(told.id, logp)]) {
                named.entry(self.name(id)).or_insert(json!(logp));
            }
            Some(Value::Object(named))
        });
        let top: Value = match self.wanted.logprobs {
            Some(0) => Value::Null,
            _ => json!(top.collect::<Vec<_>>()),
        };
        json!({"tokens": tokens, "token_logprobs": logps, "top_logprobs": top, "text_offset": offsets})
    }

    /// What a token adds to a text.
    fn piece(&self, id: u32) -> String {
        self.tokenizer.pieces(&[id]).pop().map(|piece| piece.text).unwrap_or_default()
    }

    /// What a token is called: its text, or its entry in the vocabulary where it is a part of a character.
    fn name(&self, id: u32) -> String {
        let text = self.piece(id);
        if text.is_empty() { self.tokenizer.token(id).unwrap_or_default() } else { text }
    }
}

fn reason(finish: Finish) -> &'static str {
    match finish {
        Finish::Eos | Finish::Stop => "stop",
        Finish::Length => "length",
    }
}

/// A server-sent event.
pub fn event(value: &Value) -> String {
    format!("data: {value}\n\n")
}
