//! Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
//!
//! A random number is a pure function of (seed, stream, counter): there is no state to save, to lose or to
//! advance in the right order, so resuming, threads and devices cannot change what is drawn.

/// A keyed family of random numbers. Two streams of one seed are independent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Philox {
    key: [u32; 2],
    stream: u64,
}

const ROUNDS: usize = 10;
/// Blocks that are made side by side.
const LANES: usize = 16;
const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

impl Philox {
    pub fn new(seed: u64, stream: u64) -> Self {
        Self { key: [seed as u32, (seed >> 32) as u32], stream }
    }

    /// A stream named by text, such as a tensor's name.
    pub fn named(seed: u64, name: &str) -> Self {
        let hash = blake3::hash(name.as_bytes());
        Self::new(seed, u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("a hash has 32 bytes")))
    }

    /// Seed and stream, for kernels that draw the same.
    pub fn parts(&self) -> (u64, u64) {
        (u64::from(self.key[0]) | u64::from(self.key[1]) << 32, self.stream)
    }

    /// Four random words.
    pub fn words(&self, counter: u64) -> [u32; 4] {
        let halves = |x: u64| [x as u32, (x >> 32) as u32];
        let ([c0, c1], [c2, c3]) = (halves(counter), halves(self.stream));
        block([c0, c1, c2, c3], self.key)
    }

    /// [`Self::words`] of the counters from `first` on, one after the other: portable loops that become vector code where the
    /// caller is compiled for it.
    #[inline(always)]
    pub fn fill(&self, first: u64, words: &mut [u32]) {
        for (i, words) in words.chunks_mut(4 * LANES).enumerate() {
            let x = self.blocks(first + (i * LANES) as u64);
            if let Ok(words) = <&mut [u32; 4 * LANES]>::try_from(&mut *words) {
                for (i, words) in words.chunks_exact_mut(4).enumerate() {
                    (words[0], words[1]) = (x[0][i] as u32, x[1][i] as u32);
                    (words[2], words[3]) = (x[2][i] as u32, x[3][i] as u32);
                }
            } else {
                words.iter_mut().enumerate().for_each(|(i, word)| *word = x[i % 4][i / 4] as u32);
            }
        }
    }

    /// Word j of the block of counter `first + i` is the lower half of `x[j][i]`; the upper halves mean nothing. A product of
    /// two words needs no other form than this.
    #[inline(always)]
    fn blocks(&self, first: u64) -> [[u64; LANES]; 4] {
        const LOW: u64 = u32::MAX as u64;
        let mut x = [[0; LANES], [0; LANES], [self.stream & LOW; LANES], [self.stream >> 32; LANES]];
        for i in 0..LANES {
            let counter = first.wrapping_add(i as u64);
            (x[0][i], x[1][i]) = (counter & LOW, counter >> 32);
        }
        let [mut key0, mut key1] = self.key;
        for _ in 0..ROUNDS {
            for i in 0..LANES {
                let product0 = u64::from(MULTIPLIERS[0]) * (x[0][i] & LOW);
                let product1 = u64::from(MULTIPLIERS[1]) * (x[2][i] & LOW);
                x[0][i] = product1 >> 32 ^ x[1][i] ^ u64::from(key0);
                x[2][i] = product0 >> 32 ^ x[3][i] ^ u64::from(key1);
                (x[1][i], x[3][i]) = (product1, product0);
            }
            (key0, key1) = (key0.wrapping_add(WEYL[0]), key1.wrapping_add(WEYL[1]));
        }
        x
    }

    pub fn u64(&self, counter: u64) -> u64 {
        let [a, b, ..] = self.words(counter);
        u64::from(a) | u64::from(b) << 32
    }

    /// Uniform in [0, 1), 53 bits.
    pub fn uniform(&self, counter: u64) -> f64 {
        (self.u64(counter) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Standard normal (Box-Muller).
    pub fn normal(&self, counter: u64) -> f64 {
        let [a, b, c, d] = self.words(counter);
        let unit = |lo: u32, hi: u32| ((u64::from(lo) | u64::from(hi) << 32) >> 11) as f64 / (1u64 << 53) as f64;
        let (u, v) = (1.0 - unit(a, b), unit(c, d));
        (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
    }
}

fn block(mut x: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    let multiply = |a: u32, b: u32| {
        let product = u64::from(a) * u64::from(b);
        ((product >> 32) as u32, product as u32)
    };
    for _ in 0..ROUNDS {
        let (high0, low0) = multiply(MULTIPLIERS[0], x[0]);
        let (high1, low1) = multiply(MULTIPLIERS[1], x[2]);
        x = [high1 ^ x[1] ^ key[0], low1, high0 ^ x[3] ^ key[1], low0];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers published with Random123 (`kat_vectors`, philox4x32 10).
    #[test]
    fn agrees_with_random123() {
        assert_eq!(block([0; 4], [0; 2]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(block([u32::MAX; 4], [u32::MAX; 2]), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
        assert_eq!(
            block([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0]),
            [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]
        );
    }

    /// Across the counters' upper half, and with a tail.
    #[test]
    fn many_words_are_those_of_each_counter() {
        let random = Philox::named(u64::MAX - 3, "many");
        for (first, len) in [(0, 0), (5, 3), ((1 << 32) - 7, 64), ((7 << 34) - 1, 4 * LANES * 3 + 9)] {
            let mut words = vec![0; len];
            random.fill(first, &mut words);
            let expected = (0..len).map(|i| random.words(first + (i / 4) as u64)[i % 4]);
            assert!(words.iter().copied().eq(expected), "{len} from {first}");
        }
    }

    #[test]
    fn moments_are_those_of_the_distributions() {
        let random = Philox::new(7, 1);
        let n = 20_000;
        let mean = |f: &dyn Fn(u64) -> f64| (0..n).map(f).sum::<f64>() / n as f64;
        assert!((mean(&|i| random.uniform(i)) - 0.5).abs() < 0.01);
        assert!(mean(&|i| random.normal(i)).abs() < 0.03);
        assert!((mean(&|i| random.normal(i).powi(2)) - 1.0).abs() < 0.05);
        assert_ne!(Philox::named(7, "a").u64(0), Philox::named(7, "b").u64(0));
    }
}
