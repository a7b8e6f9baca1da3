//! Adapters that PEFT wrote: the log-probabilities and the gradients of A and B that PEFT computes with them, in float64.

use std::path::{Path, PathBuf};

use cuvee::checkpoint::Weights;
use cuvee::data::{self, Example, Sequence, Sharing};
use cuvee::device::{Arena, Cpu, DType, Device, Dry, Reference};
use cuvee::model::{Acts, Batch, Checkpoint, Init, Keep, Lora, Model, Options, Reader};
use cuvee::ops::Backend;
use libtest_mimic::{Completion, Failed, Trial};

/// Tokens of a row.
const COLUMNS: usize = 9;
/// Name, base, adapters with weights.
type Case = (&'static str, &'static str, &'static [(&'static str, f64)]);
const CASES: [Case; 5] = [
    ("a", "base", &[("a", 1.0)]),
    ("b", "base", &[("b", 1.0)]),
    ("c", "base", &[("c", 1.0)]),
    ("c and d", "base", &[("c", 0.3), ("d", 0.7)]),
    ("conv", "gpt2", &[("conv", 1.0)]),
];

pub fn trials(root: &Path) -> Vec<Trial> {
    let forward = CASES.map(|case| {
        let root = root.to_path_buf();
        Trial::ignorable_test(format!("lora::{}", case.0.replace(' ', "_")), move || {
            forward(&root, Reference, case, 1e-6)?;
            forward(&root, Cpu::new(1)?, case, 1e-5)?;
            Ok(Completion::Completed)
        })
    });
    let root = root.to_path_buf();
    let backward = Trial::ignorable_test("lora::gradients", move || {
        backward(&root, Reference, 1e-6)?;
        backward(&root, Cpu::new(1)?, 1e-5)?;
        Ok(Completion::Completed)
    });
    forward.into_iter().chain([backward]).collect()
}

fn peft(root: &Path, name: &str) -> PathBuf {
    root.join("tests/data/peft").join(name)
}

fn expected(root: &Path) -> Result<Weights, Failed> {
    Ok(Weights::open_file(&root.join("tests/data/lora/expected.safetensors"))?)
}

fn host(root: &Path) -> Result<data::Batch, Failed> {
    let bytes = std::fs::read(root.join("tests/data/lora/expected.safetensors"))?;
    let tensors = safetensors::SafeTensors::deserialize(&bytes)?;
    let ids = tensors.tensor("input_ids")?;
    let ids = ids.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().expect("8 bytes")) as u32);
    let ids: Vec<u32> = ids.collect();
    let example = |(row, ids): (usize, &[u32])| {
        let sequences = vec![Sequence::new(ids.to_vec(), 1)];
        Example { row, sequences, ..Example::default() }
    };
    let examples: Vec<Example> = ids.chunks(COLUMNS).enumerate().map(example).collect();
    Ok(data::Batch::new(&examples, Sharing::Off))
}

struct Bench<B: Backend> {
    device: B,
    model: Model<B>,
    acts: Acts<B>,
    batch: Batch<B>,
}

impl<B: Backend> Bench<B> {
    fn new(device: B, checkpoint: &Checkpoint, lora: Option<&Lora>, host: &data::Batch) -> Result<Self, Failed> {
        fn build<D: Device>(
            arena: &mut Arena<D>,
            checkpoint: &Checkpoint,
            lora: Option<&Lora>,
            host: &data::Batch,
        ) -> (Model<D>, Acts<D>, Batch<D>) {
            let (spec, extent) = (&checkpoint.spec, host.extent());
            let options = Options { lora, ..Options::frozen(extent.longest) }.with_adapters(checkpoint);
            let model = Model::new(arena, spec, checkpoint.architecture.naming, options);
            let acts = Acts::new(arena, spec, &extent, Keep::Everything).with_low_rank(arena, model.widest_rank());
            (model, acts, Batch::new(arena, &extent))
        }
        let mut dry = Dry::arena(DType::F32);
        build(&mut dry, checkpoint, lora, host);
        let bytes = dry.ledger().total() / Dry::width(DType::F32) * B::width(DType::F32);
        let mut arena = Arena::with_bytes(&device, bytes)?;
        let (mut model, acts, mut batch) = build(&mut arena, checkpoint, lora, host);
        Init::Checkpoint.fill(&device, checkpoint, &mut model)?;
        batch.load(&device, host)?;
        Ok(Self { device, model, acts, batch })
    }

    fn forward(&mut self, targets: usize) -> Result<Vec<f64>, Failed> {
        self.model.forward(&self.device, &self.batch, &mut self.acts)?;
        let mut logps = vec![0.0; targets];
        self.device.read_f64(self.acts.top.logp.top(targets), &mut logps)?;
        Ok(logps)
    }
}

fn assert_close(what: &str, ours: &[f64], theirs: &[f32], tolerance: f64) -> Result<(), Failed> {
    let largest = theirs.iter().fold(1.0f64, |a, b| a.max(f64::from(b.abs())));
    let off = ours.iter().zip(theirs).map(|(a, b)| (a - f64::from(*b)).abs()).fold(0.0, f64::max);
    match ours.len() == theirs.len() && off <= tolerance * largest {
        true => Ok(()),
        false => Err(format!("{what}: off by {off:e} of {largest}").into()),
    }
}

fn forward<B: Backend>(root: &Path, device: B, (name, base, adapters): Case, tolerance: f64) -> Result<(), Failed> {
    let open = Checkpoint::open(&peft(root, base))?;
    let checkpoint =
        adapters.iter().try_fold(open, |open, (name, weight)| open.with_adapter(&peft(root, name), *weight))?;
    let host = host(root)?;
    let logps = Bench::new(device, &checkpoint, None, &host)?.forward(host.targets.len())?;
    let mut theirs = vec![0.0; logps.len()];
    expected(root)?.read(&format!("logps {name}"), &[logps.len() / (COLUMNS - 1), COLUMNS - 1], &mut theirs)?;
    assert_close("log-probabilities", &logps, &theirs, tolerance)
}

/// The adapter c as one that trains.
fn backward<B: Backend>(root: &Path, device: B, tolerance: f64) -> Result<(), Failed> {
    let (checkpoint, host) = (Checkpoint::open(&peft(root, "base"))?, host(root)?);
    let lora = Lora { rank: 2, alpha: 3.0, rslora: false, targets: Vec::new(), start: None };
    let mut bench = Bench::new(device, &checkpoint, Some(&lora), &host)?;
    let file = Weights::open_file(&peft(root, "c").join("adapter_model.safetensors"))?;
    let mut reader = Reader::default();
    for param in bench.model.adapter_mut() {
        param.write(&bench.device, reader.read(&file, &param.stored.tensor, param)?)?;
    }
    let targets = host.targets.len();
    let (logps, expected) = (bench.forward(targets)?, expected(root)?);
    let mut theirs = vec![0.0; targets];
    expected.read("logps c", &[targets / (COLUMNS - 1), COLUMNS - 1], &mut theirs)?;
    assert_close("log-probabilities", &logps, &theirs, tolerance)?;
    let Bench { device, model, acts, batch } = &mut bench;
    model.zero_grads(device)?;
    model.backward(device, batch, &vec![-1.0 / targets as f64; targets], acts, None)?;
    let mut checked = 0;
    for param in model.trained_mut() {
        let gradient = param.grad.as_ref().expect("trained");
        let (mut ours, mut theirs) = (vec![0.0; gradient.len()], vec![0.0; gradient.len()]);
        device.read_f64(gradient.view(), &mut ours)?;
        expected.read(&format!("grad {}", param.name), &param.shape(), &mut theirs)?;
        assert_close(&param.name, &ours, &theirs, tolerance)?;
        checked += 1;
    }
    let named = expected.names().filter(|name| name.starts_with("grad ")).count();
    if checked == named { Ok(()) } else { Err(format!("{checked} gradients of {named} checked").into()) }
}
