//! Every op: the CPU against the f64 oracle on awkward shapes, the oracle's backward against central differences
//! of its forward, and what the ops promise besides: `=` and `+=`, unwanted gradients, equal bits for any threads,
//! instruction set and neighbouring rows, NaN and wrong shapes that do not pass silently.

use cuvee::Result;
use cuvee::device::{Arena, Cpu, DType, Device, Isa, Kind, Philox, Reference, Tensor};
use cuvee::ops::linear::Linear as _;
use cuvee::ops::logprob_head::{self, LogprobHead};
use cuvee::ops::low_rank::LowRank as _;
use cuvee::ops::merged_update::{Consensus, DareVariant, Purpose, Rule, Step, prepare};
use cuvee::ops::rope::Direction;
use cuvee::ops::{self, Backend, sum_squares};

use crate::common::case::{Case, Slot, Spec, contents, normals, output_of, put, refusal, run, slots, specs_on, zero};
use crate::common::checks::{
    self, assert_same_bits, compare, largest, largest_difference, nan_surfaces, same_again, same_elsewhere,
    same_for_some_rows, twice_is_double, unwanted_stay, wrong_shapes_are_refused,
};
use crate::common::ops::activations::{self, CURVES, Gelu, GeluBackward, SwiGlu, SwiGluBackward};
use crate::common::ops::attention::{self, Attention, AttentionBackward, dims, forest};
use crate::common::ops::head::{self, Head, HeadBackward};
use crate::common::ops::linear::{self, Linear, LinearBackward};
use crate::common::ops::low_rank::{self, LowRank, LowRankBackward};
use crate::common::ops::norms::{self, LayerNorm, LayerNormBackward, RmsNorm, RmsNormBackward};
use crate::common::ops::rope::Rope;
use crate::common::ops::rows::{Gather, GatherBackward};
use crate::common::ops::token_kl::{self, TokenKl, TokenKlBackward};
use crate::common::ops::updates::{self, Update};
use crate::common::ops::{Visitor, all, no_rows_are_no_work as no_work, rope, rows};

// ---- how the CPU is asked -------------------------------------------------------------------------------------

fn cpu() -> Cpu {
    Cpu::new(2).unwrap()
}

/// Devices whose results must be equal, bit for bit: chains on any instruction set, whatever the machine multiplies
/// with otherwise; each on some numbers of threads.
pub fn families() -> [Vec<(String, Cpu)>; 2] {
    let best = Isa::detect();
    let mut chains = vec![(1, best), (2, best), (5, best), (2, Isa::Portable)];
    #[cfg(target_arch = "x86_64")]
    chains.extend([(2, Isa::Avx2)].into_iter().filter(|(_, isa)| *isa <= best));
    let chains = chains.into_iter().map(|(threads, isa)| {
        let what = format!("{threads} threads, {isa:?}, chains");
        (what, Cpu::with_isa(threads, isa).unwrap())
    });
    let fastest = [1, 2, 5].into_iter().map(|threads| {
        let cpu = Cpu::new(threads).unwrap();
        (format!("{threads} threads, {best:?}, {:?}", cpu.products()), cpu)
    });
    [chains.collect(), fastest.collect()]
}

struct Close;

impl Visitor for Close {
    fn close<C: Case>(&mut self, case: &C) {
        compare(&cpu(), case);
    }
}

/// All but closeness.
struct Promises;

impl Visitor for Promises {
    /// Nor must threads and instruction sets change a bit.
    fn repeatable<C: Case>(&mut self, case: &C) {
        same_again(&cpu(), case);
        same_elsewhere(&cpu(), case);
        for family in families() {
            let specs = specs_on(&family[0].1, case);
            let expected = run(&family[0].1, case, &specs);
            for (what, cpu) in &family[1..] {
                assert_same_bits(&format!("{}, {what}", case.op()), &specs, &run(cpu, case, &specs), &expected);
            }
        }
    }

    fn rows<C: Case>(&mut self, case: &C) {
        same_for_some_rows(&cpu(), case);
    }

    fn twice<C: Case>(&mut self, case: &C) {
        twice_is_double(&cpu(), case);
    }

    fn unwanted<C: Case>(&mut self, all: &C, some: &C, optional: &[&str], wanted: &[bool]) {
        unwanted_stay(&cpu(), all, some, optional, wanted);
    }

    fn nan<C: Case>(&mut self, case: &C) {
        nan_surfaces(&cpu(), case);
    }

    fn shapes<C: Case>(&mut self, case: &C) {
        wrong_shapes_are_refused(&cpu(), case);
    }
}

/// Which op a list of cases runs.
struct Named(&'static str, usize);

impl Visitor for Named {
    fn close<C: Case>(&mut self, case: &C) {
        assert_eq!(case.op(), self.0);
        self.1 += 1;
    }
}

#[test]
fn cases_stand_under_the_name_of_their_op() {
    for (name, visit) in all() {
        let mut named = Named(name, 0);
        visit(&mut named);
        assert!(named.1 > 0, "{name} has no cases");
    }
}

/// `gradient` against central differences of `loss` at `at`, in f64: 1e-6 of the gradient's size, which is far
/// above truncation (step^2 = 1e-10) and rounding (1e-16 / step = 1e-11).
fn assert_gradient(what: &str, at: &[f64], gradient: &[f64], mut loss: impl FnMut(&[f64]) -> f64) {
    const STEP: f64 = 1e-5;
    assert_eq!(at.len(), gradient.len(), "{what}");
    let mut moved = at.to_vec();
    let differences: Vec<f64> = (0..at.len())
        .map(|i| {
            moved[i] = at[i] + STEP;
            let high = loss(&moved);
            moved[i] = at[i] - STEP;
            let low = loss(&moved);
            moved[i] = at[i];
            (high - low) / (2.0 * STEP)
        })
        .collect();
    let size = largest(differences.iter().map(|x| x.abs()));
    let error = largest_difference(gradient, &differences);
    assert!(size > 0.0 && error <= 1e-6 * size.max(1.0), "{what}: off by {error:e} of {size:e}");
}

/// `gradient` against central differences of `upstream . result` of the oracle's forward, by `input`.
fn assert_backward<C: Case>(case: &C, specs: &[Spec], input: &str, result: &str, upstream: &[f64], gradient: &[f64]) {
    let mut moved = specs.to_vec();
    assert_gradient(&format!("{} by {input}", case.op()), &contents(specs, input), gradient, |x| {
        put(&mut moved, input, x);
        let values = run(&Reference, case, &moved);
        output_of(specs, &values, result).iter().zip(upstream).map(|(y, dy)| y * dy).sum()
    });
}

// ---- linear ---------------------------------------------------------------------------------------------------

#[test]
fn linear_is_close_to_the_oracle() {
    linear::forward(&mut Close);
    linear::backward(&mut Close);
}

#[test]
fn linear_backward_is_the_derivative() {
    let shape = [3, 5, 4];
    let (forward, backward) = (Linear::full(shape), LinearBackward::full(shape));
    let (specs, mut back) = (forward.specs(), backward.specs());
    zero(&mut back, &["dx", "dweight", "dbias"]);
    let gradients = run(&Reference, &backward, &back);
    for (input, gradient) in [("x", "dx"), ("weight", "dweight"), ("bias", "dbias")] {
        let gradient = output_of(&back, &gradients, gradient);
        assert_backward(&forward, &specs, input, "y", &contents(&back, "dy"), gradient);
    }
    // The residual's gradient is dy itself.
    assert_backward(&forward, &specs, "residual", "y", &contents(&back, "dy"), &contents(&back, "dy"));
}

#[test]
fn linear_keeps_its_promises() {
    linear::forward(&mut Promises);
    linear::backward(&mut Promises);
}

// ---- low_rank -------------------------------------------------------------------------------------------------

#[test]
fn low_rank_is_close_to_the_oracle() {
    low_rank::forward(&mut Close);
    low_rank::backward(&mut Close);
}

#[test]
fn low_rank_backward_is_the_derivative() {
    let shape = [3, 5, 4, 2];
    let (forward, backward) = (LowRank { shape, scale: 0.7 }, LowRankBackward::full(shape, 0.7));
    let (mut specs, mut back) = (forward.specs(), backward.specs());
    zero(&mut specs, &["y"]);
    zero(&mut back, &["dx", "da", "db"]);
    let gradients = run(&Reference, &backward, &back);
    for (input, gradient) in [("x", "dx"), ("a", "da"), ("b", "db")] {
        let gradient = output_of(&back, &gradients, gradient);
        assert_backward(&forward, &specs, input, "y", &contents(&back, "dy"), gradient);
    }
}

#[test]
fn low_rank_keeps_its_promises() {
    low_rank::forward(&mut Promises);
    low_rank::backward(&mut Promises);
}

/// Random numbers on the CPU; `bf16` keeps them as what they are rounded to.
fn tensor(cpu: &Cpu, arena: &mut Arena<Cpu>, [rows, cols]: [usize; 2], stream: u64, bf16: bool) -> Tensor<Cpu> {
    let random = Philox::new(5, stream);
    let values: Vec<f32> = (0..rows * cols).map(|i| random.normal(i as u64) as f32).collect();
    let mut tensor = arena.frozen(Kind::Weights, bf16, rows, cols);
    cpu.write_f32(&values, tensor.view_mut()).unwrap();
    tensor
}

/// Of few rows a layer and what stands beside it share a parallel section, and of more they do not: the bits are the same.
#[test]
fn a_layer_with_a_low_rank_product_beside_it_is_one_after_the_other() {
    for (threads, [rows, inputs, outputs, rank]) in [
        (1, [1, 31, 123, 1]),
        (2, [8, 576, 192, 48]),
        (3, [32, 123, 507, 64]),
        (2, [17, 40, 5, 3]),
        (2, [33, 64, 70, 24]),
        (3, [9, 260, 1000, 100]),
    ] {
        for (bf16, [bias, residual, blend]) in [(false, [true; 3]), (true, [false; 3]), (false, [false, true, true])] {
            let cpu = Cpu::new(threads).unwrap();
            let mut arena = Arena::with_bytes(&cpu, 16 << 20).unwrap();
            let mut random = |shape, stream| tensor(&cpu, &mut arena, shape, stream, false);
            let (x, a, b) = (random([rows, inputs], 1), random([rank, inputs], 2), random([outputs, rank], 3));
            let (added, before) = (random([1, outputs], 4), random([rows, outputs], 5));
            let (weights, mut scratch) = (random([rows, 2], 6), random([rows, rank], 7));
            let [mut apart, mut together] = [8, 9].map(|stream| random([rows, outputs], stream));
            let weight = tensor(&cpu, &mut arena, [outputs, inputs], 10, bf16);
            let mut owner = arena.indices(Kind::Weights, rank, 1);
            cpu.write_u32(&(0..rank as u32).map(|k| k % 2).collect::<Vec<_>>(), owner.view_mut()).unwrap();
            let mut run = |y: &mut Tensor<Cpu>, at_once: bool| {
                let (x, weight, a, b, scale) = (x.view(), weight.view(), a.view(), b.view(), 0.7);
                let (bias, residual) = (bias.then(|| added.view()), residual.then(|| before.view()));
                let blend = blend.then(|| ops::low_rank::Blend { weights: weights.view(), owner: owner.view() });
                let factors = ops::low_rank::Factors { a, b, scale, blend, scratch: scratch.view_mut() };
                let layer = ops::linear::Forward { x, weight, bias, residual, y: y.view_mut() };
                if at_once {
                    return cpu.linear_low_rank(layer, factors).unwrap();
                }
                cpu.linear(layer).unwrap();
                cpu.low_rank(factors.beside(x, y.view_mut())).unwrap();
            };
            run(&mut apart, false);
            run(&mut together, true);
            let what = format!("{rows}x{inputs}x{outputs}, rank {rank}, {threads} threads");
            assert!(apart.view().f32s() == together.view().f32s(), "{what}");
        }
    }
}

/// An adapter that has not trained yet changes no bit.
#[test]
fn a_product_with_zeros_leaves_every_bit() {
    let case = LowRank { shape: [47, 31, 123, 16], scale: 2.0 };
    let mut specs = case.specs();
    zero(&mut specs, &["b"]);
    let y = contents(&specs, "y");
    let found = run(&cpu(), &case, &specs);
    let same = output_of(&specs, &found, "y").iter().zip(&y).all(|(found, y)| found.to_bits() == y.to_bits());
    assert!(same, "y changes");
}

// ---- rms_norm -------------------------------------------------------------------------------------------------

#[test]
fn rms_norm_is_close_to_the_oracle() {
    norms::rms_norm(&mut Close);
    norms::rms_norm_backward(&mut Close);
}

#[test]
fn rms_norm_backward_is_the_derivative() {
    let (forward, backward) = (RmsNorm([3, 7]), RmsNormBackward::full([3, 7]));
    let (specs, mut back) = (forward.specs(), backward.specs());
    let values = run(&Reference, &forward, &specs);
    put(&mut back, "rstd", output_of(&specs, &values, "rstd"));
    put(&mut back, "x", &contents(&specs, "x"));
    zero(&mut back, &["dx", "dweight"]);
    let gradients = run(&Reference, &backward, &back);
    for (input, gradient) in [("x", "dx"), ("weight", "dweight")] {
        let gradient = output_of(&back, &gradients, gradient);
        assert_backward(&forward, &specs, input, "y", &contents(&back, "dy"), gradient);
    }
}

#[test]
fn rms_norm_keeps_its_promises() {
    norms::rms_norm(&mut Promises);
    norms::rms_norm_backward(&mut Promises);
}

#[test]
fn rms_norm_of_a_zero_row_is_finite() {
    norms::rms_norm_of_a_zero_row_is_finite(&cpu());
}

// ---- swiglu ---------------------------------------------------------------------------------------------------

#[test]
fn swiglu_is_close_to_the_oracle() {
    activations::swiglu(&mut Close);
    activations::swiglu_backward(&mut Close);
}

#[test]
fn swiglu_backward_is_the_derivative() {
    let (forward, backward) = (SwiGlu([3, 7]), SwiGluBackward([3, 7]));
    let (specs, back) = (forward.specs(), backward.specs());
    let gradients = run(&Reference, &backward, &back);
    for (input, gradient) in [("gate", "dgate"), ("up", "dup")] {
        let gradient = output_of(&back, &gradients, gradient);
        assert_backward(&forward, &specs, input, "y", &contents(&back, "dy"), gradient);
    }
}

#[test]
fn swiglu_keeps_its_promises() {
    activations::swiglu(&mut Promises);
    activations::swiglu_backward(&mut Promises);
}

#[test]
fn swiglu_saturates_without_nan() {
    activations::swiglu_saturates_without_nan(&cpu());
}

// ---- layer_norm -----------------------------------------------------------------------------------------------

#[test]
fn layer_norm_is_close_to_the_oracle() {
    norms::layer_norm(&mut Close);
    norms::layer_norm_backward(&mut Close);
}

#[test]
fn layer_norm_backward_is_the_derivative() {
    let (forward, backward) = (LayerNorm([3, 7]), LayerNormBackward::full([3, 7]));
    let (specs, mut back) = (forward.specs(), backward.specs());
    let values = run(&Reference, &forward, &specs);
    put(&mut back, "stats", output_of(&specs, &values, "stats"));
    zero(&mut back, &["dx", "dweight", "dbias"]);
    let gradients = run(&Reference, &backward, &back);
    for (input, gradient) in [("x", "dx"), ("weight", "dweight"), ("bias", "dbias")] {
        let gradient = output_of(&back, &gradients, gradient);
        assert_backward(&forward, &specs, input, "y", &contents(&back, "dy"), gradient);
    }
}

#[test]
fn layer_norm_keeps_its_promises() {
    norms::layer_norm(&mut Promises);
    norms::layer_norm_backward(&mut Promises);
}

#[test]
fn layer_norm_bears_a_large_mean_and_a_constant_row() {
    norms::layer_norm_bears_a_large_mean_and_a_constant_row(&cpu());
}

// ---- gelu -----------------------------------------------------------------------------------------------------

#[test]
fn gelu_is_close_to_the_oracle() {
    activations::gelu(&mut Close);
    activations::gelu_backward(&mut Close);
}

#[test]
fn gelu_backward_is_the_derivative() {
    for curve in CURVES {
        let (forward, backward) = (Gelu(curve, [3, 7]), GeluBackward(curve, [3, 7]));
        let (specs, back) = (forward.specs(), backward.specs());
        let gradients = run(&Reference, &backward, &back);
        let gradient = output_of(&back, &gradients, "dx");
        assert_backward(&forward, &specs, "x", "y", &contents(&back, "dy"), gradient);
    }
}

#[test]
fn gelu_keeps_its_promises() {
    activations::gelu(&mut Promises);
    activations::gelu_backward(&mut Promises);
}

#[test]
fn gelu_has_the_values_of_others_and_saturates_without_nan() {
    activations::gelu_has_the_values_of_others_and_saturates_without_nan(&cpu());
}

// ---- rope -----------------------------------------------------------------------------------------------------

#[test]
fn rope_is_close_to_the_oracle() {
    rope::rope(&mut Close);
}

#[test]
fn rope_backward_is_the_derivative() {
    let forward = Rope { rows: 3, heads: 2, head_dim: 7, rotary: 4, direction: Direction::Forward };
    let specs = forward.specs();
    let upstream = normals("dy", 3 * 14);
    let mut back = specs.clone();
    put(&mut back, "x", &upstream);
    let gradient = run(&Reference, &Rope { direction: Direction::Backward, ..forward }, &back);
    assert_backward(&forward, &specs, "x", "x", &upstream, output_of(&specs, &gradient, "x"));
}

#[test]
fn rope_keeps_its_promises() {
    rope::rope(&mut Promises);
}

#[test]
fn rope_keeps_a_nan_in_its_pair() {
    rope::rope_keeps_a_nan_in_its_pair(&cpu());
}

// ---- rows -----------------------------------------------------------------------------------------------------

#[test]
fn rows_are_close_to_the_oracle() {
    rows::gather(&mut Close);
    rows::gather_add(&mut Close);
    rows::gather_backward(&mut Close);
    rows::scatter(&mut Close);
}

/// Both gathers have this backward.
#[test]
fn gather_backward_is_the_derivative() {
    let forward = Gather { n: 4, rows: 7, cols: 3 };
    let backward = GatherBackward { gather: forward, of_weights: false };
    let (specs, mut back) = (forward.specs(), backward.specs());
    zero(&mut back, &["dx"]);
    let gradients = run(&Reference, &backward, &back);
    assert_backward(&forward, &specs, "x", "y", &contents(&back, "dy"), output_of(&back, &gradients, "dx"));
}

#[test]
fn rows_keep_their_promises() {
    rows::gather(&mut Promises);
    rows::gather_add(&mut Promises);
    rows::gather_backward(&mut Promises);
    rows::scatter(&mut Promises);
}

// ---- sum_squares ----------------------------------------------------------------------------------------------

#[test]
fn sum_squares_keeps_its_promises() {
    updates::sum_squares(&mut Close);
    updates::sum_squares(&mut Promises);
    updates::sum_squares_overflow(&cpu());
}

#[test]
fn sum_squares_refuses_other_shapes_of_its_sum() {
    struct Wide;
    impl Case for Wide {
        fn op(&self) -> &'static str {
            "sum_squares"
        }
        fn specs(&self) -> Vec<Spec> {
            vec![Spec::set("sum", [1, 1])]
        }
        fn run<D: Backend>(&self, device: &D, t: &mut [Slot<D>]) -> Result<()> {
            let [sum] = t else { panic!("one tensor") };
            let mut arena = cuvee::device::Arena::with_bytes(device, 4096)?;
            let x = arena.floats(cuvee::device::Kind::Grads, 3, 5);
            device.sum_squares(sum_squares::Args { x: x.view(), sum: sum.view_mut() })
        }
        fn naive(&self, _: &[Spec], _: &mut [Vec<f32>]) {}
    }
    wrong_shapes_are_refused(&cpu(), &Wide);
}

// ---- merged_update --------------------------------------------------------------------------------------------

#[test]
fn merged_update_is_close_to_the_oracle() {
    updates::merged_update(&mut Close);
}

/// Against torch.optim.AdamW, computed by hand for one weight: w 1, grad 0.5, both moments 0, step 1. Then
/// m_hat = grad and v_hat = grad^2 exactly, so w = 1 (1 - 0.1 * 0.01) - 0.1 * 0.5 / (0.5 + 1e-8).
#[test]
fn first_step_of_adamw_moves_by_the_learning_rate() {
    let mut case = Update::at([1, 1], 1);
    case.step = Step { learning_rate: 0.1, weight_decay: 0.01, clip: 1.0, ..case.step };
    let mut specs = case.specs();
    put(&mut specs, "grad", &[0.5]);
    put(&mut specs, "weight", &[1.0]);
    zero(&mut specs, &["first_moment", "second_moment"]);
    let values = run(&Reference, &case, &specs);
    assert!((values[0][0] - (0.999 - 0.1 * 0.5 / (0.5 + 1e-8))).abs() < 1e-12);
    assert!((values[2][0] - 0.05).abs() < 1e-15 && (values[3][0] - 0.00025).abs() < 1e-15);
}

#[test]
fn merged_update_keeps_its_promises() {
    updates::merged_update(&mut Promises);
    updates::merged_update_promises(&cpu());
    updates::merged_update_promises(&Reference);
}

#[test]
fn on_ties_keeps_the_largest() {
    updates::on_ties_keeps_the_largest(&cpu());
    updates::on_ties_keeps_the_largest(&Reference);
}

#[test]
fn stochastic_rounding_keeps_small_steps() {
    for (_, cpu) in &families()[0] {
        updates::stochastic_rounding_keeps_small_steps(cpu);
    }
}

/// Against the masks of step 0, which no update draws; and unbiased.
#[test]
fn task_vectors_are_prepared_as_the_authors_do() {
    let random = Philox::named(7, "a weight");
    let dare = |variant, clip| Rule::OnDare { reserve_rate: 0.25, merge_weight: 0.1, variant, rescale: false, clip };
    let tau: Vec<f32> = normals("tau", 20_001).iter().map(|x| *x as f32).collect();
    let prepared = |rule: Rule| {
        let mut prepared = tau.clone();
        prepare(&rule, &random, &mut prepared);
        prepared
    };
    let keeps = |i: usize| random.words((Purpose::TauRef as u64) << 32 | (i / 4) as u64)[i % 4] < 1 << 30;
    let found = prepared(dare(DareVariant::Released, 6.0));
    assert!((0..tau.len()).all(|i| found[i] == if keeps(i) { (4.0 * tau[i]).clamp(-6.0, 6.0) } else { 0.0 }));
    let sum = |x: &[f32]| x.iter().map(|x| f64::from(x.abs())).sum::<f64>();
    let unbounded = prepared(dare(DareVariant::Released, 1e9));
    assert!((sum(&unbounded) / sum(&tau) - 1.0).abs() < 0.03, "{} of {}", sum(&unbounded), sum(&tau));
    assert_eq!(prepared(dare(DareVariant::Paper, 0.1)), tau);
    assert_eq!(prepared(Rule::Adam), tau);

    let consensus = Consensus::BeforeWeight;
    let trimmed = prepared(Rule::OnTies { reserve_rate: 0.1, merge_weight: 0.1, consensus, rescale: true });
    assert_eq!(trimmed.iter().filter(|x| **x != 0.0).count(), 2000);
    assert!((sum(&trimmed) / sum(&tau) - 1.0).abs() < 1e-5);
    let least = tau.iter().zip(&trimmed).filter(|(_, kept)| **kept != 0.0).map(|(x, _)| x.abs()).fold(9.0, f32::min);
    assert!(tau.iter().zip(&trimmed).all(|(x, kept)| x.abs() >= least || *kept == 0.0));
    // One of ten elements is none of five: nothing is trimmed.
    let few = Rule::OnTies { reserve_rate: 0.1, merge_weight: 0.1, consensus, rescale: true };
    let mut five = [1.0f64, -2.0, 3.0, 0.5, 0.0];
    prepare(&few, &random, &mut five);
    assert_eq!(five, [1.0, -2.0, 3.0, 0.5, 0.0]);
}

// ---- logprob_head ---------------------------------------------------------------------------------------------

#[test]
fn logprob_head_is_close_to_the_oracle() {
    assert!(head::SHAPES.iter().any(|[rows, ..]| *rows > cuvee::ops::logprob_head::TILE_ROWS));
    head::forward(&mut Close);
    head::backward(&mut Close);
}

#[test]
fn logprob_head_backward_is_the_derivative() {
    let backward = HeadBackward::full([3, 4, 7]);
    let (specs, mut back) = (backward.head.specs(), backward.specs());
    let values = run(&Reference, &backward.head, &specs);
    put(&mut back, "lse", output_of(&specs, &values, "lse"));
    put(&mut back, "entropy", output_of(&specs, &values, "entropy"));
    for (result, upstream, other) in [("logp", "dlogp", "dentropy"), ("entropy", "dentropy", "dlogp")] {
        let mut back = back.clone();
        zero(&mut back, &["dh", "dweight", other]);
        let gradients = run(&Reference, &backward, &back);
        for (input, gradient) in [("h", "dh"), ("weight", "dweight")] {
            let gradient = output_of(&back, &gradients, gradient);
            assert_backward(&backward.head, &specs, input, result, &contents(&back, upstream), gradient);
        }
    }
}

/// What the backward needs for the entropy's gradient is asked for.
#[test]
fn logprob_head_backward_refuses_a_gradient_without_its_entropy() {
    let case = HeadBackward::full([3, 4, 7]);
    let mut t = slots(&cpu(), &case.specs(), 0);
    let [h, weight, target, scratch, lse, dlogp, dentropy, _, dh, _] = &mut t[..] else { panic!() };
    let refused = cpu().logprob_head_backward(logprob_head::Backward {
        h: h.view(),
        weight: weight.view(),
        target: target.view(),
        scale: 1.0,
        lse: lse.view(),
        dlogp: dlogp.view(),
        dentropy: Some(dentropy.view()),
        entropy: None,
        scratch: scratch.view_mut(),
        dh: dh.view_mut(),
        dweight: None,
    });
    assert!(refused.unwrap_err().to_string().contains("dentropy without entropy"));
}

#[test]
fn logprob_head_keeps_its_promises() {
    head::forward(&mut Promises);
    head::backward(&mut Promises);
}

#[test]
fn logprob_head_takes_extreme_logits() {
    head::logprob_head_takes_extreme_logits(&cpu());
}

#[test]
fn logprob_head_of_equal_logits_is_exactly_uniform() {
    for vocab in [1, 2, 507, 512, 8003, 50_257] {
        let case = Head { scale: 0.0, ..Head::new([3, 31, vocab]) };
        let specs = case.specs();
        let found = run(&cpu(), &case, &specs);
        let uniform = f64::from((vocab as f32).ln());
        assert_eq!((&found[4], &found[6]), (&vec![-uniform; 3], &vec![uniform; 3]), "vocab {vocab}");
        assert_eq!(found[7], vec![-uniform; 3], "vocab {vocab}");
    }
}

#[test]
fn logprob_head_backward_sums_to_zero_over_the_vocabulary() {
    head::logprob_head_backward_sums_to_zero_over_the_vocabulary(&cpu());
}

// ---- token_kl -------------------------------------------------------------------------------------------------

#[test]
fn token_kl_is_close_to_the_oracle() {
    token_kl::forward(&mut Close);
    token_kl::backward(&mut Close);
}

#[test]
fn token_kl_backward_is_the_derivative() {
    let forward = TokenKl { rows: 3, vocab: 7, hidden: &[4, 5, 3, 4], scale: 1.0 };
    let backward = TokenKlBackward::full(forward);
    let (specs, mut back) = (forward.specs(), backward.specs());
    let values = run(&Reference, &forward, &specs);
    for name in ["kl", "lse"] {
        put(&mut back, name, output_of(&specs, &values, name));
    }
    zero(&mut back, &["dh", "dweight"]);
    let gradients = run(&Reference, &backward, &back);
    for (input, gradient) in [("h", "dh"), ("weight", "dweight")] {
        let gradient = output_of(&back, &gradients, gradient);
        assert_backward(&forward, &specs, input, "kl", &contents(&back, "dkl"), gradient);
    }
}

#[test]
fn token_kl_keeps_its_promises() {
    token_kl::forward(&mut Promises);
    token_kl::backward(&mut Promises);
}

#[test]
fn token_kl_to_the_same_distribution_is_zero() {
    token_kl::token_kl_to_the_same_distribution_is_zero(&cpu());
    token_kl::token_kl_to_the_same_distribution_is_zero(&Reference);
}

#[test]
fn token_kl_takes_probabilities_of_zero() {
    token_kl::token_kl_takes_probabilities_of_zero(&cpu());
    token_kl::token_kl_takes_probabilities_of_zero(&Reference);
}

#[test]
fn token_kl_backward_sums_to_zero_over_the_vocabulary() {
    token_kl::token_kl_backward_sums_to_zero_over_the_vocabulary(&cpu());
}

/// Each reference is one product with its head, whatever the direction; memory does not grow with their number.
#[test]
fn token_kl_costs_one_product_for_each_reference() {
    let case = |hidden| TokenKl { rows: 47, vocab: 507, hidden, scale: 1.0 };
    let cases = [case(&[16, 16][..]), case(&[16, 16, 16]), case(&[16, 16, 16, 24])];
    let product = 2 * 47 * 507 * 16;
    let [one, two, three] =
        cases.map(|c| [checks::flops(DType::F32, &c), checks::flops(DType::F32, &TokenKlBackward::full(c))]);
    assert_eq!((one, two), ([2 * product, 4 * product], [3 * product, 5 * product]));
    assert_eq!(three, [two[0] + product * 3 / 2, two[1] + product * 3 / 2]);
}

#[test]
fn token_kl_without_references_is_refused() {
    let case = TokenKl { rows: 3, vocab: 7, hidden: &[4], scale: 1.0 };
    let why = refusal(&cpu(), &case, &case.specs()).unwrap().to_string();
    assert!(why.contains("there are no references"), "{why}");
}

// ---- attention ------------------------------------------------------------------------------------------------

#[test]
fn attention_is_close_to_the_oracle() {
    attention::forward(&mut Close);
    attention::backward(&mut Close);
}

#[test]
fn attention_backward_is_the_derivative() {
    let segments = forest(&[(3, None), (2, Some(0)), (2, Some(1)), (1, Some(0)), (2, None)]);
    for dims in [dims(4, 2, 3, None), dims(2, 1, 2, Some(2)), dims(1, 1, 3, Some(1))] {
        let backward = AttentionBackward(Attention { dims, segments: segments.clone() });
        let (specs, mut back) = (backward.0.specs(), backward.specs());
        let values = run(&Reference, &backward.0, &specs);
        put(&mut back, "o", &values[4]);
        put(&mut back, "lse", &values[5]);
        let gradients = run(&Reference, &backward, &back);
        for (input, gradient) in [("q", "dq"), ("k", "dk"), ("v", "dv")] {
            let gradient = output_of(&back, &gradients, gradient);
            if dims.window == Some(1) && input != "v" {
                // A softmax over one key is 1 whatever its score.
                assert!(gradient.iter().all(|g| g.abs() < 1e-12));
                continue;
            }
            assert_backward(&backward.0, &specs, input, "o", &contents(&back, "d_o"), gradient);
        }
    }
}

#[test]
fn attention_keeps_its_promises() {
    attention::forward(&mut Promises);
    attention::backward(&mut Promises);
}

#[test]
fn attention_refuses_heads_that_share_unevenly() {
    attention::attention_refuses_heads_that_share_unevenly(&cpu());
}

#[test]
fn attention_over_a_shared_prefix_has_the_bits_of_the_unrolled_sequence() {
    attention::attention_over_a_shared_prefix_has_the_bits_of_the_unrolled_sequence(&cpu());
}

#[test]
fn attention_of_a_decoding_step_has_the_bits_of_the_whole_sequence() {
    attention::attention_of_a_decoding_step_has_the_bits_of_the_whole_sequence(&cpu());
}

#[test]
fn attention_takes_extreme_scores() {
    attention::attention_takes_extreme_scores(&cpu());
}

#[test]
fn attention_keeps_what_is_broken_to_those_who_see_it() {
    attention::attention_keeps_what_is_broken_to_those_who_see_it(&cpu());
}

/// What a table says twice must agree: a position is the length of the path before it.
#[test]
fn attention_refuses_positions_that_do_not_follow_their_parents() {
    let good = forest(&[(5, None), (3, Some(0)), (2, None)]);
    for (index, position) in [(0, 1), (1, 4), (2, 8)] {
        let mut segments = good.clone();
        segments[index].position = position;
        let case = Attention { dims: dims(2, 1, 4, None), segments };
        let error = std::panic::catch_unwind(|| run(&cpu(), &case, &case.specs())).unwrap_err();
        let message = error.downcast_ref::<String>().unwrap();
        assert!(message.contains(&format!("segment {index} does not fit those before it")), "{message}");
    }
}

// ---- all ------------------------------------------------------------------------------------------------------

#[test]
fn no_rows_are_no_work() {
    no_work(&cpu());
}

/// The price list: a multiply-add is two FLOPs, a backward has two products where its forward has one.
#[test]
fn dry_runs_count_products() {
    fn flops<C: Case>(case: &C) -> u64 {
        checks::flops(DType::F32, case)
    }
    let product = 2 * 3 * 5 * 7;
    assert_eq!(flops(&Linear::full([3, 5, 7])), product);
    assert_eq!(flops(&LinearBackward::full([3, 5, 7])), 2 * product);
    assert_eq!(flops(&LinearBackward { wanted: [false, true, true], ..LinearBackward::full([3, 5, 7]) }), product);
    assert_eq!(flops(&Head::new([3, 5, 7])), product);
    assert_eq!(flops(&HeadBackward::full([3, 5, 7])), 3 * product);
    assert_eq!(flops(&HeadBackward { wanted: false, ..HeadBackward::full([3, 5, 7]) }), 2 * product);
    assert_eq!(flops(&RmsNorm([3, 5])), 0);

    // A root of 5 sees 15 pairs; a child of 3 behind it 6 + 7 + 8; with a window of 4: 14 and 12.
    let pairs = |window, pairs: u64| {
        let case = Attention { dims: dims(2, 1, 4, window), segments: forest(&[(5, None), (3, Some(0))]) };
        assert_eq!(flops(&case), 2 * 2 * pairs * 2 * 4);
    };
    pairs(None, 15 + 21);
    pairs(Some(4), 14 + 12);
}

#[test]
fn a_device_says_how_many_threads_it_has() {
    assert_eq!(Cpu::new(3).unwrap().threads(), 3);
}
