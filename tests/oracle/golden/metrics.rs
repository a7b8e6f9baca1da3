//! What judgements of pairs come to.

use cuvee::rewards::judgement::{Judgement, Tally};
use libtest_mimic::Failed;
use serde_json::Value;

use super::{Tally as Cases, cases, close, numbers};

fn judgements(signs: &Value) -> Result<Vec<Judgement>, Failed> {
    let of = |sign: f64| Judgement::of(sign, 0.0).ok_or(Failed::from("a judgement is no number"));
    numbers(signs)?.into_iter().map(of).collect()
}

fn sign(judgement: &Judgement) -> f64 {
    match judgement {
        Judgement::Win => 1.0,
        Judgement::Tie => 0.0,
        Judgement::Loss => -1.0,
    }
}

/// The two numbers of GRAO about its own answers have no judgements of their own: they are of the first case's.
pub fn metrics(file: &Value, counted: &mut Cases) -> Result<(), Failed> {
    let cases = cases(file)?;
    let first: Tally = judgements(&cases[0]["judgements"])?.into_iter().collect();
    for case in cases {
        let check = |field: &str, found: &[f64]| match &case[field] {
            Value::Null => Ok(()),
            expected => close(field, found, &numbers(expected)?),
        };
        let both = |a: &str, b: &str| -> Result<Option<Vec<(f64, f64)>>, Failed> {
            match (&case[a], &case[b]) {
                (Value::Null, _) | (_, Value::Null) => Ok(None),
                (a, b) => Ok(Some(numbers(a)?.into_iter().zip(numbers(b)?).collect())),
            }
        };
        let tally = if let Some(orders) = both("judgements_order1", "judgements_order2_swapped_back")? {
            let judged = |sign| Judgement::of(sign, 0.0).expect("a number");
            let both: Vec<Judgement> = orders.into_iter().map(|(a, b)| judged(a).consistent(judged(b))).collect();
            check("consistent", &both.iter().map(sign).collect::<Vec<_>>())?;
            both.into_iter().collect()
        } else if let Some(rewards) = both("reward_post", "reward_pre")? {
            rewards.into_iter().filter_map(|(post, pre)| Judgement::of(post, pre)).collect()
        } else {
            first
        };
        check("win_rate_ties_half", &[tally.win_rate()])?;
        check("win_rate_excl_ties", &[tally.win_rate_without_ties()])?;
        check("win_or_tie", &[tally.won_or_tied()])?;
        check("net", &[tally.net()])?;
        check("wilson95_excl_ties", &tally.interval_without_ties())?;
        check("grao_RAS_strict", &[tally.won()])?;
        check("grao_RAS_win_or_tie", &[tally.won_or_tied()])?;
        check("grao_NAG_literal", &[tally.won()])?;
        check("grao_NAG_net_win_minus_loss", &[tally.net()])?;
        counted.checked += 1;
    }
    Ok(())
}
