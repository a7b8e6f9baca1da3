//! `cuvee compare` of references.

use std::sync::atomic::Ordering;

use crate::cli::args::CompareArgs;
use crate::cli::device::{self, Job};
use crate::cli::{print, train};
use crate::error::{At, Error, Result};
use crate::lab::{Comparison, Table, compare};
use crate::ops::Backend;

/// Completions that the distance from the anchor is measured on, where the user does not say.
const KL_SAMPLES: usize = 128;
/// Evaluations of a run besides its first and last, where the user does not say.
const EVALUATIONS: u64 = 7;

pub fn run(args: &CompareArgs) -> Result<()> {
    let run = &args.run;
    let table = device::run(&run.engine, run.dtype, run.cache_dir.as_deref(), args)?;
    table.write(&args.output_dir)?;
    let folder = args.output_dir.display();
    print(&format!("{}\ncurves  {folder}/compare.svg\nnumbers {folder}/compare.json\n", table.text()))
}

impl Job for &CompareArgs {
    type Output = Table;

    fn run<B: Backend>(self, device: &B) -> Result<Table> {
        let stop = train::stop_on_signal()?;
        let mut settings = train::from_run(&self.run, B::APART)?;
        settings.dataset = self.dataset.clone();
        settings.output_dir = self.output_dir.clone();
        let max_steps = settings.max_steps.ok_or_else(|| {
            Error::option(
                "--max-steps",
                "missing; arms are compared after equally many steps; for example `--max-steps 100`",
            )
        })?;
        settings.eval_steps.get_or_insert((max_steps / (EVALUATIONS + 1)).max(1));
        if settings.kl_samples == 0 {
            settings.kl_samples = KL_SAMPLES;
        }
        // Which seed, reference and number of pairs it was stands in the folder's name.
        settings.recipe =
            "# A run of `cuvee compare`; its settings are those of the command but for what the folders say.\n".into();
        std::fs::create_dir_all(&settings.output_dir).at(&settings.output_dir)?;
        let comparison = Comparison { seeds: self.seeds, pairs: self.pairs.clone(), arms: self.arms.clone() };
        compare(device, &settings, &comparison, &|| stop.load(Ordering::Relaxed))
    }
}
