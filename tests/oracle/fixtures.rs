//! Fixture folders: a tiny model in `model.safetensors` with `config.json` (transformers 5 spelling) and
//! `config.v4.json` (4.x), and in `expected.safetensors` what transformers makes of it. From `tests/data/fixtures`
//! and, when CUVEE_FIXTURES_DIR is set, from there too: same layout, other numbers.

use std::fs;
use std::path::{Path, PathBuf};

use cuvee::checkpoint::Weights;
use cuvee::data::{self, Example, Sequence, Sharing};
use cuvee::device::{Arena, Cpu, DType, Device, Dry};
use cuvee::model::{Checkpoint, Model, Options, load};
use cuvee::objectives::{Choice, Params, Stats, Totals};
use cuvee::rollout::{Request, Sampling, generate};
use libtest_mimic::{Completion, Failed, Trial};
use serde_json::Value;

use crate::shared::{Bench, Expected, LOGPS_TOLERANCE, check_folder};

pub fn trials(root: &Path) -> Vec<Trial> {
    let mut trials = trials_of("repo", &root.join("tests/data/fixtures"));
    match std::env::var_os("CUVEE_FIXTURES_DIR") {
        Some(dir) => trials.extend(trials_of("CUVEE_FIXTURES_DIR", Path::new(&dir))),
        None => trials.push(ignored("fixture::CUVEE_FIXTURES_DIR::*".into(), "CUVEE_FIXTURES_DIR is not set".into())),
    }
    trials
}

fn ignored(name: String, reason: String) -> Trial {
    Trial::ignorable_test(name, move || Ok(Completion::ignored_with(reason)))
}

fn trials_of(source: &str, dir: &Path) -> Vec<Trial> {
    let Ok(entries) = fs::read_dir(dir) else {
        let message = format!("{} is not a folder", dir.display());
        return vec![Trial::test(format!("fixture::{source}"), || Err(message.into()))];
    };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    paths.into_iter().flat_map(|path| trials_for(source, &path)).collect()
}

fn trials_for(source: &str, path: &Path) -> Vec<Trial> {
    let stem = path.file_stem().and_then(|s| s.to_str()).unwrap_or("?").to_string();
    let name = |what: &str| format!("fixture::{source}::{stem}{what}");
    if path.is_dir() {
        return ["config.json", "config.v4.json"]
            .into_iter()
            .filter(|config| path.join(config).exists())
            .map(|config| folder(name(&format!("::{config}")), path.to_path_buf(), config))
            .collect();
    }
    let path = path.to_path_buf();
    match stem.as_str() {
        "trl_dpo_losses" => trl_losses(source, &path),
        "real_models_expected" => real_models(source, &path),
        "greedy" => greedy(source, &path),
        _ => vec![ignored(name(""), "nothing reads this file".into())],
    }
}

fn folder(name: String, dir: PathBuf, config: &'static str) -> Trial {
    Trial::ignorable_test(name, move || {
        if !dir.join("expected.safetensors").exists() {
            return Ok(Completion::ignored_with("no expected.safetensors: another test's reference"));
        }
        let checkpoint = match Checkpoint::from_config(&dir, &dir.join(config)) {
            Ok(checkpoint) => checkpoint,
            Err(e) if e.to_string().contains("is not supported") && e.to_string().contains("model_type") => {
                return Ok(Completion::ignored_with(e.to_string()));
            }
            Err(e) => return Err(e.into()),
        };
        let expected = Expected::read(&dir)?;
        check_folder(Cpu::new(2)?, &checkpoint, &expected)?;
        Ok(Completion::Completed)
    })
}

/// TRL's losses on a policy and its perturbed reference, with the gradient that reaches the head.
fn trl_losses(source: &str, path: &Path) -> Vec<Trial> {
    let file: Value = match fs::read_to_string(path).map_err(|e| e.to_string()).and_then(|text| parse(&text)) {
        Ok(file) => file,
        Err(e) => return vec![Trial::test(format!("fixture::{source}::trl_dpo_losses"), || Err(e.into()))],
    };
    let names: Vec<String> = file["losses"].as_object().into_iter().flatten().map(|(name, _)| name.clone()).collect();
    let trial = |name: String| {
        let (file, dir) = (file.clone(), path.parent().expect("a file has a folder").to_path_buf());
        Trial::ignorable_test(format!("fixture::{source}::trl::{name}"), move || trl_loss(&file, &name, &dir))
    };
    names.into_iter().map(trial).collect()
}

fn parse(text: &str) -> Result<Value, String> {
    serde_json::from_str(text).map_err(|e| e.to_string())
}

fn trl_loss(file: &Value, name: &str, dir: &Path) -> Result<Completion, Failed> {
    let case = &file["losses"][name];
    let args = case["args"].as_object().ok_or("no args")?;
    // The maker of the file pops beta from the arguments; the name has it where it is not TRL's default.
    let named = name.split_once("_beta").and_then(|(_, beta)| beta.parse().ok());
    let objective = choice(args, named.unwrap_or(0.1))?.build()?;
    let examples = trl_pairs(file)?;
    let host = data::Batch::new(&examples, Sharing::On);
    let mut policy = Bench::new(Cpu::new(2)?, &Checkpoint::open(&dir.join("llama_gqa_untied"))?, &host)?;
    let mut reference = Bench::new(Cpu::new(2)?, &Checkpoint::open(&dir.join("llama_gqa_untied_ref"))?, &host)?;
    let (logps, mut ln_sum_p2) = (policy.forward()?, vec![0.0; host.targets.len()]);
    let kept = policy.acts.top.ln_sum_p2.as_ref().expect("the bench asks for it");
    policy.device.read_f32(kept.top(ln_sum_p2.len()), &mut ln_sum_p2)?;
    let stats = pair_stats(&host, &logps, &ln_sum_p2, &reference.forward()?);
    let outcome = objective.evaluate(&stats, &Totals::of(&stats));
    close("loss", outcome.loss, case["loss"].as_f64(), 1e-4)?;
    for (metric, ours) in outcome.metrics.iter().filter(|(metric, _)| !metric.starts_with("loss/")) {
        close(metric, *ours, case["metrics"][metric.as_ref()].as_f64(), 1e-3)?;
    }
    let mut dlogp = vec![0.0; host.targets.len()];
    for (range, d) in host.sequences.iter().zip(&outcome.grads.logps) {
        dlogp[range.clone()].fill(*d);
    }
    dlogp.iter_mut().zip(&outcome.grads.token_logps).for_each(|(sum, d)| *sum += d);
    policy.backward(&dlogp)?;
    let (mut square, hidden) = (0.0, policy.model.spec.hidden);
    for (name, gradient) in policy.gradients()? {
        square += gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>();
        if name == "lm_head.weight" {
            let theirs = case["lm_head_grad_row7"].as_array().ok_or("no lm_head_grad_row7")?;
            for (i, theirs) in theirs.iter().enumerate() {
                close("lm_head row 7", f64::from(gradient[7 * hidden + i]), theirs.as_f64(), 1e-3)?;
            }
        }
    }
    close("grad_norm", square.sqrt(), case["grad_norm"].as_f64(), 1e-3)?;
    Ok(Completion::Completed)
}

/// TRL's arguments as ours; options that are no flag of ours fail when the choice is built.
fn choice(args: &serde_json::Map<String, Value>, beta: f64) -> Result<Choice, Failed> {
    let names = args["loss_type"].as_array().ok_or("no loss_type")?;
    let names: Vec<&str> = names.iter().filter_map(Value::as_str).collect();
    let weights = args.get("loss_weights").and_then(Value::as_array);
    let weight = |i: usize| weights.map_or(Some(1.0), |weights| weights[i].as_f64());
    let terms = names.iter().enumerate().map(|(i, name)| Some((name.to_string(), weight(i)?)));
    let mut params = Params::default();
    if names != ["sft"] {
        params.set("beta", beta);
    }
    for (key, value) in args.iter().filter(|(key, _)| !["loss_type", "loss_weights", "beta"].contains(&key.as_str())) {
        match value {
            Value::Number(number) => params.set(key, number.as_f64().ok_or("not a number")?),
            Value::String(choice) => params.set(key, choice.as_str()),
            Value::Bool(on) => params.set(key, *on),
            other => return Err(format!("{key} is {other}").into()),
        }
    }
    Ok(Choice { terms: terms.collect::<Option<_>>().ok_or("a weight is not a number")?, params })
}

/// Completions end with eos = 2, as the note in the file says.
fn trl_pairs(file: &Value) -> Result<Vec<Example>, Failed> {
    let ids = |pair: &Value, key: &str| -> Vec<u32> {
        pair[key].as_array().into_iter().flatten().filter_map(|id| id.as_u64()).map(|id| id as u32).collect()
    };
    let pairs = file["pairs"].as_array().ok_or("no pairs")?;
    let example = |(row, pair): (usize, &Value)| {
        let prompt = ids(pair, "prompt");
        let sequence = |key| Sequence::new([&prompt[..], &ids(pair, key), &[2]].concat(), prompt.len());
        Example { row, sequences: vec![sequence("chosen"), sequence("rejected")], ..Example::default() }
    };
    Ok(pairs.iter().enumerate().map(example).collect())
}

fn pair_stats(host: &data::Batch, policy: &[f32], ln_sum_p2: &[f32], reference: &[f32]) -> Stats {
    let sums = |logps: &[f32]| -> Vec<f64> {
        host.sequences.iter().map(|range| logps[range.clone()].iter().map(|x| f64::from(*x)).sum()).collect()
    };
    let tokens = |logps: &[f32]| logps.iter().map(|x| f64::from(*x)).collect();
    Stats {
        logps: sums(policy),
        ref_logps: vec![sums(reference)],
        offsets: host.sequences.iter().map(|range| range.start).chain([policy.len()]).collect(),
        token_logps: tokens(policy),
        ref_token_logps: vec![tokens(reference)],
        ln_sum_p2: tokens(ln_sum_p2),
        lens: host.sequences.iter().map(|range| range.len() as f64).collect(),
        pairs: host.examples.iter().map(|range| (range.start, range.start + 1)).collect(),
        ..Stats::default()
    }
}

fn close(what: &str, ours: f64, theirs: Option<f64>, tolerance: f64) -> Result<(), Failed> {
    let theirs = theirs.ok_or(format!("{what} is not in the file"))?;
    if (ours - theirs).abs() <= tolerance * theirs.abs().max(1e-4) {
        return Ok(());
    }
    Err(format!("{what}: {ours}, expected {theirs}").into())
}

/// Real models, where they are at hand.
fn real_models(source: &str, path: &Path) -> Vec<Trial> {
    per_model(source, "real", path, |file| file, real_model)
}

/// Greedy continuations by transformers.
fn greedy(source: &str, path: &Path) -> Vec<Trial> {
    per_model(source, "greedy", path, |file| &file["models"], continuation)
}

/// One test for each model that a file has cases for. Models are looked for beside the file, in folders beside the
/// file's parent (`../models/<name>`), in the repository's `assets`, and under CUVEE_MODELS_DIR.
fn per_model(
    source: &str,
    kind: &'static str,
    path: &Path,
    models: fn(&Value) -> &Value,
    check: fn(&Path, &Value) -> Result<(), Failed>,
) -> Vec<Trial> {
    let file: Value = match fs::read_to_string(path).map_err(|e| e.to_string()).and_then(|text| parse(&text)) {
        Ok(file) => file,
        Err(e) => return vec![Trial::test(format!("fixture::{source}::{kind}"), || Err(e.into()))],
    };
    let models = models(&file).as_object().into_iter().flatten().filter(|(_, cases)| cases.is_array());
    let trial = |(model, cases): (&String, &Value)| {
        let (name, model, cases) = (format!("fixture::{source}::{kind}::{model}"), model.clone(), cases.clone());
        let beside = path.parent().map(Path::to_path_buf);
        Trial::ignorable_test(name, move || {
            let given = std::env::var_os("CUVEE_MODELS_DIR").map(PathBuf::from);
            let models = beside.as_deref().and_then(Path::parent).map(|dir| dir.join("models"));
            let places = [given, beside, models, Some(PathBuf::from("assets"))].into_iter().flatten();
            let Some(dir) = places.map(|place| place.join(&model)).find(|dir| dir.join("config.json").exists()) else {
                return Ok(Completion::ignored_with("the model is not at hand; see CUVEE_MODELS_DIR"));
            };
            cases.as_array().into_iter().flatten().try_for_each(|case| check(&dir, case))?;
            Ok(Completion::Completed)
        })
    };
    models.map(trial).collect()
}

/// By how much logit a token must lead for two implementations to agree on it.
const LEAD: f64 = 1e-4;

/// Token for token, up to the first that hardly led.
fn continuation(dir: &Path, case: &Value) -> Result<(), Failed> {
    let values = |key: &str| case[key].as_array().into_iter().flatten();
    let ids = |key: &str| -> Vec<u32> { values(key).filter_map(Value::as_u64).map(|id| id as u32).collect() };
    let (prompt, theirs) = (ids("prompt"), ids("new"));
    let sure = values("leads").take_while(|lead| lead.as_f64().is_some_and(|lead| lead >= LEAD)).count();
    if sure == 0 || theirs.len() < sure {
        return Err("no token to compare".into());
    }
    let checkpoint = Checkpoint::open(dir)?;
    let (spec, naming, cpu) = (&checkpoint.spec, checkpoint.architecture.naming, Cpu::new(2)?);
    let options = Options::frozen(prompt.len() + theirs.len());
    let mut model = Model::new(
        &mut Arena::new(&cpu, &Model::<Dry>::plan(DType::F32, spec, naming, options))?,
        spec,
        naming,
        options,
    );
    load(&cpu, &checkpoint, &Weights::open(dir)?, &mut model)?;
    let penalty = case["repetition_penalty"].as_f64().unwrap_or(1.0);
    let sampling = Sampling { repetition_penalty: penalty, ..Sampling::greedy() };
    let no_repeat_ngram_size = case["no_repeat_ngram_size"].as_u64().unwrap_or(0) as usize;
    let request = Request { no_repeat_ngram_size, ..Request::new(&prompt, theirs.len(), sampling) };
    let ours = generate(&cpu, &model, &request)?.remove(0).ids;
    match ours[..sure] == theirs[..sure] {
        true => Ok(()),
        false => Err(format!("after {prompt:?}: {ours:?}, expected {theirs:?} ({sure} sure)").into()),
    }
}

fn real_model(dir: &Path, case: &Value) -> Result<(), Failed> {
    let checkpoint = Checkpoint::open(dir)?;
    let tokenizer = cuvee::data::Tokenizer::load(dir)?;
    let numbers =
        |key: &str| -> Vec<f64> { case[key].as_array().into_iter().flatten().filter_map(Value::as_f64).collect() };
    let ids: Vec<u32> = numbers("ids").into_iter().map(|id| id as u32).collect();
    if let Some(text) = case["text"].as_str() {
        let ours = tokenizer.encode_plain(text)?;
        if ours != ids {
            return Err(format!("{text:?}: ids {ours:?}, expected {ids:?}").into());
        }
    }
    let example = Example { sequences: vec![Sequence::new(ids, 1)], ..Example::default() };
    let mut bench = Bench::new(Cpu::new(2)?, &checkpoint, &data::Batch::new([&example], Sharing::On))?;
    let (ours, theirs) = (bench.forward()?, numbers("logps"));
    if ours.len() != theirs.len() {
        return Err(format!("{} log-probs, expected {}", ours.len(), theirs.len()).into());
    }
    for (t, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
        if (f64::from(*ours) - theirs).abs().is_nan() || (f64::from(*ours) - theirs).abs() > LOGPS_TOLERANCE {
            return Err(format!("token {}: log-prob {ours}, expected {theirs}", t + 1).into());
        }
    }
    Ok(())
}
