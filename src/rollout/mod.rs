//! Generation with a KV cache. A prompt is computed once, whatever the number of completions; its keys and values
//! lie in one slot, those of each completion in another, and attention reads them through the segment table that
//! training uses. A sample's text depends on its seed and index alone, never on what is generated beside it.

use crate::data::Extent;
use crate::device::{Arena, DType, Device, Dry, Kind, Ledger, Tensor, range};
use crate::error::{Error, Result};
use crate::model::{Acts, Batch, Keep, KvCache, Model, Spec};
use crate::ops::Backend;
use crate::ops::attention::{NO_PARENT, Segment};
use crate::ops::sample;

pub use crate::ops::sample::Sampling;

/// What to generate from one prompt.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// At least one token.
    pub prompt: &'a [u32],
    /// Completions; completion i draws from stream `first_sample + i` of the seed.
    pub samples: usize,
    pub first_sample: u64,
    pub max_new_tokens: usize,
    pub sampling: Sampling,
    /// A completion ends with the first of these, which it keeps.
    pub eos: &'a [u32],
}

impl Request<'_> {
    /// Refuses a request that is longer than the model's learned positions reach.
    pub fn check(&self, spec: &Spec) -> Result<()> {
        let (prompt, new) = (self.prompt.len(), self.max_new_tokens);
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

    fn extent(&self) -> Extent {
        Extent {
            rows: self.prompt.len().max(self.samples),
            targets: self.samples,
            segments: 1 + self.samples,
            sequences: self.samples,
            longest: self.prompt.len() + self.max_new_tokens,
        }
    }

    /// Key rows: the prompt's slot, then one for each completion.
    fn slot_rows(&self) -> usize {
        self.prompt.len() + self.samples * self.max_new_tokens
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Completion {
    pub ids: Vec<u32>,
    /// Whether it ended with an end-of-sequence token, not at the length limit.
    pub finished: bool,
}

struct Buffers<D: Device> {
    acts: Acts<D>,
    batch: Batch<D>,
    kv: KvCache<D>,
    /// `[samples, vocab]`
    logits: Tensor<D>,
    /// `[samples, 3]`
    draws: Tensor<D>,
    /// `[samples, 1]`
    ids: Tensor<D>,
}

impl<D: Device> Buffers<D> {
    fn new(arena: &mut Arena<D>, spec: &Spec, rank: usize, request: &Request) -> Self {
        let extent = request.extent();
        Self {
            acts: Acts::new(arena, spec, &extent, Keep::Nothing).with_low_rank(arena, rank),
            batch: Batch::new(arena, &extent),
            kv: KvCache::new(arena, spec, request.slot_rows(), extent.rows),
            logits: arena.floats(Kind::Workspace, request.samples, spec.vocab),
            draws: arena.indices(Kind::Workspace, request.samples, sample::DRAW),
            ids: arena.indices(Kind::Workspace, request.samples, 1),
        }
    }
}

/// Memory of a generation besides the model, whose adapters have [rank](Model::widest_rank) `rank`, on a device that stores
/// `storage`.
pub fn plan(storage: DType, spec: &Spec, rank: usize, request: &Request) -> Ledger {
    Dry::measure(storage, |arena| Buffers::new(arena, spec, rank, request))
}

/// Completions of one prompt. The model's rotation table must reach `prompt + max_new_tokens`.
pub fn generate<B: Backend>(device: &B, model: &Model<B>, request: &Request) -> Result<Vec<Completion>> {
    let _range = range(c"generate");
    if request.prompt.is_empty() {
        let detail = "the prompt has no token, and the tokenizer adds none in front; give at least one character";
        return Err(Error::option("--prompt", detail));
    }
    request.check(&model.spec)?;
    let vocab = model.spec.vocab;
    if let Some(id) = request.prompt.iter().find(|id| **id as usize >= vocab) {
        let detail = format!(
            "token {id} lies past the model's vocabulary of {vocab}; do tokenizer.json and config.json belong together?"
        );
        return Err(Error::option("--prompt", detail));
    }
    let (spec, rank) = (&model.spec, model.widest_rank());
    let mut arena = Arena::new(device, &plan(device.storage(), spec, rank, request))?;
    let mut buffers = Buffers::new(&mut arena, spec, rank, request);
    let mut completions = vec![Completion { ids: Vec::new(), finished: false }; request.samples];
    prefill(device, model, request, &mut buffers)?;
    let mut active: Vec<usize> = (0..request.samples).collect();
    loop {
        let ids = choose(device, request, &mut buffers, &completions, &active)?;
        for (id, sample) in ids.into_iter().zip(&active) {
            completions[*sample].ids.push(id);
            completions[*sample].finished = request.eos.contains(&id);
        }
        let open = |s: &usize| !completions[*s].finished && completions[*s].ids.len() < request.max_new_tokens;
        active.retain(open);
        if active.is_empty() {
            return Ok(completions);
        }
        decode(device, model, request, &mut buffers, &completions, &active)?;
    }
}

/// The next token of every active completion, from its row of logits.
fn choose<B: Backend>(
    device: &B,
    request: &Request,
    b: &mut Buffers<B>,
    completions: &[Completion],
    active: &[usize],
) -> Result<Vec<u32>> {
    let draw =
        |sample: &usize| sample::draw(request.first_sample + *sample as u64, completions[*sample].ids.len() as u32);
    let draws: Vec<[u32; sample::DRAW]> = active.iter().map(draw).collect();
    let (rows, mut ids) = (active.len(), vec![0; active.len()]);
    device.write_u32(draws.as_flattened(), b.draws.top_mut(rows))?;
    device.sample(sample::Args {
        logits: b.logits.top_mut(rows),
        sampling: request.sampling,
        draws: b.draws.top(rows),
        ids: b.ids.top_mut(rows),
    })?;
    device.read_u32(b.ids.top(rows), &mut ids)?;
    sample::tokens(&ids)?;
    Ok(ids)
}

fn prompt_segment(request: &Request, queries: usize) -> Segment {
    let len = request.prompt.len() as u32;
    Segment { start: 0, len, parent: NO_PARENT, position: 0, query_start: 0, queries: queries as u32 }
}

/// Runs the prompt; `logits` becomes those of its last row, once for each completion.
fn prefill<B: Backend>(device: &B, model: &Model<B>, request: &Request, b: &mut Buffers<B>) -> Result<()> {
    let len = request.prompt.len();
    let rows: Vec<u32> = (0..len as u32).collect();
    let read = vec![len as u32 - 1; request.samples];
    b.batch.load_decode(device, request.prompt, &rows, &[prompt_segment(request, len)], &read)?;
    b.kv.set_append(device, &rows)?;
    model.decode(device, &b.batch, &mut b.acts, &mut b.kv, &mut b.logits)
}

/// Runs the newest token of every active completion; `logits` becomes `[active, vocab]`.
fn decode<B: Backend>(
    device: &B,
    model: &Model<B>,
    request: &Request,
    b: &mut Buffers<B>,
    completions: &[Completion],
    active: &[usize],
) -> Result<()> {
    let prompt = request.prompt.len();
    let done = |sample: usize| completions[sample].ids.len();
    let slot = |sample: usize| prompt + sample * request.max_new_tokens;
    let newest = |sample: &usize| *completions[*sample].ids.last().expect("sampled before it is decoded");
    let tokens: Vec<u32> = active.iter().map(newest).collect();
    let positions: Vec<u32> = active.iter().map(|s| (prompt + done(*s) - 1) as u32).collect();
    let append: Vec<u32> = active.iter().map(|s| (slot(*s) + done(*s) - 1) as u32).collect();
    let completion = |(query, sample): (usize, &usize)| Segment {
        start: slot(*sample) as u32,
        len: done(*sample) as u32,
        parent: 0,
        position: prompt as u32,
        query_start: query as u32,
        queries: 1,
    };
    let completions = active.iter().enumerate().map(completion);
    let segments: Vec<Segment> = std::iter::once(prompt_segment(request, 0)).chain(completions).collect();
    let read: Vec<u32> = (0..active.len() as u32).collect();
    b.batch.load_decode(device, &tokens, &positions, &segments, &read)?;
    b.kv.set_append(device, &append)?;
    model.decode(device, &b.batch, &mut b.acts, &mut b.kv, &mut b.logits)
}
