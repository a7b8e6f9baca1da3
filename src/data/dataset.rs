//! Rows as token sequences, by the rules of TRL 1.16 for string data (`DPOTrainer` for pairs, `SFTTrainer` for the
//! rest), and an account of every row that is not trained on as it stands.
//!
//! * EOS is appended to `chosen`, `rejected`, `completion` and `text` where they do not end with it (`add_eos` in
//!   dpo_trainer.py and sft_trainer.py).
//! * Prompt and completion are encoded together as one string, and the prompt alone besides. The completion starts
//!   where the two part (`common_prefix_length` in data_utils.py): a token that merges across the boundary is
//!   scored. A pair's sequences start at the same token, the smaller of the two.
//! * `Overflow::Truncate` is TRL's `keep_start`, which also drops the rows whose prompt alone fills the length.
//!
//! Where TRL differs: it trains an empty completion or text on EOS alone, and an empty prompt's completion without
//! its first token; both are skipped here. It fails without an EOS token. It always cuts what is too long;
//! here that is [`Overflow`], and the default is to drop.

use std::fmt;
use std::mem::discriminant;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::jsonl::{Form, Row, read_numbered};
use super::tokenizer::Tokenizer;
use crate::error::{Error, Result};

/// One scored sequence: `ids[first..]` are scored, each predicted from the token before it.
/// `1 <= first < ids.len()` always holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Sequence {
    pub ids: Vec<u32>,
    pub first: usize,
}

/// One row ready to train on: 2 sequences (chosen, rejected) for pairs, with equal `first`; else 1. Their prompts
/// are equal too, unless the whole prompt merged into the first token of each.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Example {
    /// Index among the rows of the file, from 0; blank lines do not count.
    pub row: usize,
    pub sequences: Vec<Sequence>,
}

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
            Skip::EmptyPrompt => "empty prompt",
            Skip::PromptFillsMaxLength { .. } => "prompt fills max length",
        })
    }
}

impl Skip {
    /// What a user needs to know beyond the reason.
    fn hint(&self) -> String {
        match self {
            Skip::TooLong { max_length, .. } => {
                format!("more than {max_length} tokens; see --max-length, --on-overflow; ")
            }
            Skip::PromptFillsMaxLength { max_length, .. } => format!("{max_length} tokens; see --max-length; "),
            Skip::EmptyPrompt => "no token comes before the completion; ".to_string(),
            Skip::EmptyCompletion | Skip::EmptyText => String::new(),
        }
    }
}

/// How rows become sequences.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct EncodeOptions {
    /// The longest sequence, prompt and completion, in tokens; at least 2.
    pub max_length: Option<usize>,
    pub on_overflow: Overflow,
}

/// A prompt whose tokens change when its completion follows.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Merge {
    pub row: usize,
    /// The last tokens of the prompt alone, which the sequence does not have.
    pub prompt: String,
    /// The token that the sequence has in their place: the first one scored.
    pub instead: String,
}

/// The rows of a file as examples, in order, and what became of the others.
#[derive(Debug)]
pub struct Dataset {
    pub path: PathBuf,
    pub form: Form,
    /// Rows in the file.
    pub rows: usize,
    pub examples: Vec<Example>,
    /// Rows not trained on, in order.
    pub skipped: Vec<(usize, Skip)>,
    /// Examples with a sequence that was cut to `max_length`.
    pub truncated: usize,
    /// Examples whose prompt ends in tokens that the completion changes.
    pub merged_boundaries: usize,
    /// The first of them.
    pub first_merge: Option<Merge>,
    /// The tokenizer has an EOS token, so completions end with one.
    pub has_eos: bool,
    pub options: EncodeOptions,
    /// The line of each row in the file, from 1.
    lines: Vec<usize>,
}

impl Dataset {
    /// Reads and encodes a file. Rows are encoded in parallel and kept in order.
    ///
    /// # Errors
    /// Those of [`read_rows`](super::read_rows); a row that cannot be encoded, or that is too long with
    /// `Overflow::Error` (the first such line); `max_length` below 2. See also [`Dataset::not_empty`].
    pub fn load(path: &Path, tokenizer: &Tokenizer, options: &EncodeOptions) -> Result<Self> {
        if let Some(max_length @ ..2) = options.max_length {
            return Err(Error::option("--max-length", format!("{max_length} leaves no token to score; use 2 or more")));
        }
        let (form, numbered) = read_numbered(path)?;
        let encoded: Vec<_> = numbered.par_iter().map(|(_, row)| encode(row, tokenizer, options)).collect();
        let mut dataset = Self {
            path: path.to_path_buf(),
            form,
            rows: numbered.len(),
            examples: Vec::with_capacity(numbered.len()),
            skipped: Vec::new(),
            truncated: 0,
            merged_boundaries: 0,
            first_merge: None,
            has_eos: tokenizer.eos().is_some(),
            options: *options,
            lines: numbered.iter().map(|(line, _)| *line).collect(),
        };
        for (row, encoded) in encoded.into_iter().enumerate() {
            match encoded.map_err(|e| dataset.error_at(row, e.to_string()))? {
                Ok(encoded) => dataset.keep(row, encoded, tokenizer),
                Err(Skip::TooLong { tokens, max_length }) if options.on_overflow == Overflow::Error => {
                    let detail = format!(
                        "the row has {tokens} tokens, more than --max-length {max_length}; raise it, or use \
                         --on-overflow drop or truncate"
                    );
                    return Err(dataset.error_at(row, detail));
                }
                Err(skip) => dataset.skipped.push((row, skip)),
            }
        }
        Ok(dataset)
    }

    /// Fails, with the reasons, where every row was skipped.
    pub fn not_empty(self) -> Result<Self> {
        match self.skipped_report() {
            Some(skipped) if self.examples.is_empty() => {
                Err(Error::file(&self.path, format!("no row is left: {skipped}")))
            }
            _ => Ok(self),
        }
    }

    fn keep(&mut self, row: usize, encoded: Encoded, tokenizer: &Tokenizer) {
        let Encoded { sequences, parting, prompt_rest, cut } = encoded;
        self.truncated += usize::from(cut);
        if let Some(&expected) = prompt_rest.first() {
            self.merged_boundaries += 1;
            self.first_merge.get_or_insert_with(|| {
                // Of a pair, one completion may leave the prompt as it is.
                let mut after = sequences.iter().map(|sequence| sequence.ids[parting]);
                let instead = after.find(|&id| id != expected).unwrap_or(expected);
                let text = |ids: &[u32]| ids.iter().filter_map(|&id| tokenizer.token(id)).collect();
                Merge { row, prompt: text(&prompt_rest), instead: text(&[instead]) }
            });
        }
        self.examples.push(Example { row, sequences });
    }

    /// The line of a row in the file, from 1.
    pub fn line(&self, row: usize) -> usize {
        self.lines[row]
    }

    fn error_at(&self, row: usize, detail: String) -> Error {
        Error::Row { path: self.path.clone(), line: self.line(row), detail }
    }

    /// Lines for the user: what was dropped, cut or merged, and why. Empty when nothing was.
    pub fn report(&self) -> Vec<String> {
        let (path, rows) = (self.path.display(), self.rows);
        let mut lines = Vec::new();
        lines.extend(self.skipped_report().map(|skipped| format!("{path}: {skipped}")));
        if let (1.., Some(max_length)) = (self.truncated, self.options.max_length) {
            lines.push(format!(
                "{path}: {} of {rows} rows cut to their first {max_length} tokens (see --max-length, --on-overflow)",
                self.truncated
            ));
        }
        if let Some(Merge { row, prompt, instead }) = &self.first_merge {
            lines.push(format!(
                "{path}: in {} of {rows} rows the last tokens of the prompt change when the completion follows; the \
                 completion is scored from there on (first at line {}: the prompt alone ends in {prompt:?}, the row \
                 goes on with {instead:?}); end prompts on a token boundary to avoid it",
                self.merged_boundaries,
                self.line(*row)
            ));
        }
        let same = |example: &&Example| matches!(&example.sequences[..], [chosen, rejected] if chosen == rejected);
        if let Some(first) = self.examples.iter().find(same) {
            let count = self.examples.iter().filter(same).count();
            lines.push(format!(
                "{path}: chosen and rejected are the same tokens in {count} of {rows} rows (first at line {}); they \
                 teach nothing about preference",
                self.line(first.row)
            ));
        }
        if !self.has_eos {
            lines.push(format!("{path}: the tokenizer names no EOS token; rows do not end with one"));
        }
        lines
    }

    /// `3 of 100 rows dropped: 2 too long (.. first at line 5), 1 empty completion (first at line 17)`.
    fn skipped_report(&self) -> Option<String> {
        // Reason, rows with it, the first of their lines. A reason's numbers differ from row to row.
        let mut reasons: Vec<(&Skip, usize, usize)> = Vec::new();
        for (row, skip) in &self.skipped {
            match reasons.iter_mut().find(|(known, ..)| discriminant(*known) == discriminant(skip)) {
                Some((_, count, _)) => *count += 1,
                None => reasons.push((skip, 1, self.line(*row))),
            }
        }
        let describe = |(skip, count, line): &(&Skip, usize, usize)| {
            format!("{count} {skip} ({}first at line {line})", skip.hint())
        };
        let parts: Vec<String> = reasons.iter().map(describe).collect();
        let dropped = || format!("{} of {} rows dropped: {}", self.skipped.len(), self.rows, parts.join(", "));
        (!parts.is_empty()).then(dropped)
    }

    /// blake3 over the form, all token ids and all firsts: what a resumed run must find unchanged.
    pub fn fingerprint(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.form.to_string().as_bytes());
        for sequence in self.examples.iter().flat_map(|example| &example.sequences) {
            // The lengths first, so that no two lists of sequences give the same bytes.
            let header = [sequence.ids.len() as u64, sequence.first as u64];
            hasher.update(bytemuck::cast_slice(&header)).update(bytemuck::cast_slice(&sequence.ids));
        }
        *hasher.finalize().as_bytes()
    }
}

/// A row's sequences, all with the same `first`.
struct Encoded {
    sequences: Vec<Sequence>,
    /// Where prompt and sequences part: `first`, or 0 where a whole prompt merges into the first token.
    parting: usize,
    /// Tokens of the prompt alone from there on.
    prompt_rest: Vec<u32>,
    cut: bool,
}

/// Encodes one row; the inner error says why it is not trained on.
fn encode(row: &Row, tokenizer: &Tokenizer, options: &EncodeOptions) -> Result<Result<Encoded, Skip>> {
    let (prompt, texts, empty) = match row {
        Row::Pair { prompt, chosen, rejected } => (prompt.as_str(), vec![chosen, rejected], Skip::EmptyCompletion),
        Row::Completion { prompt, completion } => (prompt.as_str(), vec![completion], Skip::EmptyCompletion),
        Row::Text { text } => ("", vec![text], Skip::EmptyText),
    };
    if texts.iter().any(|text| text.is_empty()) {
        return Ok(Err(empty));
    }
    let eos = tokenizer.eos().map_or("", |(_, text)| text);
    let sequences: Vec<Vec<u32>> = texts
        .into_iter()
        .map(|text| tokenizer.encode(&[prompt, text, if text.ends_with(eos) { "" } else { eos }].concat()))
        .collect::<Result<_>>()?;

    let (parting, prompt_rest) = if let Row::Text { .. } = row {
        (0, Vec::new())
    } else {
        let mut ids = tokenizer.encode(prompt)?;
        let first = sequences.iter().map(|sequence| common_prefix(&ids, sequence)).min().unwrap_or(0);
        if first == 0 && prompt.is_empty() {
            return Ok(Err(Skip::EmptyPrompt));
        }
        (first, ids.split_off(first))
    };
    // Nothing comes before the first token of a text, nor before a completion into which its whole prompt merges:
    // that one token is not scored.
    let first = parting.max(1);
    let fitted = fit(sequences, first, empty, options);
    Ok(fitted.map(|(sequences, cut)| Encoded { sequences, parting, prompt_rest, cut }))
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
    Ok((sequences.into_iter().map(|ids| Sequence { ids, first }).collect(), cut))
}

fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use super::super::tokenizer::tests::{folder, load, toy};
    use super::*;
    use serde_json::json;

    // Ids of the toy tokenizer: <s> 0, </s> 1, a 3, b 4, c 5, d 6, space 7, ab 8.

    fn dataset_of(tokenizer: &Tokenizer, content: &str, options: EncodeOptions) -> Result<Dataset> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("train.jsonl");
        std::fs::write(&path, content).unwrap();
        Dataset::load(&path, tokenizer, &options)
    }

    fn dataset(content: &str) -> Dataset {
        dataset_of(&load(true, true), content, EncodeOptions::default()).unwrap()
    }

    fn pair(prompt: &str, chosen: &str, rejected: &str) -> String {
        json!({"prompt": prompt, "chosen": chosen, "rejected": rejected}).to_string() + "\n"
    }

    fn completion(prompt: &str, completion: &str) -> String {
        json!({"prompt": prompt, "completion": completion}).to_string() + "\n"
    }

    fn text(text: &str) -> String {
        json!({ "text": text }).to_string() + "\n"
    }

    fn limit(max_length: usize, on_overflow: Overflow) -> EncodeOptions {
        EncodeOptions { max_length: Some(max_length), on_overflow }
    }

    fn sequence(ids: &[u32], first: usize) -> Sequence {
        Sequence { ids: ids.to_vec(), first }
    }

    #[test]
    fn a_pair_becomes_two_sequences_that_end_with_eos() {
        let data = dataset(&pair("c", "d", " ab"));
        assert_eq!(data.form, Form::Pairs);
        assert_eq!(data.examples[0].sequences, [sequence(&[0, 5, 6, 1], 2), sequence(&[0, 5, 7, 8, 1], 2)]);
        assert_eq!(data.report(), [""; 0]);
    }

    #[test]
    fn eos_is_not_doubled() {
        let data = dataset(&completion("c", "d</s>"));
        assert_eq!(data.examples[0].sequences, [sequence(&[0, 5, 6, 1], 2)]);
    }

    #[test]
    fn a_text_is_scored_from_its_second_token() {
        let data = dataset(&text("cd"));
        assert_eq!(data.examples[0].sequences, [sequence(&[0, 5, 6, 1], 1)]);
        let without_bos = dataset_of(&load(false, true), &text("cd"), EncodeOptions::default()).unwrap();
        assert_eq!(without_bos.examples[0].sequences, [sequence(&[5, 6, 1], 1)]);
    }

    #[test]
    fn a_merged_boundary_moves_the_start_of_both_completions() {
        let data = dataset(&(pair("c", "c", "d") + "\n" + &pair("ca", "d", "bc")));
        assert_eq!(data.examples[1].sequences, [sequence(&[0, 5, 3, 6, 1], 2), sequence(&[0, 5, 8, 5, 1], 2)]);
        assert_eq!(data.merged_boundaries, 1);
        let report = data.report();
        assert_eq!(report.len(), 1);
        assert!(report[0].contains("train.jsonl: in 1 of 2 rows the last tokens of the prompt change"), "{report:?}");
        assert!(
            report[0].contains("line 3: the prompt alone ends in \"a\", the row goes on with \"ab\""),
            "{report:?}"
        );
    }

    #[test]
    fn a_tokenizer_without_eos_appends_nothing_and_says_so() {
        let rows = completion("c", "d");
        let data = dataset_of(&load(true, false), &rows, EncodeOptions::default()).unwrap();
        assert_eq!(data.examples[0].sequences, [sequence(&[0, 5, 6], 2)]);
        let report = data.report();
        assert!(report.len() == 1 && report[0].contains("names no EOS token"), "{report:?}");
    }

    #[test]
    fn rows_without_anything_to_score_are_skipped() {
        let data = dataset(&(completion("c", "") + &completion("c", " ") + &completion("c", "d")));
        assert_eq!(data.skipped, [(0, Skip::EmptyCompletion)]);
        assert_eq!(data.examples.iter().map(|example| example.row).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(dataset(&(text("") + &text("c"))).skipped, [(0, Skip::EmptyText)]);

        // "?" is outside the vocabulary and encodes to nothing; without BOS and EOS one token is all there is.
        let bare = load(false, false);
        let encode = |rows: String| dataset_of(&bare, &rows, EncodeOptions::default()).unwrap();
        assert_eq!(encode(pair("c", "d", "?") + &pair("c", "d", "d")).skipped, [(0, Skip::EmptyCompletion)]);
        assert_eq!(encode(text("c") + &text("cd")).skipped, [(0, Skip::EmptyText)]);
    }

    #[test]
    fn an_empty_prompt_needs_a_bos_token() {
        let rows = completion("", "cd") + &completion("a", "b") + &completion("c", "d");
        assert_eq!(dataset(&rows).examples[0].sequences, [sequence(&[0, 5, 6, 1], 1)]);
        let data = dataset_of(&load(false, true), &rows, EncodeOptions::default()).unwrap();
        assert_eq!(data.skipped, [(0, Skip::EmptyPrompt)]);
        // The whole prompt merges into the first token of the completion, which nothing then predicts.
        assert_eq!(data.examples[0].sequences, [sequence(&[8, 1], 1)]);
        let merge = data.first_merge.unwrap();
        assert_eq!((data.merged_boundaries, merge.prompt.as_str(), merge.instead.as_str()), (1, "a", "ab"));
        let apart = dataset_of(&load(false, true), &pair("a", "b", "c"), EncodeOptions::default()).unwrap();
        assert_eq!(apart.examples[0].sequences, [sequence(&[8, 1], 1), sequence(&[3, 5, 1], 1)]);
    }

    #[test]
    fn identical_completions_are_kept() {
        let data = dataset(&pair("c", "d", "d"));
        assert_eq!(data.examples[0].sequences[0], data.examples[0].sequences[1]);
        let report = dataset(&(pair("a", "b", "c") + &pair("c", "d", "d"))).report().join("\n");
        assert!(report.contains("the same tokens in 1 of 2 rows (first at line 2)"), "{report}");
    }

    #[test]
    fn rows_too_long_are_dropped_by_default() {
        let rows = pair("c", "d", "c") + "\n" + &pair("c", "d", "dd") + &pair("c", "d", "") + &pair("c", "d", "ddd");
        let data = dataset_of(&load(true, true), &rows, limit(4, Overflow::default())).unwrap();
        let too_long = |tokens| Skip::TooLong { tokens, max_length: 4 };
        assert_eq!(data.skipped, [(1, too_long(5)), (2, Skip::EmptyCompletion), (3, too_long(6))]);
        let report = data.report();
        let expected = "train.jsonl: 3 of 4 rows dropped: 2 too long (more than 4 tokens; see --max-length, \
                        --on-overflow; first at line 3), 1 empty completion (first at line 4)";
        assert!(report.len() == 1 && report[0].ends_with(expected), "{report:?}");
    }

    #[test]
    fn truncation_keeps_the_start_and_drops_what_is_all_prompt() {
        let rows = pair("c", "d", "dddd") + &pair("cccd", "d", "d") + &pair("ccc", "d", "d");
        let data = dataset_of(&load(true, true), &rows, limit(5, Overflow::Truncate)).unwrap();
        assert_eq!(data.examples[0].sequences, [sequence(&[0, 5, 6, 1], 2), sequence(&[0, 5, 6, 6, 6], 2)]);
        assert_eq!(data.examples[1].sequences, [sequence(&[0, 5, 5, 5, 6], 4), sequence(&[0, 5, 5, 5, 6], 4)]);
        assert_eq!(data.skipped, [(1, Skip::PromptFillsMaxLength { tokens: 5, max_length: 5 })]);
        assert_eq!(data.truncated, 2);
        let report = data.report();
        assert!(report[0].ends_with("1 prompt fills max length (5 tokens; see --max-length; first at line 2)"));
        assert!(report[1].ends_with("2 of 3 rows cut to their first 5 tokens (see --max-length, --on-overflow)"));
    }

    #[test]
    fn overflow_can_be_an_error() {
        let rows = "\n".to_string() + &text("c") + &text(&"c".repeat(9)) + &text(&"c".repeat(8));
        let message = dataset_of(&load(true, true), &rows, limit(4, Overflow::Error)).unwrap_err().to_string();
        assert!(message.contains("train.jsonl, line 3: the row has 11 tokens, more than --max-length 4"), "{message}");
        assert!(dataset_of(&load(true, true), &rows, limit(11, Overflow::Error)).is_ok());
    }

    #[test]
    fn a_length_that_scores_nothing_is_refused() {
        let message = dataset_of(&load(true, true), &text("c"), limit(1, Overflow::Drop)).unwrap_err().to_string();
        assert_eq!(message, "--max-length: 1 leaves no token to score; use 2 or more");
    }

    #[test]
    fn a_file_without_a_usable_row_is_an_error() {
        let dataset = dataset_of(&load(true, true), &pair("c", "", "d"), EncodeOptions::default()).unwrap();
        let message = dataset.not_empty().unwrap_err().to_string();
        let expected = "no row is left: 1 of 1 rows dropped: 1 empty completion (first at line 1)";
        assert!(message.ends_with(expected), "{message}");
    }

    #[test]
    fn a_row_that_cannot_be_encoded_is_named() {
        let mut words = toy(false);
        words["model"] = json!({"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"});
        let dir = folder(&[("tokenizer.json", words)]);
        let tokenizer = Tokenizer::load(dir.path()).unwrap();
        let message =
            dataset_of(&tokenizer, &("\n".to_string() + &text("z")), EncodeOptions::default()).unwrap_err().to_string();
        assert!(message.contains("train.jsonl, line 2:") && message.contains("cannot encode"), "{message}");
    }

    #[test]
    fn rows_keep_their_order_in_parallel() {
        let rows: String = (0..999).map(|i| text(&"c".repeat(i % 7))).collect();
        let data = dataset(&rows);
        assert_eq!(data.rows, 999);
        assert!(data.examples.iter().all(|example| example.sequences[0].ids.len() == example.row % 7 + 2));
        assert!(data.examples.is_sorted_by(|a, b| a.row < b.row));
    }

    #[test]
    fn the_fingerprint_follows_tokens_starts_and_form_only() {
        let of = |rows: &str| dataset(rows).fingerprint();
        let reference = of(&completion("c", "dd"));
        assert_eq!(reference, of(&("\n".to_string() + &completion("c", "dd</s>"))));
        assert_ne!(reference, of(&completion("cd", "d")));
        assert_ne!(reference, of(&completion("c", "dc")));
        assert_ne!(of(&text("c")), of(&completion("", "c")));
        assert_ne!(of(&(text("c") + &text("cc"))), of(&(text("cc") + &text("c"))));
    }
}
