//! The registry as data: flags, help, listings, recipes and tests all read it.

use std::collections::BTreeMap;
use std::ops::Bound;

use super::{Modifier, Needs, Objective, all, modifiers};
use crate::error::{Error, Result};
use crate::params::{Domain, POSITIVE, ParamSpec, Params, Shared, Value, resolve, shared};

/// An objective as the user sees it.
pub struct Entry {
    pub name: &'static str,
    pub aliases: &'static [&'static str],
    /// Author, arXiv:id, Eq. n.
    pub paper: &'static str,
    /// One line for `cuvee list objectives`.
    pub summary: &'static str,
    pub params: &'static [ParamSpec],
    /// Gets every parameter of `params` that has a value, each within its domain.
    pub build: fn(&Params) -> Result<Box<dyn Objective>>,
}

/// KL strength, which almost every objective with a reference has.
pub(super) const BETA: ParamSpec = ParamSpec {
    name: "beta",
    domain: Domain::Number { default: None, range: POSITIVE, example: 0.1 },
    only_with: None,
    help: "how strongly the policy is held to its reference, 1/nat; without a reference, the scale of its log-probs",
};

/// For labels that are wrong now and then; off by default.
pub(super) const LABEL_SMOOTHING: ParamSpec = ParamSpec {
    name: "label_smoothing",
    domain: Domain::Number { default: Some(0.0), range: (Bound::Included(0.0), Bound::Excluded(0.5)), example: 0.1 },
    only_with: None,
    help: "probability that chosen and rejected were swapped",
};

/// Every parameter of every objective and modifier, by name; modifiers are no owners.
pub fn params() -> BTreeMap<&'static str, Shared> {
    let of_objectives = all().iter().flat_map(|entry| entry.params.iter().map(move |spec| (spec, Some(entry.name))));
    shared(of_objectives.chain(modifiers().iter().map(|modifier| (&modifier.param, None))))
}

/// The entry with this name or alias.
pub fn find(name: &str) -> Result<&'static Entry> {
    all().iter().find(|e| e.name == name || e.aliases.contains(&name)).ok_or_else(|| unknown(name))
}

impl Entry {
    /// The values that it is built from: of what was given, what it takes, and defaults for the rest.
    pub(super) fn resolve(&self, given: &Params) -> Result<Params> {
        resolve(self.name, self.params, given)
    }
}

impl Modifier {
    /// Whether the user asked for it.
    pub(super) fn given(&self, params: &Params) -> bool {
        !matches!(params.get(self.param.name), None | Some(Value::Switch(false)))
    }

    pub(super) fn wraps(&self, needs: &Needs) -> bool {
        (self.applies)(needs)
    }
}

fn unknown(name: &str) -> Error {
    let names = all().iter().flat_map(|e| std::iter::once(&e.name).chain(e.aliases));
    let likeness = |candidate: &str| strsim::jaro_winkler(name, candidate);
    let nearest = names.max_by(|a, b| likeness(a).total_cmp(&likeness(b))).expect("the registry is not empty");
    let known: Vec<&str> = all().iter().map(|e| e.name).collect();
    Error::option(
        "--objective",
        format!("there is no objective {name:?}; did you mean {nearest:?}? known are {}", known.join(", ")),
    )
}
