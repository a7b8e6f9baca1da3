//! A policy and the references that its distributions are compared with, on any device.

use std::collections::BTreeMap;

use cuvee::data;
use cuvee::device::{Arena, DType, Device, Dry, Reference};
use cuvee::model::{Checkpoint, Init, Keep, KlActs, KlTerm, RefHeads};
use cuvee::ops::Backend;
use half::bf16;

use super::tiny::{Rig, SEED, Tiny, weights};

pub struct KlRig<B: Backend> {
    pub rig: Rig<B>,
    pub heads: RefHeads<B>,
    pub acts: KlActs<B>,
}

/// Hidden rows of each reference, as a cache would keep them: the same for every device.
pub fn hidden_rows(refs: &[&Tiny], host: &data::Batch) -> Vec<Vec<bf16>> {
    let rows = |tiny: &&Tiny| {
        let mut rig = Rig::new(Reference, tiny, &host.extent(), Keep::Nothing);
        rig.forward(host);
        rig.acts.read_normed(&rig.device, host.targets.len()).unwrap()
    };
    refs.iter().map(rows).collect()
}

/// The c of the scalar `sum_kt c_kt KL_kt`.
pub fn kl_weights(len: usize) -> Vec<f64> {
    weights(len + 3)[3..].iter().map(|c| 0.7 * c + 0.1).collect()
}

impl<B: Backend> KlRig<B> {
    /// Heads from the seed from which the references' own rigs have them; their memory measured, then taken.
    pub fn new(
        new: impl Fn() -> B,
        tiny: &Tiny,
        refs: &[&Tiny],
        host: &data::Batch,
        trained: &dyn Fn(&str) -> bool,
    ) -> Self {
        let rig = Rig::training(new(), tiny, &host.extent(), Keep::Everything, trained);
        let checkpoints: Vec<&Checkpoint> = refs.iter().map(|tiny| &tiny.checkpoint).collect();
        let (policy, targets) = (&tiny.checkpoint.spec, host.targets.len());
        let plan = Dry::measure(rig.device.storage(), |arena| {
            let heads = RefHeads::new(arena, policy, &checkpoints).unwrap();
            KlActs::new(arena, &heads, targets)
        });
        let bytes = plan.total() / Dry::width(DType::F32) * B::width(DType::F32);
        let mut arena = Arena::with_bytes(&rig.device, bytes).unwrap();
        let mut heads = RefHeads::new(&mut arena, policy, &checkpoints).unwrap();
        let mut acts = KlActs::new(&mut arena, &heads, targets);
        for (k, (checkpoint, rows)) in checkpoints.iter().zip(hidden_rows(refs, host)).enumerate() {
            heads.fill(&rig.device, k, checkpoint, Init::Random { seed: SEED }).unwrap();
            acts.load(&rig.device, k, &rows).unwrap();
        }
        Self { rig, heads, acts }
    }

    /// Log-probabilities of the targets, and the KLs, reference by reference.
    pub fn forward(&mut self, host: &data::Batch) -> [Vec<f64>; 2] {
        let Self { rig, heads, acts } = self;
        let logps = rig.forward(host);
        rig.model.token_kl(&rig.device, &rig.batch, &rig.acts, heads, acts).unwrap();
        [logps, acts.read(&rig.device, host.targets.len()).unwrap()]
    }

    /// Gradients of `sum_t c_t logp_t + sum_kt c_kt KL_kt`.
    pub fn step(&mut self, host: &data::Batch) -> ([Vec<f64>; 2], BTreeMap<String, Vec<f64>>) {
        self.rig.model.zero_grads(&self.rig.device).unwrap();
        let values = self.forward(host);
        let (dlogp, dkl) = (weights(values[0].len()), kl_weights(values[1].len()));
        let Self { rig, heads, acts } = self;
        let term = KlTerm { heads, acts, dkl: &dkl };
        rig.model.backward(&rig.device, &rig.batch, &dlogp, &mut rig.acts, Some(term)).unwrap();
        (values, self.rig.grads())
    }
}
