//! What cargo cannot check inside one crate: the direction of dependencies, functions that fit a screen, no
//! unfinished or silenced code, every op with its three files. Findings read `file:line: what`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// What a module may `use crate::` besides itself and `error`. `cli` and `main` may use everything.
const MAY_USE: &[(&str, &[&str])] = &[
    ("error", &[]),
    ("progress", &[]),
    ("machine", &[]),
    ("params", &[]),
    ("device", &[]),
    ("data", &[]),
    ("scaling", &["device"]),
    ("objectives", &["params"]),
    ("checkpoint", &[]),
    ("lineage", &["checkpoint"]),
    ("merge", &["params", "checkpoint", "progress"]),
    ("ops", &["device"]),
    ("model", &["device", "ops", "data", "checkpoint"]),
    ("optim", &["params", "device", "ops", "model"]),
    ("rollout", &["device", "ops", "model", "data"]),
    ("serve", &["device", "ops", "model", "data", "rollout", "lineage", "progress"]),
    ("references", &["device", "ops", "model", "data", "checkpoint", "progress"]),
    ("rewards", &["device", "ops", "model", "data", "progress"]),
    ("tasks", &["device", "ops", "model", "data", "checkpoint", "rollout", "references", "progress"]),
    (
        "train",
        &[
            "device",
            "ops",
            "data",
            "objectives",
            "checkpoint",
            "model",
            "optim",
            "rollout",
            "references",
            "rewards",
            "tasks",
            "progress",
            "machine",
            "lineage",
            "scaling",
        ],
    ),
    ("lab", &["device", "ops", "objectives", "checkpoint", "progress", "scaling", "train"]),
    ("soup", &["device", "data", "checkpoint", "merge", "rewards", "train", "lab"]),
];
/// Files of `src/` that stand above the modules.
const ROOTS: &[&str] = &["lib", "main", "cli"];
/// What error.rs re-exports at the root: `crate::Error` is `crate::error::Error`.
const EVERYWHERE: &[&str] = &["error", "Error", "Result"];
const MAX_FUNCTION_LINES: usize = 75;
const FORBIDDEN: &[&str] = &["todo!", "unimplemented!", "dbg!", "#[allow", "#![allow"];
const OP_FILES: &[&str] = &["mod.rs", "cpu.rs", "cuda.rs", "reference.rs"];

/// (line from 1, what is wrong)
type Findings = Vec<(usize, String)>;

/// The text with comments and the contents of literals blanked out, line for line: what the compiler sees.
fn code_of(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(next) = rest.chars().next() {
        let len = match next {
            '/' if rest.starts_with("//") => rest.find('\n').unwrap_or(rest.len()),
            '/' if rest.starts_with("/*") => block_comment(rest),
            '"' => quoted(rest, '"'),
            'r' if raw_hashes(rest).is_some() && !code.ends_with(is_word) => raw_string(rest),
            '\'' if is_char_literal(rest) => quoted(rest, '\''),
            _ => {
                code.push(next);
                rest = &rest[next.len_utf8()..];
                continue;
            }
        };
        code.extend(rest[..len].chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
        rest = &rest[len..];
    }
    code
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Length of a comment, which may hold others.
fn block_comment(text: &str) -> usize {
    let mut depth = 0;
    for (at, _) in text.char_indices() {
        if text[at..].starts_with("/*") {
            depth += 1;
        } else if text[..at].ends_with("*/") {
            depth -= 1;
            if depth == 0 {
                return at;
            }
        }
    }
    text.len()
}

/// Length of a literal up to its closing quote.
fn quoted(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if c == quote => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// The hashes of `r"`, `r#"`, `r##"`, ...
fn raw_hashes(text: &str) -> Option<&str> {
    let after = text.strip_prefix('r')?;
    let hashes = &after[..after.len() - after.trim_start_matches('#').len()];
    after[hashes.len()..].starts_with('"').then_some(hashes)
}

fn raw_string(text: &str) -> usize {
    let hashes = raw_hashes(text).expect("the caller looked");
    let start = hashes.len() + 2;
    let end = format!("\"{hashes}");
    text[start..].find(&end).map_or(text.len(), |at| start + at + end.len())
}

/// `'x'` and `'\n'`, but not the lifetime `'x`.
fn is_char_literal(text: &str) -> bool {
    let mut chars = text.chars().skip(1);
    chars.next() == Some('\\') || chars.next() == Some('\'')
}

fn line_of(text: &str, at: usize) -> usize {
    text[..at].matches('\n').count() + 1
}

/// Paths that start with `crate::` or `cuvee::`, as (line, first segment); `crate::{a, b::c}` gives a and b.
fn used_modules(code: &str) -> Vec<(usize, String)> {
    let mut used = Vec::new();
    let starts = ["crate::", "cuvee::"].into_iter().flat_map(|prefix| code.match_indices(prefix));
    for (at, prefix) in starts.filter(|(at, _)| !code[..*at].ends_with(|c| is_word(c) || c == '$')) {
        let start = at + prefix.len();
        if code[start..].starts_with('{') {
            used.extend(first_segments(code, start + 1));
        } else {
            used.push((line_of(code, start), word(&code[start..])));
        }
    }
    used
}

/// First segments of the items of a braced import whose contents begin at `start`.
fn first_segments(code: &str, start: usize) -> Vec<(usize, String)> {
    let (mut depth, mut fresh, mut found) = (1, true, Vec::new());
    for (at, c) in code[start..].char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 1 => fresh = true,
            _ if fresh && is_word(c) => {
                found.push((line_of(code, start + at), word(&code[start + at..])));
                fresh = false;
            }
            _ => {}
        }
        if depth == 0 {
            break;
        }
    }
    found
}

fn word(text: &str) -> String {
    text.chars().take_while(|c| is_word(*c)).collect()
}

/// Uses that point upwards or sideways. A module that has no entry in the table is a finding too.
fn upward_uses(module: &str, code: &str) -> Findings {
    if ROOTS.contains(&module) {
        return Vec::new();
    }
    let Some((_, allowed)) = MAY_USE.iter().find(|(name, _)| *name == module) else {
        return vec![(1, format!("module `{module}` has no place in the order of tests/tidy.rs"))];
    };
    let permitted = |used: &str| used == module || allowed.contains(&used) || EVERYWHERE.contains(&used);
    let wrong = used_modules(code).into_iter().filter(|(_, used)| !permitted(used));
    wrong.map(|(line, used)| (line, format!("`{module}` must not use `crate::{used}`"))).collect()
}

/// Functions by rustfmt's guarantee that the closing brace stands at the indent of the line with `fn`.
fn long_functions(code: &str) -> Findings {
    let lines: Vec<&str> = code.lines().collect();
    let indent = |line: &str| line.len() - line.trim_start().len();
    let closes = |line: &str, at: usize| indent(line) == at && line.trim_start().starts_with('}');
    let mut found = Vec::new();
    for (first, line) in lines.iter().enumerate().filter(|(_, line)| opens_function(line)) {
        let at = indent(line);
        let same_line = line.trim_end().ends_with(';') || line.trim_end().ends_with('}');
        let last = if same_line { Some(first) } else { (first + 1..lines.len()).find(|i| closes(lines[*i], at)) };
        let len = last.map_or(lines.len(), |last| last + 1) - first;
        if len > MAX_FUNCTION_LINES {
            found.push((first + 1, format!("a function of {len} lines, at most {MAX_FUNCTION_LINES}")));
        }
    }
    found
}

fn opens_function(line: &str) -> bool {
    const BEFORE: &[&str] = &["pub", "const", "async", "unsafe", "extern", "$vis"];
    let before = |word: &str| BEFORE.contains(&word) || word.starts_with("pub(") || word.is_empty();
    let mut words = line.split_whitespace();
    words.by_ref().find(|word| !before(word)) == Some("fn")
}

fn forbidden_words(code: &str) -> Findings {
    let found = |word: &&'static str| {
        let starts = code.match_indices(word).filter(|(at, _)| !code[..*at].ends_with(is_word));
        starts.map(|(at, word)| (line_of(code, at), format!("`{word}` has no place here"))).collect::<Findings>()
    };
    FORBIDDEN.iter().flat_map(found).collect()
}

/// An op's folder must hold the three files.
fn missing_op_files(op: &str, files: &BTreeSet<String>) -> Vec<String> {
    let missing = OP_FILES.iter().filter(|file| !files.contains(**file));
    missing.map(|file| format!("src/ops/{op}: has no {file}")).collect()
}

/// What is compiled into the product: the tests of a module, blanked here, may use what they like.
fn without_tests(code: &str) -> String {
    const START: &str = "#[cfg(test)]\nmod tests {";
    let Some(start) = code.find(START) else { return code.to_string() };
    let end = code[start..].find("\n}").map_or(code.len(), |at| start + at);
    let blank = "\n".repeat(code[start..end].matches('\n').count());
    [&code[..start], &blank, &code[end..]].concat()
}

fn sources(dir: &Path, out: &mut Vec<PathBuf>) {
    let mut entries: Vec<PathBuf> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            sources(&path, out);
        } else if path.extension().is_some_and(|e| e == "rs") {
            out.push(path);
        }
    }
}

/// The repository: CUVEE_TEST_ROOT, else the current directory, as test binaries may travel.
fn root() -> PathBuf {
    let named = std::env::var_os("CUVEE_TEST_ROOT").map(PathBuf::from);
    named.unwrap_or_else(|| std::env::current_dir().unwrap())
}

fn report(check: impl Fn(&str, &str) -> Findings) {
    let root = root();
    let mut files = Vec::new();
    sources(&root.join("src"), &mut files);
    assert!(!files.is_empty(), "no sources in {}", root.display());
    let mut findings = Vec::new();
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        let relative = file.strip_prefix(&root).unwrap();
        let module = relative.components().nth(1).unwrap().as_os_str().to_str().unwrap().trim_end_matches(".rs");
        for (line, what) in check(module, &code_of(&text)) {
            findings.push(format!("{}:{line}: {what}", relative.display()));
        }
    }
    assert!(findings.is_empty(), "untidy:\n{}", findings.join("\n"));
}

#[test]
fn dependencies_point_downwards() {
    report(|module, code| upward_uses(module, &without_tests(code)));
}

#[test]
fn functions_fit_a_screen() {
    report(|_, code| long_functions(code));
}

#[test]
fn nothing_is_unfinished_or_silenced() {
    report(|_, code| forbidden_words(code));
}

#[test]
fn every_op_has_its_files() {
    let ops = root().join("src/ops");
    let names = |dir: &Path| -> BTreeSet<String> {
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    };
    let folders: Vec<String> = names(&ops).into_iter().filter(|name| ops.join(name).is_dir()).collect();
    assert!(!folders.is_empty());
    let missing: Vec<String> = folders.iter().flat_map(|op| missing_op_files(op, &names(&ops.join(op)))).collect();
    assert!(missing.is_empty(), "untidy:\n{}", missing.join("\n"));
}

// ---- the checks themselves ------------------------------------------------------------------------------------

fn lines(findings: Findings) -> Vec<usize> {
    findings.into_iter().map(|(line, _)| line).collect()
}

#[test]
fn the_order_is_one() {
    // Every module stands below those that may use it: the table has no cycle.
    for (i, (module, allowed)) in MAY_USE.iter().enumerate() {
        for used in *allowed {
            assert!(MAY_USE[..i].iter().any(|(name, _)| name == used), "`{module}` before `{used}`");
        }
    }
}

#[test]
fn upward_uses_are_found() {
    let found = |module, text: &str| lines(upward_uses(module, &code_of(text)));
    assert_eq!(found("ops", "use std::fs;\nuse crate::model::Param;"), [2]);
    assert_eq!(found("objectives", "use crate::device::Tensor;"), [1]);
    assert_eq!(found("data", "fn f() {\n    crate::ops::linear::f()\n}"), [2]);
    assert_eq!(found("model", "use crate::{device::Cpu, error::Result,\n    train::Loop, data::{Batch, jsonl}};"), [2]);
    assert_eq!(found("optim", "use crate::rollout::Sampler;\nuse crate::references::Cache;"), [1, 2]);
    assert_eq!(found("device", "use cuvee::ops::linear;"), [1]);
    assert_eq!(found("train", "use crate::cli::Args;"), [1]);
    assert_eq!(found("novelty", "fn f() {}"), [1]);
    for (module, text) in [
        ("model", "use crate::ops::Backend;\nuse crate::checkpoint::Weights;\nuse crate::data::Batch;"),
        ("references", "use crate::model::Model;\nuse crate::checkpoint::Weights;"),
        ("ops", "use crate::{Error, Result};\nuse crate::ops::simd;\n// crate::train is above\n/* crate::cli */"),
        ("device", "const TEXT: &str = \"crate::train\";\nconst RAW: &str = r#\"a \" crate::cli\"#;"),
        ("cli", "use crate::train::run;"),
    ] {
        assert!(found(module, text).is_empty(), "{module}: {text}");
    }
}

#[test]
fn tests_inside_a_module_may_look_up() {
    let text = "fn f() {}\n#[cfg(test)]\nmod tests {\n    use crate::train::run;\n}\n";
    assert!(upward_uses("device", &without_tests(&code_of(text))).is_empty());
    let behind = format!("{text}use crate::ops::linear;\n");
    assert_eq!(lines(upward_uses("device", &without_tests(&code_of(&behind)))), [6]);
}

#[test]
fn long_functions_are_found() {
    let body = "        x();\n".repeat(MAX_FUNCTION_LINES - 1);
    for head in ["fn f() {", "pub(crate) unsafe fn f<T>(", "pub fn f() -> u8 {", "$vis fn $name() {"] {
        let text = format!("mod m {{\n    {head}\n{body}    }}\n}}\n");
        assert_eq!(lines(long_functions(&code_of(&text))), [2], "{head}");
    }
    let fits = format!("    fn f() {{\n{}    }}\n    fn g();\n", &body["        x();\n".len()..]);
    assert!(long_functions(&code_of(&fits)).is_empty());
    assert!(long_functions(&format!("// fn\nfn f() {{}}\n{}", "const A: u8 = 0;\n".repeat(100))).is_empty());
}

#[test]
fn forbidden_words_are_found() {
    let text = "fn f() {\n    todo!()\n}\n#[allow(dead_code)]\nfn g() { dbg!(1); unimplemented!() }\n";
    let mut found = lines(forbidden_words(&code_of(text)));
    found.sort();
    assert_eq!(found, [2, 4, 5, 5]);
    let fine =
        "// todo!() and #[allow] as words\nconst T: &str = \"dbg!\";\nconst C: char = '\"'; fn f<'a>(x: &'a u8) {}\n";
    assert!(forbidden_words(&code_of(fine)).is_empty());
}

#[test]
fn literals_end_where_they_end() {
    let code = code_of("let a = '\"'; todo!(); let b = \"\\\"\"; dbg!(); let c = b'\\''; /* /* */ */ #[allow]");
    assert_eq!(forbidden_words(&code).len(), 3, "{code}");
    assert_eq!(code_of("a\n\"b\nc\"\n//d\ne").lines().count(), 5);
}

#[test]
fn missing_op_files_are_found() {
    let files = BTreeSet::from(["mod.rs".to_string(), "cuda.rs".to_string()]);
    assert_eq!(
        missing_op_files("linear", &files),
        ["src/ops/linear: has no cpu.rs", "src/ops/linear: has no reference.rs"]
    );
}
