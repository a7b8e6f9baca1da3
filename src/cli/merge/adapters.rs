//! `cuvee merge adapters`

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::{ArgMatches, Args, ValueEnum};

use super::behaviour::{BehaviourArgs, compare, compare_on_text};
use super::out;
use crate::checkpoint::hf::{copy_companions, write_config};
use crate::checkpoint::json::read_json;
use crate::checkpoint::peft::{self, AdapterFile, a_name, b_name};
use crate::checkpoint::{SaveDtype, TensorSource, Weights, save_safetensors, write_dir};
use crate::cli::adapters::{AdapterArg, adapter};
use crate::cli::args::{Dtype, count};
use crate::cli::{is_given, print};
use crate::error::{Error, Result};
use crate::lineage::{Lineage, Parent};
use crate::merge::adapters::{Factors, Method, Rounding, add, config_of, merge, parts, share, sum, targets};
use crate::model::{Checkpoint, Head};
use crate::progress::Progress;

#[derive(Debug, Clone, PartialEq, Args)]
#[command(
    allow_negative_numbers = true,
    after_help = "\
Adapters may differ in rank, alpha and the modules that they change; what an adapter lacks is zero.

Examples:
  cuvee merge adapters --adapter A=0.3 --adapter B=0.7 --output-dir runs/soup
  cuvee merge adapters --adapter A=0.3 --adapter B=0.7 --method svd --rank 16 --output-dir runs/soup-16
  cuvee merge adapters --adapter A --method delta --model BASE --output-dir runs/model
  cuvee merge adapters --adapter A --method delta --model BASE --dataset heldout.jsonl --output-dir runs/model"
)]
pub struct AdaptersArgs {
    /// An adapter's folder, and how much of it counts; repeat the flag for several [default weight: 1]
    #[arg(long, value_name = "DIR[=F]", value_parser = adapter, required = true, help_heading = "Files")]
    pub adapter: Vec<AdapterArg>,
    /// Their base. `delta` needs it; otherwise the adapters' shapes are checked against it
    #[arg(long, value_name = "DIR", help_heading = "Files")]
    pub model: Option<PathBuf>,
    /// Folder for the merged adapter, or with `delta` for the model
    #[arg(long, value_name = "DIR", help_heading = "Files")]
    pub output_dir: PathBuf,
    /// How
    #[arg(long, value_name = "NAME", default_value = "cat", help_heading = "Merge")]
    pub method: How,
    /// Rank of the result of svd [default: the largest of the adapters' ranks]
    #[arg(long, value_name = "N", value_parser = count, help_heading = "Merge")]
    pub rank: Option<usize>,
    /// How delta writes weights [default: as the base says, f16 as f32]
    #[arg(long, value_name = "TYPE", help_heading = "Merge")]
    pub dtype: Option<Dtype>,
    #[command(flatten)]
    pub behaviour: BehaviourArgs,
}

/// What becomes of the adapters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum How {
    /// One adapter that is exactly their weighted sum; its rank is the sum of ranks
    Cat,
    /// The closest adapter of a rank to that sum
    Svd,
    /// A and B averaged apart, as RLPHF and rewarded soups do: not the weighted sum; says how far from it
    Factor,
    /// The same with the square roots of weights, PEFT's `linear`: not the weighted sum either
    Linear,
    /// Their weighted sum added to the weights of --model, which is written whole
    Delta,
}

impl AdaptersArgs {
    /// What no single flag can know.
    pub fn check(&self, flags: &ArgMatches) -> Result<()> {
        for (option, how, name) in
            [("rank", How::Svd, "svd"), ("dtype", How::Delta, "delta"), ("dataset", How::Delta, "delta")]
        {
            if is_given(flags, option) && self.method != how {
                return Err(Error::option(format!("--{option}"), format!("does nothing without --method {name}")));
            }
        }
        self.behaviour.check(flags, &["threads", "no_amx"], self.method == How::Delta)?;
        if self.method == How::Delta && self.model.is_none() {
            return Err(Error::option("--model", "missing; --method delta adds the adapters to its weights"));
        }
        Ok(())
    }

    fn name(&self) -> String {
        self.method.to_possible_value().expect("none is hidden").get_name().to_string()
    }

    fn lineage(&self) -> Result<Lineage> {
        let lineage = Lineage::of("merge adapters").with_argument("method", self.name());
        let lineage = self.rank.into_iter().fold(lineage, |lineage, rank| lineage.with_argument("rank", rank));
        let base = self.model.iter().map(|dir| Parent::open("base", dir));
        let adapters = self.adapter.iter();
        let adapters = adapters.map(|adapter| Ok(Parent::open("adapter", &adapter.dir)?.weighted(adapter.weight)));
        Ok(lineage.with_parents(base.chain(adapters).collect::<Result<Vec<_>>>()?))
    }
}

pub fn run(args: &AdaptersArgs) -> Result<()> {
    out::check_free(&args.output_dir)?;
    let open = |adapter: &AdapterArg| Ok((AdapterFile::open(&adapter.dir)?, adapter.weight));
    let adapters: Vec<(AdapterFile, f64)> = args.adapter.iter().map(open).collect::<Result<_>>()?;
    let modules = modules(args, &adapters)?;
    let base = args.model.as_deref().map(|dir| Base::open(dir, &modules, &adapters)).transpose()?;
    let method = match args.method {
        How::Delta => return delta(args, base.expect("`check` asked for it"), &adapters),
        How::Cat => Method::Cat,
        How::Factor => Method::Factor,
        How::Linear => Method::Linear,
        How::Svd => {
            let ranks = adapters.iter().flat_map(|(file, _)| file.modules().into_iter().map(|m| file.rank(&m)));
            Method::Svd { rank: args.rank.unwrap_or_else(|| ranks.max().unwrap_or(1)) }
        }
    };
    let (mut made, mut progress) = (Vec::new(), Progress::new("merging", modules.len() as u64, "modules"));
    let (mut energy, mut lost, mut worst) = (0.0, 0.0, (0.0, ""));
    for (done, module) in modules.keys().enumerate() {
        let merged = merge(method, &parts(&adapters, module)?)
            .map_err(|e| Error::option("--method", format!("{module}: {e}")))?;
        energy += merged.energy;
        lost += merged.lost;
        let off = share(merged.lost, merged.energy);
        worst = if off > worst.0 { (off, module.as_str()) } else { worst };
        made.push((module.clone(), merged.factors));
        progress.at(done as u64 + 1, module);
    }
    progress.finish();
    let mut config = config_of(&made, &adapters[0].0.config);
    config.target_modules = targets(&adapters);
    config.base_model = args.model.as_ref().map(|dir| dir.display().to_string()).or(config.base_model);
    let lineage = args.lineage()?;
    write_dir(&args.output_dir, |dir| {
        write_factors(dir, &config, &made)?;
        copy_companions(&args.adapter[0].dir, dir)?;
        lineage.write_as(&args.output_dir, dir)
    })?;
    let most = made.iter().map(|(_, factors)| factors.rank).max().unwrap_or(0);
    let mut text = format!("{} of {} adapters: {} modules, rank {most}\n", args.name(), adapters.len(), made.len());
    if method == Method::Cat {
        text += "the weighted sum of the adapters, exactly\n";
    } else {
        let (off, module) = worst;
        text += &format!(
            "{:.3} % from the weighted sum of the adapters (relative L2), at most {:.3} %{}{module}\n",
            100.0 * share(lost, energy),
            100.0 * off,
            if module.is_empty() { "" } else { ", in " }
        );
    }
    print(&format!("{text}adapter {}\n", args.output_dir.display()))
}

/// Writes an adapter whose scalings are 1.
pub fn write_factors(dir: &Path, config: &peft::AdapterConfig, made: &[(String, Factors)]) -> Result<()> {
    fn source(name: String, rows: usize, values: &[f64]) -> TensorSource<'_> {
        let fill = move |out: &mut [f32]| {
            out.iter_mut().zip(values).for_each(|(out, x)| *out = *x as f32);
            Ok(())
        };
        TensorSource { name, shape: vec![rows, values.len() / rows], fill: Box::new(fill) }
    }
    let mut tensors = Vec::with_capacity(2 * made.len());
    for (module, factors) in made {
        tensors.push(source(a_name(module), factors.rank, &factors.a));
        tensors.push(source(b_name(module), factors.b.len() / factors.rank, &factors.b));
    }
    peft::write(dir, config, &tensors)
}

/// The modules that any of the adapters changes, with their shapes `[outputs, inputs]`; refuses adapters that cannot be of one base.
fn modules(args: &AdaptersArgs, adapters: &[(AdapterFile, f64)]) -> Result<BTreeMap<String, [usize; 2]>> {
    let fail = |detail: String| Err(Error::option("--adapter", detail));
    let name = |i: usize| args.adapter[i].dir.display();
    let mut modules: BTreeMap<String, ([usize; 2], usize)> = BTreeMap::new();
    for (i, (file, _)) in adapters.iter().enumerate() {
        if file.head().is_some() {
            return fail(format!("{} has the head of a reward model besides, which is not merged", name(i)));
        }
        for module in file.modules() {
            let shape = file.shape(&module);
            let (first, of) = *modules.entry(module.clone()).or_insert((shape, i));
            if first != shape {
                return fail(format!(
                    "{module} is {first:?} in {} and {shape:?} in {}; adapters of different models cannot be merged",
                    name(of),
                    name(i)
                ));
            }
        }
        let (first, config) = (&adapters[0].0.config, &file.config);
        if first.fan_in_fan_out != config.fan_in_fan_out {
            return fail(format!("{} and {} disagree on \"fan_in_fan_out\"; are they of one base?", name(0), name(i)));
        }
        // A folder here and a name on a hub may be the same model: the last part tells.
        let base = |config: &peft::AdapterConfig| {
            config
                .base_model
                .as_deref()
                .map(|base| base.trim_end_matches('/').rsplit('/').next().unwrap_or("").to_string())
        };
        if let (None, Some(a), Some(b)) = (&args.model, base(first), base(config))
            && a != b
        {
            return fail(format!(
                "{} was made for {a}, {} for {b}; if these are one model under two names, give it as --model",
                name(0),
                name(i)
            ));
        }
    }
    Ok(modules.into_iter().map(|(module, (shape, _))| (module, shape)).collect())
}

/// The model under the adapters.
struct Base {
    dir: PathBuf,
    checkpoint: Checkpoint,
    weights: Weights,
    /// Tensors that adapters change: (name in the file, module).
    changed: BTreeMap<String, String>,
}

impl Base {
    fn open(dir: &Path, modules: &BTreeMap<String, [usize; 2]>, adapters: &[(AdapterFile, f64)]) -> Result<Self> {
        let checkpoint = Checkpoint::open(dir).or_else(|e| Checkpoint::open_reward(dir).map_err(|_| e))?;
        let weights = Weights::open(dir)?;
        let mut changed = BTreeMap::new();
        for (module, shape) in modules {
            let mut shape = shape.to_vec();
            if adapters[0].0.config.fan_in_fan_out {
                shape.reverse();
            }
            let spellings = checkpoint.architecture.spellings(&format!("{module}.weight"));
            let spellings: Vec<&str> = spellings.iter().map(String::as_str).collect();
            let fail = |detail: String| Err(Error::option("--adapter", detail));
            let Some(name) = weights.first_of(&spellings) else {
                return fail(format!(
                    "adapts {module:?}, which {} does not have; is it the adapter's base?",
                    dir.display()
                ));
            };
            let found = weights.shape(name).unwrap_or_default();
            if found != shape {
                let dir = dir.display();
                return fail(format!(
                    "{module:?} has shape {found:?} in {dir}, the adapters imply {shape:?}; is it their base?"
                ));
            }
            if module == "lm_head" && checkpoint.spec.head == Head::Tied {
                return fail(format!(
                    "adapts {module:?}, which is the embedding, too, in {}; one cannot change alone",
                    dir.display()
                ));
            }
            changed.insert(name.to_string(), module.clone());
        }
        Ok(Self { dir: dir.to_path_buf(), checkpoint, weights, changed })
    }

    /// What the config says that weights are stored as.
    fn dtype(&self) -> Result<SaveDtype> {
        let config = read_json(&self.dir.join("config.json"))?;
        let named = ["dtype", "torch_dtype"].iter().find_map(|key| config.get(key)?.as_str());
        Ok(if named == Some("bfloat16") { SaveDtype::Bf16 } else { SaveDtype::F32 })
    }
}

/// Adds the weighted sum of the adapters to the base's weights, one tensor in memory at a time.
fn delta(args: &AdaptersArgs, base: Base, adapters: &[(AdapterFile, f64)]) -> Result<()> {
    let dtype = match args.dtype {
        Some(Dtype::F32) => SaveDtype::F32,
        Some(Dtype::Bf16) => SaveDtype::Bf16,
        None => base.dtype()?,
    };
    let kept: Vec<&str> = base.weights.names().filter(|name| !base.checkpoint.architecture.is_buffer(name)).collect();
    let rounding: RefCell<Vec<(String, Rounding)>> = RefCell::default();
    let progress = RefCell::new(Progress::new("adding", kept.len() as u64, "tensors"));
    let written = RefCell::new(0);
    let fill = |name: &str, shape: &[usize], out: &mut [f32]| {
        base.weights.read(name, shape, out)?;
        if let Some(module) = base.changed.get(name) {
            let delta = sum(&parts(adapters, module)?);
            let lost = add(out, &delta, adapters[0].0.config.fan_in_fan_out, dtype);
            rounding.borrow_mut().push((name.to_string(), lost));
        }
        *written.borrow_mut() += 1;
        progress.borrow_mut().at(*written.borrow(), name);
        Ok(())
    };
    let source = |name: &&str| {
        let shape = base.weights.shape(name).unwrap_or_default().to_vec();
        let (name, fill) = (name.to_string(), &fill);
        TensorSource { name: name.clone(), shape: shape.clone(), fill: Box::new(move |out| fill(&name, &shape, out)) }
    };
    let sources: Vec<TensorSource> = kept.iter().map(source).collect();
    let (lineage, mut behaviour) = (args.lineage()?, String::new());
    write_dir(&args.output_dir, |dir| {
        save_safetensors(&dir.join("model.safetensors"), &sources, dtype)?;
        write_config(&base.dir, dir, dtype, None)?;
        copy_companions(&base.dir, dir)?;
        behaviour = compare_with_adapters(args, &base, dir)?;
        lineage.write_as(&args.output_dir, dir)
    })?;
    drop(sources);
    progress.into_inner().finish();
    print(&format!("{}{behaviour}", rounding_report(args, &rounding.into_inner(), dtype)))
}

/// What the written model says, beside what the base says under the adapters: on the data set, or else on a short text.
fn compare_with_adapters(args: &AdaptersArgs, base: &Base, written: &Path) -> Result<String> {
    let has_data = args.behaviour.dataset.is_some();
    if !has_data && (base.checkpoint.spec.head == Head::Score || !base.dir.join("tokenizer.json").exists()) {
        return Ok("log-probabilities not compared: the base has no logits, or no tokenizer for a text\n".into());
    }
    let apply = |checkpoint: Checkpoint, adapter: &AdapterArg| checkpoint.with_adapter(&adapter.dir, adapter.weight);
    let beside = args.adapter.iter().try_fold(base.checkpoint.clone(), apply)?;
    let models = [&beside, &Checkpoint::open(written)?];
    Ok(match compare(&args.behaviour, models)? {
        Some(found) => found.text("adapters beside the base, and in it"),
        None => compare_on_text(&args.behaviour, models)?.text("adapters beside the base, and in it, on a short text"),
    })
}

fn rounding_report(args: &AdaptersArgs, rounding: &[(String, Rounding)], dtype: SaveDtype) -> String {
    let all = rounding.iter().fold([0.0, 0.0], |[lost, added], (_, r)| [lost + r.lost, added + r.added]);
    let worst = rounding.iter().max_by(|a, b| a.1.share().total_cmp(&b.1.share()));
    let largest = rounding.iter().max_by(|a, b| a.1.largest.total_cmp(&b.1.largest));
    let mut text = format!(
        "added {} adapters to {} weights, written as {}\n",
        args.adapter.len(),
        rounding.len(),
        dtype.config_name()
    );
    if let (Some((worst, share_of)), Some((at, largest))) = (worst, largest) {
        text += &format!(
            "rounding: {:.3} % of what the adapters add (relative L2), at most {:.3} %, in {worst}; largest error of a weight \
             {:.2e}, in {at}\n",
            100.0 * share(all[0], all[1]),
            100.0 * share_of.share(),
            largest.largest
        );
    }
    text + &format!("model   {}\n", args.output_dir.display())
}
