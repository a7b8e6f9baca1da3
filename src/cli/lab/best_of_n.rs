//! `cuvee lab best-of-n`: how much of a proxy's best is gold (Gao et al., arXiv:2210.10760, section 2).

use std::fmt::Write;

use clap::Args;
use serde_json::{Value, json};

use super::drawn::{DrawnArgs, judge};
use crate::cli::args::count;
use crate::cli::device::{self, Job};
use crate::cli::print;
use crate::error::{Error, Result};
use crate::ops::Backend;
use crate::rewards::RewardSpec;
use crate::scaling::{best_of_n, best_of_n_kl};
use crate::train::Estimate;

#[derive(Debug, Clone, PartialEq, Args)]
#[command(after_help = "\
Best-of-n takes the one of n completions that the proxy likes most. Its KL from the model is ln n - (n - 1)/n; what it is worth is estimated
from all N samples of each prompt without bias (Nakano et al., arXiv:2112.09332, appendix I). --json prints points that `cuvee lab fit` reads.

Example:
  cuvee lab best-of-n --model runs/sft --prompts heldout.jsonl --proxy-reward runs/proxy --gold-reward runs/gold --samples 64")]
pub struct BestOfNArgs {
    #[command(flatten)]
    pub drawn: DrawnArgs,
    /// What chooses, times F: a reward model's folder, fluency:DIR of a language model, or a TOML file of rules; repeat the flag for several
    #[arg(long, value_name = "WHAT[=F]", value_parser = RewardSpec::parse, required = true)]
    pub proxy_reward: Vec<RewardSpec>,
    /// What completions are really worth, times F
    #[arg(long, value_name = "WHAT[=F]", value_parser = RewardSpec::parse, required = true)]
    pub gold_reward: Vec<RewardSpec>,
    /// Completions of each prompt, N
    #[arg(long, value_name = "N", default_value = "32", value_parser = count)]
    pub samples: usize,
    /// Print a JSON list
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: &BestOfNArgs) -> Result<()> {
    let drawn = &args.drawn;
    let points = device::run(&drawn.engine, drawn.precision.dtype, None, args)?;
    if args.json {
        return print(&format!("{}\n", Value::Array(points)));
    }
    let mut text = format!("{:>6}{:>10}{:>22}{:>22}\n", "n", "KL, nats", "proxy", "gold");
    for point in &points {
        let number = |key: &str| point[key].as_f64().unwrap_or(f64::NAN);
        let with = |key: &str| format!("{:.4} ± {:.4}", number(key), number(&format!("{key}_stderr")));
        let _ = writeln!(
            text,
            "{:>6}{:>10.3}{:>22}{:>22}",
            point["n"].to_string(),
            number("kl"),
            with("proxy"),
            with("gold")
        );
    }
    print(&text)
}

impl Job for &BestOfNArgs {
    type Output = Vec<Value>;

    fn run<B: Backend>(self, device: &B) -> Result<Vec<Value>> {
        let lines = self.drawn.draw(device, self.samples)?;
        let (proxy, gold) = (judge(device, &lines, &self.proxy_reward)?, judge(device, &lines, &self.gold_reward)?);
        if let Some(at) = proxy.iter().zip(&gold).position(|(proxy, gold)| proxy.is_nan() || gold.is_nan()) {
            let row = &lines[at]["row"];
            let detail =
                format!("says nothing of a completion of row {row}, and every one counts; give rewards that do");
            return Err(Error::option("--gold-reward or --proxy-reward", detail));
        }
        let point = |n: usize| {
            let of = |what: &[f64]| {
                let prompts = proxy.chunks(self.samples).zip(what.chunks(self.samples));
                let values: Vec<f64> = prompts.map(|(proxy, what)| best_of_n(proxy, what, n)).collect();
                Estimate::of(&values)
            };
            let (proxy, gold) = (of(&proxy), of(&gold));
            json!({"n": n, "kl": best_of_n_kl(n), "proxy": proxy.mean, "proxy_stderr": proxy.stderr, "gold": gold.mean,
                   "gold_stderr": gold.stderr})
        };
        Ok((0..).map(|k| 1 << k).take_while(|n| *n <= self.samples).map(point).collect())
    }
}
