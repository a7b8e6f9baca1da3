//! Reward: what a reward model thinks of a model's own completions, at temperature 1 over the whole vocabulary.
//!
//! ```text
//! reward     mean over prompts of the mean over samples, and its standard error over prompts
//! win_rate   how often a sample has more reward than the baseline's sample of the same prompt and number; a tie counts half
//! answer_beaten  how often a sample has more reward than the data's own `completion` of its prompt, where every row has one
//!            (reference answer score, arXiv:2508.07750; a tie is none)
//! words      of a completion, split at white space
//! distinct_2 different pairs of neighbouring words by all of them, over all completions (Li et al., arXiv:1510.03055)
//! base_logp  nats a token that a base model gives to the completions, its own tokens, without an end
//! ```
//!
//! The reward model reads prompt and completion as `cuvee score` does, with EOS behind them, also where a completion
//! was cut at `max_new_tokens`. Samples are those of one seed, so that models differ and luck does not.

use std::collections::HashSet;
use std::path::PathBuf;

use serde_json::json;

use super::complete::{Prompt, Writing};
use super::encode::Encoder;
use super::file::{self, PROMPT, Rows, Source};

use super::stats::{mean, ratio, wins};
use super::{Kind, Measure, Outcome, Said, Tokens};
use crate::data::{Object, Tokenizer};
use crate::error::{Error, Place, Result};
use crate::rollout::Sampling;

pub(super) const NAME: &str = "reward";
const SAMPLES: usize = 4;
const MAX_NEW_TOKENS: usize = 48;

/// What others say of one completion.
#[derive(Clone, PartialEq, Debug)]
pub struct Judged {
    pub text: String,
    pub reward: f64,
    /// Nats and tokens, by a base model. No tokens of an empty completion.
    pub base: Option<(f64, usize)>,
}

struct Reward {
    path: PathBuf,
    /// With the data's own completions.
    prompts: Vec<(Place, (String, Option<String>))>,
    writing: Writing,
}

pub(super) fn open(mut rows: Rows) -> Result<Box<dyn Kind>> {
    let source = Source::new(&rows.file, rows.options.prompt.take(), PROMPT)?;
    let answer = |row: &Object| row.get("completion").and_then(|text| text.as_str()).map(String::from);
    let prompts = rows.items(|row| Ok((source.of(row)?, answer(row))))?;
    let writing = Writing {
        max_new_tokens: rows.options.max_new_tokens.unwrap_or(MAX_NEW_TOKENS),
        samples: rows.options.samples.unwrap_or(SAMPLES),
        sampling: Sampling::plain(rows.options.seed),
    };
    Ok(Box::new(Reward { path: rows.path, prompts, writing }))
}

impl Kind for Reward {
    fn name(&self) -> &'static str {
        NAME
    }

    fn metrics(&self) -> &'static [&'static str] {
        &["reward", "win_rate", "answer_beaten", "words", "distinct_2", "base_logp"]
    }

    fn tokens(&self, encoder: &Encoder) -> Result<Tokens> {
        let prompt = |(place, (text, answer)): &(Place, (String, Option<String>))| {
            let ids = encoder.prompt(text, self.writing.max_new_tokens)?.map_err(file::at(&self.path, *place))?;
            Ok(Prompt { text: text.clone(), ids, until: Vec::new(), answer: answer.clone() })
        };
        let prompts = self.prompts.iter().map(prompt).collect::<Result<_>>()?;
        Ok(Tokens { prompts, writing: Some(self.writing), ..Tokens::default() })
    }

    fn outcome(&self, _: &Tokenizer, tokens: &Tokens, said: &Said) -> Result<Outcome> {
        if said.judged.is_empty() {
            return Err(Error::option("--reward-model", format!("missing; {} wants one", self.path.display())));
        }
        let over_prompts = |name, of: &dyn Fn(&Judged) -> f64| {
            let mean_of = |samples: &Vec<Judged>| samples.iter().map(of).sum::<f64>() / samples.len() as f64;
            mean(name, &said.judged.iter().map(mean_of).collect::<Vec<_>>())
        };
        let mut measures = vec![
            over_prompts("reward", &|judged| judged.reward),
            over_prompts("words", &|judged| judged.text.split_whitespace().count() as f64),
            distinct_2(said.judged.iter().flatten().map(|judged| judged.text.as_str())),
        ];
        let beaten = |(samples, answer): (&Vec<Judged>, &f64)| {
            samples.iter().filter(|judged| judged.reward > *answer).count() as f64 / samples.len() as f64
        };
        if said.answers.len() == said.judged.len() {
            let shares: Vec<f64> = said.judged.iter().zip(&said.answers).map(beaten).collect();
            measures.insert(1, mean("answer_beaten", &shares));
        }
        let base = |of: fn((f64, usize)) -> f64| -> Option<Vec<f64>> {
            said.judged.iter().map(|samples| samples.iter().map(|judged| judged.base.map(of)).sum()).collect()
        };
        if let (Some(nats), Some(tokens)) = (base(|(nats, _)| nats), base(|(_, tokens)| tokens as f64)) {
            measures.push(ratio("base_logp", &nats, &tokens));
        }
        let line = |(prompt, samples): (&Prompt, &Vec<Judged>)| {
            let texts: Vec<&str> = samples.iter().map(|judged| judged.text.as_str()).collect();
            let rewards: Vec<f64> = samples.iter().map(|judged| judged.reward).collect();
            let line = json!({"prompt": prompt.text, "completions": texts, "rewards": rewards});
            line.as_object().expect("it is one").clone()
        };
        let log = tokens.prompts.iter().zip(&said.judged).map(line).collect();
        let rewards = said.judged.iter().map(|samples| samples.iter().map(|judged| judged.reward).collect()).collect();
        Ok(Outcome { rewards, ..Outcome::new(NAME, measures, log) })
    }
}

/// Without two words in a row, 0.
fn distinct_2<'a>(texts: impl Iterator<Item = &'a str>) -> Measure {
    let (mut pairs, mut different) = (0usize, HashSet::new());
    for text in texts {
        let words: Vec<&str> = text.split_whitespace().collect();
        pairs += words.len().saturating_sub(1);
        different.extend(words.windows(2).map(|pair| (pair[0], pair[1])));
    }
    Measure { name: "distinct_2", value: different.len() as f64 / pairs.max(1) as f64, stderr: None }
}

impl Outcome {
    /// Compares the rewards of samples with those of a baseline in the same task, behind the reward itself.
    pub(super) fn add_win_rate(&mut self, baseline: &[Vec<f64>]) {
        if self.rewards.is_empty() {
            return;
        }
        let of_prompt = |(ours, theirs): (&Vec<f64>, &Vec<f64>)| {
            ours.iter().zip(theirs).map(|(a, b)| wins(*a, *b)).sum::<f64>() / ours.len() as f64
        };
        let won: Vec<f64> = self.rewards.iter().zip(baseline).map(of_prompt).collect();
        self.measures.insert(1, mean("win_rate", &won));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_of_words_count_once() {
        let value = |texts: &[&str]| distinct_2(texts.iter().copied()).value;
        assert_eq!(value(&["a b a b"]), 2.0 / 3.0);
        assert_eq!(value(&["a b", "a  b", "c"]), 0.5);
        assert_eq!((value(&[]), value(&["a", ""])), (0.0, 0.0));
    }

    #[test]
    fn a_win_is_more_reward_than_the_same_sample_of_the_baseline() {
        let outcome = |rewards: Vec<Vec<f64>>| Outcome {
            rewards,
            ..Outcome::new(NAME, vec![Measure { name: "reward", value: 0.0, stderr: None }], Vec::new())
        };
        let baseline = vec![vec![1.0, 2.0], vec![3.0, 4.0]];
        let mut same = outcome(baseline.clone());
        same.add_win_rate(&baseline);
        assert_eq!(same.measures[1], Measure { name: "win_rate", value: 0.5, stderr: Some(0.0) });
        let mut better = outcome(vec![vec![2.0, 1.0], vec![4.0, 5.0]]);
        better.add_win_rate(&baseline);
        assert_eq!(better.get("win_rate").unwrap().value, 0.75);
    }
}
