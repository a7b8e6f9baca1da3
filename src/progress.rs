//! What the user sees while something takes time: a bar on a terminal, a line now and then elsewhere.

use std::io::Write;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Prints a line on stderr. A reader that went away is no reason to fail: the work goes on.
pub fn say(line: impl std::fmt::Display) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Between two lines where no terminal can redraw one.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

pub struct Progress {
    bar: ProgressBar,
    what: String,
    /// Set where a bar cannot be drawn.
    last_line: Option<Instant>,
}

impl Progress {
    /// A bar on stderr over `total` units of work; `unit` is their plural.
    pub fn new(what: &str, total: u64, unit: &str) -> Self {
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
        let template = format!("{what} {{bar:24}} {{pos}}/{{len}} {unit} {{msg}} [{{elapsed}} < {{eta}}]");
        let style = ProgressStyle::with_template(&template).expect("the template is well formed");
        bar.set_style(style.progress_chars("█▉▊▋▌▍▎▏ "));
        let last_line = bar.is_hidden().then(Instant::now);
        Self { bar, what: what.to_string(), last_line }
    }

    /// A bar that starts where an interrupted run stopped.
    pub fn starting_at(self, done: u64) -> Self {
        self.bar.set_position(done);
        self.bar.reset_eta();
        self
    }

    /// `done` units are finished; `message` says how it goes.
    pub fn at(&mut self, done: u64, message: &str) {
        self.bar.set_position(done);
        self.bar.set_message(message.to_string());
        if let Some(last) = &mut self.last_line
            && last.elapsed() >= LINE_INTERVAL
        {
            *last = Instant::now();
            say(format_args!("{} {done}/{} {message}", self.what, self.bar.length().unwrap_or(0)));
        }
    }

    /// Prints a line without tearing the bar.
    pub fn say(&self, line: &str) {
        if self.last_line.is_some() {
            say(line);
        } else {
            self.bar.println(line);
        }
    }

    pub fn finish(self) {
        self.bar.finish_and_clear();
    }
}
