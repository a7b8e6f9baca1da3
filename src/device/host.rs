//! Host memory for the devices that compute on the host.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::sync::Arc;

use bytemuck::Pod;

use super::{ALIGN_BYTES, DType, Device, View, ViewMut};
use crate::error::{Error, Result};

/// One aligned, zeroed allocation, freed when its last span goes.
struct Block {
    start: *mut u8,
    layout: Layout,
}

// SAFETY: a block is plain memory; access to it is governed by the spans, which are disjoint.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

impl Block {
    fn new(bytes: usize) -> Result<Self> {
        let refused = || {
            let size = format!("{:.1} GiB cannot be had", bytes as f64 / (1u64 << 30) as f64);
            Error::op(
                "memory",
                format!(
                    "{size}; `cuvee plan` shows what takes them, and --micro-batch-tokens, --max-length and --recompute what to change"
                ),
            )
        };
        let layout = Layout::from_size_align(bytes.max(1), ALIGN_BYTES).map_err(|_| refused())?;
        // SAFETY: the layout has a non-zero size.
        let start = unsafe { alloc_zeroed(layout) };
        if start.is_null() {
            return Err(refused());
        }
        let block = Self { start, layout };
        // Touch every page now: planned and resident bytes then compare, and an out-of-memory comes before step 1.
        for offset in (0..bytes).step_by(4096) {
            // SAFETY: `offset` lies inside the allocation, to which nobody else holds a pointer yet.
            unsafe { block.start.add(offset).write_volatile(0) };
        }
        Ok(block)
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout, and the last owner is going.
        unsafe { dealloc(self.start, self.layout) };
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
