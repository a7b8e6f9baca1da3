//! `cuvee doctor`: what this machine has, how fast it is, and what stands in the way.

use std::fmt;
use std::fs;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rayon::prelude::*;
use serde_json::{Value, json};

use super::args::{DoctorArgs, cache_dir};
use crate::device::cuda::kernels::{MODULES, NVCC};
use crate::device::cuda::{self, Found, Options, Unavailable, libraries, probe};
use crate::device::{Arena, Cpu, Cuda, DType, Device, Isa, Kind, Products, ViewMut};
use crate::error::{Error, Result};
use crate::machine::{self, Memory, Processor, human};
use crate::ops::linear::{self, Linear};
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
    gpus: Gpus,
    cache: Cache,
}

struct Gpus {
    /// What the kernel's driver says of itself.
    driver: Option<String>,
    /// As the driver describes them, or why they cannot be used.
    found: Result<Vec<Gpu>, Unavailable>,
    /// Where CUDA's libraries lie, or why they cannot be opened.
    nvrtc: Result<PathBuf, String>,
    cublaslt: Result<PathBuf, String>,
}

struct Gpu {
    found: Found,
    /// Its kernels are in this program.
    embedded: bool,
    /// Or why nothing could be measured.
    speed: Result<Speed, String>,
}

#[derive(Clone, Copy)]
struct Speed {
    /// Bytes read and written a second by a copy.
    bandwidth: f64,
    /// FLOPs a second of a large product, in f32 and in bf16.
    products: [f64; 2],
}

struct Cache {
    dir: PathBuf,
    bytes: u64,
    free: Option<u64>,
    /// Why it cannot be used.
    problem: Option<String>,
}

pub fn run(args: &DoctorArgs) -> Result<()> {
    let (cpu, cache_dir) = (Cpu::new(0)?, cache_dir(args.cache_dir.as_deref())?);
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
        gpus: gpus(&cache_dir.join("kernels")),
        cache: cache(cache_dir),
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
        advice.extend(self.gpus.advice());
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
        self.gpus.text().into_iter().for_each(|(name, text)| line(name, text));
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
            "gpu": self.gpus.json(),
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

/// Of the processor, multiply-adds counted as two, measured in an instant.
pub fn processor_speed() -> f64 {
    Cpu::new(0).map_or(f64::NAN, |cpu| peak_flops(&cpu))
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

/// What the build embedded, as its `nvcc` names it.
fn embedded() -> String {
    let Some(nvcc) = NVCC else { return "compiled when they are first used: this build had no nvcc".to_string() };
    let images = MODULES.first().map_or(&[][..], |module| module.images).iter().map(|(name, _)| *name);
    format!("built in for {} by nvcc {nvcc}", images.collect::<Vec<_>>().join(", "))
}

impl Gpus {
    /// Notes of the report: a label and what to say.
    fn text(&self) -> Vec<(&'static str, String)> {
        let driver = self.driver.as_ref().map_or(String::new(), |version| format!(", driver {version}"));
        let mut lines = match &self.found {
            Err(why) => return vec![("GPU", format!("none to use: {why}{driver}"))],
            Ok(gpus) => gpus.iter().map(|gpu| ("GPU", format!("{gpu}{driver}"))).collect::<Vec<_>>(),
        };
        let library = |found: &Result<PathBuf, String>| match found {
            Ok(path) => path.display().to_string(),
            Err(_) => "not found".to_string(),
        };
        lines.push(("kernels", embedded()));
        lines.push(("CUDA", format!("NVRTC {}; cuBLASLt {}", library(&self.nvrtc), library(&self.cublaslt))));
        lines
    }

    /// What is missing, and how to get it.
    fn advice(&self) -> Vec<String> {
        let Ok(gpus) = &self.found else { return Vec::new() };
        let mut advice = Vec::new();
        if let (Err(why), true) = (&self.nvrtc, gpus.iter().any(|gpu| gpu.found.fits() && !gpu.embedded)) {
            let advice_for = "pip install nvidia-cuda-nvrtc==13.0.*";
            advice.push(format!("a GPU's kernels are not in this build, and NVRTC is missing ({why}): {advice_for}"));
        }
        if let Err(why) = &self.cublaslt {
            advice.push(format!(
                "cuBLASLt is missing, so that products are slower ({why}): pip install nvidia-cublas==13.0.*"
            ));
        }
        advice
    }

    fn json(&self) -> Value {
        let library = |found: &Result<PathBuf, String>| match found {
            Ok(path) => json!({"path": path}),
            Err(why) => json!({"missing": why}),
        };
        let gpu = |gpu: &Gpu| {
            let (found, (major, minor)) = (&gpu.found, gpu.found.capability);
            json!({
                "ordinal": found.ordinal,
                "name": found.name,
                "capability": format!("{major}.{minor}"),
                "memory_bytes": found.memory_bytes,
                "multiprocessors": found.multiprocessors,
                "usable": found.fits(),
                "kernels_embedded": gpu.embedded,
                "memory_bytes_per_second": gpu.speed.as_ref().ok().map(|speed| speed.bandwidth),
                "f32_flops_per_second": gpu.speed.as_ref().ok().map(|speed| speed.products[0]),
                "bf16_flops_per_second": gpu.speed.as_ref().ok().map(|speed| speed.products[1]),
                "problem": gpu.speed.as_ref().err(),
            })
        };
        json!({
            "driver": self.driver,
            "gpus": self.found.iter().flatten().map(gpu).collect::<Vec<_>>(),
            "problem": self.found.as_ref().err().map(ToString::to_string),
            "nvcc": NVCC,
            "nvrtc": library(&self.nvrtc),
            "cublaslt": library(&self.cublaslt),
        })
    }
}

impl fmt::Display for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let (found, (major, minor)) = (&self.found, self.found.capability);
        let memory = human(found.memory_bytes);
        write!(f, "cuda:{} {}, {memory}, compute capability {major}.{minor}", found.ordinal, found.name)?;
        match &self.speed {
            Ok(Speed { bandwidth, products: [f32, bf16] }) => {
                let (bandwidth, f32, bf16) = (bandwidth / 1e9, f32 / 1e12, bf16 / 1e12);
                write!(f, ", {bandwidth:.0} GB/s, {f32:.1} TFLOP/s in f32, {bf16:.1} in bf16 (measured)")
            }
            Err(why) => write!(f, ", not measured: {why}"),
        }
    }
}

fn gpus(kernels: &Path) -> Gpus {
    let version = fs::read_to_string("/proc/driver/nvidia/version").ok();
    let describe = |found: &Found| Gpu {
        found: found.clone(),
        embedded: cuda::embedded(found.capability),
        speed: speed(found.ordinal, kernels).map_err(|e| e.to_string()),
    };
    Gpus {
        driver: version.map(|text| driver_version(&text)),
        found: probe().map(|all| all.iter().map(describe).collect()),
        nvrtc: libraries::nvrtc(),
        cublaslt: libraries::cublaslt(),
    }
}

/// Copied in one go: more than any second-level cache holds.
const COPIED_ON_GPU: usize = 256 << 20;

/// Bytes read and written a second by a copy.
fn bandwidth_of(ordinal: usize) -> Result<f64> {
    let cuda = Cuda::open(&Options::new(ordinal, DType::F32))?;
    let mut arena = Arena::with_bytes(&cuda, 2 * COPIED_ON_GPU)?;
    let [x, mut y] = [(); 2].map(|()| arena.floats(Kind::Activations, 1, COPIED_ON_GPU / size_of::<f32>()));
    Ok(2.0 * COPIED_ON_GPU as f64 * rate(&cuda, || cuda.copy(x.view(), y.view_mut()))?)
}

/// Like a network's: zeros spare power, and a GPU is then faster than it is.
fn numbers(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i % 251) as f32 / 251.0 - 0.5).collect()
}

/// Sides of the matrices that are multiplied: the last fill any GPU.
const SIDES: [usize; 3] = [256, 1024, 4096];
/// A call that takes longer has shown what the GPU can do.
const LONG: Duration = Duration::from_millis(20);

fn speed(ordinal: usize, kernels: &Path) -> Result<Speed> {
    let mut speed = Speed { bandwidth: bandwidth_of(ordinal)?, products: [0.0; 2] };
    for (storage, product) in [DType::F32, DType::Bf16].into_iter().zip(&mut speed.products) {
        let cuda = Cuda::open(&Options { cache_dir: Some(kernels.into()), ..Options::new(ordinal, storage) })?;
        for side in SIDES {
            let bytes = Arena::<Cuda>::bytes_of(storage, side, side);
            let mut arena = Arena::with_bytes(&cuda, 3 * bytes)?;
            let [mut x, mut weight, mut y] = [(); 3].map(|()| arena.stored(Kind::Activations, side, side));
            for tensor in [&mut x, &mut weight] {
                cuda.write_f32(&numbers(side * side), tensor.view_mut())?;
            }
            let multiply = |y: ViewMut<Cuda>| {
                cuda.linear(linear::Forward { x: x.view(), weight: weight.view(), bias: None, residual: None, y })
            };
            let products = rate(&cuda, || multiply(y.view_mut()))?;
            *product = product.max(2.0 * (side as f64).powi(3) * products);
            if products < 1.0 / LONG.as_secs_f64() {
                break;
            }
        }
    }
    Ok(speed)
}

/// Calls a second of what puts work into the stream, after one that loads what it needs.
fn rate(cuda: &Cuda, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut seconds = |calls: usize| -> Result<f64> {
        let start = Instant::now();
        (0..calls).try_for_each(|_| work())?;
        cuda.synchronize()?;
        Ok(start.elapsed().as_secs_f64())
    };
    seconds(1)?;
    let calls = (TIME.as_secs_f64() / seconds(1)?).clamp(1.0, 1000.0) as usize;
    Ok(calls as f64 / seconds(calls)?)
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
            gpus: none(),
            cache: Cache { dir: "cache".into(), bytes: 0, free: Some(9 << 30), problem: None },
        }
    }

    fn none() -> Gpus {
        let missing = || Err("libx.so: not there".to_string());
        let why = Unavailable::NoDriver("libcuda.so.1: not there".into());
        Gpus { driver: None, found: Err(why), nvrtc: missing(), cublaslt: missing() }
    }

    #[test]
    fn what_a_gpu_lacks_is_named_with_how_to_get_it() {
        let text = findings().text();
        assert!(
            text.contains("GPU           none to use: there is no NVIDIA driver") && !text.contains("note"),
            "{text}"
        );

        let version = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.82.07  Wed Aug 27\nGCC version:  gcc 12.2.0";
        let found = Found {
            ordinal: 0,
            name: "NVIDIA H100".into(),
            capability: (9, 0),
            memory_bytes: 80 << 30,
            multiprocessors: 132,
            shared_bytes: 227 << 10,
        };
        let speed = Ok(Speed { bandwidth: 3e12, products: [5e13, 7e14] });
        let gpu = Gpu { found, embedded: false, speed };
        let gpus = Gpus { driver: Some(driver_version(version)), found: Ok(vec![gpu]), ..none() };
        let found = Findings { gpus, ..findings() };
        let text = found.text();
        for part in [
            "cuda:0 NVIDIA H100, 80.0 GiB, compute capability 9.0, 3000 GB/s, 50.0 TFLOP/s in f32, 700.0 in bf16",
            "(measured), driver 580.82.07",
            "NVRTC not found; cuBLASLt not found",
            "pip install nvidia-cuda-nvrtc==13.0.*",
            "pip install nvidia-cublas==13.0.*",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let json = found.json();
        assert_eq!(json["gpu"]["gpus"][0]["capability"], "9.0");
        assert_eq!(json["gpu"]["gpus"][0]["bf16_flops_per_second"], 7e14);
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
