use super::{Adam, Args, MergedUpdate};
use crate::device::Reference;
use crate::error::Result;

impl MergedUpdate for Reference {
    fn merged_update(&self, a: Args<Self>) -> Result<()> {
        a.check()?;
        let step = a.step;
        let Adam { beta1, beta2, eps, .. } = step.adam;
        let (grad, rounded) = (a.grad.f64s(), a.weight.into_f64s());
        // f64 rounds nothing: the weight becomes what its master is.
        let (weight, copy) = match a.master {
            Some(master) => (master.into_f64s(), Some(rounded)),
            None => (rounded, None),
        };
        let (m, v) = (a.first_moment.into_f64s(), a.second_moment.into_f64s());
        for i in 0..weight.len() {
            let g = step.clip * grad[i];
            weight[i] *= 1.0 - step.learning_rate * step.weight_decay;
            m[i] = beta1 * m[i] + (1.0 - beta1) * g;
            v[i] = beta2 * v[i] + (1.0 - beta2) * g * g;
            let (m_hat, v_hat) =
                (m[i] / (1.0 - beta1.powf(step.step as f64)), v[i] / (1.0 - beta2.powf(step.step as f64)));
            weight[i] -= step.learning_rate * m_hat / (v_hat.sqrt() + eps);
        }
        if let Some(copy) = copy {
            copy.copy_from_slice(weight);
        }
        Ok(())
    }
}
