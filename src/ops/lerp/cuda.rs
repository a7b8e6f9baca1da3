use super::{Args, Lerp};
use crate::device::cuda::{Grid, Out, kernels};
use crate::device::{Cuda, range};
use crate::error::Result;

impl Lerp for Cuda {
    fn lerp(&self, a: Args<Self>) -> Result<()> {
        let _range = range(c"lerp");
        a.check()?;
        let (n, (keep, share)) = (a.x.len(), a.shares());
        let (y, rounded) = match a.master {
            Some(master) => (master.output(), a.y.output()),
            None => (a.y.output(), Out::null()),
        };
        kernels::Lerp { x: a.x.input(), y, rounded, n: n as u64, keep, share }
            .launch(self, Grid::of_packs::<f32>(n, kernels::Lerp::THREADS))
    }
}
