//! Rows that can be trained on and are probably not what was meant.

use std::fmt;

use super::conversation::Message;
use super::tokenizer::Tokenizer;

/// What is odd about a row.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lint {
    /// Two begin-of-text tokens: the text has one, and the tokenizer adds one.
    DoubledBos,
    /// What is scored of a conversation ends without a token that ends generation.
    NoStop,
    /// An assistant's message without text.
    EmptyTurn,
    /// The prompt ends without the start of the assistant's turn, which is scored instead.
    NoGenerationPrompt,
}

impl Lint {
    pub const ALL: [Lint; 4] = [Lint::DoubledBos, Lint::NoStop, Lint::EmptyTurn, Lint::NoGenerationPrompt];
}

impl fmt::Display for Lint {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Lint::DoubledBos => "start with two begin-of-text tokens: remove it from the text, the tokenizer adds it",
            Lint::NoStop => {
                "end without an end-of-turn token that generation stops at: the model will not learn to stop; name it as \
                 eos_token in tokenizer_config.json or in generation_config.json, or end turns with it in the template"
            }
            Lint::EmptyTurn => "have an empty assistant message, which is scored too",
            Lint::NoGenerationPrompt => {
                "score the start of the assistant's turn: the chat template writes no generation prompt \
                 (add_generation_prompt), so the prompt ends before it"
            }
        })
    }
}

/// Whether the text that `ids` end with is closed by a token that generation stops at; blanks may follow it.
pub(super) fn stops(ids: &[u32], tokenizer: &Tokenizer) -> bool {
    let blank = |id: &u32| tokenizer.decode_all(&[*id]).is_ok_and(|text| text.trim().is_empty());
    let last = ids.iter().rev().find(|id| tokenizer.stops().contains(id) || !blank(id));
    last.is_some_and(|id| tokenizer.stops().contains(id))
}

pub(super) fn empty_turn(message: &Message) -> bool {
    let silent =
        message.get("content").is_none_or(|content| content.as_str().is_some_and(|text| text.trim().is_empty()));
    message["role"] == "assistant" && silent && !message.contains_key("tool_calls")
}

/// Whether the prompt's text stops short of the assistant's turn: `whole`, the text with the answer, goes on with
/// something else than the answer, and the prompt is the same without a generation prompt. Templates without one may
/// be fine: `[/INST]` needs none.
pub(super) fn lacks_generation_prompt(
    prompt: &str,
    whole: &str,
    answer: &Message,
    bare: impl FnOnce() -> String,
) -> bool {
    let said = answer.get("content").and_then(|content| content.as_str()).unwrap_or("").trim();
    let starts_with_answer = whole.strip_prefix(prompt).is_none_or(|rest| rest.trim_start().starts_with(said));
    !starts_with_answer && bare() == prompt
}
