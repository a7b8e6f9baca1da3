//! Parameters that several optimizers take.

use std::ops::Bound;

use super::{MergeSchedule, Method};
use crate::ops::merged_update::Form;
use crate::params::{Domain, ParamSpec, Params};

/// (0, 1]
const SHARE: (Bound<f64>, Bound<f64>) = (Bound::Excluded(0.0), Bound::Included(1.0));

const FORMS: &[&str] = &["torch", "hugging-face"];

/// Where epsilon and the decay stand; torch's unless the optimizer was published with the other.
pub(super) const ADAM_FORM: ParamSpec = ParamSpec {
    name: "adam_form",
    domain: Domain::Choice { values: FORMS, default: "torch" },
    only_with: None,
    help: "torch: decay first, epsilon beside the corrected root; hugging-face, as transformers once had it: epsilon beside \
           the uncorrected root, decay last",
};

/// The same for what was published on top of transformers' former AdamW.
pub(super) const ADAM_FORM_PUBLISHED: ParamSpec =
    ParamSpec { domain: Domain::Choice { values: FORMS, default: "hugging-face" }, ..ADAM_FORM };

pub(super) const RESERVE_RATE: ParamSpec = ParamSpec {
    name: "reserve_rate",
    domain: Domain::Number { default: None, range: SHARE, example: 0.01 },
    only_with: None,
    help: "share of the elements of every tensor that is kept, of an update and of tau_ref; 1 = all",
};

pub(super) const MERGE_WEIGHT: ParamSpec = ParamSpec {
    name: "merge_weight",
    domain: Domain::Number { default: None, range: (Bound::Included(0.0), Bound::Excluded(1.0)), example: 1e-6 },
    only_with: None,
    help: "lambda in weight += (1 - lambda) update + lambda tau_ref, at every merge; over the run about lambda times merges of \
           tau_ref are added",
};

pub(super) const MERGE_SCHEDULE: ParamSpec = ParamSpec {
    name: "merge_schedule",
    domain: Domain::Choice { values: &["constant", "ramp", "learning-rate"], default: "constant" },
    only_with: None,
    help: "course of the merge weight: constant, as published, ramp from 0 up over the run, or in proportion to the learning rate",
};

pub(super) const MERGE_EVERY: ParamSpec = ParamSpec {
    name: "merge_every",
    domain: Domain::Count { default: 1, example: 5 },
    only_with: None,
    help: "step-K: steps between merges; in between plain Adam, and a merge takes the updates since the last as one",
};

pub(super) const MERGE_FORM: ParamSpec = ParamSpec {
    name: "merge_form",
    domain: Domain::Choice { values: &["released", "paper"], default: "released" },
    only_with: None,
    help: "the authors' code, or their equations where these differ: `cuvee list optimizers`",
};

pub(super) const MERGE_RESCALE: ParamSpec = ParamSpec {
    name: "merge_rescale",
    domain: Domain::Switch,
    only_with: None,
    help: "scale what is kept of an update so that its absolute sum is that of the whole update",
};

pub(super) fn adam_form(params: &Params) -> Form {
    match params.choice("adam_form") {
        Some("hugging-face") => Form::HuggingFace { correct_bias: true },
        _ => Form::Torch,
    }
}

/// What merging optimizers share, around a rule.
pub(super) fn merging(params: &Params, method: Method) -> Method {
    let merge_schedule = match params.choice("merge_schedule") {
        Some("ramp") => MergeSchedule::Ramp,
        Some("learning-rate") => MergeSchedule::LearningRate,
        _ => MergeSchedule::Constant,
    };
    Method { merge_schedule, merge_every: params["merge_every"] as u64, ..method }
}
