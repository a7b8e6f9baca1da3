//! A text made of a row's columns, in Jinja as in the harness's `doc_to_text`: `"Question: {{question}}\nAnswer:"`.

use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, UndefinedBehavior, Value as Jinja};

use crate::data::Object;
use crate::error::{At, Result};

const NAME: &str = "template";
/// Instructions that one rendering may take.
const FUEL: u64 = 1_000_000;

pub(super) struct Template(Environment<'static>);

impl Template {
    pub fn new(path: &Path, source: String) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_fuel(Some(FUEL));
        let syntax = SyntaxConfig::builder().keep_trailing_newline(true).build();
        environment.set_syntax(syntax.expect("no delimiter was changed"));
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        let shown = source.clone();
        environment.add_template_owned(NAME, source).map_err(|e| format!("the template {shown:?}: {e}")).at(path)?;
        Ok(Self(environment))
    }

    /// The inner error says what the row lacks.
    pub fn render(&self, row: &Object) -> Result<String, String> {
        let template = self.0.get_template(NAME).expect("it was added");
        let found: Vec<&str> = row.keys().map(String::as_str).collect();
        let failed = |e| format!("the template cannot be filled in: {e}; found the columns [{}]", found.join(", "));
        template.render(Jinja::from(Serde(row))).map_err(failed)
    }
}
