//! safetensors out, written behind: values are made while those before them go to disk. One file, or shards with an index
//! as Hugging Face writes them.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};

use serde_json::json;

use super::atomic::write_error;
use super::json::write_json;
use super::save::{SaveDtype, header};
use crate::error::{Error, Result};

/// Buffers that wait to be written; with the one that is filled and the one that is written, all there are.
const WAITING: usize = 2;
/// The disk is made to start this many bytes at a time, so that the last sync has little left to wait for.
const SYNCED: usize = 1 << 26;

/// A tensor that is going to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    pub name: String,
    pub shape: Vec<usize>,
}

/// Takes the bytes of tensors in the order of their layout. A buffer holds bytes of one tensor only.
pub struct Sink {
    full: SyncSender<Vec<u8>>,
    empty: Receiver<Vec<u8>>,
}

impl Sink {
    /// A buffer to fill, with whatever it held.
    pub fn buffer(&self) -> Vec<u8> {
        self.empty.try_recv().unwrap_or_default()
    }

    /// Hands a buffer on, and waits where the disk is behind.
    pub fn write(&self, bytes: Vec<u8>) -> Result<()> {
        // Whoever receives has a better reason to have stopped.
        self.full.send(bytes).map_err(|_| Error::op("write", "the writer stopped"))
    }
}

/// Writes `model.safetensors` into `dir`, or where the tensors take more than `max_shard` bytes, shards and
/// `model.safetensors.index.json`. `produce` gives the sink every tensor's bytes, in order. Returns the bytes written.
///
/// Nothing here is atomic: `dir` is meant to be one that is not yet there for anyone else ([`super::write_dir`]).
pub fn stream_model(
    dir: &Path,
    tensors: &[Layout],
    dtype: SaveDtype,
    max_shard: u64,
    produce: impl FnOnce(&Sink) -> Result<()>,
) -> Result<u64> {
    let shards = shards(dir, tensors, dtype, max_shard)?;
    let (full, incoming) = sync_channel(WAITING);
    let (spent, empty) = channel();
    let (written, produced) = std::thread::scope(|scope| {
        let writer = scope.spawn(|| write_shards(&shards, incoming, spent));
        // The sink goes, and with it the channel, before the writer is waited for.
        let produced = { produce(&Sink { full, empty }) };
        (writer.join().expect("the writer does not panic"), produced)
    });
    let written = written?;
    produced?;
    if shards.len() > 1 {
        write_index(dir, &shards)?;
    }
    Ok(written)
}

/// One file: its header and the tensors behind it.
struct Shard<'a> {
    path: PathBuf,
    header: Vec<u8>,
    data_len: usize,
    tensors: &'a [Layout],
}

fn shards<'a>(dir: &Path, tensors: &'a [Layout], dtype: SaveDtype, max_shard: u64) -> Result<Vec<Shard<'a>>> {
    let size = |tensor: &Layout| tensor.shape.iter().product::<usize>() as u64 * dtype.bytes() as u64;
    let (mut ends, mut in_shard) = (Vec::new(), 0);
    for (i, tensor) in tensors.iter().enumerate() {
        if in_shard > 0 && in_shard + size(tensor) > max_shard {
            ends.push(i);
            in_shard = 0;
        }
        in_shard += size(tensor);
    }
    ends.push(tensors.len());
    let (mut start, count) = (0, ends.len());
    let shard = |(i, end): (usize, usize)| {
        let name = match count {
            1 => "model.safetensors".to_string(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
        };
        let (path, tensors) = (dir.join(name), &tensors[start..end]);
        start = end;
        let shapes = tensors.iter().map(|tensor| (tensor.name.as_str(), tensor.shape.as_slice()));
        let (header, data_len) = header(&path, shapes, dtype)?;
        Ok(Shard { path, header, data_len, tensors })
    };
    ends.into_iter().enumerate().map(shard).collect()
}

fn write_shards(shards: &[Shard], incoming: Receiver<Vec<u8>>, spent: Sender<Vec<u8>>) -> Result<u64> {
    let mut written = 0;
    for shard in shards {
        let failed = |e| write_error(&shard.path, e);
        let mut file = File::create(&shard.path).map_err(failed)?;
        file.write_all(&(shard.header.len() as u64).to_le_bytes()).map_err(failed)?;
        file.write_all(&shard.header).map_err(failed)?;
        let (mut left, mut unsynced) = (shard.data_len, 0);
        while left > 0 {
            // A producer that fails closes the channel and says why itself.
            let Ok(bytes) = incoming.recv() else { return Ok(written) };
            file.write_all(&bytes).map_err(failed)?;
            (left, unsynced) = (left - bytes.len(), unsynced + bytes.len());
            if unsynced >= SYNCED {
                file.sync_data().map_err(failed)?;
                unsynced = 0;
            }
            // Nobody may want it any more.
            drop(spent.send(bytes));
        }
        written += (8 + shard.header.len() + shard.data_len) as u64;
    }
    Ok(written)
}

fn write_index(dir: &Path, shards: &[Shard]) -> Result<()> {
    let mut weight_map = BTreeMap::new();
    for shard in shards {
        let file = shard.path.file_name().expect("a shard has a name").to_string_lossy().into_owned();
        shard.tensors.iter().for_each(|tensor| drop(weight_map.insert(&tensor.name, file.clone())));
    }
    let total: usize = shards.iter().map(|shard| shard.data_len).sum();
    let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
    write_json(&dir.join("model.safetensors.index.json"), &index)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Weights;
    use std::fs;

    fn layout(name: &str, shape: &[usize]) -> Layout {
        Layout { name: name.into(), shape: shape.to_vec() }
    }

    fn write(dir: &Path, tensors: &[Layout], dtype: SaveDtype, max_shard: u64) -> Result<u64> {
        stream_model(dir, tensors, dtype, max_shard, |sink| {
            for (i, tensor) in tensors.iter().enumerate() {
                let values: Vec<f32> = (0..tensor.shape.iter().product()).map(|j| (10 * i + j) as f32).collect();
                for values in values.chunks(3) {
                    let mut bytes = sink.buffer();
                    bytes.resize(values.len() * dtype.bytes(), 0);
                    dtype.encode(values, &mut bytes);
                    sink.write(bytes)?;
                }
            }
            Ok(())
        })
    }

    #[test]
    fn shards_hold_what_one_file_holds() {
        let tensors = [layout("b", &[2, 4]), layout("none", &[0]), layout("a", &[5]), layout("scalar", &[])];
        // The size, and the files: each tensor of its own, all in one, and a tensor larger than a shard.
        for (max_shard, files) in [(1, 3), (20, 2), (1 << 20, 1)] {
            for dtype in [SaveDtype::F32, SaveDtype::Bf16, SaveDtype::F16] {
                let dir = tempfile::tempdir().unwrap();
                let written = write(dir.path(), &tensors, dtype, max_shard * dtype.bytes() as u64 / 2).unwrap();
                let sizes = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap());
                let weights = sizes.filter(|entry| entry.path().extension().unwrap() == "safetensors");
                let sizes: Vec<u64> = weights.map(|entry| entry.metadata().unwrap().len()).collect();
                assert_eq!((sizes.len(), sizes.iter().sum::<u64>()), (files, written), "{max_shard}");
                assert_eq!(dir.path().join("model.safetensors.index.json").exists(), files > 1);
                let weights = Weights::open(dir.path()).unwrap();
                for (i, tensor) in tensors.iter().enumerate() {
                    let mut found = vec![f32::NAN; tensor.shape.iter().product()];
                    weights.read(&tensor.name, &tensor.shape, &mut found).unwrap();
                    assert!(found.iter().enumerate().all(|(j, value)| *value == (10 * i + j) as f32), "{tensor:?}");
                    assert_eq!(weights.stored_as(&tensor.name), Some(dtype));
                    let mut tail = vec![f32::NAN; found.len() / 2];
                    weights.read_part(&tensor.name, found.len() - tail.len(), &mut tail).unwrap();
                    assert_eq!(tail, found[found.len() - tail.len()..]);
                }
            }
        }
    }

    #[test]
    fn who_fails_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let tensors = [layout("a", &[5])];
        let error = stream_model(dir.path(), &tensors, SaveDtype::F32, 1, |_| Err(Error::op("merge", "no more")));
        assert_eq!(error.unwrap_err().to_string(), "merge: no more");
        let error = write(&dir.path().join("none"), &tensors, SaveDtype::F32, 1).unwrap_err().to_string();
        assert!(error.contains("model.safetensors: could not be written"), "{error}");
        let twice = [layout("a", &[5]), layout("a", &[5])];
        assert!(write(dir.path(), &twice, SaveDtype::F32, 99).unwrap_err().to_string().contains("named \"a\""));
    }
}
