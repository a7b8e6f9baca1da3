use super::{Backward, Forward, SwiGlu};
use crate::device::Reference;
use crate::error::Result;

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

impl SwiGlu for Reference {
    fn swiglu(&self, a: Forward<Self>) -> Result<()> {
        a.check()?;
        let (gate, up, y) = (a.gate.f64s(), a.up.f64s(), a.y.into_f64s());
        (0..y.len()).for_each(|i| y[i] = gate[i] * sigmoid(gate[i]) * up[i]);
        Ok(())
    }

    fn swiglu_backward(&self, a: Backward<Self>) -> Result<()> {
        a.check()?;
        let (dy, gate, up) = (a.dy.f64s(), a.gate.f64s(), a.up.f64s());
        let (dgate, dup) = (a.dgate.into_f64s(), a.dup.into_f64s());
        for i in 0..dy.len() {
            let (g, s) = (gate[i], sigmoid(gate[i]));
            dgate[i] = dy[i] * up[i] * (s + g * s * (1.0 - s));
            dup[i] = dy[i] * g * s;
        }
        Ok(())
    }
}
