//! The tree of Rafailov et al. (arXiv:2406.02900, section 5): at every node one of a few actions, a policy with logits of its own at
//! each node, one preference pair, gradient descent. Everything is counted exactly, over all leaves. Their paper has three actions;
//! depth 3, a table of logits and plain descent at rate 1 are our choice.
//!
//! The pair says nothing about the other leaves (the loss has a null space), and what it takes from the rejected one goes there too.

use serde_json::{Value, json};

use super::{Loss, log_softmax};
use crate::device::Philox;

pub struct Tree {
    depth: usize,
    actions: usize,
    /// `[nodes][actions]`, nodes by level and then in order of the actions that lead there.
    reference: Vec<Vec<f64>>,
    chosen: Vec<usize>,
    rejected: Vec<usize>,
}

/// A policy after some steps.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Seen {
    pub step: usize,
    pub loss: f64,
    pub p_chosen: f64,
    pub p_rejected: f64,
    /// Of the leaves that no pair names.
    pub p_ood: f64,
    /// KL(policy || reference), nats.
    pub kl: f64,
    /// The likeliest of those leaves.
    pub max_ood_leaf: f64,
}

impl Tree {
    /// `reference` holds the logits of every inner node.
    ///
    /// Panics where they are not those of a tree as deep as the two leaves.
    pub fn new(reference: Vec<Vec<f64>>, chosen: Vec<usize>, rejected: Vec<usize>) -> Self {
        let (depth, actions) = (chosen.len(), reference[0].len());
        let nodes: usize = (0..depth).map(|level| actions.pow(level as u32)).sum();
        assert_eq!((reference.len(), rejected.len()), (nodes, depth), "a tree of depth {depth}");
        Self { depth, actions, reference, chosen, rejected }
    }

    /// Three actions, depth 3, logits drawn with a standard deviation of 0.5.
    pub fn drawn(seed: u64) -> Self {
        let random = Philox::named(seed, "tree");
        let node = |n: u64| (0..3).map(|a| 0.5 * random.normal(3 * n + a)).collect();
        Self::new((0..13).map(node).collect(), vec![0, 1, 2], vec![0, 2, 1])
    }

    fn leaves(&self) -> Vec<Vec<usize>> {
        let digits = |mut leaf: usize| {
            let mut path = vec![0; self.depth];
            for action in path.iter_mut().rev() {
                (*action, leaf) = (leaf % self.actions, leaf / self.actions);
            }
            path
        };
        (0..self.actions.pow(self.depth as u32)).map(digits).collect()
    }

    /// The nodes that a path goes through.
    fn nodes(&self, path: &[usize]) -> Vec<usize> {
        let (mut first, mut within) = (0, 0);
        let mut nodes = Vec::new();
        for (level, action) in path.iter().enumerate() {
            nodes.push(first + within);
            first += self.actions.pow(level as u32);
            within = within * self.actions + action;
        }
        nodes
    }

    fn logp(&self, logps: &[Vec<f64>], path: &[usize]) -> f64 {
        self.nodes(path).iter().zip(path).map(|(node, action)| logps[*node][*action]).sum()
    }

    /// Descends on the pair, and looks before and after the steps that are named.
    pub fn descend(&self, loss: Loss, beta: f64, rate: f64, looks: &[usize]) -> Vec<Seen> {
        let soft = |logits: &[Vec<f64>]| logits.iter().map(|node| log_softmax(node)).collect::<Vec<_>>();
        let reference = soft(&self.reference);
        let mut logits = self.reference.clone();
        let (leaves, mut seen) = (self.leaves(), Vec::new());
        for step in 0..=looks.iter().copied().max().unwrap_or(0) {
            let policy = soft(&logits);
            let ratio = |path: &[usize]| self.logp(&policy, path) - self.logp(&reference, path);
            let z = beta * (ratio(&self.chosen) - ratio(&self.rejected));
            if looks.contains(&step) {
                let p: Vec<f64> = leaves.iter().map(|leaf| self.logp(&policy, leaf).exp()).collect();
                let kl = leaves.iter().zip(&p).map(|(leaf, p)| p * ratio(leaf)).sum();
                let of = |path: &Vec<usize>| p[leaves.iter().position(|leaf| leaf == path).expect("a leaf")];
                let (p_chosen, p_rejected) = (of(&self.chosen), of(&self.rejected));
                let others = leaves.iter().zip(&p).filter(|(leaf, _)| **leaf != self.chosen && **leaf != self.rejected);
                seen.push(Seen {
                    step,
                    loss: loss.value(z),
                    p_chosen,
                    p_rejected,
                    p_ood: 1.0 - p_chosen - p_rejected,
                    kl,
                    max_ood_leaf: others.map(|(_, p)| *p).fold(0.0, f64::max),
                });
            }
            for (path, sign) in [(&self.chosen, 1.0), (&self.rejected, -1.0)] {
                let by_logp = rate * loss.slope(z) * beta * sign;
                for (node, action) in self.nodes(path).into_iter().zip(path) {
                    for a in 0..self.actions {
                        // d ln p(action) / d logit a
                        let slope = f64::from(u8::from(a == *action)) - policy[node][a].exp();
                        logits[node][a] -= by_logp * slope;
                    }
                }
            }
        }
        seen
    }
}

/// The rank of a matrix of preferences, `[pairs][answers]` with 1 for the chosen and -1 for the rejected: a loss of implicit rewards
/// sees only that many of their dimensions, and any policy in the rest of them is as good.
pub fn rank(pairs: &[Vec<f64>]) -> usize {
    let mut rows = pairs.to_vec();
    let (mut rank, columns) = (0, rows.first().map_or(0, Vec::len));
    for column in 0..columns {
        let pivot = (rank..rows.len()).max_by(|a, b| rows[*a][column].abs().total_cmp(&rows[*b][column].abs()));
        let Some(pivot) = pivot.filter(|row| rows[*row][column].abs() > 1e-9) else { continue };
        rows.swap(rank, pivot);
        let (above, below) = rows.split_at_mut(rank + 1);
        let lead = &above[rank];
        for row in below {
            let factor = row[column] / lead[column];
            row.iter_mut().zip(lead).for_each(|(x, lead)| *x -= factor * lead);
        }
        rank += 1;
    }
    rank
}

/// The mean loss of `y1 > y2` and `y2 > y1` on three answers under a uniform reference: any policy that treats the two alike has it,
/// wherever the third is.
pub fn contradiction(loss: Loss, beta: f64, policy: &[f64]) -> f64 {
    let z = beta * (policy[0].ln() - policy[1].ln());
    0.5 * (loss.value(z) + loss.value(-z))
}

impl Seen {
    pub fn to_json(self) -> Value {
        let Self { step, loss, p_chosen, p_rejected, p_ood, kl, max_ood_leaf } = self;
        json!({"step": step, "loss": loss, "p_chosen": p_chosen, "p_rejected": p_rejected, "p_ood": p_ood,
               "kl_policy_ref": kl, "max_ood_leaf": max_ood_leaf})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_sum_to_one_and_a_loss_that_is_small_says_little() {
        let tree = Tree::drawn(1);
        for loss in Loss::ALL {
            let seen = tree.descend(loss, 0.1, 1.0, &[0, 50, 400]);
            assert!(seen[0].kl.abs() < 1e-15 && seen[2].kl >= seen[1].kl, "{seen:?}");
            assert!(seen[2].loss < seen[0].loss && seen[2].p_rejected < seen[0].p_rejected);
            // Most of what there is belongs to leaves that nothing was said about.
            assert!(seen.iter().all(|seen| (0.0..=1.0).contains(&seen.p_ood) && seen.p_ood > 0.5), "{seen:?}");
        }
    }
}
