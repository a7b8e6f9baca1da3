//! References on completions that were just sampled, which no cache can know. They are asked one after the other: each is
//! loaded for its turn, or all stay in memory where there is room for them.
//!
//! A reference with a tokenizer of its own gets the texts as its tokens. What it says is then about whole completions: of
//! its numbers only the sums mean the same as the policy's.

use super::{Detail, Scored, score};
use crate::data::{Example, Extent, Packing};
use crate::device::{Ledger, Storage};
use crate::error::Result;
use crate::model::{Checkpoint, Init};
use crate::ops::Backend;

/// Whether references stay in memory between two turns.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Residency {
    #[default]
    Streamed,
    Resident,
}

/// One of the references that are asked.
#[derive(Clone, Copy)]
pub struct Asked<'a> {
    pub checkpoint: &'a Checkpoint,
    pub init: Init,
    /// The largest micro-batch that it will see. With a tokenizer of its own that is an estimate.
    pub largest: Extent,
    /// It gets texts as tokens of its own.
    pub own_tokens: bool,
}

impl Asked<'_> {
    /// Memory while it is asked, on a device with this storage.
    pub fn plan(&self, storage: Storage) -> Ledger {
        score::plan(storage, (self.checkpoint, self.init), &self.largest)
    }
}

pub struct Fresh<'a, B: Backend> {
    device: &'a B,
    asked: Vec<Asked<'a>>,
    packing: Packing,
    /// Of those that are resident.
    resident: Vec<Option<score::Scorer<'a, B>>>,
}

impl<'a, B: Backend> Fresh<'a, B> {
    pub fn new(device: &'a B, asked: Vec<Asked<'a>>, packing: Packing, residency: Residency) -> Result<Self> {
        // How many tokens another tokenizer makes of a text is known when there is a text.
        let stays = |asked: &Asked| residency == Residency::Resident && !asked.own_tokens;
        let resident = asked.iter().map(|a| stays(a).then(|| scorer(device, a, a.largest)).transpose());
        Ok(Self { device, resident: resident.collect::<Result<_>>()?, asked, packing })
    }

    /// `[examples]` what reference `k` says; `Detail::Tokens` is of use only if it has the policy's tokenizer.
    pub fn score(&mut self, k: usize, examples: &[&Example], detail: Detail) -> Result<Vec<Scored>> {
        let logps = match &mut self.resident[k] {
            Some(resident) => resident.score(examples, self.packing, &mut |_| {})?,
            None => {
                let largest = self.packing.largest(&self.packing.extents(examples.iter().copied()));
                scorer(self.device, &self.asked[k], largest)?.score(examples, self.packing, &mut |_| {})?
            }
        };
        let scored = |sequences: Vec<Vec<f32>>| {
            let sum = |tokens: &Vec<f32>| tokens.iter().map(|x| f64::from(*x)).sum();
            let sums = sequences.iter().map(sum).collect();
            Scored { sums, tokens: if detail == Detail::Tokens { sequences } else { Vec::new() } }
        };
        Ok(logps.into_iter().map(scored).collect())
    }
}

fn scorer<'a, B: Backend>(device: &'a B, asked: &Asked<'a>, largest: Extent) -> Result<score::Scorer<'a, B>> {
    score::Scorer::new(device, asked.checkpoint, asked.init, &largest)
}
