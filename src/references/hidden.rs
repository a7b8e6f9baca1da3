//! Final normed hidden rows of a frozen reference, for what needs its whole next-token distribution: `ops/token_kl` makes
//! it from a row and the reference's head. They are scored once into the cache, `2 hidden` bytes a completion token.

use std::ops::Range;
use std::path::Path;

use half::bf16;

use super::cache::{About, HiddenCache};
use super::{SCORER_VERSION, Scorer, Stop, keys};
use crate::data::{Example, Extent, Packing, Sequence};
use crate::error::{Error, Result};
use crate::model::{Checkpoint, Init};
use crate::ops::Backend;
use crate::progress::{Progress, say};

/// Rows scored and written as one: what an interruption costs at most, and the host memory that scoring takes.
const SHARD_BYTES: usize = 64 << 20;

/// The rows that predict completion tokens, on disk.
pub struct HiddenRows {
    cache: HiddenCache,
}

impl HiddenRows {
    /// Scores what the cache lacks of `sets`.
    pub fn score<B: Backend>(
        device: &B,
        (checkpoint, init): (&Checkpoint, Init),
        sets: &[&[&Example]],
        packing: Packing,
        cache_dir: &Path,
        stop: Stop,
    ) -> Result<Self> {
        let identity = blake3::Hash::from_bytes(init.identity(checkpoint)?).to_hex();
        let arithmetic = device.arithmetic();
        let key = blake3::hash(format!("{identity} {arithmetic} hidden bf16 {SCORER_VERSION}").as_bytes());
        let mut cache = HiddenCache::open(cache_dir, *key.as_bytes(), checkpoint.spec.hidden, stop)?;
        cache.describe(&About::of(checkpoint, arithmetic))?;
        if let Some(lost) = cache.recovered() {
            say(lost);
        }
        let new = |example: &&Example| keys(example).any(|key| !cache.contains(&key));
        let missing: Vec<&Example> = sets.iter().copied().flatten().copied().filter(new).collect();
        if !missing.is_empty() {
            fill(device, (checkpoint, init), &missing, packing, &mut cache, stop)?;
        }
        // A run reads from it until its end; another may want to add to it.
        Ok(Self { cache: cache.release()? })
    }

    /// A cache file that was made elsewhere.
    pub fn open_file(path: &Path) -> Result<Self> {
        Ok(Self { cache: HiddenCache::open_file(path)? })
    }

    /// The reference's hidden size.
    pub fn width(&self) -> usize {
        self.cache.width()
    }

    /// `[completion tokens, width]` of the sequences of several examples.
    pub fn read_all(&self, examples: &[&Example]) -> Result<Vec<bf16>> {
        let (mut all, mut rows) = (Vec::new(), Vec::new());
        for example in examples {
            self.read(example, &mut rows)?;
            all.extend(&rows);
        }
        Ok(all)
    }

    /// `[completion tokens, width]` of an example's sequences, one after the other, into `out`.
    pub fn read(&self, example: &Example, out: &mut Vec<bf16>) -> Result<()> {
        out.clear();
        let mut rows = Vec::new();
        for key in keys(example) {
            if !self.cache.get(&key, &mut rows)? {
                let detail = format!("has no hidden rows of data row {}; it was made for other data", example.row);
                return Err(Error::file(self.cache.path(), detail));
            }
            out.extend(&rows);
        }
        Ok(())
    }
}

fn fill<B: Backend>(
    device: &B,
    (checkpoint, init): (&Checkpoint, Init),
    missing: &[&Example],
    packing: Packing,
    cache: &mut HiddenCache,
    stop: Stop,
) -> Result<()> {
    let largest = largest_batch(checkpoint.spec.hidden, packing, missing);
    let mut scorer = Scorer::new(device, checkpoint, init, &largest)?;
    let mut progress = Progress::new("scoring hidden rows of the reference", missing.len() as u64, "rows");
    for shard in shards(checkpoint.spec.hidden, missing) {
        if stop() {
            let detail = format!("scored hidden rows are in {}", cache.path().display());
            return Err(Error::Interrupted { detail });
        }
        let (start, examples) = (shard.start, &missing[shard]);
        let rows = scorer.hidden(examples, packing, &mut |done| progress.at((start + done) as u64, ""))?;
        let sequences = examples.iter().copied().flat_map(keys).zip(rows.iter().flatten());
        let records: Vec<_> = sequences.map(|(key, rows)| (key, rows.as_slice())).collect();
        cache.append_shard(&records)?;
    }
    progress.finish();
    Ok(())
}

/// The largest batch of a scoring that starts with an empty cache.
pub fn largest_batch(hidden: usize, packing: Packing, examples: &[&Example]) -> Extent {
    let extents = packing.extents(examples.iter().copied());
    let shards = shards(hidden, examples).into_iter();
    shards.map(|shard| packing.largest(&extents[shard])).fold(Extent::default(), Extent::max)
}

/// As many examples as fit into [`SHARD_BYTES`], at least one.
fn shards(hidden: usize, examples: &[&Example]) -> Vec<Range<usize>> {
    let bytes = |example: &Example| {
        let tokens: usize = example.sequences.iter().map(Sequence::targets).sum();
        tokens * hidden * size_of::<bf16>()
    };
    let mut shards: Vec<Range<usize>> = Vec::new();
    let mut taken = 0;
    for (i, example) in examples.iter().enumerate() {
        taken += bytes(example);
        match shards.last_mut() {
            Some(shard) if taken <= SHARD_BYTES => shard.end = i + 1,
            _ => {
                taken = bytes(example);
                shards.push(i..i + 1);
            }
        }
    }
    shards
}
