//! Online merging: every step of every tensor, weights and states, with the masks of the files.

use cuvee::device::{Arena, DType, Device, Kind, Philox, Reference, Tensor};
use cuvee::ops::merged_update::{
    Adam, Args, Consensus, DareVariant, Form, Purpose, Rounding, Rule, Step, prepare_with, update_with,
};
use libtest_mimic::Failed;
use serde_json::Value;

use super::{Tally, cases, close, text};

/// What a case trains: its weight, states by the names of `Args`, and how much of the task vector lies on the weight.
struct Trained {
    weight: Tensor<Reference>,
    master: Tensor<Reference>,
    first_moment: Tensor<Reference>,
    second_moment: Tensor<Reference>,
    since_merge: Tensor<Reference>,
    scratch: Tensor<Reference>,
    tau_ref: Tensor<Reference>,
    share: f64,
}

fn tensor(values: &[f64]) -> Tensor<Reference> {
    let bytes = Arena::<Reference>::bytes_of(DType::F32, values.len(), 1);
    let mut arena = Arena::with_bytes(&Reference, bytes).unwrap();
    let mut tensor = arena.floats(Kind::States, values.len(), 1);
    Reference.write_f64(values, tensor.view_mut()).unwrap();
    tensor
}

fn contents(tensor: &Tensor<Reference>) -> Vec<f64> {
    let mut values = vec![0.0; tensor.len()];
    Reference.read_f64(tensor.view(), &mut values).unwrap();
    values
}

/// The numbers of an array of any depth, in order.
fn flat(value: &Value) -> Vec<f64> {
    match value.as_array() {
        Some(items) => items.iter().flat_map(flat).collect(),
        None => vec![value.as_f64().expect("a number")],
    }
}

impl Trained {
    fn new(start: &[f64], tau_ref: &[f64]) -> Self {
        let zeros = || tensor(&vec![0.0; start.len()]);
        Self {
            weight: tensor(start),
            master: tensor(start),
            first_moment: zeros(),
            second_moment: zeros(),
            since_merge: zeros(),
            scratch: zeros(),
            tau_ref: tensor(tau_ref),
            share: 0.0,
        }
    }

    /// The released OnDARE's share of the task vector is the caller's to keep.
    fn update(&mut self, step: &Step, grad: &[f64], keeps: impl Fn(Purpose, usize) -> bool) -> Result<(), Failed> {
        let decay = 1.0 - step.learning_rate * step.weight_decay;
        let Adam { form, .. } = step.adam;
        assert_ne!(form, Form::Torch, "the files decay last");
        let merged = match step.rule {
            Rule::OnDare { merge_weight, variant: DareVariant::Released, .. } if step.merges => merge_weight,
            _ => 0.0,
        };
        self.share = (self.share + merged) * decay;
        let (grad, twice) = (tensor(grad), step.rule.scratch(self.weight.len()) > 0);
        let args = Args {
            step: Step { share: self.share, ..*step },
            grad: grad.view(),
            weight: self.weight.view_mut(),
            master: Some(self.master.view_mut()),
            first_moment: self.first_moment.view_mut(),
            second_moment: self.second_moment.view_mut(),
            since_merge: Some(self.since_merge.view_mut()),
            average: None,
            tau_ref: Some(self.tau_ref.view()),
            scratch: twice.then(|| self.scratch.view_mut()),
            lost: None,
        };
        Ok(update_with(args, keeps).map_err(|e| e.to_string())?)
    }
}

fn number(config: &Value, key: &str) -> Result<f64, Failed> {
    Ok(config[key].as_f64().ok_or_else(|| format!("no number {key}"))?)
}

fn flag(config: &Value, key: &str) -> Result<bool, Failed> {
    Ok(config[key].as_bool().ok_or_else(|| format!("no flag {key}"))?)
}

fn step_of(config: &Value, rule: Rule) -> Result<Step, Failed> {
    let betas = flat(&config["betas"]);
    let form = Form::HuggingFace { correct_bias: flag(config, "correct_bias")? };
    Ok(Step {
        adam: Adam { beta1: betas[0], beta2: betas[1], eps: number(config, "eps")?, form },
        rule,
        step: 0,
        learning_rate: number(config, "lr")?,
        weight_decay: number(config, "weight_decay")?,
        clip: 1.0,
        gradient_reserve_rate: 1.0,
        merges: true,
        share: 0.0,
        rounding: Rounding::Nearest,
        random: Philox::new(0, 0),
    })
}

/// `use_merge` = false of the files is a merge of weight 0.
fn rule_of(config: &Value) -> Result<Rule, Failed> {
    let reserve_rate = number(config, "reserve_p")?;
    let merge_weight = if flag(config, "use_merge")? { number(config, "alpha")? } else { 0.0 };
    let rescale = flag(config, "rescale")?;
    let released = text(config, "variant")? == "official";
    Ok(match text(config, "kind")? {
        "ondare" => Rule::OnDare {
            reserve_rate,
            merge_weight,
            variant: if released { DareVariant::Released } else { DareVariant::Paper },
            rescale,
            clip: number(config, "clip_val")?,
        },
        "onties" => Rule::OnTies {
            reserve_rate,
            merge_weight,
            consensus: if released { Consensus::BeforeWeight } else { Consensus::AfterWeight },
            rescale,
        },
        other => return Err(format!("unknown optimizer {other}").into()),
    })
}

/// `ondare`, `onties`, `stepk`: weights, moments and what was not merged yet, after every step.
pub fn online_merging(file: &Value, tally: &mut Tally) -> Result<(), Failed> {
    for case in cases(file)? {
        let (name, config) = (text(case, "name")?, &case["config"]);
        if text(config, "step_k_semantics")? != "fixed" {
            tally.skip("the released code leaves step() at the first tensor between merges: not reproduced".into());
            continue;
        }
        let (rule, every) = (rule_of(config)?, number(config, "online_step")? as u64);
        let plain = step_of(config, rule)?;
        for (at, param) in case["params"].as_array().ok_or("no params")?.iter().enumerate() {
            let what = |step: usize, field: &str| format!("{name}, {}, step {step}: {field}", param["name"]);
            let mask = |masks: &Value, i: usize| masks.is_null() || flat(&masks[at])[i] != 0.0;
            let (base, reference) = (flat(&param["theta_base"]), flat(&param["theta_ref"]));
            let mut tau: Vec<f64> = reference.iter().zip(&base).map(|(r, b)| r - b).collect();
            let of_tau = &param["tau_mask"];
            prepare_with(&rule, &mut tau, |i| of_tau.is_null() || flat(of_tau)[i] != 0.0);
            close(&what(0, "tau_ref"), &tau, &flat(&param["tau_prepared"]))?;
            let mut trained = Trained::new(&flat(&param["theta0"]), &tau);
            for (i, golden) in case["steps"].as_array().ok_or("no steps")?.iter().enumerate() {
                let number = i as u64 + 1;
                let step = Step { step: number, merges: number.is_multiple_of(every), ..plain };
                trained.update(&step, &flat(&golden["grads"][at]), |purpose, i| match purpose {
                    Purpose::Update => mask(&golden["masks"], i),
                    Purpose::TauRef => mask(&golden["tau_masks"], i),
                    Purpose::Gradient | Purpose::Rounding => true,
                })?;
                let after = &golden["after"][at];
                for (field, found) in [
                    ("theta", &trained.weight),
                    ("m", &trained.first_moment),
                    ("v", &trained.second_moment),
                    ("cache", &trained.since_merge),
                ] {
                    close(&what(i + 1, field), &contents(found), &flat(&after[field]))?;
                }
            }
        }
        tally.checked += 1;
    }
    Ok(())
}

/// ChildTuning-F: elements of the gradient are dropped before the moments.
pub fn childtuning(file: &Value, tally: &mut Tally) -> Result<(), Failed> {
    for case in cases(file)? {
        let (name, config) = (text(case, "name")?, &case["config"]);
        let gradient_reserve_rate = number(config, "reserve_p")?;
        let plain = Step { gradient_reserve_rate, ..step_of(config, Rule::Adam)? };
        let start = flat(&case["theta0"]);
        let mut trained = Trained::new(&start, &vec![0.0; start.len()]);
        for (i, golden) in case["steps"].as_array().ok_or("no steps")?.iter().enumerate() {
            let mask = flat(&golden["mask"]);
            let step = Step { step: i as u64 + 1, ..plain };
            trained
                .update(&step, &flat(&golden["grad"]), |purpose, i| purpose != Purpose::Gradient || mask[i] != 0.0)?;
            close(&format!("{name}, step {}", i + 1), &contents(&trained.weight), &flat(&golden["theta"]))?;
        }
        tally.checked += 1;
    }
    Ok(())
}
