//! What the references of a run say, scored before the first step and looked up by step.

use super::references::TaskReference;
use super::settings::Settings;
use super::step::Rows;
use super::task::{Steps, Task};
use crate::data::Example;
use crate::error::Result;
use crate::objectives::ref_weights::RefWeights;
use crate::ops::Backend;
use crate::references::{Detail, HiddenRows, Scored, Scoring, Stop};

/// `[references]` of each.
pub struct Panel {
    /// `[training examples]`; empty where no step sees the example.
    train: Vec<Vec<Scored>>,
    held_out: Vec<Vec<Scored>>,
    /// `[steps][sequences of the step]`, where the objective reads completions under other prompts.
    mismatched: Vec<Vec<Vec<Scored>>>,
    mismatched_held_out: Vec<Vec<Scored>>,
    /// Of the held-out examples by the anchor, where it is none of the references.
    anchor: Option<Vec<Scored>>,
    /// Final hidden rows, where distributions are compared.
    pub hidden: Vec<HiddenRows>,
}

/// Rows with what the references said about them, on their way to an objective.
pub struct Gathered<'a> {
    pub examples: Vec<&'a Example>,
    refs: Vec<Vec<&'a Scored>>,
    mismatched: Vec<Example>,
    mismatched_refs: Vec<Vec<&'a Scored>>,
}

impl<'a> Gathered<'a> {
    /// Examples and `[references][examples]` what was said about them.
    pub fn new(examples: Vec<&'a Example>, refs: Vec<Vec<&'a Scored>>) -> Self {
        Self { examples, refs, mismatched: Vec::new(), mismatched_refs: Vec::new() }
    }

    pub fn rows<'b>(&'b self, ref_weights: &'b [f64], state: &'b [f64], hidden: &'b [HiddenRows]) -> Rows<'b> {
        let Self { examples, refs, mismatched, mismatched_refs } = self;
        Rows { examples, refs, mismatched, mismatched_refs, ref_weights, state, hidden, sampled: None }
    }

    /// What the rules for weights look at.
    pub fn pairs(&self) -> Vec<Vec<(f64, f64)>> {
        pairs(&self.refs)
    }
}

impl Panel {
    /// Asks one reference after the other.
    pub fn score<B: Backend>(device: &B, settings: &Settings, task: &Task, stop: Stop) -> Result<Self> {
        let used = task.used_examples(settings);
        let steps: Vec<Vec<Example>> = match task.objective.needs().mismatched {
            true => {
                let mut steps = Steps::new(task, settings);
                (1..=task.max_steps).map(|step| steps.mismatched(step)).collect()
            }
            false => Vec::new(),
        };
        let mismatched_held_out = task.mismatched_held_out();
        let mut panel = Self {
            train: vec![],
            held_out: vec![],
            mismatched: vec![],
            mismatched_held_out: vec![],
            anchor: None,
            hidden: vec![],
        };
        for (k, reference) in task.references.iter().enumerate() {
            let (train, held_out) = reference.examples(task);
            let train: Vec<&Example> = used.iter().map(|i| &train[*i]).collect();
            let sets: [Vec<&Example>; 4] = [
                train,
                held_out.iter().collect(),
                steps.iter().flatten().collect(),
                mismatched_held_out.iter().collect(),
            ];
            let what = name(k, &task.references);
            let scoring = Scoring { packing: settings.packing, cache_dir: &settings.cache_dir, stop, what: &what };
            let detail = if task.objective.needs().ref_token_logps { Detail::Tokens } else { Detail::Sums };
            let said = reference.reference.logps(device, &sets.each_ref().map(Vec::as_slice), detail, &scoring)?;
            let [train, held_out, mismatched, mismatched_held_out] =
                <[Vec<Scored>; 4]>::try_from(said).expect("as many as were asked for");
            let mut by_example = vec![Scored::default(); task.train.examples.len()];
            used.iter().zip(train).for_each(|(i, scored)| by_example[*i] = scored);
            let mut mismatched = mismatched.into_iter();
            panel.train.push(by_example);
            panel.held_out.push(held_out);
            panel.mismatched.push(steps.iter().map(|step| mismatched.by_ref().take(step.len()).collect()).collect());
            panel.mismatched_held_out.push(mismatched_held_out);
        }
        if let (Some(anchor), Some(eval)) = (&task.anchor, &task.eval) {
            let held_out: Vec<&Example> = eval.examples.iter().collect();
            let (packing, cache_dir) = (settings.packing, &settings.cache_dir);
            let scoring = Scoring { packing, cache_dir, stop, what: "the anchor" };
            panel.anchor = anchor.logps(device, &[&held_out], Detail::Sums, &scoring)?.pop();
        }
        let train: Vec<&Example> = used.iter().map(|i| &task.train.examples[*i]).collect();
        let held_out: Vec<&Example> = task.eval.iter().flat_map(|eval| &eval.examples).collect();
        for reference in task.compared() {
            let sets = [&train[..], &held_out[..]];
            let rows = HiddenRows::score(device, reference, &sets, settings.packing, &settings.cache_dir, stop)?;
            panel.hidden.push(rows);
        }
        Ok(panel)
    }

    /// The rows of a step, counted from 1.
    pub fn training<'a>(&'a self, task: &'a Task, steps: &mut Steps, step: u64) -> Gathered<'a> {
        fn of_step(steps: &[Vec<Scored>], step: u64) -> Vec<&Scored> {
            steps.get(step as usize - 1).into_iter().flatten().collect()
        }
        let wanted = task.objective.needs().mismatched;
        let mismatched = if wanted { steps.mismatched(step) } else { Vec::new() };
        let indices = steps.examples(step);
        Gathered {
            examples: indices.iter().map(|i| &task.train.examples[*i]).collect(),
            refs: self.refs_of(indices),
            mismatched,
            mismatched_refs: self.mismatched.iter().map(|steps| of_step(steps, step)).collect(),
        }
    }

    pub fn held_out<'a>(&'a self, task: &'a Task) -> Gathered<'a> {
        let all = |said: &'a [Vec<Scored>]| said.iter().map(|said| said.iter().collect()).collect();
        Gathered {
            examples: task.eval.iter().flat_map(|eval| &eval.examples).collect(),
            refs: all(&self.held_out),
            mismatched: task.mismatched_held_out(),
            mismatched_refs: all(&self.mismatched_held_out),
        }
    }

    /// `[references][indices]` of these training examples.
    fn refs_of(&self, indices: &[usize]) -> Vec<Vec<&Scored>> {
        self.train.iter().map(|said| indices.iter().map(|i| &said[*i]).collect()).collect()
    }

    /// `[held-out sequences]` log-probabilities by what evaluations compare with: the anchor, or else the first reference.
    pub fn anchor(&self) -> Option<Vec<f64>> {
        let said = self.anchor.as_ref().or(self.held_out.first())?;
        Some(said.iter().flat_map(|scored| &scored.sums).copied().collect())
    }

    /// The weights of the references as they are before step `step`, from what came before it.
    pub fn weights(&self, settings: &Settings, task: &Task, step: u64) -> Result<RefWeights> {
        let held_out = task.eval.as_ref().map(|_| self.held_out(task).pairs());
        let rule = &settings.references.rule;
        let mut weights = RefWeights::new(rule.clone(), task.references.len(), held_out.as_deref())?;
        if rule.observes() {
            let mut steps = Steps::new(task, settings);
            (1..step).for_each(|earlier| weights.observe(&pairs(&self.refs_of(steps.examples(earlier)))));
        }
        Ok(weights)
    }
}

fn name(k: usize, references: &[TaskReference]) -> String {
    match references.len() {
        1 => "the reference".to_string(),
        all => format!("reference {} of {all}", k + 1),
    }
}

/// What the rules for weights look at: each reference's log-probabilities of these pairs.
fn pairs(said: &[Vec<&Scored>]) -> Vec<Vec<(f64, f64)>> {
    let pair = |scored: &&Scored| Some((*scored.sums.first()?, *scored.sums.get(1)?));
    said.iter().map(|scored| scored.iter().filter_map(pair).collect()).collect()
}
