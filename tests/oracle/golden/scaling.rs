//! Gold reward over distance: fits, best-of-n, and the toys that show over-optimisation.

use cuvee::lab::toy::{Loss, tree};
use cuvee::scaling::{
    Curve, Fit, Form, LengthFit, Point, best_of_n, best_of_n_kl, best_of_n_weights, correlation, on_length,
};
use libtest_mimic::Failed;
use serde_json::Value;

use super::{Tally, cases, close, close_to, numbers, rows, text};

/// Fits solve linear systems whose condition the makers of the files did not have in mind: features up to d^4.
const FITTED: f64 = 1e-10;

/// The names that the files use.
fn form(name: &str) -> Option<Form> {
    let of = |curve, intercept| Some(Form { curve, intercept });
    match name {
        "gao_rl" | "d(a-b log d)" => of(Curve::Log, false),
        "gao_rl_intercept" | "log form + intercept" => of(Curve::Log, true),
        "gao_bon" | "d(a-b d)" => of(Curve::Linear, false),
        "quadratic_in_KL_no_intercept" | "quadratic in KL" => of(Curve::Quadratic, false),
        "quadratic_in_KL_intercept" | "quadratic in KL + intercept" => of(Curve::Quadratic, true),
        _ => None,
    }
}

fn points(d: &[f64], gold: &[f64]) -> Vec<Point> {
    d.iter().zip(gold).map(|(d, gold)| Point { d: *d, gold: *gold, run: 0 }).collect()
}

/// Every fit of an object by name.
fn check_fits(fits: &Value, points: &[Point]) -> Result<(), Failed> {
    for (name, expected) in fits.as_object().ok_or("fits are no object")? {
        let Some(form) = form(name) else { continue };
        let fit = Fit::of(form, points).ok_or_else(|| format!("{name}: no fit"))?;
        close_to(FITTED, &format!("{name}: coef"), &fit.coefficients, &numbers(&expected["coef"])?)?;
        close_to(FITTED, &format!("{name}: rmse"), &[fit.rmse], &numbers(&expected["rmse"])?)?;
        if let Some(r2) = expected["r2"].as_f64() {
            close_to(FITTED, &format!("{name}: r2"), &[fit.r2], &[r2])?;
        }
    }
    Ok(())
}

pub fn scaling_law(file: &Value, tally: &mut Tally) -> Result<(), Failed> {
    for case in cases(file)? {
        let points = points(&numbers(&case["d"])?, &numbers(&case["R"])?);
        check_fits(&case["fits"], &points)?;
        let curve = if text(case, "name")?.ends_with("bon") { Curve::Linear } else { Curve::Log };
        let fit = Fit::of(Form { curve, intercept: false }, &points).ok_or("no fit")?;
        let peak = fit.peak.ok_or("no peak")?;
        close_to(
            FITTED,
            "peak",
            &[peak.d, peak.gold],
            &[numbers(&case["peak_d"])?, numbers(&case["peak_R"])?].concat(),
        )?;
        if let Some(expected) = case.get("extrapolation") {
            let far = fit.extrapolation.ok_or("no extrapolation")?;
            close_to(FITTED, "extrapolation", &far.coefficients, &numbers(&expected["coef"])?)?;
            close_to(FITTED, "held-out rmse", &[far.rmse], &numbers(&expected["rmse_held_out"])?)?;
        }
        tally.checked += 1;
    }
    for one in file["bon_kl"].as_array().ok_or("no bon_kl")? {
        let kl = best_of_n_kl(one["n"].as_u64().ok_or("no n")? as usize);
        close("bon_kl", &[kl, kl.max(0.0).sqrt()], &[numbers(&one["KL"])?, numbers(&one["d"])?].concat())?;
        tally.checked += 1;
    }
    let bon = &file["bon_estimator"];
    let (proxy, gold) = (numbers(&bon["proxy"])?, numbers(&bon["gold"])?);
    for one in bon["estimates"].as_array().ok_or("no estimates")? {
        let n = one["n"].as_u64().ok_or("no n")? as usize;
        close("weights", &best_of_n_weights(proxy.len(), n), &numbers(&one["weights_sorted_by_proxy"])?)?;
        let found = [best_of_n(&proxy, &gold, n), best_of_n(&proxy, &proxy, n)];
        close("best of n", &found, &[numbers(&one["gold"])?, numbers(&one["proxy"])?].concat())?;
        tally.checked += 1;
    }
    kl_of_samples(&file["kl_estimators"])?;
    let length = &file["length_regression"];
    let found = on_length(&numbers(&length["length"])?, &numbers(&length["logratio"])?).ok_or("no line")?;
    let LengthFit { gamma, r2_uncentered, r2, with_intercept, r2_with_intercept } = found;
    for (key, found) in [
        ("gamma_no_intercept", &[gamma][..]),
        ("r2_no_intercept_uncentered", &[r2_uncentered]),
        ("r2_no_intercept_centered", &[r2]),
        ("with_intercept", &with_intercept),
        ("r2_with_intercept", &[r2_with_intercept]),
    ] {
        close(key, found, &numbers(&length[key])?)?;
    }
    tally.checked += 2;
    Ok(())
}

/// k1, k2 of whole sequences and k3 of tokens, as evaluations and penalties estimate them.
fn kl_of_samples(file: &Value) -> Result<(), Failed> {
    use cuvee::objectives::kl::{k1, k2, k3};
    let (policy, reference, mask) = (rows(&file["logps_policy"])?, rows(&file["logps_ref"])?, rows(&file["mask"])?);
    let masked = |table: &[Vec<f64>]| -> Vec<Vec<f64>> {
        table
            .iter()
            .zip(&mask)
            .map(|(row, mask)| row.iter().zip(mask).filter(|m| *m.1 > 0.0).map(|m| *m.0).collect())
            .collect()
    };
    let (policy, reference) = (masked(&policy), masked(&reference));
    let n = policy.len() as f64;
    let sums = |table: &[Vec<f64>]| table.iter().map(|row| row.iter().sum::<f64>()).collect::<Vec<_>>();
    let sequences = |estimate: fn(f64, f64) -> (f64, f64)| {
        sums(&policy).iter().zip(sums(&reference)).map(|(p, q)| estimate(*p, q).0).sum::<f64>() / n
    };
    let tokens = policy.iter().flatten().zip(reference.iter().flatten()).map(|(p, q)| k3(*p, *q).0).sum::<f64>() / n;
    close(
        "k1",
        &[sequences(k1), sequences(k1).sqrt()],
        &[numbers(&file["k1_sequence_mean"])?, numbers(&file["sqrt_k1"])?].concat(),
    )?;
    close("k2", &[sequences(k2)], &numbers(&file["k2_sequence_mean"])?)?;
    close("k3", &[tokens], &numbers(&file["k3_token_sum_mean"])?)
}

fn loss(name: &str) -> Result<Loss, Failed> {
    Loss::ALL.into_iter().find(|loss| loss.name() == name).ok_or_else(|| format!("no loss {name}").into())
}

pub fn tree_mdp(file: &Value, tally: &mut Tally) -> Result<(), Failed> {
    for one in file["bandit"].as_array().ok_or("no bandit")? {
        let policy = numbers(&one["pi"])?;
        for (key, expected) in one.as_object().ok_or("no object")?.iter().filter(|(key, _)| key.contains("_beta")) {
            let (name, beta) = key.split_once("_beta").ok_or("no beta")?;
            let found = tree::contradiction(loss(name)?, beta.parse().map_err(|_| "no number")?, &policy);
            close(key, &[found], &numbers(expected)?)?;
        }
        tally.checked += 1;
    }
    let path = |key: &str| Ok::<_, Failed>(numbers(&file[key])?.into_iter().map(|a| a as usize).collect::<Vec<_>>());
    let tree = tree::Tree::new(rows(&file["reference_logits"])?, path("chosen")?, path("rejected")?);
    for case in cases(file)? {
        let [beta, rate] = ["beta", "lr"].map(|key| case[key].as_f64().unwrap_or(f64::NAN));
        let trace = case["trace"].as_array().ok_or("no trace")?;
        let looks: Vec<usize> = trace.iter().map(|seen| seen["step"].as_u64().unwrap_or(0) as usize).collect();
        let found = tree.descend(loss(text(case, "loss")?)?, beta, rate, &looks);
        for (found, expected) in found.into_iter().zip(trace) {
            let found = found.to_json();
            for (key, value) in expected.as_object().ok_or("no object")? {
                close(&format!("{} beta {beta}: {key}", case["loss"]), &numbers(&found[key])?, &numbers(value)?)?;
            }
        }
        tally.checked += 1;
    }
    let space = &file["null_space"];
    let pairs = rows(&space["Q"])?;
    let rank = tree::rank(&pairs);
    close(
        "null space",
        &[rank as f64, (pairs[0].len() - rank) as f64],
        &[numbers(&space["rank"])?, numbers(&space["nullity"])?].concat(),
    )?;
    tally.checked += 1;
    Ok(())
}

/// What follows from the points that the file holds. They were drawn by numpy's generator, so other draws of the same toy have others.
pub fn toy_overopt(file: &Value, tally: &mut Tally) -> Result<(), Failed> {
    let column = |table: &[Vec<f64>], k: usize| table.iter().map(|row| row[k]).collect::<Vec<f64>>();
    let root = |kl: &[f64]| kl.iter().map(|kl| kl.max(0.0).sqrt()).collect::<Vec<f64>>();
    // The file leaves out what is at the start.
    let away = |d: &[f64], y: &[f64]| points(d, y).into_iter().filter(|point| point.d > 1e-3).collect::<Vec<_>>();
    for one in file["proxy"].as_array().ok_or("no proxy")? {
        let (tilt, bon) = (rows(&one["kl_tilt[e,KL,proxy,gold]"])?, rows(&one["bon[n,KL,proxy,gold]"])?);
        let (d, gold) = (root(&column(&tilt, 1)), column(&tilt, 3));
        let near = away(&d, &gold).into_iter().filter(|point| point.d < 5.0).collect::<Vec<_>>();
        check_fits(&one["fit_tilt_d<5"], &near)?;
        peak_of_log(&one["fit_tilt_d<5"], &near)?;
        let kl: Vec<f64> = column(&bon, 0).iter().map(|n| best_of_n_kl(*n as usize)).collect();
        close("KL of best-of-n", &kl, &column(&bon, 1))?;
        let bon = away(&root(&kl), &column(&bon, 3));
        check_fits(&one["fit_bon"], &bon)?;
        let best = (0..gold.len()).max_by(|a, b| gold[*a].total_cmp(&gold[*b])).ok_or("no points")?;
        close(
            "peak",
            &[gold[best], tilt[best][1]],
            &[numbers(&one["peak_gold"])?, numbers(&one["peak_KL"])?].concat(),
        )?;
        tally.checked += 1;
    }
    for one in file["daa"].as_array().ok_or("no daa")? {
        let all = one["points"].as_array().ok_or("no points")?;
        let of = |key: &str| all.iter().map(|point| point[key].as_f64().unwrap_or(f64::NAN)).collect::<Vec<f64>>();
        let (d, wins) = (root(&of("KL")), of("win_rate_vs_reference"));
        let above: Vec<f64> = wins.iter().map(|won| won - 0.5).collect();
        check_fits(&one["fit_gold"], &away(&d, &of("gold")))?;
        check_fits(&one["fit_win_rate_minus_half"], &away(&d, &above))?;
        peak_of_log(&one["fit_win_rate_minus_half"], &away(&d, &above))?;
        let told = correlation(&of("implicit_accuracy_heldout"), &wins);
        close("correlation", &[told], &numbers(&one["corr_implicit_accuracy_vs_win_rate"])?)?;
        tally.checked += 1;
    }
    Ok(())
}

fn peak_of_log(fits: &Value, points: &[Point]) -> Result<(), Failed> {
    let peak = Fit::of(Form { curve: Curve::Log, intercept: false }, points).and_then(|fit| fit.peak);
    match (peak, fits["log_form_peak_d"].as_f64()) {
        // An exponential of alpha / beta, and so of what rounding left of beta.
        (Some(peak), Some(expected)) => close_to(1e-8, "peak of the log form", &[peak.d], &[expected]),
        (None, None) => Ok(()),
        (found, expected) => Err(format!("a peak: found {found:?}, expected {expected:?}").into()),
    }
}
