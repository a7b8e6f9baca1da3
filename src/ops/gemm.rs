//! Blocked f32 matrix product for the CPU ops: `C = A B` or `C += A B`.
//!
//! Every element of C is summed over k in one order, whatever the blocking, the tile's place, the number of threads
//! and the other rows and columns. That is what makes log-probabilities independent of the batch. There are two such
//! orders, one for each family of kernels ([`Products`]):
//!
//! * [`super::gemm_fma`], [`super::gemm_fma_turned`]: one chain of fused multiply-adds over k = 0, 1, 2, ..., the same bits on
//!   every instruction set;
//! * [`super::gemm_amx`]: matrix tiles of bfloat16, six partial products for each 32 values of k.
//!
//! Both operands are packed once a product into panels that all threads share. A task multiplies rows of A that its core's
//! second-level cache holds with one panel of B after the other, in passes over k that fit the caches before it.
//! Few rows ([`few`]) are packed as a whole, and a task packs one panel of B after the other where it uses it, in its core's
//! caches: B goes by once, and nothing of it is written.
//! Weights are not kept packed between calls: packing one costs as much as eight to sixteen rows of the product, a
//! training step multiplies each with hundreds, and a packed copy of every weight in two layouts would cost three times the
//! weights' memory.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread::LocalKey;

use half::bf16;
use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use super::gemm_amx::{Amx, AmxTurned};
use super::gemm_fma::Fma;
use super::gemm_fma_turned::FmaTurned;
use super::simd::Shared;
use crate::device::{Cpu, DType, Products, Scratch, View};

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

/// f32, or bfloat16 in their place.
#[derive(Clone, Copy)]
pub enum Numbers<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
}

impl<'a> Numbers<'a> {
    pub fn of(view: View<'a, Cpu>) -> Self {
        match view.dtype() {
            DType::Bf16 => Self::Bf16(view.bf16s()),
            _ => Self::F32(view.f32s()),
        }
    }

    /// Those from number `first` on.
    pub fn from(self, first: usize) -> Self {
        match self {
            Self::F32(data) => Self::F32(&data[first..]),
            Self::Bf16(data) => Self::Bf16(&data[first..]),
        }
    }
}

/// The right side of a product: weights may be kept as bfloat16. The bits of the product are those of the same numbers in f32.
#[derive(Clone, Copy)]
pub struct Right<'a> {
    data: Numbers<'a>,
    row: usize,
    col: usize,
}

impl<'a> Right<'a> {
    pub fn new(data: Numbers<'a>, cols: usize) -> Self {
        Self { data, row: cols, col: 1 }
    }

    pub fn transposed(data: Numbers<'a>, cols: usize) -> Self {
        Self { data, row: 1, col: cols }
    }

    fn turned(self) -> Self {
        Self { row: self.col, col: self.row, ..self }
    }
}

impl<'a> From<Operand<'a>> for Right<'a> {
    fn from(Operand { data, row, col }: Operand<'a>) -> Self {
        Self { data: Numbers::F32(data), row, col }
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
pub struct Panel<D> {
    /// Starts at the panel's first element.
    pub data: D,
    /// From one value of k to the next.
    pub by_depth: usize,
    /// From one row of A or column of B to the next.
    pub by_width: usize,
    pub depth: usize,
    pub width: usize,
}

impl<D> Panel<D> {
    /// Other numbers in the same places.
    fn with<E>(&self, data: E) -> Panel<E> {
        let Self { by_depth, by_width, depth, width, .. } = *self;
        Panel { data, by_depth, by_width, depth, width }
    }
}

/// A packed panel of B, or what is left of it from some value of k on.
#[derive(Clone, Copy)]
pub struct Columns<'a> {
    pub data: &'a [f32],
    /// As `pack_b` said: numbers of few bits are less to multiply.
    pub pieces: usize,
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
    /// Depth of a pass: so much of a panel of B stays in the nearest caches for all rows of a task. Panels are laid out in
    /// order of depth, so that a pass is a part of each.
    const DEPTH: usize;

    /// Floats of a packed panel.
    fn panel_a(depth: usize) -> usize;
    fn panel_b(depth: usize) -> usize;
    /// Pack a panel; what lies beyond its width or depth becomes zero.
    fn pack_a(self, panel: Panel<&[f32]>, out: &mut [f32]);
    /// Returns how many pieces of each number there are to multiply.
    fn pack_b(self, panel: Panel<&[f32]>, out: &mut [f32]) -> usize;
    /// The same of bfloat16.
    fn pack_b_bf16(self, panel: Panel<&[bf16]>, out: &mut [f32]) -> usize {
        pack_widened(self, panel, out)
    }
    /// The smallest height that the kernel can multiply and that holds `rows`.
    fn height(rows: usize) -> usize;
    /// Continues the sums of the first `rows` rows of a tile by `depth` terms; `rows` is a `height`.
    ///
    /// # Safety
    /// `sums` must have that many rows of `COLS` that nobody else touches.
    unsafe fn multiply(self, rows: usize, depth: usize, a: &[f32], b: Columns, sums: Sums);
    /// What a thread does around its calls of `multiply`.
    fn session(self, work: impl FnOnce());
}

/// A kernel of products of few rows. The sums of all tiles of a panel of B wait in buffers of `[ROWS, COLS]` while pieces of the
/// panel go by, laid out as `multiply` likes them best.
pub trait FewRows: Kernel {
    /// Brings the first `rows` rows of a tile from C to its buffer, and back.
    ///
    /// # Safety
    /// Both have that many rows of `COLS`, a `height`, that nobody else touches.
    unsafe fn take(self, rows: usize, c: Sums, buffer: Sums);
    /// # Safety
    /// As `take`.
    unsafe fn give(self, rows: usize, buffer: Sums, c: Sums);
}

/// The f32 that a bfloat16 is.
pub fn widened(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}

/// Packs bfloat16 as the f32 that they are, a few values of k at a time.
pub fn pack_widened<K: Kernel>(kernel: K, panel: Panel<&[bf16]>, out: &mut [f32]) -> usize {
    const DEPTH: usize = 64;
    const WIDTH: usize = 32;
    const { assert!(K::COLS <= WIDTH) };
    let (mut wide, mut pieces) = ([0.0; DEPTH * WIDTH], 1);
    for first in (0..panel.depth).step_by(DEPTH) {
        let depth = DEPTH.min(panel.depth - first);
        let data = &panel.data[first * panel.by_depth..];
        let [lines, len, stride] = match panel.by_depth {
            1 => [panel.width, depth, panel.by_width],
            stride => [depth, panel.width, stride],
        };
        for (line, wide) in wide.chunks_exact_mut(len).take(lines).enumerate() {
            let line = &data[line * stride..][..len];
            wide.iter_mut().zip(line).for_each(|(wide, x)| *wide = widened(*x));
        }
        let [by_depth, by_width] = if panel.by_depth == 1 { [1, len] } else { [len, 1] };
        let part = Panel { data: &wide[..], by_depth, by_width, depth, width: panel.width };
        pieces = pieces.max(kernel.pack_b(part, &mut out[K::panel_b(first)..][..K::panel_b(depth)]));
    }
    pieces
}

fn pack_columns<K: Kernel>(kernel: K, panel: Panel<Numbers>, out: &mut [f32]) -> usize {
    match panel.data {
        Numbers::F32(data) => kernel.pack_b(panel.with(data), out),
        Numbers::Bf16(data) => kernel.pack_b_bf16(panel.with(data), out),
    }
}

fn pack_rows<K: Kernel>(kernel: K, panel: Panel<Numbers>, out: &mut [f32]) {
    match panel.data {
        Numbers::F32(data) => kernel.pack_a(panel.with(data), out),
        Numbers::Bf16(_) => unreachable!("the left side is f32"),
    }
}

/// The part of a product that is packed at a time: rows of A, columns of B and depth of both at most.
const BLOCK: [usize; 3] = [1536, 1536, 1536];
/// Panels of B of a block, at 32 columns or more.
const MOST_PANELS: usize = BLOCK[1] / 32;
/// Bytes of packed A that one task multiplies: they stay in the core's second-level cache.
const TASK_BYTES: usize = 5 << 18;
/// Rows of a task at least.
const TASK_ROWS: usize = 128;
/// Below this many multiply-adds a parallel section costs more than it saves.
const SERIAL_WORK: usize = 1 << 16;
/// Rows of the largest tile times its columns.
const TILE_LEN: usize = 32 * 32;

/// `c` is `[m, n]` with row stride `n`; `a` is `[m, k]`, `b` is `[k, n]`.
pub fn gemm<'a>(cpu: &Cpu, dims: [usize; 3], a: Operand<'a>, b: impl Into<Right<'a>>, c: &mut [f32], start: Start) {
    product(Team::of(cpu), dims, (a.into(), b.into()), &Shared::new(c), start, &|_| ());
}

/// As [`gemm`], on the thread that calls: for products that are themselves parts of a parallel section.
pub fn gemm_alone(cpu: &Cpu, dims: [usize; 3], a: Operand, b: Operand, c: &mut [f32], start: Start) {
    product(Team::alone(cpu), dims, (a.into(), b.into()), &Shared::new(c), start, &|_| ());
}

/// As [`gemm`] from zero. `then` is told of columns whose sums are in `c`, of each once, by the thread that made them, which then has
/// them to itself: what follows a product of few rows needs no parallel section of its own.
pub fn gemm_then<'a>(
    cpu: &Cpu,
    dims: [usize; 3],
    a: Operand<'a>,
    b: Right<'a>,
    c: &Shared<f32>,
    then: &(dyn Fn(Range<usize>) + Sync),
) {
    product(Team::of(cpu), dims, (a.into(), b), c, Start::Zero, then);
}

/// Who computes a product, and where each thread keeps its packed operands: a product within another has places of its own.
#[derive(Clone, Copy)]
struct Team<'a> {
    cpu: &'a Cpu,
    threads: usize,
    places: &'static LocalKey<Places>,
}

/// Packed A and B of a product, and the piece of B of one of few rows, which its thread alone uses.
#[derive(Default)]
struct Places {
    packed: RefCell<[Scratch; 2]>,
    panel: RefCell<Scratch>,
}

thread_local! {
    static TOGETHER: Places = Places::default();
    static ALONE: Places = Places::default();
}

impl<'a> Team<'a> {
    fn of(cpu: &'a Cpu) -> Self {
        Self { cpu, threads: cpu.threads(), places: &TOGETHER }
    }

    fn alone(cpu: &'a Cpu) -> Self {
        Self { cpu, threads: 1, places: &ALONE }
    }

    fn for_each(self, serial: bool, tasks: usize, task: impl Fn(usize) + Send + Sync) {
        if serial || tasks == 1 || self.threads == 1 {
            (0..tasks).for_each(task);
        } else {
            self.cpu.run(|| (0..tasks).into_par_iter().for_each(task));
        }
    }

    fn take(self) -> [Scratch; 2] {
        self.places.with(|places| places.packed.take())
    }

    fn put_back(self, scratch: [Scratch; 2]) {
        self.places.with(|places| places.packed.replace(scratch));
    }
}

type Then<'t> = &'t (dyn Fn(Range<usize>) + Sync);

fn product(team: Team, dims: [usize; 3], (a, b): (Right, Right), c: &Shared<f32>, start: Start, then: Then) {
    let [m, n, k] = dims;
    assert_eq!(c.len(), m * n, "the output of a [{m}, {k}] by [{k}, {n}] product");
    if k == 0 && start == Start::Zero {
        // SAFETY: nobody else works on C before its columns are told of.
        unsafe { c.slice(0, m * n) }.fill(0.0);
    }
    if m == 0 || n == 0 || k == 0 {
        return then(0..n);
    }
    let (isa, fma) = (team.cpu.isa(), Fma(team.cpu.isa()));
    let operands = (a, b);
    match team.cpu.products() {
        Products::Chains if b.row == 1 && are_few::<FmaTurned<32>>(dims, team.threads) => match m {
            ..=16 => few(team, FmaTurned::<16>(isa), dims, operands, c, (start, then)),
            _ => few(team, FmaTurned::<32>(isa), dims, operands, c, (start, then)),
        },
        Products::Chains if are_few::<Fma>(dims, team.threads) => few(team, fma, dims, operands, c, (start, then)),
        Products::Chains => blocked(team, fma, dims, operands, c, (start, then)),
        #[cfg(target_arch = "x86_64")]
        Products::Tiles if are_few::<AmxTurned>(dims, team.threads) => {
            few(team, AmxTurned, dims, operands, c, (start, then));
        }
        #[cfg(target_arch = "x86_64")]
        Products::Tiles => blocked(team, Amx, dims, operands, c, (start, then)),
    }
}

/// Bytes of packed A and of packed B that a product of these dimensions needs.
pub fn packed_bytes(dims: [usize; 3]) -> [usize; 2] {
    match Products::detect() {
        Products::Chains => packed_floats::<Fma>(dims),
        #[cfg(target_arch = "x86_64")]
        Products::Tiles => packed_floats::<Amx>(dims),
    }
    .map(Scratch::bytes)
}

/// Bytes that a thread keeps for products of few rows: a piece of B and the sums beside it, which one large page holds.
pub fn few_rows_bytes() -> usize {
    Scratch::bytes(1)
}

fn packed_floats<K: Kernel>(dims: [usize; 3]) -> [usize; 2] {
    let [rows, cols, depth] = block_dims::<K>(dims);
    [rows.div_ceil(K::ROWS) * K::panel_a(depth), cols.div_ceil(K::COLS) * K::panel_b(depth)]
}

/// The fewest blocks of about equal size.
fn block_dims<K: Kernel>(dims: [usize; 3]) -> [usize; 3] {
    let steps = [K::ROWS, K::COLS, K::DEPTH];
    std::array::from_fn(|i| match dims[i].div_ceil(BLOCK[i]) {
        0 | 1 => dims[i],
        parts => dims[i].div_ceil(parts).next_multiple_of(steps[i]),
    })
}

/// Whether all rows of A stay in a core's second-level cache, and there are columns for all threads, or rows for one.
fn are_few<K: Kernel>([m, n, k]: [usize; 3], threads: usize) -> bool {
    let columns = n.div_ceil(K::COLS) >= 2 * threads || m <= TASK_ROWS;
    m.div_ceil(K::ROWS) * K::panel_a(k) * size_of::<f32>() <= TASK_BYTES && columns
}

/// A product of few rows: the bits are those of [`blocked`]. A piece of B is packed into the nearest cache, meets all rows of A
/// there and is forgotten.
fn few<K: FewRows>(
    team: Team,
    kernel: K,
    [m, n, k]: [usize; 3],
    (a, b): (Right, Right),
    c: &Shared<f32>,
    (start, then): (Start, Then),
) {
    let mut scratch = team.take();
    let (panel_a, piece, tile_len) = (K::panel_a(k), K::DEPTH.min(k), K::ROWS * K::COLS);
    let tiles = [m.div_ceil(K::ROWS), n.div_ceil(K::COLS)];
    let packed_a = scratch[0].grown(tiles[0] * panel_a);
    let rows = Side { operand: a, first: 0, len: m, first_k: 0, depth: k };
    pack(team, &rows, K::ROWS, panel_a, |_, panel, out| pack_rows(kernel, panel, out), packed_a);
    let (packed_a, Right { data, row: by_width, col: by_depth }) = (&*packed_a, b.turned());
    let width = tiles[1].div_ceil(8 * team.threads);
    let column = |col: usize, sums: &mut [f32], packed_b: &mut [f32]| {
        let place = |row: usize| Place { tile: [row, col], rows: [0, m], cols: [0, n], stride: n };
        let (data, width) = (data.from(col * K::COLS * by_width), K::COLS.min(n - col * K::COLS));
        for first_k in (0..k).step_by(piece) {
            let (depth, first, last) = (piece.min(k - first_k), first_k == 0, first_k + piece >= k);
            let data = data.from(first_k * by_depth);
            let packed = &mut packed_b[..K::panel_b(depth)];
            let pieces = pack_columns(kernel, Panel { data, by_depth, by_width, depth, width }, packed);
            let b = Columns { data: packed, pieces };
            for (row, sums) in sums.chunks_exact_mut(tile_len).enumerate() {
                let a = &packed_a[row * panel_a + K::panel_a(first_k)..][..K::panel_a(depth)];
                let (rows, fresh) = (place(row).height::<K>(), first && start == Start::Zero);
                let sums = Sums { start: sums.as_mut_ptr(), stride: K::COLS, fresh };
                // SAFETY: a buffer has ROWS rows of COLS.
                unsafe {
                    if first && !fresh {
                        place(row).with::<K>(c, true, |c| kernel.take(rows, c, sums));
                    }
                    kernel.multiply(rows, depth, a, b, sums);
                    if last {
                        place(row).with::<K>(c, false, |c| kernel.give(rows, sums, c));
                    }
                }
            }
        }
    };
    team.for_each(m * n * k < SERIAL_WORK, tiles[1].div_ceil(width), |task| {
        let cols = task * width..tiles[1].min((task + 1) * width);
        team.places.with(|places| {
            let mut scratch = places.panel.borrow_mut();
            let (sums, packed_b) =
                scratch.grown(tiles[0] * tile_len + K::panel_b(piece)).split_at_mut(tiles[0] * tile_len);
            kernel.session(|| cols.clone().for_each(|col| column(col, sums, packed_b)));
        });
        then(cols.start * K::COLS..n.min(cols.end * K::COLS));
    });
    team.put_back(scratch);
}

fn blocked<K: Kernel>(
    team: Team,
    kernel: K,
    [m, n, k]: [usize; 3],
    (a, b): (Right, Right),
    c: &Shared<f32>,
    (start, then): (Start, Then),
) {
    let mut scratch = team.take();
    let [a_len, b_len] = packed_floats::<K>([m, n, k]);
    let [packed_a, packed_b] = scratch.each_mut();
    let (packed_a, packed_b) = (packed_a.grown(a_len), packed_b.grown(b_len));
    let [most_rows, most_cols, most_depth] = block_dims::<K>([m, n, k]);
    for first_col in (0..n).step_by(most_cols) {
        for first_k in (0..k).step_by(most_depth) {
            let (cols, depth) = (most_cols.min(n - first_col), most_depth.min(k - first_k));
            let columns = Side { operand: b.turned(), first: first_col, len: cols, first_k, depth };
            let pieces = [const { AtomicUsize::new(0) }; MOST_PANELS];
            let pack_b = |number: usize, panel: Panel<Numbers>, out: &mut [f32]| {
                pieces[number].store(pack_columns(kernel, panel, out), Relaxed);
            };
            pack(team, &columns, K::COLS, K::panel_b(depth), pack_b, packed_b);
            for first_row in (0..m).step_by(most_rows) {
                let rows = Side { operand: a, first: first_row, len: most_rows.min(m - first_row), first_k, depth };
                let pack_a = |_: usize, panel: Panel<Numbers>, out: &mut [f32]| pack_rows(kernel, panel, out);
                pack(team, &rows, K::ROWS, K::panel_a(depth), pack_a, packed_a);
                let fresh = first_k == 0 && start == Start::Zero;
                let block = Block { rows: [first_row, rows.len], cols: [first_col, cols], depth, n, fresh };
                multiply_block(team, kernel, &block, packed_a, (packed_b, &pieces), c);
            }
        }
    }
    team.put_back(scratch);
    then(0..n);
}

/// Rows of A, or columns of B seen as rows, that are packed together.
struct Side<'a> {
    operand: Right<'a>,
    first: usize,
    len: usize,
    first_k: usize,
    depth: usize,
}

fn pack(
    team: Team,
    side: &Side,
    width: usize,
    panel_len: usize,
    pack: impl Fn(usize, Panel<Numbers>, &mut [f32]) + Sync,
    packed: &mut [f32],
) {
    let shared = Shared::new(packed);
    team.for_each(side.len * side.depth < SERIAL_WORK, side.len.div_ceil(width), |panel| {
        // SAFETY: each task writes its own panel.
        let out = unsafe { shared.slice(panel * panel_len, panel_len) };
        let Right { data, row, col } = side.operand;
        let first = panel * width;
        let data = data.from((side.first + first) * row + side.first_k * col);
        let width = width.min(side.len - first);
        pack(panel, Panel { data, by_depth: col, by_width: row, depth: side.depth, width }, out);
    });
}

/// A part of C and the slice of k that is being added to it; `[first, count]`.
struct Block {
    rows: [usize; 2],
    cols: [usize; 2],
    depth: usize,
    /// Row stride of C.
    n: usize,
    fresh: bool,
}

fn multiply_block<K: Kernel>(
    team: Team,
    kernel: K,
    block: &Block,
    a: &[f32],
    (b, pieces): (&[f32], &[AtomicUsize]),
    c: &Shared<f32>,
) {
    let (panel_a, panel_b) = (K::panel_a(block.depth), K::panel_b(block.depth));
    let tiles = [block.rows[1].div_ceil(K::ROWS), block.cols[1].div_ceil(K::COLS)];
    // Enough tasks for every thread: by rows as long as each has so many that B need not be fetched too often, then by
    // columns.
    let wanted = 4 * team.threads;
    let in_cache = TASK_BYTES / (panel_a * size_of::<f32>());
    let height = tiles[0].div_ceil(wanted).max(TASK_ROWS / K::ROWS).min(in_cache).max(1);
    let row_tasks = tiles[0].div_ceil(height);
    let width = tiles[1].div_ceil(wanted.div_ceil(row_tasks).min(tiles[1]));
    let col_tasks = tiles[1].div_ceil(width);
    let serial = block.rows[1] * block.cols[1] * block.depth < SERIAL_WORK;
    team.for_each(serial, row_tasks * col_tasks, |task| {
        let (first_row, first_col) = (task / col_tasks * height, task % col_tasks * width);
        kernel.session(|| {
            for col in first_col..tiles[1].min(first_col + width) {
                // The panel of B goes by in pieces that stay in the first-level cache for all rows.
                for first_k in (0..block.depth).step_by(K::DEPTH) {
                    let (depth, fresh) = (K::DEPTH.min(block.depth - first_k), block.fresh && first_k == 0);
                    let data = &b[col * panel_b + K::panel_b(first_k)..][..K::panel_b(depth)];
                    let b = Columns { data, pieces: pieces[col].load(Relaxed) };
                    for row in first_row..tiles[0].min(first_row + height) {
                        let a = &a[row * panel_a + K::panel_a(first_k)..][..K::panel_a(depth)];
                        let place = Place { tile: [row, col], rows: block.rows, cols: block.cols, stride: block.n };
                        place.with::<K>(c, !fresh, |sums| {
                            // SAFETY: a place has so many rows of COLS.
                            unsafe { kernel.multiply(place.height::<K>(), depth, a, b, Sums { fresh, ..sums }) };
                        });
                    }
                }
            }
        });
    });
}

/// Where a tile lies in C: in a block of it that begins at `[first, count]` rows and columns.
#[derive(Clone, Copy)]
struct Place {
    tile: [usize; 2],
    rows: [usize; 2],
    cols: [usize; 2],
    /// Row stride of C.
    stride: usize,
}

impl Place {
    /// Rows and columns of the tile that are there.
    fn size<K: Kernel>(&self) -> [usize; 2] {
        let [row, col] = self.tile;
        [K::ROWS.min(self.rows[1] - row * K::ROWS), K::COLS.min(self.cols[1] - col * K::COLS)]
    }

    /// The rows that the kernel computes.
    fn height<K: Kernel>(&self) -> usize {
        K::height(self.size::<K>()[0])
    }

    /// Works on `height` rows of COLS: in C, or in a buffer where C ends within the tile, filled from C if that is `read`.
    /// Whoever calls has the tile to itself.
    fn with<K: Kernel>(&self, c: &Shared<f32>, read: bool, work: impl FnOnce(Sums)) {
        let [rows, cols] = self.size::<K>();
        let at = (self.rows[0] + self.tile[0] * K::ROWS) * self.stride + self.cols[0] + self.tile[1] * K::COLS;
        if rows == self.height::<K>() && cols == K::COLS {
            let start = c.block(at, self.stride, rows, cols);
            return work(Sums { start, stride: self.stride, fresh: false });
        }
        self.with_buffer::<K>(c, read, at, work);
    }

    /// Apart, because a buffer that is not needed takes time too.
    #[inline(never)]
    fn with_buffer<K: Kernel>(&self, c: &Shared<f32>, read: bool, at: usize, work: impl FnOnce(Sums)) {
        const { assert!(K::ROWS * K::COLS <= TILE_LEN) };
        let [rows, cols] = self.size::<K>();
        let mut buffer = [0.0f32; TILE_LEN];
        // SAFETY: tiles are disjoint, and this one is the caller's.
        let row_of = |i: usize| unsafe { c.slice(at + i * self.stride, cols) };
        if read {
            (0..rows).for_each(|i| buffer[i * K::COLS..][..cols].copy_from_slice(row_of(i)));
        }
        work(Sums { start: buffer.as_mut_ptr(), stride: K::COLS, fresh: false });
        (0..rows).for_each(|i| row_of(i).copy_from_slice(&buffer[i * K::COLS..][..cols]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{Isa, Philox};

    /// Of both kinds: few rows, and more than a core's cache holds.
    const SIZES: [[usize; 3]; 12] = [
        [1, 1, 1],
        [1, 40, 300],
        [3, 31, 123],
        [13, 33, 257],
        [17, 16, 32],
        [47, 65, 31],
        [252, 123, 64],
        [5, 2100, 520],
        [130, 70, 769],
        [16, 200, 1700],
        [35, 400, 97],
        [360, 130, 640],
    ];

    fn random(len: usize, stream: u64) -> Vec<f32> {
        let random = Philox::new(1, stream);
        (0..len).map(|i| random.normal(i as u64) as f32).collect()
    }

    /// The same numbers with only these bits.
    fn cut(x: Vec<f32>, bits: u32) -> Vec<f32> {
        x.into_iter().map(|x| f32::from_bits(x.to_bits() & bits)).collect()
    }

    fn transpose(x: &[f32], rows: usize, cols: usize) -> Vec<f32> {
        (0..cols).flat_map(|j| (0..rows).map(move |i| x[i * cols + j])).collect()
    }

    /// Every layout of the operands, B with some of its `bits`, kept as bfloat16 too where it has no more, and both starts on some
    /// device: the results are `expected` for `Start::Zero` and `Start::Output`.
    fn check_layouts(cpu: &Cpu, [m, n, k]: [usize; 3], bits: u32, expected: [&[f32]; 2], what: &str) {
        let (a, b, c0) = (random(m * k, 1), cut(random(k * n, 2), bits), random(m * n, 3));
        let (at, bt) = (transpose(&a, m, k), transpose(&b, k, n));
        let few_bits = [&b, &bt].map(|b| b.iter().map(|x| bf16::from_f32(*x)).collect::<Vec<_>>());
        for (start, expected) in [Start::Zero, Start::Output].into_iter().zip(expected) {
            for a in [Operand::new(&a, k), Operand::transposed(&at, m)] {
                let [as_it_is, turned] = few_bits.each_ref().map(|b| Numbers::Bf16(b));
                let mut all: Vec<Right> = vec![Operand::new(&b, n).into(), Operand::transposed(&bt, k).into()];
                if bits == !0xffff {
                    all.extend([Right::new(as_it_is, n), Right::transposed(turned, k)]);
                }
                for b in all {
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
        for ([m, n, k], bits) in SIZES.into_iter().flat_map(|size| [!0, !0xffff].map(|bits| (size, bits))) {
            let (a, b) = (random(m * k, 1), cut(random(k * n, 2), bits));
            let expected = [vec![0.0; m * n], random(m * n, 3)].map(|mut c| {
                chain([m, n, k], &a, &b, &mut c);
                c
            });
            for isa in &sets {
                let cpu = Cpu::with_isa(2, *isa).unwrap();
                check_layouts(&cpu, [m, n, k], bits, expected.each_ref().map(Vec::as_slice), &format!("{isa:?}"));
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
        // Numbers of B with all their bits, with those of a half-precision number, and with those of bfloat16.
        for ([m, n, k], bits) in SIZES.into_iter().flat_map(|size| [!0, !0x1fff, !0xffff].map(|bits| (size, bits))) {
            let (a, bt) = (random(m * k, 1), transpose(&cut(random(k * n, 2), bits), k, n));
            let expected = [vec![0.0; m * n], random(m * n, 3)].map(|mut c| {
                for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                    c[i * n + j] = tile_sum(&a[i * k..][..k], &bt[j * k..][..k], c[i * n + j]);
                }
                c
            });
            for threads in [1, 3] {
                let cpu = Cpu::new(threads).unwrap();
                let what = format!("{threads} threads, bits {bits:x}");
                check_layouts(&cpu, [m, n, k], bits, expected.each_ref().map(Vec::as_slice), &what);
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
        // The same of a column, however few bits its neighbours have.
        let mut found = Vec::new();
        for bits in [!0, !0x1fff, !0xffff] {
            let (a, mut b) = (random(m * k, 1), cut(random(k * n, 2), bits));
            b[65 * n + 7] = f32::INFINITY;
            let half: Vec<bf16> = b.iter().map(|x| bf16::from_f32(*x)).collect();
            for b in [Operand::new(&b, n).into(), Right::new(Numbers::Bf16(&half), n)] {
                let mut c = vec![0.0; m * n];
                gemm(&cpu, [m, n, k], Operand::new(&a, k), b, &mut c, Start::Zero);
                assert!(c.chunks(n).all(|row| row.iter().enumerate().all(|(j, x)| x.is_finite() != (j == 7))));
                found.push(c.iter().skip(7).step_by(n).map(|x| x.is_nan()).collect::<Vec<_>>());
            }
        }
        assert!(found.iter().all(|nan| *nan == found[0]), "an infinity becomes the same whatever lies beside it");
    }
}
