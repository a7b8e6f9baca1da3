//! The registry as data: help, listings, recipes and tests all read it.

use std::collections::BTreeMap;
use std::ops::{Bound, Index, RangeBounds};

use super::{Objective, all};
use crate::error::{Error, Result};

/// An objective as the user sees it.
pub struct Entry {
    pub name: &'static str,
    pub aliases: &'static [&'static str],
    /// Author, arXiv:id, Eq. n.
    pub paper: &'static str,
    /// One line for `cuvee list objectives`.
    pub summary: &'static str,
    pub params: &'static [ParamSpec],
    /// Gets every parameter of `params`, each within its range.
    pub build: fn(&Params) -> Result<Box<dyn Objective>>,
}

/// One number that an objective takes.
pub struct ParamSpec {
    /// As in a recipe: `label_smoothing`.
    pub name: &'static str,
    /// The value when the user gives none; `None` makes the parameter required. A default must mean "off": how
    /// strong a method is, is the user's choice.
    pub default: Option<f64>,
    /// Neither NaN nor anything outside is accepted.
    pub range: (Bound<f64>, Bound<f64>),
    /// A usual value, for help and for errors that say what to type.
    pub example: f64,
    /// Meaning and unit.
    pub help: &'static str,
}

/// KL strength, which almost every objective with a reference has.
pub(super) const BETA: ParamSpec = ParamSpec {
    name: "beta",
    default: None,
    range: (Bound::Excluded(0.0), Bound::Excluded(f64::INFINITY)),
    example: 0.1,
    help: "how strongly the policy is held to its reference, 1/nat",
};

impl ParamSpec {
    pub fn required(&self) -> bool {
        self.default.is_none()
    }

    /// As on the command line: `--label-smoothing`.
    pub fn flag(&self) -> String {
        flag(self.name)
    }

    /// `0 <= label_smoothing < 0.5`.
    pub fn range_text(&self) -> String {
        let low = match self.range.0 {
            Bound::Included(low) => format!("{low} <= "),
            Bound::Excluded(low) => format!("{low} < "),
            Bound::Unbounded => String::new(),
        };
        let high = match self.range.1 {
            Bound::Included(high) => format!(" <= {high}"),
            Bound::Excluded(high) => format!(" < {high}"),
            Bound::Unbounded => String::new(),
        };
        format!("{low}{}{high}", self.name)
    }

    fn value(&self, objective: &str, given: &Params) -> Result<f64> {
        let Self { range, example, help, .. } = self;
        let flag = self.flag();
        let Some(value) = given.get(self.name).or(self.default) else {
            return Err(Error::option(
                &flag,
                format!("{objective} requires it: {help}; for example `{flag} {example}`"),
            ));
        };
        if range.contains(&value) {
            return Ok(value);
        }
        let detail = format!("{objective} expects {}, got {value}; for example `{flag} {example}`", self.range_text());
        Err(Error::option(flag, detail))
    }
}

fn flag(name: &str) -> String {
    format!("--{}", name.replace('_', "-"))
}

/// Numbers by parameter name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Params(BTreeMap<String, f64>);

impl Params {
    pub fn set(&mut self, name: impl Into<String>, value: f64) {
        self.0.insert(name.into(), value);
    }

    pub fn get(&self, name: &str) -> Option<f64> {
        self.0.get(name).copied()
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }
}

impl<K: Into<String>> FromIterator<(K, f64)> for Params {
    fn from_iter<I: IntoIterator<Item = (K, f64)>>(pairs: I) -> Self {
        Self(pairs.into_iter().map(|(name, value)| (name.into(), value)).collect())
    }
}

/// For [`Entry::build`], which may rely on every parameter it declares.
impl Index<&str> for Params {
    type Output = f64;

    fn index(&self, name: &str) -> &f64 {
        self.0.get(name).unwrap_or_else(|| panic!("the registry entry does not declare parameter {name}"))
    }
}

/// The entry with this name or alias.
pub fn find(name: &str) -> Result<&'static Entry> {
    all().iter().find(|e| e.name == name || e.aliases.contains(&name)).ok_or_else(|| unknown(name))
}

/// Checks the parameters that the user gave and builds the objective.
pub fn build(name: &str, given: &Params) -> Result<Box<dyn Objective>> {
    let entry = find(name)?;
    if let Some(unused) = given.names().find(|&given| entry.params.iter().all(|spec| spec.name != given)) {
        let takes: Vec<String> = entry.params.iter().map(ParamSpec::flag).collect();
        let takes = if takes.is_empty() { "no parameter".into() } else { takes.join(", ") };
        return Err(Error::option(
            flag(unused),
            format!("{} does not use it, it takes {takes}; remove it", entry.name),
        ));
    }
    let values = entry.params.iter().map(|spec| Ok((spec.name, spec.value(entry.name, given)?)));
    (entry.build)(&values.collect::<Result<Params>>()?)
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
