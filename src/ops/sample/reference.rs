use super::{Args, DRAW, INFINITE, NOT_A_NUMBER, Sample, Sampling};
use crate::device::Reference;
use crate::error::Result;

impl Sample for Reference {
    fn sample(&self, a: Args<Self>) -> Result<()> {
        a.check()?;
        let vocab = a.logits.cols();
        let rows = a.logits.into_f64s().chunks(vocab).zip(a.draws.u32s().chunks(DRAW));
        for ((logits, draw), id) in rows.zip(a.ids.into_u32s()) {
            *id = choose(logits, &a.sampling, draw);
        }
        Ok(())
    }
}

fn choose(logits: &[f64], sampling: &Sampling, draw: &[u32]) -> u32 {
    if let Some(bad) = logits.iter().position(|l| l.is_nan() || *l == f64::INFINITY) {
        return bad as u32 | if logits[bad].is_nan() { NOT_A_NUMBER } else { INFINITE };
    }
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|a, b| logits[*b].partial_cmp(&logits[*a]).expect("no NaN is left").then(a.cmp(b)));
    let likeliest = order[0];
    if sampling.temperature == 0.0 {
        return likeliest as u32;
    }
    let weight = |id: usize| ((logits[id] - logits[likeliest]) / sampling.temperature).exp();
    let total: f64 = order.iter().map(|id| weight(*id)).sum();
    let mut held = 0.0;
    let size = order.iter().position(|id| {
        held += weight(*id);
        held >= sampling.top_p * total
    });
    let mut nucleus = order[..size.map_or(order.len(), |last| last + 1)].to_vec();
    nucleus.sort();
    let mut left = sampling.word(draw) as f64 / 2.0f64.powi(64) * nucleus.iter().map(|id| weight(*id)).sum::<f64>();
    let drawn = nucleus.into_iter().find(|id| {
        left -= weight(*id);
        left < 0.0
    });
    drawn.unwrap_or(likeliest) as u32
}
