//! Chat templates: what transformers renders, and the tokens and masks that TRL trains on. `tests/data/chat/make.py`
//! makes the files.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use cuvee::data::{Dataset, EncodeOptions, Message, Overflow, Skip, Tokenizer};
use libtest_mimic::{Failed, Trial};
use serde_json::Value;

pub fn trials(root: &Path) -> Vec<Trial> {
    let dir = root.join("tests/data/chat");
    let read = |name: &str| -> Vec<Value> {
        let text = fs::read_to_string(dir.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{name}: {e}"))
    };
    let mut renderings: BTreeMap<String, Vec<Value>> = BTreeMap::new();
    for case in read("renderings.json") {
        renderings.entry(string(&case["template"])).or_default().push(case);
    }
    let model = root.join("assets/review-llama-656k");
    let rendered = renderings.into_iter().map(|(template, cases)| {
        let (dir, model) = (dir.clone(), model.clone());
        Trial::test(format!("chat::renderings::{template}"), move || check_renderings(&dir, &model, &template, &cases))
    });
    let tokens = read("tokens.json").into_iter().map(|case| {
        let (dir, model) = (dir.clone(), model.clone());
        Trial::test(format!("chat::tokens::{}", string(&case["name"])), move || check_tokens(&dir, &model, &case))
    });
    let assistants = read("assistants.json");
    let trials: Vec<Trial> = rendered.chain(tokens).collect();
    let assistants = Trial::test("chat::assistants", move || check_assistants(&dir, &model, &assistants));
    trials.into_iter().chain([assistants]).collect()
}

fn string(value: &Value) -> String {
    value.as_str().expect("make.py writes a string").to_string()
}

/// The shipped model's tokenizer with another template.
fn tokenizer(dir: &Path, model: &Path, template: &str) -> Result<(tempfile::TempDir, Tokenizer), Failed> {
    let folder = tempfile::tempdir()?;
    let from: [(PathBuf, &str); 4] = [
        (model.join("tokenizer.json"), "tokenizer.json"),
        (model.join("tokenizer_config.json"), "tokenizer_config.json"),
        (model.join("config.json"), "config.json"),
        (dir.join(template), "chat_template.jinja"),
    ];
    for (path, name) in from {
        fs::copy(path, folder.path().join(name))?;
    }
    let tokenizer = Tokenizer::load(folder.path())?;
    Ok((folder, tokenizer))
}

fn check_renderings(dir: &Path, model: &Path, template: &str, cases: &[Value]) -> Result<(), Failed> {
    let (_folder, tokenizer) = tokenizer(dir, model, template)?;
    let chat = tokenizer.chat_template()?;
    for case in cases {
        let messages = case["messages"].as_array().into_iter().flatten();
        // Keys without a value are dropped as a row is read.
        let message = |message: &Value| -> Message {
            let entries = message.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null());
            entries.map(|(key, value)| (key.clone(), value.clone())).collect()
        };
        let messages: Vec<Message> = messages.map(message).collect();
        let variables = case["variables"].as_object().ok_or("no variables")?;
        let ours = chat.render(&messages, variables, case["add_generation_prompt"] == true);
        match (ours, case["text"].as_str()) {
            (Ok(ours), Some(theirs)) if ours == theirs => {}
            (Ok(ours), theirs) => {
                return Err(format!("{}\n--- ours\n{ours}\n--- theirs\n{theirs:?}", case["messages"]).into());
            }
            (Err(e), Some(_)) => return Err(format!("{}: {e}", case["messages"]).into()),
            (Err(e), None) => {
                let theirs = string(&case["error"]);
                // What Python says of a missing key is its own.
                if !theirs.contains("has no attribute") && !e.to_string().ends_with(&theirs) {
                    return Err(format!("{e}, expected {theirs}").into());
                }
            }
        }
    }
    Ok(())
}

fn check_tokens(dir: &Path, model: &Path, case: &Value) -> Result<(), Failed> {
    let (folder, tokenizer) = tokenizer(dir, model, &string(&case["template"]))?;
    let path = folder.path().join("rows.jsonl");
    let rows = case["rows"].as_array().ok_or("no rows")?;
    fs::write(&path, rows.iter().map(|row| format!("{row}\n")).collect::<String>())?;
    let max_length = case["max_length"].as_u64().map(|n| n as usize);
    let data = Dataset::load(
        &path,
        &tokenizer,
        &EncodeOptions { max_length, on_overflow: Overflow::Truncate, ..EncodeOptions::default() },
    )?;
    let mut ours = data.examples.iter();
    for theirs in case["trl"].as_array().ok_or("no trl")? {
        let example = ours.next().ok_or("a row is missing")?;
        if theirs["row"] != example.row {
            return Err(format!("row {}, expected {}", example.row, theirs["row"]).into());
        }
        let sequences = theirs["sequences"].as_array().ok_or("no sequences")?;
        if sequences.len() != example.sequences.len() {
            return Err(format!("row {}: {} sequences", example.row, example.sequences.len()).into());
        }
        for (ours, theirs) in example.sequences.iter().zip(sequences) {
            let ids: Vec<u32> = serde_json::from_value(theirs["ids"].clone())?;
            // TRL marks the first token of a text as scored; nothing predicts it.
            let first = theirs["first"].as_u64().ok_or("no first")?.max(1) as usize;
            if (&ours.ids, ours.first) != (&ids, first) {
                return Err(format!("row {}: {ours:?}\nexpected {ids:?} from {first}", example.row).into());
            }
        }
    }
    if ours.next().is_some() { Err("a row that TRL drops is here".into()) } else { Ok(()) }
}

/// Of conversations, what the template marks as the assistant's.
fn check_assistants(dir: &Path, model: &Path, cases: &[Value]) -> Result<(), Failed> {
    let (_folder, tokenizer) = tokenizer(dir, model, "marked.jinja")?;
    let options = EncodeOptions { assistant_only: true, ..EncodeOptions::default() };
    for case in cases {
        let file = tempfile::Builder::new().suffix(".jsonl").tempfile()?;
        fs::write(file.path(), serde_json::json!({"messages": case["messages"]}).to_string())?;
        let dataset = Dataset::load(file.path(), &tokenizer, &options)?;
        let (ids, mask): (Vec<u32>, Vec<usize>) =
            (serde_json::from_value(case["ids"].clone())?, serde_json::from_value(case["mask"].clone())?);
        let scored: Vec<usize> = (0..ids.len()).filter(|t| mask[*t] == 1).collect();
        let Some(last) = scored.last() else {
            assert_eq!(dataset.skipped, [(0, Skip::NoAssistant)]);
            continue;
        };
        let [example] = &dataset.examples[..] else { return Err(format!("{case}: skipped").into()) };
        let sequence = &example.sequences[0];
        // Behind what is scored nothing is run.
        assert_eq!((&sequence.ids[..], sequence.targets()), (&ids[..=*last], scored.len()), "{case}");
        assert_eq!(sequence.scored().collect::<Vec<_>>(), scored, "{case}");
    }
    Ok(())
}
