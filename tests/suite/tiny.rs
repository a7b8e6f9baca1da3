//! Tiny models with a change, and what else is asked of them here.

use std::collections::BTreeMap;
use std::fs;

use cuvee::data::Extent;
use cuvee::device::{DType, Ledger};
use cuvee::model::Keep;
use cuvee::model::arch::Slot;
use cuvee::ops::Backend;
use serde_json::Value;

pub use crate::common::tiny::{
    Rig, SEED, Size, Step, Tiny, all, classifier, merged, read, rewards, weights, write_config,
};

/// One of [`all`] with some keys of its configuration changed.
pub fn with(size: Size, name: &str, changes: Value) -> Tiny {
    let (name, own) = size.models().into_iter().find(|(n, _)| *n == name).expect("a model of this name");
    crate::common::tiny::open(size, name, merged(own, changes))
}

impl Tiny {
    /// Memory for a training step in f32, measured.
    pub fn plan(&self, largest: &Extent, keep: Keep, trained: &dyn Fn(&str) -> bool) -> Ledger {
        self.plan_in(DType::F32, largest, keep, trained)
    }

    pub fn config(&self) -> Value {
        serde_json::from_slice(&fs::read(self.checkpoint.dir.join("config.json")).unwrap()).unwrap()
    }

    /// The name of a weight.
    pub fn name_of(&self, slot: Slot, layer: usize) -> String {
        (self.checkpoint.architecture.naming)(&self.checkpoint.spec, slot, layer).name()
    }
}

impl<B: Backend> Rig<B> {
    pub fn values(&mut self) -> BTreeMap<String, Vec<f64>> {
        let Self { device, model, .. } = self;
        model.params_mut().into_iter().map(|p| (p.name.clone(), read(device, &p.value))).collect()
    }
}
