//! The trained model with everything a step needs.

use crate::data::{self, Extent};
use crate::device::{Arena, DType, Device, Dry, Kind, Ledger, Tensor, View, range};
use crate::error::Result;
use crate::model::{Acts, Batch, Checkpoint, Keep, Model, Options, Spec};
use crate::ops::{Backend, sum_squares};
use crate::optim::{Entry, GradNorm, Hyper, Optimizer};

/// What a policy is built from.
#[derive(Clone, Copy)]
pub struct Blueprint<'a> {
    pub checkpoint: &'a Checkpoint,
    pub optimizer: &'a Entry,
    pub hyper: Hyper,
    /// The largest micro-batch, of training or evaluation.
    pub largest: Extent,
    /// The longest sequence that is trained on, scored or generated.
    pub positions: usize,
    pub keep: Keep,
}

pub struct Policy<D: Device> {
    pub model: Model<D>,
    pub optimizer: Optimizer<D>,
    /// `[1, 1]`, for the search for what is not finite.
    probe: Tensor<D>,
    largest: Extent,
    keep: Keep,
    /// There while batches are run; loading, sampling and saving need its memory for themselves.
    pass: Option<Pass<D>>,
}

/// Activations and the batch that they belong to.
struct Pass<D: Device> {
    acts: Acts<D>,
    batch: Batch<D>,
}

impl<D: Device> Pass<D> {
    fn new(arena: &mut Arena<D>, spec: &Spec, largest: &Extent, keep: Keep) -> Self {
        Self { acts: Acts::new(arena, spec, largest, keep), batch: Batch::new(arena, largest) }
    }

    fn plan(storage: DType, spec: &Spec, largest: &Extent, keep: Keep) -> Ledger {
        Dry::measure(storage, |arena| Pass::new(arena, spec, largest, keep))
    }
}

impl Blueprint<'_> {
    /// Weights, gradients and states: there for the whole run.
    fn run<D: Device>(&self, arena: &mut Arena<D>) -> (Model<D>, Optimizer<D>, Tensor<D>) {
        let options = Options::train_all(self.positions);
        let mut model = Model::new(arena, &self.checkpoint.spec, self.checkpoint.architecture.naming, options);
        let optimizer = Optimizer::new(arena, self.optimizer, self.hyper, &model.params_mut());
        (model, optimizer, arena.floats(Kind::Workspace, 1, 1))
    }

    /// Memory of the run, and of a training step besides, on a device that stores `storage`.
    pub fn plan(&self, storage: DType) -> (Ledger, Ledger) {
        let run = Dry::measure(storage, |arena| self.run(arena));
        (run, Pass::<Dry>::plan(storage, &self.checkpoint.spec, &self.largest, self.keep))
    }

    /// The policy as far as it lives for the whole run; its first batch takes the activations.
    pub fn build<B: Backend>(&self, device: &B) -> Result<Policy<B>> {
        let (run, _) = self.plan(device.storage());
        let (model, optimizer, probe) = self.run(&mut Arena::new(device, &run)?);
        Ok(Policy { model, optimizer, probe, largest: self.largest, keep: self.keep, pass: None })
    }
}

impl<B: Backend> Policy<B> {
    /// Log-probabilities of the batch's targets, nats.
    pub fn forward(&mut self, device: &B, host: &data::Batch) -> Result<Vec<f32>> {
        let _range = range(c"forward");
        let pass = match &mut self.pass {
            Some(pass) => pass,
            None => {
                let (spec, largest, keep) = (&self.model.spec, &self.largest, self.keep);
                let mut arena = Arena::new(device, &Pass::<Dry>::plan(device.storage(), spec, largest, keep))?;
                self.pass.insert(Pass::new(&mut arena, spec, largest, keep))
            }
        };
        pass.batch.load(device, host)?;
        self.model.forward(device, &pass.batch, &mut pass.acts)?;
        let mut logps = vec![0.0; host.targets.len()];
        device.read_f32(pass.acts.top.logp.top(logps.len()), &mut logps)?;
        Ok(logps)
    }

    /// Frees the activations until the next batch: what follows needs memory of its own.
    pub fn rest(&mut self) {
        self.pass = None;
    }

    /// Adds to the gradients; of the batch that `forward` saw last.
    pub fn backward(&mut self, device: &B, dlogp: &[f64]) -> Result<()> {
        let _range = range(c"backward");
        let pass = self.pass.as_mut().expect("a backward follows its forward");
        self.model.backward(device, &pass.batch, dlogp, &mut pass.acts, None)
    }

    pub fn grad_norm(&mut self, device: &B) -> Result<GradNorm> {
        let _range = range(c"gradient norm");
        self.optimizer.grad_norm(device, &self.model.params_mut())
    }

    pub fn update(&mut self, device: &B, step: u64, learning_rate: f64, norm: f64) -> Result<()> {
        let _range = range(c"update");
        self.optimizer.update(device, &mut self.model.params_mut(), step, learning_rate, norm)
    }

    /// The first weight that holds a NaN or an infinity. A rounded weight shows those of its master.
    pub fn first_bad_weight(&mut self, device: &B) -> Result<Option<String>> {
        for param in self.model.params_mut() {
            if !finite(device, param.view(), &mut self.probe)? {
                return Ok(Some(param.name.clone()));
            }
        }
        Ok(None)
    }

    /// The first thing on the way from weights to log-probabilities that holds a NaN or an infinity, after a
    /// forward pass whose result did.
    pub fn first_bad_tensor(&mut self, device: &B) -> Result<String> {
        if let Some(name) = self.first_bad_weight(device)? {
            return Ok(format!("the weight {name}"));
        }
        let pass = self.pass.as_ref().expect("a forward pass came before");
        let rows = pass.batch.size().rows;
        for layer in 0..=self.model.spec.layers {
            if let Some(residual) = pass.acts.kept_residual(layer)
                && !finite(device, residual.top(rows), &mut self.probe)?
            {
                return Ok(match layer {
                    0 => "the embeddings of the batch".to_string(),
                    _ => format!("the hidden states after layer {}", layer - 1),
                });
            }
        }
        Ok("the head's log-probabilities".to_string())
    }
}

/// Whether every element is a number. Squares may overflow where elements do not, so a bad sum is looked into.
fn finite<B: Backend>(device: &B, x: View<B>, probe: &mut Tensor<B>) -> Result<bool> {
    device.sum_squares(sum_squares::Args { x, sum: probe.view_mut() })?;
    let mut sum = [0.0];
    device.read_f64(probe.view(), &mut sum)?;
    if sum[0].is_finite() {
        return Ok(true);
    }
    let mut values = vec![0.0; x.len()];
    device.read_f32(x, &mut values)?;
    Ok(values.iter().all(|x| x.is_finite()))
}
