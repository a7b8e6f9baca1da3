//! A tiny model that someone else computed: its weights with `expected.safetensors`, what transformers makes of it, run on
//! any device.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use cuvee::checkpoint::Weights;
use cuvee::data::{self, Example, Extent, Sequence, Sharing};
use cuvee::device::{Arena, DType, Dry, Ledger};
use cuvee::model::{Acts, Batch, Checkpoint, Keep, Model, Moments, Options, load};
use cuvee::ops::Backend;
use libtest_mimic::Failed;

pub const LOGPS_TOLERANCE: f64 = 1e-4;
const GRADIENT_TOLERANCE: f64 = 1e-4;

/// What transformers computed: rows padded on the right.
pub struct Expected {
    file: Weights,
    rows: Vec<Vec<u32>>,
    /// `[rows, columns - 1]`
    logps: Vec<f32>,
    columns: usize,
}

impl Expected {
    pub fn read(dir: &Path) -> Result<Self, Failed> {
        let path = dir.join("expected.safetensors");
        let bytes = fs::read(&path)?;
        let tensors = safetensors::SafeTensors::deserialize(&bytes)?;
        let integers = |name: &str| -> Result<Vec<i64>, Failed> {
            let tensor = tensors.tensor(name)?;
            Ok(tensor.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().expect("8 bytes"))).collect())
        };
        let (ids, mask) = (integers("input_ids")?, integers("attention_mask")?);
        let columns = tensors.tensor("input_ids")?.shape()[1];
        let row = |(ids, mask): (&[i64], &[i64])| {
            ids.iter().zip(mask).filter(|(_, m)| **m == 1).map(|(id, _)| *id as u32).collect()
        };
        let rows: Vec<Vec<u32>> = ids.chunks(columns).zip(mask.chunks(columns)).map(row).collect();
        let file = Weights::open_file(&path)?;
        let mut logps = vec![0.0; rows.len() * (columns - 1)];
        file.read("logps", &[rows.len(), columns - 1], &mut logps)?;
        Ok(Self { file, rows, logps, columns })
    }
}

/// A checkpoint's model with everything that a training step needs, in f32.
pub struct Bench<B: Backend> {
    pub device: B,
    pub model: Model<B>,
    pub acts: Acts<B>,
    batch: Batch<B>,
}

impl<B: Backend> Bench<B> {
    pub fn new(device: B, checkpoint: &Checkpoint, host: &data::Batch) -> Result<Self, Failed> {
        let (spec, naming, extent) = (&checkpoint.spec, checkpoint.architecture.naming, host.extent());
        let options = Options::train_all(extent.longest);
        let mut arena = Arena::new(&device, &plan(checkpoint, &extent))?;
        let mut model = Model::new(&mut arena, spec, naming, options);
        let acts = Acts::new(&mut arena, spec, &extent, Keep::Everything)
            .with_moments(&mut arena, Moments { ln_sum_p2: true, ..Moments::default() });
        let mut batch = Batch::new(&mut arena, &extent);
        load(&device, checkpoint, &Weights::open(&checkpoint.dir)?, &mut model)?;
        batch.load(&device, host)?;
        Ok(Self { device, model, acts, batch })
    }

    pub fn forward(&mut self) -> Result<Vec<f32>, Failed> {
        self.model.forward(&self.device, &self.batch, &mut self.acts)?;
        let mut logps = vec![0.0; self.batch.size().targets];
        self.device.read_f32(self.acts.top.logp.top(logps.len()), &mut logps)?;
        Ok(logps)
    }

    pub fn backward(&mut self, dlogp: &[f64]) -> Result<(), Failed> {
        Ok(self.model.backward(&self.device, &self.batch, dlogp, &mut self.acts, None)?)
    }

    /// As a checkpoint would keep them: the way that weights take into a file.
    pub fn gradients(&mut self) -> Result<BTreeMap<String, Vec<f32>>, Failed> {
        let mut tensors: BTreeMap<String, Vec<f32>> = BTreeMap::new();
        for param in self.model.params_mut() {
            let len = param.stored.shape(&param.shape()).iter().product();
            let tensor = tensors.entry(param.stored.tensor.clone()).or_insert_with(|| vec![f32::NAN; len]);
            let mut gradient = vec![0.0; param.value.len()];
            self.device.read_f32(param.grad.as_ref().expect("trained").view(), &mut gradient)?;
            param.stored.insert(&gradient, param.matrix_shape(), tensor);
        }
        Ok(tensors)
    }
}

fn plan(checkpoint: &Checkpoint, extent: &Extent) -> Ledger {
    let mut arena = Dry::arena(DType::F32);
    let options = Options::train_all(extent.longest);
    Model::new(&mut arena, &checkpoint.spec, checkpoint.architecture.naming, options);
    Acts::new(&mut arena, &checkpoint.spec, extent, Keep::Everything)
        .with_moments(&mut arena, Moments { ln_sum_p2: true, ..Moments::default() });
    Batch::new(&mut arena, extent);
    arena.ledger()
}

/// Log-probabilities and gradients of a folder's model on the device.
pub fn check_folder<B: Backend>(device: B, checkpoint: &Checkpoint, expected: &Expected) -> Result<(), Failed> {
    let example = |(row, ids): (usize, &Vec<u32>)| {
        let sequences = vec![Sequence::new(ids.clone(), 1)];
        Example { row, sequences, ..Example::default() }
    };
    let examples: Vec<Example> = expected.rows.iter().enumerate().map(example).collect();
    let host = data::Batch::new(&examples, Sharing::On);
    let mut bench = Bench::new(device, checkpoint, &host)?;
    let logps = bench.forward()?;
    for (row, range) in host.sequences.iter().enumerate() {
        let theirs = &expected.logps[row * (expected.columns - 1)..][..range.len()];
        for (t, (ours, theirs)) in logps[range.clone()].iter().zip(theirs).enumerate() {
            let off = f64::from((ours - theirs).abs());
            if off.is_nan() || off > LOGPS_TOLERANCE {
                return Err(format!("row {row}, token {}: log-prob {ours}, expected {theirs}", t + 1).into());
            }
        }
    }
    // loss = mean over all tokens of -logp
    bench.backward(&vec![-1.0 / logps.len() as f64; logps.len()])?;
    let mut checked = 0;
    for (name, ours) in bench.gradients()? {
        // transformers 5 calls GPT-NeoX's head lm_head in memory and embed_out in files.
        compare_gradient(expected, if name == "embed_out.weight" { "lm_head.weight" } else { &name }, &ours)?;
        checked += 1;
    }
    let named = expected.file.names().filter(|name| name.starts_with("grad.")).count();
    if checked == named { Ok(()) } else { Err(format!("{checked} gradients of {named} checked").into()) }
}

fn compare_gradient(expected: &Expected, name: &str, ours: &[f32]) -> Result<(), Failed> {
    let stored = format!("grad.{name}");
    let shape = expected.file.shape(&stored).ok_or(format!("{stored} is missing"))?.to_vec();
    let mut theirs = vec![0.0; ours.len()];
    expected.file.read(&stored, &shape, &mut theirs)?;
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let off = norm(&mut ours.iter().zip(&theirs).map(|(a, b)| f64::from(a - b)));
    let size = norm(&mut theirs.iter().map(|x| f64::from(*x)));
    let worst = ours.iter().zip(&theirs).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max);
    let largest = theirs.iter().map(|x| f64::from(x.abs())).fold(0.0, f64::max);
    if off > GRADIENT_TOLERANCE * size || worst > GRADIENT_TOLERANCE * largest || off.is_nan() {
        return Err(format!("{stored}: off by {off:e} of {size:e}, worst element {worst:e} of {largest:e}").into());
    }
    Ok(())
}
