//! Host memory for the devices that compute on the host.

use std::sync::Arc;

use bytemuck::Pod;
use memmap2::MmapMut;
use rayon::prelude::*;

use super::{ALIGN_BYTES, DType, Device, View, ViewMut};
use crate::error::{Error, Result};

/// `bytes` of zeroed memory, in large pages where the system has them: products walk through many megabytes, and
/// translating an address in a small page costs a virtual machine more than the product itself (three times the time of a
/// tile, measured). Starts at a page.
fn map(bytes: usize) -> Result<MmapMut> {
    let mapping = MmapMut::map_anon(bytes.max(1)).map_err(|_| {
        let size = format!("{:.1} GiB cannot be had", bytes as f64 / (1u64 << 30) as f64);
        let advice =
            "`cuvee plan` shows what takes them, and --micro-batch-tokens, --max-length and --recompute what to change";
        Error::op("memory", format!("{size}; {advice}"))
    })?;
    // A system without large pages says so, and nothing is lost.
    #[cfg(target_os = "linux")]
    let _ = mapping.advise(memmap2::Advice::HugePage);
    Ok(mapping)
}

/// Memory of one thread that grows to the largest size it was asked for and stays.
#[derive(Default)]
pub struct Scratch(Option<MmapMut>);

impl Scratch {
    /// Memory of `len` floats: large pages are taken whole.
    pub fn bytes(len: usize) -> usize {
        (len * size_of::<f32>()).next_multiple_of(LARGE_PAGE_BYTES)
    }

    /// At least `len` floats with contents of no meaning; they begin at a cache line.
    ///
    /// # Panics
    /// Where the system has no such memory left: scratch is a few megabytes.
    pub fn grown(&mut self, len: usize) -> &mut [f32] {
        let bytes = Self::bytes(len);
        let old = self.0.take().filter(|mapping| mapping.len() >= bytes);
        let mapping = old.unwrap_or_else(|| map(bytes).unwrap_or_else(|e| panic!("{e}")));
        bytemuck::cast_slice_mut(self.0.insert(mapping))
    }
}

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

const LARGE_PAGE_BYTES: usize = 2 << 20;
/// Stride at which pages are touched: no system has smaller ones.
const PAGE_BYTES: usize = 4096;

impl Block {
    fn new(bytes: usize) -> Result<Self> {
        const { assert!(PAGE_BYTES.is_multiple_of(ALIGN_BYTES)) }; // mappings start at a page
        let mut mapping = map(bytes)?;
        // Touch every page now: planned and resident bytes then compare, and an out-of-memory comes before step 1. The
        // system clears a page when it is touched, about half a gigabyte a second on one core.
        mapping.par_chunks_mut(LARGE_PAGE_BYTES).for_each(|pages| {
            pages.iter_mut().step_by(PAGE_BYTES).for_each(|byte| {
                // SAFETY: a live exclusive reference; volatile, so that writing a zero over a zero is not left out.
                unsafe { std::ptr::from_mut(byte).write_volatile(0) }
            });
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
