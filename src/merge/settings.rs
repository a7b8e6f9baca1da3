//! Parameters as recipes set them: one value, a list over the layers, or either for tensors whose names fit; mergekit's
//! rules.

use std::collections::BTreeMap;

use crate::params::Value;
use serde::Deserialize;

/// What a recipe says of parameters, by name.
pub type Settings = BTreeMap<String, Setting>;

/// What a recipe says of one parameter.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(untagged)]
pub enum Setting {
    Plain(Plain),
    Conditional(Conditional),
    /// The first that fits a tensor decides; where none fits, the parameter is not set.
    Conditionals(Vec<Conditional>),
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Conditional {
    pub value: Plain,
    /// Text that a tensor's name contains, with * for anything in between; all tensors without it.
    pub filter: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(untagged)]
pub enum Plain {
    One(Value),
    /// From the first layer to the last: numbers are interpolated, other values chosen from.
    Gradient(Vec<Value>),
}

impl Setting {
    /// The value for a tensor that lies `depth` into the layers, from 0 = the first to 1 = the last.
    pub fn at(&self, tensor: &str, depth: f64) -> Option<Value> {
        match self {
            Self::Plain(plain) => plain.at(depth),
            Self::Conditional(conditional) => conditional.fits(tensor).then(|| conditional.value.at(depth)).flatten(),
            Self::Conditionals(each) => each.iter().find(|one| one.fits(tensor)).and_then(|one| one.value.at(depth)),
        }
    }
}

impl From<Value> for Setting {
    fn from(value: Value) -> Self {
        Self::Plain(Plain::One(value))
    }
}

impl Conditional {
    fn fits(&self, tensor: &str) -> bool {
        self.filter.as_ref().is_none_or(|filter| fits(filter, tensor))
    }
}

/// Whether a name contains the pieces between the stars, one after the other.
pub fn fits(filter: &str, name: &str) -> bool {
    let mut rest = name;
    filter.split('*').all(|piece| match rest.find(piece) {
        Some(at) => {
            rest = &rest[at + piece.len()..];
            true
        }
        None => false,
    })
}

impl Plain {
    fn at(&self, depth: f64) -> Option<Value> {
        let values = match self {
            Self::One(value) => return Some(value.clone()),
            Self::Gradient(values) => values,
        };
        let last = values.len().checked_sub(1)?;
        let at = depth * last as f64;
        let (below, above) = (at as usize, (at as usize + 1).min(last));
        match (&values[below], &values[above]) {
            (Value::Number(low), Value::Number(high)) => {
                let share = at - below as f64;
                Some(Value::Number((1.0 - share) * low + share * high))
            }
            (value, _) => Some(value.clone()),
        }
    }
}

/// How far into the layers a tensor lies, by the number in its name; tensors outside them are where the first layer is.
pub fn depth(tensor: &str, layers: usize) -> f64 {
    match layer(tensor) {
        Some(_) if layers < 2 => 1.0,
        Some(layer) => layer as f64 / (layers - 1) as f64,
        None => 0.0,
    }
}

/// The number of a tensor's layer: the first part of its name that is a number.
pub fn layer(tensor: &str) -> Option<usize> {
    tensor.split('.').find_map(|part| part.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(values: &[f64]) -> Plain {
        Plain::Gradient(values.iter().map(|value| Value::Number(*value)).collect())
    }

    #[test]
    fn gradients_reach_from_the_first_layer_to_the_last() {
        let setting = Setting::Plain(numbers(&[0.0, 1.0, 0.5]));
        let at = |name: &str, layers| setting.at(name, depth(name, layers));
        for (name, expected) in [("model.layers.0.q", 0.0), ("model.layers.2.q", 1.0), ("model.layers.3.q", 0.75)] {
            assert_eq!(at(name, 5), Some(expected.into()), "{name}");
        }
        assert_eq!(at("model.norm.weight", 5), Some(0.0.into()));
        assert_eq!(at("h.0.attn", 1), Some(0.5.into()));
        assert_eq!(numbers(&[]).at(0.5), None);
        assert_eq!(numbers(&[7.0]).at(1.0), Some(7.0.into()));
        // What is no number is chosen, not interpolated.
        let names = Plain::Gradient(vec!["none".into(), "l1".into()]);
        assert_eq!((names.at(0.99), names.at(1.0)), (Some("none".into()), Some("l1".into())));
    }

    #[test]
    fn the_first_filter_that_fits_decides() {
        let one = |filter: Option<&str>, value: f64| Conditional {
            value: Plain::One(value.into()),
            filter: filter.map(String::from),
        };
        let setting = Setting::Conditionals(vec![one(Some("self_attn"), 0.3), one(Some("*"), 0.7), one(None, 0.9)]);
        assert_eq!(setting.at("layers.0.self_attn.q_proj", 0.0), Some(0.3.into()));
        assert_eq!(setting.at("layers.0.mlp", 0.0), Some(0.7.into()));
        assert_eq!(Setting::Conditional(one(Some("mlp"), 0.3)).at("norm", 0.0), None);
        for (filter, name, expected) in [
            ("layers.1.*proj", "layers.1.q_proj", true),
            ("layers.1.*proj", "layers.10.q_proj", false),
            ("", "x", true),
        ] {
            assert_eq!(fits(filter, name), expected, "{filter} {name}");
        }
    }
}
