//! Models on disk take tasks: each is in memory for as long as it is asked.

use std::path::Path;

use super::complete::{complete, text_of};
use super::encode::Encoder;
use super::{Judged, Outcome, Prompt, Said, Task, Tokens, preference, reward};
use crate::data::{Content, Example, Packing, Parts, Row, Tokenizer, encode_row};
use crate::device::{Arena, Dry};
use crate::error::{Error, Result};
use crate::model::{Checkpoint, Init, Model, Options};
use crate::ops::Backend;
use crate::progress::say;
use crate::references::Scorer;
use crate::rollout::{Request, Rollout};

/// A model with its tokenizer.
pub struct Subject {
    pub checkpoint: Checkpoint,
    pub tokenizer: Tokenizer,
}

impl Subject {
    pub fn new(dir: &Path, checkpoint: Checkpoint) -> Result<Self> {
        Ok(Self { checkpoint, tokenizer: Tokenizer::load(dir)? })
    }
}

/// Who asks, and whom else.
pub struct Examiner<'a, B: Backend> {
    pub device: &'a B,
    pub packing: Packing,
    pub max_length: Option<usize>,
    /// Preferences are relative to it.
    pub reference: Option<&'a Subject>,
    pub reward_model: Option<&'a Subject>,
    /// What is asked how likely completions are.
    pub base_model: Option<&'a Subject>,
}

/// Is told what is done, of how much.
pub type Done<'a> = &'a mut dyn FnMut(&str, usize, usize);

impl<B: Backend> Examiner<'_, B> {
    /// Gives `task` to a model.
    ///
    /// # Errors
    /// A row that cannot be asked; a model whose numbers are not finite.
    pub fn examine(&self, task: &Task, subject: &Subject, done: Done) -> Result<Outcome> {
        let tokens = self.tokens(task, subject)?;
        let mut said = Said { logps: self.logps(subject, &tokens.examples, "scoring", done)?, ..Said::default() };
        said.completions = self.completions(subject, &tokens, done)?;
        if let (preference::NAME, Some(reference)) = (task.kind(), self.reference) {
            let own = self.tokens(task, reference)?;
            let rows = |tokens: &Tokens| tokens.examples.iter().map(|example| example.row).collect::<Vec<_>>();
            if rows(&own) != rows(&tokens) {
                let detail =
                    "its tokenizer leaves out other rows of the task than the model's; give a larger --max-length";
                return Err(Error::option("--ref-model", detail));
            }
            said.ref_logps = Some(self.logps(reference, &own.examples, "asking the reference", done)?);
        }
        if let (reward::NAME, Some(_)) = (task.kind(), self.reward_model) {
            said.judged = self.judged(subject, &tokens, &said.completions, done)?;
            said.answers = self.answers(&tokens, done)?;
        }
        task.outcome(&subject.tokenizer, &tokens, &said)
    }

    fn tokens(&self, task: &Task, subject: &Subject) -> Result<Tokens> {
        let tokens = task.tokens(&Encoder::new(&subject.tokenizer, &subject.checkpoint, self.max_length)?)?;
        tokens.report.iter().for_each(say);
        tokens.check(&subject.checkpoint)?;
        Ok(tokens)
    }

    /// `[examples][sequences][scored tokens]`, or one score a sequence of a reward model.
    fn logps(&self, subject: &Subject, examples: &[Example], what: &str, done: Done) -> Result<Vec<Vec<Vec<f32>>>> {
        if examples.is_empty() {
            return Ok(Vec::new());
        }
        let Subject { checkpoint, tokenizer } = subject;
        let packing = Packing { read: checkpoint.reads(tokenizer), ..self.packing };
        let largest = packing.largest(&packing.extents(examples));
        let mut scorer = Scorer::new(self.device, checkpoint, Init::Checkpoint, &largest)?;
        let examples: Vec<&Example> = examples.iter().collect();
        scorer.score(&examples, packing, &mut |finished| done(what, finished, examples.len()))
    }

    fn completions(&self, subject: &Subject, tokens: &Tokens, done: Done) -> Result<Vec<Vec<Rollout>>> {
        let longest = tokens.requests().iter().map(Request::longest).max();
        let (Some(writing), Some(longest)) = (tokens.writing, longest) else { return Ok(Vec::new()) };
        let Subject { checkpoint, tokenizer } = subject;
        let options = Options::frozen(longest).holding(checkpoint, Init::Checkpoint).with_adapters(checkpoint);
        let (spec, naming) = (&checkpoint.spec, checkpoint.architecture.naming);
        let mut arena = Arena::new(self.device, &Model::<Dry>::plan(self.device.keeps(), spec, naming, options))?;
        let mut model = Model::new(&mut arena, spec, naming, options);
        Init::Checkpoint.fill(self.device, checkpoint, &mut model)?;
        let prompts = &tokens.prompts;
        let mut done = |finished| done("writing", finished, prompts.len());
        complete(self.device, &model, tokenizer, prompts, writing, &mut done)
    }

    /// What the reward model and the base model say of completions.
    fn judged(
        &self,
        subject: &Subject,
        tokens: &Tokens,
        completions: &[Vec<Rollout>],
        done: Done,
    ) -> Result<Vec<Vec<Judged>>> {
        let Some(reward_model) = self.reward_model else { return Ok(Vec::new()) };
        let (mut texts, mut prompts): (Vec<String>, Vec<&Prompt>) = Default::default();
        for (prompt, samples) in tokens.prompts.iter().zip(completions) {
            for completion in samples {
                texts.push(text_of(&subject.tokenizer, &prompt.ids, &completion.ids)?);
                prompts.push(prompt);
            }
        }
        let pairs = || prompts.iter().map(|p| p.text.as_str()).zip(texts.iter().map(String::as_str)).enumerate();
        let whole = |(row, (prompt, text)): (usize, (&str, &str))| whole(&reward_model.tokenizer, row, prompt, text);
        let examples: Vec<Example> = pairs().map(whole).collect::<Result<_>>()?;
        check(&reward_model.checkpoint, &examples)?;
        let rewards = self.logps(reward_model, &examples, "scoring completions", done)?;
        let base = match self.base_model {
            Some(base) => self.base_logps(base, pairs(), done)?,
            None => vec![None; texts.len()],
        };
        let judged = texts.into_iter().zip(rewards).zip(base);
        let mut judged = judged.map(|((text, reward), base)| Judged { text, reward: f64::from(reward[0][0]), base });
        Ok(completions.iter().map(|samples| judged.by_ref().take(samples.len()).collect()).collect())
    }

    /// What the reward model says of the data's own completions, if every prompt has one.
    fn answers(&self, tokens: &Tokens, done: Done) -> Result<Vec<f64>> {
        let answered = |prompt: &Prompt| prompt.answer.clone().map(|answer| (prompt.text.clone(), answer));
        let answered: Option<Vec<(String, String)>> = tokens.prompts.iter().map(answered).collect();
        let (Some(reward_model), Some(answered)) = (self.reward_model, answered) else { return Ok(Vec::new()) };
        let all = answered.iter().enumerate();
        let whole =
            |(row, (prompt, text)): (usize, &(String, String))| whole(&reward_model.tokenizer, row, prompt, text);
        let examples: Vec<Example> = all.map(whole).collect::<Result<_>>()?;
        check(&reward_model.checkpoint, &examples)?;
        let scores = self.logps(reward_model, &examples, "scoring answers", done)?;
        Ok(scores.iter().map(|score| f64::from(score[0][0])).collect())
    }

    /// Nats and tokens of each completion that is not empty.
    fn base_logps<'t>(
        &self,
        base: &Subject,
        pairs: impl Iterator<Item = (usize, (&'t str, &'t str))>,
        done: Done,
    ) -> Result<Vec<Option<(f64, usize)>>> {
        let encoder = Encoder::new(&base.tokenizer, &base.checkpoint, None)?;
        let (mut said, mut examples) = (Vec::new(), Vec::new());
        for (row, (prompt, text)) in pairs {
            said.push(Some((0.0, 0)));
            // An empty completion has no token to ask about.
            if let Ok(sequence) = encoder.pair(prompt, text)? {
                examples.push(Example { row, sequences: vec![sequence], ..Example::default() });
            }
        }
        check(&base.checkpoint, &examples)?;
        let logps = self.logps(base, &examples, "asking the base model", done)?;
        for (example, logps) in examples.iter().zip(logps) {
            said[example.row] = Some((logps[0].iter().map(|x| f64::from(*x)).sum(), logps[0].len()));
        }
        Ok(said)
    }
}

/// What a reward model reads: prompt and completion as one text with EOS behind it, an empty completion too.
fn whole(tokenizer: &Tokenizer, row: usize, prompt: &str, completion: &str) -> Result<Example> {
    let text = |text: &str| Content::Text(text.to_string());
    let parts = match completion {
        "" => Parts::Text { text: text(prompt) },
        _ => Parts::Completion { prompt: text(prompt), completion: text(completion) },
    };
    let sequence = encode_row(tokenizer, &Row { parts, label: None, margin: None, variables: Default::default() })?;
    Ok(Example { row, sequences: vec![sequence], ..Example::default() })
}

impl Tokens {
    /// Tokens must have a row in the embedding, and positions a place.
    pub fn check(&self, checkpoint: &Checkpoint) -> Result<()> {
        check(checkpoint, &self.examples)
    }
}

fn check(checkpoint: &Checkpoint, examples: &[Example]) -> Result<()> {
    for example in examples {
        let ids = || example.sequences.iter().flat_map(|sequence| &sequence.ids);
        if let Some(id) = ids().find(|id| **id as usize >= checkpoint.spec.vocab) {
            let (row, vocab) = (example.row, checkpoint.spec.vocab);
            let detail = format!(
                "token {id} of row {row} lies past its vocabulary of {vocab}; do tokenizer.json and config.json belong together?"
            );
            return Err(Error::file(&checkpoint.dir, detail));
        }
        let longest = example.sequences.iter().map(|sequence| sequence.ids.len()).max().unwrap_or(0);
        if let Some(most) = checkpoint.spec.most_positions().filter(|most| longest > *most) {
            let dir = checkpoint.dir.display();
            let detail = format!("row {} has {longest} tokens, {dir} has learned positions for {most}", example.row);
            return Err(Error::option("--max-length", detail));
        }
    }
    Ok(())
}
