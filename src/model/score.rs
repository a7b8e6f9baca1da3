//! The head of a reward model: one number for each sequence.

use super::{Acts, Batch, Model, Param};
use crate::device::Tensor;
use crate::error::Result;
use crate::ops::{Backend, linear};

const NO_HEAD: &str = "a language model gives no scores";

impl<B: Backend> Model<B> {
    /// The scores of the batch's sequences into `acts.top.logp`, in F32 whatever is stored: the product of the head's
    /// weight with the final norm's output at the one row that is read of each ([`Read::Last`](crate::data::Read)), as
    /// transformers' `AutoModelForSequenceClassification` with one label.
    ///
    /// Panics where the model's head is not [`Head::Score`](super::Head).
    pub fn scores(&self, device: &B, batch: &Batch<B>, acts: &mut Acts<B>) -> Result<()> {
        self.hidden(device, batch, acts, None)?;
        let sequences = batch.size().targets;
        let weight = self.score.as_ref().expect(NO_HEAD).view();
        let (x, y) = (acts.top.normed.top(sequences), acts.top.logp.top_mut(sequences));
        device.linear(linear::Forward { x, weight, bias: None, residual: None, y })
    }

    /// Adds to every trained weight's gradient. `dscores` is the objective's derivative by each sequence's score;
    /// where bfloat16 is stored it is rounded to that. `acts` is what [`scores`](Self::scores) left.
    pub fn backward_scores(&mut self, device: &B, batch: &Batch<B>, dscores: &[f64], acts: &mut Acts<B>) -> Result<()> {
        let sequences = batch.size().targets;
        let (top, s) = acts.top_and_scratch();
        device.write_f64(dscores, s.dlogp.top_mut(sequences))?;
        device.zero(s.d_top_normed.top_mut(sequences))?;
        let Param { value, grad, .. } = self.score.as_mut().expect(NO_HEAD);
        device.linear_backward(linear::Backward {
            dy: s.dlogp.top(sequences),
            x: top.normed.top(sequences),
            weight: value.view(),
            dx: Some(s.d_top_normed.top_mut(sequences)),
            dweight: grad.as_mut().map(Tensor::view_mut),
            dbias: None,
        })?;
        self.backward_top(device, batch, acts)?;
        self.backward_blocks(device, batch, acts)
    }
}
