//! Flags of a registry's parameters: an entry's file is all that knows them.

use std::collections::BTreeMap;

use clap::builder::PossibleValuesParser;
use clap::{Arg, ArgAction, ArgMatches};

use super::args::number;
use crate::params::{Domain, Params, Shared};

type All = BTreeMap<&'static str, Shared>;

/// One flag for each parameter. `entries` are the names of the registry; `else_for` says whose a parameter is that none of
/// them owns.
pub fn args(all: All, entries: &[&str], else_for: &str) -> Vec<Arg> {
    all.into_iter().map(|(name, shared)| arg(name, help(&shared, entries, else_for), shared)).collect()
}

fn arg(name: &'static str, help: String, shared: Shared) -> Arg {
    let arg = Arg::new(name).long(name.replace('_', "-")).help(help);
    let specs = shared.specs;
    match specs[0].domain {
        Domain::Number { .. } | Domain::Count { .. } => {
            let unit = if let Domain::Count { .. } = specs[0].domain { "N" } else { "F" };
            arg.value_name(unit).value_parser(move |text: &str| {
                let fits = |x: f64| specs.iter().any(|spec| spec.accepts(&x.into()));
                number(text, &format!("with {}", specs[0].domain_text()), fits)
            })
        }
        Domain::Choice { values, .. } => arg.value_name("NAME").value_parser(PossibleValuesParser::new(values)),
        Domain::Switch => arg.action(ArgAction::SetTrue).value_parser(clap::value_parser!(bool)),
    }
}

/// Meaning, who takes it, what happens without it.
fn help(shared: &Shared, entries: &[&str], else_for: &str) -> String {
    let spec = shared.specs[0];
    let mut help = spec.help.to_string();
    help[..1].make_ascii_uppercase();
    let others: Vec<&str> = entries.iter().copied().filter(|name| !shared.owners.contains(name)).collect();
    if shared.owners.is_empty() {
        help += &format!(" ({else_for})");
    } else if others.is_empty() {
        // Everyone's: nothing to tell.
    } else if others.len() < shared.owners.len() {
        help += &format!(" (all but {})", others.join(", "));
    } else {
        help += &format!(" ({})", shared.owners.join(", "));
    }
    if let Some((other, value)) = spec.only_with {
        help += &format!("; with --{} {value}", other.replace('_', "-"));
    }
    if let Domain::Switch = spec.domain {
        return help;
    }
    let defaults: Vec<_> = shared.specs.iter().filter_map(|spec| spec.default()).collect();
    if let Some(default) = defaults.first() {
        let owners = shared.owners.iter().zip(&shared.specs);
        let requiring: Vec<&str> = owners.clone().filter(|of| of.1.required()).map(|of| *of.0).collect();
        let differing = owners.filter_map(|(owner, spec)| Some((owner, spec.default()?)));
        let differing = differing.filter(|(_, other)| other != default);
        let differing: String = differing.map(|(owner, other)| format!("; of {owner} {other}")).collect();
        help += &match requiring[..] {
            [] => format!(" [default: {default}{differing}]"),
            _ => format!(" [default: {default}{differing}; required by {}]", requiring.join(", ")),
        };
    }
    help
}

/// What the user gave.
pub fn given(matches: &ArgMatches, all: &All) -> Params {
    let mut params = Params::default();
    for (&name, shared) in all {
        match shared.specs[0].domain {
            Domain::Number { .. } | Domain::Count { .. } => {
                matches.get_one::<f64>(name).into_iter().for_each(|number| params.set(name, *number));
            }
            Domain::Choice { .. } => {
                matches.get_one::<String>(name).into_iter().for_each(|choice| params.set(name, choice.as_str()));
            }
            Domain::Switch if matches.get_flag(name) => params.set(name, true),
            Domain::Switch => {}
        }
    }
    params
}
