//! `cuvee doctor`: what this machine has, how fast it is, and what stands in the way.

use std::fs;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rayon::prelude::*;
use serde_json::{Value, json};

use super::args::{DoctorArgs, cache_dir};
use crate::device::{Cpu, Isa, Products};
use crate::error::{Error, Result};
use crate::machine::{self, Memory, Processor, human};
use crate::ops::simd::dispatched;

/// Of each measurement.
const TIME: Duration = Duration::from_millis(200);
/// Copied in one go, by all threads: more than any cache holds.
const COPIED: usize = 128 << 20;

struct Findings {
    processor: Processor,
    isa: Isa,
    products: Products,
    sets: Vec<&'static str>,
    threads: usize,
    /// f32 FLOPs a second of all threads in registers.
    peak_flops: f64,
    /// Bytes read and written a second by a copy.
    bandwidth: f64,
    memory: Option<Memory>,
    gpu: Gpu,
    cache: Cache,
}

#[derive(Default)]
struct Gpu {
    /// What the kernel's driver says of itself.
    driver: Option<String>,
    /// As the driver names the cards.
    models: Vec<String>,
    /// The library that programs reach the driver through can be opened.
    libcuda: bool,
}

struct Cache {
    dir: PathBuf,
    bytes: u64,
    free: Option<u64>,
    /// Why it cannot be used.
    problem: Option<String>,
}

pub fn run(args: &DoctorArgs) -> Result<()> {
    let cpu = Cpu::new(0)?;
    let memory = machine::memory();
    let findings = Findings {
        processor: machine::processor(),
        isa: cpu.isa(),
        products: cpu.products(),
        sets: instruction_sets(),
        threads: cpu.threads(),
        peak_flops: peak_flops(&cpu),
        bandwidth: bandwidth(&cpu, memory),
        memory,
        gpu: gpu(),
        cache: cache(cache_dir(args.cache_dir.as_deref())?),
    };
    let text = if args.json { format!("{:#}\n", findings.json()) } else { findings.text() };
    super::print(&text)?;
    match &findings.cache.problem {
        None => Ok(()),
        Some(problem) => Err(Error::option("--cache-dir", format!("{}: {problem}", findings.cache.dir.display()))),
    }
}

impl Findings {
    /// What would make cuvee faster or safer here, each with what to do.
    fn advice(&self) -> Vec<String> {
        let mut advice = Vec::new();
        if self.isa == Isa::Portable {
            advice.push("neither AVX2 nor AVX-512: kernels run as portable code, many times slower".to_string());
        }
        if let Some(quota) = self.processor.quota.filter(|quota| *quota < self.threads as f64 - 0.5) {
            let fewer = (quota.round() as usize).max(1);
            advice.push(format!("the control group gives {quota:.1} cores of time: add --threads {fewer}"));
        }
        if self.memory.is_some_and(|memory| memory.available < memory.total / 4) {
            advice.push(
                "most of the memory is in use: cuvee plan RECIPE --ram auto finds settings for what is left".into(),
            );
        }
        if let Some(free) = self.cache.free.filter(|free| *free < 1 << 30) {
            advice.push(format!("{} left for the cache: --cache-dir on another disk", human(free as usize)));
        }
        advice
    }

    fn kernels(&self) -> &'static str {
        match (self.isa, self.products) {
            #[cfg(target_arch = "x86_64")]
            (_, Products::Tiles) => "AVX-512, for products AMX",
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512, _) => "AVX-512",
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx2, _) => "AVX2",
            (Isa::Portable, _) => "portable code",
        }
    }

    fn gpu_text(&self) -> String {
        let Gpu { driver, models, libcuda } = &self.gpu;
        let Some(driver) = driver else {
            return "no NVIDIA driver; this build computes on the CPU".to_string();
        };
        let models = if models.is_empty() { String::new() } else { format!("{}; ", models.join(", ")) };
        let library = if *libcuda { "libcuda found" } else { "libcuda.so.1 cannot be opened" };
        format!("{models}driver {driver}, {library}; this build computes on the CPU and leaves it idle")
    }

    fn text(&self) -> String {
        let p = &self.processor;
        let mut out = String::new();
        let mut line = |name: &str, text: String| out += &format!("{name:<14}{text}\n");
        line("cuvee", env!("CARGO_PKG_VERSION").to_string());
        let quota = p.quota.map_or(String::new(), |quota| format!(", {quota:.1} of time"));
        let cores = format!("{} physical, {} logical, {} allowed{quota}", p.physical, p.logical, p.allowed);
        line("processor", p.name.clone().unwrap_or("unknown".into()));
        line("cores", format!("{cores}; cuvee uses {} threads", self.threads));
        line("instructions", format!("{}; the kernels use {}", self.sets.join(" "), self.kernels()));
        line("arithmetic", format!("{:.0} GFLOP/s (f32, fused multiply-add, measured)", self.peak_flops / 1e9));
        line("memory speed", format!("{:.1} GB/s (copy, read + written, measured)", self.bandwidth / 1e9));
        line(
            "memory",
            match self.memory {
                None => "unknown".into(),
                Some(m) => {
                    let limit = m.limit.map_or(String::new(), |limit| format!(", limit of the group {}", human(limit)));
                    format!("{}, {} available{limit}", human(m.total), human(m.available))
                }
            },
        );
        line("GPU", self.gpu_text());
        let free = self.cache.free.map_or("unknown space".into(), |free| human(free as usize));
        line("cache", format!("{}: {}, {free} left", self.cache.dir.display(), human(self.cache.bytes as usize)));
        for advice in self.advice() {
            line("note", advice);
        }
        line(
            "verdict",
            match &self.cache.problem {
                None => "cuvee works here; try cuvee train recipes/quickstart.toml".into(),
                Some(problem) => format!("cuvee cannot train here: the cache folder {problem}"),
            },
        );
        out
    }

    fn json(&self) -> Value {
        let p = &self.processor;
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "processor": p.name,
            "cores": {"physical": p.physical, "logical": p.logical, "allowed": p.allowed, "quota": p.quota},
            "threads": self.threads,
            "instruction_sets": self.sets,
            "kernels": self.kernels(),
            "flops_per_second": self.peak_flops,
            "memory_bytes_per_second": self.bandwidth,
            "memory": self.memory.map(|m| json!({"total": m.total, "available": m.available, "limit": m.limit})),
            "gpu": {"driver": self.gpu.driver, "models": self.gpu.models, "libcuda": self.gpu.libcuda, "used": false},
            "cache": {"dir": self.cache.dir, "bytes": self.cache.bytes, "free_bytes": self.cache.free},
            "advice": self.advice(),
            "problem": self.cache.problem,
        })
    }
}

/// Those that the kernels use or might use.
fn instruction_sets() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        let sets = [
            ("avx2", has!("avx2")),
            ("fma", has!("fma")),
            ("avx512f", has!("avx512f")),
            ("avx512vl", has!("avx512vl")),
            ("avx512dq", has!("avx512dq")),
            ("avx512bf16", has!("avx512bf16")),
            ("avx512vnni", has!("avx512vnni")),
            ("amx", Products::detect() == Products::Tiles),
        ];
        sets.into_iter().filter(|(_, there)| *there).map(|(name, _)| name).collect()
    }
    #[cfg(not(target_arch = "x86_64"))]
    Vec::new()
}

const ROUNDS: usize = 1 << 12;

/// Chains of multiply-adds that hide each other's latency, `N` numbers in registers.
#[inline(always)]
fn chains<const N: usize>(factor: f32, sums: &mut [f32; N]) {
    let mut local = *sums;
    for _ in 0..ROUNDS {
        for i in 0..N {
            local[i] = local[i].mul_add(factor, factor);
        }
    }
    *sums = local;
}

/// Twelve of the 16 registers of AVX2.
const NARROW: usize = 96;
/// Eight of the 32 registers of AVX-512.
const WIDE: usize = 128;

dispatched! {
    fn narrow(factor: f32, sums: &mut [f32; NARROW]) {
        chains(factor, sums);
    }
}

dispatched! {
    fn wide(factor: f32, sums: &mut [f32; WIDE]) {
        chains(factor, sums);
    }
}

/// Repeats `work` on every thread for a while; calls a second, of all threads.
fn calls_per_second(cpu: &Cpu, work: impl Fn() + Sync) -> f64 {
    let start = Instant::now();
    let on_one_thread = |_: usize| {
        let mut calls = 0;
        while calls == 0 || start.elapsed() < TIME {
            work();
            calls += 1;
        }
        calls
    };
    let calls: usize = cpu.run(|| (0..cpu.threads()).into_par_iter().with_max_len(1).map(on_one_thread).sum());
    calls as f64 / start.elapsed().as_secs_f64()
}

/// Whichever width suits the machine's registers.
fn peak_flops(cpu: &Cpu) -> f64 {
    let (isa, factor) = (cpu.isa(), black_box(0.5));
    let in_narrow = calls_per_second(cpu, || narrow(isa, factor, black_box(&mut [1.0; NARROW]))) * NARROW as f64;
    let in_wide = calls_per_second(cpu, || wide(isa, factor, black_box(&mut [1.0; WIDE]))) * WIDE as f64;
    2.0 * ROUNDS as f64 * in_narrow.max(in_wide)
}

fn bandwidth(cpu: &Cpu, memory: Option<Memory>) -> f64 {
    let bytes = memory.map_or(COPIED, |memory| (memory.available / 8).min(COPIED)).max(1 << 16);
    // Not zeros: those would have no memory before the first copy.
    let (from, mut to) = (vec![1u8; bytes], vec![2u8; bytes]);
    let chunk = bytes.div_ceil(cpu.threads());
    let (start, mut copies) = (Instant::now(), 0);
    while copies == 0 || start.elapsed() < TIME {
        cpu.run(|| {
            to.par_chunks_mut(chunk).zip(from.par_chunks(chunk)).for_each(|(to, from)| to.copy_from_slice(from))
        });
        black_box(&mut to);
        copies += 1;
    }
    (2 * bytes * copies) as f64 / start.elapsed().as_secs_f64()
}

fn gpu() -> Gpu {
    let Ok(version) = fs::read_to_string("/proc/driver/nvidia/version") else { return Gpu::default() };
    let cards = fs::read_dir("/proc/driver/nvidia/gpus").into_iter().flatten().flatten();
    let model = |card: fs::DirEntry| {
        let text = fs::read_to_string(card.path().join("information")).ok()?;
        Some(text.lines().find_map(|line| line.strip_prefix("Model:"))?.trim().to_string())
    };
    // SAFETY: the name ends in 0; the library's initializers are the driver's own.
    let libcuda = unsafe { !libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_LAZY).is_null() };
    Gpu { driver: Some(driver_version(&version)), models: cards.filter_map(model).collect(), libcuda }
}

/// `NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.82.07  Wed ...` -> `580.82.07`
fn driver_version(text: &str) -> String {
    let is_version = |word: &&str| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.');
    text.split_whitespace().find(is_version).unwrap_or("of unknown version").to_string()
}

/// Tried where the folder is or would be made; nothing is left behind.
fn cache(dir: PathBuf) -> Cache {
    let there = machine::existing(&dir);
    let probe = there.join(format!(".cuvee-doctor.{}", std::process::id()));
    let problem = fs::write(&probe, b"x").err().map(|e| format!("cannot be written to: {e}"));
    // Where writing failed it is not there.
    let _ = fs::remove_file(&probe);
    Cache { bytes: size_of_folder(&dir), free: machine::disk_free(&dir), dir, problem }
}

fn size_of_folder(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let size = |entry: fs::DirEntry| match entry.metadata() {
        Ok(data) if data.is_dir() => size_of_folder(&entry.path()),
        Ok(data) => data.len(),
        Err(_) => 0,
    };
    entries.map(size).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings() -> Findings {
        Findings {
            processor: Processor { name: None, logical: 8, physical: 4, allowed: 8, quota: None },
            isa: Isa::detect(),
            products: Products::Chains,
            sets: vec!["avx2"],
            threads: 8,
            peak_flops: 1e11,
            bandwidth: 1e10,
            memory: Some(Memory { total: 8 << 30, available: 6 << 30, limit: None }),
            gpu: Gpu::default(),
            cache: Cache { dir: "cache".into(), bytes: 0, free: Some(9 << 30), problem: None },
        }
    }

    #[test]
    fn a_gpu_that_is_not_used_is_named() {
        assert!(findings().text().contains("no NVIDIA driver; this build computes on the CPU"));
        let text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.82.07  Wed Aug 27\nGCC version:  gcc 12.2.0";
        let gpu = Gpu { driver: Some(driver_version(text)), models: vec!["NVIDIA H100".into()], libcuda: false };
        let text = Findings { gpu, ..findings() }.text();
        assert!(text.contains("NVIDIA H100; driver 580.82.07, libcuda.so.1 cannot be opened; this build"), "{text}");
        assert_eq!(driver_version("odd"), "of unknown version");
    }

    #[test]
    fn advice_says_what_to_type() {
        let mut found = findings();
        assert!(found.isa == Isa::Portable || found.advice().is_empty(), "{:?}", found.advice());
        found.isa = Isa::Portable;
        found.processor.quota = Some(2.0);
        found.memory = Some(Memory { total: 8 << 30, available: 1 << 30, limit: None });
        found.cache.free = Some(5 << 20);
        let text = found.text();
        for part in ["portable code", "--threads 2", "--ram auto", "5.0 MiB left for the cache: --cache-dir"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert_eq!(found.json()["advice"].as_array().unwrap().len(), 4);
    }
}
