//! Recipes: flat TOML tables whose keys are the flags of `cuvee train`. A recipe is translated into flags,
//! so a new flag needs no word here: its type in `args.rs` says what TOML value fits and whether it is a path.

use std::any::TypeId;
use std::error::Error as _;
use std::ffi::OsString;
use std::path::{Component, Path, PathBuf};

use clap::{Arg, ArgAction, ArgMatches, Command, CommandFactory};
use toml::{Table, Value};

use super::adapters::AdapterArg;
use super::args::{Cli, Resume};
use super::is_given;
use super::merge::ModelArg;
use super::tasks::{TaskArg, split};
use crate::rewards::{FLUENCY, RewardSpec};
use crate::{Error, Result};

pub(super) const ARG: &str = "recipe";

/// The subcommands that take a recipe; the keys are the flags of the first.
pub(super) const TAKEN_BY: [&str; 3] = ["train", "plan", "compare"];

/// Lets a subcommand take a recipe, which may then supply the flags that were required.
pub(super) fn accept(command: Command) -> Command {
    let recipe = Arg::new(ARG)
        .value_name("RECIPE")
        .value_parser(clap::value_parser!(PathBuf))
        .help("TOML file with any of the options below; see the end of this help")
        .help_heading(None);
    command.mut_args(|arg| switch_both_ways(arg.required(false))).arg(recipe)
}

/// `--recompute` alone switches on; `--recompute=false` switches off what a recipe switched on.
fn switch_both_ways(arg: Arg) -> Arg {
    match arg.get_action() {
        ArgAction::SetTrue => arg
            .action(ArgAction::Set)
            .num_args(0..=1)
            .require_equals(true)
            .default_value("false")
            .default_missing_value("true")
            .value_name("true|false")
            .hide_possible_values(true),
        _ => arg,
    }
}

/// The flags a recipe stands for, less those that the user gave: theirs win, and a list replaces a list. Less those of `without`, too:
/// a recipe of one run says when that one is saved.
pub(super) fn to_flags(path: &Path, given: &ArgMatches, without: &[&str]) -> Result<Vec<OsString>> {
    let text = std::fs::read_to_string(path).map_err(|e| unreadable(path, &e))?;
    let table: Table = text.parse().map_err(|e: toml::de::Error| Error::file(path, e.to_string().trim_end()))?;
    let command = train();
    let folder = path.parent().unwrap_or(Path::new(""));

    let mut flags = Vec::new();
    let mut seen: Vec<(&Arg, &String)> = Vec::new();
    for (key, value) in &table {
        let arg = find(&command, key).ok_or_else(|| Error::file(path, unknown(&command, key, &[])))?;
        if let Some((_, twin)) = seen.iter().find(|(other, _)| other.get_id() == arg.get_id()) {
            return Err(Error::file(path, format!("{twin:?} and {key:?} are the same option; keep one")));
        }
        seen.push((arg, key));
        let id = arg.get_id().as_str();
        if is_given(given, id) || without.contains(&id) {
            continue;
        }
        for value in elements(arg, value) {
            let flag = to_flag(&command, arg, value, folder);
            flags.push(flag.map_err(|detail| Error::file(path, format!("{key}: {detail}")))?);
        }
    }
    Ok(flags)
}

pub(super) fn unreadable(path: &Path, error: &std::io::Error) -> Error {
    match error.kind() {
        std::io::ErrorKind::NotFound => {
            Error::file(path, "no such recipe; give a TOML file, such as recipes/quickstart.toml, or flags alone")
        }
        _ => Error::file(path, error),
    }
}

/// Every name of a flag, as a recipe spells it.
fn keys(arg: &Arg) -> Vec<String> {
    let names = arg.get_long().into_iter().chain(arg.get_all_aliases().unwrap_or_default());
    names.map(|name| name.replace('-', "_")).collect()
}

pub(super) fn find<'a>(command: &'a Command, key: &str) -> Option<&'a Arg> {
    let key = key.replace('-', "_");
    command.get_arguments().find(|arg| keys(arg).contains(&key))
}

/// `others` are keys that are none of the command's flags.
fn unknown(command: &Command, key: &str, others: &[&str]) -> String {
    let all = command.get_arguments().flat_map(keys).chain(others.iter().map(|key| key.to_string()));
    match nearest(key, all) {
        Some(name) => format!("unknown key {key:?}; did you mean {name:?}?"),
        None => format!("unknown key {key:?}; `cuvee {} --help` lists them all, with - for _", command.get_name()),
    }
}

/// The name that was probably meant.
pub(super) fn nearest(name: &str, all: impl IntoIterator<Item = String>) -> Option<String> {
    let spelled = name.replace('-', "_");
    let likeness = |name: &str| strsim::jaro_winkler(name, &spelled);
    let nearest = all.into_iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
    nearest.filter(|name| likeness(name) > 0.8)
}

/// A table's keys by the names of their flags, with paths as seen from here; what starts with `@` names another run and stays.
/// Values are checked for `cuvee train` alone, whose flags can stand alone. `others` are keys that mean something else where
/// the table comes from.
pub(super) fn resolve(command: &Command, table: &Table, folder: &Path, others: &[&str]) -> Result<Table, String> {
    let mut resolved = Table::new();
    for (key, value) in table {
        let arg = find(command, key).ok_or_else(|| unknown(command, key, others))?;
        let from_here = |value: &Value| {
            if command.get_name() == TAKEN_BY[0] {
                to_flag(command, arg, value, folder).map_err(|detail| format!("{key}: {detail}"))?;
            }
            Ok(match value.as_str().and_then(|text| path_in(arg, text)) {
                Some((name, path)) if !path.starts_with('@') => {
                    Value::String(format!("{name}{}", clean(&folder.join(path)).display()))
                }
                _ => value.clone(),
            })
        };
        let each: Vec<Value> = elements(arg, value).iter().map(from_here).collect::<Result<_, String>>()?;
        let value = if value.is_array() { Value::Array(each) } else { each[0].clone() };
        if resolved.insert(name_of(arg), value).is_some() {
            return Err(format!("{:?} is given twice, under two names", name_of(arg)));
        }
    }
    Ok(resolved)
}

/// What was typed, as a recipe would say it.
pub(super) fn typed(command: &Command, given: &ArgMatches) -> Table {
    let mut table = Table::new();
    for arg in command.get_arguments().filter(|arg| arg.get_long().is_some() && is_given(given, arg.get_id().as_str()))
    {
        let value = |text: &std::ffi::OsStr| {
            let text = text.to_string_lossy();
            let holds = |one: TypeId| arg.get_value_parser().type_id() == one;
            if holds(TypeId::of::<bool>()) {
                Value::Boolean(text != "false")
            } else if is_number(arg) {
                number(&text)
            } else {
                text.as_ref().into()
            }
        };
        let each: Vec<Value> = given.get_raw(arg.get_id().as_str()).into_iter().flatten().map(value).collect();
        let value = match (&each[..], arg.get_action()) {
            ([one], action) if !matches!(action, ArgAction::Append) => one.clone(),
            _ => Value::Array(each),
        };
        table.insert(name_of(arg), value);
    }
    table
}

/// The name of a flag, as a recipe spells it.
pub(super) fn name_of(arg: &Arg) -> String {
    arg.get_long().expect("a key is the name of a flag").replace('-', "_")
}

/// A number as TOML has it, or else the text.
pub(super) fn number(text: &str) -> Value {
    match (text.parse::<i64>(), text.parse::<f64>()) {
        (Ok(whole), _) => whole.into(),
        (_, Ok(number)) => number.into(),
        _ => text.into(),
    }
}

/// The flags that a table with the names of flags stands for.
pub(super) fn flags_of(table: &Table) -> Vec<OsString> {
    let flag = |key: &str, value: &Value| {
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        OsString::from(format!("--{}={text}", key.replace('_', "-")))
    };
    let each = |(key, value): (&String, &Value)| match value {
        Value::Array(values) => values.iter().map(|value| flag(key, value)).collect::<Vec<_>>(),
        value => vec![flag(key, value)],
    };
    table.iter().flat_map(each).collect()
}

/// A table with the names of a command's flags, each path in it as `change` makes it.
pub(super) fn with_paths(
    command: &Command,
    table: &Table,
    change: &mut dyn FnMut(&str) -> Result<String>,
) -> Result<Table> {
    let mut changed = Table::new();
    for (key, value) in table {
        let arg = find(command, key);
        let mut one = |value: &Value| match value.as_str().and_then(|text| path_in(arg?, text)) {
            Some((name, path)) => Ok(Value::String(format!("{name}{}", change(path)?))),
            None => Ok(value.clone()),
        };
        let value = match value {
            Value::Array(values) => Value::Array(values.iter().map(one).collect::<Result<_>>()?),
            value => one(value)?,
        };
        changed.insert(key.clone(), value);
    }
    Ok(changed)
}

/// A table of `cuvee train` as TOML, for a file in `folder`: paths start there.
pub(super) fn as_seen_from(folder: &Path, table: &Table) -> String {
    let mut from_there = |path: &str| Ok(relative(Path::new(path), folder).to_string_lossy().into_owned());
    let table = with_paths(&train(), table, &mut from_there).expect("no path fails");
    toml::to_string(&table).expect("values of flags")
}

/// `cuvee train`, whose flags are the keys.
pub(super) fn train() -> Command {
    subcommand(TAKEN_BY[0])
}

pub(super) fn subcommand(name: &str) -> Command {
    accept(Cli::command().find_subcommand(name).expect("it is one").clone())
}

fn holds(arg: &Arg, types: &[TypeId]) -> bool {
    types.iter().any(|one| arg.get_value_parser().type_id() == *one)
}

/// A command of a command.
pub(super) fn subcommand_of(name: &str, of: &str) -> Command {
    let cli = Cli::command();
    let command = cli.find_subcommand(name).and_then(|command| command.find_subcommand(of)).expect("it is one").clone();
    command.mut_args(|arg| arg.required(false))
}

fn is_number(arg: &Arg) -> bool {
    holds(arg, &[TypeId::of::<f64>(), TypeId::of::<u64>(), TypeId::of::<usize>()])
}

/// The path in a value, behind what stands before it.
fn path_in<'t>(arg: &Arg, text: &'t str) -> Option<(&'t str, &'t str)> {
    if holds(arg, &[TypeId::of::<TaskArg>()]) {
        let (_, path) = split(text);
        return Some(text.split_at(text.len() - path.len()));
    }
    if let Some(path) = text.strip_prefix(FLUENCY).filter(|_| holds(arg, &[TypeId::of::<RewardSpec>()])) {
        return Some((FLUENCY, path));
    }
    let paths =
        [TypeId::of::<PathBuf>(), TypeId::of::<AdapterArg>(), TypeId::of::<ModelArg>(), TypeId::of::<RewardSpec>()];
    let whole = holds(arg, &paths) || holds(arg, &[TypeId::of::<Resume>()]) && text != "auto";
    whole.then_some(("", text))
}

/// A flag that may be repeated takes an array, or one value as it is.
fn elements<'v>(arg: &Arg, value: &'v Value) -> &'v [Value] {
    match value {
        Value::Array(elements) if matches!(arg.get_action(), ArgAction::Append) => elements,
        _ => std::slice::from_ref(value),
    }
}

/// `--name=value`, provided that clap takes it. An error says what was expected and found.
fn to_flag(command: &Command, arg: &Arg, value: &Value, folder: &Path) -> Result<OsString, String> {
    let (fits, wanted) = if holds(arg, &[TypeId::of::<f64>()]) {
        (value.is_float() || value.is_integer(), "a number")
    } else if holds(arg, &[TypeId::of::<u64>(), TypeId::of::<usize>()]) {
        (value.is_integer(), "a whole number")
    } else if holds(arg, &[TypeId::of::<bool>()]) {
        (value.is_bool(), "true or false")
    } else {
        (value.as_str().is_some_and(|text| !text.is_empty()), "a string")
    };
    if !fits {
        return Err(format!("expected {wanted}, found {} {value}", value.type_str()));
    }

    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let mut flag = OsString::from(format!("--{}=", arg.get_long().expect("a key is the name of a flag")));
    if let Some((name, path)) = path_in(arg, &text) {
        flag.push(name);
        flag.push(clean(&folder.join(path)));
    } else {
        flag.push(text);
    }
    match command.clone().try_get_matches_from([OsString::new(), flag.clone()]) {
        Ok(_) => Ok(flag),
        Err(error) => Err(format!("{}, found {value}", expectation(arg, &error))),
    }
}

fn expectation(arg: &Arg, error: &clap::Error) -> String {
    let choices: Vec<String> = arg.get_possible_values().iter().map(|choice| choice.get_name().to_owned()).collect();
    match error.source() {
        Some(reason) => reason.to_string(),
        None => format!("expected one of {}", choices.join(", ")),
    }
}

/// Resolves `.` and `..` by name alone, so that paths are shown as a person would write them.
pub(super) fn clean(path: &Path) -> PathBuf {
    let mut cleaned = PathBuf::new();
    for part in path.components() {
        match (part, cleaned.components().next_back()) {
            (Component::CurDir, _) | (Component::ParentDir, Some(Component::RootDir)) => {}
            (Component::ParentDir, Some(Component::Normal(_))) => drop(cleaned.pop()),
            _ => cleaned.push(part),
        }
    }
    if cleaned.as_os_str().is_empty() { PathBuf::from(".") } else { cleaned }
}

/// `path` as seen from `folder`: `clean(folder.join(relative(path, folder)))` is `path` again. Where either is
/// absolute the result is, as a relative path would then depend on the folder it was typed in.
pub(super) fn relative(path: &Path, folder: &Path) -> PathBuf {
    // Fails only without a current folder, and then a relative path means nothing better.
    let absolute = |path: &Path| clean(&std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf()));
    let (target, start) = (absolute(path), absolute(folder));
    if path.is_absolute() || folder.is_absolute() {
        return target;
    }
    let shared = target.components().zip(start.components()).take_while(|(a, b)| a == b).count();
    let up = start.components().skip(shared).map(|_| Component::ParentDir);
    clean(&up.chain(target.components().skip(shared)).collect::<PathBuf>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_cleaned_by_name() {
        let cases = [
            ("recipes/../assets/m", "assets/m"),
            ("./a/./b", "a/b"),
            ("../../a/../b", "../../b"),
            ("/../a/..", "/"),
            ("a/..", "."),
            ("", "."),
        ];
        for (path, cleaned) in cases {
            assert_eq!(clean(Path::new(path)), Path::new(cleaned), "{path}");
        }
    }

    #[test]
    fn relative_undoes_join() {
        for (path, folder, expected) in [
            ("assets/m", "runs/a", "../../assets/m"),
            ("runs/a", "runs/a", "."),
            ("runs/a/checkpoint-5", "runs/a", "checkpoint-5"),
            ("../m", "runs", "../../m"),
            ("/abs/m", "runs", "/abs/m"),
        ] {
            let (path, folder) = (Path::new(path), Path::new(folder));
            assert_eq!(relative(path, folder), Path::new(expected));
            assert_eq!(clean(&folder.join(expected)), path);
        }
    }
}
