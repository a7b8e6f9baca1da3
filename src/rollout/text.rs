//! The text of a completion while it grows, in pieces that are final.

use super::before_stop;
use crate::data::Tokenizer;
use crate::error::Result;

/// What was decoded of a completion, without special tokens, and how much of it was given away. A piece ends between two
/// characters, and before anything that a stop string may begin with.
#[derive(Default)]
pub struct Text {
    text: String,
    /// Bytes that were given away.
    given: usize,
    /// Tokens before `read` are in `text`; those from `start` on are decoded again with the next ones, since what a token adds
    /// depends on the one before it.
    start: usize,
    read: usize,
}

impl Text {
    /// Of what comes after tokens that are known: the first `read` of the ids that it is given.
    pub fn after(read: usize) -> Self {
        Self { read, ..Self::default() }
    }

    /// Everything so far, stop strings included.
    pub fn whole(&self) -> &str {
        &self.text
    }

    /// The piece that the newest of `ids` completes, often nothing.
    pub fn grow(&mut self, tokenizer: &Tokenizer, ids: &[u32], stop: &[String]) -> Result<String> {
        self.decode(tokenizer, ids, false)?;
        let safe = self.text.len() - longest_start(&self.text[self.given..], stop);
        Ok(self.give(safe))
    }

    /// What is left of a completion that ended: up to the first stop string.
    pub fn end(&mut self, tokenizer: &Tokenizer, ids: &[u32], stop: &[String]) -> Result<String> {
        self.decode(tokenizer, ids, true)?;
        Ok(self.give(before_stop(&self.text, stop).len()))
    }

    fn decode(&mut self, tokenizer: &Tokenizer, ids: &[u32], last: bool) -> Result<()> {
        let known = tokenizer.decode(&ids[self.start..self.read])?;
        let all = tokenizer.decode(&ids[self.start..])?;
        // A character of several tokens is not there yet.
        if (last || !all.ends_with(char::REPLACEMENT_CHARACTER)) && all.len() > known.len() {
            self.text += all.get(known.len()..).unwrap_or_default();
            (self.start, self.read) = (self.read, ids.len());
        }
        Ok(())
    }

    fn give(&mut self, end: usize) -> String {
        let piece = self.text[self.given..].get(..end.saturating_sub(self.given)).unwrap_or_default().to_string();
        self.given += piece.len();
        piece
    }
}

/// Bytes at the end of `text` with which one of `stop`, or all of it, begins.
fn longest_start(text: &str, stop: &[String]) -> usize {
    let starts = |at: &usize| stop.iter().any(|stop| !stop.is_empty() && starts_either(&text[*at..], stop));
    let first = text.char_indices().map(|(at, _)| at).find(starts);
    first.map_or(0, |at| text.len() - at)
}

/// One begins with the other.
fn starts_either(a: &str, b: &str) -> bool {
    a.starts_with(b) || b.starts_with(a)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn tokenizer() -> Tokenizer {
        Tokenizer::load(Path::new("assets/review-llama-656k")).unwrap()
    }

    /// The pieces of a text that comes token by token.
    fn pieces(ids: &[u32], stop: &[String]) -> Vec<String> {
        let (tokenizer, mut text) = (tokenizer(), Text::default());
        let mut pieces: Vec<String> =
            (1..ids.len()).map(|end| text.grow(&tokenizer, &ids[..end], stop).unwrap()).collect();
        pieces.push(text.end(&tokenizer, ids, stop).unwrap());
        pieces
    }

    #[test]
    fn pieces_make_the_text_and_cut_no_character() {
        let tokenizer = tokenizer();
        for text in ["The film was good, I think.", " caf\u{e9} \u{1f600}\u{1f600} \u{65e5}\u{672c}", "a\n\n  b\t", ""]
        {
            let ids = tokenizer.encode_plain(text).unwrap();
            if ids.is_empty() {
                continue;
            }
            let pieces = pieces(&ids, &[]);
            assert_eq!(pieces.concat(), tokenizer.decode(&ids).unwrap(), "{text:?}");
            assert!(pieces.iter().all(|piece| !piece.contains(char::REPLACEMENT_CHARACTER)), "{pieces:?}");
        }
        // What never becomes a character is shown as such at the end.
        let ids = tokenizer.encode_plain("\u{1f600}").unwrap();
        assert!(ids.len() > 1, "the character has several tokens");
        assert!(pieces(&ids[..ids.len() - 1], &[]).concat().ends_with(char::REPLACEMENT_CHARACTER));
    }

    /// As Llama's first tokenizers write them: a text's first blank belongs to no word.
    #[test]
    fn a_text_goes_on_behind_its_prompt_with_a_blank() {
        let dir = tempfile::tempdir().unwrap();
        let json = serde_json::json!({
            "version": "1.0",
            "model": {"type": "WordLevel", "unk_token": "<unk>", "vocab": {"<unk>": 0, "\u{2581}was": 1, "\u{2581}good": 2, ".": 3}},
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ]},
        });
        std::fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
        let tokenizer = Tokenizer::load(dir.path()).unwrap();
        let ids = [1, 2, 1, 3];
        let mut alone = Text::default();
        assert_eq!(alone.end(&tokenizer, &ids[1..], &[]).unwrap(), "good was.");
        let mut behind = Text::after(1);
        let mut grown: String = (2..4).map(|end| behind.grow(&tokenizer, &ids[..end], &[]).unwrap()).collect();
        grown += &behind.end(&tokenizer, &ids, &[]).unwrap();
        assert_eq!((&*grown, behind.whole()), (" good was.", " good was."));
    }

    #[test]
    fn no_piece_reaches_into_a_stop_string() {
        let ids = tokenizer().encode_plain("one two three four").unwrap();
        let stop = |text: &str| vec![text.to_string()];
        for (text, expected) in [
            ("three", "one two "),
            ("two thr", "one "),
            ("twx", "one two three four"),
            ("four!", "one two three four"),
            ("", "one two three four"),
            ("one", ""),
        ] {
            assert_eq!(pieces(&ids, &stop(text)).concat(), expected, "{text:?}");
        }
        assert_eq!(longest_start("abab", &stop("abc")), 2);
        assert_eq!(longest_start("xabcx", &stop("abc")), 4);
        assert_eq!(longest_start("xyz", &stop("abc")), 0);
    }
}
