//! `cuvee cache`

use std::path::Path;
use std::time::{Duration, SystemTime};

use super::args::{CacheAction, CacheArgs, CacheRmArgs, cache_dir};
use crate::error::{Error, Result};
use crate::machine::human;
use crate::references::inventory::{CacheFile, list, remove, select};

pub fn run(args: &CacheArgs) -> Result<()> {
    match &args.action {
        CacheAction::Ls(args) => {
            let folder = cache_dir(args.folder.cache_dir.as_deref())?;
            let files = list(&folder)?;
            match args.json {
                true => super::print(&format!("{}\n", serde_json::to_string_pretty(&files).expect("plain data"))),
                false => super::print(&table(&files, &folder)),
            }
        }
        CacheAction::Verify(args) => {
            let folder = cache_dir(args.folder.cache_dir.as_deref())?;
            let files = list(&folder)?;
            let files = if args.keys.is_empty() { files } else { select(files, &args.keys)? };
            verify(&files, &folder)
        }
        CacheAction::Rm(args) => {
            let folder = cache_dir(args.folder.cache_dir.as_deref())?;
            let files = chosen(list(&folder)?, args)?;
            let freed = remove(&files)?;
            files.iter().try_for_each(|file| super::print(&format!("removed {}\n", line(file))))?;
            super::print(&format!("freed {}\n", human(freed as usize)))
        }
    }
}

/// The files that `rm` is to remove.
fn chosen(files: Vec<CacheFile>, args: &CacheRmArgs) -> Result<Vec<CacheFile>> {
    if !args.keys.is_empty() {
        return select(files, &args.keys);
    }
    let Some(days) = args.older_than else { return Ok(files) };
    let oldest = SystemTime::now().checked_sub(Duration::from_secs_f64(days * 86400.0));
    let Some(oldest) = oldest else { return Ok(vec![]) };
    Ok(files.into_iter().filter(|file| file.written.is_some_and(|written| written < oldest)).collect())
}

/// Names every file, and fails if one is damaged.
fn verify(files: &[CacheFile], folder: &Path) -> Result<()> {
    let mut damaged = 0;
    for file in files {
        let found = file.verify()?;
        damaged += usize::from(found.is_some());
        let verdict = found.map_or("sound".into(), |damage| format!("DAMAGED: {damage}"));
        super::print(&format!("{}: {verdict}\n", line(file)))?;
    }
    if damaged == 0 {
        return super::print(&format!("{} of {} files are sound\n", files.len(), files.len()));
    }
    let detail = format!(
        "{damaged} of {} files are damaged; the next run that needs one keeps what is sound of it and scores the rest \
         again, or remove it with `cuvee cache rm`",
        files.len()
    );
    Err(Error::file(folder.join("refs"), detail))
}

/// `07ab12cd34ef log-probs, 1.2 MiB`
fn line(file: &CacheFile) -> String {
    format!("{} {}s, {}", short(&file.key), file.kind, human(file.bytes as usize))
}

/// Enough of a key to name it with.
fn short(key: &str) -> &str {
    key.get(..12).unwrap_or(key)
}

fn table(files: &[CacheFile], folder: &Path) -> String {
    let header = ["KEY", "HOLDS", "SEQUENCES", "SIZE", "WRITTEN", "MODEL"].map(String::from);
    let mut rows = vec![header];
    for file in files {
        let mut model = match &file.about {
            Some(about) => {
                let millions = about.parameters as f64 / 1e6;
                format!("{} ({}, {millions:.1} M parameters, {})", about.model, about.architecture, about.arithmetic)
            }
            None => "unknown".into(),
        };
        if let Some(damage) = &file.damage {
            model += &format!("; DAMAGED: {damage}");
        }
        rows.push([
            short(&file.key).into(),
            format!("{}s", file.kind),
            file.sequences.to_string(),
            human(file.bytes as usize),
            file.written.map_or("unknown".into(), age),
            model,
        ]);
    }
    let mut text = String::new();
    if files.is_empty() {
        rows.clear();
    }
    let widths: Vec<usize> = (0..5).map(|i| rows.iter().map(|row| row[i].len()).max().unwrap_or(0)).collect();
    for row in &rows {
        let cells: Vec<String> = widths.iter().zip(row).map(|(&width, cell)| format!("{cell:<width$}")).collect();
        text += &format!("{}  {}\n", cells.join("  "), row[5]);
    }
    let total: u64 = files.iter().map(|file| file.bytes).sum();
    text + &format!("{} files, {} in {}\n", files.len(), human(total as usize), folder.join("refs").display())
}

/// How long ago, in the unit that tells most.
fn age(written: SystemTime) -> String {
    let seconds = written.elapsed().map_or(0, |age| age.as_secs());
    match seconds {
        0..60 => "just now".into(),
        60..3600 => format!("{} min ago", seconds / 60),
        3600..86400 => format!("{} h ago", seconds / 3600),
        _ => format!("{} d ago", seconds / 86400),
    }
}
