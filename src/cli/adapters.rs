//! Flags about adapters, and what they come to.

use std::path::{Path, PathBuf};

use clap::{ArgMatches, Args};
use serde::{Serialize, Serializer};

use super::args::{count, positive};
use super::needs;
use crate::model::{Checkpoint, Lora};
use crate::{Error, Result};

#[derive(Debug, Clone, PartialEq, Args, Serialize)]
#[command(next_help_heading = "Adapters")]
pub struct AdapterArgs {
    /// Apply an adapter beside the weights of --model: a folder that PEFT, or training with --lora-rank, wrote, and how much
    /// of it counts. Repeat the flag for several, whose changes are added [default weight: 1]
    #[arg(long, value_name = "DIR[=F]", value_parser = adapter)]
    pub adapter: Vec<AdapterArg>,
}

/// A folder, and what the adapter's change is multiplied with.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterArg {
    pub dir: PathBuf,
    pub weight: f64,
}

impl Serialize for AdapterArg {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{}={}", self.dir.display(), self.weight))
    }
}

/// `DIR=0.3`, or `DIR` where what follows a last `=` is no number.
pub fn adapter(text: &str) -> Result<AdapterArg, String> {
    let (dir, weight) = match text.rsplit_once('=').map(|(dir, weight)| (dir, weight.parse::<f64>())) {
        Some((dir, Ok(weight))) => (dir, weight),
        _ => (text, 1.0),
    };
    if dir.is_empty() || !weight.is_finite() || weight == 0.0 {
        return Err("expected an adapter's folder and a weight other than 0, such as runs/sft=0.5".into());
    }
    Ok(AdapterArg { dir: dir.into(), weight })
}

impl AdapterArgs {
    /// The model of a folder under the adapters.
    pub fn open(&self, model: &Path, open: impl Fn(&Path) -> Result<Checkpoint>) -> Result<Checkpoint> {
        self.adapter.iter().try_fold(open(model)?, |checkpoint, adapter| {
            let AdapterArg { dir, weight } = adapter;
            checkpoint.with_adapter(dir, *weight)
        })
    }
}

#[derive(Debug, Clone, PartialEq, Args, Serialize)]
#[command(next_help_heading = "Adapters")]
pub struct LoraArgs {
    /// Train an adapter of this rank (LoRA) in place of the weights: the output is a PEFT folder, and the model without the
    /// adapter is the reference, at no memory of its own
    #[arg(long, alias = "lora-r", value_name = "N", value_parser = count)]
    pub lora_rank: Option<usize>,
    /// Its change is multiplied with this divided by the rank [default: twice the rank]
    #[arg(long, value_name = "F", value_parser = positive)]
    pub lora_alpha: Option<f64>,
    /// Divide by the square root of the rank instead (rsLoRA)
    #[arg(long, alias = "use-rslora")]
    pub lora_rslora: bool,
    /// Linear layers to adapt, by the ends of their names in the checkpoint, such as q_proj,v_proj; all-linear = every one
    /// of all blocks [default: all-linear]
    #[arg(long, alias = "lora-target-modules", value_name = "NAME,NAME..", value_delimiter = ',')]
    pub target_modules: Vec<String>,
    /// Go on training this adapter, with its rank, scale and layers; the reference is then the model with it as it starts
    #[arg(long, value_name = "DIR")]
    pub lora_start: Option<PathBuf>,
}

const ALL_LINEAR: &str = "all-linear";

impl LoraArgs {
    /// What no single flag can know.
    pub(super) fn check(&self, flags: &ArgMatches) -> Result<()> {
        let given = [
            ("--lora-rank", self.lora_rank.is_some()),
            ("--lora-alpha", self.lora_alpha.is_some()),
            ("--lora-rslora", self.lora_rslora),
            ("--target-modules", !self.target_modules.is_empty()),
        ];
        if let (Some(_), Some((flag, _))) = (&self.lora_start, given.iter().find(|(_, given)| *given)) {
            return Err(Error::option(*flag, "the adapter of --lora-start has its own; drop one of the two"));
        }
        // A recipe may say that a switch is off.
        let switch = self.lora_rslora.then_some("lora_rslora");
        for option in ["lora_alpha", "target_modules"].into_iter().chain(switch) {
            needs(flags, option, "lora_rank", "say what rank the adapter has")?;
        }
        if self.target_modules.len() > 1 && self.target_modules.iter().any(|name| name == ALL_LINEAR) {
            let detail = format!("{ALL_LINEAR} is every layer; give it alone, or drop it");
            return Err(Error::option("--target-modules", detail));
        }
        Ok(())
    }

    /// The adapter to train, if one is asked for.
    pub fn lora(&self) -> Result<Option<Lora>> {
        if let Some(dir) = &self.lora_start {
            return Lora::from_adapter(dir).map(Some);
        }
        Ok(self.lora_rank.map(|rank| Lora {
            rank,
            // What TRL does by default: r 16, alpha 32.
            alpha: self.lora_alpha.unwrap_or(2.0 * rank as f64),
            rslora: self.lora_rslora,
            targets: self.target_modules.iter().filter(|name| *name != ALL_LINEAR).cloned().collect(),
            start: None,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_has_a_weight_behind_it_or_none() {
        let read = |text: &str| adapter(text).map(|AdapterArg { dir, weight }| (dir, weight));
        for (text, dir, weight) in
            [("a=0.3", "a", 0.3), ("a/b", "a/b", 1.0), ("a=b=-2", "a=b", -2.0), ("a=b", "a=b", 1.0)]
        {
            assert_eq!(read(text), Ok((dir.into(), weight)), "{text}");
        }
        for text in ["", "=1", "a=0", "a=inf", "a=nan"] {
            assert!(read(text).is_err_and(|e| e.contains("runs/sft=0.5")), "{text}");
        }
    }
}
