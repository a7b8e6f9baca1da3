//! What the server counts, in Prometheus' text format.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

/// Upper ends of a histogram's buckets, in seconds.
const BUCKETS: [f64; 12] = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0];

#[derive(Default)]
pub struct Metrics {
    /// Answers by route and status.
    answers: Mutex<BTreeMap<(&'static str, u16), u64>>,
    pub prompt_tokens: AtomicU64,
    pub completion_tokens: AtomicU64,
    /// Requests whose client left before their end.
    pub abandoned: AtomicU64,
    pub passes: AtomicU64,
    pub running: AtomicUsize,
    pub waiting: AtomicUsize,
    /// Rows of the cache of keys and values.
    pub cache_used: AtomicUsize,
    pub cache_rows: AtomicUsize,
    pub connections: AtomicUsize,
    pub first_token: Histogram,
    pub whole: Histogram,
}

#[derive(Default)]
pub struct Histogram {
    counts: [AtomicU64; BUCKETS.len() + 1],
    micros: AtomicU64,
}

impl Histogram {
    pub fn add(&self, took: Duration) {
        let at = BUCKETS.iter().position(|end| took.as_secs_f64() <= *end).unwrap_or(BUCKETS.len());
        self.counts[at].fetch_add(1, Relaxed);
        self.micros.fetch_add(took.as_micros() as u64, Relaxed);
    }

    fn write(&self, name: &str, help: &str, out: &mut String) {
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} histogram");
        let mut sum = 0;
        for (count, end) in self.counts.iter().zip(BUCKETS.map(|end| end.to_string()).iter().chain([&"+Inf".into()])) {
            sum += count.load(Relaxed);
            let _ = writeln!(out, "{name}_bucket{{le=\"{end}\"}} {sum}");
        }
        let _ = writeln!(out, "{name}_sum {}\n{name}_count {sum}", self.micros.load(Relaxed) as f64 / 1e6);
    }
}

impl Metrics {
    pub fn answered(&self, route: &'static str, status: u16) {
        *self.answers.lock().expect("no holder panics").entry((route, status)).or_default() += 1;
    }

    pub fn text(&self) -> String {
        let mut out = String::from(
            "# HELP cuvee_answers_total Answers by route and status\n# TYPE cuvee_answers_total counter\n",
        );
        for ((route, status), count) in self.answers.lock().expect("no holder panics").iter() {
            let _ = writeln!(out, "cuvee_answers_total{{route=\"{route}\",status=\"{status}\"}} {count}");
        }
        let counters = [
            ("prompt_tokens_total", "Tokens of prompts", &self.prompt_tokens),
            ("completion_tokens_total", "Tokens that were drawn", &self.completion_tokens),
            ("abandoned_total", "Requests whose client left", &self.abandoned),
            ("passes_total", "Passes of the model", &self.passes),
        ];
        for (name, help, value) in counters {
            let value = value.load(Relaxed);
            let _ = writeln!(out, "# HELP cuvee_{name} {help}\n# TYPE cuvee_{name} counter\ncuvee_{name} {value}");
        }
        let gauges = [
            ("running", "Completions that run", &self.running),
            ("waiting", "Completions that wait for room", &self.waiting),
            ("cache_rows_used", "Rows of keys and values in use", &self.cache_used),
            ("cache_rows", "Rows of keys and values there are", &self.cache_rows),
            ("connections", "Open connections", &self.connections),
        ];
        for (name, help, value) in gauges {
            let value = value.load(Relaxed);
            let _ = writeln!(out, "# HELP cuvee_{name} {help}\n# TYPE cuvee_{name} gauge\ncuvee_{name} {value}");
        }
        self.first_token.write("cuvee_first_token_seconds", "From a request to its first token", &mut out);
        self.whole.write("cuvee_request_seconds", "From a request to its end", &mut out);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_written_as_prometheus_reads_them() {
        let metrics = Metrics::default();
        metrics.answered("/v1/completions", 200);
        metrics.answered("/v1/completions", 200);
        metrics.running.store(3, Relaxed);
        [0.02, 0.02, 7.0, 500.0].into_iter().for_each(|s| metrics.whole.add(Duration::from_secs_f64(s)));
        let text = metrics.text();
        for line in [
            "cuvee_answers_total{route=\"/v1/completions\",status=\"200\"} 2",
            "cuvee_running 3",
            "cuvee_request_seconds_bucket{le=\"0.025\"} 2",
            "cuvee_request_seconds_bucket{le=\"10\"} 3",
            "cuvee_request_seconds_bucket{le=\"+Inf\"} 4",
            "cuvee_request_seconds_count 4",
            "cuvee_first_token_seconds_count 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line:?} is not in\n{text}");
        }
    }
}
