//! Per-token log-probabilities of one frozen reference, kept on disk so that it is evaluated once per sequence.
//!
//! One append-only file per key, `<cache_dir>/refs/<hex of key>.logps`, little endian:
//!
//! ```text
//! magic and version   16 bytes
//! key                 32 bytes
//! shards, each        u32 records, u64 payload length, first 16 bytes of the payload's blake3, payload
//!   a payload's       32 bytes sequence key, u32 token count, that many f32 log-probs (nats)
//!   records, each
//! ```
//!
//! A shard is written with one write and synced, so a crash can only tear the last one; opening cuts it off.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use crate::checkpoint::atomic::{sync_parent, write_error};
use crate::error::{At, Error, Result};
use crate::progress::say;

const MAGIC: [u8; 16] = *b"cuvee logps v1\r\n";
const FILE_HEADER: usize = 16 + 32;
const SHARD_HEADER: usize = 4 + 8 + 16;
const RECORD_HEADER: usize = 32 + 4;

/// Names a scored sequence: its token ids and the index of the first scored one.
pub fn sequence_key(ids: &[u32], first: usize) -> [u8; 32] {
    let first = u32::try_from(first).expect("a sequence has fewer than 2^32 tokens");
    let mut hasher = blake3::Hasher::new();
    hasher.update(&first.to_le_bytes());
    for id in ids {
        hasher.update(&id.to_le_bytes());
    }
    hasher.finalize().into()
}

/// The open cache of one reference. It holds an exclusive lock on its file and an index in memory, 48 bytes a
/// sequence; the log-probs stay on disk.
pub struct RefCache {
    path: PathBuf,
    file: File,
    index: HashMap<[u8; 32], Span>,
    /// Where the next shard goes: the end of the last complete one.
    end: u64,
    recovered: Option<String>,
}

/// Where the log-probs of one sequence are.
#[derive(Clone, Copy)]
struct Span {
    offset: u64,
    tokens: u32,
}

impl RefCache {
    /// Opens or creates the cache of the reference called `key`, which must cover everything that its log-probs
    /// depend on: weights, config, dtype, device kind, version of the scorer.
    ///
    /// A torn or damaged tail is cut off, see [`RefCache::recovered`]. Waits while another run scores the same reference,
    /// until `stop` says true. Fails if the file is not a cache of this version and key.
    pub fn open(cache_dir: &Path, key: [u8; 32], stop: &dyn Fn() -> bool) -> Result<Self> {
        let folder = cache_dir.join("refs");
        fs::create_dir_all(&folder).at(&folder)?;
        let path = folder.join(format!("{}.logps", blake3::Hash::from_bytes(key).to_hex()));
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).at(&path)?;
        lock(&file, &path, stop)?;
        let mut cache = Self { path, file, index: HashMap::new(), end: 0, recovered: None };
        cache.read_file_header(&key)?;
        cache.read_shards()?;
        Ok(cache)
    }

    /// Checks the file's header, or writes it where it is not there or torn.
    fn read_file_header(&mut self, key: &[u8; 32]) -> Result<()> {
        let mut expected = MAGIC.to_vec();
        expected.extend(key);
        let file_len = self.file_len()?;
        let mut found = vec![0; expected.len().min(file_len as usize)];
        self.file.read_exact_at(&mut found, 0).at(&self.path)?;
        if !expected.starts_with(&found) {
            let detail = "is not a log-prob cache of this reference and version; delete it, it will be computed again";
            return Err(Error::file(&self.path, detail));
        }
        if found.len() < expected.len() {
            self.file.write_all_at(&expected, 0).map_err(|e| write_error(&self.path, e))?;
            self.file.sync_all().map_err(|e| write_error(&self.path, e))?;
            sync_parent(&self.path)?;
        }
        self.end = FILE_HEADER as u64;
        Ok(())
    }

    /// Indexes every complete shard and cuts off what follows the last of them.
    fn read_shards(&mut self) -> Result<()> {
        let file_len = self.file_len()?;
        while let Some(shard_end) = self.read_shard(file_len).at(&self.path)? {
            self.end = shard_end;
        }
        let damaged = file_len - self.end;
        if damaged > 0 {
            self.file.set_len(self.end).at(&self.path)?;
            self.recovered = Some(format!(
                "{}: the last {damaged} bytes were damaged, perhaps by a run that was killed, and are cut off; \
                 {} sequences are left, the others are scored again",
                self.path.display(),
                self.index.len()
            ));
        }
        Ok(())
    }

    /// Indexes the shard at `self.end` and returns where it ends; `None` if it is incomplete, damaged or absent.
    fn read_shard(&mut self, file_len: u64) -> io::Result<Option<u64>> {
        // Lengths are compared before anything is allocated: damaged ones can be huge.
        let Some(left) = (file_len - self.end).checked_sub(SHARD_HEADER as u64) else { return Ok(None) };
        let mut header = [0; SHARD_HEADER];
        self.file.read_exact_at(&mut header, self.end)?;
        let (records, rest) = header.split_first_chunk().expect("a shard header starts with u32");
        let (payload_len, checksum) = rest.split_first_chunk().expect("a shard header goes on with u64");
        let payload_len = u64::from_le_bytes(*payload_len);
        if payload_len > left {
            return Ok(None);
        }
        let start = self.end + SHARD_HEADER as u64;
        let mut payload = vec![0; payload_len as usize];
        self.file.read_exact_at(&mut payload, start)?;
        if blake3::hash(&payload).as_bytes()[..16] != *checksum {
            return Ok(None);
        }
        match parse_records(&payload, start) {
            Some(found) if found.len() == u32::from_le_bytes(*records) as usize => self.index.extend(found),
            _ => return Ok(None),
        }
        Ok(Some(start + payload_len))
    }

    fn file_len(&self) -> Result<u64> {
        Ok(self.file.metadata().at(&self.path)?.len())
    }

    /// What opening had to cut off, as a sentence for the user.
    pub fn recovered(&self) -> Option<&str> {
        self.recovered.as_deref()
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The number of cached sequences.
    pub fn len(&self) -> usize {
        self.index.len()
    }

    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    pub fn contains(&self, key: &[u8; 32]) -> bool {
        self.index.contains_key(key)
    }

    /// Reads the log-probs of one sequence from disk: `out` then holds one value per scored token, or, when false is
    /// returned, nothing.
    pub fn get(&self, key: &[u8; 32], out: &mut Vec<f32>) -> Result<bool> {
        out.clear();
        let Some(span) = self.index.get(key) else { return Ok(false) };
        out.resize(span.tokens as usize, 0.0);
        self.file.read_exact_at(bytemuck::cast_slice_mut(out), span.offset).at(&self.path)?;
        for value in out {
            // The file is little endian, which nearly every host is: then this is no work.
            *value = f32::from_bits(u32::from_le(value.to_bits()));
        }
        Ok(true)
    }

    /// Appends sequences, (key, log-probs of its scored tokens), with one write, and syncs. Sequences that are cached
    /// already are skipped.
    ///
    /// Fails on a log-prob that is not finite, before anything is written, and when the disk does; the cache is then
    /// as it was.
    pub fn append_shard(&mut self, records: &[([u8; 32], &[f32])]) -> Result<()> {
        let mut seen = HashSet::new();
        let mut shard = vec![0; SHARD_HEADER];
        for (key, values) in records {
            if let Some(i) = values.iter().position(|v| !v.is_finite()) {
                let detail = format!("refused log-prob {} of token {i}; is the reference model sound?", values[i]);
                return Err(Error::file(&self.path, detail));
            }
            if self.contains(key) || !seen.insert(key) {
                continue;
            }
            let tokens = u32::try_from(values.len()).expect("a sequence has fewer than 2^32 tokens");
            shard.extend(key);
            shard.extend(tokens.to_le_bytes());
            shard.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        }
        if seen.is_empty() {
            return Ok(());
        }
        let count = u32::try_from(seen.len()).expect("a shard has fewer than 2^32 records");
        let payload = &shard[SHARD_HEADER..];
        let spans = parse_records(payload, self.end + SHARD_HEADER as u64).expect("just written");
        let mut header = count.to_le_bytes().to_vec();
        header.extend((payload.len() as u64).to_le_bytes());
        header.extend(&blake3::hash(payload).as_bytes()[..16]);
        shard[..SHARD_HEADER].copy_from_slice(&header);

        let written = self.file.write_all_at(&shard, self.end).and_then(|()| self.file.sync_data());
        if let Err(e) = written {
            // If this fails too, the torn shard is overwritten by the next one or cut off by the next `open`.
            let _ = self.file.set_len(self.end);
            return Err(write_error(&self.path, e));
        }
        self.end += shard.len() as u64;
        self.index.extend(spans);
        Ok(())
    }
}

/// The records of a payload that starts at byte `start` of the file; `None` if they do not fill it exactly.
fn parse_records(mut payload: &[u8], start: u64) -> Option<Vec<([u8; 32], Span)>> {
    let mut records = Vec::new();
    let mut offset = start;
    while !payload.is_empty() {
        let (key, rest) = payload.split_first_chunk()?;
        let (tokens, rest) = rest.split_first_chunk()?;
        let tokens = u32::from_le_bytes(*tokens);
        let (values, rest) = rest.split_at_checked(tokens as usize * 4)?;
        offset += RECORD_HEADER as u64;
        records.push((*key, Span { offset, tokens }));
        offset += values.len() as u64;
        payload = rest;
    }
    Some(records)
}

/// Takes the exclusive lock, which ends with `file`, even when the process is killed.
fn lock(file: &File, path: &Path, stop: &dyn Fn() -> bool) -> Result<()> {
    let mut told = false;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) if stop() => {
                let detail = format!("another cuvee run was still using {}", path.display());
                return Err(Error::Interrupted { detail });
            }
            Err(TryLockError::WouldBlock) => {
                if !told {
                    say("another cuvee run is scoring the same reference; waiting for it");
                    told = true;
                }
                sleep(Duration::from_millis(20));
            }
            Err(TryLockError::Error(e)) => {
                let detail = format!("cannot be locked: {e}; choose a cache folder on a local disk");
                return Err(Error::file(path, detail));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: [u8; 32] = [7; 32];

    fn key(n: u32) -> [u8; 32] {
        sequence_key(&[n, n + 1], 1)
    }

    /// The cached log-probs of sequence `n`, `None` if there are none.
    fn values(cache: &RefCache, n: u32) -> Option<Vec<f32>> {
        let mut out = vec![9.0; 5];
        let found = cache.get(&key(n), &mut out).unwrap();
        assert_eq!(found, cache.contains(&key(n)));
        if !found {
            assert!(out.is_empty());
        }
        found.then_some(out)
    }

    /// What the tests store for sequence `n`: also sequences without a scored token.
    fn given(n: u32) -> Vec<f32> {
        (0..n).map(|i| -0.1 * (n * 10 + i) as f32).collect()
    }

    fn append(cache: &mut RefCache, sequences: &[u32]) {
        let owned: Vec<_> = sequences.iter().map(|&n| (key(n), given(n))).collect();
        let records: Vec<_> = owned.iter().map(|(key, values)| (*key, values.as_slice())).collect();
        cache.append_shard(&records).unwrap();
    }

    #[test]
    fn keys_tell_sequences_and_first_tokens_apart() {
        let keys =
            [sequence_key(&[1, 2], 0), sequence_key(&[1, 2], 1), sequence_key(&[0, 1, 2], 0), sequence_key(&[], 0)];
        assert_eq!(HashSet::from(keys).len(), keys.len());
        let bytes = [3_u32, 1, 2].map(u32::to_le_bytes).concat();
        assert_eq!(sequence_key(&[1, 2], 3), *blake3::hash(&bytes).as_bytes());
    }

    #[test]
    fn values_outlive_the_run() {
        let dir = tempfile::tempdir().unwrap();
        let mut cache = RefCache::open(&dir.path().join("deep/er"), KEY, &|| true).unwrap();
        assert!(cache.is_empty() && cache.recovered().is_none());
        append(&mut cache, &[3, 0]);
        append(&mut cache, &[1]);
        assert_eq!(values(&cache, 3), Some(given(3)));
        let path = cache.path().to_path_buf();
        drop(cache);
        assert!(path.ends_with(format!("refs/{}.logps", "07".repeat(32))));

        let cache = RefCache::open(&dir.path().join("deep/er"), KEY, &|| true).unwrap();
        assert_eq!((cache.len(), cache.recovered()), (3, None));
        for n in [0, 1, 3] {
            assert_eq!(values(&cache, n), Some(given(n)));
        }
        assert_eq!(values(&cache, 2), None);
        assert!(RefCache::open(&dir.path().join("deep/er"), [8; 32], &|| true).unwrap().is_empty());
    }

    #[test]
    fn sequences_are_stored_once() {
        let dir = tempfile::tempdir().unwrap();
        let mut cache = RefCache::open(dir.path(), KEY, &|| true).unwrap();
        cache.append_shard(&[(key(1), &[-1.0]), (key(1), &[-2.0]), (key(2), &[-3.0])]).unwrap();
        let len = cache.file_len().unwrap();
        cache.append_shard(&[(key(2), &[-4.0])]).unwrap();
        cache.append_shard(&[]).unwrap();
        assert_eq!(cache.file_len().unwrap(), len);
        drop(cache);
        let cache = RefCache::open(dir.path(), KEY, &|| true).unwrap();
        assert_eq!((values(&cache, 1), values(&cache, 2)), (Some(vec![-1.0]), Some(vec![-3.0])));
    }

    #[test]
    fn values_that_are_not_finite_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut cache = RefCache::open(dir.path(), KEY, &|| true).unwrap();
        for bad in [f32::NAN, f32::NEG_INFINITY] {
            let error = cache.append_shard(&[(key(1), &[-1.0]), (key(2), &[-1.0, bad])]).unwrap_err().to_string();
            assert!(error.contains(&format!("refused log-prob {bad} of token 1")), "{error}");
            assert!(cache.is_empty());
            assert_eq!(cache.file_len().unwrap(), FILE_HEADER as u64);
        }
    }

    #[test]
    fn a_file_cut_at_any_byte_keeps_its_complete_shards() {
        let dir = tempfile::tempdir().unwrap();
        let mut cache = RefCache::open(dir.path(), KEY, &|| true).unwrap();
        // (length of the file, the sequences that are complete in it)
        let mut states = vec![(FILE_HEADER as u64, vec![])];
        for shard in [&[1, 2][..], &[0], &[3]] {
            append(&mut cache, shard);
            let complete = [states[states.len() - 1].1.as_slice(), shard].concat();
            states.push((cache.file_len().unwrap(), complete));
        }
        let path = cache.path().to_path_buf();
        drop(cache);
        let whole = fs::read(&path).unwrap();
        for cut in 0..=whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            let mut cache = RefCache::open(dir.path(), KEY, &|| true).unwrap();
            let (end, complete) = states.iter().rfind(|s| s.0 <= cut as u64).unwrap_or(&states[0]);
            assert_eq!(cache.len(), complete.len(), "cut at {cut}");
            assert!(complete.iter().all(|&n| values(&cache, n) == Some(given(n))), "cut at {cut}");
            assert_eq!(cache.recovered().is_some(), cut as u64 > *end, "cut at {cut}");

            append(&mut cache, &[4]);
            drop(cache);
            let cache = RefCache::open(dir.path(), KEY, &|| true).unwrap();
            assert_eq!((cache.len(), cache.recovered()), (complete.len() + 1, None), "cut at {cut}");
            assert_eq!(values(&cache, 4), Some(given(4)));
        }
    }

    #[test]
    fn any_flipped_bit_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let mut cache = RefCache::open(dir.path(), KEY, &|| true).unwrap();
        append(&mut cache, &[2]);
        let second_shard = cache.file_len().unwrap() as usize;
        append(&mut cache, &[1, 3]);
        let path = cache.path().to_path_buf();
        drop(cache);
        let whole = fs::read(&path).unwrap();
        for bit in 0..whole.len() * 8 {
            let (byte, mask) = (bit / 8, 1 << (bit % 8));
            let mut flipped = whole.clone();
            flipped[byte] ^= mask;
            fs::write(&path, &flipped).unwrap();
            match RefCache::open(dir.path(), KEY, &|| true) {
                Err(e) => {
                    assert!(byte < FILE_HEADER, "byte {byte}: {e}");
                    assert!(e.to_string().contains("delete it"), "{e}");
                    assert_eq!(fs::read(&path).unwrap(), flipped, "a foreign file is left alone");
                }
                Ok(cache) => {
                    assert!(byte >= FILE_HEADER);
                    assert!(cache.recovered().unwrap().contains("were damaged"));
                    assert_eq!(cache.len(), usize::from(byte >= second_shard));
                }
            }
        }
    }

    #[test]
    fn the_second_opener_waits_until_it_is_told_to_stop() {
        let dir = tempfile::tempdir().unwrap();
        let mut cache = RefCache::open(dir.path(), KEY, &|| true).unwrap();
        append(&mut cache, &[1]);
        let error = RefCache::open(dir.path(), KEY, &|| true).err().unwrap().to_string();
        assert!(error.contains("another cuvee run was still using") && error.contains(".logps"), "{error}");
        let other_reference = RefCache::open(dir.path(), [8; 32], &|| true);
        assert!(other_reference.is_ok());
        std::thread::scope(|scope| {
            let second = scope.spawn(|| RefCache::open(dir.path(), KEY, &|| false));
            sleep(Duration::from_millis(50));
            drop(cache);
            assert_eq!(second.join().unwrap().unwrap().len(), 1);
        });
    }
}
