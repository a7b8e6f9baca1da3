//! A value head: one number for each token that is scored, a linear function of the row that predicts it. It is trained beside the
//! model and part of no checkpoint that others read.

use super::arch::Stored;
use super::{Acts, Batch, Model, Param, Spec};
use crate::data::Extent;
use crate::device::{Arena, Device, Kind, Tensor};
use crate::error::Result;
use crate::ops::{Backend, linear};

/// The name of its weight, beside those of the model.
pub const VALUE_HEAD: &str = "value_head.weight";

pub struct ValueHead<D: Device> {
    /// `[1, hidden]`. Zeros at first: then all values are 0.
    pub weight: Param<D>,
}

/// What values need and leave behind for one batch.
pub struct ValueActs<D: Device> {
    /// `[targets, 1]`, F32
    values: Tensor<D>,
    /// `[targets, 1]`, in the type of what it is given to.
    dvalues: Tensor<D>,
}

impl<D: Device> ValueHead<D> {
    pub fn new(arena: &mut Arena<D>, spec: &Spec) -> Self {
        Self { weight: Param::of_value_head(arena, Stored::whole(VALUE_HEAD.into()), [1, spec.hidden]) }
    }
}

impl<D: Device> ValueActs<D> {
    pub fn new(arena: &mut Arena<D>, largest: &Extent) -> Self {
        let values = arena.floats(Kind::Activations, largest.targets, 1);
        Self { values, dvalues: arena.stored(Kind::Activations, largest.targets, 1) }
    }

    /// `[targets]` of the batch that [`Model::values`] saw.
    pub fn read(&self, device: &D, targets: usize) -> Result<Vec<f32>> {
        let mut values = vec![0.0; targets];
        device.read_f32(self.values.top(targets), &mut values).map(|()| values)
    }
}

/// The part of an objective that is a function of values, for [`Model::backward_of`].
pub struct ValueTerm<'a, D: Device> {
    pub head: &'a mut ValueHead<D>,
    pub acts: &'a mut ValueActs<D>,
    /// `[targets]`: the objective's derivative by each value.
    pub dvalues: &'a [f64],
}

impl<B: Backend> Model<B> {
    /// Values of the batch's targets, of which `acts` is what [`forward`](Self::forward) left.
    pub fn values(
        &self,
        device: &B,
        batch: &Batch<B>,
        acts: &Acts<B>,
        (head, into): (&ValueHead<B>, &mut ValueActs<B>),
    ) -> Result<()> {
        let targets = batch.size().targets;
        let (x, weight, y) = (acts.top.normed.top(targets), head.weight.view(), into.values.top_mut(targets));
        device.linear(linear::Forward { x, weight, bias: None, residual: None, y })
    }
}

impl<B: Backend> ValueTerm<'_, B> {
    /// Adds to the head's gradient and to that by the rows it read.
    pub(super) fn backward(self, device: &B, targets: usize, acts: &mut Acts<B>) -> Result<()> {
        let Self { head, acts: own, dvalues } = self;
        let (top, s) = acts.top_and_scratch();
        device.write_f64(dvalues, own.dvalues.top_mut(targets))?;
        let Param { value, grad, .. } = &mut head.weight;
        device.linear_backward(linear::Backward {
            dy: own.dvalues.top(targets),
            x: top.normed.top(targets),
            weight: value.view(),
            dx: Some(s.d_top_normed.top_mut(targets)),
            dweight: grad.as_mut().map(Tensor::view_mut),
            dbias: None,
        })
    }
}
