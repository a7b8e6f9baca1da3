//! Memory of a session, which is planned before it starts and not exceeded.

use super::{Request, edits};
use crate::data::Extent;
use crate::device::{Arena, Device, Kind, Tensor};
use crate::error::{Error, Result};
use crate::model::{Acts, Batch, Keep, KvCache, Spec};
use crate::ops::sample::{ODDS, Row};

/// Rows of prompts in one pass, where no single prompt is longer: the products have their full speed, and the memory is small.
const PROMPT_ROWS: usize = 1024;

/// What a run needs at most.
pub struct Size {
    /// Completions at a time.
    pub(super) running: usize,
    /// Rows of prompts in one pass.
    pub(super) prompt_rows: usize,
    /// Key rows.
    pub(super) slot_rows: usize,
    edits: usize,
    /// Adapters that rows have weights for.
    pub(super) adapters: usize,
    /// Of the largest pass.
    pub extent: Extent,
}

/// What a session takes in at most.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Completions at a time.
    pub running: usize,
    /// Tokens of a prompt and one of its completions.
    pub context: usize,
    /// Tokens of all that run at a time, prompts and completions to their full length; a single one must fit.
    pub tokens: usize,
    /// Adapters that requests have weights for; 0 where they have none.
    pub adapters: usize,
}

impl Size {
    pub fn of(spec: &Spec, requests: &[Request], max_running: usize) -> Self {
        let samples = requests.iter().map(|request| request.samples).sum::<usize>();
        let running = max_running.min(samples);
        // The largest that may run together.
        let largest = |mut sizes: Vec<(usize, usize)>| {
            sizes.sort_unstable_by(|a, b| b.cmp(a));
            let mut left = running;
            let mut take = |(rows, count): (usize, usize)| {
                let taken = count.min(left);
                left -= taken;
                rows * taken
            };
            sizes.into_iter().map(&mut take).sum::<usize>()
        };
        let prompts = largest(requests.iter().map(|r| (r.prompt.len(), r.samples.min(1))).collect());
        let completions = largest(requests.iter().map(|r| (r.slot_rows(), r.samples)).collect());
        let longest_prompt = requests.iter().map(|r| r.prompt.len()).max().unwrap_or(0);
        let prompt_rows = prompts.min(PROMPT_ROWS.max(longest_prompt));
        let edits = requests.iter().map(|r| edits::most(r, spec.vocab)).max().unwrap_or(0);
        let extent = Extent {
            rows: prompt_rows + running,
            targets: running,
            // One prompt may wait for a place for its next completion.
            segments: 2 * running + 1,
            sequences: running,
            longest: requests.iter().map(Request::longest).max().unwrap_or(0),
        };
        let adapters = requests.iter().map(|r| r.blend.len()).max().unwrap_or(0);
        Self { running, prompt_rows, slot_rows: prompts + completions, edits: edits * running, adapters, extent }
    }

    /// Of a session whose requests are not known yet.
    pub fn within(spec: &Spec, limits: &Limits) -> Self {
        let Limits { running, context, tokens, adapters } = *limits;
        let (slot_rows, prompt_rows) = (tokens.max(context), PROMPT_ROWS.max(context));
        let extent = Extent {
            rows: prompt_rows + running,
            targets: running,
            segments: 2 * running + 1,
            sequences: running,
            longest: context,
        };
        Self { running, prompt_rows, slot_rows, edits: spec.vocab.min(context) * running, adapters, extent }
    }

    /// Refuses what would wait for ever.
    pub(super) fn admits(&self, request: &Request, vocab: usize) -> Result<()> {
        let (prompt, rows) = (request.prompt.len(), request.prompt.len() + request.slot_rows());
        let fits = request.longest() <= self.extent.longest
            && prompt <= self.prompt_rows
            && rows <= self.slot_rows
            && edits::most(request, vocab) * self.running <= self.edits;
        if fits {
            return Ok(());
        }
        let (new, most) = (request.max_new_tokens, self.extent.longest.min(self.slot_rows));
        let detail = format!("{new} tokens after a prompt of {prompt}, and there is room for {most} in all");
        Err(Error::option("--max-new-tokens", detail))
    }
}

pub struct Buffers<D: Device> {
    pub(super) acts: Acts<D>,
    pub(super) batch: Batch<D>,
    pub(super) kv: KvCache<D>,
    /// `[running, vocab]`
    pub(super) logits: Tensor<D>,
    /// `[running, 13]`
    pub(super) rows: Tensor<D>,
    /// `[edits, 1]`
    pub(super) edits: Tensor<D>,
    pub(super) saved: Tensor<D>,
    /// `[running, 1]`
    pub(super) ids: Tensor<D>,
    /// `[running, 3]`
    pub(super) odds: Tensor<D>,
}

impl<D: Device> Buffers<D> {
    pub fn new(arena: &mut Arena<D>, spec: &Spec, rank: usize, size: &Size) -> Self {
        let (extent, running) = (&size.extent, size.running);
        Self {
            acts: Acts::new(arena, spec, extent, Keep::Nothing)
                .with_low_rank(arena, rank)
                .with_blend(arena, size.adapters),
            batch: Batch::new(arena, extent),
            kv: KvCache::new(arena, spec, size.slot_rows, extent.rows),
            logits: arena.floats(Kind::Workspace, running, spec.vocab),
            rows: arena.indices(Kind::Workspace, running, Row::WORDS),
            edits: arena.indices(Kind::Workspace, size.edits, 1),
            saved: arena.floats(Kind::Workspace, size.edits, 1),
            ids: arena.indices(Kind::Workspace, running, 1),
            odds: arena.indices(Kind::Workspace, running, ODDS),
        }
    }
}
