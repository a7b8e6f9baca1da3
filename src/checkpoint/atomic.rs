//! Files and folders that appear whole or not at all.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};

use crate::error::{At, Error, Result};

/// Marks work in progress; whatever carries it after a crash is incomplete.
pub(super) const TMP: &str = ".tmp";
/// Marks the folder that `write_dir` is about to replace. It ends in `.tmp` too, as it goes away in the end.
pub(super) const OLD: &str = ".old.tmp";

/// Writes a file: NAME.tmp, sync, rename to NAME, sync of the parent folder.
///
/// When `write` or the disk fails, NAME.tmp is removed and an older NAME stays as it was.
pub fn write_file(path: &Path, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
    write_file_with(path, |out| write(out).map_err(|e| write_error(path, e)))
}

/// `write_file` for writers that fail in more ways than I/O.
pub(crate) fn write_file_with(path: &Path, write: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
    let failed = |e| write_error(path, e);
    let temporary = Temporary { path: sibling(path, TMP)? };
    let mut out = BufWriter::new(File::create(&temporary.path).map_err(failed)?);
    write(&mut out)?;
    let file = out.into_inner().map_err(|e| failed(e.into_error()))?;
    file.sync_all().map_err(failed)?;
    fs::rename(&temporary.path, path).map_err(failed)?;
    sync_parent(path)
}

/// Writes a folder: `fill` gets the new NAME.tmp, every file in it is synced, then it is renamed to NAME.
///
/// A stale NAME.tmp is removed first. An older folder NAME is replaced; until the new one is complete it keeps its
/// name, and a crash between the two renames is repaired by [`super::run_dir::remove_stale`]. When `fill` or the
/// disk fails, NAME.tmp is removed.
pub fn write_dir(path: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let failed = |e| write_error(path, e);
    let temporary = Temporary { path: sibling(path, TMP)? };
    remove(&temporary.path).map_err(failed)?;
    fs::create_dir(&temporary.path).map_err(failed)?;
    fill(&temporary.path)?;
    sync_tree(&temporary.path).map_err(failed)?;
    if path.is_dir() {
        let old = sibling(path, OLD)?;
        remove(&old).map_err(failed)?;
        fs::rename(path, &old).map_err(failed)?;
        if let Err(e) = fs::rename(&temporary.path, path) {
            fs::rename(&old, path).map_err(failed)?;
            return Err(failed(e));
        }
        remove(&old).map_err(failed)?;
    } else {
        fs::rename(&temporary.path, path).map_err(failed)?;
    }
    sync_parent(path)
}

/// Makes a rename or a creation in the parent folder of `path` durable.
pub(crate) fn sync_parent(path: &Path) -> Result<()> {
    sync_dir(parent(path)).map_err(|e| write_error(path, e))
}

/// What a failed write means to the user: the cause, what was lost (nothing), what to do.
pub(crate) fn write_error(path: &Path, e: io::Error) -> Error {
    let advice = match e.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => "free some space and run this again",
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => "choose another folder or allow writing to it",
        ErrorKind::NotFound => "does its folder exist?",
        _ => "is the disk healthy and the folder still there?",
    };
    Error::file(path, format!("could not be written: {e}; what was on disk before is intact; {advice}"))
}

/// Removes a file or a folder; what is not there is fine.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(e) => Err(e),
    };
    removed.or_else(|e| if e.kind() == ErrorKind::NotFound { Ok(()) } else { Err(e) })
}

/// The folder that holds `path`; "." for a bare name.
pub(super) fn parent(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// `path` with `suffix` behind its whole name, extension included.
pub(super) fn sibling(path: &Path, suffix: &str) -> Result<PathBuf> {
    let mut name = OsString::from(path.file_name().ok_or("does not end in a name").at(path)?);
    name.push(suffix);
    Ok(path.with_file_name(name))
}

fn sync_tree(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        match entry.file_type()?.is_dir() {
            true => sync_tree(&entry.path())?,
            false => File::open(entry.path())?.sync_all()?,
        }
    }
    sync_dir(dir)
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    match File::open(dir)?.sync_all() {
        // Some network file systems cannot sync a folder; there is nothing more to do on them.
        Err(e) if matches!(e.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => Ok(()),
        synced => synced,
    }
}

/// Removes its file or folder when it goes out of scope, unless that was renamed away.
struct Temporary {
    path: PathBuf,
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // The write has already failed with a better message than this removal could give.
        let _ = remove(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Hands on `left` bytes, then fails as a full disk does.
    struct FullAfter<'a> {
        left: usize,
        out: &'a mut dyn Write,
    }

    impl Write for FullAfter<'_> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.left == 0 {
                return Err(ErrorKind::StorageFull.into());
            }
            let written = self.out.write(&bytes[..bytes.len().min(self.left)])?;
            self.left -= written;
            Ok(written)
        }

        fn flush(&mut self) -> io::Result<()> {
            self.out.flush()
        }
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_that_fails_at_any_byte_leaves_the_older_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.bin");
        write_file(&path, |out| out.write_all(b"older")).unwrap();
        let newer = b"a newer and somewhat longer file";
        for n in 0..newer.len() {
            let error = write_file(&path, |out| FullAfter { left: n, out }.write_all(newer)).unwrap_err().to_string();
            assert!(error.contains("state.bin") && error.contains("free some space"), "{error}");
            assert_eq!(fs::read(&path).unwrap(), b"older");
            assert_eq!(names(dir.path()), ["state.bin"]);
        }
        write_file(&path, |out| FullAfter { left: newer.len(), out }.write_all(newer)).unwrap();
        assert_eq!(fs::read(&path).unwrap(), newer);
        assert_eq!(names(dir.path()), ["state.bin"]);
    }

    #[test]
    fn a_file_in_a_missing_folder_or_over_a_folder_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let error = write_file(&dir.path().join("no/such.txt"), |_| Ok(())).unwrap_err().to_string();
        assert!(error.contains("does its folder exist?"), "{error}");
        fs::create_dir(dir.path().join("taken")).unwrap();
        assert!(write_file(&dir.path().join("taken"), |_| Ok(())).is_err());
        assert!(write_file(Path::new("/"), |_| Ok(())).is_err());
        assert_eq!(names(dir.path()), ["taken"]);
    }

    #[test]
    fn a_folder_appears_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("checkpoint-10");
        let error = write_dir(&path, |tmp| {
            fs::write(tmp.join("half"), "half").at(tmp)?;
            Err(Error::file(tmp, "no more"))
        });
        assert!(error.is_err());
        assert!(names(dir.path()).is_empty());

        // A crash leaves a stale NAME.tmp; nothing of it may reach the next NAME.
        fs::create_dir(dir.path().join("checkpoint-10.tmp")).unwrap();
        fs::write(dir.path().join("checkpoint-10.tmp/stale"), "").unwrap();
        write_dir(&path, |tmp| {
            fs::create_dir(tmp.join("deep")).at(tmp)?;
            fs::write(tmp.join("deep/file"), "whole").at(tmp)
        })
        .unwrap();
        assert_eq!(names(dir.path()), ["checkpoint-10"]);
        assert_eq!(names(&path), ["deep"]);
    }

    #[test]
    fn a_folder_is_replaced_only_by_a_whole_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("best");
        let fill = |text: &'static str| move |tmp: &Path| fs::write(tmp.join(text), text).at(tmp);
        write_dir(&path, fill("one")).unwrap();
        write_dir(&path, |tmp| Err(Error::file(tmp, "no more"))).unwrap_err();
        assert_eq!(names(&path), ["one"]);
        write_dir(&path, fill("two")).unwrap();
        assert_eq!(names(&path), ["two"]);
        assert_eq!(names(dir.path()), ["best"]);
    }
}
