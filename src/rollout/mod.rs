//! Generation with a KV cache: many prompts, several completions of each, decoded together.
//!
//! A prompt is computed once, whatever the number of its completions; its keys and values lie in one slot, those of each
//! completion in another, and attention reads them through the segment table that training uses. Every pass runs the newest
//! token of all running completions and the prompts of those that begin; one that ends gives its place to the next.
//!
//! A token depends on its request, its sample's stream and index, and on nothing that is generated beside it: logits have the
//! same bits alone or in a batch (on a GPU with batch-invariant products), random numbers are named.
//!
//! A [`Session`] takes requests while it runs; a fixed list is one that is told all of them first.

mod edits;
mod engine;
mod size;
mod slots;
mod text;

use crate::data::{Temperature, Tokenizer};
use crate::device::{DType, Dry, Ledger, Storage, range};
use crate::error::{Error, Result};
use crate::model::{Model, Spec};
use crate::ops::Backend;
use size::Buffers;

pub use crate::ops::sample::Sampling;
pub use engine::{Event, Session};
pub use size::{Limits, Size};
pub use text::Text;

/// Completions that run together where memory sets no limit: enough that a pass is bound by arithmetic, not by reading the
/// weights.
pub const MAX_RUNNING: usize = 256;

/// What to generate from one prompt.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// At least one token.
    pub prompt: &'a [u32],
    /// Completions; completion i draws from stream `first_sample + i` of the seed.
    pub samples: usize,
    pub first_sample: u64,
    /// At least one.
    pub max_new_tokens: usize,
    /// None of `eos` is drawn before.
    pub min_new_tokens: usize,
    pub sampling: Sampling,
    /// So many tokens in a row, of prompt or completion, do not come a second time; 0 allows all.
    pub no_repeat_ngram_size: usize,
    /// A completion ends with the first of these, which it keeps.
    pub eos: &'a [u32],
    /// A completion ends with the token after which its text holds one of these, wherever tokens begin and end. It keeps its
    /// tokens, as in transformers and vLLM; [`before_stop`] cuts the text, as vLLM does. They need [`Engine::with_tokenizer`].
    pub stop: &'a [String],
    /// How much of each of the model's adapters is applied to it; empty: as they were loaded. Of the requests of one run or
    /// session, either none has weights or the empty ones mean 1 of each.
    pub blend: &'a [f32],
    /// So many of the likeliest tokens are told with each token, [`Rollout::alternatives`].
    pub alternatives: usize,
    /// Tell the log-probabilities of the prompt's own tokens, [`Event::Prompt`].
    pub score_prompt: bool,
}

/// What a [`Session`] is asked: it holds its requests and looks at them in every pass.
pub trait Ask {
    fn request(&self) -> Request<'_>;
}

impl Ask for Request<'_> {
    fn request(&self) -> Request<'_> {
        *self
    }
}

impl<'a> Request<'a> {
    /// One completion of `prompt`, which nothing ends but its length.
    pub fn new(prompt: &'a [u32], max_new_tokens: usize, sampling: Sampling) -> Self {
        Self {
            prompt,
            samples: 1,
            first_sample: 0,
            max_new_tokens,
            min_new_tokens: 0,
            sampling,
            no_repeat_ngram_size: 0,
            eos: &[],
            stop: &[],
            blend: &[],
            alternatives: 0,
            score_prompt: false,
        }
    }

    /// Refuses a request without a token to start from or to make, tokens that are none, and what is longer than the model's
    /// learned positions reach.
    pub fn check(&self, spec: &Spec) -> Result<()> {
        if self.prompt.is_empty() {
            let detail = "the prompt has no token, and the tokenizer adds none in front; give at least one character";
            return Err(Error::option("--prompt", detail));
        }
        if let Some(id) = self.prompt.iter().chain(self.eos).find(|id| **id as usize >= spec.vocab) {
            let detail = format!(
                "token {id} lies past the model's vocabulary of {}; do tokenizer.json and config.json belong together?",
                spec.vocab
            );
            return Err(Error::option("--prompt", detail));
        }
        let (prompt, new) = (self.prompt.len(), self.max_new_tokens);
        if new == 0 {
            return Err(Error::option("--max-new-tokens", "0 tokens make no completion; give at least 1"));
        }
        check_sampling(&self.sampling)?;
        match spec.most_positions() {
            Some(most) if prompt + new > most => {
                let room = most.saturating_sub(prompt);
                let detail = format!(
                    "{new} tokens after a prompt of {prompt}, but the model has learned positions for {most}; {room} have room"
                );
                Err(Error::option("--max-new-tokens", detail))
            }
            _ => Ok(()),
        }
    }

    /// Positions of its longest sequence.
    pub fn longest(&self) -> usize {
        self.prompt.len() + self.max_new_tokens
    }

    /// Key rows of a completion: its last token is not run.
    fn slot_rows(&self) -> usize {
        self.max_new_tokens.saturating_sub(1).max(1)
    }
}

fn check_sampling(s: &Sampling) -> Result<()> {
    let numbers = [
        ("--temperature", s.temperature, "0 or more", s.temperature >= 0.0),
        ("--top-p", s.top_p, "above 0 and at most 1", s.top_p > 0.0 && s.top_p <= 1.0),
        ("--min-p", s.min_p, "from 0 to 1", (0.0..=1.0).contains(&s.min_p)),
        ("--repetition-penalty", s.repetition_penalty, "above 0", s.repetition_penalty > 0.0),
    ];
    match numbers.into_iter().find(|(_, value, _, holds)| !holds || !value.is_finite()) {
        Some((option, value, range, _)) => Err(Error::option(option, format!("{value} is not {range}"))),
        None => Ok(()),
    }
}

/// Why a completion ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Finish {
    /// With an end-of-sequence token.
    Eos,
    /// With a stop string.
    Stop,
    /// At the length limit.
    Length,
}

impl Finish {
    pub fn name(self) -> &'static str {
        match self {
            Self::Eos => "eos",
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// A completion.
#[derive(Clone, PartialEq, Debug)]
pub struct Rollout {
    /// Which request it is of, and which of its samples.
    pub prompt: usize,
    pub sample: usize,
    pub ids: Vec<u32>,
    /// Log-probability of each token under the model, over the whole vocabulary, at temperature 1 or that of
    /// [`Engine::with_logps_temperature`], nats: what scoring the sequence gives.
    pub logps: Vec<f32>,
    /// Log-probability of each token in the distribution that it was drawn from, nats: 0 for the likeliest at temperature 0.
    pub sampled_logps: Vec<f32>,
    /// For each token the likeliest ones in its place and their log-probabilities under the model, the likeliest first; empty
    /// where nobody asked.
    pub alternatives: Vec<Vec<(u32, f32)>>,
    pub finish: Finish,
}

/// What the model gives the tokens of a prompt behind its first, as [`Rollout`] of those that were drawn.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Scores {
    pub logps: Vec<f32>,
    pub alternatives: Vec<Vec<(u32, f32)>>,
}

impl Rollout {
    /// Whether it ended by itself, not at the length limit.
    pub fn finished(&self) -> bool {
        self.finish != Finish::Length
    }
}

/// How far a run is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Done {
    pub completions: usize,
    /// Tokens generated.
    pub tokens: usize,
}

/// `text` up to the first place where one of `stop` begins; an empty one stops nothing.
pub fn before_stop<'t>(text: &'t str, stop: &[String]) -> &'t str {
    let first = stop.iter().filter(|stop| !stop.is_empty()).filter_map(|stop| text.find(stop.as_str())).min();
    &text[..first.unwrap_or(text.len())]
}

/// Memory of generating `requests` besides the model, whose adapters have [rank](Model::widest_rank) `rank`, on a device that
/// stores `storage`, with up to `max_running` completions at a time.
pub fn plan(storage: impl Into<Storage>, spec: &Spec, rank: usize, requests: &[Request], max_running: usize) -> Ledger {
    plan_size(storage, spec, rank, &Size::of(spec, requests, max_running))
}

/// The same of a session of this size.
pub fn plan_size(storage: impl Into<Storage>, spec: &Spec, rank: usize, size: &Size) -> Ledger {
    Dry::measure(storage, |arena| Buffers::new(arena, spec, rank, size))
}

/// The most completions at a time, up to [`MAX_RUNNING`], whose [`plan`] fits into `bytes`.
///
/// # Errors
/// Where one does not.
pub fn max_running(storage: DType, spec: &Spec, rank: usize, requests: &[Request], bytes: usize) -> Result<usize> {
    let needs = |running: usize| plan(storage, spec, rank, requests, running).total();
    if needs(1) > bytes {
        let detail = format!("one completion takes {} bytes beside the model, and {bytes} are left", needs(1));
        return Err(Error::option("--max-new-tokens", detail));
    }
    let (mut fits, mut past) = (1, MAX_RUNNING + 1);
    while past - fits > 1 {
        let middle = fits.midpoint(past);
        *(if needs(middle) <= bytes { &mut fits } else { &mut past }) = middle;
    }
    Ok(fits)
}

/// Generates. Weights are the model's own, borrowed; its adapters apply as they are.
pub struct Engine<'a, B: Backend> {
    device: &'a B,
    tokenizer: Option<&'a Tokenizer>,
    max_running: usize,
    logps_temperature: Temperature,
}

impl<'a, B: Backend> Engine<'a, B> {
    pub fn new(device: &'a B) -> Self {
        Self { device, tokenizer: None, max_running: MAX_RUNNING, logps_temperature: Temperature::ONE }
    }

    /// For requests with stop strings.
    pub fn with_tokenizer(&self, tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer: Some(tokenizer), ..*self }
    }

    /// So many completions at a time at most; results do not depend on it.
    pub fn with_max_running(&self, max_running: usize) -> Self {
        Self { max_running: max_running.max(1), ..*self }
    }

    /// Tells log-probabilities at this temperature, whatever tokens are drawn at.
    pub fn with_logps_temperature(&self, logps_temperature: Temperature) -> Self {
        Self { logps_temperature, ..*self }
    }

    /// Completions of all requests, by request and sample. The model's rotation table must reach each
    /// `prompt + max_new_tokens`. `progress` is called after every pass.
    pub fn run(&self, model: &Model<B>, requests: &[Request], progress: &mut dyn FnMut(Done)) -> Result<Vec<Rollout>> {
        if requests.iter().all(|request| request.samples == 0) {
            return Ok(Vec::new());
        }
        let _range = range(c"generate");
        let mut session = self.session(model, Size::of(&model.spec, requests, self.max_running))?;
        requests.iter().try_for_each(|request| session.push(*request).map(|_| ()))?;
        let (mut ended, mut tokens, mut failed) = (Vec::new(), 0, None);
        while session.step(&mut |event| match event {
            Event::Token(_) => tokens += 1,
            Event::Ended(rollout) => {
                tokens += 1;
                ended.push(rollout);
            }
            Event::Failed(_, error) => failed = Some(error),
            Event::Prompt(..) => {}
        })? {
            if let Some(error) = failed {
                return Err(error);
            }
            progress(Done { completions: ended.len(), tokens });
        }
        ended.sort_by_key(|rollout| (rollout.prompt, rollout.sample));
        Ok(ended)
    }

    /// Completions of what it is asked while it runs, within `size`. The model's rotation table must reach its longest
    /// sequence.
    pub fn session<'s, A: Ask>(&'s self, model: &'s Model<B>, size: Size) -> Result<Session<'s, B, A>> {
        Session::new(self.device, (self.tokenizer, self.logps_temperature), model, size)
    }
}

/// Completions of one prompt.
pub fn generate<B: Backend>(device: &B, model: &Model<B>, request: &Request) -> Result<Vec<Rollout>> {
    Engine::new(device).run(model, &[*request], &mut |_| ())
}
