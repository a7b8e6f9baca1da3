//! What fine-tuning added to the base model, `tau_ref = theta_ref - theta_base`: read tensor by tensor, subtracted in f32.

use super::settings::Settings;
use crate::checkpoint::Weights;
use crate::device::{DType, Device, Dry};
use crate::error::{Error, Result};
use crate::model::{Checkpoint, Init, Model, Options, Param, Reader, found_name};
use crate::optim::Method;

pub struct Tau {
    pub base: Checkpoint,
    /// What the policy starts as, unless another is named.
    pub tuned: Checkpoint,
}

const BASE: &str = "--base-model";

impl Tau {
    /// What the optimizer of a run merges with; `None` where it merges with nothing.
    pub fn open(settings: &Settings, method: &Method, policy: &Checkpoint) -> Result<Option<Self>> {
        let name = &settings.optimizer.name;
        if !method.merges() {
            let given = [(BASE, &settings.base_model), ("--tau-model", &settings.tau_model)];
            return match given.iter().find(|(_, given)| given.is_some()) {
                Some((flag, _)) => {
                    let how = "--optimizer ondare (with a --merge-weight above 0) and onties do";
                    Err(Error::option(*flag, format!("{name} merges with no model, {how}; drop it")))
                }
                None => Ok(None),
            };
        }
        let Some(base) = &settings.base_model else {
            let detail = format!(
                "{name} merges with what fine-tuning added to a base model: give the folder of the model that {} was fine-tuned from",
                settings.tau_model.as_ref().unwrap_or(&settings.model).display()
            );
            return Err(Error::option(BASE, detail));
        };
        if settings.tau_model.is_none() && settings.init != Init::Checkpoint {
            let detail = "random weights minus a base model are no task vector; give --tau-model, or drop --init";
            return Err(Error::option("--init", detail));
        }
        let tuned = match &settings.tau_model {
            Some(dir) => Checkpoint::open(dir)?,
            None => Checkpoint::open(&settings.model)?,
        };
        let tau = Self { base: Checkpoint::open(base)?, tuned };
        tau.check("--tau-model", &tau.tuned, policy)?;
        tau.check(BASE, &tau.base, policy)?;
        Ok(Some(tau))
    }

    /// Refuses a model that lacks a weight of the policy, or has it in another shape.
    fn check(&self, flag: &str, checkpoint: &Checkpoint, policy: &Checkpoint) -> Result<()> {
        let (spec, naming) = (&policy.spec, policy.architecture.naming);
        let mut model = Model::new(&mut Dry::arena(DType::F32), spec, naming, Options::frozen(0));
        let weights = Weights::open(&checkpoint.dir)?;
        let drawn = policy.drawn_head();
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
            let dir = checkpoint.dir.display();
            let detail = format!(
                "{:?} is {expected:?} in --model, {dir} {found}; tau_ref needs models of the same shapes",
                param.stored.tensor
            );
            return Err(Error::option(flag, detail));
        }
        Ok(())
    }

    /// Hashes of base and fine-tuned model, which must not be one model.
    pub fn identities(&self, settings: &Settings) -> Result<[[u8; 32]; 2]> {
        let base = Init::Checkpoint.identity(&self.base)?;
        let tuned = Init::Checkpoint.identity(&self.tuned)?;
        if base == tuned {
            let (base, tuned) = (self.base.dir.display(), self.tuned.dir.display());
            let detail = format!(
                "{base} and {tuned} are one model, so that tau_ref would be 0; {} needs the model that came before fine-tuning",
                settings.optimizer.name
            );
            return Err(Error::option(BASE, detail));
        }
        Ok([base, tuned])
    }

    /// Hands `use_it` a function that reads the difference of a weight; returns its size relative to the base, both in the 2-norm.
    pub fn read<D: Device, T>(
        &self,
        policy: &Checkpoint,
        use_it: impl FnOnce(&mut dyn FnMut(&Param<D>, &mut [f32]) -> Result<()>) -> Result<T>,
    ) -> Result<f64> {
        let (base, tuned) = (Weights::open(&self.base.dir)?, Weights::open(&self.tuned.dir)?);
        let mut reader = Reader::default();
        let (mut of_base, mut of_tau, drawn) = (0.0, 0.0, policy.drawn_head());
        use_it(&mut |param, out| {
            // A head that is drawn is in no checkpoint: fine-tuning added nothing to it.
            if drawn.as_ref().is_some_and(|(name, _)| *name == param.name) {
                out.fill(0.0);
                return Ok(());
            }
            let tensor = &param.stored.tensor;
            out.copy_from_slice(reader.read(&tuned, &found_name(&self.tuned, &tuned, tensor), param)?);
            let values = reader.read(&base, &found_name(&self.base, &base, tensor), param)?;
            for (tau, base) in out.iter_mut().zip(values) {
                *tau -= base;
                of_tau += f64::from(*tau).powi(2);
                of_base += f64::from(*base).powi(2);
            }
            Ok(())
        })?;
        Ok((of_tau / of_base).sqrt())
    }
}
