//! Flags about tasks that models are examined with.

use std::path::{Path, PathBuf};

use clap::Args;
use serde::{Serialize, Serializer};

use super::args::{count, seed};
use crate::error::{Error, Result};
use crate::tasks::{Overrides, Task};

/// What models are asked.
#[derive(Debug, Clone, PartialEq, Args)]
#[command(next_help_heading = "Tasks")]
pub struct TaskArgs {
    /// A task for the models, named after its file or as given; repeat the flag for several
    #[arg(long, value_name = "[NAME=]FILE", value_parser = task)]
    pub task: Vec<TaskArg>,
    /// The model that others are compared with; one of --model, or one more [default: the first]
    #[arg(long, value_name = "DIR")]
    pub baseline: Option<PathBuf>,
    /// Reward model that judges the completions of tasks of the kind reward
    #[arg(long, value_name = "DIR")]
    pub reward_model: Option<PathBuf>,
    /// Model that says how likely those completions are
    #[arg(long, value_name = "DIR")]
    pub base_model: Option<PathBuf>,
    /// Completions of each prompt of a reward task [default: the task's, else 4]
    #[arg(long, value_name = "N", value_parser = count)]
    pub samples: Option<usize>,
    /// Length limit of what is written, in tokens [default: the task's, else 48 for reward, 256 for exact_match]
    #[arg(long, value_name = "N", value_parser = count)]
    pub max_new_tokens: Option<usize>,
    /// Seed of the completions of reward tasks [default: 42]
    #[arg(long, value_name = "N", value_parser = seed)]
    pub seed: Option<u64>,
    /// Write what was scored, chosen and written: one JSON object an item
    #[arg(long, value_name = "FILE.jsonl")]
    pub log_samples: Option<PathBuf>,
    /// Draw the models: the first task of rewards or preferences against the first of the other kinds
    #[arg(long, value_name = "FILE.svg")]
    pub plot: Option<PathBuf>,
}

/// A task's file, and what it is called.
#[derive(Debug, Clone, PartialEq)]
pub struct TaskArg {
    pub name: String,
    pub path: PathBuf,
}

impl Serialize for TaskArg {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{}={}", self.name, self.path.display()))
    }
}

/// The name before the file: a path may hold `=`, a name no `/`.
pub(super) fn split(text: &str) -> (Option<&str>, &str) {
    match text.split_once('=') {
        Some((name, path)) if !name.contains('/') => (Some(name), path),
        _ => (None, text),
    }
}

/// `NAME=FILE`, or `FILE`, which is called after its stem: `data/cloze.jsonl.gz` is `cloze`.
pub(super) fn task(text: &str) -> Result<TaskArg, String> {
    let (name, path) = split(text);
    let path = Path::new(path);
    let file = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let bare = file.strip_suffix(".gz").unwrap_or(&file);
    let name = name.unwrap_or_else(|| bare.rsplit_once('.').map_or(bare, |(stem, _)| stem));
    if name.is_empty() || file.is_empty() {
        return Err("expected FILE or NAME=FILE, such as cloze=heldout.jsonl".into());
    }
    Ok(TaskArg { name: name.to_string(), path: path.to_path_buf() })
}

/// Files by name, no two of one name.
fn check(flag: &str, args: &[TaskArg]) -> Result<()> {
    let twin = |(i, arg): &(usize, &TaskArg)| args[..*i].iter().any(|other| other.name == arg.name);
    if let Some((_, TaskArg { name, path })) = args.iter().enumerate().find(twin) {
        let detail = format!("two are named {name}; name one of them, as in other={}", path.display());
        return Err(Error::option(flag, detail));
    }
    Ok(())
}

/// What `--eval-task` names.
pub(super) fn named(args: &[TaskArg]) -> Result<Vec<(String, PathBuf)>> {
    check("--eval-task", args)?;
    Ok(args.iter().map(|TaskArg { name, path }| (name.clone(), path.clone())).collect())
}

impl TaskArgs {
    /// Reads the tasks, and refuses flags that say nothing to any of them.
    pub(super) fn open(&self) -> Result<Vec<Task>> {
        let (max_new_tokens, samples) = (self.max_new_tokens, self.samples);
        let overrides = Overrides { max_new_tokens, samples, seed: self.seed.unwrap_or(SEED) };
        check("--task", &self.task)?;
        let tasks = self.task.iter().map(|TaskArg { name, path }| Task::open(name, path, &overrides));
        let tasks: Vec<Task> = tasks.collect::<Result<_>>()?;
        let first = |kinds: &[&str]| tasks.iter().find(|task| kinds.contains(&task.kind()));
        if let (Some(task), None) = (first(&["reward"]), &self.reward_model) {
            let detail = format!("missing; it judges what is written in the task {}", task.name);
            return Err(Error::option("--reward-model", detail));
        }
        if self.plot.is_some() && axes(&tasks).is_none() {
            let detail = "wants two tasks: one of the kind reward or preference, and one of another";
            return Err(Error::option("--plot", detail));
        }
        let idle = [
            ("--reward-model", self.reward_model.is_some(), &["reward"][..]),
            ("--samples", self.samples.is_some(), &["reward"]),
            ("--seed", self.seed.is_some(), &["reward"]),
            ("--max-new-tokens", self.max_new_tokens.is_some(), &["reward", "exact_match"]),
        ];
        let Some((flag, _, kinds)) = idle.into_iter().find(|(_, given, kinds)| *given && first(kinds).is_none()) else {
            return Ok(tasks);
        };
        let found: Vec<String> = tasks.iter().map(|task| format!("{} ({})", task.name, task.kind())).collect();
        let (kinds, found) = (kinds.join(" or "), found.join(", "));
        Err(Error::option(flag, format!("does nothing without a task of the kind {kinds}; given are {found}")))
    }
}

const SEED: u64 = 42;

/// What a figure shows: the first task of rewards or preferences over the first of the other kinds.
pub(super) fn axes(tasks: &[Task]) -> Option<(usize, usize)> {
    let preferred = |task: &Task| ["reward", "preference"].contains(&task.kind());
    Some((tasks.iter().position(|task| !preferred(task))?, tasks.iter().position(preferred)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_is_called_after_its_file_or_as_given() {
        let read = |text: &str| task(text).map(|TaskArg { name, path }| (name, path));
        for (text, name, path) in [
            ("a/cloze-heldout.jsonl.gz", "cloze-heldout", "a/cloze-heldout.jsonl.gz"),
            ("x.jsonl", "x", "x.jsonl"),
            ("base=a/x.jsonl", "base", "a/x.jsonl"),
            ("a/b=c.toml", "b=c", "a/b=c.toml"),
            ("n=a=b.jsonl", "n", "a=b.jsonl"),
        ] {
            assert_eq!(read(text), Ok((name.into(), path.into())), "{text}");
        }
        for text in ["", "=x.jsonl", "x=", ".jsonl", "x=/"] {
            assert!(read(text).is_err_and(|e| e.contains("NAME=FILE")), "{text}");
        }
    }
}
