use super::{Args, MergedUpdate};
use crate::device::cuda::{Grid, Out, kernels};
use crate::device::{Cuda, range};
use crate::error::Result;

impl MergedUpdate for Cuda {
    fn merged_update(&self, a: Args<Self>) -> Result<()> {
        let _range = range(c"merged_update");
        a.check()?;
        let (n, s) = (a.grad.len(), a.step.scalars());
        let (weight, rounded) = match a.master {
            Some(master) => (master.output(), a.weight.output()),
            None => (a.weight.output(), Out::null()),
        };
        kernels::UpdateAdamw {
            grad: a.grad.input(),
            weight,
            rounded,
            m: a.first_moment.output(),
            v: a.second_moment.output(),
            n: n as u64,
            clip: s.clip,
            keep: s.keep,
            beta1: s.beta1,
            fresh1: s.fresh1,
            beta2: s.beta2,
            fresh2: s.fresh2,
            rate: s.rate,
            root: s.root,
            eps: s.eps,
        }
        .launch(self, Grid::of_packs::<f32>(n, kernels::UpdateAdamw::THREADS))
    }
}
