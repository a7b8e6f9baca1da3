//! `cuvee merge extract`

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;

use super::adapters::write_factors;
use super::behaviour::{Behaviour, BehaviourArgs, compare};
use super::out;
use crate::checkpoint::hf::copy_companions;
use crate::checkpoint::json::write_json;
use crate::checkpoint::peft::AdapterConfig;
use crate::checkpoint::{Weights, write_dir};
use crate::cli::print;
use crate::device::{Cpu, DType, Dry, Philox};
use crate::error::{Error, Result};
use crate::lineage::{Lineage, Parent};
use crate::merge::adapters::{Factors, config_of, share};
use crate::merge::svd::{Operator, of_matrix};
use crate::model::arch::{Slot, Stored};
use crate::model::{Checkpoint, Model, Options, Spec};
use crate::ops::gemm::{Operand, Start, gemm};
use crate::progress::Progress;

/// What extraction came to, tensor by tensor.
const REPORT: &str = "cuvee_extraction.json";

#[derive(Debug, Clone, PartialEq, Args)]
#[command(after_help = "\
Each linear layer's difference becomes B = U sqrt(S), A = sqrt(S) V^T of its truncated singular value decomposition, with
alpha = rank. What else differs (norms, embeddings, biases, heads) an adapter cannot hold: it is said how much that is.

Examples:
  cuvee merge extract --model runs/dpo --base-model BASE --rank 16 --output-dir runs/dpo-lora
  cuvee merge extract --model runs/dpo --base-model BASE --rank 16 --dataset heldout.jsonl --output-dir runs/dpo-lora")]
pub struct ExtractArgs {
    /// The model that was trained whole
    #[arg(long, value_name = "DIR", help_heading = "Files")]
    pub model: PathBuf,
    /// The model that the adapter will stand on
    #[arg(long, value_name = "DIR", help_heading = "Files")]
    pub base_model: PathBuf,
    /// Folder for the adapter
    #[arg(long, value_name = "DIR", help_heading = "Files")]
    pub output_dir: PathBuf,
    /// Of the adapter; a layer that is smaller gets its own size
    #[arg(long, value_name = "N", value_parser = crate::cli::args::count, help_heading = "Extraction")]
    pub rank: usize,
    #[command(flatten)]
    pub behaviour: BehaviourArgs,
}

pub fn run(args: &ExtractArgs) -> Result<()> {
    out::check_free(&args.output_dir)?;
    let pair = Pair::open(&args.model, &args.base_model)?;
    let cpu = Cpu::new(args.behaviour.engine.threads.unwrap_or(0))?;
    let linears =
        linears(&pair.policy.spec, |slot, layer| (pair.policy.architecture.naming)(&pair.policy.spec, slot, layer));
    let (mut made, mut report) = (Vec::new(), Report::default());
    let mut progress = Progress::new("extracting", linears.len() as u64, "layers");
    for (done, stored) in linears.iter().enumerate() {
        let module = stored.tensor.strip_suffix(".weight").unwrap_or(&stored.tensor);
        let Some((difference, shape)) = pair.difference(&stored.tensor)? else { continue };
        let random = Philox::named(0, &format!("extract {module}"));
        let matrix = Dense { cpu: &cpu, data: &difference, shape };
        let mut svd = of_matrix(&matrix, args.rank, |i| random.normal(i));
        if stored.is_transposed() {
            std::mem::swap(&mut svd.u, &mut svd.v);
        }
        let rank = svd.s.len();
        let factors = Factors { rank, b: svd.b(), a: svd.a() }.stored();
        let energy = difference.iter().map(|x| f64::from(*x).powi(2)).sum();
        let lost = factors.distance(&difference, stored.is_transposed());
        report.kept.insert(module.to_string(), Kept { rank, energy, lost, relative_error: share(lost, energy) });
        made.push((module.to_string(), factors));
        progress.at(done as u64 + 1, module);
    }
    progress.finish();
    if made.is_empty() {
        let detail = format!("has the linear layers of {}; there is nothing to extract", args.base_model.display());
        return Err(Error::file(&args.model, detail));
    }
    report.left = pair.others(&linears)?;
    let config = AdapterConfig {
        base_model: Some(args.base_model.display().to_string()),
        fan_in_fan_out: linears.iter().any(Stored::is_transposed),
        ..AdapterConfig::default()
    };
    let targets = targets(&linears, &report.kept);
    let config = AdapterConfig { target_modules: targets, ..config_of(&made, &config) };
    let parents = [Parent::open("model", &args.model)?, Parent::open("base", &args.base_model)?];
    let lineage = Lineage::of("merge extract").with_argument("rank", args.rank).with_parents(parents);
    write_dir(&args.output_dir, |dir| {
        write_factors(dir, &config, &made)?;
        copy_companions(&args.model, dir)?;
        report.behaviour = compare(&args.behaviour, [&pair.policy, &pair.base.clone().with_adapter(dir, 1.0)?])?;
        write_json(&dir.join(REPORT), &report)?;
        lineage.write_as(&args.output_dir, dir)
    })?;
    print(&format!("{}adapter {}\n", report.text(), args.output_dir.display()))
}

/// A model and what it was trained from.
struct Pair {
    policy: Checkpoint,
    base: Checkpoint,
    policy_weights: Weights,
    base_weights: Weights,
}

impl Pair {
    fn open(policy: &Path, base: &Path) -> Result<Self> {
        let open = |dir: &Path| Checkpoint::open(dir).or_else(|e| Checkpoint::open_reward(dir).map_err(|_| e));
        let (of_policy, of_base) = (open(policy)?, open(base)?);
        if of_policy.spec != of_base.spec || of_policy.architecture.model_type != of_base.architecture.model_type {
            let detail =
                format!("{} has other shapes than --model {}; is it its base?", base.display(), policy.display());
            return Err(Error::option("--base-model", detail));
        }
        let (policy_weights, base_weights) = (Weights::open(policy)?, Weights::open(base)?);
        Ok(Self { policy: of_policy, base: of_base, policy_weights, base_weights })
    }

    fn read(&self, weights: &Weights, tensor: &str) -> Result<(Vec<f32>, Vec<usize>)> {
        let spellings = self.policy.architecture.spellings(tensor);
        let spellings: Vec<&str> = spellings.iter().map(String::as_str).collect();
        let name = weights.first_of(&spellings).unwrap_or(tensor);
        let shape = weights.shape(name).unwrap_or_default().to_vec();
        let mut values = vec![0.0; shape.iter().product()];
        weights.read(name, &shape, &mut values)?;
        Ok((values, shape))
    }

    /// Policy minus base, in f32, with both shapes; `(difference, base)`.
    fn both(&self, tensor: &str) -> Result<(Vec<f32>, Vec<f32>, Vec<usize>)> {
        let ((mut policy, shape), (base, base_shape)) =
            (self.read(&self.policy_weights, tensor)?, self.read(&self.base_weights, tensor)?);
        if shape != base_shape {
            let detail = format!("{tensor:?} has shape {base_shape:?}, and {shape:?} in --model; is it its base?");
            return Err(Error::option("--base-model", detail));
        }
        policy.iter_mut().zip(&base).for_each(|(policy, base)| *policy -= base);
        Ok((policy, base, shape))
    }

    /// Of a matrix, as the file keeps it; `None` where there is none.
    fn difference(&self, tensor: &str) -> Result<Option<(Vec<f32>, [usize; 2])>> {
        let (difference, _, shape) = self.both(tensor)?;
        let &[rows, cols] = &shape[..] else {
            return Err(Error::file(&self.policy.dir, format!("{tensor:?} has shape {shape:?}, expected a matrix")));
        };
        Ok(difference.iter().any(|x| *x != 0.0).then_some((difference, [rows, cols])))
    }

    /// How far the tensors have moved that an adapter does not hold, those that have.
    fn others(&self, linears: &[Stored]) -> Result<BTreeMap<String, Left>> {
        let (spec, naming) = (&self.policy.spec, self.policy.architecture.naming);
        let mut model = Model::new(&mut Dry::arena(DType::F32), spec, naming, Options::frozen(0));
        let mut left = BTreeMap::new();
        for param in model.params_mut() {
            let tensor = &param.stored.tensor;
            if left.contains_key(tensor) || linears.iter().any(|linear| linear.tensor == *tensor) {
                continue;
            }
            let (difference, base, _) = self.both(tensor)?;
            let squares = |x: &[f32]| x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
            let (energy, of_base) = (squares(&difference), squares(&base));
            if energy > 0.0 {
                left.insert(tensor.clone(), Left { energy, relative_change: share(energy, of_base) });
            }
        }
        Ok(left)
    }
}

/// The linear layers of all blocks, each tensor once.
fn linears(spec: &Spec, naming: impl Fn(Slot, usize) -> Stored) -> Vec<Stored> {
    const SLOTS: [Slot; 7] = [Slot::Query, Slot::Key, Slot::Value, Slot::Output, Slot::Gate, Slot::Up, Slot::Down];
    let slots = SLOTS.into_iter().filter(|slot| *slot != Slot::Gate || spec.mlp.gated());
    let mut found: Vec<Stored> = Vec::new();
    for stored in
        (0..spec.layers).flat_map(|layer| slots.clone().map(move |slot| (slot, layer))).map(|(s, l)| naming(s, l))
    {
        if found.last().is_none_or(|last| last.tensor != stored.tensor) {
            found.push(stored);
        }
    }
    found
}

/// Names for PEFT: the end of a name where all layers of that name are kept, else whole names.
fn targets(linears: &[Stored], kept: &BTreeMap<String, Kept>) -> Vec<String> {
    let end = |module: &str| module.rsplit('.').next().unwrap_or_default().to_string();
    let modules: Vec<&str> = linears.iter().filter_map(|stored| stored.tensor.strip_suffix(".weight")).collect();
    let whole = |name: &str| modules.iter().all(|module| end(module) != name || kept.contains_key(*module));
    let mut targets: Vec<String> =
        kept.keys().map(|module| if whole(&end(module)) { end(module) } else { module.clone() }).collect();
    targets.sort();
    targets.dedup();
    targets
}

/// A matrix in memory, multiplied by the engine's product.
struct Dense<'a> {
    cpu: &'a Cpu,
    data: &'a [f32],
    shape: [usize; 2],
}

impl Operator for Dense<'_> {
    fn shape(&self) -> [usize; 2] {
        self.shape
    }

    fn forward(&self, x: &[f32], width: usize) -> Vec<f32> {
        let [rows, cols] = self.shape;
        let mut y = vec![0.0; rows * width];
        let matrix = Operand::new(self.data, cols);
        gemm(self.cpu, [rows, width, cols], matrix, Operand::new(x, width), &mut y, Start::Zero);
        y
    }

    fn backward(&self, y: &[f32], width: usize) -> Vec<f32> {
        let [rows, cols] = self.shape;
        let mut x = vec![0.0; cols * width];
        let matrix = Operand::transposed(self.data, cols);
        gemm(self.cpu, [cols, width, rows], matrix, Operand::new(y, width), &mut x, Start::Zero);
        x
    }
}

#[derive(Default, Serialize)]
struct Report {
    /// By module.
    kept: BTreeMap<String, Kept>,
    /// By tensor: changes that an adapter cannot hold.
    left: BTreeMap<String, Left>,
    /// The policy beside the base under the adapter, where there were data to compare them on.
    #[serde(skip_serializing_if = "Option::is_none")]
    behaviour: Option<Behaviour>,
}

#[derive(Serialize)]
struct Kept {
    rank: usize,
    /// Sum of squares of the difference, and of what the adapter lacks of it.
    energy: f64,
    lost: f64,
    /// Root of their ratio.
    relative_error: f64,
}

#[derive(Serialize)]
struct Left {
    energy: f64,
    /// Length of the change by that of the base's tensor.
    relative_change: f64,
}

impl Report {
    fn text(&self) -> String {
        let sum = |of: fn(&Kept) -> f64| self.kept.values().map(of).sum::<f64>();
        let (energy, lost) = (sum(|kept| kept.energy), sum(|kept| kept.lost));
        let mut text = format!("{:<16}{:>8}{:>16}{:>16}\n", "layers", "", "relative error", "energy kept");
        let mut kinds: BTreeMap<&str, (usize, f64, f64)> = BTreeMap::new();
        for (module, kept) in &self.kept {
            let kind = kinds.entry(module.rsplit('.').next().unwrap_or_default()).or_default();
            *kind = (kind.0 + 1, kind.1 + kept.energy, kind.2 + kept.lost);
        }
        kinds.insert("all", (self.kept.len(), energy, lost));
        let mut rows: Vec<_> = kinds.into_iter().collect();
        rows.sort_by_key(|(name, _)| *name == "all");
        for (name, (count, energy, lost)) in rows {
            let (error, kept) = (100.0 * share(lost, energy), 100.0 * (1.0 - lost / energy));
            text += &format!("{name:<16}{count:>8}{error:>14.3} %{kept:>14.3} %\n");
        }
        let worst = self.kept.iter().max_by(|a, b| a.1.relative_error.total_cmp(&b.1.relative_error));
        if let Some((module, kept)) = worst {
            text += &format!("most is lost of {module}: {:.3} %\n", 100.0 * kept.relative_error);
        }
        let outside = self.left.values().map(|left| left.energy).sum::<f64>();
        let largest = self.left.iter().max_by(|a, b| a.1.relative_change.total_cmp(&b.1.relative_change));
        text += &match largest {
            None => "no other tensor differs\n".to_string(),
            Some((tensor, left)) => format!(
                "not kept: {} tensors that are no linear layers of a block, {:.3} % of the whole difference's energy; the most moved is \
                 {tensor}, by {:.3} % of its length\n",
                self.left.len(),
                100.0 * outside / (outside + energy),
                100.0 * left.relative_change
            ),
        };
        text += &self.behaviour.map_or(String::new(), |found| found.text("base with adapter, and model"));
        text + &format!("tensor by tensor in {REPORT}\n")
    }
}
