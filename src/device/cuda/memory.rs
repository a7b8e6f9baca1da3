//! Device memory, and the pinned host memory through which everything goes in and out of it.

use std::ffi::c_void;
use std::ptr;
use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::{result, sys};

use super::{failed, refused};
use crate::error::{Error, Result};

/// The primary context of one GPU and the stream that all work goes to.
pub(super) struct Context {
    device: sys::CUdevice,
    context: sys::CUcontext,
    pub stream: sys::CUstream,
}

// SAFETY: handles of the driver, which is thread-safe; a thread that uses them makes the context current first.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    pub fn new(ordinal: usize) -> Result<Arc<Self>> {
        let device = result::device::get(ordinal as i32).map_err(refused("device"))?;
        // SAFETY: the device exists; the context is released when this is dropped.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(refused("context"))?;
        let mut made = Self { device, context, stream: ptr::null_mut() };
        made.bind()?;
        made.stream = result::stream::create(result::stream::StreamKind::NonBlocking).map_err(refused("stream"))?;
        Ok(Arc::new(made))
    }

    /// Makes the context current on this thread.
    pub fn bind(&self) -> Result<()> {
        match result::ctx::get_current() {
            Ok(Some(current)) if current == self.context => Ok(()),
            // SAFETY: the context lives as long as this.
            _ => unsafe { result::ctx::set_current(self.context) }.map_err(refused("context")),
        }
    }

    /// Of the GPU's memory, what nobody has.
    pub fn free_bytes(&self) -> Result<usize> {
        self.bind()?;
        result::mem_get_info().map(|(free, _)| free).map_err(refused("memory"))
    }

    /// Waits for all work. What an earlier kernel did wrong comes out here.
    pub fn synchronize(&self) -> Result<()> {
        // SAFETY: the stream lives as long as this.
        unsafe { result::stream::synchronize(self.stream) }.map_err(failed("waiting for kernels"))
    }

    /// Time between two events around `work`.
    pub fn timed(&self, work: impl FnOnce() -> Result<()>) -> Result<Duration> {
        self.bind()?;
        let (start, end) = (Event::new()?, Event::new()?);
        start.record(self.stream)?;
        work()?;
        end.record(self.stream)?;
        // SAFETY: both events were recorded; the second is waited for.
        let milliseconds = unsafe {
            result::event::synchronize(end.0).map_err(failed("waiting for kernels"))?;
            result::event::elapsed(start.0, end.0).map_err(refused("an event"))?
        };
        Ok(Duration::from_secs_f64(f64::from(milliseconds) / 1e3))
    }
}

/// A point in a stream, with the time at which it was reached.
struct Event(sys::CUevent);

impl Event {
    fn new() -> Result<Self> {
        result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).map(Self).map_err(refused("an event"))
    }

    fn record(&self, stream: sys::CUstream) -> Result<()> {
        // SAFETY: both live.
        unsafe { result::event::record(self.0, stream) }.map_err(refused("an event"))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by us, destroyed once.
        let _ = unsafe { result::event::destroy(self.0) };
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        let _ = self.bind();
        // SAFETY: nobody uses the handles after this; errors of a broken context have been reported where they happened.
        unsafe {
            if !self.stream.is_null() {
                let _ = result::stream::destroy(self.stream);
            }
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

/// One zeroed allocation, given back when its last span goes.
struct Block {
    start: sys::CUdeviceptr,
    context: Arc<Context>,
}

impl Drop for Block {
    fn drop(&mut self) {
        let _ = self.context.bind();
        // SAFETY: allocated by us, once; the driver waits for the work that uses it.
        let _ = unsafe { result::free_sync(self.start) };
    }
}

/// A run of device memory that overlaps no other live span.
pub struct CudaSpan {
    block: Arc<Block>,
    start: usize,
    len: usize,
}

impl CudaSpan {
    pub(super) fn new(context: &Arc<Context>, bytes: usize) -> Result<Self> {
        context.bind()?;
        // SAFETY: a plain allocation; the memory is written below before anyone reads it.
        let start = unsafe { result::malloc_sync(bytes.max(1)) }.map_err(|e| no_memory(bytes, e))?;
        let block = Arc::new(Block { start, context: context.clone() });
        // SAFETY: the whole of what was just allocated.
        unsafe { result::memset_d8_async(start, 0, bytes.max(1), context.stream) }.map_err(failed("memory"))?;
        Ok(Self { block, start: 0, len: bytes })
    }

    pub(super) fn split(self, at: usize) -> (Self, Self) {
        assert!(at <= self.len, "split at {at} of a span of {} bytes", self.len);
        let head = Self { block: self.block.clone(), start: self.start, len: at };
        (head, Self { block: self.block, start: self.start + at, len: self.len - at })
    }

    /// Address of `bytes` bytes from `offset` on.
    pub(super) fn address(&self, offset: usize, bytes: usize) -> sys::CUdeviceptr {
        assert!(offset + bytes <= self.len, "bytes {offset}..{} reach past a span of {}", offset + bytes, self.len);
        self.block.start + (self.start + offset) as u64
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }
}

fn no_memory(bytes: usize, error: result::DriverError) -> Error {
    if error.0 != sys::cudaError_enum::CUDA_ERROR_OUT_OF_MEMORY {
        return failed("memory")(error);
    }
    let gib = |bytes: usize| format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64);
    let free =
        result::mem_get_info().map_or(String::new(), |(free, all)| format!(" ({} of {} free)", gib(free), gib(all)));
    let advice = "`cuvee plan --device cuda` shows what takes them, and --micro-batch-tokens, --max-length and --recompute what to change";
    Error::op("GPU memory", format!("{} cannot be had{free}: {error}; {advice}", gib(bytes)))
}

/// Bytes of one half of the pinned memory: large enough that a copy runs at the bus's speed.
const HALF_BYTES: usize = 8 << 20;

/// Host memory that a GPU keeps for itself.
pub const STAGING_BYTES: usize = 2 * HALF_BYTES;

/// Pinned memory in two halves: the host fills or empties one while the other is on its way.
pub(super) struct Staging {
    halves: [Half; 2],
    context: Arc<Context>,
}

struct Half {
    memory: *mut c_void,
    /// Behind the last copy that used it.
    done: sys::CUevent,
}

impl Staging {
    pub fn new(context: &Arc<Context>) -> Result<Self> {
        context.bind()?;
        let half = || -> Result<Half, result::DriverError> {
            // SAFETY: page-locked memory, freed when this is dropped.
            let memory = unsafe { result::malloc_host(HALF_BYTES, 0)? };
            let done = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
            Ok(Half { memory, done })
        };
        Ok(Self {
            halves: [half().map_err(refused("pinned memory"))?, half().map_err(refused("pinned memory"))?],
            context: context.clone(),
        })
    }

    /// Copies `len` elements of `width` bytes to the device; `fill` writes elements `first..` into the bytes.
    pub fn upload(&mut self, to: u64, len: usize, width: usize, mut fill: impl FnMut(usize, &mut [u8])) -> Result<()> {
        let stream = self.context.stream;
        let chunk = HALF_BYTES / width;
        for (turn, first) in (0..len).step_by(chunk).enumerate() {
            let half = &self.halves[turn % 2];
            let bytes = chunk.min(len - first) * width;
            // SAFETY: the event says when the last copy that used this half is over; then it is ours, HALF_BYTES long.
            unsafe {
                result::event::synchronize(half.done).map_err(failed("upload"))?;
                let host = std::slice::from_raw_parts_mut(half.memory.cast::<u8>(), bytes);
                fill(first, host);
                result::memcpy_htod_async(to + (first * width) as u64, host, stream).map_err(failed("upload"))?;
                result::event::record(half.done, stream).map_err(failed("upload"))?;
            }
        }
        Ok(())
    }

    /// Copies `len` elements from the device; `take` gets the bytes of elements `first..`.
    pub fn download(&mut self, from: u64, len: usize, width: usize, mut take: impl FnMut(usize, &[u8])) -> Result<()> {
        let stream = self.context.stream;
        let chunk = HALF_BYTES / width;
        let firsts: Vec<usize> = (0..len).step_by(chunk).collect();
        for turn in 0..=firsts.len() {
            if let Some(first) = firsts.get(turn) {
                let (half, bytes) = (&self.halves[turn % 2], chunk.min(len - first) * width);
                // SAFETY: the half was emptied two turns ago; uploads from it come before in the same stream.
                unsafe {
                    let host = std::slice::from_raw_parts_mut(half.memory.cast::<u8>(), bytes);
                    result::memcpy_dtoh_async(host, from + (first * width) as u64, stream)
                        .map_err(failed("download"))?;
                    result::event::record(half.done, stream).map_err(failed("download"))?;
                }
            }
            if let Some(first) = turn.checked_sub(1).map(|turn| firsts[turn]) {
                let (half, bytes) = (&self.halves[(turn - 1) % 2], chunk.min(len - first) * width);
                // SAFETY: the event is behind the copy into this half.
                unsafe {
                    result::event::synchronize(half.done).map_err(failed("waiting for kernels"))?;
                    take(first, std::slice::from_raw_parts(half.memory.cast::<u8>(), bytes));
                }
            }
        }
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        let _ = self.context.bind();
        for half in &self.halves {
            // SAFETY: the copies that use the memory are over; errors were reported where they happened.
            unsafe {
                let _ = result::event::synchronize(half.done);
                let _ = result::event::destroy(half.done);
                let _ = result::free_host(half.memory);
            }
        }
    }
}
