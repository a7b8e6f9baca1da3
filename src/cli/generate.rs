//! `cuvee generate`

use std::time::Instant;

use serde_json::{Value, json};

use super::args::GenerateArgs;
use super::device::{self, Job};
use super::logps::write_rows;
use crate::data::{Message, Prompt, Tokenizer, read_prompts};
use crate::device::{Arena, Dry};
use crate::error::{Error, Result};
use crate::machine::{human, memory};
use crate::model::{Checkpoint, Init, Model, Options};
use crate::ops::Backend;
use crate::progress::{Progress, say};
use crate::rollout::{Done, Engine, Request, Rollout, Sampling, before_stop, max_running, plan};
use crate::tasks::text_of;
use crate::train::Host;

/// Streams of random numbers that each prompt of a file has to itself.
const STREAMS: u64 = 1 << 24;

pub fn run(args: &GenerateArgs) -> Result<()> {
    let lines = || device::run(&args.engine, args.precision.dtype, None, args);
    if let (Some(prompts), Some(out)) = (&args.prompts, &args.out) {
        return write_rows(out, prompts, lines);
    }
    let start = args.prompt.as_deref().filter(|_| !args.chat).unwrap_or("");
    lines()?.iter().try_for_each(|line| match (args.json, line["completion"].as_str()) {
        (false, Some(text)) => super::print(&format!("{start}{text}\n")),
        _ => super::print(&format!("{line}\n")),
    })
}

impl GenerateArgs {
    fn read(&self, tokenizer: &Tokenizer) -> Result<Vec<Prompt>> {
        if let Some(path) = &self.prompts {
            return read_prompts(path, tokenizer);
        }
        let text = self.prompt.clone().unwrap_or_default();
        let ids = match self.chat {
            true => {
                let content = [("role".into(), "user".into()), ("content".into(), text.as_str().into())];
                let messages = [Message::from_iter(content)];
                tokenizer.encode_plain(&tokenizer.chat_template()?.render(&messages, &Default::default(), true)?)?
            }
            false => tokenizer.encode(&text)?,
        };
        Ok(vec![Prompt { text, ids }])
    }

    fn requests<'a>(&'a self, prompts: &'a [Prompt], eos: &'a [u32]) -> Vec<Request<'a>> {
        let sampling = Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            seed: self.seed,
        };
        let request = |(row, prompt): (u64, &'a Prompt)| Request {
            samples: self.samples,
            first_sample: row * STREAMS,
            min_new_tokens: self.min_new_tokens,
            no_repeat_ngram_size: self.no_repeat_ngram_size,
            eos,
            stop: &self.stop,
            ..Request::new(&prompt.ids, self.max_new_tokens, sampling)
        };
        (0..).zip(prompts).map(request).collect()
    }

    /// How many completions run at a time, and the most memory that the command takes, with the bytes of its weights and the
    /// elements of the largest.
    fn sizes<B: Backend>(
        &self,
        device: &B,
        model: &Model<B>,
        [weights, tensor]: [usize; 2],
        requests: &[Request],
    ) -> Result<(usize, usize)> {
        let (spec, rank, storage) = (&model.spec, model.widest_rank(), device.storage());
        let threads = self.engine.threads.unwrap_or_else(rayon::current_num_threads);
        let host = Host::of_model(&self.model, threads, B::APART);
        let [loading, host_alone] = match B::APART {
            true => [0, 0],
            false => [host.loading(tensor), host.generating(spec, rank, requests)],
        };
        let (fixed, given) = (weights + host_alone, self.ram);
        let left = match (given, device.available_bytes()?) {
            (Some(given), _) => Some(given.saturating_sub(fixed)),
            (None, Some(free)) => Some(free.saturating_sub(fixed)),
            // The model is loaded: what is available is what it left.
            (None, None) => memory().map(|memory| memory.available.saturating_sub(host_alone)),
        };
        let running = match (self.max_running, left) {
            (Some(running), _) => running,
            (None, Some(left)) => max_running(storage, spec, rank, requests, left)?,
            (None, None) => crate::rollout::MAX_RUNNING,
        };
        let needed = (fixed + plan(storage, spec, rank, requests, running).total()).max(weights + loading);
        match given {
            Some(given) if needed > given => Err(Error::option(
                "--ram",
                format!("{running} completions at a time take {} in all, more than {}", human(needed), human(given)),
            )),
            _ => Ok((running, needed)),
        }
    }
}

impl Job for &GenerateArgs {
    type Output = Vec<Value>;

    fn run<B: Backend>(self, device: &B) -> Result<Vec<Value>> {
        let args = self;
        device::check_dtype(device, args.precision.dtype)?;
        let checkpoint = args.adapters.open(&args.model, Checkpoint::open)?;
        let tokenizer = Tokenizer::load(&args.model)?;
        let prompts = args.read(&tokenizer)?;
        let longest = prompts.iter().map(|prompt| prompt.ids.len()).max().unwrap_or(0);
        let options = Options::frozen(longest + args.max_new_tokens)
            .holding(&checkpoint, Init::Checkpoint)
            .with_adapters(&checkpoint);
        let (spec, naming) = (&checkpoint.spec, checkpoint.architecture.naming);
        let ledger = Model::<Dry>::plan(device.keeps(), spec, naming, options);
        let mut model = Model::new(&mut Arena::new(device, &ledger)?, spec, naming, options);
        Init::Checkpoint.fill(device, &checkpoint, &mut model)?;
        let requests = args.requests(&prompts, tokenizer.stops());
        requests.iter().try_for_each(|request| request.check(spec))?;
        let most = prompts.iter().map(|prompt| prompt.ids.len() + args.max_new_tokens);
        checkpoint.beyond("prompts and --max-new-tokens", most).iter().for_each(say);
        let tensor = model.params_mut().iter().map(|param| param.value.len()).max().unwrap_or(0);
        let (running, needed) = args.sizes(device, &model, [ledger.total(), tensor], &requests)?;
        let all = prompts.len() * args.samples;
        let mut progress = args.prompts.is_some().then(|| {
            say(format_args!("{} in all, up to {} completions at a time", human(needed), running.min(all)));
            Progress::new("generating", all as u64, "completions")
        });
        let started = Instant::now();
        let mut show = |done: Done| {
            let speed = done.tokens as f64 / started.elapsed().as_secs_f64();
            let bar = progress.iter_mut();
            bar.for_each(|bar| bar.at(done.completions as u64, &format!("{speed:.0} tokens/s")));
        };
        let engine = Engine::new(device).with_tokenizer(&tokenizer).with_max_running(running);
        let rollouts = engine.run(&model, &requests, &mut show)?;
        if let Some(progress) = progress {
            progress.finish();
            let (tokens, seconds) =
                (rollouts.iter().map(|r| r.ids.len()).sum::<usize>(), started.elapsed().as_secs_f64());
            say(format_args!("{tokens} tokens in {seconds:.2} s, {:.0} tokens/s", tokens as f64 / seconds));
        }
        rollouts.iter().map(|rollout| line(args, &tokenizer, &prompts[rollout.prompt], rollout)).collect()
    }
}

fn line(args: &GenerateArgs, tokenizer: &Tokenizer, prompt: &Prompt, rollout: &Rollout) -> Result<Value> {
    let text = text_of(tokenizer, &prompt.ids, &rollout.ids)?;
    Ok(json!({
        "row": rollout.prompt,
        "sample": rollout.sample,
        "prompt": prompt.text,
        "completion": before_stop(&text, &args.stop),
        "ids": rollout.ids,
        "finish": rollout.finish.name(),
        "finished": rollout.finished(),
        "logps": rollout.logps,
        "sampled_logps": rollout.sampled_logps,
    }))
}
