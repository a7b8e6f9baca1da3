//! Tasks that evaluations give to the policy, and where they end a run.

use std::fmt;
use std::path::Path;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

use super::policy::Policy;
use crate::data::{Example, Extent, Packing, Tokenizer};
use crate::error::{Error, Result};
use crate::model::Checkpoint;
use crate::ops::Backend;
use crate::progress::say;
use crate::rollout::Request;
use crate::tasks::{self, Encoder, Outcome, Overrides, Said, Tokens, complete};

/// A task in the policy's tokens.
pub struct Exam {
    pub task: tasks::Task,
    pub tokens: Tokens,
}

impl Exam {
    pub fn open(name: &str, path: &Path, tokenizer: &Tokenizer, checkpoint: &Checkpoint) -> Result<Self> {
        let task = tasks::Task::open(name, path, &Overrides::default())?;
        if task.kind() == "reward" {
            let detail = format!(
                "{} asks for rewards, and no reward model is in memory while training; `cuvee eval --reward-model` measures \
                 checkpoints",
                path.display()
            );
            return Err(Error::option("--eval-task", detail));
        }
        let tokens = task.tokens(&Encoder::new(tokenizer, checkpoint, None)?)?;
        tokens.report.iter().for_each(say);
        tokens.check(checkpoint)?;
        tokens.requests().iter().try_for_each(|request| request.check(&checkpoint.spec))?;
        Ok(Self { task, tokens })
    }

    /// What its examples take of the activations.
    pub fn extents(&self, packing: Packing) -> Vec<Extent> {
        packing.extents(&self.tokens.examples)
    }

    /// What it asks to be written.
    pub fn requests(&self) -> Vec<Request<'_>> {
        self.tokens.requests()
    }

    /// What the policy comes to. `done` is told how many items are finished, and of how many.
    pub fn take<B: Backend>(
        &self,
        device: &B,
        policy: &mut Policy<B>,
        tokenizer: &Tokenizer,
        packing: Packing,
        step: u64,
        done: &mut dyn FnMut(usize, usize),
    ) -> Result<Outcome> {
        let Self { task, tokens } = self;
        let examples: Vec<&Example> = tokens.examples.iter().collect();
        let mut said = Said::default();
        for (range, host) in packing.batches(&examples) {
            let logps = policy.forward(device, &host, &[])?.logps;
            for (example, sequences) in examples[range.clone()].iter().zip(&host.examples) {
                let of = |tokens: &std::ops::Range<usize>| logps[tokens.clone()].to_vec();
                let logps: Vec<Vec<f32>> = host.sequences[sequences.clone()].iter().map(of).collect();
                if !logps.iter().flatten().all(|x| x.is_finite()) {
                    let what = format!("a log-probability of row {} of the task {}", example.row, task.name);
                    return Err(Error::NotFinite { step, what, detail: "the weights are not sound".into() });
                }
                said.logps.push(logps);
            }
            done(range.end, examples.len());
        }
        if let Some(writing) = tokens.writing {
            policy.rest();
            let all = tokens.prompts.len();
            let mut done = |finished| done(finished, all);
            said.completions = complete(device, &policy.model, tokenizer, &tokens.prompts, writing, &mut done)?;
        }
        task.outcome(tokenizer, tokens, &said)
    }
}

/// `METRIC<BOUND` or `METRIC>BOUND`, where METRIC is what evaluations.jsonl calls `eval_METRIC`: an evaluation that
/// meets it ends the run.
#[derive(Debug, Clone, PartialEq)]
pub struct StopWhen {
    pub metric: String,
    pub above: bool,
    pub bound: f64,
}

impl fmt::Display for StopWhen {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}{}{}", self.metric, if self.above { '>' } else { '<' }, self.bound)
    }
}

impl Serialize for StopWhen {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for StopWhen {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl std::str::FromStr for StopWhen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.split_once(['<', '>']).map(|(metric, bound)| (metric.trim(), bound.trim().parse::<f64>()));
        match parts {
            Some((metric, Ok(bound))) if !metric.is_empty() && bound.is_finite() => {
                Ok(Self { metric: metric.to_string(), above: text.contains('>'), bound })
            }
            _ => Err("expected a metric and its bound, such as base/perplexity>50".into()),
        }
    }
}

impl StopWhen {
    /// Refuses a metric that no evaluation of the run has.
    pub fn check(&self, known: &[String]) -> Result<()> {
        if known.contains(&self.metric) {
            return Ok(());
        }
        let detail = format!("evaluations of this run have no {}; they have {}", self.metric, known.join(", "));
        Err(Error::option("--stop-when", detail))
    }

    /// Whether a value of the metric is on the side of the bound that is meant.
    pub fn holds(&self, value: f64) -> bool {
        if self.above { value > self.bound } else { value < self.bound }
    }

    /// Which number of an evaluation ends the run, if one does.
    pub fn met(&self, line: &Map<String, Value>) -> Option<String> {
        let value = line.get(&format!("eval_{}", self.metric))?.as_f64()?;
        let met = self.holds(value);
        let side = if self.above { "above" } else { "below" };
        met.then(|| format!("{} is {value:.6}, {side} {} (--stop-when)", self.metric, self.bound))
    }
}

/// What evaluations call their numbers, without `eval_`.
pub fn metrics(exams: &[Exam], kl: bool, gold: bool) -> Vec<String> {
    let own = ["loss", "accuracy", "margin", "perplexity"].map(String::from).into_iter();
    let of = |exam: &Exam| {
        exam.task.metrics().iter().map(|metric| format!("{}/{metric}", exam.task.name)).collect::<Vec<_>>()
    };
    let kl = ["kl", "sqrt_kl"].into_iter().filter(|_| kl).map(String::from);
    let gold = ["gold", "gold_win_rate"].into_iter().filter(|_| gold).map(String::from);
    own.chain(kl).chain(gold).chain(exams.iter().flat_map(of)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_bound_is_read_written_and_met() {
        for (text, metric, above, bound) in [
            ("base/perplexity>50", "base/perplexity", true, 50.0),
            ("c/acc < 0.3", "c/acc", false, 0.3),
            ("kl>-1e2", "kl", true, -100.0),
        ] {
            let stop: StopWhen = text.parse().unwrap();
            assert_eq!(stop, StopWhen { metric: metric.into(), above, bound });
            assert_eq!(stop.to_string().parse(), Ok(stop));
        }
        for text in ["", "acc", "acc=1", "<3", "acc<", "acc>x", "acc>nan", "acc>inf", "acc<<1"] {
            assert!(text.parse::<StopWhen>().is_err_and(|e| e.contains("such as")), "{text}");
        }
        let Value::Object(line) = json!({"eval_c/acc": 0.25, "eval_margin": null}) else { unreachable!() };
        let met = |text: &str| text.parse::<StopWhen>().unwrap().met(&line);
        assert_eq!(met("c/acc<0.3").unwrap(), "c/acc is 0.250000, below 0.3 (--stop-when)");
        assert_eq!((met("c/acc<0.25"), met("c/acc>0.25"), met("margin<9"), met("d<9")), (None, None, None, None));
    }

    #[test]
    fn a_metric_that_nothing_has_is_refused_with_those_there_are() {
        let known = metrics(&[], true, false);
        "kl>3".parse::<StopWhen>().unwrap().check(&known).unwrap();
        let error = "base/acc>3".parse::<StopWhen>().unwrap().check(&known).unwrap_err().to_string();
        assert!(
            error.contains("no base/acc") && error.contains("loss, accuracy, margin, perplexity, kl, sqrt_kl"),
            "{error}"
        );
    }
}
