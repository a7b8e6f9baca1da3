//! Where a model comes from: every folder of weights that cuvee writes carries `cuvee_lineage.json`, which says what made
//! it, of which parents, with which data. The lineage of each parent is embedded, so that the tree survives its folders.
//! What is not known is absent.

use std::fmt::Write;
use std::fs::{self, File};
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::checkpoint::Weights;
use crate::checkpoint::json::{read_json, write_json};
use crate::checkpoint::peft::{self, AdapterFile};
use crate::error::{At, Error, Result};

pub const FILE: &str = "cuvee_lineage.json";
/// Of the format. A reader refuses what is newer.
const FORMAT: u32 = 1;

/// What made a folder of weights.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Lineage {
    format: u32,
    /// `train`, `merge`, `merge adapters`, ...
    pub command: String,
    /// Of cuvee.
    pub version: String,
    /// Name of the folder that was written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// [`content_hash`] of the folder that was written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hash: Option<String>,
    /// What decided the result beside parents and data.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub arguments: Map<String, Value>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parents: Vec<Parent>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub data: Vec<Data>,
}

/// A folder of weights that something was made of.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Parent {
    /// `model`, `ref`, `base`, `adapter`, ...
    pub role: String,
    /// The folder's, without the way to it.
    pub name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hash: Option<String>,
    /// How much it counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<f64>,
    /// As its README.md or LICENSE says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub license: Option<String>,
    /// Its own, where it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lineage: Option<Box<Lineage>>,
    /// Its weights were others than its lineage says.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub altered: bool,
}

/// A file that was trained or measured on.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Data {
    /// `dataset`, `eval_dataset`, ...
    pub role: String,
    /// The file's, without the way to it.
    pub name: String,
    /// blake3 of the file, as `b3sum` prints it.
    pub hash: String,
    /// In the file.
    pub rows: usize,
}

impl Parent {
    /// Reads a model's or an adapter's folder: all weights once, for the hash.
    pub fn open(role: &str, dir: &Path) -> Result<Self> {
        let hash = content_hash(dir)?;
        let lineage = Lineage::read(dir)?.map(Box::new);
        let altered = lineage.as_ref().is_some_and(|lineage| lineage.hash.as_ref() != Some(&hash));
        Ok(Self { license: license(dir), lineage, altered, ..Self::named(role, dir, Some(hash)) })
    }

    /// Of what is no such folder: a config whose weights were drawn, a cache of what a model said.
    pub fn named(role: &str, path: &Path, hash: Option<String>) -> Self {
        let (role, name) = (role.to_string(), name_of(path));
        Self { role, name, hash, weight: None, license: None, lineage: None, altered: false }
    }

    pub fn weighted(self, weight: f64) -> Self {
        Self { weight: Some(weight), ..self }
    }
}

impl Lineage {
    /// Of what `command` makes.
    pub fn of(command: &str) -> Self {
        Self {
            format: FORMAT,
            command: command.to_string(),
            version: env!("CARGO_PKG_VERSION").to_string(),
            name: None,
            hash: None,
            arguments: Map::new(),
            parents: Vec::new(),
            data: Vec::new(),
        }
    }

    pub fn with_argument(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.arguments.insert(name.to_string(), value.into());
        self
    }

    pub fn with_arguments(mut self, arguments: Map<String, Value>) -> Self {
        self.arguments.extend(arguments);
        self
    }

    pub fn with_parent(mut self, parent: Parent) -> Self {
        self.parents.push(parent);
        self
    }

    pub fn with_parents(mut self, parents: impl IntoIterator<Item = Parent>) -> Self {
        self.parents.extend(parents);
        self
    }

    /// Adds a data file of so many rows, which is read once for its hash.
    pub fn with_data(mut self, role: &str, path: &Path, rows: usize) -> Result<Self> {
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(File::open(path).at(path)?).at(path)?;
        let hash = hasher.finalize().to_hex().to_string();
        self.data.push(Data { role: role.to_string(), name: name_of(path), hash, rows });
        Ok(self)
    }

    /// Writes the lineage of the weights that `dir` now holds beside them; `name` is the folder's where `dir` is one under a
    /// temporary name.
    pub fn write_as(&self, name: &Path, dir: &Path) -> Result<()> {
        let lineage = Self { name: Some(name_of(name)), hash: Some(content_hash(dir)?), ..self.clone() };
        write_json(&dir.join(FILE), &lineage)
    }

    pub fn write(&self, dir: &Path) -> Result<()> {
        self.write_as(dir, dir)
    }

    /// The lineage of a folder; `None` where there is none.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(FILE);
        if fs::symlink_metadata(&path).is_err() {
            return Ok(None);
        }
        let value = read_json(&path)?;
        match value.get("format").and_then(Value::as_u64) {
            Some(format) if format <= u64::from(FORMAT) => {}
            Some(format) => {
                let detail = format!("has format {format}, this cuvee knows {FORMAT}; a newer cuvee reads it");
                return Err(Error::file(path, detail));
            }
            None => return Err(Error::file(path, "has no \"format\"; it is damaged or of another program, remove it")),
        }
        let parsed = serde_json::from_value(value);
        parsed.map(Some).map_err(|e| Error::file(path, format!("is damaged: {e}; remove it, or get another copy")))
    }

    /// Fails where the weights in `dir` are not those that this lineage was written for.
    pub fn verify(&self, dir: &Path) -> Result<()> {
        let found = content_hash(dir)?;
        match &self.hash {
            Some(hash) if *hash == found => Ok(()),
            hash => {
                let expected = hash.as_deref().map_or("nothing", short);
                let detail = format!(
                    "the weights are not those that {FILE} was written for: their hash is {}, it says {expected}; something changed \
                     them since, and their origin is not known",
                    short(&found)
                );
                Err(Error::file(dir, detail))
            }
        }
    }

    /// The tree, a line for each of its nodes, and the licences of those that have one.
    pub fn tree(&self) -> String {
        let mut out = self.name.clone().unwrap_or_default();
        let _ = write!(out, " {}", self.hash.as_deref().map_or("without a hash", short));
        self.describe(&mut out, 1);
        let mut licenses = Vec::new();
        self.licenses(&mut licenses);
        if !licenses.is_empty() {
            let of = |(license, names): &(String, Vec<String>)| format!("{license} ({})", names.join(", "));
            let _ = writeln!(out, "licences: {}", licenses.iter().map(of).collect::<Vec<_>>().join("; "));
        }
        out
    }

    /// How it was made, behind its name, and then its parents and data.
    fn describe(&self, out: &mut String, depth: usize) {
        let _ = write!(out, ": {}, cuvee {}", self.command, self.version);
        for (name, value) in &self.arguments {
            if SHOWN.contains(&name.as_str()) && !value.is_null() {
                let value = value.as_str().map_or_else(|| value.to_string(), String::from);
                let _ = write!(out, ", {name} {value}");
            }
        }
        out.push('\n');
        let indent = "  ".repeat(depth);
        for parent in &self.parents {
            let _ = write!(out, "{indent}{} {}", parent.role, parent.name);
            let _ = write!(out, " {}", parent.hash.as_deref().map_or("without a hash", short));
            let weight = parent.weight.map_or(String::new(), |weight| format!(", weight {weight}"));
            let license = parent.license.as_ref().map_or(String::new(), |license| format!(", {license}"));
            let _ = write!(out, "{weight}{license}");
            if parent.altered {
                out.push_str(", ALTERED: its weights are not those that its lineage was written for");
            }
            match &parent.lineage {
                Some(lineage) => lineage.describe(out, depth + 1),
                None => out.push('\n'),
            }
        }
        for data in &self.data {
            let _ = writeln!(out, "{indent}{} {} {}, {} rows", data.role, data.name, short(&data.hash), data.rows);
        }
    }

    /// Every licence in the tree with the names of those that have it.
    fn licenses(&self, found: &mut Vec<(String, Vec<String>)>) {
        for parent in &self.parents {
            if let Some(license) = &parent.license {
                let at = found.iter().position(|(known, _)| known == license);
                let at = at.unwrap_or_else(|| {
                    found.push((license.clone(), Vec::new()));
                    found.len() - 1
                });
                if !found[at].1.contains(&parent.name) {
                    found[at].1.push(parent.name.clone());
                }
            }
            parent.lineage.iter().for_each(|lineage| lineage.licenses(found));
        }
    }
}

/// Arguments that a line of the tree shows; `--json` has all.
const SHOWN: &[&str] = &["objective", "method", "optimizer", "lora_rank", "rank", "step", "seed"];

/// Enough of a hash to tell two apart.
pub fn short(hash: &str) -> &str {
    hash.get(..12).unwrap_or(hash)
}

/// The last part of a path: `.` and `..` have none until they are resolved.
fn name_of(path: &Path) -> String {
    let path = if path.file_name().is_some() { path.to_path_buf() } else { path.canonicalize().unwrap_or_default() };
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Identity of a folder: its weights as stored, by name, and of a model the config beside them, of an adapter its scalings.
/// blake3, all threads. Where files were cut into shards does not matter.
pub fn content_hash(dir: &Path) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    if peft::is_adapter(dir) {
        AdapterFile::open(dir)?.hash_into(&mut hasher);
    } else {
        let weights = Weights::open(dir)?;
        hash_config(dir, &mut hasher)?;
        weights.names().for_each(|name| weights.hash_into(name, &mut hasher));
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// Identity of a model whose weights are drawn.
pub fn config_hash(dir: &Path) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    hash_config(dir, &mut hasher)?;
    Ok(hasher.finalize().to_hex().to_string())
}

fn hash_config(dir: &Path, hasher: &mut blake3::Hasher) -> Result<()> {
    let path = dir.join("config.json");
    let text = fs::read(&path).at(&path)?;
    hasher.update(&(text.len() as u64).to_le_bytes()).update(&text);
    Ok(())
}

/// The licence that a folder states: `license` in the front matter of README.md (`license_name` where that is `other`), else
/// what a LICENSE file begins with.
pub fn license(dir: &Path) -> Option<String> {
    let readme = fs::read_to_string(dir.join("README.md")).ok();
    readme.as_deref().and_then(front_matter_license).or_else(|| {
        let named = ["LICENSE", "LICENSE.txt", "LICENSE.md"].into_iter().find_map(|name| first_line(&dir.join(name)));
        // The file's first words, unless they are those of a licence that everyone calls otherwise.
        named.map(|line| match line.as_str() {
            "Apache License" => "apache-2.0".to_string(),
            "MIT License" => "mit".to_string(),
            _ => line,
        })
    })
}

fn first_line(path: &Path) -> Option<String> {
    use std::io::{BufRead, BufReader};
    let lines = BufReader::new(File::open(path).ok()?).lines();
    let text = lines.map_while(std::io::Result::ok).map(|line| line.trim().trim_start_matches('#').trim().to_string());
    let mut text = text.take(20).filter(|line| !line.is_empty());
    text.next().map(|line| line.chars().take(80).collect())
}

/// Model cards start with a few lines of YAML between `---`; only a word, or a list of words, can be a licence.
fn front_matter_license(readme: &str) -> Option<String> {
    let matter = readme.trim_start_matches('\u{feff}').strip_prefix("---")?;
    let lines: Vec<&str> = matter.lines().skip(1).take_while(|line| line.trim_end() != "---").collect();
    let value = |key: &str| {
        let at = lines.iter().position(|line| line.strip_prefix(key).is_some_and(|rest| rest.starts_with(':')))?;
        let clean = |text: &str| text.split(" #").next().unwrap_or("").trim().trim_matches(['"', '\'']).to_string();
        let inline = clean(&lines[at][key.len() + 1..]);
        let items = lines[at + 1..].iter().map_while(|line| line.trim_start().strip_prefix("- ")).map(clean);
        let listed = inline.trim_matches(['[', ']']).split(',').map(clean).chain(items);
        let all: Vec<String> = listed.filter(|item| !item.is_empty()).collect();
        (!all.is_empty()).then(|| all.join(", "))
    };
    let license = value("license")?;
    if license == "other" { value("license_name").or(Some(license)) } else { Some(license) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn licences_are_read_from_model_cards() {
        let of = front_matter_license;
        assert_eq!(of("---\nlanguage: en\nlicense: apache-2.0\n---\n# x").as_deref(), Some("apache-2.0"));
        assert_eq!(of("---\r\nlicense: 'mit' # yes\r\n---\r\n").as_deref(), Some("mit"));
        assert_eq!(of("---\nlicense:\n- mit\n- cc-by-4.0\ntags:\n- x\n---\n").as_deref(), Some("mit, cc-by-4.0"));
        assert_eq!(of("---\nlicense: [mit, gpl-3.0]\n---\n").as_deref(), Some("mit, gpl-3.0"));
        assert_eq!(of("---\nlicense: other\nlicense_name: llama3\n---\n").as_deref(), Some("llama3"));
        assert_eq!(of("---\nlicense: other\n---\n").as_deref(), Some("other"));
        assert_eq!(of("---\ntags: [x]\n---\nlicense: mit\n"), None);
        assert_eq!(of("license: mit\n"), None);
        assert_eq!(of(""), None);
    }

    #[test]
    fn licences_are_read_from_their_files() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(license(dir.path()), None);
        fs::write(dir.path().join("LICENSE.md"), "\n# Some Community Licence\nText\n").unwrap();
        assert_eq!(license(dir.path()).as_deref(), Some("Some Community Licence"));
        fs::write(dir.path().join("LICENSE"), "\n\n   Apache License\n  Version 2.0\n").unwrap();
        assert_eq!(license(dir.path()).as_deref(), Some("apache-2.0"));
        fs::write(dir.path().join("README.md"), "---\nlicense: mit\n---\n").unwrap();
        assert_eq!(license(dir.path()).as_deref(), Some("mit"));
    }
}
