use super::prepare::trim;
use super::{Args, Folded, LEAST_SUM, Merge, MergedUpdate, Purpose, Step};
use crate::device::{Reference, ViewMut};
use crate::error::Result;

impl MergedUpdate for Reference {
    fn merged_update(&self, a: Args<Self>) -> Result<()> {
        let (step, folded) = (a.step, a.step.folded());
        update_with(a, |purpose, i| {
            let keep = match purpose {
                Purpose::Gradient => folded.gradient,
                Purpose::TauRef => folded.tau_ref,
                Purpose::Update | Purpose::Rounding => folded.update,
            };
            purpose.keeps(&step.random, step.step, keep, i)
        })
    }
}

/// A step whose masks were drawn elsewhere: `keeps(what for, element)`. f64 rounds nothing: a weight is what its master is,
/// and no addition is lost until it is below 1e-16 of the weight.
pub fn update_with(a: Args<Reference>, keeps: impl Fn(Purpose, usize) -> bool) -> Result<()> {
    a.check()?;
    let (step, folded) = (a.step, a.step.folded());
    let (m, v) = (a.first_moment.into_f64s(), a.second_moment.into_f64s());
    let mut update = direction(&step, &folded, a.grad.f64s(), m, v, |i| keeps(Purpose::Gradient, i));
    let mut since_merge = a.since_merge.map(ViewMut::into_f64s);
    let mut taken_back = vec![0.0; update.len()];
    if let Some(since_merge) = &mut since_merge {
        for ((u, since), taken_back) in update.iter_mut().zip(since_merge.iter_mut()).zip(&mut taken_back) {
            if step.merges {
                (*taken_back, *since) = (*since, 0.0);
                *u += *taken_back;
            } else {
                *since += *u;
            }
        }
    }
    let zeros = vec![0.0; update.len()];
    let tau_ref = a.tau_ref.map_or(&zeros[..], |tau_ref| tau_ref.f64s());
    merge(&step, &folded, &mut update, tau_ref, keeps);
    update.iter_mut().zip(&taken_back).for_each(|(u, taken_back)| *u -= taken_back);
    let weight = a.weight.into_f64s();
    let (full, mut copy) = match a.master {
        Some(master) => (master.into_f64s(), Some(weight)),
        None => (weight, None),
    };
    let mut average = a.average.map(ViewMut::into_f64s);
    let mut lost = [0, 0];
    for i in 0..full.len() {
        let old = full[i];
        let decayed = if folded.decay_last { old + update[i] } else { old };
        full[i] += update[i] - folded.decay * decayed;
        if let Some(average) = &mut average {
            average[i] = (1.0 - folded.ema) * average[i] + folded.ema * full[i];
            full[i] = (1.0 - folded.ema) * full[i] + folded.ema * average[i];
        }
        if update[i] != 0.0 {
            lost[0] += 1;
            lost[1] += u32::from(full[i] == old);
        }
        if let Some(copy) = &mut copy {
            copy[i] = full[i] + step.share * tau_ref[i];
        }
    }
    if let Some(counts) = a.lost {
        counts.into_u32s().iter_mut().zip(lost).for_each(|(count, lost)| *count = count.wrapping_add(lost));
    }
    Ok(())
}

/// Adam's update, and the moments that it is made of.
fn direction(
    step: &Step,
    folded: &Folded,
    grad: &[f64],
    m: &mut [f64],
    v: &mut [f64],
    keeps: impl Fn(usize) -> bool,
) -> Vec<f64> {
    let adam = step.adam;
    let one = |i: usize| {
        let g = if keeps(i) { grad[i] * step.clip * folded.gradient.scale } else { 0.0 };
        m[i] = adam.beta1 * m[i] + (1.0 - adam.beta1) * g;
        v[i] = adam.beta2 * v[i] + (1.0 - adam.beta2) * g * g;
        -folded.rate * m[i] / (v[i].sqrt() * folded.root + adam.eps)
    };
    (0..grad.len()).map(one).collect()
}

/// What is added of the update and of `tau_ref`.
fn merge(step: &Step, folded: &Folded, update: &mut [f64], tau_ref: &[f64], keeps: impl Fn(Purpose, usize) -> bool) {
    let [of_update, of_tau_ref] = folded.shares;
    let sum = |x: &[f64]| x.iter().map(|x| x.abs()).sum::<f64>();
    match folded.merge {
        Merge::Plain => {}
        Merge::Drop => {
            let before = sum(update);
            for (i, u) in update.iter_mut().enumerate() {
                *u = if keeps(Purpose::Update, i) { *u * folded.update.scale } else { 0.0 };
            }
            if folded.rescale && before >= LEAST_SUM {
                let factor = before / (sum(update) + step.adam.eps);
                update.iter_mut().for_each(|u| *u = (*u * factor).clamp(-folded.bound, folded.bound));
            }
            for (i, u) in update.iter_mut().enumerate() {
                let tau_ref = if of_tau_ref != 0.0 && keeps(Purpose::TauRef, i) { tau_ref[i] } else { 0.0 };
                *u = of_update * *u + of_tau_ref * tau_ref;
            }
        }
        Merge::Before => {
            trim(step.rule.reserve_rate(), folded.rescale, update);
            for (u, tau_ref) in update.iter_mut().zip(tau_ref) {
                let elected = if tau_ref + *u >= 0.0 { 1.0 } else { -1.0 };
                let agreeing = |x: f64| if x * elected < 0.0 { 0.0 } else { x };
                *u = of_update * agreeing(*u) + of_tau_ref * agreeing(*tau_ref);
            }
        }
        Merge::After => {
            trim(step.rule.reserve_rate(), folded.rescale, update);
            for (u, tau_ref) in update.iter_mut().zip(tau_ref) {
                let (x, y) = (of_update * *u, of_tau_ref * tau_ref);
                let oppose = x < 0.0 && y > 0.0 || x > 0.0 && y < 0.0;
                *u = match oppose {
                    true if x.abs() > y.abs() => x,
                    true if x.abs() < y.abs() => y,
                    true => 0.0,
                    false => x + y,
                };
            }
        }
    }
}
