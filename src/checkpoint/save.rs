//! safetensors out, one tensor in memory at a time.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use super::atomic::{write_error, write_file_with};
use crate::error::{At, Error, Result};

/// How weights are stored. `Bf16` and `F16` round to nearest, ties to even; what `F16` cannot hold becomes infinite.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SaveDtype {
    F32,
    Bf16,
    F16,
}

impl SaveDtype {
    /// The name that a config.json uses.
    pub fn config_name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
        }
    }

    /// What is left of a value that is stored so.
    pub fn rounded(self, value: f32) -> f32 {
        match self {
            Self::F32 => value,
            Self::Bf16 => bf16::from_f32(value).to_f32(),
            Self::F16 => f16::from_f32(value).to_f32(),
        }
    }

    fn stored(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::Bf16 => Dtype::BF16,
            Self::F16 => Dtype::F16,
        }
    }

    /// Bytes of one value.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }

    /// Writes values as a file stores them. `bytes` has room for exactly as many.
    pub(crate) fn encode(self, values: &[f32], bytes: &mut [u8]) {
        assert_eq!(bytes.len(), values.len() * self.bytes(), "the buffer does not have the values' size");
        match self {
            Self::F32 => bytes.as_chunks_mut().0.iter_mut().zip(values).for_each(|(b, v)| *b = v.to_le_bytes()),
            Self::Bf16 => {
                bytes.as_chunks_mut().0.iter_mut().zip(values).for_each(|(b, v)| *b = to_bf16(*v).to_le_bytes())
            }
            Self::F16 => {
                bytes.as_chunks_mut().0.iter_mut().zip(values).for_each(|(b, v)| *b = f16::from_f32(*v).to_le_bytes())
            }
        }
    }
}

/// The bits of `bf16::from_f32`, without the branches that keep a loop from being vectorised.
fn to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet = (bits >> 16) | 0x40;
    (if value.is_nan() { quiet } else { rounded }) as u16
}

/// One tensor to write. `fill` is called once, when its turn comes, with zeros of the shape's size.
pub struct TensorSource<'a> {
    pub name: String,
    pub shape: Vec<usize>,
    pub fill: Fill<'a>,
}

/// Writes a tensor's values, row-major.
pub type Fill<'a> = Box<dyn Fn(&mut [f32]) -> Result<()> + 'a>;

/// Writes one safetensors file (metadata `format: pt`, tensors in the given order) atomically.
///
/// Returns the bytes written. Fails on two tensors of one name, on a `fill` that fails, and when the disk does;
/// an older file at `path` then stays as it was.
pub fn save_safetensors(path: &Path, tensors: &[TensorSource], dtype: SaveDtype) -> Result<u64> {
    let shapes = tensors.iter().map(|tensor| (tensor.name.as_str(), tensor.shape.as_slice()));
    let (header, data_len) = header(path, shapes, dtype)?;
    write_file_with(path, |out| {
        let failed = |e| write_error(path, e);
        out.write_all(&(header.len() as u64).to_le_bytes()).map_err(failed)?;
        out.write_all(&header).map_err(failed)?;
        let (mut values, mut bytes) = (Vec::new(), Vec::new());
        for tensor in tensors {
            values.clear();
            values.resize(tensor.shape.iter().product(), 0.0);
            (tensor.fill)(&mut values)?;
            for chunk in values.chunks(1 << 16) {
                bytes.resize(chunk.len() * dtype.bytes(), 0);
                dtype.encode(chunk, &mut bytes);
                out.write_all(&bytes).map_err(failed)?;
            }
        }
        Ok(())
    })?;
    Ok((8 + header.len() + data_len) as u64)
}

/// The JSON header, padded so that the data after it starts at a multiple of 8, and the length of that data.
pub(super) fn header<'a>(
    path: &Path,
    tensors: impl Iterator<Item = (&'a str, &'a [usize])>,
    dtype: SaveDtype,
) -> Result<(Vec<u8>, usize)> {
    let mut seen = HashSet::new();
    let mut infos = Vec::new();
    let mut start = 0;
    for (name, shape) in tensors {
        if !seen.insert(name) {
            return Err(Error::file(path, format!("two tensors to save are named {name:?}")));
        }
        let len = shape.iter().try_fold(dtype.bytes(), |product, &dim| product.checked_mul(dim));
        let end = len
            .and_then(|len| len.checked_add(start))
            .ok_or_else(|| Error::file(path, format!("{name:?} has shape {shape:?}, too large to save")))?;
        let info = TensorInfo { dtype: dtype.stored(), shape: shape.to_vec(), data_offsets: (start, end) };
        infos.push((name.to_string(), info));
        start = end;
    }
    let format = HashMap::from([("format".to_string(), "pt".to_string())]);
    let mut header = serde_json::to_vec(&Metadata::new(Some(format), infos).at(path)?).at(path)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    Ok((header, start))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::weights::Weights;
    use std::cell::RefCell;
    use std::fs;

    fn tensor<'a>(name: &str, shape: &[usize], values: &'a [f32]) -> TensorSource<'a> {
        let fill = move |out: &mut [f32]| {
            out.copy_from_slice(values);
            Ok(())
        };
        TensorSource { name: name.into(), shape: shape.to_vec(), fill: Box::new(fill) }
    }

    #[test]
    fn f32_round_trips_bit_for_bit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        let values: Vec<f32> = (0..70_001).map(|i| (i as f32 - 35_000.0).sinh().clamp(-1e38, 1e38)).collect();
        let tensors = [
            tensor("z", &[70_001], &values),
            tensor("scalar", &[], &[-0.0]),
            tensor("none", &[0, 4], &[]),
            tensor("a", &[2, 3], &[1.0, f32::MIN_POSITIVE / 2.0, -3.0, 4.0, 5.0, f32::MAX]),
        ];
        let bytes = save_safetensors(&path, &tensors, SaveDtype::F32).unwrap();
        let file = fs::read(&path).unwrap();
        assert_eq!(bytes, file.len() as u64);
        let header_len = u64::from_le_bytes(file[..8].try_into().unwrap());
        assert_eq!(header_len % 8, 0);

        // The crate of the format itself reads it, with the metadata and the order that were asked for.
        let (_, metadata) = safetensors::SafeTensors::read_metadata(&file).unwrap();
        assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
        assert_eq!(metadata.offset_keys(), ["z", "scalar", "none", "a"]);

        let weights = Weights::open(dir.path()).unwrap();
        for source in &tensors {
            let mut expected = vec![0.0; source.shape.iter().product()];
            let mut found = vec![f32::NAN; expected.len()];
            (source.fill)(&mut expected).unwrap();
            weights.read(&source.name, &source.shape, &mut found).unwrap();
            assert!(expected.iter().zip(&found).all(|(a, b)| a.to_bits() == b.to_bits()), "{}", source.name);
        }
    }

    #[test]
    fn bf16_rounds_to_nearest_and_ties_to_even() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        // One unit in the last place of bf16 at 1 is 2^-7; 1 + 2^-8 and 1 + 3 * 2^-8 are ties.
        let ulp = 1.0 / 128.0;
        let given =
            [1.0 + ulp / 2.0, 1.0 + 1.5 * ulp, 1.0 + 0.501 * ulp, -1.0 - ulp / 2.0, -1.0 - 1.5 * ulp, 3.0, -0.0];
        let stored = [1.0, 1.0 + 2.0 * ulp, 1.0 + ulp, -1.0, -1.0 - 2.0 * ulp, 3.0, -0.0];
        save_safetensors(&path, &[tensor("t", &[7], &given)], SaveDtype::Bf16).unwrap();
        let mut found = [f32::NAN; 7];
        Weights::open(dir.path()).unwrap().read("t", &[7], &mut found).unwrap();
        assert_eq!(found.map(f32::to_bits), stored.map(f32::to_bits));
    }

    #[test]
    fn rounding_is_that_of_the_half_crate() {
        let special = [f32::INFINITY, -f32::INFINITY, f32::NAN, -f32::NAN, f32::MAX, f32::MIN_POSITIVE, 0.0, -0.0];
        let spread = (0..1u32 << 20).map(|i| f32::from_bits(i.wrapping_mul(0x9e37_79b9)));
        for value in spread.chain(special).chain([f32::from_bits(0x7f80_0001), f32::from_bits(0x7fff_ffff)]) {
            assert_eq!(to_bf16(value), bf16::from_f32(value).to_bits(), "{value}");
        }
    }

    #[test]
    fn each_tensor_is_filled_once_and_in_turn() {
        let dir = tempfile::tempdir().unwrap();
        let calls = &RefCell::new(Vec::new());
        let source = |name: &'static str| TensorSource {
            name: name.into(),
            shape: vec![3],
            fill: Box::new(move |out| {
                assert_eq!(out, [0.0; 3], "the buffer carries the tensor before");
                out.fill(7.0);
                calls.borrow_mut().push(name);
                Ok(())
            }),
        };
        save_safetensors(&dir.path().join("x"), &[source("b"), source("a"), source("c")], SaveDtype::F32).unwrap();
        assert_eq!(*calls.borrow(), ["b", "a", "c"]);
    }

    #[test]
    fn failures_leave_the_older_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        fs::write(&path, "older").unwrap();
        let twice = [tensor("t", &[1], &[1.0]), tensor("t", &[1], &[2.0])];
        let huge = [tensor("t", &[usize::MAX, 2], &[])];
        let failing = [
            tensor("t", &[1], &[1.0]),
            TensorSource {
                name: "u".into(),
                shape: vec![1],
                fill: Box::new(|_| Err(Error::op("copy", "device lost"))),
            },
        ];
        for (tensors, message) in [(&twice[..], "named \"t\""), (&huge, "too large"), (&failing, "copy: device lost")] {
            let error = save_safetensors(&path, tensors, SaveDtype::F32).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
            assert_eq!(fs::read(&path).unwrap(), b"older");
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        }
    }
}
