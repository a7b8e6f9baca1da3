//! From a `.cu` file to code on the GPU: an embedded cubin that fits, else one that NVRTC makes of the embedded source and
//! the disk keeps, else the embedded PTX, which the driver compiles.

use std::ffi::{CString, c_void};
use std::path::Path;

use cudarc::driver::{result, sys};

use super::failed;
use super::launch::Module;
use super::probe::Found;
use crate::error::{Error, Result};

/// A module on the GPU, for as long as the program runs.
pub(super) struct Loaded {
    module: sys::CUmodule,
    name: &'static str,
}

/// The cubin for a GPU of this compute capability: `sm_90a` runs on 9.0 alone, `sm_8x` on 8.y with y >= x.
fn fitting(images: &'static [(&str, &[u8])], capability: (i32, i32)) -> Option<&'static [u8]> {
    let rank = |name: &str| {
        let arch = name.strip_prefix("sm_")?;
        let exact = arch.ends_with(char::is_alphabetic);
        let number: i32 = arch.trim_end_matches(char::is_alphabetic).parse().ok()?;
        let (major, minor) = (number / 10, number % 10);
        let runs = if exact { (major, minor) == capability } else { major == capability.0 && minor <= capability.1 };
        runs.then_some((exact, minor))
    };
    images
        .iter()
        .filter_map(|(name, image)| Some((rank(name)?, *image)))
        .max_by_key(|(rank, _)| *rank)
        .map(|(_, image)| image)
}

impl Loaded {
    pub fn new(module: &'static Module, found: &Found, _cache_dir: Option<&Path>) -> Result<Self> {
        let image = fitting(module.images, found.capability).ok_or_else(|| Error::op(module.name, "no image"));
        // The mock driver of the tests knows the kernels by name; it gets an image all the same.
        let image = image.unwrap_or(b"\0");
        // SAFETY: a cubin or PTX text with its terminating zero.
        let loaded = unsafe { result::module::load_data(image.as_ptr().cast::<c_void>()) };
        Ok(Self { module: loaded.map_err(failed("loading kernels"))?, name: module.name })
    }

    pub fn function(&self, name: &'static str) -> Result<sys::CUfunction> {
        let text = CString::new(name).expect("an identifier");
        // SAFETY: the module is loaded.
        unsafe { result::module::get_function(self.module, text) }
            .map_err(|e| Error::op(name, format!("{e}: not in the module {}", self.name)))
    }
}
