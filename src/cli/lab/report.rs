//! `cuvee lab report` and `cuvee watch`

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::thread::sleep;
use std::time::{Duration, Instant};

use clap::Args;

use crate::checkpoint::run_dir::is_finished;
use crate::cli::args::steps;
use crate::cli::{print, train};
use crate::error::Result;
use crate::lab::{Cell, Overopt, PAGE, has_left, write_report};
use crate::progress::say;

const POLL: Duration = Duration::from_millis(100);

#[derive(Debug, Clone, PartialEq, Args)]
pub struct ReportArgs {
    /// Output folder of `cuvee lab sweep`, finished or not
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
}

#[derive(Debug, Clone, PartialEq, Args)]
#[command(after_help = "\
Renders DIR/report.html and report.json again and again, until every run is finished or has left the race, or Ctrl-C.

Example:
  cuvee watch runs/overoptimisation --every 20")]
pub struct WatchArgs {
    /// Output folder of `cuvee lab sweep`
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
    /// Seconds between two renderings
    #[arg(long, value_name = "N", default_value = "30", value_parser = steps)]
    pub every: u64,
}

pub fn run(args: &ReportArgs) -> Result<()> {
    let found = write_report(&args.dir)?;
    print(&summary(&found, &args.dir))
}

/// The verdicts, and where the page is.
pub fn summary(found: &Overopt, dir: &std::path::Path) -> String {
    let lines = found.verdicts().into_iter().map(|(group, verdict)| format!("{group}: {verdict}\n"));
    lines.chain([format!("report  {}\n", dir.join(PAGE).display())]).collect()
}

pub fn watch(args: &WatchArgs) -> Result<()> {
    let stop = train::stop_on_signal()?;
    loop {
        let found = write_report(&args.dir)?;
        let (cells, looks) = (&found.plan.cells, found.looks.len());
        let left = |cell: &Cell| has_left(&found.places, cell);
        let ended = |cell: &&Cell| left(cell) || is_finished(&args.dir.join(&cell.dir));
        let (done, left) = (cells.iter().filter(ended).count(), cells.iter().filter(|cell| left(cell)).count());
        let of_race = if left > 0 { format!(", {left} of them left the race") } else { String::new() };
        let page = args.dir.join(PAGE);
        say(format_args!("{}: {done} of {} runs{of_race}, {looks} evaluations", page.display(), cells.len()));
        let since = Instant::now();
        while since.elapsed() < Duration::from_secs(args.every) {
            if done == cells.len() || stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            sleep(POLL);
        }
    }
}
