//! `cuvee preview`: what a model will see of a data set, token by token.

use std::fmt::Write;
use std::io::IsTerminal;
use std::ops::Range;

use serde_json::{Value, json};

use super::args::{Color, PreviewArgs};
use crate::data::{
    Batch, Dataset, EncodeOptions, Example, Form, Piece, Segment, Sequence, Sharing, Skip, Tokenizer, label_name,
};
use crate::error::{Error, Result};
use crate::progress::say;

pub fn run(args: &PreviewArgs) -> Result<()> {
    let tokenizer = Tokenizer::load(&args.model)?;
    let limits = super::encode(args.limits.max_length, args.limits.on_overflow);
    let encode = EncodeOptions { prompts: true, assistant_only: args.assistant_only_loss, ..limits };
    let dataset = Dataset::load(&args.dataset, &tokenizer, &encode)?;
    dataset.check_assistant_only()?;
    let palette = Palette { on: colored(args.color, |name| std::env::var(name).ok(), std::io::stdout().is_terminal()) };
    for row in rows(args, &dataset)? {
        let text = match (dataset.examples.iter().find(|example| example.row == row), args.json) {
            (Some(example), true) => format!("{}\n", example_json(example, &dataset, &tokenizer)?),
            (Some(example), false) => example_text(example, &dataset, &tokenizer, palette),
            (None, json) => skipped(row, &dataset, json, palette),
        };
        super::print(&text)?;
    }
    dataset.report().iter().for_each(say);
    Ok(())
}

/// The rows that the user asked for.
fn rows(args: &PreviewArgs, dataset: &Dataset) -> Result<Vec<usize>> {
    let file = dataset.path.display();
    match (args.row, args.line) {
        (Some(row), _) if row < dataset.rows => Ok(vec![row]),
        (Some(row), _) => {
            let detail = format!("{row} is past the last row of {file}, {}; rows count from 0", dataset.rows - 1);
            Err(Error::option("--row", detail))
        }
        (_, Some(line)) => match dataset.row_at(line) {
            Some(row) => Ok(vec![row]),
            None => Err(Error::option(
                "--line",
                format!("{file} has no row at line {line}; lines and records count from 1"),
            )),
        },
        _ => Ok((0..args.rows.min(dataset.rows)).collect()),
    }
}

fn colored(choice: Color, variable: impl Fn(&str) -> Option<String>, terminal: bool) -> bool {
    let asked_not_to = || variable("NO_COLOR").is_some_and(|value| !value.is_empty());
    match choice {
        Color::Always => true,
        Color::Never => false,
        Color::Auto => terminal && !asked_not_to() && variable("TERM").is_none_or(|term| term != "dumb"),
    }
}

/// What the example's sequences are called.
fn names(example: &Example, form: Form) -> Vec<&'static str> {
    match form {
        Form::Pairs => vec!["chosen", "rejected"],
        Form::Unpaired => vec![example.label.map_or("completion", label_name)],
        Form::Completions | Form::Prompts => vec!["completion"],
        Form::Text => vec!["text"],
    }
}

fn skipped(row: usize, dataset: &Dataset, json: bool, palette: Palette) -> String {
    let skip = dataset.skipped.iter().find(|(other, _)| *other == row).map(|(_, skip)| skip);
    let reason = skip.map_or_else(String::new, Skip::to_string);
    let place = dataset.place(row);
    if json {
        return format!("{}\n", json!({"row": row, "line": place.number(), "skipped": reason}));
    }
    let why = match skip {
        Some(Skip::TooLong { tokens, max_length }) => format!("{reason}: {tokens} tokens, --max-length {max_length}"),
        _ => reason,
    };
    palette.paint(BOLD, &format!("row {row}, {place}")) + &format!("   not trained on: {why}\n\n")
}

fn example_json(example: &Example, dataset: &Dataset, tokenizer: &Tokenizer) -> Result<Value> {
    let batch = Batch::new([example], Sharing::On);
    let segment = |s: &Segment| json!({"start": s.start, "len": s.len, "parent": s.parent, "position": s.position});
    let sequence = |(name, sequence): (&str, &Sequence)| {
        let text = tokenizer.decode_all(&sequence.ids)?;
        let mut object = json!({"name": name, "ids": sequence.ids, "first": sequence.first, "text": text});
        if !sequence.unscored.is_empty() {
            object["unscored"] = sequence.unscored.iter().map(|range| json!([range.start, range.end])).collect();
        }
        Ok(object)
    };
    let sequences: Vec<Value> =
        names(example, dataset.form).into_iter().zip(&example.sequences).map(sequence).collect::<Result<_>>()?;
    let mut row = json!({
        "row": example.row,
        "line": dataset.place(example.row).number(),
        "sequences": sequences,
        "segments": batch.segments.iter().map(segment).collect::<Vec<_>>(),
        "positions": batch.positions,
    });
    if let Some(label) = example.label {
        row["label"] = label.into();
    }
    if let Some(margin) = example.margin {
        row["margin"] = margin.into();
    }
    Ok(row)
}

// ---- for people --------------------------------------------------------------------------------------------------

const BOLD: &str = "1";
const DIM: &str = "2";
const UNDERLINED: &str = "4";
const GREEN: &str = "32";
const RED: &str = "31";

/// The column at which text starts, and the one after which it is continued on the next line.
const MARGIN: usize = 12;
const WIDTH: usize = 110;

#[derive(Clone, Copy)]
struct Palette {
    on: bool,
}

impl Palette {
    fn paint(self, style: &str, text: &str) -> String {
        if self.on && !text.is_empty() { format!("\x1b[{style}m{text}\x1b[0m") } else { text.to_string() }
    }
}

/// A run of tokens with one meaning: a prompt, or what is scored of a sequence.
struct Part<'a> {
    label: &'a str,
    style: &'static str,
    ids: &'a [u32],
    pieces: &'a [Piece],
}

fn example_text(example: &Example, dataset: &Dataset, tokenizer: &Tokenizer, palette: Palette) -> String {
    let named: Vec<(&str, &Sequence)> = names(example, dataset.form).into_iter().zip(&example.sequences).collect();
    let pieces: Vec<Vec<Piece>> = example.sequences.iter().map(|sequence| tokenizer.pieces(&sequence.ids)).collect();
    let parts = parts(&named, &pieces);

    let counts: Vec<String> = parts.iter().map(|part| format!("{} {}", part.ids.len(), part.label)).collect();
    let heading = palette.paint(BOLD, &format!("row {}, {}", example.row, dataset.place(example.row)));
    let margin = example.margin.map_or_else(String::new, |margin| format!(", margin {margin}"));
    let mut out = format!("{heading}   {} tokens{margin}\n", counts.join(" + "));
    for part in &parts {
        tokens_of(part, palette, &mut out);
    }
    out.push('\n');
    for (i, part) in parts.iter().enumerate() {
        ids_of(part, if i == 0 { "ids" } else { "" }, palette, &mut out);
    }
    for (i, (name, sequence)) in named.iter().enumerate() {
        let label = if i == 0 { "mask" } else { "" };
        let _ = writeln!(out, "{label:<MARGIN$}{}   {name}", mask(sequence));
    }
    segments_of(&Batch::new([example], Sharing::On), &named, &mut out);
    out + "\n"
}

/// Runs of tokens that are not scored (0) and that are (1).
fn mask(sequence: &Sequence) -> String {
    let (mut out, mut start) = (format!("0 x {}", sequence.first), sequence.first);
    for between in &sequence.unscored {
        let _ = write!(out, ", 1 x {}, 0 x {}", between.start - start, between.len());
        start = between.end;
    }
    out + &format!(", 1 x {}", sequence.ids.len() - start)
}

/// The prompt once where all sequences have it, and what is scored of each.
fn parts<'a>(named: &[(&'a str, &'a Sequence)], pieces: &'a [Vec<Piece>]) -> Vec<Part<'a>> {
    let mut parts = Vec::new();
    let prompt = |i: usize| &named[i].1.ids[..named[i].1.first];
    for (i, ((label, sequence), pieces)) in named.iter().zip(pieces).enumerate() {
        let (before, scored) = pieces.split_at(sequence.first);
        if i == 0 || prompt(i) != prompt(0) {
            // The first token of a text is all that is not scored of it.
            let label = if *label == "text" { "start" } else { "prompt" };
            parts.push(Part { label, style: DIM, ids: prompt(i), pieces: before });
        }
        let style = if ["rejected", "undesirable"].contains(label) { RED } else { GREEN };
        let part = |label, style, range: Range<usize>| {
            let within = range.start - sequence.first..range.end - sequence.first;
            Part { label, style, ids: &sequence.ids[range], pieces: &scored[within] }
        };
        let mut start = sequence.first;
        for between in &sequence.unscored {
            parts.push(part(label, style, start..between.start));
            parts.push(part("unscored", DIM, between.clone()));
            start = between.end;
        }
        parts.push(part(label, style, start..sequence.ids.len()));
    }
    parts
}

/// The text of a part. Without colour a bar stands between two tokens, with it every second one is underlined.
fn tokens_of(part: &Part, palette: Palette, out: &mut String) {
    let mut line = Line::start(part.label, out);
    let bar = if palette.on { "" } else { "|" };
    for (i, piece) in part.pieces.iter().enumerate() {
        let shown = visible(&piece.text);
        if line.column + shown.chars().count() >= WIDTH {
            line.feed();
        }
        let underline = if i % 2 == 1 { UNDERLINED } else { "22" };
        let style = if piece.special { format!("{};{BOLD}", part.style) } else { part.style.to_string() };
        line.push(bar, &palette.paint(&format!("{underline};{style}"), &shown), shown.chars().count() + bar.len(), out);
        // The mark ends the token's last line; the line itself ends here.
        piece.text.matches('\n').for_each(|_| line.feed());
    }
    out.push('\n');
}

fn ids_of(part: &Part, label: &str, palette: Palette, out: &mut String) {
    let mut line = Line::start(label, out);
    for id in part.ids {
        let id = id.to_string();
        if line.column + id.len() >= WIDTH {
            line.feed();
        }
        line.push(" ", &palette.paint(part.style, &id), id.len() + 1, out);
    }
    out.push('\n');
}

/// Where the text stands.
struct Line {
    column: usize,
    /// Lines to begin before the next text: none that would stay empty at the end.
    pending: usize,
}

impl Line {
    fn start(label: &str, out: &mut String) -> Self {
        let _ = write!(out, "{label:<MARGIN$}");
        Self { column: MARGIN, pending: 0 }
    }

    fn feed(&mut self) {
        self.pending += 1;
        self.column = MARGIN;
    }

    /// Adds `text`, and before it `between` unless it is the first of its line. Both take `width` columns.
    fn push(&mut self, between: &str, text: &str, width: usize, out: &mut String) {
        if self.pending > 0 {
            out.push_str(&"\n".repeat(self.pending));
            out.push_str(&" ".repeat(MARGIN));
            self.pending = 0;
        } else if self.column > MARGIN {
            out.push_str(between);
        }
        out.push_str(text);
        self.column += width;
    }
}

/// A token's text with marks for what cannot be seen, or would move the cursor.
fn visible(text: &str) -> String {
    if text.is_empty() {
        // The character ends with a later token.
        return "\u{22ef}".to_string();
    }
    let blank = text.chars().all(|c| c == ' ');
    let mark = |c: char| match c {
        '\n' => "\u{21b5}".to_string(),
        '\t' => "\u{21e5}".to_string(),
        ' ' if blank => "\u{2423}".to_string(),
        c if c.is_control() => c.escape_default().to_string(),
        c => c.to_string(),
    };
    text.chars().map(mark).collect()
}

/// How the row is run: a prompt that completions share is run once.
fn segments_of(batch: &Batch, named: &[(&str, &Sequence)], out: &mut String) {
    let _ = writeln!(out, "{:<MARGIN$}{:<9}{:<12}{:<8}positions", "batch", "segment", "rows", "parent");
    let shared = batch.segments.len() > named.len();
    for (i, segment) in batch.segments.iter().enumerate() {
        let Segment { start, len, parent, position } = *segment;
        let (rows, positions) = (format!("{start}..{}", start + len), format!("{position}..{}", position + len));
        let parent = parent.map_or("-".to_string(), |parent| parent.to_string());
        let name = if shared && i == 0 { "prompt" } else { named[i - usize::from(shared)].0 };
        let _ = writeln!(out, "{:MARGIN$}{i:<9}{rows:<12}{parent:<8}{positions:<12}{name}", "");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colour_is_for_terminals_that_want_it() {
        let of = |choice, variables: &[(&str, &str)], terminal| {
            let variable =
                |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_string());
            colored(choice, variable, terminal)
        };
        assert!(of(Color::Auto, &[("TERM", "xterm"), ("NO_COLOR", "")], true) && of(Color::Auto, &[], true));
        assert!(!of(Color::Auto, &[], false) && !of(Color::Auto, &[("NO_COLOR", "1")], true));
        assert!(!of(Color::Auto, &[("TERM", "dumb")], true) && !of(Color::Never, &[], true));
        assert!(of(Color::Always, &[("NO_COLOR", "1")], false));
    }

    #[test]
    fn nothing_in_a_text_moves_the_cursor() {
        assert_eq!(visible(" a\n\n"), " a\u{21b5}\u{21b5}");
        assert_eq!(visible("  "), "\u{2423}\u{2423}");
        assert_eq!(visible("\u{1b}[2J\r\t"), "\\u{1b}[2J\\r\u{21e5}");
        assert_eq!(visible(""), "\u{22ef}");
    }

    #[test]
    fn long_lines_go_on_below() {
        let piece = |text: &str| Piece { text: text.into(), special: false };
        let pieces: Vec<Piece> = (0..40).map(|_| piece("word")).chain([piece("\n\n"), piece("end\n")]).collect();
        let ids = vec![7; pieces.len()];
        let part = Part { label: "text", style: DIM, ids: &ids, pieces: &pieces };
        let mut out = String::new();
        tokens_of(&part, Palette { on: false }, &mut out);
        let lines: Vec<&str> = out.lines().collect();
        assert!(lines.len() == 5 && lines.iter().all(|line| line.chars().count() <= WIDTH), "{out}");
        assert!(lines[0].starts_with("text        word|word|") && lines[1].starts_with("            word|"), "{out}");
        assert_eq!((lines[3], lines[4]), ("", "            end\u{21b5}"));
    }
}
