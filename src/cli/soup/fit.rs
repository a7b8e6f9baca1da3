//! `cuvee soup fit`: a user's weights from choices, and what weights will come to.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::{ArgMatches, Args};
use serde_json::json;

use crate::checkpoint::json::read_json;
use crate::cli::adapters::AdapterArgs;
use crate::cli::args::{BatchingArgs, Dtype, EngineArgs, OnOverflow, seed};
use crate::cli::device::{self, Job};
use crate::cli::score::{Texts, texts_of};
use crate::cli::{encode, logps, needs, packing, print};
use crate::data::{Dataset, Form, Tokenizer};
use crate::error::{Error, Result};
use crate::model::Checkpoint;
use crate::ops::Backend;
use crate::rewards::{Jury, RewardSpec, Rewards, Sample};
use crate::soup::{Fitted, Mixture, Outcomes, check, fit};

#[derive(Debug, Clone, PartialEq, Args)]
#[command(after_help = "\
Choices are rows with prompt, chosen and rejected, as for training. What a preference finds of the two texts is the difference
of its reward, or of the log-ratio of its policy to the base, in units of that difference's own spread over the choices.
Weights are the posterior of a Bradley-Terry model on the simplex with a uniform prior: means, and the middle 95 %.

Examples:
  cuvee soup fit --sweep runs/soups --comparisons choices.jsonl
  cuvee soup fit --reward bright.toml --reward brief.toml --comparisons choices.jsonl
  cuvee soup fit --model BASE --adapter BRIGHT --adapter BRIEF --comparisons choices.jsonl
  cuvee soup fit --sweep runs/soups --at bright=0.2 --at brief=0.8")]
pub struct FitArgs {
    /// A user's choices: rows with prompt, chosen and rejected
    #[arg(long, value_name = "FILE")]
    pub comparisons: Option<PathBuf>,
    /// What a preference is: a TOML file of rewards, or a reward model's folder; repeat the flag for each
    #[arg(long, value_name = "WHAT", value_parser = RewardSpec::parse)]
    pub reward: Vec<RewardSpec>,
    /// In place of rewards, the base of --adapter, one for each preference
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    #[command(flatten)]
    pub adapters: AdapterArgs,
    /// A folder of `cuvee soup sweep`: its rewards, where no others are given, and what blends came to
    #[arg(long, value_name = "DIR")]
    pub sweep: Option<PathBuf>,
    /// Say what these weights will come to, from the sweep; repeat the flag for each preference that counts
    #[arg(long, value_name = "NAME=F", value_parser = weight)]
    pub at: Vec<(String, f64)>,
    /// Seed of the draws from the posterior
    #[arg(long, value_name = "N", default_value = "42", value_parser = seed)]
    pub seed: u64,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub engine: EngineArgs,
}

fn weight(text: &str) -> Result<(String, f64), String> {
    match text.split_once('=').map(|(name, weight)| (name, weight.parse::<f64>())) {
        Some((name, Ok(weight))) if !name.is_empty() && weight.is_finite() => Ok((name.to_string(), weight)),
        _ => Err("expected a preference and its weight, such as brief=0.7".into()),
    }
}

/// What a sweep has left for those who come later.
struct Swept {
    /// `(name, reward)`
    preferences: Vec<(String, String)>,
    outcomes: Outcomes,
}

impl Swept {
    fn read(dir: &Path) -> Result<Self> {
        let path = dir.join("soup.json");
        if !path.is_file() {
            let detail =
                format!("{}: there is no soup.json; give a folder that `cuvee soup sweep` wrote", dir.display());
            return Err(Error::option("--sweep", detail));
        }
        let json = read_json(&path)?;
        let preference = |p: &serde_json::Value| Some((p["name"].as_str()?.into(), p["reward"].as_str()?.into()));
        let preferences = json["preferences"].as_array().and_then(|all| all.iter().map(preference).collect());
        let outcomes = serde_json::from_value(json["outcomes"].clone()).ok();
        match (preferences, outcomes) {
            (Some(preferences), Some(outcomes)) => Ok(Self { preferences, outcomes }),
            _ => Err(Error::file(path, "is not what `cuvee soup sweep` writes")),
        }
    }
}

impl FitArgs {
    /// What no single flag can know.
    pub fn check(&self, flags: &ArgMatches) -> Result<()> {
        self.engine.check()?;
        needs(flags, "at", "sweep", "what blends come to is known from a sweep alone")?;
        needs(flags, "adapter", "model", "adapters have a base")?;
        needs(flags, "model", "adapter", "give a policy of each preference")?;
        for option in ["reward", "model", "seed"] {
            needs(flags, option, "comparisons", "give a user's choices")?;
        }
        if !self.reward.is_empty() && self.model.is_some() {
            return Err(Error::option("--reward", "and --adapter are two ways to say what preferences are; keep one"));
        }
        if self.comparisons.is_none() && self.at.is_empty() {
            return Err(Error::option("--comparisons", "missing; give a user's choices, or --sweep and --at"));
        }
        if self.comparisons.is_some() && !self.at.is_empty() {
            return Err(Error::option("--at", "asks about weights that are given, --comparisons for others; keep one"));
        }
        if self.comparisons.is_some() && self.reward.is_empty() && self.model.is_none() && self.sweep.is_none() {
            let detail = "missing; say what preferences are, by --reward, by --adapter, or by --sweep";
            return Err(Error::option("--reward", detail));
        }
        if let Some(adapter) = self.adapters.adapter.iter().find(|adapter| adapter.weight != 1.0) {
            let detail = format!("its weight is what is looked for; type --adapter {}", adapter.dir.display());
            return Err(Error::option("--adapter", detail));
        }
        Ok(())
    }

    /// Names of preferences, and by how much each finds chosen better.
    fn differences(&self, swept: Option<&Swept>, comparisons: &Path) -> Result<(Vec<String>, Vec<Vec<f64>>)> {
        let stem = |path: &Path| path.file_stem().map_or(String::new(), |name| name.to_string_lossy().into_owned());
        if let Some(model) = &self.model {
            let names = self.adapters.adapter.iter().map(|adapter| stem(&adapter.dir)).collect();
            let job = LogRatios { args: self, model, comparisons };
            return Ok((names, device::run(&self.engine, Dtype::F32, None, job)?));
        }
        let (names, specs): (Vec<String>, Vec<RewardSpec>) = match swept {
            Some(swept) if self.reward.is_empty() => {
                let spec = |(name, reward): &(String, String)| match RewardSpec::parse(reward) {
                    Ok(spec) => Ok((name.clone(), spec)),
                    Err(detail) => Err(Error::option("--sweep", detail)),
                };
                swept.preferences.iter().map(spec).collect::<Result<Vec<_>>>()?.into_iter().unzip()
            }
            _ => self.reward.iter().map(|spec| (stem(&spec.what), spec.clone())).unzip(),
        };
        let each: Vec<Rewards> =
            specs.iter().map(|spec| Rewards::open(std::slice::from_ref(spec))).collect::<Result<_>>()?;
        if let Some(name) = each.iter().find_map(Rewards::reads_tokens) {
            let detail = format!("{name:?} counts tokens, and choices are texts; count words or characters");
            return Err(Error::option("--reward", detail));
        }
        let texts = texts_of(comparisons)?;
        if let Some(row) = texts.iter().position(|row| row.completions.len() != 2) {
            return Err(Error::file(comparisons, format!("row {row}: expected chosen and rejected")));
        }
        let job = RewardDifferences { each: &each, texts: &texts };
        Ok((names, device::run(&self.engine, Dtype::F32, None, job)?))
    }
}

pub fn run(args: &FitArgs) -> Result<()> {
    let swept = args.sweep.as_deref().map(Swept::read).transpose()?;
    let (names, weights, fitted) = match &args.comparisons {
        Some(comparisons) => {
            let (names, differences) = args.differences(swept.as_ref(), comparisons)?;
            let fitted = fit(&in_units_of_their_spread(&names, differences, comparisons)?, args.seed);
            let weights: Vec<f64> = fitted.weights.iter().map(|weight| weight.mean).collect();
            (names, weights, Some(fitted))
        }
        None => {
            let swept = swept.as_ref().expect("`check` asked for it");
            let names: Vec<String> = swept.preferences.iter().map(|(name, _)| name.clone()).collect();
            let weights = given(&args.at, &names)?;
            (names, weights, None)
        }
    };
    let known = |swept: &Swept| swept.preferences.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>() == names;
    let predicted: BTreeMap<String, (f64, &Mixture)> = match &swept {
        Some(swept) if known(swept) => {
            swept.outcomes.iter().map(|(name, of)| (name.clone(), (of.predict(&weights), of))).collect()
        }
        Some(_) => {
            let detail = format!("its preferences are others than {}; give the same, in its order", names.join(", "));
            return Err(Error::option("--sweep", detail));
        }
        None => BTreeMap::new(),
    };
    if args.json {
        let predicted: BTreeMap<&String, _> = predicted
            .iter()
            .map(|(name, (y, of))| {
                (name, json!({"predicted": y, "loo_rmse": of.loo_rmse, "loo_largest": of.loo_largest}))
            })
            .collect();
        let weights: BTreeMap<&String, f64> = names.iter().zip(weights).collect();
        let result = json!({"weights": weights, "preferences": names, "fit": fitted, "predicted": predicted});
        return print(&format!("{result}\n"));
    }
    print(&text(&names, &weights, fitted.as_ref(), &predicted))
}

fn text(
    names: &[String],
    weights: &[f64],
    fitted: Option<&Fitted>,
    predicted: &BTreeMap<String, (f64, &Mixture)>,
) -> String {
    let wide = names.iter().map(String::len).chain(predicted.keys().map(String::len)).max().unwrap_or(0);
    let mut out = String::new();
    for (i, name) in names.iter().enumerate() {
        out += &format!("{name:<wide$}  {:.3}", weights[i]);
        if let Some(fitted) = fitted {
            out += &format!("  (95 %: {:.3} to {:.3})", fitted.weights[i].low, fitted.weights[i].high);
        }
        out.push('\n');
    }
    if let Some(Fitted { tau, choices, agreement, .. }) = fitted {
        out += &format!(
            "the weights make {:.0} % of {choices} choices alike; tau {:.2} (95 %: {:.2} to {:.2}), how sharply the user decides\n",
            100.0 * agreement,
            tau.mean,
            tau.low,
            tau.high
        );
        let flags: Vec<String> =
            names.iter().zip(weights).map(|(name, weight)| format!("--adapter {name}={weight:.4}")).collect();
        out += &format!("to use them, with the folders of these adapters: {}\n", flags.join(" "));
    }
    for (name, (y, of)) in predicted {
        out += &format!(
            "{name:<wide$}  predicted {y:.3}, ± {:.3} by leaving out each of {} blends\n",
            of.loo_rmse, of.points
        );
    }
    out
}

/// `--at`, a weight for each preference.
fn given(at: &[(String, f64)], names: &[String]) -> Result<Vec<f64>> {
    let mut weights = vec![0.0; names.len()];
    for (name, weight) in at {
        let Some(place) = names.iter().position(|known| known == name) else {
            let detail = format!("there is no preference {name:?}; there are {}", names.join(", "));
            return Err(Error::option("--at", detail));
        };
        weights[place] += weight;
    }
    check(&weights).map_err(|instead| {
        let typed: Vec<String> = names.iter().zip(instead).map(|(name, w)| format!("--at {name}={w:.6}")).collect();
        Error::option("--at", format!("weights are 0 or more and sum to 1; type {}", typed.join(" ")))
    })?;
    Ok(weights)
}

/// Differences by the root of their mean square, so that units of rewards do not count.
fn in_units_of_their_spread(names: &[String], mut differences: Vec<Vec<f64>>, path: &Path) -> Result<Vec<Vec<f64>>> {
    if names.len() < 2 {
        return Err(Error::option("--reward", "one preference has no weights to find; give another one"));
    }
    if let Some(row) = differences.iter().position(|d| d.iter().any(|x| !x.is_finite())) {
        return Err(Error::file(path, format!("choice {row}: a preference says nothing of one of its texts; drop it")));
    }
    for (i, name) in names.iter().enumerate() {
        let square = differences.iter().map(|d| d[i] * d[i]).sum::<f64>() / differences.len() as f64;
        if square == 0.0 {
            let detail =
                format!("{name} finds both texts of every choice alike; leave it out, or give choices about it");
            return Err(Error::file(path, detail));
        }
        differences.iter_mut().for_each(|d| d[i] /= square.sqrt());
    }
    Ok(differences)
}

/// `[choices][preferences]`
struct RewardDifferences<'a> {
    each: &'a [Rewards],
    texts: &'a [Texts],
}

impl Job for RewardDifferences<'_> {
    type Output = Vec<Vec<f64>>;

    fn run<B: Backend>(self, device: &B) -> Result<Vec<Vec<f64>>> {
        let mut samples = Vec::new();
        for (row, Texts { prompt, completions }) in self.texts.iter().enumerate() {
            for completion in completions {
                let (answer, ids) = (None, &[][..]);
                samples.push(Sample {
                    prompt,
                    completion,
                    answer,
                    row,
                    prompt_ids: ids,
                    completion_ids: ids,
                    finished: true,
                });
            }
        }
        let mut differences = vec![Vec::new(); self.texts.len()];
        for rewards in self.each {
            let scores = Jury::new(device, rewards, packing(&BATCHING)).score(&samples)?;
            let sum = |s: usize| rewards.sum(scores.iter().map(|of| of[s]));
            differences.iter_mut().enumerate().for_each(|(row, of)| of.push(sum(2 * row) - sum(2 * row + 1)));
        }
        Ok(differences)
    }
}

const BATCHING: BatchingArgs = BatchingArgs { micro_batch_tokens: None, no_prefix_sharing: false };

/// `[choices][preferences]` of ln policy less ln base.
struct LogRatios<'a> {
    args: &'a FitArgs,
    model: &'a Path,
    comparisons: &'a Path,
}

impl Job for LogRatios<'_> {
    type Output = Vec<Vec<f64>>;

    fn run<B: Backend>(self, device: &B) -> Result<Vec<Vec<f64>>> {
        let tokenizer = Tokenizer::load(self.model)?;
        let dataset = Dataset::load(self.comparisons, &tokenizer, &encode(None, OnOverflow::Drop))?.not_empty()?;
        if dataset.form != Form::Pairs {
            return Err(Error::file(self.comparisons, "expected rows with chosen and rejected"));
        }
        let base = Checkpoint::open(self.model)?;
        let differences = |checkpoint: &Checkpoint| -> Result<Vec<f64>> {
            let logps = logps::score(device, checkpoint, &dataset, packing(&BATCHING))?;
            let sum = |tokens: &Vec<f32>| tokens.iter().map(|x| f64::from(*x)).sum::<f64>();
            Ok(logps.iter().map(|pair| sum(&pair[0]) - sum(&pair[1])).collect())
        };
        let before = differences(&base)?;
        let mut found = vec![Vec::new(); before.len()];
        for adapter in &self.args.adapters.adapter {
            let policy = differences(&base.clone().with_adapter(&adapter.dir, 1.0)?)?;
            found.iter_mut().zip(policy.iter().zip(&before)).for_each(|(of, (policy, base))| of.push(policy - base));
        }
        Ok(found)
    }
}
