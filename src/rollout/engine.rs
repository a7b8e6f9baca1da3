//! The passes of a run: who is in each, where keys and values go, what is drawn.

use std::collections::VecDeque;

use super::slots::Slots;
use super::{Done, Engine, Finish, Request, Rollout, edits};
use crate::data::Extent;
use crate::device::{Arena, Device, Kind, Tensor, range};
use crate::error::Result;
use crate::model::{Acts, Batch, Keep, KvCache, Model, Spec};
use crate::ops::Backend;
use crate::ops::attention::{NO_PARENT, Segment};
use crate::ops::sample::{self, ODDS, Row};

/// Rows of prompts in one pass, where no single prompt is longer: the products have their full speed, and the memory is small.
const PROMPT_ROWS: usize = 1024;

/// What a run needs at most.
pub struct Size {
    /// Completions at a time.
    running: usize,
    /// Rows of prompts in one pass.
    prompt_rows: usize,
    /// Key rows.
    slot_rows: usize,
    edits: usize,
    /// Of the largest pass.
    pub extent: Extent,
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
        Self { running, prompt_rows, slot_rows: prompts + completions, edits: edits * running, extent }
    }
}

pub struct Buffers<D: Device> {
    acts: Acts<D>,
    batch: Batch<D>,
    kv: KvCache<D>,
    /// `[running, vocab]`
    logits: Tensor<D>,
    /// `[running, 13]`
    rows: Tensor<D>,
    /// `[edits, 1]`
    edits: Tensor<D>,
    saved: Tensor<D>,
    /// `[running, 1]`
    ids: Tensor<D>,
    /// `[running, 3]`
    odds: Tensor<D>,
}

impl<D: Device> Buffers<D> {
    pub fn new(arena: &mut Arena<D>, spec: &Spec, rank: usize, size: &Size) -> Self {
        let (extent, running) = (&size.extent, size.running);
        Self {
            acts: Acts::new(arena, spec, extent, Keep::Nothing).with_low_rank(arena, rank),
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

/// A completion that runs.
struct Running {
    slot: usize,
    rollout: Rollout,
}

/// A prompt whose keys and values are there, or come with the next pass.
struct Prompt {
    request: usize,
    slot: usize,
    computed: bool,
    running: Vec<Running>,
}

pub struct Run<'a, B: Backend> {
    engine: &'a Engine<'a, B>,
    model: &'a Model<B>,
    requests: &'a [Request<'a>],
    size: Size,
    buffers: Buffers<B>,
    slots: Slots,
    /// By request and sample.
    waiting: VecDeque<(usize, usize)>,
    prompts: Vec<Prompt>,
    ended: Vec<Rollout>,
    tokens: usize,
}

/// One pass: rows of the model, and which of them each running completion reads.
#[derive(Default)]
struct Pass {
    tokens: Vec<u32>,
    positions: Vec<u32>,
    append: Vec<u32>,
    segments: Vec<Segment>,
    read: Vec<u32>,
}

impl Pass {
    /// A segment of `len` keys from `start` on, whose last tokens are `queries`.
    fn segment(&mut self, start: usize, len: usize, parent: Option<usize>, position: usize, queries: &[u32]) {
        let first = len - queries.len();
        self.segments.push(Segment {
            start: start as u32,
            len: len as u32,
            parent: parent.map_or(NO_PARENT, |parent| parent as u32),
            position: position as u32,
            query_start: self.tokens.len() as u32,
            queries: queries.len() as u32,
        });
        self.tokens.extend(queries);
        self.positions.extend((position + first) as u32..(position + len) as u32);
        self.append.extend((start + first) as u32..(start + len) as u32);
    }
}

impl<'a, B: Backend> Run<'a, B> {
    pub fn new(engine: &'a Engine<'a, B>, model: &'a Model<B>, requests: &'a [Request<'a>]) -> Result<Self> {
        let (spec, rank, device) = (&model.spec, model.widest_rank(), engine.device);
        let size = Size::of(spec, requests, engine.max_running);
        let mut arena = Arena::new(device, &super::plan(device.storage(), spec, rank, requests, engine.max_running))?;
        let buffers = Buffers::new(&mut arena, spec, rank, &size);
        let samples = |(request, r): (usize, &Request)| (0..r.samples).map(move |sample| (request, sample));
        Ok(Self {
            engine,
            model,
            requests,
            slots: Slots::new(size.slot_rows),
            size,
            buffers,
            waiting: requests.iter().enumerate().flat_map(samples).collect(),
            prompts: Vec::new(),
            ended: Vec::new(),
            tokens: 0,
        })
    }

    pub fn finish(mut self, progress: &mut dyn FnMut(Done)) -> Result<Vec<Rollout>> {
        let _range = range(c"generate");
        loop {
            self.admit();
            if self.prompts.is_empty() {
                self.ended.sort_by_key(|rollout| (rollout.prompt, rollout.sample));
                return Ok(self.ended);
            }
            self.pass()?;
            self.choose()?;
            self.release()?;
            progress(Done { completions: self.ended.len(), tokens: self.tokens });
        }
    }

    /// Takes in those that wait, in their order, while there is room.
    fn admit(&mut self) {
        let running = |prompts: &[Prompt]| prompts.iter().map(|prompt| prompt.running.len()).sum::<usize>();
        let (mut places, mut rows) = (self.size.running - running(&self.prompts), self.size.prompt_rows);
        while places > 0
            && let Some((request, sample)) = self.waiting.front().copied()
            && self.admit_one(request, sample, &mut rows)
        {
            self.waiting.pop_front();
            places -= 1;
        }
        if running(&self.prompts) == 0 && !self.waiting.is_empty() {
            // A prompt stands where the next completion would: from an empty cache there is room for both.
            self.prompts.clear();
            self.slots = Slots::new(self.size.slot_rows);
            self.admit();
        }
    }

    /// Whether there was room; `rows` are those that prompts may still have in this pass.
    fn admit_one(&mut self, request: usize, sample: usize, rows: &mut usize) -> bool {
        let r = &self.requests[request];
        let known = self.prompts.last().is_some_and(|prompt| prompt.request == request);
        if !known && r.prompt.len() > *rows {
            return false;
        }
        let Some(slot) = self.slots.take(r.slot_rows()) else { return false };
        if !known {
            let Some(slot_of_prompt) = self.slots.take(r.prompt.len()) else {
                self.slots.free(slot);
                return false;
            };
            *rows -= r.prompt.len();
            self.prompts.push(Prompt { request, slot: slot_of_prompt, computed: false, running: Vec::new() });
        }
        let (ids, logps, sampled_logps) = (Vec::new(), Vec::new(), Vec::new());
        let rollout = Rollout { prompt: request, sample, ids, logps, sampled_logps, finish: Finish::Length };
        self.prompts.last_mut().expect("just seen or pushed").running.push(Running { slot, rollout });
        true
    }

    /// Runs prompts that are new and the newest token of every completion; `logits` becomes a row for each completion. One
    /// that begins after its prompt was computed runs the prompt's last token again.
    fn pass(&mut self) -> Result<()> {
        let mut pass = Pass::default();
        for Prompt { request, slot, computed, running } in &mut self.prompts {
            let (prompt, root) = (self.requests[*request].prompt, pass.segments.len());
            let begins = running.iter().any(|running| running.rollout.ids.is_empty());
            let known = if *computed { prompt.len() - usize::from(begins) } else { 0 };
            pass.segment(*slot, prompt.len(), None, 0, &prompt[known..]);
            *computed = true;
            let last_of_prompt = (pass.tokens.len() as u32).wrapping_sub(1);
            for Running { slot, rollout } in running {
                match rollout.ids.as_slice() {
                    [] => pass.read.push(last_of_prompt),
                    [.., newest] => {
                        pass.read.push(pass.tokens.len() as u32);
                        pass.segment(*slot, rollout.ids.len(), Some(root), prompt.len(), &[*newest]);
                    }
                }
            }
        }
        let (device, b) = (self.engine.device, &mut self.buffers);
        b.batch.load_decode(device, &pass.tokens, &pass.positions, &pass.segments, &pass.read)?;
        b.kv.set_append(device, &pass.append)?;
        self.model.decode(device, &b.batch, &mut b.acts, &mut b.kv, &mut b.logits)
    }

    /// Draws the next token of every completion from its row of logits.
    fn choose(&mut self) -> Result<()> {
        let (device, b) = (self.engine.device, &mut self.buffers);
        let (mut rows, mut all_edits): (Vec<Row>, _) = (Vec::new(), Vec::new());
        for rollout in self.prompts.iter().flat_map(|prompt| &prompt.running).map(|running| &running.rollout) {
            let (request, first) = (&self.requests[rollout.prompt], all_edits.len());
            edits::append(request, &rollout.ids, &mut all_edits);
            let stream = request.first_sample + rollout.sample as u64;
            let position = rollout.ids.len() as u32;
            rows.push(request.sampling.row(stream, position, first, all_edits.len() - first));
        }
        let (n, edits) = (rows.len(), all_edits.len());
        device.write_u32(bytemuck::cast_slice(&rows), b.rows.top_mut(n))?;
        device.write_u32(&all_edits, b.edits.top_mut(edits))?;
        device.sample(sample::Args {
            logits: b.logits.top_mut(n),
            rows: b.rows.top(n),
            edits: b.edits.top(edits),
            saved: b.saved.top_mut(edits),
            ids: b.ids.top_mut(n),
            odds: b.odds.top_mut(n),
        })?;
        let (mut ids, mut logps, mut odds) = (vec![0; n], vec![0.0; n], vec![[0; ODDS]; n]);
        device.read_u32(b.ids.top(n), &mut ids)?;
        device.read_u32(b.odds.top(n), odds.as_flattened_mut())?;
        sample::tokens(&ids)?;
        self.model.decoded_logps(device, b.ids.top(n), &mut b.acts, &b.logits)?;
        device.read_f32(b.acts.top.logp.top(n), &mut logps)?;
        let drawn = ids.into_iter().zip(logps).zip(odds).zip(&rows);
        let running = self.prompts.iter_mut().flat_map(|prompt| &mut prompt.running);
        for (running, (((id, logp), odds), row)) in running.zip(drawn) {
            running.rollout.ids.push(id);
            running.rollout.logps.push(logp);
            running.rollout.sampled_logps.push(if row.plain() { logp } else { sample::sampled_logp(odds) as f32 });
        }
        self.tokens += n;
        Ok(())
    }

    /// Lets go of what has ended.
    fn release(&mut self) -> Result<()> {
        for prompt in &mut self.prompts {
            for mut running in std::mem::take(&mut prompt.running) {
                match finish(self.engine, &self.requests[prompt.request], &running.rollout.ids)? {
                    None => prompt.running.push(running),
                    Some(finish) => {
                        self.slots.free(running.slot);
                        running.rollout.finish = finish;
                        self.ended.push(running.rollout);
                    }
                }
            }
        }
        let next = self.waiting.front().map(|(request, _)| *request);
        self.prompts.retain(|prompt| {
            let stays = !prompt.running.is_empty() || next == Some(prompt.request);
            if !stays {
                self.slots.free(prompt.slot);
            }
            stays
        });
        Ok(())
    }
}

/// Whether a completion ends with the last of these tokens, and why.
fn finish<B: Backend>(engine: &Engine<B>, request: &Request, ids: &[u32]) -> Result<Option<Finish>> {
    if ids.last().is_some_and(|last| request.eos.contains(last)) {
        return Ok(Some(Finish::Eos));
    }
    if let (Some(tokenizer), false) = (engine.tokenizer, request.stop.is_empty()) {
        let text = tokenizer.decode_all(ids)?;
        if request.stop.iter().any(|stop| !stop.is_empty() && text.contains(stop.as_str())) {
            return Ok(Some(Finish::Stop));
        }
    }
    Ok((ids.len() == request.max_new_tokens).then_some(Finish::Length))
}
