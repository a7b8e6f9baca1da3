//! The tile of Intel's matrix unit (AMX): 32 rows by 32 columns in four tile registers, f32 in and out.
//!
//! The unit multiplies bfloat16 and sums in f32. A float has 24 significant bits and a bfloat16 has 8, so each x is
//! cut, exactly, into three: `x = x0 + x1 + x2`, from high to low. Of the nine partial products of x and y the six with
//! `i + j <= 2` are summed; the others are below `2^-23 |x y|`, less than the rounding of one f32 multiplication
//! (Henry, Tang, Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision
//! Computations", arXiv:1904.06376). Six instructions of 16 times the rate leave 2.7 times the rate of AVX-512.
//!
//! For each 32 values of k (a step), in this order: x0 y2, x0 y1, x0 y0, x2 y0, x1 y0, x1 y1. Within one of these the unit
//! sums the products of even and of odd k apart and adds both to the element: TDPBF16PS in Intel's manual. Numbers
//! below 2^-126 count as zero. An infinity becomes NaN: its x1 is infinity minus infinity.
//!
//! Where every number of a panel of B has 8 significant bits, as the weights of most published models do, or 16, its lower pieces
//! are zeros: the three products with them, or the one, are left out, and the bits stay the same.
//!
//! Of few rows [`AmxTurned`] makes the transposed product: a weight's rows then are rows of the unit's A, whose layout needs no
//! transposition. The partial products have the same order, and a product of two numbers has no order, so the bits are the same.
//!
//! Panels hold, for each step, three pieces of two tiles of 16 rows of 64 bytes. Of A a row is a row and 32 values of k; of B a
//! row is a pair of k and 16 columns.

use std::arch::asm;
use std::arch::x86_64::*;

use half::bf16;

use super::gemm::{Columns, FewRows, Kernel, Panel, Sums, pack_widened};

/// Rows (of A) or columns (of B) of a tile register.
const HALF: usize = 16;
const TILE: usize = 2 * HALF;
/// Values of k of a step.
const STEP: usize = 32;
/// Floats that one tile register takes in a panel, and the two tiles of one piece.
const REGISTER_LEN: usize = HALF * STEP / 2;
const PIECE_LEN: usize = 2 * REGISTER_LEN;
const STEP_LEN: usize = 3 * PIECE_LEN;
/// Values of k by which rows of bfloat16 are asked for before they are read.
const AHEAD: usize = 2 * STEP;

/// The instructions are there and the system lets this process use them: see `device::Cpu`.
#[derive(Clone, Copy)]
pub struct Amx;

impl Kernel for Amx {
    const ROWS: usize = TILE;
    const COLS: usize = TILE;
    /// Of 3, 6, 12 and 18 steps the best: sums go to memory and back once for each pass, and C is further away than B.
    const DEPTH: usize = 18 * STEP;

    fn panel_a(depth: usize) -> usize {
        depth.div_ceil(STEP) * STEP_LEN
    }

    fn panel_b(depth: usize) -> usize {
        depth.div_ceil(STEP) * STEP_LEN
    }

    fn pack_a(self, panel: Panel<&[f32]>, out: &mut [f32]) {
        // SAFETY: whoever made an `Amx` saw that the machine has AVX-512.
        unsafe { pack::<3>(panel, Operand::A, out) }
    }

    fn pack_b(self, panel: Panel<&[f32]>, out: &mut [f32]) -> usize {
        // SAFETY: as above.
        unsafe { pack_pieces(panel, Operand::B, out) }
    }

    /// Few rows cost as much as all: packing B for them costs several times more.
    fn height(_: usize) -> usize {
        TILE
    }

    unsafe fn multiply(self, _: usize, depth: usize, a: &[f32], b: Columns, sums: Sums) {
        let steps = steps(depth, a, b);
        // SAFETY: panels of `steps` steps (just asserted); the sums as promised by the caller; a prefetch may name any
        // address.
        unsafe {
            // The tile below comes next. C is far from the core, and a tile's loads would all wait for it.
            for i in TILE..2 * TILE {
                let line = sums.row(i).cast::<i8>();
                _mm_prefetch::<_MM_HINT_T0>(line);
                _mm_prefetch::<_MM_HINT_T0>(line.wrapping_add(64));
            }
            let multiply = [multiply_1, multiply_2, multiply_3][b.pieces - 1];
            multiply(steps, a.as_ptr(), b.data.as_ptr(), sums);
        }
    }

    /// Tile registers are configured for the work and given up after it: a thread that holds none is cheap to switch.
    fn session(self, work: impl FnOnce()) {
        let config = TileConfig::new();
        // SAFETY: a valid configuration of palette 1, on a machine that has it.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, readonly)) };
        work();
        // SAFETY: as above.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// Steps of a piece of two packed panels, which are so long.
fn steps(depth: usize, a: &[f32], b: Columns) -> usize {
    let steps = depth.div_ceil(STEP);
    assert!(a.len() >= steps * STEP_LEN && b.data.len() >= steps * STEP_LEN && steps > 0);
    steps
}

/// The same product with its sides exchanged: `C^T = B^T A^T`, transposed on its way to C.
#[derive(Clone, Copy)]
pub struct AmxTurned;

impl Kernel for AmxTurned {
    const ROWS: usize = TILE;
    const COLS: usize = TILE;
    /// Of 1, 2, 3, 4, 6, 9, 12 and 18 steps the best: what is packed is still near when the last rows meet it.
    const DEPTH: usize = 12 * STEP;

    fn panel_a(depth: usize) -> usize {
        Amx::panel_b(depth)
    }

    fn panel_b(depth: usize) -> usize {
        Amx::panel_a(depth)
    }

    fn pack_a(self, panel: Panel<&[f32]>, out: &mut [f32]) {
        // SAFETY: as for `Amx`.
        unsafe { pack::<3>(panel, Operand::B, out) }
    }

    fn pack_b(self, panel: Panel<&[f32]>, out: &mut [f32]) -> usize {
        // SAFETY: as for `Amx`.
        unsafe { pack_pieces(panel, Operand::A, out) }
    }

    /// They are tiles already.
    fn pack_b_bf16(self, panel: Panel<&[bf16]>, out: &mut [f32]) -> usize {
        // SAFETY: as above.
        match panel.by_depth == 1 && unsafe { pack_rows_as_they_are(&panel, out) } {
            true => 1,
            false => pack_widened(self, panel, out),
        }
    }

    fn height(rows: usize) -> usize {
        if rows <= HALF { HALF } else { TILE }
    }

    /// The sums are those of C^T.
    unsafe fn multiply(self, rows: usize, depth: usize, a: &[f32], b: Columns, sums: Sums) {
        let steps = steps(depth, a, b);
        let multiply = match rows {
            HALF => [multiply_turned_half_1, multiply_turned_half_2, multiply_turned_half_3],
            _ => [multiply_turned_1, multiply_turned_2, multiply_turned_3],
        }[b.pieces - 1];
        // SAFETY: panels of `steps` steps; the sums as promised by the caller.
        unsafe { multiply(steps, b.data.as_ptr(), a.as_ptr(), sums) }
    }

    fn session(self, work: impl FnOnce()) {
        Amx.session(work);
    }
}

impl FewRows for AmxTurned {
    unsafe fn take(self, rows: usize, c: Sums, buffer: Sums) {
        // SAFETY: as promised by the caller; whoever made an `AmxTurned` saw that the machine has AVX-512.
        unsafe { turn([TILE, rows], c, buffer) }
    }

    unsafe fn give(self, rows: usize, buffer: Sums, c: Sums) {
        // SAFETY: as above.
        unsafe { turn([rows, TILE], buffer, c) }
    }
}

/// `to[i][j] = from[j][i]` for a `to` of whole squares of 16.
///
/// # Safety
/// `from` and `to` have so many rows and columns, and the machine has AVX-512.
#[target_feature(enable = "avx512f")]
unsafe fn turn([rows, cols]: [usize; 2], from: Sums, to: Sums) {
    for row in (0..rows).step_by(HALF) {
        for col in (0..cols).step_by(HALF) {
            // SAFETY: squares of 16 lie in both, as promised by the caller.
            unsafe {
                let square = std::array::from_fn(|j| _mm512_loadu_ps(from.row(col + j).add(row)));
                for (i, line) in transpose(square).into_iter().enumerate() {
                    _mm512_storeu_ps(to.row(row + i).add(col), line);
                }
            }
        }
    }
}

/// The operand of LDTILECFG: every tile register has 16 rows of 64 bytes.
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl TileConfig {
    const REGISTERS: usize = 8;

    fn new() -> Self {
        let mut config = Self { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        config.row_bytes[..Self::REGISTERS].fill(64);
        config.rows[..Self::REGISTERS].fill(HALF as u8);
        config
    }
}

/// Loads two registers with a piece of a step of a panel: those of the unit's A are 4 and 5, those of its B 6 and 7.
macro_rules! load {
    ($low:literal, $high:literal, $panel:literal, $at:literal, $next:literal) => {
        concat!(
            "tileloadd tmm",
            $low,
            ", [{",
            $panel,
            "} + {line} + ",
            $at,
            "]\n",
            "tileloadd tmm",
            $high,
            ", [{",
            $panel,
            "} + {line} + ",
            $next,
            "]"
        )
    };
    (a 0) => {
        load!(4, 5, "a", 0, 1024)
    };
    (a 1) => {
        load!(4, 5, "a", 2048, 3072)
    };
    (a 2) => {
        load!(4, 5, "a", 4096, 5120)
    };
    (b 0) => {
        load!(6, 7, "b", 0, 1024)
    };
    (b 1) => {
        load!(6, 7, "b", 2048, 3072)
    };
    (b 2) => {
        load!(6, 7, "b", 4096, 5120)
    };
}

/// Adds the products of the two loaded registers of A with the two of B.
macro_rules! products {
    () => {
        "tdpbf16ps tmm0, tmm4, tmm6\ntdpbf16ps tmm1, tmm4, tmm7\ntdpbf16ps tmm2, tmm5, tmm6\ntdpbf16ps tmm3, tmm5, tmm7"
    };
    (half) => {
        "tdpbf16ps tmm0, tmm4, tmm6\ntdpbf16ps tmm2, tmm5, tmm6"
    };
}

/// A function that continues 32 by 32 sums in registers 0 to 3 (two by two), or the left 16 columns of them, by `steps` steps of
/// the given instructions.
///
/// # Safety
/// Of what it defines: `a` and `b` are panels of `steps` steps, `sums` has so many rows and columns, and a session is open.
macro_rules! continue_sums {
    ($name:ident, $($step:expr),* $(,)?) => {
        continue_sums!(
            @ $name,
            "tileloadd tmm0, [{c} + {stride}]\ntileloadd tmm1, [{c} + {stride} + 64]\n\
             tileloadd tmm2, [{low} + {stride}]\ntileloadd tmm3, [{low} + {stride} + 64]",
            "tilezero tmm0\ntilezero tmm1\ntilezero tmm2\ntilezero tmm3",
            "tilestored [{c} + {stride}], tmm0\ntilestored [{c} + {stride} + 64], tmm1\n\
             tilestored [{low} + {stride}], tmm2\ntilestored [{low} + {stride} + 64], tmm3",
            $($step),*
        );
    };
    (half $name:ident, $($step:expr),* $(,)?) => {
        continue_sums!(
            @ $name,
            "tileloadd tmm0, [{c} + {stride}]\ntileloadd tmm2, [{low} + {stride}]",
            "tilezero tmm0\ntilezero tmm2",
            "tilestored [{c} + {stride}], tmm0\ntilestored [{low} + {stride}], tmm2",
            $($step),*
        );
    };
    (@ $name:ident, $fetch:expr, $zero:expr, $store:expr, $($step:expr),*) => {
        unsafe fn $name(steps: usize, a: *const f32, b: *const f32, sums: Sums) {
            // SAFETY: reads the panels and reads and writes the sums, as promised by the caller.
            unsafe {
                asm!(
                    "test {fresh}, {fresh}",
                    "jnz 2f",
                    $fetch,
                    "jmp 3f",
                    "2:",
                    $zero,
                    "3:",
                    $($step,)*
                    "add {a}, 6144",
                    "add {b}, 6144",
                    "dec {steps}",
                    "jnz 3b",
                    $store,
                    fresh = in(reg) usize::from(sums.fresh),
                    c = in(reg) sums.start,
                    low = in(reg) sums.row(HALF),
                    stride = in(reg) sums.stride * size_of::<f32>(),
                    line = in(reg) 64usize,
                    a = inout(reg) a => _,
                    b = inout(reg) b => _,
                    steps = inout(reg) steps => _,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    };
}

// x is the unit's A: x0 with y2, y1 and y0, then x2 and x1 with y0, then x1 with y1.
#[rustfmt::skip]
continue_sums!(
    multiply_3,
    load!(a 0), load!(b 2), products!(), load!(b 1), products!(), load!(b 0), products!(),
    load!(a 2), products!(), load!(a 1), products!(), load!(b 1), products!(),
);
#[rustfmt::skip]
continue_sums!(
    multiply_2,
    load!(a 0), load!(b 1), products!(), load!(b 0), products!(),
    load!(a 2), products!(), load!(a 1), products!(), load!(b 1), products!(),
);
#[rustfmt::skip]
continue_sums!(
    multiply_1,
    load!(a 0), load!(b 0), products!(), load!(a 2), products!(), load!(a 1), products!(),
);

// x is the unit's B; the order is the same.
#[rustfmt::skip]
continue_sums!(
    multiply_turned_3,
    load!(b 0), load!(a 2), products!(), load!(a 1), products!(), load!(a 0), products!(),
    load!(b 2), products!(), load!(b 1), products!(), load!(a 1), products!(),
);
#[rustfmt::skip]
continue_sums!(
    multiply_turned_2,
    load!(b 0), load!(a 1), products!(), load!(a 0), products!(),
    load!(b 2), products!(), load!(b 1), products!(), load!(a 1), products!(),
);
#[rustfmt::skip]
continue_sums!(
    multiply_turned_1,
    load!(a 0), load!(b 0), products!(), load!(b 2), products!(), load!(b 1), products!(),
);
#[rustfmt::skip]
continue_sums!(
    half multiply_turned_half_3,
    load!(b 0), load!(a 2), products!(half), load!(a 1), products!(half), load!(a 0), products!(half),
    load!(b 2), products!(half), load!(b 1), products!(half), load!(a 1), products!(half),
);
#[rustfmt::skip]
continue_sums!(
    half multiply_turned_half_2,
    load!(b 0), load!(a 1), products!(half), load!(a 0), products!(half),
    load!(b 2), products!(half), load!(b 1), products!(half), load!(a 1), products!(half),
);
#[rustfmt::skip]
continue_sums!(
    half multiply_turned_half_1,
    load!(a 0), load!(b 0), products!(half), load!(b 2), products!(half), load!(b 1), products!(half),
);

/// Which side of the product a panel is on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Operand {
    A,
    B,
}

/// Packs the pieces that are not all zeros, and returns their number.
#[target_feature(enable = "avx512f,avx512bw")]
fn pack_pieces(panel: Panel<&[f32]>, operand: Operand, out: &mut [f32]) -> usize {
    let pieces = pieces(&panel);
    match pieces {
        1 => pack::<1>(panel, operand, out),
        2 => pack::<2>(panel, operand, out),
        _ => pack::<3>(panel, operand, out),
    }
    pieces
}

/// Into how many bfloat16 the numbers of a panel can be cut. Where that is three, the first ones say so; where not, this brings
/// them into the cache.
#[target_feature(enable = "avx512f")]
fn pieces(panel: &Panel<&[f32]>) -> usize {
    let Panel { data, by_depth, by_width, depth, width } = *panel;
    let (stride, lines, len) = if by_depth == 1 { (by_width, width, depth) } else { (by_depth, depth, width) };
    // All bits that occur, and the largest exponent: of an infinity the lower pieces are no zeros.
    let (mut bits, mut most) = (_mm512_setzero_si512(), _mm512_setzero_si512());
    for line in 0..lines {
        let line = &data[line * stride..][..len];
        for at in (0..len).step_by(HALF) {
            let x = _mm512_castps_si512(load(&line[at..], len - at, len));
            bits = _mm512_or_si512(bits, x);
            most = _mm512_max_epu32(most, _mm512_and_si512(x, _mm512_set1_epi32(NOT_FINITE)));
        }
        if _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0xff)) != 0 {
            return 3;
        }
    }
    match _mm512_cmpeq_epi32_mask(most, _mm512_set1_epi32(NOT_FINITE)) {
        0 if _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0xffff)) == 0 => 1,
        0 => 2,
        _ => 3,
    }
}

/// The exponent of what is no finite number.
const NOT_FINITE: i32 = 0x7f80_0000;

/// Rows of bfloat16, each contiguous along k, become tiles of A as they are, unless one is not finite.
#[target_feature(enable = "avx512f,avx512bw")]
fn pack_rows_as_they_are(panel: &Panel<&[bf16]>, out: &mut [f32]) -> bool {
    let data: &[u16] = bytemuck::cast_slice(panel.data);
    let (exponent, mut finite) = (_mm512_set1_epi16((NOT_FINITE >> 16) as i16), true);
    for (step, out) in out.chunks_exact_mut(STEP_LEN).enumerate() {
        let first = step * STEP;
        let len = STEP.min(panel.depth - first);
        let mask = u32::MAX >> (STEP - len);
        for i in 0..TILE {
            let mut line = _mm512_setzero_si512();
            if i < panel.width {
                let row = &data[i * panel.by_width + first..];
                _mm_prefetch::<_MM_HINT_T0>(row.as_ptr().wrapping_add(AHEAD).cast());
                assert!(row.len() >= len);
                // SAFETY: reads only what the mask names, which is there (just asserted).
                line = unsafe { _mm512_maskz_loadu_epi16(mask, row.as_ptr().cast()) };
            }
            let exponents = _mm512_and_si512(line, exponent);
            finite &= _mm512_cmpeq_epi16_mask(exponents, exponent) == 0;
            store(&mut out[i * HALF..], _mm512_castsi512_ps(line));
        }
    }
    finite
}

/// The first `PIECES` pieces of each step.
#[target_feature(enable = "avx512f,avx512bw")]
fn pack<const PIECES: usize>(panel: Panel<&[f32]>, operand: Operand, out: &mut [f32]) {
    let mut turned = [0.0f32; TILE * STEP];
    for (step, out) in out.chunks_exact_mut(STEP_LEN).enumerate() {
        let mut part = Part::of(&panel, step * STEP);
        // A layout wants one dimension contiguous: k for A, columns for B.
        match operand {
            Operand::A => {
                if part.by_depth != 1 {
                    part = part.turned(&mut turned);
                }
                pack_rows::<PIECES>(&part, out);
            }
            Operand::B => {
                if part.by_width != 1 {
                    part = part.turned(&mut turned);
                }
                pack_pairs::<PIECES>(&part, out);
            }
        }
    }
}

/// 32 rows or columns and 32 values of k of a panel, as far as the panel reaches.
struct Part<'a> {
    data: &'a [f32],
    by_depth: usize,
    by_width: usize,
    depth: usize,
    width: usize,
}

impl<'a> Part<'a> {
    fn of(panel: &Panel<&'a [f32]>, first_k: usize) -> Self {
        let Panel { data, by_depth, by_width, depth, width } = *panel;
        Self { data: &data[first_k * by_depth..], by_depth, by_width, depth: (depth - first_k).min(STEP), width }
    }

    /// The same part with the other dimension contiguous: a copy in `out`, in squares of 16 by 16.
    #[target_feature(enable = "avx512f")]
    fn turned(self, out: &mut [f32; TILE * STEP]) -> Part<'_> {
        let by_row = self.by_depth.max(self.by_width);
        let by_depth = self.by_depth == by_row;
        let (rows, cols) = if by_depth { (self.depth, self.width) } else { (self.width, self.depth) };
        // The same rows and columns one step further down k.
        let ahead = if by_depth { STEP * by_row } else { 2 * STEP };
        for (row, col) in [(0, 0), (0, HALF), (HALF, 0), (HALF, HALF)] {
            let mut square = [_mm512_setzero_ps(); HALF];
            if col < cols {
                for (i, line) in square.iter_mut().enumerate().take(rows.saturating_sub(row)) {
                    *line = load(&self.data[(row + i) * by_row + col..], cols - col, ahead);
                }
            }
            for (i, line) in transpose(square).into_iter().enumerate() {
                store(&mut out[(col + i) * TILE + row..], line);
            }
        }
        let [by_depth, by_width] = if by_depth { [1, TILE] } else { [TILE, 1] };
        Part { data: out, by_depth, by_width, depth: self.depth, width: self.width }
    }
}

/// Up to 16 floats, zero beyond `len`. What lies `ahead` will be wanted soon: there are too many rows at once for the
/// hardware to see that each is read in order.
#[target_feature(enable = "avx512f")]
fn load(from: &[f32], len: usize, ahead: usize) -> __m512 {
    _mm_prefetch::<_MM_HINT_T0>(from.as_ptr().wrapping_add(ahead).cast());
    let mask = if len >= HALF { u16::MAX } else { (1 << len) - 1 };
    assert!(from.len() >= len.min(HALF));
    // SAFETY: reads only what the mask names, which is there (just asserted).
    unsafe { _mm512_maskz_loadu_ps(mask, from.as_ptr()) }
}

#[target_feature(enable = "avx512f")]
fn store(to: &mut [f32], line: __m512) {
    assert!(to.len() >= HALF);
    // SAFETY: 16 floats are there (just asserted).
    unsafe { _mm512_storeu_ps(to.as_mut_ptr(), line) }
}

/// Columns become rows.
#[target_feature(enable = "avx512f")]
fn transpose(r: [__m512; HALF]) -> [__m512; HALF] {
    // Pairs of rows, pairs of pairs, then 128-bit quarters twice.
    let mut pairs = r;
    for i in 0..8 {
        pairs[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        pairs[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    let mut fours = pairs;
    for i in (0..HALF).step_by(4) {
        for h in 0..2 {
            let (low, high) = (_mm512_castps_pd(pairs[i + h]), _mm512_castps_pd(pairs[i + 2 + h]));
            fours[i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
            fours[i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
        }
    }
    let mut columns = fours;
    for j in 0..4 {
        let [a, b, c, d] = [fours[j], fours[4 + j], fours[8 + j], fours[12 + j]];
        let (low, high) = (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0x88>(c, d));
        columns[j] = _mm512_shuffle_f32x4::<0x88>(low, high);
        columns[8 + j] = _mm512_shuffle_f32x4::<0xdd>(low, high);
        let (low, high) = (_mm512_shuffle_f32x4::<0xdd>(a, b), _mm512_shuffle_f32x4::<0xdd>(c, d));
        columns[4 + j] = _mm512_shuffle_f32x4::<0x88>(low, high);
        columns[12 + j] = _mm512_shuffle_f32x4::<0xdd>(low, high);
    }
    columns
}

/// The high halves of floats: sign, exponent and the first 8 significant bits.
const HIGH: i32 = 0xffff_0000_u32 as i32;

/// What is left of x after its highest bfloat16; exact.
#[target_feature(enable = "avx512f")]
fn rest(x: __m512) -> __m512 {
    let high = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(HIGH));
    _mm512_sub_ps(x, _mm512_castsi512_ps(high))
}

/// Tiles of A: a row is a row and its 32 values of k.
#[target_feature(enable = "avx512f,avx512bw")]
fn pack_rows<const PIECES: usize>(part: &Part, out: &mut [f32]) {
    // The upper 16-bit halves of two vectors, one after the other.
    let odd: [u16; 32] = std::array::from_fn(|i| 2 * i as u16 + 1);
    // SAFETY: 64 bytes are read from an array of 64.
    let odd = unsafe { _mm512_loadu_si512(odd.as_ptr().cast()) };
    for i in 0..TILE {
        let [mut low, mut high] = [_mm512_setzero_ps(); 2];
        if i < part.width {
            let row = &part.data[i * part.by_width..];
            low = load(row, part.depth, 2 * STEP);
            if part.depth > HALF {
                high = load(&row[HALF..], part.depth - HALF, 2 * STEP);
            }
        }
        for piece in 0..PIECES {
            let halves = _mm512_permutex2var_epi16(_mm512_castps_si512(low), odd, _mm512_castps_si512(high));
            store(&mut out[piece * PIECE_LEN + i * HALF..], _mm512_castsi512_ps(halves));
            (low, high) = (rest(low), rest(high));
        }
    }
}

/// Tiles of B: a row is a pair of values of k, each with 16 columns.
#[target_feature(enable = "avx512f")]
fn pack_pairs<const PIECES: usize>(part: &Part, out: &mut [f32]) {
    let ahead = STEP * part.by_depth;
    for half in 0..2 * HALF {
        let (pair, first) = (half / 2, half % 2 * HALF);
        let line = |k: usize| match k < part.depth && first < part.width {
            true => load(&part.data[k * part.by_depth + first..], part.width - first, ahead),
            false => _mm512_setzero_ps(),
        };
        let (mut even, mut odd) = (line(2 * pair), line(2 * pair + 1));
        for piece in 0..PIECES {
            let low = _mm512_srli_epi32::<16>(_mm512_castps_si512(even));
            let high = _mm512_and_si512(_mm512_castps_si512(odd), _mm512_set1_epi32(HIGH));
            let at = piece * PIECE_LEN + first / HALF * REGISTER_LEN + pair * HALF;
            store(&mut out[at..], _mm512_castsi512_ps(_mm512_or_si512(low, high)));
            (even, odd) = (rest(even), rest(odd));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Philox;

    /// Packing needs no tiles, so that it is tested wherever there is AVX-512.
    #[test]
    fn bfloat16_is_packed_as_it_is() {
        if !is_x86_feature_detected!("avx512f") || !is_x86_feature_detected!("avx512bw") {
            return eprintln!("this machine has no AVX-512: nothing was tested");
        }
        let random = Philox::new(1, 1);
        for [width, depth, stride] in
            [[32_usize, 64_usize, 64], [32, 32, 97], [5, 33, 40], [1, 1, 1], [31, 95, 96], [17, 63, 63]]
        {
            let mut data: Vec<bf16> =
                (0..width * stride).map(|i| bf16::from_f32(random.normal(i as u64) as f32)).collect();
            let wide: Vec<f32> = data.iter().map(|x| x.to_f32()).collect();
            let steps = depth.div_ceil(STEP);
            let [mut found, mut expected] = [(); 2].map(|()| vec![7.0; steps * STEP_LEN]);
            let panel = Panel { data: &data[..], by_depth: 1, by_width: stride, depth, width };
            let of_f32 = Panel { data: &wide[..], by_depth: 1, by_width: stride, depth, width };
            // SAFETY: the features are there (just asked).
            unsafe {
                assert!(pack_rows_as_they_are(&panel, &mut found));
                assert_eq!(pack_pieces(of_f32, Operand::A, &mut expected), 1);
            }
            let bits = |packed: &[f32]| packed.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert!(bits(&found) == bits(&expected), "{width} x {depth}, {stride} apart");
            for bad in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
                let at = (width - 1) * stride + depth - 1;
                let was = std::mem::replace(&mut data[at], bf16::from_f32(bad));
                let panel = Panel { data: &data[..], by_depth: 1, by_width: stride, depth, width };
                let wide: Vec<f32> = data.iter().map(|x| x.to_f32()).collect();
                let of_f32 = Panel { data: &wide[..], by_depth: 1, by_width: stride, depth, width };
                // SAFETY: as above.
                unsafe {
                    assert!(!pack_rows_as_they_are(&panel, &mut found), "{bad} has lower pieces");
                    assert_eq!(pack_pieces(of_f32, Operand::A, &mut expected), 3, "{bad}");
                }
                data[at] = was;
            }
        }
    }
}
