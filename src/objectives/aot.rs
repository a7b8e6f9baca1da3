//! Melnyk et al., arXiv:2406.05882: alignment via optimal transport, which asks one distribution to dominate another
//! instead of each pair to be in order.
//!
//! ```text
//! aot            d = sort(ln pi(y_w) - ln pi(y_l)) - sort(ln pi_ref(y_w) - ln pi_ref(y_l))
//! aot_unpaired   d = sort(ln pi(y_w) - ln pi_ref(y_w)) - sort(ln pi(y_l) - ln pi_ref(y_l))
//! loss           -(1 - e) ln sigma(beta d) - e ln sigma(-beta d)          mean over ranks
//! ```
//!
//! Sorting couples the pairs of a batch. Deviations: it is the whole optimizer batch that is sorted; TRL sorts a micro-batch,
//! so that its loss depends on how a batch is cut. With e = 0, the default, it is the paper's logistic variant.

use super::pairwise::{self, PairLoss, smoothed};
use super::registry::{BETA, Entry, LABEL_SMOOTHING};

pub(super) const PAIRED: Entry = Entry {
    name: "aot",
    aliases: &[],
    paper: "Melnyk et al., arXiv:2406.05882",
    summary: "AOT: the policy's margins, in order of size, above the reference's",
    params: &[BETA, LABEL_SMOOTHING],
    build: |params| {
        let (beta, e) = (params["beta"], params["label_smoothing"]);
        pairwise::coupled("aot", params, move |stats, pairs| {
            let margins = |logps: &[f64]| stats.pairs.iter().map(|&(w, l)| logps[w] - logps[l]).collect::<Vec<_>>();
            let (policy, reference) = (margins(&stats.logps), margins(&stats.ref_logps[0]));
            let mut losses = vec![PairLoss::default(); pairs.len()];
            for (&i, &j) in ranks(&policy).iter().zip(&ranks(&reference)) {
                let (value, slope) = smoothed(beta * (policy[i] - reference[j]), e);
                losses[i] = PairLoss::of_margin(value, beta * slope);
            }
            losses
        })
    },
};

pub(super) const UNPAIRED: Entry = Entry {
    name: "aot_unpaired",
    aliases: &[],
    paper: "Melnyk et al., arXiv:2406.05882",
    summary: "AOT: rewards of chosen completions, in order of size, above those of rejected ones",
    params: &[BETA, LABEL_SMOOTHING],
    build: |params| {
        let (beta, e) = (params["beta"], params["label_smoothing"]);
        pairwise::coupled("aot_unpaired", params, move |_, pairs| {
            let chosen: Vec<f64> = pairs.iter().map(|pair| pair.chosen).collect();
            let rejected: Vec<f64> = pairs.iter().map(|pair| pair.rejected).collect();
            let mut losses = vec![PairLoss::default(); pairs.len()];
            for (&i, &j) in ranks(&chosen).iter().zip(&ranks(&rejected)) {
                let (value, slope) = smoothed(beta * (chosen[i] - rejected[j]), e);
                losses[i].value = value;
                losses[i].by_chosen = beta * slope;
                losses[j].by_rejected = -beta * slope;
            }
            losses
        })
    },
};

/// Indices from the smallest value to the largest; equal ones in their order.
fn ranks(values: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
    order
}
