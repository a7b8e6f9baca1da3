//! `cuvee merge` of whole checkpoints: the flags, most of which are the registry's, and what is said about the work.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use clap::builder::PossibleValue;
use clap::{Arg, ArgAction, ArgMatches, Args, FromArgMatches, ValueEnum};

use crate::checkpoint::SaveDtype;
use crate::cli::args::seed;
use crate::device::Philox;
use crate::error::{At, Error, Result};
use crate::lineage::{Lineage, Parent};
use crate::machine::human;
use crate::merge::{self, Conditional, Domain, Input, Merge, ParamSpec, Plain, Recipe, Setting, Settings, Value};
use crate::progress::say;

#[derive(Debug, Clone, PartialEq, Args)]
pub struct ModelsArgs {
    /// What to do, by mergekit's YAML; folders in it start at its own
    #[arg(long, value_name = "FILE", help_heading = "Models")]
    pub config: Option<PathBuf>,
    /// How to merge; `cuvee list merges` explains each
    #[arg(long, value_name = "NAME", value_enum, help_heading = "Models")]
    pub method: Option<Method>,
    /// What task vectors start from; of slerp, where the path starts
    #[arg(long, value_name = "DIR", help_heading = "Models")]
    pub base_model: Option<PathBuf>,
    /// A model to merge, with its weight, as DIR=0.5; repeat the flag for several
    #[arg(long, value_name = "DIR[=W]", value_parser = model, help_heading = "Models")]
    pub model: Vec<ModelArg>,
    /// Folder for the merged model
    #[arg(long, value_name = "DIR", required_unless_present = "dry_run", help_heading = "Models")]
    pub output_dir: Option<PathBuf>,
    #[command(flatten)]
    pub params: ParamArgs,
    /// Other values for tensors whose names contain PATTERN (* stands for anything in between): one for all models or one for
    /// each, as mlp:weight=0.3,0.7; the first that fits decides. Repeat the flag for several
    #[arg(long, value_name = "PATTERN:NAME=V[,V..]", value_parser = overriding, help_heading = "Parameters")]
    pub r#override: Vec<Override>,
    /// Type of the weights that are written [default: as the base, else the first model, has them]
    #[arg(long, value_name = "TYPE", help_heading = "Output")]
    pub dtype: Option<Stored>,
    /// Seed of the masks of methods that draw some; the same seed, models and tensors give the same masks
    #[arg(long, value_name = "N", default_value = "0", value_parser = seed, help_heading = "Output")]
    pub seed: u64,
    /// Check everything that can be told without reading weights, say what would be done, and stop
    #[arg(long, help_heading = "Output")]
    pub dry_run: bool,
}

/// A method of the registry.
#[derive(Clone, Copy)]
pub struct Method(pub &'static merge::Entry);

impl PartialEq for Method {
    fn eq(&self, other: &Self) -> bool {
        self.0.name == other.0.name
    }
}

impl std::fmt::Debug for Method {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(self.0.name)
    }
}

impl ValueEnum for Method {
    fn value_variants<'a>() -> &'a [Self] {
        static ALL: std::sync::LazyLock<Vec<Method>> =
            std::sync::LazyLock::new(|| merge::all().iter().map(|entry| Method(entry)).collect());
        &ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.0.name).alias(self.0.name.replace('_', "-")))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Stored {
    F32,
    Bf16,
    F16,
}

impl From<Stored> for SaveDtype {
    fn from(dtype: Stored) -> Self {
        match dtype {
            Stored::F32 => Self::F32,
            Stored::Bf16 => Self::Bf16,
            Stored::F16 => Self::F16,
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct ModelArg {
    pub path: PathBuf,
    pub weight: Option<f64>,
}

/// `DIR=0.5`. A folder that is there keeps its whole name.
pub fn model(text: &str) -> Result<ModelArg, String> {
    let split = text.rsplit_once('=').filter(|_| !Path::new(text).is_dir());
    match split.map(|(path, weight)| (path, weight.parse::<f64>())) {
        None => Ok(ModelArg { path: text.into(), weight: None }),
        Some((path, Ok(weight))) if weight.is_finite() && !path.is_empty() => {
            Ok(ModelArg { path: path.into(), weight: Some(weight) })
        }
        Some(_) => Err("expected a folder, or a folder and its weight, such as DIR=0.5".into()),
    }
}

/// `--override` as it was typed.
#[derive(Debug, Clone, PartialEq)]
pub struct Override {
    pub pattern: String,
    pub name: String,
    pub values: Vec<Value>,
}

impl std::fmt::Display for Override {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let values: Vec<String> = self.values.iter().map(ToString::to_string).collect();
        write!(f, "{}:{}={}", self.pattern, self.name, values.join(","))
    }
}

fn overriding(text: &str) -> Result<Override, String> {
    let parts = text.split_once('=').and_then(|(what, values)| Some((what.rsplit_once(':')?, values)));
    match parts {
        Some(((pattern, name), values)) if !name.is_empty() && !values.is_empty() => Ok(Override {
            pattern: pattern.into(),
            name: name.replace('-', "_"),
            values: values.split(',').map(value).collect(),
        }),
        _ => Err("expected PATTERN:NAME=VALUES, such as mlp:weight=0.3,0.7".into()),
    }
}

fn value(text: &str) -> Value {
    match (text.parse::<bool>(), text.parse::<f64>()) {
        (Ok(on), _) => on.into(),
        (_, Ok(number)) => number.into(),
        _ => text.into(),
    }
}

/// The flags of parameters are those of the registry: a method's file is all that knows them.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ParamArgs(pub BTreeMap<String, Vec<Value>>);

/// Every parameter of every method once, with the methods that take it.
fn params() -> BTreeMap<&'static str, Vec<(&'static merge::Entry, &'static ParamSpec)>> {
    let mut found: BTreeMap<&str, Vec<_>> = BTreeMap::new();
    for entry in merge::all() {
        entry.params.iter().for_each(|spec| found.entry(spec.name).or_default().push((*entry, spec)));
    }
    found
}

fn param_help(takers: &[(&merge::Entry, &ParamSpec)]) -> String {
    let spec = takers[0].1;
    let mut help = spec.help.to_string();
    help[..1].make_ascii_uppercase();
    if spec.per_model {
        help += "; one for all models, or one for each in their order";
    }
    let mut defaults: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for (entry, spec) in takers {
        let default = spec.default().map_or("required".into(), |default| format!("default: {default}"));
        defaults.entry(default).or_default().push(entry.name);
    }
    let each: Vec<String> = defaults.iter().map(|(default, of)| format!("{} [{default}]", of.join(", "))).collect();
    format!("{help} ({})", each.join("; "))
}

impl Args for ParamArgs {
    fn augment_args(command: clap::Command) -> clap::Command {
        let arg = |(name, takers): (&'static str, Vec<(_, &'static ParamSpec)>)| {
            let spec = takers[0].1;
            let arg = Arg::new(name).long(name.replace('_', "-")).help(param_help(&takers)).help_heading("Parameters");
            let parser = move |text: &str| match takers.iter().find_map(|(_, spec)| spec.read(&value(text))) {
                Some(value) => Ok(value),
                None => Err(format!("expected {}", takers[0].1.domain_text())),
            };
            let arg = arg.value_parser(parser);
            match spec.domain {
                Domain::Number { .. } if spec.per_model => arg.value_name("F").action(ArgAction::Append).num_args(1..),
                Domain::Number { .. } => arg.value_name("F"),
                Domain::Choice { .. } => arg.value_name("NAME"),
                Domain::Switch { .. } => arg.value_name("BOOL").num_args(0..=1).default_missing_value("true"),
            }
        };
        command.args(params().into_iter().map(arg))
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for ParamArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let of = |name: &str| matches.get_many::<Value>(name).into_iter().flatten().cloned().collect::<Vec<_>>();
        let given = params().into_keys().map(|name| (name.to_string(), of(name)));
        Ok(Self(given.filter(|(_, values)| !values.is_empty()).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl ModelsArgs {
    /// What no single flag can know.
    pub fn check(&self, flags: &ArgMatches) -> Result<()> {
        let given = |(flag, given): (&'static str, bool)| given.then_some(flag);
        if self.config.is_some() {
            let mine = [
                ("--method", self.method.is_some()),
                ("--base-model", self.base_model.is_some()),
                ("--model", !self.model.is_empty()),
                ("--override", !self.r#override.is_empty()),
            ];
            let param = self.params.0.keys().next().map(|name| merge::flag(name));
            if let Some(flag) = mine.into_iter().find_map(given).map(String::from).or(param) {
                return Err(Error::option(flag, "is the recipe's business where --config is given; change it there"));
            }
            return Ok(());
        }
        let Some(method) = self.method else {
            return Err(Error::option("--method", "missing; give it with models, or a recipe as --config"));
        };
        if crate::cli::is_given(flags, "seed") && !method.0.random {
            return Err(Error::option("--seed", format!("does nothing with {}, which draws nothing", method.0.name)));
        }
        self.recipe(method).and_then(|recipe| recipe.check())
    }

    fn recipe(&self, method: Method) -> Result<Recipe> {
        let mut recipe = Recipe {
            method: method.0,
            base: self.base_model.clone(),
            models: self.model.iter().map(|arg| Input { model: arg.path.clone(), settings: Settings::new() }).collect(),
            settings: Settings::new(),
            dtype: self.dtype.map(SaveDtype::from),
            layers: None,
        };
        if let (Some(_), merge::Base::None) = (&self.base_model, method.0.base) {
            return Err(Error::option("--base-model", format!("does nothing with {}; drop it", method.0.name)));
        }
        for (name, values) in &self.params.0 {
            spread(&mut recipe, name, values, |_, value| Some(value.into()))?;
        }
        for (input, arg) in recipe.models.iter_mut().zip(&self.model) {
            if let Some(weight) = arg.weight
                && input.settings.insert("weight".into(), Value::Number(weight).into()).is_some()
            {
                return Err(Error::option("--weight", "is given with --model DIR=W too; drop one"));
            }
        }
        for Override { pattern, name, values } in &self.r#override {
            let conditional = |old: Option<Setting>, value| {
                let mut each = match old {
                    Some(Setting::Conditionals(each)) => each,
                    Some(Setting::Plain(value)) => vec![Conditional { value, filter: None }],
                    Some(Setting::Conditional(one)) => vec![one],
                    None => vec![],
                };
                // What holds for all comes last, or nothing after it would be looked at.
                let at = each.iter().position(|one| one.filter.is_none()).unwrap_or(each.len());
                each.insert(at, Conditional { value: Plain::One(value), filter: Some(pattern.clone()) });
                Some(Setting::Conditionals(each))
            };
            spread(&mut recipe, name, values, conditional)?;
        }
        Ok(recipe)
    }
}

/// Gives a parameter its value, or each model its own.
fn spread(
    recipe: &mut Recipe,
    name: &str,
    values: &[Value],
    set: impl Fn(Option<Setting>, Value) -> Option<Setting>,
) -> Result<()> {
    let of_models = recipe.method.param(name).is_some_and(|spec| spec.per_model);
    let put = |settings: &mut Settings, value: &Value| {
        let old = settings.remove(name);
        settings.extend(set(old, value.clone()).map(|setting| (name.to_string(), setting)));
    };
    match values {
        [value] if of_models => recipe.models.iter_mut().for_each(|input| put(&mut input.settings, value)),
        [value] => put(&mut recipe.settings, value),
        _ if of_models && values.len() == recipe.models.len() => {
            recipe.models.iter_mut().zip(values).for_each(|(input, value)| put(&mut input.settings, value));
        }
        _ if of_models => {
            let detail =
                format!("{} values for {} models; give one, or one for each", values.len(), recipe.models.len());
            return Err(Error::option(merge::flag(name), detail));
        }
        _ => return Err(Error::option(merge::flag(name), format!("takes one value here, got {}", values.len()))),
    }
    Ok(())
}

pub fn run(args: &ModelsArgs) -> Result<()> {
    let mut recipe = match (&args.config, args.method) {
        (Some(config), _) => merge::recipe::read(config)?,
        (None, Some(method)) => args.recipe(method)?,
        (None, None) => unreachable!("`check` wants one of them"),
    };
    recipe.dtype = args.dtype.map(SaveDtype::from).or(recipe.dtype);
    let merge = Merge::open(recipe)?;
    describe(&merge)?.iter().for_each(say);
    merge.warnings.iter().for_each(|text| say(format_args!("warning: {text}")));
    let (false, Some(output)) = (args.dry_run, &args.output_dir) else { return Ok(()) };
    let done = merge.run(output, &draw(args.seed), |folder| lineage(args, &merge)?.write_as(output, folder))?;
    if let Some(moved) = &done.moved {
        say(format_args!("what was in {} is in {} now", output.display(), moved.display()));
    }
    let rate = |bytes: u64| bytes as f64 / 1e6 / done.time.as_secs_f64();
    crate::cli::print(&format!(
        "wrote {}: {} tensors, {:.1} M parameters, {} in {:.2} s; {:.0} MB/s written, {:.0} MB/s read and written\n",
        output.display(),
        done.tensors,
        done.parameters as f64 / 1e6,
        human(done.bytes_written as usize),
        done.time.as_secs_f64(),
        rate(done.bytes_written),
        rate(done.bytes_written + done.bytes_read),
    ))
}

/// Where the merged model comes from; reads the models again, for their hashes.
fn lineage(args: &ModelsArgs, merge: &Merge) -> Result<Lineage> {
    let recipe = merge.recipe();
    let mut lineage = Lineage::of("merge").with_argument("method", recipe.method.name);
    if recipe.method.random {
        lineage = lineage.with_argument("seed", args.seed);
    }
    if let Some(config) = &args.config {
        lineage = lineage.with_argument("recipe", std::fs::read_to_string(config).at(config)?);
    }
    for (name, values) in &args.params.0 {
        lineage = lineage.with_argument(name, serde_json::to_value(values).expect("plain data"));
    }
    if !args.r#override.is_empty() {
        lineage =
            lineage.with_argument("override", args.r#override.iter().map(ToString::to_string).collect::<Vec<_>>());
    }
    if recipe.method.base == merge::Base::Required {
        lineage = lineage
            .with_parents(recipe.base.iter().map(|base| Parent::open("base", base)).collect::<Result<Vec<_>>>()?);
    }
    for input in &recipe.models {
        let parent = Parent::open("model", &input.model)?;
        lineage = lineage.with_parent(match input.settings.get("weight") {
            Some(Setting::Plain(Plain::One(Value::Number(weight)))) => parent.weighted(*weight),
            _ => parent,
        });
    }
    Ok(lineage)
}

/// Random words by (seed, model, tensor, element): nothing is stored, and no order of threads changes them.
fn draw(seed: u64) -> impl Fn(usize, &str, usize, &mut [u32]) + Sync {
    move |model, tensor, start, out| {
        let random = Philox::named(seed, &format!("merge/{model}/{tensor}"));
        let Range { start: mut at, end } = start..start + out.len();
        while at < end {
            let block = random.words(at as u64 / 4);
            let taken = (4 - at % 4).min(end - at);
            out[at - start..at - start + taken].copy_from_slice(&block[at % 4..at % 4 + taken]);
            at += taken;
        }
    }
}

/// What will be done, as lines.
fn describe(merge: &Merge) -> Result<Vec<String>> {
    let recipe = merge.recipe();
    let mut of_models: Vec<BTreeMap<&str, Vec<Value>>> = vec![BTreeMap::new(); recipe.models.len()];
    let mut of_all: BTreeMap<&str, Vec<Value>> = BTreeMap::new();
    for tensor in merge.tensors() {
        for (name, values) in merge.values(tensor)?.iter() {
            match recipe.method.param(name) {
                Some(spec) if spec.per_model => values.iter().zip(&mut of_models).for_each(|(value, of)| {
                    of.entry(name).or_default().push(value.clone());
                }),
                _ => of_all.entry(name).or_default().push(values[0].clone()),
            }
        }
    }
    let text = |of: &BTreeMap<&str, Vec<Value>>| {
        of.iter().map(|(name, values)| format!("{name} {}", range(values))).collect::<Vec<_>>().join(", ")
    };
    let mut lines = vec![format!("{} ({})", recipe.method.name, recipe.method.paper)];
    lines.extend(recipe.base.iter().map(|base| format!("  base   {}", base.display())));
    for (input, of) in recipe.models.iter().zip(&of_models) {
        lines.push(format!("  model  {}  {}", input.model.display(), text(of)).trim_end().to_string());
    }
    if !of_all.is_empty() {
        lines.push(format!("  {}", text(&of_all)));
    }
    let bytes = merge.parameters() * merge.dtype.bytes();
    let millions = merge.parameters() as f64 / 1e6;
    let (count, dtype) = (merge.tensors().len(), merge.dtype.config_name());
    lines.push(format!("  {count} tensors, {millions:.1} M parameters, written as {dtype}: {}", human(bytes)));
    Ok(lines)
}

/// What a parameter is over all tensors.
fn range(values: &[Value]) -> String {
    let numbers =
        values.iter().filter_map(|value| if let Value::Number(number) = value { Some(*number) } else { None });
    let (low, high) = numbers.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| (low.min(x), high.max(x)));
    match values.iter().all(|value| *value == values[0]) {
        true => values[0].to_string(),
        false if low < high => format!("{low} to {high} by tensor"),
        false => "by tensor".into(),
    }
}
