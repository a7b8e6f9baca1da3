//! Which threads of a CUDA block share a row of a norm (`kernels/norm.cuh`).

use crate::device::cuda::Element;

pub(super) const THREADS: usize = 256;

/// Threads of a row: what its length asks for, so that it decides alone how the row is summed.
pub(super) fn group<T: Element>(hidden: usize) -> usize {
    match hidden.div_ceil(16 / size_of::<T>()) {
        ..=16 => 8,
        17..=256 => 32,
        _ => THREADS,
    }
}

/// Blocks for `rows` rows.
pub(super) fn blocks(rows: usize, group: usize) -> usize {
    rows.div_ceil(THREADS / group)
}
