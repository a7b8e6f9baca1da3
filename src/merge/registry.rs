//! The methods as data: flags, recipes, listings and tests all read it.

use std::collections::BTreeMap;
use std::ops::{Bound, RangeBounds};

use super::number::Real;
use super::parts::{Rule, Tensor, Words};
use crate::error::{Error, Result};
use crate::params::{FINITE, Value, flag, range_text};

/// A method as the user sees it.
pub struct Entry {
    pub name: &'static str,
    /// Author, arXiv:id.
    pub paper: &'static str,
    /// One line for `cuvee list merges`.
    pub summary: &'static str,
    /// Whether it draws masks, so that a seed does something.
    pub random: bool,
    pub base: Base,
    /// How many models it merges, the base left out.
    pub models: (usize, usize),
    pub params: &'static [ParamSpec],
    pub prepare: Prepare,
}

/// What the base model is to a method.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Base {
    /// Nothing: models are merged as they are.
    None,
    /// What task vectors start from, or one end of a path.
    Required,
}

/// Looks at a whole tensor and says what is to be done to its parts.
pub type Prepared<T> = for<'a, 'b> fn(&'b Tensor<'b, T>, &'b Values, Words<'a>) -> Result<Rule<'a, T>>;

/// A method's code in both types.
pub struct Prepare {
    pub single: Prepared<f32>,
    pub double: Prepared<f64>,
}

impl Entry {
    /// The rule that merges `tensor`. `values` must have been [resolved](Entry::resolve) for this method.
    pub fn prepare<'a, T: Real>(&self, tensor: &Tensor<T>, values: &Values, words: Words<'a>) -> Result<Rule<'a, T>> {
        T::prepare(&self.prepare)(tensor, values, words)
    }
}

/// Something that a method takes. A name means one thing in the whole registry; only default and range may differ.
#[derive(Clone, Copy)]
pub struct ParamSpec {
    /// As in a recipe: `filter_wise`.
    pub name: &'static str,
    /// Whether models can have values of their own.
    pub per_model: bool,
    pub domain: Domain,
    /// Meaning and unit.
    pub help: &'static str,
}

/// What values a parameter may have, and the one it has when the user gives none.
#[derive(Clone, Copy, PartialEq)]
pub enum Domain {
    /// `None` makes the parameter required.
    Number {
        default: Option<f64>,
        range: (Bound<f64>, Bound<f64>),
    },
    Switch {
        default: bool,
    },
    Choice {
        values: &'static [&'static str],
        default: &'static str,
    },
}

const SHARE: (Bound<f64>, Bound<f64>) = (Bound::Excluded(0.0), Bound::Included(1.0));

pub(super) const WEIGHT: ParamSpec = ParamSpec {
    name: "weight",
    per_model: true,
    domain: Domain::Number { default: None, range: FINITE },
    help: "how much of a model goes into the merge",
};

pub(super) const DENSITY: ParamSpec = ParamSpec {
    name: "density",
    per_model: true,
    domain: Domain::Number { default: Some(1.0), range: SHARE },
    help: "share of a task vector that is kept",
};

pub(super) const LAMBDA: ParamSpec = ParamSpec {
    name: "lambda",
    per_model: false,
    domain: Domain::Number { default: Some(1.0), range: FINITE },
    help: "what the merged task vector is multiplied by before it is added to the base",
};

/// Division by the sum of weights.
pub(super) const fn normalize(default: bool) -> ParamSpec {
    ParamSpec {
        name: "normalize",
        per_model: false,
        domain: Domain::Switch { default },
        help: "divide by the sum of the weights that took part, element by element where signs are elected",
    }
}

/// What makes up for the part of a task vector that was dropped, by name.
pub const RESCALES: &[&str] = &["none", "l1", "inverse_density"];

pub(super) const fn rescale(values: &'static [&'static str], default: &'static str) -> ParamSpec {
    ParamSpec {
        name: "rescale",
        per_model: false,
        domain: Domain::Choice { values, default },
        help: "multiply what is kept of a task vector: l1 = until its magnitudes sum up as before (mergekit's true), \
               inverse_density = by 1/density, DELLA's by 1 over the probability of each element (the papers')",
    }
}

impl ParamSpec {
    pub fn required(&self) -> bool {
        matches!(self.domain, Domain::Number { default: None, .. })
    }

    /// Its value when the user gives none.
    pub fn default(&self) -> Option<Value> {
        match self.domain {
            Domain::Number { default, .. } => default.map(Value::Number),
            Domain::Switch { default } => Some(Value::Switch(default)),
            Domain::Choice { default, .. } => Some(Value::Choice(default.into())),
        }
    }

    /// `0 < density <= 1`.
    pub fn domain_text(&self) -> String {
        let name = self.name;
        match self.domain {
            Domain::Number { range, .. } => range_text(name, range),
            Domain::Switch { .. } => format!("{name} as true or false"),
            Domain::Choice { values, .. } => format!("{name} as one of {}", values.join(", ")),
        }
    }

    /// The value as it is meant: YAML writes 1 for 1.0, `rescale: true` for l1.
    pub fn read(&self, value: &Value) -> Option<Value> {
        match (self.domain, value) {
            (Domain::Number { range, .. }, Value::Number(number)) => range.contains(number).then(|| value.clone()),
            (Domain::Switch { .. }, Value::Switch(_)) => Some(value.clone()),
            (Domain::Choice { values, .. }, Value::Choice(name)) => {
                let spelled = name.replace('-', "_");
                values.contains(&spelled.as_str()).then_some(Value::Choice(spelled))
            }
            (Domain::Choice { values, .. }, Value::Switch(on)) => {
                let name = if *on { "l1" } else { "none" };
                values.contains(&name).then(|| Value::Choice(name.into()))
            }
            _ => None,
        }
    }
}

/// Every parameter of a method for one tensor: one value for each model, or one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Values(BTreeMap<&'static str, Vec<Value>>);

impl Values {
    /// A number for each model.
    pub fn each(&self, name: &str) -> Vec<f64> {
        let number = |value: &Value| match value {
            Value::Number(number) => *number,
            _ => panic!("the entry does not declare {name} as a number"),
        };
        self.of(name).iter().map(number).collect()
    }

    pub fn number(&self, name: &str) -> f64 {
        self.each(name)[0]
    }

    pub fn on(&self, name: &str) -> bool {
        self.of(name)[0] == Value::Switch(true)
    }

    pub fn choice(&self, name: &str) -> &str {
        match &self.of(name)[0] {
            Value::Choice(choice) => choice,
            _ => panic!("the entry does not declare {name} as a choice"),
        }
    }

    fn of(&self, name: &str) -> &[Value] {
        self.0.get(name).unwrap_or_else(|| panic!("the entry does not declare {name}"))
    }

    pub fn iter(&self) -> impl Iterator<Item = (&'static str, &[Value])> {
        self.0.iter().map(|(name, values)| (*name, values.as_slice()))
    }
}

impl Entry {
    /// The values for one tensor: of what `given(parameter, model)` says, what the method takes, and defaults for the
    /// rest. `models` leaves the base out; a parameter that models share is asked for without one.
    ///
    /// Fails on a required value that is missing and on one out of range; the error's key is `--<parameter>`.
    pub fn resolve(
        &self,
        models: usize,
        given: impl Fn(&str, Option<usize>) -> Result<Option<Value>>,
    ) -> Result<Values> {
        let mut values = Values::default();
        for spec in self.params {
            let one = |model| {
                let Some(value) = given(spec.name, model)?.or_else(|| spec.default()) else {
                    let detail = format!("{} requires it: {}", self.name, spec.help);
                    return Err(Error::option(flag(spec.name), detail));
                };
                spec.read(&value).ok_or_else(|| {
                    let detail = format!("{} expects {}, got {value}", self.name, spec.domain_text());
                    Error::option(flag(spec.name), detail)
                })
            };
            let of_spec = match spec.per_model {
                true => (0..models).map(|model| one(Some(model))).collect::<Result<_>>()?,
                false => vec![one(None)?],
            };
            values.0.insert(spec.name, of_spec);
        }
        Ok(values)
    }

    pub fn param(&self, name: &str) -> Option<&'static ParamSpec> {
        self.params.iter().find(|spec| spec.name == name)
    }
}

/// The entry with this name.
pub fn find(name: &str) -> Result<&'static Entry> {
    let name = name.replace('-', "_");
    let all = super::all();
    all.iter().copied().find(|entry| entry.name == name).ok_or_else(|| {
        let likeness = |entry: &&&Entry| strsim::jaro_winkler(&name, entry.name);
        let nearest = all.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b))).expect("the registry is not empty");
        let known: Vec<&str> = all.iter().map(|entry| entry.name).collect();
        let detail = format!("there is no {name:?}; did you mean {:?}? known are {}", nearest.name, known.join(", "));
        Error::option("--method", detail)
    })
}
