//! A program that judges: it gets a JSON object in a line on its stdin for each completion, and answers each with one on its
//! stdout.
//!
//! ```text
//! {"prompt": "Review:", "completion": " A fine film.", "answer": null, "finished": true}
//! {"reward": 1.0}            or {"reward": null} or null: nothing to say            or {"error": "why not"}
//! ```
//!
//! A prompt of messages is a list of them. The program is started when it is needed first and asked about one completion at a
//! time. If it ends or does not answer in time, it is killed with all that it started, and started again a number of times. It
//! has a process group of its own, so an interrupt at the terminal reaches it only through us.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle, sleep};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Value, json};

use super::jury::Judge;
use super::registry::{Kind, Place, options};
use super::{Entry, Sample, Verdict};
use crate::data::Content;
use crate::error::{Error, Result};
use crate::progress::say;

pub const ENTRY: Entry = Entry {
    name: "process",
    summary: "what a program of yours answers to {\"prompt\", \"completion\", \"answer\", \"finished\"}: {\"reward\": 1.0}, null or {\"error\": \"..\"}, a JSON object a line",
    keys: &[
        ("command", "program and arguments, such as [\"python3\", \"judge.py\"]; it runs in the folder of this file"),
        ("timeout_s", "seconds for an answer, the start included [60]"),
        ("restarts", "how often in a run it is started again after it ended or hung [3]"),
    ],
    open: |table, place| {
        let Options { command, timeout_s, restarts } = options(table)?;
        if !(timeout_s > 0.0 && timeout_s <= LONGEST_TIMEOUT_S) {
            return Err(format!("timeout_s: expected seconds above 0, {LONGEST_TIMEOUT_S} at most, found {timeout_s}"));
        }
        let Some(name) = command.first().filter(|name| !name.is_empty()) else {
            return Err("command: expected a program and its arguments".into());
        };
        let program = find(name, place).ok_or_else(|| format!("command: there is no program {name:?} to run"))?;
        // Scripts and files among its arguments decide what it says.
        for word in &command {
            if place.folder.join(word).is_file() {
                place.read(Path::new(word))?;
            }
        }
        let (arguments, folder) = (command[1..].to_vec(), place.folder.clone());
        let timeout = Duration::from_secs_f64(timeout_s);
        Ok(Kind::Process(Program { program, arguments, folder, timeout, restarts }))
    },
};

const LONGEST_TIMEOUT_S: f64 = 1e6;
/// A line of an answer.
const LONGEST_ANSWER: usize = 1 << 20;
/// Of what it writes on stderr.
const LAST_LINES: usize = 10;
const LONGEST_LINE: usize = 400;
/// For a program that is no longer needed to end by itself.
const GRACE: Duration = Duration::from_secs(1);
/// For an answer that nobody asked for to show, once for all requests of a step.
const SETTLE: Duration = Duration::from_millis(20);
const TWICE: &str = "answered more than one line to a request";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Options {
    command: Vec<String>,
    #[serde(default = "minute")]
    timeout_s: f64,
    #[serde(default = "three")]
    restarts: u32,
}

fn minute() -> f64 {
    60.0
}

fn three() -> u32 {
    3
}

/// A program that was found.
pub struct Program {
    program: PathBuf,
    arguments: Vec<String>,
    folder: PathBuf,
    timeout: Duration,
    restarts: u32,
}

/// As a shell finds it; a path starts at the folder.
fn find(name: &str, place: &Place) -> Option<PathBuf> {
    let runs =
        |path: &PathBuf| path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0);
    if name.contains('/') {
        // The program is started in another folder than the path is relative to.
        return place.folder.join(name).canonicalize().ok().filter(runs);
    }
    let folders = std::env::var_os("PATH")?;
    std::env::split_paths(&folders).map(|folder| folder.join(name)).find(runs)
}

/// A program at work.
pub struct Worker<'a> {
    program: &'a Program,
    running: Option<Running>,
    restarts: u32,
}

struct Running {
    child: Child,
    /// Written by a thread: a program that does not read must not hold us up. Dropped, its stdin ends.
    requests: Option<Sender<String>>,
    answers: Receiver<Result<String, String>>,
    errors: Arc<Mutex<VecDeque<String>>>,
    reader: JoinHandle<()>,
}

/// Why there is no answer.
enum Failure {
    /// Another start may help.
    Gone(String),
    /// It does not keep to the protocol.
    Wrong(String),
}

impl<'a> Worker<'a> {
    pub fn new(program: &'a Program) -> Self {
        Self { program, running: None, restarts: program.restarts }
    }

    fn ask(&mut self, request: &str) -> Result<String> {
        loop {
            let running = match &mut self.running {
                Some(running) => running,
                idle => idle.insert(self.program.start()?),
            };
            let (again, detail) = match running.ask(request, self.program.timeout) {
                Ok(answer) => return Ok(answer),
                Err(Failure::Gone(detail)) => (self.restarts > 0, detail),
                Err(Failure::Wrong(detail)) => (false, detail),
            };
            let errors = self.running.take().map(|running| running.end(Duration::ZERO)).unwrap_or_default();
            let what = format!("{detail}{errors}");
            if !again {
                return Err(Error::file(&self.program.program, what));
            }
            self.restarts -= 1;
            say(format_args!("{}: {what}; it is started again", self.program.program.display()));
        }
    }
}

impl Worker<'_> {
    /// Behind the last of some requests: one answer too many has put all that follow out of step.
    fn settle(&mut self) -> Result<()> {
        let Some(Ok(unasked)) = self.running.as_ref().map(|running| running.answers.recv_timeout(SETTLE)) else {
            return Ok(());
        };
        let errors = self.running.take().map(|running| running.end(Duration::ZERO)).unwrap_or_default();
        Err(Error::file(&self.program.program, format!("{}{errors}", unasked.err().unwrap_or(TWICE.into()))))
    }
}

impl Drop for Worker<'_> {
    fn drop(&mut self) {
        if let Some(running) = self.running.take() {
            running.end(GRACE);
        }
    }
}

impl Judge for Worker<'_> {
    fn judge(&mut self, samples: &[&Sample]) -> Result<Vec<Verdict>> {
        let one = |sample: &&Sample| {
            let answer = self.ask(&format!("{}\n", asked(sample)))?;
            let of_row =
                |detail| Error::file(&self.program.program, format!("{detail} (a completion of row {})", sample.row));
            reward(&answer).map(Verdict::of).map_err(of_row)
        };
        let verdicts = samples.iter().map(one).collect::<Result<_>>()?;
        self.settle()?;
        Ok(verdicts)
    }
}

/// What a judge elsewhere is told of a completion.
pub(super) fn asked(sample: &Sample) -> Value {
    let prompt: Value = match sample.prompt {
        Content::Text(text) => text.as_str().into(),
        Content::Messages(messages) => messages.iter().cloned().map(Value::Object).collect(),
    };
    let Sample { completion, answer, finished, .. } = sample;
    json!({"prompt": prompt, "completion": completion, "answer": answer, "finished": finished})
}

/// What a line of its stdout says.
fn reward(line: &str) -> Result<f64, String> {
    let wrong = || {
        let line: String = line.chars().take(LONGEST_LINE).collect();
        format!(
            "answered {line:?}, expected {{\"reward\": number}}, null or {{\"error\": text}}; what else it has to say belongs on stderr"
        )
    };
    match serde_json::from_str::<Value>(line).map_err(|_| wrong())? {
        Value::Null => Ok(f64::NAN),
        Value::Object(answer) => match (answer.get("reward"), answer.get("error")) {
            (_, Some(Value::String(error))) => Err(format!("reports an error: {error}")),
            (Some(Value::Null), None) => Ok(f64::NAN),
            (Some(reward), None) => reward.as_f64().filter(|reward| reward.is_finite()).ok_or_else(wrong),
            _ => Err(wrong()),
        },
        _ => Err(wrong()),
    }
}

impl Program {
    fn start(&self) -> Result<Running> {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).current_dir(&self.folder).process_group(0);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|e| Error::file(&self.program, format!("cannot be started: {e}")))?;
        let mut stdin = child.stdin.take().expect("it is piped");
        let stdout = child.stdout.take().expect("it is piped");
        let stderr = child.stderr.take().expect("it is piped");
        let (requests, to_write) = channel::<String>();
        thread::spawn(move || {
            // A program that closed its stdin shows in its answers.
            while let Ok(request) = to_write.recv() {
                if stdin.write_all(request.as_bytes()).and_then(|()| stdin.flush()).is_err() {
                    return;
                }
            }
        });
        // Bounded: a program that never stops answering is held up, not stored.
        let (answered, answers) = sync_channel(1);
        thread::spawn(move || read_answers(stdout, &answered));
        let errors = Arc::new(Mutex::new(VecDeque::new()));
        let last = Arc::clone(&errors);
        let reader = thread::spawn(move || read_errors(stderr, &last));
        Ok(Running { child, requests: Some(requests), answers, errors, reader })
    }
}

fn read_answers(stdout: impl Read, answered: &SyncSender<Result<String, String>>) {
    let mut stdout = BufReader::new(stdout);
    loop {
        let mut line = Vec::new();
        match stdout.by_ref().take(LONGEST_ANSWER as u64 + 1).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let answer = match String::from_utf8(line) {
            Ok(line) if line.len() > LONGEST_ANSWER => {
                Err(format!("answered a line of more than {LONGEST_ANSWER} bytes"))
            }
            Ok(line) => Ok(line.trim_end().to_string()),
            Err(_) => Err("answered what is not UTF-8".into()),
        };
        let goes_on = answer.is_ok();
        if answered.send(answer).is_err() || !goes_on {
            return;
        }
    }
}

fn read_errors(stderr: impl Read, last: &Mutex<VecDeque<String>>) {
    let mut stderr = BufReader::new(stderr);
    loop {
        let mut line = Vec::new();
        match stderr.by_ref().take(LONGEST_LINE as u64).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let line = String::from_utf8_lossy(&line).trim_end().to_string();
        let mut last = last.lock().expect("no holder panics");
        if !line.is_empty() {
            last.push_back(line);
        }
        if last.len() > LAST_LINES {
            last.pop_front();
        }
    }
}

impl Running {
    fn ask(&mut self, request: &str, timeout: Duration) -> Result<String, Failure> {
        if let Ok(unasked) = self.answers.try_recv() {
            return Err(Failure::Wrong(unasked.err().unwrap_or(TWICE.into())));
        }
        let requests = self.requests.as_ref().expect("it is there until the end");
        // Where the writer is gone, so is the program: nothing will come.
        let _ = requests.send(request.to_string());
        match self.answers.recv_timeout(timeout) {
            Ok(answer) => answer.map_err(Failure::Wrong),
            Err(RecvTimeoutError::Timeout) => {
                Err(Failure::Gone(format!("did not answer within {} s", timeout.as_secs_f64())))
            }
            Err(RecvTimeoutError::Disconnected) => {
                let ended = self.ended_within(GRACE);
                Err(Failure::Gone(if ended { "ended before it answered" } else { "closed its stdout" }.into()))
            }
        }
    }

    /// Whether it ends in this time. It is not reaped, so its id stays its own.
    fn ended_within(&self, time: Duration) -> bool {
        let until = Instant::now() + time;
        loop {
            // SAFETY: `info` is written by the call and plain data; the child is ours.
            let ended = unsafe {
                let mut info: libc::siginfo_t = std::mem::zeroed();
                let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
                libc::waitid(libc::P_PID, self.child.id(), &mut info, flags) == 0 && info.si_pid() != 0
            };
            if ended || Instant::now() >= until {
                return ended;
            }
            sleep(Duration::from_millis(2));
        }
    }

    /// Ends it and all that it started, and gives its exit status, if it ended by itself, and its last words.
    fn end(mut self, grace: Duration) -> String {
        self.requests = None;
        let by_itself = self.ended_within(grace);
        // SAFETY: the group is the child's own, which is not reaped yet.
        unsafe { libc::kill(-(self.child.id() as i32), libc::SIGKILL) };
        let status = self.child.wait().ok().filter(|_| by_itself);
        // What it wrote last may still be on its way.
        let until = Instant::now() + GRACE;
        while !self.reader.is_finished() && Instant::now() < until {
            sleep(Duration::from_millis(2));
        }
        let status = status.map_or_else(String::new, |status| format!(" ({status})"));
        let last = self.errors.lock().expect("no holder panics");
        match last.is_empty() {
            true => status,
            false => {
                format!("{status}; it wrote on stderr:\n  {}", last.iter().cloned().collect::<Vec<_>>().join("\n  "))
            }
        }
    }
}
