use super::arch::{Slot, Stored};
use super::spec::Spec;
use crate::device::{Arena, Device, Kind, Tensor, View, ViewMut};

/// What a weight is for: initialization and weight decay tell them apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    Matrix,
    Bias,
    Norm,
}

/// A named weight. `grad: None` means frozen.
pub struct Param<D: Device> {
    /// As the checkpoint names it; each part of a fused tensor has a name of its own.
    pub name: String,
    /// How a checkpoint keeps it.
    pub stored: Stored,
    pub role: Role,
    /// Standard deviation of `--init random`; of matrices.
    pub initializer_range: f64,
    pub value: Tensor<D>,
    pub grad: Option<Tensor<D>>,
}

impl<D: Device> Param<D> {
    /// `[rows, cols]` of zeros; `trained` is asked by name.
    pub fn new(
        arena: &mut Arena<D>,
        spec: &Spec,
        (slot, stored): (Slot, Stored),
        [rows, cols]: [usize; 2],
        trained: &dyn Fn(&str) -> bool,
    ) -> Self {
        let name = stored.name();
        let value = arena.floats(Kind::Weights, rows, cols);
        let grad = trained(&name).then(|| arena.floats(Kind::Grads, rows, cols));
        let initializer_range = match slot {
            Slot::Output | Slot::Down => spec.residual_initializer_range,
            _ => spec.initializer_range,
        };
        Self { name, stored, role: slot.role(), initializer_range, value, grad }
    }

    pub fn view(&self) -> View<'_, D> {
        self.value.view()
    }

    /// The gradient to add to, if the weight is trained.
    pub fn grad_mut(&mut self) -> Option<ViewMut<'_, D>> {
        self.grad.as_mut().map(Tensor::view_mut)
    }

    /// Norms and biases are vectors for others.
    pub fn shape(&self) -> Vec<usize> {
        match self.role {
            Role::Matrix => vec![self.value.rows(), self.value.cols()],
            Role::Bias | Role::Norm => vec![self.value.len()],
        }
    }

    /// `[outputs, inputs]`, as [`Stored`] counts; a vector has one column.
    pub fn matrix_shape(&self) -> [usize; 2] {
        match self.role {
            Role::Matrix => [self.value.rows(), self.value.cols()],
            Role::Bias | Role::Norm => [self.value.len(), 1],
        }
    }
}
