//! safetensors in: one file or shards with an index; f16, bf16 and f32 become f32. Tensors are read chunk by chunk and
//! hashed from a mapping whose pages are let go at once, so that a model takes no memory beside where it is read into.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use half::f16;
use memmap2::{Advice, Mmap, UncheckedAdvice};
use rayon::prelude::*;
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde_json::Value;

use super::json::read_json;
use super::save::SaveDtype;
use crate::error::{At, Error, Result};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Elements that one task converts: large enough to hide the scheduling, small enough to spread a vocabulary.
const CHUNK: usize = 1 << 16;

/// Bytes that are hashed at once, by all threads.
const HASHED: usize = 1 << 23;

/// The tensors of one model folder. They stay on disk until they are read; drop this to drop the mappings.
pub struct Weights {
    /// The single file or the index: where a tensor that no shard has was expected.
    source: PathBuf,
    shards: Vec<Shard>,
    tensors: BTreeMap<String, Tensor>,
}

struct Shard {
    path: PathBuf,
    file: File,
    bytes: Mmap,
}

impl Shard {
    /// Shows some bytes of the file, then lets their pages go.
    fn with_bytes(&self, range: Range<usize>, look: impl FnOnce(&[u8])) {
        look(&self.bytes[range.clone()]);
        // SAFETY: the mapping is of a file and only read, so a page that is needed again is mapped again.
        let advised = unsafe { self.bytes.unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, range.len()) };
        // A kernel that refuses keeps the pages: the bytes are right either way.
        drop(advised);
    }
}

struct Tensor {
    shard: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// Where its bytes are in the shard's file.
    range: Range<usize>,
}

impl Weights {
    /// Opens the weights of a Hugging Face folder: model.safetensors, else the shards that
    /// model.safetensors.index.json names. Headers are read and checked, data is not.
    pub fn open(dir: &Path) -> Result<Self> {
        // Not `exists`: a link into an incomplete download dangles, and the error should name it.
        let is_there = |name| fs::symlink_metadata(dir.join(name)).is_ok();
        if is_there(SINGLE) {
            Self::open_file(&dir.join(SINGLE))
        } else if is_there(INDEX) {
            Self::open_sharded(&dir.join(INDEX))
        } else {
            Err(no_weights(dir))
        }
    }

    /// Opens one safetensors file of any name, such as an adapter's.
    pub fn open_file(path: &Path) -> Result<Self> {
        let mut weights = Self { source: path.to_path_buf(), shards: Vec::new(), tensors: BTreeMap::new() };
        weights.add_shard(path)?;
        Ok(weights)
    }

    fn open_sharded(index: &Path) -> Result<Self> {
        let weight_map = read_json(index)?.get_mut("weight_map").map(Value::take).unwrap_or_default();
        let weight_map: BTreeMap<String, String> = serde_json::from_value(weight_map)
            .map_err(|e| Error::file(index, format!("has no usable \"weight_map\": {e}; download it again")))?;
        let mut weights = Self { source: index.to_path_buf(), shards: Vec::new(), tensors: BTreeMap::new() };
        let files: BTreeSet<&String> = weight_map.values().collect();
        for file in &files {
            let path = index.with_file_name(file);
            if !path.exists() {
                let detail = format!("is missing; {INDEX} names {} such shards; download it again", files.len());
                return Err(Error::file(path, detail));
            }
            weights.add_shard(&path)?;
        }
        for (name, file) in &weight_map {
            let path = index.with_file_name(file);
            if weights.tensors.get(name).is_none_or(|t| weights.shards[t.shard].path != path) {
                let detail = format!("says that {file} holds {name:?}, which it does not; are they of one model?");
                return Err(Error::file(index, detail));
            }
        }
        Ok(weights)
    }

    fn add_shard(&mut self, path: &Path) -> Result<()> {
        let file = File::open(path).at(path)?;
        // SAFETY: the mapping is only read. Should another program shorten the file meanwhile, reading it raises
        // SIGBUS; cuvee itself replaces files by renaming and never shortens them.
        let bytes = unsafe { Mmap::map(&file) }.at(path)?;
        let (data_start, metadata) = parse_header(path, &bytes)?;
        let shard = self.shards.len();
        for (name, info) in metadata.tensors() {
            let range = data_start + info.data_offsets.0..data_start + info.data_offsets.1;
            let tensor = Tensor { shard, dtype: info.dtype, shape: info.shape.clone(), range };
            if let Some(first) = self.tensors.get(&name) {
                let other = self.shards[first.shard].path.display();
                return Err(Error::file(path, format!("holds {name:?}, which is in {other} too; remove one of them")));
            }
            self.tensors.insert(name, tensor);
        }
        self.shards.push(Shard { path: path.to_path_buf(), file, bytes });
        Ok(())
    }

    /// All tensor names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|t| t.shape.as_slice())
    }

    /// The first of `names` that is there, for tensors that files spell in several ways.
    pub fn first_of<'a>(&self, names: &[&'a str]) -> Option<&'a str> {
        names.iter().copied().find(|name| self.tensors.contains_key(*name))
    }

    /// The file that holds a tensor, for messages; for a tensor that is nowhere, the file or index that was opened.
    pub fn path_of(&self, name: &str) -> &Path {
        self.tensors.get(name).map_or(&self.source, |t| &self.shards[t.shard].path)
    }

    /// Reads one tensor into `out`, row-major, as f32.
    ///
    /// Fails on a missing tensor, another shape than `shape`, a dtype other than f32, f16 and bf16, and on a NaN or an
    /// infinity among the values; `out` is then unspecified. Panics if `out` does not have `shape`'s size.
    pub fn read(&self, name: &str, shape: &[usize], out: &mut [f32]) -> Result<()> {
        let tensor = self.tensors.get(name).ok_or_else(|| self.missing(name))?;
        let fail = |detail| Err(Error::file(self.path_of(name), detail));
        if tensor.shape != shape {
            let found = &tensor.shape;
            return fail(format!(
                "{name:?} has shape {found:?}, the config implies {shape:?}; is this the right config.json?"
            ));
        }
        let Some(convert) = converter(tensor.dtype) else {
            return fail(unreadable(name, tensor.dtype));
        };
        assert_eq!(out.len(), shape.iter().product::<usize>(), "{name}: the buffer does not have the shape's size");

        let (shard, width) = (&self.shards[tensor.shard], tensor.dtype.bitsize() / 8);
        let read = |buffer: &mut Vec<u8>, (chunk, out): (usize, &mut [f32])| {
            buffer.resize(out.len() * width, 0);
            let start = tensor.range.start + chunk * CHUNK * width;
            if let Err(e) = shard.file.read_exact_at(buffer, start as u64) {
                return Some(format!("{name:?} cannot be read: {e}"));
            }
            convert(buffer, out);
            let bad = first_not_finite(out)?;
            Some(unusable(name, out[bad], chunk * CHUNK + bad))
        };
        let chunks = out.par_chunks_mut(CHUNK).enumerate();
        let problem = chunks.map_init(Vec::new, read).find_map_first(|problem| problem);
        problem.map_or(Ok(()), fail)
    }

    /// How a tensor is stored, where it is one of the types that are read.
    pub fn stored_as(&self, name: &str) -> Option<SaveDtype> {
        match self.tensors.get(name)?.dtype {
            Dtype::F32 => Some(SaveDtype::F32),
            Dtype::BF16 => Some(SaveDtype::Bf16),
            Dtype::F16 => Some(SaveDtype::F16),
            _ => None,
        }
    }

    /// Reads the values of one tensor from index `start` on into `out`, as f32, on the calling thread.
    ///
    /// Fails as [`Weights::read`] does. Panics if the tensor ends before `out`.
    pub fn read_part(&self, name: &str, start: usize, out: &mut [f32]) -> Result<()> {
        /// Bytes that are converted at once, so that they never leave the nearest cache.
        const BLOCK: usize = 1 << 14;
        let tensor = self.tensors.get(name).ok_or_else(|| self.missing(name))?;
        let fail = |detail| Err(Error::file(self.path_of(name), detail));
        let Some(convert) = converter(tensor.dtype) else { return fail(unreadable(name, tensor.dtype)) };
        let (shard, width) = (&self.shards[tensor.shard], tensor.dtype.bitsize() / 8);
        let mut at = tensor.range.start + start * width;
        assert!(at + out.len() * width <= tensor.range.end, "{name} has fewer values");
        let mut buffer = [0; BLOCK];
        let mut done = 0;
        for out in out.chunks_mut(BLOCK / width) {
            let bytes = &mut buffer[..out.len() * width];
            if let Err(e) = shard.file.read_exact_at(bytes, at as u64) {
                return fail(format!("{name:?} cannot be read: {e}"));
            }
            convert(bytes, out);
            if let Some(bad) = first_not_finite(out) {
                return fail(unusable(name, out[bad], start + done + bad));
            }
            (at, done) = (at + bytes.len(), done + out.len());
        }
        Ok(())
    }

    /// Whether every tensor of two dimensions or more is stored as bfloat16.
    pub fn matrices_are_bf16(&self) -> bool {
        let mut matrices = self.tensors.values().filter(|tensor| tensor.shape.len() > 1);
        matrices.all(|tensor| tensor.dtype == Dtype::BF16)
    }

    /// Asks the system to have a tensor's bytes in memory by the time that they are read. Names that are not there are
    /// left alone, and so is a system that does not care.
    pub fn prefetch(&self, name: &str) {
        let Some(tensor) = self.tensors.get(name) else { return };
        let (start, len) = (tensor.range.start, tensor.range.len());
        // A hint: what comes of it changes no byte.
        drop(self.shards[tensor.shard].bytes.advise_range(Advice::WillNeed, start, len));
    }

    /// Feeds the name, dtype, shape and raw bytes of one tensor into a hasher; of a tensor that is not there, the name.
    pub fn hash_into(&self, name: &str, hasher: &mut blake3::Hasher) {
        // Lengths go first, so that no two different tensors feed the same bytes.
        let mut text = |text: &str| {
            hasher.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
        };
        text(name);
        let Some(tensor) = self.tensors.get(name) else { return };
        text(&tensor.dtype.to_string());
        hasher.update(&(tensor.shape.len() as u64).to_le_bytes());
        for &dim in &tensor.shape {
            hasher.update(&(dim as u64).to_le_bytes());
        }
        for start in tensor.range.clone().step_by(HASHED) {
            let range = start..tensor.range.end.min(start + HASHED);
            self.shards[tensor.shard].with_bytes(range, |bytes| {
                hasher.update_rayon(bytes);
            });
        }
    }

    fn missing(&self, name: &str) -> Error {
        let nearest = self
            .names()
            .max_by(|a, b| strsim::normalized_levenshtein(a, name).total_cmp(&strsim::normalized_levenshtein(b, name)));
        let nearest = nearest.map_or("it holds no tensor at all".into(), |n| format!("the nearest name is {n:?}"));
        Error::file(&self.source, format!("has no tensor {name:?}; {nearest}; is this the right config.json?"))
    }
}

fn unreadable(name: &str, found: Dtype) -> String {
    format!("{name:?} is stored as {found}, cuvee reads F32, F16 and BF16; convert the file first")
}

fn unusable(name: &str, value: f32, index: usize) -> String {
    format!("{name:?} holds {value} at index {index}; the weights are unusable, get another copy")
}

/// Checks a file's header and returns where its data starts.
fn parse_header(path: &Path, bytes: &[u8]) -> Result<(usize, Metadata)> {
    let fail = |detail: String| Err(Error::file(path, detail));
    if bytes.starts_with(b"version https://git-lfs") {
        return fail("is a git-lfs pointer, not the weights; run `git lfs pull` in its folder".into());
    }
    let Some((&header_len, rest)) = bytes.split_first_chunk() else {
        let is = if bytes.is_empty() { "is empty".into() } else { format!("is truncated to {} bytes", bytes.len()) };
        return fail(format!("{is}; download or save it again"));
    };
    let header_len = u64::from_le_bytes(header_len);
    let Some((header, data)) = usize::try_from(header_len).ok().and_then(|len| rest.split_at_checked(len)) else {
        let found = rest.len();
        return fail(format!(
            "claims a header of {header_len} bytes, only {found} follow; it is truncated or not a safetensors file"
        ));
    };
    let metadata: Metadata = serde_json::from_slice(header)
        .map_err(|e| Error::file(path, format!("has a bad header: {e}; it is damaged or not a safetensors file")))?;
    match (metadata.data_len(), data.len()) {
        (expected, found) if found < expected => {
            fail(format!("is truncated: its tensors take {expected} bytes, {found} are there; download it again"))
        }
        (expected, found) if found > expected => {
            fail(format!("has {} bytes behind its last tensor; it is damaged, download it again", found - expected))
        }
        _ => Ok((8 + header.len(), metadata)),
    }
}

/// Why a folder cannot be opened, by what is in it.
fn no_weights(dir: &Path) -> Error {
    let Ok(entries) = fs::read_dir(dir) else {
        return Error::file(dir, "is not a folder that can be read; expected a Hugging Face model folder");
    };
    let mut names: Vec<_> = entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    let ends_in = |suffixes: &[&str]| names.iter().any(|n| suffixes.iter().any(|s| n.ends_with(s)));
    let advice = if names.iter().any(|n| n == "adapter_model.safetensors") {
        "this is an adapter, open the model that it belongs to"
    } else if ends_in(&[".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack"]) {
        "convert to safetensors first"
    } else {
        "is this the right folder?"
    };
    let mut found = names.iter().take(8).map(String::as_str).collect::<Vec<_>>().join(", ");
    match names.len() {
        0 => found = "nothing".into(),
        n if n > 8 => found += &format!(" and {} more", n - 8),
        _ => {}
    }
    Error::file(dir, format!("holds neither {SINGLE} nor {INDEX}; found {found}; {advice}"))
}

type Convert = fn(&[u8], &mut [f32]);

fn converter(dtype: Dtype) -> Option<Convert> {
    match dtype {
        Dtype::F32 => Some(|bytes, out| convert(bytes, out, f32::from_le_bytes)),
        Dtype::F16 => Some(|bytes, out| convert(bytes, out, |b| f16::from_le_bytes(b).to_f32())),
        // Shifted rather than converted: `half` also quiets NaNs, which are refused here, and is not vectorised for it.
        Dtype::BF16 => {
            Some(|bytes, out| convert(bytes, out, |b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)))
        }
        _ => None,
    }
}

/// Byte arrays instead of casts: old files start their data at any address.
fn convert<const WIDTH: usize>(bytes: &[u8], out: &mut [f32], one: impl Fn([u8; WIDTH]) -> f32) {
    out.iter_mut().zip(bytes.as_chunks().0).for_each(|(out, bytes)| *out = one(*bytes));
}

fn first_not_finite(values: &[f32]) -> Option<usize> {
    // Without an early exit this pass is vectorised; the search runs only when it will succeed.
    let all_finite = values.iter().fold(true, |all, v| all & v.is_finite());
    if all_finite { None } else { values.iter().position(|v| !v.is_finite()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::save::{TensorSource, save_safetensors};
    use half::bf16;
    use proptest::prelude::*;
    use serde_json::json;
    use tempfile::TempDir;

    /// A file with the given header, the data that follows it, and spaces in front to shift the data's address.
    fn file(header: &Value, data: &[u8], pad: usize) -> Vec<u8> {
        let header = " ".repeat(pad) + &header.to_string();
        [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
    }

    fn folder(name: &str, bytes: &[u8]) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(name), bytes).unwrap();
        dir
    }

    fn open_error(dir: &Path) -> String {
        Weights::open(dir).err().unwrap().to_string()
    }

    /// Saves tensors of shape [2] that hold their number and its double.
    fn save(path: &Path, tensors: &[(&str, f32)]) {
        let source = |&(name, value): &(&str, f32)| TensorSource {
            name: name.into(),
            shape: vec![2],
            fill: Box::new(move |out| {
                out.copy_from_slice(&[value, 2.0 * value]);
                Ok(())
            }),
        };
        let sources: Vec<_> = tensors.iter().map(source).collect();
        save_safetensors(path, &sources, SaveDtype::F32).unwrap();
    }

    fn sharded(weight_map: Value) -> TempDir {
        let dir = folder(INDEX, json!({"metadata": {}, "weight_map": weight_map}).to_string().as_bytes());
        save(&dir.path().join("one.safetensors"), &[("b", 1.0), ("c", 2.0)]);
        save(&dir.path().join("two.safetensors"), &[("a", 3.0)]);
        dir
    }

    #[test]
    fn every_float_is_read_at_any_alignment() {
        let header = json!({
            "h": {"dtype": "F16", "shape": [1, 3], "data_offsets": [0, 6]},
            "b": {"dtype": "BF16", "shape": [3], "data_offsets": [6, 12]},
            "f": {"dtype": "F32", "shape": [3], "data_offsets": [12, 24]},
        });
        let values = [1.5_f32, -0.0, 1e-7];
        let mut data = values.map(|v| f16::from_f32(v).to_le_bytes()).concat();
        data.extend(values.map(|v| bf16::from_f32(v).to_le_bytes()).concat());
        data.extend(values.map(f32::to_le_bytes).concat());
        for pad in 0..8 {
            let dir = folder(SINGLE, &file(&header, &data, pad));
            let weights = Weights::open(dir.path()).unwrap();
            assert_eq!(weights.names().collect::<Vec<_>>(), ["b", "f", "h"]);
            let read = |name, shape: &[usize]| {
                let mut out = [f32::NAN; 3];
                weights.read(name, shape, &mut out).unwrap();
                out.map(f32::to_bits)
            };
            assert_eq!(read("h", &[1, 3]), values.map(|v| f16::from_f32(v).to_f32().to_bits()));
            assert_eq!(read("b", &[3]), values.map(|v| bf16::from_f32(v).to_f32().to_bits()));
            assert_eq!(read("f", &[3]), values.map(f32::to_bits));
        }
    }

    #[test]
    fn shards_open_as_one() {
        let dir = sharded(json!({"a": "two.safetensors", "b": "one.safetensors", "c": "one.safetensors"}));
        let weights = Weights::open(dir.path()).unwrap();
        assert_eq!(weights.names().collect::<Vec<_>>(), ["a", "b", "c"]);
        assert_eq!(weights.shape("c"), Some(&[2][..]));
        assert_eq!(weights.shape("d"), None);
        assert_eq!(weights.first_of(&["d", "c", "a"]), Some("c"));
        assert_eq!(weights.first_of(&["d"]), None);
        assert!(weights.path_of("a").ends_with("two.safetensors"));
        assert!(weights.path_of("d").ends_with(INDEX));
        let mut out = [0.0; 2];
        weights.read("a", &[2], &mut out).unwrap();
        assert_eq!(out, [3.0, 6.0]);
    }

    #[test]
    fn bad_shards_are_named() {
        let whole = json!({"a": "two.safetensors", "b": "one.safetensors", "c": "one.safetensors"});

        let dir = sharded(whole.clone());
        fs::remove_file(dir.path().join("two.safetensors")).unwrap();
        let error = open_error(dir.path());
        assert!(error.contains("two.safetensors: is missing; ") && error.contains("names 2 such shards"), "{error}");

        let dir = sharded(json!({"a": "two.safetensors", "b": "two.safetensors", "c": "one.safetensors"}));
        let error = open_error(dir.path());
        assert!(error.contains("index.json: says that two.safetensors holds \"b\", which it does not"), "{error}");

        let dir = sharded(whole);
        save(&dir.path().join("two.safetensors"), &[("a", 3.0), ("b", 4.0)]);
        let error = open_error(dir.path());
        assert!(error.contains("two.safetensors: holds \"b\", which is in") && error.contains("one.safet"), "{error}");

        let error = open_error(folder(INDEX, b"{\"weights\": 1}").path());
        assert!(error.contains("has no usable \"weight_map\""), "{error}");
        let error = open_error(folder(INDEX, b"[]").path());
        assert!(error.contains("has no usable \"weight_map\""), "{error}");
    }

    #[test]
    fn a_folder_without_weights_says_what_it_has() {
        for (name, advice) in [
            ("pytorch_model.bin", "found pytorch_model.bin; convert to safetensors first"),
            ("adapter_model.safetensors", "this is an adapter"),
            ("README.md", "found README.md; is this the right folder?"),
        ] {
            let error = open_error(folder(name, b"").path());
            assert!(error.contains("holds neither") && error.contains(advice), "{error}");
        }
        let dir = tempfile::tempdir().unwrap();
        assert!(open_error(dir.path()).contains("found nothing; "));
        assert!(open_error(&dir.path().join("absent")).contains("absent: is not a folder"));
        for n in 0..10 {
            fs::write(dir.path().join(n.to_string()), "").unwrap();
        }
        assert!(open_error(dir.path()).contains("6, 7 and 2 more; "));
        std::os::unix::fs::symlink("nowhere", dir.path().join(SINGLE)).unwrap();
        assert!(open_error(dir.path()).contains("model.safetensors: No such file"));
    }

    #[test]
    fn broken_files_say_how() {
        let header = json!({"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}});
        let overflow = json!({
            "s": {"dtype": "U8", "shape": [u64::MAX / 8], "data_offsets": [0, u64::MAX / 8]},
            "t": {"dtype": "U8", "shape": [u64::MAX / 8], "data_offsets": [u64::MAX / 8, u64::MAX / 8 * 2]},
        });
        let cases: [(&[u8], &str); 11] = [
            (b"", "is empty"),
            (b"1234567", "is truncated to 7 bytes"),
            (b"version https://git-lfs.github.com/spec/v1", "is a git-lfs pointer"),
            (b"\x09\0\0\0\0\0\0\0{}      ", "claims a header of 9 bytes, only 8 follow"),
            (&[255; 40], "claims a header of 18446744073709551615 bytes, only 32 follow"),
            (b"\x08\0\0\0\0\0\0\0notajson", "has a bad header: "),
            (b"\x08\0\0\0\0\0\0\0{\"\xff\": 1}", "has a bad header: "),
            (&file(&header, &[0; 7], 0), "is truncated: its tensors take 8 bytes, 7 are there"),
            (&file(&header, &[0; 10], 0), "has 2 bytes behind its last tensor"),
            (&file(&overflow, &[0; 10], 0), "is truncated: its tensors take"),
            (&file(&json!({"t": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}), &[0; 8], 0), "bad header"),
        ];
        for (bytes, message) in cases {
            let error = open_error(folder(SINGLE, bytes).path());
            assert!(error.contains("model.safetensors: ") && error.contains(message), "{error}");
        }
    }

    #[test]
    fn bad_reads_say_why() {
        let header = json!({
            "layers.3.gate": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
            "ids": {"dtype": "I64", "shape": [1], "data_offsets": [16, 24]},
        });
        let data = [1.0, 2.0, f32::INFINITY, f32::NAN, 0.0, 0.0].map(f32::to_le_bytes).concat();
        let dir = folder(SINGLE, &file(&header, &data, 0));
        let weights = Weights::open(dir.path()).unwrap();
        let mut out = [0.0; 4];
        let mut error = |name, shape: &[usize]| {
            let len = shape.iter().product();
            weights.read(name, shape, &mut out[..len]).unwrap_err().to_string()
        };
        for (name, shape, message) in [
            ("layers.3.gates", &[2, 2][..], "has no tensor \"layers.3.gates\"; the nearest name is \"layers.3.gate\""),
            (
                "layers.3.gate",
                &[4, 1],
                "\"layers.3.gate\" has shape [2, 2], the config implies [4, 1]; is this the right",
            ),
            ("ids", &[1], "\"ids\" is stored as I64, cuvee reads F32, F16 and BF16"),
            ("layers.3.gate", &[2, 2], "\"layers.3.gate\" holds inf at index 2; "),
        ] {
            let error = error(name, shape);
            assert!(error.contains("model.safetensors: ") && error.contains(message), "{error}");
        }
        let empty = folder(SINGLE, &file(&json!({}), &[], 0));
        let error = Weights::open(empty.path()).unwrap().read("x", &[1], &mut out[..1]).unwrap_err().to_string();
        assert!(error.contains("it holds no tensor at all"), "{error}");
    }

    #[test]
    fn the_first_bad_index_is_found_across_chunks() {
        let dir = tempfile::tempdir().unwrap();
        let len = 3 * CHUNK + 5;
        let fill = move |out: &mut [f32]| {
            out[CHUNK + 7] = f32::NAN;
            out[len - 1] = f32::INFINITY;
            Ok(())
        };
        let source = TensorSource { name: "t".into(), shape: vec![len], fill: Box::new(fill) };
        save_safetensors(&dir.path().join(SINGLE), &[source], SaveDtype::Bf16).unwrap();
        let weights = Weights::open(dir.path()).unwrap();
        let error = weights.read("t", &[len], &mut vec![0.0; len]).unwrap_err().to_string();
        assert!(error.contains(&format!("holds NaN at index {}", CHUNK + 7)), "{error}");
    }

    #[test]
    fn hashes_follow_name_dtype_shape_and_bytes() {
        let hash = |name: &str, dtype: &str, shape: &[usize], data: &[u8]| {
            let header = json!({name: {"dtype": dtype, "shape": shape, "data_offsets": [0, data.len()]}});
            let dir = folder(SINGLE, &file(&header, data, 0));
            let mut hasher = blake3::Hasher::new();
            Weights::open(dir.path()).unwrap().hash_into("t", &mut hasher);
            hasher.finalize()
        };
        let same = hash("t", "F32", &[2, 1], &[1; 8]);
        assert_eq!(same, hash("t", "F32", &[2, 1], &[1; 8]));
        let mut others = vec![
            hash("u", "F32", &[2, 1], &[1; 8]),
            hash("t", "I32", &[2, 1], &[1; 8]),
            hash("t", "F32", &[1, 2], &[1; 8]),
            hash("t", "F32", &[2], &[1; 8]),
            hash("t", "F32", &[2, 1], &[1, 1, 1, 1, 1, 1, 1, 0]),
        ];
        others.push(same);
        assert_eq!(others.iter().map(|h| h.to_hex()).collect::<BTreeSet<_>>().len(), others.len());
    }

    proptest! {
        #[test]
        fn damaged_files_never_panic(
            cut in 0.0..1.2,
            flips in prop::collection::vec((any::<prop::sample::Index>(), 1_u8..), 0..6),
        ) {
            let header = json!({
                "__metadata__": {"format": "pt"},
                "model.embed_tokens.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
                "lm_head.weight": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
            });
            let mut bytes = file(&header, &[1; 32], 0);
            for (index, mask) in flips {
                let index = index.index(bytes.len());
                bytes[index] ^= mask;
            }
            bytes.truncate((cut * bytes.len() as f64) as usize);
            let dir = folder(SINGLE, &bytes);
            if let Ok(weights) = Weights::open(dir.path()) {
                for name in weights.names() {
                    let shape = weights.shape(name).unwrap();
                    // A damaged shape still fits the bytes that are there, so this allocates little.
                    let mut out = vec![0.0; shape.iter().product()];
                    let _ = weights.read(name, shape, &mut out);
                }
            }
        }
    }
}
