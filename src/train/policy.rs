//! The trained model with everything a step needs.

use crate::data::{self, Extent};
use crate::device::{Arena, Device, Dry, Kind, Ledger, Tensor, View};
use crate::error::Result;
use crate::model::{Acts, Batch, Checkpoint, Keep, Model, Options};
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
    acts: Acts<D>,
    batch: Batch<D>,
    /// `[1, 1]`, for the search for what is not finite.
    probe: Tensor<D>,
}

impl Blueprint<'_> {
    /// Weights, gradients and states: there for the whole run.
    fn run<D: Device>(&self, arena: &mut Arena<D>) -> (Model<D>, Optimizer<D>) {
        let options = Options::train_all(self.positions);
        let mut model = Model::new(arena, &self.checkpoint.spec, self.checkpoint.architecture.naming, options);
        let optimizer = Optimizer::new(arena, self.optimizer, self.hyper, &model.params_mut());
        (model, optimizer)
    }

    /// Activations.
    fn phase<D: Device>(&self, arena: &mut Arena<D>) -> (Acts<D>, Batch<D>, Tensor<D>) {
        let acts = Acts::new(arena, &self.checkpoint.spec, &self.largest, self.keep);
        (acts, Batch::new(arena, &self.largest), arena.floats(Kind::Workspace, 1, 1))
    }

    /// Memory of the run, and of a training step besides.
    pub fn plan(&self) -> (Ledger, Ledger) {
        let (mut run, mut phase) = (Dry::arena(), Dry::arena());
        self.run(&mut run);
        self.phase(&mut phase);
        (run.ledger(), phase.ledger())
    }

    pub fn build<B: Backend>(&self, device: &B) -> Result<Policy<B>> {
        let (run, phase) = self.plan();
        let (model, optimizer) = self.run(&mut Arena::new(device, &run)?);
        let (acts, batch, probe) = self.phase(&mut Arena::new(device, &phase)?);
        Ok(Policy { model, optimizer, acts, batch, probe })
    }
}

impl<B: Backend> Policy<B> {
    /// Log-probabilities of the batch's targets, nats.
    pub fn forward(&mut self, device: &B, host: &data::Batch) -> Result<Vec<f32>> {
        self.batch.load(device, host)?;
        self.model.forward(device, &self.batch, &mut self.acts)?;
        let mut logps = vec![0.0; host.targets.len()];
        device.read_f32(self.acts.top.logp.top(logps.len()), &mut logps)?;
        Ok(logps)
    }

    /// Adds to the gradients; of the batch that `forward` saw last.
    pub fn backward(&mut self, device: &B, dlogp: &[f64]) -> Result<()> {
        self.model.backward(device, &self.batch, dlogp, &mut self.acts)
    }

    pub fn grad_norm(&mut self, device: &B) -> Result<GradNorm> {
        self.optimizer.grad_norm(device, &self.model.params_mut())
    }

    pub fn update(&mut self, device: &B, step: u64, learning_rate: f64, norm: f64) -> Result<()> {
        self.optimizer.update(device, &mut self.model.params_mut(), step, learning_rate, norm)
    }

    /// The first weight that holds a NaN or an infinity.
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
        let rows = self.batch.size().rows;
        for layer in 0..=self.model.spec.layers {
            if let Some(residual) = self.acts.kept_residual(layer)
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
