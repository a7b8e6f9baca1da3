//! The life of an output folder: claimed, filled with checkpoints and logs, finished, or resumed.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::atomic::{OLD, TMP, parent, remove, sibling, sync_parent, write_error, write_file};
use super::json::write_json;
use crate::error::{At, Error, Result};

const MARKER: &str = "cuvee.json";
/// Empty; whoever works in the folder holds its lock.
const LOCK: &str = "cuvee.lock";

/// What tells a run's folder from anyone else's.
#[derive(Serialize, Deserialize)]
struct Marker {
    cuvee: String,
    finished: bool,
}

impl Marker {
    fn read(output: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(output.join(MARKER)).ok()?).ok()
    }

    fn write(output: &Path, finished: bool) -> Result<()> {
        write_json(&output.join(MARKER), &Self { cuvee: env!("CARGO_PKG_VERSION").into(), finished })
    }
}

/// What was at the place of a new run.
#[derive(Debug, PartialEq, Eq)]
pub enum Claim {
    Fresh,
    /// A finished run, which now has this name.
    Moved(PathBuf),
}

/// Creates `output` for a new run. A finished run of that name is renamed to NAME.1, or the first free NAME.N;
/// nothing else is ever touched.
///
/// Fails on an unfinished run, on any other file or folder of that name, and where nothing can be created.
pub fn claim(output: &Path) -> Result<Claim> {
    let claim = make_room(output)?;
    // The folder appears with its marker: killed in between, an empty one would be refused as someone else's.
    let marked = sibling(output, &format!(".{}{TMP}", std::process::id()))?;
    fs::create_dir(&marked).map_err(|e| cannot_create(output, e))?;
    // Renaming also decides between two runs that start at the same time, as neither's folder is empty.
    let claimed =
        Marker::write(&marked, false).and_then(|()| fs::rename(&marked, output).map_err(|e| cannot_create(output, e)));
    if let Err(e) = claimed {
        // The error that led here says more than this one could.
        let _ = remove(&marked);
        return Err(e);
    }
    sync_parent(output)?;
    Ok(claim)
}

/// What [`claim`] does before it creates the folder, for a folder that is written elsewhere and renamed to `output`.
pub fn make_room(output: &Path) -> Result<Claim> {
    match fs::symlink_metadata(output) {
        Err(e) if e.kind() == ErrorKind::NotFound => {
            fs::create_dir_all(parent(output)).map_err(|e| cannot_create(output, e))?;
            Ok(Claim::Fresh)
        }
        Err(e) => Err(cannot_create(output, e)),
        Ok(_) => Ok(Claim::Moved(move_finished(output)?)),
    }
}

/// Fails where [`make_room`] would, as far as that can be told without touching anything.
pub fn check_room(output: &Path) -> Result<()> {
    if fs::symlink_metadata(output).is_ok() { check_finished(output) } else { Ok(()) }
}

fn move_finished(output: &Path) -> Result<PathBuf> {
    check_finished(output)?;
    let mut n = 1;
    loop {
        let free = sibling(output, &format!(".{n}"))?;
        if fs::symlink_metadata(&free).is_err() {
            fs::rename(output, &free).map_err(|e| write_error(output, e))?;
            return Ok(free);
        }
        n += 1;
    }
}

/// Only what cuvee has finished is ever moved.
fn check_finished(output: &Path) -> Result<()> {
    let refuse = |detail: &str| Err(Error::file(output, detail));
    match Marker::read(output) {
        Some(Marker { finished: true, .. }) => Ok(()),
        Some(_) => {
            lock(output)?;
            refuse(
                "holds an unfinished run; continue it with --resume-from-checkpoint auto, \
                 delete the folder, or choose another --output-dir",
            )
        }
        None if !output.is_dir() => refuse("is a file; choose another --output-dir"),
        None => refuse(
            "exists and is not a run of cuvee (it has no cuvee.json), so it is left alone; \
             choose another --output-dir",
        ),
    }
}

fn cannot_create(output: &Path, e: std::io::Error) -> Error {
    Error::file(output, format!("the output folder cannot be created: {e}; choose another --output-dir"))
}

/// Marks the run in `output` as finished.
pub fn finish(output: &Path) -> Result<()> {
    Marker::write(output, true)
}

/// Whether `output` is the folder of a run, finished or not.
pub fn is_run(output: &Path) -> bool {
    Marker::read(output).is_some()
}

/// Gives the checkpoints after `step` names under which nothing looks for them: a run that goes back leaves them
/// behind. Returns the new names.
pub fn set_aside_after(output: &Path, step: u64) -> Result<Vec<PathBuf>> {
    let mut moved = Vec::new();
    for (_, path) in checkpoints(output)?.into_iter().filter(|(s, _)| *s > step) {
        let free = |n: &u32| sibling(&path, &format!(".left.{n}")).is_ok_and(|p| fs::symlink_metadata(p).is_err());
        let n = (1..).find(free).expect("some number is free");
        let to = sibling(&path, &format!(".left.{n}"))?;
        fs::rename(&path, &to).map_err(|e| write_error(&path, e))?;
        moved.push(to);
    }
    Ok(moved)
}

/// Keeps other runs out of `output` for as long as the returned file lives, even if the process is killed.
pub fn lock(output: &Path) -> Result<File> {
    let path = output.join(LOCK);
    let file = OpenOptions::new().write(true).create(true).truncate(false).open(&path).at(&path)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            Err(Error::file(output, "another cuvee run is working in this folder; wait for it, or stop it first"))
        }
        Err(TryLockError::Error(e)) => {
            Err(Error::file(&path, format!("cannot be locked: {e}; choose an --output-dir on a local disk")))
        }
    }
}

/// Whether `output` holds a run that came to its end.
pub fn is_finished(output: &Path) -> bool {
    Marker::read(output).is_some_and(|marker| marker.finished)
}

/// The folder of the checkpoint after optimizer step `step`. Write it with [`super::write_dir`].
pub fn checkpoint_path(output: &Path, step: u64) -> PathBuf {
    output.join(format!("checkpoint-{step}"))
}

/// The complete checkpoints under `output` by ascending step. None if `output` is not there.
pub fn checkpoints(output: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    for path in entries(output)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let step = name.strip_prefix("checkpoint-").and_then(|step| step.parse().ok());
        // The second look refuses other spellings of a number, such as checkpoint-007.
        if let Some(step) = step.filter(|&step| path.is_dir() && path == checkpoint_path(output, step)) {
            found.push((step, path));
        }
    }
    found.sort();
    Ok(found)
}

/// The newest complete checkpoint under `output`.
pub fn latest_checkpoint(output: &Path) -> Result<Option<(u64, PathBuf)>> {
    Ok(checkpoints(output)?.pop())
}

/// Removes the oldest checkpoints, so that `limit` are left; that of step `also` stays in any case.
pub fn keep_newest(output: &Path, limit: usize, also: Option<u64>) -> Result<()> {
    let all = checkpoints(output)?;
    let beyond = all.len().saturating_sub(limit);
    for (_, path) in all.into_iter().take(beyond).filter(|(step, _)| Some(*step) != also) {
        // Half a checkpoint never has a checkpoint's name.
        let doomed = sibling(&path, TMP)?;
        remove(&doomed).and_then(|()| fs::rename(&path, &doomed)).and_then(|()| remove(&doomed)).at(&path)?;
    }
    Ok(())
}

/// Removes what a crash left: every `*.tmp` directly in `output`, which must be a run's folder that no run is using.
/// A checkpoint that was about to be replaced gets its name back. Call this before [`latest_checkpoint`].
pub fn remove_stale(output: &Path) -> Result<()> {
    for path in entries(output)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let replaced = name.strip_suffix(OLD).map(|name| output.join(name)).filter(|path| !path.exists());
        match replaced {
            Some(replaced) => fs::rename(&path, replaced).at(&path)?,
            None if name.ends_with(TMP) => remove(&path).at(&path)?,
            None => {}
        }
    }
    Ok(())
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    match fs::read_dir(dir) {
        Ok(entries) => entries.map(|e| Ok(e.at(dir)?.path())).collect(),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(Error::file(dir, e)),
    }
}

/// A file of JSON lines, such as metrics.jsonl.
pub struct LineLog {
    path: PathBuf,
    file: File,
    /// Bytes in whole lines.
    len: u64,
}

impl LineLog {
    /// Starts an empty log.
    pub fn create(path: &Path) -> Result<Self> {
        write_file(path, |_| Ok(()))?;
        Self::open(path)
    }

    /// Starts a log with these lines.
    pub fn with(path: &Path, lines: &[impl Serialize]) -> Result<Self> {
        let lines: Vec<Vec<u8>> = lines.iter().map(serde_json::to_vec).collect::<Result<_, _>>().at(path)?;
        write_file(path, |out| {
            lines.iter().try_for_each(|line| out.write_all(line).and_then(|()| out.write_all(b"\n")))
        })?;
        Self::open(path)
    }

    /// Continues a log after the checkpoint of `step`: lines whose `"step"` is larger are dropped, and so is whatever
    /// is no JSON line, as a crash tears the last one. Lines without a step stay. A missing file is created.
    pub fn resume(path: &Path, step: u64) -> Result<Self> {
        let text = match fs::read(path) {
            Err(e) if e.kind() == ErrorKind::NotFound => Vec::new(),
            read => read.at(path)?,
        };
        #[derive(Deserialize)]
        struct Line {
            step: Option<u64>,
        }
        let keep = |line: &&[u8]| {
            line.ends_with(b"\n")
                && serde_json::from_slice::<Line>(line).is_ok_and(|line| line.step.is_none_or(|s| s <= step))
        };
        let kept: Vec<&[u8]> = text.split_inclusive(|&b| b == b'\n').filter(keep).collect();
        write_file(path, |out| kept.iter().try_for_each(|line| out.write_all(line)))?;
        Self::open(path)
    }

    fn open(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().append(true).open(path).at(path)?;
        let len = file.metadata().at(path)?.len();
        Ok(Self { path: path.to_path_buf(), file, len })
    }

    /// Appends one line with one write, so that a reader which follows the file sees whole lines.
    pub fn append(&mut self, value: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(value).at(&self.path)?;
        line.push(b'\n');
        if let Err(e) = self.file.write_all(&line) {
            // Take back a torn line: the next one would be glued to it. If this fails too, `resume` drops both.
            let _ = self.file.set_len(self.len);
            return Err(write_error(&self.path, e));
        }
        self.len += line.len() as u64;
        Ok(())
    }

    /// Makes every line so far survive a power cut.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(|e| write_error(&self.path, e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn error<T>(result: Result<T>) -> String {
        result.err().unwrap().to_string()
    }

    #[test]
    fn a_new_folder_is_claimed_once() {
        let dir = tempfile::tempdir().unwrap();
        let output = dir.path().join("runs/first");
        assert!(!is_run(&output));
        assert_eq!(claim(&output).unwrap(), Claim::Fresh);
        assert!(is_run(&output));
        let message = error(claim(&output));
        assert!(message.contains("unfinished run") && message.contains("--resume-from-checkpoint auto"), "{message}");
        assert_eq!(fs::read_dir(output.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn a_finished_run_makes_room() {
        let dir = tempfile::tempdir().unwrap();
        let output = dir.path().join("dpo.v2");
        for n in 0..3 {
            let claimed = claim(&output).unwrap();
            let expected = if n == 0 { Claim::Fresh } else { Claim::Moved(dir.path().join(format!("dpo.v2.{n}"))) };
            assert_eq!(claimed, expected);
            fs::write(output.join("which"), n.to_string()).unwrap();
            finish(&output).unwrap();
        }
        for (name, which) in [("dpo.v2.1", "0"), ("dpo.v2.2", "1"), ("dpo.v2", "2")] {
            assert_eq!(fs::read_to_string(dir.path().join(name).join("which")).unwrap(), which);
        }
    }

    #[test]
    fn what_is_not_ours_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let output = dir.path().join("thesis");
        fs::create_dir(&output).unwrap();
        assert!(error(claim(&output)).contains("not a run of cuvee"), "an empty folder");
        fs::write(output.join("chapter1.tex"), "").unwrap();
        assert!(error(claim(&output)).contains("not a run of cuvee"), "a folder with files");
        fs::write(output.join(MARKER), "{\"finished\": true}").unwrap();
        assert!(error(claim(&output)).contains("not a run of cuvee"), "a marker of something else");
        assert!(output.join("chapter1.tex").exists());

        let file = output.join("chapter1.tex");
        assert!(error(claim(&file)).contains("is a file"));
        assert!(error(claim(&file.join("run"))).contains("cannot be created"), "a parent that is a file");
    }

    #[test]
    fn checkpoints_are_sorted_by_step() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(latest_checkpoint(&dir.path().join("absent")).unwrap(), None);
        assert_eq!(latest_checkpoint(dir.path()).unwrap(), None);
        let folders =
            ["checkpoint-9", "checkpoint-10", "checkpoint-200.tmp", "checkpoint-007", "checkpoint-+8", "best"];
        for name in folders {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        fs::write(dir.path().join("checkpoint-300"), "a file").unwrap();
        let steps: Vec<u64> = checkpoints(dir.path()).unwrap().into_iter().map(|c| c.0).collect();
        assert_eq!(steps, [9, 10]);
        assert_eq!(latest_checkpoint(dir.path()).unwrap(), Some((10, dir.path().join("checkpoint-10"))));
    }

    #[test]
    fn stale_work_is_removed_and_a_replaced_checkpoint_restored() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["checkpoint-9", "checkpoint-9.old.tmp", "checkpoint-10.old.tmp", "checkpoint-10.tmp"] {
            fs::create_dir(dir.path().join(name)).unwrap();
            fs::write(dir.path().join(name).join("name"), name).unwrap();
        }
        fs::write(dir.path().join("metrics.jsonl.tmp"), "").unwrap();
        fs::write(dir.path().join("metrics.jsonl"), "").unwrap();
        remove_stale(dir.path()).unwrap();
        remove_stale(&dir.path().join("absent")).unwrap();
        let mut names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["checkpoint-10", "checkpoint-9", "metrics.jsonl"]);
        assert_eq!(fs::read_to_string(dir.path().join("checkpoint-10/name")).unwrap(), "checkpoint-10.old.tmp");
        assert_eq!(fs::read_to_string(dir.path().join("checkpoint-9/name")).unwrap(), "checkpoint-9");
    }

    #[test]
    fn a_log_goes_back_to_the_step_of_the_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut log = LineLog::create(&path).unwrap();
        log.append(&json!({"seed": 3})).unwrap();
        for step in 1..=4 {
            log.append(&json!({"step": step, "loss": 0.5})).unwrap();
        }
        log.sync().unwrap();
        drop(log);
        let whole = fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = whole.split_inclusive('\n').collect();
        assert_eq!(lines.len(), 5);

        // Wherever a crash cut the file, whole lines up to the step stay and the next one is not glued to a torn one.
        for cut in 0..=whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            let mut log = LineLog::resume(&path, 2).unwrap();
            log.append(&json!({"step": 3})).unwrap();
            let whole_lines = whole[..cut].matches('\n').count().min(3);
            let expected = lines[..whole_lines].concat() + "{\"step\":3}\n";
            assert_eq!(fs::read_to_string(&path).unwrap(), expected, "cut at {cut}");
        }

        fs::remove_file(&path).unwrap();
        LineLog::resume(&path, 2).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
