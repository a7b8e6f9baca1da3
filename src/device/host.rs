//! Host memory for the devices that compute on the host.

use std::sync::Arc;

use bytemuck::Pod;
use memmap2::MmapMut;

use super::{ALIGN_BYTES, DType, Device, View, ViewMut};
use crate::error::{Error, Result};

/// One zeroed mapping, given back when its last span goes.
struct Block {
    start: *mut u8,
    /// Owns the memory; only `start` is used while spans live.
    _mapping: MmapMut,
}

// SAFETY: a block is plain memory; access to it is governed by the spans, which are disjoint.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

/// Stride at which pages are touched: no system has smaller ones.
const PAGE_BYTES: usize = 4096;

impl Block {
    fn new(bytes: usize) -> Result<Self> {
        const { assert!(PAGE_BYTES.is_multiple_of(ALIGN_BYTES)) }; // mappings start at a page
        let mut mapping = MmapMut::map_anon(bytes.max(1)).map_err(|_| {
            let size = format!("{:.1} GiB cannot be had", bytes as f64 / (1u64 << 30) as f64);
            Error::op(
                "memory",
                format!(
                    "{size}; `cuvee plan` shows what takes them, and --micro-batch-tokens, --max-length and --recompute what to change"
                ),
            )
        })?;
        // Products walk through matrices of many megabytes: large pages spare the address translation, and an arena of
        // gigabytes is there in a fraction of the time. A system without them says so, and nothing is lost.
        #[cfg(target_os = "linux")]
        let _ = mapping.advise(memmap2::Advice::HugePage);
        // Touch every page now: planned and resident bytes then compare, and an out-of-memory comes before step 1.
        mapping.iter_mut().step_by(PAGE_BYTES).for_each(|byte| {
            // SAFETY: a live exclusive reference; volatile, so that writing a zero over a zero is not left out.
            unsafe { std::ptr::from_mut(byte).write_volatile(0) }
        });
        Ok(Self { start: mapping.as_mut_ptr(), _mapping: mapping })
    }
}

/// A run of host memory that overlaps no other live span.
pub struct HostSpan {
    block: Arc<Block>,
    start: usize,
    len: usize,
}

impl HostSpan {
    pub(super) fn new(bytes: usize) -> Result<Self> {
        Ok(Self { block: Arc::new(Block::new(bytes)?), start: 0, len: bytes })
    }

    pub(super) fn split(self, at: usize) -> (Self, Self) {
        assert!(at <= self.len, "split at {at} of a span of {} bytes", self.len);
        let head = Self { block: self.block.clone(), start: self.start, len: at };
        (head, Self { block: self.block, start: self.start + at, len: self.len - at })
    }

    fn check<T>(&self, offset: usize, len: usize) {
        let bytes = (offset + len) * size_of::<T>();
        assert!(bytes <= self.len, "elements {offset}..{} reach past a span of {} bytes", offset + len, self.len);
    }

    pub(super) fn slice<T: Pod>(&self, offset: usize, len: usize) -> &[T] {
        self.check::<T>(offset, len);
        // SAFETY: in bounds (checked), aligned (spans start at multiples of ALIGN_BYTES), any bit pattern is a T,
        // and nobody writes: spans of one block are disjoint and `&self` excludes a `&mut` to this one.
        unsafe { std::slice::from_raw_parts(self.block.start.add(self.start).cast::<T>().add(offset), len) }
    }

    pub(super) fn slice_mut<T: Pod>(&mut self, offset: usize, len: usize) -> &mut [T] {
        self.check::<T>(offset, len);
        // SAFETY: as in `slice`; `&mut self` makes this the only reference into the span.
        unsafe { std::slice::from_raw_parts_mut(self.block.start.add(self.start).cast::<T>().add(offset), len) }
    }
}

impl<'a, D: Device<Span = HostSpan>> View<'a, D> {
    pub(super) fn host<T: Pod>(&self, dtype: DType) -> &'a [T] {
        assert_eq!(self.dtype, dtype, "the op reads another type than the tensor holds");
        self.span.slice(self.offset, self.len())
    }

    /// The indices of a U32 tensor.
    pub fn u32s(&self) -> &'a [u32] {
        self.host(DType::U32)
    }
}

impl<'a, D: Device<Span = HostSpan>> ViewMut<'a, D> {
    pub(super) fn into_host<T: Pod>(self, dtype: DType) -> &'a mut [T] {
        assert_eq!(self.dtype, dtype, "the op writes another type than the tensor holds");
        let (offset, len) = (self.offset, self.len());
        self.span.slice_mut(offset, len)
    }

    pub fn into_u32s(self) -> &'a mut [u32] {
        self.into_host(DType::U32)
    }
}
