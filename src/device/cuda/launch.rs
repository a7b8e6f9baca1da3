//! The typed side of a kernel launch. [`kernels`] is made by build.rs from the kernels' signatures: one struct for each,
//! whose fields are its arguments, so that another type, number or order does not compile.

use std::ffi::c_void;
use std::marker::PhantomData;

use super::Cuda;
use crate::device::{DType, View, ViewMut};

/// What a kernel may be given pointers to.
pub trait Element: Copy + 'static {
    /// In the names of entry points.
    const NAME: &'static str;
    const DTYPE: DType;
}

impl Element for f32 {
    const NAME: &'static str = "f32";
    const DTYPE: DType = DType::F32;
}

impl Element for half::bf16 {
    const NAME: &'static str = "bf16";
    const DTYPE: DType = DType::Bf16;
}

impl Element for u32 {
    const NAME: &'static str = "u32";
    const DTYPE: DType = DType::U32;
}

/// Device memory that a kernel reads, or nothing (0).
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct In<'a, T>(u64, PhantomData<&'a T>);

/// Device memory that a kernel writes, or nothing (0).
#[repr(transparent)]
pub struct Out<'a, T>(u64, PhantomData<&'a mut T>);

impl<'a, T: Element> In<'a, T> {
    pub fn null() -> Self {
        Self(0, PhantomData)
    }

    pub fn optional(view: Option<View<'a, Cuda>>) -> Self {
        view.map_or(Self::null(), |view| view.input())
    }
}

impl<T> In<'_, T> {
    pub fn is_null(&self) -> bool {
        self.0 == 0
    }

    pub(super) fn address(&self) -> u64 {
        self.0
    }
}

impl<T> Out<'_, T> {
    pub fn is_null(&self) -> bool {
        self.0 == 0
    }

    pub(super) fn address(&self) -> u64 {
        self.0
    }
}

impl<'a, T: Element> Out<'a, T> {
    pub fn null() -> Self {
        Self(0, PhantomData)
    }

    pub fn optional(view: Option<ViewMut<'a, Cuda>>) -> Self {
        view.map_or(Self::null(), |view| view.output())
    }

    pub(super) fn at(address: u64) -> Self {
        Self(address, PhantomData)
    }

    /// The same memory for one more launch.
    pub fn again(&mut self) -> Out<'_, T> {
        Out(self.0, PhantomData)
    }

    /// What was written there, for a later launch to read.
    pub fn as_input(&self) -> In<'_, T> {
        In(self.0, PhantomData)
    }
}

impl<'a> View<'a, Cuda> {
    fn address(&self) -> u64 {
        let width = self.dtype.bytes();
        self.span.address(self.offset * width, self.len() * width)
    }

    /// For a kernel that reads `T`.
    pub fn input<T: Element>(&self) -> In<'a, T> {
        assert_eq!(self.dtype, T::DTYPE, "the kernel reads another type than the tensor holds");
        In(self.address(), PhantomData)
    }

    pub(super) fn bytes_at(&self) -> (u64, usize) {
        (self.address(), self.len() * self.dtype.bytes())
    }
}

impl<'a> ViewMut<'a, Cuda> {
    /// For a kernel that writes `T`.
    pub fn output<T: Element>(self) -> Out<'a, T> {
        assert_eq!(self.dtype, T::DTYPE, "the kernel writes another type than the tensor holds");
        Out(self.view().address(), PhantomData)
    }
}

/// Blocks of a launch and the dynamic shared memory of each.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Grid {
    pub blocks: [usize; 3],
    pub shared_bytes: usize,
}

impl Grid {
    /// Blocks of `threads` threads, each with sixteen bytes of the `len` elements.
    pub fn of_packs<T: Element>(len: usize, threads: u32) -> Self {
        len.div_ceil(threads as usize * 16 / T::DTYPE.bytes()).into()
    }

    pub fn shared(self, bytes: usize) -> Self {
        Self { shared_bytes: bytes, ..self }
    }
}

impl From<usize> for Grid {
    fn from(x: usize) -> Self {
        [x, 1, 1].into()
    }
}

impl From<[usize; 2]> for Grid {
    fn from([x, y]: [usize; 2]) -> Self {
        [x, y, 1].into()
    }
}

impl From<[usize; 3]> for Grid {
    fn from(blocks: [usize; 3]) -> Self {
        Self { blocks, shared_bytes: 0 }
    }
}

/// An argument as the driver wants it: where its value lies.
fn argument<T>(value: &T) -> *mut c_void {
    std::ptr::from_ref(value).cast_mut().cast()
}

/// An entry point of a module.
pub struct Entry {
    pub name: &'static str,
    /// Index in [`kernels::MODULES`].
    pub module: usize,
}

/// One `.cu` file.
pub struct Module {
    pub name: &'static str,
    /// Complete, for NVRTC and for the tests' emulator.
    pub source: &'static str,
    /// `sm_80`, `sm_90a`, ... and `ptx`, compressed (gzip), where an nvcc was there at build time.
    pub images: &'static [(&'static str, &'static [u8])],
}

/// What the kernels take, as ptxas says it; empty without an nvcc.
pub const RESOURCES: &str = include_str!(concat!(env!("OUT_DIR"), "/ptxas.txt"));

/// Made by build.rs. One struct for each kernel; `launch` puts it into the stream.
pub mod kernels {
    use half::bf16;

    use super::super::Cuda;
    use super::{Element, Entry, Grid, In, Module, Out, argument};
    use crate::error::Result;

    include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
}
