//! Completions of many prompts.

use crate::data::Tokenizer;
use crate::error::Result;
use crate::model::Model;
use crate::ops::Backend;
use crate::rollout::{Engine, Request, Rollout, Sampling};

/// Completions that are decoded together: their keys and values should not take more than training does.
pub const TOGETHER: usize = 32;

/// A text to complete.
pub struct Prompt {
    pub text: String,
    /// At least one; fewer than the text has where it is too long.
    pub ids: Vec<u32>,
    /// Nothing that follows one of these is wanted.
    pub until: Vec<String>,
    /// The data's own completion of the text.
    pub answer: Option<String>,
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
        Self { max_new_tokens, samples: 1, sampling: Sampling::greedy() }
    }

    /// A request for each prompt, whatever ends a text.
    pub fn requests<'a>(&self, prompts: &'a [Prompt]) -> Vec<Request<'a>> {
        let Self { max_new_tokens, samples, sampling } = *self;
        let request = |(p, prompt): (usize, &'a Prompt)| Request {
            samples,
            first_sample: (p * samples) as u64,
            stop: &prompt.until,
            ..Request::new(&prompt.ids, max_new_tokens, sampling)
        };
        prompts.iter().enumerate().map(request).collect()
    }
}

/// `[prompts][samples]`; `done` is told how many prompts are finished, about. The model's rotations must reach the longest
/// prompt with `max_new_tokens` behind it.
pub fn complete<B: Backend>(
    device: &B,
    model: &Model<B>,
    tokenizer: &Tokenizer,
    prompts: &[Prompt],
    writing: Writing,
    done: &mut dyn FnMut(usize),
) -> Result<Vec<Vec<Rollout>>> {
    let mut requests = writing.requests(prompts);
    requests.iter_mut().for_each(|request| request.eos = tokenizer.stops());
    let engine = Engine::new(device).with_tokenizer(tokenizer).with_max_running(TOGETHER);
    let rollouts = engine.run(model, &requests, &mut |so_far| done(so_far.completions / writing.samples.max(1)))?;
    let mut all: Vec<Vec<Rollout>> = prompts.iter().map(|_| Vec::with_capacity(writing.samples)).collect();
    rollouts.into_iter().for_each(|rollout| all[rollout.prompt].push(rollout));
    Ok(all)
}

/// What a completion adds to its prompt: a token's text may depend on what comes before.
pub fn text_of(tokenizer: &Tokenizer, prompt: &[u32], completion: &[u32]) -> Result<String> {
    let (start, whole) = (tokenizer.decode(prompt)?, tokenizer.decode(&[prompt, completion].concat())?);
    whole.strip_prefix(&start).map_or_else(|| tokenizer.decode(completion), |text| Ok(text.to_string()))
}
