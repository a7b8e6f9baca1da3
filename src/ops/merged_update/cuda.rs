use half::bf16;

use super::{Args, Folded, LEAST_SUM, Merge, MergedUpdate, Purpose, Rounding, Step, kept};
use crate::device::cuda::{Grid, In, Out, kernels};
use crate::device::{Cuda, DType, range};
use crate::error::Result;

/// Elements of a block that counts and sums: `UPDATE_CHUNK` of `merged_update.cu`.
const CHUNK: usize = 16384;
/// Its `HIGH_BINS` and `BINS`.
const HIGH_BINS: usize = 2048;
const BINS: usize = 1024;

/// Its passes.
const PLAIN: u32 = 0;
const WHOLE: u32 = 1;
const FIRST: u32 = 2;
const SECOND: u32 = 3;

impl MergedUpdate for Cuda {
    fn merged_update(&self, a: Args<Self>) -> Result<()> {
        let _range = range(c"merged_update");
        a.check()?;
        let (step, folded, n) = (a.step, a.step.folded(), a.grad.len());
        let mut tensors = Tensors::of(a);
        if step.passes_twice(n) {
            return twice(self, &step, &folded, &mut tensors);
        }
        let pass = if tensors.are_plain(&step, &folded) { PLAIN } else { WHOLE };
        launch(self, pass, &step, &folded, &mut tensors, Between::none())
    }
}

/// What the step was given; what was not is null.
struct Tensors<'a> {
    n: usize,
    grad: In<'a, f32>,
    m: Out<'a, f32>,
    v: Out<'a, f32>,
    /// The weight in full; null where it is bf16 alone.
    full: Out<'a, f32>,
    wide: Out<'a, f32>,
    narrow: Out<'a, bf16>,
    since_merge: Out<'a, f32>,
    average: Out<'a, f32>,
    tau_wide: In<'a, f32>,
    tau_narrow: In<'a, bf16>,
    scratch: Out<'a, f32>,
    lost: Out<'a, u32>,
}

impl<'a> Tensors<'a> {
    fn of(a: Args<'a, Cuda>) -> Self {
        let is_narrow = a.weight.dtype() == DType::Bf16;
        let (wide, narrow) = if is_narrow { (None, Some(a.weight)) } else { (Some(a.weight), None) };
        let (full, wide) = if a.master.is_some() || is_narrow { (a.master, wide) } else { (wide, None) };
        let tau_ref = |dtype| a.tau_ref.filter(|tau_ref| tau_ref.dtype() == dtype);
        Self {
            n: a.grad.len(),
            grad: a.grad.input(),
            m: a.first_moment.output(),
            v: a.second_moment.output(),
            full: Out::optional(full),
            wide: Out::optional(wide),
            narrow: Out::optional(narrow),
            since_merge: Out::optional(a.since_merge),
            average: Out::optional(a.average),
            tau_wide: In::optional(tau_ref(DType::F32)),
            tau_narrow: In::optional(tau_ref(DType::Bf16)),
            scratch: Out::optional(a.scratch),
            lost: Out::optional(a.lost),
        }
    }

    /// Whether nothing is asked but AdamW of a weight that is there in full.
    fn are_plain(&self, step: &Step, folded: &Folded) -> bool {
        let nothing_beside = [&self.since_merge, &self.average, &self.wide].iter().all(|x| x.is_null());
        let nothing_random = folded.gradient.is_all() && step.rounding == Rounding::Nearest;
        nothing_beside && nothing_random && folded.merge == Merge::Plain && step.share == 0.0 && !self.full.is_null()
    }
}

/// What passes leave for each other.
struct Between<'a> {
    cut: In<'a, u32>,
    sums: Out<'a, f32>,
    bins: Out<'a, u32>,
}

impl Between<'_> {
    fn none() -> Self {
        Self { cut: In::null(), sums: Out::null(), bins: Out::null() }
    }
}

fn launch(cuda: &Cuda, pass: u32, step: &Step, folded: &Folded, t: &mut Tensors, between: Between) -> Result<()> {
    let adam = step.adam;
    let (seed, stream) = step.random.parts();
    let grid = if pass == FIRST {
        t.n.div_ceil(CHUNK).into()
    } else {
        Grid::of_packs::<f32>(t.n, kernels::MergedUpdate::THREADS)
    };
    kernels::MergedUpdate {
        pass,
        grad: t.grad,
        full: t.full.again(),
        wide: t.wide.again(),
        narrow: t.narrow.again(),
        m: t.m.again(),
        v: t.v.again(),
        since_merge: t.since_merge.again(),
        average: t.average.again(),
        tau_wide: t.tau_wide,
        tau_narrow: t.tau_narrow,
        scratch: t.scratch.again(),
        cut: between.cut,
        sums: between.sums,
        bins: between.bins,
        lost: t.lost.again(),
        n: t.n as u64,
        clip: step.clip as f32,
        beta1: adam.beta1 as f32,
        // Rounded once: `1 - beta1 as f32` would be off by up to 5e-5 of itself.
        fresh1: (1.0 - adam.beta1) as f32,
        beta2: adam.beta2 as f32,
        fresh2: (1.0 - adam.beta2) as f32,
        rate: folded.rate as f32,
        root: folded.root as f32,
        eps: adam.eps as f32,
        decay: folded.decay as f32,
        decay_last: folded.decay_last.into(),
        merges: step.merges.into(),
        merge: folded.merge as u32,
        gradient_threshold: folded.gradient.threshold,
        gradient_scale: folded.gradient.scale as f32,
        update_threshold: folded.update.threshold,
        update_scale: folded.update.scale as f32,
        tau_threshold: folded.tau_ref.threshold,
        of_update: folded.shares[0] as f32,
        of_tau_ref: folded.shares[1] as f32,
        ema: folded.ema as f32,
        share: step.share as f32,
        stochastic: (step.rounding == Rounding::Stochastic).into(),
        seed,
        stream,
        step: Purpose::Update.counter(step.step),
    }
    .launch(cuda, grid)
}

/// Makes the update, finds how it is to be cut, applies what is left of it. Nothing of it is known to the host.
fn twice(cuda: &Cuda, step: &Step, folded: &Folded, tensors: &mut Tensors) -> Result<()> {
    let (n, trims) = (tensors.n, folded.merge != Merge::Drop);
    let blocks = n.div_ceil(CHUNK);
    let word = size_of::<u32>();
    let mut bins = cuda.workspace::<u32>(0, HIGH_BINS);
    let mut state = cuda.workspace::<u32>(HIGH_BINS * word, 2);
    let mut cut = cuda.workspace::<u32>((HIGH_BINS + 4) * word, 3);
    let mut sums = cuda.workspace::<f32>((HIGH_BINS + 8) * word, 2 * blocks);
    if trims {
        let rank = kept(step.rule.reserve_rate(), n).expect("trimming has a second pass") as u32;
        kernels::UpdateClear { bins: bins.again(), state: state.again(), rank }.launch(cuda, 1)?;
    }
    let counted = if trims { bins.again() } else { Out::null() };
    let between = Between { cut: In::null(), sums: sums.again(), bins: counted };
    launch(cuda, FIRST, step, folded, tensors, between)?;
    if trims {
        for (size, shift) in [(HIGH_BINS, 20), (BINS, 10)] {
            kernels::UpdatePick { bins: bins.again(), state: state.again(), size: size as u32, shift }
                .launch(cuda, 1)?;
            kernels::UpdateRefine {
                scratch: tensors.scratch.as_input(),
                state: state.as_input(),
                bins: bins.again(),
                sums: sums.again(),
                n: n as u64,
                shift,
            }
            .launch(cuda, blocks)?;
        }
    }
    kernels::UpdateCut {
        sums: sums.as_input(),
        bins: bins.as_input(),
        state: state.as_input(),
        cut: cut.again(),
        blocks: blocks as u32,
        trims: trims.into(),
        rescale: folded.rescale.into(),
        least: LEAST_SUM as f32,
        eps: if trims { 0.0 } else { step.adam.eps as f32 },
        bound: folded.bound as f32,
    }
    .launch(cuda, 1)?;
    let between = Between { cut: cut.as_input(), ..Between::none() };
    launch(cuda, SECOND, step, folded, tensors, between)
}
