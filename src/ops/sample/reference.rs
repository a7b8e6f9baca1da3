use super::{Args, BANNED, INFINITE, NOT_A_NUMBER, ODDS, Row, Sample, UNIT_BITS, certain, odds};
use crate::device::Reference;
use crate::error::Result;

impl Sample for Reference {
    fn sample(&self, a: Args<Self>) -> Result<()> {
        a.check()?;
        let vocab = a.logits.cols();
        let rows: &[Row] = bytemuck::cast_slice(a.rows.u32s());
        let results = a.ids.into_u32s().iter_mut().zip(a.odds.into_u32s().chunks_mut(ODDS));
        for ((logits, row), (id, odds)) in a.logits.into_f64s().chunks(vocab).zip(rows).zip(results) {
            let (chosen, of) = choose(logits, row, row.edits(a.edits.u32s()));
            *id = chosen;
            odds.copy_from_slice(&of);
        }
        Ok(())
    }
}

fn choose(logits: &[f64], row: &Row, edits: &[u32]) -> (u32, [u32; ODDS]) {
    if let Some(bad) = logits.iter().position(|l| l.is_nan() || *l == f64::INFINITY) {
        return (bad as u32 | if logits[bad].is_nan() { NOT_A_NUMBER } else { INFINITE }, certain());
    }
    let mut logits = logits.to_vec();
    for edit in edits {
        let logit = &mut logits[(edit & !BANNED) as usize];
        *logit = row.edited(*edit, *logit);
    }
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|a, b| logits[*b].partial_cmp(&logits[*a]).expect("no NaN is left").then(a.cmp(b)));
    let likeliest = order[0];
    if row.temperature == 0.0 {
        return (likeliest as u32, certain());
    }
    let ln_weight = |id: usize| (logits[id] - logits[likeliest]) / f64::from(row.temperature);
    let weight = |id: usize| ln_weight(id).exp();
    if let Some(last) = (row.top_k as usize).checked_sub(1).and_then(|last| order.get(last)) {
        let least = logits[*last];
        order.retain(|id| logits[*id] >= least);
    }
    let wanted = row.share() as f64 / 2.0f64.powi(64) * order.iter().map(|id| weight(*id)).sum::<f64>();
    let mut held = 0.0;
    let size = order.iter().position(|id| {
        held += weight(*id);
        held >= wanted
    });
    order.truncate(size.map_or(order.len(), |last| last + 1));
    order.retain(|id| weight(*id) >= f64::from(row.min_p) || *id == likeliest);
    order.sort();
    let total: f64 = order.iter().map(|id| weight(*id)).sum();
    let mut left = row.word() as f64 / 2.0f64.powi(64) * total;
    let drawn = order.into_iter().find(|id| {
        left -= weight(*id);
        left < 0.0
    });
    let drawn = drawn.unwrap_or(likeliest);
    (drawn as u32, odds(ln_weight(drawn) as f32, (total * (1u64 << UNIT_BITS) as f64) as u64))
}
