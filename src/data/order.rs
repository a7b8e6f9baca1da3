//! The order in which an epoch visits the examples.

/// A permutation of `0..len`, or `0..len` itself without `shuffle`.
///
/// `random(counter)` must give 64 independent uniform bits per counter. It is the caller's, keyed by its seed and
/// the epoch: the order is then a pure function of both, and a resumed run needs no generator state.
/// Fisher-Yates; every permutation is equally likely.
pub fn epoch_order(len: usize, shuffle: bool, random: &mut dyn FnMut(u64) -> u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..len).collect();
    if shuffle {
        let mut counters = 0..;
        let mut draw = || random(counters.next().expect("2^64 draws"));
        for last in (1..len).rev() {
            order.swap(last, below(last as u64 + 1, &mut draw) as usize);
        }
    }
    order
}

/// A uniform number in `0..n`, n >= 1. Lemire, arXiv:1805.10941, Algorithm 5: the high half of a product is biased
/// only for the `2^64 mod n` smallest low halves, and those are drawn again.
fn below(n: u64, draw: &mut dyn FnMut() -> u64) -> u64 {
    let rejected = n.wrapping_neg() % n;
    loop {
        let product = u128::from(draw()) * u128::from(n);
        if product as u64 >= rejected {
            return (product >> 64) as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SplitMix64, good enough to stand in for the engine's generator.
    fn mix(seed: u64, counter: u64) -> u64 {
        let z = seed.wrapping_add(counter.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn shuffled(len: usize, seed: u64) -> Vec<usize> {
        epoch_order(len, true, &mut |counter| mix(seed, counter))
    }

    #[test]
    fn without_shuffle_nothing_is_drawn() {
        assert_eq!(epoch_order(4, false, &mut |_| unreachable!()), [0, 1, 2, 3]);
    }

    #[test]
    fn a_shuffle_is_a_repeatable_permutation() {
        for len in [0, 1, 2, 3, 47, 252] {
            let order = shuffled(len, 1);
            assert_eq!(order, shuffled(len, 1));
            let mut sorted = order.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..len).collect::<Vec<_>>());
        }
        assert_ne!(shuffled(252, 1), shuffled(252, 2));
    }

    #[test]
    fn every_permutation_is_equally_likely() {
        let mut counts = std::collections::HashMap::new();
        for seed in 0..24_000 {
            *counts.entry(shuffled(4, mix(9, seed))).or_insert(0) += 1;
        }
        assert_eq!(counts.len(), 24);
        // Mean 1000, standard deviation 31.
        assert!(counts.values().all(|&count: &i32| (count - 1000).abs() < 160), "{counts:?}");
    }

    #[test]
    fn biased_draws_are_rejected() {
        // 2^64 mod 3 is 1: the draw 0 alone has a low half below it.
        let mut draws = [0, 0, u64::MAX].into_iter();
        assert_eq!(below(3, &mut || draws.next().unwrap()), 2);
        assert_eq!(below(1, &mut || 0), 0);
    }
}
