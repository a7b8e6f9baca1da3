//! What a task vector goes through once, on the host, before OnDARE and OnTIES merge with it.

use super::{DareVariant, Keep, LEAST_SUM, Purpose, Rule, kept};
use crate::device::Philox;

/// f32, or f64 for tests.
pub trait Float: Copy {
    fn wide(self) -> f64;
    fn of(x: f64) -> Self;
}

impl Float for f32 {
    fn wide(self) -> f64 {
        self.into()
    }

    fn of(x: f64) -> Self {
        x as f32
    }
}

impl Float for f64 {
    fn wide(self) -> f64 {
        self
    }

    fn of(x: f64) -> Self {
        x
    }
}

/// Makes the task vector of one weight, `tau` = reference - base, into the `tau_ref` that `rule` merges with, as the authors'
/// code does: OnDARE keeps random elements, divides them by the reserve rate and clamps them (the paper's variant draws anew in
/// each step and leaves `tau` as it is); OnTIES keeps the largest. `random` is that of [`super::Step`].
pub fn prepare<F: Float>(rule: &Rule, random: &Philox, tau: &mut [F]) {
    let keep = Keep::new(rule.reserve_rate(), true);
    prepare_with(rule, tau, |i| Purpose::TauRef.keeps(random, 0, keep, i));
}

/// [`prepare`] with a mask that was drawn elsewhere.
pub fn prepare_with<F: Float>(rule: &Rule, tau: &mut [F], keeps: impl Fn(usize) -> bool) {
    match *rule {
        Rule::OnDare { reserve_rate, variant: DareVariant::Released, clip, .. } => {
            for (i, x) in tau.iter_mut().enumerate() {
                *x = F::of(if keeps(i) { (x.wide() / reserve_rate).clamp(-clip, clip) } else { 0.0 });
            }
        }
        Rule::OnTies { reserve_rate, rescale, .. } => trim(reserve_rate, rescale, tau),
        Rule::OnDare { .. } | Rule::Adam | Rule::Ema { .. } => {}
    }
}

/// Keeps the largest of the whole tensor; with `rescale`, what is left gets the sum of magnitudes that there was.
pub(super) fn trim<F: Float>(reserve_rate: f64, rescale: bool, x: &mut [F]) {
    let Some(count) = kept(reserve_rate, x.len()) else { return };
    let mut magnitudes: Vec<f64> = x.iter().map(|x| x.wide().abs()).collect();
    let before: f64 = magnitudes.iter().sum();
    let (_, threshold, _) = magnitudes.select_nth_unstable_by(count - 1, |a, b| b.total_cmp(a));
    let threshold = *threshold;
    // A NaN is the largest of all, so that it is seen.
    let is_trimmed = |x: F| x.wide().abs().total_cmp(&threshold).is_lt();
    let after: f64 = x.iter().filter(|x| !is_trimmed(**x)).map(|x| x.wide().abs()).sum();
    let factor = if rescale && before >= LEAST_SUM { before / after } else { 1.0 };
    x.iter_mut().for_each(|x| *x = F::of(if is_trimmed(*x) { 0.0 } else { x.wide() * factor }));
}
