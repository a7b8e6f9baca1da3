//! How far the policy is from K frozen references, token by token, on top of a pass (see [`crate::ops::token_kl`]). Of a
//! reference only the head is in memory; its final hidden rows come from whoever keeps them, made by
//! [`Acts::read_normed`] after a pass of the reference over the same sequences.

use half::bf16;

use super::arch::{Checkpoint, Slot};
use super::init::draw;
use super::load::{Reader, found_name};
use super::{Acts, Batch, Head, Init, Model, Param, Spec};
use crate::checkpoint::Weights;
use crate::data::Temperature;
use crate::device::{Arena, Device, Kind, Tensor, View, ViewMut};
use crate::error::{Error, Result};
use crate::ops::Backend;
use crate::ops::token_kl::{self, Ref};

/// The heads of K references, `[vocab, hidden_k]` each, and nothing else of them.
pub struct RefHeads<D: Device> {
    heads: Vec<Param<D>>,
}

impl<D: Device> RefHeads<D> {
    /// Room for the heads of `refs`, in that order. Fails where a reference has another vocabulary than the `policy`, or none.
    pub fn new(arena: &mut Arena<D>, policy: &Spec, refs: &[&Checkpoint]) -> Result<Self> {
        let mut heads = Vec::new();
        for Checkpoint { dir, architecture, spec, .. } in refs {
            let slot = match spec.head {
                Head::Tied => Slot::Embedding,
                Head::Own => Slot::Head,
                Head::Score => {
                    let detail = format!("compares distributions of tokens; {} is a reward model", dir.display());
                    return Err(Error::option("--kl-penalty", detail));
                }
            };
            if spec.vocab != policy.vocab {
                let detail = format!(
                    "compares whole distributions, so policy and references need the same vocabulary; {} has {} tokens, \
                     the policy {}",
                    dir.display(),
                    spec.vocab,
                    policy.vocab
                );
                return Err(Error::option("--kl-penalty", detail));
            }
            let stored = (architecture.naming)(spec, slot, 0);
            heads.push(Param::new(arena, spec, (slot, stored), [spec.vocab, spec.hidden], (&|_| false, false)));
        }
        Ok(Self { heads })
    }

    /// Gives the head of reference `k`, which is `checkpoint`, its values; nothing else is read.
    pub fn fill(&mut self, device: &D, k: usize, checkpoint: &Checkpoint, init: Init) -> Result<()> {
        let head = &mut self.heads[k];
        match init {
            Init::Checkpoint => {
                let weights = Weights::open(&checkpoint.dir)?;
                let name = found_name(checkpoint, &weights, &head.stored.tensor);
                let mut reader = Reader::default();
                let values = reader.read(&weights, &name, head)?;
                head.write(device, values)
            }
            Init::Random { seed } => draw(device, head, seed),
        }
    }

    /// K
    pub fn refs(&self) -> usize {
        self.heads.len()
    }

    /// Of reference `k`.
    pub fn hidden(&self, k: usize) -> usize {
        self.heads[k].value.cols()
    }
}

/// What a KL to K references needs and leaves behind for one batch.
pub struct KlActs<D: Device> {
    /// `[targets, hidden_k]` of each reference: its final hidden rows, normed.
    hidden: Vec<Tensor<D>>,
    /// `[K, targets]`, nats. Sized for the largest batch; those of the present one lie at the front.
    kl: Tensor<D>,
    dkl: Tensor<D>,
    /// `[1 + K, targets]`, the policy's first.
    lse: Tensor<D>,
    tiles: Tensor<D>,
}

impl<D: Device> KlActs<D> {
    /// For batches of up to `targets` targets.
    pub fn new(arena: &mut Arena<D>, heads: &RefHeads<D>, targets: usize) -> Self {
        let refs = heads.refs();
        let hidden = |k| arena.stored(Kind::Activations, targets, heads.hidden(k));
        let hidden = (0..refs).map(hidden).collect();
        let [kl, dkl, lse] = [refs, refs, 1 + refs].map(|planes| arena.floats(Kind::Activations, planes * targets, 1));
        let [rows, cols] = token_kl::scratch_shape(targets);
        Self { hidden, kl, dkl, lse, tiles: arena.floats(Kind::Workspace, rows, cols) }
    }

    /// Uploads the hidden rows of reference `k`, target by target.
    pub fn load(&mut self, device: &D, k: usize, rows: &[bf16]) -> Result<()> {
        let hidden = &mut self.hidden[k];
        let cols = hidden.cols();
        assert!(rows.len().is_multiple_of(cols), "{} numbers are no rows of {cols}", rows.len());
        let mut wide = Vec::new();
        for (part, rows) in rows.chunks(ROWS_AT_ONCE * cols).enumerate() {
            wide.clear();
            wide.extend(rows.iter().map(|x| x.to_f32()));
            let to = hidden.view_mut().slice(part * ROWS_AT_ONCE, rows.len() / cols);
            device.write_f32(&wide, to)?;
        }
        Ok(())
    }

    /// `[K, targets]` of the batch that [`Model::token_kl`] saw, nats; not below 0 but for rounding.
    pub fn read(&self, device: &D, targets: usize) -> Result<Vec<f64>> {
        let mut kl = vec![0.0; self.hidden.len() * targets];
        device.read_f64(self.kl.top(kl.len()), &mut kl)?;
        Ok(kl)
    }
}

fn refs<'a, D: Device>(hidden: &'a [Tensor<D>], heads: &'a RefHeads<D>, targets: usize) -> Vec<Ref<'a, D>> {
    assert_eq!(hidden.len(), heads.refs(), "hidden rows of other references");
    let all = hidden.iter().zip(&heads.heads);
    all.map(|(hidden, head)| Ref { h: hidden.top(targets), weight: head.view() }).collect()
}

/// The part of an objective that is a function of the KLs, for [`Model::backward`].
pub struct KlTerm<'a, D: Device> {
    pub heads: &'a RefHeads<D>,
    /// As [`Model::token_kl`] left it.
    pub acts: &'a mut KlActs<D>,
    /// `[K, targets]`: the objective's derivative by each KL.
    pub dkl: &'a [f64],
}

/// Hidden rows that are converted at a time on the host.
const ROWS_AT_ONCE: usize = 256;

impl<D: Device> Acts<D> {
    /// `[targets, hidden]`: the final hidden rows that the last pass left, normed, rounded to bfloat16. Of a reference, what
    /// [`KlActs::load`] takes.
    pub fn read_normed(&self, device: &D, targets: usize) -> Result<Vec<bf16>> {
        let normed = self.top.normed.top(targets);
        let mut rows = Vec::with_capacity(normed.len());
        let mut wide = vec![0.0; ROWS_AT_ONCE.min(targets) * normed.cols()];
        for first in (0..targets).step_by(ROWS_AT_ONCE) {
            let part = normed.slice(first, ROWS_AT_ONCE.min(targets - first));
            let wide = &mut wide[..part.len()];
            device.read_f32(part, wide)?;
            rows.extend(wide.iter().map(|x| bf16::from_f32(*x)));
        }
        Ok(rows)
    }
}

impl<B: Backend> KlTerm<'_, B> {
    /// Adds to the gradient of the policy's normed rows, and of its head where that is trained.
    pub(super) fn backward(
        self,
        device: &B,
        (normed, temperature): (View<B>, Temperature),
        head: &mut Param<B>,
        dh: ViewMut<B>,
    ) -> Result<()> {
        let (targets, k) = (normed.rows(), self.heads.refs());
        let KlActs { hidden, kl, dkl, lse, tiles } = self.acts;
        device.write_f64(self.dkl, dkl.top_mut(k * targets))?;
        device.token_kl_backward(token_kl::Backward {
            h: normed,
            weight: head.value.view(),
            refs: &refs(hidden, self.heads, targets),
            scale: temperature.scale(),
            kl: kl.top(k * targets).reshape(k, targets),
            lse: lse.top((1 + k) * targets).reshape(1 + k, targets),
            dkl: dkl.top(k * targets).reshape(k, targets),
            scratch: tiles.view_mut(),
            dh,
            dweight: head.grad.as_mut().map(Tensor::view_mut),
        })
    }
}

impl<B: Backend> Model<B> {
    /// KL to each reference of each target's distribution, into `kl` ([`KlActs::read`]). After `forward` of the same batch, and
    /// [`KlActs::load`] of every reference.
    pub fn token_kl(
        &self,
        device: &B,
        batch: &Batch<B>,
        acts: &Acts<B>,
        heads: &RefHeads<B>,
        kl: &mut KlActs<B>,
    ) -> Result<()> {
        let (targets, k) = (batch.size().targets, heads.refs());
        let KlActs { hidden, kl, lse, tiles, .. } = kl;
        device.token_kl(token_kl::Forward {
            h: acts.top.normed.top(targets),
            weight: self.vocabulary().view(),
            refs: &refs(hidden, heads, targets),
            scale: batch.temperature().scale(),
            scratch: tiles.view_mut(),
            kl: kl.top_mut(k * targets).reshape(k, targets),
            lse: lse.top_mut((1 + k) * targets).reshape(1 + k, targets),
        })
    }
}
