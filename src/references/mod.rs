//! Where reference log-probabilities come from: each frozen reference is scored once into a cache on disk and is
//! not in memory while the policy trains.

mod about;
pub mod cache;
mod fresh;
pub mod hidden;
pub mod inventory;
mod score;

use std::path::{Path, PathBuf};

pub use fresh::{Asked, Fresh, Residency};
pub use hidden::HiddenRows;
pub use score::{Scorer, plan};

use crate::data::{Example, Extent, Packing, Sequence, Temperature};
use crate::device::{Ledger, Storage};
use crate::error::{Error, Result};
use crate::model::{Checkpoint, Init};
use crate::ops::Backend;
use crate::progress::{Progress, say};
use cache::{About, RefCache, sequence_key};

/// Part of every cache key: raise it when the same weights and tokens may give other bits. (A new field of
/// `model::Spec` changes every key too: what was cached is then scored again.)
const SCORER_VERSION: u32 = 1;

/// Examples scored and written as one: what an interruption costs at most.
const SHARD_EXAMPLES: usize = 256;

/// What a reference says about one example.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scored {
    /// `[sequences]` log-probabilities summed over completion tokens, nats.
    pub sums: Vec<f64>,
    /// `[sequences][completion tokens]` the same of each token; empty unless [`Detail::Tokens`] was asked for.
    pub tokens: Vec<Vec<f32>>,
}

/// How much of a reference is kept in memory: 8 bytes a sequence, or 4 bytes a completion token besides.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Detail {
    Sums,
    Tokens,
}

/// A frozen reference.
pub struct Reference {
    pub source: Source,
}

/// Where a reference's numbers come from.
pub enum Source {
    /// Weights on disk, scored once into the cache.
    Model { checkpoint: Box<Checkpoint>, init: Init },
    /// A cache file that was made elsewhere.
    File(PathBuf),
}

/// Asked between shards; true stops scoring with [`Error::Interrupted`].
pub type Stop<'a> = &'a dyn Fn() -> bool;

impl Reference {
    pub fn model(checkpoint: Checkpoint, init: Init) -> Self {
        Self { source: Source::Model { checkpoint: Box::new(checkpoint), init } }
    }

    /// A model's folder, or a cache file that holds a model's numbers.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_file() {
            return Ok(Self { source: Source::File(path.to_path_buf()) });
        }
        Ok(Self::model(Checkpoint::open(path)?, Init::Checkpoint))
    }

    /// The model, unless only its numbers are here.
    pub fn checkpoint(&self) -> Option<&Checkpoint> {
        match &self.source {
            Source::Model { checkpoint, .. } => Some(checkpoint),
            Source::File(_) => None,
        }
    }

    pub fn init(&self) -> Option<Init> {
        match &self.source {
            Source::Model { init, .. } => Some(*init),
            Source::File(_) => None,
        }
    }

    /// The folder or file, for messages.
    pub fn path(&self) -> &Path {
        match &self.source {
            Source::Model { checkpoint, .. } => &checkpoint.dir,
            Source::File(path) => path,
        }
    }

    /// What tells its numbers from another's, wherever it lies.
    pub fn identity(&self) -> Result<[u8; 32]> {
        match &self.source {
            Source::Model { checkpoint, init } => init.identity(checkpoint),
            Source::File(path) => Ok(RefCache::open_file(path)?.key()),
        }
    }

    /// Scores what the cache lacks, then reads what it says about each set of examples.
    pub fn logps<B: Backend>(
        &self,
        device: &B,
        sets: &[&[&Example]],
        detail: Detail,
        options: &Scoring,
    ) -> Result<Vec<Vec<Scored>>> {
        let cache = match &self.source {
            Source::Model { checkpoint, init } => self.filled(device, checkpoint, *init, sets, options)?,
            Source::File(path) => RefCache::open_file(path)?,
        };
        sets.iter().map(|examples| read(&cache, examples, detail)).collect()
    }

    /// Its cache, with all of `sets` in it.
    fn filled<B: Backend>(
        &self,
        device: &B,
        checkpoint: &Checkpoint,
        init: Init,
        sets: &[&[&Example]],
        options: &Scoring,
    ) -> Result<RefCache> {
        assert_eq!(options.packing.temperature, Temperature::ONE, "the cache's keys name no temperature");
        let mut cache = RefCache::open(options.cache_dir, key(device, checkpoint, init)?, options.stop)?;
        cache.describe(&About::of(checkpoint, device.arithmetic()))?;
        if let Some(lost) = cache.recovered() {
            say(lost);
        }
        let new = |example: &&Example| keys(example).any(|key| !cache.contains(&key));
        let missing: Vec<&Example> = sets.iter().copied().flatten().copied().filter(new).collect();
        if !missing.is_empty() {
            score(device, (checkpoint, init), &missing, &mut cache, options)?;
        }
        Ok(cache)
    }

    /// Elements of its largest weight.
    pub fn largest_tensor(&self) -> usize {
        let Some(checkpoint) = self.checkpoint() else { return 0 };
        checkpoint.dry().params_mut().iter().map(|param| param.value.len()).max().unwrap_or(0)
    }

    /// Memory while scoring, on a device with this storage; `None` where nothing is scored.
    pub fn plan(&self, storage: Storage, largest: &Extent) -> Option<Ledger> {
        self.checkpoint().zip(self.init()).map(|model| score::plan(storage, model, largest))
    }
}

/// How references are scored.
#[derive(Clone, Copy)]
pub struct Scoring<'a> {
    pub packing: Packing,
    pub cache_dir: &'a Path,
    pub stop: Stop<'a>,
    /// For the bar: `the reference`, or which of several.
    pub what: &'a str,
}

/// Identity of the numbers: weights, config, arithmetic.
fn key<B: Backend>(device: &B, checkpoint: &Checkpoint, init: Init) -> Result<[u8; 32]> {
    let identity = blake3::Hash::from_bytes(init.identity(checkpoint)?).to_hex();
    Ok(*blake3::hash(format!("{identity} {} f32 {SCORER_VERSION}", device.arithmetic()).as_bytes()).as_bytes())
}

fn score<B: Backend>(
    device: &B,
    (checkpoint, init): (&Checkpoint, Init),
    missing: &[&Example],
    cache: &mut RefCache,
    options: &Scoring,
) -> Result<()> {
    let largest = largest_shard(options.packing, &options.packing.extents(missing.iter().copied()));
    let mut scorer = Scorer::new(device, checkpoint, init, &largest)?;
    let mut progress = Progress::new(&format!("scoring {}", options.what), missing.len() as u64, "rows");
    for (shard, examples) in missing.chunks(SHARD_EXAMPLES).enumerate() {
        if (options.stop)() {
            let detail = format!("scored log-probabilities are in {}", cache.path().display());
            return Err(Error::Interrupted { detail });
        }
        let logps = scorer.score(examples, options.packing, &mut |done| {
            progress.at((shard * SHARD_EXAMPLES + done) as u64, "");
        })?;
        let sequences = examples.iter().copied().flat_map(keys).zip(logps.iter().flatten());
        let records: Vec<_> = sequences.map(|(key, logps)| (key, logps.as_slice())).collect();
        cache.append_shard(&records)?;
    }
    progress.finish();
    Ok(())
}

/// The largest batch of a scoring that starts with an empty cache, from the sizes of all examples in order.
pub fn largest_shard(packing: Packing, extents: &[Extent]) -> Extent {
    let shards = extents.chunks(SHARD_EXAMPLES);
    shards.map(|shard| packing.largest(shard)).fold(Extent::default(), Extent::max)
}

fn keys(example: &Example) -> impl Iterator<Item = [u8; 32]> {
    let key = |sequence: &Sequence| {
        let whole = sequence_key(&sequence.ids, sequence.first);
        // What is left out of it makes another sequence; a file made elsewhere knows none such.
        sequence.unscored.iter().fold(whole, |key, range| {
            let ends = [range.start as u64, range.end as u64];
            blake3::Hasher::new().update(&key).update(bytemuck::cast_slice(&ends)).finalize().into()
        })
    };
    example.sequences.iter().map(key)
}

fn read(cache: &RefCache, examples: &[&Example], detail: Detail) -> Result<Vec<Scored>> {
    let of = |example: &&Example| {
        let mut scored = Scored::default();
        for key in keys(example) {
            let mut tokens = Vec::new();
            if !cache.get(&key, &mut tokens)? {
                let detail = format!(
                    "says nothing about row {} as this model's tokens; it was made for other data or another tokenizer",
                    example.row
                );
                return Err(Error::file(cache.path(), detail));
            }
            scored.sums.push(tokens.iter().map(|x| f64::from(*x)).sum());
            scored.tokens.extend((detail == Detail::Tokens).then_some(tokens));
        }
        Ok(scored)
    };
    examples.iter().map(of).collect()
}
