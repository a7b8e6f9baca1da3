//! Where a command computes: from `--device` to an open device and the command's work on it.

use std::path::Path;

use super::args::{Device as Choice, Dtype, EngineArgs, cache_dir};
use crate::device::cuda::{self, Options, Unavailable, probe};
use crate::device::{Cpu, Cuda, Device, Isa};
use crate::error::{Error, Result};
use crate::machine::human;
use crate::ops::Backend;
use crate::progress::say;

/// What a command does once there is a device: a closure that is generic over it.
pub trait Job: Send {
    type Output: Send;
    fn run<B: Backend>(self, device: &B) -> Result<Self::Output>;
}

/// `--device` with `auto` decided.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    Cpu,
    /// By the driver's count.
    Cuda(usize),
}

/// Where `choice` leads on this machine. Whether a GPU that was asked for can be used is seen when it is opened.
pub fn place(choice: Choice) -> Place {
    let found = match choice {
        Choice::Cpu => return Place::Cpu,
        Choice::Cuda(ordinal) => return Place::Cuda(ordinal),
        Choice::Auto => probe(),
    };
    match found {
        Ok(found) => match found.iter().find(|gpu| gpu.fits()) {
            Some(gpu) => Place::Cuda(gpu.ordinal),
            None => {
                say(format_args!("computing on the CPU: {}", found[0].unfit()));
                Place::Cpu
            }
        },
        Err(Unavailable::NoDriver(_) | Unavailable::NoDevice) => Place::Cpu,
        Err(broken) => {
            say(format_args!("computing on the CPU: {broken}"));
            Place::Cpu
        }
    }
}

/// Opens the device, says which GPU it is if it is one, and does the job. What runs beside it, such as tokenization, gets as
/// many threads. `--cache-dir` is where kernels are kept that must be compiled here.
pub fn run<J: Job>(engine: &EngineArgs, dtype: Dtype, given: Option<&Path>, job: J) -> Result<J::Output> {
    let threads = engine.threads.unwrap_or(0);
    // Fails only where a pool is there already, as in a test that calls this twice.
    let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    match place(engine.device) {
        Place::Cpu => {
            let cpu = if engine.no_amx { Cpu::with_isa(threads, Isa::detect())? } else { Cpu::new(threads)? };
            // On one of its own threads: a parallel section then starts with a call, not by waking a thread and sleeping.
            cpu.run(|| job.run(&cpu))
        }
        Place::Cuda(ordinal) => {
            let cache_dir = cache_dir(given).ok().map(|dir| dir.join("kernels"));
            let batch_invariant = engine.batch_invariant;
            let cuda = Cuda::open(&Options { cache_dir, batch_invariant, ..Options::new(ordinal, dtype.storage()) })?;
            say(describe(cuda.found(), dtype));
            job.run(&cuda)
        }
    }
}

fn describe(gpu: &cuda::Found, dtype: Dtype) -> String {
    let (memory, (major, minor)) = (human(gpu.memory_bytes), gpu.capability);
    let name = dtype.name();
    format!("computing on cuda:{}, {} ({memory}, capability {major}.{minor}), in {name}", gpu.ordinal, gpu.name)
}

/// For commands whose `--dtype` is what is computed with and nothing else.
pub fn check_dtype<D: Device>(device: &D, dtype: Dtype) -> Result<()> {
    if device.storage() == dtype.storage() {
        return Ok(());
    }
    Err(Error::option("--dtype", format!("{} needs a GPU; the CPU computes in f32", dtype.name())))
}
