//! The small matrix product under the CPU attention: `C = A B` or `C += A B`, on tiles of registers, nothing packed.
//!
//! A is read one element at a time and may have any strides; rows of B and C are read as vectors. Every element of
//! C is one chain of fused multiply-adds in the order of the depth, as in `ops/gemm.rs`: tile shapes, tails and
//! instruction sets give the same bits.
//!
//! Traffic of a tile of R rows and V vectors: R + V loads for R * V multiply-adds (11 for 24 with AVX-512, 8 for 12
//! with AVX2), so operands may come from the second-level cache.

use crate::device::Isa;
use crate::ops::gemm::{Operand, Start};

/// Columns are computed up to the next multiple of this at most; rows of B and C must have room for them.
pub const PAD: usize = 16;

pub struct Product<'a> {
    /// Rows, columns, depth.
    pub shape: [usize; 3],
    /// `[rows, depth]`
    pub a: Operand<'a>,
    /// `[depth, cols]`, rows `stride` apart
    pub b: &'a [f32],
    /// `[rows, cols]`, rows `stride` apart. Padding columns hold anything afterwards.
    pub c: &'a mut [f32],
    pub stride: usize,
    pub start: Start,
}

impl Product<'_> {
    pub fn run(self, isa: Isa) {
        let [rows, cols, depth] = self.shape;
        if rows == 0 || cols == 0 {
            return;
        }
        let padded = cols.next_multiple_of(PAD);
        let last = |rows: usize| (rows - 1) * self.stride + padded;
        assert!(padded <= self.stride && last(rows) <= self.c.len(), "C has no room for {rows} x {padded}");
        if depth > 0 {
            let end = (rows - 1) * self.a.row + (depth - 1) * self.a.col;
            assert!(end < self.a.data.len(), "A is smaller than {rows} x {depth}");
            assert!(last(depth) <= self.b.len(), "B is smaller than {depth} x {padded}");
        }
        // SAFETY: the operands reach as far as the shape says (just asserted); `Isa::detect` found the features.
        unsafe {
            match isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => avx512(self),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => avx2(self),
                Isa::Portable => panels::<[f32; 4]>(self),
            }
        }
    }

    /// As `run`, but of each chain only the terms that `counts(row, depth, col)`: what a mask hides may be NaN.
    /// The bits are those of `run` with zeros for what does not count. Slow, for data that is broken already.
    pub fn run_where(self, counts: impl Fn(usize, usize, usize) -> bool) {
        let [rows, cols, depth] = self.shape;
        for (i, j) in (0..rows).flat_map(|i| (0..cols).map(move |j| (i, j))) {
            let c = &mut self.c[i * self.stride + j];
            let first = if self.start == Start::Zero { 0.0 } else { *c };
            *c = (0..depth).filter(|p| counts(i, *p, j)).fold(first, |sum, p| {
                let a = self.a.data[i * self.a.row + p * self.a.col];
                a.mul_add(self.b[p * self.stride + j], sum)
            });
        }
    }
}

/// Floats side by side. An implementation may be used only where its instruction set was detected.
trait Vector: Copy {
    const LANES: usize;
    /// Rows and vectors of the largest tile whose sums stay in registers.
    const ROWS: usize;
    const VECTORS: usize;
    fn splat(x: f32) -> Self;
    /// # Safety
    /// `at` must point to `LANES` floats.
    unsafe fn load(at: *const f32) -> Self;
    /// # Safety
    /// As `load`.
    unsafe fn store(self, at: *mut f32);
    fn mul_add(self, factor: Self, term: Self) -> Self;
}

impl Vector for [f32; 4] {
    const LANES: usize = 4;
    const ROWS: usize = 4;
    const VECTORS: usize = 2;
    #[inline(always)]
    fn splat(x: f32) -> Self {
        [x; 4]
    }
    #[inline(always)]
    unsafe fn load(at: *const f32) -> Self {
        // SAFETY: promised by the caller.
        unsafe { at.cast::<Self>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, at: *mut f32) {
        // SAFETY: promised by the caller.
        unsafe { at.cast::<Self>().write_unaligned(self) }
    }
    #[inline(always)]
    fn mul_add(self, factor: Self, term: Self) -> Self {
        std::array::from_fn(|i| self[i].mul_add(factor[i], term[i]))
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Vector;
    use std::arch::x86_64::*;

    impl Vector for __m256 {
        const LANES: usize = 8;
        const ROWS: usize = 6;
        const VECTORS: usize = 2;
        #[inline(always)]
        fn splat(x: f32) -> Self {
            // SAFETY: used only where AVX2 was detected, as are the functions below.
            unsafe { _mm256_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(at: *const f32) -> Self {
            // SAFETY: promised by the caller.
            unsafe { _mm256_loadu_ps(at) }
        }
        #[inline(always)]
        unsafe fn store(self, at: *mut f32) {
            // SAFETY: promised by the caller.
            unsafe { _mm256_storeu_ps(at, self) }
        }
        #[inline(always)]
        fn mul_add(self, factor: Self, term: Self) -> Self {
            // SAFETY: as in `splat`.
            unsafe { _mm256_fmadd_ps(self, factor, term) }
        }
    }

    impl Vector for __m512 {
        const LANES: usize = 16;
        const ROWS: usize = 8;
        const VECTORS: usize = 3;
        #[inline(always)]
        fn splat(x: f32) -> Self {
            // SAFETY: used only where AVX-512 was detected, as are the functions below.
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(at: *const f32) -> Self {
            // SAFETY: promised by the caller.
            unsafe { _mm512_loadu_ps(at) }
        }
        #[inline(always)]
        unsafe fn store(self, at: *mut f32) {
            // SAFETY: promised by the caller.
            unsafe { _mm512_storeu_ps(at, self) }
        }
        #[inline(always)]
        fn mul_add(self, factor: Self, term: Self) -> Self {
            // SAFETY: as in `splat`.
            unsafe { _mm512_fmadd_ps(self, factor, term) }
        }
    }
}

/// # Safety
/// As `panels`, on a machine with AVX-512.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512dq,avx2,fma")]
unsafe fn avx512(p: Product) {
    // SAFETY: promised by the caller.
    unsafe { panels::<std::arch::x86_64::__m512>(p) }
}

/// # Safety
/// As `panels`, on a machine with AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2(p: Product) {
    // SAFETY: promised by the caller.
    unsafe { panels::<std::arch::x86_64::__m256>(p) }
}

/// Panels of two or three vectors of columns: four are two and two, as one alone would wait for itself.
///
/// # Safety
/// The operands must reach as far as the shape says.
#[inline(always)]
unsafe fn panels<V: Vector>(mut p: Product) {
    let (vectors, mut vector) = (p.shape[1].div_ceil(V::LANES), 0);
    while vector < vectors {
        let col = vector * V::LANES;
        // SAFETY: promised by the caller.
        vector += unsafe {
            match vectors - vector {
                1 => panel::<V, 1>(&mut p, col),
                3 | 5.. if V::VECTORS == 3 => panel::<V, 3>(&mut p, col),
                _ => panel::<V, 2>(&mut p, col),
            }
        };
    }
}

/// # Safety
/// As `panels`, and VECTORS vectors of columns must begin at `col`.
#[inline(always)]
unsafe fn panel<V: Vector, const VECTORS: usize>(p: &mut Product, col: usize) -> usize {
    let (rows, mut row) = (p.shape[0], 0);
    while row < rows {
        // SAFETY: promised by the caller; as many rows are left.
        row += unsafe {
            match (rows - row).min(V::ROWS) {
                8.. => tile::<V, 8, VECTORS>(p, row, col),
                6.. => tile::<V, 6, VECTORS>(p, row, col),
                4.. => tile::<V, 4, VECTORS>(p, row, col),
                2.. => tile::<V, 2, VECTORS>(p, row, col),
                _ => tile::<V, 1, VECTORS>(p, row, col),
            }
        };
    }
    VECTORS
}

/// One tile, whose sums stay in registers; returns its rows.
///
/// # Safety
/// As `panels`, and the tile must lie inside C.
#[inline(always)]
unsafe fn tile<V: Vector, const ROWS: usize, const VECTORS: usize>(p: &mut Product, row: usize, col: usize) -> usize {
    let (stride, depth) = (p.stride, p.shape[2]);
    // A pointer for each row: stepping from row to row would be a chain of additions as long as the products.
    let a: [*const f32; ROWS] = std::array::from_fn(|i| p.a.data.as_ptr().wrapping_add((row + i) * p.a.row));
    let (mut at, a_col) = (0, p.a.col);
    let mut b = p.b.as_ptr().wrapping_add(col);
    let c = p.c.as_mut_ptr().wrapping_add(row * stride + col);
    let mut sums = [[V::splat(0.0); VECTORS]; ROWS];
    // SAFETY: the tile lies inside the operands, as the caller promises.
    unsafe {
        if p.start == Start::Output {
            for i in 0..ROWS {
                for v in 0..VECTORS {
                    sums[i][v] = V::load(c.add(i * stride + v * V::LANES));
                }
            }
        }
        for _ in 0..depth {
            let mut terms = [V::splat(0.0); VECTORS];
            for v in 0..VECTORS {
                terms[v] = V::load(b.add(v * V::LANES));
            }
            for i in 0..ROWS {
                let factor = V::splat(*a[i].add(at));
                for v in 0..VECTORS {
                    sums[i][v] = factor.mul_add(terms[v], sums[i][v]);
                }
            }
            at += a_col;
            b = b.wrapping_add(stride);
        }
        for i in 0..ROWS {
            for v in 0..VECTORS {
                sums[i][v].store(c.add(i * stride + v * V::LANES));
            }
        }
    }
    ROWS
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Philox;

    fn random(len: usize, stream: u64) -> Vec<f32> {
        let random = Philox::new(1, stream);
        (0..len).map(|i| random.normal(i as u64) as f32).collect()
    }

    #[test]
    fn every_tail_layout_and_instruction_set_equals_the_chain() {
        const STRIDE: usize = 64;
        let best = Isa::detect();
        let sets = [Isa::Portable, best].into_iter();
        #[cfg(target_arch = "x86_64")]
        let sets = sets.chain([Isa::Avx2].into_iter().filter(|isa| *isa <= best));
        for isa in sets {
            for shape @ [rows, cols, depth] in
                [[1, 1, 0], [3, 5, 1], [15, 16, 7], [8, 17, 64], [23, 33, 9], [64, 64, 31]]
            {
                let (a, b, c0) = (random(rows * depth, 1), random(64 * STRIDE, 2), random(64 * STRIDE, 3));
                for start in [Start::Zero, Start::Output] {
                    for a in [Operand::new(&a, depth), Operand::transposed(&a, rows)] {
                        let (mut found, mut expected) = (c0.clone(), c0.clone());
                        Product { shape, a, b: &b, c: &mut found, stride: STRIDE, start }.run(isa);
                        Product { shape, a, b: &b, c: &mut expected, stride: STRIDE, start }.run_where(|_, _, _| true);
                        for (found, expected) in found.chunks(STRIDE).zip(expected.chunks(STRIDE)).take(rows) {
                            assert!(found[..cols] == expected[..cols], "{shape:?} on {isa:?}");
                        }
                        assert!(found[rows * STRIDE..] == c0[rows * STRIDE..], "{shape:?} on {isa:?}: wrote beyond");
                    }
                }
            }
        }
    }

    #[test]
    fn what_does_not_count_may_be_nan() {
        let (a, b) = ([2.0, 0.0, 0.0, 3.0], [[1.0; 16], [f32::NAN; 16]].concat());
        let mut c = vec![1.0; 32];
        let a = Operand::new(&a, 2);
        Product { shape: [2, 16, 2], a, b: &b, c: &mut c, stride: 16, start: Start::Output }
            .run_where(|row, depth, _| depth == 0 || row == 1);
        assert!(c[..16].iter().all(|x| *x == 3.0) && c[16..].iter().all(|x| x.is_nan()), "{c:?}");
    }
}
