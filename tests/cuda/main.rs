//! Every kernel on an emulated GPU: the sources of `kernels/` run on the CPU behind a mock of NVIDIA's driver, so that all
//! of the CUDA path but the silicon is tested on any x86-64 Linux machine with a C++ compiler.
//!
//! | test | finds |
//! |---|---|
//! | `plain::CASE` | wrong results, in three orders of threads |
//! | `race::CASE` | missing barriers, shared memory that nobody wrote |
//! | `asan::CASE` | accesses out of bounds or not aligned, undefined arithmetic |
//! | `MODE::emulator::BUG` | whether the emulator finds a planted bug |
//! | `real::CASE` | the same on this machine's GPU, with `CUVEE_CUDA_REAL=1`; `=watched`: under compute-sanitizer, with smaller cases |
//!
//! One case in one mode: `cargo test --release --test cuda -- race::rms_norm`. With `CUVEE_CUDA_MUTATE=rms_norm` (`all`)
//! instead: deletes each barrier of that kernel file in turn and shows which case notices (`.ci/mutate-kernels`).

mod bugs;
mod cases;
mod child;
#[path = "../common/mod.rs"]
mod common;
mod driver;
#[path = "../common/fixtures.rs"]
mod fixtures;
mod models;
mod mutate;
mod program;
mod ptxas;
mod sample;

use std::env;
use std::fmt;
use std::panic;
use std::process::ExitCode;

use cuvee::device::{Cuda, DType, Device, cuda};
use libtest_mimic::{Arguments, Completion, Failed, Trial};

use child::Outcome;

/// How kernels are compiled and watched.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    Plain,
    Race,
    Asan,
    /// Not emulated.
    Real,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::Plain => "plain",
            Self::Race => "race",
            Self::Asan => "asan",
            Self::Real => "real",
        })
    }
}

impl Mode {
    const ALL: [Self; 4] = [Self::Plain, Self::Race, Self::Asan, Self::Real];

    /// Of this process, where it runs a case.
    pub fn current() -> Self {
        let name = env::var(child::MODE).unwrap_or_default();
        Self::ALL.into_iter().find(|mode| mode.to_string() == name).expect("set by the parent")
    }

    /// Orders of threads: ascending, descending, random. What the race check says does not depend on them.
    fn seeds(self) -> &'static [u64] {
        match self {
            Self::Plain => &[0, 1, 7],
            Self::Race => &[7],
            Self::Asan | Self::Real => &[0],
        }
    }
}

/// What a case is given.
pub enum Body {
    /// A device with this storage type. Panics where something is wrong; [`child::ignore`] ends it without a verdict.
    OnCuda(DType, Box<dyn Fn(&Cuda) + Send + Sync>),
    /// No device: it opens the driver itself.
    Alone(Box<dyn Fn() + Send + Sync>),
}

pub struct Case {
    /// Unique, without the mode.
    pub name: String,
    pub modes: &'static [Mode],
    pub body: Body,
    /// A planted bug, which must be reported with these words.
    pub bug: Option<&'static str>,
}

/// Of the names of cases whose products are cuBLASLt's: a mock of it, or the machine's.
pub const WITH_CUBLASLT: &str = "blas::";

impl Case {
    /// One that runs in every mode, and on a GPU.
    pub fn new(name: impl Into<String>, storage: DType, run: impl Fn(&Cuda) + Send + Sync + 'static) -> Self {
        Self { name: name.into(), modes: &Mode::ALL, body: Body::OnCuda(storage, Box::new(run)), bug: None }
    }

    /// In the child.
    fn run(&self) {
        match &self.body {
            Body::Alone(run) => run(),
            Body::OnCuda(storage, run) => {
                let (workspace_bytes, batch_invariant) = (8 << 20, !self.name.starts_with(WITH_CUBLASLT));
                let defaults = cuda::Options::new(0, *storage);
                let options = cuda::Options { workspace_bytes, batch_invariant, ..defaults };
                let device = Cuda::open(&options).unwrap_or_else(|e| panic!("{e}"));
                if !batch_invariant && !device.arithmetic().ends_with("cublaslt") {
                    child::ignore("cuBLASLt was not found; CUVEE_CUDA_LIBS names its folder");
                }
                run(&device);
                device.synchronize().unwrap_or_else(|e| panic!("{e}"));
            }
        }
    }
}

fn all_cases() -> Vec<Case> {
    cases::all()
        .into_iter()
        .chain(sample::all())
        .chain(models::all())
        .chain(program::all())
        .chain(ptxas::all())
        .chain(bugs::all())
        .collect()
}

/// Why the mode cannot run on this machine.
fn missing(mode: Mode) -> Option<String> {
    match (mode, driver::compiler()) {
        (Mode::Real, _) => None,
        (_, Err(why)) => Some(why),
        (Mode::Asan, Ok(compiler)) if compiler.asan.is_none() => Some("the compiler has no libasan".into()),
        _ => None,
    }
}

/// In the parent.
fn run_in_children(case: &str, bug: Option<&str>, mode: Mode) -> Result<Completion, Failed> {
    if let Some(why) = missing(mode) {
        return Ok(Completion::ignored_with(why));
    }
    let library = match mode {
        Mode::Real => None,
        _ => Some(driver::library(mode)?),
    };
    for seed in mode.seeds() {
        let run = child::Run { case, mode, library: library.as_deref(), seed: *seed, trace: None };
        match (child::run(&run), bug) {
            (Outcome::Ignored(why), _) => return Ok(Completion::ignored_with(why)),
            (Outcome::Passed, None) => {}
            (Outcome::Passed, Some(words)) => return Err(format!("seed {seed}: not found: {words}").into()),
            (Outcome::Failed(why), Some(words)) if why.contains(words) => {}
            (Outcome::Failed(why), _) => return Err(why.into()),
        }
    }
    Ok(Completion::Completed)
}

/// A panic that says so ends the case without a verdict.
fn ignore_missing_kernels() {
    let usual = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        match info.payload().downcast_ref::<String>().filter(|why| why.ends_with("not on CUDA yet")) {
            Some(why) => child::ignore(why),
            None => usual(info),
        }
    }));
}

fn main() -> ExitCode {
    if let Ok(name) = env::var(child::CASE) {
        ignore_missing_kernels();
        let case = all_cases().into_iter().find(|case| case.name == name);
        case.unwrap_or_else(|| panic!("there is no case {name}")).run();
        return ExitCode::SUCCESS;
    }
    if let Ok(module) = env::var("CUVEE_CUDA_MUTATE") {
        return mutate::run(&module);
    }
    let real = env::var_os("CUVEE_CUDA_REAL").is_some();
    let modes = |case: &Case| case.modes.iter().copied().filter(|mode| (*mode == Mode::Real) == real);
    let mut trials = Vec::new();
    for case in all_cases() {
        trials.extend(modes(&case).map(|mode| {
            let (name, bug) = (case.name.clone(), case.bug);
            Trial::ignorable_test(format!("{mode}::{name}"), move || run_in_children(&name, bug, mode))
        }));
    }
    let arguments = Arguments::from_args();
    let conclusion = libtest_mimic::run(&arguments, trials);
    if let Some(why) = missing(if real { Mode::Real } else { Mode::Plain }) {
        println!("CUDA kernels were not tested: {why}");
    }
    conclusion.exit_code()
}
