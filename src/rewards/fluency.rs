//! How fluent a completion is, by a language model that is not trained:
//!
//! ```text
//! reward = mean over the completion's tokens, its end too, of ln p(token | prompt and what comes before)        nats, 0 at most
//! ```
//!
//! What repeats itself is fluent, too: give it beside `repetition`. As part of a gold reward it says what a reward model cannot know
//! once completions are no longer of the kind that it was trained on.

use std::path::PathBuf;

use serde::Deserialize;

use super::Entry;
use super::model::Panel;
use super::registry::{Kind, Place, options};

pub const ENTRY: Entry = Entry {
    name: "fluency",
    summary: "mean log-probability of a completion's tokens under a language model, nats; what repeats itself is fluent, too",
    keys: &[("dir", "folder of the language model, with its tokenizer")],
    open: |table, Place { folder, .. }| {
        let Options { dir } = options(table)?;
        Ok(Kind::Models(Panel::fluency(&folder.join(dir)).map_err(|e| e.to_string())?))
    },
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Options {
    dir: PathBuf,
}
