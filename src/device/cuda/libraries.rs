//! Finding CUDA's libraries before cudarc looks for them: it knows the loader's path alone, and panics. A library that we
//! opened by its full name, and never close, is the one that cudarc's later open of the same soname gets.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use super::probe::detail;

/// Colon-separated folders to look in first.
pub const VARIABLE: &str = "CUVEE_CUDA_LIBS";
/// What makes NVRTC work, in the order of their dependence: the wheel's NVRTC does not find its builtins by itself.
const NVRTC: [&str; 2] = ["libnvrtc-builtins.so.13.0", "libnvrtc.so.13"];
/// Products.
const CUBLASLT: [&str; 1] = ["libcublasLt.so.13"];

/// Opens the compiler for kernels, if there is one; where it lies, or why not.
pub fn nvrtc() -> Result<PathBuf, String> {
    open_all(&NVRTC)
}

/// Opens cuBLASLt, if there is one; where it lies, or why not.
pub fn cublaslt() -> Result<PathBuf, String> {
    open_all(&CUBLASLT)
}

fn open_all(names: &[&'static str]) -> Result<PathBuf, String> {
    let opened: Vec<PathBuf> = names.iter().map(|name| open(name)).collect::<Result<_, _>>()?;
    Ok(opened.into_iter().next_back().expect("a library has a name"))
}

/// Each library is looked for once.
fn open(name: &'static str) -> Result<PathBuf, String> {
    static OPENED: Mutex<BTreeMap<&str, Result<PathBuf, String>>> = Mutex::new(BTreeMap::new());
    let mut opened = OPENED.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    opened.entry(name).or_insert_with(|| search(name)).clone()
}

fn search(name: &str) -> Result<PathBuf, String> {
    let places = folders().into_iter().map(|folder| folder.join(name)).filter(|path| path.exists());
    let mut reasons = Vec::new();
    for path in places.chain([PathBuf::from(name)]) {
        // SAFETY: NVIDIA's libraries have no initializers that ask anything of the program.
        match unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) } {
            Ok(library) => {
                std::mem::forget(library);
                return Ok(path);
            }
            Err(e) => reasons.push(detail(&e)),
        }
    }
    Err(reasons.join("; "))
}

/// Where the libraries may lie, ours first, then toolkits, then the wheels of Python environments.
fn folders() -> Vec<PathBuf> {
    let paths = |variable: &str| env::var_os(variable).map(|v| env::split_paths(&v).collect()).unwrap_or(Vec::new());
    let mut found = paths(VARIABLE);
    let toolkits = ["CUDA_HOME", "CUDA_PATH", "CUDA_ROOT"].into_iter().flat_map(paths);
    let installed = ["/usr/local/cuda-13.0", "/usr/local/cuda", "/opt/cuda"].into_iter().map(PathBuf::from);
    for root in toolkits.chain(installed) {
        found.extend(["lib64", "lib", "targets/x86_64-linux/lib"].map(|lib| root.join(lib)));
    }
    let environments = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().flat_map(paths);
    let pythons = paths("PATH").into_iter().filter(|bin| bin.join("python3").exists());
    let roots = pythons.filter_map(|bin| bin.parent().map(Path::to_path_buf));
    environments.chain(roots).for_each(|root| wheels(&root, &mut found));
    let mut seen = Vec::new();
    found.retain(|folder| {
        folder.is_dir() && !seen.contains(folder) && {
            seen.push(folder.clone());
            true
        }
    });
    found
}

/// `lib/python3.*/site-packages/nvidia/cu13/lib`: all wheels of CUDA 13 unpack into one folder.
fn wheels(root: &Path, found: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(root.join("lib")) else { return };
    let pythons = entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with("python3"));
    for python in pythons {
        found.extend(["site-packages", "dist-packages"].map(|site| python.path().join(site).join("nvidia/cu13/lib")));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wheels_of_an_environment_are_found() {
        let root = tempfile::tempdir().unwrap();
        let lib = root.path().join("lib/python3.12/site-packages/nvidia/cu13/lib");
        fs::create_dir_all(&lib).unwrap();
        fs::create_dir_all(root.path().join("lib/other")).unwrap();
        let mut found = Vec::new();
        wheels(root.path(), &mut found);
        assert!(found.contains(&lib) && found.iter().all(|path| path.starts_with(root.path().join("lib/python3.12"))));
    }

    #[test]
    fn a_library_that_is_not_there_says_so() {
        let why = search("libcuvee-has-no-such.so.13").unwrap_err();
        assert!(why.contains("libcuvee-has-no-such.so.13"), "{why}");
    }
}
