use std::ops::Range;

use half::bf16;

use super::cache::Value;
use crate::data::{self, Example, Extent, Packing};
use crate::device::{Arena, Device, Dry, Ledger, Storage, range};
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

fn build<D: Device>(
    arena: &mut Arena<D>,
    (checkpoint, init): (&Checkpoint, Init),
    largest: &Extent,
) -> (Model<D>, Acts<D>, Batch<D>) {
    let options = Options::frozen(largest.longest).holding(checkpoint, init).with_adapters(checkpoint);
    let model = Model::new(arena, &checkpoint.spec, checkpoint.architecture.naming, options);
    let acts = Acts::new(arena, &checkpoint.spec, largest, Keep::Nothing).with_low_rank(arena, model.widest_rank());
    (model, acts, Batch::new(arena, largest))
}

/// Memory of a scorer for batches up to `largest`, on a device with this storage.
pub fn plan(storage: Storage, model: (&Checkpoint, Init), largest: &Extent) -> Ledger {
    Dry::measure(storage, |arena| build(arena, model, largest))
}

impl<'a, B: Backend> Scorer<'a, B> {
    pub fn new(device: &'a B, checkpoint: &'a Checkpoint, init: Init, largest: &Extent) -> Result<Self> {
        let mut arena = Arena::new(device, &plan(device.keeps(), (checkpoint, init), largest))?;
        let (mut model, acts, batch) = build(&mut arena, (checkpoint, init), largest);
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
        self.each_batch(examples, packing, done, 1, |scorer, values| {
            let Self { device, checkpoint, model, acts, batch } = scorer;
            let what = match checkpoint.spec.head {
                Head::Score => {
                    model.scores(*device, batch, acts)?;
                    "score"
                }
                Head::Tied | Head::Own => {
                    model.forward(*device, batch, acts)?;
                    "log-probability"
                }
            };
            device.read_f32(acts.top.logp.top(values.len()), values)?;
            Ok(what)
        })
    }

    /// `[examples][sequences][scored tokens * hidden]` what the head reads to predict each token, all finite.
    pub fn hidden(
        &mut self,
        examples: &[&Example],
        packing: Packing,
        done: &mut dyn FnMut(usize),
    ) -> Result<Vec<Vec<Vec<bf16>>>> {
        let width = self.checkpoint.spec.hidden;
        self.each_batch(examples, packing, done, width, |scorer, values| {
            let Self { device, model, acts, batch, .. } = scorer;
            model.hidden(*device, batch, acts, None)?;
            let mut exact = vec![0.0; values.len()];
            device.read_f32(acts.top.normed.top(values.len() / width), &mut exact)?;
            values.iter_mut().zip(exact).for_each(|(value, exact)| *value = bf16::from_f32(exact));
            Ok("hidden state")
        })
    }

    /// Runs every batch; `run` reads `width` values of each scored token and says what they are.
    fn each_batch<V: Value>(
        &mut self,
        examples: &[&Example],
        packing: Packing,
        done: &mut dyn FnMut(usize),
        width: usize,
        run: impl Fn(&mut Self, &mut [V]) -> Result<&'static str>,
    ) -> Result<Vec<Vec<Vec<V>>>> {
        let _range = range(c"score");
        let mut all = Vec::with_capacity(examples.len());
        for (range, host) in packing.batches(examples) {
            self.batch.load(self.device, &host)?;
            let mut values = vec![V::zeroed(); host.targets.len() * width];
            let what = run(self, &mut values)?;
            for (example, values) in examples[range.clone()].iter().zip(by_example(&host, &values, width)) {
                if values.iter().flatten().any(|x| !x.finite()) {
                    let row = example.row;
                    let detail = format!("row {row} gets a {what} that is not finite; are the weights sound?");
                    return Err(Error::file(&self.checkpoint.dir, detail));
                }
                all.push(values);
            }
            done(range.end);
        }
        Ok(all)
    }
}

fn by_example<V: Value>(batch: &data::Batch, values: &[V], width: usize) -> impl Iterator<Item = Vec<Vec<V>>> {
    let of = move |tokens: &Range<usize>| values[tokens.start * width..tokens.end * width].to_vec();
    batch.examples.iter().map(move |example| batch.sequences[example.clone()].iter().map(of).collect())
}
