//! Words, runs of words, and how much of a text is said again.

use std::collections::HashSet;
use std::hash::Hash;

/// The words of a text, in lower case: letters and digits, with the apostrophes and hyphens between them. A script without
/// spaces gives long words; count characters or tokens there.
pub fn words(text: &str) -> Vec<String> {
    let joins = |c: char| matches!(c, '\'' | '’' | '-');
    let parts = text.split(|c: char| !c.is_alphanumeric() && !joins(c));
    let word = |part: &str| part.trim_matches(joins).replace('’', "'").to_lowercase();
    parts.map(word).filter(|word| !word.is_empty()).collect()
}

/// Distinct runs of `n` over all runs of `n` in the sequences, 0 to 1: `distinct-n` (Li et al., "A Diversity-Promoting
/// Objective Function for Neural Conversation Models", arXiv:1510.03055) over a set of texts. For `n` = 1 it is types over
/// tokens. NaN where no sequence is as long as `n`.
pub fn distinct<T: Eq + Hash>(sequences: &[impl AsRef<[T]>], n: usize) -> f64 {
    let runs = || sequences.iter().flat_map(|sequence| sequence.as_ref().windows(n));
    let types: HashSet<&[T]> = runs().collect();
    types.len() as f64 / runs().count() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_lower_case_and_keep_what_joins_them() {
        assert_eq!(
            words("It's a WELL-made film—don’t miss it!"),
            ["it's", "a", "well-made", "film", "don't", "miss", "it"]
        );
        assert_eq!(words(" - 'quoted' -- Größe 3.5 \u{1f600} ÉTÉ"), ["quoted", "größe", "3", "5", "été"]);
        assert!(words("").is_empty() && words(" ...'-' ").is_empty());
    }

    #[test]
    fn distinct_counts_types_over_tokens() {
        let texts = [vec![1, 2, 1, 2], vec![1, 2], vec![3]];
        assert_eq!(distinct(&texts, 1), 3.0 / 7.0);
        // 12 21 12 | 12
        assert_eq!(distinct(&texts, 2), 2.0 / 4.0);
        assert_eq!(distinct(&texts, 4), 1.0);
        assert!(distinct(&texts, 5).is_nan() && distinct::<u32>(&[vec![]], 1).is_nan());
    }
}
