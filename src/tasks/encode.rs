//! Texts as tokens, by the rules of lm-evaluation-harness 0.4.13: `tok_encode`, `_encode_pair`, `loglikelihood` and
//! `loglikelihood_rolling` of `models/huggingface.py` and `api/model.py`, `get_rolling_token_windows` of `utils.py`.
//!
//! The window is the harness's `max_length`: the tokens that a model reads at once, one less than a sequence has, whose
//! last token is predicted only. This engine runs that one as well, so where positions are learned the window is one
//! less than the table's length; the harness with `max_length` so much less gives the same numbers.

use std::path::Path;

use crate::checkpoint::json::read_json;
use crate::data::{Sequence, Tokenizer};
use crate::error::{Error, Result};
use crate::model::Checkpoint;

/// Keys of config.json that say how long a model's texts may be, in the harness's order.
const LENGTHS: &[&str] = &["n_positions", "max_position_embeddings", "n_ctx"];
/// Where no file says.
const DEFAULT_WINDOW: u64 = 2048;
/// What transformers writes as `model_max_length` for "not known".
const ENDLESS: f64 = 1e29;

/// How one model's tokenizer writes texts.
pub struct Encoder<'a> {
    pub tokenizer: &'a Tokenizer,
    /// Tokens that the model reads at once.
    pub window: usize,
    /// What the user limits sequences to.
    pub max_length: Option<usize>,
    /// Begin-of-text, else end-of-text: what comes before a text that nothing comes before.
    prefix: Option<u32>,
}

impl<'a> Encoder<'a> {
    /// `max_length` overrides the length that the model's files name.
    pub fn new(tokenizer: &'a Tokenizer, checkpoint: &Checkpoint, max_length: Option<usize>) -> Result<Self> {
        let window = match max_length {
            Some(given) => given,
            None => usize::try_from(stored_window(&checkpoint.dir)?).unwrap_or(usize::MAX),
        };
        let learned = checkpoint.spec.most_positions().map_or(usize::MAX, |most| most - 1);
        let prefix = tokenizer.bos().or(tokenizer.eos().map(|(id, _)| id));
        Ok(Self { tokenizer, window: window.min(learned).max(1), max_length, prefix })
    }

    fn prefix(&self) -> Result<u32, String> {
        self.prefix
            .ok_or_else(|| "nothing comes before this text, and the tokenizer has no BOS or EOS to put there".into())
    }

    /// With the special tokens that the tokenizer adds to any text, unless it starts with one already.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let marked = match self.prefix {
            Some(prefix) => text.starts_with(&self.tokenizer.decode_all(&[prefix])?),
            None => false,
        };
        if marked { self.tokenizer.encode_plain(text) } else { self.tokenizer.encode(text) }
    }

    /// A context and what continues it, scored. Spaces at the end of the context belong to the continuation; both are
    /// encoded together and split at the context's own length; what does not fit the window is cut from the left.
    ///
    /// The inner error says why there is nothing to score.
    pub fn pair(&self, context: &str, continuation: &str) -> Result<Result<Sequence, String>> {
        let (ids, first) = match context {
            "" => (self.tokenizer.encode_plain(continuation)?, 0),
            _ => {
                let bare = context.trim_end_matches(is_space);
                let whole = self.encode(&[context, continuation].concat())?;
                let mut ids = self.encode(bare)?;
                let first = ids.len();
                ids.extend(whole.iter().skip(first));
                (ids, first)
            }
        };
        Ok(self.sequence(ids, first))
    }

    /// `ids` of which those before `first` are given.
    fn sequence(&self, mut ids: Vec<u32>, mut first: usize) -> Result<Sequence, String> {
        if first == 0 {
            let prefix = self.prefix()?;
            if ids.first() != Some(&prefix) {
                ids.insert(0, prefix);
            }
            first = 1;
        }
        let scored = ids.len() - first;
        if scored == 0 {
            return Err("no token of its own is left behind the context".into());
        }
        if scored > self.window {
            return Err(format!("it has {scored} tokens, the model reads {}; see --max-length", self.window));
        }
        let cut = ids.len().saturating_sub(self.window + 1);
        Ok(Sequence::new(ids.split_off(cut), first - cut))
    }

    /// A whole text, every token scored once: windows of which each predicts as many tokens as it can, the first from
    /// the prefix token, the others from the token before; the last one sees a whole window.
    pub fn windows(&self, text: &str) -> Result<Result<Vec<Sequence>, String>> {
        let (tokens, window) = (self.encode(text)?, self.window);
        if tokens.is_empty() {
            return Ok(Err("has no token".into()));
        }
        let prefix = match self.prefix() {
            Ok(prefix) => prefix,
            Err(why) => return Ok(Err(why)),
        };
        let head = tokens.len().min(window);
        let mut windows = vec![Sequence::new([&[prefix], &tokens[..head]].concat(), 1)];
        let mut done = head;
        while done < tokens.len() {
            let end = (done + window).min(tokens.len());
            let start = end - window - 1;
            windows.push(Sequence::new(tokens[start..end].to_vec(), done - start));
            done = end;
        }
        Ok(Ok(windows))
    }

    /// A text to go on from, its start cut off where it leaves no room for `max_new_tokens` in the window.
    pub fn prompt(&self, text: &str, max_new_tokens: usize) -> Result<Result<Vec<u32>, String>> {
        let mut ids = self.encode(text)?;
        if ids.is_empty() {
            return Ok(Err("the prompt has no token".into()));
        }
        if max_new_tokens >= self.window {
            let window = self.window;
            let detail = format!("{max_new_tokens} leaves no room for a prompt: the model reads {window} tokens");
            return Err(Error::option("--max-new-tokens", detail));
        }
        let cut = ids.len().saturating_sub(self.window - max_new_tokens);
        Ok(Ok(ids.split_off(cut)))
    }
}

/// The harness's `resolve_max_length`.
fn stored_window(dir: &Path) -> Result<u64> {
    let config = read_json(&dir.join("config.json"))?;
    if let Some(length) = LENGTHS.iter().find_map(|key| config.get(key)?.as_u64()) {
        return Ok(length);
    }
    let tokenizer = dir.join("tokenizer_config.json");
    let tokenizer = if tokenizer.exists() { read_json(&tokenizer)? } else { Default::default() };
    let length = tokenizer.get("model_max_length").and_then(|length| length.as_f64());
    Ok(length.filter(|length| *length < ENDLESS).map_or(DEFAULT_WINDOW, |length| length as u64))
}

/// What Python's `str.isspace` counts besides Unicode's white space.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}
