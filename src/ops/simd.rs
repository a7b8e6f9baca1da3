//! What the CPU ops share: run-time dispatch, fixed-order sums, exp, disjoint writes.
//!
//! Loops are written once in portable Rust over fixed lanes and compiled per instruction set. `mul_add` is
//! exact everywhere and lanes do not follow the register width, so every instruction set gives the same bits.

use std::marker::PhantomData;

use crate::device::Isa;

/// Lanes of a fixed-order sum: element i goes to lane i % LANES, whatever the registers hold.
pub const LANES: usize = 16;

/// Defines a function whose body is compiled once per instruction set; the first argument chooses.
macro_rules! dispatched {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name(isa: crate::device::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx2,fma")]
            fn avx512($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
            match isa {
                // SAFETY: `Isa::detect` found these features on this machine.
                #[cfg(target_arch = "x86_64")]
                crate::device::Isa::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                crate::device::Isa::Avx2 => unsafe { avx2($($arg),*) },
                crate::device::Isa::Portable => body($($arg),*),
            }
        }
    };
}
pub(crate) use dispatched;

dispatched! {
    /// `y += x`
    pub fn add(x: &[f32], y: &mut [f32]) {
        y.iter_mut().zip(x).for_each(|(y, x)| *y += x);
    }
}

/// Says that these numbers will be read soon.
#[inline(always)]
pub fn prefetch(x: &[f32]) {
    #[cfg(target_arch = "x86_64")]
    for line in x.chunks(16) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch reads nothing that the program sees.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = x;
}

/// Says that `len` numbers from `start` on will be read some time after others; there need not be any.
#[inline(always)]
pub fn prefetch_far<T>(start: *const T, len: usize) {
    #[cfg(target_arch = "x86_64")]
    for at in (0..len * size_of::<T>()).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a prefetch may name any address, and reads nothing that the program sees.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(start.cast::<i8>().wrapping_add(at)) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (start, len);
}

/// Adds the lanes pairwise, in one order.
#[inline(always)]
pub fn sum_lanes(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// Elements whose terms wait in the first-level cache: a loop that only makes terms and loops that only add become vectors, one
/// that does both does not.
const RUN: usize = 16 * LANES;

/// Sums of the `terms` of element after element of slices of equal length, in lane order.
#[inline(always)]
pub fn sum_terms<const N: usize, const S: usize>(x: [&[f32]; N], terms: impl Fn([f32; N]) -> [f32; S]) -> [f32; S] {
    let (mut lanes, mut waiting) = ([[0.0f32; LANES]; S], [[0.0f32; RUN]; S]);
    let len = x[0].len();
    for start in (0..len).step_by(RUN) {
        let run = RUN.min(len - start);
        let x = x.map(|x| &x[start..][..run]);
        for i in 0..run {
            let terms = terms(x.map(|x| x[i]));
            for s in 0..S {
                waiting[s][i] = terms[s];
            }
        }
        for (lanes, waiting) in lanes.iter_mut().zip(&waiting) {
            let (vectors, tail) = waiting[..run].as_chunks::<LANES>();
            for x in vectors {
                for i in 0..LANES {
                    lanes[i] += x[i];
                }
            }
            lanes.iter_mut().zip(tail).for_each(|(lane, x)| *lane += x);
        }
    }
    lanes.map(sum_lanes)
}

/// The largest of `first` and `x`, NaN passed over.
#[inline(always)]
pub fn largest(first: f32, x: &[f32]) -> f32 {
    let mut top = [first; LANES];
    let (vectors, tail) = x.as_chunks::<LANES>();
    for x in vectors {
        for i in 0..LANES {
            top[i] = if x[i] > top[i] { x[i] } else { top[i] };
        }
    }
    top.iter().chain(tail).fold(first, |top, x| top.max(*x))
}

/// Sum of `a[i] * b[i]` in lane order.
#[inline(always)]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (a, b) = (&a[..a.len().min(b.len())], &b[..a.len().min(b.len())]);
    let (a_body, b_body) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail = a_body.remainder().iter().zip(b_body.remainder());
    let tail_lanes: &mut [f32; LANES] = &mut [0.0; LANES];
    for (lane, (x, y)) in tail_lanes.iter_mut().zip(tail) {
        *lane = x * y;
    }
    for (x, y) in a_body.zip(b_body) {
        for i in 0..LANES {
            lanes[i] = x[i].mul_add(y[i], lanes[i]);
        }
    }
    for i in 0..LANES {
        lanes[i] += tail_lanes[i];
    }
    sum_lanes(lanes)
}

/// `to[j][i] = from[i][j]`: a `[rows, cols]` matrix, its rows and those of the result `strides` apart. Both sides
/// must be multiples of 8.
pub fn transpose(isa: Isa, [rows, cols]: [usize; 2], from: &[f32], to: &mut [f32], strides: [usize; 2]) {
    const SQUARE: usize = 8;
    assert!(rows.is_multiple_of(SQUARE) && cols.is_multiple_of(SQUARE), "{rows} x {cols} is not made of squares");
    let reach = |rows: usize, cols: usize, stride: usize| rows.saturating_sub(1) * stride + cols;
    assert!(from.len() >= reach(rows, cols, strides[0]) && to.len() >= reach(cols, rows, strides[1]));
    // SAFETY: both matrices reach as far as the shape says (just asserted).
    unsafe { transpose_between(isa, [rows, cols], from.as_ptr(), to.as_mut_ptr(), strides) }
}

/// The same where other threads write between the rows of `to`.
///
/// # Safety
/// The matrices must reach as far as the shape says, which must be whole squares of 8 x 8.
pub unsafe fn transpose_between(
    isa: Isa,
    [rows, cols]: [usize; 2],
    from: *const f32,
    to: *mut f32,
    strides: [usize; 2],
) {
    match isa {
        // SAFETY: `Isa::detect` found AVX2; the rest is promised by the caller.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::Avx512 => unsafe { transpose_avx2([rows, cols], from, to, strides) },
        Isa::Portable => {
            for (i, j) in (0..rows).flat_map(|i| (0..cols).map(move |j| (i, j))) {
                // SAFETY: promised by the caller.
                unsafe { *to.add(j * strides[1] + i) = *from.add(i * strides[0] + j) };
            }
        }
    }
}

/// # Safety
/// The matrices must reach as far as the shape says, which must be whole squares of 8 x 8.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn transpose_avx2([rows, cols]: [usize; 2], from: *const f32, to: *mut f32, strides: [usize; 2]) {
    // A row of the result as a whole: its lines may be far away.
    for j in (0..cols).step_by(8) {
        for i in (0..rows).step_by(8) {
            // SAFETY: promised by the caller.
            unsafe { transpose_square(from.add(i * strides[0] + j), to.add(j * strides[1] + i), strides) };
        }
    }
}

/// # Safety
/// Eight rows of eight floats must lie behind both pointers.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn transpose_square(from: *const f32, to: *mut f32, strides: [usize; 2]) {
    use std::arch::x86_64::*;
    let mut rows = [_mm256_setzero_ps(); 8];
    for i in 0..4 {
        // Rows i and i + 4 meet in one register, so that only shuffles within halves remain.
        for half in 0..2 {
            // SAFETY: promised by the caller.
            let (low, high) = unsafe {
                let row = from.add(i * strides[0] + 4 * half);
                (_mm_loadu_ps(row), _mm_loadu_ps(row.add(4 * strides[0])))
            };
            rows[4 * half + i] = _mm256_insertf128_ps::<1>(_mm256_castps128_ps256(low), high);
        }
    }
    for half in 0..2 {
        let [a, b, c, d] = [0, 1, 2, 3].map(|i| rows[4 * half + i]);
        let (ab, cd) = (_mm256_unpacklo_ps(a, b), _mm256_unpacklo_ps(c, d));
        let (ab_high, cd_high) = (_mm256_unpackhi_ps(a, b), _mm256_unpackhi_ps(c, d));
        let columns = [
            _mm256_shuffle_ps::<0b01_00_01_00>(ab, cd),
            _mm256_shuffle_ps::<0b11_10_11_10>(ab, cd),
            _mm256_shuffle_ps::<0b01_00_01_00>(ab_high, cd_high),
            _mm256_shuffle_ps::<0b11_10_11_10>(ab_high, cd_high),
        ];
        for (j, column) in columns.into_iter().enumerate() {
            // SAFETY: promised by the caller.
            unsafe { _mm256_storeu_ps(to.add((4 * half + j) * strides[1]), column) };
        }
    }
}

/// e^x in f32, relative error below 2e-7 (tested); 0 below -87.3, infinity above 88.7, NaN stays NaN.
/// Branch-free, so that loops over it become vector code (Cephes' polynomial).
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    let (y, exponent) = exp_parts(x);
    let scale = f32::from_bits((exponent.wrapping_add(127) as u32).wrapping_shl(23));
    // 2^128 is no f32: the last binade is reached through 2^127 * 2.
    let high = f32::from_bits((exponent.wrapping_add(126) as u32).wrapping_shl(23));
    let y = if x > 88.0 { y * high * 2.0 } else { y * scale };
    let y = if x < -87.3 { 0.0 } else { y };
    if x > 88.72 { f32::INFINITY } else { y }
}

/// `exp(x)`, bit for bit, where x is not positive: two thirds of the work.
#[inline(always)]
pub fn exp_of_negative(x: f32) -> f32 {
    let (y, exponent) = exp_parts(x);
    let scale = f32::from_bits((exponent.wrapping_add(127) as u32).wrapping_shl(23));
    if x < -87.3 { 0.0 } else { y * scale }
}

/// (y, n) with e^x = y 2^n.
#[inline(always)]
fn exp_parts(x: f32) -> (f32, i32) {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(2.121_944_4e-4, n.mul_add(-0.693_359_4, x));
    let p = 1.987_569_1e-4_f32;
    let p = p.mul_add(r, 1.398_199_9e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 1.666_666_5e-1);
    let p = p.mul_add(r, 5e-1);
    let y = p.mul_add(r * r, r) + 1.0;
    (y, (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32))
}

/// erf(x) in f32, within 1.2e-7 (tested); 1 and -1 at the ends, NaN stays NaN. Branch-free: both formulas run and
/// one is chosen (minimax polynomials of N. Juffa, for erf near 0 and for ln(1 - erf) beyond).
#[inline(always)]
pub fn erf(x: f32) -> f32 {
    let (a, square) = (x.abs(), x * x);
    let near = -5.967_617e-4_f32;
    let near = near.mul_add(square, 4.991_194_2e-3);
    let near = near.mul_add(square, -2.676_813_5e-2);
    let near = near.mul_add(square, 1.128_199_3e-1);
    let near = near.mul_add(square, -3.761_253_4e-1);
    let near = near.mul_add(square, 1.283_791_7e-1);
    let near = near.mul_add(x, x);
    // Beyond 4 the polynomial would turn; erf is 1 there.
    let a = a.min(4.0);
    let square = a * a;
    let far = (-1.728_534_7e-5_f32).mul_add(a, 3.831_971_3e-4);
    let middle = (-3.883_964_4e-3_f32).mul_add(a, 2.425_462_2e-2);
    let far = far.mul_add(square, middle);
    let far = far.mul_add(a, -1.067_778_8e-1);
    let far = far.mul_add(a, -6.348_467e-1);
    let far = far.mul_add(a, -1.287_175_1e-1);
    let far = (1.0 - exp(far.mul_add(a, -a))).copysign(x);
    if x.abs() > 0.927_734_4 { far } else { near }
}

/// A slice that several tasks write, each its own elements.
pub struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: `slice` demands disjoint ranges of its callers.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), borrow: PhantomData }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// # Safety
    /// Nobody writes them any more.
    pub unsafe fn read(&self) -> &'a [T] {
        // SAFETY: in bounds, and nobody writes, as the caller promises.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }

    /// Where `rows` runs of `cols` elements begin, `stride` apart. Whoever writes through it must own them.
    pub fn block(&self, start: usize, stride: usize, rows: usize, cols: usize) -> *mut T {
        assert!(rows > 0 && start + (rows - 1) * stride + cols <= self.len, "a task reached past the end");
        // SAFETY: in bounds (just asserted).
        unsafe { self.start.add(start) }
    }

    /// # Safety
    /// No two live slices may overlap.
    pub unsafe fn slice(&self, start: usize, len: usize) -> &'a mut [T] {
        assert!(start + len <= self.len, "a task reached past the end");
        // SAFETY: in bounds; the caller promises that nobody else holds these elements.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate_over_its_whole_range() {
        let mut worst = 0.0f64;
        for i in -873_000..887_000 {
            let x = i as f32 * 1e-4;
            let expected = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - expected).abs() / expected);
        }
        assert!(worst < 2e-7, "worst relative error {worst:e}");
        assert_eq!(exp(0.0), 1.0);
        assert_eq!((exp(f32::NEG_INFINITY), exp(-1e30), exp(f32::INFINITY)), (0.0, 0.0, f32::INFINITY));
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn erf_is_accurate_over_its_whole_range() {
        let mut worst = 0.0f64;
        for i in -60_000..60_000 {
            let x = i as f32 * 1e-4;
            worst = worst.max((f64::from(erf(x)) - crate::ops::gelu::reference::erf(f64::from(x))).abs());
        }
        assert!(worst < 1.2e-7, "worst error {worst:e}");
        assert_eq!(erf(0.0), 0.0);
        assert_eq!((erf(f32::INFINITY), erf(f32::NEG_INFINITY), erf(1e30)), (1.0, -1.0, 1.0));
        assert!(erf(f32::NAN).is_nan());
    }

    #[test]
    fn exp_of_what_is_not_positive_has_the_same_bits() {
        let special = [0.0, -0.0, -87.3, -87.4, -1e30, f32::NEG_INFINITY];
        for x in (-900_000..=0).map(|i| i as f32 * 1e-4).chain(special) {
            assert_eq!(exp_of_negative(x).to_bits(), exp(x).to_bits(), "{x}");
        }
        assert!(exp_of_negative(f32::NAN).is_nan());
    }

    #[test]
    fn transposing_moves_every_element() {
        for isa in [Isa::Portable, Isa::detect()] {
            for [rows, cols] in [[8, 8], [64, 16], [24, 40]] {
                let (strides, from) = ([cols + 3, rows + 5], (0..rows * (cols + 3)).map(|i| i as f32));
                let (from, mut to) = (from.collect::<Vec<_>>(), vec![-1.0; cols * strides[1]]);
                transpose(isa, [rows, cols], &from, &mut to, strides);
                for (at, found) in to.into_iter().enumerate() {
                    let (j, i) = (at / strides[1], at % strides[1]);
                    let expected = if i < rows { from[i * strides[0] + j] } else { -1.0 };
                    assert_eq!(found, expected, "{rows} x {cols} on {isa:?}: ({i}, {j})");
                }
            }
        }
    }

    #[test]
    fn terms_are_added_in_lane_order() {
        for len in [0, 1, 15, 17, 255, 256, 300, 1000] {
            let x: Vec<f32> = (0..len).map(|i| (i as f32 * 0.37).sin()).collect();
            let mut expected = [[0.0f32; LANES]; 2];
            for (i, x) in x.iter().enumerate() {
                expected[0][i % LANES] += x * x;
                expected[1][i % LANES] += x + x;
            }
            assert_eq!(sum_terms([&x, &x], |[x, y]| [x * y, x + y]), expected.map(sum_lanes), "length {len}");
            assert_eq!(largest(0.5, &x), x.iter().fold(0.5_f32, |top, x| top.max(*x)), "length {len}");
        }
        assert_eq!(largest(-1.0, &[f32::NAN; 40]), -1.0);
        assert!(sum_terms([&[1.0, f32::NAN]], |[x]| [x])[0].is_nan());
    }

    #[test]
    fn dot_takes_any_length() {
        for len in [0, 1, 15, 16, 17, 31, 123] {
            let a: Vec<f32> = (0..len).map(|i| i as f32 * 0.5 - 3.0).collect();
            let b: Vec<f32> = (0..len).map(|i| 1.0 / (i + 1) as f32).collect();
            let expected: f64 = a.iter().zip(&b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
            assert!((f64::from(dot(&a, &b)) - expected).abs() < 1e-4, "length {len}");
        }
    }
}
