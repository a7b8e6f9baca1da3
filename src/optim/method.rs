use super::{Hyper, Schedule};
use crate::ops::merged_update::{Adam, DareVariant, Form, Rule};

pub(super) const FIRST_MOMENT: &str = "first_moment";
pub(super) const SECOND_MOMENT: &str = "second_moment";
pub(super) const SINCE_MERGE: &str = "since_merge";
pub(super) const AVERAGE: &str = "average";

/// An optimizer, completely but for the numbers that all have.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Method {
    pub form: Form,
    pub rule: Rule,
    /// Share of every gradient's elements that reaches the moments.
    pub gradient_reserve_rate: f64,
    /// Steps from one merge to the next.
    pub merge_every: u64,
    pub merge_schedule: MergeSchedule,
}

/// The course of the merge weight over a run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MergeSchedule {
    Constant,
    /// From 0 up, in a straight line to its full weight at the last step.
    Ramp,
    /// As the learning rate stands to its peak.
    LearningRate,
}

impl Method {
    pub(super) fn new(form: Form, rule: Rule) -> Self {
        let (merge_every, merge_schedule) = (1, MergeSchedule::Constant);
        Self { form, rule, gradient_reserve_rate: 1.0, merge_every, merge_schedule }
    }

    pub(super) fn adam(&self, hyper: &Hyper) -> Adam {
        Adam { beta1: hyper.beta1, beta2: hyper.beta2, eps: hyper.eps, form: self.form }
    }

    /// Tensors that are kept of each trained weight, in the weight's shape, as checkpoints name them.
    pub fn states(&self) -> &'static [&'static str] {
        match self.rule {
            Rule::Ema { .. } => &[FIRST_MOMENT, SECOND_MOMENT, AVERAGE],
            _ if self.merge_every > 1 => &[FIRST_MOMENT, SECOND_MOMENT, SINCE_MERGE],
            _ => &[FIRST_MOMENT, SECOND_MOMENT],
        }
    }

    /// Whether it reads `tau_ref`. OnTIES asks it for signs even where the merge weight is 0.
    pub fn merges(&self) -> bool {
        match self.rule {
            Rule::OnDare { merge_weight, .. } => merge_weight > 0.0,
            Rule::OnTies { .. } => true,
            Rule::Adam | Rule::Ema { .. } => false,
        }
    }

    /// Whether the same `tau_ref` is added at every merge, so that a factor beside the master weights can stand for it: a
    /// weight of 0.02 loses 1e-10 in f32, and a merge weight of 1e-7 is about that.
    pub fn lazy(&self) -> bool {
        self.merges() && matches!(self.rule, Rule::OnDare { variant: DareVariant::Released, .. })
    }

    /// Whether step `step`, counted from 1, ends with a merge.
    pub fn merges_at(&self, step: u64) -> bool {
        step.is_multiple_of(self.merge_every)
    }

    fn merge_weight(&self) -> f64 {
        match self.rule {
            Rule::OnDare { merge_weight, .. } | Rule::OnTies { merge_weight, .. } => merge_weight,
            Rule::Adam | Rule::Ema { .. } => 0.0,
        }
    }

    /// The weight of `tau_ref` in step `step`; 0 between merges.
    pub fn merge_weight_at(&self, step: u64, schedule: &Schedule) -> f64 {
        if !self.merges_at(step) {
            return 0.0;
        }
        self.merge_weight()
            * match self.merge_schedule {
                MergeSchedule::Constant => 1.0,
                MergeSchedule::Ramp => step as f64 / schedule.max_steps as f64,
                MergeSchedule::LearningRate => schedule.rate(step) / schedule.peak,
            }
    }

    /// The rule of step `step`.
    pub(super) fn rule_at(&self, step: u64, schedule: &Schedule) -> Rule {
        let (mut rule, weight) = (self.rule, self.merge_weight_at(step, schedule));
        if let Rule::OnDare { merge_weight, .. } | Rule::OnTies { merge_weight, .. } = &mut rule {
            *merge_weight = weight;
        }
        rule
    }

    /// Merge weights of a run, summed: the share of `tau_ref` that it adds, at most.
    pub fn added(&self, schedule: &Schedule) -> f64 {
        (1..=schedule.max_steps).map(|step| self.merge_weight_at(step, schedule)).sum()
    }
}
