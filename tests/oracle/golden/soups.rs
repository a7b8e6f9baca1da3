//! Merged LoRA adapters (rewarded soups, personalized soups; PEFT's `add_weighted_adapter`).

use cuvee::merge::adapters::{Factors, Method, Weighted, merge, share, sum};
use libtest_mimic::Failed;
use serde_json::Value;

use super::{Tally, cases, close, numbers, rows};

/// A's and B's of every adapter; a case has one weight for each.
pub fn soups(file: &Value, tally: &mut Tally) -> Result<(), Failed> {
    let scaling = file["scaling"].as_f64().ok_or("the file has no scaling")?;
    let matrices = |key: &str| file[key].as_array().ok_or_else(|| format!("the file has no {key}"));
    let adapters = matrices("A")?.iter().zip(matrices("B")?);
    let factors =
        adapters.map(|(a, b)| Ok(Factors { rank: rows(a)?.len(), b: rows(b)?.concat(), a: rows(a)?.concat() }));
    let factors: Vec<Factors> = factors.collect::<Result<_, String>>()?;
    for case in cases(file)? {
        let weights = numbers(&case["lambda"])?;
        let weighted = weights.iter().zip(&factors);
        let parts: Vec<Weighted> =
            weighted.map(|(weight, factors)| Weighted { weight: *weight, scaling, factors: factors.clone() }).collect();
        let rank = factors[0].rank;
        let methods = [
            ("cat_delta", Method::Cat, None),
            ("factor_average_delta", Method::Factor, Some("rel_err_factor_vs_exact")),
            ("peft_linear_delta", Method::Linear, None),
            ("svd_rank_r_delta", Method::Svd { rank }, Some("rel_err_svd_vs_exact")),
        ];
        for (key, method, error) in methods {
            let what = format!("{key} of {weights:?}");
            let merged = merge(method, &parts)?;
            close(&what, &merged.factors.product(), &rows(&case[key])?.concat())?;
            if let Some(error) = error {
                let found = share(merged.lost, merged.energy);
                let expected = case[error].as_f64().ok_or_else(|| format!("a case has no {error}"))?;
                // Of a product with itself, rounding alone is left: the root of what an energy is rounded to.
                if found.max(expected) > 1e-7 {
                    close(&format!("{error} of {weights:?}"), &[found], &[expected])?;
                }
            }
        }
        close(&format!("exact_delta of {weights:?}"), &sum(&parts).product(), &rows(&case["exact_delta"])?.concat())?;
        tally.checked += 1;
    }
    Ok(())
}
