//! The adapters that were declared at the start, how much of each a request may take, and what a blend was made of.

use serde_json::{Map, Value, json};

use super::refusal::Refusal;
use crate::lineage::short;

/// An adapter that requests may name.
#[derive(Clone, PartialEq, Debug)]
pub struct Declared {
    pub name: String,
    /// blake3 of what it does.
    pub hash: String,
    /// The least and the most that a request may take of it.
    pub range: [f64; 2],
}

/// The model and what can be blended into it.
pub struct Soups {
    /// What requests call the model without adapters.
    pub base: String,
    pub base_hash: String,
    /// In the order of the model's adapters.
    pub adapters: Vec<Declared>,
}

/// How much of each adapter, in their order.
pub type Weights = Vec<f32>;

impl Soups {
    /// The weights that a request's `model` and `soup` ask for. A model is the base, or an adapter by its name: all of it.
    pub fn weights(&self, model: Option<&str>, soup: Option<&Map<String, Value>>) -> Result<Weights, Refusal> {
        let mut weights = vec![0.0; self.adapters.len()];
        match model.filter(|model| *model != self.base).map(|model| (model, self.find(model))) {
            None => {}
            Some((_, Some(at))) if soup.is_none() => weights[at] = self.within("model", at, 1.0)?,
            Some((model, Some(_))) => {
                let detail =
                    format!("{model:?} is an adapter, and so are those in \"soup\"; name {:?} here", self.base);
                return Err(Refusal::field("model", detail));
            }
            Some((model, None)) => {
                let detail = format!("there is no {model:?}; there are {}", self.names(Some(&self.base)));
                let status = axum::http::StatusCode::NOT_FOUND;
                return Err(Refusal { status, ..Refusal::field("model", detail) }.with_code("model_not_found"));
            }
        }
        for (name, weight) in soup.into_iter().flatten() {
            let field = format!("soup.{name}");
            let at = self.find(name).ok_or_else(|| {
                Refusal::field(&field, format!("there is no such adapter; there are {}", self.names(None)))
            })?;
            let number = weight.as_f64().ok_or_else(|| Refusal::field(&field, format!("{weight} is not a number")))?;
            weights[at] = self.within(&field, at, number)?;
        }
        Ok(weights)
    }

    fn find(&self, name: &str) -> Option<usize> {
        self.adapters.iter().position(|adapter| adapter.name == name)
    }

    fn names(&self, base: Option<&str>) -> String {
        let names = base.into_iter().chain(self.adapters.iter().map(|adapter| adapter.name.as_str()));
        let names: Vec<&str> = names.collect();
        if names.is_empty() { "none; the server was started without --adapter".into() } else { names.join(", ") }
    }

    fn within(&self, field: &str, at: usize, weight: f64) -> Result<f32, Refusal> {
        let Declared { name, range: [least, most], .. } = &self.adapters[at];
        if (*least..=*most).contains(&weight) {
            return Ok(weight as f32);
        }
        Err(Refusal::field(
            field,
            format!("{weight} of {name:?} is not from {least} to {most}, which this server allows"),
        ))
    }

    /// Adapters that a blend takes something of.
    fn taken<'a>(&'a self, weights: &'a [f32]) -> impl Iterator<Item = (&'a Declared, f32)> {
        self.adapters.iter().zip(weights.iter().copied()).filter(|(_, weight)| *weight != 0.0)
    }

    /// What made an answer: `base`, and `adapters` with their weights, all with their hashes.
    pub fn provenance(&self, weights: &[f32]) -> Value {
        let adapter =
            |(adapter, weight): (&Declared, f32)| json!({"name": adapter.name, "weight": weight, "hash": adapter.hash});
        let adapters: Vec<Value> = self.taken(weights).map(adapter).collect();
        json!({"base": {"name": self.base, "hash": self.base_hash}, "adapters": adapters})
    }

    /// The same in a line: `base@hash; concise=0.7@hash`.
    pub fn line(&self, weights: &[f32]) -> String {
        let visible = |c: char| if (' '..='~').contains(&c) { c } else { '_' };
        let mut line = format!("{}@{}", self.base, short(&self.base_hash));
        for (adapter, weight) in self.taken(weights) {
            line += &format!("; {}={weight}@{}", adapter.name, short(&adapter.hash));
        }
        line.chars().map(visible).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn soups() -> Soups {
        let declared = |name: &str, range| Declared { name: name.into(), hash: "ab".repeat(32), range };
        let adapters = vec![declared("concise", [0.0, 1.0]), declared("friendly", [-0.5, 2.0])];
        Soups { base: "llama".into(), base_hash: "cd".repeat(32), adapters }
    }

    fn weights(model: Option<&str>, soup: Value) -> Result<Weights, String> {
        soups()
            .weights(model, soup.as_object())
            .map_err(|refusal| format!("{} {}", refusal.status.as_u16(), refusal.message))
    }

    #[test]
    fn weights_come_from_the_soup_or_the_models_name() {
        assert_eq!(weights(None, Value::Null), Ok(vec![0.0, 0.0]));
        assert_eq!(weights(Some("llama"), json!({"friendly": 0.5})), Ok(vec![0.0, 0.5]));
        assert_eq!(weights(Some("concise"), Value::Null), Ok(vec![1.0, 0.0]));
        assert_eq!(weights(None, json!({"friendly": -0.5, "concise": 1})), Ok(vec![1.0, -0.5]));
    }

    #[test]
    fn what_was_not_declared_is_refused_with_what_there_is() {
        for (model, soup, part) in [
            (None, json!({"rude": 1}), "400 soup.rude: there is no such adapter; there are concise, friendly"),
            (None, json!({"../secret": 1}), "there is no such adapter"),
            (None, json!({"concise": 1.5}), "400 soup.concise: 1.5 of \"concise\" is not from 0 to 1"),
            (None, json!({"friendly": -0.6}), "not from -0.5 to 2"),
            (None, json!({"concise": "1"}), "soup.concise: \"1\" is not a number"),
            (None, json!({"concise": null}), "is not a number"),
            (Some("gpt-4"), Value::Null, "404 model: there is no \"gpt-4\"; there are llama, concise, friendly"),
            (Some("concise"), json!({"friendly": 1}), "400 model: \"concise\" is an adapter"),
        ] {
            let message = weights(model, soup).unwrap_err();
            assert!(message.contains(part), "{message:?} lacks {part:?}");
        }
    }

    #[test]
    fn an_answer_says_what_made_it() {
        let made = soups().provenance(&[0.0, 0.5]);
        assert_eq!(made["base"]["hash"], "cd".repeat(32));
        assert_eq!(made["adapters"], json!([{"name": "friendly", "weight": 0.5, "hash": "ab".repeat(32)}]));
        assert_eq!(soups().line(&[0.0, 0.5]), "llama@cdcdcdcdcdcd; friendly=0.5@abababababab");
    }
}
