use crate::data::{self, Example, Extent, Packing};
use crate::device::{Arena, DType, Device, Dry, Ledger, range};
use crate::error::{Error, Result};
use crate::model::{Acts, Batch, Checkpoint, Head, Init, Keep, Model, Options};
use crate::ops::Backend;

/// A frozen model that gives log-probabilities or, a reward model, scores.
pub struct Scorer<'a, B: Backend> {
    device: &'a B,
    /// For messages.
    checkpoint: &'a Checkpoint,
    model: Model<B>,
    acts: Acts<B>,
    batch: Batch<B>,
}

fn build<D: Device>(arena: &mut Arena<D>, checkpoint: &Checkpoint, largest: &Extent) -> (Model<D>, Acts<D>, Batch<D>) {
    let options = Options::frozen(largest.longest);
    let model = Model::new(arena, &checkpoint.spec, checkpoint.architecture.naming, options);
    (model, Acts::new(arena, &checkpoint.spec, largest, Keep::Nothing), Batch::new(arena, largest))
}

/// Memory of a scorer for batches up to `largest`, on a device that stores `storage`.
pub fn plan(storage: DType, checkpoint: &Checkpoint, largest: &Extent) -> Ledger {
    Dry::measure(storage, |arena| build(arena, checkpoint, largest))
}

impl<'a, B: Backend> Scorer<'a, B> {
    pub fn new(device: &'a B, checkpoint: &'a Checkpoint, init: Init, largest: &Extent) -> Result<Self> {
        let mut arena = Arena::new(device, &plan(device.storage(), checkpoint, largest))?;
        let (mut model, acts, batch) = build(&mut arena, checkpoint, largest);
        init.fill(device, checkpoint, &mut model)?;
        Ok(Self { device, checkpoint, model, acts, batch })
    }

    /// `[examples][sequences][scored tokens]`, nats, all finite; of a reward model one score for each sequence, if the
    /// packing reads the [last](data::Read::Last) tokens. `done` is told how many examples are finished.
    pub fn score(
        &mut self,
        examples: &[&Example],
        packing: Packing,
        done: &mut dyn FnMut(usize),
    ) -> Result<Vec<Vec<Vec<f32>>>> {
        let _range = range(c"score");
        let mut all = Vec::with_capacity(examples.len());
        for (range, host) in packing.batches(examples) {
            self.batch.load(self.device, &host)?;
            let what = match self.checkpoint.spec.head {
                Head::Score => {
                    self.model.scores(self.device, &self.batch, &mut self.acts)?;
                    "score"
                }
                Head::Tied | Head::Own => {
                    self.model.forward(self.device, &self.batch, &mut self.acts)?;
                    "log-probability"
                }
            };
            let mut logps = vec![0.0; host.targets.len()];
            self.device.read_f32(self.acts.top.logp.top(logps.len()), &mut logps)?;
            for (example, logps) in examples[range.clone()].iter().zip(by_example(&host, &logps)) {
                if logps.iter().flatten().any(|x| !x.is_finite()) {
                    let row = example.row;
                    let detail = format!("row {row} gets a {what} that is not finite; are the weights sound?");
                    return Err(Error::file(&self.checkpoint.dir, detail));
                }
                all.push(logps);
            }
            done(range.end);
        }
        Ok(all)
    }
}

fn by_example<'a>(batch: &'a data::Batch, logps: &'a [f32]) -> impl Iterator<Item = Vec<Vec<f32>>> + 'a {
    let sequences = |range: &std::ops::Range<usize>| batch.sequences[range.clone()].iter();
    batch.examples.iter().map(move |example| sequences(example).map(|tokens| logps[tokens.clone()].to_vec()).collect())
}
