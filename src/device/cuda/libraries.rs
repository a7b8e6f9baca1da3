//! Finding CUDA's libraries before cudarc looks for them: it knows the loader's path alone, and panics. A library that we
//! opened by its full name, and never close, is the one that cudarc gets when it asks for the same soname. It asks for
//! `libX.so` first, though, which may be another toolkit's: so the version of what it got is checked.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use super::probe::detail;

/// Colon-separated folders to look in first.
pub const VARIABLE: &str = "CUVEE_CUDA_LIBS";
/// Of the libraries' names, and of the bindings.
const MAJOR: usize = 13;
/// NVRTC's other half, with a minor version behind the name; the wheel's NVRTC does not find it by itself.
const BUILTINS: &str = "libnvrtc-builtins.so.13.";

/// Opens the compiler for kernels, if there is one; where it lies, or why not.
pub fn nvrtc() -> Result<PathBuf, String> {
    let path = open("libnvrtc.so.13")?;
    open_beside(&path, BUILTINS);
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the library is open, and writes two integers.
    unsafe { cudarc::nvrtc::sys::nvrtcVersion(&mut major, &mut minor) }.result().map_err(|e| e.to_string())?;
    of_our_version(path, major as usize)
}

/// Opens cuBLASLt, if there is one; where it lies, or why not.
pub fn cublaslt() -> Result<PathBuf, String> {
    let path = open("libcublasLt.so.13")?;
    // SAFETY: the library is open; it tells major * 10000 + minor * 100 + patch.
    of_our_version(path, unsafe { cudarc::cublaslt::sys::cublasLtGetVersion() } / 10_000)
}

fn of_our_version(path: PathBuf, major: usize) -> Result<PathBuf, String> {
    match major == MAJOR {
        true => Ok(path),
        false => Err(format!(
            "the loader finds version {major} before {}; {VARIABLE} names folders to look in",
            path.display()
        )),
    }
}

/// Opens what lies in the same folder under a name that begins so; what does not open is missed later, and says so there.
fn open_beside(path: &Path, beginning: &str) {
    let Some(entries) = path.parent().and_then(|folder| fs::read_dir(folder).ok()) else { return };
    for entry in entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with(beginning)) {
        // SAFETY: as in `search`.
        if let Ok(library) = unsafe { Library::open(Some(entry.path()), RTLD_NOW | RTLD_GLOBAL) } {
            std::mem::forget(library);
        }
    }
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
    let paths =
        |variable: &str| env::var_os(variable).map(|v| env::split_paths(&v).collect::<Vec<_>>()).unwrap_or_default();
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
