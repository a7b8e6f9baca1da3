//! How often one text beats another: what pairwise judgements come to.
//!
//! GRAO (arXiv:2508.07750) reports two of these numbers, and is ambiguous about both. RAS, the relative alignment score, is the
//! share of policy's answers that beat the reference ([`Tally::won`]) in its main text, with ties ([`Tally::won_or_tied`]) in
//! its appendix. NAG, the gain of normalized alignment, is printed as the share of answers that got better
//! ([`Tally::won`] of after against before); its table holds a negative one, so it must be wins less losses
//! ([`Tally::net`]).

/// Of a candidate beside another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Judgement {
    Win,
    Tie,
    Loss,
}

impl Judgement {
    /// The higher reward wins; `None` where one says nothing.
    pub fn of(candidate: f64, other: f64) -> Option<Self> {
        match candidate - other {
            // Two infinities of one sign have no difference.
            _ if candidate == other => Some(Self::Tie),
            d if d > 0.0 => Some(Self::Win),
            d if d < 0.0 => Some(Self::Loss),
            _ => None,
        }
    }

    /// What a judge comes to that was asked in both orders, both answers being about the candidate: where they differ its
    /// place decided, and it is a tie.
    pub fn consistent(self, swapped: Self) -> Self {
        if self == swapped { self } else { Self::Tie }
    }
}

/// Counts of judgements. A share of none is NaN.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Tally {
    pub wins: usize,
    pub ties: usize,
    pub losses: usize,
}

/// The normal distribution's quantile of an interval that holds 95 %.
const Z: f64 = 1.959963984540054;

impl Tally {
    pub fn all(&self) -> usize {
        self.wins + self.ties + self.losses
    }

    fn share(&self, of: f64) -> f64 {
        of / self.all() as f64
    }

    /// Wins over all: ties count as losses.
    pub fn won(&self) -> f64 {
        self.share(self.wins as f64)
    }

    pub fn won_or_tied(&self) -> f64 {
        self.share((self.wins + self.ties) as f64)
    }

    /// Wins less losses over all, -1 to 1.
    pub fn net(&self) -> f64 {
        self.share(self.wins as f64 - self.losses as f64)
    }

    /// A tie is half a win.
    pub fn win_rate(&self) -> f64 {
        self.share(self.wins as f64 + 0.5 * self.ties as f64)
    }

    /// Wins over what was decided.
    pub fn win_rate_without_ties(&self) -> f64 {
        self.wins as f64 / (self.wins + self.losses) as f64
    }

    /// Wilson's interval around the win rate without ties, 95 %: within 0 and 1, and of a width even where all was won (E. B.
    /// Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 22, 1927). Where nothing was
    /// decided it is all there is.
    pub fn interval_without_ties(&self) -> [f64; 2] {
        let n = (self.wins + self.losses) as f64;
        if n == 0.0 {
            return [0.0, 1.0];
        }
        let (p, z2) = (self.wins as f64 / n, Z * Z);
        let center = (p + z2 / (2.0 * n)) / (1.0 + z2 / n);
        let half = Z * (p * (1.0 - p) / n + z2 / (4.0 * n * n)).sqrt() / (1.0 + z2 / n);
        [center - half, center + half]
    }
}

impl FromIterator<Judgement> for Tally {
    fn from_iter<I: IntoIterator<Item = Judgement>>(judgements: I) -> Self {
        let mut tally = Self::default();
        for judgement in judgements {
            match judgement {
                Judgement::Win => tally.wins += 1,
                Judgement::Tie => tally.ties += 1,
                Judgement::Loss => tally.losses += 1,
            }
        }
        tally
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rewards_become_judgements() {
        use Judgement::{Loss, Tie, Win};
        assert_eq!(Judgement::of(1.0, 0.5), Some(Win));
        assert_eq!(Judgement::of(-0.0, 0.0), Some(Tie));
        assert_eq!(Judgement::of(f64::NEG_INFINITY, f64::NEG_INFINITY), Some(Tie));
        assert_eq!(Judgement::of(f64::NEG_INFINITY, 1e308), Some(Loss));
        assert_eq!(Judgement::of(f64::NAN, 0.0), None);
        assert_eq!([Win.consistent(Win), Win.consistent(Loss), Tie.consistent(Loss)], [Win, Tie, Tie]);
    }

    #[test]
    fn nothing_is_no_share() {
        let none = Tally::default();
        assert!(none.won().is_nan() && none.net().is_nan() && none.win_rate().is_nan());
        let tied = Tally { ties: 3, ..none };
        assert!(tied.win_rate() == 0.5 && tied.win_rate_without_ties().is_nan());
        assert_eq!(tied.interval_without_ties(), [0.0, 1.0]);
    }

    #[test]
    fn intervals_stay_within() {
        for (wins, losses) in [(1, 0), (0, 1), (1000, 0), (3, 5)] {
            let [low, high] = Tally { wins, losses, ties: 0 }.interval_without_ties();
            let rate = wins as f64 / (wins + losses) as f64;
            // All won: the bound is 1 but for rounding.
            assert!(
                -1e-15 <= low && low <= rate + 1e-15 && rate <= high + 1e-15 && high <= 1.0 + 1e-15,
                "{low} {high}"
            );
        }
    }
}
