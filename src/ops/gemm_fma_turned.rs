//! The same chains with the sides exchanged, for products of few rows with a B whose columns are contiguous, as weights' rows are:
//! 24 columns by 16 or 32 rows, `C^T = B^T A^T`. A number of B meets vectors of rows of A, so that B is copied as it lies and not
//! transposed, which took as long as eight to sixteen rows of the product.
//!
//! A product of two numbers has no order and every sum is the chain of [`super::gemm_fma`], so the bits are the same. Panels hold
//! `[depth, 16]` or `[depth, 32]` of A and 24 columns of B, one after the other.

use half::bf16;

use super::gemm::{Columns, FewRows, Kernel, Panel, Sums, widened};
use super::gemm_fma::pack_panel;
use super::simd::{prefetch_far, transpose_between};
use crate::device::Isa;

/// Columns of B of a tile.
const COLS: usize = 24;
/// Values of k of a pass: a piece of either panel and the sums between them stay in the first-level cache.
const DEPTH: usize = 128;
/// From one column of B to the next: no multiple of a page, so that they do not meet in the cache.
const STRIDE: usize = DEPTH + 16;

/// With tiles of `ROWS` rows, 16 or 32.
#[derive(Clone, Copy)]
pub struct FmaTurned<const ROWS: usize>(pub Isa);

impl<const ROWS: usize> Kernel for FmaTurned<ROWS> {
    const ROWS: usize = ROWS;
    const COLS: usize = COLS;
    const DEPTH: usize = DEPTH;

    fn panel_a(depth: usize) -> usize {
        depth * ROWS
    }

    fn panel_b(depth: usize) -> usize {
        assert!(depth <= DEPTH, "columns are packed a pass at a time");
        COLS * STRIDE
    }

    fn pack_a(self, panel: Panel<&[f32]>, out: &mut [f32]) {
        pack_panel::<ROWS>(self.0, panel, out);
    }

    fn pack_b(self, panel: Panel<&[f32]>, out: &mut [f32]) -> usize {
        pack_columns(panel, out, |x, out| out.copy_from_slice(x))
    }

    fn pack_b_bf16(self, panel: Panel<&[bf16]>, out: &mut [f32]) -> usize {
        pack_columns(panel, out, |x, out| out.iter_mut().zip(x).for_each(|(out, x)| *out = widened(*x)))
    }

    fn height(rows: usize) -> usize {
        match rows {
            1..=8 => 8,
            9..=16 => 16,
            _ => ROWS,
        }
    }

    /// The sums are those of C^T.
    unsafe fn multiply(self, rows: usize, depth: usize, a: &[f32], b: Columns, sums: Sums) {
        let Columns { data: b, .. } = b;
        assert!(a.len() >= depth * ROWS && b.len() >= COLS * STRIDE && depth <= DEPTH);
        // SAFETY: the panels have `depth` rows and COLS columns (just asserted), the sums so many as the caller promises;
        // `Isa::detect` found the features on this machine.
        unsafe {
            match self.0 {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 if rows > 16 => {
                    (0..COLS).step_by(12).for_each(|first| avx512::<ROWS, 12, 2>(depth, a, b, sums, first));
                }
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => avx512::<ROWS, COLS, 1>(depth, a, b, sums, 0),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 if rows == 8 => {
                    (0..COLS).step_by(12).for_each(|first| avx2::<ROWS, 12, 1>(depth, a, b, sums, [first, 0]));
                }
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => (0..rows).step_by(16).for_each(|row| {
                    (0..COLS).step_by(6).for_each(|first| avx2::<ROWS, 6, 2>(depth, a, b, sums, [first, row]));
                }),
                Isa::Portable => portable::<ROWS>(depth, a, b, sums),
            }
        }
    }

    fn session(self, work: impl FnOnce()) {
        work();
    }
}

impl<const ROWS: usize> FewRows for FmaTurned<ROWS> {
    unsafe fn take(self, rows: usize, c: Sums, buffer: Sums) {
        // SAFETY: as promised by the caller; a height is made of squares.
        unsafe { transpose_between(self.0, [rows, COLS], c.start, buffer.start, [c.stride, ROWS]) }
    }

    unsafe fn give(self, rows: usize, buffer: Sums, c: Sums) {
        // SAFETY: as above.
        unsafe { transpose_between(self.0, [COLS, rows], buffer.start, c.start, [ROWS, c.stride]) }
    }
}

/// Columns one after the other, by `copy` where they are contiguous.
fn pack_columns<T: Copy>(panel: Panel<&[T]>, out: &mut [f32], copy: impl Fn(&[T], &mut [f32])) -> usize {
    let Panel { data, by_depth, by_width, depth, width } = panel;
    assert_eq!(by_depth, 1, "these columns are not contiguous");
    let (there, rest) = out.split_at_mut(width * STRIDE);
    for (column, out) in there.chunks_exact_mut(STRIDE).enumerate() {
        let column = &data[column * by_width..];
        // The same piece of the next panel: there are too many columns at once for the hardware to see where each goes on.
        prefetch_far(column.as_ptr().wrapping_add(COLS * by_width), depth);
        copy(&column[..depth], &mut out[..depth]);
    }
    rest.fill(0.0);
    1
}

/// # Safety
/// `sums` is C^T, of COLS rows of ROWS that nobody else touches.
unsafe fn portable<const ROWS: usize>(depth: usize, a: &[f32], b: &[f32], sums: Sums) {
    for column in 0..COLS {
        // SAFETY: as promised by the caller; the slice does not outlive the call.
        let sums_of = unsafe { std::slice::from_raw_parts_mut(sums.start.add(column * ROWS), ROWS) };
        if sums.fresh {
            sums_of.fill(0.0);
        }
        for (a, b) in a.chunks_exact(ROWS).zip(&b[column * STRIDE..][..depth]) {
            sums_of.iter_mut().zip(a).for_each(|(sum, a)| *sum = a.mul_add(*b, *sum));
        }
    }
}

/// Columns `first..first + N` and the first `V` vectors of rows.
///
/// # Safety
/// As `portable`; the panels have `depth` rows and COLS columns.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn avx512<const ROWS: usize, const N: usize, const V: usize>(
    depth: usize,
    a: &[f32],
    b: &[f32],
    sums: Sums,
    first: usize,
) {
    use std::arch::x86_64::*;
    const VECTOR: usize = 16;
    let place = |column: usize, v: usize| sums.start.wrapping_add((first + column) * ROWS + v * VECTOR);
    let mut acc = [[_mm512_setzero_ps(); V]; N];
    if !sums.fresh {
        for column in 0..N {
            for v in 0..V {
                // SAFETY: as promised by the caller.
                acc[column][v] = unsafe { _mm512_loadu_ps(place(column, v)) };
            }
        }
    }
    let (a, b) = (a.as_ptr(), b[first * STRIDE..].as_ptr());
    for p in 0..depth {
        // SAFETY: as promised by the caller.
        unsafe {
            let rows: [__m512; V] = std::array::from_fn(|v| _mm512_loadu_ps(a.add(p * ROWS + v * VECTOR)));
            for (column, acc) in acc.iter_mut().enumerate() {
                let scalar = _mm512_set1_ps(*b.add(column * STRIDE + p));
                for v in 0..V {
                    acc[v] = _mm512_fmadd_ps(scalar, rows[v], acc[v]);
                }
            }
        }
    }
    for column in 0..N {
        for v in 0..V {
            // SAFETY: as promised by the caller.
            unsafe { _mm512_storeu_ps(place(column, v), acc[column][v]) };
        }
    }
}

/// Columns and rows from `first` on: `N` and `V` vectors of them.
///
/// # Safety
/// As `avx512`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2<const ROWS: usize, const N: usize, const V: usize>(
    depth: usize,
    a: &[f32],
    b: &[f32],
    sums: Sums,
    first: [usize; 2],
) {
    use std::arch::x86_64::*;
    const VECTOR: usize = 8;
    let [first, row] = first;
    let place = |column: usize, v: usize| sums.start.wrapping_add((first + column) * ROWS + row + v * VECTOR);
    let mut acc = [[_mm256_setzero_ps(); V]; N];
    if !sums.fresh {
        for column in 0..N {
            for v in 0..V {
                // SAFETY: as promised by the caller.
                acc[column][v] = unsafe { _mm256_loadu_ps(place(column, v)) };
            }
        }
    }
    let (a, b) = (a[row..].as_ptr(), b[first * STRIDE..].as_ptr());
    for p in 0..depth {
        // SAFETY: as promised by the caller.
        unsafe {
            let rows: [__m256; V] = std::array::from_fn(|v| _mm256_loadu_ps(a.add(p * ROWS + v * VECTOR)));
            for (column, acc) in acc.iter_mut().enumerate() {
                let scalar = _mm256_broadcast_ss(&*b.add(column * STRIDE + p));
                for v in 0..V {
                    acc[v] = _mm256_fmadd_ps(scalar, rows[v], acc[v]);
                }
            }
        }
    }
    for column in 0..N {
        for v in 0..V {
            // SAFETY: as promised by the caller.
            unsafe { _mm256_storeu_ps(place(column, v), acc[column][v]) };
        }
    }
}
