use super::arch::{Slot, Stored};
use super::spec::Spec;
use crate::device::{Arena, Device, Kind, Tensor, View, ViewMut};
use crate::error::Result;

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
    /// Of the adapter that trains, not of the model itself.
    pub adapter: bool,
    /// Standard deviation of `--init random`; of matrices.
    pub initializer_range: f64,
    /// What the model computes with.
    pub value: Tensor<D>,
    /// The weight in f32, where `value` is only a rounding of it; its optimizer decides that.
    pub master: Option<Tensor<D>>,
    /// Part of the weight is kept apart from the master: only `value` is the whole.
    pub lazy: bool,
    pub grad: Option<Tensor<D>>,
}

impl<D: Device> Param<D> {
    /// `[rows, cols]` of zeros; `trained` is asked by name. A frozen matrix may be kept as bfloat16 if `bf16` says that its values
    /// are.
    pub fn new(
        arena: &mut Arena<D>,
        spec: &Spec,
        (slot, stored): (Slot, Stored),
        [rows, cols]: [usize; 2],
        (trained, bf16): (&dyn Fn(&str) -> bool, bool),
    ) -> Self {
        let initializer_range = match slot {
            Slot::Output | Slot::Down => spec.residual_initializer_range,
            _ => spec.initializer_range,
        };
        let (trained, bf16) = (trained(&stored.name()), bf16 && slot.multiplies());
        Self { initializer_range, ..Self::with(arena, stored, slot.role(), [rows, cols], (trained, bf16)) }
    }

    /// The same of an adapter.
    pub fn of_adapter(arena: &mut Arena<D>, stored: Stored, shape: [usize; 2], trained: bool) -> Self {
        Self { adapter: true, ..Self::with(arena, stored, Role::Matrix, shape, (trained, false)) }
    }

    /// The same of a value head.
    pub fn of_value_head(arena: &mut Arena<D>, stored: Stored, shape: [usize; 2]) -> Self {
        Self::with(arena, stored, Role::Matrix, shape, (true, false))
    }

    fn with(
        arena: &mut Arena<D>,
        stored: Stored,
        role: Role,
        [rows, cols]: [usize; 2],
        (trained, bf16): (bool, bool),
    ) -> Self {
        let name = stored.name();
        let value = arena.frozen(Kind::Weights, bf16 && !trained, rows, cols);
        let grad = trained.then(|| arena.floats(Kind::Grads, rows, cols));
        let (master, lazy, adapter) = (None, false, false);
        Self { name, stored, role, adapter, initializer_range: 0.0, value, master, lazy, grad }
    }

    /// Gives the weight its values, rounded where it is stored rounded.
    pub fn write(&mut self, device: &D, values: &[f32]) -> Result<()> {
        if let Some(master) = &mut self.master {
            device.write_f32(values, master.view_mut())?;
        }
        device.write_f32(values, self.value.view_mut())
    }

    /// The weight, as exactly as one tensor has it.
    pub fn read(&self, device: &D, out: &mut [f32]) -> Result<()> {
        device.read_f32(self.whole(), out)
    }

    pub fn view(&self) -> View<'_, D> {
        self.value.view()
    }

    /// The weight, as exactly as one tensor has it.
    pub fn whole(&self) -> View<'_, D> {
        self.master.as_ref().filter(|_| !self.lazy).unwrap_or(&self.value).view()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Cpu;

    /// The CPU rounds nothing, so that it shows which of the two is written and read.
    #[test]
    fn the_master_is_what_is_read_and_the_value_what_is_computed_with() {
        let cpu = Cpu::new(1).unwrap();
        let mut arena = Arena::with_bytes(&cpu, 1 << 10).unwrap();
        let mut tensor = || arena.floats(Kind::Weights, 1, 2);
        let (value, master) = (tensor(), Some(tensor()));
        let stored = Stored::whole("w".into());
        let (name, role) = (stored.name(), Role::Norm);
        let (adapter, lazy, initializer_range) = (false, false, 0.0);
        let mut param = Param { name, stored, role, adapter, initializer_range, value, master, lazy, grad: None };
        let read = |param: &Param<Cpu>| {
            let mut out = [0.0; 2];
            param.read(&cpu, &mut out).unwrap();
            out
        };

        param.write(&cpu, &[1.0, 2.0]).unwrap();
        assert_eq!((param.view().f32s(), read(&param)), (&[1.0, 2.0][..], [1.0, 2.0]));
        param.value.view_mut().into_f32s().fill(9.0);
        assert_eq!(read(&param), [1.0, 2.0], "the value is a rounding");
        param.master = None;
        assert_eq!(read(&param), [9.0, 9.0]);
        param.write(&cpu, &[3.0, 4.0]).unwrap();
        assert_eq!(read(&param), [3.0, 4.0]);
    }
}
