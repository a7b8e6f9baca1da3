//! `cuvee serve`

use std::net::{IpAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;

use super::args::{EngineArgs, PrecisionArgs, bytes, count, positive};
use super::device::{self, Job};
use crate::data::Tokenizer;
use crate::device::{Arena, Dry};
use crate::error::{At, Error, Result};
use crate::lineage::content_hash;
use crate::machine::{human, memory};
use crate::model::{Checkpoint, Init, Model, Options};
use crate::ops::Backend;
use crate::progress::say;
use crate::rollout::{Limits, Size, plan_size};
use crate::serve::{Audit, Declared, Manners, Most, Settings, Soups, run as serve};
use crate::train::Host;

/// Names the key where no file does.
const KEY: &str = "CUVEE_API_KEY";
/// Tokens of a prompt and its completion, where nothing else is said.
const CONTEXT: usize = 2048;

#[derive(Debug, Clone, PartialEq, Args)]
#[command(
    allow_negative_numbers = true,
    after_help = "\
Speaks OpenAI's protocol: /v1/completions, /v1/chat/completions, /v1/models; and /health, /metrics.
\"soup\": {\"concise\": 0.7, \"friendly\": 0.3} in a request blends adapters for that request alone; none is the model as it
is, and an adapter's name as \"model\" is all of it. Answers say what made them (\"cuvee\", x-cuvee-soup). Texts depend on the
request and its seed, not on what runs beside it.

Examples:
  cuvee serve --model DIR --adapter concise=runs/concise --adapter friendly=runs/friendly
  curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
    -d '{\"prompt\": \"The film was\", \"soup\": {\"concise\": 0.7, \"friendly\": 0.3}}'
  cuvee serve --model DIR --host 0.0.0.0 --api-key-file key.txt --audit-log requests.jsonl"
)]
pub struct ServeArgs {
    /// Model: a Hugging Face folder
    #[arg(long, alias = "model-name-or-path", value_name = "DIR")]
    pub model: PathBuf,
    /// An adapter that requests may blend in, and the name they call it by. Repeat the flag for several
    #[arg(long, value_name = "NAME=DIR", value_parser = adapter)]
    pub adapter: Vec<(String, PathBuf)>,
    /// How much of an adapter a request may take [default: 0..1]
    #[arg(long, value_name = "NAME=A..B", value_parser = range)]
    pub soup_range: Vec<(String, [f64; 2])>,
    /// What requests call the model without adapters [default: the folder's name]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Address to listen on; another than this machine's own needs an API key
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1", help_heading = "Network")]
    pub host: IpAddr,
    /// Port to listen on; 0 = any that is free
    #[arg(long, value_name = "N", default_value = "8000", help_heading = "Network")]
    pub port: u16,
    /// File whose first line requests must show as their key; default: what CUVEE_API_KEY holds, if anything
    #[arg(long, value_name = "FILE", help_heading = "Network")]
    pub api_key_file: Option<PathBuf>,
    /// Open connections, at most
    #[arg(long, value_name = "N", default_value = "256", value_parser = count, help_heading = "Network")]
    pub max_connections: usize,
    /// Seconds to wait for a client that sends or takes nothing
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = positive, help_heading = "Network")]
    pub patience: f64,
    /// Seconds that answers may take to end once the server is asked to stop
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = positive, help_heading = "Network")]
    pub drain: f64,
    /// Tokens of a prompt and its completion, at most [default: 2048, or what the model was made for]
    #[arg(long, value_name = "N", value_parser = count, help_heading = "Limits")]
    pub max_context: Option<usize>,
    /// New tokens of one completion, at most [default: --max-context]
    #[arg(long, value_name = "N", value_parser = count, help_heading = "Limits")]
    pub max_tokens: Option<usize>,
    /// Completions of one request, at most: prompts times n
    #[arg(long, value_name = "N", default_value = "64", value_parser = count, help_heading = "Limits")]
    pub max_completions: usize,
    /// Completions that may wait; more are refused with status 429
    #[arg(long, value_name = "N", default_value = "256", value_parser = count, help_heading = "Limits")]
    pub max_queue: usize,
    /// Bytes of a request's body, at most
    #[arg(long, value_name = "SIZE", default_value = "1MiB", value_parser = bytes, help_heading = "Limits")]
    pub max_body: usize,
    /// Completions that run at a time, at most; texts do not depend on it
    #[arg(long, value_name = "N", default_value = "64", value_parser = count, help_heading = "Memory")]
    pub max_running: usize,
    /// Tokens of all that run at a time, prompts and completions at full length [default: a quarter of --max-running times
    /// --max-context, or what half of the free memory holds]
    #[arg(long, value_name = "N", value_parser = count, help_heading = "Memory")]
    pub cache_tokens: Option<usize>,
    /// Write a line of JSON for each request: when, which blend, how many tokens
    #[arg(long, value_name = "FILE", help_heading = "Audit")]
    pub audit_log: Option<PathBuf>,
    /// Write prompts and completions there too
    #[arg(long, requires = "audit_log", help_heading = "Audit")]
    pub audit_prompts: bool,
    #[command(flatten)]
    pub engine: EngineArgs,
    #[command(flatten)]
    pub precision: PrecisionArgs,
}

/// Names that may stand in a header and in a flag.
fn named(text: &str) -> Option<(&str, &str)> {
    let (name, rest) = text.split_once('=')?;
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    (!name.is_empty() && name.chars().all(plain) && !rest.is_empty()).then_some((name, rest))
}

fn adapter(text: &str) -> Result<(String, PathBuf), String> {
    let (name, dir) =
        named(text).ok_or("expected a name of letters, digits, - _ . and a folder, such as concise=runs/concise")?;
    Ok((name.to_string(), dir.into()))
}

fn range(text: &str) -> Result<(String, [f64; 2]), String> {
    let read = || {
        let (name, range) = named(text)?;
        let (least, most) = range.split_once("..")?;
        let [least, most]: [f64; 2] = [least.parse().ok()?, most.parse().ok()?];
        let sound = least.is_finite() && most.is_finite() && least <= most;
        sound.then(|| (name.to_string(), [least, most]))
    };
    read().ok_or_else(|| "expected an adapter's name and two numbers, such as concise=0..1.5".into())
}

impl ServeArgs {
    /// What no single flag can know.
    pub(super) fn check(&self) -> Result<()> {
        for (at, (name, _)) in self.adapter.iter().enumerate() {
            if self.adapter[..at].iter().any(|(other, _)| other == name) {
                return Err(Error::option("--adapter", format!("there are two of the name {name}")));
            }
        }
        if let Some((name, _)) = self.soup_range.iter().find(|(name, _)| !self.adapter.iter().any(|(a, _)| a == name)) {
            return Err(Error::option("--soup-range", format!("there is no --adapter of the name {name}")));
        }
        Ok(())
    }

    fn key(&self) -> Result<Option<String>> {
        let key = match &self.api_key_file {
            None => std::env::var(KEY).ok().filter(|key| !key.is_empty()),
            Some(path) => {
                let text = std::fs::read_to_string(path).at(path)?;
                let key = text.lines().next().unwrap_or_default().trim();
                if key.is_empty() {
                    return Err(Error::file(path, "its first line should be the API key, and is empty"));
                }
                Some(key.to_string())
            }
        };
        if key.is_none() && !self.host.is_loopback() {
            let detail = format!(
                "{} can be reached from other machines; give --api-key-file, or a key in {KEY}, and keep TLS in front",
                self.host
            );
            return Err(Error::option("--host", detail));
        }
        Ok(key)
    }

    /// The model and its adapters, each named with its hash. Reads all weights once.
    fn soups(&self) -> Result<Soups> {
        let folder = || Some(self.model.canonicalize().ok()?.file_name()?.to_string_lossy().into_owned());
        let base = self.name.clone().or_else(folder).unwrap_or_else(|| "model".into());
        if self.adapter.iter().any(|(name, _)| *name == base) {
            let detail = format!("{base} is the model's own name; choose another, or give --name");
            return Err(Error::option("--adapter", detail));
        }
        let declared = |(name, dir): &(String, PathBuf)| {
            let range = self.soup_range.iter().rfind(|(of, _)| of == name).map_or([0.0, 1.0], |(_, range)| *range);
            Ok(Declared { name: name.clone(), hash: content_hash(dir)?, range })
        };
        let adapters = self.adapter.iter().map(declared).collect::<Result<_>>()?;
        Ok(Soups { base, base_hash: content_hash(&self.model)?, adapters })
    }

    /// The longest sequence.
    fn context(&self, checkpoint: &Checkpoint) -> Result<usize> {
        let most = checkpoint.spec.most_positions();
        match (self.max_context, most) {
            (Some(given), Some(most)) if given > most => {
                let detail = format!("{given} tokens, but the model has learned positions for {most}");
                Err(Error::option("--max-context", detail))
            }
            (Some(given), _) => Ok(given.max(2)),
            (None, _) => Ok(checkpoint.positions().unwrap_or(CONTEXT).min(CONTEXT)),
        }
    }

    /// How many tokens there is room for, and the memory that the session then takes.
    fn room<B: Backend>(&self, device: &B, model: &Model<B>, context: usize) -> Result<(Limits, usize)> {
        let limits = |tokens| Limits { running: self.max_running, context, tokens, adapters: self.adapter.len() };
        let needs = |tokens| {
            let size = Size::within(&model.spec, &limits(tokens));
            plan_size(device.storage(), &model.spec, model.widest_rank(), &size).total()
        };
        let free = device.available_bytes()?.or(memory().map(|memory| memory.available)).unwrap_or(usize::MAX);
        let mut tokens = self.cache_tokens.unwrap_or(self.max_running * context / 4).max(context);
        if self.cache_tokens.is_none() {
            while tokens > context && needs(tokens) > free / 2 {
                tokens = (tokens * 3 / 4).max(context);
            }
        }
        if needs(tokens) > free {
            let detail = format!("{tokens} tokens take {}, and {} are free", human(needs(tokens)), human(free));
            return Err(Error::option("--cache-tokens", format!("{detail}; lower it, --max-context or --max-running")));
        }
        Ok((limits(tokens), needs(tokens)))
    }
}

pub fn run(args: &ServeArgs) -> Result<()> {
    device::run(&args.engine, args.precision.dtype, None, args)
}

/// The model's checkpoint under all adapters, each as it is.
fn open(model: &Path, adapters: &[(String, PathBuf)]) -> Result<Checkpoint> {
    adapters.iter().try_fold(Checkpoint::open(model)?, |checkpoint, (_, dir)| checkpoint.with_adapter(dir, 1.0))
}

impl Job for &ServeArgs {
    type Output = ();

    fn run<B: Backend>(self, device: &B) -> Result<()> {
        let args = self;
        device::check_dtype(device, args.precision.dtype)?;
        let api_key = args.key()?;
        let audit = args.audit_log.as_ref().map(|path| Audit::open(path, args.audit_prompts)).transpose()?;
        let address = (args.host, args.port);
        let listener = TcpListener::bind(address)
            .map_err(|e| Error::option("--port", format!("cannot listen on {} port {}: {e}", args.host, args.port)))?;
        let checkpoint = open(&args.model, &args.adapter)?;
        let (soups, tokenizer) = (args.soups()?, Tokenizer::load(&args.model)?);
        let (spec, naming) = (&checkpoint.spec, checkpoint.architecture.naming);
        let context = args.context(&checkpoint)?;
        let options = Options::frozen(context).holding(&checkpoint, Init::Checkpoint).with_adapters(&checkpoint);
        let ledger = Model::<Dry>::plan(device.keeps(), spec, naming, options);
        let mut model = Model::new(&mut Arena::new(device, &ledger)?, spec, naming, options);
        Init::Checkpoint.fill(device, &checkpoint, &mut model)?;
        let (limits, bytes) = args.room(device, &model, context)?;
        let threads = args.engine.threads.unwrap_or_else(rayon::current_num_threads);
        let host = Host::of_model(&args.model, threads, B::APART).loading(0);
        say(format_args!(
            "{} for the model, {} for up to {} completions of {} tokens together, {} for the program",
            human(ledger.total()),
            human(bytes),
            limits.running,
            limits.tokens,
            human(host)
        ));
        let most = Most {
            context,
            new_tokens: args.max_tokens.unwrap_or(context),
            completions: args.max_completions.min(limits.running + args.max_queue),
        };
        let [patience, drain] = [args.patience, args.drain].map(Duration::from_secs_f64);
        let manners = Manners { connections: args.max_connections, patience, drain };
        let (queue, most_body) = (args.max_queue, args.max_body);
        serve(
            device,
            &model,
            tokenizer,
            listener,
            Settings { soups, limits, most, queue, most_body, manners, api_key, audit },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters_and_ranges_have_names() {
        assert_eq!(adapter("a-b.2=runs/x=3"), Ok(("a-b.2".into(), "runs/x=3".into())));
        assert_eq!(range("a=-0.5..1.5"), Ok(("a".into(), [-0.5, 1.5])));
        assert_eq!(range("a=1..1"), Ok(("a".into(), [1.0, 1.0])));
        for text in ["", "a", "=x", "a=", "a b=x", "a/b=x", "é=x"] {
            assert!(adapter(text).is_err_and(|e| e.contains("concise=runs/concise")), "{text}");
        }
        for text in ["a", "a=1", "a=1..0", "a=x..1", "a=0..inf", "a=nan..1", "a=0.5"] {
            assert!(range(text).is_err_and(|e| e.contains("concise=0..1.5")), "{text}");
        }
    }
}
