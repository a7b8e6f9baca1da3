//! Completions that were cut at their length limit teach nothing where that is asked for (`mask_truncated_completions` of TRL, after
//! Yu et al., arXiv:2503.14476, section 3.4): a reward for what was not ended is noise. They count in what rewards are compared with, and in
//! means over completions, not in means over tokens.

use crate::data::Example;
use crate::objectives::Stats;
use crate::references::Scored;
use crate::train::step::Sampled;

/// What is trained on, without completions that are not kept: an example each, what references say of them, and what is known.
pub type Sequences = (Vec<Example>, Vec<Vec<Scored>>, Sampled);

/// `keep`: of all sequences in order, samples and answers. Examples of which nothing is left are gone.
pub fn leave_out((examples, refs, sampled): Sequences, keep: &[bool]) -> Sequences {
    let starts: Vec<usize> = examples
        .iter()
        .scan(0, |start, example| Some(std::mem::replace(start, *start + example.sequences.len())))
        .collect();
    let kept = |e: usize, k: usize| keep[starts[e] + k];
    let of_example = |e: usize| (0..examples[e].sequences.len()).filter(move |k| kept(e, *k));
    let left: Vec<usize> = (0..examples.len()).filter(|e| of_example(*e).next().is_some()).collect();
    let samples = |e: usize| sampled.samples_of(e);
    let counts = left.iter().map(|e| of_example(*e).filter(|k| *k < samples(*e)).count()).collect();
    let fewer = |e: &usize| Example {
        sequences: of_example(*e).map(|k| examples[*e].sequences[k].clone()).collect(),
        ..examples[*e].clone()
    };
    let fewer: Vec<Example> = left.iter().map(fewer).collect();
    let said = |of: &Vec<Scored>| {
        let one = |e: &usize| Scored {
            sums: of_example(*e).map(|k| of[*e].sums[k]).collect(),
            tokens: of_example(*e).filter_map(|k| of[*e].tokens.get(k).cloned()).collect(),
        };
        left.iter().map(one).collect()
    };
    let refs = refs.iter().map(said).collect();
    let absent = keep.iter().filter(|keep| !**keep).count() as f64;
    let mut known = Sampled::new(&fewer, counts, sampled.stats.longest as usize);
    known.absent = absent / fewer.len().max(1) as f64;
    let stats = &sampled.stats;
    let sequences = |of: &Vec<f64>| of.iter().zip(keep).filter(|(_, keep)| **keep).map(|(x, _)| *x).collect();
    let tokens = |of: &Vec<f64>| -> Vec<f64> {
        let ends = stats.offsets.windows(2).zip(keep).filter(|(_, keep)| **keep);
        ends.flat_map(|(ends, _)| of.get(ends[0]..ends[1]).unwrap_or_default()).copied().collect()
    };
    known.stats = Stats {
        advantages: sequences(&stats.advantages),
        old_token_logps: tokens(&stats.old_token_logps),
        sampled_token_logps: tokens(&stats.sampled_token_logps),
        token_advantages: tokens(&stats.token_advantages),
        returns: tokens(&stats.returns),
        values: tokens(&stats.values),
        ..known.stats
    };
    (fewer, refs, known)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Sequence;

    #[test]
    fn what_is_left_out_is_in_no_list_and_counts_in_means_over_completions() {
        let sequence = |len: u32| Sequence::new((0..=len).collect(), 1);
        let example =
            |lens: &[u32]| Example { sequences: lens.iter().map(|len| sequence(*len)).collect(), ..Example::default() };
        let examples = vec![example(&[1, 3, 2]), example(&[3, 3]), example(&[3, 1])];
        let scored = |example: &Example| Scored {
            sums: example.sequences.iter().map(|s| -(s.ids.len() as f64)).collect(),
            tokens: example.sequences.iter().map(|s| vec![-1.0; s.ids.len() - 1]).collect(),
        };
        let refs = vec![examples.iter().map(scored).collect::<Vec<_>>()];
        // The third of the first example is the data's answer.
        let mut sampled = Sampled::new(&examples, vec![2, 2, 2], 3);
        sampled.stats.advantages = (0..7).map(f64::from).collect();
        sampled.stats.old_token_logps = (0..16).map(f64::from).collect();
        let keep: Vec<bool> = examples.iter().flat_map(|e| &e.sequences).map(|s| s.ids.len() < 4).collect();
        let (left, refs, known) = leave_out((examples, refs, sampled), &keep);
        assert_eq!(left.iter().map(|e| e.sequences.len()).collect::<Vec<_>>(), [2, 1]);
        assert_eq!((&refs[0][0].sums[..], refs[0][1].tokens.len()), (&[-2.0, -3.0][..], 1));
        let stats = &known.stats;
        assert_eq!(stats.advantages, [0.0, 2.0, 6.0]);
        assert_eq!(stats.old_token_logps, [0.0, 4.0, 5.0, 15.0]);
        assert_eq!(
            (&stats.offsets[..], &stats.lens[..], stats.longest),
            (&[0, 1, 3, 4][..], &[1.0, 2.0, 1.0][..], 3.0)
        );
        assert_eq!((&stats.groups[..], &stats.answers[..]), (&[0..1, 2..3][..], &[1][..]));
        // Four of seven are left out: of each example that is left, two.
        assert_eq!(known.absent, 2.0);
    }
}
