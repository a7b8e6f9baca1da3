//! The passes of a session: who is in each, where keys and values go, what is drawn.

use std::collections::{HashMap, VecDeque};

use super::size::{Buffers, Size};
use super::slots::Slots;
use super::{Ask, Finish, Request, Rollout, Scores, edits, plan_size};
use crate::data::{Temperature, Tokenizer};
use crate::device::{Arena, View};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::ops::Backend;
use crate::ops::attention::{NO_PARENT, Segment};
use crate::ops::sample::{self, ODDS, Row};

/// What became of a request, by the number that [`Session::push`] gave it.
pub enum Event<'e> {
    /// Its prompt was run and scored, before its first token.
    Prompt(usize, Scores),
    /// A completion has one more token, and goes on.
    Token(&'e Rollout),
    /// A completion has its last token.
    Ended(Rollout),
    /// The model gives it no number to draw from; none of its completions goes on.
    Failed(usize, Error),
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

struct Asked<A> {
    ask: A,
    /// Completions that have not ended.
    left: usize,
}

/// Completions of requests that come and go. Who waits is taken in in the order of asking, so nobody waits for ever.
pub struct Session<'a, B: Backend, A: Ask> {
    device: &'a B,
    tokenizer: Option<&'a Tokenizer>,
    temperature: Temperature,
    model: &'a Model<B>,
    size: Size,
    buffers: Buffers<B>,
    slots: Slots,
    requests: HashMap<usize, Asked<A>>,
    /// The number of the next request.
    next: usize,
    /// By request and sample.
    waiting: VecDeque<(usize, usize)>,
    prompts: Vec<Prompt>,
}

/// One pass: rows of the model, and which of them each running completion reads.
#[derive(Default)]
struct Pass {
    tokens: Vec<u32>,
    positions: Vec<u32>,
    append: Vec<u32>,
    segments: Vec<Segment>,
    read: Vec<u32>,
    /// How much of each adapter each row takes.
    blend: Vec<f32>,
    /// Prompts that are scored, and the row of the first token of each.
    scored: Vec<(usize, usize)>,
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

impl<'a, B: Backend, A: Ask> Session<'a, B, A> {
    pub(super) fn new(
        device: &'a B,
        (tokenizer, temperature): (Option<&'a Tokenizer>, Temperature),
        model: &'a Model<B>,
        size: Size,
    ) -> Result<Self> {
        let (spec, rank) = (&model.spec, model.widest_rank());
        let mut arena = Arena::new(device, &plan_size(device.storage(), spec, rank, &size))?;
        let buffers = Buffers::new(&mut arena, spec, rank, &size);
        let slots = Slots::new(size.slot_rows);
        let (requests, waiting, prompts) = (HashMap::new(), VecDeque::new(), Vec::new());
        Ok(Self { device, tokenizer, temperature, model, size, buffers, slots, requests, next: 0, waiting, prompts })
    }

    /// Takes a request and gives it a number; numbers count from 0.
    ///
    /// # Errors
    /// What [`Request::check`] refuses, what does not fit into the session's size, stop strings without a tokenizer, weights
    /// for other adapters than the model has.
    pub fn push(&mut self, ask: A) -> Result<usize> {
        let request = ask.request();
        request.check(&self.model.spec)?;
        self.size.admits(&request, self.model.spec.vocab)?;
        if self.tokenizer.is_none() && !request.stop.is_empty() {
            return Err(Error::option("--stop", "stop strings are found in text: the engine needs the tokenizer"));
        }
        let (weights, adapters) = (request.blend.len(), self.model.adapters);
        if weights > 0 && (weights != adapters || weights != self.size.adapters) {
            let detail = format!("{weights} weights for the {adapters} adapters of the model; give one for each");
            return Err(Error::option("--adapter", detail));
        }
        let (key, left) = (self.next, request.samples);
        self.next += 1;
        if left > 0 {
            self.waiting.extend((0..left).map(|sample| (key, sample)));
            self.requests.insert(key, Asked { ask, left });
        }
        Ok(key)
    }

    /// Forgets a request, running or not; its room is free in the next step. One that has ended is no longer there.
    pub fn cancel(&mut self, key: usize) {
        if self.requests.remove(&key).is_none() {
            return;
        }
        self.waiting.retain(|(request, _)| *request != key);
        let prompts = std::mem::take(&mut self.prompts);
        let (gone, stays): (Vec<_>, _) = prompts.into_iter().partition(|prompt| prompt.request == key);
        self.prompts = stays;
        for prompt in gone {
            prompt.running.iter().for_each(|running| self.slots.free(running.slot));
            self.slots.free(prompt.slot);
        }
    }

    /// Completions that run, those that wait for room, and cache rows in use.
    pub fn load(&self) -> [usize; 3] {
        [self.running(), self.waiting.len(), self.slots.in_use()]
    }

    fn running(&self) -> usize {
        self.prompts.iter().map(|prompt| prompt.running.len()).sum()
    }

    /// Runs one pass: prompts of those that begin, and one more token of each that runs. False where nobody asks for
    /// anything.
    pub fn step(&mut self, on: &mut dyn FnMut(Event)) -> Result<bool> {
        self.admit();
        if self.prompts.is_empty() {
            return Ok(false);
        }
        let scored = self.pass()?;
        for (key, error) in self.choose()? {
            self.cancel(key);
            on(Event::Failed(key, error));
        }
        for (key, first) in scored {
            if let Some(asked) = self.requests.get(&key) {
                let model = (self.model, self.temperature);
                let scores = score(self.device, model, &mut self.buffers, &asked.ask.request(), first)?;
                on(Event::Prompt(key, scores));
            }
        }
        self.release(on)?;
        Ok(true)
    }

    /// Takes in those that wait, in their order, while there is room.
    fn admit(&mut self) {
        let (mut places, mut rows) = (self.size.running - self.running(), self.size.prompt_rows);
        while places > 0
            && let Some((request, sample)) = self.waiting.front().copied()
            && self.admit_one(request, sample, &mut rows)
        {
            self.waiting.pop_front();
            places -= 1;
        }
        if self.running() == 0 && !self.waiting.is_empty() {
            // A prompt stands where the next completion would: from an empty cache there is room for both.
            self.prompts.clear();
            self.slots = Slots::new(self.size.slot_rows);
            self.admit();
        }
    }

    /// Whether there was room; `rows` are those that prompts may still have in this pass.
    fn admit_one(&mut self, request: usize, sample: usize, rows: &mut usize) -> bool {
        let r = self.requests[&request].ask.request();
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
        let (ids, [logps, sampled_logps], alternatives) = (Vec::new(), [(); 2].map(|()| Vec::new()), Vec::new());
        let finish = Finish::Length;
        let rollout = Rollout { prompt: request, sample, ids, logps, sampled_logps, alternatives, finish };
        self.prompts.last_mut().expect("just seen or pushed").running.push(Running { slot, rollout });
        true
    }

    /// Runs prompts that are new and the newest token of every completion; `logits` becomes a row for each completion. One
    /// that begins after its prompt was computed runs the prompt's last token again. Returns the prompts to score, each with
    /// the row of its first token.
    fn pass(&mut self) -> Result<Vec<(usize, usize)>> {
        let mut pass = Pass::default();
        for Prompt { request, slot, computed, running } in &mut self.prompts {
            let asked = self.requests[request].ask.request();
            let (prompt, root, first) = (asked.prompt, pass.segments.len(), pass.tokens.len());
            let begins = running.iter().any(|running| running.rollout.ids.is_empty());
            let known = if *computed { prompt.len() - usize::from(begins) } else { 0 };
            if asked.score_prompt && !*computed {
                pass.scored.push((*request, first));
            }
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
            for _ in first..pass.tokens.len() {
                match asked.blend {
                    [] => pass.blend.extend((0..self.size.adapters).map(|_| 1.0)),
                    weights => pass.blend.extend(weights),
                }
            }
        }
        let (device, b) = (self.device, &mut self.buffers);
        b.batch.load_decode(device, &pass.tokens, &pass.positions, &pass.segments, &pass.read)?;
        b.kv.set_append(device, &pass.append)?;
        b.acts.set_blend(device, &pass.blend)?;
        self.model.decode(device, &b.batch, &mut b.acts, &mut b.kv, &mut b.logits)?;
        Ok(pass.scored)
    }

    /// Draws the next token of every completion from its row of logits. Returns the requests for which there was none.
    fn choose(&mut self) -> Result<Vec<(usize, Error)>> {
        let (device, b) = (self.device, &mut self.buffers);
        let (mut rows, mut all_edits): (Vec<Row>, _) = (Vec::new(), Vec::new());
        for rollout in self.prompts.iter().flat_map(|prompt| &prompt.running).map(|running| &running.rollout) {
            let (request, first) = (self.requests[&rollout.prompt].ask.request(), all_edits.len());
            edits::append(&request, &rollout.ids, &mut all_edits);
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
        let (mut ids, mut odds) = (vec![0; n], vec![[0; ODDS]; n]);
        device.read_u32(b.ids.top(n), &mut ids)?;
        device.read_u32(b.odds.top(n), odds.as_flattened_mut())?;
        let requests = self.prompts.iter().flat_map(|p| p.running.iter().map(|_| p.request));
        let failed = requests.zip(1..).filter_map(|(key, end)| {
            // Tokens that are none say so, whatever comes before them.
            sample::tokens(&ids[end - 1..end]).is_err().then(|| Some((key, sample::tokens(&ids[..end]).err()?)))?
        });
        let mut failed: Vec<(usize, Error)> = failed.collect();
        failed.dedup_by_key(|(key, _)| *key);
        if !failed.is_empty() {
            let sound: Vec<u32> = ids.iter().map(|id| if sample::tokens(&[*id]).is_ok() { *id } else { 0 }).collect();
            device.write_u32(&sound, b.ids.top_mut(n))?;
        }
        let mut logps = vec![0.0; n];
        let asked = (b.ids.top(n), self.temperature);
        self.model.decoded_logps(device, asked, &mut b.acts, &b.logits)?;
        device.read_f32(b.acts.top.logp.top(n), &mut logps)?;
        let drawn = ids.into_iter().zip(logps).zip(odds).zip(&rows).enumerate();
        let running = self.prompts.iter_mut().flat_map(|prompt| &mut prompt.running);
        for (running, (at, (((id, logp), odds), row))) in running.zip(drawn) {
            let rollout = &mut running.rollout;
            rollout.ids.push(id);
            rollout.logps.push(logp);
            rollout.sampled_logps.push(if row.plain(self.temperature.get()) {
                logp
            } else {
                sample::sampled_logp(odds) as f32
            });
            let count = self.requests[&rollout.prompt].ask.request().alternatives;
            if count > 0 {
                let [logits, lse] = [b.logits.view(), b.acts.top.lse.view()].map(|of| of.slice(at, 1));
                rollout.alternatives.push(likeliest(device, (logits, self.temperature.scale()), lse, count)?);
            }
        }
        Ok(failed)
    }

    /// Lets go of what has ended.
    fn release(&mut self, on: &mut dyn FnMut(Event)) -> Result<()> {
        for prompt in &mut self.prompts {
            for mut running in std::mem::take(&mut prompt.running) {
                let asked = self.requests.get_mut(&prompt.request).expect("it is there while it runs");
                match finish(self.tokenizer, &asked.ask.request(), &running.rollout.ids)? {
                    None => {
                        on(Event::Token(&running.rollout));
                        prompt.running.push(running);
                    }
                    Some(finish) => {
                        self.slots.free(running.slot);
                        running.rollout.finish = finish;
                        asked.left -= 1;
                        if asked.left == 0 {
                            self.requests.remove(&prompt.request);
                        }
                        on(Event::Ended(running.rollout));
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

/// Scores a prompt whose first token was row `first` of the pass that ran. Its rows are read a few at a time: as many as
/// there is room for logits.
fn score<B: Backend>(
    device: &B,
    (model, temperature): (&Model<B>, Temperature),
    b: &mut Buffers<B>,
    request: &Request,
    first: usize,
) -> Result<Scores> {
    let mut scores = Scores::default();
    let rows: Vec<u32> = (first as u32..).take(request.prompt.len() - 1).collect();
    for (rows, targets) in rows.chunks(b.ids.rows()).zip(request.prompt[1..].chunks(b.ids.rows())) {
        let n = rows.len();
        b.batch.read(device, rows)?;
        model.decode_more(device, &b.batch, &mut b.acts, &mut b.logits)?;
        device.write_u32(targets, b.ids.top_mut(n))?;
        model.decoded_logps(device, (b.ids.top(n), temperature), &mut b.acts, &b.logits)?;
        let mut logps = vec![0.0; n];
        device.read_f32(b.acts.top.logp.top(n), &mut logps)?;
        scores.logps.extend(logps);
        for at in (0..n).filter(|_| request.alternatives > 0) {
            let [logits, lse] = [b.logits.view(), b.acts.top.lse.view()].map(|of| of.slice(at, 1));
            scores.alternatives.push(likeliest(device, (logits, temperature.scale()), lse, request.alternatives)?);
        }
    }
    Ok(scores)
}

/// The `count` tokens with the largest of a row of logits, the smaller id first among equal ones, and their
/// log-probabilities: to the last bit what a token that is drawn has.
fn likeliest<B: Backend>(
    device: &B,
    (logits, scale): (View<B>, f32),
    lse: View<B>,
    count: usize,
) -> Result<Vec<(u32, f32)>> {
    let (mut row, mut sum) = (vec![0.0; logits.cols()], [0.0]);
    device.read_f32(logits, &mut row)?;
    device.read_f32(lse, &mut sum)?;
    let mut best: Vec<(u32, f32)> = Vec::with_capacity(count + 1);
    for (id, logit) in (0..).zip(row) {
        if best.len() < count || best.last().is_some_and(|(_, least)| logit > *least) {
            let at = best.partition_point(|(_, other)| *other >= logit);
            best.insert(at, (id, logit));
            best.truncate(count);
        }
    }
    Ok(best.into_iter().map(|(id, logit)| (id, logit * scale - sum[0])).collect())
}

/// Tokens that are decoded again beside as many as a stop string has bytes.
const WITHIN: usize = 16;

/// Whether a completion ends with the last of these tokens, and why.
fn finish(tokenizer: Option<&Tokenizer>, request: &Request, ids: &[u32]) -> Result<Option<Finish>> {
    if ids.last().is_some_and(|last| request.eos.contains(last)) {
        return Ok(Some(Finish::Eos));
    }
    if let (Some(tokenizer), false) = (tokenizer, request.stop.is_empty()) {
        // What came before has none. A token is a byte at least, but for those within a character.
        let longest = request.stop.iter().map(String::len).max().unwrap_or(0);
        let text = tokenizer.decode_all(&ids[ids.len().saturating_sub(longest + WITHIN)..])?;
        if request.stop.iter().any(|stop| !stop.is_empty() && text.contains(stop.as_str())) {
            return Ok(Some(Finish::Stop));
        }
    }
    Ok((ids.len() == request.max_new_tokens).then_some(Finish::Length))
}
