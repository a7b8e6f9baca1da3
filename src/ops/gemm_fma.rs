//! The tile of fused multiply-adds: 12 rows by 32 columns in registers, one chain over k for each element.
//!
//! `c[i][j] = fma(a[i][k], b[k][j], c[i][j])` for k = 0, 1, 2, ...: the bits are those of the chain on every instruction
//! set. Panels hold `[depth, 12]` of A and `[depth, 32]` of B.

use super::gemm::{Columns, FewRows, Kernel, Panel, Sums};
use crate::device::Isa;

/// Rows of a tile.
const TILE_ROWS: usize = 12;
/// Columns of a tile: two vectors of AVX-512, four of AVX2.
const COLS: usize = 32;

#[derive(Clone, Copy)]
pub struct Fma(pub Isa);

impl Kernel for Fma {
    const ROWS: usize = TILE_ROWS;
    const COLS: usize = COLS;
    /// 32 KiB of a panel of B.
    const DEPTH: usize = 256;

    fn panel_a(depth: usize) -> usize {
        depth * TILE_ROWS
    }

    fn panel_b(depth: usize) -> usize {
        depth * COLS
    }

    fn pack_a(self, panel: Panel<&[f32]>, out: &mut [f32]) {
        pack_panel::<TILE_ROWS>(self.0, panel, out);
    }

    fn pack_b(self, panel: Panel<&[f32]>, out: &mut [f32]) -> usize {
        pack_panel::<COLS>(self.0, panel, out);
        1
    }

    fn height(rows: usize) -> usize {
        match rows {
            1 | 2 => rows,
            3..=4 => 4,
            5..=8 => 8,
            _ => TILE_ROWS,
        }
    }

    unsafe fn multiply(self, rows: usize, _: usize, a: &[f32], Columns { data: b, .. }: Columns, sums: Sums) {
        // SAFETY: as promised by the caller.
        unsafe {
            match rows {
                1 => kernel::<1>(self.0, a, b, sums),
                2 => kernel::<2>(self.0, a, b, sums),
                4 => kernel::<4>(self.0, a, b, sums),
                8 => kernel::<8>(self.0, a, b, sums),
                _ => kernel::<TILE_ROWS>(self.0, a, b, sums),
            }
        }
    }

    fn session(self, work: impl FnOnce()) {
        work();
    }
}

impl FewRows for Fma {
    unsafe fn take(self, rows: usize, c: Sums, buffer: Sums) {
        for row in 0..rows {
            // SAFETY: as promised by the caller.
            unsafe { buffer.row(row).copy_from_nonoverlapping(c.row(row), COLS) }
        }
    }

    unsafe fn give(self, rows: usize, buffer: Sums, c: Sums) {
        // SAFETY: as promised by the caller.
        unsafe { self.take(rows, buffer, c) }
    }
}

/// Rows of `WIDTH`, one for each value of k.
pub fn pack_panel<const WIDTH: usize>(isa: Isa, panel: Panel<&[f32]>, out: &mut [f32]) {
    let Panel { data, by_depth, by_width, width, .. } = panel;
    if by_width != 1 && by_depth == 1 {
        return pack_transposed::<WIDTH>(isa, data, by_width, width, out);
    }
    for (p, row) in out.chunks_exact_mut(WIDTH).enumerate() {
        if by_width == 1 && width == WIDTH {
            row.copy_from_slice(&data[p * by_depth..][..WIDTH]);
            continue;
        }
        for (j, slot) in row[..width].iter_mut().enumerate() {
            *slot = data[p * by_depth + j * by_width];
        }
        row[width..].fill(0.0);
    }
}

/// As `pack_panel` for a panel whose depth is contiguous and whose columns are `stride` apart.
fn pack_transposed<const WIDTH: usize>(isa: Isa, data: &[f32], stride: usize, width: usize, out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    let packed = match isa {
        Isa::Portable => 0,
        // SAFETY: `Isa::detect` found AVX2 on this machine.
        Isa::Avx2 | Isa::Avx512 => unsafe { transpose_avx2::<WIDTH>(data, stride, width, out) },
    };
    #[cfg(not(target_arch = "x86_64"))]
    let (packed, _) = (0, isa);
    for (p, row) in out.chunks_exact_mut(WIDTH).enumerate().skip(packed) {
        for (j, slot) in row[..width].iter_mut().enumerate() {
            *slot = data[p + j * stride];
        }
        row[width..].fill(0.0);
    }
}

/// Packs as many depths as fill squares of 8 x 8, and returns their number.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn transpose_avx2<const WIDTH: usize>(data: &[f32], stride: usize, width: usize, out: &mut [f32]) -> usize {
    use std::arch::x86_64::*;
    const SQUARE: usize = 8;
    const AHEAD: usize = 64;
    assert!(WIDTH.is_multiple_of(4) && width <= WIDTH);
    let depth = out.len() / WIDTH / SQUARE * SQUARE;
    for p in (0..depth).step_by(SQUARE) {
        for j in (0..WIDTH).step_by(SQUARE) {
            let mut rows = [_mm256_setzero_ps(); SQUARE];
            for (i, row) in rows.iter_mut().enumerate().take(width.saturating_sub(j)) {
                let from = &data[(j + i) * stride + p..][..SQUARE];
                // Too many rows at once for the hardware to see that each is read in order.
                _mm_prefetch::<_MM_HINT_T0>(from.as_ptr().wrapping_add(AHEAD).cast());
                // SAFETY: `from` holds eight elements.
                *row = unsafe { _mm256_loadu_ps(from.as_ptr()) };
            }
            for (i, column) in transpose_square(rows).into_iter().enumerate() {
                let to = &mut out[(p + i) * WIDTH + j..(p + i) * WIDTH + WIDTH.min(j + SQUARE)];
                // SAFETY: `to` holds eight elements, or four where WIDTH ends within the square.
                unsafe {
                    match to.len() {
                        SQUARE => _mm256_storeu_ps(to.as_mut_ptr(), column),
                        _ => _mm_storeu_ps(to.as_mut_ptr(), _mm256_castps256_ps128(column)),
                    }
                }
            }
        }
    }
    depth
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn transpose_square(r: [std::arch::x86_64::__m256; 8]) -> [std::arch::x86_64::__m256; 8] {
    use std::arch::x86_64::*;
    // Pairs of rows, then pairs of pairs, then the 128-bit halves.
    let mut pairs = r;
    for i in 0..4 {
        pairs[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        pairs[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    let mut fours = pairs;
    for i in [0, 4] {
        for h in 0..2 {
            fours[i + 2 * h] = _mm256_shuffle_ps::<0b01_00_01_00>(pairs[i + h], pairs[i + 2 + h]);
            fours[i + 2 * h + 1] = _mm256_shuffle_ps::<0b11_10_11_10>(pairs[i + h], pairs[i + 2 + h]);
        }
    }
    let mut columns = fours;
    for i in 0..4 {
        columns[i] = _mm256_permute2f128_ps::<0x20>(fours[i], fours[i + 4]);
        columns[i + 4] = _mm256_permute2f128_ps::<0x31>(fours[i], fours[i + 4]);
    }
    columns
}

/// `sums[i][j] = fma(a[p][i], b[p][j], sums[i][j])` for p in order, the first `ROWS` rows.
///
/// # Safety
/// `sums` must have `ROWS` rows of COLS that nobody else touches.
unsafe fn kernel<const ROWS: usize>(isa: Isa, a: &[f32], b: &[f32], sums: Sums) {
    assert!(a.len() / TILE_ROWS >= b.len() / COLS);
    // SAFETY: as promised by the caller; `Isa::detect` found the features on this machine.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => kernel_avx512::<ROWS>(a, b, sums),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => kernel_avx2::<ROWS>(a, b, sums),
            Isa::Portable => kernel_portable::<ROWS>(a, b, sums),
        }
    }
}

/// # Safety
/// As `kernel`.
unsafe fn kernel_portable<const ROWS: usize>(a: &[f32], b: &[f32], at: Sums) {
    let mut sums = [[0.0f32; COLS]; ROWS];
    // SAFETY: as promised by the caller; the slices do not outlive the call.
    let row_of = |i: usize| unsafe { std::slice::from_raw_parts_mut(at.row(i), COLS) };
    if !at.fresh {
        (0..ROWS).for_each(|i| sums[i].copy_from_slice(row_of(i)));
    }
    for (a, b) in a.chunks_exact(TILE_ROWS).zip(b.chunks_exact(COLS)) {
        for (sums, a) in sums.iter_mut().zip(a) {
            for (sum, b) in sums.iter_mut().zip(b) {
                *sum = a.mul_add(*b, *sum);
            }
        }
    }
    (0..ROWS).for_each(|i| row_of(i).copy_from_slice(&sums[i]));
}

/// # Safety
/// As `kernel`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn kernel_avx512<const ROWS: usize>(a: &[f32], b: &[f32], sums: Sums) {
    use std::arch::x86_64::*;
    const VECTOR: usize = 16;
    let mut acc = [[_mm512_setzero_ps(); 2]; ROWS];
    if !sums.fresh {
        for i in 0..ROWS {
            for v in 0..2 {
                // SAFETY: a row of `sums` holds two vectors.
                acc[i][v] = unsafe { _mm512_loadu_ps(sums.row(i).add(v * VECTOR)) };
            }
        }
    }
    let depth = b.len() / COLS;
    let (mut a, mut b) = (a.as_ptr(), b.as_ptr());
    for _ in 0..depth {
        // SAFETY: `depth` rows of TILE_ROWS and COLS elements lie behind the pointers (asserted in `kernel`).
        unsafe {
            let b0 = _mm512_loadu_ps(b);
            let b1 = _mm512_loadu_ps(b.add(VECTOR));
            for i in 0..ROWS {
                let scalar = _mm512_set1_ps(*a.add(i));
                acc[i][0] = _mm512_fmadd_ps(scalar, b0, acc[i][0]);
                acc[i][1] = _mm512_fmadd_ps(scalar, b1, acc[i][1]);
            }
            a = a.add(TILE_ROWS);
            b = b.add(COLS);
        }
    }
    for i in 0..ROWS {
        for v in 0..2 {
            // SAFETY: as for the loads.
            unsafe { _mm512_storeu_ps(sums.row(i).add(v * VECTOR), acc[i][v]) };
        }
    }
}

/// 16 registers hold a 6 x 16 tile: the tile is walked in such pieces.
///
/// # Safety
/// As `kernel`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn kernel_avx2<const ROWS: usize>(a: &[f32], b: &[f32], sums: Sums) {
    for half in 0..2 {
        // SAFETY: the pieces of one half are ROWS rows together.
        unsafe {
            match ROWS {
                1 => piece_avx2::<1>(a, b, sums, 0, half),
                2 => piece_avx2::<2>(a, b, sums, 0, half),
                4 => piece_avx2::<4>(a, b, sums, 0, half),
                8 => (0..2).for_each(|piece| piece_avx2::<4>(a, b, sums, 4 * piece, half)),
                _ => (0..2).for_each(|piece| piece_avx2::<6>(a, b, sums, 6 * piece, half)),
            }
        }
    }
}

/// # Safety
/// `sums` must have `first_row + ROWS` rows of COLS that nobody else touches.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn piece_avx2<const ROWS: usize>(a: &[f32], b: &[f32], sums: Sums, first_row: usize, half: usize) {
    use std::arch::x86_64::*;
    const VECTOR: usize = 8;
    let first_col = half * 2 * VECTOR;
    let mut acc = [[_mm256_setzero_ps(); 2]; ROWS];
    if !sums.fresh {
        for i in 0..ROWS {
            for v in 0..2 {
                // SAFETY: columns first_col..first_col + 16 lie inside a row of `sums`.
                acc[i][v] = unsafe { _mm256_loadu_ps(sums.row(first_row + i).add(first_col + v * VECTOR)) };
            }
        }
    }
    for p in 0..b.len() / COLS {
        // SAFETY: as many rows of TILE_ROWS and COLS lie behind the pointers (asserted in `kernel`).
        unsafe {
            let b = b.as_ptr().add(p * COLS + first_col);
            let (b0, b1) = (_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(VECTOR)));
            let a = a.as_ptr().add(p * TILE_ROWS + first_row);
            for i in 0..ROWS {
                let scalar = _mm256_broadcast_ss(&*a.add(i));
                acc[i][0] = _mm256_fmadd_ps(scalar, b0, acc[i][0]);
                acc[i][1] = _mm256_fmadd_ps(scalar, b1, acc[i][1]);
            }
        }
    }
    for i in 0..ROWS {
        for v in 0..2 {
            // SAFETY: as for the loads.
            unsafe { _mm256_storeu_ps(sums.row(first_row + i).add(first_col + v * VECTOR), acc[i][v]) };
        }
    }
}
