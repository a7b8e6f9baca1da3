//! The command line. `args.rs` declares every flag, `recipe.rs` reads the same names from a file;
//! `parse` joins them (defaults < recipe < flags) and checks what one flag alone cannot know.

mod adapters;
mod alarm;
pub mod args;
mod cache;
mod compare;
mod device;
mod doctor;
mod elsewhere;
mod eval;
mod flags;
mod generate;
mod lab;
mod lineage;
mod list;
mod logps;
mod merge;
mod plan;
mod preview;
mod recipe;
mod references;
mod rollouts;
mod run;
mod score;
mod serve;
mod soup;
mod tasks;
mod train;
mod written;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::parser::ValueSource;
use clap::{ArgMatches, CommandFactory, FromArgMatches};

use crate::Error;
use crate::progress::say;
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
            Self::Error(error) => say(format_args!("error: {error}")),
        }
        match self {
            Self::Clap(error) if !error.use_stderr() => ExitCode::SUCCESS,
            _ => ExitCode::from(2),
        }
    }
}

impl Failure {
    /// What failed, on one line and without its head, for a message that says where.
    fn into_text(self) -> String {
        let text = match self {
            Self::Error(error) => return error.to_string(),
            Self::Clap(error) => error.to_string(),
        };
        let lines = text.strip_prefix("error: ").unwrap_or(&text).lines().map(str::trim);
        let lines: Vec<&str> = lines.filter(|line| !line.is_empty() && !line.starts_with("For more")).collect();
        lines.join("; ")
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

/// Runs a command. Exit codes: 0 done, 1 failed, 130 interrupted by the user.
pub fn execute(cli: Cli) -> ExitCode {
    let result = match cli.command {
        Command::Train(args) => train::run(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Compare(args) => compare::run(&args),
        Command::Run(args) => run::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Logps(args) => logps::run(&args),
        Command::Score(args) => score::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Serve(args) => serve::run(&args),
        Command::Preview(args) => preview::run(&args),
        Command::List(args) => list::run(&args),
        Command::Cache(args) => cache::run(&args),
        Command::Merge(args) => merge::run(&args),
        Command::Soup(args) => soup::run(&args),
        Command::Lineage(args) => lineage::run(&args),
        Command::Lab(args) => lab::run(&args),
        Command::Watch(args) => lab::watch(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(format_args!("error: {error}"));
            ExitCode::from(if matches!(error, Error::Interrupted { .. }) { 130 } else { 1 })
        }
    }
}

/// Writes a result to stdout. A reader that closed the pipe has what it wanted.
fn print(text: &str) -> Result<(), Error> {
    use std::io::Write;
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(Error::file("stdout", e)),
        _ => Ok(()),
    }
}

fn packing(batching: &args::BatchingArgs) -> crate::data::Packing {
    let sharing = if batching.no_prefix_sharing { crate::data::Sharing::Off } else { crate::data::Sharing::On };
    let budget = batching.micro_batch_tokens.unwrap_or(crate::train::MICRO_BATCH_TOKENS);
    crate::data::Packing { sharing, ..crate::data::Packing::new(budget) }
}

fn encode(max_length: Option<usize>, on_overflow: args::OnOverflow) -> crate::data::EncodeOptions {
    crate::data::EncodeOptions { max_length, on_overflow: on_overflow.into(), ..Default::default() }
}

/// Parses a command line (program name first) and the recipe it may name.
pub fn parse(argv: impl IntoIterator<Item = OsString>) -> Result<Cli, Failure> {
    let mut argv = dashes_for_underscores(argv);
    let command = footers_flow(Cli::command());
    let command = recipe::TAKEN_BY.iter().fold(command, |c, name| c.mut_subcommand(name, recipe::accept));
    // Only of the flags of training is there a table.
    let trains = argv.get(1).and_then(|name| name.to_str()).is_some_and(|name| recipe::TAKEN_BY.contains(&name));
    let told = |error: clap::Error| match elsewhere::answer(&error) {
        Some(answer) if trains => Failure::Error(answer),
        _ => Failure::Clap(error),
    };
    let mut matches = command.clone().try_get_matches_from(&argv).map_err(told)?;

    if let Some((name, flags)) = matches.subcommand()
        && recipe::TAKEN_BY.contains(&name)
        && let Ok(Some(path)) = flags.try_get_one::<PathBuf>(recipe::ARG)
    {
        if name == "compare"
            && let Some(compare) = compare::Compare::read(path, flags)?
        {
            return Ok(Cli { command: Command::Compare(compare) });
        }
        // A recipe is its own flags, put behind `cuvee train`.
        let without = if name == "compare" { &args::OF_ONE_RUN[..] } else { &[] };
        argv.splice(2..2, recipe::to_flags(path, flags, without)?);
        matches = command.try_get_matches_from(&argv)?;
    }

    let (name, flags) = matches.subcommand().expect("clap requires a subcommand");
    if recipe::TAKEN_BY.contains(&name) {
        require(name, flags)?;
    }
    let mut cli = Cli::from_arg_matches(&matches)?;
    if let Command::Train(args) = &mut cli.command {
        // The recipe that the run leaves behind says what it was.
        args.run.optim.learning_rate = Some(args.run.learning_rate());
    }
    match &cli.command {
        Command::Train(args) => args.run.check(flags)?,
        Command::Plan(args) => args.run.check(flags)?,
        Command::Compare(args) => args.check(flags)?,
        Command::Logps(args) => args.limits.check(flags).and(args.engine.check())?,
        Command::Score(args) => args.limits.check(flags).and(args.engine.check())?,
        Command::Eval(args) => args.check(flags)?,
        Command::Generate(args) => args.check()?,
        Command::Serve(args) => args.check().and(args.engine.check())?,
        Command::Preview(args) => args.limits.check(flags)?,
        Command::Merge(args) => args.check(flags)?,
        Command::Soup(args) => args.check(flags)?,
        Command::Run(_)
        | Command::Doctor(_)
        | Command::List(_)
        | Command::Cache(_)
        | Command::Lineage(_)
        | Command::Lab(_)
        | Command::Watch(_) => {}
    }
    Ok(cli)
}

/// Lets clap alone break the lines of what stands below the options, of every subcommand.
fn footers_flow(command: clap::Command) -> clap::Command {
    let footer = command.get_after_help().map(|text| paragraphs(&text.to_string()));
    let command = footer.into_iter().fold(command, |command, footer| command.after_help(footer));
    let names: Vec<String> = command.get_subcommands().map(|sub| sub.get_name().to_string()).collect();
    names.into_iter().fold(command, |command, name| command.mut_subcommand(name, footers_flow))
}

/// Joins the lines of paragraphs, which is what stands at the margin; examples and lists are indented.
fn paragraphs(text: &str) -> String {
    let mut out = String::new();
    let mut before = "";
    for line in text.lines() {
        let of_text = |line: &str| line.starts_with(|c: char| !c.is_whitespace());
        let goes_on = of_text(before) && of_text(line) && !before.ends_with(':');
        out += if goes_on { " " } else { "\n" };
        out += line;
        before = line;
    }
    out.trim_start_matches('\n').to_string()
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
    let detail = format!("missing; give it as a flag, or as {keys} in a recipe: cuvee {subcommand} RECIPE");
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::args::*;
    use super::*;
    use crate::{objectives, optim};

    fn run(line: &[&str]) -> Result<Cli, Failure> {
        parse(["cuvee"].iter().chain(line).map(OsString::from))
    }

    fn train(line: &[&str]) -> TrainArgs {
        match run(&[&["train"], line].concat()).unwrap_or_else(|e| panic!("{e:?}")).command {
            Command::Train(args) => args,
            other => panic!("{other:?}"),
        }
    }

    /// What the user reads when it fails.
    fn failure(line: &[&str]) -> String {
        match run(line).expect_err("this must not parse") {
            Failure::Clap(error) => error.to_string(),
            Failure::Error(error) => error.to_string(),
        }
    }

    fn beta(args: &TrainArgs) -> Option<f64> {
        args.run.loss.params.number("beta")
    }

    const REQUIRED: [&str; 8] =
        ["--objective", "sigmoid", "--model", "m", "--dataset", "d.jsonl", "--output-dir", "runs/out"];

    fn with(line: &[&str]) -> Vec<&'static str> {
        REQUIRED.into_iter().chain(line.iter().map(|text| &*text.to_string().leak())).collect()
    }

    /// A folder with a complete recipe that `text` adds to; returned with the recipe's path.
    fn recipe(text: &str) -> (tempfile::TempDir, String) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.toml");
        let required = "objective = 'sigmoid'\nmodel = 'm'\ndataset = '../d.jsonl'\noutput_dir = './runs/a/../b'\neval_dataset = 'e'\n";
        std::fs::write(&path, format!("{required}{text}")).unwrap();
        let path = path.to_str().unwrap().to_owned();
        (folder, path)
    }

    #[test]
    fn defaults_are_those_of_the_help() {
        let args = train(&REQUIRED);
        let RunArgs { loss, optim, schedule, data, save, sampling, .. } = &args.run;
        assert_eq!((&loss.objective[..], loss.params.names().count()), (&["sigmoid".to_string()][..], 0));
        assert!(loss.objective_weights.is_empty());
        assert_eq!((optim.choice.optimizer.as_str(), optim.learning_rate), ("adamw", Some(1e-6)));
        assert_eq!((optim.adam_beta1, optim.adam_beta2, optim.adam_epsilon), (0.9, 0.999, 1e-8));
        assert_eq!((optim.max_grad_norm, optim.weight_decay, optim.warmup_ratio), (1.0, 0.0, 0.0));
        assert_eq!(optim.lr_scheduler_type, LrSchedulerType::Linear);
        assert_eq!((schedule.num_train_epochs, schedule.max_steps, schedule.seed), (1.0, None, 42));
        assert_eq!((data.per_device_train_batch_size, data.gradient_accumulation_steps), (8, 1));
        assert_eq!((data.max_length, data.on_overflow, data.no_shuffle), (1024, OnOverflow::Drop, false));
        assert_eq!(
            *save,
            SaveArgs {
                eval_steps: None,
                eval_anchor: None,
                kl_samples: 0,
                eval_task: vec![],
                stop_when: vec![],
                save_steps: None,
                save_total_limit: None
            }
        );
        assert_eq!(*sampling, SamplingArgs { samples: 0, max_new_tokens: None, temperature: 0.8, top_p: 0.95 });
        assert_eq!((args.run.init, args.run.dtype, args.run.recompute), (Init::Checkpoint, Dtype::F32, false));
        assert_eq!(
            args.run.engine,
            EngineArgs { threads: None, device: Device::Auto, no_amx: false, batch_invariant: false }
        );
        assert!(args.run.refs.ref_model.is_empty());
    }

    #[test]
    fn footers_are_paragraphs() {
        assert_eq!(paragraphs("a b\nc\n\nList:\n  x\n  y\nd\ne"), "a b c\n\nList:\n  x\n  y\nd e");
        let command = footers_flow(Cli::command());
        let footer = command.find_subcommand("merge").unwrap().get_after_help().unwrap().to_string();
        assert!(footer.contains("tensor by tensor, merged in f32 and rounded once;"), "{footer}");
    }

    #[test]
    fn aliases_and_underscores_mean_the_same() {
        let plain = train(&with(&["--max-steps", "3", "--batch-size", "2", "--recompute"]));
        let trl = [
            "--loss_type=sigmoid",
            "--model_name_or_path=m",
            "--dataset",
            "d.jsonl",
            "--output_dir",
            "runs/out",
            "--max_steps=3",
            "--per_device_train_batch_size",
            "2",
            "--gradient_checkpointing",
        ];
        assert_eq!(train(&trl), plain);
        assert_eq!(train(&with(&["--eval_dataset=a_b/c"])).run.eval_dataset.unwrap(), Path::new("a_b/c"));

        let Command::Generate(args) = run(&["generate", "--model", "m", "--prompt=--a_b"]).unwrap().command else {
            panic!()
        };
        assert_eq!(args.prompt.as_deref(), Some("--a_b"));
        let after = dashes_for_underscores(["--a_b", "c_d", "--", "--e_f"].map(OsString::from));
        assert_eq!(after, ["--a-b", "c_d", "--", "--e_f"]);
    }

    #[test]
    fn flags_override_the_recipe() {
        let (_folder, path) = recipe("beta = 0.1\nref_model = ['r1', 'r2']\nrecompute = true\nsamples = 3\n");
        let args = train(&[&path]);
        assert_eq!((beta(&args), args.run.recompute, args.run.refs.ref_model.len()), (Some(0.1), true, 2));

        let line = [&path, "--beta", "0.3", "--ref-model", "other", "--recompute=false", "--dataset", "mine.jsonl"];
        let args = train(&line);
        assert_eq!((beta(&args), args.run.recompute), (Some(0.3), false));
        assert_eq!(args.run.refs.ref_model, [Path::new("other")]);
        assert_eq!(args.dataset, Path::new("mine.jsonl"));
        assert_eq!(beta(&train(&["--beta=0.3", &path, "--no-shuffle"])), Some(0.3));

        // A value that the user replaced need not be right.
        let (_folder, path) = recipe("beta = 'high'\n");
        assert_eq!(beta(&train(&[&path, "--beta", "2"])), Some(2.0));
    }

    #[test]
    fn recipe_keys_may_be_aliases_with_dashes() {
        let (_folder, path) = recipe("batch-size = 4\ngradient_checkpointing = true\nno_shuffle = false\n");
        let args = train(&[&path]);
        assert_eq!(args.run.data.per_device_train_batch_size, 4);
        assert!(args.run.recompute && !args.run.data.no_shuffle);

        let (_folder, path) = recipe("loss_type = 'ipo'\n");
        let message = failure(&["train", &path]);
        assert!(message.contains("the same option"), "{message}");
    }

    #[test]
    fn recipe_paths_start_at_the_recipe() {
        let (folder, path) = recipe("ref_model = '/abs/r'\nresume_from_checkpoint = 'c'\nthreads = 1\n");
        let root = folder.path();
        let args = train(&[&path]);
        assert_eq!(args.run.model, root.join("m"));
        assert_eq!(args.dataset, root.parent().unwrap().join("d.jsonl"));
        assert_eq!(args.output_dir, root.join("runs/b"));
        assert_eq!(args.run.refs.ref_model, [Path::new("/abs/r")]);
        assert_eq!(args.run.schedule.resume_from_checkpoint, Some(Resume::Dir(root.join("c"))));
        let (_folder, path) = recipe("resume_from_checkpoint = 'auto'\n");
        assert_eq!(train(&[&path]).run.schedule.resume_from_checkpoint, Some(Resume::Auto));
    }

    #[test]
    fn recipe_mistakes_name_the_file_and_the_key() {
        let cases = [
            ("learing_rate = 1", "unknown key \"learing_rate\"; did you mean \"learning_rate\"?"),
            ("zzz = 1", "unknown key \"zzz\"; `cuvee train --help` lists"),
            ("recipe = 'y.toml'", "unknown key \"recipe\""),
            ("json = true", "unknown key \"json\""),
            ("beta = 'high'", "beta: expected a number, found string \"high\""),
            ("beta = -1", "beta: expected a number with 0 < beta < inf, found -1"),
            ("beta = nan", "beta: expected a number with 0 < beta < inf, found nan"),
            ("max_steps = 1.5", "max_steps: expected a whole number, found float 1.5"),
            ("max_steps = 0", "max_steps: expected a whole number of 1 or more, found 0"),
            ("recompute = 1", "recompute: expected true or false, found integer 1"),
            ("cache_dir = 3", "cache_dir: expected a string, found integer 3"),
            ("cache_dir = ''", "cache_dir: expected a string, found string \"\""),
            ("beta = [0.1]", "beta: expected a number, found array [0.1]"),
            ("device = 'gpu'", "device: expected auto, cpu, cuda or cuda:N, found \"gpu\""),
            ("[optimizer]", "optimizer: expected a string, found table"),
            ("beta = = 1", "line 6"),
        ];
        for (text, expected) in cases {
            let (_folder, path) = recipe(text);
            for subcommand in ["train", "plan"] {
                let message = failure(&[subcommand, &path]);
                assert!(message.starts_with(&path) && message.contains(expected), "{text}: {message}");
            }
        }
        assert!(failure(&["train", "none.toml"]).starts_with("none.toml: no such recipe"));
    }

    #[test]
    fn a_mistyped_flag_is_answered_with_the_nearest() {
        for flag in ["--learing-rate", "--learing_rate"] {
            assert!(failure(&["train", flag, "1"]).contains("'--learning-rate'"));
        }
        assert!(failure(&["train", "--lr-scheduler-type", "cosin"]).contains("'cosine'"));
        assert!(failure(&["tran"]).contains("'train'"));
    }

    #[test]
    fn numbers_keep_to_their_ranges() {
        let wrong = [
            ("--beta", ["-1", "-0.1", "inf", "high"]),
            ("--label-smoothing", ["0.5", "-0.1", "nan", ""]),
            ("--learning-rate", ["0", "-1", "1e999", "1e-6x"]),
            ("--warmup-ratio", ["1.1", "-1", "nan", "1%"]),
            ("--weight-decay", ["-1", "inf", "nan", "x"]),
            ("--adam-beta1", ["1", "-0.1", "nan", "x"]),
            ("--max-grad-norm", ["-1", "inf", "nan", "x"]),
            ("--num-train-epochs", ["0", "-1", "inf", "x"]),
            ("--max-steps", ["0", "-1", "1.5", "9223372036854775808"]),
            ("--max-length", ["0", "1", "-1", "1k"]),
            ("--batch-size", ["0", "-1", "1.5", "x"]),
            ("--seed", ["-1", "1.5", "x", "9223372036854775808"]),
            ("--top-p", ["0", "1.1", "nan", "x"]),
            ("--temperature", ["-1", "inf", "nan", "x"]),
        ];
        for (flag, values) in wrong {
            for value in values {
                let message = failure(&[&["train", flag, value], &REQUIRED[..]].concat());
                assert!(
                    message.contains("expected a") && message.contains(flag) || flag == "--batch-size",
                    "{message}"
                );
            }
        }
        let args = train(&with(&["--learning-rate", "5e-4", "--max-grad-norm", "0", "--warmup-ratio=1"]));
        assert_eq!(args.run.optim.learning_rate, Some(5e-4));
    }

    #[test]
    fn an_option_without_its_companion_is_an_error() {
        let alone: [&[&str]; 5] = [
            &["--eval-steps", "5"],
            &["--samples", "2"],
            &["--max-new-tokens", "5"],
            &["--temperature", "1", "--eval-dataset", "e"],
            &["--top-p", "0.9"],
        ];
        for line in alone {
            let message = failure(&[&["train"], &REQUIRED[..], line].concat());
            assert!(message.starts_with(line[0]) && message.contains("does nothing without --"), "{message}");
        }
        train(&with(&["--samples", "0"]));
        train(&with(&["--samples", "1", "--top-p", "0.9", "--eval-dataset", "e"]));
        let message = failure(&[&["train"], &with(&["--max-steps", "5", "--stop-at-step", "6"])[..]].concat());
        assert!(message.starts_with("--stop-at-step: 6 is after"), "{message}");

        let score = ["--model", "m", "--dataset", "d", "--on-overflow", "error"];
        assert!(failure(&[&["eval"], &score[..]].concat()).contains("without --max-length"));
        run(&[&["eval", "--max-length", "9"], &score[..]].concat()).unwrap();

        let greedy = ["generate", "--model", "m", "--prompt", "p", "--temperature", "0"];
        run(&greedy).unwrap();
        assert!(failure(&[&greedy[..], &["--samples", "2"]].concat()).starts_with("--samples: "));
        assert!(failure(&[&greedy[..], &["--top-p", "0.5"]].concat()).starts_with("--top-p: "));
    }

    #[test]
    fn what_is_missing_is_named_as_flag_and_as_key() {
        let message = failure(&["train", "--model", "m", "--objective", "ipo"]);
        assert!(message.starts_with("--dataset, --output-dir: missing"), "{message}");
        assert!(message.contains("dataset = ..., output_dir = ... in a recipe: cuvee train RECIPE"), "{message}");
        assert!(failure(&["plan"]).starts_with("--model, --objective: missing"));
        let Command::Plan(args) = run(&["plan", "--model", "m", "--objective", "ipo", "--json"]).unwrap().command
        else {
            panic!()
        };
        assert!(args.json && args.dataset.is_none());
    }

    #[test]
    fn subcommands_without_recipes() {
        run(&["logps", "--model", "m", "--dataset", "d", "--out", "o", "--no-prefix-sharing"]).unwrap();
        assert!(failure(&["logps", "--model", "m", "--dataset", "d"]).contains("--out"));
        assert_eq!(
            run(&["list", "optimizers"]).unwrap().command,
            Command::List(ListArgs { what: Registry::Optimizers })
        );
        let Err(Failure::Clap(help)) = run(&["--help"]) else { panic!() };
        assert_eq!(help.exit_code(), 0);
    }

    /// Every flag of train but those of objectives, none at its default.
    const EVERYTHING: &str = "
        optimizer = 'other'\n learning_rate = 5e-4\n lr_scheduler_type = 'cosine'
        warmup_ratio = 0.1\n weight_decay = 1\n adam_beta1 = 0.8\n adam_beta2 = 0.95\n adam_epsilon = 1e-6
        max_grad_norm = 0\n num_train_epochs = 2.5\n max_steps = 100\n stop_at_step = 50\n seed = 9223372036854775807
        resume_from_checkpoint = 'c'\n per_device_train_batch_size = 3\n gradient_accumulation_steps = 2
        max_length = 77\n on_overflow = 'truncate'\n assistant_only_loss = true\n no_shuffle = true\n eval_steps = 5\n save_steps = 6\n save_total_limit = 3\n samples = 3
        max_new_tokens = 7\n temperature = 0\n top_p = 1\n init = 'random'\n dtype = 'bf16'\n recompute = true
        micro_batch_tokens = 512\n no_prefix_sharing = true\n threads = 2\n device = 'cuda:1'\n cache_dir = 'cache'
        ref_model = ['r1', '../r2']\n profile_steps = '5..8'\n ref_mean = 'harmonic'\n ref_weights = '0.25,0.75'
        eval_task = ['n=t.jsonl', '../t.toml']
        stop_when = ['n/acc>0.5']
        ref_clip = 0.1\n ref_clip_window = 'fixed'\n ref_level = 'token'\n official_k2_swap = true\n kl_penalty = 0.5
        kl_estimator = 'k3'\n eval_anchor = 'a'\n kl_samples = 9\n limit = 1000\n skip = 5\n take = 2000
        base_model = 'b'\n tau_model = 't'\n stochastic_rounding = true\n adapter = ['a=0.5']\n lora_rank = 4
        lora_alpha = 3\n lora_rslora = true\n target_modules = ['q_proj']
        reward = ['a=0.5', 'rules.toml=2']
        num_generations = 4
 num_iterations = 2
 max_completion_length = 9
 rollout_temperature = 0.5
 logps_temperature = 0.7
 rollout_top_p = 0.9
 mask_truncated_completions = true
 gold_reward = ['g=2']
 kl_budget = 9
 on_alarm = 'rollback'
 rollback = 'beta'";

    /// The flags that contradict some of those.
    const MOVING: &str = "warmup_steps = 3\n ref_sync_steps = 5\n ref_mixup = 0.5\n lora_start = 'l'";

    /// Every flag of train, none at its default.
    fn everything() -> String {
        let example = |(name, shared): (&str, objectives::Shared)| match shared.specs[0].example() {
            objectives::Value::Choice(choice) => format!("{name} = '{choice}'\n"),
            value => format!("{name} = {value}\n"),
        };
        let params: String = objectives::params().into_iter().chain(optim::params()).map(example).collect();
        format!("{EVERYTHING}\nobjective_weights = 0.5\n{params}")
    }

    #[test]
    fn a_saved_recipe_is_the_run() {
        for text in [&everything()[..], MOVING, "ref_model = ['r', 's']\n ref_weights = 'sliding-window:8'", ""] {
            let (_folder, path) = recipe(text);
            let args = train(&[&path]);
            let saved = args.output_dir.join("recipe.toml");
            std::fs::create_dir_all(&args.output_dir).unwrap();
            std::fs::write(&saved, args.to_toml()).unwrap();
            assert_eq!(train(&[saved.to_str().unwrap()]), args, "{}", args.to_toml());
        }

        // No flag may be missing from what is saved.
        let saved = |text: &str| -> toml::Table {
            let (_folder, path) = recipe(text);
            train(&[&path]).to_toml().parse().unwrap()
        };
        let (most, rest, cli) = (saved(&everything()), saved(MOVING), Cli::command());
        for arg in cli.find_subcommand("train").unwrap().get_arguments() {
            let id = arg.get_id().as_str();
            assert!(most.contains_key(id) || rest.contains_key(id), "{id} is not in to_toml()");
        }
    }

    /// Whichever flag names it, a path in a saved recipe leads where it led from here.
    #[test]
    fn saved_paths_start_at_the_output_folder() {
        let line = ["--optimizer", "ondare", "--base-model", "models/b", "--tau-model", "t", "--eval-dataset", "../e"];
        let saved: toml::Table = train(&with(&line)).to_toml().parse().unwrap();
        let paths = ["model", "dataset", "output_dir", "base_model", "tau_model", "eval_dataset"];
        let found = paths.map(|key| saved[key].as_str().unwrap());
        assert_eq!(found, ["../../m", "../../d.jsonl", ".", "../../models/b", "../../t", "../../../e"]);
        let saved: toml::Table = train(&with(&["--lora-start", "l", "--adapter", "a=0.5"])).to_toml().parse().unwrap();
        assert_eq!((saved["lora_start"].as_str(), &saved["adapter"][0]), (Some("../../l"), &"../../a=0.5".into()));
    }

    #[test]
    fn objectives_are_a_list_with_weights_and_switches() {
        let terms = |args: &TrainArgs| args.run.loss.choice().unwrap().terms;
        let two = train(&with(&["--objective", "sft", "--objective-weights", "1", "0.2", "--beta", "0.1"]));
        assert_eq!(terms(&two), [("sigmoid".into(), 1.0), ("sft".into(), 0.2)]);
        let plain = train(&with(&["--objective", "sft"]));
        assert_eq!(terms(&plain), [("sigmoid".into(), 1.0), ("sft".into(), 1.0)]);
        let message = train(&with(&["--loss-weights", "1", "2"])).run.loss.choice().unwrap_err().to_string();
        assert!(message.starts_with("--objective-weights: 2 weights for 1 objectives"), "{message}");
        for weight in ["0", "-1", "nan", "x"] {
            assert!(failure(&with_train(&["--objective-weights", weight])).contains("expected a number above 0"));
        }

        // A switch can be switched off again.
        assert!(train(&with(&["--use-weighting"])).run.loss.params.on("use_weighting"));
        let (_folder, path) = recipe("use_weighting = true\n");
        assert!(train(&[&path]).run.loss.params.on("use_weighting"));
        assert!(!train(&[&path, "--use-weighting=false"]).run.loss.params.on("use_weighting"));

        // A recipe has a list, and so has what is saved.
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.toml");
        let text =
            "objective = ['ipo', 'sft']\nobjective_weights = [1, 0.5]\nmodel = 'm'\ndataset = 'd'\noutput_dir = 'o'\n";
        std::fs::write(&path, text).unwrap();
        let args = train(&[path.to_str().unwrap()]);
        assert_eq!(terms(&args), [("ipo".into(), 1.0), ("sft".into(), 0.5)]);
        let saved: toml::Table = args.to_toml().parse().unwrap();
        assert_eq!(saved["objective"], toml::Value::Array(vec!["ipo".into(), "sft".into()]));
        assert_eq!(train(&with(&[])).to_toml().parse::<toml::Table>().unwrap()["objective"], "sigmoid".into());
    }

    fn with_train(line: &[&str]) -> Vec<&'static str> {
        [&["train"][..], &with(line)].concat()
    }

    #[test]
    fn the_recipes_we_ship_parse() {
        for name in ["quickstart", "control"] {
            let path = format!("{}/recipes/{name}.toml", env!("CARGO_MANIFEST_DIR"));
            let args = train(&[&path]);
            assert_eq!(args.run.schedule.max_steps, Some(100));
            assert!(args.output_dir.ends_with(format!("runs/{name}")));
        }
        let path = format!("{}/recipes/alignment-tax.toml", env!("CARGO_MANIFEST_DIR"));
        let Command::Compare(compare::Compare::Experiment(experiment)) = run(&["compare", &path]).unwrap().command
        else {
            panic!("it lists its runs")
        };
        assert_eq!((experiment.seeds, experiment.variants[0].name.as_str()), (3, "base"));
    }

    #[test]
    fn every_flag_is_explained() {
        let mut cli = Cli::command();
        cli.build();
        cli.clone().debug_assert();
        for command in cli.get_subcommands() {
            for arg in command.get_arguments() {
                assert!(arg.get_help().is_some(), "{}: {arg} has no help", command.get_name());
            }
        }
    }
}
