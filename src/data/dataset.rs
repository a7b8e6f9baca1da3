//! The rows of a file as token sequences, and an account of every row that is not trained on as it stands.

use std::mem::discriminant;
use std::ops::Range;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::conversation::Content;
use super::encode::{EncodeOptions, Encoded, Overflow, RowEncoder, Skip};
use super::lint::Lint;
use super::rows::{Form, Parts, Row, read_placed};
use super::tokenizer::Tokenizer;
use crate::error::{Error, Place, Result};

/// One scored sequence: `ids[first..]` are scored but for `unscored`, each predicted from the token before it.
/// `1 <= first < ids.len()` always holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Sequence {
    pub ids: Vec<u32>,
    pub first: usize,
    /// Tokens between the first and the last one that is scored: what others say between an assistant's turns. Ascending ranges,
    /// apart from each other.
    pub unscored: Vec<Range<usize>>,
}

impl Sequence {
    /// With every token from `first` on scored.
    pub fn new(ids: Vec<u32>, first: usize) -> Self {
        Self { ids, first, unscored: Vec::new() }
    }

    /// The tokens that are scored, in order.
    pub fn scored(&self) -> impl Iterator<Item = usize> {
        let starts = std::iter::once(self.first).chain(self.unscored.iter().map(|range| range.end));
        let ends = self.unscored.iter().map(|range| range.start).chain([self.ids.len()]);
        starts.zip(ends).flat_map(|(start, end)| start..end)
    }

    /// How many tokens are scored.
    pub fn targets(&self) -> usize {
        self.ids.len() - self.first - self.unscored.iter().map(Range::len).sum::<usize>()
    }
}

/// One row ready to train on: 2 sequences (chosen, rejected) for pairs, with equal `first`; else 1. Their prompts
/// are equal too, unless the whole prompt merged into the first token of each.
#[derive(Clone, PartialEq, Default, Debug)]
pub struct Example {
    /// Index among the rows of the file, from 0; blank lines do not count.
    pub row: usize,
    pub sequences: Vec<Sequence>,
    /// Unpaired data alone have it: whether the completion is desirable.
    pub label: Option<bool>,
    /// Pairs may have it: by how much chosen is better than rejected, in units of a reward. Finite; all pairs of a
    /// data set or none.
    pub margin: Option<f64>,
    /// Which of its sequences the reference wrote, if the policy wrote the other.
    pub prior: Option<usize>,
}

/// A prompt whose tokens change when its completion follows.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Merge {
    /// Index of the row, as in [`Example`].
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
    /// Examples that are probably not what was meant, in order.
    pub lints: Vec<(usize, Lint)>,
    /// Rows hold messages: a chat template writes the text.
    pub conversational: bool,
    /// The chat template reads today's date.
    reads_clock: bool,
    /// The tokenizer has an EOS token, so completions end with one.
    pub has_eos: bool,
    pub options: EncodeOptions,
    /// Where each row lies in the file.
    places: Vec<Place>,
}

impl Dataset {
    /// Reads and encodes a file. Rows are encoded in parallel and kept in order.
    ///
    /// # Errors
    /// Those of [`read_rows`](super::read_rows); a row that cannot be encoded, or that is too long with
    /// `Overflow::Error` (the first such line); messages and no chat template; `max_length` below 2. See also
    /// [`Dataset::not_empty`].
    pub fn load(path: &Path, tokenizer: &Tokenizer, options: &EncodeOptions) -> Result<Self> {
        let (form, placed) = read_placed(path)?;
        Self::encode(path, form, placed, tokenizer, options)
    }

    /// One text as the only row of form [`Form::Text`]. `name` stands for the file in messages.
    ///
    /// # Errors
    /// As for [`Dataset::load`].
    pub fn of_text(name: &str, text: &str, tokenizer: &Tokenizer, options: &EncodeOptions) -> Result<Self> {
        let parts = Parts::Text { text: Content::Text(text.to_string()) };
        let row = Row { parts, label: None, margin: None, variables: Default::default() };
        Self::encode(Path::new(name), Form::Text, vec![(Place::Line(1), row)], tokenizer, options)
    }

    fn encode(
        path: &Path,
        form: Form,
        placed: Vec<(Place, Row)>,
        tokenizer: &Tokenizer,
        options: &EncodeOptions,
    ) -> Result<Self> {
        if let Some(max_length @ ..2) = options.max_length {
            return Err(Error::option("--max-length", format!("{max_length} leaves no token to score; use 2 or more")));
        }
        if form == Form::Prompts && !options.prompts {
            let detail = "has prompts alone, and completions are asked for; with --reward the policy writes them, and `cuvee \
                          generate --prompts` does";
            return Err(Error::file(path, detail));
        }
        let conversational = placed.iter().any(|(_, row)| row.has_messages());
        let chat = conversational.then(|| tokenizer.chat_template()).transpose()?;
        let encoder = RowEncoder { tokenizer, chat: chat.as_deref(), options };
        let encoded: Vec<_> = placed.par_iter().map(|(_, row)| encoder.encode(row)).collect();
        let mut dataset = Self {
            path: path.to_path_buf(),
            form,
            rows: placed.len(),
            examples: Vec::with_capacity(placed.len()),
            skipped: Vec::new(),
            truncated: 0,
            merged_boundaries: 0,
            first_merge: None,
            lints: Vec::new(),
            conversational,
            reads_clock: chat.is_some_and(|chat| chat.reads_clock()),
            has_eos: tokenizer.eos().is_some(),
            options: *options,
            places: placed.iter().map(|(place, _)| *place).collect(),
        };
        for (row, (encoded, (_, source))) in encoded.into_iter().zip(&placed).enumerate() {
            match encoded.map_err(|e| dataset.error_at(row, e.to_string()))? {
                Ok(encoded) => dataset.keep(row, source, encoded, tokenizer),
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

    fn keep(&mut self, row: usize, source: &Row, encoded: Encoded, tokenizer: &Tokenizer) {
        let Encoded { sequences, parting, prompt_rest, cut, lints } = encoded;
        self.lints.extend(lints.into_iter().map(|lint| (row, lint)));
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
        self.examples.push(Example { row, sequences, label: source.label, margin: source.margin, prior: None });
    }

    /// Fails where [`EncodeOptions::assistant_only`] says nothing about these rows.
    pub fn check_assistant_only(&self) -> Result<()> {
        if !self.options.assistant_only || self.conversational && self.form == Form::Text {
            return Ok(());
        }
        let detail = format!(
            "says nothing about {}, whose rows are {}: of messages without a prompt it chooses what is scored",
            self.path.display(),
            self.form
        );
        Err(Error::option("--assistant-only-loss", detail))
    }

    /// Where a row lies in the file.
    pub fn place(&self, row: usize) -> Place {
        self.places[row]
    }

    /// The row at a line of the file, or the record of that number, from 1.
    pub fn row_at(&self, number: usize) -> Option<usize> {
        self.places.binary_search_by_key(&number, |place| place.number()).ok()
    }

    fn error_at(&self, row: usize, detail: String) -> Error {
        Error::Row { path: self.path.clone(), at: self.place(row), detail }
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
            let remedy = match self.conversational {
                true => "the chat template writes a prompt alone differently, or the answer merges with its end",
                false => "end prompts on a token boundary to avoid it",
            };
            lines.push(format!(
                "{path}: in {} of {rows} rows the last tokens of the prompt change when the completion follows; the \
                 completion is scored from there on (first at {}: the prompt alone ends in {prompt:?}, the row \
                 goes on with {instead:?}); {remedy}",
                self.merged_boundaries,
                self.place(*row)
            ));
        }
        let same = |example: &&Example| matches!(&example.sequences[..], [chosen, rejected] if chosen == rejected);
        if let Some(first) = self.examples.iter().find(same) {
            let count = self.examples.iter().filter(same).count();
            lines.push(format!(
                "{path}: chosen and rejected are the same tokens in {count} of {rows} rows (first at {}); they \
                 teach nothing about preference",
                self.place(first.row)
            ));
        }
        lines.extend(self.one_label());
        for lint in Lint::ALL {
            let found = || self.lints.iter().filter(|(_, other)| *other == lint);
            if let Some((first, _)) = found().next() {
                let (count, at) = (found().count(), self.place(*first));
                lines.push(format!("{path}: {count} of {rows} rows {lint} (first at {at})"));
            }
        }
        if self.reads_clock {
            lines.push(format!(
                "{path}: the chat template reads today's date (strftime_now): tomorrow the tokens may be others, and a \
                 run cannot be resumed; fix the date in the template, or in a column chat_template_kwargs if it reads one"
            ));
        }
        if !self.has_eos && !self.conversational {
            lines.push(format!("{path}: the tokenizer names no EOS token; rows do not end with one"));
        }
        lines
    }

    /// Where there is nothing to tell apart.
    fn one_label(&self) -> Option<String> {
        let first = self.examples.first()?.label?;
        let same = self.examples.iter().all(|example| example.label == Some(first));
        let (path, rows, label) = (self.path.display(), self.examples.len(), label_name(first));
        same.then(|| format!("{path}: all {rows} completions are labelled {label}: there is nothing to tell apart"))
    }

    /// `3 of 100 rows dropped: 2 too long (.. first at line 5), 1 empty completion (first at line 17)`.
    fn skipped_report(&self) -> Option<String> {
        // Reason, rows with it, the place of the first. A reason's numbers differ from row to row.
        let mut reasons: Vec<(&Skip, usize, Place)> = Vec::new();
        for (row, skip) in &self.skipped {
            match reasons.iter_mut().find(|(known, ..)| discriminant(*known) == discriminant(skip)) {
                Some((_, count, _)) => *count += 1,
                None => reasons.push((skip, 1, self.place(*row))),
            }
        }
        let describe =
            |(skip, count, at): &(&Skip, usize, Place)| format!("{count} {skip} ({}first at {at})", skip.hint());
        let parts: Vec<String> = reasons.iter().map(describe).collect();
        let dropped = || format!("{} of {} rows dropped: {}", self.skipped.len(), self.rows, parts.join(", "));
        (!parts.is_empty()).then(dropped)
    }

    /// blake3 over the form, all token ids, firsts, labels and margins: what a resumed run must find unchanged.
    pub fn fingerprint(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.form.to_string().as_bytes());
        for sequence in self.examples.iter().flat_map(|example| &example.sequences) {
            // The lengths first, so that no two lists of sequences give the same bytes.
            let header = [sequence.ids.len() as u64, sequence.first as u64];
            hasher.update(bytemuck::cast_slice(&header)).update(bytemuck::cast_slice(&sequence.ids));
            if !sequence.unscored.is_empty() {
                hasher.update(&(sequence.unscored.len() as u64).to_le_bytes());
            }
            for range in &sequence.unscored {
                hasher.update(bytemuck::cast_slice(&[range.start as u64, range.end as u64]));
            }
        }
        // Of all examples or of none; the form says whether of labels.
        let labels: Vec<u8> = self.examples.iter().filter_map(|example| example.label).map(u8::from).collect();
        let margins: Vec<u64> = self.examples.iter().filter_map(|example| example.margin).map(f64::to_bits).collect();
        hasher.update(&labels).update(bytemuck::cast_slice(&margins));
        *hasher.finalize().as_bytes()
    }
}

/// What a label calls its completion.
pub fn label_name(desirable: bool) -> &'static str {
    if desirable { "desirable" } else { "undesirable" }
}

#[cfg(test)]
mod tests {
    use super::super::tokenizer::tests::{folder, load, toy};
    use super::*;
    use serde_json::{Value, json};

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

    fn unpaired(completion: &str, label: bool) -> String {
        json!({"prompt": "c", "completion": completion, "label": label}).to_string() + "\n"
    }

    fn completion(prompt: &str, completion: &str) -> String {
        json!({"prompt": prompt, "completion": completion}).to_string() + "\n"
    }

    fn text(text: &str) -> String {
        json!({ "text": text }).to_string() + "\n"
    }

    fn limit(max_length: usize, on_overflow: Overflow) -> EncodeOptions {
        EncodeOptions { max_length: Some(max_length), on_overflow, ..EncodeOptions::default() }
    }

    fn sequence(ids: &[u32], first: usize) -> Sequence {
        Sequence::new(ids.to_vec(), first)
    }

    #[test]
    fn a_pair_becomes_two_sequences_that_end_with_eos() {
        let data = dataset(&pair("c", "d", " ab"));
        assert_eq!(data.form, Form::Pairs);
        assert_eq!(data.examples[0].sequences, [sequence(&[0, 5, 6, 1], 2), sequence(&[0, 5, 7, 8, 1], 2)]);
        assert_eq!(data.report(), [""; 0]);
    }

    #[test]
    fn labels_and_margins_stay_with_their_rows() {
        let data = dataset(&(unpaired("d", true) + &unpaired("", true) + &unpaired("c", false)));
        assert_eq!((data.form, data.report().len()), (Form::Unpaired, 1));
        let labels: Vec<_> = data.examples.iter().map(|example| (example.row, example.label)).collect();
        assert_eq!(labels, [(0, Some(true)), (2, Some(false))]);
        // The tokens are those of the same completion without a label.
        assert_eq!(data.examples[0].sequences, dataset(&completion("c", "d")).examples[0].sequences);

        let margin = |margin: f64| json!({"prompt": "c", "chosen": "d", "rejected": "a", "margin": margin}).to_string();
        let data = dataset(&(margin(0.5) + "\n" + &margin(-1.0)));
        assert_eq!(data.examples.iter().map(|example| example.margin).collect::<Vec<_>>(), [Some(0.5), Some(-1.0)]);
    }

    #[test]
    fn labels_that_are_all_the_same_are_reported() {
        let report = |rows: &[String]| dataset(&rows.concat()).report().join("\n");
        let same = report(&[unpaired("d", false), unpaired("c", false)]);
        assert!(same.contains("train.jsonl: all 2 completions are labelled undesirable"), "{same}");
        assert_eq!(report(&[unpaired("d", false), unpaired("c", true)]), "");
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

    // ---- conversations: "d" before a user's words and a space behind, "c" before an answer and EOS behind ------------

    const TEMPLATE: &str = "{% for m in messages %}{% if m.role == 'user' %}{{ 'd' + m.content + ' ' }}{% else %}\
        {{ 'c' + m.content + eos_token }}{% endif %}{% endfor %}{{ 'c' if add_generation_prompt }}";

    fn chat(template: &str, rows: &[Value], options: EncodeOptions) -> Result<Dataset> {
        let config = json!({"bos_token": "<s>", "eos_token": "</s>", "chat_template": template});
        let dir = folder(&[("tokenizer.json", toy(true)), ("tokenizer_config.json", config)]);
        let content: String = rows.iter().map(|row| format!("{row}\n")).collect();
        dataset_of(&Tokenizer::load(dir.path()).unwrap(), &content, options)
    }

    fn turns(texts: &[&str]) -> Value {
        let role = |i: usize| if i.is_multiple_of(2) { "user" } else { "assistant" };
        texts.iter().enumerate().map(|(i, text)| json!({"role": role(i), "content": text})).collect()
    }

    fn answer(text: &str) -> Value {
        json!([{"role": "assistant", "content": text}])
    }

    #[test]
    fn conversations_are_what_the_template_writes_and_nothing_else() {
        let pair = json!({"prompt": turns(&["a"]), "chosen": answer("b"), "rejected": answer("bd")});
        let data = chat(TEMPLATE, &[pair], EncodeOptions::default()).unwrap();
        // The tokenizer adds no BOS, and nobody a second EOS.
        let expected = [sequence(&[6, 3, 7, 5, 4, 1], 4), sequence(&[6, 3, 7, 5, 4, 6, 1], 4)];
        assert_eq!((data.form, data.examples[0].sequences.as_slice()), (Form::Pairs, &expected[..]));
        assert_eq!(data.report(), [""; 0]);

        let implicit = json!({"chosen": turns(&["a", "b"]), "rejected": turns(&["a", "bd"])});
        assert_eq!(chat(TEMPLATE, &[implicit], EncodeOptions::default()).unwrap().examples[0].sequences, expected);

        let messages = json!({"messages": turns(&["a", "b", "a"])});
        let data = chat(TEMPLATE, &[messages], limit(7, Overflow::Truncate)).unwrap();
        assert_eq!(data.examples[0].sequences, [sequence(&[6, 3, 7, 5, 4, 1, 6], 1)]);
        assert_eq!((data.form, data.truncated), (Form::Text, 1));
    }

    #[test]
    fn what_the_assistant_says_can_be_all_that_is_scored() {
        let only = EncodeOptions { assistant_only: true, ..EncodeOptions::default() };
        let rows = |texts: &[&str]| [json!({"messages": turns(texts)})];
        let sequences = |template: &str, options: EncodeOptions| {
            chat(template, &rows(&["a", "b", "a", "bd"]), options).unwrap().examples.remove(0).sequences
        };
        let but = |range: Range<usize>, ids: &[u32]| Sequence { unscored: [range].to_vec(), ..sequence(ids, 4) };
        let expected = but(6..10, &[6, 3, 7, 5, 4, 1, 6, 3, 7, 5, 4, 6, 1]);
        assert_eq!((expected.targets(), expected.scored().collect::<Vec<_>>()), (5, vec![4, 5, 10, 11, 12]));
        assert_eq!(sequences(TEMPLATE, only), std::slice::from_ref(&expected));
        // By its marks, and without the blank that a template writes behind EOS.
        let marked = TEMPLATE.replace(
            "'c' + m.content + eos_token }}",
            "'c' }}{% generation %}{{ m.content + eos_token }}{% endgeneration %}",
        );
        assert_eq!(sequences(&marked, only), [expected]);
        let blank = TEMPLATE.replace("+ eos_token", "+ eos_token + ' '");
        assert_eq!(sequences(&blank, only), [but(6..11, &[6, 3, 7, 5, 4, 1, 7, 6, 3, 7, 5, 4, 6, 1])]);
        // Cut within what is not scored.
        let cut = EncodeOptions { max_length: Some(8), on_overflow: Overflow::Truncate, ..only };
        assert_eq!(sequences(TEMPLATE, cut), [sequence(&[6, 3, 7, 5, 4, 1], 4)]);

        assert_eq!(chat(TEMPLATE, &rows(&["a"]), only).unwrap().skipped, [(0, Skip::NoAssistant)]);
        let none = EncodeOptions { max_length: Some(4), on_overflow: Overflow::Truncate, ..only };
        let filled = Skip::PromptFillsMaxLength { tokens: 6, max_length: 4 };
        assert_eq!(chat(TEMPLATE, &rows(&["a", "b"]), none).unwrap().skipped, [(0, filled)]);
        let fails = |template: &str, row: Value, part: &str| {
            let message = chat(template, &[row], only).unwrap_err().to_string();
            assert!(message.contains(part), "{message:?} lacks {part:?}");
        };
        let last = "{% for m in messages %}{{ m.content }}{{ eos_token if loop.last }}{% endfor %}";
        fails(last, json!({"messages": turns(&["a", "b", "a", "b"])}), "message 2 otherwise when others follow");
        let pair = json!({"prompt": turns(&["a"]), "chosen": answer("b"), "rejected": answer("d")});
        let refused = chat(TEMPLATE, &[pair], only).unwrap().check_assistant_only().unwrap_err().to_string();
        assert!(refused.starts_with("--assistant-only-loss: says nothing about"), "{refused}");
        assert!(chat(TEMPLATE, &rows(&["a", "b"]), only).unwrap().check_assistant_only().is_ok());
        // What is left to learn does not end a turn.
        let open = TEMPLATE.replace(
            "m.content + eos_token }}",
            "'' }}{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}",
        );
        assert_eq!(chat(&open, &rows(&["a", "b"]), only).unwrap().lints, [(0, Lint::NoStop)]);
        assert_eq!(chat(TEMPLATE, &rows(&["a", "b", "a"]), only).unwrap().lints, []);
        let of = |options| chat(TEMPLATE, &rows(&["a", "b", "a", "b"]), options).unwrap().fingerprint();
        assert_ne!(of(only), of(EncodeOptions::default()));
    }

    #[test]
    fn conversations_without_a_prompt_or_an_answer_are_skipped() {
        let rows = [
            json!({"prompt": [], "chosen": answer("b"), "rejected": answer("d")}),
            json!({"prompt": turns(&["a"]), "chosen": answer("b"), "rejected": []}),
            json!({"prompt": turns(&["a"]), "chosen": answer("b"), "rejected": answer("d")}),
        ];
        let data = chat(TEMPLATE, &rows, EncodeOptions::default()).unwrap();
        assert_eq!(data.skipped, [(0, Skip::EmptyPrompt), (1, Skip::EmptyCompletion)]);
        let apart = json!({"chosen": answer("b"), "rejected": answer("d")});
        assert_eq!(chat(TEMPLATE, &[apart], EncodeOptions::default()).unwrap().skipped, [(0, Skip::EmptyPrompt)]);
    }

    #[test]
    fn a_conversation_that_cannot_be_rendered_is_named() {
        let rows = [json!({"messages": turns(&["a", "b"])}), json!({"messages": turns(&["a"])})];
        let picky = "{% if messages|length < 2 %}{{ raise_exception('needs an answer') }}{% endif %}a</s>";
        let message = chat(picky, &rows, EncodeOptions::default()).unwrap_err().to_string();
        assert!(
            message.contains("train.jsonl, line 2: ") && message.ends_with("conversation: needs an answer"),
            "{message}"
        );

        let dir = folder(&[("tokenizer.json", toy(true))]);
        let tokenizer = Tokenizer::load(dir.path()).unwrap();
        let message = dataset_of(&tokenizer, &rows[0].to_string(), EncodeOptions::default()).unwrap_err().to_string();
        assert!(message.contains("has no chat template") && message.contains("instruct"), "{message}");
        // A template that is not needed may be broken.
        let config = json!({"chat_template": "{%"});
        let dir = folder(&[("tokenizer.json", toy(true)), ("tokenizer_config.json", config)]);
        dataset_of(&Tokenizer::load(dir.path()).unwrap(), &text("a"), EncodeOptions::default()).unwrap();
    }

    #[track_caller]
    fn lints(template: &str, rows: &[Value], expected: &[(usize, Lint)], words: &str) {
        let data = chat(template, rows, EncodeOptions::default()).unwrap();
        assert_eq!(data.lints, expected);
        let report = data.report().join("\n");
        assert!(report.contains(words), "{report}");
    }

    #[test]
    fn what_is_probably_not_meant_is_counted() {
        let pair = |chosen: &str| json!({"prompt": turns(&["a"]), "chosen": answer(chosen), "rejected": answer("d")});
        lints(
            TEMPLATE,
            &[pair("b"), pair(" ")],
            &[(1, Lint::EmptyTurn)],
            "1 of 2 rows have an empty assistant message",
        );
        let endless = TEMPLATE.replace(" + eos_token", "");
        lints(&endless, &[pair("b")], &[(0, Lint::NoStop)], "will not learn to stop");
        // Blanks may follow the token that stops.
        lints(&TEMPLATE.replace("eos_token", "eos_token + '  '"), &[pair("b")], &[], "");
        let headless = TEMPLATE.replace("{{ 'c' if add_generation_prompt }}", "");
        let words = "1 of 1 rows score the start of the assistant's turn";
        lints(&headless, &[pair("b")], &[(0, Lint::NoGenerationPrompt)], words);
        // Where the answer follows the prompt at once, there is nothing to add.
        lints(&headless.replace("'c' + ", ""), &[pair("b")], &[], "");
        lints(&format!("{TEMPLATE}{{# strftime_now #}}"), &[pair("b")], &[], "reads today's date");

        let texts = ["c", "<s>c"].map(|text| json!({ "text": text }));
        let data = chat(TEMPLATE, &texts, EncodeOptions::default()).unwrap();
        assert_eq!(data.lints, [(1, Lint::DoubledBos)]);
        assert!(data.report()[0].ends_with("the tokenizer adds it (first at line 2)"), "{:?}", data.report());
    }

    #[test]
    fn the_fingerprint_follows_tokens_starts_labels_margins_and_form() {
        let of = |rows: &str| dataset(rows).fingerprint();
        let reference = of(&completion("c", "dd"));
        assert_eq!(reference, of(&("\n".to_string() + &completion("c", "dd</s>"))));
        assert_ne!(reference, of(&completion("cd", "d")));
        assert_ne!(reference, of(&completion("c", "dc")));
        assert_ne!(of(&text("c")), of(&completion("", "c")));
        assert_ne!(of(&unpaired("d", true)), of(&unpaired("d", false)));
        assert_ne!(of(&unpaired("d", true)), of(&completion("c", "d")));
        let margin = |margin: f64| json!({"prompt": "c", "chosen": "d", "rejected": "a", "margin": margin}).to_string();
        assert_ne!(of(&margin(1.0)), of(&margin(2.0)));
        assert_ne!(of(&margin(0.0)), of(&pair("c", "d", "a")));
        assert_ne!(of(&(text("c") + &text("cc"))), of(&(text("cc") + &text("c"))));
    }
}
