//! The cache of what references say: `cuvee cache`, and hidden rows.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use cuvee::Error;
use cuvee::checkpoint::Weights;
use cuvee::data::{Example, Packing, Sequence, Sharing};
use cuvee::device::Cpu;
use cuvee::model::{Checkpoint, Init};
use cuvee::references::Scorer;
use cuvee::references::cache::{RefCache, sequence_key};
use cuvee::references::hidden::HiddenRows;
use half::bf16;
use serde_json::Value;

use crate::program::{Workspace, root};

// ---- cuvee cache ----------------------------------------------------------------------------------------------

/// A cache file of two shards in the workspace's cache, whose key is `byte` throughout.
fn make(w: &Workspace, byte: u8) -> PathBuf {
    let mut cache = RefCache::open(&w.path("cache"), [byte; 32], &|| true).unwrap();
    cache.append_shard(&[(sequence_key(&[1, 2], 1), &[-1.0]), (sequence_key(&[3], 0), &[-2.0, -3.0])]).unwrap();
    cache.append_shard(&[(sequence_key(&[4], 0), &[-4.0])]).unwrap();
    cache.path().to_path_buf()
}

#[test]
fn a_run_describes_the_cache_that_it_makes() {
    let w = Workspace::with_reviews(4);
    assert_eq!(w.ok("cache ls").stdout.trim(), format!("0 files, 0 B in {}", w.path("cache/refs").display()));
    assert_eq!(w.ok("cache ls --json").stdout.trim(), "[]");
    assert!(!w.exists("cache"), "looking makes nothing");
    w.ok(
        "train --objective sigmoid --beta 0.1 --learning-rate 5e-4 --model model --dataset train.jsonl --max-length 40 \
          --batch-size 2 --max-steps 1 --output-dir run",
    );
    let key = w.cache_file().unwrap().file_stem().unwrap().to_str().unwrap().to_string();
    assert_eq!(w.names("cache/refs"), [format!("{key}.json"), format!("{key}.logps")]);

    let list: Value = serde_json::from_str(&w.ok("cache ls --json").stdout).unwrap();
    let file = &list[0];
    assert_eq!((file["key"].as_str(), file["kind"].as_str()), (Some(&*key), Some("log-prob")));
    let sequences = RefCache::open_file(&w.cache_file().unwrap()).unwrap().len();
    assert_eq!((file["sequences"].as_u64(), &file["damage"]), (Some(sequences as u64), &Value::Null));
    assert_eq!(file["bytes"].as_u64(), Some(w.cache_file().unwrap().metadata().unwrap().len()));
    let about = &file["about"];
    assert_eq!((about["model"].as_str(), about["architecture"].as_str()), (Some("model"), Some("llama")));
    assert_eq!(about["parameters"].as_u64(), Some(656_000));
    assert!(about["arithmetic"].as_str().unwrap().starts_with("cpu"), "{about}");
    assert!(about["created"].as_u64().unwrap() > 1_700_000_000);

    let table = w.ok("cache ls").stdout;
    let row = table.lines().nth(1).unwrap();
    for part in [&key[..12], "log-probs", "just now", "model (llama, 0.7 M parameters, cpu"] {
        assert!(row.contains(part), "{part} is not in {table}");
    }
    let verified = w.ok("cache verify").stdout;
    assert!(verified.contains(": sound\n") && verified.ends_with("1 of 1 files are sound\n"), "{verified}");
    let removed = w.ok("cache rm --all").stdout;
    assert!(removed.starts_with("removed ") && removed.contains("\nfreed "), "{removed}");
    assert!(w.names("cache/refs").is_empty());
}

#[test]
fn damage_is_found_and_named_and_left_alone() {
    let w = Workspace::new();
    let [sound, torn, flipped, foreign, infinite] = [0x10, 0x21, 0x22, 0x23, 0x24].map(|byte| make(&w, byte));
    let bytes = fs::read(&torn).unwrap();
    fs::write(&torn, &bytes[..bytes.len() - 3]).unwrap();
    let mut bytes = fs::read(&flipped).unwrap();
    bytes[48 + 28 + 36] ^= 1; // a value of the first shard
    fs::write(&flipped, &bytes).unwrap();
    fs::write(&foreign, "not ours").unwrap();
    fs::write(&infinite, with_an_infinity(&fs::read(&infinite).unwrap())).unwrap();
    let before = [&sound, &torn, &flipped, &foreign, &infinite].map(|path| fs::read(path).unwrap());

    let list: Value = serde_json::from_str(&w.ok("cache ls --json").stdout).unwrap();
    let sequences: Vec<_> = list.as_array().unwrap().iter().map(|file| file["sequences"].as_u64().unwrap()).collect();
    assert_eq!(sequences, [3, 2, 3, 0, 3], "what headers say");
    assert!(list[1]["damage"].as_str().unwrap().contains("from byte 160 on, are damaged"), "{}", list[1]);
    assert!(w.ok("cache ls").stdout.contains("DAMAGED: it does not begin as a cache file"));

    let verified = w.run("cache verify");
    assert_eq!(verified.code, Some(1), "{}", verified.stdout);
    assert!(verified.error().contains("4 of 5 files are damaged"), "{}", verified.stderr);
    let lines: Vec<&str> = verified.stdout.lines().collect();
    assert!(lines[0].starts_with("101010101010 log-probs, ") && lines[0].ends_with(": sound"), "{lines:?}");
    for (line, part) in lines[1..].iter().zip([
        "from byte 160 on, are damaged",
        "from byte 48 on, are damaged",
        "does not begin as a cache file of this version",
        "the shard at byte 48 holds a log-prob that is not finite",
    ]) {
        assert!(line.contains("DAMAGED") && line.contains(part), "{part} is not in {line}");
    }
    let renamed = sound.with_file_name(format!("{}.logps", "33".repeat(32)));
    fs::copy(&sound, &renamed).unwrap();
    assert!(w.run("cache verify 3333").stdout.contains("of another key than its name says"));

    assert!(w.ok("cache verify 10").stdout.ends_with("1 of 1 files are sound\n"), "the others were not asked for");
    let after = [&sound, &torn, &flipped, &foreign, &infinite].map(|path| fs::read(path).unwrap());
    assert!(before == after, "verifying repairs nothing");
}

/// The same file with an infinite first value, and the checksum that goes with it.
fn with_an_infinity(file: &[u8]) -> Vec<u8> {
    let mut bytes = file.to_vec();
    bytes[48 + 28 + 36..][..4].copy_from_slice(&f32::NEG_INFINITY.to_le_bytes());
    let len = u64::from_le_bytes(bytes[52..60].try_into().unwrap()) as usize;
    let checksum = blake3::hash(&bytes[76..76 + len]);
    bytes[60..76].copy_from_slice(&checksum.as_bytes()[..16]);
    bytes
}

#[test]
fn files_are_removed_by_key_by_age_and_all() {
    let w = Workspace::new();
    let [a, b, c] = [0xa1, 0xa2, 0xb0].map(|byte| make(&w, byte));
    w.fails(1, "cache rm a", &["KEY: \"a\" is the start of 2 keys"]);
    w.fails(1, "cache rm a1 ff", &["no file's key starts with \"ff\"", "cuvee cache ls"]);
    assert!(a.exists() && b.exists(), "nothing is removed by a command that fails");
    let old = SystemTime::now() - Duration::from_secs(3 * 86400);
    fs::File::open(&c).unwrap().set_modified(old).unwrap();
    assert!(w.ok("cache ls").stdout.contains("3 d ago"));
    assert_eq!(w.ok("cache rm --older-than 3.5").stdout, "freed 0 B\n");
    assert!(w.ok("cache rm --older-than 2.5").stdout.contains("removed b0b0b0b0b0b0"));
    assert!(!c.exists() && a.exists() && b.exists());
    w.ok("cache rm a1a1");
    assert!(!a.exists() && b.exists());

    // A running cuvee uses it.
    let used = RefCache::open(&w.path("cache"), [0xa2; 32], &|| true).unwrap();
    let other = make(&w, 0xc0);
    for line in ["cache rm --all", "cache rm a2 c0", "cache verify a2"] {
        w.fails(1, line, &["is in use by a running cuvee"]);
    }
    assert!(b.exists() && other.exists());
    drop(used);
    w.ok("cache rm --all");
    assert!(!b.exists() && !other.exists());
    assert_eq!(w.ok("cache verify").stdout, "0 of 0 files are sound\n");
}

#[test]
fn what_cannot_be_meant_is_refused() {
    let w = Workspace::new();
    let both = ["cache rm --all a1", "cache rm --all --older-than 3", "cache rm a1 --older-than 3"];
    for line in both.into_iter().chain(["cache rm", "cache verify --repair", "cache lst"]) {
        assert_eq!(w.run(line).code, Some(2), "{line}");
    }
    for days in ["-1", "x", "nan", "0"] {
        let finished = w.run(&format!("cache rm --older-than {days}"));
        assert_eq!(finished.code, Some(2), "{}", finished.stderr);
        assert!(finished.stderr.contains("--older-than"), "{}", finished.stderr);
    }
    fs::create_dir(w.path("elsewhere")).unwrap();
    assert!(w.ok("cache ls --cache-dir elsewhere").stdout.contains("elsewhere/refs"));
}

// ---- hidden rows ----------------------------------------------------------------------------------------------

const PACKING: Packing = Packing::new(40);

fn examples() -> Vec<Example> {
    let sequence = |prompt: usize, from: usize, len: usize| {
        let ids = (0..prompt).chain(from..from + len).map(|i| (i * 37 % 2048) as u32).collect();
        Sequence::new(ids, prompt)
    };
    let pair = |row: usize| Example {
        row,
        sequences: vec![sequence(3 + row, 50 + row, 1 + row), sequence(3 + row, 90, 4)],
        ..Example::default()
    };
    (0..7).map(pair).collect()
}

#[test]
fn hidden_rows_with_the_head_give_the_log_probs() {
    let (dir, cpu, examples) = (tempfile::tempdir().unwrap(), Cpu::new(2).unwrap(), examples());
    let examples: Vec<&Example> = examples.iter().collect();
    let checkpoint = Checkpoint::open(&root().join("assets/review-llama-656k")).unwrap();
    let score = |sets: &[&[&Example]], stop: bool| {
        HiddenRows::score(&cpu, (&checkpoint, Init::Checkpoint), sets, PACKING, dir.path(), &|| stop)
    };
    let interrupted = score(&[&examples[..4]], true).err().unwrap();
    assert!(matches!(&interrupted, Error::Interrupted { detail } if detail.contains(".hidden")), "{interrupted}");
    score(&[&examples[..2], &examples[..3]], false).unwrap();
    let rows = score(&[&examples[..3]], true).expect("nothing is left to score");
    assert_eq!(rows.width(), 128);
    let mut found = Vec::new();
    let error = rows.read(examples[6], &mut found).unwrap_err().to_string();
    assert!(error.contains("has no hidden rows of data row 6"), "{error}");
    let size = file_of(&dir).metadata().unwrap().len();
    drop(rows);
    let rows = score(&[&examples], false).unwrap();
    assert!(file_of(&dir).metadata().unwrap().len() > size, "and only what was missing");

    // Another packing, the same bits; and the head makes log-probs of them.
    let apart = tempfile::tempdir().unwrap();
    let alone = Packing { sharing: Sharing::Off, ..Packing::new(1) };
    let fresh =
        HiddenRows::score(&cpu, (&checkpoint, Init::Checkpoint), &[&examples], alone, apart.path(), &|| false).unwrap();
    let largest = PACKING.largest(&PACKING.extents(examples.iter().copied()));
    let mut scorer = Scorer::new(&cpu, &checkpoint, Init::Checkpoint, &largest).unwrap();
    let logps = scorer.score(&examples, PACKING, &mut |_| {}).unwrap();
    let mut head = vec![0.0; 2048 * 128];
    Weights::open(&checkpoint.dir).unwrap().read("model.embed_tokens.weight", &[2048, 128], &mut head).unwrap();
    for (example, logps) in examples.iter().zip(&logps) {
        rows.read(example, &mut found).unwrap();
        let mut expected = Vec::new();
        fresh.read(example, &mut expected).unwrap();
        assert_eq!(found, expected);
        let targets = example.sequences.iter().flat_map(|s| &s.ids[s.first..]);
        let tokens: Vec<(&u32, &f32)> = targets.zip(logps.iter().flatten()).collect();
        assert_eq!(found.len(), tokens.len() * 128);
        for (row, (&target, &logp)) in found.chunks(128).zip(tokens) {
            let logp_of_row = log_prob(row, &head, target as usize);
            assert!((logp_of_row - f64::from(logp)).abs() < 0.05, "{logp_of_row} {logp}");
        }
    }
}

fn file_of(dir: &tempfile::TempDir) -> PathBuf {
    let files = fs::read_dir(dir.path().join("refs")).unwrap().map(|entry| entry.unwrap().path());
    files.into_iter().find(|path| path.extension().is_some_and(|extension| extension == "hidden")).unwrap()
}

/// ln softmax(head row)[target], in f64.
fn log_prob(row: &[bf16], head: &[f32], target: usize) -> f64 {
    let logit = |weights: &[f32]| row.iter().zip(weights).map(|(x, w)| x.to_f64() * f64::from(*w)).sum::<f64>();
    let logits: Vec<f64> = head.chunks(row.len()).map(logit).collect();
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    logits[target] - largest - logits.iter().map(|x| (x - largest).exp()).sum::<f64>().ln()
}
