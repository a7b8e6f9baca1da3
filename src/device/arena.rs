use super::{ALIGN_BYTES, DType, Device, Storage, Tensor};
use crate::error::Result;

/// What memory is for; the columns of `cuvee plan`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Weights,
    Grads,
    States,
    Activations,
    Workspace,
}

/// Bytes by [`Kind`].
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Ledger([usize; 5]);

impl Ledger {
    pub fn get(&self, kind: Kind) -> usize {
        self.0[kind as usize]
    }

    pub fn total(&self) -> usize {
        self.0.iter().sum()
    }
}

/// Carves tensors out of one allocation.
///
/// Constructors of models, activations and optimizer states take `&mut Arena<D>` and nothing else, so the
/// same code measures (on [`super::Dry`]) and allocates: the two cannot drift. An arena lives as long as
/// its phase (run, score, train, evaluate, rollout) and is dropped before the next one starts.
pub struct Arena<D: Device> {
    rest: Option<D::Span>,
    left_bytes: usize,
    ledger: Ledger,
    /// Of the device ([`Device::keeps`]).
    storage: Storage,
}

impl<D: Device> Arena<D> {
    /// An arena that holds exactly what `ledger` counted.
    pub fn new(device: &D, ledger: &Ledger) -> Result<Self> {
        Self::with_bytes(device, ledger.total())
    }

    pub fn with_bytes(device: &D, bytes: usize) -> Result<Self> {
        let (rest, storage) = (Some(device.alloc(bytes)?), device.keeps());
        Ok(Self { rest, left_bytes: bytes, ledger: Ledger::default(), storage })
    }

    /// Bytes that `take` will use for such a tensor.
    pub fn bytes_of(dtype: DType, rows: usize, cols: usize) -> usize {
        (rows * cols * D::width(dtype)).next_multiple_of(ALIGN_BYTES)
    }

    /// A zeroed tensor. Panics when the arena is too small: the plan and the run took different paths.
    pub fn take(&mut self, kind: Kind, dtype: DType, rows: usize, cols: usize) -> Tensor<D> {
        let bytes = Self::bytes_of(dtype, rows, cols);
        assert!(bytes <= self.left_bytes, "{kind:?} [{rows}, {cols}] was not planned: {} bytes left", self.left_bytes);
        let (span, rest) = D::split(self.rest.take().expect("take always puts the rest back"), bytes);
        self.rest = Some(rest);
        self.left_bytes -= bytes;
        self.ledger.0[kind as usize] += bytes;
        Tensor { span, dtype, rows, cols }
    }

    /// What the device keeps weights and activations in.
    pub fn storage(&self) -> DType {
        self.storage.dtype
    }

    /// For weights, activations and gradients by activations: in the device's storage type.
    pub fn stored(&mut self, kind: Kind, rows: usize, cols: usize) -> Tensor<D> {
        self.take(kind, self.storage.dtype, rows, cols)
    }

    /// For a weight that nothing changes; `bf16` says that its values are bfloat16.
    pub fn frozen(&mut self, kind: Kind, bf16: bool, rows: usize, cols: usize) -> Tensor<D> {
        let dtype = if bf16 && self.storage.bf16_matrices { DType::Bf16 } else { self.storage.dtype };
        self.take(kind, dtype, rows, cols)
    }

    /// For statistics, gradients of weights and optimizer states: F32, whatever the storage type.
    pub fn floats(&mut self, kind: Kind, rows: usize, cols: usize) -> Tensor<D> {
        self.take(kind, DType::F32, rows, cols)
    }

    pub fn indices(&mut self, kind: Kind, rows: usize, cols: usize) -> Tensor<D> {
        self.take(kind, DType::U32, rows, cols)
    }

    pub fn ledger(&self) -> Ledger {
        self.ledger
    }
}
