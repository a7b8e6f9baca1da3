//! The emulated GPU: a `libcuda` made of the kernels' sources and `emulator/`, by the machine's C++ compiler. Objects and
//! libraries are kept by the hash of all that they are made of.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};
use std::{env, process, thread};

use cuvee::device::cuda::kernels;

use crate::Mode;

const HEADERS: &[(&str, &str)] =
    &[("emulator.h", include_str!("emulator/emulator.h")), ("runtime.h", include_str!("emulator/runtime.h"))];
const RUNTIME: &str = include_str!("emulator/runtime.cpp");
const RACE: &str = include_str!("emulator/race.cpp");
const MOCK: &str = include_str!("emulator/mock.cpp");
const MOCK_CUBLASLT: &str = include_str!("emulator/mock_cublaslt.cpp");
const MOCK_NVRTC: &str = include_str!("emulator/mock_nvrtc.cpp");
/// Of the folder of the emulated driver: where its cuBLASLt and NVRTC lie.
pub const LIBRARIES: &str = "libraries";
const BUGS: &str = include_str!("emulator/bugs.cu");
const FLAGS: &[&str] =
    &["-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-ffp-contract=off"];
const KERNEL_FLAGS: &[&str] = &["-DCUVEE_EMULATOR", "-w", "-fno-exceptions", "-fno-optimize-sibling-calls"];
/// Lines of a compiler's message that are shown.
const SHOWN: usize = 30;

/// A file of the library.
#[derive(Clone)]
pub struct Source {
    pub name: String,
    pub text: String,
    pub is_kernel: bool,
}

impl Source {
    fn host(name: &str, text: &str) -> Self {
        Self { name: name.into(), text: format!("#line 1 \"{name}\"\n{text}"), is_kernel: false }
    }
}

/// All kernels as build.rs flattened them, in the order of [`kernels::MODULES`], and the planted bugs behind them.
pub fn kernel_sources() -> Vec<Source> {
    let module = |(i, module): (usize, &cuvee::device::cuda::Module)| {
        let entries = kernels::ENTRIES.iter().filter(|entry| entry.module == i);
        let entries: String = entries.map(|entry| format!("CUVEE_ENTRY({});\n", entry.name)).collect();
        Source { name: format!("{}.cu", module.name), text: format!("{}{entries}", module.source), is_kernel: true }
    };
    let mut all: Vec<Source> = kernels::MODULES.iter().enumerate().map(module).collect();
    let bugs = format!("#line 1 \"tests/cuda/emulator/bugs.cu\"\n{BUGS}");
    all.push(Source { name: "bugs.cu".into(), text: bugs, is_kernel: true });
    all
}

/// The first of `$CXX`, `c++`, `g++`, `clang++` that compiles C++17.
pub struct Compiler {
    path: String,
    version: String,
    /// AddressSanitizer's library, which must be there before the program's own.
    pub asan: Option<PathBuf>,
}

/// Or why there is none.
pub fn compiler() -> Result<&'static Compiler, String> {
    static FOUND: OnceLock<Result<Compiler, String>> = OnceLock::new();
    FOUND.get_or_init(find_compiler).as_ref().map_err(Clone::clone)
}

fn find_compiler() -> Result<Compiler, String> {
    if !cfg!(all(target_arch = "x86_64", target_os = "linux")) {
        return Err("the emulator runs on x86-64 Linux".into());
    }
    let given = env::var("CXX").ok();
    for path in given.into_iter().chain(["c++", "g++", "clang++"].map(String::from)) {
        let output = |arguments: &[&str]| {
            let output = Command::new(&path).args(arguments).stdin(Stdio::null()).output().ok()?;
            output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_string())
        };
        if output(&["-std=c++17", "-x", "c++", "-fsyntax-only", "-"]).is_none() {
            continue;
        }
        let version = output(&["--version"]).unwrap_or_default();
        // The name itself comes back where the file is not there.
        let asan = output(&["-print-file-name=libasan.so"]).map(PathBuf::from).filter(|file| file.is_absolute());
        return Ok(Compiler { path, version, asan });
    }
    Err("there is no C++17 compiler to emulate a GPU with; on Debian or Ubuntu: apt-get install g++".into())
}

fn cache() -> PathBuf {
    let target = option_env!("CARGO_TARGET_TMPDIR").map(PathBuf::from).filter(|dir| dir.is_dir());
    let beside = || env::current_exe().unwrap().parent().unwrap().to_path_buf();
    target.unwrap_or_else(beside).join("emulator")
}

fn kernel_mode_flags(mode: Mode) -> &'static [&'static str] {
    match mode {
        Mode::Plain | Mode::Real => &[],
        Mode::Race => &["-fsanitize=thread"],
        Mode::Asan => &["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined"],
    }
}

fn host_mode_flags(mode: Mode) -> &'static [&'static str] {
    match mode {
        Mode::Plain | Mode::Real => &[],
        Mode::Race => &["-DCUVEE_RACE"],
        Mode::Asan => &["-fsanitize=address"],
    }
}

fn link_flags(mode: Mode) -> &'static [&'static str] {
    match mode {
        Mode::Asan => &["-fsanitize=address,undefined"],
        _ => &[],
    }
}

fn hash(parts: &[&str]) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(&part.len().to_le_bytes()).update(part.as_bytes());
    }
    hasher.finalize().to_hex()[..20].to_string()
}

/// For fused multiply-adds, which are a function call without: the same numbers in two thirds of the time.
fn machine_flags() -> &'static [&'static str] {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("fma") && is_x86_feature_detected!("avx2") {
        return &["-mavx2", "-mfma"];
    }
    &[]
}

/// One run of the compiler.
struct Job {
    name: String,
    text: String,
    arguments: Vec<String>,
    object: PathBuf,
}

/// Under a name of its own, then renamed: nobody sees half a file.
fn appear(path: &Path, make: impl FnOnce(&Path) -> Result<(), String>) -> Result<(), String> {
    let temporary = path.with_extension(format!("{}.tmp", process::id()));
    make(&temporary)?;
    fs::rename(&temporary, path).map_err(|e| format!("{}: {e}", path.display()))
}

fn run_compiler(compiler: &Compiler, what: &str, arguments: &[&OsStr], input: &str) -> Result<(), String> {
    let mut command = Command::new(&compiler.path);
    command.args(arguments).current_dir(cache()).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|e| format!("{}: {e}", compiler.path))?;
    // A compiler that stops reading says why.
    let _ = child.stdin.take().expect("piped").write_all(input.as_bytes());
    let output = child.wait_with_output().map_err(|e| format!("{}: {e}", compiler.path))?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let lines: Vec<&str> = text.lines().take(SHOWN).collect();
    if output.status.success() { Ok(()) } else { Err(format!("{} does not compile:\n{}", what, lines.join("\n"))) }
}

fn compile(compiler: &Compiler, job: &Job) -> Result<(), String> {
    appear(&job.object, |temporary| {
        let mut arguments: Vec<&OsStr> = job.arguments.iter().map(OsStr::new).collect();
        arguments.extend(["-x", "c++", "-c", "-", "-o"].map(OsStr::new));
        arguments.push(temporary.as_os_str());
        run_compiler(compiler, &job.name, &arguments, &job.text)
    })
}

/// On all cores; the first error.
fn compile_all(compiler: &Compiler, jobs: &[&Job]) -> Result<(), String> {
    let (next, failed) = (AtomicUsize::new(0), Mutex::new(None));
    let workers = thread::available_parallelism().map_or(1, |n| n.get());
    thread::scope(|scope| {
        for _ in 0..workers.min(jobs.len()) {
            scope.spawn(|| {
                while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(e) = compile(compiler, job) {
                        failed.lock().unwrap().get_or_insert(e);
                    }
                }
            });
        }
    });
    failed.into_inner().unwrap().map_or(Ok(()), Err)
}

fn jobs(compiler: &Compiler, mode: Mode, kernels: &[Source], headers: &str, objects: &Path) -> Vec<Job> {
    let mut sources = vec![Source::host("runtime.cpp", RUNTIME), Source::host("mock.cpp", MOCK)];
    sources.extend((mode == Mode::Race).then(|| Source::host("race.cpp", RACE)));
    sources.extend_from_slice(kernels);
    let include = format!("-I{headers}");
    let job = |Source { name, text, is_kernel }: Source| {
        let flags = if is_kernel { [KERNEL_FLAGS, kernel_mode_flags(mode)] } else { [&[], host_mode_flags(mode)] };
        let flags = FLAGS.iter().chain(machine_flags()).chain(flags.into_iter().flatten());
        let arguments: Vec<String> = flags.map(|flag| flag.to_string()).chain([include.clone()]).collect();
        let key = hash(&[&compiler.path, &compiler.version, &arguments.join(" "), &text]);
        Job { name, text, arguments, object: objects.join(format!("{key}.o")) }
    };
    sources.into_iter().map(job).collect()
}

/// The folder that holds the emulated driver with these kernels.
pub fn build(mode: Mode, kernels: &[Source]) -> Result<PathBuf, String> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let compiler = compiler()?;
    let io = |e: std::io::Error| format!("{}: {e}", cache().display());
    let objects = cache().join("objects");
    fs::create_dir_all(&objects).map_err(io)?;
    let lock = File::create(cache().join("lock")).map_err(io)?;
    lock.lock().map_err(io)?;
    // By their contents, so that a changed header is another flag.
    let texts: Vec<&str> = HEADERS.iter().map(|(_, text)| *text).collect();
    let headers = format!("include-{}", hash(&texts));
    fs::create_dir_all(cache().join(&headers)).map_err(io)?;
    for (name, text) in HEADERS {
        fs::write(cache().join(&headers).join(name), text).map_err(io)?;
    }
    let jobs = jobs(compiler, mode, kernels, &headers, &objects);
    let missing: Vec<&Job> = jobs.iter().filter(|job| !job.object.exists()).collect();
    if !missing.is_empty() {
        eprintln!("emulated GPU, {mode}: {} of {} files to compile", missing.len(), jobs.len());
    }
    compile_all(compiler, &missing)?;
    let mut names: Vec<&str> = jobs.iter().map(|job| job.object.to_str().unwrap()).collect();
    let folder = cache().join(format!("{mode}-{}", hash(&[&names[..], &[MOCK_CUBLASLT, MOCK_NVRTC]].concat())));
    let driver = folder.join("libcuda.so.1");
    if driver.exists() {
        return Ok(folder);
    }
    let libraries = folder.join(LIBRARIES);
    fs::create_dir_all(&libraries).map_err(io)?;
    let input = ["-xc++", "-", "-xnone", "-fvisibility=hidden"];
    link(compiler, mode, &libraries.join("libcublasLt.so.13"), &input, MOCK_CUBLASLT)?;
    link(compiler, mode, &libraries.join("libnvrtc.so.13"), &input, MOCK_NVRTC)?;
    // The same file, or it would be loaded twice: probe opens the first name, cudarc the second.
    let link_name = folder.join("libcuda.so");
    let _ = fs::remove_file(&link_name);
    std::os::unix::fs::symlink("libcuda.so.1", &link_name).map_err(io)?;
    names.push("-pthread");
    link(compiler, mode, &driver, &names, "")?;
    Ok(folder)
}

/// A shared library under its own name.
fn link(compiler: &Compiler, mode: Mode, path: &Path, inputs: &[&str], text: &str) -> Result<(), String> {
    let name = path.file_name().and_then(OsStr::to_str).expect("ours");
    let soname = format!("-Wl,-soname,{name}");
    appear(path, |temporary| {
        let mut arguments: Vec<&OsStr> =
            ["-std=c++17", "-O2", "-fPIC", "-shared", &soname, "-o"].map(OsStr::new).to_vec();
        arguments.push(temporary.as_os_str());
        arguments.extend(link_flags(mode).iter().map(OsStr::new));
        arguments.extend(inputs.iter().map(OsStr::new));
        arguments.push(OsStr::new("-ldl"));
        run_compiler(compiler, name, &arguments, text)
    })
}

/// With the kernels of this program, built by whoever asks first.
pub fn library(mode: Mode) -> Result<PathBuf, String> {
    static BUILT: [OnceLock<Result<PathBuf, String>>; 3] = [const { OnceLock::new() }; 3];
    BUILT[mode as usize].get_or_init(|| build(mode, &kernel_sources())).clone()
}
