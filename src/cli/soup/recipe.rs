//! Recipes of sweeps: a base, preferences with their rewards, what is measured, and what stands beside the blends.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::{Table, Value};

use crate::cli::recipe::{clean, unreadable};
use crate::error::{Error, Result};
use crate::rewards::RewardSpec;
use crate::soup::Declared;

/// What a recipe has beside the keys of `cuvee train`.
const KEYS: [&str; 5] = ["preference", "sweep", P_MORL, MULTITASK, PROMPTING];
pub const P_MORL: &str = "p_morl";
pub const MULTITASK: &str = "multitask_sft";
pub const PROMPTING: &str = "prompting";
/// Names that policies have which belong to no preference.
const TAKEN: [&str; 4] = ["base", "p-morl", "multitask-sft", "answers"];

/// A recipe, its paths as seen from here.
pub struct Recipe {
    pub path: PathBuf,
    /// Keys of `cuvee train` for every run, paths as they stand in the file.
    pub top: Table,
    pub preferences: Vec<Preference>,
    pub sweep: Sweep,
    /// One policy for the weighted rewards, scored on prompt and response, every sentence in its prompts.
    pub p_morl: Option<Table>,
    /// One policy that imitates what each reward finds best of the base's answers, the sentence in its prompts.
    pub multitask: Option<(Multitask, Table)>,
    /// The base, asked.
    pub prompting: bool,
}

pub struct Preference {
    pub declared: Declared,
    pub reward: RewardSpec,
    /// Keys of `cuvee train` for its run, paths as they stand in the file.
    pub train: Table,
}

/// `[sweep]`
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sweep {
    /// What every policy completes.
    pub prompts: PathBuf,
    /// What their loss is measured on besides.
    pub texts: Option<PathBuf>,
    /// Comparisons by a judge.
    pub judgements: Option<PathBuf>,
    #[serde(default = "samples")]
    pub samples: usize,
    #[serde(default = "max_new_tokens")]
    pub max_new_tokens: usize,
    #[serde(default = "seed")]
    pub seed: u64,
    /// What the first of a pair counts in its blends.
    #[serde(default = "pairs")]
    pub pairs: Vec<f64>,
    /// Blend adapters of equal weights as RLPHF released it, too: A and B averaged apart.
    #[serde(default = "yes")]
    pub factor: bool,
}

fn samples() -> usize {
    4
}
fn max_new_tokens() -> usize {
    48
}
fn seed() -> u64 {
    42
}
fn pairs() -> Vec<f64> {
    vec![0.25, 0.5, 0.75]
}
fn yes() -> bool {
    true
}

/// What `[multitask_sft]` has beside keys of `cuvee train`.
pub struct Multitask {
    /// Of the first so many prompts, the best of so many answers for each preference.
    pub prompts: usize,
    pub samples: usize,
}

/// A key that `cuvee train` knows nothing of.
fn take<'de, T: Deserialize<'de>>(table: &mut Table, key: &str, expected: &str) -> Result<Option<T>, String> {
    let Some(value) = table.remove(key) else { return Ok(None) };
    let text = value.to_string();
    value.try_into().map(Some).map_err(|_| format!("{key}: expected {expected}, found {text}"))
}

fn preference(table: &Table, folder: &Path) -> Result<Preference, String> {
    let mut train = table.clone();
    let Some(name) = take::<String>(&mut train, "name", "a text")? else {
        return Err("a preference has no name; each [[preference]] needs name = \"...\"".into());
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if name.is_empty() || !name.chars().all(plain) || TAKEN.contains(&name.as_str()) {
        let taken = TAKEN.join(", ");
        return Err(format!("name: expected letters, digits, - and _, and none of {taken}, found {name:?}"));
    }
    let whole = |train: &mut Table| -> Result<Preference, String> {
        let Some(prompt) = take::<String>(train, "prompt", "a sentence")? else {
            return Err("prompt: missing; give the sentence that asks for it".into());
        };
        let Some(reward) = take::<String>(train, "reward", "one TOML file of rewards or reward model's folder")? else {
            return Err("reward: missing; give a TOML file of rewards, or a reward model's folder".into());
        };
        let spec = RewardSpec::parse(&reward).map_err(|e| format!("reward: {e}"))?;
        let here = RewardSpec { what: clean(&folder.join(&spec.what)), ..spec };
        match take::<String>(train, "comparisons", "a file of pairs")? {
            None => drop(train.insert("reward".into(), Value::Array(vec![reward.into()]))),
            Some(_) if train.contains_key("dataset") => {
                return Err("comparisons: are its dataset, and it has one; drop one of them".into());
            }
            Some(pairs) => drop(train.insert("dataset".into(), pairs.into())),
        }
        let options = take::<usize>(train, "options", "how many choices a user has, 2 or more")?.unwrap_or(2);
        let opposite = take(train, "opposite", "a sentence")?;
        let declared =
            Declared { name: name.clone(), prompt, opposite, reward: here.to_string(), options: options.max(1) };
        Ok(Preference { declared, reward: here, train: train.clone() })
    };
    whole(&mut train).map_err(|e| format!("{name}: {e}"))
}

impl Recipe {
    /// # Errors
    /// What is wrong with the file, by key; keys of `cuvee train` are looked at later.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| unreadable(path, &e))?;
        let table: Table = text.parse().map_err(|e: toml::de::Error| Error::file(path, e.to_string().trim_end()))?;
        Self::of(path, table).map_err(|detail| Error::file(path, detail))
    }

    fn of(path: &Path, mut top: Table) -> Result<Self, String> {
        let folder = path.parent().unwrap_or(Path::new(""));
        let mut parts: Vec<Option<Value>> = KEYS.iter().map(|key| top.remove(*key)).collect();
        let mut part = |key: &str| parts[KEYS.iter().position(|other| *other == key).expect("it is one")].take();
        let wrong = || "preference: expected tables, each under a line [[preference]]".to_string();
        let tables = match part("preference") {
            None => return Err("no [[preference]]; a recipe of `cuvee soup sweep` lists two or more".into()),
            Some(Value::Array(tables)) => tables,
            Some(_) => return Err(wrong()),
        };
        let of = |value: &Value| preference(value.as_table().ok_or_else(wrong)?, folder);
        let preferences: Vec<Preference> = tables.iter().map(of).collect::<Result<_, _>>()?;
        let name = |i: usize| &preferences[i].declared.name;
        if preferences.len() < 2 {
            return Err(format!("there is one preference, {}; a blend takes two or more", name(0)));
        }
        if let Some(twin) = (1..preferences.len()).find(|i| (0..*i).any(|j| name(j) == name(*i))) {
            return Err(format!("two preferences are called {:?}; give each a name of its own", name(twin)));
        }
        let mut sweep: Sweep = match part("sweep") {
            Some(sweep) => sweep.try_into().map_err(|e: toml::de::Error| format!("[sweep]: {}", e.message()))?,
            None => return Err("no [sweep]; it needs prompts = \"FILE\" that policies complete".into()),
        };
        if sweep.samples == 0 || sweep.max_new_tokens == 0 {
            return Err("[sweep]: samples and max_new_tokens are 1 or more".into());
        }
        if let Some(share) = sweep.pairs.iter().find(|share| !(**share > 0.0 && **share < 1.0)) {
            return Err(format!("[sweep]: pairs: expected weights between 0 and 1, found {share}"));
        }
        let from_here = |path: &mut PathBuf| *path = clean(&folder.join(&path));
        from_here(&mut sweep.prompts);
        sweep.texts.iter_mut().chain(&mut sweep.judgements).for_each(from_here);
        let mut beside = |key: &str| match part(key) {
            None => Ok(None),
            Some(Value::Table(table)) => Ok(Some(table)),
            Some(_) => Err(format!("{key}: expected a table, as [{key}]")),
        };
        let p_morl = beside(P_MORL)?;
        let multitask = beside(MULTITASK)?.map(|mut table| -> Result<_, String> {
            let number = "a whole number of 1 or more";
            let mut take = |key| take::<usize>(&mut table, key, number).map_err(|e| format!("[{MULTITASK}]: {e}"));
            let (prompts, samples) = (take("prompts")?.unwrap_or(256), take("samples")?.unwrap_or(8));
            Ok((Multitask { prompts: prompts.max(1), samples: samples.max(1) }, table))
        });
        let (multitask, prompting) = (multitask.transpose()?, beside(PROMPTING)?);
        if let Some(key) = prompting.iter().flat_map(Table::keys).next() {
            return Err(format!("[{PROMPTING}]: unknown key {key:?}; it has none"));
        }
        let prompting = prompting.is_some();
        Ok(Self { path: path.to_path_buf(), top, preferences, sweep, p_morl, multitask, prompting })
    }

    pub fn names(&self) -> Vec<&str> {
        self.preferences.iter().map(|preference| preference.declared.name.as_str()).collect()
    }

    /// All that a prompt can ask for.
    pub fn sentences(&self) -> String {
        let each: Vec<&str> = self.preferences.iter().map(|p| p.declared.prompt.as_str()).collect();
        each.join(" ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: &str = "model = 'm'\n[[preference]]\nname = 'a'\nprompt = 'Be a.'\nreward = 'a.toml=2'\n\
                       [[preference]]\nname = 'b'\nprompt = 'Be b.'\nreward = 'b.toml'\ncomparisons = 'b.jsonl'\n";

    fn read(text: &str) -> Result<Recipe, String> {
        Recipe::of(Path::new("recipes/soups.toml"), text.parse().unwrap())
    }

    #[test]
    fn a_recipe_is_read() {
        let recipe = read(&format!("{TWO}[sweep]\nprompts = '../p.jsonl'\n[prompting]\n")).unwrap();
        let [a, b] = &recipe.preferences[..] else { panic!() };
        assert_eq!((a.declared.reward.as_str(), a.reward.weight), ("recipes/a.toml=2", 2.0));
        assert_eq!(a.train["reward"].as_array().unwrap()[0].as_str(), Some("a.toml=2"));
        assert_eq!((b.train["dataset"].as_str(), b.train.get("reward")), (Some("b.jsonl"), None));
        assert_eq!((recipe.sweep.prompts.to_str(), recipe.sweep.samples), (Some("p.jsonl"), 4));
        assert!(recipe.prompting && recipe.p_morl.is_none() && recipe.multitask.is_none());
        assert_eq!((recipe.sentences().as_str(), recipe.top.len()), ("Be a. Be b.", 1));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let sweep = "[sweep]\nprompts = 'p'\n";
        let with = |more: &str| format!("{TWO}{sweep}{more}");
        for (text, expected) in [
            ("model = 'm'\n".to_string(), "no [[preference]]"),
            ("preference = 3\n".into(), "expected tables, each under a line [[preference]]"),
            (TWO.into(), "no [sweep]; it needs prompts"),
            (TWO.replace("name = 'b'", "name = 'a'") + sweep, "two preferences are called \"a\""),
            (TWO.replace("name = 'b'", "name = 'b c'") + sweep, "name: expected letters"),
            (TWO.replace("name = 'b'", "name = 'base'") + sweep, "none of base"),
            (TWO.replace("name = 'b'\n", "") + sweep, "a preference has no name"),
            (TWO.replace("prompt = 'Be b.'\n", "") + sweep, "b: prompt: missing"),
            (TWO.replace("reward = 'b.toml'\n", "") + sweep, "b: reward: missing"),
            (TWO.replace("'b.toml'", "['b', 'c']") + sweep, "b: reward: expected one TOML file"),
            (TWO.replace("comparisons", "dataset = 'd'\ncomparisons") + sweep, "b: comparisons: are its dataset"),
            (with("sample = 3\n"), "[sweep]: unknown field `sample`"),
            (with("pairs = [0.5, 1.0]\n"), "pairs: expected weights between 0 and 1, found 1"),
            (with("samples = 0\n"), "samples and max_new_tokens are 1 or more"),
            (with("[prompting]\nx = 1\n"), "[prompting]: unknown key \"x\""),
            (with("[multitask_sft]\nprompts = 'x'\n"), "prompts: expected a whole number"),
            (format!("p_morl = 3\n{TWO}{sweep}"), "p_morl: expected a table"),
        ] {
            let message = read(&text).err().unwrap_or_else(|| panic!("{text}"));
            assert!(message.contains(expected), "{text}: {message}");
        }
        let one = TWO.split("[[preference]]").take(2).collect::<Vec<_>>().join("[[preference]]");
        assert!(read(&format!("{one}{sweep}")).err().unwrap().contains("there is one preference, a"));
    }
}
