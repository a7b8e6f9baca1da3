//! Small JSON files: configs, indices, markers.

use std::fs;
use std::path::Path;

use serde::Serialize;
use serde_json::Value;

use super::atomic::write_file;
use crate::error::{At, Error, Result};

/// Reads a JSON file. What is not JSON is named with its line and column.
pub fn read_json(path: &Path) -> Result<Value> {
    let bytes = fs::read(path).at(path)?;
    serde_json::from_slice(&bytes).map_err(|e| Error::file(path, format!("is not valid JSON: {e}")))
}

/// Writes `value` indented, with a final newline, atomically.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_vec_pretty(value).at(path)?;
    text.push(b'\n');
    write_file(path, |out| out.write_all(&text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn values_survive_and_keep_their_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        let value = json!({"z": 1e-5, "a": [1, null, "é"], "eps": 9.999999747378752e-6});
        write_json(&path, &value).unwrap();
        assert_eq!(read_json(&path).unwrap(), value);
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.find("\"z\"") < text.find("\"a\"") && text.ends_with("}\n"), "{text}");
    }

    #[test]
    fn errors_name_file_line_and_column() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        assert!(read_json(&path).unwrap_err().to_string().contains("config.json: "));
        fs::write(&path, "{\n  \"a\": 1,\n}").unwrap();
        let error = read_json(&path).unwrap_err().to_string();
        assert!(error.contains("config.json: is not valid JSON: ") && error.ends_with("line 3 column 1"), "{error}");
    }
}
