use super::{Args, Lerp};
use crate::device::Reference;
use crate::error::Result;

impl Lerp for Reference {
    fn lerp(&self, a: Args<Self>) -> Result<()> {
        a.check()?;
        let (share, x, rounded) = (a.share, a.x.f64s(), a.y.into_f64s());
        // f64 rounds nothing: the tensor becomes what its master is.
        let (y, copy) = match a.master {
            Some(master) => (master.into_f64s(), Some(rounded)),
            None => (rounded, None),
        };
        y.iter_mut().zip(x).for_each(|(y, x)| *y = (1.0 - share) * *y + share * x);
        if let Some(copy) = copy {
            copy.copy_from_slice(y);
        }
        Ok(())
    }
}
