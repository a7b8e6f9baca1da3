//! Runs the `cuvee` binary as a user does, in a fresh folder with a cache of its own.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use cuvee::lineage;
use flate2::read::GzDecoder;
use serde_json::{Map, Value};

pub type Line = Map<String, Value>;

/// The folder of the shipped model, data and recipes.
pub fn root() -> PathBuf {
    let root = std::env::var_os("CUVEE_TEST_ROOT").map_or(PathBuf::from("."), PathBuf::from);
    root.canonicalize().unwrap()
}

pub const MODEL_FILES: [&str; 5] =
    ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"];

/// A folder to run commands in. `model` in it is the shipped model, which must not be written to.
pub struct Workspace {
    dir: tempfile::TempDir,
}

impl Workspace {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(root().join("assets/review-llama-656k"), dir.path().join("model")).unwrap();
        Self { dir }
    }

    /// With `rows` film-review pairs in train.jsonl and some held-out ones in heldout.jsonl.
    pub fn with_reviews(rows: usize) -> Self {
        let workspace = Self::new();
        workspace.write_lines("train.jsonl", &reviews("train")[..rows]);
        workspace.write_lines("heldout.jsonl", &reviews("heldout")[..16]);
        workspace
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn exists(&self, name: &str) -> bool {
        self.path(name).exists()
    }

    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::write(self.path(name), content).unwrap();
    }

    pub fn write_lines(&self, name: &str, rows: &[Value]) {
        self.write(name, rows.iter().map(|row| format!("{row}\n")).collect::<String>());
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    pub fn text(&self, name: &str) -> String {
        String::from_utf8(self.read(name)).unwrap()
    }

    /// What a file that is being written holds so far; nothing if it is not there.
    pub fn so_far(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    pub fn json(&self, name: &str) -> Value {
        serde_json::from_slice(&self.read(name)).unwrap()
    }

    pub fn lines(&self, name: &str) -> Vec<Line> {
        self.text(name).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The values of one key of a file of JSON lines.
    pub fn column(&self, name: &str, key: &str) -> Vec<f64> {
        let number = |line: &Line| line[key].as_f64().unwrap_or_else(|| panic!("{name}: {key} is {}", line[key]));
        self.lines(name).iter().map(number).collect()
    }

    /// A copy of the shipped model that a test may damage.
    pub fn copy_model(&self, name: &str) {
        fs::create_dir(self.path(name)).unwrap();
        for file in MODEL_FILES {
            self.write(&format!("{name}/{file}"), self.read(&format!("model/{file}")));
        }
    }

    /// The one cache file of reference log-probabilities, if there is one.
    pub fn cache_file(&self) -> Option<PathBuf> {
        let entries = fs::read_dir(self.path("cache/refs")).ok()?.map(|e| e.unwrap().path());
        let mut files: Vec<_> = entries.filter(|path| path.extension().is_some_and(|e| e == "logps")).collect();
        assert!(files.len() < 2, "{files:?}");
        files.pop()
    }

    /// Names in a folder, sorted.
    pub fn names(&self, folder: &str) -> Vec<String> {
        let entries = fs::read_dir(self.path(folder)).unwrap();
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// `cuvee` with the words of `line` as arguments.
    pub fn command(&self, line: &str) -> Command {
        self.command_of(&line.split_whitespace().collect::<Vec<_>>())
    }

    pub fn command_of(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cuvee"));
        command.args(args).current_dir(self.dir.path()).env("CUVEE_CACHE_DIR", self.path("cache"));
        // A machine with a GPU shows what others do.
        command.env("CUDA_VISIBLE_DEVICES", "");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    pub fn spawn(&self, line: &str) -> Running {
        Running::new(&mut self.command(line))
    }

    pub fn run(&self, line: &str) -> Finished {
        self.spawn(line).wait()
    }

    /// Runs what must succeed.
    pub fn ok(&self, line: &str) -> Finished {
        let finished = self.run(line);
        assert_eq!(finished.code, Some(0), "{line}\n{}", finished.stderr);
        finished
    }

    /// Runs what must fail, with this exit code and a message that holds all of `parts`; returns the message.
    pub fn fails(&self, code: i32, line: &str, parts: &[&str]) -> String {
        let finished = self.run(line);
        let context = format!("{line}\n{}\n{}", finished.stdout, finished.stderr);
        assert_eq!(finished.code, Some(code), "{context}");
        assert_eq!(finished.stdout, "", "{context}");
        let message = finished.error();
        parts.iter().for_each(|part| assert!(message.contains(part), "{part:?} is not in: {context}"));
        message
    }
}

/// How a command ended.
pub struct Finished {
    /// `None` for a signal.
    pub code: Option<i32>,
    pub signal: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Finished {
    /// What stands behind `error: ` on stderr.
    pub fn error(&self) -> String {
        let (_, message) = self.stderr.split_once("error: ").unwrap_or_else(|| panic!("no error: {}", self.stderr));
        message.trim_end().to_string()
    }
}

/// A command that has been started. It is killed when this goes out of scope.
pub struct Running {
    child: Child,
    // Both streams are read all the time: a full pipe would stop the program.
    stdout: Option<std::thread::JoinHandle<String>>,
    stderr: Option<std::thread::JoinHandle<String>>,
}

impl Running {
    pub fn new(command: &mut Command) -> Self {
        let mut child = command.spawn().unwrap();
        let stdout = child.stdout.take().map(collect);
        let stderr = child.stderr.take().map(collect);
        Self { child, stdout, stderr }
    }

    /// Waits until the condition holds; false if the program ended before.
    pub fn wait_until(&mut self, condition: impl Fn() -> bool) -> bool {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !condition() {
            if self.child.try_wait().unwrap().is_some() {
                return false;
            }
            assert!(Instant::now() < deadline, "the program hangs");
            std::thread::sleep(Duration::from_micros(200));
        }
        true
    }

    /// Waits for the end; the largest amount of memory in use until then (VmHWM), in bytes, as the system counts it.
    pub fn peak_memory(mut self) -> usize {
        let status = format!("/proc/{}/status", self.child.id());
        let mut peak = 0;
        while self.child.try_wait().unwrap().is_none() {
            let text = fs::read_to_string(&status).unwrap_or_default();
            let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:")?.strip_suffix(" kB"));
            peak = peak.max(line.map_or(0, |kib| kib.trim().parse::<usize>().unwrap() << 10));
            std::thread::sleep(Duration::from_millis(2));
        }
        let finished = self.finish();
        assert_eq!(finished.code, Some(0), "{}", finished.stderr);
        peak
    }

    pub fn signal(&self, signal: i32) {
        // SAFETY: the child has not been waited for, so the id is still its own.
        unsafe { libc::kill(self.child.id() as i32, signal) };
    }

    /// kill -9, and what was written until then. The program may have ended by itself.
    pub fn kill(mut self) -> Finished {
        self.child.kill().unwrap();
        self.finish()
    }

    /// kill -9 of it and of every process that it has started.
    pub fn kill_with_children(self) -> Finished {
        let own = self.child.id().to_string();
        // PID (NAME) STATE PARENT; a name may hold anything but ends with the last parenthesis.
        let is_child = |pid: &i32| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1)) == Some(own.as_str())
        };
        let all = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
        let children: Vec<i32> = all.filter(is_child).collect();
        let finished = self.kill();
        for child in children {
            // SAFETY: a signal to a process that the killed one had started; it may have ended by itself.
            unsafe { libc::kill(child, libc::SIGKILL) };
        }
        finished
    }

    pub fn wait(mut self) -> Finished {
        self.finish()
    }

    fn finish(&mut self) -> Finished {
        let status = self.child.wait().unwrap();
        let text = |stream: &mut Option<std::thread::JoinHandle<String>>| {
            stream.take().map_or(String::new(), |reader| reader.join().unwrap())
        };
        let (stdout, stderr) = (text(&mut self.stdout), text(&mut self.stderr));
        assert!(!stderr.contains("panicked"), "{stderr}");
        Finished { code: status.code(), signal: status.signal(), stdout, stderr }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn collect(mut stream: impl Read + Send + 'static) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        String::from_utf8(bytes).unwrap()
    })
}

/// The rows of `assets/film-reviews/NAME.jsonl.gz`.
pub fn reviews(name: &str) -> Vec<Value> {
    let file = fs::File::open(root().join(format!("assets/film-reviews/{name}.jsonl.gz"))).unwrap();
    let mut text = String::new();
    GzDecoder::new(file).read_to_string(&mut text).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Every file of a run that must not depend on how the run went: name and content, without times. The recipe is
/// left out, as it holds the flags that differ.
pub fn results(run: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    collect_results(run, "", &mut found);
    found
}

fn collect_results(dir: &Path, prefix: &str, found: &mut BTreeMap<String, Vec<u8>>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = format!("{prefix}{}", path.file_name().unwrap().to_str().unwrap());
        if path.is_dir() {
            collect_results(&path, &format!("{name}/"), found);
            continue;
        }
        let content = fs::read(&path).unwrap();
        let content = match path.extension().and_then(|e| e.to_str()) {
            Some("jsonl") => String::from_utf8(content).unwrap().lines().flat_map(without_incidentals).collect(),
            Some("json") if name.ends_with(lineage::FILE) => {
                // It calls the model by its folder.
                let mut lineage: Value = serde_json::from_slice(&content).unwrap();
                lineage.as_object_mut().unwrap().remove("name");
                without_incidentals(&lineage.to_string())
            }
            Some("json") => without_incidentals(std::str::from_utf8(&content).unwrap()),
            _ => content,
        };
        if name != "recipe.toml" && name != "cuvee.lock" {
            found.insert(name, content);
        }
    }
}

/// What may differ between runs that are the same: times, and how a batch was called.
const INCIDENTAL: [&str; 4] = ["step_time", "sampling_time", "eval_runtime", "train_batch_size"];

fn without_incidentals(json: &str) -> Vec<u8> {
    fn strip(value: &mut Value) {
        match value {
            Value::Object(map) => {
                map.retain(|key, _| !INCIDENTAL.contains(&key.as_str()));
                map.values_mut().for_each(strip);
            }
            Value::Array(items) => items.iter_mut().for_each(strip),
            _ => {}
        }
    }
    let mut value: Value = serde_json::from_str(json).unwrap();
    strip(&mut value);
    format!("{value}\n").into_bytes()
}

/// Two runs left the same files with the same content.
pub fn assert_same(what: &str, expected: &BTreeMap<String, Vec<u8>>, found: &BTreeMap<String, Vec<u8>>) {
    assert_eq!(expected.keys().collect::<Vec<_>>(), found.keys().collect::<Vec<_>>(), "{what}: the files");
    for (name, content) in expected {
        if *content == found[name] {
            continue;
        }
        let (a, b) = (String::from_utf8_lossy(content), String::from_utf8_lossy(&found[name]));
        let line = a.lines().zip(b.lines()).find(|(a, b)| a != b).filter(|_| name.contains(".json"));
        panic!("{what}: {name} differs, {} and {} bytes: {line:?}", content.len(), found[name].len());
    }
}
