//! Objects of a file, however it lists them: JSON lines, one JSON array, Parquet or CSV.

use std::io::{ErrorKind, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use parquet::errors::ParquetError;
use parquet::file::reader::{ChunkReader, FileReader, SerializedFileReader};
use parquet::record::Field;
use rayon::prelude::*;
use serde_json::{Map, Value};

use super::conversation::kind;
use crate::error::{At, Error, Place, Result};

pub type Object = Map<String, Value>;

/// The objects of a file in order, each with its place, not yet parsed where they are lines.
pub(super) struct Records {
    path: PathBuf,
    rows: Rows,
}

enum Rows {
    /// The bytes of a file of JSON lines.
    Lines(Vec<u8>),
    Objects(Vec<Object>),
}

impl Records {
    /// Reads a whole file: Parquet and gzip are told by content, CSV (`.csv`, `.tsv`, perhaps with `.gz`) by name.
    ///
    /// # Errors
    /// Where it cannot be read, or is damaged; not for a line that is no object.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = read_bytes(path)?;
        let rows = if bytes.starts_with(b"PAR1") {
            Rows::Objects(parquet(bytes).map_err(parquet_error).at(path)?)
        } else if let Some(delimiter) = delimiter(path) {
            Rows::Objects(csv(&bytes, delimiter).at(path)?)
        } else if bytes.trim_ascii_start().starts_with(b"[") {
            Rows::Objects(array(&bytes, path)?)
        } else {
            Rows::Lines(bytes)
        };
        Ok(Self { path: path.to_path_buf(), rows })
    }

    /// # Errors
    /// Where there is none, or it is no object.
    pub fn first(&self) -> Result<(Place, Object)> {
        let first = match &self.rows {
            Rows::Lines(bytes) => lines(bytes).next().map(|(at, text)| (at, parse_object(text))),
            Rows::Objects(objects) => objects.first().map(|object| (Place::Record(1), Ok(object.clone()))),
        };
        let Some((at, object)) = first else { return Err(no_rows(&self.path)) };
        Ok((at, object.map_err(|detail| self.error(at, detail))?))
    }

    /// What `read` makes of each, in parallel; there is at least one.
    ///
    /// # Errors
    /// The first by its place, whatever the number of threads: of a line that is no object, or of `read`.
    pub fn each<T: Send>(self, read: impl Fn(Object) -> Result<T, String> + Sync) -> Result<Vec<(Place, T)>> {
        let found: Vec<(Place, Result<T, String>)> = match self.rows {
            Rows::Lines(ref bytes) => {
                let lines: Vec<_> = lines(bytes).collect();
                lines.into_par_iter().map(|(at, text)| (at, parse_object(text).and_then(&read))).collect()
            }
            Rows::Objects(objects) => objects
                .into_par_iter()
                .enumerate()
                .map(|(index, object)| (Place::Record(index + 1), read(object)))
                .collect(),
        };
        if found.is_empty() {
            return Err(no_rows(&self.path));
        }
        let error = |at, detail| Error::Row { path: self.path.clone(), at, detail };
        found.into_iter().map(|(at, row)| Ok((at, row.map_err(|detail| error(at, detail))?))).collect()
    }

    pub fn error(&self, at: Place, detail: String) -> Error {
        Error::Row { path: self.path.clone(), at, detail }
    }
}

/// All objects of a file of JSON lines, of one JSON array (both plain or gzip), of Parquet or of CSV, with whatever columns. Blank
/// lines are ignored.
///
/// # Errors
/// Names the file, the line or record (from 1) and what is wrong there: the first bad one.
pub fn read_objects(path: &Path) -> Result<Vec<(Place, Object)>> {
    Records::read(path)?.each(Ok)
}

/// The lines that are not blank.
fn lines(bytes: &[u8]) -> impl Iterator<Item = (Place, &[u8])> {
    let lines = bytes.split(|&byte| byte == b'\n').map(<[u8]>::trim_ascii);
    (1..).map(Place::Line).zip(lines).filter(|(_, text)| !text.is_empty())
}

fn no_rows(path: &Path) -> Error {
    Error::file(path, "has no rows; expected one JSON object on every line, or Parquet")
}

/// The whole file, decompressed, without the byte order mark that some editors write.
fn read_bytes(path: &Path) -> Result<Vec<u8>> {
    if path.is_dir() {
        return Err(Error::file(path, "is a folder; name one of the files in it"));
    }
    let mut bytes = std::fs::read(path).map_err(|e| format!("cannot be read: {e}")).at(path)?;
    if bytes.starts_with(&[0x1f, 0x8b]) {
        let mut plain = Vec::new();
        flate2::read::MultiGzDecoder::new(bytes.as_slice())
            .read_to_end(&mut plain)
            .map_err(|e| match e.kind() {
                ErrorKind::UnexpectedEof => "the gzip data ends early; copy or download the file again".to_string(),
                _ => format!("the gzip data is damaged ({e}); copy or download the file again"),
            })
            .at(path)?;
        bytes = plain;
    }
    if bytes.starts_with(b"\xef\xbb\xbf") {
        bytes.drain(..3);
    }
    Ok(bytes)
}

fn parse_object(text: &[u8]) -> Result<Object, String> {
    let text = std::str::from_utf8(text)
        .map_err(|e| format!("invalid UTF-8 at byte {}; expected JSON lines, plain or gzip", e.valid_up_to() + 1))?;
    let value = serde_json::from_str(text).map_err(|e| {
        // serde_json counts lines within this one line of the file: its "at line 1" would mislead.
        format!("invalid JSON at column {}: {}; every line must be one JSON object", e.column(), reason(&e))
    })?;
    object(value)
}

/// What serde_json says, without where.
fn reason(error: &serde_json::Error) -> String {
    let message = error.to_string();
    message.rsplit_once(" at line ").map_or(message.clone(), |(what, _)| what.to_string())
}

fn object(value: Value) -> Result<Object, String> {
    match value {
        Value::Object(object) => Ok(object),
        other => Err(format!("found {}, expected a JSON object", kind(&other))),
    }
}

/// One list of objects, over as many lines as it likes.
fn array(bytes: &[u8], path: &Path) -> Result<Vec<Object>> {
    let broken = |e: serde_json::Error| Error::Row {
        path: path.to_path_buf(),
        at: Place::Line(e.line()),
        detail: format!("invalid JSON at column {}: {}; the file begins as a list of objects", e.column(), reason(&e)),
    };
    let values: Vec<Value> = serde_json::from_slice(bytes).map_err(broken)?;
    let object = |(index, value)| {
        object(value).map_err(|detail| Error::Row { path: path.to_path_buf(), at: Place::Record(index), detail })
    };
    (1..).zip(values).map(object).collect()
}

/// All row groups, each by one thread.
fn parquet(bytes: Vec<u8>) -> Result<Vec<Object>, ParquetError> {
    let reader = SerializedFileReader::new(bytes::Bytes::from(bytes))?;
    let group = |group| {
        // The reader panics on some values, dates beyond its calendar for one.
        let read = catch_unwind(AssertUnwindSafe(|| row_group(&reader, group)));
        read.unwrap_or_else(|_| Err(ParquetError::General("a value that its reader cannot hold".into())))
    };
    let groups: Vec<Vec<Object>> = (0..reader.num_row_groups()).into_par_iter().map(group).collect::<Result<_, _>>()?;
    Ok(groups.into_iter().flatten().collect())
}

fn row_group<R: ChunkReader + 'static>(
    reader: &SerializedFileReader<R>,
    group: usize,
) -> Result<Vec<Object>, ParquetError> {
    let group = reader.get_row_group(group)?;
    let object = |row: Result<parquet::record::Row, ParquetError>| {
        let columns = row?.into_columns().into_iter();
        Ok(columns.map(|(column, field)| (column, value(field))).collect())
    };
    group.get_row_iter(None)?.map(object).collect()
}

/// Bytes are text where they can be; an image is null.
fn value(field: Field) -> Value {
    match field {
        Field::Bytes(bytes) => std::str::from_utf8(bytes.data()).map_or(Value::Null, Value::from),
        other => without_nulls(other.to_json_value()),
    }
}

/// A column of structs gives every row every key that any row has, null where it had none: a message without `tool_calls` would
/// have some. TRL removes them too.
fn without_nulls(value: Value) -> Value {
    match value {
        Value::Array(items) => Value::Array(items.into_iter().map(without_nulls).collect()),
        Value::Object(fields) => {
            let given = fields.into_iter().filter(|(_, value)| !value.is_null());
            Value::Object(given.map(|(key, value)| (key, without_nulls(value))).collect())
        }
        other => other,
    }
}

fn parquet_error(error: ParquetError) -> String {
    let what = error.to_string();
    match error {
        ParquetError::NYI(_) => format!("is Parquet of a kind that is not read ({what})"),
        ParquetError::General(what) if what.starts_with("Disabled feature") => {
            format!(
                "is Parquet that is compressed in a way that is not read ({what}); write it with snappy, gzip or zstd"
            )
        }
        _ => format!("the Parquet data is damaged ({what}); copy or download the file again"),
    }
}

/// What separates the cells, if the name says that the file is such a table.
fn delimiter(path: &Path) -> Option<u8> {
    let name = path.file_name()?.to_str()?.to_ascii_lowercase();
    let name = name.strip_suffix(".gz").unwrap_or(&name);
    [(".csv", b','), (".tsv", b'\t')].into_iter().find(|(end, _)| name.ends_with(end)).map(|(_, delimiter)| delimiter)
}

/// Columns that are no text; an empty cell of theirs is null.
const NUMBERS: [&str; 2] = ["label", "margin"];

/// The first line names the columns.
fn csv(bytes: &[u8], delimiter: u8) -> Result<Vec<Object>, String> {
    let broken = |e: csv::Error| format!("is no table of one line of names and then rows: {e}");
    let mut reader = csv::ReaderBuilder::new().delimiter(delimiter).from_reader(bytes);
    let names = reader.headers().map_err(broken)?.clone();
    let rows: Vec<csv::StringRecord> = reader.records().collect::<Result<_, _>>().map_err(broken)?;
    let cell = |(name, cell): (&str, &str)| {
        let value = if NUMBERS.contains(&name) { number_or_bool(cell) } else { Value::from(cell) };
        (name.to_string(), value)
    };
    Ok(rows.iter().map(|row| names.iter().zip(row).map(cell).collect()).collect())
}

/// As pandas writes them, too. What is neither is left for the reader of the row to refuse.
fn number_or_bool(cell: &str) -> Value {
    match cell {
        "" => Value::Null,
        "True" => true.into(),
        "False" => false.into(),
        _ => serde_json::from_str(cell).unwrap_or(Value::from(cell)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const DATA: &str = "tests/data/parquet";

    fn named(name: &str, content: impl AsRef<[u8]>) -> Result<Vec<(Place, Object)>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        read_objects(&path)
    }

    fn values(rows: Vec<(Place, Object)>) -> Vec<Value> {
        rows.into_iter().map(|(_, row)| Value::Object(row)).collect()
    }

    #[track_caller]
    fn fails(found: Result<Vec<(Place, Object)>>, part: &str) {
        let message = found.unwrap_err().to_string();
        assert!(message.contains(part), "{message:?} lacks {part:?}");
    }

    #[test]
    fn parquet_has_the_rows_of_its_json_lines() {
        let parquet = |name| read_objects(&Path::new(DATA).join(name)).unwrap();
        let pairs = parquet("pairs-snappy.parquet");
        let lines = read_objects(Path::new("assets/film-reviews/heldout.jsonl.gz")).unwrap();
        // Three row groups.
        assert_eq!(pairs.len(), 60);
        assert_eq!((pairs[0].0, pairs[59].0), (Place::Record(1), Place::Record(60)));
        assert_eq!(values(pairs), values(lines)[..60]);
        let chats = values(read_objects(&Path::new(DATA).join("chats.jsonl")).unwrap());
        for name in ["chats-zstd.parquet", "chats-gzip.parquet"] {
            assert_eq!(values(parquet(name)), chats, "{name}");
        }
    }

    #[test]
    fn parquet_that_cannot_be_read_says_why() {
        let read = |name: &str| read_objects(&Path::new(DATA).join(name));
        fails(read("pairs-lz4.parquet"), "write it with snappy, gzip or zstd");
        fails(read("empty.parquet"), "has no rows");
        fails(read("dates.parquet"), "a value that its reader cannot hold");
        assert_eq!(values(read("bytes.parquet").unwrap()), [json!({"text": "grün", "image": null})]);
        let whole = std::fs::read(Path::new(DATA).join("pairs-snappy.parquet")).unwrap();
        for len in [4, 12, 100, whole.len() / 2, whole.len() - 1] {
            fails(named("rows.parquet", &whole[..len]), "the Parquet data is damaged");
        }
    }

    /// Whatever is wrong with it, a file is an error or has other rows; it does not end the process.
    #[test]
    fn damaged_parquet_does_not_panic() {
        for name in ["pairs-snappy.parquet", "chats-zstd.parquet", "chats-gzip.parquet"] {
            let whole = std::fs::read(Path::new(DATA).join(name)).unwrap();
            let step = whole.len() / 400 + 1;
            for at in (4..whole.len()).step_by(step) {
                let mut broken = whole.clone();
                broken[at] ^= 0x55;
                let _ = named("rows.parquet", &broken);
            }
        }
    }

    #[test]
    fn arrays_are_lists_of_rows_over_any_lines() {
        let rows = named("rows.json", "\u{feff} [\n {\"text\": \"a\"},\n\n {\n\"text\": \"b\"}\n]\n").unwrap();
        assert_eq!(rows[1].0, Place::Record(2));
        assert_eq!(values(rows), [json!({"text": "a"}), json!({"text": "b"})]);
        fails(
            named("rows.json", "[{\"text\": \"a\"}, 3]"),
            "rows.json, record 2: found a number, expected a JSON object",
        );
        fails(
            named("rows.json", "[\n{\"text\": \"a\"},\n{\"text\": }]"),
            "rows.json, line 3: invalid JSON at column 10",
        );
        fails(named("rows.json", "[{\"text\": \"a\"}"), "the file begins as a list of objects");
        fails(named("rows.json", "[]"), "has no rows");
    }

    #[test]
    fn tables_hold_text_but_for_labels_and_margins() {
        let table = "prompt,completion,label,margin\n\"Is it, \"\"good\"\"?\",7,True,\nb,\"two\nlines\",False,1\n";
        let expected = [
            json!({"prompt": "Is it, \"good\"?", "completion": "7", "label": true, "margin": null}),
            json!({"prompt": "b", "completion": "two\nlines", "label": false, "margin": 1}),
        ];
        let rows = named("rows.csv", table).unwrap();
        assert_eq!(rows[1].0, Place::Record(2));
        assert_eq!(values(rows), expected);
        let tabs = "prompt\tmargin\na\t0.5\nb\t-2\n";
        let expected = [json!({"prompt": "a", "margin": 0.5}), json!({"prompt": "b", "margin": -2})];
        assert_eq!(values(named("rows.TSV", tabs).unwrap()), expected);
        fails(named("rows.csv", "a,b\n1\n"), "found record with 1 fields");
        fails(named("rows.csv", "a,b\n"), "has no rows");
        fails(named("rows.csv", b"text\n\xff\n"), "invalid utf-8");
    }

    #[test]
    fn a_folder_is_no_file() {
        fails(read_objects(Path::new("assets")), "assets: is a folder; name one of the files in it");
    }
}
