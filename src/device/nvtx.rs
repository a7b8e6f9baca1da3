//! Named ranges for profilers (NVTX 3): `nsys profile --trace=cuda,nvtx` shows which phase and op a kernel belongs to.
//!
//! A profiler names a library in `NVTX_INJECTION64_PATH`. The program opens it and calls `InitializeInjectionNvtx2` with a
//! function that hands out tables of slots; the profiler puts its functions into the slots that it serves. NVIDIA's headers do
//! this in C (nvtxDetail/nvtxInit.h, nvtxTypes.h); here are the parts that push and pop need. Without a profiler a range
//! costs one load and one branch.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::mem::transmute;
use std::ptr::{from_ref, null};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering::Relaxed};

use libloading::os::unix::Library;

const VARIABLE: &str = "NVTX_INJECTION64_PATH";

/// `NvtxExportTableID`
const CALLBACKS: u32 = 1;
const VERSION_INFO: u32 = 3;
/// `NvtxCallbackModule`: core, and the number of modules.
const CORE: usize = 1;
const MODULES: usize = 7;
/// Slots of each module, of which the first serves nothing.
const SIZES: [c_uint; MODULES] = [0, 16, 9, 15, 7, 16, 7];
/// `NvtxCallbackIdCore`
const RANGE_PUSH: usize = 9;
const RANGE_POP: usize = 11;

type Slot = AtomicPtr<c_void>;
type Push = unsafe extern "C" fn(*const c_char) -> c_int;
type Pop = unsafe extern "C" fn() -> c_int;

static SLOTS: [[Slot; 16]; MODULES] = [const { [const { Slot::new(std::ptr::null_mut()) }; 16] }; MODULES];

/// Where each slot lies, by module.
static TABLES: OnceLock<[[Address; 16]; MODULES]> = OnceLock::new();

/// Address of a static: fit to be shared.
#[repr(transparent)]
struct Address(*const Slot);

// SAFETY: points to an atomic that lives forever.
unsafe impl Send for Address {}
// SAFETY: as above.
unsafe impl Sync for Address {}

/// `NvtxExportTableCallbacks`
#[repr(C)]
struct Callbacks {
    struct_size: usize,
    get_module_function_table: unsafe extern "C" fn(c_uint, *mut *const Address, *mut c_uint) -> c_int,
}

/// `NvtxExportTableVersionInfo`
#[repr(C)]
struct VersionInfo {
    struct_size: usize,
    version: u32,
    reserved: u32,
    set_injection_version: unsafe extern "C" fn(u32),
}

/// # Safety
/// `table` and `size` are null or may be written.
unsafe extern "C" fn get_module_function_table(module: c_uint, table: *mut *const Address, size: *mut c_uint) -> c_int {
    let module = module as usize;
    if module == 0 || module >= MODULES {
        return 0;
    }
    let tables =
        TABLES.get_or_init(|| SLOTS.each_ref().map(|slots| slots.each_ref().map(|slot| Address(from_ref(slot)))));
    // SAFETY: the caller's to write, where not null.
    unsafe {
        if !table.is_null() {
            *table = tables[module].as_ptr();
        }
        if !size.is_null() {
            *size = SIZES[module];
        }
    }
    1
}

extern "C" fn set_injection_version(_: u32) {}

extern "C" fn export_table(id: u32) -> *const c_void {
    static CALLBACK_TABLE: Callbacks = Callbacks { struct_size: size_of::<Callbacks>(), get_module_function_table };
    static VERSION_TABLE: VersionInfo =
        VersionInfo { struct_size: size_of::<VersionInfo>(), version: 3, reserved: 0, set_injection_version };
    match id {
        CALLBACKS => from_ref(&CALLBACK_TABLE).cast(),
        VERSION_INFO => from_ref(&VERSION_TABLE).cast(),
        _ => null(),
    }
}

/// Lets the profiler fill the slots, if there is one.
fn attach() -> Option<(Push, Pop)> {
    let path = std::env::var_os(VARIABLE)?;
    type Initialize = unsafe extern "C" fn(extern "C" fn(u32) -> *const c_void) -> c_int;
    // SAFETY: whoever set the variable asks for this library's code to run, and the symbol has this type by convention.
    unsafe {
        let library = Library::new(path).ok()?;
        let initialize: Initialize = *library.get(b"InitializeInjectionNvtx2\0").ok()?;
        if initialize(export_table) == 0 {
            return None;
        }
        std::mem::forget(library);
    }
    functions()
}

fn functions() -> Option<(Push, Pop)> {
    let slot = |id: usize| Some(SLOTS[CORE][id].load(Relaxed)).filter(|function| !function.is_null());
    let (push, pop) = (slot(RANGE_PUSH)?, slot(RANGE_POP)?);
    // SAFETY: the profiler put functions of these types into these slots.
    Some(unsafe { (transmute::<*mut c_void, Push>(push), transmute::<*mut c_void, Pop>(pop)) })
}

/// An open range; closed where it is dropped.
#[must_use = "the range ends where this is dropped"]
pub struct Range(Option<Pop>);

/// Opens a range on this thread, within those that are open.
pub fn range(name: &'static CStr) -> Range {
    static FUNCTIONS: OnceLock<Option<(Push, Pop)>> = OnceLock::new();
    Range(FUNCTIONS.get_or_init(attach).map(|(push, pop)| {
        // SAFETY: a terminated string; the profiler copies it.
        unsafe { push(name.as_ptr()) };
        pop
    }))
}

impl Drop for Range {
    fn drop(&mut self) {
        if let Some(pop) = self.0 {
            // SAFETY: takes nothing.
            unsafe { pop() };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    static SEEN: Mutex<Vec<String>> = Mutex::new(Vec::new());

    unsafe extern "C" fn push(name: *const c_char) -> c_int {
        // SAFETY: `range` passes a C string.
        let name = unsafe { CStr::from_ptr(name) };
        SEEN.lock().unwrap().push(name.to_str().unwrap().to_string());
        0
    }

    unsafe extern "C" fn pop() -> c_int {
        SEEN.lock().unwrap().push("pop".into());
        0
    }

    /// What a profiler does, by the tables that it is handed.
    #[test]
    fn a_profiler_finds_the_slots() {
        let callbacks = export_table(CALLBACKS).cast::<Callbacks>();
        let (mut table, mut size) = (null(), 0);
        // SAFETY: the tables are those of this file.
        unsafe {
            assert_eq!((*callbacks).struct_size, 16);
            assert_eq!(((*callbacks).get_module_function_table)(CORE as u32, &mut table, &mut size), 1);
            assert_eq!(size, 16);
            (*(*table.add(RANGE_PUSH)).0).store(push as *mut c_void, Relaxed);
            (*(*table.add(RANGE_POP)).0).store(pop as *mut c_void, Relaxed);
            assert_eq!(((*callbacks).get_module_function_table)(7, &mut table, &mut size), 0);
        }
        assert!(export_table(2).is_null());
        let (push, pop) = functions().unwrap();
        // SAFETY: the two functions above.
        unsafe {
            push(c"forward".as_ptr());
            drop(Range(Some(pop)));
        }
        assert_eq!(*SEEN.lock().unwrap(), ["forward", "pop"]);
    }
}
