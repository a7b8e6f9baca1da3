//! What an op promises, checked on any device.
//!
//! **Closeness.** With both errors taken against the f64 oracle, the error of an op must not exceed twice the
//! error of a straightforward f32 evaluation of the same formula (DeepGEMM, Flash-Attention), largest error
//! against largest error over a whole output. Where the output is kept in bf16, the straightforward evaluation is rounded to
//! that. A floor, a fraction of the output's largest value, covers outputs with few elements, where a straightforward
//! evaluation can be exact by luck; see [`floor`].

use cuvee::Error;
use cuvee::device::{DType, Device, Dry, Reference};
use cuvee::ops::Backend;

use super::case::{Case, Manner, ONCE, Role, Spec, refusal, rounded, run, run_as, same, specs_on};

/// 2^-`power`.
fn two_to_minus(power: i32) -> f64 {
    0.5_f64.powi(power)
}

/// What an output may always be off by, in parts of its largest value.
///
/// | kept in | f32 | bf16 |
/// |---|---|---|
/// | f32 on the CPU | four roundings of f32 | |
/// | f32 on a GPU, whose exponentials are off by some roundings | 2^-19 | |
/// | from bf16, through tensor cores, which round sums of products towards zero | 2^-15 | half a rounding of bf16 |
/// | the same, where probabilities are rounded to bf16 on the way | 2^-8 | 2^-7 |
pub fn floor<D: Device>(device: &D, spec: &Spec) -> f64 {
    two_to_minus(match (device.storage(), spec.dtype, spec.narrowed) {
        (_, DType::Bf16, false) => 9,
        (_, DType::Bf16, true) => 7,
        (DType::Bf16, _, false) => 15,
        (DType::Bf16, _, true) => 8,
        _ if D::NAME == "cuda" => 19,
        _ => 21,
    })
}

pub fn largest(values: impl Iterator<Item = f64>) -> f64 {
    values.fold(0.0, |m, x| if x.is_nan() { f64::INFINITY } else { m.max(x) })
}

pub fn largest_difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    largest(a.iter().zip(b).map(|(a, b)| if a == b { 0.0 } else { (a - b).abs() }))
}

/// The closeness rule (see the head of this file).
pub fn assert_close(what: &str, found: &[f64], naive: &[f64], oracle: &[f64], floor: f64) {
    let (error, allowed) = (largest_difference(found, oracle), largest_difference(naive, oracle));
    let size = largest(oracle.iter().map(|x| x.abs()));
    assert!(
        size.is_finite() && allowed <= (4.0 * floor).max(1e-3) * size,
        "{what}: the comparison itself is off by {allowed:e} of {size:e}"
    );
    assert!(
        error <= 2.0 * allowed + floor * size,
        "{what}: error {error:e}, straightforward evaluation {allowed:e}, size {size:e}"
    );
}

/// The device against the oracle, on every output.
pub fn compare<D: Backend, C: Case>(device: &D, case: &C) {
    let specs = specs_on(device, case);
    let (found, oracle) = (run(device, case, &specs), run(&Reference, case, &specs));
    let first = |s: &Spec| match s.role {
        Role::Set => vec![0.0; s.values.len()],
        _ => s.values.iter().map(|x| *x as f32).collect::<Vec<f32>>(),
    };
    let mut naive: Vec<Vec<f32>> = specs.iter().map(first).collect();
    case.naive(&specs, &mut naive);
    for (i, spec) in specs.iter().enumerate().filter(|(_, s)| s.is_output()) {
        let what = format!("{} {:?} {}", case.op(), [spec.rows, spec.cols], spec.name);
        let naive: Vec<f64> = naive[i].iter().map(|x| rounded(f64::from(*x), spec.dtype)).collect();
        assert_close(&what, &found[i], &naive, &oracle[i], floor(device, spec));
    }
}

pub fn assert_same_bits(what: &str, specs: &[Spec], found: &[Vec<f64>], expected: &[Vec<f64>]) {
    for ((spec, found), expected) in specs.iter().zip(found).zip(expected).filter(|((s, _), _)| s.is_output()) {
        // Every f32 is an f64 of its own; only the sign of zero needs its bits.
        let first = found.iter().zip(expected).position(|(a, b)| a.to_bits() != b.to_bits());
        assert!(first.is_none() && found.len() == expected.len(), "{what}: {} differs at {first:?}", spec.name);
    }
}

/// Another run must not change a bit.
pub fn same_again<D: Backend, C: Case>(device: &D, case: &C) {
    let specs = specs_on(device, case);
    let expected = run(device, case, &specs);
    assert_same_bits(&format!("{}, run again", case.op()), &specs, &run(device, case, &specs), &expected);
}

/// Nor must where the tensors lie.
pub fn same_elsewhere<D: Backend, C: Case>(device: &D, case: &C) {
    let specs = specs_on(device, case);
    let expected = run(device, case, &specs);
    let elsewhere = run_as(device, case, &specs, Manner { lead: 1, ..ONCE });
    assert_same_bits(&format!("{}, one row further", case.op()), &specs, &elsewhere, &expected);
}

/// Some rows alone must give the bits that they have among all.
pub fn same_for_some_rows<D: Backend, C: Case>(device: &D, case: &C) {
    let specs = specs_on(device, case);
    let rows = specs.iter().find(|s| s.per_row).expect("the case has per-row tensors").rows;
    let all = run(device, case, &specs);
    for (first, count) in [(0, 1), (rows - 1, 1), (rows - 3, 3), (1, rows - 1)] {
        let some: Vec<Spec> = specs.iter().map(|s| s.cut(first, count)).collect();
        let found = run(device, case, &some);
        let of_rows = |s: &Spec| (s.per_row || s.per_col) && s.is_output();
        for i in (0..specs.len()).filter(|i| of_rows(&specs[*i])) {
            let expected = specs[i].part(&all[i], first, count);
            let what = format!("{}: rows {first}..{} of {rows} alone", case.op(), first + count);
            assert_same_bits(&what, &some[i..=i], &found[i..=i], &[expected]);
        }
    }
}

/// From zero, two runs leave twice what one leaves in every `+=` output, and the same in every `=` output.
pub fn twice_is_double<D: Backend, C: Case>(device: &D, case: &C) {
    let zeroed = |s: Spec| if s.role == Role::Add { s.map(|_| 0.0) } else { s };
    let specs: Vec<Spec> = specs_on(device, case).into_iter().map(zeroed).collect();
    let once = run(device, case, &specs);
    let twice = run_as(device, case, &specs, Manner { times: 2, ..ONCE });
    for (i, spec) in specs.iter().enumerate().filter(|(_, s)| s.is_output()) {
        let factor = if spec.role == Role::Add { 2.0 } else { 1.0 };
        let expected: Vec<f64> = once[i].iter().map(|x| x * factor).collect();
        let size = largest(expected.iter().map(|x| x.abs()));
        let error = largest_difference(&twice[i], &expected);
        // Sums that continue from the first run round otherwise; a lost or repeated run is off by `size` / 2.
        let rounding = if spec.dtype == DType::Bf16 { two_to_minus(8) } else { 1e-5 };
        assert!(size > 0.0 && error <= rounding * size, "{}: {} is off by {error:e} of {size:e}", case.op(), spec.name);
    }
}

/// Gradients that are not wanted stay as they are, and the others do not change. `wanted[i]` belongs to the i-th
/// optional output, `optional[i]`.
pub fn unwanted_stay<D: Backend, C: Case>(device: &D, all: &C, some: &C, optional: &[&str], wanted: &[bool]) {
    let specs = specs_on(device, all);
    let (full, part) = (run(device, all, &specs), run(device, some, &specs));
    let oracle = run(&Reference, some, &specs);
    for (i, spec) in specs.iter().enumerate().filter(|(_, s)| s.is_output()) {
        let kept = optional.iter().position(|o| *o == spec.name).is_none_or(|at| wanted[at]);
        let expected = if kept { &full[i] } else { &spec.values };
        let what = format!("{}, wanted {wanted:?}", all.op());
        assert_same_bits(&what, &specs[i..=i], &part[i..=i], std::slice::from_ref(expected));
        let stayed = oracle[i].iter().zip(&spec.values).all(|(x, y)| same(*x, *y));
        assert!(kept || stayed, "{what}: the reference wrote {}", spec.name);
    }
}

/// A NaN anywhere in a float input must come out exactly where the oracle has one.
pub fn nan_surfaces<D: Backend, C: Case>(device: &D, case: &C) {
    let specs = specs_on(device, case);
    let readable = |s: &Spec| matches!(s.role, Role::Input | Role::InPlace);
    for (i, len) in specs.iter().enumerate().filter(|(_, s)| readable(s)).map(|(i, s)| (i, s.values.len())) {
        for at in [0, len / 2, len - 1] {
            let mut poisoned = specs.clone();
            poisoned[i].values[at] = f64::NAN;
            let (found, oracle) = (run(device, case, &poisoned), run(&Reference, case, &poisoned));
            let mut seen = false;
            for (o, spec) in specs.iter().enumerate().filter(|(_, s)| s.is_output()) {
                let first = found[o].iter().zip(&oracle[o]).position(|(a, b)| a.is_nan() != b.is_nan());
                let what = format!("{}: NaN in {}[{at}]", case.op(), specs[i].name);
                assert!(first.is_none(), "{what}: {} differs at {first:?}", spec.name);
                seen |= found[o].iter().any(|x| x.is_nan());
            }
            assert!(seen, "{}: a NaN in {}[{at}] vanishes", case.op(), specs[i].name);
        }
    }
}

/// One row or one column more in any tensor is an error that names the op and a shape, on every device.
pub fn wrong_shapes_are_refused<D: Backend, C: Case>(device: &D, case: &C) {
    let specs = specs_on(device, case);
    for taken in [refusal(device, case, &specs), refusal(&Dry::default(), case, &specs)] {
        assert!(taken.is_none(), "{}: refuses the right shapes: {taken:?}", case.op());
    }
    for (i, spec) in specs.iter().enumerate() {
        for [rows, cols] in [[spec.rows + 1, spec.cols], [spec.rows, spec.cols + 1]] {
            if case.may_grow().contains(&spec.name) && cols == spec.cols {
                continue;
            }
            let mut wrong = specs.clone();
            wrong[i] = spec.resized(rows, cols);
            let what = format!("{}: {} [{rows}, {cols}] for {:?}", case.op(), spec.name, [spec.rows, spec.cols]);
            let errors = [
                refusal(device, case, &wrong),
                refusal(&Reference, case, &wrong),
                refusal(&Dry::default(), case, &wrong),
            ];
            for error in errors {
                let Some(error) = error else { panic!("{what} was taken") };
                let message = error.to_string();
                assert!(matches!(error, Error::Op { .. }) && message.starts_with(case.op()), "{what}: {message}");
                assert!(message.contains('['), "{what}: {message}");
            }
        }
    }
}

/// FLOPs of a case, by the price list.
pub fn flops<C: Case>(storage: DType, case: &C) -> u64 {
    let dry = Dry::new(storage);
    let refused = refusal(&dry, case, &specs_on(&dry, case));
    assert!(refused.is_none(), "{}: refuses the right shapes, dry: {refused:?}", case.op());
    dry.flops()
}
