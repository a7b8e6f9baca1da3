//! What a costly reward said of a completion, for as long as a run lasts: equal completions are asked about once.

use std::collections::{HashMap, HashSet};

use super::jury::Judge;
use super::{Sample, Verdict};
use crate::data::Content;
use crate::error::Result;

/// Verdicts that one generation keeps; two are kept, so that what is asked for again and again stays.
const GENERATION: usize = 1 << 16;

type Key = [u8; 32];

pub struct Cached<J> {
    judge: J,
    recent: HashMap<Key, Verdict>,
    older: HashMap<Key, Verdict>,
}

impl<J: Judge> Cached<J> {
    pub fn new(judge: J) -> Self {
        Self { judge, recent: HashMap::new(), older: HashMap::new() }
    }

    fn find(&self, key: &Key) -> Option<Verdict> {
        self.recent.get(key).or(self.older.get(key)).copied()
    }

    fn keep(&mut self, key: Key, verdict: Verdict) {
        if self.recent.len() >= GENERATION {
            self.older = std::mem::take(&mut self.recent);
        }
        self.recent.insert(key, verdict);
    }
}

impl<J: Judge> Judge for Cached<J> {
    fn judge(&mut self, samples: &[&Sample]) -> Result<Vec<Verdict>> {
        let keys: Vec<Key> = samples.iter().map(|sample| key(sample)).collect();
        let mut known: HashMap<Key, Verdict> = keys.iter().filter_map(|key| Some((*key, self.find(key)?))).collect();
        let mut seen = HashSet::new();
        let new = keys.iter().zip(samples).filter(|(key, _)| !known.contains_key(*key) && seen.insert(**key));
        let (new, asked): (Vec<Key>, Vec<&Sample>) = new.map(|(key, sample)| (*key, *sample)).unzip();
        if !asked.is_empty() {
            known.extend(new.into_iter().zip(self.judge.judge(&asked)?));
        }
        known.iter().for_each(|(key, verdict)| self.keep(*key, *verdict));
        Ok(keys.iter().map(|key| known[key]).collect())
    }
}

/// Of all that a program or a model is told of a sample.
fn key(sample: &Sample) -> Key {
    let mut hasher = blake3::Hasher::new();
    let mut add = |kind: u8, text: &str| {
        // The length first, so that no two samples give the same bytes.
        hasher.update(&[kind]).update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
    };
    match sample.prompt {
        Content::Text(text) => add(0, text),
        Content::Messages(messages) => add(1, &serde_json::to_string(messages).expect("messages are JSON")),
    }
    add(u8::from(sample.finished), sample.completion);
    sample.answer.iter().for_each(|answer| add(2, answer));
    *hasher.finalize().as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts what it is asked.
    struct Counter(usize);

    impl Judge for Counter {
        fn judge(&mut self, samples: &[&Sample]) -> Result<Vec<Verdict>> {
            self.0 += samples.len();
            Ok(samples.iter().map(|sample| Verdict::of(sample.completion.len() as f64)).collect())
        }
    }

    #[test]
    fn equal_samples_are_judged_once() {
        let prompt = Content::Text("p".into());
        let sample = |completion, answer| Sample {
            prompt: &prompt,
            completion,
            answer,
            row: 0,
            prompt_ids: &[],
            completion_ids: &[],
            finished: true,
        };
        let mut cached = Cached::new(Counter(0));
        let samples = [sample("a", None), sample("bb", None), sample("a", None), sample("a", Some(""))];
        for _ in 0..2 {
            let verdicts = cached.judge(&samples.each_ref()).unwrap();
            assert_eq!(verdicts.iter().map(|verdict| verdict.reward).collect::<Vec<_>>(), [1.0, 2.0, 1.0, 1.0]);
            assert_eq!(cached.judge.0, 3);
        }
        // Another prompt, in another place of the row, another end.
        let other = Content::Text("pa".into());
        let more = [Sample { prompt: &other, ..sample("", None) }, Sample { finished: false, ..sample("a", None) }];
        cached.judge(&more.each_ref()).unwrap();
        assert_eq!(cached.judge.0, 5);
    }

    #[test]
    fn it_does_not_grow_without_end() {
        let mut cached = Cached::new(Counter(0));
        for i in 0..3 * GENERATION {
            cached.keep(*blake3::hash(&i.to_le_bytes()).as_bytes(), Verdict::of(i as f64));
        }
        assert!(cached.recent.len() + cached.older.len() <= 2 * GENERATION);
        let last = blake3::hash(&(3 * GENERATION - 1).to_le_bytes());
        assert_eq!(cached.find(last.as_bytes()).unwrap().reward, (3 * GENERATION - 1) as f64);
    }
}
