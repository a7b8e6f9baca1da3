//! Recipes: flat TOML tables whose keys are the flags of `cuvee train`. A recipe is translated into flags,
//! so a new flag needs no word here: its type in `args.rs` says what TOML value fits and whether it is a path.

use std::any::TypeId;
use std::error::Error as _;
use std::ffi::OsString;
use std::path::{Component, Path, PathBuf};

use clap::{Arg, ArgAction, ArgMatches, Command, CommandFactory};
use toml::Value;

use super::adapters::AdapterArg;
use super::args::{Cli, Resume};
use super::is_given;
use super::tasks::{TaskArg, split};
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

/// The flags a recipe stands for, less those that the user gave: theirs win, and a list replaces a list.
pub(super) fn to_flags(path: &Path, given: &ArgMatches) -> Result<Vec<OsString>> {
    let text = std::fs::read_to_string(path).map_err(|e| unreadable(path, &e))?;
    let table: toml::Table = text.parse().map_err(|e: toml::de::Error| Error::file(path, e.to_string().trim_end()))?;
    let cli = Cli::command();
    let command = accept(cli.find_subcommand(TAKEN_BY[0]).expect("it takes recipes").clone());
    let folder = path.parent().unwrap_or(Path::new(""));

    let mut flags = Vec::new();
    let mut seen: Vec<(&Arg, &String)> = Vec::new();
    for (key, value) in &table {
        let arg = find(&command, key).ok_or_else(|| Error::file(path, unknown(&command, key)))?;
        if let Some((_, twin)) = seen.iter().find(|(other, _)| other.get_id() == arg.get_id()) {
            return Err(Error::file(path, format!("{twin:?} and {key:?} are the same option; keep one")));
        }
        seen.push((arg, key));
        if is_given(given, arg.get_id().as_str()) {
            continue;
        }
        for value in elements(arg, value) {
            let flag = to_flag(&command, arg, value, folder);
            flags.push(flag.map_err(|detail| Error::file(path, format!("{key}: {detail}")))?);
        }
    }
    Ok(flags)
}

fn unreadable(path: &Path, error: &std::io::Error) -> Error {
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

fn find<'a>(command: &'a Command, key: &str) -> Option<&'a Arg> {
    let key = key.replace('-', "_");
    command.get_arguments().find(|arg| keys(arg).contains(&key))
}

fn unknown(command: &Command, key: &str) -> String {
    let spelled = key.replace('-', "_");
    let likeness = |name: &str| strsim::jaro_winkler(name, &spelled);
    let nearest = command.get_arguments().flat_map(keys).max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
    match nearest.filter(|name| likeness(name) > 0.8) {
        Some(name) => format!("unknown key {key:?}; did you mean {name:?}?"),
        None => format!("unknown key {key:?}; `cuvee train --help` lists them all, with - for _"),
    }
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
    let holds = |types: &[TypeId]| types.iter().any(|one| arg.get_value_parser().type_id() == *one);
    let (fits, wanted) = if holds(&[TypeId::of::<f64>()]) {
        (value.is_float() || value.is_integer(), "a number")
    } else if holds(&[TypeId::of::<u64>(), TypeId::of::<usize>()]) {
        (value.is_integer(), "a whole number")
    } else if holds(&[TypeId::of::<bool>()]) {
        (value.is_bool(), "true or false")
    } else {
        (value.as_str().is_some_and(|text| !text.is_empty()), "a string")
    };
    if !fits {
        return Err(format!("expected {wanted}, found {} {value}", value.type_str()));
    }

    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let is_path = holds(&[TypeId::of::<PathBuf>(), TypeId::of::<AdapterArg>()])
        || holds(&[TypeId::of::<Resume>()]) && text != "auto";
    let mut flag = OsString::from(format!("--{}=", arg.get_long().expect("a key is the name of a flag")));
    if holds(&[TypeId::of::<TaskArg>()]) {
        let (name, path) = split(&text);
        name.iter().for_each(|name| flag.push(format!("{name}=")));
        flag.push(clean(&folder.join(path)));
    } else if is_path {
        flag.push(clean(&folder.join(text)));
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
fn clean(path: &Path) -> PathBuf {
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
