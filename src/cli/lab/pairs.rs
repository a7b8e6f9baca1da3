//! `cuvee lab pairs`: the synthetic protocol of Gao et al. (arXiv:2210.10760, section 2): a gold reward labels completions of the model
//! that is to be aligned, so that it is known what the preferences prefer.

use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use super::drawn::{DrawnArgs, judge};
use crate::cli::args::count;
use crate::cli::device::{self, Job};
use crate::cli::logps::write_rows;
use crate::error::{Error, Result};
use crate::ops::Backend;
use crate::progress::say;
use crate::rewards::RewardSpec;

#[derive(Debug, Clone, PartialEq, Args)]
#[command(after_help = "\
Each prompt gets its best completion as chosen and its worst as rejected, with what they are worth; a prompt whose completions are worth
the same gives no pair. Labels are without noise.

Example:
  cuvee lab pairs --model runs/sft --prompts assets/film-reviews/prompts-train.jsonl.gz --gold-reward runs/gold --out pairs.jsonl")]
pub struct PairsArgs {
    #[command(flatten)]
    pub drawn: DrawnArgs,
    /// What completions are worth, times F: a reward model's folder, fluency:DIR of a language model, or a TOML file of
    /// rules; repeat the flag for several
    #[arg(long, value_name = "WHAT[=F]", value_parser = RewardSpec::parse, required = true)]
    pub gold_reward: Vec<RewardSpec>,
    /// Completions of each prompt, 2 or more
    #[arg(long, value_name = "N", default_value = "2", value_parser = count)]
    pub samples: usize,
    /// Where the pairs go, a line each
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
}

pub fn run(args: &PairsArgs) -> Result<()> {
    if args.samples < 2 {
        return Err(Error::option("--samples", "one completion has nothing to be compared with; give 2 or more"));
    }
    let drawn = &args.drawn;
    write_rows(&args.out, &drawn.prompts, || device::run(&drawn.engine, drawn.precision.dtype, None, args))
}

impl Job for &PairsArgs {
    type Output = Vec<Value>;

    fn run<B: Backend>(self, device: &B) -> Result<Vec<Value>> {
        let lines = self.drawn.draw(device, self.samples)?;
        let worth = judge(device, &lines, &self.gold_reward)?;
        let mut pairs = Vec::new();
        for (group, worth) in lines.chunks(self.samples).zip(worth.chunks(self.samples)) {
            let known = (0..group.len()).filter(|s| !worth[*s].is_nan());
            let best = known.clone().max_by(|a, b| worth[*a].total_cmp(&worth[*b]));
            let worst = known.min_by(|a, b| worth[*a].total_cmp(&worth[*b]));
            let (Some(best), Some(worst)) = (best, worst) else { continue };
            if worth[best] > worth[worst] {
                pairs.push(json!({"prompt": group[0]["prompt"], "chosen": group[best]["completion"],
                                  "rejected": group[worst]["completion"], "chosen_gold": worth[best],
                                  "rejected_gold": worth[worst]}));
            }
        }
        let prompts = lines.len() / self.samples;
        say(format_args!("{} pairs of {prompts} prompts; the others' completions are worth the same", pairs.len()));
        Ok(pairs)
    }
}
