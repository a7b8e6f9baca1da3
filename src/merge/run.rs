//! A merge from folders to a folder. Tensors are read part by part, merged in f32 on all cores, rounded once and written
//! behind, so that the disks are what takes time and a few buffers what takes memory.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rayon::prelude::*;

use super::models::{Model, compare_configs, compare_tokenizers, left_out, shared};
use super::parts::{Part, Rule, Source, Tensor, Words};
use super::recipe::Recipe;
use super::registry::{Base, Values};
use super::settings::layer;
use crate::checkpoint::hf::{copy_companions, write_config};
use crate::checkpoint::run_dir::{Claim, check_room, finish, make_room};
use crate::checkpoint::{Layout, SaveDtype, Sink, stream_model, write_dir};
use crate::error::{Error, Result};
use crate::progress::Progress;

/// The largest file that is written, as Hugging Face's libraries have it.
const MAX_SHARD: u64 = 5_000_000_000;
/// Bytes that are handed to the writer at once.
const BUFFER: usize = 1 << 23;

/// A merge whose models were found to fit.
pub struct Merge {
    recipe: Recipe,
    base: Option<Model>,
    models: Vec<Model>,
    tensors: Vec<Layout>,
    layers: usize,
    pub dtype: SaveDtype,
    /// What the user should know before it starts.
    pub warnings: Vec<String>,
    max_shard: u64,
}

/// Random bits for (model, tensor, first element, one word for each element).
pub type Draw<'a> = &'a (dyn Fn(usize, &str, usize, &mut [u32]) + Sync);

/// What a merge came to.
#[derive(Debug)]
pub struct Done {
    pub tensors: usize,
    pub parameters: usize,
    pub bytes_written: u64,
    pub bytes_read: u64,
    pub time: Duration,
    /// Where a finished run that was in the way is now.
    pub moved: Option<PathBuf>,
}

impl Merge {
    /// Opens the models of a recipe and checks that they can be merged: headers are read, values are not.
    pub fn open(recipe: Recipe) -> Result<Self> {
        recipe.check()?;
        let base = match recipe.method.base {
            Base::Required => recipe.base.as_deref().map(Model::open).transpose()?,
            Base::None => None,
        };
        let models = recipe.models.iter().map(|input| Model::open(&input.model)).collect::<Result<Vec<_>>>()?;
        let all: Vec<&Model> = base.iter().chain(&models).collect();
        let tensors = shared(&all)?;
        if tensors.is_empty() {
            return Err(Error::file(&all[0].path, "has no tensors to merge"));
        }
        let layers = tensors.iter().filter_map(|tensor| layer(&tensor.name)).max().map_or(0, |last| last + 1);
        if let Some(named) = recipe.layers.filter(|named| *named != layers) {
            let detail = format!("slices end at layer {named}, the models have {layers}; cuvee does not move layers");
            return Err(Error::file(&all[0].path, detail));
        }
        let mut warnings = Vec::new();
        for other in &all[1..] {
            warnings.extend(compare_tokenizers(all[0], other)?);
            warnings.extend(compare_configs(all[0], other));
        }
        if let [first, ..] = left_out(all[0])[..] {
            let count = left_out(all[0]).len();
            warnings
                .push(format!("{count} tensors are left out, such as {first:?}: buffers and tied heads are made anew"));
        }
        let dtype = recipe.dtype.unwrap_or_else(|| most_common(all[0], &tensors));
        let merge = Self { recipe, base, models, tensors, layers, dtype, warnings, max_shard: MAX_SHARD };
        merge.tensors.iter().try_for_each(|tensor| merge.values(tensor).map(drop))?;
        Ok(merge)
    }

    /// The same, in files of at most so many bytes of tensors.
    pub fn with_max_shard(self, max_shard: u64) -> Self {
        Self { max_shard, ..self }
    }

    pub fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    pub fn tensors(&self) -> &[Layout] {
        &self.tensors
    }

    /// The parameters of a tensor's merge.
    pub fn values(&self, tensor: &Layout) -> Result<Values> {
        self.recipe.values(&tensor.name, self.layers)
    }

    pub fn parameters(&self) -> usize {
        self.tensors.iter().map(len).sum()
    }

    /// Writes the merged model as `output`, which appears whole or not at all. A finished run of that name is moved aside;
    /// anything else there is an error, before any work is done. `finishing` may add files to the folder.
    pub fn run(&self, output: &Path, draw: Draw, finishing: impl FnOnce(&Path) -> Result<()>) -> Result<Done> {
        let start = Instant::now();
        check_room(output)?;
        if let Some(parent) = output.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            std::fs::create_dir_all(parent).map_err(|e| Error::file(parent, format!("cannot be created: {e}")))?;
        }
        let (mut written, mut moved) = (0, None);
        write_dir(output, |folder| {
            written = stream_model(folder, &self.tensors, self.dtype, self.max_shard, |sink| self.produce(sink, draw))?;
            write_config(self.recipe.first(), folder, self.dtype, None)?;
            copy_companions(self.recipe.first(), folder)?;
            finishing(folder)?;
            finish(folder)?;
            if let Claim::Moved(to) = make_room(output)? {
                moved = Some(to);
            }
            Ok(())
        })?;
        Ok(Done {
            tensors: self.tensors.len(),
            parameters: self.parameters(),
            bytes_written: written,
            bytes_read: self.all().map(|model| self.bytes_of(model)).sum(),
            time: start.elapsed(),
            moved,
        })
    }

    fn all(&self) -> impl Iterator<Item = &Model> {
        self.base.iter().chain(&self.models)
    }

    fn bytes_of(&self, model: &Model) -> u64 {
        let bytes = |tensor: &Layout| len(tensor) * model.weights.stored_as(&tensor.name).map_or(0, SaveDtype::bytes);
        self.tensors.iter().map(bytes).sum::<usize>() as u64
    }

    /// Every tensor's bytes, in order.
    fn produce(&self, sink: &Sink, draw: Draw) -> Result<()> {
        let mut progress = Progress::new("merging", self.tensors.len() as u64, "tensors");
        for (i, layout) in self.tensors.iter().enumerate() {
            // The next tensor comes from the disk while this one is merged.
            let coming = self.tensors.get(i + 1).filter(|_| i > 0).into_iter();
            let coming = if i == 0 { self.tensors.iter().take(2).collect() } else { coming.collect::<Vec<_>>() };
            coming.iter().for_each(|next| self.all().for_each(|model| model.weights.prefetch(&next.name)));
            progress.at(i as u64, &layout.name);
            self.merge(layout, sink, draw)?;
        }
        progress.finish();
        Ok(())
    }

    fn merge(&self, layout: &Layout, sink: &Sink, draw: Draw) -> Result<()> {
        let base = self.base.as_ref().map(|model| model.tensor(&layout.name));
        let models: Vec<_> = self.models.iter().map(|model| model.tensor(&layout.name)).collect();
        let tensor = Tensor {
            shape: layout.shape.clone(),
            base: base.as_ref().map(|base| base as &dyn Source<f32>),
            models: models.iter().map(|model| model as &dyn Source<f32>).collect(),
        };
        let words = |model: usize, start: usize, out: &mut [u32]| draw(model, &layout.name, start, out);
        let words: Words = &words;
        let rule = self.recipe.method.prepare(&tensor, &self.values(layout)?, words).map_err(|e| match e {
            Error::Option { key, detail } => Error::Option { key, detail: format!("for {:?}: {detail}", layout.name) },
            other => other,
        })?;
        self.write(layout, &tensor, &rule, sink)
    }

    fn write(&self, layout: &Layout, tensor: &Tensor<f32>, rule: &Rule<f32>, sink: &Sink) -> Result<()> {
        let part_bytes = tensor.part_len() * self.dtype.bytes();
        let parts_at_once = (BUFFER / part_bytes).max(1);
        let parts = tensor.len().div_ceil(tensor.part_len());
        for first in (0..parts).step_by(parts_at_once) {
            let elements = (tensor.len() - first * tensor.part_len()).min(parts_at_once * tensor.part_len());
            let mut bytes = sink.buffer();
            bytes.resize(elements * self.dtype.bytes(), 0);
            let merged = |part: &mut Part<f32>, (i, bytes): (usize, &mut [u8])| {
                tensor.load(first + i, part)?;
                rule(part);
                check_finite(layout, &part.out, part.start, self.dtype)?;
                self.dtype.encode(&part.out, bytes);
                Ok(())
            };
            bytes.par_chunks_mut(part_bytes).enumerate().map_init(Part::default, merged).collect::<Result<()>>()?;
            sink.write(bytes)?;
        }
        Ok(())
    }
}

/// Inputs are finite, so what is not has overflowed, in f32 or in what is written.
fn check_finite(layout: &Layout, values: &[f32], start: usize, dtype: SaveDtype) -> Result<()> {
    let largest = if dtype == SaveDtype::F16 { 65504.0 } else { f32::MAX };
    // Without an early exit this pass is vectorised; the search runs only when it will succeed.
    if values.iter().fold(true, |all, value| all & (value.abs() <= largest)) {
        return Ok(());
    }
    let bad = values.iter().position(|value| value.is_nan() || value.abs() > largest).expect("one is out of range");
    let (index, value) = (start + bad, values[bad]);
    let advice =
        if dtype == SaveDtype::F16 { "choose smaller weights, or --dtype bf16" } else { "choose smaller weights" };
    let detail = format!("{:?} becomes {value} at index {index}, more than can be written; {advice}", layout.name);
    Err(Error::op("merge", detail))
}

fn len(tensor: &Layout) -> usize {
    tensor.shape.iter().product()
}

/// The type that most values of a model have.
fn most_common(model: &Model, tensors: &[Layout]) -> SaveDtype {
    let count = |dtype: SaveDtype| -> usize {
        tensors.iter().filter(|tensor| model.weights.stored_as(&tensor.name) == Some(dtype)).map(len).sum()
    };
    let types = [SaveDtype::F16, SaveDtype::Bf16, SaveDtype::F32];
    types.into_iter().max_by_key(|dtype| count(*dtype)).expect("there are types")
}
