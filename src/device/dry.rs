//! A device without memory: the same constructors price a plan, the same ops count work. Of what is written to it
//! only indices are kept, since what attention costs is in its segment table.

use std::cell::Cell;

use super::{Arena, DType, Device, Ledger, Storage, View, ViewMut};
use crate::error::Result;

/// A multiply-add is two FLOPs; only matrix products and attention are counted, as is the custom: the rest is
/// memory traffic.
pub struct Dry {
    storage: Storage,
    flops: Cell<u64>,
}

impl Default for Dry {
    /// Stands for a device that stores F32.
    fn default() -> Self {
        Self::new(DType::F32)
    }
}

impl Dry {
    /// Stands for a device that stores `storage`.
    pub fn new(storage: impl Into<Storage>) -> Self {
        Self { storage: storage.into(), flops: Cell::new(0) }
    }

    /// An arena that never runs out: its ledger is the plan.
    pub fn arena(storage: impl Into<Storage>) -> Arena<Dry> {
        Arena::with_bytes(&Self::new(storage), usize::MAX).expect("a dry device cannot fail")
    }

    /// What `build` takes on a device that stores `storage`.
    pub fn measure<T>(storage: impl Into<Storage>, build: impl FnOnce(&mut Arena<Dry>) -> T) -> Ledger {
        let mut arena = Self::arena(storage);
        build(&mut arena);
        arena.ledger()
    }

    pub fn count(&self, flops: usize) {
        self.flops.set(self.flops.get() + flops as u64);
    }

    pub fn flops(&self) -> u64 {
        self.flops.get()
    }
}

impl Device for Dry {
    const NAME: &'static str = "dry";
    type Span = Vec<u32>;

    fn storage(&self) -> DType {
        self.storage.dtype
    }

    fn keeps(&self) -> Storage {
        self.storage
    }

    fn width(dtype: DType) -> usize {
        dtype.bytes()
    }

    fn alloc(&self, _: usize) -> Result<Vec<u32>> {
        Ok(Vec::new())
    }

    fn split(_: Vec<u32>, _: usize) -> (Vec<u32>, Vec<u32>) {
        (Vec::new(), Vec::new())
    }

    fn zero(&self, _: ViewMut<Self>) -> Result<()> {
        Ok(())
    }

    fn copy(&self, _: View<Self>, _: ViewMut<Self>) -> Result<()> {
        Ok(())
    }

    fn write_f32(&self, _: &[f32], _: ViewMut<Self>) -> Result<()> {
        Ok(())
    }

    fn write_f64(&self, _: &[f64], _: ViewMut<Self>) -> Result<()> {
        Ok(())
    }

    fn write_u32(&self, src: &[u32], dst: ViewMut<Self>) -> Result<()> {
        dst.span.resize(dst.offset, 0);
        dst.span.extend_from_slice(src);
        Ok(())
    }

    fn read_f32(&self, _: View<Self>, _: &mut [f32]) -> Result<()> {
        Ok(())
    }

    fn read_f64(&self, _: View<Self>, _: &mut [f64]) -> Result<()> {
        Ok(())
    }

    fn read_u32(&self, _: View<Self>, _: &mut [u32]) -> Result<()> {
        Ok(())
    }
}

impl<'a> View<'a, Dry> {
    /// The indices that were written, `None` where none were.
    pub fn indices(&self) -> Option<&'a [u32]> {
        self.span.get(self.offset..self.offset + self.len())
    }
}
