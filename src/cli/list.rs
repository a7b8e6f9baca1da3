//! `cuvee list`

use terminal_size::{Width, terminal_size};

use super::args::{ListArgs, Registry};
use crate::error::Result;
use crate::params::ParamSpec;
use crate::{merge, model, objectives, optim, rewards};

pub fn run(args: &ListArgs) -> Result<()> {
    let rows: Vec<(String, String)> = match args.what {
        Registry::Objectives => objectives::all().iter().map(objective).collect(),
        Registry::Modifiers => objectives::modifiers().iter().map(modifier).collect(),
        Registry::Optimizers => optim::all().iter().map(optimizer).collect(),
        Registry::Merges => merge::all().iter().map(|entry| merge(entry)).collect(),
        Registry::Rewards => rewards::all().iter().map(|entry| reward(entry)).collect(),
        Registry::Architectures => {
            model::arch::all().iter().map(|a| (a.model_type.to_string(), a.summary.to_string())).collect()
        }
    };
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    // Whoever filters lines wants an entry in one.
    let room = terminal_size().map_or(usize::MAX, |(Width(columns), _)| usize::from(columns));
    let line = |(name, text): &(String, String)| hanging(&format!("{name:<width$}  {text}"), width + 2, room) + "\n";
    super::print(&rows.iter().map(line).collect::<String>())
}

/// Breaks each line of `text` between words where it is longer than `room`, all but the first so far from the edge.
fn hanging(text: &str, indent: usize, room: usize) -> String {
    let mut out = String::new();
    for line in text.lines() {
        let (mut column, mut first) = (0, true);
        out += if out.is_empty() { "" } else { "\n" };
        for word in line.split_inclusive(' ') {
            let len = word.trim_end().chars().count();
            if !first && column + len > room && column > indent {
                out.truncate(out.trim_end().len());
                out += "\n";
                out += &" ".repeat(indent);
                column = indent;
            }
            out += word;
            column += word.chars().count();
            first = false;
        }
    }
    out
}

/// What an entry takes, what it may do without in brackets.
fn flags(params: &[ParamSpec]) -> String {
    let flag = |p: &ParamSpec| match p.only_with {
        _ if p.required() => p.flag(),
        Some((_, value)) => format!("[{} with {value}]", p.flag()),
        None => format!("[{}]", p.flag()),
    };
    params.iter().map(flag).collect::<Vec<_>>().join(" ")
}

fn optimizer(entry: &optim::Entry) -> (String, String) {
    (entry.name.to_string(), format!("{} ({}) {}", entry.summary, entry.paper, flags(entry.params)))
}

fn objective(entry: &objectives::Entry) -> (String, String) {
    let also = match entry.aliases {
        [] => String::new(),
        names => format!("; also {}", names.join(", ")),
    };
    (
        entry.name.to_string(),
        format!("{} ({}{also}) {}", entry.summary, entry.paper, flags(entry.params)).trim_end().into(),
    )
}

fn merge(entry: &merge::Entry) -> (String, String) {
    let flag = |spec: &merge::ParamSpec| match spec.default() {
        None => merge::flag(spec.name),
        Some(default) => format!("[{} {default}]", merge::flag(spec.name)),
    };
    let base = if entry.base == merge::Base::Required { "--base-model " } else { "" };
    let flags: Vec<String> = entry.params.iter().map(flag).collect();
    (entry.name.to_string(), format!("{} ({}) {base}{}", entry.summary, entry.paper, flags.join(" ")))
}

fn reward(entry: &rewards::Entry) -> (String, String) {
    let keys: Vec<String> = entry.keys.iter().map(|(key, meaning)| format!("    {key}: {meaning}")).collect();
    (entry.name.to_string(), format!("{}\n{}", entry.summary, keys.join("\n")))
}

fn modifier(modifier: &objectives::Modifier) -> (String, String) {
    let text = format!("{} ({}) {}: {}", modifier.summary, modifier.paper, modifier.param.flag(), modifier.fits);
    (modifier.name.to_string(), text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_hang_below_their_entry() {
        let text = "dpo  one two three four";
        assert_eq!(hanging(text, 5, usize::MAX), text);
        assert_eq!(hanging(text, 5, 13), "dpo  one two\n     three\n     four");
        assert_eq!(hanging("a  b\n    key: x y", 3, 10), "a  b\n    key: x\n   y");
        assert_eq!(
            hanging("word  unbreakable", 6, 4),
            "word  unbreakable",
            "what is too long for any line stays whole"
        );
    }
}
