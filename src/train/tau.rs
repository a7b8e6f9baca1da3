//! What fine-tuning added to the base model, `tau_ref = theta_ref - theta_base`: read tensor by tensor, subtracted in f32. An adapter
//! that trains is merged with the difference of adapters: in its own A and B.

use std::path::{Path, PathBuf};

use super::settings::Settings;
use crate::checkpoint::Weights;
use crate::checkpoint::peft::{self, AdapterFile};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::model::{Checkpoint, Init, Param, Reader, found_name};
use crate::optim::Method;

/// The two models or adapters of the difference.
pub struct Tau {
    pub base: PathBuf,
    /// What the policy starts as, unless another is named.
    pub tuned: PathBuf,
    space: Space,
}

/// Where the difference lives.
enum Space {
    Weights {
        base: Checkpoint,
        tuned: Checkpoint,
    },
    Adapter {
        /// None where the base is the model below, which an adapter of B = 0 leaves as it is.
        base: Option<AdapterFile>,
        tuned: AdapterFile,
    },
}

const BASE: &str = "--base-model";
const TUNED: &str = "--tau-model";

impl Tau {
    /// What the optimizer of a run merges with; `None` where it merges with nothing.
    pub fn open(settings: &Settings, method: &Method, policy: &Checkpoint) -> Result<Option<Self>> {
        let name = &settings.optimizer.name;
        if !method.merges() {
            let given = [(BASE, &settings.base_model), (TUNED, &settings.tau_model)];
            return match given.iter().find(|(_, given)| given.is_some()) {
                Some((flag, _)) => {
                    let how = "--optimizer ondare (with a --merge-weight above 0) and onties do";
                    Err(Error::option(*flag, format!("{name} merges with no model, {how}; drop it")))
                }
                None => Ok(None),
            };
        }
        let start = settings.lora.as_ref().and_then(|lora| lora.start.as_ref());
        let tuned = settings.tau_model.as_ref().or(start).unwrap_or(&settings.model).clone();
        let Some(base) = settings.base_model.clone() else {
            let detail = format!(
                "{name} merges with what fine-tuning added to a base model: give the folder of the model that {} was fine-tuned from",
                tuned.display()
            );
            return Err(Error::option(BASE, detail));
        };
        if settings.tau_model.is_none() && settings.init != Init::Checkpoint {
            let detail = "random weights minus a base model are no task vector; give --tau-model, or drop --init";
            return Err(Error::option("--init", detail));
        }
        let space = match start {
            Some(start) => adapters(settings, start, &base, &tuned)?,
            None => {
                let space = Space::Weights { base: Checkpoint::open(&base)?, tuned: Checkpoint::open(&tuned)? };
                let Space::Weights { base, tuned } = &space else { unreachable!("made above") };
                check(TUNED, tuned, policy)?;
                check(BASE, base, policy)?;
                space
            }
        };
        Ok(Some(Self { base, tuned, space }))
    }

    /// Hashes of base and fine-tuned model, which must not be one model.
    pub fn identities(&self, settings: &Settings) -> Result<[[u8; 32]; 2]> {
        let [base, tuned] = match &self.space {
            Space::Weights { base, tuned } => [Init::Checkpoint.identity(base)?, Init::Checkpoint.identity(tuned)?],
            Space::Adapter { base, tuned } => [base.as_ref().map_or([0; 32], AdapterFile::hash), tuned.hash()],
        };
        if base == tuned {
            let (base, tuned, name) = (self.base.display(), self.tuned.display(), &settings.optimizer.name);
            let detail = format!(
                "{base} and {tuned} are one model, so that tau_ref would be 0; {name} needs the model that came before fine-tuning"
            );
            return Err(Error::option(BASE, detail));
        }
        Ok([base, tuned])
    }

    /// Hands `use_it` a function that reads the difference of a weight; returns its size relative to the fine-tuned model, both in the
    /// 2-norm.
    pub fn read<D: Device, T>(
        &self,
        policy: &Checkpoint,
        use_it: impl FnOnce(&mut dyn FnMut(&Param<D>, &mut [f32]) -> Result<()>) -> Result<T>,
    ) -> Result<f64> {
        let (mut reader, mut of_tuned, mut of_tau) = (Reader::default(), 0.0, 0.0);
        let mut subtract = |out: &mut [f32], base: &[f32]| {
            for (tau, base) in out.iter_mut().zip(base) {
                of_tuned += f64::from(*tau).powi(2);
                *tau -= base;
                of_tau += f64::from(*tau).powi(2);
            }
        };
        match &self.space {
            Space::Weights { base, tuned } => {
                let (of_base, of_tuned) = (Weights::open(&base.dir)?, Weights::open(&tuned.dir)?);
                let drawn = policy.drawn_head();
                use_it(&mut |param, out| {
                    // A head that is drawn is in no checkpoint: fine-tuning added nothing to it.
                    if drawn.as_ref().is_some_and(|(name, _)| *name == param.name) {
                        out.fill(0.0);
                        return Ok(());
                    }
                    let tensor = &param.stored.tensor;
                    out.copy_from_slice(reader.read(&of_tuned, &found_name(tuned, &of_tuned, tensor), param)?);
                    subtract(out, reader.read(&of_base, &found_name(base, &of_base, tensor), param)?);
                    Ok(())
                })?;
            }
            Space::Adapter { base, tuned } => {
                use_it(&mut |param, out| {
                    let tensor = &param.stored.tensor;
                    out.copy_from_slice(reader.read(&tuned.weights, tensor, param)?);
                    match base {
                        Some(base) => subtract(out, reader.read(&base.weights, tensor, param)?),
                        // That adapter has the same A.
                        None if peft::is_a(tensor) => {
                            let same = out.to_vec();
                            subtract(out, &same)
                        }
                        None => subtract(out, &vec![0.0; out.len()]),
                    }
                    Ok(())
                })?;
            }
        }
        Ok((of_tau / of_tuned).sqrt())
    }
}

/// Refuses a model that lacks a weight of the policy, or has it in another shape.
fn check(flag: &str, checkpoint: &Checkpoint, policy: &Checkpoint) -> Result<()> {
    let (mut model, weights, drawn) = (policy.dry(), Weights::open(&checkpoint.dir)?, policy.drawn_head());
    for param in model.params_mut() {
        if drawn.as_ref().is_some_and(|(name, _)| *name == param.name) {
            continue;
        }
        let name = found_name(checkpoint, &weights, &param.stored.tensor);
        let (expected, found) = (param.stored.shape(&param.shape()), weights.shape(&name));
        let found = match found {
            Some(shape) if shape == expected => continue,
            Some(shape) => format!("has it as {shape:?}"),
            None => "does not have it".to_string(),
        };
        let (dir, name) = (checkpoint.dir.display(), &param.stored.tensor);
        let detail =
            format!("{name:?} is {expected:?} in --model, {dir} {found}; tau_ref needs models of the same shapes");
        return Err(Error::option(flag, detail));
    }
    Ok(())
}

/// The difference of an adapter that trains, of the same layers, ranks and scales.
fn adapters(settings: &Settings, start: &Path, base: &Path, tuned: &Path) -> Result<Space> {
    let same = |a: &Path, b: &Path| a.canonicalize().is_ok_and(|a| b.canonicalize().is_ok_and(|b| a == b));
    let policy = AdapterFile::open(start)?;
    let open = |flag: &str, dir: &Path| {
        if !peft::is_adapter(dir) {
            let detail = format!(
                "{} is no adapter; an adapter that trains is merged with a difference of adapters: give one, or for the base --model \
                 itself",
                dir.display()
            );
            return Err(Error::option(flag, detail));
        }
        let file = AdapterFile::open(dir)?;
        let of = |file: &AdapterFile| -> Vec<_> {
            file.modules().into_iter().map(|m| (file.shape(&m), file.rank(&m), file.scaling(&m).to_bits(), m)).collect()
        };
        if of(&file) == of(&policy) {
            return Ok(file);
        }
        let detail = format!(
            "{} has not the layers, ranks and scales of {}; tau_ref needs adapters of the same shape",
            dir.display(),
            start.display()
        );
        Err(Error::option(flag, detail))
    };
    let tuned = open(TUNED, tuned)?;
    let base = if same(base, &settings.model) { None } else { Some(open(BASE, base)?) };
    Ok(Space::Adapter { base, tuned })
}
