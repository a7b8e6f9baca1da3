use super::{Args, Sample};
use crate::device::cuda::{Grid, kernels};
use crate::device::{Cuda, range};
use crate::error::Result;

/// Masses of 64 bits that a block counts while it searches a threshold: one for each thread and value of four bits.
const COLUMNS_BYTES: usize = 16 * kernels::Sample::THREADS as usize * size_of::<u64>();

impl Sample for Cuda {
    fn sample(&self, a: Args<Self>) -> Result<()> {
        let _range = range(c"sample");
        a.check()?;
        let [rows, vocab] = a.logits.shape();
        kernels::Sample {
            logits: a.logits.output(),
            rows: a.rows.input(),
            edits: a.edits.input(),
            saved: a.saved.output(),
            ids: a.ids.output(),
            odds: a.odds.output(),
            vocab: vocab as u32,
        }
        .launch(self, Grid::from(rows).shared(COLUMNS_BYTES))
    }
}
