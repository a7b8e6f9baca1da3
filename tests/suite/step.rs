//! One optimizer step: what an objective asks for arrives, what it returns is applied.

use cuvee::data::{Example, Packing, Sequence};
use cuvee::device::Cpu;
use cuvee::error::Error;
use cuvee::model::{Init, Keep, init_random};
use cuvee::objectives::{Choice, Grads, Needs, Objective, Outcome, Params, Scope, Stats, Totals};
use cuvee::optim::{self, Decay, Hyper, Schedule};
use cuvee::references::Scored;
use cuvee::train::{Blueprint, Extras, Pass, Policy, Purpose, Rows, StepResult, step};

use crate::tiny::{self, SEED, Size};

const PACKING: Packing = Packing::new(14);
/// Every step in one micro-batch.
const ONE: Packing = Packing::new(1000);
const HYPER: Hyper = Hyper {
    beta1: 0.9,
    beta2: 0.999,
    eps: 1e-8,
    weight_decay: 0.1,
    max_grad_norm: 1.0,
    stochastic_rounding: false,
    seed: 0,
};

/// The merge weight's course alone depends on it.
const SCHEDULE: Schedule = Schedule { peak: 1.0, decay: Decay::Constant, warmup_steps: 0, max_steps: 1 };

fn pairs() -> Vec<Example> {
    let pair = |row: usize| {
        let ids = |from: usize, len: usize| (from..from + len).map(|i| (i * 7 % 11) as u32);
        let sequence = |from, len| Sequence::new(ids(row, 3).chain(ids(from, len)).collect(), 3);
        Example { row, sequences: vec![sequence(row + 1, 2 + row), sequence(row + 5, 4)], ..Example::default() }
    };
    (0..4).map(pair).collect()
}

/// Fixed reference log-probs, in the order of the sequences.
fn reference(examples: &[Example]) -> Vec<Scored> {
    let sums = |e: &Example| e.sequences.iter().map(|s| -2.5 * (s.ids.len() - s.first) as f64).collect();
    examples.iter().map(|e| Scored { sums: sums(e), ..Scored::default() }).collect()
}

struct Rig {
    cpu: Cpu,
    policy: Policy<Cpu>,
    examples: Vec<Example>,
}

impl Rig {
    fn new() -> Self {
        let tiny = tiny::with(Size::Tiny, "llama", serde_json::json!({}));
        let (cpu, examples) = (Cpu::new(2).unwrap(), pairs());
        let extents = PACKING.extents(&examples);
        let largest = PACKING.largest(&extents).max(ONE.largest(&extents));
        let method = optim::Choice { name: "adamw".into(), params: Default::default() }.build().unwrap();
        let checkpoint = &tiny.checkpoint;
        let positions = largest.longest;
        let keep = Keep::Everything;
        let blueprint = Blueprint {
            checkpoint,
            init: Init::Random { seed: SEED },
            method,
            hyper: HYPER,
            schedule: SCHEDULE,
            largest,
            positions,
            keep,
            lora: None,
            extras: Extras::default(),
        };
        let mut policy = blueprint.build(&cpu).unwrap();
        init_random(&cpu, &mut policy.model, SEED).unwrap();
        Self { cpu, policy, examples }
    }

    fn step(&mut self, objective: &dyn Objective, packing: Packing, rate: f64) -> Result<StepResult, Error> {
        let said = reference(&self.examples);
        let refs = match objective.needs().refs.end() {
            0 => Vec::new(),
            _ => vec![said.iter().collect()],
        };
        let examples: Vec<&Example> = self.examples.iter().collect();
        let rows = Rows { examples: &examples, refs: &refs, ..Rows::default() };
        let pass = Pass { objective, rows, packing, purpose: Purpose::Training, step: 1 };
        step(&self.cpu, &mut self.policy, &pass, rate)
    }

    fn weights(&mut self) -> Vec<f32> {
        self.policy.model.params_mut().iter().flat_map(|p| p.value.view().f32s().to_vec()).collect()
    }
}

/// An objective that couples the whole batch: the same loss, asked for at once.
struct AtOnce(Box<dyn Objective>);

impl Objective for AtOnce {
    fn name(&self) -> &'static str {
        "at once"
    }
    fn needs(&self) -> Needs {
        self.0.needs()
    }
    fn scope(&self) -> Scope {
        Scope::Batch
    }
    fn evaluate(&self, stats: &Stats, totals: &Totals) -> Outcome {
        assert_eq!((stats.pairs.len(), totals.pairs), (4, 4.0), "it sees the whole optimizer batch");
        self.0.evaluate(stats, totals)
    }
}

/// `sft` written with derivatives per token.
struct PerToken(Scope);

impl Objective for PerToken {
    fn name(&self) -> &'static str {
        "per token"
    }
    fn needs(&self) -> Needs {
        Needs { token_logps: true, ..Needs::POLICY }
    }
    fn scope(&self) -> Scope {
        self.0
    }
    fn evaluate(&self, stats: &Stats, totals: &Totals) -> Outcome {
        assert_eq!(stats.offsets.len(), stats.logps.len() + 1);
        for (s, sum) in stats.logps.iter().enumerate() {
            let tokens = &stats.token_logps[stats.offsets[s]..stats.offsets[s + 1]];
            assert!((tokens.iter().sum::<f64>() - sum).abs() < 1e-9, "offsets belong to their sequences");
        }
        let loss = -stats.token_logps.iter().sum::<f64>() / totals.tokens;
        let token_logps = vec![-1.0 / totals.tokens; stats.token_logps.len()];
        Outcome { loss, grads: Grads { token_logps, ..Grads::default() }, ..Outcome::default() }
    }
}

fn sigmoid() -> Box<dyn Objective> {
    Choice::one("sigmoid", Params::from_iter([("beta", 0.3)])).build().unwrap()
}

fn close(what: &str, a: f64, b: f64) {
    assert!((a - b).abs() <= 1e-5 * b.abs(), "{what}: {a} and {b}");
}

#[test]
fn an_objective_of_the_whole_batch_steps_like_one_of_pairs() {
    let (mut by_pair, mut at_once, mut whole) = (Rig::new(), Rig::new(), Rig::new());
    let a = by_pair.step(sigmoid().as_ref(), PACKING, 1e-3).unwrap();
    let b = at_once.step(&AtOnce(sigmoid()), PACKING, 1e-3).unwrap();
    let c = whole.step(&AtOnce(sigmoid()), ONE, 1e-3).unwrap();
    assert_eq!(a.rows, b.rows);
    for other in [&b, &c] {
        close("loss", other.loss, a.loss);
        close("gradient norm", other.grad_norm, a.grad_norm);
        for ((name, ours), (_, theirs)) in other.metrics.iter().zip(&a.metrics) {
            close(name, *ours, *theirs);
        }
    }
    assert!(by_pair.weights() == at_once.weights(), "the same micro-batches give the same bits");
}

#[test]
fn derivatives_per_token_are_those_of_the_sum() {
    let sft = Choice::one("sft", Params::default()).build().unwrap();
    let chosen_only = || {
        let mut rig = Rig::new();
        rig.examples.iter_mut().for_each(|example| example.sequences.truncate(1));
        rig
    };
    let mut by_sum = chosen_only();
    let expected = by_sum.step(sft.as_ref(), PACKING, 1e-3).unwrap();
    for scope in [Scope::Pair, Scope::Batch] {
        let mut by_token = chosen_only();
        let found = by_token.step(&PerToken(scope), PACKING, 1e-3).unwrap();
        close("loss", found.loss, expected.loss);
        close("gradient norm", found.grad_norm, expected.grad_norm);
    }
}

#[test]
fn a_step_lowers_the_loss_and_a_rate_of_zero_changes_nothing() {
    let mut rig = Rig::new();
    let before = rig.weights();
    let first = rig.step(sigmoid().as_ref(), PACKING, 0.0).unwrap();
    assert!(rig.weights() == before);
    let again = rig.step(sigmoid().as_ref(), PACKING, 1e-2).unwrap();
    assert_eq!(first.loss, again.loss);
    assert!(rig.step(sigmoid().as_ref(), PACKING, 0.0).unwrap().loss < again.loss);
}

#[test]
fn what_is_not_finite_is_named_and_nothing_is_updated() {
    let mut rig = Rig::new();
    let name = "model.layers.1.mlp.up_proj.weight";
    let params = rig.policy.model.params_mut();
    let param = params.into_iter().find(|p| p.name == name).unwrap();
    param.value.view_mut().into_f32s()[3] = f32::NAN;
    let before: Vec<u32> = rig.weights().iter().map(|x| x.to_bits()).collect();
    let message = rig.step(sigmoid().as_ref(), PACKING, 1e-2).unwrap_err().to_string();
    assert!(message.contains("step 1") && message.contains("rows 0") && message.contains(name), "{message}");
    assert!(rig.weights().iter().map(|x| x.to_bits()).eq(before));
}

#[test]
fn a_loss_that_is_not_finite_stops_before_the_update() {
    struct Broken;
    impl Objective for Broken {
        fn name(&self) -> &'static str {
            "broken"
        }
        fn needs(&self) -> Needs {
            Needs::POLICY
        }
        fn scope(&self) -> Scope {
            Scope::Pair
        }
        fn evaluate(&self, stats: &Stats, _: &Totals) -> Outcome {
            let grads = Grads { logps: vec![0.0; stats.logps.len()], ..Grads::default() };
            Outcome { loss: f64::NAN, grads, ..Outcome::default() }
        }
    }
    let mut rig = Rig::new();
    let before = rig.weights();
    let message = rig.step(&Broken, PACKING, 1e-2).unwrap_err().to_string();
    assert!(message.contains("the loss is not finite") && message.contains("rows 0, 1, 2, 3"), "{message}");
    assert!(rig.weights() == before);
}
