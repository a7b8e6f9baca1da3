//! What to merge and how: built from flags, or from mergekit's YAML.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_saphyr::Spanned;

use super::registry::{Base, Entry, Values, find};
use super::settings::{Setting, Settings, depth};
use crate::checkpoint::SaveDtype;
use crate::error::{At, Error, Place, Result};
use crate::params::{Value, flag};

/// A merge that has yet to find its models.
pub struct Recipe {
    pub method: &'static Entry,
    pub base: Option<PathBuf>,
    /// The models that are merged; not the base.
    pub models: Vec<Input>,
    /// For all models and tensors that nothing nearer decides.
    pub settings: Settings,
    /// What the merged weights are written as; as the base, or the first model, has them when it is not given.
    pub dtype: Option<SaveDtype>,
    /// Layers that `slices` of a YAML name; they must be all there are.
    pub layers: Option<usize>,
}

/// A model, and what holds for it alone.
#[derive(Clone, Debug, PartialEq)]
pub struct Input {
    pub model: PathBuf,
    pub settings: Settings,
}

impl Recipe {
    /// Checks what needs no files: the number of models, that none is there twice, and the names of parameters.
    pub fn check(&self) -> Result<()> {
        let method = self.method;
        let (least, most) = method.models;
        if self.models.len() < least || self.models.len() > most {
            let besides = if method.base == Base::Required { " besides the base" } else { "" };
            let expected = if least == most {
                format!("{least} model{besides}")
            } else {
                format!("{least} models or more{besides}")
            };
            return Err(Error::option(
                "--model",
                format!("{} merges {expected}, got {}", method.name, self.models.len()),
            ));
        }
        if method.base == Base::Required && self.base.is_none() {
            return Err(Error::option("--base-model", format!("missing; {} starts from a base", method.name)));
        }
        let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
        for (i, input) in self.models.iter().enumerate() {
            if self.models[..i].iter().any(|other| real(&other.model) == real(&input.model)) {
                let detail = format!("{} is there twice; add up its weights instead", input.model.display());
                return Err(Error::option("--model", detail));
            }
        }
        self.models.iter().try_for_each(|input| self.check_names(&input.settings, true))?;
        self.check_names(&self.settings, false)
    }

    fn check_names(&self, settings: &Settings, of_model: bool) -> Result<()> {
        for name in settings.keys() {
            match self.method.param(name) {
                None => {
                    let takes: Vec<&str> = self.method.params.iter().map(|spec| spec.name).collect();
                    let detail = format!("{} does not take it; it takes {}", self.method.name, takes.join(", "));
                    return Err(Error::option(flag(name), detail));
                }
                Some(spec) if of_model && !spec.per_model => {
                    let detail = "is one for all models; put it under the recipe's own parameters";
                    return Err(Error::option(flag(name), detail));
                }
                Some(_) => {}
            }
        }
        Ok(())
    }

    /// Every parameter for one tensor of a model with so many layers.
    pub fn values(&self, tensor: &str, layers: usize) -> Result<Values> {
        let depth = depth(tensor, layers);
        let given = |name: &str, model: Option<usize>| -> Result<Option<Value>> {
            let of_model = model.and_then(|model| self.models[model].settings.get(name));
            let near = of_model.and_then(|setting| setting.at(tensor, depth));
            Ok(near.or_else(|| self.settings.get(name).and_then(|setting| setting.at(tensor, depth))))
        };
        self.method.resolve(self.models.len(), given).map_err(|e| match e {
            Error::Option { key, detail } => Error::Option { key, detail: format!("for {tensor:?}: {detail}") },
            other => other,
        })
    }

    /// The model whose config, tokenizer and tensor names the merged one gets.
    pub fn first(&self) -> &Path {
        self.base.as_deref().unwrap_or_else(|| &self.models[0].model)
    }
}

/// mergekit's YAML, as far as it is about merging whole models.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    merge_method: Spanned<String>,
    base_model: Option<Spanned<Model>>,
    models: Option<Vec<ModelOf>>,
    slices: Option<Spanned<Vec<Slice>>>,
    parameters: Option<Parameters>,
    dtype: Option<Spanned<String>>,
    out_dtype: Option<Spanned<String>>,
    tokenizer_source: Option<Spanned<Model>>,
    tokenizer: Option<Spanned<IgnoredAny>>,
    chat_template: Option<Spanned<IgnoredAny>>,
    modules: Option<Spanned<IgnoredAny>>,
}

type Parameters = BTreeMap<String, Spanned<Setting>>;

/// mergekit also writes a model as a mapping, for revisions and adapters.
#[derive(Deserialize)]
#[serde(untagged)]
enum Model {
    Folder(String),
    Other(IgnoredAny),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ModelOf {
    model: Spanned<Model>,
    parameters: Option<Parameters>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Slice {
    sources: Vec<Source>,
    base_model: Option<Spanned<IgnoredAny>>,
    residual_weight: Option<Spanned<IgnoredAny>>,
    parameters: Option<Parameters>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Source {
    model: Spanned<Model>,
    layer_range: Spanned<(usize, usize)>,
    parameters: Option<Parameters>,
}

struct Reader<'a> {
    path: &'a Path,
}

/// Reads mergekit's YAML. Folders in it start at the file's own.
///
/// Unknown keys are errors with their line, and so is by name what this does not do: slices that move layers, modules,
/// tokenizers that are merged, adapters beside models.
pub fn read(path: &Path) -> Result<Recipe> {
    let text = std::fs::read_to_string(path).at(path)?;
    let options = serde_saphyr::options! { with_snippet: false };
    let file: File = serde_saphyr::from_str_with_options(&text, options).map_err(|e| yaml_error(path, &e))?;
    let recipe = Reader { path }.recipe(file)?;
    recipe.check().map_err(|e| Error::file(path, e))?;
    Ok(recipe)
}

fn yaml_error(path: &Path, error: &serde_saphyr::Error) -> Error {
    Error::file(path, error.to_string())
}

impl Reader<'_> {
    fn at<T>(&self, what: &Spanned<T>, detail: impl ToString) -> Error {
        let at = Place::Line(what.referenced.line() as usize);
        Error::Row { path: self.path.to_path_buf(), at, detail: detail.to_string() }
    }

    fn recipe(&self, file: File) -> Result<Recipe> {
        self.refuse("modules", &file.modules, "cuvee merges models of one module; list them under models")?;
        self.refuse(
            "tokenizer",
            &file.tokenizer,
            "the merged model gets the tokenizer of the base, or the first model",
        )?;
        self.refuse(
            "chat_template",
            &file.chat_template,
            "the merged model gets the one of the base, or the first model",
        )?;
        if let Some(source) = &file.tokenizer_source
            && !matches!(&source.value, Model::Folder(name) if name == "base")
        {
            let detail = "tokenizer_source: only base is built, as cuvee merges models of one vocabulary; drop it";
            return Err(self.at(source, detail));
        }
        let method = find(&file.merge_method.value).map_err(|e| self.at(&file.merge_method, detail_of(&e)))?;
        let base = file.base_model.as_ref().map(|model| self.folder(model)).transpose()?;
        let shared = self.settings(method, file.parameters)?;
        let dtype = file.out_dtype.as_ref().or(file.dtype.as_ref()).map(|name| self.dtype(name)).transpose()?;
        let (listed, settings, layers) = match (file.models, file.slices) {
            (Some(models), None) => {
                let input = |of: ModelOf| {
                    Ok(Input { model: self.folder(&of.model)?, settings: self.settings(method, of.parameters)? })
                };
                (models.into_iter().map(input).collect::<Result<Vec<_>>>()?, shared, None)
            }
            (None, Some(slices)) => {
                let (inputs, nearer, layers) = self.slice(method, slices)?;
                (inputs, shared.into_iter().chain(nearer).collect(), Some(layers))
            }
            _ => return Err(Error::file(self.path, "needs either models or slices")),
        };
        let models = self.without_base(method, base.as_deref(), listed)?;
        Ok(Recipe { method, base, models, settings, dtype, layers })
    }

    /// mergekit lets the base stand among the models; where it is what the others are compared with, it is not one of them.
    fn without_base(&self, method: &Entry, base: Option<&Path>, listed: Vec<Input>) -> Result<Vec<Input>> {
        if method.base == Base::None {
            return match base {
                Some(base) if !listed.iter().any(|input| input.model == base) => {
                    let detail =
                        format!("base_model: {} has no base; list it under models, with a weight", method.name);
                    Err(Error::file(self.path, detail))
                }
                _ => Ok(listed),
            };
        }
        let (of_base, models): (Vec<Input>, _) =
            listed.into_iter().partition(|input| Some(input.model.as_path()) == base);
        match of_base.iter().find_map(|input| input.settings.keys().next()) {
            Some(name) => {
                let detail = format!("{name}: does nothing on the base model, whose task vector is 0; drop it");
                Err(Error::file(self.path, detail))
            }
            None => Ok(models),
        }
    }

    /// One slice that has every layer of every model is a merge of whole models.
    fn slice(&self, method: &'static Entry, slices: Spanned<Vec<Slice>>) -> Result<(Vec<Input>, Settings, usize)> {
        let surgery = "slices: only one, from layer 0 to the last of every model, is built; \
                       cuvee does not move layers between models";
        let [_] = &slices.value[..] else { return Err(self.at(&slices, surgery)) };
        let slice = slices.value.into_iter().next().expect("there is one");
        self.refuse("base_model", &slice.base_model, "give it outside slices")?;
        self.refuse("residual_weight", &slice.residual_weight, "cuvee does not move layers between models")?;
        let last = slice.sources.first().map_or(0, |source| source.layer_range.value.1);
        if let Some(source) = slice.sources.iter().find(|source| source.layer_range.value != (0, last)) {
            return Err(self.at(&source.layer_range, surgery));
        }
        let settings = self.settings(method, slice.parameters)?;
        let input = |source: Source| {
            Ok(Input { model: self.folder(&source.model)?, settings: self.settings(method, source.parameters)? })
        };
        Ok((slice.sources.into_iter().map(input).collect::<Result<_>>()?, settings, last))
    }

    fn refuse<T>(&self, key: &str, what: &Option<Spanned<T>>, instead: &str) -> Result<()> {
        what.as_ref().map_or(Ok(()), |what| Err(self.at(what, format!("{key}: is not built; {instead}"))))
    }

    fn folder(&self, model: &Spanned<Model>) -> Result<PathBuf> {
        let Model::Folder(name) = &model.value else {
            return Err(self.at(model, "a model is a folder here; revisions and adapters of mergekit are not built"));
        };
        let path = self.path.parent().unwrap_or(Path::new("")).join(name);
        match path.is_dir() {
            true => Ok(path),
            false if name.contains('+') => {
                let detail = format!("{name:?}: adapters are merged first; see `cuvee merge --help`");
                Err(self.at(model, detail))
            }
            false => {
                let detail = format!("there is no folder {}; cuvee downloads nothing", path.display());
                Err(self.at(model, detail))
            }
        }
    }

    fn dtype(&self, name: &Spanned<String>) -> Result<SaveDtype> {
        match name.value.trim_start_matches("torch.") {
            "float32" | "f32" => Ok(SaveDtype::F32),
            "bfloat16" | "bf16" => Ok(SaveDtype::Bf16),
            "float16" | "f16" => Ok(SaveDtype::F16),
            _ => Err(self.at(name, format!("dtype: expected float32, bfloat16 or float16, found {:?}", name.value))),
        }
    }

    fn settings(&self, method: &Entry, parameters: Option<Parameters>) -> Result<Settings> {
        let mut settings = Settings::new();
        for (name, setting) in parameters.unwrap_or_default() {
            // It saves mergekit memory that is not taken here, and changes no number.
            if name == "int8_mask" {
                continue;
            }
            if method.param(&name).is_none() {
                let takes: Vec<&str> = method.params.iter().map(|spec| spec.name).collect();
                let detail = format!("{} does not take {name:?}; it takes {}", method.name, takes.join(", "));
                return Err(self.at(&setting, detail));
            }
            settings.insert(name, setting.value);
        }
        Ok(settings)
    }
}

fn detail_of(error: &Error) -> String {
    match error {
        Error::Option { detail, .. } => format!("merge_method: {detail}"),
        other => other.to_string(),
    }
}
