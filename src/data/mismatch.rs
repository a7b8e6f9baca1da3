//! Completions under prompts that they do not answer: what KTO estimates its KL divergence from (Ethayarajh et al., 2024,
//! arXiv:2402.01306, Section 4.1).

use super::dataset::{Example, Sequence};

/// Every prompt of `examples` with the completion of the sequence before it, the first with that of the last:
/// the rotation of `get_kl_completion_ids` in TRL 1.16's kto_trainer.py, token for token. One example for each, with as
/// many sequences, so that they can share their prompt.
///
/// The order is that of TRL's `unpair_preference_dataset`: of pairs first every chosen completion, then every rejected
/// one. A completion of a pair so meets another pair's prompt wherever there is another.
///
/// A lone sequence takes the completion of `previous` and, without one, its own: the estimate is then its own reward,
/// which is why TRL refuses batches of one and says nothing where a data set's last batch is one.
///
/// What is longer than `max_length` keeps its start, as in TRL; a prompt is shorter than that.
pub fn mismatched(examples: &[&Example], previous: Option<&Sequence>, max_length: Option<usize>) -> Vec<Example> {
    let most = examples.iter().map(|example| example.sequences.len()).max().unwrap_or(0);
    let column =
        |s: usize| examples.iter().enumerate().filter(move |(_, e)| s < e.sequences.len()).map(move |(i, _)| (i, s));
    let order: Vec<(usize, usize)> = (0..most).flat_map(column).collect();
    let mut mismatched: Vec<Example> = examples
        .iter()
        .map(|example| Example { row: example.row, sequences: example.sequences.clone(), ..Example::default() })
        .collect();
    let at = |(example, sequence): (usize, usize)| &examples[example].sequences[sequence];
    for (place, &(example, sequence)) in order.iter().enumerate() {
        let source = match (previous, order.len()) {
            (Some(previous), 1) => previous,
            (_, len) => at(order[(place + len - 1) % len]),
        };
        let Sequence { ids, first, unscored } = &mut mismatched[example].sequences[sequence];
        unscored.clear();
        ids.truncate(*first);
        ids.extend_from_slice(&source.ids[source.first..]);
        ids.truncate(max_length.unwrap_or(usize::MAX));
    }
    mismatched
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Prompt `prompt` repeated, then a completion of `len` tokens 10 + `prompt`.
    fn sequence(prompt: u32, len: usize) -> Sequence {
        let first = 1 + prompt as usize % 3;
        Sequence::new([vec![prompt; first], vec![10 + prompt; len]].concat(), first)
    }

    fn example(row: usize, sequences: &[Sequence]) -> Example {
        Example { row, sequences: sequences.to_vec(), label: Some(true), ..Example::default() }
    }

    /// `golden/kto_bco.json`, `kl_rotation`: which completion each prompt has, in batches.
    #[test]
    fn completions_rotate_by_one_within_a_batch() {
        for (n, size, expected) in
            [(5, 2, vec![1, 0, 3, 2, 4]), (6, 3, vec![2, 0, 1, 5, 3, 4]), (4, 4, vec![3, 0, 1, 2])]
        {
            let examples: Vec<Example> = (0..n).map(|i| example(i, &[sequence(i as u32, 1 + i)])).collect();
            let refs: Vec<&Example> = examples.iter().collect();
            let rotated: Vec<Example> = refs.chunks(size).flat_map(|batch| mismatched(batch, None, None)).collect();
            for (i, (example, completion)) in rotated.iter().zip(expected).enumerate() {
                let (prompt, other) = (sequence(i as u32, 0), sequence(completion, 1 + completion as usize));
                let ids = [&prompt.ids[..], &other.ids[other.first..]].concat();
                let expected = Example { row: i, sequences: vec![Sequence { ids, ..prompt }], ..Example::default() };
                assert_eq!(*example, expected);
            }
        }
    }

    #[test]
    fn the_completions_of_a_pair_meet_the_prompts_of_others() {
        let pair = |row: usize| {
            let [chosen, mut rejected] = [sequence(row as u32, 2), sequence(row as u32, 3)];
            rejected.ids[chosen.first..].fill(20 + row as u32);
            example(row, &[chosen, rejected])
        };
        let pairs = [pair(0), pair(1), pair(2)];
        let rotated = mismatched(&pairs.each_ref(), None, None);
        // The last token says whose completion it is: 10 and above chosen, 20 and above rejected.
        let completions: Vec<u32> = rotated.iter().flat_map(|e| &e.sequences).map(|s| s.ids[s.first]).collect();
        assert_eq!(completions, [22, 12, 10, 20, 11, 21]);
        assert!(
            rotated
                .iter()
                .enumerate()
                .all(|(i, e)| e.sequences.iter().all(|s| s.ids[..s.first] == sequence(i as u32, 0).ids))
        );
        // Alone, a pair has no other prompt to give: its completions change places.
        let alone = mismatched(&[&pairs[1]], Some(&sequence(5, 4)), None);
        assert_eq!(alone[0].sequences, [pairs[1].sequences[1].clone(), pairs[1].sequences[0].clone()]);
    }

    #[test]
    fn a_lone_sequence_takes_the_completion_before_its_batch() {
        let lone = example(7, &[sequence(1, 2)]);
        let of = |previous: Option<&Sequence>| mismatched(&[&lone], previous, None).remove(0).sequences.remove(0);
        assert_eq!(of(Some(&sequence(4, 3))).ids, [1, 1, 14, 14, 14]);
        assert_eq!(of(None), lone.sequences[0]);
        assert_eq!(mismatched(&[], None, None), []);
    }

    #[test]
    fn what_is_too_long_keeps_its_start() {
        let (short, long) = (example(0, &[sequence(2, 1)]), example(1, &[sequence(1, 9)]));
        let rotated = mismatched(&[&short, &long], None, Some(6));
        assert_eq!(rotated[0].sequences[0].ids, [2, 2, 2, 11, 11, 11]);
        assert_eq!(rotated[1].sequences[0].ids, [1, 1, 12]);
    }
}
