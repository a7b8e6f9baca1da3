//! The trained model with everything a step needs.

use half::bf16;

use super::moving::MovingReference;
use super::settings::Moving;
use crate::data::{self, Extent};
use crate::device::{Arena, DType, Device, Dry, Kind, Ledger, Storage, Tensor, View, range};
use crate::error::Result;
use crate::model::{
    Acts, Batch, Checkpoint, Head, Init, Keep, KlActs, KlTerm, Lora, Model, Moments, Options, Param, RefHeads, Spec,
    Terms, ValueActs, ValueHead, ValueTerm,
};
use crate::objectives::Needs;
use crate::ops::{Backend, sum_squares};
use crate::optim::{GradNorm, Hyper, Method, Optimizer, Schedule};

/// What a policy is built from.
#[derive(Clone)]
pub struct Blueprint<'a> {
    pub checkpoint: &'a Checkpoint,
    /// What gives it its first values.
    pub init: Init,
    pub method: Method,
    pub hyper: Hyper,
    pub schedule: Schedule,
    /// The largest micro-batch, of training or evaluation.
    pub largest: Extent,
    /// The longest sequence that is trained on, scored or generated.
    pub positions: usize,
    pub keep: Keep,
    /// What trains in place of the weights, if not they.
    pub lora: Option<&'a Lora>,
    pub extras: Extras<'a>,
}

/// What some objectives need besides the policy itself.
#[derive(Clone, Default)]
pub struct Extras<'a> {
    /// A reference that follows the policy, and the model it starts as.
    pub moving: Option<(Moving, &'a Checkpoint)>,
    /// References whose distributions the policy's are compared with, over the whole vocabulary.
    pub compared: Vec<&'a Checkpoint>,
    pub moments: Moments,
    /// A value for each scored token.
    pub values: bool,
}

/// Of each target's distribution, for an objective that needs these.
pub fn moments(needs: &Needs) -> Moments {
    Moments { entropy: needs.entropy, ln_sum_p2: needs.ln_sum_p2 }
}

pub struct Policy<D: Device> {
    pub model: Model<D>,
    pub optimizer: Optimizer<D>,
    pub moving: Option<MovingReference<D>>,
    /// Of the references that distributions are compared with.
    pub heads: Option<RefHeads<D>>,
    /// Trained beside the model, where the objective reads values.
    pub value: Option<ValueHead<D>>,
    /// `[1, 1]`, for the search for what is not finite.
    probe: Tensor<D>,
    sizes: Sizes,
    pass_ledger: Ledger,
    /// There while batches are run; loading, sampling and saving need its memory for themselves.
    pass: Option<Pass<D>>,
}

/// Activations and the batch that they belong to.
struct Pass<D: Device> {
    acts: Acts<D>,
    kl: Option<KlActs<D>>,
    value: Option<ValueActs<D>>,
    batch: Batch<D>,
}

/// What a [`Pass`] is made for.
#[derive(Clone, Copy)]
struct Sizes {
    largest: Extent,
    keep: Keep,
    /// Of adapters.
    rank: usize,
    moments: Moments,
    values: bool,
}

impl<D: Device> Pass<D> {
    fn new(arena: &mut Arena<D>, spec: &Spec, heads: Option<&RefHeads<D>>, sizes: Sizes) -> Self {
        let Sizes { largest, keep, rank, moments, values } = sizes;
        let acts = Acts::new(arena, spec, &largest, keep).with_low_rank(arena, rank).with_moments(arena, moments);
        let kl = heads.map(|heads| KlActs::new(arena, heads, largest.targets));
        let value = values.then(|| ValueActs::new(arena, &largest));
        Self { acts, kl, value, batch: Batch::new(arena, &largest) }
    }
}

impl Blueprint<'_> {
    /// How its model is built.
    pub fn options(&self) -> Options<'_> {
        match self.lora {
            None => Options::train_all(self.positions),
            Some(lora) => {
                let frozen = Options::frozen(self.positions).holding(self.checkpoint, self.init);
                frozen.with_adapters(self.checkpoint).with_lora(lora)
            }
        }
    }

    /// The policy's model without memory.
    fn dry(&self) -> Model<Dry> {
        let (spec, naming) = (&self.checkpoint.spec, self.checkpoint.architecture.naming);
        Model::new(&mut Dry::arena(DType::F32), spec, naming, self.options())
    }

    /// Of its adapters, at one layer.
    pub fn rank(&self) -> usize {
        self.dry().widest_rank()
    }

    /// How many numbers train.
    pub fn trained(&self) -> usize {
        self.dry().trained_mut().iter().map(|param| param.value.len()).sum()
    }

    /// Weights, gradients and states: there for the whole run.
    fn run<D: Device>(&self, arena: &mut Arena<D>, pass: Ledger) -> Policy<D> {
        let spec = &self.checkpoint.spec;
        let mut model = Model::new(arena, spec, self.checkpoint.architecture.naming, self.options());
        let Extras { moving, compared, moments, values } = &self.extras;
        let mut value = values.then(|| ValueHead::new(arena, spec));
        let mut trained = trained(&mut model, &mut value);
        let optimizer = Optimizer::new(arena, self.method, self.hyper, self.schedule, &mut trained);
        let moving = moving.map(|(moving, start)| MovingReference::new(arena, start, self.positions, moving));
        let heads = RefHeads::new(arena, spec, compared).expect("the vocabularies were compared before");
        let heads = (heads.refs() > 0).then_some(heads);
        let probe = arena.floats(Kind::Workspace, 1, 1);
        let (rank, moments, values) = (model.widest_rank(), *moments, *values);
        let sizes = Sizes { largest: self.largest, keep: self.keep, rank, moments, values };
        Policy { model, optimizer, moving, heads, value, probe, sizes, pass_ledger: pass, pass: None }
    }

    /// Memory of the run, and of a training step besides, on a device with this storage.
    pub fn plan(&self, storage: Storage) -> (Ledger, Ledger) {
        let mut arena = Dry::arena(storage);
        let policy = self.run(&mut arena, Ledger::default());
        let pass =
            |arena: &mut Arena<Dry>| Pass::new(arena, &self.checkpoint.spec, policy.heads.as_ref(), policy.sizes);
        (arena.ledger(), Dry::measure(storage, pass))
    }

    /// The policy as far as it lives for the whole run; its first batch takes the activations.
    pub fn build<B: Backend>(&self, device: &B) -> Result<Policy<B>> {
        let (run, pass) = self.plan(device.keeps());
        Ok(self.run(&mut Arena::new(device, &run)?, pass))
    }
}

/// Every weight that trains: the model's or its adapter's, and behind them the value head's.
pub fn trained<'a, D: Device>(model: &'a mut Model<D>, value: &'a mut Option<ValueHead<D>>) -> Vec<&'a mut Param<D>> {
    let mut params = model.trained_mut();
    params.extend(value.as_mut().map(|head| &mut head.weight));
    params
}

/// What a forward pass left of one batch.
pub struct Seen {
    /// `[targets]` log-probabilities, nats; of a reward model `[sequences]` scores.
    pub logps: Vec<f32>,
    /// The same of the reference that follows the policy, where there is one.
    pub moving: Option<Vec<f32>>,
    /// `[targets]`, where the policy was built for them; empty where not.
    pub entropy: Vec<f32>,
    pub ln_sum_p2: Vec<f32>,
    /// `[references, targets]` KL of distributions, nats; empty where none was asked for.
    pub token_kl: Vec<f64>,
    /// `[targets]` values, where the policy has a head for them.
    pub values: Vec<f32>,
}

impl<B: Backend> Policy<B> {
    /// Runs a batch. `hidden` has each reference's final hidden rows of the batch's targets, where its distributions are to be
    /// compared; empty where not.
    pub fn forward(&mut self, device: &B, host: &data::Batch, hidden: &[Vec<bf16>]) -> Result<Seen> {
        let _range = range(c"forward");
        let pass = match &mut self.pass {
            Some(pass) => pass,
            None => {
                let mut arena = Arena::new(device, &self.pass_ledger)?;
                self.pass.insert(Pass::new(&mut arena, &self.model.spec, self.heads.as_ref(), self.sizes))
            }
        };
        pass.batch.load(device, host)?;
        let read = |view: View<B>| {
            let mut values = vec![0.0; host.targets.len()];
            device.read_f32(view, &mut values).map(|()| values)
        };
        let mut run = |model: &Model<B>| {
            match model.spec.head {
                Head::Score => model.scores(device, &pass.batch, &mut pass.acts)?,
                Head::Tied | Head::Own => model.forward(device, &pass.batch, &mut pass.acts)?,
            }
            read(pass.acts.top.logp.top(host.targets.len()))
        };
        // The policy comes last: its activations are those of the backward.
        let moving = self.moving.as_ref().map(|moving| run(&moving.model)).transpose()?;
        let logps = run(&self.model)?;
        let moment = |of: &Option<Tensor<B>>| of.as_ref().map_or(Ok(Vec::new()), |of| read(of.top(host.targets.len())));
        let (entropy, ln_sum_p2) = (moment(&pass.acts.top.entropy)?, moment(&pass.acts.top.ln_sum_p2)?);
        let mut token_kl = Vec::new();
        if let (false, Some(heads), Some(kl)) = (hidden.is_empty(), &self.heads, &mut pass.kl) {
            let _range = range(c"token_kl");
            hidden.iter().enumerate().try_for_each(|(k, rows)| kl.load(device, k, rows))?;
            self.model.token_kl(device, &pass.batch, &pass.acts, heads, kl)?;
            token_kl = kl.read(device, host.targets.len())?;
        }
        let mut values = Vec::new();
        if let (Some(head), Some(acts)) = (&self.value, &mut pass.value) {
            self.model.values(device, &pass.batch, &pass.acts, (head, acts))?;
            values = acts.read(device, host.targets.len())?;
        }
        Ok(Seen { logps, moving, entropy, ln_sum_p2, token_kl, values })
    }

    /// Does something with the policy as it is without the adapter that trains.
    pub fn without_adapter<T>(&mut self, run: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        self.model.switch_adapter(false);
        let result = run(self);
        self.model.switch_adapter(true);
        result
    }

    /// Frees the activations until the next batch: what follows needs memory of its own.
    pub fn rest(&mut self) {
        self.pass = None;
    }

    /// Adds to the gradients; of the batch that `forward` saw last, by each of the numbers that it left: by log-probabilities
    /// or scores, `[references, targets]` by the KLs and `[targets]` by values, empty where there are none.
    pub fn backward(&mut self, device: &B, derivatives: &[f64], dkl: &[f64], dvalues: &[f64]) -> Result<()> {
        let _range = range(c"backward");
        let Pass { acts, batch, kl, value } = self.pass.as_mut().expect("a backward follows its forward");
        if self.model.spec.head == Head::Score {
            return self.model.backward_scores(device, batch, derivatives, acts);
        }
        let wanted = kl.as_mut().zip(self.heads.as_ref()).filter(|_| !dkl.is_empty());
        let kl = wanted.map(|(acts, heads)| KlTerm { heads, acts, dkl });
        let wanted = value.as_mut().zip(self.value.as_mut()).filter(|_| !dvalues.is_empty());
        let value = wanted.map(|(acts, head)| ValueTerm { head, acts, dvalues });
        self.model.backward_of(device, batch, derivatives, acts, Terms { kl, value })
    }

    pub fn zero_grads(&mut self, device: &B) -> Result<()> {
        let value = self.value.as_mut().and_then(|head| head.weight.grad.as_mut());
        value.map_or(Ok(()), |grad| device.zero(grad.view_mut()))?;
        self.model.zero_grads(device)
    }

    pub fn grad_norm(&mut self, device: &B) -> Result<GradNorm> {
        let _range = range(c"gradient norm");
        self.optimizer.grad_norm(device, &trained(&mut self.model, &mut self.value))
    }

    pub fn update(&mut self, device: &B, step: u64, learning_rate: f64, norm: f64) -> Result<()> {
        let _range = range(c"update");
        let params = &mut trained(&mut self.model, &mut self.value);
        self.optimizer.update(device, params, step, learning_rate, norm)?;
        match &mut self.moving {
            Some(moving) => moving.follow(device, &mut self.model, step),
            None => Ok(()),
        }
    }

    /// The first weight that holds a NaN or an infinity. A rounded weight shows those of its master.
    pub fn first_bad_weight(&mut self, device: &B) -> Result<Option<String>> {
        for param in self.model.all_mut() {
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
