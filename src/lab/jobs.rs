//! The runs of an experiment as processes, in the order of what they need. One that fails stops what needs it and nothing
//! else; one that is there already, with the same settings, is not run again.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::checkpoint::json::{read_json, write_json};
use crate::checkpoint::write_file;
use crate::error::{At, Error, Result};
use crate::progress::Progress;

/// What a job has come to, in its folder.
const STATE: &str = "job.json";
/// What its processes print. Whoever writes it holds its lock, which outlives the program that started them.
const LOG: &str = "log.txt";
const POLL: Duration = Duration::from_millis(30);
/// Lines of a failed process that are shown.
const LAST_LINES: usize = 6;

/// Commands that make one thing in a folder of their own.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    /// As people read it: `ondare merge_weight=1e-5, seed 43`.
    pub name: String,
    pub dir: PathBuf,
    /// Places in the list of jobs, each before this one.
    pub needs: Vec<usize>,
    /// A hash of everything that decides its result.
    pub key: String,
    /// A file that it starts from: name and content.
    pub file: Option<(&'static str, String)>,
    pub steps: Vec<Step>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// Of this program.
    pub args: Vec<OsString>,
    pub makes: Makes,
}

/// What a step leaves behind.
#[derive(Debug, Clone, PartialEq)]
pub enum Makes {
    /// A folder that the command itself knows how to continue.
    Run,
    /// The same, up to this share of its steps: the last step of a job that is to go on later, perhaps.
    Part(f64),
    /// A folder that appears whole.
    Folder(PathBuf),
    /// A file, of what it prints.
    Output(PathBuf),
}

#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    Done,
    /// Its last lines.
    Failed(String),
    /// What it needs and has not.
    Skipped(String),
}

/// What is in a job's folder.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Found {
    Nothing,
    /// Begun, of what it would be made of now.
    Begun,
    /// Made of something else; seconds that it took, where it came to its end.
    Other(Option<f64>),
    /// Seconds that it took.
    Done(f64),
}

#[derive(Serialize, Deserialize)]
struct State {
    key: String,
    name: String,
    finished: bool,
    /// The largest share of its steps that it was to reach and has.
    #[serde(default)]
    reached: f64,
    seconds: f64,
}

impl State {
    fn new(job: &Job) -> Self {
        Self { key: job.key.clone(), name: job.name.clone(), finished: false, reached: 0.0, seconds: 0.0 }
    }

    fn read(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(STATE);
        if path.exists() { Ok(Some(serde_json::from_value(read_json(&path)?).at(&path)?)) } else { Ok(None) }
    }
}

impl Job {
    /// What there is of it.
    ///
    /// # Errors
    /// A state that cannot be read.
    pub fn found(&self) -> Result<Found> {
        Ok(match State::read(&self.dir)? {
            None => Found::Nothing,
            Some(State { key, finished: true, seconds, .. }) if key == self.key => Found::Done(seconds),
            Some(State { key, finished, seconds, .. }) if key != self.key => Found::Other(finished.then_some(seconds)),
            Some(_) => Found::Begun,
        })
    }

    /// The share of its steps that it is to reach; none: it is to finish.
    fn part(&self) -> Option<f64> {
        match self.steps.last()?.makes {
            Makes::Part(share) => Some(share),
            _ => None,
        }
    }

    /// Makes its folder, for someone else to run its commands; what is there already stays.
    ///
    /// # Errors
    /// A folder that is not a job's, or one of other settings.
    pub fn lay(&self) -> Result<()> {
        match State::read(&self.dir)? {
            Some(state) if state.key != self.key => {
                let detail =
                    "holds a run of other settings or data; move it away, or let a sweep without --print do so";
                return Err(Error::file(&self.dir, detail));
            }
            Some(_) => return Ok(()),
            None if self.dir.exists() => return Err(not_a_job(&self.dir)),
            None => {}
        }
        fs::create_dir_all(&self.dir).at(&self.dir)?;
        if let Some((name, content)) = &self.file {
            write_file(&self.dir.join(name), |out| out.write_all(content.as_bytes()))?;
        }
        write_json(&self.dir.join(STATE), &State::new(self))
    }
}

fn not_a_job(dir: &Path) -> Error {
    Error::file(dir, format!("exists and holds no {STATE}, so it is left alone; choose another --output-dir"))
}

/// How jobs are run.
pub struct Runner<'a> {
    /// The program whose arguments the steps are.
    pub program: &'a Path,
    /// Jobs at a time.
    pub jobs: usize,
    /// What this is, and what jobs are, in the plural: `comparing`, `runs`.
    pub doing: (&'a str, &'a str),
    pub stop: &'a dyn Fn() -> bool,
    /// Is asked about every job that is done, by its place: what is wrong with what it made, after which no job is begun.
    pub gate: &'a dyn Fn(usize) -> Option<String>,
}

/// A job whose process is at work.
struct Running {
    job: usize,
    step: usize,
    child: Child,
    since: Instant,
    /// What is printed so far, and what it is to be called.
    output: Option<(PathBuf, PathBuf)>,
}

struct Work<'a> {
    jobs: &'a [Job],
    runner: &'a Runner<'a>,
    outcomes: Vec<Option<Outcome>>,
    running: Vec<Running>,
    progress: Progress,
    /// Jobs that ran now, and how long they took together.
    ran: (usize, Duration),
}

impl Runner<'_> {
    /// Runs what is not there yet. What comes of a job is in the place of the job.
    ///
    /// Fails where the user interrupts, with every process told so and waited for, and where a folder is not one of these.
    pub fn run(&self, jobs: &[Job]) -> Result<Vec<Outcome>> {
        let progress = Progress::new(self.doing.0, jobs.len() as u64, self.doing.1);
        let (outcomes, running) = (vec![None; jobs.len()], Vec::new());
        let mut work = Work { jobs, runner: self, outcomes, running, progress, ran: (0, Duration::ZERO) };
        let result = work.all();
        if result.is_err() {
            work.interrupt();
        }
        work.progress.finish();
        result.map(|()| work.outcomes.into_iter().map(|outcome| outcome.expect("all are done")).collect())
    }
}

impl Work<'_> {
    fn all(&mut self) -> Result<()> {
        loop {
            if (self.runner.stop)() {
                let (done, all) = (self.done(), self.jobs.len());
                let unit = self.runner.doing.1;
                let detail = format!("{done} of {all} {unit} are done; the same command goes on where it stopped");
                return Err(Error::Interrupted { detail });
            }
            let mut idle = self.collect()?;
            while self.running.len() < self.runner.jobs {
                let Some(job) = (0..self.jobs.len()).find(|job| self.is_ready(*job)) else { break };
                idle = false;
                self.begin(job)?;
            }
            if self.outcomes.iter().all(Option::is_some) {
                return Ok(());
            }
            if idle {
                sleep(POLL);
            }
        }
    }

    fn done(&self) -> usize {
        self.outcomes.iter().flatten().count()
    }

    /// Whether everything that a job needs has come to something, and the job has not.
    fn is_ready(&self, job: usize) -> bool {
        self.outcomes[job].is_none()
            && self.running.iter().all(|running| running.job != job)
            && self.jobs[job].needs.iter().all(|need| self.outcomes[*need].is_some())
    }

    fn begin(&mut self, job: usize) -> Result<()> {
        let Job { dir, key, needs, file, name, .. } = &self.jobs[job];
        if let Some(missing) = needs.iter().find(|need| self.outcomes[**need] != Some(Outcome::Done)) {
            let missing = &self.jobs[*missing].name;
            self.close(job, Outcome::Skipped(missing.clone()), &format!("left out, as {missing} is missing"));
            return Ok(());
        }
        let mut before = State::new(&self.jobs[job]);
        let part = self.jobs[job].part();
        match State::read(dir)? {
            Some(state) if state.key == *key && (state.finished || part.is_some_and(|part| state.reached >= part)) => {
                self.progress.at(self.done() as u64 + 1, name);
                self.outcomes[job] = Some(Outcome::Done);
                self.pass(job);
                return Ok(());
            }
            Some(state) if state.key == *key => before = state,
            Some(_) => {
                let aside = set_aside(dir)?;
                self.progress.say(&format!(
                    "{name}: its settings or its data changed; the run that was there is now {}",
                    aside.display()
                ));
            }
            None if dir.exists() => return Err(not_a_job(dir)),
            None => {}
        }
        fs::create_dir_all(dir).at(dir)?;
        write_json(&dir.join(STATE), &before)?;
        if let Some((name, content)) = file {
            write_file(&dir.join(name), |out| out.write_all(content.as_bytes()))?;
        }
        self.step(job, 0, Instant::now())
    }

    /// Asks the gate about a job that is done. Behind one that fails nothing is begun; what is at work comes to its end.
    fn pass(&mut self, job: usize) {
        let Some(wrong) = (self.runner.gate)(job) else { return };
        let name = self.jobs[job].name.clone();
        self.progress.say(&format!("{name}: {wrong}"));
        self.outcomes[job] = Some(Outcome::Failed(wrong));
        let at_work: Vec<usize> = self.running.iter().map(|running| running.job).collect();
        let waiting = self.outcomes.iter_mut().enumerate().filter(|(job, _)| !at_work.contains(job));
        for (_, outcome) in waiting.filter(|(_, outcome)| outcome.is_none()) {
            *outcome = Some(Outcome::Skipped(name.clone()));
        }
    }

    /// Writes down that a job has done what it was to do, in this time.
    fn done_with(&self, job: usize, time: Duration) -> Result<()> {
        let job = &self.jobs[job];
        let Some(state) = State::read(&job.dir)? else { return Err(not_a_job(&job.dir)) };
        let seconds = state.seconds + time.as_secs_f64();
        let state = match job.part() {
            Some(reached) => State { reached, seconds, ..state },
            None => State { finished: true, seconds, ..state },
        };
        write_json(&job.dir.join(STATE), &state)
    }

    /// Starts a step, or the first one after it that is not done.
    fn step(&mut self, job: usize, mut step: usize, since: Instant) -> Result<()> {
        let Job { steps, dir, .. } = &self.jobs[job];
        while let Some(Step { makes: Makes::Folder(folder), .. }) = steps.get(step)
            && folder.exists()
        {
            step += 1;
        }
        let Some(Step { args, makes }) = steps.get(step) else {
            self.done_with(job, since.elapsed())?;
            self.ran = (self.ran.0 + 1, self.ran.1 + since.elapsed());
            self.close(job, Outcome::Done, &format!("{:.1} s", since.elapsed().as_secs_f64()));
            self.pass(job);
            return Ok(());
        };
        let log = self.log(dir)?;
        let both = |file: &File| file.try_clone().map(Stdio::from).at(dir.join(LOG));
        let output = match makes {
            Makes::Output(path) => Some((path.with_extension("tmp"), path.clone())),
            Makes::Run | Makes::Part(_) | Makes::Folder(_) => None,
        };
        let stdout = match &output {
            Some((unfinished, _)) => Stdio::from(File::create(unfinished).at(unfinished)?),
            None => both(&log)?,
        };
        let mut command = Command::new(self.runner.program);
        // In a group of its own, so that Ctrl-C reaches it once: from here.
        command.args(args).stdin(Stdio::null()).stdout(stdout).stderr(both(&log)?).process_group(0);
        let child = command.spawn().at(self.runner.program)?;
        self.running.push(Running { job, step, child, since, output });
        self.show();
        Ok(())
    }

    /// How far it is, and what is at work.
    fn show(&mut self) {
        let names: Vec<&str> = self.running.iter().map(|running| self.jobs[running.job].name.as_str()).collect();
        let (done, names) = (self.done() as u64, names.join("; "));
        self.progress.at(done, &names);
    }

    /// The job's log, to be appended to. A process that an earlier, killed program left behind is waited for.
    fn log(&self, dir: &Path) -> Result<File> {
        let path = dir.join(LOG);
        let file = OpenOptions::new().append(true).create(true).open(&path).at(&path)?;
        let mut said = false;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) if (self.runner.stop)() => {
                    return Err(Error::Interrupted { detail: "while waiting for an earlier process".into() });
                }
                Err(TryLockError::WouldBlock) => {
                    if !std::mem::replace(&mut said, true) {
                        self.progress
                            .say(&format!("waiting for an earlier process that still works in {}", dir.display()));
                    }
                    sleep(POLL);
                }
                Err(TryLockError::Error(e)) => return Err(Error::file(path, format!("cannot be locked: {e}"))),
            }
        }
    }

    /// Looks after processes that have ended. Whether there was none.
    fn collect(&mut self) -> Result<bool> {
        let mut ended = Vec::new();
        for (at, running) in self.running.iter_mut().enumerate() {
            if let Some(status) = running.child.try_wait().at(self.runner.program)? {
                ended.push((at, status));
            }
        }
        let idle = ended.is_empty();
        for (at, status) in ended.into_iter().rev() {
            let Running { job, step, since, output, .. } = self.running.remove(at);
            if !status.success() {
                let lines = last_lines(&self.jobs[job].dir.join(LOG));
                self.close(job, Outcome::Failed(lines.clone()), &format!("FAILED ({status})\n{lines}"));
                continue;
            }
            if let Some((unfinished, path)) = output {
                fs::rename(&unfinished, &path).at(&path)?;
            }
            self.step(job, step + 1, since)?;
        }
        Ok(idle)
    }

    fn close(&mut self, job: usize, outcome: Outcome, what: &str) {
        let (done, all) = (self.done() + 1, self.jobs.len());
        let left = match (&outcome, self.ran) {
            (Outcome::Failed(_) | Outcome::Skipped(_), _) | (_, (0, _)) => String::new(),
            (Outcome::Done, (ran, time)) => {
                let seconds = time.as_secs_f64() / ran as f64 * (all - done) as f64 / self.runner.jobs as f64;
                format!("; {} left", duration(seconds))
            }
        };
        self.outcomes[job] = Some(outcome);
        self.progress.say(&format!("{done}/{all} {}: {what}{left}", self.jobs[job].name));
        self.show();
    }

    /// Asks every process for a checkpoint and its end, and waits for it.
    fn interrupt(&mut self) {
        for running in &self.running {
            // Not SIGINT: who is started in the background of a shell, as by nohup, ignores that, and so do its children.
            // SAFETY: a signal to a process that was started here and that nobody has waited for.
            unsafe { libc::kill(running.child.id() as libc::pid_t, libc::SIGTERM) };
        }
        self.running.iter_mut().for_each(|running| drop(running.child.wait()));
    }
}

fn set_aside(dir: &Path) -> Result<PathBuf> {
    let name = |n: u32| PathBuf::from(format!("{}.{n}", dir.display()));
    let free = (1..).map(name).find(|path| fs::symlink_metadata(path).is_err()).expect("some number is free");
    fs::rename(dir, &free).at(dir)?;
    Ok(free)
}

/// The end of a log, without what redraws a line.
fn last_lines(path: &Path) -> String {
    let text = fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let lines: Vec<&str> = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    lines[lines.len().saturating_sub(LAST_LINES)..].iter().map(|line| format!("    {line}\n")).collect::<String>()
        + &format!("    (all of it: {})", path.display())
}

fn duration(seconds: f64) -> String {
    if seconds < 90.0 { format!("{seconds:.0} s") } else { format!("{:.0} min", seconds / 60.0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(dir: &Path, name: &str, needs: &[usize], script: &str) -> Job {
        let args = ["-c", script].map(OsString::from).to_vec();
        let dir = dir.join(name);
        let steps = vec![Step { args, makes: Makes::Output(dir.join("out")) }];
        Job { name: name.into(), dir, needs: needs.to_vec(), key: script.into(), file: None, steps }
    }

    fn run(jobs: &[Job], at_once: usize) -> Vec<Outcome> {
        runner(at_once, &|| false).run(jobs).unwrap()
    }

    fn runner(jobs: usize, stop: &dyn Fn() -> bool) -> Runner<'_> {
        Runner { program: Path::new("sh"), jobs, doing: ("testing", "runs"), stop, gate: &|_| None }
    }

    #[test]
    fn a_failure_stops_what_needs_it_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        let mut jobs = vec![
            job(dir, "base", &[], "echo base"),
            job(dir, "bad", &[0], "echo gone wrong >&2; exit 3"),
            job(dir, "on bad", &[1], "echo never"),
            job(dir, "on that", &[2], "echo never"),
            job(dir, "good", &[0], &format!("cat '{}'", dir.join("base/out").display())),
        ];
        for at_once in [1, 3] {
            let outcomes = run(&jobs, at_once);
            assert_eq!((&outcomes[0], &outcomes[4]), (&Outcome::Done, &Outcome::Done));
            assert!(matches!(&outcomes[1], Outcome::Failed(lines) if lines.contains("gone wrong")), "{outcomes:?}");
            assert_eq!(outcomes[2], Outcome::Skipped("bad".into()));
            assert_eq!(outcomes[3], Outcome::Skipped("on bad".into()));
            assert_eq!(fs::read_to_string(dir.join("good/out")).unwrap(), "base\n");
            assert!(!dir.join("on bad").exists());
        }

        // What is finished stays; what changed goes to a folder of its own, and so does nothing else.
        fs::write(dir.join("base/out"), "kept").unwrap();
        jobs[4].key += " # changed";
        run(&jobs, 2);
        assert_eq!(fs::read_to_string(dir.join("base/out")).unwrap(), "kept");
        assert_eq!(fs::read_to_string(dir.join("good/out")).unwrap(), "kept");
        assert_eq!(fs::read_to_string(dir.join("good.1/out")).unwrap(), "base\n");
        assert!(!dir.join("base.1").exists());

        fs::create_dir(dir.join("mine")).unwrap();
        let message = runner(1, &|| false).run(&[job(dir, "mine", &[], "true")]).unwrap_err().to_string();
        assert!(message.contains("left alone"), "{message}");
    }

    #[test]
    fn behind_a_gate_that_fails_nothing_is_begun() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        let jobs =
            [job(dir, "first", &[], "echo 1"), job(dir, "second", &[], "echo 2"), job(dir, "third", &[1], "echo 3")];
        let gate = |job: usize| (job == 0).then(|| "1 is too little".to_string());
        for _ in 0..2 {
            let outcomes = Runner { gate: &gate, ..runner(1, &|| false) }.run(&jobs).unwrap();
            let skipped = || Outcome::Skipped("first".into());
            assert_eq!(outcomes, [Outcome::Failed("1 is too little".into()), skipped(), skipped()]);
        }
        // What it made is there, and is not made again once the gate is lower.
        fs::write(dir.join("first/out"), "kept").unwrap();
        assert_eq!(run(&jobs, 1), [Outcome::Done, Outcome::Done, Outcome::Done]);
        assert_eq!(fs::read_to_string(dir.join("first/out")).unwrap(), "kept");
    }

    #[test]
    fn a_part_is_done_once_and_the_rest_later() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("count");
        let script = format!("echo x >> '{}'", out.display());
        let job = |makes| {
            let args = ["-c", &script].map(OsString::from).to_vec();
            Job { steps: vec![Step { args, makes }], ..job(folder.path(), "cell", &[], "key") }
        };
        // A smaller part of a larger one is there already, and so is any of the whole.
        let order = [Makes::Part(0.25), Makes::Part(0.25), Makes::Part(0.5), Makes::Part(0.25), Makes::Run, Makes::Run];
        let ran = order.map(|makes| {
            assert_eq!(run(&[job(makes)], 1), [Outcome::Done]);
            fs::read_to_string(&out).unwrap().lines().count()
        });
        assert_eq!((ran, run(&[job(Makes::Part(0.75))], 1)), ([1, 1, 2, 2, 3, 3], vec![Outcome::Done]));
        assert_eq!(fs::read_to_string(&out).unwrap().lines().count(), 3);
    }

    #[test]
    fn a_process_that_was_left_behind_is_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let slow = job(folder.path(), "slow", &[], "true");
        fs::create_dir(&slow.dir).unwrap();
        let log = File::create(slow.dir.join(LOG)).unwrap();
        log.lock().unwrap();
        let mut left = Command::new("sleep").arg("0.4").stderr(log).spawn().unwrap();
        write_json(&slow.dir.join(STATE), &State::new(&slow)).unwrap();
        run(&[slow], 1);
        assert!(left.try_wait().unwrap().is_some());
    }

    #[test]
    fn an_interruption_reaches_the_processes() {
        let folder = tempfile::tempdir().unwrap();
        let ready = folder.path().join("ready");
        let script =
            format!("trap 'echo stopping >&2; exit 9' TERM; touch '{}'; while :; do sleep 0.02; done", ready.display());
        let jobs = [job(folder.path(), "endless", &[], &script)];
        let stop = || ready.exists();
        let error = runner(1, &stop).run(&jobs).unwrap_err();
        assert!(matches!(&error, Error::Interrupted { detail } if detail.contains("0 of 1 runs")), "{error}");
        assert!(fs::read_to_string(jobs[0].dir.join(LOG)).unwrap().contains("stopping"));
    }
}
