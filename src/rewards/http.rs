//! A server that judges: it gets completions as JSON by POST, and answers with a reward for each.
//!
//! ```text
//! {"samples": [{"prompt": "Review:", "completion": " A fine film.", "answer": null, "finished": true}, ..]}
//! {"rewards": [1.0, null, ..]}          null: nothing to say          or {"error": "why not"}
//! ```
//!
//! A prompt of messages is a list of them. A request that finds nobody, or an overloaded server (429, 5xx), is sent again after a
//! pause; the server may see completions twice. There is no TLS: a judge that is not on this machine or network goes through a
//! proxy that has it.

use std::thread::sleep;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use ureq::Agent;

use super::jury::Judge;
use super::process::asked;
use super::registry::{Kind, options};
use super::{Entry, Sample, Verdict};
use crate::error::{Error, Result};
use crate::progress::say;

pub const ENTRY: Entry = Entry {
    name: "http",
    summary: "what a server answers to a POST of {\"samples\": [{\"prompt\", \"completion\", \"answer\", \"finished\"}, ..]}: {\"rewards\": [1.0, null, ..]} or {\"error\": \"..\"}",
    keys: &[
        ("url", "where to send them, such as \"http://127.0.0.1:8000/judge\""),
        ("batch", "completions in one request at most [64]"),
        ("timeout_s", "seconds for an answer [60]"),
        ("retries", "how often a request is sent again where nobody answers, or with 429 or 5xx [3]"),
        ("token_env", "the environment variable with the bearer token to send; none is sent without it"),
    ],
    open: |table, _| {
        let Options { url, batch, timeout_s, retries, token_env } = options(table)?;
        if !url.starts_with("http://") {
            return Err(format!(
                "url: expected http://.., found {url:?}; what speaks https needs a proxy on this machine"
            ));
        }
        if !(timeout_s > 0.0 && timeout_s <= LONGEST_TIMEOUT_S) {
            return Err(format!("timeout_s: expected seconds above 0, {LONGEST_TIMEOUT_S} at most, found {timeout_s}"));
        }
        if batch == 0 {
            return Err("batch: expected 1 or more, found 0".into());
        }
        let token = match token_env {
            None => None,
            Some(name) => {
                Some(std::env::var(&name).map_err(|_| format!("token_env: there is no variable {name} with text"))?)
            }
        };
        let agent = Agent::config_builder()
            .timeout_global(Some(Duration::from_secs_f64(timeout_s)))
            .http_status_as_error(false)
            .max_redirects(0)
            .build()
            .into();
        Ok(Kind::Http(Server { agent, url, batch, retries, token }))
    },
};

const LONGEST_TIMEOUT_S: f64 = 1e6;
/// Bytes of an answer.
const LONGEST_ANSWER: u64 = 1 << 24;
/// Characters of it that an error shows.
const SHOWN: usize = 400;
/// Before the first retry; twice as long before each that follows.
const PAUSE: Duration = Duration::from_millis(250);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Options {
    url: String,
    #[serde(default = "batch")]
    batch: usize,
    #[serde(default = "minute")]
    timeout_s: f64,
    #[serde(default = "three")]
    retries: u32,
    token_env: Option<String>,
}

fn batch() -> usize {
    64
}

fn minute() -> f64 {
    60.0
}

fn three() -> u32 {
    3
}

pub struct Server {
    agent: Agent,
    url: String,
    batch: usize,
    retries: u32,
    token: Option<String>,
}

impl Server {
    /// The answer to one request, if the server is there and able.
    fn post(&self, body: &str) -> Result<(u16, String), String> {
        let mut request = self.agent.post(&self.url).header("content-type", "application/json");
        if let Some(token) = &self.token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let mut response = request.send(body).map_err(|e| e.to_string())?;
        let text = response.body_mut().with_config().limit(LONGEST_ANSWER).read_to_string();
        let (status, text) = (response.status().as_u16(), text.map_err(|e| e.to_string())?);
        match status {
            429 | 500.. => Err(format!("status {status}: {}", shown(&text))),
            _ => Ok((status, text)),
        }
    }

    fn ask(&self, samples: &[&Sample]) -> Result<Vec<f64>, String> {
        let body = json!({"samples": samples.iter().map(|sample| asked(sample)).collect::<Vec<_>>()}).to_string();
        let mut pause = PAUSE;
        for left in (0..=self.retries).rev() {
            match self.post(&body) {
                Ok((200, text)) => return rewards(&text, samples.len()),
                Ok((status, text)) => return Err(format!("status {status}: {}", shown(&text))),
                Err(detail) if left == 0 => return Err(detail),
                Err(detail) => say(format_args!("{}: {detail}; it is asked again", self.url)),
            }
            sleep(pause);
            pause *= 2;
        }
        unreachable!("the last try returns")
    }
}

impl Judge for &Server {
    fn judge(&mut self, samples: &[&Sample]) -> Result<Vec<Verdict>> {
        let mut verdicts = Vec::with_capacity(samples.len());
        for some in samples.chunks(self.batch) {
            let rewards = self.ask(some).map_err(|detail| Error::option(&self.url, detail))?;
            verdicts.extend(rewards.into_iter().map(Verdict::of));
        }
        Ok(verdicts)
    }
}

fn shown(text: &str) -> String {
    format!("{:?}", text.trim().chars().take(SHOWN).collect::<String>())
}

fn rewards(text: &str, expected: usize) -> Result<Vec<f64>, String> {
    let wrong = |what: String| format!("answered {}, expected {{\"rewards\": [..]}} with {what}", shown(text));
    let answer: Value = serde_json::from_str(text).map_err(|_| wrong("JSON".into()))?;
    if let Some(error) = answer.get("error").filter(|error| !error.is_null()) {
        return Err(format!("reports an error: {error}"));
    }
    let all = answer.get("rewards").and_then(Value::as_array).ok_or_else(|| wrong("a list".into()))?;
    if all.len() != expected {
        return Err(wrong(format!("{expected} rewards, found {}", all.len())));
    }
    let number = |reward: &Value| match reward {
        Value::Null => Some(f64::NAN),
        reward => reward.as_f64().filter(|reward| reward.is_finite()),
    };
    all.iter().map(|reward| number(reward).ok_or_else(|| wrong("finite numbers or null".into()))).collect()
}
