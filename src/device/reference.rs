//! The oracle: f64, one thread, ops written as their formulas. For tests only. Its floats are f64 whatever their type says:
//! a [`DType::Bf16`] tensor stands where another device has one, and loses nothing.

use super::{DType, Device, HostSpan, View, ViewMut};
use crate::error::Result;

pub struct Reference;

impl Device for Reference {
    const NAME: &'static str = "reference";
    type Span = HostSpan;

    fn width(dtype: DType) -> usize {
        match dtype {
            DType::F32 | DType::Bf16 => size_of::<f64>(),
            DType::U32 => dtype.bytes(),
        }
    }

    fn alloc(&self, bytes: usize) -> Result<HostSpan> {
        HostSpan::new(bytes)
    }

    fn split(span: HostSpan, at: usize) -> (HostSpan, HostSpan) {
        span.split(at)
    }

    fn zero(&self, dst: ViewMut<Self>) -> Result<()> {
        match dst.dtype() {
            DType::U32 => dst.into_u32s().fill(0),
            _ => dst.into_f64s().fill(0.0),
        }
        Ok(())
    }

    fn copy(&self, src: View<Self>, dst: ViewMut<Self>) -> Result<()> {
        dst.into_f64s().copy_from_slice(src.f64s());
        Ok(())
    }

    fn write_f32(&self, src: &[f32], dst: ViewMut<Self>) -> Result<()> {
        dst.into_f64s().iter_mut().zip(src).for_each(|(d, s)| *d = f64::from(*s));
        Ok(())
    }

    fn write_f64(&self, src: &[f64], dst: ViewMut<Self>) -> Result<()> {
        dst.into_f64s().copy_from_slice(src);
        Ok(())
    }

    fn write_u32(&self, src: &[u32], dst: ViewMut<Self>) -> Result<()> {
        dst.into_u32s().copy_from_slice(src);
        Ok(())
    }

    fn read_f32(&self, src: View<Self>, dst: &mut [f32]) -> Result<()> {
        dst.iter_mut().zip(src.f64s()).for_each(|(d, s)| *d = *s as f32);
        Ok(())
    }

    fn read_f64(&self, src: View<Self>, dst: &mut [f64]) -> Result<()> {
        dst.copy_from_slice(src.f64s());
        Ok(())
    }

    fn read_u32(&self, src: View<Self>, dst: &mut [u32]) -> Result<()> {
        dst.copy_from_slice(src.u32s());
        Ok(())
    }
}

/// The same type, of those that are floats.
fn float(dtype: DType) -> DType {
    if dtype == DType::U32 { DType::F32 } else { dtype }
}

impl<'a> View<'a, Reference> {
    pub fn f64s(&self) -> &'a [f64] {
        self.host(float(self.dtype))
    }
}

impl<'a> ViewMut<'a, Reference> {
    pub fn into_f64s(self) -> &'a mut [f64] {
        let dtype = float(self.dtype);
        self.into_host(dtype)
    }
}
