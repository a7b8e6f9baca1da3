//! Reward models, one or several that judge together:
//!
//! ```text
//! reward = mean of M scores - pessimism * their standard deviation (divided by M)
//! ```
//!
//! Each reads the text as its own tokenizer writes it: prompt and completion as one text with EOS behind it, or what its chat
//! template makes of messages, as `cuvee score` does. A completion that was cut off gets no EOS. The penalty is the
//! uncertainty-weighted optimization of Coste et al., "Reward Model Ensembles Help Mitigate Overoptimization" (arXiv:2310.02743,
//! eq. 4), with the standard deviation in the place of the variance.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Map;

use super::jury::Judge;
use super::registry::{Kind, Place, finite, options};
use super::spec::Memory;
use super::{Entry, Sample, Verdict};
use crate::data::{Content, Example, Extent, Message, Packing, Sequence, Tokenizer};
use crate::device::{Arena, DType, Device, Dry, Ledger, Storage};
use crate::error::{At, Error, Result};
use crate::model::{Acts, Batch, Checkpoint, Init, Keep, Model, Options as ModelOptions};
use crate::ops::Backend;

pub const ENTRY: Entry = Entry {
    name: "model",
    summary: "the score of a reward model; of several, their mean less a multiple of their standard deviation",
    keys: &[
        ("dirs", "folders of ..ForSequenceClassification with one label, each with its own tokenizer"),
        ("pessimism", "standard deviations below the mean; needs two models [0]"),
    ],
    open: |table, Place { folder, .. }| {
        let Options { dirs, pessimism } = options(table)?;
        let dirs: Vec<PathBuf> = dirs.iter().map(|dir| folder.join(dir)).collect();
        Ok(Kind::Models(Panel::open(&dirs, finite("pessimism", pessimism)?).map_err(|e| e.to_string())?))
    },
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Options {
    dirs: Vec<PathBuf>,
    #[serde(default)]
    pessimism: f64,
}

/// Reward models whose configurations were understood.
pub struct Panel {
    members: Vec<Member>,
    pessimism: f64,
    /// What is read off them: scores, or how likely they find a completion.
    likelihood: bool,
}

struct Member {
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
}

impl Panel {
    pub fn open(dirs: &[PathBuf], pessimism: f64) -> Result<Self> {
        let open =
            |dir: &PathBuf| Ok(Member { checkpoint: Checkpoint::open_reward(dir)?, tokenizer: Tokenizer::load(dir)? });
        let members: Vec<Member> = dirs.iter().map(open).collect::<Result<_>>()?;
        match members.len() {
            0 => Err(Error::option("dirs", "expected the folder of one reward model at least")),
            1 if pessimism != 0.0 => {
                Err(Error::option("pessimism", "one model has no standard deviation; give more, or drop it"))
            }
            _ if pessimism < 0.0 => Err(Error::option(
                "pessimism",
                format!("expected 0 or more, found {pessimism}; below 0 doubt is rewarded"),
            )),
            _ => Ok(Self { members, pessimism, likelihood: false }),
        }
    }

    /// A language model, for [`super::fluency`].
    pub fn fluency(dir: &Path) -> Result<Self> {
        let member = Member { checkpoint: Checkpoint::open(dir)?, tokenizer: Tokenizer::load(dir)? };
        Ok(Self { members: vec![member], pessimism: 0.0, likelihood: true })
    }

    /// Hashes weights and tokenizers.
    pub fn identify(&self, hasher: &mut blake3::Hasher) -> Result<()> {
        for Member { checkpoint, .. } in &self.members {
            let path = checkpoint.dir.join("tokenizer.json");
            hasher.update(&Init::Checkpoint.identity(checkpoint)?).update(&fs::read(&path).at(&path)?);
        }
        Ok(())
    }

    pub fn plan(&self, storage: Storage, largest: &Extent) -> Memory {
        let model = |member: &Member| member.weights(storage, largest.longest).total();
        let work = |member: &Member| member.work(storage, member.rank(), largest).total();
        Memory {
            resident: self.members.iter().map(model).sum(),
            judging: self.members.iter().map(work).max().unwrap_or(0),
        }
    }
}

impl Member {
    fn build<D: Device>(&self, arena: &mut Arena<D>, positions: usize) -> Model<D> {
        let Checkpoint { spec, architecture, .. } = &self.checkpoint;
        let options = ModelOptions::frozen(positions).holding(&self.checkpoint, Init::Checkpoint);
        Model::new(arena, spec, architecture.naming, options.with_adapters(&self.checkpoint))
    }

    fn weights(&self, storage: Storage, positions: usize) -> Ledger {
        Dry::measure(storage, |arena| self.build(arena, positions))
    }

    fn rank(&self) -> usize {
        self.build(&mut Dry::arena(DType::F32), 0).widest_rank()
    }

    fn workspace<D: Device>(&self, arena: &mut Arena<D>, rank: usize, largest: &Extent) -> (Acts<D>, Batch<D>) {
        let acts = Acts::new(arena, &self.checkpoint.spec, largest, Keep::Nothing).with_low_rank(arena, rank);
        (acts, Batch::new(arena, largest))
    }

    fn work(&self, storage: Storage, rank: usize, largest: &Extent) -> Ledger {
        Dry::measure(storage, |arena| self.workspace(arena, rank, largest))
    }

    /// The sample's text in this model's tokens.
    fn ids(&self, sample: &Sample) -> Result<Vec<u32>> {
        let Self { checkpoint, tokenizer } = self;
        let ids = match sample.prompt {
            Content::Text(prompt) => {
                let eos = tokenizer.eos().map_or("", |(_, text)| text);
                let end = if sample.finished && !sample.completion.ends_with(eos) { eos } else { "" };
                tokenizer.encode(&[prompt, sample.completion, end].concat())?
            }
            Content::Messages(prompt) => {
                let messages = [&prompt[..], &[answer(sample.completion)]].concat();
                let text = tokenizer.chat_template()?.render(&messages, &Map::new(), false)?;
                let mut ids = tokenizer.encode_plain(&text)?;
                if !sample.finished {
                    ids.truncate(tokenizer.without_end(&ids));
                }
                ids
            }
        };
        let refuse = |detail: String| Err(Error::file(&checkpoint.dir, detail));
        let (largest, vocab) = (ids.iter().max().copied().unwrap_or(0), checkpoint.spec.vocab);
        if largest as usize >= vocab {
            return refuse(format!(
                "token {largest} of a completion of row {} lies past its vocabulary of {vocab}; do tokenizer.json and \
                 config.json belong together?",
                sample.row
            ));
        }
        match checkpoint.spec.most_positions() {
            Some(most) if ids.len() > most => refuse(format!(
                "a completion of row {} has {} tokens with its prompt, and the model has learned positions for {most}; sample \
                 less, with --max-new-tokens",
                sample.row,
                ids.len()
            )),
            _ => Ok(ids),
        }
    }
}

impl Member {
    /// How the text starts that [`Self::ids`] are of.
    fn prompt_ids(&self, sample: &Sample) -> Result<Vec<u32>> {
        match sample.prompt {
            Content::Text(prompt) => self.tokenizer.encode(prompt),
            Content::Messages(prompt) => {
                let text = self.tokenizer.chat_template()?.render(prompt, &Map::new(), true)?;
                self.tokenizer.encode_plain(&text)
            }
        }
    }
}

fn answer(text: &str) -> Message {
    Message::from_iter([("role".to_string(), "assistant".into()), ("content".to_string(), text.into())])
}

/// A panel on a device.
pub struct Bench<'a, B: Backend> {
    device: &'a B,
    panel: &'a Panel,
    packing: Packing,
    /// Of each model, once it is asked.
    loaded: Vec<Option<Loaded<B>>>,
}

struct Loaded<B: Backend> {
    model: Model<B>,
    /// The longest sequence that its rotations reach.
    positions: usize,
}

impl<'a, B: Backend> Bench<'a, B> {
    pub fn new(device: &'a B, panel: &'a Panel, packing: Packing) -> Self {
        Self { device, panel, packing, loaded: panel.members.iter().map(|_| None).collect() }
    }

    /// `[samples]` mean log-probability of the completion's tokens, nats; NaN where it has none.
    fn likelihoods(&mut self, samples: &[&Sample]) -> Result<Vec<f64>> {
        let of = &self.panel.members[0];
        let mut examples = Vec::new();
        for sample in samples {
            let (ids, prompt) = (of.ids(sample)?, of.prompt_ids(sample)?);
            // A token may reach over the end of the prompt; the first of all has nothing before it.
            let first = ids.iter().zip(&prompt).take_while(|(a, b)| a == b).count().max(1);
            examples.push((ids.len() > first).then(|| Example {
                row: sample.row,
                sequences: vec![Sequence::new(ids, first)],
                ..Example::default()
            }));
        }
        let read: Vec<&Example> = examples.iter().flatten().collect();
        let mut said = vec![f64::NAN; samples.len()];
        if read.is_empty() {
            return Ok(said);
        }
        let mut places = (0..samples.len()).filter(|s| examples[*s].is_some());
        let (device, packing) = (self.device, self.packing);
        let largest = packing.largest(&packing.extents(read.iter().copied()));
        let model = loaded(device, of, &mut self.loaded[0], largest.longest)?;
        let rank = model.widest_rank();
        let mut arena = Arena::new(device, &of.work(device.keeps(), rank, &largest))?;
        let (mut acts, mut batch) = of.workspace(&mut arena, rank, &largest);
        for (_, host) in packing.batches(&read) {
            batch.load(device, &host)?;
            model.forward(device, &batch, &mut acts)?;
            let mut logps = vec![0.0; host.targets.len()];
            device.read_f32(acts.top.logp.top(logps.len()), &mut logps)?;
            for tokens in &host.sequences {
                let at = places.next().expect("one for each sequence");
                let mean = logps[tokens.clone()].iter().map(|x| f64::from(*x)).sum::<f64>() / tokens.len() as f64;
                if !mean.is_finite() {
                    let detail = format!(
                        "finds a completion of row {} not finitely likely; are the weights sound?",
                        samples[at].row
                    );
                    return Err(Error::file(&of.checkpoint.dir, detail));
                }
                said[at] = mean;
            }
        }
        Ok(said)
    }

    /// `[samples]` what one model says; NaN of a text of fewer than two tokens, which `cuvee score` skips too.
    fn scores(&mut self, member: usize, samples: &[&Sample]) -> Result<Vec<f64>> {
        let of = &self.panel.members[member];
        let ids: Vec<Vec<u32>> = samples.iter().map(|sample| of.ids(sample)).collect::<Result<_>>()?;
        let examples = examples(samples, &ids, self.packing.budget);
        let read: Vec<&Example> = examples.iter().collect();
        let packing = Packing { read: of.checkpoint.reads(&of.tokenizer), ..self.packing };
        let largest = packing.largest(&packing.extents(read.iter().copied()));
        let mut scores = vec![f64::NAN; samples.len()];
        let mut places = (0..).zip(&ids).filter(|(_, ids)| ids.len() > 1).map(|(at, _): (usize, _)| at);
        if read.is_empty() {
            return Ok(scores);
        }
        let device = self.device;
        let model = loaded(device, of, &mut self.loaded[member], largest.longest)?;
        let rank = model.widest_rank();
        let mut arena = Arena::new(device, &of.work(device.keeps(), rank, &largest))?;
        let (mut acts, mut batch) = of.workspace(&mut arena, rank, &largest);
        for (_, host) in packing.batches(&read) {
            batch.load(device, &host)?;
            model.scores(device, &batch, &mut acts)?;
            let mut values = vec![0.0; host.targets.len()];
            device.read_f32(acts.top.logp.top(values.len()), &mut values)?;
            for value in values {
                let at = places.next().expect("a score for each sequence");
                if !value.is_finite() {
                    let row = samples[at].row;
                    let detail =
                        format!("gives a completion of row {row} a score that is not finite; are the weights sound?");
                    return Err(Error::file(&of.checkpoint.dir, detail));
                }
                scores[at] = f64::from(value);
            }
        }
        Ok(scores)
    }
}

/// The model, loaded if it is not there or its rotations end too soon.
fn loaded<'m, B: Backend>(
    device: &B,
    member: &Member,
    slot: &'m mut Option<Loaded<B>>,
    longest: usize,
) -> Result<&'m Model<B>> {
    if slot.as_ref().is_none_or(|loaded| loaded.positions < longest) {
        // One is dropped before the next takes memory; doubling keeps this rare.
        *slot = None;
        let most = member.checkpoint.spec.most_positions().unwrap_or(usize::MAX);
        let positions = longest.next_power_of_two().min(most);
        let mut arena = Arena::new(device, &member.weights(device.keeps(), positions))?;
        let mut model = member.build(&mut arena, positions);
        Init::Checkpoint.fill(device, &member.checkpoint, &mut model)?;
        *slot = Some(Loaded { model, positions });
    }
    Ok(&slot.as_ref().expect("it was loaded").model)
}

/// The sequences in order, those with one prompt together as far as a batch of `budget` rows holds them; none of a text with
/// fewer than two tokens.
fn examples(samples: &[&Sample], ids: &[Vec<u32>], budget: usize) -> Vec<Example> {
    let mut examples: Vec<(&Content, Example)> = Vec::new();
    for (sample, ids) in samples.iter().zip(ids).filter(|(_, ids)| ids.len() > 1) {
        let fits =
            |example: &Example| example.sequences.iter().map(|s| s.ids.len()).sum::<usize>() + ids.len() <= budget;
        let sequence = Sequence::new(ids.clone(), 1);
        match examples.last_mut() {
            Some((prompt, example)) if *prompt == sample.prompt && fits(example) => example.sequences.push(sequence),
            _ => examples
                .push((sample.prompt, Example { row: sample.row, sequences: vec![sequence], ..Example::default() })),
        }
    }
    let mut examples: Vec<Example> = examples.into_iter().map(|(_, example)| example).collect();
    for example in &mut examples {
        let common = common_prefix(&example.sequences);
        example.sequences.iter_mut().for_each(|sequence| sequence.first = common);
    }
    examples
}

/// Tokens that all sequences start with, and at least one less than each has.
fn common_prefix(sequences: &[Sequence]) -> usize {
    let first = &sequences[0].ids;
    let with = |other: &Sequence| {
        let same = first.iter().zip(&other.ids).take_while(|(a, b)| a == b).count();
        same.min(other.ids.len() - 1)
    };
    // The first token stands before every completion: where not even it is shared, nothing is.
    sequences.iter().map(with).min().unwrap_or(1).max(1)
}

impl<B: Backend> Judge for Bench<'_, B> {
    fn judge(&mut self, samples: &[&Sample]) -> Result<Vec<Verdict>> {
        if self.panel.likelihood {
            return Ok(self.likelihoods(samples)?.into_iter().map(Verdict::of).collect());
        }
        let count = self.panel.members.len();
        let scores: Vec<Vec<f64>> = (0..count).map(|m| self.scores(m, samples)).collect::<Result<_>>()?;
        let of = |s: usize| scores.iter().map(|of_model| of_model[s]).collect::<Vec<_>>();
        Ok((0..samples.len()).map(|s| verdict(&of(s), self.panel.pessimism)).collect())
    }
}

fn verdict(scores: &[f64], pessimism: f64) -> Verdict {
    let m = scores.len() as f64;
    let mean = scores.iter().sum::<f64>() / m;
    if scores.len() == 1 {
        return Verdict::of(mean);
    }
    let spread = (scores.iter().map(|score| (score - mean).powi(2)).sum::<f64>() / m).sqrt();
    Verdict { reward: mean - pessimism * spread, spread }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubt_costs() {
        let Verdict { reward, spread } = verdict(&[1.0, 4.0, 7.0], 0.5);
        assert_eq!((reward, spread), (4.0 - 0.5 * 6f64.sqrt(), 6f64.sqrt()));
        assert_eq!(verdict(&[3.0, 3.0], 2.0), Verdict { reward: 3.0, spread: 0.0 });
        let one = verdict(&[2.5], 0.0);
        assert!(one.reward == 2.5 && one.spread.is_nan());
        assert!(verdict(&[1.0, f64::NAN], 1.0).reward.is_nan());
    }

    #[test]
    fn samples_of_one_prompt_share_it() {
        let [p, q] = ["p", "q"].map(|text| Content::Text(text.into()));
        let sample = |prompt, row| Sample {
            prompt,
            completion: "",
            answer: None,
            row,
            prompt_ids: &[],
            completion_ids: &[],
            finished: true,
        };
        let samples = [sample(&p, 0), sample(&p, 0), sample(&q, 1), sample(&p, 2), sample(&p, 2)];
        let ids = [vec![1, 2, 3], vec![1, 2], vec![1], vec![5, 6], vec![7, 8]];
        let made = |budget| {
            let examples = examples(&samples.each_ref(), &ids, budget);
            examples.iter().map(|e| (e.row, e.sequences.len(), e.sequences[0].first)).collect::<Vec<_>>()
        };
        // Of the third nothing is left to read.
        assert_eq!(made(100), [(0, 4, 1)]);
        assert_eq!(made(3), [(0, 1, 2), (0, 1, 1), (2, 1, 1), (2, 1, 1)]);
    }
}
