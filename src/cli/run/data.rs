//! `[data.NAME]`: rows of a file in an order of their own, from one to another, perhaps as prompts.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Value as Json, json};
use toml::Value;

use crate::checkpoint::write_file;
use crate::cli::recipe::clean;
use crate::data::{Object, epoch_order, read_objects};
use crate::device::Philox;
use crate::error::{At, Error, Result};

/// The stream of the seed.
const SHUFFLE: &str = "data";

/// Rows by name. `file` is read, put in the order of `shuffle_seed`, then `skip` rows are left out and `take` kept.
#[derive(Clone, Debug, PartialEq)]
pub struct Slice {
    pub name: String,
    /// A file, or another of these before it.
    pub from: From,
    shuffle_seed: Option<u64>,
    skip: usize,
    take: Option<usize>,
    prompts: Option<Prompts>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum From {
    File(PathBuf),
    Slice(usize),
}

/// Cuts `column` behind so many words, which become the end of the prompt; the rest is its completion. What has fewer than twice as
/// many words is left out, and a prompt that was there before.
#[derive(Clone, Debug, PartialEq)]
struct Prompts {
    words: usize,
    column: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Keys {
    file: String,
    shuffle_seed: Option<u64>,
    #[serde(default)]
    skip: usize,
    take: Option<usize>,
    prompt_words: Option<usize>,
    column: Option<String>,
}

impl Slice {
    /// `folder` is where its path starts, `before` those that it may read.
    pub fn of(name: &str, table: &Value, folder: &Path, before: &[Self]) -> Result<Self, String> {
        let keys: Keys = table.clone().try_into().map_err(|e: toml::de::Error| e.message().to_string())?;
        let from = match keys.file.strip_prefix('@') {
            None => From::File(clean(&folder.join(&keys.file))),
            Some(other) => match before.iter().position(|slice| slice.name == other) {
                Some(at) => From::Slice(at),
                None => return Err(format!("file: there is no [data.{other}] above it")),
            },
        };
        let prompts = match (keys.prompt_words, keys.column) {
            (None, None) => None,
            (Some(words @ 1..), column) => Some(Prompts { words, column: column.unwrap_or("completion".into()) }),
            (Some(0), _) => return Err("prompt_words: expected 1 or more, found 0".into()),
            (None, Some(_)) => return Err("column: does nothing without prompt_words".into()),
        };
        let Keys { shuffle_seed, skip, take, .. } = keys;
        Ok(Self { name: name.to_string(), from, shuffle_seed, skip, take, prompts })
    }

    /// Its rows, of those that it is made of.
    fn rows(&self, mut rows: Vec<Object>) -> Result<Vec<Object>, String> {
        if let Some(seed) = self.shuffle_seed {
            let random = Philox::named(seed, SHUFFLE);
            let order = epoch_order(rows.len(), true, &mut |i| random.u64(i));
            let mut taken: Vec<Option<Object>> = rows.into_iter().map(Some).collect();
            rows = order.iter().map(|at| taken[*at].take().expect("each is once in it")).collect();
        }
        let (all, wanted) = (rows.len(), self.skip + self.take.unwrap_or(1));
        if all < wanted {
            return Err(format!("has {all} rows, and skip and take ask for {wanted}"));
        }
        let mut rows: Vec<Object> = rows.into_iter().skip(self.skip).take(self.take.unwrap_or(all)).collect();
        if let Some(prompts) = &self.prompts {
            rows = prompts.of(&rows)?;
        }
        Ok(rows)
    }
}

impl Prompts {
    fn of(&self, rows: &[Object]) -> Result<Vec<Object>, String> {
        let mut cut: Vec<Object> = Vec::new();
        let mut seen = std::collections::HashSet::new();
        for row in rows {
            let text = |column: &str| row.get(column).and_then(Json::as_str);
            let missing = || format!("a row has no text {:?}", self.column);
            let (before, whole) = (text("prompt").unwrap_or_default(), text(&self.column).ok_or_else(missing)?);
            let Some(end) =
                end_of_word(whole, self.words).filter(|_| whole.split_whitespace().count() >= 2 * self.words)
            else {
                continue;
            };
            let prompt = format!("{before}{}", &whole[..end]);
            if seen.insert(prompt.clone()) {
                let row = json!({"prompt": prompt, "completion": whole[end..]});
                cut.push(row.as_object().expect("it is one").clone());
            }
        }
        if cut.is_empty() {
            return Err(format!("no {:?} has {} words or more, to be cut in two", self.column, 2 * self.words));
        }
        Ok(cut)
    }
}

/// Where the n-th word of a text ends, counted from 1.
fn end_of_word(text: &str, n: usize) -> Option<usize> {
    let (mut words, mut inside) = (0, false);
    for (at, c) in text.char_indices() {
        if inside && c.is_whitespace() {
            words += 1;
            if words == n {
                return Some(at);
            }
        }
        inside = !c.is_whitespace();
    }
    None
}

/// A slice on disk, or about to be.
pub struct Sliced {
    pub path: PathBuf,
    text: String,
}

impl Sliced {
    /// Of its content.
    pub fn hash(&self) -> String {
        blake3::hash(self.text.as_bytes()).to_hex()[..16].to_string()
    }

    pub fn rows(&self) -> usize {
        self.text.lines().count()
    }

    /// Writes it, unless it is there already.
    pub fn write(&self) -> Result<()> {
        if fs::read_to_string(&self.path).is_ok_and(|found| found == self.text) {
            return Ok(());
        }
        let folder = self.path.parent().expect("it lies in the folder for data");
        fs::create_dir_all(folder).at(folder)?;
        write_file(&self.path, |out| out.write_all(self.text.as_bytes()))
    }
}

/// All slices, each for a file in `folder`; nothing is written.
pub fn slice(slices: &[Slice], folder: &Path) -> Result<Vec<Sliced>> {
    let mut all: Vec<Vec<Object>> = Vec::new();
    let mut sliced = Vec::new();
    for slice in slices {
        let (rows, source) = match &slice.from {
            From::File(path) => (read_objects(path)?.into_iter().map(|(_, row)| row).collect(), path.clone()),
            From::Slice(at) => (all[*at].clone(), PathBuf::from(format!("[data.{}]", slice.name))),
        };
        let rows =
            slice.rows(rows).map_err(|detail| Error::file(source, format!("[data.{}]: {detail}", slice.name)))?;
        let text: String = rows.iter().map(|row| format!("{}\n", Json::Object(row.clone()))).collect();
        all.push(rows);
        sliced.push(Sliced { path: folder.join(format!("{}.jsonl", slice.name)), text });
    }
    Ok(sliced)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slice_of(keys: &str) -> Result<Slice, String> {
        Slice::of("x", &Value::Table(keys.parse().unwrap()), Path::new("recipes"), &[])
    }

    fn rows(n: usize) -> Vec<Object> {
        let row =
            |i: usize| json!({"prompt": "P:", "chosen": format!(" w{i} b c  d e f")}).as_object().unwrap().clone();
        (0..n).map(row).collect()
    }

    #[test]
    fn parts_of_one_order_share_no_row() {
        let part =
            |keys: &str| slice_of(&format!("file = 'f'\nshuffle_seed = 0\n{keys}")).unwrap().rows(rows(10)).unwrap();
        let (first, rest) = (part("take = 4"), part("skip = 4"));
        assert_eq!((first.len(), rest.len()), (4, 6));
        assert!(first.iter().all(|row| !rest.contains(row)) && first != rows(4));
        assert_eq!(part("take = 4"), first);
        let message = slice_of("file = 'f'\nskip = 8\ntake = 3").unwrap().rows(rows(10)).unwrap_err();
        assert!(message.contains("has 10 rows, and skip and take ask for 11"), "{message}");
    }

    #[test]
    fn words_become_prompts() {
        let slice = slice_of("file = 'f'\nprompt_words = 3\ncolumn = 'chosen'").unwrap();
        let cut = slice.rows(rows(2)).unwrap();
        assert_eq!((cut[1]["prompt"].as_str(), cut[1]["completion"].as_str()), (Some("P: w1 b c"), Some("  d e f")));
        let short = json!({"chosen": "a b c d e"}).as_object().unwrap().clone();
        assert!(slice.rows(vec![short]).unwrap_err().contains("has 6 words or more"));
        assert_eq!((end_of_word("a b", 2), end_of_word("a b ", 2), end_of_word(" a", 1)), (None, Some(3), None));
        // A prompt is asked once.
        assert_eq!(slice.rows([rows(1), rows(1)].concat()).unwrap().len(), 1);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (keys, expected) in [
            ("skip = 1", "missing field `file`"),
            ("file = 'f'\nshufle_seed = 1", "unknown field `shufle_seed`"),
            ("file = '@y'", "there is no [data.y] above it"),
            ("file = 'f'\nprompt_words = 0", "expected 1 or more"),
            ("file = 'f'\ncolumn = 'a'", "does nothing without prompt_words"),
        ] {
            let message = slice_of(keys).unwrap_err();
            assert!(message.contains(expected), "{keys}: {message}");
        }
    }
}
