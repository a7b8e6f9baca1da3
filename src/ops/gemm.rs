//! Blocked f32 matrix product for the CPU ops: `C = A B` or `C += A B`.
//!
//! Every element of C is one chain of fused multiply-adds over k = 0, 1, 2, ... Blocks of k continue the chain
//! from C, so the bits depend neither on blocking nor on tile shape, instruction set, thread count or on which
//! other rows and columns are computed. That is what makes log-probabilities independent of the batch.

use std::cell::RefCell;

use rayon::prelude::*;

use super::simd::Shared;
use crate::device::{Cpu, Isa};

/// A strided operand: element (i, j) at `i * row + j * col`.
#[derive(Clone, Copy)]
pub struct Operand<'a> {
    pub data: &'a [f32],
    pub row: usize,
    pub col: usize,
}

impl<'a> Operand<'a> {
    pub fn new(data: &'a [f32], cols: usize) -> Self {
        Self { data, row: cols, col: 1 }
    }

    pub fn transposed(data: &'a [f32], cols: usize) -> Self {
        Self { data, row: 1, col: cols }
    }
}

/// Where the chain of each element starts.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// At zero: `C = A B`.
    Zero,
    /// At what C holds: `C += A B`.
    Output,
}

/// Rows of a register tile.
const TILE_ROWS: usize = 12;
/// Columns of a register tile: two vectors of AVX-512, four of AVX2.
const TILE_COLS: usize = 32;
/// Depth of a block: a `[BLOCK_K, TILE_COLS]` panel of B stays in the first-level cache.
const BLOCK_K: usize = 256;
/// Columns of a block of B, packed once and shared by all threads.
const BLOCK_COLS: usize = 1024;
/// Rows of a block of A, packed by the task that uses it.
const BLOCK_ROWS: usize = 8 * TILE_ROWS;
/// Below this many multiply-adds a parallel section costs more than it saves.
const SERIAL_WORK: usize = 1 << 16;

/// `c` is `[m, n]` with row stride `n`; `a` is `[m, k]`, `b` is `[k, n]`.
pub fn gemm(cpu: &Cpu, [m, n, k]: [usize; 3], a: Operand, b: Operand, c: &mut [f32], start: Start) {
    assert_eq!(c.len(), m * n, "the output of a [{m}, {k}] by [{k}, {n}] product");
    if k == 0 && start == Start::Zero {
        c.fill(0.0);
    }
    if m == 0 || n == 0 || k == 0 {
        return;
    }
    let shared = Shared::new(c);
    let mut packed_b = PACKED_B.take();
    for first_col in (0..n).step_by(BLOCK_COLS) {
        let cols = BLOCK_COLS.min(n - first_col);
        for first_k in (0..k).step_by(BLOCK_K) {
            let depth = BLOCK_K.min(k - first_k);
            let block = Block { m, n, first_col, cols, first_k, depth, start };
            pack_b(cpu, &block, b, &mut packed_b);
            multiply_block(cpu, &block, a, &packed_b, &shared);
        }
    }
    PACKED_B.set(packed_b);
}

thread_local! {
    /// Grown once to their largest size and kept: no allocation after the first step.
    static PACKED_B: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    static PACKED_A: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// One `[m, cols]` stripe of C and the slice of k that is being added to it.
struct Block {
    m: usize,
    n: usize,
    first_col: usize,
    cols: usize,
    first_k: usize,
    depth: usize,
    start: Start,
}

impl Block {
    fn serial(&self) -> bool {
        self.m * self.cols * self.depth < SERIAL_WORK
    }
}

fn for_each(cpu: &Cpu, serial: bool, tasks: usize, task: impl Fn(usize) + Send + Sync) {
    if serial || tasks == 1 {
        (0..tasks).for_each(task);
    } else {
        cpu.run(|| (0..tasks).into_par_iter().for_each(task));
    }
}

/// Panels of `TILE_COLS` columns, each `[depth, TILE_COLS]`, zero beyond the last column.
fn pack_b(cpu: &Cpu, block: &Block, b: Operand, packed: &mut Vec<f32>) {
    let panels = block.cols.div_ceil(TILE_COLS);
    let panel_len = block.depth * TILE_COLS;
    if packed.len() < panels * panel_len {
        packed.resize(panels * panel_len, 0.0);
    }
    let shared = Shared::new(packed);
    for_each(cpu, block.serial(), panels, |panel| {
        // SAFETY: each task writes its own panel.
        let out = unsafe { shared.slice(panel * panel_len, panel_len) };
        let first = panel * TILE_COLS;
        let width = TILE_COLS.min(block.cols - first);
        let origin = block.first_k * b.row + (block.first_col + first) * b.col;
        pack_panel::<TILE_COLS>(cpu.isa(), &b.data[origin..], [b.row, b.col], width, out);
    });
}

/// Copies a `[depth, width]` operand (`outer` apart in depth, `inner` apart in width) into rows of `WIDTH`.
fn pack_panel<const WIDTH: usize>(isa: Isa, data: &[f32], strides: [usize; 2], width: usize, out: &mut [f32]) {
    let [outer, inner] = strides;
    if inner != 1 && outer == 1 {
        return pack_transposed::<WIDTH>(isa, data, inner, width, out);
    }
    for (p, row) in out.chunks_exact_mut(WIDTH).enumerate() {
        if inner == 1 && width == WIDTH {
            row.copy_from_slice(&data[p * outer..][..WIDTH]);
            continue;
        }
        for (j, slot) in row[..width].iter_mut().enumerate() {
            *slot = data[p * outer + j * inner];
        }
        row[width..].fill(0.0);
    }
}

/// As `pack_panel` for an operand whose depth is contiguous and whose columns are `stride` apart.
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

fn multiply_block(cpu: &Cpu, block: &Block, a: Operand, packed_b: &[f32], c: &Shared<f32>) {
    // Enough tasks for every thread: first by rows, then, for a few rows (decoding), by groups of columns.
    let wanted = 4 * cpu.threads();
    let rows = block.m.div_ceil(wanted).next_multiple_of(TILE_ROWS).min(BLOCK_ROWS);
    let row_blocks = block.m.div_ceil(rows);
    let panels = block.cols.div_ceil(TILE_COLS);
    let groups = wanted.div_ceil(row_blocks).min(panels);
    let group = panels.div_ceil(groups);
    let groups = panels.div_ceil(group);
    for_each(cpu, block.serial(), row_blocks * groups, |task| {
        let (row_block, group_index) = (task / groups, task % groups);
        let first_row = row_block * rows;
        let panels = group_index * group..((group_index + 1) * group).min(panels);
        let height = rows.min(block.m - first_row);
        PACKED_A.with_borrow_mut(|packed_a| {
            pack_a(cpu.isa(), block, a, first_row, height, packed_a);
            for panel in panels {
                for first in (0..height).step_by(TILE_ROWS) {
                    let tile = Tile {
                        row: first_row + first,
                        rows: TILE_ROWS.min(height - first),
                        col: block.first_col + panel * TILE_COLS,
                        cols: TILE_COLS.min(block.cols - panel * TILE_COLS),
                    };
                    let a = &packed_a[first * block.depth..][..TILE_ROWS * block.depth];
                    let b = &packed_b[panel * TILE_COLS * block.depth..][..TILE_COLS * block.depth];
                    multiply_tile(cpu.isa(), block, &tile, a, b, c);
                }
            }
        });
    });
}

/// Panels of `TILE_ROWS` rows, each `[depth, TILE_ROWS]`, zero beyond the last row.
fn pack_a(isa: Isa, block: &Block, a: Operand, first_row: usize, rows: usize, packed: &mut Vec<f32>) {
    let panel_len = TILE_ROWS * block.depth;
    let needed = rows.div_ceil(TILE_ROWS) * panel_len;
    if packed.len() < needed {
        packed.resize(needed, 0.0);
    }
    for (panel, out) in packed[..needed].chunks_exact_mut(panel_len).enumerate() {
        let first = panel * TILE_ROWS;
        let width = TILE_ROWS.min(rows - first);
        let origin = (first_row + first) * a.row + block.first_k * a.col;
        pack_panel::<TILE_ROWS>(isa, &a.data[origin..], [a.col, a.row], width, out);
    }
}

struct Tile {
    row: usize,
    rows: usize,
    col: usize,
    cols: usize,
}

/// Where the sums of a tile live: in C, or in a buffer when C ends within the tile.
#[derive(Clone, Copy)]
struct Sums {
    start: *mut f32,
    stride: usize,
    /// The chains start here, at zero.
    fresh: bool,
}

impl Sums {
    fn row(&self, i: usize) -> *mut f32 {
        self.start.wrapping_add(i * self.stride)
    }
}

/// Continues the chains of one tile by `block.depth` terms.
fn multiply_tile(isa: Isa, block: &Block, tile: &Tile, a: &[f32], b: &[f32], c: &Shared<f32>) {
    let fresh = block.first_k == 0 && block.start == Start::Zero;
    let at = tile.row * block.n + tile.col;
    let rows = match tile.rows {
        rows @ (1 | 2) => rows,
        3..=4 => 4,
        5..=8 => 8,
        _ => TILE_ROWS,
    };
    if tile.rows == rows && tile.cols == TILE_COLS {
        let sums = Sums { start: c.block(at, block.n, rows, TILE_COLS), stride: block.n, fresh };
        // SAFETY: the block of C is this task's own: tiles are disjoint.
        return unsafe { multiply_rows(isa, rows, a, b, sums) };
    }
    let mut buffer = [0.0f32; TILE_ROWS * TILE_COLS];
    // SAFETY: as above.
    let row_of = |i: usize| unsafe { c.slice(at + i * block.n, tile.cols) };
    if !fresh {
        (0..tile.rows).for_each(|i| buffer[i * TILE_COLS..][..tile.cols].copy_from_slice(row_of(i)));
    }
    let sums = Sums { start: buffer.as_mut_ptr(), stride: TILE_COLS, fresh };
    // SAFETY: the buffer has TILE_ROWS rows of TILE_COLS.
    unsafe { multiply_rows(isa, rows, a, b, sums) };
    (0..tile.rows).for_each(|i| row_of(i).copy_from_slice(&buffer[i * TILE_COLS..][..tile.cols]));
}

/// # Safety
/// `sums` must have `rows` rows of TILE_COLS that nobody else touches.
unsafe fn multiply_rows(isa: Isa, rows: usize, a: &[f32], b: &[f32], sums: Sums) {
    // SAFETY: as promised by the caller.
    unsafe {
        match rows {
            1 => kernel::<1>(isa, a, b, sums),
            2 => kernel::<2>(isa, a, b, sums),
            4 => kernel::<4>(isa, a, b, sums),
            8 => kernel::<8>(isa, a, b, sums),
            _ => kernel::<TILE_ROWS>(isa, a, b, sums),
        }
    }
}

/// `sums[i][j] = fma(a[p][i], b[p][j], sums[i][j])` for p in order, the first `ROWS` rows.
///
/// # Safety
/// `sums` must have `ROWS` rows of TILE_COLS that nobody else touches.
unsafe fn kernel<const ROWS: usize>(isa: Isa, a: &[f32], b: &[f32], sums: Sums) {
    assert!(a.len() / TILE_ROWS >= b.len() / TILE_COLS);
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
    let mut sums = [[0.0f32; TILE_COLS]; ROWS];
    // SAFETY: as promised by the caller; the slices do not outlive the call.
    let row_of = |i: usize| unsafe { std::slice::from_raw_parts_mut(at.row(i), TILE_COLS) };
    if !at.fresh {
        (0..ROWS).for_each(|i| sums[i].copy_from_slice(row_of(i)));
    }
    for (a, b) in a.chunks_exact(TILE_ROWS).zip(b.chunks_exact(TILE_COLS)) {
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
    let depth = b.len() / TILE_COLS;
    let (mut a, mut b) = (a.as_ptr(), b.as_ptr());
    for _ in 0..depth {
        // SAFETY: `depth` rows of TILE_ROWS and TILE_COLS elements lie behind the pointers (asserted in `kernel`).
        unsafe {
            let b0 = _mm512_loadu_ps(b);
            let b1 = _mm512_loadu_ps(b.add(VECTOR));
            for i in 0..ROWS {
                let scalar = _mm512_set1_ps(*a.add(i));
                acc[i][0] = _mm512_fmadd_ps(scalar, b0, acc[i][0]);
                acc[i][1] = _mm512_fmadd_ps(scalar, b1, acc[i][1]);
            }
            a = a.add(TILE_ROWS);
            b = b.add(TILE_COLS);
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
/// `sums` must have `first_row + ROWS` rows of TILE_COLS that nobody else touches.
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
    for p in 0..b.len() / TILE_COLS {
        // SAFETY: as many rows of TILE_ROWS and TILE_COLS lie behind the pointers (asserted in `kernel`).
        unsafe {
            let b = b.as_ptr().add(p * TILE_COLS + first_col);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Philox;

    fn random(len: usize, stream: u64) -> Vec<f32> {
        let random = Philox::new(1, stream);
        (0..len).map(|i| random.normal(i as u64) as f32).collect()
    }

    /// The definition: one chain of fused multiply-adds per element.
    fn chain([m, n, k]: [usize; 3], a: &[f32], b: &[f32], c: &mut [f32]) {
        for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
            for p in 0..k {
                c[i * n + j] = a[i * k + p].mul_add(b[p * n + j], c[i * n + j]);
            }
        }
    }

    fn transpose(x: &[f32], rows: usize, cols: usize) -> Vec<f32> {
        (0..cols).flat_map(|j| (0..rows).map(move |i| x[i * cols + j])).collect()
    }

    #[test]
    fn equals_the_chain_bit_for_bit_for_every_shape_layout_and_instruction_set() {
        let sizes =
            [[1, 1, 1], [1, 40, 300], [3, 31, 123], [13, 33, 257], [47, 65, 31], [252, 123, 64], [5, 1100, 520]];
        let best = Isa::detect();
        let sets: Vec<Isa> = [Isa::Portable, best].into_iter().collect();
        #[cfg(target_arch = "x86_64")]
        let sets: Vec<Isa> = sets.into_iter().chain([Isa::Avx2].into_iter().filter(|isa| *isa <= best)).collect();
        for [m, n, k] in sizes {
            let (a, b, c0) = (random(m * k, 1), random(k * n, 2), random(m * n, 3));
            let (at, bt) = (transpose(&a, m, k), transpose(&b, k, n));
            for start in [Start::Zero, Start::Output] {
                let mut expected = if start == Start::Zero { vec![0.0; m * n] } else { c0.clone() };
                chain([m, n, k], &a, &b, &mut expected);
                for isa in &sets {
                    let cpu = Cpu::with_isa(2, *isa).unwrap();
                    for a in [Operand::new(&a, k), Operand::transposed(&at, m)] {
                        for b in [Operand::new(&b, n), Operand::transposed(&bt, k)] {
                            let mut c = c0.clone();
                            gemm(&cpu, [m, n, k], a, b, &mut c, start);
                            assert!(c == expected, "{m}x{n}x{k} on {isa:?}");
                        }
                    }
                }
            }
        }
    }
}
