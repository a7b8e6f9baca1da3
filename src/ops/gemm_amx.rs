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
//! Of few rows [`AmxTurned`] makes the transposed product: a weight's rows then are rows of the unit's A, whose layout needs no
//! transposition. The partial products have the same order, and a product of two numbers has no order, so the bits are the same.
//!
//! Panels hold, for each step, three pieces of two tiles of 16 rows of 64 bytes. Of A a row is a row and 32 values of k; of B a
//! row is a pair of k and 16 columns.

use std::arch::asm;
use std::arch::x86_64::*;

use super::gemm::{Kernel, Panel, Sums};

/// Rows (of A) or columns (of B) of a tile register.
const HALF: usize = 16;
const TILE: usize = 2 * HALF;
/// Values of k of a step.
const STEP: usize = 32;
/// Floats that one tile register takes in a panel, and the two tiles of one piece.
const REGISTER_LEN: usize = HALF * STEP / 2;
const PIECE_LEN: usize = 2 * REGISTER_LEN;
const STEP_LEN: usize = 3 * PIECE_LEN;

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

    fn pack_a(self, panel: Panel, out: &mut [f32]) {
        // SAFETY: whoever made an `Amx` saw that the machine has AVX-512.
        unsafe { pack(panel, Operand::A, out) }
    }

    fn pack_b(self, panel: Panel, out: &mut [f32]) {
        // SAFETY: as above.
        unsafe { pack(panel, Operand::B, out) }
    }

    /// Few rows cost as much as all: packing B for them costs several times more.
    fn height(_: usize) -> usize {
        TILE
    }

    unsafe fn multiply(self, _: usize, depth: usize, a: &[f32], b: &[f32], sums: Sums) {
        let steps = depth.div_ceil(STEP);
        assert!(a.len() >= steps * STEP_LEN && b.len() >= steps * STEP_LEN && steps > 0);
        // SAFETY: panels of `steps` steps (just asserted); the sums as promised by the caller; a prefetch may name any
        // address.
        unsafe {
            // The tile below comes next. C is far from the core, and a tile's loads would all wait for it.
            for i in TILE..2 * TILE {
                let line = sums.row(i).cast::<i8>();
                _mm_prefetch::<_MM_HINT_T0>(line);
                _mm_prefetch::<_MM_HINT_T0>(line.wrapping_add(64));
            }
            multiply(steps, a.as_ptr(), b.as_ptr(), sums);
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

/// The same product with its sides exchanged: `C^T = B^T A^T`, transposed on its way to C.
#[derive(Clone, Copy)]
pub struct AmxTurned;

impl Kernel for AmxTurned {
    const ROWS: usize = TILE;
    const COLS: usize = TILE;
    /// A pass fits the second-level cache, beside the rows.
    const DEPTH: usize = 48 * STEP;

    fn panel_a(depth: usize) -> usize {
        Amx::panel_b(depth)
    }

    fn panel_b(depth: usize) -> usize {
        Amx::panel_a(depth)
    }

    fn pack_a(self, panel: Panel, out: &mut [f32]) {
        Amx.pack_b(panel, out);
    }

    fn pack_b(self, panel: Panel, out: &mut [f32]) {
        Amx.pack_a(panel, out);
    }

    fn height(rows: usize) -> usize {
        if rows <= HALF { HALF } else { TILE }
    }

    unsafe fn multiply(self, rows: usize, depth: usize, a: &[f32], b: &[f32], sums: Sums) {
        let steps = depth.div_ceil(STEP);
        assert!(a.len() >= steps * STEP_LEN && b.len() >= steps * STEP_LEN && steps > 0);
        let mut turned = Turned([0.0; TILE * TILE]);
        let to = Sums { start: turned.0.as_mut_ptr(), stride: TILE, fresh: sums.fresh };
        // SAFETY: panels of `steps` steps (just asserted); `turned` has 32 rows of 32, the sums as promised by the caller. Whoever
        // made an `AmxTurned` saw that the machine has AVX-512.
        unsafe {
            if !sums.fresh {
                turn([TILE, rows], sums, to);
            }
            match rows {
                HALF => multiply_turned_half(steps, b.as_ptr(), a.as_ptr(), to),
                _ => multiply_turned(steps, b.as_ptr(), a.as_ptr(), to),
            }
            turn([rows, TILE], to, sums);
        }
    }

    fn session(self, work: impl FnOnce()) {
        Amx.session(work);
    }
}

/// A tile of C^T.
#[repr(C, align(64))]
struct Turned([f32; TILE * TILE]);

/// `to[i][j] = from[j][i]` for a `to` of whole squares of 16.
///
/// # Safety
/// `from` and `to` have so many rows and columns, and the machine has AVX-512.
#[target_feature(enable = "avx512f")]
unsafe fn turn([rows, cols]: [usize; 2], from: Sums, to: Sums) {
    for (row, col) in (0..rows).step_by(HALF).flat_map(|row| (0..cols).step_by(HALF).map(move |col| (row, col))) {
        // SAFETY: squares of 16 lie in both, as promised by the caller.
        unsafe {
            let square = std::array::from_fn(|j| _mm512_loadu_ps(from.row(col + j).add(row)));
            for (i, line) in transpose(square).into_iter().enumerate() {
                _mm512_storeu_ps(to.row(row + i).add(col), line);
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

/// Loads a register of a panel; offsets within a step are in bytes.
macro_rules! load {
    ($register:literal, $panel:literal, $offset:literal) => {
        concat!("tileloadd tmm", $register, ", [{", $panel, "} + {line} + ", $offset, "]")
    };
}

/// Adds the products of the two loaded registers of A with the two of B.
macro_rules! products {
    () => {
        "tdpbf16ps tmm0, tmm4, tmm6\ntdpbf16ps tmm1, tmm4, tmm7\ntdpbf16ps tmm2, tmm5, tmm6\ntdpbf16ps tmm3, tmm5, tmm7"
    };
}

/// The same with one of B.
macro_rules! half_products {
    () => {
        "tdpbf16ps tmm0, tmm4, tmm6\ntdpbf16ps tmm2, tmm5, tmm6"
    };
}

/// Sums in registers 0 to 3 (two by two), A in 4 and 5, B in 6 and 7.
///
/// # Safety
/// `a` and `b` are panels of `steps` steps, `sums` has 32 rows of 32, and a session is open.
unsafe fn multiply(steps: usize, a: *const f32, b: *const f32, sums: Sums) {
    // SAFETY: reads the panels and reads and writes the sums, as promised by the caller.
    unsafe {
        asm!(
            "test {fresh}, {fresh}",
            "jnz 2f",
            "tileloadd tmm0, [{c} + {stride}]",
            "tileloadd tmm1, [{c} + {stride} + 64]",
            "tileloadd tmm2, [{low} + {stride}]",
            "tileloadd tmm3, [{low} + {stride} + 64]",
            "jmp 3f",
            "2:",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "3:",
            // x0 with y2, y1, y0
            load!(4, "a", 0),
            load!(5, "a", 1024),
            load!(6, "b", 4096),
            load!(7, "b", 5120),
            products!(),
            load!(6, "b", 2048),
            load!(7, "b", 3072),
            products!(),
            load!(6, "b", 0),
            load!(7, "b", 1024),
            products!(),
            // x2 and x1 with y0
            load!(4, "a", 4096),
            load!(5, "a", 5120),
            products!(),
            load!(4, "a", 2048),
            load!(5, "a", 3072),
            products!(),
            // x1 with y1
            load!(6, "b", 2048),
            load!(7, "b", 3072),
            products!(),
            "add {a}, 6144",
            "add {b}, 6144",
            "dec {steps}",
            "jnz 3b",
            "tilestored [{c} + {stride}], tmm0",
            "tilestored [{c} + {stride} + 64], tmm1",
            "tilestored [{low} + {stride}], tmm2",
            "tilestored [{low} + {stride} + 64], tmm3",
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

/// As `multiply` for a product whose sides are exchanged: `y`, the unit's A, holds what is B of the whole product, and `x`
/// what is A. The order is that of `multiply`: x0 y2, x0 y1, x0 y0, x2 y0, x1 y0, x1 y1.
///
/// # Safety
/// As `multiply`.
unsafe fn multiply_turned(steps: usize, y: *const f32, x: *const f32, sums: Sums) {
    // SAFETY: as in `multiply`.
    unsafe {
        asm!(
            "test {fresh}, {fresh}",
            "jnz 2f",
            "tileloadd tmm0, [{c} + {stride}]",
            "tileloadd tmm1, [{c} + {stride} + 64]",
            "tileloadd tmm2, [{low} + {stride}]",
            "tileloadd tmm3, [{low} + {stride} + 64]",
            "jmp 3f",
            "2:",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "3:",
            // x0 with y2, y1, y0
            load!(6, "x", 0),
            load!(7, "x", 1024),
            load!(4, "y", 4096),
            load!(5, "y", 5120),
            products!(),
            load!(4, "y", 2048),
            load!(5, "y", 3072),
            products!(),
            load!(4, "y", 0),
            load!(5, "y", 1024),
            products!(),
            // x2 and x1 with y0
            load!(6, "x", 4096),
            load!(7, "x", 5120),
            products!(),
            load!(6, "x", 2048),
            load!(7, "x", 3072),
            products!(),
            // x1 with y1
            load!(4, "y", 2048),
            load!(5, "y", 3072),
            products!(),
            "add {y}, 6144",
            "add {x}, 6144",
            "dec {steps}",
            "jnz 3b",
            "tilestored [{c} + {stride}], tmm0",
            "tilestored [{c} + {stride} + 64], tmm1",
            "tilestored [{low} + {stride}], tmm2",
            "tilestored [{low} + {stride} + 64], tmm3",
            fresh = in(reg) usize::from(sums.fresh),
            c = in(reg) sums.start,
            low = in(reg) sums.row(HALF),
            stride = in(reg) sums.stride * size_of::<f32>(),
            line = in(reg) 64usize,
            y = inout(reg) y => _,
            x = inout(reg) x => _,
            steps = inout(reg) steps => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

/// The left half of `multiply_turned`: up to 16 rows of the whole product.
///
/// # Safety
/// As `multiply`.
unsafe fn multiply_turned_half(steps: usize, y: *const f32, x: *const f32, sums: Sums) {
    // SAFETY: as in `multiply`.
    unsafe {
        asm!(
            "test {fresh}, {fresh}",
            "jnz 2f",
            "tileloadd tmm0, [{c} + {stride}]",
            "tileloadd tmm2, [{low} + {stride}]",
            "jmp 3f",
            "2:",
            "tilezero tmm0",
            "tilezero tmm2",
            "3:",
            load!(6, "x", 0),
            load!(4, "y", 4096),
            load!(5, "y", 5120),
            half_products!(),
            load!(4, "y", 2048),
            load!(5, "y", 3072),
            half_products!(),
            load!(4, "y", 0),
            load!(5, "y", 1024),
            half_products!(),
            load!(6, "x", 4096),
            half_products!(),
            load!(6, "x", 2048),
            half_products!(),
            load!(4, "y", 2048),
            load!(5, "y", 3072),
            half_products!(),
            "add {y}, 6144",
            "add {x}, 6144",
            "dec {steps}",
            "jnz 3b",
            "tilestored [{c} + {stride}], tmm0",
            "tilestored [{low} + {stride}], tmm2",
            fresh = in(reg) usize::from(sums.fresh),
            c = in(reg) sums.start,
            low = in(reg) sums.row(HALF),
            stride = in(reg) sums.stride * size_of::<f32>(),
            line = in(reg) 64usize,
            y = inout(reg) y => _,
            x = inout(reg) x => _,
            steps = inout(reg) steps => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

/// Which side of the product a panel is on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Operand {
    A,
    B,
}

#[target_feature(enable = "avx512f,avx512bw")]
fn pack(panel: Panel, operand: Operand, out: &mut [f32]) {
    let mut turned = [0.0f32; TILE * STEP];
    for (step, out) in out.chunks_exact_mut(STEP_LEN).enumerate() {
        let mut part = Part::of(&panel, step * STEP);
        // A layout wants one dimension contiguous: k for A, columns for B.
        match operand {
            Operand::A => {
                if part.by_depth != 1 {
                    part = part.turned(&mut turned);
                }
                pack_rows(&part, out);
            }
            Operand::B => {
                if part.by_width != 1 {
                    part = part.turned(&mut turned);
                }
                pack_pairs(&part, out);
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
    fn of(panel: &Panel<'a>, first_k: usize) -> Self {
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
fn pack_rows(part: &Part, out: &mut [f32]) {
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
        for piece in 0..3 {
            let halves = _mm512_permutex2var_epi16(_mm512_castps_si512(low), odd, _mm512_castps_si512(high));
            store(&mut out[piece * PIECE_LEN + i * HALF..], _mm512_castsi512_ps(halves));
            (low, high) = (rest(low), rest(high));
        }
    }
}

/// Tiles of B: a row is a pair of values of k, each with 16 columns.
#[target_feature(enable = "avx512f")]
fn pack_pairs(part: &Part, out: &mut [f32]) {
    let ahead = STEP * part.by_depth;
    for (pair, first) in (0..HALF).flat_map(|pair| [(pair, 0), (pair, HALF)]) {
        let line = |k: usize| match k < part.depth && first < part.width {
            true => load(&part.data[k * part.by_depth + first..], part.width - first, ahead),
            false => _mm512_setzero_ps(),
        };
        let (mut even, mut odd) = (line(2 * pair), line(2 * pair + 1));
        for piece in 0..3 {
            let low = _mm512_srli_epi32::<16>(_mm512_castps_si512(even));
            let high = _mm512_and_si512(_mm512_castps_si512(odd), _mm512_set1_epi32(HIGH));
            let at = piece * PIECE_LEN + first / HALF * REGISTER_LEN + pair * HALF;
            store(&mut out[at..], _mm512_castsi512_ps(_mm512_or_si512(low, high)));
            (even, odd) = (rest(even), rest(odd));
        }
    }
}
