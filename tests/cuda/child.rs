//! A case runs in a process of its own: the driver's library is chosen when it starts, and what a kernel breaks stays
//! broken. The child is this executable with the case's name in the environment.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use std::{env, process, thread};

use cuvee::device::cuda::libraries;

use crate::{Mode, driver};

pub const CASE: &str = "CUVEE_CUDA_CASE";
pub const MODE: &str = "CUVEE_CUDA_MODE";
/// Exit status of a case that has nothing to test.
const IGNORED: i32 = 77;
/// Of what a failed child wrote.
const SHOWN_LINES: usize = 60;

pub enum Outcome {
    Passed,
    Ignored(String),
    Failed(String),
}

/// Ends a case that cannot be tested, with the reason.
pub fn ignore(reason: &str) -> ! {
    eprintln!("ignored: {reason}");
    process::exit(IGNORED)
}

/// What a child is started with besides its mode.
#[derive(Clone, Copy)]
pub struct Run<'a> {
    pub case: &'a str,
    pub mode: Mode,
    /// Folder of the emulated driver; `None`: the machine's.
    pub library: Option<&'a Path>,
    /// Order of threads.
    pub seed: u64,
    /// File that gets the barriers that ran.
    pub trace: Option<&'a Path>,
}

fn command(run: &Run) -> Result<Command, String> {
    let executable = env::current_exe().map_err(|e| e.to_string())?;
    let mut command = Command::new(executable);
    command.env(CASE, run.case).env(MODE, run.mode.to_string()).env("CUVEE_EMULATOR_SEED", run.seed.to_string());
    command.env("RUST_BACKTRACE", "0");
    if let Some(library) = run.library {
        command.env("LD_LIBRARY_PATH", library).env(libraries::VARIABLE, library.join(driver::LIBRARIES));
    }
    if let Some(trace) = run.trace {
        command.env("CUVEE_EMULATOR_TRACE", trace);
    }
    if run.mode == Mode::Asan {
        let asan = driver::compiler()?.asan.as_ref().expect("the mode runs where it is there");
        command.env("LD_PRELOAD", asan).env("ASAN_OPTIONS", "detect_leaks=0:abort_on_error=0");
        command.env("UBSAN_OPTIONS", "print_stacktrace=1");
    }
    Ok(command)
}

fn limit() -> Duration {
    let seconds = env::var("CUVEE_CUDA_TIMEOUT").ok().and_then(|text| text.parse().ok());
    Duration::from_secs(seconds.unwrap_or(300))
}

/// The last lines, without a backtrace of the test program.
fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with("note: run with")).collect();
    lines[lines.len().saturating_sub(SHOWN_LINES)..].join("\n")
}

pub fn run(run: &Run) -> Outcome {
    start(run).unwrap_or_else(Outcome::Failed)
}

fn start(run: &Run) -> Result<Outcome, String> {
    let io = |e: std::io::Error| e.to_string();
    let folder = tempfile::tempdir().map_err(io)?;
    let path = folder.path().join("output");
    let output = File::create(&path).map_err(io)?;
    let errors = output.try_clone().map_err(io)?;
    let mut child = command(run)?.stdin(Stdio::null()).stdout(output).stderr(errors).spawn().map_err(io)?;
    let started = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().map_err(io)? {
            break status;
        }
        if started.elapsed() > limit() {
            child.kill().and_then(|()| child.wait()).map_err(io)?;
            let text = tail(&String::from_utf8_lossy(&fs::read(&path).map_err(io)?));
            return Ok(Outcome::Failed(format!("no end after {} s (CUVEE_CUDA_TIMEOUT)\n{text}", limit().as_secs())));
        }
        thread::sleep(Duration::from_millis(5));
    };
    let text = String::from_utf8_lossy(&fs::read(&path).map_err(io)?).into_owned();
    Ok(match status.code() {
        Some(0) => Outcome::Passed,
        Some(IGNORED) => {
            let reason = text.lines().find_map(|line| line.strip_prefix("ignored: "));
            Outcome::Ignored(reason.unwrap_or("no reason given").into())
        }
        _ => Outcome::Failed(format!("{status}, seed {}\n{}", run.seed, tail(&text))),
    })
}
