//! `cuvee soup sweep`: a run for each preference, then blends of them all over the simplex beside other ways to serve many
//! preferences. Runs are those of `cuvee compare`; every policy is measured by a process of its own, rewards all at once at the end.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use clap::Args;
use toml::{Table, Value};

use super::data;
use super::measure::{Completion, Written};
use super::recipe::{MULTITASK, P_MORL, Recipe};
use crate::checkpoint::json::read_json;
use crate::checkpoint::run_dir;
use crate::cli::args::{BatchingArgs, Device, Dtype, EngineArgs, count};
use crate::cli::compare::{Experiment, Plan, content, flag, key, why};
use crate::cli::{device, print, recipe as keys, rollouts, train};
use crate::data::Content;
use crate::error::{At, Error, Result};
use crate::lab::{Job, Makes, Outcome, Runner, Step};
use crate::ops::Backend;
use crate::progress::say;
use crate::rewards::{Jury, Rewards, Sample};
use crate::soup::{Matrix, Measured, Report, grid, is_even, label, of_adapters, of_models, support};

#[derive(Debug, Clone, PartialEq, Args)]
#[command(after_help = "\
A recipe of a sweep has the keys of `cuvee train` for every run (model, objective, lora_rank for adapters, none for whole
policies, ...), and

  [[preference]]    name, prompt (the sentence that asks for it), opposite, reward (what it is measured by, and trained on
                    where there are no comparisons), comparisons (pairs to train on), options (a user's choices: 2), and
                    keys of `cuvee train` for its run alone; list two or more
  [sweep]           prompts that every policy completes, texts for the loss beside, samples (4), max_new_tokens (48),
                    seed (42), pairs (what the first counts: [0.25, 0.5, 0.75]), factor (A and B averaged apart, too: true),
                    judgements (lines of criterion, row, first and second policy, verdict: first, second or tie; a pair that
                    is judged in both orders and differently is a tie; texts are in OUTPUT_DIR/policies/*/written.json)
  [p_morl]          also one policy for the mean of the rewards, all sentences in its prompts; keys of `cuvee train`
  [multitask_sft]   also one that imitates what each reward finds best of the base's answers; prompts (256), samples (8),
                    keys of `cuvee train`
  [prompting]       also the base, asked with the sentences

recipes/soups/three.toml is one. Every run is a process; what fails stops what needs it and nothing else; the same command
goes on after an interruption. A preference that is added trains one policy. OUTPUT_DIR gets soup.txt, .md, .json and .svg.

Example:
  cuvee soup sweep recipes/soups/three.toml")]
pub struct SweepArgs {
    /// TOML file with a base and its preferences
    #[arg(value_name = "RECIPE")]
    pub recipe: PathBuf,
    /// Folder for runs, tables and the figure [default: the recipe's]
    #[arg(long, value_name = "DIR")]
    pub output_dir: Option<PathBuf>,
    /// Processes at a time, which share the cores
    #[arg(long, value_name = "N", default_value = "1", value_parser = count)]
    pub jobs: usize,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub engine: EngineArgs,
}

const ANSWERS: &str = "answers";

/// What writes a policy's completions.
enum Policy {
    Base,
    /// What a run of this name trained.
    Run(&'static str),
    /// What each preference's policy counts, and whether A and B are averaged apart.
    Blend(Vec<f64>, bool),
}

struct Asked {
    name: String,
    method: String,
    policy: Policy,
    prompts: PathBuf,
    samples: usize,
    /// Place of its job.
    job: usize,
}

struct Work<'a> {
    args: &'a SweepArgs,
    recipe: &'a Recipe,
    output_dir: PathBuf,
}

pub fn run(args: &SweepArgs) -> Result<()> {
    let recipe = Recipe::read(&args.recipe)?;
    let mut work = Work { args, recipe: &recipe, output_dir: PathBuf::new() };
    // Parses every run before the first one starts.
    work.output_dir = work.experiment(true)?.output_dir;
    for path in [&recipe.sweep.prompts].into_iter().chain(&recipe.sweep.texts) {
        fs::metadata(path).at(path)?;
    }
    let judged = recipe.sweep.judgements.as_deref().map(Matrix::judged).transpose()?;
    for preference in &recipe.preferences {
        Rewards::open(std::slice::from_ref(&preference.reward))?;
    }
    fs::create_dir_all(&work.output_dir).at(&work.output_dir)?;
    let _lock = run_dir::lock(&work.output_dir)?;
    let stop = train::stop_on_signal()?;
    let stop = || stop.load(Ordering::Relaxed);
    let report = work.report(judged, &stop)?;
    report.write(&work.output_dir)?;
    let folder = work.output_dir.display();
    match args.json {
        true => print(&format!("{}\n", report.to_json()))?,
        false => print(&format!("{}\ntable   {folder}/soup.md\nfigure  {folder}/soup.svg\n", report.text()))?,
    }
    match report.missing.len() {
        0 => Ok(()),
        missing => {
            let detail = format!("{missing} policies are missing, see above; the same command tries them again");
            Err(Error::file(&work.output_dir, detail))
        }
    }
}

impl Work<'_> {
    fn data(&self, name: &str) -> PathBuf {
        self.output_dir.join("data").join(format!("{name}.jsonl"))
    }

    /// The runs as an experiment of `cuvee compare`; `checked`: without files that a sweep makes itself.
    fn experiment(&self, checked: bool) -> Result<Experiment> {
        let Self { args, recipe, .. } = self;
        let absolute = |path: &Path| -> Result<Value> {
            Ok(std::path::absolute(path).at(path)?.to_string_lossy().into_owned().into())
        };
        let is_of_rollouts = |key: &str| rollouts::OPTIONS.contains(&key.replace('-', "_").as_str());
        let (sampling, mut table): (Table, Table) =
            recipe.top.clone().into_iter().partition(|(key, _)| is_of_rollouts(key));
        let mut arms = Vec::new();
        let mut add = |name: &str, mut arm: Table| {
            arm.insert("name".into(), name.into());
            if arm.contains_key("reward") {
                let own = std::mem::replace(&mut arm, sampling.clone());
                arm.extend(own);
            }
            arms.push(Value::Table(arm));
        };
        for preference in &recipe.preferences {
            add(&preference.declared.name, preference.train.clone());
        }
        if let Some(own) = &recipe.p_morl {
            let mut arm = own.clone();
            let share = 1.0 / recipe.preferences.len() as f64;
            let reward = |p: &super::recipe::Preference| -> Result<Value> {
                let what = absolute(&p.reward.what)?;
                Ok(format!("{}={}", what.as_str().unwrap_or_default(), p.reward.weight * share).into())
            };
            let rewards: Vec<Value> = recipe.preferences.iter().map(reward).collect::<Result<_>>()?;
            arm.insert("reward".into(), rewards.into());
            if !checked {
                arm.insert("dataset".into(), absolute(&self.data("p-morl"))?);
            }
            add("p-morl", arm);
        }
        if let Some((_, own)) = &recipe.multitask {
            let mut arm = own.clone();
            arm.insert("objective".into(), "sft".into());
            if !checked {
                arm.insert("dataset".into(), absolute(&self.data(MULTITASK))?);
            }
            add("multitask-sft", arm);
        }
        table.insert("arm".into(), Value::Array(arms));
        let mut typed: Vec<OsString> =
            vec!["compare".into(), "--seeds=1".into(), format!("--jobs={}", args.jobs).into()];
        typed.extend(args.output_dir.iter().map(|dir| flag("output-dir", dir)));
        typed.extend(engine(&args.engine));
        let flags = keys::subcommand("compare").try_get_matches_from(typed);
        let flags = flags.map_err(|e| Error::option("soup sweep", e))?;
        Experiment::of(&recipe.path, &table, &flags)
    }

    /// All that is measured, in two rounds: what multitask SFT learns from is not there before the first.
    fn report(&self, judged: Option<Matrix>, stop: &dyn Fn() -> bool) -> Result<Report> {
        let recipe = self.recipe;
        if let Some(own) = &recipe.p_morl {
            data::write_asking(&self.dataset(own)?, &recipe.sentences(), &self.data("p-morl"))?;
        }
        let mut asked = Vec::new();
        if recipe.multitask.is_some() {
            self.answers(stop)?;
        }
        let experiment = self.experiment(false)?;
        let mut plan = Plan::new(&experiment);
        plan.all()?;
        self.base(&experiment)?;
        let adapted = self.are_adapters(&plan, &experiment)?;
        for one in self.policies(adapted)? {
            asked.push(self.measure(&mut plan, &experiment, one)?);
        }
        let blends = asked.iter().filter(|asked| matches!(asked.policy, Policy::Blend(..))).count();
        say(format_args!("{} runs, {} policies to measure, {blends} of them blends", plan.runs.len(), asked.len()));
        let outcomes = self.run_all(&plan.jobs, stop)?;
        self.judge(&plan, &experiment, asked, &outcomes, judged)
    }

    fn run_all(&self, jobs: &[Job], stop: &dyn Fn() -> bool) -> Result<Vec<Outcome>> {
        let program = std::env::current_exe().at("the path of this program")?;
        let doing = ("blending", "runs");
        Runner { program: &program, jobs: self.args.jobs, doing, stop, gate: &|_| None }.run(jobs)
    }

    /// The prompts that a run beside the preferences' learns from.
    fn dataset(&self, own: &Table) -> Result<PathBuf> {
        let path = own.get("dataset").or_else(|| self.recipe.top.get("dataset")).and_then(Value::as_str);
        let folder = self.recipe.path.parent().unwrap_or(Path::new(""));
        let missing =
            || Error::file(&self.recipe.path, "dataset: missing; give the prompts that policies are trained on");
        path.map(|path| keys::clean(&folder.join(path))).ok_or_else(missing)
    }

    /// The one model that all runs start from.
    fn base(&self, experiment: &Experiment) -> Result<PathBuf> {
        let mut models = experiment.variants.iter().map(|variant| variant.what.table().get("model"));
        let first = models.next().flatten().and_then(Value::as_str).unwrap_or_default();
        if let Some(Some(other)) = models.find(|other| other.and_then(Value::as_str) != Some(first)) {
            let detail = format!("model: policies of {first} and of {other} cannot be blended; give all one base");
            return Err(Error::file(&self.recipe.path, detail));
        }
        Ok(first.into())
    }

    /// What multitask SFT learns: the best of the base's answers for each preference.
    fn answers(&self, stop: &dyn Fn() -> bool) -> Result<()> {
        let Some((multitask, own)) = &self.recipe.multitask else { return Ok(()) };
        let prompts = self.data(ANSWERS);
        data::write_prompts(&self.dataset(own)?, multitask.prompts, &prompts)?;
        // The runs' data set is what this makes: any file does until then.
        let experiment = self.experiment(true)?;
        let mut plan = Plan::new(&experiment);
        let asked = Asked {
            name: ANSWERS.into(),
            method: ANSWERS.into(),
            policy: Policy::Base,
            prompts: prompts.clone(),
            samples: multitask.samples,
            job: 0,
        };
        let asked = self.measure(&mut plan, &experiment, asked)?;
        let outcomes = self.run_all(&plan.jobs, stop)?;
        if let Some(why) = why(&outcomes[asked.job]) {
            return Err(Error::file(&prompts, format!("no answers to learn from: {why}")));
        }
        let written = written(&plan.jobs[asked.job].dir)?;
        let rewards =
            self.rewards(&[written.completions.iter().collect()], &data::prompts(&prompts)?, multitask.samples)?;
        let best = |rewards: &[f64]| -> Vec<&str> {
            let of_prompt = |p: usize| {
                let all = p * multitask.samples..(p + 1) * multitask.samples;
                // The first of several that are equal; what a reward says nothing of is the last choice.
                let low = |i: &usize| if rewards[*i].is_nan() { f64::NEG_INFINITY } else { rewards[*i] };
                all.rev().max_by(|a, b| low(a).total_cmp(&low(b))).map_or("", |i| written.completions[i].text.as_str())
            };
            (0..written.prompts).map(of_prompt).collect()
        };
        let sentences = self.recipe.preferences.iter().map(|preference| preference.declared.prompt.as_str());
        let answers: Vec<(&str, Vec<&str>)> = sentences.zip(rewards.iter().map(|of| best(&of[0]))).collect();
        data::write_answers(&prompts, &answers, &self.data(MULTITASK))
    }

    /// Whether preferences train adapters, all of them, or none.
    fn are_adapters(&self, plan: &Plan, experiment: &Experiment) -> Result<bool> {
        let names = self.recipe.names();
        let is_one = |run: &&crate::cli::compare::Run| names.contains(&experiment.variants[run.variant].name.as_str());
        let runs: Vec<_> = plan.runs.iter().filter(is_one).collect();
        let adapted = runs.iter().filter(|run| run.logs != run.model).count();
        match adapted {
            0 => Ok(false),
            n if n == runs.len() => Ok(true),
            _ => {
                let detail =
                    "lora_rank: some preferences train adapters and some whole policies; give it to all, or to none";
                Err(Error::file(&self.recipe.path, detail))
            }
        }
    }

    /// Everything that completes the prompts.
    fn policies(&self, adapted: bool) -> Result<Vec<Asked>> {
        let (recipe, names) = (self.recipe, self.recipe.names());
        let plain = &recipe.sweep.prompts;
        let mut asked = Vec::new();
        let mut ask = |name: String, method: String, policy, prompts: &Path| {
            let (prompts, samples) = (prompts.to_path_buf(), recipe.sweep.samples);
            asked.push(Asked { name, method, policy, prompts, samples, job: 0 });
        };
        ask("base".into(), "base".into(), Policy::Base, plain);
        for weights in grid(names.len(), &recipe.sweep.pairs) {
            let name = label(&names, &weights);
            if recipe.sweep.factor && adapted && is_even(&weights) {
                ask(format!("factor {name}"), "factor".into(), Policy::Blend(weights.clone(), true), plain);
            }
            ask(name, "soup".into(), Policy::Blend(weights, false), plain);
        }
        let all = self.data("asking-for-all");
        data::write_asking(plain, &recipe.sentences(), &all)?;
        if recipe.p_morl.is_some() {
            ask("p-morl".into(), "p-morl".into(), Policy::Run("p-morl"), &all);
        }
        let mut each = vec![("all".to_string(), all.clone())];
        for preference in &recipe.preferences {
            let path = self.data(&format!("asking-for-{}", preference.declared.name));
            data::write_asking(plain, &preference.declared.prompt, &path)?;
            each.push((preference.declared.name.clone(), path));
        }
        let several =
            [(recipe.multitask.is_some(), "multitask-sft asked for", true), (recipe.prompting, "prompting for", false)];
        for (_, what, trained) in several.into_iter().filter(|(is, ..)| *is) {
            for (sentence, path) in &each {
                let name = format!("{what} {sentence}");
                let policy = if trained { Policy::Run("multitask-sft") } else { Policy::Base };
                ask(name.clone(), name, policy, path);
            }
        }
        Ok(asked)
    }

    /// Adds the job of a policy, behind the runs that it needs.
    fn measure(&self, plan: &mut Plan, experiment: &Experiment, asked: Asked) -> Result<Asked> {
        let (base, sweep) = (self.base(experiment)?, &self.recipe.sweep);
        let slug = asked.name.replace(|c: char| !c.is_ascii_alphanumeric() && !"-_.+".contains(c), "-");
        let dir = self.output_dir.join("policies").join(slug);
        let (mut steps, mut needs) = (Vec::new(), Vec::new());
        let mut parts = vec!["soup measure".to_string(), content(&base)?, content(&asked.prompts)?];
        let mut args: Vec<OsString> = vec!["soup".into(), "measure".into(), flag("base-model", &base)];
        let run = |name: &str| {
            let fits = |variant: usize| experiment.variants[variant].name == name;
            plan.runs.iter().find(|run| fits(run.variant)).expect("it was planned")
        };
        match &asked.policy {
            Policy::Base => args.push(flag("model", &base)),
            Policy::Run(name) => {
                let run = run(name);
                args.push(flag("model", &run.model));
                parts.push(plan.jobs[run.job].key.clone());
                needs.push(run.job);
            }
            Policy::Blend(weights, factor) => {
                let names = self.recipe.names();
                let counted = support(weights);
                let mut of: Vec<OsString> = Vec::new();
                for i in &counted {
                    let run = run(names[*i]);
                    // What does not count may come and go.
                    parts.push(format!("{} {} {factor}", plan.jobs[run.job].key, weights[*i]));
                    needs.push(run.job);
                    let (kind, folder) = match run.logs == run.model {
                        true => ("model", &run.model),
                        false => ("adapter", &run.logs),
                    };
                    of.push(match (kind, counted.len()) {
                        ("model", 1) => flag(kind, folder),
                        _ => flag(kind, Path::new(&format!("{}={}", folder.display(), weights[*i]))),
                    });
                }
                let whole = of.iter().any(|flag| flag.to_string_lossy().starts_with("--model"));
                if *factor || whole && counted.len() > 1 {
                    let blend = dir.join("blend");
                    let method = factor.then(|| OsString::from("--method=factor"));
                    let blending = ["soup".into(), flag("output-dir", &blend)].into_iter().chain(method);
                    steps.push(Step { args: blending.chain(of).collect(), makes: Makes::Folder(blend.clone()) });
                    of = vec![flag(if whole { "model" } else { "adapter" }, &blend)];
                }
                args.extend((!whole).then(|| flag("model", &base)));
                args.extend(of);
            }
        }
        needs.sort_unstable();
        args.push(flag("prompts", &asked.prompts));
        if asked.name != ANSWERS {
            args.push(flag("plain-prompts", &sweep.prompts));
            parts.push(content(&sweep.prompts)?);
            if let Some(texts) = &sweep.texts {
                args.push(flag("texts", texts));
                parts.push(content(texts)?);
            }
        }
        let (samples, longest, seed) = (asked.samples, sweep.max_new_tokens, sweep.seed);
        let numbers = [format!("--samples={samples}"), format!("--max-new-tokens={longest}"), format!("--seed={seed}")];
        parts.extend(numbers.iter().cloned());
        args.extend(numbers.map(OsString::from));
        args.extend(engine(&EngineArgs { threads: plan.threads, ..self.args.engine.clone() }));
        steps.push(Step { args, makes: Makes::Output(dir.join("written.json")) });
        plan.jobs.push(Job { name: asked.name.clone(), dir, needs, key: key(&parts), file: None, steps });
        Ok(Asked { job: plan.jobs.len() - 1, ..asked })
    }

    /// `[preferences][policies][prompts * samples]`; every reward sees the plain prompt and the response.
    fn rewards(
        &self,
        policies: &[Vec<&Completion>],
        prompts: &[Content],
        samples: usize,
    ) -> Result<Vec<Vec<Vec<f64>>>> {
        let of = |completions: &Vec<&Completion>| -> Vec<f64> { vec![f64::NAN; completions.len()] };
        if policies.is_empty() {
            return Ok(vec![policies.iter().map(of).collect(); self.recipe.preferences.len()]);
        }
        let score = |preference: &super::recipe::Preference| {
            let rewards = Rewards::open(std::slice::from_ref(&preference.reward))?;
            let job = Scoring { rewards: &rewards, policies, prompts, samples };
            device::run(&self.args.engine, Dtype::F32, None, job)
        };
        self.recipe.preferences.iter().map(score).collect()
    }

    fn judge(
        &self,
        plan: &Plan,
        experiment: &Experiment,
        asked: Vec<Asked>,
        outcomes: &[Outcome],
        judged: Option<Matrix>,
    ) -> Result<Report> {
        let (recipe, mut missing, mut found) = (self.recipe, Vec::new(), Vec::new());
        for asked in asked {
            match why(&outcomes[asked.job]) {
                Some(why) => missing.push((asked.name, why)),
                None => found.push((written(&plan.jobs[asked.job].dir)?, asked)),
            }
        }
        let prompts = data::prompts(&recipe.sweep.prompts)?;
        let completions: Vec<Vec<&Completion>> =
            found.iter().map(|(written, _)| written.completions.iter().collect()).collect();
        let rewards = self.rewards(&completions, &prompts, recipe.sweep.samples)?;
        let measured = |(at, (written, asked)): (usize, &(Written, Asked))| Measured {
            name: asked.name.clone(),
            method: asked.method.clone(),
            weights: match &asked.policy {
                Policy::Blend(weights, false) => Some(weights.clone()),
                _ => None,
            },
            samples: written.samples,
            rewards: rewards.iter().map(|of| of[at].clone()).collect(),
            log_ratios: written.completions.iter().map(|one| one.logp - one.base_logp).collect(),
            nll: written.nll,
        };
        let arms: Vec<Measured> = found.iter().enumerate().map(measured).collect();
        let trained = |name: &&str| plan.runs.iter().find(|run| experiment.variants[run.variant].name == **name);
        let runs: Vec<_> = recipe.names().iter().filter_map(trained).collect();
        let cosines = match runs.iter().all(|run| outcomes[run.job] == Outcome::Done) {
            false => None,
            true if runs.iter().all(|run| run.logs != run.model) => {
                Some(of_adapters(&runs.iter().map(|run| run.logs.as_path()).collect::<Vec<_>>())?)
            }
            true => {
                let models: Vec<&Path> = runs.iter().map(|run| run.model.as_path()).collect();
                Some(of_models(&self.base(experiment)?, &models)?)
            }
        };
        let shared = [(recipe.p_morl.is_some(), P_MORL), (recipe.multitask.is_some(), MULTITASK)];
        Ok(Report {
            preferences: recipe.preferences.iter().map(|preference| preference.declared.clone()).collect(),
            arms,
            missing,
            cosines,
            judged,
            shared: shared.into_iter().filter(|(is, _)| *is).map(|(_, name)| name.replace('_', "-")).collect(),
        })
    }
}

/// Flags of an engine that is not the default.
fn engine(args: &EngineArgs) -> Vec<OsString> {
    let mut flags: Vec<OsString> = args.threads.iter().map(|threads| format!("--threads={threads}").into()).collect();
    flags.extend((args.device != Device::Auto).then(|| format!("--device={}", args.device).into()));
    flags.extend(args.no_amx.then(|| "--no-amx".into()));
    flags.extend(args.batch_invariant.then(|| "--batch-invariant".into()));
    flags
}

fn written(dir: &Path) -> Result<Written> {
    let path = dir.join("written.json");
    let damaged = |e| Error::file(&path, format!("is damaged: {e}; delete its folder and sweep again"));
    serde_json::from_value(read_json(&path)?).map_err(damaged)
}

struct Scoring<'a> {
    rewards: &'a Rewards,
    policies: &'a [Vec<&'a Completion>],
    prompts: &'a [Content],
    samples: usize,
}

impl<'s> device::Job for Scoring<'s> {
    /// `[policies][prompts * samples]`
    type Output = Vec<Vec<f64>>;

    fn run<B: Backend>(self, device: &B) -> Result<Vec<Vec<f64>>> {
        let batching = BatchingArgs { micro_batch_tokens: None, no_prefix_sharing: false };
        let mut jury = Jury::new(device, self.rewards, crate::cli::packing(&batching));
        let mut all = Vec::new();
        for completions in self.policies {
            let sample = |(at, Completion { text, ids, finished, .. }): (usize, &&'s Completion)| Sample {
                prompt: &self.prompts[at / self.samples],
                completion: text,
                answer: None,
                row: at / self.samples,
                prompt_ids: &[],
                completion_ids: ids,
                finished: *finished,
            };
            let samples: Vec<Sample<'s>> = completions.iter().enumerate().map(sample).collect();
            let scores = jury.score(&samples)?;
            all.push((0..samples.len()).map(|s| self.rewards.sum(scores.iter().map(|of| of[s]))).collect());
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_recipes_we_ship_can_be_swept() {
        for (name, runs, policies) in [("three", 5, 30), ("four", 4, 51)] {
            let recipe = PathBuf::from(format!("{}/recipes/soups/{name}.toml", env!("CARGO_MANIFEST_DIR")));
            let engine = EngineArgs { threads: None, device: Device::Auto, no_amx: false, batch_invariant: false };
            let args = SweepArgs { recipe, output_dir: None, jobs: 1, json: false, engine };
            let recipe = Recipe::read(&args.recipe).unwrap();
            let folder = tempfile::tempdir().unwrap();
            let work = Work { args: &args, recipe: &recipe, output_dir: folder.path().to_path_buf() };
            let experiment = work.experiment(true).unwrap();
            assert_eq!(experiment.variants.len(), runs, "{name}");
            assert!(experiment.output_dir.ends_with("runs/soups"));
            assert_eq!(work.policies(true).unwrap().len(), policies, "{name}");
        }
    }
}
