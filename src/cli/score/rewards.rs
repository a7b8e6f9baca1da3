//! `cuvee score --reward`: what a run would be rewarded by, seen before it is run.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::cli::args::ScoreArgs;
use crate::cli::device::{self, Job};
use crate::cli::logps::write_rows;
use crate::data::{Content, Parts, Row, Tokenizer, read_rows};
use crate::error::{Error, Result};
use crate::ops::Backend;
use crate::progress::say;
use crate::rewards::judgement::{Judgement, Tally};
use crate::rewards::{Jury, Rewards, Sample};

pub fn run(args: &ScoreArgs) -> Result<()> {
    let rewards = Rewards::open(&args.reward)?;
    let tokenizer = args.tokenizer.as_deref().map(Tokenizer::load).transpose()?;
    match (rewards.reads_tokens(), &tokenizer) {
        (Some(name), None) => {
            let detail = format!(
                "missing; the reward {name:?} counts tokens: give the folder of the model whose tokens they are"
            );
            return Err(Error::option("--tokenizer", detail));
        }
        (None, Some(_)) => return Err(Error::option("--tokenizer", "none of the rewards counts tokens; drop it")),
        _ => {}
    }
    let lines = || {
        let texts = texts(args)?;
        let job = Scoring { rewards: &rewards, tokenizer: tokenizer.as_ref(), texts: &texts, args };
        device::run(&args.engine, args.precision.dtype, None, job)
    };
    match (&args.dataset, &args.out) {
        (Some(dataset), Some(out)) => write_rows(out, dataset, lines),
        _ => {
            let mut line = lines()?.remove(0);
            line.as_object_mut().expect("it is one").remove("row");
            crate::cli::print(&format!("{line}\n"))
        }
    }
}

/// What is judged of a row: one completion, or chosen and rejected.
pub struct Texts {
    pub prompt: Content,
    pub completions: Vec<String>,
}

/// Of every row of a file.
pub fn texts_of(dataset: &Path) -> Result<Vec<Texts>> {
    let of = |(row, of): (usize, Row)| split(of).map_err(|detail| Error::file(dataset, format!("row {row}: {detail}")));
    read_rows(dataset)?.1.into_iter().enumerate().map(of).collect()
}

fn texts(args: &ScoreArgs) -> Result<Vec<Texts>> {
    match (&args.dataset, &args.text) {
        (Some(dataset), _) => texts_of(dataset),
        (None, text) => {
            let completions = vec![text.clone().unwrap_or_default()];
            Ok(vec![Texts { prompt: Content::Text(String::new()), completions }])
        }
    }
}

fn split(row: Row) -> Result<Texts, String> {
    let (prompt, completions) = match row.parts {
        Parts::Pair { prompt, chosen, rejected } => (prompt, vec![chosen, rejected]),
        Parts::Completion { prompt, completion } => (prompt, vec![completion]),
        Parts::Prompt { .. } => return Err("has a prompt alone, and a completion is asked about".into()),
        Parts::Text { text: Content::Messages(mut messages) } => {
            let answer = messages.split_off(messages.len().saturating_sub(1));
            (Content::Messages(messages), vec![Content::Messages(answer)])
        }
        Parts::Text { text } => (Content::Text(String::new()), vec![text]),
    };
    Ok(Texts { prompt, completions: completions.into_iter().map(plain).collect::<Result<_, _>>()? })
}

/// The text of a completion: as it stands, or what its one message says.
fn plain(completion: Content) -> Result<String, String> {
    match completion {
        Content::Text(text) => Ok(text),
        Content::Messages(messages) => match &messages[..] {
            [message] => match message.get("content") {
                Some(Value::String(text)) => Ok(text.clone()),
                _ => Err("the completion's message has no text in \"content\"".into()),
            },
            several => Err(format!("the completion is {} messages, and rewards judge one", several.len())),
        },
    }
}

struct Scoring<'a> {
    rewards: &'a Rewards,
    tokenizer: Option<&'a Tokenizer>,
    texts: &'a [Texts],
    args: &'a ScoreArgs,
}

impl Job for Scoring<'_> {
    type Output = Vec<Value>;

    fn run<B: Backend>(self, device: &B) -> Result<Vec<Value>> {
        device::check_dtype(device, self.args.precision.dtype)?;
        let ids = |text: &String| match self.tokenizer {
            None => Ok(Vec::new()),
            Some(tokenizer) => {
                let end = tokenizer.eos().map(|(id, _)| id);
                tokenizer.encode_plain(text).map(|ids| ids.into_iter().chain(end).collect::<Vec<u32>>())
            }
        };
        let completions = || self.texts.iter().flat_map(|of| &of.completions);
        let ids: Vec<Vec<u32>> = completions().map(ids).collect::<Result<_>>()?;
        let finished = self.tokenizer.is_none_or(|tokenizer| tokenizer.eos().is_some());
        let (mut samples, mut ids) = (Vec::new(), ids.iter());
        for (row, Texts { prompt, completions }) in self.texts.iter().enumerate() {
            let answer = completions.first().map(String::as_str);
            for completion in completions {
                let completion_ids = ids.next().expect("each was encoded");
                samples.push(Sample { prompt, completion, answer, row, prompt_ids: &[], completion_ids, finished });
            }
        }
        let scores = Jury::new(device, self.rewards, crate::cli::packing(&self.args.batching)).score(&samples)?;
        Ok(self.lines(&scores))
    }
}

impl Scoring<'_> {
    fn lines(&self, scores: &[Vec<f64>]) -> Vec<Value> {
        let names = self.rewards.names();
        let sums: Vec<f64> = (0..scores[0].len()).map(|s| self.rewards.sum(scores.iter().map(|of| of[s]))).collect();
        if self.args.dataset.is_some() {
            let all = names.iter().zip(scores).map(|(name, scores)| (name.as_str(), scores));
            all.for_each(|(name, scores)| say(self.summary(name, scores)));
            if names.len() > 1 {
                say(self.summary("weighted sum", &sums));
            }
        }
        let mut at = 0;
        let line = |(row, of): (usize, &Texts)| {
            let mut line = Map::from_iter([("row".to_string(), json!(row))]);
            for side in if of.completions.len() == 2 { &["_chosen", "_rejected"][..] } else { &[""] } {
                let each: Map<String, Value> =
                    names.iter().cloned().zip(scores.iter().map(|of| json!(of[at]))).collect();
                line.insert(format!("reward{side}"), json!(sums[at]));
                line.insert(format!("rewards{side}"), each.into());
                at += 1;
            }
            Value::Object(line)
        };
        self.texts.iter().enumerate().map(line).collect()
    }

    /// `film: mean 0.4, standard deviation 0.7; chosen above rejected in 93.0 % of 400 pairs (ties half)`
    fn summary(&self, name: &str, scores: &[f64]) -> String {
        let said: Vec<f64> = scores.iter().copied().filter(|score| !score.is_nan()).collect();
        if said.is_empty() {
            return format!("{name}: says nothing of any completion");
        }
        let n = said.len() as f64;
        let mean = said.iter().sum::<f64>() / n;
        let deviation = (said.iter().map(|score| (score - mean).powi(2)).sum::<f64>() / n).sqrt();
        let silent = match scores.len() - said.len() {
            0 => String::new(),
            silent => format!("; says nothing of {silent} of {}", scores.len()),
        };
        let pairs = self.texts.iter().all(|of| of.completions.len() == 2);
        let judged = scores.chunks_exact(2).filter_map(|pair| Judgement::of(pair[0], pair[1])).filter(|_| pairs);
        let tally: Tally = judged.collect();
        let order = match tally.all() {
            0 => String::new(),
            all => {
                format!("; chosen above rejected in {:.1} % of {all} pairs (ties half)", 100.0 * tally.win_rate())
            }
        };
        format!("{name}: mean {mean:.4}, standard deviation {deviation:.4}{silent}{order}")
    }
}
