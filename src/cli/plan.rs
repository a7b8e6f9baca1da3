//! `cuvee plan`

use std::fmt::Write;
use std::io::{IsTerminal, stdout};

use super::args::{PlanArgs, Ram};
use super::device::{self, Place};
use crate::device::Cuda;
use crate::error::{Error, Result};
use crate::machine::{human, memory};
use crate::train::{Assumed, Choice, Memory, Phase, Plan, Settings, Task, Workload, fit};

pub fn run(args: &PlanArgs) -> Result<()> {
    let place = device::place(args.run.engine.device);
    let mut settings = super::train::from_run(&args.run, place != Place::Cpu)?;
    match &args.dataset {
        Some(dataset) => {
            settings.dataset = dataset.clone();
            let task = Task::prepare(&settings)?;
            let settings = task.refine(&settings);
            show(args, &settings, &Workload::new(&task, &settings))
        }
        None => {
            let assumed = Assumed::new(&settings, args.run.data.max_length)?;
            show(args, &settings, &assumed.workload(&settings))
        }
    }
}

/// A limit on memory, as it was given.
struct Limit {
    flag: &'static str,
    of: Memory,
    bytes: usize,
}

fn limit(args: &PlanArgs) -> Result<Option<Limit>> {
    let ram = |bytes| Some(Limit { flag: "--ram", of: Memory::Host, bytes });
    let vram = |bytes| Some(Limit { flag: "--vram", of: Memory::Device, bytes });
    Ok(match (args.ram, args.vram) {
        (Some(Ram::Bytes(bytes)), _) => ram(bytes),
        (Some(Ram::Auto), _) => match memory() {
            Some(memory) => ram(memory.available),
            None => return Err(Error::option("--ram", "this system does not tell what is available; give a size")),
        },
        (None, Some(Ram::Bytes(bytes))) => vram(bytes),
        (None, Some(Ram::Auto)) => match device::place(args.run.engine.device) {
            Place::Cuda(ordinal) => vram(Cuda::free_bytes(ordinal)?),
            Place::Cpu => {
                let detail =
                    "auto is what is free on a GPU, and this run computes on the CPU; give a size, or --ram auto";
                return Err(Error::option("--vram", detail));
            }
        },
        (None, None) => None,
    })
}

fn show(args: &PlanArgs, settings: &Settings, workload: &Workload) -> Result<()> {
    let free_rows = args.run.batching.micro_batch_tokens.is_none();
    let (plan, found) = match limit(args)? {
        None => (workload.plan(settings)?, None),
        Some(limit) => {
            let choice = fit(workload, settings, limit.of, limit.bytes, free_rows)?;
            if !choice.fits {
                return Err(nothing_fits(&limit, &choice, free_rows));
            }
            (choice.plan, Some(limit))
        }
    };
    if args.json {
        return super::print(&format!("{}\n", serde_json::to_string_pretty(&plan).expect("a plan is plain data")));
    }
    let of = found.as_ref().map_or(plan.scarce(), |limit| limit.of);
    let mut out = table(&plan, of);
    match found {
        Some(limit) => {
            let _ = writeln!(out, "\nfits in {} {} with\n  {}", limit.flag, human(limit.bytes), plan.flags());
        }
        None => out += &advice(workload, settings, &plan)?,
    }
    super::print(&out)
}

fn nothing_fits(limit: &Limit, choice: &Choice, free_rows: bool) -> Error {
    let plan = &choice.plan;
    let peak = plan.peak(limit.of);
    let tensors = limit.of == plan.scarce() || !plan.gpu;
    let fixed = if tensors { peak.weights + peak.grads + peak.states } else { 0 };
    let why = match free_rows {
        true => format!("one example at a time (the longest has {} tokens)", choice.floor),
        false => format!("--micro-batch-tokens {}", plan.micro_batch_tokens),
    };
    let help = match (fixed > limit.bytes, free_rows) {
        (true, _) => {
            format!(
                "weights, gradients and optimizer states alone take {}: only a smaller model would fit",
                human(fixed)
            )
        }
        (false, true) => "a lower --max-length, or a smaller model, would lower it".to_string(),
        (false, false) => "leave --micro-batch-tokens out to have it chosen".to_string(),
    };
    let least = human(plan.bytes(peak, limit.of));
    let limit_size = human(limit.bytes);
    Error::option(
        limit.flag,
        format!("nothing fits in {limit_size}: with --recompute and {why} the run takes {least}; {help}"),
    )
}

fn table(plan: &Plan, of: Memory) -> String {
    let mib = |bytes: usize| format!("{:.1}", bytes as f64 / (1 << 20) as f64);
    // A GPU's memory and the host's are not to be added.
    let last = if plan.gpu { ["GPU", "host"] } else { ["host", "total"] };
    let columns = [&["weights", "grads", "states", "activations", "workspace"][..], &last].concat();
    let bold = |text: String| if stdout().is_terminal() { format!("\x1b[1m{text}\x1b[0m") } else { text };
    let peak = plan.peak(of);
    let mut out = format!("{:<8}", "MiB");
    columns.iter().for_each(|c| out += &format!("{c:>12}"));
    out.push('\n');
    for p in &plan.phases {
        let [device, total] = [Memory::Device, Memory::Host].map(|of| plan.bytes(p, of));
        let last = if plan.gpu { [device, p.host] } else { [p.host, total] };
        let cells = [&[p.weights, p.grads, p.states, p.activations, p.workspace][..], &last].concat();
        let cells: String = cells.iter().map(|bytes| format!("{:>12}", mib(*bytes))).collect();
        let line = format!("{:<8}{cells}", p.name);
        out += &if std::ptr::eq(p, peak) { bold(format!("{line}  <- peak")) } else { line };
        out.push('\n');
    }
    let line = |of: Memory| {
        let what = match (of, plan.gpu) {
            (Memory::Host, false) => "peak",
            (Memory::Host, true) => "peak of the host",
            (Memory::Device, false) => "peak of the tensors",
            (Memory::Device, true) => "peak of the GPU",
        };
        format!("{what} {}, {}", human(plan.peak_of(of)), doing(plan.peak(of)))
    };
    let _ = writeln!(out, "\n{}", bold(line(of)));
    if plan.gpu {
        let other = if of == Memory::Device { Memory::Host } else { Memory::Device };
        let _ = writeln!(out, "{}; on both the driver takes some hundred MiB besides", line(other));
    }
    let (gflop, parameters) = (plan.flops_per_step / 1e9, plan.parameters);
    let trained = plan.trained.map_or(String::new(), |trained| format!(", of which {trained} beside them train"));
    let _ = writeln!(out, "{gflop:.3} GFLOP a step, {parameters} parameters{trained}");
    if plan.hidden_rows_bytes > 0 {
        let rows = human(plan.hidden_rows_bytes);
        let _ = writeln!(out, "{rows} on disk for the hidden rows that --kl-penalty compares with");
    }
    if plan.resident_bytes > 0 {
        let resident = human(plan.resident_bytes);
        let _ = writeln!(
            out,
            "{resident} more if references that --kl-samples asks stay in memory, as they do where there is room"
        );
    }
    out
}

fn doing(phase: &Phase) -> &'static str {
    match phase.name {
        "read" => "while tokenizer and data are read",
        "score" => "while the reference scores",
        "load" => "while the weights are loaded",
        "sample" => "while samples are generated",
        "ask" => "while a reference is asked about samples",
        "save" => "while a checkpoint is written",
        _ => "while training",
    }
}

/// What each setting would lower the peak to, where it does.
fn advice(workload: &Workload, settings: &Settings, plan: &Plan) -> Result<String> {
    let half = (settings.packing.budget / 2).max(1);
    let smaller = crate::data::Packing { budget: half, ..settings.packing };
    let changes = [
        ("--recompute".to_string(), Settings { recompute: true, ..settings.clone() }),
        (format!("--micro-batch-tokens {half}"), Settings { packing: smaller, ..settings.clone() }),
        (
            format!("--micro-batch-tokens {half} --recompute"),
            Settings { packing: smaller, recompute: true, ..settings.clone() },
        ),
    ];
    let of = plan.scarce();
    let (mut lowest, mut out) = (plan.peak_of(of), String::new());
    for (flags, settings) in changes {
        let changed = workload.plan(&settings)?.peak_of(of);
        // What brings less than a hundredth is no advice.
        if changed < lowest - lowest / 100 {
            let _ = writeln!(out, "  {flags:<42}{:>12}", human(changed));
            lowest = changed;
        }
    }
    let chooses = if plan.gpu { "--vram" } else { "--ram" };
    Ok(if out.is_empty() { out } else { format!("\nto lower the peak ({chooses} SIZE chooses)\n{out}") })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Command, parse};
    use crate::train::warning;

    #[test]
    fn a_run_that_does_not_fit_is_warned_of_with_what_to_type() {
        let model = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/review-llama-656k");
        let line = ["cuvee", "plan", "--device", "cpu", "--objective", "sft", "--model", model, "--max-length", "100"];
        let Command::Plan(args) = parse(line.map(Into::into)).unwrap().command else { panic!() };
        let settings = super::super::train::from_run(&args.run, false).unwrap();
        let assumed = Assumed::new(&settings, 100).unwrap();
        let workload = assumed.workload(&settings);
        let plan = workload.plan(&settings).unwrap();
        let said = |available| warning(&workload, &settings, &plan, available).unwrap();
        assert_eq!(said(plan.peak_bytes), None);
        let less = said(plan.peak_bytes - 1).unwrap();
        assert!(less.starts_with("warning: this run takes ") && less.contains("--micro-batch-tokens 7"), "{less}");
        let nothing = said(1).unwrap();
        assert!(nothing.contains("no setting of --micro-batch-tokens and --recompute takes less than"), "{nothing}");
    }
}
