//! The memory of the program itself, beside what a device holds. Its parts follow from sizes that are known before the
//! run; the factors were measured (VmRSS of an x86-64 Linux process with glibc, tokenizers 0.23), each named with where
//! it comes from.

use std::path::Path;

use super::settings::Settings;
use super::task::Task;
use crate::data::{Extent, Sequence};
use crate::device::cuda::STAGING_BYTES;
use crate::model::Spec;
use crate::ops::{self, logprob_head};
use crate::rollout::{self, Request, Size};

/// Pages of the program and its libraries, stacks, file buffers: 8 MiB in a run of a tiny model without data, when the program was a
/// file of 95 MB, 5 more, in one run beside the other, when it was one of 105 MB, and 7 more now that it is one of 118 MB.
const PROGRAM: usize = 21 << 20;
/// A tokenizer takes 6.3 times its file once parsed (SmolLM2's tokenizer.json of 1.7 MiB: 10.8 MiB) ...
const TOKENIZER: f64 = 6.3;
/// ... and, with the parser's tree beside it, 28 times its file while it is read (49 MiB).
const TOKENIZER_READING: f64 = 28.0;
/// The encoder's caches and what the allocator keeps: 1.5 MiB after 6 thousand tokens, 11 after 226 thousand, 14 after
/// 746 thousand and after 7 million.
const ENCODER: f64 = (14 << 20) as f64;
/// Tokens after which half of [`ENCODER`] is taken.
const ENCODER_HALF: f64 = 55_000.0;
/// Text, rows and encodings while a data set is read, by token: 7.5 million tokens took 60 MiB at their peak.
const READING_PER_TOKEN: usize = 8;
/// An example and a sequence with their vectors' headers, sums of reference log-probabilities and order.
const PER_EXAMPLE: usize = 120;
const PER_SEQUENCE: usize = 80;
/// What each further reference said about them: vectors' headers and sums.
const SAID_PER_EXAMPLE: usize = 64;
const SAID_PER_SEQUENCE: usize = 32;
/// Vectors of a micro-batch by row: tokens, positions, targets, log-probabilities and their derivatives.
const PER_ROW: usize = 40;
/// Vectors of a head that a thread keeps in `ops/attention/cpu.rs`: eleven buffers of 64.
const ATTENTION_VECTORS: usize = 11 * 64;

/// Sizes that the host's memory follows from.
pub struct Host {
    threads: usize,
    /// Products and attention are a GPU's, which wants memory to exchange data through instead.
    gpu: bool,
    tokenizer_bytes: usize,
    /// The largest of the references' own.
    other_tokenizer_bytes: usize,
    tokens: usize,
    examples: usize,
    sequences: usize,
    /// Bytes of what the references said.
    said: usize,
}

impl Host {
    pub fn new(task: &Task, settings: &Settings) -> Self {
        let own = task.references.iter().filter_map(|reference| reference.own.as_ref());
        let own = own.flat_map(|own| own.train.iter().chain(&own.eval));
        let examples = || task.datasets().into_iter().flat_map(|dataset| &dataset.examples);
        let sequences = || examples().flat_map(|example| &example.sequences);
        let own_tokens: usize = own.flat_map(|example| &example.sequences).map(|sequence| sequence.ids.len()).sum();
        let scored: usize = sequences().map(Sequence::targets).sum();
        let by_token = task.objective.needs().ref_token_logps;
        let said = examples().count() * SAID_PER_EXAMPLE
            + sequences().count() * SAID_PER_SEQUENCE
            + if by_token { scored * size_of::<f32>() } else { 0 };
        let others = task.references.iter().filter(|reference| reference.own.is_some());
        let asked = || task.exams.iter().flat_map(|exam| &exam.tokens.examples);
        let texts = || asked().flat_map(|example| &example.sequences);
        let tokens = |sequence: &Sequence| sequence.ids.len();
        Self {
            tokens: sequences().chain(texts()).map(tokens).sum::<usize>() + own_tokens,
            examples: examples().chain(asked()).count(),
            sequences: sequences().chain(texts()).count(),
            said: task.references.len().saturating_sub(1) * said + usize::from(by_token) * said,
            other_tokenizer_bytes: others.map(|other| tokenizer_bytes(other.reference.path())).max().unwrap_or(0),
            ..Self::without_data(settings)
        }
    }

    pub fn without_data(settings: &Settings) -> Self {
        Self::of_model(&settings.model, settings.threads, settings.gpu)
    }

    /// Of a command that runs the model of a folder on no data set.
    pub fn of_model(model: &Path, threads: usize, gpu: bool) -> Self {
        Self {
            threads,
            gpu,
            tokenizer_bytes: tokenizer_bytes(model),
            other_tokenizer_bytes: 0,
            tokens: 0,
            examples: 0,
            sequences: 0,
            said: 0,
        }
    }

    /// The largest amount while tokenizer and data are read.
    pub fn reading(&self) -> usize {
        let reading = |bytes: usize| (TOKENIZER_READING * bytes as f64) as usize;
        let other = match self.other_tokenizer_bytes {
            0 => 0,
            bytes => self.resting() + reading(bytes),
        };
        let data = self.resting() + READING_PER_TOKEN * self.tokens;
        self.program() + reading(self.tokenizer_bytes).max(data).max(other)
    }

    fn program(&self) -> usize {
        PROGRAM + if self.gpu { STAGING_BYTES } else { 0 }
    }

    /// Of the data and its tokenizer, once read.
    fn resting(&self) -> usize {
        let encoder = ENCODER * self.tokens as f64 / (self.tokens as f64 + ENCODER_HALF);
        let data = self.tokens * size_of::<u32>() + self.examples * PER_EXAMPLE + self.sequences * PER_SEQUENCE;
        (TOKENIZER * self.tokenizer_bytes as f64 + encoder) as usize + data + self.said
    }

    /// While micro-batches up to `largest` go through the engine, with adapters of this rank.
    pub fn working(&self, spec: &Spec, largest: &Extent, rank: usize) -> usize {
        let arithmetic = match self.gpu {
            true => 0,
            false => packed(spec, largest, rank) + self.threads * ATTENTION_VECTORS * spec.head_dim * size_of::<f32>(),
        };
        self.program() + self.resting() + arithmetic + largest.rows * PER_ROW
    }
}

impl Host {
    /// While a model is read whose largest tensor has so many elements.
    pub fn loading(&self, tensor: usize) -> usize {
        self.program() + self.resting() + tensor * size_of::<f32>()
    }

    /// While these requests are generated, with as many completions at a time as may be.
    pub fn generating(&self, spec: &Spec, rank: usize, requests: &[Request]) -> usize {
        let size = Size::of(spec, requests, rollout::MAX_RUNNING).extent;
        let sampling = if self.gpu { 0 } else { self.threads * ops::sample::scratch_bytes(spec.vocab) };
        self.working(spec, &size, rank) + sampling
    }

    /// What threads keep that draw tokens and multiply few rows: a run that samples between its steps has it in them, too.
    pub fn drawing(&self, spec: &Spec) -> usize {
        let each = ops::sample::scratch_bytes(spec.vocab) + ops::few_rows_bytes();
        if self.gpu { 0 } else { self.threads * each }
    }
}

fn tokenizer_bytes(model: &Path) -> usize {
    std::fs::metadata(model.join("tokenizer.json")).map_or(0, |file| file.len() as usize)
}

/// What the largest products of a step need for their packed operands.
fn packed(spec: &Spec, largest: &Extent, rank: usize) -> usize {
    let (rows, top) = (largest.rows, largest.targets.min(logprob_head::TILE_ROWS));
    let wide = spec.heads * spec.head_dim;
    let layers =
        [(rows, wide, spec.hidden), (rows, spec.mlp_dim, spec.hidden), (top, logprob_head::TILE_VOCAB, spec.hidden)];
    // y = x W^T, dx = dy W and dW = dy^T x, of a layer and of one that leads back.
    let products = layers.into_iter().flat_map(|(rows, outputs, inputs)| {
        [[rows, outputs, inputs], [rows, inputs, outputs], [outputs, inputs, rows], [inputs, outputs, rows]]
    });
    let [a, b] = products.map(ops::packed_bytes).fold([0, 0], |[a, b], [c, d]| [a.max(c), b.max(d)]);
    let adapters = match rank {
        0 => 0,
        _ => ops::low_rank::scratch_bytes(rows, wide.max(spec.mlp_dim).max(spec.hidden)),
    };
    a + b + adapters
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_data_and_threads_take_more() {
        let host = |threads, tokens| Host {
            threads,
            gpu: false,
            tokenizer_bytes: 1 << 20,
            other_tokenizer_bytes: 0,
            tokens,
            examples: 1,
            sequences: 2,
            said: 0,
        };
        assert!(host(1, 0).reading() > PROGRAM + (20 << 20), "the tokenizer's tree");
        let grown = host(1, 10_000_000).resting() - host(1, 1_000_000).resting();
        assert!((36_000_000..40_000_000).contains(&grown), "four bytes a token, once the caches are full: {grown}");
        assert!(host(1, 10_000_000).reading() > host(1, 10_000_000).resting() + 80_000_000);
    }
}
