//! Where reference log-probabilities come from: each frozen reference is scored once into a cache on disk and is
//! not in memory while the policy trains.

mod about;
pub mod cache;
pub mod hidden;
pub mod inventory;
mod score;

use std::path::Path;

pub use score::Scorer;

use crate::data::{Example, Extent, Packing};
use crate::device::{DType, Dry, Ledger};
use crate::error::{Error, Result};
use crate::model::{Checkpoint, Init, Model, Options};
use crate::ops::Backend;
use crate::progress::{Progress, say};
use cache::{About, RefCache, sequence_key};

/// Part of every cache key: raise it when the same weights and tokens may give other bits. (A new field of
/// `model::Spec` changes every key too: what was cached is then scored again.)
const SCORER_VERSION: u32 = 1;

/// Examples scored and written as one: what an interruption costs at most.
const SHARD_EXAMPLES: usize = 256;

/// Log-probabilities of the examples of one data set by one reference, summed over completion tokens, in nats.
#[derive(Clone, Debug, Default)]
pub struct RefLogps {
    /// `[examples][sequences]`
    pub sums: Vec<Vec<f64>>,
}

/// A frozen reference on disk.
pub struct Reference {
    pub checkpoint: Checkpoint,
    pub init: Init,
}

/// Asked between shards; true stops scoring with [`Error::Interrupted`].
pub type Stop<'a> = &'a dyn Fn() -> bool;

impl Reference {
    /// Scores what the cache lacks, then reads the log-probabilities of each set of examples.
    pub fn logps<B: Backend>(
        &self,
        device: &B,
        sets: &[&[&Example]],
        packing: Packing,
        cache_dir: &Path,
        stop: Stop,
    ) -> Result<Vec<RefLogps>> {
        let mut cache = RefCache::open(cache_dir, self.key(device)?, stop)?;
        cache.describe(&About::of(&self.checkpoint, device.arithmetic()))?;
        if let Some(lost) = cache.recovered() {
            say(lost);
        }
        let new = |example: &&Example| keys(example).any(|key| !cache.contains(&key));
        let missing: Vec<&Example> = sets.iter().copied().flatten().copied().filter(new).collect();
        if !missing.is_empty() {
            self.score(device, &missing, packing, &mut cache, stop)?;
        }
        sets.iter().map(|examples| read(&cache, examples)).collect()
    }

    /// Identity of the numbers: weights, config, arithmetic.
    fn key<B: Backend>(&self, device: &B) -> Result<[u8; 32]> {
        let identity = blake3::Hash::from_bytes(self.init.identity(&self.checkpoint)?).to_hex();
        Ok(*blake3::hash(format!("{identity} {} f32 {SCORER_VERSION}", device.arithmetic()).as_bytes()).as_bytes())
    }

    fn score<B: Backend>(
        &self,
        device: &B,
        missing: &[&Example],
        packing: Packing,
        cache: &mut RefCache,
        stop: Stop,
    ) -> Result<()> {
        let largest = largest_shard(packing, &packing.extents(missing.iter().copied()));
        let mut scorer = Scorer::new(device, &self.checkpoint, self.init, &largest)?;
        let mut progress = Progress::new("scoring the reference", missing.len() as u64, "rows");
        for (shard, examples) in missing.chunks(SHARD_EXAMPLES).enumerate() {
            if stop() {
                let detail = format!("scored log-probabilities are in {}", cache.path().display());
                return Err(Error::Interrupted { detail });
            }
            let logps = scorer.score(examples, packing, &mut |done| {
                progress.at((shard * SHARD_EXAMPLES + done) as u64, "");
            })?;
            let sequences = examples.iter().copied().flat_map(keys).zip(logps.iter().flatten());
            let records: Vec<_> = sequences.map(|(key, logps)| (key, logps.as_slice())).collect();
            cache.append_shard(&records)?;
        }
        progress.finish();
        Ok(())
    }

    /// Elements of its largest weight.
    pub fn largest_tensor(&self) -> usize {
        let (spec, naming) = (&self.checkpoint.spec, self.checkpoint.architecture.naming);
        let mut names = Model::new(&mut Dry::arena(DType::F32), spec, naming, Options::frozen(0));
        names.params_mut().iter().map(|param| param.value.len()).max().unwrap_or(0)
    }

    /// Memory while scoring, on a device that stores `storage`.
    pub fn plan(&self, storage: DType, largest: &Extent) -> Ledger {
        score::plan(storage, &self.checkpoint, largest)
    }
}

/// The largest batch of a scoring that starts with an empty cache, from the sizes of all examples in order.
pub fn largest_shard(packing: Packing, extents: &[Extent]) -> Extent {
    let shards = extents.chunks(SHARD_EXAMPLES);
    shards.map(|shard| packing.largest(shard)).fold(Extent::default(), Extent::max)
}

fn keys(example: &Example) -> impl Iterator<Item = [u8; 32]> {
    example.sequences.iter().map(|s| sequence_key(&s.ids, s.first))
}

fn read(cache: &RefCache, examples: &[&Example]) -> Result<RefLogps> {
    let mut tokens = Vec::new();
    let mut sum = |key: [u8; 32]| {
        assert!(cache.get(&key, &mut tokens)?, "scored above");
        Ok(tokens.iter().map(|x| f64::from(*x)).sum())
    };
    let sums = examples.iter().map(|example| keys(example).map(&mut sum).collect());
    Ok(RefLogps { sums: sums.collect::<Result<_>>()? })
}
