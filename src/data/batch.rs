//! Padding-free prefix trees of sequences, and how examples are packed into them.

use std::ops::Range;

use super::dataset::{Example, Sequence};

/// Rows `start..start + len` of a batch. Its first token sits at `position`, right after its parent's last.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Segment {
    pub start: usize,
    pub len: usize,
    /// Index of the segment whose tokens come before these; always smaller than the segment's own.
    pub parent: Option<usize>,
    pub position: usize,
}

/// A padding-free prefix tree of sequences: the only layout the engine trains on. A row is a token that is run.
/// All tokens of a sequence are run, its last one too.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Batch {
    /// `[rows]` token ids.
    pub tokens: Vec<u32>,
    /// `[rows]` positions in the sequence, from 0.
    pub positions: Vec<u32>,
    /// Segments in order of their rows, without gaps.
    pub segments: Vec<Segment>,
    /// `[targets]` the row whose hidden state predicts target i. A prompt's last row predicts the first token of
    /// every completion, so it occurs once per completion. With [`Read::Last`] the row that is read of sequence i.
    pub completion_rows: Vec<u32>,
    /// `[targets]` the scored token ids; with [`Read::Last`] the tokens of the rows that are read.
    pub targets: Vec<u32>,
    /// Per sequence: its range in `completion_rows` and `targets`.
    pub sequences: Vec<Range<usize>>,
    /// Per example: its range in `sequences`.
    pub examples: Vec<Range<usize>>,
    pub temperature: Temperature,
}

/// What logits are divided by before they become log-probabilities: above 0, finite.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Temperature(f64);

impl Temperature {
    /// The model's own distribution.
    pub const ONE: Self = Self(1.0);

    /// None where `1 / temperature` is no positive number in f32.
    pub fn new(temperature: f64) -> Option<Self> {
        (temperature > 0.0 && Self(temperature).scale().is_normal()).then_some(Self(temperature))
    }

    pub fn get(self) -> f64 {
        self.0
    }

    /// What logits are multiplied by.
    pub fn scale(self) -> f32 {
        (1.0 / self.0) as f32
    }
}

/// No NaN is one.
impl Eq for Temperature {}

impl Default for Temperature {
    fn default() -> Self {
        Self::ONE
    }
}

/// Whether the sequences of an example share the rows of their prompt. It changes the work, never a token.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Sharing {
    #[default]
    On,
    Off,
}

/// Which rows the model's head reads.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Read {
    /// Those that predict a scored token.
    #[default]
    Completions,
    /// One of each sequence, which sees all others: what a reward model judges by. It is that of the last token that is
    /// not `pad`, or of the first token where all are: where transformers' `..ForSequenceClassification` reads. Where
    /// the padding token is also the one that ends a text, its row is therefore not the one that is read.
    Last { pad: Option<u32> },
}

impl Batch {
    /// Lays the examples out in order: for each its shared prompt, if any, then its sequences.
    ///
    /// # Panics
    /// Where a sequence breaks `1 <= first < ids.len()`.
    pub fn new<'a>(examples: impl IntoIterator<Item = &'a Example>, sharing: Sharing) -> Self {
        Self::reading(Read::Completions, examples, sharing)
    }

    /// The same for a head that reads other rows.
    pub fn reading<'a>(read: Read, examples: impl IntoIterator<Item = &'a Example>, sharing: Sharing) -> Self {
        let mut batch = Self::default();
        for example in examples {
            let begin = batch.sequences.len();
            let shared = shared_len(example, sharing);
            let parent = (shared > 0).then(|| batch.push_segment(&example.sequences[0].ids[..shared], None));
            for sequence in &example.sequences {
                let child = batch.push_segment(&sequence.ids[shared..], parent);
                match read {
                    Read::Completions => {
                        batch.push_targets(sequence, child, sequence.scored().map(|t| (t - 1, t)));
                    }
                    Read::Last { pad } => {
                        let last = sequence.ids.iter().rposition(|id| Some(*id) != pad).unwrap_or(0);
                        batch.push_targets(sequence, child, [(last, last)]);
                    }
                }
            }
            batch.examples.push(begin..batch.sequences.len());
        }
        batch
    }

    /// The number of tokens that are run.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    pub fn extent(&self) -> Extent {
        Extent {
            rows: self.rows(),
            targets: self.targets.len(),
            segments: self.segments.len(),
            sequences: self.sequences.len(),
            longest: self.segments.iter().map(|segment| segment.position + segment.len).max().unwrap_or(0),
        }
    }

    fn push_segment(&mut self, ids: &[u32], parent: Option<usize>) -> usize {
        let position = parent.map_or(0, |parent| self.segments[parent].position + self.segments[parent].len);
        self.segments.push(Segment { start: self.rows(), len: ids.len(), parent, position });
        self.tokens.extend_from_slice(ids);
        self.positions.extend((position..position + ids.len()).map(|position| position as u32));
        self.segments.len() - 1
    }

    /// Reads `sequence`, whose last tokens are segment `child` and whose earlier ones are the child's parent, at
    /// (index of a token, index of the token that is its target).
    fn push_targets(&mut self, sequence: &Sequence, child: usize, reads: impl IntoIterator<Item = (usize, usize)>) {
        let child = self.segments[child];
        let row_of = |token: usize| match child.parent {
            Some(parent) if token < child.position => self.segments[parent].start + token,
            _ => child.start + token - child.position,
        };
        let begin = self.targets.len();
        for (token, target) in reads {
            self.completion_rows.push(row_of(token) as u32);
            self.targets.push(sequence.ids[target]);
        }
        self.sequences.push(begin..self.targets.len());
    }
}

/// Tokens that the sequences of an example have in common and run once: the prompt, as far as none of them is
/// scored within it. Every sequence keeps at least one token of its own, since `first < ids.len()`.
fn shared_len(example: &Example, sharing: Sharing) -> usize {
    let sequences = &example.sequences;
    for sequence in sequences {
        assert!(1 <= sequence.first && sequence.first < sequence.ids.len(), "no scored token in row {}", example.row);
    }
    if sharing == Sharing::Off || sequences.len() < 2 {
        return 0;
    }
    let prompt = sequences.iter().map(|sequence| sequence.first).min().unwrap_or(0);
    let common = sequences.iter().all(|sequence| sequence.ids[..prompt] == sequences[0].ids[..prompt]);
    if common { prompt } else { 0 }
}

/// Rows an example occupies in a batch: the sum of its sequences' lengths minus what is shared.
pub fn rows_of(example: &Example, sharing: Sharing) -> usize {
    extent_of(example, sharing).rows
}

/// What a batch of this example alone would be, without laying it out, where completions are read.
pub fn extent_of(example: &Example, sharing: Sharing) -> Extent {
    let (sequences, shared) = (&example.sequences, shared_len(example, sharing));
    let lens = || sequences.iter().map(|sequence| sequence.ids.len());
    Extent {
        rows: lens().sum::<usize>() - shared * sequences.len().saturating_sub(1),
        targets: sequences.iter().map(Sequence::targets).sum(),
        segments: sequences.len() + usize::from(shared > 0),
        sequences: sequences.len(),
        longest: lens().max().unwrap_or(0),
    }
}

/// Size of a batch: enough to allocate for it.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Extent {
    pub rows: usize,
    pub targets: usize,
    pub segments: usize,
    pub sequences: usize,
    /// Tokens from a root to the end of the deepest leaf.
    pub longest: usize,
}

impl Extent {
    /// Both batches one after the other, as one.
    pub fn join(self, other: Self) -> Self {
        Self {
            rows: self.rows + other.rows,
            targets: self.targets + other.targets,
            segments: self.segments + other.segments,
            sequences: self.sequences + other.sequences,
            longest: self.longest.max(other.longest),
        }
    }

    /// The larger of each size: enough for either batch.
    pub fn max(self, other: Self) -> Self {
        Self {
            rows: self.rows.max(other.rows),
            targets: self.targets.max(other.targets),
            segments: self.segments.max(other.segments),
            sequences: self.sequences.max(other.sequences),
            longest: self.longest.max(other.longest),
        }
    }
}

/// Cuts `examples` into consecutive batches of at most `budget` rows, each as long as it can be. An example larger
/// than the budget gets a batch of its own. Never reorders, leaves nothing out.
pub fn pack(examples: &[&Example], budget: usize, sharing: Sharing) -> Vec<Range<usize>> {
    let mut batches = Vec::new();
    let (mut begin, mut rows) = (0, 0);
    for (i, example) in examples.iter().enumerate() {
        let more = rows_of(example, sharing);
        if i > begin && rows + more > budget {
            batches.push(begin..i);
            (begin, rows) = (i, 0);
        }
        rows += more;
    }
    if begin < examples.len() {
        batches.push(begin..examples.len());
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn example(first: usize, sequences: &[&[u32]]) -> Example {
        let sequences = sequences.iter().map(|ids| Sequence::new(ids.to_vec(), first)).collect();
        Example { sequences, ..Example::default() }
    }

    #[test]
    fn a_pair_shares_its_prompt() {
        let pair = example(2, &[&[7, 8, 1, 2], &[7, 8, 3]]);
        let batch = Batch::new([&pair], Sharing::On);
        assert_eq!(batch.tokens, [7, 8, 1, 2, 3]);
        assert_eq!(batch.positions, [0, 1, 2, 3, 2]);
        assert_eq!(
            batch.segments,
            [
                Segment { start: 0, len: 2, parent: None, position: 0 },
                Segment { start: 2, len: 2, parent: Some(0), position: 2 },
                Segment { start: 4, len: 1, parent: Some(0), position: 2 },
            ]
        );
        assert_eq!(batch.completion_rows, [1, 2, 1]);
        assert_eq!(batch.targets, [1, 2, 3]);
        assert_eq!(batch.sequences, [0..2, 2..3]);
        assert_eq!(batch.examples, vec![0..2]);
        assert_eq!(batch.extent(), Extent { rows: 5, targets: 3, segments: 3, sequences: 2, longest: 4 });
    }

    #[test]
    fn without_sharing_every_sequence_is_a_root() {
        let pair = example(2, &[&[7, 8, 1, 2], &[7, 8, 3]]);
        let batch = Batch::new([&pair], Sharing::Off);
        assert_eq!(batch.tokens, [7, 8, 1, 2, 7, 8, 3]);
        assert_eq!(batch.completion_rows, [1, 2, 5]);
        assert!(batch.segments.iter().all(|segment| segment.parent.is_none()));
    }

    #[test]
    fn single_sequences_and_different_prompts_are_roots() {
        let alone = example(1, &[&[7, 8]]);
        let different = example(2, &[&[7, 8, 1], &[7, 9, 1]]);
        let batch = Batch::new([&alone, &different], Sharing::On);
        assert_eq!(batch.segments.len(), 3);
        assert_eq!(batch.rows(), 8);
        assert_eq!(batch.examples, [0..1, 1..3]);
    }

    #[test]
    fn sequences_of_a_group_may_start_at_different_tokens() {
        let mut group = example(3, &[&[7, 8, 9, 1], &[7, 8, 9, 2]]);
        group.sequences[1].first = 2;
        let batch = Batch::new([&group], Sharing::On);
        assert_eq!(batch.tokens, [7, 8, 9, 1, 9, 2]);
        assert_eq!(batch.targets, [1, 9, 2]);
        assert_eq!(batch.completion_rows, [2, 1, 4]);
    }

    #[test]
    fn a_reward_is_read_at_the_end_of_each_sequence() {
        const END: u32 = 9;
        let pair = example(2, &[&[7, 8, 1, END, END], &[7, 8, END]]);
        let text = example(1, &[&[END, END, END]]);
        let rows = |read, sharing| {
            let batch = Batch::reading(read, [&pair, &text], sharing);
            let ranges: Vec<Range<usize>> = (0..3).map(|i| i..i + 1).collect();
            assert_eq!((batch.sequences, batch.examples), (ranges, vec![0..2, 2..3]));
            let tokens: Vec<u32> = batch.completion_rows.iter().map(|row| batch.tokens[*row as usize]).collect();
            assert_eq!(tokens, batch.targets);
            batch.completion_rows
        };
        // Rows: 7 8 | 1 9 9 | 9 | 9 9 9.
        assert_eq!(rows(Read::Last { pad: None }, Sharing::On), [4, 5, 8]);
        assert_eq!(rows(Read::Last { pad: Some(3) }, Sharing::On), [4, 5, 8]);
        // What pads is passed over: of the second completion nothing is left, and its prompt is read.
        assert_eq!(rows(Read::Last { pad: Some(END) }, Sharing::On), [2, 1, 6]);
        assert_eq!(rows(Read::Last { pad: Some(END) }, Sharing::Off), [2, 6, 8]);
    }

    #[test]
    #[should_panic(expected = "no scored token")]
    fn a_sequence_without_a_scored_token_is_refused() {
        Batch::new([&example(2, &[&[7, 8]])], Sharing::On);
    }

    #[test]
    fn extents_merge_by_element() {
        let a = Extent { rows: 5, targets: 1, segments: 2, sequences: 1, longest: 5 };
        let b = Extent { rows: 4, targets: 3, segments: 1, sequences: 2, longest: 2 };
        assert_eq!(a.max(b), Extent { rows: 5, targets: 3, segments: 2, sequences: 2, longest: 5 });
        assert_eq!(Batch::default().extent(), Extent::default());
    }

    /// Groups of 1 to 5 sequences over one prompt, which the sequences of one in four groups do not share.
    fn examples() -> impl Strategy<Value = Vec<Example>> {
        let ids = |len: Range<usize>| prop::collection::vec(0..9u32, len);
        let group = (ids(1..9), prop::collection::vec((ids(1..7), 0..9usize), 1..6), 0..4u8);
        let example = group.prop_map(|(prompt, completions, broken)| {
            let sequences = completions.into_iter().enumerate().map(|(i, (completion, more))| {
                let mut ids = [prompt.as_slice(), &completion].concat();
                if broken == 0 {
                    ids[0] = 100 + i as u32;
                }
                let first = prompt.len() + more % completion.len();
                Sequence::new(ids, first)
            });
            Example { sequences: sequences.collect(), ..Example::default() }
        });
        prop::collection::vec(example, 0..6)
    }

    fn sharing() -> impl Strategy<Value = Sharing> {
        prop_oneof![Just(Sharing::On), Just(Sharing::Off)]
    }

    /// The rows from the root to the end of a segment.
    fn unroll(batch: &Batch, segment: usize) -> Vec<usize> {
        let Segment { start, len, parent, .. } = batch.segments[segment];
        let mut rows = parent.map_or(Vec::new(), |parent| unroll(batch, parent));
        rows.extend(start..start + len);
        rows
    }

    proptest! {
        #[test]
        fn unrolling_gives_the_sequences_back(examples in examples(), sharing in sharing()) {
            let batch = Batch::new(&examples, sharing);
            let parents: Vec<usize> = batch.segments.iter().filter_map(|segment| segment.parent).collect();
            let leaves: Vec<usize> = (0..batch.segments.len()).filter(|i| !parents.contains(i)).collect();
            let sequences: Vec<&Sequence> = examples.iter().flat_map(|example| &example.sequences).collect();
            prop_assert_eq!(leaves.len(), sequences.len());
            prop_assert_eq!(batch.sequences.len(), sequences.len());

            let mut scored = 0;
            for ((leaf, sequence), range) in leaves.into_iter().zip(sequences).zip(&batch.sequences) {
                let rows = unroll(&batch, leaf);
                let ids: Vec<u32> = rows.iter().map(|&row| batch.tokens[row]).collect();
                prop_assert_eq!(&ids, &sequence.ids);
                prop_assert!(rows.iter().zip(0..).all(|(&row, position)| batch.positions[row] == position));

                prop_assert_eq!(range.start, scored);
                prop_assert_eq!(&batch.targets[range.clone()], &ids[sequence.first..]);
                let before: Vec<u32> = (sequence.first..ids.len()).map(|token| rows[token - 1] as u32).collect();
                prop_assert_eq!(&batch.completion_rows[range.clone()], &before);
                scored = range.end;
            }
            prop_assert_eq!(scored, batch.targets.len());
            prop_assert_eq!(scored, batch.completion_rows.len());
        }

        #[test]
        fn segments_tile_the_rows_and_follow_their_parents(examples in examples(), sharing in sharing()) {
            let batch = Batch::new(&examples, sharing);
            let mut row = 0;
            for (i, segment) in batch.segments.iter().enumerate() {
                prop_assert_eq!(segment.start, row);
                prop_assert!(segment.len >= 1);
                row += segment.len;
                let end = segment.parent.map(|parent| batch.segments[parent].position + batch.segments[parent].len);
                prop_assert_eq!(segment.position, end.unwrap_or(0));
                prop_assert!(segment.parent.is_none_or(|parent| parent < i));
            }
            prop_assert_eq!(row, batch.rows());
            let joined = examples.iter().map(|e| extent_of(e, sharing)).fold(Extent::default(), Extent::join);
            prop_assert_eq!(batch.extent(), joined);
            let groups: Vec<usize> = batch.examples.iter().map(|range| range.len()).collect();
            prop_assert_eq!(groups, examples.iter().map(|example| example.sequences.len()).collect::<Vec<_>>());
        }

        #[test]
        fn sharing_saves_the_prompt_once_per_further_sequence(prompt in 1..40usize, rest in 1..40usize, n in 2..9usize) {
            let ids: Vec<u32> = (0..(prompt + rest) as u32).collect();
            let group = example(prompt, &vec![ids.as_slice(); n]);
            prop_assert_eq!(rows_of(&group, Sharing::Off), n * (prompt + rest));
            prop_assert_eq!(rows_of(&group, Sharing::On), prompt + n * rest);
        }

        #[test]
        fn packing_covers_all_in_order_within_the_budget(
            examples in examples(), budget in 0..80usize, sharing in sharing(),
        ) {
            let examples: Vec<&Example> = examples.iter().collect();
            let batches = pack(&examples, budget, sharing);
            let covered: Vec<usize> = batches.iter().cloned().flatten().collect();
            prop_assert_eq!(covered, (0..examples.len()).collect::<Vec<_>>());
            let rows = |range: Range<usize>| examples[range].iter().map(|example| rows_of(example, sharing)).sum::<usize>();
            for (i, batch) in batches.iter().enumerate() {
                prop_assert!(batch.len() == 1 || rows(batch.clone()) <= budget);
                // Greedy: the next example would not have fitted.
                prop_assert!(i + 1 == batches.len() || rows(batch.start..batch.end + 1) > budget);
            }
        }
    }
}
