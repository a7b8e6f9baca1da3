//! The command line. `args.rs` declares every flag, `recipe.rs` reads the same names from a file;
//! `parse` joins them (defaults < recipe < flags) and checks what one flag alone cannot know.

pub mod args;
mod recipe;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::parser::ValueSource;
use clap::{ArgMatches, CommandFactory, FromArgMatches};

use crate::Error;
pub use args::{Cli, Command};

/// Why `parse` gave no command: clap has something to print (help and version included), or our own
/// checks failed.
#[derive(Debug)]
pub enum Failure {
    Clap(clap::Error),
    Error(Error),
}

impl Failure {
    /// Prints to the stream it belongs on and returns the exit code: 0 for help and version, 2 for a
    /// command line or recipe that cannot be run.
    pub fn report(&self) -> ExitCode {
        match self {
            // A closed pipe (`cuvee --help | head -1`) is no failure of ours.
            Self::Clap(error) => drop(error.print()),
            Self::Error(error) => eprintln!("error: {error}"),
        }
        match self {
            Self::Clap(error) if !error.use_stderr() => ExitCode::SUCCESS,
            _ => ExitCode::from(2),
        }
    }
}

impl From<clap::Error> for Failure {
    fn from(error: clap::Error) -> Self {
        Self::Clap(error)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

/// Parses a command line (program name first) and the recipe it may name.
pub fn parse(argv: impl IntoIterator<Item = OsString>) -> Result<Cli, Failure> {
    let mut argv = dashes_for_underscores(argv);
    let command = recipe::TAKEN_BY.iter().fold(Cli::command(), |c, name| c.mut_subcommand(name, recipe::accept));
    let mut matches = command.clone().try_get_matches_from(&argv)?;

    if let Some((_, flags)) = matches.subcommand()
        && let Ok(Some(path)) = flags.try_get_one::<PathBuf>(recipe::ARG)
    {
        // A recipe is its own flags, put behind `cuvee train`.
        argv.splice(2..2, recipe::to_flags(path, flags)?);
        matches = command.try_get_matches_from(&argv)?;
    }

    let (name, flags) = matches.subcommand().expect("clap requires a subcommand");
    if recipe::TAKEN_BY.contains(&name) {
        require(name, flags)?;
    }
    let cli = Cli::from_arg_matches(&matches)?;
    match &cli.command {
        Command::Train(args) => args.run.check(flags)?,
        Command::Plan(args) => args.run.check(flags)?,
        Command::Logps(args) => args.limits.check(flags)?,
        Command::Eval(args) => args.limits.check(flags)?,
        Command::Generate(args) => args.check()?,
        Command::List(_) => {}
    }
    Ok(cli)
}

/// `--max_steps=a_b` means `--max-steps=a_b`: TRL spells flags so. Values and what follows a bare `--` stay.
fn dashes_for_underscores(argv: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut only_values = false;
    let normalise = |token: OsString| {
        only_values |= token == "--";
        match token.to_str().filter(|text| !only_values && text.starts_with("--")) {
            Some(text) => {
                let (name, value) = text.split_at(text.find('=').unwrap_or(text.len()));
                OsString::from(name.replace('_', "-") + value)
            }
            None => token,
        }
    };
    argv.into_iter().map(normalise).collect()
}

/// A recipe may supply what a subcommand requires, so clap cannot tell what is missing; this does.
fn require(subcommand: &str, given: &ArgMatches) -> Result<(), Error> {
    let declared = Cli::command();
    let args = declared.find_subcommand(subcommand).expect("a subcommand that clap matched").get_arguments();
    let missing: Vec<&str> = args
        .filter(|arg| arg.is_required_set() && !is_given(given, arg.get_id().as_str()))
        .filter_map(|arg| arg.get_long())
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let flags = missing.iter().map(|name| format!("--{name}")).collect::<Vec<_>>().join(", ");
    let keys = missing.iter().map(|name| format!("{} = ...", name.replace('-', "_"))).collect::<Vec<_>>().join(", ");
    let detail = format!("missing; add it to the command line, or write {keys} in a recipe: cuvee {subcommand} RECIPE");
    Err(Error::option(flags, detail))
}

/// Did the user (or the recipe) give this option, or is it at its default?
fn is_given(flags: &ArgMatches, id: &str) -> bool {
    flags.value_source(id) == Some(ValueSource::CommandLine)
}

/// An option that would do nothing without another one is an error, not a surprise an hour later.
fn needs(flags: &ArgMatches, option: &str, companion: &str, why: &str) -> Result<(), Error> {
    if !is_given(flags, option) || is_given(flags, companion) {
        return Ok(());
    }
    let flag = |id: &str| format!("--{}", id.replace('_', "-"));
    Err(Error::option(flag(option), format!("does nothing without {}; {why}", flag(companion))))
}
