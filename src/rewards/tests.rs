use std::fs;
use std::io::{BufRead, BufReader, Read as _, Write};
use std::net::TcpListener;
use std::path::Path;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::*;
use crate::data::Packing;
use crate::device::{Cpu, DType};
use crate::error::Result;

const PACKING: Packing = Packing::new(64);

/// A folder of files.
fn folder(files: &[(&str, &str)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    files.iter().for_each(|(name, text)| fs::write(dir.path().join(name), text).unwrap());
    dir
}

fn open(dir: &TempDir) -> Result<Rewards> {
    Rewards::open(&[RewardSpec { what: dir.path().join("rewards.toml"), weight: 1.0, fluency: false }])
}

fn sample<'a>(prompt: &'a Content, completion: &'a str, answer: Option<&'a str>) -> Sample<'a> {
    Sample { prompt, completion, answer, row: 7, prompt_ids: &[1], completion_ids: &[5, 5, 5, 2], finished: true }
}

/// What the one reward of a table's lines says.
fn ask(lines: &str, samples: &[Sample]) -> Result<Vec<f64>> {
    let dir = folder(&[("rewards.toml", &format!("[[reward]]\n{lines}")), ("words.tsv", "fine\t2\nbad\t-1.5\n")]);
    let rewards = open(&dir)?;
    Ok(Jury::new(&Cpu::new(1)?, &rewards, PACKING).score(samples)?.remove(0))
}

fn says(lines: &str, completions: &[&str]) -> Vec<f64> {
    let prompt = Content::Text("p".into());
    let samples: Vec<Sample> = completions.iter().map(|text| sample(&prompt, text, None)).collect();
    ask(lines, &samples).unwrap()
}

fn matches(lines: &str, pairs: &[(&str, Option<&str>)]) -> Vec<f64> {
    let prompt = Content::Text("p".into());
    let samples: Vec<Sample> = pairs.iter().map(|(text, answer)| sample(&prompt, text, *answer)).collect();
    ask(lines, &samples).unwrap()
}

/// Says why the table is refused.
#[track_caller]
fn refused(lines: &str, parts: &[&str]) {
    let error = ask(lines, &[]).unwrap_err().to_string();
    for part in parts {
        assert!(error.contains(part), "{error:?} lacks {part:?}");
    }
}

const TEXTS: &[&str] = &["", " ", "\u{1f600}é", "42"];

#[test]
fn a_pattern_is_found() {
    assert_eq!(says("kind = 'regex'\npattern = '(?i)É'", TEXTS), [0.0, 0.0, 1.0, 0.0]);
    assert_eq!(
        says("kind = 'regex'\npattern = '^\\d+|$'\nfull_match = true\nscore = -2", TEXTS),
        [-2.0, -2.0, 0.0, -2.0]
    );
    assert_eq!(says("kind = 'regex'\npattern = '4'\nfull_match = true\notherwise = 0.5", &["42", " 4\n"]), [0.5, 1.0]);
    refused("kind = 'regex'\npattern = '('", &["reward 1: pattern: \"(\" is no regular expression"]);
    refused("kind = 'regex'", &["missing field `pattern`"]);
    refused("kind = 'regex'\npattern = 'a'\nscore = 0", &["score and otherwise are both 0"]);
    refused("kind = 'regex'\npattern = 'a'\nscore = inf", &["score: expected a finite number, found inf"]);
    // A pattern that never ends is an error, not a reward.
    let prompt = Content::Text("p".into());
    let text = "a".repeat(40);
    let error = ask("name = 'slow'\nkind = 'regex'\npattern = '(a+)+\\1b'", &[sample(&prompt, &text, None)]);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("\"slow\": a completion of row 7: the pattern cannot be searched for"), "{error}");
}

#[test]
fn answers_are_compared() {
    let whole = "kind = 'exact_match'\nignore_case = true";
    let found = matches(whole, &[(" Yes\n", Some("yes")), ("Yes.", Some("yes")), ("", Some("")), ("", None)]);
    assert_eq!(found[..3], [1.0, 0.0, 1.0]);
    assert!(found[3].is_nan());
    let loose = "kind = 'exact_match'\nignore_punctuation = true";
    assert_eq!(matches(loose, &[("\"the  end\"!", Some("the end"))]), [1.0]);

    let gsm8k = "kind = 'exact_match'\nextract = 'gsm8k'";
    let solution = Some("2 + 40 = 42\n#### 42");
    let texts = ["so 42.", "#### 42\nor 41", "it is $42.00", "41", "", "forty-two"];
    let pairs = texts.map(|text| (text, solution));
    assert_eq!(matches(gsm8k, &pairs), [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]);
    assert_eq!(matches("kind = 'exact_match'\nextract = 'gsm8k-strict'", &pairs), [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]);
    // The data's answer may be the number alone, or none.
    assert_eq!(matches(gsm8k, &[("1,000,000,000,000,000,000,001", Some("1000000000000000000001"))]), [1.0]);
    assert_eq!(matches(gsm8k, &[("1000000000000000000002", Some("1000000000000000000001"))]), [0.0]);
    assert!(matches(gsm8k, &[("1", Some("one"))])[0].is_nan());

    let letter = "kind = 'exact_match'\nextract = '\\(([A-D])\\)'";
    let pairs = [("(A)? no, (B)", Some("B")), ("(B)", Some("I say (B)")), ("B", Some("(B)"))];
    assert_eq!(matches(letter, &pairs), [1.0, 1.0, 0.0]);
    refused("kind = 'exact_match'\nextract = 'gsm8k'\nignore_case = true", &["do nothing to numbers"]);
    refused(
        "kind = 'exact_match'\nextract = 'gsm8k'\nextract_answer = 'a'",
        &["one compares numbers, the other texts"],
    );
}

#[test]
fn lengths_are_kept() {
    let words = "kind = 'length'\nunit = 'words'\nmin = 2\nmax = 3\nslope = 0.5";
    assert_eq!(says(words, &["", "a", "a b", "it's a-b c", "a b c d e"]), [-1.0, -0.5, 0.0, 0.0, -1.0]);
    let characters = "kind = 'length'\nunit = 'characters'\ntarget = 2\nslope = 1\nfloor = -3";
    assert_eq!(says(characters, &["", "\u{1f600}é", "abcd", &"x".repeat(100)]), [-2.0, 0.0, -2.0, -3.0]);
    // The token that ends it is no part of its text.
    assert_eq!(says("kind = 'length'\nunit = 'tokens'\nmax = 2\nslope = 1", &["x"]), [-1.0]);
    assert_eq!(says("kind = 'length'\nunit = 'words'\nmin = 4000000000\nslope = 1e308", &[""]), [f64::MIN]);
    refused("kind = 'length'\nunit = 'words'\nslope = 1", &["give target, min or max"]);
    refused("kind = 'length'\nunit = 'words'\nslope = 1\ntarget = 3\nmax = 4", &["target says all"]);
    refused("kind = 'length'\nunit = 'words'\nslope = 1\nmin = 5\nmax = 4", &["min is 5, more than max, which is 4"]);
    refused("kind = 'length'\nunit = 'words'\nslope = 0\nmax = 4", &["slope: expected a number above 0, found 0"]);
    refused("kind = 'length'\nunit = 'word'\nslope = 1\nmax = 4", &["`word`", "`words`, `tokens`, `characters`"]);
    refused("kind = 'length'\nunit = 'words'\nslope = 1\nmax = -4", &["-4"]);
    refused("kind = 'length'\nunit = 'words'\nslope = 1\nmax = 4\nfloor = 1", &["floor: expected a number below 0"]);
}

#[test]
fn forms_are_seen() {
    let tags = "kind = 'format'\nparts = ['<a>', '</a>']";
    assert_eq!(says(tags, &["<a>x</a>", "</a><a>", "<a></a></a>", "", "<a>"]), [1.0, 0.0, 0.0, 0.0, 0.0]);
    let json = "kind = 'format'\njson = true\notherwise = -1";
    assert_eq!(says(json, &["{\"a\": [1, null]}", " 1 ", "{\"a\": 1} x", ""]), [1.0, 1.0, -1.0, -1.0]);
    let prompt = Content::Text("p".into());
    let ended = sample(&prompt, "x", None);
    let cut = Sample { finished: false, ..ended };
    assert_eq!(ask("kind = 'format'\nends = true", &[ended, cut]).unwrap(), [1.0, 0.0]);
    refused("kind = 'format'", &["nothing is asked for"]);
    refused("kind = 'format'\nparts = ['']", &["an empty text is everywhere"]);
}

#[test]
fn repetition_costs() {
    let pairs = "kind = 'repetition'\nn = 2";
    assert_eq!(
        says(pairs, &["", "one", "a b A B", "a a a a a", "a b c"]),
        [0.0, 0.0, 2.0 / 3.0 - 1.0, 0.25 - 1.0, 0.0]
    );
    assert_eq!(says("kind = 'repetition'\nn = 1\nunit = 'tokens'", &["x"]), [1.0 / 3.0 - 1.0]);
    refused("kind = 'repetition'\nn = 0", &["n: expected 1 at least, found 0"]);
}

#[test]
fn words_are_rated() {
    let mean = "kind = 'lexicon'\nfile = 'words.tsv'";
    assert_eq!(says(mean, &["", "Fine, fine; not BAD", "what a film"]), [0.0, 2.5 / 3.0, 0.0]);
    assert_eq!(says(&format!("{mean}\nprior = 2"), &["fine", "fine bad"]), [2.0 / 3.0, 0.125]);
    assert_eq!(says(&format!("{mean}\nreduce = 'sum'"), &["fine bad fine", ""]), [2.5, 0.0]);
    refused(&format!("{mean}\nreduce = 'sum'\nprior = 1"), &["prior does nothing to a sum"]);
    refused(&format!("{mean}\nprior = -1"), &["prior: expected 0 or more"]);
    refused("kind = 'lexicon'\nfile = 'no.tsv'", &["no.tsv", "No such file"]);
    for (text, what) in [
        ("", "rates no word"),
        ("# nothing\n\n", "rates no word"),
        ("fine\n", "line 1: expected a word, a tab and a finite number, found \"fine\""),
        ("a\t1\nfine\tnan\n", "line 2: expected"),
        ("fine\t1\nfine\t1\n", "line 2: \"fine\" is rated twice"),
        ("Fine\t1\n", "\"Fine\" is never found in a text"),
        ("two words\t1\n", "\"two words\" is never found"),
    ] {
        let toml = "[[reward]]\nkind = 'lexicon'\nfile = 'words.tsv'";
        let error = open(&folder(&[("rewards.toml", toml), ("words.tsv", text)])).err().unwrap().to_string();
        assert!(error.contains(what), "{error:?} lacks {what:?}");
    }
    // Two ratings that no sum holds.
    let files = [("rewards.toml", "[[reward]]\nkind = 'lexicon'\nfile = 'w'"), ("w", "a\t1e308\tmany\r\nb\t1e308\r\n")];
    let dir = folder(&files);
    let (prompt, rewards) = (Content::Text("p".into()), open(&dir).unwrap());
    let cpu = Cpu::new(1).unwrap();
    let error = Jury::new(&cpu, &rewards, PACKING).score(&[sample(&prompt, "a b", None)]).unwrap_err().to_string();
    assert!(error.contains("\"lexicon\": gives a completion of row 7 an infinite reward"), "{error}");
}

#[test]
fn files_are_checked() {
    let error = |text: &str| open(&folder(&[("rewards.toml", text)])).err().unwrap().to_string();
    let holds = |text: &str, part: &str| {
        let error = error(text);
        assert!(error.contains(part), "{error:?} lacks {part:?}");
    };
    holds("", "rewards.toml: holds no [[reward]] table");
    holds("reward = 1", "holds no [[reward]] table");
    holds("reward = []", "holds no [[reward]] table");
    holds("[reward]\nkind = 'regex'", "holds no [[reward]] table");
    holds("x = 1\n[[reward]]\nkind = 'regex'", "unknown key \"x\"");
    holds("[[reward]\n", "rewards.toml: TOML parse error at line 1");
    holds("[[reward]]\nname = 'a'", "reward \"a\": kind is missing; known are exact_match, fluency, format");
    holds("[[reward]]\nkind = 'regexp'", "there is no kind \"regexp\"; did you mean \"regex\"?");
    holds(
        "[[reward]]\nkind = 'regex'\npatern = 'a'",
        "unknown key \"patern\" of a \"regex\"; did you mean \"pattern\"?",
    );
    holds("[[reward]]\nkind = 'regex'\npattern = 'a'\nwieght = 1", "did you mean \"weight\"?");
    holds("[[reward]]\nkind = 'regex'\npattern = 'a'\nweight = 'x'", "weight: expected a number, found string \"x\"");
    holds("[[reward]]\nkind = 'regex'\npattern = 'a'\nname = ''", "name: expected a text");
    holds("[[reward]]\nkind = 'regex'\npattern = 3", "reward 1: invalid type: integer `3`");
    let twice = "[[reward]]\nkind = 'regex'\npattern = 'a'\n".repeat(2);
    holds(&twice, "a second reward is called \"regex\"");
    assert!(Rewards::open(&[]).err().unwrap().to_string().contains("--reward: missing"));
    let nowhere = RewardSpec::parse("no/where.toml").unwrap();
    assert!(Rewards::open(&[nowhere]).err().unwrap().to_string().contains("there is no such file or folder"));
}

#[test]
fn weights_multiply() {
    let parse = |text| RewardSpec::parse(text).map(|spec| (spec.what.display().to_string(), spec.weight));
    assert_eq!(parse("a/b.toml=-0.5").unwrap(), ("a/b.toml".into(), -0.5));
    assert_eq!(parse("a=b").unwrap(), ("a=b".into(), 1.0));
    assert_eq!(parse("a=0").unwrap().1, 0.0);
    assert!(parse("").is_err() && parse("=1").is_err() && parse("a=nan").is_err() && parse("a=inf").is_err());
    let toml = "[[reward]]\nkind = 'regex'\npattern = 'a'\n[[reward]]\nname = 'b'\nkind = 'regex'\npattern = 'b'\nweight = 3\n";
    let dir = folder(&[("rewards.toml", toml)]);
    let specs = [RewardSpec { what: dir.path().join("rewards.toml"), weight: 0.5, fluency: false }];
    let rewards = Rewards::open(&specs).unwrap();
    assert_eq!((rewards.names(), rewards.weights()), (vec!["regex".into(), "b".into()], vec![0.5, 1.5]));
    assert_eq!(rewards.plan(DType::F32.into(), &Default::default()), Default::default());
}

#[test]
fn identity_is_of_all_that_decides() {
    let toml = "[[reward]]\nkind = 'lexicon'\nfile = 'w'\n[[reward]]\nkind = 'process'\ncommand = ['sh', 'judge']\n";
    let dir = folder(&[("rewards.toml", toml), ("w", "a\t1\n"), ("judge", "exit 1")]);
    let identity = || open(&dir).unwrap().identity().unwrap();
    let mut seen = vec![identity()];
    assert_eq!(identity(), seen[0]);
    for (file, text) in [
        ("w", "a\t2\n"),
        ("judge", "exit 2"),
        ("rewards.toml", &format!("{toml}timeout_s = 9\n")),
        ("rewards.toml", &format!("{toml}weight = 2\n")),
    ] {
        fs::write(dir.path().join(file), text).unwrap();
        assert!(!seen.contains(&identity()), "{file}");
        seen.push(identity());
    }
}

// ---- programs -------------------------------------------------------------------------------------------------

/// A shell script as the judge, asked about `completions` one call after the other.
fn judged(script: &str, options: &str, completions: &[&str]) -> (TempDir, Vec<Result<f64>>) {
    let toml = format!("[[reward]]\nname = 'judge'\nkind = 'process'\ncommand = ['sh', 'judge']\n{options}");
    let dir = folder(&[("rewards.toml", &toml), ("judge", script)]);
    let rewards = open(&dir).unwrap();
    let cpu = Cpu::new(1).unwrap();
    let mut jury = Jury::new(&cpu, &rewards, PACKING);
    let prompt = Content::Text("a \"p\"".into());
    let one = |text: &&str| jury.score(&[sample(&prompt, text, Some("é"))]).map(|scores| scores[0][0]);
    let said = completions.iter().map(one).collect();
    (dir, said)
}

#[track_caller]
fn fails(script: &str, options: &str, parts: &[&str]) {
    let (_dir, said) = judged(script, options, &["x"]);
    let error = said.into_iter().next().unwrap().unwrap_err().to_string();
    for part in parts {
        assert!(error.contains(part), "{error:?} lacks {part:?}");
    }
}

#[test]
fn a_program_judges() {
    let script = "while read -r line; do printf '%s\\n' \"$line\" >> seen; case $line in *none*) echo null;; *nothing*) echo '{\"reward\": null}';; \
                  *) echo ' {\"reward\": -1.5, \"why\": \"x\"} ';; esac; done";
    let (dir, said) = judged(script, "", &["é\n", "none", "nothing", "é\n"]);
    let said: Vec<f64> = said.into_iter().map(Result::unwrap).collect();
    assert!(said[0] == -1.5 && said[1].is_nan() && said[2].is_nan() && said[3] == -1.5);
    let seen = fs::read_to_string(dir.path().join("seen")).unwrap();
    // What it was asked once it is not asked again.
    assert_eq!(seen.lines().count(), 3);
    let first = r#"{"prompt":"a \"p\"","completion":"é\n","answer":"é","finished":true}"#;
    assert_eq!(seen.lines().next().unwrap(), first);
}

#[test]
fn a_program_that_ends_is_started_again() {
    // Answers once in each life.
    let script = "echo life >> lives; read line; echo '{\"reward\": 2}'";
    let (dir, said) = judged(script, "restarts = 1", &["a", "b", "c"]);
    assert_eq!(said[..2].iter().map(|said| *said.as_ref().unwrap()).collect::<Vec<_>>(), [2.0, 2.0]);
    let error = said[2].as_ref().unwrap_err().to_string();
    assert!(error.contains("ended before it answered (exit status: 0)"), "{error}");
    assert_eq!(fs::read_to_string(dir.path().join("lives")).unwrap().lines().count(), 2);
}

#[test]
fn a_program_that_dies_is_quoted() {
    fails(
        "echo 'no module named torch' >&2; exit 3",
        "restarts = 0",
        &["\"judge\"", "sh: ended before it answered (exit status: 3)", "stderr:\n  no module named torch"],
    );
    fails("kill -9 $$", "restarts = 1", &["ended before it answered (signal: 9"]);
    fails("exec 1>&-; sleep 30", "restarts = 0", &["closed its stdout"]);
}

#[test]
fn a_program_that_hangs_is_killed_with_its_children() {
    let began = Instant::now();
    let script = "echo waiting >&2; sleep 300 & echo $! > child; wait";
    let (dir, said) = judged(script, "timeout_s = 0.5\nrestarts = 1", &["x"]);
    let error = said.into_iter().next().unwrap().unwrap_err().to_string();
    assert!(error.contains("did not answer within 0.5 s; it wrote on stderr:\n  waiting"), "{error}");
    assert!(began.elapsed() < Duration::from_secs(60));
    assert_gone(&dir.path().join("child"));
}

/// The process whose id a file holds is there no more, or dead and not yet reaped by its new parent.
#[track_caller]
fn assert_gone(file: &Path) {
    let id = fs::read_to_string(file).unwrap().trim().to_string();
    let alive = || {
        let stat = fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
        stat.rsplit(')').next().is_some_and(|rest| !rest.trim().is_empty() && !rest.trim().starts_with('Z'))
    };
    let until = Instant::now() + Duration::from_secs(10);
    while alive() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(!alive(), "process {id} is left behind");
}

#[test]
fn a_program_does_not_outlive_its_jury() {
    // It does not care that its stdin ended.
    let script = "echo $$ > me; read line; echo '{\"reward\": 1}'; while true; do sleep 1; done";
    let (dir, said) = judged(script, "", &["x"]);
    assert_eq!(*said[0].as_ref().unwrap(), 1.0);
    assert_gone(&dir.path().join("me"));
}

#[test]
fn garbage_is_refused() {
    let says = |line: &str| format!("read line; echo '{line}'; sleep 30");
    for line in ["hello", "[1]", "1.0", "{}", "{\"reward\": \"1\"}", "{\"reward\": 1e999}", "{\"reward\": NaN}", ""] {
        fails(&says(line), "", &["judge", &format!("answered {line:?}, expected {{\"reward\": number}}"), "of row 7"]);
    }
    fails(&says("{\"error\": \"too hot\"}"), "", &["reports an error: too hot (a completion of row 7)"]);
    fails("read line; printf '\\377\\n'; sleep 30", "", &["answered what is not UTF-8"]);
    fails("head -c 3000000 /dev/zero; sleep 30", "", &["answered a line of more than 1048576 bytes"]);
    // What comes after an answer is seen at once or with the next request.
    for script in ["yes null", "while read line; do echo null; echo null; done"] {
        let completions: Vec<String> = (0..20).map(|i| i.to_string()).collect();
        let (_dir, said) = judged(script, "", &completions.iter().map(String::as_str).collect::<Vec<_>>());
        let errors: Vec<String> = said.iter().filter_map(|said| said.as_ref().err().map(ToString::to_string)).collect();
        assert!(!errors.is_empty() && errors[0].contains("answered more than one line to a request"), "{errors:?}");
    }
}

#[test]
fn a_program_that_does_not_read_holds_nobody_up() {
    let long = "x".repeat(1 << 20);
    let (_dir, said) = judged("sleep 300", "timeout_s = 0.3\nrestarts = 0", &[&long]);
    assert!(said[0].as_ref().unwrap_err().to_string().contains("did not answer within 0.3 s"));
}

#[test]
fn programs_are_found_before_a_run() {
    refused(
        "kind = 'process'\ncommand = ['no-such-program-anywhere']",
        &["there is no program \"no-such-program-anywhere\""],
    );
    refused("kind = 'process'\ncommand = ['./words.tsv']", &["there is no program \"./words.tsv\" to run"]);
    refused("kind = 'process'\ncommand = []", &["expected a program and its arguments"]);
    refused("kind = 'process'\ncommand = ['sh']\ntimeout_s = 0", &["timeout_s: expected seconds above 0"]);
    refused("kind = 'process'\ncommand = ['sh']\ntimeout_s = nan", &["timeout_s: expected seconds above 0"]);
}

// ---- the registry ---------------------------------------------------------------------------------------------

/// Every key that a kind lists is one that its reader knows: a table, which none takes, is refused as a value.
#[test]
fn listed_keys_are_read() {
    for entry in all() {
        assert!(!entry.keys.is_empty() && entry.name == entry.name.to_lowercase(), "{}", entry.name);
        for (key, _) in entry.keys {
            let error = ask(&format!("kind = '{}'\n{key} = {{ x = 1 }}", entry.name), &[]).unwrap_err().to_string();
            assert!(!error.contains("unknown field"), "{} lists {key}: {error}", entry.name);
        }
    }
}

// ---- servers --------------------------------------------------------------------------------------------------

/// Answers as many requests as there are answers, status and body, and gives what it was sent.
fn serve(answers: &'static [(&'static str, &'static str)]) -> (String, JoinHandle<Vec<String>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/judge", listener.local_addr().unwrap());
    let one = move |(status, body): &(&str, &str)| {
        let (mut stream, _) = listener.accept().unwrap();
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        let (mut head, mut length) = (String::new(), 0);
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            if let Some(bytes) = line.to_lowercase().strip_prefix("content-length:") {
                length = bytes.trim().parse().unwrap();
            }
            head += &line;
            if line.trim().is_empty() {
                break;
            }
        }
        let mut sent = vec![0; length];
        reader.read_exact(&mut sent).unwrap();
        let close = format!("content-length: {}\r\nconnection: close", body.len());
        write!(stream, "HTTP/1.1 {status}\r\n{close}\r\n\r\n{body}").unwrap();
        head + &String::from_utf8(sent).unwrap()
    };
    (url, thread::spawn(move || answers.iter().map(one).collect()))
}

fn judged_by_server(options: &str, completions: &[&str]) -> Result<Vec<f64>> {
    let dir = folder(&[("rewards.toml", &format!("[[reward]]\nname = 'judge'\nkind = 'http'\n{options}"))]);
    let rewards = open(&dir)?;
    let cpu = Cpu::new(1).unwrap();
    let prompt = Content::Text("p".into());
    let samples: Vec<Sample> = completions.iter().map(|text| sample(&prompt, text, None)).collect();
    Jury::new(&cpu, &rewards, PACKING).score(&samples).map(|mut scores| scores.remove(0))
}

#[test]
fn a_server_judges() {
    // PATH is a variable that every test has.
    let (url, asked) = serve(&[
        ("200 OK", r#"{"rewards": [1.5, null]}"#),
        ("503 Busy", "later"),
        ("200 OK", r#"{"rewards": [-2], "by": "x"}"#),
    ]);
    let said = judged_by_server(&format!("url = '{url}'\nbatch = 2\ntoken_env = 'PATH'"), &["a", "b\n", "c"]).unwrap();
    assert!(said[0] == 1.5 && said[1].is_nan() && said[2] == -2.0);
    let asked = asked.join().unwrap();
    assert!(asked[0].starts_with("POST /judge ") && asked[0].contains("Bearer /"), "{}", asked[0]);
    let first = r#"{"samples":[{"prompt":"p","completion":"a","answer":null,"finished":true},{"prompt":"p","completion":"b\n","answer":null,"finished":true}]}"#;
    assert!(asked[0].ends_with(first), "{}", asked[0]);
    assert_eq!(asked[1], asked[2]);
}

#[test]
fn a_server_that_does_not_judge_is_quoted() {
    let fails = |url: &str, options: &str, parts: &[&str]| {
        let error = judged_by_server(&format!("url = '{url}'\n{options}"), &["a"]).unwrap_err().to_string();
        parts.iter().for_each(|part| assert!(error.contains(part), "{error:?} lacks {part:?}"));
    };
    for (answer, part) in [
        (&[("200 OK", r#"{"rewards": [1, 2]}"#)], "with 1 rewards, found 2"),
        (&[("200 OK", r#"{"rewards": ["good"]}"#)], "with finite numbers or null"),
        (&[("200 OK", "fine")], "answered \"fine\", expected {\"rewards\": [..]} with JSON"),
        (&[("200 OK", r#"{"error": "no model"}"#)], "reports an error: \"no model\""),
        (&[("404 Not Found", "nothing here")], "status 404: \"nothing here\""),
        (&[("302 Found", "elsewhere")], "status 302"),
    ] as [(&'static [(&str, &str)], &str); 6]
    {
        fails(&serve(answer).0, "", &["\"judge\"", "127.0.0.1", part]);
    }
    fails(&serve(&[("500 No", "broken")]).0, "retries = 0", &["status 500: \"broken\""]);
    // Nobody listens on a port that was given back.
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    fails(&format!("http://{free}"), "retries = 1", &["refused"]);
    // Taken, and never answered.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let began = Instant::now();
    fails(&format!("http://{}", silent.local_addr().unwrap()), "retries = 0\ntimeout_s = 0.2", &["timeout"]);
    assert!(began.elapsed() < Duration::from_secs(5));
    refused("kind = 'http'\nurl = 'https://a.b'", &["expected http://"]);
    refused("kind = 'http'\nurl = 'http://a.b'\nbatch = 0", &["batch: expected 1"]);
    refused("kind = 'http'\nurl = 'http://a.b'\ntoken_env = 'NOT_A_VARIABLE'", &["no variable NOT_A_VARIABLE"]);
}
