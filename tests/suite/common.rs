//! The harness of the op tests: an op as a value ([`Case`]), its tensors as data ([`Spec`]), run on any device
//! with equal contents, canaries around every tensor, and the closeness rule.
//!
//! **Closeness.** With both errors taken against the f64 oracle, the error of an op must not exceed twice the
//! error of a straightforward f32 evaluation of the same formula (DeepGEMM, Flash-Attention), largest error
//! against largest error over a whole output. The floor, 2^-21 of the output's largest value (four roundings),
//! covers outputs with few elements, where a straightforward evaluation can be exact by luck.

use cuvee::device::{Arena, Cpu, DType, Device, Dry, HostSpan, Isa, Kind, Philox, Reference, Tensor, View, ViewMut};
use cuvee::ops::Backend;
use cuvee::{Error, Result};

const SEED: u64 = 20_25;
/// Rows behind every view.
const BEYOND: usize = 2;
/// What they and the gaps between tensors hold.
const CANARY: f64 = 777.25;
const FLOOR: f64 = 1.0 / (1 << 21) as f64;

/// The contract of one tensor of an op.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    Input,
    Index,
    /// `=`: holds NaN before.
    Set,
    /// `+=`: holds random numbers before.
    Add,
    /// Read and overwritten.
    InPlace,
    /// Holds NaN before, anything after.
    Scratch,
}

#[derive(Clone, Debug)]
pub struct Spec {
    pub name: &'static str,
    pub rows: usize,
    pub cols: usize,
    pub role: Role,
    /// Row i belongs to row i of the batch and to no other.
    pub per_row: bool,
    pub values: Vec<f64>,
    pub indices: Vec<u32>,
}

/// `len` standard normal numbers that f32 holds exactly, other ones for every name.
pub fn normals(name: &str, len: usize) -> Vec<f64> {
    let random = Philox::named(SEED, name);
    (0..len).map(|i| f64::from(random.normal(i as u64) as f32)).collect()
}

impl Spec {
    fn new(name: &'static str, [rows, cols]: [usize; 2], role: Role) -> Self {
        let values = match role {
            Role::Index => Vec::new(),
            Role::Set | Role::Scratch => vec![f64::NAN; rows * cols],
            Role::Input | Role::Add | Role::InPlace => normals(name, rows * cols),
        };
        Self { name, rows, cols, role, per_row: false, values, indices: Vec::new() }
    }

    pub fn input(name: &'static str, shape: [usize; 2]) -> Self {
        Self::new(name, shape, Role::Input)
    }

    pub fn set(name: &'static str, shape: [usize; 2]) -> Self {
        Self::new(name, shape, Role::Set)
    }

    pub fn add(name: &'static str, shape: [usize; 2]) -> Self {
        Self::new(name, shape, Role::Add)
    }

    pub fn in_place(name: &'static str, shape: [usize; 2]) -> Self {
        Self::new(name, shape, Role::InPlace)
    }

    pub fn scratch(name: &'static str, shape: [usize; 2]) -> Self {
        Self::new(name, shape, Role::Scratch)
    }

    pub fn index(name: &'static str, cols: usize, indices: Vec<u32>) -> Self {
        Self { indices, ..Self::new(name, [0, cols], Role::Index) }.counted()
    }

    fn counted(self) -> Self {
        Self { rows: self.indices.len() / self.cols, ..self }
    }

    pub fn per_row(self) -> Self {
        Self { per_row: true, ..self }
    }

    pub fn map(mut self, f: impl Fn(f64) -> f64) -> Self {
        self.values.iter_mut().for_each(|x| *x = f64::from(f(*x) as f32));
        self
    }

    pub fn with(self, values: &[f64]) -> Self {
        assert_eq!(values.len(), self.rows * self.cols, "{}", self.name);
        Self { values: values.iter().map(|x| f64::from(*x as f32)).collect(), ..self }
    }

    /// Rows `first..first + rows` of a per-row tensor; the others whole.
    fn cut(&self, first: usize, rows: usize) -> Self {
        if !self.per_row {
            return self.clone();
        }
        let at = first * self.cols..(first + rows) * self.cols;
        let values = self.values.get(at.clone()).unwrap_or_default().to_vec();
        Self { rows, values, indices: self.indices.get(at).unwrap_or_default().to_vec(), ..self.clone() }
    }

    /// Of another shape, with what fits of the contents and zeros behind.
    fn resized(&self, rows: usize, cols: usize) -> Self {
        let mut spec = Self { rows, cols, ..self.clone() };
        match self.role {
            Role::Index => spec.indices.resize(rows * cols, 0),
            _ => spec.values.resize(rows * cols, 0.0),
        }
        spec
    }

    pub fn is_output(&self) -> bool {
        matches!(self.role, Role::Set | Role::Add | Role::InPlace)
    }
}

/// A tensor that is larger than its view, and the gap behind it.
pub struct Slot<D: Device> {
    tensor: Tensor<D>,
    gap: Tensor<D>,
    rows: usize,
}

impl<D: Device> Slot<D> {
    pub fn view(&self) -> View<'_, D> {
        self.tensor.top(self.rows)
    }

    pub fn view_mut(&mut self) -> ViewMut<'_, D> {
        self.tensor.top_mut(self.rows)
    }

    /// The gradient if it is wanted.
    pub fn wanted(&mut self, wanted: bool) -> Option<ViewMut<'_, D>> {
        wanted.then(|| self.view_mut())
    }
}

/// One op with its scalars and shapes.
pub trait Case {
    /// As the op's errors call it.
    fn op(&self) -> &'static str;
    fn specs(&self) -> Vec<Spec>;
    /// Tensors come in the order of `specs`, whose shapes may have been changed since.
    fn run<D: Backend>(&self, device: &D, t: &mut [Slot<D>]) -> Result<()>;
    /// The formula, left to right in f32. Outputs hold their first contents (`=`: zeros).
    fn naive(&self, specs: &[Spec], t: &mut [Vec<f32>]);
    /// Names of tensors that may have more rows than this without being refused.
    fn may_grow(&self) -> &[&'static str] {
        &[]
    }
}

fn slots<D: Device>(device: &D, specs: &[Spec]) -> Vec<Slot<D>> {
    let dtype = |s: &Spec| if s.role == Role::Index { DType::U32 } else { DType::F32 };
    let gap = Arena::<D>::bytes_of(DType::F32, 1, 64);
    let bytes = specs.iter().map(|s| gap + Arena::<D>::bytes_of(dtype(s), s.rows + BEYOND, s.cols)).sum();
    let mut arena = Arena::with_bytes(device, bytes).unwrap();
    let mut slot = |s: &Spec| {
        let tensor = arena.take(Kind::Activations, dtype(s), s.rows + BEYOND, s.cols);
        Slot { tensor, gap: arena.floats(Kind::Activations, 1, 64), rows: s.rows }
    };
    specs.iter().map(&mut slot).collect()
}

fn fill<D: Device>(device: &D, spec: &Spec, slot: &mut Slot<D>) {
    device.write_f64(&[CANARY; 64], slot.gap.view_mut()).unwrap();
    let beyond = BEYOND * spec.cols;
    if spec.role == Role::Index {
        let indices: Vec<u32> = spec.indices.iter().copied().chain(vec![u32::MAX; beyond]).collect();
        return device.write_u32(&indices, slot.tensor.view_mut()).unwrap();
    }
    // Reading past an input poisons the result; writing past an output is seen.
    let canary = if spec.is_output() { CANARY } else { f64::NAN };
    let values: Vec<f64> = spec.values.iter().copied().chain(vec![canary; beyond]).collect();
    device.write_f64(&values, slot.tensor.view_mut()).unwrap();
}

fn same(a: f64, b: f64) -> bool {
    a == b || a.is_nan() && b.is_nan()
}

/// What the tensor holds; panics unless canaries, and inputs, are as they were.
fn read<D: Device<Span = HostSpan>>(device: &D, what: &str, spec: &Spec, slot: &Slot<D>) -> Vec<f64> {
    let mut gap = [0.0; 64];
    device.read_f64(slot.gap.view(), &mut gap).unwrap();
    assert!(gap.iter().all(|x| *x == CANARY), "{what}: wrote behind {}", spec.name);
    if spec.role == Role::Index {
        let kept = slot.view().u32s() == spec.indices;
        assert!(kept, "{what}: changed the index {}", spec.name);
        return Vec::new();
    }
    let mut all = vec![0.0; slot.tensor.len()];
    device.read_f64(slot.tensor.view(), &mut all).unwrap();
    let beyond = all.split_off(spec.rows * spec.cols);
    let untouched = beyond.iter().all(|x| if spec.is_output() { *x == CANARY } else { x.is_nan() });
    assert!(untouched, "{what}: wrote rows of {} past its view", spec.name);
    if spec.role == Role::Input {
        assert!(all.iter().zip(&spec.values).all(|(x, y)| same(*x, *y)), "{what}: changed its input {}", spec.name);
    }
    all
}

/// All tensors after `times` runs.
pub fn run_times<D, C>(device: &D, case: &C, specs: &[Spec], times: usize) -> Vec<Vec<f64>>
where
    D: Backend + Device<Span = HostSpan>,
    C: Case,
{
    let what = format!("{} on {}", case.op(), D::NAME);
    let mut slots = slots(device, specs);
    specs.iter().zip(&mut slots).for_each(|(spec, slot)| fill(device, spec, slot));
    for _ in 0..times {
        case.run(device, &mut slots).unwrap_or_else(|e| panic!("{what}: {e}"));
    }
    specs.iter().zip(&slots).map(|(spec, slot)| read(device, &what, spec, slot)).collect()
}

pub fn run<D: Backend + Device<Span = HostSpan>, C: Case>(device: &D, case: &C, specs: &[Spec]) -> Vec<Vec<f64>> {
    run_times(device, case, specs, 1)
}

/// What the output called `name` holds after a run.
pub fn output_of<'a>(specs: &[Spec], values: &'a [Vec<f64>], name: &str) -> &'a [f64] {
    let at = specs.iter().position(|s| s.name == name).unwrap_or_else(|| panic!("no tensor is called {name}"));
    &values[at]
}

pub fn cpu() -> Cpu {
    Cpu::new(2).unwrap()
}

fn largest(values: impl Iterator<Item = f64>) -> f64 {
    values.fold(0.0, |m, x| if x.is_nan() { f64::INFINITY } else { m.max(x) })
}

fn largest_difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    largest(a.iter().zip(b).map(|(a, b)| if a == b { 0.0 } else { (a - b).abs() }))
}

/// The closeness rule (see the head of this file).
pub fn assert_close(what: &str, found: &[f64], naive: &[f64], oracle: &[f64]) {
    let (error, allowed) = (largest_difference(found, oracle), largest_difference(naive, oracle));
    let size = largest(oracle.iter().map(|x| x.abs()));
    assert!(
        size.is_finite() && allowed <= 1e-3 * size,
        "{what}: the comparison itself is off by {allowed:e} of {size:e}"
    );
    assert!(
        error <= 2.0 * allowed + FLOOR * size,
        "{what}: error {error:e}, straightforward f32 {allowed:e}, size {size:e}"
    );
}

/// The CPU against the oracle, on every output.
pub fn compare<C: Case>(case: &C) {
    let specs = case.specs();
    let (found, oracle) = (run(&cpu(), case, &specs), run(&Reference, case, &specs));
    let first = |s: &Spec| match s.role {
        Role::Set => vec![0.0; s.values.len()],
        _ => s.values.iter().map(|x| *x as f32).collect::<Vec<f32>>(),
    };
    let mut naive: Vec<Vec<f32>> = specs.iter().map(first).collect();
    case.naive(&specs, &mut naive);
    for (i, spec) in specs.iter().enumerate().filter(|(_, s)| s.is_output()) {
        let what = format!("{} {:?} {}", case.op(), [spec.rows, spec.cols], spec.name);
        let naive: Vec<f64> = naive[i].iter().map(|x| f64::from(*x)).collect();
        assert_close(&what, &found[i], &naive, &oracle[i]);
    }
}

fn assert_same_bits(what: &str, specs: &[Spec], found: &[Vec<f64>], expected: &[Vec<f64>]) {
    for ((spec, found), expected) in specs.iter().zip(found).zip(expected).filter(|((s, _), _)| s.is_output()) {
        // Every f32 is an f64 of its own; only the sign of zero needs its bits.
        let first = found.iter().zip(expected).position(|(a, b)| a.to_bits() != b.to_bits());
        assert!(first.is_none() && found.len() == expected.len(), "{what}: {} differs at {first:?}", spec.name);
    }
}

/// Devices whose results must be equal, bit for bit: chains on any instruction set, whatever the machine multiplies
/// with otherwise; each on some numbers of threads.
pub fn families() -> [Vec<(String, Cpu)>; 2] {
    let best = Isa::detect();
    let mut chains = vec![(1, best), (2, best), (5, best), (2, Isa::Portable)];
    #[cfg(target_arch = "x86_64")]
    chains.extend([(2, Isa::Avx2)].into_iter().filter(|(_, isa)| *isa <= best));
    let chains = chains.into_iter().map(|(threads, isa)| {
        let what = format!("{threads} threads, {isa:?}, chains");
        (what, Cpu::with_isa(threads, isa).unwrap())
    });
    let fastest = [1, 2, 5].into_iter().map(|threads| {
        let cpu = Cpu::new(threads).unwrap();
        (format!("{threads} threads, {best:?}, {:?}", cpu.products()), cpu)
    });
    [chains.collect(), fastest.collect()]
}

/// Threads and instruction sets must not change a bit.
pub fn same_on_every_machine<C: Case>(case: &C) {
    let specs = case.specs();
    for family in families() {
        let expected = run(&family[0].1, case, &specs);
        for (what, cpu) in &family[1..] {
            assert_same_bits(&format!("{}, {what}", case.op()), &specs, &run(cpu, case, &specs), &expected);
        }
    }
}

/// Some rows alone must give the bits that they have among all.
pub fn same_for_some_rows<C: Case>(case: &C) {
    let specs = case.specs();
    let rows = specs.iter().find(|s| s.per_row).expect("the case has per-row tensors").rows;
    let all = run(&cpu(), case, &specs);
    for (first, count) in [(0, 1), (rows - 1, 1), (rows - 3, 3), (1, rows - 1)] {
        let some: Vec<Spec> = specs.iter().map(|s| s.cut(first, count)).collect();
        let found = run(&cpu(), case, &some);
        let outputs = (0..specs.len()).filter(|i| specs[*i].per_row && specs[*i].is_output());
        for i in outputs {
            let expected = &all[i][first * specs[i].cols..(first + count) * specs[i].cols];
            let what = format!("{}: rows {first}..{} of {rows} alone", case.op(), first + count);
            assert_same_bits(&what, &some[i..=i], &found[i..=i], &[expected.to_vec()]);
        }
    }
}

/// From zero, two runs leave twice what one leaves in every `+=` output, and the same in every `=` output.
pub fn twice_is_double<C: Case>(case: &C) {
    let zeroed = |s: Spec| if s.role == Role::Add { s.map(|_| 0.0) } else { s };
    let specs: Vec<Spec> = case.specs().into_iter().map(zeroed).collect();
    let (once, twice) = (run(&cpu(), case, &specs), run_times(&cpu(), case, &specs, 2));
    for (i, spec) in specs.iter().enumerate().filter(|(_, s)| s.is_output()) {
        let factor = if spec.role == Role::Add { 2.0 } else { 1.0 };
        let expected: Vec<f64> = once[i].iter().map(|x| x * factor).collect();
        let size = largest(expected.iter().map(|x| x.abs()));
        let error = largest_difference(&twice[i], &expected);
        // Sums that continue from the first run round otherwise; a lost or repeated run is off by `size` / 2.
        assert!(size > 0.0 && error <= 1e-5 * size, "{}: {} is off by {error:e} of {size:e}", case.op(), spec.name);
    }
}

/// Gradients that are not wanted stay as they are, and the others do not change. `wanted[i]` belongs to the i-th
/// optional output, `optional[i]`.
pub fn unwanted_stay<C: Case>(all: &C, some: &C, optional: &[&str], wanted: &[bool]) {
    let specs = all.specs();
    let (full, part) = (run(&cpu(), all, &specs), run(&cpu(), some, &specs));
    let oracle = run(&Reference, some, &specs);
    for (i, spec) in specs.iter().enumerate().filter(|(_, s)| s.is_output()) {
        let kept = optional.iter().position(|o| *o == spec.name).is_none_or(|at| wanted[at]);
        let expected = if kept { &full[i] } else { &spec.values };
        let what = format!("{}, wanted {wanted:?}", all.op());
        assert_same_bits(&what, &specs[i..=i], &part[i..=i], std::slice::from_ref(expected));
        assert!(kept || oracle[i] == spec.values, "{what}: the reference wrote {}", spec.name);
    }
}

/// A NaN anywhere in a float input must come out exactly where the oracle has one.
pub fn nan_surfaces<C: Case>(case: &C) {
    let specs = case.specs();
    let readable = |s: &Spec| matches!(s.role, Role::Input | Role::InPlace);
    for (i, len) in specs.iter().enumerate().filter(|(_, s)| readable(s)).map(|(i, s)| (i, s.values.len())) {
        for at in [0, len / 2, len - 1] {
            let mut poisoned = specs.clone();
            poisoned[i].values[at] = f64::NAN;
            let (found, oracle) = (run(&cpu(), case, &poisoned), run(&Reference, case, &poisoned));
            let mut seen = false;
            for (o, spec) in specs.iter().enumerate().filter(|(_, s)| s.is_output()) {
                let first = found[o].iter().zip(&oracle[o]).position(|(a, b)| a.is_nan() != b.is_nan());
                let what = format!("{}: NaN in {}[{at}]", case.op(), specs[i].name);
                assert!(first.is_none(), "{what}: {} differs at {first:?}", spec.name);
                seen |= found[o].iter().any(|x| x.is_nan());
            }
            assert!(seen, "{}: a NaN in {}[{at}] vanishes", case.op(), specs[i].name);
        }
    }
}

/// One row or one column more in any tensor is an error that names the op and a shape, on every device.
pub fn wrong_shapes_are_refused<C: Case>(case: &C) {
    let specs = case.specs();
    assert!(refusal(&cpu(), case, &specs).is_none(), "{}: refuses the right shapes", case.op());
    assert!(refusal(&Dry::default(), case, &specs).is_none(), "{}: refuses the right shapes, dry", case.op());
    for (i, spec) in specs.iter().enumerate() {
        for [rows, cols] in [[spec.rows + 1, spec.cols], [spec.rows, spec.cols + 1]] {
            if case.may_grow().contains(&spec.name) && cols == spec.cols {
                continue;
            }
            let mut wrong = specs.clone();
            wrong[i] = spec.resized(rows, cols);
            let what = format!("{}: {} [{rows}, {cols}] for {:?}", case.op(), spec.name, [spec.rows, spec.cols]);
            let errors = [
                refusal(&cpu(), case, &wrong),
                refusal(&Reference, case, &wrong),
                refusal(&Dry::default(), case, &wrong),
            ];
            for error in errors {
                let Some(error) = error else { panic!("{what} was taken") };
                let message = error.to_string();
                assert!(matches!(error, Error::Op { .. }) && message.starts_with(case.op()), "{what}: {message}");
                assert!(message.contains('['), "{what}: {message}");
            }
        }
    }
}

fn refusal<D: Backend, C: Case>(device: &D, case: &C, specs: &[Spec]) -> Option<Error> {
    let mut slots = slots(device, specs);
    specs.iter().zip(&mut slots).for_each(|(spec, slot)| fill(device, spec, slot));
    case.run(device, &mut slots).err()
}

/// `gradient` against central differences of `loss` at `at`, in f64: 1e-6 of the gradient's size, which is far
/// above truncation (step^2 = 1e-10) and rounding (1e-16 / step = 1e-11).
pub fn assert_gradient(what: &str, at: &[f64], gradient: &[f64], mut loss: impl FnMut(&[f64]) -> f64) {
    const STEP: f64 = 1e-5;
    assert_eq!(at.len(), gradient.len(), "{what}");
    let mut moved = at.to_vec();
    let differences: Vec<f64> = (0..at.len())
        .map(|i| {
            moved[i] = at[i] + STEP;
            let high = loss(&moved);
            moved[i] = at[i] - STEP;
            let low = loss(&moved);
            moved[i] = at[i];
            (high - low) / (2.0 * STEP)
        })
        .collect();
    let size = largest(differences.iter().map(|x| x.abs()));
    let error = largest_difference(gradient, &differences);
    assert!(size > 0.0 && error <= 1e-6 * size.max(1.0), "{what}: off by {error:e} of {size:e}");
}

/// One priced run.
pub fn run_dry<C: Case>(device: &Dry, case: &C) {
    let specs = case.specs();
    let mut slots = slots(device, &specs);
    specs.iter().zip(&mut slots).for_each(|(spec, slot)| fill(device, spec, slot));
    case.run(device, &mut slots).unwrap();
}
