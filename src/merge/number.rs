//! The numbers that are merged.

use std::ops::{Add, AddAssign, Div, Mul, Neg, Sub};

use super::Prepare;
use super::registry::Prepared;

/// f32, which checkpoints are merged in, and f64, which shows a formula without its rounding.
pub trait Real:
    Copy
    + Default
    + Send
    + Sync
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + 'static
{
    /// Binary digits of [`Real::key`].
    const KEY_BITS: u32;

    /// A magnitude and an index in one whole number, so that sorting it compares once.
    type Ranked: Copy + Default + Ord + Send;

    fn of(value: f64) -> Self;
    fn to_f64(self) -> f64;

    /// A whole number that grows with the magnitude; the sign is left out.
    fn key(self) -> u64;

    /// The magnitude of that key; infinity for those above its own, which are not numbers.
    fn of_key(key: u64) -> Self;

    fn abs(self) -> Self;

    /// Ordered by magnitude, then by the index.
    fn ranked(self, at: u32) -> Self::Ranked;

    /// The index of such a pair.
    fn at(ranked: Self::Ranked) -> usize;

    /// A method's code for this type.
    fn prepare(of: &Prepare) -> Prepared<Self>;
}

impl Real for f32 {
    const KEY_BITS: u32 = 31;

    type Ranked = u64;

    fn of(value: f64) -> Self {
        value as f32
    }

    fn to_f64(self) -> f64 {
        self.into()
    }

    fn key(self) -> u64 {
        self.abs().to_bits().into()
    }

    fn of_key(key: u64) -> Self {
        Self::from_bits(key.min(Self::INFINITY.to_bits().into()) as u32)
    }

    fn abs(self) -> Self {
        self.abs()
    }

    fn ranked(self, at: u32) -> u64 {
        (self.key() << 32) | u64::from(at)
    }

    fn at(ranked: u64) -> usize {
        ranked as u32 as usize
    }

    fn prepare(of: &Prepare) -> Prepared<Self> {
        of.single
    }
}

impl Real for f64 {
    const KEY_BITS: u32 = 63;

    type Ranked = u128;

    fn of(value: f64) -> Self {
        value
    }

    fn to_f64(self) -> f64 {
        self
    }

    fn key(self) -> u64 {
        self.abs().to_bits()
    }

    fn of_key(key: u64) -> Self {
        Self::from_bits(key.min(Self::INFINITY.to_bits()))
    }

    fn abs(self) -> Self {
        self.abs()
    }

    fn ranked(self, at: u32) -> u128 {
        (u128::from(self.key()) << 32) | u128::from(at)
    }

    fn at(ranked: u128) -> usize {
        ranked as u32 as usize
    }

    fn prepare(of: &Prepare) -> Prepared<Self> {
        of.double
    }
}
