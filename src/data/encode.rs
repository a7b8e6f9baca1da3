//! One row as token sequences, by the rules of TRL 1.16 (`DPOTrainer` for pairs, `KTOTrainer` for labelled completions,
//! `SFTTrainer` for the rest).
//!
//! * Text: EOS is appended to `chosen`, `rejected`, `completion` and `text` where they do not end with it (`add_eos` in
//!   dpo_trainer.py and sft_trainer.py), and the tokenizer adds the special tokens that it adds to any text.
//! * Messages: the chat template writes everything, special tokens too, and nothing is added. The prompt is rendered
//!   with a generation prompt. Of `messages` without a prompt every token is scored, or with `assistant_only` those of the
//!   assistant's turns (`assistant_only_loss` in sft_trainer.py): what the template marks by `{% generation %}`, as TRL has it, or
//!   where a template marks nothing, what each turn of the assistant adds to the text before it.
//! * Prompt and completion are encoded together as one string, and the prompt alone besides. The completion starts
//!   where the two part (`common_prefix_length` in data_utils.py): a token that merges across the boundary is
//!   scored, and so is the end of a prompt that the template writes differently before an answer. A pair's sequences
//!   start at the same token, the smaller of the two.
//! * Of a prompt alone the end of the completion is there, an EOS token that nothing is trained on.
//! * `Overflow::Truncate` is TRL's `keep_start`, which also drops the rows whose prompt alone fills the length.
//!
//! Where TRL differs: it trains an empty completion or text on EOS alone, and an empty prompt's completion without
//! its first token; both are skipped here. It fails without an EOS token, and on conversations without a prompt. It
//! always cuts what is too long; here that is [`Overflow`], and the default is to drop.

use std::fmt;
use std::ops::Range;

use serde_json::{Map, Value};

use super::chat::ChatTemplate;
use super::conversation::{Content, Message};
use super::dataset::Sequence;
use super::lint::{self, Lint};
use super::rows::{Parts, Row};
use super::tokenizer::Tokenizer;
use crate::error::{Error, Result};

/// What happens to a row with a sequence longer than `max_length`.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Overflow {
    /// The row is not trained on.
    #[default]
    Drop,
    /// Each sequence keeps its first `max_length` tokens.
    Truncate,
    /// Loading fails.
    Error,
}

/// Why a row is not trained on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Skip {
    /// `tokens` is the length of the row's longest sequence.
    TooLong { tokens: usize, max_length: usize },
    /// The string before EOS is empty, or no token of it is left to score.
    EmptyCompletion,
    /// As `EmptyCompletion`, for a text row; its first token is never scored.
    EmptyText,
    /// A conversation in which the assistant says nothing, where only that is scored.
    NoAssistant,
    /// No token before the completion to predict it from: an empty prompt and no BOS.
    EmptyPrompt,
    /// With `Overflow::Truncate`: no completion token is left of some sequence.
    PromptFillsMaxLength { tokens: usize, max_length: usize },
}

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Skip::TooLong { .. } => "too long",
            Skip::EmptyCompletion => "empty completion",
            Skip::EmptyText => "empty text",
            Skip::NoAssistant => "no turn of the assistant",
            Skip::EmptyPrompt => "empty prompt",
            Skip::PromptFillsMaxLength { .. } => "prompt fills max length",
        })
    }
}

impl Skip {
    /// What a user needs to know beyond the reason.
    pub fn hint(&self) -> String {
        match self {
            Skip::TooLong { max_length, .. } => {
                format!("more than {max_length} tokens; see --max-length, --on-overflow; ")
            }
            Skip::PromptFillsMaxLength { max_length, .. } => format!("{max_length} tokens; see --max-length; "),
            Skip::EmptyPrompt => "no token comes before the completion; ".to_string(),
            Skip::EmptyCompletion | Skip::EmptyText | Skip::NoAssistant => String::new(),
        }
    }
}

/// How rows become sequences.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct EncodeOptions {
    /// The longest sequence, prompt and completion, in tokens; at least 2.
    pub max_length: Option<usize>,
    pub on_overflow: Overflow,
    /// Rows may be prompts alone.
    pub prompts: bool,
    /// Of conversations only what the assistant says is scored.
    pub assistant_only: bool,
}

/// One row with one completion as tokens, whatever their number; the tokenizer's chat template writes messages.
///
/// # Errors
/// No token is left to score, or none comes before it.
pub fn encode_row(tokenizer: &Tokenizer, row: &Row) -> Result<Sequence> {
    let chat = row.has_messages().then(|| tokenizer.chat_template()).transpose()?;
    let encoder = RowEncoder { tokenizer, chat: chat.as_deref(), options: &EncodeOptions::default() };
    match encoder.encode(row)? {
        Ok(encoded) => Ok(encoded.sequences.into_iter().next().expect("a row has a completion")),
        Err(skip) => {
            Err(Error::option("--ref-model", format!("its tokenizer leaves nothing to score of a text: {skip}")))
        }
    }
}

/// A row's sequences, all with the same `first`.
pub(super) struct Encoded {
    pub sequences: Vec<Sequence>,
    /// Where prompt and sequences part: `first`, or 0 where a whole prompt merges into the first token.
    pub parting: usize,
    /// Tokens of the prompt alone from there on.
    pub prompt_rest: Vec<u32>,
    pub cut: bool,
    pub lints: Vec<Lint>,
}

pub(super) struct RowEncoder<'a> {
    pub tokenizer: &'a Tokenizer,
    /// Read where a row has messages.
    pub chat: Option<&'a ChatTemplate>,
    pub options: &'a EncodeOptions,
}

/// The strings of a row, ready to be tokenized.
struct Texts {
    /// `None` where everything is scored.
    prompt: Option<String>,
    /// Prompt and completion together, one for each completion.
    wholes: Vec<String>,
    /// The tokenizer has special tokens to add.
    add_special_tokens: bool,
    lints: Vec<Lint>,
    /// Bytes of the one whole that are scored, where not all are.
    spans: Option<Vec<Range<usize>>>,
}

impl RowEncoder<'_> {
    /// Encodes one row; the inner error says why it is not trained on.
    pub fn encode(&self, row: &Row) -> Result<Result<Encoded, Skip>> {
        let (prompt, completions, empty) = match &row.parts {
            Parts::Pair { prompt, chosen, rejected } => (Some(prompt), vec![chosen, rejected], Skip::EmptyCompletion),
            Parts::Completion { prompt, completion } => (Some(prompt), vec![completion], Skip::EmptyCompletion),
            Parts::Text { text } => (None, vec![text], Skip::EmptyText),
            Parts::Prompt { prompt } => return self.prompt(prompt, &row.variables),
        };
        if completions.iter().any(|completion| completion.is_empty()) {
            return Ok(Err(empty));
        }
        let texts = match self.chat.filter(|_| row.has_messages()) {
            Some(_) if prompt.is_some_and(Content::is_empty) => return Ok(Err(Skip::EmptyPrompt)),
            Some(chat) => self.conversation(chat, prompt, &completions, &row.variables)?,
            None => self.strings(prompt, &completions),
        };
        self.tokens(texts, empty)
    }

    fn prompt(&self, prompt: &Content, variables: &Map<String, Value>) -> Result<Result<Encoded, Skip>> {
        let ids = match self.chat.filter(|_| !prompt.is_text()) {
            Some(_) if prompt.is_empty() => return Ok(Err(Skip::EmptyPrompt)),
            Some(chat) => self.tokenizer.encode_plain(&chat.render(prompt.messages(), variables, true)?)?,
            None => self.tokenizer.encode(prompt.text())?,
        };
        let Some(&last) = ids.last() else { return Ok(Err(Skip::EmptyPrompt)) };
        let end = self.tokenizer.eos().map_or(last, |(id, _)| id);
        let fitted = fit(vec![[&ids[..], &[end]].concat()], ids.len(), Skip::EmptyPrompt, self.options);
        let whole = |(sequences, cut)| Encoded {
            sequences,
            parting: ids.len(),
            prompt_rest: Vec::new(),
            cut,
            lints: Vec::new(),
        };
        Ok(fitted.map(whole))
    }

    fn strings(&self, prompt: Option<&Content>, completions: &[&Content]) -> Texts {
        let eos = self.tokenizer.eos().map_or("", |(_, text)| text);
        let start = prompt.map_or("", Content::text);
        let whole = |completion: &&Content| {
            let end = if completion.text().ends_with(eos) { "" } else { eos };
            [start, completion.text(), end].concat()
        };
        Texts {
            prompt: prompt.map(|_| start.to_string()),
            wholes: completions.iter().map(whole).collect(),
            add_special_tokens: true,
            lints: Vec::new(),
            spans: None,
        }
    }

    fn conversation(
        &self,
        chat: &ChatTemplate,
        prompt: Option<&Content>,
        completions: &[&Content],
        variables: &Map<String, Value>,
    ) -> Result<Texts> {
        if let (true, None, [text]) = (self.options.assistant_only, prompt, completions) {
            return self.assistants(chat, text.messages(), variables);
        }
        let start = prompt.map_or(&[][..], Content::messages);
        let whole = |completion: &&Content| chat.render(&[start, completion.messages()].concat(), variables, false);
        let wholes: Vec<String> = completions.iter().map(whole).collect::<Result<_>>()?;
        let prompt = prompt.map(|_| chat.render(start, variables, true)).transpose()?;

        let mut lints = Vec::new();
        if completions.iter().flat_map(|completion| completion.messages()).any(lint::empty_turn) {
            lints.push(Lint::EmptyTurn);
        }
        if let Some(text) = &prompt {
            let bare = || chat.render(start, variables, false).unwrap_or_default();
            let lacks = |(whole, completion): (&String, &&Content)| {
                lint::lacks_generation_prompt(text, whole, &completion.messages()[0], bare)
            };
            if wholes.iter().zip(completions).any(lacks) {
                lints.push(Lint::NoGenerationPrompt);
            }
        }
        Ok(Texts { prompt, wholes, add_special_tokens: false, lints, spans: None })
    }

    /// A conversation of which the assistant's turns are scored.
    fn assistants(&self, chat: &ChatTemplate, messages: &[Message], variables: &Map<String, Value>) -> Result<Texts> {
        let (whole, marked) = chat.marked(messages, variables, false)?;
        let spans = marked.map_or_else(|| self.turns(chat, messages, variables, &whole), Ok)?;
        let lints = if messages.iter().any(lint::empty_turn) { vec![Lint::EmptyTurn] } else { Vec::new() };
        Ok(Texts { prompt: None, wholes: vec![whole], add_special_tokens: false, lints, spans: Some(spans) })
    }

    /// What each turn of the assistant adds to the text of those before it.
    fn turns(
        &self,
        chat: &ChatTemplate,
        messages: &[Message],
        variables: &Map<String, Value>,
        whole: &str,
    ) -> Result<Vec<Range<usize>>> {
        let says = |at: &usize| messages[*at].get("role").is_some_and(|role| role == "assistant");
        let turn = |at: usize| {
            let after = chat.render(&messages[..=at], variables, false)?;
            let before = match chat.render(&messages[..at], variables, true) {
                // Templates are not made for conversations of no message.
                before if at == 0 => before.ok().filter(|before| after.starts_with(before)).unwrap_or_default(),
                before => before?,
            };
            match whole.starts_with(&after) && after.starts_with(&before) {
                true => Ok(before.len()..self.turn_end(&after)),
                false => Err(Error::option(
                    "--assistant-only-loss",
                    format!(
                        "the chat template writes message {} otherwise when others follow, and marks nothing: what the \
                             assistant says cannot be told from the rest; put {{% generation %}} and {{% endgeneration %}} around it \
                             in the template",
                        at + 1
                    ),
                )),
            }
        };
        (0..messages.len()).filter(says).map(turn).collect()
    }

    /// Where the text's last turn ends: behind the token at which generation stops, whatever blanks the template writes next.
    fn turn_end(&self, text: &str) -> usize {
        let trimmed = text.trim_end();
        let stops = |id: &u32| self.tokenizer.decode_all(&[*id]).is_ok_and(|stop| trimmed.ends_with(stop.trim_end()));
        if self.tokenizer.stops().iter().any(stops) { trimmed.len() } else { text.len() }
    }

    fn tokens(&self, texts: Texts, empty: Skip) -> Result<Result<Encoded, Skip>> {
        let Texts { prompt, wholes, add_special_tokens, mut lints, spans } = texts;
        let ids = |text: &String| match add_special_tokens {
            true => self.tokenizer.encode(text),
            false => self.tokenizer.encode_plain(text),
        };
        let sequences: Vec<Vec<u32>> = wholes.iter().map(ids).collect::<Result<_>>()?;
        let (parting, prompt_rest) = match &prompt {
            None => (0, Vec::new()),
            Some(prompt) => {
                let mut ids = ids(prompt)?;
                let first = sequences.iter().map(|sequence| common_prefix(&ids, sequence)).min().unwrap_or(0);
                if first == 0 && prompt.is_empty() {
                    return Ok(Err(Skip::EmptyPrompt));
                }
                (first, ids.split_off(first))
            }
        };
        // Nothing comes before the first token of a text, nor before a completion into which its whole prompt merges:
        // that one token is not scored.
        let first = parting.max(1);
        let doubled = |ids: &Vec<u32>| ids.len() > 1 && ids[0] == ids[1] && Some(ids[0]) == self.tokenizer.bos();
        if sequences.iter().any(doubled) {
            lints.push(Lint::DoubledBos);
        }
        // Texts end with EOS if there is one.
        let goes_on = |ids: &[u32]| !lint::stops(ids, self.tokenizer);
        if !add_special_tokens && spans.is_none() && sequences.iter().any(|ids| goes_on(ids)) {
            lints.push(Lint::NoStop);
        }
        let mut fitted = fit(sequences, first, empty, self.options);
        if let (Ok((sequences, cut)), Some(spans)) = (&mut fitted, spans) {
            let scored = self.tokenizer.covered(&wholes[0], &spans)?;
            if !leave_out(&mut sequences[0], &scored) {
                let (tokens, max_length) = (scored.len(), self.options.max_length.unwrap_or(scored.len()));
                let beyond = *cut && scored.contains(&true);
                return Ok(Err(match beyond {
                    true => Skip::PromptFillsMaxLength { tokens, max_length },
                    false => Skip::NoAssistant,
                }));
            }
            if !*cut && goes_on(&sequences[0].ids) {
                lints.push(Lint::NoStop);
            }
        }
        Ok(fitted.map(|(sequences, cut)| Encoded { sequences, parting, prompt_rest, cut, lints }))
    }
}

/// Checks that every sequence has a token to score and one before it, and brings them to `max_length`. Says whether
/// anything was cut.
fn fit(
    mut sequences: Vec<Vec<u32>>,
    first: usize,
    empty: Skip,
    options: &EncodeOptions,
) -> Result<(Vec<Sequence>, bool), Skip> {
    if sequences.iter().any(|ids| ids.len() <= first) {
        return Err(empty);
    }
    let tokens = sequences.iter().map(Vec::len).max().unwrap_or(0);
    let max_length = options.max_length.unwrap_or(tokens);
    let cut = tokens > max_length;
    if cut && options.on_overflow != Overflow::Truncate {
        return Err(Skip::TooLong { tokens, max_length });
    }
    if first >= max_length {
        return Err(Skip::PromptFillsMaxLength { tokens: first, max_length });
    }
    sequences.iter_mut().for_each(|ids| ids.truncate(max_length));
    Ok((sequences.into_iter().map(|ids| Sequence::new(ids, first)).collect(), cut))
}

/// Keeps the tokens up to the last that is scored, and says which of them are not; false where none is.
fn leave_out(sequence: &mut Sequence, scored: &[bool]) -> bool {
    let scored = |t: &usize| *t > 0 && scored[*t];
    let kept: Vec<usize> = (0..sequence.ids.len()).filter(scored).collect();
    let (Some(first), Some(last)) = (kept.first(), kept.last()) else { return false };
    sequence.first = *first;
    sequence.ids.truncate(last + 1);
    let apart = kept.windows(2).filter(|pair| pair[1] > pair[0] + 1);
    sequence.unscored = apart.map(|pair| pair[0] + 1..pair[1]).collect();
    true
}

fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}
