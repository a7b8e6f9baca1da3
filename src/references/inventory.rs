//! The files of a cache as a user sees them: what is there, whether it is sound, what can go.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::Serialize;

use super::cache::{About, Header, Kind, about_path, read_shard, read_shard_header};
use crate::error::{At, Error, Result};

/// One file, as its name, headers and [`About`] describe it. Its values are not read.
#[derive(Clone, Debug, Serialize)]
pub struct CacheFile {
    pub path: PathBuf,
    /// The key in hex, from the file's name.
    pub key: String,
    /// `log-prob` or `hidden value`.
    pub kind: &'static str,
    pub sequences: u64,
    pub bytes: u64,
    /// When a sequence was last added.
    #[serde(skip)]
    pub written: Option<SystemTime>,
    pub about: Option<About>,
    /// What is wrong at first sight.
    pub damage: Option<String>,
}

/// The files below a cache folder, by key. A folder that does not exist has none.
pub fn list(cache_dir: &Path) -> Result<Vec<CacheFile>> {
    let folder = cache_dir.join("refs");
    if !folder.exists() {
        return Ok(vec![]);
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(&folder).at(&folder)? {
        let path = entry.at(&folder)?.path();
        let extension = path.extension().and_then(|extension| extension.to_str());
        if let Some(kind) = Kind::ALL.into_iter().find(|kind| extension == Some(kind.extension())) {
            files.push(CacheFile::open(path, kind)?);
        }
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}

/// Which of `files` have a key that starts with one of `keys`.
///
/// Fails on a key that is none's, or that leaves several models to choose from.
pub fn select(files: Vec<CacheFile>, keys: &[String]) -> Result<Vec<CacheFile>> {
    for key in keys {
        let mut found: Vec<&str> = files.iter().map(|file| &*file.key).filter(|name| name.starts_with(key)).collect();
        found.dedup();
        match found[..] {
            [_] => {}
            [] => {
                let detail = format!("no file's key starts with {key:?}; `cuvee cache ls` lists them");
                return Err(Error::option("KEY", detail));
            }
            _ => {
                let detail = format!("{key:?} is the start of {} keys; write more of it", found.len());
                return Err(Error::option("KEY", detail));
            }
        }
    }
    Ok(files.into_iter().filter(|file| keys.iter().any(|key| file.key.starts_with(key))).collect())
}

impl CacheFile {
    fn open(path: PathBuf, kind: Kind) -> Result<Self> {
        let file = File::open(&path).at(&path)?;
        let metadata = file.metadata().at(&path)?;
        let key = path.file_stem().map_or(String::new(), |stem| stem.to_string_lossy().into_owned());
        let about = fs::read(about_path(&path)).ok().and_then(|text| serde_json::from_slice(&text).ok());
        let (bytes, written) = (metadata.len(), metadata.modified().ok());
        let mut found = Self { path, key, kind: kind.name(), sequences: 0, bytes, written, about, damage: None };
        match found.header(&file, kind)? {
            Err(damage) => found.damage = Some(damage),
            Ok(header) => {
                let mut at = header.len();
                while let Some((records, end, _)) = read_shard_header(&file, at, bytes).at(&found.path)? {
                    found.sequences += u64::from(records);
                    at = end;
                }
                found.damage = tail(at, bytes);
            }
        }
        Ok(found)
    }

    /// The header, or what is wrong with it.
    fn header(&self, file: &File, kind: Kind) -> Result<Result<Header, String>> {
        let header = Header::read(file).at(&self.path)?;
        Ok(match header {
            Some(header) if header.kind != kind => Err(format!("it holds {}s", header.kind.name())),
            Some(header) if *blake3::Hash::from_bytes(header.key).to_hex() != *self.key => {
                Err("it is of another key than its name says".into())
            }
            Some(header) => Ok(header),
            None => Err("it does not begin as a cache file of this version".into()),
        })
    }

    /// Reads every shard, and checks checksums and that all values are finite. What is wrong, if anything is.
    ///
    /// Fails while a running cuvee writes to the file.
    pub fn verify(&self) -> Result<Option<String>> {
        let file = File::open(&self.path).at(&self.path)?;
        if let Err(TryLockError::WouldBlock) = file.try_lock_shared() {
            return Err(self.in_use());
        }
        let kind = Kind::ALL.into_iter().find(|kind| kind.name() == self.kind).expect("it was listed");
        let header = match self.header(&file, kind)? {
            Ok(header) => header,
            Err(damage) => return Ok(Some(damage)),
        };
        let (mut at, bytes) = (header.len(), file.metadata().at(&self.path)?.len());
        while let Some(shard) = read_shard(&file, &header, at, bytes).at(&self.path)? {
            if !shard.finite {
                return Ok(Some(format!("the shard at byte {at} holds a {} that is not finite", self.kind)));
            }
            at = shard.end;
        }
        Ok(tail(at, bytes))
    }

    fn in_use(&self) -> Error {
        Error::file(&self.path, "is in use by a running cuvee; wait until that is done")
    }
}

fn tail(end: u64, bytes: u64) -> Option<String> {
    (bytes > end).then(|| format!("its last {} bytes, from byte {end} on, are damaged", bytes - end))
}

/// Removes files and what describes them; returns the bytes that they took.
///
/// Fails, and removes nothing, while a running cuvee uses one of them.
pub fn remove(files: &[CacheFile]) -> Result<u64> {
    let mut locked = Vec::new();
    for found in files {
        let file = File::open(&found.path).at(&found.path)?;
        if let Err(TryLockError::WouldBlock) = file.try_lock() {
            return Err(found.in_use());
        }
        locked.push(file);
    }
    let mut freed = 0;
    for found in files {
        fs::remove_file(&found.path).at(&found.path)?;
        freed += found.bytes;
        let about = about_path(&found.path);
        if let Ok(metadata) = fs::metadata(&about) {
            fs::remove_file(&about).at(&about)?;
            freed += metadata.len();
        }
    }
    Ok(freed)
}
