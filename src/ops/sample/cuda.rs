use super::{Args, Sample};
use crate::device::Cuda;
use crate::device::cuda::{Grid, kernels};
use crate::error::Result;

/// Masses of 64 bits that a block counts while it searches a nucleus: one for each thread and value of four bits.
const COLUMNS_BYTES: usize = 16 * kernels::Sample::THREADS as usize * size_of::<u64>();

impl Sample for Cuda {
    fn sample(&self, a: Args<Self>) -> Result<()> {
        a.check()?;
        let ([rows, vocab], share) = (a.logits.shape(), a.sampling.share());
        let searches = share != u64::MAX && a.sampling.temperature as f32 != 0.0;
        kernels::Sample {
            logits: a.logits.output(),
            draws: a.draws.input(),
            ids: a.ids.output(),
            vocab: vocab as u32,
            temperature: a.sampling.temperature as f32,
            share,
            seed: a.sampling.seed,
        }
        .launch(self, Grid::from(rows).shared(if searches { COLUMNS_BYTES } else { 0 }))
    }
}
