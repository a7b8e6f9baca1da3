//! What sampled completions are worth: rules, reward models and programs, each with a weight.
//!
//! ```text
//! --reward WHAT=WEIGHT --Rewards::open--> Rewards --Jury::new--> Jury --score--> [rewards][samples], NaN: says nothing
//! ```
//!
//! [`Rewards`] is what was opened and checked: names, weights, a hash of all that decides scores, the memory that it takes.
//! A [`Jury`] is that at work on a device. Rules see the sample alone, no device and no model.

mod cache;
mod exact_match;
mod fluency;
mod format;
mod http;
pub mod judgement;
mod jury;
mod length;
mod lexicon;
mod model;
mod process;
mod regex;
mod registry;
mod repetition;
mod spec;
pub mod text;

use crate::data::Content;

pub use jury::Jury;
pub use registry::Entry;
pub use spec::{FLUENCY, RewardSpec, Rewards};

/// One completion to be judged.
#[derive(Clone, Copy, Debug)]
pub struct Sample<'a> {
    /// As the data has it: a text, or messages.
    pub prompt: &'a Content,
    /// What was sampled, without the token that ends it.
    pub completion: &'a str,
    /// The data's own completion of the prompt, where it has one.
    pub answer: Option<&'a str>,
    /// Row of the data set, for messages.
    pub row: usize,
    /// What the policy was given, in its tokens.
    pub prompt_ids: &'a [u32],
    /// What it wrote, with the token that ends it.
    pub completion_ids: &'a [u32],
    /// It ended by itself, not at the length limit.
    pub finished: bool,
}

impl Sample<'_> {
    /// Tokens of the completion's text.
    pub fn tokens(&self) -> &[u32] {
        match self.completion_ids {
            [text @ .., _] if self.finished => text,
            all => all,
        }
    }
}

/// What one reward says of one sample.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Verdict {
    /// NaN where it says nothing.
    reward: f64,
    /// Standard deviation over the models that judge together; NaN of what is no model.
    spread: f64,
}

impl Verdict {
    fn of(reward: f64) -> Self {
        Self { reward, spread: f64::NAN }
    }
}

/// A reward that is a function of the sample alone.
trait Rule: Send + Sync {
    /// NaN where it says nothing; else finite.
    fn reward(&self, sample: &Sample) -> Result<f64, String>;

    /// Whether it reads the ids of tokens.
    fn reads_tokens(&self) -> bool {
        false
    }
}

/// Every kind of a `[[reward]]` table: to add one, write its file and name it here and above.
const KINDS: &[&Entry] = &[
    &exact_match::ENTRY,
    &fluency::ENTRY,
    &format::ENTRY,
    &http::ENTRY,
    &length::ENTRY,
    &lexicon::ENTRY,
    &model::ENTRY,
    &process::ENTRY,
    &regex::ENTRY,
    &repetition::ENTRY,
];

/// All kinds of rewards, by name.
pub fn all() -> &'static [&'static Entry] {
    KINDS
}

#[cfg(test)]
mod tests;
