//! What frozen references say about sequences, kept on disk so that each is evaluated once: per scored token its
//! log-probability, or the final hidden row that the head reads.
//!
//! One append-only file per key and [`Kind`], `<cache_dir>/refs/<hex of key>.logps` or `.hidden`, little endian:
//!
//! ```text
//! magic and version   16 bytes
//! key                 32 bytes
//! width               u32, only of hidden rows: values of one token (of log-probs it is 1)
//! shards, each        u32 records, u64 payload length, first 16 bytes of the payload's blake3, payload
//!   a payload's       32 bytes sequence key, u32 token count, that many times width values: f32 log-probs (nats)
//!   records, each     or bf16 hidden values
//! ```
//!
//! A shard is written with one write and synced, so a crash can only tear the last one; opening cuts it off. Beside it
//! `<hex of key>.json` tells people which model it is of ([`About`]); nothing else reads that.

use std::collections::{HashMap, HashSet};
use std::fmt::Display;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::marker::PhantomData;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use half::bf16;
use serde::{Deserialize, Serialize};

use crate::checkpoint::atomic::{sync_parent, write_error, write_file};
use crate::error::{At, Error, Result};
use crate::progress::say;

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

/// What a file holds of every scored token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Logps,
    Hidden,
}

impl Kind {
    pub const ALL: [Self; 2] = [Self::Logps, Self::Hidden];

    pub fn extension(self) -> &'static str {
        match self {
            Self::Logps => "logps",
            Self::Hidden => "hidden",
        }
    }

    /// For people: one of what it holds.
    pub fn name(self) -> &'static str {
        match self {
            Self::Logps => "log-prob",
            Self::Hidden => "hidden value",
        }
    }

    fn magic(self) -> [u8; 16] {
        match self {
            Self::Logps => *b"cuvee logps v1\r\n",
            Self::Hidden => *b"cuvee hidden 1\r\n",
        }
    }

    fn value_size(self) -> usize {
        match self {
            Self::Logps => size_of::<f32>(),
            Self::Hidden => size_of::<bf16>(),
        }
    }

    fn all_finite(self, values: &[u8]) -> bool {
        match self {
            Self::Logps => values.chunks_exact(4).all(|x| f32::from_le_bytes([x[0], x[1], x[2], x[3]]).is_finite()),
            Self::Hidden => values.chunks_exact(2).all(|x| bf16::from_le_bytes([x[0], x[1]]).is_finite()),
        }
    }
}

/// A number in a cache.
pub trait Value: bytemuck::Pod + Display {
    const KIND: Kind;
    fn finite(self) -> bool;
    /// From the byte order of the file to that of the host, or back. Nearly every host has the file's.
    fn reordered(self) -> Self;
}

impl Value for f32 {
    const KIND: Kind = Kind::Logps;

    fn finite(self) -> bool {
        self.is_finite()
    }

    fn reordered(self) -> Self {
        f32::from_bits(u32::from_le(self.to_bits()))
    }
}

impl Value for bf16 {
    const KIND: Kind = Kind::Hidden;

    fn finite(self) -> bool {
        self.is_finite()
    }

    fn reordered(self) -> Self {
        bf16::from_bits(u16::from_le(self.to_bits()))
    }
}

/// How a file begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub kind: Kind,
    pub key: [u8; 32],
    /// Values of a token, >= 1.
    pub width: u32,
}

impl Header {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = [&self.kind.magic()[..], &self.key].concat();
        if self.kind == Kind::Hidden {
            bytes.extend(self.width.to_le_bytes());
        }
        bytes
    }

    pub fn len(&self) -> u64 {
        self.bytes().len() as u64
    }

    /// Of a file that is there; `None` if it does not begin as one of ours.
    pub fn read(file: &File) -> io::Result<Option<Self>> {
        let mut bytes = [0; 16 + 32 + 4];
        let mut found = 0;
        while found < bytes.len() {
            match file.read_at(&mut bytes[found..], found as u64)? {
                0 => break,
                more => found += more,
            }
        }
        let Some(kind) = Kind::ALL.into_iter().find(|kind| bytes.starts_with(&kind.magic())) else { return Ok(None) };
        let width = match kind {
            Kind::Logps => 1,
            Kind::Hidden => u32::from_le_bytes(bytes[48..].try_into().expect("4 bytes")),
        };
        let header = Self { kind, key: bytes[16..48].try_into().expect("32 bytes"), width };
        Ok((found as u64 >= header.len() && width > 0).then_some(header))
    }

    /// Bytes of the values of so many tokens.
    fn value_bytes(&self, tokens: u32) -> Option<usize> {
        (tokens as usize).checked_mul(self.width as usize)?.checked_mul(self.kind.value_size())
    }
}

/// Where the values of one sequence are.
#[derive(Clone, Copy)]
pub(super) struct Span {
    offset: u64,
    tokens: u32,
}

/// One shard of a file, whole and with the checksum that it should have.
pub(super) struct Shard {
    pub records: Vec<([u8; 32], Span)>,
    pub finite: bool,
    pub end: u64,
}

/// How many records a shard says it has and where it ends; `None` if the file ends before.
pub(super) fn read_shard_header(file: &File, start: u64, file_len: u64) -> io::Result<Option<(u32, u64, [u8; 16])>> {
    let Some(left) = file_len.checked_sub(start).and_then(|left| left.checked_sub(SHARD_HEADER as u64)) else {
        return Ok(None);
    };
    let mut header = [0; SHARD_HEADER];
    file.read_exact_at(&mut header, start)?;
    let (records, rest) = header.split_first_chunk().expect("a shard header starts with u32");
    let (payload_len, checksum) = rest.split_first_chunk().expect("a shard header goes on with u64");
    let payload_len = u64::from_le_bytes(*payload_len);
    let whole = payload_len <= left;
    let checksum = checksum.try_into().expect("16 bytes are left");
    Ok(whole.then(|| (u32::from_le_bytes(*records), start + SHARD_HEADER as u64 + payload_len, checksum)))
}

/// The shard that begins at `start`; `None` if it is incomplete, damaged or absent.
pub(super) fn read_shard(file: &File, header: &Header, start: u64, file_len: u64) -> io::Result<Option<Shard>> {
    // Lengths are compared before anything is allocated: damaged ones can be huge.
    let Some((records, end, checksum)) = read_shard_header(file, start, file_len)? else { return Ok(None) };
    let start = start + SHARD_HEADER as u64;
    let mut payload = vec![0; (end - start) as usize];
    file.read_exact_at(&mut payload, start)?;
    if blake3::hash(&payload).as_bytes()[..16] != checksum {
        return Ok(None);
    }
    let Some((found, finite)) = parse_records(header, &payload, start) else { return Ok(None) };
    Ok((found.len() == records as usize).then_some(Shard { records: found, finite, end }))
}

/// Where the values of each sequence are.
type Records = Vec<([u8; 32], Span)>;

/// The records of a payload that starts at byte `start` of the file, and whether all values are finite; `None` if they do
/// not fill it exactly.
fn parse_records(header: &Header, mut payload: &[u8], start: u64) -> Option<(Records, bool)> {
    let (mut records, mut finite) = (Vec::new(), true);
    let mut offset = start;
    while !payload.is_empty() {
        let (key, rest) = payload.split_first_chunk()?;
        let (tokens, rest) = rest.split_first_chunk()?;
        let tokens = u32::from_le_bytes(*tokens);
        let (values, rest) = rest.split_at_checked(header.value_bytes(tokens)?)?;
        finite &= header.kind.all_finite(values);
        offset += RECORD_HEADER as u64;
        records.push((*key, Span { offset, tokens }));
        offset += values.len() as u64;
        payload = rest;
    }
    Some((records, finite))
}

/// Which model a cache file is of, for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// The name of its folder.
    pub model: String,
    /// `model_type` of its config.
    pub architecture: String,
    pub parameters: usize,
    /// Whose arithmetic made the numbers, as the device calls it.
    pub arithmetic: String,
    /// Seconds since 1970 when the file was made; `None` if it was there before it was described.
    pub created: Option<u64>,
}

/// Now, as [`About::created`] counts.
fn seconds_since_1970() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Where a cache file's [`About`] is.
pub fn about_path(cache_file: &Path) -> PathBuf {
    cache_file.with_extension("json")
}

/// The open cache of one reference. It holds a lock on its file and an index in memory, 48 bytes a sequence; the
/// values stay on disk.
pub struct Cache<V> {
    path: PathBuf,
    file: File,
    header: Header,
    index: HashMap<[u8; 32], Span>,
    /// Where the next shard goes: the end of the last complete one.
    end: u64,
    recovered: Option<String>,
    /// Whether it was made just now.
    fresh: bool,
    /// Whether shards may be appended.
    writable: bool,
    values: PhantomData<V>,
}

/// Log-probs, nats.
pub type RefCache = Cache<f32>;
/// Final normed hidden rows.
pub type HiddenCache = Cache<bf16>;

impl RefCache {
    /// Opens or creates the cache of the reference called `key`, which must cover everything that its log-probs
    /// depend on: weights, config, dtype, device kind, version of the scorer.
    ///
    /// A torn or damaged tail is cut off, see [`Cache::recovered`]. Waits while another run scores the same reference,
    /// until `stop` says true. Fails if the file is not a cache of this version and key.
    pub fn open(cache_dir: &Path, key: [u8; 32], stop: &dyn Fn() -> bool) -> Result<Self> {
        Self::open_wide(cache_dir, key, 1, stop)
    }
}

impl HiddenCache {
    /// [`RefCache::open`] for hidden rows of `width` values.
    pub fn open(cache_dir: &Path, key: [u8; 32], width: usize, stop: &dyn Fn() -> bool) -> Result<Self> {
        Self::open_wide(cache_dir, key, u32::try_from(width).expect("fewer than 2^32 hidden values"), stop)
    }
}

impl<V: Value> Cache<V> {
    fn open_wide(cache_dir: &Path, key: [u8; 32], width: u32, stop: &dyn Fn() -> bool) -> Result<Self> {
        let folder = cache_dir.join("refs");
        fs::create_dir_all(&folder).at(&folder)?;
        let path = folder.join(format!("{}.{}", blake3::Hash::from_bytes(key).to_hex(), V::KIND.extension()));
        let file = open_locked(&path, stop)?;
        let header = Header { kind: V::KIND, key, width };
        let mut cache = Self::new(path, file, header, true);
        cache.read_file_header()?;
        cache.read_shards()?;
        Ok(cache)
    }

    /// Opens a file that may lie anywhere and have been made elsewhere, to read only. Whatever its key, it must be whole:
    /// damage is an error, and nothing is cut off.
    pub fn open_file(path: &Path) -> Result<Self> {
        let file = File::open(path).at(path)?;
        if let Err(TryLockError::WouldBlock) = file.try_lock_shared() {
            return Err(Error::file(path, "another cuvee run is writing to it; wait until that is done"));
        }
        let header = match Header::read(&file).at(path)? {
            Some(header) if header.kind == V::KIND => header,
            Some(header) => {
                let detail = format!("holds {}s, expected {}s", header.kind.name(), V::KIND.name());
                return Err(Error::file(path, detail));
            }
            None => {
                let detail = format!(
                    "is not a {} cache of this version; `cuvee cache ls` shows where those of this machine are",
                    V::KIND.name()
                );
                return Err(Error::file(path, detail));
            }
        };
        let mut cache = Self::new(path.to_path_buf(), file, header, false);
        cache.end = cache.header.len();
        let damaged = cache.index_shards()?;
        if damaged > 0 {
            let detail = format!(
                "the last {damaged} of {} bytes are damaged; copy the file again from where it was made",
                cache.end + damaged
            );
            return Err(Error::file(path, detail));
        }
        Ok(cache)
    }

    fn new(path: PathBuf, file: File, header: Header, writable: bool) -> Self {
        let (index, values) = (HashMap::new(), PhantomData);
        Self { path, file, header, index, end: 0, recovered: None, fresh: false, writable, values }
    }

    /// Checks the file's header, or writes it where it is not there or torn.
    fn read_file_header(&mut self) -> Result<()> {
        let expected = self.header.bytes();
        let file_len = self.file_len()?;
        let mut found = vec![0; expected.len().min(file_len as usize)];
        self.file.read_exact_at(&mut found, 0).at(&self.path)?;
        if !expected.starts_with(&found) {
            let kind = self.header.kind.name();
            let detail =
                format!("is not a {kind} cache of this reference and version; delete it, it will be computed again");
            return Err(Error::file(&self.path, detail));
        }
        if found.len() < expected.len() {
            self.file.write_all_at(&expected, 0).map_err(|e| write_error(&self.path, e))?;
            self.file.sync_all().map_err(|e| write_error(&self.path, e))?;
            sync_parent(&self.path)?;
            self.fresh = true;
        }
        self.end = self.header.len();
        Ok(())
    }

    /// Indexes every complete shard and cuts off what follows the last of them.
    fn read_shards(&mut self) -> Result<()> {
        let damaged = self.index_shards()?;
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

    /// Indexes every complete shard from `self.end` on; returns how many bytes follow the last of them.
    fn index_shards(&mut self) -> Result<u64> {
        let file_len = self.file_len()?;
        while let Some(shard) = read_shard(&self.file, &self.header, self.end, file_len).at(&self.path)? {
            self.index.extend(shard.records);
            self.end = shard.end;
        }
        Ok(file_len - self.end)
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

    /// What its values are a function of, besides the tokens.
    pub fn key(&self) -> [u8; 32] {
        self.header.key
    }

    /// Values of a token.
    pub fn width(&self) -> usize {
        self.header.width as usize
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

    /// Writes beside the file which model it is of, unless that is there.
    pub fn describe(&self, about: &About) -> Result<()> {
        let path = about_path(&self.path);
        if path.exists() {
            return Ok(());
        }
        let created = self.fresh.then(seconds_since_1970);
        let text = serde_json::to_string_pretty(&About { created, ..about.clone() }).expect("plain data");
        write_file(&path, |out| writeln!(out, "{text}"))
    }

    /// Lets other runs have the file. What is indexed stays readable: a file only grows behind it.
    pub fn release(mut self) -> Result<Self> {
        self.writable = false;
        self.file.unlock().at(&self.path)?;
        Ok(self)
    }

    /// Reads one sequence from disk: `out` then holds [`Cache::width`] values for each scored token, or, when false is
    /// returned, nothing.
    pub fn get(&self, key: &[u8; 32], out: &mut Vec<V>) -> Result<bool> {
        out.clear();
        let Some(span) = self.index.get(key) else { return Ok(false) };
        out.resize(span.tokens as usize * self.width(), V::zeroed());
        self.file.read_exact_at(bytemuck::cast_slice_mut(out), span.offset).at(&self.path)?;
        out.iter_mut().for_each(|value| *value = value.reordered());
        Ok(true)
    }

    /// Appends sequences, (key, values of its scored tokens), with one write, and syncs. Sequences that are cached
    /// already are skipped.
    ///
    /// Fails on a value that is not finite, before anything is written, and when the disk does; the cache is then
    /// as it was.
    ///
    /// # Panics
    /// If it was opened to read only.
    pub fn append_shard(&mut self, records: &[([u8; 32], &[V])]) -> Result<()> {
        assert!(self.writable, "{} was opened to read only", self.path.display());
        let mut seen = HashSet::new();
        let mut shard = vec![0; SHARD_HEADER];
        for (key, values) in records {
            assert_eq!(values.len() % self.width(), 0, "whole tokens");
            if let Some(i) = values.iter().position(|v| !v.finite()) {
                let (kind, token) = (V::KIND.name(), i / self.width());
                let detail = format!("refused {kind} {} of token {token}; is the reference model sound?", values[i]);
                return Err(Error::file(&self.path, detail));
            }
            if self.contains(key) || !seen.insert(key) {
                continue;
            }
            let tokens = u32::try_from(values.len() / self.width()).expect("a sequence has fewer than 2^32 tokens");
            shard.extend(key);
            shard.extend(tokens.to_le_bytes());
            values.iter().for_each(|v| shard.extend(bytemuck::bytes_of(&v.reordered())));
        }
        if seen.is_empty() {
            return Ok(());
        }
        let count = u32::try_from(seen.len()).expect("a shard has fewer than 2^32 records");
        let payload = &shard[SHARD_HEADER..];
        let (spans, _) = parse_records(&self.header, payload, self.end + SHARD_HEADER as u64).expect("just written");
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

/// Opens or creates a file to write, under its exclusive lock.
fn open_locked(path: &Path, stop: &dyn Fn() -> bool) -> Result<File> {
    loop {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).at(path)?;
        lock(&file, path, stop)?;
        // `cuvee cache rm` may have removed it while we waited: what we wrote would go with it.
        if file.metadata().at(path)?.nlink() > 0 {
            return Ok(file);
        }
    }
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
    const FILE_HEADER: usize = 16 + 32;

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

    fn hidden(dir: &Path) -> HiddenCache {
        HiddenCache::open(dir, KEY, 3, &|| true).unwrap()
    }

    fn rows(tokens: u32) -> Vec<bf16> {
        (0..3 * tokens).map(|i| bf16::from_f32(i as f32 - 4.0)).collect()
    }

    #[test]
    fn hidden_rows_are_kept_beside_log_probs() {
        let dir = tempfile::tempdir().unwrap();
        let mut logps = RefCache::open(dir.path(), KEY, &|| true).unwrap();
        append(&mut logps, &[2]);
        let mut cache = hidden(dir.path());
        cache.append_shard(&[(key(0), &[]), (key(2), &rows(2))]).unwrap();
        cache.append_shard(&[(key(1), &rows(1))]).unwrap();
        let error = cache.append_shard(&[(key(3), &[rows(1)[0], rows(1)[0], bf16::INFINITY])]).unwrap_err();
        assert!(error.to_string().contains("refused hidden value inf of token 0"), "{error}");
        drop(cache);

        let cache = hidden(dir.path());
        assert_eq!((cache.len(), cache.width(), cache.recovered()), (3, 3, None));
        let mut out = Vec::new();
        for tokens in [0, 1, 2] {
            assert!(cache.get(&key(tokens), &mut out).unwrap());
            assert_eq!(out, rows(tokens));
        }
        drop(cache);
        let error = HiddenCache::open(dir.path(), KEY, 4, &|| true).err().unwrap().to_string();
        assert!(error.contains("is not a hidden value cache of this reference"), "{error}");
        assert_eq!(values(&logps, 2), Some(given(2)));
    }

    #[test]
    fn hidden_rows_survive_a_torn_tail_and_are_checked_to_the_bit() {
        let dir = tempfile::tempdir().unwrap();
        let mut cache = hidden(dir.path());
        cache.append_shard(&[(key(1), &rows(1))]).unwrap();
        let second_shard = cache.end as usize;
        cache.append_shard(&[(key(2), &rows(2))]).unwrap();
        let path = cache.path().to_path_buf();
        drop(cache);
        let whole = fs::read(&path).unwrap();
        for cut in 52..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            assert_eq!(hidden(dir.path()).len(), usize::from(cut >= second_shard), "cut at {cut}");
        }
        for byte in 52..whole.len() {
            let mut flipped = whole.clone();
            flipped[byte] ^= 16;
            fs::write(&path, &flipped).unwrap();
            assert_eq!(hidden(dir.path()).len(), usize::from(byte >= second_shard), "byte {byte}");
        }
    }

    #[test]
    fn a_file_from_elsewhere_is_read_and_never_changed() {
        let dir = tempfile::tempdir().unwrap();
        let mut cache = RefCache::open(dir.path(), KEY, &|| true).unwrap();
        append(&mut cache, &[1, 3]);
        let made = cache.path().to_path_buf();
        let error = RefCache::open_file(&made).err().unwrap().to_string();
        assert!(error.contains("another cuvee run is writing to it"), "{error}");
        drop(cache);
        let path = dir.path().join("theirs");
        fs::copy(&made, &path).unwrap();
        let cache = RefCache::open_file(&path).unwrap();
        assert_eq!((cache.key(), cache.len(), values(&cache, 3)), (KEY, 2, Some(given(3))));
        assert!(RefCache::open_file(&path).is_ok(), "readers do not wait for readers");
        let error = HiddenCache::open_file(&path).err().unwrap().to_string();
        assert!(error.contains("holds log-probs, expected hidden values"), "{error}");
        drop(cache);

        let whole = fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            let found = RefCache::open_file(&path);
            if cut == FILE_HEADER {
                assert!(found.unwrap().is_empty(), "nothing but a header is whole");
                continue;
            }
            let error = found.err().unwrap_or_else(|| panic!("cut at {cut}")).to_string();
            let expected = if cut < FILE_HEADER { "is not a log-prob cache" } else { "copy the file again" };
            assert!(error.contains(expected) && error.contains("theirs"), "cut at {cut}: {error}");
            assert_eq!(fs::read(&path).unwrap(), &whole[..cut]);
        }
        let error = RefCache::open_file(&dir.path().join("none")).err().unwrap().to_string();
        assert!(error.contains("none"), "{error}");
    }

    #[test]
    fn what_a_file_is_of_is_written_once() {
        let dir = tempfile::tempdir().unwrap();
        let about = |model: &str| About {
            model: model.into(),
            architecture: "llama".into(),
            parameters: 7,
            arithmetic: "cpu".into(),
            created: None,
        };
        let cache = RefCache::open(dir.path(), KEY, &|| true).unwrap();
        cache.describe(&about("first")).unwrap();
        cache.describe(&about("second")).unwrap();
        let read = |path: &Path| serde_json::from_slice::<About>(&fs::read(about_path(path)).unwrap()).unwrap();
        let found = read(cache.path());
        assert!(found.created.unwrap() > 1_700_000_000);
        assert_eq!(About { created: None, ..found }, about("first"));

        fs::remove_file(about_path(cache.path())).unwrap();
        drop(cache);
        let cache = RefCache::open(dir.path(), KEY, &|| true).unwrap();
        cache.describe(&about("later")).unwrap();
        assert_eq!(read(cache.path()), about("later"), "when the file was made is not known any more");
    }

    #[test]
    fn who_waited_for_a_file_that_was_removed_makes_a_new_one() {
        let dir = tempfile::tempdir().unwrap();
        let first = RefCache::open(dir.path(), KEY, &|| true).unwrap();
        std::thread::scope(|scope| {
            let second = scope.spawn(|| RefCache::open(dir.path(), KEY, &|| false));
            sleep(Duration::from_millis(50));
            fs::remove_file(first.path()).unwrap();
            drop(first);
            let second = second.join().unwrap().unwrap();
            assert!(second.path().exists() && second.fresh);
        });
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
