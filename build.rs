//! Kernels into the program: for each `kernels/*.cu` its source (always, for NVRTC), and, where there is an nvcc, a cubin
//! for each architecture and PTX. And the Rust side of each kernel, `kernels.rs`, from its signature.
//!
//! | variable | meaning |
//! |---|---|
//! | `CUVEE_CUDA` | `auto` (default): with nvcc if one is found; `require`: fail without; `off`: sources only |
//! | `CUVEE_NVCC` | the compiler; else `$CUDA_HOME/bin`, `$CUDA_PATH/bin`, `PATH`, `/usr/local/cuda/bin`, `.cuda/` |
//! | `CUVEE_CUDA_ARCHS` | architectures to compile for, `80 90a` |

use std::collections::BTreeSet;
use std::fmt::Write;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{env, fs, thread};

#[path = "src/device/cuda/signature.rs"]
mod signature;

use signature::{Signature, signatures};

/// Architectures of the embedded cubins: one that all of the 8.x run, and Hopper.
const ARCHS: &str = "80 90a";
/// Architecture of the PTX that a driver compiles where no cubin fits and NVRTC is missing.
const PTX_ARCH: &str = "80";
const FLAGS: &[&str] = &["-std=c++17", "-O3", "-lineinfo", "-Xptxas", "-v"];

/// One `.cu` file.
struct Module {
    name: String,
    /// Complete: our own includes are in it, and the entry points at its end.
    source: PathBuf,
    kernels: Vec<Signature>,
}

/// One run of the compiler.
struct Job {
    module: usize,
    /// As `Image` in `kernels.rs` names it: `sm_80`, or `ptx`.
    image: String,
    arguments: Vec<String>,
    output: PathBuf,
}

fn main() {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR").unwrap());
    let out = PathBuf::from(env::var("OUT_DIR").unwrap());
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=kernels");
    println!("cargo::rerun-if-changed=src/device/cuda/signature.rs");
    for variable in ["CUVEE_CUDA", "CUVEE_NVCC", "CUVEE_CUDA_ARCHS", "CUDA_HOME", "CUDA_PATH", "NVCC_CCBIN"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let modules = modules(&root.join("kernels"), &out);
    let jobs = jobs(&modules, &out);
    let nvcc = find_nvcc(&root);
    let compiled = nvcc.as_deref().and_then(|nvcc| compile(nvcc, &modules, &jobs));
    let version = nvcc.filter(|_| compiled.is_some()).map(|nvcc| version(&nvcc));
    fs::write(out.join("ptxas.txt"), compiled.as_deref().map(resources).unwrap_or_default()).unwrap();
    let compiled = if version.is_some() { &jobs[..] } else { &[] };
    fs::write(out.join("kernels.rs"), rust(&modules, compiled, version.as_deref())).unwrap();
}

fn modules(folder: &Path, out: &Path) -> Vec<Module> {
    let mut files: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "cu"));
    files.sort();
    let module = |file: &PathBuf| {
        let name = file.file_stem().unwrap().to_str().unwrap().to_string();
        let text = fs::read_to_string(file).unwrap();
        let kernels = signatures(&text).unwrap_or_else(|what| panic!("{}: {what}", file.display()));
        let mut source = String::new();
        flatten(file, &mut BTreeSet::new(), &mut source);
        kernels.iter().for_each(|kernel| source += &kernel.wrappers());
        let path = out.join(format!("{name}.cu"));
        fs::write(&path, source).unwrap();
        Module { name, source: path, kernels }
    };
    files.iter().map(module).collect()
}

/// The file with our own includes in their places, each once; `#line` keeps the names that messages give.
fn flatten(file: &Path, seen: &mut BTreeSet<PathBuf>, out: &mut String) {
    let name = format!("kernels/{}", file.file_name().unwrap().to_str().unwrap());
    let text = fs::read_to_string(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    let _ = writeln!(out, "#line 1 \"{name}\"");
    for (i, line) in text.lines().enumerate() {
        let own = line.strip_prefix("#include \"").and_then(|rest| rest.strip_suffix('"'));
        match own.map(|own| file.with_file_name(own)).filter(|own| own.exists()) {
            Some(own) if seen.insert(own.clone()) => {
                flatten(&own, seen, out);
                let _ = writeln!(out, "#line {} \"{name}\"", i + 2);
            }
            Some(_) => out.push('\n'),
            None if line == "#pragma once" => out.push('\n'),
            None => {
                let _ = writeln!(out, "{line}");
            }
        }
    }
}

fn jobs(modules: &[Module], out: &Path) -> Vec<Job> {
    let archs = env::var("CUVEE_CUDA_ARCHS").unwrap_or(ARCHS.into());
    let mut jobs = Vec::new();
    for (module, Module { name, .. }) in modules.iter().enumerate() {
        for arch in archs.split_whitespace() {
            let arguments = vec!["-cubin".into(), format!("-gencode=arch=compute_{arch},code=sm_{arch}")];
            jobs.push(Job {
                module,
                image: format!("sm_{arch}"),
                arguments,
                output: out.join(format!("{name}.sm_{arch}.cubin")),
            });
        }
        let arguments = vec!["-ptx".into(), format!("-arch=compute_{PTX_ARCH}")];
        jobs.push(Job { module, image: "ptx".into(), arguments, output: out.join(format!("{name}.ptx")) });
    }
    jobs
}

fn find_nvcc(root: &Path) -> Option<PathBuf> {
    let mode = env::var("CUVEE_CUDA").unwrap_or("auto".into());
    if mode == "off" {
        return None;
    }
    assert!(["auto", "require"].contains(&mode.as_str()), "CUVEE_CUDA is \"{mode}\"; auto, require or off");
    let in_bin = |variable| env::var_os(variable).map(|dir| PathBuf::from(dir).join("bin/nvcc"));
    let mut places: Vec<PathBuf> = env::var_os("CUVEE_NVCC").map(PathBuf::from).into_iter().collect();
    places.extend(["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(in_bin));
    places.extend(env::var_os("PATH").iter().flat_map(env::split_paths).map(|dir| dir.join("nvcc")));
    places.extend(["/usr/local/cuda/bin/nvcc".into(), root.join(".cuda/nvidia/cu13/bin/nvcc")]);
    let found = places.iter().find(|place| place.is_file()).cloned();
    if let Some(nvcc) = &found {
        println!("cargo::rerun-if-changed={}", nvcc.display());
    }
    assert!(found.is_some() || mode == "auto", "CUVEE_CUDA=require, and no nvcc: .ci/get-nvcc fetches one into .cuda/");
    found
}

fn version(nvcc: &Path) -> String {
    let output = Command::new(nvcc).arg("--version").output().map(|output| output.stdout).unwrap_or_default();
    let text = String::from_utf8_lossy(&output).into_owned();
    text.split("release")
        .nth(1)
        .and_then(|rest| rest.split(", V").nth(1))
        .map_or("unknown", |v| v.trim().lines().next().unwrap())
        .to_string()
}

/// Runs all jobs; what ptxas said, job by job. A compiler that fails leaves the program with its sources, unless one is
/// required.
fn compile(nvcc: &Path, modules: &[Module], jobs: &[Job]) -> Option<Vec<(String, String)>> {
    let workers: usize = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    let (next, said) = (AtomicUsize::new(0), Mutex::new(vec![None; jobs.len()]));
    thread::scope(|scope| {
        for _ in 0..workers.min(jobs.len()) {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    let Some(job) = jobs.get(i) else { return };
                    let result = run(nvcc, &modules[job.module].source, job);
                    said.lock().unwrap()[i] = Some(result);
                }
            });
        }
    });
    let said = said.into_inner().unwrap().into_iter().map(|result| result.expect("every job ran"));
    match said.collect::<Result<Vec<String>, String>>() {
        Ok(texts) => {
            let named =
                jobs.iter().zip(texts).map(|(job, text)| (format!("{} {}", modules[job.module].name, job.image), text));
            Some(named.collect())
        }
        Err(error) if env::var("CUVEE_CUDA").is_ok_and(|mode| mode == "require") => panic!("{error}"),
        Err(error) => {
            let lines = error.lines().take(8).collect::<Vec<_>>().join(" | ");
            println!("cargo::warning=nvcc failed, kernels will be compiled by NVRTC when they are first used: {lines}");
            None
        }
    }
}

/// What ptxas said, from the last build where nothing changed since: a kernel takes seconds.
fn run(nvcc: &Path, source: &Path, job: &Job) -> Result<String, String> {
    let beside = |what| job.output.with_extension(format!("{}.{what}", job.image));
    let key = format!("{} {FLAGS:?} {:?}\n{}", nvcc.display(), job.arguments, fs::read_to_string(source).unwrap());
    if job.output.exists() && fs::read_to_string(beside("key")).is_ok_and(|old| old == key) {
        return Ok(fs::read_to_string(beside("log")).unwrap_or_default());
    }
    let mut command = Command::new(nvcc);
    command.args(FLAGS).args(&job.arguments);
    if let Some(host) = env::var_os("NVCC_CCBIN") {
        command.arg("-allow-unsupported-compiler").arg("-ccbin").arg(host);
    }
    let output =
        command.arg("-o").arg(&job.output).arg(source).output().map_err(|e| format!("{}: {e}", nvcc.display()))?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    if !output.status.success() {
        return Err(format!("{command:?}: {text}"));
    }
    fs::write(beside("log"), &text).unwrap();
    fs::write(beside("key"), key).unwrap();
    Ok(text)
}

/// What ptxas says each kernel takes, one line each, sorted.
fn resources(said: &[(String, String)]) -> String {
    let mut lines = BTreeSet::new();
    for (job, text) in said {
        let (mut kernel, mut spills) = ("", "");
        for line in text.lines() {
            if let Some(entry) = line.split("Compiling entry function '").nth(1) {
                kernel = entry.split('\'').next().unwrap_or_default();
            } else if line.contains("spill stores") {
                spills = line.split(", ").nth(1).unwrap_or_default();
            } else if let Some(used) = line.split("Used ").nth(1) {
                let arch = job.split(' ').nth(1).unwrap_or_default();
                let word =
                    |name: &str| used.split(", ").find(|part| part.ends_with(name)).unwrap_or("0 bytes smem").trim();
                let registers = used.split(", ").next().unwrap_or_default();
                lines.insert(format!("{kernel:<44} {arch:<7} {registers:<14} {:<18} {spills}\n", word("bytes smem")));
            }
        }
    }
    lines.into_iter().collect()
}

/// Where the image lies compressed: a third of its size.
fn compressed(image: &Path) -> PathBuf {
    let path = image.with_extension(format!("{}.gz", image.extension().unwrap().to_str().unwrap()));
    let mut out = flate2::write::GzEncoder::new(fs::File::create(&path).unwrap(), flate2::Compression::best());
    out.write_all(&fs::read(image).unwrap()).and_then(|()| out.finish().map(drop)).unwrap();
    path
}

/// `kernels.rs`: the structs, the entry points and the images.
fn rust(modules: &[Module], compiled: &[Job], version: Option<&str>) -> String {
    let mut out = format!("/// Of the nvcc that compiled the images.\npub const NVCC: Option<&str> = {version:?};\n");
    let (mut entries, mut images, mut count) = (String::new(), String::new(), 0);
    for (i, module) in modules.iter().enumerate() {
        for kernel in &module.kernels {
            out += &kernel.launcher(count).unwrap_or_else(|what| panic!("{}.cu: {what}", module.name));
            for instance in &kernel.instances {
                let _ = writeln!(entries, "    Entry {{ name: {:?}, module: {i} }},", kernel.entry(instance));
                count += 1;
            }
        }
        let of_module = compiled.iter().filter(|job| job.module == i);
        let image =
            |job: &Job| format!("(\"{}\", include_bytes!({:?}) as &[u8]), ", job.image, compressed(&job.output));
        let list: String = of_module.map(image).collect();
        let _ = writeln!(
            images,
            "    Module {{ name: {:?}, source: include_str!({:?}), images: &[{list}] }},",
            module.name, module.source
        );
    }
    out + &format!("pub static ENTRIES: &[Entry] = &[\n{entries}];\npub static MODULES: &[Module] = &[\n{images}];\n")
}
