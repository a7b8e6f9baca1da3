//! The emulator and the mock driver themselves: planted bugs must be reported, right kernels must not.

use std::ffi::{CString, c_void};

use cudarc::driver::{result, sys};
use cuvee::device::cuda::probe;

use crate::{Body, Case, Mode};

const EMULATED: &[Mode] = &[Mode::Plain, Mode::Race, Mode::Asan];
const PLAIN: &[Mode] = &[Mode::Plain];
const RACE: &[Mode] = &[Mode::Race];
const ASAN: &[Mode] = &[Mode::Asan];
const UNSANITIZED: &[Mode] = &[Mode::Plain, Mode::Race];

const RIGHT: &[&str] = &["right_reverse", "right_warp", "right_half_warps", "right_copy"];

/// Kernels of `emulator/bugs.cu`, the modes that find them, and what they must say.
const BUGS: &[(&str, &[Mode], &str)] = &[
    ("missing_barrier", RACE, "bugs.cu:"),
    ("missing_second_barrier", RACE, "bugs.cu:"),
    ("divergent_barrier", EMULATED, "divergent __syncthreads"),
    ("barrier_of_some", EMULATED, "__syncthreads reached by 32 of 256 threads"),
    ("missing_syncwarp", RACE, "in shared memory"),
    ("shuffle_for_syncwarp", RACE, "race: a read after a write"),
    ("divergent_shuffle", EMULATED, "deadlock: 128 threads wait at __shfl_xor_sync"),
    ("two_shuffles", EMULATED, "divergent warp"),
    ("shuffle_outside_mask", EMULATED, "reads lane 20, which does not take part"),
    ("blocks_race", RACE, "block 0"),
    ("threads_race", RACE, "race: a write after a write"),
    ("unwritten_shared", RACE, "read of what nobody wrote in shared memory"),
    ("missing_copy_wait", RACE, "no cp_async_wait"),
    ("missing_copy_barrier", RACE, "in shared memory"),
    ("copy_left_behind", EMULATED, "asynchronous copies that nobody waited for"),
    ("copy_into_read", RACE, "race: a"),
    ("misaligned_copy", EMULATED, "source does not start at a 16-byte boundary"),
    ("write_past_the_end", UNSANITIZED, "behind the start of an allocation of 2048"),
    ("write_past_the_end", ASAN, "use-after-poison"),
    ("read_past_the_end", UNSANITIZED, "behind the start of an allocation of 16384"),
    ("read_past_the_end", ASAN, "use-after-poison"),
    ("shared_past_the_end", ASAN, "index 256 out of bounds"),
    ("shared_past_the_end", RACE, "read of what nobody wrote"),
    ("dynamic_past_the_end", ASAN, "use-after-poison"),
    ("local_past_the_end", ASAN, "index 8 out of bounds"),
    ("misaligned_vector", ASAN, "misaligned address"),
    ("null_pointer", UNSANITIZED, "null pointer"),
    ("too_much_shared", EMULATED, "use DYNAMIC_SHARED"),
    ("no_dynamic_shared", EMULATED, "asked for no dynamic shared memory"),
];

const X: usize = 4096;
const Y: usize = 512;

/// A context and two tensors.
struct Gpu {
    x: sys::CUdeviceptr,
    y: sys::CUdeviceptr,
}

impl Gpu {
    /// y holds zeros.
    fn new(x: &[f32]) -> Self {
        probe().unwrap();
        let device = result::device::get(0).unwrap();
        // SAFETY: the device is there; the process ends with the context.
        unsafe { result::ctx::set_current(result::primary_ctx::retain(device).unwrap()).unwrap() };
        // SAFETY: plain allocations, written whole.
        unsafe {
            let gpu = Self { x: result::malloc_sync(X * 4).unwrap(), y: result::malloc_sync(Y * 4).unwrap() };
            result::memcpy_htod_sync(gpu.x, x).unwrap();
            result::memset_d8_sync(gpu.y, 0, Y * 4).unwrap();
            gpu
        }
    }

    fn function(&self, kernel: &str) -> sys::CUfunction {
        // SAFETY: the mock driver finds kernels by name, whatever the image.
        unsafe {
            let module = result::module::load_data(c"".as_ptr().cast::<c_void>()).unwrap();
            result::module::get_function(module, CString::new(kernel).unwrap()).unwrap()
        }
    }

    fn launch(&self, kernel: &str, blocks: u32, threads: u32, shared: u32) -> Result<(), result::DriverError> {
        let (mut x, mut y, mut zero) = (self.x, self.y, 0u32);
        let mut arguments = [(&raw mut x).cast(), (&raw mut y).cast(), (&raw mut zero).cast()];
        // SAFETY: the arguments of every kernel of bugs.cu.
        unsafe {
            let function = self.function(kernel);
            let stream = std::ptr::null_mut();
            result::launch_kernel(function, (blocks, 1, 1), (threads, 1, 1), shared, stream, &mut arguments)
        }
    }

    fn y(&self) -> Vec<f32> {
        let mut y = vec![0.0f32; Y];
        // SAFETY: as long as the allocation.
        unsafe { result::memcpy_dtoh_sync(&mut y, self.y).unwrap() };
        y
    }
}

fn run(kernel: &str) {
    let x: Vec<f32> = (0..X).map(|i| i as f32).collect();
    let blocks = if ["blocks_race", "right_reverse"].contains(&kernel) { 2 } else { 1 };
    let shared = if kernel == "no_dynamic_shared" { 0 } else { 8192 };
    Gpu::new(&x).launch(kernel, blocks, 256, shared).unwrap_or_else(|e| panic!("{e}"));
}

/// Whole numbers, so that every order of summation gives the same.
fn product(kernel: &str) {
    let number = |i: usize| (i * 7 % 13) as f32 - 6.0;
    let mut x: Vec<f32> = (0..X).map(number).collect();
    x[2 * 16 + 5] = f32::NAN;
    for (n, k) in (0..8).flat_map(|n| (0..16).map(move |k| (n, k))) {
        x[384 + k * 8 + n] = x[256 + n * 16 + k];
    }
    let gpu = Gpu::new(&x);
    (0..2).for_each(|_| gpu.launch(kernel, 1, 256, 0).unwrap());
    for (m, n) in (0..16).flat_map(|m| (0..8).map(move |n| (m, n))) {
        let sum: f32 = (0..16).map(|k| 2.0 * x[m * 16 + k] * x[256 + n * 16 + k]).sum();
        let found = gpu.y()[m * 8 + n];
        assert!(found == sum || (m == 2 && found.is_nan()), "[{m}, {n}]: {found}, expected {sum}");
    }
}

/// What the driver refuses, and what it leaves undone until somebody waits.
fn mock_driver() {
    let gpu = Gpu::new(&[0.0; X]);
    let refused = |result: Result<(), result::DriverError>, words: &str| {
        let said = result.expect_err(words).to_string();
        assert!(said.contains(words), "{said}");
    };
    refused(gpu.launch("right_reverse", 1, 1025, 0), "1 to 1024 threads");
    refused(gpu.launch("right_reverse", 0, 256, 0), "a grid has 1 to");
    refused(gpu.launch("right_reverse", 1, 256, 48 * 1024 + 1), "cuFuncSetAttribute allowed 49152");
    // SAFETY: every call is one that the driver must refuse or do.
    unsafe {
        refused(result::memset_d8_sync(gpu.y + 1, 0, Y * 4), "not inside one allocation");
        refused(result::memcpy_dtoh_sync(&mut [0u8; 8], gpu.y - 4), "not inside one allocation");
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking).unwrap();
        let pinned = result::malloc_host(Y * 4, 0).unwrap().cast::<u8>();
        let host = std::slice::from_raw_parts_mut(pinned, Y * 4);
        result::memset_d8_async(gpu.y, 5, Y * 4, stream).unwrap();
        result::memcpy_dtoh_async(host, gpu.y, stream).unwrap();
        let late = std::env::var("CUVEE_EMULATOR_SEED").unwrap() != "1";
        assert_eq!(host[0], if late { 0xff } else { 5 }, "done too early, or too late");
        result::stream::synchronize(stream).unwrap();
        assert!(host.iter().all(|byte| *byte == 5));
        refused(gpu.launch("barrier_of_some", 1, 256, 0), "__syncthreads reached by");
        refused(result::stream::synchronize(stream), "__syncthreads reached by");
    }
}

pub fn all() -> Vec<Case> {
    let case = |name: &str, modes, bug, run: Box<dyn Fn() + Send + Sync>| Case {
        name: format!("emulator::{name}"),
        modes,
        body: Body::Alone(run),
        bug,
    };
    let right = RIGHT.iter().map(|name| case(name, EMULATED, None, Box::new(move || run(name))));
    let products = ["right_product", "right_transposed_product"];
    let products = products.into_iter().map(|name| case(name, EMULATED, None, Box::new(move || product(name))));
    let bugs = BUGS.iter().map(|(name, modes, words)| case(name, modes, Some(words), Box::new(move || run(name))));
    let driver = [case("mock_driver", PLAIN, None, Box::new(mock_driver))];
    right.chain(products).chain(bugs).chain(driver).collect()
}
