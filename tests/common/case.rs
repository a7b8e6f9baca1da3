//! An op as a value ([`Case`]), its tensors as data ([`Spec`]), run on any device with equal contents and canaries around
//! every tensor.

use cuvee::device::{Arena, DType, Device, Kind, Philox, Tensor, View, ViewMut};
use cuvee::ops::Backend;
use cuvee::{Error, Result};
use half::bf16;

const SEED: u64 = 20_25;
/// Rows behind every view.
const BEYOND: usize = 2;
/// What they and the gaps between tensors hold; bf16 holds it exactly.
const CANARY: f64 = -776.0;
const GAP: usize = 64;

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
    /// Column i belongs to row i of the batch and to no other.
    pub per_col: bool,
    /// F32 on every device, whatever it keeps activations in.
    always_f32: bool,
    /// An op may round what it computes on the way to this output to what the device keeps activations in.
    pub narrowed: bool,
    pub dtype: DType,
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
        let dtype = if role == Role::Index { DType::U32 } else { DType::F32 };
        let [per_row, per_col, always_f32, narrowed] = [false; 4];
        Self { name, rows, cols, role, per_row, per_col, always_f32, narrowed, dtype, values, indices: Vec::new() }
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
        Self::new(name, shape, Role::Scratch).always_f32()
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

    pub fn per_col(self) -> Self {
        Self { per_col: true, ..self }
    }

    /// A scratch in the type that the device keeps activations in.
    pub fn of_storage(self) -> Self {
        Self { always_f32: false, ..self }
    }

    pub fn always_f32(self) -> Self {
        Self { always_f32: true, ..self }
    }

    /// Of this type on every device.
    pub fn always(self, dtype: DType) -> Self {
        Self { dtype, ..self.always_f32() }
    }

    pub fn narrowed(self) -> Self {
        Self { narrowed: true, ..self }
    }

    pub fn map(mut self, f: impl Fn(f64) -> f64) -> Self {
        self.values.iter_mut().for_each(|x| *x = f64::from(f(*x) as f32));
        self
    }

    pub fn with(self, values: &[f64]) -> Self {
        assert_eq!(values.len(), self.rows * self.cols, "{}", self.name);
        Self { values: values.iter().map(|x| f64::from(*x as f32)).collect(), ..self }
    }

    /// As a device keeps it, contents rounded to that.
    pub fn stored(mut self, storage: DType) -> Self {
        if self.dtype == DType::F32 && !self.always_f32 {
            self.dtype = storage;
        }
        let dtype = self.dtype;
        self.values.iter_mut().for_each(|x| *x = rounded(*x, dtype));
        self
    }

    /// What belongs to rows `first..first + rows` of the batch; tensors that belong to no row whole.
    pub fn cut(&self, first: usize, rows: usize) -> Self {
        let (values, indices) = (self.part(&self.values, first, rows), self.part(&self.indices, first, rows));
        let [kept_rows, cols] = match (self.per_row, self.per_col) {
            (true, _) => [rows, self.cols],
            (_, true) => [self.rows, rows],
            _ => [self.rows, self.cols],
        };
        Self { rows: kept_rows, cols, values, indices, ..self.clone() }
    }

    /// The same of contents of this shape.
    pub fn part<T: Copy>(&self, contents: &[T], first: usize, rows: usize) -> Vec<T> {
        match (self.per_row, self.per_col) {
            (true, _) => contents.get(first * self.cols..(first + rows) * self.cols).unwrap_or_default().to_vec(),
            (_, true) => {
                contents.chunks_exact(self.cols.max(1)).flat_map(|row| &row[first..first + rows]).copied().collect()
            }
            _ => contents.to_vec(),
        }
    }

    /// Of another shape, with what fits of the contents and zeros behind.
    pub fn resized(&self, rows: usize, cols: usize) -> Self {
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

/// What a tensor of this type holds of a number. F32 holds all that the tests write, and in f64 tests no number is rounded.
pub fn rounded(x: f64, dtype: DType) -> f64 {
    if dtype == DType::Bf16 { bf16::from_f32(x as f32).to_f64() } else { x }
}

pub fn put(specs: &mut [Spec], name: &str, values: &[f64]) {
    let spec = specs.iter_mut().find(|s| s.name == name).unwrap_or_else(|| panic!("no tensor is called {name}"));
    assert_eq!(spec.values.len(), values.len(), "{name}");
    spec.values = values.iter().map(|x| rounded(*x, spec.dtype)).collect();
}

pub fn zero(specs: &mut [Spec], names: &[&str]) {
    names.iter().for_each(|name| {
        let len = contents(specs, name).len();
        put(specs, name, &vec![0.0; len]);
    });
}

/// First contents of the tensor called `name`.
pub fn contents(specs: &[Spec], name: &str) -> Vec<f64> {
    specs.iter().find(|s| s.name == name).unwrap_or_else(|| panic!("no tensor is called {name}")).values.clone()
}

/// What the output called `name` holds after a run.
pub fn output_of<'a>(specs: &[Spec], values: &'a [Vec<f64>], name: &str) -> &'a [f64] {
    let at = specs.iter().position(|s| s.name == name).unwrap_or_else(|| panic!("no tensor is called {name}"));
    &values[at]
}

/// A tensor that is larger than its view, and the gap behind it.
pub struct Slot<D: Device> {
    tensor: Tensor<D>,
    gap: Tensor<D>,
    /// Rows before the view and of the view.
    lead: usize,
    rows: usize,
}

impl<D: Device> Slot<D> {
    pub fn view(&self) -> View<'_, D> {
        self.tensor.view().slice(self.lead, self.rows)
    }

    pub fn view_mut(&mut self) -> ViewMut<'_, D> {
        self.tensor.view_mut().slice(self.lead, self.rows)
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

/// The case's tensors as the device keeps them.
pub fn specs_on<D: Device, C: Case>(device: &D, case: &C) -> Vec<Spec> {
    case.specs().into_iter().map(|spec| spec.stored(device.storage())).collect()
}

/// Filled tensors. With a `lead`, views start that many rows after where tensors are aligned.
pub fn slots<D: Device>(device: &D, specs: &[Spec], lead: usize) -> Vec<Slot<D>> {
    let gap = Arena::<D>::bytes_of(DType::F32, 1, GAP);
    let rows = |s: &Spec| lead + s.rows + BEYOND;
    let bytes = specs.iter().map(|s| gap + Arena::<D>::bytes_of(s.dtype, rows(s), s.cols)).sum();
    let mut arena = Arena::with_bytes(device, bytes).unwrap();
    let slot = |s: &Spec| {
        let tensor = arena.take(Kind::Activations, s.dtype, rows(s), s.cols);
        let mut slot = Slot { tensor, gap: arena.floats(Kind::Activations, 1, GAP), lead, rows: s.rows };
        fill(device, s, &mut slot);
        slot
    };
    specs.iter().map(slot).collect()
}

fn fill<D: Device>(device: &D, spec: &Spec, slot: &mut Slot<D>) {
    device.write_f64(&[CANARY; GAP], slot.gap.view_mut()).unwrap();
    let (before, beyond) = (slot.lead * spec.cols, BEYOND * spec.cols);
    if spec.role == Role::Index {
        let indices = [vec![u32::MAX; before], spec.indices.clone(), vec![u32::MAX; beyond]].concat();
        return device.write_u32(&indices, slot.tensor.view_mut()).unwrap();
    }
    let canary = canary(spec);
    let values = [vec![canary; before], spec.values.clone(), vec![canary; beyond]].concat();
    device.write_f64(&values, slot.tensor.view_mut()).unwrap();
}

/// Reading past an input poisons the result; writing past an output is seen.
fn canary(spec: &Spec) -> f64 {
    if spec.is_output() { CANARY } else { f64::NAN }
}

pub fn same(a: f64, b: f64) -> bool {
    a == b || a.is_nan() && b.is_nan()
}

/// What the tensor holds; panics unless canaries, and inputs, are as they were.
fn read<D: Device>(device: &D, what: &str, spec: &Spec, slot: &Slot<D>) -> Vec<f64> {
    let mut gap = [0.0; GAP];
    device.read_f64(slot.gap.view(), &mut gap).unwrap();
    assert!(gap.iter().all(|x| *x == CANARY), "{what}: wrote behind {}", spec.name);
    let view = slot.lead * spec.cols..(slot.lead + spec.rows) * spec.cols;
    if spec.role == Role::Index {
        let mut all = vec![0; slot.tensor.len()];
        device.read_u32(slot.tensor.view(), &mut all).unwrap();
        assert!(all[view] == spec.indices, "{what}: changed the index {}", spec.name);
        return Vec::new();
    }
    let mut all = vec![0.0; slot.tensor.len()];
    device.read_f64(slot.tensor.view(), &mut all).unwrap();
    let mut around = all[..view.start].iter().chain(&all[view.end..]);
    assert!(around.all(|x| same(*x, canary(spec))), "{what}: wrote rows of {} outside its view", spec.name);
    let values = &all[view];
    if spec.role == Role::Input {
        assert!(values.iter().zip(&spec.values).all(|(x, y)| same(*x, *y)), "{what}: changed its input {}", spec.name);
    }
    values.to_vec()
}

/// How a case is run.
#[derive(Clone, Copy)]
pub struct Manner {
    pub times: usize,
    /// Rows before each view: where they are not whole 16-byte words, kernels cannot use wide loads.
    pub lead: usize,
}

pub const ONCE: Manner = Manner { times: 1, lead: 0 };

/// All tensors after some runs.
pub fn run_as<D: Backend, C: Case>(device: &D, case: &C, specs: &[Spec], manner: Manner) -> Vec<Vec<f64>> {
    let what = format!("{} on {}", case.op(), D::NAME);
    let mut slots = slots(device, specs, manner.lead);
    for _ in 0..manner.times {
        case.run(device, &mut slots).unwrap_or_else(|e| panic!("{what}: {e}"));
    }
    specs.iter().zip(&slots).map(|(spec, slot)| read(device, &what, spec, slot)).collect()
}

pub fn run<D: Backend, C: Case>(device: &D, case: &C, specs: &[Spec]) -> Vec<Vec<f64>> {
    run_as(device, case, specs, ONCE)
}

/// The error of a run, if it has one.
pub fn refusal<D: Backend, C: Case>(device: &D, case: &C, specs: &[Spec]) -> Option<Error> {
    case.run(device, &mut slots(device, specs, 0)).err()
}
