//! Completions of many prompts, one prompt after the other.

use crate::data::Tokenizer;
use crate::error::Result;
use crate::model::Model;
use crate::ops::Backend;
use crate::rollout::{self, Completion, Request, Sampling};

/// Samples that are decoded together.
const TOGETHER: usize = 32;
/// Tokens that are written before stop strings are looked for; then twice as many, and so on.
const FIRST_PIECE: usize = 32;

/// A text to complete.
pub struct Prompt {
    pub text: String,
    /// At least one; fewer than the text has where it is too long.
    pub ids: Vec<u32>,
    /// Nothing that follows one of these is wanted.
    pub until: Vec<String>,
}

/// How texts are completed.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Writing {
    pub max_new_tokens: usize,
    /// Completions of each prompt; sample `i` of prompt `p` draws from stream `p * samples + i` of the seed.
    pub samples: usize,
    pub sampling: Sampling,
}

impl Writing {
    /// Always the likeliest token.
    pub fn greedy(max_new_tokens: usize) -> Self {
        Self { max_new_tokens, samples: 1, sampling: Sampling { temperature: 0.0, top_p: 1.0, seed: 0 } }
    }

    /// The request with the most memory: the longest prompt's.
    pub fn largest<'a>(&self, prompts: &'a [Prompt]) -> Option<Request<'a>> {
        let longest = prompts.iter().max_by_key(|prompt| prompt.ids.len())?;
        Some(self.request(&longest.ids, self.samples.min(TOGETHER)))
    }

    fn request<'a>(&self, prompt: &'a [u32], samples: usize) -> Request<'a> {
        let Self { max_new_tokens, sampling, .. } = *self;
        Request { prompt, samples, first_sample: 0, max_new_tokens, sampling, eos: &[] }
    }
}

/// `[prompts][samples]`; `done` is told how many prompts are finished. The model's rotations must reach the longest
/// prompt with `max_new_tokens` behind it.
pub fn complete<B: Backend>(
    device: &B,
    model: &Model<B>,
    tokenizer: &Tokenizer,
    prompts: &[Prompt],
    writing: Writing,
    done: &mut dyn FnMut(usize),
) -> Result<Vec<Vec<Completion>>> {
    let eos = tokenizer.stops();
    let mut all = Vec::with_capacity(prompts.len());
    for (p, prompt) in prompts.iter().enumerate() {
        let greedy = writing.sampling.temperature == 0.0 && writing.samples == 1;
        all.push(if greedy && !prompt.until.is_empty() {
            vec![in_pieces(device, model, tokenizer, prompt, writing)?]
        } else {
            let mut samples = Vec::new();
            for first in (0..writing.samples).step_by(TOGETHER) {
                let request = writing.request(&prompt.ids, TOGETHER.min(writing.samples - first));
                let first_sample = (p * writing.samples + first) as u64;
                samples.extend(rollout::generate(device, model, &Request { first_sample, eos, ..request })?);
            }
            samples
        });
        done(p + 1);
    }
    Ok(all)
}

/// The likeliest text, not much further than to the first stop string. Every piece reads the text so far again; a token
/// has the same bits decoded or read, so pieces change nothing.
fn in_pieces<B: Backend>(
    device: &B,
    model: &Model<B>,
    tokenizer: &Tokenizer,
    prompt: &Prompt,
    writing: Writing,
) -> Result<Completion> {
    let (mut ids, mut piece) = (prompt.ids.clone(), FIRST_PIECE);
    loop {
        let left = writing.max_new_tokens - (ids.len() - prompt.ids.len());
        let request = Request { max_new_tokens: piece.min(left), eos: tokenizer.stops(), ..writing.request(&ids, 1) };
        let Completion { ids: new, finished } = rollout::generate(device, model, &request)?.remove(0);
        ids.extend(new);
        let written = &ids[prompt.ids.len()..];
        let text = tokenizer.decode(written)?;
        if finished || written.len() == writing.max_new_tokens || cut_at(&text, &prompt.until).len() < text.len() {
            return Ok(Completion { ids: written.to_vec(), finished });
        }
        piece *= 2;
    }
}

/// The text before the first of the stop strings; an empty one stops nothing.
pub(super) fn cut_at<'a>(text: &'a str, until: &[String]) -> &'a str {
    let cut = |text: &'a str, stop: &String| text.split(stop.as_str()).next().unwrap_or(text);
    until.iter().filter(|stop| !stop.is_empty()).fold(text, cut)
}

/// What a completion adds to its prompt: a token's text may depend on what comes before.
pub(super) fn text_of(tokenizer: &Tokenizer, prompt: &[u32], completion: &[u32]) -> Result<String> {
    let (start, whole) = (tokenizer.decode(prompt)?, tokenizer.decode(&[prompt, completion].concat())?);
    whole.strip_prefix(&start).map_or_else(|| tokenizer.decode(completion), |text| Ok(text.to_string()))
}
