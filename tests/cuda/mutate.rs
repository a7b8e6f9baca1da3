//! Is every barrier necessary, and does a test know it? Deletes the barriers of a kernel file one at a time (those of the
//! headers count for each file that includes them), and runs the cases that reach the place, with the race check first.
//! By hand: minutes for each file.

use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;

use cuvee::device::cuda::kernels;

use crate::child::{self, Outcome, Run};
use crate::driver::{self, Source};
use crate::{Body, Case, Mode};

const BARRIERS: &[&str] = &["__syncthreads(", "__syncwarp(", "cp_async_wait<"];

/// One statement.
struct Barrier {
    /// `kernels/dev.cuh:117`
    place: String,
    /// In the flattened source.
    start: usize,
    end: usize,
}

/// Number and name of a `#line` directive.
fn directive(line: &str) -> Option<(usize, String)> {
    let (number, name) = line.strip_prefix("#line ")?.split_once(' ')?;
    Some((number.parse().ok()?, name.trim_matches('"').to_string()))
}

/// Statements that wait; not the definitions of what waits.
fn barriers(source: &str) -> Vec<Barrier> {
    let (mut found, mut file, mut number, mut start) = (Vec::new(), String::new(), 1, 0);
    for line in source.split_inclusive('\n') {
        if let Some(next) = directive(line.trim_end()) {
            (number, file) = next;
        } else {
            let code = line.split("//").next().unwrap_or_default();
            for word in BARRIERS {
                for (at, _) in code.match_indices(word) {
                    if let Some(len) = code[at..].find(");") {
                        let (from, to) = (start + at, start + at + len + 1);
                        found.push(Barrier { place: format!("{file}:{number}"), start: from, end: to });
                    }
                }
            }
            number += 1;
        }
        start += line.len();
    }
    found
}

/// Cases by kernel file and place of a barrier that they reach.
type Reached = BTreeMap<(usize, String), BTreeSet<String>>;

fn reached(cases: &[Case]) -> Result<Reached, String> {
    let library = driver::library(Mode::Plain)?;
    let folder = tempfile::tempdir().map_err(|e| e.to_string())?;
    let mut reached = Reached::new();
    for (i, case) in cases.iter().enumerate() {
        let trace = folder.path().join(i.to_string());
        let run = Run { case: &case.name, mode: Mode::Plain, library: Some(&library), seed: 0, trace: Some(&trace) };
        if let Outcome::Failed(_) = child::run(&run) {
            eprintln!("{} fails before anything is deleted, and is left out", case.name);
            continue;
        }
        for line in std::fs::read_to_string(&trace).unwrap_or_default().lines() {
            let (entry, place) = line.split_once(' ').expect("an entry and a place");
            let entry = kernels::ENTRIES.iter().find(|e| e.name == entry).expect("a kernel");
            reached.entry((entry.module, place.to_string())).or_default().insert(case.name.clone());
        }
    }
    Ok(reached)
}

/// What the emulator said, or the test did.
fn gist(why: &str) -> &str {
    let said = why.find("kernels/").map(|at| why[at..].split(['"', '\n']).next().unwrap_or_default());
    said.or(why.lines().nth(3)).unwrap_or_default().trim_end_matches('\\')
}

/// Who notices that the barrier is gone, and how.
fn caught(source: Source, module: usize, cases: &BTreeSet<String>) -> Result<Option<String>, String> {
    for mode in [Mode::Race, Mode::Plain] {
        let mut sources = driver::kernel_sources();
        sources[module] = source.clone();
        let library = driver::build(mode, &sources)?;
        for case in cases {
            for seed in mode.seeds() {
                let run = Run { case, mode, library: Some(&library), seed: *seed, trace: None };
                if let Outcome::Failed(why) = child::run(&run) {
                    return Ok(Some(format!("{mode}::{case}: {}", gist(&why))));
                }
            }
        }
    }
    Ok(None)
}

/// Of the kernel file with this name, or of `all`.
fn mutate(name: &str) -> Result<bool, String> {
    let is_meant = |module: &str| name == "all" || name == module;
    if !kernels::MODULES.iter().any(|module| is_meant(module.name)) {
        let names: Vec<&str> = kernels::MODULES.iter().map(|module| module.name).collect();
        return Err(format!("there is no kernels/{name}.cu; there are {}, and `all`", names.join(", ")));
    }
    let cases: Vec<Case> = crate::cases::all()
        .into_iter()
        .chain(crate::sample::all())
        .filter(|c| matches!(c.body, Body::OnCuda(..)))
        .collect();
    let reached = reached(&cases)?;
    let mut all_caught = true;
    for (i, module) in kernels::MODULES.iter().enumerate().filter(|(_, module)| is_meant(module.name)) {
        let source = driver::kernel_sources().swap_remove(i);
        for Barrier { place, start, end } in barriers(&source.text) {
            let text = format!("{}{}{}", &source.text[..start], "(void)0", &source.text[end..]);
            let cases = reached.get(&(i, place.clone()));
            let verdict = match cases {
                None => "never runs".to_string(),
                Some(cases) => match caught(Source { text, ..source.clone() }, i, cases)? {
                    Some(by) => format!("caught by {by}"),
                    None => format!("MISSED by {} cases", cases.len()),
                },
            };
            // A helper that another kernel file uses is that file's matter.
            all_caught &= !verdict.starts_with("MISSED");
            println!("{:<16} {place:<26} {:<24} {verdict}", module.name, &source.text[start..end]);
        }
    }
    Ok(all_caught)
}

pub fn run(name: &str) -> ExitCode {
    match mutate(name) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(why) => {
            eprintln!("{why}");
            ExitCode::FAILURE
        }
    }
}
