//! Parameters as data: what an entry of a registry takes, within which bounds, and what was given. Flags, help, listings,
//! recipes and tests read the same declarations.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::{Bound, Index, RangeBounds};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Something that an entry of a registry takes. A name means one thing in the whole registry: entries that share it share the
/// flag; only default and range may differ.
#[derive(Clone, Copy)]
pub struct ParamSpec {
    /// As in a recipe: `label_smoothing`.
    pub name: &'static str,
    pub domain: Domain,
    /// Another parameter and the value that it must have for this one to do anything. Else giving it is an error, and it
    /// has no value.
    pub only_with: Option<(&'static str, &'static str)>,
    /// Meaning and unit.
    pub help: &'static str,
}

/// What values a parameter may have.
#[derive(Clone, Copy, PartialEq)]
pub enum Domain {
    Number {
        /// The value when the user gives none; `None` makes the parameter required. A default must mean "off", or be the
        /// constant that the paper defines the loss with: how strong a method is, is the user's choice.
        default: Option<f64>,
        /// Neither NaN nor anything outside is accepted.
        range: (Bound<f64>, Bound<f64>),
        /// A usual value, for help and for errors that say what to type.
        example: f64,
    },
    /// A whole number, 1 at least.
    Count {
        default: u32,
        example: u32,
    },
    Choice {
        values: &'static [&'static str],
        default: &'static str,
    },
    /// Off unless it is given.
    Switch,
}

/// (0, inf)
pub const POSITIVE: (Bound<f64>, Bound<f64>) = (Bound::Excluded(0.0), Bound::Excluded(f64::INFINITY));
/// [0, inf)
pub const NOT_NEGATIVE: (Bound<f64>, Bound<f64>) = (Bound::Included(0.0), Bound::Excluded(f64::INFINITY));
/// (-inf, inf)
pub const FINITE: (Bound<f64>, Bound<f64>) = (Bound::Excluded(f64::NEG_INFINITY), Bound::Excluded(f64::INFINITY));

/// `0 <= label_smoothing < 0.5`.
pub fn range_text(name: &str, (low, high): (Bound<f64>, Bound<f64>)) -> String {
    let low = match low {
        Bound::Included(low) => format!("{low} <= "),
        Bound::Excluded(low) => format!("{low} < "),
        Bound::Unbounded => String::new(),
    };
    let high = match high {
        Bound::Included(high) => format!(" <= {high}"),
        Bound::Excluded(high) => format!(" < {high}"),
        Bound::Unbounded => String::new(),
    };
    format!("{low}{name}{high}")
}

impl ParamSpec {
    pub fn required(&self) -> bool {
        self.only_with.is_none() && self.default().is_none()
    }

    /// Its value when the user gives none.
    pub fn default(&self) -> Option<Value> {
        match self.domain {
            Domain::Number { default, .. } => default.map(Value::Number),
            Domain::Count { default, .. } => Some(f64::from(default).into()),
            Domain::Choice { default, .. } => Some(default.into()),
            Domain::Switch => Some(false.into()),
        }
    }

    /// A value that is worth a try.
    pub fn example(&self) -> Value {
        match self.domain {
            Domain::Number { example, .. } => example.into(),
            Domain::Count { example, .. } => f64::from(example).into(),
            Domain::Choice { values, .. } => values[values.len() - 1].into(),
            Domain::Switch => true.into(),
        }
    }

    /// As on the command line: `--label-smoothing`.
    pub fn flag(&self) -> String {
        flag(self.name)
    }

    /// `0 <= label_smoothing < 0.5`.
    pub fn domain_text(&self) -> String {
        let name = self.name;
        match self.domain {
            Domain::Number { range, .. } => range_text(name, range),
            Domain::Count { .. } => format!("{name} as a whole number from 1 on"),
            Domain::Choice { values, .. } => format!("{name} as one of {}", values.join(", ")),
            Domain::Switch => format!("{name} as true or false"),
        }
    }

    pub fn accepts(&self, value: &Value) -> bool {
        match (self.domain, value) {
            (Domain::Number { range, .. }, Value::Number(number)) => range.contains(number),
            (Domain::Count { .. }, Value::Number(number)) => {
                number.fract() == 0.0 && (1.0..=f64::from(u32::MAX)).contains(number)
            }
            (Domain::Choice { values, .. }, Value::Choice(name)) => values.contains(&name.as_str()),
            (Domain::Switch, Value::Switch(_)) => true,
            _ => false,
        }
    }

    /// What to type: `--beta 0.1`.
    fn sample(&self) -> String {
        match self.example() {
            Value::Switch(_) => self.flag(),
            value => format!("{} {value}", self.flag()),
        }
    }

    /// The value that the entry `owner` of these `params` gets, or `None` where [`ParamSpec::only_with`] makes it meaningless.
    fn value(&self, owner: &str, params: &[Self], given: &Params) -> Result<Option<Value>> {
        if let Some((other, wanted)) = self.only_with {
            let spec = params.iter().find(|spec| spec.name == other).expect("an entry has what its parameters need");
            if given.get(other).cloned().or(spec.default()) != Some(wanted.into()) {
                return match given.get(self.name) {
                    Some(_) => Err(Error::option(
                        self.flag(),
                        format!("does nothing without {} {wanted}; drop it", flag(other)),
                    )),
                    None => Ok(None),
                };
            }
        }
        let Some(value) = given.get(self.name).cloned().or(self.default()) else {
            let detail = format!("{owner} requires it: {}; for example `{}`", self.help, self.sample());
            return Err(Error::option(self.flag(), detail));
        };
        self.check(owner, &value).map(|()| Some(value))
    }

    pub fn check(&self, owner: &str, value: &Value) -> Result<()> {
        if self.accepts(value) {
            return Ok(());
        }
        let detail = format!("{owner} expects {}, got {value}; for example `{}`", self.domain_text(), self.sample());
        Err(Error::option(self.flag(), detail))
    }
}

pub fn flag(name: &str) -> String {
    format!("--{}", name.replace('_', "-"))
}

/// What a parameter is set to.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(untagged)]
pub enum Value {
    Number(f64),
    Choice(String),
    Switch(bool),
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Number(number) => number.fmt(f),
            Self::Choice(name) => name.fmt(f),
            Self::Switch(on) => on.fmt(f),
        }
    }
}

impl From<f64> for Value {
    fn from(number: f64) -> Self {
        Self::Number(number)
    }
}

impl From<&str> for Value {
    fn from(name: &str) -> Self {
        Self::Choice(name.to_owned())
    }
}

impl From<bool> for Value {
    fn from(on: bool) -> Self {
        Self::Switch(on)
    }
}

/// Values by parameter name.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Params(BTreeMap<String, Value>);

impl Params {
    pub fn set(&mut self, name: impl Into<String>, value: impl Into<Value>) {
        self.0.insert(name.into(), value.into());
    }

    pub fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name)
    }

    pub fn number(&self, name: &str) -> Option<f64> {
        match self.get(name) {
            Some(Value::Number(number)) => Some(*number),
            _ => None,
        }
    }

    pub fn choice(&self, name: &str) -> Option<&str> {
        match self.get(name) {
            Some(Value::Choice(choice)) => Some(choice),
            _ => None,
        }
    }

    /// Whether a switch was given and is on.
    pub fn on(&self, name: &str) -> bool {
        self.get(name) == Some(&Value::Switch(true))
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value))
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }
}

impl<K: Into<String>, V: Into<Value>> FromIterator<(K, V)> for Params {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(pairs: I) -> Self {
        Self(pairs.into_iter().map(|(name, value)| (name.into(), value.into())).collect())
    }
}

/// A number, for what builds an entry, which may rely on every parameter that the entry declares.
impl Index<&str> for Params {
    type Output = f64;

    fn index(&self, name: &str) -> &f64 {
        match self.get(name) {
            Some(Value::Number(number)) => number,
            _ => panic!("the registry entry does not declare the number {name}"),
        }
    }
}

/// The values that an entry is built from: of what was given, what it takes, and defaults for the rest.
pub fn resolve(owner: &str, params: &[ParamSpec], given: &Params) -> Result<Params> {
    let mut values = Params::default();
    for spec in params {
        if let Some(value) = spec.value(owner, params, given)? {
            values.set(spec.name, value);
        }
    }
    Ok(values)
}

/// A parameter of a registry, once for all entries that take it.
#[derive(Default)]
pub struct Shared {
    /// Of each owner, whose defaults and ranges may differ; the rest is the same.
    pub specs: Vec<&'static ParamSpec>,
    /// The owners' names, in the same order; what has no name in the registry is not among them.
    pub owners: Vec<&'static str>,
}

/// Every parameter of a registry by name, from each with its owner.
pub fn shared(
    specs: impl Iterator<Item = (&'static ParamSpec, Option<&'static str>)>,
) -> BTreeMap<&'static str, Shared> {
    let mut found: BTreeMap<&str, Shared> = BTreeMap::new();
    for (spec, owner) in specs {
        let shared = found.entry(spec.name).or_default();
        shared.specs.push(spec);
        shared.owners.extend(owner);
    }
    found
}
