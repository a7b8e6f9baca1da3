//! Blocked f32 matrix product for the CPU ops: `C = A B` or `C += A B`.
//!
//! Every element of C is summed over k in one order, whatever the blocking, the tile's place, the number of threads
//! and the other rows and columns. That is what makes log-probabilities independent of the batch. There are two such
//! orders, one for each family of kernels ([`Products`]):
//!
//! * [`super::gemm_fma`]: one chain of fused multiply-adds over k = 0, 1, 2, ..., the same bits on every
//!   instruction set;
//! * [`super::gemm_amx`]: matrix tiles of bfloat16, six partial products for each 32 values of k.
//!
//! A block of columns of B is packed once and shared by all threads; each task packs the rows of A that it
//! multiplies with it. Weights are not kept packed between calls: a training step multiplies each with hundreds of
//! rows, which packing costs a few percent of, and a packed copy of every weight in two layouts would cost three times
//! the weights' memory.

use std::cell::RefCell;

use rayon::prelude::*;

use super::gemm_fma::Fma;
use super::simd::Shared;
use crate::device::{Cpu, LARGE_PAGE_BYTES, Products, Scratch};

/// A strided operand: element (i, j) at `i * row + j * col`, one of which is 1.
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

/// Where the sum of each element starts.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// At zero: `C = A B`.
    Zero,
    /// At what C holds: `C += A B`.
    Output,
}

/// A part of an operand that becomes one packed panel: `width` rows of A or columns of B, `depth` values of k.
#[derive(Clone, Copy)]
pub struct Panel<'a> {
    /// Starts at the panel's first element.
    pub data: &'a [f32],
    /// From one value of k to the next.
    pub by_depth: usize,
    /// From one row of A or column of B to the next.
    pub by_width: usize,
    pub depth: usize,
    pub width: usize,
}

/// Where the sums of a tile live: in C, or in a buffer where C ends within the tile.
#[derive(Clone, Copy)]
pub struct Sums {
    pub start: *mut f32,
    pub stride: usize,
    /// The sums start here, at zero.
    pub fresh: bool,
}

impl Sums {
    pub fn row(&self, i: usize) -> *mut f32 {
        self.start.wrapping_add(i * self.stride)
    }
}

/// A register tile and the layout of the panels that feed it.
pub trait Kernel: Copy + Sync {
    /// Rows and columns of a tile.
    const ROWS: usize;
    const COLS: usize;
    /// Blocks of k end at multiples of it.
    const DEPTH_STEP: usize;
    /// Depth of a block: its packed panels stay in the caches next to the core.
    const BLOCK_DEPTH: usize;

    /// Floats of a packed panel.
    fn panel_a(depth: usize) -> usize;
    fn panel_b(depth: usize) -> usize;
    /// Pack a panel; what lies beyond its width or depth becomes zero.
    fn pack_a(self, panel: Panel, out: &mut [f32]);
    fn pack_b(self, panel: Panel, out: &mut [f32]);
    /// The smallest height that the kernel can multiply and that holds `rows`.
    fn height(rows: usize) -> usize;
    /// Continues the sums of the first `rows` rows of a tile by `depth` terms; `rows` is a `height`.
    ///
    /// # Safety
    /// `sums` must have that many rows of `COLS` that nobody else touches.
    unsafe fn multiply(self, rows: usize, depth: usize, a: &[f32], b: &[f32], sums: Sums);
    /// What a thread does around its calls of `multiply`.
    fn session(self, work: impl FnOnce());
}

/// Columns of a block of B.
const BLOCK_COLS: usize = 2048;
/// Rows of a block of A: as many as a core's second cache holds packed.
const BLOCK_ROWS: usize = 320;
/// Bytes of packed panels at most: the block of B that threads share, and each thread's block of A. Large pages are taken
/// whole.
pub const SHARED_BYTES: usize = 3 * LARGE_PAGE_BYTES;
pub const THREAD_BYTES: usize = LARGE_PAGE_BYTES;
/// Below this many multiply-adds a parallel section costs more than it saves.
const SERIAL_WORK: usize = 1 << 16;
/// Rows of the largest tile times its columns.
const TILE_LEN: usize = 32 * 32;

/// `c` is `[m, n]` with row stride `n`; `a` is `[m, k]`, `b` is `[k, n]`.
pub fn gemm(cpu: &Cpu, dims: [usize; 3], a: Operand, b: Operand, c: &mut [f32], start: Start) {
    match cpu.products() {
        Products::Chains => blocked(cpu, Fma(cpu.isa()), dims, a, b, c, start),
        #[cfg(target_arch = "x86_64")]
        Products::Tiles => blocked(cpu, super::gemm_amx::Amx, dims, a, b, c, start),
    }
}

fn blocked<K: Kernel>(
    cpu: &Cpu,
    kernel: K,
    [m, n, k]: [usize; 3],
    a: Operand,
    b: Operand,
    c: &mut [f32],
    start: Start,
) {
    assert_eq!(c.len(), m * n, "the output of a [{m}, {k}] by [{k}, {n}] product");
    if k == 0 && start == Start::Zero {
        c.fill(0.0);
    }
    if m == 0 || n == 0 || k == 0 {
        return;
    }
    let shared = Shared::new(c);
    let mut scratch = PACKED_B.take();
    let block_depth = even_parts(k, K::BLOCK_DEPTH, K::DEPTH_STEP);
    let block_cols = even_parts(n, BLOCK_COLS, K::COLS);
    for first_col in (0..n).step_by(block_cols) {
        let cols = block_cols.min(n - first_col);
        for first_k in (0..k).step_by(block_depth) {
            let depth = block_depth.min(k - first_k);
            let fresh = first_k == 0 && start == Start::Zero;
            let block = Block { m, n, first_col, cols, first_k, depth, fresh };
            let packed_b = scratch.grown(cols.div_ceil(K::COLS) * K::panel_b(depth));
            pack_b(cpu, kernel, &block, b, packed_b);
            multiply_block(cpu, kernel, &block, a, packed_b, &shared);
        }
    }
    PACKED_B.set(scratch);
}

/// The size of the fewest parts of at most `most`, a multiple of `step` and about equal.
fn even_parts(len: usize, most: usize, step: usize) -> usize {
    len.div_ceil(len.div_ceil(most)).next_multiple_of(step)
}

thread_local! {
    static PACKED_B: RefCell<Scratch> = RefCell::default();
    static PACKED_A: RefCell<Scratch> = RefCell::default();
}

/// One `[m, cols]` stripe of C and the slice of k that is being added to it.
struct Block {
    m: usize,
    n: usize,
    first_col: usize,
    cols: usize,
    first_k: usize,
    depth: usize,
    fresh: bool,
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

fn pack_b<K: Kernel>(cpu: &Cpu, kernel: K, block: &Block, b: Operand, packed: &mut [f32]) {
    let (panels, len) = (block.cols.div_ceil(K::COLS), K::panel_b(block.depth));
    let shared = Shared::new(packed);
    for_each(cpu, block.serial(), panels, |panel| {
        // SAFETY: each task writes its own panel.
        let out = unsafe { shared.slice(panel * len, len) };
        let first = panel * K::COLS;
        let data = &b.data[block.first_k * b.row + (block.first_col + first) * b.col..];
        let width = K::COLS.min(block.cols - first);
        kernel.pack_b(Panel { data, by_depth: b.row, by_width: b.col, depth: block.depth, width }, out);
    });
}

fn pack_a<K: Kernel>(kernel: K, block: &Block, a: Operand, first_row: usize, rows: usize, packed: &mut [f32]) {
    let (panels, len) = (rows.div_ceil(K::ROWS), K::panel_a(block.depth));
    for (panel, out) in packed.chunks_exact_mut(len).take(panels).enumerate() {
        let first = panel * K::ROWS;
        let data = &a.data[(first_row + first) * a.row + block.first_k * a.col..];
        let width = K::ROWS.min(rows - first);
        kernel.pack_a(Panel { data, by_depth: a.col, by_width: a.row, depth: block.depth, width }, out);
    }
}

fn multiply_block<K: Kernel>(cpu: &Cpu, kernel: K, block: &Block, a: Operand, packed_b: &[f32], c: &Shared<f32>) {
    // Enough tasks for every thread: first by rows, then, for a few rows (decoding), by groups of columns.
    let wanted = 4 * cpu.threads();
    let rows = block.m.div_ceil(wanted).min(BLOCK_ROWS).next_multiple_of(K::ROWS);
    let row_blocks = block.m.div_ceil(rows);
    let panels = block.cols.div_ceil(K::COLS);
    let groups = wanted.div_ceil(row_blocks).min(panels);
    let group = panels.div_ceil(groups);
    let groups = panels.div_ceil(group);
    let (panel_a, panel_b) = (K::panel_a(block.depth), K::panel_b(block.depth));
    for_each(cpu, block.serial(), row_blocks * groups, |task| {
        let (row_block, group_index) = (task / groups, task % groups);
        let first_row = row_block * rows;
        let panels = group_index * group..((group_index + 1) * group).min(panels);
        let height = rows.min(block.m - first_row);
        PACKED_A.with_borrow_mut(|packed_a| {
            let packed_a = packed_a.grown(height.div_ceil(K::ROWS) * panel_a);
            pack_a(kernel, block, a, first_row, height, packed_a);
            kernel.session(|| {
                for panel in panels {
                    for first in (0..height).step_by(K::ROWS) {
                        let tile = Tile {
                            row: first_row + first,
                            rows: K::ROWS.min(height - first),
                            col: block.first_col + panel * K::COLS,
                            cols: K::COLS.min(block.cols - panel * K::COLS),
                        };
                        let a = &packed_a[first / K::ROWS * panel_a..][..panel_a];
                        multiply_tile(kernel, block, &tile, a, &packed_b[panel * panel_b..][..panel_b], c);
                    }
                }
            });
        });
    });
}

struct Tile {
    row: usize,
    rows: usize,
    col: usize,
    cols: usize,
}

/// Continues the sums of one tile by `block.depth` terms.
fn multiply_tile<K: Kernel>(kernel: K, block: &Block, tile: &Tile, a: &[f32], b: &[f32], c: &Shared<f32>) {
    let (fresh, depth) = (block.fresh, block.depth);
    let at = tile.row * block.n + tile.col;
    let rows = K::height(tile.rows);
    if tile.rows == rows && tile.cols == K::COLS {
        let sums = Sums { start: c.block(at, block.n, rows, K::COLS), stride: block.n, fresh };
        // SAFETY: the block of C is this task's own: tiles are disjoint.
        return unsafe { kernel.multiply(rows, depth, a, b, sums) };
    }
    const { assert!(K::ROWS * K::COLS <= TILE_LEN) };
    let mut buffer = [0.0f32; TILE_LEN];
    // SAFETY: as above.
    let row_of = |i: usize| unsafe { c.slice(at + i * block.n, tile.cols) };
    if !fresh {
        (0..tile.rows).for_each(|i| buffer[i * K::COLS..][..tile.cols].copy_from_slice(row_of(i)));
    }
    let sums = Sums { start: buffer.as_mut_ptr(), stride: K::COLS, fresh };
    // SAFETY: the buffer has ROWS rows of COLS.
    unsafe { kernel.multiply(rows, depth, a, b, sums) };
    (0..tile.rows).for_each(|i| row_of(i).copy_from_slice(&buffer[i * K::COLS..][..tile.cols]));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{Isa, Philox};

    const SIZES: [[usize; 3]; 9] = [
        [1, 1, 1],
        [1, 40, 300],
        [3, 31, 123],
        [13, 33, 257],
        [17, 16, 32],
        [47, 65, 31],
        [252, 123, 64],
        [5, 2100, 520],
        [130, 70, 769],
    ];

    fn random(len: usize, stream: u64) -> Vec<f32> {
        let random = Philox::new(1, stream);
        (0..len).map(|i| random.normal(i as u64) as f32).collect()
    }

    fn transpose(x: &[f32], rows: usize, cols: usize) -> Vec<f32> {
        (0..cols).flat_map(|j| (0..rows).map(move |i| x[i * cols + j])).collect()
    }

    /// Every layout of the operands and both starts on some device: the results are `expected` for `Start::Zero` and
    /// `Start::Output`.
    fn check_layouts(cpu: &Cpu, [m, n, k]: [usize; 3], expected: [&[f32]; 2], what: &str) {
        let (a, b, c0) = (random(m * k, 1), random(k * n, 2), random(m * n, 3));
        let (at, bt) = (transpose(&a, m, k), transpose(&b, k, n));
        for (start, expected) in [Start::Zero, Start::Output].into_iter().zip(expected) {
            for a in [Operand::new(&a, k), Operand::transposed(&at, m)] {
                for b in [Operand::new(&b, n), Operand::transposed(&bt, k)] {
                    let mut c = c0.clone();
                    gemm(cpu, [m, n, k], a, b, &mut c, start);
                    assert!(c == expected, "{m}x{n}x{k}, {what}");
                }
            }
        }
    }

    /// The definition: one chain of fused multiply-adds per element.
    fn chain([m, n, k]: [usize; 3], a: &[f32], b: &[f32], c: &mut [f32]) {
        for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
            for p in 0..k {
                c[i * n + j] = a[i * k + p].mul_add(b[p * n + j], c[i * n + j]);
            }
        }
    }

    #[test]
    fn chains_are_equal_bit_for_bit_for_every_shape_layout_and_instruction_set() {
        let best = Isa::detect();
        let sets: Vec<Isa> = [Isa::Portable, best].into_iter().collect();
        #[cfg(target_arch = "x86_64")]
        let sets: Vec<Isa> = sets.into_iter().chain([Isa::Avx2].into_iter().filter(|isa| *isa <= best)).collect();
        for [m, n, k] in SIZES {
            let (a, b) = (random(m * k, 1), random(k * n, 2));
            let expected = [vec![0.0; m * n], random(m * n, 3)].map(|mut c| {
                chain([m, n, k], &a, &b, &mut c);
                c
            });
            for isa in &sets {
                let cpu = Cpu::with_isa(2, *isa).unwrap();
                check_layouts(&cpu, [m, n, k], expected.each_ref().map(Vec::as_slice), &format!("{isa:?}"));
            }
        }
    }

    /// What the matrix unit does with one element, in the words of Intel's manual: six partial products for each 32
    /// values of k; in each, even and odd values are chains of their own. Numbers below 2^-126 do not occur here.
    #[cfg(target_arch = "x86_64")]
    fn tile_sum(a: &[f32], b: &[f32], mut sum: f32) -> f32 {
        let piece = |x: f32, piece: usize| {
            let high = |x: f32| f32::from_bits(x.to_bits() & 0xffff_0000);
            let mut rest = x;
            (0..piece).for_each(|_| rest -= high(rest));
            high(rest)
        };
        for (a, b) in a.chunks(32).zip(b.chunks(32)) {
            for (p, q) in [(0, 2), (0, 1), (0, 0), (2, 0), (1, 0), (1, 1)] {
                let mut halves = [0.0f32; 2];
                for (i, (a, b)) in a.iter().zip(b).enumerate() {
                    halves[i % 2] = piece(*a, p).mul_add(piece(*b, q), halves[i % 2]);
                }
                sum += halves[0] + halves[1];
            }
        }
        sum
    }

    /// The bits are those of the definition, so they depend on nothing but the element's own row and column.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn tiles_are_equal_bit_for_bit_for_every_shape_layout_and_number_of_threads() {
        if Products::detect() != Products::Tiles {
            return eprintln!("this machine has no AMX: nothing was tested");
        }
        for [m, n, k] in SIZES {
            let (a, bt) = (random(m * k, 1), transpose(&random(k * n, 2), k, n));
            let expected = [vec![0.0; m * n], random(m * n, 3)].map(|mut c| {
                for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                    c[i * n + j] = tile_sum(&a[i * k..][..k], &bt[j * k..][..k], c[i * n + j]);
                }
                c
            });
            for threads in [1, 3] {
                let cpu = Cpu::new(threads).unwrap();
                let what = format!("{threads} threads");
                check_layouts(&cpu, [m, n, k], expected.each_ref().map(Vec::as_slice), &what);
            }
        }
    }

    /// Against f64, over sums of mixed sign and size: no family's error is above twice that of the plain chain.
    #[test]
    fn every_family_is_as_accurate_as_the_chain() {
        let [m, n, k] = [48, 48, 1536];
        let wild =
            |stream| random(2 * m * k, stream).chunks(2).map(|x| x[0] * (2.0 * x[1]).exp()).collect::<Vec<f32>>();
        let (a, bt) = (wild(1), wild(2));
        let worst = |c: &[f32]| {
            let error = |(at, c): (usize, &f32)| {
                let terms = a[at / n * k..][..k].iter().zip(&bt[at % n * k..][..k]);
                let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), (a, b)| {
                    let product = f64::from(*a) * f64::from(*b);
                    (sum + product, size + product.abs())
                });
                (f64::from(*c) - sum).abs() / size
            };
            c.iter().enumerate().map(error).fold(0.0, f64::max)
        };
        let run = |cpu: &Cpu| {
            let mut c = vec![0.0; m * n];
            gemm(cpu, [m, n, k], Operand::new(&a, k), Operand::transposed(&bt, k), &mut c, Start::Zero);
            worst(&c)
        };
        let chain = run(&Cpu::with_isa(1, Isa::Portable).unwrap());
        let fastest = run(&Cpu::new(1).unwrap());
        println!("largest error / sum of sizes: chain {chain:.2e}, {:?} {fastest:.2e}", Products::detect());
        assert!(chain < 1e-5 && fastest <= 2.0 * chain, "chain {chain:e}, fastest {fastest:e}");
    }

    #[test]
    fn what_is_no_number_stays_visible_in_its_row_alone() {
        let cpu = Cpu::new(1).unwrap();
        let [m, n, k] = [40, 40, 70];
        for bad in [f32::NAN, f32::INFINITY] {
            let (mut a, b) = (random(m * k, 1), random(k * n, 2));
            a[7 * k + 65] = bad;
            let mut c = vec![0.0; m * n];
            gemm(&cpu, [m, n, k], Operand::new(&a, k), Operand::new(&b, n), &mut c, Start::Zero);
            assert!(c.chunks(n).enumerate().all(|(i, row)| row.iter().all(|x| x.is_finite() != (i == 7))));
        }
    }
}
