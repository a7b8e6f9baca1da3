use crate::device::{Arena, Device, Kind, Tensor, View, ViewMut};

/// What a weight is for: initialization and weight decay tell them apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    Matrix,
    Bias,
    Norm,
}

/// A named weight, as its checkpoint names it. `grad: None` means frozen.
pub struct Param<D: Device> {
    pub name: String,
    pub role: Role,
    pub value: Tensor<D>,
    pub grad: Option<Tensor<D>>,
}

impl<D: Device> Param<D> {
    pub fn new(arena: &mut Arena<D>, name: String, role: Role, [rows, cols]: [usize; 2], trained: bool) -> Self {
        let value = arena.floats(Kind::Weights, rows, cols);
        let grad = trained.then(|| arena.floats(Kind::Grads, rows, cols));
        Self { name, role, value, grad }
    }

    pub fn view(&self) -> View<'_, D> {
        self.value.view()
    }

    /// The gradient to add to, if the weight is trained.
    pub fn grad_mut(&mut self) -> Option<ViewMut<'_, D>> {
        self.grad.as_mut().map(Tensor::view_mut)
    }

    /// As the checkpoint stores it: norms and biases are vectors there.
    pub fn shape(&self) -> Vec<usize> {
        match self.role {
            Role::Matrix => vec![self.value.rows(), self.value.cols()],
            Role::Bias | Role::Norm => vec![self.value.len()],
        }
    }
}
